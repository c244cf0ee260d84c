"""token_log_prob: numerics, both forms, memory, independence of everything a row must not depend
on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import editr2_kernels as ek
from editr2_kernels.backends import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(3, 1), (4, 2), (5, 31), (2, 4097), (3, 32000)]
INF = float("inf")


def case(m, v, dtype=torch.float32, spread=3.0):
    return (spread * torch.randn(m, v)).to(dtype), torch.randint(v, (m,))


def eager(logits, ids, temperature):
    """As trainers write it, in whatever dtype comes in: the yardstick of rounding error."""
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def gradient(function, logits, g_log_prob, g_entropy):
    leaf = logits.detach().clone().requires_grad_()
    log_prob, entropy = function(leaf)
    (
        (log_prob * g_log_prob.to(log_prob.dtype)).sum()
        + (entropy * g_entropy.to(entropy.dtype)).sum()
    ).backward()
    return leaf.grad


def everything(logits, ids, grads, **options):
    """log_prob, entropy and the gradient to logits, of one call."""
    leaf = logits.detach().requires_grad_()
    out = ek.token_log_prob(leaf, ids, **options)
    torch.autograd.backward(out, grads)
    return *(value.detach() for value in out), leaf.grad


def worst(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, v", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_is_that_of_rounding(backend, m, v, dtype, temperature, skip_interpreted_bf16):
    """Two references: against float64, at most twice the error of the same-dtype eager path, both
    ways.

    The floor is 3 roundings of the largest value in fp32: of few rows the eager path can be lucky.
    """
    skip_interpreted_bf16(dtype)
    logits, ids = case(m, v, dtype)
    grads = torch.randn(m), torch.randn(m)
    out = ek.token_log_prob(logits, ids, temperature=temperature, backend=backend)
    exact, same = eager(logits.double(), ids, temperature), eager(logits, ids, temperature)
    for ours, truth, theirs in zip(out, exact, same):
        assert ours.dtype == torch.float32 and ours.shape == ids.shape
        assert worst(ours, truth) <= 2 * worst(theirs, truth) + 2e-7 * max(
            truth.abs().max().item(), 1.0
        )
    exact = gradient(lambda x: eager(x, ids, temperature), logits.double(), *grads)
    same = gradient(lambda x: eager(x, ids, temperature), logits, *grads)
    ours = gradient(
        lambda x: ek.token_log_prob(x, ids, temperature=temperature, backend=backend),
        logits,
        *grads,
    )
    assert ours.dtype == dtype and ours.shape == logits.shape
    assert worst(ours, exact) <= 2 * worst(same, exact) + 2e-7 * max(exact.abs().max().item(), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_against_float64(backend, dtype):
    """Inputs are read exactly and everything after is fp32, so one tight bound holds for every
    dtype."""
    logits, ids = case(4, 5003, dtype)
    out = ek.token_log_prob(logits, ids, backend=backend)
    for ours, truth in zip(out, eager(logits.double(), ids, 1.0)):
        torch.testing.assert_close(
            ours.double(), truth, rtol=5e-7, atol=1e-6
        )  # ln s near 12 has an ulp of 1e-6


def test_large_logits_keep_their_digits(backend):
    """At 10^4 an fp32 log-sum-exp has steps of 10^-3; kept in two parts it costs nothing."""
    logits, ids = case(4, 1000)
    logits = (logits * 64).round() / 64 + 1e4  # exact in fp32 with and without the shift
    grads = torch.randn(4), torch.randn(4)
    for a, b in zip(
        everything(logits, ids, grads, backend=backend),
        everything(logits - 1e4, ids, grads, backend=backend),
    ):
        assert torch.equal(a, b)


def test_extreme_and_forbidden_logits(backend):
    rows = [
        [1e4, -1e4, 0.0],
        [-INF, 2.0, -INF],
        [-INF, 1.0, 1.0],
        [3e38, -3e38, 3e38],
        [-3e4, -2e4, -2e4],
    ]
    logits, ids = torch.tensor(rows), torch.tensor([0, 1, 0, 2, 2])
    log_prob, entropy, grad = everything(
        logits, ids, (torch.ones(5), torch.ones(5)), backend=backend
    )
    ln2 = math.log(2)
    torch.testing.assert_close(log_prob, torch.tensor([0.0, 0.0, -INF, -ln2, -ln2]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.0, ln2, ln2, ln2]))
    expected = torch.tensor(
        [[0.0, 0, 0], [0, 0, 0], [1, -0.5, -0.5], [-0.5, 0, 0.5], [0, -0.5, 0.5]]
    )
    torch.testing.assert_close(grad, expected)


def test_the_largest_logit_may_come_late(backend):
    """A row longer than a few blocks of any kernel, in which all that was added before is scaled to
    each larger logit that appears."""
    v = 9001
    ramp = torch.linspace(-40.0, 40.0, v)
    nothing_before = torch.full((v,), -INF)
    nothing_before[v - 3 :] = torch.tensor([1.0, -2.0, 0.5])
    steps = torch.randn(v) + 30.0 * (torch.arange(v) // 2048)
    even = torch.randn(v)
    late = even.clone()
    late[v - 1] = 300.0  # beside it the rest is 0
    logits = torch.stack((ramp, ramp.flip(0), nothing_before, steps, even, late))
    ids = torch.tensor([v - 7, 7, v - 1, v - 2, 11, v - 1])
    out = ek.token_log_prob(logits, ids, temperature=0.7, backend=backend)
    for actual, expected in zip(out, eager(logits.double().clamp(min=-1e5), ids, 0.7)):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    for undefined in (math.nan, INF, -INF):
        row = torch.full((2, v), -INF)
        row[0, 5000] = undefined
        row[1, 3] = 0.0
        out = ek.token_log_prob(row, torch.tensor([0, 3]), backend=backend)
        assert out.log_prob.isnan().tolist() == out.entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
def test_undefined_rows_are_nan_and_stay_alone(backend, row):
    logits = torch.tensor([[1.0, 2.0, 3.0], row])
    out = everything(logits, torch.tensor([1, 1]), (torch.ones(2), torch.ones(2)), backend=backend)
    for value in out[:2]:
        assert value.isnan().tolist() == [False, True]
    assert out[2].isnan().any(1).tolist() == [False, True]


def test_temperature_is_a_scale(backend):
    logits, ids = case(4, 100)
    for temperature in (0.25, 4.0):  # powers of two: exact
        a = ek.token_log_prob(logits, ids, temperature=temperature, backend=backend)
        b = ek.token_log_prob(logits / temperature, ids, backend=backend)
        assert torch.equal(a.log_prob, b.log_prob) and torch.equal(a.entropy, b.entropy)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_not_looked_at(backend, ignore_index):
    logits, ids = case(4, 50)
    ids[:] = torch.tensor([7, ignore_index, 8, ignore_index])
    grads = torch.ones(4), torch.ones(4)
    full = everything(logits, torch.tensor([7, 9, 8, 9]), grads, backend=backend)
    logits[1::2] = math.nan
    out = everything(logits, ids, grads, ignore_index=ignore_index, backend=backend)
    for value, other in zip(out, full):
        assert torch.equal(value[::2], other[::2]) and not value[1::2].any()


def test_each_gradient_alone(backend):
    logits, ids = case(3, 77)
    leaves = [logits.clone().requires_grad_() for _ in range(3)]
    out = [ek.token_log_prob(leaf, ids, backend=backend) for leaf in leaves]
    out[0].log_prob.sum().backward()
    out[1].entropy.sum().backward()
    (out[2].log_prob.sum() + out[2].entropy.sum()).backward()
    torch.testing.assert_close(
        leaves[0].grad + leaves[1].grad, leaves[2].grad, rtol=1e-5, atol=1e-7
    )
    p = logits.softmax(-1)
    expected = torch.nn.functional.one_hot(ids, 77) - p
    torch.testing.assert_close(leaves[0].grad, expected, rtol=1e-5, atol=1e-7)
    expected = -p * (p.log() + out[1].entropy.detach()[:, None])
    torch.testing.assert_close(leaves[1].grad, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    v=st.integers(1, 300),
    spread=st.floats(0.0, 30.0),
    temperature=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**31),
)
def test_identities(v, spread, temperature, seed):
    """A shift of all logits changes nothing, so gradients add up to 0; 0 <= entropy <= ln V;
    log_prob <= 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(3, v, generator=generator)
    ids = torch.randint(v, (3,), generator=generator)
    grads = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    for backend in ("ref", *(["cpu"] if ek.backends()["cpu"].available else [])):
        log_prob, entropy, grad = everything(
            logits, ids, grads, temperature=temperature, backend=backend
        )
        size = (grads[0].abs() + grads[1].abs() * math.log(v + 1)) / temperature
        assert (grad.double().sum(1).abs() <= 2e-6 * size + 1e-12).all()
        assert (log_prob <= 1e-6).all()
        assert (entropy >= 0).all() and (entropy <= math.log(v) + 2e-6).all()


