"""sde_step and sde_log_prob: numerics, the replay theorem, independence of everything a result must
not depend on."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import editr2_kernels as ek
from editr2_kernels.guidance import make_latents
from editr2_kernels.stored_step import make_replay

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (1025,), (3, 21, 19), ()]
TABLE = ek.transition_table(ek.flow_sigmas(8, 3.0), noise_level=0.9, window=(1, 8))
CPS = ek.transition_table(ek.flow_sigmas(8, 3.0), dynamics="cps", noise_level=0.8)
INDEX = torch.tensor([1, 5, 0, 7])
SEED = torch.tensor([3, -4, 2**50, 0])
X, V, BOTH = torch.zeros(4, 6), torch.zeros(24).view(4, 6), torch.zeros(6, 6)


def case(shape, x_dtype=torch.float32, v_dtype=torch.float32, batch=4):
    x = torch.randn(batch, *shape).to(x_dtype)
    v = torch.randn(batch, *shape).to(v_dtype)
    return x, v, (v.float() + 0.1 * torch.randn(batch, *shape)).to(v_dtype)


def broadcast_row(table, index, shape):
    row = table[index].T
    return [c.view(-1, *[1] * len(shape)) for c in row]


def naive(x, v, eps, table, index):
    """A step as eager trainers write it, in whatever dtype comes in: the yardstick of rounding
    error."""
    a, b, _, s, w, c, _, _ = (
        value.to(x.dtype) for value in broadcast_row(table, index, x.shape[1:])
    )
    mu = a * x + b * v.to(x.dtype)
    x_next = mu + s * eps.to(x.dtype)
    z = x_next - mu
    return x_next, w.flatten() * (z * z).flatten(1).mean(1) + c.flatten() if x.dim() > 1 else None


def worst(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_step_error_is_that_of_rounding(backend, shape, dtype):
    """Two references: against float64, at most twice the error of the same-dtype eager step."""
    x, v, _ = case(shape, dtype, dtype)
    eps = torch.randn_like(x)
    exact, _ = naive(x.double(), v.double(), eps.double(), TABLE.double(), INDEX)
    eager, _ = naive(x, v, eps, TABLE, INDEX)
    out = ek.sde_step(x, v, TABLE, INDEX, None, noise=eps, backend=backend)
    assert out.x_next.dtype == dtype and out.log_prob.dtype == torch.float32
    assert worst(out.x_next, exact) <= 2 * worst(eager, exact) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_log_prob_against_float64(backend, shape, dtype):
    """Inputs are read exactly and everything after is fp32, so the same tight bound holds for every
    dtype."""
    x, v, v_ref = case(shape, dtype, dtype)
    x_next = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend).x_next
    out = ek.sde_log_prob(x, x_next, v, TABLE, INDEX, v_ref=v_ref, backend=backend)
    a, b, _, _, w, c, _, _ = broadcast_row(TABLE.double(), INDEX, shape)
    z = x_next.double() - (a * x.double() + b * v.double())
    exact = w.flatten() * (z * z).flatten(1).mean(1) + c.flatten()
    diff = b * (v.double() - v_ref.double())
    # z is a difference of fp32 numbers of size ~4: absolute error 2^-22; relative to S >= 0.3 about
    # 1e-6, squared 2x.
    torch.testing.assert_close(out.log_prob.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.mean_diff.double(), (diff * diff).flatten(1).mean(1), rtol=2e-6, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradient_error_is_that_of_rounding(backend, shape, dtype):
    x, v, v_ref = case(shape, dtype, dtype)
    x_next = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend).x_next
    g_log, g_diff = torch.randn(4), 5 * torch.randn(4)

    def gradient(function, v):
        v = v.clone().requires_grad_()
        out = function(v)
        (out[0] * g_log.to(out[0].dtype)).sum().add(
            (out[1] * g_diff.to(out[1].dtype)).sum()
        ).backward()
        return v.grad

    def eager(x, x_next, v, v_ref, table):
        a, b, _, _, w, c, _, _ = (value.to(v.dtype) for value in broadcast_row(table, INDEX, shape))
        z = x_next - (a * x + b * v)
        log_prob = w.flatten() * (z * z).flatten(1).mean(1) + c.flatten()
        return log_prob, (b * (v - v_ref)).square().flatten(1).mean(1)

    exact = gradient(
        lambda v: eager(x.double(), x_next.double(), v, v_ref.double(), TABLE.double()), v.double()
    )
    same_dtype = gradient(lambda v: eager(x, x_next, v, v_ref, TABLE), v)
    ours = gradient(
        lambda v: ek.sde_log_prob(x, x_next, v, TABLE, INDEX, v_ref=v_ref, backend=backend), v
    )
    assert ours.dtype == dtype
    # The floor is three fp32 roundings of the largest value: on four elements the eager path can be
    # lucky.
    assert worst(ours, exact) <= 2 * worst(same_dtype, exact) + 2e-7 * exact.abs().max().item()
    # Stored once from fp32: half a unit of the dtype (plus fp32 cancellation in z), whatever the
    # eager path loses.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.double(), exact, rtol=max(unit, 2e-5), atol=1e-5 * exact.abs().max().item()
    )


def test_each_gradient_alone(backend):
    x, v, v_ref = case((33,))
    x_next = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend).x_next
    both = [v.clone().requires_grad_() for _ in range(3)]
    out = [
        ek.sde_log_prob(x, x_next, leaf, TABLE, INDEX, v_ref=v_ref, backend=backend)
        for leaf in both
    ]
    out[0].log_prob.sum().backward()
    out[1].mean_diff.sum().backward()
    (out[2].log_prob.sum() + out[2].mean_diff.sum()).backward()
    torch.testing.assert_close(both[0].grad + both[1].grad, both[2].grad, rtol=1e-5, atol=1e-7)
    alone = v.clone().requires_grad_()
    ek.sde_log_prob(x, x_next, alone, TABLE, INDEX, backend=backend).log_prob.sum().backward()
    assert torch.equal(alone.grad, both[0].grad)


def test_gradient_goes_to_v_only(backend):
    x, v, v_ref = (t.requires_grad_() for t in case((9,)))
    step = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend)
    assert not step.x_next.requires_grad and not step.log_prob.requires_grad
    x_next = step.x_next.requires_grad_()
    out = ek.sde_log_prob(x, x_next, v, TABLE, INDEX, v_ref=v_ref, backend=backend)
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    assert v.grad is not None and x.grad is None and x_next.grad is None and v_ref.grad is None


def test_inputs_and_incoming_gradients_stay_as_they_were(backend):
    x, v, v_ref = case((130,))
    x_next = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend).x_next
    grads = torch.randn(4), torch.randn(4)
    inputs = [x, v, v_ref, x_next, TABLE, INDEX, SEED, *grads]
    before = [t.clone() for t in inputs]
    leaf = v.requires_grad_()
    out = ek.sde_log_prob(x, x_next, leaf, TABLE, INDEX, v_ref=v_ref, backend=backend)
    torch.autograd.backward(out, grads)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table", [TABLE, CPS], ids=["flow-sde", "cps"])
@pytest.mark.parametrize("store", DTYPES)
@pytest.mark.parametrize(
    "x_dtype, v_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_replay_is_bitwise(backend, table, store, x_dtype, v_dtype, shape):
    """The theorem: with the same velocity, the stored sample replays to the very bits of the
    rollout's log-prob."""
    x, v, v_ref = case(shape, x_dtype, v_dtype)
    step = ek.sde_step(x, v, table, INDEX, SEED, store_dtype=store, backend=backend)
    assert step.x_next.dtype == store and step.x_next.shape == x.shape
    for reference in (None, v_ref):
        replay = ek.sde_log_prob(x, step.x_next, v, table, INDEX, v_ref=reference, backend=backend)
        assert torch.equal(replay.log_prob, step.log_prob)
    noise = ek.philox_normal(SEED, INDEX, shape, backend=backend)
    given = ek.sde_step(x, v, table, INDEX, None, noise=noise, store_dtype=store, backend=backend)
    assert torch.equal(given.x_next, step.x_next) and torch.equal(given.log_prob, step.log_prob)


