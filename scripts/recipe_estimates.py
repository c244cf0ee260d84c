"""Writes what `editr2 check` prints into the header of every recipe: python
scripts/recipe_estimates.py

The command stands in the recipe's own header, in the line that begins with "#   editr2 check".
"""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

from editr2.cli.main import main

ROOT = Path(__file__).parent.parent
MARK = "# What it printed:"


def command(recipe: str) -> list[str]:
    """The arguments of the check that the header names."""
    (line,) = [line for line in recipe.splitlines() if line.startswith("#   editr2 check ")]
    return shlex.split(line.removeprefix("#   editr2 "))


def printed(recipe: str) -> list[str]:
    """What the check prints now. Raises RuntimeError where it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if code := main(command(recipe)):
            raise RuntimeError(f"{command(recipe)}: exit status {code}")
    return out.getvalue().splitlines()


def recorded(recipe: str) -> list[str]:
    """What the header says it printed."""
    lines = recipe.splitlines()
    start = lines.index(MARK) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("#"))
    return [line.removeprefix("#").removeprefix("   ") for line in lines[start:end]]


def rewritten(recipe: str) -> str:
    """The recipe with a new estimate, behind its header's text."""
    lines = recipe.splitlines()
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    kept = lines[: lines.index(MARK) - 1] if MARK in lines[:head] else lines[:head]
    estimate = [f"#   {line}".rstrip() for line in printed(recipe)]
    return "\n".join([*kept, "#", MARK, "#", *estimate, *lines[head:]]) + "\n"


if __name__ == "__main__":
    for path in sorted((ROOT / "editr2" / "recipes").glob("*.yaml")):
        path.write_text(rewritten(path.read_text()))
        print(path)
