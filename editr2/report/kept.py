"""Reads `evaluations/` of a run: what `rl.kept` wrote of every session."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from editr2.report.data import PASS_NAMES, Pair, Strip, number, plural
from editr2.report.pictures import UNREADABLE

FOLDER = "evaluations"


@dataclass(frozen=True)
class KeptTurn:
    """left_out: of the rollout, by `rollout.prune`."""

    instruction: str
    task: str | None
    scores: Mapping[str, float | None]
    does_not_apply: Sequence[str]
    reward: float | None
    reason: str | None
    whys: Mapping[str, str]
    left_out: bool


@dataclass(frozen=True)
class KeptSession:
    """sheet: where its images are on the evaluation's picture, (px from above, width, height,
    outputs, expected)."""

    id: str
    mode: str | None
    success: float | None
    turns: Sequence[KeptTurn]
    sheet: tuple[int, int, int, int, int] | None = None

    @property
    def reward(self) -> float | None:
        """Of its last turn."""
        return self.turns[-1].reward if self.turns else None

    @property
    def small(self) -> bool:
        return self.sheet is not None and max(self.sheet[1:3]) <= 96


@dataclass(frozen=True)
class KeptEvaluation:
    """By id, in the order of the evaluation. picture: the file of its images."""

    iteration: int
    sessions: Mapping[str, KeptSession]
    picture: Path | None

    def images(self, session: KeptSession) -> Cut:
        """Of a session: data URIs of its source, outputs and what was asked for; empty where they
        are not kept or cannot be read."""
        if self.picture is None or session.sheet is None:
            return Cut()
        return _cut(_Sheet.of(self.picture), session.sheet)


@dataclass(frozen=True)
class Cut:
    source: str | None = None
    outputs: Sequence[str] = ()
    expected: Sequence[str] = ()

    @property
    def bytes(self) -> int:
        return sum(map(len, (self.source or "", *self.outputs, *self.expected)))


@dataclass(frozen=True)
class _Sheet:
    """A file as it is now: what was cut of it stays cut as long as it is not written anew."""

    path: Path
    changed: int

    @staticmethod
    def of(path: Path) -> _Sheet:
        try:
            return _Sheet(path, path.stat().st_mtime_ns)
        except OSError:
            return _Sheet(path, 0)


@functools.lru_cache(maxsize=4)
def _opened(sheet: _Sheet) -> Image.Image | None:
    try:
        with Image.open(sheet.path) as image:
            return image.convert("RGB")
    except UNREADABLE:
        return None


@functools.lru_cache(maxsize=8192)
def _cut(sheet: _Sheet, place: tuple[int, int, int, int, int]) -> Cut:
    image, (top, width, height, outputs, expected) = _opened(sheet), place
    count = 1 + outputs + expected
    if image is None or top + height > image.height or count * width > image.width:
        return Cut()
    cells = [
        _uri(image.crop((k * width, top, (k + 1) * width, top + height))) for k in range(count)
    ]
    return Cut(cells[0], cells[1 : 1 + outputs], cells[1 + outputs :])


def _uri(image: Image.Image) -> str:
    """A world's small image as it is; of a photograph what a table needs."""
    out, small = io.BytesIO(), max(image.size) <= 96
    image.save(out, "WEBP", lossless=small, quality=100 if small else 75, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def read_kept(folder: Path, iterations: Sequence[int], missing: list[str]) -> list[KeptEvaluation]:
    """Of a run's folder, of the iterations that its record has evaluations of, in their order.
    missing: gets a sentence for what could not be read."""
    found, torn = [], 0
    for iteration in sorted(set(iterations)):
        path = folder / FOLDER / f"{iteration:06d}.jsonl"
        if not path.is_file():
            continue
        sessions = {}
        for line in path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                session = _session(json.loads(line, parse_constant=lambda _: None))
                sessions[session.id] = session
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                torn += 1
        pictures = [p for kind in ("png", "jpg") if (p := path.with_suffix(f".{kind}")).is_file()]
        found.append(KeptEvaluation(iteration, sessions, pictures[0] if pictures else None))
    if torn:
        missing.append(f"{torn} unreadable {plural('line', torn)} of {FOLDER}/ left out.")
    return found


def _session(value: Mapping[str, Any]) -> KeptSession:
    place = value.get("sheet")
    sheet = None
    if isinstance(place, dict):
        width, height = map(int, place["cell"])
        sheet = (int(place["top"]), width, height, int(place["outputs"]), int(place["expected"]))
        if min(width, height) < 1 or min(sheet) < 0:
            raise ValueError("no place")
    return KeptSession(
        str(value["id"]),
        _text(value.get("mode")),
        number(value.get("success")),
        [_turn(turn) for turn in value.get("turns") or ()],
        sheet,
    )


def _turn(value: Mapping[str, Any]) -> KeptTurn:
    return KeptTurn(
        _text(value.get("instruction")) or "",
        _text(value.get("task")),
        {str(name): number(score) for name, score in (value.get("scores") or {}).items()},
        tuple(map(str, value.get("does_not_apply") or ())),
        number(value.get("reward")),
        _text(value.get("reason")),
        {str(name): str(why) for name, why in (value.get("why") or {}).items() if why},
        bool(value.get("left_out")),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def of_strips(pairs: Sequence[Pair]) -> list[KeptEvaluation]:
    """Of a run that kept no evaluations: what its film-strips say."""
    found = []
    for iteration, name in enumerate(PASS_NAMES):
        strips = [strip for pair in pairs if (strip := getattr(pair, name)) is not None]
        if strips:
            found.append(KeptEvaluation(iteration, {s.id: _of_strip(s) for s in strips}, None))
    return found


def _of_strip(strip: Strip) -> KeptSession:
    turns = [
        KeptTurn(
            turn.instruction,
            None,
            turn.scores,
            turn.does_not_apply,
            turn.reward,
            turn.reason,
            turn.whys,
            turn.masked,
        )
        for turn in strip.turns
    ]
    return KeptSession(strip.id, strip.mode, None, turns)
