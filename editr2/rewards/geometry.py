"""Where things are, and what an instruction asks of them: boxes, the sides of one another, and the
templates of MICE-Bench and EdiVal-Bench read into an `Edit`.

Boxes are (x0, y0, x1, y1) in [0, 1], x to the right and y downwards, so that they hold for an image
of any size. The rules that the benchmarks judge by are thin compositions of what is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from editr2.errors import plain

DUPLICATE = 0.8
"""Two boxes that overlap (IoU) by more are one object found twice."""
APART = 0.03
"""Centres closer than this on an axis are beside each other on neither side of it."""


class Box(NamedTuple):
    """A box in fractions of the image's width (x) and height (y)."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Box:
        """Four numbers as a box, clamped to the image. Raises ValueError where they are none."""
        try:
            x0, y0, x1, y1 = (float(value) for value in values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"box: {plain(repr(values))} (accepted: x0, y0, x1, y1)") from error
        if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
            raise ValueError(
                f"box: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) (accepted: finite, x0 <= x1 and y0 <= y1)"
            )
        return cls(*(min(max(value, 0.0), 1.0) for value in (x0, y0, x1, y1)))

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def larger(self, than: float) -> bool:
        """Whether it is wider *and* higher than this fraction of the image, as a detector's box for
        something that it did not find often is."""
        return self.width > than and self.height > than

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """As (left, top, right, bottom) of an image of so many pixels, both ends rounded down."""
        scale = (width, height, width, height)
        left, top, right, bottom = (int(v * s) for v, s in zip(self, scale, strict=True))
        return left, top, right, bottom


class Found(NamedTuple):
    """What a detector says of one place. score: its confidence, in [0, 1]."""

    box: Box
    score: float


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where both are empty."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (a.area + b.area - both)


def inside(a: Box, b: Box) -> bool:
    """Whether `a` lies in `b`, edges included."""
    return a.x0 >= b.x0 and a.y0 >= b.y0 and a.x1 <= b.x1 and a.y1 <= b.y1


def deduplicate(found: Iterable[Found], above: float = DUPLICATE) -> list[Found]:
    """One of every group of boxes that overlap by more than `above` (IoU): the surest first, which
    drops those that overlap it. Equal scores keep their order."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: -one.score):
        if all(iou(one.box, other.box) <= above for other in kept):
            kept.append(one)
    return kept


_AXES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
SIDES = tuple(_AXES)
"""The sides that an instruction may name."""


def is_beside(box: Box, side: str, of: Box, apart: float = APART) -> bool:
    """Whether the centre of `box` is on that side of the centre of `of`, by more than `apart` on
    the side's axis; the other axis does not matter."""
    axis, sign = _AXES[side]
    return sign * (box.centre[axis] - of.centre[axis]) > apart


def sides(box: Box, of: Box, apart: float = APART) -> tuple[str, ...]:
    """All sides of `of` that `box` is on: none, one, or one of each axis."""
    return tuple(side for side in SIDES if is_beside(box, side, of, apart))


# Names


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "leaves": "leaf",
    "knives": "knife",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
    "loaves": "loaf",
    "wolves": "wolf",
    "scarves": "scarf",
    "halves": "half",
    "potatoes": "potato",
    "tomatoes": "tomato",
    "heroes": "hero",
    "buses": "bus",
    "cookies": "cookie",
    "brownies": "brownie",
    "hoodies": "hoodie",
    "selfies": "selfie",
    "movies": "movie",
    "ties": "tie",
    "pies": "pie",
}
_PLURAL_ONLY = _words(
    "glasses sunglasses eyeglasses goggles binoculars scissors pliers tweezers tongs jeans pants "
    "trousers shorts leggings tights overalls pyjamas pajamas headphones stairs clothes series "
    "species canvas gas lens atlas"
)
_ENDINGS = ((r"([^aeiou])ies$", r"\1y"), (r"(x|ch|sh|ss)es$", r"\1"), (r"([^sui])s$", r"\1"))


