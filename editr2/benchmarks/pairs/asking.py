"""A set of labelled comparisons as questions for people (`editr2 label`), who do not see its labels
but are held against them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from editr2.benchmarks.pairs.labelled import Comparison, Labelled, Picture
from editr2.files import in_place_of
from editr2.label.questions import QUESTIONS, Answer, Question, write_questions

IMAGES = "images"


def write_asked(labelled: Labelled, out: Path) -> Path:
    """A question a comparison, and its images as PNG beside them. Returns the file. Raises
    DataError for an image that cannot be read."""
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    file = out / QUESTIONS
    write_questions(file, [_question(one, labelled, out) for one in labelled.comparisons])
    return file


def _question(one: Comparison, labelled: Labelled, out: Path) -> Question:
    names = tuple(dict.fromkeys(name for p in one.pairs for name in (p.better, p.worse)))
    outputs = [labelled.outputs[name] for name in names]
    session = outputs[0].session
    (turn,) = session.turns
    before = Picture(lambda: session.image, outputs[0].source)
    image, *files = (_saved(p, out) for p in (before, *(output.picture for output in outputs)))
    principles = turn.meta.get("principles")
    return Question(
        one.id,
        image,
        tuple(files),
        turn.instruction,
        principles=tuple(principles or ()),
        task=turn.task,
        known=_known(one, names),
    )


def _known(one: Comparison, names: tuple[str, ...]) -> Answer | None:
    """The places that the label gives; None where it does not say all of them."""
    beaten = {
        name: {p.better for p in one.pairs if p.worse == name and not p.tie} for name in names
    }
    levels = sorted({len(by) for by in beaten.values()})
    places = {name: levels.index(len(by)) for name, by in beaten.items()}
    told = len({frozenset((p.better, p.worse)) for p in one.pairs})
    agrees = all(
        places[p.better] == places[p.worse] if p.tie else places[p.better] < places[p.worse]
        for p in one.pairs
    )
    whole = told == len(names) * (len(names) - 1) // 2
    return tuple(places[name] for name in names) if whole and agrees else None


def _saved(picture: Picture, out: Path) -> Path:
    path = out / IMAGES / f"{hashlib.sha256(picture.stamp.encode()).hexdigest()[:24]}.png"
    if not path.is_file():
        with in_place_of(path) as part:
            Image.fromarray(picture.pixels()).save(part, "PNG")
    return path
