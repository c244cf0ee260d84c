"""`editr2.train`: a run and the report at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editr2.config import Config
from editr2.policies.base import Policy
from editr2.report import build_report
from editr2.rewards.base import GivenReward
from editr2.rl import loop


def train(
    config: Config,
    *,
    policy: Policy | None = None,
    reward: GivenReward | None = None,
    profile: bool = False,
    resume_anyway: Sequence[str] = (),
) -> Path:
    """Trains as configured and returns the run's folder, with its report; an unfinished run there
    is resumed.

    config: `preset_config`, `replace_nested`, or the dataclass itself. policy, reward: in place of
    the configured ones (docs/rewards.md has the forms of a reward). profile: also prints the
    seconds of an iteration by phase. resume_anyway: what may differ from the run that is resumed,
    by name: settings, sections of them, or sessions, heldout, weights and reward.

    Raises `UserError` subclasses for bad settings, data, checkpoints, a run of something else or
    one that is at work in the folder, too many failed scores, a ratio that is not 1 on-policy, or a
    NaN; and `Stopped`, once what is done is saved, after Ctrl-C, SIGTERM or SIGHUP.
    """
    return loop.train(
        config,
        policy=policy,
        reward=reward,
        profile=profile,
        resume_anyway=resume_anyway,
        report=build_report,
    )
