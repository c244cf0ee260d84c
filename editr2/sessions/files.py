"""Sessions on disk.

A set of sessions is a folder with `sessions.jsonl`, one JSON object a line, and the images that it
names:

    {"id": "kitchen", "image": "images/kitchen.png", "mode": "cu",
     "turns": [{"instruction": "add a red cup"}, {"instruction": "make it blue", "intent": "make the
         cup blue"}]}

`image` is relative to the folder, or absolute. `id`, `mode`, `size`, `references` (a list of
further images, named like it) and `meta` are optional, and so are a turn's `intent`, `task` and
`meta`; null means absent. Blank lines are allowed. A Hugging Face dataset whose rows are sessions
is read in the same way (datasets.py). docs/data.md is the user's page.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from editr2.errors import DataError, UserError, counted, shown
from editr2.sessions.buckets import Size, Sizes, is_one, listed, written
from editr2.sessions.datasets import dataset_entries
from editr2.sessions.images import RESIZES, ImageFile, Pixels, locate
from editr2.sessions.records import Entry, lines_of, parse_object, record_problems
from editr2.sessions.session import Session, StoredImage, Turn, is_text, size_of, sum_of_pixels

__all__ = [
    "ImageFile",
    "Session",
    "Survey",
    "Turn",
    "load_sessions",
    "save_sessions",
    "survey",
    "validate",
]

FILE_NAME = "sessions.jsonl"

Unreadable: TypeAlias = Callable[..., Iterable[tuple[int | None, str]]]
"""(turn from 0, what is wrong) for those of a session's instructions that their reader has no use
for: too long a text, a word that its vocabulary does not have; with None in place of a turn, for
its references. Called with the instructions, with the session's size where there are several, and
with `references`, how many, where it has any."""


def load_sessions(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    size: Sizes | None = None,
    resize: str = "no",
    memory: int = 1 << 30,
    unreadable: Unreadable | None = None,
    others: bool = False,
) -> list[Session]:
    """Read a set of sessions and decode every image, so that a bad file fails here and not hours
    into a run.

    path: a sessions.jsonl file, a folder that holds one, a folder that `datasets` saved to disk, or
        a dataset of the Hugging Face hub, "hf:owner/name:split".
    limit: read only the first `limit` sessions.
    size: (height, width) that every image must have, or several, of which each gets the one that
        its line names as `size` or else the nearest in aspect ratio; None accepts any.
    resize: what becomes of an image of another size: "no" (an error), "crop" (scale to cover, cut
        the middle out) or "stretch".
    memory: bytes of pixels to keep. Images beyond them (3·H·W bytes each, 1.3 thousand of 512² in
        the default) are decoded here to be checked, and again whenever `Session.image` is read.
    unreadable: what a policy cannot make of the instructions, which is then an error of the line;
        with several sizes it is told the session's, too.
    others: a line may name another size than those; it gets the nearest then, and else is an error.

    A session without an id is named after its line, `line-000007`. Images may be 8-bit grey,
    palette or RGB, with or without alpha, in one of `images.FORMATS`: EXIF orientation is applied,
    a colour profile is converted to sRGB, transparency is composited over white, and the result is
    uint8 [H, W, 3].

    Raises DataError, `path:line: field: problem (accepted: …)`, for the first thing that is wrong.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} (accepted: 1 or more)")
    sessions = []
    how: dict[str, Any] = {"memory": memory, "unreadable": unreadable, "others": others}
    for item in scan(path, size=size, resize=resize, **how):
        if isinstance(item, str):
            raise DataError(item)
        sessions.append(item)
        if len(sessions) == limit:
            break
    return sessions


@dataclass(frozen=True)
class Survey:
    """What a set of sessions holds. Sessions with problems are counted nowhere but there.

    problems: everything that is wrong, in the order of the file.
    turns, sizes, modes: number of sessions by number of turns, by (height, width) and by mode.
    """

    problems: list[str] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)
    sizes: Counter[Size] = field(default_factory=Counter)
    modes: Counter[str | None] = field(default_factory=Counter)

    def __str__(self) -> str:
        turns = [f"{turns} ({count})" for turns, count in sorted(self.turns.items())]
        sizes = [
            f"{height}×{width} ({count})" for (height, width), count in self.sizes.most_common(4)
        ]
        more = [f"{len(self.sizes) - 4} more"] if len(self.sizes) > 4 else []
        modes = [
            f"{mode or 'none'} ({count})"
            for mode, count in sorted(self.modes.items(), key=lambda item: item[0] or "")
        ]
        lists = {"turns": turns, "height×width": sizes + more, "mode": modes}
        count = counted(self.turns.total(), "session")
        return "; ".join([count, *(f"{k} {', '.join(v)}" for k, v in lists.items())])


