"""GCPO's rewards and advantages (Edit-R1, arXiv 2604.27505, group contrastive policy optimisation).

A person preferred one output of a pair. N traces are sampled of each. A trace of the preferred one
is worth the share of the other's traces that it scores above, and a trace of the other one the
share of the preferred one's traces that it scores below:

    r_w[j] = #{k: s_w[j] > s_l[k]} / N        r_l[j] = #{k: s_l[j] < s_w[k]} / N

Advantages are centred within each group, and not divided by its standard deviation. All of it is
integers until the last division, so an advantage depends on no order, and a group's sum is exactly
0 before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Credit:
    """Of P pairs, the preferred output first.

    rewards: float64 [P, 2, N], shares in [0, 1]. advantages: float32 [P, 2, N], in [-1, 1], each
    group's centred. trains: bool [P]; False where both groups are constant, which has no gradient.
    """

    rewards: Tensor
    advantages: Tensor
    trains: Tensor


def gcpo_credit(scores: Tensor) -> Credit:
    """Rewards and advantages of traces.

    Args:
        scores: floating [P, 2, N], the preferred output's traces first; NaN is a trace without a
            score, which is above and below nobody, counts in N, and has the reward 0.

    Raises ValueError for another shape, no traces, or an infinite score.
    """
    if scores.ndim != 3 or scores.shape[1] != 2 or scores.shape[2] < 1:
        raise ValueError(f"scores: {list(scores.shape)} (accepted: [pairs, 2, traces])")
    if not scores.is_floating_point() or torch.isinf(scores).any():
        raise ValueError("scores: an infinite or whole number (accepted: finite floats, or NaN)")
    above = scores[:, 0, :, None] > scores[:, 1, None, :]  # [P, N preferred, N other]
    counts = torch.stack([above.sum(2), above.sum(1)], 1)
    n = scores.shape[2]
    centred = n * counts - counts.sum(2, keepdim=True)
    advantages = (centred.double() / (n * n)).float()
    return Credit(counts.double() / n, advantages, (centred != 0).any((1, 2)))
