"""grpo_loss: the moments of `replay`, their means, then one program that makes the rest of them
(csrc/objective.h)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import namedtuple

import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..guidance import Latents
from . import common as lib
from .replay import moments

VELOCITY = 3  # the code of kl_scale whose difference is not multiplied with B

# What a sample is scored against, [B]; mask: uint8.
Given = namedtuple("Given", "old_log_prob advantage mask")
# Constants: the code of kl_scale, whether the ratio is guarded, and whether there is a v_ref.
Variant = namedtuple("Variant", "kl_scale guard has_ref")
Numbers = namedtuple("Numbers", "clip_low clip_high advantage_clip kl_weight normalizer")
# log_prob, ratio, kl: [B]; factors: [B, 3].
Outputs = namedtuple("Outputs", "loss log_prob ratio kl metrics factors")


@lib.kernel
def grpo_finish_kernel(
    means, steps, given, numbers, out, size, batch, rows, V: constexpr, UNITS: constexpr = lib.UNITS
):
    """One program, on the means [1 to 3, B] of the squares: samples in blocks of UNITS; sums over
    samples by lane, block after block, then over the lanes."""
    size = tl.cast(size, tl.float32)
    low = 1.0 - tl.cast(numbers.clip_low, tl.float32)
    high = 1.0 + tl.cast(numbers.clip_high, tl.float32)
    bound = tl.cast(numbers.advantage_clip, tl.float32)
    bound = tl.where(bound >= 0.0, bound, float("inf"))
    kl_weight = tl.cast(numbers.kl_weight, tl.float32)
    count, unit_weight = lib.weight_of(given.mask, numbers.normalizer, batch)

    zero = tl.zeros((UNITS,), tl.float32)
    loss_sum, policy_sum, ratio_sum, low_sum, high_sum = zero, zero, zero, zero, zero
    square_sum, kl_sum, deviation, broken = zero, zero, zero, zero
    for first in range(0, batch, UNITS):
        sample, at, inside, counted = lib.units_at(first, batch, given.mask)
        weight = tl.where(counted, unit_weight, 0.0)
        row = lib.row_at(steps, rows, at)
        b = lib.entry(row, 1)
        spread = lib.entry(row, 3)
        w = lib.entry(row, 4)
        delta = lib.entry(row, 6) - lib.entry(row, 7)
        noisy = spread != 0.0
        variance = 2.0 * spread * spread
        safe = tl.where(noisy, variance, 1.0)

        z2 = tl.load(means + at)
        log_prob = w * z2 + lib.entry(row, 5)
        log_ratio = log_prob - tl.load(given.old_log_prob + at)
        exponent = log_ratio
        if V.guard:
            old2 = tl.load(means + (2 if V.has_ref else 1) * batch + at)
            exponent = tl.where(noisy, (log_ratio + tl.div_rn(old2, safe)) * spread, 0.0)
        ratio = lib.exponential(exponent)

        a = tl.load(given.advantage + at)
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
        if V.guard:
            policy = tl.div_rn(policy, delta)
            on_exponent = tl.div_rn(on_exponent, delta) * spread

        kl_factor = zero + 1.0
        if V.kl_scale == 0:
            kl_factor = tl.where(noisy, tl.div_rn(zero + 1.0, safe), 0.0)
        if V.kl_scale == 1:
            kl_factor = tl.where(noisy, tl.div_rn(delta, safe), 0.0)
        kl = zero
        on_ref = zero
        if V.has_ref:
            kl = kl_factor * tl.load(means + batch + at)
            factor = zero + 1.0 if V.kl_scale == 3 else b
            on_ref = tl.div_rn(2.0 * factor * factor, size) * (kl_factor * kl_weight * weight)
        policy_weight = weight * on_exponent
        on_z = tl.div_rn(-2.0 * w * b, size) * policy_weight
        on_old = zero
        if V.guard:
            on_old = tl.where(
                noisy, tl.div_rn(b * b, size) * tl.div_rn(2.0 * policy_weight, safe), 0.0
            )

        tl.store(out.log_prob + sample, log_prob, mask=inside)
        tl.store(out.ratio + sample, ratio, mask=inside)
        tl.store(out.kl + sample, kl, mask=inside)
        tl.store(out.factors + sample * 3, tl.where(counted, on_z, 0.0), mask=inside)
        tl.store(out.factors + sample * 3 + 1, tl.where(counted, on_ref, 0.0), mask=inside)
        tl.store(out.factors + sample * 3 + 2, tl.where(counted, on_old, 0.0), mask=inside)

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

    lost = lib.unit_sum(deviation)  # a maximum drops NaN, a sum does not
    tl.store(out.loss, lib.unit_sum(loss_sum))
    tl.store(out.metrics, tl.div_rn(lib.unit_sum(ratio_sum), count))
    tl.store(out.metrics + 1, tl.where(lost == lost, tl.max(deviation, axis=0), lost))
    tl.store(out.metrics + 2, tl.div_rn(lib.unit_sum(low_sum), count))
    tl.store(out.metrics + 3, tl.div_rn(lib.unit_sum(high_sum), count))
    tl.store(out.metrics + 4, tl.div_rn(lib.unit_sum(square_sum), count))
    tl.store(out.metrics + 5, tl.div_rn(lib.unit_sum(kl_sum), count))
    tl.store(out.metrics + 6, tl.div_rn(lib.unit_sum(policy_sum), count))
    tl.store(out.metrics + 7, tl.max(broken, axis=0))


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
    with lib.on_device(latents.x):
        squares = moments(latents, x_next, v_ref, old, table, step_index, kl_scale == VELOCITY)
        numbers = (clip_low, clip_high, advantage_clip, kl_weight, normalizer)
        grpo_finish_kernel[(1,)](
            lib.sample_means(squares, batch, lib.chunks_of(n), n),
            lib.Steps(table, step_index),
            Given(old_log_prob, advantage, mask),
            Numbers(*map(float, numbers)),
            Outputs(loss, log_prob, ratio, kl, metrics, factors),
            n,
            batch,
            table.shape[0],
            Variant(kl_scale, guard, v_ref is not None),
            **lib.OPTIONS,
        )
