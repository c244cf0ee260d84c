"""A judge without a server or a network: IF and CC of a turn from its pixels, and from text that
RapidOCR reads.

It knows no objects. It sees where two images differ, whether edges and colours of a place stayed,
whether something stands out from what is around it, and it has a table of what English calls a
colour. From that each task has a rule (`RULES`) of a few factors in [0, 1], whose product is IF and
those below 1 are its reason:

| task | IF is seen in |
|---|---|
| color_alter | the changed place moved towards the colour that was asked; its outline stayed |
| material_alter | the same, for materials with a colour of their own (gold, wood, stone ...) |
| subject_add | something stands out where nothing did, of the asked colour, on the asked side |
| subject_remove | what stood out there does not any more |
| subject_replace | something else stands out there, of another outline or colour |
| position_change | it is gone from there, and much the same stands out on the asked side |
| text_change | the text is read in the changed place, and the old one is not |
| background_change | all around the objects changed, and the objects did not |
| count_change | does not apply: what is one thing is not to be seen from pixels |

A tone that the whole image took on, and changes elsewhere, lower it; an untouched image has 0.

CC compares the output with the source wherever the turns so far had no right to change: per pixel
by colour (the tone of the whole included) and local structure. The right is that of the place where
a turn's own change lies, if that is not most of the image. After a change of the background only
the objects that are to stay are compared, and CC does not apply where nobody says where they are.

`meta["boxes"]` of a session (things in its source) or of a turn (before it), `{name: [x0, y0, x1,
y1]}` in fractions of width and height, says where things are. **Without it the place is taken from
the change itself, so that the right edit of a wrong object scores as if it were right**, unless
the instruction names the object's own colour (`the red car`); the side of another object, and CC
after a change of the background, do not apply. What no box helps with: whether the new thing is a
cup, a gold thing gold, a background a beach; whether it looks real; standing rules and pronouns
(`it` is whatever changed).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from editr2.errors import ConfigError, plain
from editr2.rewards import text as reading
from editr2.rewards.base import Item, Score
from editr2.rewards.changes import (
    JUST_SEEN,
    Change,
    Mask,
    Part,
    Picture,
    grown,
    inner,
    ramp,
    ring,
    silhouette,
    stands_out,
    strangeness,
)
from editr2.rewards.colours import COLOURS, Colour, colour_of
from editr2.rewards.geometry import TASKS, Box, Edit, is_beside, parse_edit, singular
from editr2.sessions import Session, Turn

MATERIALS: dict[str, str] = {
    **dict.fromkeys(("gold", "golden", "brass"), "gold"),
    **dict.fromkeys(("copper", "bronze", "terracotta", "clay", "rust"), "orange"),
    **dict.fromkeys(("silver", "steel", "metal", "iron", "chrome", "aluminium"), "silver"),
    **dict.fromkeys(("stone", "concrete", "granite", "cement", "rock"), "grey"),
    **dict.fromkeys(("wood", "wooden", "oak", "walnut", "leather", "chocolate"), "brown"),
    **dict.fromkeys(("marble", "snow", "ice", "paper", "porcelain"), "white"),
    **dict.fromkeys(("grass", "moss", "leaves", "jade"), "green"),
    "brick": "red",
}
"""Material -> the colour that it has. Of others (glass, plastic, fabric ...) nothing is said."""
_BROAD = {
    "orange": Colour("the colour of copper", (0.35, 0.85), (0.05, 0.25), (30, 75)),
    "grey": Colour("the colour of stone", (0.25, 0.86), (0.0, 0.05), None),
}

ELSEWHERE = (0.15, 0.5)
"""The share of all change that lies in its place: below the first it is a change of the whole, from
the second on the rest is CC's to judge."""


class Reads(Protocol):
    def read(self, image: np.ndarray, box: Box | None = None) -> Sequence[reading.Line]: ...


