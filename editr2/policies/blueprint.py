"""An editor without its weights, for `editr2 check`: tensors of the right shapes that hold no data,
and what the editor knows of itself that no tensor shows.

A blueprint says how to run each step of an editor; `editr2.check` runs it small and counts.

The steps are those of `Policy`: encode (or, from the second turn on, append), instruct, intend,
velocity and decode; and of training: train (a velocity and its backward pass) and answer (the same
of an intent).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from editr2.errors import ConfigError
from editr2.policies.base import AssembledPolicy, Velocity
from editr2.sessions import Session

SMALL_BATCH = 2
"""Samples of the smaller of two measured batches; one sample is spared some copies."""


@cache
def _mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()  # one for all: fake tensors of two cannot meet


@contextmanager
def simulated(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Tensors made inside hold no data; floating-point ones are `dtype` unless they say
    otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _mode():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def adapters_without_data(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Adapters put on a simulated module inside: on meta, where peft does not move them, which fake
    tensors do not bear; afterwards they are simulated, too, in float32. dtype: of the module."""
    with simulated(dtype), torch.device("meta"):
        yield
    with simulated(torch.float32):
        for layer in [
            m for name, m in module.named_modules() if ".lora_" in name and hasattr(m, "weight")
        ]:
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape))


@dataclass(frozen=True)
class Size:
    """A number that a cost grows with along a line. at: as large as it is. first: the smaller of
    the two at which it is measured, one apart."""

    at: int
    first: int


@dataclass(frozen=True)
class Work:
    """Something to run and count.

    key: of equal work, which is measured once; its sizes are added to it. prepare: makes what the
    work reads, given a policy and a number for each size, and returns what to run. sizes: the
    outermost line first. times: run so often with the same cost, one after the other; None: once.
    deep: whether the repeated blocks, of which the policy has too few, are in it. trains: whether
    it runs with gradient, and goes backward. checkpointing: whether activations are computed again.
    """

    key: Hashable
    prepare: Callable[..., Callable[[], Any]]
    sizes: Sequence[Size] = ()
    times: int | None = None
    deep: bool = True
    trains: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Reading:
    """Work that is counted and not run: `parameters` of frozen weights of a dtype see `tokens`
    each of `batch` texts, apart."""

    dtype: torch.dtype
    parameters: int
    tokens: int
    batch: int


class Blueprint(Protocol):
    """What `editr2 check` asks. Turns count from 0.

    policy: without data; of equal blocks it may have one of each kind. text, vae, sight: bytes of
    the frozen text encoders, of the autoencoder and of the vision transformer beside
    `policy.module`. prompt_per_output: whether siblings' instructions are read apart.
    """

    @property
    def policy(self) -> Any: ...
    @property
    def text(self) -> int: ...
    @property
    def vae(self) -> int: ...
    @property
    def sight(self) -> int: ...
    @property
    def prompt_per_output(self) -> bool: ...

    @property
    def deeper(self) -> Sequence[tuple[Any, int]]:
        """Policies with one more block of a kind, and how many of it the whole one has more than
        `policy`; in the order in which the kinds run."""

    @property
    def blocks(self) -> int:
        """Repeated blocks of the whole policy, of all kinds."""

    def see(self, sessions: Sequence[Session]) -> None:
        """Instructions are as long as those of these sessions from here on."""

    def read_again(self, prompts: int) -> bool:
        """Whether training reads the `prompts` instructions of an iteration again."""

    def encodes_again(self, turn: int, images: int) -> bool:
        """Whether training encodes the `images` again that a rollout's turns from this one on, or
        (turn 0) its first turns, have read in an iteration. Where it does not, its step is `derive`
        in place of `encode`."""

    def work(self, step: str, batch: int, turn: int, checkpointing: bool) -> list[Work | Reading]:
        """A step of a batch at a turn, part by part. checkpointing: where the step trains."""

    def held(self, batch: int, turn: int) -> int | Work:
        """Bytes of the context of a batch at a turn, behind its instruction; or the work whose
        result it is."""

    def branches(self, batch: int, turn: int) -> Mapping[str, int]:
        """The same part by part, where a context is made of several."""

    def passes(self, step: str, apart: bool) -> int:
        """How many passes through the transformer a step makes, one after the other: each brings
        weights together that processes share. apart: there are branches of guidance, and they run
        so, too."""


def velocity_passes(step: str, apart: bool) -> int:
    """`Blueprint.passes` of an editor whose transformer runs for velocities alone, of which
    guidance has two."""
    return 1 + apart if step in ("velocity", "train") else 0


