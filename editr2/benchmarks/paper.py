"""A table for a paper, Markdown and LaTeX (booktabs), from one or several summaries.

A row is an editor and pass, a column a number of one turn (of one length of sessions, where there
are several; of one kind of edit, where a benchmark has one score). A number of which more than
`summary.MOST_UNKNOWN` failed or are missing is a dash. Figures of others have a dagger, and stand
there only where all summaries may have them beside (`summary.references`). Nothing is bold by
itself: whether one of two is better is told by the interval of their difference, which is
`compare`'s to say (`bold`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.benchmarks.measures import group_label, how_long, key_of, label_of
from editr2.benchmarks.summary import MOST_UNKNOWN, told, too_many
from editr2.benchmarks.text import decimals, groups_of, names_of, turns_of
from editr2.files import write_lines

SHOWN: Mapping[str, Sequence[str]] = {
    "edival": ("success", "CC", "O_of_means"),
    "gedit": ("SC", "PQ", "O"),
}
"""By kind of measures the names that papers have; of others all."""

THEIRS = "†"
NONE = "–"


@dataclass(frozen=True)
class Column:
    """top: heads columns that stand together. sub: this one. key: of the measure."""

    top: str
    sub: str
    key: str


@dataclass(frozen=True)
class Line:
    """A row. cells: one a column, None where there is no number. theirs: of others. bold: places of
    cells."""

    name: str
    cells: Sequence[str | None]
    theirs: bool = False
    bold: Collection[int] = ()


@dataclass(frozen=True)
class PaperTable:
    """title: what was measured. notes: below it."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[str]


def paper_table(
    summaries: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    bold: Collection[tuple[int, str]] = (),
) -> PaperTable:
    """summaries: of one benchmark. names: of the editors, unless they are the summaries' own. bold:
    (place of the summary, key of the measure) of numbers of the headline's pass."""
    first = summaries[0]
    columns = _columns(first)
    called = names or [str(summary.get("editor", "editor")) for summary in summaries]
    found, gone, widest = [], False, 0.0
    for place, (name, summary) in enumerate(zip(called, summaries, strict=True)):
        for way, of in summary["passes"].items():
            head = way == summary["headline"]["pass"]
            measured = [of["measures"].get(column.key) for column in columns]
            held = [one if one is None or not too_many(one) else None for one in measured]
            gone |= held != measured
            values = [one for one in held if one is not None and one["value"] is not None]
            sides = [one["high"] - one["value"] for one in values]
            sides += [one["value"] - one["low"] for one in values]
            widest = max([widest, *sides])
            strong = [n for n, column in enumerate(columns) if head and (place, column.key) in bold]
            title = f"{name} ({way})" if len(summary["passes"]) > 1 else name
            cells = [_cell(one and one["value"], summary) for one in held]
            found.append(Line(title, cells, bold=strong))
    theirs = first["references"]
    if any(summary["references"] != theirs for summary in summaries):
        theirs = []
    for editor in dict.fromkeys(one["name"] for one in theirs):
        of = {one["measure"]: one["value"] for one in theirs if one["name"] == editor}
        cells = [_cell(of.get(column.key), first) for column in columns]
        if any(cells):
            found.append(Line(editor, cells, theirs=True))
    return PaperTable(_title(summaries), columns, found, _notes(first, found, theirs, gone, widest))


def markdown(table: PaperTable) -> str:
    """As one table with a line of heads."""
    heads = [md(f"{column.top} {column.sub}".strip()) for column in table.columns]
    said = [
        f"{md(table.title)}\n",
        "| " + " | ".join(["", *heads]) + " |",
        "|" + "|".join([" :-- ", *[" --: "] * len(heads)]) + "|",
    ]
    for line in table.lines:
        cells = [
            f"**{cell}**" if cell and n in line.bold else cell or NONE
            for n, cell in enumerate(line.cells)
        ]
        said.append("| " + " | ".join([md(line.name) + THEIRS * line.theirs, *cells]) + " |")
    return "\n".join([*said, *(f"\n{md(note)}" for note in table.notes)]) + "\n"


