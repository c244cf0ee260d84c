"""awm_loss: its one-row table is the published formula; the rest is grpo_loss and tested there."""

import pytest
import torch

import editr2_kernels as ek

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADVANTAGE = torch.tensor([1.5, -0.7, 0.0, -2.0])


def case(shape=(3, 21), dtype=torch.float32):
    x0, noise = torch.randn(4, *shape), torch.randn(4, *shape)
    v, v_old, v_ref = (noise - x0 + 0.3 * torch.randn(4, *shape) for _ in range(3))
    return [t.to(dtype) for t in (x0, noise, v, v_old, v_ref)]


def published(x0, noise, v, old, v_ref, low, high, kl_weight):
    """Loss of each sample, in float64."""
    x0, noise, v, v_ref = (t.double() for t in (x0, noise, v, v_ref))
    log_prob = -((v - (noise - x0)) ** 2).flatten(1).mean(1)
    ratio, a = (log_prob - old.double()).exp(), ADVANTAGE.double()
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return policy + kl_weight * ((v - v_ref) ** 2).flatten(1).mean(1), log_prob


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula(backend, dtype):
    x0, noise, v, v_old, v_ref = case(dtype=dtype)
    old = ek.awm_log_prob(x0, noise, v_old, backend=backend)
    exact = v.double().requires_grad_()
    loss, log_prob = published(x0, noise, exact, old, v_ref, 0.05, 0.1, 0.2)
    loss.mean().backward()
    leaf = v.clone().requires_grad_()
    out = ek.awm_loss(
        x0,
        noise,
        leaf,
        old,
        ADVANTAGE,
        clip=(0.05, 0.1),
        v_ref=v_ref,
        kl_weight=0.2,
        backend=backend,
    )
    out.loss.backward()
    # fp32 after exact reads: z cancels to 0.3 of its terms.
    torch.testing.assert_close(out.log_prob.double(), log_prob.detach(), rtol=5e-6, atol=0)
    torch.testing.assert_close(out.loss.double(), loss.mean().detach(), rtol=5e-6, atol=1e-6)
    info = torch.finfo(dtype)
    floor = 5e-6 * exact.grad.abs().max().item() + info.tiny * info.eps / 2
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=max(info.eps, 5e-6), atol=floor)


def test_old_log_prob_of_the_same_policy_gives_ratio_one_and_weighted_matching(backend):
    x0, noise, v, _, _ = case()
    old = ek.awm_log_prob(x0, noise, v, backend=backend)
    leaf = v.clone().requires_grad_()
    out = ek.awm_loss(x0, noise, leaf, old, ADVANTAGE, backend=backend)
    out.loss.backward()
    assert torch.equal(out.ratio, torch.ones(4))
    matching = v.clone().requires_grad_()
    (ADVANTAGE * (matching - (noise - x0)).square().flatten(1).mean(1)).mean().backward()
    torch.testing.assert_close(leaf.grad, matching.grad, rtol=1e-5, atol=1e-8)
    assert not leaf.grad[2].any()


def test_mask_and_normalizer(backend):
    x0, noise, v, v_old, _ = case()
    old = ek.awm_log_prob(x0, noise, v_old, backend=backend)
    x0[1] = torch.nan
    mask = torch.tensor([True, False, True, True])
    leaf = v.clone().requires_grad_()
    out = ek.awm_loss(
        x0, noise, leaf, old, ADVANTAGE, clip=(1.0, 9.0), mask=mask, normalizer=6.0, backend=backend
    )
    out.loss.backward()
    torch.testing.assert_close(
        out.loss, -(ADVANTAGE * out.ratio)[mask].sum() / 6, rtol=1e-6, atol=0
    )
    assert not leaf.grad[1].any() and leaf.grad[0].all()


def test_errors_name_the_argument():
    x0 = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="^noise"):
        ek.awm_loss(x0, x0[:, :3], x0, torch.zeros(4), ADVANTAGE)
    with pytest.raises(ValueError, match="^noise"):
        ek.awm_log_prob(x0, x0[:, :3], x0)
    with pytest.raises(TypeError, match="^x0"):
        ek.awm_loss(x0.double(), x0, x0, torch.zeros(4), ADVANTAGE)
    with pytest.raises(ValueError, match="^old_log_prob"):
        ek.awm_loss(x0, x0, x0, torch.zeros(3), ADVANTAGE)


def test_compiles_fullgraph():
    x0, noise, v, v_old, _ = case()
    old = ek.awm_log_prob(x0, noise, v_old)
    function = lambda v: ek.awm_loss(x0, noise, v, old, ADVANTAGE, clip=0.5).loss  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(leaf := v.clone().requires_grad_()), leaf)[0]
        for f in (function, compiled)
    ]
    assert torch.equal(*grads)
