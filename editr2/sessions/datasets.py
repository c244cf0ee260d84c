"""Hugging Face datasets whose rows are sessions, or MagicBrush's edits. Needs the extra `data`.

Rows stay on disk, memory-mapped; an image is decoded when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editr2.errors import DataError, one_line
from editr2.run.hub import offline
from editr2.sessions.buckets import Sizes
from editr2.sessions.images import Pixels, decode_image, locate, read_image
from editr2.sessions.records import Entry
from editr2.sessions.session import kind

if TYPE_CHECKING:
    from datasets import Dataset

_MAGICBRUSH = ("img_id", "turn_index", "source_img", "instruction")
REFERENCES = "references"
_SESSION = ("id", "image", "turns", "instructions", "mode", "meta")


@dataclass(frozen=True)
class DatasetImage:
    """Pixels that stay in a row of a dataset: called, it decodes them.

    data: has the one column, undecoded; of lists of images, index says which. size, resize: as in
    `load_sessions`. contained: as in `scan`; a row names files from where the program runs.
    checksum, where: as in `ImageFile`.
    """

    data: Dataset
    row: int
    size: Sizes | None
    resize: str
    contained: bool
    checksum: str | None = None
    where: str = ""
    index: int | None = None

    def __call__(self) -> Pixels:
        try:
            return self._pixels()
        except DataError as error:
            if not self.where:
                raise
            raise DataError(f"{self.where}: {error}") from error

    def _pixels(self) -> Pixels:
        with _one_line():
            (cell,) = self.data[self.row].values()
            cell = cell if self.index is None else cell[self.index]
        if cell is None:
            raise DataError("missing (accepted: an image)")
        if cell["bytes"] is None:
            path = locate(Path(), cell["path"] or "", contained=self.contained)
            return read_image(path, self.size, self.resize)
        return decode_image(cell["bytes"], self.size, self.resize)


@contextmanager
def _one_line(where: str = "", problem: str = "cannot be read") -> Iterator[None]:
    """What a download, a cache, a script of a dataset or a broken file can raise is open-ended; to
    the user it is one thing."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}{problem}: {one_line(error)}") from error


def dataset_entries(path: str, size: Sizes | None, resize: str, contained: bool) -> Iterator[Entry]:
    """The sessions of a dataset, unchecked. path: "hf:owner/name", "hf:owner/name:split" or a saved
    dataset's folder.

    Columns: image and either turns (objects as in sessions.jsonl) or instructions (strings), and if
    they are there id, mode, meta and references (lists of images); further columns, images apart,
    go to the session's meta. Or MagicBrush's columns, where rows of one img_id that count up from
    turn_index 1 are a session. Raises DataError when there is no such dataset.
    """
    with _one_line(f"{path}: "):
        yield from _entries(path, open_dataset(path), size, resize, contained)


def dataset_rows(
    path: str, column: str, others: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any], DatasetImage]]:
    """(number from 0, its cells of `others` that are there, its image) of the rows of a dataset of
    another form, for its own reader. path: as in `dataset_entries`. column: of the images.

    Raises DataError when there is no such dataset, or no such column.
    """
    with _one_line(f"{path}: "):
        data = open_dataset(path)
        names = data.column_names
        if column not in names:
            raise DataError(f"{path}: columns {', '.join(names)} (accepted: {column} among them)")
        images = _undecoded(data, path, column)
        for row, values in enumerate(data.select_columns([n for n in others if n in names])):
            where = f"{path}: row {row}: {column}"
            yield row, values, DatasetImage(images, row, None, "no", True, where=where)


def _entries(
    path: str, data: Dataset, size: Sizes | None, resize: str, contained: bool
) -> Iterator[Entry]:
    names = set(data.column_names)
    if names.issuperset(_MAGICBRUSH):
        column, records = "source_img", _magicbrush_records(path, data)
    elif "image" in names and len(names & {"turns", "instructions"}) == 1:
        column, records = "image", _session_records(path, data)
    else:
        accepted = f"image and turns, image and instructions, or {', '.join(_MAGICBRUSH)}"
        raise DataError(f"{path}: columns {', '.join(data.column_names)} (accepted: {accepted})")
    if not len(data):
        raise DataError(f"{path}: no rows (accepted: at least one)")
    images = _undecoded(data, path, column)
    lists = _undecoded_lists(data, REFERENCES) if column == "image" else None
    for row, record in records:
        values = record if isinstance(record, DataError) else {**record, "image": column}
        count = 0 if lists is None else len(lists[row][REFERENCES] or ())
        if count and isinstance(values, dict):
            values[REFERENCES] = [REFERENCES] * count
        yield Entry(
            f"{path}: row {row}",
            f"row {row}",
            values,
            DatasetImage(images, row, size, resize, contained),
            tuple(DatasetImage(lists, row, size, resize, contained, index=i) for i in range(count)),
        )


