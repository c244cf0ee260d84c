"""`editscore`: SC, PQ and O of EditScore (arXiv 2509.23909), a LoRA on Qwen2.5-VL or Qwen3-VL that
was tuned to them: two numbers from 0 to 25 each, over 25; several passes at temperature 0.7. `vie`
has the form. Served by vLLM with the LoRA; by other prompts than those it was tuned on, its scores
are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from editr2.config.fields import Bounds, setting
from editr2.rewards.vie import VieOptions, VieReward, vie_places
from editr2.rewards.wording import Place


@dataclass(frozen=True, repr=False)
class EditScoreOptions(VieOptions):
    """Options of `editscore`; see `VieOptions` for the rest.

    Args:
        votes: passes of each question; the release reports 1 and 4.
        temperature: of a pass.
    """

    votes: int = setting(4, Bounds(at_least=1, at_most=64))
    temperature: float = setting(0.7, Bounds(at_least=0, at_most=2))


class EditScore(VieReward):
    """See the module."""

    Options = EditScoreOptions
    HIGH: ClassVar[int] = 25
    PLACES: ClassVar[Mapping[str, Place]] = vie_places(
        "editscore/vie_prompts.py", "_context_no_delimit_reasoning_first", (("10", "25"),)
    )
    """Of github.com/VectorSpaceLab/EditScore at 6e0f1b9a."""