@pytest.mark.parametrize("store", DTYPES)
def test_samples_have_the_same_bits_on_every_backend(backend, store, skip_interpreted_bf16):
    skip_interpreted_bf16(store)
    x, v, _ = case((2, 1031), torch.float32, torch.bfloat16)
    ours = ek.sde_step(x, v, TABLE, INDEX, SEED, store_dtype=store, backend=backend)
    reference = ek.sde_step_ref(x, v, TABLE, INDEX, SEED, store_dtype=store)
    assert torch.equal(ours.x_next, reference.x_next)
    torch.testing.assert_close(
        ours.log_prob, reference.log_prob, rtol=1e-6, atol=1e-6
    )  # orders of summation differ


def test_ode_rows_are_euler_with_no_log_prob(backend):
    x, v, _ = case((301,))
    table = ek.transition_table(ek.flow_sigmas(8), dynamics="ode")
    step = ek.sde_step(x, v, table, INDEX, SEED, backend=backend)
    assert torch.equal(step.x_next, x + table[INDEX][:, 1:2] * v)
    assert torch.equal(step.log_prob, torch.zeros(4))
    leaf = v.requires_grad_()
    out = ek.sde_log_prob(x, step.x_next, leaf, table, INDEX, backend=backend)
    assert torch.equal(out.log_prob, torch.zeros(4))
    out.log_prob.sum().backward()
    assert not leaf.grad.any()


