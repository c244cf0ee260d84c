"""What a verifier is worth, in numbers with 95 % intervals.

An interval is a bootstrap over sources: what is said of one source's edits is not independent. An
output is judged where at least half of its traces have a score, as where it is a reward; its score
is their mean. Pairs and edits without that are counted, and left out of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from editr2.judge.agreement import TIE
from editr2.report.paired import Compared, Estimate, Statistic, compared, estimate, ratio
from editr2.rewards.traces import KINDS, Kind, Trace
from editr2.verifier.files import Edit, Preference, Told

BINS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""Of shares and scores; a value on a bound belongs to the upper bin."""

MARGINS = ((0.0, 0.0), (0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0))
"""Of differences of two scores: equal ones first, and then each without its lower bound."""


@dataclass(frozen=True)
class Judged:
    """An edit and what was written about it.

    told: of `asked` traces, those that came back. source: what its picture is known by.
    """

    edit: Edit
    asked: int
    told: tuple[Told, ...]
    source: str
    gold: tuple[int, ...] | None = None

    @property
    def traces(self) -> list[Trace]:
        """Those that have a score."""
        return [one.trace for one in self.told if one.trace is not None]

    @property
    def heard(self) -> bool:
        return bool(self.traces) and 2 * len(self.traces) >= self.asked

    @property
    def score(self) -> float:
        """In [0, 1]; NaN where it is not judged."""
        return _mean([trace.score for trace in self.traces]) if self.heard else math.nan

    def share(self, kind: Kind) -> float:
        """Of the principles of a kind, how many hold, over traces; NaN where there are none."""
        if not self.heard:
            return math.nan
        found = [trace.share(self.edit.principles, kind) for trace in self.traces]
        return _mean([one for one in found if one is not None])

    @property
    def yes(self) -> np.ndarray:
        """Of every principle, the share of traces that say it holds, float64 [P]; NaN where it is
        not judged."""
        if not self.heard:
            return np.full(len(self.edit.principles), np.nan)
        return np.mean([trace.verdicts for trace in self.traces], 0)


@dataclass(frozen=True)
class JudgedPair:
    preference: Preference
    win: Judged
    lose: Judged

    @property
    def difference(self) -> float:
        """By how much the preferred output scores higher; NaN where one is not judged."""
        return self.win.score - self.lose.score


@dataclass(frozen=True)
class Measure:
    """A number. n: of what it counts (`unit`), of `asked`. ties: of pairs, equal scores. against:
    what it is held against, such as a constant answer's."""

    name: str
    of: Estimate
    unit: str
    n: int
    asked: int
    ties: int | None = None
    against: float | None = None

    def written(self) -> dict[str, Any]:
        """For JSON: null of what is not defined."""
        said: dict[str, Any] = {
            key: None if math.isnan(value) else round(value, 6)
            for key, value in (("value", self.of.value), ("low", self.of.low))
        }
        said["high"] = None if math.isnan(self.of.high) else round(self.of.high, 6)
        said |= {"unit": self.unit, "n": self.n, "asked": self.asked}
        said |= {} if self.ties is None else {"ties": self.ties}
        return said | ({} if self.against is None else {"against": round(self.against, 6)})


@dataclass(frozen=True)
class Bin:
    """Of a calibration. said: the mean of what the verifier said there; of: what is so."""

    low: float
    high: float
    said: float
    of: Estimate
    n: int


class Clusters:
    """Sources by number, and shares over them."""

    def __init__(self, sources: Sequence[str]) -> None:
        known = {source: n for n, source in enumerate(dict.fromkeys(sources))}
        self.number = np.array([known[source] for source in sources], dtype=np.int64)
        self.count = len(known)

    def mean(self, values: np.ndarray, of: np.ndarray | None = None) -> Estimate:
        """Of values [n], NaN where there is none, over the sources of places `of` [n] (all)."""
        return estimate(self.share(values, of))

    def share(self, values: np.ndarray, of: np.ndarray | None = None) -> Statistic:
        """The same, to be compared with another."""
        place = self.number if of is None else self.number[of]
        known = ~np.isnan(values)
        sums = np.bincount(place[known], values[known], self.count)
        counts = np.bincount(place[known], None, self.count)
        return ratio(sums, counts.astype(np.float64))


# -------------------------------------------------------------------------------------- preference


def right(differences: np.ndarray) -> np.ndarray:
    """1 where the preferred one scores higher, 0.5 where scores are equal, else 0; NaN of NaN."""
    found = np.where(np.abs(differences) < TIE, 0.5, (differences > 0).astype(np.float64))
    return np.where(np.isnan(differences), np.nan, found)


def preference(
    name: str, pairs: Sequence[JudgedPair], value: Callable[[Judged], float]
) -> Measure | None:
    """How often the preferred output has the higher value, equal ones half; None where no pair has
    the value on both sides."""
    differences = np.array([value(pair.win) - value(pair.lose) for pair in pairs])
    values = right(differences)
    n = int((~np.isnan(values)).sum())
    if not n:
        return None
    found = Clusters([pair.win.source for pair in pairs]).mean(values)
    return Measure(name, found, "pairs", n, len(pairs), ties=int((values == 0.5).sum()))


