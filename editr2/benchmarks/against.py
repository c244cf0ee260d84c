"""One side against another, session by session: the numbers, and how they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editr2.benchmarks.measures import Measure, group_label, label_of, measures
from editr2.benchmarks.sides import Side, called_alike, made_otherwise
from editr2.benchmarks.text import decimals
from editr2.errors import ConfigError
from editr2.report.data import MODES, plural
from editr2.report.dots import with_interval
from editr2.report.numbers import decimal
from editr2.report.paired import Compared, Estimate, compared

HIGHER, LOWER = "higher", "lower"
TOO_FEW = "too few sessions to tell"
FEWEST = 6
"""Sessions of which something is said. That five of five go the same way is chance once in sixteen
times, and the interval of one session is a point."""

GROUPS = {"turns": "By length", "mode": "By mode", "task": "By task"}


@dataclass(frozen=True)
class Line:
    """A measure of both."""

    measure: Measure
    of: Compared


@dataclass(frozen=True)
class Part:
    """One pass of two sides. common: ids of the sessions that both have; only_a, only_b: of those
    that one has."""

    way: str
    common: Sequence[str]
    only_a: Sequence[str]
    only_b: Sequence[str]
    lines: Sequence[Line]

    def of(self, key: str) -> Line | None:
        return next((line for line in self.lines if line.measure.key == key), None)


@dataclass(frozen=True)
class Pair:
    """b against a."""

    a: Side
    b: Side
    parts: Sequence[Part]


def pair_of(a: Side, b: Side) -> Pair:
    """Raises `UserError` where there is no common session."""
    a, b = called_alike(a, b)
    return Pair(a, b, compared_parts(a, b))


def compared_parts(a: Side, b: Side) -> list[Part]:
    """Of every pass that both have. Raises `UserError` where there is no common session."""
    ways = [way for way in _ways(a) if way in set(_ways(b))]
    parts = [part for way in ways if (part := _part(a, b, way)).common]
    if not parts:
        ids = [{row.image for row in side.rows} for side in (a, b)]
        apart = f"scored on other sessions than {b.name}: none is in both"
        if not ids[0].isdisjoint(ids[1]):
            apart = f"edited in other passes than {b.name}: {_said(a)}, and {_said(b)}"
        raise ConfigError(
            f"--compare: {a.name} was {apart} (accepted: folders of the same sessions)"
        )
    return parts


def _said(side: Side) -> str:
    return ", ".join(_ways(side))


def _ways(side: Side) -> list[str]:
    return list(dict.fromkeys(row.way for row in side.rows))


def _part(a: Side, b: Side, way: str) -> Part:
    other = made_otherwise((a, b))
    of_a, of_b = (
        [row for row in side.rows if row.way == way and row.metric not in other] for side in (a, b)
    )
    ids_a, ids_b = (dict.fromkeys(row.image for row in rows) for rows in (of_a, of_b))
    common = [name for name in ids_a if name in ids_b]
    found_a, found_b = (measures(a.measures, rows, common) for rows in (of_a, of_b))
    lines = []
    for key, measure in found_a.items():
        if key in found_b:
            of = compared(measure.statistic, found_b[key].statistic)
            if of.difference.known:
                lines.append(Line(measure, of))
    only_a = [name for name in ids_a if name not in ids_b]
    only_b = [name for name in ids_b if name not in ids_a]
    return Part(way, common, only_a, only_b, lines)


def scaled(of: Estimate, scale: float) -> Estimate:
    return Estimate(of.value * scale, of.low * scale, of.high * scale, of.count)


def cells(line: Line, side: Side) -> list[str]:
    """Both values, and the difference with its interval."""
    places = decimals(side.scale)
    a, b, difference = (scaled(of, side.scale) for of in line.of)
    return [decimal(a.value, places), decimal(b.value, places), _difference(difference, places)]


def _difference(of: Estimate, places: int) -> str:
    return with_interval(of, places, sign=True)


def verdict(of: Estimate) -> str:
    """What the interval allows to be said."""
    said = HIGHER if of.low > 0 else LOWER if of.high < 0 else "no difference shown"
    return said if of.count >= FEWEST or said not in (HIGHER, LOWER) else TOO_FEW


def headline(pair: Pair) -> list[Line]:
    """The lines that the benchmark names first, of the first pass."""
    part = pair.parts[0]
    found = [line for key in pair.a.headline if (line := part.of(key))]
    return found or [line for line in part.lines if line.measure.group is None][:3]


def sorted_out(part: Part) -> list[tuple[str, str, list[Line]]]:
    """(group, title, lines) of each table: all sessions, and by sort of group at the last turn (of
    tasks, over all turns)."""
    whole = [line for line in part.lines if line.measure.group is None]
    turns = [line.measure.turn for line in whole if isinstance(line.measure.turn, int)]
    last = {line.measure.name: line for line in whole if line.measure.turn == "last"}
    # Where all sessions are of one length, their last turn is one of the numbered ones.
    again = {
        (line.measure.name, line.measure.turn)
        for line in whole
        if line.measure.turn == max(turns, default=0)
        and line.measure.name in last
        and line.of == last[line.measure.name].of
    }
    found = [
        ("", "All sessions", [x for x in whole if (x.measure.name, x.measure.turn) not in again])
    ]
    for sort, title in GROUPS.items():
        of = [line for line in part.lines if (line.measure.group or "").startswith(f"{sort}=")]
        when = None if any(line.measure.turn is None for line in of) else "last"
        if of:
            turn = "all turns" if when is None else "last turn"
            lines = [line for line in of if line.measure.turn == when]
            found.append((sort, f"{title}, {turn}", lines))
    return found


def label_in(line: Line, sort: str) -> str:
    measure = line.measure
    if not sort:
        return measure.label
    group = group_label(str(measure.group))
    return f"{label_of(measure.name)}, {MODES.get(group, group)}"


def title_of(pair: Pair, part: Part) -> str:
    return f"{pair.b.name} against {pair.a.name}, {part.way}"


def about(part: Part) -> str:
    alone = len(part.only_a) + len(part.only_b)
    count = len(part.common)
    said = f"{count} {plural('session', count)} that both have"
    return said + (f"; {alone} of one alone are left out" if alone else "")
