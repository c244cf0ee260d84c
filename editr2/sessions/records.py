"""Sessions as they are stored, yet to be checked: JSON read strictly, and what is wrong with a
record."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from editr2.errors import DataError, shown
from editr2.sessions.session import (
    SESSION_KEYS,
    TURN_KEYS,
    StoredImage,
    kind,
    session_problems,
    turn_problems,
)


class Entry(NamedTuple):
    """A session as it is stored, yet to be checked.

    where: the file and line that a message starts with; place: the line or row alone, as `line 7`.
    record: the object of a line of sessions.jsonl, or what is wrong with it; its `image` is not
        looked at.
    image: decodes the image; None: there is none to decode. references: the same of its further
        ones.
    """

    where: str
    place: str
    record: Mapping[str, Any] | DataError
    image: StoredImage | None
    references: tuple[StoredImage, ...] = ()


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the lines that are not blank, from 1, without a byte order mark. Raises
    DataError."""
    try:
        raw_lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    return ((number, raw) for number, raw in enumerate(raw_lines, start=1) if raw.strip())


def parse_object(raw: bytes, accepted: str = "one JSON object a line") -> dict[str, Any]:
    """A JSON object, strictly. Raises DataError without the place, which the caller knows."""
    try:
        text = raw.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8") from error
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        # "\ud800" alone is legal JSON, but no tokenizer and no UTF-8 file can hold it.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"column {error.colno}: malformed JSON: {error.msg} (accepted: {accepted})"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            "a string holds half of a surrogate pair (accepted: Unicode text)"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits; nesting beyond any use
        raise DataError(f"malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{kind(record)} (accepted: {accepted})")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise DataError(f"{shown(repeated)}: key given twice in one object")
    return result


def _refuse_constant(name: str) -> None:
    raise DataError(f"{name} is not JSON (accepted: finite numbers)")


def record_problems(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, problem) for everything wrong with the record of a line, files apart."""
    yield from _unknown_keys(record, SESSION_KEYS, "")
    yield from session_problems(record)
    image = record.get("image")
    if image is None:
        yield "image", "missing (accepted: the path of an image, relative to this file)"
    elif not isinstance(image, str) or not image.strip():
        yield "image", f"{kind(image)} (accepted: the path of an image, relative to this file)"
    references = record.get("references")
    for index, name in enumerate(references if isinstance(references, list) else ()):
        if not isinstance(name, str) or not name.strip():
            accepted = "the path of an image, relative to this file"
            yield f"references[{index}]", f"{kind(name)} (accepted: {accepted})"
    turns = record.get("turns")
    if turns is None:
        yield "turns", "missing (accepted: a list of one or more turns)"
    elif not isinstance(turns, list) or not turns:
        yield "turns", f"{kind(turns)} (accepted: a list of one or more turns)"
    else:
        for index, turn in enumerate(turns):
            where = f"turns[{index}]"
            if not isinstance(turn, dict):
                yield where, f"{kind(turn)} (accepted: an object with an instruction)"
                continue
            yield from _unknown_keys(turn, TURN_KEYS, where + ".")
            yield from ((f"{where}.{name}", problem) for name, problem in turn_problems(turn))


def _unknown_keys(
    record: Mapping[str, Any], known: tuple[str, ...], prefix: str
) -> Iterator[tuple[str, str]]:
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"{prefix}{shown(key)}", f"unknown key ({hint}accepted: {', '.join(known)})"
