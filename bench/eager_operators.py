"""The trainer's operators as trainers write them in PyTorch, op for op, to run the trainer on:
baseline `eager`.

Host waits are kept: every sample searches the schedule for its timestep (a `nonzero` and an `item`
each), and credit is a NumPy loop over prompts. Two things are ours, so that results are equal and
can be compared: the noise, which counter-based costs about what `torch.randn` does, and the
rounding to the storage dtype before a sample is scored.

Only what the default settings use is here: flow-SDE and CPS without guidance, the KL per step,
credit per turn with fused rewards. Anything else raises NotImplementedError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import editr2.policies.unified.policy
import editr2.rl.compiled_step
import editr2.rl.credit
import editr2.rl.losses
import editr2.rl.sentinel
from editr2.config import RolloutConfig
from editr2_kernels import (
    CreditOptions,
    GroupAdvantage,
    GrpoLoss,
    GrpoMetrics,
    SdeLogProb,
    SdeStep,
    TokenLogProb,
    philox_normal,
)


def _supported(**asked: bool) -> None:
    if missing := [name for name, needed in asked.items() if needed]:
        raise NotImplementedError(f"{', '.join(missing)}: not in the eager baseline")


class EagerSampler:
    """Step, replay and loss of one dynamics over tables of ODE rows and then SDE rows
    (`editr2.rl.sampler.Sampler`)."""

    def __init__(self, rollout: RolloutConfig) -> None:
        _supported(**{f"dynamics {rollout.dynamics}": rollout.dynamics not in ("cps", "flow-sde")})
        self.dynamics, self.noise_level = rollout.dynamics, rollout.noise_level

    def _look_up(
        self, table: Tensor, step_index: Tensor, dims: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sigma, the next one, the noise level (0 on ODE rows) and the largest sigma below 1, all
        [B, 1, ...]."""
        steps = len(table) // 2
        sigmas = torch.cat([table[:steps, 6], table[steps - 1 : steps, 7]])
        schedule, timesteps = sigmas[:-1] * 1000, sigmas[step_index % steps] * 1000
        place = [int((schedule == t).nonzero()[0].item()) for t in timesteps]
        wide = (-1, *[1] * (dims - 1))
        level = torch.where(step_index >= steps, self.noise_level, 0.0)
        after = [i + 1 for i in place]
        return sigmas[place].view(wide), sigmas[after].view(wide), level.view(wide), sigmas[1]

    def transition(
        self, x: Tensor, v: Tensor, table: Tensor, step_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (0 on ODE rows)."""
        sigma, after, level, sigma_max = self._look_up(table, step_index, x.dim())
        x, v = x.float(), v.float()
        if self.dynamics == "cps":
            std = after * torch.sin(level * math.pi / 2)
            clean, noise = x - sigma * v, x + v * (1 - sigma)
            return clean * (1 - after) + noise * torch.sqrt(after**2 - std**2), std
        delta = after - sigma
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * level
        mean = (
            x * (1 + g**2 / (2 * sigma) * delta)
            + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * delta
        )
        return mean, g * torch.sqrt(-delta)

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """[B]; 0 where there is no noise."""
        density = -((x_next.float() - mean) ** 2)
        if self.dynamics != "cps":
            density = density / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        scored = density.mean(dim=tuple(range(1, density.dim())))
        return torch.where(std.flatten() > 0, scored, 0.0)

    def sde_step(
        self, x: Tensor, v: Tensor, table: Tensor, step_index: Tensor, seed: Tensor, **more: Any
    ) -> SdeStep:
        _supported(more=any(value is not None and value is not False for value in more.values()))
        mean, std = self.transition(x, v, table, step_index)
        noise = philox_normal(seed, step_index, x.shape[1:])
        x_next = (mean + std * noise).to(x.dtype)
        return SdeStep(x_next, self.log_prob(x_next, mean, std))

    def sde_log_prob(
        self,
        x: Tensor,
        x_next: Tensor,
        v: Tensor,
        table: Tensor,
        step_index: Tensor,
        **more: Any,
    ) -> SdeLogProb:
        _supported(more=any(value is not None for value in more.values()))
        return SdeLogProb(self.log_prob(x_next, *self.transition(x, v, table, step_index)), None)

    def grpo_loss(
        self,
        x: Tensor,
        x_next: Tensor,
        v: Tensor,
        table: Tensor,
        step_index: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        *,
        clip: tuple[float, float],
        mask: Tensor,
        normalizer: float,
        advantage_clip: float | None = None,
        v_ref: Tensor | None = None,
        kl_weight: float = 0.0,
        kl_scale: str = "step",
        guard: bool = False,
        v_old: Tensor | None = None,
        **more: Any,
    ) -> GrpoLoss:
        _supported(
            more=any(value is not None for value in more.values()),
            guard=guard,
            kl_scale=v_ref is not None and kl_scale != "step",
        )
        mean, std = self.transition(x, v, table, step_index)
        log_prob = self.log_prob(x_next, mean, std)
        if advantage_clip is not None:
            advantage = advantage.clamp(-advantage_clip, advantage_clip)
        ratio = torch.exp(log_prob - old_log_prob)
        policy = torch.maximum(
            -advantage * ratio, -advantage * ratio.clamp(1 - clip[0], 1 + clip[1])
        )
        kl = torch.zeros_like(policy)
        if v_ref is not None:
            with torch.no_grad():
                mean_ref, _ = self.transition(x, v_ref, table, step_index)
            kl = ((mean - mean_ref) ** 2).mean(dim=tuple(range(1, mean.dim()))) / (
                2 * std.flatten() ** 2
            )
        counted = mask.float()
        loss = ((policy + kl_weight * kl) * counted).sum() / normalizer
        rows = counted.sum().clamp(min=1)
        with torch.no_grad():

            def mean_of(values: Tensor) -> Tensor:
                return (values.float() * counted).sum() / rows

            metrics = GrpoMetrics(
                mean_of(ratio),
                ((ratio - 1).abs() * counted).max(),
                mean_of(ratio < 1 - clip[0]),
                mean_of(ratio > 1 + clip[1]),
                mean_of((log_prob - old_log_prob) ** 2 / 2),
                mean_of(kl),
                mean_of(policy),
                (~torch.isfinite(loss)).float(),
            )
        return GrpoLoss(loss, log_prob.detach(), ratio.detach(), kl.detach(), metrics)


def token_log_prob(
    logits: Tensor | tuple[Tensor, Tensor],
    ids: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenLogProb:
    """Of the whole vocabulary, then one picked; (hidden, weight) gives the logits."""
    if isinstance(logits, tuple):
        logits = logits[0] @ logits[1].T
    table = torch.log_softmax(logits.float() / temperature, dim=-1)
    counted = ids != ignore_index
    picked = table.gather(-1, torch.where(counted, ids, 0)[..., None])[..., 0]
    entropy = -(table.exp() * table).sum(-1)
    return TokenLogProb(torch.where(counted, picked, 0.0), torch.where(counted, entropy, 0.0))


def group_advantage(
    scores: Tensor, group: Tensor, options: CreditOptions, *, weights: Tensor, mask: Tensor
) -> GroupAdvantage:
    """In NumPy and float64, prompt by prompt."""
    _supported(
        aggregate=options.aggregate != "none",
        fusion=options.fusion != "reward",
        eps_mode=options.eps_mode != "add",
        unbiased=options.unbiased,
        drops=options.min_std is not None or options.max_mean is not None,
    )
    values, valid, keys = scores.double().numpy(), mask.numpy(), group.numpy()
    reward = np.where(valid, values @ weights.double().numpy(), 0.0)
    live = valid.copy()
    if options.filter_reward is not None:
        failed = valid & (values[:, :, options.filter_reward] == 0)
        live &= ~(np.cumsum(failed, 1) - failed > 0)
    counted = valid if options.filter_in_statistics else live
    advantage = np.zeros_like(reward)
    turns = (
        [slice(t, t + 1) for t in range(reward.shape[1])]
        if options.baseline == "session_turn"
        else [slice(None)]
    )
    spread = reward[counted].std() if counted.any() else 0.0
    for key in np.unique(keys):
        rows = keys == key
        for turn in turns:
            own, seen = reward[rows, turn], counted[rows, turn]
            if not seen.any():
                continue
            centred = own - own[seen].mean()
            if np.ptp(own[seen]) == 0:  # rounding of a mean is no advantage
                centred = np.zeros_like(own)
            if options.std != "none":
                centred = centred / (
                    (own[seen].std() if options.std == "group" else spread) + options.eps
                )
            advantage[rows, turn] = centred
    if options.clip is not None:
        advantage = np.clip(advantage, -options.clip, options.clip)
    return GroupAdvantage(
        torch.from_numpy(np.where(live, advantage, 0.0)).float(), torch.from_numpy(live)
    )


@contextmanager
def eager_operators(rollout: RolloutConfig) -> Iterator[None]:
    """The trainer runs on these operators inside."""
    eager = EagerSampler(rollout)
    swaps: list[tuple[Any, str, Any]] = [
        (editr2.rl.compiled_step, "sde_step", eager.sde_step),
        (editr2.rl.losses, "grpo_loss", eager.grpo_loss),
        (editr2.rl.losses, "sde_log_prob", eager.sde_log_prob),
        (editr2.rl.sentinel, "sde_log_prob", eager.sde_log_prob),
        (editr2.policies.unified.policy, "token_log_prob", token_log_prob),
        (editr2.rl.credit, "group_advantage", group_advantage),
    ]
    with ExitStack() as stack:
        for module, name, function in swaps:
            stack.enter_context(mock.patch.object(module, name, function))
        yield
