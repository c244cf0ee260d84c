"""The Triton kernels of all operators and their launchers. Imported on first use, so that Triton is too.

Layout: one program reads one chunk of BLOCK elements of one sample; sums leave as one partial per chunk, and a second
kernel adds a sample's partials in order. Nothing depends on the batch, no atomics, no autotuning. Inside a chunk the
sum is a tree of pairs written out with reshapes: `tl.sum` over a whole block would add in an order that follows the
layout the compiler picks, which differs between a bf16 and an fp32 kernel and so between a step and its replay.

Floating-point contraction is off (`enable_fp_fusion=False`): mu must have the same bits in every kernel. log, sin and
cos are our own (Cephes polynomials): `tl.log` is an approximation with a large relative error near 1, and libdevice's
`sin` brings fp64 instructions along.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another language.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1024 elements are 8 per thread at 4 warps: one 16-byte access of bf16, two of fp32.
BLOCK = 1024
LOG2_BLOCK = 10
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _log_unit(u):
    """ln u for u in [2^-33, 1]: Cephes logf, about 1 ulp."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = e.to(tl.float32)
    f2 = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = p * (f * f2)
    tail = tail + exponent * -2.12194440e-4
    tail = tail - 0.5 * f2
    return (f + tail) + exponent * 0.693359375


@triton.jit
def _normal_pair(a, b):
    """Box-Muller. The quadrant comes from the bits of k, so the reduction to [-pi/4, pi/4] is exact."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(_log_unit(u) * -2.0)
    k = b.to(tl.int32, bitcast=True) >> 8
    theta = (k.to(tl.float32) + 0.5) * 3.7450704144e-07  # float32(pi 2^-23)
    q = (k + (1 << 21)) >> 22
    quadrant = q.to(tl.float32)
    r = (theta - quadrant * 1.57079637) + quadrant * 4.37113883e-8
    r2 = r * r
    s = r2 * -1.9515295891e-4 + 8.3321608736e-3
    s = s * r2 - 1.6666654611e-1
    s = r + r * (r2 * s)
    c = r2 * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * r2 + 4.166664568298827e-2
    c = (1.0 - 0.5 * r2) + (r2 * r2) * c
    odd = (q & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((q & 2) != 0, -sine, sine)
    cosine = tl.where(((q + 1) & 2) != 0, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def _philox_block(seed, step, chunk, BLOCK: tl.constexpr):
    """The BLOCK normals of elements chunk * BLOCK .. of one sample, in element order."""
    j = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.int64)
    low = j.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, (j >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero)
    z0, z1 = _normal_pair(r0, r1)
    z2, z3 = _normal_pair(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _tree_sum(value, LEVELS: tl.constexpr):
    """Sum of 2^LEVELS elements by neighbouring pairs, level after level: the same order in every layout."""
    for _ in tl.static_range(LEVELS):
        value = tl.sum(tl.reshape(value, (value.shape[0] // 2, 2)), axis=1)
    return tl.sum(value, axis=0)


@triton.jit
def _entry(base, column, inside):
    return tl.where(inside, tl.load(base + column), float("nan"))


@triton.jit
def _place(chunks, n, BLOCK: tl.constexpr):
    """(sample, chunk, element offsets, mask) of this program; all int64."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // chunks
    chunk = pid % chunks
    offsets = chunk * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    return sample, chunk, offsets, offsets < n


@triton.jit
def _row(table_ptr, index_ptr, sample, rows):
    """Step index, whether it is inside the table, and the address of its row (clamped)."""
    step = tl.load(index_ptr + sample)
    inside = (step >= 0) & (step < rows)
    return step, inside, table_ptr + tl.where(inside, step, 0) * 8


@triton.jit(do_not_specialize=["chunks"])
def philox_kernel(seed_ptr, step_ptr, out_ptr, n, chunks, BLOCK: tl.constexpr):
    sample, chunk, offsets, mask = _place(chunks, n, BLOCK)
    z = _philox_block(tl.load(seed_ptr + sample), tl.load(step_ptr + sample), chunk, BLOCK)
    tl.store(out_ptr + sample * n + offsets, z.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "chunks"])
