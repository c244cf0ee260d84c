"""The ways in which an editor goes through a session, a table.

- multipass: every turn edits the output of the one before, as users do.
- singlepass: every turn edits the source, by all instructions so far in one (EdiVal-Bench's
  "complex edit"): no error is handed on.
- exact: every turn reads exact earlier images in place of the editor's own. What multipass loses
  against it is exposure bias. Only where a benchmark knows them (the world).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from editr2.sessions import Session, Turn

Exact = Callable[[Session], np.ndarray]
"""Of a session, uint8 [T, H, W, 3]: what each turn should have made."""


class Edited(NamedTuple):
    """A session that is rolled out for a pass. turns: the turns of the benchmark's session that
    its outputs are of, one each."""

    session: Session
    turns: tuple[int, ...]


class Question(NamedTuple):
    """One item that a reward is asked about.

    session: as the reward sees it. images: what it sees after each turn, (kind, turn from 0):
    "own" output of the pass, "exact" image, or the "source" in its place. asked: turns of `session`
    that it is asked about, from 0. about: of each of these, the (turn of the image, turn whose
    instruction is judged).
    """

    session: Session
    images: tuple[tuple[str, int], ...]
    asked: tuple[int, ...]
    about: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pass:
    """about: what a page says of it. edited: the sessions to roll out. questions: to ask of a
    session, given which of its turns have an image. chained: without an image of one turn the later
    ones cannot be judged. reads_exact: each turn reads the exact image of the one before. leaves:
    metrics that mean nothing here. once: metrics of an image as it is, whatever it was told: it has
    them for its own instruction alone, where it has several to follow."""

    about: str
    edited: Callable[[Session], Iterator[Edited]]
    questions: Callable[[Session, Sequence[bool]], Iterator[Question]]
    chained: bool = False
    reads_exact: bool = False
    leaves: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()

    def metrics(self, names: Sequence[str], turn: int, asked: int) -> tuple[str, ...]:
        """Those of `names` that an image of `turn` has for the instruction of turn `asked`."""
        return tuple(
            name
            for name in names
            if name not in self.leaves and (asked == turn or name not in self.once)
        )


def _whole(session: Session) -> Iterator[Edited]:
    yield Edited(session, tuple(range(len(session.turns))))


def _joined(session: Session) -> Iterator[Edited]:
    told = [turn.instruction for turn in session.turns]
    for t in range(len(told)):
        text = ". ".join(one.strip().rstrip(".") for one in told[: t + 1]) if t else told[0]
        yield Edited(_only(session, replace(session.turns[t], instruction=text), t), (t,))


def _only(session: Session, turn: Turn, t: int) -> Session:
    """The session with one turn."""
    image = vars(session)["image"]
    return replace(session, id=f"{session.id}#{t + 1}", image=image, turns=(turn,))


def _chain(session: Session, there: Sequence[bool]) -> Iterator[Question]:
    count = next((t for t, here in enumerate(there) if not here), len(there))
    if count:
        turns = tuple(range(count))
        images = tuple(("own", t) for t in turns)
        yield Question(session, images, turns, tuple((t, t) for t in turns))


def _each_of(session: Session, there: Sequence[bool]) -> Iterator[Question]:
    """Every instruction so far by itself, from the source to the one image: as if no turn before it
    had changed anything. What those asked for stays known, so it is no damage."""
    for t, here in enumerate(there):
        for j in range(t + 1) if here else ():
            images = (*(("source", before) for before in range(j)), ("own", t))
            yield Question(session, images, (j,), ((t, j),))


def _from_exact(session: Session, there: Sequence[bool]) -> Iterator[Question]:
    for t, here in enumerate(there):
        if here:
            images = (*(("exact", before) for before in range(t)), ("own", t))
            yield Question(session, images, (t,), ((t, t),))


PASSES: Mapping[str, Pass] = {
    "multipass": Pass(
        "every turn edits the output of the one before", _whole, _chain, chained=True
    ),
    "singlepass": Pass(
        "every turn edits the source, by all instructions so far in one",
        _joined,
        _each_of,
        leaves=frozenset({"GA"}),
        once=frozenset({"CC", "PQ"}),
    ),
    "exact": Pass(
        "every turn edits what the one before should have made",
        _whole,
        _from_exact,
        reads_exact=True,
    ),
}
