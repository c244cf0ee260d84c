"""nft_loss: the formula as METHODS writes it, its identities, and independence of batch, order and
threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import editr2_kernels as ek

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (1025,), (3, 21, 19)]
SIGMA = torch.tensor([0.9, 0.25, 1.0, 0.06])
R = torch.tensor([0.8, 0.1, 1.0, 0.5])
BETA = 0.3


def case(shape, dtype=torch.float32, batch=4):
    """x0, noise, v, v_old, v_ref: velocities near noise - x0, as a policy's are."""
    x0, noise = torch.randn(batch, *shape), torch.randn(batch, *shape)
    v, v_old, v_ref = (noise - x0 + 0.3 * torch.randn(batch, *shape) for _ in range(3))
    return [t.to(dtype) for t in (x0, noise, v, v_old, v_ref)]


def per_sample(
    x0, noise, sigma, v, v_old, r, v_ref, beta=BETA, a_max=5.0, ref_weight=1e-4, min_weight=1e-5
):
    """The loss of each sample written with x_t and x_hat, in the dtype that comes in; weights as
    the papers' code."""

    def mean(value):
        return value.flatten(1).mean(1)

    t = sigma.to(v.dtype).view(-1, *[1] * (v.dim() - 1))
    r = r.to(v.dtype)
    x_t = (1 - t) * x0 + t * noise
    terms = []
    for v_side in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
        x_hat = x_t - t * v_side
        weight = mean((x_hat - x0).abs()).detach().clamp(min=min_weight)
        terms.append(mean((x_hat - x0) ** 2) / weight)
    policy = a_max * (r * terms[0] + (1 - r) * terms[1]) / beta
    reference = torch.zeros_like(policy) if v_ref is None else mean((v - v_ref) ** 2)
    return policy + ref_weight * reference, torch.stack((policy, *terms, reference)).detach()


def ours(tensors, sigma=SIGMA, r=R, beta=BETA, **options):
    x0, noise, v, v_old, v_ref = tensors
    leaf = v.detach().clone().requires_grad_()
    out = ek.nft_loss(x0, noise, sigma, leaf, v_old, r, beta=beta, v_ref=v_ref, **options)
    out.loss.backward()
    return out.loss.detach(), torch.stack(out.metrics), leaf.grad


def worst(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_rounding(backend, shape, dtype, skip_interpreted_bf16):
    """Two references: against float64 at most twice the error of the eager formula in the same
    dtype."""
    skip_interpreted_bf16(dtype)
    tensors = case(shape, dtype)

    def eager(x0, noise, v, v_old, v_ref):
        leaf = v.clone().requires_grad_()
        loss, parts = per_sample(x0, noise, SIGMA, leaf, v_old, R, v_ref)
        loss.mean().backward()
        return loss.mean().detach(), parts.mean(1), leaf.grad

    exact = eager(*[t.double() for t in tensors])
    same = eager(*tensors)
    loss, metrics, grad = ours(tensors, backend=backend)
    assert loss.dtype == metrics.dtype == torch.float32 and loss.shape == () and grad.dtype == dtype
    # Floors: a few fp32 roundings, for when the eager path is lucky on few elements.
    assert worst(loss, exact[0]) <= 2 * worst(same[0], exact[0]) + 1e-6 * exact[0].abs()
    assert worst(grad, exact[2]) <= 2 * worst(same[2], exact[2]) + 5e-7 * exact[2].abs().max()
    # Inputs are read exactly and summed in fp32, whatever their dtype; e -+ beta d cancels to 0.3
    # of its terms.
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(metrics[:4].double(), exact[1], rtol=3e-6, atol=0)
    assert metrics[4] == 0
    info = torch.finfo(dtype)
    floor = (
        2e-6 * exact[2].abs().max().item() + info.tiny * info.eps / 2
    )  # the last: subnormals of float16
    torch.testing.assert_close(grad.double(), exact[2], rtol=max(info.eps, 5e-6), atol=floor)


@pytest.mark.parametrize(
    "options", [{}, {"v_ref": None}, {"mask": [True, False, True, True], "normalizer": 7.0}]
)
def test_reference_is_the_formula_in_float64_and_passes_gradcheck(options):
    x0, noise, v, v_old, v_ref = (t.double() for t in case((2, 3)))
    options = {"v_ref": v_ref, **options}
    mask = torch.tensor(options.pop("mask", [True] * 4))
    norm = options.pop("normalizer", None)

    def function(v):
        return ek.nft_loss_ref(
            x0, noise, SIGMA, v, v_old, R, beta=BETA, mask=mask, normalizer=norm, **options
        ).loss

    expected = (per_sample(x0, noise, SIGMA, v, v_old, R, options["v_ref"])[0] * mask).sum() / (
        norm or mask.sum()
    )
    torch.testing.assert_close(function(v), expected, rtol=1e-14, atol=0)

    # The weights w carry no gradient: finite differences must hold them, the formula must not move
    # them.
    def held(v):
        t, d = SIGMA.double()[:, None, None], v - v_old
        loss = 0.0
        for sign, share in ((-1, R.double()), (1, 1 - R.double())):
            error = t * ((noise - x0) - v_old + sign * BETA * d)
            fixed = t * ((noise - x0) - v_old + sign * BETA * (start - v_old))
            loss = (
                loss
                + 5
                * share
                * error.square().mean((1, 2))
                / fixed.abs().mean((1, 2)).clamp(min=1e-5)
                / BETA
            )
        if options["v_ref"] is not None:
            loss = loss + 1e-4 * (v - v_ref).square().mean((1, 2))
        return (loss * mask).sum() / (norm or mask.sum())

    start = v.clone()
    assert torch.autograd.gradcheck(held, v.clone().requires_grad_())
    grads = [
        torch.autograd.grad(f(leaf := v.clone().requires_grad_()), leaf)[0]
        for f in (function, held)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 2.0), st.floats(0.0, 1.0), st.floats(0.01, 1.0))
