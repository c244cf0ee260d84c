"""Which sessions a run trains and evaluates on: endless from the world, or the user's file over and
over."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np

from editr2.config import DataConfig, EvalConfig, RolloutConfig
from editr2.sessions.buckets import Sizes
from editr2.sessions.files import Unreadable, check_there, load_sessions
from editr2.sessions.session import Session
from editr2.worlds import shapes

HELDOUT_SEED = 20_001
"""Seed of the world's evaluation sessions: the same for every run, so that runs can be compared."""


@dataclass(frozen=True)
class SessionSource:
    """Training session number `ordinal` of a run, and its evaluation sessions.

    sessions: from a file, in a new order every pass; none: drawn from the world, never repeated.
    heldout: to evaluate on; none where evaluation is off. shown: whose first become film-strips,
    the same, or where evaluation is off so many as are shown. told: what the world's turns carry in
    their `meta` besides, because whoever judges wants it (`shapes.TOLD`).
    """

    seed: int
    turns: int
    sessions: list[Session] | None
    heldout: list[Session]
    heldout_is_training: bool
    shown: list[Session]
    told: tuple[str, ...] = ()

    def __getitem__(self, ordinal: int) -> Session:
        if self.sessions is None:
            drawn = shapes.make_session(self.seed, ordinal, turns=self.turns)
            return with_meta(drawn, self.told)
        epoch, place = divmod(ordinal, len(self.sessions))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sessions))
        return self.sessions[int(order[place])]


def check_sessions_there(data: DataConfig, evaluation: EvalConfig) -> None:
    """Before a policy is loaded, or fetched, which takes minutes: raises `DataError` where a set
    that `open_sessions` will read is not there."""
    heldout = data.heldout if evaluation.sessions or evaluation.strips else None
    for path in filter(None, (data.path, heldout)):
        check_there(path)


def open_sessions(
    data: DataConfig,
    rollout: RolloutConfig,
    evaluation: EvalConfig,
    *,
    seed: int,
    size: Sizes | None,
    unreadable: Unreadable | None = None,
    others: bool = False,
    wants: Collection[str] = (),
) -> SessionSource:
    """Reads and checks every session file before anything is trained.

    size, unreadable: of the policy, its images' (height, width) or several, None for any, and what
    it cannot make of instructions. others: as for `load_sessions`, which has more on these. Images
    are of that size from here on (`data.resize`), for the policy and for whoever judges. wants:
    what whoever judges looks for in a turn's `meta`; sessions that are drawn here carry of it what
    their world can tell, those of a file what the file says.

    Raises `DataError` with file and line.
    """
    load = partial(
        load_sessions, size=size, resize=data.resize, unreadable=unreadable, others=others
    )
    train = load(data.path, limit=data.limit) if data.path else None
    told = tuple(name for name in shapes.TOLD if name in wants)
    count = evaluation.sessions or evaluation.strips
    if not count:
        heldout = []
    elif data.heldout:
        heldout = load(data.heldout, limit=count)
    elif train is not None:
        heldout = train[:count]
    else:
        turns = evaluation.turns or rollout.turns
        heldout = [
            with_meta(shapes.make_session(HELDOUT_SEED, i, split="heldout", turns=turns), told)
            for i in range(count)
        ]
    evaluated = [] if evaluation.off else heldout
    is_training = bool(evaluated) and not data.heldout and train is not None
    return SessionSource(seed, rollout.turns, train, evaluated, is_training, heldout, told)


def with_meta(session: Session, told: Collection[str]) -> Session:
    """A session of the world that carries more in the `meta` of its turns (`shapes.TOLD`)."""
    for name in told:
        session = _teller(shapes.TOLD[name])(session)
    return session


@functools.cache
def _teller(address: str) -> Callable[[Session], Session]:
    module, _, name = address.partition(":")
    found: Callable[[Session], Session] = getattr(importlib.import_module(module), name)
    return found
