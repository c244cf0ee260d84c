"""Losses: pure functions of tensors, one value per entry; the trainer weighs and sums them."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """rho = exp(log p - log p_old), any shape, fp32."""
    return torch.exp(log_prob.float() - old_log_prob.float())


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), elementwise (PPO; Flow-GRPO, arXiv 2505.05470).

    Broadcasts `advantage`. An advantage of exactly 0 gives a loss and a gradient of exactly 0.
    """
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))


def gaussian_kl(mean_difference: Tensor, std: Tensor) -> Tensor:
    """KL between two transitions of the same std: mean((mu - mu_ref)^2) / (2 S^2), per entry.

    mean_difference: mean((mu - mu_ref)^2) as `sde_log_prob` returns it; std: S, above 0.
    """
    return mean_difference / (2 * std.square())
