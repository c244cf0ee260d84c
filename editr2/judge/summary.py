"""What a trial says of a reward: scores by turn, spread, ties, cost, failures, and agreement."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from editr2.judge.agreement import TIE, kendall, pair_accuracy, spearman
from editr2.judge.labels import Labels
from editr2.judge.trial import Trial
from editr2.report.paired import Estimate
from editr2.rewards.base import Score, shortened

REASONS = 3
"""Reasons that are listed of what failed or did not apply, the most frequent first."""


@dataclass(frozen=True)
class Mean:
    mean: float
    se: float


@dataclass(frozen=True)
class Of:
    """Of one score.

    by_turn: mean and standard error over sessions. votes, repeats, siblings: standard deviations
    within one answer, of one output asked again, and between siblings' means; NaN where there are
    none to compare. times: how often each was asked. groups: of siblings (a session's turn), and
    tied: of them those in which all score the same. asked: scores in all. failed, not_applicable:
    of them, with reasons counted.
    """

    name: str
    by_turn: list[Mean]
    votes: float
    repeats: float
    siblings: float
    times: int
    groups: int
    tied: int
    asked: int
    failed: Counter[str]
    not_applicable: Counter[str]

    @property
    def beyond_noise(self) -> float:
        """Of `siblings`, what asking again does not explain."""
        rest = self.siblings**2 - self.repeats**2 / self.times
        return rest if math.isnan(rest) else math.sqrt(max(0.0, rest))


@dataclass(frozen=True)
class Agreement:
    """Of a score with what it is held against, which is called `other`. None where there is nothing
    to compare."""

    name: str
    other: str
    pairs: Estimate | None
    spearman: Estimate | None
    kendall: Estimate | None


def values_of(trial: Trial) -> np.ndarray:
    """The scores, float64 [outputs, repeats, T, K], NaN where there is none."""
    turns = max(len(output.images) for output in trial.outputs)
    shape = (len(trial.outputs), trial.repeats, turns, len(trial.names))
    values = np.full(shape, np.nan)
    for n, repeats in enumerate(trial.answers):
        for r, rows in enumerate(repeats):
            for t, row in enumerate(rows):
                for k, name in enumerate(trial.names):
                    if (value := row[name].value) is not None:
                        values[n, r, t, k] = value
    return values


def sessions_of(trial: Trial) -> np.ndarray:
    """The number of every output's session, int [outputs]; siblings stand together."""
    ids = [output.session.id for output in trial.outputs]
    return np.cumsum([n > 0 and ids[n] != ids[n - 1] for n in range(len(ids))])


def nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """NaN, and no warning, where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


def summarise(trial: Trial) -> list[Of]:
    """One entry a score."""
    values, session = values_of(trial), sessions_of(trial)
    return [_of(trial, k, values[..., k], session) for k in range(len(trial.names))]


def _of(trial: Trial, k: int, values: np.ndarray, session: np.ndarray) -> Of:
    """values: [outputs, repeats, T]."""
    name = trial.names[k]
    scores = [row[name] for repeats in trial.answers for rows in repeats for row in rows]
    output = nanmean(values, 1)
    groups = [output[session == n] for n in range(session.max() + 1)]
    by_session = np.stack([nanmean(group, 0) for group in groups])
    columns = [
        group[:, t][~np.isnan(group[:, t])] for group in groups for t in range(group.shape[1])
    ]
    compared = [column for column in columns if len(column) > 1]
    again = values.swapaxes(1, 2).reshape(-1, values.shape[1])
    return Of(
        name,
        [_mean(by_session[:, t]) for t in range(values.shape[2])],
        _spread([np.array(score.votes) for score in scores]),
        _spread([row[~np.isnan(row)] for row in again]),
        _spread(compared),
        values.shape[1],
        len(compared),
        sum(float(np.ptp(column)) < TIE for column in compared),
        len(scores),
        _reasons(score for score in scores if score.failed),
        _reasons(score for score in scores if not score.applies),
    )


def _reasons(scores: Iterable[Score]) -> Counter[str]:
    return Counter(shortened(score.reason or "no reason given") for score in scores)


def _mean(values: np.ndarray) -> Mean:
    found = values[~np.isnan(values)]
    if not len(found):
        return Mean(math.nan, math.nan)
    se = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Mean(float(found.mean()), float(se))


def _spread(groups: Sequence[np.ndarray]) -> float:
    """The standard deviation within groups, pooled; NaN where none has two values."""
    degrees = sum(len(group) - 1 for group in groups if len(group) > 1)
    squares = sum(((g - g.mean()) ** 2).sum() for g in groups if len(g) > 1)
    return math.sqrt(squares / degrees) if degrees else math.nan


# ------------------------------------------------------------------------------- agreement


def agrees_with_labels(
    trial: Trial, labels: Labels, weights: dict[str, float] | None
) -> list[Agreement]:
    """Of every score, and of the reward, their sum by `weights` (None: of no sum)."""
    session, found = sessions_of(trial), []
    for name, values in with_reward(trial, weights).items():
        points = [p for about in (None, name) for p in labels.points.get(about, ())]
        pairs = [p for about in (None, name) for p in labels.pairs.get(about, ())]
        by_group: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for output, turn, score in points:
            by_group.setdefault((int(session[output]), turn), []).append((output, score))
        for (_, turn), said in by_group.items():
            pairs += [(a, b, turn) for a, high in said for b, low in said if high > low]
        table = [(values[n, t], score, session[n]) for n, t, score in points]
        found.append(_agreement(name, "labels", table, _pairs(values, pairs, session)))
    return found


def agrees_with_reward(trial: Trial, other: Trial) -> list[Agreement]:
    """Of the scores that are called the same in both, or, where none is, of each with each."""
    session = sessions_of(trial)
    mine, theirs = (nanmean(values_of(each), 1) for each in (trial, other))
    both = [(name, name) for name in trial.names if name in other.names]
    found = []
    for a, b in both or [(a, b) for a in trial.names for b in other.names]:
        x, y = mine[..., trial.names.index(a)], theirs[..., other.names.index(b)]
        outputs, turns = x.shape
        table = [(x[n, t], y[n, t], session[n]) for n in range(outputs) for t in range(turns)]
        pairs = [
            (i, j, t)
            for n in range(session.max() + 1)
            for i in np.flatnonzero(session == n).tolist()
            for j in np.flatnonzero(session == n).tolist()
            for t in range(turns)
            if y[i, t] > y[j, t] + TIE
        ]
        found.append(_agreement(a, b, table, _pairs(x, pairs, session)))
    return found


def with_reward(trial: Trial, weights: dict[str, float] | None) -> dict[str, np.ndarray]:
    """Every score by name, and `reward`, their sum by `weights` over those that apply; means over
    repeats, [outputs, T]."""
    values = nanmean(values_of(trial), 1)
    found = {name: values[..., k] for k, name in enumerate(trial.names)}
    if weights is None or len(trial.names) < 2:
        return found
    vector = np.array([weights[name] for name in trial.names])
    failed = np.zeros(values.shape, dtype=bool)
    for n, repeats in enumerate(trial.answers):
        for rows in repeats:
            for t, row in enumerate(rows):
                failed[n, t] |= [row[name].failed for name in trial.names]
    heard = (abs(vector) * ~np.isnan(values)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = np.nansum(values * vector, -1) * (abs(vector).sum() / heard)
    bare = np.isnan(values) & failed  # of a turn whose score failed each time there is no reward
    found["reward"] = np.where(bare.any(-1) | (heard == 0), np.nan, sums)
    return found


_Rows = Sequence[tuple[float, float, int]]


def _pairs(values: np.ndarray, pairs: Sequence[tuple[int, int, int]], session: np.ndarray) -> _Rows:
    return [(values[a, t], values[b, t], session[a]) for a, b, t in pairs]


def _agreement(name: str, other: str, points: _Rows, pairs: _Rows) -> Agreement:
    a, b, at = _scored(points)
    better, worse, of = _scored(pairs)
    return Agreement(
        name,
        other,
        pair_accuracy(better, worse, of) if len(of) else None,
        spearman(a, b, at) if len(at) > 1 else None,
        kendall(a, b, at) if len(at) > 1 else None,
    )


def _scored(rows: _Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the rows in which nothing is missing."""
    table = np.array(rows, dtype=float).reshape(-1, 3)
    table = table[~np.isnan(table).any(1)]
    return table[:, 0], table[:, 1], table[:, 2].astype(int)
