"""Records of foreign files with the place each stands at, and checked access to their fields."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.errors import DataError, one_line, shown
from editr2.sessions.records import lines_of, parse_object
from editr2.sessions.session import is_text, kind

_SPACE = " \t\r\n"
_LIST = "a list of objects"

KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (is_text, "a non-empty string"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "texts": (
        lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
        "a list of strings",
    ),
    "count": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "a number from 1 on",
    ),
    "rows": (
        lambda value: (
            isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
        ),
        "a list of one or more objects",
    ),
}
"""What a field may hold: name -> (check, the words for what is accepted)."""


@dataclass(frozen=True)
class Record:
    """One entry of a foreign file.

    where: what a message starts with: `file:line`.
    """

    where: str
    values: dict[str, Any]

    def error(self, field: str, problem: str) -> DataError:
        return DataError(f"{self.where}: {shown(field)}: {problem}")

    def require(self, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        """Raises DataError when a field of `needed` is missing or one of neither list is there."""
        accepted = f"(accepted: {', '.join(needed + optional)})"
        for name in needed:
            if name not in self.values:
                raise self.error(name, f"missing {accepted}")
        for name in self.values:
            if name not in needed + optional:
                raise self.error(name, f"unknown field {accepted}")

    def get(self, name: str, of: str) -> Any:
        """The field, which must be of this kind (see KINDS)."""
        return self._checked(name, self.values[name], of)

    def per_turn(self, name: str, of: str, turns: int | None = None) -> list[Any]:
        """The field, a list of this kind with one item a turn."""
        value = self.values[name]
        if not isinstance(value, list) or not value or len(value) != (turns or len(value)):
            accepted = f"a list of {turns}, one item a turn" if turns else "a list, one item a turn"
            raise self.error(name, f"{kind(value)} (accepted: {accepted})")
        return [self._checked(f"{name}[{i}]", item, of) for i, item in enumerate(value)]

    def _checked(self, field: str, value: Any, of: str) -> Any:
        check, accepted = KINDS[of]
        if not check(value):
            raise self.error(field, f"{kind(value)} (accepted: {accepted})")
        return value


def json_lines(file: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file."""
    for number, raw in lines_of(file):
        where = f"{file}:{number}"
        try:
            yield Record(where, parse_object(raw))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def json_document(file: Path) -> dict[str, Any]:
    """The one object that a JSON file is."""
    try:
        return parse_object(
            file.read_bytes().removeprefix(b"\xef\xbb\xbf"), accepted="one JSON object in the file"
        )
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except DataError as error:
        cause = error.__cause__
        line = f"{cause.lineno}:" if isinstance(cause, json.JSONDecodeError) else ""
        raise DataError(f"{file}:{line} {error}") from error


def json_members(file: Path) -> Iterator[tuple[str, Record]]:
    """(name, value) of the one object of objects that a JSON file is, each with the line that it
    starts in."""
    document = json_document(file)
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    decoder, at, line, seen = json.JSONDecoder(), text.index("{") + 1, 1, 0
    for name, values in document.items():
        start = text.index('"', at)
        line, seen = line + text.count("\n", seen, start), start
        where = f"{file}:{line}: {shown(repr(name))}"
        if not is_text(name) or not isinstance(values, dict):
            raise DataError(f"{where}: {kind(values)} (accepted: a name and its object)")
        yield name, Record(where, values)
        _, end = decoder.raw_decode(text, start)  # the name
        begin = re.compile(r"\s*:\s*").match(text, end)
        assert begin is not None
        _, at = decoder.raw_decode(text, begin.end())


def json_list(file: Path) -> Iterator[Record]:
    """The objects of the one list that a JSON file is, each with the line that it begins on."""
    try:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start + 1} is not UTF-8") from error
    decoder = json.JSONDecoder()
    line, seen, at = 1, 0, _skipped(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{file}: not a list (accepted: {_LIST})")
    at = _skipped(text, at + 1)
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{file}:{line}: malformed JSON: {said} (accepted: {_LIST})") from error
        try:
            yield Record(f"{file}:{line}", parse_object(text[at:end].encode(), _LIST))
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from error
        at = _skipped(text, end)
        if text[at : at + 1] == ",":
            at = _skipped(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            raise DataError(f"{file}:{line}: malformed JSON (accepted: {_LIST})")


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def csv_rows(file: Path, literals: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a CSV file with a header; fields of `literals` hold Python literals, as pandas
    writes lists."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            line = reader.line_num + 1  # a record may span lines; it stands where it starts
            for cells in reader:
                where, line = f"{file}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells (accepted: {len(header)}, as in the header)"
                    )
                record = Record(where, dict(zip(header, cells)))
                for name in literals:
                    if name in record.values:
                        record.values[name] = _literal(record, name)
                yield record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _literal(record: Record, name: str) -> Any:
    try:
        return ast.literal_eval(record.values[name])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise record.error(
            name, f"{kind(record.values[name])} (accepted: a Python literal)"
        ) from error


def parquet_rows(file: Path) -> Iterator[Record]:
    """The rows of a Parquet file, counted from 0."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{file}: Parquet needs pyarrow (accepted: pip install 'editr2[data]')"
        ) from error
    number = 0
    # What pyarrow raises for a broken file is open-ended, down to a UnicodeDecodeError for a
    # column's name.
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                yield Record(f"{file}: row {number}", values)
                number += 1
    except Exception as error:
        raise DataError(f"{file}: cannot be read: {one_line(error)}") from error
