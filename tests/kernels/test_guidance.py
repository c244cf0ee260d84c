"""Guidance and renormalisation inside the step, its replay and its gradient.

`eager` below is guidance as pipelines write it, independent of the package: the yardstick in
float64 and in the dtype.
"""

import math
import os
import struct
from collections import Counter

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import editr2_kernels as ek
from editr2_kernels.guidance import guidance_backward_ref, guided_ref, make_latents
from editr2_kernels.stored_step import make_replay

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(6,), (5, 1), (2, 3, 37), (4099,)]  # narrow, odd, and wider than one block of any kernel
TABLE = ek.transition_table(ek.flow_sigmas(8, 3.0), noise_level=0.9)
INDEX = torch.tensor([1, 5, 0, 3])  # sigma 0.95, 0.64, 1, 0.83
SEED = torch.tensor([3, -4, 2**50, 0])
TEXT = torch.tensor([4.0, 0.6, 2.5, 1.0])
IMAGE = torch.tensor([1.5, 1.0, 1.0, 2.0])
INTERVAL = (0.3, 0.97)  # leaves out the third sample
PROPERTY = settings(
    max_examples=2
    if os.environ.get("TRITON_INTERPRET") == "1"
    else 15,  # seconds an example in the interpreter
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def case(shape, dtype=torch.float32, batch=4):
    """x, x', v and its two branches; the branches are near v, as a model's are."""
    x, x_next, v = (torch.randn(batch, *shape) for _ in range(3))
    text, image = (v + 0.5 * torch.randn(batch, *shape) for _ in range(2))
    return [value.to(dtype) for value in (x, x_next, v, text, image)]


def branches(text, image, which="both"):
    """Keyword arguments of the operators."""
    arguments = {"v_uncond": text, "guidance": 3.0}
    if which == "both":
        arguments = {
            "v_uncond": text,
            "guidance": TEXT,
            "v_uncond_image": image,
            "guidance_image": IMAGE,
            "guidance_interval": INTERVAL,
        }
    return arguments


def renormalised(renorm, v, w):
    dims = tuple(range(1, v.dim())) if renorm == "global" else -1
    ours, theirs = (torch.linalg.vector_norm(value, dim=dims, keepdim=True) for value in (v, w))
    if renorm == "token":
        return w * (ours / theirs)
    return w * (ours / (theirs + 1e-8)).clamp(max=1.0)


def eager(v, text, image, renorm, which="both"):
    shape = (-1, *[1] * (v.dim() - 1))
    if which == "text":
        u = text + 3.0 * (v - text)
        return (
            u
            if renorm == "none"
            else renormalised("channel" if renorm == "text_channel" else renorm, v, u)
        )
    t = text + TEXT.to(v.dtype).view(shape) * (v - text)
    if renorm == "text_channel":
        t = renormalised("channel", v, t)
    u = image + IMAGE.to(v.dtype).view(shape) * (t - image)
    if renorm not in ("none", "text_channel"):
        u = renormalised(renorm, v, u)
    inside = torch.tensor([True, True, False, True]).view(shape)
    return torch.where(inside, u, v)


def transition(x, v, table=TABLE):
    columns = [
        value.to(v.dtype).view(-1, *[1] * (x.dim() - 1)) for value in table.double()[INDEX].T
    ]
    return columns[0] * x + columns[1] * v, columns


def worst(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_step_error_is_that_of_rounding(backend, renorm, shape, dtype, skip_interpreted_bf16):
    skip_interpreted_bf16(dtype)
    x, _, v, text, image = case(shape, dtype)
    eps = torch.randn_like(x)

    def step(cast):
        u = eager(*(value.to(cast) for value in (v, text, image)), renorm)
        mu, (_, _, _, s, _, _, sigma, _) = transition(x.to(cast), u)
        return mu + s * eps.to(cast), x.to(cast) - sigma * u

    exact, same = step(torch.float64), step(dtype)
    out = ek.sde_step(
        x,
        v,
        TABLE,
        INDEX,
        None,
        noise=eps,
        return_x0=True,
        renorm=renorm,
        backend=backend,
        **branches(text, image),
    )
    assert out.x_next.dtype == out.x0.dtype == dtype
    assert worst(out.x_next, exact[0]) <= 2 * worst(same[0], exact[0]) + 2e-6
    assert worst(out.x0, exact[1]) <= 2 * worst(same[1], exact[1]) + 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_gradient_error_is_that_of_rounding(backend, renorm, shape, dtype, skip_interpreted_bf16):
    skip_interpreted_bf16(dtype)
    x, x_next, v, text, image = case(shape, dtype)
    v_ref = (v.float() + 0.1 * torch.randn_like(v.float())).to(dtype)
    g_log, g_diff = torch.randn(4), 5 * torch.randn(4)

    def gradients(cast, function):
        leaves = [value.to(cast, copy=True).requires_grad_() for value in (v, text, image)]
        log_prob, mean_diff = function(*leaves)
        (
            (log_prob * g_log.to(log_prob.dtype)).sum()
            + (mean_diff * g_diff.to(mean_diff.dtype)).sum()
        ).backward()
        return [leaf.grad for leaf in leaves]

    def written_out(*leaves):
        u = eager(*leaves, renorm)
        mu, (_, b, _, _, w, c, _, _) = transition(x.to(u.dtype), u)
        z = x_next.to(u.dtype) - mu
        diff = b * (u - v_ref.to(u.dtype))
        return w.flatten() * z.square().flatten(1).mean(1) + c.flatten(), diff.square().flatten(
            1
        ).mean(1)

    def fused(v, text, image):
        return ek.sde_log_prob(
            x,
            x_next,
            v,
            TABLE,
            INDEX,
            v_ref=v_ref,
            renorm=renorm,
            backend=backend,
            **branches(text, image),
        )

    exact = gradients(torch.float64, written_out)
    same = gradients(dtype, written_out)
    for ours, eager_grad, true in zip(gradients(dtype, fused), same, exact):
        assert ours.dtype == dtype
        scale = true.abs().max().item()
        # The floor: a few fp32 roundings of the largest value and one of its store.
        assert worst(ours, true) <= 2 * worst(eager_grad, true) + 3e-6 * scale
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(
            ours.double(), true, rtol=max(unit, 2e-5), atol=3e-5 * scale + 6e-8
        )


@pytest.mark.parametrize("which", ["text", "both"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_replay_is_bitwise(backend, renorm, shape, which):
    x, _, v, text, image = case(shape, torch.bfloat16)
    guide = {**branches(text, image, which), "renorm": renorm}
    step = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend, **guide)
    for v_ref in (None, text):
        replay = ek.sde_log_prob(
            x, step.x_next, v, TABLE, INDEX, v_ref=v_ref, backend=backend, **guide
        )
        assert torch.equal(replay.log_prob, step.log_prob)


@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_samples_agree_across_backends(backend, renorm):
    """Without renormalisation to the bit; with it, the order in which a row is summed may show in
    the last place."""
    x, _, v, text, image = case((3, 517))
    guide = {**branches(text, image), "renorm": renorm}
    ours = ek.sde_step(x, v, TABLE, INDEX, SEED, return_x0=True, backend=backend, **guide)
    reference = ek.sde_step_ref(x, v, TABLE, INDEX, SEED, **guide)
    for a, b in ((ours.x_next, reference.x_next), (ours.x0, reference.x0)):
        if renorm == "none":
            assert torch.equal(a, b)
        else:  # the scale is within 2 ulp; values of size 8
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("which", ["text", "both"])
@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_reference_differentiates_and_the_formulas_are_its_gradient(renorm, which):
    x, _, *leaves = (value.double() for value in case((2, 3)))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    sigma = TABLE[INDEX][:, 6:7].double()

    def latents(v, text, image):
        return make_latents(x, v, renorm=renorm, doubles=True, **branches(text, image, which))

    assert torch.autograd.gradcheck(lambda *values: guided_ref(latents(*values), sigma), leaves)
    grad = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(
        guided_ref(latents(*leaves), sigma), leaves, grad, allow_unused=True
    )
    for ours, true in zip(guidance_backward_ref(latents(*leaves), sigma, grad), expected):
        if true is None:
            assert ours is None and which == "text"
        else:
            torch.testing.assert_close(ours, true.flatten(1))


@pytest.mark.parametrize("renorm", ["token", "text_channel", "channel", "global"])
def test_reference_of_the_loss_differentiates(renorm):
    x, x_next, v, text, image = (value.double() for value in case((2, 3)))
    v_ref = text.clone()

    def function(v, text, image):
        return tuple(
            ek.sde_log_prob_ref(
                x,
                x_next,
                v,
                TABLE.double(),
                INDEX,
                v_ref=v_ref,
                renorm=renorm,
                **branches(text, image),
            )
        )

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in (v, text, image)])


def test_zero_velocities_have_finite_gradients(backend):
    """Rows of zeros: |u| = 0 divides nothing."""
    x, x_next, v, text, _ = case((3, 8))
    for renorm in ek.RENORMS[1:]:
        for zeroed in ((v, text), (v,)):
            leaves = [v.clone(), text.clone()]
            for leaf, value in zip(leaves, (v, text)):
                if any(value is z for z in zeroed):
                    leaf[:, 1] = 0
                leaf.requires_grad_()
            out = ek.sde_log_prob(
                x,
                x_next,
                leaves[0],
                TABLE,
                INDEX,
                v_uncond=leaves[1],
                guidance=3.0,
                renorm=renorm,
                backend=backend,
            )
            out.log_prob.sum().backward()
            assert out.log_prob.isfinite().all() and all(
                leaf.grad.isfinite().all() for leaf in leaves
            )


def velocity(backend, v, **guide):
    """The guided velocity itself: at sigma = 1 and x = 0, x0 = -u, exactly."""
    index = torch.zeros(v.shape[0], dtype=torch.int64)
    seed = torch.zeros(v.shape[0], dtype=torch.int64)
    return -ek.sde_step(
        torch.zeros_like(v), v, TABLE, index, seed, return_x0=True, backend=backend, **guide
    ).x0


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    renorm=st.sampled_from(ek.RENORMS),
    two=st.booleans(),
    interval=st.booleans(),
)
def test_weight_one_is_no_guidance_to_the_bit(backend, seed, width, renorm, two, interval):
    """Also where the interval is over; the unused branch is not even read: it holds NaN."""
    torch.manual_seed(seed)
    x, _, v, _, _ = case((3, width))
    nothing = torch.full_like(v, torch.nan)
    guide = {"v_uncond": nothing, "guidance": 7.0 if interval else 1.0, "renorm": renorm}
    if two:
        guide |= {"v_uncond_image": nothing, "guidance_image": 2.0 if interval else torch.ones(4)}
    if interval:
        guide["guidance_interval"] = (0.0, 0.1)
    plain = ek.sde_step(x, v, TABLE, INDEX, SEED, return_x0=True, backend=backend)
    guided = ek.sde_step(x, v, TABLE, INDEX, SEED, return_x0=True, backend=backend, **guide)
    assert all(torch.equal(a, b) for a, b in zip(plain, guided))
    leaves = [v.clone().requires_grad_() for _ in range(2)]
    ek.sde_log_prob(x, x, leaves[0], TABLE, INDEX, backend=backend).log_prob.sum().backward()
    guide["v_uncond"] = nothing.clone().requires_grad_()
    ek.sde_log_prob(
        x, x, leaves[1], TABLE, INDEX, backend=backend, **guide
    ).log_prob.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert not guide["v_uncond"].grad.any()


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    weight=st.floats(0.1, 9.0),
    image=st.floats(0.1, 4.0),
)
def test_renormalisation_keeps_norms(backend, seed, width, weight, image):
    torch.manual_seed(seed)
    _, _, v, text, other = case((5, width))
    guide = {"v_uncond": text, "guidance": weight, "v_uncond_image": other, "guidance_image": image}
    free = velocity(backend, v, **guide)
    norm, free_norm = v.norm(dim=-1), free.norm(dim=-1)
    guided = velocity(backend, v, renorm="token", **guide)
    torch.testing.assert_close(guided.norm(dim=-1), norm, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        velocity(backend, v, renorm="channel", **guide).norm(dim=-1),
        torch.minimum(norm, free_norm),
        rtol=2e-6,
        atol=1e-7,
    )
    whole = velocity(backend, v, renorm="global", **guide).flatten(1).norm(dim=1)
    bound = torch.minimum(v.flatten(1).norm(dim=1), free.flatten(1).norm(dim=1))
    torch.testing.assert_close(whole, bound, rtol=2e-6, atol=1e-7)
    text_only = {"v_uncond": text, "guidance": weight}
    assert torch.equal(
        velocity(backend, v, renorm="text_channel", **text_only),
        velocity(backend, v, renorm="channel", **text_only),
    )


