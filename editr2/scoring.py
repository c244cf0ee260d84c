"""An editor scored without a run: what `editr2 eval` does.

Its folder has `scores.jsonl`, a line a session and turn; `report.html`, with the files that
`editr2.report` reads of a run; `config.yaml`; and `judges.jsonl`, where a judge is asked: what it
said stands when the same command is started again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, TextIO

from editr2.config import Config
from editr2.config.fields import leaves
from editr2.config.yaml import dump_yaml, load_yaml, to_dataclass
from editr2.errors import ConfigError, UserError, counted, shown
from editr2.files import json_line, write_lines
from editr2.policies.load import open_policy
from editr2.policies.rules import check_config
from editr2.report import build_report
from editr2.rewards.load import load_eval_reward, load_reward
from editr2.rewards.panel import Panel
from editr2.rewards.record import Record
from editr2.rl import kept
from editr2.rl.evaluate import Evaluation, evaluate, strips_of
from editr2.rl.metrics import start_row
from editr2.rl.rules import check_rewards, check_run
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.rl.sessions import sessions_for
from editr2.rl.told import judges_told, sampled_by, sessions_told
from editr2.rl.watch import alarms
from editr2.run.folder import SETTINGS, check_holds_no_runs, check_settings_are_ours, numbered
from editr2.run.identity import OVER, UNKNOWN, Identity, identify, loaded_weights, provenance
from editr2.run.lock import LockedError, RunLock
from editr2.run.processes import Processes, open_processes
from editr2.run.tracking import duration, read_metrics, write_whole
from editr2.sessions import Session
from editr2.sessions.source import check_sessions_there

SCORES = "scores.jsonl"

COMMAND: Final = "eval"
"""What the first row of `metrics.jsonl` says of where it is from, in a folder of ours."""

OTHERS = {
    "checkpoints": "a run",
    "metrics.jsonl": "a run",
    "benchmark.json": "a benchmark of an editor",
    "comparisons.jsonl": "a benchmark of a reward",
}
"""What a folder is of that has such a file; `metrics.jsonl` may be ours."""

IN_ITS_STEAD = (
    *("out", "eval.strips", "reward.concurrency", "reward.timeout", "reward.retries"),
    *("reward.cache", "tracking", "tracking_options"),
)
"""Settings that change no score: with another value of these, an evaluation replaces the one
before."""


FOLDER: Final = Path("runs/eval")
"""Where nobody names one; another evaluation gets `runs/eval-2` and so on."""


def score(
    config: Config, out: Path | None = None, notes: Sequence[str] = ()
) -> tuple[Path, dict[str, Any] | None]:
    """Evaluates the policy on the sessions of the settings (`eval.*`, `data.*`), writes a folder,
    and returns it with the row of `metrics.jsonl`; None for a row of any process but the first.
    out: None is the first of `FOLDER`, `FOLDER`-2, ... without anything else in it. notes: lines
    that are said before.

    Raises `ConfigError` for a folder of something else, `LockedError` where somebody is at work in
    it, and what an evaluation raises.
    """
    config = check_config(config, COMMAND)
    check_sessions_there(config.data, config.eval)
    processes = open_processes()  # first: it says which device is this process's
    _tell(processes, *(f"note: {note}" for note in notes))
    out = processes.on_main(lambda: _free_folder(config) if out is None else _checked(out, config))
    with RunLock(out) as lock:
        processes.on_main(lambda: lock.take(make=False))
        record = Record(out, index=processes.index, cache=config.reward.cache)
        reward = load_reward(config.reward, record)
        apart = load_eval_reward(config.eval, record)
        check_rewards(config, reward, apart, COMMAND)
        policy = open_policy(config.policy, processes, trains=False)
        weights = loaded_weights(config.policy)  # of a run that goes on they are others soon
        own = own_schedule(policy)
        check_run(config, reward.names, own, processes=processes.count, command=COMMAND)
        wants = reward.wants | (apart.wants if apart else set())
        source = sessions_for(config, policy, wants=wants)
        for panel in filter(None, (reward, apart)):
            _tell(processes, *(f"note: {note}" for note in panel.probe()))
        # Minutes after the folder was free, where it was not there: another's scores may lie in it.
        processes.on_main(lambda: lock.take(make=True))
        processes.on_main(lambda: _checked(out, config))
        sampler = eval_sampler(config.rollout, config.eval, own).to(processes.device)
        sessions = source.heldout
        _tell(
            processes,
            f"eval: {sessions_told(config, source)}; {sampled_by(config, sampler)}; judged by "
            f"{judges_told(config, reward)}; into {out}",
        )
        with Counter(len(sessions[processes.share(len(sessions))]), processes.main) as counter:
            found = evaluate(
                policy,
                reward,
                sessions,
                sampler,
                config,
                processes,
                apart,
                shown=config.eval.strips,
                pictured=partial(kept.is_pictured, strips=config.eval.strips),
                small=kept.cell,
                progress=counter.update,
            )
        row = found.row(0, COMMAND)
        if raised := alarms(row, config.eval.drift):
            row["alarms"] = raised
        identity = Identity(
            identify(source, weights, reward, apart),
            provenance(processes.count, str(processes.device)),
        )
        start = start_row(
            config.credit.weights, source, processes, policy, reward, apart, identity
        ) | {"command": COMMAND, "heldout_is_training": False}
        processes.on_main(lambda: _write(out, config, [start, row], found, sessions, reward))
    return out, row if processes.main else None


def _tell(processes: Processes, *lines: str) -> None:
    for line in lines if processes.main else ():
        print(line, file=sys.stderr)


def _free_folder(config: Config) -> Path:
    """The first of the default folders that may be written and where nobody is at work: with the
    same settings the one of before, where what judges said stands."""
    for folder in numbered(FOLDER):
        try:
            _checked(folder, config)
            with RunLock(folder) as lock:
                lock.take(make=False)
            return folder
        except (ConfigError, LockedError):
            if not folder.is_dir():
                raise
    raise AssertionError


def _checked(out: Path, config: Config) -> Path:
    """The folder. Raises `ConfigError` for one of something else, whose files have the same names,
    and for one of other settings: what was scored there is not to be lost."""
    for name, owner in OTHERS.items():
        ours = name == "metrics.jsonl" and (out / name).is_file() and _is_ours(out / name)
        if (out / name).exists() and not ours:
            raise ConfigError(f"--out: {shown(out)}: the folder of {owner} (accepted: another)")
    check_settings_are_ours(out)
    check_holds_no_runs(out)
    try:
        earlier = to_dataclass(load_yaml(out / SETTINGS)[0], Config)
    except ConfigError:  # none is there, or another version's
        return out
    now = _settings(out, config)
    for key, _ in leaves(Config):
        there, here = (attrgetter(key)(of) for of in (earlier, now))
        if there != here and key not in IN_ITS_STEAD:
            raise ConfigError(
                f"--out: {shown(out)}: scores of other settings, {key} {shown(str(there))} there "
                f"and {shown(str(here))} now (accepted: another folder, or without that one)"
            )
    if _other_weights(out, config):
        name = shown(str(config.policy.weights or "the policy"))
        raise ConfigError(
            f"--out: {shown(out)}: scores of {name} as it was then, with other weights or texts "
            f"than now (accepted: another folder, or without that one)"
        )
    return out


def _other_weights(out: Path, config: Config) -> bool:
    """Whether the policy that was scored there has other weights now under the same path or name,
    as far as that can be told before they are loaded."""
    file = out / "metrics.jsonl"
    rows = read_metrics(file)[0] if file.is_file() else []
    identity: Any = rows[0].get("identity") if rows else None
    there = identity.get("depends") if isinstance(identity, dict) else None
    if not isinstance(there, dict):
        return False
    try:
        here = loaded_weights(config.policy)
    except (UserError, OSError, ValueError):  # loading says it
        return False
    return any(_differ(str(there.get(name, now)), now) for name, now in here.items())


def _differ(there: str, here: str) -> bool:
    """Whether two fingerprints do, as far as both know."""
    parts = [text.split(OVER) for text in (there, here)]
    if len(parts[0]) != len(parts[1]):
        return True
    return any(a != b and UNKNOWN not in a + b for a, b in zip(*parts, strict=True))


def _settings(out: Path, config: Config) -> Config:
    """As the folder's file says them."""
    return replace(config, out=str(out), eval=replace(config.eval, strips_from="evaluation"))


