"""nft_loss and its backward (csrc/objective.h)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from . import common as lib

# What a loss reads, [B, N].
Sample = namedtuple("Sample", "x0 noise v v_old v_ref")
# What is known of a sample, [B]; mask: uint8.
Labels = namedtuple("Labels", "sigma r mask")
Numbers = namedtuple("Numbers", "beta advantage_max ref_weight min_weight normalizer")
# factors: [B, 3].
Outputs = namedtuple("Outputs", "loss metrics factors")


@triton.jit
def _errors(given, beta, at):
    """(e - beta d, e + beta d, v) with e = (noise - x0) - v_old and d = v - v_old."""
    x0 = lib.load(given.x0, at)
    noise = lib.load(given.noise, at)
    v = lib.load(given.v, at)
    v_old = lib.load(given.v_old, at)
    e = (noise - x0) - v_old
    d = (v - v_old) * tl.cast(beta, tl.float32)
    return e - d, e + d, v


@lib.kernel
def nft_moments_kernel(given, partial, beta, n, batch, chunks):
    """|e - beta d|, its square, |e + beta d|, its square, (v - v_ref)^2: partial[5, B, chunks]."""
    at = lib.place(chunks, n)
    positive, negative, v = _errors(given, beta, at)
    plane = chunks * tl.cast(batch, tl.int64)
    partial += at.sample * chunks + at.chunk
    tl.store(partial, lib.tree_sum(tl.abs(positive)))
    tl.store(partial + plane, lib.tree_sum(positive * positive))
    tl.store(partial + 2 * plane, lib.tree_sum(tl.abs(negative)))
    tl.store(partial + 3 * plane, lib.tree_sum(negative * negative))
    if given.v_ref is not None:
        difference = v - lib.load(given.v_ref, at)
        tl.store(partial + 4 * plane, lib.tree_sum(difference * difference))


@lib.kernel
def nft_finish_kernel(
    means, labels, numbers, out, size, batch, HAS_REF: constexpr, UNITS: constexpr = lib.UNITS
):
    """One program, on means[4 or 5, B]: samples in blocks of UNITS; sums over samples by lane,
    block after block, then over the lanes."""
    size = tl.cast(size, tl.float32)
    beta = tl.cast(numbers.beta, tl.float32)
    advantage_max = tl.cast(numbers.advantage_max, tl.float32)
    ref_weight = tl.cast(numbers.ref_weight, tl.float32)
    min_weight = tl.cast(numbers.min_weight, tl.float32)
    count, unit_weight = lib.weight_of(labels.mask, numbers.normalizer, batch)

    zero = tl.zeros((UNITS,), tl.float32)
    loss_sum, policy_sum, positive_sum, negative_sum = zero, zero, zero, zero
    reference_sum, broken = zero, zero
    for first in range(0, batch, UNITS):
        sample, at, inside, counted = lib.units_at(first, batch, labels.mask)
        weight = tl.where(counted, unit_weight, 0.0)
        t = tl.load(labels.sigma + at)
        r = tl.load(labels.r + at)

        t2 = t * t
        w_positive = t * tl.load(means + at)
        w_positive = tl.where(w_positive < min_weight, min_weight, w_positive)
        w_negative = t * tl.load(means + 2 * batch + at)
        w_negative = tl.where(w_negative < min_weight, min_weight, w_negative)
        positive = t2 * tl.load(means + batch + at)
        positive = tl.div_rn(positive, w_positive)
        negative = t2 * tl.load(means + 3 * batch + at)
        negative = tl.div_rn(negative, w_negative)
        policy = tl.div_rn(advantage_max * (r * positive + (1.0 - r) * negative), zero + beta)
        scale = tl.div_rn(2.0 * advantage_max * t2, size) * weight
        on_positive = tl.div_rn(-scale * r, w_positive)
        on_negative = tl.div_rn(scale * (1.0 - r), w_negative)
        reference = zero
        on_ref = zero
        if HAS_REF:
            reference = tl.load(means + 4 * batch + at)
            on_ref = tl.div_rn(2.0 * ref_weight, size) * weight

        factors = out.factors + sample * 3
        tl.store(factors, tl.where(counted, on_positive, 0.0), mask=inside)
        tl.store(factors + 1, tl.where(counted, on_negative, 0.0), mask=inside)
        tl.store(factors + 2, tl.where(counted, on_ref, 0.0), mask=inside)

        sample_loss = policy + ref_weight * reference
        loss_sum += tl.where(counted, weight * sample_loss, 0.0)
        policy_sum += tl.where(counted, policy, 0.0)
        positive_sum += tl.where(counted, positive, 0.0)
        negative_sum += tl.where(counted, negative, 0.0)
        reference_sum += tl.where(counted, reference, 0.0)
        broken = tl.where(counted & (sample_loss - sample_loss != 0.0), 1.0, broken)

    tl.store(out.loss, lib.unit_sum(loss_sum))
    tl.store(out.metrics, tl.div_rn(lib.unit_sum(policy_sum), count))
    tl.store(out.metrics + 1, tl.div_rn(lib.unit_sum(positive_sum), count))
    tl.store(out.metrics + 2, tl.div_rn(lib.unit_sum(negative_sum), count))
    tl.store(out.metrics + 3, tl.div_rn(lib.unit_sum(reference_sum), count))
    tl.store(out.metrics + 4, tl.max(broken, axis=0))


@lib.kernel
def nft_backward_kernel(given, factors, scale, grad_v, beta, n, chunks):
    """One linear combination; a term whose factor is 0 is not added. A sample whose factors are all
    0 gets 0 unread."""
    at = lib.place(chunks, n)
    factor = tl.load(scale)
    on_positive = lib.scaled(tl.load(factors + at.sample * 3), factor)
    on_negative = lib.scaled(tl.load(factors + at.sample * 3 + 1), factor)
    on_ref = lib.scaled(tl.load(factors + at.sample * 3 + 2), factor)
    live = (on_positive != 0.0) | (on_negative != 0.0) | (on_ref != 0.0)
    positive, negative, v = _errors(given, beta, lib.only_if(live, at))
    grad = tl.where(on_positive != 0.0, on_positive * positive, 0.0)
    grad = tl.where(on_negative != 0.0, grad + on_negative * negative, grad)
    if given.v_ref is not None:
        v_ref = lib.load(given.v_ref, lib.only_if(on_ref != 0.0, at))
        grad = tl.where(on_ref != 0.0, grad + on_ref * (v - v_ref), grad)
    lib.store(grad_v, at, grad)


def nft_loss(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    sigma: Tensor,
    r: Tensor,
    mask: Tensor | None,
    beta: float,
    advantage_max: float,
    ref_weight: float,
    min_weight: float,
    normalizer: float,
    loss: Tensor,
    metrics: Tensor,
    factors: Tensor,
) -> None:
    """mask: uint8 [B]."""
    batch, n = v.shape
    chunks = lib.chunks_of(n)
    partial = torch.empty(5, batch, chunks, dtype=torch.float32, device=v.device)
    given = Sample(*map(lib.samples_of, (x0, noise, v, v_old, v_ref)))
    numbers = Numbers(*map(float, (beta, advantage_max, ref_weight, min_weight, normalizer)))
    with lib.on_device(v):
        nft_moments_kernel[(batch * chunks,)](
            given, partial, numbers.beta, n, batch, chunks, **lib.OPTIONS
        )
        planes = partial.view(5, -1)[: 5 if v_ref is not None else 4]
        nft_finish_kernel[(1,)](
            lib.sample_means(planes, batch, chunks, n),
            Labels(sigma, r, mask),
            numbers,
            Outputs(loss, metrics, factors),
            n,
            batch,
            HAS_REF=v_ref is not None,
            **lib.OPTIONS,
        )


def nft_loss_backward(
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    beta: float,
    factors: Tensor,
    scale: Tensor,
    grad_v: Tensor,
) -> None:
    batch, n = v.shape
    chunks = lib.chunks_of(n)
    given = Sample(*map(lib.samples_of, (x0, noise, v, v_old, v_ref)))
    with lib.on_device(v):
        nft_backward_kernel[(batch * chunks,)](
            given, factors, scale, lib.samples_of(grad_v), float(beta), n, chunks, **lib.OPTIONS
        )
