"""Outputs on disk, as `editr2 rollout` writes them, beside the sessions that they are of.

A folder has `outputs.jsonl`, one object a line, and the images that it names, one a turn:

    {"id": "kitchen", "turns": [{"image": "images/00000_t1.png"}, {"image": "images/00000_t2.png"}]}

Of a turn, `instruction` is held against the session's where it is there; anything else is not
looked at. What a folder says of a session is one output of it. Several folders, or several lines of
one id, are siblings: they are compared with each other. An output is called by its folder's name;
the second of an id in one folder by `name#2`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from editr2.errors import DataError, shown
from editr2.sessions import Session
from editr2.sessions.buckets import Sizes
from editr2.sessions.images import locate, read_image, size_in_file
from editr2.sessions.records import lines_of, parse_object
from editr2.sessions.session import is_text, kind

FILE_NAME = "outputs.jsonl"


@dataclass(frozen=True)
class Output:
    """One output of a session. name: of it among its siblings. images: a file a turn. where: its
    line, for messages."""

    session: Session
    name: str
    images: tuple[Path, ...]
    where: str

    def read(self) -> np.ndarray:
        """uint8 [T, H, W, 3], of the size of the session's image. Raises DataError."""
        height, width = self.session.image.shape[:2]
        pixels = []
        for turn, path in enumerate(self.images):
            try:
                image = read_image(path)
            except DataError as error:
                raise DataError(f"{self.where}: turns[{turn}].image: {error}") from error
            if image.shape[:2] != (height, width):
                raise DataError(
                    f"{self.where}: turns[{turn}].image: {image.shape[0]}x{image.shape[1]} (height "
                    f"x width), and the image of session {shown(repr(self.session.id))} is "
                    f"{height}x{width} (accepted: equal sizes, or --data.resize as in the rollout)"
                )
            pixels.append(image)
        return np.stack(pixels)


def output_sizes(folders: Sequence[str]) -> Sizes:
    """(height, width) of the outputs of the first folder, by their first images; several where they
    are of several (`policy.buckets`). Raises DataError."""
    file = _file(folders[0])
    paths = [
        file.parent / turn["image"]
        for _, record in records(file)
        for turn in _turns(record)[:1]
        if is_text(turn.get("image"))
    ]
    found = tuple(dict.fromkeys(map(size_in_file, paths)))
    if not found:
        raise DataError(f"{file}: no outputs (accepted: one JSON object a line, at least one)")
    return found if len(found) > 1 else found[0]


def count_outputs(folders: Sequence[str]) -> int:
    """Lines of the longest one."""
    return max(sum(1 for _ in lines_of(_file(folder))) for folder in folders)


def read_outputs(folders: Sequence[str], sessions: Mapping[str, Session]) -> list[Output]:
    """Of all folders, session by session in the order of the first; siblings stand together.

    Raises DataError, `file:line: field: problem (accepted: …)`, for the first thing that is wrong.
    """
    found: dict[str, list[Output]] = {}
    for folder, name in zip(folders, output_names(folders), strict=True):
        file, seen = _file(folder), Counter[str]()
        for where, record in records(file):
            session = _session_of(where, record, sessions)
            seen[session.id] += 1
            nth = seen[session.id]
            output = _output(
                where, file.parent, record, session, name if nth == 1 else f"{name}#{nth}"
            )
            found.setdefault(session.id, []).append(output)
        if not seen:
            raise DataError(f"{file}: no outputs (accepted: one JSON object a line, at least one)")
    return [output for siblings in found.values() for output in siblings]


def output_names(folders: Sequence[str]) -> list[str]:
    """What the outputs of each folder are called: its last part where that tells it from the
    others."""
    last = [Path(os.path.abspath(_file(folder).parent)).name for folder in folders]
    twice = {name for name, count in Counter(last).items() if count > 1}
    names = [str(folder) if name in twice else name for folder, name in zip(folders, last)]
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"--outputs: {shown(name)} given twice (accepted: each folder once)")
    return names


def _file(folder: str) -> Path:
    path = Path(folder)
    file = path / FILE_NAME if os.path.isdir(path) else path
    if not os.path.isfile(file):
        problem = f"no {FILE_NAME} in the folder" if os.path.isdir(path) else "no such file"
        raise DataError(
            f"{shown(folder)}: {problem} (accepted: a folder as `editr2 rollout` writes it)"
        )
    return file


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line. Raises DataError."""
    for number, raw in lines_of(file):
        try:
            yield f"{file}:{number}", parse_object(raw)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from error


def _session_of(where: str, record: Mapping[str, Any], sessions: Mapping[str, Session]) -> Session:
    name = record.get("id")
    if not isinstance(name, str) or name not in sessions:
        given = shown(repr(name)) if isinstance(name, str) else kind(name)
        raise DataError(
            f"{where}: id: {given} is no session of --data (accepted: {some(sessions)})"
        )
    return sessions[name]


def some(names: Iterable[str]) -> str:
    """The first few, quoted."""
    listed = [shown(repr(name)) for name in names]
    return ", ".join(listed[:3]) + (f", … {len(listed)} in all" if len(listed) > 3 else "")


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = record.get("turns")
    return [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []


def _output(
    where: str, folder: Path, record: Mapping[str, Any], session: Session, name: str
) -> Output:
    turns, images = _turns(record), []
    if len(turns) != len(session.turns):
        raise DataError(
            f"{where}: turns: {len(turns)} of session {shown(repr(session.id))} (accepted: "
            f"{len(session.turns)}, an object with an image for each of its turns)"
        )
    for place, turn in enumerate(turns):
        path = image_of(where, folder, session, place, turn)
        if not os.path.isfile(path):
            raise DataError(f"{where}: turns[{place}].image: {shown(path)}: no such file")
        images.append(path)
    return Output(session, name, tuple(images), where)


def image_of(
    where: str, folder: Path, session: Session, place: int, turn: Mapping[str, Any]
) -> Path:
    """The file that a line names for its turn `place` (from 0), whether or not it is there. Raises
    DataError where the turn has another instruction than the session's."""
    told, image, wanted = turn.get("instruction"), turn.get("image"), session.turns[place]
    if told is not None and told != wanted.instruction:
        raise DataError(
            f"{where}: turns[{place}].instruction: {kind(told)} (accepted: session "
            f"{shown(repr(session.id))}'s own, {shown(repr(wanted.instruction))}; are these "
            f"outputs of other sessions?)"
        )
    at = f"{where}: turns[{place}].image"
    if not is_text(image):
        raise DataError(f"{at}: {kind(image)} (accepted: the path of an image)")
    try:
        return locate(folder, image, contained=True)
    except DataError as error:
        raise DataError(f"{at}: {error}") from error