def test_entropy_is_minus_sum_p_log_p(backend):
    logits, ids = case(5, 321)
    p = logits.double().softmax(-1)
    out = ek.token_log_prob(logits, ids, backend=backend)
    torch.testing.assert_close(out.entropy.double(), -(p * p.log()).sum(-1), rtol=5e-7, atol=1e-6)
    uniform = ek.token_log_prob(torch.zeros(1, 321), ids[:1], backend=backend)
    torch.testing.assert_close(uniform.entropy, torch.full((1,), math.log(321)), rtol=2e-7, atol=0)


def test_reference_differentiates_in_float64():
    logits, ids = case(4, 7, torch.float64)
    ids[2] = -100
    function = lambda x: tuple(ek.token_log_prob_ref(x, ids, temperature=1.3))  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_backward_is_the_reference_differentiated(backend):
    logits, ids = case(4, 130)
    logits[:, 5] = -INF
    ids[:] = torch.tensor([7, -100, 8, 9])
    grads = torch.randn(4), torch.randn(4)
    ours = gradient(
        lambda x: ek.token_log_prob(x, ids, temperature=0.9, backend=backend), logits, *grads
    )
    auto = gradient(lambda x: ek.token_log_prob_ref(x, ids, temperature=0.9), logits, *grads)
    torch.testing.assert_close(ours, auto, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("v", [37, 70001])
def test_a_row_is_independent_of_batch_threads_and_order(backend, v, one_thread, two_threads):
    if backend == "triton":
        v = min(v, 5000)  # two blocks a row
    logits, ids = case(6, v, torch.bfloat16)
    grads = torch.randn(6), torch.randn(6)

    def run(rows):
        return everything(logits[rows], ids[rows], [g[rows] for g in grads], backend=backend)

    whole = two_threads(lambda: run(slice(None)))
    order = torch.randperm(6)
    for rows, again in [
        (slice(None), run(slice(None))),
        (slice(None), one_thread(lambda: run(slice(None)))),
        (slice(2, 3), run(slice(2, 3))),
        (order, run(order)),
    ]:
        for a, b in zip(whole, again):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree_bitwise(dtype):
    if not ek.backends()["cpu"].available:
        pytest.skip(ek.backends()["cpu"].reason)
    logits, ids = case(3, 4500, dtype, spread=30.0)
    logits[0, 3] = -INF
    grads = torch.randn(3), torch.randn(3)
    isa, results = native().isa(), []
    try:
        for name in native().supported_isas():
            native().set_isa(name)
            results.append(everything(logits, ids, grads, temperature=0.8, backend="cpu"))
    finally:
        native().set_isa(isa)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_shapes_and_strides(backend):
    logits, ids = case(6, 40)
    grads = torch.randn(6), torch.randn(6)
    plain = everything(logits, ids, grads, backend=backend)
    wide = torch.cat([logits, torch.full((6, 3), math.nan)], 1)[:, :40]
    transposed = logits.t().contiguous().t()
    strided_ids = torch.stack([ids, ids], 1)[:, 1]
    expanded = torch.randn(1).expand(6), torch.randn(1).expand(6)
    for value in (wide, transposed):
        for a, b in zip(plain, everything(value, strided_ids, grads, backend=backend)):
            assert torch.equal(a, b)
    for a, b in zip(
        everything(logits, ids, [g.clone() for g in expanded], backend=backend),
        everything(logits, ids, expanded, backend=backend),
    ):
        assert torch.equal(a, b)
    folded = everything(
        logits.view(2, 3, 40), ids.view(2, 3), [g.view(2, 3) for g in grads], backend=backend
    )
    for a, b in zip(plain, folded):
        assert torch.equal(a, b.flatten(0, 1)) and b.shape[:2] == (2, 3)
    single = everything(logits[1], ids[1], [g[1] for g in grads], backend=backend)
    for a, b in zip(plain, single):
        assert torch.equal(a[1], b)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(backend, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    grads = torch.zeros(shape), torch.zeros(shape)
    outputs = everything(torch.zeros(*shape, 5), ids, grads, backend=backend)
    assert [tuple(t.shape) for t in outputs] == [shape, shape, (*shape, 5)]
    hidden, weight = (
        torch.zeros(*shape, 4, requires_grad=True),
        torch.ones(5, 4, requires_grad=True),
    )
    out = ek.token_log_prob((hidden, weight), ids, backend=backend)
    out.log_prob.sum().backward()
    assert (
        out.entropy.shape == shape and hidden.grad.shape == hidden.shape and not weight.grad.any()
    )


def test_inputs_and_incoming_gradients_stay_as_they_were(backend):
    logits, ids = case(4, 130)
    hidden, weight = torch.randn(4, 8), torch.randn(130, 8)
    grads = torch.randn(4), torch.randn(4)
    inputs = [logits, ids, hidden, weight, *grads]
    before = [t.clone() for t in inputs]
    leaves = [t.requires_grad_() for t in (logits, hidden, weight)]
    torch.autograd.backward(ek.token_log_prob(leaves[0], ids, backend=backend), grads)
    torch.autograd.backward(ek.token_log_prob((leaves[1], leaves[2]), ids, backend=backend), grads)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_on_policy_ratio_is_exactly_one(backend):
    """The rollout scores what it sampled, training replays it: same function, same bits."""
    logits, ids = case(5, 700, torch.bfloat16)
    with torch.no_grad():
        old = ek.token_log_prob(logits, ids, temperature=0.7, backend=backend).log_prob
    new = ek.token_log_prob(logits.requires_grad_(), ids, temperature=0.7, backend=backend).log_prob
    assert torch.equal(torch.exp(new - old), torch.ones(5))


def hidden_case(m, h, v, dtype):
    return torch.randn(m, h).to(dtype), torch.randn(v, h).to(dtype), torch.randint(v, (m,))


def hidden_everything(hidden, weight, ids, grads, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    out = ek.token_log_prob(tuple(leaves), ids, **options)
    torch.autograd.backward(out, grads)
    return *(value.detach() for value in out), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 5, 99])
def test_hidden_form_is_the_logits_form(backend, dtype, chunk_rows, skip_interpreted_bf16):
    skip_interpreted_bf16(dtype)
    hidden, weight, ids = hidden_case(10, 24, 61, dtype)
    ids[4] = -100
    grads = torch.randn(10), torch.randn(10)
    options = {"temperature": 1.7, "backend": backend}
    ours = hidden_everything(hidden, weight, ids, grads, chunk_rows=chunk_rows, **options)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = ek.token_log_prob(leaves[0] @ leaves[1].t(), ids, **options)
    torch.autograd.backward(out, grads)
    # The same logits up to the rounding of a product with other row counts: a unit of the dtype, on
    # values of ~15.
    unit = torch.finfo(dtype).eps
    for a, b in zip(ours[:2], out):
        torch.testing.assert_close(a, b.detach(), rtol=4 * unit, atol=32 * unit)
    for a, leaf in zip(ours[2:], leaves):
        assert a.dtype == dtype
        torch.testing.assert_close(a, leaf.grad, rtol=4 * unit, atol=32 * unit)
    again = hidden_everything(hidden, weight, ids, grads, chunk_rows=chunk_rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_gradients_against_float64(dtype):
    """Two references over chunks: the weight's gradient is summed in fp32, so more chunks lose
    nothing."""
    hidden, weight, ids = hidden_case(64, 16, 97, dtype)
    grads = torch.randn(64), torch.randn(64)

    def through(hidden, weight):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = eager(leaves[0] @ leaves[1].t(), ids, 1.0)
        torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(grads, out)])
        return [leaf.grad for leaf in leaves]

    exact, same = through(hidden.double(), weight.double()), through(hidden, weight)
    for chunk_rows in (64, 8):
        ours = hidden_everything(hidden, weight, ids, grads, chunk_rows=chunk_rows)[2:]
        for a, truth, theirs in zip(ours, exact, same):
            assert worst(a, truth) <= 2 * worst(theirs, truth) + 1e-6 * truth.abs().max().item()