def test_identities_at_the_old_policy(seed, beta, r, t):
    """v = v_old: both sides are equal, whatever beta, and the gradient is that of one side times 1
    - 2r."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, v = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma, share = torch.full((2,), t), torch.full((2,), r)
    leaf = v.clone().requires_grad_()
    out = ek.nft_loss_ref(x0, noise, sigma, leaf, v, share, beta=beta)
    out.loss.backward()
    assert out.metrics.positive == out.metrics.negative
    e, s = noise - x0 - v, sigma.double()[:, None]
    weight = (s * e.abs().mean(1, keepdim=True)).clamp(min=1e-5)
    expected = 5.0 * (1 - 2 * share.double()[:, None]) * 2 * s * s * e / weight / 5 / 2
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)


def test_half_optimality_at_the_old_policy_gives_no_gradient(backend):
    x0, noise, v, _, _ = case((33,))
    _, metrics, grad = ours((x0, noise, v, v, None), r=torch.full((4,), 0.5), backend=backend)
    assert metrics[1] == metrics[2] and not grad.any()


def test_descent_moves_towards_the_data_for_good_samples_and_away_for_bad_ones(backend):
    x0, noise, _, v_old, _ = case((33,))
    _, _, grad = ours(
        (x0, noise, v_old, v_old, None), r=torch.tensor([1.0, 1.0, 0.0, 0.0]), backend=backend
    )
    towards = ((noise - x0) - v_old).flatten(1)
    assert ((-grad * towards).sum(1) > 0).tolist() == [True, True, False, False]


def test_optimality():
    a = torch.tensor([-20.0, -5.0, 0.0, 2.5, 5.0, 9.0])
    assert ek.nft_optimality(a).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    assert ek.nft_optimality(a, 10.0).tolist() == pytest.approx([0.0, 0.25, 0.5, 0.625, 0.75, 0.95])
    with pytest.raises(ValueError, match="^advantage_max"):
        ek.nft_optimality(a, 0.0)


def test_least_weight(backend):
    """Where both sides hit x0 almost exactly, the weight is min_weight and nothing divides by 0."""
    x0, noise, _, _, _ = case((9,))
    v = noise - x0
    loss, metrics, grad = ours((x0, noise, v, v, None), backend=backend)
    assert loss == 0 and not metrics.any() and not grad.any()
    v_old = v + 1e-4
    loss, metrics, _ = ours((x0, noise, v_old, v_old, None), min_weight=10.0, backend=backend)
    expected = per_sample(
        *(t.double() for t in (x0, noise, SIGMA, v_old, v_old, R)), None, min_weight=10.0
    )
    torch.testing.assert_close(
        loss.double(), expected[0].mean(), rtol=1e-3, atol=0
    )  # e is 1e-4 +- an fp32 rounding


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_samples_do_nothing_whatever_they_hold(backend, bad):
    tensors = case((130,))
    mask = torch.tensor([True, False, True, False])
    clean = ours([t[mask] for t in tensors], SIGMA[mask], R[mask], backend=backend)
    for i in range(5):
        spoiled = [t.clone() for t in tensors]
        spoiled[i][1] = bad
        loss, metrics, grad = ours(spoiled, mask=mask, backend=backend)
        assert torch.equal(loss, clean[0]) and torch.equal(metrics, clean[1])
        assert torch.equal(grad[mask], clean[2]) and not grad[~mask].any()
    for scalars in (
        {"sigma": torch.tensor([0.9, bad, 1.0, 0.06])},
        {"r": torch.tensor([0.8, bad, 1.0, 0.5])},
    ):
        loss, metrics, grad = ours(tensors, mask=mask, backend=backend, **scalars)
        kept = {"sigma": SIGMA, "r": R, **scalars}
        again = ours(
            [t[mask] for t in tensors], kept["sigma"][mask], kept["r"][mask], backend=backend
        )
        assert torch.equal(loss, again[0]) and torch.equal(metrics, again[1])
        assert not grad[~mask].any() and not metrics[4]


def test_the_differentiable_reference_masks_as_the_operators_do():
    """0 times NaN is NaN: what autograd makes of a mask that only multiplies the loss."""
    x0, noise, v, v_old, v_ref = case((9,))
    v[1] = math.nan
    mask, leaf = torch.tensor([True, False, True, True]), v.requires_grad_()
    out = ek.nft_loss_ref(x0, noise, SIGMA, leaf, v_old, R, beta=BETA, v_ref=v_ref, mask=mask)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.isfinite() and out.metrics.non_finite == 0
    assert not grad[1].any() and grad[mask].all() and grad[mask].isfinite().all()


def test_all_masked(backend):
    for normalizer in (None, 3.0):
        out = ours(
            case((5,)),
            mask=torch.zeros(4, dtype=torch.bool),
            normalizer=normalizer,
            backend=backend,
        )
        assert not any(t.any() for t in out)


def test_non_finite_flag(backend):
    tensors = case((20,))
    tensors[2][3, 7] = math.nan
    loss, metrics, _ = ours(tensors, backend=backend)
    assert loss.isnan() and metrics[4] == 1


def test_halves_with_a_common_normalizer_are_the_whole(backend):
    tensors = case((260,), batch=6)
    sigma, r = torch.rand(6) * 0.9 + 0.1, torch.rand(6)
    mask = torch.tensor([True, True, False, True, True, True])
    loss, _, grad = ours(tensors, sigma, r, mask=mask, normalizer=5.0, backend=backend)
    parts = [
        ours([t[s] for t in tensors], sigma[s], r[s], mask=mask[s], normalizer=5.0, backend=backend)
        for s in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat([p[2] for p in parts]), grad)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=1e-6, atol=0)
    counted = ours(tensors, sigma, r, mask=mask, backend=backend)
    assert torch.equal(counted[0], loss) and torch.equal(counted[2], grad)  # None counts the five


def test_incoming_gradient_scales(backend):
    x0, noise, v, v_old, v_ref = case((40,))
    grads = []
    for scale in (1.0, 4.0):  # a power of two: the scaled gradient has the same bits
        leaf = v.clone().requires_grad_()
        (
            ek.nft_loss(
                x0, noise, SIGMA, leaf, v_old, R, beta=BETA, v_ref=v_ref, backend=backend
            ).loss
            * scale
        ).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0] * 4, grads[1])


@pytest.mark.parametrize("r", [0.0, 1.0])
def test_a_term_whose_factor_is_zero_is_not_evaluated(backend, r):
    """r = 0 and r = 1 have one side alone: 0 times an infinite gradient, or times an infinite
    latent, would be NaN."""
    x0, noise, v, v_old, v_ref = case((9,))
    given = {"beta": BETA, "ref_weight": 0.0, "backend": backend}
    leaf = v.clone().requires_grad_()
    loss = ek.nft_loss(
        x0, noise, SIGMA, leaf, v_old, torch.full((4,), r), v_ref=v_ref, **given
    ).loss
    (loss * math.inf).backward()
    assert leaf.grad.isinf().all()
    factors, scale = torch.tensor([[-r, 1.0 - r, 0.0]]).expand(4, 3), torch.ones(1)
    backward = torch.ops.editr2.nft_loss_backward
    clean = backward(x0, noise, v, v_old, v_ref, factors, scale, BETA, backend)
    infinite = backward(
        x0, noise, v, v_old, torch.full_like(v, math.inf), factors, scale, BETA, backend
    )
    assert clean.all() and torch.equal(infinite, clean)


@pytest.mark.parametrize("n", [37, 5003])
def test_a_sample_is_independent_of_batch_threads_and_order(backend, n, one_thread, two_threads):
    if backend == "triton":
        n = min(n, 1100)
    tensors = case((n,), torch.bfloat16, batch=8)
    tensors[2] = tensors[2].float()
    sigma, r = torch.rand(8) * 0.9 + 0.1, torch.rand(8)

    def run(rows):
        return ours(
            [t[rows] for t in tensors], sigma[rows], r[rows], normalizer=8.0, backend=backend
        )

    whole = two_threads(lambda: run(slice(None)))
    for again in (run(slice(None)), one_thread(lambda: run(slice(None)))):
        assert all(torch.equal(a, b) for a, b in zip(whole, again))
    order = torch.randperm(8)
    for rows in (slice(2, 3), slice(4, 7), order):
        assert torch.equal(whole[2][rows], run(rows)[2])
    alone = [run(slice(i, i + 1))[0] for i in range(8)]
    torch.testing.assert_close(torch.stack(alone).sum(), whole[0], rtol=1e-6, atol=0)


def test_non_contiguous_inputs(backend):
    tensors = case((6, 5, 4))
    plain = ours(tensors, mask=torch.tensor([True, False, True, True]), backend=backend)
    strided = [torch.empty(4, 4, 6, 5).permute(0, 2, 3, 1).copy_(t) for t in tensors]
    wide = [
        torch.cat([t.flatten(1), torch.ones(4, 3)], 1)[:, :120].view(4, 6, 5, 4) for t in tensors
    ]
    sigma, r = torch.stack([SIGMA, R], 1).unbind(1)
    mask = torch.tensor([[True, True], [False, False], [True, True], [True, True]])[:, 1]
    for inputs in (strided, wide):
        again = ours(inputs, sigma, r, mask=mask, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_autocast_changes_nothing(backend):
    tensors = case((50,))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inside, ours(tensors, backend=backend)))


def test_gradient_goes_to_v_only_and_inputs_stay_as_they_were(backend):
    tensors = [*case((9,)), SIGMA.clone(), R.clone()]
    before = [t.clone() for t in tensors]
    x0, noise, v, v_old, v_ref, sigma, r = (t.requires_grad_() for t in tensors)
    out = ek.nft_loss(x0, noise, sigma, v, v_old, r, beta=BETA, v_ref=v_ref, backend=backend)
    assert not any(t.requires_grad for t in out.metrics)
    out.loss.backward()
    assert [t.grad is not None for t in tensors] == [False, False, True, False, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, dtype):
    loss, metrics, grad = ours(case((3, 5), dtype, batch=0), SIGMA[:0], R[:0], backend=backend)
    assert loss == 0 and not metrics.any() and grad.shape == (0, 3, 5) and grad.dtype == dtype


ERRORS = [
    (TypeError, "x0.dtype", {"x0": torch.zeros(4, 6).double()}),
    (ValueError, "x0 ", {name: torch.zeros(4, 0) for name in ("x0", "noise", "v", "v_old")}),
    (ValueError, "noise", {"noise": torch.zeros(4, 5)}),
    (ValueError, "v ", {"v": torch.zeros(3, 6)}),
    (TypeError, "v_old", {"v_old": None}),
    (TypeError, "v_ref.dtype", {"v_ref": torch.zeros(4, 6).long()}),
    (TypeError, "sigma", {"sigma": SIGMA.double()}),
    (ValueError, "sigma", {"sigma": SIGMA[:2]}),
    (TypeError, "r ", {"r": 0.5}),
    (TypeError, "mask", {"mask": torch.ones(4)}),
    (ValueError, "mask", {"mask": torch.ones(5, dtype=torch.bool)}),
    (ValueError, "beta", {"beta": 0.0}),
    (ValueError, "advantage_max", {"advantage_max": -1.0}),
    (TypeError, "beta", {"beta": "0.3"}),
    (TypeError, "normalizer", {"normalizer": torch.tensor(4.0)}),
    (ValueError, "ref_weight", {"ref_weight": -1e-4}),
    (ValueError, "min_weight", {"min_weight": 0.0}),
    (ValueError, "normalizer", {"normalizer": 0.0}),
    (ValueError, "backend", {"backend": "fast"}),
]


@pytest.mark.parametrize("error, name, change", ERRORS)
def test_errors_name_the_argument(error, name, change):
    latents = {key: torch.zeros(4, 6) for key in ("x0", "noise", "v", "v_old")}
    with pytest.raises(error, match=f"^{name}"):
        ek.nft_loss(**{**latents, "sigma": SIGMA, "r": R, "beta": BETA, **change})


@pytest.mark.parametrize("name", ["sigma", "r"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_values_outside_the_unit_interval(backend, name, bad):
    tensors, values = case((5,)), {"sigma": SIGMA.clone(), "r": R.clone()}
    values[name][2] = bad
    with pytest.raises(ValueError, match=rf"^{name} must lie in \[0, 1\]"):
        ours(tensors, **values, backend=backend)
    ours(tensors, **values, mask=torch.tensor([True, True, False, True]), backend=backend)


def test_a_second_derivative_raises():
    x0, noise, v, v_old, _ = case((9,))
    leaf = v.requires_grad_()
    loss = ek.nft_loss(x0, noise, SIGMA, leaf, v_old, R, beta=BETA).loss
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="nft_loss can be differentiated once only"):
        (grad.square().sum() + leaf.square().sum()).backward()


def test_opcheck(backend):
    if backend == "triton":
        pytest.skip("opcheck is about the registration, which all backends share")
    x0, noise, v, v_old, v_ref = case((11,), torch.bfloat16)
    leaf = v.float().requires_grad_()
    mask = torch.tensor([True, False, True, True])
    options = (BETA, 5.0, 1e-4, 1e-5)
    ops = torch.ops.editr2
    torch.library.opcheck(
        ops.nft_loss, (x0, noise, leaf, v_old, v_ref, SIGMA, R, mask, *options, 0.0, backend)
    )
    torch.library.opcheck(
        ops.nft_loss, (x0, noise, leaf, v_old, None, SIGMA, R, None, *options, 8.0, backend)
    )
    factors, scale = torch.randn(4, 3), torch.ones(1)
    torch.library.opcheck(
        ops.nft_loss_backward, (x0, noise, v, v_old, v_ref, factors, scale, BETA, backend)
    )


def training_step(x0, noise, v, v_old, v_ref, sigma, advantage):
    r = ek.nft_optimality(advantage)
    out = ek.nft_loss(x0, noise, sigma, v, v_old, r, beta=BETA, v_ref=v_ref, mask=advantage != 0)
    return out.loss, out.metrics.positive


def check_compiled(compiled, sizes):
    for batch, height in sizes:
        x0, noise, v, v_old, v_ref = case((height, 6), torch.bfloat16, batch=batch)
        sigma, advantage = torch.rand(batch) * 0.9 + 0.1, torch.randn(batch)
        results = []
        for function in (training_step, compiled):
            leaf = v.clone().requires_grad_()
            inputs = (x0, noise, leaf, v_old, v_ref, sigma, advantage)
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
                if tensor.dim() > 1:
                    torch._dynamo.mark_dynamic(tensor, 1)
            loss, positive = function(*inputs)
            loss.backward()
            results.append((loss.detach(), positive, leaf.grad))
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