def latex(table: PaperTable) -> str:
    """A `table` for booktabs."""
    spans: list[tuple[str, int]] = []
    for column in table.columns:
        top = column.top if column.sub else ""
        if spans and spans[-1][0] == top:
            spans[-1] = (top, spans[-1][1] + 1)
        else:
            spans.append((top, 1))
    tops, rules, place = [], [], 2
    for top, width in spans:
        tops.append(f"\\multicolumn{{{width}}}{{c}}{{{tex(top)}}}")
        if top:
            rules.append(f"\\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    heads = [" & ".join(["", *tops]) + " \\\\", " ".join(rules)] if rules else []
    subs = [tex(column.sub or column.top) for column in table.columns]
    body = []
    for n, line in enumerate(table.lines):
        if line.theirs and n and not table.lines[n - 1].theirs:
            body.append("\\midrule")
        cells = [
            f"\\textbf{{{cell}}}" if cell and n in line.bold else tex(cell or NONE)
            for n, cell in enumerate(line.cells)
        ]
        name = tex(line.name) + ("\\textsuperscript{\\dag}" if line.theirs else "")
        body.append(" & ".join([name, *cells]) + " \\\\")
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{tex(' '.join([table.title + '.', *table.notes]))}}}",
            f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            "\\toprule",
            *heads,
            " & ".join(["", *subs]) + " \\\\",
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def write(folder: Path, table: PaperTable) -> list[Path]:
    """Both forms, each whole or not at all. Returns their files."""
    for name, form in FORMS.items():
        write_lines(folder / name, [form(table)])
    return [folder / name for name in FORMS]


FORMS: Mapping[str, Callable[[PaperTable], str]] = {"table.md": markdown, "table.tex": latex}
"""By file."""


def _columns(summary: Mapping[str, Any]) -> list[Column]:
    of = summary["passes"].get(summary["headline"]["pass"], {}).get("measures", {})
    names = [name for name in SHOWN.get(summary["measures"], names_of(of)) if name in names_of(of)]
    turns, lengths, tasks = turns_of(of), groups_of(of, "turns"), groups_of(of, "task")
    if lengths:
        found = [(name, group_label(g), key_of(name, "last", g)) for name in names for g in lengths]
    elif turns:
        found = [(name, f"T{turn}", key_of(name, turn)) for name in names for turn in turns]
    else:
        found = [(name, "", key_of(name)) for name in names]
        if len({name.removesuffix("_of_images") for name in names}) == 1:
            found = [("", group_label(t), key_of(names[0], None, t)) for t in tasks] + found
    return [Column(label_of(name), sub, key) for name, sub, key in found if key in of]


def _title(summaries: Sequence[Mapping[str, Any]]) -> str:
    lengths = list(dict.fromkeys(length for of in summaries for length in of["lengths"]))
    turns = f" of {how_long(lengths[0])}" if len(lengths) == 1 else ""
    counts = dict.fromkeys(str(of["sessions"]) for of in summaries)
    return f"{summaries[0]['title']}, {' and '.join(counts)} sessions{turns}"


def _notes(
    summary: Mapping[str, Any],
    found: Sequence[Line],
    theirs: Sequence[Mapping[str, Any]],
    gone: bool,
    widest: float,
) -> list[str]:
    facts = summary["judge"].get("facts") or {}
    judges = ", ".join(told(facts, "judge"))
    said = [f"Judged by {judges or summary['judge'].get('title') or 'an unnamed judge'}."]
    if widest:
        digits = decimals(summary["scale"])
        said.append(
            f"95 % intervals (a bootstrap over sessions) are at most {widest:.{digits}f} to "
            f"either side."
        )
    if gone:
        said.append(f"{NONE}: more than {MOST_UNKNOWN:.0%} failed or are missing.")
    if any(line.theirs for line in found):
        sources = "; ".join(dict.fromkeys(one["source"] for one in theirs))
        said.append(f"{THEIRS} Figures of others, as they report them: {sources}.")
    return said


def _cell(value: float | None, summary: Mapping[str, Any]) -> str | None:
    return None if value is None else f"{value:.{decimals(summary['scale'])}f}"


def md(text: str) -> str:
    """Text in a cell of Markdown."""
    return re.sub(r"([\\|*_`<\[])", r"\\\1", " ".join(text.split()))


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    NONE: "--",
    "−": "$-$",
    THEIRS: r"\textsuperscript{\dag}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}


def tex(text: str) -> str:
    """Text in a cell of LaTeX."""
    return "".join(_TEX.get(mark, mark) for mark in " ".join(text.split()))