def gradients(backend, x, x_next, v, text, image=None, **guide):
    leaves = [
        value.clone().requires_grad_() for value in (v, text) + (() if image is None else (image,))
    ]
    guide["v_uncond"] = leaves[1]
    if image is not None:
        guide["v_uncond_image"] = leaves[2]
    ek.sde_log_prob(
        x, x_next, leaves[0], TABLE, INDEX, backend=backend, **guide
    ).log_prob.sum().backward()
    return [leaf.grad for leaf in leaves]


@PROPERTY
@given(seed=st.integers(0, 2**31), width=st.integers(2, 40), weight=st.floats(1.5, 9.0))
def test_token_renormalisation_passes_no_gradient_along_the_row(backend, seed, width, weight):
    """s w keeps the length of v, so a longer w changes nothing: the gradient to its branch is
    orthogonal to w."""
    torch.manual_seed(seed)
    x, x_next, v, text, _ = case((5, width))
    _, on_text = gradients(backend, x, x_next, v, text, guidance=weight, renorm="token")
    w = text + weight * (v - text)
    along = (on_text.double() * w.double()).sum(-1).abs()
    assert (along <= 1e-5 * on_text.double().norm(dim=-1) * w.double().norm(dim=-1) + 1e-9).all()


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    weight=st.floats(0.1, 9.0),
    image=st.floats(0.1, 4.0),
)
def test_branches_share_the_gradient(backend, seed, width, weight, image):
    """Guidance is affine with weights that add up to 1: the three gradients add up to that of u
    itself."""
    torch.manual_seed(seed)
    x, x_next, v, text, other = case((5, width))
    grads = gradients(backend, x, x_next, v, text, other, guidance=weight, guidance_image=image)
    u = (other + image * (text + weight * (v - text) - other)).requires_grad_()
    ek.sde_log_prob(x, x_next, u, TABLE, INDEX, backend=backend).log_prob.sum().backward()
    scale = max(grad.abs().max().item() for grad in grads)
    torch.testing.assert_close(sum(grads), u.grad, rtol=1e-5, atol=4e-6 * scale)
    torch.testing.assert_close(grads[0], weight * image * u.grad, rtol=1e-5, atol=4e-6 * scale)


