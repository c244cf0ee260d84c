"""grpo_loss with its KL, forward and backward, against the loss as trainers write it in PyTorch.

The baseline takes the reference's mean alone and looks no sigma up: the published scripts also compute the reference's
log-prob and throw it away, and search the schedule once a sample. Its metrics are left out, ours come with the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench.flow_sde import SHAPES, Inputs, log_prob, make_inputs, transition, worst

CLIP, KL_WEIGHT, ADVANTAGE_CLIP = 1e-5, 0.01, 5.0


def loss(
    v: Tensor, v_ref: Tensor, x: Tensor, x_next: Tensor, old: Tensor, advantage: Tensor, sigma: Tensor, after: Tensor
) -> Tensor:
    mean, std = transition(x, v, sigma, after)
    with torch.no_grad():
        mean_ref, _ = transition(x, v_ref, sigma, after)
    advantage = advantage.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    ratio = torch.exp(log_prob(x_next, mean, std) - old)
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    kl = (((mean - mean_ref) ** 2).mean(dim=(1, 2), keepdim=True) / (2 * std**2)).mean()
    return policy + KL_WEIGHT * kl


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_grpo_loss(shape: tuple[int, ...], compare: Callable[..., Any]) -> None:
    i: Inputs = make_inputs(shape)
    generator = torch.Generator().manual_seed(1)
    step = editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, i.seed, backend="cpu")
    # A policy a little off the one that sampled, and a reference a little off both: nothing cancels.
    v = (i.v.float() + 1e-3 * torch.randn(shape, generator=generator)).to(torch.bfloat16).requires_grad_()
    v_ref = (i.v.float() + 0.1 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    advantage = torch.linspace(-2.0, 2.0, shape[0])
    old = step.log_prob
    arguments = (v_ref, i.x, step.x_next, old, advantage, i.sigma, i.sigma_next)

    def ours(v: Tensor) -> Tensor:
        return editr2_kernels.grpo_loss(
            i.x,
            step.x_next,
            v,
            i.table,
            i.step_index,
            old,
            advantage,
            clip=CLIP,
            advantage_clip=ADVANTAGE_CLIP,
            v_ref=v_ref,
            kl_weight=KL_WEIGHT,
            backend="cpu",
        ).loss

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(function(v), v)[0]

    # Gate. The gradient leaves in bf16: one rounding, 2^-8 of the value, may fall to the other side.
    worst("loss", ours(v), loss(v, *arguments), 1e-5)
    expected, first = gradient(lambda v: loss(v, *arguments)), gradient(ours)
    torch.testing.assert_close(first, expected, rtol=2**-7, atol=1e-6 * expected.abs().max().item())
    error = (first.float() - expected.float()).abs().max().item()

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    compare(
        op="grpo_loss",
        mode="forward + backward, KL",
        shape=shape,
        dtype="x fp32, v bf16",
        providers={
            "eager": lambda: gradient(lambda v: loss(v, *arguments)),
            "compile": lambda: gradient(lambda v: compiled(v, *arguments)),
            "editr2 cpu": lambda: gradient(ours),
        },
        max_error={"editr2 cpu": error},
    )
    assert torch.equal(gradient(ours), first)
