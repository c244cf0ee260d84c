"""nft_loss and its backward (csrc/objective.h)."""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BLOCK,
    LOG2_BLOCK,
    LOG2_UNITS,
    OPTIONS,
    UNITS,
    chunks_of,
    count_of,
    load_row,
    mask_if,
    on_device,
    place,
    rows_of,
    sample_means,
    scaled,
    store_row,
    tree_sum,
)


@triton.jit
def _errors(
    x0_ptr,
    noise_ptr,
    v_ptr,
    v_old_ptr,
    x0_stride,
    noise_stride,
    v_stride,
    v_old_stride,
    beta,
    sample,
    offsets,
    mask,
):
    """(e - beta d, e + beta d, v) with e = (noise - x0) - v_old and d = v - v_old."""
    x0 = load_row(x0_ptr, x0_stride, sample, offsets, mask)
    noise = load_row(noise_ptr, noise_stride, sample, offsets, mask)
    v = load_row(v_ptr, v_stride, sample, offsets, mask)
    v_old = load_row(v_old_ptr, v_old_stride, sample, offsets, mask)
    e = (noise - x0) - v_old
    d = (v - v_old) * tl.cast(beta, tl.float32)
    return e - d, e + d, v


@triton.jit(do_not_specialize=["batch", "chunks"])
def nft_moments_kernel(
    x0_ptr,
    noise_ptr,
    v_ptr,
    v_old_ptr,
    v_ref_ptr,
    partial_ptr,
    x0_stride,
    noise_stride,
    v_stride,
    v_old_stride,
    v_ref_stride,
    beta,
    n,
    batch,
    chunks,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """|e - beta d|, its square, |e + beta d|, its square, (v - v_ref)^2: partial[5, B, chunks]."""
    sample, chunk, offsets, mask = place(chunks, n, BLOCK)
    positive, negative, v = _errors(
        x0_ptr,
        noise_ptr,
        v_ptr,
        v_old_ptr,
        x0_stride,
        noise_stride,
        v_stride,
        v_old_stride,
        beta,
        sample,
        offsets,
        mask,
    )
    plane = chunks * tl.cast(batch, tl.int64)
    at = partial_ptr + sample * chunks + chunk
    tl.store(at, tree_sum(tl.abs(positive), LEVELS))
    tl.store(at + plane, tree_sum(positive * positive, LEVELS))
    tl.store(at + 2 * plane, tree_sum(tl.abs(negative), LEVELS))
    tl.store(at + 3 * plane, tree_sum(negative * negative, LEVELS))
    if v_ref_ptr is not None:
        difference = v - load_row(v_ref_ptr, v_ref_stride, sample, offsets, mask)
        tl.store(at + 4 * plane, tree_sum(difference * difference, LEVELS))


@triton.jit(do_not_specialize=["n", "batch"])
def nft_finish_kernel(
    means_ptr,
    sigma_ptr,
    r_ptr,
    mask_ptr,
    loss_ptr,
    metrics_ptr,
    factors_ptr,
    beta,
    advantage_max,
    ref_weight,
    min_weight,
    normalizer,
    n,
    batch,
    HAS_REF: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT_LEVELS: tl.constexpr,
):
    """One program, on means[4 or 5, B]: samples in blocks of UNITS; sums over samples by lane,
    block after block, then over the lanes."""
    size = tl.cast(n, tl.float32)
    beta = tl.cast(beta, tl.float32)
    advantage_max = tl.cast(advantage_max, tl.float32)
    ref_weight = tl.cast(ref_weight, tl.float32)
    min_weight = tl.cast(min_weight, tl.float32)
    normalizer = tl.cast(normalizer, tl.float32)
    count = count_of(mask_ptr, batch)
    unit_weight = tl.div_rn(tl.cast(1.0, tl.float32), tl.where(normalizer > 0.0, normalizer, count))

    zero = tl.zeros((UNITS,), tl.float32)
    loss_sum = zero
    policy_sum = zero
    positive_sum = zero
    negative_sum = zero
    reference_sum = zero
    broken = zero
    for first in range(0, batch, UNITS):
        sample = first + tl.arange(0, UNITS).to(tl.int64)
        inside_batch = sample < batch
        at = tl.where(inside_batch, sample, 0)
        counted = inside_batch
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + at) != 0)
        weight = tl.where(counted, unit_weight, 0.0)
        t = tl.load(sigma_ptr + at)
        r = tl.load(r_ptr + at)

        t2 = t * t
        w_positive = t * tl.load(means_ptr + at)
        w_positive = tl.where(w_positive < min_weight, min_weight, w_positive)
        w_negative = t * tl.load(means_ptr + 2 * batch + at)
        w_negative = tl.where(w_negative < min_weight, min_weight, w_negative)
        positive = t2 * tl.load(means_ptr + batch + at)
        positive = tl.div_rn(positive, w_positive)
        negative = t2 * tl.load(means_ptr + 3 * batch + at)
        negative = tl.div_rn(negative, w_negative)
        policy = tl.div_rn(advantage_max * (r * positive + (1.0 - r) * negative), zero + beta)
        scale = tl.div_rn(2.0 * advantage_max * t2, size) * weight
        on_positive = tl.div_rn(-scale * r, w_positive)
        on_negative = tl.div_rn(scale * (1.0 - r), w_negative)
        reference = zero
        on_ref = zero
        if HAS_REF:
            reference = tl.load(means_ptr + 4 * batch + at)
            on_ref = tl.div_rn(2.0 * ref_weight, size) * weight

        tl.store(factors_ptr + sample * 3, tl.where(counted, on_positive, 0.0), mask=inside_batch)
        tl.store(
            factors_ptr + sample * 3 + 1, tl.where(counted, on_negative, 0.0), mask=inside_batch
        )
        tl.store(factors_ptr + sample * 3 + 2, tl.where(counted, on_ref, 0.0), mask=inside_batch)

        sample_loss = policy + ref_weight * reference
        loss_sum += tl.where(counted, weight * sample_loss, 0.0)
        policy_sum += tl.where(counted, policy, 0.0)
        positive_sum += tl.where(counted, positive, 0.0)
        negative_sum += tl.where(counted, negative, 0.0)
        reference_sum += tl.where(counted, reference, 0.0)
        broken = tl.where(counted & (sample_loss - sample_loss != 0.0), 1.0, broken)

    tl.store(loss_ptr, tree_sum(loss_sum, UNIT_LEVELS))
    tl.store(metrics_ptr, tl.div_rn(tree_sum(policy_sum, UNIT_LEVELS), count))
    tl.store(metrics_ptr + 1, tl.div_rn(tree_sum(positive_sum, UNIT_LEVELS), count))
    tl.store(metrics_ptr + 2, tl.div_rn(tree_sum(negative_sum, UNIT_LEVELS), count))
    tl.store(metrics_ptr + 3, tl.div_rn(tree_sum(reference_sum, UNIT_LEVELS), count))
    tl.store(metrics_ptr + 4, tl.max(broken, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def nft_backward_kernel(
    x0_ptr,
    noise_ptr,
    v_ptr,
    v_old_ptr,
    v_ref_ptr,
    factors_ptr,
    scale_ptr,
    grad_v_ptr,
    x0_stride,
    noise_stride,
    v_stride,
    v_old_stride,
    v_ref_stride,
    grad_v_stride,
    beta,
    n,
    chunks,
    BLOCK: tl.constexpr,
):
    """One linear combination; a term whose factor is 0 is not added. A sample whose factors are all
    0 gets 0 unread."""
    sample, _, offsets, mask = place(chunks, n, BLOCK)
    scale = tl.load(scale_ptr)
    on_positive = scaled(tl.load(factors_ptr + sample * 3), scale)
    on_negative = scaled(tl.load(factors_ptr + sample * 3 + 1), scale)
    on_ref = scaled(tl.load(factors_ptr + sample * 3 + 2), scale)
    live = (on_positive != 0.0) | (on_negative != 0.0) | (on_ref != 0.0)
    read = mask_if(live, mask)
    positive, negative, v = _errors(
        x0_ptr,
        noise_ptr,
        v_ptr,
        v_old_ptr,
        x0_stride,
        noise_stride,
        v_stride,
        v_old_stride,
        beta,
        sample,
        offsets,
        read,
    )
    grad = tl.where(on_positive != 0.0, on_positive * positive, 0.0)
    grad = tl.where(on_negative != 0.0, grad + on_negative * negative, grad)
    if v_ref_ptr is not None:
        v_ref = load_row(v_ref_ptr, v_ref_stride, sample, offsets, mask_if(on_ref != 0.0, mask))
        grad = tl.where(on_ref != 0.0, grad + on_ref * (v - v_ref), grad)
    store_row(grad_v_ptr, grad_v_stride, sample, offsets, grad, mask)


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
    with on_device(v):
        nft_moments_kernel[(batch * chunks,)](
            **rows_of(x0=x0, noise=noise, v=v, v_old=v_old, v_ref=v_ref),
            partial_ptr=partial,
            beta=float(beta),
            n=n,
            batch=batch,
            chunks=chunks,
            BLOCK=BLOCK,
            LEVELS=LOG2_BLOCK,
            **OPTIONS,
        )
        means = sample_means(partial.view(5, -1)[: 5 if v_ref is not None else 4], batch, chunks, n)
        nft_finish_kernel[(1,)](
            means,
            sigma,
            r,
            mask,
            loss,
            metrics,
            factors,
            float(beta),
            float(advantage_max),
            float(ref_weight),
            float(min_weight),
            float(normalizer),
            n,
            batch,
            HAS_REF=v_ref is not None,
            UNITS=UNITS,
            UNIT_LEVELS=LOG2_UNITS,
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
    with on_device(v):
        nft_backward_kernel[(batch * chunks,)](
            **rows_of(x0=x0, noise=noise, v=v, v_old=v_old, v_ref=v_ref, grad_v=grad_v),
            factors_ptr=factors,
            scale_ptr=scale,
            beta=float(beta),
            n=n,
            chunks=chunks,
            BLOCK=BLOCK,
            **OPTIONS,
        )
