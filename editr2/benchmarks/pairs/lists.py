"""A JSON file that is one list of objects, with the line on which each begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from editr2.errors import DataError
from editr2.sessions.importers.foreign import Record
from editr2.sessions.records import parse_object

_SPACE = " \t\r\n"
_ACCEPTED = "a list of objects"


def json_list(file: Path) -> Iterator[Record]:
    """Its objects, read strictly. Raises DataError, `file:line: problem`."""
    try:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start + 1} is not UTF-8") from error
    decoder = json.JSONDecoder()
    line, seen, at = 1, 0, _skipped(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{file}: not a list (accepted: {_ACCEPTED})")
    at = _skipped(text, at + 1)
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{file}:{line}: malformed JSON: {said} (accepted: {_ACCEPTED})"
            ) from error
        try:
            yield Record(f"{file}:{line}", parse_object(text[at:end].encode(), _ACCEPTED))
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from error
        at = _skipped(text, end)
        if text[at : at + 1] == ",":
            at = _skipped(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            raise DataError(f"{file}:{line}: malformed JSON (accepted: {_ACCEPTED})")


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
