"""Outputs of sessions as questions for people (`editr2 label`): of each turn, which sibling is
better."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from editr2.errors import DataError
from editr2.files import in_place_of
from editr2.judge.outputs import Output, read_outputs
from editr2.label.questions import MOST, QUESTIONS, Question, write_questions
from editr2.sessions import Session


def write_asked(folders: Sequence[str], sessions: Mapping[str, Session], out: Path) -> Path:
    """A question a turn of every session that has two outputs or more. Returns the file. Raises
    DataError where none has."""
    questions = []
    by_session = itertools.groupby(read_outputs(folders, sessions), lambda one: one.session.id)
    for _, some in by_session:
        siblings = list(some)[:MOST]
        if len(siblings) > 1:
            questions += _questions(siblings, out / "sources")
    if not questions:
        raise DataError(
            f"{', '.join(folders)}: no session has two outputs (accepted: --outputs again, of "
            "another seed or editor)"
        )
    write_questions(out / QUESTIONS, questions)
    return out / QUESTIONS


def _questions(siblings: Sequence[Output], sources: Path) -> list[Question]:
    session = siblings[0].session
    sources.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(session.id.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    source = sources / f"{name}.png"
    with in_place_of(source) as part:
        Image.fromarray(session.image).save(part, "PNG")
    return [
        Question(
            f"{session.id}/{t + 1}",
            source,
            tuple(one.images[t].absolute() for one in siblings),
            turn.instruction,
            tuple(before.instruction for before in session.turns[:t]),
            tuple(one.images[t - 1].absolute() for one in siblings) if t else (),
            tuple(turn.meta.get("principles", ())),
            turn.task,
        )
        for t, turn in enumerate(session.turns)
    ]
