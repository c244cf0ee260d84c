"""Selection: of the traces about an edit, the one whose verdicts are right most often is learnt.

Of equal ones the first in the file stays, so that the same file is the same selection. A trace that
cannot be read, or of which nobody knows what is right, is nobody's choice; neither is one that is
right less often than `least`.

What a verifier learns that is to answer directly is the same without the reasoning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from editr2.errors import DataError, UserError
from editr2.rewards.traces import write_trace
from editr2.run.lock import RunLock
from editr2.verifier.files import (
    PRINCIPLES,
    TRACES,
    Edit,
    Told,
    read_edits,
    read_told,
    write_edits,
    write_told,
)
from editr2.verifier.objectives import folder_of


@dataclass(frozen=True)
class Selection:
    """chosen: at most one trace of an edit, in the order of edits. Of edits: untold, without a
    trace that can be read; unknown, without gold; below, of which the best is below `least`."""

    chosen: list[Told]
    untold: int
    unknown: int
    below: int


def select(edits: Sequence[Edit], told: Sequence[Told], least: float = 0.0) -> Selection:
    """least: accuracy, in [0, 1]."""
    of: dict[str, list[Told]] = {edit.id: [] for edit in edits}
    for one in told:
        of[one.id].append(one)
    chosen, untold, unknown, below = list[Told](), 0, 0, 0
    for some in of.values():
        read = [one for one in some if one.trace is not None]
        known = [(accuracy, one) for one in read if (accuracy := one.accuracy) is not None]
        if not read:
            untold += 1
        elif not known:
            unknown += 1
        else:
            best, one = max(known, key=lambda pair: pair[0])  # the first of equal ones
            if best < least:
                below += 1
            else:
                chosen.append(one)
    return Selection(chosen, untold, unknown, below)


def write_selection(data: str, out: str, least: float, direct: bool = False) -> list[str]:
    """From a folder of principles.jsonl and traces.jsonl to another, of the edits that have a
    chosen trace; returns what to print. direct: verdicts and score alone are kept of it. Raises
    `UserError` where nothing is chosen."""
    root, to = folder_of(data, "data"), Path(out)
    if to.resolve() == root.resolve():
        raise DataError(f"out: {out} is the data (accepted: another folder)")
    edits = read_edits(root / PRINCIPLES, principles=True)
    told = read_told(root / TRACES, edits)
    found = select(edits, told, least)
    reasons = [
        f"{count} {why}"
        for count, why in (
            (found.untold, "without a trace that can be read"),
            (found.unknown, "without gold"),
            (found.below, f"below {least:g}"),
        )
        if count
    ]
    if not found.chosen:
        raise UserError(f"{root}: no trace is chosen of {len(edits)} edits: {', '.join(reasons)}")
    names = {one.id for one in found.chosen}
    with RunLock(to) as lock:
        lock.take(make=True)
        write_edits(to / PRINCIPLES, [edit for edit in edits if edit.id in names])
        write_told(to / TRACES, map(_directly, found.chosen) if direct else found.chosen)
    said = [f"traces: {to / TRACES} ({len(found.chosen)} of {len(edits)} edits)"]
    said += [f"  {reason}" for reason in reasons]
    read = [one for one in told if one.accuracy is not None]
    said.append(f"verdicts right: {_mean(found.chosen)} of the chosen, {_mean(read)} of all")
    judges = list(dict.fromkeys(one.judge for one in read if one.judge))
    for judge in judges:
        theirs = [one for one in read if one.judge == judge]
        taken = sum(one.judge == judge for one in found.chosen)
        said.append(f"  {judge}: {_mean(theirs)}, {taken} of {len(theirs)} chosen")
    return said


def _directly(told: Told) -> Told:
    """The same without its reasoning."""
    assert told.trace is not None
    return replace(told, text=write_trace("", told.trace.verdicts, told.trace.score))


def _mean(told: Sequence[Told]) -> str:
    values = [one.accuracy for one in told if one.accuracy is not None]
    return f"{100 * math.fsum(values) / len(values):.1f} %"
