"""What changed between two pictures, from their pixels alone: how much, where, and whether what is
there still has the edges that it had.

Every picture is looked at with its longer side at `SIDE` pixels and slightly blurred, so that the
noise of an autoencoder is no change. A tone that the whole picture took on is told apart from
changes of a part of it. Colours are OKLab (`colours.py`), in whose units `JUST_SEEN` is a
difference that can just be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from editr2.rewards.colours import Lab, oklab
from editr2.rewards.geometry import Box

Map = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SIDE = 256
GRID = 4
"""Parts of a change are told apart on a grid of squares of so many pixels."""
JUST_SEEN = 0.02
FAINT, MOST_NOISE = 0.03, 0.06
"""A change is at least the first; noise that asks for more than the second is itself one."""
SMALLEST = 0.0015
"""Parts that cover less of the image are noise."""


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, straight between; falls where `high` is the smaller."""
    return float(min(max((value - low) / (high - low), 0.0), 1.0))


def ramps(values: Map, low: float, high: float) -> Map:
    result: Map = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return result


def mean_around(values: Map, radius: int) -> Map:
    """The mean over squares of 2 radius + 1 pixels, [H, W]; edges are continued outwards."""
    span = 2 * radius + 1
    for _ in (0, 1):
        total = np.cumsum(np.pad(values, ((radius + 1, radius), (0, 0)), mode="edge"), 0)
        values = ((total[span:] - total[:-span]) / np.float32(span)).T
    return values


def _blurred(lab: Lab) -> Lab:
    """With (1, 4, 6, 4, 1) / 16 along both axes."""
    for _ in (0, 1):
        p = np.pad(lab, ((2, 2), (0, 0), (0, 0)), mode="edge")
        lab = p[:-4] + p[4:] + 4 * (p[1:-3] + p[3:-1]) + 6 * p[2:-2]
        lab = (lab * np.float32(1 / 16)).transpose(1, 0, 2)
    return lab


@dataclass(frozen=True)
class Picture:
    """A picture as it is looked at: OKLab, float32 [h, w, 3], the longer side `SIDE`."""

    lab: Lab

    @classmethod
    def of(cls, image: npt.NDArray[np.uint8], like: Picture | None = None) -> Picture:
        """Of uint8 [H, W, 3], any size; `like`: brought to another's shape."""
        height, width = image.shape[:2]
        scale = SIDE / max(height, width)
        size = (max(8, round(width * scale)), max(8, round(height * scale)))
        if like is not None:
            size = (like.lab.shape[1], like.lab.shape[0])
        small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
        return cls(oklab(np.asarray(small)))

    @cached_property
    def soft(self) -> Lab:
        return _blurred(self.lab)

    @cached_property
    def edges(self) -> Map:
        """How fast colour and lightness change, a pixel."""
        soft = np.pad(self.soft, ((1, 1), (1, 1), (0, 0)), mode="edge")
        down, right = soft[2:, 1:-1] - soft[:-2, 1:-1], soft[1:-1, 2:] - soft[1:-1, :-2]
        result: Map = np.sqrt((down**2).sum(-1) + (right**2).sum(-1)) / 2
        return result

    @cached_property
    def _statistics(self) -> tuple[Map, Map, Map]:
        light = self.lab[..., 0]
        mean = mean_around(light, 3)
        return light, mean, np.maximum(mean_around(light * light, 3) - mean * mean, 0)

    def mask(self, box: Box | None, grown: float = 0.0) -> Mask:
        """The pixels of a box, grown on every side by a share of its own size; all without one."""
        height, width = self.lab.shape[:2]
        if box is None:
            return np.ones((height, width), bool)
        dx, dy = grown * box.width, grown * box.height
        inside = np.zeros((height, width), bool)
        top, bottom = (box.y0 - dy) * height, (box.y1 + dy) * height
        left, right = (box.x0 - dx) * width, (box.x1 + dx) * width
        rows = slice(max(0, int(top)), max(1, int(np.ceil(bottom))))
        inside[rows, max(0, int(left)) : max(1, int(np.ceil(right)))] = True
        return inside


def grown(mask: Mask, radius: int) -> Mask:
    """With every pixel within `radius` (of a square)."""
    for axis in (0, 1):
        mask = np.moveaxis(mask, axis, 0).copy()
        left = radius
        while left > 0:  # twice as far at every step: 13 is 1, 2, 4 and the rest
            step = min(left, max(1, (radius - left + 1)))
            wider = mask.copy()
            wider[step:] |= mask[:-step]
            wider[:-step] |= mask[step:]
            mask, left = wider, left - step
        mask = np.moveaxis(mask, 0, axis)
    return mask


