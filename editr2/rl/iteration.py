"""One iteration, read top to bottom: sessions -> rollout -> rewards -> credit -> policy loss of
images and intents -> AdamW.

The five steps are `rollout` (which `judging` listens to), `rewards`, `credit`, `gradient` (which
asks `losses` and `replay`) and `step` here. One process or many (torchrun), the same numbers:
sessions, groups and noise follow from the run's seed and a session's place in the stream; every
process rolls out its part of the groups, scores are gathered so that credit sees all of them, and
gradients are summed once per optimiser step. The policy is not wrapped: groups need not divide
evenly and a session's context is built outside of autograd, so one explicit reduction is simpler
than a wrapper's hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editr2.config import Config, TrainConfig
from editr2.errors import NonFiniteError
from editr2.policies.finite import ACCEPTED, LARGEST, unusable
from editr2.policies.parts import part
from editr2.policies.sharding import clip
from editr2.policies.weights import exchanged, trainable
from editr2.rewards.base import GivenReward, check_failures, merge_scores
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rl.credit import assign_credit
from editr2.rl.gradient import Batch, accumulate_gradient, remember_old
from editr2.rl.judging import Judged, pool_of
from editr2.rl.losses import LOSSES
from editr2.rl.metrics import Clock, train_row
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import Sampler
from editr2.rl.state import State
from editr2.run.processes import Processes
from editr2.sessions import Session
from editr2.sessions.source import SessionSource


@dataclass
class Rolled:
    """A rollout of this process on its way to credit. of: the iteration it belongs to. batch: its
    chunks; advantage and mask follow from the scores. ahead: it was made before the update of the
    iteration before, so the weights that learn from it are one update further on."""

    of: int
    batch: Batch
    judged: Judged
    clock: Clock
    ahead: bool


def iteration(
    config: Config,
    state: State,
    source: SessionSource,
    reward: GivenReward | Panel | Pool,
    sampler: Sampler,
    processes: Processes,
    before_update: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One rollout and its updates; returns the metrics row. before_update: called before the first
    weight changes.

    Raises `RewardFailure` for too many failed scores, `RatioError` for a ratio that is not 1
    on-policy, and `NonFiniteError`; no weight has changed then, or the last step's is not saved.
    """
    rolled = roll_out(config, state, source, pool_of(reward), sampler, processes)
    return learn(config, state, source, rolled, processes, before_update)


def roll_out(
    config: Config,
    state: State,
    source: SessionSource,
    pool: Pool,
    sampler: Sampler,
    processes: Processes,
    *,
    ahead: int = 0,
) -> Rolled:
    """The rollout of an iteration, which is judged as it goes. ahead: iterations from the one that
    the state stands at."""
    r, t, clock = config.rollout, config.train, Clock()
    of = state.iteration + ahead
    loss, sampler = LOSSES[t.loss], sampler.at(of)
    ordinals = range(of * r.sessions, (of + 1) * r.sessions)
    mine, seeds = processes.share(r.sessions), Seeds(config.seed, "train")
    with clock.phase("rollout"), exchanged(state.policy.module, state.old):
        sessions = [source[ordinal] for ordinal in ordinals[mine]]
        prunes = r.prune != "off"
        judging = pool.judging(turnwise=prunes, purpose="train", iteration=of)
        judged = Judged(judging, seeds, mine.start * r.siblings)
        done = []
        for chunk in chunks(sessions, ordinals[mine], r.siblings, r.groups_per_batch):
            rollout_chunk(
                state.policy,
                chunk,
                sampler,
                seeds,
                config.policy,
                rollout=r,
                keep_velocity=loss.keeps_velocity(t),
                decoded=judged.decoded,
                goes_on=(lambda chunk, _: judged.goes_on(chunk, r.prune)) if prunes else None,
            )
            judged.done(chunk)
            done.append(chunk)
    everyone = torch.ones(sum(chunk.rollouts for chunk in done), max(map(_turns, sessions)))
    batch = Batch(
        done,
        everyone,
        everyone.bool(),
        trained=everyone.numel(),
        sampler=sampler,
        seeds=seeds,
        policy=config.policy,
        rollout=r,
        stale=ahead > 0,
    )
    if ahead:
        with clock.phase("loss"):
            remember_old(t, state, batch, processes)
    processes.lend()
    return Rolled(of, batch, judged, clock, ahead > 0)


