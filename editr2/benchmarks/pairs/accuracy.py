"""How often a reward is right about pairs, from what it said of outputs.

A pair of which people called one output better is right where that one scores higher; equal scores
are half right, which is what a coin would have, and are counted (`ties`). Published figures take
them for wrong: `ties_wrong` is that share, without an interval. A record of several outputs is
right where all of its pairs are; where scores are equal, as often as a coin would get it right.
Intervals are a bootstrap over sources: what is said of one source's pairs is not independent.

A pair is judged where both of its outputs have the score that is asked for. Else it failed, if one
of them did, or the score does not apply; such pairs are counted, and left out of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, Literal, NamedTuple

import numpy as np

from editr2.benchmarks.pairs.labelled import Comparison, numbers_of
from editr2.judge.agreement import TIE
from editr2.report.paired import (
    RESAMPLES,
    Estimate,
    Statistic,
    draws,
    estimate,
    mean_of,
    of_resamples,
    ratio,
)
from editr2.rewards.answers import TurnScores

State = Literal["judged", "not_applicable", "failed"]
SUM = "reward"
"""Name of the weighted sum of a reward's scores."""

SOURCES = 20_000
"""Of more sources than these the interval is from fewer resamples: counts of 2,000 resamples of
them are 0.3 GiB."""


class Value(NamedTuple):
    """What a score is of an output; value None where it is not judged."""

    state: State
    value: float | None
    reason: str | None = None


def value_of(row: TurnScores, name: str, weights: Mapping[str, float] | None) -> Value:
    """The score of a name, or the sum by `weights` over the scores that apply (`SUM`)."""
    if name in row:
        score = row[name]
        if score.failed:
            return Value("failed", None, score.reason)
        if not score.applies:
            return Value("not_applicable", None, score.reason)
        return Value("judged", score.value)
    assert weights is not None
    parts = {each: value_of(row, each, None) for each in row if weights[each]}
    for each, part in parts.items():
        if part.state == "failed":
            return Value("failed", None, f"{each}: {part.reason}")
    heard = {each: part.value for each, part in parts.items() if part.value is not None}
    if not heard:
        return Value("not_applicable", None, "none of the scores applies")
    total = sum(abs(weight) for weight in weights.values())
    share = sum(abs(weights[each]) for each in heard)
    return Value("judged", sum(weights[e] * v for e, v in heard.items()) * total / share)


@dataclass(frozen=True)
class Verdict:
    """Of a pair. by: the score. better, worse: of what people called so."""

    comparison: Comparison
    place: int
    by: str
    better: Value
    worse: Value

    @property
    def state(self) -> State:
        return _worst((self.better.state, self.worse.state))

    @property
    def tie(self) -> bool:
        """People's."""
        return self.comparison.pairs[self.place].tie

    @property
    def difference(self) -> float:
        """By how much the better one scores higher; NaN where it is not judged."""
        a, b = self.better.value, self.worse.value
        return math.nan if a is None or b is None else a - b

    @property
    def right(self) -> float:
        """1, 0.5 or 0; NaN of pairs that are not judged or that people tied."""
        if self.tie or math.isnan(self.difference):
            return math.nan
        return 0.5 if abs(self.difference) < TIE else float(self.difference > 0)


def verdicts_of(
    comparisons: Sequence[Comparison],
    answers: Mapping[str, TurnScores],
    by: Callable[[Comparison], str],
    weights: Mapping[str, float] | None,
) -> list[Verdict]:
    """Of every pair, in order. by: the score that a comparison is judged by."""
    found = []
    for one in comparisons:
        for place, pair in enumerate(one.pairs):
            name = by(one)
            ends = [value_of(answers[end], name, weights) for end in (pair.better, pair.worse)]
            found.append(Verdict(one, place, name, *ends))
    return found


@dataclass(frozen=True)
class Measure:
    """A number of a set.

    key: `NAME/GROUP`, such as `accuracy/dimension=overall`, or the name alone. unit: what n counts.
    n: of those that are judged, of `asked`. ties: of them, equal scores. ties_wrong: the value if
    these are wrong. by: the score, where all are judged by one. threshold: up to it scores are
    equal, where there is one.
    """

    key: str
    value: float
    low: float
    high: float
    unit: str
    n: int
    asked: int
    failed: int
    not_applicable: int
    ties: int
    ties_wrong: float | None = None
    by: str | None = None
    threshold: float | None = None

    def written(self) -> dict[str, Any]:
        """For JSON: null of what is not defined."""
        said = {n: v for n, v in vars(self).items() if v is not None}
        return {
            n: (None if isinstance(v, float) and math.isnan(v) else _rounded(v))
            for n, v in said.items()
        }


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


