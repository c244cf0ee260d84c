"""Every size that an operator is timed at, and which of them a plain `make bench` takes.

Latents are [batch, tokens, channels], as the transformers pack them: a 16-channel VAE at an eighth
of the image, two
by two latents a token, is 64 channels for FLUX.1-Kontext, Qwen-Image-Edit and BAGEL alike; the
32-channel VAE of FLUX.2-klein gives 128. 512² pixels are 1,024 tokens, 1024² are 4,096.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

FLUX_QWEN_BAGEL, KLEIN = 64, 128  # channels
TOKENS = {512: 1024, 1024: 4096}  # by the image's side
BATCHES = (1, 4, 16)
EMBEDDED = (96, 36, 48)  # the embedded model's rollouts of one iteration
PAST_L2 = (512, 4096, 64)  # an sde_step moves 1.3 GB; the largest L2 at this time holds 0.1


@dataclass(frozen=True)
class Dtypes:
    """x: of the latents; v: of the velocity, as the model gives it."""

    name: str
    x: torch.dtype
    v: torch.dtype


FP32 = Dtypes("fp32", torch.float32, torch.float32)
MIXED = Dtypes("x fp32, v bf16", torch.float32, torch.bfloat16)
BF16 = Dtypes("bf16", torch.bfloat16, torch.bfloat16)


@dataclass(frozen=True)
class Size:
    device: str
    shape: tuple[int, ...]
    dtypes: Dtypes = FP32

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def bytes(self, *, x: int = 0, v: int = 0) -> int:
        """Of so many tensors of the latents' dtype and so many of the velocity's."""
        return self.elements * (x * self.dtypes.x.itemsize + v * self.dtypes.v.itemsize)


GRID = [
    Size("", (batch, tokens, channels), dtypes)
    for channels in (FLUX_QWEN_BAGEL, KLEIN)
    for tokens in TOKENS.values()
    for batch in BATCHES
    for dtypes in (FP32, MIXED, BF16)
]
# The operators are compared at eight samples on a CPU and sixteen on a GPU; the small ones show the
# cost of a call.
DEFAULT = {
    "cpu": [
        Size("", (8, 4096, 64), MIXED),
        Size("", (8, 1024, 64), MIXED),
        Size("", EMBEDDED, FP32),
    ],
    "cuda": [
        Size("", PAST_L2, MIXED),
        Size("", PAST_L2, BF16),
        *(Size("", (16, 4096, 64), dtypes) for dtypes in (MIXED, FP32, BF16)),
        Size("", (1, 1024, 64), MIXED),
        Size("", EMBEDDED, FP32),
    ],
}


def params(sizes: dict[str, Iterable[Size]], full: dict[str, Iterable[Size]]) -> list[Any]:
    """pytest parameters: those of `full` that are not in `sizes` only run with --full, those for
    CUDA only on a GPU."""
    found = []
    for device in ("cpu", "cuda"):
        default = list(sizes[device])
        for size in dict.fromkeys([*default, *full[device]]):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            marks += [] if size in default else [pytest.mark.full]
            dtypes = (
                "mixed" if size.dtypes.x != size.dtypes.v else size.dtypes.name
            )  # words that -k takes
            name = "-".join(("x".join(map(str, size.shape)), dtypes, device))
            found.append(pytest.param(Size(device, size.shape, size.dtypes), id=name, marks=marks))
    return found


def latents(variant: bool = False) -> list[Any]:
    """Of an operator's main form, or of a variant of it, for which the first size of each device is
    enough."""
    chosen = {device: sizes[:1] if variant else sizes for device, sizes in DEFAULT.items()}
    return params(chosen, {device: [*sizes, *GRID] for device, sizes in DEFAULT.items()})


def shapes(
    cpu: Iterable[tuple[int, ...]],
    cuda: Iterable[tuple[int, ...]],
    dtypes: Iterable[Dtypes] = (FP32,),
) -> Any:
    """For operators of other things than latents: the first dtype everywhere, the others with
    --full."""
    first, *others = dtypes
    default = {"cpu": [Size("", s, first) for s in cpu], "cuda": [Size("", s, first) for s in cuda]}
    return params(
        default,
        {d: [Size("", s.shape, t) for s in sizes for t in others] for d, sizes in default.items()},
    )


# Operations of one counter-based normal, from csrc/philox.h: ten rounds of four multiplications,
# four exclusive ors and two additions are shared by four normals; a logarithm, a root, a sine and a
# cosine of our own by two.
NORMAL_INTEGERS, NORMAL_FLOATS = 32, 28
NORMAL = NORMAL_INTEGERS + NORMAL_FLOATS
STEP = 8  # mean, noise, difference to the mean, its square and the sum
