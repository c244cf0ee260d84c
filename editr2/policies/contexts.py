"""What a velocity of an editor on diffusers depends on besides the noise, as immutable values.

Legend of shapes: B samples, N latent tokens, D numbers a token, L text tokens, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Prompt = Mapping[str, Tensor]
"""What a model's text encoders make of the instructions, by name and samples first: `words` [B, L,
width], with `mask` [B, L] where rows are padded, and whatever else the model reads."""

WORDS, MASK, POOLED = "words", "mask", "pooled"
"""Of these `pooled` alone is not token by token."""


@dataclass(frozen=True)
class EditContext:
    """All that a velocity depends on besides the noise; every tensor has the samples first.

    conditions: the images beside the noise as latent tokens, float32 [B, N, D], in the order of
    their positions: the image to edit, then those before it (`history`) and the source
    (`keep_source`). images: the same as the text encoder reads them, uint8 [B, H, W, 3] on the
    host; empty where it reads words only. prompt, negative: of the last instruction, and of the
    unguided branch (empty without guidance). derived: what a model computes from its
    conditions once, where it does (`DiffusionPolicy.derive`). references: how many of the images,
    the last, are the user's own further ones.
    """

    conditions: tuple[Tensor, ...]
    images: tuple[Tensor, ...] = ()
    prompt: Prompt = field(default_factory=dict)
    negative: Prompt = field(default_factory=dict)
    derived: tuple[Tensor, ...] = ()
    references: int = 0

    def __len__(self) -> int:
        return len(self.conditions[0])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for contexts that can be one batch."""
        shapes = tuple(t.shape[1:] for t in (*self.conditions, *self.images, *self.derived))
        return shapes, bool(self.prompt), bool(self.negative), self.references

    def select(self, index: Tensor) -> EditContext:
        def rows(t: Tensor) -> Tensor:
            return t[index.to(t.device)]

        return EditContext(
            tuple(map(rows, self.conditions)),
            tuple(map(rows, self.images)),
            {name: rows(t) for name, t in self.prompt.items()},
            {name: rows(t) for name, t in self.negative.items()},
            tuple(map(rows, self.derived)),
            self.references,
        )

    @staticmethod
    def join(parts: Sequence[EditContext]) -> EditContext:
        """Of one kind (equally many images, all instructed or none); shorter prompts are padded
        with zeros."""

        def together(name: str) -> tuple[Tensor, ...]:
            return tuple(
                torch.cat(same) for same in zip(*(getattr(p, name) for p in parts), strict=True)
            )

        return EditContext(
            together("conditions"),
            together("images"),
            padded([p.prompt for p in parts]),
            padded([p.negative for p in parts]),
            together("derived"),
            parts[0].references,
        )


@dataclass(frozen=True)
class MixedContext:
    """Contexts that are no one batch (one image here, two there). order: int64 [B], each sample's
    place in the parts laid end to end."""

    parts: tuple[EditContext, ...]
    order: Tensor

    @staticmethod
    def of(context: EditContext | MixedContext) -> MixedContext:
        if isinstance(context, MixedContext):
            return context
        return MixedContext((context,), torch.arange(len(context)))

    def __len__(self) -> int:
        return len(self.order)

    def select(self, index: Tensor) -> MixedContext:
        order = self.order[index.cpu()]
        parts, places, first, kept = [], torch.zeros_like(order), 0, 0
        for part in self.parts:
            mine = ((order >= first) & (order < first + len(part))).nonzero()[:, 0]
            if len(mine):
                parts.append(part.select(order[mine] - first))
                places[mine] = kept + torch.arange(len(mine))
            first, kept = first + len(part), kept + len(mine)
        return MixedContext(tuple(parts), places)


def doubled(context: EditContext) -> EditContext:
    """Both branches of guidance as one batch: the samples behind their prompt, then the same behind
    the negative one, of which the shorter is padded. Without what only text encoders read."""

    def twice(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat([t, t]) for t in tensors)

    prompts: tuple[Prompt, Prompt] = (context.prompt, context.negative)
    lengths = [p[WORDS].shape[1] for p in prompts]
    if any(MASK in p for p in prompts) or lengths[0] != lengths[1]:
        longest = max(lengths)
        prompts = (longer(prompts[0], longest), longer(prompts[1], longest))
    both = {name: torch.cat([t, prompts[1][name]]) for name, t in prompts[0].items()}
    return EditContext(twice(context.conditions), (), both, {}, twice(context.derived))


def longer(prompt: Prompt, length: int) -> Prompt:
    """The prompt, masked and padded with zeros to so many tokens."""

    more = length - prompt[WORDS].shape[1]

    def filled(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(len(t), more, *t.shape[2:])], 1)

    whole = masked(prompt)
    return {name: t if name == POOLED else filled(t) for name, t in whole.items()}


AnyEditContext = EditContext | MixedContext


def masked(prompt: Prompt) -> Prompt:
    """The prompt with its mask [B, L], bool; it has none where no row is padded, which is
    faster."""
    if not prompt or MASK in prompt:
        return prompt
    words = prompt[WORDS]
    return {**prompt, MASK: torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)}


def padded(prompts: Sequence[Prompt]) -> Prompt:
    """Several batches of prompts as one."""
    if any(MASK in p for p in prompts) or len({p[WORDS].shape[1] for p in prompts if p}) > 1:
        prompts = [masked(p) for p in prompts]
    return {
        name: pad_sequence([row for p in prompts for row in p[name].unbind(0)], batch_first=True)
        for name in prompts[0]
    }
