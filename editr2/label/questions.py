"""What people are asked: a source, an instruction, and two outputs or more.

A folder has one of these files, looked for in this order; images are named relative to it or
absolutely:

    questions.jsonl   {"id", "image", "outputs": ["a.png", "b.png", …], "instruction", "earlier"?,
                      "befores"?, "principles"?, "task"?, "known"?}
    pairs.jsonl       {"id", "image", "win", "lose", "instruction", "principles"?, "margin"?,
                      "task"?}: known pairs, to be labelled by others, who see none of it
    edits.jsonl       {"id", "image", "edited", "instruction", "task"?}: each pair of the outputs of
                      one image and instruction

`earlier` are the instructions of the turns before, and `befores`, in the order of the outputs, the
images that this instruction was to edit, where they are not `image`. `known` is an answer that
somebody gave before, as `Answer` has it. It is never shown.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.errors import DataError, shown
from editr2.files import json_line, write_lines
from editr2.sessions.images import locate
from editr2.sessions.importers.foreign import Record, json_lines
from editr2.sessions.session import is_text, kind

QUESTIONS, PAIRS, EDITS = "questions.jsonl", "pairs.jsonl", "edits.jsonl"

Answer = tuple[int, ...] | str
"""The place of every output, 0 the best and equal ones tied, without gaps; or one of `BAD` and
`SKIPPED`."""
BAD, SKIPPED = "bad", "skip"
"""All are bad; nothing can be said."""

MOST = 64
"""Outputs of a question."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    outputs: files, of which no order is shown. earlier: the instructions before this one.
    befores: for every output what it was made of, where that is not `image`. principles: may be
    voted on one by one, of a pair. known: an answer that is not of this labelling. needed: the
    question is done when so many people answered; None: everybody is asked.
    """

    id: str
    image: Path
    outputs: tuple[Path, ...]
    instruction: str
    earlier: tuple[str, ...] = ()
    befores: tuple[Path, ...] = ()
    principles: tuple[Mapping[str, str], ...] = ()
    task: str | None = None
    known: Answer | None = None
    needed: int | None = None


def read_answer(given: Any, outputs: int) -> Answer:
    """An answer about so many outputs as JSON has it. Raises ValueError."""
    if given in (BAD, SKIPPED):
        return str(given)
    if (
        isinstance(given, list)
        and len(given) == outputs
        and all(type(place) is int for place in given)
        and set(given) == set(range(max(given) + 1))
    ):
        return tuple(given)
    raise ValueError(f"{kind(given)} (accepted: {BAD}, {SKIPPED}, or {outputs} places from 0 on)")


def read_questions(folder: Path) -> list[Question]:
    """Of a folder. Raises DataError with file, line and field; without any of the files, too."""
    for name, read in READERS.items():
        if (folder / name).is_file():
            found = list(read(folder / name))
            if not found:
                raise DataError(f"{folder / name}: nothing to compare (accepted: two outputs)")
            return found
    raise DataError(f"{folder}: nothing to label (accepted: a folder with {', '.join(READERS)})")


def write_questions(file: Path, questions: Iterable[Question]) -> None:
    """As `questions.jsonl`, whole or not at all."""
    write_lines(file, (json_line(_row(file, one)) for one in questions))


def relative(path: Path, file: Path) -> str:
    """As a file names it: from its own folder where it lies below that, else absolutely."""
    folder, path = file.parent.absolute(), path.absolute()
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)


def _row(file: Path, one: Question) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": one.id,
        "image": relative(one.image, file),
        "outputs": [relative(path, file) for path in one.outputs],
        "instruction": one.instruction,
    }
    more = {
        "earlier": list(one.earlier),
        "befores": [relative(path, file) for path in one.befores],
        "principles": [dict(each) for each in one.principles],
        "task": one.task,
        "known": one.known,
    }
    return row | {name: value for name, value in more.items() if value}


def _questions(file: Path) -> Iterator[Question]:
    seen: set[str] = set()
    for record in json_lines(file):
        record.require(
            ("id", "image", "outputs", "instruction"),
            ("earlier", "befores", "principles", "task", "known"),
        )
        names = record.get("outputs", "texts")
        if not 2 <= len(names) <= MOST:
            raise record.error("outputs", f"{len(names)} (accepted: 2 to {MOST} images)")
        known = record.values.get("known")
        try:
            known = None if known is None else read_answer(known, len(names))
        except ValueError as error:
            raise record.error("known", str(error)) from None
        befores = record.get("befores", "texts") if "befores" in record.values else []
        if len(befores) not in (0, len(names)):
            raise record.error("befores", f"{len(befores)} (accepted: {len(names)}, or absent)")
        yield Question(
            _id(record, seen),
            _image(record, "image", record.get("image", "text"), file),
            tuple(_image(record, "outputs", name, file) for name in names),
            record.get("instruction", "text"),
            tuple(record.get("earlier", "texts") if "earlier" in record.values else ()),
            tuple(_image(record, "befores", name, file) for name in befores),
            _principles(record),
            _task(record),
            known,
        )


def _pairs(file: Path) -> Iterator[Question]:
    seen: set[str] = set()
    for record in json_lines(file):
        record.require(
            ("id", "image", "win", "lose", "instruction"), ("principles", "margin", "task")
        )
        image, *outputs = (
            _image(record, key, record.get(key, "text"), file) for key in ("image", "win", "lose")
        )
        yield Question(
            _id(record, seen),
            image,
            tuple(outputs),
            record.get("instruction", "text"),
            principles=_principles(record),
            task=_task(record),
            known=(0, 1),
        )


def _edits(file: Path) -> Iterator[Question]:
    seen: set[str] = set()
    groups: dict[tuple[Path, str], list[Question]] = defaultdict(list)
    for record in json_lines(file):
        record.require(("id", "image", "edited", "instruction"), ("principles", "task"))
        image, edited = (
            _image(record, key, record.get(key, "text"), file) for key in ("image", "edited")
        )
        said, principles, task = (
            record.get("instruction", "text"),
            _principles(record),
            _task(record),
        )
        one = Question(_id(record, seen), image, (edited,), said, principles=principles, task=task)
        groups[image, said].append(one)
    for members in groups.values():
        for a, b in itertools.combinations(members, 2):
            yield Question(
                f"{a.id}+{b.id}",
                a.image,
                a.outputs + b.outputs,
                a.instruction,
                principles=a.principles,
                task=a.task,
            )


READERS: Mapping[str, Callable[[Path], Iterator[Question]]] = {
    QUESTIONS: _questions,
    PAIRS: _pairs,
    EDITS: _edits,
}


def _id(record: Record, seen: set[str]) -> str:
    name: str = record.get("id", "text")
    if name in seen:
        raise record.error("id", f"{shown(repr(name))} twice (accepted: unique ids)")
    seen.add(name)
    return name


def _image(record: Record, field: str, name: str, file: Path) -> Path:
    at = f"{record.where}: {field}"
    try:
        path = locate(file.parent, name, contained=True)
    except DataError as error:
        raise DataError(f"{at}: {error}") from error
    if not path.is_file():
        raise DataError(f"{at}: {shown(str(path))}: no such file (accepted: an image there)")
    return path.absolute()


def _principles(record: Record) -> tuple[Mapping[str, str], ...]:
    given = record.values.get("principles")
    if given is None:
        return ()
    good = isinstance(given, list) and all(
        isinstance(one, dict) and set(one) == {"text", "kind"} and all(map(is_text, one.values()))
        for one in given
    )
    if not good:
        raise record.error(
            "principles", f"{kind(given)} (accepted: a list of objects with text and kind)"
        )
    return tuple(given)


def _task(record: Record) -> str | None:
    task = record.values.get("task")
    if task is not None and not is_text(task):
        raise record.error("task", f"{kind(task)} (accepted: a non-empty string, or absent)")
    return task
