"""nft_loss against DiffusionNFT's loss as published: its weights are float64, and so all after
them.

A second eager baseline keeps to fp32, which the published code does not, so that the dtype's share
is visible.
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
from bench.flow_sde import normal
from bench.providers import MODES, compare_loss
from bench.sizes import Size

BETA, ADVANTAGE_MAX, REF_WEIGHT, MIN_WEIGHT = 1.0, 5.0, 1e-4, 1e-5


@dataclass(frozen=True)
class Inputs:
    x0: Tensor
    noise: Tensor
    v: Tensor
    v_old: Tensor
    v_ref: Tensor
    t: Tensor  # [B]
    r: Tensor  # [B]
    x_t: Tensor  # fp32: a trainer has it from its model's forward pass; ours does not read it

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.v_old, self.v_ref, self.x0, self.x_t, self.t.view(-1, 1, 1), self.r


def make_inputs(size: Size) -> Inputs:
    x0, noise = normal(size, 0).to(size.dtypes.x), normal(size, 1).to(size.dtypes.x)
    base = noise.float() - x0.float()
    # Velocities near the target, as a trained model's are, and near one another.
    v, v_old, v_ref = ((base + 0.2 * normal(size, seed)).to(size.dtypes.v) for seed in (2, 3, 4))
    t = torch.linspace(0.1, 0.95, size.shape[0], device=size.device)
    r = torch.linspace(0.0, 1.0, size.shape[0], device=size.device)
    x_t = (1 - t.view(-1, 1, 1)) * x0.float() + t.view(-1, 1, 1) * noise.float()
    return Inputs(x0, noise, v.requires_grad_(), v_old, v_ref, t, r, x_t)


def loss(
    weights: torch.dtype,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
) -> Tensor:
    v, v_old, v_ref, x0 = v.float(), v_old.float(), v_ref.float(), x0.float()
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", sizes.latents())
def test_nft_loss(size: Size, mode: str, compare: Callable[..., Any]) -> None:
    def operator(v: Tensor, i: Inputs, backend: str) -> Tensor:
        return editr2_kernels.nft_loss(
            i.x0,
            i.noise,
            i.t,
            v,
            i.v_old,
            i.r,
            beta=BETA,
            v_ref=i.v_ref,
            advantage_max=ADVANTAGE_MAX,
            ref_weight=REF_WEIGHT,
            min_weight=MIN_WEIGHT,
            backend=backend,
        ).loss

    compare_loss(
        compare,
        op="nft_loss",
        size=size,
        mode=mode,
        inputs=partial(make_inputs, size),
        leaf=lambda i: i.v,
        arguments=lambda i: i.tensors,
        eager={
            ", float64 weights": partial(loss, torch.float64),
            ", fp32": partial(loss, torch.float32),
        },
        operator=operator,
        read=size.bytes(x=2, v=3),
        written=size.bytes(v=1),
        flops=18 * size.elements,
        # x_t is rounded in the baseline and never formed in ours, which shows where terms cancel.
        atol=1e-4,
    )
