"""token_log_prob against log-softmax, gather and entropy as trainers write them, from logits and
from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench import sizes
from bench.flow_sde import normal
from bench.providers import MODES, compare_loss
from bench.sizes import FP32, Dtypes, Size

BF16 = Dtypes("bf16", torch.bfloat16, torch.bfloat16)
# [tokens, vocabulary]. On a CPU the second is about the embedded model's; on a GPU both are
# language models'.
CPU, CUDA = [(512, 32000), (512, 512)], [(8192, 32000), (1024, 152064)]
WIDTH = 512  # of hidden states
ENTROPY_WEIGHT = 0.01


def loss(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    chosen = log_p.gather(-1, ids[:, None])[:, 0]
    return (weight * chosen + ENTROPY_WEIGHT * entropy).sum()


def loss_of_hidden(hidden: Tensor, head: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return loss(hidden @ head.T, ids, weight)


def drawn(size: Size) -> tuple[Tensor, Tensor]:
    """ids [M] and the weight [M] of their log-probs."""
    ids = torch.randint(size.shape[1], size.shape[:1], generator=torch.Generator().manual_seed(0))
    return ids.to(size.device), torch.linspace(-1.0, 1.0, size.shape[0], device=size.device)


def summed(out: editr2_kernels.TokenLogProb, weight: Tensor) -> Tensor:
    return (weight * out.log_prob + ENTROPY_WEIGHT * out.entropy).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", sizes.shapes(CPU, CUDA, [FP32, BF16]))
def test_token_log_prob(size: Size, mode: str, compare: Callable[..., Any]) -> None:
    def inputs() -> tuple[Tensor, ...]:
        return (3 * normal(size, 0)).to(size.dtypes.x).requires_grad_(), *drawn(size)

    def operator(logits: Tensor, i: tuple[Tensor, ...], backend: str) -> Tensor:
        return summed(editr2_kernels.token_log_prob(logits, i[1], backend=backend), i[2])

    compare_loss(
        compare,
        op="token_log_prob",
        size=size,
        mode=mode,
        variant=", entropy",
        inputs=inputs,
        leaf=lambda i: i[0],
        arguments=lambda i: i[1:],
        eager={"": loss},
        operator=operator,
        read=size.bytes(x=1),
        written=size.bytes(x=1),
        flops=12 * size.elements,
        atol=5e-6,
    )


@pytest.mark.full
@pytest.mark.parametrize("size", sizes.shapes(CPU[:1], CUDA[:1], [FP32]))
def test_token_log_prob_of_hidden(size: Size, compare: Callable[..., Any]) -> None:
    """The head's product is most of the time in either; what differs is that ours never holds the
    logits."""
    tokens, vocabulary = size.shape

    def inputs() -> tuple[Tensor, ...]:
        hidden = normal(Size(size.device, (tokens, WIDTH)), 0).requires_grad_()
        head = normal(Size(size.device, (vocabulary, WIDTH)), 1) * (3 / WIDTH**0.5)
        return hidden, head, *drawn(size)

    def operator(hidden: Tensor, i: tuple[Tensor, ...], backend: str) -> Tensor:
        return summed(editr2_kernels.token_log_prob((hidden, i[1]), i[2], backend=backend), i[3])

    product = 2 * tokens * vocabulary * WIDTH
    compare_loss(
        compare,
        op="token_log_prob",
        size=size,
        mode="forward + backward",
        variant=f", entropy, from hidden of {WIDTH}",
        inputs=inputs,
        leaf=lambda i: i[0],
        arguments=lambda i: i[1:],
        eager={"": loss_of_hidden},
        operator=operator,
        read=4 * WIDTH * (tokens + vocabulary),
        written=4 * WIDTH * tokens,
        flops=12 * size.elements + 2 * product,
        atol=2e-5,  # sums over the vocabulary of products that were summed in another order
    )