def most_around(values: Map, radius: int) -> Map:
    """The largest within squares of 2 radius + 1 pixels."""
    for _ in (0, 1):
        padded = np.pad(values, ((radius, radius), (0, 0)), mode="edge")
        rows = [padded[i : i + len(values)] for i in range(2 * radius + 1)]
        values = functools.reduce(np.maximum, rows).T
    return values


def rim(place: Mask) -> Mask:
    """The pixels on both sides of the border of a place."""
    return grown(place, 1) & grown(~place, 1)


def _sample(values: Lab, most: int) -> Lab:
    """At most so many of the rows, evenly."""
    return (
        values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).astype(int)]
    )


def strangeness(colours: Lab, among: Lab) -> Map:
    """How far each colour [n, 3] is from the nearest of others [m, 3]: 0 where it is one of
    them."""
    among = _sample(among, 96)
    square = (colours**2).sum(1)[:, None] - 2 * colours @ among.T + (among**2).sum(1)[None]
    result: Map = np.sqrt(np.maximum(square.min(1), 0))
    return result


def ring(picture: Picture, place: Mask, avoid: Mask | None = None) -> Mask:
    """What is around a place: a band of 10 pixels, but for 3 next to it."""
    around = grown(place, 13) & ~grown(place, 3)
    clear = around if avoid is None else around & ~avoid
    return clear if clear.sum() >= 64 else around


def stands_out(picture: Picture, place: Mask, around: Mask) -> float:
    """How much a place differs from what is around it, by its colours and by how many edges it has:
    about 0.02 for more of the same, from 0.1 for a thing."""
    if not place.any() or not around.any():
        return 0.0
    colours = strangeness(_sample(picture.soft[place], 1500), picture.soft[around])
    edges = abs(float(picture.edges[place].mean()) - float(picture.edges[around].mean()))
    return float(colours.mean()) + edges


def silhouette(picture: Picture, box: Box) -> Mask:
    """What in a box differs from what is around it; the middle of the box where that is hardly
    anything."""
    place = picture.mask(box)
    around = ring(picture, place)
    found = np.zeros_like(place)
    if around.any():
        found[place] = strangeness(picture.soft[place], picture.soft[around]) > 0.05
    if found.sum() >= 0.12 * place.sum():
        return found
    return picture.mask(box, -0.25) & place


def inner(place: Mask) -> Mask:
    """A place without its rim, of 4 pixels where that leaves a quarter of it, else of fewer: the
    blur brings in what is around it."""
    for radius in (4, 3, 2, 1):
        core = ~grown(~place, radius)
        if core.sum() >= 0.25 * place.sum():
            return core
    return place


@dataclass(frozen=True)
class Part:
    """A connected part of a change. area: of the image. mass: the sum of its change. place: its
    pixels, and those between them."""

    mask: Mask
    place: Mask
    area: float
    mass: float
    box: Box