def singular(name: str) -> str:
    """A noun phrase with the plural ending of its last word removed, where it has one: a detector
    is asked for one "red apple", not for "red apples". What has no singular (`glasses`, `jeans`)
    stays."""
    head, gap, last = name.rpartition(" ")
    word = last.lower()
    if word in _IRREGULAR:
        return head + gap + _IRREGULAR[word]
    if word in _PLURAL_ONLY or len(word) < 4:
        return name
    for ending, instead in _ENDINGS:
        if re.search(ending, last, re.IGNORECASE):
            return head + gap + re.sub(ending, instead, last, flags=re.IGNORECASE)
    return name


def released_singular(name: str) -> str:
    """As Edit-R2's release has it: the last letters es, or else s, are cut off (`shoes` is `sho`,
    `glass` is `glas`)."""
    return name[:-2] if name.endswith("es") else name.removesuffix("s")


# Instructions


@dataclass(frozen=True)
class Edit:
    """What an instruction asks for. Fields that a task has no use for are None.

    Args:
        task: the kind of edit, one of `TASKS`.
        object: what is there already: removed, replaced, recoloured, moved, counted, or what
            carries the text.
        new: what is added, or comes in its place.
        reference: what `side` is a side of.
        side: left, right, above or below.
        count: how many there are to be.
        colour, material, background: that there is to be.
        text: that is to be read.
        old_text: that it replaces.
        kept: what a change of the background leaves as it is.
    """

    task: str
    object: str | None = None
    new: str | None = None
    reference: str | None = None
    side: str | None = None
    count: int | None = None
    colour: str | None = None
    material: str | None = None
    background: str | None = None
    text: str | None = None
    old_text: str | None = None
    kept: tuple[str, ...] = ()


_QUOTES = "'\"`‘’“”„«»"
_QUOTED = f"[{_QUOTES}]*"
_TEXT = "(?:texts?|words?|phrase|lettering|caption|writing)"
# What stands for {a field} in a template. A side or a count need no brackets, because a reader
# checks them; everything else could be any words, and only the brackets say where they end.
_WORDS = rf"(?:(?:the|an?|all|some|its) )*{_QUOTED}\[(?P<%s>[^\[\]]*)\]{_QUOTED}"
_FIELDS = {
    **{
        name: _WORDS % name
        for name in [
            "object",
            "new",
            "reference",
            "colour",
            "material",
            "background",
            "text",
            "old_text",
        ]
    },
    "side": r"(?:(?:on|to|at|in|the) )*\[?(?P<side>[^\[\]]+?)\]?(?: side)?(?: of)?",
    "count": r"(?:exactly )?\[?(?P<count>[^\[\] ]+?)\]?",
    "change": "(?:change|alter|set|switch|turn|adjust|modify|make)",
    "to": "(?:to be|to|into|as)",
    "words": rf"(?:(?:the )?{_TEXT} |(?=[{_QUOTES}]))",
}
_TEMPLATES = {
    "subject_add": (
        "(?:add|place|put|insert|draw|include) {new} {side} {reference}",
        "(?:{side} {reference},? )(?:add|place|put|insert|draw|include) {new}",
        "(?:add|insert|draw|include) {new}",
    ),
    "subject_remove": (
        "(?:remove|delete|erase|get rid of|take away|take out|take|drop) {object}(?: away| out)?",
    ),
    "subject_replace": (
        "(?:replace|swap|swap out|exchange|change|turn) {object} (?:with|by|for|to|into) {new}",
        "(?:put|place|use) {new} (?:in place of|instead of) {object}",
    ),
    "color_alter": (
        "{change} (?:the )?colou?r of {object} {to} {colour}",
        "(?:recolou?r|colou?r|paint|dye|tint|turn|make) {object} (?:(?:to|into|in) )?{colour}",
    ),
    "material_alter": (
        "{change} (?:the )?material of {object} {to} {material}",
        "(?:make|remake|rebuild|render|turn|change) {object} "
        "(?:(?:(?:be )?made )?(?:of|from|out of)|to|into|in) {material}",
    ),
    "text_change": (
        "(?:replace|change|swap|exchange) {words}{old_text} (?:on|of|in) {object} "
        "(?:with|by|to|for|into) {words}{text}",
        "(?:on|in) {object},? (?:replace|change|swap|exchange) {words}{old_text} "
        "(?:with|by|to|for|into) {words}{text}",
        "(?:change) {words}(?:on|of|in) {object} from {old_text} to {text}",
        "(?:add|put|place|insert) {words}{text}",
        "(?:write|print) {words}?{text}",
    ),
    "position_change": (
        "{change} (?:the )?(?:position|place|location) of {object} (?:to )?{side} {reference}",
        "(?:move|put|place|shift|bring|relocate) {object} {side} {reference}",
    ),
    "count_change": (
        "{change} (?:the )?(?:count|number|amount|quantity) of {object} {to} {count}",
        "(?:show|make (?:it|there be)|let there be|have) {count} (?:of )?{object}",
    ),
    "background_change": (
        "(?:{change}|replace|swap|exchange) (?:the )?background (?:to|into|with|by|for) "
        "{background}",
        "(?:use|put|show) {background} (?:as|for|in) (?:the )?(?:new )?background",
    ),
}
TASKS = tuple(_TEMPLATES)
"""The kinds of edit, as the released files name them."""

