"""One multi-turn RL iteration the way published trainers execute it, as a plain script: baseline
`peer-plan`.

Every habit below costs time and changes no result, and each can be exchanged for ours alone, so
that a waterfall over them says which gain comes from what (PEERS: execution habits; METHODS:
Edit-R2's iteration):

    batched   siblings go through the model together; else one sample at a time, as the released
              BAGEL trainers do
    shared    siblings share the source's encoding and the first instruction; else each encodes
              for itself
    kept      a turn extends the context of the turn before; else every turn, trained step and
              intent reads the whole session again
    old       log-probs of the sampling policy come from the rollout (of the intents from the
              loss's own forward); else from a separate pass
    skipped   turns without advantage are left out; else they are computed and multiplied by zero
    fused     our operators; else `bench.eager_operators`

Always as the peers do: latents and log-probs of all steps are stored, one forward and backward for
each trained step, no packed forward, and no first-turn steps shared before the window. Only full
sessions of equally many turns, GRPO without reference, one update.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.eager_operators import eager_operators
from editr2.config import Config
from editr2.policies.base import Questions, TextPolicy
from editr2.rewards.base import Reward
from editr2.rl.compiled_step import denoising_step
from editr2.rl.credit import assign_credit
from editr2.rl.judging import judge
from editr2.rl.losses import LOSSES, Beside, Given, Samples, text_term
from editr2.rl.replay import Answers
from editr2.rl.rollout import Chunk, Seeds, TurnRecord
from editr2.rl.sampler import Sampler
from editr2.sessions import Session
from editr2_kernels import INITIAL_STEP, GroupAdvantage, philox_normal

GRPO = LOSSES["grpo"]


@dataclass(frozen=True)
class Habits:
    """True is ours, False the peers'; the module docstring says what each is."""

    batched: bool = False
    shared: bool = False
    kept: bool = False
    old: bool = False
    skipped: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        if self.shared and not self.batched:
            raise ValueError(
                "shared: True (accepted with batched: False: False; one sample has no siblings)"
            )


@dataclass
class _Turn:
    """What one block of rollouts leaves of a turn: latents of all steps [steps + 1, B, *latent],
    log-probs and table rows [steps, B]."""

    text: list[str]
    questions: Questions | None
    intents: list | None
    latents: Tensor
    log_prob: Tensor
    rows: Tensor
    starts: Tensor
    images: np.ndarray


