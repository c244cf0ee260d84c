"""What training computes again of a rollout: velocities at stored places and log-probs of sampled
intents.

Only for turns that are `needed`: one that is masked, or whose advantage is exactly 0 where nothing
else pulls (half of all turns, since siblings often score alike), adds nothing to the gradient and
is left out.

Two ways, equal up to rounding: *walking* through the sessions as the rollout did, and one *packed*
forward of whole sessions where the policy has one. Both give `Part`s: rows of the chunk's places,
mixed over turns and steps, with what the present weights predict there. The reference and the old
policy are replayed the same way under their own weights, so their parts come in the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from editr2.policies.base import PackedPolicy, Policy, TextPolicy, TokenScores, TurnTask, Velocity
from editr2.rl.rollout import Chunk, TurnRecord, Walk


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
    """packed: one forward a session. context_gradient: let gradients through the context.
    micro_batch: rows a forward (None: the needed rollouts of one turn and step). temperature: of
    the sampled intents. text: score the intents."""

    packed: bool
    context_gradient: bool
    micro_batch: int | None
    temperature: float
    text: bool


def replay(
    policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions, needed: Tensor
) -> Iterator[Part]:
    """Parts that cover every row of the needed turns once (and perhaps others); with gradients
    where they are enabled. With `context_gradient` there is at most one part, since its backward
    pass goes through everything.

    needed: bool [rollouts of the chunk, T] on the host.
    """
    if not bool(needed.any()):
        return
    if options.packed:
        yield _packed(policy, chunk, places, options, needed)
    else:
        yield from _walked(policy, chunk, places, options, needed)


PACKED_SHARE = 0.9
"""The least share of needed turns at which packing pays: it computes every turn of a rollout that
is needed at all, where walking leaves the others out. Measured where the two meet: 0.6 with 4
rollouts, 0.9 with 8 (docs/measured.md)."""


def can_pack(
    policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions, needed: Tensor
) -> bool:
    """Whether the policy's packed forward is there and cheaper for this chunk, by its own count."""
    if not isinstance(policy, PackedPolicy):
        return False
    lengths = torch.tensor([len(s.turns) for s in chunk.sessions]).repeat_interleave(chunk.siblings)
    if int(needed.sum()) < PACKED_SHARE * int(lengths[needed.any(1)].sum()):
        return False
    return all(
        policy.packs(tasks, context_gradient=options.context_gradient)
        for _, tasks in _by_length(chunk, places, options.text, needed, counting=True)
    )


# ------------------------------------------------------------------------------------------ walking


@dataclass(frozen=True)
class _Block:
    """Rollouts of one turn and place behind one context; rows: theirs among `Places`."""

    context: Any
    x: Tensor
    sigma: Tensor
    rows: Tensor


def _walked(
    policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions, needed: Tensor
) -> Iterator[Part]:
    waiting: list[_Block] = []
    answers: list[Answers] = []
    for turn, (rollouts, asking, context) in enumerate(_contexts(policy, chunk, options, needed)):
        record, q = chunk.turns[turn], places.sigma[turn].shape[1]
        live = needed[rollouts, turn].nonzero()[:, 0]
        if not len(live):
            continue
        if len(live) < len(rollouts):
            context = policy.select(context, live)
        at = torch.searchsorted(record.rollout, rollouts[live])
        if options.text and record.questions is not None:
            if len(live) < len(rollouts):
                asking = policy.select(asking, live)
            answers.append(_answer(policy, asking, turn, record, at, options.temperature))
        on = at.to(places.x[turn].device)
        for place in range(q):
            rows = places.first[turn] + at * q + place
            waiting.append(
                _Block(context, places.x[turn][on, place], places.sigma[turn][on, place], rows)
            )
            limit = options.micro_batch or len(at)
            while not options.context_gradient and sum(len(b.rows) for b in waiting) >= limit:
                block, waiting = _take(policy, waiting, limit)
                yield Part(
                    block.rows, policy.velocity(block.x, block.sigma, block.context), answers
                )
                answers = []
    if waiting:
        block, _ = _take(policy, waiting, sum(len(b.rows) for b in waiting))
        yield Part(block.rows, policy.velocity(block.x, block.sigma, block.context), answers)


def _contexts(
    policy: Policy, chunk: Chunk, options: ReplayOptions, needed: Tensor
) -> Iterator[tuple[Tensor, Any, Any]]:
    """(rollouts, the context that their intents are asked on, the context behind their
    instruction), turn by turn, of the rollouts that have a needed turn from there on."""
    walk: Walk | None = None
    for turn, record in enumerate(chunk.turns):
        if not bool(needed[:, turn:].any()):
            return
        # Left before every yield: a generator's frame would keep the mode set for its caller.
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.context_gradient):
            if walk is None:
                walk = Walk(policy, chunk)
            if turn:
                walk.drop(needed[:, turn:].any(1))
                before = chunk.turns[turn - 1]
                walk.advance(
                    turn, before.images[torch.searchsorted(before.rollout, walk.rollout).numpy()]
                )
            asking = walk.context
            at = torch.searchsorted(record.rollout, walk.rollout)
            context = walk.instruct([record.text[i] for i in at.tolist()])
        yield walk.rollout, asking, context


def _answer(
    policy: Policy, context: Any, turn: int, record: TurnRecord, at: Tensor, temperature: float
) -> Answers:
    assert record.questions is not None and record.intents is not None
    ids = [record.intents[i].ids for i in at.tolist()]
    questions = record.questions.select(at.tolist())
    scores = cast(TextPolicy, policy).answer_log_prob(
        context, questions, ids, temperature=temperature
    )
    return Answers(turn, at, scores)


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


# ------------------------------------------------------------------------------------------- packed


def _by_length(
    chunk: Chunk, places: Places, text: bool, needed: Tensor, *, counting: bool = False
) -> Iterator[tuple[Tensor, list[TurnTask]]]:
    """Rollouts with any needed turn whose sessions have equally many turns, and those turns.
    counting: with latents of the right shape that are anybody's, since nobody reads them."""
    lengths = torch.tensor([len(s.turns) for s in chunk.sessions]).repeat_interleave(chunk.siblings)
    lengths = torch.where(needed.any(1), lengths, 0)
    for length in lengths[lengths > 0].unique().tolist():
        rollouts = (lengths == length).nonzero()[:, 0]
        tasks = []
        for turn in range(length):
            record = chunk.turns[turn]
            at = torch.searchsorted(record.rollout, rollouts)
            on: Any = slice(len(at)) if counting else at.to(places.x[turn].device)
            asked = text and record.questions is not None
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


def _packed(
    policy: Policy, chunk: Chunk, places: Places, options: ReplayOptions, needed: Tensor
) -> Part:
    rows, velocities, answers = [], [], []
    for rollouts, tasks in _by_length(chunk, places, options.text, needed):
        images = np.stack([chunk.session_of(i).image for i in rollouts.tolist()])
        done = cast(PackedPolicy, policy).replay_packed(
            images,
            tasks,
            context_gradient=options.context_gradient,
            temperature=options.temperature,
        )
        for turn, result in enumerate(done):
            at = torch.searchsorted(chunk.turns[turn].rollout, rollouts)
            q = places.sigma[turn].shape[1]
            rows.append((places.first[turn] + at[:, None] * q + torch.arange(q)).flatten())
            velocities.append(result.velocity.v)
            if result.tokens is not None:
                answers.append(Answers(turn, at, result.tokens))
    return Part(torch.cat(rows), Velocity(torch.cat(velocities)), answers)
