"""A run from its start to its end: what has to be there before the first iteration, and the
iterations with the evaluations, checkpoints and rows between them."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from editr2.config import Config
from editr2.errors import UserError
from editr2.policies.base import PackedPolicy, Policy
from editr2.policies.blocks import may_run_plainly
from editr2.policies.finite import check_weights
from editr2.policies.load import open_policy, rehearse_save
from editr2.policies.rules import check_config
from editr2.policies.sharding import place, saveable
from editr2.rewards.adapt import panel
from editr2.rewards.base import Calls, GivenReward
from editr2.rewards.load import load_eval_reward, load_reward
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rewards.record import Record
from editr2.rl import kept
from editr2.rl.compiled_step import check_capture
from editr2.rl.credit import credit_notes
from editr2.rl.evaluate import (
    FIRST_CALLS,
    comparison_row,
    draw_strips,
    evaluate,
    first_answer,
    strips_of,
)
from editr2.rl.iteration import Rolled, learn, roll_out
from editr2.rl.metrics import (
    comparison_line,
    evaluation_line,
    find_row,
    rows_due,
    start_row,
    strips_due,
)
from editr2.rl.rules import check_rewards, check_run
from editr2.rl.sampler import Schedule, eval_sampler, own_schedule, rollout_sampler
from editr2.rl.seeds import derive_seed
from editr2.rl.sessions import sessions_for
from editr2.rl.start import Start, find_start
from editr2.rl.state import State, new_state
from editr2.rl.told import opening
from editr2.rl.watch import alarms, best_of, evaluations, new_alarms, parted, stop_row
from editr2.run.checkpoint import replace_folder
from editr2.run.folder import (
    Refreshed,
    check_holds_no_runs,
    check_no_evaluation,
    check_settings_are_ours,
    write_readme,
)
from editr2.run.generators import capture_rng, generators_aside, seed_generators
from editr2.run.identity import (
    Identity,
    check_insisted,
    given_weights,
    identify,
    loaded_weights,
    provenance,
    reward_fingerprint,
)
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes
from editr2.run.stop import Stop, ending_told
from editr2.run.trackers import open_sinks
from editr2.run.tracking import MetricsLog, Progress, profile_table
from editr2.sessions.source import SessionSource, check_sessions_there


def train(
    config: Config,
    *,
    policy: Policy | None = None,
    reward: GivenReward | None = None,
    profile: bool = False,
    resume_anyway: Sequence[str] = (),
    settle: Callable[[Config, Processes, bool], tuple[Config, list[str]]] | None = None,
    report: Callable[[Path], str | Path] | None = None,
    observer: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Trains as configured and returns the run's folder; an unfinished run there is resumed.

    policy, reward: in place of the configured ones (API use; docs/rewards.md has the forms of a
    reward). resume_anyway: what may differ from the run that is resumed, by name: settings,
    sections of them, or sessions, heldout, weights and reward. settle: given the settings and
    whether the policy is a given one, returns them without any `auto`, and lines to say; asked
    once. report: called with the run's folder at checkpoints and at the end, and returns what it
    wrote. observer: called on the first process with every row of `metrics.jsonl`, those of before
    where a run goes on included.

    Raises `UserError` subclasses for bad settings, data, checkpoints, a run of something else or
    one that is at work in the folder, too many failed scores, a ratio that is not 1 on-policy, or a
    NaN; and `Stopped`, once what is done is saved, after Ctrl-C, SIGTERM or SIGHUP.
    """
    config = check_config(config)
    check_insisted(resume_anyway)
    processes = open_processes()
    run = Path(config.out)
    processes.on_main(lambda: check_settings_are_ours(run))
    processes.on_main(lambda: check_no_evaluation(run))
    processes.on_main(lambda: check_holds_no_runs(run))
    check_sessions_there(config.data, config.eval)
    with RunLock(run) as lock:
        processes.on_main(lambda: lock.take(make=False))  # before minutes of loading
        asked_compile, said = config.policy.compile, list[str]()
        if settle is not None:
            given, had = config, policy is not None
            config, said = processes.on_main(lambda: settle(given, processes, had))
        seed_generators(config.seed)
        record = Record(run, index=processes.index, cache=config.reward.cache)
        if reward is None:
            asked = load_reward(config.reward, record)
        else:
            r = config.reward
            asked = panel(reward, calls=Calls(r.concurrency, r.timeout, r.retries), record=record)
        apart = load_eval_reward(config.eval, record)
        for member in (*asked.members, *(apart.members if apart else ())):
            member.identity = reward_fingerprint(member)
        check_rewards(config, asked, apart)
        weights: dict[str, str] = {}
        if policy is None:
            policy = open_policy(config.policy, processes)
            if asked_compile == "auto":
                may_run_plainly(policy.module)
        else:
            check_weights(policy, f"policy: {type(policy).__name__}")
            weights = given_weights(policy) if processes.main else {}
            place(policy, config.policy.shard, processes, config.policy.shard_group)
        cannot_pack = None if isinstance(policy, PackedPolicy) else type(policy).__name__
        own = own_schedule(policy)
        check_run(
            config,
            asked.names,
            own,
            cannot_pack=cannot_pack,
            processes=processes.count,
            apart=apart.names if apart else (),
        )
        check_capture(config.rollout.capture, processes.device)
        source = sessions_for(config, policy, wants=asked.wants | (apart.wants if apart else set()))
        # Weights that are drawn have to be equal on all processes; what follows must not be, nor
        # depend on loading.
        seed_generators(derive_seed(config.seed, "rank", processes.index))
        state = new_state(config.train, policy)
        device = _device_name(processes.device)
        identity = processes.on_main(
            lambda: Identity(
                identify(source, weights or loaded_weights(config.policy), asked, apart),
                provenance(processes.count, device),
            )
        )
        processes.on_main(lambda: lock.take(make=True))
        start = find_start(config, state, identity, processes, resume_anyway)
        start.notes[:0] = [*said, *credit_notes(config.credit, asked.names)]
        if lock.problem:
            start.notes.append(lock.problem)
        if not state.iteration:
            with saveable(policy, processes) as saved:
                processes.on_main(lambda: rehearse_save(saved, run))
        loop = _Loop(config, state, source, asked, apart, own, processes, identity, start)
        return loop.run(profile, report, observer)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Loop:
    """A run from where it stands to its end."""

    def __init__(
        self,
        config: Config,
        state: State,
        source: SessionSource,
        reward: Panel,
        apart: Panel | None,
        own: Schedule | None,
        processes: Processes,
        identity: Identity,
        start: Start,
    ) -> None:
        self.config, self.state, self.source, self.reward = config, state, source, reward
        self.pool = Pool(reward)
        self.apart = None if apart is None else Pool(apart)  # asked by evaluations alone
        self.waiting: Rolled | None = None  # made ahead
        self.processes, self.identity, self.start = processes, identity, start
        self.record, self.saved, self.folder = start.record, start.saved, Path(config.out)
        self.sampler = rollout_sampler(config.rollout, own).to(processes.device)
        self.evaluation_sampler = eval_sampler(config.rollout, config.eval, own).to(
            processes.device
        )

    def run(
        self,
        profile: bool,
        report: Callable[[Path], str | Path] | None,
        observer: Callable[[dict[str, Any]], object] | None,
    ) -> Path:
        config, state, processes = self.config, self.state, self.processes
        self.rows: list[dict[str, Any]] = []  # of the iterations of this process
        with (
            Progress(
                config.train.iterations, start=state.iteration, enabled=processes.main
            ) as self.progress,
            MetricsLog(
                self.folder / "metrics.jsonl",
                resume_iteration=state.iteration,
                resumed=self.start.resumed,
                sinks=open_sinks(
                    config, processes, observer, at=state.iteration, note=self.progress.note
                ),
                enabled=processes.main,
            ) as self.log,
            Stop(processes, self._standing) as stop,
        ):
            self.page = Refreshed(self.folder, report, self.progress.note)
            self._describe("at work, or stopped before its end")
            for line in opening(
                config,
                self.source,
                state.policy,
                self.reward,
                self.sampler,
                given="start" in self.identity.depends,
                done=state.iteration,
                seconds=state.elapsed,
            ):
                self.progress.note(line)
            for note in self.start.notes:
                self.progress.note(note)
            if self.source.heldout_is_training and not self.record:
                self.progress.note("no --data.heldout given: evaluating on the training sessions")
            if config.eval.off:
                self.progress.note("no evaluation (eval.sessions 0): nothing says how it ended")
            with ending_told(self._keep, self._standing):
                self._train(stop)
                if profile and self.rows:
                    self.progress.note(profile_table(self.rows))
                with state.averaged() as averaged, saveable(averaged, processes) as saved:
                    if processes.main:
                        saved.save(self.folder / "policy")
                if processes.main:
                    self.page.finish()
                self._describe("finished")
        processes.wait()
        return self.folder

    def _keep(self) -> None:
        """Of a run that is stopped: what is done."""
        self.state.put_back()
        if self.state.iteration != (self.saved or 0):
            self._save()

    def _train(self, stop: Stop) -> None:
        """Iterations and the rows between them, until all are there."""
        config, state, t = self.config, self.state, self.config.train
        due = rows_due(state.iteration, t, config.eval)
        if self._ends_early():
            due += rows_due(t.iterations, t, config.eval)
        missing = [name for name in due if find_row(self.record, name, state.iteration) is None]
        missing += [
            name for name in strips_due(state.iteration, t, config.eval) if not self._drawn(name)
        ]
        if missing or not (state.iteration >= t.iterations or self._ends_early()):
            self._probe()
        stop.give_up()
        while True:
            for name in rows_due(state.iteration, t, config.eval):
                self._make(name)
            for name in strips_due(state.iteration, t, config.eval):
                if not self._drawn(name):
                    self._draw(name)
            if state.iteration >= t.iterations:
                return
            if self._ends_early():
                self._end()
                return
            if not self.rows:
                first = self.source.heldout or [self.source[i] for i in range(FIRST_CALLS)]
                first_answer(self.reward, first, t.max_failed_scores, self.processes)
            stop.agree()
            started = time.perf_counter()
            rolled = self.waiting or self._rolled()
            self.waiting = self._rolled(ahead=1) if self._goes_ahead() else None
            row = learn(config, state, self.source, rolled, self.processes, stop.finish)
            state.elapsed += time.perf_counter() - started
            self.rows.append(row | {"elapsed_s": state.elapsed})
            self._append(self.rows[-1])
            self.progress.update(self.rows[-1])
            state.iteration += 1
            state.rng = capture_rng()
            if state.iteration % config.checkpoint.every == 0 or state.iteration == t.iterations:
                self._save()
                if self.processes.main and state.iteration < t.iterations:  # the end has its own
                    self.page.refresh()
            stop.agree()
            stop.give_up()

    def _ends_early(self) -> bool:
        return stop_row(self.config, self.record, self.state.iteration) is not None

    def _end(self) -> None:
        """What is due at the end of a run, before its last iteration."""
        if self.saved != self.state.iteration:
            self._save()
        for name in ("stop", "after", "comparison"):
            self._make(name)

    def _probe(self) -> None:
        """What the rewards say of themselves before they are asked anything; each process has its
        own connection, and the first speaks for all."""
        panels = [self.reward, *([] if self.apart is None else [self.apart.panel])]
        try:
            notes = [line for panel in panels for line in panel.probe()]
            for panel in panels:
                if panel is self.reward:
                    notes += panel.lacking(self.source.sessions or ())
                apart = not self.source.heldout_is_training or panel is not self.reward
                if apart and self.source.heldout:
                    notes += panel.lacking(self.source.heldout, f"{self._kind} sessions")
            said: tuple[list[str], UserError | None] = (notes, None)
        except UserError as error:
            said = ([], error)
        everyone = self.processes.gather([said])
        for _, problem in everyone:
            if problem is not None:
                raise problem
        for note in everyone[0][0]:
            self.progress.note(note)

    def _rolled(self, ahead: int = 0) -> Rolled:
        return roll_out(
            self.config,
            self.state,
            self.source,
            self.pool,
            self.sampler,
            self.processes,
            ahead=ahead,
        )

    def _goes_ahead(self) -> bool:
        """Whether the next rollout is made before this one is learnt from. Not across a checkpoint,
        nor across an evaluation that may save one: what is resumed from there begins with the
        weights that it holds."""
        following, c = self.state.iteration + 1, self.config
        evaluated = c.checkpoint.best is not None and c.eval.every
        return (
            c.rollout.ahead
            and following < c.train.iterations
            and following % c.checkpoint.every != 0
            and not (evaluated and following % evaluated == 0)
        )

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

    def _describe(self, standing: str) -> None:
        """The folder's README.md."""
        made, run = self.identity.made, shlex.quote(self.config.out)
        again = f"editr2 train --config {run}/config.yaml --out {run}"
        others = [
            ("Follow it in a browser, also while it is at work", f"editr2 watch {run}"),
            ("Its page, report.html, again", f"editr2 report {run}"),
            ("Scores, session by session", f"editr2 eval --policy {run}"),
            ("Its policy for other programs", f"editr2 export {run} --out exported"),
        ]
        self.processes.on_main(lambda: write_readme(self.folder, made, standing, again, others))

    def _append(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        self.record.append(row)

    def _save(self) -> None:
        rng, held = self.processes.gather([self.state.rng]), self.state.held(self.processes)

        def write() -> None:
            self.log.sync()
            self.state.save(self.folder / "checkpoints", self.config, self.identity, rng, held)

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
                        self.config.credit.weights,
                        self.source,
                        self.processes,
                        self.state.policy,
                        self.reward,
                        None if self.apart is None else self.apart.panel,
                        self.identity,
                    )
                )
        elif name == "stop":
            if there is None:
                there = stop_row(self.config, self.record, at)
                assert there is not None
                self._append(there)
            self.progress.note(f"stopped early, finished: {there['reason']}")
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
            drawn = self._drawn(name)
            if there is None or (name != "during" and not drawn):
                self._evaluate(name, there)
            self._keep_best(made=there is None)

    def _keep_best(self, *, made: bool) -> None:
        """The weights of an evaluation that none before surpassed as the folder `best/`. made: it
        was evaluated now, so what a folder of that name holds is another's.

        There is a checkpoint of them first: whoever resumes begins no earlier, so the folder is
        never ahead of the run."""
        metric, at, rows = self.config.checkpoint.best, self.state.iteration, self.record
        if metric is None or (best := best_of(evaluations(rows), metric)) is None:
            return
        facts = best.facts(metric)
        if made and best.row is evaluations(rows)[-1]:
            kept = None
        else:
            kept = self.processes.on_main(lambda: _read_best(self.folder / "best"))
        if kept == facts:
            return
        if facts["iteration"] != at:
            self.progress.note(
                f"{self.folder / 'best'} does not hold the weights of iteration "
                f"{facts['iteration']}, where {metric} was highest: they were not kept"
            )
            return
        if at and self.saved != at:
            self._save()

        with self.state.averaged() as averaged, saveable(averaged, self.processes) as saved:

            def write(folder: Path) -> None:
                saved.save(folder)
                (folder / "best.json").write_text(json.dumps(facts) + "\n")

            self.processes.on_main(lambda: replace_folder(self.folder / "best", write))

    def _evaluate(self, name: str, row: dict[str, Any] | None) -> None:
        """The same weights score the same, whatever a reward drew before, and an evaluation leaves
        no trace."""
        config, processes = self.config, self.processes
        made, count = row is None, config.eval.strips if name != "during" else 0
        shown = self.source.shown[:count]
        apart = config.eval.strips_from == "evaluation"
        if row is None or (apart and shown):
            with self._aside() as averaged:
                found = evaluate(
                    averaged,
                    self.pool,
                    self.source.heldout,
                    self.evaluation_sampler,
                    config,
                    processes,
                    self.apart,
                    shown=len(shown) if apart else 0,
                    pictured=partial(kept.is_pictured, strips=config.eval.strips),
                    small=kept.cell,
                    iteration=self.state.iteration,
                )
            if row is None:
                row = self._watched(found.row(self.state.iteration, name))
        if apart and shown:
            folder = self.folder / "strips"
            reward = self.pool.panel
            processes.on_main(lambda: strips_of(found, folder, name, config.credit, reward))
            self.log.strips(folder / f"{name}.json", self.state.iteration)
        elif name != "during" and not (apart and shown):
            self._draw(name)
        if made:
            of, at = self.folder / "evaluations", self.state.iteration
            heldout, panel = self.source.heldout, self.pool.panel
            processes.on_main(lambda: kept.keep(of, at, found, heldout, panel))
            if name == "during":  # before and after have film-strips
                self.log.strips(of / f"{kept.file_name(at)}.jsonl", at)
            self._append(row)
            self.progress.note(evaluation_line(row, self._kind))
            for text in new_alarms(row, evaluations(self.record)[:-1]):
                self.progress.note(f"ALARM {text}")

    @contextmanager
    def _aside(self) -> Iterator[Policy]:
        """The averaged weights, with generators of an evaluation's own."""
        seed = derive_seed(0, "eval", self.processes.index)
        with generators_aside(seed), self.state.averaged() as averaged:
            yield averaged

    @property
    def _kind(self) -> str:
        """Of the sessions that evaluations are on."""
        return "training" if self.source.heldout_is_training else "held-out"

    def _drawn(self, name: str) -> bool:
        return self.processes.on_main(lambda: (self.folder / "strips" / f"{name}.json").exists())

    def _draw(self, name: str) -> None:
        """Film-strips of whole groups, by the weights that stand."""
        with self._aside() as averaged:
            draw_strips(
                self.folder / "strips",
                name,
                averaged,
                self.pool,
                self.source.shown[: self.config.eval.strips],
                self.sampler,
                self.config,
                self.processes,
            )
        self.log.strips(self.folder / "strips" / f"{name}.json", self.state.iteration)

    def _watched(self, row: dict[str, Any]) -> dict[str, Any]:
        """An evaluation's row, with what it says beside the evaluations before it."""
        if (changes := parted(row, evaluations(self.record))) is not None:
            row["parted"] = changes
        if found := alarms(row, self.config.eval.drift):
            row["alarms"] = found
        if (metric := self.config.checkpoint.best) is not None:
            best = best_of([*evaluations(self.record), row], metric)
            row["best"] = None if best is None else best.facts(metric)
        return row


def _read_best(folder: Path) -> dict[str, Any] | None:
    """Which evaluation the folder has the weights of; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):
        return None
    return found
