"""The files that the stages read and leave, all of them JSON Lines; images are named relative to
the file, or absolutely.

    edits.jsonl       {"id", "image", "edited", "instruction", "task"?}
    principles.jsonl  the same with "principles": [{"text", "kind"}]
    traces.jsonl      {"id", "trace", "verdicts", "score", "gold", "judge"?}; without `verdicts` and
                      `score` where the trace cannot be read or was cut off (then `unread` says
                      why), without `gold` where nobody knows; several of an id
    pairs.jsonl       {"id", "image", "win", "lose", "instruction", "principles"?, "margin"?,
                      "task"?}

`score` is what the trace says, from 0 to 10. Readers raise `DataError` that names file, line and
field.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from editr2.errors import DataError, shown
from editr2.files import json_line, write_lines
from editr2.rewards.reading import Unread
from editr2.rewards.traces import HIGH, Principle, Trace, read_principles, read_trace
from editr2.sessions.images import ImageFile, locate
from editr2.sessions.importers.foreign import Record, json_lines
from editr2.sessions.session import is_text, kind

EDITS, PRINCIPLES, TRACES, PAIRS = (
    "edits.jsonl",
    "principles.jsonl",
    "traces.jsonl",
    "pairs.jsonl",
)


@dataclass(frozen=True)
class Picture:
    """An image of a file's record. path: where it is. at: what an error begins with."""

    path: Path
    at: str

    def read(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError."""
        return ImageFile(self.path, where=self.at)()


@dataclass(frozen=True)
class Edit:
    """An edited image, what it was made of, and what was asked for. principles: none yet where it
    is empty. task: the kind of edit, where known."""

    id: str
    image: Picture
    edited: Picture
    instruction: str
    principles: tuple[Principle, ...] = ()
    task: str | None = None


@dataclass(frozen=True)
class Told:
    """What somebody wrote about an edit.

    id: of the edit. text: the trace. trace: what is read of it; None where that cannot be, and then
    `unread` says why. gold: the right verdicts, 0 or 1 for each principle, or None. judge: whose
    it is.
    """

    id: str
    text: str
    trace: Trace | None
    unread: str | None = None
    gold: tuple[int, ...] | None = None
    judge: str | None = None

    @staticmethod
    def of(edit: Edit, text: str, **more: Any) -> Told:
        """From a trace's text; one that cannot be read is kept, and has no score."""
        try:
            return Told(edit.id, text, read_trace(text, len(edit.principles)), **more)
        except Unread as unread:
            return Told(edit.id, text, None, str(unread), **more)

    @property
    def accuracy(self) -> float | None:
        """Of the verdicts, the share that is right; None without gold or without verdicts."""
        if self.trace is None or self.gold is None:
            return None
        pairs = list(zip(self.trace.verdicts, self.gold, strict=True))
        return sum(said == right for said, right in pairs) / len(pairs)


@dataclass(frozen=True)
class Preference:
    """Two outputs of one instruction, of which somebody preferred the first. margin: by how much,
    where it is told."""

    win: Edit
    lose: Edit
    margin: float | None = None

    @property
    def id(self) -> str:
        return self.win.id.removesuffix("/win")

    @property
    def edits(self) -> tuple[Edit, Edit]:
        return self.win, self.lose


def read_edits(file: Path, *, principles: bool = False) -> list[Edit]:
    """Of `edits.jsonl` or `principles.jsonl`. principles: whether each must have some."""
    found: dict[str, Edit] = {}
    for record in json_lines(file):
        needed = ("id", "image", "edited", "instruction", *(("principles",) * principles))
        record.require(needed, ("task",) if principles else ("principles", "task"))
        name = _id(record, found)
        found[name] = Edit(
            name,
            _picture(record, "image", file),
            _picture(record, "edited", file),
            record.get("instruction", "text"),
            _principles(record, needed=principles),
            _task(record),
        )
    return _some(list(found.values()), file)


def read_preferences(file: Path) -> list[Preference]:
    """Of `pairs.jsonl`."""
    found: dict[str, Preference] = {}
    for record in json_lines(file):
        record.require(
            ("id", "image", "win", "lose", "instruction"), ("principles", "margin", "task")
        )
        name, image = _id(record, found), _picture(record, "image", file)
        said = (record.get("instruction", "text"), _principles(record), _task(record))
        win, lose = (
            Edit(f"{name}/{key}", image, _picture(record, key, file), *said)
            for key in ("win", "lose")
        )
        margin = record.values.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
            raise record.error("margin", f"{kind(margin)} (accepted: a number, or absent)")
        found[name] = Preference(win, lose, margin)
    return _some(list(found.values()), file)


def read_told(file: Path, edits: Sequence[Edit]) -> list[Told]:
    """Of `traces.jsonl`; every trace is read again, and what the file says of it must agree."""
    known, found = {edit.id: edit for edit in edits}, []
    for record in json_lines(file):
        record.require(("id", "trace"), ("verdicts", "score", "gold", "judge", "unread"))
        name = record.get("id", "text")
        if name not in known:
            raise record.error("id", f"{shown(repr(name))} (accepted: one of {PRINCIPLES})")
        count, gold = len(known[name].principles), record.values.get("gold")
        if gold is not None:
            fits = isinstance(gold, list) and len(gold) == count and all(g in (0, 1) for g in gold)
            if not fits:
                accepted = f"(accepted: a list of {count}, each 0 or 1)"
                raise record.error("gold", f"{kind(gold)} {accepted}")
            gold = tuple(int(g) for g in gold)
        text = record.values["trace"]
        if not isinstance(text, str):
            raise record.error("trace", f"{kind(text)} (accepted: a string)")
        told = Told.of(known[name], text, gold=gold, judge=record.values.get("judge"))
        if "unread" in record.values:
            # Whoever wrote it saw more than the text, as that it was cut off: it has no score.
            why = record.get("unread", "text")
            told = replace(told, trace=None, unread=why)
            for field in ("verdicts", "score"):
                if field in record.values:
                    raise record.error(field, "beside unread (accepted: one of them)")
        for field, now in _seen(told).items():
            if record.values.get(field) != now and field in record.values:
                raise record.error(
                    field, f"{shown(repr(record.values[field]))}, and the trace says {now!r}"
                )
        found.append(told)
    return found


def write_edits(file: Path, edits: Iterable[Edit]) -> None:
    """Of `edits.jsonl`, or `principles.jsonl` where they have some; whole or not at all."""
    write_lines(file, (json_line(_edit_row(file, edit)) for edit in edits))


def write_told(file: Path, told: Iterable[Told]) -> None:
    """Of `traces.jsonl`; whole or not at all."""
    write_lines(file, (json_line(told_row(one)) for one in told))


def write_preferences(file: Path, pairs: Iterable[Preference]) -> None:
    """Of `pairs.jsonl`; whole or not at all."""
    write_lines(file, (json_line(_pair_row(file, pair)) for pair in pairs))


def told_row(told: Told) -> dict[str, Any]:
    """As `traces.jsonl` has it."""
    row: dict[str, Any] = {"id": told.id, "trace": told.text, **_seen(told)}
    if told.gold is not None:
        row["gold"] = list(told.gold)
    return row | ({"judge": told.judge} if told.judge else {})


def _seen(told: Told) -> dict[str, Any]:
    if told.trace is None:
        return {"unread": told.unread}
    return {"verdicts": list(told.trace.verdicts), "score": round(HIGH * told.trace.score, 9)}


def _edit_row(file: Path, edit: Edit) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": edit.id,
        "image": _relative(edit.image, file),
        "edited": _relative(edit.edited, file),
        "instruction": edit.instruction,
    }
    return row | _rest(edit)


