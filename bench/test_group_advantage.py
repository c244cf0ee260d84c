"""group_advantage against the loop over prompts that trainers normalise rewards with.

The baseline is the per-prompt tracker as it is commonly written, in NumPy and float64: for each
reward, for each unique prompt, a mask by comparing strings, then mean, std and division. It has no
compiled form. Ours is timed as a caller sees it: argument checks, dispatch and all. On a GPU the
baseline's scores cross to the host and its advantages back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench import sizes
from bench.providers import SameBits, our_backends, ours, without_waiting
from bench.sizes import Size

SHAPES = [
    (48, 24, 3, 2),
    (16, 6, 3, 3),
]  # groups, siblings, turns, rewards; the second is Edit-R2's own
OPTIONS = editr2_kernels.CreditOptions(fusion="advantage", baseline="session_turn")
Inputs = tuple[Tensor, Tensor, Tensor, np.ndarray]


def per_prompt(prompts: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N] prompts and [N, T, K] scores -> [N, T] advantages: population std + 1e-4, clipped at
    5."""
    total = np.zeros(scores.shape[:2])
    for k, weight in enumerate(weights):
        rewards = scores[:, :, k].astype(np.float64)
        for prompt in np.unique(prompts):
            mask = prompts == prompt
            group = rewards[mask]
            total[mask] += weight * (group - group.mean(axis=0)) / (group.std(axis=0) + 1e-4)
    return np.clip(total, -5, 5)


@pytest.mark.parametrize("size", sizes.shapes(SHAPES, SHAPES))
def test_group_advantage(size: Size, compare: Callable[..., Any]) -> None:
    groups, siblings, turns, rewards = size.shape

    def inputs() -> Inputs:
        scores = torch.rand(
            groups * siblings, turns, rewards, generator=torch.Generator().manual_seed(0)
        )
        group = torch.arange(groups).repeat_interleave(siblings)
        prompts = np.array(
            [f"session {g:03d}: make the mug on the left table green" for g in group.tolist()]
        )
        weights = torch.full((rewards,), 1 / rewards)
        return scores.to(size.device), group.to(size.device), weights.to(size.device), prompts

    def eager(i: Inputs) -> Tensor:
        scores, _, weights, prompts = i
        return torch.from_numpy(
            per_prompt(prompts, scores.cpu().numpy(), weights.cpu().numpy())
        ).to(scores.device)

    def operator(backend: str, i: Inputs) -> editr2_kernels.GroupAdvantage:
        return editr2_kernels.group_advantage(i[0], i[1], OPTIONS, weights=i[2], backend=backend)

    same = SameBits()

    def gate(i: Inputs) -> dict[str, float]:
        errors = {}
        for backend in our_backends(size.device):
            found = without_waiting(size.device, partial(operator, backend, i)).advantage
            same.check(backend, (found,))
            # fp32 against float64: a few roundings of values of size 1, divided by a std of about
            # 0.3.
            error = (found - eager(i)).abs().max().item()
            assert error < 1e-5, f"advantages differ from NumPy's by {error}"
            errors |= dict.fromkeys((f"editr2 {backend}", f"editr2 {backend}, graph"), error)
        return errors

    samples = groups * siblings
    compare(
        op="group_advantage",
        mode="forward",
        shape=size.shape,
        dtype="scores fp32",
        device=size.device,
        inputs=inputs,
        providers={"eager, NumPy per prompt": eager, **ours(operator, size.device)},
        gate=gate,
        bytes_moved=4 * samples * turns * (rewards + 1) + 8 * samples,
    )
