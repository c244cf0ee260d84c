"""Numbers over sessions with 95 % intervals, and differences of two of them on the same sessions.

An interval is a bootstrap over sessions: what is said of one session's turns and samples is not
independent, so whole sessions are drawn with replacement. A resample counts how often each was
drawn and a statistic takes such weights, so no resample is built and a statistic need not be a
mean. Two statistics are held against each other on the sessions that have both, by the same draws:
what makes a session hard for both cancels (`report.intervals` has several seeds, too).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from editr2.report.intervals import session_counts

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """value, and its 2.5 and 97.5 per cent; NaN where it is not defined, as the rank of values that
    are all equal. count: of what it rests on."""

    value: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        return not np.isnan(self.value)


@dataclass(frozen=True)
class Statistic:
    """of: weights float64 [R, N] of N sessions -> [R], NaN where it is not defined. present: bool
    [N], the sessions that it rests on; the others' weights change nothing."""

    of: Callable[[np.ndarray], np.ndarray]
    present: np.ndarray


def mean(values: np.ndarray) -> Statistic:
    """Of values [N], NaN where a session has none."""
    present = ~np.isnan(values)
    return ratio(np.where(present, values, 0.0), present.astype(np.float64))


def ratio(sums: np.ndarray, counts: np.ndarray) -> Statistic:
    """Of sums [N] over counts [N]: the mean of what sessions have several of, each weighing the
    same."""

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = (weights @ sums) / (weights @ counts)
        return found

    return Statistic(of, counts > 0)


def mean_of(parts: Sequence[Statistic]) -> Statistic:
    """The mean of several. One that is not defined in a resample, as that of a group of which no
    session was drawn, is left out there."""

    def of(weights: np.ndarray) -> np.ndarray:
        values = np.stack([part.of(weights) for part in parts])
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            found: np.ndarray = np.where(known, values, 0.0).sum(0) / known.sum(0)
        return found

    return Statistic(of, np.any([part.present for part in parts], 0))


def root_of_product(a: Statistic, b: Statistic) -> Statistic:
    """√(a · b)."""
    return Statistic(lambda weights: np.sqrt(a.of(weights) * b.of(weights)), a.present | b.present)


def estimate(statistic: Statistic, resamples: int = RESAMPLES) -> Estimate:
    """With its interval; the same at every call. count: of the sessions it rests on."""
    weights = draws(len(statistic.present), resamples)
    return of_resamples(statistic.of(weights), int(statistic.present.sum()))


def difference(a: Statistic, b: Statistic, resamples: int = RESAMPLES) -> Estimate:
    """b less a over the same sessions in the same order, of those that both rest on."""
    return compared(a, b, resamples).difference


class Compared(NamedTuple):
    """Two of one sort and b less a, all over the same sessions."""

    a: Estimate
    b: Estimate
    difference: Estimate


def compared(a: Statistic, b: Statistic, resamples: int = RESAMPLES) -> Compared:
    """Over the sessions that both rest on, by the same draws: the values differ by the
    difference."""
    both = a.present & b.present
    weights, count = draws(len(both), resamples) * both, int(both.sum())
    of_a, of_b = a.of(weights), b.of(weights)
    return Compared(*(of_resamples(values, count) for values in (of_a, of_b, of_b - of_a)))


def of_resamples(values: np.ndarray, count: int) -> Estimate:
    """values: of the data itself, then of the resamples; those of which it is not defined are left
    out of the interval."""
    found = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(found):
        return Estimate(float("nan"), float("nan"), float("nan"), count)
    low, high = np.percentile(found, (2.5, 97.5))
    return Estimate(float(values[0]), float(low), float(high), count)


def draws(sessions: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often every session counts, float64 [1 + R, N]: once each first, then as drawn; the same
    at every call."""
    if not sessions:
        return np.ones((1 + resamples, 0))
    return np.concatenate([np.ones((1, sessions)), session_counts(sessions, resamples)])
