"""From settings to a reward."""

from __future__ import annotations

from editr2.config import RewardConfig
from editr2.config.plugins import resolve
from editr2.config.rules import reward_problem
from editr2.errors import ConfigError
from editr2.rewards.adapt import CheckedReward, adapt
from editr2.rewards.table import REWARDS, WORLD


def named_reward(config: RewardConfig) -> tuple[str, str]:
    """The setting that names the reward, and what it says: the world's verifiers where neither
    does."""
    if config.function is not None:
        return "reward.function", config.function
    return "reward.name", WORLD if config.name is None else config.name


def load_reward(config: RewardConfig) -> CheckedReward:
    """The configured reward. A module is looked for in the working folder, too, after everything
    that is installed.

    Raises `ConfigError` naming the setting, whatever goes wrong in the module or its constructor.
    """
    if problem := reward_problem(config):
        raise ConfigError(problem)
    key, name = named_reward(config)
    table, what = (REWARDS, "Class") if key == "reward.name" else ({}, "name")
    given = resolve(key, name, table, what=what)
    return adapt(given, title=f"{key}: {name!r}", timeout=config.timeout)
