"""What English calls a colour, as a region of OKLab.

A name is a range of lightness, of chroma and of hue; how far a colour is from it is the Euclidean
distance in OKLab to the nearest colour inside (0: it may be called so; about 0.02 is just visible,
0.6 is black to red). Ranges are wide on purpose: a red car in the shade is still red.

OKLab: Ottosson, https://bottosson.github.io/posts/oklab/ (2020).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Lab = npt.NDArray[np.float32]

_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(
    np.float32
)
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)


def oklab(image: npt.NDArray[np.uint8]) -> Lab:
    """sRGB, uint8 [..., 3], as OKLab, float32 [..., 3]: lightness in [0, 1], and two axes of colour
    within about 0.3 of 0."""
    lab: Lab = np.cbrt(_LINEAR[image] @ _TO_LMS.T) @ _TO_LAB.T
    return lab


@dataclass(frozen=True)
class Colour:
    """A region of OKLab. lightness and chroma: from and to. hue: from and to in degrees, upwards
    through 360 where `to` is smaller; None: any."""

    name: str
    lightness: tuple[float, float]
    chroma: tuple[float, float]
    hue: tuple[float, float] | None = None

    def distance(self, lab: Lab) -> npt.NDArray[np.float32]:
        """How far each colour [..., 3] is from this one, [...]."""
        chroma = np.hypot(lab[..., 1], lab[..., 2])
        off = np.zeros_like(chroma)  # the angle to the nearest hue of the range
        if self.hue is not None:
            start, end = self.hue
            half = ((end - start) % 360) / 2
            hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))
            away = np.abs((hue - start - half + 180) % 360 - 180)
            off = np.radians(np.clip(away - half, 0, None))
        nearest = np.clip(chroma * np.cos(np.minimum(off, np.pi / 2)), *self.chroma)
        across = chroma**2 + nearest**2 - 2 * chroma * nearest * np.cos(off)
        light = lab[..., 0] - np.clip(lab[..., 0], *self.lightness)
        found: npt.NDArray[np.float32] = np.sqrt(np.maximum(across, 0) + light**2)
        return found


_STRONG, _ANY_LIGHT = (0.08, 0.40), (0.25, 0.95)
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float] | None]] = {
    # name: lightness, chroma, hue
    "red": ((0.25, 0.72), (0.10, 0.40), (12, 38)),
    "crimson scarlet": ((0.35, 0.65), (0.15, 0.40), (12, 35)),
    "maroon burgundy": ((0.15, 0.45), (0.05, 0.20), (0, 35)),
    "orange": ((0.50, 0.86), (0.10, 0.40), (42, 76)),
    "coral salmon": ((0.60, 0.82), (0.08, 0.22), (15, 45)),
    "peach": ((0.78, 0.94), (0.03, 0.14), (35, 75)),
    "yellow": ((0.68, 1.00), (0.10, 0.40), (84, 113)),
    "gold golden": ((0.45, 0.93), (0.07, 0.30), (66, 104)),
    "green": ((0.22, 0.93), _STRONG, (116, 168)),
    "lime": ((0.70, 0.97), (0.12, 0.40), (112, 148)),
    "olive": ((0.30, 0.68), (0.05, 0.18), (95, 128)),
    "mint": ((0.78, 0.97), (0.03, 0.18), (145, 182)),
    "teal": ((0.35, 0.66), (0.05, 0.20), (172, 215)),
    "turquoise": ((0.62, 0.92), (0.06, 0.25), (165, 212)),
    "cyan aqua": ((0.62, 0.97), (0.07, 0.30), (180, 222)),
    "blue": ((0.20, 0.80), _STRONG, (222, 288)),
    "navy": ((0.08, 0.40), (0.03, 0.25), (245, 290)),
    "indigo": ((0.18, 0.45), (0.06, 0.30), (270, 308)),
    "purple": ((0.20, 0.78), _STRONG, (290, 334)),
    "violet": ((0.30, 0.85), _STRONG, (285, 330)),
    "lavender lilac": ((0.70, 0.95), (0.02, 0.15), (280, 330)),
    "magenta fuchsia": ((0.40, 0.80), (0.15, 0.40), (320, 352)),
    "pink": ((0.58, 0.95), (0.05, 0.32), (335, 24)),
    "brown": ((0.20, 0.62), (0.035, 0.16), (38, 90)),
    "tan khaki": ((0.55, 0.88), (0.03, 0.12), (60, 110)),
    "beige cream ivory": ((0.82, 1.00), (0.008, 0.09), (60, 115)),
    "white": ((0.84, 1.00), (0.0, 0.04), None),
    "grey gray silver": ((0.35, 0.86), (0.0, 0.035), None),
    "black": ((0.0, 0.32), (0.0, 0.05), None),
}
COLOURS: dict[str, Colour] = {
    name: Colour(name, *ranges) for names, ranges in _RANGES.items() for name in names.split()
}
"""Name -> region: the usual words of English."""

_SHADES = {
    **dict.fromkeys(("light", "pale", "pastel", "sky", "baby"), (0.62, 1.0)),
    **dict.fromkeys(("dark", "deep", "forest", "midnight"), (0.0, 0.55)),
}
_PLAIN = frozenset(("bright", "vivid", "hot", "neon", "solid", "pure", "colour", "color"))


def colour_of(words: str, *, alone: bool = False) -> Colour | None:
    """The first colour that some words name, or None: `a bright red cup`, `light blue`. A shade
    before it (light, dark ...) narrows the lightness. alone: None, too, where there is any other
    word."""
    shade: tuple[float, float] | None = None
    found: Colour | None = None
    for word in re.findall(r"[a-z]+", words.lower()):
        if word in COLOURS and found is None:
            found = COLOURS[word]
        elif word in _SHADES and found is None:
            shade = _SHADES[word]
        elif alone and word not in _PLAIN and word not in COLOURS:
            return None
    if found is None or shade is None:
        return found
    low, high = found.lightness
    narrowed = max(low, shade[0]), min(high, shade[1])
    if narrowed[0] >= narrowed[1]:  # light black: as light as black gets
        return found
    chroma = (found.chroma[0] / 3, found.chroma[1])  # pastels are duller
    return replace(found, name=f"{words.strip().lower()}", lightness=narrowed, chroma=chroma)