def test_hidden_gradient_wanted_for_one_only(backend):
    hidden, weight, ids = hidden_case(5, 6, 11, torch.float32)
    both = hidden_everything(hidden, weight, ids, (torch.ones(5), torch.ones(5)), backend=backend)
    for chosen in (0, 1):
        pair = [hidden.clone(), weight.clone()]
        pair[chosen].requires_grad_()
        out = ek.token_log_prob(tuple(pair), ids, backend=backend)
        (out.log_prob.sum() + out.entropy.sum()).backward()
        assert torch.equal(pair[chosen].grad, both[2 + chosen]) and pair[1 - chosen].grad is None


def test_hidden_state_of_an_ignored_row_reaches_nothing(backend):
    hidden, weight, ids = hidden_case(5, 6, 11, torch.float32)
    ids[2] = -100
    hidden[2] = math.nan
    out = hidden_everything(hidden, weight, ids, (torch.ones(5), torch.ones(5)), backend=backend)
    assert all(value.isfinite().all() for value in out)
    assert not any(value[2].any() for value in out[:3])


def test_autocast_changes_nothing(backend):
    hidden, weight, ids = hidden_case(6, 8, 30, torch.float32)
    grads = torch.ones(6), torch.ones(6)
    plain = hidden_everything(hidden, weight, ids, grads, backend=backend)
    from_logits = everything(hidden @ weight.t(), ids, grads, backend=backend)
    logits = hidden @ weight.t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (hidden @ weight.t()).dtype == torch.bfloat16
        again = hidden_everything(hidden, weight, ids, grads, backend=backend)
        logits_again = everything(logits, ids, grads, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((*plain, *from_logits), (*again, *logits_again)))


