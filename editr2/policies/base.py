"""What the trainer asks of an editor.

A policy walks a batch of sessions turn by turn. Its context is an immutable value: `encode` starts
one from the source images, `instruct` adds the turn's instruction, `velocity` denoises behind it,
`append` adds the turn's output image. Rollout and training walk the same way through the same
methods, which is why a replay meets the rollout's numbers. Everything slow that does not depend on
the noise (text encoders, image encodes, context keys and values) happens in `encode`, `instruct`
and `append`: once per group while siblings still agree, never inside the denoising loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from editr2.errors import NonFiniteError
from editr2_kernels import guided_velocity


@dataclass(frozen=True)
class Intent:
    """One sampled intent, or one sampled thought.

    text: the self-contained instruction that replaces the raw one, or None when none could be read
    from the sample (then the raw instruction stands: a fallback); of a thought, all of it.
    reasoning: what was written before `</think>`. ids: the sampled tokens, end mark included, for
    the text objective. log_prob: theirs while decoding, at the sampling temperature.
    """

    text: str | None
    reasoning: str
    ids: tuple[int, ...] = field(default=())
    log_prob: tuple[float, ...] = field(default=())


@dataclass(frozen=True)
class Velocity:
    """A prediction (noise - data), and under guidance the unguided branches beside it, for the
    kernels to combine.

    v: [B, *latent_shape]. guidance: keywords of `sde_step`, `sde_log_prob` and `grpo_loss`
    (v_uncond, guidance, v_uncond_image, guidance_image, guidance_interval, renorm); empty without
    guidance.
    """

    v: Tensor
    guidance: Mapping[str, Any] = field(default_factory=dict)

    def detach(self) -> Velocity:
        """The same without gradient."""
        guidance = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in self.guidance.items()
        }
        return Velocity(self.v.detach(), guidance)

    @staticmethod
    def join(parts: Sequence[Velocity]) -> Velocity:
        """Predictions under one guidance as one batch, in their order."""
        guidance = dict(parts[0].guidance)
        for name, value in guidance.items():
            if isinstance(value, Tensor):
                guidance[name] = torch.cat([part.guidance[name] for part in parts])
        return Velocity(torch.cat([part.v for part in parts]), guidance)

    def combined(self, sigma: Tensor) -> Tensor:
        """The guided velocity as one tensor; `v` itself without guidance."""
        return guided_velocity(self.v, sigma, **self.guidance) if self.guidance else self.v


@dataclass(frozen=True)
class Questions:
    """What the intents of a batch answer: raw earlier and current instructions, and each session's
    mode. kind: what is to be written, `intent` or (only of a `ThinkingPolicy`) `thought`."""

    earlier: list[list[str]]
    current: list[str]
    modes: list[str | None]
    kind: str = "intent"

    def select(self, index: Sequence[int]) -> Questions:
        return Questions(
            [self.earlier[i] for i in index],
            [self.current[i] for i in index],
            [self.modes[i] for i in index],
            self.kind,
        )


@dataclass(frozen=True)
class TurnTask:
    """One turn of B rollouts that training replays.

    text: what the context got as instruction. images: uint8 [B, H, W, 3], the turn's outputs, which
        later turns see.
    x: [B, Q, *latent_shape] and sigma: [B, Q], the places where velocities are asked for (Q may be
        0).
    questions, answers: the intents' questions and the sampled ids (an empty answer counts nothing);
        None without text.
    thoughts: what the context got behind the instruction; thinking: the sampled ids of it, where
        they are scored.
    """

    text: list[str]
    images: np.ndarray
    x: Tensor
    sigma: Tensor
    questions: Questions | None = None
    answers: list[tuple[int, ...]] | None = None
    thoughts: list[str] | None = None
    thinking: list[tuple[int, ...]] | None = None

    @property
    def asked(self) -> dict[str, tuple[Questions, list[tuple[int, ...]]]]:
        """What is scored, by kind: the questions, and the sampled ids."""
        found = {}
        if self.questions is not None and self.answers is not None:
            found["intent"] = (self.questions, self.answers)
        if self.thinking is not None:
            n = len(self.thinking)
            nothing = Questions([[]] * n, [""] * n, [None] * n, "thought")
            found["thought"] = (nothing, self.thinking)
        return found


@dataclass(frozen=True)
class TokenScores:
    """Log-probs of given answers, float32 [B, L], 0 where valid (bool [B, L]) is False."""

    log_prob: Tensor
    valid: Tensor


@dataclass(frozen=True)
class TurnReplay:
    """What a turn predicts under the present weights: the velocity at every place, [B * Q,
    *latent_shape] in the order (rollout, place), and the log-probs of the intents' answers and of
    the thoughts."""

    velocity: Velocity
    tokens: TokenScores | None
    thoughts: TokenScores | None = None

    @property
    def scores(self) -> dict[str, TokenScores]:
        """By kind, as `TurnTask.asked`."""
        found = {"intent": self.tokens, "thought": self.thoughts}
        return {kind: scores for kind, scores in found.items() if scores is not None}


# By the tensors in what a module gives FSDP2 notices that its weights are wanted for a backward
# pass. torch 2.9 looks for them in pytrees alone.
for _kind in (Velocity, TokenScores, TurnReplay):
    register_dataclass(_kind)


class Policy(Protocol):
    """See the module docstring. Images are uint8 [B, H, W, 3] arrays; latents float tensors [B,
    *latent_shape]."""

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
        """Whether it writes intents, and then also has the methods of `TextPolicy`."""

    def encode(self, images: np.ndarray) -> Any:
        """Source images -> context of B samples."""

    def instruct(self, context: Any, instructions: Sequence[str]) -> Any:
        """The context with this turn's instruction (or intent) added."""

    def velocity(self, x: Tensor, sigma: Tensor, context: Any) -> Velocity:
        """Velocity (noise - data) of latents x [B, *latent_shape] at sigma [B]; differentiable in
        the weights."""

    def append(self, context: Any, images: np.ndarray) -> Any:
        """The context after this turn's output."""

    def select(self, context: Any, index: Tensor) -> Any:
        """The samples at `index` (repeats allowed) as a context."""

    def join(self, contexts: Sequence[Any]) -> Any:
        """Several contexts, of different turns perhaps, as one batch in their order."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Clean latents -> uint8 images. A policy whose decoder can fail also has
        `PixelPolicy.pixels`."""

    def save(self, folder: Path) -> None:
        """Writes the weights as `policy.weights` takes them, into a folder that may exist."""