@dataclass(frozen=True)
class Look:
    """One turn as a rule sees it. boxes: where things were before it, by name."""

    edit: Edit
    change: Change
    boxes: Mapping[str, Box]
    output: np.ndarray
    reader: Reads | str  # or why there is none

    def box(self, name: str | None) -> Box | None:
        return None if name is None else self.boxes.get(_key(name))

    @cached_property
    def place(self) -> Mask:
        """The pixels that changed where the object is; without a box, where most changed."""
        box = self.box(self.edit.object)
        if box is not None:
            return self.change.mask & self.change.before.mask(box, 0.2)
        return _union(main_parts(self.change), self.change)

    @property
    def confined(self) -> float:
        """Whether the change is in its place: the share of it that is."""
        return ramp(_share(self.change, self.place), *ELSEWHERE)

    @property
    def toned(self) -> float:
        return ramp(self.change.tint, 0.10, JUST_SEEN)

    @property
    def rest(self) -> float:
        return ramp(self.change.lost_outside(_union(self.change.parts[:2], self.change)), 0.6, 0.3)

    def named(self) -> dict[str, float]:
        """Without a box: whether the object had the colour that its name says."""
        colour = colour_of(self.edit.object or "")
        if colour is None or self.box(self.edit.object) is not None or not self.place.any():
            return {}
        near = colour.distance(self.change.before.soft[self.place]) < 0.08
        return {f"was {colour.name}": ramp(float(near.mean()), 0.1, 0.4)}


def _share(change: Change, place: Mask) -> float:
    return float(change.delta[place & change.mask].sum()) / max(change.mass, 1e-9)


def _key(name: str) -> str:
    words = re.sub(r"^(?:(?:the|an?|all)\s+)+", "", name.strip().lower())
    return singular(" ".join(words.split()))


def _union(parts: Sequence[Part], change: Change) -> Mask:
    result = np.zeros_like(change.mask)
    for part in parts:
        result |= part.place
    return result


def main_parts(change: Change) -> list[Part]:
    """The largest part of a change, and those that lie in and close to its box: a recoloured car is
    several."""
    if not change.parts:
        return []
    main = change.parts[0]
    around = change.before.mask(main.box, 0.15)
    return [part for part in change.parts if (part.mask & around).sum() > 0.5 * part.mask.sum()]


Factors = dict[str, float]
Said = Factors | str
"""What a rule says: factors by name, or why it says nothing."""


def _changed(look: Look) -> Factors:
    """How much of the object changed, and whether nothing else did."""
    box = look.box(look.edit.object)
    share = 1.0
    if box is not None:
        thing = silhouette(look.change.before, box)
        share = float((look.place & thing).sum()) / max(int(thing.sum()), 1)
    elif look.place.mean() > 0.4:  # most of the image is no object
        share = ramp(float(look.place.mean()), 0.6, 0.4)
    return {"changed": ramp(share, 0.1, 0.5), "elsewhere not": look.confined}


def _coloured(look: Look, colour: Colour, least: float) -> Factors:
    """How far the changed pixels moved to a colour, whether the thing's outline stayed, and whether
    it is what the change follows."""
    change, place = look.change, look.place & look.change.mask
    if not place.any():
        return {"changed": 0.0}
    was, now = (colour.distance(p.soft[place]) for p in (change.before, change.after))
    moved = np.where(was > 0.05, np.clip(1 - now / np.maximum(was, 1e-6), 0, 1), now < 0.04)
    outline = ramp(change.outline_kept(place), least, least + 0.35)
    factors = {f"{colour.name}": ramp(float(moved.mean()), 0.05, 0.8), "outline": outline}
    sharp = float(change.after.edges[place].mean()) / max(
        float(change.before.edges[place].mean()), 1e-6
    )
    # A blur takes edges away; so does a colour that is that of the surroundings.
    factors["sharp"] = 0.4 + 0.6 * ramp(sharp, 0.25, 0.55)
    factors["along its edges"] = ramp(change.along_edges(place), 0.45, 0.8)
    if (box := look.box(look.edit.object)) is not None:
        thing = grown(silhouette(change.before, box), 3)
        factors["not around it"] = ramp(float(thing[place].mean()), 0.5, 0.8)
    return factors


def _color_alter(look: Look) -> Said:
    colour = colour_of(look.edit.colour or "")
    if colour is None:
        return f"the colour {plain(str(look.edit.colour))!r} is in no table"
    return {**_changed(look), **_coloured(look, colour, 0.25), **look.named()}


def _material_alter(look: Look) -> Said:
    words = re.findall(r"[a-z]+", (look.edit.material or "").lower())
    name = next((MATERIALS[word] for word in words if word in MATERIALS), None)
    if name is None:
        return f"the material {plain(str(look.edit.material))!r} has no colour of its own"
    colour = _BROAD.get(name, COLOURS[name])
    return {**_changed(look), **_coloured(look, colour, 0.2), **look.named()}


