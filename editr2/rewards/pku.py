"""`pku`: the judge of PKU's Edit-R1 (UniWorld-V2, arXiv 2510.16888): one question about source and
output, and the expectation over the digits 0 to 5 at the first word of the answer, over 5. No
training of its own: any chat model with log-probs, Qwen2.5-VL in the release.

Digits are taken by their text from the most probable tokens, of which what is not a digit counts as
not seen (`mass`); the release takes six fixed ids and makes them sum to 1, which is the same where
nothing else is probable. `ask: think` has the judge reason first, by votes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from editr2.config.fields import setting
from editr2.rewards.ask import Asking
from editr2.rewards.base import Item, Score
from editr2.rewards.client import Server
from editr2.rewards.served import Served
from editr2.rewards.wording import Place

PLACES: dict[str, Place] = {
    "score": Place(
        "reward_server/prompt_template.py",
        ("SCORE_LOGIT",),
        fields={"{prompt}": "instruction", "{requirement}": "requirement"},
    )
}
"""Of github.com/PKU-YuanGroup/Edit-R1 at 4217f251."""


@dataclass(frozen=True, repr=False)
class PkuOptions(Server, Asking):
    """Options of `pku`; see `Server` and `Asking` for the rest.

    Args:
        prompts: in place of ours: a folder, a file, or a checkout of the published project; none:
            ours.
    """

    prompts: str | None = setting(None, path=True)


class Pku(Served):
    """See the module."""

    calls_a_turn = 1
    Options = PkuOptions
    FOLDER = "pku"
    PLACES = PLACES
    HIGH = 5
    PROBED: ClassVar[Mapping[str, bool]] = {}

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        what = item.session.turns[turn]
        requirement = what.meta.get("requirement") or "nothing else"
        text, tail = self.prompts("score", instruction=what.instruction, requirement=requirement)
        images = [item.before(turn), item.images[turn]]
        said = self.asker.digits(
            text, images, high=self.HIGH, seed=item.seed, name="score", turn=turn, tail=tail
        )
        return {"score": said}