@runtime_checkable
class TextPolicy(Policy, Protocol):
    """A policy that writes intents (`writes_text`)."""

    def writes_text_with(self, name: str) -> bool:
        """Whether a parameter of `module` serves the text (and takes `train.text_lr`)."""

    def intend(
        self,
        context: Any,
        questions: Questions,
        seeds: Tensor | None,
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Intent]:
        """Writes each sample's intent on a branch of `context`, which itself stays as it is.

        seeds: int64 [B] (one per sample: the text does not depend on the batch), or None for
            greedy.
        """

    def answer_log_prob(
        self,
        context: Any,
        questions: Questions,
        answers: Sequence[tuple[int, ...]],
        *,
        temperature: float,
    ) -> TokenScores:
        """Teacher-forced log-probs of given answers behind `context`; differentiable in the
        weights."""


@runtime_checkable
class ThinkingPolicy(TextPolicy, Protocol):
    """A policy that can think before it paints: `intend` and `answer_log_prob` take questions of
    kind `thought`, too, asked behind a turn's instruction and answered with nothing between."""

    @property
    def thinks(self) -> bool:
        """Whether it is to (`policy.thinking`)."""

    def consider(self, context: Any, thoughts: Sequence[str]) -> Any:
        """The context with each sample's thought, behind its instruction."""


@runtime_checkable
class PixelPolicy(Protocol):
    """A policy that hands its pixels over before they become bytes, which hide a NaN; then rollouts
    do not call `decode`, and check them."""

    def pixels(self, latents: Tensor) -> Tensor:
        """Clean latents -> images [B, H, W, 3] on the device, -1 is black and 1 white, in any
        floating dtype."""


