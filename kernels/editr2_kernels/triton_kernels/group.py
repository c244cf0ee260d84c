"""group_advantage in one launch: a program a sample, of which the first of each group does its
group.

What needs the whole batch (std "global", fusion "gdpo") is done by the program that finishes last,
which it learns from a counter. Statistics are integer sums, so nothing depends on which program
that is, nor on the order of the others. The numbered steps are those of
`editr2_kernels.group_advantage`, which defines every rounding.

Between the two stages the outputs carry intermediates, at the cell of a unit's first turn:
`advantage` the fused advantage so far, `mask_out` bit 0 "trains" and bit 1 "counts"; `scratch` the
differences d[column, unit] for std "global".
"""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..group_advantage import AGGREGATES, BASELINES, FUSIONS, STDS, CreditOptions, workspace_of
from .common import OPTIONS, on_device

COLS = 256  # units a program looks at in one go: ten groups of 24, or one session of 3 turns and 85 siblings

# What the constants of the kernels stand for, by their indices in AGGREGATES and so on.
NONE: tl.constexpr = tl.constexpr(0)
MEAN: tl.constexpr = tl.constexpr(1)
LAST: tl.constexpr = tl.constexpr(2)
PRODUCT: tl.constexpr = tl.constexpr(3)
REWARD: tl.constexpr = tl.constexpr(0)
GDPO: tl.constexpr = tl.constexpr(2)
GROUP_STD: tl.constexpr = tl.constexpr(0)
GLOBAL_STD: tl.constexpr = tl.constexpr(1)
NO_STD: tl.constexpr = tl.constexpr(2)
# Where statistics take their units from: a set; the whole batch; the whole batch, by its fused
# advantages.
SET: tl.constexpr = tl.constexpr(0)
BATCH: tl.constexpr = tl.constexpr(1)
FUSED: tl.constexpr = tl.constexpr(2)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _size(value):
    """The bits of |value|, which order like |value|, with infinities and then NaN above every
    number."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(size):
    return tl.maximum((size >> 23) - 126, -80)


@triton.jit
def _rint(value):
    """Round to even: beyond 2^22 the sum below would be too coarse, but from 2^23 on a float is an
    integer."""
    return tl.where(
        tl.abs(value) < 4194304.0, (value + 12582912.0) - 12582912.0, _rint_large(value)
    )


@triton.jit
def _rint_large(value):
    """2^22 <= |value|: halves remain below 2^23, where adding and taking away 2^23 rounds them to
    even."""
    size = tl.abs(value)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(value < 0, -size, size)


@triton.jit
def _fixed(value, inside, size):
    """Sum of rint(value 2^(40-e)) as int64; 0 where the set is not finite."""
    usable = inside & (size < 0x7F800000)
    scaled = tl.where(usable, value * _power_of_two(40 - _exponent(size)), 0.0)
    return tl.sum(_rint(scaled).to(tl.int64), axis=0)


@triton.jit
def _moment(total, divisor, size):
    safe = tl.maximum(divisor, 1)
    magnitude = (2 * tl.abs(total) + safe) // (2 * safe)
    mean = tl.where(total < 0, -magnitude, magnitude).to(tl.float32) * _power_of_two(
        _exponent(size) - 40
    )
    return tl.where(size < 0x7F800000, tl.where(divisor > 0, mean, 0.0), float("nan"))


@triton.jit
def _valid(mask_ptr, cell, inside):
    return inside & (tl.load(mask_ptr + cell, mask=inside, other=0) != 0)


@triton.jit
def _live(scores_ptr, mask_ptr, sample, turn, inside, turns, K: tl.constexpr, FILTER: tl.constexpr):
    """Step 2."""
    live = _valid(mask_ptr, sample * turns + turn, inside)
    if FILTER >= 0:
        for earlier in range(0, turns):
            cell = sample * turns + earlier
            before = _valid(mask_ptr, cell, live & (earlier < turn))
            score = tl.load(scores_ptr + cell.to(tl.int64) * K + FILTER, mask=before, other=1.0)
            live = live & (score != 0.0)
    return live


@triton.jit
def _counted(
    scores_ptr,
    mask_ptr,
    sample,
    turn,
    inside,
    turns,
    K: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FILTER: tl.constexpr,
):
    """Step 5 before sets are dropped; FILTER: -1 also where what it masks stays in the
    statistics."""
    if AGGREGATE == NONE:
        counted = _live(scores_ptr, mask_ptr, sample, turn, inside, turns, K, FILTER)
    else:
        counted = inside
        for t in range(0, turns):
            counted = _valid(mask_ptr, sample * turns + t, counted)
    return counted


@triton.jit
def _value(scores_ptr, unit, k, inside, turns, K: tl.constexpr, AGGREGATE: tl.constexpr):
    """Step 3."""
    if AGGREGATE == NONE:
        value = tl.load(scores_ptr + unit.to(tl.int64) * K + k, mask=inside, other=0.0)
    else:
        base = scores_ptr + unit.to(tl.int64) * turns * K + k
        if AGGREGATE == LAST:
            value = tl.load(base + (turns - 1) * K, mask=inside, other=0.0)
        else:
            product = tl.load(base, mask=inside, other=0.0)
            value = product
            for t in range(1, turns):
                score = tl.load(base + t * K, mask=inside, other=0.0)
                product = product * score
                value = value + (score if AGGREGATE == MEAN else product)
            if AGGREGATE == PRODUCT:
                value = product
            else:
                value = tl.div_rn(value, tl.zeros_like(value) + tl.cast(turns, tl.float32))
    return value


@triton.jit
def _column(
    scores_ptr,
    weights_ptr,
    unit,
    k,
    inside,
    turns,
    K: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FUSE: tl.constexpr,
):
    """Step 4: the fused value, or reward k's."""
    if FUSE:
        value = tl.load(weights_ptr) * _value(scores_ptr, unit, 0, inside, turns, K, AGGREGATE)
        for other in range(1, K):
            term = tl.load(weights_ptr + other) * _value(
                scores_ptr, unit, other, inside, turns, K, AGGREGATE
            )
            value = value + term
    else:
        value = _value(scores_ptr, unit, k, inside, turns, K, AGGREGATE)
    return value


