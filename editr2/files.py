"""Small files: written whole, so that what has its name was written to the end, and read."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editr2.errors import DataError, shown


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its name at the end. After an error or a kill
    `path` is as it was."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Whole, or not at all. lines: each with its end; half a surrogate pair, for which UTF-8 has no
    bytes, is written as an escape."""
    with in_place_of(path) as part:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)


def json_line(record: Mapping[str, Any]) -> str:
    """Of a JSON Lines file, with its end."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_object(path: Path, accepted: str) -> dict[str, Any]:
    """Of a JSON file. accepted: in place of one that is none. Raises DataError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error} (accepted: {accepted})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: no object (accepted: {accepted})")
    return found


RUN_FILES = ("metrics.jsonl", "config.yaml")
"""By either of them a folder is a run's."""


def runs_near(folder: Path) -> str:
    """`; did you mean A, B or C?` for a folder that is no run's: the runs in it, or, where it is
    not there, those of a name like its own; nothing where there are none. At most three."""
    try:
        if folder.is_dir():
            near = sorted(_runs_of(folder))
        else:
            beside = {path.name: path for path in _runs_of(folder.parent)}
            near = [beside[name] for name in difflib.get_close_matches(folder.name, beside, 3, 0.6)]
    except OSError:  # not ours to read
        return ""
    *first, last = [shown(path) for path in near[:3]] or [""]
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?" if last else ""


def _runs_of(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if any(os.path.isfile(path / name) for name in RUN_FILES):  # False of what is not ours
            yield path
