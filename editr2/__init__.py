"""Reinforcement learning of multi-turn image editors. `from editr2 import ...` loads what is asked
for, when asked."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Config": "editr2.config",
    "preset_config": "editr2.config",
    "replace_nested": "editr2.config",
    "Session": "editr2.sessions",
    "Turn": "editr2.sessions",
    "load_sessions": "editr2.sessions",
    "save_sessions": "editr2.sessions",
    "Policy": "editr2.policies.base",
    "Intent": "editr2.policies.base",
    "UnifiedPolicy": "editr2.policies.unified.policy",
    "Reward": "editr2.rewards.base",
    "Score": "editr2.rewards.base",
    "WorldReward": "editr2.rewards.world",
    "UserError": "editr2.errors",
    "build_report": "editr2.report",
    "train": "editr2.training",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'editr2' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
