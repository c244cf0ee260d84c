"""Training the arms: a process a run, several side by side, resumable by whole runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editr2.config import Config, RewardConfig
from editr2.config.yaml import dump_yaml, load_yaml, to_dataclass
from editr2.errors import ConfigError
from editr2.reproduce.arms import (
    EVERY_ARM,
    Arm,
    Settings,
    arm_config,
    evaluation_sampler,
    find_arms,
    start_of,
    study_of,
    verifier_of,
)
from editr2.reproduce.rows import (
    FILE,
    Key,
    Row,
    cores,
    fingerprints,
    make_row,
    read_rows,
    shared_settings,
    write_rows,
)
from editr2.run.identity import folder_fingerprint
from editr2.run.tracking import read_metrics

TAIL = 8
"""Lines of a failed run's output that are shown; all of it is in the log beside the run."""


@dataclass(frozen=True)
class ArmRun:
    """One arm under one training seed. sessions: held-out ones, scored exactly."""

    arm: Arm
    seed: int
    config: Config
    sessions: int

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def label(self) -> str:
        return f"{self.arm.name} seed {self.seed}"

    @property
    def sampler(self) -> str:
        return evaluation_sampler(self.config.eval, self.config.rollout)

    @property
    def key(self) -> Key:
        return self.arm.name, self.seed, self.sampler

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def file(self) -> Path:
        return self.folder.with_suffix(".yaml")

    def metrics(self) -> list[Row]:
        path = self.folder / "metrics.jsonl"
        return read_metrics(path)[0] if path.exists() else []

    def trained(self) -> bool:
        return any(row.get("event") == "comparison" for row in self.metrics())

    @property
    def exact(self) -> Path:
        """Of a judged run: where the world scores what it trained."""
        return self.folder.with_name(f"{self.folder.name}-exact")

    def exact_row(self) -> Row | None:
        """That evaluation; None before it is there."""
        path = self.exact / "metrics.jsonl"
        rows = read_metrics(path)[0] if path.exists() else []
        return next((row for row in rows if row.get("event") == "eval"), None)

    def finished(self) -> bool:
        return self.trained() and (self.arm.judge is None or self.exact_row() is not None)

    def next_command(self) -> list[str]:
        """What is to be done of it, its file of settings written."""
        if not self.trained():
            self.file.write_text(_head(self.config) + dump_yaml(self.config))
            return command(self.file)
        file = self.exact.with_suffix(".yaml")
        weights = str((self.folder / "policy").resolve())  # a path in a file is from its folder
        file.write_text(dump_yaml(exactly(self.config, self.sessions, weights)))
        return command(file, "eval", "--out", str(self.exact))


def command(config_file: Path, name: str = "train", *more: str) -> list[str]:
    """What trains one run, or evaluates it."""
    return [sys.executable, "-m", "editr2.cli", name, "--config", str(config_file), *more]


def exactly(config: Config, sessions: int, weights: str | None = None) -> Config:
    """The settings of an evaluation by the world. weights: of the policy; None is the start."""
    return replace(
        config,
        reward=RewardConfig(),
        eval=replace(config.eval, sessions=sessions),
        policy=replace(config.policy, weights=weights),
    )


def reproduce(
    out: Path,
    docs: Path,
    settings: Settings,
    *,
    arms: Sequence[Arm],
    seeds: int = 3,
    jobs: int = 2,
    verifiers: Path | None = None,
) -> list[str]:
    """Trains what is missing, writes `reproduction.jsonl` after every run, and returns the labels
    of runs that failed. verifiers: the folder of those that arms are rewarded by, `NAME/seed0` and
    so on.

    Raises `ConfigError` before anything is trained when `out` or `docs` holds results of other
    settings, or a verifier is missing.
    """
    _check_verifiers(arms, seeds, verifiers)
    # A run's file of settings lies elsewhere, and a path in it is from there.
    where = {} if verifiers is None else {"verifiers": verifiers.resolve()}
    # Seed by seed, so that an interrupted reproduction has whole seeds.
    runs = [
        ArmRun(
            arm,
            seed,
            arm_config(arm, settings, seed, out / arm.name / f"seed{seed}", **where),
            settings.sessions,
        )
        for seed in range(seeds)
        for arm in arms
        if arm.trained
    ]
    _check_credit(runs)
    rows = read_rows(docs)
    if study_of([*(arm.name for arm in arms), *(row["arm"] for row in rows.values())]) is None:
        raise ConfigError(
            f"{docs / FILE}: holds rows of another study (accepted: another --out or --docs)"
        )
    if rows and not (shared_settings(rows, docs / FILE) == settings and _current(rows, settings)):
        raise ConfigError(
            f"{docs / FILE}: holds rows of other settings (accepted: another --out or --docs, or "
            f"without the file)"
        )
    for run in runs:
        _check_earlier(run)
        _check_row(run, rows, docs / FILE)
    count = 0

    def done(run: ArmRun) -> None:
        nonlocal count
        count += 1
        rows.update(run_rows(run, settings, rows))
        write_rows(docs, rows)
        row = rows[run.key]
        start = rows[start_of(run.arm), None, run.sampler]["ga_turn"][-1]
        progress = f"turn-{len(row['ga_turn'])} GA {_shown(start)} -> {_shown(row['ga_turn'][-1])}"
        print(
            f"{run.label}: {progress}, {row['seconds']:.0f} s of training ({count} of {len(runs)})",
            flush=True,
        )

    def failed(run: ArmRun, reason: str) -> None:
        failures.append(run.label)
        print(f"{run.label}: failed, {reason}\n{_tail(run.log)}", flush=True)

    failures: list[str] = []
    for run in runs:
        if run.finished():
            done(run)
    # A row is enough: the folder it came from may have stayed on another machine.
    missing = [run for run in runs if run.key not in rows]
    _side_by_side(missing, jobs, done, failed)
    for arm in arms:
        config = arm_config(arm, settings, 0, out / arm.name)
        sampler = evaluation_sampler(config.eval, config.rollout)
        # Runs that began from it have its rows under their samplers.
        if not (arm.trained or any(name == arm.name for name, _, _ in rows)):
            rows[arm.name, None, sampler] = make_row(
                arm, None, sampler, settings, evaluate(config), **fingerprints(config)
            )
            write_rows(docs, rows)
    return failures


