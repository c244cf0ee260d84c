"""Group rollout over turns on the policy's own outputs, and the walk that rollout and training
share.

Every turn: (intent ->) instruction into the context (-> thought, into it, too) -> denoise behind it
-> decode -> the output into the context.
Only the steps of the SDE window are stored. Siblings share the source encoding, the first
instruction and, by default, each turn's initial noise; they differ in the noise of the window.
Until its windows open a group's first turn is the same for all siblings and is denoised once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from editr2.config import Config, PolicyConfig, RolloutConfig
from editr2.errors import NonFiniteError
from editr2.policies.base import (
    Intent,
    Policy,
    Questions,
    TextPolicy,
    ThinkingPolicy,
    at_size,
    device_of,
)
from editr2.policies.finite import LOOK_AT, read_turn
from editr2.rl.compiled_step import Stepped, capture_step
from editr2.rl.sampler import Sampler
from editr2.rl.seeds import derive_seed, seed_tensor
from editr2.sessions import Session
from editr2.sessions.buckets import Size
from editr2_kernels import INITIAL_STEP, philox_normal


@dataclass(frozen=True)
class Written:
    """What M rollouts were asked for at one place of a turn, and what they wrote there."""

    questions: Questions
    samples: list[Intent]

    def ids(self, at: Sequence[int]) -> list[tuple[int, ...]]:
        """The sampled tokens of some of them."""
        return [self.samples[i].ids for i in at]

    @property
    def all_ids(self) -> list[tuple[int, ...]]:
        return self.ids(range(len(self.samples)))

    @property
    def texts(self) -> list[str]:
        """What was read in the samples, nothing where nothing could be."""
        return [sample.text or "" for sample in self.samples]

    def select(self, at: Sequence[int]) -> Written:
        return Written(self.questions.select(at), [self.samples[i] for i in at])


@dataclass(frozen=True)
class Writing:
    """Something that policies write in a turn. seed: names the randomness of its tokens. tokens:
    at most so many. asked: whether a policy writes it at a turn (from 0)."""

    seed: str
    tokens: Callable[[PolicyConfig], int]
    asked: Callable[[Policy, PolicyConfig, int], bool]


WRITINGS: Mapping[str, Writing] = {
    "intent": Writing(
        "text",
        lambda options: options.intent_tokens,
        lambda policy, options, turn: bool(turn and options.intent and policy.writes_text),
    ),
    "thought": Writing(
        "thought",
        lambda options: options.thinking_tokens,
        lambda policy, options, turn: isinstance(policy, ThinkingPolicy) and policy.thinks,
    ),
}
"""By the kind of their questions, in the order of a turn: an intent is asked before the turn's
instruction, in whose place it stands, and a thought behind it (`Walk.follow`). Sampled, scored and
trained they are the same."""


@dataclass
class TurnRecord:
    """One turn of a chunk of rollouts; only rollouts whose session has this turn (M of them).

    rollout: int64 [M], position in the chunk. text: what the context got. written: what the policy
    wrote besides, by its kind (`WRITINGS`); nothing without text. x, x_next: [M, W, *latent] the
    window's transitions, in the storage dtype; step_index: int64 [M, W]; sigma: [M, W]; log_prob:
    [M, W]. x0: [M, *latent], the clean latents. images: uint8 [M, H, W, 3]. velocity: as x,
    combined, only when asked for. m_prev: as x, what the step before took for the clean image, only
    where the sampler is of second order.
    """

    rollout: Tensor
    text: list[str]
    written: Mapping[str, Written]
    x: Tensor
    x_next: Tensor
    step_index: Tensor
    sigma: Tensor
    log_prob: Tensor
    x0: Tensor
    images: np.ndarray
    velocity: Tensor | None = None
    m_prev: Tensor | None = None

    def sample(self, kind: str, at: int) -> Intent | None:
        """What a rollout of the record wrote of a kind; None where nobody did."""
        written = self.written.get(kind)
        return None if written is None else written.samples[at]


@dataclass
class Chunk:
    """Groups that go through the model together, all of one image size and with equally many
    references. ordinals: the sessions' places in the run's stream (seed material). places: those
    among the sessions that were laid out in chunks together, none where these are all."""

    sessions: list[Session]
    ordinals: list[int]
    siblings: int
    turns: list[TurnRecord] = field(default_factory=list)
    places: list[int] | None = None

    @property
    def rollouts(self) -> int:
        return len(self.sessions) * self.siblings

    @property
    def image_size(self) -> Size:
        return self.sessions[0].image_size

    @property
    def references(self) -> list[np.ndarray]:
        """uint8 [groups, H, W, 3] each: the first further image of every session, and so on."""
        beside = [session.reference_pixels() for session in self.sessions]
        return [np.stack(images) for images in zip(*beside, strict=True)]

    @property
    def rows(self) -> Tensor:
        """int64 [rollouts]: each one's place among the rollouts of all chunks, in the order of
        their sessions."""
        places = range(len(self.sessions)) if self.places is None else self.places
        first = torch.tensor(list(places), dtype=torch.int64) * self.siblings
        return (first[:, None] + torch.arange(self.siblings)).flatten()

    def session_of(self, rollout: int) -> Session:
        return self.sessions[rollout // self.siblings]

    @property
    def lengths(self) -> Tensor:
        """int64 [rollouts]: the turns that each was rolled out for."""
        found = torch.zeros(self.rollouts, dtype=torch.int64)
        for turn, record in enumerate(self.turns, 1):
            found[record.rollout] = turn
        return found

    def left_out(self, turn: int) -> Tensor:
        """bool [rollouts]: whose session has a turn that it was not rolled out for."""
        there = torch.tensor([len(s.turns) > turn for s in self.sessions])
        return there.repeat_interleave(self.siblings) & (self.lengths <= turn)

    def images_of(self, rollout: int) -> np.ndarray:
        """uint8 [T, H, W, 3]: the outputs of one rollout."""
        frames = []
        for record in self.turns:
            where = (record.rollout == rollout).nonzero()
            if len(where):
                frames.append(record.images[int(where[0, 0])])
        return np.stack(frames)


def chunks(
    sessions: Sequence[Session], ordinals: Sequence[int], siblings: int, groups: int
) -> Iterator[Chunk]:
    """`sessions` in chunks of at most `groups` of one image size and with equally many references:
    kind by kind in the order in which they first come. Numbers do not depend on it: seeds follow
    from ordinals, and whoever puts chunks together goes by `Chunk.rows`."""
    alike: dict[tuple[Size, int], list[int]] = {}
    for place, session in enumerate(sessions):
        kind = (session.image_size, len(session.references))
        alike.setdefault(kind, []).append(place)
    for places in alike.values():
        for i in range(0, len(places), groups):
            at = places[i : i + groups]
            yield Chunk([sessions[n] for n in at], [ordinals[n] for n in at], siblings, places=at)


class Walk:
    """The context of a chunk, turn by turn. Rollout and training both move through sessions with
    exactly these calls, so that a replay sees the numbers of the rollout; training drops the
    rollouts that it does not need."""

    def __init__(self, policy: Policy, chunk: Chunk) -> None:
        self.policy = policy
        self.chunk = chunk
        self.rollout = torch.arange(chunk.rollouts)
        beside = chunk.references
        self._context: Any = policy.encode(
            np.stack([s.image for s in chunk.sessions]), *([beside] if beside else [])
        )
        self._expanded = False

    def active(self, turn: int) -> Tensor:
        """bool: which of the live rollouts have a turn, as their sessions have it."""
        lengths = torch.tensor([len(s.turns) for s in self.chunk.sessions]).repeat_interleave(
            self.chunk.siblings
        )
        return lengths[self.rollout] > turn

    def advance(self, turn: int, images: np.ndarray) -> None:
        """Reads the outputs of turn - 1 and drops the rollouts whose session has no turn `turn`."""
        context = self.policy.append(self._context, images)
        keep = self.active(turn)
        if not bool(keep.all()):
            context = self.policy.select(context, keep.nonzero()[:, 0])
            self.rollout = self.rollout[keep]
        self._context = context

    def drop(self, keep: Tensor) -> None:
        """Leaves out the rollouts of the chunk (bool [rollouts]) that nobody asks about any
        more."""
        at = keep[self.rollout].nonzero()[:, 0]
        if len(at) < len(self.rollout):
            self._context = self.policy.select(self._context, at)
            self.rollout = self.rollout[at]

    @property
    def context(self) -> Any:
        """The context of all live rollouts (before turn 1's instruction: of the sessions)."""
        return self._context

    def instruct(self, text: Sequence[str]) -> Any:
        """Adds every live rollout's instruction; on the first turn siblings agree, so it is read
        once a session."""
        if not self._expanded:
            siblings = self.chunk.siblings
            context = self.policy.instruct(self._context, text[::siblings])
            groups = torch.arange(len(self.chunk.sessions))
            self._context = self.policy.select(context, groups.repeat_interleave(siblings))
            self._expanded = True
        else:
            self._context = self.policy.instruct(self._context, text)
        return self._context

    def consider(self, thoughts: Written) -> Any:
        """Adds every live rollout's thought, behind its instruction."""
        policy = cast(ThinkingPolicy, self.policy)
        self._context = policy.consider(self._context, thoughts.texts)
        return self._context

    def follow(self, record: TurnRecord, at: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """Instructs the live rollouts, which stand in a turn's record at these places, as the
        rollout did. The context behind all of it, and those on which was written, by kind."""
        asking = {"intent": self._context}
        context = asking["thought"] = self.instruct([record.text[i] for i in at])
        if (thoughts := record.written.get("thought")) is not None:
            context = self.consider(thoughts.select(at))
        return context, {kind: asking[kind] for kind in record.written}


RELEASED_RANKS = 24
"""The processes of Edit-R2's release (its config/grpo.py at 2dd266f: four machines, six GPUs
each)."""


@dataclass(frozen=True)
class Seeds:
    """Seeds of a chunk's randomness, all derived from the run's seed and the session's place in the
    stream."""

    run: int
    purpose: str

    def initial(self, chunk: Chunk, rollouts: Tensor, turn: int, shared: bool = True) -> Tensor:
        """Initial noise: of the group, or each sibling its own."""
        if shared:
            return self._tensor(
                chunk, rollouts, lambda o, _: (self.run, self.purpose, "initial", o, turn)
            )
        return self._tensor(
            chunk, rollouts, lambda o, i: (self.run, self.purpose, "initial", o, turn, i)
        )

    def window(self, chunk: Chunk, rollouts: Tensor, turn: int) -> Tensor:
        """Noise of the SDE steps: each sibling its own."""
        return self._tensor(
            chunk, rollouts, lambda o, i: (self.run, self.purpose, "window", o, i, turn)
        )

    def text(self, chunk: Chunk, rollouts: Tensor, turn: int, kind: str = "intent") -> Tensor:
        """Of the tokens of a kind of writing: each sibling its own."""
        name = WRITINGS[kind].seed
        return self._tensor(
            chunk, rollouts, lambda o, i: (self.run, self.purpose, name, o, i, turn)
        )

    def start(self, chunk: Chunk, rollouts: Tensor, turn: int, choices: int) -> Tensor:
        """Window starts int64 [M], one per group and turn, in [0, choices)."""
        seeds = self._tensor(
            chunk, rollouts, lambda o, _: (self.run, self.purpose, "start", o, turn)
        )
        return (seeds & 0xFFFFFFFF) % choices

    def rank_start(self, chunk: Chunk, rollouts: Tensor, turn: int, choices: int) -> Tensor:
        """The same as Edit-R2's release has them, whatever the turn. It deals the rollouts of an
        iteration out to `RELEASED_RANKS` processes, and each of these seeds Python's generator with
        its rank before every image, so that its starts are all one."""
        seeds = self._tensor(chunk, rollouts, lambda o, i: (self.run, self.purpose, "rank", o, i))
        by_rank = [random.Random(rank).randrange(choices) for rank in range(RELEASED_RANKS)]
        return torch.tensor(by_rank)[(seeds & 0xFFFFFFFF) % RELEASED_RANKS]

    def noised(self, chunk: Chunk, rollouts: Tensor, turn: int, update: int) -> Tensor:
        """Noise and noise levels at which NFT compares velocities."""
        return self._tensor(
            chunk, rollouts, lambda o, i: (self.run, self.purpose, "noised", o, i, turn, update)
        )

    @staticmethod
    def _tensor(chunk: Chunk, rollouts: Tensor, parts: Any) -> Tensor:
        g = chunk.siblings
        return seed_tensor(
            [derive_seed(*parts(chunk.ordinals[i // g], i % g)) for i in rollouts.tolist()]
        )


def in_evaluation(config: Config) -> tuple[PolicyConfig, RolloutConfig]:
    """`options` and `rollout` of `rollout_chunk` wherever a policy is at work and nothing learns:
    noise is shared (there is one rollout a session), and intents may be longer than in training."""
    tokens = config.eval.intent_tokens or config.policy.intent_tokens
    options = replace(config.policy, intent_tokens=tokens)
    return options, RolloutConfig(store_dtype=config.rollout.store_dtype)


@torch.no_grad()
def rollout_chunk(
    policy: Policy,
    chunk: Chunk,
    sampler: Sampler,
    seeds: Seeds,
    options: PolicyConfig,
    *,
    rollout: RolloutConfig | None = None,
    greedy: bool = False,
    keep_velocity: bool = False,
    decoded: Callable[[Chunk, int], None] | None = None,
    goes_on: Callable[[Chunk, int], Tensor] | None = None,
    reads: Callable[[Chunk, int], np.ndarray] | None = None,
) -> Chunk:
    """Fills `chunk.turns`. rollout: shared noise and storage dtype (default: shared, fp32). greedy:
    text by argmax (evaluation). policy, sampler: of any size; their views at the chunk's are
    taken. decoded: called with the chunk and a turn once its images are
    there. goes_on: asked the same before the turn behind it, bool [rollouts]: who is rolled out
    further. reads: asked the same, then: uint8 [M, H, W, 3], what that turn reads in place of the
    outputs, for the M rollouts of the record. Returns the chunk."""
    device, size = device_of(policy.module), chunk.image_size
    policy, sampler = at_size(policy, size), sampler.of(size).to(device)
    walk = Walk(policy, chunk)
    chunk.turns = []
    for turn in range(max(len(s.turns) for s in chunk.sessions)):
        if turn and not _advanced(walk, turn, goes_on, reads):
            break
        record = rollout_turn(
            walk,
            turn,
            sampler,
            seeds,
            options,
            rollout=rollout,
            greedy=greedy,
            keep_velocity=keep_velocity,
        )
        chunk.turns.append(record)
        if decoded is not None:
            decoded(chunk, turn)
    return chunk


@torch.no_grad()
def rollout_turn(
    walk: Walk,
    turn: int,
    sampler: Sampler,
    seeds: Seeds,
    options: PolicyConfig,
    *,
    rollout: RolloutConfig | None = None,
    greedy: bool = False,
    keep_velocity: bool = False,
) -> TurnRecord:
    """One turn of a walk whose context has what is edited. sampler: of that size, on the device.
    The others as for `rollout_chunk`."""
    policy, chunk, rollouts = walk.policy, walk.chunk, walk.rollout
    writes = _Writer(walk, turn, seeds, options, greedy)
    text = writes.instructions()
    context = walk.instruct(text)
    if thoughts := writes.asked("thought", context):
        context = walk.consider(thoughts)
    path, velocity = _denoise(
        policy,
        chunk,
        turn,
        context,
        sampler,
        seeds,
        rollouts,
        rollout or RolloutConfig(),
        keep_velocity,
        alike=not turn and thoughts is None,
    )
    images, bad = read_turn(policy, path["x0"], velocity)
    if bad is not None:
        at, what = bad
        raise _non_finite(chunk, turn, int(rollouts[at]), what, LOOK_AT[what])
    return TurnRecord(rollouts, text, writes.written, **path, images=images)


def _advanced(
    walk: Walk,
    turn: int,
    goes_on: Callable[[Chunk, int], Tensor] | None,
    reads: Callable[[Chunk, int], np.ndarray] | None,
) -> bool:
    """Takes whoever goes on to a turn, with the outputs of the one before in their context, or what
    is read in their place; whether anybody does."""
    chunk = walk.chunk
    images = chunk.turns[-1].images if reads is None else reads(chunk, turn - 1)
    if goes_on is not None:
        keep = goes_on(chunk, turn - 1)
        here = keep[walk.rollout]
        if not bool((here & walk.active(turn)).any()):
            return False
        images = images[here.numpy()]
        walk.drop(keep)
    walk.advance(turn, images)
    return True


class _Writer:
    """What a turn's live rollouts write. written: so far, by kind."""

    def __init__(
        self, walk: Walk, turn: int, seeds: Seeds, options: PolicyConfig, greedy: bool
    ) -> None:
        self.policy, self.walk, self.turn = walk.policy, walk, turn
        self.seeds, self.options, self.greedy = seeds, options, greedy
        self.sessions = [walk.chunk.session_of(i) for i in walk.rollout.tolist()]
        self.written: dict[str, Written] = {}

    def instructions(self) -> list[str]:
        """What the context gets as this turn's instruction: the raw one, or the intent that stands
        in for it."""
        raw = [session.turns[self.turn].instruction for session in self.sessions]
        intents = self.asked("intent", self.walk.context)
        if intents is None:
            return raw
        return [intent or said for intent, said in zip(intents.texts, raw, strict=True)]

    def asked(self, kind: str, context: Any) -> Written | None:
        """What is written on a branch of the context, None where nothing of the kind is asked for
        at this turn."""
        writing, turn, chunk = WRITINGS[kind], self.turn, self.walk.chunk
        if not writing.asked(self.policy, self.options, turn):
            return None
        raw = [[u.instruction for u in session.turns[: turn + 1]] for session in self.sessions]
        questions = Questions(
            [instructions[:-1] for instructions in raw],
            [instructions[-1] for instructions in raw],
            [session.mode for session in self.sessions],
            kind,
        )
        seeds = None if self.greedy else self.seeds.text(chunk, self.walk.rollout, turn, kind)
        samples = cast(TextPolicy, self.policy).intend(
            context,
            questions,
            seeds if seeds is None else seeds.to(device_of(self.policy.module)),
            temperature=self.options.temperature,
            max_tokens=writing.tokens(self.options),
        )
        for i, sample in zip(self.walk.rollout.tolist(), samples, strict=True):
            if not all(map(math.isfinite, sample.log_prob)):
                raise _non_finite(chunk, turn, i, f"{kind}'s log-probs", "look at policy.weights")
        self.written[kind] = Written(questions, samples)
        return self.written[kind]


def _non_finite(chunk: Chunk, turn: int, rollout: int, what: str, advice: str) -> NonFiniteError:
    where = f"session {chunk.session_of(rollout).id!r}, turn {turn + 1}"
    return NonFiniteError(f"{where}: {what}: NaN or infinite (accepted: finite numbers); {advice}")


def _denoise(
    policy: Policy,
    chunk: Chunk,
    turn: int,
    context: Any,
    sampler: Sampler,
    seeds: Seeds,
    rollouts: Tensor,
    options: RolloutConfig,
    keep_velocity: bool,
    *,
    alike: bool,
) -> tuple[dict[str, Any], Tensor]:
    """The fields of a `TurnRecord` that one turn's denoising gives, and the sum of its velocities'
    `witness`, [M]. alike: siblings have equal contexts.

    On the first turn siblings with common initial noise, unless each has a thought of its own,
    agree in everything until their windows open: up to there only one of each group is denoised,
    the first of those that open last, and copied to each other one when its own opens. Who is
    denoised when is known before the first step, and reaches the device at once.
    """
    device, m = sampler.table.device, len(rollouts)
    dtype = torch.bfloat16 if options.store_dtype == "bfloat16" else torch.float32
    choices = sampler.last_start - sampler.first_start + 1
    drawn = seeds.rank_start if sampler.by_rank else seeds.start
    starts = sampler.first_start + drawn(chunk, rollouts, turn, choices)
    together = alike and options.shared_noise and sampler.window > 0
    leader = _last_to_open(starts, chunk.siblings) if together else rollouts
    plan = [_move(sampler, k, starts, leader, leader == rollouts) for k in range(sampler.steps)]
    window = seeds.window(chunk, rollouts, turn)
    initial = seeds.initial(chunk, rollouts, turn, options.shared_noise)
    noise_seeds, first, *indices = _in_one_copy(
        [window, initial, *(t for move in plan for t in move)], device
    )
    size = len(_Move._fields)
    moves = [_Move(*indices[i : i + size]) for i in range(0, len(indices), size)]
    x = philox_normal(first, INITIAL_STEP, policy.latent_shape).to(dtype)
    clean = torch.zeros_like(x) if sampler.second_order else None  # as the step before had it
    kept = _Window(x, sampler, keep_velocity)
    seen = torch.zeros(m, device=device)
    take = capture_step(policy, options.capture, device, keep_velocity)
    count, here = 0, context
    for k, move in enumerate(moves):
        if len(move.joining):
            for value in (x, clean) if clean is not None else (x,):
                value[move.joining] = value[move.leader]
        if len(move.live) != count:
            count = len(move.live)
            here = context if count == m else policy.select(context, plan[k].live)
        everyone = count == m
        x_live = x if everyone else x[move.live]
        before = clean if everyone or clean is None else clean[move.live]
        second = () if before is None else (before,)
        sigma, seed = sampler.sigmas[k].expand(count), noise_seeds[move.live]
        step = take(x_live, sigma, here, sampler.table, move.row, seed, *second)
        if len(move.inside):
            kept.store(move, x_live, before, step)
        if everyone:
            x, clean, seen = step.x_next, step.x0, seen + step.witness
        else:
            x[move.live] = step.x_next
            if clean is not None and step.x0 is not None:
                clean[move.live] = step.x0
            seen[move.live] += step.witness
    return {"x0": x, **kept.fields(sampler)}, seen


def _last_to_open(starts: Tensor, siblings: int) -> Tensor:
    """int64 [M]: of each rollout, the first of its group whose window opens last; of a first
    turn."""
    latest = starts.view(-1, siblings).argmax(1)
    return (torch.arange(len(latest)) * siblings + latest).repeat_interleave(siblings)


class _Window:
    """What is stored of the steps inside the window, [M, W, ...] each, as `TurnRecord` has it."""

    def __init__(self, x: Tensor, sampler: Sampler, keep_velocity: bool) -> None:
        shape = (len(x), sampler.window)
        self.x = torch.empty(*shape, *x.shape[1:], device=x.device, dtype=x.dtype)
        self.x_next = torch.empty_like(self.x)
        self.velocity = torch.empty_like(self.x) if keep_velocity else None
        self.m_prev = torch.empty_like(self.x) if sampler.second_order else None
        self.log_prob = torch.empty(*shape, device=x.device)
        self.step_index = torch.empty(*shape, dtype=torch.int64, device=x.device)

    def store(self, move: _Move, x: Tensor, m_prev: Tensor | None, step: Stepped) -> None:
        """x, m_prev: what the step was taken from."""
        place, inside = (move.at, move.slot), move.inside
        self.x[place], self.x_next[place] = x[inside], step.x_next[inside]
        self.log_prob[place], self.step_index[place] = step.log_prob[inside], move.row[inside]
        if self.velocity is not None and step.velocity is not None:
            self.velocity[place] = step.velocity[inside].to(self.velocity.dtype)
        if self.m_prev is not None and m_prev is not None:
            self.m_prev[place] = m_prev[inside]

    def fields(self, sampler: Sampler) -> dict[str, Tensor | None]:
        return {**vars(self), "sigma": sampler.sigmas[self.step_index % sampler.steps]}


class _Move(NamedTuple):
    """Which rollouts one denoising step touches, as int64 indices.

    joining, leader: those whose window opens, and whose latents they have so far. live: those that
    are denoised, and row: their rows of the transition table. inside: which of the live ones are
    inside their window; at, slot: where these are stored.
    """

    joining: Tensor
    leader: Tensor
    live: Tensor
    row: Tensor
    inside: Tensor
    at: Tensor
    slot: Tensor


def _move(sampler: Sampler, k: int, starts: Tensor, leader: Tensor, leads: Tensor) -> _Move:
    row, inside = sampler.step_index(k, starts)
    # Positions equal rollouts on the first turn, where alone a leader is somebody else.
    joining = (~leads & (starts == k) & (k > 0)).nonzero()[:, 0]
    live = (leads | (starts <= k)).nonzero()[:, 0]
    picked = inside[live].nonzero()[:, 0]  # whoever is inside its window is live
    at = live[picked]
    return _Move(joining, leader[joining], live, row[live], picked, at, k - starts[at])


def _in_one_copy(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Vectors of one dtype on the device. A step that copied its own would wait for the device each
    time."""
    return torch.cat(list(parts)).to(device).split([len(part) for part in parts])
