"""`viescore`: SC, PQ and O of VIEScore (arXiv 2312.14867), which GEdit-Bench reports: two numbers
from 0 to 10 each, over 10. `vie` has the form. Any chat model that sees images answers; published
figures are GPT-4's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from editr2.rewards.vie import VieOptions, VieReward, vie_places
from editr2.rewards.wording import Place


class VieScore(VieReward):
    """See the module."""

    Options = VieOptions
    HIGH: ClassVar[int] = 10
    PLACES: ClassVar[Mapping[str, Place]] = vie_places(
        "viescore/vie_prompts.py", "_context_no_delimit"
    )
    """Of github.com/TIGER-AI-Lab/VIEScore at 2cbea4e8."""