# A template starts the instruction or one of its clauses ("with this rule in force, add [a cup]"),
# and the instruction ends with it, or goes on in another clause without fields.
_START = rf"^(?:[^\[\]]*[.,;:!?—–\n{_QUOTES}] *)?(?:(?:please|now|then|and|next|also|finally) )*"
_END = (
    r"(?: (?:on|onto|in|into|from|to) (?:the|this) (?:image|picture|photo|photograph|scene))?"
    rf" *(?:[.,;:!?—–{_QUOTES}][^\[\]]*)?$"
)
_KEPT = re.compile(
    r"\b(?:remain|keep|leave|retain|preserve)s?\s+(?P<kept>.+?)\s*"
    r"\b(?:unchanged|untouched|intact|as\s+(?:it\s+is|they\s+are|before))\b",
    re.IGNORECASE | re.DOTALL,
)
_BEFORE_NAME = re.compile(
    r"^(?:(?:and|leave|keep|remain|the|an?|its|their|all)\s+)*", re.IGNORECASE
)
_NOT_NAMES = _words(
    "it them this that these those him her everything all rest others objects object"
)
_SIDE_WORDS = {
    **{side: side for side in SIDES},
    "over": "above",
    "on top": "above",
    "top": "above",
    "under": "below",
    "beneath": "below",
    "underneath": "below",
}
_NUMBERS = {
    w: n
    for n, w in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 1
    )
}


def _compiled(template: str) -> re.Pattern[str]:
    for name, pattern in _FIELDS.items():
        template = template.replace("{" + name + "}", pattern)
    tail = rf"(?P<kept>,[^\[\]]*\[.*)?{_END}" if "P<background>" in template else _END
    return re.compile(
        (_START + template + tail).replace(" ", r"\s+").replace(r"\s+*", r"\s*"), re.I
    )


_PATTERNS = {task: tuple(map(_compiled, templates)) for task, templates in _TEMPLATES.items()}


