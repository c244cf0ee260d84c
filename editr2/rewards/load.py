"""From settings to a reward."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from editr2.config import RewardConfig
from editr2.errors import ConfigError
from editr2.rewards.adapt import CheckedReward, adapt, process_kept, told
from editr2.rewards.world import WorldReward


def load_reward(config: RewardConfig) -> CheckedReward:
    """The configured reward. A module is looked for in the working folder, too, after everything
    that is installed.

    Raises `ConfigError` naming `reward.function`, whatever goes wrong in the module or its
    constructor.
    """
    if config.function is None:
        return adapt(WorldReward(), timeout=config.timeout)
    module, _, name = config.function.partition(":")
    title = f"reward.function: {config.function!r}"
    if not module or not name or module.startswith("."):
        raise ConfigError(f"{title} (accepted: package.module:name)")
    try:
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())  # the console script's path lacks it
        with process_kept():
            found = importlib.import_module(module)
        given = getattr(found, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"{title}: importing {module} raised {told(error)}") from error
    if given is None:
        near = difflib.get_close_matches(name, vars(found), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{title}: module {module} has no {name!r}{hint}")
    return adapt(given, title=title, timeout=config.timeout)
