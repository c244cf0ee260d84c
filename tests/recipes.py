"""The recipes of CONTRIBUTING.md: a diff each, under its heading."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"

RECIPES: dict[str, str] = dict(
    re.findall(r"^### ([^\n]+)\n.*?^```diff\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
)
"""Heading -> diff."""


def files(diff: str) -> dict[str, tuple[int, int]]:
    """File -> lines (added, removed)."""
    parts = re.split(r"^diff --git a/(\S+) b/\S+\n", diff, flags=re.M)
    found = {}
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        body = part.split("@@", 1)[1]
        lines = body.splitlines()
        found[name] = (sum(x[:1] == "+" for x in lines), sum(x[:1] == "-" for x in lines))
    return found


def added(diff: str, name: str) -> str:
    """The text of a file that a diff adds."""
    part = diff.split(f"+++ b/{name}\n", 1)[1].split("\ndiff --git", 1)[0]
    return "".join(f"{line[1:]}\n" for line in part.splitlines() if line[:1] == "+")
