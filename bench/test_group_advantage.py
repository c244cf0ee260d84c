"""group_advantage against the loop over prompts that trainers normalise rewards with.

The baseline is the per-prompt tracker as it is commonly written, in NumPy and float64: for each reward, for each unique
prompt, a mask by comparing strings, then mean, std and division. It has no compiled form. Ours is timed as a caller
sees it: argument checks, dispatch and all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import editr2_kernels

SHAPES = [(48, 24, 3, 2), (16, 6, 3, 3)]  # groups, siblings, turns, rewards; the second is Edit-R2's own
OPTIONS = editr2_kernels.CreditOptions(fusion="advantage", baseline="session_turn")


def per_prompt(prompts: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N] prompts and [N, T, K] scores -> [N, T] advantages: population std + 1e-4, clipped at 5."""
    total = np.zeros(scores.shape[:2])
    for k, weight in enumerate(weights):
        rewards = scores[:, :, k].astype(np.float64)
        for prompt in np.unique(prompts):
            mask = prompts == prompt
            group = rewards[mask]
            total[mask] += weight * (group - group.mean(axis=0)) / (group.std(axis=0) + 1e-4)
    return np.clip(total, -5, 5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_group_advantage(shape: tuple[int, ...], compare: Callable[..., Any]) -> None:
    groups, siblings, turns, rewards = shape
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(groups * siblings, turns, rewards, generator=generator)
    group = torch.arange(groups).repeat_interleave(siblings)
    prompts = np.array([f"session {g:03d}: make the mug on the left table green" for g in group.tolist()])
    weights = torch.full((rewards,), 1 / rewards)
    arrays = scores.numpy(), weights.numpy()

    def ours() -> editr2_kernels.GroupAdvantage:
        return editr2_kernels.group_advantage(scores, group, OPTIONS, weights=weights, backend="cpu")

    # Gate. fp32 against float64: a few roundings of values of size 1, divided by a std of about 0.3.
    first = ours().advantage
    error = np.abs(first.numpy() - per_prompt(prompts, *arrays)).max().item()
    assert error < 1e-5

    compare(
        op="group_advantage",
        mode="forward",
        shape=shape,
        dtype="scores fp32",
        providers={
            "eager, NumPy per prompt": lambda: per_prompt(prompts, *arrays),
            "editr2 cpu": ours,
        },
        max_error={"editr2 cpu": error},
    )
    assert torch.equal(ours().advantage, first)
