"""`imgedit`: the rubric of ImgEdit-Bench (arXiv 2505.20275): by the kind of edit one question about
source and output, answered by three whole numbers from 1 to 5. The score is their mean over 5, so 5
times it is the mean itself. Any chat model that sees images answers; published figures are GPT-4o's
and GPT-4.1's.

The kind is the turn's `task`, one of `TYPES`. A turn of another kind fails, and so does an answer
without three such numbers. (The release leaves such lines out, means what is left, and rounds every
mean to two places.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from editr2.config.fields import Bounds, setting
from editr2.errors import shown
from editr2.rewards.ask import Asking
from editr2.rewards.base import Item, Score
from editr2.rewards.client import Server
from editr2.rewards.reading import Unread, answer_part, numbers, quoted
from editr2.rewards.served import Served
from editr2.rewards.wording import Place
from editr2.sessions import Session

TYPES = (
    *("add", "adjust", "extract", "replace", "remove"),
    *("background", "style", "compose", "action"),
)
"""Kinds of edit, as the benchmark names them."""

ASPECTS = 3
HIGH = 5
SCALE = numbers(1, HIGH, whole=True)

PLACES: dict[str, Place] = {
    one: Place(
        "Benchmark/Basic/prompts.json",
        (one,),
        fields={"<edit_prompt>": "instruction"},
        doubled=False,
    )
    for one in TYPES
}
"""Of github.com/PKU-YuanGroup/ImgEdit at 547185d2."""

_MARKS = r"[^\w\n]*"
_LINE = re.compile(
    rf"^{_MARKS}(?:\d[.)]{_MARKS})?([^\W\d][^:\n]*?){_MARKS}:"
    rf"{_MARKS}?(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*{HIGH})?{_MARKS}$",
    re.M,
)
_ASIDE = re.compile(r"reason|average|mean\b|overall|total", re.I)
"""Of lines that are none of the three."""


@dataclass(frozen=True, repr=False)
class ImgEditOptions(Server, Asking):
    """Options of `imgedit`; see `Server` and `Asking` for the rest.

    Args:
        ask: the judge always gives its reasons.
        answers: and is always read as text.
        votes: answers, of which the mean counts.
        prompts: in place of ours: a folder, a file, or a checkout of the published project (or its
            Benchmark/Basic/prompts.json); none: ours.
    """

    ask: Literal["think"] = "think"
    answers: Literal["votes"] = "votes"
    votes: int = setting(1, Bounds(at_least=1, at_most=64))
    temperature: float = setting(0.0, Bounds(at_least=0, at_most=2))
    prompts: str | None = setting(None, path=True)


class ImgEdit(Served):
    """See the module."""

    calls_a_turn = 1
    Options = ImgEditOptions
    FOLDER: ClassVar[str] = "imgedit"
    PLACES: ClassVar[Mapping[str, Place]] = PLACES
    scale = "the mean of three from 1 to 5, over 5"

    def lacks(self, session: Session) -> str | None:
        """The first turn whose kind of edit has no rubric; None where all have one."""
        for number, turn in enumerate(session.turns, 1):
            if turn.task not in TYPES:
                return f"score fails, turn {number}: {_no_rubric(turn.task)}"
        return None

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        what = item.session.turns[turn]
        if what.task not in TYPES:
            return {"score": Score(None, _no_rubric(what.task))}
        text, _ = self.prompts(what.task, instruction=what.instruction)
        parts = [text, item.before(turn), item.images[turn]]  # in the order of the release
        said = self.asker.read(
            parts, [], _read, ("score",), seed=item.seed, name="score", turn=turn
        )
        return {"score": said["score"]}


def _no_rubric(task: str | None) -> str:
    given = "no kind of edit" if task is None else f"no rubric for {shown(repr(task))}"
    return f"{given} (accepted: {', '.join(TYPES)})"


def _read(text: str) -> dict[str, float | None]:
    said = answer_part(text)
    given = [(name, number) for name, number in _LINE.findall(said) if not _ASIDE.search(name)]
    if len(given) != ASPECTS:
        raise Unread(
            f"{len(given)} lines of `name: number` in {quoted(said[-57:])} (accepted: {ASPECTS}, "
            f"each {SCALE.what})"
        )
    points = []
    for name, number in given:
        try:
            points.append(1 + (HIGH - 1) * SCALE.worth(float(number)))
        except Unread as unread:
            raise Unread(f"{name}: {unread}") from None
    return {"score": math.fsum(points) / (ASPECTS * HIGH)}
