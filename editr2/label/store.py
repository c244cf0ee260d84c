"""Questions and votes in one SQLite file, `labels.sqlite` of the labelled folder.

A vote is on the disk before anybody is told so, and none is ever removed: one that was taken back,
or given again, is marked. Whoever sends a vote names it (`name`), so that one that is sent again
after a kill, because nothing came back, is the same vote. Several processes may use the file at
once, on a file system of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editr2.errors import DataError, shown
from editr2.label.questions import Answer, Question, read_answer

NAME = "labels.sqlite"
VERSION = 1
FRESH = 30.0
"""Seconds for which a run that asks is taken to wait since it last said so."""
LONGEST_NAME = 60
"""Characters of a person's."""

_SCHEMA = """
create table facts (name text primary key, value text not null);
create table questions (
    n integer primary key, id text not null unique, content text not null, needed integer,
    wanted real);
create table votes (
    n integer primary key autoincrement, name text not null unique,
    question integer not null references questions (n), person text not null, at real not null,
    seconds real not null, shown text not null, answer text not null, principles text not null,
    replaced integer not null default 0);
create index votes_of on votes (question, person) where not replaced;
"""


@dataclass(frozen=True)
class Vote:
    """Of a person on a question. shown: which output stood in each place. answer: by the
    question's own order. principles: an answer each, where they were asked. seconds: of looking."""

    question: str
    person: str
    answer: Answer
    shown: tuple[int, ...]
    principles: tuple[Answer, ...] = ()
    seconds: float = 0.0
    at: float = 0.0


@dataclass(frozen=True)
class Asked:
    """A question as the store has it. number: its own there, which the page knows it by."""

    number: int
    question: Question


