"""Asking a reward about every output of a set, once each, on any number of processes.

What came back is appended block by block (`benchmarks.parts`), so a run that was killed goes on
with what it has. What failed is asked again. When all is there it becomes `scores.jsonl`, a line an
output in the order of the set:

    {"output": "k1/win", "instruction": "add a cup", "scores": {"IF": {"value": 1.0, "reason": "…"},
     "CC": {"does_not_apply": "…"}, "GA": {"failed": "…"}}}
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.labelled import Labelled, Output
from editr2.benchmarks.parts import Parts, objects, writing
from editr2.errors import UserError
from editr2.files import json_line, write_lines
from editr2.judge.trial import BLOCK, FIRST, SAID_EVERY
from editr2.judge.written import answer
from editr2.rewards.answers import TurnScores
from editr2.rewards.base import Item, Score
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rl.seeds import judge_seed
from editr2.run.processes import Processes

Answers = dict[str, TurnScores]
"""By the output's name, a `Score` for every name of the reward."""


def judge_outputs(
    file: Path,
    labelled: Labelled,
    panel: Panel,
    processes: Processes,
    *,
    digest: str,
    seed: int,
    finished: str | None = None,
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Answers:
    """Of all outputs, on every process; the first one writes `file`. panel: readied
    (`judge.trial.prepare`). digest: of everything that answers depend on; parts of another are
    begun anew. finished: the digest that a `file` already there is of.

    Raises `UserError` where nothing comes of any of the first outputs, so that a judge that is down
    is not asked a thousand times, and `DataError` for an image that cannot be read.
    """
    parts = Parts(file, digest)
    known = _known(file if finished == digest else None, parts, labelled, panel.names)
    todo = [output for name, output in labelled.outputs.items() if name not in known]
    done = {n: row for n, row in known.items() if not _failed(row)}
    todo += [labelled.outputs[name] for name in known if name not in done]  # what failed comes last
    processes.wait()  # nobody writes before all have read
    if todo:
        records = [_record(labelled.outputs[name], row) for name, row in known.items()]
        processes.on_main(lambda: parts.begin(records))
    problem: UserError | None = None
    try:
        new = len(labelled.outputs) - len(known)
        mine, unknown = (each[processes.index :: processes.count] for each in (todo, todo[:new]))

        def keep(outputs: Sequence[Output], rows: Sequence[TurnScores]) -> None:
            parts.append(processes.index, map(_record, outputs, rows))
            done.update((output.name, row) for output, row in zip(outputs, rows, strict=True))

        _ask(mine, panel, seed, len(unknown), keep, progress)
    except UserError as error:
        problem = error
    told = processes.first(None if problem is None else str(problem))
    if told is not None:
        raise problem or UserError(told)
    for of_one in processes.gather([done]):
        done |= of_one
    answers = {name: done[name] for name in labelled.outputs}
    if processes.main:
        with writing(file):
            rows = (_record(labelled.outputs[name], row) for name, row in answers.items())
            write_lines(file, map(json_line, rows))
        parts.drop()
    return answers


def _ask(
    outputs: Sequence[Output],
    panel: Panel,
    seed: int,
    new: int,
    keep: Callable[[Sequence[Output], Sequence[TurnScores]], None],
    progress: Callable[[str], None],
) -> None:
    """new: so many of the first were never asked about. keep: hears of every block."""
    pool = Pool(panel)
    start = said = time.monotonic()
    begin = 0
    while begin < len(outputs):
        # A few by themselves first: whether the judge is there.
        block = outputs[begin : begin + (FIRST if not begin else BLOCK)]
        rows = _block(pool, block, seed)
        if not begin and all(map(_failed_whole, rows[: min(new, FIRST)])) and new:
            row = rows[0]
            reason = next(score.reason for score in row.values())
            raise UserError(f"no score for any of the first outputs: {block[0].name}: {reason}")
        keep(block, rows)
        begin += len(block)
        if (now := time.monotonic()) - said >= SAID_EVERY:
            said = now
            progress(f"{begin} of {len(outputs)} outputs are judged in {now - start:.0f} s")


def _block(pool: Pool, outputs: Sequence[Output], seed: int) -> list[TurnScores]:
    items = []
    for place, output in enumerate(outputs):
        own = judge_seed(seed, "judge", output.session.id, output.name, 0)
        items.append(Item(output.session, output.read(), None, place, own))
    judging = pool.judging(purpose="benchmark")
    judging.turn([item._replace(turns=(0,)) for item in items])
    judging.rollouts(items)
    return [rows[0] for rows in judging.answers()]


def _failed(row: TurnScores) -> bool:
    return any(score.failed for score in row.values())


def _failed_whole(row: TurnScores) -> bool:
    return all(score.failed for score in row.values())


# ---------------------------------------------------------------------------------------- on disk


def _known(whole: Path | None, parts: Parts, labelled: Labelled, names: Sequence[str]) -> Answers:
    """What files say; of several lines about one output the last that did not fail. whole: the
    scores of a run that was finished."""
    found: Answers = {}
    finished = objects(whole) if whole is not None and whole.is_file() else ()
    for said in itertools.chain(finished, parts.records()):
        name, row = said.get("output"), _row(said.get("scores"), names)
        if name in labelled.outputs and row is not None:
            if name not in found or not _failed(row):
                found[name] = row
    return found


def _row(said: Any, names: Sequence[str]) -> TurnScores | None:
    try:
        return {name: _score(said[name]) for name in names}
    except (TypeError, LookupError, ValueError, AttributeError):
        return None


def _score(said: Mapping[str, Any]) -> Score:
    if "failed" in said:
        return Score(None, said["failed"])
    if "does_not_apply" in said:
        return Score.not_applicable(said["does_not_apply"])
    return Score(said["value"], said.get("reason"), votes=tuple(said.get("votes", ())))


def _record(output: Output, row: TurnScores) -> dict[str, Any]:
    """Numbers in full: a tie is a tie."""
    return {
        "output": output.name,
        "instruction": output.session.turns[0].instruction,
        "scores": {name: answer(score, None) for name, score in row.items()},
    }
