"""What is to be said of an edit in the shapes world: principles, reasoning, verdicts and score, all
by rule from the pixels.

A request is a turn of a session with its meaning. Its principles name whatever the turn's own words
leave to the session (a standing rule's colour, what `it` is), so one edit can be judged by itself.
Reasoning goes cell by cell, a line for the background and one for each row:

    background wants black shows black same
    top no object no object same red ring blue ring failed ...

A cell is five words: colour and shape that are wanted, colour and shape that are seen, and how they
compare: `done` or `failed` where the request changes the cell, else `same` or `differs`. Wanted is
what the request says, elsewhere what the first picture shows, right or wrong. Verdicts and score
follow from these words alone. (A trial of small verifiers: after equal training cell by cell judged
78 % of pairs, lists of faults 58 %, bare verdicts 53 %; a colour and shape in one word were learnt
worse than two words.)

The score is half for what was asked for and half for the rest, which is lost with the background:

    1/2 (share of changed cells done) + 1/2 (share of other cells the same) (background the same)

with the background in place of the changed cells where it is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from editr2.rewards.traces import HIGH, Kind, Principle, write_trace
from editr2.sessions import Session
from editr2.worlds.shapes import (
    BACKGROUND_NAMES,
    COLUMNS,
    CONTENTS,
    GRID,
    ROWS,
    UNKNOWN,
    Op,
    Scene,
    meanings,
    parse_cells,
    parse_instruction,
    position,
    resolve,
)

Pair = tuple[str, str]
"""A cell in words: colour, shape."""

EMPTY: Pair = ("no", "object")
UNCLEAR: Pair = ("unclear", "object")
MIXED = "mixed"
STEPS = 2 * HIGH
"""Of the score, so that each cell of a picture can be told."""


@dataclass(frozen=True)
class Request:
    """A turn and its meaning: op, resolved. scene: what is to be there afterwards, by the session
    from its start."""

    instruction: str
    op: Op
    scene: Scene

    @property
    def cells(self) -> tuple[int, ...]:
        """Those that it changes; none where that is the background."""
        return tuple(c for c in (self.op.cell, self.op.target) if c is not None)

    @property
    def background(self) -> bool:
        return self.op.kind == "background"


def requests(session: Session) -> list[Request]:
    """Of every turn. Raises `DataError` for a session that is not of the world."""
    said = [turn.instruction for turn in session.turns]
    states = meanings(session.image, said)
    return [
        Request(text, resolve(before, parse_instruction(text)), after.scene)
        for text, (before, after) in zip(said, pairwise(states), strict=True)
    ]


# -------------------------------------------------------------------------------------- principles


def _added(request: Request) -> str:
    op = request.op
    return f"is there a {op.colour} {op.shape} {position(request.cells[0])}?"


def _removed(request: Request) -> str:
    return f"is {position(request.cells[0])} empty?"


def _painted(request: Request) -> str:
    return f"is the {request.op.shape} {position(request.cells[0])} {request.op.colour}?"


def _moved(request: Request) -> str:
    start, end = request.cells
    shape, colour = request.scene.object(end)
    return f"is there a {colour} {shape} {position(end)} and is {position(start)} empty?"


def _set(request: Request) -> str:
    return f"is the background {request.op.background}?"


FOLLOWED: Mapping[str, Callable[[Request], str]] = {
    "add": _added,
    "remove": _removed,
    "paint": _painted,
    "move": _moved,
    "background": _set,
}
"""By kind of op: whether it was done."""


@dataclass(frozen=True)
class Rule:
    """An entry of `RULES`. asks: a principle's text, None where it does not apply. holds: its
    verdict."""

    kind: Kind
    asks: Callable[[Request], str | None]
    holds: Callable[[Look], bool]


def principles(request: Request) -> tuple[Principle, ...]:
    """By which an edit of this request is judged."""
    asked = ((rule, rule.asks(request)) for rule in RULES)
    return tuple(Principle(text, rule.kind) for rule, text in asked if text)


def with_principles(session: Session) -> Session:
    """With `meta.principles` of every turn, as the reward `verifier` reads them. Raises `DataError`
    for a session that is not of the world."""
    turns = tuple(
        replace(turn, meta={**turn.meta, "principles": [p.written() for p in principles(one)]})
        for turn, one in zip(session.turns, requests(session), strict=True)
    )
    return replace(session, turns=turns)


# ------------------------------------------------------------------------------------------ looking


@dataclass(frozen=True)
class Seen:
    """A picture in words."""

    background: str
    cells: tuple[Pair, ...]


def seen(image: np.ndarray) -> Seen:
    """What an image shows, uint8 [24, 24, 3]. A cell near no template is unclear."""
    found = parse_cells(image[None])[0]
    backgrounds = {BACKGROUND_NAMES[i // len(CONTENTS)] for i in found if i != UNKNOWN}
    background = backgrounds.pop() if len(backgrounds) == 1 else MIXED
    return Seen(background, tuple(_words(int(i)) for i in found))


def _words(index: int) -> Pair:
    if index == UNKNOWN:
        return UNCLEAR
    return _pair(CONTENTS[index % len(CONTENTS)])


def _pair(content: tuple[str, str] | None) -> Pair:
    return EMPTY if content is None else (content[1], content[0])


@dataclass(frozen=True)
class Look:
    """An edit in words: what is wanted, what is there."""

    request: Request
    wanted: Seen
    shown: Seen

    @property
    def background(self) -> bool:
        """Whether the background is the wanted one. A mixed one is nobody's wish, but may be as it
        was."""
        return self.wanted.background == self.shown.background

    def right(self, cell: int) -> bool:
        return self.wanted.cells[cell] == self.shown.cells[cell]

    def share(self, changed: bool) -> float:
        """Of the cells that the request changes, or of the others, those that are right."""
        cells = [c for c in range(GRID * GRID) if (c in self.request.cells) == changed]
        return sum(map(self.right, cells)) / len(cells)

    @property
    def followed(self) -> float:
        return float(self.background) if self.request.background else self.share(changed=True)

    @property
    def kept(self) -> float:
        return self.share(changed=False)

    @property
    def clear(self) -> bool:
        return UNCLEAR not in self.shown.cells

    @property
    def verdicts(self) -> tuple[int, ...]:
        """In the order of `principles`."""
        return tuple(int(rule.holds(self)) for rule in RULES if rule.asks(self.request))

    @property
    def score(self) -> float:
        """In [0, 1]; see the module."""
        safe = self.request.background or self.background
        return 0.5 * self.followed + 0.5 * self.kept * safe

    @property
    def reasoning(self) -> str:
        def told(right: bool, changed: bool) -> str:
            return (("differs", "same"), ("failed", "done"))[changed][right]

        words = told(self.background, self.request.background)
        lines = [f"background wants {self.wanted.background} shows {self.shown.background} {words}"]
        for row, name in enumerate(ROWS):
            line = [name]
            for cell in range(row * GRID, row * GRID + len(COLUMNS)):
                line += [*self.wanted.cells[cell], *self.shown.cells[cell]]
                line.append(told(self.right(cell), cell in self.request.cells))
            lines.append(" ".join(line))
        return "\n".join(lines)

    @property
    def trace(self) -> str:
        """As a verifier is to write it; the score to half a point."""
        return write_trace(self.reasoning, self.verdicts, round(STEPS * self.score) / STEPS)


def look(request: Request, before: np.ndarray, edited: np.ndarray) -> Look:
    """before, edited: uint8 [24, 24, 3]."""
    there = seen(before)
    cells = [
        _pair(request.scene.cells[c]) if c in request.cells else pair
        for c, pair in enumerate(there.cells)
    ]
    background = str(request.op.background) if request.background else there.background
    return Look(request, Seen(background, tuple(cells)), seen(edited))


def misread(one: Look, rng: np.random.Generator) -> Look:
    """As somebody sees it who takes one cell of the edited picture, drawn, for another content,
    drawn, too."""
    cell = int(rng.integers(len(one.shown.cells)))
    others = [pair for pair in map(_pair, CONTENTS) if pair != one.shown.cells[cell]]
    cells = list(one.shown.cells)
    cells[cell] = others[int(rng.integers(len(others)))]
    return replace(one, shown=replace(one.shown, cells=tuple(cells)))


RULES: Sequence[Rule] = (
    Rule("follow", lambda r: FOLLOWED[r.op.kind](r), lambda look: look.followed == 1),
    Rule(
        "keep",
        lambda r: f"is {'every object' if r.background else 'the rest'} as it was?",
        lambda look: look.kept == 1,
    ),
    Rule(
        "keep",
        lambda r: None if r.background else "is the background as it was?",
        lambda look: look.background,
    ),
    Rule("quality", lambda r: "is every cell clear?", lambda look: look.clear),
)
"""Of principles, in their order."""
