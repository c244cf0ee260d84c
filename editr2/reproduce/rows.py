"""`reproduction.jsonl`: one line an (arm, seed, sampler), with the scores of every held-out
session."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from editr2.config import Config
from editr2.errors import ConfigError
from editr2.files import write_lines
from editr2.reproduce.arms import EVERY_ARM, TURNS, Arm, Settings
from editr2.run.tracking import Row, read_metrics
from editr2.sessions.source import HELDOUT_SEED
from editr2.worlds.shapes import make_session

Key = tuple[str, int | None, str]
"""Arm, training seed (none for the start itself), sampler of the evaluation."""

FILE = "reproduction.jsonl"
WEIGHTS = {"if": 0.3, "cc": 0.3, "ga": 0.4}
"""Of the reward in the rows (Edit-R2's), whatever weights an arm was trained with."""


def key(row: Mapping[str, Any]) -> Key:
    return row["arm"], row["seed"], row["sampler"]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _modes(count: int) -> tuple[str | None, ...]:
    """The modes of the held-out sessions."""
    return tuple(
        make_session(HELDOUT_SEED, i, split="heldout", turns=TURNS).mode for i in range(count)
    )


def make_row(
    arm: Arm,
    seed: int | None,
    sampler: str,
    settings: Settings,
    evaluation: Mapping[str, Any],
    **facts: Any,
) -> Row:
    """A row from an evaluation's row of `metrics.jsonl`. facts: seconds, threads and device of the
    run, what `fingerprints` says, and of a judged arm `judge`: which weights judged, and what
    they believed of the last turn before and after."""
    turns = ("if", "cc", "ga", "marginal")
    return {
        "arm": arm.name,
        "seed": seed,
        "sampler": sampler,
        "preset": arm.preset,
        "overrides": arm.overrides,
        "settings": asdict(settings),
        "config": facts.get("config") if arm.trained else None,
        "start": facts.get("start"),
        "iterations": settings.iterations if arm.trained else 0,
        "seconds": facts.get("seconds"),
        **{f"{name}_turn": _means(evaluation[f"{name}_turn"]) for name in turns},
        "success": _rounded(evaluation["success"]["mean"], 6),
        "by_mode": {
            mode: {"ga_turn": _list(part["ga_turn"], 6), "success": _rounded(part["success"], 6)}
            for mode, part in evaluation["by_mode"].items()
        },
        "intents_right": _rounded(evaluation["intents_right"], 6),
        "per_session": _per_session(evaluation["per_session"]),
        **({"judge": facts["judge"]} if "judge" in facts else {}),
        "version": importlib.metadata.version("editr2"),
        "date": date.today().isoformat(),
        "machine": {
            "cores": cores(),
            "threads": facts.get("threads"),
            "device": facts.get("device"),
        },
    }


def _per_session(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by turn, then by session; the reward of the last turn; the modes."""
    by_turn = {
        name: [_list(turn, 3) for turn in zip(*scores[name], strict=True)] for name in WEIGHTS
    }
    count = len(scores["ga"])
    last = [[scores[name][i][-1] for name in WEIGHTS] for i in range(count)]
    reward = [None if None in of else _weighted(of) for of in last]
    return {**by_turn, "reward": _list(reward, 3), "mode": list(_modes(count))}


def _weighted(scores: Sequence[float]) -> float:
    return sum(w * s for w, s in zip(WEIGHTS.values(), scores, strict=True))


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None:
        return None
    short = round(value, digits)
    return int(short) if short == int(short) else short


def _list(values: Sequence[float | None], digits: int) -> list[float | None]:
    return [_rounded(v, digits) for v in values]


def _means(turns: Sequence[Mapping[str, float | None]]) -> list[float | None]:
    return [_rounded(turn["mean"], 6) for turn in turns]


def read_rows(folder: Path) -> dict[Key, Row]:
    """The rows of a folder; a later line replaces an earlier one of the same key."""
    path = folder / FILE
    if not path.exists():
        return {}
    rows, dropped = read_metrics(path)
    if dropped:
        raise ConfigError(
            f"{path}: {dropped} lines are not JSON objects (accepted: the rows as they were "
            f"written)"
        )
    return {key(row): row for row in rows}


def write_rows(folder: Path, rows: Mapping[Key, Row]) -> None:
    """The whole file anew, in the order of `EVERY_ARM`, or not at all."""
    order = {arm.name: i for i, arm in enumerate(EVERY_ARM)}
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(
        rows.values(), key=lambda r: (order.get(r["arm"], len(order)), r["sampler"], r["seed"] or 0)
    )
    write_lines(folder / FILE, (json.dumps(row, separators=(",", ":")) + "\n" for row in ordered))


def fingerprints(config: Config) -> dict[str, str]:
    """Short hashes of a run's configuration but for seed and folder, and of the weights it starts
    from.

    Of the configuration counts what differs from the defaults, so that a field that is added later,
    at the value that stands for what was done before, does not make old rows another experiment.
    """
    given, default = (asdict(c) for c in (dataclasses.replace(config, seed=0, out=""), Config()))
    judge = given["reward"]["options"].get("weights")
    if judge is not None:  # VERIFIERS/sft/seed0: where it lies, and of which seed, is nothing of it
        given["reward"]["options"]["weights"] = Path(judge).parent.name
    changed = {
        section: {k: v for k, v in values.items() if v != default[section][k]}
        for section, values in given.items()
        if isinstance(values, dict)
    }
    text = json.dumps(changed, sort_keys=True)
    return {"config": hashlib.sha256(text.encode()).hexdigest()[:12], "start": _start_weights()}


@functools.cache
def _start_weights() -> str:
    weights = Path(__file__).parent.parent / "assets" / "unified-small" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def shared_settings(rows: Mapping[Key, Row], path: Path) -> Settings:
    """The settings that all rows have in common; rows of different settings, starts or
    configurations of an arm are not put on one page."""
    for name in ("settings", "start"):
        found = sorted({json.dumps(row[name], sort_keys=True) for row in rows.values()})
        if len(found) != 1:
            raise ConfigError(
                f"{path}: holds rows of {len(found)} {name} (accepted: one; {' '.join(found)})"
            )
    configs = {(row["arm"], row["config"]) for row in rows.values() if row["seed"] is not None}
    twice = sorted({arm for arm, _ in configs if sum(other == arm for other, _ in configs) > 1})
    if twice:
        raise ConfigError(
            f"{path}: holds rows of several configurations of {', '.join(twice)} (accepted: one)"
        )
    return Settings(**next(iter(rows.values()))["settings"])


@dataclass(frozen=True)
class Result:
    """All seeds of one arm under one sampler. scores: name -> float64 [seeds, turns, sessions], NaN
    where missing."""

    arm: Arm
    sampler: str
    seeds: tuple[int | None, ...]
    scores: dict[str, np.ndarray]
    modes: np.ndarray
    rows: tuple[Row, ...]

    def values(self, metric: str, turn: int = TURNS, mode: str | None = None) -> np.ndarray:
        """[seeds, sessions] of IF, CC, GA, marginal (IF = 1 at this turn) or success (GA = 1 at the
        last), of the sessions of one mode or of all."""
        if metric == "marginal":
            values = _whole(self.scores["if"][:, turn - 1])
        elif metric == "success":
            values = _whole(self.scores["ga"][:, -1])
        else:
            values = self.scores[metric.lower()][:, turn - 1]
        return values if mode is None else values[:, self.modes == mode]

    def pick(self, seeds: Sequence[int | None]) -> Result:
        """The same with these seeds alone; the start, which has none, stays as it is."""
        if self.seeds == (None,):
            return self
        at = [self.seeds.index(seed) for seed in seeds]
        scores = {name: values[at] for name, values in self.scores.items()}
        return Result(
            self.arm,
            self.sampler,
            tuple(seeds),
            scores,
            self.modes,
            tuple(self.rows[i] for i in at),
        )


def _whole(scores: np.ndarray) -> np.ndarray:
    """Whether a score is all of 1; NaN where it is missing."""
    return np.where(np.isnan(scores), np.nan, scores >= 1 - 1e-6)


def results(rows: Mapping[Key, Row]) -> list[Result]:
    """The rows by arm and sampler, in the order of `EVERY_ARM`, without those of arms that no
    longer exist."""
    out = []
    for arm in EVERY_ARM:
        mine = [row for row in rows.values() if row["arm"] == arm.name]
        for sampler in sorted({row["sampler"] for row in mine}):
            out.append(_result(arm, sampler, [row for row in mine if row["sampler"] == sampler]))
    return out


def _result(arm: Arm, sampler: str, rows: Sequence[Row]) -> Result:
    rows = sorted(rows, key=lambda row: row["seed"] or 0)
    scores = {
        name: np.array([row["per_session"][name] for row in rows], dtype=np.float64)
        for name in WEIGHTS
    }
    modes = np.array(rows[0]["per_session"]["mode"])
    return Result(arm, sampler, tuple(row["seed"] for row in rows), scores, modes, tuple(rows))
