"""Comparisons that somebody labelled: outputs of one instruction, and which of two is better."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from editr2.errors import DataError, shown
from editr2.sessions import Session, Turn
from editr2.sessions.images import ImageFile, Pixels, locate


@dataclass(frozen=True)
class Picture:
    """An image that stays where it is stored. pixels: decodes it, uint8 [H, W, 3]; raises DataError
    with the line and field that name it. stamp: tells it from another image."""

    pixels: Callable[[], Pixels]
    stamp: str


@dataclass(frozen=True)
class Output:
    """What the reward is asked about: an output of a session of one turn.

    name: unique in the set. source: the stamp of the session's image. stretched: an output of
    another size than its source is brought to that; else it is shown to the reward as it is.
    """

    name: str
    session: Session
    picture: Picture
    source: str
    stretched: bool = False

    def read(self) -> np.ndarray:
        """uint8 [1, H, W, 3]. Raises DataError."""
        pixels = self.picture.pixels()
        if self.stretched and pixels.shape != (shape := self.session.image.shape):
            resized = Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
            pixels = np.array(resized)
        return pixels[None]


@dataclass(frozen=True)
class Pair:
    """Of the outputs' names. tie: people called them equal; else `better` is the better one."""

    better: str
    worse: str
    tie: bool = False


@dataclass(frozen=True)
class Comparison:
    """The pairs of one record: one, or all of n outputs that were ranked.

    groups: what it belongs to, by kind, such as {"task": "color_alter", "dimension": "overall"}.
    cluster: its source; comparisons of one are not independent. margin: of a pair, where the set
    says by how much.
    """

    id: str
    pairs: tuple[Pair, ...]
    cluster: str
    groups: Mapping[str, str] = field(default_factory=dict)
    margin: float | None = None


@dataclass
class Labelled:
    """A set. outputs: by name, in the order of the set. left_out: records that say nothing, by
    reason."""

    outputs: dict[str, Output] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, name: str, turn: Turn, before: Picture, after: Picture) -> str:
        """Of an output, which may be there already; returns its name. before: of its source. Raises
        DataError, from `where`, where the one that is there is another."""
        output = Output(name, Session(name, before.pixels, (turn,)), after, before.stamp)
        known = self.outputs.setdefault(name, output)
        if _told(known) != _told(output):
            raise DataError(
                f"{where}: {shown(repr(name))} has another image or instruction than before "
                f"(accepted: a name for each output)"
            )
        return name

    def resized(self, stretched: bool) -> Labelled:
        """With outputs stretched to their sources, or as they are."""
        outputs = {n: replace(o, stretched=stretched) for n, o in self.outputs.items()}
        return replace(self, outputs=outputs)

    def first(self, count: int | None) -> Labelled:
        """The first comparisons alone, with their outputs."""
        if count is None:
            return self
        some = self.comparisons[:count]
        names = {name for one in some for pair in one.pairs for name in (pair.better, pair.worse)}
        return replace(
            self, outputs={n: o for n, o in self.outputs.items() if n in names}, comparisons=some
        )

    def digest(self, *more: str) -> str:
        """Of everything that answers depend on, and of `more`; files by name, size and time."""
        digest = hashlib.sha256()
        for part in (*more, *(repr(_told(output)) for output in self.outputs.values())):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def _told(output: Output) -> tuple[object, ...]:
    (turn,) = output.session.turns
    said = (output.name, turn.instruction, turn.task, sorted(turn.meta.items()), output.stretched)
    return (*said, output.source, output.picture.stamp)


def file_picture(
    folder: Path, where: str, field: str, name: object, images: Path | None
) -> Picture:
    """The image that a field of a record names: relative to `images` where the user gave such a
    folder, else to the record's own. Raises DataError."""
    at = f"{where}: {field}"
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{at}: {shown(repr(name))} (accepted: the path of an image)")
    try:
        path = locate(folder if images is None else images, name, contained=True)
    except DataError as error:
        raise DataError(f"{at}: {error}") from error
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{at}: {shown(path)}: no such file (accepted: an image there, or --sources FOLDER)"
        ) from error
    stamp = f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"
    return Picture(ImageFile(path, where=at), stamp)


def numbers_of(clusters: Sequence[str]) -> np.ndarray:
    """Equal names to equal numbers from 0, int [n]."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in clusters], dtype=np.int64)
