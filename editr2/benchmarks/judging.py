"""The second stage of a benchmark: a reward is asked about every image, and what it says becomes
`scores.jsonl`, a row for every session, pass, sample, turn and metric.

What is asked of a session, and with which seeds, follows from the session and its images alone: not
from what is judged beside it, in which order, in how many processes or how often the stage was
begun. A stage that was killed goes on with the sessions that are not saved yet; begun once more, it
asks about those again of which a score failed, and keeps their others (`saved`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from editr2.benchmarks.passes import PASSES, Exact, Question
from editr2.benchmarks.rows import Row, read_rows
from editr2.benchmarks.saved import Judged, Saved
from editr2.errors import DataError, UserError, counted
from editr2.rewards.base import Item, Score, shortened
from editr2.rewards.panel import CheckedReward, Panel
from editr2.rewards.pool import Judging, Pool
from editr2.rewards.record import asked_anew, calls_of
from editr2.rl.seeds import judge_seed
from editr2.run.identity import reward_fingerprint
from editr2.run.processes import Processes
from editr2.sessions import Session

PURPOSE = "benchmark"

FIRST = 4
"""So many sessions without a score, one after the other, and it is asked whether the judge is still
there."""

SAID_EVERY = 15.0
"""Seconds between two words of how far it is."""


class Images(Protocol):
    """The images of a pass and sample."""

    def of(self, session: Session) -> Sequence[Path | None]:
        """The file of every turn of the session, None where there is none."""

    def read(self, session: Session, turn: int) -> np.ndarray:
        """uint8 [H, W, 3] of the size of the session's image. turn: from 0, one that is there.
        Raises `DataError`."""


class Place(NamedTuple):
    """Of a score: the pass, the sample from 1, and the turns (from 1) of the image and of the
    instruction."""

    way: str
    sample: int
    turn: int
    asked: int


Key = tuple[Place, str]
"""A place and a metric: of one row of a session."""


def key_of(row: Row) -> Key:
    return Place(row.way, row.sample, row.turn, row.asked), row.metric


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def judge(
    file: Path,
    sessions: Sequence[Session],
    images: Mapping[str, Sequence[Images]],
    panel: Panel,
    processes: Processes,
    *,
    seed: int,
    digest: str,
    exact: Exact | None = None,
    progress: Callable[[str], None] = _to_stderr,
) -> list[Row]:
    """Writes `file` and returns its rows, on every process. All processes call this together.

    images: by pass, of every sample. panel: asked with its own record of answers. seed: of those of
    its members that sample. digest: of all that a score depends on but the images; what is saved of
    another one is not looked at. exact: for passes that need it. progress: hears of notes, and
    every `SAID_EVERY` seconds how far it is.

    Raises `UserError` where a reward cannot work, has no score for the first sessions, or stops
    having any: what was judged until then is saved. `DataError` for images that cannot be read.
    """
    stage = Stage(sessions, images, panel, seed, exact)
    saved = Saved(file, digest)
    plan = processes.on_main(lambda: stage.plan(saved))
    if plan.todo:
        mine = plan.todo[processes.index :: processes.count]
        watch, problem = Watch(panel, plan.alive), None
        begin, kept = time.monotonic(), len(sessions) - len(plan.todo)

        def say() -> None:
            done, failed = saved.appended()
            lost = f", {counted(failed, 'score')} failed" if failed else ""
            progress(
                f"judged {kept + done} of {counted(len(sessions), 'session')} in "
                f"{time.monotonic() - begin:.0f} s{lost}"
            )

        processes.lend()
        with _now_and_then(say if processes.main else None):
            try:
                notes = stage.prepare()
                for note in notes if processes.main else ():
                    progress(f"note: {note}")
                for session, judged in stage.asked([sessions[n] for n in mine], plan.again, watch):
                    saved.append(processes.index, session.id, judged)
                    watch.hear(session, judged, plan.again, stage)
            except UserError as error:
                problem = error
            _raise_any(problem, processes)
        _raise_any(watch.nothing(processes), processes)
        if processes.main:
            say()
    if plan.todo or not plan.whole:
        processes.on_main(lambda: saved.finish([session.id for session in sessions]))
    return read_rows(file)


def _raise_any(mine: UserError | None, processes: Processes) -> None:
    """On all processes what one of them met, once all are here."""
    found = processes.first(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    if found is not None:
        raise UserError(found)


@contextmanager
def _now_and_then(say: Callable[[], None] | None) -> Iterator[None]:
    """Beside what is done inside: a judge may take minutes for a session."""
    if say is None:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SAID_EVERY):
            say()

    thread = threading.Thread(target=tell, daemon=True, name="editr2 progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Plan:
    """todo: the ordinals of the sessions to ask about. again: what is known of those of them that
    were judged before. alive: by member of the panel, a score that it gave. whole: the file is as
    it is to be if nothing is to do."""

    todo: list[int]
    again: Mapping[str, Judged]
    alive: dict[int, tuple[int, Place]]
    whole: bool


class _Asked(NamedTuple):
    """What was asked about one sample of one pass of a session."""

    way: str
    sample: int
    questions: list[Question]
    judging: Judging


class Stage:
    """What is asked, and what is expected to come back."""

    def __init__(
        self,
        sessions: Sequence[Session],
        images: Mapping[str, Sequence[Images]],
        panel: Panel,
        seed: int,
        exact: Exact | None,
    ) -> None:
        self.sessions, self.panel, self.seed, self._exact = sessions, panel, seed, exact
        self.images = {way: images[way] for way in PASSES if way in images}
        self._pool = Pool(panel)

    def plan(self, saved: Saved) -> Plan:
        """From what is saved, of which nothing but what counts is left."""
        found = saved.known()
        known = {
            session.id: judged
            for session in self.sessions
            if (judged := found.get(session.id)) is not None
            and judged.seen == self.seen(session)
            and [key_of(row) for row in judged.rows] == [*map(key_of, self.expected(session))]
        }
        done = [s.id in known and not known[s.id].failed for s in self.sessions]
        todo = [n for n, over in enumerate(done) if not over]
        alive: dict[int, tuple[int, Place]] = {}
        for n, session in enumerate(self.sessions if todo else ()):
            rows = known[session.id].rows if session.id in known else ()
            for k, member in enumerate(self.panel.members):
                if k not in alive and (place := answered(member, rows)) is not None:
                    alive[k] = n, place
        whole = saved.whole and len(known) == len(found)
        if todo:
            saved.begin(known)
        again = {self.sessions[n].id for n in todo} & set(known)
        return Plan(todo, {name: known[name] for name in again}, alive, whole)

    def prepare(self) -> list[str]:
        """Readies the rewards; returns what they say of themselves."""
        for member in self.panel.members:
            member.identity = reward_fingerprint(member)
        return self.panel.probe() + self.panel.lacking(self.sessions)

    def seen(self, session: Session) -> str:
        """A hash that tells the session's images from others of these names."""
        files = [
            [way, [[_stamp(path) for path in images.of(session)] for images in samples]]
            for way, samples in self.images.items()
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def expected(self, session: Session) -> list[Row]:
        """A row for every score that there is to be, each as if it had no image."""
        turns, rows = len(session.turns), []
        for way, samples in self.images.items():
            kind = PASSES[way]
            every = [about for q in kind.questions(session, [True] * turns) for about in q.about]
            for sample, images in enumerate(samples, 1):
                there = [path is not None for path in images.of(session)]
                gap = next((t for t, here in enumerate(there) if not here), turns)
                for t, asked in sorted(every):
                    absent = min(gap, t) if kind.chained else t
                    row = Row(
                        image=session.id,
                        way=way,
                        turn=t + 1,
                        asked=asked + 1,
                        metric="",
                        state="missing",
                        value=None,
                        reason=f"no image of turn {absent + 1}",
                        task=session.turns[asked].task,
                        mode=session.mode,
                        turns=turns,
                        sample=sample,
                    )
                    names = kind.metrics(self.panel.names, t, asked)
                    rows += [replace(row, metric=name) for name in names]
        return rows

    def asked(
        self, sessions: Sequence[Session], again: Mapping[str, Judged], watch: Watch
    ) -> Iterator[tuple[Session, Judged]]:
        """Every session with its rows, in order. While one is waited for the next are asked
        about, few of them until something came back."""
        at_once = max((member.concurrency or 0 for member in self.panel.members), default=0)
        each = sum(len(samples) for samples in self.images.values())
        ahead = math.ceil((at_once + FIRST) / max(each, 1)) if at_once else 0
        waiting: deque[tuple[Session, list[_Asked]]] = deque()
        self._pool.judging()  # one more, of nothing: models stay where they judge until all is done
        try:
            for session in sessions:
                waiting.append((session, self._ask(session)))
                while len(waiting) > (ahead if watch.all_heard else min(ahead, FIRST - 1)):
                    yield self._judged(*waiting.popleft(), again)
            while waiting:
                yield self._judged(*waiting.popleft(), again)
        finally:
            self._pool.done()

    def _ask(self, session: Session) -> list[_Asked]:
        found = []
        for way, samples in self.images.items():
            for sample, images in enumerate(samples, 1):
                questions = self._questions(session, way, images)
                # One batch each: what is asked together must not depend on what else is judged.
                where: dict[str, Any] = {"session": session.id, "pass": way, "sample": sample}
                judging = self._pool.judging(purpose=PURPOSE, **where)
                found.append(_Asked(way, sample, questions, judging))
                items = self._items(session, way, sample, images, questions)
                for n in range(max((len(item.asked) for item in items), default=0)):
                    judging.turn([_turn_of(i, i.asked[n]) for i in items if n < len(i.asked)])
                judging.rollouts(items)
        return found

    def _questions(self, session: Session, way: str, images: Images) -> list[Question]:
        """Those that any metric is to be had of."""
        kind = PASSES[way]
        return [
            question
            for question in kind.questions(session, [p is not None for p in images.of(session)])
            if any(kind.metrics(self.panel.names, *about) for about in question.about)
        ]

    def _items(
        self,
        session: Session,
        way: str,
        sample: int,
        images: Images,
        questions: Sequence[Question],
    ) -> list[Item]:
        wanted = {image for question in questions for image in question.images}
        exact = self._exactly(session) if any(kind == "exact" for kind, _ in wanted) else None
        read: dict[str, Callable[[int], np.ndarray]] = {
            "own": lambda t: images.read(session, t),
            "source": lambda t: session.image,
        }
        if exact is not None:
            read["exact"] = lambda t: exact[t]
        pixels = {(kind, t): read[kind](t) for kind, t in wanted}
        items = []
        for place, question in enumerate(questions):
            turn, asked = question.about[0]
            own = judge_seed(self.seed, PURPOSE, session.id, way, sample, turn, asked)
            every = question.asked == tuple(range(len(question.session.turns)))
            items.append(
                Item(
                    question.session,
                    np.stack([pixels[image] for image in question.images]),
                    None if every else question.asked,
                    place,
                    own,
                )
            )
        return items

    def _exactly(self, session: Session) -> np.ndarray:
        if self._exact is None:
            raise DataError(
                f"session {session.id}: nobody knows its exact images (accepted: passes without "
                f"them)"
            )
        return self._exact(session)

    def _judged(
        self, session: Session, asked: Sequence[_Asked], again: Mapping[str, Judged]
    ) -> tuple[Session, Judged]:
        """Once the answers are there."""
        said: dict[Key, Score] = {}
        for way, sample, questions, judging in asked:
            for question, rows in zip(questions, judging.answers(), strict=True):
                for (turn, of), scores in zip(question.about, rows, strict=True):
                    place = Place(way, sample, turn + 1, of + 1)
                    said |= {(place, name): score for name, score in scores.items()}
        before = again.get(session.id)
        kept = {key_of(row): row for row in before.rows if row.state != "failed"} if before else {}
        found = (kept.get(key_of(row)) or _scored(row, said) for row in self.expected(session))
        return session, Judged(self.seen(session), tuple(found))

    def is_there(self, k: int, ordinal: int, place: Place) -> bool:
        """Whether a member answers once more what it answered before."""
        session, member = self.sessions[ordinal], self.panel.members[k]
        images = self.images[place.way][place.sample - 1]
        questions = self._questions(session, place.way, images)
        about = place.turn - 1, place.asked - 1
        question = next(q for q in questions if about in q.about)
        (item,) = self._items(session, place.way, place.sample, images, [question])
        if member.by_turn:
            item = _turn_of(item, question.asked[question.about.index(about)])
        item = item._replace(seed=judge_seed(item.seed, "again"))
        with asked_anew(), calls_of(purpose="first"):
            rows = member.call([item], self.panel.record)[0]
        return not all(score.failed for row in rows for score in row.values())


def _stamp(path: Path | None) -> list[str | int] | None:
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return [path.name, found.st_size, found.st_mtime_ns]


def _turn_of(item: Item, turn: int) -> Item:
    return item._replace(images=item.images[: turn + 1], turns=(turn,))


def _scored(row: Row, said: Mapping[Key, Score]) -> Row:
    score = said.get(key_of(row))
    if score is None:
        return row
    reason = shortened(score.reason) if score.reason else None
    if score.value is not None:
        return replace(row, state="judged", value=score.value, reason=reason)
    if score.failed:
        return replace(row, state="failed", reason=reason)
    return replace(row, state="not_applicable", reason=reason or "nothing to judge")


def answered(member: CheckedReward, rows: Sequence[Row]) -> Place | None:
    """The first place that the member gave a score for."""
    return next(
        (key_of(row)[0] for row in rows if row.metric in member.names and row.state == "judged"),
        None,
    )


class Watch:
    """Whether the judges are still there: one that is down is not asked a thousand times.

    alive: by member, a session's ordinal and a place that it gave a score for. When a member has
    none for `FIRST` sessions, one after the other, it is asked that again. If it answers, those are
    sessions that it cannot judge, and it goes on; if not, or if it never answered anything, it is
    down.
    """

    def __init__(self, panel: Panel, alive: Mapping[int, tuple[int, Place]]) -> None:
        self._panel, self._alive = panel, dict(alive)
        self._silent: dict[int, list[str]] = {k: [] for k in range(len(panel.members))}
        self._heard = set(alive)

    @property
    def all_heard(self) -> bool:
        """Whether each said something, be it that it does not apply."""
        return len(self._heard) == len(self._panel.members)

    def hear(
        self, session: Session, judged: Judged, again: Mapping[str, Judged], stage: Stage
    ) -> None:
        """Of a session that was asked about. Raises `UserError` where a judge is down."""
        before = again.get(session.id)
        old = {key_of(row) for row in before.rows if row.state != "failed"} if before else set()
        fresh = [row for row in judged.rows if key_of(row) not in old]
        for k, member in enumerate(self._panel.members):
            mine = [row for row in fresh if row.metric in member.names and row.state != "missing"]
            failed = [row for row in mine if row.state == "failed"]
            if len(failed) < len(mine):
                self._heard.add(k)
            place = answered(member, mine)
            if place is not None:
                if k not in self._alive:
                    self._alive[k] = stage.sessions.index(session), place
                self._silent[k] = []
            elif failed:
                self._silent[k].append(f"session {session.id}: {failed[0].reason}")
            if len(self._silent[k]) < FIRST:
                continue
            if k not in self._alive or not stage.is_there(k, *self._alive[k]):
                raise self._down(k, len(self._silent[k]), self._silent[k][0])
            self._silent[k] = []

    def nothing(self, processes: Processes) -> UserError | None:
        """What to raise where no process has any score of a member, though it was asked."""
        silent = {k: said[0] for k, said in self._silent.items() if said and k not in self._alive}
        every = processes.gather([(silent, set(self._alive))])
        for k in range(len(self._panel.members)):
            said = [silent[k] for silent, _ in every if k in silent]
            if said and not any(k in alive for _, alive in every):
                return self._down(k, None, said[0])
        return None

    def _down(self, k: int, count: int | None, reason: str) -> UserError:
        names = ", ".join(self._panel.members[k].names)
        of = "any session" if count is None else f"{count} sessions, one after the other"
        return UserError(
            f"no score {names} for {of}; first: {reason} (what was judged is saved, and the same "
            f"command goes on)"
        )
