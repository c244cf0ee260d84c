"""Runs that die at a chosen point: shared by test_record.py and, under torchrun, by itself.

torchrun --nproc_per_node N tests/killed_runs.py RUN POINT RANK exit|term   (POINT 0: not at all)
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from editr2 import training
from editr2.config import Config, replace_nested
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.weights import add_lora
from editr2.rewards.base import Score
from editr2.rl import iteration, loop
from editr2.run import checkpoint
from editr2.run.stop import Stopped
from editr2.run.tracking import MetricsLog, read_metrics

METHODS: dict[str, dict[str, Any]] = {
    "ema": {"train": {"ema": 0.5}},
    "lora": {},
    "nft": {
        "rollout": {"window": 0, "shared_noise": False},
        "train": {"loss": "nft", "old_decay": 0.1},
    },
    "text": {"policy": {"intent": True, "intent_tokens": 2}, "train": {"updates": 2}},
    "kl": {"train": {"kl_weight": 0.1, "ema": 0.9}},
}

# Where a run can die, as it passes them; append stands for the moment before a row is written and
# after.
POINTS: list[tuple[Any, str]] = [
    (loop, "draw_strips"),
    (loop, "evaluate"),
    (iteration, "check_failures"),
    (iteration, "accumulate_gradient"),
    (iteration, "step"),
    (MetricsLog, "append"),
    (loop.State, "save"),
    (checkpoint, "_write_folder"),
    (checkpoint, "_prune"),
    (loop, "replace_folder"),
    (checkpoint.os, "rename"),
    (training, "build_report"),
]


class Killed(BaseException):
    """In place of a SIGKILL: nothing may catch it."""


class Drawing:
    """A judge that draws from every global generator, as users' do."""

    names = ("bright",)

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        noise = (random.random() + float(np.random.rand()) + float(torch.rand(()))) / 30
        return [
            {"bright": Score(min(1.0, float(image.mean() / 255) * 0.9 + noise))} for image in images
        ]


def tiny() -> UnifiedPolicy:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return policy


def configured(out: Path, method: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "out": str(out),
        "rollout": {
            "sessions": 2,
            "siblings": 2,
            "turns": 2,
            "steps": 2,
            "window": 1,
            "groups_per_batch": 2,
        },
        "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
        "policy": {"intent": False},
        "train": {"iterations": 3, "lr": 1e-3, "ema": None, "packed": "off"},
        "eval": {"sessions": 2, "strips": 2, "every": 1},
        "checkpoint": {"every": 2},
    }
    for part in (METHODS[method], changes):
        for key, value in part.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return replace_nested(Config(), values)


def train_once(out: Path, method: str = "ema", **changes: Any) -> Path:
    """As a new process would: nothing of an earlier call is left."""
    torch.manual_seed(len(method))  # another state of the generators than a run starts from
    random.seed(5)
    np.random.seed(6)
    policy = tiny()
    if method == "lora":
        torch.manual_seed(0)
        add_lora(policy.module, 2)
    return training.train(configured(out, method, **changes), policy=policy, reward=Drawing())


@contextlib.contextmanager
def dying_at(number: int, die: Callable[[], None]) -> Iterator[list[str]]:
    """Calls `die` when the run passes its point `number`, counted from 1. Yields the names of the
    points passed."""
    passed: list[str] = []

    def pass_(name: str) -> None:
        passed.append(name)
        if len(passed) == number:
            die()

    def wrapped(real: Any, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            pass_(f"{name}: before")
            result = real(*arguments, **options)
            pass_(f"{name}: after")
            return result

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in POINTS:
            stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name), name)))
        yield passed


def record(run: Path) -> list[dict[str, Any]]:
    """The rows without what is not a number of the run: clocks, and where it was made."""
    rows, dropped = read_metrics(run / "metrics.jsonl")
    assert not dropped
    return [
        {k: v for k, v in row.items() if k not in ("elapsed_s", "seconds", "identity")}
        for row in rows
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    end = {"exit": lambda: os._exit(9), "term": lambda: signal.raise_signal(signal.SIGTERM)}[
        sys.argv[4]
    ]
    with dying_at(int(sys.argv[2]) if os.environ["RANK"] == sys.argv[3] else 0, end):
        try:
            train_once(Path(sys.argv[1]), checkpoint={"every": 2 if sys.argv[4] == "exit" else 99})
        except Stopped as stopped:
            print(f"{os.environ['RANK']} stopped: {stopped}", file=sys.stderr)
            sys.exit(128 + stopped.signum)
