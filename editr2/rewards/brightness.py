"""A stand-in for a judge: the mean brightness of every output. It says nothing about edits.

With it a recipe can be tried from end to end before the real judge is ready; docs/rewards.md tells
how to write one.
"""

from __future__ import annotations

import numpy as np

from editr2.rewards.base import Score
from editr2.sessions import Session


class Brightness:
    """Mean of all pixels and channels in [0, 1]."""

    names = ("brightness",)
    exact = True

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]:
        return [{"brightness": Score(float(image.mean() / 255))} for image in images]
