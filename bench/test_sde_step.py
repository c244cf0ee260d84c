"""sde_step, and its replay with gradient, against the flow-SDE step as trainers write it in PyTorch.

The baselines get their sigmas as tensors looked up once, outside the timing; the published code also pays for the
look-ups, per sample and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
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


def step_noise_given(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = transition(x, v, sigma, sigma_next)
    x_next = mean + std * noise
    return x_next, log_prob(x_next, mean, std)


def step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    return step_noise_given(x, v, sigma, sigma_next, torch.randn(x.shape))


def worst(name: str, ours: Tensor, eager: Tensor, tolerance: float) -> float:
    """Largest difference; fails above tolerance * the largest value."""
    error = (ours - eager).abs().max().item()
    assert error <= tolerance * max(1.0, eager.abs().max().item()), f"{name} differs from eager by {error}"
    return error


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sde_step(shape: tuple[int, ...], compare: Callable[..., Any]) -> None:
    i = make_inputs(shape)
    arguments = (i.x, i.v, i.sigma, i.sigma_next)

    def ours() -> editr2_kernels.SdeStep:
        return editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, i.seed, backend="cpu")

    def ours_given() -> editr2_kernels.SdeStep:
        noise = torch.randn(i.x.shape)
        return editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, None, noise=noise, backend="cpu")

    # Gate. 1e-6 is a few roundings in fp32: the baseline computes its coefficients in fp32, the table in fp64.
    eager_x, eager_log_prob = step_noise_given(*arguments, i.noise)
    first = ours()
    given = editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, None, noise=i.noise, backend="cpu")
    error = worst("x_next", first.x_next, eager_x, 1e-6)
    worst("log_prob", first.log_prob, eager_log_prob, 1e-5)
    assert torch.equal(given.x_next, first.x_next) and torch.equal(given.log_prob, first.log_prob)
    replay = editr2_kernels.sde_log_prob(i.x, first.x_next, i.v, i.table, i.step_index, backend="cpu")
    assert torch.equal(replay.log_prob, first.log_prob)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    compiled_given = torch.compile(step_noise_given, fullgraph=True, dynamic=False)
    compare(
        op="sde_step",
        mode="forward",
        shape=shape,
        dtype="x fp32, v bf16",
        providers={
            "eager, torch.randn": lambda: step(*arguments),
            "compile, noise inside": lambda: compiled(*arguments),
            "compile, noise outside": lambda: compiled_given(*arguments, torch.randn(i.x.shape)),
            "editr2 cpu, noise in the kernel": ours,
            "editr2 cpu, torch.randn": ours_given,
        },
        max_error={"editr2 cpu, noise in the kernel": error, "editr2 cpu, torch.randn": error},
    )
    again = ours()
    assert torch.equal(again.x_next, first.x_next) and torch.equal(again.log_prob, first.log_prob)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sde_log_prob(shape: tuple[int, ...], compare: Callable[..., Any]) -> None:
    """Forward and backward to a bf16 velocity, as the training step does it."""
    i = make_inputs(shape)
    x_next = editr2_kernels.sde_step(i.x, i.v, i.table, i.step_index, i.seed, backend="cpu").x_next
    weight = torch.linspace(-1.0, 1.0, shape[0])
    v = i.v.clone().requires_grad_()

    def baseline(v: Tensor) -> Tensor:
        return log_prob(x_next, *transition(i.x, v, i.sigma, i.sigma_next))

    def ours(v: Tensor) -> Tensor:
        return editr2_kernels.sde_log_prob(i.x, x_next, v, i.table, i.step_index, backend="cpu").log_prob

    def gradient(log_prob_of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad((log_prob_of(v) * weight).sum(), v)[0]

    # Gate. The gradient leaves in bf16: one rounding, 2^-8 of the value, may fall to the other side.
    worst("log_prob", ours(v), baseline(v), 1e-5)
    expected, first = gradient(baseline), gradient(ours)
    torch.testing.assert_close(first, expected, rtol=2**-7, atol=1e-6 * expected.abs().max().item())
    error = (first.float() - expected.float()).abs().max().item()

    compiled = torch.compile(baseline, fullgraph=True, dynamic=False)
    compare(
        op="sde_log_prob",
        mode="forward + backward",
        shape=shape,
        dtype="x fp32, v bf16",
        providers={
            "eager": lambda: gradient(baseline),
            "compile": lambda: gradient(compiled),
            "editr2 cpu": lambda: gradient(ours),
        },
        max_error={"editr2 cpu": error},
    )
    assert torch.equal(gradient(ours), first)
