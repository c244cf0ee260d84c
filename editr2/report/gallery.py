"""The film-strips: what the template prints of every session, in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from editr2.report.data import MODES, PASS_NAMES, Pair, RecordedRun, StripTurn
from editr2.report.numbers import decimal, signed
from editr2.report.pictures import Picture, Pictures

VERDICTS = {
    "better": "Better after training",
    "equal": "Unchanged",
    "worse": "Worse after training",
    "unpaired": "Not comparable",
}


T = TypeVar("T")

SHORT = 110
"""Characters of a reason that stands in full on the page; a longer one is opened by a click."""


@dataclass(frozen=True)
class Why:
    """What was said of a score. start: of one that is too long to stand there in full."""

    text: str
    start: str | None

    @staticmethod
    def of(text: str | None) -> Why | None:
        if not text:
            return None
        start = text[:SHORT].rpartition(" ")[0] or text[:SHORT]
        return Why(text, start if len(text) > SHORT else None)


@dataclass(frozen=True)
class ScoreBar:
    name: str
    text: str
    percent: float | None
    why: Why | None = None


@dataclass(frozen=True)
class Cell:
    name: str
    """ "before" or "after"."""
    picture: Picture | None
    alt: str
    intent: str | None
    reasoning: str | None
    thought: str | None
    scores: Sequence[ScoreBar]
    reward: str | None
    change: str
    advantage: str | None
    masked: bool
    reason: str | None
    expected: Picture | None


@dataclass(frozen=True)
class TurnView:
    number: int
    instruction: str
    expected: Picture | None
    cells: Sequence[Cell]


@dataclass(frozen=True)
class SessionView:
    id: str
    mode: str | None
    verdict: str
    source: Picture | None
    turns: Sequence[TurnView]
    before: str | None
    after: str | None
    change: str


@dataclass(frozen=True)
class Gallery:
    groups: Sequence[tuple[str, str, int, Sequence[SessionView]]]
    """(verdict, heading, sessions in all, sessions shown)."""
    total: int
    shown: int
    compared: bool


def build_gallery(run: RecordedRun, pictures: Pictures, max_sessions: int) -> Gallery | None:
    if not run.pairs:
        return None
    ordered = sorted(run.pairs, key=lambda pair: (pair.change is None, -(pair.change or 0.0)))
    chosen = thin(ordered, max_sessions)
    scale = _scale(run.pairs)
    groups = []
    for verdict, heading in VERDICTS.items():
        total = sum(pair.verdict == verdict for pair in ordered)
        if total:
            views = [_session(pair, pictures, scale) for pair in chosen if pair.verdict == verdict]
            groups.append((verdict, heading, total, views))
    compared = any(pair.change is not None for pair in ordered)
    if not compared:
        groups = [("unpaired", "Sessions", total, views) for _, _, total, views in groups]
    return Gallery(groups, len(ordered), len(chosen), compared)


def _scale(pairs: Sequence[Pair]) -> float:
    """What the largest score is measured against: the end of a usual scale that holds it."""
    strips = [strip for pair in pairs for strip in (pair.before, pair.after) if strip]
    top = max((score for strip in strips for score in _all_scores(strip.turns)), default=1)
    return next((limit for limit in (1.0, 5.0, 10.0, 100.0) if top <= limit), top)


def thin(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _all_scores(turns: Sequence[StripTurn]) -> list[float]:
    return [value for turn in turns for value in turn.scores.values() if value is not None]


def _session(pair: Pair, pictures: Pictures, scale: float) -> SessionView:
    passes = {
        name: strip
        for name, strip in zip(PASS_NAMES, (pair.before, pair.after), strict=True)
        if strip
    }
    count = max(len(strip.turns) for strip in passes.values())
    before, after = pair.rewards()
    mode = pair.either.mode
    return SessionView(
        id=pair.id,
        mode=MODES.get(mode, mode) if mode else None,
        verdict=pair.verdict,
        source=pictures(next((strip.image for strip in passes.values() if strip.image), None)),
        turns=[
            _turn(
                t + 1,
                {n: strip.turns[t] for n, strip in passes.items() if t < len(strip.turns)},
                pictures,
                scale,
            )
            for t in range(count)
        ],
        before=decimal(before) if pair.before else None,
        after=decimal(after) if pair.after else None,
        change="" if pair.change is None else signed(pair.change),
    )


def _turn(
    number: int, passes: Mapping[str, StripTurn], pictures: Pictures, scale: float
) -> TurnView:
    """One turn in the passes that have it."""
    expected = {name: pictures(turn.expected) for name, turn in passes.items()}
    first, *others = expected.values()
    shared = first if all(other == first for other in others) else None
    before = passes.get("before")
    cells = []
    for name, turn in passes.items():
        alt = f"{name} training, after turn {number}: {turn.instruction}"
        own = None if shared else expected[name]
        compared = before.reward if before and name == "after" else None
        cells.append(_cell(name, turn, alt, pictures, scale, own, compared))
    return TurnView(number, next(iter(passes.values())).instruction, shared, cells)


def _cell(
    name: str,
    turn: StripTurn,
    alt: str,
    pictures: Pictures,
    scale: float,
    expected: Picture | None,
    before: float | None,
) -> Cell:
    """expected: None where the passes share it. before: the reward to compare this one with."""
    return Cell(
        name=name,
        picture=pictures(turn.image),
        alt=alt,
        intent=turn.intent,
        reasoning=turn.reasoning,
        thought=turn.thought,
        scores=[
            _score(key, value, scale, key not in turn.does_not_apply, turn.whys.get(key))
            for key, value in turn.scores.items()
        ],
        reward=None if turn.reward is None else decimal(turn.reward),
        change="" if turn.reward is None or before is None else signed(turn.reward - before),
        advantage=None if turn.advantage is None else signed(turn.advantage),
        masked=turn.masked,
        reason=turn.reason,
        expected=expected,
    )


def _score(
    name: str, value: float | None, scale: float, applies: bool, why: str | None
) -> ScoreBar:
    percent = None if value is None else 100 * min(max(value / scale, 0.0), 1.0)
    text = decimal(value) if applies else "does not apply"
    return ScoreBar(name, text, percent, Why.of(why))
