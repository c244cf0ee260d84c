"""token_log_prob: forward one program a row, walking the vocabulary twice in blocks; backward one
program a chunk."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCK, OPTIONS, chunks_of, exponential, log_unit, on_device, place, tree_sum

# 16 elements a thread at 8 warps: rows are few and long, so each keeps several 16-byte loads under
# way.
ROW_BLOCK = 4096
ROW_LEVELS = 12
ROW_OPTIONS = {**OPTIONS, "num_warps": 8}


@triton.jit
def bounded(d):
    """Not below -104, where `exponential` is 0: 0 times this is 0, which 0 times -inf is not. NaN
    stays."""
    return tl.where(d < -104.0, -104.0, d)


@triton.jit(do_not_specialize=["ignore_index"])
def token_kernel(
    logits_ptr,
    ids_ptr,
    log_prob_ptr,
    entropy_ptr,
    lse_ptr,
    scale,
    ignore_index,
    stride,
    v,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    if token == ignore_index:
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(lse_ptr + 2 * row, 0.0)
        tl.store(lse_ptr + 2 * row + 1, 0.0)
    else:
        logits_ptr += row * stride
        columns = tl.arange(0, BLOCK)
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, v, BLOCK):
            logit = tl.load(
                logits_ptr + start + columns, mask=start + columns < v, other=float("-inf")
            ).to(tl.float32)
            high = tl.where(
                logit > high, logit, high
            )  # a NaN is passed over and comes back through the exponents
        m = tl.max(high, axis=0)
        exps = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, v, BLOCK):
            logit = tl.load(
                logits_ptr + start + columns, mask=start + columns < v, other=float("-inf")
            ).to(tl.float32)
            d = bounded((logit - m) * scale)
            e = exponential(d)
            exps += e
            products += e * d
        s = tree_sum(exps, LEVELS)
        log_sum = log_unit(s) + (s - s)  # NaN where s is NaN, which log_unit would hide
        inside = (token >= 0) & (token < v)
        own = tl.load(logits_ptr + tl.where(inside, token, 0)).to(tl.float32)
        poison = tl.where(inside, 0.0, float("nan"))
        tl.store(log_prob_ptr + row, ((own - m) * scale - log_sum) + poison)
        tl.store(entropy_ptr + row, (log_sum - tl.div_rn(tree_sum(products, LEVELS), s)) + poison)
        tl.store(lse_ptr + 2 * row, m + poison)
        tl.store(lse_ptr + 2 * row + 1, log_sum + poison)


@triton.jit(do_not_specialize=["ignore_index", "chunks"])
def token_backward_kernel(
    logits_ptr,
    ids_ptr,
    lse_ptr,
    entropy_ptr,
    grad_log_prob_ptr,
    grad_entropy_ptr,
    grad_ptr,
    scale,
    ignore_index,
    stride,
    grad_stride,
    v,
    chunks,
    BLOCK: tl.constexpr,
):
    row, _, columns, mask = place(chunks, v, BLOCK)
    token = tl.load(ids_ptr + row)
    grad = tl.zeros((BLOCK,), tl.float32)
    if token != ignore_index:
        logit = tl.load(logits_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
        d = (logit - tl.load(lse_ptr + 2 * row)) * scale
        log_p = bounded(d - tl.load(lse_ptr + 2 * row + 1))
        factor = tl.zeros((BLOCK,), tl.float32)
        if grad_entropy_ptr is not None:
            factor = (log_p + tl.load(entropy_ptr + row)) * tl.load(grad_entropy_ptr + row)
        grad = exponential(log_p)
        if grad_log_prob_ptr is not None:
            on_log_prob = tl.load(grad_log_prob_ptr + row)
            grad = tl.where(columns == token, on_log_prob, 0.0) - grad * (factor + on_log_prob)
        else:
            grad = 0.0 - grad * factor
        grad = grad * scale
    tl.store(grad_ptr + row * grad_stride + columns, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def token_log_prob(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    log_prob: Tensor,
    entropy: Tensor,
    lse: Tensor,
) -> None:
    m, v = logits.shape
    with on_device(logits):
        token_kernel[(m,)](
            logits,
            ids,
            log_prob,
            entropy,
            lse,
            1.0 / temperature,
            ignore_index,
            logits.stride(0),
            v,
            BLOCK=ROW_BLOCK,
            LEVELS=ROW_LEVELS,
            **ROW_OPTIONS,
        )


def token_log_prob_backward(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """grad_logits may be logits: every program reads its own chunk before it writes it."""
    m, v = logits.shape
    chunks = chunks_of(v)
    with on_device(logits):
        token_backward_kernel[(m * chunks,)](
            logits,
            ids,
            lse,
            entropy,
            grad_log_prob,
            grad_entropy,
            grad_logits,
            1.0 / temperature,
            ignore_index,
            logits.stride(0),
            grad_logits.stride(0),
            v,
            chunks,
            BLOCK=BLOCK,
            **OPTIONS,
        )
