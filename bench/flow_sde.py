"""The flow-SDE step as trainers write it in PyTorch, and inputs for it: the baseline of several
benchmarks.

The baselines get their sigmas as tensors looked up once, outside the timing, but for the one
provider that looks them up as the published code does, sample by sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import editr2_kernels
from bench.sizes import Size

NOISE_LEVEL = 0.7
SIGMAS = editr2_kernels.flow_sigmas(10, shift=3.0)


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [B, L, D]
    v: Tensor  # [B, L, D], as models give it
    noise: Tensor  # fp32, the counter-based noise of (seed, step)
    table: Tensor
    step_index: Tensor
    seed: Tensor
    schedule: Tensor  # [rows + 1] sigmas
    sigma: Tensor  # [B, 1, 1]
    sigma_next: Tensor


def make_inputs(size: Size) -> Inputs:
    """The same values whenever and on whatever device."""
    generator = torch.Generator().manual_seed(0)
    batch, *sample = size.shape
    step_index = torch.arange(batch) % (len(SIGMAS) - 1)
    seed = torch.randint(2**62, (batch,), generator=generator).to(size.device)
    schedule = torch.tensor(SIGMAS)
    return Inputs(
        x=normal(size, 0).to(size.dtypes.x),
        v=normal(size, 1).to(size.dtypes.v),
        noise=editr2_kernels.philox_normal(seed, step_index.to(size.device), sample),
        table=editr2_kernels.transition_table(
            SIGMAS, dynamics="flow-sde", noise_level=NOISE_LEVEL, device=torch.device(size.device)
        ),
        step_index=step_index.to(size.device),
        seed=seed,
        schedule=schedule.to(size.device),
        sigma=schedule[step_index].view(-1, 1, 1).to(size.device),
        sigma_next=schedule[step_index + 1].view(-1, 1, 1).to(size.device),
    )


def normal(size: Size, seed: int) -> Tensor:
    """fp32; made on its device, for the large ones have 2^27 elements."""
    generator = torch.Generator(size.device).manual_seed(seed)
    return torch.randn(size.shape, generator=generator, device=size.device)


def transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the step, in fp32."""
    x, v = x.float(), v.float()
    delta = sigma_next - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, SIGMAS[1], sigma))) * NOISE_LEVEL
    mean = x * (1 + g**2 / (2 * sigma) * delta) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * delta
    return mean, g * torch.sqrt(-delta)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    density = (
        -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    )
    return density.mean(dim=tuple(range(1, density.ndim)))


def looked_up(i: Inputs) -> tuple[Tensor, Tensor]:
    """sigma and sigma' as the published step finds them: for each sample a search, whose answer the
    host waits for."""
    at = i.schedule[i.step_index]
    index = [int((i.schedule == t).nonzero()[0].item()) for t in at]
    return i.schedule[index].view(-1, 1, 1), i.schedule[[k + 1 for k in index]].view(-1, 1, 1)
