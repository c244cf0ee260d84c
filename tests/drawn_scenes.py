"""Pictures drawn by code, of which everything is known: what stands where, and what an edit of it
should give.

Two styles: `drawn`, flat shapes on a gradient or a texture, and `photo`, the same shapes with
shading, soft shadows, grain, a lens's blur and JPEG's traces. A scene is drawn again after an edit,
so that a right output, and each kind of wrong one, is exact; then every output is encoded again
with a little noise (`encoded_again`), as an editor's autoencoder would, so that nothing rests on
equal pixels.

    pairs(200)           turns of all nine task types, each with a right and three wrong outputs
    example_sessions()   what editr2/recipes/photos holds, and `python tests/drawn_scenes.py FOLDER`
                         writes
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from editr2.sessions import Session, Turn

TASKS = (
    "subject_add",
    "subject_remove",
    "subject_replace",
    "color_alter",
    "material_alter",
    "text_change",
    "position_change",
    "count_change",
    "background_change",
)
WRONG = ("untouched", "wrong object", "ruined background")
"""Of every pair, beside `right`: the source again; the edit, of another object; the right edit with
everything around it spoilt (of a change of the background, with the objects spoilt)."""

COLOURS = {
    "red": (205, 38, 38),
    "green": (40, 150, 60),
    "blue": (35, 80, 205),
    "yellow": (240, 208, 40),
    "orange": (240, 132, 28),
    "purple": (128, 50, 160),
    "pink": (240, 130, 175),
    "white": (240, 240, 238),
    "black": (32, 32, 36),
    "brown": (122, 74, 40),
}
MATERIALS = {
    "gold": (218, 172, 52),
    "wood": (150, 98, 52),
    "stone": (138, 136, 132),
    "copper": (190, 108, 62),
}
BACKGROUNDS = ("meadow", "beach", "brick wall", "night sky", "desert", "snow", "wooden table")
KINDS = ("ball", "cup", "car", "house", "tree", "star", "book", "lamp")
TEXTS = ("OPEN", "SALE", "CAFE", "EXIT", "MILK", "HOTEL", "BOOKS", "BREAD", "PARK", "TAXI")
SIZES = ((256, 256), (384, 384), (512, 512), (320, 448), (448, 320))  # height, width

Fractions = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One object. name: as an instruction calls it. at: the middle, and size: of its square, in
    fractions of the image's width and height."""

    kind: str
    colour: str
    at: tuple[float, float]
    size: float = 0.2
    text: str = ""
    material: str = ""

    @property
    def name(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Scene:
    """What is to be drawn. seed: of the grain and the texture, which an edit leaves as they are."""

    size: tuple[int, int]
    style: str
    background: str
    things: tuple[Thing, ...]
    seed: int = 0

    def without(self, thing: Thing) -> Scene:
        return replace(self, things=tuple(one for one in self.things if one is not thing))

    def changed(self, thing: Thing, **fields: Any) -> Scene:
        things = tuple(replace(one, **fields) if one is thing else one for one in self.things)
        return replace(self, things=things)

    def plus(self, *things: Thing) -> Scene:
        return replace(self, things=(*self.things, *things))


class Output(NamedTuple):
    """An image, and where its objects are: name -> boxes (x0, y0, x1, y1) in [0, 1]."""

    image: np.ndarray
    boxes: dict[str, list[Fractions]]


@dataclass(frozen=True)
class Pair:
    """A session of one turn and its outputs: `right`, and each of `WRONG`. boxes: of the source."""

    session: Session
    task: str
    style: str
    outputs: Mapping[str, Output] = field(repr=False)
    boxes: dict[str, list[Fractions]] = field(repr=False, default_factory=dict)


# ------------------------------------------------------------------------------------------ drawing


def _noise(rng: np.random.Generator, height: int, width: int, grain: int) -> np.ndarray:
    """Smooth noise in [-1, 1] whose blobs are about `grain` pixels wide."""
    small = rng.uniform(-1, 1, (height // grain + 2, width // grain + 2)).astype(np.float32)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _background(scene: Scene) -> np.ndarray:
    """float32 [H, W, 3] in [0, 255]."""
    height, width = scene.size
    rng = np.random.default_rng([scene.seed, len(scene.background), ord(scene.background[0])])
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    blobs = _noise(rng, height, width, max(4, height // 12))[..., None]
    grain = _noise(rng, height, width, max(2, height // 90))[..., None]

    def between(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
        return np.array(top, np.float32) * (1 - y) + np.array(bottom, np.float32) * y + 0 * x

    if scene.background == "brick wall":
        rows, columns = y * 12, x * 8 + 0.5 * (np.floor(y * 12) % 2)
        mortar = (rows % 1 < 0.1) | (columns % 1 < 0.06)
        tone = np.sin(np.floor(rows) * 12.9 + np.floor(columns) * 78.2) * 14
        image = np.where(mortar, np.array((176, 168, 160)), np.array((152, 84, 66)) + tone)
    elif scene.background == "wooden table":
        image = between((168, 128, 88), (132, 96, 62)) + 16 * np.sin(y * 70 + 2 * blobs)
    elif scene.background == "night sky":
        image = between((14, 18, 44), (38, 44, 84)) + 6 * blobs
        stars = rng.random((height, width, 1)) > 0.9985
        image = np.where(stars, np.float32(210), image)
    else:
        sky, ground = {
            "meadow": ((150, 190, 228), (96, 140, 70)),
            "beach": ((120, 184, 220), (222, 200, 152)),
            "desert": ((208, 190, 168), (200, 146, 88)),
            "snow": ((176, 190, 206), (232, 236, 242)),
        }[scene.background]
        edge = np.clip((y - 0.42 - 0.03 * blobs) * 30, 0, 1)
        image = between(sky, tuple(min(255, c + 24) for c in sky)) * (1 - edge)
        image = image + between(tuple(c - 18 for c in ground), ground) * edge + 9 * blobs * edge
    return (image + 5 * grain + 3 * blobs).astype(np.float32)


def _strokes(draw: ImageDraw.ImageDraw, kind: str, s: float, paint: Any, dark: Any, pale: Any):
    """A shape in the square [0, s]²."""

    def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
        return [x0 * s, y0 * s, x1 * s, y1 * s]

    def points(*xy: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * s, y * s) for x, y in xy]

    if kind == "ball":
        draw.ellipse(box(0.1, 0.1, 0.9, 0.9), paint)
        draw.arc(box(0.3, 0.1, 0.7, 0.9), 90, 270, dark, int(s * 0.03))
        draw.ellipse(box(0.28, 0.22, 0.42, 0.34), pale)
    elif kind == "cup":
        draw.ellipse(box(0.6, 0.35, 0.98, 0.72), None, paint, int(s * 0.07))
        draw.polygon(points((0.12, 0.2), (0.75, 0.2), (0.66, 0.9), (0.21, 0.9)), paint)
        draw.ellipse(box(0.12, 0.13, 0.75, 0.27), dark)
    elif kind == "car":
        draw.polygon(points((0.2, 0.5), (0.33, 0.28), (0.68, 0.28), (0.82, 0.5)), paint)
        draw.rounded_rectangle(box(0.02, 0.48, 0.98, 0.74), s * 0.08, paint)
        draw.polygon(points((0.28, 0.48), (0.37, 0.33), (0.49, 0.33), (0.49, 0.48)), pale)
        draw.polygon(points((0.53, 0.33), (0.65, 0.33), (0.74, 0.48), (0.53, 0.48)), pale)
        for x in (0.16, 0.64):
            draw.ellipse(box(x, 0.62, x + 0.2, 0.82), (28, 28, 30, 255))
            draw.ellipse(box(x + 0.06, 0.68, x + 0.14, 0.76), (170, 170, 175, 255))
    elif kind == "house":
        draw.rectangle(box(0.14, 0.45, 0.86, 0.95), paint)
        draw.polygon(points((0.04, 0.47), (0.5, 0.06), (0.96, 0.47)), dark)
        draw.rectangle(box(0.42, 0.65, 0.58, 0.95), dark)
        draw.rectangle(box(0.2, 0.54, 0.36, 0.7), pale)
        draw.rectangle(box(0.64, 0.54, 0.8, 0.7), pale)
    elif kind == "tree":
        draw.rectangle(box(0.43, 0.6, 0.57, 0.96), (104, 72, 46, 255))
        draw.ellipse(box(0.14, 0.3, 0.58, 0.72), paint)
        draw.ellipse(box(0.42, 0.3, 0.86, 0.72), paint)
        draw.ellipse(box(0.24, 0.06, 0.76, 0.56), paint)
        draw.ellipse(box(0.33, 0.34, 0.43, 0.44), dark)
    elif kind == "star":
        turns = [(i * np.pi / 5, 0.47 if i % 2 == 0 else 0.2) for i in range(10)]
        draw.polygon(
            points(*((0.5 + r * np.sin(a), 0.5 - r * np.cos(a)) for a, r in turns)), paint, dark
        )
    elif kind == "book":
        draw.polygon(points((0.1, 0.2), (0.72, 0.1), (0.9, 0.8), (0.28, 0.92)), paint, dark)
        draw.polygon(points((0.28, 0.92), (0.9, 0.8), (0.92, 0.86), (0.3, 0.98)), pale)
        draw.line(points((0.26, 0.36), (0.66, 0.29)), pale, int(s * 0.05))
    elif kind == "lamp":
        draw.polygon(points((0.34, 0.08), (0.66, 0.08), (0.86, 0.46), (0.14, 0.46)), paint)
        draw.rectangle(box(0.47, 0.46, 0.53, 0.86), dark)
        draw.ellipse(box(0.28, 0.82, 0.72, 0.95), dark)
    else:
        raise ValueError(f"kind: {kind!r} (accepted: {', '.join(KINDS)}, sign)")


def _layer(thing: Thing, scene: Scene) -> tuple[Image.Image, tuple[int, int]]:
    """An object as RGBA, drawn at twice the size, and where its corner goes."""
    height, width = scene.size
    side = max(16, round(thing.size * min(height, width)))
    wide = side * (2 if thing.kind == "sign" else 1)
    colour = MATERIALS[thing.material] if thing.material else COLOURS[thing.colour]
    paint = (*colour, 255)
    dark = (*(int(c * 0.55) for c in colour), 255)
    pale = (*(int(c + (255 - c) * 0.72) for c in colour), 255)
    image = Image.new("RGBA", (2 * wide, 2 * side))
    draw = ImageDraw.Draw(image)
    if thing.kind == "sign":
        draw.rounded_rectangle(
            [0, 0, 2 * wide - 1, 2 * side - 1], side * 0.2, paint, dark, side // 9
        )
        ink = (20, 20, 24, 255) if sum(colour) > 380 else (245, 245, 245, 255)
        font = ImageFont.load_default(side * 0.86)
        draw.text((wide, side), thing.text, ink, font, anchor="mm")
    else:
        _strokes(draw, thing.kind, 2 * side, paint, dark, pale)
    image = image.resize((wide, side), Image.Resampling.BOX)
    corner = round(thing.at[0] * width - wide / 2), round(thing.at[1] * height - side / 2)
    if thing.material or scene.style == "photo":
        image = _shaded(image, thing, scene)
    return image, corner


def _shaded(image: Image.Image, thing: Thing, scene: Scene) -> Image.Image:
    rgba = np.asarray(image).astype(np.float32)
    height, width = rgba.shape[:2]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    rng = np.random.default_rng([scene.seed, len(thing.kind), ord(thing.kind[0])])
    light = np.ones((height, width, 1), np.float32)
    if scene.style == "photo":
        light = 1.18 - 0.42 * (0.6 * y + 0.4 * x)
    if thing.material == "wood":
        light = light * (1 + 0.16 * np.sin(22 * y + 5 * np.sin(3 * x)))
    elif thing.material == "stone":
        light = light * (1 + 0.2 * _noise(rng, height, width, 4)[..., None])
    elif thing.material:  # a metal's bands of light
        light = light * (0.9 + 0.35 * np.cos(9 * (x + y)) ** 2)
    rgba[..., :3] = np.clip(rgba[..., :3] * light, 0, 255)
    return Image.fromarray(rgba.round().astype(np.uint8), "RGBA")


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray, dict[str, list[Fractions]]]:
    """The picture, uint8 [H, W, 3]; where its objects are opaque, bool [H, W]; and their boxes."""
    height, width = scene.size
    canvas = Image.fromarray(np.clip(_background(scene), 0, 255).round().astype(np.uint8))
    covered = Image.new("L", (width, height))
    boxes: dict[str, list[Fractions]] = {}
    for thing in scene.things:
        layer, corner = _layer(thing, scene)
        alpha = Image.new("L", (width, height))
        alpha.paste(layer.getchannel("A"), corner)
        if scene.style == "photo":
            shadow = np.roll(np.asarray(alpha), height // 40, 0).astype(np.float32) * 0.45
            soft = Image.fromarray(shadow.astype(np.uint8))
            soft = soft.filter(ImageFilter.GaussianBlur(height / 60))
            canvas.paste((24, 22, 26), (0, 0), soft)
        canvas.paste(layer, corner, layer)
        covered.paste(255, (0, 0), alpha)
        left, top, right, bottom = alpha.point(lambda v: 255 * (v > 127)).getbbox() or (0, 0, 0, 0)
        box = (left / width, top / height, right / width, bottom / height)
        boxes.setdefault(thing.name, []).append(box)
    image = np.asarray(canvas).astype(np.float32)
    if scene.style == "photo":
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        image *= (1 - 0.16 * (x * x + y * y))[..., None]  # a lens's corners
        soft = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(soft.filter(ImageFilter.GaussianBlur(height / 700))).astype(np.float32)
        image += np.random.default_rng(scene.seed).normal(0, 3.0, image.shape)
    picture = np.clip(image, 0, 255).round().astype(np.uint8)
    return picture, np.asarray(covered) > 127, boxes


def encoded_again(image: np.ndarray, seed: int) -> np.ndarray:
    """What is left after an editor's autoencoder, more or less: the tone of the whole moved by up
    to 1 %, fine grain smoothed a little, noise of 2 levels, and JPEG's traces."""
    rng = np.random.default_rng([7, seed])
    picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.5))
    values = np.asarray(picture).astype(np.float32) * rng.uniform(0.99, 1.01, 3)
    values += rng.uniform(-1.5, 1.5, 3) + rng.normal(0, 2.0, image.shape)
    noisy = Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))
    file = io.BytesIO()
    noisy.save(file, "JPEG", quality=int(rng.integers(86, 95)), subsampling=0)
    return np.asarray(Image.open(file).convert("RGB"))


# -------------------------------------------------------------------------------------------- edits


class _Edit(NamedTuple):
    """An instruction about a scene, and the scene as it should be after it; `wrong`: where the same
    was done to another object."""

    instruction: str
    formatted: str
    right: Scene
    wrong: Scene
    unchanged: list[str]


_COLUMNS, _ROWS = (0.2, 0.5, 0.8), (0.32, 0.72)
_CELLS = tuple((x, y) for y in _ROWS for x in _COLUMNS)


def _scene(rng: np.random.Generator, index: int, task: str) -> tuple[Scene, list[int]]:
    """Three or four things, and the cells that are free."""
    style = ("drawn", "photo")[index % 2]
    size = SIZES[int(rng.integers(len(SIZES)))]
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    count = 3
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[:count]]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    cells = [int(cell) for cell in rng.permutation(len(_CELLS))]
    if task == "text_change":
        kinds = ["sign", "sign", kinds[0]]
        cells = [0, 5, *(c for c in cells if c not in (0, 3, 5, 2))]  # signs are wide
        colours[0], colours[1] = "white", "yellow"
    things = []
    for kind, colour, cell in zip(kinds, colours, cells):
        text = TEXTS[int(rng.integers(len(TEXTS)))] if kind == "sign" else ""
        at = tuple(v + float(rng.uniform(-0.02, 0.02)) for v in _CELLS[cell])
        scale = 0.15 if kind == "sign" else float(rng.uniform(0.2, 0.27))
        things.append(Thing(kind, colour, (at[0], at[1]), scale, text))
    return Scene(size, style, background, tuple(things), index), cells[len(things) :]


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _contrasting(rng: np.random.Generator, *taken: str) -> str:
    left = [name for name in COLOURS if name not in taken]
    return left[int(rng.integers(len(left)))]


def _edit(rng: np.random.Generator, task: str, scene: Scene, free: list[int]) -> _Edit:
    target, other, third = scene.things[:3]
    names = [thing.name for thing in scene.things]
    left = [name for name in names if name != target.name]
    if task == "subject_remove":
        return _Edit(
            f"Remove the {target.name}.",
            f"remove [{target.name}]",
            scene.without(target),
            scene.without(other),
            left,
        )
    if task == "subject_replace":
        kind = next(k for k in KINDS if k not in names)
        colour = _contrasting(rng, target.colour, other.colour)
        return _Edit(
            f"Replace the {target.name} with {_a(colour)} {kind}.",
            f"replace [{target.name}] with [{colour} {kind}]",
            scene.changed(target, kind=kind, colour=colour),
            scene.changed(other, kind=kind, colour=colour),
            left,
        )
    if task == "color_alter":
        colour = _contrasting(rng, target.colour, other.colour)
        return _Edit(
            f"Make the {target.name} {colour}.",
            f"change the color of [{target.name}] to [{colour}]",
            scene.changed(target, colour=colour),
            scene.changed(other, colour=colour),
            left,
        )
    if task == "material_alter":
        material = list(MATERIALS)[int(rng.integers(len(MATERIALS)))]
        return _Edit(
            f"Make the {target.name} of {material}.",
            f"change the material of [{target.name}] to [{material}]",
            scene.changed(target, material=material),
            scene.changed(other, material=material),
            left,
        )
    if task == "background_change":
        background = next(
            BACKGROUNDS[i]
            for i in rng.permutation(len(BACKGROUNDS))
            if BACKGROUNDS[i] != scene.background
        )
        return _Edit(
            f"Change the background to a {background}, keep everything else unchanged.",
            f"change the background to [{background}]",
            replace(scene, background=background),
            scene.changed(target, colour=_contrasting(rng, target.colour)),
            names,
        )
    if task == "text_change":
        text = next(TEXTS[i] for i in rng.permutation(len(TEXTS)) if TEXTS[i] not in (target.text,))
        return _Edit(
            f'Replace "{target.text}" on the sign with "{text}".',
            f"replace the text '[{target.text}]' on [sign] with '[{text}]'",
            scene.changed(target, text=text),
            scene.changed(other, text=text),
            [third.name],
        )
    if task == "count_change":
        more = replace(target, at=_CELLS[free[0]])
        return _Edit(
            f"Change the number of {target.name}s to 2.",
            f"change the count of [{target.name}] to [2]",
            scene.plus(more),
            scene.plus(replace(other, at=_CELLS[free[0]])),
            left,
        )
    free_at = [_CELLS[cell] for cell in free]
    options: list[tuple[str, tuple[float, float]]] = []
    for order in permutations(scene.things[:3]):  # until there is a side to go to
        target, other, third = order
        for side, at in product(("left", "right", "above", "below"), free_at):
            already = task == "position_change" and _beside(target.at, side, other.at)
            if _beside(at, side, other.at) and not already:
                options.append((side, at))
        if options:
            break
    reference, left = other, [name for name in names if name != target.name]
    side, at = options[int(rng.integers(len(options)))]
    of = {"left": "to the left of", "right": "to the right of"}.get(side, side)
    if task == "subject_add":
        kind = next(k for k in KINDS if k not in names)
        colour = _contrasting(rng, other.colour)
        new = Thing(kind, colour, at, 0.22)
        wrong_at = [p for p in free_at if not _beside(p, side, reference.at)]
        wrong = scene.changed(third, colour=_contrasting(rng, third.colour))
        if wrong_at and rng.random() < 0.5:
            wrong = scene.plus(replace(new, at=wrong_at[0]))
        return _Edit(
            f"Add {_a(colour)} {kind} {of} the {reference.name}.",
            f"add [{colour} {kind}] {side} [{reference.name}]",
            scene.plus(new),
            wrong,
            names,
        )
    return _Edit(
        f"Move the {target.name} {of} the {reference.name}.",
        f"move [{target.name}] {side} [{reference.name}]",
        scene.changed(target, at=at),
        scene.changed(third, at=at),
        left,
    )


def _beside(at: tuple[float, float], side: str, of: tuple[float, float]) -> bool:
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[side]
    return sign * (at[axis] - of[axis]) > 0.1


def _ruined(image: np.ndarray, keep: np.ndarray, other: np.ndarray, kind: int) -> np.ndarray:
    """Everything but `keep` [H, W] spoilt, in one of several ways."""
    height, width = keep.shape
    soft = Image.fromarray(np.uint8(keep) * 255).filter(ImageFilter.MaxFilter(5))
    weight = (
        np.asarray(soft.filter(ImageFilter.GaussianBlur(2))).astype(np.float32)[..., None] / 255
    )
    values = image.astype(np.float32)
    if kind == 0:
        bad = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(height / 40)))
    elif kind == 1:
        bad = values[..., [1, 2, 0]]
    elif kind == 2:
        bad = other
    elif kind == 3:
        bad = values + 60 * _noise(np.random.default_rng(kind), height, width, 3)[..., None]
    elif kind == 4:
        bad = values * 0.45
    elif kind == 5:
        bad = np.roll(image, (height // 8, width // 6), (0, 1))
    else:
        bad = 255 - values
    mixed = values * weight + np.asarray(bad, np.float32) * (1 - weight)
    return np.clip(mixed, 0, 255).round().astype(np.uint8)


def pair(index: int) -> Pair:
    """Pair number `index`; task and style go round."""
    task = TASKS[index % len(TASKS)]
    rng = np.random.default_rng([16, index])
    scene, free = _scene(rng, index // len(TASKS), task)
    edit = _edit(rng, task, scene, free)
    source, objects, boxes = render(scene)
    right, objects_after, boxes_after = render(edit.right)
    wrong, _, boxes_wrong = render(edit.wrong)
    other_scene = replace(edit.right, background=_another(edit.right.background), seed=index + 999)
    other, _, _ = render(other_scene)
    if task == "background_change":
        keep = ~np.asarray(
            Image.fromarray(np.uint8(objects) * 255).filter(ImageFilter.MaxFilter(7))
        ).astype(bool)
        blank, _, _ = render(replace(edit.right, things=()))
        ruined = _ruined(right, keep, blank, (0, 1, 2, 3, 6)[index // len(TASKS) % 5])
    else:
        moved = np.abs(right.astype(int) - source).max(-1) > 24
        ruined = _ruined(right, moved & (objects | objects_after), other, index // len(TASKS) % 7)
    images = {"right": right, "untouched": source, "wrong object": wrong}
    images["ruined background"] = ruined
    where = {"right": boxes_after, "untouched": boxes, "wrong object": boxes_wrong}
    where["ruined background"] = boxes_after
    meta = {
        "formatted_instruction": edit.formatted,
        "bg_consistency": task != "background_change",
        "unchanged_objects": edit.unchanged,
        "available_objects": [thing.name for thing in scene.things],
        "all_objects": sorted({t.name for t in (*scene.things, *edit.right.things)}),
        "boxes": {name: list(found[0]) for name, found in boxes.items()},
    }
    session = Session(f"pair-{index:03d}", source, (Turn(edit.instruction, task=task, meta=meta),))
    outputs = {
        kind: Output(encoded_again(image, 10 * index + n), where[kind])
        for n, (kind, image) in enumerate(images.items())
    }
    return Pair(session, task, scene.style, outputs, boxes)


def _another(background: str) -> str:
    return BACKGROUNDS[(BACKGROUNDS.index(background) + 3) % len(BACKGROUNDS)]


def pairs(count: int = 200, first: int = 0) -> list[Pair]:
    """first: `pixels` was made while looking at the first 200."""
    return [pair(index) for index in range(first, first + count)]


# ---------------------------------------------------------------------------------------- examples

_EXAMPLE_TASKS = (  # what is removed comes last: every edit needs three things
    ("color_alter", "subject_replace", "subject_remove"),
    ("subject_add", "color_alter", "background_change"),
    ("text_change", "color_alter", "subject_add"),
    ("position_change", "material_alter", "subject_remove"),
    ("subject_replace", "subject_add", "color_alter"),
    ("material_alter", "position_change", "color_alter"),
    ("background_change", "color_alter", "subject_remove"),
    ("subject_add", "subject_replace", "subject_remove"),
)
_EXAMPLE_SIZES = (256, 320, 384, 512, 256, 320, 384, 256)
# Square, so that a policy of any square resolution sees all of them, and `boxes` hold.


def example_sessions() -> list[tuple[Session, list[Output]]]:
    """Sessions of three turns, each with its right outputs (not encoded again)."""
    made = []
    for index, tasks in enumerate(_EXAMPLE_TASKS):
        rng = np.random.default_rng([61, index])
        first = "text_change" if "text_change" in tasks else tasks[0]
        scene, free = _scene(rng, 2 * index + 1, first)
        size = _EXAMPLE_SIZES[index]
        scene = replace(scene, size=(size, size))
        source = render(scene)[0]
        turns, outputs = [], []
        for turn, task in enumerate(tasks):
            if turn and task != "text_change":  # another object than in the turn before
                scene = replace(scene, things=(*scene.things[1:], scene.things[0]))
                while scene.things[0].kind == "sign":
                    scene = replace(scene, things=(*scene.things[1:], scene.things[0]))
            boxes = render(scene)[2]
            edit = _edit(rng, task, scene, free)
            taken = {thing.at for thing in edit.right.things}
            meta = {
                "formatted_instruction": edit.formatted,
                "bg_consistency": task != "background_change",
                "unchanged_objects": edit.unchanged,
                "available_objects": [thing.name for thing in scene.things],
                "all_objects": sorted({t.name for t in (*scene.things, *edit.right.things)}),
                "boxes": {name: [round(v, 4) for v in found[0]] for name, found in boxes.items()},
            }
            turns.append(Turn(edit.instruction, task=task, meta=meta))
            scene = edit.right
            free = [cell for cell in free if _CELLS[cell] not in taken]
            image, _, after = render(scene)
            outputs.append(Output(image, after))
        made.append((Session(f"photo-{index + 1}", source, tuple(turns)), outputs))
    return made


def write_examples(folder: Path) -> None:
    """`example_sessions` as a set: sessions.jsonl, and JPEG files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for session, _ in example_sessions():
        name = f"images/{session.id}.jpg"
        Image.fromarray(session.image).save(folder / name, quality=90)
        turns = [
            {"instruction": t.instruction, "task": t.task, "meta": t.meta} for t in session.turns
        ]
        lines.append(json.dumps({"id": session.id, "image": name, "turns": turns}) + "\n")
    (folder / "sessions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
