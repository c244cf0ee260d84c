"""What a run keeps of an evaluation's sessions, one by one: `evaluations/000010.jsonl` has a line a
session, and the picture beside it their images, a row a session: source, outputs, and what was
asked for where a reward knows it.

A world's small images are kept of every session; of larger ones the first `eval.strips`, scaled
down, so that a run of photographs does not grow by gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from editr2.files import in_place_of, json_line, write_lines
from editr2.rewards.base import NOT_APPLICABLE
from editr2.rewards.panel import Panel
from editr2.rl.evaluate import Evaluation, whys_of
from editr2.sessions import Session

SMALL = 64
"""px of the long side, up to which images are kept of every session and as they are."""
SIDE = 256
"""px of the long side of larger ones, on the picture."""
PICTURED = 24
"""Sessions of larger ones that are kept, at most: a picture is decoded whole."""
TALLEST = 60_000
"""px of a picture; JPEG ends at 65,535."""


def file_name(iteration: int) -> str:
    return f"{iteration:06d}"


def is_pictured(session: Session, ordinal: int, strips: int) -> bool:
    """Whether the outputs of a session are kept. strips: `eval.strips`."""
    return strips > 0 and (max(session.image_size) <= SMALL or ordinal < min(strips, PICTURED))


def cell(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as it stands on the picture."""
    if max(pixels.shape[:2]) <= SMALL:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def keep(
    folder: Path, iteration: int, found: Evaluation, sessions: Sequence[Session], panel: Panel
) -> None:
    """Writes both files of an evaluation into `folder`. panel: the rewards, which are asked what an
    image should show."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(iteration)
    rows = _sheet(found, sessions, panel)
    if rows:
        kind = "png" if max(max(row.cell) for row in rows.values()) <= SMALL else "jpg"
        _clear(folder, name)
        with in_place_of(folder / f"{name}.{kind}") as part:
            of = "PNG" if kind == "png" else "JPEG"
            Image.fromarray(_drawn(list(rows.values()))).save(part, of, quality=88)
    records = lines(found, sessions)
    for n, record in enumerate(records):
        if n in rows:
            record["sheet"] = rows[n].place()
    write_lines(folder / f"{name}.jsonl", map(json_line, records))


def _clear(folder: Path, name: str) -> None:
    for kind in ("png", "jpg"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)


def lines(found: Evaluation, sessions: Sequence[Session]) -> list[dict[str, Any]]:
    """A record a session: what it is, and turn by turn what was asked, every score with what its
    reward said of it, and why one is missing."""
    return [_line(found, n, session) for n, session in enumerate(sessions)]


def _line(found: Evaluation, n: int, session: Session) -> dict[str, Any]:
    scores, success = found.scores, float(found.success[n])
    silent = scores.of_state(NOT_APPLICABLE)[n]
    turns: list[dict[str, Any]] = []
    for t, turn in enumerate(session.turns):
        reward = float(found.reward[n, t])
        said: dict[str, Any] = {
            "instruction": turn.instruction,
            "task": turn.task,
            "reward": None if math.isnan(reward) else round(reward, 6),
            "scores": {
                name: round(float(scores.values[n, t, k]), 6) if scores.scored[n, t, k] else None
                for k, name in enumerate(scores.names)
            },
        }
        if apart := [name for k, name in enumerate(scores.names) if silent[t, k]]:
            said["does_not_apply"] = apart
        if why := whys_of(scores, n, t):
            said["why"] = why
        if bool(scores.pruned[n, t]):
            said["left_out"] = True
        if (reason := scores.reasons.get((n, t))) is not None:
            said["reason"] = reason
        turns.append({name: value for name, value in said.items() if value is not None})
    return {
        "id": session.id,
        "mode": session.mode,
        "success": None if math.isnan(success) else success,
        "turns": turns,
    }


class _Row(NamedTuple):
    """A session's images, of one size each. top: px from above."""

    cells: list[np.ndarray]
    outputs: int
    top: int

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height."""
        height, width = self.cells[0].shape[:2]
        return width, height

    def place(self) -> dict[str, Any]:
        return {
            "top": self.top,
            "cell": list(self.cell),
            "outputs": self.outputs,
            "expected": len(self.cells) - 1 - self.outputs,
        }


def _sheet(found: Evaluation, sessions: Sequence[Session], panel: Panel) -> dict[int, _Row]:
    rows, top = dict[int, _Row](), 0
    for n, outputs in sorted(found.pictured):
        if not outputs:
            continue
        session = sessions[n]
        asked = panel.expected(session)
        cells = [cell(session.image), *outputs]
        cells += [] if asked is None else [cell(image) for image in asked[: len(session.turns)]]
        size = cells[0].shape
        cells = [one if one.shape == size else _resized(one, size) for one in cells]
        if top + size[0] > TALLEST:
            break
        rows[n] = _Row(cells, len(outputs), top)
        top += size[0]
    return rows


def _resized(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """An editor may answer in another size than it was given."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _drawn(rows: Sequence[_Row]) -> np.ndarray:
    width = max(len(row.cells) * row.cell[0] for row in rows)
    sheet = np.full((rows[-1].top + rows[-1].cell[1], width, 3), 255, np.uint8)
    for row in rows:
        of = np.concatenate(row.cells, axis=1)
        sheet[row.top : row.top + of.shape[0], : of.shape[1]] = of
    return sheet