def _pair_row(file: Path, pair: Preference) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": pair.id,
        "image": _relative(pair.win.image, file),
        "win": _relative(pair.win.edited, file),
        "lose": _relative(pair.lose.edited, file),
        "instruction": pair.win.instruction,
    }
    return row | _rest(pair.win) | ({} if pair.margin is None else {"margin": pair.margin})


def _rest(edit: Edit) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if edit.principles:
        found["principles"] = [one.written() for one in edit.principles]
    return found | ({"task": edit.task} if edit.task else {})


def _relative(picture: Picture, file: Path) -> str:
    folder = file.parent.absolute()
    inside = picture.path.absolute().is_relative_to(folder)
    return os.path.relpath(picture.path, folder) if inside else str(picture.path.absolute())


def _id(record: Record, found: dict[str, Any]) -> str:
    name: str = record.get("id", "text")
    if name in found:
        raise record.error("id", f"{shown(repr(name))} twice (accepted: unique ids)")
    return name


def _picture(record: Record, field: str, file: Path) -> Picture:
    at, name = f"{record.where}: {field}", record.get(field, "text")
    try:
        path = locate(file.parent, name, contained=True)
    except DataError as error:
        raise DataError(f"{at}: {error}") from error
    if not path.is_file():
        raise DataError(f"{at}: {shown(str(path))}: no such file (accepted: an image there)")
    return Picture(path, at)


def _principles(record: Record, needed: bool = False) -> tuple[Principle, ...]:
    given = record.values.get("principles")
    if given is None and not needed:
        return ()
    try:
        return read_principles(given)
    except ValueError as error:
        field, _, problem = str(error).partition(": ")
        raise record.error(field, problem) from None


def _task(record: Record) -> str | None:
    task = record.values.get("task")
    if task is not None and not is_text(task):
        raise record.error("task", f"{kind(task)} (accepted: a non-empty string, or absent)")
    return task


def _some(found: list[Any], file: Path) -> list[Any]:
    if not found:
        raise DataError(f"{file}: empty (accepted: at least one record)")
    return found


def edits_of(pairs: Iterable[Preference]) -> Iterator[Edit]:
    """Both outputs of every pair."""
    for pair in pairs:
        yield from pair.edits
