"""The numbers of a benchmark from its rows: `summary.json`, and what a terminal prints of it.

    {"title": …, "editor": …, "sessions": 360, "lengths": {"3": 360}, "samples": 1,
     "measures": "turns", "scale": 1.0,
     "judge": {"names": […], "facts": {…}, "released": false}, "seed": 0, …,
     "headline": {"pass": "multipass", "of": [{"key": "GA@last", …, "withheld": null}]},
     "passes": {"multipass": {"counts": {"IF": {"judged": …, "not_applicable": …, "failed": …,
                              "missing": …}}, "reasons": {"IF": {"failed": {…}}},
                              "missing": {"images": 0, "of": 1080, "first": []},
                              "measures": {"IF@2": {…}}}},
     "exposure": {"exact": {"GA@2": {…}}}, "references": […], "without_references": "why" | null}

A measure is `{"label", "name", "turn", "group", "value", "low", "high", "n", "judged",
"not_applicable", "failed", "missing"}`: value and its 95 % interval by a bootstrap over sessions,
in the benchmark's scale, null where nothing was judged; n sessions that it rests on; and its items
by state. An item that should be there and has no row is missing. Exposure is the pass less the one
that hands no error on, of the sessions that both rest on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.benchmarks.measures import Measure, label_of, measures
from editr2.benchmarks.rows import STATES, Row
from editr2.benchmarks.table import Benchmark, Reference
from editr2.files import write_lines
from editr2.judge.text import cut
from editr2.report.paired import Estimate, difference, estimate
from editr2.sessions import Session

FILE_NAME = "summary.json"
IDENTITY = "benchmark.json"
"""In the same folder: what numbers depend on (`run`)."""

MOST_UNKNOWN = 0.02
"""Of what a headline rests on, at most so much may have failed or be missing."""

REASONS = 5
FIRST_MISSING = 10
"""So many are listed."""

ABOUT = ("benchmark", "editor", "seed", "made", "date")
"""What a summary says of `benchmark.json`, beside the judge."""

EXPOSED, UNEXPOSED = "multipass", ("exact", "singlepass")
"""The pass in which errors are handed on, and those in which none is."""


def summarise(
    rows: Iterable[Row],
    sessions: Sequence[Session],
    benchmark: Benchmark,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The object of `summary.json`. sessions: all that are expected. about: the object of
    `benchmark.json`, of which `judged` says who judged."""
    ids = [session.id for session in sessions]
    by_pass = _completed(rows, sessions)
    found = {way: measures(benchmark.measures, of, ids) for way, of in by_pass.items()}
    scale = benchmark.scale
    passes = {
        way: _of_rows(of)
        | {"measures": {key: _measured(one, scale) for key, one in found[way].items()}}
        for way, of in by_pass.items()
    }
    judged = about.get("judged") or {}
    shown, why = references(benchmark, judged.get("facts") or {})
    lengths = Counter(len(session.turns) for session in sessions)
    summary = {
        "title": benchmark.title,
        **{name: about[name] for name in ABOUT if name in about},
        "sessions": len(ids),
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "samples": max((row.sample for of in by_pass.values() for row in of), default=0),
        "measures": benchmark.measures,
        "scale": scale,
        "judge": judged,
        "headline": _headline(benchmark, by_pass, found),
        "passes": passes,
        "exposure": _exposure(found, scale),
        "references": [vars(one) | {"prompts": list(one.prompts)} for one in shown],
        "without_references": why,
    }
    return dict(_plain(summary))


def write(file: Path, summary: Mapping[str, Any]) -> None:
    """Whole, or not at all."""
    text = json.dumps(_plain(summary), indent=1, ensure_ascii=False, allow_nan=False)
    write_lines(file, [text + "\n"])


def too_many(counts: Mapping[Any, Any]) -> bool:
    """Whether more failed or are missing than a headline may miss. counts: by state, such as a
    measure's."""
    unknown = counts["failed"] + counts["missing"]
    return bool(unknown > MOST_UNKNOWN * sum(counts[state] for state in STATES))