class PeerPlan:
    """`iterate` leaves the gradient on the policy's weights; `seconds` holds the phases of the
    latest one."""

    def __init__(
        self,
        habits: Habits,
        config: Config,
        policy: TextPolicy,
        sessions: Sequence[Session],
        sampler: Sampler,
    ) -> None:
        self.habits, self.config, self.policy, self.sampler = habits, config, policy, sampler
        r = config.rollout
        self.whole = Chunk(list(sessions), list(range(len(sessions))), r.siblings)
        self.turns = len(sessions[0].turns)
        assert all(len(s.turns) == self.turns for s in sessions)
        assert (
            config.train.loss == "grpo"
            and config.train.kl_weight == 0
            and config.train.updates == 1
        )
        self.seeds = Seeds(config.seed, "train")
        size = r.siblings * r.groups_per_batch if habits.batched else 1
        self.blocks = torch.arange(self.whole.rollouts).split(size)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def iterate(self, reward: Reward) -> tuple[float, GroupAdvantage]:
        """(loss, credit)."""
        self.seconds = defaultdict(float)
        with nullcontext() if self.habits.fused else eager_operators(self.config.rollout):
            with self._phase("rollout"), torch.no_grad():
                done = [self._roll_out(block) for block in self.blocks]
            self._record(done)
            with self._phase("reward"):
                scores = judge(reward, [self.whole], self.turns)
            with self._phase("credit"):
                group = torch.arange(len(self.whole.sessions)).repeat_interleave(
                    self.whole.siblings
                )
                credit = assign_credit(scores, group, self.config.credit)
            olds = [self._old(block, turns) for block, turns in zip(self.blocks, done, strict=True)]
            with self._phase("loss"):
                parts = zip(self.blocks, done, olds, strict=True)
                return sum(self._loss(*part, credit) for part in parts), credit

    # -------------------------------------------------------------------------------------- context

    def _sources(self, block: Tensor) -> np.ndarray:
        return np.stack([self.whole.session_of(i).image for i in block.tolist()])

    def _opened(self, block: Tensor, text: Sequence[str]) -> tuple[Any, Any]:
        """The first turn's contexts before and behind its instruction."""
        policy, g = self.policy, self.whole.siblings
        if not self.habits.shared:
            before = policy.encode(self._sources(block))
            return before, policy.instruct(before, text)
        groups = torch.arange(len(block) // g).repeat_interleave(g)
        before = policy.encode(self._sources(block[::g]))
        return policy.select(before, groups), policy.select(
            policy.instruct(before, text[::g]), groups
        )

    def _context(
        self, block: Tensor, turn: int, past: Sequence[_Turn], text: Sequence[str] | None
    ) -> tuple[Any, Any]:
        """The contexts of a turn before and behind its instruction, read from the source on."""
        before: Any = None
        behind: Any = None
        for t in range(turn + 1):
            said = past[t].text if t < turn else text
            if t:
                before = self.policy.append(behind, past[t - 1].images)
            elif said is not None:
                before, behind = self._opened(block, said)
                continue
            behind = None if said is None else self.policy.instruct(before, said)
        return before, behind

    # -------------------------------------------------------------------------------------- rollout

    def _roll_out(self, block: Tensor) -> list[_Turn]:
        done: list[_Turn] = []
        behind: Any = None
        for turn in range(self.turns):
            raw = [
                [u.instruction for u in self.whole.session_of(i).turns[: turn + 1]]
                for i in block.tolist()
            ]
            text, questions, intents = [r[-1] for r in raw], None, None
            before = None
            if turn and self.habits.kept:
                before = self.policy.append(behind, done[-1].images)
            if turn and self.config.policy.intent:
                asking = before if before is not None else self._context(block, turn, done, None)[0]
                modes = [self.whole.session_of(i).mode for i in block.tolist()]
                questions = Questions([r[:-1] for r in raw], text, modes)
                intents = self.policy.intend(
                    asking,
                    questions,
                    self.seeds.text(self.whole, block, turn),
                    temperature=self.config.policy.temperature,
                    max_tokens=self.config.policy.intent_tokens,
                )
                text = [intent.text or said for intent, said in zip(intents, text, strict=True)]
            behind = (
                self.policy.instruct(before, text)
                if before is not None
                else self._context(block, turn, done, text)[1]
            )
            latents, log_prob, rows, starts = self._denoise(block, turn, behind)
            images = self.policy.decode(latents[-1].float())
            done.append(_Turn(text, questions, intents, latents, log_prob, rows, starts, images))
        return done

    def _denoise(
        self, block: Tensor, turn: int, context: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = self.sampler
        first = self.seeds.initial(self.whole, block, turn, self.config.rollout.shared_noise)
        seeds = self.seeds.window(self.whole, block, turn)
        starts = s.first_start + self.seeds.start(
            self.whole, block, turn, s.last_start - s.first_start + 1
        )
        latents = [philox_normal(first, INITIAL_STEP, self.policy.latent_shape)]
        log_probs, rows = [], []
        for k in range(s.steps):
            row, _ = s.step_index(k, starts)
            sigma = s.sigmas[k].expand(len(block))
            step = denoising_step(
                self.policy, False, latents[-1], sigma, context, s.table, row, seeds
            )
            latents.append(step.x_next)
            log_probs.append(step.log_prob)
            rows.append(row)
        return torch.stack(latents), torch.stack(log_probs), torch.stack(rows), starts

    def _record(self, done: Sequence[Sequence[_Turn]]) -> None:
        """The rollout as the trainer keeps one: what rewards read, and a test compares."""
        self.whole.turns = []
        for turn in range(self.turns):
            parts = [block[turn] for block in done]
            places = [self._places(part) for part in parts]
            x, x_next, step_index, sigma, log_prob = (
                torch.cat(column) for column in zip(*places, strict=True)
            )
            self.whole.turns.append(
                TurnRecord(
                    torch.arange(self.whole.rollouts),
                    [text for part in parts for text in part.text],
                    {},
                    x,
                    x_next,
                    step_index,
                    sigma,
                    log_prob,
                    torch.cat([part.latents[-1] for part in parts]),
                    np.concatenate([part.images for part in parts]),
                )
            )

    def _places(self, turn: _Turn) -> tuple[Tensor, ...]:
        """The window's x, x_next [B, W, *latent], table rows, sigmas and log-probs [B, W]."""
        at = turn.starts[:, None] + torch.arange(self.sampler.window)
        here = torch.arange(len(turn.starts))[:, None]
        return (
            turn.latents[at, here],
            turn.latents[at + 1, here],
            turn.rows[at, here],
            self.sampler.sigmas[at],
            turn.log_prob[at, here],
        )

    # ------------------------------------------------------------------------------------- training

    def _reader(self, block: Tensor, done: Sequence[_Turn]) -> Any:
        """turn -> its contexts before and behind the instruction, without gradient: read anew at
        every call (the second only for images), or extended turn by turn."""
        kept: list[tuple[Any, Any]] = []

        def read(turn: int, images: bool = True) -> tuple[Any, Any]:
            with torch.no_grad():
                if not self.habits.kept:
                    return self._context(block, turn, done, done[turn].text if images else None)
                while len(kept) <= turn:
                    t = len(kept)
                    if t == 0:
                        kept.append(self._opened(block, done[0].text))
                    else:
                        before = self.policy.append(kept[-1][1], done[t - 1].images)
                        kept.append((before, self.policy.instruct(before, done[t].text)))
                return kept[turn]

        return read

    def _answer(self, context: Any, turn: _Turn, live: Tensor) -> Any:
        assert turn.questions is not None and turn.intents is not None
        picked = live.tolist()
        ids = [turn.intents[i].ids for i in picked]
        temperature = self.config.policy.temperature
        return self.policy.answer_log_prob(
            context, turn.questions.select(picked), ids, temperature=temperature
        )

    def _old(self, block: Tensor, done: Sequence[_Turn]) -> list[tuple[Tensor, Tensor | None]]:
        """Per turn the old log-probs of the window [B, W] and of the intents [B, L]."""
        if self.habits.old:
            return [(self._places(turn)[4], None) for turn in done]
        found: list[tuple[Tensor, Tensor | None]] = []
        with self._phase("old log-prob"), torch.no_grad():
            read = self._reader(block, done)
            for t, turn in enumerate(done):
                x, x_next, index, sigma, _ = self._places(turn)
                columns = []
                for q in range(self.sampler.window):
                    velocity = self.policy.velocity(x[:, q], sigma[:, q], read(t)[1])
                    rows = self._rows(x, x_next, index, sigma, q, None, None, None)
                    columns.append(GRPO.log_prob(rows, velocity, self.sampler))
                scores = None
                if turn.questions is not None:
                    scores = self._answer(
                        read(t, images=False)[0], turn, torch.arange(len(block))
                    ).log_prob
                found.append((torch.stack(columns, 1), scores))
        return found

    @staticmethod
    def _rows(
        x: Tensor, x_next: Tensor, index: Tensor, sigma: Tensor, q: int, a: Any, m: Any, old: Any
    ) -> Samples:
        return Samples(
            x[:, q],
            x_next[:, q],
            sigma[:, q],
            a,
            m,
            index[:, q],  # of no group: nothing here compares siblings
            index[:, q],
            None if old is None else old[:, q],
        )

    def _loss(
        self,
        block: Tensor,
        done: Sequence[_Turn],
        olds: Sequence[tuple[Tensor, Tensor | None]],
        credit: GroupAdvantage,
    ) -> float:
        """The block's share of the loss, its gradient added to the weights'."""
        t, w = self.config.train, self.sampler.window
        normalizer = max(1, int(credit.mask.sum())) * w
        text_weight = t.text_weight if t.text_weight is not None else 1 / w
        read, total = self._reader(block, done), 0.0
        for turn, (left, (old, old_text)) in enumerate(zip(done, olds, strict=True)):
            advantage, mask = credit.advantage[block, turn], credit.mask[block, turn]
            live = torch.arange(len(block))
            if self.habits.skipped:
                live = (mask & (advantage != 0)).nonzero()[:, 0]
                if not len(live):
                    continue
            x, x_next, index, sigma, _ = (value[live] for value in self._places(left))
            a, m, old = advantage[live], mask[live], old[live]
            for q in range(w):
                context = self._picked(read(turn)[1], live, len(block))
                rows = self._rows(x, x_next, index, sigma, q, a, m, old)
                velocity = self.policy.velocity(rows.x, rows.sigma, context)
                term = GRPO.term(
                    t, Given(rows, velocity, Beside(None, None), self.sampler, normalizer)
                )
                loss = term.loss
                loss.backward()
                total += loss.item()
            if left.questions is not None and text_weight > 0:
                scores = self._answer(
                    self._picked(read(turn, images=False)[0], live, len(block)), left, live
                )
                sampled = (
                    scores.log_prob.detach()
                    if old_text is None
                    else old_text[live, : scores.valid.shape[1]]
                )
                answers = Answers(turn, live, scores)
                loss = text_weight * text_term(t, answers, sampled, a, m, normalizer).loss
                if loss.requires_grad:  # nothing to score: every answer of the block is empty
                    loss.backward()
                    total += loss.item()
        return total

    def _picked(self, context: Any, live: Tensor, size: int) -> Any:
        return context if len(live) == size else self.policy.select(context, live)


def waterfall() -> dict[str, Habits]:
    """Plans by name, each with one habit more of ours than the one before."""
    names = {
        "peer-plan, sample by sample": None,
        "peer-plan": "batched",
        "+ siblings share the source": "shared",
        "+ context kept": "kept",
        "+ old log-probs of the rollout": "old",
        "+ turns without advantage skipped": "skipped",
        "+ fused operators": "fused",
    }
    plans, habits = {}, Habits()
    for name, habit in names.items():
        habits = dataclasses.replace(habits, **({habit: True} if habit else {}))
        plans[name] = habits
    return plans
