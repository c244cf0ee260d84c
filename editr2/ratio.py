"""The on-policy sentinel: before the first update every ratio must be 1; if not, say which tensor differs first."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from editr2.config import Config
from editr2.errors import UserError
from editr2.policies.base import Policy, TextPolicy
from editr2.rollout import Chunk, Seeds, Walk, rollout_chunk
from editr2.schedule import Sampler
from editr2_kernels import sde_log_prob


class RatioError(UserError):
    """Training does not reproduce its own rollout."""


def explain_difference(policy: Policy, chunk: Chunk, sampler: Sampler, seeds: Seeds, config: Config) -> str:
    """Rolls the chunk out again with velocities kept, replays it as training does, and names the first difference.

    Order of comparison, turn by turn: rollout against its own repetition (text, images, x, x_next), then the replay
    (the intents' tokens, velocity with gradients on, log_prob).
    """
    again = rollout_chunk(
        policy,
        Chunk(chunk.sessions, chunk.ordinals, chunk.siblings),
        sampler,
        seeds,
        config.policy,
        rollout=config.rollout,
        keep_velocity=True,
    )
    walk = Walk(policy, chunk)
    for turn, (old, new) in enumerate(zip(chunk.turns, again.turns, strict=True)):
        where = f"turn {turn + 1}"
        if old.text != new.text:
            return f"{where}: text: the rollout itself is not repeatable"
        for name in ("x", "x_next", "log_prob"):
            a, b = getattr(old, name), getattr(new, name)
            if not torch.equal(a, b):
                return f"{where}: {name}: the rollout itself is not repeatable (max difference {_gap(a, b):.3g})"
        with torch.no_grad():
            if turn:
                walk.advance(turn, chunk.turns[turn - 1].images)
            asking, context = walk.context, walk.instruct(old.text)
        if old.questions is not None and old.intents is not None:
            ids = [intent.ids for intent in old.intents]
            scores = cast(TextPolicy, policy).answer_log_prob(
                asking, old.questions, ids, temperature=config.policy.temperature
            )
            for i, intent in enumerate(old.intents):
                gap = _gap(scores.log_prob[i, : len(ids[i])].detach().cpu(), torch.tensor(intent.log_prob))
                if gap > config.train.text_ratio_tolerance:
                    return f"{where}: intent of rollout {i}: sampling and scoring its tokens differ by up to {gap:.3g}"
        assert new.velocity is not None
        for k in range(old.x.shape[1]):
            sigma, seen = old.sigma[:, k], new.velocity[:, k].float()
            v = policy.velocity(old.x[:, k], sigma, context)
            gap = _gap(v.combined(sigma).detach().to(new.velocity.dtype).float(), seen)
            if gap > 1e-5 * float(seen.abs().max()):
                return f"{where}, window step {k + 1}: velocity: rollout and training differ by up to {gap:.3g}"
            replay = sde_log_prob(old.x[:, k], old.x_next[:, k], v.v, sampler.table, old.step_index[:, k], **v.guidance)
            gap = _gap(replay.log_prob, old.log_prob[:, k])
            if gap > 1e-5:
                return f"{where}, window step {k + 1}: log_prob: rollout and training differ by up to {gap:.3g}"
    return "none when the whole chunk is walked as it was rolled out; look at train.packed and train.micro_batch"


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0
