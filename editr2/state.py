"""All that changes while training, and how it is saved and found again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from editr2.checkpoint import check_config, load_checkpoint, restore_rng, save_checkpoint
from editr2.config import Config
from editr2.finite import check_state
from editr2.policies.base import Policy, TextPolicy
from editr2.policies.weights import exchanged, load_trainable, mix, snapshot, trainable

RESUME_MAY_CHANGE = {"out", "train.iterations", "checkpoint.every", "checkpoint.keep"}


@dataclasses.dataclass
class State:
    """All that changes while training, and all that a checkpoint must hold.

    reference, old, ema: the trainable parameters of the start (KL), of NFT's sampling policy, and their running
    average; None where the settings have no use for them.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    reference: dict[str, Tensor] | None = None
    old: dict[str, Tensor] | None = None
    ema: dict[str, Tensor] | None = None
    iteration: int = 0
    elapsed: float = 0.0

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        copies = {"reference": self.reference, "old": self.old, "ema": self.ema}
        return {name: values for name, values in copies.items() if values is not None}

    def save(self, root: Path, config: Config) -> None:
        """Raises `NonFiniteError` before anything is written."""
        tensors, optimizer = {"policy": snapshot(self.policy.module), **self._copies()}, self.optimizer.state_dict()
        check_state(f"{root}: step {self.iteration} is not saved", tensors, optimizer)
        save_checkpoint(
            root,
            self.iteration,
            tensors=tensors,
            optimizer=optimizer,
            state={"elapsed": self.elapsed, "config": dataclasses.asdict(config)},
            keep=config.checkpoint.keep,
        )

    def load(self, path: Path, config: Config) -> None:
        saved = load_checkpoint(path)
        check_state(path, saved.tensors, saved.optimizer)
        check_config(saved.state["config"], dataclasses.asdict(config), RESUME_MAY_CHANGE)
        load_trainable(self.policy.module, saved.tensors["policy"])
        self.optimizer.load_state_dict(saved.optimizer)
        for name, values in self._copies().items():
            for key, value in values.items():
                value.copy_(saved.tensors[name][key])
        restore_rng(saved.rng)
        self.iteration, self.elapsed = saved.iteration, saved.state["elapsed"]

    @contextmanager
    def averaged(self) -> Iterator[Policy]:
        """The policy with its averaged weights, where there are any."""
        with exchanged(self.policy.module, self.ema):
            yield self.policy

    def step_copies(self, config: Config, *, iteration_done: bool) -> None:
        """After an optimiser step: the average; after an iteration: NFT's old policy,
        old <- d old + (1 - d) theta with d = min(old_decay * iteration, old_decay_max)."""
        t = config.train
        if not iteration_done:
            if self.ema is not None and t.ema is not None:
                mix(self.ema, self.policy.module, t.ema)
        elif self.old is not None:
            mix(self.old, self.policy.module, min(t.old_decay * self.iteration, t.old_decay_max))


def new_state(config: Config, policy: Policy) -> State:
    t = config.train
    writes = policy.writes_text_with if isinstance(policy, TextPolicy) else (lambda name: False)
    image = {"params": [p for n, p in trainable(policy.module).items() if not writes(n)], "base_lr": t.lr}
    text = {"params": [p for n, p in trainable(policy.module).items() if writes(n)], "base_lr": t.text_lr or t.lr}
    groups = [group for group in (image, text) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    return State(
        policy,
        optimizer,
        reference=snapshot(policy.module) if t.kl_weight > 0 else None,
        old=snapshot(policy.module) if t.loss == "nft" else None,
        ema=snapshot(policy.module) if t.ema is not None else None,
    )
