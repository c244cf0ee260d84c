"""Pairs in files: `pairs.jsonl`, our own form, and preference files as HPDv3 and EditReward-Data
have them.

`pairs.jsonl` has an object a line; images are relative to the file, or absolute:

    {"id": "k1", "image": "k.png", "win": "a.png", "lose": "b.png", "instruction": "add a cup",
     "task": "subject_add", "margin": 2, "principles": [{"text": "…", "kind": "follow"}]}

A preference file is a list of objects with `prompt`, `path_src`, `path1` and `path2`; path1 is the
preferred one by convention. What else such a record says (`choice_dist`, scores of both models,
`tie_case`) is held against that: a record that contradicts itself is counted and left out.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.accuracy import Accuracy, Measure
from editr2.benchmarks.pairs.labelled import (
    Comparison,
    Labelled,
    Pair,
    Picture,
    file_picture,
)
from editr2.benchmarks.pairs.printed import INTERVALS, cell
from editr2.benchmarks.pairs.table import PairSet
from editr2.benchmarks.table import Source
from editr2.errors import DataError, shown
from editr2.judge.text import Table
from editr2.rewards.traces import read_principles
from editr2.sessions import Turn
from editr2.sessions.importers.foreign import Record, json_lines, json_list
from editr2.sessions.session import is_text, kind

PAIRS = "pairs.jsonl"

_NEEDED = ("id", "image", "win", "lose", "instruction")
_OPTIONAL = ("principles", "margin", "task")


def read_pairs(source: Source) -> Labelled:
    """Of pairs.jsonl. Raises DataError with the line and the field."""
    file, found, seen = _file(source.path, PAIRS), Labelled(), dict[str, str]()
    for record in json_lines(file):
        record.require(_NEEDED, _OPTIONAL)
        name = record.get("id", "text")
        if name in seen:
            raise record.error(
                "id", f"{shown(repr(name))} was already used on {seen[name]} (accepted: unique ids)"
            )
        seen[name] = record.where
        task, margin = record.values.get("task"), record.values.get("margin")
        if task is not None and not is_text(task):
            raise record.error("task", f"{kind(task)} (accepted: a non-empty string, or absent)")
        if margin is not None and not _is_number(margin):
            raise record.error("margin", f"{kind(margin)} (accepted: a number, or absent)")
        meta = _principles(record)
        turn = Turn(record.get("instruction", "text"), task=task, meta=meta)
        before, *outputs = _pictures(record, ("image", "win", "lose"), file, source)
        better, worse = (
            found.add(record.where, f"{name}/{key}", turn, before, after)
            for key, after in zip(("win", "lose"), outputs, strict=True)
        )
        groups = {} if task is None else {"task": task}
        found.comparisons.append(
            Comparison(name, (Pair(better, worse),), before.stamp, groups, margin)
        )
    return _some(found, file)


def read_preferences(source: Source) -> Labelled:
    """Of a preference file. Raises DataError with the line and the field."""
    file, found = _file(source.path, None), Labelled()
    for number, record in enumerate(json_list(file)):
        for name in ("prompt", "path_src", "path1", "path2"):
            if name not in record.values:
                raise record.error(name, "missing (accepted: as HPDv3 and EditReward-Data have it)")
        tie = record.values.get("tie_case")
        if tie is not None and not isinstance(tie, bool):
            raise record.error("tie_case", f"{kind(tie)} (accepted: true, false or absent)")
        if why := _contradiction(record, bool(tie)):
            found.left_out[why] += 1
            continue
        turn, name = Turn(record.get("prompt", "text")), f"{number:06d}"
        before, *outputs = _pictures(record, ("path_src", "path1", "path2"), file, source)
        better, worse = (
            found.add(record.where, f"{name}/{n}", turn, before, after)
            for n, after in enumerate(outputs, 1)
        )
        pair = Pair(better, worse, bool(tie))
        found.comparisons.append(Comparison(name, (pair,), before.stamp))
    return _some(found, file)


def measured(accuracy: Accuracy) -> Iterator[Measure | None]:
    """Of all, and by task where there are several."""
    every = accuracy.some()
    yield accuracy.accuracy("accuracy", every)
    yield accuracy.with_ties("with_ties", every)
    tasks = accuracy.groups("task")
    for task in tasks if len(tasks) > 1 else ():
        yield accuracy.accuracy(f"accuracy/task={task}", accuracy.some(task=task))


def shown_as(measures: Mapping[str, Measure]) -> Iterator[Table]:
    """A row a task."""
    tasks = [key.partition("/task=")[2] for key in measures if "/task=" in key]
    keys = {task: f"accuracy/task={task}" for task in tasks} | {"all": "accuracy"}
    rows = [(name, [cell(measures.get(key))]) for name, key in keys.items()]
    if "with_ties" in measures:
        rows.append(("with ties", [cell(measures["with_ties"])]))
    yield Table(
        "Right of pairs",
        ["right"],
        rows,
        f"Half is chance. {INTERVALS}"
        + (
            " With ties: with the one threshold for equal scores that makes the most right, so "
            "fitted to these answers."
            if "with_ties" in measures
            else ""
        ),
    )


PAIRS_FILE = PairSet(
    title="pairs",
    read=read_pairs,
    measured=measured,
    shown_as=shown_as,
    headline=("accuracy",),
    stretched=True,
    about="pairs.jsonl of your own",
)
PREFERENCES = replace(
    PAIRS_FILE,
    title="preferences",
    read=read_preferences,
    about="a preference file as HPDv3 and EditReward-Data have it",
)


def _file(path: Path | None, name: str | None) -> Path:
    if path is None:
        raise DataError(f"--data: missing (accepted: {name or 'a preference file'}, or its folder)")
    file = path / name if name and os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(f"{shown(file)}: no such file")
    return file


def _some(found: Labelled, file: Path) -> Labelled:
    if not found.comparisons:
        left = "; ".join(f"{why}: {n}" for why, n in found.left_out.items())
        raise DataError(f"{file}: no pairs ({left or 'accepted: at least one'})")
    return found


def _pictures(
    record: Record, fields: Sequence[str], file: Path, source: Source
) -> Iterator[Picture]:
    for field in fields:
        name = record.values[field]
        yield file_picture(file.parent, record.where, field, name, source.images)


def _principles(record: Record) -> dict[str, Any]:
    said = record.values.get("principles")
    if said is None:
        return {}
    try:
        return {"principles": [one.written() for one in read_principles(said)]}
    except ValueError as error:
        field, _, problem = str(error).partition(": ")
        raise record.error(field, problem) from None


# -------------------------------------------------------------------------------- contradictions


def _contradiction(record: Record, tie: bool) -> str | None:
    """Why nobody can say from the record which output is better; None where it is told."""
    votes = record.values.get("choice_dist")
    if votes is not None:
        if not (isinstance(votes, list) and len(votes) == 2 and all(map(_is_number, votes))):
            raise record.error("choice_dist", f"{kind(votes)} (accepted: two numbers, or null)")
        if not tie and votes[0] <= votes[1]:
            return "choice_dist is even" if votes[0] == votes[1] else "choice_dist prefers path2"
    overall, dimensions = _scores(record)
    if tie:
        return "tie_case, and the overall scores differ" if overall else None
    if overall is not None and overall <= 0:
        return "the overall scores are equal" if overall == 0 else "the overall scores prefer path2"
    against = [sign for sign in dimensions if sign]
    if against and all(sign < 0 for sign in against):
        return "every score of a dimension prefers path2"
    return None


def _scores(record: Record) -> tuple[int | None, list[int]]:
    """Whether the first model's overall score is above the second's (1), equal to it (0) or below
    (-1), None of none; and the same of every dimension."""
    signs: dict[str, int] = {}
    for key, first in record.values.items():
        name = re.fullmatch(r"model1_(\w+)_score", key)
        second = record.values.get(f"model2_{name[1]}_score") if name else None
        for field, value in ((key, first), (key.replace("model1", "model2"), second)):
            if name and value is not None and not _is_number(value):
                raise record.error(field, f"{kind(value)} (accepted: a number, or null)")
        if name and first is not None and second is not None:
            signs[name[1]] = (first > second) - (first < second)
    return signs.pop("overall", None), list(signs.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def kind_of(file: Path) -> str | None:
    """What a file holds, by its first record: "pairs", "preferences" or "tiger-bench"; None of
    others."""
    records: Iterator[Record]
    try:
        records = json_list(file) if file.suffix.lower() == ".json" else json_lines(file)
        first = next(itertools.islice(records, 1), None)
    except DataError:
        return None
    keys = set(first.values) if first else set()
    known = {
        "pairs": {"win", "lose"},
        "preferences": {"path1", "path2"},
        "tiger-bench": {"paths_generated", "human_vote"},
    }
    return next((name for name, needed in known.items() if needed <= keys), None)