def _subject_remove(look: Look) -> Said:
    box, change = look.box(look.edit.object), look.change
    place = look.place
    if box is not None:
        place = silhouette(change.before, box)
    around = ring(change.before, place, change.mask & ~place)
    if not place.any() or not around.any():
        return {"changed": 0.0}
    was, now = (stands_out(p, place, around) for p in (change.before, change.after))
    gone = ramp(now / max(was, 1e-6), 0.75, 0.25) * ramp(was, 0.02, 0.05)
    edges = change.after.edges
    like = (float(edges[place].mean()) + 0.003) / (float(np.median(edges[around])) + 0.003)
    seam = ramp(change.seam(look.place, around), 5.0, 2.5) * ramp(like, 0.3, 0.6)
    return {"gone": gone, "no patch": seam, **_changed(look), **look.named()}


def _subject_replace(look: Look) -> Said:
    box, change = look.box(look.edit.object), look.change
    place = look.place
    around = ring(change.before, place, change.mask & ~place)
    was, now = (stands_out(p, place, around) for p in (change.before, change.after))
    # A tint over a thing makes new edges around it, and keeps those in it.
    kept = max(change.outline_kept(place), change.outline_kept(inner(inner(place))))
    other = ramp(kept, 0.85, 0.45)
    factors = {**_changed(look), "stands out": ramp(now / max(was, 1e-6), 0.2, 0.5)}
    factors["another outline"] = 0.3 + 0.7 * other
    if box is not None:
        main = max(change.parts, key=lambda p: (p.mask & place).sum(), default=None)
    else:
        main = change.parts[0] if change.parts else None
    if main is not None:
        factors["no patch"] = _no_patch(look.change, main)
    return {**factors, **_new_colour(look, place), **look.named()}


def _new_colour(look: Look, place: Mask) -> Factors:
    """Of what came, where its name says one."""
    colour = colour_of(look.edit.new or "")
    if colour is None or not place.any():
        return {}
    near = colour.distance(look.change.after.soft[place & look.change.mask]) < 0.05
    return {colour.name: ramp(float(near.mean()) if near.size else 0.0, 0.1, 0.4)}


def _no_patch(change: Change, part: Part) -> float:
    """Low for an upright rectangle of one colour, which is what paint looks like and few things
    do."""
    height, width = change.mask.shape
    full = part.mask.sum() / max(part.box.area * height * width, 1)
    inner = ~grown(~part.mask, 3)
    if not inner.any():
        return 1.0
    spread = float(change.after.soft[inner].std(0).max())
    return 1 - 0.9 * ramp(float(full), 0.86, 0.94) * ramp(spread, 0.025, 0.01)


def appeared(change: Change, place: Mask) -> float:
    """Whether something stands out in a place where nothing did."""
    around = ring(change.after, place, change.mask & ~place)
    was, now = (stands_out(p, place, around) for p in (change.before, change.after))
    return ramp(was / max(now, 1e-6), 0.75, 0.3) * ramp(now, 0.02, 0.05)


def newest(change: Change, outside: Mask | None = None) -> tuple[Part | None, float]:
    """Of the larger parts of a change the one in which most appeared, and how much it did."""
    best: tuple[Part | None, float] = (None, 0.0)
    for part in change.parts[:4]:
        if outside is not None and (part.mask & outside).sum() > 0.5 * part.mask.sum():
            continue
        place = part.place if outside is None else part.place & ~outside
        value = appeared(change, place) * ramp(part.area, 0.6, 0.4)
        value *= ramp(part.mass / change.parts[0].mass, 0.0, 0.2)
        if best[0] is None or value > best[1]:
            best = part, value
    return best


def _beside(look: Look, part: Part) -> Factors | str:
    edit = look.edit
    if edit.side is None or edit.reference is None:
        return {}
    box = look.box(edit.reference)
    if box is None:
        return f"nobody says where the {plain(edit.reference)} is (meta.boxes)"
    of = " of" if edit.side in ("left", "right") else ""
    return {
        f"{edit.side}{of} the {plain(edit.reference)}": float(is_beside(part.box, edit.side, box))
    }


def _subject_add(look: Look) -> Said:
    part, new = newest(look.change)
    if part is None:
        return {"appeared": 0.0}
    side = _beside(look, part)
    factors = {"appeared": new, "no patch": _no_patch(look.change, part)}
    factors["elsewhere not"] = ramp(_share(look.change, part.place), *ELSEWHERE)
    if isinstance(side, str):  # what is there can be seen, where it is asked for cannot
        side = {}
    return {**factors, **side, **_new_colour(look, part.mask)}


