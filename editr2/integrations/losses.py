"""Other projects' losses by the operators: what replaces them, and what they are probed with.

Only a loss over latents is here. One of log-probs alone is arithmetic on one number a sample, with
nothing to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from editr2.integrations.steps import covers, per_sample, wants_grad
from editr2_kernels import nft_loss

NFT_METRICS = (
    "policy_loss",
    "positive_loss",
    "negative_loss",
    "ref_kl_loss",
    "old_deviate",
    "reward_prob_mean",
    "total_loss",
)
"""Of verl-omni, behind `actor/`: numbers on the host."""


def verl_omni_nft(original: Callable[..., Any], noise: str, convention: None) -> Callable[..., Any]:
    """DiffusionNFT's loss of verl-omni. It is given x_t and no noise; with x0 and t they say which
    noise it was."""

    def ours(
        cls: type,
        *,
        forward_prediction: Tensor,
        old_prediction: Tensor,
        ref_forward_prediction: Tensor,
        x0: Tensor,
        xt: Tensor,
        t_expanded: Tensor,
        reward_prob: Tensor,
        config: Any,
    ) -> Any:
        v, v_old, v_ref, settings = (
            forward_prediction,
            old_prediction,
            ref_forward_prediction,
            config.diffusion_loss,
        )
        if (
            isinstance(settings, dict)  # which some versions make objects of
            or xt.dtype != torch.float32  # as its trainer makes it; the loss has that dtype then
            or xt.dim() < 2
            or not xt.numel()
            or not (covers(xt, v, v_old) and covers(x0, v_ref, None) and covers(xt, x0, None))
            or t_expanded.numel() != xt.shape[0]
            or t_expanded.dim() != xt.dim()
            or t_expanded.device != xt.device
            or wants_grad(t_expanded)
            or wants_grad(reward_prob)
            or reward_prob.shape[:1] != xt.shape[:1]
            or not (
                settings.mix_beta > 0
                and settings.adv_clip_max > 0
                and settings.adaptive_weight_min > 0
            )
            or settings.ref_kl_coef < 0
        ):
            return NotImplemented
        r = reward_prob.flatten(1).mean(1) if reward_prob.dim() > 1 else reward_prob
        r, t = r.to(x0.device).float(), t_expanded.reshape(-1).float()
        if t.device.type == "cpu" and not bool((_in_range(r) & _in_range(t)).all()):
            return NotImplemented  # what the operator refuses; on a GPU it does not look
        with torch.no_grad():
            # Where t is 0 its x_t is x0, and whatever noise it was counts nothing.
            eps = torch.lerp(x0.float(), xt, per_sample(torch.where(t > 0, 1 / t, 1.0), xt))
        loss, seen = nft_loss(
            x0,
            eps,
            t,
            v,
            v_old,
            r,
            beta=float(settings.mix_beta),
            v_ref=v_ref,
            advantage_max=float(settings.adv_clip_max),
            ref_weight=float(settings.ref_kl_coef),
            min_weight=float(settings.adaptive_weight_min),
        )
        moved = torch.nn.functional.mse_loss(v.detach().float(), v_old.detach().float())
        values = (
            seen.policy_loss,
            seen.positive,
            seen.negative,
            seen.reference,
            moved,
            r.mean(),
            loss.detach(),
        )
        return loss, dict(
            zip(
                (f"actor/{name}" for name in NFT_METRICS), torch.stack(values).tolist(), strict=True
            )
        )

    return ours


def _in_range(value: Tensor) -> Tensor:
    return (value >= 0) & (value <= 1)


def probe_verl_omni_nft(function: Callable[..., Any], module: ModuleType) -> Iterator[Any]:
    """Every constant counts: in the second call one sample lies below the least weight."""
    x0, noise, v, v_old, v_ref = torch.randn(5, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1)
    xt = (1 - t) * x0 + t * noise
    for r, least, dtype in (
        (torch.tensor([0.0, 0.3, 1.0]), 1e-5, torch.float32),
        (torch.tensor([[0.9, 0.5], [0.2, 0.4], [0.0, 0.3]]), 0.6, torch.float32),
        (torch.tensor([0.5, 0.25, 0.75]), 1e-5, torch.bfloat16),
    ):
        settings = SimpleNamespace(
            mix_beta=0.4, adv_clip_max=3.0, adaptive_weight_min=least, ref_kl_coef=0.2
        )
        velocity = v.clone().requires_grad_()
        clean = x0.to(dtype)
        yield (
            velocity,
            function(
                module.DiffusionNFTLoss,
                forward_prediction=velocity,
                old_prediction=v_old,
                ref_forward_prediction=v_ref,
                x0=clean,
                xt=xt if dtype == torch.float32 else (1 - t) * clean + t * noise,
                t_expanded=t,
                reward_prob=r,
                config=SimpleNamespace(diffusion_loss=settings),
            ),
        )
