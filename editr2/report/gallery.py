"""The film-strips: what the template prints of every session, in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editr2.report.data import MODES, PASS_NAMES, Pair, Run, StripTurn
from editr2.report.numbers import plain, signed
from editr2.report.pictures import Picture, Pictures

VERDICTS = {
    "better": "Better after training",
    "equal": "Unchanged",
    "worse": "Worse after training",
    "unpaired": "Not comparable",
}


@dataclass(frozen=True)
class Score:
    name: str
    text: str
    percent: float | None


@dataclass(frozen=True)
class Cell:
    name: str
    """ "before" or "after"."""
    picture: Picture | None
    alt: str
    intent: str | None
    reasoning: str | None
    scores: Sequence[Score]
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


def build_gallery(run: Run, pictures: Pictures, max_sessions: int) -> Gallery | None:
    if not run.pairs:
        return None
    ordered = sorted(run.pairs, key=lambda pair: (pair.change is None, -(pair.change or 0.0)))
    chosen = thin(ordered, max_sessions)
    top = max(
        (
            s
            for pair in run.pairs
            for strip in (pair.before, pair.after)
            if strip
            for s in _all_scores(strip.turns)
        ),
        default=1,
    )
    scale = next((limit for limit in (1.0, 5.0, 10.0, 100.0) if top <= limit), top)
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


def thin(items: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _all_scores(turns: Sequence[StripTurn]) -> list[float]:
    return [value for turn in turns for value in turn.scores.values() if value is not None]


def _session(pair: Pair, pictures: Pictures, scale: float) -> SessionView:
    strips = [
        (name, strip)
        for name, strip in zip(PASS_NAMES, (pair.before, pair.after), strict=True)
        if strip
    ]
    turns = []
    for t in range(max(len(strip.turns) for _, strip in strips)):
        having = [(name, strip.turns[t]) for name, strip in strips if t < len(strip.turns)]
        expected = [pictures(turn.expected) for _, turn in having]
        shared = expected[0] if all(picture == expected[0] for picture in expected) else None
        other = next((turn.reward for name, turn in having if name == "before"), None)
        cells = [
            _cell(
                name,
                turn,
                t + 1,
                pictures,
                scale,
                None if shared else own,
                other if name == "after" else None,
            )
            for (name, turn), own in zip(having, expected, strict=True)
        ]
        turns.append(TurnView(t + 1, having[0][1].instruction, shared, cells))
    before, after = pair.rewards()
    mode = pair.either.mode
    return SessionView(
        id=pair.id,
        mode=MODES.get(mode, mode) if mode else None,
        verdict=pair.verdict,
        source=pictures(next((strip.image for _, strip in strips if strip.image), None)),
        turns=turns,
        before=plain(before) if pair.before else None,
        after=plain(after) if pair.after else None,
        change="" if pair.change is None else signed(pair.change),
    )


def _cell(
    name: str,
    turn: StripTurn,
    t: int,
    pictures: Pictures,
    scale: float,
    expected: Picture | None,
    other: float | None,
) -> Cell:
    return Cell(
        name=name,
        picture=pictures(turn.image),
        alt=f"{name} training, after turn {t}: {turn.instruction}",
        intent=turn.intent,
        reasoning=turn.reasoning,
        scores=[
            Score(
                key,
                plain(value),
                None if value is None else 100 * min(max(value / scale, 0.0), 1.0),
            )
            for key, value in turn.scores.items()
        ],
        reward=None if turn.reward is None else plain(turn.reward),
        change="" if turn.reward is None or other is None else signed(turn.reward - other),
        advantage=None if turn.advantage is None else signed(turn.advantage),
        masked=turn.masked,
        reason=turn.reason,
        expected=expected,
    )
