"""Whole sessions as one packed sequence: equal to reading them segment by segment through contexts, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from editr2.policies.unified_model import UnifiedModel


@dataclass
class Segment:
    """A stretch of a packed sequence, in logical order.

    ids: understanding tokens int64 [B, U] with `valid` bool [B, U]; latents: generation tokens [B, N, D] at time `t`
    ([B], or None for clean). A `private` segment (noisy image, question and answer) sees all public segments before it;
    nobody else sees it and it does not advance the position.
    """

    ids: Tensor
    valid: Tensor
    latents: Tensor | None = None
    t: Tensor | None = None
    private: bool = False


@dataclass(frozen=True)
class Packed:
    """One batch of packed sequences, physically ordered understanding tokens first."""

    embedded: Tensor
    split: int
    position: Tensor
    mask: Tensor
    text_slices: tuple[slice, ...]
    latent_slices: tuple[slice | None, ...]


def pack(model: UnifiedModel, segments: Sequence[Segment], grid: tuple[int, int]) -> Packed:
    """Lays segments out as one sequence: equal to reading them one after the other through contexts."""
    b = segments[0].ids.shape[0]
    device = segments[0].ids.device
    counter = torch.zeros(b, dtype=torch.int64, device=device)
    text_x, text_position, text_valid, text_slices = [], [], [], []
    image_x, image_position, latent_slices = [], [], []
    text_at = image_at = 0
    for s in segments:
        width = s.ids.shape[1]
        text_x.append(model.embed_text(s.ids))
        if s.latents is None:
            text_position.append(counter[:, None] + torch.arange(width, device=device))
            advance: Tensor | int = s.valid.sum(1)
        else:
            n = s.latents.shape[1]
            text_position.append(counter[:, None].expand(b, width))
            image_position.append(counter[:, None].expand(b, n))
            t = s.t if s.t is not None else torch.zeros((), device=device)
            image_x.append(model.embed_latents(s.latents, t, grid))
            advance = 1
        text_valid.append(s.valid)
        text_slices.append(slice(text_at, text_at + width))
        text_at += width
        latent_slices.append(None if s.latents is None else slice(image_at, image_at + s.latents.shape[1]))
        image_at += 0 if s.latents is None else s.latents.shape[1]
        if not s.private:
            counter = counter + advance
    split, total = text_at, text_at + image_at
    may = torch.zeros(total, total, dtype=torch.bool, device=device)
    slices = []
    for text, latent in zip(text_slices, latent_slices, strict=True):
        parts = [torch.arange(text.start, text.stop)]
        if latent is not None:
            parts.append(torch.arange(split + latent.start, split + latent.stop))
        slices.append(torch.cat(parts).to(device))
    for i, s in enumerate(segments):
        own = slices[i]
        if s.latents is None:
            offsets = torch.arange(len(own), device=device)
            may[own[:, None], own] = offsets[:, None] >= offsets
        else:
            may[own[:, None], own] = True
        for j in range(i):
            if not segments[j].private:
                may[own[:, None], slices[j]] = True
    valid = F.pad(torch.cat(text_valid, 1), (0, image_at), value=True)
    mask = may & valid[:, None, :] | torch.eye(total, dtype=torch.bool, device=device)
    embedded = torch.cat([*text_x, *image_x], 1)
    position = torch.cat([*text_position, *image_position], 1)
    shifted = tuple(None if s is None else slice(split + s.start, split + s.stop) for s in latent_slices)
    return Packed(embedded, split, position, mask[:, None], tuple(text_slices), shifted)


def run_packed(model: UnifiedModel, packed: Packed) -> Tensor:
    """Final hidden states [B, L, H] of a packed batch, in its physical order."""
    hidden, _, _ = model.run(packed.embedded, packed.split, packed.position, packed.mask, None)
    return hidden
