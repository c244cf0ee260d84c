"""Judging beside the rollout: rewards that may be called from several threads are asked as soon as
there is something to judge, and all answers are collected, in order, when credit needs them.

A `Judging` is one batch of rollouts. It is told of every turn that was decoded (`turn`) and of
every chunk whose rollout ended (`rollouts`); what it asked is collected by `scores`. Which answer
belongs where follows from what was asked, so numbers do not depend on who answered first. Rewards
without `concurrency` are asked by `scores` itself, on the calling thread, about all rollouts at
once: a function that is not made for threads never runs in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from editr2.rewards.answers import TurnScores
from editr2.rewards.base import Item, Scores, lay_out
from editr2.rewards.panel import CheckedReward, Panel
from editr2.rewards.record import calls_of

_Answer = Callable[[], list[list[TurnScores]]]
"""Waits for what a reward says of the items of a call."""

_Asked = tuple[list[Item], _Answer]


class Pool:
    """The threads of a panel's rewards, made when they are first needed; each reward has its own
    `concurrency` of them. They end with the process."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self._threads: dict[int, ThreadPool] = {}
        self._open = 0  # batches that are not scored yet

    def judging(self, *, turnwise: bool = False, **where: Any) -> Judging:
        """Of a batch of rollouts. turnwise: every reward is asked turn by turn, on the calling
        thread where it has no other, since rollouts are to end by what is said. where: what its
        lines on the record say, such as `purpose` and `iteration`."""
        self.panel.take()
        self._open += 1
        return Judging(self, where, turnwise)

    def done(self) -> None:
        """Of a batch: its scores are there. After the last, models leave the trainer's GPU."""
        self._open -= 1
        if not self._open:
            self.panel.lend()

    def submit(self, place: int, call: Sequence[Item], where: Mapping[str, Any]) -> _Asked:
        """Asks the reward at a place of the panel about the items, in a thread."""
        member = self.panel.members[place]
        if place not in self._threads:
            self._threads[place] = ThreadPool(member.concurrency)
        work = (_answer, member, self.panel, list(call), where)
        return list(call), self._threads[place].apply_async(copy_context().run, work).get


def _answer(
    member: CheckedReward, panel: Panel, call: list[Item], where: Mapping[str, Any]
) -> list[list[TurnScores]]:
    with calls_of(**where, **({"rollout": call[0].rollout} if len(call) == 1 else {})):
        return member.call(call, panel.record)


class Judging:
    """What is asked about one batch of rollouts, and what came back."""

    def __init__(self, pool: Pool, where: Mapping[str, Any], turnwise: bool = False) -> None:
        self._pool, self._where, self._turnwise = pool, where, turnwise
        self._asked: dict[int, list[_Asked]] = {}
        self._newest: dict[int, list[_Asked]] = {}  # about the turns told of last
        self._items: list[Item] = []

    @property
    def by_turn(self) -> bool:
        """Whether any reward is asked turn by turn."""
        members = self._pool.panel.members
        return self._turnwise or any(m.concurrency and m.by_turn for m in members)

    def turn(self, items: Sequence[Item]) -> None:
        """Turns that have just been decoded, one an item (`Item.turns`): of rollouts that
        `rollouts` is told of later."""
        self._newest = {}
        for place, member in enumerate(self._pool.panel.members):
            if self._turnwise or (member.concurrency and member.by_turn):
                self._newest[place] = self._submit(place, items)

    def zero(self, name: str) -> set[int]:
        """The rollouts, by their place, of which the turn told of last has 0 for a name and no
        score that failed, once that is known. Only where rewards are asked turn by turn."""
        members = self._pool.panel.members
        own = next(place for place, member in enumerate(members) if name in member.names)
        found = {
            rollout
            for rollout, row in _rows_of(self._newest[own])
            if row[name].value is not None and np.float32(row[name].value) == 0
        }
        for asked in self._newest.values():
            mine = [part for part in asked if found & {item.rollout for item in part[0]}]
            for rollout, row in _rows_of(mine):
                if any(score.failed for score in row.values()):
                    found.discard(rollout)
        return found

    def given_up(self, items: Sequence[Item]) -> set[int]:
        """The rollouts, by their place, that a reward's own `estimate` holds to be over."""
        return {
            item.rollout
            for member in self._pool.panel.members
            for item, over in zip(items, member.estimate(items), strict=True)
            if over
        }

    def rollouts(self, items: Sequence[Item]) -> None:
        """Whole rollouts, in any order."""
        self._items += items
        for place, member in enumerate(self._pool.panel.members):
            if member.concurrency and not (self._turnwise or member.by_turn):
                self._submit(place, items)

    def scores(self, turns: int) -> Scores:
        """Of all rollouts by their places, once every answer is there; `turns` is the width T."""
        self._items.sort(key=lambda item: item.rollout)  # whatever went through the model together
        sessions = [item.session for item in self._items]
        return lay_out(self._pool.panel.names, sessions, self.answers(), turns)

    def answers(self) -> list[list[TurnScores]]:
        """Of every rollout a row for each of its turns, once every answer is there. Asked for once:
        the batch is done then."""
        try:
            return self._answers()
        finally:
            self._pool.done()

    def _answers(self) -> list[list[TurnScores]]:
        panel = self._pool.panel
        rows: list[dict[int, TurnScores]] = [
            {turn: {} for turn in item.asked} for item in self._items
        ]
        places = {item.rollout: n for n, item in enumerate(self._items)}
        for place, member in enumerate(panel.members):
            if self._turnwise or member.concurrency:
                asked = self._asked.pop(place, [])
                said = [(call, answer()) for call, answer in asked]
            else:
                with calls_of(**self._where):
                    said = [
                        (call, member.call(call, panel.record))
                        for call in member.calls(self._items)
                    ]
            for call, answers in said:
                for item, of_item in zip(call, answers, strict=True):
                    for turn, row in zip(item.asked, of_item, strict=True):
                        rows[places[item.rollout]][turn] |= row
        return [[{name: row[name] for name in panel.names} for row in of.values()] for of in rows]

    def _submit(self, place: int, items: Sequence[Item]) -> list[_Asked]:
        member = self._pool.panel.members[place]
        asked = [
            self._pool.submit(place, call, self._where)
            if member.concurrency
            else self._here(member, call)
            for call in member.calls(list(items))
        ]
        self._asked.setdefault(place, []).extend(asked)
        return asked

    def _here(self, member: CheckedReward, call: list[Item]) -> _Asked:
        with calls_of(**self._where):
            said = member.call(call, self._pool.panel.record)
        return call, lambda: said


def _rows_of(asked: Sequence[_Asked]) -> Iterator[tuple[int, TurnScores]]:
    """Of calls about a turn each, the place of every rollout with what is said of it."""
    for call, answer in asked:
        for item, rows in zip(call, answer(), strict=True):
            yield from ((item.rollout, row) for row in rows)
