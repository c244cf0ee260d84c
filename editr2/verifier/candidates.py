"""Edits of the shapes world to learn from: synthetic ones, right or wrong in a named way, and a
policy's own outputs.

A small policy errs in ways of its own (cells half done, colours near the tolerance), and a verifier
that knows synthetic errors alone judged its outputs with an AUC of 0.79 in a trial; so both are
mixed. Synthetic edits begin at the pixels before, of a policy or exact, and change cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from editr2.config import PolicyConfig, RolloutConfig
from editr2.policies.load import load_policy
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import own_schedule, rollout_sampler
from editr2.sessions import Session
from editr2.verifier.world import MIXED, Request, seen
from editr2.worlds.shapes import (
    BACKGROUND_NAMES,
    CELL,
    COLOUR_NAMES,
    GRID,
    SHAPES,
    Object,
    Scene,
    render,
)

Generator = np.random.Generator


@functools.cache
def _tile(background: str, content: Object | None) -> np.ndarray:
    """uint8 [8, 8, 3], shared: not to be written to."""
    return render(Scene(background, (content,) * GRID**2))[:CELL, :CELL]


def _place(cell: int) -> tuple[slice, slice]:
    row, column = cell // GRID * CELL, cell % GRID * CELL
    return slice(row, row + CELL), slice(column, column + CELL)


class Canvas:
    """A picture that is edited cell by cell. image: uint8 [24, 24, 3]."""

    def __init__(self, image: np.ndarray) -> None:
        self.image, self.there = image.copy(), seen(image)
        known = self.there.background
        self.background = BACKGROUND_NAMES[0] if known == MIXED else known

    def put(self, cell: int, content: Object | None) -> None:
        self.image[_place(cell)] = _tile(self.background, content)

    def content(self, cell: int) -> Object | None:
        """What stands there by the latest look, None where that is nothing or unclear."""
        colour, shape = self.there.cells[cell]
        return (shape, colour) if shape in SHAPES else None

    def repaint(self, background: str) -> None:
        """Another background below everything that can be told; the rest stays as it is."""
        self.background = background
        for cell, pair in enumerate(self.there.cells):
            if pair[0] != "unclear":
                self.put(cell, self.content(cell))

    def look(self) -> Canvas:
        return Canvas(self.image)


def exact(request: Request, canvas: Canvas) -> Canvas:
    """What was asked for, and nothing else, whatever there was before."""
    if request.background:
        canvas.repaint(str(request.op.background))
    for cell in request.cells:
        canvas.put(cell, request.scene.cells[cell])
    return canvas.look()


def _pick(rng: Generator, items: Sequence[int]) -> int | None:
    return int(rng.choice(items)) if items else None


def _others(request: Request, canvas: Canvas, occupied: bool | None = None) -> list[int]:
    """Cells that the request does not change."""
    cells = [c for c in range(GRID**2) if c not in request.cells]
    return [c for c in cells if occupied in (None, canvas.content(c) is not None)]


def _random(rng: Generator) -> Object:
    return str(rng.choice(SHAPES)), str(rng.choice(COLOUR_NAMES))


def _differing(rng: Generator, given: Object | None) -> Object:
    """Of one other shape or one other colour, mostly."""
    shape, colour = given or _random(rng)
    if rng.random() < 0.5:
        return shape, str(rng.choice([c for c in COLOUR_NAMES if c != colour]))
    return str(rng.choice([s for s in SHAPES if s != shape])), colour


def _unchanged(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    return before


def _wrong(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """The changed cell holds another thing, or another background came."""
    if request.background:
        wanted = str(request.op.background)
        before.repaint(str(rng.choice([b for b in BACKGROUND_NAMES if b != wanted])))
        return before
    cell = int(rng.choice(request.cells))
    after.put(cell, _differing(rng, request.scene.cells[cell]))
    return after


def _elsewhere(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """What was asked for was done in another cell."""
    cell = _pick(rng, _others(request, before))
    if cell is None or request.background:
        return before
    before.put(cell, request.scene.cells[request.cells[-1]])
    return before


def _half(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Changed cells are part way between before and after."""
    share = rng.uniform(0.2, 0.9)
    blend = before.image + share * (after.image.astype(np.float64) - before.image)
    cells = request.cells or tuple(range(GRID**2))
    for cell in cells if rng.random() < 0.5 else [int(rng.choice(cells))]:
        after.image[_place(cell)] = np.round(blend[_place(cell)])
    return after


