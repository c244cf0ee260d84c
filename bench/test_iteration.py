"""One RL iteration of the embedded model at three turns: the trainer against two baselines, and a
waterfall between.

    eager       the trainer on the peers' arithmetic (bench/eager_operators.py): what the operators
                alone are worth
    peer-plan   the iteration executed as published trainers do (bench/peer_plan.py), batched
    peer +...   the same with one habit after the other exchanged for ours

All start from the same weights, sessions and seeds; the learning rate is 0, so every round does the
same work. Gate: every plan's images, texts, advantages, loss and gradient are the trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import editr2.rl.compiled_step
import editr2.rl.losses
from bench.eager_operators import eager_operators
from bench.frame import Phases
from bench.peer_plan import PeerPlan, waterfall
from editr2.config import Config, replace_nested
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.policies.weights import trainable
from editr2.rewards.adapt import adapt
from editr2.rewards.world import WorldReward
from editr2.rl import iteration as trainer
from editr2.rl.rollout import Chunk
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes

OURS, EAGER = "editr2", "eager"
SINGLY = (
    1,
    4,
    3,
)  # groups, siblings, turns; the plan that takes one sample at a time is run on this size alone


def make_config(groups: int, siblings: int, turns: int, **more: Any) -> Config:
    values: dict[str, Any] = {
        "rollout": {
            "sessions": groups,
            "siblings": siblings,
            "turns": turns,
            "groups_per_batch": groups,
        },
        "train": {"lr": 0.0, "ema": None},
        "eval": {"sessions": 1},
    }
    for section, changes in more.items():
        values[section] = {**values.get(section, {}), **changes}
    return replace_nested(Config(), values)


class Ours:
    """The trainer's own iteration on weights that stay."""

    def __init__(self, config: Config, policy: Any, eager: bool = False) -> None:
        self.config, self.policy, self.eager = config, policy, eager
        self.source = sessions_for(config, policy)
        self.sampler = rollout_sampler(config.rollout)
        self.processes = Processes(Accelerator(cpu=True))
        self.state = new_state(config.train, policy)
        self.reward = adapt(WorldReward())
        self.seconds: dict[str, float] = {}

    def __call__(self) -> dict[str, Any]:
        with eager_operators(self.config.rollout) if self.eager else nullcontext():
            row = trainer.iteration(
                self.config, self.state, self.source, self.reward, self.sampler, self.processes
            )
        self.seconds = row["seconds"]
        return row

    def result(self) -> Result:
        """What the gate compares, taken before the optimiser's step."""
        kept: dict[str, Any] = {"chunks": []}

        def roll_out(*arguments: Any, **options: Any) -> Chunk:
            kept["chunks"].append(rolled(*arguments, **options))
            return kept["chunks"][-1]

        def step(*arguments: Any) -> float:
            kept["gradient"] = gradient_of(self.policy)
            return stepped(*arguments)

        def credit(*arguments: Any) -> Any:
            kept["credit"] = assigned(*arguments)
            return kept["credit"]

        rolled, stepped, assigned = trainer.rollout_chunk, trainer.step, trainer.assign_credit
        with ExitStack() as stack:
            for name, function in (
                ("rollout_chunk", roll_out),
                ("step", step),
                ("assign_credit", credit),
            ):
                stack.enter_context(mock.patch.object(trainer, name, function))
            row = self()
        loss = row["loss"] + (row["text_loss"] or 0.0)
        return Result(kept["chunks"], kept["credit"].advantage, loss, kept["gradient"])


class Peer:
    """A plan and the trainer's optimiser step behind it."""

    def __init__(self, plan: PeerPlan, ours: Ours) -> None:
        self.plan, self.ours = plan, ours

    def __call__(self) -> float:
        loss, _ = self.plan.iterate(self.ours.reward)
        start = time.perf_counter()
        trainer.step(self.plan.config.train, self.ours.state, self.ours.processes)
        self.plan.seconds["optimiser"] = time.perf_counter() - start
        return loss

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.plan.seconds

    def result(self) -> Result:
        self.plan.policy.module.zero_grad()
        loss, credit = self.plan.iterate(self.ours.reward)
        gradient = gradient_of(self.plan.policy)
        self.plan.policy.module.zero_grad()
        return Result([self.plan.whole], credit.advantage, loss, gradient)


