"""`human`: people are the judge. The siblings of a turn are shown side by side, blind and in random
order, on the page of `editr2 label`; a person ranks them, and the run waits.

The score of an output is the share of its siblings that it beats, where a tie is half of one; 0
where all are bad. What a person skipped does not apply, and neither does an output without
siblings: an evaluation, which has one output a session, wants another judge (`eval.reward`).
Siblings that are the same image, made of the same, tie and are shown once; where all of them are,
nobody is asked.

Votes are in `folder`, under what was shown: a run that was killed and goes on shows the same images
again, and what was answered before stands. The page may be closed and opened at any time, here or
by `editr2 label FOLDER`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from editr2.config.fields import Bounds, setting
from editr2.errors import ConfigError
from editr2.files import in_place_of
from editr2.label.questions import BAD, MOST, SKIPPED, Answer, Question
from editr2.label.serve import URL, Page, address, server_of
from editr2.label.store import FRESH, Store, Vote
from editr2.rewards.base import Calls, Item, Score
from editr2.rewards.record import pixel_digest
from editr2.serving import listen

NAME = "human"
IMAGES = "images"
POLL = 0.25
"""Seconds between two looks for answers."""
SAID_EVERY = 300.0
"""Seconds between two lines that say that the run waits."""


@dataclass(frozen=True)
class HumanOptions:
    """Options of `human`.

    Args:
        folder: where questions, images and votes are; runs may share one.
        people: so many people answer each question, and the mean of their scores counts.
        serve: show the page from this run while it waits; else it is `editr2 label FOLDER`'s.
        port: of the page, on 127.0.0.1; 0 is any free one.
    """

    folder: str = setting(path=True)
    people: int = setting(1, Bounds(at_least=1, at_most=100))
    serve: bool = True
    port: int = setting(8420, Bounds(at_least=0, at_most=65_535))


@dataclass(frozen=True)
class _Group:
    """The siblings of a turn. places: where their scores belong, item and row. shown: for each of
    these, its image among those of the question. question: None where there is nothing to ask, and
    then `said` holds of all of them."""

    places: tuple[tuple[int, int], ...]
    shown: tuple[int, ...]
    question: Question | None
    said: Score | None = None


class Human:
    """See the module."""

    names = (NAME,)
    calls_a_turn = 0
    Options = HumanOptions

    def __init__(self, options: HumanOptions, calls: Calls | None = None) -> None:
        self.options = options
        self.timeout = None if calls is None else calls.timeout
        self.folder = Path(options.folder)
        self.version = f"1, {options.people} people"
        self._store: Store | None = None
        self._server: threading.Thread | None = None

    @property
    def facts(self) -> dict[str, str]:
        return {"judge": "people", "people": str(self.options.people)}

    def probe(self) -> list[str]:
        """Raises `UserError` where the page could not be shown, or its folder not be written."""
        if self.options.serve:
            server_of(Page(self._opened()))
        self._opened()
        return []

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        """Waits until everything is answered. Without an answer within `reward.timeout` seconds a
        score failed."""
        rows: list[list[dict[str, Score]]] = [[{} for _ in item.asked] for item in items]
        groups = self._groups(items)
        votes = self._answers([one.question for one in groups if one.question is not None])
        for group in groups:
            own = None if group.question is None else votes[group.question.id]
            for place, scored in zip(group.places, self._scores(group, own), strict=True):
                item, row = place
                rows[item][row] = {NAME: scored}
        return rows

    # --------------------------------------------------------------------------- what is asked

    def _groups(self, items: Sequence[Item]) -> list[_Group]:
        found: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
        for place, item in enumerate(items):
            source = pixel_digest(item.session.image)
            for row, turn in enumerate(item.asked):
                found.setdefault((item.session.id, source, turn), []).append((place, row))
        return [
            self._group(items, source, turn, places) for (_, source, turn), places in found.items()
        ]

    def _group(
        self, items: Sequence[Item], source: str, turn: int, places: Sequence[tuple[int, int]]
    ) -> _Group:
        nobody = tuple(0 for _ in places)
        if len(places) == 1:
            alone = Score.not_applicable("no sibling to be compared with")
            return _Group(tuple(places), nobody, None, alone)
        made = [
            (pixel_digest(items[n].before(turn)), pixel_digest(items[n].images[turn]))
            for n, _ in places
        ]
        shown = sorted(set(made))
        if len(shown) == 1:
            return _Group(tuple(places), nobody, None, Score(0.5, "all siblings are the same"))
        if len(shown) > MOST:
            many = Score(None, f"{len(shown)} siblings that differ (accepted: up to {MOST})")
            return _Group(tuple(places), nobody, None, many)
        first = {one: items[place[0]] for one, place in reversed(list(zip(made, places)))}
        session = items[places[0][0]].session
        said = [one.instruction for one in session.turns[: turn + 1]]
        digest = hashlib.sha256(repr((source, said, shown)).encode("utf-8", "surrogatepass"))
        question = Question(
            f"{session.id}/{turn + 1}/{digest.hexdigest()[:32]}",
            self._saved(session.image, source),
            tuple(self._saved(first[one].images[turn], one[1]) for one in shown),
            said[-1],
            tuple(said[:-1]),
            tuple(self._saved(first[one].before(turn), one[0]) for one in shown) if turn else (),
            task=session.turns[turn].task,
            needed=self.options.people,
        )
        return _Group(tuple(places), tuple(shown.index(one) for one in made), question)

    def _saved(self, image: np.ndarray, digest: str) -> Path:
        folder = (self.folder / IMAGES).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{digest[:32]}.png"
        if not path.is_file():
            mine = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}")
            with in_place_of(mine) as part:
                Image.fromarray(image).save(part, "PNG")
            os.replace(mine, path)  # whichever process was first
        return path

    # ------------------------------------------------------------------------- what is answered

    def _answers(self, questions: Sequence[Question]) -> dict[str, list[Vote]]:
        """Of each question, the first votes of so many people as are asked; fewer where time is
        up."""
        if not questions:
            return {}
        store, ids = self._opened(), [one.id for one in questions]
        store.ask(questions, waiting=True)
        begun = waited = time.monotonic()
        said: float | None = None
        while True:
            votes: dict[str, list[Vote]] = {one: [] for one in ids}
            for vote in store.votes(ids):
                votes[vote.question].append(vote)
            open_ = [one for one in ids if len(votes[one]) < self.options.people]
            now = time.monotonic()
            if not open_ or (self.timeout is not None and now - begun > self.timeout):
                return {one: own[: self.options.people] for one, own in votes.items()}
            if said is None or now - said > SAID_EVERY:
                where, said = self._where(store), now
                done = len(ids) - len(open_)
                print(
                    f"human: {done} of {len(ids)} questions are answered; the run waits: {where}",
                    file=sys.stderr,
                    flush=True,
                )
            if now - waited > FRESH / 3:
                store.wait(open_)
                waited = now
            time.sleep(POLL)

    def _scores(self, group: _Group, votes: Sequence[Vote] | None) -> list[Score]:
        """Of every place."""
        if votes is None:
            assert group.said is not None
            return [group.said] * len(group.places)
        if len(votes) < self.options.people:
            late = f"no answer within {self.timeout:g} s (reward.timeout)"
            return [Score(None, late)] * len(group.places)
        heard = [vote.answer for vote in votes if vote.answer != SKIPPED]
        if not heard:
            return [Score.not_applicable("skipped")] * len(group.places)
        of_each = [beaten(answer, group.shown) for answer in heard]
        why = "all are bad" if all(answer == BAD for answer in heard) else None
        said = []
        for worth in zip(*of_each, strict=True):
            mean = sum(worth) / len(worth)
            reason = why or f"beats {mean:.0%} of {len(group.places) - 1} siblings"
            said.append(Score(mean, reason, votes=worth if len(worth) > 1 else ()))
        return said

    # -------------------------------------------------------------------------------- the page

    def _opened(self) -> Store:
        if self._store is None:
            self._store = Store(self.folder)
        return self._store

    def _where(self, store: Store) -> str:
        """Where to answer. The page is shown from here, once, if it is to be and its port is
        free."""
        if self.options.serve and self._server is None:
            try:
                listening = listen(self.options.port)
            except ConfigError:  # another process of the run, or `editr2 label`
                return str(store.fact(URL) or f"editr2 label {self.folder} --port 0")
            store.note(URL, address(store, listening))
            server = server_of(Page(store, title=self.folder.resolve().name))
            self._server = threading.Thread(
                target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="editr2 label"
            )
            self._server.start()
        known = store.fact(URL)
        return known if self._server is not None and known else f"editr2 label {self.folder}"


def beaten(answer: Answer, shown: Sequence[int]) -> list[float]:
    """Of each sibling, the share of the others that it beats, a tie being half of one; 0 of all
    where they are bad.

    Args:
        answer: about the images of a question; not `SKIPPED`.
        shown: of each sibling its image among these; two or more siblings.
    """
    if isinstance(answer, str):
        return [0.0] * len(shown)
    places = [answer[image] for image in shown]
    others = len(places) - 1
    return [
        (sum(mine < other for other in places) + (sum(mine == other for other in places) - 1) / 2)
        / others
        for mine in places
    ]
