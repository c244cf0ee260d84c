"""`report.html` of a set of pairs: its tables, and the pairs that the reward got most wrong. One
file, without scripts, as the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.accuracy import Verdict
from editr2.benchmarks.pairs.judging import Answers
from editr2.benchmarks.pairs.labelled import Labelled
from editr2.judge.text import Table
from editr2.report import pages
from editr2.report.gallery import Why
from editr2.report.numbers import decimal
from editr2.report.pictures import picture_of
from editr2.report.strips import Bar, Cell, SessionView, TurnView
from editr2.rewards.answers import TurnScores
from editr2.rewards.base import shortened

SHOWN = 24
"""Pairs that are shown as pictures."""

_OWN = Path(__file__).parent.parent / "templates"


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    tables: Sequence[Table],
    labelled: Labelled,
    answers: Answers,
    verdicts: Sequence[Verdict],
    *,
    max_pixels: int = 512,
) -> None:
    """Images larger than `max_pixels` are scaled down. Raises DataError for one that cannot be
    read."""
    wrong = sorted((v for v in verdicts if v.right == 0), key=lambda v: v.difference)
    pages.write_page(
        path,
        "pairs.html.j2",
        [_OWN],
        summary=summary,
        tables=tables,
        facts=[("reward", summary["reward"]["name"]), *summary["reward"]["facts"].items()],
        shown=[_view(v, labelled, answers, max_pixels) for v in wrong[:SHOWN]],
        wrong=len(wrong),
    )


def _view(verdict: Verdict, labelled: Labelled, answers: Answers, max_pixels: int) -> SessionView:
    pair = verdict.comparison.pairs[verdict.place]
    better, worse = (labelled.outputs[name] for name in (pair.better, pair.worse))
    instruction = better.session.turns[0].instruction
    cells = [
        Cell(
            said,
            picture_of(output.read()[0], max_pixels),
            f"{said}: {instruction}",
            _bars(answers[output.name]),
        )
        for said, output in (("preferred by people", better), ("the other", worse))
    ]
    return SessionView(
        verdict.comparison.id,
        None,
        picture_of(better.session.image, max_pixels),
        [TurnView(1, instruction, cells)],
        len(cells),
        notes=[f"{kind} {group}" for kind, group in verdict.comparison.groups.items()],
        change=verdict.by,
        changed=f"{decimal(verdict.better.value)} < {decimal(verdict.worse.value)}",
        verdict="worse",
    )


def _bars(row: TurnScores) -> list[Bar]:
    bars = []
    for name, score in row.items():
        text = decimal(score.value) if score.applies else "does not apply"
        percent = None if score.value is None else 100 * score.value
        bars.append(Bar(name, text, percent, Why.of(shortened(score.reason or "") or None)))
    return bars
