"""`edit-r2`: IF, CC and GA as Edit-R2 (arXiv 2606.05950) trains with, for sessions that have the
fields of MICE-Bench.

- IF, source of the turn -> its output: a rule a kind of edit (`RULES`); where it asks the judge,
  the mean of `votes` answers of yes or no.
- CC, I₀ -> output: the mean of how well the unchanged objects are kept (crops at their boxes in I₀)
  and how well everything outside of all objects' boxes is, which a change of the background ends.
- GA: one question about I₀ to the output, with the requests so far: did every turn succeed, with
  the standing rules (cm) or for what was meant (cu)? The mean of `votes` answers.

`released: true` has the published rules also where they are mistakes: register tokens are patches,
nothing that a change of the background should keep is looked for, names lose an s or es whatever
they are, CC is 0.5 where nothing is left to compare and without one of its two lists, and only the
turn's own flag says that the background changed. What its servers make of an error (0, 0.5, no) is
left out: failures are failures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from editr2.rewards.base import Item, Score
from editr2.rewards.geometry import (
    Box,
    Edit,
    deduplicate,
    iou,
    is_beside,
    released_singular,
    singular,
)
from editr2.rewards.object_edits import (
    Case,
    ObjectOptions,
    ObjectReward,
    Rule,
    scores_among,
)
from editr2.rewards.reading import YES_NO, answer_part, last_tag
from editr2.rewards.wording import Place

FINAL = "answer_final"
"""The tag of GA's verdict."""


@dataclass(frozen=True, repr=False)
class EditR2Options(ObjectOptions):
    """Options of `edit-r2`; see `ObjectOptions` for the rest.

    Args:
        scores: which of IF, CC and GA. CC alone needs no judge.
        answers: of IF's questions. By votes, as published, IF is 0 where all of them say no, which
            the filter of later turns looks for; a probability hardly ever is.
    """

    scores: tuple[str, ...] = scores_among("IF", "CC", "GA")
    answers: Literal["auto", "logprobs", "systemone", "votes"] = "votes"


# --------------------------------------------------------------------------------- rules of IF


def added(j: ObjectReward, case: Case) -> Score:
    """Found in the output, on the asked side of the reference in the source; and the judge."""
    edit, least = case.edit, j.thresholds
    new = j.find(case.after, edit.new, least.add)
    if not new:
        return Score(0.0, f"{edit.new} was not found in the output")
    if edit.side is not None:
        references = j.find(case.before, edit.reference, least.add)
        if not references:
            return Score(0.0, f"{edit.reference} was not found in the source")
        pairs = ((one.box, of.box) for of in references for one in new)
        if not any(is_beside(box, edit.side, of, least.beside) for box, of in pairs):
            return Score(0.0, f"{edit.new} is not {edit.side} of {edit.reference}")
    return j.asks("add", case, [case.before, case.after])


def removed(j: ObjectReward, case: Case) -> Score:
    """Of the surest box in each image: there before, and gone or elsewhere now."""
    least, name = j.thresholds, case.edit.object
    before, after = (
        [one for one in j.find(image, name, least.remove) if not one.box.larger(least.whole)]
        for image in (case.before, case.after)
    )
    if not before:
        return Score(0.0, f"{name} was not found in the source")
    if not after:
        return Score(1.0, f"{name} was not found in the output")
    overlap = iou(before[0].box, after[0].box)
    where = f"{name} was found in the output, overlapping its place in the source by {overlap:.2f}"
    return Score(float(overlap < least.gone), where)


def replaced(j: ObjectReward, case: Case) -> Score:
    """Both found, at one place; and the judge. Names lose their plural endings."""
    edit, least = case.edit, j.thresholds
    one = released_singular if j.released else singular
    before = j.find(case.before, one(edit.object or ""), least.replace)
    after = j.find(case.after, one(edit.new or ""), least.replace)
    for found, name, where in ((before, edit.object, "source"), (after, edit.new, "output")):
        if not found:
            return Score(0.0, f"{name} was not found in the {where}")
    if not any(iou(a.box, b.box) > 0 for a in before for b in after):
        return Score(0.0, f"{edit.new} is nowhere where {edit.object} was")
    return j.asks("replace", case, [case.before, case.after])


def recoloured(j: ObjectReward, case: Case) -> Score:
    return j.asks("colour", case, [case.before, case.after])


def remade(j: ObjectReward, case: Case) -> Score:
    """Of another material."""
    return j.asks("material", case, [case.before, case.after])


def written(j: ObjectReward, case: Case) -> Score:
    """The judge reads it in the output; of a text that replaces another, what bears it was found in
    the source."""
    name = case.edit.object
    if name is not None and not j.find(case.before, name, j.thresholds.text):
        return Score(0.0, f"{name} was not found in the source")
    return j.reads(case, case.after)


def same_counts(j: ObjectReward, case: Case) -> Score | None:
    """As many of the moved thing and of its reference as before; None where it is so."""
    least = j.thresholds
    for name in (case.edit.reference, case.edit.object):
        counts = [
            len(deduplicate(j.find(image, name, least.position), least.duplicate))
            for image in (case.before, case.after)
        ]
        if counts[0] != counts[1]:
            return Score(0.0, f"{name}: {counts[0]} before, {counts[1]} now")
    return None


def moved(j: ObjectReward, case: Case) -> Score:
    """As many as before, and the surest boxes in order."""
    edit, least = case.edit, j.thresholds
    if wrong := same_counts(j, case):
        return wrong
    found = [j.find(case.after, name, least.position) for name in (edit.object, edit.reference)]
    if not all(found):
        missing = edit.reference if found[0] else edit.object
        return Score(0.0, f"{missing} was not found in the output")
    return in_order(case, found[0][0].box, found[1][0].box)


