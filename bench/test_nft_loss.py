"""nft_loss, forward and backward, against DiffusionNFT's loss as published: its weights are float64, and so all after
them. A second eager baseline keeps to fp32, which the published code does not, so that the dtype's share is visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench.flow_sde import SHAPES, worst

BETA, ADVANTAGE_MAX, REF_WEIGHT, MIN_WEIGHT = 1.0, 5.0, 1e-4, 1e-5


def loss(
    v: Tensor, v_old: Tensor, v_ref: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, r: Tensor, weights: torch.dtype
) -> Tensor:
    v, v_old, v_ref = v.float(), v_old.float(), v_ref.float()
    positive = BETA * v + (1 - BETA) * v_old
    negative = (1 + BETA) * v_old - BETA * v
    terms = []
    for velocity in (positive, negative):
        error = x_t - t * velocity - x0
        with torch.no_grad():
            weight = error.to(weights).abs().mean(dim=(1, 2), keepdim=True).clip(min=MIN_WEIGHT)
        terms.append((error**2 / weight).mean(dim=(1, 2)))
    policy = (r * terms[0] / BETA + (1 - r) * terms[1] / BETA).mean() * ADVANTAGE_MAX
    return policy + REF_WEIGHT * ((v - v_ref) ** 2).mean(dim=(1, 2)).mean()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_nft_loss(shape: tuple[int, ...], compare: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = shape[0]
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    base = noise - x0
    # Velocities near the target, as a trained model's are, and near one another.
    v, v_old, v_ref = ((base + 0.2 * torch.randn(shape, generator=generator)).to(torch.bfloat16) for _ in range(3))
    v.requires_grad_()
    t, r = torch.linspace(0.1, 0.95, batch), torch.linspace(0.0, 1.0, batch)
    t_b = t.view(-1, 1, 1)
    x_t = (1 - t_b) * x0 + t_b * noise
    arguments = (v_old, v_ref, x0, x_t, t_b, r)

    def ours(v: Tensor) -> Tensor:
        return editr2_kernels.nft_loss(
            x0,
            noise,
            t,
            v,
            v_old,
            r,
            beta=BETA,
            v_ref=v_ref,
            advantage_max=ADVANTAGE_MAX,
            ref_weight=REF_WEIGHT,
            min_weight=MIN_WEIGHT,
            backend="cpu",
        ).loss

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(function(v), v)[0]

    def eager(weights: torch.dtype) -> Tensor:
        return gradient(lambda v: loss(v, *arguments, weights))

    # Gate, as for grpo_loss; x_t is rounded in the baseline and never formed in ours, hence 1e-4 where terms cancel.
    worst("loss", ours(v), loss(v, *arguments, torch.float64).float(), 1e-5)
    expected, first = eager(torch.float64), gradient(ours)
    torch.testing.assert_close(first, expected, rtol=2**-7, atol=1e-4 * expected.abs().max().item())
    error = (first.float() - expected.float()).abs().max().item()

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    compare(
        op="nft_loss",
        mode="forward + backward",
        shape=shape,
        dtype="x fp32, v bf16",
        providers={
            "eager, float64 weights": lambda: eager(torch.float64),
            "eager, fp32": lambda: eager(torch.float32),
            "compile, float64 weights": lambda: gradient(lambda v: compiled(v, *arguments, torch.float64)),
            "compile, fp32": lambda: gradient(lambda v: compiled(v, *arguments, torch.float32)),
            "editr2 cpu": lambda: gradient(ours),
        },
        max_error={"editr2 cpu": error},
    )
    assert torch.equal(gradient(ours), first)
