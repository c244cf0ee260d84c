"""`unifiedreward`: SC, PQ and O by UnifiedReward-Edit's points: two numbers from 0 to 25 each, over
25. `vie` has the form. A chat model that was tuned to them, served by vLLM; by other prompts its
scores are not comparable with published ones.

Its pairs (two outputs of one source, which is better) are no reward of a single rollout and are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from editr2.rewards.vie import VieOptions, VieReward
from editr2.rewards.wording import Place

_FOLDER = "UnifiedReward-Edit"


class UnifiedReward(VieReward):
    """See the module."""

    Options = VieOptions
    HIGH: ClassVar[int] = 25
    PLACES: ClassVar[Mapping[str, Place]] = {
        "sc": Place(
            f"{_FOLDER}/edit_pointwise_instruction_following.py",
            ("problem",),
            fields={"{instruction}": "instruction"},
            doubled=False,
        ),
        "pq": Place(f"{_FOLDER}/edit_pointwise_quality.py", ("problem",), doubled=False),
    }
    """Of github.com/CodeGoat24/UnifiedReward at ff6f5202."""
