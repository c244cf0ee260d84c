"""`verifier.html`: the tables of an evaluation, and pairs with the traces of both outputs side by
side. One file, without scripts, as the report of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editr2.judge.text import Table
from editr2.report import pages
from editr2.report.charts import Chart
from editr2.report.dots import Series, dots
from editr2.report.gallery import thin
from editr2.report.numbers import decimal
from editr2.report.paired import Estimate
from editr2.report.pictures import Picture, picture_of
from editr2.rewards.traces import KINDS
from editr2.verifier.figures import Evaluation
from editr2.verifier.files import Told
from editr2.verifier.measures import BINS, Bin, Judged, JudgedPair

PAGE = "verifier.html"

WRONG, OTHERS = 16, 8
"""Pairs that are shown: those that it got most wrong, and some of the others."""

MOST_TRACES = 4
"""Of an output."""

LONGEST = 4000
"""Characters of a trace; of a longer one the end stands there, where its verdicts are."""


@dataclass(frozen=True)
class Text:
    """A trace. score: as it is shown. unread: why there is none."""

    text: str
    score: str
    unread: str | None


@dataclass(frozen=True)
class Side:
    """An output. score: the mean. shares: (kind, text, per cent). verdicts: of every principle, its
    text, what traces say of it, and "yes", "no", "split" or "none". texts: its traces; more: of
    them that are not shown."""

    label: str
    picture: Picture
    score: str
    shares: Sequence[tuple[str, str, float]]
    verdicts: Sequence[tuple[str, str, str]]
    texts: Sequence[Text]
    more: int


@dataclass(frozen=True)
class PairView:
    """outcome: "right", "wrong", "equal" or "not judged"."""

    id: str
    instruction: str
    notes: Sequence[str]
    source: Picture
    sides: Sequence[Side]
    outcome: str
    scores: str


def write_page(
    path: Path, found: Evaluation, tables: Sequence[Table], *, max_pixels: int = 512
) -> None:
    """Images larger than `max_pixels` are scaled down. Raises `DataError` for one that cannot be
    read."""
    wrong = sorted(
        (pair for pair in found.pairs if pair.difference < 0), key=lambda pair: pair.difference
    )
    others = [pair for pair in found.pairs if not pair.difference < 0]
    shown = [*wrong[:WRONG], *thin(others, OTHERS)]
    pages.write_page(
        path,
        "verifier.html.j2",
        [Path(__file__).parent / "templates"],
        title=found.verifier,
        headline=f"{len(found.pairs)} pairs, {len(found.edits)} edits with gold",
        facts=facts_of(found),
        tables=tables,
        charts=charts_of(found),
        pairs=[_view(pair, max_pixels) for pair in shown],
        wrong=len(wrong),
        wrong_shown=min(len(wrong), WRONG),
        total=len(found.pairs),
    )


def facts_of(found: Evaluation) -> list[tuple[str, str]]:
    cost, count = found.cost, found.count
    facts = [
        ("judged", ", ".join(found.judged)),
        ("traces read", f"{count.read} of {count.asked}"),
        ("unread", str(count.unread.total())),
        ("without an answer", str(count.failed.total())),
    ]
    if cost.tokens is not None:
        facts.append(("tokens a trace", f"{cost.tokens:.0f}"))
    facts.append(("characters a trace", f"{cost.characters:.0f}"))
    if cost.seconds is not None:
        facts.append(("seconds a trace", f"{cost.seconds:.3g}"))
    return facts


def charts_of(found: Evaluation) -> list[Chart]:
    """What is so, beside what is said, by bins of what is said."""
    charts: list[Chart] = []
    if found.against is not None and len(found.against.said):
        charts += _calibration("Reliability of verdicts", "hold", found.against.reliability)
    if found.by_score:
        charts += _calibration("Outputs by score", "preferred", found.by_score)
    return charts


def _calibration(title: str, what: str, bins: Sequence[Bin]) -> list[Chart]:
    names = {(low, high): f"{low:g} to {high:g}" for low, high in BINS}
    so = {names[one.low, one.high]: one.of for one in bins}
    said = {names[one.low, one.high]: Estimate(one.said, one.said, one.said, one.n) for one in bins}
    series = [Series(what, so, 0), Series("said", said, 5, hollow=True)]
    return dots([(title, series)], list(names.values()), "said")


def _view(pair: JudgedPair, max_pixels: int) -> PairView:
    edit, difference = pair.win.edit, pair.difference
    notes = [f"task {edit.task}"] if edit.task else []
    if pair.preference.margin is not None:
        notes.append(f"margin {pair.preference.margin:g}")
    return PairView(
        pair.preference.id,
        edit.instruction,
        notes,
        picture_of(edit.image.read(), max_pixels),
        [_side("preferred", pair.win, max_pixels), _side("the other", pair.lose, max_pixels)],
        _outcome(difference),
        f"{_score(pair.win.score)} and {_score(pair.lose.score)}",
    )


def _outcome(difference: float) -> str:
    if math.isnan(difference):
        return "not judged"
    if abs(difference) < 1e-9:
        return "equal"
    return "right" if difference > 0 else "wrong"


def _side(label: str, judged: Judged, max_pixels: int) -> Side:
    shares = [(kind, judged.share(kind)) for kind in KINDS]
    count = len(judged.traces)
    return Side(
        label,
        picture_of(judged.edit.edited.read(), max_pixels),
        _score(judged.score),
        [(kind, decimal(share), 100 * share) for kind, share in shares if not math.isnan(share)],
        [
            (one.text, *_verdict(float(share), count))
            for one, share in zip(judged.edit.principles, judged.yes, strict=True)
        ],
        [_text(one) for one in judged.told[:MOST_TRACES]],
        max(0, len(judged.told) - MOST_TRACES),
    )


def _verdict(share: float, count: int) -> tuple[str, str]:
    if math.isnan(share):
        return "–", "none"
    yes = round(share * count)
    word = "yes" if 2 * yes > count else "no" if 2 * yes < count else "split"
    return (word if count == 1 else f"{word}, {yes} of {count}"), word


def _text(told: Told) -> Text:
    text = told.text if len(told.text) <= LONGEST else "… " + told.text[-LONGEST:]
    score = "–" if told.trace is None else _score(told.trace.score)
    return Text(text, score, told.unread)


def _score(score: float) -> str:
    """As traces say it, from 0 to 10."""
    return "–" if math.isnan(score) else decimal(10 * score, 1)
