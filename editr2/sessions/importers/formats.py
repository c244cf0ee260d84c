"""The importers, a function each. Field names are those of the released files; docs/data.md says
which release."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.errors import DataError, shown
from editr2.sessions.datasets import dataset_rows
from editr2.sessions.files import is_dataset
from editr2.sessions.images import ImageFile, inside, locate
from editr2.sessions.importers.foreign import (
    Record,
    csv_rows,
    json_document,
    json_lines,
    json_members,
    parquet_rows,
)
from editr2.sessions.records import lines_of, parse_object
from editr2.sessions.session import Session, Turn, kind

# What object-centred rewards judge a turn by: as MICE-Bench names it, with its kind. EdiVal-Bench
# has the same.
_JUDGED = {
    "formatted_instruction": "text",
    "bg_consistency": "flag",
    "unchanged_objects": "texts",
    "available_objects": "texts",
    "all_objects": "texts",
}
_IMGEDIT_MODES: dict[str, str | None] = {
    "content_memory": "cm",
    "content_understand": "cu",
    "version_backtrac": None,
}


@dataclass(frozen=True)
class Source:
    """Where a set lies.

    path: its file, or the folder that holds it.
    images: a folder to look for images in, first by their whole name and then by the file's name
        alone; None looks where the release has them.
    mode: the mode of every session, in place of what the set says.
    flag: by which the user names `images`, for messages.
    """

    path: Path
    images: Path | None
    mode: str | None
    flag: str = "--images"

    def file(self, *suffixes: str, name: str | None = None) -> Path:
        """The file itself; `name` in the folder if it is one. Raises DataError, which lists what
        the folder has."""
        if self.path.is_file():
            if self.path.suffix.lower() not in suffixes:
                raise DataError(
                    f"{self.path}: another kind of file (accepted: {', '.join(suffixes)})"
                )
            return self.path
        if name and (self.path / name).is_file():
            return self.path / name
        there = sorted(
            str(p.relative_to(self.path)) for s in suffixes for p in self.path.rglob(f"*{s}")
        )[:8]
        accepted = ", ".join(there) or name or f"a file, {' or '.join(suffixes)}"
        raise DataError(f"{self.path}: a folder (accepted: one file in it: {accepted})")

    def image(self, record: Record, field: str, name: str, *places: Path) -> ImageFile:
        """The image that the field names, in `images` or else in the first of `places` that has it;
        never one that lies elsewhere, whatever the name."""
        try:
            locate(Path(), name, contained=False)
        except DataError as error:
            raise record.error(field, str(error)) from error
        if self.images is not None:
            found = [inside(self.images, name), inside(self.images, Path(name).name)]
        else:
            found = [inside(place, name) for place in places]
        candidates = [path for path in found if path is not None]
        if not candidates:
            accepted = (
                f"(accepted: a path inside of {shown(self.images or places[0])}, or "
                f"{self.flag} FOLDER)"
            )
            raise record.error(field, f"{shown(name)} leads out of the folder {accepted}")
        for path in candidates:
            if os.path.exists(path):
                return ImageFile(path, where=f"{record.where}: {field}")
        accepted = f"an image there, or {self.flag} FOLDER"
        problem = f"{shown(candidates[0])}: no such file (accepted: {accepted})"
        raise record.error(field, problem)


def mice(source: Source) -> Iterator[Session]:
    """MICE-Bench (Edit-R2): one JSON object a line, with a list of one item a turn in every field.

    The mode is the name of the folder, cm or cu.
    """
    file = source.file(".jsonl")
    mode = source.mode or file.resolve().parent.name
    if mode not in ("cm", "cu"):
        raise DataError(
            f"{file}: mode: neither given nor the folder's name (accepted: --mode cm or cu)"
        )
    for record in json_lines(file):
        record.require(("image", "instruction", "task_type", *_JUDGED), ("turns",))
        name, instructions = record.get("image", "text"), record.per_turn("instruction", "text")
        count = len(instructions)
        if record.values.get("turns", count) != count:
            raise record.error(
                "turns",
                f"{shown(record.values['turns'])} (accepted: {count}, as many as instructions)",
            )
        tasks = record.per_turn("task_type", "text", count)
        judged = {field: record.per_turn(field, of, count) for field, of in _JUDGED.items()}
        metas = [{field: judged[field][t] for field in _JUDGED} for t in range(count)]
        # Released names are relative to the folder that holds cm/ and cu/; the project's own loader
        # joins them to cm/.
        image = source.image(record, "image", name, file.parent, file.resolve().parent.parent)
        turns = tuple(Turn(i, task=k, meta=m) for i, k, m in zip(instructions, tasks, metas))
        yield Session(Path(name).stem, image, turns, mode)


def edival(source: Source) -> Iterator[Session]:
    """EdiVal-Bench: a CSV with a row for each turn of an image, which repeats the instructions so
    far."""
    lists = ("task_type", "instructions", "format_instructions")
    judged = {field: of for field, of in _JUDGED.items() if field != "formatted_instruction"}
    literals = ("turns", *lists, *judged)
    file = source.file(".csv", name="oai_instruction_generation_output.csv")
    places = (file.parent / "input_images_resize_512", file.parent)
    rows = csv_rows(file, literals)
    for index, group in itertools.groupby(
        rows, key=lambda record: record.values.get("image_index")
    ):
        turns: list[Turn] = []
        before: Record | None = None
        for number, record in enumerate(group, start=1):
            record.require(("image_index", *literals))
            if record.get("turns", "count") != number:
                problem = (
                    f"{shown(record.values['turns'])} (accepted: {number}, as rows of one "
                    f"image_index count its turns)"
                )
                raise record.error("turns", problem)
            for name in lists:
                told = record.per_turn(name, "text", number)
                if before and told[:-1] != before.values[name]:
                    raise record.error(
                        name,
                        "does not begin as the row before (accepted: its list and one item more)",
                    )
            task, instruction, formatted = (record.values[name][-1] for name in lists)
            meta = {
                "formatted_instruction": formatted,
                **{field: record.get(field, of) for field, of in judged.items()},
            }
            turns.append(Turn(instruction, task=task, meta=meta))
            before = record
        assert before is not None
        image = source.image(before, "image_index", f"{index}_input_raw.jpg", *places)
        yield Session(before.get("image_index", "text"), image, tuple(turns), source.mode)


def imgedit(source: Source) -> Iterator[Session]:
    """ImgEdit, multi-turn: the benchmark's annotation.json, or a Parquet or JSON Lines file of the
    training set.

    The mode follows from the category, which the name of the file or of its folder holds:
    content_memory is cm, content_understanding is cu, version_backtracking has none.
    """
    file = source.file(".json", ".jsonl", ".parquet", name="annotation.json")
    category = next(
        (c for c in _IMGEDIT_MODES if c in f"{file.resolve().parent.name}/{file.name}"), ""
    )
    mode = source.mode or _IMGEDIT_MODES.get(category)
    for record in parquet_rows(file) if file.suffix == ".parquet" else _imgedit_rows(file):
        if "data" in record.values:
            yield _imgedit_training(source, record, file.parent, mode)
            continue
        numbers = sorted(
            int(key[4:]) for key in record.values if re.fullmatch(r"turn[1-9]\d*", key)
        )
        record.require(("id", *(f"turn{t}" for t in range(1, max(len(numbers), 1) + 1))))
        image = source.image(record, "id", record.get("id", "text"), file.parent)
        turns = tuple(Turn(record.get(f"turn{t}", "text")) for t in numbers)
        yield Session(image.path.stem, image, turns, mode)


def _imgedit_rows(file: Path) -> Iterator[Record]:
    """JSON Lines, as released, or the one object of numbered records that the project's page
    shows."""
    try:
        first = next((parse_object(raw) for _, raw in lines_of(file)), {})
    except DataError:
        first = {}  # no object by itself: the file is one document over several lines
    if not all(isinstance(value, dict) for value in first.values()):
        yield from json_lines(file)
        return
    for key, values in json_document(file).items():
        if not isinstance(values, dict):
            raise DataError(
                f"{file}: {shown(repr(key))}: {kind(values)} (accepted: an object of id, turn1, "
                f"turn2, …)"
            )
        yield Record(f"{file}: {shown(repr(key))}", values)


def _imgedit_training(source: Source, record: Record, folder: Path, mode: str | None) -> Session:
    record.require(("data",))
    turns, image = [], None
    for t, values in enumerate(record.get("data", "rows")):
        part = Record(f"{record.where}: data[{t}]", values)
        part.require(("input_images", "output_images", "prompt"))
        inputs, outputs = part.get("input_images", "texts"), part.get("output_images", "texts")
        if image is None:
            if len(inputs) != 1:
                raise part.error("input_images", f"a list of {len(inputs)} (accepted: a list of 1)")
            image = source.image(part, "input_images", inputs[0], folder, folder.parent)
        meta = {"input_images": inputs, "output_images": outputs}
        turns.append(Turn(part.get("prompt", "text"), meta=meta))
    assert image is not None
    return Session(image.path.parent.name, image, tuple(turns), mode)


def imgedit_basic(source: Source) -> Iterator[Session]:
    """ImgEdit-Bench, basic: `basic_edit.json` of the repository (`singleturn.json` in the archive
    of its images), an object of numbered single edits. The number is the session's id."""
    names = ("basic_edit.json", "singleturn.json")
    name = next((name for name in names if (source.path / name).is_file()), names[0])
    file = source.file(".json", name=name)
    folder = file.parent
    for number, record in json_members(file):
        record.require(("id", "prompt", "edit_type"))
        places = (folder, folder / "original_images", folder / "singleturn")
        image = source.image(record, "id", record.get("id", "text"), *places)
        turn = Turn(record.get("prompt", "text"), task=record.get("edit_type", "text"))
        yield Session(number, image, (turn,), source.mode)


