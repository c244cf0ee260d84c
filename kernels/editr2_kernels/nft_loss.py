"""DiffusionNFT's loss: the forward process, no sampler, no log-probability; fp32 throughout.

    x_t = (1 - t) x0 + t eps      v+ = v_old + beta d      v- = v_old - beta d      d = v - v_old
    x_hat(+-) = x_t - t v(+-)       w(+-) = max(mean|x_hat(+-) - x0|, min_weight), without gradient

    policy = A_max [ r mean((x_hat+ - x0)^2) / w+ + (1 - r) mean((x_hat- - x0)^2) / w- ] / beta
    loss   = sum_b weight_b (policy_b + ref_weight mean((v - v_ref)^2)_b)
    weight_b = mask_b / normalizer

x_t cancels: with e = (eps - x0) - v_old, x_hat(+-) - x0 = t (e -+ beta d). So a sample's loss is a
function of the moments of e - beta d and e + beta d, and its gradient one linear combination:

    d loss / d v = on_positive (e - beta d) + on_negative (e + beta d) + on_ref (v - v_ref)

The forward takes the moments and keeps the three factors, the backward forms the combination;
neither stores anything of the size of the latents.

Source: DiffusionNFT (arXiv 2509.16117); its released weights are float64, which this does without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import differentiable, operator
from .backends import compiled, pointer, select, strided, workspace
from .numerics import compute_dtype, mean_ref, times_ref


class NftMetrics(NamedTuple):
    """0-dim fp32 tensors, means over the samples that count (0 where none does)."""

    policy_loss: Tensor
    positive: Tensor  # mean((x_hat+ - x0)^2) / w+
    negative: Tensor  # mean((x_hat- - x0)^2) / w-
    reference: Tensor  # mean((v - v_ref)^2), unweighted; 0 without v_ref
    non_finite: Tensor  # 1 if the loss of any sample that counts is not finite, else 0


class NftLoss(NamedTuple):
    """loss, 0-dim fp32, differentiable to v; metrics without gradient."""

    loss: Tensor
    metrics: NftMetrics


def nft_optimality(advantage: Tensor, advantage_max: float = 5.0) -> Tensor:
    """r = clip(A / (2 A_max) + 1/2, 0, 1): how far a sample counts as a positive one. Any shape."""
    _checks.positive("advantage_max", advantage_max)
    return (advantage / (2.0 * advantage_max) + 0.5).clamp(0.0, 1.0)


def _nft_ref(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    sigma: Tensor,
    r: Tensor,
    mask: Tensor | None,
    beta: float,
    advantage_max: float,
    ref_weight: float,
    min_weight: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics [5], factors [B, 3]) from [B, N] latents; normalizer 0 stands for None."""
    dtype = compute_dtype(x0, noise, v, v_old, v_ref)
    batch, n = v.shape
    counted = torch.ones(batch, dtype=torch.bool, device=v.device) if mask is None else mask
    # No gradient to a masked sample, whatever it holds.
    v_BN = torch.where(counted[:, None], v, v.detach()).to(dtype)
    v_old_BN = v_old.detach().to(dtype)
    e_BN = (noise.detach().to(dtype) - x0.detach().to(dtype)) - v_old_BN
    beta_d_BN = (v_BN - v_old_BN) * beta
    t, r = sigma.to(dtype), r.to(dtype)

    def matching(error_BN: Tensor) -> tuple[Tensor, Tensor]:
        weight = (t * mean_ref(error_BN.detach().abs())).clamp(min=min_weight)
        return t * t * mean_ref(error_BN * error_BN) / weight, weight

    positive, w_positive = matching(e_BN - beta_d_BN)
    negative, w_negative = matching(e_BN + beta_d_BN)
    policy = advantage_max * (r * positive + (1.0 - r) * negative) / beta
    reference = torch.zeros_like(policy)
    if v_ref is not None:
        difference_BN = v_BN - v_ref.detach().to(dtype)
        reference = mean_ref(difference_BN * difference_BN)
    sample_loss = policy + ref_weight * reference

    total = counted.sum().clamp(min=1).to(dtype)
    weight = counted.to(dtype) / (normalizer if normalizer > 0 else total)
    loss = torch.where(counted, weight * sample_loss, 0.0).sum()
    values = torch.stack((policy, positive, negative, reference, torch.zeros_like(policy))).detach()
    metrics = torch.where(counted, values, 0.0).sum(1) / total
    metrics[4] = (counted & ~torch.isfinite(sample_loss)).any().to(dtype)

    scale = 2.0 * advantage_max / n * (t * t * weight).double()
    on_ref = 2.0 * (ref_weight if v_ref is not None else 0.0) / n * weight.double()
    factors = torch.stack((-scale * r / w_positive, scale * (1.0 - r) / w_negative, on_ref), 1)
    factors = torch.where(counted[:, None], factors, 0.0).detach()
    return loss, metrics, factors


