"""Another trainer's settings as ours: one row for each of its keys.

A row says what the key becomes, what differs in meaning, or why there is nothing like it here. What
a table has no row for is told as unknown; nothing that was given is left out of what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from editr2.errors import plain
from editr2.recipes.python_config import Unread

Settings = dict[str, Any]
"""Ours, by dotted key."""


class _Absent:
    """No value: neither given nor a default."""


ABSENT: Any = _Absent()


@dataclass(frozen=True)
class Row:
    """What becomes of a key.

    Args:
        make: our settings of its value and of all of theirs; raises `ValueError`, in a few words,
            for a value that has no counterpart.
        default: what theirs is where the file is silent; without one, silence says nothing.
        differs: what means something else here, or a function that says so (or "").
        nowhere: why there is nothing like it, and what is instead; said where its value is not the
            default.
        elsewhere: who settles it here (the machine, the command line); its key is listed.
    """

    make: Callable[[Any, Theirs], Settings] | None = None
    default: Any = ABSENT
    differs: str | Callable[[Any, Theirs], str] = ""
    nowhere: str | Callable[[Any, Theirs], str] = ""
    elsewhere: str = ""


def to(*ours: str, default: Any = ABSENT, differs: str | Callable[..., str] = "") -> Row:
    """A key that is one of ours, or several, as it stands."""
    return Row(lambda value, _: dict.fromkeys(ours, value), default, differs)


def chosen(ours: str, choices: Mapping[Any, Any], default: Any = ABSENT, differs: Any = "") -> Row:
    """A key whose values have other names here."""

    def make(value: Any, _: Theirs) -> Settings:
        if value not in choices:
            raise ValueError(f"none of {', '.join(map(str, choices))}")
        return {ours: choices[value]}

    return Row(make, default, differs)


def nowhere(why: str | Callable[..., str], default: Any = ABSENT) -> Row:
    return Row(default=default, nowhere=why)


def elsewhere(who: str) -> Row:
    return Row(elsewhere=who)


class Rewarded(NamedTuple):
    """A reward of theirs. name: ours, or None. weight: of it. options: ours."""

    theirs: str
    name: str | None
    weight: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Project:
    """A trainer whose settings are known.

    Args:
        name: as it is called.
        table: its keys.
        fixed: our settings that it has no key for, of its model.
        model: our editor of all of its settings, or None where it trains no editor of ours.
        rewards: theirs.
        gpus: how many it was meant for, where the file says so.
        asks: the keys that `model` and `gpus` look at.
        says: lines about what no key shows.
    """

    name: str
    table: Mapping[str, Row]
    fixed: Callable[[Theirs], Settings]
    model: Callable[[Mapping[str, Any]], str | None]
    rewards: Callable[[Mapping[str, Any]], list[Rewarded]]
    gpus: Callable[[Mapping[str, Any], Mapping[str, Any]], int | None]
    asks: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Theirs:
    """Everything that a file says. given: by dotted key. model: our editor. gpus: of the run.
    title: of the configuration. used: keys that were looked at."""

    given: Mapping[str, Any]
    table: Mapping[str, Row]
    model: str
    gpus: int
    title: str
    used: set[str] = field(default_factory=set)

    def __getitem__(self, key: str) -> Any:
        """As given, else their default. Raises `ValueError` where it is neither known."""
        self.used.add(key)
        row = self.table.get(key)
        value = self.given.get(key, ABSENT if row is None else row.default)
        if value is ABSENT or isinstance(value, Unread):
            raise ValueError(f"{key} is not known")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except ValueError:
            return default


@dataclass
class Mapped:
    """settings: ours. origin: theirs that each is of, `key: value`. Lines: differs, nowhere,
    unknown, unread; elsewhere: keys by who settles them."""

    settings: Settings = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    nowhere: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    elsewhere: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What a reader has to know, heading by heading."""
        for heading, found in (
            ("differs in meaning", self.differs),
            ("no counterpart", self.nowhere),
            ("unknown keys, not taken", self.unknown),
            ("could not be read, not taken", self.unread),
            ("settled elsewhere", [f"{who}: {', '.join(k)}" for who, k in self.elsewhere.items()]),
        ):
            if found:
                yield f"{heading}:"
                yield from (f"  {plain(line)}" for line in found)


def mapped(project: Project, theirs: Theirs) -> Mapped:
    """Their settings as ours."""
    made = Mapped(settings=project.fixed(theirs))
    said = set(project.asks)
    for key, row in project.table.items():
        value = theirs.given.get(key, row.default)
        if value is not ABSENT and _take(made, key, row, value, theirs):
            said.add(key)
    for key, value in theirs.given.items():
        if key not in project.table:
            made.unknown.append(_said(key, value))
        elif key not in said | theirs.used and value not in NO_MATTER:
            made.elsewhere.setdefault(NO_EFFECT, []).append(key)
    made.nowhere += project.says
    return made


NO_EFFECT = "of no effect with the others, or as it is here anyway"
NO_MATTER: tuple[Any, ...] = (None, "", False, {}, [], "auto", "default")
"""Values that leave a key as if it were not there."""


def _take(made: Mapped, key: str, row: Row, value: Any, theirs: Theirs) -> bool:
    """Puts it where it belongs; whether anything came of it, or had to."""
    said = _said(key, value)
    if isinstance(value, Unread):
        made.unread.append(f"{key}: {value}")
        return True
    if row.elsewhere:
        if key in theirs.given:
            made.elsewhere.setdefault(row.elsewhere, []).append(key)
        return True
    try:
        if row.nowhere:
            why = row.nowhere if isinstance(row.nowhere, str) else row.nowhere(value, theirs)
            if why and value != row.default:
                made.nowhere.append(f"{said}: {why}")
            return True
        ours = {} if row.make is None else row.make(value, theirs)
        differs = row.differs if isinstance(row.differs, str) else row.differs(value, theirs)
    except ValueError as error:
        made.nowhere.append(f"{said}: {error}")
        return True
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        made.unread.append(f"{said} (not of the form that is known)")
        return True
    made.settings.update(ours)
    made.origin.update(dict.fromkeys(ours, said))
    if differs:
        made.differs.append(f"{said}: {differs}")
    return bool(ours or differs)


def _said(key: str, value: Any) -> str:
    text = plain(str(value) if isinstance(value, str | Unread) else repr(value)) or "''"
    return f"{key}: {text if len(text) <= 70 else text[:67] + '...'}"


def weight_of(value: Any) -> float:
    """Of a reward; 1 where it is no number."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good else 1.0


def flat(values: Mapping[str, Any], prefix: str = "", whole: tuple[str, ...] = ()) -> Settings:
    """Nested values by dotted key; those of `whole` as they stand."""
    made: Settings = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            made |= flat(value, f"{key}.", whole)
        else:
            made[key] = value
    return made


def nested(settings: Settings, whole: tuple[str, ...] = ("credit.weights",)) -> dict[str, Any]:
    """Dotted keys as sections."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        at = made
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    return made
