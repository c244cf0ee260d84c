"""Documented names that stand elsewhere now.

A public name is kept for one minor version after it moved: it works, and a `DeprecationWarning` of
one line says what it is called now and which version no longer has the old one.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

MOVED: dict[str, tuple[str, str]] = {
    # The README.md that 0.1 wrote into an export says so.
    "editr2.policies.unified.UnifiedPolicy": ("editr2.UnifiedPolicy", "0.3"),
}
"""Old name -> (its name now, the first version without the old one)."""


def moved(module: str, name: str) -> Any:
    """What `module.name` was, for the module's `__getattr__`. Raises AttributeError where it never
    was anything."""
    old = f"{module}.{name}"
    if old not in MOVED:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new, until = MOVED[old]
    warnings.warn(
        f"{old} is {new} now (the old name goes in editr2 {until})",
        DeprecationWarning,
        stacklevel=3,  # whoever asked that module for it
    )
    home, _, last = new.rpartition(".")
    return getattr(importlib.import_module(home), last)
