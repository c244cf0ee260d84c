"""The things of an image through a session's turns: which are there, which nobody has touched yet,
and under what names they ever went.

A turn's lists follow from the things of the source and the edits up to it, as MICE-Bench and
EdiVal-Bench write them: `available_objects` are there after the turn, `unchanged_objects` are the
source's own that no edit has named, `all_objects` are all names so far, `bg_consistency` says that
the background is still the source's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from editr2.rewards.geometry import Edit, singular


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRONOUNS = _words(
    "it its itself them they their themselves this that these those one ones he him his she her "
    "hers something everything all object objects thing things"
)

COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray beige gold golden "
    "silver cyan turquoise teal navy maroon crimson scarlet magenta olive tan cream ivory"
)
MATERIALS = _words(
    "wood wooden metal steel iron copper brass bronze plastic glass stone marble granite ceramic "
    "porcelain clay leather fabric cotton wool woollen silk denim velvet paper cardboard rubber "
    "wicker concrete brick"
)
_ARTICLE = re.compile(r"^(?:(?:the|an?|all|some|its|their|my|your)\s+)+", re.IGNORECASE)


class Unclear(Exception):
    """A name that cannot be told: `kind` is one of `annotate.problems.KINDS`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind, self.why = kind, why


@dataclass(frozen=True)
class Thing:
    """Something in the image, under the name that it goes by now.

    foreground: whether a new background leaves it. source: whether it was in the source. touched:
    whether an edit has named it. seen: False of a source's thing that the detector did not find.
    """

    name: str
    foreground: bool = True
    source: bool = True
    touched: bool = False
    seen: bool = True


def plain_name(name: str) -> str:
    """For comparisons: lower case, no article, no plural ending."""
    return singular(_ARTICLE.sub("", " ".join(name.casefold().split())))


def is_pronoun(name: str) -> bool:
    words = re.findall(r"[^\W\d_]+", name.casefold())
    return bool(words) and all(word in PRONOUNS | {"the", "a", "of"} for word in words)


def renamed(name: str, value: str, known: Iterable[str]) -> str:
    """The name with its first word among `known` replaced by the value, or else the value in front:
    `red cup` in blue is `blue cup`, `cup` is `blue cup`."""
    words, known = name.split(), set(known)
    for i, word in enumerate(words[:-1]):  # the last word says what it is: a glass, an orange
        if known & set(word.casefold().split("-")):
            before = words[:i]
            while before and before[-1].casefold() in ("dark", "light", "bright", "pale", "deep"):
                before.pop()
            return " ".join([*before, value, *words[i + 1 :]])
    return f"{value} {name}"


class Things:
    """What is there, edit by edit.

    source: the things of the source, in order.
    """

    def __init__(self, source: Iterable[Thing]) -> None:
        self.now: list[Thing] = list(source)
        self.gone: dict[str, int] = {}
        self.ever: list[str] = []
        self.background_kept = True
        self.turns = 0
        self._name_all()

    @property
    def names(self) -> list[str]:
        """Of what is there and was found."""
        return _once(thing.name for thing in self.now if thing.seen)

    def fields(self) -> dict[str, Any]:
        """The lists of the turn that was applied last, and the flag."""
        untouched = (t.name for t in self.now if t.source and t.seen and not t.touched)
        return {
            "unchanged_objects": _once(untouched),
            "available_objects": self.names,
            "all_objects": _once(self.ever),
            "bg_consistency": self.background_kept,
        }

    def find(self, name: str) -> Thing | None:
        """The one that a name means: by the name itself, or by some of its words where no other has
        them. Raises `Unclear` where several do."""
        wanted = plain_name(name)
        same = [thing for thing in self.now if plain_name(thing.name) == wanted]
        alike = same or [thing for thing in self.now if _alike(wanted, plain_name(thing.name))]
        if len(alike) > 1:
            of = ", ".join(repr(thing.name) for thing in alike[:4])
            raise Unclear("several", f"{name!r} may be {of}")
        return alike[0] if alike else None

    def gone_since(self, name: str) -> int | None:
        """The turn, from 1, after which what went by this name is not there any more."""
        return self.gone.get(plain_name(name))

    def add(self, thing: Thing) -> None:
        """One more that was there all the time."""
        self.now.append(thing)
        self._name_all()

    def apply(self, edit: Edit) -> None:
        """An edit was made. Things that it names and that are not there are left aside; `Unclear`
        where a name means several."""
        self.turns += 1
        thing = self.find(edit.object) if edit.object is not None else None
        reference = self.find(edit.reference) if edit.reference is not None else None
        _EDITS[edit.task](self, edit, thing, reference)
        self._name_all()

    # ------------------------------------------------------------------------------- the edits

    def _become(self, thing: Thing | None, **changes: Any) -> None:
        if thing is not None:
            new = replace(thing, touched=True, **changes)
            if new.name != thing.name:
                self.gone[plain_name(thing.name)] = self.turns
            self.now = [new if one is thing else one for one in self.now]

    def _drop(self, things: Sequence[Thing | None]) -> None:
        dropped = [thing for thing in things if thing is not None]
        for thing in dropped:
            self.gone[plain_name(thing.name)] = self.turns
        self.now = [one for one in self.now if not any(one is thing for thing in dropped)]

    def _appear(self, name: str | None) -> None:
        assert name is not None
        self.now.append(Thing(name, source=False, touched=True))

    def _add(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self._appear(edit.new)

    def _remove(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self._drop([thing])

    def _replace(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self._drop([thing])
        self._appear(edit.new)

    def _recolour(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        if thing is not None:
            self._become(thing, name=renamed(thing.name, edit.colour or "", COLOURS))

    def _remake(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        if thing is not None:
            self._become(thing, name=renamed(thing.name, edit.material or "", MATERIALS))

    def _write(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self._become(thing)
        if edit.object is None and edit.text is not None:
            self.ever.append(" ".join(edit.text.split()))  # as released: it bears its own name

    def _move(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        # The reference, too: whoever trades their places has done what was asked.
        self._become(thing)
        self._become(reference)

    def _count(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self._become(thing)

    def _background(self, edit: Edit, thing: Thing | None, reference: Thing | None) -> None:
        self.background_kept = False
        kept = {plain_name(found.name) for name in edit.kept if (found := self.find(name))}
        self._drop(
            [one for one in self.now if not one.foreground and plain_name(one.name) not in kept]
        )

    def _name_all(self) -> None:
        self.ever = _once([*self.ever, *(thing.name for thing in self.now)])
        for thing in self.now:  # a name may come back
            self.gone.pop(plain_name(thing.name), None)


_EDITS: Mapping[str, Any] = {
    "subject_add": Things._add,
    "subject_remove": Things._remove,
    "subject_replace": Things._replace,
    "color_alter": Things._recolour,
    "material_alter": Things._remake,
    "text_change": Things._write,
    "position_change": Things._move,
    "count_change": Things._count,
    "background_change": Things._background,
}


def names_of(edit: Edit) -> list[str]:
    """What an edit supposes to be there."""
    return [name for name in (edit.object, edit.reference, *edit.kept) if name is not None]


def alike(a: str, b: str) -> bool:
    """Whether one name may be taken for the other."""
    return _alike(plain_name(a), plain_name(b))


def _alike(a: str, b: str) -> bool:
    """Whether one name is the other with words left out, and both are of the same kind of thing:
    `cup` and `red cup`, not `cup` and `cup holder`."""
    one, two = a.split(), b.split()
    return (
        bool(one and two) and one[-1] == two[-1] and (set(one) <= set(two) or set(two) <= set(one))
    )


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