def _position_change(look: Look) -> Said:
    change, box = look.change, look.box(look.edit.object)
    if look.edit.side is not None and look.box(look.edit.reference) is None:
        return f"nobody says where the {plain(str(look.edit.reference))} is (meta.boxes)"
    if box is not None:
        origin = silhouette(change.before, box)
    else:
        vanished = [(_vanished(change, part.place), part) for part in change.parts[:4]]
        value, main = max(vanished, key=lambda one: one[0], default=(0.0, None))
        if main is None or value == 0:
            return {"left": 0.0}
        origin = main.place
    if not origin.any():
        return {"left": 0.0}
    left = _vanished(change, origin)
    part, new = newest(change, grown(origin, 4))
    if part is None:
        return {"left": left, "appeared": 0.0}
    apart = strangeness(
        change.after.soft[part.mask], change.before.soft[origin & change.mask | origin]
    )
    side = _beside(look, part)
    both = origin | grown(origin, 6) | part.place
    factors = {"left": left, "appeared": new, "the same": ramp(float(apart.mean()), 0.15, 0.05)}
    factors["elsewhere not"] = ramp(_share(change, both), *ELSEWHERE)
    return {**factors, **(side if isinstance(side, dict) else {})}


def _vanished(change: Change, place: Mask) -> float:
    around = ring(change.before, place, change.mask & ~place)
    was, now = (stands_out(p, place, around) for p in (change.before, change.after))
    return ramp(now / max(was, 1e-6), 0.75, 0.3) * ramp(was, 0.02, 0.05)


def _text_change(look: Look) -> Said:
    if isinstance(look.reader, str):
        return look.reader
    wanted = look.edit.text or ""
    box = look.box(look.edit.object)
    if not (look.place & look.change.mask).any():
        return {"changed": 0.0}
    if box is None:
        box = main_parts(look.change)[0].box
    dx, dy = 0.25 * box.width + 0.02, 0.25 * box.height + 0.02
    near = Box.of([box.x0 - dx, box.y0 - dy, box.x1 + dx, box.y1 + dy])
    said = reading.joined(look.reader.read(look.output, near))
    one, two = ("".join(t.casefold().split()) for t in (wanted, said))
    like = 1.0 if one in two else 0.8 * SequenceMatcher(None, one, two, autojunk=False).ratio()
    factors = {f"reads {said[:40]!r}": like, "elsewhere not": look.confined}
    old = "".join((look.edit.old_text or "").casefold().split())
    if old and old not in one:
        factors["old text gone"] = 0.0 if old in two else 1.0
    return factors