def step_kernel(
    x_ptr,
    v_ptr,
    noise_ptr,
    table_ptr,
    index_ptr,
    seed_ptr,
    out_ptr,
    partial_ptr,
    x_stride,
    v_stride,
    noise_stride,
    n,
    rows,
    chunks,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    sample, chunk, offsets, mask = _place(chunks, n, BLOCK)
    step, inside, row = _row(table_ptr, index_ptr, sample, rows)
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + sample * v_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_NOISE:
        eps = tl.load(noise_ptr + sample * noise_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        eps = _philox_block(tl.load(seed_ptr + sample), step, chunk, BLOCK)
    mu = _entry(row, 0, inside) * x + _entry(row, 1, inside) * v
    out = (mu + _entry(row, 3, inside) * eps).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + sample * n + offsets, out, mask=mask)
    z = tl.where(mask, out.to(tl.float32) - mu, 0.0)
    tl.store(partial_ptr + sample * chunks + chunk, _tree_sum(z * z, LEVELS))


@triton.jit(do_not_specialize=["rows", "chunks"])
def log_prob_kernel(
    x_ptr,
    x_next_ptr,
    v_ptr,
    v_ref_ptr,
    table_ptr,
    index_ptr,
    partial_ptr,
    diff_partial_ptr,
    x_stride,
    x_next_stride,
    v_stride,
    v_ref_stride,
    n,
    rows,
    chunks,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    sample, chunk, offsets, mask = _place(chunks, n, BLOCK)
    _, inside, row = _row(table_ptr, index_ptr, sample, rows)
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + sample * v_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    x_next = tl.load(x_next_ptr + sample * x_next_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    b = _entry(row, 1, inside)
    mu = _entry(row, 0, inside) * x + b * v
    z = tl.where(mask, x_next - mu, 0.0)
    tl.store(partial_ptr + sample * chunks + chunk, _tree_sum(z * z, LEVELS))
    if HAS_REF:
        v_ref = tl.load(v_ref_ptr + sample * v_ref_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        diff = tl.where(mask, b * (v - v_ref), 0.0)
        tl.store(diff_partial_ptr + sample * chunks + chunk, _tree_sum(diff * diff, LEVELS))


@triton.jit(do_not_specialize=["n", "rows", "chunks"])
def finish_kernel(
    partial_ptr,
    diff_partial_ptr,
    table_ptr,
    index_ptr,
    log_prob_ptr,
    mean_diff_ptr,
    n,
    rows,
    chunks,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program a sample: partials in chunk order -> w * mean + c, and the mean difference."""
    sample = tl.program_id(0).to(tl.int64)
    _, inside, row = _row(table_ptr, index_ptr, sample, rows)
    size = tl.cast(n, tl.float32)
    total = 0.0
    diff_total = 0.0
    for start in range(0, chunks, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < chunks
        total += _tree_sum(tl.load(partial_ptr + sample * chunks + offsets, mask=mask, other=0.0), LEVELS)
        if HAS_REF:
            diff_total += _tree_sum(tl.load(diff_partial_ptr + sample * chunks + offsets, mask=mask, other=0.0), LEVELS)
    log_prob = _entry(row, 4, inside) * tl.div_rn(total, size) + _entry(row, 5, inside)
    tl.store(log_prob_ptr + sample, log_prob)
    if HAS_REF:
        tl.store(mean_diff_ptr + sample, tl.div_rn(diff_total, size))


@triton.jit(do_not_specialize=["rows", "chunks"])
def log_prob_backward_kernel(
    x_ptr,
    x_next_ptr,
    v_ptr,
    v_ref_ptr,
    table_ptr,
    index_ptr,
    grad_log_prob_ptr,
    grad_mean_diff_ptr,
    grad_v_ptr,
    x_stride,
    x_next_stride,
    v_stride,
    v_ref_stride,
    n,
    rows,
    chunks,
    HAS_DIFF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, offsets, mask = _place(chunks, n, BLOCK)
    _, inside, row = _row(table_ptr, index_ptr, sample, rows)
    size = tl.cast(n, tl.float32)
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + sample * v_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    x_next = tl.load(x_next_ptr + sample * x_next_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    b = _entry(row, 1, inside)
    z = x_next - (_entry(row, 0, inside) * x + b * v)
    grad = tl.div_rn(-2.0 * _entry(row, 4, inside) * b, size) * tl.load(grad_log_prob_ptr + sample) * z
    if HAS_DIFF:
        v_ref = tl.load(v_ref_ptr + sample * v_ref_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        grad += tl.div_rn(2.0 * b * b, size) * tl.load(grad_mean_diff_ptr + sample) * (v - v_ref)
    tl.store(grad_v_ptr + sample * n + offsets, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _same_set(group, turn, group_ptr, turn_ptr, counted_ptr, units, start, WHOLE: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS]: which counted units of this block share a set with each row (WHOLE: all of them do)."""
    cols = start + tl.arange(0, COLS)
    mask = cols < units
    counted = tl.load(counted_ptr + cols, mask=mask, other=0) != 0
    same = counted[None, :] & (group[:, None] == group[:, None])
    if not WHOLE:
        same = same & (group[:, None] == tl.load(group_ptr + cols, mask=mask, other=0)[None, :])
        same = same & (turn[:, None] == tl.load(turn_ptr + cols, mask=mask, other=0)[None, :])
    return cols, mask, same


@triton.jit
def _statistics(
    value_ptr,
    group,
    turn,
    group_ptr,
    turn_ptr,
    counted_ptr,
    units,
    UNBIASED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and std of the set of each row: four passes over all units (the module docstring of group_advantage)."""
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    low = tl.full((ROWS,), float("inf"), tl.float32)
    count = tl.zeros((ROWS,), tl.int64)
    for start in range(0, units, COLS):
        cols, mask, same = _same_set(group, turn, group_ptr, turn_ptr, counted_ptr, units, start, WHOLE, COLS)
        y = tl.load(value_ptr + cols, mask=mask, other=0.0)[None, :]
        high = tl.maximum(high, tl.max(tl.where(same, y, float("-inf")), axis=1))
        low = tl.minimum(low, tl.min(tl.where(same, y, float("inf")), axis=1))
        count += tl.sum(same.to(tl.int64), axis=1)
    largest = tl.where(count > 0, tl.maximum(tl.abs(high), tl.abs(low)), 0.0)
    exponent = _exponent(largest)
    scale = _power_of_two(40 - exponent)
    total = tl.zeros((ROWS,), tl.int64)
    for start in range(0, units, COLS):
        cols, mask, same = _same_set(group, turn, group_ptr, turn_ptr, counted_ptr, units, start, WHOLE, COLS)
        y = tl.load(value_ptr + cols, mask=mask, other=0.0)[None, :]
        total += tl.sum(tl.where(same, _rint(y * scale[:, None]), 0.0).to(tl.int64), axis=1)
    mean = tl.where(high == low, high, _quotient(total, count, exponent))
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, units, COLS):
        cols, mask, same = _same_set(group, turn, group_ptr, turn_ptr, counted_ptr, units, start, WHOLE, COLS)
        d = tl.load(value_ptr + cols, mask=mask, other=0.0)[None, :] - mean[:, None]
        largest = tl.maximum(largest, tl.max(tl.where(same, d * d, 0.0), axis=1))
    exponent = _exponent(largest)
    scale = _power_of_two(40 - exponent)
    total = tl.zeros((ROWS,), tl.int64)
    for start in range(0, units, COLS):
        cols, mask, same = _same_set(group, turn, group_ptr, turn_ptr, counted_ptr, units, start, WHOLE, COLS)
        d = tl.load(value_ptr + cols, mask=mask, other=0.0)[None, :] - mean[:, None]
        total += tl.sum(tl.where(same, _rint(d * d * scale[:, None]), 0.0).to(tl.int64), axis=1)
    if UNBIASED:
        count = count - 1
    return mean, tl.sqrt_rn(_quotient(total, count, exponent))


@triton.jit
def _exponent(largest):
    bits = largest.to(tl.int32, bitcast=True)
    return tl.maximum(((bits >> 23) & 0xFF) - 126, -80)


@triton.jit
def _rint(value):
    """Round to even: beyond 2^22 the sum below would be too coarse, but from 2^23 on a float is an integer."""
    return tl.where(tl.abs(value) < 4194304.0, (value + 12582912.0) - 12582912.0, _rint_large(value))


@triton.jit
def _rint_large(value):
    """2^22 <= |value|: halves remain below 2^23, where adding and taking away 2^23 rounds them to even."""
    size = tl.abs(value)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(value < 0, -size, size)


@triton.jit
def _quotient(total, divisor, exponent):
    safe = tl.maximum(divisor, 1)
    size = (2 * tl.abs(total) + safe) // (2 * safe)
    mean = tl.where(total < 0, -size, size).to(tl.float32) * _power_of_two(exponent - 40)
    return tl.where(divisor > 0, mean, 0.0)


@triton.jit(do_not_specialize=["units"])
def group_kernel(
    value_ptr,
    group_ptr,
    turn_ptr,
    counted_ptr,
    out_ptr,
    units,
    eps,
    STD: tl.constexpr,
    UNBIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * units
    value_ptr += column
    mask = rows < units
    group = tl.load(group_ptr + rows, mask=mask, other=0)
    turn = tl.load(turn_ptr + rows, mask=mask, other=0)
    mean, std = _statistics(
        value_ptr, group, turn, group_ptr, turn_ptr, counted_ptr, units, UNBIASED, False, ROWS, COLS
    )
    a = tl.load(value_ptr + rows, mask=mask, other=0.0) - mean
    if STD != 2:
        if STD == 1:
            _, std = _statistics(
                value_ptr, group, turn, group_ptr, turn_ptr, counted_ptr, units, UNBIASED, True, ROWS, COLS
            )
        denominator = std + eps
        usable = denominator > 0
        a = tl.where(usable, tl.div_rn(a, tl.where(usable, denominator, 1.0)), 0.0)
    tl.store(out_ptr + column + rows, a, mask=mask)


INTERPRETED = not isinstance(step_kernel, triton.runtime.JITFunction)


def _chunks(n: int) -> int:
    return (n + BLOCK - 1) // BLOCK


def _on(value: Tensor) -> Any:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device_of(value)


def philox_normal(seed: Tensor, step: Tensor, out: Tensor) -> None:
    batch, n = out.shape
    chunks = _chunks(n)
    with _on(out):
        philox_kernel[(batch * chunks,)](seed, step, out, n, chunks, BLOCK=BLOCK, **OPTIONS)


def _finish(
    partial: Tensor,
    diff_partial: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    log_prob: Tensor,
    mean_diff: Tensor | None,
    n: int,
) -> None:
    finish_kernel[(partial.shape[0],)](
        partial,
        diff_partial,
        table,
        step_index,
        log_prob,
        mean_diff,
        n,
        table.shape[0],
        partial.shape[1],
        HAS_REF=diff_partial is not None,
        BLOCK=BLOCK,
        LEVELS=LOG2_BLOCK,
        **OPTIONS,
    )


def sde_step(
    x: Tensor,
    v: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    x_next: Tensor,
    log_prob: Tensor,
) -> None:
    batch, n = x.shape
    chunks = _chunks(n)
    partial = torch.empty(batch, chunks, dtype=torch.float32, device=x.device)
    with _on(x):
        step_kernel[(batch * chunks,)](
            x,
            v,
            noise,
            table,
            step_index,
            seed,
            x_next,
            partial,
            x.stride(0),
            v.stride(0),
            0 if noise is None else noise.stride(0),
            n,
            table.shape[0],
            chunks,
            HAS_NOISE=noise is not None,
            BLOCK=BLOCK,
            LEVELS=LOG2_BLOCK,
            **OPTIONS,
        )
        _finish(partial, None, table, step_index, log_prob, None, n)


def sde_log_prob(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    log_prob: Tensor,
    mean_diff: Tensor,
) -> None:
    batch, n = x.shape
    chunks = _chunks(n)
    partial = torch.empty(batch, chunks, dtype=torch.float32, device=x.device)
    diff_partial = None if v_ref is None else torch.empty_like(partial)
    with _on(x):
        log_prob_kernel[(batch * chunks,)](
            x,
            x_next,
            v,
            v_ref,
            table,
            step_index,
            partial,
            diff_partial,
            x.stride(0),
            x_next.stride(0),
            v.stride(0),
            0 if v_ref is None else v_ref.stride(0),
            n,
            table.shape[0],
            chunks,
            HAS_REF=v_ref is not None,
            BLOCK=BLOCK,
            LEVELS=LOG2_BLOCK,
            **OPTIONS,
        )
        _finish(partial, diff_partial, table, step_index, log_prob, mean_diff if v_ref is not None else None, n)


def sde_log_prob_backward(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    grad_log_prob: Tensor,
    grad_mean_diff: Tensor | None,
    grad_v: Tensor,
) -> None:
    batch, n = x.shape
    chunks = _chunks(n)
    has_diff = v_ref is not None and grad_mean_diff is not None
    with _on(x):
        log_prob_backward_kernel[(batch * chunks,)](
            x,
            x_next,
            v,
            v_ref if has_diff else None,
            table,
            step_index,
            grad_log_prob,
            grad_mean_diff if has_diff else None,
            grad_v,
            x.stride(0),
            x_next.stride(0),
            v.stride(0),
            v_ref.stride(0) if has_diff and v_ref is not None else 0,
            n,
            table.shape[0],
            chunks,
            HAS_DIFF=has_diff,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def group_normalise(
    value: Tensor, group: Tensor, turn: Tensor, counted: Tensor, out: Tensor, std: int, unbiased: bool, eps: float
) -> None:
    """value, out: [C, U] fp32; group, turn: [U] int64; counted: [U] bool. Every pair of units is compared: U^2 work."""
    columns, units = value.shape
    rows = 16
    with _on(value):
        group_kernel[((units + rows - 1) // rows, columns)](
            value,
            group,
            turn,
            counted.to(torch.uint8),
            out,
            units,
            eps,
            STD=std,
            UNBIASED=unbiased,
            ROWS=rows,
            COLS=128,
            **OPTIONS,
        )