def survey(
    path: str | os.PathLike[str],
    *,
    size: Sizes | None = None,
    resize: str = "no",
    unreadable: Unreadable | None = None,
    each: Callable[[Session], object] | None = None,
) -> Survey:
    """Reads a whole set, images too, and keeps none of it. Arguments as in `load_sessions`; `each`
    is shown every session that has no problems. Raises for none of what is wrong with the set."""
    result = Survey()
    try:
        for item in scan(path, size=size, resize=resize, unreadable=unreadable):
            if isinstance(item, str):
                result.problems.append(item)
                continue
            result.turns[len(item.turns)] += 1
            result.sizes[item.image.shape[:2]] += 1
            result.modes[item.mode] += 1
            if each is not None:
                each(item)
    except DataError as error:
        result.problems.append(str(error))
    return result


def validate(
    path: str | os.PathLike[str],
    *,
    size: Sizes | None = None,
    resize: str = "no",
    unreadable: Unreadable | None = None,
) -> list[str]:
    """Everything that is wrong with a set of sessions, in the order of the file; empty if it would
    load. Arguments as in `load_sessions`."""
    return survey(path, size=size, resize=resize, unreadable=unreadable).problems


def save_sessions(sessions: Iterable[Session], folder: str | os.PathLike[str]) -> Path:
    """Write `folder/sessions.jsonl` and its images; returns the path of sessions.jsonl.

    `load_sessions` gives back equal ids, pixels, turns, modes and meta. Images are written as the
    sessions come, so an iterator of any length will do: an `ImageFile` is copied as it is, pixels
    become PNG. An existing set in the folder is replaced at one instant: image files are named by
    their content, so they never overwrite another's pixels, and sessions.jsonl is renamed into
    place last. Images that only the old set used stay, and so do those of a save that failed.

    Raises DataError for no sessions, a repeated id, an image that cannot be read, or a meta that is
    not JSON.
    """
    folder = Path(folder)
    lines: dict[str, bytes] = {}
    written: set[str] = set()
    for session in sessions:
        if session.id in lines:
            raise DataError(f"{folder / FILE_NAME}: id: {session.id!r} given twice")
        images = [_stored(image) for image in (vars(session)["image"], *session.references)]
        name, *beside = [named for named, _ in images]
        turns = [
            _without_absent(instruction=t.instruction, intent=t.intent, task=t.task, meta=t.meta)
            for t in session.turns
        ]
        record = _without_absent(
            id=session.id,
            image=name,
            mode=session.mode,
            size=session.size,
            references=beside or None,
            turns=turns,
            meta=session.meta,
        )
        try:
            lines[session.id] = (
                json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            )
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"{error} (accepted: Unicode text, and JSON values in meta)"
            raise DataError(f"session {session.id!r}: {problem}") from error
        for name, image in images:
            if name in written:
                continue
            try:
                (folder / "images").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
            _write_atomically(folder / name, image)
            written.add(name)
    if not lines:
        raise DataError(f"{folder / FILE_NAME}: no sessions to save")
    _write_atomically(folder / FILE_NAME, b"".join(lines.values()))
    return folder / FILE_NAME


def _stored(source: Any) -> tuple[str, bytes]:
    """The name, which follows from the content, and the bytes of the file of an image of a
    session's."""
    if isinstance(source, ImageFile) and source.resize == "no":
        source()  # whoever loads the set must be able to decode it
        data = source.path.read_bytes()
        return f"images/{hashlib.sha256(data).hexdigest()[:24]}{source.path.suffix.lower()}", data
    pixels = np.ascontiguousarray(source() if callable(source) else source)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return f"images/{digest[:24]}.png", buffer.getvalue()


@dataclass(frozen=True)
class _NoImage:
    """In place of an image whose name alone is wrong."""

    problem: str
    size: Sizes | None = None
    resize: str = "no"
    checksum: str | None = None

    def __call__(self) -> Pixels:
        raise DataError(self.problem)


