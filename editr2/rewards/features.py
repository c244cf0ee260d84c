"""How much of an image is still there: features of DINOv3 or DINOv2, compared where nothing was to
change.

The last hidden states of these models are [CLS, register tokens, patches]. Register tokens are no
place of the image and are left out by their number in the model's configuration; what is left must
fill the grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from editr2.errors import ConfigError, one_line
from editr2.rewards.base import Held
from editr2.rewards.geometry import Box
from editr2.rewards.models import LookError, LookingModel, as_pixels, normalised, resized

WEIGHT = 0.5
"""A patch counts as background if at least this share of it is outside of all boxes."""
CHUNK = 16
"""Images a forward pass, so that many objects need no more memory than a few."""
_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class FeatureError(LookError):
    """Features could not be computed."""


class Features(NamedTuple):
    """Of N images. cls: float32 [N, D]; patches: float32 [N, h, w, D], rows from the top."""

    cls: Tensor
    patches: Tensor


class Encoder:
    """DINOv3 or DINOv2, with or without register tokens. May be called from many threads.

    An image is stretched to the model's size, so that every patch has its place in it; DINOv2's own
    processor would cut the margins off.

    Args:
        name: a folder, or an id of the hub such as facebook/dinov3-vitl16-pretrain-lvd1689m.
        size: sides of the image in the model, a multiple of its patches. None: what the model's
            preprocessor_config.json says, else 224.
        released: count the register tokens as patches, as Edit-R2's and EdiVal's releases do with
            DINOv3: 4 tokens that are no place shift all patches, and the grid is guessed from their
            number (200 as 10 × 20). For comparisons with published numbers only.
        device, revision: see `LookingModel`.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int | None = None,
        released: bool = False,
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        kinds = {
            "dinov3_vit": "DINOv3ViTModel",
            "dinov2": "Dinov2Model",
            "dinov2_with_registers": "Dinov2WithRegistersModel",
        }
        self.model = LookingModel(name, kinds, what="features", device=device, revision=revision)
        self.size, self.released = size, released

    def quick_look(self) -> None:
        """Looks at the model's files without reading weights. Raises `ConfigError`."""
        self.model.quick_look()
        self.sides()

    def takes(self) -> Held:
        """What the model takes, asked about as many images as a forward pass has at most."""
        module, (height, width) = self.model.sketch, self.sides()

        def look() -> Any:
            return module(pixel_values=torch.empty(CHUNK, 3, height, width))

        return self.model.takes(look)

    def load(self) -> None:
        """Loads the model. Raises `ConfigError` with the remedy."""
        self.model.load()
        self.sides()

    def lend(self) -> None:
        """Leaves the trainer's GPU, if it is there."""
        self.model.lend()

    def take(self) -> None:
        """Comes back to it."""
        self.model.take()

    def sides(self) -> tuple[int, int]:
        """Height and width of an image in the model."""
        settings = self.model.settings
        given = settings.get("crop_size") or settings.get("size") or {}
        given = {"height": given, "width": given} if isinstance(given, int) else given
        short = given.get("shortest_edge") or 224
        height = self.size or given.get("height") or short
        width = self.size or given.get("width") or short
        patch = self.model.config.patch_size
        if height < patch or height % patch or width % patch:
            raise ConfigError(
                f"features: size {height} × {width} (accepted: multiples of {patch}, the model's "
                f"patches)"
            )
        return int(height), int(width)

    def of(self, images: Sequence[np.ndarray]) -> Features:
        """The features of images of any sizes, uint8 [H, W, 3] of RGB, at least one. Raises
        `FeatureError`."""
        if not images:
            raise FeatureError("features: no image (accepted: at least one)")
        try:
            self.load()
            height, width = self.sides()
            mode = _MODES.get(self.model.settings.get("resample", 2), "bilinear")
            pixels = torch.stack(
                [
                    normalised(
                        resized(as_pixels(image, "features"), height, width, mode),
                        self.model.settings,
                    )
                    for image in images
                ]
            )
            states = torch.cat([self._states(chunk) for chunk in pixels.split(CHUNK)])
        except (ConfigError, FeatureError):
            raise
        except LookError as error:
            raise FeatureError(str(error)) from error
        except Exception as error:
            raise FeatureError(f"features: {one_line(error, kind=True)}") from error
        if not torch.isfinite(states).all():
            raise FeatureError("features: not finite")
        patch = self.model.config.patch_size
        registers = int(getattr(self.model.config, "num_register_tokens", 0) or 0)
        skipped = 1 if self.released else 1 + registers
        grid = (height // patch, width // patch)
        count = states.shape[1] - skipped
        if self.released:
            grid = guessed_grid(count, height / width)
        if count != math.prod(grid):
            raise FeatureError(
                f"features: {count} patches of {height} × {width} pixels (accepted: "
                f"{grid[0]} × {grid[1]})"
            )
        return Features(states[:, 0], states[:, skipped:].reshape(len(images), *grid, -1))

    def _states(self, pixels: Tensor) -> Tensor:
        with self.model.held() as (module, device):
            states = module(pixel_values=pixels.to(device)).last_hidden_state
            return states.float().cpu()


def guessed_grid(count: int, aspect: float) -> tuple[int, int]:
    """The grid (h, w) of so many patches whose h / w is nearest to the image's, as the releases
    guess it; of two that are as near, the higher one with the fewest columns."""
    pairs = [(count // w, w) for w in range(1, math.isqrt(count) + 1) if count % w == 0]
    both = [grid for h, w in pairs for grid in ((h, w), (w, h))]
    return min(both, key=lambda grid: abs(grid[0] / grid[1] - aspect))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors [D], at most 1. Raises `FeatureError` where one of them is zero."""
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    if lengths <= 0:
        raise FeatureError("features: a vector of zeros has no direction")
    return min(max(float(a @ b) / lengths, -1.0), 1.0)


def crop(image: np.ndarray, box: Box) -> np.ndarray | None:
    """The part of an image in a box; None where that is less than a pixel."""
    left, top, right, bottom = box.pixels(*image.shape[:2])
    return image[top:bottom, left:right] if right > left and bottom > top else None


def object_consistency(
    encoder: Encoder, source: np.ndarray, output: np.ndarray, boxes: Sequence[Box]
) -> float | None:
    """Mean over the boxes of ½ cos CLS + ½ cos mean patch, of the crops of both images at the same
    place, in [0, 1] (less than 0 is 0). None where there is nothing to compare.

    source, output: uint8 [H, W, 3] of one size. boxes: of the unchanged objects in the source.
    """
    _same_size(source, output)
    pairs = [(crop(source, box), crop(output, box)) for box in boxes]
    crops = [part for pair in pairs for part in pair if part is not None]
    if not crops:
        return None
    cls, patches = encoder.of(crops)
    means = patches.double().mean((1, 2))
    values = [
        0.5 * cosine(cls[i], cls[i + 1]) + 0.5 * cosine(means[i], means[i + 1])
        for i in range(0, len(crops), 2)
    ]
    return _share(sum(values) / len(values))


def background_consistency(
    encoder: Encoder, source: np.ndarray, output: np.ndarray, boxes: Sequence[Box]
) -> float | None:
    """The cosine of the mean features of what lies outside of all boxes, in [0, 1] (less than 0 is
    0). None where nothing is left: it does not apply.

    boxes: of all objects, in the source *and* in the output. A patch counts with the share of it
    that is outside, if that is at least half; patch features are normalised before they are pooled.
    The releases also give no value without any box; `encoder.released` does so.
    """
    _same_size(source, output)
    if encoder.released and not boxes:
        return None
    patches = encoder.of([source, output]).patches
    weights = outside(boxes, patches.shape[1], patches.shape[2], *encoder.sides())
    weights = weights * (weights >= WEIGHT)
    if not weights.any():
        return None
    unit = F.normalize(patches.double(), dim=-1)
    pooled = (unit * weights[..., None]).sum((1, 2))
    return _share(cosine(pooled[0], pooled[1]))


def outside(boxes: Sequence[Box], rows: int, columns: int, height: int, width: int) -> Tensor:
    """The share of every cell of a grid that no box covers, float64 [rows, columns], by the pixels
    of a canvas of this size whose middles are covered."""
    ys = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    xs = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    free = torch.ones(height, width, dtype=torch.float64)
    for box in boxes:
        inside_y = (ys >= box.y0) & (ys <= box.y1)
        inside_x = (xs >= box.x0) & (xs <= box.x1)
        free[inside_y[:, None] & inside_x] = 0
    return F.adaptive_avg_pool2d(free[None], (rows, columns))[0]


def _same_size(source: np.ndarray, output: np.ndarray) -> None:
    if source.shape != output.shape:
        raise FeatureError(
            f"features: {list(source.shape)} and {list(output.shape)} (accepted: one size)"
        )


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)
