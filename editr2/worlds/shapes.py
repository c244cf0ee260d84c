"""The shapes world: procedural multi-turn editing sessions with verifiers that parse the pixels.

A scene is a 3 x 3 grid of 8 x 8-pixel cells on one of three backgrounds; a cell is empty or holds
one of three
shapes in one of six colours. Instructions are sentences of at most eight words from a fixed
vocabulary:

    add a [colour] <shape> <row> <column>  [always use <colour>]
    remove the <shape> <row> <column>            | remove it
    paint the <shape> <row> <column> [<colour>]  | paint it <colour>
    move the <shape> <row> <column> to <row> <column> | move it to <row> <column>
    set the background <background>

`always use <colour>` is a *standing rule* (mode `cm`): from then on an `add` or `paint` without a
colour means that colour. `it` is a *pronoun* (mode `cu`): the object of the latest edit. The
meaning of a session follows from its source image and its raw instructions alone, so sessions read
from a user's own file are verified exactly as generated ones.

Tolerance: any two cell templates differ by at least `MIN_TEMPLATE_DISTANCE` root-mean-square colour
(0.25 of the range), and a cell counts only within `TOLERANCE` = 0.12 of its template. A blend of
two templates is at least 0.125 from one of them, so no blur can pass for both, and a half-way blend
passes for neither.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from editr2.errors import DataError
from editr2.sessions import Session, Turn

VERSION = 1
"""Of the sessions and the verifiers: raised whenever either gives anything else than before (a test
holds sums), so that no run goes on in another world than it began in."""

TOLD = {"principles": "editr2.verifier.world:with_principles"}
"""What can be told of a session's turns beside what every one of them carries, by the key in their
`meta`: the address of a function of a session that returns it with that."""

GRID = 3
CELL = 8
SIZE = GRID * CELL
TOLERANCE = 0.12
MIN_TEMPLATE_DISTANCE = 0.25

SHAPES = ("square", "ring", "cross")
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "purple": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
VERBS = ("add", "remove", "paint", "move", "set")
PARTICLES = ("a", "the", "to", "it", "is", "always", "use", "background")
WORDS = (*VERBS, *PARTICLES, *SHAPES, *COLOUR_NAMES, *BACKGROUND_NAMES, *ROWS, *COLUMNS)
"""The vocabulary; its order is that of the shipped weights' embeddings."""
HELDOUT_MODULUS = 8  # one source scene in eight belongs to the held-out split

Object = tuple[str, str]  # (shape, colour)


@dataclass(frozen=True)
class Scene:
    """A background and nine cells in row-major order."""

    background: str
    cells: tuple[Object | None, ...]

    def put(self, cell: int, content: Object | None) -> Scene:
        return replace(self, cells=(*self.cells[:cell], content, *self.cells[cell + 1 :]))

    def occupied(self) -> list[int]:
        return [i for i, content in enumerate(self.cells) if content is not None]

    def free(self) -> list[int]:
        return [i for i, content in enumerate(self.cells) if content is None]

    def object(self, cell: int) -> Object:
        """What stands in an occupied cell."""
        content = self.cells[cell]
        assert content is not None
        return content

    @property
    def heldout(self) -> bool:
        """Whether sessions that start from this scene belong to the held-out split (a function of
        the scene alone)."""
        return zlib.crc32(repr((self.background, self.cells)).encode()) % HELDOUT_MODULUS == 0


@dataclass(frozen=True)
class Op:
    """One parsed instruction. `cell` is None when the object is named by the pronoun."""

    kind: str  # add | remove | paint | move | background
    shape: str | None = None
    colour: str | None = None
    cell: int | None = None
    target: int | None = None
    background: str | None = None
    rule: str | None = None

    def text(self) -> str:
        if self.kind == "background":
            return f"set the background {self.background}"
        if self.kind == "add":
            assert self.cell is not None
            words = [
                "add a",
                *([self.colour] if self.colour else []),
                str(self.shape),
                position(self.cell),
            ]
            return " ".join(words + ([f"always use {self.rule}"] if self.rule else []))
        thing = "it" if self.cell is None else f"the {self.shape} {position(self.cell)}"
        if self.kind == "move":
            assert self.target is not None
            return f"move {thing} to {position(self.target)}"
        return f"{self.kind} {thing}" + (f" {self.colour}" if self.colour else "")


@dataclass(frozen=True)
class Meaning:
    """What the instructions so far mean: the expected scene, the standing rule, the pronoun's cell,
    touched cells."""

    scene: Scene
    rule: str | None = None
    referent: int | None = None
    touched: frozenset[int] = frozenset()
    background_edited: bool = False


