"""`mice`: MICE-Bench, the test sessions of Edit-R2 (arXiv 2606.05950): three turns, half of them
with a standing rule (cm), half with pronouns (cu)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from editr2.benchmarks.table import Benchmark, Source
from editr2.config import RewardUse
from editr2.errors import DataError, shown
from editr2.sessions import Session
from editr2.sessions.importers import formats, unique
from editr2.sessions.session import MODES

FILES = tuple(f"{mode}/test_metadata.jsonl" for mode in MODES)


def read(source: Source) -> Iterator[Session]:
    """The sessions of both files of a folder, or of the one that is named. An id is that of the
    image behind the mode, `cm-0279d5671c3214e5`."""
    path = source.given(f"a folder with {' and '.join(FILES)}, or one such file")
    return unique(session for file in _files(path) for session in _read(file, source.images))


def _read(file: Path, images: Path | None) -> Iterator[Session]:
    for session in formats.mice(formats.Source(file, images, None, "--sources")):
        yield replace(session, id=f"{session.mode}-{session.id}", image=vars(session)["image"])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.resolve().parent.name not in MODES:
            raise DataError(
                f"{shown(path)}: in a folder {path.resolve().parent.name!r} (accepted: "
                f"{' or '.join(MODES)}, which say the mode)"
            )
        return [path]
    folder = path / "dataset" if (path / "dataset").is_dir() else path
    for name in FILES:
        if not (folder / name).is_file():
            raise DataError(
                f"{shown(folder / name)}: no such file (accepted: {' and '.join(FILES)})"
            )
    return [folder / name for name in FILES]


MICE = Benchmark(
    title="MICE-Bench",
    read=read,
    resize="stretch",  # as its own code does, to 512²
    reward=RewardUse(name="edit-r2"),
    headline=("IF@last", "CC@last", "GA@last"),
    about="github.com/yuxiaooye/Edit-R2; no licence stated",
)
