"""The rewards of a run as the trainer asks them: each a `CheckedReward`, all of them a `Panel`."""

from __future__ import annotations

import copy
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from editr2.config.fields import Bounds
from editr2.config.settings import CALLS_AT_ONCE, COUNT
from editr2.errors import ConfigError, UserError, plain
from editr2.rewards.answers import TurnScores, batch_scores, failed_turns, session_scores
from editr2.rewards.base import Calls, Held, Item, Score, described
from editr2.rewards.calling import (
    OURS,
    Caller,
    NoAnswerError,
    called,
    constructor,
    on_main_thread,
    told,
)
from editr2.rewards.record import Record, pixel_digest, request_key
from editr2.run.generators import generators_aside
from editr2.sessions import Session
from editr2.sessions.session import pixel_sum, reference_sums

T = TypeVar("T")

OURS.add(__file__)


@dataclass(frozen=True)
class Form:
    """How a reward is asked: by a function of items, whether about several of them at once, and
    what None means in its answer. told: it sees which turns are asked about. Else it answers for
    all of a session that ends with the last of them."""

    function: Callable[[Sequence[Item]], Any]
    together: bool
    none: Score
    told: bool

    def rows(self, items: Sequence[Item], names: Sequence[str]) -> list[list[TurnScores]]:
        asked = [item.asked for item in items]  # before the reward had them in its hands
        if self.told:
            return self._said(items, [len(turns) for turns in asked], names)
        ends = [max(turns, default=-1) + 1 for turns in asked]
        cut = [_up_to(item, end) for item, end in zip(items, ends, strict=True)]
        said = self._said(cut, ends, names)
        return [[rows[t] for t in turns] for rows, turns in zip(said, asked, strict=True)]

    def _said(
        self, items: Sequence[Item], turns: Sequence[int], names: Sequence[str]
    ) -> list[list[TurnScores]]:
        said = self.function(items)
        if self.together:
            return batch_scores(said, turns, names, self.none)
        return [session_scores(said, turns[0], names, self.none)]


def _up_to(item: Item, end: int) -> Item:
    """With a session of so many turns."""
    session = item.session
    if end in (0, len(session.turns)):
        return item
    image = vars(session)["image"]  # which may lie in a file
    return item._replace(session=replace(session, image=image, turns=session.turns[:end]))