def parse_edit(
    formatted: Any, task: str | None = None, instruction: str = ""
) -> tuple[Edit | None, str]:
    """What an instruction with its objects in square brackets asks for, and ""; or None, and why in
    one line. Nothing is guessed: words around the fields may differ, but every field in brackets
    must have its place in a template of the task.

    formatted: the instruction with brackets, a turn's `meta["formatted_instruction"]`.
    task: one of `TASKS`; without it the one task that has such a template.
    instruction: the instruction itself, which alone says what a change of the background keeps.
    """
    if not isinstance(formatted, str) or not formatted.strip():
        return None, "no formatted_instruction"
    if task is not None and task not in _PATTERNS:
        return None, f"task {plain(repr(task))} (accepted: {', '.join(TASKS)})"
    asked = TASKS if task is None else (task,)
    read = [_read(one, formatted, instruction) for one in asked]
    edits = [edit for edit, _ in read if edit is not None]
    if len(edits) == 1:
        return edits[0], ""
    given = plain(formatted)
    given = repr(given if len(given) <= 120 else given[:117] + "...")
    if edits:
        return None, f"{given}: {' or '.join(edit.task for edit in edits)}, and no task says which"
    why = next((why for _, why in read if why), f"no template of {task or 'any task'}")
    return None, f"{given}: {why}"


def _read(task: str, formatted: str, instruction: str) -> tuple[Edit | None, str]:
    """By the first template of the task that fits: the edit, or what is wrong with a field. No
    reason where none fits."""
    found = (pattern.match(formatted) for pattern in _PATTERNS[task])
    match = next((match for match in found if match), None)
    if match is None:
        return None, ""
    fields: dict[str, Any] = {}
    values = {name: text for name, text in match.groupdict().items() if text is not None}
    kept = values.pop("kept", None)
    for name, value in values.items():
        fields[name], problem = _READERS.get(name, _name)(value)
        if problem:
            return None, f"{name} {plain(value)[:60]!r} {problem}"
    if task == "background_change":
        fields["kept"] = _bracketed(kept) if kept else kept_objects(instruction)
    return Edit(task, **fields), ""


def kept_objects(instruction: str) -> tuple[str, ...]:
    """What an instruction to change the background asks to keep, as names; pronouns are none."""
    # A standing rule, which also speaks of leaving things untouched, comes before the edit.
    at = instruction.lower().rfind("background")
    clause = _KEPT.search(instruction, max(at, 0))
    if clause is None:
        return ()
    kept = []
    for part in clause["kept"].split(","):
        words = re.sub(
            r"^(?:(?:and|leave|keep|remain|the|an?|its|their|all)\s+)*",
            "",
            part.strip(),
            flags=re.I,
        )
        if words and words.lower().split()[0] not in _NOT_NAMES:
            kept.append(words)
    return tuple(kept)


def _bracketed(text: str) -> tuple[str, ...]:
    return tuple(name for name in re.findall(r"\[([^\[\]]+)\]", text) if name.strip())


def _name(text: str) -> tuple[str | None, str]:
    """The words of an object, a colour, a material or a place. Some released fields hold what a
    language model thought aloud: lines, or sentences."""
    name = text.strip(f" \t\r\n,;:*({_QUOTES}")
    if not re.search(r"\w", name):
        return None, "is not a name"
    if re.search(r"[\r\n]|[.!?]\s", name):
        return None, "is not a name but lines or sentences"
    return " ".join(name.split()), ""


def _text(text: str) -> tuple[str | None, str]:
    return (text.strip(), "") if text.strip() else (None, "is blank")


def _side(text: str) -> tuple[str | None, str]:
    word = re.sub(r"^(?:(?:so that it is|to|on|at|in|the)\s+)+|\s+of$", "", text.strip().lower())
    side = _SIDE_WORDS.get(word)
    return side, "" if side else f"(accepted: {', '.join(SIDES)})"


def _count(text: str) -> tuple[int | None, str]:
    word = text.strip().lower()
    count = int(word) if re.fullmatch(r"[0-9]{1,3}", word) else _NUMBERS.get(word, 0)
    return (count, "") if count else (None, "(accepted: a number from 1)")


_READERS = {"text": _text, "old_text": _text, "side": _side, "count": _count}
