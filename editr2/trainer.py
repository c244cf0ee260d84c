"""The training loop: sessions -> rollout -> rewards -> credit -> policy loss of images and intents -> AdamW.

One process or many (torchrun), the same numbers: sessions, groups and noise follow from the run's seed and a session's
place in the stream; every process rolls out its part of the groups, scores are gathered so that credit sees all of
them, and gradients are summed once per optimiser step. The policy is not wrapped: groups need not divide evenly and a
session's context is built outside of autograd, so one explicit reduction is simpler than a wrapper's hooks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from editr2.capture import check_capture
from editr2.checkpoint import latest_checkpoint
from editr2.config import Config, check_config
from editr2.credit import assign_credit, credit_notes
from editr2.data import SessionSource, open_sessions
from editr2.errors import CheckpointError, NonFiniteError
from editr2.evaluate import comparison_row, draw_strips, evaluate, first_answer, judge
from editr2.finite import ACCEPTED, LARGEST, check_weights, unusable
from editr2.gradient import Batch, accumulate_gradient, first_non_finite
from editr2.policies.base import PackedPolicy, Policy
from editr2.policies.load import open_policy, rehearse_save
from editr2.policies.sharding import place
from editr2.policies.weights import exchanged, trainable
from editr2.preflight.rules import check_run
from editr2.processes import Processes, open_processes
from editr2.report import build_report
from editr2.rewards.adapt import CheckedReward, adapt
from editr2.rewards.base import GivenReward, check_failures, merge_scores
from editr2.rewards.load import load_reward
from editr2.rollout import Seeds, chunks, rollout_chunk
from editr2.rows import Clock, comparison_line, evaluation_line, start_row, train_row
from editr2.schedule import Sampler, eval_sampler, own_schedule, rollout_sampler
from editr2.state import State, new_state
from editr2.tracking import MetricsLog, Progress, profile_table, read_metrics
from editr2.yaml_config import dump_yaml


def train(
    config: Config, *, policy: Policy | None = None, reward: GivenReward | None = None, profile: bool = False
) -> Path:
    """Trains as configured and returns the run's folder; an unfinished run there is resumed.

    policy, reward: in place of the configured ones (API use; docs/rewards.md has the forms of a reward). Raises
    `UserError` subclasses for bad settings, data, checkpoints, too many failed scores, a ratio that is not 1 on-policy,
    or a NaN.
    """
    config = check_config(config)
    processes = open_processes()
    torch.manual_seed(config.seed)
    asked = load_reward(config.reward) if reward is None else adapt(reward, timeout=config.reward.timeout)
    if policy is None:
        policy = open_policy(config.policy, processes)
    else:
        check_weights(policy, f"policy: {type(policy).__name__}")
        place(policy, config.policy.shard, processes)
    cannot_pack = None if isinstance(policy, PackedPolicy) else type(policy).__name__
    own, main = own_schedule(policy), processes.main
    check_run(config, asked.names, own, cannot_pack=cannot_pack, processes=processes.count)
    check_capture(config.rollout.capture, processes.device)
    source = open_sessions(config, policy)
    sampler = rollout_sampler(config.rollout, own).to(processes.device)
    evaluation_sampler = eval_sampler(config, own).to(processes.device)
    state = new_state(config, policy)
    run = Path(config.out)
    found = latest_checkpoint(run / "checkpoints")
    if found is not None:
        state.load(found, config)
    if main and found is None and (run / "config.yaml").exists():
        # Killed before its first checkpoint and started again with other settings: nothing of it can be used.
        if (run / "config.yaml").read_text() != dump_yaml(config):
            (run / "metrics.jsonl").unlink(missing_ok=True)
    processes.wait()
    earlier = read_metrics(run / "metrics.jsonl")[0] if (run / "metrics.jsonl").exists() else []
    kept = [row for row in earlier if row.get("event") == "eval" and row["iteration"] <= state.iteration]
    processes.wait()
    if main:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(dump_yaml(config))
        if not state.iteration:
            rehearse_save(policy, run)
    with (
        MetricsLog(run / "metrics.jsonl", resume_iteration=state.iteration if earlier else None, enabled=main) as log,
        Progress(config.train.iterations, start=state.iteration, enabled=main) as progress,
    ):

        def look(name: str) -> dict[str, Any]:
            done = [row for row in kept if (row["name"], row["iteration"]) == (name, state.iteration)]
            if done and (name == "during" or (run / "strips" / f"{name}.json").exists()):
                return done[-1]
            with state.averaged() as averaged:
                row = evaluate(averaged, asked, source.heldout, evaluation_sampler, config, processes).row(
                    state.iteration, name
                )
                if name != "during":
                    shown = source.heldout[: config.eval.strips]
                    draw_strips(run / "strips", name, averaged, asked, shown, sampler, config, processes)
            log.append(row)
            kept.append(row)
            progress.note(evaluation_line(row))
            return row

        for line in credit_notes(config.credit, asked.names):
            progress.note(line)
        if found is not None:
            progress.note(f"resumed from {found} at iteration {state.iteration}")
        if not any(row["name"] == "before" for row in kept):
            if state.iteration:
                raise CheckpointError(f"{run / 'metrics.jsonl'}: lacks the evaluation before training; was it removed?")
            log.append(start_row(config, source, processes, policy, asked.names))
            if source.heldout_is_training:
                progress.note("no --data.heldout given: evaluating on the training sessions")
            look("before")
        if state.iteration < config.train.iterations:
            first_answer(asked, source.heldout, config.train.max_failed_scores, processes)
        rows = []
        while state.iteration < config.train.iterations:
            started = time.perf_counter()
            row = _iteration(config, state, source, asked, sampler, processes)
            state.elapsed += time.perf_counter() - started
            rows.append(row | {"elapsed_s": state.elapsed})
            log.append(rows[-1])
            progress.update(rows[-1])
            state.iteration += 1
            if state.iteration % config.checkpoint.every == 0 or state.iteration == config.train.iterations:
                if main:
                    state.save(run / "checkpoints", config)
                processes.wait()
            if config.eval.every and state.iteration % config.eval.every == 0:
                look("during")
        after = look("after")
        comparison = comparison_row(next(row for row in kept if row["name"] == "before"), after)
        if not any(row.get("event") == "comparison" and row["iteration"] == state.iteration for row in earlier):
            log.append(comparison)
        progress.note(comparison_line(comparison))
        if profile and rows:
            progress.note(profile_table(rows))
    if main:
        with state.averaged() as averaged:
            averaged.save(run / "policy")
        print(f"report: {build_report(run)}")
    processes.wait()
    return run


def _iteration(
    config: Config,
    state: State,
    source: SessionSource,
    reward: CheckedReward,
    sampler: Sampler,
    processes: Processes,
) -> dict[str, Any]:
    """One rollout and its updates; returns the metrics row."""
    r, t, clock = config.rollout, config.train, Clock()
    ordinals = range(state.iteration * r.sessions, (state.iteration + 1) * r.sessions)
    mine = processes.share(r.sessions)
    seeds = Seeds(config.seed, "train")
    sampler = sampler.at(state.iteration)
    with clock.phase("rollout"), exchanged(state.policy.module, state.old):
        done = [
            rollout_chunk(state.policy, chunk, sampler, seeds, config.policy, rollout=r, keep_velocity=t.guard)
            for chunk in chunks([source[o] for o in ordinals[mine]], ordinals[mine], r.siblings, r.groups_per_batch)
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
                totals.append(accumulate_gradient(config, state, batch, update, minibatch, processes))
            with clock.phase("optimiser"):
                totals[-1]["grad_norm"] = _step(config, state, processes)
                state.step_copies(config, iteration_done=False)
    row = train_row(state.iteration, config, scores, credit, done, totals, clock, processes)
    state.step_copies(config, iteration_done=True)
    return row


def _step(config: Config, state: State, processes: Processes) -> float:
    """Sums gradients over processes, clips, steps; refuses a non-finite gradient before anything is changed."""
    parameters = list(trainable(state.policy.module).values())
    # A weight without gradient (nobody's advantage pulled at it) steps as one with gradient 0, on one process or many.
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if processes.count > 1:
        flat = processes.sum(torch.cat([part.reshape(-1) for part in parts]))
        parts = [
            part.view_as(p) for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True)
        ]
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part
    progress = state.iteration / max(1, config.train.iterations - 1)
    scale = (1 - (1 - config.train.lr_decay) * progress) * min(1.0, (state.iteration + 1) / (config.train.warmup + 1))
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
        if not group["lr"] <= LARGEST:  # AdamW would stop halfway, or make every weight NaN
            raise NonFiniteError(f"iteration {state.iteration}: train.lr: {group['lr']:g} ({ACCEPTED})")
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_norm)
    if not bool(torch.isfinite(norm)):
        named = {n: p.grad for n, p in state.policy.module.named_parameters() if p.grad is not None}
        raise NonFiniteError(f"gradient at iteration {state.iteration}: {first_non_finite(named)}; nothing was updated")
    state.optimizer.step()
    if name := unusable(trainable(state.policy.module).items()):
        raise NonFiniteError(
            f"iteration {state.iteration}, after the optimiser's step: {name}: NaN, infinite or too large ({ACCEPTED}; "
            f"train.lr is {config.train.lr:g}); it was not saved, and what was saved before stands"
        )
    state.optimizer.zero_grad(set_to_none=True)
    return float(norm)
