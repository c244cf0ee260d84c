"""What the Triton kernels share: noise, exponential, ordered sums, addressing, table rows.

Layout: one program reads one chunk of BLOCK elements of one sample; sums leave as one partial per
chunk, and a second kernel adds a sample's partials in order. Nothing depends on the batch, no
atomics, no autotuning. Inside a chunk the sum is a tree of pairs written out with reshapes:
`tl.sum` over a whole block would add in an order that follows the layout the compiler picks, which
differs between a bf16 and an fp32 kernel and so between a step and its replay.

Kernels take bundles, named tuples of pointers and numbers. What is absent is None there, a constant
to Triton, so the code that reads it is not compiled; what only the compiler needs stands in a tuple
of constants of its own. Triton makes a kernel for each alignment of a number in a bundle, whatever
`do_not_specialize` says: what changes with the batch or the schedule is an argument of its own.

Floating-point contraction is off (`enable_fp_fusion=False`): mu must have the same bits in every
kernel. exp, log, sin and cos are our own (Cephes polynomials): `tl.exp` and `tl.log` are
approximations, the second with a large relative error near 1, and libdevice's `sin` brings fp64
instructions along.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

# 1024 elements are 8 per thread at 4 warps: one 16-byte access of bf16, two of fp32.
BLOCK = 1024
LOG2_BLOCK = 10
# 256 partials of a sample are added at once; the order of the sum follows from it, in every kernel
# that finishes.
LOG2_PARTIALS = 8
UNITS = 16  # samples that a program of the kernels below finishes at once
LOG2_UNITS = 4
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

# Numbers that no kernel is compiled anew for.
RUNNING = "batch chunks count ignore_index plane row_count rows samples size turns".split()
kernel = triton.jit(do_not_specialize=RUNNING)

# A [B, N] tensor: its first element and the distance of two samples, in elements.
Samples = namedtuple("Samples", "ptr stride")
# The table of transitions and the step of each sample, [B] int64.
Steps = namedtuple("Steps", "table index")
# Made inside kernels, by the names of their fields: Triton's cache would not see another order.
# A sample's step, whether the table has it, and its row there.
Row = namedtuple("Row", "step inside ptr")
# Elements of one sample: int64 offsets in it, and which of them to read and write.
Place = namedtuple("Place", "sample chunk offsets mask")


@triton.jit
def log_unit(u):
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
def normal_pair(a, b):
    """Box-Muller. The quadrant comes from the bits of k, so the reduction to [-pi/4, pi/4] is
    exact."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(log_unit(u) * -2.0)
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
def philox_block(seed, step, chunk, BLOCK: constexpr = BLOCK):
    """The BLOCK normals of elements chunk * BLOCK .. of one sample, in element order."""
    j = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.int64)
    low = j.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, (j >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero)
    z0, z1 = normal_pair(r0, r1)
    z2, z3 = normal_pair(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def exponential(x):
    """e^x: Cephes expf, about 1 ulp; exactly 1 at 0, inf, 0 and NaN where they belong."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    k = tl.floor(x * 1.44269504088896341 + 0.5)
    k = tl.where(x == x, k, 0.0)
    r = x - k * 0.693359375
    r = r - k * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = ((r * r) * p + r) + 1.0
    exponent = k.to(tl.int32)  # -150..128: two factors, for neither end is a normal number
    half = exponent >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return (p * low) * high


@triton.jit
def pair_sums(value, LEVELS: constexpr):
    """[M 2^LEVELS] -> [M], by neighbouring pairs, level after level: the same order in every
    layout."""
    for _ in tl.static_range(LEVELS):
        value = tl.sum(tl.reshape(value, (value.shape[0] // 2, 2)), axis=1)
    return value


@triton.jit
def tree_sum(value, LEVELS: constexpr = LOG2_BLOCK):
    """Sum of 2^LEVELS elements, as a scalar."""
    return tl.sum(pair_sums(value, LEVELS), axis=0)


@triton.jit
def place(chunks, n, BLOCK: constexpr = BLOCK):
    """This program's chunk of a sample."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // chunks
    chunk = pid % chunks
    offsets = chunk * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    return Place(sample=sample, chunk=chunk, offsets=offsets, mask=offsets < n)


@triton.jit
def mask_if(condition, mask):
    """mask, all False unless a sample's condition holds. Not `&`: the interpreter broadcasts a
    comparison of floats as floats, which have no `&`."""
    return tl.where(condition, mask, False)


@triton.jit
def only_if(condition, at):
    """The same place, without an element unless the sample's condition holds."""
    mask = mask_if(condition, at.mask)
    return Place(sample=at.sample, chunk=at.chunk, offsets=at.offsets, mask=mask)


@triton.jit
def load(samples, at):
    """The elements of a place in fp32; 0 where masked."""
    first = samples.ptr + at.sample * samples.stride
    return tl.load(first + at.offsets, mask=at.mask, other=0.0).to(tl.float32)


@triton.jit
def store(samples, at, value):
    first = samples.ptr + at.sample * samples.stride
    tl.store(first + at.offsets, value.to(samples.ptr.dtype.element_ty), mask=at.mask)


@triton.jit
def row_at(steps, rows, sample):
    step = tl.load(steps.index + sample)
    inside = (step >= 0) & (step < rows)
    return Row(step=step, inside=inside, ptr=steps.table + tl.where(inside, step, 0) * 8)


@triton.jit
def entry(row, column):
    """A column of a table row; NaN where the index was outside, so that it cannot pass unseen."""
    return tl.where(row.inside, tl.load(row.ptr + column), float("nan"))


@triton.jit
def transition_mean(x, u, m_prev, at, row):
    """mu = A x + B u + C m_prev; m_prev is not read where C is 0, and mu is NaN where it is absent
    and C is not."""
    mu = entry(row, 0) * x + entry(row, 1) * u
    c = entry(row, 2)
    if m_prev is None:
        return tl.where(c == 0.0, mu, float("nan"))
    else:
        return tl.where(c == 0.0, mu, mu + c * load(m_prev, only_if(c != 0.0, at)))


@triton.jit
def scaled(factor, scale):
    """A factor times the incoming gradient; 0 stays 0 whatever comes in."""
    return tl.where(factor == 0.0, 0.0, factor * scale)


@triton.jit
def totals(partial, first, count, chunks, UNITS: constexpr = 1, LEVELS: constexpr = LOG2_PARTIALS):
    """[UNITS]: the sums of units first .. of partial[count, chunks], each in an order of its own; 0
    beyond count."""
    PARTIALS: constexpr = 1 << LEVELS
    lane = tl.arange(0, UNITS * PARTIALS)
    unit = first + lane // PARTIALS
    total = tl.zeros((UNITS,), tl.float32)
    for start in range(0, chunks, PARTIALS):
        chunk = start + lane % PARTIALS
        mask = (unit < count) & (chunk < chunks)
        value = tl.load(partial + unit * chunks + chunk, mask=mask, other=0.0)
        total += pair_sums(value, LEVELS)
    return total


@triton.jit
def means(partial, first, count, chunks, size, UNITS: constexpr = 1):
    return tl.div_rn(totals(partial, first, count, chunks, UNITS), tl.cast(size, tl.float32))


@kernel
def means_kernel(partial, found, size, batch, chunks, plane, UNITS: constexpr = UNITS):
    """found[M, B]: the means of M planes partial[B, chunks], `plane` apart; a program UNITS samples
    of one plane."""
    first = tl.program_id(0).to(tl.int64) * UNITS
    moment = tl.program_id(1).to(tl.int64)
    sample = first + tl.arange(0, UNITS)
    mean = means(partial + moment * plane, first, batch, chunks, size, UNITS)
    tl.store(found + moment * batch + sample, mean, mask=sample < batch)


@triton.jit
def weight_of(counts, normalizer, batch):
    """(how many samples count, at least 1, and the weight of one of them), in fp32. counts:
    uint8[batch]; None: all. normalizer: what to divide by instead, if above 0."""
    if counts is None:
        count = tl.cast(batch, tl.float32)
    else:
        found = tl.zeros((256,), tl.int32)
        for start in range(0, batch, 256):
            sample = start + tl.arange(0, 256)
            found += (tl.load(counts + sample, mask=sample < batch, other=0) != 0).to(tl.int32)
        count = tl.maximum(tl.sum(found, axis=0), 1).to(tl.float32)
    normalizer = tl.cast(normalizer, tl.float32)
    one = tl.cast(1.0, tl.float32)
    return count, tl.div_rn(one, tl.where(normalizer > 0.0, normalizer, count))


@triton.jit
def units_at(first, batch, counts, UNITS: constexpr = UNITS):
    """(samples first .., the same where they are in the batch and else 0, whether they are, and
    whether they count)."""
    sample = first + tl.arange(0, UNITS).to(tl.int64)
    inside = sample < batch
    at = tl.where(inside, sample, 0)
    if counts is None:
        return sample, at, inside, inside
    else:
        return sample, at, inside, inside & (tl.load(counts + at) != 0)


@triton.jit
def unit_sum(value, LEVELS: constexpr = LOG2_UNITS):
    """Over the lanes of a sum by lane."""
    return tree_sum(value, LEVELS)


@kernel
def finish_kernel(squares, diff_squares, steps, log_prob, mean_diff, size, batch, rows, chunks):
    """One program a sample: log_prob = w mean + c, and the mean difference."""
    first = tl.program_id(0).to(tl.int64)
    sample = first + tl.arange(0, 1)
    row = row_at(steps, rows, sample)
    z2 = means(squares, first, batch, chunks, size)
    tl.store(log_prob + sample, entry(row, 4) * z2 + entry(row, 5))
    if diff_squares is not None:
        tl.store(mean_diff + sample, means(diff_squares, first, batch, chunks, size))


INTERPRETED = not isinstance(tree_sum, triton.runtime.JITFunction)


def chunks_of(n: int) -> int:
    return (n + BLOCK - 1) // BLOCK


def on_device(value: Tensor) -> Any:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device_of(value)


def samples_of(value: Tensor | None) -> Samples | None:
    return None if value is None else Samples(value, value.stride(0))


def sample_means(partial: Tensor, batch: int, chunks: int, n: int) -> Tensor:
    """partial: [M, B * chunks or more] -> [M, B]. By many programs: one would read all partial sums
    of the batch."""
    moments, plane = partial.shape
    found = torch.empty(moments, batch, dtype=torch.float32, device=partial.device)
    grid = (batch + UNITS - 1) // UNITS, moments
    means_kernel[grid](partial, found, n, batch, chunks, plane, **OPTIONS)
    return found


def finish(
    squares: Tensor,
    diff_squares: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    log_prob: Tensor,
    mean_diff: Tensor | None,
    n: int,
) -> None:
    """squares, diff_squares: [B, chunks], or longer and flat -> log_prob, mean_diff: [B]."""
    batch, rows, chunks = log_prob.shape[0], table.shape[0], chunks_of(n)
    steps = Steps(table, step_index)
    finish_kernel[(batch,)](
        squares, diff_squares, steps, log_prob, mean_diff, n, batch, rows, chunks, **OPTIONS
    )
