"""All that changes while training, and how it is saved and found again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from editr2.checkpoint import check_config, load_checkpoint, restore_rng, save_checkpoint
from editr2.config import Config
from editr2.policies.base import Policy

RESUME_MAY_CHANGE = {"out", "train.iterations", "checkpoint.every", "checkpoint.keep"}


@dataclasses.dataclass
class State:
    """All that changes while training, and all that a checkpoint must hold."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    reference: nn.Module | None
    ema: dict[str, Tensor] | None
    iteration: int = 0
    elapsed: float = 0.0

    def save(self, root: Path, config: Config) -> None:
        tensors = {"policy": self.policy.module.state_dict()}
        if self.ema is not None:
            tensors["ema"] = self.ema
        if self.reference is not None:
            tensors["reference"] = self.reference.state_dict()
        state = {"elapsed": self.elapsed, "config": dataclasses.asdict(config)}
        save_checkpoint(
            root,
            self.iteration,
            tensors=tensors,
            optimizer=self.optimizer.state_dict(),
            state=state,
            keep=config.checkpoint.keep,
        )

    def load(self, path: Path, config: Config) -> None:
        saved = load_checkpoint(path)
        check_config(saved.state["config"], dataclasses.asdict(config), RESUME_MAY_CHANGE)
        self.policy.module.load_state_dict(saved.tensors["policy"])
        self.optimizer.load_state_dict(saved.optimizer)
        if self.ema is not None:
            self.ema = saved.tensors["ema"]
        if self.reference is not None:
            self.reference.load_state_dict(saved.tensors["reference"])
        restore_rng(saved.rng)
        self.iteration, self.elapsed = saved.iteration, saved.state["elapsed"]

    @contextmanager
    def averaged(self) -> Iterator[Policy]:
        """The policy with its averaged weights, where there are any."""
        if self.ema is None:
            yield self.policy
            return
        live = {k: v.clone() for k, v in self.policy.module.state_dict().items()}
        self.policy.module.load_state_dict(self.ema)
        try:
            yield self.policy
        finally:
            self.policy.module.load_state_dict(live)


def new_state(config: Config, policy: Policy) -> State:
    trainable = [p for p in policy.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.train.lr, betas=config.train.betas, weight_decay=config.train.weight_decay
    )
    reference = copy.deepcopy(policy.module).requires_grad_(False) if config.train.kl_weight > 0 else None
    ema = {k: v.clone() for k, v in policy.module.state_dict().items()} if config.train.ema is not None else None
    return State(policy, optimizer, reference, ema)
