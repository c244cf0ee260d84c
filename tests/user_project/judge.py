# pyright: strict
"""Rewards of a user's own: a function of one session, and an object that judges many at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from editr2 import Reward, Score, Session
from editr2.rewards.base import Item


def kept(session: Session, images: NDArray[np.uint8]) -> list[float | Score]:
    """How much of the source every turn left alone."""
    if len(images) != len(session.turns):
        return [Score(None, "a turn without an image")]
    return [float((image == session.image).mean()) for image in images]


class Judge:
    """Two scores a turn, one of which does not always apply."""

    names = ("light", "brighter")

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        return [self.one(item) for item in items]

    def one(self, item: Item) -> list[dict[str, Score]]:
        scores: list[dict[str, Score]] = []
        for turn, image in zip(item.session.turns, item.images):
            wanted = "brighten" in turn.instruction and (turn.meta or {}).get("judge") != "no"
            light = float(image.mean()) / 255
            brighter = Score(float(light > 0.5)) if wanted else Score.not_applicable()
            scores.append({"light": Score(light), "brighter": brighter})
        return scores


REWARD: Reward = Judge()
