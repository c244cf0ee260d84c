"""`scores.jsonl`: what was said of every image, an object for each turn and metric.

    {"image": "kitchen", "pass": "multipass", "turn": 2, "metric": "IF", "state": "judged",
     "value": 1.0, "task": "subject_add", "mode": "cm", "turns": 3}

Every turn of every session has a row for every metric, in one of four states: `judged` has a value,
`not_applicable`, `failed` and `missing` (there is no image) have a reason. So what is not there is
counted, and no number is made up for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from editr2.errors import DataError, shown
from editr2.files import json_line, write_lines
from editr2.judge.outputs import records

FILE_NAME = "scores.jsonl"

State = Literal["judged", "not_applicable", "failed", "missing"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Row:
    """One metric of one image.

    image: the session's id. way: the pass (`passes.PASSES`). turn: of the image, from 1. asked: the
    turn whose instruction was judged, which is `turn` but in a single pass, whose image is to
    follow all instructions so far. value: in [0, 1], where it was judged. reason: of any other
    state, and what was said of a value. task: of the asked turn. turns: of the session. sample: of
    several of the same session, from 1.
    """

    image: str
    way: str
    turn: int
    asked: int
    metric: str
    state: State
    value: float | None
    reason: str | None
    task: str | None
    mode: str | None
    turns: int
    sample: int = 1

    def written(self) -> dict[str, Any]:
        """As a line of the file; what is absent or follows from the rest is left out."""
        line: dict[str, Any] = {"image": self.image, "pass": self.way, "turn": self.turn}
        if self.asked != self.turn:
            line["asked"] = self.asked
        line |= {"metric": self.metric, "state": self.state}
        if self.value is not None:
            line["value"] = round(self.value, 6)
        line |= {
            name: value
            for name in ("reason", "task", "mode")
            if (value := getattr(self, name)) is not None
        }
        line["turns"] = self.turns
        return line | ({"sample": self.sample} if self.sample != 1 else {})


def read_rows(file: Path) -> list[Row]:
    """All rows of a file. Raises DataError with the line that is none, or is of a score that an
    earlier one has."""
    found: dict[tuple[str, str, int, int, int, str], Row] = {}
    for where, record in records(file):
        row = row_of(where, record)
        key = (row.image, row.way, row.sample, row.turn, row.asked, row.metric)
        if found.setdefault(key, row) is not row:
            raise DataError(
                f"{where}: {row.metric} of {shown(repr(row.image))}, {row.way}, turn {row.turn}, "
                f"again (accepted: once)"
            )
    return list(found.values())


_TYPES: dict[str, type | tuple[type, ...]] = {
    "image": str,
    "pass": str,
    "turn": int,
    "metric": str,
    "state": str,
    "turns": int,
    "asked": int,
    "sample": int,
    "reason": (str, NoneType),
    "task": (str, NoneType),
    "mode": (str, NoneType),
}


def row_of(where: str, record: dict[str, Any]) -> Row:
    """Of a line's object. Raises DataError, which begins with `where`, for one that is no row."""
    given = {"asked": record.get("turn"), "sample": 1, **record}
    for key, kinds in _TYPES.items():
        if not isinstance(given.get(key), kinds) or isinstance(given.get(key), bool):
            raise DataError(
                f"{where}: {key}: {shown(repr(given.get(key)))} (accepted: a line as `editr2 "
                f"benchmark` writes it)"
            )
    asked, turn, turns, sample = (given[key] for key in ("asked", "turn", "turns", "sample"))
    if not 1 <= asked <= turn <= turns or sample < 1:
        raise DataError(
            f"{where}: asked {asked}, turn {turn}, turns {turns}, sample {sample} (accepted: "
            f"counted from 1, none of the first three above the next)"
        )
    state, value = record["state"], record.get("value")
    if state not in STATES:
        raise DataError(f"{where}: state: {shown(repr(state))} (accepted: {', '.join(STATES)})")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if number != (state == "judged") or not (number or value is None):
        raise DataError(
            f"{where}: value: {shown(repr(value))} of a score that is {state} (accepted: a number "
            f"in [0, 1] where it is judged, and else none)"
        )
    return Row(
        image=record["image"],
        way=record["pass"],
        turn=turn,
        asked=asked,
        metric=record["metric"],
        state=state,
        value=None if value is None else float(value),
        reason=record.get("reason"),
        task=record.get("task"),
        mode=record.get("mode"),
        turns=turns,
        sample=sample,
    )


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Whole, or not at all."""
    write_lines(file, (json_line(row.written()) for row in rows))
