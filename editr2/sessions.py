"""Sessions: an image and the instructions to apply to it, turn by turn, and their form on disk.

A set of sessions is a folder with `sessions.jsonl`, one JSON object a line, and the images that it names:

    {"id": "kitchen", "image": "images/kitchen.png", "mode": "cu",
     "turns": [{"instruction": "add a red cup"}, {"instruction": "make it blue", "intent": "make the cup blue"}]}

`image` is relative to the folder, or absolute. `id`, `mode` and `meta` are optional, and so are a turn's `intent`,
`task` and `meta`; null means absent. Blank lines are allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from editr2.errors import DataError, UserError

__all__ = ["Session", "Turn", "load_sessions", "save_sessions", "validate"]

FILE_NAME = "sessions.jsonl"
MODES = ("cm", "cu")
_SESSION_KEYS = ("id", "image", "turns", "mode", "meta")
_TURN_KEYS = ("instruction", "intent", "task", "meta")
_PIXEL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    instruction: what the user asks, verbatim; not blank.
    intent: the self-contained form of the instruction, where the ground truth is known.
    task: the kind of edit (such as "add" or "recolour"), where known.
    meta: whatever a reward needs to judge the turn; JSON values only, if it is to be saved.
    """

    instruction: str
    intent: str | None = None
    task: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, problem in _turn_problems(vars(self)):
            raise DataError(f"Turn: {name}: {problem}")
        if self.meta is None:
            raise DataError("Turn: meta: None (accepted: a mapping)")


@dataclass(frozen=True, eq=False)  # eq=False: comparing arrays gives arrays; a session is compared by identity
class Session:
    """An image and the turns to apply to it.

    id: unique in its set.
    image: uint8 [H, W, 3], RGB.
    turns: at least one.
    mode: "cm" (a standing rule set early holds for later turns), "cu" (later turns refer back by pronouns) or None.
    meta: whatever a reward needs to judge the session; JSON values only, if it is to be saved.
    """

    id: str
    image: npt.NDArray[np.uint8]
    turns: tuple[Turn, ...]
    mode: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, problem in _session_problems(vars(self)):
            raise DataError(f"Session {self.id!r}: {name}: {problem}")
        if self.id is None or self.meta is None:
            raise DataError(f"Session {self.id!r}: id and meta cannot be None (accepted: a string; a mapping)")
        image = self.image
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f"Session {self.id!r}: image: {given} (accepted: a uint8 array [H, W, 3])")
        if 0 in image.shape:
            raise DataError(f"Session {self.id!r}: image: no pixels, shape {list(image.shape)}")
        if not (isinstance(self.turns, tuple) and self.turns and all(isinstance(turn, Turn) for turn in self.turns)):
            raise DataError(f"Session {self.id!r}: turns: wrong value (accepted: a tuple of one or more Turn)")


