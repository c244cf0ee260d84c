"""The tables of a benchmark's summary, for the terminal and for the page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from editr2.benchmarks.measures import When, group_label, how_long, key_of, label_of
from editr2.benchmarks.summary import too_many
from editr2.errors import plain
from editr2.judge.text import WIDTH, Table, cut, laid_out
from editr2.report.data import MODES, plural
from editr2.report.dots import ONE

ALL_JUDGED = "every turn has every score"

MEANS = {
    "IF": "instruction following, this turn's edit is done",
    "CC": "content consistency, nothing else changed",
    "GA": "global awareness, right after every turn so far",
    "SC": "semantic consistency, done and nothing else changed",
    "PQ": "perceptual quality",
}
"""What names of scores that are the field's stand for."""

MOST_TURNS = 4
"""Of more the last alone is shown by mode."""

Of = Mapping[str, Any]
"""The object of a measure or of a difference, as `summary` has it."""


def decimals(scale: float) -> int:
    """Of numbers up to `scale`."""
    return 3 if scale <= 1 else 2


def number(of: Of | None, scale: float, *, signed: bool = False) -> str:
    """A value with its interval, which one session has not; `-` where there is none."""
    if of is None or of.get("value") is None:
        return "-"
    sign = "+" if signed else ""
    value, low, high = (
        f"{round(of[name], decimals(scale)) + 0.0:{sign}.{decimals(scale)}f}"
        for name in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]" if of.get("n") != 1 else f"{value} [{ONE}]"


def tables(summary: Mapping[str, Any], *, brief: bool = False) -> list[Table]:
    """Headline; of every pass its scores by turn, length, mode and task; exposure; references.
    brief: without what only the page has room for."""
    found = (_headline(summary), *score_tables(summary, brief=brief))
    return [table for table in found if table.rows]


def score_tables(summary: Mapping[str, Any], *, brief: bool = False) -> list[Table]:
    """All but the headline."""
    scale, found = summary["scale"], list[Table]()
    for way, of in summary["passes"].items():
        of_pass = list(_of_pass(way, of["measures"], scale))
        # Of another pass than the headline's its difference says the rest.
        found += of_pass[:2] if brief and way != summary["headline"]["pass"] else of_pass
    for other, differences in summary["exposure"].items():
        found += _exposure(other, differences, scale)
    if summary["references"]:
        found.append(_references(summary))
    return [table for table in found if table.rows]


def lines(summary: Mapping[str, Any], files: Iterable[object] = ()) -> list[str]:
    """All of it for a terminal, at most 100 columns wide. files: that were written."""
    said = about_lines(summary)
    for table in tables(summary, brief=True):
        said += ["", *laid_out(table, WIDTH)]
    said += ["", *(part for line in state_lines(summary) for part in _wrapped(line))]
    if why := summary["without_references"]:
        said += _wrapped(f"Published figures are not shown beside: {why}.")
    return said + [f"wrote {file}" for file in files]


def legend(summary: Mapping[str, Any]) -> str:
    """What the names of its scores stand for, of those that are the field's, and how high they
    go."""
    have = {name for of in summary["passes"].values() for name in of["counts"]}
    said = [f"{name}: {means}" for name, means in MEANS.items() if name in have]
    if summary["scale"] != 1:
        said.insert(0, f"scores are out of {summary['scale']:g}")
    return "; ".join(said)