def test_interval_is_open_below_and_closed_above_per_sample(backend):
    x, _, v, text, _ = case((7,))
    sigma = TABLE[INDEX, 6]
    plain = ek.sde_step(x, v, TABLE, INDEX, SEED, backend=backend).x_next
    guided = ek.sde_step(
        x, v, TABLE, INDEX, SEED, v_uncond=text, guidance=3.0, backend=backend
    ).x_next
    intervals = torch.stack(
        [torch.stack([sigma[0], sigma[0] + 1]), torch.stack([sigma[1] - 1, sigma[1]])]
    )
    intervals = torch.cat(
        [intervals, torch.tensor([[0.0, 1.0], [0.9, 1.0]])]
    )  # outside, inside, inside, outside
    out = ek.sde_step(
        x,
        v,
        TABLE,
        INDEX,
        SEED,
        v_uncond=text,
        guidance=3.0,
        guidance_interval=intervals,
        backend=backend,
    ).x_next
    expected = torch.where(torch.tensor([False, True, True, False])[:, None], guided, plain)
    assert torch.equal(out, expected) and not torch.equal(plain[0], guided[0])


def everything(backend, x, v, text, image, index, seed, guide):
    x, v, text, image = (value.detach() for value in (x, v, text, image))
    step = ek.sde_step(
        x,
        v,
        TABLE,
        index,
        seed,
        v_uncond=text,
        v_uncond_image=image,
        return_x0=True,
        backend=backend,
        **guide,
    )
    leaves = [
        v.clone().requires_grad_(),
        text.clone().requires_grad_(),
        image.clone().requires_grad_(),
    ]
    out = ek.sde_log_prob(
        x,
        step.x_next,
        leaves[0],
        TABLE,
        index,
        v_uncond=leaves[1],
        v_uncond_image=leaves[2],
        v_ref=text,
        backend=backend,
        **guide,
    )
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    return [*step, out.log_prob.detach(), out.mean_diff.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("renorm", ek.RENORMS)
@pytest.mark.parametrize("shape", [(3, 37), (4099,)])
def test_a_sample_is_independent_of_batch_threads_and_order(
    backend, shape, renorm, one_thread, two_threads
):
    if shape == (4099,):
        # The elements of two threads; and three blocks: each costs the interpreter seconds.
        shape = {"ref": (7001,), "cpu": (7001,), "triton": (2051,)}.get(backend, shape)
    x, _, v, text, image = case(shape, torch.bfloat16, batch=6)
    index, seed = torch.tensor([1, 5, 0, 7, 2, 2]), torch.arange(6) * 12345
    weights = torch.stack([torch.rand(6) * 5, torch.rand(6) * 3])

    def run(rows):
        guide = {"guidance": weights[0, rows], "guidance_image": weights[1, rows], "renorm": renorm}
        return everything(
            backend, x[rows], v[rows], text[rows], image[rows], index[rows], seed[rows], guide
        )

    whole, order = two_threads(lambda: run(slice(None))), torch.randperm(6)
    for rows, again in [
        (slice(None), run(slice(None))),
        (slice(None), one_thread(lambda: run(slice(None)))),
        (slice(2, 3), run(slice(2, 3))),
        (order, run(order)),
    ]:
        for a, b in zip(whole, again):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_non_contiguous_inputs(backend, renorm):
    x, _, v, text, image = case((6, 5, 4))
    guide = {"guidance": TEXT, "guidance_image": IMAGE, "renorm": renorm}
    plain = everything(backend, x, v, text, image, INDEX, SEED, guide)
    strided = [torch.empty(4, 4, 6, 5).permute(0, 2, 3, 1).copy_(t) for t in (x, v, text, image)]
    wide = [
        torch.cat([t.flatten(1), torch.ones(4, 3)], 1)[:, :120].view(4, 6, 5, 4)
        for t in (x, v, text, image)
    ]
    guide["guidance"] = torch.stack([TEXT, TEXT], 1)[:, 0]
    for inputs in (strided, wide):
        for a, b in zip(plain, everything(backend, *inputs, INDEX, SEED, guide)):
            assert torch.equal(a, b)


def test_a_number_is_the_same_as_a_tensor_of_it(backend):
    x, _, v, text, _ = case((9,))
    numbers = {"guidance": 3.0, "guidance_interval": (0.2, 0.9)}
    tensors = {
        "guidance": torch.full((4,), 3.0),
        "guidance_interval": torch.tensor([[0.2, 0.9]]).expand(4, 2),
    }
    a, b = (
        ek.sde_step(
            x, v, TABLE, INDEX, SEED, v_uncond=text, renorm="token", backend=backend, **guide
        )
        for guide in (numbers, tensors)
    )
    assert torch.equal(a.x_next, b.x_next) and torch.equal(a.log_prob, b.log_prob)


@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_a_sample_without_incoming_gradient_gets_exact_zeros(backend, renorm):
    """Whatever its latents hold: a filtered sample must not poison the batch."""
    x, x_next, v, text, image = case((3, 5))
    for value in (x, x_next, v, text, image):
        value[1] = torch.nan
    leaves = [value.requires_grad_() for value in (v, text, image)]
    out = ek.sde_log_prob(
        x, x_next, v, TABLE, INDEX, renorm=renorm, backend=backend, **branches(text, image)
    )
    out.log_prob.backward(torch.tensor([1.0, 0.0, 2.0, -1.0]))
    for leaf in leaves:
        assert not leaf.grad[1].any() and leaf.grad.isfinite().all() and leaf.grad[0].any()


@pytest.mark.parametrize("renorm", ek.RENORMS)
@pytest.mark.parametrize("size", [1.0, 1e-21], ids=["of v", "of v and u"])
def test_vanishing_rows_have_finite_gradients(backend, renorm, size):
    """A norm of 1e-21 is a number, its square is not and the square's reciprocal is infinite: it
    counts as 0."""
    x, x_next, v, text, _ = case((3, 5))
    leaves = [(v * 1e-21).requires_grad_(), (text * size).requires_grad_()]
    guide = {"guidance": 2.5, "renorm": renorm, "backend": backend}
    out = ek.sde_log_prob(x, x_next, leaves[0], TABLE, INDEX, v_uncond=leaves[1], **guide)
    out.log_prob.sum().backward()
    assert out.log_prob.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
    if renorm == "token":  # s is 0 where v alone vanishes, 1 where u does too
        v, text = (leaf.detach() for leaf in leaves)
        step = {"v_uncond": text, "return_x0": True, "backend": backend, "guidance": 2.5}
        x0 = ek.sde_step(torch.zeros_like(x), v, TABLE, INDEX, SEED, renorm="token", **step).x0
        plain = ek.sde_step(torch.zeros_like(x), v, TABLE, INDEX, SEED, **step).x0
        assert torch.equal(x0, plain * (size < 1)) and plain.any()


def test_gradients_are_made_for_those_who_want_them(backend):
    x, x_next, v, text, image = case((3, 5))
    everyone = gradients(
        backend, x, x_next, v, text, image, guidance=3.0, guidance_image=2.0, renorm="token"
    )
    for wanted in range(3):
        values = [v.clone(), text.clone(), image.clone()]
        values[wanted].requires_grad_()
        guide = {
            "v_uncond": values[1],
            "guidance": 3.0,
            "v_uncond_image": values[2],
            "guidance_image": 2.0,
        }
        ek.sde_log_prob(
            x, x_next, values[0], TABLE, INDEX, renorm="token", backend=backend, **guide
        ).log_prob.sum().backward()
        assert torch.equal(values[wanted].grad, everyone[wanted])
        assert [value.grad is None for value in values] == [i != wanted for i in range(3)]


V = torch.zeros(4, 6)
ERRORS = [
    (ValueError, "guidance is required with v_uncond", {"v_uncond": V}),
    (ValueError, "v_uncond is required with guidance", {"guidance": 3.0}),
    (ValueError, "guidance_image is required", {"v_uncond_image": V}),
    (ValueError, "v_uncond_image is required", {"guidance_image": 3.0}),
    (ValueError, "v_uncond must have the shape", {"v_uncond": V[:2], "guidance": 3.0}),
    (TypeError, "v_uncond must have the dtype of v", {"v_uncond": V.half(), "guidance": 3.0}),
    (TypeError, "v_uncond ", {"v_uncond": 1.0, "guidance": 3.0}),
    (ValueError, "guidance must be finite", {"v_uncond": V, "guidance": math.nan}),
    (ValueError, r"guidance must have shape \[4\]", {"v_uncond": V, "guidance": torch.ones(3)}),
    (
        TypeError,
        "guidance must be a number or a float32",
        {"v_uncond": V, "guidance": torch.ones(4).double()},
    ),
    (TypeError, "guidance must be a number", {"v_uncond": V, "guidance": "3"}),
    (ValueError, "guidance", {"v_uncond": V, "guidance": 1e39}),
    (
        ValueError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": (0, 1e39)},
    ),
    (ValueError, "guidance_interval", {"guidance_interval": (0.0, 1.0)}),
    (
        ValueError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": (1.0, 0.0)},
    ),
    (
        ValueError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": torch.zeros(2)},
    ),
    (
        TypeError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": torch.zeros(4, 2).half()},
    ),
    (
        ValueError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": (0.0, 0.5, 1.0)},
    ),
    (ValueError, "guidance_interval", {"v_uncond": V, "guidance": 3.0, "guidance_interval": 0.5}),
    (
        TypeError,
        "guidance_interval",
        {"v_uncond": V, "guidance": 3.0, "guidance_interval": (None, 0.5)},
    ),
    (ValueError, "renorm 'token' needs guidance", {"renorm": "token"}),
    (ValueError, "renorm must be one of", {"v_uncond": V, "guidance": 3.0, "renorm": "qwen"}),
]


@pytest.mark.parametrize("error, message, arguments", ERRORS)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=f"^{message}"):
        ek.sde_step(V, V, TABLE, INDEX, SEED, **arguments)
    with pytest.raises(error, match=f"^{message}"):
        ek.sde_log_prob(V, V, V, TABLE, INDEX, **arguments)


