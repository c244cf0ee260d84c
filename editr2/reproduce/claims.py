"""What the papers say, as data, and what the rows say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from editr2.report.intervals import Interval, interval
from editr2.reproduce.arms import TURNS, start_of
from editr2.reproduce.rows import Result

EDIT_R1, EDIT_R2, MT_EDITFLOW, OURS = "Edit-R1", "Edit-R2", "MT-EditFlow", "ours"


@dataclass(frozen=True)
class Claim:
    """That `above` scores higher than `below`, on a metric at a turn.

    Args:
        text: the sentence.
        source: the paper whose ordering it is.
        mode: only the sessions of this mode.
        ordered: false where no source gives an ordering: the difference is then only reported.
        least: the difference that is asked for.
    """

    text: str
    above: str
    below: str
    source: str
    metric: str = "GA"
    turn: int = TURNS
    mode: str | None = None
    ordered: bool = True
    least: float = 0.0


CLAIMS: tuple[Claim, ...] = (
    Claim("single-turn RL against the start", "single-turn", "base", OURS, ordered=False),
    Claim("multi-turn RL beats single-turn RL", "multi-turn", "single-turn", EDIT_R2),
    Claim(
        "the same, in this turn's instruction alone",
        "multi-turn",
        "single-turn",
        OURS,
        metric="marginal",
        ordered=False,
    ),
    Claim("intent beats no intent on cm", "intent", "multi-turn", EDIT_R2, mode="cm"),
    Claim("intent beats no intent on cu", "intent", "multi-turn", EDIT_R2, mode="cu"),
    Claim(
        "the same before any training, cm", "base-intent", "base", OURS, mode="cm", ordered=False
    ),
    Claim(
        "the same before any training, cu", "base-intent", "base", OURS, mode="cu", ordered=False
    ),
    Claim("the filter helps", "edit-r2", "intent", EDIT_R2),
    Claim("Edit-R2 raises the start by 0.15", "edit-r2", "base", OURS, least=0.15),
    Claim(
        "Edit-R2 raises the start with intent by 0.15", "edit-r2", "base-intent", OURS, least=0.15
    ),
    Claim(
        "advantage fusion beats reward fusion", "mt-editflow-grpo", "mt-reward-fusion", MT_EDITFLOW
    ),
    Claim("broadcast beats per-turn credit", "mt-editflow-grpo", "mt-per-turn", MT_EDITFLOW),
    Claim("NFT against GRPO", "mt-editflow-nft", "mt-editflow-grpo", MT_EDITFLOW, ordered=False),
)


_JUDGES = {
    "exact": "exact scores",
    "shipped": "shipped verifier",
    "sft": "SFT verifier",
    "direct": "direct verdicts",
}
"""Under which the ways of credit are compared."""


def _judge_claims() -> Iterator[Claim]:
    """Where a verifier is the reward; each by the exact scores of the editor that it trained."""
    start = "base-intent"
    yield Claim("exact scores raise the start", "exact", start, OURS, ordered=False)
    yield Claim("an SFT verifier as reward raises the start", "sft", start, EDIT_R1)
    yield Claim("the same after GCPO", "gcpo", start, EDIT_R1)
    yield Claim("GCPO makes a better reward", "gcpo", "sft", EDIT_R1)
    yield Claim("a weak verifier is a worse reward", "sft", "early", EDIT_R1)
    yield Claim("a weak verifier against the start", "early", start, OURS, ordered=False)
    yield Claim("what the verifier's errors cost", "exact", "gcpo", OURS, ordered=False)
    yield Claim("the shipped verifier raises the start", "shipped", start, EDIT_R1)
    yield Claim("one trace beats four direct answers", "shipped", "direct", MT_EDITFLOW)
    yield Claim("direct verdicts against the start", "direct", start, OURS, ordered=False)
    for claim, name, source in (
        ("broadcast beats per-turn credit", "broadcast", MT_EDITFLOW),
        ("advantage fusion beats reward fusion", "fusion", MT_EDITFLOW),
    ):
        for judge, says in _JUDGES.items():
            if (judge, name) != ("sft", "fusion"):
                yield Claim(f"{claim}, {says}", f"{judge}-{name}", judge, source)
    for judge, says in _JUDGES.items():
        if judge != "sft":
            yield Claim(f"the filter helps, {says}", judge, f"{judge}-unfiltered", EDIT_R2)


STUDY_CLAIMS: dict[str, tuple[Claim, ...]] = {"methods": CLAIMS, "judges": tuple(_judge_claims())}


@dataclass(frozen=True)
class Finding:
    """difference: None where an arm or a common seed is missing. gains: the arms are sampled
    differently, so each is taken as its difference from its own start under its own sampler."""

    claim: Claim
    difference: Interval | None
    seeds: tuple[int | None, ...] = ()
    gains: bool = False

    @property
    def verdict(self) -> str:
        return verdict(self.difference, ordered=self.claim.ordered, least=self.claim.least)


def verdict(difference: Interval | None, *, ordered: bool = True, least: float = 0.0) -> str:
    """What the interval allows to be said: its sign where the whole interval lies on one side."""
    if difference is None:
        return "not run"
    if least:
        if difference.low >= least:
            return "reached"
        on_average = difference.mean >= least
        return "reached on average, not by the interval" if on_average else "not reached"
    above, below = ("reproduces", "reversed") if ordered else ("higher", "lower")
    if difference.low > 0:
        return above
    if difference.high < 0:
        return below
    return "does not show" if ordered else "no difference shown"


def find(claim: Claim, all_results: Sequence[Result]) -> Finding:
    """The paired difference of two arms over the seeds that both have, session by session."""
    pair = _pair(claim, all_results)
    if pair is None or not (seeds := _common(*pair)):
        return Finding(claim, None)
    gains = pair[0].sampler != pair[1].sampler
    above, below = (_scores(claim, result, seeds, gains, all_results) for result in pair)
    if above is None or below is None:
        return Finding(claim, None)
    return Finding(claim, interval(above - below), seeds, gains)


def _scores(
    claim: Claim,
    result: Result,
    seeds: Sequence[int | None],
    gains: bool,
    all_results: Sequence[Result],
) -> np.ndarray | None:
    """One arm's part of a claim, [seeds, sessions]; with `gains`, above its own start, and None
    where that was not evaluated."""
    metric = (claim.metric, claim.turn, claim.mode)
    scores = result.pick(seeds).values(*metric)
    if not gains:
        return scores
    start = _start_of(result, all_results)
    return None if start is None else scores - start.values(*metric)


def _pair(claim: Claim, all_results: Sequence[Result]) -> tuple[Result, Result] | None:
    """The two arms' results, under one sampler if there are any (the start may have been evaluated
    under two)."""
    above, below = (
        [r for r in all_results if r.arm.name == name] for name in (claim.above, claim.below)
    )
    pairs = [(a, b) for a in above for b in below]
    return min(pairs, key=lambda pair: pair[0].sampler != pair[1].sampler) if pairs else None


def _common(first: Result, second: Result) -> tuple[int | None, ...]:
    """The seeds that both have; the start, which has none, goes with any."""
    if first.seeds == (None,):
        return second.seeds
    if second.seeds == (None,):
        return first.seeds
    return tuple(seed for seed in first.seeds if seed in second.seeds)


def _start_of(result: Result, all_results: Sequence[Result]) -> Result | None:
    key = (start_of(result.arm), result.sampler)
    return next((r for r in all_results if (r.arm.name, r.sampler) == key), None)
