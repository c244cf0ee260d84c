"""token_log_prob: forward one program a row, reading the vocabulary once, in blocks; backward one
program a chunk."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from . import common as lib

# 16 elements a thread at 8 warps: rows are few and long, so each keeps several 16-byte loads under
# way.
LOG2_ROW_BLOCK = 12
ROW_OPTIONS = {**lib.OPTIONS, "num_warps": 8}


@triton.jit
def bounded(d):
    """Not below -88, where `exponential` is 0: 0 times this is 0, which 0 times -inf is not. NaN
    stays."""
    return tl.where(d < -88.0, -88.0, d)


@triton.jit
def exponential(d):
    """exp(d) for -88 <= d <= 0.4: exp_bounded of csrc/softmax.h, in fused steps as its CUDA form.
    By instructions it is half of the common one, which these kernels would be bound by."""
    shifted = tl.fma(d, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, d))
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    mantissa = tl.fma(p, r * r, r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 127)
    return mantissa * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _logits(logits, row, columns, v):
    at = logits.ptr + row * logits.stride + columns
    return tl.load(at, mask=columns < v, other=float("-inf")).to(tl.float32)


@lib.kernel
def token_kernel(
    logits, ids, log_prob, entropy, lse, scale, ignore_index, v, LEVELS: constexpr = LOG2_ROW_BLOCK
):
    """lse: [M, 2], the largest logit and the log of the sum of exponentials."""
    BLOCK: constexpr = 1 << LEVELS
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row)
    if token == ignore_index:
        tl.store(log_prob + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(lse + 2 * row, 0.0)
        tl.store(lse + 2 * row + 1, 0.0)
    else:
        columns = tl.arange(0, BLOCK)
        m = tl.full((), float("-inf"), tl.float32)
        exps = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        ahead = _logits(logits, row, columns, v)
        for start in range(0, v, BLOCK):
            logit = ahead
            ahead = _logits(logits, row, start + BLOCK + columns, v)
            # A NaN is passed over and comes back through the exponents.
            high = tl.max(tl.where(logit == logit, logit, float("-inf")), axis=0)
            if high > m:  # what was added so far, relative to the larger one: a few times a row
                shift = bounded((m - high) * scale)
                factor = exponential(shift)
                products = (products + exps * shift) * factor
                exps = exps * factor
                m = high
            d = bounded((logit - tl.where(m == float("-inf"), 0.0, m)) * scale)
            e = exponential(d)
            exps += e
            products += e * d
        # Of a row of -inf s is 0, and both results NaN: own - m and 0 / 0.
        s = lib.tree_sum(exps, LEVELS)
        log_sum = lib.log_unit(s) + (s - s)  # NaN where s is NaN, which log_unit would hide
        inside = (token >= 0) & (token < v)
        own = tl.load(logits.ptr + row * logits.stride + tl.where(inside, token, 0)).to(tl.float32)
        poison = tl.where(inside, 0.0, float("nan"))
        mean = tl.div_rn(lib.tree_sum(products, LEVELS), s)
        tl.store(log_prob + row, ((own - m) * scale - log_sum) + poison)
        tl.store(entropy + row, (log_sum - mean) + poison)
        tl.store(lse + 2 * row, m + poison)
        tl.store(lse + 2 * row + 1, log_sum + poison)


@lib.kernel
def token_backward_kernel(
    logits, ids, lse, entropy, grad_log_prob, grad_entropy, grads, scale, ignore_index, v, chunks
):
    at = lib.place(chunks, v)
    row = at.sample
    token = tl.load(ids + row)
    grad = tl.zeros_like(at.offsets).to(tl.float32)
    if token != ignore_index:
        d = (lib.load(logits, at) - tl.load(lse + 2 * row)) * scale
        log_p = bounded(d - tl.load(lse + 2 * row + 1))
        factor = tl.zeros_like(log_p)
        if grad_entropy is not None:
            factor = (log_p + tl.load(entropy + row)) * tl.load(grad_entropy + row)
        grad = exponential(log_p)
        if grad_log_prob is not None:
            on_log_prob = tl.load(grad_log_prob + row)
            grad = tl.where(at.offsets == token, on_log_prob, 0.0) - grad * (factor + on_log_prob)
        else:
            grad = 0.0 - grad * factor
        grad = grad * scale
    lib.store(grads, at, grad)


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
    numbers = 1.0 / temperature, ignore_index, v
    with lib.on_device(logits):
        token_kernel[(m,)](
            lib.samples_of(logits), ids, log_prob, entropy, lse, *numbers, **ROW_OPTIONS
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
    chunks = lib.chunks_of(v)
    incoming = grad_log_prob, grad_entropy
    read, written = lib.samples_of(logits), lib.samples_of(grad_logits)
    numbers = 1.0 / temperature, ignore_index, v, chunks
    with lib.on_device(logits):
        token_backward_kernel[(m * chunks,)](
            read, ids, lse, entropy, *incoming, written, *numbers, **lib.OPTIONS
        )