def load_sessions(
    path: str | os.PathLike[str], *, limit: int | None = None, size: tuple[int, int] | None = None
) -> list[Session]:
    """Read a set of sessions and decode every image, so that a bad file fails here and not hours into a run.

    path: a sessions.jsonl file, or a folder that holds one.
    limit: read only the first `limit` sessions.
    size: (height, width) that every image must have; None accepts any.

    A session without an id is named after its line, `line-000007`. Images may be anything that Pillow decodes to
    8-bit grey, palette or RGB, with or without alpha: EXIF orientation is applied, transparency is composited over
    white, and the result is uint8 [H, W, 3]. All images stay in memory: 3·H·W bytes each, 0.8 GB for a thousand of
    512².

    Raises DataError, `path:line: field: problem (accepted: …)`, for the first thing that is wrong.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} (accepted: 1 or more)")
    sessions = []
    for item in _scan(_locate(path), size):
        if isinstance(item, str):
            raise DataError(item)
        sessions.append(item)
        if len(sessions) == limit:
            break
    if not sessions:
        raise DataError(f"{_locate(path)}: no sessions in the file (accepted: one JSON object a line, at least one)")
    return sessions


def validate(path: str | os.PathLike[str], *, size: tuple[int, int] | None = None) -> list[str]:
    """Everything that is wrong with a set of sessions, in the order of the file; empty if it would load."""
    try:
        file = _locate(path)
        items = [item if isinstance(item, str) else None for item in _scan(file, size)]
    except DataError as error:
        return [str(error)]
    if not items:
        return [f"{file}: no sessions in the file (accepted: one JSON object a line, at least one)"]
    return [item for item in items if item is not None]


def save_sessions(sessions: Iterable[Session], folder: str | os.PathLike[str]) -> Path:
    """Write `folder/sessions.jsonl` and its images as PNG; returns the path of sessions.jsonl.

    `load_sessions` gives back equal ids, pixels, turns, modes and meta. An existing set in the folder is replaced at
    one instant: image files are named by their content, so they never overwrite another's pixels, and sessions.jsonl
    is renamed into place last. Images that only the old set used stay.

    Raises DataError for no sessions, a repeated id, or a meta that is not JSON.
    """
    folder = Path(folder)
    lines: dict[str, bytes] = {}
    images: dict[str, npt.NDArray[np.uint8]] = {}
    for session in sessions:
        if session.id in lines:
            raise DataError(f"{folder / FILE_NAME}: id: {session.id!r} given twice")
        pixels = np.ascontiguousarray(session.image)
        name = f"images/{hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:24]}.png"
        images[name] = pixels
        turns = [
            _without_absent(instruction=t.instruction, intent=t.intent, task=t.task, meta=t.meta) for t in session.turns
        ]
        record = _without_absent(id=session.id, image=name, mode=session.mode, turns=turns, meta=session.meta)
        try:
            lines[session.id] = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"{error} (accepted: Unicode text, and JSON values in meta)"
            raise DataError(f"session {session.id!r}: {problem}") from error
    if not lines:
        raise DataError(f"{folder / FILE_NAME}: no sessions to save")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
    for name, pixels in images.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        _write_atomically(folder / name, buffer.getvalue())
    _write_atomically(folder / FILE_NAME, b"".join(lines.values()))
    return folder / FILE_NAME


def _locate(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        problem = f"no {FILE_NAME} in the folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {problem} (accepted: a {FILE_NAME} file or a folder that holds one)")
    return file


def _scan(file: Path, size: tuple[int, int] | None) -> Iterator[Session | str]:
    """The sessions of a file in order, and a line of text for each problem. Lazy: an image is decoded when reached."""
    try:
        raw_lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    seen: dict[str, int] = {}
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        try:
            record = _parse_line(raw)
        except DataError as error:
            yield f"{file}:{number}: {error}"
            continue
        problems = list(_record_problems(record))
        given = record.get("id")
        name = given if isinstance(given, str) else f"line-{number:06d}"
        if name in seen:
            problems.append(("id", f"{name!r} was already used on line {seen[name]} (accepted: unique ids)"))
        seen.setdefault(name, number)
        image = None
        if isinstance(record.get("image"), str) and record["image"].strip():
            try:
                image = _read_image(file.parent / record["image"], size)
            except DataError as error:
                problems.append(("image", str(error)))
        yield from (f"{file}:{number}: {where}: {problem}" for where, problem in problems)
        if image is not None and not problems:
            turns = tuple(
                Turn(t["instruction"], t.get("intent"), t.get("task"), t.get("meta") or {}) for t in record["turns"]
            )
            yield Session(name, image, turns, record.get("mode"), record.get("meta") or {})


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8") from error
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        # "\ud800" alone is legal JSON, but no tokenizer and no UTF-8 file can hold it.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(f"column {error.colno}: malformed JSON: {error.msg} (accepted: one object a line)") from error
    except UnicodeEncodeError as error:
        raise DataError("a string holds half of a surrogate pair (accepted: Unicode text)") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting beyond any use
        raise DataError(f"malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{_kind(record)} (accepted: one JSON object a line)")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise DataError(f"{repeated}: key given twice in one object")
    return result


def _refuse_constant(name: str) -> None:
    raise DataError(f"{name} is not JSON (accepted: finite numbers)")


def _record_problems(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, problem) for everything wrong with the record of a line, files apart."""
    yield from _unknown_keys(record, _SESSION_KEYS, "")
    yield from _session_problems(record)
    image = record.get("image")
    if image is None:
        yield "image", "missing (accepted: the path of an image, relative to this file)"
    elif not isinstance(image, str) or not image.strip():
        yield "image", f"{_kind(image)} (accepted: the path of an image, relative to this file)"
    turns = record.get("turns")
    if turns is None:
        yield "turns", "missing (accepted: a list of one or more turns)"
    elif not isinstance(turns, list) or not turns:
        yield "turns", f"{_kind(turns)} (accepted: a list of one or more turns)"
    else:
        for index, turn in enumerate(turns):
            where = f"turns[{index}]"
            if not isinstance(turn, dict):
                yield where, f"{_kind(turn)} (accepted: an object with an instruction)"
                continue
            yield from _unknown_keys(turn, _TURN_KEYS, where + ".")
            yield from ((f"{where}.{name}", problem) for name, problem in _turn_problems(turn))


