"""`compare.html`: two or more held against each other, with the sessions that changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from editr2.benchmarks.against import (
    Pair,
    Part,
    about,
    cells,
    headline,
    label_in,
    scaled,
    sorted_out,
    verdict,
)
from editr2.benchmarks.measures import label_of
from editr2.benchmarks.page import TEMPLATES
from editr2.benchmarks.paper import NONE, THEIRS, PaperTable
from editr2.benchmarks.rows import Row
from editr2.benchmarks.sampled import sampled_apart
from editr2.benchmarks.sides import Side, differing, made_otherwise
from editr2.benchmarks.strips import Lane, Thumbnails, by_session, fitting, session_score, view
from editr2.judge.text import Table
from editr2.report import charts, pages
from editr2.report.charts import Chart
from editr2.report.data import EQUAL, plural
from editr2.report.dots import Series, dots
from editr2.report.numbers import decimal, signed
from editr2.report.paired import Estimate
from editr2.report.strips import SessionView

MOST_CHANGES = 24
"""Sessions of a pair that are shown, half of them of each direction."""
LISTED = 8
"""Sessions of one side alone that are named."""


@dataclass(frozen=True)
class Card:
    title: str
    before: str
    after: str
    change: str
    note: str


@dataclass(frozen=True)
class TableRow:
    """Of a table with a forest plot."""

    name: str
    cells: Sequence[str]
    bar: Markup
    sessions: int


@dataclass(frozen=True)
class PartView:
    """tables: title, rows, and whether it is folded."""

    title: str
    about: str
    tables: Sequence[tuple[str, Sequence[TableRow], bool]]
    charts: Sequence[Chart]
    alone: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RunsView:
    """Runs beside one another. lines: what a reader must know of them first, as that some were not
    evaluated on the same sessions."""

    table: Table
    charts: Sequence[Chart]
    lines: Sequence[str]


@dataclass(frozen=True)
class PairView:
    """groups: (verdict, heading, sessions in all, those shown)."""

    id: str
    a: str
    b: str
    cards: Sequence[Card]
    parts: Sequence[PartView]
    groups: Sequence[tuple[str, str, int, Sequence[SessionView]]]
    unchanged: int
    colours: tuple[int, int]

    @property
    def views(self) -> list[SessionView]:
        return [view for *_, views in self.groups for view in views]


def write_page(
    path: Path,
    sides: Sequence[Side],
    pairs: Sequence[Pair],
    paper: Sequence[PaperTable],
    runs: RunsView | None = None,
) -> Path:
    """`compare.html`. paper: every side's own numbers, and those of others that may stand beside
    them. runs: what is shown of runs besides."""
    colours = colours_of(sides)
    pictures = Thumbnails()
    views = fitting(
        lambda most: [_pair(n, pair, pictures, most, colours) for n, pair in enumerate(pairs)],
        lambda found: [view for pair in found for view in pair.views],
        MOST_CHANGES,
    )
    first = dict(sides[0].about)
    shared = [(k, v) for k, v in first.items() if all((k, v) in side.about for side in sides)]
    own = {
        k: [dict(side.about).get(k, "–") for side in sides] for side in sides for k, _ in side.about
    }
    apart = [(k, values) for k, values in own.items() if (k, first.get(k)) not in shared]
    settings = [(k, v) for k, v in differing(sides) if k not in dict(apart)]
    lines = sum(len(rows) for pair in views for part in pair.parts for _, rows, _ in part.tables)
    return pages.write_page(
        path,
        "compare.html.j2",
        [TEMPLATES],
        title=(" and " if len(sides) == 2 else ", ").join(side.name for side in sides),
        names=[side.name for side in sides],
        facts=shared,
        settings=Table("Settings", [side.name for side in sides], [*apart, *settings]),
        # Of runs it stands above, among what is not alike.
        notes=[*([] if runs else sampled_apart(sides)), *notes_on(sides), *pictures.notes()],
        pairs=views,
        paper=[_beside(table) for table in paper],
        lines=lines,
        runs=runs,
    )


def colours_of(sides: Sequence[Side]) -> dict[str, int]:
    """A colour a side, the same in all charts of the page."""
    return {side.name: place % charts.COLOURS for place, side in enumerate(sides)}


def _beside(table: PaperTable) -> Table:
    head = [f"{column.top} {column.sub}".strip() for column in table.columns]
    rows = [
        (line.name + THEIRS * line.theirs, [cell or NONE for cell in line.cells])
        for line in table.lines
    ]
    return Table(table.title, head, rows, " ".join(table.notes))


def notes_on(sides: Sequence[Side]) -> list[str]:
    """What a reader must know of the sides."""
    other = made_otherwise(sides)
    return [
        *dict.fromkeys(note for side in sides for note in side.notes),
        *(f"{name} is not compared, it is of other weights." for name in other),
    ]


def _pair(
    n: int, pair: Pair, pictures: Thumbnails, most: int, colours: Mapping[str, int]
) -> PairView:
    cards = []
    for line in headline(pair):
        a, b, difference = cells(line, pair.a)
        count = line.of.difference.count
        note = f"{count} {plural('session', count)}; {verdict(line.of.difference)}"
        cards.append(Card(line.measure.label, a, b, difference, note))
    groups, unchanged = _changes(pair, pictures, most)
    parts = [_part_view(pair, part, colours) for part in pair.parts]
    of = colours[pair.a.name], colours[pair.b.name]
    return PairView(f"pair-{n + 1}", pair.a.name, pair.b.name, cards, parts, groups, unchanged, of)


def _part_view(pair: Pair, part: Part, colours: Mapping[str, int]) -> PartView:
    scale = pair.a.scale
    tables = []
    for sort, title, lines in sorted_out(part):
        ends = [end * scale for line in lines for end in _ends(line.of.difference)]
        reach = charts.value_range([0.0, *ends], unit=False)
        rows = []
        for line in lines:
            of, written = scaled(line.of.difference, scale), cells(line, pair.a)
            said = f"{label_in(line, sort)}: {written[-1]}, {verdict(of)}"
            bar = charts.interval_bar(said, (of.low, of.high), of.value, reach)
            rows.append(TableRow(label_in(line, sort), written, bar, of.count))
        tables.append((title, rows, bool(sort)))
    alone = [
        (side.name, _named(only))
        for side, only in ((pair.a, part.only_a), (pair.b, part.only_b))
        if only
    ]
    title = part.way
    return PartView(title, about(part), tables, _by_turn(pair, part, colours), alone)


def _ends(of: Estimate) -> tuple[float, float]:
    return of.low, of.high


def _named(ids: Sequence[str]) -> str:
    more = f", … {len(ids)} in all" if len(ids) > LISTED else ""
    return ", ".join(ids[:LISTED]) + more


def _by_turn(pair: Pair, part: Part, colours: Mapping[str, int]) -> list[Chart]:
    """Both sides of every measure that has several turns."""
    scale, panels, turns = pair.a.scale, [], set[int]()
    whole = [line for line in part.lines if line.measure.group is None]
    for name in dict.fromkeys(line.measure.name for line in whole):
        lines = {
            line.measure.turn: line.of
            for line in whole
            if line.measure.name == name and isinstance(line.measure.turn, int)
        }
        if len(lines) > 1:
            turns |= set(lines)
            series = [
                Series(
                    side.name,
                    {str(turn): scaled(of[place], scale) for turn, of in lines.items()},
                    colour=colours[side.name],
                    hollow=not place,
                )
                for place, side in enumerate((pair.a, pair.b))
            ]
            panels.append((label_of(name), series))
    return dots(panels, [str(turn) for turn in sorted(turns)], "turn", scale=scale)


def _changes(
    pair: Pair, pictures: Thumbnails, most: int
) -> tuple[list[tuple[str, str, int, list[SessionView]]], int]:
    """The sessions that changed most, both ways, and how many did not. A session's change is the
    mean over what both were given a score for."""
    way = pair.parts[0].way
    lanes = [
        Lane(side.name, way, side.strips, _first_sample(side, way), kind)
        for side, kind in ((pair.a, "before"), (pair.b, "after"))
    ]
    changes = {
        name: change
        for name, rows in lanes[0].rows.items()
        if (name in pair.a.strips or name in pair.b.strips)
        and (change := _change(rows, lanes[1].rows.get(name, ()))) is not None
    }
    rising = sorted(changes, key=lambda name: changes[name].less_before, reverse=True)
    better = [name for name in rising if changes[name].less_before >= EQUAL]
    worse = [name for name in reversed(rising) if changes[name].less_before <= -EQUAL]
    groups = []
    for kind, heading, names in (
        ("better", f"Better in {pair.b.name}", better),
        ("worse", f"Worse in {pair.b.name}", worse),
    ):
        views = []
        for name in names[: max(1, most // 2)]:
            change = changes[name]
            views.append(
                view(
                    name,
                    lanes,
                    pictures,
                    change=f"mean score {decimal(change.before)} → {decimal(change.after)}",
                    changed=signed(change.less_before),
                    verdict=kind,
                )
            )
        if names:
            groups.append((kind, heading, len(names), views))
    return groups, len(changes) - len(better) - len(worse)


def _first_sample(side: Side, way: str) -> dict[str, list[Row]]:
    return by_session(row for row in side.shown if row.way == way and row.sample == 1)


class _Change(NamedTuple):
    before: float
    after: float

    @property
    def less_before(self) -> float:
        return self.after - self.before


def _change(a: Sequence[Row], b: Sequence[Row]) -> _Change | None:
    """Mean scores of what both have; None where there is nothing."""
    ours, theirs = ({(r.metric, r.turn, r.asked): r for r in rows} for rows in (a, b))
    both = [
        (row, other)
        for key, row in ours.items()
        if row.value is not None and (other := theirs.get(key)) and other.value is not None
    ]
    before, after = (session_score(pair[side] for pair in both) for side in (0, 1))
    return None if before is None or after is None else _Change(before, after)