class CheckedReward:
    """A reward as the trainer asks it: `judge` answers for every turn of every session and lets
    nothing through but Ctrl-C.

    names: of the rewards. given: what the user's own function or object is. title: what it is
    called in errors. answered: whether it ever gave a score (or said that it does not apply).
    by_turn, concurrency, batch: as `base.Reward` says; concurrency None: on the main thread alone.
    recorded: whether this keeps the answers, which a reward that records its own calls, or has
    nothing to record, does not need. identity: what tells its recorded answers from another
    reward's (a run puts `editr2.run.identity`'s fingerprint here). options_at: the setting that its
    options stand in.
    """

    def __init__(
        self, given: object, names: tuple[str, ...], form: Form, calls: Calls, title: str
    ) -> None:
        self.given, self.title, self.answered = given, title, False
        self.names = names
        self.by_turn = form.together and bool(getattr(given, "by_turn", False))
        self.concurrency = calls.concurrency or _whole(given, "concurrency", CALLS_AT_ONCE, title)
        self.batch = _whole(given, "batch", COUNT, title) if form.together else 1
        self.options_at = "options"
        own = "calls" in constructor(given)  # then it counts tries and seconds itself
        self.recorded = not getattr(given, "exact", False) and "record" not in constructor(given)
        self.identity = f"{called(given)} {getattr(given, 'version', '')}"
        self._form = form
        self._caller = Caller(None if own else calls.timeout)
        self._tries = 1 + (0 if own else calls.retries or 0)

    @property
    def calls_a_turn(self) -> float | None:
        """Requests that a turn takes, where the reward says so."""
        return getattr(self.given, "calls_a_turn", None)

    @property
    def fills(self) -> int:
        """Turns that a question about one takes as long as."""
        return _whole(self.given, "fills", COUNT, self.title) or 1

    @property
    def wants(self) -> tuple[str, ...]:
        """What it looks for in a turn's `meta`, where it says so."""
        return _guarded(
            lambda: tuple(str(name) for name in getattr(self.given, "wants", ())),
            f"{self.title}: wants",
        )

    @property
    def facts(self) -> dict[str, str]:
        """What a run's record says of it."""
        return _guarded(
            lambda: {str(k): str(v) for k, v in getattr(self.given, "facts", {}).items()},
            f"{self.title}: facts",
        )

    @property
    def lends(self) -> bool:
        """Whether it has something to take away from the trainer's GPU."""
        return callable(getattr(self.given, "lend", None))

    def models_held(self, items: Sequence[Item]) -> list[Held] | None:
        """The models that it says it looks with in this process; None where it does not say."""
        says = getattr(self.given, "models_held", None)
        if not callable(says):
            return None
        return _guarded(lambda: list(says(items)), f"{self.title}: models_held()")

    def quick_look(self) -> None:
        """Its own `quick_look`; `UserError` where it cannot work at all."""
        look = getattr(self.given, "quick_look", None)
        with naming_options(self.given, self.options_at):
            if callable(look):
                look()

    def probe(self) -> list[str]:
        """What its own `probe` says of what works less well than it could; `UserError` where it
        cannot work at all."""
        probe = getattr(self.given, "probe", None)
        with naming_options(self.given, self.options_at):
            return [] if probe is None else [plain(str(line)) for line in probe()]

    @property
    def estimates(self) -> bool:
        """Whether it has an `estimate`."""
        return callable(getattr(self.given, "estimate", None))

    def estimate(self, items: Sequence[Item]) -> list[bool]:
        """Of rollouts so far, whether what follows is not worth making; False of one that has no
        `estimate`. Raises `ConfigError` for anything but a truth value an item."""
        if not self.estimates:
            return [False] * len(items)
        mine = [item._replace(session=_apart(item.session)) for item in items]
        title = f"{self.title}: estimate()"
        said = _guarded(lambda: list(self.given.estimate(mine)), title)  # type: ignore[attr-defined]
        if len(said) != len(items) or not all(isinstance(x, bool | np.bool_) for x in said):
            raise ConfigError(
                f"{title} gave {described(said)} (accepted: a list of {len(items)}, True or False "
                f"an item)"
            )
        return [bool(x) for x in said]

    def lacking(self, sessions: Sequence[Session], what: str) -> str | None:
        """How many of the sessions lack what it judges by, where it says so (`lacks`). what: they
        are called."""
        lacks = getattr(self.given, "lacks", None)
        if lacks is None:
            return None
        said = [(session.id, lack) for session in sessions if (lack := lacks(session))]
        if not said:
            return None
        first, lack = said[0]
        return f"{len(said)} of {len(sessions)} {what} lack something; {first}: {plain(str(lack))}"

    def calls(self, items: Sequence[Item]) -> list[list[Item]]:
        """The items, as they are asked about together."""
        size = self.batch or max(1, len(items))
        return [list(items[i : i + size]) for i in range(0, len(items), size)]

    def judge(self, items: Sequence[Item], record: Record | None = None) -> list[list[TurnScores]]:
        """A row for every turn that is asked about, of every item, of a `Score` for each name.
        record: where answers are kept and found."""
        return [rows for call in self.calls(items) for rows in self.call(call, record)]

    def call(self, items: Sequence[Item], record: Record | None = None) -> list[list[TurnScores]]:
        """Of one call."""
        if record is None or not self.recorded:
            said, _ = self._asked(items)
            return said
        key = request_key(reward=self.identity, items=[_item_parts(item) for item in items])
        kept = record.find(key, partial(_kept, items=items, names=self.names))
        if kept is not None:
            self.answered = True
            return kept
        start = time.monotonic()
        # An answer from the record draws nothing, so what is drawn must not move what comes after.
        with generators_aside(items[0].seed) if on_main_thread() else nullcontext():
            said, tries = self._asked(items)
        failures = [s.reason for rows in said for row in rows for s in row.values() if s.failed]
        where: dict[str, list[Any]] = {
            "rollout": [item.rollout for item in items],
            "turn": [[turn + 1 for turn in item.asked] for item in items],
            "name": list(self.names),
        }
        answer = [[_written(row) for row in rows] for rows in said]
        stands = record.write(
            key,
            answer,
            failed=plain(str(failures[0])) if failures else None,
            seconds=time.monotonic() - start,
            tries=tries,
            **{name: value[0] if len(value) == 1 else value for name, value in where.items()},
        )
        # An equal call of another thread may have been answered first.
        return said if failures or stands is answer else _kept(stands, items, self.names)

    def _asked(self, items: Sequence[Item]) -> tuple[list[list[TurnScores]], int]:
        """The answer, and how many tries it took."""
        asked = [len(item.asked) for item in items]  # before the reward had them in its hands
        for tries in range(1, self._tries + 1):
            try:
                said = self._caller.call(lambda: self._rows(items))
            except NoAnswerError as error:
                said = [failed_turns(str(error), n, self.names) for n in asked]
                if tries < self._tries:
                    time.sleep(random.uniform(0, min(30.0, 2.0 ** (tries - 1))))
                continue
            break
        self.answered |= any(
            not all(score.failed for score in row.values()) for rows in said for row in rows
        )
        return said, tries

    def _rows(self, items: Sequence[Item]) -> list[list[TurnScores]]:
        mine = [  # a judge may write into what it is given, and is not the only one that sees it
            item._replace(session=_apart(item.session), images=item.images.copy()) for item in items
        ]
        return self._form.rows(mine, self.names)