class Accuracy:
    """Measures of some verdicts, all over the same sources."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = list(verdicts)
        self._source = numbers_of([v.comparison.cluster for v in self.verdicts])
        self._sources = int(self._source.max(initial=-1)) + 1

    def some(self, **groups: str) -> np.ndarray:
        """bool [verdicts]: those of comparisons that belong to these."""
        return np.array(
            [
                all(v.comparison.groups.get(k) == g for k, g in groups.items())
                for v in self.verdicts
            ],
            dtype=bool,
        )

    def groups(self, kind: str) -> list[str]:
        """The groups of a kind that there are, in the order of the set."""
        found = (v.comparison.groups.get(kind) for v in self.verdicts)
        return list(dict.fromkeys(group for group in found if group is not None))

    def accuracy(self, key: str, of: np.ndarray) -> Measure | None:
        """Of the pairs that people did not tie; None where there are none."""
        of = of & ~np.array([v.tie for v in self.verdicts], dtype=bool)
        return self._of_pairs(key, of, [self._right(of)]) if of.any() else None

    def average(self, key: str, parts: Sequence[np.ndarray]) -> Measure | None:
        """The mean of the parts' accuracies; None where there is none of them."""
        strict = ~np.array([v.tie for v in self.verdicts], dtype=bool)
        parts = [part & strict for part in parts if (part & strict).any()]
        if not parts:
            return None
        found = self._of_pairs(key, np.any(parts, 0), [self._right(part) for part in parts])
        wrong = [self._ties_wrong(part) for part in parts]
        known = [value for value in wrong if value is not None]
        return replace(found, ties_wrong=float(np.mean(known)) if known else None)

    def whole(self, key: str, of: np.ndarray, threshold: float = 0.0) -> Measure | None:
        """Of records: all pairs right at once. threshold: outputs that people tied are right where
        their scores differ by no more. Only records of which all pairs are there."""
        records: dict[str, list[Verdict]] = {}
        for v, inside in zip(self.verdicts, of, strict=True):
            if inside and v.comparison.groups.get("whole", "yes") == "yes":
                records.setdefault(v.comparison.id, []).append(v)
        if not records:
            return None
        states = [_worst([pair.state for pair in pairs]) for pairs in records.values()]
        right = np.array(
            [
                _all_right(pairs, threshold) if state == "judged" else math.nan
                for pairs, state in zip(records.values(), states, strict=True)
            ]
        )
        number = {v.comparison.cluster: s for v, s in zip(self.verdicts, self._source)}
        source = np.array([number[pairs[0].comparison.cluster] for pairs in records.values()])
        strict = [[v for v in pairs if not v.tie] for pairs in records.values()]
        tied = [any(v.right == 0.5 for v in pairs) for pairs in strict]
        use = ~np.isnan(right)
        found = estimate(self._share(right[use], source[use]), self._resamples)
        wrong = float((right[use] == 1).mean()) if use.any() else None
        return _measure(
            key, found, "records", states, sum(tied), ties_wrong=wrong, threshold=threshold or None
        )

    def with_ties(self, key: str, of: np.ndarray) -> Measure | None:
        """The share of all pairs, those that people tied among them, that one threshold gets right:
        scores that differ by no more are equal. It is the best one, fitted to these answers (and to
        every resample). None where people tied nothing."""
        tie = np.array([v.tie for v in self.verdicts], dtype=bool)
        states = [v.state for v, inside in zip(self.verdicts, of, strict=True) if inside]
        judged = of & np.array([v.state == "judged" for v in self.verdicts], dtype=bool)
        if not (of & tie).any() or not judged.any():
            return None
        difference = np.array([v.difference for v in self.verdicts])[judged]
        search = _Thresholds(difference, tie[judged], self._source[judged])
        weights = draws(self._sources, self._resamples)
        values = np.concatenate([search.best(part) for part in np.array_split(weights, 20)])
        found = of_resamples(values, int(judged.sum()))
        ties = int((abs(difference) < TIE).sum())
        return _measure(key, found, "pairs", states, ties, threshold=search.threshold())

    # -- what they have in common

    def _right(self, of: np.ndarray) -> Statistic:
        right = np.array([v.right for v in self.verdicts])
        use = of & ~np.isnan(right)
        return self._share(right[use], self._source[use])

    def _share(self, right: np.ndarray, source: np.ndarray) -> Statistic:
        """The mean of `right` [n], over sources [n]."""
        sums, counts = (
            np.bincount(source, weights, self._sources).astype(np.float64)
            for weights in (right, None)
        )
        return ratio(sums, counts)

    def _of_pairs(self, key: str, of: np.ndarray, parts: Sequence[Statistic]) -> Measure:
        inside = [v for v, use in zip(self.verdicts, of, strict=True) if use]
        statistic = parts[0] if len(parts) == 1 else mean_of(parts)
        found = estimate(statistic, self._resamples)
        ties = sum(v.right == 0.5 for v in inside)
        names, states = {v.by for v in inside}, [v.state for v in inside]
        by = names.pop() if len(names) == 1 else None
        return _measure(key, found, "pairs", states, ties, ties_wrong=self._ties_wrong(of), by=by)

    def _ties_wrong(self, of: np.ndarray) -> float | None:
        right = np.array([v.right for v in self.verdicts])[of]
        right = right[~np.isnan(right)]
        return float((right == 1).mean()) if len(right) else None

    @property
    def _resamples(self) -> int:
        return RESAMPLES if self._sources <= SOURCES else 200


