"""What the two sides of `bench.real_peer` both get, and how what they do is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import frame

PHASES = ("rollout", "reward", "train")
TIED = "tied: "
"""How the instruction of a group begins whose siblings the judge calls equal."""


@dataclass(frozen=True)
class Setup:
    """What both get. batch: rollouts that go through the model together. peer_adapters: dtype of
    the peer's trained weights in a comparison in bfloat16; ours are float32. compile: our blocks
    (`policy.compile`); the peer has no such setting. turns: of a session."""

    dtype: str = "float32"
    groups: int = 2
    siblings: int = 4
    batch: int = 8
    steps: int = 4
    window: int = 2
    resolution: int = 128
    text_tokens: int = 64
    judge_seconds: float = 0.0
    judge_workers: int = 4
    ties: bool = False
    peer_adapters: str = "bfloat16"
    compile: bool = False
    turns: int = 1

    @property
    def rollouts(self) -> int:
        return self.groups * self.siblings

    @property
    def samples(self) -> int:
        """Outputs of an iteration."""
        return self.rollouts * self.turns

    @property
    def tied(self) -> int:
        """Rollouts without an advantage."""
        return self.groups // 2 * self.siblings if self.ties else 0

    def problems(self) -> Iterator[str]:
        if self.rollouts % self.batch or self.batch % self.siblings:
            yield f"--batch: {self.batch} (accepted: whole groups, all batches of one size)"
        if self.ties and self.batch not in (self.siblings, self.rollouts):
            yield f"--batch: {self.batch} (accepted with --ties: one group, or all)"
        if self.turns < 1:
            yield f"--turns: {self.turns} (accepted: 1 or more)"
        if not 1 <= self.window < self.steps:
            yield f"--window: {self.window} (accepted: 1 to --steps - 1)"
        if self.resolution % 16:
            yield f"--resolution: {self.resolution} (accepted: multiples of 16)"

    def counts(self, ours: bool) -> Counts:
        """Of one iteration, both without what is encoded once and kept: sources and words."""
        batches = self.rollouts // self.batch
        learn = self.rollouts - (self.tied if ours else 0)
        # With a group a batch, ours has batches in which nobody has an advantage.
        empty = self.tied // self.batch if ours and self.batch == self.siblings else 0
        passes = (batches - empty) * self.window * self.turns
        return Counts(
            forwards=batches * self.steps * self.turns,
            forward_rows=self.samples * self.steps,
            trained=passes,
            trained_rows=learn * self.window * self.turns,
            backwards=passes,
            steps=1,
            encoded=self.samples - self.rollouts,  # what later turns read
            decoded=self.samples,
            judged=self.samples,
        )

    def said(self, group: int, turn: int) -> str:
        """The instruction of a group's turn; both count from 0."""
        tied = TIED if self.is_tied(group) else ""
        return f"{tied}make it brighter, {group}" + (f", again {turn}" if turn else "")

    def is_tied(self, group: int) -> bool:
        return self.ties and group % 2 == 1


@dataclass
class Counts:
    """Calls of the transformer without gradient (forwards), with (trained) and back, and how many
    samples they had; optimiser steps; images through the autoencoder, texts through the text
    encoders, answers of the judge."""

    forwards: int = 0
    forward_rows: int = 0
    trained: int = 0
    trained_rows: int = 0
    backwards: int = 0
    steps: int = 0
    encoded: int = 0
    decoded: int = 0
    texts: int = 0
    judged: int = 0


class Counter:
    """Counts what goes through a pipeline's components and an optimiser from now on; `take` gives
    it and starts at 0."""

    def __init__(
        self,
        transformer: nn.Module,
        vae: Any,
        text_encoders: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.now = Counts()
        transformer.register_forward_hook(self._ran, with_kwargs=True)
        for encoder in text_encoders:
            encoder.register_forward_hook(self._read, with_kwargs=True)
        optimizer.register_step_post_hook(lambda *given: self.add("steps", 1))
        for method, name in (("encode", "encoded"), ("decode", "decoded")):
            setattr(vae, method, self._wrapped(getattr(vae, method), name))

    def take(self) -> Counts:
        now, self.now = self.now, Counts()
        return now

    def add(self, name: str, count: int) -> None:
        setattr(self.now, name, getattr(self.now, name) + count)

    def _ran(self, module: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
        rows, answer = len(named["hidden_states"]), next(frame.tensors(out))
        kind = "trained" if answer.requires_grad else "forwards"
        self.add(kind, 1)
        self.add("trained_rows" if answer.requires_grad else "forward_rows", rows)
        if answer.requires_grad:
            answer.register_hook(lambda gradient: self.add("backwards", 1))

    def _read(self, module: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
        self.add("texts", len(next(frame.tensors([given, named]))))

    def _wrapped(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(images: torch.Tensor, *given: Any, **named: Any) -> Any:
            self.add(name, len(images))
            return method(images, *given, **named)

        return counted


class Judge:
    """Mean brightness, after a wait; of the tied groups the same for everyone."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.counter: Counter | None = None

    def score(self, instruction: str, brightness: float) -> float:
        if self.seconds:
            time.sleep(self.seconds)
        assert self.counter is not None
        self.counter.add("judged", 1)
        return 0.5 if instruction.startswith(TIED) else brightness

    def brightness(self, session: Any, images: np.ndarray) -> list[float]:
        """Ours: a session and its outputs."""
        return [
            self.score(turn.instruction, float(image.mean() / 255))
            for turn, image in zip(session.turns, images, strict=True)
        ]