@runtime_checkable
class AssembledPolicy(Protocol):
    """A policy with frozen parts beside `module`."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """All parts that hold weights, `module` too, by the name that errors give them."""


@runtime_checkable
class ReadingPolicy(Protocol):
    """A policy that can tell, before anything is trained, which instructions it cannot read."""

    def unreadable(self, instructions: Sequence[str]) -> Iterable[tuple[int, str]]:
        """(turn from 0, what is wrong) for those of a session's instructions. A `ReferringPolicy`
        takes `references`, how many the session has, where it has any."""


@runtime_checkable
class ScheduledPolicy(Protocol):
    """A policy with a noise schedule of its own (its pipeline's), taken where `rollout.shift` is
    none."""

    def sigmas(self, steps: int) -> list[float]:
        """steps + 1 noise levels, falling from 1 to 0."""


@runtime_checkable
class BucketedPolicy(Protocol):
    """A policy that can pad contexts to a few sizes, so that one captured step serves many of
    them."""

    def bucket(self, context: Any) -> Any:
        """The context with more, masked tokens: equal velocities up to rounding."""


@runtime_checkable
class SizedPolicy(Protocol):
    """A policy that edits sessions of several sizes, each through a view of itself (`at_size`)."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(H, W) that sessions can have, `image_size` among them."""

    @property
    def whole(self) -> Any:
        """What this is a view of, or itself; what is kept for a policy is kept for that."""

    def at(self, size: tuple[int, int]) -> Any:
        """The policy at one of its sizes: another `image_size` and `latent_shape` and whatever
        follows from them, such as the schedule; the same weights and frozen parts. Raises
        `DataError` for a size that it does not have."""


@runtime_checkable
class ReferringPolicy(Protocol):
    """A policy that reads a user's own further images beside a session's."""

    @property
    def most_references(self) -> int | None:
        """How many it takes; None: any number."""

    def encode(self, images: np.ndarray, references: Sequence[np.ndarray] = ()) -> Any:
        """As `Policy.encode`, of samples that have equally many references. references: uint8 [B,
        H, W, 3] each, which every turn sees behind the session's own images."""


@runtime_checkable
class PackedPolicy(Protocol):
    """A policy that can replay whole sessions in one forward, equal to walking through them up to
    rounding."""

    def packs(self, turns: Sequence[TurnTask], *, context_gradient: bool) -> bool:
        """Whether the packed forward is the cheaper one for these turns, by its token and attention
        counts."""

    def replay_packed(
        self,
        images: np.ndarray,
        turns: Sequence[TurnTask],
        *,
        context_gradient: bool,
        temperature: float,
        references: Sequence[np.ndarray] = (),
    ) -> list[TurnReplay]:
        """Every turn of B rollouts from their source images [B, H, W, 3]; gradients go through the
        context (the past images and texts) only with `context_gradient`. references: of a
        `ReferringPolicy`, as its `encode` takes them."""


def witness(x: Tensor) -> Tensor:
    """float32 [B]: finite exactly where all of x [B, ...] is, if nothing in it comes near 1e38: its
    sum, which one pass over x gives on the device, in a recording too."""
    return x.sum(tuple(range(1, x.dim())), dtype=torch.float32)


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] clamped and rounded to uint8, where they are."""
    return ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Pixels [B, H, W, 3] in [-1, 1] as uint8 on the host: a `decode`. Raises `NonFiniteError`."""
    if not bool(witness(pixels).isfinite().all()):
        raise NonFiniteError("pixels: NaN or infinite (accepted: finite numbers)")
    return as_bytes(pixels).cpu().numpy()


def at_size(policy: Any, size: tuple[int, int]) -> Any:
    """The policy as it edits images of a size. One that knows a single size is given as it is, and
    says by itself what it thinks of others."""
    return policy.at(size) if isinstance(policy, SizedPolicy) else policy


def references_problem(policy: Any, model: str, count: int) -> str | None:
    """What is wrong with giving a policy so many references. model: its name."""
    most = policy.most_references if isinstance(policy, ReferringPolicy) else 0
    if most is None or count <= most:
        return None
    accepted = f"up to {most}" if most else "none"
    return f"{count} images beside the session's (accepted with policy.model {model}: {accepted})"


def with_module(policy: Any, module: nn.Module) -> Any:
    """The same policy over other weights (the reference policy): shares everything but the
    module."""
    other = copy.copy(policy)
    other.module = module
    return other


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on the device; None where it is off, or there is none (meta)."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None