def _is_ours(metrics: Path) -> bool:
    rows, _ = read_metrics(metrics)
    return not rows or rows[0].get("command") == COMMAND


def _write(
    out: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    found: Evaluation,
    sessions: Sequence[Session],
    reward: Panel,
) -> None:
    write_lines(out / SCORES, map(json_line, scores_of(found, sessions)))
    write_whole(out / SETTINGS, dump_yaml(_settings(out, config)))
    write_lines(out / "metrics.jsonl", map(json_line, rows))
    kept.keep(out / "evaluations", 0, found, sessions, reward)
    strips_of(found, out / "strips", "after", config.credit, reward)
    build_report(out)


def scores_of(found: Evaluation, sessions: Sequence[Session]) -> Iterator[dict[str, Any]]:
    """A record a session and turn: which, what was asked, every score (null: there is none, and
    `reason` or `does_not_apply` says why) with what its reward said of it, and the weighted
    reward."""
    for n, session in enumerate(kept.lines(found, sessions)):
        for t, turn in enumerate(session["turns"]):
            record = {"id": session["id"], "mode": session["mode"], "turn": t + 1, **turn}
            yield {name: value for name, value in record.items() if value is not None} | (
                {} if found.apart is None else {"eval.scores": _apart(found, n, t)}
            )


def _apart(found: Evaluation, n: int, t: int) -> dict[str, float | None]:
    """What the judges of `eval.reward` say."""
    apart = found.apart
    assert apart is not None
    return {
        name: round(float(apart.values[n, t, k]), 6) if apart.scored[n, t, k] else None
        for k, name in enumerate(apart.names)
    }


class Counter:
    """How many sessions are edited, and how long the others take: a line that stays in place on a
    terminal, one for every batch elsewhere. With several processes it counts those of the first."""

    def __init__(self, total: int, enabled: bool, stream: TextIO | None = None) -> None:
        self.total, self._enabled = total, enabled
        self._stream = sys.stderr if stream is None else stream
        self._began = time.monotonic()
        self._open = False

    def update(self, done: int) -> None:
        spent = time.monotonic() - self._began
        left = duration(spent / done * (self.total - done))
        line = f"edited {done}/{self.total} sessions  {spent / done:.3g} s each  left {left}"
        if done == self.total:
            count = counted(done, "session")
            line = f"edited {count} in {duration(spent)}; waiting for their scores"
        if not self._enabled:
            return
        self._open = self._stream.isatty() and done < self.total
        start = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{start}{line}", end="" if self._open else "\n", file=self._stream, flush=True)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *problem: object) -> None:
        if self._open:
            print(file=self._stream)
