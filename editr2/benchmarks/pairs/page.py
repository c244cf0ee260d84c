"""`report.html` of a set of pairs: its tables, and the pairs that the reward got most wrong. One
file, without scripts, as the page of a trial (`judge.page`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from editr2.benchmarks.pairs.accuracy import Value, Verdict
from editr2.benchmarks.pairs.judging import Answers
from editr2.benchmarks.pairs.labelled import Labelled
from editr2.judge.page import TEMPLATES as JUDGE_TEMPLATES
from editr2.judge.text import Table
from editr2.report import TEMPLATES
from editr2.report.gallery import ScoreBar, Why
from editr2.report.numbers import decimal
from editr2.report.pictures import Picture, picture_of
from editr2.rewards.answers import TurnScores
from editr2.rewards.base import shortened

SHOWN = 24
"""Pairs that are shown as pictures."""

_OWN = Path(__file__).parent.parent / "templates"


@dataclass(frozen=True)
class Cell:
    name: str
    picture: Picture
    alt: str
    scores: Sequence[ScoreBar]


@dataclass(frozen=True)
class View:
    """A pair. by: the score it is judged by, with that of the better and of the worse output."""

    id: str
    groups: str
    instruction: str
    source: Picture
    cells: Sequence[Cell]
    by: str


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_OWN, JUDGE_TEMPLATES, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    wrong = sorted((v for v in verdicts if v.right == 0), key=lambda v: v.difference)
    shown = [_view(v, labelled, answers, max_pixels) for v in wrong[:SHOWN]]
    page = environment.get_template("pairs.html.j2").render(
        summary=summary,
        tables=tables,
        facts=[("reward", summary["reward"]["name"]), *summary["reward"]["facts"].items()],
        shown=shown,
        wrong=len(wrong),
    )
    part = path.with_name(path.name + ".part")
    part.write_bytes(page.replace("\0", "\ufffd").encode("utf-8", "replace"))
    os.replace(part, path)


def _view(verdict: Verdict, labelled: Labelled, answers: Answers, max_pixels: int) -> View:
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
        for said, output in (("people's choice", better), ("the other", worse))
    ]
    return View(
        verdict.comparison.id,
        ", ".join(f"{k} {v}" for k, v in verdict.comparison.groups.items()),
        instruction,
        picture_of(better.session.image, max_pixels),
        cells,
        f"{verdict.by}: {_text(verdict.better)} against {_text(verdict.worse)}",
    )


def _text(value: Value) -> str:
    return decimal(value.value)


def _bars(row: TurnScores) -> list[ScoreBar]:
    bars = []
    for name, score in row.items():
        text = decimal(score.value) if score.applies else "does not apply"
        percent = None if score.value is None else 100 * score.value
        bars.append(ScoreBar(name, text, percent, Why.of(shortened(score.reason or "") or None)))
    return bars