def scan(
    path: str | os.PathLike[str],
    *,
    size: Sizes | None = None,
    resize: str = "no",
    memory: int = 1 << 30,
    unreadable: Unreadable | None = None,
    contained: bool = False,
    others: bool = False,
) -> Iterator[Session | str]:
    """The sessions of a set in order, and a line of text for each problem. Lazy: an image is
    decoded when reached.

    contained: the set is of others, and relative names of images must not lead out of its folder.
    The other arguments as in `load_sessions`. Raises DataError when there is no set at `path`.
    """
    if resize not in RESIZES:
        raise UserError(f"resize: {resize!r} (accepted: {', '.join(RESIZES)})")
    if is_dataset(path):
        entries = dataset_entries(os.fspath(path), size, resize, contained)
    else:
        entries = _file_entries(_locate(path), size, resize, contained)
    return _checked(entries, size, None if others else size, memory, unreadable)


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether this is a Hugging Face dataset: of the hub (hf:…), or a folder that `datasets`
    saved."""
    # os.path answers for names that are too long for any file, where pathlib raises.
    saved = any(os.path.isfile(Path(path) / name) for name in ("state.json", "dataset_dict.json"))
    return os.fspath(path).startswith("hf:") or (
        saved and not os.path.exists(Path(path) / FILE_NAME)
    )


def check_there(path: str | os.PathLike[str]) -> None:
    """Raises DataError, as reading it would, where there is no set at `path`. The hub is not asked,
    and nothing is read."""
    if not is_dataset(path):
        _locate(path)


def _locate(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    file = path / FILE_NAME if os.path.isdir(path) else path
    if not os.path.isfile(file):
        problem = f"no {FILE_NAME} in the folder" if os.path.isdir(path) else "no such file"
        raise DataError(
            f"{shown(path)}: {problem} (accepted: a {FILE_NAME} file or a folder that holds one)"
        )
    return file


def _file_entries(file: Path, size: Sizes | None, resize: str, contained: bool) -> Iterator[Entry]:
    lines_there = False
    for number, raw in lines_of(file):
        lines_there = True
        where, place = f"{file}:{number}", f"line {number}"
        try:
            record = parse_object(raw)
        except DataError as error:
            yield Entry(where, place, error, None)
            continue
        asked = _asked(record, size)

        def stored(name: str, asked: Sizes | None = asked) -> StoredImage:
            try:
                return ImageFile(locate(file.parent, name, contained=contained), asked, resize)
            except DataError as error:
                return _NoImage(str(error))

        image, beside = record.get("image"), record.get("references")
        yield Entry(
            where,
            place,
            record,
            stored(image) if is_text(image) else None,
            tuple(map(stored, filter(is_text, beside if isinstance(beside, list) else ()))),
        )
    if not lines_there:
        raise DataError(
            f"{file}: no sessions in the file (accepted: one JSON object a line, at least one)"
        )


def _asked(record: Mapping[str, Any], size: Sizes | None) -> Sizes | None:
    """What its image is brought to: the size that a session names, if there is such a one."""
    named = size_of(record)
    return named if size is not None and named in listed(size) else size


def _checked(
    entries: Iterable[Entry],
    size: Sizes | None,
    accepted: Sizes | None,
    memory: int,
    unreadable: Unreadable | None,
) -> Iterator[Session | str]:
    """accepted: the sizes that a line may name, None for any."""
    seen: dict[str, str] = {}
    for where, place, record, stored, beside in entries:
        if isinstance(record, DataError):
            yield f"{where}: {record}"
            continue
        problems = list(record_problems(record))
        given = record.get("id")
        name = given if isinstance(given, str) else "{}-{:0>6}".format(*place.split())
        if name in seen:
            problems.append(
                (
                    "id",
                    f"{shown(repr(name))} was already used on {seen[name]} (accepted: unique ids)",
                )
            )
        seen.setdefault(name, place)
        named = size_of(record)
        if accepted is not None and named is not None and named not in listed(accepted):
            problems.append(("size", f"{list(named)} (accepted: {written(accepted)}, or absent)"))
        pixels, undecoded = None, []
        if stored is not None:
            try:
                pixels = stored()
            except DataError as error:
                undecoded.append(("image", str(error)))
        references = []
        for i, reference in enumerate(beside):
            if size is not None and pixels is not None:  # its own size, whichever is nearer to them
                reference = replace(reference, size=pixels.shape[:2])  # type: ignore[type-var]
            try:
                references.append((reference, reference()))
            except DataError as error:
                undecoded.append((f"references[{i}]", str(error)))
        if unreadable is not None and not problems:
            of = f"of session {shown(repr(name))}: "
            told = [turn["instruction"] for turn in record["turns"]]
            several = size is not None and not is_one(size) and pixels is not None
            at = (pixels.shape[:2],) if several and pixels is not None else ()
            more = {"references": len(beside)} if beside else {}
            problems += (
                ("references" if turn is None else f"turns[{turn}].instruction", of + problem)
                for turn, problem in unreadable(told, *at, **more)
            )
        problems += undecoded
        yield from (f"{where}: {field}: {problem}" for field, problem in problems)
        if pixels is None or stored is None or problems:
            continue
        turns = tuple(
            Turn(t["instruction"], t.get("intent"), t.get("task"), t.get("meta") or {})
            for t in record["turns"]
        )
        kept: list[Any] = []
        for read, seen_pixels in ((stored, pixels), *references):
            memory -= seen_pixels.nbytes
            if memory >= 0:
                kept.append(seen_pixels)
                continue
            # The size that was seen stands, so that a file that is replaced while a run reads it is
            # an error.
            seen_as = {"size": seen_pixels.shape[:2], "checksum": sum_of_pixels(seen_pixels)}
            kept.append(replace(read, **seen_as))  # type: ignore[type-var]
        mode, meta = record.get("mode"), record.get("meta") or {}
        yield Session(name, kept[0], turns, mode, meta, named, tuple(kept[1:]))


def _without_absent(**values: Any) -> dict[str, Any]:
    plain = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
    return {key: value for key, value in plain.items() if value is not None and value != {}}


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
