"""The flow-SDE step as trainers write it in PyTorch, and inputs for it: the baseline of several benchmarks.

The baselines get their sigmas as tensors looked up once, outside the timing; the published code also pays for the
look-ups, per sample and step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import editr2_kernels

NOISE_LEVEL = 0.7
SIGMAS = editr2_kernels.flow_sigmas(10, shift=3.0)
SHAPES = [(8, 4096, 64), (8, 1024, 64)]  # 1024 and 512 pixels square, 8 samples


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [B, L, D] fp32
    v: Tensor  # [B, L, D] bf16, as models give it
    noise: Tensor  # the counter-based noise of (seed, step)
    table: Tensor
    step_index: Tensor
    seed: Tensor
    sigma: Tensor  # [B, 1, 1]
    sigma_next: Tensor


def make_inputs(shape: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    batch = shape[0]
    step_index = torch.arange(batch) % (len(SIGMAS) - 1)
    seed = torch.randint(2**62, (batch,), generator=generator)
    sigmas = torch.tensor(SIGMAS)
    return Inputs(
        x=torch.randn(shape, generator=generator),
        v=torch.randn(shape, generator=generator).to(torch.bfloat16),
        noise=editr2_kernels.philox_normal(seed, step_index, shape[1:]),
        table=editr2_kernels.transition_table(SIGMAS, dynamics="flow-sde", noise_level=NOISE_LEVEL),
        step_index=step_index,
        seed=seed,
        sigma=sigmas[step_index].view(-1, 1, 1),
        sigma_next=sigmas[step_index + 1].view(-1, 1, 1),
    )


def transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the step, in fp32."""
    x, v = x.float(), v.float()
    delta = sigma_next - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, SIGMAS[1], sigma))) * NOISE_LEVEL
    mean = x * (1 + g**2 / (2 * sigma) * delta) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * delta
    return mean, g * torch.sqrt(-delta)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=tuple(range(1, density.ndim)))


def worst(name: str, ours: Tensor, eager: Tensor, tolerance: float) -> float:
    """Largest difference; fails above tolerance * the largest value."""
    error = (ours - eager).abs().max().item()
    assert error <= tolerance * max(1.0, eager.abs().max().item()), f"{name} differs from eager by {error}"
    return error
