"""Run folder → `report.html`: prepares everything the template prints, so that the template only
places it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.errors import counted
from editr2.report import charts
from editr2.report.charts import Chart, Series
from editr2.report.data import (
    MODES,
    PASS_NAMES,
    SCORES,
    Comparison,
    EvaluationRow,
    RecordedRun,
    Stat,
    load_run,
    mean,
    number,
)
from editr2.report.gallery import Gallery, build_gallery
from editr2.report.numbers import decimal, signed, with_se
from editr2.report.pages import write_page
from editr2.report.pictures import Pictures
from editr2.report.sessions import session_table
from editr2.run.tracking import duration

HEALTH = {
    "loss": "loss",
    "kl": "KL to the reference",
    "clip_fraction": "clipped fraction",
    "advantage_abs": "mean |advantage|",
    "zero_variance_groups": "groups without variance",
    "failed_scores": "failed scores",
    "filtered_turns": "filtered turns",
    "intent_fallback": "intent fallback",
    "intents_right": "sampled intents equal to the known ones",
    "text_clip_fraction": "clipped fraction of intent tokens",
}


def build_report(
    run_dir: str | os.PathLike[str], *, max_sessions: int = 48, max_pixels: int = 512
) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    One file: images and the scripts of charts inline, nothing fetched. Works with what the folder
    has (metrics, strips of one or both passes) and says on the page what is missing; raises
    DataError where it has neither.

    max_sessions: more sessions than this are thinned evenly through their order from best to worst
        change.
    max_pixels: larger images are scaled down to this long side, or to less where a page of 3 MB
        asks for it.
    """
    folder = Path(run_dir)
    run = load_run(folder)
    gallery, pictures = _fitting(run, max_sessions, max_pixels)
    evaluated, curves, health = _evaluation_charts(run), _curves(run), _health(run)
    drawn = [json.dumps(chart.data) for chart in (*evaluated, *curves, *health)]
    taken = pictures.bytes + sum(map(len, drawn))
    table = session_table(run, PAGE - taken)
    return write_page(
        folder / "report.html",
        "report.html.j2",
        title=folder.resolve().name,
        facts=facts_of(run),
        cards=_cards(run),
        alarms=run.alarms,
        missing=run.missing + pictures.notes(),
        eval_charts=evaluated,
        eval_sessions=_kind(run),
        alone=run.alone,
        eval_table=evaluation_table(run),
        curves=curves,
        window=charts.smoothing_window(len(run.train)),
        health=health,
        gallery=gallery,
        table=table,
        colours=score_colours(run),
        strips_from=run.config.get("eval.strips_from"),
        judges=_judges(run),
        config=run.config_text,
        versions=_versions(run),
    )


PAGE = 2_800_000
"""Bytes of a page without its styles and scripts: with them it stays below 3 MB."""
STRIPS = 1_100_000
"""Of those, the film-strips' images."""
LEAST = 128
"""px: smaller than this an edit is not seen, and there are fewer sessions instead."""


def _fitting(
    run: RecordedRun, max_sessions: int, max_pixels: int
) -> tuple[Gallery | None, Pictures]:
    """The film-strips, with images as large and sessions as many as fit."""
    images = sum(1 + 2 * len(pair.either.turns) for pair in run.pairs[:max_sessions])
    side = int(min(max_pixels, max(LEAST, (STRIPS / max(images, 1) / 0.16) ** 0.5)))
    while True:
        pictures = Pictures(run.folder / "strips", side)
        gallery = build_gallery(run, pictures, max_sessions)
        over = pictures.bytes / STRIPS
        if over <= 1 or (side <= LEAST and max_sessions <= 1):
            return gallery, pictures
        if pictures.reduced and side > LEAST:
            side = max(LEAST, int(0.95 * side / over**0.5))
        else:
            max_sessions = max(1, int(0.95 * min(max_sessions, len(run.pairs)) / over))


# Headline


@dataclass(frozen=True)
class Card:
    title: str
    before: str | None
    after: str | None
    change: str
    note: str