def _whole(given: object, name: str, bounds: Bounds, title: str) -> int | None:
    """What a reward says of itself, a number or nothing (None, 0)."""
    value = getattr(given, name, None)
    if value is None or value is False or value == 0:
        return None
    if not isinstance(value, int) or not bounds.hold(value):
        raise ConfigError(
            f"{title}: {called(given)}.{name}: {described(value)} (accepted: a whole number, "
            f"{bounds}, or None)"
        )
    return int(value)


def _item_parts(item: Item) -> Any:
    """All of an item that a judge can see, as JSON."""
    s = item.session
    turns = [[t.instruction, t.intent, t.task, _plain_keys(t.meta)] for t in s.turns]
    images = [pixel_digest(image) for image in item.images]
    meta = _plain_keys(s.meta)
    seen = [pixel_sum(s), *reference_sums(s)]
    return [s.id, s.mode, turns, meta, *seen, images, list(item.asked), item.seed]


def _plain_keys(value: Any, depth: int = 0) -> Any:
    """`meta` for JSON. What was not read from a file may have keys that JSON cannot sort or does
    not have, and contain itself."""
    if depth > 50:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else f"{type(key).__name__} {key}": _plain_keys(
                v, depth + 1
            )
            for key, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain_keys(v, depth + 1) for v in value]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        # As text, a large one is mostly dots.
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return value


def _written(row: TurnScores) -> list[Any]:
    return [
        [score.value, score.reason, score.applies, *([list(score.votes)] if score.votes else [])]
        for score in row.values()
    ]


def _kept(answer: Any, items: Sequence[Item], names: Sequence[str]) -> list[list[TurnScores]]:
    return [
        [
            {name: Score(*values) for name, values in zip(names, row, strict=True)}
            for _, row in zip(item.asked, rows, strict=True)
        ]
        for item, rows in zip(items, answer, strict=True)
    ]