_GEDIT = ("key", "task_type", "instruction", "instruction_language")
_GEDIT_IMAGE = "input_image_raw"
_GEDIT_LANGUAGES = ("en", "cn")


def gedit(source: Source, language: str = "en") -> Iterator[Session]:
    """GEdit-Bench: a dataset with a row for each edit, of which those in one language ("en" or
    "cn") are taken. The key is the session's id, the group its task."""
    path, more = os.fspath(source.path), ("Intersection_exist",)
    if not is_dataset(path):
        raise DataError(
            f"{shown(path)}: no dataset (accepted: hf:stepfun-ai/GEdit-Bench, or a folder that "
            f"`datasets` saved)"
        )
    none = True
    for row, values, image in dataset_rows(path, _GEDIT_IMAGE, _GEDIT + more):
        record = Record(f"{path}: row {row}", values)
        record.require(_GEDIT, more)
        told = {name: record.get(name, "text") for name in _GEDIT}
        if told["instruction_language"] not in _GEDIT_LANGUAGES:
            raise record.error(
                "instruction_language",
                f"{shown(repr(told['instruction_language']))} (accepted: "
                f"{', '.join(_GEDIT_LANGUAGES)})",
            )
        if told["instruction_language"] != language:
            continue
        none = False
        named = ("key", "instruction_language", *more)
        meta = {name: values[name] for name in named if name in values}
        turn = Turn(told["instruction"], task=told["task_type"])
        yield Session(told["key"], image, (turn,), source.mode, meta)
    if none:
        raise DataError(f"{path}: instruction_language: no row in {language!r} (accepted: one)")


def magicbrush(source: Source) -> Iterator[Session]:
    """MagicBrush as folders: edit_sessions.json beside images/<id>/. (Its Hugging Face form is a
    dataset.)"""
    file = source.file(".json", name="edit_sessions.json")
    needed = ("input", "output", "instruction")
    for name, edits in json_document(file).items():
        session = Record(f"{file}: {shown(repr(name))}", {"edits": edits})
        turns, image = [], None
        for t, values in enumerate(session.get("edits", "rows")):
            record = Record(f"{session.where}: [{t}]", values)
            record.require(needed, ("mask",))
            image = image or source.image(
                record, "input", f"{name}/{record.get('input', 'text')}", file.parent / "images"
            )
            meta: dict[str, Any] = {
                field: record.get(field, "text")
                for field in record.values
                if field != "instruction"
            }
            turns.append(Turn(record.get("instruction", "text"), meta=meta))
        assert image is not None
        yield Session(name, image, tuple(turns), source.mode)
