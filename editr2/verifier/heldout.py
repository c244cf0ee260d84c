"""What a verifier in training makes of examples that it does not learn from: the loss on traces,
and preference accuracy on pairs. `editr2 verifier eval` says much more of one that is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from editr2.errors import DataError
from editr2.run.processes import Processes
from editr2.verifier.files import PAIRS, TRACES, Preference
from editr2.verifier.objectives import (
    Asks,
    Lesson,
    folder_of,
    judge_pairs,
    preferred,
    read_lessons,
    read_pairs,
)
from editr2.verifier.settings import RunConfig


@dataclass(frozen=True)
class Heldout:
    """Of a folder with traces, pairs, or both."""

    lessons: Sequence[Lesson] = ()
    pairs: Sequence[Preference] = ()

    def __bool__(self) -> bool:
        return bool(self.lessons or self.pairs)


def read_heldout(config: RunConfig) -> Heldout:
    """Of `data.heldout`, empty without one. Raises `DataError` for a folder with neither file."""
    folder, limit = config.data.heldout, config.eval.limit
    if folder is None:
        return Heldout()
    root, where = folder_of(folder, "data.heldout"), "data.heldout"
    lessons = read_lessons(folder, where)[0][:limit] if (root / TRACES).is_file() else []
    pairs = read_pairs(folder, where)[0][:limit] if (root / PAIRS).is_file() else []
    if not (lessons or pairs):
        raise DataError(f"{where}: {folder}: neither {TRACES} nor {PAIRS} (accepted: one of them)")
    return Heldout(lessons, pairs)


@torch.no_grad()
def evaluate(
    heldout: Heldout, asks: Asks, config: RunConfig, processes: Processes
) -> dict[str, Any]:
    """Numbers for an evaluation's row. Traces of pairs follow from the run's seed and the pair's
    place, whatever the iteration: evaluations of a run are paired."""
    e, sums = config.eval, dict[str, float]()

    def add(found: dict[str, float]) -> None:
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value

    for lessons in _mine(heldout.lessons, e.rows, processes):
        ids = [asks.reader.answer_ids(one.told.text, f"{TRACES}: {one.id}") for _, one in lessons]
        scored = asks.reader.log_probs([asks.prompt(one.edit) for _, one in lessons], ids)
        add({"nll": -float(scored.log_prob.double().sum()), "tokens": sum(map(len, ids))})
    for pairs in _mine(heldout.pairs, max(1, e.rows // (2 * e.traces)), processes):
        judged = judge_pairs(asks, config.seed, e, pairs, "eval")
        flat = judged.flat
        add(preferred(judged.scores))
        add({"pairs": len(pairs), "unread": float(judged.scores.isnan().sum())})
        add({"traces": len(flat), "written": sum(len(one.ids) for one in flat)})
    total: dict[str, list[float]] = {}
    for part in processes.gather([sums]):
        for key, value in part.items():
            total.setdefault(key, []).append(value)
    found = {key: math.fsum(values) for key, values in total.items()}
    row: dict[str, Any] = {}
    if heldout.lessons:
        row["nll"] = found["nll"] / found["tokens"]
    if heldout.pairs:
        row |= {"pairs": int(found["pairs"]), "accuracy": found["right"] / found["pairs"]}
        row["unread"] = found["unread"] / found["traces"]
        row["tokens"] = found["written"] / found["traces"]
        if found["judged"]:
            row["score_win"] = found["score_win"] / found["judged"]
            row["score_lose"] = found["score_lose"] / found["judged"]
    return row


def _mine(examples: Sequence[Any], size: int, processes: Processes) -> list[list[tuple[int, Any]]]:
    """This process's blocks, the same blocks whatever number of processes there is."""
    numbered = list(enumerate(examples))
    blocks = [numbered[at : at + size] for at in range(0, len(numbered), size)]
    return blocks[processes.share(len(blocks))]
