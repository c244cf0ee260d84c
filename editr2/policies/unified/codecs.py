"""Images as the latent tokens that the model reads and paints: patches of pixels, or of what an
autoencoder makes of them.

Legend of shapes: B samples, N latent tokens, D numbers a token, C channels, h x w latents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from editr2.errors import CheckpointError
from editr2.policies.base import to_bytes
from editr2.policies.placing import at_work
from editr2.policies.tensor_files import Shape, check_shapes, read_header, read_tensors


def in_patches(x: Tensor, patch: int) -> Tensor:
    """[B, H, W, C] -> tokens [B, (H/p)(W/p), p*p*C], each ordered (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def painted(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `in_patches`: tokens [B, N, p*p*C] on a grid -> [B, H, W, C]."""
    x = tokens.view(len(tokens), *grid, patch, patch, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(len(tokens), grid[0] * patch, grid[1] * patch, -1)


def patchify(images: np.ndarray, patch: int) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 tokens in [-1, 1], as `in_patches` orders them."""
    return in_patches(torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1, patch)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The inverse of `patchify`, clamped and rounded to uint8."""
    return to_bytes(painted(tokens, grid, patch))


class ImageCodec(Protocol):
    """channels: of a latent. side: pixels of a latent token, each way."""

    @property
    def channels(self) -> int: ...
    @property
    def side(self) -> int: ...

    def read(self, images: np.ndarray, device: torch.device) -> Tensor:
        """uint8 [B, H, W, 3], sides multiples of `side` -> float32 tokens [B, N, D]."""

    def paint(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, D] -> images [B, H, W, 3], -1 is black and 1 white."""


class PixelCodec:
    """Latents are the pixels themselves."""

    channels = 3

    def __init__(self, patch: int) -> None:
        self.side = patch

    def read(self, images: np.ndarray, device: torch.device) -> Tensor:
        return patchify(images, self.side).to(device)

    def paint(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return painted(latents, grid, self.side)


class LatentCodec:
    """Latents are an autoencoder's (diffusers' `AutoencoderKL`): the mean of its distribution,
    shifted and scaled, in patches. In its own precision, one image after the other, so that an
    image's numbers do not depend on its neighbours. lent: it comes to the device for as long as it
    works; else it stays there."""

    def __init__(self, vae: Any, patch: int, *, lent: bool = False) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.lent = lent
        self.patch = patch
        self.channels = int(vae.config.latent_channels)
        self.side = patch * 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def read(self, images: np.ndarray, device: torch.device) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
        x = (x.float() / 255 - 0.5) / 0.5
        with self._at_work(device):
            means = [self.vae.encode(one[None]).latent_dist.mode() for one in x.to(self.vae.dtype)]
        latents = torch.cat(means).float() - self.vae.config.shift_factor
        latents = latents * self.vae.config.scaling_factor
        return in_patches(latents.permute(0, 2, 3, 1), self.patch)

    @torch.no_grad()
    def paint(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        x = painted(latents.float(), grid, self.patch).permute(0, 3, 1, 2)
        x = x / self.vae.config.scaling_factor + self.vae.config.shift_factor
        with self._at_work(x.device):
            images = [self.vae.decode(one[None]).sample for one in x.to(self.vae.dtype)]
        return torch.cat(images).permute(0, 2, 3, 1)

    @contextmanager
    def _at_work(self, device: torch.device) -> Iterator[None]:
        with (
            at_work([self.vae], device, lent=self.lent),
            torch.autocast(device.type, enabled=False),
        ):
            yield


# ------------------------------------------------------------------- the published autoencoder file

GROUPS = 32
"""Of the autoencoder's norms."""
SCALE, SHIFT = 0.3611, 0.1159
"""Of FLUX.1's latents."""


def autoencoder_sizes(path: Path, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Settings of diffusers' `AutoencoderKL` for a file in the published naming, by the shapes of
    its tensors. Raises `CheckpointError` naming one that is missing."""

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise CheckpointError(f"{path}: {name}: missing (accepted: FLUX.1's autoencoder)")
        return shapes[name]

    def count(pattern: str) -> int:
        found = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
        return 1 + max(found, default=0)

    levels = count(r"encoder\.down\.(\d+)\.")
    if levels > _MOST_LEVELS:
        raise CheckpointError(f"{path}: {levels} levels (accepted: up to {_MOST_LEVELS})")
    widths = tuple(shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels))
    if odd := [n for n in widths if n % GROUPS]:
        raise CheckpointError(
            f"{path}: {odd[0]} channels (accepted: multiples of {GROUPS}, its norms' groups)"
        )
    layers = count(r"encoder\.down\.0\.block\.(\d+)\.")
    return autoencoder_settings(widths, layers, shape("decoder.conv_in.weight")[1])


def autoencoder_settings(
    widths: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, channels: int = 16
) -> dict[str, Any]:
    """Of diffusers' `AutoencoderKL`, by default FLUX.1's. widths: of its levels; layers: a level;
    channels: of a latent."""
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": GROUPS,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


_MOST_LEVELS = 8

_PUBLISHED = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"down.\1.downsample.conv."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.block.\2."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"up.\1.upsample.conv."),
)
"""diffusers' names and the published ones, but for the decoder's levels, which diffusers counts
from the coarsest."""


def published_name(name: str, levels: int) -> str:
    """Of a tensor of diffusers' `AutoencoderKL`, in the published file."""
    for ours, theirs in _PUBLISHED:
        name = re.sub(ours, theirs, name)
    return re.sub(r"(\.up\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)


def autoencoder_of(path: Path) -> Any:
    """diffusers' `AutoencoderKL` with the weights of a published file, in float32. Raises
    `CheckpointError` naming the file and the key of what is missing, unknown or of another
    shape."""
    vae, names = autoencoder_without_weights(path)
    tensors = read_tensors(path)
    own = vae.state_dict()
    state = {
        ours: tensors[theirs].float().reshape(own[ours].shape) for theirs, ours in names.items()
    }
    vae.load_state_dict(state, assign=True)
    return vae.eval()


def autoencoder_without_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """The same on the meta device, and its names by those of the file, which has exactly them."""
    from diffusers import AutoencoderKL

    shapes, _ = read_header(path)
    sizes = autoencoder_sizes(path, shapes)
    with torch.device("meta"):
        vae = AutoencoderKL(**sizes)
    levels = len(sizes["block_out_channels"])
    names = {published_name(name, levels): name for name in vae.state_dict()}
    own = vae.state_dict()
    needed = {
        theirs: _as_published(theirs, tuple(own[ours].shape)) for theirs, ours in names.items()
    }
    check_shapes(path, shapes, needed, "FLUX.1's autoencoder")
    return vae, names


def _as_published(name: str, shape: Shape) -> Shape:
    """Projections of the attention are 1 x 1 convolutions there."""
    pointwise = ".attn_1." in name and len(shape) == 2
    return (*shape, 1, 1) if pointwise else shape