def peak_bytes(function):
    """The most memory that tensors allocated inside `function` held at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_of_both_forms():
    if not ek.backends()["cpu"].available:
        pytest.skip(ek.backends()["cpu"].reason)
    m, h, v, rows = 512, 32, 4000, 16
    hidden, weight, ids = hidden_case(m, h, v, torch.float32)
    logits = hidden @ weight.t()
    full, slack = 4 * m * v, 1 << 16
    grads = torch.ones(m), torch.ones(m)
    torch.use_deterministic_algorithms(False)
    assert peak_bytes(lambda: logits.clone()) >= full  # the yardstick sees a tensor of this size
    assert peak_bytes(lambda: everything(logits, ids, grads)) <= full + slack  # the gradient itself
    with torch.no_grad():
        assert peak_bytes(lambda: ek.token_log_prob(logits, ids)) <= slack
        assert (
            peak_bytes(lambda: ek.token_log_prob((hidden, weight), ids, chunk_rows=rows))
            <= 4 * rows * v + slack
        )
    leaves = [t.requires_grad_() for t in (hidden, weight)]

    def train():
        torch.autograd.backward(ek.token_log_prob(tuple(leaves), ids, chunk_rows=rows), grads)

    gradients = 4 * (m * h + v * h)
    assert peak_bytes(train) <= 4 * rows * v + gradients + slack < full / 4


ERRORS = [
    (TypeError, "logits ", {"logits": None}),
    (TypeError, "logits.dtype", {"logits": torch.zeros(4, 6, dtype=torch.float64)}),
    (ValueError, "logits ", {"logits": torch.zeros(())}),
    (ValueError, "logits ", {"logits": torch.zeros(4, 0)}),
    (ValueError, "logits ", {"logits": (torch.zeros(4, 2),)}),
    (TypeError, "hidden ", {"logits": (None, torch.zeros(6, 2))}),
    (TypeError, "weight ", {"logits": (torch.zeros(4, 2), None)}),
    (ValueError, "weight ", {"logits": (torch.zeros(4, 2), torch.zeros(6, 3))}),
    (ValueError, "weight ", {"logits": (torch.zeros(4, 2), torch.zeros(0, 2))}),
    (TypeError, "weight ", {"logits": (torch.zeros(4, 2), torch.zeros(6, 2).bfloat16())}),
    (TypeError, "ids ", {"ids": torch.zeros(4, dtype=torch.int32)}),
    (ValueError, "ids ", {"ids": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "ids ", {"ids": torch.tensor([0, 1, 6, 0])}),
    (ValueError, "ids ", {"ids": torch.tensor([0, 1, -1, 0])}),
    (ValueError, "temperature", {"temperature": 0.0}),
    (ValueError, "temperature", {"temperature": math.nan}),
    (TypeError, "temperature", {"temperature": torch.tensor(1.0)}),
    (TypeError, "temperature", {"temperature": None}),
    (ValueError, "chunk_rows", {"chunk_rows": 2}),
    (ValueError, "chunk_rows", {"logits": (torch.zeros(4, 2), torch.zeros(6, 2)), "chunk_rows": 0}),
    (ValueError, "backend", {"backend": "fast"}),
]


@pytest.mark.parametrize("error, name, change", ERRORS)
def test_errors_name_the_argument(error, name, change):
    arguments = {"logits": torch.zeros(4, 6), "ids": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(error, match=f"^{name}"):
        ek.token_log_prob(**arguments)


def test_id_outside_the_vocabulary(backend):
    logits, ids = case(4, 6)
    ids[2] = 6
    for value in (logits, (torch.zeros(4, 2), torch.zeros(6, 2))):
        with pytest.raises(ValueError, match="ids"):
            ek.token_log_prob(value, ids, backend=backend)
    out = ek.token_log_prob_ref(logits, ids)  # what a GPU gives, where looking would be a sync
    assert (
        out.log_prob.isnan().tolist() == out.entropy.isnan().tolist() == [False, False, True, False]
    )


def test_native_checks_its_arguments():
    if not ek.backends()["cpu"].available:
        pytest.skip(ek.backends()["cpu"].reason)
    logits, ids = case(2, 5)
    out = torch.full((8,), 7.0)
    good = {
        "logits": (logits.data_ptr(), 0, 5),
        "ids": ids.data_ptr(),
        "temperature": 1.0,
        "ignore_index": -100,
        "log_prob": out.data_ptr(),
        "entropy": out[2:].data_ptr(),
        "lse": out[4:].data_ptr(),
        "M": 2,
        "V": 5,
        "threads": 1,
    }
    bad = {
        "logits": (0, 0, 5),
        "ids": 0,
        "temperature": 0.0,
        "log_prob": 0,
        "entropy": 0,
        "lse": 0,
        "M": -1,
        "V": 0,
        "threads": 0,
    }
    for name, value in [
        *bad.items(),
        ("logits", (logits.data_ptr(), 3, 5)),
        ("logits", (logits.data_ptr(), 0, -5)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            native().token_log_prob(**{**good, name: value})
    ids[1] = 5
    with pytest.raises(ValueError, match="^ids"):
        native().token_log_prob(**good)
    assert (out == 7.0).all()


@pytest.mark.parametrize("form", ["token_log_prob", "hidden_token_log_prob"])
def test_a_second_derivative_raises(form):
    leaf, weight, ids = hidden_case(4, 6, 6, torch.float32)
    leaf.requires_grad_()
    out = ek.token_log_prob((leaf, weight) if form.startswith("hidden") else leaf, ids)
    (grad,) = torch.autograd.grad(out.log_prob.sum() + out.entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"editr2::{form} can be differentiated once only"):
        (grad.square().sum() + leaf.square().sum()).backward()


def test_opcheck(backend):
    if backend == "triton":
        pytest.skip("opcheck is about the registration, which all backends share")
    logits, ids = case(4, 11, torch.bfloat16)
    hidden, weight, _ = hidden_case(4, 3, 11, torch.float32)
    ops = torch.ops.editr2
    options = 0.7, -100
    torch.library.opcheck(ops.token_log_prob, (logits.requires_grad_(), ids, *options, backend))
    pair = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(ops.hidden_token_log_prob, (*pair, ids, *options, 3, backend))
    _, entropy, lse = ops.token_log_prob(logits.detach(), ids, *options, backend)
    rows = logits.detach(), ids, *options, lse, entropy
    torch.library.opcheck(ops.token_log_prob_backward, (*rows, torch.randn(4), None, backend))
    detached = [t.detach() for t in pair]
    rows = *detached, ids, *options, lse, entropy, None, torch.randn(4)
    torch.library.opcheck(ops.hidden_token_log_prob_backward, (*rows, True, False, 3, backend))


def training_step(logits, hidden, weight, ids):
    a = ek.token_log_prob(logits, ids, temperature=0.7)
    b = ek.token_log_prob((hidden, weight), ids, chunk_rows=2)
    return (a.log_prob + 0.1 * a.entropy - b.log_prob * b.entropy).sum()


def check_compiled(compiled, sizes):
    for m, v in sizes:
        logits, ids = case(m, v, torch.bfloat16)
        hidden, weight, _ = hidden_case(m, 4, v, torch.float32)
        results = []
        for function in (training_step, compiled):
            leaves = [t.clone().requires_grad_() for t in (logits, hidden, weight)]
            for tensor in (*leaves, ids):
                torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(leaves[0], 1)
            loss = function(*leaves, ids)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch")
@pytest.mark.parametrize("name", ["triton", "cuda"])
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("m, v", [*SIZES, (300, 151936)])
    def test_against_the_reference(self, name, m, v, dtype):
        logits, ids = case(m, v, dtype)
        ids[0] = -100
        grads = torch.randn(m), torch.randn(m)
        on_gpu = [t.cuda() for t in (logits, ids, *grads)]
        ours = everything(*on_gpu[:2], on_gpu[2:], temperature=0.7, backend=name)
        again = everything(*on_gpu[:2], on_gpu[2:], temperature=0.7, backend=name)
        assert all(torch.equal(a, b) for a, b in zip(ours, again))
        part = everything(
            *(t[1:3] for t in on_gpu[:2]),
            [g[1:3] for g in on_gpu[2:]],
            temperature=0.7,
            backend=name,
        )
        assert all(torch.equal(a[1:3], b) for a, b in zip(ours, part))
        unit = torch.finfo(dtype).eps
        for a, b in zip(ours, everything(logits, ids, grads, temperature=0.7, backend="ref")):
            torch.testing.assert_close(
                a.cpu(), b, rtol=max(unit if b.dtype == dtype else 0, 2e-6), atol=2e-6
            )

    def test_id_outside_the_vocabulary_is_nan(self, name):
        logits, ids = (t.cuda() for t in case(4, 100))
        ids[2] = 100
        grads = torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
        log_prob, entropy, grad = everything(logits, ids, grads, backend=name)
        expected = [False, False, True, False]
        assert (
            log_prob.isnan().tolist()
            == entropy.isnan().tolist()
            == grad.isnan().all(1).tolist()
            == expected
        )

    def test_is_captured_in_a_graph(self, name):
        logits, ids = (t.cuda() for t in case(4, 5000, torch.bfloat16))
        eager_result = ek.token_log_prob(logits, ids, backend=name)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ek.token_log_prob(logits, ids, backend=name)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager_result, captured))

    def test_hidden_form(self, name):
        hidden, weight, ids = (t.cuda() for t in hidden_case(100, 64, 3001, torch.bfloat16))
        grads = torch.ones(100, device="cuda"), torch.ones(100, device="cuda")
        ours = hidden_everything(hidden, weight, ids, grads, chunk_rows=32, backend=name)
        for a, b in zip(
            ours, hidden_everything(hidden, weight, ids, grads, chunk_rows=32, backend="ref")
        ):
            torch.testing.assert_close(
                a, b, rtol=2**-7, atol=1e-4
            )  # the same logits; gradients round to bf16