def position(cell: int) -> str:
    return f"{ROWS[cell // GRID]} {COLUMNS[cell % GRID]}"


def parse_instruction(text: str) -> Op:
    """Text to `Op`. Raises `DataError` that names the word where the sentence stops making
    sense."""
    words = text.lower().split()
    at = 0

    def take(choices: Sequence[str], what: str, optional: bool = False) -> str | None:
        nonlocal at
        if at < len(words) and words[at] in choices:
            at += 1
            return words[at - 1]
        if optional:
            return None
        got = repr(words[at]) if at < len(words) else "the end"
        raise DataError(f"instruction {text!r}: expected {what} at word {at + 1}, got {got}")

    def take_position() -> int:
        row = take(ROWS, f"a row ({', '.join(ROWS)})")
        column = take(COLUMNS, f"a column ({', '.join(COLUMNS)})")
        return ROWS.index(str(row)) * GRID + COLUMNS.index(str(column))

    def take_object() -> tuple[str | None, int | None]:
        if take(("it",), "'it'", optional=True):
            return None, None
        take(("the",), "'it' or 'the'")
        return take(SHAPES, f"a shape ({', '.join(SHAPES)})"), take_position()

    colours = f"a colour ({', '.join(COLOUR_NAMES)})"
    kind = take(VERBS, "add, remove, paint, move or set")
    if kind == "add":
        take(("a",), "'a'")
        colour = take(COLOUR_NAMES, colours, optional=True)
        shape = take(SHAPES, f"a shape ({', '.join(SHAPES)})")
        cell = take_position()
        rule = None
        if take(("always",), "'always'", optional=True):
            take(("use",), "'use'")
            rule = take(COLOUR_NAMES, colours)
        op = Op("add", shape, colour, cell, rule=rule)
    elif kind == "set":
        take(("the",), "'the'")
        take(("background",), "'background'")
        op = Op(
            "background",
            background=take(BACKGROUND_NAMES, f"a background ({', '.join(BACKGROUND_NAMES)})"),
        )
    else:
        shape, where = take_object()
        if kind == "move":
            take(("to",), "'to'")
            op = Op("move", shape, None, where, take_position())
        else:
            colour = (
                take(COLOUR_NAMES, colours, optional=where is not None) if kind == "paint" else None
            )
            op = Op(str(kind), shape, colour, where)
    if at != len(words):
        raise DataError(f"instruction {text!r}: unexpected word {words[at]!r} at word {at + 1}")
    return op


def resolve(state: Meaning, op: Op) -> Op:
    """The self-contained form of `op` (the ground-truth intent): pronoun and standing rule filled
    in.

    Raises `DataError` when the instruction has no meaning here (no referent, empty or occupied
    cell, no colour).
    """
    text = op.text()
    rule = op.rule or state.rule
    if op.kind == "background":
        return op
    if op.kind == "add":
        assert op.cell is not None
        if state.scene.cells[op.cell] is not None:
            raise DataError(f"instruction {text!r}: the cell {position(op.cell)} is not empty")
        if op.colour is None and rule is None:
            raise DataError(f"instruction {text!r}: no colour given and no standing rule before it")
        return replace(op, colour=op.colour or rule, rule=None)
    cell = op.cell if op.cell is not None else state.referent
    if cell is None:
        raise DataError(f"instruction {text!r}: 'it' refers to nothing yet")
    content = state.scene.cells[cell]
    if content is None or (op.shape is not None and content[0] != op.shape):
        raise DataError(
            f"instruction {text!r}: there is no {op.shape or 'object'} {position(cell)}"
        )
    if op.kind == "paint" and op.colour is None and rule is None:
        raise DataError(f"instruction {text!r}: no colour given and no standing rule before it")
    if op.kind == "move" and (op.target is None or state.scene.cells[op.target] is not None):
        raise DataError(f"instruction {text!r}: the target cell is not empty")
    colour = (op.colour or rule) if op.kind == "paint" else None
    return replace(op, shape=content[0], colour=colour, cell=cell)


def execute(state: Meaning, op: Op) -> Meaning:
    """The state after `op`. Raises `DataError` as `resolve`."""
    full = resolve(state, op)
    scene, referent, touched = state.scene, state.referent, state.touched
    if full.kind == "background":
        scene = replace(scene, background=str(full.background))
        return replace(state, scene=scene, background_edited=True)
    assert full.cell is not None
    content = scene.cells[full.cell]
    if full.kind == "add":
        scene, referent = scene.put(full.cell, (str(full.shape), str(full.colour))), full.cell
    elif full.kind == "remove":
        scene, referent = scene.put(full.cell, None), None
    elif full.kind == "paint":
        scene, referent = scene.put(full.cell, (str(full.shape), str(full.colour))), full.cell
    else:
        assert full.target is not None
        scene, referent = scene.put(full.cell, None).put(full.target, content), full.target
        touched = touched | {full.target}
    return replace(
        state,
        scene=scene,
        rule=op.rule or state.rule,
        referent=referent,
        touched=touched | {full.cell},
    )