@dataclass(frozen=True)
class Change:
    """From one picture to another of the same shape.

    shift: the tone that all of it took on, OKLab [3]. delta: how much each pixel changed beside
    that, [h, w]. raw: how much it changed at all. mask: where that is more than noise. parts: from
    the largest change to the smallest.
    """

    before: Picture
    after: Picture
    shift: npt.NDArray[np.float32]
    delta: Map
    raw: Map
    mask: Mask
    parts: tuple[Part, ...]

    @classmethod
    def between(cls, before: Picture, after: Picture) -> Change:
        difference = after.soft - before.soft
        shift = np.median(difference.reshape(-1, 3)[::3], axis=0).astype(np.float32)
        delta = np.sqrt(((difference - shift) ** 2).sum(-1))
        noise = float(np.quantile(delta[::2, ::2], 0.4))
        mask = delta > min(max(FAINT, 5 * noise), MOST_NOISE)
        mask = mean_around(mask.astype(np.float32), 1) > 0.5
        raw = np.sqrt((difference**2).sum(-1))
        return cls(before, after, shift, delta, raw, mask, _parts(mask, delta))

    @property
    def tint(self) -> float:
        """How far the tone of the whole moved."""
        return float(np.linalg.norm(self.shift))

    @cached_property
    def mass(self) -> float:
        return float(self.delta[self.mask].sum())

    @cached_property
    def outline(self) -> Map:
        """Pairs of edge strengths, [2, h, w], in which strong edges do not outvote the rest."""
        return np.sqrt(np.stack([self.before.edges, self.after.edges]))

    def outline_kept(self, place: Mask) -> float:
        """Whether edges are where they were: the correlation of edge strengths in and just around a
        place, in [0, 1]; 0 where there are no edges to compare."""
        one, two = (edges[grown(place, 4)] for edges in self.outline)
        if one.size < 8 or min(one.std(), two.std()) < 1e-4:
            return 0.0
        return max(0.0, float(np.corrcoef(one, two)[0, 1]))

    def along_edges(self, place: Mask) -> float:
        """The share of a place's border where there was an edge before wherever there is one now:
        about 1 for a thing that took another colour, little for paint on top of it."""
        border = rim(place)
        if not border.any():
            return 0.0
        was = most_around(self.before.edges, 2)[border]
        now = self.after.edges[border]
        return float((was >= np.minimum(0.3 * now, 0.02)).mean())

    def seam(self, place: Mask, around: Mask) -> float:
        """How strong the edges at a place's border now are, in those of what is around it."""
        border = rim(place)
        if not border.any() or not around.any():
            return 0.0
        now = self.after.edges
        return float(now[border].mean()) / (float(now[around].mean()) + 0.004)

    def untold(self, place: Mask) -> float:
        """What of the change of a place no change of tone explains (another lightness, contrast or
        tint): the residual of the best affine map of its colours, root mean square."""
        before, after = self.before.soft[place], self.after.soft[place]
        if len(before) < 16:
            return 0.0
        known = np.concatenate([before, np.ones((len(before), 1), np.float32)], 1).astype(float)
        target = after.astype(float)
        fit = np.linalg.lstsq(known.T @ known, known.T @ target, rcond=None)[0]
        return float(np.sqrt(((target - known @ fit) ** 2).sum(1).mean()))

    def lost_outside(self, place: Mask) -> float:
        """Of what is not in or close to a place, how much is lost, in [0, 1]."""
        outside = ~grown(place, 5)
        return float(self.damage[outside].mean()) if outside.any() else 1.0

    @cached_property
    def damage(self) -> Map:
        """What of each pixel's surroundings is lost, in [0, 1]: by its colour, the tone of the
        whole included, or by its structure (the contrast and structure term of SSIM)."""
        light, mean, variance = self.before._statistics
        light2, mean2, variance2 = self.after._statistics
        both = mean_around(light * light2, 3) - mean * mean2
        floor = np.float32(4e-4)  # the variance of a noise of 5 levels
        structure = (2 * both + floor) / (variance + variance2 + floor)
        lost = 1 - (1 - ramps(self.raw, 0.03, 0.14)) * (1 - ramps(1 - structure, 0.25, 0.8))
        result: Map = lost.astype(np.float32)
        return result

    @cached_property
    def detail(self) -> Map:
        """Where there was something to lose beside colour, in [0, 1]."""
        return ramps(self.before._statistics[2], 2e-4, 2e-3)


def _parts(mask: Mask, delta: Map) -> tuple[Part, ...]:
    height, width = mask.shape
    tall, wide = -(-height // GRID), -(-width // GRID)
    padded = np.pad(mask, ((0, tall * GRID - height), (0, wide * GRID - width)))
    cells = padded.reshape(tall, GRID, wide, GRID).mean((1, 3)) >= 0.2
    labels = _labels(cells)
    full = labels.repeat(GRID, 0).repeat(GRID, 1)[:height, :width]
    found = []
    for label in range(1, int(labels.max(initial=0)) + 1):
        place = full == label
        own = place & mask
        area = float(own.mean())
        if area < SMALLEST:
            continue
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = Box(
            columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
        )
        found.append(Part(own, place, area, float(delta[own].sum()), box))
    return tuple(sorted(found, key=lambda part: (-part.mass, part.box)))


def _labels(cells: Mask) -> npt.NDArray[np.int32]:
    """Connected cells (diagonals, too) have one number from 1, others 0."""
    labels = np.zeros(cells.shape, np.int32)
    tall, wide = cells.shape
    label = 0
    for start in map(tuple, np.argwhere(cells)):
        if labels[start]:
            continue
        label += 1
        labels[start] = label
        queue: list[tuple[int, int]] = [start]
        while queue:
            y, x = queue.pop()
            for y2 in range(max(0, y - 1), min(tall, y + 2)):
                for x2 in range(max(0, x - 1), min(wide, x + 2)):
                    if cells[y2, x2] and not labels[y2, x2]:
                        labels[y2, x2] = label
                        queue.append((y2, x2))
    return labels


def together(masks: Sequence[Mask], shape: tuple[int, ...]) -> Mask:
    """Their union."""
    result = np.zeros(shape, bool)
    for mask in masks:
        result |= mask
    return result
