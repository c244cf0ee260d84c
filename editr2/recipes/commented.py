"""Settings as a YAML file with comments: what each of them is, in the words of its dataclass."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import yaml

from editr2.config import Config
from editr2.config.fields import leaves, plain
from editr2.recipes.mapped import Settings

WIDTH = 100
_LONGEST = 260
"""Of a comment; behind that a sentence ends it."""


def commented(
    settings: Settings,
    told: Mapping[str, str],
    head: Iterable[str],
    origin: Mapping[str, str] | None = None,
) -> str:
    """A YAML file.

    Args:
        settings: by dotted key of `Config`, each a leaf of it.
        told: what each setting is, by dotted key.
        head: lines of its header.
        origin: what a setting was where it comes from.
    """
    lines = [f"# {_kept_in(line)}".rstrip() for line in head] + [""]
    section = ""
    for key, slot in leaves(Config):
        if key not in settings:
            continue
        group, _, name = key.rpartition(".")
        lines += _opened(section, group)
        section = group
        indent = "  " * (group.count(".") + bool(group))
        was = (origin or {}).get(key)
        text = _short(told.get(key, ""))
        text += _also(slot.accepts.among, text, key) + (f" Was {was}." if was else "")
        lines += _comment(text, indent)
        lines.append(f"{indent}{name}: {_value(settings[key])}")
    return "\n".join(lines) + "\n"


PAGES = {"reward.name": "docs/judges.md"}
"""Where more is said of what a table has."""


def _also(among: Callable[[], Iterable[str]] | None, text: str, key: str) -> str:
    """The names of a setting's table that its text leaves out."""
    said = set(re.findall(r"[\w+.-]*\w", text))
    others = ", ".join(name for name in (among() if among else ()) if name not in said)
    page = f" ({PAGES[key]})" if key in PAGES else ""
    return f" Also {others}{page}." if others else ""


def _opened(before: str, group: str) -> Iterator[str]:
    """The headings of sections that begin."""
    names, known = group.split("."), before.split(".")
    for depth, name in enumerate(names if group else []):
        if names[: depth + 1] != known[: depth + 1]:
            yield from [""] * (depth == 0)
            yield f"{'  ' * depth}{name}:"


def _kept_in(line: str) -> str:
    """What a comment may hold: its indent, and no character that would end it."""
    return line if line.isprintable() else repr(line)[1:-1]


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        _kept_in(text),
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short(text: str) -> str:
    """Its sentences up to a length, the first at least, with a stop."""
    made = ""
    for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", text):
        if made and len(made) + len(sentence) > _LONGEST:
            break
        made = f"{made} {sentence}".strip()
    return f"{made.rstrip('.')}." if made else ""


def _value(value: Any) -> str:
    """On one line."""
    text: str = yaml.safe_dump(
        plain(value), default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.strip().removesuffix("...").strip()