def about_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was judged, by whom."""
    lengths = ", ".join(
        f"{count} of {how_long(length)}"
        if len(summary["lengths"]) > 1
        else f"of {how_long(length)}"
        for length, count in summary["lengths"].items()
    )
    many = f", {summary['samples']} samples of each" if summary["samples"] > 1 else ""
    sessions = summary["sessions"]
    said = [
        summary["title"],
        f"{sessions} {plural('session', sessions)}: {lengths}{many}",
    ]
    said += [f"{name}: {summary[name]}" for name in ("editor", "seed") if name in summary]
    judge = summary["judge"]
    if judge.get("title"):
        said.append(f"judged by {judge['title']}")
    said += [f"  {name}: {text}" for name, text in (judge.get("facts") or {}).items()]
    said += [told] if (told := legend(summary)) else []
    return [part for line in said for part in _wrapped(line)]


VERBS = {"failed": "failed", "not_applicable": "does not apply"}


def state_lines(summary: Mapping[str, Any], verbs: Mapping[str, str] = VERBS) -> list[str]:
    """What was not judged, with the commonest reasons, and which images there are not; nothing of
    passes where everything was. verbs: of the states that are counted."""
    said = []
    for way, of in summary["passes"].items():
        missing = of["missing"]
        if missing["images"]:
            first = "; ".join(missing["first"])
            more = missing["images"] - len(missing["first"])
            said.append(
                f"{way}: {missing['images']} of {missing['of']} images are missing: {first}"
                + (f"; {more} more" if more > 0 else "")
            )
        for metric, counts in of["counts"].items():
            total = sum(counts.values())
            for state, verb in verbs.items():
                if counts[state]:
                    share = f"{counts[state]} of {total} ({counts[state] / total:.1%})"
                    why = _listed(of["reasons"][metric][state], counts[state])
                    said.append(f"{way}: {metric} {verb}: {share}: {why}")
    return said or [ALL_JUDGED] if summary["passes"] else ["nothing was judged"]


def _listed(reasons: Mapping[str, int], total: int) -> str:
    shown = list(reasons.items())[:3]
    rest = total - sum(count for _, count in shown)
    return "; ".join(f"{cut(why)} ({count})" for why, count in shown) + (
        f"; other reasons ({rest})" if rest else ""
    )


def _headline(summary: Mapping[str, Any]) -> Table:
    headline = summary["headline"]
    rows = [
        (
            of["label"],
            ["withheld" if of["withheld"] else number(of, summary["scale"]), str(of.get("n", 0))],
        )
        for of in headline["of"]
    ]
    withheld = [
        f"{of['label']} is withheld: {of['withheld']}." for of in headline["of"] if of["withheld"]
    ]
    note = " ".join([*withheld, "95 % intervals by a bootstrap over sessions."])
    title = f"Headline ({headline['pass']})" if headline["pass"] else "Headline"
    return Table(title, ["value", "sessions"], rows, note)


def _of_pass(way: str, measures: Mapping[str, Of], scale: float) -> Iterator[Table]:
    turns, names = turns_of(measures), names_of(measures)
    lengths, modes, tasks = (groups_of(measures, sort) for sort in ("turns", "mode", "task"))

    def table(
        title: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], note: str = ""
    ) -> Table:
        """rows: with the keys of their cells."""
        return _table(f"{title}, {way}", head, rows, measures, scale, note=note)

    # Those by turn, or of all images where turns are none of their matter, come first.
    yield table("Scores", ["all images"], [(label_of(name), [key_of(name)]) for name in names])
    whens: list[When] = [*turns, *(["last"] if lengths else [])]  # type: ignore[list-item]
    heads = [f"{when} turn" if when == "last" else f"turn {when}" for when in whens]
    by_turn = [(label_of(name), [key_of(name, when) for when in whens]) for name in names]
    yield table("By turn", heads, by_turn)
    yield table(
        "Last turn by length",
        [group_label(length) for length in lengths],
        [(label_of(name), [key_of(name, "last", length) for length in lengths]) for name in names],
    )
    if len(turns) > MOST_TURNS:
        whens, heads = ["last"], ["last turn"]
    yield table(
        "By mode",
        heads,
        [
            (label_of(name, None, mode), [key_of(name, when, mode) for when in whens])
            for name in names
            for mode in modes
        ],
        "; ".join(f"{mode}: {said}" for mode, said in MODES.items()),
    )
    by_task = [
        name for name in names if any(key_of(name, None, task) in measures for task in tasks)
    ]
    yield table(
        "By task, all turns" if len(turns) > 1 else "By task",
        [label_of(name) for name in by_task],
        [(group_label(task), [key_of(name, None, task) for name in by_task]) for task in tasks],
    )


def _exposure(other: str, differences: Mapping[str, Of], scale: float) -> Iterator[Table]:
    turns, lengths = turns_of(differences), groups_of(differences, "turns")
    names = names_of(differences)
    title = f"Exposure, multipass less {other}"
    yield _table(
        f"{title}, by turn",
        [f"turn {turn}" for turn in turns],
        [(label_of(name), [key_of(name, turn) for turn in turns]) for name in names],
        differences,
        scale,
        signed=True,
        note="Of the sessions that both rest on. Below 0 is what the editor loses by going on from "
        "its own outputs.",
    )
    yield _table(
        f"{title}, last turn by length",
        [group_label(length) for length in lengths],
        [(label_of(name), [key_of(name, "last", length) for length in lengths]) for name in names],
        differences,
        scale,
        signed=True,
    )


def _table(
    title: str,
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    of: Mapping[str, Of],
    scale: float,
    *,
    signed: bool = False,
    note: str = "",
) -> Table:
    """rows: with the keys of their cells; those that there is nothing of are left out."""
    cells = [
        (name, [number(of.get(key), scale, signed=signed) for key in keys])
        for name, keys in rows
        if any(key in of for key in keys)
    ]
    return Table(title, head, cells, note)


def _references(summary: Mapping[str, Any]) -> Table:
    scale, way = summary["scale"], summary["headline"]["pass"]
    here = summary["passes"].get(way, {}).get("measures", {})
    rows = []
    for one in summary["references"]:
        of = here.get(one["measure"])
        label = of["label"] if of else one["measure"]
        ours = "withheld" if of and too_many(of) else number(of, scale)
        rows.append((one["name"], [label, f"{one['value']:.{decimals(scale)}f}", ours]))
    sources = "; ".join(dict.fromkeys(one["source"] for one in summary["references"]))
    note = f"Of others, as they report them, on the whole set: {sources}."
    return Table("Figures of others", ["measure", "theirs", "here"], rows, note)


def names_of(measures: Mapping[str, Of]) -> list[str]:
    return list(dict.fromkeys(of["name"] for of in measures.values()))


def turns_of(measures: Mapping[str, Of]) -> list[int]:
    return sorted({of["turn"] for of in measures.values() if isinstance(of["turn"], int)})


def groups_of(measures: Mapping[str, Of], sort: str) -> list[str]:
    """In their order."""
    start = f"{sort}="
    found = (of["group"] for of in measures.values() if (of["group"] or "").startswith(start))
    return list(dict.fromkeys(found))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(plain(text), WIDTH, subsequent_indent="  ", break_on_hyphens=False)
