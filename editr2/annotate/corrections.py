"""Corrections by hand, a file of JSON Lines that `annotations.html` writes:

    {"session": "kitchen", "source_objects": [{"name": "cup", "foreground": true, "seen": true}]}
    {"session": "kitchen", "turn": 2, "instruction": "make it blue", "task": "color_alter",
     "formatted_instruction": "Change the color of [red cup] to [blue]"}

A line names a session and, for fields of a turn, the turn from 1; what it does not name stays. With
`instruction`, the turn has to have just that one. Lists that follow from the edits follow from the
corrected ones, unless a line has them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from editr2.annotate.annotate import BY_HAND, objects_problem
from editr2.annotate.fields import (
    FIELDS,
    OBJECTS,
    ORIGINS,
    edit_of,
    origins_of,
    problem_of,
    value_of,
)
from editr2.errors import DataError, shown
from editr2.sessions import Session, Turn
from editr2.sessions.records import lines_of, parse_object
from editr2.sessions.session import kind

_OF_TURN = ("session", "turn", "instruction", *FIELDS)
_OF_SESSION = ("session", OBJECTS)


def corrected(sessions: Sequence[Session], path: str | os.PathLike[str]) -> list[Session]:
    """The sessions with the corrections of a file. Raises `DataError`, `file:line: field: problem
    (accepted: ...)`, for the first line that is wrong; then none is applied."""
    file, by_id = Path(path), {session.id: session for session in sessions}
    changed: dict[str, str] = {}
    for number, raw in lines_of(file):
        where = f"{file}:{number}"
        try:
            row = parse_object(raw)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        name = row.get("session")
        session = by_id.get(name) if isinstance(name, str) else None
        if session is None:
            raise DataError(
                f"{where}: session: {shown(kind(name))} (accepted: the id of one of the "
                f"{len(by_id)} sessions)"
            )
        known = _OF_TURN if "turn" in row else _OF_SESSION
        for key in row:
            if key not in known:
                of = "a turn" if "turn" in row else "a session"
                raise DataError(
                    f"{where}: {shown(key)}: no field of {of} (accepted: {', '.join(known)})"
                )
        change = _turn if "turn" in row else _objects
        by_id[session.id] = change(session, row, where)
        changed[session.id] = where
    for name, where in changed.items():
        _fits(by_id[name], where)
    return [by_id[session.id] for session in sessions]


def _objects(session: Session, row: Mapping[str, Any], where: str) -> Session:
    if OBJECTS not in row:
        raise DataError(f"{where}: turn: missing (accepted: a turn from 1, or {OBJECTS})")
    if problem := objects_problem(row[OBJECTS]):
        raise DataError(f"{where}: {OBJECTS}: {kind(row[OBJECTS])} {problem}")
    origins = {**origins_of(session.meta), OBJECTS: BY_HAND}
    meta = {**session.meta, OBJECTS: row[OBJECTS], ORIGINS: origins}
    return replace(session, image=vars(session)["image"], meta=meta)


def _turn(session: Session, row: Mapping[str, Any], where: str) -> Session:
    number, count = row["turn"], len(session.turns)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= count:
        raise DataError(f"{where}: turn: {kind(number)} (accepted: 1 to {count})")
    turn = session.turns[number - 1]
    if "instruction" in row and row["instruction"] != turn.instruction:
        raise DataError(
            f"{where}: instruction: {kind(row['instruction'])} (accepted: that of turn {number} of "
            f"session {shown(repr(session.id))}, {kind(turn.instruction)})"
        )
    for name in FIELDS:
        if name in row:
            if problem := problem_of(name, row[name]):
                raise DataError(f"{where}: {name}: {kind(row[name])} {problem}")
            turn = _with(turn, name, row[name])
    turns = (*session.turns[: number - 1], turn, *session.turns[number:])
    return replace(session, image=vars(session)["image"], turns=turns)


def _with(turn: Turn, name: str, value: Any) -> Turn:
    origins = {**origins_of(turn.meta), name: BY_HAND}
    meta = {**turn.meta, ORIGINS: origins}
    if name == "task":
        return replace(turn, task=value, meta=meta)
    return replace(turn, meta={**meta, name: value})


def _fits(session: Session, where: str) -> None:
    """Task and form of a turn that was corrected say the same; without a task, the form parses."""
    for number, turn in enumerate(session.turns, 1):
        by_hand = [n for n in ("task", "formatted_instruction") if _is_by_hand(turn, n)]
        # A form tells its task; a task alone leaves its form to be found.
        if by_hand and value_of(turn, "formatted_instruction") is not None:
            edit, why = edit_of(turn)
            if edit is None:
                raise DataError(
                    f"{where}: {by_hand[-1]}: turn {number} of session "
                    f"{shown(repr(session.id))}: {why} (accepted: a form of its task, "
                    f"docs/data.md)"
                )


def _is_by_hand(turn: Turn, name: str) -> bool:
    return origins_of(turn.meta).get(name) == BY_HAND