def _lost(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Another object is gone."""
    cell = _pick(rng, _others(request, after, occupied=True))
    if cell is not None:
        after.put(cell, None)
    return after


def _turned(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Another object became another one."""
    cell = _pick(rng, _others(request, after, occupied=True))
    if cell is not None:
        after.put(cell, _differing(rng, after.content(cell)))
    return after


def _extra(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Something came that nobody asked for."""
    cell = _pick(rng, _others(request, after, occupied=False))
    if cell is not None:
        after.put(cell, _random(rng))
    return after


def _ground(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Another background came."""
    after.repaint(str(rng.choice([b for b in BACKGROUND_NAMES if b != after.background])))
    return after


def _smeared(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    """Some cells are part way to something else, to either side of the tolerance."""
    for cell in rng.permutation(GRID**2)[: int(rng.integers(1, 4))]:
        place, share = _place(int(cell)), rng.uniform(0.05, 0.6)
        there = after.image[place].astype(np.float64)
        other = _tile(after.background, _random(rng))
        after.image[place] = np.round(there + share * (other - there))
    return after


def _exact(request: Request, rng: Generator, before: Canvas, after: Canvas) -> Canvas:
    return after


KINDS: Mapping[str, Callable[[Request, Generator, Canvas, Canvas], Canvas]] = {
    "exact": _exact,
    "unchanged": _unchanged,
    "wrong": _wrong,
    "elsewhere": _elsewhere,
    "half": _half,
    "lost": _lost,
    "turned": _turned,
    "extra": _extra,
    "ground": _ground,
    "smeared": _smeared,
}
"""Synthetic edits. An entry gets the request, a generator, the picture before and the exact edit,
both its own."""


def synthetic(kind: str, request: Request, before: np.ndarray, rng: Generator) -> np.ndarray:
    """uint8 [24, 24, 3]: an edit of `before` by an entry of `KINDS`, with a little noise, as
    outputs of a policy have it."""
    after = exact(request, Canvas(before))
    image = KINDS[kind](request, rng, Canvas(before), after).image.astype(np.float64)
    noise = rng.normal(0, rng.uniform(0, 12), image.shape)
    clean = np.all(image == before, -1, keepdims=True)  # what nobody touched is as it was
    return np.clip(np.round(image + noise * ~clean), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Candidates:
    """Edits of one picture by one request. before: uint8 [24, 24, 3]. edits: (kind, image) each,
    of the policy's own the kind is `policy`."""

    id: str
    request: Request
    before: np.ndarray
    edits: Sequence[tuple[str, np.ndarray]]


def outputs(
    sessions: Sequence[Session], siblings: int, policy: PolicyConfig, seed: int
) -> list[list[np.ndarray]]:
    """A policy's own edits as training samples them, each sibling from its own noise: for every
    session and sibling uint8 [T, 24, 24, 3]."""
    config = RolloutConfig(siblings=siblings, shared_noise=False)
    loaded = load_policy(policy, trains=False)
    sampler = rollout_sampler(config, own_schedule(loaded))
    found: list[list[np.ndarray]] = [[] for _ in sessions]
    for chunk in chunks(sessions, range(len(sessions)), siblings, config.groups_per_batch):
        rollout_chunk(loaded, chunk, sampler, Seeds(seed, "edits"), policy, rollout=config)
        for i in range(chunk.rollouts):
            found[chunk.ordinals[i // siblings]].append(chunk.images_of(i))
    return found


def gather(
    sessions: Sequence[Session],
    rolled: Sequence[Sequence[np.ndarray]] | None,
    asked: Callable[[Session], Sequence[Request]],
    each: int,
    seed: int,
) -> Iterator[Candidates]:
    """Candidates of every turn of every session, in groups that share the picture before.

    rolled: as `outputs` gives them, or none. Of a session's first turn all siblings are edits of
    the same picture; behind it each one's own output is what came before. each: synthetic edits a
    group. Kinds are drawn.
    """
    for number, session in enumerate(sessions):
        siblings = rolled[number] if rolled is not None else []
        exactly = session.image
        for turn, request in enumerate(asked(session)):
            groups: list[tuple[np.ndarray, list[np.ndarray]]] = []
            if turn == 0 or not siblings:
                groups.append((exactly, [one[turn] for one in siblings]))
            else:
                groups += [(one[turn - 1], [one[turn]]) for one in siblings]
                groups.append((exactly, []))
            for k, (before, own) in enumerate(groups):
                rng = np.random.default_rng([seed, number, turn, k])
                kinds = [
                    str(kind) for kind in rng.choice(list(KINDS), each, replace=each > len(KINDS))
                ]
                made = [(kind, synthetic(kind, request, before, rng)) for kind in kinds]
                name = f"{session.id}/{turn + 1}.{k}"
                yield Candidates(name, request, before, [*(("policy", x) for x in own), *made])
            exactly = render(request.scene)
