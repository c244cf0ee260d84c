"""Asking a reward about outputs on disk, several times if wanted, with every answer on record."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from editr2.errors import UserError
from editr2.judge.outputs import Output
from editr2.rewards.answers import TurnScores
from editr2.rewards.base import Item
from editr2.rewards.calling import constructor
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rewards.record import Record, calls_of
from editr2.rl.seeds import judge_seed
from editr2.run.identity import reward_fingerprint

BLOCK = 48
"""Outputs whose images are in memory at once; the next are read when all of these are judged."""

FIRST = 4
"""Outputs that are asked about one after the other first; when nothing comes of any of them, the
rest is not asked."""

T = TypeVar("T")

SAID_EVERY = 15.0
"""Seconds between two words of what was asked so far: a judge may take minutes for a block."""


@dataclass
class Calls:
    """made: calls that were made, each for one answer or several votes; again: tries beyond the
    first of each. failed: answers that did not come. found: distinct answers that were on the
    record. seconds: of the calls that were made, added up."""

    made: int = 0
    failed: int = 0
    again: int = 0
    found: int = 0
    seconds: float = 0.0


class CountingRecord(Record):
    """A record that counts what goes through it, in `calls`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = Calls()
        self._counts = threading.Lock()
        self._mine = threading.local()
        self._met: set[str] = set()  # asked or found by this one; met again, they are neither
        self._progress: Callable[[str], None] | None = None
        self._start = self._said = 0.0

    def begin(self, progress: Callable[[str], None]) -> None:
        """Counts from nothing, and tells `progress` now and then how far it is."""
        self.calls, self._progress = Calls(), progress
        self._start = self._said = time.monotonic()

    def find(self, key: str, read: Callable[[Any], T] | None = None) -> T | Any | None:
        answer = super().find(key, read)
        if not getattr(self._mine, "writes", False):  # which looks for an answer that came first
            with self._counts:
                if answer is not None and key not in self._met:
                    self.calls.found += 1
                    self._met.add(key)
        return answer

    def write(
        self,
        key: str,
        answer: Any,
        *,
        failed: str | None = None,
        seconds: float,
        tries: int,
        **where: Any,
    ) -> Any:
        with self._counts:
            if tries:  # else a vote that came with the request of another, which has them
                self.calls.made += 1
                self.calls.again += tries - 1
            self.calls.failed += failed is not None
            self.calls.seconds += seconds
            self._met.add(key)
            self._say()
        self._mine.writes = True
        try:
            return super().write(key, answer, failed=failed, seconds=seconds, tries=tries, **where)
        finally:
            self._mine.writes = False

    def _say(self) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._said >= SAID_EVERY:
            self._said = now
            lost = f", {self.calls.failed} failed" if self.calls.failed else ""
            self._progress(f"{self.calls.made} calls made in {now - self._start:.0f} s{lost}")


@dataclass(frozen=True)
class Trial:
    """What came back.

    outputs: session by session, siblings together. names: of the scores. answers: of every output,
    by repeat, a row a turn. calls: what it took. seconds: of waiting for it. at_once: the most
    calls of one reward at a time.
    """

    outputs: Sequence[Output]
    names: tuple[str, ...]
    answers: list[list[list[TurnScores]]]
    calls: Calls
    seconds: float
    at_once: int
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def repeats(self) -> int:
        return len(self.answers[0])

    @property
    def turns(self) -> int:
        """Of all outputs, asked once each."""
        return sum(len(output.images) for output in self.outputs)


def prepare(panel: Panel) -> list[str]:
    """Readies the rewards of a trial: what answers is told by its code and options, and answers of
    those that need no record in a run are kept, too, and counted. Returns what their `probe` said;
    raises its `UserError`."""
    for member in panel.members:
        member.identity = reward_fingerprint(member)
        member.recorded = "record" not in constructor(member.given)
    return panel.probe()


def ask(
    panel: Panel,
    outputs: Sequence[Output],
    record: CountingRecord,
    *,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Trial:
    """Asks about every output `repeats` times, each time with a seed of its own.

    Raises `UserError` where none of the first outputs has any score, and `DataError` for images
    that cannot be read.
    """
    notes, start = prepare(panel), time.monotonic()
    pool, answers = Pool(panel), []
    record.begin(progress)
    _first(panel, outputs, seed)
    for begin in range(0, len(outputs), BLOCK):
        block = outputs[begin : begin + BLOCK]
        items = []
        for place, output in enumerate(block, begin):
            images = output.read()
            for repeat in range(repeats):
                items.append(_item(output, images, seed, repeat, place * repeats + repeat))
        judging = pool.judging(purpose="judge")
        for turn in range(max(len(item.asked) for item in items)):
            live = [item for item in items if turn < len(item.asked)]
            judging.turn([i._replace(images=i.images[: turn + 1], turns=(turn,)) for i in live])
        judging.rollouts(items)
        rows = judging.answers()
        answers += [rows[i : i + repeats] for i in range(0, len(rows), repeats)]
        if len(outputs) > BLOCK:
            progress(f"{len(answers)} of {len(outputs)} outputs are judged")
    return Trial(
        outputs,
        panel.names,
        answers,
        record.calls,
        time.monotonic() - start,
        max(member.concurrency or 1 for member in panel.members),
        panel.facts,
        notes,
    )


def _item(output: Output, images: Any, seed: int, repeat: int, rollout: int) -> Item:
    own = judge_seed(seed, "judge", output.session.id, output.name, repeat)
    return Item(output.session, images, None, rollout, own)


def _first(panel: Panel, outputs: Sequence[Output], seed: int) -> None:
    """Raises `UserError` where nothing comes of any of the first outputs: a judge that is down is
    not asked a thousand times."""
    reason = None
    for output in outputs[:FIRST]:
        item = _item(output, output.read(), seed, 0, 0)
        asked = [item._replace(turns=(0,), images=item.images[:1])]
        with calls_of(purpose="judge", rollout=0):
            rows = [
                member.call(
                    asked if member.by_turn and member.concurrency else [item], panel.record
                )
                for member in panel.members
            ]
        scores = [score for said in rows for row in said[0] for score in row.values()]
        if not all(score.failed for score in scores):
            return
        reason = reason or f"session {output.session.id}: {scores[0].reason}"
    raise UserError(f"no score for any of the first outputs: {reason}")
