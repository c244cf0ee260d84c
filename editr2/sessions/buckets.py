"""Sizes that sessions are edited at: aspect-ratio buckets, of which every image gets the nearest.

Aspect ratios are compared as fractions, so that two machines never disagree about the last bit of a
logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeGuard

Size = tuple[int, int]
"""(height, width) in pixels."""

Sizes = Size | Sequence[Size]
"""One size for all, or several, of which each image gets the nearest."""

RATIOS = (Fraction(1), Fraction(4, 3), Fraction(3, 2), Fraction(16, 9), Fraction(2))
"""Longer to shorter side of the buckets that are laid out where nobody lists any: those of cameras
and screens, each upright and lying."""


def is_one(sizes: Sizes) -> TypeGuard[Size]:
    return len(sizes) == 2 and all(isinstance(n, int) for n in sizes)


def listed(sizes: Sizes) -> tuple[Size, ...]:
    return (sizes,) if is_one(sizes) else tuple(sizes)  # type: ignore[arg-type]


def nearest(sizes: Sizes, height: int, width: int) -> Size:
    """The size that an image gets: the one of the nearest aspect ratio, on a logarithmic scale; of
    several, of the nearest area; of these the first."""

    def apart(a: int, b: int) -> Fraction:
        """Grows with |log(a / b)|."""
        return Fraction(max(a, b), min(a, b))

    def distance(size: Size) -> tuple[Fraction, Fraction]:
        h, w = size
        return apart(h * width, w * height), apart(h * w, height * width)

    return min(listed(sizes), key=distance)


def spread(area: int, multiple: int) -> tuple[Size, ...]:
    """Sizes of about `area` pixels in all of `RATIOS`, sides in multiples of `multiple`, the
    tallest first."""

    def side(length: float) -> int:
        return max(1, round(length / multiple)) * multiple

    upright = [(side(math.sqrt(area * r)), side(math.sqrt(area / r))) for r in reversed(RATIOS)]
    return tuple(dict.fromkeys([*upright, *((w, h) for h, w in reversed(upright))]))


def written(sizes: Sizes) -> str:
    """Heights and widths as messages have them."""
    return ", ".join(f"{height}×{width}" for height, width in listed(sizes))