def _check_verifiers(arms: Sequence[Arm], seeds: int, verifiers: Path | None) -> None:
    for arm in arms:
        for seed in range(seeds) if arm.needs_verifiers else ():
            if verifiers is None:
                raise ConfigError(
                    f"--verifiers: arm {arm.name} is rewarded by one (accepted: a folder with "
                    f"{arm.judge}/seed0 and so on, each what `editr2 verifier sft` or `gcpo` "
                    f"saved; or --arms that need none: exact, shipped, ...)"
                )
            folder = verifier_of(arm, seed, verifiers)
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    f"--verifiers: {folder}: no verifier, which arm {arm.name} is rewarded by "
                    f"(accepted: what `editr2 verifier sft` or `gcpo` saved; fewer --seeds; other "
                    f"--arms)"
                )


def _check_credit(runs: Sequence[ArmRun]) -> None:
    from editr2.rl.credit import credit_options

    for run in runs:
        credit_options(run.config.credit)


def _current(rows: Mapping[Key, Row], settings: Settings) -> bool:
    """Whether the rows are of the arms as they are now."""
    known = {arm.name: arm for arm in EVERY_ARM}
    for row in rows.values():
        if row["arm"] not in known:
            return False
        now = fingerprints(arm_config(known[row["arm"]], settings, 0, ""))
        if row["start"] != now["start"] or (
            row["seed"] is not None and row["config"] != now["config"]
        ):
            return False
    return True


def _check_earlier(run: ArmRun) -> None:
    """A run of other settings that was trained is neither used nor overwritten, nor is one that
    another verifier rewarded."""
    file = run.folder / "config.yaml"
    if not (run.trained() and file.exists()):
        return
    try:
        earlier = to_dataclass(load_yaml(file)[0], Config)
    except ConfigError:
        earlier = None
    if earlier is not None and run.arm.judge is not None:
        # Where its folder lies is nothing of a verifier.
        earlier = replace(earlier, reward=_lying_at(earlier.reward, run.config.reward))
    other = run.file.exists() and not run.file.read_text().startswith(_head(run.config))
    if other or earlier is None or replace(earlier, out=run.config.out) != run.config:
        raise ConfigError(
            f"{run.folder}: holds a finished run of other settings (accepted: another --out, or "
            f"without it)"
        )
    if run.arm.judge is None:
        return
    start = next(row for row in run.metrics() if row.get("event") == "start")
    if not str(start["judges"]["judge"]).endswith(f"({_judge_weights(run)})"):
        raise ConfigError(
            f"{run.folder}: holds a run that other weights rewarded than {_verifier(run)} has "
            f"(accepted: those of then, another --out, or without it)"
        )
    exact = run.exact_row()
    if exact is not None and exact["sessions"] != run.sessions:
        raise ConfigError(
            f"{run.exact}: holds exact scores of {exact['sessions']} sessions (accepted: "
            f"--sessions {exact['sessions']}, another --out, or without it)"
        )


def _lying_at(reward: RewardConfig, now: RewardConfig) -> RewardConfig:
    """A verifier's options with the folder of another's, which has the same name and number."""
    there, here = (Path(str(one.options.get("weights"))) for one in (reward, now))
    if there.parts[-2:] != here.parts[-2:]:
        return reward
    return replace(reward, options={**reward.options, "weights": str(here)})


