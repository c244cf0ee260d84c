"""A sampler's step and a loss of the operators, in a trainer of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from editr2_kernels import (
    CREDIT_PRESETS,
    backends,
    flow_sigmas,
    group_advantage,
    grpo_loss,
    philox_normal,
    sde_step,
    transition_table,
)


def loss_of(v: Tensor, rewards: Tensor) -> Tensor:
    table = transition_table(flow_sigmas(8, shift=3.0), dynamics="flow-sde", noise_level=0.7)
    seeds, step = torch.tensor([11, 12]), torch.tensor([0, 1])
    x = philox_normal(seeds, 0, (1024, 64))
    out = sde_step(x, v, table, step, seeds)
    credit = group_advantage(rewards, torch.tensor([0, 0]), CREDIT_PRESETS["flow-grpo"])
    advantage: Tensor = credit.advantage[:, 0]
    loss = grpo_loss(x, out.x_next, v, table, step, out.log_prob, advantage)
    loss.loss.backward()
    ratio: Tensor = loss.ratio
    return ratio


available: dict[str, bool] = {name: status.available for name, status in backends().items()}
