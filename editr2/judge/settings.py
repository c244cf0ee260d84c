"""The settings of a trial: those of a run, and another reward to compare with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from editr2.config import Config, RewardConfig, RewardUse
from editr2.config.fields import setting
from editr2.config.rules import reward_problems, settings_problems


@dataclass(frozen=True)
class AgainstConfig(RewardConfig):
    __doc__ = RewardConfig.__doc__

    @property
    def given(self) -> bool:
        return self != AgainstConfig()

    @property
    def uses(self) -> tuple[tuple[str, RewardUse], ...]:
        return tuple((_renamed(at), use) for at, use in super().uses)


@dataclass(frozen=True)
class JudgeConfig(Config):
    """One trial of a reward.

    Args:
        seed: what a judge samples with follows from it.
        out: folder for scores.jsonl, judge.html and judges.jsonl, the record of every answer.
    """

    out: str = setting("runs/judge", path=True, what="a folder")
    against: AgainstConfig = field(default_factory=AgainstConfig)


def judge_problems(config: JudgeConfig) -> Iterator[str]:
    """One line for each rule that is broken."""
    yield from settings_problems(config, "judge")
    yield from against_problems(config.against)


def against_problems(against: AgainstConfig) -> Iterator[str]:
    """The same of the reward that another is held against."""
    yield from map(_renamed, reward_problems(against))


def _renamed(text: str) -> str:
    """What is said of `reward.…`, of `against.…`."""
    return re.sub(r"\breward(?=\.|$)", "against", text)