class Panel:
    """All rewards of a run as one: `names` of all of them, and `judge`, which asks each in turn.

    record: where answers are kept and found, None for nowhere.
    """

    def __init__(self, members: Sequence[CheckedReward], record: Record | None = None) -> None:
        self.members, self.record = tuple(members), record
        self.names = tuple(name for member in members for name in member.names)
        lower = [name.lower() for name in self.names]
        for member in members:
            for name in member.names:
                if lower.count(name.lower()) > 1:
                    titles = ", ".join(m.title for m in members if name in m.names) or member.title
                    raise ConfigError(
                        f"{titles}: names: {name!r} more than once (accepted: rewards whose scores "
                        f"have names of their own)"
                    )

    @property
    def answered(self) -> bool:
        """Whether each of them ever gave a score."""
        return all(member.answered for member in self.members)

    def judge(self, items: Sequence[Item]) -> list[list[TurnScores]]:
        """A row for every turn that is asked about, of every item."""
        return joined([member.judge(items, self.record) for member in self.members])

    def lend(self) -> None:
        """Models of rewards that look on the trainer's GPU leave it until `take`."""
        self._tell("lend")

    def take(self) -> None:
        """And come back to it."""
        self._tell("take")

    def _tell(self, method: str) -> None:
        for member in self.members:
            function = getattr(member.given, method, None)
            if callable(function):
                _guarded(function, f"{member.title}: {method}()")

    def quick_look(self) -> None:
        """Whether each can work, as far as that is seen in seconds, before an editor's weights are
        read or anything is written. Raises their `UserError`."""
        for member in self.members:
            _guarded(member.quick_look, f"{member.title}: quick_look()")

    def probe(self) -> list[str]:
        """What each says of itself before anything is judged; raises its `UserError`."""
        return [
            f"{member.title}: {line}"
            for member in self.members
            for line in _guarded(member.probe, f"{member.title}: probe()")
        ]

    @property
    def wants(self) -> set[str]:
        """What they look for in a turn's `meta`."""
        return {name for member in self.members for name in member.wants}

    def lacking(self, sessions: Sequence[Session], what: str = "sessions") -> list[str]:
        """What each says of sessions that it has nothing to judge by; raises `ConfigError` where
        its own code raises."""
        return [
            f"{member.title}: {line}"
            for member in self.members
            if (
                line := _guarded(
                    partial(member.lacking, sessions, what), f"{member.title}: lacks()"
                )
            )
        ]

    def expected(self, session: Session) -> Sequence[np.ndarray] | None:
        """What was asked for, an image uint8 [H, W, 3] a turn, of the first that knows it: a
        reward's own `expected(session)`. None where none does."""
        for member in self.members:
            knows = getattr(member.given, "expected", None)
            if callable(knows):
                said = _guarded(partial(knows, _apart(session)), f"{member.title}: expected()")
                if said is not None:
                    return [np.asarray(image) for image in said]
        return None

    @property
    def facts(self) -> dict[str, str]:
        """What they say of themselves; of several, behind the names of whose scores it is."""
        if len(self.members) == 1:
            return self.members[0].facts
        return {
            f"{', '.join(member.names)}: {name}": text
            for member in self.members
            for name, text in member.facts.items()
        }


def _guarded(function: Callable[[], T], title: str) -> T:
    try:
        return function()
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a user's own
        raise ConfigError(f"{title} raised {told(error)}") from error


@contextmanager
def naming_options(given: Any, at: str) -> Iterator[None]:
    """A `ConfigError` from inside that begins with one of a reward's `Options` says where they are
    set: of several rewards, `url` alone does not say whose."""
    try:
        yield
    except ConfigError as error:
        options = getattr(given, "Options", None)
        known = getattr(options, "__dataclass_fields__", ())
        named = str(error).partition(":")[0].split(", ")
        if not all(name in known for name in named):
            raise
        raise ConfigError(f"{at}.{error}") from error


def joined(said: Sequence[Sequence[Sequence[TurnScores]]]) -> list[list[TurnScores]]:
    """Rows of several rewards about the same turns as one row each."""
    return [
        [{name: score for row in rows for name, score in row.items()} for rows in zip(*of_item)]
        for of_item in zip(*said)
    ]


def _apart(session: Session) -> Session:
    """The same session, whose pixels and `meta` may be written into: what is edited next does not
    depend on a judge."""
    turns = []
    for turn in session.turns:
        turns.append(copy.copy(turn))
        vars(turns[-1])["meta"] = _containers(turn.meta)
    mine = copy.copy(session)
    beside = [partial(_copied, image) for image in session.references]
    vars(mine).update(
        image=lambda: session.image.copy(),
        turns=tuple(turns),
        references=tuple(beside),
        meta=_containers(session.meta),
    )
    return mine


def _copied(image: Any) -> Any:
    return (image() if callable(image) else image).copy()


def _containers(value: Any) -> Any:
    """Dicts and lists of JSON anew; what is in them is shared."""
    if type(value) is dict:
        return {key: _containers(item) for key, item in value.items()}
    return [_containers(item) for item in value] if type(value) is list else value