def in_order(case: Case, box: Box, of: Box) -> Score:
    """Whether a box is on the asked side of another, however near."""
    edit = case.edit
    right = is_beside(box, edit.side or "", of, 0.0)
    is_ = "is" if right else "is not"
    return Score(float(right), f"{edit.object} {is_} {edit.side} of {edit.reference}")


def counted(j: ObjectReward, case: Case) -> Score:
    """Found in the source, and as many in the output as asked for."""
    edit, least = case.edit, j.thresholds
    if not j.find(case.before, edit.object, least.count):
        return Score(0.0, f"{edit.object} was not found in the source")
    count = len(deduplicate(j.find(case.after, edit.object, least.count), least.duplicate))
    return Score(float(count == edit.count), f"{count} of {edit.object}, {edit.count} asked for")


def background(j: ObjectReward, case: Case) -> Score:
    """What it keeps was found; and the judge on the output alone."""
    least = j.thresholds
    for name in j.kept(case.edit):
        found = j.find(case.after, name, least.kept)
        if j.released:
            found = found[:1]
        if not any(not one.box.larger(least.whole_kept) for one in found):
            return Score(0.0, f"{name} was not found in the output")
    return j.asks("background", case, [case.after])


RULES: dict[str, Rule] = {
    "subject_add": added,
    "subject_remove": removed,
    "subject_replace": replaced,
    "color_alter": recoloured,
    "material_alter": remade,
    "text_change": written,
    "position_change": moved,
    "count_change": counted,
    "background_change": background,
}

_SERVER = "rewards/reward_server/edival_reward_server.py"
_CLIENT = "flow_grpo/edival_client.py"

PLACES: dict[str, Place] = {
    "add": Place(_SERVER, ("VLM_ADD_PROMPT",), fields={"{instruction}": "formatted"}),
    "replace": Place(_SERVER, ("VLM_REPLACE_PROMPT",), fields={"{instruction}": "formatted"}),
    "colour": Place(
        _SERVER,
        function="evaluate_single",
        call="call_vlm_2image",
        parts=("object_name", "new_color"),
        fields={"{object_name}": "object", "{new_color}": "colour"},
    ),
    "material": Place(
        _SERVER,
        function="evaluate_single",
        call="call_vlm_2image",
        parts=("object_name", "new_material"),
        fields={"{object_name}": "object", "{new_material}": "material"},
    ),
    "text": Place(_SERVER, ("VLM_TEXT_PROMPT",)),
    "background": Place(_SERVER, ("VLM_BACKGROUND_PROMPT",), fields={"{background}": "background"}),
    "ga": Place(_CLIENT, ("MULTITURN_VLM_PROMPT",), fields={"{instructions_formatted}": "turns"}),
    "ga_turn": Place(
        _CLIENT,
        function="edival_ga_score_client",
        call="join",
        parts=("i + 1", "instr"),
        fields={"{i + 1}": "number", "{instr}": "instruction"},
    ),
    "ga_cu": Place(
        _CLIENT, ("MULTITURN_CU_VLM_PROMPT",), fields={"{instructions_formatted}": "turns"}
    ),
    "ga_cu_turn": Place(
        _CLIENT,
        function="edival_cu_score_client",
        call="join",
        parts=("i + 1", "instr", "fmt_instr"),
        fields={"{i + 1}": "number", "{instr}": "instruction", "{fmt_instr}": "formatted"},
    ),
}
"""Of github.com/yuxiaooye/Edit-R2 at 2dd266f3."""


class EditR2(ObjectReward):
    """See the module."""

    Options = EditR2Options
    RULES: ClassVar[Mapping[str, Rule]] = RULES
    PLACES: ClassVar[Mapping[str, Place]] = PLACES
    FOLDER: ClassVar[str] = "edit-r2"

    def ga_score(self, item: Item, turn: int) -> Score:
        """Global awareness: whether every turn so far succeeded. Only the last tag counts."""
        assert self.asker is not None
        session = item.session
        prompt = "ga_cu" if session.mode == "cu" else "ga"
        lines = []
        for number, one in enumerate(session.turns[: turn + 1], 1):
            formatted = one.meta.get("formatted_instruction")
            line, _ = self.prompts(
                f"{prompt}_turn", number=number, instruction=one.instruction, formatted=formatted
            )
            lines.append(line)
        text, _ = self.prompts(prompt, turns="\n".join(lines), count=turn + 1)

        def read(answer: str) -> dict[str, float | None]:
            return {"GA": YES_NO.worth(last_tag(answer_part(answer), FINAL))}

        images = [session.image, *item.images[: turn + 1]]
        said = self.asker.read(text, images, read, ("GA",), seed=item.seed, name="GA", turn=turn)
        return said["GA"]

    # ------------------------------------------------------------------------- as released

    def kept(self, edit: Edit) -> tuple[str, ...]:
        """The release reads them from a field that never has them."""
        return () if self.released else super().kept(edit)

    def consistency(
        self,
        source: np.ndarray,
        output: np.ndarray,
        unchanged: Sequence[str],
        every: Sequence[str],
        background_changed: bool,
    ) -> dict[str, float | None]:
        if self.released and not (unchanged and every):
            return {}
        return super().consistency(source, output, unchanged, every, background_changed)

    def nothing_left(self) -> Score:
        if self.released:
            return Score(0.5, "nothing is left to compare, which is 0.5 in the release")
        return super().nothing_left()
