"""Sessions from a folder of images, as MICE-Bench was built: the judge names the things, the
detector finds them, edits of them are drawn and put into words, and the judge reads the result as a
stranger would.

A session is drawn by rules of ours, which see to it that it can be done before anybody is asked:
what was removed is not spoken of again, a name means one thing, a colour is not the one that is
there, a side has room and is not where the thing is already. With a standing rule (`cm`) nothing
contradicts the rule and some later turn has to follow it; with pronouns (`cu`) the turn before
leaves one thing that they can mean. Candidate k of a seed is the same in every run, on any number
of threads.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from editr2.annotate.annotate import DERIVED, described, written
from editr2.annotate.asking import Judge, Looker, NoAnswer
from editr2.annotate.fields import FIELDS, OBJECTS, ORIGINS
from editr2.annotate.forms import formatted
from editr2.annotate.objects import COLOURS as COLOUR_WORDS
from editr2.annotate.objects import MATERIALS as MATERIAL_WORDS
from editr2.annotate.objects import Thing, Things, alike, plain_name, renamed
from editr2.annotate.wordings import (
    ALONE,
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    NAMED,
    NEW,
    POINTING,
    RULES,
    TEXTS,
    in_words,
    plural,
)
from editr2.errors import DataError, shown
from editr2.rewards.detect import DetectorError
from editr2.rewards.geometry import SIDES, Box, Edit, is_beside, parse_edit
from editr2.rewards.record import calls_of
from editr2.sessions import ImageFile, Session, Turn

MODES = ("cm", "cu", "mixed")

MARKS = ("fluent", "unambiguous", "possible")
"""What the judge is asked of a session."""

TRIES = 40
"""Sessions drawn for a candidate, until one can be done."""

PER_SESSION = 6
"""Candidates that are looked at, at most, for every session that is wanted."""

ROOM = 0.2
"""Of the image, that a side of a thing has to have for another to go there."""

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class Seen:
    """A thing of a picture. boxes: where the detector finds it, each place once."""

    name: str
    boxes: tuple[Box, ...]
    foreground: bool = True
    text: str = ""

    @property
    def box(self) -> Box | None:
        return self.boxes[0] if len(self.boxes) == 1 else None


@dataclass(frozen=True)
class Picture:
    """id: the file's name. image: its pixels, decoded when they are asked for."""

    id: str
    image: ImageFile
    things: tuple[Seen, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A turn that was drawn. subject: what it leaves that a pronoun can mean, None where there is
    nothing or more than one thing."""

    edit: Edit
    instruction: str
    subject: str | None = None
    many: bool = False
    pointing: bool = False


@dataclass(frozen=True)
class Drawn:
    mode: str
    turns: tuple[Asked, ...]
    rule: tuple[str, str] | None = None


@dataclass
class Made:
    """What came of it. dropped: candidates by why they are no sessions."""

    sessions: list[Session] = field(default_factory=list)
    candidates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, why: str, case: str) -> None:
        self.dropped[why] += 1
        self.first.setdefault(why, case)


def images_of(folder: str | os.PathLike[str]) -> list[Picture]:
    """The images of a folder, by name. Raises `DataError` where there is none, or one cannot be
    read."""
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.casefold() in ENDINGS)
    except OSError as error:
        raise DataError(
            f"{shown(folder)}: {error.strerror} (accepted: a folder of images)"
        ) from error
    if not paths:
        raise DataError(
            f"{shown(folder)}: no images (accepted: a folder of files {', '.join(ENDINGS)})"
        )
    stems = Counter(path.stem for path in paths)
    pictures = []
    for path in paths:
        image = ImageFile(path)
        image()  # a broken one fails here
        pictures.append(Picture(path.stem if stems[path.stem] == 1 else path.name, image))
    return pictures


def make(
    pictures: Sequence[Picture],
    judge: Judge,
    looker: Looker,
    *,
    count: int,
    mode: str,
    turns: int,
    seed: int,
    concurrency: int = 16,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Made:
    """`count` sessions, or as many as `PER_SESSION` times as many candidates give. Images take
    turns. Raises `UserError` where judge or detector cannot be asked at all."""
    made, told = Made(), set()
    with ThreadPoolExecutor(max_workers=max(1, concurrency)) as pool:
        try:
            looked = dict(
                zip(
                    (one.id for one in pictures),
                    pool.map(lambda one: look(one, judge, looker), pictures),
                )
            )
            numbers = iter(range(count * PER_SESSION))
            while len(made.sessions) < count:
                chunk = list(itertools.islice(numbers, max(1, concurrency)))
                if not chunk:
                    break

                def one(k: int) -> tuple[Session | None, str, str]:
                    picture = pictures[k % len(pictures)]
                    return candidate(looked[picture.id], judge, looker, k, mode, turns, seed)

                for k, (session, why, case) in zip(chunk, pool.map(one, chunk)):
                    if len(made.sessions) == count:
                        break
                    made.candidates += 1
                    if session is None:
                        made.drop(why, case)
                        continue
                    said = (pictures[k % len(pictures)].id, *(t.instruction for t in session.turns))
                    if said in told:
                        made.drop("the same session twice", session.id)
                        continue
                    told.add(said)
                    made.sessions.append(session)
                progress(len(made.sessions), count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def look(picture: Picture, judge: Judge, looker: Looker) -> Picture | NoAnswer:
    """The picture with its things, or why they are not known."""
    image = picture.image()
    with calls_of(purpose="make", session=picture.id):
        try:
            things = []
            for row in described(image, judge):
                boxes = tuple(found.box for found in looker.find(image, row["name"]))
                things.append(Seen(row["name"], boxes, row["foreground"], row["text"].strip()))
        except NoAnswer as no:
            return no
        except DetectorError as error:
            return NoAnswer("detector", str(error))
    return replace(picture, things=tuple(things))


def candidate(
    picture: Picture | NoAnswer,
    judge: Judge,
    looker: Looker,
    k: int,
    mode: str,
    turns: int,
    seed: int,
) -> tuple[Session | None, str, str]:
    """Session number k, or None and why, with a case of it."""
    if isinstance(picture, NoAnswer):
        return None, "the picture's things are not known", picture.why
    rng = np.random.default_rng([seed, k])
    drawn = draw(picture.things, mode, turns, rng)
    if drawn is None:
        return None, "no session fits the picture's things", picture.id
    said = "\n".join(f"{n}. {turn.instruction}" for n, turn in enumerate(drawn.turns, 1))
    name = f"{picture.id}-{k:05d}"
    with calls_of(purpose="make", session=name):
        verdicts = judge.marks("language", picture.image(), MARKS, name="make language", turns=said)
    for mark, verdict in verdicts.items():
        if verdict.value is None:
            return None, "the judge did not say whether it is right", verdict.reason or name
        if verdict.value < 0.5:
            return None, f"not {mark}", f"{name}: {verdict.reason or ''}"
    return session_of(picture, drawn, name, k, seed, judge, looker), "", ""


def session_of(
    picture: Picture, drawn: Drawn, name: str, k: int, seed: int, judge: Judge, looker: Looker
) -> Session:
    made = f"{DERIVED}: made with seed {seed}"
    origins = {field: made for field in FIELDS}
    turns = []
    for turn, fields in zip(drawn.turns, bookkeeping(picture.things, drawn)):
        said = {"formatted_instruction": formatted(turn.edit), **fields, ORIGINS: origins}
        turns.append(Turn(turn.instruction, task=turn.edit.task, meta=said))
    objects = f"{judge.name}, {looker.name or 'not looked for'}"
    meta: dict[str, Any] = {
        OBJECTS: [written(thing) for thing in source_of(picture.things)],
        "made": {"seed": seed, "candidate": k},
        ORIGINS: {OBJECTS: objects},
    }
    return Session(name, picture.image, tuple(turns), drawn.mode, meta)


def source_of(things: Sequence[Seen]) -> list[Thing]:
    return [Thing(one.name, foreground=one.foreground, seen=bool(one.boxes)) for one in things]


def bookkeeping(things: Sequence[Seen], drawn: Drawn) -> Iterator[dict[str, Any]]:
    """The lists and the flag of every turn."""
    now = Things(source_of(things))
    for turn in drawn.turns:
        now.apply(turn.edit)
        yield now.fields()


# ------------------------------------------------------------------------------------- drawing


def draw(things: Sequence[Seen], mode: str, turns: int, rng: np.random.Generator) -> Drawn | None:
    """A session that can be done with these things, or None where `TRIES` did not find one."""
    for _ in range(TRIES):
        one = ("cm", "cu")[int(rng.integers(2))] if mode == "mixed" else mode
        drawn = _Draw(things, one, turns, rng).session()
        if drawn is not None and contradiction(things, drawn) is None:
            return drawn
    return None


CM_TASKS = ("subject_add", "subject_replace", "subject_remove", "background_change")
"""With a standing rule; and the change of material under a rule of colour, and the other way
round."""

CU_FIRST = (
    "subject_add", "subject_replace", "color_alter", "material_alter", "text_change", "count_change"
)  # fmt: skip
"""What the first turn of a session with pronouns may be: it leaves one thing."""

CU_LAST = ("subject_remove", "position_change", "subject_add")
"""Behind these a pronoun would mean nothing, or one of two."""

BOUND = ("subject_add", "subject_replace", "color_alter", "material_alter")
"""Edits that a standing rule can be seen in."""


class _Draw:
    """One attempt at a session."""

    def __init__(
        self, things: Sequence[Seen], mode: str, turns: int, rng: np.random.Generator
    ) -> None:
        self.mode, self.count, self.rng = mode, turns, rng
        self.now = Things(source_of(things))
        self.seen = {one.name: one for one in things}
        self.box: Box | None = None  # of what a pronoun means

    def pick(self, options: Sequence[Any]) -> Any:
        """One of them, or None of none."""
        return options[int(self.rng.integers(len(options)))] if len(options) else None

    def session(self) -> Drawn | None:
        rule = self._rule() if self.mode == "cm" else None
        turns: list[Asked] = []
        for t in range(self.count):
            turn = self._turn(t, turns, rule)
            if turn is None:
                return None
            if t == 0 and rule is not None:
                said = self.pick(RULES[rule[0]]).format(value=rule[1])
                turn = replace(turn, instruction=f"{said} {turn.instruction}")
            self.now.apply(turn.edit)
            turns.append(turn)
        return Drawn(self.mode, tuple(turns), rule)

    def _rule(self) -> tuple[str, str]:
        kind = self.pick(("colour", "material"))
        return kind, self.pick(COLOURS if kind == "colour" else MATERIALS)

    def _turn(self, t: int, before: Sequence[Asked], rule: tuple[str, str] | None) -> Asked | None:
        if rule is not None:
            other = "material_alter" if rule[0] == "colour" else "color_alter"
            tasks: Sequence[str] = (*CM_TASKS, other)
        elif t == 0:
            tasks = CU_FIRST
        else:
            last = t == self.count - 1
            tasks = [task for task in POINTING if last or task not in CU_LAST]
        for place in self.rng.permutation(len(tasks)):
            task = tasks[int(place)]
            if any(one.edit.task == task for one in before) and task == "background_change":
                continue
            made = (
                self._pointing(task, before[-1]) if self.mode == "cu" and t else self._named(task)
            )
            if made is not None:
                return made
        return None

    # --------------------------------------------------------------------------- with names

    def _named(self, task: str) -> Asked | None:
        edit = _NAMED[task](self)
        if edit is None:
            return None
        wordings = ALONE if task == "subject_add" and edit.side is None else NAMED[task]
        subject, many = _left(edit)
        self.box = self._box(edit.object) if task != "count_change" else None
        return Asked(edit, in_words(edit, self.pick(wordings)), subject, many)

    def _things(self) -> list[Seen]:
        """Of the source, found once, in front, touched by nobody, and told from all others."""
        return [
            self.seen[thing.name]
            for thing in self.now.now
            if thing.source
            and thing.foreground
            and not thing.touched
            and self._box(thing.name) is not None
            and self._alone(thing.name)
        ]

    def _box(self, name: str | None) -> Box | None:
        seen = self.seen.get(name or "")
        return None if seen is None or seen.box is None or seen.box.larger(0.9) else seen.box

    def _alone(self, name: str) -> bool:
        return sum(alike(name, thing.name) for thing in self.now.now) <= 1 and not name.endswith(
            "s"
        )

    def _new(self) -> str | None:
        return self.pick(
            [new for new in NEW if not any(alike(new, other) for other in self.now.ever)]
        )

    def _add(self) -> Edit | None:
        new, reference = self._new(), self.pick(self._things())
        if new is None or self.mode == "cu" or reference is None or self.rng.random() < 0.3:
            return None if new is None else Edit("subject_add", new=new)
        side = self.pick(sides_with_room(reference.box))
        if side is None:
            return Edit("subject_add", new=new)
        return Edit("subject_add", new=new, side=side, reference=reference.name)

    def _remove(self) -> Edit | None:
        thing = self.pick(self._things())
        return None if thing is None else Edit("subject_remove", object=thing.name)

    def _replace(self) -> Edit | None:
        thing, new = self.pick(self._things()), self._new()
        if thing is None or new is None:
            return None
        return Edit("subject_replace", object=thing.name, new=new)

    def _recolour(self) -> Edit | None:
        thing = self.pick(self._things())
        return None if thing is None else self._coloured(thing.name)

    def _remake(self) -> Edit | None:
        thing = self.pick(self._things())
        return None if thing is None else self._made_of(thing.name)

    def _coloured(self, name: str) -> Edit | None:
        values = [v for v in COLOURS if self._fits(name, v, COLOUR_WORDS)]
        colour = self.pick(values)
        return None if colour is None else Edit("color_alter", object=name, colour=colour)

    def _made_of(self, name: str) -> Edit | None:
        values = [v for v in MATERIALS if self._fits(name, v, MATERIAL_WORDS)]
        material = self.pick(values)
        return None if material is None else Edit("material_alter", object=name, material=material)

    def _fits(self, name: str, value: str, known: frozenset[str]) -> bool:
        """Whether that is another colour or material, and the name it leads to is nobody's."""
        after = renamed(name, value, known)
        new = value.casefold() not in name.casefold()
        return new and plain_name(after) not in {plain_name(one) for one in self.now.ever}

    def _rewrite(self) -> Edit | None:
        written_on = [one for one in self._things() if _is_text(one.text)]
        thing = self.pick(written_on)
        return None if thing is None else self._texts(thing.name, thing.text)

    def _texts(self, name: str, old: str) -> Edit | None:
        text = self.pick([one for one in TEXTS if one.casefold() != old.casefold()])
        return Edit("text_change", object=name, old_text=old, text=text)

    def _count(self) -> Edit | None:
        counted = [
            self.seen[thing.name]
            for thing in self.now.now
            if thing.source
            and thing.foreground
            and not thing.touched
            and 1 <= len(self.seen[thing.name].boxes) <= 5
            and self._alone(thing.name)
            and plural(thing.name) is not None
        ]
        thing = self.pick(counted)
        if thing is None:
            return None
        count = self.pick([n for n in range(2, 6) if n != len(thing.boxes)])
        return Edit("count_change", object=thing.name, count=count)

    def _background(self) -> Edit | None:
        kept = [thing.name for thing in self.now.now if thing.foreground and thing.seen]
        if not 1 <= len(kept) <= 4 or any("background" in name for name in kept):
            return None
        return Edit("background_change", background=self.pick(BACKGROUNDS), kept=tuple(kept))

    # ------------------------------------------------------------------------ with pronouns

    def _pointing(self, task: str, before: Asked) -> Asked | None:
        name = before.subject
        if name is None:
            return None
        edit = self._of(task, name, before)
        if edit is None:
            return None
        many = before.many and task not in ("subject_add", "subject_replace")
        subject, _ = _left(edit)
        said = in_words(edit, self.pick(POINTING[task]), many=before.many)
        return Asked(edit, said, None if task in CU_LAST else subject, many, pointing=True)

    def _of(self, task: str, name: str, before: Asked) -> Edit | None:
        if task == "subject_remove":
            return Edit(task, object=name)
        if task == "color_alter":
            return self._coloured(name)
        if task == "material_alter":
            return self._made_of(name)
        if task == "subject_replace":
            new = self._new()
            return None if new is None or before.many else Edit(task, object=name, new=new)
        if task == "text_change":
            old = before.edit.text
            return None if old is None else self._texts(name, old)
        if before.many or self.box is None:
            return None
        if task == "subject_add":
            new, side = self._new(), self.pick(sides_with_room(self.box))
            if new is None or side is None:
                return None
            return Edit(task, new=new, side=side, reference=name)
        reference = self.pick([one for one in self._things() if one.name != name])
        if reference is None:
            return None
        side = self.pick(
            [s for s in sides_with_room(reference.box) if not is_beside(self.box, s, reference.box)]
        )
        if side is None:
            return None
        return Edit(task, object=name, side=side, reference=reference.name)


_NAMED: dict[str, Callable[[_Draw], Edit | None]] = {
    "subject_add": _Draw._add,
    "subject_remove": _Draw._remove,
    "subject_replace": _Draw._replace,
    "color_alter": _Draw._recolour,
    "material_alter": _Draw._remake,
    "text_change": _Draw._rewrite,
    "count_change": _Draw._count,
    "background_change": _Draw._background,
}


def sides_with_room(box: Box | None) -> list[str]:
    """The sides of a thing on which another has room."""
    if box is None:
        return []
    x, y = box.centre
    room = {"left": x, "right": 1 - x, "above": y, "below": 1 - y}
    return [side for side in SIDES if room[side] >= ROOM]


def _left(edit: Edit) -> tuple[str | None, bool]:
    """What an edit leaves that a pronoun of the next turn can mean, and whether it is several."""
    if edit.task in ("subject_add", "subject_replace"):
        return (edit.new, False) if edit.side is None else (None, False)
    if edit.task == "color_alter":
        return renamed(edit.object or "", edit.colour or "", COLOUR_WORDS), False
    if edit.task == "material_alter":
        return renamed(edit.object or "", edit.material or "", MATERIAL_WORDS), False
    if edit.task == "count_change":
        return edit.object, (edit.count or 0) > 1
    return (edit.object, False) if edit.task == "text_change" else (None, False)


def _is_text(text: str) -> bool:
    return 0 < len(text) <= 30 and text.isprintable() and not set(text) & set("[]'\"‘’“”`")


# ------------------------------------------------------------------------------------ checking


def contradiction(things: Sequence[Seen], drawn: Drawn) -> str | None:
    """Why a session cannot be done, or is not of its mode; None where nothing is wrong with it.
    Looks at what is written alone, not at how it was drawn."""
    now = Things(source_of(things))
    for t, turn in enumerate(drawn.turns):
        edit, where = turn.edit, f"turn {t + 1}"
        read, why = parse_edit(formatted(edit), edit.task, turn.instruction)
        if read != edit:
            return f"{where}: {why or 'the form reads as another edit'}"
        names = [thing.name for thing in now.now if thing.seen]
        for name in (edit.object, edit.reference, *edit.kept):
            if name is not None and name not in names:
                return f"{where}: {name} is not there"
        if edit.object is not None and edit.object == edit.reference:
            return f"{where}: {edit.object} beside itself"
        value = edit.colour or edit.material
        if value is not None and value.casefold() in (edit.object or "").casefold().split():
            return f"{where}: {edit.object} is {value} already"
        if edit.new is not None and any(alike(edit.new, name) for name in now.ever):
            return f"{where}: there is or was {edit.new} already"
        problem = _MODES[drawn.mode](drawn, t)
        if problem is not None:
            return f"{where}: {problem}"
        now.apply(edit)
    return None


def _cm(drawn: Drawn, t: int) -> str | None:
    assert drawn.rule is not None
    kind, value = drawn.rule
    edit = drawn.turns[t].edit
    if t == 0:
        if value not in drawn.turns[0].instruction:
            return "no rule is set"
        later = [turn.edit.task for turn in drawn.turns[1:]]
        return None if set(later) & set(BOUND) else "no later turn has to follow the rule"
    ruled = {"colour": "color_alter", "material": "material_alter"}[kind]
    return "contradicts the rule" if edit.task == ruled else None


def _cu(drawn: Drawn, t: int) -> str | None:
    turn = drawn.turns[t]
    if t == 0:
        return None
    before = drawn.turns[t - 1].subject
    meant = turn.edit.reference if turn.edit.task == "subject_add" else turn.edit.object
    if before is None:
        return "a pronoun behind a turn that leaves nothing for it to mean"
    if meant != before:
        return f"a pronoun for {meant} behind a turn about {before}"
    words = turn.instruction.casefold().replace("'", " ").split()
    said = {"them", "their"} if drawn.turns[t - 1].many else {"it", "its"}
    return None if said & set(words) else "no pronoun"


_MODES = {"cm": _cm, "cu": _cu}
