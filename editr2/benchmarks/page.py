"""`report.html` of a benchmark: its headline, tables, what handed-on errors cost, film-strips."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.benchmarks import rows as scores
from editr2.benchmarks.measures import how_long, key_of, label_of
from editr2.benchmarks.passes import PASSES
from editr2.benchmarks.rows import Row
from editr2.benchmarks.strips import (
    Lane,
    Strip,
    Thumbnails,
    by_session,
    fitting,
    read_strips,
    session_score,
    view,
)
from editr2.benchmarks.summary import EXPOSED, IDENTITY, UNEXPOSED
from editr2.benchmarks.summary import FILE_NAME as SUMMARY
from editr2.benchmarks.text import ALL_JUDGED, VERBS, decimals, legend, score_tables, state_lines
from editr2.files import read_object
from editr2.judge import best_of
from editr2.report import pages
from editr2.report.charts import Chart
from editr2.report.data import plural
from editr2.report.dots import Series, dots, with_interval
from editr2.report.gallery import thin
from editr2.report.numbers import decimal
from editr2.report.paired import Estimate
from editr2.report.strips import SessionView

FILE_NAME = "report.html"
TEMPLATES = Path(__file__).parent / "templates"

ACCEPTED = "a file of `editr2 benchmark`"

MOST_SESSIONS = 48


def write_page(folder: Path, curves: Sequence[best_of.Curve] = ()) -> Path:
    """Of a benchmark's folder with `summary.json` and `scores.jsonl`; sessions are shown where it
    has `strips.jsonl`, and settings where it has `benchmark.json`. curves: of the best of several
    samples. Raises DataError for a file that is none."""
    summary = read_object(folder / SUMMARY, ACCEPTED)
    about = read_object(file, ACCEPTED) if (file := folder / IDENTITY).is_file() else {}
    rows = scores.read_rows(folder / scores.FILE_NAME)
    pictures, said = Thumbnails(), state_lines(summary)
    lost = state_lines(summary, {"failed": VERBS["failed"]})
    gallery = _gallery(rows, read_strips(folder), pictures)
    return pages.write_page(
        folder / FILE_NAME,
        "benchmark.html.j2",
        [TEMPLATES],
        title=summary["title"],
        editor=summary.get("editor"),
        facts=_facts(summary, about),
        judge=_judge(summary),
        cards=_cards(summary),
        unjudged=[line for line in lost if line != ALL_JUDGED],
        notes=[
            *(line for line in said if line not in lost or line == ALL_JUDGED),
            *pictures.notes(),
        ],
        legend=legend(summary),
        passes=[(way, PASSES[way].about if way in PASSES else "") for way in summary["passes"]],
        exposure=_exposure(summary),
        lengths=_lengths(summary),
        tables=score_tables(summary),
        without_references=summary["without_references"],
        against=_against(summary.get("against")),
        best=[best_of.table(curves), *best_of.charts(curves)] if curves else [],
        gallery=gallery,
        settings=_settings(about),
        versions=list(_made(about, "versions").items()),
    )


# -------------------------------------------------------------------------------------------- facts


def _made(about: Mapping[str, Any], what: str) -> Any:
    """Of the images, or of the scores where they were found."""
    parts = (about.get(part) or {} for part in ("generated", "judged"))
    return next((made[what] for part in parts if (made := part.get("made"))), None) or {}


def _against(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a second judge says of the same images."""
    if summary is None:
        return None
    tables, notes = score_tables(summary), state_lines(summary)
    return {"judge": _judge(summary), "tables": tables, "notes": notes}


def _settings(about: Mapping[str, Any]) -> str:
    """What the images depend on, a line each."""
    settings = (about.get("generated") or {}).get("settings") or {}
    return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in settings.items())


