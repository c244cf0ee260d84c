"""The record of judging, `judges.jsonl`: one line a call, and the answer to an equal call later.

A line says what was asked (`key`, a hash of everything that the answer depends on), where (purpose,
iteration, rollout, turn, name, vote), what came back (`answer`, any JSON) or why nothing did
(`failed`), and what it took (`seconds`, `tries`). A call that was answered is never made again: a
run that was killed goes on from the lines it has, with the same numbers also where the judge
samples, and a folder that runs share (`reward.cache`) spares them each other's calls. A call that
failed is on the record, and made again.

Each process appends to a file of its own with one `write` a line, so a killed process loses no
finished line. What is kept in memory is the place of every line, not its answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from editr2.errors import UserError

log = logging.getLogger(__name__)

NAME = "judges.jsonl"

_WHERE: ContextVar[Mapping[str, Any]] = ContextVar("where", default=MappingProxyType({}))
"""What the lines of this thread's calls say of where they belong."""

_ANEW: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def calls_of(**where: Any) -> Iterator[None]:
    """Lines written inside also say this: `purpose`, `iteration`, `rollout`."""
    token = _WHERE.set({**_WHERE.get(), **where})
    try:
        yield
    finally:
        _WHERE.reset(token)


@contextmanager
def asked_anew() -> Iterator[None]:
    """Inside, no recorded answer stands in for a call: whether a judge is there is seen by
    asking."""
    token = _ANEW.set(True)
    try:
        yield
    finally:
        _ANEW.reset(token)


def pixel_digest(image: np.ndarray) -> str:
    """Of an image's shape and bytes, however it is encoded later."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def request_key(**parts: Any) -> str:
    """The hash of a call, from JSON values that say all that its answer depends on."""
    said = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


class Record:
    """The calls of one process of a run, and the answers that are known.

    folder: of the run; its files `judges*.jsonl` are read at the first question. index: of the
    process. cache: a folder that runs share; every file `*.jsonl` in it is read, and what this
    process asks is appended to one of its own. May be used from many threads.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, *, index: int = 0, cache: str | None = None
    ) -> None:
        self._lock = threading.RLock()
        self._known: dict[bytes, tuple[int, int]] | None = None
        self._files: list[Path] = []
        self._unread: set[int] = set()  # files that had answers of another form
        self._append: list[Path] = []
        self._open: dict[Path, int] = {}
        self._folders: list[tuple[Path, str]] = []
        if folder is not None:
            name = NAME if index == 0 else f"judges.{index}.jsonl"
            self._append.append(Path(folder) / name)
            self._folders.append((Path(folder), "judges*.jsonl"))
        if cache is not None:
            self._append.append(Path(cache) / f"{uuid.uuid4().hex}.jsonl")
            self._folders.append((Path(cache), "*.jsonl"))

    def find(self, key: str, read: Callable[[Any], Any] | None = None) -> Any | None:
        """The answer of an equal call, or None. read: makes of the answer what is returned; one
        that it cannot read (it raises TypeError, ValueError or LookupError) is none, and forgotten:
        another version or another hand wrote it."""
        if _ANEW.get():
            return None
        with self._lock:
            place = self._index().get(bytes.fromhex(key))
            if place is None:
                return None
            number, offset = place
            try:
                with self._files[number].open("rb") as file:
                    file.seek(offset)
                    answer = json.loads(file.readline())["answer"]
                return answer if read is None or answer is None else read(answer)
            except (TypeError, ValueError, LookupError, RecursionError):
                del self._index()[bytes.fromhex(key)]
                if number not in self._unread:
                    self._unread.add(number)
                    log.warning(
                        "%s: answers there cannot be read; asked again", self._files[number]
                    )
                return None
            except OSError as error:
                raise _unusable(self._files[number], error) from error

    def write(
        self,
        key: str,
        answer: Any,
        *,
        failed: str | None = None,
        seconds: float,
        tries: int,
        **where: Any,
    ) -> Any:
        """One line. answer: None of a call that failed, and then `failed` says why. Returns the
        answer that stands: an equal call of another thread may have come first."""
        row = {**_WHERE.get(), **where, "key": key}
        row |= {"answer": answer} if failed is None else {"failed": failed}
        row |= {"seconds": round(seconds, 3), "tries": tries}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if failed is None and (before := self.find(key)) is not None:
                return before
            for path in self._append:
                at = self._written(path, line)
                if failed is None and path == self._append[0]:
                    self._index().setdefault(bytes.fromhex(key), (self._number(path), at))
        return answer

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _written(self, path: Path, line: bytes) -> int:
        """Where the line begins."""
        try:
            if path not in self._open:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                size = os.fstat(self._open[path]).st_size
                if size and os.pread(self._open[path], 1, size - 1) != b"\n":
                    os.write(self._open[path], b"\n")  # behind a torn line
            descriptor = self._open[path]
            at = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.close(self._open.pop(path))  # what comes next begins behind a torn line
                raise OSError(28, "no space left for a whole line")
        except OSError as error:
            raise _unusable(path, error) from error
        return at

    def _number(self, path: Path) -> int:
        if path not in self._files:
            self._files.append(path)
        return self._files.index(path)

    def _index(self) -> dict[bytes, tuple[int, int]]:
        """Where the answer to every key stands; of files that have the same, in the first."""
        if self._known is None:
            self._known = {}
            for folder, pattern in self._folders:
                for path in sorted(folder.glob(pattern)):
                    try:
                        self._read(path)
                    except UserError:
                        self._known = None  # asked once more, it says so once more
                        raise
        return self._known

    def _read(self, path: Path) -> None:
        assert self._known is not None
        number, offset, torn = self._number(path), 0, 0
        found: dict[bytes, tuple[int, int]] = {}  # the last: an earlier one could not be read
        try:
            with path.open("rb") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                        if row.get("answer") is not None:
                            found[bytes.fromhex(row["key"])] = (number, offset)
                    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                        torn += bool(line.strip())
                    offset += len(line)
        except OSError as error:
            raise _unusable(path, error) from error
        for key, place in found.items():
            self._known.setdefault(key, place)
        if torn > 1:  # a killed process leaves one
            log.warning("%s: %d lines are no records of calls and were left out", path, torn)


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: {error.strerror or error} (accepted: a folder with room that can be written "
        f"into; it holds the judges' answers)"
    )


def read_record(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a run's record, of all processes, without torn ones."""
    for path in sorted(Path(folder).glob("judges*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
