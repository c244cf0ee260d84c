"""`rational`: the four aspects of RationalRewards (arXiv 2604.11626), a chat model that gives its
reasons and then a number from 1 to 4 each: is what was asked for there, is the rest kept, does it
look real, is text right (which may not apply). A number x is (x - 1) / 3; `overall` is the mean of
the aspects that apply. `released: true`: without the second, which the release leaves out of its
mean.

Answers are read between tags, or as the judge was tuned to write them, numbered headings with a
line of the score below each. By other prompts than those it was tuned on, its scores are not
comparable with published ones. The release sends half of its prompt as a system message; here all
of it is one message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from editr2.config.fields import Bounds, setting
from editr2.rewards.ask import Asking
from editr2.rewards.base import Item, Score
from editr2.rewards.client import Part, Server
from editr2.rewards.object_edits import scores_among
from editr2.rewards.reading import Unread, answer_part, last_tag, numbers
from editr2.rewards.served import Served
from editr2.rewards.wording import Place

ASPECTS = {
    "text_faithfulness": "Text Faithfulness",
    "image_faithfulness": "Image Faithfulness",
    "physical_quality": "Physical and Visual Quality",
    "text_rendering": "Text Rendering",
}
"""Name -> heading of the tuned judge's answers."""

OPTIONAL = "text_rendering"
"""What may not apply."""

SCALE = numbers(1, 4)

_FILE = "diffusion_rl_training/train_flux_kontext_rationalrewards.py"

PLACES: dict[str, Place] = {
    "judge": Place(
        _FILE,
        ("SYSTEM_PROMPT", "TASK_RELATED_TEMPLATE", "COMMON_TASK_GUIDELINE"),
        fields={"{request}": "instruction"},
        doubled=False,
    )
}
"""Of github.com/TIGER-AI-Lab/RationalRewards at 44e27ab6."""


@dataclass(frozen=True, repr=False)
class RationalOptions(Server, Asking):
    """Options of `rational`; see `Server` and `Asking` for the rest.

    Args:
        scores: which of overall and the four aspects.
        ask: the judge always gives its reasons.
        answers: and is always read as text.
        votes: answers, of which the mean counts.
        max_tokens: of an answer, whose reasons are long.
        prompts: in place of ours: a folder, a file, or a checkout of the published project; none:
            ours.
        released: overall without image_faithfulness.
    """

    scores: tuple[str, ...] = scores_among("overall", *ASPECTS, default=("overall",))
    ask: Literal["think"] = "think"
    answers: Literal["votes"] = "votes"
    votes: int = setting(1, Bounds(at_least=1, at_most=64))
    temperature: float = setting(0.0, Bounds(at_least=0, at_most=2))
    max_tokens: int = setting(2048, Bounds(at_least=16, at_most=65_536))
    prompts: str | None = setting(None, path=True)
    released: bool = False


class Rational(Served):
    """See the module."""

    calls_a_turn = 1
    Options = RationalOptions
    FOLDER = "rational"
    PLACES = PLACES
    scale = "(x - 1) / 3 of 1 to 4"

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        text, _ = self.prompts("judge", instruction=item.session.turns[turn].instruction)
        before, after = item.before(turn), item.images[turn]
        parts = placed(text, [before, after])
        names = ("overall", *ASPECTS)
        said = self.asker.read(
            parts, [], self._read, names, seed=item.seed, name=self.names[0], turn=turn
        )
        return {name: said[name] for name in self.names}

    def _read(self, text: str) -> dict[str, float | None]:
        values = aspects_in(text)
        counted = [
            value
            for name, value in values.items()
            if value is not None and not (self.options.released and name == "image_faithfulness")
        ]
        return {**values, "overall": math.fsum(counted) / len(counted)}


def placed(text: str, images: Sequence[object]) -> list[Part]:
    """The parts of a prompt: images where it has `<image>` for each of them, else before it."""
    pieces = text.split("<image>")
    if len(pieces) != len(images) + 1:
        return [*images, text]  # type: ignore[list-item]
    parts: list[Part] = []
    for piece, image in zip(pieces, [*images, None], strict=True):
        parts += [piece] if piece.strip() else []
        parts += [] if image is None else [image]  # type: ignore[list-item]
    return parts


def aspects_in(text: str) -> dict[str, float | None]:
    """The four aspects of an answer in [0, 1]; None of one that does not apply. Raises `Unread`."""
    text = answer_part(text)
    return {name: _aspect(text, name, heading) for name, heading in ASPECTS.items()}


def _aspect(text: str, name: str, heading: str) -> float | None:
    try:
        said = last_tag(text, name)
    except Unread:
        said = _below(text, heading)
    if name == OPTIONAL and re.fullmatch(r"\W*n\s*/?\s*a\W*", said, re.I):
        return None
    try:
        return SCALE.worth(said)
    except Unread as unread:
        raise Unread(f"{name}: {unread}") from None


def _below(text: str, heading: str) -> str:
    """The score in the section of a heading: `2. Heading:`, and a line with `Score:` before the
    next numbered heading."""
    sections = re.split(rf"(?m)^\W*\d\.\s*\W*{re.escape(heading)}\W*", text)
    if len(sections) > 1:
        own = re.split(r"(?m)^\W*\d\.\s", sections[-1])[0]
        found = re.findall(r"(?mi)^\W*Score\W*:\s*(.+)$", own)
        if found:
            return str(found[-1]).strip(" *_~`")
    raise Unread(f"no {heading!r} came back with a score")
