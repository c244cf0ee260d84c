"""What a verifier learns by: an entry each, of one loop.

    sft    cold start: cross-entropy on selected traces, mean over the tokens of a batch
    gcpo   group contrastive policy optimisation: traces of both outputs of a pair, credited against
           each other (`credit`), a clipped objective of tokens, and the distance to the start

An objective says what examples there are, what a batch of them comes to (rows: a prompt, an answer,
its advantage and what a token of it counts), and the loss of some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from editr2.errors import DataError, shown
from editr2.rl.seeds import derive_seed
from editr2.verifier.credit import gcpo_credit
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    Edit,
    Preference,
    Told,
    read_edits,
    read_preferences,
    read_told,
)
from editr2.verifier.model import Prompt, Reader, Scored, Written
from editr2.verifier.settings import GcpoConfig, RunConfig

NAN = float("nan")


class Asks:
    """A reader, and the prompts that were made already: as many as memory is lent for."""

    MEMORY = 512 << 20

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._made: dict[Edit, Prompt] = {}  # ids are a file's own, and there may be two files
        self._bytes = 0

    def prompt(self, edit: Edit) -> Prompt:
        if edit in self._made:
            return self._made[edit]
        made = self.reader.prompt(edit)
        size = sum(t.nbytes for t in (made.ids, *made.by_token.values(), *made.others.values()))
        if self._bytes + size <= self.MEMORY:
            self._made[edit] = made
            self._bytes += size
        return made


@dataclass(frozen=True)
class Row:
    """An answer that is learnt from.

    share: of each of its tokens in the loss, before that is divided by the batch's units.
    advantage: of the trace. written: as it was sampled, None where somebody else wrote it. name: in
    messages.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    share: float
    name: str
    advantage: float = 1.0
    written: Written | None = None
    seed: int = 0


@dataclass
class Block:
    """Consecutive examples of a batch, which are asked, sampled and scored together, by whichever
    process. units: what the loss is a mean over. counts: what is logged of them, sums."""

    rows: list[Row] = field(default_factory=list)
    units: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)


class Part(NamedTuple):
    """Some rows under the live weights, under those that sampled and those of the start; the latter
    None where the objective does not ask for them."""

    rows: Sequence[Row]
    live: Scored
    old: Tensor | None
    reference: Tensor | None

    def of_rows(self, value: Callable[[Row], float]) -> Tensor:
        """fp32 [B, 1]."""
        found = torch.tensor([value(row) for row in self.rows], dtype=torch.float32)
        return found[:, None].to(self.live.log_prob.device)


class Term(NamedTuple):
    """loss: of some rows, not yet divided by units. sums: what is logged of them, each over the
    units or, by `over`, over another sum."""

    loss: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """An entry of `OBJECTIVES`.

    Args:
        reads: the examples of a folder, each with an id, and how many were left out.
        block: examples that are done together.
        roll: a block of (ordinal, example), asked and, where that is how it learns, sampled.
        term: the loss of some of its rows.
        old, reference: whether it looks at the log-probs of the weights that sampled, and of the
            start's.
        row: what a train row says beside loss and gradient, from all sums.
    """

    reads: Callable[[str, str], tuple[list[Any], int]]
    block: Callable[[Any], int]
    roll: Callable[[Any, Any, Sequence[tuple[int, Any]], str], Block]
    term: Callable[[Any, Part], Term]
    old: bool
    reference: Callable[[Any], bool]
    row: Callable[[Mapping[str, float]], dict[str, Any]]


def _ratio(sums: Mapping[str, float], name: str, over: str) -> float | None:
    return sums.get(name, 0.0) / sums[over] if sums.get(over) else None


# ------------------------------------------------------------------------------------------- sft


@dataclass(frozen=True)
class Lesson:
    """An edit, and a trace about it that is worth learning."""

    edit: Edit
    told: Told

    @property
    def id(self) -> str:
        return self.told.id

    @property
    def edits(self) -> tuple[Edit, ...]:
        """As a pair has two."""
        return (self.edit,)


