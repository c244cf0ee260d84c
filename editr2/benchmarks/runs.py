"""Runs side by side: what each is, their curves over one another, and every one held against the
first, session by session."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from editr2.benchmarks.against import Pair, pair_of
from editr2.benchmarks.compare import write_comparison
from editr2.benchmarks.compare_page import RunsView, colours_of
from editr2.benchmarks.sampled import sampled_apart
from editr2.benchmarks.sides import HELD_OUT, METRICS, Side, check_instructions, sides_of, unlike
from editr2.errors import ConfigError, UserError
from editr2.files import runs_near
from editr2.judge.text import Table
from editr2.report import charts
from editr2.report.build import SCORE_METRICS, facts_of
from editr2.report.charts import Chart, Series
from editr2.report.data import EvaluationRow, RecordedRun, Stat, load_run, mean
from editr2.report.numbers import with_se
from editr2.run.tracking import duration


def compare_runs(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> list[str]:
    """Writes `compare.html` and its tables into `out`, and returns the lines to print.

    Runs that were not evaluated on the same sessions, or not judged alike, are shown beside the
    first and said not to be held against it; of such that differ in their sessions alone, those
    that both have are compared. Raises `UserError` for folders that hold no run with an evaluation.
    """
    for folder in folders:
        if not (Path(folder) / METRICS).is_file():
            raise ConfigError(
                f"editr2 report: {folder}: no {METRICS} (accepted: folders of runs; those of "
                f"benchmarks are compared by editr2 benchmark --compare{runs_near(Path(folder))})"
            )
    try:
        sides = sides_of(folders)
    except ConfigError as error:  # it names the flag of `editr2 benchmark`
        raise ConfigError(f"editr2 report: {str(error).removeprefix('--compare: ')}") from error
    runs = [load_run(Path(folder)) for folder in folders]
    lines, pairs = list[str](), list[Pair]()
    for other in sides[1:]:
        pair, said = _paired(sides[0], other)
        pairs += pair
        lines += said
    lines += sampled_apart(sides)
    view = RunsView(_table(sides, runs), _charts(sides, runs), lines)
    return [*lines, *write_comparison(sides, pairs, out, view)]


def _paired(first: Side, other: Side) -> tuple[list[Pair], list[str]]:
    """The pair, where there is one, and what must be said of it."""
    apart = list(unlike(first, other))
    known = not (first.places or other.places)
    try:
        if any(what != HELD_OUT for what, _, _ in apart) or (apart and not known):
            what, a, b = next(x for x in apart if x[0] != HELD_OUT or not known)
            raise ConfigError(f"{what}: {_said(a)} of {first.name}, {_said(b)} of {other.name}")
        check_instructions(first, other)
        pair = pair_of(first, other)
    except UserError as error:
        reason = str(error).removeprefix("--compare: ").partition(" (accepted")[0]
        said = f"{other.name} is not held against {first.name} session by session: {reason}."
        return [], [said]
    if not apart:
        return [pair], []
    both = len(pair.parts[0].common)
    counts = " and ".join(f"{_count(side)} of {side.name}" for side in (first, other))
    return [pair], [f"Evaluated sessions differ: {counts}; the {both} that both have are compared."]


def _count(side: Side) -> int:
    return len({row.image for row in side.rows})


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------ what they are


def _table(sides: Sequence[Side], runs: Sequence[RecordedRun]) -> Table:
    facts = [dict(_facts(side, run)) for side, run in zip(sides, runs, strict=True)]
    names = dict.fromkeys(name for of in facts for name in of)
    rows = [(name, [of.get(name, "–") for of in facts]) for name in names]
    return Table("Runs", [side.name for side in sides], rows)


def _facts(side: Side, run: RecordedRun) -> Iterator[tuple[str, str]]:
    yield from facts_of(run)
    seconds = [sum(row.seconds.values()) for row in run.train if row.seconds]
    if seconds:
        yield "Seconds an iteration", duration(statistics.median(seconds))
    yield "Evaluated sessions", str(side.same[HELD_OUT])
    for name in ("before", "after"):
        if (of := run.evaluation(name)) is not None:
            rewards = of.turns.get("reward_turn", ())
            if rewards:
                yield f"Reward at turn {len(rewards)}, {name}", with_se(rewards[-1])
            yield f"Session success, {name}", with_se(of.success)


# ------------------------------------------------------------------------------------------- charts


def _charts(sides: Sequence[Side], runs: Sequence[RecordedRun]) -> list[Chart]:
    """Of all runs, a colour each."""
    colours = colours_of(sides)
    of = {side.name: run for side, run in zip(sides, runs, strict=True)}

    def last(key: str) -> Callable[[EvaluationRow], Stat]:
        return lambda row: row.turns[key][-1] if row.turns.get(key) else Stat()

    titles: dict[str, Callable[[EvaluationRow], Stat]] = {
        "Reward of the last turn, evaluated": last("reward_turn"),
        "Session success, evaluated": lambda row: row.success,
        **{f"{name} of the last turn, evaluated": last(k) for k, name in SCORE_METRICS.items()},
    }
    found = [_evaluated(title, of, value, colours) for title, value in titles.items()]
    found.append(_trained(of, colours))
    return [chart for chart in found if chart is not None]


def _evaluated(
    title: str,
    runs: Mapping[str, RecordedRun],
    value: Callable[[EvaluationRow], Stat],
    colours: Mapping[str, int],
) -> Chart | None:
    by_run = {
        name: {e.iteration: value(e) for e in run.evaluations if e.iteration is not None}
        for name, run in runs.items()
    }
    x = sorted({iteration for of in by_run.values() for iteration in of})
    series = []
    for name, of in by_run.items():
        stats = [of.get(iteration, Stat()) for iteration in x]
        ends = [
            (s.mean - s.se, s.mean + s.se) if s.mean is not None and s.se else None for s in stats
        ]
        series.append(Series(name, [s.mean for s in stats], colours[name], ends=ends))
    return charts.line_chart(title, x, series, spans=True) if x else None


def _trained(runs: Mapping[str, RecordedRun], colours: Mapping[str, int]) -> Chart | None:
    by_run = {
        name: {
            row.iteration + 1: mean(row.turns.get("reward_turn", ())) or row.scalars.get("reward")
            for row in run.train
        }
        for name, run in runs.items()
    }
    x = sorted({iteration for of in by_run.values() for iteration in of})
    series = [Series(name, [of.get(i) for i in x], colours[name]) for name, of in by_run.items()]
    window = charts.smoothing_window(len(x))
    note = "Mean over turns; each run on its own sessions."
    title = "Reward in training"
    return charts.line_chart(title, x, series, window=window, note=note) if x else None
