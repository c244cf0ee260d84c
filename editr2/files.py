"""Small files: written whole, so that what has its name was written to the end, and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editr2.errors import DataError


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
