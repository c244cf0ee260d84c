"""From settings to a reward."""

from __future__ import annotations

import importlib
import inspect
from typing import cast

from editr2.config import RewardConfig
from editr2.errors import ConfigError
from editr2.rewards.base import Reward
from editr2.rewards.world import WorldReward


def load_reward(config: RewardConfig) -> Reward:
    """The configured reward. Raises `ConfigError` naming `reward.function`."""
    if config.function is None:
        return WorldReward()
    module, _, name = config.function.partition(":")
    if not module or not name:
        raise ConfigError(f"reward.function: {config.function!r} (accepted: package.module:name)")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.function: {config.function!r}: {error}") from error
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "names")):
        found = found()
    if not callable(found) or not hasattr(found, "names"):
        raise ConfigError(
            f"reward.function: {config.function!r} is a {type(found).__name__} (accepted: a Reward, callable and with "
            "names, or something to call without arguments that returns one)"
        )
    return cast(Reward, found)
