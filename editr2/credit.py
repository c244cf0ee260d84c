"""Scores to advantages: one call of `group_advantage` under a named preset."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from editr2.config import CreditConfig
from editr2.errors import ConfigError
from editr2.rewards.base import Scores, weight_vector
from editr2_kernels import CREDIT_PRESETS, CreditOptions, GroupAdvantage, group_advantage


def credit_options(config: CreditConfig) -> CreditOptions:
    """The options of a preset; raises `ConfigError` for an unknown name."""
    if config.preset not in CREDIT_PRESETS:
        raise ConfigError(f"credit.preset: {config.preset!r} (accepted: {', '.join(sorted(CREDIT_PRESETS))})")
    options = CREDIT_PRESETS[config.preset]
    if config.baseline not in (None, "session", "session_turn"):
        raise ConfigError(f"credit.baseline: {config.baseline!r} (accepted: session, session_turn or none)")
    if config.baseline is not None and options.aggregate == "none":
        options = dataclasses.replace(options, baseline=cast(Any, config.baseline))
    if config.clip is not None:
        options = dataclasses.replace(options, clip=config.clip)
    return options


def assign_credit(scores: Scores, group: Tensor, config: CreditConfig) -> GroupAdvantage:
    """Advantages [N, T] and the mask [N, T] of turns that train, of *all* rollouts of an iteration.

    group: int64 [N], equal for siblings. Turns without a score, or after a failed instruction where the preset filters,
    have advantage exactly 0 and mask False.
    """
    return group_advantage(
        scores.values,
        group,
        credit_options(config),
        weights=weight_vector(scores.names, config.weights),
        mask=scores.present,
    )


def weighted_reward(scores: Scores, weights: dict[str, float]) -> Tensor:
    """r = sum_k w_k s_k, float32 [N, T]; NaN where a turn has no score."""
    reward = (scores.values * weight_vector(scores.names, weights)).sum(-1)
    return torch.where(scores.present, reward, torch.nan)
