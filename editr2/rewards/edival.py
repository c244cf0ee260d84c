"""`edival`: IF and CC as EdiVal-Bench judges, which MT-EditFlow (arXiv 2606.01985) trains with. For
sessions that have its fields.

The rules are those of `edit-r2` but for these: everything is seen at 512²; the judge is asked once,
at temperature 0, about adding and replacing by the objects' names; a text that replaces another is
read in the output at the place of what bears it, which has to be found in both images; a moved
thing and its reference are counted at one threshold and placed at another (`placed`), and one box
inside of the other is no position; a change of the background leaves nothing to compare.

`released: true`: as in `edit-r2` for register tokens and plurals; what a change of the background
keeps is looked for by the surest box alone; a hat or a bird is removed where the one word finds
none; and objects that are not found are kept by 0.

The published rule has the judge shorten the names of what is moved first ("red wooden chair" to
"chair"). Here the names are asked for as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.rewards import edit_r2
from editr2.rewards.base import Score
from editr2.rewards.features import crop
from editr2.rewards.geometry import inside
from editr2.rewards.object_edits import (
    Case,
    ObjectOptions,
    ObjectReward,
    Rule,
    Thresholds,
    resized_to,
    scores_among,
)
from editr2.rewards.wording import Place

SIDE = 512


@dataclass(frozen=True)
class EdivalThresholds(Thresholds):
    """The published numbers; see `Thresholds`.

    Args:
        placed: of the boxes that are held against each other in position_change.
    """

    placed: float = setting(0.30, Bounds(at_least=0, at_most=1))


@dataclass(frozen=True, repr=False)
class EdivalOptions(ObjectOptions):
    """Options of `edival`; see `ObjectOptions` for the rest.

    Args:
        scores: which of IF and CC. CC alone needs no judge.
        thresholds: of the rules.
        features: EdiVal's is the smaller DINOv3.
        temperature: of answers; at 0 there is one vote.
        answers: by votes, as published, IF is 0 or 1.
    """

    scores: tuple[str, ...] = scores_among("IF", "CC")
    thresholds: EdivalThresholds = field(default_factory=EdivalThresholds)
    features: str | None = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    temperature: float = setting(0.0, Bounds(at_least=0, at_most=2))
    answers: Literal["auto", "logprobs", "systemone", "votes"] = "votes"


def written(j: ObjectReward, case: Case) -> Score:
    name = case.edit.object
    if name is None:
        return j.reads(case, case.after)
    before, after = (j.find(image, name, j.thresholds.text) for image in (case.before, case.after))
    if not (before and after):
        return Score(0.0, f"{name} was not found in the {'output' if before else 'source'}")
    part = crop(case.after, before[0].box)
    if part is None:
        return Score(0.0, f"{name} is smaller than a pixel")
    return j.reads(case, part)


def moved(j: ObjectReward, case: Case) -> Score:
    assert isinstance(j.thresholds, EdivalThresholds)
    if wrong := edit_r2.same_counts(j, case):
        return wrong
    edit, least = case.edit, j.thresholds.placed
    found = [j.find(case.after, name, least) for name in (edit.object, edit.reference)]
    if not all(found):
        missing = edit.reference if found[0] else edit.object
        return Score(0.0, f"{missing} was not found in the output")
    box, of = (one[0].box for one in found)
    if inside(box, of) or inside(of, box):
        return Score(0.0, f"{edit.object} and {edit.reference}: one box is inside of the other")
    return edit_r2.in_order(case, box, of)


_ONE_WORD = ("hat", "bird")
"""Of what the release looks for again by one word."""


def removed(j: ObjectReward, case: Case) -> Score:
    score = edit_r2.removed(j, case)
    name, least = case.edit.object or "", j.thresholds.remove
    if not j.released or score.value != 0 or not j.find(case.before, name, least):
        return score
    for word in _ONE_WORD:
        if word in name.lower() and not j.find(case.after, word, least):
            return Score(1.0, f"no {word} was found in the output")
    return score


RULES: dict[str, Rule] = {
    **edit_r2.RULES,
    "text_change": written,
    "position_change": moved,
    "subject_remove": removed,
}

_DETECTOR = "detector/instruction_detector.py"

PLACES: dict[str, Place] = {
    "add": Place(_DETECTOR, ("VLM_DD_ADD_OBJECT_PROMPT",), fields={"{object_name}": "new"}),
    "replace": Place(
        _DETECTOR,
        ("VLM_DD_REPLACE_PROMPT",),
        fields={"{object_name}": "object", "{new_object}": "new"},
    ),
    "colour": Place(
        _DETECTOR, ("VLM_DD_COLOR_ALTER_PROMPT",), fields={"{instruction}": "formatted"}
    ),
    "material": Place(
        _DETECTOR, ("VLM_DD_MATERIAL_ALTER_PROMPT",), fields={"{instruction}": "formatted"}
    ),
    "text": Place(_DETECTOR, ("VLM_TEXT_PROMPT",)),
    "background": Place(
        _DETECTOR, ("VLM_BACKGROUND_PROMPT",), fields={"{background}": "background"}
    ),
}
"""Of github.com/TianyuCodings/EdiVal at a7bbdecc."""


class Edival(ObjectReward):
    """See the module."""

    Options = EdivalOptions
    calls_a_turn = 1
    RULES: ClassVar[Mapping[str, Rule]] = RULES
    PLACES: ClassVar[Mapping[str, Place]] = PLACES
    FOLDER: ClassVar[str] = "edival"

    def seen(self, image: np.ndarray) -> np.ndarray:
        return resized_to(image, SIDE, SIDE)

    def consistency(
        self,
        source: np.ndarray,
        output: np.ndarray,
        unchanged: Sequence[str],
        every: Sequence[str],
        background_changed: bool,
    ) -> dict[str, float | None]:
        if background_changed:
            return {}
        parts = super().consistency(source, output, unchanged, every, False)
        if self.released and unchanged and parts["objects"] is None:
            parts["objects"] = 0.0
        return parts
