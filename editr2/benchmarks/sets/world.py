"""`world`: held-out sessions of the shapes world, judged by its exact verifiers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from editr2.benchmarks.table import Benchmark, Source
from editr2.config import RewardUse
from editr2.sessions import Session
from editr2.sessions.source import HELDOUT_SEED
from editr2.worlds import shapes

TURNS = (3,)


def read(source: Source) -> Iterator[Session]:
    """`sessions` of every length, those that evaluations of runs take first."""
    source.without_images()
    for turns in source.turns or TURNS:
        for index in range(source.sessions):
            session = shapes.make_session(HELDOUT_SEED, index, split="heldout", turns=turns)
            name = f"{turns}-turns-{index:04d}-{session.mode}"
            yield Session(name, session.image, session.turns, session.mode)


def exact(session: Session) -> np.ndarray:
    """What each turn should have made."""
    told = [turn.instruction for turn in session.turns]
    return np.stack([shapes.render(m.scene) for m in shapes.meanings(session.image, told)[1:]])


WORLD = Benchmark(
    title="the shapes world",
    read=read,
    reward=RewardUse(name="world"),
    headline=("GA@last", "IF@last", "CC@last"),
    passes=("multipass", "exact"),
    makes_sessions=True,
    exact=exact,
    about="held-out sessions of the embedded world, judged by its verifiers; nothing to download",
)
