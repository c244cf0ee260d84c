"""What the rewards of a run ask of their judges, and how long it waits for them.

A reward is asked once, about one session's source image; from the seconds of that follow those of
an iteration. A reward that may be called from several threads is asked while the rollout goes on,
so what the run waits for is only what is left when it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from editr2.errors import UserError
from editr2.rewards.adapt import score_batch
from editr2.rewards.base import unscored
from editr2.rewards.panel import CheckedReward, Panel
from editr2.sessions import Session


@dataclass(frozen=True)
class Measured:
    """A reward and the seconds that a turn of one session took. notes: of its `probe`."""

    reward: CheckedReward
    turn: float
    notes: list[str]


def measured(panel: Panel, session: Session) -> list[Measured]:
    """Asks every reward about a session's own source image, as the output of every turn. Raises
    `UserError`, naming the setting that named the reward, where one of its names has no score for
    any turn, whatever it answered, and what its `probe` raises."""
    turns, found = len(session.turns), []
    for member in panel.members:
        notes = Panel([member]).probe()
        begin = time.perf_counter()
        scores = score_batch(member, [(session, np.stack([session.image] * turns))], turns)
        seconds = time.perf_counter() - begin
        if failure := unscored(scores):
            setting = member.title.partition(":")[0]
            raise UserError(f"{setting}: no score for session {session.id}: {failure}")
        found.append(Measured(member, seconds / max(turns, member.fills), notes))
    return found


@dataclass(frozen=True)
class Judging:
    """One reward in one rollout. calls: of it, or of its server where it says how many a turn
    takes. seconds: until all are answered, if they were asked at once. waits: of them, how long
    the run waits once the rollout is done."""

    calls: int
    at_once: int
    seconds: float
    waits: float


def judging(
    m: Measured, sessions: int, siblings: int, turns: float, chunks: int, rollout: float
) -> Judging:
    """turns: a session, on average. chunks: of rollouts that end one after the other, in `rollout`
    seconds."""
    reward, rollouts = m.reward, sessions * siblings
    asked = rollouts * turns
    by_turn = bool(reward.concurrency) and reward.by_turn
    size = reward.batch or rollouts
    calls = math.ceil(asked / size) if by_turn else math.ceil(rollouts / size)
    at_once = max(1, min(reward.concurrency or 1, calls))
    seconds = m.turn * asked / at_once
    waits = seconds
    if reward.concurrency:
        # What ends last has nothing to hide behind: the last turn, or the last chunk.
        last = 1 / (chunks * (turns if by_turn else 1))
        waits = max(seconds - rollout * (1 - last), seconds * last)
    if reward.calls_a_turn is not None:
        calls = round(reward.calls_a_turn * asked)
    return Judging(calls, at_once, seconds, waits)


def waiting(each: Sequence[tuple[Measured, Judging]]) -> float:
    """Seconds that the run waits for all: those asked beside the rollout are asked at once."""
    beside = [j.waits for m, j in each if m.reward.concurrency]
    return max(beside, default=0.0) + sum(j.waits for m, j in each if not m.reward.concurrency)


def lines(each: Sequence[tuple[Measured, Judging]]) -> list[str]:
    """The part `judges` of the page."""
    said = []
    for m, j in each:
        where = "beside the rollout" if m.reward.concurrency else "after the rollout"
        calls = f"{j.calls} call{'' if j.calls == 1 else 's'} an iteration"
        said += [
            f"{', '.join(m.reward.names)} ({m.reward.title}): answers",
            f"  {calls}, {j.at_once} at once, {m.turn:.3g} s a turn: {j.seconds:.3g} s {where}",
        ]
        said += [f"  {note}" for note in m.notes]
    return [f"{'judges' if n == 0 else '':<12}{line}" for n, line in enumerate(said)]