def nft_loss_ref(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    v: Tensor,
    v_old: Tensor,
    r: Tensor,
    *,
    beta: float,
    v_ref: Tensor | None = None,
    advantage_max: float = 5.0,
    ref_weight: float = 1e-4,
    min_weight: float = 1e-5,
    mask: Tensor | None = None,
    normalizer: float | None = None,
) -> NftLoss:
    """The definition, in plain PyTorch on any device; gradient to v only. fp64 latents are computed
    in fp64."""
    loss, metrics, _ = _nft_ref(
        _checks.flat("x0", x0),
        _checks.flat("noise", noise),
        _checks.flat("v", v),
        _checks.flat("v_old", v_old),
        None if v_ref is None else _checks.flat("v_ref", v_ref),
        sigma,
        r,
        mask,
        beta,
        advantage_max,
        ref_weight,
        min_weight,
        normalizer or 0.0,
    )
    return NftLoss(loss, NftMetrics(*metrics.unbind()))


def nft_loss_backward_ref(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    factors: Tensor,
    scale: Tensor,
    beta: float,
) -> Tensor:
    """Gradient to v, [B, N] in v.dtype: the combination of the docstring; exactly 0 where all
    factors are."""
    on_positive, on_negative, on_ref = times_ref(factors, scale).split(1, dim=1)
    v_BN, v_old_BN = v.float(), v_old.float()
    e_BN = (noise.float() - x0.float()) - v_old_BN
    beta_d_BN = (v_BN - v_old_BN) * beta
    grad_BN = times_ref(on_positive, e_BN - beta_d_BN) + times_ref(on_negative, e_BN + beta_d_BN)
    if v_ref is not None:
        grad_BN = grad_BN + times_ref(on_ref, v_BN - v_ref.float())
    return torch.where((factors != 0).any(1)[:, None], grad_BN, 0.0).to(v.dtype)


