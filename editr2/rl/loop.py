"""The training loop: sessions -> rollout -> rewards -> credit -> policy loss of images and intents
-> AdamW.

One process or many (torchrun), the same numbers: sessions, groups and noise follow from the run's
seed and a session's place in the stream; every process rolls out its part of the groups, scores are
gathered so that credit sees all of them, and gradients are summed once per optimiser step. The
policy is not wrapped: groups need not divide evenly and a session's context is built outside of
autograd, so one explicit reduction is simpler than a wrapper's hooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from editr2.config import Config
from editr2.config.yaml import dump_yaml
from editr2.errors import CheckpointError, NonFiniteError
from editr2.policies.base import PackedPolicy, Policy
from editr2.policies.finite import ACCEPTED, LARGEST, check_weights, unusable
from editr2.policies.load import open_policy, rehearse_save
from editr2.policies.rules import check_config
from editr2.policies.sharding import place
from editr2.policies.weights import exchanged, trainable
from editr2.report import build_report
from editr2.rewards.adapt import CheckedReward, adapt
from editr2.rewards.base import GivenReward, check_failures, merge_scores
from editr2.rewards.load import load_reward
from editr2.rl.compiled_step import check_capture
from editr2.rl.credit import assign_credit, credit_notes
from editr2.rl.evaluate import comparison_row, draw_strips, evaluate, first_answer, judge
from editr2.rl.gradient import Batch, accumulate_gradient, first_non_finite
from editr2.rl.metrics import (
    Clock,
    comparison_line,
    evaluation_line,
    find_row,
    rows_due,
    rows_lost,
    start_row,
    train_row,
)
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.rules import check_run
from editr2.rl.sampler import Sampler, Schedule, eval_sampler, own_schedule, rollout_sampler
from editr2.rl.seeds import derive_seed
from editr2.rl.state import State, new_state
from editr2.run.checkpoint import capture_rng, generators_aside, latest_checkpoint, seed_generators
from editr2.run.identity import (
    Identity,
    check_insisted,
    differences,
    given_weights,
    identify,
    loaded_weights,
    named,
    provenance,
    told,
)
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes
from editr2.run.stop import NAMES, Stop, Stopped
from editr2.run.tracking import (
    MetricsLog,
    Progress,
    profile_table,
    read_metrics,
    rows_behind,
    write_whole,
)
from editr2.sessions.source import SessionSource, open_sessions


def train(
    config: Config,
    *,
    policy: Policy | None = None,
    reward: GivenReward | None = None,
    profile: bool = False,
    resume_anyway: Sequence[str] = (),
) -> Path:
    """Trains as configured and returns the run's folder; an unfinished run there is resumed.

    policy, reward: in place of the configured ones (API use; docs/rewards.md has the forms of a
    reward). resume_anyway: what may differ from the run that is resumed, by name: settings,
    sections of them, or sessions, heldout, weights and reward.

    Raises `UserError` subclasses for bad settings, data, checkpoints, a run of something else or
    one that is at work in the folder, too many failed scores, a ratio that is not 1 on-policy, or a
    NaN; and `Stopped`, once what is done is saved, after Ctrl-C, SIGTERM or SIGHUP.
    """
    config = check_config(config)
    check_insisted(resume_anyway)
    processes = open_processes()
    run = Path(config.out)
    with RunLock(run) as lock:
        processes.on_main(lambda: lock.take(make=False))  # before minutes of loading
        seed_generators(config.seed)
        asked = (
            load_reward(config.reward)
            if reward is None
            else adapt(reward, timeout=config.reward.timeout)
        )
        weights: dict[str, str] = {}
        if policy is None:
            policy = open_policy(config.policy, processes)
        else:
            check_weights(policy, f"policy: {type(policy).__name__}")
            weights = given_weights(policy) if processes.main else {}
            place(policy, config.policy.shard, processes)
        cannot_pack = None if isinstance(policy, PackedPolicy) else type(policy).__name__
        own = own_schedule(policy)
        check_run(config, asked.names, own, cannot_pack=cannot_pack, processes=processes.count)
        check_capture(config.rollout.capture, processes.device)
        source = open_sessions(config, policy)
        # Weights that are drawn have to be equal on all processes; what follows must not be, nor
        # depend on loading.
        seed_generators(derive_seed(config.seed, "rank", processes.index))
        state = new_state(config, policy)
        device = _device_name(processes.device)
        identity = processes.on_main(
            lambda: Identity(
                identify(config, source, weights or loaded_weights(config), asked),
                provenance(processes.count, device),
            )
        )
        processes.on_main(lambda: lock.take(make=True))
        start = _start(config, state, identity, processes, resume_anyway)
        start.notes[:0] = credit_notes(config.credit, asked.names)
        if lock.problem:
            start.notes.append(lock.problem)
        if not state.iteration:
            processes.on_main(lambda: rehearse_save(policy, run))
        return _Loop(config, state, source, asked, own, processes, identity, start).run(profile)


@dataclass
class _Start:
    """What was found in the run's folder. record: the rows of `metrics.jsonl` that stand. resumed:
    what the start row is to say about this process, None where it adds nothing. notes: lines for
    the terminal. saved: the iteration of
    the newest checkpoint, None where there is none."""

    record: list[dict[str, Any]]
    resumed: dict[str, Any] | None
    notes: list[str]
    saved: int | None


def _start(
    config: Config, state: State, identity: Identity, processes: Processes, insist: Sequence[str]
) -> _Start:
    """Takes on the newest checkpoint of the run's folder, if there is one, and reads the rows that
    belong to it.

    Raises CheckpointError for a checkpoint of something else, and for a record without its
    beginning.
    """
    run, notes, resumed = Path(config.out), [], None
    metrics, settings = run / "metrics.jsonl", run / "config.yaml"
    found = processes.on_main(lambda: latest_checkpoint(run / "checkpoints"))
    if found is not None:
        seen = state.load(found, config, identity, rank=processes.index, insist=insist)
        notes.append(f"resumed from {found} at iteration {state.iteration}")
        if seen.unknown:
            notes.append(
                "it was written without fingerprints: sessions, weights and reward are taken for "
                "the same"
            )
        if seen.told:
            notes.append(f"changed since {seen.date}, recorded: {'; '.join(seen.told)}")
        if seen.insisted:
            listed = "; ".join(
                f"{name}: {old} -> {new}" for name, (old, new) in seen.insisted.items()
            )
            notes.append(f"--resume-anyway, recorded: {listed}")
        if state.iteration < config.train.iterations or seen.told or seen.insisted:
            insisted = {name: list(values) for name, values in seen.insisted.items()}
            resumed = {"iteration": state.iteration, **identity.made, "insisted": insisted}
            identity.resumed.extend([*seen.resumed, resumed])

    def read() -> list[dict[str, Any]]:
        rows = read_metrics(metrics)[0] if metrics.exists() else []
        if found is None and rows:
            # Killed before its first checkpoint, and started again as something else: nothing of it
            # can be used.
            began = find_row(rows, "start", 0) or {}
            before = named({}, began.get("identity", {}).get("depends", {}))
            other = list(differences(before, named({}, identity.depends)))
            if settings.exists() and settings.read_text(encoding="utf-8") != dump_yaml(config):
                other.append("settings")
            if other:
                notes.append(
                    f"{run}: has no checkpoint yet and was of other {', '.join(other)}: it starts "
                    f"anew"
                )
                metrics.unlink()
                rows = []
        write_whole(settings, dump_yaml(config))
        return rows_behind(rows, state.iteration)

    record, notes = processes.on_main(lambda: (read(), notes))
    if found is None and record:
        began = (find_row(record, "start", 0) or {}).get("identity", {})
        if different := told(began, identity.made) if began else []:
            notes.append(f"changed since {began.get('date')}, recorded: {'; '.join(different)}")
        resumed = {"iteration": 0, **identity.made, "insisted": {}}
        identity.resumed.append(resumed)
    lost = rows_lost(record, state.iteration, config)
    if any(row in lost for row in ("start 0", "before 0")):
        raise CheckpointError(f"{metrics}: lacks the evaluation before training; was it removed?")
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        notes.append(f"{metrics}: lacks {', '.join(lost[:5])}{more}, which cannot be made any more")
    return _Start(record, resumed, notes, None if found is None else state.iteration)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Loop:
    """A run from where it stands to its end."""

    def __init__(
        self,
        config: Config,
        state: State,
        source: SessionSource,
        reward: CheckedReward,
        own: Schedule | None,
        processes: Processes,
        identity: Identity,
        start: _Start,
    ) -> None:
        self.config, self.state, self.source, self.reward = config, state, source, reward
        self.processes, self.identity, self.start = processes, identity, start
        self.record, self.saved, self.folder = start.record, start.saved, Path(config.out)
        self.sampler = rollout_sampler(config.rollout, own).to(processes.device)
        self.evaluation_sampler = eval_sampler(config, own).to(processes.device)

    def run(self, profile: bool) -> Path:
        config, state, processes = self.config, self.state, self.processes
        rows: list[dict[str, Any]] = []
        with (
            MetricsLog(
                self.folder / "metrics.jsonl",
                resume_iteration=state.iteration,
                resumed=self.start.resumed,
                enabled=processes.main,
            ) as self.log,
            Progress(
                config.train.iterations, start=state.iteration, enabled=processes.main
            ) as self.progress,
            Stop(processes, self._standing) as stop,
        ):
            for note in self.start.notes:
                self.progress.note(note)
            if self.source.heldout_is_training and not self.record:
                self.progress.note("no --data.heldout given: evaluating on the training sessions")
            try:
                stop.give_up()
                while True:
                    for name in rows_due(state.iteration, config):
                        self._make(name)
                    if state.iteration >= config.train.iterations:
                        break
                    if not rows:
                        first_answer(
                            self.reward,
                            self.source.heldout,
                            config.train.max_failed_scores,
                            processes,
                        )
                    stop.agree()
                    started = time.perf_counter()
                    row = _iteration(
                        config,
                        state,
                        self.source,
                        self.reward,
                        self.sampler,
                        processes,
                        stop.finish,
                    )
                    state.elapsed += time.perf_counter() - started
                    rows.append(row | {"elapsed_s": state.elapsed})
                    self._append(rows[-1])
                    self.progress.update(rows[-1])
                    state.iteration += 1
                    state.rng = capture_rng()
                    if (
                        state.iteration % config.checkpoint.every == 0
                        or state.iteration == config.train.iterations
                    ):
                        self._save()
                    stop.agree()
                    stop.give_up()
                if profile and rows:
                    self.progress.note(profile_table(rows))
                if processes.main:
                    with state.averaged() as averaged:
                        averaged.save(self.folder / "policy")
                    print(f"report: {build_report(self.folder)}")
            except Stopped as stopped:
                if stopped.at_once:
                    raise
                state.put_back()
                if state.iteration != (self.saved or 0):
                    self._save()
                raise Stopped(
                    stopped.signum,
                    f"stopped by {NAMES[Signals(stopped.signum)]}; {self._standing()}",
                ) from None
        processes.wait()
        return self.folder

    def _standing(self) -> str:
        """What is on the disk, and how to go on."""
        if self.saved is None:
            return (
                f"{self.folder} holds no finished iteration yet; the same command begins again "
                f"there"
            )
        done = f"{self.folder} is saved at iteration {self.saved} of {self.config.train.iterations}"
        what = (
            "goes on from there"
            if self.saved < self.config.train.iterations
            else "writes what is missing"
        )
        return f"{done}; the same command {what}"

    def _append(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        self.record.append(row)

    def _save(self) -> None:
        rng = self.processes.gather([self.state.rng])

        def write() -> None:
            self.log.sync()
            self.state.save(self.folder / "checkpoints", self.config, self.identity, rng)

        self.processes.on_main(write)
        self.saved = self.state.iteration

    def _make(self, name: str) -> None:
        """A row of `rows_due`, and the strips beside it, where they are missing."""
        at = self.state.iteration
        there = find_row(self.record, name, at)
        if name == "start":
            if there is None:
                self._append(
                    start_row(
                        self.config,
                        self.source,
                        self.processes,
                        self.state.policy,
                        self.reward.names,
                        self.identity,
                    )
                )
        elif name == "comparison":
            before, after = (
                find_row(self.record, which, k) for which, k in (("before", 0), ("after", at))
            )
            assert before is not None and after is not None  # due earlier, so made
            comparison = comparison_row(before, after)
            if there is None:
                self._append(comparison)
            self.progress.note(comparison_line(comparison))
        else:
            drawn = self.processes.on_main(
                lambda: (self.folder / "strips" / f"{name}.json").exists()
            )
            if there is None or (name != "during" and not drawn):
                self._evaluate(name, there)

    def _evaluate(self, name: str, row: dict[str, Any] | None) -> None:
        """The same weights score the same, whatever a reward drew before, and an evaluation leaves
        no trace."""
        config, processes = self.config, self.processes
        seed, made = derive_seed(0, "eval", processes.index), row is None
        if row is None:
            with generators_aside(seed), self.state.averaged() as averaged:
                found = evaluate(
                    averaged,
                    self.reward,
                    self.source.heldout,
                    self.evaluation_sampler,
                    config,
                    processes,
                )
            row = found.row(self.state.iteration, name)
        if name != "during":
            shown, strips = self.source.heldout[: config.eval.strips], self.folder / "strips"
            with generators_aside(seed), self.state.averaged() as averaged:
                draw_strips(
                    strips, name, averaged, self.reward, shown, self.sampler, config, processes
                )
        if made:
            self._append(row)
            kind = "training" if self.source.heldout_is_training else "held-out"
            self.progress.note(evaluation_line(row, kind))


def _iteration(
    config: Config,
    state: State,
    source: SessionSource,
    reward: CheckedReward,
    sampler: Sampler,
    processes: Processes,
    before_update: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One rollout and its updates; returns the metrics row. before_update: called before the first
    weight changes."""
    r, t, clock = config.rollout, config.train, Clock()
    ordinals = range(state.iteration * r.sessions, (state.iteration + 1) * r.sessions)
    mine = processes.share(r.sessions)
    seeds = Seeds(config.seed, "train")
    sampler = sampler.at(state.iteration)
    with clock.phase("rollout"), exchanged(state.policy.module, state.old):
        done = [
            rollout_chunk(
                state.policy, chunk, sampler, seeds, config.policy, rollout=r, keep_velocity=t.guard
            )
            for chunk in chunks(
                [source[o] for o in ordinals[mine]], ordinals[mine], r.siblings, r.groups_per_batch
            )
        ]
        processes.lend()
    with clock.phase("reward"):
        turns = max(len(source[o].turns) for o in ordinals)
        scores = merge_scores(processes.gather([judge(reward, done, turns)]))
        check_failures(scores, t.max_failed_scores)
    with clock.phase("credit"):
        group = torch.arange(r.sessions).repeat_interleave(r.siblings)
        credit = assign_credit(scores, group, config.credit)
        local = slice(mine.start * r.siblings, mine.stop * r.siblings)
        trained = int(credit.mask.sum())
    batch = Batch(done, credit.advantage[local], credit.mask[local], trained, sampler, seeds)
    totals: list[dict[str, float]] = []
    for update in range(t.updates):
        for minibatch in range(t.minibatches):
            with clock.phase("loss"):
                totals.append(
                    accumulate_gradient(config, state, batch, update, minibatch, processes)
                )
            if before_update is not None:
                before_update()
            with clock.phase("optimiser"):
                totals[-1]["grad_norm"] = _step(config, state, processes)
                state.step_copies(config, iteration_done=False)
    row = train_row(state.iteration, config, scores, credit, done, totals, clock, processes)
    state.step_copies(config, iteration_done=True)
    return row


