"""What the object-centred benchmarks judge an edit by: a table of rules, one a kind of edit, and
how much of the source is still there.

A reward gives the table (`RULES`) and its numbers (`Thresholds`). A rule looks at one turn: what
the detector finds comes first, so that a judge is not asked where the answer is no whatever it
says; a rule that asks the judge is worth what the judge says. Failures are failures: a detector
that did not answer has found nothing out, and an answer that cannot be read is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.errors import UserError, plain
from editr2.rewards.ask import Asker, Asking
from editr2.rewards.base import Calls, Held, Item, Score
from editr2.rewards.client import Client, Server
from editr2.rewards.eyes import Eyes, Looking
from editr2.rewards.features import background_consistency, object_consistency
from editr2.rewards.geometry import Edit, Found, parse_edit
from editr2.rewards.reading import Unread, answer_part
from editr2.rewards.record import Record
from editr2.rewards.wording import Place, Prompts, prompts_of
from editr2.sessions import Session, Turn

REMEDY = "`editr2 data annotate` adds it"

_SHARE = Bounds(at_least=0, at_most=1)


@dataclass(frozen=True)
class Thresholds:
    """The published numbers. Boxes are in fractions of the image, what a detector is surer of than
    a threshold was found.

    Args:
        add, remove, replace, text, position, count: of the detector, by kind of edit.
        kept: of what a change of the background keeps.
        consistency: of the objects that consistency compares or leaves out.
        beside: how far apart centres have to be for one to be on a side of the other (subject_add).
        gone: a box that overlaps (IoU) the source's by less is another object (subject_remove).
        whole, whole_kept: a box that is wider and higher is none, of what is removed and of what is
            kept.
        duplicate: boxes that overlap by more are one object (position_change, count_change).
    """

    add: float = setting(0.30, _SHARE)
    remove: float = setting(0.35, _SHARE)
    replace: float = setting(0.30, _SHARE)
    text: float = setting(0.30, _SHARE)
    position: float = setting(0.40, _SHARE)
    count: float = setting(0.30, _SHARE)
    kept: float = setting(0.25, _SHARE)
    consistency: float = setting(0.35, _SHARE)
    beside: float = setting(0.03, _SHARE)
    gone: float = setting(0.2, _SHARE)
    whole: float = setting(0.98, _SHARE)
    whole_kept: float = setting(0.9, _SHARE)
    duplicate: float = setting(0.8, _SHARE)


@dataclass(frozen=True, repr=False)
class ObjectOptions(Server, Asking, Looking):
    """Options of the object-centred rewards; see `Server`, `Asking` and `Looking` for theirs.

    Args:
        thresholds: of the rules.
        prompts: in place of ours: a folder, a file, or a checkout of the published project
            (docs/rewards.md); none: ours.
        released: the published rules also where they are mistakes (docs/rewards.md lists them).
            Failures stay failures.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    prompts: str | None = setting(None, path=True)
    released: bool = False


class Case(NamedTuple):
    """One turn, as a rule sees it. before, after: uint8 [H, W, 3]. fields: of the prompts."""

    before: np.ndarray
    after: np.ndarray
    edit: Edit
    fields: Mapping[str, Any]
    seed: int
    turn: int


Rule = Callable[[Any, Case], Score]
"""Of the reward and a turn."""