def _session_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("id") is not None and not _is_text(values["id"]):
        yield "id", f"{_kind(values['id'])} (accepted: a non-empty string)"
    mode = values.get("mode")
    if mode is not None and mode not in MODES:
        yield "mode", f"{_kind(mode)} (accepted: {', '.join(map(repr, MODES))} or absent)"
    yield from _meta_problems(values)


def _turn_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("instruction") is None:
        yield "instruction", "missing (accepted: a non-empty string)"
    elif not _is_text(values["instruction"]):
        yield "instruction", f"{_kind(values['instruction'])} (accepted: a non-empty string)"
    for name in ("intent", "task"):
        if values.get(name) is not None and not _is_text(values[name]):
            yield name, f"{_kind(values[name])} (accepted: a non-empty string, or absent)"
    yield from _meta_problems(values)


def _meta_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    meta = values.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        yield "meta", f"{_kind(meta)} (accepted: an object, or absent)"


def _unknown_keys(record: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> Iterator[tuple[str, str]]:
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"{prefix}{key}", f"unknown key ({hint}accepted: {', '.join(known)})"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _kind(value: object) -> str:
    """What was given, short enough for one line."""
    if isinstance(value, str):
        return f"the string {value if len(value) <= 40 else value[:37] + '...'!r}" if value.strip() else "blank string"
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return f"a {type(value).__name__}"


def _read_image(path: Path, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """Decode to uint8 [H, W, 3]; DataError says what is wrong with the file."""
    if not path.is_file():  # also keeps out folders and pipes, which would block
        raise DataError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise DataError(f"{path}: empty file (accepted: an image)")
    # Pillow's decoders raise whatever their parsing runs into (OSError, SyntaxError, ValueError, struct.error,
    # IndexError, …); for a file that a user gave, all of it means the same.
    try:
        with Image.open(io.BytesIO(data)) as opened:
            _require_still_8_bit(opened)
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            pixels = np.array(image.convert("RGB"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:
        raise DataError(f"{path}: not a readable image: {_first_line(error)}") from error
    if size is not None and pixels.shape[:2] != tuple(size):
        given = f"{pixels.shape[0]}×{pixels.shape[1]}"
        raise DataError(f"{path}: {given} pixels, height × width (accepted: {size[0]}×{size[1]})")
    return pixels


def _require_still_8_bit(image: Image.Image) -> None:
    # An MPO is a phone's JPEG with a depth or gain map behind the picture, not an animation.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise DataError(f"animated, {frames} frames (accepted: a still image)")
    if image.mode not in _PIXEL_MODES:
        raise DataError(f"pixel format {image.mode} (accepted: 8-bit {', '.join(_PIXEL_MODES)})")


def _first_line(error: BaseException) -> str:
    # Pillow names the buffer's address in "cannot identify image file <_io.BytesIO object at 0x…>".
    text = str(error).split(" <_io.BytesIO")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


def _without_absent(**values: Any) -> dict[str, Any]:
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
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
