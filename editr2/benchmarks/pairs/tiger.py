"""TIGER-Lab's EditReward-Bench (arXiv 2509.26346, Apache-2.0;
huggingface.co/datasets/TIGER-Lab/EditReward-Bench): two, three or four outputs of an instruction,
ranked by people; two may be equal. Read as its evaluators do
(github.com/TIGER-AI-Lab/EditReward at edb027e), in both of their forms:

- rows of the dataset, each a pair of a record's outputs: `dataset` says how many it has (2pair,
  3pair, 4pair), `comparison_type` which two these are ("AvsC") and `ranking` which is better;
  rows of one record begin with the same `id` up to the first "_".
- the folder with EditReward_Bench_2pair.json, _3pair.json and _4pair.json (or one of them): lists
  of objects with `prompt`, `path_src`, `paths_generated` and `human_vote`, whose `ranking` is
  "C>A>B".

A record is right where all of its pairs are, as published. A label of two equal outputs is right
where scores differ by no more than a threshold, which is the one that makes the most of all pairs
right; so it is fitted to the answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.accuracy import Accuracy, Measure
from editr2.benchmarks.pairs.cells import Rows
from editr2.benchmarks.pairs.labelled import Comparison, Labelled, Pair, file_picture
from editr2.benchmarks.pairs.printed import INTERVALS, cell
from editr2.benchmarks.pairs.table import PairSet
from editr2.benchmarks.table import Source
from editr2.errors import DataError, shown
from editr2.judge.text import Table
from editr2.sessions import Turn
from editr2.sessions.importers.foreign import Record, json_list
from editr2.sessions.session import kind

HUB = "hf:TIGER-Lab/EditReward-Bench"
WAYS = {"2pair": 2, "3pair": 3, "4pair": 4}

_COLUMNS = (
    "id",
    "dataset",
    "instruction",
    "source_image",
    "candidate_1",
    "candidate_2",
    "ranking",
    "comparison_type",
)
_IMAGES = ("source_image", "candidate_1", "candidate_2")


def read(source: Source) -> Labelled:
    """See the module. Raises DataError with the file and line, or row, and the field."""
    files = list(_files(source.path))
    found = Labelled()
    if files:
        for file, ways in files:
            _read_file(found, file, ways, source.images)
    else:
        _read_rows(found, Rows(source.path or HUB, _COLUMNS, _IMAGES))
    if not found.comparisons:
        raise DataError(f"{shown(source.path or HUB)}: no records (accepted: at least one)")
    return found


def measured(accuracy: Accuracy) -> Iterator[Measure | None]:
    """By number of outputs, and of all."""
    threshold = 0.0
    for ways in [*sorted(accuracy.groups("ways")), None]:
        of = accuracy.some(**({} if ways is None else {"ways": ways}))
        group = "" if ways is None else f"/ways={ways}"
        tied = accuracy.with_ties(f"with_ties{group}", of)
        if ways == "2" and tied is not None and tied.threshold is not None:
            threshold = tied.threshold  # as published: that of two outputs, where ties are
        yield accuracy.whole(f"all_right{group}", of, threshold)
        yield accuracy.accuracy(f"accuracy{group}", of)
        yield tied


def shown_as(measures: Mapping[str, Measure]) -> Iterator[Table]:
    """A row a number of outputs."""
    columns = {"all right": "all_right", "pairs": "accuracy", "pairs and ties": "with_ties"}
    rows = []
    for ways in ("2", "3", "4", None):
        group = "" if ways is None else f"/ways={ways}"
        cells = [cell(measures.get(f"{name}{group}")) for name in columns.values()]
        if any(each != "-" for each in cells):
            rows.append((f"{ways} outputs" if ways else "all", cells))
    yield Table(
        "Right by number of outputs",
        list(columns),
        rows,
        "All right: of records, all pairs at once; a coin has 1/2, 1/6, 1/24. Pairs: of those that "
        "people did not tie; half is chance. Pairs and ties: with the one threshold for equal "
        "scores that makes the most right, so fitted to these answers. "
        f"{INTERVALS}",
    )


TIGER = PairSet(
    title="TIGER-Lab's EditReward-Bench",
    read=read,
    measured=measured,
    shown_as=shown_as,
    headline=("all_right", "all_right/ways=2", "all_right/ways=3", "all_right/ways=4"),
    stretched=False,
    about="arXiv 2509.26346; Apache-2.0; huggingface.co/datasets/TIGER-Lab/EditReward-Bench",
)


# ------------------------------------------------------------------------------------------- rows


def _read_rows(found: Labelled, rows: Rows) -> None:
    records: dict[str, dict[str, Any]] = {}
    for row, record in rows.records():
        name, of = record.get("id", "text"), record.get("dataset", "text")
        if of not in WAYS:
            raise record.error("dataset", f"{kind(of)} (accepted: {', '.join(WAYS)})")
        whole = name if WAYS[of] == 2 else name.split("_")[0]
        letters = _letters(record, WAYS[of])
        before = rows.picture(row, "source_image")
        turn = Turn(record.get("instruction", "text"))
        group = records.setdefault(
            f"{of}/{whole}", {"pairs": {}, "ways": WAYS[of], "cluster": before.stamp}
        )
        names = []
        for letter, column in zip(letters, ("candidate_1", "candidate_2"), strict=True):
            after = rows.picture(row, column)
            output = f"{of}/{whole}/{letter}-{after.stamp[:8]}"
            names.append(found.add(f"{record.where}: id", output, turn, before, after))
        if letters in group["pairs"]:
            raise record.error(
                "comparison_type",
                f"{'vs'.join(letters)} of {shown(repr(whole))} given twice (accepted: once each)",
            )
        group["pairs"][letters] = _pair(record, letters, names)
    for name, group in records.items():
        _add(found, name, list(group["pairs"].values()), group["ways"], group["cluster"])


def _letters(record: Record, ways: int) -> tuple[str, str]:
    text = record.get("comparison_type", "text")
    found = re.fullmatch(r"([A-D])vs([A-D])", text)
    known = "ABCD"[:ways]
    if not found or found[1] == found[2] or not set(found.groups()) <= set(known):
        raise record.error("comparison_type", f"{kind(text)} (accepted: two of {known}, as AvsB)")
    return found[1], found[2]


def _pair(record: Record, letters: tuple[str, str], names: list[str]) -> Pair:
    levels = _levels(record, "ranking", record.get("ranking", "text"), letters)
    order = sorted(range(2), key=lambda place: levels[letters[place]])
    return Pair(names[order[0]], names[order[1]], tie=levels[letters[0]] == levels[letters[1]])


# ------------------------------------------------------------------------------------------ files


def _files(path: Path | None) -> Iterator[tuple[Path, int]]:
    if path is None:
        return
    for name, ways in WAYS.items():
        file = path / f"EditReward_Bench_{name}.json" if os.path.isdir(path) else path
        if os.path.isfile(file) and file.name.endswith(f"{name}.json"):
            yield file, ways


def _read_file(found: Labelled, file: Path, ways: int, images: Path | None) -> None:
    for number, record in enumerate(json_list(file)):
        for name in ("prompt", "path_src", "paths_generated", "human_vote"):
            if name not in record.values:
                raise record.error(name, "missing (accepted: as the release has it)")
        paths, vote = record.values["paths_generated"], record.values["human_vote"]
        if not isinstance(paths, list) or len(paths) != ways:
            raise record.error("paths_generated", f"{kind(paths)} (accepted: {ways} paths)")
        if not isinstance(vote, dict) or not isinstance(vote.get("ranking"), str):
            raise record.error("human_vote", f"{kind(vote)} (accepted: an object with a ranking)")
        if not record.values["path_src"] or not all(paths):
            found.left_out["without an image"] += 1
            continue
        where, letters = record.where, "ABCD"[:ways]
        before = file_picture(file.parent, where, "path_src", record.values["path_src"], images)
        whole = f"{ways}pair/{number:06d}"
        turn = Turn(record.get("prompt", "text"))
        names = []
        for letter, path in zip(letters, paths, strict=True):
            after = file_picture(file.parent, where, "paths_generated", path, images)
            names.append(found.add(where, f"{whole}/{letter}", turn, before, after))
        levels = _levels(record, "human_vote.ranking", vote["ranking"], letters)
        pairs = []
        for a, b in combinations(range(ways), 2):
            a, b = sorted((a, b), key=lambda place: levels[letters[place]])
            pairs.append(Pair(names[a], names[b], levels[letters[a]] == levels[letters[b]]))
        _add(found, whole, pairs, ways, before.stamp)


def _add(found: Labelled, name: str, pairs: list[Pair], ways: int, cluster: str) -> None:
    """A record of which pairs are missing counts by its pairs alone."""
    whole = {} if len(pairs) == ways * (ways - 1) // 2 else {"whole": "no"}
    found.comparisons.append(Comparison(name, tuple(pairs), cluster, {"ways": str(ways), **whole}))


def _levels(record: Record, field: str, text: str, letters: Sequence[str]) -> dict[str, int]:
    """The place of every letter, 0 the best, equal ones at the same: of "C>A>B", "A<B" or
    "A=B=Good"."""
    plain = re.sub(r"=(Good|Bad)$", "", text.replace(" ", ""))
    if re.fullmatch(r"[A-D]<[A-D]", plain):
        plain = f"{plain[2]}>{plain[0]}"
    levels = [level.split("=") for level in plain.split(">")]
    if sorted(letter for level in levels for letter in level) != sorted(letters):
        raise record.error(
            field, f"{kind(text)} (accepted: {', '.join(letters)} in their order, as A>B or A=B)"
        )
    return {letter: place for place, level in enumerate(levels) for letter in level}
