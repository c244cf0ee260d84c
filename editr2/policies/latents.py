"""Pictures of another size, and latents as the tokens that a transformer reads.

Legend of shapes: B samples, C channels, D numbers a token, h x w latents.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [B, H, W, 3] brought to `size` (height, width) by Lanczos, as the pipelines do; a
    copy."""
    if images.shape[1:3] == size:
        return np.array(images)
    picked = [
        Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS) for image in images
    ]
    return np.stack([np.asarray(image) for image in picked])


def patchified(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 4 C, h / 2, w / 2]: every 2 x 2 patch as channels, (channel, row,
    column)."""
    return F.pixel_unshuffle(latents, 2)


def unpatchified(latents: Tensor) -> Tensor:
    """The inverse of `patchified`."""
    return F.pixel_shuffle(latents, 2)


def tokens(latents: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h w, D], row by row."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `tokens`."""
    return latents.transpose(1, 2).unflatten(2, grid)