def _step(config: Config, state: State, processes: Processes) -> float:
    """Sums gradients over processes, clips, steps; refuses a non-finite gradient before anything is
    changed."""
    parameters = list(trainable(state.policy.module).values())
    # A weight without gradient (nobody's advantage pulled at it) steps as one with gradient 0, on
    # one process or many.
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if processes.count > 1:
        flat = processes.sum(torch.cat([part.reshape(-1) for part in parts]))
        parts = [
            part.view_as(p)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True)
        ]
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part
    progress = state.iteration / max(1, config.train.iterations - 1)
    scale = (1 - (1 - config.train.lr_decay) * progress) * min(
        1.0, (state.iteration + 1) / (config.train.warmup + 1)
    )
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
        if not group["lr"] <= LARGEST:  # AdamW would stop halfway, or make every weight NaN
            raise NonFiniteError(
                f"iteration {state.iteration}: train.lr: {group['lr']:g} ({ACCEPTED})"
            )
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_norm)
    if not bool(torch.isfinite(norm)):
        named = {n: p.grad for n, p in state.policy.module.named_parameters() if p.grad is not None}
        raise NonFiniteError(
            f"gradient at iteration {state.iteration}: {first_non_finite(named)}; nothing was "
            f"updated"
        )
    state.optimizer.step()
    if name := unusable(trainable(state.policy.module).items()):
        raise NonFiniteError(
            f"iteration {state.iteration}, after the optimiser's step: {name}: NaN, infinite or "
            f"too large ({ACCEPTED}; train.lr is {config.train.lr:g}); it was not saved, and what "
            f"was saved before stands"
        )
    state.optimizer.zero_grad(set_to_none=True)
    return float(norm)
