"""How far two judges are of one mind: accuracy on pairs, Spearman's and Kendall's rank
correlations, with 95 % intervals.

An interval is a bootstrap over sessions: what is said of one session's turns and outputs is not
independent, so whole sessions are drawn with replacement. A resample counts how often each of them
was drawn, and every statistic takes such weights, so no resample is built.
"""

from __future__ import annotations

import numpy as np

from editr2.report.paired import Estimate, draws, of_resamples

RESAMPLES = 1000
LARGEST = 3000
"""Values of which Kendall's correlation compares all pairs; of more, so many that are drawn."""

TIE = 1e-9
"""Scores that differ by less are equal."""


def pair_accuracy(better: np.ndarray, worse: np.ndarray, session: np.ndarray) -> Estimate:
    """How often the judge scores higher what was called better; a tie is half right, which is what
    a coin would have.

    better, worse: [n], the judge's scores. session: int [n], of each pair.
    """
    right = np.where(abs(better - worse) < TIE, 0.5, (better > worse).astype(float))
    weights = _weights(session)
    total = weights.sum(1)
    with np.errstate(invalid="ignore"):
        return of_resamples((weights @ right) / total, len(right))


def spearman(a: np.ndarray, b: np.ndarray, session: np.ndarray) -> Estimate:
    """The correlation of ranks, ties at their mean rank. a, b: [n]. session: int [n]."""
    weights = _weights(session)
    ranks = [_ranks(_groups(values), weights) for values in (a, b)]
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (rank - (weights * rank).sum(1, keepdims=True) / total for rank in ranks)
        products = [(weights * p).sum(1) for p in (x * y, x * x, y * y)]
        return of_resamples(products[0] / np.sqrt(products[1] * products[2]), len(a))


def kendall(a: np.ndarray, b: np.ndarray, session: np.ndarray) -> Estimate:
    """tau-b: concordant less discordant pairs, over the geometric mean of those that a and b do not
    tie. a, b: [n]. session: int [n]."""
    if len(a) > LARGEST:
        drawn = np.random.default_rng(len(a)).choice(len(a), LARGEST, replace=False)
        a, b, session = a[drawn], b[drawn], session[drawn]
    weights, ranks = _weights(session), [_groups(values) for values in (a, b)]
    # Of two draws of one value, and of a value with itself, the sign is 0, as of a tie.
    signs = [np.sign(rank[:, None] - rank[None, :]).astype(np.float32) for rank in ranks]
    sums = []
    for product in (signs[0] * signs[1], abs(signs[0]), abs(signs[1])):
        sums.append(np.einsum("rn,rn->r", weights @ product.astype(np.float64), weights))
    with np.errstate(invalid="ignore", divide="ignore"):
        return of_resamples(sums[0] / np.sqrt(sums[1] * sums[2]), len(a))


def _weights(session: np.ndarray) -> np.ndarray:
    """How often every value counts, float64 [1 + resamples, n]: once each first, then as drawn."""
    _, place = np.unique(session, return_inverse=True)
    return np.ascontiguousarray(draws(int(place.max()) + 1, RESAMPLES)[:, place])


def _groups(values: np.ndarray) -> np.ndarray:
    """The number of distinct values below each, int [n]; equal within `TIE`."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order], prepend=values[order[:1]]) > TIE
    groups = np.empty(len(values), dtype=np.int64)
    groups[order] = np.cumsum(steps)
    return groups


def _ranks(groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks [R, n] of values that count `weights` [R, n] times each."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(sizes, 1) - sizes / 2)[:, groups]
