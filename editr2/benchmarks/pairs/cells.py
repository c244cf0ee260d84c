"""Rows of a Hugging Face dataset that hold several images. Needs the extra `data`.

An image is a cell, or one of a list in a cell; it stays in the memory-mapped file until it is asked
for. Cells are read as Arrow has them, so nothing is decoded on the way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editr2.benchmarks.pairs.labelled import Picture
from editr2.errors import DataError, one_line
from editr2.sessions.datasets import open_dataset
from editr2.sessions.images import Pixels, decode_image, locate, read_image
from editr2.sessions.importers.foreign import Record

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Cell:
    """Where an image is: row, column, and its place in the cell's list. Called, it decodes it."""

    data: Dataset
    row: int
    column: str
    place: int | None
    where: str

    def __call__(self) -> Pixels:
        try:
            cell = self.stored()
            if isinstance(cell, bytes):
                return decode_image(cell)
            return read_image(cell)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error

    def stored(self) -> bytes | Path:
        """The encoded image, or its file. Raises DataError."""
        cell = self.data[self.row].column(self.column).to_pylist()[0]
        cell = cell if self.place is None else cell[self.place]
        if isinstance(cell, str):
            return locate(Path(), cell, contained=True)
        if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
            raise DataError("missing (accepted: an image)")
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        return locate(Path(), cell["path"], contained=True)


class Rows:
    """A set of rows. images: names of the columns that hold images."""

    def __init__(self, path: Path | str, needed: Sequence[str], images: Sequence[str]) -> None:
        self.path = os.fspath(path)
        data = _parquet(Path(path))
        data = open_dataset(self.path) if data is None else data
        if missing := [name for name in needed if name not in data.column_names]:
            raise DataError(
                f"{self.path}: no column {', '.join(missing)} (accepted: a dataset with "
                f"{', '.join(needed)}; there are {', '.join(data.column_names)})"
            )
        self._texts = data.select_columns([name for name in needed if name not in images])
        self._images = data.select_columns(list(images)).with_format("arrow")

    def records(self) -> Iterator[tuple[int, Record]]:
        """What is text, row by row, counted from 0."""
        for row, values in enumerate(self._texts):
            yield row, Record(f"{self.path}: row {row}", dict(values))

    def length(self, row: int, column: str) -> int:
        """Of a cell that is a list."""
        cell = self._images[row].column(column)[0].as_py()
        return len(cell) if isinstance(cell, list) else 0

    def picture(self, row: int, column: str, place: int | None = None) -> Picture:
        """Raises DataError where there is none."""
        at = column if place is None else f"{column}[{place}]"
        where = f"{self.path}: row {row}: {at}"
        cell = Cell(self._images, row, column, place, where)
        try:
            stored = cell.stored()
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except (IndexError, TypeError) as error:
            raise DataError(f"{where}: missing (accepted: an image)") from error
        if isinstance(stored, bytes):
            return Picture(cell, hashlib.sha256(stored).hexdigest())
        found = stored.stat() if stored.is_file() else None
        if found is None:
            raise DataError(f"{where}: {stored}: no such file")
        return Picture(cell, f"{os.path.abspath(stored)} {found.st_size} {found.st_mtime_ns}")


def _parquet(folder: Path) -> Any:
    """Of a folder with parquet files, as a set is downloaded; None where this is none."""
    files = sorted(map(str, folder.rglob("*.parquet"))) if folder.is_dir() else []
    if folder.is_file() and folder.suffix == ".parquet":
        files = [str(folder)]
    if not files:
        return None
    try:
        from datasets import Dataset
    except ImportError as error:
        raise DataError(
            f"{folder}: needs the package datasets (accepted: pip install 'editr2[data]')"
        ) from error
    try:
        return Dataset.from_parquet(files)
    except Exception as error:  # of a broken file, open-ended
        raise DataError(f"{folder}: cannot be opened: {one_line(error)}") from error
