"""Scores on their way to `scores.jsonl`: what was judged so far, session by session (`parts`).

A line of a session has its rows, and what its images were when they were judged: where they were
made again, it is judged again. At the end all become `scores.jsonl`, in the order of the sessions,
and `scores.of.json` says what that is of. Parts go last, so at every moment one of them or the
whole is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.benchmarks.parts import Parts, writing
from editr2.benchmarks.rows import Row, read_rows, row_of, write_rows
from editr2.errors import DataError
from editr2.files import write_lines
from editr2.sessions.records import parse_object

_SESSION, _SEEN, _ROWS = "session", "seen", "rows"


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
        self.file, self._parts = file, Parts(file, digest)
        self.of = file.with_name(f"{file.stem}.of.json")

    def known(self) -> dict[str, Judged]:
        """By the session's id; of one that was judged twice, what failed less."""
        known = self._whole()
        for name, judged in self._appended():
            if name not in known or judged.failed <= known[name].failed:
                known[name] = judged
        return known

    @property
    def whole(self) -> bool:
        """Whether `file` has everything that is known."""
        headed = self._parts.headed(self.of) is not None
        return not self._parts.files and headed and self.file.is_file()

    def begin(self, known: Mapping[str, Judged]) -> None:
        """Nothing but `known` is known from here on. On one process, before the others append."""
        self._parts.begin(_record(name, judged) for name, judged in known.items())

    def append(self, index: int, name: str, judged: Judged) -> None:
        """A session, judged by the process `index`."""
        self._parts.append(index, [_record(name, judged)])

    def finish(self, names: Sequence[str]) -> None:
        """Writes `file`, of these sessions in this order, and drops the parts. On one process, when
        all have appended."""
        known = self.known()
        with writing(self.file):
            self.of.unlink(missing_ok=True)
            write_rows(self.file, (row for name in names for row in known[name].rows))
            seen = {name: known[name].seen for name in names}
            write_lines(self.of, [self._parts.head(**{_SEEN: seen})])
        self._parts.drop()

    def appended(self) -> tuple[int, int]:
        """Sessions since `begin`, of all processes, and how many of their scores failed."""
        sessions = failed = 0
        for lines in self._parts.appended():
            sessions += lines.count(f'{{"{_SESSION}": '.encode())
            failed += lines.count(b'"state": "failed"')
        return sessions, failed

    def _whole(self) -> dict[str, Judged]:
        """Of `file`, where it is of this digest."""
        head = self._parts.headed(self.of)
        if head is None or not self.file.is_file():
            return {}
        rows: dict[str, list[Row]] = {}
        for row in read_rows(self.file):
            rows.setdefault(row.image, []).append(row)
        seen = head.get(_SEEN)
        seen = seen if isinstance(seen, dict) else {}
        return {name: Judged(str(seen.get(name)), tuple(of)) for name, of in rows.items()}

    def _appended(self) -> Iterator[tuple[str, Judged]]:
        for record in self._parts.records():
            try:
                rows = tuple(row_of(str(self.file), row) for row in record[_ROWS])
                yield str(record[_SESSION]), Judged(str(record[_SEEN]), rows)
            except (DataError, KeyError, TypeError, AttributeError):
                continue


def _record(name: str, judged: Judged) -> dict[str, Any]:
    rows = [row.written() for row in judged.rows]
    return {_SESSION: name, _SEEN: judged.seen, _ROWS: rows}


def seen_in(file: Path) -> Any:
    """What the images of every session were when `file`, scores that are whole, was judged; None
    where nothing says so."""
    try:
        return parse_object(Saved(file, "").of.read_bytes()).get(_SEEN)
    except (OSError, DataError):
        return None
