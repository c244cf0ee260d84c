"""The options of `group_advantage`, and the published combinations of them by name.

What each option does to the numbers is in the docstring of `group_advantage`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from . import _checks

AGGREGATES = ("none", "mean", "last", "product", "prefix")
FUSIONS = ("reward", "advantage", "gdpo")
BASELINES = ("session", "session_turn")
STDS = ("group", "global", "none")
EPS_MODES = ("add", "floor")


@dataclass(frozen=True)
class CreditOptions:
    """How scores become advantages; the module docstring has the arithmetic.

    aggregate: over turns. "none" keeps one value a turn; "prefix" is the mean over turns of the
        running products.
    fusion: weigh rewards before normalising ("reward"); normalise each, then weigh ("advantage");
        or that and then normalise the result over the whole batch ("gdpo").
    baseline: whether all turns of a group share one mean; "session_turn" needs aggregate "none".
    std: divide by the std of the set ("group"), of all counted values ("global"), or not at all
        ("none").
    unbiased: divide the squared sum by count - 1 instead of count; a single value has std 0.
    eps: added to the std ("add"), or the least it may be ("floor").
    eps_mode: which of the two.
    clip: bound on |advantage|, last; None for none.
    broadcast: put the aggregated advantage on every turn; true exactly when aggregate is not
        "none".
    filter_reward: index k of a reward; once scores[i, t, k] == 0, the later turns of sample i do
        not train.
    filter_in_statistics: whether those turns still count in mean and std (aggregate
    "none" only).
    min_std: drop every set whose weighted reward has a std of this or less, 0.0 those of equal
        values; None keeps all.
    max_mean: drop every set whose weighted reward has a mean of this or more; None keeps all. What
        is dropped has advantage 0 and mask False, and counts in no statistic.
    """

    aggregate: Literal["none", "mean", "last", "product", "prefix"] = "none"
    fusion: Literal["reward", "advantage", "gdpo"] = "reward"
    baseline: Literal["session", "session_turn"] = "session"
    std: Literal["group", "global", "none"] = "group"
    unbiased: bool = False
    eps: float = 1e-4
    clip: float | None = 5.0
    broadcast: bool = False
    filter_reward: int | None = None
    filter_in_statistics: bool = False
    eps_mode: Literal["add", "floor"] = "add"
    min_std: float | None = None
    max_mean: float | None = None

    def __post_init__(self) -> None:
        for name, accepted in (
            ("aggregate", AGGREGATES),
            ("fusion", FUSIONS),
            ("baseline", BASELINES),
            ("std", STDS),
            ("eps_mode", EPS_MODES),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        _checks.not_negative("eps", self.eps)
        if self.clip is not None:
            _checks.positive("clip", self.clip)
        if self.broadcast != (self.aggregate != "none"):
            raise ValueError(
                f"broadcast must be {self.aggregate != 'none'} with aggregate {self.aggregate!r} "
                f"(an aggregated advantage goes to every turn, a per-turn one to its own), got "
                f"{self.broadcast}"
            )
        if self.aggregate != "none" and self.baseline == "session_turn":
            raise ValueError(
                f"baseline 'session_turn' needs aggregate 'none', got aggregate {self.aggregate!r}"
            )
        if self.aggregate != "none" and self.filter_in_statistics:
            raise ValueError(
                f"filter_in_statistics needs aggregate 'none', got aggregate {self.aggregate!r}"
            )
        if self.filter_reward is not None and self.filter_reward < 0:
            raise ValueError(
                f"filter_reward must be None or an index >= 0, got {self.filter_reward}"
            )
        if self.min_std is not None:
            _checks.not_negative("min_std", self.min_std)
        if self.max_mean is not None:
            _checks.number("max_mean", self.max_mean)
            if not math.isfinite(self.max_mean):
                raise ValueError(f"max_mean must be None or finite, got {self.max_mean}")


_UNBIASED = CreditOptions(baseline="session_turn", unbiased=True, eps=1e-8)
CREDIT_PRESETS: dict[str, CreditOptions] = {
    "edit-r2": CreditOptions(std="global", filter_reward=0),
    "edit-r2-released": CreditOptions(std="global", filter_reward=0, filter_in_statistics=True),
    "mt-editflow": CreditOptions(aggregate="mean", fusion="advantage", broadcast=True),
    "flow-grpo": CreditOptions(baseline="session_turn"),
    "dance-grpo": _UNBIASED,
    "mixgrpo": replace(_UNBIASED, fusion="advantage"),
    "flow-factory": CreditOptions(
        baseline="session_turn", std="global", eps=1e-6, eps_mode="floor"
    ),
    "gdpo": CreditOptions(fusion="gdpo", baseline="session_turn", eps=1e-6, eps_mode="floor"),
    "verl-omni": CreditOptions(baseline="session_turn", std="global", unbiased=True),
    "dr-grpo": CreditOptions(baseline="session_turn", std="none"),
    "pku": CreditOptions(baseline="session_turn", min_std=0.05, max_mean=0.9),
}


def workspace_of(options: CreditOptions, scores: Tensor) -> Tensor:
    """Scratch of a GPU backend, int32, for what needs the whole batch; empty where nothing does.

    First a counter, 0, and three words that keep the rest aligned; for the global std then each
    column's differences from the mean of the set, as fp32.
    """
    samples, turns, rewards = scores.shape
    size = 4 if options.fusion == "gdpo" or options.std == "global" else 0
    if options.std == "global":
        units = samples if options.aggregate != "none" else samples * turns
        size += units * (1 if options.fusion == "reward" else rewards)
    workspace = torch.empty(size, dtype=torch.int32, device=scores.device)
    workspace[:1] = 0
    return workspace
