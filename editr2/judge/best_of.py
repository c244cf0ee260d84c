"""Best of n: what a held-out judge says of the sample that a reward would choose.

Of n samples of a session every k of them are a draw, and in each the reward takes the one it scores
highest; equal ones share. The mean of the held-out score of what is taken, over all C(n, k) draws,
is exact: sorted by the reward, with b samples below a class of m equal ones, one of the class is
taken in C(b + m, k) - C(b, k) draws, each as often. k = 1 is the mean of the samples. The oracle
chooses by the held-out judge itself: nothing that is chosen by anything can be above it. Where the
curve bends down while k grows, the reward is being pleased at the cost of what it should measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from editr2.judge.agreement import TIE
from editr2.judge.summary import nanmean, sessions_of, with_reward
from editr2.judge.text import Table
from editr2.judge.trial import Trial
from editr2.report.charts import Chart
from editr2.report.dots import Series, dots
from editr2.report.paired import Estimate, estimate, mean

SHOWN = (1, 2, 4, 8, 16, 32, 64)
"""Columns of the table, with the last k."""

MOST_DRAWN = 5
"""Choices in one chart, which has six colours."""


@dataclass(frozen=True)
class Curve:
    """chosen, held: names of the score that chooses and of the one that judges. value, oracle: of
    k = 1 … n. sessions: those of which all n samples have both scores; left_out: the others."""

    chosen: str
    held: str
    value: Sequence[Estimate]
    oracle: Sequence[Estimate]
    sessions: int
    left_out: int


def expected(chooser: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The exact expectation for k = 1 … n, float64 [n]. chooser, held: [n], the two scores of the
    samples of one session."""
    n = len(chooser)
    order = np.argsort(chooser, kind="stable")
    new = np.diff(chooser[order], prepend=-np.inf) > TIE
    starts = [*np.flatnonzero(new).tolist(), n]
    found = np.zeros(n)
    for below, end in pairwise(starts):
        share = float(held[order[below:end]].mean())
        for k in range(1, end + 1):
            # Exact integers: C(64, 32) is above what a float holds, their quotient is not.
            found[k - 1] += (math.comb(end, k) - math.comb(below, k)) / math.comb(n, k) * share
    return found


def curve(chosen: str, chooser: np.ndarray, held_by: str, held: np.ndarray) -> Curve | None:
    """chooser, held: [sessions, n], NaN of a sample that a judge could not score or that is not
    there. None where no session has two samples with both."""
    n = chooser.shape[1]
    whole = ~(np.isnan(chooser) | np.isnan(held)).any(1)
    if n < 2 or not whole.any():
        return None
    taken = np.array([expected(a, b) for a, b in zip(chooser[whole], held[whole])])
    best = np.array([expected(b, b) for b in held[whole]])
    return Curve(
        chosen,
        held_by,
        [estimate(mean(taken[:, k])) for k in range(n)],
        [estimate(mean(best[:, k])) for k in range(n)],
        int(whole.sum()),
        int((~whole).sum()),
    )


def written(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """For JSON: [value, low, high] of k = 1 … n."""

    def plain(values: Sequence[Estimate]) -> list[list[float]]:
        return [[round(x, 6) for x in (found.value, found.low, found.high)] for found in values]

    return [
        {
            "chosen": each.chosen,
            "held": each.held,
            "value": plain(each.value),
            "oracle": plain(each.oracle),
            "sessions": each.sessions,
            "left_out": each.left_out,
        }
        for each in curves
    ]


# ------------------------------------------------------------------------------------------ trials


def best_of(trial: Trial, other: Trial, weights: Mapping[str, float] | None) -> list[Curve]:
    """Of a trial of siblings and the same of a held-out reward. A sibling's score is the mean over
    its turns: whole sessions are chosen. Chosen by the reward, the sum by `weights`, or where there
    is none by each score."""
    session = sessions_of(trial)
    mine = with_reward(trial, None if weights is None else dict(weights))
    by = {"reward": mine["reward"]} if "reward" in mine else mine
    theirs = with_reward(other, None)
    found = [
        curve(a, _by_session(x, a, trial, session), b, _by_session(y, b, other, session))
        for a, x in by.items()
        for b, y in theirs.items()
    ]
    return [each for each in found if each is not None]


def _by_session(values: np.ndarray, name: str, trial: Trial, session: np.ndarray) -> np.ndarray:
    """values: [outputs, T] of a score. [sessions, siblings], NaN where a turn of it failed."""
    names = [name] if name in trial.names else trial.names
    scores = nanmean(values, 1)
    for n, repeats in enumerate(trial.answers):
        for t in range(len(repeats[0])):
            if np.isnan(values[n, t]) and any(
                rows[t][each].failed for rows in repeats for each in names
            ):
                scores[n] = np.nan
    counts = np.bincount(session)
    found = np.full((len(counts), counts.max()), np.nan)
    for of in range(len(counts)):
        found[of, : counts[of]] = scores[session == of]
    return found


# ------------------------------------------------------------------------------------------- shown


def table(curves: Sequence[Curve]) -> Table | None:
    """Two rows a curve; None of no curves."""
    if not curves:
        return None
    columns = _columns(curves)
    rows: list[tuple[str, list[str]]] = []
    for each in curves:
        name = f"{each.held}, chosen by {each.chosen}"
        for label, values in ((name, each.value), (f"{each.held}, oracle", each.oracle)):
            cells = [_cell(values[k - 1]) if k <= len(values) else "-" for k in columns]
            row = (label, [*cells, str(each.sessions)])
            if row not in rows:  # an oracle's, of another choice
                rows.append(row)
    left = max(each.left_out for each in curves)
    return Table(
        "Best of k",
        [*(f"k = {k}" for k in columns), "sessions"],
        rows,
        "The held-out score of the best of k siblings, over all draws of k; 95 % intervals by a "
        "bootstrap over sessions. k = 1 is the mean; the oracle chooses by the held-out score "
        "itself." + (" Sessions without all scores of all siblings are left out." if left else ""),
    )


def _cell(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def charts(curves: Sequence[Curve]) -> list[Chart]:
    """Of every held-out score: what each choice gives, and the oracle."""
    found = []
    for held in dict.fromkeys(each.held for each in curves):
        some = [each for each in curves if each.held == held][:MOST_DRAWN]
        columns = _columns(some)
        series = [
            Series(f"chosen by {each.chosen}", _by_k(each.value, columns), colour)
            for colour, each in enumerate(some)
        ]
        series.append(Series("oracle", _by_k(some[0].oracle, columns), MOST_DRAWN, hollow=True))
        found += dots([(f"{held} of the best of k", series)], [str(k) for k in columns], "k")
    return found


def _by_k(values: Sequence[Estimate], columns: Sequence[int]) -> dict[str, Estimate]:
    return {str(k): values[k - 1] for k in columns if k <= len(values)}


def _columns(curves: Sequence[Curve]) -> list[int]:
    last = max(len(each.value) for each in curves)
    return sorted({k for k in SHOWN if k < last} | {last})
