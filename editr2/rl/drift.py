"""How far the outputs of an evaluation have drifted from their sources, without any model.

What a policy that exploits its judge does to images shows in three numbers before anyone looks: it
gives up what was there (structure), turns colours up (saturation), and sharpens or blurs
(sharpness). An edit that was asked for moves them, too: what counts is where they go.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

MEASURES = ("structure", "saturation", "sharpness")
"""Columns of `drift`."""

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601's weights of R, G and B."""

Map = npt.NDArray[np.float32]


def drift(source: np.ndarray, images: np.ndarray) -> npt.NDArray[np.float64]:
    """Of each output against the source, float64 [n, 3], equal images (1, 1, 1): structure, the
    correlation of their luma's gradients, in [-1, 1]; saturation, the ratio of the mean spreads of
    R, G and B; sharpness, the ratio of the variances of the Laplacian of luma.

    source: uint8 [H, W, 3], scaled to the outputs' size where that is another. images: uint8
    [n, H, W, 3]. To both sides of a ratio one level of 255 (of its square) is added, so that of a
    grey or a flat source it stays finite.
    """
    height, width = images.shape[1:3]
    if source.shape[:2] != (height, width):
        scaled = Image.fromarray(source).resize((width, height), Image.Resampling.BOX)
        source = np.asarray(scaled)
    edges, *before = _seen(source)
    rows = []
    for image in images:
        own, *after = _seen(image)
        ratios = ((a + 1) / (b + 1) for a, b in zip(after, before, strict=True))
        rows.append((_cosine(edges, own), *ratios))
    return np.array(rows, np.float64).reshape(-1, len(MEASURES))


def _seen(image: np.ndarray) -> tuple[Map, float, float]:
    """Gradients of luma, the mean spread of the channels, and the Laplacian's variance."""
    luma = image.astype(np.float32) @ np.array(LUMA, np.float32)
    right, down = luma[:-1, 1:] - luma[:-1, :-1], luma[1:, :-1] - luma[:-1, :-1]
    spread = image.max(-1).astype(np.float32) - image.min(-1)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    laplacian = around - 4 * luma[1:-1, 1:-1]
    return np.stack([right, down]), float(spread.mean()), float(laplacian.var())


def _cosine(one: Map, other: Map) -> float:
    """1 of two flat images, 0 where only one of them is flat."""
    sizes = [float(np.square(x, dtype=np.float64).sum()) for x in (one, other)]
    if not all(sizes):
        return float(sizes[0] == sizes[1])
    product = float(np.multiply(one, other, dtype=np.float64).sum())
    return product / float(np.sqrt(sizes[0] * sizes[1]))
