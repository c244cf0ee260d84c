"""Reinforcement learning of multi-turn image editors.

`from editr2 import ...` loads what is asked for, when asked; what is public is `__all__`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Config",
    "Editor",
    "Intent",
    "Live",
    "Policy",
    "Reward",
    "Score",
    "Session",
    "Step",
    "Turn",
    "UnifiedPolicy",
    "UserError",
    "WorldReward",
    "build_report",
    "edit",
    "load_sessions",
    "preset_config",
    "replace_nested",
    "save_sessions",
    "train",
]

if TYPE_CHECKING:  # the names with their types; below is how they come
    __version__: str
    from editr2.config import Config, preset_config, replace_nested
    from editr2.editing import Editor, Step, edit
    from editr2.errors import UserError
    from editr2.policies.base import Intent, Policy
    from editr2.policies.unified.policy import UnifiedPolicy
    from editr2.report import build_report
    from editr2.rewards.base import Reward, Score
    from editr2.rewards.world import WorldReward
    from editr2.sessions import Session, Turn, load_sessions, save_sessions
    from editr2.training import train
    from editr2.watch.live import Live
else:
    _HOMES = {
        "editr2.config": ("Config", "preset_config", "replace_nested"),
        "editr2.editing": ("Editor", "Step", "edit"),
        "editr2.errors": ("UserError",),
        "editr2.policies.base": ("Intent", "Policy"),
        "editr2.policies.unified.policy": ("UnifiedPolicy",),
        "editr2.report": ("build_report",),
        "editr2.rewards.base": ("Reward", "Score"),
        "editr2.rewards.world": ("WorldReward",),
        "editr2.sessions": ("Session", "Turn", "load_sessions", "save_sessions"),
        "editr2.training": ("train",),
        "editr2.watch.live": ("Live",),
    }

    def __getattr__(name: str) -> Any:
        if name == "__version__":  # of the installed package, as pyproject.toml had it
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("editr2")
            except PackageNotFoundError:  # a source tree on the path, which says no version
                return "0+unknown"
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
