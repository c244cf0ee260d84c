"""What VIEScore, EditScore and UnifiedReward-Edit have in common: two questions, each answered by a
list of two numbers from 0 to `HIGH` in an object of JSON.

SC, source of the turn and output: the smaller of how far the edit was done and how well the rest
was kept. PQ, the output alone: the smaller of how natural and how free of faults it is. Both are
divided by `HIGH`. O = √(SC · PQ): of several passes, the mean over all pairs of one pass of each,
which is the mean of √SC times that of √PQ (as released, the k-th goes with the k-th).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.rewards.ask import Asking, Verdict
from editr2.rewards.base import Item, Score
from editr2.rewards.client import Server
from editr2.rewards.object_edits import scores_among
from editr2.rewards.reading import numbers
from editr2.rewards.served import Served
from editr2.rewards.wording import Place

HALVES = ("prompt_following", "consistency")
"""What EditScore's EditReward-Bench calls the two numbers of SC."""

SCORES = ("SC", "PQ", "O", *HALVES)


@dataclass(frozen=True, repr=False)
class VieOptions(Server, Asking):
    """Options of rewards of this form; see `Server` and `Asking` for the rest.

    Args:
        scores: which of SC, PQ, O, prompt_following and consistency (the two numbers of SC). Both
            questions are asked for O.
        ask: the judge always gives its reasons.
        answers: and is always read as text.
        votes: passes of each question.
        prompts: in place of ours: a folder, a file, or a checkout of the published project; none:
            ours.
        released: pair the passes as the release does, so that one that cannot be read is a failure
            of O.
    """

    scores: tuple[str, ...] = scores_among(*SCORES, default=("O",))
    ask: Literal["think"] = "think"
    answers: Literal["votes"] = "votes"
    votes: int = setting(1, Bounds(at_least=1, at_most=64))
    temperature: float = setting(0.0, Bounds(at_least=0, at_most=2))
    prompts: str | None = setting(None, path=True)
    released: bool = False


class VieReward(Served):
    """A reward is a class of this with its own numbers."""

    calls_a_turn = 2
    FOLDER = "vie"
    PROBED: ClassVar[Mapping[str, bool]] = {"schema": True, "votes": True}

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        before, after = item.before(turn), item.images[turn]
        asked: dict[str, tuple[str, tuple[np.ndarray, ...], set[str]]] = {
            "SC": ("sc", (before, after), {"SC", "O", *HALVES}),
            "PQ": ("pq", (after,), {"PQ", "O"}),
        }
        said: dict[str, Score] = {}
        for name, (prompt, images, needed) in asked.items():
            if needed & set(self.names):
                instruction = item.session.turns[turn].instruction
                both = self._both(prompt, images, instruction, item.seed, name, turn)
                said[name] = _smaller(*both)
                if name == "SC":
                    said |= dict(zip(HALVES, both, strict=True))
        if "O" in self.names:
            said["O"] = self._overall(said["SC"], said["PQ"])
        return {name: said[name] for name in self.names}

    def _both(
        self,
        prompt: str,
        images: Sequence[np.ndarray],
        instruction: str,
        seed: int,
        name: str,
        turn: int,
    ) -> tuple[Verdict, Verdict]:
        """The two numbers of every pass."""
        text, _ = self.prompts(prompt, instruction=instruction, high=self.HIGH)
        both = self.asker.json(
            text,
            images,
            {"score": [numbers(0, self.HIGH)] * 2},
            seed=seed,
            name=name,
            turn=turn,
            reason="reasoning",
        )
        return both["score[0]"], both["score[1]"]

    def _overall(self, sc: Score, pq: Score) -> Score:
        for name, one in (("SC", sc), ("PQ", pq)):
            if one.value is None:
                return Score(None, f"{name}: {one.reason}")
        assert isinstance(sc, Verdict) and isinstance(pq, Verdict)
        reason = f"SC {sc.value:.3f}, PQ {pq.value:.3f}; {sc.reason}"
        if not self.options.released:
            roots = [math.fsum(map(math.sqrt, one.votes)) / len(one.votes) for one in (sc, pq)]
            return Score(roots[0] * roots[1], reason)
        if len(sc.votes) < sc.asked or len(pq.votes) < pq.asked:
            few = f"{len(sc.votes)} and {len(pq.votes)} of {sc.asked} passes could be read"
            return Score(None, f"{few} (released: they are paired)")
        paired = [math.sqrt(a * b) for a, b in zip(sc.votes, pq.votes, strict=True)]
        return Score(math.fsum(paired) / len(paired), reason)


def _smaller(first: Verdict, second: Verdict) -> Verdict:
    """Of every pass the smaller number, and their mean."""
    if first.value is None or second.value is None:
        return first
    votes = tuple(map(min, zip(first.votes, second.votes, strict=True)))
    mean = math.fsum(votes) / len(votes)
    return Verdict(mean, first.reason, by=first.by, votes=votes, asked=first.asked)


def vie_places(
    file: str, context: str, swaps: tuple[tuple[str, str], ...] = ()
) -> dict[str, Place]:
    """Of a module that is generated from VIEScore's prompts."""
    edit = ("_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC")
    fields = {"<instruction>": "instruction"}
    return {
        "sc": Place(file, (context, *edit), fields=fields, doubled=False, swaps=swaps),
        "pq": Place(file, (context, "_prompts_0shot_rule_PQ"), doubled=False, swaps=swaps),
    }