def reasoning(state: Meaning, op: Op) -> str:
    """The short ground-truth thought that leads from the raw instruction to the intent; empty when
    none is needed."""
    if op.kind not in ("add", "background") and op.cell is None:
        full = resolve(state, op)
        assert full.cell is not None
        return f"it is the {full.shape} {position(full.cell)}"
    if op.kind in ("add", "paint") and op.colour is None:
        return f"always use {op.rule or state.rule}"
    return ""


# ------------------------------------------------------------------------------------------- pixels


def _mask(shape: str) -> np.ndarray:
    mask = np.zeros((CELL, CELL), bool)
    if shape == "square":
        mask[1:7, 1:7] = True
    elif shape == "ring":
        mask[1:7, 1:7] = True
        mask[2:6, 2:6] = False
    else:
        mask[1:7, 3:5] = True
        mask[3:5, 1:7] = True
    return mask


def _cell_pixels(background: str, content: Object | None) -> np.ndarray:
    pixels = np.broadcast_to(np.array(BACKGROUNDS[background]), (CELL, CELL, 3)).copy()
    if content is not None:
        pixels[_mask(content[0])] = COLOURS[content[1]]
    return pixels


CONTENTS: tuple[Object | None, ...] = (None, *((s, c) for s in SHAPES for c in COLOURS))
UNKNOWN = -1  # a cell within the tolerance of no template


@functools.cache
def templates() -> np.ndarray:
    """All cell templates, float64 [backgrounds * contents, CELL * CELL * 3] in [0, 1],
    background-major."""
    return np.stack([_cell_pixels(b, c).reshape(-1) for b in BACKGROUNDS for c in CONTENTS])


