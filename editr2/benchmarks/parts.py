"""What the processes have of a file, on its way there.

Each appends to a file of its own, `STEM.<index>.part.jsonl`, what belongs together with one write,
so a kill loses nothing that was finished. The first line says what the others are of, a digest;
files of another are left aside.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editr2.errors import UserError
from editr2.files import json_line, write_lines

_OF = "of"


class Parts:
    """Those of `file`. digest: of everything that the records depend on."""

    def __init__(self, file: Path, digest: str) -> None:
        self.file, self._digest = file, digest
        self._begun = 0

    @property
    def files(self) -> list[Path]:
        """Of this digest or another."""
        return sorted(self.file.parent.glob(f"{self.file.stem}.[0-9]*.part.jsonl"))

    def head(self, **more: Any) -> str:
        """The line that says what a file is of."""
        return json_line({_OF: self._digest, **more})

    def headed(self, file: Path) -> dict[str, Any] | None:
        """The head of a file, where that is of this digest."""
        try:
            with file.open("rb") as stream:
                head = _object(stream.readline())
        except OSError:
            return None
        return head if head is not None and head.get(_OF) == self._digest else None

    def records(self) -> Iterator[dict[str, Any]]:
        """File by file, without lines that a kill tore."""
        for part in self.files:
            if self.headed(part) is not None:
                yield from objects(part, behind=1)

    def begin(self, records: Iterable[Mapping[str, Any]]) -> None:
        """There are none but these from here on. On one process, before the others append."""
        first = self._part(0)
        with writing(self.file):
            first.parent.mkdir(parents=True, exist_ok=True)
            write_lines(first, [self.head(), *map(json_line, records)])
            self._begun = first.stat().st_size
            for part in self.files:
                if part != first:
                    part.unlink()

    def append(self, index: int, records: Iterable[Mapping[str, Any]]) -> None:
        """On the process `index`, after `begin` on the first."""
        lines = "".join(map(json_line, records))
        with writing(self.file):
            part = os.open(self._part(index), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                head = "" if os.fstat(part).st_size else self.head()
                said = (head + lines).encode("utf-8", "backslashreplace")
                if os.write(part, said) < len(said):  # what still had room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(part)

    def appended(self) -> Iterator[bytes]:
        """What all processes appended since `begin`, file by file."""
        for part in self.files:
            try:
                yield part.read_bytes()[self._begun if part == self._part(0) else 0 :]
            except FileNotFoundError:
                continue

    def drop(self) -> None:
        with writing(self.file):
            for part in self.files:
                part.unlink()

    def _part(self, index: int) -> Path:
        return self.file.with_name(f"{self.file.stem}.{index}.part.jsonl")


def objects(file: Path, behind: int = 0) -> Iterator[dict[str, Any]]:
    """Of a JSON Lines file behind so many lines; what is none is passed over."""
    for line in file.read_bytes().split(b"\n")[behind:]:
        record = _object(line)
        if record is not None:
            yield record


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """file: of scores, as errors call it. Raises `UserError` where there is no room."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or file}: {error.strerror or error} (accepted: a folder with room "
            f"that can be written into; it holds the scores)"
        ) from error
