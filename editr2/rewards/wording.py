"""The prompts of rewards: files of `prompts/NAME/` here, which `options.prompts` replaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from editr2 import wording
from editr2.wording import Place, Prompts

__all__ = ["FOLDER", "Place", "Prompts", "prompts_of"]

FOLDER = Path(__file__).parent / "prompts"


def prompts_of(
    name: str,
    given: str | None,
    *,
    places: Mapping[str, Place] | None = None,
    fields: Mapping[str, str] | None = None,
) -> Prompts:
    """As `wording.prompts_of`, of the folder of this name."""
    return wording.prompts_of(FOLDER / name, given, places=places, fields=fields)
