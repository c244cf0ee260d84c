"""Reads a run folder into dataclasses. Only one of metrics and strips must be there; what lacks is
None or empty."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editr2.errors import DataError
from editr2.files import runs_near
from editr2.run.tracking import read_metrics

SCORES = {
    "IF": "instruction following",
    "CC": "content consistency",
    "GA": "global awareness",
}
"""The scores that pages know, and what they stand for."""

PASS_NAMES = ("before", "after")

MODES = {"cm": "standing rules", "cu": "pronouns"}
"""The context modes of sessions, in words."""

EQUAL = 0.005
"""Sessions whose mean reward changes by less count as unchanged: it would not show in two
decimals."""


@dataclass(frozen=True)
class Stat:
    mean: float | None = None
    se: float | None = None


@dataclass(frozen=True)
class TrainRow:
    iteration: int
    elapsed_s: float | None
    scalars: Mapping[str, float | None]
    turns: Mapping[str, tuple[float | None, ...]]
    """"reward_turn", "if_turn", ... → a value for each turn."""
    seconds: Mapping[str, float]
    non_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mode:
    """The part of an evaluation in one context mode (cm: standing rules, cu: pronouns)."""

    reward_turn: tuple[float | None, ...]
    success: float | None


@dataclass(frozen=True)
class EvaluationRow:
    """turns: of the judges of `eval.reward`, by `eval.` and their names."""

    name: str
    iteration: int | None
    sessions: int | None
    turns: Mapping[str, tuple[Stat, ...]]
    success: Stat
    by_mode: Mapping[str, Mode]


@dataclass(frozen=True)
class Comparison:
    """Before against after over the same sessions, so that `se` is that of the paired
    difference."""

    turn: int
    reward_before: float | None
    reward_after: float | None
    difference: float | None
    se: float | None
    sessions: int | None
    success_before: float | None
    success_after: float | None


@dataclass(frozen=True)
class StripTurn:
    instruction: str
    intent: str | None
    reasoning: str | None
    thought: str | None
    expected: str | None
    image: str | None
    scores: Mapping[str, float | None]
    does_not_apply: Sequence[str]
    """Of the scores, those of rewards that do not apply to the turn."""
    reward: float | None
    advantage: float | None
    reason: str | None
    masked: bool
    whys: Mapping[str, str]
    """By score, what its reward said of it; older runs have none."""


@dataclass(frozen=True)
class Strip:
    id: str
    mode: str | None
    image: str | None
    turns: tuple[StripTurn, ...]


@dataclass(frozen=True)
class Pair:
    """One session before and after training; either may be absent."""

    id: str
    before: Strip | None
    after: Strip | None

    @property
    def either(self) -> Strip:
        strip = self.after or self.before
        assert strip is not None
        return strip

    def rewards(self) -> tuple[float | None, float | None]:
        """Mean reward before and after. With both passes, over the turns that have a reward in
        both."""
        before = [turn.reward for turn in self.before.turns] if self.before else []
        after = [turn.reward for turn in self.after.turns] if self.after else []
        if self.before and self.after:
            pairs = zip(before, after, strict=False)
            both = [(b, a) for b, a in pairs if b is not None and a is not None]
            return mean(b for b, _ in both), mean(a for _, a in both)
        return mean(before), mean(after)

    @property
    def change(self) -> float | None:
        before, after = self.rewards()
        return None if before is None or after is None else after - before

    @property
    def verdict(self) -> str:
        """ "better", "equal", "worse" or "unpaired"."""
        if self.change is None:
            return "unpaired"
        if abs(self.change) < EQUAL:
            return "equal"
        return "better" if self.change > 0 else "worse"


@dataclass
class RecordedRun:
    folder: Path
    train: list[TrainRow] = field(default_factory=list)
    evaluations: list[EvaluationRow] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    start: Mapping[str, Any] = field(default_factory=dict)
    config_text: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name → value."""
    best: Mapping[str, Any] | None = None
    """Of `checkpoint.best`: metric, iteration and value."""
    stopped: str | None = None
    """Why it ended before its last iteration."""
    alarms: list[str] = field(default_factory=list)
    """What evaluations raised, a line for each time it began."""
    missing: list[str] = field(default_factory=list)
    """Sentences for the reader: what this report could not show, and why."""

    @property
    def alone(self) -> bool:
        """Whether it is an evaluation without a training, by `editr2 eval`: it stands where others
        have the one after training."""
        return self.start.get("command") == "eval"

    def evaluation(self, name: str) -> EvaluationRow | None:
        """The last one of that name: a resumed run may have evaluated again."""
        if self.alone:
            return self.evaluations[-1] if name == "after" and self.evaluations else None
        return next((e for e in reversed(self.evaluations) if e.name == name), None)

    def setting(self, *names: str) -> Any:
        """The first setting whose dotted name is or ends in one of `names`, looked for in that
        order."""
        for name in names:
            for key, value in self.config.items():
                if f".{key}".endswith(f".{name}") and value is not None:
                    return value
        return None

    @property
    def evaluation_off(self) -> bool:
        return self.config.get("eval.sessions") == 0

    def train_seconds(self) -> float | None:
        """Time spent; a clock that a resumed run started anew is added up."""
        total, last = 0.0, 0.0
        times = [row.elapsed_s for row in self.train if row.elapsed_s is not None]
        for now in times:
            if now < last:
                total += last
            last = now
        return total + last if times else None


