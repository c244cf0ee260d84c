"""What the rewards of a run ask of their judges, and how long it waits for them.

A reward is asked once, about one session's source image; from the seconds of that follow those of
an iteration. A model that would answer on a GPU, where none is at hand, is estimated if it can tell
what it takes, and asked only if it is small. A reward that may be called from several threads is
asked while the rollout goes on, so what the run waits for is only what is left when it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from editr2.check.devices import Device
from editr2.check.links import MACHINE
from editr2.check.meter import Meter
from editr2.errors import UserError, one_line
from editr2.rewards.adapt import score_batch
from editr2.rewards.base import Held, Item, unscored
from editr2.rewards.models import TRAINER
from editr2.rewards.panel import CheckedReward, Panel
from editr2.sessions import Session

SMALL = 2**30
"""Bytes of weights that are loaded on the machine at hand to see whether they answer at all."""


@dataclass(frozen=True)
class Measured:
    """A reward and the seconds that a turn of one session took. notes: of its `probe`. held: the
    models that it looks with in this process, counted; None where it does not say. estimated: the
    seconds are."""

    reward: CheckedReward
    turn: float
    notes: list[str]
    held: list[Held] | None = None
    estimated: bool = False


def measured(panel: Panel, session: Session, device: Device) -> list[Measured]:
    """Asks every reward about a session's own source image, as the output of every turn; not those
    whose models would answer on a GPU where none is at hand, if they are not `SMALL` and can tell
    the seconds by its speed. Raises `UserError`, naming the setting that named the reward, where
    one of its names has no score for any turn, whatever it answered, and what its `probe` raises.
    """
    turns, found = len(session.turns), []
    for member in panel.members:
        held = held_by(member, session)
        told = _told(member, held or (), device)
        if told is not None and sum(one.weights for one in held or ()) > SMALL:
            note = (
                f"estimated for {device.name}, by traces of all their tokens; it was not loaded or "
                f"asked: `--gpu cpu` does that"
            )
            found.append(Measured(member, told, [note], held, estimated=True))
            continue
        notes = Panel([member]).probe()
        begin = time.perf_counter()
        scores = score_batch(member, [(session, np.stack([session.image] * turns))], turns)
        seconds = time.perf_counter() - begin
        if failure := unscored(scores):
            setting = member.title.partition(":")[0]
            raise UserError(f"{setting}: no score for session {session.id}: {failure}")
        turn = seconds / max(turns, member.fills)
        if told is not None:
            turn = told
            notes = [f"estimated for {device.name}, by traces of all their tokens", *notes]
        found.append(Measured(member, turn, notes, held, estimated=told is not None))
    return found


def _told(reward: CheckedReward, held: Sequence[Held], device: Device) -> float | None:
    """Seconds a turn, as its models say; None where they do not, or where there is something to
    measure. Raises `UserError` for what is no number of seconds."""
    on_gpu = device.gpu and all(one.device != "cpu" for one in held)
    if not held or not on_gpu or torch.cuda.is_available() or None in [one.turn for one in held]:
        return None
    try:
        seconds = sum(float(one.turn(device.speed)) for one in held if one.turn is not None)
    except Exception as error:  # of a user's own
        raise UserError(
            f"{reward.title}: models_held(): turn raised {one_line(error, kind=True)}"
        ) from error
    if not 0 <= seconds < math.inf:
        raise UserError(
            f"{reward.title}: models_held(): turn: {seconds} (accepted: seconds, from 0)"
        )
    return seconds


def unmeasured(panel: Panel, session: Session) -> list[Measured]:
    """The rewards with the models that they hold, none of which is asked or loaded."""
    return [Measured(member, 0.0, [], held_by(member, session)) for member in panel.members]


def held_by(reward: CheckedReward, session: Session) -> list[Held] | None:
    """Its models, as if a session's own source image were the output of every turn."""
    said = reward.models_held([Item(session, np.stack([session.image] * len(session.turns)))])
    return None if said is None else [_counted(held) for held in said]


def _counted(held: Held) -> Held:
    """With the bytes that it takes while it answers."""
    if held.run is None:
        return held
    try:
        with torch.device("meta"), torch.no_grad(), Meter() as meter:
            held.run()
    except Exception:  # what runs is a model's own code, which may want numbers
        return held._replace(run=None)
    return held._replace(working=meter.cost.peak, run=None)


@dataclass(frozen=True)
class Room:
    """Bytes that models of rewards take. parts: of a process's device, by what they are. stays,
    lent: of weights there, for good or but for training. beside, after: while they answer, beside
    the rollout or when it is done. host: of weights on the host of a machine, at some time;
    host_working: what answers there."""

    parts: Mapping[str, int]
    stays: int = 0
    lent: int = 0
    beside: int = 0
    after: int = 0
    host: int = 0
    host_working: int = 0


LENT = "(reward), weights, lent"
"""Ends the names of parts that are on the host while there is training."""


def room(judges: Sequence[Measured], gpu: bool, processes: int) -> Room:
    """Of all rewards, on a GPU or a CPU that trains. Without a device of their own they are on that
    of their process; what names `cuda:1` is there of every process of the machine."""
    here = min(processes, MACHINE)
    parts: dict[str, int] = {}
    sums = dict.fromkeys(("stays", "lent", "beside", "after", "host", "host_working"), 0)
    for m in judges:
        working = 0
        for held in m.held or ():
            copies = copies_here(held, gpu, here)
            lent = gpu and held.device == TRAINER
            if gpu and held.device in (TRAINER, "cpu"):
                sums["host"] += here * held.weights
            if gpu and held.device == "cpu":
                sums["host_working"] += here * (held.working or 0)
            if not copies:
                continue
            names = (f"{held.name} {LENT if lent else '(reward), weights'}", held.weights)
            for name, count in (names, (f"{held.name} (reward), answering", held.working or 0)):
                parts[name] = parts.get(name, 0) + copies * count
            sums["lent" if lent else "stays"] += copies * held.weights
            working += copies * (held.working or 0)
        if m.reward.concurrency:
            sums["beside"] += working
        else:
            sums["after"] = max(sums["after"], working)
    return Room(parts, **sums)


def copies_here(held: Held, gpu: bool, here: int) -> int:
    """How many of a model are on the device that trains, of so many processes of the machine."""
    if not gpu:
        return int(held.device in (TRAINER, "cpu"))
    if held.device == TRAINER:
        return 1
    number = held.device.partition(":")[2] or "0"
    return here if held.device.startswith("cuda") and int(number) < here else 0


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
    if reward.fills > 1:
        # What a chunk has to be asked is one call, and its last batch is filled up.
        asked = chunks * reward.fills * math.ceil(asked / chunks / reward.fills)
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