def _fake_nft_loss(
    x0: Tensor, noise: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty((), dtype=torch.float32), v.new_empty(5, dtype=torch.float32), _factors(v)


@operator(
    "nft_loss",
    "(Tensor x0, Tensor noise, Tensor v, Tensor v_old, Tensor? v_ref, Tensor sigma, Tensor r, "
    "Tensor? mask, float beta, float advantage_max, float ref_weight, float min_weight, float "
    "normalizer, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_nft_loss,
)
def _nft_loss(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    sigma: Tensor,
    r: Tensor,
    mask: Tensor | None,
    beta: float,
    advantage_max: float,
    ref_weight: float,
    min_weight: float,
    normalizer: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [5], factors [B, 3] of a unit incoming gradient), all fp32."""
    chosen = select(backend, v.device)
    _checks.unit_range("sigma", sigma, mask)
    _checks.unit_range("r", r, mask)
    if chosen == "ref":
        out = _nft_ref(
            x0,
            noise,
            v,
            v_old,
            v_ref,
            sigma,
            r,
            mask,
            beta,
            advantage_max,
            ref_weight,
            min_weight,
            normalizer,
        )
        return out[0].float(), out[1].float(), out[2].float()
    # Backend "cpu" writes all of them.
    first = sigma.new_empty if chosen == "cpu" and v.shape[0] > 0 else sigma.new_zeros
    loss, metrics, factors = first(()), first(5), sigma.new_empty((v.shape[0], 3))
    if v.shape[0] == 0:
        return loss, metrics, factors
    x0, noise, v, v_old = (
        _checks.addressable(x0),
        _checks.addressable(noise),
        _checks.addressable(v),
        _checks.addressable(v_old),
    )
    v_ref = None if v_ref is None else _checks.addressable(v_ref)
    sigma, r = sigma.contiguous(), r.contiguous()
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.nft_loss(
            x0,
            noise,
            v,
            v_old,
            v_ref,
            sigma,
            r,
            mask,
            beta,
            advantage_max,
            ref_weight,
            min_weight,
            normalizer,
            loss,
            metrics,
            factors,
        )
        return loss, metrics, factors
    module, where = compiled(chosen, v)
    batch, n = v.shape
    scratch = None if chosen == "cpu" else workspace(module, v, batch, n, n, 0)
    module.nft_loss(
        x0=strided(x0),
        noise=strided(noise),
        v=strided(v),
        v_old=strided(v_old),
        v_ref=strided(v_ref),
        sigma=pointer(sigma),
        r=pointer(r),
        mask=pointer(mask),
        beta=beta,
        advantage_max=advantage_max,
        ref_weight=ref_weight,
        min_weight=min_weight,
        normalizer=normalizer,
        loss=pointer(loss),
        metrics=pointer(metrics),
        factors=pointer(factors),
        workspace=pointer(scratch),
        B=batch,
        N=n,
        **where,
    )
    return loss, metrics, factors


def _factors(v: Tensor) -> Tensor:
    return torch.empty(v.shape[0], 3, dtype=torch.float32, device=v.device)


def _fake_nft_loss_backward(x0: Tensor, noise: Tensor, v: Tensor, *others: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@operator(
    "nft_loss_backward",
    "(Tensor x0, Tensor noise, Tensor v, Tensor v_old, Tensor? v_ref, Tensor factors, Tensor "
    "scale, float beta, str backend) -> Tensor",
    fake=_fake_nft_loss_backward,
)
def _nft_loss_backward(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    factors: Tensor,
    scale: Tensor,
    beta: float,
    backend: str,
) -> Tensor:
    """scale: [1] fp32, the incoming gradient."""
    chosen = select(backend, v.device)
    if chosen == "ref":
        return nft_loss_backward_ref(x0, noise, v, v_old, v_ref, factors, scale, beta)
    grad_v = v.new_empty(v.shape)
    if v.shape[0] == 0:
        return grad_v
    x0, noise, v, v_old = (
        _checks.addressable(x0),
        _checks.addressable(noise),
        _checks.addressable(v),
        _checks.addressable(v_old),
    )
    v_ref = None if v_ref is None else _checks.addressable(v_ref)
    factors, scale = factors.contiguous(), scale.contiguous()
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.nft_loss_backward(x0, noise, v, v_old, v_ref, beta, factors, scale, grad_v)
        return grad_v
    module, where = compiled(chosen, v)
    batch, n = v.shape
    scratch = None if chosen == "cpu" else workspace(module, v, batch, n, n, 0)
    module.nft_loss_backward(
        x0=strided(x0),
        noise=strided(noise),
        v=strided(v),
        v_old=strided(v_old),
        v_ref=strided(v_ref),
        beta=beta,
        factors=pointer(factors),
        scale=pointer(scale),
        grad_v=strided(grad_v),
        workspace=pointer(scratch),
        B=batch,
        N=n,
        **where,
    )
    return grad_v


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x0, noise, v, v_old, v_ref, _, _, _, beta, *_, backend = inputs
    _, metrics, factors = output
    ctx.save_for_backward(x0, noise, v, v_old, v_ref, factors)
    ctx.mark_non_differentiable(metrics, factors)
    ctx.set_materialize_grads(False)
    ctx.beta, ctx.backend = beta, backend


def _backward(ctx: Any, grad_loss: Tensor, *others: Any) -> tuple:
    grad_v = None
    if 2 in ctx.wanted:
        scale = grad_loss.float().reshape(1)
        grad_v = _nft_loss_backward(*ctx.saved_tensors, scale, ctx.beta, ctx.backend)
    return None, None, grad_v, *[None] * 11


differentiable("nft_loss", setup_context=_setup_context, backward=_backward, results=1)


def nft_loss(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    v: Tensor,
    v_old: Tensor,
    r: Tensor,
    *,
    beta: float,
    v_ref: Tensor | None = None,
    advantage_max: float = 5.0,
    ref_weight: float = 1e-4,
    min_weight: float = 1e-5,
    mask: Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
) -> NftLoss:
    """DiffusionNFT's loss of a batch of clean latents; differentiable to v, and to nothing else.

    Args:
        x0: [B, ...] clean latents of the rollout, float32, bfloat16 or float16. Arithmetic is fp32
            for all of them, also under autocast.
        noise: like x0 in shape; the eps of x_t = (1 - sigma) x0 + sigma eps, at which the
            velocities were predicted.
        sigma: [B] float32 in [0, 1], the noise level t of each sample.
        v: like x0 in shape; the trained policy's velocity at x_t. The gradient has its dtype.
        v_old: like x0 in shape; the sampling policy's velocity.
        r: [B] float32 in [0, 1], `nft_optimality` of the advantages.
        beta: how far v+ and v- lie from v_old, > 0.
        v_ref: like x0 in shape; a reference policy's velocity. None: the loss has no such term,
            whatever ref_weight.
        advantage_max: A_max, > 0.
        ref_weight: weight of mean((v - v_ref)^2), >= 0.
        min_weight: least adaptive weight w, > 0.
        mask: [B] bool; False takes a sample out of loss, gradient and metrics, whatever it holds
            (NaN included).
        normalizer: what the sum over samples is divided by, > 0; give the common one when a batch
            comes in parts. None: the number of samples that count, at least 1. Numbers are
            constants under torch.compile.
        backend: None picks one; a name is used or raises RuntimeError.

    Raises:
        ValueError or TypeError naming the argument. A sigma or r outside [0, 1] of a sample that
        counts raises on CPU tensors only; on a GPU looking would stall the queue.
    """
    _checks.samples("x0", x0)
    for name, value in (("noise", noise), ("v", v), ("v_old", v_old)):
        _checks.like(name, value, "x0", x0)
    if v_ref is not None:
        _checks.like("v_ref", v_ref, "x0", x0)
    _checks.scalars("sigma", sigma, "x0", x0)
    _checks.scalars("r", r, "x0", x0)
    _checks.mask(mask, "x0", x0)
    _checks.positive("beta", beta)
    _checks.positive("advantage_max", advantage_max)
    _checks.not_negative("ref_weight", ref_weight)
    _checks.positive("min_weight", min_weight)
    if normalizer is not None:
        _checks.positive("normalizer", normalizer)
    loss, metrics, _ = _nft_loss(
        _checks.flat("x0", _checks.detached(x0)),
        _checks.flat("noise", _checks.detached(noise)),
        _checks.flat("v", v),
        _checks.flat("v_old", _checks.detached(v_old)),
        None if v_ref is None else _checks.flat("v_ref", _checks.detached(v_ref)),
        _checks.detached(sigma),
        _checks.detached(r),
        mask,
        beta,
        advantage_max,
        ref_weight,
        min_weight,
        0.0 if normalizer is None else normalizer,
        _checks.backend_name(backend),
    )
    return NftLoss(loss, NftMetrics(*metrics.unbind()))
