"""A text-free policy of another architecture for the trainer's tests: a tiny random
`FluxTransformer2DModel` used the Kontext way (the condition image's tokens stand behind the noisy
ones, told apart by the first position axis).

Pixels stand in for an autoencoder's latents and fixed random word vectors for a text encoder.
"""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel

from editr2.policies.base import Velocity
from editr2.policies.unified.codecs import patchify, unpatchify

GRID, PATCH, WIDTH, WORDS = 6, 4, 32, 8


@dataclasses.dataclass(frozen=True)
class FluxContext:
    condition: torch.Tensor
    prompt: torch.Tensor


class FluxPolicy:
    writes_text = False
    latent_shape = (GRID * GRID, PATCH * PATCH * 3)
    image_size = (GRID * PATCH, GRID * PATCH)

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = FluxTransformer2DModel(
            patch_size=1,
            in_channels=PATCH * PATCH * 3,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        rows = torch.arange(GRID * GRID)
        ids = torch.stack([torch.zeros_like(rows), rows // GRID, rows % GRID], 1).float()
        self.ids = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])

    def encode(self, images: np.ndarray) -> FluxContext:
        return FluxContext(patchify(images, PATCH), torch.zeros(len(images), WORDS, WIDTH))

    def instruct(self, context: FluxContext, instructions) -> FluxContext:
        return dataclasses.replace(
            context, prompt=torch.stack([self._words(text) for text in instructions])
        )

    @staticmethod
    def _words(text: str) -> torch.Tensor:
        vectors = [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
            for word in text.split()[:WORDS]
        ]
        return torch.cat([torch.stack(vectors), torch.zeros(WORDS - len(vectors), WIDTH)])

    def velocity(self, x, sigma, context: FluxContext):
        out = self.module(
            hidden_states=torch.cat([x, context.condition], 1),
            timestep=sigma,
            encoder_hidden_states=context.prompt,
            pooled_projections=context.prompt.mean(1),
            img_ids=self.ids,
            txt_ids=torch.zeros(WORDS, 3),
            return_dict=False,
        )[0]
        return Velocity(out[:, : x.shape[1]])

    def append(self, context: FluxContext, images: np.ndarray) -> FluxContext:
        return dataclasses.replace(context, condition=patchify(images, PATCH))

    def select(self, context: FluxContext, index: torch.Tensor) -> FluxContext:
        return FluxContext(context.condition[index], context.prompt[index])

    def join(self, contexts) -> FluxContext:
        return FluxContext(
            torch.cat([c.condition for c in contexts]), torch.cat([c.prompt for c in contexts])
        )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return unpatchify(latents, (GRID, GRID), PATCH)

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder)