def everything(x, v, v_ref, table, index, seed, backend):
    step = ek.sde_step(x, v, table, index, seed, backend=backend)
    leaf = v.detach().clone().requires_grad_()
    out = ek.sde_log_prob(x, step.x_next, leaf, table, index, v_ref=v_ref, backend=backend)
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    return step.x_next, step.log_prob, out.log_prob.detach(), out.mean_diff.detach(), leaf.grad


@pytest.mark.parametrize("n", [37, 5003])
def test_a_sample_is_independent_of_batch_threads_and_order(backend, n, one_thread, two_threads):
    if backend == "triton":
        n = min(n, 1100)  # two programs a sample
    x, v, v_ref = case((n,), torch.bfloat16, torch.float32, batch=8)
    index, seed = torch.tensor([1, 5, 0, 7, 2, 2, 6, 3]), torch.arange(8) * 12345

    def run(rows):
        return everything(x[rows], v[rows], v_ref[rows], TABLE, index[rows], seed[rows], backend)

    whole = two_threads(lambda: run(slice(None)))
    order = torch.randperm(8)
    for rows, again in [
        (slice(None), run(slice(None))),
        (slice(None), one_thread(lambda: run(slice(None)))),
        (slice(2, 3), run(slice(2, 3))),
        (slice(4, 7), run(slice(4, 7))),
        (order, run(order)),
    ]:
        for a, b in zip(whole, again):
            assert torch.equal(a[rows], b)


