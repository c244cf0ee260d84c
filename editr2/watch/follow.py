"""What a run's folder holds, read as it grows: a look costs what was written since the last one."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from editr2.report.data import number
from editr2.run.lock import FILE as LOCK
from editr2.run.tracking import Pace, Row, iteration_of

FRESH = 10.0
"""Seconds between two looks up to which what came between them tells the time of an iteration."""
FAILURES = 50
"""Failed calls that are kept, the newest."""
TAIL = 1 << 20
"""Bytes from the end at which a record of judging is begun: it grows to gigabytes."""


class Tail:
    """The lines of a file that is appended to, removed, or put in place of another.

    newest: begin so many bytes from its end; None reads all. A line that is not whole yet waits for
    its end, and one that is no JSON object is left out and counted.
    """

    def __init__(self, path: Path, newest: int | None = None) -> None:
        self.path, self._newest = path, newest
        self.torn = 0
        self._place: tuple[int, int] | None = None
        self._at = 0

    def read(self) -> tuple[bool, list[Row]]:
        """Whether the file is another than it was, and what is new."""
        try:
            with open(self.path, "rb") as file:
                seen = os.fstat(file.fileno())
                place = (seen.st_dev, seen.st_ino)
                anew = place != self._place or seen.st_size < self._at
                if anew:
                    self._place, self._at, self.torn = place, 0, 0
                    if self._newest is not None and seen.st_size > self._newest:
                        self._at = seen.st_size - self._newest
                        file.seek(self._at)
                        self._at += len(file.readline())
                file.seek(self._at)
                data = file.read()
        except OSError:  # not there, a folder, or not ours to read
            gone, self._place, self._at = self._place is not None, None, 0
            return gone, []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return anew, [row for line in whole.split(b"\n") if (row := self._row(line)) is not None]

    def _row(self, line: bytes) -> Row | None:
        if not line.strip():
            return None
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
        self.torn += 1
        return None


class Seen:
    """The rows of a run so far. train: by iteration. others: of evaluations, comparisons and a
    stop, in their order."""

    def __init__(self) -> None:
        self.start: Row = {}
        self.train: dict[int, Row] = {}
        self.others: list[Row] = []
        self.pace = Pace()

    def take(self, row: Row, gap: float | None = None) -> None:
        """gap: of a train row, the seconds since the one before, None where nobody looked on."""
        event, iteration = row.get("event"), iteration_of(row)
        if event == "start":
            self.start = row
        elif event == "train" and iteration is not None:
            self.train[iteration] = row
            self.pace.add(row, gap)
        elif event in ("eval", "comparison", "stop"):
            self.others.append(row)

    @property
    def done(self) -> int:
        return max(self.train, default=-1) + 1

    def of(self, event: str) -> list[Row]:
        return [row for row in self.others if row["event"] == event]


class Followed(Seen):
    """A run's folder. `look` brings the rest up to date.

    failures: the newest calls of judges that failed. version: another, whenever anything is.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.monotonic, locks: str = "/proc/locks"
    ) -> None:
        super().__init__()
        self.folder = folder
        self._clock, self._locks = clock, locks
        self._metrics = Tail(folder / "metrics.jsonl")
        self._judges: dict[Path, Tail] = {}
        self.version = 0
        self._seen: tuple[Any, ...] = ()
        self._configured: tuple[int | None, dict[str, Any]] = (None, {})
        self._looked = float("-inf")
        self.failures: deque[Row] = deque(maxlen=FAILURES)
        self._came: float | None = None

    @property
    def torn(self) -> int:
        return self._metrics.torn

    def look(self) -> None:
        anew, rows = self._metrics.read()
        now = self._clock()
        live, self._looked = now - self._looked < FRESH and not anew, now
        if anew:
            super().__init__()
            self._came = None
        trained = sum(row.get("event") == "train" for row in rows)
        gap = now - self._came if live and trained == 1 and self._came is not None else None
        for row in rows:
            self.take(row, gap)
        if trained:
            self._came = now if live else None
        failed, changed = self._look_at_judges(), self._changed()
        if anew or rows or failed or changed:
            self.version += 1

    def _look_at_judges(self) -> bool:
        found = False
        for path in sorted(self.folder.glob("judges*.jsonl")):
            tail = self._judges.setdefault(path, Tail(path, TAIL))
            for row in tail.read()[1]:
                if row.get("failed") is not None:
                    self.failures.append(row)
                    found = True
        return found

    def _changed(self) -> bool:
        """Whether other files, or whether somebody is at work, are not as at the last look."""
        names = ("config.yaml", "strips", "evaluations", "policy", "verifier", ".lock")
        seen = (self.working(), self.folder.is_dir(), *(_when(self.folder / n) for n in names))
        changed, self._seen = seen != self._seen, seen
        return changed

    # ---------------------------------------------------------------------------- who is at work

    def working(self) -> bool | None:
        """Whether a process of this machine is at work in the folder; None where that cannot be
        seen. The lock is looked up, not tried: a run that starts just then would be refused."""
        path = self.folder / LOCK
        try:
            inode = path.stat().st_ino
            host = json.loads(path.read_text("utf-8")).get("host")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError, AttributeError):
            return None
        if host != platform.node():
            return None
        try:
            held = Path(self._locks).read_text()
        except OSError:
            return None
        fields = [line.split() for line in held.splitlines()]
        return any(len(f) > 5 and f[1] == "FLOCK" and f[5].endswith(f":{inode}") for f in fields)

    @property
    def age(self) -> float | None:
        """Seconds since the newest row."""
        try:
            return max(0.0, time.time() - self._metrics.path.stat().st_mtime)
        except OSError:
            return None

    # ------------------------------------------------------------------------------ what it says

    @property
    def settings(self) -> dict[str, Any]:
        """`config.yaml`, read again when it is another."""
        import yaml

        path = self.folder / "config.yaml"
        if (when := _when(path)) != self._configured[0]:
            try:
                found = yaml.safe_load(path.read_text("utf-8"))
            except (OSError, ValueError, RecursionError, yaml.YAMLError):
                found = None
            self._configured = (when, found if isinstance(found, dict) else {})
        return self._configured[1]

    @property
    def planned(self) -> int | None:
        train = self.settings.get("train")
        planned = number(train.get("iterations")) if isinstance(train, dict) else None
        return None if planned is None else int(planned)


def _when(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
