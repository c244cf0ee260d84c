"""Where a run's numbers go: `metrics.jsonl` always, what else looks on (`editr2.run.trackers`), a
line on the terminal.

`metrics.jsonl` holds one JSON object a line, told apart by its "event": "start", "train", "eval",
"stop" (of a run that ended early, with its reason) or "comparison". A train row of iteration i is
measured with the weights after i updates, so a checkpoint at iteration k comes after train row
k - 1 and before train row k. The file is the record of the run: a run that is killed and resumed
has every iteration in it exactly once.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from editr2.errors import CheckpointError, counted
from editr2.files import in_place_of
from editr2.run.machine import CoreWatch

log = logging.getLogger(__name__)

Row = dict[str, Any]


def read_metrics(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """The rows of a metrics file, and how many lines were dropped.

    A process killed while writing, or a machine that went down, leaves a torn line. Such a line (or
    any that is not a JSON object) is dropped and counted; NaN and Infinity from other writers read
    as None. Raises FileNotFoundError when there is no such file."""
    rows: list[Row] = []
    dropped = 0
    # Split on b"\n" alone: str.splitlines would also split at U+2028 inside a JSON string.
    for line in Path(path).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            dropped += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            dropped += 1
    return rows, dropped


class Sink(Protocol):
    """Anything that takes rows after they are in the file."""

    def resumed(self, rows: Sequence[Row], iteration: int) -> None:
        """Once, before the first `append`: the rows that stand where a run goes on."""

    def append(self, row: Mapping[str, Any]) -> None: ...

    def strips(self, file: Path, iteration: int) -> None:
        """Sessions were pictured: `strips/<pass>.json` or `evaluations/<iteration>.jsonl`."""

    def close(self) -> None: ...


class MetricsLog:
    """Appends rows to `metrics.jsonl`, and passes them on to sinks.

    Each row is one `write` of a whole line, so killing the process loses no finished row. The file
    is synced to the disk when it is trimmed and closed, not at every row.

    path: the file; its folder is made.
    resume_iteration: None starts a run, and an existing non-empty file raises CheckpointError
        rather than mixing two runs. k continues from a checkpoint at iteration k: train rows with
        iteration >= k, eval rows with iteration > k and a torn tail are removed (atomically) before
        the first append. Rows without an iteration (start, comparison) share the fate of the row
        before them.
    resumed: about the process that continues the run, for the list of that name in the start row's
        identity.
    sinks: get every row once it is in the file, and are closed with it.
    enabled: False (any process but the first) touches no file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_iteration: int | None = None,
        resumed: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
        enabled: bool = True,
    ) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._fd: int | None = None
        self._sinks = list(sinks)
        self._warned: set[str] = set()
        if resume_iteration is not None and resume_iteration < 0:
            raise ValueError(f"resume_iteration is {resume_iteration}; give None or a number >= 0")
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[Row] = []
        if self.path.exists() and self.path.stat().st_size:
            if resume_iteration is None:
                raise CheckpointError(
                    f"{self.path} already holds a run; give resume_iteration to continue it, or "
                    f"another folder"
                )
            kept, self.dropped = _trim(self.path, resume_iteration, resumed)
        for sink in self._sinks:
            sink.resumed(kept, resume_iteration or 0)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row. NaN and infinities become null, their keys are listed under "non_finite"
        and warned of once.

        Scalars and arrays of torch or numpy are taken as numbers and lists. Raises TypeError for
        other objects.
        """
        if self._fd is None:
            return
        non_finite: list[str] = []
        clean: Row = _plain(row, "", non_finite)
        if non_finite:
            clean["non_finite"] = non_finite
            for name in non_finite:
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning(
                        "%s is not finite at iteration %s; written as null",
                        name,
                        row.get("iteration"),
                    )
        line = (json.dumps(clean, allow_nan=False, ensure_ascii=False) + "\n").encode(
            "utf-8", "replace"
        )
        written = os.write(self._fd, line)
        if written != len(line):
            raise OSError(
                f"{self.path}: wrote {written} of {len(line)} bytes of a row; is the disk full?"
            )
        for sink in self._sinks:
            sink.append(clean)

    def strips(self, file: Path, iteration: int) -> None:
        """Pictures of sessions, for those who look on."""
        if self._fd is not None:
            for sink in self._sinks:
                sink.strips(file, iteration)

    def sync(self) -> None:
        """Brings the rows to the disk: before a checkpoint, which has them behind it."""
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = None
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def iteration_of(row: Mapping[str, Any]) -> int | None:
    """None of a row that belongs to none."""
    value = row.get("iteration")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _trim(
    path: Path, resume_iteration: int, resumed: Mapping[str, Any] | None
) -> tuple[list[Row], int]:
    """Rewrites `path` with the rows that a checkpoint at `resume_iteration` has behind it."""
    rows, dropped = read_metrics(path)
    kept = rows_behind(rows, resume_iteration)
    if resumed is not None:
        for row in kept:
            if row.get("event") == "start":
                row.setdefault("identity", {}).setdefault("resumed", []).append(dict(resumed))
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept, dropped


def rows_behind(rows: Iterable[Row], iteration: int) -> list[Row]:
    """The rows that a checkpoint at `iteration` has behind it."""
    kept: list[Row] = []
    keep = True
    for row in rows:
        of = iteration_of(row)
        if of is not None:
            keep = of < iteration if row.get("event") == "train" else of <= iteration
        if keep:
            kept.append(row)
    return kept


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all of the text, or as it was: synced and renamed into place."""
    with in_place_of(path) as part, open(part, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any, name: str, non_finite: list[str]) -> Any:
    """`value` as JSON can hold it; the dotted names of numbers that it cannot hold go to
    `non_finite`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        non_finite.append(name)
        return None
    if isinstance(value, Mapping):
        return {
            str(k): _plain(v, f"{name}.{k}" if name else str(k), non_finite)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}.{i}", non_finite) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # torch and numpy, without importing either
        return _plain(value.tolist(), name, non_finite)
    raise TypeError(
        f"row key {name!r} holds a {type(value).__name__}; use numbers, strings, lists, dicts or "
        f"None"
    )


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row as (slash-separated name, value); list items count from 1, as turns
    do."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = {i: item for i, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}/")
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            yield name, float(value)


# The terminal

TYPICAL = 16
"""Iterations whose median is the typical one: enough to outvote a few slow ones."""

RECENT = 5
"""Iterations from which the time left is reckoned: few, so that it follows a machine that becomes
busy or free."""


class Pace:
    """How fast a run goes. The time left is reckoned by the mean of the last `RECENT` iterations,
    and of what the run spent between iterations (evaluations, checkpoints), for each that
    remains."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=TYPICAL)
        self._between, self._gaps = 0.0, 0

    def add(self, row: Mapping[str, Any], gap: float | None) -> None:
        """A train row. gap: seconds since the one before, None where nobody looked on."""
        phases = [s for _, s in flatten({"seconds": row.get("seconds") or {}})]
        if phases or gap is not None:
            self.seconds.append(sum(phases) if phases else gap or 0.0)
        if gap is not None:
            self._between += max(gap - self.seconds[-1], 0.0)
            self._gaps += 1

    @property
    def typical(self) -> float:
        """Seconds of an iteration. Raises StatisticsError before the first."""
        return statistics.median(self.seconds)

    def left(self, iterations: int) -> float:
        """Seconds that so many more take. Raises StatisticsError before the first."""
        each = statistics.fmean(list(self.seconds)[-RECENT:]) + self._between / max(self._gaps, 1)
        return each * max(iterations, 0)


