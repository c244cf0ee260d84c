"""Sums, means, products and roots as the references take them: in an order, and with roundings,
that neither batch, threads nor machine can change; and the dtype they compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_ref(value: Tensor) -> Tensor:
    """[B, N] -> [B], summed by halving: additions of pairs only, so neither batch nor threads can
    change a bit."""
    n = value.shape[1]
    width = 1 << (n - 1).bit_length()
    total = torch.nn.functional.pad(value, (0, width - n))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def mean_ref(value: Tensor) -> Tensor:
    """[B, N] -> [B], the sum of `sum_ref` over N."""
    return sum_ref(value) / value.shape[1]


def times_ref(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, exactly 0 where the factor is, whatever the value holds."""
    return torch.where(factor == 0, 0.0, factor * value)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where a reference is given fp64 (gradient checks)."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


def sqrt_ref(value: Tensor) -> Tensor:
    """Correctly rounded fp32 square root; `torch.sqrt` of an fp32 CPU tensor is off by a bit for
    0.7 % of values."""
    return torch.sqrt(value.to(torch.float64)).to(torch.float32)
