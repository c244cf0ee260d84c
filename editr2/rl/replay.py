"""What training computes again of a rollout: velocities where a loss asks for them, and log-probs
of what was written: intents and thoughts.

Only for turns that are `needed`: one that is masked, or whose advantage is exactly 0 where nothing
else pulls (half of all turns, since siblings often score alike), adds nothing to the gradient and
is left out.

Two ways, equal up to rounding: *walking* through the sessions as the rollout did, and one *packed*
forward of whole sessions where the policy has one. Both give `Part`s: some of the chunk's queries,
mixed over turns and places, with what the present weights predict there. The reference and the old
policy are replayed the same way under their own weights, so their parts hold the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from editr2.policies.base import (
    PackedPolicy,
    Policy,
    TextPolicy,
    TokenScores,
    TurnTask,
    Velocity,
    at_size,
)
from editr2.rl.rollout import Chunk, TurnRecord, Walk


@dataclass(frozen=True)
class Queries:
    """Where velocities are asked for, turn by turn: x [M, Q, *latent] and sigma [M, Q], Q places
    for each of the turn's M rollouts.

    All of them are numbered in the order (turn, rollout, place): `first[t] + m * Q + q`.
    """

    x: list[Tensor]
    sigma: list[Tensor]

    @property
    def first(self) -> list[int]:
        counts = [s.numel() for s in self.sigma]
        return [sum(counts[:t]) for t in range(len(counts))]

    def where(self, number: int) -> tuple[int, int]:
        """The turn and the place of a query, both from 0."""
        turn = max(t for t, first in enumerate(self.first) if first <= number)
        return turn, (number - self.first[turn]) % self.sigma[turn].shape[1]


@dataclass(frozen=True)
class Answers:
    """Token scores of what was written in one turn, of one kind (`WRITINGS`); at: positions in the
    turn's record, int64 [B]."""

    turn: int
    at: Tensor
    scores: TokenScores
    kind: str = "intent"


@dataclass(frozen=True)
class Part:
    """Some queries by their numbers, int64 [R], with their velocity, and the answers that were
    scored with them."""

    index: Tensor
    velocity: Velocity
    answers: list[Answers]


@dataclass(frozen=True)
class ReplayOptions:
    """packed: one forward a session. context_gradient: let gradients through the context.
    micro_batch: queries a forward (None: the needed rollouts of one turn and step; packed: of all);
    a session is never taken apart where it is packed. temperature: of the sampled text. text: score
    it."""

    packed: bool
    context_gradient: bool
    micro_batch: int | None
    temperature: float
    text: bool


def replay(
    policy: Policy, chunk: Chunk, queries: Queries, options: ReplayOptions, needed: Tensor
) -> Iterator[Part]:
    """Parts that cover every query of the needed turns once (and perhaps others); with gradients
    where they are enabled. Walking with `context_gradient` there is at most one part, since its
    backward pass goes through everything.

    needed: bool [rollouts of the chunk, T] on the host.
    """
    if not bool(needed.any()):
        return
    policy = at_size(policy, chunk.image_size)
    if options.packed:
        yield from _packed(policy, chunk, queries, options, needed)
    else:
        yield from _walked(policy, chunk, queries, options, needed)


PACKED_SHARE = 0.9
"""The least share of needed turns at which packing pays: it computes every turn of a rollout that
is needed at all, where walking leaves the others out. Measured where the two meet: 0.6 with 4
rollouts, 0.9 with 8 (docs/measured.md)."""


def can_pack(
    policy: Policy, chunk: Chunk, queries: Queries, options: ReplayOptions, needed: Tensor
) -> bool:
    """Whether the policy's packed forward is there and cheaper for this chunk, by its own count,
    in which a session's further images are not: both ways read them once."""
    if not isinstance(policy, PackedPolicy):
        return False
    lengths = chunk.lengths
    if int(needed.sum()) < PACKED_SHARE * int(lengths[needed.any(1)].sum()):
        return False
    return all(
        policy.packs(tasks, context_gradient=options.context_gradient)
        for _, tasks in _by_length(chunk, queries, options.text, needed, counting=True)
    )