def references(
    benchmark: Benchmark, facts: Mapping[str, str]
) -> tuple[list[Reference], str | None]:
    """Figures of others that may stand beside, and of those that may not, why. facts: of the
    judge."""
    shown, why = [], None
    for one in benchmark.references:
        objection = _objection(one, facts)
        if objection is None:
            shown.append(one)
        why = why or objection
    return shown, why


def _objection(one: Reference, facts: Mapping[str, str]) -> str | None:
    """Why a figure may not be compared. A reward that has no rules but the released ones says
    nothing of rules."""
    judges, rules = told(facts, "judge"), told(facts, "rules")
    digests = [found[1] for t in told(facts, "prompts") if (found := re.search(r"\((\w+)\)$", t))]
    if not judges or not all(one.judge.lower() in judge.lower() for judge in judges):
        return f"the judge is {', '.join(judges) or 'none'}, theirs {one.judge}"
    if any(rule != "as released" for rule in rules):
        return f"the rules are {', '.join(rules)}, theirs as released (released: true)"
    if not digests or not set(digests) <= set(one.prompts):
        return (
            f"the prompts are {', '.join(told(facts, 'prompts')) or 'none'}, theirs those of the "
            f"release (prompts: its checkout)"
        )
    return None


def told(facts: Mapping[str, str], what: str) -> list[str]:
    """A fact of every judge: of several, it stands behind the names of their scores."""
    return list(dict.fromkeys(t for name, t in facts.items() if name.rpartition(": ")[2] == what))


def _completed(rows: Iterable[Row], sessions: Sequence[Session]) -> dict[str, list[Row]]:
    """By pass, those of the sessions, and one for each that should be there and is not."""
    known = {session.id for session in sessions}
    by_pass: dict[str, list[Row]] = {}
    for row in rows:
        if row.image in known:
            by_pass.setdefault(row.way, []).append(row)
    for way, given in by_pass.items():
        have = {(row.image, row.sample, row.metric, row.turn, row.asked) for row in given}
        samples = sorted({row.sample for row in given})
        asked: dict[str, set[tuple[int, int]]] = {}
        for row in given:
            asked.setdefault(row.metric, set()).add((row.turn, row.asked))
        for session in sessions:
            length = len(session.turns)
            own = {(t, t) for t in range(1, length + 1)}
            given += [
                _missing(session, way, sample, metric, turn, about)
                for metric, pairs in asked.items()
                for turn, about in sorted(own | {pair for pair in pairs if pair[0] <= length})
                for sample in samples
                if (session.id, sample, metric, turn, about) not in have
            ]
    return by_pass


def _missing(session: Session, way: str, sample: int, metric: str, turn: int, asked: int) -> Row:
    return Row(
        session.id,
        way,
        turn,
        asked,
        metric,
        "missing",
        None,
        "there is no row of it",
        session.turns[asked - 1].task,
        session.mode,
        len(session.turns),
        sample,
    )