def test_autocast_changes_nothing(backend):
    x, _, v, text, image = case((3, 5))
    guide = {"guidance": TEXT, "guidance_image": 2.0, "renorm": "token"}
    plain = everything(backend, x, v, text, image, INDEX, SEED, guide)
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything(backend, x, v, text, image, INDEX, SEED, guide)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, cast))


def test_opcheck():
    """Of the registration, which all backends share."""
    x, x_next, v, text, image = case((3, 5))
    ops, backend = torch.ops.editr2, "ref"
    guide = {**branches(text, image), "renorm": "channel"}
    latents = make_latents(x, v, **guide)
    torch.library.opcheck(
        ops.sde_step, (*latents, None, TABLE, INDEX, SEED, True, torch.float16, True, backend)
    )
    leaves = [value.clone().requires_grad_() for value in (v, text, image)]
    replay = make_replay(
        x, x_next, leaves[0], TABLE, INDEX, v_ref=v, **{**guide, **branches(*leaves[1:])}
    )
    torch.library.opcheck(ops.sde_log_prob, (*replay, backend))
    replay = make_replay(x, x_next, v, TABLE, INDEX, v_ref=v, v_old=text, **guide)
    for wanted in ([True, True, True], [True, False, False]):
        torch.library.opcheck(
            ops.replay_backward,
            (*replay, torch.randn(4, 3), torch.ones(1), None, None, wanted, backend),
        )
    torch.library.opcheck(
        ops.replay_backward,
        (*replay, None, None, torch.randn(4), torch.randn(4), [True, True, True], backend),
    )


