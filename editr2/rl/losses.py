"""The training terms as functions of tensors: image loss of some rows (GRPO or NFT) and the
intents' policy loss.

    loss = 1/(samples * Q) * sum over trained (rollout, turn) of [ sum over its Q places of image +
    lambda * text ]

GRPO's places are the window's steps; NFT's are noise levels drawn anew for every update. Sources:
Edit-R2 (arXiv 2606.05950), Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319),
DiffusionNFT (arXiv 2509.16117).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editr2.config import TrainConfig
from editr2.policies.base import Velocity
from editr2.rl.replay import Answers, Places
from editr2.rl.rollout import Chunk, Seeds
from editr2.rl.sampler import Sampler
from editr2_kernels import grpo_loss, nft_loss, nft_optimality, philox_normal, sde_log_prob


@dataclass(frozen=True)
class Rows:
    """Training rows of a chunk in the order of `Places`, R in all.

    sigma, advantage, mask: [R]. GRPO: x, x_next [R, *latent], step_index and old_log_prob [R],
    v_old (guarded) as x. NFT: x is the noised latent, x_next the clean one, noise what was added.
    """

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    advantage: Tensor
    mask: Tensor
    step_index: Tensor | None = None
    old_log_prob: Tensor | None = None
    v_old: Tensor | None = None
    noise: Tensor | None = None

    def pick(self, rows: Tensor) -> Rows:
        """Some of the rows; all of them in order cost nothing."""
        if len(rows) == len(self.sigma) and torch.equal(rows, torch.arange(len(rows))):
            return self
        on = rows.to(self.x.device)
        picked: dict[str, Any] = {
            name: None if x is None else x[on] for name, x in vars(self).items()
        }
        return Rows(**picked)


@dataclass(frozen=True)
class Term:
    """A loss with gradient, and its metrics as 0-dim tensors: means over the rows that count (of
    the text: numbers of tokens), and the largest |ratio - 1|."""

    loss: Tensor
    means: dict[str, Tensor]
    ratio_error: Tensor | None = None
    log_prob: Tensor | None = None


def window_places(chunk: Chunk) -> Places:
    """GRPO's places: the transitions the rollout stored."""
    return Places([r.x for r in chunk.turns], [r.sigma for r in chunk.turns])


def noised_places(
    chunk: Chunk, sampler: Sampler, seeds: Seeds, update: int, draws: int
) -> tuple[Places, list[Tensor]]:
    """NFT's places x_t = (1 - sigma) x0 + sigma noise, and the noise: `draws` noise levels a turn
    among the sampler's own, one from each of as many equal parts of its steps."""
    xs, sigmas, noises = [], [], []
    for turn, record in enumerate(chunk.turns):
        seed = seeds.noised(chunk, record.rollout, turn, update)
        uniform = (seed & 0xFFFFFF).double() / (1 << 24)
        index = (
            ((torch.arange(draws) + uniform[:, None]) * (sampler.steps / draws))
            .long()
            .clamp(max=sampler.steps - 1)
        )
        x0, on = record.x0.float(), record.x0.device
        noise = torch.stack(
            [philox_normal(seed.to(on), place, x0.shape[1:]) for place in range(draws)], 1
        )
        sigma = sampler.sigmas[index.to(on)]
        wide = sigma.view(*sigma.shape, *[1] * (x0.dim() - 1))
        xs.append(torch.lerp(x0[:, None].expand_as(noise), noise, wide))
        sigmas.append(sigma)
        noises.append(noise)
    return Places(xs, sigmas), noises


def window_rows(chunk: Chunk, places: Places, advantage: Tensor, mask: Tensor) -> Rows:
    """GRPO's rows. advantage [rollouts, T], mask [rollouts, T] of the chunk; old log-probs are the
    rollout's."""
    records = chunk.turns
    velocity = [r.velocity for r in records if r.velocity is not None]
    return replace(
        _rows(chunk, places, [r.x_next.flatten(0, 1) for r in records], advantage, mask),
        step_index=torch.cat([r.step_index.flatten() for r in records]),
        old_log_prob=torch.cat([r.log_prob.flatten() for r in records]),
        v_old=torch.cat([v.flatten(0, 1) for v in velocity]) if velocity else None,
    )


def noised_rows(
    chunk: Chunk, places: Places, noise: list[Tensor], advantage: Tensor, mask: Tensor
) -> Rows:
    """NFT's rows; `x_next` is the clean latent."""
    clean = [
        r.x0.float().repeat_interleave(n.shape[1], 0)
        for r, n in zip(chunk.turns, noise, strict=True)
    ]
    return replace(
        _rows(chunk, places, clean, advantage, mask),
        noise=torch.cat([n.flatten(0, 1) for n in noise]),
    )