def test_non_contiguous_inputs(backend):
    base = case((6, 5, 4))
    plain = everything(*base, TABLE, INDEX, SEED, backend)
    strided = [torch.empty(4, 4, 6, 5).permute(0, 2, 3, 1).copy_(t) for t in base]  # channels last
    wide = [
        torch.cat([t.flatten(1), torch.ones(4, 3)], 1)[:, :120].view(4, 6, 5, 4) for t in base
    ]  # batch stride 123
    table = torch.stack([TABLE, TABLE], 2)[:, :, 0]
    index, seed = torch.stack([INDEX, INDEX], 1)[:, 0], torch.stack([SEED, SEED], 1)[:, 1]
    for inputs in (strided, wide):
        for a, b in zip(plain, everything(*inputs, table, index, seed, backend)):
            assert torch.equal(a, b)
    transposed = [
        t.flatten(1).t().contiguous().t() for t in base
    ]  # [B, N] whose elements are B apart
    for a, b in zip(plain, everything(*transposed, table, index, seed, backend)):
        assert torch.equal(a.flatten(1) if a.dim() > 1 else a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, dtype):
    x, v, v_ref = case((3, 5), dtype, dtype, batch=0)
    outputs = everything(x, v, v_ref, TABLE, INDEX[:0], SEED[:0], backend)
    assert [tuple(t.shape) for t in outputs] == [(0, 3, 5), (0,), (0,), (0,), (0, 3, 5)]


def test_references_differentiate_in_float64():
    x, v, v_ref = (t.double() for t in case((2, 3)))
    table = TABLE.double()
    x_next = ek.sde_step_ref(x, v, table, INDEX, SEED).x_next
    assert x_next.dtype == torch.float64
    function = lambda v: tuple(ek.sde_log_prob_ref(x, x_next, v, table, INDEX, v_ref=v_ref))  # noqa: E731
    assert torch.autograd.gradcheck(function, v.requires_grad_())


@pytest.mark.parametrize("bad", [-1, 8])
def test_step_index_out_of_range(backend, bad):
    x, v, _ = case((5,))
    index = torch.tensor([1, 5, bad, 7])
    with pytest.raises(ValueError, match="step_index"):
        ek.sde_step(x, v, TABLE, index, SEED, backend=backend)
    with pytest.raises(ValueError, match="step_index"):
        ek.sde_log_prob(x, x, v, TABLE, index, backend=backend)
    out = ek.sde_step_ref(
        x, v, TABLE, index, SEED
    )  # what a GPU gives, where looking would be a sync
    assert (
        out.x_next.isnan().any(1).tolist()
        == out.log_prob.isnan().tolist()
        == [False, False, True, False]
    )


STEP_ERRORS = [
    (TypeError, "x ", {"x": None}),
    (TypeError, "x.dtype", {"x": torch.zeros(4, 6, dtype=torch.float64)}),
    (ValueError, "x ", {"x": torch.zeros(())}),
    (ValueError, "x ", {"x": torch.zeros(4, 0), "v": torch.zeros(4, 0)}),
    (ValueError, "v ", {"v": torch.zeros(4, 5)}),
    (TypeError, "v.dtype", {"v": torch.zeros(4, 6, dtype=torch.int32)}),
    (TypeError, "table", {"table": TABLE.double()}),
    (ValueError, "table", {"table": TABLE[:, :7]}),
    (TypeError, "step_index", {"step_index": INDEX.int()}),
    (ValueError, "step_index", {"step_index": INDEX[:2]}),
    (ValueError, "backend", {"backend": "fast"}),
]


@pytest.mark.parametrize("error, name, change", STEP_ERRORS)
def test_errors_name_the_argument(error, name, change):
    arguments = {
        "x": torch.zeros(4, 6),
        "v": torch.zeros(4, 6),
        "table": TABLE,
        "step_index": INDEX,
        **change,
    }
    with pytest.raises(error, match=f"^{name}"):
        ek.sde_step(**arguments, seed=SEED)
    with pytest.raises(error, match=f"^{name}"):
        ek.sde_log_prob(**arguments, x_next=arguments["x"])