def facts_of(run: RecordedRun) -> list[tuple[str, str]]:
    seconds = run.train_seconds()
    planned = run.setting("iterations", "max_iterations", "num_iterations")
    done = str(run.train[-1].iteration + 1) if run.train else None
    facts = {
        "Credit": run.setting("preset"),
        "Policy": run.setting("policy", "policy.name", "policy.kind", "model"),
        "Objective": run.setting("objective", "objective.name", "objective.kind", "algorithm"),
        "Each iteration" if run.train else "Sessions of": _size(run),
        "Iterations": f"{done} of {planned}" if done and planned else done,
        "Stopped early": run.stopped,
        "Best weights (best/)": _best(run),
        "Training time": duration(seconds) if seconds is not None else None,
        "Device": run.start.get("device"),
        "Seed": run.setting("seed"),
    }
    if run.alone:  # nothing was trained
        facts = {name: facts[name] for name in ("Policy", "Device", "Seed")}
        facts["Weights"] = run.config.get("policy.weights")
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _judges(run: RecordedRun) -> list[tuple[str, str]]:
    """What the rewards said of themselves when the run began: the model, the prompts' hash, how it
    answers."""
    said = run.start.get("judges")
    return [(str(k), str(v)) for k, v in said.items()] if isinstance(said, dict) else []


def _best(run: RecordedRun) -> str | None:
    if run.best is None:
        return None
    value = decimal(number(run.best.get("value")), 3)
    return f"{run.best.get('metric')} {value} at iteration {run.best.get('iteration')}"


def _size(run: RecordedRun) -> str | None:
    """Sessions × siblings × turns, as far as they are known."""
    counts = {
        "session": run.setting("groups", "sessions_per_iteration", "sessions"),
        "sibling": run.setting("siblings", "group_size", "num_generations"),
        # What was recorded first: rollout.turns is of drawn sessions, a set has its own.
        "turn": _turns(run) or run.setting("turns", "max_turns"),
    }
    return " × ".join(counted(count, name) for name, count in counts.items() if count) or None


def _turns(run: RecordedRun) -> int:
    lengths = [len(row.turns.get("reward_turn", ())) for row in run.train]
    lengths += [len(e.turns.get("reward_turn", ())) for e in run.evaluations]
    lengths += [len(pair.either.turns) for pair in run.pairs]
    return max(lengths, default=0)


def _cards(run: RecordedRun) -> list[Card]:
    before, after = (run.evaluation(name) for name in PASS_NAMES)
    if before or after:
        return [_reward_card(run, before, after), _success_card(before, after)]
    rewards = [row.scalars.get("reward") for row in run.train]
    present = [reward for reward in rewards if reward is not None]
    return [_training_card(rewards)] if len(rewards) > 1 and present else []


