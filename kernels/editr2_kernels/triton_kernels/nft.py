"""nft_loss and its backward (csrc/objective.h)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    UNITS,
    chunks_of,
    kernel,
    load,
    on_device,
    only_if,
    place,
    sample_means,
    samples_of,
    scaled,
    store,
    tree_sum,
    unit_sum,
    units_at,
    weight_of,
)


class Sample(NamedTuple):
    """What a loss reads, [B, N]."""

    x0: Any
    noise: Any
    v: Any
    v_old: Any
    v_ref: Any


class Labels(NamedTuple):
    """What is known of a sample, [B]; mask: uint8."""

    sigma: Any
    r: Any
    mask: Any


class Numbers(NamedTuple):
    beta: float
    advantage_max: float
    ref_weight: float
    min_weight: float
    normalizer: float


class Outputs(NamedTuple):
    """factors: [B, 3]."""

    loss: Any
    metrics: Any
    factors: Any


@triton.jit
def _errors(given, beta, at):
    """(e - beta d, e + beta d, v) with e = (noise - x0) - v_old and d = v - v_old."""
    x0 = load(given.x0, at)
    noise = load(given.noise, at)
    v = load(given.v, at)
    v_old = load(given.v_old, at)
    e = (noise - x0) - v_old
    d = (v - v_old) * tl.cast(beta, tl.float32)
    return e - d, e + d, v


@kernel
def nft_moments_kernel(given, partial, beta, n, batch, chunks):
    """|e - beta d|, its square, |e + beta d|, its square, (v - v_ref)^2: partial[5, B, chunks]."""
    at = place(chunks, n)
    positive, negative, v = _errors(given, beta, at)
    plane = chunks * tl.cast(batch, tl.int64)
    partial += at.sample * chunks + at.chunk
    tl.store(partial, tree_sum(tl.abs(positive)))
    tl.store(partial + plane, tree_sum(positive * positive))
    tl.store(partial + 2 * plane, tree_sum(tl.abs(negative)))
    tl.store(partial + 3 * plane, tree_sum(negative * negative))
    if given.v_ref is not None:
        difference = v - load(given.v_ref, at)
        tl.store(partial + 4 * plane, tree_sum(difference * difference))


@kernel
def nft_finish_kernel(
    means, labels, numbers, outputs, size, batch, HAS_REF: tl.constexpr, UNITS: tl.constexpr = UNITS
):
    """One program, on means[4 or 5, B]: samples in blocks of UNITS; sums over samples by lane,
    block after block, then over the lanes."""
    size = tl.cast(size, tl.float32)
    beta = tl.cast(numbers.beta, tl.float32)
    advantage_max = tl.cast(numbers.advantage_max, tl.float32)
    ref_weight = tl.cast(numbers.ref_weight, tl.float32)
    min_weight = tl.cast(numbers.min_weight, tl.float32)
    count, unit_weight = weight_of(labels.mask, numbers.normalizer, batch)

    zero = tl.zeros((UNITS,), tl.float32)
    loss_sum = zero
    policy_sum = zero
    positive_sum = zero
    negative_sum = zero
    reference_sum = zero
    broken = zero
    for first in range(0, batch, UNITS):
        sample, at, inside, counted = units_at(first, batch, labels.mask)
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

        factors = outputs.factors + sample * 3
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

    tl.store(outputs.loss, unit_sum(loss_sum))
    tl.store(outputs.metrics, tl.div_rn(unit_sum(policy_sum), count))
    tl.store(outputs.metrics + 1, tl.div_rn(unit_sum(positive_sum), count))
    tl.store(outputs.metrics + 2, tl.div_rn(unit_sum(negative_sum), count))
    tl.store(outputs.metrics + 3, tl.div_rn(unit_sum(reference_sum), count))
    tl.store(outputs.metrics + 4, tl.max(broken, axis=0))


@kernel
def nft_backward_kernel(given, factors, scale, grad_v, beta, n, chunks):
    """One linear combination; a term whose factor is 0 is not added. A sample whose factors are all
    0 gets 0 unread."""
    at = place(chunks, n)
    factor = tl.load(scale)
    on_positive = scaled(tl.load(factors + at.sample * 3), factor)
    on_negative = scaled(tl.load(factors + at.sample * 3 + 1), factor)
    on_ref = scaled(tl.load(factors + at.sample * 3 + 2), factor)
    live = (on_positive != 0.0) | (on_negative != 0.0) | (on_ref != 0.0)
    positive, negative, v = _errors(given, beta, only_if(live, at))
    grad = tl.where(on_positive != 0.0, on_positive * positive, 0.0)
    grad = tl.where(on_negative != 0.0, grad + on_negative * negative, grad)
    if given.v_ref is not None:
        v_ref = load(given.v_ref, only_if(on_ref != 0.0, at))
        grad = tl.where(on_ref != 0.0, grad + on_ref * (v - v_ref), grad)
    store(grad_v, at, grad)


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
    chunks = chunks_of(n)
    partial = torch.empty(5, batch, chunks, dtype=torch.float32, device=v.device)
    given = Sample(*map(samples_of, (x0, noise, v, v_old, v_ref)))
    numbers = Numbers(*map(float, (beta, advantage_max, ref_weight, min_weight, normalizer)))
    with on_device(v):
        nft_moments_kernel[(batch * chunks,)](
            given, partial, numbers.beta, n, batch, chunks, **OPTIONS
        )
        planes = partial.view(5, -1)[: 5 if v_ref is not None else 4]
        nft_finish_kernel[(1,)](
            sample_means(planes, batch, chunks, n),
            Labels(sigma, r, mask),
            numbers,
            Outputs(loss, metrics, factors),
            n,
            batch,
            HAS_REF=v_ref is not None,
            **OPTIONS,
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
    chunks = chunks_of(n)
    given = Sample(*map(samples_of, (x0, noise, v, v_old, v_ref)))
    with on_device(v):
        nft_backward_kernel[(batch * chunks,)](
            given, factors, scale, samples_of(grad_v), float(beta), n, chunks, **OPTIONS
        )