def test_errors_of_one_op_only():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="seed"):
        ek.sde_step(x, x, TABLE, INDEX, None)
    with pytest.raises(TypeError, match="seed"):
        ek.sde_step(x, x, TABLE, INDEX, SEED.int())
    with pytest.raises(ValueError, match="noise"):
        ek.sde_step(x, x, TABLE, INDEX, SEED, noise=x[:, :3])
    with pytest.raises(TypeError, match="store_dtype"):
        ek.sde_step(x, x, TABLE, INDEX, SEED, store_dtype=torch.float64)
    with pytest.raises(TypeError, match="^out must be an SdeStep, got tuple"):
        ek.sde_step(x, x, TABLE, INDEX, SEED, out=(x, x[:, 0]))
    with pytest.raises(ValueError, match="x_next"):
        ek.sde_log_prob(x, x[:, :3], x, TABLE, INDEX)
    with pytest.raises(ValueError, match="v_ref"):
        ek.sde_log_prob(x, x, x, TABLE, INDEX, v_ref=x[:2])


OUT_ERRORS = [
    (ValueError, r"out.x_next must have the shape", {"x_next": torch.empty(4, 5)}),
    (TypeError, r"out.x_next.dtype", {"x_next": torch.empty(4, 6, dtype=torch.float64)}),
    (
        TypeError,
        r"out.x_next must have the store_dtype",
        {"x_next": torch.empty(4, 6), "store_dtype": torch.float16},
    ),
    (ValueError, r"out.x_next must be contiguous", {"x_next": torch.empty(6, 4).t()}),
    (
        ValueError,
        r"out.x_next must not require grad",
        {"x_next": torch.empty(4, 6, requires_grad=True)},
    ),
    (ValueError, r"out.x_next must not share memory with x", {"x_next": X}),
    (ValueError, r"out.x_next must not share memory with v", {"x_next": V.view(4, 6)}),
    (
        ValueError,
        r"out.x_next must not share memory with out.x0",
        {"x_next": BOTH[:4], "x0": BOTH[2:]},
    ),
    (ValueError, r"out.x0 is required", {"return_x0": True}),
    (TypeError, r"out.x0 must have the dtype of out.x_next", {"x0": torch.empty(4, 6).half()}),
    (TypeError, r"out.log_prob must be float32", {"log_prob": torch.empty(4).half()}),
    (ValueError, r"out.log_prob must have shape", {"log_prob": torch.empty(3)}),
    (TypeError, r"out.log_prob", {"log_prob": None}),
]


@pytest.mark.parametrize("error, message, change", OUT_ERRORS)
def test_errors_of_out_name_the_tensor(error, message, change):
    options = {name: change[name] for name in ("store_dtype", "return_x0") if name in change}
    given = {name: value for name, value in change.items() if name not in options}
    out = ek.SdeStep(**{"x_next": torch.empty(4, 6), "log_prob": torch.empty(4), **given})
    before = X.clone(), V.clone()
    with pytest.raises(error, match=f"^{message}"):
        ek.sde_step(X, V, TABLE, INDEX, SEED, out=out, **options)
    assert torch.equal(X, before[0]) and torch.equal(V, before[1])


@pytest.mark.parametrize("store", DTYPES)
@pytest.mark.parametrize("with_x0", [False, True])
def test_out_is_filled_with_what_would_be_returned(backend, store, with_x0):
    x, v, _ = case((3, 43))
    fresh = ek.sde_step(
        x, v, TABLE, INDEX, SEED, store_dtype=store, return_x0=with_x0, backend=backend
    )
    x0 = torch.empty(4, 3, 43, dtype=store) if with_x0 else None
    out = ek.SdeStep(torch.empty(4, 3, 43, dtype=store), torch.empty(4), x0)
    assert ek.sde_step(x, v, TABLE, INDEX, SEED, out=out, backend=backend) is out
    assert torch.equal(out.x_next, fresh.x_next) and torch.equal(out.log_prob, fresh.log_prob)
    assert torch.equal(out.x0, fresh.x0) if with_x0 else fresh.x0 is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 21, 19)])
