"""Asking a reward about every output of a set, once each, on any number of processes.

What came back is appended block by block to `scores.<process>.part.jsonl`, whose first line says
what it is of; so a run that was killed goes on with what it has. What failed is asked again. When
all is there it becomes `scores.jsonl`, a line an output in the order of the set:

    {"output": "k1/win", "instruction": "add a cup", "scores": {"IF": {"value": 1.0, "reason": "…"},
     "CC": {"does_not_apply": "…"}, "GA": {"failed": "…"}}}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.labelled import Labelled, Output
from editr2.errors import UserError
from editr2.files import json_line, write_lines
from editr2.judge.trial import BLOCK, FIRST, SAID_EVERY
from editr2.rewards.answers import TurnScores
from editr2.rewards.base import Item, Score
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rl.seeds import derive_seed
from editr2.run.processes import Processes

_POSITIVE = (1 << 63) - 1
_PARTS = "scores.*.part.jsonl"

Answers = dict[str, TurnScores]
"""By the output's name, a `Score` for every name of the reward."""


def judge_outputs(
    file: Path,
    labelled: Labelled,
    panel: Panel,
    processes: Processes | None,
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
    known = _known(file, labelled, panel.names, digest, finished)
    todo = [output for name, output in labelled.outputs.items() if name not in known]
    done = {n: row for n, row in known.items() if not _failed(row)}
    todo += [labelled.outputs[name] for name in known if name not in done]  # what failed comes last
    if processes is not None:
        processes.wait()  # nobody writes before all have read
    index, count = (processes.index, processes.count) if processes else (0, 1)
    problem: UserError | None = None
    try:
        new = len(labelled.outputs) - len(known)
        mine = todo[index::count]
        part = _Part(file.with_name(f"scores.{index}.part.jsonl"), digest)
        done |= _asked(part, mine, panel, seed, len(todo[:new][index::count]), progress)
    except UserError as error:
        problem = error
    if processes is not None:
        told = processes.first(None if problem is None else f"{type(problem).__name__}: {problem}")
        if told is not None:
            raise problem or UserError(told.partition(": ")[2])
        for of_one in processes.gather([done]):
            done |= of_one
    if problem is not None:
        raise problem
    answers = {name: done[name] for name in labelled.outputs}
    if index == 0:
        write_lines(file, (_line(labelled.outputs[name], row) for name, row in answers.items()))
        for path in file.parent.glob(_PARTS):
            path.unlink()
    return answers


def _asked(
    part: _Part,
    outputs: Sequence[Output],
    panel: Panel,
    seed: int,
    new: int,
    progress: Callable[[str], None],
) -> Answers:
    """new: so many of the first were never asked about."""
    pool, answers = Pool(panel), Answers()
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
        for output, row in zip(block, rows, strict=True):
            answers[output.name] = row
        part.append(block, rows)
        begin += len(block)
        if (now := time.monotonic()) - said >= SAID_EVERY:
            said = now
            progress(f"{begin} of {len(outputs)} outputs are judged in {now - start:.0f} s")
    part.close()
    return answers


def _block(pool: Pool, outputs: Sequence[Output], seed: int) -> list[TurnScores]:
    items = []
    for place, output in enumerate(outputs):
        own = derive_seed(seed, "judge", output.session.id, output.name, 0) & _POSITIVE
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


class _Part:
    """A file that one process appends to; its first line is `{"of": digest}`."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._header = path, json.dumps({"of": digest}) + "\n"
        self._file: int | None = None

    def append(self, outputs: Sequence[Output], rows: Sequence[TurnScores]) -> None:
        """In one write; a torn line is left behind."""
        lines = "".join(_line(*each) for each in zip(outputs, rows, strict=True))
        if self._file is None:
            self._file, header = self._opened()
            lines = header + lines
        os.write(self._file, lines.encode("utf-8", "backslashreplace"))

    def _opened(self) -> tuple[int, str]:
        whole = self._path.is_file() and self._path.read_text("utf-8").startswith(self._header)
        mode = os.O_APPEND if whole else os.O_TRUNC
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | mode, 0o644)
        return file, "\n" if whole else self._header

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _known(
    file: Path, labelled: Labelled, names: Sequence[str], digest: str, finished: str | None
) -> Answers:
    """What files there say; of several lines about one output the last."""
    files = [file] if finished == digest and file.is_file() else []
    found: Answers = {}
    for path in [*files, *sorted(file.parent.glob(_PARTS))]:
        with path.open("rb") as lines:
            if path != file and _parsed(next(lines, b"")) != {"of": digest}:
                continue
            for line in lines:
                said = _parsed(line)
                if said is None or said.get("output") not in labelled.outputs:
                    continue
                row = _row(said.get("scores"), names)
                if row is not None and (said["output"] not in found or not _failed(row)):
                    found[said["output"]] = row
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):  # the line that a killed process left
        return None
    return said if isinstance(said, dict) else None


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


def _written(score: Score) -> dict[str, Any]:
    """Numbers in full: a tie is a tie, and what is read again is what was said."""
    if score.failed:
        return {"failed": score.reason}
    if not score.applies:
        return {"does_not_apply": score.reason}
    said: dict[str, Any] = {"value": score.value}
    if score.reason:
        said["reason"] = score.reason
    return said | ({"votes": list(score.votes)} if score.votes else {})


def _line(output: Output, row: TurnScores) -> str:
    said = {
        "output": output.name,
        "instruction": output.session.turns[0].instruction,
        "scores": {name: _written(score) for name, score in row.items()},
    }
    return json_line(said)
