"""What training computes again of a rollout: velocities at stored places and log-probs of sampled intents.

Two ways, equal up to rounding: *walking* through the sessions as the rollout did, and one *packed* forward of whole
sessions where the policy has one. Both give `Part`s: rows of the chunk's places, mixed over turns and steps, with what
the present weights predict there. The reference and the old policy are replayed the same way under their own weights,
so their parts come in the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from editr2.policies.base import PackedPolicy, Policy, TextPolicy, TokenScores, TurnTask, Velocity
from editr2.rollout import Chunk, TurnRecord, Walk


@dataclass(frozen=True)
class Places:
    """Where velocities are asked for, turn by turn: x [M, Q, *latent] and sigma [M, Q].

    Rows number all of them, in the order (turn, rollout, place): `first[t] + m * Q + q`.
    """

    x: list[Tensor]
    sigma: list[Tensor]

    @property
    def first(self) -> list[int]:
        counts = [s.numel() for s in self.sigma]
        return [sum(counts[:t]) for t in range(len(counts))]


@dataclass(frozen=True)
class Answers:
    """Token scores of one turn's intents; `rollout`: positions in the turn's record, int64 [B]."""

    turn: int
    rollout: Tensor
    scores: TokenScores


@dataclass(frozen=True)
class Part:
    """Rows of `Places` with their velocity, and the answers that were scored with them."""

    rows: Tensor
    velocity: Velocity
    answers: list[Answers]


@dataclass(frozen=True)
class ReplayOptions:
    """packed: one forward a session. context_gradient: let gradients through the context. micro_batch: rows a forward
    (None: the M rollouts of one turn and step, as the rollout batched them). temperature: of the sampled intents.
    text: score the intents."""

    packed: bool
    context_gradient: bool
    micro_batch: int | None
    temperature: float
    text: bool


def replay(policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions) -> Iterator[Part]:
    """Parts that together cover every row once; with gradients where they are enabled. With `context_gradient` there is
    exactly one part, since its backward pass goes through everything."""
    if options.packed:
        part = _packed(policy, chunk, places, options)
        yield part
    else:
        yield from _walked(policy, chunk, places, options)


def can_pack(policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions) -> bool:
    """Whether the policy's packed forward is there and cheaper for this chunk, by its own count."""
    if not isinstance(policy, PackedPolicy):
        return False
    return all(
        policy.packs(tasks, context_gradient=options.context_gradient)
        for _, tasks in _by_length(chunk, places, options.text)
    )


# ------------------------------------------------------------------------------------------------------------- walking


@dataclass(frozen=True)
class _Block:
    """The rollouts of one turn and place behind one context; `at`: their positions in the turn's record."""

    context: Any
    x: Tensor
    sigma: Tensor
    rows: Tensor


def _walked(policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions) -> Iterator[Part]:
    waiting: list[_Block] = []
    answers: list[Answers] = []
    for turn, (asking, context) in enumerate(_contexts(policy, chunk, options)):
        record, x, sigma = chunk.turns[turn], places.x[turn], places.sigma[turn]
        if options.text and record.questions is not None:
            answers.append(_answer(policy, asking, turn, record, options.temperature))
        m, q = sigma.shape
        for place in range(q):
            rows = places.first[turn] + torch.arange(m) * q + place
            waiting.append(_Block(context, x[:, place], sigma[:, place], rows))
            if options.context_gradient:
                continue
            limit = options.micro_batch or m
            while sum(len(b.rows) for b in waiting) >= limit:
                block, waiting = _take(policy, waiting, limit)
                yield Part(block.rows, policy.velocity(block.x, block.sigma, block.context), answers)
                answers = []
    if waiting:
        block, _ = _take(policy, waiting, sum(len(b.rows) for b in waiting))
        yield Part(block.rows, policy.velocity(block.x, block.sigma, block.context), answers)