def test_clean_prediction(backend, shape, dtype):
    """x0 = x - sigma v, rounded once; every backend has the same bits."""
    x, v, _ = case(shape, dtype, dtype)
    sigma = broadcast_row(TABLE, INDEX, shape)[6]
    out = ek.sde_step(
        x, v, TABLE, INDEX, SEED, store_dtype=torch.float32, return_x0=True, backend=backend
    )
    assert torch.equal(out.x0, x.float() - sigma * v.float())
    if backend != "triton" or dtype != torch.bfloat16:  # the interpreter truncates to bf16
        stored = ek.sde_step(x, v, TABLE, INDEX, SEED, return_x0=True, backend=backend).x0
        assert torch.equal(stored, out.x0.to(dtype))


@pytest.mark.parametrize("dynamics", ["ode", "dpm++sde"])
def test_second_order_rows(backend, dynamics):
    """C m_prev enters mu, its replay and its gradient; the reference is written out in float64."""
    table = ek.transition_table(ek.flow_sigmas(8, 3.0), dynamics=dynamics, solver="dpm++2m")
    index = torch.tensor([2, 5, 0, 4])
    x, v, v_ref = case((3, 21))
    m_prev = torch.randn_like(x).bfloat16()
    with pytest.raises(ValueError, match="^m_prev"):
        ek.sde_step(x, v, table, index, SEED, backend=backend)
    with pytest.raises(ValueError, match="^m_prev"):
        ek.sde_log_prob(x, x, v, table, index, backend=backend)
    missing = ek.sde_step_ref(
        x, v, table, index, SEED
    )  # what a GPU gives, where looking would be a sync
    assert missing.x_next.isnan().flatten(1).any(1).tolist() == [True, True, False, True]
    step = ek.sde_step(x, v, table, index, SEED, m_prev=m_prev, backend=backend)
    reference = ek.sde_step_ref(x, v, table, index, SEED, m_prev=m_prev)
    assert torch.equal(step.x_next, reference.x_next)

    a, b, c, s, w, const, _, _ = broadcast_row(table.double(), index, x.shape[1:])
    leaf = v.double().requires_grad_()
    mu = a * x.double() + b * leaf + c * m_prev.double()
    eps = ek.philox_normal(SEED, index, x.shape[1:])
    assert worst(step.x_next, mu + s * eps.double()) < 3e-6
    log_prob = (
        w.flatten() * (step.x_next.double() - mu).square().flatten(1).mean(1) + const.flatten()
    )
    log_prob.sum().backward()
    ours = v.clone().requires_grad_()
    out = ek.sde_log_prob(x, step.x_next, ours, table, index, m_prev=m_prev, backend=backend)
    assert torch.equal(out.log_prob, step.log_prob)
    out.log_prob.sum().backward()
    torch.testing.assert_close(out.log_prob.double(), log_prob.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.grad.double(), leaf.grad, rtol=2e-5, atol=1e-5 * leaf.grad.abs().max().item()
    )


def test_first_order_rows_ignore_a_missing_previous(backend):
    x, v, _ = case((9,))
    table = ek.transition_table(ek.flow_sigmas(8), dynamics="ode", solver="dpm++2m")
    ends = torch.tensor([0, 7, 0, 7])
    euler = ek.transition_table(ek.flow_sigmas(8), dynamics="ode")
    ours = ek.sde_step(x, v, table, ends, SEED, backend=backend)
    assert torch.equal(ours.x_next, ek.sde_step(x, v, euler, ends, SEED, backend=backend).x_next)