def _facts(summary: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str]]:
    lengths = summary["lengths"]
    told = ", ".join(f"{count} of {turns}" for turns, count in lengths.items())
    if len(lengths) == 1:
        [turns] = lengths
        told = f" of {how_long(turns)}"
    else:
        told = f": {told} turns"
    facts = {
        "Editor": summary.get("editor"),
        "Sessions": f"{summary['sessions']}{told}",
        "Samples": summary["samples"] if summary["samples"] > 1 else None,
        "Passes": ", ".join(summary["passes"]),
        "Seed": summary["judge"].get("seed"),
        "Device": _made(about, "device") or None,
        "Date": str(_made(about, "date") or "")[:10] or None,
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _judge(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    judged = summary["judge"]
    facts = {str(name): str(value) for name, value in (judged.get("facts") or {}).items()}
    title = {"reward": str(judged["title"])} if judged.get("title") else {}
    return list((title | facts).items())


@dataclass(frozen=True)
class Card:
    title: str
    value: str
    note: str


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    headline, places = summary["headline"], decimals(summary["scale"])
    cards = []
    for one in headline["of"]:
        if one["withheld"]:
            cards.append(Card(one["label"], "–", f"not given: {one['withheld']}"))
            continue
        count = f"{one['n']} {plural('session', one['n'])}"
        ends = ", ".join(decimal(one[end], places) for end in ("low", "high"))
        cards.append(Card(one["label"], decimal(one["value"], places), f"[{ends}] · {count}"))
    return cards


# ------------------------------------------------------------------------------------------- charts


def _estimate(one: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if one[k] is None else one[k] for k in ("value", "low", "high"))
    return Estimate(value, low, high, one["n"])


def _exposure(summary: Mapping[str, Any]) -> list[Chart]:
    """Every measure by turn in each pass, and what is lost between them at the last turn."""
    passes = {way: of["measures"] for way, of in summary["passes"].items()}
    ways = [way for way in (EXPOSED, *UNEXPOSED) if way in passes]
    if EXPOSED not in ways or len(ways) < 2:
        return []
    panels, notes, categories = [], {}, set[int]()
    for name in dict.fromkeys(one["name"] for one in passes[EXPOSED].values()):
        series = []
        for colour, way in enumerate(ways):
            by_turn = {
                str(one["turn"]): _estimate(one)
                for one in passes[way].values()
                if one["name"] == name and one["group"] is None and isinstance(one["turn"], int)
            }
            if by_turn:
                series.append(Series(way, by_turn, colour, hollow=way != EXPOSED))
                categories |= set(map(int, by_turn))
        if len(series) > 1:
            title = label_of(name)
            panels.append((title, series))
            notes[title] = _lost(summary, name)
    turns = [str(turn) for turn in sorted(categories)]
    return dots(panels, turns, "turn", notes, scale=summary["scale"])


def _lost(summary: Mapping[str, Any], name: str) -> str:
    """The paired difference at the last turn."""
    said = []
    for way, of in summary["exposure"].items():
        one = of.get(key_of(name, "last"))
        if one is not None and one["value"] is not None:
            text = with_interval(_estimate(one), decimals(summary["scale"]), sign=True)
            said.append(f"{text} against {way}")
    return f"Last turn: {'; '.join(said)}." if said else ""


def _lengths(summary: Mapping[str, Any]) -> list[Chart]:
    """The last turn of sessions by their length."""
    lengths = list(summary["lengths"])
    if len(lengths) < 2:
        return []
    ways, panels = list(summary["passes"]), []
    measures = summary["passes"][ways[0]]["measures"]
    for name in dict.fromkeys(one["name"] for one in measures.values()):
        series = []
        for colour, way in enumerate(ways):
            of = summary["passes"][way]["measures"]
            found = {
                turns: _estimate(one)
                for turns in lengths
                if (one := of.get(key_of(name, "last", f"turns={turns}")))
            }
            if found:
                series.append(Series(way, found, colour, hollow=way != EXPOSED))
        if series:
            panels.append((label_of(name, "last"), series))
    return dots(panels, lengths, "turns of a session", scale=summary["scale"])


# ------------------------------------------------------------------------------------------- strips


@dataclass(frozen=True)
class Gallery:
    """groups: (id on the page, heading, sessions in all, those shown)."""

    groups: Sequence[tuple[str, str, int, Sequence[SessionView]]]
    total: int

    @property
    def views(self) -> list[SessionView]:
        return [view for *_, views in self.groups for view in views]


def _gallery(
    rows: Sequence[Row], strips: Mapping[str, Strip], pictures: Thumbnails
) -> Gallery | None:
    first = [row for row in rows if row.sample == 1]
    of_way = {
        way: by_session(row for row in first if row.way == way)
        for way in dict.fromkeys(row.way for row in first)
    }
    lanes = [Lane(way, way, strips, of) for way, of in of_way.items()]
    sessions = by_session(first)
    if not strips or not lanes:
        return None
    scored = {name: session_score(lanes[0].rows.get(name, ())) for name in sessions}
    objected = [
        name
        for name, of in sessions.items()
        if any(row.state in ("failed", "missing") for row in of)
    ]
    apart = set(objected)
    ordered = sorted(
        (name for name in sessions if name not in apart),
        key=lambda name: -math.inf if (score := scored[name]) is None else score,
        reverse=True,
    )

    def build(most: int) -> Gallery:
        def views(names: Sequence[str]) -> list[SessionView]:
            return [
                view(name, lanes, pictures, change=f"mean score {decimal(scored[name])}")
                for name in names
            ]

        groups = []
        if objected:
            room = max(1, most // 4, most - len(ordered))
            groups.append(("unjudged", "Failed or missing", len(objected), thin(objected, room)))
        room = most - sum(len(names) for *_, names in groups)
        if len(ordered) <= room:
            groups.append(("all", "From best to worst", len(ordered), ordered))
        else:
            ends = max(1, room // 4)
            between = ordered[ends:-ends]
            groups += [
                ("best", "Best", ends, ordered[:ends]),
                ("between", "In between", len(between), thin(between, max(0, room - 2 * ends))),
                ("worst", "Worst", ends, ordered[-ends:]),
            ]
        shown = [(name, title, total, views(names)) for name, title, total, names in groups]
        return Gallery([group for group in shown if group[2]], len(sessions))

    return fitting(build, lambda gallery: gallery.views, MOST_SESSIONS)
