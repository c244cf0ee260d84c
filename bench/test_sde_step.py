"""sde_step, and its replay with gradient, against the flow-SDE step as trainers write it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench.flow_sde import SHAPES, log_prob, make_inputs, transition, worst


def step_noise_given(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = transition(x, v, sigma, sigma_next)
    x_next = mean + std * noise
    return x_next, log_prob(x_next, mean, std)


def step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    return step_noise_given(x, v, sigma, sigma_next, torch.randn(x.shape))


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