def test_rows_without_c_do_not_read_the_previous(backend):
    base = x, v, v_ref = case((9,))
    step_next, step_log_prob, log_prob, diff, grad = everything(*base, TABLE, INDEX, SEED, backend)
    m_prev, leaf = torch.full_like(x, math.nan), v.clone().requires_grad_()
    step = ek.sde_step(x, v, TABLE, INDEX, SEED, m_prev=m_prev, backend=backend)
    out = ek.sde_log_prob(
        x, step.x_next, leaf, TABLE, INDEX, m_prev=m_prev, v_ref=v_ref, backend=backend
    )
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    assert torch.equal(step.x_next, step_next) and torch.equal(step.log_prob, step_log_prob)
    assert (
        torch.equal(out.log_prob, log_prob)
        and torch.equal(out.mean_diff, diff)
        and torch.equal(leaf.grad, grad)
    )


@pytest.mark.parametrize("name", ["x_next", "v_ref", "v_old"])
def test_a_term_whose_factor_is_zero_is_not_evaluated(backend, name):
    """0 times infinity would be NaN, on either side."""
    x, v, v_ref = case((9,))
    tensors = {"x_next": x + v, "v_ref": v_ref, "v_old": v_ref + 1}
    factors = torch.zeros(4, 3)
    factors[:, list(tensors).index(name) - 1] = 1.0  # of another term

    def gradient(scale=1.0, **change):
        latents = {**tensors, **change}
        replay = make_replay(x, latents.pop("x_next"), v, TABLE, INDEX, **latents)
        given = factors, torch.tensor([scale]), None, None
        return torch.ops.editr2.replay_backward(*replay, *given, [True, False, False], backend)[0]

    clean = gradient()
    assert clean.isfinite().all() and torch.equal(
        gradient(**{name: torch.full_like(x, math.inf)}), clean
    )
    assert gradient(scale=math.inf).isinf().all()


def test_an_infinite_gradient_trains_no_ode_row(backend):
    x, v, _ = case((9,))
    leaf = v.requires_grad_()
    out = ek.sde_log_prob(x, x, leaf, TABLE, torch.tensor([0, 1, 0, 2]), backend=backend)
    out.log_prob.backward(torch.full((4,), math.inf))
    assert not leaf.grad[::2].any() and not leaf.grad[1::2].isfinite().any()


def test_a_second_derivative_raises():
    """Of the registration, which all backends share."""
    x, v, _ = case((9,))
    leaf = v.requires_grad_()
    out = ek.sde_log_prob(x, x, leaf, TABLE, INDEX)
    (grad,) = torch.autograd.grad(out.log_prob.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="sde_log_prob can be differentiated once only"):
        (grad.square().sum() + leaf.square().sum()).backward()


@pytest.mark.parametrize("store", DTYPES)
def test_score_of_the_unrounded_sample(backend, store):
    """As peers score: the log-prob of x' before its cast. Only in fp32 does the replay still
    agree."""
    x, v, _ = case((3, 401))
    eps = torch.randn_like(x)
    args = {"noise": eps, "store_dtype": store, "backend": backend}
    stored = ek.sde_step(x, v, TABLE, INDEX, None, **args)
    peer = ek.sde_step(x, v, TABLE, INDEX, None, score="unrounded", **args)
    assert torch.equal(peer.x_next, stored.x_next)
    row = TABLE[INDEX].double()
    expected = (
        -0.5 * (row[:, 3:4] > 0) * eps.double().square().flatten(1).mean(1, keepdim=True)
        + row[:, 5:6]
    )
    # z is recovered from x' - mu: an fp32 rounding of values of size 8 relative to S >= 0.3,
    # averaged over elements.
    torch.testing.assert_close(peer.log_prob.double(), expected[:, 0], rtol=1e-6, atol=2e-6)
    replay = ek.sde_log_prob(x, stored.x_next, v, TABLE, INDEX, backend=backend)
    noisy = TABLE[INDEX, 3] > 0
    assert torch.equal(replay.log_prob, stored.log_prob)
    assert torch.equal(replay.log_prob == peer.log_prob, ~noisy) or store == torch.float32
    with pytest.raises(ValueError, match="^score must be one of"):
        ek.sde_step(x, v, TABLE, INDEX, SEED, score="rounded")


