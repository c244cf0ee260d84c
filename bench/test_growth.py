"""How an iteration's cost grows, one size at a time: batch, siblings, turns, steps, tokens,
processes.

The reward never ties, so every turn trains at every size. Gate: the trainer's own sentinel,
training meets the rollout's log-probs at that size (of the token sizes: the sampler's step against
its definition). The exponents are fitted from the rows by the report; nothing here is asserted
about time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.providers import worst
from bench.test_iteration import Ours, make_config
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.rewards.base import Score
from editr2.rl.sampler import make_sampler
from editr2.sessions import Session
from editr2_kernels import grpo_loss, sde_step, sde_step_ref

BASE = {"groups": 2, "siblings": 4, "turns": 3, "steps": 4}
SIZES: dict[str, list[int]] = {
    "groups": [1, 2, 4, 8],
    "siblings": [2, 4, 8, 16],
    "turns": [1, 2, 4, 8],
    "steps": [4, 8, 16],
}
SIDES = [6, 12, 18, 24]  # latent tokens: 36, 144, 324, 576
PROCESSES = [1, 2]


class Brightness:
    """Mean and spread of the pixels: no two rollouts score alike."""

    names = ("bright",)

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]:
        return [
            {"bright": Score(float(image.mean() / 255 + image.std() / 512))} for image in images
        ]


def iteration(**sizes: int) -> Ours:
    s = BASE | sizes
    config = make_config(
        s["groups"],
        s["siblings"],
        s["turns"],
        rollout={"steps": s["steps"]},
        credit={"preset": "flow-grpo", "weights": {"bright": 1.0}},
    )
    ours = Ours(config, UnifiedPolicy.load())
    ours.reward = Brightness()
    return ours


@pytest.mark.timeout(900)
@pytest.mark.parametrize("axis", SIZES)
def test_growth_of_an_iteration(axis: str, compare: Callable[..., Any]) -> None:
    runs = {f"editr2, {axis} {size}": iteration(**{axis: size}) for size in SIZES[axis]}
    phases: dict[str, list[Mapping[str, float]]] = defaultdict(list)

    def timed(name: str) -> None:
        runs[name]()
        phases[name].append(runs[name].seconds)

    def gate() -> dict[str, float]:
        errors = {}
        for name, run in runs.items():
            row = run()
            errors[name] = row["ratio_error"]
            assert row["advantage_abs"] > 0 and errors[name] < 1e-5, (
                f"{name}: ratio differs from 1 by {errors[name]}"
            )
        return errors

    def extra(name: str) -> dict[str, Any]:
        seconds = {
            p: round(statistics.median(s[p] for s in phases[name]), 5) for p in phases[name][0]
        }
        return {"axis": axis, "size": SIZES[axis][list(runs).index(name)], "phases_s": seconds}

    compare(
        op="growth",
        mode=axis,
        shape=tuple(BASE.values()),
        dtype="fp32",
        providers={name: partial(timed, name) for name in runs},
        gate=gate,
        extra=extra,
        seconds=5.0,
        min_rounds=3,
    )


@pytest.mark.timeout(900)
def test_growth_with_tokens(compare: Callable[..., Any]) -> None:
    """One step rolled out and trained behind a source image, eight samples, on larger latents and
    random weights."""
    batch = 8
    sampler = make_sampler(4, dynamics="cps", noise_level=0.7, window=2)
    step_index, seed = torch.full((batch,), sampler.steps), torch.arange(batch)

    def prepared(side: int) -> tuple[UnifiedPolicy, torch.Tensor, Any]:
        policy = new_embedded_policy(UnifiedConfig(max_latent_size=side), seed=0)
        torch.nn.init.normal_(
            policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        images = np.random.default_rng(0).integers(
            0, 256, (batch, *policy.image_size, 3), dtype=np.uint8
        )
        with torch.no_grad():
            context = policy.encode(images)
        x = torch.randn(batch, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
        return policy, x, context

    cases = {f"editr2, tokens {side * side}": (side * side, *prepared(side)) for side in SIDES}

    def run(name: str) -> None:
        _, policy, x, context = cases[name]
        policy.module.zero_grad()
        with torch.no_grad():
            v = policy.velocity(x, torch.ones(batch), context).v
            done = sde_step(x, v, sampler.table, step_index, seed)
        v = policy.velocity(x, torch.ones(batch), context).v
        advantage = torch.linspace(-1, 1, batch)
        grpo_loss(
            x, done.x_next, v, sampler.table, step_index, done.log_prob, advantage, clip=1e-4
        ).loss.backward()

    def gate() -> dict[str, float]:
        errors = {}
        for name, (_, policy, x, context) in cases.items():
            with torch.no_grad():
                v = policy.velocity(x, torch.ones(batch), context).v
            found, expected = (
                f(x, v, sampler.table, step_index, seed) for f in (sde_step, sde_step_ref)
            )
            errors[name] = worst(name, found.x_next, expected.x_next, 1e-6)
        return errors

    compare(
        op="growth",
        mode="tokens",
        shape=(batch,),
        dtype="fp32",
        providers={name: partial(run, name) for name in cases},
        gate=gate,
        extra=lambda name: {"axis": "tokens", "size": cases[name][0]},
        seconds=5.0,
        min_rounds=5,
    )


def across_processes(count: int, iterations: int) -> list[dict[str, Any]]:
    """The rows of some iterations on `count` processes, one thread each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
    ]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, "-m", "bench.growth_process", str(iterations)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(900)
def test_growth_over_processes(compare: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    """The same iteration (eight groups) shared by one and two processes with a thread each."""
    iterations = 3 if request.config.getoption("--seconds") else 6
    names = {f"editr2, processes {count}": count for count in PROCESSES}
    rows: dict[str, list[dict[str, Any]]] = {}

    def gate() -> dict[str, float]:
        if not rows:
            rows.update(
                {name: across_processes(count, iterations) for name, count in names.items()}
            )
        one = rows[next(iter(names))][0]
        for name, found in rows.items():
            assert abs(found[0]["reward"] - one["reward"]) < 1e-4, (
                f"{name}: other rewards than on one process"
            )
            assert abs(found[0]["grad_norm"] / one["grad_norm"] - 1) < 1e-3, (
                f"{name}: another gradient"
            )
        return {name: max(row["ratio_error"] for row in found) for name, found in rows.items()}

    def extra(name: str) -> dict[str, Any]:
        seen = [row["seconds"] for row in rows[name][1:]]
        seconds = {p: round(statistics.median(s[p] for s in seen), 5) for p in seen[0]}
        return {"axis": "processes", "size": names[name], "phases_s": seconds, "threads": 1}

    compare(
        op="growth",
        mode="processes",
        shape=(8, BASE["siblings"], BASE["turns"], BASE["steps"]),
        dtype="fp32",
        providers=dict.fromkeys(names),
        gate=gate,
        times=lambda: {
            name: [sum(r["seconds"].values()) * 1e3 for r in found[1:]]
            for name, found in rows.items()
        },
        extra=extra,
    )
