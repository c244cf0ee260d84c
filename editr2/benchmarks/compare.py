"""Two or more held against each other: benchmarks' folders, or runs' evaluations.

Differences are paired by session: each is over the sessions that both have, so what makes a session
hard for both cancels. Of more than two, each is held against the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from editr2.benchmarks.against import (
    HIGHER,
    LOWER,
    Line,
    Pair,
    Part,
    about,
    cells,
    headline,
    label_in,
    pair_of,
    sorted_out,
    title_of,
    verdict,
)
from editr2.benchmarks.compare_page import RunsView, notes_on, write_page
from editr2.benchmarks.paper import PaperTable, latex, markdown, md, paper_table, tex
from editr2.benchmarks.sampled import sampled_apart
from editr2.benchmarks.sides import Side, check_alike, differing, sides_of
from editr2.errors import plain
from editr2.files import write_lines

NAMED = 8
"""Settings that are named of those that differ."""


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
    pairs = [pair_of(sides[0], other) for other in sides[1:]]
    return [*sampled_apart(sides), *write_comparison(sides, pairs, out)]


def write_comparison(
    sides: Sequence[Side],
    pairs: Sequence[Pair],
    out: str | os.PathLike[str],
    runs: RunsView | None = None,
) -> list[str]:
    """The files of a comparison, and the lines to print. runs: what is shown of runs besides."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paper = _paper(sides, pairs) if pairs else []
    page = write_page(folder / "compare.html", sides, pairs, paper, runs)
    files = {
        "compare.md": [*map(markdown, paper), *_markdown(pairs)],
        "compare.tex": [*map(latex, paper), *_latex(pairs)],
    }
    for name, parts in files.items():
        write_lines(folder / name, (f"{part}\n" for part in parts))
    wrote = [f"wrote {folder / name}" for name in (*files, page.name)]
    return [*(line for pair in pairs for line in _said(pair)), *_differing(sides), *wrote]


def _said(pair: Pair) -> Iterator[str]:
    """For a terminal."""
    yield f"{title_of(pair, pair.parts[0])}: {about(pair.parts[0])}"
    for line in headline(pair):
        a, b, difference = cells(line, pair.a)
        said = verdict(line.of.difference)
        yield f"  {line.measure.label}: {a} -> {b}, {difference} ({said})"


def _differing(sides: Sequence[Side]) -> list[str]:
    names = [name for name, _ in differing(sides)]
    more = f", … {len(names)} in all" if len(names) > NAMED else ""
    said = [f"settings that differ: {', '.join(names[:NAMED])}{more}"] if names else []
    return [*notes_on(sides), *said]


def _paper(sides: Sequence[Side], pairs: Sequence[Pair]) -> list[PaperTable]:
    """Every side as a row, where all are benchmarks with a summary. Bold is a number that is higher
    than the first side's by the interval of their difference; or the first's, where all of the
    others' are lower."""
    summaries = [side.summary for side in sides if side.summary is not None]
    if len(summaries) < len(sides):
        return []
    bold = set[tuple[int, str]]()
    for key in [line.measure.key for line in pairs[0].parts[0].lines]:
        lines = [pair.parts[0].of(key) for pair in pairs]
        verdicts = [verdict(line.of.difference) if line else "" for line in lines]
        bold |= {(place + 1, key) for place, said in enumerate(verdicts) if said == HIGHER}
        if all(said == LOWER for said in verdicts):
            bold.add((0, key))
    return [paper_table(summaries, [side.name for side in sides], bold)]


def _markdown(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair, part, title, sort, lines in _tables(pairs):
        yield from (f"### {md(title)}", "")
        names = [md(side.name) for side in (pair.a, pair.b)]
        head = ["", *names, "difference [95 % interval]", "sessions"]
        yield f"| {' | '.join(head)} |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        for line in lines:
            row = [md(label_in(line, sort)), *cells(line, pair.a)]
            yield f"| {' | '.join(row)} | {line.of.difference.count} |"
        yield from ("", f"Paired by session: {about(part)}.", "")


def _latex(pairs: Sequence[Pair]) -> Iterator[str]:
    """Tables for `booktabs`."""
    for pair, part, title, sort, lines in _tables(pairs):
        names = " & ".join(tex(side.name) for side in (pair.a, pair.b))
        yield f"% {plain(title)}; paired by session: {about(part)}"
        yield r"\begin{tabular}{lrrrr}"
        yield r"\toprule"
        yield rf" & {names} & difference [95\,\%] & sessions \\"
        yield r"\midrule"
        for line in lines:
            row = [tex(cell) for cell in (label_in(line, sort), *cells(line, pair.a))]
            yield rf"{' & '.join(row)} & {line.of.difference.count} \\"
        yield from (r"\bottomrule", r"\end{tabular}", "")


def _tables(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Part, str, str, list[Line]]]:
    for pair in pairs:
        for part in pair.parts:
            for sort, title, lines in sorted_out(part):
                yield pair, part, f"{title_of(pair, part)}: {title.lower()}", sort, lines
