"""`pku`: the judge of PKU's Edit-R1 (UniWorld-V2, arXiv 2510.16888): one question about source and
output, and the expectation over the digits 0 to 5 at the first word of the answer, over 5. No
training of its own: any chat model with log-probs, Qwen2.5-VL in the release.

Digits are taken by their text from the most probable tokens, of which what is not a digit counts as
not seen (`mass`); the release takes six fixed ids and makes them sum to 1, which is the same where
nothing else is probable. `ask: think` has the judge reason first, by votes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from editr2.rewards.ask import Asker, Asking
from editr2.rewards.base import Calls, Item, Score
from editr2.rewards.client import Client, Server
from editr2.rewards.record import Record
from editr2.rewards.wording import Place, prompts_of

HIGH = 5

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

    prompts: str | None = None


class Pku:
    """See the module. asker: in place of the one that the options name."""

    names = ("score",)
    by_turn = True
    concurrency = 16
    batch = 1
    calls_a_turn = 1
    Options = PkuOptions
    PLACES: ClassVar[Mapping[str, Place]] = PLACES

    def __init__(
        self,
        options: PkuOptions,
        calls: Calls | None = None,
        record: Record | None = None,
        *,
        asker: Asker | None = None,
    ) -> None:
        self.options = options
        self.prompts = prompts_of("pku", options.prompts, places=PLACES)
        self.asker = asker or Asker(Client(options, calls, record), options)

    @property
    def version(self) -> str:
        """Changes with the words and the judge."""
        return f"1 {self.prompts.digest} {self.options.model or ''}"

    @property
    def facts(self) -> dict[str, str]:
        return {**self.asker.facts, **self.prompts.facts, "scale": f"0 to {HIGH}, over it"}

    def probe(self) -> list[str]:
        return self.asker.probe(images=2)

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        return [[{"score": self._turn(item, turn)} for turn in item.asked] for item in items]

    def _turn(self, item: Item, turn: int) -> Score:
        what = item.session.turns[turn]
        requirement = what.meta.get("requirement") or "nothing else"
        text, tail = self.prompts("score", instruction=what.instruction, requirement=requirement)
        images = [item.before(turn), item.images[turn]]
        return self.asker.digits(
            text, images, high=HIGH, seed=item.seed, name="score", turn=turn, tail=tail
        )
