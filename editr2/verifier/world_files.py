"""The world's edits as the stages' files: pictures, principles, traces with gold, and pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from editr2.verifier.candidates import Candidates
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    Edit,
    Picture,
    Preference,
    Told,
    write_edits,
    write_preferences,
    write_told,
)
from editr2.verifier.world import Look, look, misread, principles

RULES = "rules"
"""Whose traces they are."""


@dataclass(frozen=True)
class Judged:
    """An edit on disk, and what is to be said of it. kind: of the candidate. seen: by who writes
    the trace."""

    edit: Edit
    look: Look
    kind: str
    seen: Look


@dataclass(frozen=True)
class Counts:
    """What was written. swapped: pairs whose preference is wrong on purpose. misread: traces of
    who took a cell for another."""

    edits: int
    pairs: int
    swapped: int
    misread: int = 0


def write_world(
    folder: Path,
    groups: Iterable[Candidates],
    *,
    noise: float,
    most: int,
    seed: int,
    misread_share: float = 0.0,
) -> Counts:
    """Writes `principles.jsonl`, `traces.jsonl` and `pairs.jsonl` with their pictures.

    Pairs are edits of one group with different exact scores, drawn; of a share `noise` of them,
    drawn too, the preference is the other way round. most: pairs a group. misread_share: of
    traces in which one cell is taken for another, and what is written follows from that; gold and
    pairs stay exact.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    judged: list[Judged] = []
    pairs: list[Preference] = []
    swapped = 0
    for number, group in enumerate(groups):
        some = _on_disk(folder, group, misread_share, np.random.default_rng([seed, number, 1]))
        judged += some
        rng = np.random.default_rng([seed, number])
        for win, lose in _drawn(some, most, rng):
            margin = win.look.score - lose.look.score
            if turned := bool(rng.random() < noise):
                win, lose, margin = lose, win, -margin
            swapped += turned
            pairs.append(_pair(f"{group.id}/{len(pairs)}", win.edit, lose.edit, margin))
    write_edits(folder / PRINCIPLES, (one.edit for one in judged))
    write_told(folder / TRACES, (_told(one) for one in judged))
    write_preferences(folder / PAIRS, pairs)
    wrong = sum(one.seen is not one.look for one in judged)
    return Counts(len(judged), len(pairs), swapped, wrong)


def _on_disk(
    folder: Path, group: Candidates, share: float, rng: np.random.Generator
) -> list[Judged]:
    stem = group.id.replace("/", "_")
    before = _picture(folder / "images" / f"{stem}.png", group.before)
    found = []
    for k, (kind, image) in enumerate(group.edits):
        edit = Edit(
            f"{group.id}/{kind}-{k}",
            before,
            _picture(folder / "images" / f"{stem}_{k}.png", image),
            group.request.instruction,
            principles(group.request),
            group.request.op.kind,
        )
        there = look(group.request, group.before, image)
        told = misread(there, rng) if rng.random() < share else there
        found.append(Judged(edit, there, kind, told))
    return found


def _picture(path: Path, image: np.ndarray) -> Picture:
    Image.fromarray(image).save(path)
    return Picture(path, str(path))


def _drawn(
    some: Sequence[Judged], most: int, rng: np.random.Generator
) -> list[tuple[Judged, Judged]]:
    """Pairs of a group, the better one first."""
    differ = [
        (a, b) if a.look.score > b.look.score else (b, a)
        for a, b in combinations(some, 2)
        if a.look.score != b.look.score
    ]
    return [differ[k] for k in rng.permutation(len(differ))[:most]]


def _pair(name: str, win: Edit, lose: Edit, margin: float) -> Preference:
    def named(edit: Edit, side: str) -> Edit:
        return Edit(
            f"{name}/{side}",
            edit.image,
            edit.edited,
            edit.instruction,
            edit.principles,
            edit.task,
        )

    return Preference(named(win, "win"), named(lose, "lose"), margin)


def _told(one: Judged) -> Told:
    return Told.of(one.edit, one.seen.trace, gold=one.look.verdicts, judge=RULES)