def load_run(folder: Path) -> RecordedRun:
    """Raises DataError where the folder has neither metrics.jsonl nor strips."""
    run = RecordedRun(folder)
    metrics = folder / "metrics.jsonl"
    strips = {name: folder / "strips" / f"{name}.json" for name in PASS_NAMES}
    if not metrics.exists() and not any(path.exists() for path in strips.values()):
        raise DataError(
            f"{folder} holds no run: neither metrics.jsonl nor strips/before.json nor after.json"
            f"{runs_near(folder)}"
        )
    if metrics.exists():
        _load_metrics(run, metrics)
    else:
        run.missing.append("There is no metrics.jsonl: no curves and no evaluation.")
    _load_config(run, folder / "config.yaml")
    _load_strips(run, strips)
    _note_absences(run)
    return run


def _load_metrics(run: RecordedRun, path: Path) -> None:
    rows, dropped = read_metrics(path)
    if dropped:
        run.missing.append(
            f"{dropped} unreadable {plural('line', dropped)} of metrics.jsonl "
            f"{'was' if dropped == 1 else 'were'} left out (a run that is killed tears its last "
            "line)."
        )
    train: dict[int, TrainRow] = {}
    comparisons: dict[int, Comparison] = {}
    repeats, standing = 0, set[str]()
    for row in rows:
        event = row.get("event")
        if event == "train" and (iteration := _int(row.get("iteration"))) is not None:
            repeats += iteration in train
            train[iteration] = _train_row(iteration, row)
        elif event == "eval":
            run.evaluations.append(_evaluation(row))
            raised = _mapping(row.get("alarms"))
            begun = (text for name, text in raised.items() if name not in standing)
            run.alarms += [f"Evaluation at iteration {row.get('iteration')}: {x}." for x in begun]
            standing = set(raised)
        elif event == "comparison" and (turn := _int(row.get("turn"))) is not None:
            comparisons[turn] = _comparison(turn, row)
        elif event == "start":
            run.start = row
        elif event == "stop":
            run.stopped = _text(row.get("reason"))
        if event == "eval" and isinstance(row.get("best"), dict):
            run.best = row["best"]
        if event == "train":
            run.stopped = None  # it went on
    run.train = [train[i] for i in sorted(train)]
    run.comparisons = [comparisons[t] for t in sorted(comparisons)]
    if repeats:
        run.missing.append(
            f"{repeats} {plural('iteration', repeats)} of metrics.jsonl repeated; the last row of "
            f"each is shown."
        )
    run.missing += _non_finite(run.train)


def _non_finite(train: Sequence[TrainRow]) -> list[str]:
    names = sorted({name.split(".")[0] for row in train for name in row.non_finite})
    count = sum(bool(row.non_finite) for row in train)
    iterations = f"{count} {plural('iteration', count)}"
    return [f"{', '.join(names)}: NaN or infinite in {iterations}, shown as gaps."] * bool(names)


def _comparison(turn: int, row: Mapping[str, Any]) -> Comparison:
    return Comparison(
        turn=turn,
        reward_before=number(row.get("reward_before")),
        reward_after=number(row.get("reward_after")),
        difference=number(row.get("difference")),
        se=number(row.get("se")),
        sessions=_int(row.get("sessions")),
        success_before=number(row.get("success_before")),
        success_after=number(row.get("success_after")),
    )


def _train_row(iteration: int, row: Mapping[str, Any]) -> TrainRow:
    non_finite = row.get("non_finite")
    seconds = {str(k): number(v) for k, v in _mapping(row.get("seconds")).items()}
    return TrainRow(
        iteration=iteration,
        elapsed_s=number(row.get("elapsed_s")),
        scalars={k: number(v) for k, v in row.items() if v is None or number(v) is not None},
        turns={name: tuple(map(number, values)) for name, values in _by_turn(row)},
        seconds={phase: value for phase, value in seconds.items() if value is not None},
        non_finite=tuple(map(str, non_finite)) if isinstance(non_finite, list) else (),
    )


def _evaluation(row: Mapping[str, Any]) -> EvaluationRow:
    modes = _mapping(row.get("by_mode"))
    by_turn = dict(_by_turn(row))
    by_turn |= _by_turn(_mapping(row.get("drift")))
    by_turn |= {f"eval.{k}": v for k, v in _by_turn(_mapping(row.get("eval_reward")))}
    return EvaluationRow(
        name=str(row.get("name", "")),
        iteration=_int(row.get("iteration")),
        sessions=_int(row.get("sessions")),
        turns={name: tuple(map(_stat, values)) for name, values in by_turn.items()},
        success=_stat(row.get("success")),
        by_mode={str(m): _mode(value) for m, value in modes.items() if isinstance(value, dict)},
    )


