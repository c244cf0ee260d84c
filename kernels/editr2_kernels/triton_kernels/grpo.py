"""grpo_loss: the moments of `replay`, their means, then one program that makes the rest of them
(csrc/objective.h)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from ..guidance import Latents
from .common import (
    OPTIONS,
    UNITS,
    Transition,
    chunks_of,
    entry,
    exponential,
    kernel,
    on_device,
    row_at,
    sample_means,
    unit_sum,
    units_at,
    weight_of,
)
from .replay import moments

VELOCITY = 3  # the code of kl_scale whose difference is not multiplied with B


class Policy(NamedTuple):
    """What a sample is scored against, [B]; mask: uint8."""

    old_log_prob: Any
    advantage: Any
    mask: Any


class Numbers(NamedTuple):
    clip_low: float
    clip_high: float
    advantage_clip: float
    kl_weight: float
    normalizer: float


class Outputs(NamedTuple):
    """log_prob, ratio, kl: [B]; factors: [B, 3]."""

    loss: Any
    log_prob: Any
    ratio: Any
    kl: Any
    metrics: Any
    factors: Any


@kernel
def grpo_finish_kernel(
    means,
    transition,
    policy,
    numbers,
    outputs,
    size,
    batch,
    rows,
    KL_SCALE: tl.constexpr,
    GUARD: tl.constexpr,
    HAS_REF: tl.constexpr,
    UNITS: tl.constexpr = UNITS,
):
    """One program, on the means [1 to 3, B] of the squares: samples in blocks of UNITS; sums over
    samples by lane, block after block, then over the lanes."""
    size = tl.cast(size, tl.float32)
    low = 1.0 - tl.cast(numbers.clip_low, tl.float32)
    high = 1.0 + tl.cast(numbers.clip_high, tl.float32)
    bound = tl.cast(numbers.advantage_clip, tl.float32)
    bound = tl.where(bound >= 0.0, bound, float("inf"))
    kl_weight = tl.cast(numbers.kl_weight, tl.float32)
    count, unit_weight = weight_of(policy.mask, numbers.normalizer, batch)

    zero = tl.zeros((UNITS,), tl.float32)
    loss_sum = zero
    ratio_sum = zero
    deviation = zero
    low_sum = zero
    high_sum = zero
    square_sum = zero
    kl_sum = zero
    policy_sum = zero
    broken = zero
    for first in range(0, batch, UNITS):
        sample, at, inside, counted = units_at(first, batch, policy.mask)
        weight = tl.where(counted, unit_weight, 0.0)
        row = row_at(transition, rows, at)
        b = entry(row, 1)
        spread = entry(row, 3)
        w = entry(row, 4)
        delta = entry(row, 6) - entry(row, 7)
        noisy = spread != 0.0
        variance = 2.0 * spread * spread
        safe = tl.where(noisy, variance, 1.0)

        z2 = tl.load(means + at)
        log_prob = w * z2 + entry(row, 5)
        log_ratio = log_prob - tl.load(policy.old_log_prob + at)
        exponent = log_ratio
        if GUARD:
            old2 = tl.load(means + (2 if HAS_REF else 1) * batch + at)
            exponent = tl.where(noisy, (log_ratio + tl.div_rn(old2, safe)) * spread, 0.0)
        ratio = exponential(exponent)

        a = tl.load(policy.advantage + at)
        a = tl.where(a < -bound, -bound, a)
        a = tl.where(a > bound, bound, a)
        # A sample without advantage has no loss, also where its ratio overflows and 0 * inf would
        # be NaN.
        surrogate = tl.where((a == 0.0) & (ratio == float("inf")), 1.0, ratio)
        clipped = tl.where(surrogate < low, low, surrogate)
        clipped = tl.where(clipped > high, high, clipped)
        free_loss = -a * surrogate
        clipped_loss = -a * clipped
        held = free_loss < clipped_loss  # false for NaN, which must stay visible
        policy = tl.where(held, clipped_loss, free_loss)
        on_exponent = tl.where(held, 0.0, free_loss)
        if GUARD:
            policy = tl.div_rn(policy, delta)
            on_exponent = tl.div_rn(on_exponent, delta) * spread

        kl_factor = zero + 1.0
        if KL_SCALE == 0:
            kl_factor = tl.where(noisy, tl.div_rn(zero + 1.0, safe), 0.0)
        if KL_SCALE == 1:
            kl_factor = tl.where(noisy, tl.div_rn(delta, safe), 0.0)
        kl = zero
        on_ref = zero
        if HAS_REF:
            kl = kl_factor * tl.load(means + batch + at)
            factor = zero + 1.0 if KL_SCALE == 3 else b
            on_ref = tl.div_rn(2.0 * factor * factor, size) * (kl_factor * kl_weight * weight)
        policy_weight = weight * on_exponent
        on_z = tl.div_rn(-2.0 * w * b, size) * policy_weight
        on_old = zero
        if GUARD:
            on_old = tl.where(
                noisy, tl.div_rn(b * b, size) * tl.div_rn(2.0 * policy_weight, safe), 0.0
            )

        tl.store(outputs.log_prob + sample, log_prob, mask=inside)
        tl.store(outputs.ratio + sample, ratio, mask=inside)
        tl.store(outputs.kl + sample, kl, mask=inside)
        tl.store(outputs.factors + sample * 3, tl.where(counted, on_z, 0.0), mask=inside)
        tl.store(outputs.factors + sample * 3 + 1, tl.where(counted, on_ref, 0.0), mask=inside)
        tl.store(outputs.factors + sample * 3 + 2, tl.where(counted, on_old, 0.0), mask=inside)

        sample_loss = policy + kl_weight * kl
        away = tl.where(counted, tl.abs(ratio - 1.0), 0.0)
        loss_sum += tl.where(counted, weight * sample_loss, 0.0)
        ratio_sum += tl.where(counted, ratio, 0.0)
        deviation = tl.where((away > deviation) | (away != away), away, deviation)
        low_sum += tl.where(counted & (ratio < low), 1.0, 0.0)
        high_sum += tl.where(counted & (ratio > high), 1.0, 0.0)
        square_sum += tl.where(counted, 0.5 * log_ratio * log_ratio, 0.0)
        kl_sum += tl.where(counted, kl, 0.0)
        policy_sum += tl.where(counted, policy, 0.0)
        broken = tl.where(counted & (sample_loss - sample_loss != 0.0), 1.0, broken)

    lost = unit_sum(deviation)  # a maximum drops NaN, a sum does not
    tl.store(outputs.loss, unit_sum(loss_sum))
    tl.store(outputs.metrics, tl.div_rn(unit_sum(ratio_sum), count))
    tl.store(outputs.metrics + 1, tl.where(lost == lost, tl.max(deviation, axis=0), lost))
    tl.store(outputs.metrics + 2, tl.div_rn(unit_sum(low_sum), count))
    tl.store(outputs.metrics + 3, tl.div_rn(unit_sum(high_sum), count))
    tl.store(outputs.metrics + 4, tl.div_rn(unit_sum(square_sum), count))
    tl.store(outputs.metrics + 5, tl.div_rn(unit_sum(kl_sum), count))
    tl.store(outputs.metrics + 6, tl.div_rn(unit_sum(policy_sum), count))
    tl.store(outputs.metrics + 7, tl.max(broken, axis=0))


def grpo_loss(
    latents: Latents,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
    kl_weight: float,
    kl_scale: int,
    guard: bool,
    normalizer: float,
    loss: Tensor,
    log_prob: Tensor,
    ratio: Tensor,
    kl: Tensor,
    metrics: Tensor,
    factors: Tensor,
) -> None:
    """mask: uint8 [B]. v_old is read where guard is set."""
    batch, n = latents.x.shape
    old = v_old if guard else None
    with on_device(latents.x):
        squares = moments(latents, x_next, v_ref, old, table, step_index, kl_scale == VELOCITY)
        numbers = (clip_low, clip_high, advantage_clip, kl_weight, normalizer)
        grpo_finish_kernel[(1,)](
            sample_means(squares, batch, chunks_of(n), n),
            Transition(table, step_index),
            Policy(old_log_prob, advantage, mask),
            Numbers(*map(float, numbers)),
            Outputs(loss, log_prob, ratio, kl, metrics, factors),
            n,
            batch,
            table.shape[0],
            KL_SCALE=kl_scale,
            GUARD=guard,
            HAS_REF=v_ref is not None,
            **OPTIONS,
        )
