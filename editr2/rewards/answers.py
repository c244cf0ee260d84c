"""Whatever a reward returned, as `Score`s: a row for every turn that the session has, a score for
every name.

What came back never decides what was expected. Anything that is not understood is a failed score
that says what it was; nothing is guessed, shortened or filled in. docs/rewards.md has the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from editr2.rewards.base import Score, described

TurnScores = dict[str, Score]

NOT_A_SCORE = Score(
    None,
    'None came back (accepted: a number in [0, 1], Score(None, "why"), Score.not_applicable(); no '
    "return?)",
)
"""What None stands for, except in TRL's manner, where it is `Score.not_applicable()`."""


def failed_turns(reason: str, turns: int, names: Sequence[str]) -> list[TurnScores]:
    """No score at all, for one reason."""
    return [dict.fromkeys(names, Score(None, reason)) for _ in range(turns)]


def batch_scores(
    said: object, turns: Sequence[int], names: Sequence[str], none: Score
) -> list[list[TurnScores]]:
    """Rows of many sessions, of so many `turns` each, from one answer about all of them."""
    sessions = _listed(said, len(turns))
    if sessions is None or len(sessions) != len(turns):
        wrong = described(said) if sessions is None else _count(said, sessions, len(turns))
        reason = f"{wrong} came back for {len(turns)} sessions (accepted: one entry a session)"
        return [failed_turns(reason, n, names) for n in turns]
    return [session_scores(one, n, names, none) for one, n in zip(sessions, turns, strict=True)]


def session_scores(said: object, turns: int, names: Sequence[str], none: Score) -> list[TurnScores]:
    """Rows of a session of so many `turns`. What is no sequence is said of the whole session, of
    each turn."""
    rows = _listed(said, turns)
    if rows is None:
        return [_turn_scores(said, names, none)] * turns
    if len(rows) != turns:
        wrong = _count(said, rows, turns)
        return failed_turns(
            f"{wrong} came back for {turns} turns (accepted: one entry a turn)", turns, names
        )
    return [_turn_scores(row, names, none) for row in rows]


def _listed(said: Any, expected: int) -> list[Any] | None:
    """The entries of a sequence, array or iterator, at most one more than expected; None of
    anything else."""
    arrays = isinstance(said, np.ndarray | Tensor) and said.ndim > 0
    if (
        arrays
        or isinstance(said, Iterator)
        or (isinstance(said, Sequence) and not isinstance(said, str | bytes))
    ):
        return list(itertools.islice(said, expected + 1))
    return None


def _count(said: object, entries: list[Any], expected: int) -> str:
    """How many came back; of an iterator that was cut off, more than were expected."""
    count = len(said) if hasattr(said, "__len__") else len(entries)
    more = "more than " if not hasattr(said, "__len__") and count > expected else ""
    return f"{more}{expected if more else count} {'entry' if count == 1 else 'entries'}"


def _turn_scores(said: object, names: Sequence[str], none: Score) -> TurnScores:
    """Scores of one turn."""
    if isinstance(said, Mapping):
        unknown = [name for name in said if name not in names]
        if unknown:
            reason = f"a score named {unknown[0]!r} came back (accepted: {', '.join(names)})"
            return dict.fromkeys(names, Score(None, reason))
        absent = Score(
            None,
            f"no score of this name came back (there were: {', '.join(map(str, said)) or 'none'})",
        )
        return {name: _score(said[name], none) if name in said else absent for name in names}
    score = _score(said, none)
    if len(names) == 1 or score.value is None:  # a missing score says the same of all names
        return dict.fromkeys(names, score)
    wrong = (
        f"{described(said)} came back for {len(names)} rewards (accepted: a dict of "
        f"{', '.join(names)})"
    )
    return dict.fromkeys(names, Score(None, wrong))


def _score(said: object, none: Score) -> Score:
    if said is None:
        return none
    try:
        if isinstance(said, Score):  # once more: frozen is a request
            return Score(said.value, said.reason, said.applies, said.votes)
        return Score(said)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return Score(None, str(error).removeprefix("Score: "))