class ObjectReward:
    """IF by a table of rules, and CC. A reward is a class of this with its own table and numbers.

    eyes, asker: in place of those that the options name.
    """

    by_turn = True
    concurrency = 16
    batch = 1
    calls_a_turn = 2  # at most: one about IF, one about GA

    RULES: ClassVar[Mapping[str, Rule]]
    PLACES: ClassVar[Mapping[str, Place]]
    FOLDER: ClassVar[str]
    VERSION: ClassVar[str] = "1"

    def __init__(
        self,
        options: Any,
        calls: Calls | None = None,
        record: Record | None = None,
        *,
        eyes: Eyes | None = None,
        asker: Asker | None = None,
    ) -> None:
        self.options = options
        self.names: tuple[str, ...] = tuple(options.scores)
        self.released: bool = options.released
        self.thresholds: Thresholds = options.thresholds
        self.prompts: Prompts = prompts_of(
            self.FOLDER, options.prompts, places=self.PLACES, fields=FIELDS
        )
        self.eyes = eyes or Eyes(options, released=options.released)
        self.asker = asker
        if asker is None and set(self.names) != {"CC"}:
            self.asker = Asker(Client(options, calls, record), options)

    @property
    def version(self) -> str:
        """Changes with the rules, the words, and what is asked and looked with."""
        seen = " ".join(self.eyes.facts.values())
        return f"{self.VERSION} {self.prompts.digest} {self.options.model or ''} {seen}"

    @property
    def facts(self) -> dict[str, str]:
        asked = self.asker.facts if self.asker is not None else {}
        rules = "as released" if self.released else "mended"
        return {**asked, **self.eyes.facts, **self.prompts.facts, "rules": rules}

    def quick_look(self) -> None:
        """Looks at what it looks with, without loading it."""
        self.eyes.quick_look()

    def models_held(self, items: Sequence[Item]) -> list[Held]:
        """What it looks with."""
        return self.eyes.models_held()

    def probe(self) -> list[str]:
        """Loads what it looks with, and asks the server what it does."""
        self.eyes.load()
        if self.asker is None:
            return []
        return self.asker.probe(images=4 if "GA" in self.names else 2, votes=True)

    def lend(self) -> None:
        """Leaves the trainer's GPU while it trains."""
        self.eyes.lend()

    def take(self) -> None:
        """Comes back to it."""
        self.eyes.take()

    # ------------------------------------------------------------------------------ sessions

    def lacks(self, session: Session) -> str | None:
        """What a session does not have, so that a score does not apply to it; None where it has
        everything. Looks at no image."""
        said = []
        for name in self.names:
            for turn in range(len(session.turns)):
                if missing := self.missing(name, session, turn):
                    said.append(f"{name} does not apply, turn {turn + 1}: {missing}")
                    break
        return "; ".join(said) or None

    def missing(self, name: str, session: Session, turn: int) -> str | None:
        """What one score of one turn lacks."""
        return _MISSING[name](self, session, turn)

    def looks(self, edit: Edit) -> bool:
        """Whether the rule of an edit needs the detector."""
        if edit.task == "text_change":
            return edit.object is not None
        if edit.task == "background_change":
            return bool(self.kept(edit))
        return edit.task not in ("color_alter", "material_alter")

    def kept(self, edit: Edit) -> tuple[str, ...]:
        """What a change of the background has to keep."""
        return edit.kept

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        return [[self._turn(item, turn) for turn in item.asked] for item in items]

    def _turn(self, item: Item, turn: int) -> dict[str, Score]:
        scores = {}
        for name in self.names:
            if missing := self.missing(name, item.session, turn):
                scores[name] = Score.not_applicable(missing)
                continue
            try:
                scores[name] = getattr(self, name.lower() + "_score")(item, turn)
            except UserError as error:  # a detector, an encoder or a setting
                scores[name] = Score(None, plain(str(error)))
        return scores

    def seen(self, image: np.ndarray) -> np.ndarray:
        """An image as it is judged."""
        return image

    # -------------------------------------------------------------------------------- scores

    def if_score(self, item: Item, turn: int) -> Score:
        """Instruction following: the rule of the kind of edit."""
        what = item.session.turns[turn]
        edit, _ = edit_of(what)
        assert edit is not None  # `missing` has looked
        before, after = self.seen(item.before(turn)), self.seen(item.images[turn])
        case = Case(before, after, edit, fields_of(what, edit), item.seed, turn)
        return self.RULES[edit.task](self, case)

    def cc_score(self, item: Item, turn: int) -> Score:
        """Content consistency: the source against the output."""
        meta = item.session.turns[turn].meta
        source = self.seen(item.session.image)
        output = _of_size(self.seen(item.images[turn]), source)
        parts = self.consistency(
            source,
            output,
            names_in(meta["unchanged_objects"]),
            names_in(meta["all_objects"]),
            self.background_changed(item.session, turn),
        )
        said = {name: value for name, value in parts.items() if value is not None}
        if not said:
            return self.nothing_left()
        reason = ", ".join(f"{name} {value:.3f}" for name, value in said.items())
        return Score(sum(said.values()) / len(said), reason)

    def nothing_left(self) -> Score:
        """Of consistency, where neither part applies."""
        return Score.not_applicable("nothing is left to compare")

    def consistency(
        self,
        source: np.ndarray,
        output: np.ndarray,
        unchanged: Sequence[str],
        every: Sequence[str],
        background_changed: bool,
    ) -> dict[str, float | None]:
        """Its parts; None of one that does not apply."""
        return {
            "objects": self.object_part(source, output, unchanged),
            "background": None
            if background_changed
            else self.background_part(source, output, every),
        }

    def object_part(
        self, source: np.ndarray, output: np.ndarray, names: Sequence[str]
    ) -> float | None:
        if not names:
            return None
        assert self.eyes.encoder is not None
        found = self.eyes.find_all(source, names, self.thresholds.consistency)
        return object_consistency(self.eyes.encoder, source, output, [one.box for one in found])

    def background_part(
        self, source: np.ndarray, output: np.ndarray, names: Sequence[str]
    ) -> float | None:
        if not names:
            return None
        assert self.eyes.encoder is not None
        boxes = [
            one.box
            for image in (source, output)
            for one in self.eyes.find_all(image, names, self.thresholds.consistency)
        ]
        return background_consistency(self.eyes.encoder, source, output, boxes)

    def background_changed(self, session: Session, turn: int) -> bool:
        """Whether the background is another one than the source's. As released: what the turn's own
        flag says, and nothing of earlier ones."""
        so_far = session.turns[turn : turn + 1] if self.released else session.turns[: turn + 1]
        return any(
            one.meta.get("bg_consistency") is False
            or (not self.released and one.task == "background_change")
            for one in so_far
        )

    # --------------------------------------------------------------------------- what rules do

    def find(self, image: np.ndarray, name: str | None, threshold: float) -> list[Found]:
        """Where something is, the surest first."""
        assert name is not None
        return self.eyes.find(image, name, threshold)

    def asks(self, prompt: str, case: Case, images: Sequence[np.ndarray]) -> Score:
        """What the judge says to a question of yes or no."""
        assert self.asker is not None
        text, tail = self.prompts(prompt, **case.fields)
        return self.asker.yes_no(text, images, seed=case.seed, name="IF", turn=case.turn, tail=tail)

    def reads(self, case: Case, image: np.ndarray) -> Score:
        """Whether the judge, who is not told what to read, reads the text that was asked for,
        whatever its case."""
        assert self.asker is not None
        wanted = _letters(case.edit.text or "")

        def read(text: str) -> dict[str, float | None]:
            said = answer_part(text)
            if not said:
                raise Unread("nothing came back (accepted: what is written in the picture)")
            return {"IF": float(wanted in _letters(said))}

        text, _ = self.prompts("text", **case.fields)
        said = self.asker.read(
            text, [image], read, ("IF",), seed=case.seed, name="IF", turn=case.turn
        )
        return said["IF"]


