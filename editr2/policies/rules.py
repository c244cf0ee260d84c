"""What a run's settings demand of its editor, which is asked without being loaded: the class that
`policy.model` names knows what it can follow."""

from __future__ import annotations

from collections.abc import Iterator

from editr2.config import Config, PolicyConfig, settings_problems
from editr2.config.fields import mended, normalised
from editr2.config.rules import TRAINS, Command, completed
from editr2.errors import ConfigError
from editr2.policies.configured import policy_class


def check_config(config: Config, command: Command = "train") -> Config:
    """The configuration with every value as the converter gives it and, where it trains, all
    options of its loss. Raises `ConfigError` with the first of `config_problems`."""
    for problem in config_problems(config, command):
        raise ConfigError(problem)
    config = normalised(config)
    return completed(config) if command in TRAINS else config


def config_problems(config: Config, command: Command = "train") -> Iterator[str]:
    """One line, naming the field, for each rule that is broken and needs neither data nor weights:
    `settings_problems`, then what the editor cannot follow."""
    yield from settings_problems(config, command)
    yield from _model_problems(mended(config), command)


def group_problem(group: int | None, processes: int) -> str | None:
    """What is wrong with `policy.shard_group` for so many processes that share weights out."""
    if group is None or processes % group == 0:
        return None
    fits = ", ".join(str(n) for n in range(2, processes + 1) if processes % n == 0)
    return (
        f"policy.shard_group: {group} (accepted with {processes} processes: a divisor of them: "
        f"{fits})"
    )


def policy_problems(config: PolicyConfig, trains: bool = True) -> Iterator[str]:
    """One line for each rule that the policy's settings break among themselves. trains: whether it
    will."""
    try:
        kind = policy_class(config.model)
    except ConfigError as error:
        yield str(error)
        return
    yield from kind.problems(config, trains)


def _model_problems(config: Config, command: Command) -> Iterator[str]:
    p, data, trains = config.policy, config.data, command in TRAINS
    try:
        kind = policy_class(p.model)
    except ConfigError as error:
        yield str(error)
        return
    yield from kind.problems(p, trains)
    # Evaluation looks at data.heldout where there is one, and at data.path only if not.
    if not kind.edits_the_world and data.path is None and (trains or data.heldout is None):
        yield (
            f"data.path: none (accepted with policy.model {p.model}: a sessions.jsonl; the shapes "
            f"world's images are "
            "too small for it)"
        )
    if trains and p.shard and config.rollout.capture != "off":
        yield (
            f"rollout.capture: {config.rollout.capture} (accepted with policy.shard: off; "
            f"gathering waits)"
        )