def _check_row(run: ArmRun, rows: Mapping[Key, Row], file: Path) -> None:
    """A row stands for its run; of another verifier it does not."""
    said = rows.get(run.key, {}).get("judge")
    if said is not None and said["weights"] != _judge_weights(run):
        raise ConfigError(
            f"{file}: {run.label} was rewarded by other weights than {_verifier(run)} has "
            f"(accepted: those of then, another --out or --docs, or without the file)"
        )


def _head(config: Config) -> str:
    """The first line of a run's configuration file. The trainer's own copy does not say which
    weights were shipped."""
    return f"# starts from {fingerprints(config)['start']}\n"


def _evaluation(run: ArmRun, name: str) -> Row:
    return next(
        row
        for row in reversed(run.metrics())
        if (row.get("event"), row.get("name")) == ("eval", name)
    )


def run_rows(run: ArmRun, settings: Settings, known: dict[Key, Row]) -> dict[Key, Row]:
    """The row of a finished run, and that of the start it began from where none is known: the same
    settings, weights and sessions were evaluated before training."""
    metrics = run.metrics()
    start = next(row for row in metrics if row.get("event") == "start")
    took = round([row["elapsed_s"] for row in metrics if row.get("event") == "train"][-1], 1)
    facts: dict[str, Any] = {
        "threads": start["threads"],
        "device": start["device"],
        **fingerprints(run.config),
    }
    key, sampler = run.key, run.sampler
    after = _evaluation(run, "after") if run.arm.judge is None else run.exact_row()
    assert after is not None
    if run.arm.judge is not None:
        facts["judge"] = _judge(run)
    row = make_row(run.arm, run.seed, sampler, settings, after, seconds=took, **facts)
    if key in known and {**known[key], "date": None} == {**row, "date": None}:
        row = known[key]  # measured then, read again today
    rows: dict[Key, Row] = {key: row}
    (base,) = find_arms(start_of(run.arm))
    if (base.name, None, sampler) not in known:
        if run.arm.judge is None:
            start_row = _evaluation(run, "before")
        else:
            start_row = evaluate(exactly(run.config, run.sessions))
        facts.pop("judge", None)
        rows[base.name, None, sampler] = make_row(base, None, sampler, settings, start_row, **facts)
    return rows


def _judge(run: ArmRun) -> dict[str, Any]:
    """Which weights judged a run, and the mean that they gave the last turn before and after; None
    where none of their answers could be read."""
    means = {name: _evaluation(run, name)["ga_turn"][-1]["mean"] for name in ("before", "after")}
    believed = {name: None if mean is None else round(mean, 6) for name, mean in means.items()}
    return {"name": run.arm.judge, "weights": _judge_weights(run), "believed": believed}


def _verifier(run: ArmRun) -> str:
    return str(run.config.reward.options["weights"])


def _judge_weights(run: ArmRun) -> str:
    """The fingerprint of what rewards it, by its content."""
    return folder_fingerprint(Path(_verifier(run)))


def evaluate(config: Config) -> Row:
    """The evaluation of a policy by the world, in this process."""
    from editr2.policies.load import load_policy
    from editr2.rewards.world import WorldReward
    from editr2.rl.evaluate import evaluate as evaluate_policy
    from editr2.rl.sampler import eval_sampler
    from editr2.rl.sessions import sessions_for
    from editr2.run.processes import open_processes

    policy = load_policy(config.policy)
    heldout = sessions_for(config, policy).heldout
    return evaluate_policy(
        policy,
        WorldReward(),
        heldout,
        eval_sampler(config.rollout, config.eval),
        config,
        open_processes(),
    ).row(0, "before")


def _side_by_side(
    runs: Sequence[ArmRun],
    jobs: int,
    done: Callable[[ArmRun], None],
    failed: Callable[[ArmRun, str], None],
) -> None:
    """Trains `runs` in order, `jobs` at a time, each with its share of the cores. Whatever ends
    this call ends them."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    waiting, running = deque(runs), list[tuple[ArmRun, subprocess.Popen[bytes]]]()
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.popleft()
                    running.append((run, _start(run, environment)))
                for run, process in list(running):
                    if process.poll() is None:
                        continue
                    running.remove((run, process))
                    if process.returncode == 0 and run.finished():
                        done(run)
                    elif process.returncode == 0 and process.args != (more := run.next_command()):
                        running.append((run, _start(run, environment, more)))
                    else:
                        failed(run, _reason(process.returncode))
                time.sleep(0.05)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _start(
    run: ArmRun, environment: dict[str, str], words: list[str] | None = None
) -> subprocess.Popen[bytes]:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = words is None and not run.trained()  # what training said stays above the evaluation
    with run.log.open("wb" if fresh else "ab") as log:
        return subprocess.Popen(
            words or run.next_command(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the children too, as Ctrl-C does: an orphan would write into a run's folder
    beside its successor."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _reason(code: int) -> str:
    if code == 0:
        return "it ended without its comparison row"
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _tail(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-TAIL:])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