class Progress:
    """One line for each iteration: its seconds beside the typical ones, the time left, and whether
    the machine is busy.

    An iteration's seconds are those of the row's phases, or, without them, from one row to the
    next. On a terminal the line stays in place above a bar; elsewhere each iteration prints a line
    of its own.

    iterations: how many the run has; start: how many are done already (a resumed run).
    enabled: False (any process but the first) prints nothing.
    stream: stderr unless given.
    busy: since its last call, words for a busy machine or "" (`CoreWatch.lap`). clock: seconds,
        rising.
    """

    def __init__(
        self,
        iterations: int,
        *,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        busy: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.iterations = iterations
        self.done = start
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._busy = CoreWatch().lap if busy is None else busy
        self._clock = clock
        self._pace = Pace()
        self._last: float | None = None
        self._live: Any = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes the train row of an iteration that has just finished."""
        now = self._clock()
        iteration = iteration_of(row)
        self.done = self.done + 1 if iteration is None else iteration + 1
        self._pace.add(row, None if self._last is None else now - self._last)
        self._last = now
        if not self._enabled:
            return
        line = self.line(row)
        if busy := self._busy():
            line += f"  {busy}"
        if self._stream.isatty():
            self._show(line)
        else:
            self._print(line)

    def note(self, text: str) -> None:
        """Prints `text` on a line of its own, above the live line if there is one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:  # whoever read has enough of it, as any program takes it
            raise
        except (
            OSError
        ):  # the terminal went away, or the log's disk is full: the run's own files say it all
            self._enabled = False

    def said(self, row: Mapping[str, Any]) -> list[str]:
        """What an iteration came to, in parts of its line."""
        turns = row.get("reward_turn") or []
        reward = f"reward {_short(row.get('reward'), zero=True)}"
        if turns:
            reward += (
                " (" + " ".join(f"t{t} {_short(value)}" for t, value in enumerate(turns, 1)) + ")"
            )
        names = {"if_turn": "IF", "cc_turn": "CC", "ga_turn": "GA"}
        names |= {  # a reward's own
            key: key.removesuffix("_turn")
            for key in row
            if key.endswith("_turn") and key not in (*names, "reward_turn")
        }
        scores = [f"{n} {_short(_mean(row[key]))}" for key, n in names.items() if row.get(key)]
        parts = [reward, " ".join(scores)]
        if row.get("ratio_error") is not None:
            parts.append(f"|ratio-1| {row['ratio_error']:.0e}")
        if row.get("failed_scores"):
            parts.append(f"{counted(row['failed_scores'], 'score')} failed")
        if row.get("not_applicable"):
            parts.append(f"a reward does not apply to {counted(row['not_applicable'], 'turn')}")
        if row.get("advantage_abs") == 0:
            parts.append("nothing trains: siblings tie, or their turns are left out")
        return parts

    def line(self, row: Mapping[str, Any]) -> str:
        parts = [f"iter {self.done}/{self.iterations}", *self.said(row)]
        if (pace := self._pace).seconds:
            typical, last = precise(pace.typical), precise(pace.seconds[-1])
            parts.append(f"{last} s/iter (typical {typical})")
            parts.append(f"left {duration(pace.left(self.iterations - self.done))}")
        return "  ".join(part for part in parts if part)

    def _show(self, line: str) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        view = Group(Text(line), ProgressBar(total=max(self.iterations, 1), completed=self.done))
        if self._live is None:
            console = Console(file=self._stream)
            self._live = Live(view, console=console, auto_refresh=False)
            self._live.start()
        self._live.update(view, refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _short(value: float | None, *, zero: bool = False) -> str:
    """0.784 as ".78" ("0.78" with `zero`); "–" for a missing value."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.2f}"
    return (
        text if zero else text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
    )


def precise(seconds: float) -> str:
    """Three digits, all of those before the point."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def duration(seconds: float) -> str:
    """5.2 → "5s", 245 → "4m05s", 7500 → "2h05m", 200000 → "2d07h"."""
    whole = round(seconds)
    for unit, size, below, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{below}"
    return f"{whole}s"


def profile_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Where the time of an iteration goes: for each phase the mean seconds, its share, and the
    slowest iteration.

    "untimed" is what lies between two train rows (their elapsed_s) beyond the timed phases:
    logging,
    checkpoints, waiting. Pairs with an evaluation in between are left out of it.
    """
    rows = list(rows)
    timed = [
        row
        for row in rows
        if row.get("event") == "train" and isinstance(row.get("seconds"), Mapping)
    ]
    if not timed:
        return "no timed iterations"
    phases: dict[str, list[float]] = {}
    for row in timed:
        for phase, value in flatten(row["seconds"]):
            phases.setdefault(phase, []).append(value)
    gaps: list[float] = []
    for before, row in itertools.pairwise(rows):
        if (
            before.get("event") != "train"
            or row.get("event") != "train"
            or not isinstance(row.get("seconds"), Mapping)
        ):
            continue
        began, ended = before.get("elapsed_s"), row.get("elapsed_s")
        if began is not None and ended is not None and ended >= began:
            gaps.append(
                max(ended - began - sum(value for _, value in flatten(row["seconds"])), 0.0)
            )
    # A phase that some iterations lack took no time in them: divide by all timed iterations.
    lines = [(name, sum(values) / len(timed), max(values)) for name, values in phases.items()]
    if gaps:
        lines.append(("untimed", sum(gaps) / len(gaps), max(gaps)))
    total = sum(mean for _, mean, _ in lines)
    width = max(len(name) for name, _, _ in [*lines, ("iteration", 0, 0)])
    table = [f"{'phase':<{width}}  {'mean s':>9}  {'share':>6}  {'slowest s':>9}"]
    for name, mean, slowest in lines:
        share = 100 * mean / total if total else 0.0
        table.append(f"{name:<{width}}  {mean:>9.4f}  {share:>5.1f}%  {slowest:>9.4f}")
    table.append(
        f"{'iteration':<{width}}  {total:>9.4f}  {100 if total else 0:>5.1f}%  over {len(timed)} "
        f"iterations"
    )
    return "\n".join(table)
