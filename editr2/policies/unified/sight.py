"""What the model sees of an image besides its latents: a frozen vision transformer's tokens, as
they enter the understanding stream.

    patches of 14 x 14 pixels + position table -> SigLIP's layers -> norm -> connector + position
    table of the model's width

Images have any size: a rule (`SizeRule`) says to which they are brought. All of it is frozen and
outside of the module that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from editr2.policies.placing import at_work

MOST_PIXELS = 14 * 14 * 9 * 1024


class SizeRule(NamedTuple):
    """largest, smallest: of an image's long and short side, in pixels; the smallest wins. stride:
    sides are multiples of it."""

    largest: int
    smallest: int
    stride: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """The size to which an image of this one is brought."""

        def scaled(size: Sequence[int], by: float) -> tuple[int, int]:
            high, wide = (
                max(self.stride, round(round(side * by) / self.stride) * self.stride)
                for side in size
            )
            return high, wide

        size = (height, width)
        shrunk = min(self.largest / max(size), 1.0)
        size = scaled(size, max(shrunk, self.smallest / min(size)))
        if (area := size[0] * size[1]) > MOST_PIXELS:
            size = scaled(size, MOST_PIXELS / area)  # of areas, on each side, as it is published
        return scaled(size, self.largest / max(size)) if max(size) > self.largest else size


LATENT_RULE = SizeRule(1024, 512, 16)
"""Of images before the autoencoder reads them."""
SIGHT_RULE = SizeRule(980, 224, 14)
"""Of the same images, which have been brought to the other rule, before this transformer does."""


def brought_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width), by PIL's bicubic filter."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


class Sight(nn.Module):
    """See the module docstring. vit: transformers' `SiglipVisionModel` without its head. width: of
    the model that looks. rule: of the images that it is shown. lent: it comes to the device for
    as long as it works; else it stays there."""

    lent = False

    def __init__(self, vit: Any, width: int, rule: SizeRule = SIGHT_RULE) -> None:
        super().__init__()
        config = vit.config
        self.rule = rule
        self.patch = int(config.patch_size)
        self.side = int(config.image_size) // self.patch
        self.vit_model = vit
        self.connector = nn.ModuleDict(
            {"fc1": nn.Linear(config.hidden_size, width), "fc2": nn.Linear(width, width)}
        )
        self.vit_pos_embed = nn.ParameterDict(
            {"pos_embed": nn.Parameter(torch.empty(self.side**2, width))}
        )
        self.requires_grad_(False).eval()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """In tokens (rows, columns), of an image of so many pixels."""
        high, wide = self.rule(height, width)
        return high // self.patch, wide // self.patch

    @torch.no_grad()
    def forward(self, images: np.ndarray, device: torch.device) -> Tensor:
        """uint8 [B, H, W, 3] -> tokens [B, M, width], in the weights' precision; one image after
        the other, so that no image's numbers depend on its neighbours."""
        size = self.rule(*images.shape[1:3])
        with (
            at_work([self], device, lent=self.lent),
            torch.autocast(device.type, enabled=False),
        ):
            return torch.cat([self._seen(brought_to(image, size), device) for image in images])

    def _seen(self, image: np.ndarray, device: torch.device) -> Tensor:
        pixels = torch.tensor(image, device=device).permute(2, 0, 1)[None]
        return self.tokens(
            ((pixels.float() / 255 - 0.5) / 0.5).to(next(self.connector.parameters()))
        )

    def tokens(self, pixels: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [-1, 1] whose sides are multiples of the patch."""
        vit = getattr(self.vit_model, "vision_model", self.vit_model)  # transformers 4 and 5
        x = vit.embeddings.patch_embedding(pixels)
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        place = (rows[:, None] * self.side + columns).flatten()
        x = x.flatten(2).transpose(1, 2) + vit.embeddings.position_embedding(place)
        x = vit.post_layernorm(vit.encoder(inputs_embeds=x).last_hidden_state)
        x = self.connector["fc2"](F.gelu(self.connector["fc1"](x), approximate="tanh"))
        return x + self.vit_pos_embed["pos_embed"][place]