def _contexts(policy: Policy, chunk: Chunk, options: ReplayOptions) -> Iterator[tuple[Any, Any]]:
    """(the context that a turn's intent is asked on, the context behind its instruction), turn by turn."""
    walk: Walk | None = None
    for turn, record in enumerate(chunk.turns):
        # Left before every yield: a generator's frame would keep the mode set for its caller.
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.context_gradient):
            if walk is None:
                walk = Walk(policy, chunk)
            if turn:
                walk.advance(turn, chunk.turns[turn - 1].images)
            asking = walk.context
            context = walk.instruct(record.text)
        yield asking, context


def _answer(policy: Policy, context: Any, turn: int, record: TurnRecord, temperature: float) -> Answers:
    assert record.questions is not None and record.intents is not None
    ids = [intent.ids for intent in record.intents]
    scores = cast(TextPolicy, policy).answer_log_prob(context, record.questions, ids, temperature=temperature)
    return Answers(turn, torch.arange(len(ids)), scores)


def _take(policy: Policy, waiting: Sequence[_Block], limit: int) -> tuple[_Block, list[_Block]]:
    """The first `limit` rows as one block, and what is left."""
    taken: list[_Block] = []
    left = list(waiting)
    while limit and left:
        block = left.pop(0)
        if len(block.rows) > limit:
            head, tail = torch.arange(limit), torch.arange(limit, len(block.rows))
            left.insert(0, _part_of(policy, block, tail))
            block = _part_of(policy, block, head)
        taken.append(block)
        limit -= len(block.rows)
    if len(taken) == 1:
        return taken[0], left
    return _Block(
        policy.join([b.context for b in taken]),
        torch.cat([b.x for b in taken]),
        torch.cat([b.sigma for b in taken]),
        torch.cat([b.rows for b in taken]),
    ), left


def _part_of(policy: Policy, block: _Block, at: Tensor) -> _Block:
    on = at.to(block.x.device)
    return _Block(policy.select(block.context, at), block.x[on], block.sigma[on], block.rows[at])


# -------------------------------------------------------------------------------------------------------------- packed


def _by_length(chunk: Chunk, places: Places, text: bool) -> Iterator[tuple[Tensor, list[TurnTask]]]:
    """Rollouts whose sessions have equally many turns, and those turns."""
    lengths = torch.tensor([len(s.turns) for s in chunk.sessions]).repeat_interleave(chunk.siblings)
    for length in lengths.unique().tolist():
        rollouts = (lengths == length).nonzero()[:, 0]
        tasks = []
        for turn in range(length):
            record = chunk.turns[turn]
            at = torch.searchsorted(record.rollout, rollouts)
            on, asked = at.to(places.x[turn].device), text and record.questions is not None
            picked = at.tolist()
            tasks.append(
                TurnTask(
                    [record.text[i] for i in picked],
                    record.images[at.numpy()],
                    places.x[turn][on],
                    places.sigma[turn][on],
                    record.questions.select(picked) if asked and record.questions else None,
                    [record.intents[i].ids for i in picked] if asked and record.intents else None,
                )
            )
        yield rollouts, tasks


def _packed(policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions) -> Part:
    rows, velocities, answers = [], [], []
    for rollouts, tasks in _by_length(chunk, places, options.text):
        images = np.stack([chunk.session_of(i).image for i in rollouts.tolist()])
        done = cast(PackedPolicy, policy).replay_packed(
            images, tasks, context_gradient=options.context_gradient, temperature=options.temperature
        )
        for turn, result in enumerate(done):
            at = torch.searchsorted(chunk.turns[turn].rollout, rollouts)
            q = places.sigma[turn].shape[1]
            rows.append((places.first[turn] + at[:, None] * q + torch.arange(q)).flatten())
            velocities.append(result.velocity.v)
            if result.tokens is not None:
                answers.append(Answers(turn, at, result.tokens))
    return Part(torch.cat(rows), Velocity(torch.cat(velocities)), answers)