def _rows(
    chunk: Chunk, places: Places, following: list[Tensor], advantage: Tensor, mask: Tensor
) -> Rows:
    device = places.x[0].device
    counts = [s.shape[1] for s in places.sigma]
    own = [
        (advantage[r.rollout, t].repeat_interleave(q), mask[r.rollout, t].repeat_interleave(q))
        for t, (r, q) in enumerate(zip(chunk.turns, counts, strict=True))
    ]
    return Rows(
        torch.cat([x.flatten(0, 1) for x in places.x]),
        torch.cat(following),
        torch.cat([s.flatten() for s in places.sigma]),
        torch.cat([a for a, _ in own]).to(device),
        torch.cat([m for _, m in own]).to(device),
    )


def replayed_log_prob(rows: Rows, velocity: Velocity, sampler: Sampler) -> Tensor:
    """Log-probs of the rows under a velocity, without gradient."""
    assert rows.step_index is not None
    with torch.no_grad():
        branches: dict[str, Any] = {
            k: v.detach() if isinstance(v, Tensor) else v for k, v in velocity.guidance.items()
        }
        out = sde_log_prob(
            rows.x, rows.x_next, velocity.v.detach(), sampler.table, rows.step_index, **branches
        )
    return out.log_prob


def grpo_term(
    t: TrainConfig,
    rows: Rows,
    velocity: Velocity,
    v_ref: Tensor | None,
    sampler: Sampler,
    normalizer: float,
) -> Term:
    """Clipped policy loss of transitions, with the KL to the reference where there is one."""
    assert rows.step_index is not None and rows.old_log_prob is not None
    out = grpo_loss(
        rows.x,
        rows.x_next,
        velocity.v,
        sampler.table,
        rows.step_index,
        rows.old_log_prob,
        rows.advantage,
        clip=(t.clip_low, t.clip_high),
        advantage_clip=None,
        v_ref=v_ref,
        kl_weight=t.kl_weight if v_ref is not None else 0.0,
        kl_scale=t.kl_scale,
        guard=t.guard,
        v_old=rows.v_old if t.guard else None,
        mask=rows.mask,
        normalizer=normalizer,
        **velocity.guidance,
    )
    seen = out.metrics
    means = {"kl": seen.kl, "clipped": seen.clip_fraction_low + seen.clip_fraction_high}
    return Term(out.loss, means, seen.ratio_max_deviation, out.log_prob.detach())


def nft_term(
    t: TrainConfig,
    rows: Rows,
    velocity: Velocity,
    v_old: Tensor,
    v_ref: Tensor | None,
    normalizer: float,
) -> Term:
    """DiffusionNFT's loss; `t.kl_weight` weighs mean((v - v_ref)^2)."""
    assert rows.noise is not None
    out = nft_loss(
        rows.x_next,
        rows.noise,
        rows.sigma,
        velocity.v,
        v_old,
        nft_optimality(rows.advantage),
        beta=t.nft_beta,
        v_ref=v_ref,
        ref_weight=t.kl_weight,
        mask=rows.mask,
        normalizer=normalizer,
    )
    return Term(out.loss, {"kl": out.metrics.reference})


def text_term(
    t: TrainConfig,
    answers: Answers,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    normalizer: float,
) -> Term:
    """The intents' policy loss: per sample the mean over its tokens of max(-A rho, -A clip(rho, 1
    -+ text_clip)).

    old: [B, L] log-probs of the sampling policy; advantage, mask: [B], those of the turn.
    """
    log_prob, valid = answers.scores.log_prob, answers.scores.valid
    counted = valid & mask[:, None] & (valid.sum(1) > 0)[:, None]
    # A masked sample must not reach the gradient even as 0 * inf.
    ratio = torch.where(counted, log_prob - old, 0.0).exp()
    clipped = ratio.clamp(1 - t.text_clip, 1 + t.text_clip)
    token = torch.maximum(-advantage[:, None] * ratio, -advantage[:, None] * clipped)
    sample = torch.where(counted, token, 0.0).sum(1) / valid.sum(1).clamp(min=1)
    outside = counted & ((ratio - 1).abs() > t.text_clip)
    with torch.no_grad():
        deviation = torch.where(valid, log_prob - old, 0.0).exp().sub(1).abs()
        error = deviation.max() if deviation.numel() else deviation.new_zeros(())
    return Term(
        sample.sum() / normalizer,
        {"clipped": outside.sum().float(), "tokens": counted.sum().float()},
        error,
    )
