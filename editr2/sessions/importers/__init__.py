"""Public editing sets to sessions: `editr2 data import`. docs/data.md says what each
format holds.

An importer reads a set's own files, checks every field against the names and kinds that its release
has, and yields sessions whose images stay in their files. What has no field of its own in `Session`
and `Turn` goes to their `meta` under the name that the release gives it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from editr2.errors import DataError, UserError, shown
from editr2.sessions.files import is_dataset, save_sessions, scan
from editr2.sessions.importers.formats import (
    Source,
    edival,
    gedit,
    imgedit,
    imgedit_basic,
    magicbrush,
    mice,
)
from editr2.sessions.session import MODES, Session

__all__ = ["FORMATS", "import_sessions", "unique"]

Reader = Callable[[Source], Iterator[Session]]

_FILES: dict[str, Reader] = {
    "mice": mice,
    "edival": edival,
    "imgedit": imgedit,
    "imgedit-basic": imgedit_basic,
    "magicbrush": magicbrush,
}
_DATASETS: dict[str, Reader] = {"gedit": gedit, "gedit-cn": partial(gedit, language="cn")}
_LOADED = ("magicbrush", "sessions")
"""Of datasets: what `load_sessions` reads."""

FORMATS = (*_FILES, *_DATASETS, "sessions")
"""`sessions` is whatever `load_sessions` reads: it copies a set, or writes a Hugging Face dataset
out as one."""


def import_sessions(
    format: str,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    mode: str | None = None,
    limit: int | None = None,
) -> Path:
    """Read `source` in one of FORMATS and write `folder/sessions.jsonl` with copies of the images;
    returns its path.

    images: the folder that the images lie in, when it is not where the release has it.
    mode: "cm" or "cu" for every session, in place of what the source says.
    limit: only the first `limit` sessions.

    One session is in memory at a time. Raises DataError, `file:line: field: problem (accepted: …)`,
    for the first thing that is wrong; the folder's sessions.jsonl is then what it was before.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format!r} (accepted: {', '.join(FORMATS)})")
    if mode is not None and mode not in MODES:
        raise UserError(f"--mode: {mode!r} (accepted: {', '.join(MODES)})")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} (accepted: 1 or more)")
    dataset = is_dataset(source)
    accepted = (*_DATASETS, *_LOADED)
    if dataset and format not in accepted:
        raise UserError(
            f"format: {format!r} (accepted for a Hugging Face dataset: {', '.join(accepted)})"
        )
    if images is not None and (dataset or format == "sessions"):
        raise UserError(f"--images: {images} (accepted: nothing, as the source names its images)")
    if format in _DATASETS:
        sessions = _DATASETS[format](Source(Path(source), None, mode))
    elif dataset or format == "sessions":
        sessions = _loadable(source, mode)
    else:
        path = Path(source)
        if not os.path.exists(path):
            raise DataError(f"{shown(path)}: no such file or folder")
        sessions = _FILES[format](Source(path, None if images is None else Path(images), mode))
    return save_sessions(itertools.islice(unique(sessions), limit), folder)


def _loadable(source: str | os.PathLike[str], mode: str | None) -> Iterator[Session]:
    for item in scan(source, memory=0, contained=True):
        if isinstance(item, str):
            raise DataError(item)
        yield item if mode is None else replace(item, image=vars(item)["image"], mode=mode)


def unique(sessions: Iterator[Session]) -> Iterator[Session]:
    """Ids as they are, the second of a name with -2, and so on: some sets edit one image in several
    sessions."""
    seen: dict[str, int] = {}
    for session in sessions:
        name = session.id
        while name in seen:
            seen[session.id] += 1
            name = f"{session.id}-{seen[session.id]}"
        seen[name] = 1
        yield (
            session
            if name == session.id
            else replace(session, id=name, image=vars(session)["image"])
        )