def _of_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and reasons by metric, and which images there are not."""
    states: dict[str, Counter[str]] = {}
    reasons: dict[str, dict[str, Counter[str]]] = {}
    images: dict[tuple[str, int, int], bool] = {}
    for row in rows:
        states.setdefault(row.metric, Counter())[row.state] += 1
        if row.state != "judged":
            of = reasons.setdefault(row.metric, {}).setdefault(row.state, Counter())
            of[row.reason or "no reason was given"] += 1
        image = (row.image, row.sample, row.turn)
        images[image] = images.get(image, False) or row.state == "missing"
    gone = [image for image, missing in images.items() if missing]
    several = any(sample > 1 for _, sample, _ in images)
    first = [
        f"{name}, turn {turn}" + (f", sample {sample}" if several else "")
        for name, sample, turn in gone[:FIRST_MISSING]
    ]
    return {
        "counts": {
            metric: {state: count[state] for state in STATES} for metric, count in states.items()
        },
        "reasons": {
            metric: {state: dict(why.most_common(REASONS)) for state, why in of.items()}
            for metric, of in reasons.items()
        },
        "missing": {"images": len(gone), "of": len(images), "first": first},
    }


def _measured(measure: Measure, scale: float) -> dict[str, Any]:
    return _named(measure) | _scaled(estimate(measure.statistic), scale) | dict(measure.counts)


def _named(measure: Measure) -> dict[str, Any]:
    return {
        "label": measure.label,
        "name": measure.name,
        "turn": measure.turn,
        "group": measure.group,
    }


def _scaled(found: Estimate, scale: float) -> dict[str, Any]:
    return {
        name: round(scale * value, 6) if not math.isnan(value) else None
        for name, value in (("value", found.value), ("low", found.low), ("high", found.high))
    } | {"n": found.count}


def _headline(
    benchmark: Benchmark,
    by_pass: Mapping[str, Sequence[Row]],
    found: Mapping[str, Mapping[str, Measure]],
) -> dict[str, Any]:
    way = next((way for way in (*benchmark.passes, *by_pass) if way in by_pass), None)
    of = found.get(way or "", {})
    keys = list(benchmark.headline)
    if of and not any(key in of for key in keys):
        # Of a reward of the user's, whose scores have other names than the benchmark's own has.
        whole = [one for one in of.values() if one.group is None]
        keys = [one.key for one in whole if one.turn in ("last", None)]
    said = []
    for key in keys:
        one = of.get(key)
        none = "this reward gives no such score" if of else "nothing was judged"
        why = _withheld(one, by_pass[way]) if one and way else none
        number = _measured(one, benchmark.scale) if one else {"label": _label(key)}
        if why is not None:
            number |= {"value": None, "low": None, "high": None}
        said.append({"key": key, **number, "withheld": why})
    return {"pass": way, "of": said}


def _label(key: str) -> str:
    """Of a measure of which there is nothing."""
    name, _, turn = key.partition("@")
    return label_of(name, "last" if turn == "last" else int(turn) if turn else None)


def _withheld(measure: Measure, rows: Sequence[Row]) -> str | None:
    """Why a number is none for a headline."""
    unknown, expected = measure.unknown, measure.expected
    if not measure.statistic.present.any():
        return f"none of {expected} was judged"
    if not too_many(measure.counts):
        return None
    counts = ((measure.counts["failed"], "failed"), (measure.counts["missing"], "are missing"))
    said = " and ".join(f"{count} {verb}" for count, verb in counts if count)
    own = [row for row in rows if row.metric == measure.name] or rows  # some rest on several
    reasons = Counter(row.reason for row in own if row.state == "failed" and row.reason)
    most = f"; most often: {cut(reasons.most_common(1)[0][0])}" if reasons else ""
    return (
        f"of {expected} {said} ({unknown / expected:.1%}, a headline may miss "
        f"{MOST_UNKNOWN:.0%}){most}"
    )


def _exposure(
    found: Mapping[str, Mapping[str, Measure]], scale: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every measure of a turn that both passes have: the one less the other."""
    exposed = found.get(EXPOSED, {})
    return {
        other: {
            key: _named(one)
            | _scaled(difference(found[other][key].statistic, one.statistic), scale)
            for key, one in exposed.items()
            if key in found[other]
            and one.turn is not None
            and (one.group is None or one.group.startswith("turns="))
        }
        for other in UNEXPOSED
        if exposed and found.get(other)
    }


def _plain(thing: Any) -> Any:
    """As JSON has it: what is no number is null."""
    if isinstance(thing, Mapping):
        return {str(key): _plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        return [_plain(value) for value in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return None
    return thing if isinstance(thing, str | int | float | bool | None) else str(thing)
