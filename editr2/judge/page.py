"""`judge.html`: the tables of a trial, and every session's images turn by turn with what was said
of them. One file, without scripts, as the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from editr2.judge.summary import Agreement, Of, nanmean, sessions_of, values_of
from editr2.judge.text import Table, call_lines, headline, state_lines, tables
from editr2.judge.trial import Trial
from editr2.report import pages
from editr2.report.charts import Chart
from editr2.report.data import MODES
from editr2.report.gallery import Why, thin
from editr2.report.numbers import decimal
from editr2.report.pictures import picture_of
from editr2.report.strips import Bar, Cell, SessionView, TurnView
from editr2.rewards.base import Score, shortened

MOST_OUTPUTS = 8
"""Siblings of a session that are shown."""


def write_page(
    path: Path,
    trial: Trial,
    scores: Sequence[Of],
    agreements: Sequence[tuple[str, Sequence[Agreement]]],
    *,
    price: float | None = None,
    rewards: np.ndarray | None = None,
    more: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    max_sessions: int = 48,
    max_pixels: int = 512,
) -> None:
    """rewards: the weighted sums [outputs, T], None of no sum. more: tables behind the others, and
    charts behind them. More sessions than max_sessions are thinned evenly; larger images than
    max_pixels are scaled down."""
    session = sessions_of(trial)
    total = int(session.max()) + 1
    shown = thin(range(total), max_sessions)
    means = nanmean(values_of(trial), 1)
    pages.write_page(
        path,
        "judge.html.j2",
        [Path(__file__).parent / "templates"],
        title=path.resolve().parent.name,
        headline=headline(trial),
        facts=list(trial.facts.items()),
        notes=[*trial.notes, *call_lines(trial, price), *state_lines(scores)],
        tables=[*tables(trial, scores, agreements), *more],
        charts=charts,
        sessions=[
            _session(trial, np.flatnonzero(session == n), means, rewards, max_pixels) for n in shown
        ],
        total=total,
    )


def _session(
    trial: Trial,
    places: np.ndarray,
    means: np.ndarray,
    rewards: np.ndarray | None,
    max_pixels: int,
) -> SessionView:
    some = thin([int(place) for place in places], MOST_OUTPUTS)
    outputs = [trial.outputs[place] for place in some]
    session = outputs[0].session
    pixels = [output.read() for output in outputs]
    turns = []
    for t, turn in enumerate(session.turns):
        cells = [
            Cell(
                output.name,
                picture_of(images[t], max_pixels),
                f"{output.name}, after turn {t + 1}: {turn.instruction}",
                [
                    *_bars(trial, place, t, means[place, t]),
                    *([] if rewards is None else [_reward_bar(float(rewards[place, t]))]),
                ],
                problems=_failed(trial, place, t),
            )
            for place, output, images in zip(some, outputs, pixels, strict=True)
        ]
        turns.append(TurnView(t + 1, turn.instruction, cells))
    mode = session.mode
    left_out = len(places) - len(some)
    note = f"{left_out} of {len(places)} outputs are not shown"
    return SessionView(
        session.id,
        MODES.get(mode, mode) if mode else None,
        picture_of(session.image, max_pixels),
        turns,
        len(some),
        notes=[note] if left_out else [],
    )


def _bars(trial: Trial, place: int, turn: int, means: np.ndarray) -> list[Bar]:
    bars = []
    for name, mean in zip(trial.names, means, strict=True):
        answers = [rows[turn][name] for rows in trial.answers[place]]
        apart = all(not answer.applies for answer in answers)
        text = (
            decimal(float(mean)) if not np.isnan(mean) else "does not apply" if apart else "failed"
        )
        percent = None if np.isnan(mean) else 100 * float(mean)
        bars.append(Bar(name, text, percent, _why(answers), _range(answers)))
    return bars


def _range(answers: Sequence[Score]) -> str | None:
    values = [answer.value for answer in answers if answer.value is not None]
    if len(values) < 2 or max(values) - min(values) < 0.005:
        return None
    return f"{decimal(min(values))} to {decimal(max(values))}"


def _why(answers: Sequence[Score]) -> Why | None:
    """What was said, of several answers the differing ones; failures stand below the scores."""
    said = [shortened(a.reason) for a in answers if a.reason and not a.failed]
    return Why.of(" / ".join(dict.fromkeys(said)))


def _failed(trial: Trial, place: int, turn: int) -> list[tuple[str, str]]:
    said = [
        f"{name}: {shortened(rows[turn][name].reason or '')}"
        for rows in trial.answers[place]
        for name in trial.names
        if rows[turn][name].failed
    ]
    return [("failed", "; ".join(dict.fromkeys(said)))] if said else []


def _reward_bar(reward: float) -> Bar:
    value = None if np.isnan(reward) else reward
    return Bar("reward", decimal(value), None)