def _training_card(rewards: Sequence[float | None]) -> Card:
    """The first tenth of training against the last, where there is no evaluation."""
    part = max(1, len(rewards) // 10)
    first, last = mean(rewards[:part]), mean(rewards[-part:])
    ends = "the first and last iteration"
    if part > 1:
        ends = f"means of the first and last {part} iterations"
    note = f"{ends}; not a held-out evaluation"
    return Card("Training reward", decimal(first), decimal(last), _change(first, last), note)


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else signed(after - before)


def _reward_card(
    run: RecordedRun, before: EvaluationRow | None, after: EvaluationRow | None
) -> Card:
    """At the last turn that every evaluation has."""
    evaluations = (before, after)
    turn = min((len(e.turns.get("reward_turn", ())) for e in evaluations if e), default=0)
    stats = [e.turns["reward_turn"][turn - 1] if e and turn else None for e in evaluations]
    paired = next((c for c in run.comparisons if c.turn == turn), None)
    if paired and paired.difference is not None:
        change, note = _paired(paired)
    else:
        change, note = _change(*(s.mean if s else None for s in stats)), _sessions(before or after)
    said = [with_se(stat) if stat else None for stat in stats]
    return Card(f"Reward at turn {turn}", said[0], said[1], change, note)


def _paired(paired: Comparison) -> tuple[str, str]:
    """The difference session by session, and how sure it is."""
    assert paired.difference is not None
    sessions = f" over {counted(paired.sessions, 'session')}" if paired.sessions else ""
    if not paired.se:
        return signed(paired.difference), f"paired{sessions}"
    ratio = abs(paired.difference) / paired.se
    verdict = f"{ratio:.1f} standard errors"
    if ratio < 2:
        verdict = f"only {verdict}: may be chance"
    decimals = 3 if paired.se < 0.01 else 2
    change = f"{signed(paired.difference, decimals)} ± {paired.se:.{decimals}f}"
    return change, f"paired difference{sessions}; {verdict}"


def _success_card(before: EvaluationRow | None, after: EvaluationRow | None) -> Card:
    stats = [e.success if e else None for e in (before, after)]
    said = [with_se(stat) if stat else None for stat in stats]
    change = _change(*(stat.mean if stat else None for stat in stats))
    note = f"every turn right; {_sessions(before or after)}"
    return Card("Session success", said[0], said[1], change, note)


def _sessions(evaluation: EvaluationRow | None) -> str:
    if evaluation and evaluation.sessions:
        return counted(evaluation.sessions, "session")
    return "number of sessions not stated"


# Charts

REWARD, SUCCESS, PLAIN = 0, 4, 5
"""Colours of `charts` that are not of a score: the reward, session success, and what is none."""
SCORE_COLOURS = {"IF": 1, "CC": 2, "GA": 3}
OWN_COLOURS = (6, 7, 8)


def score_colours(run: RecordedRun) -> dict[str, int]:
    """Colours by the name of a score, the same in all charts and strips of a page."""
    own = [name for name in _score_metrics(run).values() if name not in SCORE_COLOURS]
    return SCORE_COLOURS | {name: OWN_COLOURS[k % 3] for k, name in enumerate(own)}


def _curves(run: RecordedRun) -> list[Chart]:
    """Of training rows, at the iterations as the terminal counts them, which are of the weights
    before; evaluations are at the iterations done."""
    x = [row.iteration + 1 for row in run.train]
    window = charts.smoothing_window(len(x))
    colours = score_colours(run)

    def line(title: str, of: Sequence[Series], note: str = "") -> Chart | None:
        return charts.line_chart(title, x, of, window=window, note=note) if x else None

    scores = [
        Series(name, [mean(row.turns.get(key, ())) for row in run.train], colours[name])
        for key, name in _score_metrics(run).items()
    ]
    success = Series("success", _scalars(run, "success"), SUCCESS)
    found = [
        line("Reward by turn", _reward_series(run)),
        line(
            "Scores, mean over turns",
            scores,
            _in_words(one.label for one in scores if not one.empty),
        ),
        line("Session success", [success], "Share of training sessions with every turn right."),
        *_evaluated_charts(run),
        _apart_chart(run),
        _ratio_chart(run, x),
        line("Gradient norm", [Series("gradient norm", _scalars(run, "grad_norm"), PLAIN)]),
        _seconds_chart(run, x),
    ]
    return [chart for chart in found if chart is not None]


def _scalars(run: RecordedRun, key: str) -> list[float | None]:
    return [row.scalars.get(key) for row in run.train]


def _in_words(names: Iterable[str]) -> str:
    """What the scores that pages know stand for; nothing of a reward's own."""
    known = [f"{name} {SCORES[name]}" for name in names if name in SCORES]
    return f"{', '.join(known)}." if known else ""


def _reward_series(run: RecordedRun) -> list[Series]:
    """A series a turn; one for all where a run recorded no turns."""
    by_turn = [row.turns.get("reward_turn", ()) for row in run.train]
    turns = max(map(len, by_turn), default=0)
    if not turns:
        return [Series("reward", _scalars(run, "reward"), REWARD)]
    columns = [[v[t] if t < len(v) else None for v in by_turn] for t in range(turns)]
    return charts.of_turns("turn ", REWARD, columns)


def _ratio_chart(run: RecordedRun, x: Sequence[float]) -> Chart | None:
    y = _scalars(run, "ratio_error")
    exact = sum(value == 0 for value in y)
    exactly = f"; exactly 0 in {exact} of {len(y)} iterations." if exact else "."
    note = f"|ratio − 1| when the rollout is replayed before the update{exactly}"
    return charts.log_chart("Ratio error", x, Series("|ratio − 1|", y, PLAIN), note) if x else None


def _evaluated(run: RecordedRun) -> list[EvaluationRow]:
    """One an iteration, in their order: the last of several."""
    found = {e.iteration: e for e in run.evaluations if e.iteration is not None}
    return [found[iteration] for iteration in sorted(found)]


def _evaluated_charts(run: RecordedRun) -> list[Chart]:
    """The evaluations during training. Two are the before and after above; more make a curve."""
    of = _evaluated(run)
    if len(of) <= 2:
        return []
    at = [float(e.iteration or 0) for e in of]
    known, colours = _score_metrics(run), score_colours(run)
    note = f"{_kind(run).capitalize()} sessions, {len(of)} evaluations."

    def last(key: str) -> list[Stat]:
        return [e.turns[key][-1] if e.turns.get(key) else Stat() for e in of]

    by_turn = [e.turns.get("reward_turn", ()) for e in of]
    columns = [
        [stats[t] if t < len(stats) else Stat() for stats in by_turn]
        for t in range(max(map(len, by_turn)))
    ]
    rewards = charts.of_turns(
        "turn ",
        REWARD,
        [[stat.mean for stat in column] for column in columns],
        ends=[[_ends(stat) for stat in column] for column in columns],
    )
    scores = [
        Series(name, [stat.mean for stat in stats], colours[name], ends=list(map(_ends, stats)))
        for key, name in known.items()
        for stats in (last(key),)
    ]
    success = [e.success for e in of]
    right = Series("success", [s.mean for s in success], SUCCESS, ends=list(map(_ends, success)))
    found = [
        charts.line_chart("Reward by turn, evaluated", at, rewards, note=note),
        charts.line_chart("Scores of the last turn, evaluated", at, scores, note=note),
        charts.line_chart("Session success, evaluated", at, [right], note=note),
    ]
    return [chart for chart in found if chart is not None]


def _ends(stat: Stat) -> tuple[float, float] | None:
    """One standard error to each side."""
    if stat.mean is None or not stat.se:
        return None
    return stat.mean - stat.se, stat.mean + stat.se


def _kind(run: RecordedRun) -> str:
    """What the sessions of its evaluations are."""
    if run.alone:
        return "evaluated"  # nothing says whether anybody trained on them
    return "training" if run.start.get("heldout_is_training") else "held-out"


def _apart_chart(run: RecordedRun) -> Chart | None:
    """The trained reward beside what the judges of `eval.reward` say, mean over turns."""
    of = [e for e in _evaluated(run) if "eval.reward_turn" in e.turns]
    if len(of) < 2:
        return None
    names = {"trained": ("reward_turn", REWARD), "eval.reward": ("eval.reward_turn", 8)}
    series = [
        Series(name, [mean(s.mean for s in e.turns.get(key, ())) for e in of], colour)
        for name, (key, colour) in names.items()
    ]
    return charts.line_chart(
        "Trained reward and eval.reward",
        [float(e.iteration or 0) for e in of],
        series,
        note="Mean over turns, evaluated; training never asks the judges of eval.reward.",
    )


def _seconds_chart(run: RecordedRun, x: Sequence[float]) -> Chart | None:
    names = list(dict.fromkeys(name for row in run.train for name in row.seconds))
    phases = [(name, [row.seconds.get(name, 0.0) for row in run.train]) for name in names]
    return charts.stacked("Seconds by phase", x, phases)


SCORE_METRICS = {"if_turn": "IF", "cc_turn": "CC", "ga_turn": "GA"}


def _score_metrics(run: RecordedRun) -> dict[str, str]:
    """Keys of the metrics and the names of their scores: the papers' three, then the run's own."""
    own = run.start.get("rewards")
    return SCORE_METRICS | {f"{name.lower()}_turn": name for name in _names(own)}


def _names(weights: object) -> list[str]:
    return [str(name) for name in weights] if isinstance(weights, dict) else []


def _evaluation_charts(run: RecordedRun) -> list[Chart]:
    present = [e for name in PASS_NAMES if (e := run.evaluation(name))]
    metrics = {"reward_turn": "Reward", **_score_metrics(run)}
    reach = _reach(present, metrics)
    if not reach:
        return []
    # One scale for all panels: reward, scores and success are read against each other.
    y_range, colours = charts.value_range(reach), score_colours(run)
    found = []
    for key, name in metrics.items():
        by_turn = [e.turns.get(key, ()) for e in present]
        turns = [str(t + 1) for t in range(max(map(len, by_turn)))]
        colour = colours.get(name, REWARD)
        found.append(_panel(name, present, by_turn, turns, y_range, "turn", colour))
    success = [(e.success,) for e in present]
    found.append(_panel("Session success", present, success, ["all turns"], y_range, "", SUCCESS))
    modes = list(dict.fromkeys(mode for e in present for mode in e.by_mode))
    by_mode = [[Stat(_last_reward(e, mode)) for mode in modes] for e in present]
    words = [MODES.get(mode, mode) for mode in modes]
    name = "Last-turn reward by kind of session"
    found.append(_panel(name, present, by_mode, words, y_range, "", REWARD))
    return [chart for chart in found if chart is not None]


def _reach(evaluations: Sequence[EvaluationRow], metrics: Iterable[str]) -> list[float]:
    """Every value that the evaluations' panels draw, with the ends of its bar."""
    stats = [s for e in evaluations for key in metrics for s in e.turns.get(key, ())]
    stats += [e.success for e in evaluations]
    stats += [Stat(_last_reward(e, mode)) for e in evaluations for mode in e.by_mode]
    drawn = [(s.mean, s.se or 0.0) for s in stats if s.mean is not None]
    return [end for mean, se in drawn for end in (mean - se, mean + se)]


def _last_reward(evaluation: EvaluationRow, mode: str) -> float | None:
    """The reward of the last turn of the sessions of one mode; None where there are none."""
    part = evaluation.by_mode.get(mode)
    return part.reward_turn[-1] if part and part.reward_turn else None


def _panel(
    name: str,
    evaluations: Sequence[EvaluationRow],
    stats: Sequence[Sequence[Stat]],
    categories: Sequence[str],
    y_range: tuple[float, float],
    axis: str,
    colour: int,
) -> Chart | None:
    """A series an evaluation, over categories; `stats` of one may end before the categories do."""
    series = []
    for evaluation, values in zip(evaluations, stats, strict=True):
        padded = [*values, *[Stat()] * (len(categories) - len(values))]
        kind: charts.Kind = "hollow" if evaluation.name == PASS_NAMES[0] else "dot"
        y = [stat.mean for stat in padded]
        series.append(Series(evaluation.name, y, colour, kind, list(map(_ends, padded))))
    return charts.dot_chart(name, categories, series, y_range, axis)


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def evaluation_table(run: RecordedRun) -> Table | None:
    """Every score before and after training with its standard error; None without an evaluation."""
    present = [e for name in PASS_NAMES if (e := run.evaluation(name))]
    if not present:
        return None
    rows = _score_rows(present, {"reward_turn": "Reward", **_score_metrics(run)})
    rows.append(("Session success", [with_se(e.success) for e in present]))
    for mode in dict.fromkeys(mode for e in present for mode in e.by_mode):
        rows += _mode_rows(mode, present)
    head = [f"{e.name} ({_sessions(e)})" for e in present]
    if len(present) == 2:
        head.append("paired difference")
        by_turn = {f"Reward, turn {c.turn}": Stat(c.difference, c.se) for c in run.comparisons}
        for name, cells in rows:
            stat = by_turn.get(name)
            cells.append("" if stat is None or stat.mean is None else _difference(stat))
    return Table(head, [row for row in rows if any(cell not in ("–", "") for cell in row[1])])


def _score_rows(
    evaluations: Sequence[EvaluationRow], known: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """A row for every turn of every score: a user's own under their names, first. known: names of
    keys."""
    names = {
        key: known.get(key, key.removesuffix("_turn"))
        for e in evaluations
        for key in e.turns
        if key != "marginal_turn"
    }
    rows = []
    for key, name in {**names, **known}.items():
        by_turn = [e.turns.get(key, ()) for e in evaluations]
        for t in range(max(map(len, by_turn))):
            cells = [with_se(stats[t]) if t < len(stats) else "–" for stats in by_turn]
            rows.append((f"{name}, turn {t + 1}", cells))
    return rows


def _mode_rows(mode: str, evaluations: Sequence[EvaluationRow]) -> list[tuple[str, list[str]]]:
    """Rewards and success of the sessions of one mode."""
    parts = [e.by_mode.get(mode) for e in evaluations]
    said = f"{mode} ({MODES[mode]})" if mode in MODES else mode
    rewards = [part.reward_turn if part else () for part in parts]
    rows = []
    for t in range(max(map(len, rewards))):
        cells = [decimal(values[t] if t < len(values) else None) for values in rewards]
        rows.append((f"Reward, turn {t + 1}, {said}", cells))
    success = [decimal(part.success if part else None) for part in parts]
    return [*rows, (f"Session success, {said}", success)]


def _difference(stat: Stat) -> str:
    text = with_se(stat)
    return text if text.startswith("−") else f"+{text}"


def _health(run: RecordedRun) -> list[Chart]:
    """Small charts of what says whether training is sound."""
    x = [row.iteration + 1 for row in run.train]
    found = [
        charts.line_chart(name, x, [Series(name, _scalars(run, key), PLAIN)], small=True)
        for key, name in HEALTH.items()
        if x
    ]
    return [chart for chart in found if chart is not None]


# Versions


def _versions(run: RecordedRun) -> tuple[str, Mapping[str, Any]]:
    """(whose they are, name → version): the run's own where it recorded them, else this
    process's."""
    recorded = run.start.get("versions")
    if isinstance(recorded, dict):
        return "as recorded by the run", recorded
    found = {"python": platform.python_version()}
    for name in ("editr2", "torch", "triton", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return "of the process that wrote this page; the run recorded none", found
