"""Film-strips of several outputs of a session: what the template's `strip` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from editr2.report.gallery import ScoreBar
from editr2.report.pictures import Picture


@dataclass(frozen=True)
class Bar(ScoreBar):
    """range: of a score that was asked about several times, where it differs."""

    range: str | None = None


@dataclass(frozen=True)
class Cell:
    """One image. problems: a word and what was said ("failed", "no answer"). kind: "before" and
    "after" have a colour each."""

    name: str
    picture: Picture | None
    alt: str
    scores: Sequence[Bar]
    problems: Sequence[tuple[str, str]] = ()
    kind: str = ""


@dataclass(frozen=True)
class TurnView:
    number: int
    instruction: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class SessionView:
    """rows: cells of a turn. notes: beside its name. change: what stands at the right, and in bold
    `changed`, in the colour of `verdict` ("better", "worse" or "")."""

    id: str
    mode: str | None
    source: Picture | None
    turns: Sequence[TurnView]
    rows: int
    notes: Sequence[str] = field(default=())
    change: str = ""
    changed: str = ""
    verdict: str = ""
