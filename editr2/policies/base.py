"""What the trainer asks of an editor.

A policy walks a batch of sessions turn by turn. Its context is an immutable value: `encode` starts one from the source
images, `instruct` adds the turn's instruction, `velocity` denoises behind it, `append` adds the turn's output image.
Rollout and training walk the same way through the same methods, which is why a replay meets the rollout's numbers.
Everything slow that does not depend on the noise (text encoders, image encodes, context keys and values) happens in
`encode`, `instruct` and `append`: once per group while siblings still agree, never inside the denoising loop.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Intent:
    """One sampled intent.

    text: the self-contained instruction that replaces the raw one, or None when none could be read from the sample
    (then the raw instruction stands: a fallback). reasoning: what was written before `</think>`. ids: the sampled
    tokens, for the text objective.
    """

    text: str | None
    reasoning: str
    ids: tuple[int, ...] = field(default=())


class Policy(Protocol):
    """See the module docstring. Images are uint8 [B, H, W, 3] arrays; latents float tensors [B, *latent_shape]."""

    @property
    def module(self) -> Any:
        """The trainable weights, an `nn.Module`: what is optimised, saved and exported."""

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels that this policy reads and writes."""

    @property
    def writes_text(self) -> bool:
        """Whether `intend` writes intents; a policy that does not returns None from it."""

    def encode(self, images: np.ndarray) -> Any:
        """Source images -> context of B samples."""

    def instruct(self, context: Any, instructions: Sequence[str]) -> Any:
        """The context with this turn's instruction (or intent) added."""

    def intend(
        self,
        context: Any,
        earlier: Sequence[Sequence[str]],
        current: Sequence[str],
        seeds: Tensor | None,
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Intent] | None:
        """Writes each sample's intent on a branch of `context`, which itself stays as it is.

        earlier, current: raw instructions. seeds: int64 [B] (one per sample: the text does not depend on the batch), or
        None for greedy. None from a policy without text.
        """

    def velocity(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        """Velocity (noise - data) of latents x [B, *latent_shape] at sigma [B]; differentiable in the weights."""

    def append(self, context: Any, images: np.ndarray) -> Any:
        """The context after this turn's output."""

    def select(self, context: Any, index: Tensor) -> Any:
        """The samples at `index` (repeats allowed) as a context."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Clean latents -> uint8 images."""


def with_module(policy: Any, module: nn.Module) -> Any:
    """The same policy over other weights (the reference policy): shares everything but the module."""
    other = copy.copy(policy)
    other.module = module
    return other


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