def test_autocast_changes_nothing(backend):
    x, v, v_ref = case((33,), torch.float32, torch.bfloat16)
    plain = everything(x, v, v_ref, TABLE, INDEX, SEED, backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything(x, v, v_ref, TABLE, INDEX, SEED, backend)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, cast))


def test_opcheck():
    """Of the registration, which all backends share."""
    x, v, v_ref = case((11,), torch.bfloat16, torch.float32)
    ops, backend = torch.ops.editr2, "ref"
    torch.library.opcheck(ops.philox_normal, (SEED, INDEX, 9, torch.bfloat16, backend))
    latents = make_latents(x, v)
    torch.library.opcheck(
        ops.sde_step, (*latents, None, TABLE, INDEX, SEED, True, torch.float16, False, backend)
    )
    torch.library.opcheck(
        ops.sde_step, (*latents, v_ref, TABLE, INDEX, None, False, torch.float32, True, backend)
    )
    for x0 in (None, torch.empty(4, 11)):
        out = torch.empty(4, 11), x0, torch.empty(4)
        torch.library.opcheck(
            ops.sde_step_out, (*latents, None, TABLE, INDEX, SEED, True, backend, *out)
        )
    leaf = v.clone().requires_grad_()
    for reference in (v_ref, None):
        replay = make_replay(x, x, leaf, TABLE, INDEX, v_ref=reference)
        torch.library.opcheck(ops.sde_log_prob, (*replay, backend))
    replay = make_replay(x, x, v, TABLE, INDEX, v_ref=v_ref)
    grads = torch.randn(4), torch.randn(4)
    wanted = [True, False, False]
    torch.library.opcheck(ops.replay_backward, (*replay, None, None, *grads, wanted, backend))


def training_step(x, v, v_ref, index, seed):
    step = ek.sde_step(x, v, TABLE, index, seed)
    out = ek.sde_log_prob(x, step.x_next, v, TABLE, index, v_ref=v_ref)
    ratio = torch.exp(out.log_prob - step.log_prob)
    return step.x_next, (ratio + 0.1 * out.mean_diff).sum()


def check_compiled(compiled, sizes):
    for batch, height in sizes:
        x, v, v_ref = case((height, 6), torch.bfloat16, torch.float32, batch=batch)
        index, seed = torch.arange(batch) % 8, torch.arange(batch)
        results = []
        for function in (training_step, compiled):
            leaf = v.clone().requires_grad_()
            inputs = (x, leaf, v_ref, index, seed)
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
                if tensor.dim() > 1:
                    torch._dynamo.mark_dynamic(tensor, 1)
            x_next, loss = function(*inputs)
            loss.backward()
            results.append((x_next, loss.detach(), leaf.grad))
        assert math.isclose(results[0][1].item(), results[1][1].item(), rel_tol=1e-6)
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][2], results[1][2])


def test_compiles_with_out_buffers():
    torch._dynamo.reset()
    x, v, _ = case((5, 6))
    expected = ek.sde_step(x, v, TABLE, INDEX, SEED, return_x0=True)

    def step(x, v, x_next, log_prob, x0):
        ek.sde_step(x, v, TABLE, INDEX, SEED, out=ek.SdeStep(x_next, log_prob, x0))
        return x_next + x0

    out = torch.empty(4, 5, 6), torch.empty(4), torch.empty(4, 5, 6)
    total = torch.compile(step, fullgraph=True, backend="aot_eager")(x, v, *out)
    assert torch.equal(total, expected.x_next + expected.x0)
    for ours, theirs in zip(out, expected):
        assert torch.equal(ours, theirs)


def test_compiles_fullgraph_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    check_compiled(
        torch.compile(training_step, fullgraph=True, backend=counter),
        [(4, 5), (2, 9), (7, 16), (3, 33)],
    )
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    check_compiled(torch.compile(training_step, fullgraph=True), [(4, 5), (3, 8)])
