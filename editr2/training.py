"""`editr2.train`: a run and the report at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from editr2.config import Config
from editr2.errors import ConfigError
from editr2.policies.base import Policy
from editr2.report import build_report
from editr2.rewards.base import GivenReward
from editr2.rl import loop
from editr2.run.processes import Processes


def train(
    config: Config,
    *,
    policy: Policy | None = None,
    reward: GivenReward | None = None,
    profile: bool = False,
    resume_anyway: Sequence[str] = (),
    observer: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Trains as configured and returns the run's folder, with its report; an unfinished run there
    is resumed.

    config: `preset_config`, `replace_nested`, or the dataclass itself. policy, reward: in place of
    the configured ones (docs/rewards.md has the forms of a reward). profile: also prints the
    seconds of an iteration by phase. resume_anyway: what may differ from the run that is resumed,
    by name: settings, sections of them, or sessions, heldout, weights and reward. observer: called
    on the first process with every row of `metrics.jsonl` (docs/watching.md), those of before where
    a run goes on included; `editr2.Live(config)` draws them in a notebook. One that raises is told
    and called no more.

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
        settle=partial(_settled, insist=resume_anyway),
        report=build_report,
        observer=observer,
    )


def _settled(
    config: Config, processes: Processes, given: bool, insist: Sequence[str]
) -> tuple[Config, list[str]]:
    """The settings without `auto`: as the run in the folder recorded them (unless they are
    insisted on, by name or section), or by the estimate for the device at hand. Raises the
    `UserError` of what cannot be estimated."""
    from editr2.check import settled_for_device

    p, cuda = config.policy, processes.device.type == "cuda"
    if given:  # whoever made it has settled how it runs
        if cuda and config.train.micro_batch == "auto":
            raise ConfigError(
                "train.micro_batch: auto (accepted with a policy that was given ready made: a "
                "number or none; what it takes is not known)"
            )
        off: dict[str, Any] = {n: "off" for n in _OF_A_POLICY if getattr(p, n) == "auto"}
        config = replace(config, policy=replace(p, **off))
    return settled_for_device(config, processes.device, processes.count, insist)


_OF_A_POLICY = ("gradient_checkpointing", "compile")