def read_lessons(folder: str, setting: str) -> tuple[list[Lesson], int]:
    """Of `principles.jsonl` and `traces.jsonl` there. Traces that cannot be read are left out and
    counted: nobody learns to write them."""
    root = folder_of(folder, setting)
    edits = read_edits(root / PRINCIPLES, principles=True)
    known, told = {edit.id: edit for edit in edits}, read_told(root / TRACES, edits)
    found = [Lesson(known[one.id], one) for one in told if one.trace is not None]
    if not found:
        raise DataError(f"{root / TRACES}: no trace that can be read (accepted: at least one)")
    return found, len(told) - len(found)


def folder_of(folder: str, setting: str) -> Path:
    """Raises `DataError` where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{setting}: {shown(folder)}: no such folder (accepted: a folder)")
    return root


def _taught(
    config: RunConfig, asks: Asks, lessons: Sequence[tuple[int, Lesson]], purpose: str
) -> Block:
    block = Block()
    for _, lesson in lessons:
        ids = asks.reader.answer_ids(lesson.told.text, f"{TRACES}: {lesson.id}")
        block.rows.append(Row(asks.prompt(lesson.edit), ids, 1.0, lesson.id))
        block.units += len(ids)
    block.counts = {"traces": len(block.rows), "tokens": block.units}
    return block


def _cross_entropy(config: RunConfig, part: Part) -> Term:
    loss = -(part.live.log_prob * part.of_rows(lambda row: row.share)).sum()
    return Term(loss, {"nll": loss.detach(), "entropy": part.live.entropy.detach().sum()})


def _taught_row(sums: Mapping[str, float]) -> dict[str, Any]:
    return {
        "traces": int(sums["traces"]),
        "tokens": int(sums["tokens"]),
        "entropy": _ratio(sums, "entropy", "tokens"),
    }


# ------------------------------------------------------------------------------------------- gcpo


def read_pairs(folder: str, setting: str) -> tuple[list[Preference], int]:
    """Of `pairs.jsonl` there, each with principles."""
    file = folder_of(folder, setting) / PAIRS
    pairs = read_preferences(file)
    for pair in pairs:
        if not pair.win.principles:
            raise DataError(
                f"{file}: {shown(pair.id)}: no principles (accepted: what `editr2 verifier "
                f"principles` adds)"
            )
    return pairs, 0


class Sampling(Protocol):
    """How traces of a pair are sampled."""

    @property
    def traces(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def max_tokens(self) -> int: ...


@dataclass(frozen=True)
class JudgedPairs:
    """N traces of both outputs of P pairs, flat in this order, with their prompts and seeds; scores
    float64 [P, 2, N] in [0, 1], NaN where there is none."""

    flat: list[Written]
    prompts: list[Prompt]
    seeds: list[int]
    scores: Tensor


def judge_pairs(
    asks: Asks, seed: int, how: Sampling, pairs: Sequence[tuple[int, Preference]], purpose: str
) -> JudgedPairs:
    """What the verifier writes of pairs. Seeds follow from the run's, the purpose, and a pair's
    ordinal."""
    n, edits, prompts, seeds = how.traces, list[Edit](), list[Prompt](), list[int]()
    for ordinal, pair in pairs:
        for side, edit in enumerate(pair.edits):
            edits += [edit] * n
            prompts += [asks.prompt(edit)] * n
            seeds += [derive_seed(seed, purpose, ordinal, side, j) for j in range(n)]
    flat = asks.reader.sample(
        prompts, seeds, temperature=how.temperature, max_tokens=how.max_tokens
    )
    found = [_score(edit, one) for edit, one in zip(edits, flat, strict=True)]
    scores = torch.tensor(found, dtype=torch.float64).view(len(pairs), 2, n)
    return JudgedPairs(flat, prompts, seeds, scores)


def _score(edit: Edit, written: Written) -> float:
    """NaN for a trace without one, and for one that was cut off: as a reward it is a failed
    vote."""
    trace = Told.of(edit, written.text).trace if written.ended else None
    return NAN if trace is None else trace.score


def _contrasted(
    config: GcpoConfig, asks: Asks, pairs: Sequence[tuple[int, Preference]], purpose: str
) -> Block:
    judged = judge_pairs(asks, config.seed, config.rollout, pairs, purpose)
    scores, flat = judged.scores, judged.flat
    credit, n = gcpo_credit(scores), config.rollout.traces
    block = Block(units=float(credit.trains.sum()))
    for k, (one, prompt, seed) in enumerate(zip(flat, judged.prompts, judged.seeds, strict=True)):
        p, side, j = k // (2 * n), k // n % 2, k % n
        if not credit.trains[p]:
            continue
        # Mean over the tokens of a trace, the traces of a group, the two groups.
        share = 1 / (2 * n * len(one.ids))
        advantage = float(credit.advantages[p, side, j])
        name = f"{prompt.id}, trace {j + 1}"
        block.rows.append(Row(prompt, one.ids, share, name, advantage, one, seed))
    block.counts = {
        "pairs": len(pairs),
        "constant": float((~credit.trains).sum()),
        "traces": len(flat),
        "unread": float(scores.isnan().sum()),
        "cut": sum(not one.ended for one in flat),
        "written": sum(len(one.ids) for one in flat),
        "learnt": sum(len(row.ids) for row in block.rows),
        "win_rate": float(credit.rewards[:, 0].mean(1).sum()),
        **preferred(scores),
    }
    return block


def preferred(scores: Tensor) -> dict[str, float]:
    """Of scores [P, 2, N]: sums over pairs. right: pairs whose preferred output has the higher mean
    score, a tie half; where one of the two has no score at all, the pair counts half. judged:
    pairs whose outputs both have a score. score_win, score_lose: sums of those means."""
    means = scores.nanmean(2)
    judged = ~means.isnan().any(1)
    gap = (means[:, 0] - means[:, 1])[judged].round(decimals=9)  # scores are tenths
    right = (gap > 0).double().sum() + 0.5 * (gap == 0).double().sum()
    kept = means[judged].sum(0)
    return {
        "right": float(right + 0.5 * (~judged).double().sum()),
        "judged": float(judged.sum()),
        "score_win": float(kept[0]),
        "score_lose": float(kept[1]),
    }


def _clipped(config: GcpoConfig, part: Part) -> Term:
    """Of each token max(-A rho, -A clip(rho, 1 - low, 1 + high)) + beta k3, with
    k3 = exp(d) - d - 1 and d the log-prob of the start over the live one."""
    t, live = config.train, part.live
    assert part.old is not None
    share = part.of_rows(lambda row: row.share) * live.valid
    advantage = part.of_rows(lambda row: row.advantage)
    rho = (live.log_prob - part.old).exp()
    inside = rho.clamp(1 - t.clip_low, 1 + t.clip_high)
    worse = torch.maximum(-advantage * rho, -advantage * inside)
    loss = (share * worse).sum()
    # One that the minimum takes no gradient from, as the house counts clipping.
    clipped = (worse.detach() > (-advantage * rho).detach()) & live.valid
    sums = {
        "clipped": clipped.float().sum(),
        "entropy": live.entropy.detach().sum(),
        "policy_loss": loss.detach(),
    }
    if part.reference is not None:
        d = (part.reference - live.log_prob).masked_fill(~live.valid, 0.0)
        kl = (share * (d.exp() - d - 1)).sum()
        loss = loss + t.kl_weight * kl
        sums["kl"] = kl.detach()
    return Term(loss, sums)


def _contrasted_row(sums: Mapping[str, float]) -> dict[str, Any]:
    return {
        "pairs": int(sums["pairs"]),
        "constant": int(sums["constant"]),
        "accuracy": _ratio(sums, "right", "pairs"),
        "win_rate": _ratio(sums, "win_rate", "pairs"),
        "score_win": _ratio(sums, "score_win", "judged"),
        "score_lose": _ratio(sums, "score_lose", "judged"),
        "unread": _ratio(sums, "unread", "traces"),
        "cut": _ratio(sums, "cut", "traces"),
        "tokens": _ratio(sums, "written", "traces"),
        "entropy": _ratio(sums, "entropy", "learnt"),
        "clip_fraction": _ratio(sums, "clipped", "learnt"),
        "policy_loss": _ratio(sums, "policy_loss", "units"),
        "kl": _ratio(sums, "kl", "units") if "kl" in sums else None,
    }


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(
        reads=read_lessons,
        block=lambda config: config.train.rows,
        roll=_taught,
        term=_cross_entropy,
        old=False,
        reference=lambda config: False,
        row=_taught_row,
    ),
    "gcpo": Objective(
        reads=read_pairs,
        block=lambda config: config.rollout.pairs,
        roll=_contrasted,
        term=_clipped,
        old=True,
        reference=lambda config: config.train.kl_weight > 0,
        row=_contrasted_row,
    ),
}