def _session_records(path: str, data: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, values in enumerate(data.remove_columns(sorted(_image_columns(data) | {"image"}))):
        turns = values.get("turns")
        if "instructions" in values:
            told = values["instructions"]
            turns = [{"instruction": text} for text in told] if isinstance(told, list) else told
        elif isinstance(turns, Mapping) and all(
            isinstance(cells, list) for cells in turns.values()
        ):
            # How `datasets` gives a Sequence of objects.
            turns = [dict(zip(turns, cells)) for cells in zip(*turns.values())]
        rest = {name: value for name, value in values.items() if name not in _SESSION}
        meta = values.get("meta")
        if rest and (meta is None or isinstance(meta, Mapping)):
            meta = {**(meta or {}), **rest}
        yield (
            row,
            {"id": values.get("id"), "mode": values.get("mode"), "turns": turns, "meta": meta},
        )


def _magicbrush_records(
    path: str, data: Dataset
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Every turn's meta has its row, where a reward finds mask_img and target_img."""
    start, image = 0, ""
    turns: list[dict[str, Any]] = []
    sessions: dict[str, int] = {}

    def session() -> tuple[int, dict[str, Any]]:
        count = sessions[image] = sessions.get(image, 0) + 1
        return start, {"id": image if count == 1 else f"{image}-{count}", "turns": turns}

    for row, values in enumerate(data.select_columns(["img_id", "turn_index", "instruction"])):
        if values["turn_index"] == 1:
            if turns:
                yield session()
            start, image, turns = row, str(values["img_id"]), []
        elif not turns or values["turn_index"] != len(turns) + 1 or str(values["img_id"]) != image:
            follows = f", or {len(turns) + 1} of img_id {image!r}" if turns else ""
            problem = (
                f"{kind(values['turn_index'])} of img_id {values['img_id']!r} (accepted: "
                f"1{follows})"
            )
            yield row, DataError(f"turn_index: {problem}")
            continue
        turns.append({"instruction": values["instruction"], "meta": {"row": row}})
    if turns:
        yield session()


def open_dataset(path: str) -> Dataset:
    """Of "hf:owner/name", "hf:owner/name:split" or a saved dataset's folder. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: needs the package datasets (accepted: pip install 'editr2[data]')"
        ) from error
    with _one_line(f"{path}: ", "cannot be opened"):
        if not path.startswith("hf:"):
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict):
                splits = ", ".join(str(Path(path) / name) for name in data)
                raise DataError(f"{path}: several splits (accepted: one of them: {splits})")
            return data
        name, _, split = path.removeprefix("hf:").partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise DataError(
                f"{path}: no name of a dataset (accepted: hf:owner/name or hf:owner/name:split)"
            )
        if offline():
            datasets.config.HF_DATASETS_OFFLINE = (
                True  # what was downloaded before is found at once
            )
        if not split:
            splits = datasets.get_dataset_split_names(name)  # before anything large is downloaded
            if len(splits) != 1:
                raise DataError(
                    f"{path}: no split (accepted: {', '.join(f'hf:{name}:{s}' for s in splits)})"
                )
            (split,) = splits
        return datasets.load_dataset(name, split=split)


def _image_columns(data: Dataset) -> set[str]:
    """Columns that hold images, in lists and objects too."""
    from datasets import Image

    def holds(feature: Any) -> bool:
        if isinstance(feature, Mapping):
            return any(map(holds, feature.values()))
        if isinstance(feature, list):
            return any(map(holds, feature))
        return isinstance(feature, Image) or holds(getattr(feature, "feature", []))

    return {name for name, feature in data.features.items() if holds(feature)}


def _undecoded(data: Dataset, path: str, column: str) -> Dataset:
    """The one column, as bytes or the path of a file."""
    from datasets import Image, Value

    feature = data.features[column]
    if not isinstance(feature, Image) and feature != Value("string"):
        raise DataError(
            f"{path}: {column}: a column of {feature} (accepted: of images, or of paths)"
        )
    return data.select_columns([column]).cast_column(column, Image(decode=False))


def _undecoded_lists(data: Dataset, column: str) -> Dataset | None:
    """The one column, whose cells are lists of images, as bytes or paths of files; None where it is
    not there, or of something else."""
    from datasets import Image, List

    feature = data.features.get(column)
    if not isinstance(feature, List) or not isinstance(feature.feature, Image):
        return None
    return data.select_columns([column]).cast_column(column, List(Image(decode=False)))
