"""Group rollout over turns on the policy's own outputs, and the walk that rollout and training share.

Every turn: (intent ->) instruction into the context -> denoise behind it -> decode -> the output into the context.
Only the steps of the SDE window are stored. Siblings share the source encoding, the first instruction and each turn's
initial noise; they differ in the noise of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.base import Intent, Policy, device_of
from editr2.schedule import Sampler
from editr2.seeds import derive_seed, seed_tensor
from editr2.sessions import Session
from editr2_kernels import INITIAL_STEP, philox_normal, sde_step


@dataclass
class TurnRecord:
    """One turn of a chunk of rollouts; only rollouts whose session has this turn (M of them).

    rollout: int64 [M], position in the chunk. text: what the context got. intents: what was sampled (None: no text).
    x, x_next: [M, W, *latent] the window's transitions; step_index: int64 [M, W]; sigma: [M, W]; log_prob: [M, W].
    velocity: as x, only when asked for (the ratio sentinel). images: uint8 [M, H, W, 3].
    """

    rollout: Tensor
    text: list[str]
    intents: list[Intent | None]
    x: Tensor
    x_next: Tensor
    step_index: Tensor
    sigma: Tensor
    log_prob: Tensor
    images: np.ndarray
    velocity: Tensor | None = None


@dataclass
class Chunk:
    """Groups that go through the model together. ordinals: the sessions' places in the run's stream (seed material)."""

    sessions: list[Session]
    ordinals: list[int]
    siblings: int
    turns: list[TurnRecord] = field(default_factory=list)

    @property
    def rollouts(self) -> int:
        return len(self.sessions) * self.siblings

    def session_of(self, rollout: int) -> Session:
        return self.sessions[rollout // self.siblings]

    def images_of(self, rollout: int) -> np.ndarray:
        """uint8 [T, H, W, 3]: the outputs of one rollout."""
        frames = []
        for record in self.turns:
            where = (record.rollout == rollout).nonzero()
            if len(where):
                frames.append(record.images[int(where[0, 0])])
        return np.stack(frames)


def chunks(sessions: Sequence[Session], ordinals: Sequence[int], siblings: int, groups: int) -> Iterator[Chunk]:
    """`sessions` in chunks of at most `groups`."""
    for i in range(0, len(sessions), groups):
        yield Chunk(list(sessions[i : i + groups]), list(ordinals[i : i + groups]), siblings)


class Walk:
    """The context of a chunk, turn by turn. Rollout and training both move through sessions with exactly these calls,
    in these batches, so that a replay sees the numbers of the rollout."""

    def __init__(self, policy: Policy, chunk: Chunk) -> None:
        self.policy = policy
        self.chunk = chunk
        self.rollout = torch.arange(chunk.rollouts)
        self._context: Any = policy.encode(np.stack([s.image for s in chunk.sessions]))
        self._expanded = False

    def _active(self, turn: int) -> Tensor:
        lengths = torch.tensor([len(s.turns) for s in self.chunk.sessions]).repeat_interleave(self.chunk.siblings)
        return lengths[self.rollout] > turn

    def advance(self, turn: int, images: np.ndarray) -> None:
        """Reads the outputs of turn - 1 and drops the rollouts whose session has no turn `turn`."""
        context = self.policy.append(self._context, images)
        keep = self._active(turn)
        if not bool(keep.all()):
            context = self.policy.select(context, keep.nonzero()[:, 0])
            self.rollout = self.rollout[keep]
        self._context = context

    @property
    def context(self) -> Any:
        """The context of all live rollouts (before turn 1's instruction: of the sessions)."""
        return self._context

    def instruct(self, text: Sequence[str]) -> Any:
        """Adds every live rollout's instruction; on the first turn siblings agree, so it is read once a session."""
        if not self._expanded:
            siblings = self.chunk.siblings
            context = self.policy.instruct(self._context, text[::siblings])
            groups = torch.arange(len(self.chunk.sessions))
            self._context = self.policy.select(context, groups.repeat_interleave(siblings))
            self._expanded = True
        else:
            self._context = self.policy.instruct(self._context, text)
        return self._context


@dataclass(frozen=True)
class Seeds:
    """Seeds of a chunk's randomness, all derived from the run's seed and the session's place in the stream."""

    run: int
    purpose: str

    def initial(self, chunk: Chunk, rollouts: Tensor, turn: int) -> Tensor:
        """Initial noise: shared by siblings."""
        return self._tensor(chunk, rollouts, lambda o, _: (self.run, self.purpose, "initial", o, turn))

    def window(self, chunk: Chunk, rollouts: Tensor, turn: int) -> Tensor:
        """Noise of the SDE steps: each sibling its own."""
        return self._tensor(chunk, rollouts, lambda o, i: (self.run, self.purpose, "window", o, i, turn))

    def text(self, chunk: Chunk, rollouts: Tensor, turn: int) -> Tensor:
        return self._tensor(chunk, rollouts, lambda o, i: (self.run, self.purpose, "text", o, i, turn))

    def start(self, chunk: Chunk, rollouts: Tensor, turn: int, choices: int) -> Tensor:
        """Window starts int64 [M], one per group and turn, in [0, choices)."""
        seeds = self._tensor(chunk, rollouts, lambda o, _: (self.run, self.purpose, "start", o, turn))
        return (seeds & 0xFFFFFFFF) % choices

    @staticmethod
    def _tensor(chunk: Chunk, rollouts: Tensor, parts: Any) -> Tensor:
        g = chunk.siblings
        return seed_tensor([derive_seed(*parts(chunk.ordinals[i // g], i % g)) for i in rollouts.tolist()])


@torch.no_grad()
def rollout_chunk(
    policy: Policy,
    chunk: Chunk,
    sampler: Sampler,
    seeds: Seeds,
    options: PolicyConfig,
    *,
    greedy: bool = False,
    keep_velocity: bool = False,
) -> Chunk:
    """Fills `chunk.turns`. greedy: intents by argmax (evaluation). Returns the chunk."""
    device = device_of(policy.module)
    sampler = sampler.to(device)
    walk = Walk(policy, chunk)
    chunk.turns = []
    for turn in range(max(len(s.turns) for s in chunk.sessions)):
        if turn:
            walk.advance(turn, chunk.turns[-1].images)
        rollouts = walk.rollout
        raw = [[u.instruction for u in chunk.session_of(i).turns[: turn + 1]] for i in rollouts.tolist()]
        intents: list[Intent | None] = [None] * len(raw)
        if turn and options.intent and policy.writes_text:
            text_seeds = None if greedy else seeds.text(chunk, rollouts, turn).to(device)
            sampled = policy.intend(
                walk.context,
                [r[:-1] for r in raw],
                [r[-1] for r in raw],
                text_seeds,
                temperature=options.temperature,
                max_tokens=options.intent_tokens,
            )
            intents = list(sampled) if sampled is not None else intents
        text = [i.text if i is not None and i.text else r[-1] for i, r in zip(intents, raw, strict=True)]
        context = walk.instruct(text)
        chunk.turns.append(
            _denoise(policy, chunk, rollouts, turn, context, sampler, seeds, text, intents, keep_velocity)
        )
    return chunk


def _denoise(
    policy: Policy,
    chunk: Chunk,
    rollouts: Tensor,
    turn: int,
    context: Any,
    sampler: Sampler,
    seeds: Seeds,
    text: list[str],
    intents: list[Intent | None],
    keep_velocity: bool,
) -> TurnRecord:
    device, m, w = sampler.table.device, len(rollouts), sampler.window
    noise_seeds = seeds.window(chunk, rollouts, turn).to(device)
    starts = seeds.start(chunk, rollouts, turn, sampler.last_start + 1)
    x = philox_normal(seeds.initial(chunk, rollouts, turn).to(device), INITIAL_STEP, policy.latent_shape)
    stored = torch.empty(m, w, *policy.latent_shape, device=device)
    following, velocity = torch.empty_like(stored), torch.empty_like(stored) if keep_velocity else None
    log_prob = torch.empty(m, w, device=device)
    step_index = torch.empty(m, w, dtype=torch.int64, device=device)
    for k in range(sampler.steps):
        row, inside = sampler.step_index(k, starts)
        v = policy.velocity(x, sampler.sigmas[k].expand(m), context)
        step = sde_step(x, v, sampler.table, row.to(device), noise_seeds)
        if bool(inside.any()):
            at = inside.nonzero()[:, 0]
            slot = (k - starts[at]).to(device)
            at = at.to(device)
            stored[at, slot], following[at, slot] = x[at], step.x_next[at]
            log_prob[at, slot], step_index[at, slot] = step.log_prob[at], row.to(device)[at]
            if velocity is not None:
                velocity[at, slot] = v[at].float()
        x = step.x_next
    sigma = sampler.sigmas[step_index % sampler.steps]
    return TurnRecord(
        rollouts, text, intents, stored, following, step_index, sigma, log_prob, policy.decode(x), velocity
    )
