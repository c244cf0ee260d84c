"""`strips.jsonl`: where the images of a benchmark's sessions lie and what they were told, an object
for each session, so that a page can show them without the set.

    {"id": "kitchen", "mode": "cm", "source": "sources/kitchen.png",
     "turns": [{"instruction": "paint the cup red", "task": "color_alter"}],
     "images": {"multipass": ["generations/multipass/kitchen_input_raw_turn_1.png"]}}

Paths are relative to the file's folder, or absolute where images lie outside of it; null: there is
no image.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from editr2.benchmarks.layouts import Images, file_names, source_file
from editr2.benchmarks.rows import Row
from editr2.errors import DataError
from editr2.files import in_place_of, json_line, write_lines
from editr2.report.data import MODES, mean
from editr2.report.gallery import Why
from editr2.report.numbers import decimal
from editr2.report.pictures import UNREADABLE, Picture, thumbnail, unreadable_notes
from editr2.report.strips import Bar, Cell, SessionView, TurnView
from editr2.rewards.base import shortened
from editr2.sessions import Session
from editr2.sessions.records import lines_of, parse_object

FILE_NAME = "strips.jsonl"
SOURCES = "sources"

SIDE = 160
"""Pixels of an image on a page of benchmarks, and of a source that is kept for it alone."""
PAGE_BYTES = 2 << 20
"""Of all images of a page."""


@dataclass(frozen=True)
class Strip:
    """A session on a page. turns: the instructions. images: by pass, of the first sample, a file a
    turn."""

    id: str
    mode: str | None
    source: Path | None
    turns: tuple[str, ...]
    images: Mapping[str, tuple[Path | None, ...]]


def write_strips(folder: Path, sessions: Sequence[Session], images: Mapping[str, Images]) -> None:
    """Into a benchmark's folder. images: of the first sample, by pass. A session whose source is in
    no file beside its images gets one in `sources`, made small."""
    names, root, lines = file_names(sessions), Path(os.path.abspath(folder)), []

    def written(path: Path | None) -> str | None:
        if path is None:
            return None
        whole = Path(os.path.abspath(path))
        inside = whole.is_relative_to(root)
        return whole.relative_to(root).as_posix() if inside else str(whole)

    for session in sessions:
        found = {way: of.of(session) for way, of in images.items()}
        beside = [path.with_name(source_file(names[session.id])) for path in _files(found)]
        source = next((path for path in beside if path.is_file()), None)
        line = {
            "id": session.id,
            "mode": session.mode,
            "source": written(source or _kept(root, names[session.id], session)),
            "turns": [{"instruction": t.instruction, "task": t.task} for t in session.turns],
            "images": {way: [written(path) for path in of] for way, of in found.items()},
        }
        lines.append(json_line(line))
    write_lines(root / FILE_NAME, lines)


def _files(images: Mapping[str, Sequence[Path | None]]) -> list[Path]:
    return [path for of in images.values() for path in of if path is not None]


def _kept(folder: Path, name: str, session: Session) -> Path:
    path = folder / SOURCES / f"{name}.png"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(session.image)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        with in_place_of(path) as part:
            image.save(part, "PNG")
    return path


def read_strips(folder: Path) -> dict[str, Strip]:
    """By session id; empty where a folder has none. Raises DataError with the line that is none."""
    file, found = folder / FILE_NAME, dict[str, Strip]()
    for number, raw in lines_of(file) if file.is_file() else ():
        try:
            strip = _strip(folder, parse_object(raw))
        except (DataError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}:{number}: {error!r} (accepted: a line as `editr2 benchmark` writes it)"
            ) from error
        found[strip.id] = strip
    return found


def _strip(folder: Path, line: Mapping[str, Any]) -> Strip:
    def path(name: str | None) -> Path | None:
        return None if name is None else folder / name

    return Strip(
        str(line["id"]),
        line.get("mode"),
        path(line.get("source")),
        tuple(str(turn["instruction"]) for turn in line["turns"]),
        {str(way): tuple(map(path, of)) for way, of in line["images"].items()},
    )


# ------------------------------------------------------------------------------------------- pages


@dataclass
class Thumbnails:
    """Image files as pictures of a page, each read once. unreadable: kind of error by file
    name."""

    found: dict[Path, Picture | None] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: Path | None) -> Picture | None:
        if path is None:
            return None
        if path not in self.found:
            try:
                self.found[path] = thumbnail(path, SIDE)
            except UNREADABLE as error:
                self.found[path] = None
                self.unreadable[path.name] = type(error).__name__
        return self.found[path]

    def notes(self) -> list[str]:
        return unreadable_notes(self.unreadable)


@dataclass(frozen=True)
class Lane:
    """A row of images in a strip: a pass of one side. name: as its cells are called. kind: as of
    `report.strips.Cell`. rows: of that pass and sample, by session."""

    name: str
    way: str
    strips: Mapping[str, Strip]
    rows: Mapping[str, Sequence[Row]]
    kind: str = ""


def by_session(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.image].append(row)
    return dict(found)


def session_score(rows: Iterable[Row]) -> float | None:
    """The mean of all that was judged, by which sessions are put in order on a page."""
    return mean(row.value for row in rows)


def view(
    name: str,
    lanes: Sequence[Lane],
    pictures: Thumbnails,
    *,
    change: str = "",
    changed: str = "",
    verdict: str = "",
) -> SessionView:
    """A session in every lane. A turn whose instruction is not on record has none."""
    strips = [strip for lane in lanes if (strip := lane.strips.get(name))]
    rows = [row for lane in lanes for row in lane.rows.get(name, ())]
    told = max((strip.turns for strip in strips), key=len, default=())
    count = max([len(told), *(row.turn for row in rows)])
    modes = [*(strip.mode for strip in strips), *(row.mode for row in rows)]
    mode = next(filter(None, modes), None)
    turns = []
    for t in range(count):
        instruction = told[t] if t < len(told) else ""
        cells = [_cell(name, lane, t, instruction, pictures) for lane in lanes]
        turns.append(TurnView(t + 1, instruction, cells))
    return SessionView(
        next((strip.id for strip in strips), name),
        MODES.get(mode, mode) if mode else None,
        pictures(next((strip.source for strip in strips if strip.source), None)),
        turns,
        len(lanes),
        change=change,
        changed=changed,
        verdict=verdict,
    )


def _cell(name: str, lane: Lane, t: int, instruction: str, pictures: Thumbnails) -> Cell:
    strip = lane.strips.get(name)
    files = strip.images.get(lane.way, ()) if strip else ()
    picture = pictures(files[t]) if t < len(files) else None
    rows = [row for row in lane.rows.get(name, ()) if row.turn == t + 1]
    problems: dict[str, list[str]] = {}
    for row in rows:
        if row.state in ("failed", "missing"):
            said = shortened(row.reason or "")
            about = f"{_title(row)}: " if row.state == "failed" and said else ""
            problems.setdefault(row.state, []).append(about + (said or _title(row)))
    return Cell(
        lane.name,
        picture,
        f"{lane.name}, after turn {t + 1}: {instruction}",
        [_bar(row) for row in rows if row.state != "missing"],
        [(state, "; ".join(dict.fromkeys(said))) for state, said in problems.items()],
        lane.kind,
    )


def _title(row: Row) -> str:
    return row.metric if row.asked == row.turn else f"{row.metric} of {row.asked}"


def _bar(row: Row) -> Bar:
    if row.value is not None:
        why = Why.of(shortened(row.reason or ""))
        return Bar(_title(row), decimal(row.value), 100 * row.value, why)
    if row.state == "failed":
        return Bar(_title(row), "failed", None)
    return Bar(_title(row), "does not apply", None, Why.of(shortened(row.reason or "")))


T = TypeVar("T")


def fitting(build: Callable[[int], T], views: Callable[[T], Iterable[SessionView]], most: int) -> T:
    """What `build` makes of so many sessions, of fewer where their images are larger than
    `PAGE_BYTES`."""
    while True:
        built = build(most)
        size = sum(map(_bytes, views(built)))
        if size <= PAGE_BYTES or most <= 1:
            return built
        most = max(1, min(most - 1, int(most * PAGE_BYTES / size)))


def _bytes(session: SessionView) -> int:
    cells = [cell.picture for turn in session.turns for cell in turn.cells]
    return sum(len(picture.src) for picture in (session.source, *cells) if picture)
