"""Two or more held against each other: benchmarks' folders, or runs' evaluations.

Differences are paired by session: each is over the sessions that both have, so what makes a session
hard for both cancels. Of more than two, each is held against the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from editr2.benchmarks.measures import Measure, group_label, label_of, measures
from editr2.benchmarks.page import TEMPLATES
from editr2.benchmarks.plots import Series, dots, with_interval
from editr2.benchmarks.rows import Row as ScoreRow
from editr2.benchmarks.sides import Side, check_alike, differing, sides_of
from editr2.benchmarks.strips import (
    Lane,
    Thumbnails,
    by_session,
    fitting,
    view,
)
from editr2.benchmarks.tables import md, tex
from editr2.benchmarks.text import decimals
from editr2.errors import ConfigError, plain
from editr2.judge.text import Table
from editr2.report import charts, pages
from editr2.report.charts import Chart
from editr2.report.data import EQUAL, MODES, mean, plural
from editr2.report.numbers import decimal, signed
from editr2.report.paired import Compared, Estimate, compared
from editr2.report.strips import SessionView

MOST_CHANGES = 24
"""Sessions of a pair that are shown, half of them of each direction."""
GROUPS = {"turns": "By length", "mode": "By mode", "task": "By task"}
LISTED = 8
"""Sessions of one side alone that are named."""


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


def compare(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[str]:
    """Holds every folder against the first, writes `compare.html`, `compare.md` and `compare.tex`
    into `out` and returns the lines to print. One folder alone is a run's, whose evaluations before
    and after training are compared.

    Raises `UserError` for folders that hold no scores, or scores that cannot be held against each
    other: of another benchmark, judge, prompts or rules, or of no common session.
    """
    sides = sides_of(folders)
    for other in sides[1:]:
        check_alike(sides[0], other)
    pairs = [Pair(sides[0], other, compared_parts(sides[0], other)) for other in sides[1:]]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page(folder / "compare.html", sides, pairs)
    _write(folder / "compare.md", "\n".join(_markdown(pairs)) + "\n")
    _write(folder / "compare.tex", "\n".join(_latex(pairs)) + "\n")
    return [*(line for pair in pairs for line in _said(pair)), f"page: {page}"]


def compared_parts(a: Side, b: Side) -> list[Part]:
    """Of every pass that both have. Raises `UserError` where there is no common session."""
    ways = [way for way in _ways(a) if way in set(_ways(b))]
    parts = [part for way in ways if (part := _part(a, b, way)).common]
    if not parts:
        raise ConfigError(
            f"--compare: {a.name} and {b.name} have no session of one pass in common (accepted: "
            f"folders of the same sessions)"
        )
    return parts


def _ways(side: Side) -> list[str]:
    return list(dict.fromkeys(row.way for row in side.rows))


def _part(a: Side, b: Side, way: str) -> Part:
    of_a, of_b = ([row for row in side.rows if row.way == way] for side in (a, b))
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


# --------------------------------------------------------------------------------------------- text


def _scaled(of: Estimate, scale: float) -> Estimate:
    return Estimate(of.value * scale, of.low * scale, of.high * scale, of.count)


def _cells(line: Line, side: Side) -> list[str]:
    """Both values, and the difference with its interval."""
    places = decimals(side.scale)
    a, b, difference = (_scaled(of, side.scale) for of in line.of)
    return [decimal(a.value, places), decimal(b.value, places), _difference(difference, places)]


def _difference(of: Estimate, places: int) -> str:
    return with_interval(of, places, sign=True)


def _verdict(of: Estimate) -> str:
    """What the interval allows to be said."""
    return "higher" if of.low > 0 else "lower" if of.high < 0 else "no difference shown"


def _headline(pair: Pair) -> list[Line]:
    """The lines that the benchmark names first, of the first pass."""
    part = pair.parts[0]
    found = [line for key in pair.a.headline if (line := part.of(key))]
    return found or [line for line in part.lines if line.measure.group is None][:3]


def _sorted_out(part: Part) -> list[tuple[str, str, list[Line]]]:
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


def _label(line: Line, sort: str) -> str:
    measure = line.measure
    if not sort:
        return measure.label
    group = group_label(str(measure.group))
    return f"{label_of(measure.name)}, {MODES.get(group, group)}"


def _title(pair: Pair, part: Part) -> str:
    return f"{pair.b.name} against {pair.a.name}, {part.way}"


def _about(part: Part) -> str:
    alone = len(part.only_a) + len(part.only_b)
    count = len(part.common)
    said = f"{count} {plural('session', count)} that both have"
    return said + (f"; {alone} of one alone are left out" if alone else "")


def _said(pair: Pair) -> Iterator[str]:
    """For a terminal."""
    yield f"{_title(pair, pair.parts[0])}: {_about(pair.parts[0])}"
    for line in _headline(pair):
        a, b, difference = _cells(line, pair.a)
        verdict = _verdict(line.of.difference)
        yield f"  {line.measure.label}: {a} -> {b}, {difference} ({verdict})"


def _markdown(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair, part, title, sort, lines in _tables(pairs):
        yield from (f"### {title}", "")
        names = [md(side.name) for side in (pair.a, pair.b)]
        head = ["", *names, "difference [95 % interval]", "sessions"]
        yield f"| {' | '.join(head)} |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        for line in lines:
            cells = [md(_label(line, sort)), *_cells(line, pair.a)]
            yield f"| {' | '.join(cells)} | {line.of.difference.count} |"
        yield from ("", f"Paired by session: {_about(part)}.", "")


def _latex(pairs: Sequence[Pair]) -> Iterator[str]:
    """Tables for `booktabs`."""
    for pair, part, title, sort, lines in _tables(pairs):
        names = " & ".join(tex(side.name) for side in (pair.a, pair.b))
        yield f"% {plain(title)}; paired by session: {_about(part)}"
        yield r"\begin{tabular}{lrrrr}"
        yield r"\toprule"
        yield rf" & {names} & difference [95\,\%] & sessions \\"
        yield r"\midrule"
        for line in lines:
            cells = [tex(cell) for cell in (_label(line, sort), *_cells(line, pair.a))]
            yield rf"{' & '.join(cells)} & {line.of.difference.count} \\"
        yield from (r"\bottomrule", r"\end{tabular}", "")


def _tables(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Part, str, str, list[Line]]]:
    for pair in pairs:
        for part in pair.parts:
            for sort, title, lines in _sorted_out(part):
                yield pair, part, f"{_title(pair, part)}: {title.lower()}", sort, lines


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


# --------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Card:
    title: str
    before: str
    after: str
    change: str
    note: str


@dataclass(frozen=True)
class Row:
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
    tables: Sequence[tuple[str, Sequence[Row], bool]]
    charts: Sequence[Chart]
    alone: Sequence[tuple[str, str]]


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

    @property
    def views(self) -> list[SessionView]:
        return [view for *_, views in self.groups for view in views]


def write_page(path: Path, sides: Sequence[Side], pairs: Sequence[Pair]) -> Path:
    """`compare.html`."""
    pictures = Thumbnails()
    views = fitting(
        lambda most: [_pair(n, pair, pictures, most) for n, pair in enumerate(pairs)],
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
        title=" and ".join(side.name for side in sides)
        if len(sides) < 3
        else f"{len(sides)} sides",
        names=[side.name for side in sides],
        facts=shared,
        settings=Table("What differs", [side.name for side in sides], [*apart, *settings]),
        notes=[*dict.fromkeys(note for side in sides for note in side.notes), *pictures.notes()],
        pairs=views,
        lines=lines,
    )


def _pair(n: int, pair: Pair, pictures: Thumbnails, most: int) -> PairView:
    cards = []
    for line in _headline(pair):
        a, b, difference = _cells(line, pair.a)
        count = line.of.difference.count
        note = f"{count} {plural('session', count)}; {_verdict(line.of.difference)}"
        cards.append(Card(line.measure.label, a, b, difference, note))
    groups, unchanged = _changes(pair, pictures, most)
    parts = [_part_view(pair, part) for part in pair.parts]
    return PairView(f"pair-{n + 1}", pair.a.name, pair.b.name, cards, parts, groups, unchanged)


def _part_view(pair: Pair, part: Part) -> PartView:
    scale = pair.a.scale
    tables = []
    for sort, title, lines in _sorted_out(part):
        ends = [end * scale for line in lines for end in _ends(line.of.difference)]
        reach = charts.value_range([0.0, *ends], unit=False)
        rows = []
        for line in lines:
            of, cells = _scaled(line.of.difference, scale), _cells(line, pair.a)
            said = f"{_label(line, sort)}: {cells[-1]}, {_verdict(of)}"
            bar = charts.interval_bar(said, (of.low, of.high), of.value, reach)
            rows.append(Row(_label(line, sort), cells, bar, of.count))
        tables.append((title, rows, bool(sort)))
    alone = [
        (side.name, _named(only))
        for side, only in ((pair.a, part.only_a), (pair.b, part.only_b))
        if only
    ]
    title = part.way
    return PartView(title, _about(part), tables, _by_turn(pair, part), alone)


def _ends(of: Estimate) -> tuple[float, float]:
    return of.low, of.high


def _named(ids: Sequence[str]) -> str:
    more = f", … {len(ids)} in all" if len(ids) > LISTED else ""
    return ", ".join(ids[:LISTED]) + more


def _by_turn(pair: Pair, part: Part) -> list[Chart]:
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
                    {str(turn): _scaled(of[place], scale) for turn, of in lines.items()},
                    colour=1 - place,
                    hollow=not place,
                )
                for place, side in enumerate((pair.a, pair.b))
            ]
            panels.append((label_of(name), series))
    return dots(panels, [str(turn) for turn in sorted(turns)], "turn", unit=scale == 1)


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
    rising = sorted(changes, key=lambda name: -changes[name][1] + changes[name][0])
    better = [name for name in rising if changes[name][1] - changes[name][0] >= EQUAL]
    worse = [name for name in reversed(rising) if changes[name][0] - changes[name][1] >= EQUAL]
    groups = []
    room = max(1, most // 2)
    for verdict, heading, names in (
        ("better", f"Better in {pair.b.name}", better),
        ("worse", f"Worse in {pair.b.name}", worse),
    ):
        views = []
        for name in names[:room]:
            a, b = changes[name]
            change = f"mean score {decimal(a)} → {decimal(b)}"
            views.append(
                view(name, lanes, pictures, change=change, changed=signed(b - a), verdict=verdict)
            )
        if names:
            groups.append((verdict, heading, len(names), views))
    return groups, len(changes) - len(better) - len(worse)


def _first_sample(side: Side, way: str) -> dict[str, list[ScoreRow]]:
    return by_session(row for row in side.shown if row.way == way and row.sample == 1)


def _change(a: Sequence[ScoreRow], b: Sequence[ScoreRow]) -> tuple[float, float] | None:
    """Mean scores of what both have; None where there is nothing."""
    ours, theirs = ({(r.metric, r.turn, r.asked): r.value for r in rows} for rows in (a, b))
    both = [
        (value, other)
        for key, value in ours.items()
        if value is not None and (other := theirs.get(key)) is not None
    ]
    if not both:
        return None
    return mean(value for value, _ in both), mean(other for _, other in both)