def _measure(
    key: str, of: Estimate, unit: str, states: Sequence[State], ties: int, **more: Any
) -> Measure:
    return Measure(
        key,
        of.value,
        of.low,
        of.high,
        unit,
        n=states.count("judged"),
        asked=len(states),
        failed=states.count("failed"),
        not_applicable=states.count("not_applicable"),
        ties=ties,
        **more,
    )


def _worst(states: Collection[State]) -> State:
    known: tuple[State, ...] = ("failed", "not_applicable")
    return next((state for state in known if state in states), "judged")


def _all_right(pairs: Sequence[Verdict], threshold: float) -> float:
    """How often the record is right where a coin orders equal scores."""
    strict = []
    for pair in pairs:
        if pair.tie:
            if abs(pair.difference) > threshold + TIE:
                return 0.0
        elif pair.right == 0:
            return 0.0
        elif pair.right == 0.5:
            ends = pair.comparison.pairs[pair.place]
            strict.append((ends.better, ends.worse))
    names = sorted({name for pair in strict for name in pair})
    orders = list(permutations(names))
    good = sum(all(o.index(a) < o.index(b) for a, b in strict) for o in orders)
    return good / len(orders)


class _Thresholds:
    """Every threshold at which pairs turn from told apart to equal."""

    def __init__(self, difference: np.ndarray, tie: np.ndarray, source: np.ndarray) -> None:
        size = np.abs(difference)
        order = np.argsort(size, kind="stable")
        self._size, self._source = size[order], source[order]
        self._tie = tie[order].astype(np.float64)
        self._right = ((difference > TIE) & ~tie)[order].astype(np.float64)
        # A threshold takes all of its size with it: the last of each is where it can stand.
        last = np.diff(self._size, append=np.inf) > TIE
        self._ends = np.flatnonzero(last) + 1
        if self._size[0] > TIE:  # 0 ties nothing
            self._ends = np.concatenate([[0], self._ends])

    def _shares(self, weights: np.ndarray) -> np.ndarray:
        """weights: of sources, [R, sources]. The share that is right at every threshold."""
        own = weights[:, self._source]
        zero = np.zeros((len(own), 1))
        tied = np.concatenate([zero, np.cumsum(own * self._tie, 1)], 1)[:, self._ends]
        told = np.concatenate([zero, np.cumsum(own * self._right, 1)], 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (tied + told[:, -1:] - told[:, self._ends]) / own.sum(1, keepdims=True)
        return shares

    def best(self, weights: np.ndarray) -> np.ndarray:
        """Of every row of weights, the share at its best threshold."""
        found: np.ndarray = self._shares(weights).max(1)
        return found

    def threshold(self) -> float:
        """The smallest of the best."""
        at = int(self._shares(np.ones((1, int(self._source.max()) + 1)))[0].argmax())
        end = self._ends[at]
        return float(self._size[end - 1]) if end else 0.0