@functools.cache
def _uint8_cells() -> dict[tuple[str, Object | None], np.ndarray]:
    return {
        (b, c): np.round(_cell_pixels(b, c) * 255).astype(np.uint8)
        for b in BACKGROUNDS
        for c in CONTENTS
    }


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 [24, 24, 3]."""
    cells = _uint8_cells()
    rows = [
        np.concatenate(
            [cells[scene.background, scene.cells[r * GRID + c]] for c in range(GRID)], axis=1
        )
        for r in range(GRID)
    ]
    return np.concatenate(rows, axis=0)


def parse_cells(images: np.ndarray) -> np.ndarray:
    """Template index of every cell, or `UNKNOWN`.

    images: uint8 [n, 24, 24, 3] -> int64 [n, 9], index = background * len(CONTENTS) + content. A
    cell counts only when its RMS colour distance to the nearest template is at most `TOLERANCE`
    (colours in [0, 1]).
    """
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise DataError(f"images: expected [n, {SIZE}, {SIZE}, 3], got {list(images.shape)}")
    n = images.shape[0]
    x = images.astype(np.float64) / 255
    cells = (
        x.reshape(n, GRID, CELL, GRID, CELL, 3)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n * GRID * GRID, -1)
    )
    known = templates()
    distance = (cells**2).sum(1)[:, None] - 2 * cells @ known.T + (known**2).sum(1)[None]
    best = distance.argmin(1)
    rms = np.sqrt(np.maximum(distance[np.arange(len(best)), best], 0) / cells.shape[1])
    return np.where(rms <= TOLERANCE, best, UNKNOWN).reshape(n, GRID * GRID)


def cell_indices(scene: Scene) -> np.ndarray:
    """The template indices that a perfect image of `scene` parses to, int64 [9]."""
    base = BACKGROUND_NAMES.index(scene.background) * len(CONTENTS)
    return np.array([base + CONTENTS.index(content) for content in scene.cells])


def parse_scene(image: np.ndarray) -> Scene:
    """The scene shown by a clean image; raises `DataError` when it is not one (naming the cell)."""
    cells = parse_cells(image[None])[0]
    for i, index in enumerate(cells):
        if index == UNKNOWN:
            raise DataError(
                f"image: cell {position(i)} shows no shape of the world within RMS {TOLERANCE}"
            )
    backgrounds = set(cells // len(CONTENTS))
    if len(backgrounds) != 1:
        raise DataError("image: cells differ in background")
    return Scene(
        BACKGROUND_NAMES[backgrounds.pop()], tuple(CONTENTS[i % len(CONTENTS)] for i in cells)
    )


# ---------------------------------------------------------------------------------------- verifying


def meanings(image: np.ndarray, instructions: Sequence[str]) -> list[Meaning]:
    """Expected states before turn 1 and after every turn, from the source image and the raw
    instructions alone."""
    result = [Meaning(parse_scene(image))]
    for text in instructions:
        result.append(execute(result[-1], parse_instruction(text)))
    return result


def verify(source: np.ndarray, instructions: Sequence[str], images: np.ndarray) -> np.ndarray:
    """IF, CC and GA of every turn, float64 [T, 3] in [0, 1].

    source: uint8 [24, 24, 3]; images: uint8 [T, 24, 24, 3], the editor's output of every turn.

    IF_t  fraction of the cells that instruction t changes (all nine for a background edit) that
          look as it asks.
    CC_t  fraction of the cells that no instruction up to t has named that still show what the
          source showed; after a background edit only their objects count, on any background (1
          when there is nothing left to compare).
    GA_t  1 if the whole image is right after *every* turn up to t, standing rules and pronouns
          included, else 0.
    """
    expected = meanings(source, instructions)
    seen = parse_cells(images)
    scores = np.zeros((len(instructions), 3))
    all_right = True
    for t, (before, after) in enumerate(pairwise(expected)):
        right = seen[t] == cell_indices(after.scene)
        all_right = all_right and bool(right.all())
        op = resolve(before, parse_instruction(instructions[t]))
        scores[t, 0] = np.mean([right[c] for c in _changed_cells(op)])
        kept = _kept(expected[0].scene, after, right, seen[t])
        scores[t, 1] = np.mean(kept) if kept else 1.0
        scores[t, 2] = float(all_right)
    return scores


def _changed_cells(op: Op) -> Sequence[int]:
    """The cells that a resolved instruction changes."""
    if op.kind == "background":
        return range(GRID * GRID)
    return [c for c in (op.cell, op.target) if c is not None]


def _kept(source: Scene, after: Meaning, right: np.ndarray, seen: np.ndarray) -> list[bool]:
    """Of every cell that CC compares after a turn, whether it shows what the source showed.

    right: bool [9], the cells that look as expected; seen: int64 [9], the templates seen.
    """
    untouched = [c for c in range(GRID * GRID) if c not in after.touched]
    if not after.background_edited:
        return [bool(right[c]) for c in untouched]
    # Whether the new background came is IF's question, so only the objects count, on any one. An
    # unknown cell is negative and matches no content.
    content = np.where(seen == UNKNOWN, UNKNOWN, seen % len(CONTENTS))
    things = [c for c in untouched if source.cells[c] is not None]
    return [bool(content[c] == CONTENTS.index(source.cells[c])) for c in things]


# --------------------------------------------------------------------------------------- generation


T = TypeVar("T")


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def random_scene(rng: np.random.Generator, heldout: bool) -> Scene:
    """A scene of two to four objects in the given split."""
    while True:
        cells: list[Object | None] = [None] * (GRID * GRID)
        for cell in rng.permutation(GRID * GRID)[: int(rng.integers(2, 5))]:
            cells[cell] = (_pick(rng, SHAPES), _pick(rng, COLOUR_NAMES))
        scene = Scene(_pick(rng, BACKGROUND_NAMES), tuple(cells))
        if scene.heldout == heldout:
            return scene


def _other_colour(rng: np.random.Generator, colour: str) -> str:
    return _pick(rng, [c for c in COLOUR_NAMES if c != colour])


def random_op(
    rng: np.random.Generator, state: Meaning, mode: str | None, turn: int, last: bool
) -> Op:
    """One instruction that has a meaning in `state`, as mode `mode` says it at this (0-based)
    turn.

    Which numbers are drawn, and in what order, is part of `VERSION`: the same draws in another
    order are other sessions.
    """
    free = state.scene.free()
    # Drawn at every turn, whether the instruction will add anything or not.
    spot = _pick(rng, free) if free else None
    shape = _pick(rng, SHAPES)
    op = None
    if mode == "cm":
        op = _ruled_op(rng, state, turn, spot, shape)
    elif mode == "cu":
        op = _pronoun_op(rng, state, turn, last, spot)
    return op or _explicit_op(rng, state, _kinds(state, mode, turn, last), spot, shape)


def _ruled_op(
    rng: np.random.Generator, state: Meaning, turn: int, spot: int | None, shape: str
) -> Op | None:
    """Mode cm: the first turn states a rule, later ones mostly lean on it by naming no colour.

    spot: a free cell, None where there is none. Returns None where the turn leaves the rule alone.
    """
    if turn == 0 and spot is not None:
        return Op("add", shape, None, spot, rule=_pick(rng, COLOUR_NAMES))
    if not state.rule or rng.random() >= 0.75:
        return None
    # Painting what already has the rule's colour would change nothing.
    paintable = [c for c in state.scene.occupied() if state.scene.object(c)[1] != state.rule]
    if spot is not None and (rng.random() < 0.6 or not paintable):
        return Op("add", shape, None, spot)
    if not paintable:
        return None
    cell = _pick(rng, paintable)
    return Op("paint", state.scene.object(cell)[0], None, cell)


def _pronoun_op(
    rng: np.random.Generator, state: Meaning, turn: int, last: bool, spot: int | None
) -> Op | None:
    """Mode cu: the second turn says `it`, later ones mostly do. None where this one does not.

    Only the last turn may remove it: after that there is nothing that `it` could mean.
    """
    if turn == 0 or state.referent is None:
        return None
    if turn > 1 and rng.random() >= 0.75:
        return None
    kind = _pick(rng, ("paint", "move", "remove") if last else ("paint", "move"))
    if kind == "remove":
        return Op("remove")
    if kind == "move" and spot is not None:
        return Op("move", target=spot)
    return Op("paint", colour=_other_colour(rng, state.scene.object(state.referent)[1]))


def _kinds(state: Meaning, mode: str | None, turn: int, last: bool) -> list[str]:
    """The kinds of explicit instruction that make sense here, each as often as it is to be
    drawn."""
    free, occupied = state.scene.free(), state.scene.occupied()
    leaves_a_referent = mode == "cu" and not last
    weights = {
        # A first turn of mode cu names an object, for the second to call `it`.
        "background": 0 if mode == "cu" and turn == 0 else 1,
        "move": 2 if occupied and free else 0,
        "remove": 2 if len(occupied) > 1 and not leaves_a_referent else 0,
        # An explicit colour would compete with a standing rule, so none is given under one.
        "add": 3 if free and not state.rule else 0,
        "paint": 2 if occupied and not state.rule else 0,
    }
    return [kind for kind, weight in weights.items() for _ in range(weight)]


def _explicit_op(
    rng: np.random.Generator, state: Meaning, kinds: Sequence[str], spot: int | None, shape: str
) -> Op:
    """An instruction of one of `kinds` that says everything itself."""
    scene, kind = state.scene, _pick(rng, kinds)
    if kind == "background":
        others = [name for name in BACKGROUND_NAMES if name != scene.background]
        return Op("background", background=_pick(rng, others))
    if kind == "add":
        return Op("add", shape, _pick(rng, COLOUR_NAMES), spot)
    cell = _pick(rng, scene.occupied())
    shape, colour = scene.object(cell)
    if kind == "paint":
        return Op("paint", shape, _other_colour(rng, colour), cell)
    return Op(kind, shape, cell=cell, target=spot if kind == "move" else None)


def make_session(
    seed: int, index: int, *, split: str = "train", turns: int = 3, mode: str | None = None
) -> Session:
    """Session number `index` of the stream `seed` in `split` ("train" or "heldout"); a pure
    function of its arguments.

    mode: "cm", "cu", "plain", or None for cm and cu by turns. Each turn carries its ground-truth
    `intent` and, in `meta["reasoning"]`, the thought that leads there.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"split: {split!r} (accepted: 'train', 'heldout')")
    if mode not in (None, "cm", "cu", "plain"):
        raise DataError(f"mode: {mode!r} (accepted: 'cm', 'cu', 'plain' or none)")
    mode = mode or ("cm", "cu")[index % 2]
    rng = np.random.default_rng([seed, index, split == "heldout"])
    state = Meaning(random_scene(rng, split == "heldout"))
    image = render(state.scene)
    out = []
    for t in range(turns):
        op = random_op(rng, state, None if mode == "plain" else mode, t, t == turns - 1)
        full = resolve(state, op)
        out.append(Turn(op.text(), full.text(), op.kind, {"reasoning": reasoning(state, op)}))
        state = execute(state, op)
    name = f"{split}-{seed}-{index}-{mode}"
    return Session(name, image, tuple(out), None if mode == "plain" else mode)


def stream(seed: int, *, split: str = "train", turns: int = 3, start: int = 0) -> Iterator[Session]:
    """Endless sessions from number `start` on."""
    index = start
    while True:
        yield make_session(seed, index, split=split, turns=turns)
        index += 1
