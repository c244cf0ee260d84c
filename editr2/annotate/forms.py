"""The one form that each kind of edit is written down in, as `rewards.geometry` reads it back."""

from __future__ import annotations

from collections.abc import Mapping

from editr2.rewards.geometry import Edit

FORMS: Mapping[str, tuple[str, ...]] = {
    "subject_add": ("Add [{new}] on the [{side}] of [{reference}]", "Add [{new}]"),
    "subject_remove": ("Remove [{object}]",),
    "subject_replace": ("Replace [{object}] with [{new}]",),
    "color_alter": ("Change the color of [{object}] to [{colour}]",),
    "material_alter": ("Change the material of [{object}] to [{material}]",),
    "text_change": (
        "Replace the text '[{old_text}]' on [{object}] with '[{text}]'",
        "Add the text '[{text}]'",
    ),
    "position_change": ("Change the position of [{object}] to [{side}] of [{reference}]",),
    "count_change": ("Change the count of [{object}] to [{count}]",),
    "background_change": ("Change the background to [{background}]",),
}
"""By task; of several, the first whose fields an edit has."""


def formatted(edit: Edit) -> str:
    """An edit in its form. (What a change of the background keeps, the instruction alone says.)"""
    fields = {name: value for name, value in vars(edit).items() if value is not None}
    for form in FORMS[edit.task]:
        try:
            return form.format_map(fields)
        except KeyError:
            continue
    raise ValueError(f"{edit}: fields are missing (accepted: those of {FORMS[edit.task]})")


def listed() -> str:
    """For a prompt: every task with its forms, where a field's name stands for it."""
    lines = []
    for task, forms in FORMS.items():
        shown = (form.replace("[{", "[").replace("}]", "]").replace("_", " ") for form in forms)
        lines.append(f"{task}: {' | '.join(shown)}")
    return "\n".join(lines)
