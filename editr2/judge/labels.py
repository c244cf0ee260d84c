"""What people said of outputs: a file of JSON objects, one a line.

    {"id": "kitchen", "turn": 1, "score": 4}                      a score, on any scale
    {"id": "kitchen", "turn": 1, "output": "b", "score": 2}       of one of several siblings
    {"id": "kitchen", "turn": 1, "better": "a", "worse": "b"}     a pair of siblings

`turn` counts from 1. `output`, `better` and `worse` are names of outputs (`outputs.output_names`).
`name`: the score that the label speaks of, such as IF; without, it is held against each of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.errors import DataError, shown
from editr2.judge.outputs import Output, some
from editr2.sessions.records import lines_of, parse_object
from editr2.sessions.session import kind

_POINT = ("id", "turn", "score", "output", "name")
_PAIR = ("id", "turn", "better", "worse", "name")


@dataclass(frozen=True)
class Labels:
    """points: (output, turn, score); pairs: (better output, worse output, turn). Each by the score
    that it speaks of, None for all; outputs by their place, turns from 0."""

    points: Mapping[str | None, list[tuple[int, int, float]]]
    pairs: Mapping[str | None, list[tuple[int, int, int]]]


def read_labels(path: str, outputs: Sequence[Output], names: Sequence[str]) -> Labels:
    """names: of the scores. Raises DataError, `file:line: field: problem (accepted: …)`, for the
    first thing that is wrong."""
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for place, known in enumerate(outputs):
        places[known.session.id][known.name] = place
    points: dict[str | None, list[tuple[int, int, float]]] = defaultdict(list)
    pairs: dict[str | None, list[tuple[int, int, int]]] = defaultdict(list)
    for number, raw in lines_of(Path(path)):
        try:
            record = parse_object(raw)
            for problem in _problems(record, places, outputs, names):
                raise DataError(problem)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        siblings, turn = places[record["id"]], record["turn"] - 1
        name = record.get("name")
        if "score" in record:
            output = siblings[record.get("output", next(iter(siblings)))]
            points[name].append((output, turn, float(record["score"])))
        else:
            pairs[name].append((siblings[record["better"]], siblings[record["worse"]], turn))
    if not points and not pairs:
        raise DataError(f"{path}: no labels (accepted: one JSON object a line, at least one)")
    return Labels(points, pairs)


def _problems(
    record: Mapping[str, Any],
    places: Mapping[str, Mapping[str, int]],
    outputs: Sequence[Output],
    names: Sequence[str],
) -> Iterator[str]:
    keys = _PAIR if "better" in record or "worse" in record else _POINT
    for key in record:
        if key not in keys:
            yield f"{shown(key)}: unknown key (accepted: {', '.join(keys)})"
    session = record.get("id")
    if not isinstance(session, str) or session not in places:
        given = shown(repr(session)) if isinstance(session, str) else kind(session)
        yield f"id: {given}, of which there is no output (accepted: {some(places)})"
        return
    siblings, turn = places[session], record.get("turn")
    last = len(outputs[next(iter(siblings.values()))].session.turns)
    if isinstance(turn, bool) or not isinstance(turn, int) or not 1 <= turn <= last:
        yield f"turn: {kind(turn)} (accepted: a whole number from 1 to {last})"
    if record.get("name") is not None and record["name"] not in names:
        yield f"name: {kind(record['name'])} (accepted: {', '.join(names)}, or absent)"
    for key in ("output",) if keys is _POINT else ("better", "worse"):
        named = record.get(key)
        if named is None and key == "output" and len(siblings) == 1:
            continue
        if not isinstance(named, str) or named not in siblings:
            yield f"{key}: {kind(named)} (accepted for {shown(repr(session))}: {some(siblings)})"
    if keys is _PAIR and record.get("better") == record.get("worse"):
        yield f"worse: {kind(record['worse'])}, as better (accepted: another output)"
    score = record.get("score")
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if keys is _POINT and not (number and math.isfinite(score)):  # type: ignore[arg-type]
        yield f"score: {kind(score)} (accepted: a number)"