# ------------------------------------------------------------------------------------------ walking


def _walked(
    policy: Policy, chunk: Chunk, queries: Queries, options: ReplayOptions, needed: Tensor
) -> Iterator[Part]:
    waiting = _Waiting(policy)
    answers: list[Answers] = []
    for turn in _turns(policy, chunk, options, needed):
        answers += [_answer(policy, turn, kind, options.temperature) for kind in turn.asking]
        for place in range(queries.sigma[turn.number].shape[1]):
            waiting.add(_asked(turn, place, queries))
            # Whose gradient goes through the context goes through all of it at once, at the end.
            limit = options.micro_batch or len(turn.at)
            while not options.context_gradient and len(waiting) >= limit:
                yield _answered(policy, waiting.take(limit), answers)
                answers = []
    if len(waiting):
        yield _answered(policy, waiting.take(len(waiting)), answers)


@dataclass(frozen=True)
class _Turn:
    """A turn of the walk. at: positions in its record of the rollouts that are needed. context:
    where they paint. asking: where they wrote, by kind, of what is scored."""

    number: int
    record: TurnRecord
    at: Tensor
    context: Any
    asking: dict[str, Any]


def _turns(policy: Policy, chunk: Chunk, options: ReplayOptions, needed: Tensor) -> Iterator[_Turn]:
    """The turns that anybody needs, in order. The walk carries on whoever needs a later turn."""
    walk: Walk | None = None
    for number, record in enumerate(chunk.turns):
        if not bool(needed[:, number:].any()):
            return
        # Left before every yield: a generator's frame would keep the mode set for its caller.
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.context_gradient):
            if walk is None:
                walk = Walk(policy, chunk)
            if number:
                walk.drop(needed[:, number:].any(1) & ~chunk.left_out(number))
                before = chunk.turns[number - 1]
                seen = torch.searchsorted(before.rollout, walk.rollout)
                walk.advance(number, before.images[seen.numpy()])
            at = torch.searchsorted(record.rollout, walk.rollout)
            context, asking = walk.follow(record, at.tolist())
        live = needed[walk.rollout, number].nonzero()[:, 0]
        if not len(live):
            continue
        if not options.text:
            asking = {}
        if len(live) < len(at):
            context = policy.select(context, live)
            asking = {kind: policy.select(asked, live) for kind, asked in asking.items()}
        yield _Turn(number, record, at[live], context, asking)


def _answer(policy: Policy, turn: _Turn, kind: str, temperature: float) -> Answers:
    written, at = turn.record.written[kind], turn.at.tolist()
    scores = cast(TextPolicy, policy).answer_log_prob(
        turn.asking[kind], written.questions.select(at), written.ids(at), temperature=temperature
    )
    return Answers(turn.number, turn.at, scores, kind)


@dataclass(frozen=True)
class _Block:
    """Queries behind one context; index: their numbers."""

    context: Any
    x: Tensor
    sigma: Tensor
    index: Tensor


def _asked(turn: _Turn, place: int, queries: Queries) -> _Block:
    """One place of a turn, for all of its rollouts that are needed."""
    x, sigma = queries.x[turn.number], queries.sigma[turn.number]
    on = turn.at.to(x.device)
    index = queries.first[turn.number] + turn.at * sigma.shape[1] + place
    return _Block(turn.context, x[on, place], sigma[on, place], index)


def _answered(policy: Policy, block: _Block, answers: list[Answers]) -> Part:
    return Part(block.index, policy.velocity(block.x, block.sigma, block.context), answers)


