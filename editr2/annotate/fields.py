"""The fields that object-centred rewards judge a turn by, and which of them a session lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editr2.rewards.geometry import TASKS, Edit, parse_edit
from editr2.sessions import Session, Turn

LISTS = ("unchanged_objects", "available_objects", "all_objects")
FIELDS = ("task", "formatted_instruction", *LISTS, "bg_consistency")
"""As the released sets name them; `task` is the turn's own, the others are in its `meta`."""

OBJECTS = "source_objects"
"""In a session's `meta`: the things of the source."""

ORIGINS = "annotated"
"""In `meta`: field -> where it is from."""

LACKING = "lacking: "
"""What an origin begins with where there is no value."""

REWARDS = "edit-r2, edival"


def value_of(turn: Turn, name: str) -> Any:
    return turn.task if name == "task" else turn.meta.get(name)


def problem_of(name: str, value: Any) -> str | None:
    """What is wrong with a field's value, or None."""
    if name == "task":
        return None if value in TASKS else f"(accepted: {', '.join(TASKS)})"
    if name == "bg_consistency":
        return None if isinstance(value, bool) else "(accepted: true, false)"
    if name in LISTS:
        good = isinstance(value, list | tuple) and all(
            isinstance(one, str) and one.strip() for one in value
        )
        return None if good else "(accepted: a list of names)"
    return None if isinstance(value, str) and value.strip() else "(accepted: a text)"


def edit_of(turn: Turn) -> tuple[Edit | None, str]:
    """What a turn's task and form say, or why that cannot be read."""
    return parse_edit(turn.meta.get("formatted_instruction"), turn.task, turn.instruction)


def lacking(turn: Turn) -> list[str]:
    """The fields that a turn does not have in a usable form."""
    lacks = [name for name in FIELDS if problem_of(name, value_of(turn, name)) is not None]
    if not {"task", "formatted_instruction"} & set(lacks) and edit_of(turn)[0] is None:
        lacks.append("formatted_instruction that can be read")
    return lacks


@dataclass
class Tally:
    """How many sessions can be judged. lacks: sessions by field that one of their turns lacks."""

    sessions: int = 0
    whole: int = 0
    lacks: Counter[str] = field(default_factory=Counter)

    def add(self, session: Session) -> None:
        missing = dict.fromkeys(name for turn in session.turns for name in lacking(turn))
        self.sessions += 1
        self.whole += not missing
        self.lacks.update(missing.keys())

    def __str__(self) -> str:
        said = f"{self.whole} of {self.sessions} sessions have what {REWARDS} judge by"
        if not self.lacks:
            return said
        counts: dict[int, list[str]] = {}
        for name, count in self.lacks.items():
            counts.setdefault(count, []).append(name)
        names = "; ".join(f"{count} lack {', '.join(of)}" for count, of in counts.items())
        return f"{said}; {names} (`editr2 data annotate` adds them)"


def origins_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """Where annotated fields are from; without those that say what is lacking."""
    said = meta.get(ORIGINS)
    if not isinstance(said, Mapping):
        return {}
    return {
        str(name): origin
        for name, origin in said.items()
        if isinstance(origin, str) and not origin.startswith(LACKING)
    }
