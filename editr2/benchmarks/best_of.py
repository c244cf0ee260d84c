"""Best of n from the rows of benchmarks with several samples of a session (`--samples`): what a
held-out judge says of the samples that a reward would choose. `editr2.judge.best_of` has the
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from editr2.benchmarks.rows import Row
from editr2.judge.best_of import Curve, curve


def best_of_rows(
    chosen: Sequence[Row],
    held: Sequence[Row],
    *,
    way: str = "multipass",
    weights: Mapping[str, float] | None = None,
) -> list[Curve]:
    """Of the rows that a reward and a held-out judge gave to the same samples (`Row.sample`). A
    sample's score is the mean over its turns of a metric, or of the sum by `weights` of those that
    apply; one that failed or is missing makes it none."""
    mine, theirs = (_metrics(row for row in rows if row.way == way) for rows in (chosen, held))
    if weights is not None and len(mine) > 1:
        mine = {"reward": _summed(mine, weights)}
    sessions = list(dict.fromkeys(row.image for row in chosen if row.way == way))
    samples = sorted({row.sample for row in (*chosen, *held) if row.way == way})
    found = [
        curve(a, _matrix(x, sessions, samples), b, _matrix(y, sessions, samples))
        for a, x in mine.items()
        for b, y in theirs.items()
    ]
    return [each for each in found if each is not None]


_Turns = dict[tuple[str, int], dict[tuple[int, int], float | None]]
"""(session, sample) -> (turn, asked) -> the value; None where the score does not apply, NaN where
it is not known."""


def _metrics(rows: Iterable[Row]) -> dict[str, _Turns]:
    found: dict[str, _Turns] = {}
    for row in rows:
        value = None if row.state == "not_applicable" else row.value
        if row.state in ("failed", "missing"):
            value = math.nan
        at = found.setdefault(row.metric, {}).setdefault((row.image, row.sample), {})
        at[row.turn, row.asked] = value
    return found


def _summed(metrics: Mapping[str, _Turns], weights: Mapping[str, float]) -> _Turns:
    weighed = {name: turns for name, turns in metrics.items() if weights.get(name)}
    total = sum(abs(weights[name]) for name in weighed)
    found: _Turns = {}
    for turns in weighed.values():
        for place, by_turn in turns.items():
            for turn in by_turn:
                parts = {
                    each: value
                    for each, others in weighed.items()
                    if (value := others.get(place, {}).get(turn)) is not None
                }
                share = sum(abs(weights[each]) for each in parts)
                summed = sum(weights[each] * value for each, value in parts.items())
                found.setdefault(place, {})[turn] = summed * total / share if share else None
    return found


def _matrix(turns: _Turns, sessions: Sequence[str], samples: Sequence[int]) -> np.ndarray:
    found = np.full((len(sessions), len(samples)), np.nan)
    for s, session in enumerate(sessions):
        for n, sample in enumerate(samples):
            values = [v for v in turns.get((session, sample), {}).values() if v is not None]
            found[s, n] = np.mean(values) if values else np.nan
    return found