class _Waiting:
    """Blocks that wait until there are as many queries as a forward takes, in their order."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.blocks: list[_Block] = []

    def __len__(self) -> int:
        return sum(len(block.index) for block in self.blocks)

    def add(self, block: _Block) -> None:
        self.blocks.append(block)

    def take(self, limit: int) -> _Block:
        """The first `limit` queries as one block; a block that reaches beyond them is cut."""
        taken: list[_Block] = []
        while limit and self.blocks:
            block = self.blocks.pop(0)
            if len(block.index) > limit:
                head, tail = torch.arange(limit), torch.arange(limit, len(block.index))
                self.blocks.insert(0, self._cut(block, tail))
                block = self._cut(block, head)
            taken.append(block)
            limit -= len(block.index)
        if len(taken) == 1:
            return taken[0]
        return _Block(
            self.policy.join([b.context for b in taken]),
            torch.cat([b.x for b in taken]),
            torch.cat([b.sigma for b in taken]),
            torch.cat([b.index for b in taken]),
        )

    def _cut(self, block: _Block, at: Tensor) -> _Block:
        on = at.to(block.x.device)
        context = self.policy.select(block.context, at)
        return _Block(context, block.x[on], block.sigma[on], block.index[at])


# ------------------------------------------------------------------------------------------- packed


def sessions_at_once(places: Sequence[int], micro_batch: int) -> int:
    """How many sessions with so many places, turn by turn, a packed forward takes that is to hold
    at most `micro_batch` of them: one at least."""
    return max(1, micro_batch // max(1, sum(places)))


def _by_length(
    chunk: Chunk,
    queries: Queries,
    text: bool,
    needed: Tensor,
    *,
    micro_batch: int | None = None,
    counting: bool = False,
) -> Iterator[tuple[Tensor, list[TurnTask]]]:
    """Rollouts with any needed turn that have equally many turns, and those turns.
    counting: with latents of the right shape that are anybody's, since nobody reads them."""
    lengths = chunk.lengths
    lengths = torch.where(needed.any(1), lengths, 0)
    for length in lengths[lengths > 0].unique().tolist():
        together = (lengths == length).nonzero()[:, 0]
        most = len(together)
        if micro_batch is not None:
            most = sessions_at_once([s.shape[1] for s in queries.sigma[:length]], micro_batch)
        for rollouts in together.split(most):
            yield rollouts, _tasks(chunk, queries, text, rollouts, length, counting)


def _tasks(
    chunk: Chunk, queries: Queries, text: bool, rollouts: Tensor, length: int, counting: bool
) -> list[TurnTask]:
    tasks = []
    for turn in range(length):
        record = chunk.turns[turn]
        at = torch.searchsorted(record.rollout, rollouts)
        on: Any = slice(len(at)) if counting else at.to(queries.x[turn].device)
        picked = at.tolist()
        written = {kind: each.select(picked) for kind, each in record.written.items()}
        asked, thought = written.get("intent") if text else None, written.get("thought")
        tasks.append(
            TurnTask(
                [record.text[i] for i in picked],
                record.images[at.numpy()],
                queries.x[turn][on],
                queries.sigma[turn][on],
                asked.questions if asked else None,
                asked.all_ids if asked else None,
                thought.texts if thought else None,
                thought.all_ids if thought and text else None,
            )
        )
    return tasks


def _packed(
    policy: Policy, chunk: Chunk, queries: Queries, options: ReplayOptions, needed: Tensor
) -> Iterator[Part]:
    index, velocities, answers = [], [], []
    bound = options.micro_batch
    for rollouts, tasks in _by_length(chunk, queries, options.text, needed, micro_batch=bound):
        images = np.stack([chunk.session_of(i).image for i in rollouts.tolist()])
        beside = [each[(rollouts // chunk.siblings).numpy()] for each in chunk.references]
        done = cast(PackedPolicy, policy).replay_packed(
            images,
            tasks,
            context_gradient=options.context_gradient,
            temperature=options.temperature,
            references=beside,
        )
        for turn, result in enumerate(done):
            at = torch.searchsorted(chunk.turns[turn].rollout, rollouts)
            q = queries.sigma[turn].shape[1]
            index.append((queries.first[turn] + at[:, None] * q + torch.arange(q)).flatten())
            velocities.append(result.velocity)
            answers += [Answers(turn, at, scores, kind) for kind, scores in result.scores.items()]
        if bound is not None:
            yield Part(torch.cat(index), Velocity.join(velocities), answers)
            index, velocities, answers = [], [], []
    if index:
        yield Part(torch.cat(index), Velocity.join(velocities), answers)