def training_step(x, v, text, image, index, seed, weight):
    guide = {
        "v_uncond": text,
        "guidance": weight,
        "v_uncond_image": image,
        "guidance_image": 1.5,
        "guidance_interval": (0.1, 1.0),
        "renorm": "token",
    }
    step = ek.sde_step(x, v, TABLE, index, seed, return_x0=True, **guide)
    out = ek.sde_log_prob(x, step.x_next, v, TABLE, index, v_ref=text, **guide)
    return step.x_next + step.x0, (
        torch.exp(out.log_prob - step.log_prob) + 0.1 * out.mean_diff
    ).sum()


def test_compiles_fullgraph_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step, fullgraph=True, backend=counter)
    for batch, height, width in [(4, 5, 6), (2, 9, 3), (7, 16, 8)]:
        x, _, v, text, image = case((height, width), batch=batch)
        index, seed, weight = torch.arange(batch) % 8, torch.arange(batch), torch.rand(batch) * 4
        results = []
        for function in (training_step, compiled):
            leaves = [value.clone().requires_grad_() for value in (v, text, image)]
            inputs = (x, *leaves, index, seed, weight)
            for tensor in inputs:
                for dim in range(tensor.dim()):
                    torch._dynamo.mark_dynamic(tensor, dim)
            x_next, loss = function(*inputs)
            loss.backward()
            results.append((x_next, loss.detach(), *(leaf.grad for leaf in leaves)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiles_fullgraph_with_a_weight_that_changes():
    """A number becomes a symbol when it changes; its check must not break the graph."""
    torch._dynamo.reset()
    x, _, v, text, _ = case((3, 5))

    def step(weight):
        return ek.sde_step(x, v, TABLE, INDEX, SEED, v_uncond=text, guidance=weight).x_next

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for weight in (2.0, 3.5, 4.25):
        assert torch.equal(compiled(weight), step(weight))


@pytest.mark.parametrize("renorm", ek.RENORMS)
def test_guided_velocity_is_the_one_that_steps(renorm):
    """An ODE step from x = 0 is the velocity times the step's size."""
    ode = ek.transition_table(ek.flow_sigmas(8, 3.0), dynamics="ode", noise_level=0.0)
    _, _, v, text, image = case((3, 7))
    guidance = {
        "v_uncond": text,
        "guidance": TEXT,
        "v_uncond_image": image,
        "guidance_image": IMAGE,
    }
    guidance |= {"renorm": renorm, "guidance_interval": INTERVAL}
    leaf = v.clone().requires_grad_()
    u = ek.guided_velocity(leaf, ode[INDEX, 6], **guidance)
    step = ek.sde_step(
        torch.zeros_like(v), v, ode, INDEX, None, noise=torch.zeros_like(v), **guidance
    )
    torch.testing.assert_close(
        u.detach() * ode[INDEX, 1].view(-1, 1, 1), step.x_next, rtol=1e-5, atol=1e-6
    )
    (grad,) = torch.autograd.grad(u.sum(), leaf)
    assert grad.shape == v.shape and grad.abs().max() > 0
    assert torch.equal(ek.guided_velocity(v, ode[INDEX, 6]), v)
    with pytest.raises(ValueError, match="v_uncond is required with guidance"):
        ek.guided_velocity(v, ode[INDEX, 6], guidance=2.0)


NUMBERS = {"guidance": 4.0, "guidance_image": 1.5, "guidance_interval": (0.1, 0.95)}
PER_SAMPLE = {
    "guidance": torch.full((4,), 4.0),
    "guidance_image": torch.full((4,), 1.5),
    "guidance_interval": torch.tensor([[0.1, 0.95]]).expand(4, 2),
}
# Of torch, those that only look at memory, or ask for it.
NO_LAUNCH = ("aten.view", "aten.detach", "aten.empty", "aten.unbind", "aten.select", "aten.alias")


class Launches(TorchDispatchMode):
    """The names of what is dispatched and does some work."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith(NO_LAUNCH):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.found = []
        return super().__enter__()


def a_step(**guidance):
    x, _, v, *_ = case((3, 8))
    return ek.sde_step(x, v, TABLE, INDEX, SEED, **guidance)


def a_log_prob(**guidance):
    x, x_next, v, *_ = case((3, 8))
    return ek.sde_log_prob(x, x_next, v, TABLE, INDEX, **guidance)


def a_loss(**guidance):
    x, x_next, v, *_ = case((3, 8))
    return ek.grpo_loss(x, x_next, v, TABLE, INDEX, torch.zeros(4), torch.ones(4), **guidance)


@pytest.mark.parametrize("run", [a_step, a_log_prob, a_loss])
def test_numbers_cost_one_launch(run):
    """On a GPU a small step is a few launches, and host time besides; four tensors filled with a
    number each and put side by side were five."""
    _, _, _, text, image = case((3, 8))
    both = {"v_uncond": text, "v_uncond_image": image}

    def launches(**guidance):
        torch.manual_seed(0)
        with Launches() as launched:
            out = run(**guidance)
        return Counter(launched.found), out

    without, _ = launches()
    numbers, of_numbers = launches(**both, **NUMBERS)
    tensors, of_tensors = launches(**both, **PER_SAMPLE)
    mixed, of_mixed = launches(**both, **{**NUMBERS, "guidance": PER_SAMPLE["guidance"]})
    assert without.total() >= 1
    assert numbers - without == Counter({"aten.full.default": 1})
    assert tensors - without == Counter({"aten.stack.default": 1})
    assert mixed - without == Counter({"aten.full.default": 1, "aten.stack.default": 1})
    for other in (of_tensors, of_mixed):
        assert all(
            torch.equal(a, b) for a, b in zip(leaves(of_numbers), leaves(other), strict=True)
        )


def leaves(out):
    """The tensors of a result."""
    return [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("denormals_are_flushed", [False, True])
def test_numbers_keep_every_bit(denormals_are_flushed):
    """Of the fp32 numbers that four tensors would be filled with."""
    v = torch.zeros(3, 2)
    torch.set_flush_denormal(denormals_are_flushed)
    try:
        for text, image, low, high in (
            (4.0, 0.0, -math.inf, math.inf),
            (0.1, -0.0, 0.1, 0.95),
            (3.4028234663852886e38, 1e-45, -1e-40, math.inf),
            (-7, 1, 0, 1),
        ):
            made = make_latents(
                v,
                v,
                v_uncond=v,
                guidance=text,
                v_uncond_image=v,
                guidance_image=image,
                guidance_interval=(low, high),
            ).guidance
            assert made.shape == (3, 4) and made.is_contiguous()
            expected = struct.pack("=4f", text, image, low, high)
            assert made.numpy().tobytes() == 3 * expected
    finally:
        torch.set_flush_denormal(False)
