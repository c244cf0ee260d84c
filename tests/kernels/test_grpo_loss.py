"""grpo_loss: numerics, the identities of the surrogate and the KL, masks, and what a result must
not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import editr2_kernels as ek

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (1025,), (3, 21, 19)]
FLOW = ek.transition_table(ek.flow_sigmas(8, 3.0), noise_level=0.9, window=(1, 8))
CPS = ek.transition_table(ek.flow_sigmas(8, 3.0), dynamics="cps", noise_level=0.8)
ODE = ek.transition_table(ek.flow_sigmas(8), dynamics="ode")
INDEX = torch.tensor([1, 5, 3, 7])  # all of them noisy in FLOW
CLIP = (0.1, 0.2)
ADVANTAGE = torch.tensor([1.5, -0.7, 2.0, -7.0])
# log p - log p_old of the four samples: inside, inside, above (A > 0: bound), below (A < 0: bound).
LOG_RATIO = torch.tensor([0.05, -0.04, 0.3, -0.3])
BRANCHES = ("v", "v_uncond", "v_uncond_image")


def view(scalar, like):
    return scalar.view(-1, *[1] * (like.dim() - 1))


def mean(value):
    return value.flatten(1).mean(1)


def moments(c, table, dtype):
    """Row scalars [B], and log p, mean (mu - mu_ref)^2, mean (mu - mu_old)^2 as eager trainers
    write them."""
    a, b, _, s, w, constant, sigma, after = table[c["index"]].to(dtype).unbind(1)
    x, x_next, v = (c[name].to(dtype) for name in ("x", "x_next", "v"))
    mu = view(a, x) * x + view(b, x) * v
    log_prob = w * mean((x_next - mu) ** 2) + constant
    others = [
        mean((mu - (view(a, x) * x + view(b, x) * c[name].to(dtype))) ** 2)
        for name in ("v_ref", "v_old")
    ]
    return s, sigma - after, b, log_prob, *others


def eager(
    c, table=FLOW, dtype=torch.float64, kl_weight=0.3, kl_scale="step", guard=False, a_max=5.0
):
    """Loss of each sample, ratio and kl in a dtype; the inputs of `c` are taken as they are."""
    s, delta, b, log_prob, to_ref, to_old = moments(c, table, dtype)
    log_ratio = log_prob - c["old"].to(dtype)
    if guard:
        log_ratio = (log_ratio + to_old / (2 * s**2)) * s
    ratio = log_ratio.exp()
    a = c["advantage"].to(dtype).clamp(-a_max, a_max)
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP[0], 1 + CLIP[1]))
    if guard:
        policy = policy / delta
    g2 = s**2 / delta
    kl = {
        "step": to_ref / (2 * s**2),
        "diffusion": to_ref / (2 * g2),
        "mean": to_ref,
        "velocity": to_ref / b**2,
    }
    return policy + kl_weight * kl[kl_scale], policy, ratio, kl[kl_scale]


def case(shape, dtype=torch.float32, batch=4, table=FLOW, index=INDEX):
    """A sampled step, a velocity a little off the rollout's, and an old log-prob LOG_RATIO below
    the exact one."""
    x, v_old = torch.randn(batch, *shape).to(dtype), torch.randn(batch, *shape).to(dtype)
    v = (v_old.float() + 0.02 * torch.randn(batch, *shape)).to(dtype)
    v_ref = (v_old.float() + 0.3 * torch.randn(batch, *shape)).to(dtype)
    seed = torch.arange(batch) * 77
    x_next = ek.sde_step(x, v_old, table, index, seed, backend="ref").x_next
    c = {"x": x, "x_next": x_next, "v": v, "v_ref": v_ref, "v_old": v_old, "index": index}
    exact = moments(c, table, torch.float64)[3].float()
    repeats = -(-batch // 4)
    return {
        **c,
        "old": exact - LOG_RATIO.repeat(repeats)[:batch],
        "advantage": ADVANTAGE.repeat(repeats)[:batch],
    }


def take(c, rows):
    return {name: value[rows] for name, value in c.items()}


def call(c, v, table=FLOW, function=ek.grpo_loss, **options):
    given = {"clip": CLIP, "v_ref": c["v_ref"], "kl_weight": 0.3, **options}
    if given.get("guard"):
        given["v_old"] = c["v_old"]
    return function(c["x"], c["x_next"], v, table, c["index"], c["old"], c["advantage"], **given)


def ours(c, table=FLOW, **options):
    leaf = c["v"].detach().clone().requires_grad_()
    out = call(c, leaf, table, **options)
    out.loss.backward()
    return out._replace(loss=out.loss.detach(), metrics=torch.stack(out.metrics)), leaf.grad


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip((*one[0], one[1]), (*other[0], other[1])))


def worst(actual, expected):
    return (actual.double() - expected.double()).abs().nan_to_num(nan=math.inf).max().item()


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_rounding(backend, shape, dtype, guard, skip_interpreted_bf16):
    """Two references: against float64 at most twice the error of the eager formula in the same
    dtype."""
    skip_interpreted_bf16(dtype)
    c = case(shape, dtype)

    def gradient(dtype):
        leaf = c["v"].to(dtype).requires_grad_()
        loss = eager({**c, "v": leaf}, dtype=dtype, guard=guard)[0].mean()
        loss.backward()
        return loss.detach(), leaf.grad

    exact, same = gradient(torch.float64), gradient(dtype)
    out, grad = ours(c, guard=guard, backend=backend)
    assert out.loss.dtype == torch.float32 and out.loss.shape == () and grad.dtype == dtype
    # z is a difference of fp32 numbers of size 4: 2^-22 absolute, against S >= 0.3 about 1e-6, in
    # log p and so in rho up to 1e-5 (A 5); the eager path can be lucky on few elements.
    assert worst(out.loss, exact[0]) <= 2 * worst(same[0], exact[0]) + 1e-5 * exact[0].abs().item()
    assert (
        worst(grad, exact[1]) <= 2 * worst(same[1], exact[1]) + 1e-5 * exact[1].abs().max().item()
    )
    torch.testing.assert_close(out.loss.double(), exact[0], rtol=2e-5, atol=2e-5)
    info = torch.finfo(dtype)
    floor = (
        2e-5 * exact[1].abs().max().item() + info.tiny * info.eps / 2
    )  # the last: subnormals of float16
    torch.testing.assert_close(grad.double(), exact[1], rtol=max(info.eps, 2e-5), atol=floor)


@pytest.mark.parametrize("table", [FLOW, CPS], ids=["flow-sde", "cps"])
@pytest.mark.parametrize("kl_scale", ek.KL_SCALES)
@pytest.mark.parametrize("guard", [False, True])
def test_every_variant_against_float64(backend, kl_scale, guard, table):
    index = torch.tensor([1, 5, 3, 6])  # CPS has no noise in its last step
    c = case((3, 50), table=table, index=index)
    leaf = c["v"].double().requires_grad_()
    loss, policy, ratio, kl = eager({**c, "v": leaf}, table, kl_scale=kl_scale, guard=guard)
    loss.mean().backward()
    out, grad = ours(c, table, kl_scale=kl_scale, guard=guard, backend=backend)
    log_prob = moments(c, table, torch.float64)[3]
    # Bounds as above; differences of velocities are exact, so the KL is tighter.
    torch.testing.assert_close(out.log_prob.double(), log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.ratio.double(), ratio.detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(out.kl.double(), kl.detach(), rtol=5e-6, atol=0)
    torch.testing.assert_close(out.loss.double(), loss.mean().detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        grad.double(), leaf.grad, rtol=2e-5, atol=2e-5 * leaf.grad.abs().max().item()
    )
    log_ratio = log_prob - c["old"].double()
    expected = [
        ratio.mean(),
        (ratio - 1).abs().max(),
        (ratio < 0.9).double().mean(),
        (ratio > 1.2).double().mean(),
    ]
    expected += [(log_ratio**2 / 2).mean(), kl.mean(), policy.mean(), torch.zeros(())]
    torch.testing.assert_close(
        out.metrics.double(), torch.stack(expected).detach().double(), rtol=3e-5, atol=1e-5
    )


@pytest.mark.parametrize("store", DTYPES)
@pytest.mark.parametrize("table", [FLOW, CPS], ids=["flow-sde", "cps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_policy_ratio_is_exactly_one(backend, table, store, shape):
    x, v = torch.randn(4, *shape), torch.randn(4, *shape).bfloat16()
    step = ek.sde_step(x, v, table, INDEX, torch.arange(4), store_dtype=store, backend=backend)
    for options in ({}, {"v_ref": v + 1, "kl_weight": 0.1}, {"guard": True, "v_old": v}):
        out = ek.grpo_loss(
            x, step.x_next, v, table, INDEX, step.log_prob, ADVANTAGE, backend=backend, **options
        )
        assert torch.equal(out.log_prob, step.log_prob) and torch.equal(out.ratio, torch.ones(4))
        assert (
            out.metrics.ratio_mean == 1
            and out.metrics.ratio_max_deviation == out.metrics.approx_kl == 0
        )
        assert out.metrics.clip_fraction_low == out.metrics.clip_fraction_high == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guard": True},
        *({"kl_scale": s} for s in ek.KL_SCALES),
        {
            "mask": torch.tensor([True, True, False, True]),
            "normalizer": 7.0,
            "advantage_clip": None,
        },
        {"m_prev": True},
        *({"renorm": r} for r in ("none", "token", "text_channel", "channel", "global")),
    ],
    ids=str,
)
def test_references_pass_gradcheck(options):
    c = {
        name: value.double() if value.is_floating_point() else value
        for name, value in case((2, 3)).items()
    }
    table, leaves = FLOW.double(), [c["v"]]
    options = dict(options)
    if options.get("m_prev"):
        table = table.clone()
        table[:, 2] = 0.01  # no published row has C and S; the formula does
        options["m_prev"] = torch.randn(4, 2, 3).double()
        c["old"] = c["old"] + 1e-3
    if "renorm" in options:
        leaves += [c["v"] + torch.randn(4, 2, 3), c["v"] + 0.5 * torch.randn(4, 2, 3)]
        options |= {"guidance": 1.02, "guidance_image": torch.tensor([1.01, 1.0, 0.98, 1.02])}

    def function(*velocities):
        given = {name: value for name, value in zip(BRANCHES[1:], velocities[1:])}
        return call(c, velocities[0], table, ek.grpo_loss_ref, **given, **options).loss

    assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_() for leaf in leaves])


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-6, 6),
    st.floats(-0.4, 0.4),
    st.floats(0.0, 0.3),
    st.floats(0.0, 0.3),
    st.integers(0, 2**31),
)
def test_clip_identities(advantage, log_ratio, low, high, seed):
    """d policy / dv is -A rho dlog p / dv unless the clip binds (A > 0 above, A < 0 below), where
    it is exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    x, x_next, v = (torch.randn(1, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    table, index = FLOW.double(), INDEX[:1]
    leaf = v.clone().requires_grad_()
    log_prob = ek.sde_log_prob_ref(x, x_next, leaf, table, index).log_prob
    (d_log_prob,) = torch.autograd.grad(log_prob.sum(), leaf)
    a, old = torch.tensor([advantage]).double(), log_prob.detach() - log_ratio
    leaf = v.clone().requires_grad_()
    out = ek.grpo_loss_ref(x, x_next, leaf, table, index, old, a, clip=(low, high))
    out.loss.backward()
    ratio, a = out.ratio, a.clamp(-5, 5)
    bound = (
        (ratio > 1 + high if advantage > 0 else ratio < 1 - low)
        if advantage
        else torch.tensor(False)
    )
    if bound:
        assert not leaf.grad.any()
        torch.testing.assert_close(
            out.loss, -a[0] * (1 + high if advantage > 0 else 1 - low), rtol=1e-12, atol=0
        )
    else:
        torch.testing.assert_close(leaf.grad, -a * ratio * d_log_prob, rtol=1e-10, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(ek.KL_SCALES),
    st.just(0) | st.floats(0.01, 3),
    st.integers(1, 7),
)
def test_kl_is_nonnegative_and_zero_at_the_reference(seed, kl_scale, size, step):
    generator = torch.Generator().manual_seed(seed)
    x, v, direction = (
        torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    leaf = v.clone().requires_grad_()
    zero, index = torch.zeros(1), torch.tensor([step])
    arguments = (x, x, leaf, FLOW.double(), index, zero, zero)
    out = ek.grpo_loss_ref(*arguments, v_ref=v + size * direction, kl_weight=1.0, kl_scale=kl_scale)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert (out.kl > 0) if size else (out.kl == 0 and not grad.any())
    # quadratic in v - v_ref: 2 kl = <gradient, v - v_ref>
    torch.testing.assert_close(
        (grad * (leaf - v - size * direction)).sum().detach(), 2 * out.kl[0], rtol=1e-9, atol=0
    )


def test_kl_is_reported_without_weight(backend):
    c = case((50,))
    weighted, _ = ours(c, backend=backend)
    reported, grad = ours(c, kl_weight=0.0, backend=backend)
    alone, grad_alone = ours(c, kl_weight=0.0, v_ref=None, backend=backend)
    assert torch.equal(reported.kl, weighted.kl) and reported.metrics[5] == weighted.metrics[5]
    assert not alone.kl.any() and alone.metrics[5] == 0
    assert torch.equal(grad, grad_alone) and torch.equal(reported.loss, alone.loss)


def test_advantage_clip(backend):
    c = {**case((50,)), "old": case((50,))["old"] + LOG_RATIO}
    big, small = (
        {**c, "advantage": torch.full((4,), 80.0)},
        {**c, "advantage": torch.full((4,), 5.0)},
    )
    assert equal(ours(big, backend=backend), ours(small, backend=backend))
    negative = ours(
        {**c, "advantage": torch.full((4,), -80.0)}, backend=backend, advantage_clip=2.5
    )
    assert equal(negative, ours({**c, "advantage": torch.full((4,), -2.5)}, backend=backend))
    free, _ = ours(big, advantage_clip=None, kl_weight=0.0, clip=(1.0, 10.0), backend=backend)
    torch.testing.assert_close(free.loss, -80 * free.ratio.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_samples_do_nothing_whatever_they_hold(backend, bad):
    c, mask = case((130,)), torch.tensor([True, False, True, False])
    kept = take(c, mask)
    clean = ours(kept, guard=True, backend=backend)
    for name in ("x", "x_next", "v", "v_ref", "v_old", "old", "advantage"):
        spoiled = {**c, name: c[name].clone()}
        spoiled[name][1] = bad
        out, grad = ours(spoiled, guard=True, mask=mask, backend=backend)
        assert torch.equal(out.loss, clean[0].loss) and torch.equal(out.metrics, clean[0].metrics)
        assert torch.equal(grad[mask], clean[1]) and torch.equal(grad[~mask], torch.zeros(2, 130))
        assert torch.equal(out.log_prob[mask], clean[0].log_prob)


@pytest.mark.parametrize("renorm", ["none", "token", "channel", "global"])
def test_masked_samples_do_nothing_through_guidance(backend, renorm):
    """0 times NaN is NaN: what autograd makes of a mask that only multiplies the loss, in the
    reference too."""
    c, mask = case((6, 5)), torch.tensor([True, False, True, True])
    leaves = [c["v"].clone(), torch.randn(4, 6, 5), torch.randn(4, 6, 5)]
    for leaf in leaves:
        leaf[1, 2] = math.nan
        leaf.requires_grad_()
    given = {
        **dict(zip(BRANCHES[1:], leaves[1:])),
        "guidance": 3.0,
        "guidance_image": 1.5,
        "renorm": renorm,
    }
    for function, options in ((ek.grpo_loss, {"backend": backend}), (ek.grpo_loss_ref, {})):
        out = call(c, leaves[0], FLOW, function, mask=mask, guard=True, **given, **options)
        assert out.loss.isfinite() and out.metrics.non_finite == 0
        for grad in torch.autograd.grad(out.loss, leaves):
            assert not grad[1].any() and grad[mask].isfinite().all() and grad[mask].any()


@pytest.mark.parametrize("guard", [False, True])
def test_zero_advantage_is_exactly_zero(backend, guard):
    c = {**case((50,)), "advantage": torch.tensor([0.0, 1.0, -0.0, -1.0])}
    out, grad = ours(c, guard=guard, kl_weight=0.0, clip=(1.0, 10.0), backend=backend)
    assert not grad[::2].any() and grad[1].all() and grad[3].all()
    c |= {"old": c["old"] - 5000.0, "advantage": c["advantage"].abs()}  # whatever the ratio
    out, grad = ours(c, guard=guard, kl_weight=0.0, backend=backend)
    assert (
        out.ratio.isinf().all() and out.loss.isfinite() and out.metrics[7] == 0 and not grad.any()
    )
    leaf = c["v"][:1].clone().requires_grad_()
    call(
        take(c, slice(0, 1)), leaf, FLOW, ek.grpo_loss_ref, guard=guard, kl_weight=0.0
    ).loss.backward()
    assert not leaf.grad.any()
    c["old"][0] = math.nan  # no ratio at all is not hidden
    assert ours(c, guard=guard, backend=backend)[0].loss.isnan()


def test_no_reference_leaves_no_factor(backend):
    c = case((50,))
    latents = c["x"], c["x_next"], c["v"], None, None, None, None, 0, 50, None, None
    given = (
        *latents,
        FLOW,
        INDEX,
        c["old"],
        c["advantage"],
        None,
        0.1,
        0.2,
        5.0,
        0.3,
        0,
        False,
        0.0,
        backend,
    )
    factors = torch.ops.editr2.grpo_loss(*given)[-1]
    assert not factors[:, 1:].any() and factors[:2, 0].all()


def test_a_second_derivative_raises():
    c = case((9,))
    leaf = c["v"].requires_grad_()
    (grad,) = torch.autograd.grad(call(c, leaf).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="grpo_loss can be differentiated once only"):
        (grad.square().sum() + leaf.square().sum()).backward()


def test_all_masked(backend):
    for normalizer in (None, 3.0):
        out, grad = ours(
            case((5,)),
            mask=torch.zeros(4, dtype=torch.bool),
            normalizer=normalizer,
            backend=backend,
        )
        assert out.loss == 0 and not out.metrics.any() and not grad.any()


@pytest.mark.parametrize("name", ["x", "x_next", "v", "v_ref", "old", "advantage"])
def test_non_finite_flag(backend, name):
    c = case((20,))
    assert ours(c, backend=backend)[0].metrics[7] == 0
    c[name] = c[name].clone()
    c[name][2] = math.nan
    out, grad = ours(c, backend=backend)
    assert out.metrics[7] == 1 and not out.loss.isfinite()
    assert grad[[0, 1, 3]].isfinite().all()


def test_a_ratio_beyond_fp32_is_flagged_not_hidden(backend):
    c = case((20,))
    out, _ = ours(
        {**c, "old": c["old"] - 200.0}, backend=backend
    )  # A < 0 with rho = inf: the loss is infinite
    assert out.ratio.isinf().all() and out.metrics[7] == 1 and out.metrics[1] == math.inf
    bound, grad = ours(
        {**take(c, slice(2, 3)), "old": c["old"][2:3] - 200.0}, kl_weight=0.0, backend=backend
    )
    assert bound.metrics[7] == 0 and not grad.any()  # A > 0: the clip holds it


def test_ode_rows(backend):
    """S = 0: log p and ratio are those of no noise, nothing trains, and no KL divides by S."""
    x, v, v_ref = torch.randn(4, 30), torch.randn(4, 30), torch.randn(4, 30)
    step = ek.sde_step(x, v, ODE, INDEX, torch.arange(4), backend=backend)
    c = {"x": x, "x_next": step.x_next, "v": v + 0.1, "v_ref": v_ref, "v_old": v, "index": INDEX}
    c |= {"old": step.log_prob, "advantage": ADVANTAGE}
    for options in ({}, {"guard": True}, {"kl_scale": "diffusion"}):
        out, grad = ours(c, ODE, backend=backend, **options)
        assert torch.equal(out.ratio, torch.ones(4)) and not out.kl.any() and not grad.any()
        assert out.metrics[7] == 0
    out, grad = ours(c, ODE, kl_scale="velocity", backend=backend)
    torch.testing.assert_close(out.kl, (c["v"] - v_ref).square().mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, 0.3 * 2 / 30 / 4 * (c["v"] - v_ref), rtol=1e-5, atol=1e-8)


def test_steps_and_tables_mix_in_one_launch(backend):
    table = torch.cat((FLOW, CPS, ODE))
    index = torch.tensor([1, 9, 20, 6, 13, 0])
    c = case((40,), batch=6, table=table, index=index)
    whole, grad = ours(c, table, normalizer=6.0, backend=backend)
    for i, (own, row) in enumerate(((FLOW, 1), (CPS, 1), (ODE, 4), (FLOW, 6), (CPS, 5), (FLOW, 0))):
        alone = {**take(c, slice(i, i + 1)), "index": torch.tensor([row])}
        out, own_grad = ours(alone, own, normalizer=6.0, backend=backend)
        assert torch.equal(out.ratio, whole.ratio[i : i + 1]) and torch.equal(
            own_grad, grad[i : i + 1]
        )


def test_halves_with_a_common_normalizer_are_the_whole(backend):
    index = torch.tensor([1, 5, 3, 7, 2, 6])
    c = case((260,), batch=6, index=index)
    mask = torch.tensor([True, True, False, True, True, True])
    whole, grad = ours(c, mask=mask, normalizer=5.0, backend=backend)
    parts = [
        ours(take(c, s), mask=mask[s], normalizer=5.0, backend=backend)
        for s in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat([g for _, g in parts]), grad)
    assert torch.equal(torch.cat([out.ratio for out, _ in parts]), whole.ratio)
    torch.testing.assert_close(
        parts[0][0].loss + parts[1][0].loss, whole.loss, rtol=1e-6, atol=1e-7
    )
    counted, counted_grad = ours(c, mask=mask, backend=backend)
    assert torch.equal(counted.loss, whole.loss) and torch.equal(
        counted_grad, grad
    )  # None counts the five


def test_incoming_gradient_scales(backend):
    c, grads = case((40,)), []
    for scale in (1.0, 4.0):  # a power of two: the scaled gradient has the same bits
        leaf = c["v"].clone().requires_grad_()
        (call(c, leaf, backend=backend).loss * scale).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0] * 4, grads[1])
    leaf, mask = c["v"].clone().requires_grad_(), torch.tensor([True, False, True, True])
    (call(c, leaf, mask=mask, backend=backend).loss * torch.inf).backward()
    assert (
        not leaf.grad[1].any() and not leaf.grad[0].isfinite().any()
    )  # an overflow keeps to what trains


@pytest.mark.parametrize("renorm", ["none", "token", "text_channel", "channel", "global"])
def test_gradient_reaches_the_branches_of_guidance(backend, renorm):
    c = case((5, 6))
    text, image = c["v"] + 0.3 * torch.randn(4, 5, 6), c["v"] + 0.2 * torch.randn(4, 5, 6)
    options = {
        "guidance": torch.tensor([3.0, 1.0, 2.0, 4.0]),
        "guidance_image": torch.tensor([1.5, 2.0, 1.0, 0.7]),
        "guidance_interval": (0.5, 1.0),  # the last sample is outside of it
        "renorm": renorm,
        "clip": (1.0, 1e3),
    }
    step = ek.sde_step(
        c["x"],
        c["v"],
        FLOW,
        INDEX,
        torch.arange(4),
        v_uncond=text,
        v_uncond_image=image,
        backend=backend,
        **{name: value for name, value in options.items() if name != "clip"},
    )
    c["x_next"], c["old"] = step.x_next, step.log_prob
    on_policy = call(c, c["v"], v_uncond=text, v_uncond_image=image, backend=backend, **options)
    assert torch.equal(on_policy.log_prob, step.log_prob) and torch.equal(
        on_policy.ratio, torch.ones(4)
    )

    def gradients(c, function, table, **more):
        leaves = [
            t.detach().clone().to(c["x"].dtype).requires_grad_() for t in (c["v"], text, image)
        ]
        out = call(
            c,
            leaves[0],
            table,
            function,
            v_uncond=leaves[1],
            v_uncond_image=leaves[2],
            **options,
            **more,
        )
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    double = {
        name: value.double() if value.is_floating_point() else value for name, value in c.items()
    }
    expected, exact = gradients(double, ek.grpo_loss_ref, FLOW.double())
    out, grads = gradients(c, ek.grpo_loss, FLOW, backend=backend)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=2e-5, atol=2e-5)
    for actual, wanted in zip(grads, exact):
        torch.testing.assert_close(
            actual.double(), wanted, rtol=5e-5, atol=5e-5 * wanted.abs().max().item()
        )
    assert not grads[1][3].any() and not grads[2][3].any() and grads[0][3].any()


def test_second_order_rows(backend):
    table = FLOW.clone()
    table[:, 2] = torch.linspace(0.1, 0.5, 8)
    c, m_prev = case((40,)), torch.randn(4, 40)
    shifted = {**c, "x_next": c["x_next"].double() - table[INDEX, 2:3].double() * m_prev.double()}
    leaf = c["v"].double().requires_grad_()
    c["old"] = (
        c["old"]
        + (moments(shifted, FLOW, torch.float64)[3] - moments(c, FLOW, torch.float64)[3]).float()
    )
    loss, _, ratio, _ = eager({**shifted, "v": leaf, "old": c["old"]})
    loss.mean().backward()
    out, grad = ours(c, table, m_prev=m_prev, backend=backend)
    torch.testing.assert_close(out.ratio.double(), ratio.detach(), rtol=5e-5, atol=0)
    torch.testing.assert_close(
        grad.double(), leaf.grad, rtol=5e-5, atol=5e-5 * leaf.grad.abs().max().item()
    )
    with pytest.raises(ValueError, match="^m_prev"):
        ours(c, table, backend=backend)


@pytest.mark.parametrize("n", [37, 5003])
def test_a_sample_is_independent_of_batch_threads_and_order(backend, n, one_thread, two_threads):
    if backend == "triton":
        n = min(n, 1100)
    index = torch.tensor([1, 5, 3, 7, 2, 2, 6, 4])
    c = case((n,), torch.bfloat16, batch=8, index=index)
    c["v"] = c["v"].float() + 1e-3

    def run(rows):
        return ours(take(c, rows), guard=True, normalizer=8.0, backend=backend)

    whole = two_threads(lambda: run(slice(None)))
    assert equal(whole, run(slice(None))) and equal(whole, one_thread(lambda: run(slice(None))))
    order = torch.randperm(8)
    for rows in (slice(2, 3), slice(4, 7), order):
        out, grad = run(rows)
        assert torch.equal(whole[1][rows], grad)
        for name in ("log_prob", "ratio", "kl"):
            assert torch.equal(getattr(whole[0], name)[rows], getattr(out, name))


def test_non_contiguous_inputs(backend):
    c = case((6, 5, 4))
    latents = ("x", "x_next", "v", "v_ref", "v_old")
    mask = torch.tensor([True, False, True, True])
    plain = ours(c, guard=True, mask=mask, backend=backend)
    strided = {name: torch.empty(4, 4, 6, 5).permute(0, 2, 3, 1).copy_(c[name]) for name in latents}
    wide = {
        name: torch.cat([c[name].flatten(1), torch.ones(4, 3)], 1)[:, :120].view(4, 6, 5, 4)
        for name in latents
    }
    scalars = {
        name: torch.stack([c[name], c[name]], 1)[:, 0] for name in ("index", "old", "advantage")
    }
    for changed in (strided, wide):
        again = {**changed, **scalars}
        table, columns = torch.stack([FLOW, FLOW], 2)[:, :, 0], torch.stack([mask, ~mask], 1)[:, 0]
        assert equal(plain, ours(again, table, guard=True, mask=columns, backend=backend))


def test_autocast_changes_nothing(backend):
    c = case((50,))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(c, guard=True, backend=backend)
    assert equal(inside, ours(c, guard=True, backend=backend))


def test_gradient_goes_to_the_velocity_only_and_inputs_stay_as_they_were(backend):
    c = case((9,))
    leaves = {name: value.clone().requires_grad_() for name, value in c.items() if name != "index"}
    out = call({**leaves, "index": INDEX}, leaves["v"], guard=True, backend=backend)
    assert not any(t.requires_grad for t in (out.log_prob, out.ratio, out.kl, *out.metrics))
    out.loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["v"]
    assert all(torch.equal(leaves[name], c[name]) for name in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, dtype):
    c = case((3, 5), dtype, batch=0, index=INDEX[:0])
    out, grad = ours(c, backend=backend)
    assert out.loss == 0 and out.ratio.shape == (0,) and not out.metrics.any()
    assert grad.shape == (0, 3, 5) and grad.dtype == dtype


def test_meta_tensors_have_shapes():
    c = {name: value.to("meta") for name, value in case((3, 5), torch.bfloat16).items()}
    leaf = c["v"].requires_grad_()
    out = call(c, leaf, FLOW.to("meta"))
    out.loss.backward()
    assert leaf.grad.shape == (4, 3, 5) and leaf.grad.dtype == torch.bfloat16
    assert out.loss.shape == () and out.ratio.shape == (4,) and out.kl.dtype == torch.float32


@pytest.mark.parametrize("bad", [-1, 8])
def test_step_index_out_of_range(backend, bad):
    c = case((5,))
    with pytest.raises(ValueError, match="step_index"):
        ours({**c, "index": torch.tensor([1, 5, bad, 7])}, backend=backend)


ERRORS = [
    (TypeError, "x.dtype", {"x": torch.zeros(4, 6).double()}),
    (ValueError, "x_next", {"x_next": torch.zeros(4, 5)}),
    (ValueError, "v ", {"v": torch.zeros(3, 6)}),
    (ValueError, "table", {"table": FLOW[:, :7]}),
    (TypeError, "step_index", {"step_index": INDEX.int()}),
    (TypeError, "old_log_prob", {"old_log_prob": torch.zeros(4).double()}),
    (ValueError, "old_log_prob", {"old_log_prob": torch.zeros(3)}),
    (TypeError, "advantage", {"advantage": None}),
    (ValueError, "advantage", {"advantage": torch.zeros(4, 1)}),
    (ValueError, "clip", {"clip": -0.1}),
    (ValueError, "clip", {"clip": (0.1, math.nan)}),
    (ValueError, "clip", {"clip": (0.1, 0.1, 0.1)}),
    (ValueError, "clip", {"clip": (1.1, 0.1)}),
    (TypeError, "clip", {"clip": "0.1"}),
    (TypeError, "clip", {"clip": torch.tensor(0.1)}),
    (TypeError, "kl_weight must be a number, got a tensor", {"kl_weight": torch.tensor(0.1)}),
    (TypeError, "normalizer must be a number, got a tensor", {"normalizer": torch.tensor(4.0)}),
    (ValueError, "advantage_clip", {"advantage_clip": 0.0}),
    (ValueError, "v_ref", {"v_ref": torch.zeros(4, 5)}),
    (ValueError, "v_ref", {"kl_weight": 0.1}),
    (ValueError, "kl_weight", {"kl_weight": -0.1}),
    (ValueError, "kl_scale", {"kl_scale": "latent"}),
    (ValueError, "v_old", {"guard": True}),
    (ValueError, "v_old", {"v_old": torch.zeros(4, 6)}),
    (TypeError, "mask", {"mask": torch.ones(4)}),
    (ValueError, "mask", {"mask": torch.ones(5, dtype=torch.bool)}),
    (ValueError, "normalizer", {"normalizer": -1.0}),
    (ValueError, "guidance", {"v_uncond": torch.zeros(4, 6)}),
    (ValueError, "renorm", {"renorm": "tokens"}),
    (ValueError, "backend", {"backend": "fast"}),
]


@pytest.mark.parametrize("error, name, change", ERRORS)
def test_errors_name_the_argument(error, name, change):
    arguments = {
        **{name: torch.zeros(4, 6) for name in ("x", "x_next", "v")},
        "table": FLOW,
        "step_index": INDEX,
    }
    arguments |= {name: torch.zeros(4) for name in ("old_log_prob", "advantage")}
    with pytest.raises(error, match=f"^{name}"):
        ek.grpo_loss(**{**arguments, **change})


def test_opcheck(backend):
    if backend == "triton":
        pytest.skip("opcheck is about the registration, which all backends share")
    c = case((3, 4), torch.bfloat16)
    c = {name: value.flatten(1) if value.dim() > 2 else value for name, value in c.items()}
    leaf, text = c["v"].clone().requires_grad_(), torch.randn(4, 12).bfloat16().requires_grad_()
    guidance = torch.tensor([[3.0, 1.0, 0.0, 1.0]]).repeat(4, 1)
    mask = torch.tensor([True, False, True, True])
    scalars = (FLOW, INDEX, c["old"], c["advantage"])
    op, numbers = torch.ops.editr2.grpo_loss, (0.1, 0.2, 5.0)
    plain = (c["x"], c["x_next"], leaf, None, None, None, None, 0, 4, c["v_ref"], None)
    torch.library.opcheck(op, (*plain, *scalars, mask, *numbers, 0.1, 0, False, 0.0, backend))
    guided = (c["x"], c["x_next"], leaf, None, text, None, guidance, 1, 4, None, c["v_old"])
    torch.library.opcheck(op, (*guided, *scalars, None, *numbers, 0.0, 1, True, 8.0, backend))


def training_step(x, x_next, v, v_ref, v_old, v_uncond, index, old, advantage):
    out = ek.grpo_loss(
        x,
        x_next,
        v,
        FLOW,
        index,
        old,
        advantage,
        clip=CLIP,
        v_ref=v_ref,
        kl_weight=0.1,
        guard=True,
        v_old=v_old,
        mask=advantage != 0,
        v_uncond=v_uncond,
        guidance=1.5,
        renorm="token",
    )
    return out.loss, out.metrics.kl, out.ratio


def test_compiles_fullgraph_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step, fullgraph=True, backend=counter)
    for batch, height in ((4, 5), (2, 9), (7, 16), (3, 33)):
        c = case((height, 6), torch.bfloat16, batch=batch, index=torch.arange(batch) % 7 + 1)
        results = []
        for function in (training_step, compiled):
            leaves = [c["v"].clone().requires_grad_(), c["v_ref"].clone().requires_grad_()]
            inputs = (c["x"], c["x_next"], leaves[0], c["v_ref"], c["v_old"], leaves[1])
            inputs += (c["index"], c["old"], c["advantage"])
            for tensor in inputs:
                for dim in range(min(tensor.dim(), 2)):
                    torch._dynamo.mark_dynamic(tensor, dim)
            loss, kl, ratio = function(*inputs)
            loss.backward()
            results.append((loss.detach(), kl, ratio, *(leaf.grad for leaf in leaves)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
