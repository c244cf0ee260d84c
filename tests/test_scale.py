"""What `editr2 check --processes N` says of many processes: arithmetic over an editor of known
costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from editr2.check.devices import find_device
from editr2.check.editors import Sizes
from editr2.check.estimate import merged, plan
from editr2.check.links import gather_seconds
from editr2.check.meter import Cost
from editr2.check.scale import Limits, limits, lines, uneven
from editr2.config import Config, replace_nested
from editr2.policies.blueprint import velocity_passes
from editr2.rl.sampler import make_sampler

H100 = find_device("h100")
SAMPLER = make_sampler(4, dynamics="cps", noise_level=0.7, window=2)


def editor(flops: float, trainable: int = 1000) -> SimpleNamespace:
    """One whose every step costs the same; 40 GB in 50 blocks are frozen."""
    cost = Cost({torch.bfloat16: int(flops)}, 0, 0, 1, 0, 0)
    sizes = Sizes(2 * 10**10, trainable, 4 * 10**10, 8 * 10**8, 0, 0, 4 * trainable, 0, 0, 0, 0, {})
    return SimpleNamespace(
        writes_text=False,
        thinks=False,
        prompt_per_output=False,
        read_again=lambda prompts: False,
        encodes_again=lambda turn, images: False,
        passes=velocity_passes,
        carried=lambda step: 0,
        sizes=lambda: sizes,
        cost=lambda step, batch, turn, again="off": cost,
    )


def found(
    processes: int,
    made: SimpleNamespace,
    turns: list[int],
    reward: float = 0.0,
    **settings: object,
) -> tuple[Limits, Config]:
    values = {"policy": {"shard": True, "lora_rank": 4}, "checkpoint": {"every": 5}, **settings}
    config = replace_nested(Config(), values)
    result = SimpleNamespace(seconds={"reward": reward}, judges=())
    return limits(config, made, H100, SAMPLER, turns, processes, result), config


BUSY, IDLE = 1e15, 1e12


@pytest.mark.parametrize(
    "processes, made, turns, more, largest, remedy",
    [
        (8, editor(BUSY), [3], {"rollout": {"sessions": 12}}, "groups do not go round", ": 16"),
        (1024, editor(IDLE), [3], {"rollout": {"sessions": 1024}}, "gathers", "shard_group: 8"),
        (8, editor(IDLE), [3], {"rollout": {"sessions": 8}}, "gathers", "siblings"),
        (8, editor(BUSY), [1, 8], {"rollout": {"sessions": 8}}, "sessions of other", "sessions"),
        (8, editor(BUSY), [3], {"rollout": {"sessions": 8}, "reward": 99.0}, "judges", "ahead"),
        (
            8,
            editor(BUSY, 2 * 10**10),
            [3],
            {"rollout": {"sessions": 8}, "checkpoint": {"every": 1}},
            "checkpoints",
            "checkpoint.every",
        ),
        (
            64,
            editor(IDLE, 2 * 10**10),
            [3],
            {"policy": {}, "rollout": {"sessions": 64}, "checkpoint": {"every": 10**6}},
            "sum of gradients",
            "lora_rank",
        ),
    ],
)
def test_what_limits_is_named(processes, made, turns, more, largest, remedy):
    more = dict(more)
    reward = more.pop("reward", 0.0)
    limit, config = found(processes, made, turns, reward, **more)
    assert limit.largest.name.startswith(largest) and remedy in limit.largest.remedy
    said = "\n".join(lines(limit, config, turns, processes))
    assert f"most of the waiting: {limit.largest.name}; what helps: {limit.largest.remedy}" in said
    assert sum(part.seconds for part in limit.parts) + limit.computing == limit.seconds
    assert all(part.seconds >= 0 for part in limit.parts)


def test_the_sizes_of_the_parts():
    # 12 groups over 8 processes: two on some, one on others; all wait for those with two.
    made = editor(BUSY)
    limit, config = found(8, made, [3], **{"rollout": {"sessions": 12}})
    calls = sum(call.times for call in merged(plan(config, made, SAMPLER, [3], 8)))
    velocities = sum(
        call.times * {"velocity": 1, "train": 2}.get(call.step, 0)
        for call in merged(plan(config, made, SAMPLER, [3], 8))
    )
    copied = 2 * 4e10 / H100.speed.bandwidth
    computed = calls * BUSY / H100.speed.flops[torch.bfloat16] + velocities * copied
    part = {p.name: p.seconds for p in limit.parts}
    assert part["groups do not go round"] == pytest.approx(computed / 4)
    assert limit.computing == pytest.approx(computed * 3 / 4)
    assert not lines(limit, config, [3], 1)
    # In one machine a gather is NVLink's time alone; from several, what enters a machine through
    # its eight cards, and the steps of the ring.
    assert gather_seconds(4e10, 51, 8, H100) == 4e10 * (1 - 1 / 8) / H100.peers
    ring = 51 * (128 * 14e-6 + 896 * 3.4e-6)
    cards = 4e10 * (1 - 1 / 128) / (8 * 0.7 * 50e9)
    assert gather_seconds(4e10, 51, 1024, H100) == pytest.approx(cards + ring)
    # One session each, of one or eight turns: nearly surely somebody has eight, the mean is 4.5.
    assert uneven([1, 8], 1, 64) == pytest.approx(8 / 4.5, rel=0.1)
    assert uneven([1, 8], 100, 8) < 1.15 and uneven([3, 3], 1, 64) == 1
