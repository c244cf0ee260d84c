"""Classifier-free guidance of a unified policy: its settings, and the contexts whose velocities it
combines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeGuard, cast

import torch

from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.unified.model import Context
from editr2_kernels import RENORMS


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of the velocity, nested: v_t = v_td + text (v - v_td), u = v_id +
    image (v_t - v_id).

    v_td is the velocity without the current instruction, v_id that without images; a weight of 1
    needs no branch.

    Args:
        text: weight of the instruction.
        image: weight of the images.
        renorm: one of `editr2_kernels.RENORMS`; BAGEL edits with `text_channel`.
        interval: guided while low < sigma <= high.
    """

    text: float = 1.0
    image: float = 1.0
    renorm: str = "none"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(
                    f"guidance.{name}: {getattr(self, name)} (accepted: a finite number)"
                )
        if self.renorm not in RENORMS:
            raise ConfigError(f"guidance.renorm: {self.renorm!r} (accepted: {', '.join(RENORMS)})")
        if len(self.interval) != 2 or not self.interval[0] < self.interval[1]:
            raise ConfigError(
                f"guidance.interval: {self.interval} (accepted: (low, high) with low < high)"
            )

    @property
    def active(self) -> bool:
        return self.text != 1 or self.image != 1

    @staticmethod
    def of(config: PolicyConfig) -> Guidance:
        """As configured."""
        renorm = "none" if config.renorm == "auto" else config.renorm
        return Guidance(
            config.guidance, config.guidance_image, cast(Any, renorm), config.guidance_interval
        )


NONE = Guidance()
"""No branch but the full one."""


@dataclass(frozen=True)
class GuidedContext:
    """The contexts of a guided velocity; None where its weight is 1.

    text_dropped: as before the current instruction. image_dropped: the texts so far, at positions
        of their own.
    """

    full: Context
    text_dropped: Context | None
    image_dropped: Context | None

    @property
    def branches(self) -> list[Context]:
        return [c for c in (self.full, self.text_dropped, self.image_dropped) if c is not None]

    @cached_property
    def joined(self) -> Context:
        """All branches as one batch, joined once for all the denoising steps behind them."""
        with torch.enable_grad():  # the first to ask may be a rollout, the next one training
            return Context.join(self.branches)

    def map(self, function: Callable[[Context], Context]) -> GuidedContext:
        dropped = (
            None if c is None else function(c) for c in (self.text_dropped, self.image_dropped)
        )
        return GuidedContext(function(self.full), *dropped)

    def detach(self) -> GuidedContext:
        return self.map(Context.detach)

    @staticmethod
    def join_all(parts: Sequence[GuidedContext]) -> GuidedContext:
        def together(name: str) -> Context | None:
            found = [getattr(p, name) for p in parts]
            return None if found[0] is None else Context.join(found)

        return GuidedContext(
            Context.join([p.full for p in parts]),
            together("text_dropped"),
            together("image_dropped"),
        )


AnyContext: TypeAlias = Context | GuidedContext


def is_guided(context: AnyContext) -> TypeGuard[GuidedContext]:
    return isinstance(context, GuidedContext)


def full_of(context: AnyContext) -> Context:
    return context.full if isinstance(context, GuidedContext) else context