# ------------------------------------------------------------------------------ turns and images


FIELDS = dict.fromkeys(
    (
        *("instruction", "edit", "formatted", "object", "new", "reference", "side", "count"),
        *("colour", "material", "background", "text", "old_text", "turns", "number"),
    ),
    "",
)
"""What a prompt may have in braces."""


def edit_of(turn: Turn) -> tuple[Edit | None, str]:
    """What a turn asks for, or why that cannot be read."""
    return parse_edit(turn.meta.get("formatted_instruction"), turn.task, turn.instruction)


def fields_of(turn: Turn, edit: Edit) -> dict[str, Any]:
    """Of the prompts."""
    formatted = str(turn.meta["formatted_instruction"])
    bare = formatted.replace("[", "").replace("]", "")
    said = {name: value for name, value in vars(edit).items() if value is not None}
    return {**said, "instruction": turn.instruction, "formatted": formatted, "edit": bare}


def names_in(value: Any) -> list[str]:
    """Names, each once."""
    return list(dict.fromkeys(name.strip() for name in value if name.strip()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def resized_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Lanczos; an image of that size as it is."""
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    size = (width, height)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _of_size(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    return resized_to(image, like.shape[0], like.shape[1])


def _letters(text: str) -> str:
    return " ".join(text.casefold().split())


# ------------------------------------------------------------------------- what a session may lack


def _if_missing(reward: ObjectReward, session: Session, turn: int) -> str | None:
    what = session.turns[turn]
    if what.task is None:
        return f"no task; {REMEDY}"
    if what.task not in reward.RULES:
        return f"task {plain(repr(what.task))[:60]} (accepted: {', '.join(reward.RULES)})"
    if "formatted_instruction" not in what.meta:
        return f"no meta.formatted_instruction; {REMEDY}"
    edit, why = edit_of(what)
    if edit is None:
        return f"meta.formatted_instruction: {why}"
    if reward.eyes.detector is None and reward.looks(edit):
        return "options.detector is none"
    return None


def _cc_missing(reward: ObjectReward, session: Session, turn: int) -> str | None:
    if reward.eyes.encoder is None or reward.eyes.detector is None:
        return f"options.{'features' if reward.eyes.encoder is None else 'detector'} is none"
    for name in ("unchanged_objects", "all_objects"):
        if name not in session.turns[turn].meta:
            return f"no meta.{name}; {REMEDY}"
        if not _are_names(session.turns[turn].meta[name]):
            given = plain(repr(session.turns[turn].meta[name]))[:60]
            return f"meta.{name}: {given} (accepted: a list of names)"
    for one in session.turns[: turn + 1]:
        if not isinstance(one.meta.get("bg_consistency"), bool) and one.task is None:
            return f"no meta.bg_consistency and no task; {REMEDY}"
    return None


def _ga_missing(reward: ObjectReward, session: Session, turn: int) -> str | None:
    for number, one in enumerate(session.turns[: turn + 1], 1):
        formatted = one.meta.get("formatted_instruction")
        if session.mode == "cu" and not isinstance(formatted, str):
            of = f" of turn {number}" if number <= turn else ""
            return f"no meta.formatted_instruction{of}, and the session is of mode cu; {REMEDY}"
    return None


_MISSING: dict[str, Callable[[Any, Session, int], str | None]] = {
    "IF": _if_missing,
    "CC": _cc_missing,
    "GA": _ga_missing,
}


def scores_among(*names: str, default: Sequence[str] = ()) -> Any:
    """An option `scores`: which of these are given; by default all of them, or `default`."""

    def check(value: Any) -> str | None:
        wrong = [one for one in value if one not in names]
        if wrong or not value or len(set(value)) < len(value):
            return f"each at most once, of {', '.join(names)}"
        return None

    return setting(tuple(default) or names, check=check, what=f"a list of {', '.join(names)}")