def learn(
    config: Config,
    state: State,
    source: SessionSource,
    rolled: Rolled,
    processes: Processes,
    before_update: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The scores of a rollout, once they are all there, its credit and its updates."""
    r, t, clock, batch = config.rollout, config.train, rolled.clock, rolled.batch
    loss, mine = LOSSES[t.loss], processes.share(r.sessions)

    with clock.phase("reward"):
        ordinals = range(rolled.of * r.sessions, (rolled.of + 1) * r.sessions)
        turns = max(_turns(source[ordinal]) for ordinal in ordinals)
        scores = merge_scores(processes.gather([rolled.judged.scores(turns)]))
        check_failures(scores, t.max_failed_scores)

    with clock.phase("credit"):
        group = torch.arange(r.sessions).repeat_interleave(r.siblings)
        credit = assign_credit(scores, group, config.credit)
        advantage, mask = loss.prefer(credit.advantage, credit.mask, r.siblings)
        local = slice(mine.start * r.siblings, mine.stop * r.siblings)
        batch = replace(
            batch, advantage=advantage[local], mask=mask[local], trained=int(mask.sum())
        )

    totals: list[dict[str, float]] = []
    for update in range(t.updates):
        for minibatch in range(t.minibatches):
            with clock.phase("loss"):
                totals.append(accumulate_gradient(t, state, batch, update, minibatch, processes))
            if before_update is not None:
                before_update()
            with clock.phase("optimiser"):
                totals[-1]["grad_norm"] = step(t, state, processes)
                state.step_copies(t, iteration_done=False)
    row = train_row(
        state.iteration,
        t,
        r.sessions,
        config.credit.weights,
        scores,
        credit,
        batch.chunks,
        totals,
        clock,
        processes,
    )
    if r.prune != "off":
        row["pruned_turns"] = int(scores.pruned.sum())
    state.step_copies(t, iteration_done=True)
    return row


def _turns(session: Session) -> int:
    return len(session.turns)


def step(t: TrainConfig, state: State, processes: Processes) -> float:
    """Sums gradients over processes, clips, steps, and returns the gradient's norm before it was
    clipped; refuses a non-finite gradient before anything is changed."""
    processes.lend()  # others may still have backwards to come
    live, stepped = trainable(state.policy.module), state.stepped()

    def found(tensors: Iterable[tuple[str, Tensor]], limit: float) -> str | None:
        name = unusable(tensors, limit)  # of parts, every process sees its own
        return processes.first(name) if state.parts else name

    parameters = list(stepped.values())
    # A weight without gradient (nobody's advantage pulled at it) steps as one with gradient 0, on
    # one process or many.
    gradients = [
        torch.zeros_like(own) if p.grad is None else part(p.grad)
        for p, own in zip(live.values(), parameters, strict=True)
    ]
    if processes.count > 1 and not state.parts:  # those of shared weights were summed as they came
        flat = processes.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        pieces = flat.split([p.numel() for p in parameters])
        gradients = [g.view_as(p) for p, g in zip(parameters, pieces, strict=True)]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * _rate(t, state.iteration)
        if not group["lr"] <= LARGEST:  # AdamW would stop halfway, or make every weight NaN
            raise NonFiniteError(
                f"iteration {state.iteration}: train.lr: {group['lr']:g} ({ACCEPTED})"
            )
    if state.parts:
        norm = clip(parameters, next(iter(live.values())), t.grad_norm, processes)
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, t.grad_norm)
    if not bool(torch.isfinite(norm)):
        name = found(zip(stepped, gradients, strict=True), torch.inf)
        what = f"first non-finite tensor: {name}" if name else "its inputs are finite"
        raise NonFiniteError(
            f"gradient at iteration {state.iteration}: {what}; nothing was updated"
        )
    state.optimizer.step()
    if name := found(stepped.items(), LARGEST):
        raise NonFiniteError(
            f"iteration {state.iteration}, after the optimiser's step: {name}: NaN, infinite or "
            f"too large ({ACCEPTED}; train.lr is {t.lr:g}); it was not saved, and what was saved "
            f"before stands"
        )
    state.drop_gradients()
    return float(norm)


def _rate(t: TrainConfig, iteration: int) -> float:
    """The share of its learning rate that an iteration steps with: rising over the warm-up, and
    falling linearly to `lr_decay`."""
    progress = iteration / max(1, t.iterations - 1)
    return (1 - (1 - t.lr_decay) * progress) * min(1.0, (iteration + 1) / (t.warmup + 1))
