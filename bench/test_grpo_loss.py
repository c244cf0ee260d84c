"""grpo_loss, with its KL, with GRPO-Guard, and awm_loss on the same kernels, against the losses as
trainers write them.

The baseline takes the reference's mean alone and looks no sigma up: the published scripts also
compute the reference's log-prob and throw it away, and search the schedule once a sample. Its
metrics are left out, ours come with the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench import sizes
from bench.flow_sde import Inputs, log_prob, make_inputs, normal, transition
from bench.providers import MODES, compare_loss, our_backends
from bench.sizes import Size

CLIP, KL_WEIGHT, ADVANTAGE_CLIP = 1e-5, 0.01, 5.0


@dataclass(frozen=True)
class Move:
    """A step of the rollout, a policy a little off the one that sampled, and a reference a little
    off both."""

    step: Inputs
    x_next: Tensor
    old: Tensor
    v: Tensor
    v_ref: Tensor
    advantage: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        i = self.step
        return self.v_ref, i.v, i.x, self.x_next, self.old, self.advantage, i.sigma, i.sigma_next


def make_move(size: Size) -> Move:
    i = make_inputs(size)
    backend = our_backends(size.device)[0]
    step = editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, i.seed, backend=backend)
    v = (i.v.float() + 1e-3 * normal(size, 2)).to(size.dtypes.v).requires_grad_()
    v_ref = (i.v.float() + 0.1 * normal(size, 3)).to(size.dtypes.v)
    return Move(
        i,
        step.x_next,
        step.log_prob,
        v,
        v_ref,
        torch.linspace(-2.0, 2.0, size.shape[0], device=size.device),
    )


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    advantage = advantage.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))


def loss(
    v: Tensor,
    v_ref: Tensor,
    v_old: Tensor,
    x: Tensor,
    x_next: Tensor,
    old: Tensor,
    advantage: Tensor,
    sigma: Tensor,
    after: Tensor,
) -> Tensor:
    mean, std = transition(x, v, sigma, after)
    with torch.no_grad():
        mean_ref, _ = transition(x, v_ref, sigma, after)
    ratio = torch.exp(log_prob(x_next.float(), mean, std) - old)
    kl = (((mean - mean_ref) ** 2).mean(dim=(1, 2), keepdim=True) / (2 * std**2)).mean()
    return clipped(ratio, advantage).mean() + KL_WEIGHT * kl


def guarded_loss(
    v: Tensor,
    v_ref: Tensor,
    v_old: Tensor,
    x: Tensor,
    x_next: Tensor,
    old: Tensor,
    advantage: Tensor,
    sigma: Tensor,
    after: Tensor,
) -> Tensor:
    """GRPO-Guard: the ratio is centred and scaled by the step's noise, the loss divided by its
    length."""
    mean, std = transition(x, v, sigma, after)
    with torch.no_grad():
        mean_old, _ = transition(x, v_old, sigma, after)
    std, delta = std.view(-1), (sigma - after).view(-1)
    drift = ((mean - mean_old) ** 2).mean(dim=(1, 2)) / (2 * std**2)
    ratio = torch.exp((log_prob(x_next.float(), mean, std.view(-1, 1, 1)) - old + drift) * std)
    return (clipped(ratio, advantage) / delta).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", sizes.latents())
def test_grpo_loss(size: Size, mode: str, compare: Callable[..., Any]) -> None:
    def operator(v: Tensor, m: Move, backend: str) -> Tensor:
        i = m.step
        return editr2_kernels.grpo_loss(
            i.x,
            m.x_next,
            v,
            i.table,
            i.step_index,
            m.old,
            m.advantage,
            clip=CLIP,
            advantage_clip=ADVANTAGE_CLIP,
            v_ref=m.v_ref,
            kl_weight=KL_WEIGHT,
            backend=backend,
        ).loss

    compare_loss(
        compare,
        op="grpo_loss",
        size=size,
        mode=mode,
        variant=", KL",
        inputs=partial(make_move, size),
        leaf=lambda m: m.v,
        arguments=lambda m: m.tensors,
        eager={"": loss},
        operator=operator,
        read=size.bytes(x=2, v=2),
        written=size.bytes(v=1),
        flops=10 * size.elements,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", sizes.latents(variant=True))
def test_grpo_loss_guard(size: Size, mode: str, compare: Callable[..., Any]) -> None:
    def operator(v: Tensor, m: Move, backend: str) -> Tensor:
        i = m.step
        return editr2_kernels.grpo_loss(
            i.x,
            m.x_next,
            v,
            i.table,
            i.step_index,
            m.old,
            m.advantage,
            clip=CLIP,
            advantage_clip=ADVANTAGE_CLIP,
            guard=True,
            v_old=i.v,
            backend=backend,
        ).loss

    compare_loss(
        compare,
        op="grpo_loss",
        size=size,
        mode=mode,
        variant=", guard",
        inputs=partial(make_move, size),
        leaf=lambda m: m.v,
        arguments=lambda m: m.tensors,
        eager={"": guarded_loss},
        operator=operator,
        read=size.bytes(x=2, v=2),
        written=size.bytes(v=1),
        flops=10 * size.elements,
    )


def matching_loss(
    v: Tensor, v_ref: Tensor, noise: Tensor, x0: Tensor, old: Tensor, advantage: Tensor
) -> Tensor:
    """Advantage-weighted matching: flow matching's error is the log-prob."""
    v = v.float()
    ratio = torch.exp(-((v - (noise - x0.float())) ** 2).mean(dim=(1, 2)) - old)
    return (
        clipped(ratio, advantage) + KL_WEIGHT * ((v - v_ref.float()) ** 2).mean(dim=(1, 2))
    ).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", sizes.latents(variant=True))
def test_awm_loss(size: Size, mode: str, compare: Callable[..., Any]) -> None:
    def inputs() -> tuple[Move, Tensor]:
        m = make_move(size)
        return m, editr2_kernels.awm_log_prob(
            m.step.x, m.step.noise, m.step.v, backend=our_backends(size.device)[0]
        )

    def operator(v: Tensor, both: tuple[Move, Tensor], backend: str) -> Tensor:
        m, old = both
        return editr2_kernels.awm_loss(
            m.step.x,
            m.step.noise,
            v,
            old,
            m.advantage,
            clip=CLIP,
            advantage_clip=ADVANTAGE_CLIP,
            v_ref=m.v_ref,
            kl_weight=KL_WEIGHT,
            backend=backend,
        ).loss

    compare_loss(
        compare,
        op="awm_loss",
        size=size,
        mode=mode,
        variant=", KL",
        inputs=inputs,
        leaf=lambda both: both[0].v,
        arguments=lambda both: (
            both[0].v_ref,
            both[0].step.noise,
            both[0].step.x,
            both[1],
            both[0].advantage,
        ),
        eager={"": matching_loss},
        operator=operator,
        read=size.bytes(x=1, v=2) + 4 * size.elements,
        written=size.bytes(v=1),
        flops=8 * size.elements,
    )
