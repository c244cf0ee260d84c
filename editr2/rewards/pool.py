"""Judging beside the rollout: rewards that may be called from several threads are asked as soon as
there is something to judge, and all answers are collected, in order, when credit needs them.

A `Judging` is one batch of rollouts. It is told of every turn that was decoded (`turn`) and of
every chunk whose rollout ended (`rollouts`); what it asked is collected by `scores`. Which answer
belongs where follows from what was asked, so numbers do not depend on who answered first. Rewards
without `concurrency` are asked by `scores` itself, on the calling thread, about all rollouts at
once: a function that is not made for threads never runs in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

from editr2.rewards.answers import TurnScores
from editr2.rewards.base import Item, Scores, lay_out
from editr2.rewards.panel import CheckedReward, Panel
from editr2.rewards.record import calls_of

_Asked = tuple[list[Item], "AsyncResult[list[list[TurnScores]]]"]


class Pool:
    """The threads of a panel's rewards, made when they are first needed; each reward has its own
    `concurrency` of them. They end with the process."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self._threads: dict[int, ThreadPool] = {}
        self._open = 0  # batches that are not scored yet

    def judging(self, **where: Any) -> Judging:
        """Of a batch of rollouts. where: what its lines on the record say, such as `purpose` and
        `iteration`."""
        self.panel.take()
        self._open += 1
        return Judging(self, where)

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
        return list(call), self._threads[place].apply_async(copy_context().run, work)


def _answer(
    member: CheckedReward, panel: Panel, call: list[Item], where: Mapping[str, Any]
) -> list[list[TurnScores]]:
    with calls_of(**where, **({"rollout": call[0].rollout} if len(call) == 1 else {})):
        return member.call(call, panel.record)


class Judging:
    """What is asked about one batch of rollouts, and what came back."""

    def __init__(self, pool: Pool, where: Mapping[str, Any]) -> None:
        self._pool, self._where = pool, where
        self._asked: dict[int, list[_Asked]] = {}
        self._items: list[Item] = []

    def turn(self, items: Sequence[Item]) -> None:
        """Turns that have just been decoded, one an item (`Item.turns`): of rollouts that
        `rollouts` is told of later."""
        for place, member in enumerate(self._pool.panel.members):
            if member.concurrency and member.by_turn:
                self._submit(place, items)

    def rollouts(self, items: Sequence[Item]) -> None:
        """Whole rollouts, in the order in which they are scored."""
        self._items += items
        for place, member in enumerate(self._pool.panel.members):
            if member.concurrency and not member.by_turn:
                self._submit(place, items)

    def scores(self, turns: int) -> Scores:
        """Of all rollouts, once every answer is there; `turns` is the width T."""
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
        rows: list[list[TurnScores]] = [[{} for _ in item.asked] for item in self._items]
        places = {item.rollout: n for n, item in enumerate(self._items)}
        for place, member in enumerate(panel.members):
            if member.concurrency:
                asked = self._asked.pop(place, [])
                said = [(call, answer.get()) for call, answer in asked]
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
        return [[{name: row[name] for name in panel.names} for row in of] for of in rows]

    def _submit(self, place: int, items: Sequence[Item]) -> None:
        member = self._pool.panel.members[place]
        self._asked.setdefault(place, []).extend(
            self._pool.submit(place, call, self._where) for call in member.calls(list(items))
        )
