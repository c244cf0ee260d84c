"""The on-policy sentinel: before the first update every ratio must be 1; if not, say which tensor
differs first."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from editr2.config import PolicyConfig, RolloutConfig, TrainConfig
from editr2.errors import UserError
from editr2.policies.base import Policy, TextPolicy, at_size
from editr2.rl.rollout import Chunk, Seeds, TurnRecord, Walk, rollout_chunk
from editr2.rl.sampler import Sampler
from editr2_kernels import sde_log_prob


class RatioError(UserError):
    """Training does not reproduce its own rollout."""


def explain_difference(
    policy: Policy,
    chunk: Chunk,
    sampler: Sampler,
    seeds: Seeds,
    settings: PolicyConfig,
    rollout: RolloutConfig,
    t: TrainConfig,
) -> str:
    """Rolls the chunk out again with velocities kept, replays it as training does, and names the
    first difference.

    Order of comparison, turn by turn: rollout against its own repetition (text, images, x, x_next),
    then the replay (the tokens written, velocity with gradients on, log_prob). The replay goes in
    blocks of at most `train.micro_batch`, as training does, and leaves every graph before the next.
    Its forwards with gradient have no backward: where weights are sharded nothing can be trained
    afterwards, and the caller raises.
    """
    again = rollout_chunk(
        policy,
        Chunk(chunk.sessions, chunk.ordinals, chunk.siblings),
        sampler,
        seeds,
        settings,
        rollout=rollout,
        keep_velocity=True,
        goes_on=lambda _, turn: ~chunk.left_out(turn + 1),
    )
    policy, sampler = at_size(policy, chunk.image_size), sampler.of(chunk.image_size)
    walk, sampler = Walk(policy, chunk), sampler.to(again.turns[0].x0.device)
    for turn, (old, new) in enumerate(zip(chunk.turns, again.turns, strict=True)):
        where = f"turn {turn + 1}"
        if _said(old) != _said(new):
            return f"{where}: text: the rollout itself is not repeatable"
        for name in ("x", "x_next", "m_prev", "log_prob"):
            a, b = getattr(old, name), getattr(new, name)
            if a is not None and not torch.equal(a, b):
                return (
                    f"{where}: {name}: the rollout itself is not repeatable (max difference "
                    f"{_gap(a, b):.3g})"
                )
        with torch.no_grad():
            if turn:
                before = chunk.turns[turn - 1]
                walk.drop(~chunk.left_out(turn))
                walk.advance(turn, before.images[torch.isin(before.rollout, walk.rollout).numpy()])
            context, asking = walk.follow(old, range(len(old.text)))
        blocks = torch.arange(len(old.text)).split(t.rows or len(old.text))
        for kind, written in old.written.items():
            for picked in blocks:
                found = _answered(policy, asking[kind], old, kind, picked, settings.temperature)
                for i, log_prob in zip(picked.tolist(), found, strict=True):
                    seen = torch.tensor(written.samples[i].log_prob)
                    gap = _gap(log_prob[: len(seen)], seen)
                    if gap > t.text_ratio_tolerance:
                        return (
                            f"{where}: {kind} of rollout {i}: sampling and scoring its tokens "
                            f"differ by up to {gap:.3g}"
                        )
        assert new.velocity is not None
        for k in range(old.x.shape[1]):
            seen = new.velocity[:, k].float()
            parts = [_predicted(policy, context, old, k, picked, sampler) for picked in blocks]
            velocity, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
            gap = _gap(velocity.to(new.velocity.dtype).float(), seen)
            if gap > 1e-5 * float(seen.abs().max()):
                return (
                    f"{where}, window step {k + 1}: velocity: rollout and training differ by up "
                    f"to {gap:.3g}"
                )
            gap = _gap(log_prob, old.log_prob[:, k])
            if gap > 1e-5:
                return (
                    f"{where}, window step {k + 1}: log_prob: rollout and training differ by up "
                    f"to {gap:.3g}"
                )
    return (
        "none when the chunk is walked as it was rolled out; look at train.packed and "
        "train.micro_batch"
    )


def _said(record: TurnRecord) -> list[list[str]]:
    """The texts that the contexts got."""
    thoughts = record.written.get("thought")
    return [[*record.text], [] if thoughts is None else thoughts.texts]


def _of(policy: Policy, context: Any, record: TurnRecord, picked: Tensor) -> Any:
    return context if len(picked) == len(record.text) else policy.select(context, picked)


def _answered(
    policy: Policy,
    context: Any,
    record: TurnRecord,
    kind: str,
    picked: Tensor,
    temperature: float,
) -> Tensor:
    """Log-probs of the tokens that some rollouts wrote, as training scores them."""
    written, index = record.written[kind], picked.tolist()
    scores = cast(TextPolicy, policy).answer_log_prob(
        _of(policy, context, record, picked),
        written.questions.select(index),
        written.ids(index),
        temperature=temperature,
    )
    return scores.log_prob.detach().cpu()


def _predicted(
    policy: Policy, context: Any, record: TurnRecord, k: int, picked: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Combined velocity and log-prob of some rollouts at window step k, as training computes
    them."""
    on = picked.to(record.x.device)
    x, sigma = record.x[on, k], record.sigma[on, k]
    v = policy.velocity(x, sigma, _of(policy, context, record, picked))
    replay = sde_log_prob(
        x,
        record.x_next[on, k],
        v.v,
        sampler.table,
        record.step_index[on, k],
        m_prev=None if record.m_prev is None else record.m_prev[on, k],
        **v.guidance,
    )
    return v.combined(sigma).detach(), replay.log_prob.detach()


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0
