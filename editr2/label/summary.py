"""How people answered: how many, which side they favour, how they agree.

All of it is about pairs of outputs: a ranking says something of each. What is said of a pair is one
of first, second, tie and bad, by the question's own order; skipped says nothing.

Agreement is the share of pairs on which two people said the same, and over all of them
Krippendorff's alpha for names (1: always the same, 0: as by chance), with a bootstrap over
questions.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from editr2.errors import counted
from editr2.label.questions import BAD, SKIPPED, Answer, Question
from editr2.label.store import Vote

KNOWN = "the file"
"""Who said what a question brought with it."""
RESAMPLES = 1000
Z = 1.959964
"""Of 95 %."""

Pair = tuple[str, int, int]
"""A question's id and two of its outputs."""


@dataclass(frozen=True)
class Person:
    """What one said. decided: pairs shown side by side of which one was preferred; left: of
    these, the left one."""

    name: str
    answered: int
    skipped: int
    ties: int
    bad: int
    left: int
    decided: int
    seconds: float

    @property
    def side(self) -> tuple[float, float, float] | None:
        """Share of left, and Wilson's interval; None where nothing was decided."""
        return wilson(self.left, self.decided) if self.decided else None

    @property
    def one_sided(self) -> bool:
        """Whether half is outside of the interval. The sides are random, so that whoever looks
        is within it 19 times of 20."""
        side = self.side
        return side is not None and not side[1] <= 0.5 <= side[2]


@dataclass(frozen=True)
class Agreement:
    """Of two people, over the pairs that both said something of."""

    one: str
    other: str
    same: int
    pairs: int


def relations(answer: Answer, count: int) -> Iterator[tuple[int, int, str]]:
    """Of an answer about so many outputs: i < j and what is said of them."""
    if answer == SKIPPED:
        return
    for i, j in itertools.combinations(range(count), 2):
        if isinstance(answer, str):
            yield i, j, BAD
        else:
            a, b = answer[i], answer[j]
            yield i, j, "tie" if a == b else "first" if a < b else "second"


def wilson(count: int, of: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson 1927)."""
    share = count / of
    middle = (share + Z * Z / (2 * of)) / (1 + Z * Z / of)
    half = Z / (1 + Z * Z / of) * math.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of))
    return share, middle - half, middle + half


def people(votes: Sequence[Vote]) -> list[Person]:
    """In the order in which they began."""
    found: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        found[vote.person].append(vote)
    return [_person(name, own) for name, own in found.items()]


def _person(name: str, votes: Sequence[Vote]) -> Person:
    pairs = [vote for vote in votes if len(vote.shown) == 2]
    said = [(vote, what) for vote in pairs for _, _, what in relations(vote.answer, 2)]
    decided = [(vote.shown[0], what) for vote, what in said if what in ("first", "second")]
    return Person(
        name,
        len(votes),
        sum(vote.answer == SKIPPED for vote in votes),
        sum(what == "tie" for _, what in said),
        sum(vote.answer == BAD for vote in votes),
        sum((left == 0) == (what == "first") for left, what in decided),
        len(decided),
        float(np.median([vote.seconds for vote in votes])),
    )


def said_of(questions: Iterable[Question], votes: Iterable[Vote]) -> dict[Pair, dict[str, str]]:
    """What everybody said of each pair of outputs; what a question knows itself is of `KNOWN`."""
    found: dict[Pair, dict[str, str]] = defaultdict(dict)
    for vote in votes:
        for i, j, what in relations(vote.answer, len(vote.shown)):
            found[vote.question, i, j][vote.person] = what
    for one in questions:
        for i, j, what in relations(SKIPPED if one.known is None else one.known, len(one.outputs)):
            found[one.id, i, j][KNOWN] = what
    return dict(found)


def agreements(said: Mapping[Pair, Mapping[str, str]]) -> list[Agreement]:
    """Of every two who have a pair in common."""
    same, pairs = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for of_pair in said.values():
        for (one, a), (other, b) in itertools.combinations(sorted(of_pair.items()), 2):
            pairs[one, other] += 1
            same[one, other] += a == b
    return [Agreement(one, other, same[one, other], n) for (one, other), n in pairs.items()]


def alpha(
    said: Mapping[Pair, Mapping[str, str]], seed: int = 0
) -> tuple[float, float, float] | None:
    """Krippendorff's alpha of people (not of `KNOWN`) and its 95 % interval; None where no pair has
    two answers, or all are the same. Chance is that of all answers taken together."""
    kinds = ("first", "second", "tie", BAD)
    units: dict[str, list[np.ndarray]] = defaultdict(list)
    for (question, _, _), of_pair in said.items():
        counts = Counter(what for person, what in of_pair.items() if person != KNOWN)
        if counts.total() > 1:
            units[question].append(np.array([counts[kind] for kind in kinds], float))
    if not units:
        return None
    # Of each question: how much its answers differ, and how often each was given.
    apart = np.array([sum(map(_apart, own)) for own in units.values()])
    given = np.array([np.sum(own, 0) for own in units.values()])
    found = _alpha(apart.sum(), given.sum(0))
    if math.isnan(found):
        return None
    draws = np.random.default_rng(seed).integers(len(apart), size=(RESAMPLES, len(apart)))
    drawn = [_alpha(apart[some].sum(), given[some].sum(0)) for some in draws]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return found, float(low), float(high)


def _apart(counts: np.ndarray) -> float:
    n = counts.sum()
    return float((n * n - (counts * counts).sum()) / (n - 1))


def _alpha(apart: float, given: np.ndarray) -> float:
    n = given.sum()
    by_chance = (n * n - (given * given).sum()) / (n - 1)
    return 1 - apart / by_chance if by_chance else math.nan


def lines(questions: Sequence[Question], votes: Sequence[Vote]) -> list[str]:
    """All of it in words."""
    said = said_of(questions, votes)
    ids = {one.id for one in questions}
    answered = len({vote.question for vote in votes} & ids)
    of = f"{answered} of {len(questions)} questions"
    found = [f"{of} are answered, by {counted(len(votes), 'vote')}"]
    for one in people(votes):
        parts = [counted(one.answered, "vote"), f"{one.seconds:.1f} s each"]
        counts = {"ties": one.ties, "all bad": one.bad, "skipped": one.skipped}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        if one.side is not None:
            share, low, high = one.side
            parts.append(f"left in {share:.0%} of {one.decided} ({low:.0%} to {high:.0%})")
        if one.one_sided:
            parts.append("position bias: sides are random, and this is not half")
        found.append(f"{one.name}: {', '.join(parts)}")
    for both in agreements(said):
        share = both.same / both.pairs
        found.append(f"{both.one} and {both.other}: the same of {both.pairs} pairs in {share:.0%}")
    if (whole := alpha(said)) is not None:
        found.append("agreement (Krippendorff's alpha): {:.2f} ({:.2f} to {:.2f})".format(*whole))
    return found
