"""Adds to sessions what object-centred rewards judge by.

The judge says two things alone: which things are in the source, and what each turn asks for, in
the one form of its kind. The form has to parse as that kind, its words have to mean something that
is there at that turn, and the judge has to agree with it at a second look. The lists of objects and
the flag of the background then follow from the edits (`objects.Things`). Nothing is guessed: what
is not sure stays out, and `meta.annotated` says why.

Fields that a session has are kept as they are, whoever wrote them; `meta.annotated` says of each
where it is from: `given`, `vlm NAME`, `derived: ...`, `corrected by hand`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from editr2.annotate.asking import ATTEMPTS, Judge, Looker, NoAnswer
from editr2.annotate.fields import (
    FIELDS,
    LACKING,
    LISTS,
    OBJECTS,
    ORIGINS,
    edit_of,
    lacking,
    origins_of,
    problem_of,
    value_of,
)
from editr2.annotate.forms import listed
from editr2.annotate.objects import Thing, Things, Unclear, is_pronoun, names_of, plain_name
from editr2.annotate.problems import Named, Problem
from editr2.errors import DataError, shown
from editr2.rewards.detect import DetectorError
from editr2.rewards.geometry import TASKS, Edit, kept_objects, parse_edit
from editr2.rewards.record import calls_of
from editr2.sessions import Session, Turn

GIVEN, BY_HAND, DERIVED = "given", "corrected by hand", "derived"

NOT_FOUND = "not_found"
"""In `meta`: names that the detector does not find in the source."""

DERIVED_FIELDS = (*LISTS, "bg_consistency")


@dataclass(frozen=True)
class Annotated:
    """A session with what could be added. problems: why fields are missing. not_found: (turn from
    1, or 0 of the source's list; name) that the detector does not find."""

    session: Session
    problems: tuple[Problem, ...] = ()
    not_found: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """What came of a set."""

    sessions: list[Session]
    problems: list[Named]
    not_found: list[tuple[str, int, str]]

    @property
    def whole(self) -> int:
        return sum(not any(map(lacking, session.turns)) for session in self.sessions)


def annotate(
    sessions: Sequence[Session],
    judge: Judge | None,
    looker: Looker | None,
    *,
    concurrency: int = 16,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Many sessions, as many at once as `concurrency`, in their order. Raises `UserError` where
    judge or detector cannot be asked at all, and `DataError` for `source_objects` that are none."""
    for session in sessions:
        if (why := objects_problem(session.meta.get(OBJECTS, []))) is not None:
            raise DataError(f"session {shown(repr(session.id))}: meta.{OBJECTS}: {why}")
    done: list[Annotated] = []
    with ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(sessions)))) as pool:
        futures = [pool.submit(annotate_session, one, judge, looker) for one in sessions]
        try:
            for future in futures:
                done.append(future.result())
                progress(len(done), len(sessions))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Report(
        [one.session for one in done],
        [Named(one.session.id, problem) for one in done for problem in one.problems],
        [(one.session.id, turn, name) for one in done for turn, name in one.not_found],
    )


def annotate_session(session: Session, judge: Judge | None, looker: Looker | None) -> Annotated:
    """One session. judge: None asks nothing. looker: None looks for nothing."""
    with calls_of(purpose="annotate", session=session.id):
        return _Work(session, judge, looker).done()


class _Work:
    """A session while it is annotated. turns: as they are by now. origins: of each turn's
    fields."""

    def __init__(self, session: Session, judge: Judge | None, looker: Looker | None) -> None:
        self.session, self.judge, self.looker = session, judge, looker
        self.turns = list(session.turns)
        self.origins = [self._origins(turn) for turn in session.turns]
        self.problems: list[Problem] = []
        self.not_found: list[tuple[int, str]] = []
        self.objects_origin = origins_of(session.meta).get(OBJECTS, GIVEN)
        self.source = things_of(session)
        self._pixels: np.ndarray | None = None

    @staticmethod
    def _origins(turn: Turn) -> dict[str, str]:
        known = origins_of(turn.meta)
        return {name: known.get(name, GIVEN) for name in FIELDS if value_of(turn, name) is not None}

    @property
    def image(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self.session.image
        return self._pixels

    def done(self) -> Annotated:
        for t, turn in enumerate(self.turns):
            for name in DERIVED_FIELDS:
                if name in self.origins[t] and (why := problem_of(name, value_of(turn, name))):
                    self._problem("given", f"{name} {why}", t + 1, (name,))
        if not any(self._lacks(t) for t in range(len(self.turns))):
            return self._result()
        self.source = self._source()
        if self.source is not None or any(self._asks(t) for t in range(len(self.turns))):
            edits = self._edits()
            self._derive(edits)
        return self._result()

    def _lacks(self, t: int) -> list[str]:
        """What is to be found out of a turn: what it lacks, and what was derived before."""
        turn, origins = self.turns[t], self.origins[t]
        return [
            name
            for name in FIELDS
            if name not in origins
            or (name in DERIVED_FIELDS and origins[name].startswith(DERIVED))
            or (name not in DERIVED_FIELDS and problem_of(name, value_of(turn, name)))
        ]

    def _asks(self, t: int) -> bool:
        return any(name not in DERIVED_FIELDS for name in self._lacks(t))

    def _problem(self, kind: str, why: str, turn: int, fields: Sequence[str]) -> None:
        self.problems.append(Problem(kind, why, turn, tuple(fields)))

    # ---------------------------------------------------------------------------- the source

    def _source(self) -> list[Thing] | None:
        """The things of the source: given, or named by the judge and looked for. None where that
        cannot be told."""
        given = things_of(self.session)
        if given is not None:
            self.not_found += [(0, thing.name) for thing in given if not thing.seen]
            return given
        if self.judge is None:
            self._problem("not asked", "", 0, (OBJECTS,))
            return None
        try:
            named, seen = source_things(self.image, self.judge), []
            for thing in named:
                seen.append(replace(thing, seen=self._sees(thing.name)))
        except NoAnswer as no:
            self._problem(no.kind, no.why, 0, (OBJECTS,))
            return None
        except DetectorError as error:
            self._problem("detector", str(error), 0, (OBJECTS,))
            return None
        self.objects_origin = self._origin_of_things()
        self.not_found += [(0, thing.name) for thing in seen if not thing.seen]
        return seen

    def _origin_of_things(self) -> str:
        assert self.judge is not None
        found = self.looker.name if self.looker is not None else None
        return f"{self.judge.name}, {found or 'not looked for'}"

    def _sees(self, name: str) -> bool:
        """Whether the detector finds it; yes where the user wants none."""
        if self.looker is None or self.looker.name is None:
            return True
        return bool(self.looker.find(self.image, name))

    # ----------------------------------------------------------------------------- the turns

    def _edits(self) -> list[Edit | None]:
        """What every turn asks for; None where that is not known. Things that only a turn names
        join the source's."""
        things, edits = Things(self.source or []), []
        for t in range(len(self.turns)):
            edit = self._given(t, things) if not self._asks(t) else self._asked(t, things)
            if edit is not None:
                try:
                    things.apply(edit)
                except Unclear as unclear:
                    self._problem(unclear.kind, unclear.why, t + 1, DERIVED_FIELDS)
                    edit = None
            edits.append(edit)
        return edits

    def _given(self, t: int, things: Things) -> Edit | None:
        """Of a turn that has task and form."""
        edit, why = edit_of(self.turns[t])
        if edit is None:
            self._problem("given", why, t + 1, DERIVED_FIELDS)
            return None
        try:
            self._join(self._named(edit, things), things, t)
        except Unclear as unclear:
            self._problem(unclear.kind, unclear.why, t + 1, DERIVED_FIELDS)
            return None
        except DetectorError as error:
            self._problem("detector", str(error), t + 1, DERIVED_FIELDS)
            return None
        return edit

    def _asked(self, t: int, things: Things) -> Edit | None:
        turn, wanted = self.turns[t], tuple(n for n in self._lacks(t) if n not in DERIVED_FIELDS)
        if turn.task is not None and turn.task not in TASKS:
            self._problem("given", f"task {turn.task!r}, none of the nine", t + 1, wanted)
            return None
        alone = turn.meta.get("formatted_instruction")
        if alone is not None:  # its kind can be read from it, where there is one alone
            edit, why = parse_edit(alone, None, turn.instruction)
            if edit is not None:
                self._set(t, "task", edit.task, "derived: formatted_instruction")
                return self._given(t, things)
            self._problem("given", why, t + 1, wanted)
            return None
        if self.judge is None:
            self._problem("not asked", "", t + 1, wanted)
            return None
        try:
            edit, form = self._answered(t, things)
        except NoAnswer as no:
            self._problem(no.kind, no.why, t + 1, wanted)
            return None
        except DetectorError as error:
            self._problem("detector", str(error), t + 1, wanted)
            return None
        if turn.task is None:
            self._set(t, "task", edit.task, self.judge.name)
        self._set(t, "formatted_instruction", form, self.judge.name)
        return edit

    def _answered(self, t: int, things: Things) -> tuple[Edit, str]:
        """The edit and its form. Raises `NoAnswer` after the last attempt."""
        assert self.judge is not None
        turn, judge = self.turns[t], self.judge
        earlier = [f"{k}. {one.instruction}" for k, one in enumerate(self.turns[:t], 1)]
        told = {
            "earlier": "\n".join(earlier) or "nothing",
            "instruction": turn.instruction,
        }
        given = f"The kind of this edit is known: {turn.task}.\n" if turn.task else ""
        first = judge.text(
            "turn",
            things=", ".join(things.names) or "none that is known",
            given=given,
            forms=listed(),
            **told,
        )
        text, said = first, ""
        for attempt in range(ATTEMPTS):
            try:
                row = judge.json(text, self.image, name="annotate turn", turn=t)
                said = str(row)
                edit, form = read_turn(row, turn)
                new = self._named(edit, things)
                verdict = judge.agrees(
                    "confirm", self.image, name="annotate check", turn=t, formatted=form, **told
                )
                if verdict.value is None:
                    raise NoAnswer("no answer", verdict.reason or "")
                if verdict.value < 0.5:
                    raise NoAnswer("refused", form)
                self._join(new, things, t)
                return edit, form
            except Unclear as unclear:
                problem = NoAnswer(unclear.kind, unclear.why)
            except NoAnswer as no:
                problem = no
            if problem.kind in ("other", "no answer") or attempt == ATTEMPTS - 1:
                raise problem
            again = judge.text("again", before=said or "nothing", why=str(_why(problem)))
            text = f"{first}\n\n{again}"
        raise AssertionError

    def _named(self, edit: Edit, things: Things) -> list[Thing]:
        """What an edit names beyond the things that are known, looked for in the source. Raises
        `Unclear` for what is gone, for a name that may be several things', and for one that nobody
        can look for."""
        new: dict[str, Thing] = {}
        for name in names_of(edit):
            if things.find(name) is not None:
                continue
            since = things.gone_since(name)
            if since is not None:
                raise Unclear("gone", f"{name!r} is not there since turn {since}")
            if self.looker is None:
                raise Unclear("unknown", repr(name))
            new.setdefault(plain_name(name), Thing(name, seen=self._sees(name)))
        return list(new.values())

    def _join(self, new: Sequence[Thing], things: Things, t: int) -> None:
        for thing in new:
            things.add(thing)
            if self.source is not None:
                self.source.append(thing)
            if not thing.seen:
                self.not_found.append((t + 1, thing.name))

    # ----------------------------------------------------------------------------- what follows

    def _derive(self, edits: Sequence[Edit | None]) -> None:
        """Lists and flag of every turn, from the source's things and the edits up to it."""
        things = Things(self.source or [])
        known = self.source is not None
        for t, edit in enumerate(edits):
            known = known and edit is not None
            fields: dict[str, Any] = {"bg_consistency": self._background_kept(t)}
            if known:
                assert edit is not None
                things.apply(edit)
                fields = things.fields()
            for name in self._lacks(t):
                if name not in DERIVED_FIELDS:
                    continue
                if fields.get(name) is None:
                    self._drop(t, name)  # what was derived before does not hold any more
                    continue
                origin = "task" if name == "bg_consistency" else self.objects_origin
                self._set(t, name, fields[name], f"{DERIVED}: {origin}")
            missing = [name for name in DERIVED_FIELDS if name not in self.origins[t]]
            if missing and not any(one.turn in (0, t + 1) for one in self.problems):
                self._problem("before", "", t + 1, missing)

    def _background_kept(self, t: int) -> bool | None:
        """None: an earlier task, or this one, is not known."""
        tasks = [turn.task for turn in self.turns[: t + 1]]
        if "background_change" in tasks:
            return False
        return True if all(task in TASKS for task in tasks) else None

    def _set(self, t: int, name: str, value: Any, origin: str) -> None:
        turn = self.turns[t]
        if name == "task":
            self.turns[t] = replace(turn, task=value)
        else:
            self.turns[t] = replace(turn, meta={**turn.meta, name: value})
        self.origins[t][name] = origin

    def _drop(self, t: int, name: str) -> None:
        meta = {key: value for key, value in self.turns[t].meta.items() if key != name}
        self.turns[t] = replace(self.turns[t], meta=meta)
        self.origins[t].pop(name, None)

    def _result(self) -> Annotated:
        turns = []
        for t, turn in enumerate(self.turns):
            why = [p for p in self.problems if p.turn in (t + 1, 0)]
            origins = dict(self.origins[t])
            for name in FIELDS:
                if name not in origins:
                    first = next((p for p in why if name in p.fields), why[0] if why else None)
                    origins[name] = f"{LACKING}{first}" if first else f"{LACKING}unknown"
            meta = {k: v for k, v in turn.meta.items() if k not in (ORIGINS, NOT_FOUND)}
            unseen = _once(name for number, name in self.not_found if number == t + 1)
            if unseen:
                meta[NOT_FOUND] = unseen
            meta[ORIGINS] = {name: origins[name] for name in FIELDS}
            turns.append(replace(turn, meta=meta))
        meta = {k: v for k, v in self.session.meta.items() if k not in (ORIGINS, NOT_FOUND)}
        if self.source is not None:
            meta[OBJECTS] = [written(thing) for thing in self.source]
            meta[ORIGINS] = {OBJECTS: self.objects_origin}
        unseen = _once(name for number, name in self.not_found if number == 0)
        if unseen:
            meta[NOT_FOUND] = unseen
        session = replace(
            self.session, image=vars(self.session)["image"], turns=tuple(turns), meta=meta
        )
        return Annotated(session, tuple(self.problems), tuple(self.not_found))


# --------------------------------------------------------------------------------- the answers


def source_things(image: np.ndarray, judge: Judge) -> list[Thing]:
    """What the judge sees in a picture. Raises `NoAnswer`."""
    rows = described(image, judge)
    return [Thing(row["name"], foreground=row["foreground"]) for row in rows]


def described(image: np.ndarray, judge: Judge) -> list[dict[str, Any]]:
    """Rows of name, foreground and text, each name once. Raises `NoAnswer`."""
    options: Any = judge.client.server
    first = judge.text("objects", most=options.most)
    text, said = first, ""
    for attempt in range(ATTEMPTS):
        try:
            row = judge.json(text, image, name="annotate objects")
            said = str(row)
            return _rows(row)[: options.most]
        except NoAnswer as no:
            if no.kind == "no answer" or attempt == ATTEMPTS - 1:
                raise
            again = judge.text("again", before=said or "nothing", why=str(_why(no)))
            text = f"{first}\n\n{again}"
    raise AssertionError


def _rows(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = said.get("objects")
    if not isinstance(rows, list):
        raise NoAnswer("unread", "no list of objects")
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row.get("name") if isinstance(row, Mapping) else None
        foreground = row.get("foreground", True) if isinstance(row, Mapping) else None
        text = row.get("text") or "" if isinstance(row, Mapping) else None
        if not isinstance(foreground, bool) or not isinstance(text, str):
            raise NoAnswer("unread", f"an object is {str(row)[:80]}")
        if not isinstance(name, str) or not is_name(name):
            raise NoAnswer("unread", f"{str(name)[:60]!r} is no name of a thing")
        name = " ".join(name.split())
        found.setdefault(plain_name(name), {"name": name, "foreground": foreground, "text": text})
    return list(found.values())


def is_name(name: str) -> bool:
    """Whether this can stand in brackets and be looked for."""
    words = name.split()
    clean = not any(mark in name for mark in '[](){}<>.,;:!?"\n')
    return bool(words) and len(words) <= 8 and clean and not is_pronoun(name)


def read_turn(row: Mapping[str, Any], turn: Turn) -> tuple[Edit, str]:
    """The edit that an answer says, and its form. Raises `NoAnswer`."""
    task, form = row.get("task"), row.get("formatted_instruction")
    if not isinstance(task, str) or not isinstance(form, str):
        raise NoAnswer("unread", "no task, or no formatted_instruction")
    if task not in TASKS:
        if task == "other":
            raise NoAnswer("other", str(row.get("why", ""))[:120])
        raise NoAnswer("unread", f"task {task[:40]!r}")
    if turn.task is not None and task != turn.task:
        raise NoAnswer("mismatch", f"task {turn.task} was given, and {task} came back")
    form = " ".join(form.split())
    edit, why = parse_edit(form, task, turn.instruction)
    if edit is None:
        other, _ = parse_edit(form, None, turn.instruction)
        if other is not None:
            raise NoAnswer("mismatch", f"task {task}, and the form is of {other.task}")
        raise NoAnswer("form", why)
    for name in (*names_of(edit), edit.new):
        if name is not None and is_pronoun(name):
            raise NoAnswer("pronoun", f"[{name}]")
    if edit.text is not None and _letters(edit.text) not in _letters(turn.instruction):
        raise NoAnswer("letters", f"[{edit.text}]")
    if task == "background_change":
        edit = replace(edit, kept=kept_objects(turn.instruction))
    return edit, form


def _letters(text: str) -> str:
    return " ".join(text.split()).casefold()


def _why(problem: NoAnswer) -> Problem:
    return Problem(problem.kind, problem.why, 0, ())


# ------------------------------------------------------------------------------ what is written


def things_of(session: Session) -> list[Thing] | None:
    """The things that a session's `meta` has, as names or as objects; None where it has none."""
    given = session.meta.get(OBJECTS)
    if not isinstance(given, list):
        return None
    return [
        Thing(row)
        if isinstance(row, str)
        else Thing(row["name"], row["foreground"], seen=row["seen"])
        for row in given
    ]


def objects_problem(value: Any) -> str | None:
    """What is wrong with a list of the source's things, or None."""
    accepted = "(accepted: a list of names, or of {name, foreground, seen}; no name twice)"
    if not isinstance(value, list):
        return accepted
    names = []
    for row in value:
        if isinstance(row, Mapping):
            if set(row) != {"name", "foreground", "seen"} or not all(
                isinstance(row[flag], bool) for flag in ("foreground", "seen")
            ):
                return accepted
        name = row["name"] if isinstance(row, Mapping) else row
        if not isinstance(name, str) or not is_name(name):
            return accepted
        names.append(plain_name(name))
    return accepted if len(set(names)) < len(names) else None


def written(thing: Thing) -> dict[str, Any]:
    return {"name": thing.name, "foreground": thing.foreground, "seen": thing.seen}


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