class Store:
    """See the module. Threads may share one. Raises DataError for a file that is none of ours."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        # It holds the token: nobody else's to read from its first byte on, nor what SQLite puts
        # beside it, which takes over its mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            self._base = sqlite3.connect(
                self.path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._base.execute("pragma journal_mode=wal")
            self._base.execute("pragma synchronous=full")
            with self._lock, _Transaction(self._base):
                version = self._base.execute("pragma user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        self._base.execute(statement)
                    self._base.execute(f"pragma user_version={VERSION}")
                    for fact in ("token", "order"):
                        self._base.execute(
                            "insert into facts values (?, ?)", (fact, secrets.token_urlsafe(18))
                        )
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path}: cannot be used: {error} (accepted: a file of `editr2 label`)"
            ) from error
        if version not in (0, VERSION):
            raise DataError(f"{self.path}: of version {version} (accepted: {VERSION})")

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def fact(self, name: str) -> str | None:
        row = self._row("select value from facts where name = ?", name)
        return None if row is None else str(row[0])

    def note(self, name: str, value: str) -> None:
        """A fact, in place of an earlier one of the name."""
        with self._lock:
            self._base.execute("insert or replace into facts values (?, ?)", (name, value))

    # -------------------------------------------------------------------------------- questions

    def ask(self, questions: Iterable[Question], *, waiting: bool = False) -> None:
        """Adds what is not there yet. waiting: somebody waits for the answers, and says so again
        every few seconds; who does not is taken to have gone, and its questions are not shown.

        Raises DataError for one of an id that has votes and another content."""
        now = time.time() if waiting else None
        with self._lock, _Transaction(self._base):
            for one in questions:
                content, found = _written(one), None
                for found in self._base.execute(
                    "select n, content from questions where id = ?", (one.id,)
                ):
                    voted = self._base.execute(
                        "select 1 from votes where question = ? limit 1", (found[0],)
                    ).fetchone()
                    if found[1] != content and voted:
                        raise DataError(
                            f"{self.path}: {shown(one.id)} has votes, and asked something else "
                            "then (accepted: another id for another question)"
                        )
                    self._base.execute(
                        "update questions set content = ?, needed = ?, wanted = ? where n = ?",
                        (content, one.needed, now, found[0]),
                    )
                if found is None:
                    self._base.execute(
                        "insert into questions (id, content, needed, wanted) values (?, ?, ?, ?)",
                        (one.id, content, one.needed, now),
                    )

    def wait(self, ids: Sequence[str]) -> None:
        """Says again that somebody waits for these."""
        with self._lock, _Transaction(self._base):
            self._base.executemany(
                "update questions set wanted = ? where id = ?", [(time.time(), one) for one in ids]
            )

    def questions(self) -> list[Asked]:
        """All, in the order in which they came."""
        return [_asked(row) for row in self._rows("select n, id, content, needed from questions")]

    def question(self, number: int) -> Asked | None:
        row = self._row("select n, id, content, needed from questions where n = ?", number)
        return None if row is None else _asked(row)

    def order(self, question: Question, person: str) -> tuple[int, ...]:
        """Which output stands in each place on a person's page: random, and always the same."""
        key = f"{self.fact('order')}|{person}|{question.id}"
        return tuple(sorted(range(len(question.outputs)), key=lambda k: _draw(f"{key}|{k}")))

    def left(self, person: str) -> tuple[list[int], int]:
        """The numbers of what is still to be asked of a person, in the person's own order (what
        somebody waits for comes first), and how many questions the person answered."""
        rows = self._rows(
            "select n, id, wanted from questions q where (wanted is null or wanted > ?) "
            "and not exists (select 1 from votes v where v.question = q.n and not replaced "
            "and person = ?) and (needed is null or needed > (select count(*) from votes v "
            "where v.question = q.n and not replaced))",
            time.time() - FRESH,
            person,
        )
        key = f"{self.fact('order')}|{person}"
        rows.sort(key=lambda row: (row[2] is None, _draw(f"{key}|{row[1]}")))
        done = self._row("select count(*) from votes where person = ? and not replaced", person)
        assert done is not None
        return [int(row[0]) for row in rows], int(done[0])

    # ------------------------------------------------------------------------------------ votes

    def vote(self, name: str, number: int, vote: Vote) -> None:
        """Keeps a vote; one of a name that is there already is that one. An earlier vote of the
        person on the question is replaced."""
        with self._lock, _Transaction(self._base):
            if self._base.execute("select 1 from votes where name = ?", (name,)).fetchone():
                return
            self._base.execute(
                "update votes set replaced = 1 where question = ? and person = ?",
                (number, vote.person),
            )
            self._base.execute(
                "insert into votes (name, question, person, at, seconds, shown, answer, "
                "principles) values (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    number,
                    vote.person,
                    time.time(),
                    vote.seconds,
                    *(json.dumps(one) for one in (vote.shown, vote.answer, vote.principles)),
                ),
            )

    def undo(self, person: str) -> int | None:
        """Takes a person's last vote back. Returns its question's number, None without one."""
        with self._lock, _Transaction(self._base):
            row = self._base.execute(
                "select n, question from votes where person = ? and not replaced "
                "order by n desc limit 1",
                (person,),
            ).fetchone()
            if row is None:
                return None
            self._base.execute("update votes set replaced = 1 where n = ?", (row[0],))
            return int(row[1])

    def votes(self, ids: Sequence[str] | None = None) -> list[Vote]:
        """Those that stand, in order; of the questions of these ids, or all."""
        wanted = None if ids is None else set(ids)
        found = []
        for asked, person, answer, principles, shown_as, seconds, at in self._rows(
            "select q.id, person, answer, principles, shown, seconds, at from votes v "
            "join questions q on q.n = v.question where not replaced order by v.n"
        ):
            if wanted is not None and asked not in wanted:
                continue
            places = tuple(json.loads(shown_as))
            said = tuple(read_answer(one, len(places)) for one in json.loads(principles))
            given = read_answer(json.loads(answer), len(places))
            found.append(Vote(asked, person, given, places, said, seconds, at))
        return found

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, closing(self._base.execute(statement, values)) as rows:
            return rows.fetchall()

    def _row(self, statement: str, *values: Any) -> Any | None:
        with self._lock, closing(self._base.execute(statement, values)) as rows:
            return rows.fetchone()


class _Transaction:
    """Whole or not at all; takes the right to write at its beginning, so that what it read first
    still holds when it writes."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def __enter__(self) -> None:
        self._base.execute("begin immediate")

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        self._base.execute("commit" if kind is None else "rollback")


def _draw(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _written(question: Question) -> str:
    content = asdict(question)
    del content["id"], content["needed"]
    return json.dumps(content, default=str, sort_keys=True)


def _asked(row: Sequence[Any]) -> Asked:
    number, name, content, needed = row
    given = json.loads(content)
    given |= {key: tuple(map(Path, given[key])) for key in ("outputs", "befores")}
    given |= {key: tuple(given[key]) for key in ("earlier", "principles")}
    if given["known"] is not None:
        given["known"] = read_answer(given["known"], len(given["outputs"]))
    image = Path(given.pop("image"))
    return Asked(number, Question(id=name, image=image, needed=needed, **given))
