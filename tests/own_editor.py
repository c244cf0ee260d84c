"""A small editor of one's own, convolutions over pixels: this file is all of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.policies.base import Velocity
from editr2.policies.configured import ConfiguredPolicy
from editr2.policies.tensor_files import read_tensors, write_tensors

WORDS, SIDE = 8, 24


@dataclass(frozen=True)
class Seen:
    """image: [B, 3, H, W], the one to edit. said: [B, WORDS], how often the instruction has a word
    of each of so many kinds."""

    image: Tensor
    said: Tensor


class OwnEditor(ConfiguredPolicy):
    image_size = (SIDE, SIDE)
    latent_shape = (3, SIDE, SIDE)
    default_weights = "random weights"

    def __init__(self) -> None:
        first = nn.Conv2d(3 + 3 + WORDS + 1, 16, 3, padding=1)
        self.module = nn.Sequential(first, nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    @classmethod
    def from_config(cls, config: PolicyConfig, *, trains=True, empty=False) -> OwnEditor:
        policy = cls()
        if config.weights:
            policy.module.load_state_dict(read_tensors(Path(config.weights) / "own.safetensors"))
        return policy

    def encode(self, images: np.ndarray) -> Seen:
        image = torch.from_numpy(images).to(self.module[0].weight.device).permute(0, 3, 1, 2)
        return Seen(image.float() / 127.5 - 1, image.new_zeros(len(image), WORDS).float())

    def instruct(self, context: Seen, instructions) -> Seen:
        said = [text.encode().split() for text in instructions]
        kinds = [[zlib.crc32(word) % WORDS for word in words] for words in said]
        counts = torch.tensor([[k.count(i) for i in range(WORDS)] for k in kinds])
        return replace(context, said=counts.to(context.said))

    def append(self, context: Seen, images: np.ndarray) -> Seen:
        return self.encode(images)

    def velocity(self, x: Tensor, sigma: Tensor, context: Seen) -> Velocity:
        beside = torch.cat([context.said, sigma[:, None]], 1)[:, :, None, None]
        flat = beside.expand(-1, -1, SIDE, SIDE)
        return Velocity(self.module(torch.cat([x, context.image, flat], 1)))

    def select(self, context: Seen, index: Tensor) -> Seen:
        return Seen(context.image[index], context.said[index])

    def join(self, contexts) -> Seen:
        return Seen(torch.cat([c.image for c in contexts]), torch.cat([c.said for c in contexts]))

    def pixels(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 2, 3, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}
        write_tensors(tensors, folder / "own.safetensors")