class Result:
    def __init__(self, done: list[Chunk], advantage: Tensor, loss: float, gradient: Tensor) -> None:
        turns = range(len(done[0].turns))
        self.images = [
            np.concatenate([chunk.turns[t].images for chunk in done]).astype(int) for t in turns
        ]
        self.text = [[text for chunk in done for text in chunk.turns[t].text] for t in turns]
        self.advantage, self.loss, self.gradient = advantage, loss, gradient


def gradient_of(policy: Any) -> Tensor:
    parts = trainable(policy.module).values()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts])


def assert_equal(name: str, found: Result, ours: Result) -> float:
    """The largest difference of the gradient, of its largest entry.

    Other batches and other operators round differently, 1e-6 of a latent; 1e-4 as for whole
    sessions replayed. An image may differ by one of 255, where a pixel falls to the other side of a
    rounding.
    """
    for turn, (a, b) in enumerate(zip(found.images, ours.images, strict=True)):
        assert abs(a - b).max() <= 1, (
            f"{name}: images of turn {turn + 1} differ by {abs(a - b).max()} of 255"
        )
    assert found.text == ours.text, f"{name}: intents differ"
    worst = (found.advantage - ours.advantage).abs().max().item()
    assert worst <= 1e-4, f"{name}: advantages differ by {worst}"
    assert abs(found.loss - ours.loss) <= 1e-5, (
        f"{name}: loss {found.loss}, the trainer's {ours.loss}"
    )
    error = ((found.gradient - ours.gradient).abs().max() / ours.gradient.abs().max()).item()
    assert error <= 1e-4, f"{name}: gradient differs by {error} of its largest entry"
    return error


def operator_seconds(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds that one iteration spends in the sampler's step and in the image loss, forward and
    backward to the velocity. The loss is computed twice here, the second time on a velocity of its
    own, so as to time it alone."""
    spent = {"sampler": 0.0, "image loss": 0.0}
    step, loss = editr2.rl.compiled_step.sde_step, editr2.rl.losses.grpo_loss

    def timed_step(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = step(*arguments, **options)
        spent["sampler"] += time.perf_counter() - start
        return out

    def timed_loss(x: Tensor, x_next: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Any:
        leaf = v.detach().requires_grad_()
        start = time.perf_counter()
        torch.autograd.grad(loss(x, x_next, leaf, *arguments, **options).loss, leaf)
        spent["image loss"] += time.perf_counter() - start
        return loss(x, x_next, v, *arguments, **options)

    with mock.patch.object(editr2.rl.compiled_step, "sde_step", timed_step):
        with mock.patch.object(editr2.rl.losses, "grpo_loss", timed_loss):
            run()
    return spent


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "groups, siblings, turns",
    [SINGLY, (2, 8, 3), pytest.param(6, 8, 3, marks=pytest.mark.full)],
    ids=lambda n: str(n),
)
def test_iteration(groups: int, siblings: int, turns: int, compare: Callable[..., Any]) -> None:
    policy = UnifiedPolicy.load()
    config = make_config(groups, siblings, turns)
    ours = Ours(config, policy)
    eager = Ours(config, policy, eager=True)
    sessions = [ours.source[i] for i in range(groups)]
    plans = {
        name if name.startswith("peer") else f"peer {name}": Peer(
            PeerPlan(habits, config, policy, sessions, ours.sampler), ours
        )
        for name, habits in waterfall().items()
        if habits.batched or (groups, siblings, turns) == SINGLY
    }
    runs: dict[str, Ours | Peer] = {**plans, EAGER: eager, OURS: ours}

    def gate() -> dict[str, float]:
        expected = ours.result()
        assert expected.gradient.abs().max() > 0
        others = {
            name: assert_equal(name, run.result(), expected)
            for name, run in runs.items()
            if name != OURS
        }
        return {OURS: max(others.values())}

    phases = Phases(runs)

    def extra(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"phases_s": phases.medians(name)}
        whole = sum(found["phases_s"].values())
        found["images_per_s"] = round(groups * siblings * turns / whole, 2)
        if name in (OURS, EAGER):
            with eager_operators(config.rollout) if name == EAGER else nullcontext():
                spent = operator_seconds(ours)
            found["operator_share"] = {part: round(s / whole, 4) for part, s in spent.items()}
        return found

    compare(
        op="iteration",
        mode=f"{turns} turns, embedded model",
        shape=(groups, siblings, turns),
        dtype="fp32",
        providers=phases.providers(),
        gate=gate,
        extra=extra,
        seconds=30.0,
        min_rounds=3,
    )
