"""Packed replay over walking, by the share of turns that are needed: where
`editr2.rl.replay.PACKED_SHARE` comes from.

python -m bench.packed_share        (about a minute on one core; prints, writes no rows)

Forward and backward of a rollout's stored queries and intents on the embedded model, both plans in
turns; median, 20th and 80th percentile of the ratio.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bench import frame
from editr2.config import Config, replace_nested
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rl.replay import Queries, ReplayOptions, replay
from editr2.rl.rollout import Chunk, Seeds, chunks, rollout_chunk
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for

GROUPS = ((1, 4), (1, 8), (2, 8))  # groups, siblings
TURNS, ROUNDS = 3, 9


def roll_out(policy: UnifiedPolicy, groups: int, siblings: int) -> tuple[Config, Chunk]:
    sizes = {"sessions": groups, "siblings": siblings, "turns": TURNS, "groups_per_batch": groups}
    config = replace_nested(Config(), {"rollout": sizes})
    source = sessions_for(config, policy)
    (chunk,) = chunks([source[i] for i in range(groups)], range(groups), siblings, groups)
    sampler = rollout_sampler(config.rollout)
    return config, rollout_chunk(
        policy, chunk, sampler, Seeds(0, "train"), config.policy, rollout=config.rollout
    )


def seconds(
    policy: UnifiedPolicy,
    chunk: Chunk,
    queries: Queries,
    needed: Tensor,
    temperature: float,
    packed: bool,
) -> float:
    options = ReplayOptions(packed, False, None, temperature, True)
    start = time.perf_counter()
    for part in replay(policy, chunk, queries, options, needed):
        loss = part.velocity.v.float().square().mean() - sum(
            a.scores.log_prob.sum() for a in part.answers
        )
        loss.backward()
    policy.module.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    policy = UnifiedPolicy.load()
    print("rollouts  share needed  packed / walk")
    for groups, siblings in GROUPS:
        config, chunk = roll_out(policy, groups, siblings)
        queries = Queries([r.x for r in chunk.turns], [r.sigma for r in chunk.turns])
        temperature = config.policy.temperature
        for without in range(0, 6):
            needed = torch.ones(chunk.rollouts, TURNS, dtype=torch.bool)
            order = torch.randperm(needed.numel(), generator=torch.Generator().manual_seed(1))
            needed.view(-1)[order[: round(0.1 * without * needed.numel())]] = False
            ratios = []
            for _ in range(ROUNDS + 1):
                walk, packed = (
                    seconds(policy, chunk, queries, needed, temperature, how)
                    for how in (False, True)
                )
                ratios.append(packed / walk)
            low, middle, high = frame.quantiles(ratios[1:])
            share = int(needed.sum()) / (TURNS * int(needed.any(1).sum()))
            print(
                f"{chunk.rollouts:>8}{share:>14.2f}{middle:>15.2f} ({low:.2f}-{high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