@triton.jit
def _members(
    scores_ptr,
    group_ptr,
    mask_ptr,
    mask_out_ptr,
    start,
    samples,
    turns,
    group,
    turn,
    K: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BY_TURN: tl.constexpr,
    FILTER: tl.constexpr,
    WHERE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Units of one block: their index, sample and (first) turn, and which of them count in this
    set, or batch."""
    at = start + tl.arange(0, COLS)
    if AGGREGATE != NONE:
        sample = at
        turn_of = at * 0
        unit = at
    elif BY_TURN and WHERE == SET:
        sample = at
        turn_of = at * 0 + turn
        unit = sample * turns + turn_of
    else:
        sample = at // turns
        turn_of = at % turns
        unit = at
    inside = sample < samples
    if WHERE == SET:
        inside = inside & (tl.load(group_ptr + sample, mask=inside, other=0) == group)
        inside = _counted(
            scores_ptr, mask_ptr, sample, turn_of, inside, turns, K, AGGREGATE, FILTER
        )
    else:
        flags = tl.load(mask_out_ptr + sample * turns + turn_of, mask=inside, other=0)
        inside = inside & ((flags & 2) != 0)
    return unit, sample, turn_of, inside


@triton.jit
def _read(
    scores_ptr,
    group_ptr,
    weights_ptr,
    mask_ptr,
    advantage_ptr,
    mask_out_ptr,
    start,
    samples,
    turns,
    group,
    turn,
    k,
    K: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BY_TURN: tl.constexpr,
    FILTER: tl.constexpr,
    FUSE: tl.constexpr,
    WHERE: tl.constexpr,
    COLS: tl.constexpr,
):
    unit, sample, turn_of, inside = _members(
        scores_ptr, group_ptr, mask_ptr, mask_out_ptr, start, samples, turns, group, turn,
        K, AGGREGATE, BY_TURN, FILTER, WHERE, COLS,
    )  # fmt: skip
    if WHERE == FUSED:
        value = tl.load(advantage_ptr + sample * turns + turn_of, mask=inside, other=0.0)
    else:
        value = _column(scores_ptr, weights_ptr, unit, k, inside, turns, K, AGGREGATE, FUSE)
    return unit, sample, turn_of, inside, value


@triton.jit
def _statistics(
    scores_ptr,
    group_ptr,
    weights_ptr,
    mask_ptr,
    advantage_ptr,
    mask_out_ptr,
    samples,
    turns,
    group,
    turn,
    k,
    UNBIASED: tl.constexpr,
    STD: tl.constexpr,
    K: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BY_TURN: tl.constexpr,
    FILTER: tl.constexpr,
    FUSE: tl.constexpr,
    WHERE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Step 6: the least value, the mean above it, and if STD the std (else 0), of one set or of the
    batch, in two or four passes."""
    if AGGREGATE != NONE or (BY_TURN and WHERE == SET):
        end = samples
    else:
        end = samples * turns
    high = float("-inf")
    low = float("inf")
    size = tl.cast(0, tl.int32)
    count = tl.cast(0, tl.int64)
    for start in range(0, end, COLS):
        _, _, _, inside, value = _read(
            scores_ptr,
            group_ptr,
            weights_ptr,
            mask_ptr,
            advantage_ptr,
            mask_out_ptr,
            start,
            samples,
            turns,
            group,
            turn,
            k,
            K,
            AGGREGATE,
            BY_TURN,
            FILTER,
            FUSE,
            WHERE,
            COLS,
        )
        high = tl.maximum(high, tl.max(tl.where(inside, value, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(inside, value, float("inf")), axis=0))
        size = tl.maximum(size, tl.max(tl.where(inside, _size(value), 0), axis=0))
        count += tl.sum(inside.to(tl.int64), axis=0)
    # Rounding keeps order: the largest above low is that of high.
    size = tl.where(size < 0x7F800000, _size(high - low), size)
    total = tl.cast(0, tl.int64)
    for start in range(0, end, COLS):
        _, _, _, inside, value = _read(
            scores_ptr,
            group_ptr,
            weights_ptr,
            mask_ptr,
            advantage_ptr,
            mask_out_ptr,
            start,
            samples,
            turns,
            group,
            turn,
            k,
            K,
            AGGREGATE,
            BY_TURN,
            FILTER,
            FUSE,
            WHERE,
            COLS,
        )
        total += _fixed(value - low, inside, size)
    above = _moment(total, count, size)
    std = tl.cast(0.0, tl.float32)
    if STD:
        size = tl.cast(0, tl.int32)
        for start in range(0, end, COLS):
            _, _, _, inside, value = _read(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                start,
                samples,
                turns,
                group,
                turn,
                k,
                K,
                AGGREGATE,
                BY_TURN,
                FILTER,
                FUSE,
                WHERE,
                COLS,
            )
            d = _deviation(value, low, above)
            size = tl.maximum(size, tl.max(tl.where(inside, _size(d * d), 0), axis=0))
        total = tl.cast(0, tl.int64)
        for start in range(0, end, COLS):
            _, _, _, inside, value = _read(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                start,
                samples,
                turns,
                group,
                turn,
                k,
                K,
                AGGREGATE,
                BY_TURN,
                FILTER,
                FUSE,
                WHERE,
                COLS,
            )
            d = _deviation(value, low, above)
            total += _fixed(d * d, inside, size)
        if UNBIASED:
            count = count - 1
        std = tl.sqrt_rn(_moment(total, count, size))
    return low, above, std


@triton.jit
def _deviation(value, low, above):
    return (value - low) - above


@triton.jit
def _normal(d, std, eps, FLOOR: tl.constexpr):
    if FLOOR:
        denominator = tl.where(std < eps, eps, std)
    else:
        denominator = std + eps
    zero = denominator == 0.0
    return tl.where(zero, 0.0, tl.div_rn(d, tl.zeros_like(d) + tl.where(zero, 1.0, denominator)))


@triton.jit
def _finished(a, clip, CLIP: tl.constexpr):
    """Step 11."""
    broken = _size(a) >= 0x7F800000
    if CLIP:
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
    return tl.where(broken, float("nan"), a + 0.0)


@triton.jit
def _accumulate(weights_ptr, at_ptr, a, k, inside, FUSION: tl.constexpr):
    """Step 9: one term of the sum over rewards, left to right, kept in memory."""
    if FUSION != REWARD:
        term = tl.load(weights_ptr + k) * a
        sum_before = tl.load(at_ptr, mask=inside & (k > 0), other=0.0)
        a = tl.where(k > 0, sum_before + term, term)
    tl.store(at_ptr, a, mask=inside)


@triton.jit
def _one_set(
    scores_ptr,
    group_ptr,
    weights_ptr,
    mask_ptr,
    advantage_ptr,
    mask_out_ptr,
    scratch_ptr,
    samples,
    turns,
    group,
    turn,
    eps,
    clip,
    min_std,
    max_mean,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FUSION: tl.constexpr,
    BY_TURN: tl.constexpr,
    STD: tl.constexpr,
    UNBIASED: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    FILTER: tl.constexpr,
    COUNT_FILTER: tl.constexpr,
    DROPS: tl.constexpr,
    COLLECTIVE: tl.constexpr,
    COLS: tl.constexpr,
):
    if AGGREGATE != NONE or BY_TURN:
        end = samples
    else:
        end = samples * turns
    units = samples if AGGREGATE != NONE else samples * turns
    keep = tl.cast(1, tl.int1)
    if DROPS:
        low, above, std = _statistics(
            scores_ptr,
            group_ptr,
            weights_ptr,
            mask_ptr,
            advantage_ptr,
            mask_out_ptr,
            samples,
            turns,
            group,
            turn,
            0,
            UNBIASED,
            True,
            K,
            AGGREGATE,
            BY_TURN,
            COUNT_FILTER,
            True,
            SET,
            COLS,
        )
        keep = ((std <= min_std) | (low + above >= max_mean)) == 0
    for k in range(0, COLUMNS):
        low, above, std = _statistics(
            scores_ptr,
            group_ptr,
            weights_ptr,
            mask_ptr,
            advantage_ptr,
            mask_out_ptr,
            samples,
            turns,
            group,
            turn,
            k,
            UNBIASED,
            STD == GROUP_STD,
            K,
            AGGREGATE,
            BY_TURN,
            COUNT_FILTER,
            FUSION == REWARD,
            SET,
            COLS,
        )
        for start in range(0, end, COLS):
            unit, sample, turn_of, inside, value = _read(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                start,
                samples,
                turns,
                group,
                turn,
                k,
                K,
                AGGREGATE,
                BY_TURN,
                COUNT_FILTER,
                FUSION == REWARD,
                SET,
                COLS,
            )
            d = _deviation(value, low, above)
            if STD == GLOBAL_STD:
                tl.store(scratch_ptr + tl.cast(k, tl.int64) * units + unit, d, mask=inside)
            else:
                a = _normal(d, std, eps, FLOOR) if STD == GROUP_STD else d
                _accumulate(
                    weights_ptr, advantage_ptr + sample * turns + turn_of, a, k, inside, FUSION
                )
        tl.debug_barrier()  # what one thread stored, another may load
    for start in range(0, end, COLS):
        # Every unit of the set here, not only those that count: all outputs are written.
        unit, sample, turn_of, _ = _members(
            scores_ptr, group_ptr, mask_ptr, mask_out_ptr, start, samples, turns, group, turn,
            K, AGGREGATE, BY_TURN, COUNT_FILTER, SET, COLS,
        )  # fmt: skip
        inside = sample < samples
        inside = inside & (tl.load(group_ptr + sample, mask=inside, other=0) == group)
        counted = (
            _counted(
                scores_ptr, mask_ptr, sample, turn_of, inside, turns, K, AGGREGATE, COUNT_FILTER
            )
            & keep
        )
        a = tl.load(advantage_ptr + sample * turns + turn_of, mask=counted, other=0.0)
        a = _finished(a, clip, CLIP)
        if AGGREGATE == NONE:
            cell = sample * turns + turn_of
            trained = (
                _live(scores_ptr, mask_ptr, sample, turn_of, inside, turns, K, FILTER) & counted
            )
            if COLLECTIVE:
                tl.store(
                    mask_out_ptr + cell,
                    trained.to(tl.uint8) + counted.to(tl.uint8) * 2,
                    mask=inside,
                )
            else:
                tl.store(advantage_ptr + cell, tl.where(trained, a, 0.0), mask=inside)
                tl.store(mask_out_ptr + cell, trained.to(tl.uint8), mask=inside)
        else:
            for t in range(0, turns):
                cell = sample * turns + t
                trained = (
                    _live(scores_ptr, mask_ptr, sample, sample * 0 + t, inside, turns, K, FILTER)
                    & counted
                )
                if COLLECTIVE:
                    tl.store(
                        mask_out_ptr + cell,
                        trained.to(tl.uint8) + counted.to(tl.uint8) * 2,
                        mask=inside,
                    )
                else:
                    tl.store(advantage_ptr + cell, tl.where(trained, a, 0.0), mask=inside)
                    tl.store(mask_out_ptr + cell, trained.to(tl.uint8), mask=inside)


@triton.jit
def _whole_batch(
    scores_ptr,
    group_ptr,
    weights_ptr,
    mask_ptr,
    advantage_ptr,
    mask_out_ptr,
    scratch_ptr,
    samples,
    turns,
    eps,
    clip,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FUSION: tl.constexpr,
    STD: tl.constexpr,
    UNBIASED: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    COLS: tl.constexpr,
):
    """What needs every set: the global std of each column, the renormalisation of gdpo, and the
    outputs."""
    units = samples if AGGREGATE != NONE else samples * turns
    if STD == GLOBAL_STD:
        for k in range(0, COLUMNS):
            _, _, std = _statistics(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                samples,
                turns,
                0,
                0,
                k,
                UNBIASED,
                True,
                K,
                AGGREGATE,
                False,
                -1,
                FUSION == REWARD,
                BATCH,
                COLS,
            )
            for start in range(0, units, COLS):
                unit, sample, turn_of, inside = _members(
                    scores_ptr, group_ptr, mask_ptr, mask_out_ptr, start, samples, turns, 0, 0,
                    K, AGGREGATE, False, -1, BATCH, COLS,
                )  # fmt: skip
                d = tl.load(
                    scratch_ptr + tl.cast(k, tl.int64) * units + unit, mask=inside, other=0.0
                )
                a = _normal(d, std, eps, FLOOR)
                _accumulate(
                    weights_ptr, advantage_ptr + sample * turns + turn_of, a, k, inside, FUSION
                )
            tl.debug_barrier()
    if FUSION == GDPO:
        low, above, std = _statistics(
            scores_ptr,
            group_ptr,
            weights_ptr,
            mask_ptr,
            advantage_ptr,
            mask_out_ptr,
            samples,
            turns,
            0,
            0,
            0,
            UNBIASED,
            True,
            K,
            AGGREGATE,
            False,
            -1,
            False,
            FUSED,
            COLS,
        )
    for start in range(0, units, COLS):
        unit, sample, turn_of, counted = _members(
            scores_ptr, group_ptr, mask_ptr, mask_out_ptr, start, samples, turns, 0, 0,
            K, AGGREGATE, False, -1, BATCH, COLS,
        )  # fmt: skip
        a = tl.load(advantage_ptr + sample * turns + turn_of, mask=counted, other=0.0)
        if FUSION == GDPO:
            a = _normal(_deviation(a, low, above), std, eps, FLOOR)
        a = _finished(a, clip, CLIP)
        inside = sample < samples
        for t in range(0, turns if AGGREGATE != NONE else 1):
            cell = sample * turns + turn_of + t
            trained = (tl.load(mask_out_ptr + cell, mask=inside, other=0) & 1) != 0
            tl.store(advantage_ptr + cell, tl.where(trained, a, 0.0), mask=inside)
            tl.store(mask_out_ptr + cell, trained.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["samples", "turns"])
def group_kernel(
    scores_ptr,
    group_ptr,
    weights_ptr,
    mask_ptr,
    advantage_ptr,
    mask_out_ptr,
    counter_ptr,
    scratch_ptr,
    samples,
    turns,
    eps,
    clip,
    min_std,
    max_mean,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FUSION: tl.constexpr,
    BY_TURN: tl.constexpr,
    STD: tl.constexpr,
    UNBIASED: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    FILTER: tl.constexpr,
    COUNT_FILTER: tl.constexpr,
    DROPS: tl.constexpr,
    COLLECTIVE: tl.constexpr,
    COLS: tl.constexpr,
):
    me = tl.program_id(0)
    group = tl.load(group_ptr + me)
    earlier = tl.cast(0, tl.int32)
    start = me * 0
    while (start < me) & (earlier == 0):
        at = start + tl.arange(0, COLS)
        before = at < me
        same = before & (tl.load(group_ptr + at, mask=before, other=0) == group)
        earlier = tl.max(same.to(tl.int32), axis=0)
        start += COLS
    if earlier == 0:
        for turn in range(0, turns if BY_TURN else 1):
            _one_set(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                scratch_ptr,
                samples,
                turns,
                group,
                turn,
                eps,
                clip,
                min_std,
                max_mean,
                K,
                COLUMNS,
                AGGREGATE,
                FUSION,
                BY_TURN,
                STD,
                UNBIASED,
                FLOOR,
                CLIP,
                FILTER,
                COUNT_FILTER,
                DROPS,
                COLLECTIVE,
                COLS,
            )
    if COLLECTIVE:
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == samples - 1:
            _whole_batch(
                scores_ptr,
                group_ptr,
                weights_ptr,
                mask_ptr,
                advantage_ptr,
                mask_out_ptr,
                scratch_ptr,
                samples,
                turns,
                eps,
                clip,
                K,
                COLUMNS,
                AGGREGATE,
                FUSION,
                STD,
                UNBIASED,
                FLOOR,
                CLIP,
                COLS,
            )


def group_advantage(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    mask: Tensor,
    options: CreditOptions,
    advantage: Tensor,
    mask_out: Tensor,
) -> None:
    """All tensors contiguous; scores [N, T, K] fp32, group [N] int64, weights [K] fp32, both masks
    [N, T] bool."""
    samples, turns, rewards = scores.shape
    workspace = workspace_of(options, scores)
    size = workspace.numel()
    filter_reward = -1 if options.filter_reward is None else options.filter_reward
    with on_device(scores):
        group_kernel[(samples,)](
            scores,
            group,
            weights,
            mask.view(torch.uint8),
            advantage,
            mask_out.view(torch.uint8),
            workspace if size else None,
            workspace[4:].view(torch.float32) if size > 4 else None,
            samples,
            turns,
            options.eps,
            0.0 if options.clip is None else options.clip,
            -1.0 if options.min_std is None else options.min_std,
            float("inf") if options.max_mean is None else options.max_mean,
            K=rewards,
            COLUMNS=1 if options.fusion == "reward" else rewards,
            AGGREGATE=AGGREGATES.index(options.aggregate),
            FUSION=FUSIONS.index(options.fusion),
            BY_TURN=BASELINES.index(options.baseline) == 1,
            STD=STDS.index(options.std),
            UNBIASED=options.unbiased,
            FLOOR=options.eps_mode == "floor",
            CLIP=options.clip is not None,
            FILTER=filter_reward,
            COUNT_FILTER=-1 if options.filter_in_statistics else filter_reward,
            DROPS=options.min_std is not None or options.max_mean is not None,
            COLLECTIVE=size > 0,
            COLS=COLS,
            **OPTIONS,
        )
