"""Scores to advantages: `group_advantage` under a named preset and the settings' own changes to
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editr2.config import CreditConfig
from editr2.errors import ConfigError, one_line
from editr2.rewards.base import NOT_APPLICABLE, Scores, weight_vector
from editr2_kernels import CREDIT_PRESETS, CreditOptions, GroupAdvantage, group_advantage

FILTER_REWARD = "IF"  # a turn with none of it failed, and what follows is not the editor's fault

_AGGREGATES = {
    "per-turn": "none",
    "mean": "mean",
    "last": "last",
    "product": "product",
    "prefix": "prefix",
}
_STDS = {"group": "group", "global": "global", "off": "none"}


def _choice(name: str, value: str, accepted: Any) -> Any:
    if value not in accepted:
        raise ConfigError(f"credit.{name}: {value!r} (accepted: {', '.join(accepted)} or none)")
    return accepted[value] if isinstance(accepted, dict) else value


def credit_options(
    config: CreditConfig, names: tuple[str, ...] = ("IF", "CC", "GA")
) -> CreditOptions:
    """The options of a preset with the settings' changes, for rewards `names`; `ConfigError` names
    a bad field."""
    if config.preset not in CREDIT_PRESETS:
        raise ConfigError(
            f"credit.preset: {config.preset!r} (accepted: {', '.join(sorted(CREDIT_PRESETS))})"
        )
    options = CREDIT_PRESETS[config.preset]
    changes: dict[str, Any] = {}
    if config.aggregate is not None:
        changes["aggregate"] = _choice("aggregate", config.aggregate, _AGGREGATES)
        changes["broadcast"] = changes["aggregate"] != "none"
    per_turn = changes.get("aggregate", options.aggregate) == "none"
    if config.baseline is not None:
        baseline = _choice("baseline", config.baseline, ("session", "session_turn"))
        changes["baseline"] = baseline if per_turn else "session"
    elif not per_turn:
        changes["baseline"] = "session"
    if config.fusion is not None:
        changes["fusion"] = _choice("fusion", config.fusion, ("reward", "advantage", "gdpo"))
    if config.std is not None:
        changes["std"] = _choice("std", config.std, _STDS)
    if config.clip is not None:
        changes["clip"] = config.clip
    filtered = config.filter if config.filter is not None else filters(config, names)
    if filtered and FILTER_REWARD not in names:
        raise ConfigError(
            f"credit.filter: true needs a reward named {FILTER_REWARD} (the rewards: "
            f"{', '.join(names)})"
        )
    changes["filter_reward"] = names.index(FILTER_REWARD) if filtered else None
    if not filtered or not per_turn:
        changes["filter_in_statistics"] = False
    try:
        return dataclasses.replace(options, **changes)
    except ValueError as error:
        raise ConfigError(
            f"credit: {one_line(error)} (accepted: other fields or another preset)"
        ) from error


def filters(config: CreditConfig, names: Sequence[str]) -> bool:
    """Whether a preset's filter is on for rewards `names`; without one named IF it is not."""
    return CREDIT_PRESETS[config.preset].filter_reward is not None and FILTER_REWARD in names


def credit_notes(config: CreditConfig, names: Sequence[str]) -> list[str]:
    """What a run should say of its credit: a line where the preset's filter has switched itself
    off."""
    off = config.filter is None and CREDIT_PRESETS[config.preset].filter_reward is not None
    if not off or filters(config, names):
        return []
    return [
        f"credit: no reward is named {FILTER_REWARD} (the rewards: {', '.join(names)}), so the "
        f"filter of turns after a failed instruction is off"
    ]


def assign_credit(scores: Scores, group: Tensor, config: CreditConfig) -> GroupAdvantage:
    """Advantages [N, T] and the mask [N, T] of turns that train, of *all* rollouts of an iteration.

    group: int64 [N], equal for siblings. Turns without a score, or after a failed instruction where
    the credit filters, have advantage exactly 0 and mask False. A reward that does not apply to a
    turn leaves it to the others, and fails nothing. Credit over whole trajectories is given among
    sessions of one length at a time: a mean over turns that do not exist would be none.
    """
    options = credit_options(config, scores.names)
    weights = weight_vector(scores.names, config.weights)
    lengths = scores.expected.sum(1)
    if options.aggregate == "none" or len(lengths.unique()) == 1:
        width = scores.values.shape[1] if options.aggregate == "none" else int(lengths[0])
        parts = [(torch.arange(len(group)), width)]
    else:
        parts = [((lengths == n).nonzero()[:, 0], int(n)) for n in lengths.unique() if n > 0]
    unfailed, silent = scores.unfailed, scores.of_state(NOT_APPLICABLE)
    applies = ~silent if silent.any() else None
    advantage, mask = (
        torch.zeros_like(scores.present, dtype=torch.float32),
        torch.zeros_like(scores.present),
    )
    for samples, width in parts:
        part = group_advantage(
            scores.values[samples, :width],
            group[samples],
            options,
            weights=weights,
            mask=unfailed[samples, :width],
            applies=None if applies is None else applies[samples, :width],
        )
        advantage[samples, :width], mask[samples, :width] = part.advantage, part.mask
    return GroupAdvantage(advantage, mask)


def weighted_reward(scores: Scores, weights: dict[str, float]) -> Tensor:
    """r = sum_k w_k s_k, float32 [N, T], over the rewards that apply, whose weights grow in
    proportion until their sizes add up to what all of them do (as in `group_advantage`); NaN where
    a turn has no score, or none of a weight other than 0."""
    vector, scored = weight_vector(scores.names, weights), scores.scored
    heard = (vector.abs() * scored).sum(-1)
    share = torch.where(scored.all(-1), 1.0, vector.abs().sum() / heard)
    reward = (scores.values * vector).sum(-1) * share  # 0 * inf where only weights of 0 apply
    return torch.where(scores.present, reward, torch.nan)
