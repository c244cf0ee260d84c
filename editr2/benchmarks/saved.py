"""Scores on their way to `scores.jsonl`: what was judged so far, session by session.

Each process appends whole sessions to a file of its own, `scores.<index>.part.jsonl`, with one
write each, so a kill loses no finished session. The first line of such a file says what its scores
are of, a digest; those of another digest are left aside. A line of a session has its rows, and what
its images were when they were judged: where they were made again, it is judged again.

At the end all become `scores.jsonl`, in the order of the sessions, and `scores.of.json` says what
that is of. Parts go last, so at every moment one of them or the whole is there.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.benchmarks.rows import Row, read_rows, row_of, write_rows
from editr2.errors import DataError, UserError
from editr2.sessions.records import parse_object

_OF, _SESSION, _SEEN, _ROWS = "of", "session", "seen", "rows"


@dataclass(frozen=True)
class Judged:
    """A session. seen: a hash that tells its images from others. rows: of all that was expected of
    it."""

    seen: str
    rows: tuple[Row, ...]

    @property
    def failed(self) -> int:
        return sum(row.state == "failed" for row in self.rows)


class Saved:
    """The files beside `file`, the scores. digest: of everything that they depend on but the
    images."""

    def __init__(self, file: Path, digest: str) -> None:
        self.file, self._digest = file, digest
        self.of = file.with_name(f"{file.stem}.of.json")
        self._begun: tuple[Path, int] | None = None

    def known(self) -> dict[str, Judged]:
        """By the session's id; of one that was judged twice, what failed less."""
        known = self._whole()
        for part in self._parts():
            for name, judged in self._read(part):
                if name not in known or judged.failed <= known[name].failed:
                    known[name] = judged
        return known

    @property
    def whole(self) -> bool:
        """Whether `file` has everything that is known."""
        return not self._parts() and self._header(self.of) is not None and self.file.is_file()

    def begin(self, known: Mapping[str, Judged]) -> None:
        """Nothing but `known` is known from here on. On one process, before the others append."""
        first = self._part(0)
        with self._writing():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _replace(first, [_line({_OF: self._digest}), *map(_session_line, known.items())])
            self._begun = first, first.stat().st_size
            for part in self._parts():
                if part != first:
                    part.unlink()

    def append(self, index: int, name: str, judged: Judged) -> None:
        """A session, judged by the process `index`."""
        with self._writing():
            part = os.open(self._part(index), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                head = "" if os.fstat(part).st_size else _line({_OF: self._digest})
                said = (head + _session_line((name, judged))).encode(**_ENCODING)
                if os.write(part, said) < len(said):  # what still had room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(part)

    def finish(self, names: Sequence[str]) -> None:
        """Writes `file`, of these sessions in this order, and drops the parts. On one process, when
        all have appended."""
        known = self.known()
        with self._writing():
            self.of.unlink(missing_ok=True)
            write_rows(self.file, (row for name in names for row in known[name].rows))
            seen = {name: known[name].seen for name in names}
            _replace(self.of, [_line({_OF: self._digest, _SEEN: seen})])
            for part in self._parts():
                part.unlink()

    def appended(self) -> tuple[int, int]:
        """Sessions since `begin`, of all processes, and how many of their scores failed."""
        sessions = failed = 0
        for part in self._parts():
            at = self._begun[1] if self._begun and part == self._begun[0] else 0
            try:
                lines = part.read_bytes()[at:]
            except FileNotFoundError:
                continue
            sessions += lines.count(f'{{"{_SESSION}": '.encode())
            failed += lines.count(b'"state": "failed"')
        return sessions, failed

    def _part(self, index: int) -> Path:
        return self.file.with_name(f"{self.file.stem}.{index}.part.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.file.stem}.[0-9]*.part.jsonl"))

    def _whole(self) -> dict[str, Judged]:
        """Of `file`, where it is of this digest."""
        header = self._header(self.of)
        if header is None or not self.file.is_file():
            return {}
        rows: dict[str, list[Row]] = {}
        for row in read_rows(self.file):
            rows.setdefault(row.image, []).append(row)
        seen = header.get(_SEEN)
        seen = seen if isinstance(seen, dict) else {}
        return {name: Judged(str(seen.get(name)), tuple(of)) for name, of in rows.items()}

    def _read(self, part: Path) -> Iterator[tuple[str, Judged]]:
        """Without lines that a kill tore."""
        if self._header(part) is None:
            return
        for raw in part.read_bytes().split(b"\n")[1:]:
            try:
                record = parse_object(raw)
                rows = tuple(row_of(str(part), row) for row in record[_ROWS])
                yield str(record[_SESSION]), Judged(str(record[_SEEN]), rows)
            except (DataError, KeyError, TypeError, AttributeError):
                continue

    def _header(self, file: Path) -> dict[str, Any] | None:
        """The object of its first line, where that is of this digest."""
        try:
            with file.open("rb") as stream:
                header = parse_object(stream.readline())
        except (OSError, DataError):
            return None
        return header if header.get(_OF) == self._digest else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.file}: {error.strerror or error} (accepted: a folder "
                f"with room that can be written into; it holds the scores)"
            ) from error


def seen_in(file: Path) -> Any:
    """What the images of every session were when `file`, scores that are whole, was judged; None
    where nothing says so."""
    try:
        return parse_object(Saved(file, "").of.read_bytes()).get(_SEEN)
    except (OSError, DataError):
        return None


_ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _session_line(of: tuple[str, Judged]) -> str:
    name, judged = of
    rows = [row.written() for row in judged.rows]
    return _line({_SESSION: name, _SEEN: judged.seen, _ROWS: rows})


def _replace(file: Path, lines: Iterable[str]) -> None:
    """Whole, or not at all."""
    part = file.with_name(file.name + ".part")
    with part.open("w", **_ENCODING) as stream:  # type: ignore[call-overload]
        stream.writelines(lines)
    os.replace(part, file)
