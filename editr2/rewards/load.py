"""From settings to a reward."""

from __future__ import annotations

from editr2.config import RewardConfig
from editr2.config.plugins import resolve
from editr2.rewards.adapt import CheckedReward, adapt
from editr2.rewards.world import WorldReward


def load_reward(config: RewardConfig) -> CheckedReward:
    """The configured reward. A module is looked for in the working folder, too, after everything
    that is installed.

    Raises `ConfigError` naming `reward.function`, whatever goes wrong in the module or its
    constructor.
    """
    if config.function is None:
        return adapt(WorldReward(), timeout=config.timeout)
    given = resolve("reward.function", config.function)
    return adapt(given, title=f"reward.function: {config.function!r}", timeout=config.timeout)
