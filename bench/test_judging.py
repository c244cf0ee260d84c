"""One RL iteration of the embedded model at three turns with a judge that takes 0.2 s a call, 48
calls: what waiting for it costs.

    eager serial    called on the main thread when the rollout is done, one call after the other
    editr2          sixteen calls at once, each turn as soon as it is decoded
    editr2 at once  the same iteration with a judge that answers at once: rollout and training alone

All start from the same weights, sessions and seeds; the learning rate is 0, so every round does the
same work. Gate: every score and every advantage is that of the serial iteration, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from bench.frame import Phases
from editr2.config import Config, replace_nested
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Item, Score
from editr2.rewards.pool import Pool
from editr2.rl import iteration as trainer
from editr2.rl.judging import pool_of
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes

GROUPS, SIBLINGS, TURNS = 2, 8, 3
CALL_S = 0.2
OURS, SERIAL, AT_ONCE = "editr2", "eager serial", "editr2 at once"


class Judge:
    """Scores that follow from the pixels, after so many seconds a turn."""

    names, by_turn, batch = ("IF", "CC"), True, 1

    def __init__(self, seconds: float, concurrency: int | None) -> None:
        self.seconds, self.concurrency = seconds, concurrency
        self.turns = 0

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        return [[self.turn(item, turn) for turn in item.asked] for item in items]

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        time.sleep(self.seconds)
        self.turns += 1
        image, before = item.images[turn].astype(float), item.before(turn)
        return {
            "IF": Score(float(image.mean() / 255)),
            "CC": Score(float(1 - abs(image - before).mean() / 255)),
        }


class Iteration:
    """The trainer's own, on weights that stay."""

    def __init__(self, policy: Any, judge: Judge) -> None:
        rollout = {"sessions": GROUPS, "siblings": SIBLINGS, "turns": TURNS}
        settings = {
            "rollout": {**rollout, "groups_per_batch": 1},
            "train": {"lr": 0.0, "ema": None},
            "credit": {"weights": {"IF": 0.5, "CC": 0.5}},
            "eval": {"sessions": 1},
        }
        self.config = replace_nested(Config(), settings)
        self.judge, self.pool = judge, pool_of(adapt(judge))
        assert isinstance(self.pool, Pool)
        self.source = sessions_for(self.config, policy)
        self.sampler = rollout_sampler(self.config.rollout)
        self.processes = Processes(Accelerator(cpu=True))
        self.state = new_state(self.config.train, policy)
        self.seconds: Mapping[str, float] = {}

    def __call__(self) -> None:
        row = trainer.iteration(
            self.config, self.state, self.source, self.pool, self.sampler, self.processes
        )
        self.seconds = row["seconds"]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [N, T, K] and advantages [N, T] of one iteration."""
        kept = []

        def credit(scores: Any, *arguments: Any) -> Any:
            kept.append((scores.values, assigned(scores, *arguments)))
            return kept[-1][1]

        assigned = trainer.assign_credit
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(trainer, "assign_credit", credit))
            self()
        ((values, given),) = kept
        return values, given.advantage


@pytest.mark.timeout(1800)
def test_judging(compare: Callable[..., Any]) -> None:
    policy = UnifiedPolicy.load()
    runs = {
        SERIAL: Iteration(policy, Judge(CALL_S, None)),
        OURS: Iteration(policy, Judge(CALL_S, 16)),
        AT_ONCE: Iteration(policy, Judge(0.0, None)),
    }

    def gate() -> dict[str, float]:
        expected = runs[SERIAL].result()
        assert expected[0].unique().numel() > TURNS and expected[1].abs().max() > 0
        for name, run in runs.items():
            before = run.judge.turns
            found = run.result()
            assert run.judge.turns - before == GROUPS * SIBLINGS * TURNS, name
            for what, a, b in zip(("scores", "advantages"), found, expected, strict=True):
                assert torch.equal(a, b), f"{name}: {what} differ"
        return {OURS: 0.0, AT_ONCE: 0.0}

    phases = Phases(runs)

    def extra(name: str) -> dict[str, Any]:
        return {
            "phases_s": phases.medians(name),
            "calls": GROUPS * SIBLINGS * TURNS,
            "call_s": runs[name].judge.seconds,
            "at_once": runs[name].judge.concurrency or 1,
        }

    compare(
        op="judging",
        mode=f"{TURNS} turns, embedded model, {CALL_S:g} s a call",
        shape=(GROUPS, SIBLINGS, TURNS),
        dtype="fp32",
        providers=phases.providers(),
        gate=gate,
        extra=extra,
        seconds=60.0,
        min_rounds=5,
    )