def by_one_trace(pairs: Sequence[JudgedPair]) -> Measure | None:
    """The same of a single trace of each output, over all pairs of traces that have a score: what
    one call of the reward is worth."""
    values = []
    for pair in pairs:
        if not (pair.win.heard and pair.lose.heard):
            values.append(math.nan)
            continue
        wins, losses = (np.array([t.score for t in o.traces]) for o in (pair.win, pair.lose))
        values.append(float(right(wins[:, None] - losses[None, :]).mean()))
    found = np.array(values)
    n = int((~np.isnan(found)).sum())
    if not n:
        return None
    of = Clusters([pair.win.source for pair in pairs]).mean(found)
    return Measure("by one trace", of, "pairs", n, len(pairs))


def preferences(pairs: Sequence[JudgedPair]) -> list[Measure]:
    """By the score; by one trace's; by the principles of each kind alone; and by the score for each
    task, where there are several."""
    found = [preference("score", pairs, lambda one: one.score), by_one_trace(pairs)]
    for kind in KINDS:
        found.append(preference(f"{kind} alone", pairs, partial(Judged.share, kind=kind)))
    tasks = dict.fromkeys(pair.preference.win.task for pair in pairs)
    for task in tasks if len(tasks) > 1 else ():
        some = [pair for pair in pairs if pair.preference.win.task == task]
        found.append(preference(f"task {task or 'not told'}", some, lambda one: one.score))
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class Gain:
    """Of one verifier over another, on the pairs that both judge: accuracies by the same draws of
    sources, and their difference. n: of so many pairs, of `asked`."""

    other: str
    of: Compared
    n: int
    asked: int

    def written(self) -> dict[str, Any]:
        """For JSON."""
        said: dict[str, Any] = {"against": self.other, "n": self.n, "asked": self.asked}
        for name, of in zip(("theirs", "ours", "gain"), self.of, strict=True):
            said[name] = [
                None if math.isnan(x) else round(x, 6) for x in (of.value, of.low, of.high)
            ]
        return said


def gain(name: str, pairs: Sequence[JudgedPair], others: Sequence[JudgedPair]) -> Gain:
    """pairs, others: the same pairs in the same order. name: the other's."""
    ours, theirs = (right(np.array([p.difference for p in some])) for some in (pairs, others))
    both = ~np.isnan(ours + theirs)
    clusters = Clusters([pair.win.source for pair in pairs])
    a, b = (clusters.share(np.where(both, some, np.nan)) for some in (theirs, ours))
    return Gain(name, compared(a, b), int(both.sum()), len(pairs))


def by_margin(pairs: Sequence[JudgedPair]) -> list[Bin]:
    """How often the verifier is right where its two scores are so far apart: whether it knows when
    it knows."""
    differences = np.array([pair.difference for pair in pairs])
    values, size = right(differences), np.abs(differences)
    clusters = Clusters([pair.win.source for pair in pairs])
    found = []
    for low, high in MARGINS:
        inside = (size <= high + TIE) & ((size > low + TIE) if high else (size < TIE))
        if inside.any():
            of = clusters.mean(values[inside], np.flatnonzero(inside))
            found.append(Bin(low, high, float(size[inside].mean()), of, int(inside.sum())))
    return found


def by_score(pairs: Sequence[JudgedPair]) -> list[Bin]:
    """How often an output of such a score was the preferred one."""
    outputs = [(pair.win, 1.0) for pair in pairs] + [(pair.lose, 0.0) for pair in pairs]
    scores = np.array([one.score for one, _ in outputs])
    won = np.array([w for _, w in outputs])
    return _bins(scores, won, Clusters([one.source for one, _ in outputs]))


# ------------------------------------------------------------------------------------ held to gold


