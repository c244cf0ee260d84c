"""From votes to `pairs.jsonl`, which a verifier learns from and `editr2 benchmark` reads, and to
`votes.jsonl`, every vote as it was given.

    votes.jsonl   {"id", "person", "answer", "principles"?, "shown", "seconds", "at"}

`answer` is the place of every output in the order of the question, 0 the best; or `bad` or `skip`.
A principle's is of what it holds for: [0, 1] the first output alone, [0, 0] both, `bad` neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editr2.files import json_line, write_lines
from editr2.label.questions import Question, relative
from editr2.label.store import Vote
from editr2.label.summary import KNOWN, said_of


@dataclass
class Exported:
    """Rows of `pairs.jsonl`, and of the pairs that are none of them how many, by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def preferences(
    questions: Iterable[Question], votes: Sequence[Vote], file: Path, *, least: float = 0.0
) -> Exported:
    """A row for each pair of outputs of which more people prefer one.

    `margin` is by how much: the votes for it less those against, of all that said something of the
    pair (a tie and "both bad" are for nobody), in (0, 1].

    Args:
        file: where they will stand; images below its folder are named relative to it.
        least: margins below this are left out.
    """
    found = Exported()
    by_id = {one.id: one for one in questions}
    said = said_of((), votes)
    for (name, i, j), of_pair in sorted(said.items()):
        one = by_id[name]
        counts = Counter(what for person, what in of_pair.items() if person != KNOWN)
        ahead = counts["first"] - counts["second"]
        if not ahead:
            undecided = counts["first"] + counts["second"] > 0
            found.left_out["people are divided" if undecided else "ties or all bad"] += 1
            continue
        margin = abs(ahead) / counts.total()
        if margin < least:
            found.left_out[f"margin below {least:g}"] += 1
            continue
        win, lose = (i, j) if ahead > 0 else (j, i)
        row: dict[str, Any] = {
            "id": name if len(one.outputs) == 2 else f"{name}/{i + 1}-{j + 1}",
            "image": relative(one.befores[win] if one.befores else one.image, file),
            "win": relative(one.outputs[win], file),
            "lose": relative(one.outputs[lose], file),
            "instruction": one.instruction,
        }
        if one.befores and one.befores[win] != one.befores[lose]:
            found.left_out["made of different images"] += 1
            continue
        if one.principles:
            row["principles"] = [dict(each) for each in one.principles]
        if one.task is not None:
            row["task"] = one.task
        found.rows.append(row | {"margin": margin})
    return found


def write_preferences(file: Path, exported: Exported) -> None:
    """Whole, or not at all."""
    write_lines(file, map(json_line, exported.rows))


def write_votes(file: Path, votes: Iterable[Vote]) -> None:
    """Whole, or not at all."""
    rows = (
        {
            "id": vote.question,
            "person": vote.person,
            "answer": vote.answer,
            **({"principles": vote.principles} if vote.principles else {}),
            "shown": vote.shown,
            "seconds": vote.seconds,
            "at": round(vote.at, 3),
        }
        for vote in votes
    )
    write_lines(file, map(json_line, rows))
