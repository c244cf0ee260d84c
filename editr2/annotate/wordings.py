"""What `editr2 data make` says: edits in words, standing rules, and the values that are drawn."""

from __future__ import annotations

from collections.abc import Mapping

from editr2.rewards.geometry import Edit, singular

NAMED: Mapping[str, tuple[str, ...]] = {
    "subject_add": (
        "Add {a_new} {side_of} the {reference}",
        "Put {a_new} {side_of} the {reference}",
    ),
    "subject_remove": ("Remove the {object}", "Take the {object} out of the picture"),
    "subject_replace": (
        "Replace the {object} with {a_new}",
        "Put {a_new} in place of the {object}",
    ),
    "color_alter": ("Change the color of the {object} to {colour}", "Make the {object} {colour}"),
    "material_alter": (
        "Change the material of the {object} to {material}",
        "Make the {object} look as if it were made of {material}",
    ),
    "text_change": ("Change the text on the {object} from '{old_text}' to '{text}'",),
    "position_change": ("Move the {object} {side_of} the {reference}",),
    "count_change": ("Change the number of {objects} to {count}",),
    "background_change": (
        "Change the background to {background}, and keep {kept} unchanged",
        "Put {background} behind everything as the new background, and keep {kept} unchanged",
    ),
}
"""By task, with names."""

ALONE = ("Add {a_new}", "Put {a_new} somewhere in the picture")
"""Of subject_add without a side."""

POINTING: Mapping[str, tuple[str, ...]] = {
    "subject_add": ("Add {a_new} {side_of} {it}",),
    "subject_remove": ("Remove {it}", "Now take {it} away again"),
    "subject_replace": ("Replace {it} with {a_new}",),
    "color_alter": ("Change {its} color to {colour}", "Now make {it} {colour}"),
    "material_alter": ("Change {its} material to {material}", "Now make {it} out of {material}"),
    "text_change": ("Change the text on {it} from '{old_text}' to '{text}'",),
    "position_change": ("Move {it} {side_of} the {reference}",),
}
"""By task, with a pronoun for what the turn before was about."""

RULES: Mapping[str, tuple[str, ...]] = {
    "colour": (
        "From this request on, everything that you add or change is to be {value}; the color of "
        "all the rest stays.",
        "For this picture one rule holds: a thing that gets added or changed comes out {value}, "
        "and nothing else takes on that color.",
    ),
    "material": (
        "From this request on, everything that you add or change is to be made of {value}; what "
        "all the rest is made of stays.",
        "For this picture one rule holds: a thing that gets added or changed comes out in {value}, "
        "and nothing else does.",
    ),
}
"""A standing rule, in front of the first request."""

SIDE_OF = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MATERIALS = ("wood", "glass", "marble", "copper", "leather", "wool", "paper", "clay", "gold", "ice")
NEW = (
    "bicycle", "lantern", "suitcase", "umbrella", "teapot", "kite", "rocking chair", "guitar",
    "watermelon", "cactus", "birdcage", "globe", "candle", "drum", "pumpkin", "snowman", "ladder",
    "telescope", "accordion", "basket", "toy robot", "vase", "owl", "hedgehog",
)  # fmt: skip
BACKGROUNDS = (
    "a snowy mountain range", "a sandy beach at noon", "a library full of books", "a bamboo forest",
    "a city street at night", "a field of sunflowers", "a desert with dunes", "a harbour at dawn",
    "an empty theatre", "a greenhouse", "a brick courtyard", "a starry sky",
)  # fmt: skip
TEXTS = ("HELLO", "OPEN LATE", "NORTH 7", "FRESH BREAD", "SUMMER", "ROOM 12", "THANK YOU", "LUNA")


def with_article(name: str) -> str:
    return f"{'an' if name[:1].casefold() in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str | None:
    """Of a name in the singular; None where that is not plain."""
    if name.endswith("s"):
        return None
    ending = "es" if name.endswith(("x", "ch", "sh")) else "s"
    many = f"{name[:-1]}ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else name + ending
    return many if singular(many) == name else None


def in_words(edit: Edit, wording: str, *, many: bool = False) -> str:
    """An edit in a wording. many: the pronouns are of several things."""
    kept = [f"the {name}" for name in edit.kept]
    fields = {name: value for name, value in vars(edit).items() if value is not None}
    fields |= {
        "a_new": with_article(edit.new or ""),
        "side_of": SIDE_OF.get(edit.side or "", ""),
        "objects": plural(edit.object or "") or "",
        "kept": " and ".join([", ".join(kept[:-1]) + ",", kept[-1]]) if kept[1:] else "".join(kept),
        "it": "them" if many else "it",
        "its": "their" if many else "its",
    }
    return wording.format_map(fields)