@dataclass(frozen=True)
class Against:
    """Verdicts beside gold, one entry a principle of a judged edit. said: the share of traces that
    say yes. kind: of the principle."""

    said: np.ndarray
    gold: np.ndarray
    kind: np.ndarray
    clusters: Clusters
    asked: int

    @staticmethod
    def of(judged: Sequence[Judged]) -> Against:
        known = [one for one in judged if one.gold is not None]
        rows = [
            (said, gold, principle.kind, one.source)
            for one in known
            for said, gold, principle in zip(
                one.yes, cast(Sequence[int], one.gold), one.edit.principles, strict=True
            )
        ]
        heard = [row for row in rows if not math.isnan(row[0])]
        return Against(
            np.array([row[0] for row in heard]),
            np.array([row[1] for row in heard], dtype=np.float64),
            np.array([row[2] for row in heard]),
            Clusters([row[3] for row in heard]),
            len(rows),
        )

    @property
    def accuracy(self) -> list[Measure]:
        """The share of verdicts that are right, of all traces alike; by kind, and of all.
        `against` is the constant answer's: a verifier below it has learnt nothing of that kind."""
        right = np.where(self.gold == 1, self.said, 1 - self.said)
        found = []
        for name in ("all", *KINDS):
            some = np.flatnonzero((self.kind == name) | (name == "all"))
            if not len(some):
                continue
            share = float(self.gold[some].mean())
            of = self.clusters.mean(right[some], some)
            asked = self.asked if name == "all" else len(some)
            constant = max(share, 1 - share)
            found.append(Measure(name, of, "verdicts", len(some), asked, against=constant))
        return found

    @property
    def reliability(self) -> list[Bin]:
        """Of principles of which so many traces say yes, how many hold."""
        return _bins(self.said, self.gold, self.clusters)

    @property
    def brier(self) -> float:
        return float(np.mean((self.said - self.gold) ** 2)) if len(self.said) else math.nan

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of a bin's two numbers."""
        bins = self.reliability
        total = sum(one.n for one in bins)
        gaps = [one.n * abs(one.said - one.of.value) for one in bins]
        return math.fsum(gaps) / total if total else math.nan


def auc(judged: Sequence[Judged]) -> Measure | None:
    """How often an edit of which everything holds scores higher than one of which something does
    not, equal scores half; None without both."""
    known = [one for one in judged if one.gold is not None]
    heard = [one for one in known if one.heard]
    good = np.array([all(cast(Sequence[int], one.gold)) for one in heard], dtype=bool)
    if not good.any() or good.all():
        return None
    scores = np.array([one.score for one in heard])
    clusters = Clusters([one.source for one in heard])
    found = estimate(_auc(scores, good, clusters))
    return Measure("AUC", found, "edits", len(heard), len(known))


def _auc(scores: np.ndarray, good: np.ndarray, clusters: Clusters) -> Statistic:
    order = np.argsort(scores, kind="stable")
    place = clusters.number[order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > TIE)

    def of(weights: np.ndarray) -> np.ndarray:
        own = weights[:, place]
        up, down = (
            np.add.reduceat(own * mask, starts, axis=1) for mask in (good[order], ~good[order])
        )
        below = np.cumsum(down, 1) - down + 0.5 * down
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: np.ndarray = (up * below).sum(1) / (up.sum(1) * down.sum(1))
        return shares

    return Statistic(of, np.bincount(clusters.number, None, clusters.count) > 0)


# --------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Agreement:
    """Between traces about one edit, over edits of which several can be read.

    verdicts: of two traces, how often they say the same of a principle. kappa: that, less what
    chance would give. spread: standard deviation of scores. settled: of pairs, the share of which
    all traces prefer the same output.
    """

    verdicts: Measure
    kappa: float
    spread: float
    settled: float


def agreement(judged: Sequence[Judged], pairs: Sequence[JudgedPair]) -> Agreement | None:
    """None where no edit has two traces that can be read."""
    several = [one for one in judged if len(one.traces) > 1]
    if not several:
        return None
    same, sources, yes, number = [], [], 0.0, 0
    for one in several:
        counts, n = np.sum([t.verdicts for t in one.traces], 0), len(one.traces)
        pairs_alike = counts * (counts - 1) + (n - counts) * (n - counts - 1)
        same += (pairs_alike / (n * (n - 1))).tolist()
        sources += [one.source] * len(counts)
        yes, number = yes + float(counts.sum()), number + n * len(counts)
    found = Clusters(sources).mean(np.array(same))
    share = yes / number
    chance = share**2 + (1 - share) ** 2
    kappa = (found.value - chance) / (1 - chance) if chance < 1 else math.nan
    spread = _mean([float(np.std([t.score for t in one.traces])) for one in several])
    settled = [
        float(max(lose) < min(win) or max(win) < min(lose))
        for pair in pairs
        if (win := [t.score for t in pair.win.traces])
        and (lose := [t.score for t in pair.lose.traces])
    ]
    measure = Measure("verdicts", found, "principles", len(same), len(same))
    return Agreement(measure, kappa, spread, _mean(settled))


# ------------------------------------------------------------------------------------------- parts


def _bins(said: np.ndarray, so: np.ndarray, clusters: Clusters) -> list[Bin]:
    found = []
    for low, high in BINS:
        inside = (said >= low - TIE) & ((said < high - TIE) | (high == 1.0))
        if inside.any():
            of = clusters.mean(so[inside], np.flatnonzero(inside))
            found.append(Bin(low, high, float(said[inside].mean()), of, int(inside.sum())))
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def bins_written(bins: Sequence[Bin]) -> list[Mapping[str, Any]]:
    """For JSON."""
    return [
        {
            "from": one.low,
            "to": one.high,
            "said": round(one.said, 6),
            "value": round(one.of.value, 6),
            "low": round(one.of.low, 6),
            "high": round(one.of.high, 6),
            "n": one.n,
        }
        for one in bins
    ]
