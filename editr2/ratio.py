"""The on-policy sentinel: before the first update every ratio must be 1; if not, say which tensor differs first."""

from __future__ import annotations

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.errors import UserError
from editr2.policies.base import Policy
from editr2.rollout import Chunk, Seeds, Walk, rollout_chunk
from editr2.schedule import Sampler
from editr2_kernels import sde_log_prob


class RatioError(UserError):
    """Training does not reproduce its own rollout."""


def explain_difference(policy: Policy, chunk: Chunk, sampler: Sampler, seeds: Seeds, options: PolicyConfig) -> str:
    """Rolls the chunk out again with velocities kept, replays it as training does, and names the first difference.

    Order of comparison, turn by turn: rollout against its own repetition (text, images, x, x_next), then the replay
    (velocity with gradients on, log_prob).
    """
    again = rollout_chunk(
        policy, Chunk(chunk.sessions, chunk.ordinals, chunk.siblings), sampler, seeds, options, keep_velocity=True
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
            context = walk.instruct(old.text)
        assert new.velocity is not None
        for k in range(old.x.shape[1]):
            v = policy.velocity(old.x[:, k], old.sigma[:, k], context).detach()
            gap = _gap(v.float(), new.velocity[:, k])
            if gap > 1e-5 * float(new.velocity[:, k].abs().max()):
                return f"{where}, window step {k + 1}: velocity: rollout and training differ by up to {gap:.3g}"
            replay = sde_log_prob(old.x[:, k], old.x_next[:, k], v, sampler.table, old.step_index[:, k])
            gap = _gap(replay.log_prob, old.log_prob[:, k])
            if gap > 1e-5:
                return f"{where}, window step {k + 1}: log_prob: rollout and training differ by up to {gap:.3g}"
    return "no single tensor differs by more than rounding; the deviations add up"


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