def _mode(value: Mapping[str, Any]) -> Mode:
    rewards = value.get("reward_turn") or ()
    return Mode(tuple(map(number, rewards)), number(value.get("success")))


def _by_turn(row: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Of a row of metrics, what has a value a turn."""
    for name, values in row.items():
        if name.endswith("_turn") and isinstance(values, list):
            yield name, values


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _load_strips(run: RecordedRun, paths: Mapping[str, Path]) -> None:
    passes: dict[str, dict[str, Strip]] = {}
    for name, path in paths.items():
        if not path.exists():
            continue
        try:
            text = path.read_text("utf-8", errors="replace")
            sessions = json.loads(text, parse_constant=lambda _: None)["sessions"]
            passes[name] = {strip.id: strip for strip in map(_strip, sessions)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            run.missing.append(f"strips/{path.name} is not readable: {what}")
    before, after = (passes.get(name, {}) for name in PASS_NAMES)
    run.pairs = [Pair(id, before.get(id), after.get(id)) for id in {**before, **after}]
    if not passes and run.config.get("eval.strips") != 0:
        run.missing.append("There are no strips: no session images to show.")
    for name in PASS_NAMES:
        if passes and name not in passes and not run.alone:
            run.missing.append(
                f"The strips have no “{name}” pass: sessions are shown, not compared."
            )
    alone = before.keys() ^ after.keys()
    if len(passes) == 2 and alone:
        run.missing.append(
            f"{len(alone)} {plural('session', len(alone))} of the strips only in one pass."
        )


def _strip(value: Mapping[str, Any]) -> Strip:
    return Strip(
        id=str(value["id"]),
        mode=_text(value.get("mode")),
        image=_text(value.get("image")),
        turns=tuple(map(_strip_turn, value.get("turns") or ())),
    )


def _strip_turn(value: Mapping[str, Any]) -> StripTurn:
    scores = value.get("scores") or {}
    return StripTurn(
        instruction=_text(value.get("instruction")) or "",
        intent=_text(value.get("intent")),
        reasoning=_text(value.get("reasoning")),
        thought=_text(value.get("thought")),
        expected=_text(value.get("expected")),
        image=_text(value.get("image")),
        scores={name: number(scores.get(name)) for name in scores or SCORES},
        does_not_apply=tuple(map(str, value.get("does_not_apply") or ())),
        reward=number(value.get("reward")),
        advantage=number(value.get("advantage")),
        reason=_text(value.get("reason")),
        masked=bool(value.get("masked")),
        whys={str(name): str(why) for name, why in _mapping(value.get("why")).items() if why},
    )


SECRET = re.compile(
    r"(?im)^(\s*(?:-\s+)?[\w.-]*(?:api_?key|secret|password|auth_token|access_token)\s*:[ "
    r"\t]+)(?!null\b|~|''|\"\").+$"
)
CREDENTIALS = re.compile(r"://[^/\s@]+@")


def _load_config(run: RecordedRun, path: Path) -> None:
    if not path.exists():
        run.missing.append("There is no config.yaml.")
        return
    # The page gets sent around; an API key of a judge must not go with it.
    text = SECRET.sub(r"\1(withheld)", path.read_text("utf-8", errors="replace"))
    run.config_text = CREDENTIALS.sub("://(withheld)@", text)
    import yaml

    try:
        run.config = dict(_dotted(yaml.safe_load(run.config_text)))
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: of dates, numbers
        said = next(iter(str(error).splitlines()), type(error).__name__)
        run.missing.append(f"config.yaml is not YAML: {said}")


def _dotted(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)] if prefix else []
    found = []
    for key, inner in value.items():
        found += _dotted(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _note_absences(run: RecordedRun) -> None:
    planned = _int(run.setting("iterations", "max_iterations", "num_iterations"))
    if run.stopped is None and run.train and planned and run.train[-1].iteration + 1 < planned:
        run.missing.append(f"The run is at iteration {run.train[-1].iteration + 1} of {planned}.")
    if run.start.get("heldout_is_training"):
        run.missing.append(
            "No held-out sessions were given: the evaluations are on the training sessions."
        )
    if run.evaluation_off and not run.evaluations:
        run.missing.append(
            "Evaluation was off (eval.sessions: 0): no held-out session says how the run ended."
        )
    elif (run.train or run.evaluations) and not run.alone:
        for name in PASS_NAMES:
            if run.evaluation(name) is None:
                run.missing.append(f"There is no evaluation “{name}”.")


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _int(value: Any) -> int | None:
    value = number(value)
    return None if value is None else int(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _stat(value: Any) -> Stat:
    if isinstance(value, dict):
        return Stat(number(value.get("mean")), number(value.get("se")))
    return Stat(number(value))
