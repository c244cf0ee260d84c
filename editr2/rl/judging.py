"""What is judged of a rollout: the items that rewards are asked about, turn by turn while it goes
on and whole when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from editr2.rewards.adapt import panel
from editr2.rewards.base import GivenReward, Item, Scores
from editr2.rewards.panel import CheckedReward, Panel
from editr2.rewards.pool import Judging, Pool
from editr2.rl.credit import FILTER_REWARD
from editr2.rl.rollout import Chunk, Seeds
from editr2.rl.seeds import judge_seed

Prune = Literal["off", "filter", "estimate"]


class Judged:
    """A batch of rollouts on its way to its scores: `decoded` hears of every turn, `done` of every
    chunk, and `scores` waits for the answers, in the order of the chunks' `rows`.

    first: the place of the batch's first rollout among those of all processes.
    """

    def __init__(self, judging: Judging, seeds: Seeds, first: int = 0) -> None:
        self._judging, self._seeds, self._first = judging, seeds, first
        self._newest: list[Item] = []

    def decoded(self, chunk: Chunk, turn: int) -> None:
        """Of the chunk that `done` hears of next."""
        if not self._judging.by_turn:
            return  # nobody listens: no images are put together
        self._newest = [
            self._item(chunk, rollout, turn) for rollout in chunk.turns[turn].rollout.tolist()
        ]
        self._judging.turn(self._newest)

    def goes_on(self, chunk: Chunk, how: Prune) -> Tensor:
        """bool [rollouts of the chunk], once what `rollout.prune` looks at is known of the turn
        decoded last: False where the later turns are to be left out."""
        if how == "filter":
            over = self._judging.zero(FILTER_REWARD)
        else:
            over = self._judging.given_up(self._newest)
        return torch.tensor([row not in over for row in self._rows(chunk)])

    def done(self, chunk: Chunk) -> None:
        self._judging.rollouts([self._item(chunk, rollout) for rollout in range(chunk.rollouts)])

    def scores(self, turns: int) -> Scores:
        return self._judging.scores(turns)

    def _item(self, chunk: Chunk, rollout: int, turn: int | None = None) -> Item:
        ordinal, sibling = chunk.ordinals[rollout // chunk.siblings], rollout % chunk.siblings
        seed = judge_seed(self._seeds.run, self._seeds.purpose, "judge", ordinal, sibling)
        session, images = chunk.session_of(rollout), chunk.images_of(rollout)
        turns: tuple[int, ...] | None = None if turn is None else (turn,)
        if turn is None and len(images) < len(session.turns):
            turns = tuple(range(len(images)))
        return Item(session, images, turns, self._rows(chunk)[rollout], seed)

    def _rows(self, chunk: Chunk) -> list[int]:
        rows: list[int] = (self._first + chunk.rows).tolist()
        return rows


def pool_of(reward: GivenReward | CheckedReward | Panel | Pool) -> Pool:
    """A reward of any form, ready to be asked beside a rollout."""
    return reward if isinstance(reward, Pool) else Pool(panel(reward))


def judge(
    reward: GivenReward | CheckedReward | Panel | Pool,
    done: Sequence[Chunk],
    turns: int,
    seeds: Seeds | None = None,
) -> Scores:
    """Scores of all rollouts of some chunks, in order."""
    seeds = seeds or Seeds(0, "judge")
    judged = Judged(pool_of(reward).judging(purpose=seeds.purpose), seeds)
    for chunk in done:
        for turn in range(len(chunk.turns)):
            judged.decoded(chunk, turn)
        judged.done(chunk)
    return judged.scores(turns)
