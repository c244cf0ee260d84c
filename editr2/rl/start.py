"""Where a run stands when it starts: what its folder holds, and whether that is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.config import Config
from editr2.config.yaml import dump_yaml
from editr2.errors import CheckpointError
from editr2.policies.recorded import write_questions
from editr2.rl.metrics import find_row, rows_lost
from editr2.rl.state import Resumed, State
from editr2.rl.watch import stop_row
from editr2.run.checkpoint import latest_checkpoint
from editr2.run.identity import Identity, changes, differences, named
from editr2.run.processes import Processes
from editr2.run.tracking import read_metrics, rows_behind, write_whole


@dataclass
class Start:
    """What was found in the run's folder. record: the rows of `metrics.jsonl` that stand. resumed:
    what the start row is to say about this process, None where it adds nothing. notes: lines for
    the terminal. saved: the iteration of the newest checkpoint, None where there is none."""

    record: list[dict[str, Any]]
    resumed: dict[str, Any] | None
    notes: list[str]
    saved: int | None


def find_start(
    config: Config, state: State, identity: Identity, processes: Processes, insist: Sequence[str]
) -> Start:
    """Takes on the newest checkpoint of the run's folder, if there is one, and reads the rows that
    belong to it.

    Raises CheckpointError for a checkpoint of something else, and for a record without its
    beginning.
    """
    run, notes, resumed = Path(config.out), [], None
    found = processes.on_main(lambda: latest_checkpoint(run / "checkpoints"))
    if found is not None:
        seen = state.load(found, config, identity, rank=processes.index, insist=insist)
        notes += [f"resumed from {found} at iteration {state.iteration}", *_told(seen)]
    saved = None if found is None else state.iteration
    record, more = processes.on_main(lambda: _read(run, config, identity, saved))
    processes.on_main(lambda: write_questions(run, state.policy, config.policy))
    notes += more
    if found is not None:
        done = state.iteration >= config.train.iterations
        done |= stop_row(config, record, state.iteration) is not None
        if not done or seen.told or seen.insisted:
            insisted = {name: list(values) for name, values in seen.insisted.items()}
            resumed = {"iteration": state.iteration, **identity.made, "insisted": insisted}
            identity.resumed.extend([*seen.resumed, resumed])
    if found is None and record:
        began = (find_row(record, "start", 0) or {}).get("identity", {})
        if different := changes(began, identity.made) if began else []:
            notes.append(f"changed since {began.get('date')}, recorded: {'; '.join(different)}")
        resumed = {"iteration": 0, **identity.made, "insisted": {}}
        identity.resumed.append(resumed)
    metrics = run / "metrics.jsonl"
    lost = rows_lost(record, state.iteration, config.train, config.eval)
    if any(row in lost for row in ("start 0", "before 0")):
        raise CheckpointError(f"{metrics}: lacks the evaluation before training; was it removed?")
    if lost:
        others = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        listed = f"{', '.join(lost[:5])}{others}"
        notes.append(f"{metrics}: lacks {listed}, which cannot be made any more")
    return Start(record, resumed, notes, saved)


def _told(seen: Resumed) -> list[str]:
    """Lines about a checkpoint that was written by other code, or of what the user insisted on."""
    lines = []
    if seen.unknown:
        lines.append(
            "it was written without fingerprints: sessions, weights and reward are taken for the "
            "same"
        )
    if seen.told:
        lines.append(f"changed since {seen.date}, recorded: {'; '.join(seen.told)}")
    if seen.insisted:
        listed = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in seen.insisted.items())
        lines.append(f"--resume-anyway, recorded: {listed}")
    return lines


def _read(
    run: Path, config: Config, identity: Identity, saved: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that stand beside the checkpoint (saved: its iteration), and what to say of them;
    writes the settings into the run's folder."""
    metrics, settings, notes = run / "metrics.jsonl", run / "config.yaml", []
    rows = read_metrics(metrics)[0] if metrics.exists() else []
    if saved is None and rows:
        # Killed before its first checkpoint, and started again as something else: nothing of it
        # can be used.
        began = find_row(rows, "start", 0) or {}
        before = named({}, began.get("identity", {}).get("depends", {}))
        other = list(differences(before, named({}, identity.depends)))
        if settings.exists() and settings.read_text(encoding="utf-8") != dump_yaml(config):
            other.append("settings")
        if other:
            listed = ", ".join(other)
            notes.append(f"{run}: has no checkpoint yet and was of other {listed}: it starts anew")
            metrics.unlink()
            rows = []
    write_whole(settings, dump_yaml(config))
    return rows_behind(rows, saved or 0), notes
