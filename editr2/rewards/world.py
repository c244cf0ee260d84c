"""The shapes world's exact verifiers as a reward: IF, CC and GA per turn (see
`worlds/shapes.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from editr2.errors import DataError
from editr2.rewards.base import Item, Score
from editr2.rewards.table import WORLD
from editr2.sessions import Session
from editr2.worlds import shapes


class WorldReward:
    """Judges by parsing pixels. A session that is not of the world gets no score, with the
    reason."""

    names = ("IF", "CC", "GA")
    version = shapes.VERSION
    exact = True
    by_turn = True
    batch = 1

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        said = (self(item.session, item.images) for item in items)
        return [[rows[turn] for turn in item.asked] for rows, item in zip(said, items, strict=True)]

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]:
        """Of the turns that there are images of."""
        instructions = [turn.instruction for turn in session.turns[: len(images)]]
        try:
            rows = shapes.verify(session.image, instructions, images)
        except DataError as error:
            # It judges where no reward is named, so whoever brings photographs meets it first.
            other = ""
            if images.shape[1:] != (shapes.SIZE, shapes.SIZE, 3):
                other = f"; {WORLD} reads the shapes world alone: name another reward (reward.name)"
            reason = f"{error}{other}"
            return [{name: Score(None, reason) for name in self.names} for _ in instructions]
        return [
            {name: Score(float(x)) for name, x in zip(self.names, row, strict=True)} for row in rows
        ]

    def expected(self, session: Session) -> np.ndarray | None:
        """What its instructions ask for, uint8 [T, 24, 24, 3]; None of a session that is not of the
        world."""
        try:
            found = shapes.meanings(session.image, [turn.instruction for turn in session.turns])
        except DataError:
            return None
        return np.stack([shapes.render(meaning.scene) for meaning in found[1:]])
