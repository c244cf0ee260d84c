"""What a turn may lack and why, in kinds that can be counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KINDS = {
    "no answer": "the judge did not answer",
    "unread": "the judge's answer cannot be read",
    "other": "not one edit of the nine kinds",
    "form": "the judge's form does not fit the kind",
    "mismatch": "the form says another kind than the task",
    "pronoun": "a pronoun was left in the form",
    "letters": "text that is not the request's, letter by letter",
    "refused": "at a second look the judge holds it for another edit",
    "several": "a name may mean several things",
    "unknown": "names what is not among the things that are known",
    "gone": "asks for what is not there any more",
    "given": "what the session gives does not fit together",
    "detector": "the detector did not answer",
    "before": "an earlier turn lacks its edit, so what is there is not known",
    "not asked": "nothing was asked (no --url)",
}
"""Why fields are missing."""


@dataclass(frozen=True)
class Problem:
    """turn: from 1, 0 of the session. fields: which are missing."""

    kind: str
    why: str
    turn: int
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return f"{KINDS[self.kind]}: {self.why}" if self.why else KINDS[self.kind]


@dataclass(frozen=True)
class Named:
    """A problem of a session."""

    session: str
    problem: Problem


def by_kind(named: Iterable[Named]) -> list[str]:
    """A line a kind, the most frequent first, with its first case."""
    found: dict[str, list[Named]] = {}
    for one in named:
        found.setdefault(one.problem.kind, []).append(one)
    lines = []
    for kind, cases in sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        first = cases[0]
        turn = f", turn {first.problem.turn}" if first.problem.turn else ""
        why = f": {first.problem.why}" if first.problem.why else ""
        lines.append(f"{len(cases)} x {KINDS[kind]} (first: {first.session}{turn}{why})")
    return lines
