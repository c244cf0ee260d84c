"""`scores.jsonl`: what came back, one object for every turn of every output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from editr2.files import json_line, write_lines
from editr2.judge.summary import nanmean, values_of
from editr2.judge.trial import Trial
from editr2.rewards.base import Score

FILE_NAME = "scores.jsonl"


def write_scores(path: Path, trial: Trial, rewards: np.ndarray | None, other: Trial | None) -> None:
    """rewards: the weighted sums [outputs, T], None of no sum. other: what it is compared with."""
    write_lines(path, map(json_line, score_rows(trial, rewards, other)))


def score_rows(
    trial: Trial, rewards: np.ndarray | None = None, other: Trial | None = None
) -> Iterator[dict[str, Any]]:
    """`scores`: means over the times that a turn was asked about, null where nothing came of any.
    `answers`: by score, what came back each time."""
    means = _means(trial)
    theirs = _means(other) if other else None
    for n, output in enumerate(trial.outputs):
        for t, image in enumerate(output.images):
            row: dict[str, Any] = {
                "id": output.session.id,
                "turn": t + 1,
                "output": output.name,
                "instruction": output.session.turns[t].instruction,
                "image": str(image),
                "scores": _named(trial, means[n, t]),
            }
            if rewards is not None:
                row["reward"] = _number(rewards[n, t])
            if other and theirs is not None:
                row["against"] = _named(other, theirs[n, t])
            row["answers"] = {
                name: [answer(rows[t][name]) for rows in trial.answers[n]] for name in trial.names
            }
            yield row


def _means(trial: Trial) -> np.ndarray:
    return nanmean(values_of(trial), 1)


def _named(trial: Trial, values: np.ndarray) -> dict[str, float | None]:
    return {name: _number(v) for name, v in zip(trial.names, values, strict=True)}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def answer(score: Score, digits: int | None = 6) -> dict[str, Any]:
    """One of value, failed and does_not_apply, with what was said of it. digits: behind the point;
    None: all, so that what is read again is what was said."""

    def number(value: float) -> float:
        return value if digits is None else round(value, digits)

    if score.failed:
        return {"failed": score.reason}
    if not score.applies:
        return {"does_not_apply": score.reason}
    found: dict[str, Any] = {"value": number(score.value or 0.0)}
    if score.reason:
        found["reason"] = score.reason
    if score.votes:
        found["votes"] = [number(vote) for vote in score.votes]
    return found
