"""`annotations.html`: what was annotated, with the images, to be corrected in a browser. One file
that fetches nothing; its button writes `corrections.jsonl` (`corrections` has the form)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from editr2.annotate.annotate import NOT_FOUND, things_of
from editr2.annotate.fields import FIELDS, LACKING, LISTS, OBJECTS, ORIGINS, lacking, value_of
from editr2.annotate.forms import FORMS
from editr2.errors import DataError
from editr2.rewards.geometry import TASKS
from editr2.sessions import Session, Turn

NAME = "annotations.html"

SIDE = 512
"""Pixels of the longer side of an image on the page."""

SMALL = 96
"""An image of a small world is shown in whole screen pixels."""

LABELS = {
    "unchanged_objects": "Unchanged since the source",
    "available_objects": "There after this turn",
    "all_objects": "All names so far",
}


@dataclass(frozen=True)
class Field:
    """One of a turn's. value: as the page edits it. origin: where it is from; lacks: why there is
    none."""

    value: Any
    origin: str
    lacks: str


@dataclass(frozen=True)
class TurnView:
    number: int
    instruction: str
    fields: dict[str, Field]
    not_found: Sequence[str]

    @property
    def rows(self) -> int:
        """Lines that its lists are shown in."""
        longest = max(self.fields[name].value.count("\n") + 1 for name in LISTS)
        return min(max(longest, 3), 14)


@dataclass(frozen=True)
class SessionView:
    id: str
    mode: str | None
    picture: str
    pixelated: bool
    size: tuple[int, int]
    objects: Sequence[dict[str, Any]]
    origin: str
    not_found: Sequence[str]
    turns: Sequence[TurnView]
    lacks: bool


def write_page(sessions: Sequence[Session], folder: Path) -> Path:
    """Returns its path. Raises `DataError` where it cannot be written."""
    here = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [_session(session) for session in sessions]
    forms = {
        task: [form.replace("[{", "[").replace("}]", "]").replace("_", " ") for form in of_task]
        for task, of_task in FORMS.items()
    }
    text = environment.get_template("annotations.html.j2").render(
        sessions=views,
        whole=sum(not view.lacks for view in views),
        tasks=TASKS,
        lists=LISTS,
        labels=LABELS,
        forms=forms,
    )
    path = folder / NAME
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _session(session: Session) -> SessionView:
    source, pixelated = _picture(session.image)
    height, width = session.image.shape[:2]
    things = things_of(session) or []
    origins = session.meta.get(ORIGINS, {})
    return SessionView(
        id=session.id,
        mode=session.mode,
        picture=source,
        pixelated=pixelated,
        size=(width, height),
        objects=[
            {"name": thing.name, "foreground": thing.foreground, "seen": thing.seen}
            for thing in things
        ],
        origin=origins.get(OBJECTS, ""),
        not_found=session.meta.get(NOT_FOUND, ()),
        turns=[_turn(number, turn) for number, turn in enumerate(session.turns, 1)],
        lacks=any(lacking(turn) for turn in session.turns),
    )


def _turn(number: int, turn: Turn) -> TurnView:
    origins = turn.meta.get(ORIGINS, {})
    fields = {}
    for name in FIELDS:
        origin = str(origins.get(name, ""))
        lacks = origin.removeprefix(LACKING) if origin.startswith(LACKING) else ""
        value = value_of(turn, name)
        if name in LISTS:
            good = isinstance(value, list | tuple)
            value = "\n".join(str(one) for one in value) if good else ""
        elif name == "bg_consistency":
            value = str(value).lower() if isinstance(value, bool) else ""
        fields[name] = Field(value or "", "" if lacks else origin, lacks)
    return TurnView(number, turn.instruction, fields, turn.meta.get(NOT_FOUND, ()))


def _picture(pixels: np.ndarray) -> tuple[str, bool]:
    """A data URI, and whether it is of a few large pixels."""
    image, into = Image.fromarray(pixels), io.BytesIO()
    small = max(image.size) <= SMALL
    if small:
        image.save(into, "PNG")
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(into, "JPEG", quality=85)
    text = base64.b64encode(into.getvalue()).decode("ascii")
    return f"data:image/{'png' if small else 'jpeg'};base64,{text}", small
