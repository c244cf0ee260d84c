"""token_log_prob from logits, forward and backward, against log-softmax, gather and entropy as trainers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench.flow_sde import worst

SHAPES = [(512, 32000), (512, 512)]  # the second: the embedded model's vocabulary, roughly
ENTROPY_WEIGHT = 0.01


def loss(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    chosen = log_p.gather(-1, ids[:, None])[:, 0]
    return (weight * chosen + ENTROPY_WEIGHT * entropy).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_token_log_prob(shape: tuple[int, int], compare: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    ids = torch.randint(shape[1], shape[:1], generator=generator)
    weight = torch.linspace(-1.0, 1.0, shape[0])

    def ours(logits: Tensor) -> Tensor:
        out = editr2_kernels.token_log_prob(logits, ids, backend="cpu")
        return (weight * out.log_prob + ENTROPY_WEIGHT * out.entropy).sum()

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(function(logits), logits)[0]

    # Gate. Both are fp32 with sums in other orders: some 1e-6 of the largest value.
    worst("loss", ours(logits), loss(logits, ids, weight), 1e-5)
    first = gradient(ours)
    error = worst("gradient", first, gradient(lambda logits: loss(logits, ids, weight)), 5e-6)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    compare(
        op="token_log_prob",
        mode="forward + backward, entropy",
        shape=shape,
        dtype="fp32",
        providers={
            "eager": lambda: gradient(lambda logits: loss(logits, ids, weight)),
            "compile": lambda: gradient(lambda logits: compiled(logits, ids, weight)),
            "editr2 cpu": lambda: gradient(ours),
        },
        max_error={"editr2 cpu": error},
    )
    assert torch.equal(gradient(ours), first)
