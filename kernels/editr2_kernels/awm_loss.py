"""Advantage-weighted matching: policy gradient with the forward process in the place of the
sampler's transitions.

    log p = -mean((v - (eps - x0))^2)        v at x_t = (1 - t) x0 + t eps
    rho   = exp(log p - log p_old)
    loss  = sum_b weight_b (max(-A rho, -A clip(rho)) + kl_weight mean((v - v_ref)^2))

The likelihood of a sample is its flow-matching loss, so training needs no trajectory and is
indifferent to the sampler; near the old policy (rho = 1) the gradient is that of A mean((v - (eps -
x0))^2): pretraining's loss, weighted.

It is `grpo_loss` on the table of a single row. With x = x0, x' = eps and mu = A x + B v, a row of
A = B = 1 gives z = x' - mu = (eps - x0) - v; w = -1 and c = 0 make log p = -mean(z^2). S = 1 only
says that the row is no ODE row.

Source: Advantage Weighted Matching (arXiv 2509.25050).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .grpo_loss import GrpoLoss, grpo_loss
from .sde_log_prob import sde_log_prob


def _row(x0: Tensor) -> tuple[Tensor, Tensor]:
    """The table and the index of every sample, made on the device: nothing waits, and a graph can
    capture it."""
    _checks.samples("x0", x0)
    table = torch.zeros(1, 8, dtype=torch.float32, device=x0.device)
    table[:, 0:2] = 1.0  # A, B
    table[:, 3] = 1.0  # S
    table[:, 4] = -1.0  # w
    return table, torch.zeros(x0.shape[0], dtype=torch.int64, device=x0.device)


def awm_log_prob(x0: Tensor, noise: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """[B] fp32: -mean((v - (noise - x0))^2), differentiable to v; of the sampling policy, the old
    log-prob.

    x0, noise, v: as in `awm_loss`, with the bits of its log_prob.
    """
    table, index = _row(x0)
    _checks.like("noise", noise, "x0", x0)
    _checks.like("v", v, "x0", x0)
    return sde_log_prob(x0, noise, v, table, index, backend=backend).log_prob


def awm_loss(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: float | tuple[float, float] = 1e-5,
    advantage_clip: float | None = 5.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    mask: Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
) -> GrpoLoss:
    """Advantage-weighted matching of clean latents; differentiable to v, and to nothing else.

    Args:
        x0: [B, ...] clean latents of the rollout, float32, bfloat16 or float16.
        noise: like x0 in shape; the eps of the x_t at which v was predicted.
        v: like x0 in shape; the trained policy's velocity. The gradient has its dtype.
        old_log_prob: [B] float32, `awm_log_prob` of the sampling policy at the same noise and t.
        clip, advantage_clip, kl_weight, mask, normalizer, backend: as in `grpo_loss`.
        v_ref: like x0 in shape; a reference policy's velocity; kl is mean((v - v_ref)^2).

    Returns and raises as `grpo_loss` does.
    """
    table, index = _row(x0)
    _checks.like("noise", noise, "x0", x0)
    _checks.like("v", v, "x0", x0)
    return grpo_loss(
        x0,
        noise,
        v,
        table,
        index,
        old_log_prob,
        advantage,
        clip=clip,
        advantage_clip=advantage_clip,
        v_ref=v_ref,
        kl_weight=kl_weight,
        kl_scale="velocity",
        mask=mask,
        normalizer=normalizer,
        backend=backend,
    )