def _background_change(look: Look) -> Said:
    change = look.change
    objects = [box for box in look.boxes.values()]
    things = _union([], change)
    rims = things.copy()
    for box in objects:
        thing = silhouette(change.before, box)
        things, rims = things | inner(thing), rims | grown(thing, 3)
    around = ~rims
    new = change.raw > 0.06
    if objects:
        kept = 1 - float(change.damage[things].mean() if things.any() else 0.0)
        stays = ramp(kept, 0.3, 0.8)
        if not around.any():
            return "things are everywhere, and no background is left (meta.boxes)"
    else:  # something has to be left as it was, and not at the border alone
        height, width = new.shape
        still = change.raw[height // 12 : -height // 12, width // 12 : -width // 12] < 0.03
        stays = ramp(float(still.mean()), 0.01, 0.05)
        around = ~grown(change.raw < 0.03, 2)
        around = around if around.mean() > 0.25 else np.ones_like(new)
    factors = {"background new": ramp(float(new[around].mean()), 0.3, 0.8), "things kept": stays}
    colour = colour_of(look.edit.background or "")
    if colour is not None and (around & new).any():
        near = colour.distance(change.after.soft[around & new]) < 0.06
        factors[colour.name] = ramp(float(near.mean()), 0.1, 0.5)
    elif colour is None:  # a plain colour may be a tone; anything else is another picture
        factors["more than a tone"] = ramp(change.untold(around), 0.006, 0.013)
    return factors


def _count_change(look: Look) -> Said:
    return "how many there are is not to be seen from pixels"


RULES: dict[str, Callable[[Look], Said]] = {
    "subject_add": _subject_add,
    "subject_remove": _subject_remove,
    "subject_replace": _subject_replace,
    "color_alter": _color_alter,
    "material_alter": _material_alter,
    "text_change": _text_change,
    "position_change": _position_change,
    "count_change": _count_change,
    "background_change": _background_change,
}
"""Task -> what is seen of it. In every one of `geometry.TASKS`."""

_OF_THE_WHOLE = ("background_change",)
"""Tasks in which the tone of the whole may move."""


def instruction_following(look: Look) -> Score:
    """IF of one turn, with its factors as the reason."""
    said = RULES[look.edit.task](look)
    if isinstance(said, str):
        return Score.not_applicable(said)
    if look.edit.task not in _OF_THE_WHOLE:
        said = {**said, "no tint": look.toned, "the rest kept": look.rest}
    value = float(np.prod(list(said.values())))
    short = [f"{name} {factor:.2f}" for name, factor in said.items() if factor < 0.995]
    return Score(value, ", ".join(short) or f"as asked: {', '.join(said)}")


def rights(look: Look | None, change: Change) -> npt.NDArray[np.float32]:
    """How much a turn had a right to change each pixel, in [0, 1]. look: None where nobody knows
    what it asked for: two places."""
    if (
        look is not None
        and look.edit.task
        in ("subject_remove", "color_alter", "text_change", "material_alter", "subject_replace")
        and look.box(look.edit.object) is not None
    ):
        # A thing that comes in the place of another may be larger.
        more = 0.35 if look.edit.task == "subject_replace" else 0.15
        return change.before.mask(look.box(look.edit.object), more).astype(np.float32)
    if look is not None and look.edit.task in ("subject_add", "position_change"):
        box = look.box(look.edit.object) if look.edit.task == "position_change" else None
        origin = change.before.mask(box, 0.15) if box is not None else None
        part, _ = newest(change, origin)
        places = [] if part is None else [part]
        if look.edit.task == "position_change" and box is None:
            places = list(change.parts[:2])
    else:
        origin = None
        places = main_parts(change) if look is not None else list(change.parts[:2])
    allowed = np.zeros(change.mask.shape, np.float32)
    for part in places:
        weight = ramp(part.area, 0.6, 0.4)
        allowed = np.maximum(allowed, weight * grown(part.place, 5))
    if origin is not None:
        allowed = np.maximum(allowed, origin.astype(np.float32))
    return allowed


def consistency(whole: Change, allowed: np.ndarray, kept: Mask | None) -> Score:
    """CC: from the source to the output. kept: after a change of the background the things that are
    to stay, and nothing else is compared."""
    weight = 1 - allowed
    if kept is not None:
        weight = weight * kept
    total = float(weight.sum())
    least = 0.002 if kept is not None else 0.05
    if total < least * weight.size:
        return Score.not_applicable("nothing is left to compare")
    lost = float((weight * whole.damage).sum()) / total
    detail = weight * whole.detail
    if (of := float(detail.sum())) > 0.003 * weight.size:  # half by area, half by what is on it
        lost = (lost + float((detail * whole.damage).sum()) / of) / 2
    reason = f"{100 * lost:.1f} % lost of the {100 * total / weight.size:.0f} % that stay"
    return Score((1 - lost) ** 4, reason)


_VERB = r"(?:change|alter|set|turn|switch|make|adjust)"
_THING = r"(?:(?:the|an?|all|its|this|that)\s+)*(?P<object>[^\[\],.;]+?)"
_MADE = _THING.replace("object", "made")  # a name can be given once in a pattern
_NEW = r"(?:(?:the|an?|some)\s+)*(?P<new>[^\[\],.;]+?)"
_SIDE = (
    r"(?:(?:on|to|at)\s+the\s+)?(?P<side>left|right|above|below|over|under|beneath)"
    r"(?:\s+side)?(?:\s+of)?\s+(?:the\s+|an?\s+)?(?P<reference>[^\[\],.;]+?)"
)
_QUOTE = "[\"'“”‘’]"
_PLAIN: tuple[tuple[str, str], ...] = (
    # plain English -> the same with its fields in brackets, as `parse_edit` reads it
    (
        rf"{_VERB}\s+(?:the\s+)?background\s+(?:to|into|with)?\s*(?:an?\s+|the\s+)?(?P<new>[^,.;]+)",
        "change the background to [{new}]",
    ),
    (
        rf"(?:replace|change|swap)\s+(?:the\s+)?(?:text|word)?\s*{_QUOTE}(?P<old>[^\"]+?){_QUOTE}\s+on\s+"
        rf"{_THING}\s+(?:with|by|to|for|into)\s+{_QUOTE}(?P<new>[^\"]+?){_QUOTE}",
        "replace the text '[{old}]' on [{object}] with '[{new}]'",
    ),
    (
        rf"(?:add|write|put|print)\s+(?:the\s+)?(?:text|words?)?\s*{_QUOTE}(?P<new>[^\"]+?){_QUOTE}.*",
        "add the text '[{new}]'",
    ),
    (
        rf"(?:{_VERB}\s+the\s+material\s+of\s+{_THING}\s+(?:to|into)|make\s+{_MADE}\s+(?:out\s+)?of)\s+"
        r"(?P<new>[a-z ]+)",
        "change the material of [{object}] to [{new}]",
    ),
    (
        rf"{_VERB}\s+the\s+colou?r\s+of\s+{_THING}\s+(?:to|into)\s+(?P<colour>[^,.;]+)",
        "change the color of [{object}] to [{colour}]",
    ),
    (
        rf"(?:make|paint|colou?r|turn|dye|tint|recolou?r|change)\s+{_THING}\s+"
        rf"(?:(?:to|into|in)\s+)?(?P<colour>(?:[a-z]+\s+)?[a-z]+)",
        "change the color of [{object}] to [{colour}]",
    ),
    (
        rf"(?:remove|delete|erase|get\s+rid\s+of|take\s+away)\s+{_THING}"
        r"(?:\s+from\s+the\s+(?:image|picture|photo|scene))?",
        "remove [{object}]",
    ),
    (
        rf"(?:(?:replace|swap|exchange)\s+{_THING}\s+(?:with|by|for)|(?:change|turn)\s+{_MADE}\s+"
        rf"(?:in)?to\s+an?)\s+{_NEW}",
        "replace [{object}] with [{new}]",
    ),
    (rf"(?:move|put|place|shift)\s+{_THING}\s+{_SIDE}", "move [{object}] {side} [{reference}]"),
    (
        rf"(?:add|insert|draw|place|put|include)\s+{_NEW}\s+{_SIDE}",
        "add [{new}] {side} [{reference}]",
    ),
    (rf"(?:add|insert|draw|include)\s+{_NEW}", "add [{new}]"),
)
_COMPILED = tuple(
    (re.compile(rf"\s*(?:please\s+)?{pattern}\s*[.!]?\s*$", re.I), form) for pattern, form in _PLAIN
)


def bracketed(instruction: str) -> str | None:
    """A plain instruction with its fields in brackets (`make the red car blue` is `change the color
    of [red car] to [blue]`), or None where it is of no form that is known. What follows the first
    sentence or comma is left out."""
    first = re.split(r"[,;]\s|[.!]\s", instruction.strip())[0]
    for pattern, form in _COMPILED:
        match = pattern.match(first)
        if match is None:
            continue
        fields = {name: text.strip() for name, text in match.groupdict().items() if text}
        fields.setdefault("object", fields.pop("made", ""))
        if "colour" in fields and colour_of(fields["colour"], alone=True) is None:
            words = fields["colour"].split()
            if len(words) < 2 or colour_of(words[-1], alone=True) is None:
                continue
            fields["object"] += f" {words[0]}"  # of `make the car red` only `red` is the colour
            fields["colour"] = words[-1]
        return form.format(**fields)
    return None


def edit_of(turn: Turn) -> tuple[Edit | None, str]:
    """What a turn asks for; or None, and why that is not known."""
    task = turn.task if turn.task in TASKS else None
    formatted = turn.meta.get("formatted_instruction")
    if isinstance(formatted, str) and formatted.strip():
        return parse_edit(formatted, task, turn.instruction)
    for words in (turn.intent, turn.instruction):
        if words and (form := bracketed(words)) is not None:
            edit, why = parse_edit(form, task, turn.instruction)
            if edit is not None:
                return edit, why
    return None, f"of no form that is known: {plain(turn.instruction)[:60]!r}"


def boxes_of(session: Session, turn: int) -> dict[str, Box]:
    """Where things are before a turn: what its own `meta["boxes"]` says, and the session's."""
    known: dict[str, Box] = {}
    for meta in (session.meta, session.turns[turn].meta):
        boxes = meta.get("boxes") or {}
        if not isinstance(boxes, Mapping):
            raise ConfigError("meta.boxes: not an object (accepted: {name: [x0, y0, x1, y1]})")
        try:
            known |= {_key(str(name)): Box.of(values) for name, values in boxes.items()}
        except ValueError as error:
            raise ConfigError(f"meta.boxes: {error}") from error
    return known


@dataclass
class _Session:
    """An item's pictures, each brought to scale once."""

    item: Item
    reader: Reads | str
    pictures: dict[int, Picture] = field(default_factory=dict)
    changes: dict[int, Change] = field(default_factory=dict)

    def picture(self, turn: int) -> Picture:
        """The output of a turn, and of -1 the source."""
        if turn not in self.pictures:
            image = self.item.images[turn] if turn >= 0 else self.item.session.image
            like = None if turn <= 0 and not self.pictures else next(iter(self.pictures.values()))
            self.pictures[turn] = Picture.of(image, like)
        return self.pictures[turn]

    def change(self, turn: int) -> Change:
        if turn not in self.changes:
            self.picture(-1)
            before, after = self.picture(turn - 1), self.picture(turn)
            self.changes[turn] = Change.between(before, after)
        return self.changes[turn]

    def look(self, turn: int) -> tuple[Look | None, str]:
        edit, why = edit_of(self.item.session.turns[turn])
        if edit is None:
            return None, why
        boxes = boxes_of(self.item.session, turn)
        return Look(edit, self.change(turn), boxes, self.item.images[turn], self.reader), ""

    def judge(self, turn: int) -> dict[str, Score]:
        look, why = self.look(turn)
        if look is None:
            following = Score.not_applicable(why)
        else:
            try:
                following = instruction_following(look)
            except reading.ReaderError as error:
                following = Score(None, str(error))
        return {"IF": following, "CC": self.kept(turn)}

    def kept(self, turn: int) -> Score:
        session = self.item.session
        whole = (
            self.change(0) if turn == 0 else Change.between(self.picture(-1), self.picture(turn))
        )
        allowed = np.zeros(whole.mask.shape, np.float32)
        things: Mask | None = None
        touched: set[str] = set()
        for t in range(turn + 1):
            look, _ = self.look(t)
            if look is not None and look.edit.task == "background_change":
                things = np.zeros(whole.mask.shape, bool)
                continue
            if look is not None:
                touched.add(_key(look.edit.object or ""))
            allowed = np.maximum(allowed, rights(look, self.change(t)))
        if things is not None:
            boxes = {k: box for k, box in boxes_of(session, 0).items() if k not in touched}
            if not boxes:
                return Score.not_applicable(
                    "the background changed, and nobody says where things are (meta.boxes)"
                )
            for box in boxes.values():
                things |= inner(silhouette(whole.before, box))
        return consistency(whole, allowed, things)


class Pixels:
    """IF and CC as this module's docstring says.

    reader: of text, in place of RapidOCR's. Where RapidOCR is not installed, IF of a change of text
    does not apply, which `probe` says.
    """

    names = ("IF", "CC")
    by_turn = True
    concurrency = 2
    exact = True
    version = "1"

    def __init__(self, reader: Reads | None = None) -> None:
        self._reader: Reads | str | None = reader

    @property
    def facts(self) -> dict[str, str]:
        sees = [task for task in RULES if task != "count_change"]
        return {"pixels": f"version {self.version}; IF of {', '.join(sees)}; knows no objects"}

    def probe(self) -> list[str]:
        """What it will say nothing about."""
        lines = ["IF does not apply to count_change"]
        if isinstance(self.reader, str):
            lines.append(f"IF does not apply to text_change: {self.reader}")
        return lines

    @property
    def reader(self) -> Reads | str:
        if self._reader is None:
            made = reading.Reader()
            try:
                made.load()
            except ConfigError as error:
                self._reader = str(error)
            else:
                self._reader = made
        return self._reader

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        rows = []
        for item in items:
            texts = any(turn.task == "text_change" for turn in item.session.turns) or any(
                (edit_of(turn)[0] or Edit("")).task == "text_change" for turn in item.session.turns
            )
            seen = _Session(item, self.reader if texts else "no reader")
            rows.append([seen.judge(turn) for turn in item.asked])
        return rows