def backward(velocity: Velocity) -> Velocity:
    """The backward pass of a prediction and of its unguided branches."""
    answers = [velocity.v, *(t for t in velocity.guidance.values() if isinstance(t, Tensor))]
    torch.autograd.backward(answers, [torch.ones_like(t) for t in answers])
    return velocity


@runtime_checkable
class SizedBlueprint(Protocol):
    """A blueprint of a policy that may have several sizes (`SizedPolicy`)."""

    def at(self, size: tuple[int, int]) -> Blueprint:
        """The same of the policy at one of them."""


class Walk:
    """`Blueprint` by the policy's own methods, walking through the turns as a rollout does: for any
    policy whose methods do not look at numbers and that writes no intents."""

    deeper: Sequence[tuple[Any, int]] = ()
    blocks = sight = 0
    prompt_per_output = True

    def __init__(self, policy: Any, model: str) -> None:
        """policy: made inside of `simulated`. model: its name, for the `ConfigError` of one that
        writes intents."""
        if policy.writes_text:
            raise ConfigError(
                f"policy.model: {model!r}: writes intents, which are numbers (accepted by `check`: "
                f"a class with a `blueprint` of its own)"
            )
        self.policy = policy
        parts = policy.parts if isinstance(policy, AssembledPolicy) else {}
        beside = {
            name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in parts.items()
            if part is not policy.module
        }
        self.text = sum(size for name, size in beside.items() if name.startswith("text"))
        self.vae = sum(beside.values()) - self.text
        self._said, self._references = "", 0

    def see(self, sessions: Sequence[Session]) -> None:
        texts = sorted((turn.instruction for s in sessions for turn in s.turns), key=len)
        self._said = texts[len(texts) // 2]
        self._references = max(len(s.references) for s in sessions)

    def read_again(self, prompts: int) -> bool:
        return True

    def encodes_again(self, turn: int, images: int) -> bool:
        return True

    def work(self, step: str, batch: int, turn: int, checkpointing: bool) -> list[Work | Reading]:
        def prepare(policy: Any, rows: int) -> Callable[[], Any]:
            return getattr(self, f"_{step}")(policy, rows, turn)

        sizes, trains = (Size(batch, SMALL_BATCH),), step == "train"
        return [Work((step, turn), prepare, sizes, trains=trains)]

    def held(self, batch: int, turn: int) -> Work:
        def prepare(policy: Any, rows: int) -> Callable[[], Any]:
            return lambda: self._context(policy, rows, turn)

        return Work(("context", turn), prepare, (Size(batch, SMALL_BATCH),))

    def branches(self, batch: int, turn: int) -> Mapping[str, int]:
        return {}

    def passes(self, step: str, apart: bool) -> int:
        return velocity_passes(step, apart)

    def _pictures(self, policy: Any, batch: int) -> np.ndarray:
        return np.zeros((batch, *policy.image_size, 3), np.uint8)

    def at(self, size: tuple[int, int]) -> Walk:
        view = copy.copy(self)
        view.policy = self.policy.at(size)
        return view

    def _context(self, policy: Any, batch: int, turn: int, instructed: bool = True) -> Any:
        """As it is at a turn."""
        pictures, said = self._pictures(policy, batch), [self._said] * batch
        context = self._encoded(policy, pictures)
        for _ in range(turn):
            context = policy.append(policy.instruct(context, said), pictures)
        return policy.instruct(context, said) if instructed else context

    def _encoded(self, policy: Any, pictures: np.ndarray) -> Any:
        """With as many references as any session has."""
        beside = [pictures] * self._references
        return policy.encode(pictures, *([beside] if beside else []))

    def _encode(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        pictures = self._pictures(policy, batch)
        if not turn:
            return lambda: self._encoded(policy, pictures)
        context = self._context(policy, batch, turn - 1)
        return lambda: policy.append(context, pictures)

    def _instruct(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context = self._context(policy, batch, turn, instructed=False)
        return lambda: policy.instruct(context, [self._said] * batch)

    def _velocity(self, policy: Any, batch: int, turn: int) -> Callable[[], Velocity]:
        context = self._context(policy, batch, turn)
        x, sigma = torch.empty(batch, *policy.latent_shape), torch.empty(batch)
        return lambda: policy.velocity(x, sigma, context)

    def _train(self, policy: Any, batch: int, turn: int) -> Callable[[], Velocity]:
        predict = self._velocity(policy, batch, turn)
        return lambda: backward(predict())

    def _decode(self, policy: Any, batch: int, turn: int) -> Callable[[], Tensor]:
        latents = torch.empty(batch, *policy.latent_shape)
        return lambda: policy.pixels(latents)
