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

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..credit import CreditOptions, workspace_of
from . import common as lib

COLS = 256  # ten groups of 24, or one session of 3 turns and 85 siblings

# scores, applies: [N, T, K]; group: [N]; weights: [K]; mask, advantage, mask_out: [N, T]; counter
# and scratch: parts of the workspace. No `applies` where every reward does.
Batch = namedtuple("Batch", "scores group weights mask applies advantage mask_out counter scratch")
Bounds = namedtuple("Bounds", "eps clip min_std max_mean")
# Constants: how many rewards, columns that are normalised one by one and units that a program looks
# at in one go, and `CreditOptions` as far as code depends on them. count_filter is the filter, or
# None where what it masks stays in the statistics.
Credit = namedtuple(
    "Credit",
    "K columns cols aggregate fusion by_turn std unbiased floor clip filter count_filter drops "
    "collective",
)
# The size of the batch, and the group and turn whose units are a set.
Set = namedtuple("Set", "samples turns group turn")
# A block of units: their index, sample, (first) turn and its cell, and which there are.
Units = namedtuple("Units", "unit sample turn cell inside")


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
def _valid(batch, cell, inside):
    return inside & (tl.load(batch.mask + cell, mask=inside, other=0) != 0)


@triton.jit
def _applies(batch, cell, k, inside, K: constexpr):
    """Where reward k applies to a turn."""
    if batch.applies is None:
        return inside
    else:
        at = batch.applies + cell.to(tl.int64) * K + k
        return inside & (tl.load(at, mask=inside, other=0) != 0)


@triton.jit
def _judged(batch, cell, inside, C: constexpr):
    """Step 1: where a reward of weight other than 0 applies, or any where all weights are 0."""
    if batch.applies is None:
        return inside
    else:
        weights = tl.cast(0, tl.int32)
        heard = cell * 0
        some = cell * 0
        for k in range(0, C.K):
            weight = (tl.load(batch.weights + k) != 0.0).to(tl.int32)
            applies = _applies(batch, cell, k, inside, C.K).to(tl.int32)
            weights += weight
            heard += applies * weight
            some += applies
        return tl.where(weights > 0, heard, some) > 0


@triton.jit
def _unit_applies(batch, turns, unit, k, inside, C: constexpr):
    """Step 3: where reward k applies to a unit."""
    if C.aggregate == "none" or batch.applies is None:
        return _applies(batch, unit, k, inside, C.K)
    else:
        applies = unit < 0
        for t in range(0, turns):
            applies = applies | _applies(batch, unit * turns + t, k, inside, C.K)
        return applies


@triton.jit
def _live(batch, turns, sample, turn, inside, K: constexpr, FILTER: constexpr):
    """Step 2."""
    live = _valid(batch, sample * turns + turn, inside)
    if FILTER is not None:
        for earlier in range(0, turns):
            cell = sample * turns + earlier
            before = _valid(batch, cell, live & (earlier < turn))
            before = _applies(batch, cell, FILTER, before, K)
            score = tl.load(batch.scores + cell.to(tl.int64) * K + FILTER, mask=before, other=1.0)
            live = live & (score != 0.0)
    return live


@triton.jit
def _counted(batch, turns, units, C: constexpr):
    """Step 5 before sets are dropped."""
    if C.aggregate == "none":
        live = _live(batch, turns, units.sample, units.turn, units.inside, C.K, C.count_filter)
        return _judged(batch, units.cell, live, C)
    else:
        counted = units.inside
        for t in range(0, turns):
            counted = _valid(batch, units.sample * turns + t, counted)
        if batch.applies is None:
            return counted
        else:
            judged = units.unit < 0
            for t in range(0, turns):
                judged = judged | _judged(batch, units.sample * turns + t, counted, C)
            return judged


@triton.jit
def _partial_value(batch, turns, unit, k, inside, C: constexpr):
    """Step 3 of some turns: one to which reward k does not apply leaves all as it was."""
    product = tl.where(inside, 1.0, 1.0)
    last = product - 1.0
    value = last
    count = last
    for t in range(0, turns):
        cell = unit * turns + t
        here = _applies(batch, cell, k, inside, C.K)
        score = tl.load(batch.scores + cell.to(tl.int64) * C.K + k, mask=here, other=0.0)
        last = tl.where(here, score, last)
        product = tl.where(here, product * score, product)
        value = tl.where(here, value + (score if C.aggregate == "mean" else product), value)
        count = tl.where(here, count + 1.0, count)
    if C.aggregate == "last":
        return last
    elif C.aggregate == "product":
        return product
    else:
        return tl.div_rn(value, tl.maximum(count, 1.0))


@triton.jit
def _value(batch, turns, unit, k, inside, C: constexpr):
    """Step 3, of units to which reward k applies."""
    if C.aggregate == "none":
        return tl.load(batch.scores + unit.to(tl.int64) * C.K + k, mask=inside, other=0.0)
    elif batch.applies is not None:
        return _partial_value(batch, turns, unit, k, inside, C)
    else:
        base = batch.scores + unit.to(tl.int64) * turns * C.K + k
        if C.aggregate == "last":
            return tl.load(base + (turns - 1) * C.K, mask=inside, other=0.0)
        else:
            product = tl.load(base, mask=inside, other=0.0)
            value = product
            for t in range(1, turns):
                score = tl.load(base + t * C.K, mask=inside, other=0.0)
                product = product * score
                value = value + (score if C.aggregate == "mean" else product)
            if C.aggregate == "product":
                return product
            else:
                return tl.div_rn(value, tl.zeros_like(value) + tl.cast(turns, tl.float32))


@triton.jit
def _term(batch, turns, unit, k, inside, C: constexpr):
    """Step 4: the weighted value of reward k, 0 where it does not apply."""
    here = _unit_applies(batch, turns, unit, k, inside, C)
    value = tl.load(batch.weights + k) * _value(batch, turns, unit, k, here, C)
    if batch.applies is None:
        return value
    else:
        return tl.where(here, value, 0.0)


@triton.jit
def _share(batch, turns, unit, inside, C: constexpr):
    """Step 4: what the weighted sum is multiplied by."""
    whole = tl.cast(0.0, tl.float32)
    heard = tl.where(inside, 0.0, 0.0)
    for k in range(0, C.K):
        size = tl.abs(tl.load(batch.weights + k))
        whole = whole + size
        heard = heard + tl.where(_unit_applies(batch, turns, unit, k, inside, C), size, 0.0)
    same = (heard == whole) | (inside == 0)
    return tl.where(same, 1.0, tl.div_rn(tl.zeros_like(heard) + whole, tl.where(same, 1.0, heard)))


@triton.jit
def _column(batch, turns, unit, k, inside, C: constexpr, FUSE: constexpr):
    """Step 4: the fused value, or reward k's."""
    if FUSE:
        value = _term(batch, turns, unit, 0, inside, C)
        for other in range(1, C.K):
            value = value + _term(batch, turns, unit, other, inside, C)
        if batch.applies is not None:
            value = value * _share(batch, turns, unit, inside, C)
        return value
    else:
        return _value(batch, turns, unit, k, inside, C)


@triton.jit
def _extent(of, C: constexpr, WHERE: constexpr):
    """How many units there are to look through."""
    if C.aggregate != "none" or (C.by_turn and WHERE == "set"):
        return of.samples
    else:
        return of.samples * of.turns


@triton.jit
def _units(batch, of, start, C: constexpr, WHERE: constexpr):
    """The units of a block that are of the set or, WHERE not "set", of the batch."""
    at = start + tl.arange(0, C.cols)
    if C.aggregate != "none":
        sample = at
        turn = at * 0
        unit = at
    elif C.by_turn and WHERE == "set":
        sample = at
        turn = at * 0 + of.turn
        unit = sample * of.turns + turn
    else:
        sample = at // of.turns
        turn = at % of.turns
        unit = at
    inside = sample < of.samples
    if WHERE == "set":
        inside = inside & (tl.load(batch.group + sample, mask=inside, other=0) == of.group)
    cell = sample * of.turns + turn
    return Units(unit=unit, sample=sample, turn=turn, cell=cell, inside=inside)


@triton.jit
def _members(batch, of, start, C: constexpr, WHERE: constexpr):
    """Those units, and which of them count."""
    units = _units(batch, of, start, C, WHERE)
    if WHERE == "set":
        return units, _counted(batch, of.turns, units, C)
    else:
        flags = tl.load(batch.mask_out + units.cell, mask=units.inside, other=0)
        return units, units.inside & ((flags & 2) != 0)


@triton.jit
def _read(batch, of, start, k, C: constexpr, WHERE: constexpr, FUSE: constexpr):
    """Those units, which of them count in column k, and their values there; WHERE "fused": their
    fused advantages."""
    units, counted = _members(batch, of, start, C, WHERE)
    if WHERE == "fused":
        value = tl.load(batch.advantage + units.cell, mask=counted, other=0.0)
    else:
        if not FUSE:
            counted = _unit_applies(batch, of.turns, units.unit, k, counted, C)
        value = _column(batch, of.turns, units.unit, k, counted, C, FUSE)
    return units, counted, value


@triton.jit
def _statistics(batch, of, k, C: constexpr, WHERE: constexpr, FUSE: constexpr, STD: constexpr):
    """Step 6: the least value, the mean above it, and if STD the std (else 0), of one set or of the
    batch, in two or four passes."""
    end = _extent(of, C, WHERE)
    high = float("-inf")
    low = float("inf")
    size = tl.cast(0, tl.int32)
    count = tl.cast(0, tl.int64)
    for start in range(0, end, C.cols):
        _, counted, value = _read(batch, of, start, k, C, WHERE, FUSE)
        high = tl.maximum(high, tl.max(tl.where(counted, value, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(counted, value, float("inf")), axis=0))
        size = tl.maximum(size, tl.max(tl.where(counted, _size(value), 0), axis=0))
        count += tl.sum(counted.to(tl.int64), axis=0)
    # Rounding keeps order: the largest above low is that of high.
    size = tl.where(size < 0x7F800000, _size(high - low), size)
    total = tl.cast(0, tl.int64)
    for start in range(0, end, C.cols):
        _, counted, value = _read(batch, of, start, k, C, WHERE, FUSE)
        total += _fixed(value - low, counted, size)
    above = _moment(total, count, size)
    std = tl.cast(0.0, tl.float32)
    if STD:
        size = tl.cast(0, tl.int32)
        for start in range(0, end, C.cols):
            _, counted, value = _read(batch, of, start, k, C, WHERE, FUSE)
            d = (value - low) - above
            size = tl.maximum(size, tl.max(tl.where(counted, _size(d * d), 0), axis=0))
        total = tl.cast(0, tl.int64)
        for start in range(0, end, C.cols):
            _, counted, value = _read(batch, of, start, k, C, WHERE, FUSE)
            d = (value - low) - above
            total += _fixed(d * d, counted, size)
        if C.unbiased:
            count = count - 1
        std = tl.sqrt_rn(_moment(total, count, size))
    return low, above, std


@triton.jit
def _normal(d, std, eps, FLOOR: constexpr):
    if FLOOR:
        denominator = tl.where(std < eps, eps, std)
    else:
        denominator = std + eps
    zero = denominator == 0.0
    return tl.where(zero, 0.0, tl.div_rn(d, tl.zeros_like(d) + tl.where(zero, 1.0, denominator)))


@triton.jit
def _finished(a, clip, CLIP: constexpr):
    """Step 11."""
    broken = _size(a) >= 0x7F800000
    if CLIP:
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
    return tl.where(broken, float("nan"), a + 0.0)


@triton.jit
def _accumulate(batch, cell, a, k, inside, C: constexpr):
    """Step 9: one term of the sum over rewards, left to right, kept in memory."""
    if C.fusion != "reward":
        term = tl.load(batch.weights + k) * a
        sum_before = tl.load(batch.advantage + cell, mask=inside & (k > 0), other=0.0)
        a = tl.where(k > 0, sum_before + term, term)
    tl.store(batch.advantage + cell, a, mask=inside)


@triton.jit
def _sums(batch, of, C: constexpr, WHERE: constexpr, BEGIN: constexpr):
    """Where not every reward applies: what those sums begin with, and what they are multiplied by
    at the end."""
    if batch.applies is not None and C.fusion != "reward":
        for start in range(0, _extent(of, C, WHERE), C.cols):
            units, counted = _members(batch, of, start, C, WHERE)
            a = tl.where(counted, 0.0, 0.0)
            if not BEGIN:
                a = tl.load(batch.advantage + units.cell, mask=counted, other=0.0)
                a = a * _share(batch, of.turns, units.unit, counted, C)
            tl.store(batch.advantage + units.cell, a, mask=counted)
        tl.debug_barrier()


@triton.jit
def _one_set(batch, of, bounds, C: constexpr):
    end = _extent(of, C, "set")
    columns = of.samples if C.aggregate != "none" else of.samples * of.turns
    keep = tl.cast(1, tl.int1)
    if C.drops:
        low, above, std = _statistics(batch, of, 0, C, "set", True, True)
        keep = ((std <= bounds.min_std) | (low + above >= bounds.max_mean)) == 0
    if C.std != "global":
        _sums(batch, of, C, "set", True)
    for k in range(0, C.columns):
        low, above, std = _statistics(
            batch, of, k, C, "set", C.fusion == "reward", C.std == "group"
        )
        for start in range(0, end, C.cols):
            units, counted, value = _read(batch, of, start, k, C, "set", C.fusion == "reward")
            d = (value - low) - above
            if C.std == "global":
                column = batch.scratch + tl.cast(k, tl.int64) * columns
                tl.store(column + units.unit, d, mask=counted)
            else:
                a = _normal(d, std, bounds.eps, C.floor) if C.std == "group" else d
                _accumulate(batch, units.cell, a, k, counted, C)
        tl.debug_barrier()  # what one thread stored, another may load
    if C.std != "global":
        _sums(batch, of, C, "set", False)
    for start in range(0, end, C.cols):
        # Every unit of the set here, not only those that count: all outputs are written.
        units = _units(batch, of, start, C, "set")
        counted = _counted(batch, of.turns, units, C) & keep
        a = tl.load(batch.advantage + units.cell, mask=counted, other=0.0)
        a = _finished(a, bounds.clip, C.clip)
        for t in range(0, of.turns if C.aggregate != "none" else 1):
            turn = units.turn + t
            live = _live(batch, of.turns, units.sample, turn, units.inside, C.K, C.filter)
            if C.aggregate != "none":
                live = _judged(batch, units.cell + t, live, C)
            _write(batch, units.cell + t, a, live & counted, counted, units.inside, C.collective)


@triton.jit
def _write(batch, cell, a, trained, counted, inside, COLLECTIVE: constexpr):
    """The outputs of a cell, or what the second stage makes them of."""
    flags = trained.to(tl.uint8)
    if COLLECTIVE:
        flags = flags + counted.to(tl.uint8) * 2
    else:
        tl.store(batch.advantage + cell, tl.where(trained, a, 0.0), mask=inside)
    tl.store(batch.mask_out + cell, flags, mask=inside)


@triton.jit
def _whole_batch(batch, of, bounds, C: constexpr):
    """What needs every set: the global std of each column, the renormalisation of gdpo, and the
    outputs."""
    end = _extent(of, C, "batch")
    if C.std == "global":
        _sums(batch, of, C, "batch", True)
        for k in range(0, C.columns):
            _, _, std = _statistics(batch, of, k, C, "batch", C.fusion == "reward", True)
            for start in range(0, end, C.cols):
                units, counted = _members(batch, of, start, C, "batch")
                if C.fusion != "reward":
                    counted = _unit_applies(batch, of.turns, units.unit, k, counted, C)
                column = batch.scratch + tl.cast(k, tl.int64) * end
                d = tl.load(column + units.unit, mask=counted, other=0.0)
                a = _normal(d, std, bounds.eps, C.floor)
                _accumulate(batch, units.cell, a, k, counted, C)
            tl.debug_barrier()
        _sums(batch, of, C, "batch", False)
    if C.fusion == "gdpo":
        low, above, std = _statistics(batch, of, 0, C, "fused", False, True)
    for start in range(0, end, C.cols):
        units, counted = _members(batch, of, start, C, "batch")
        a = tl.load(batch.advantage + units.cell, mask=counted, other=0.0)
        if C.fusion == "gdpo":
            a = _normal((a - low) - above, std, bounds.eps, C.floor)
        a = _finished(a, bounds.clip, C.clip)
        for t in range(0, of.turns if C.aggregate != "none" else 1):
            cell = units.cell + t
            trained = (tl.load(batch.mask_out + cell, mask=units.inside, other=0) & 1) != 0
            _write(batch, cell, a, trained, counted, units.inside, False)


@lib.kernel
def group_kernel(batch, bounds, samples, turns, C: constexpr):
    me = tl.program_id(0)
    group = tl.load(batch.group + me)
    earlier = tl.cast(0, tl.int32)
    start = me * 0
    while (start < me) & (earlier == 0):
        at = start + tl.arange(0, C.cols)
        before = at < me
        same = before & (tl.load(batch.group + at, mask=before, other=0) == group)
        earlier = tl.max(same.to(tl.int32), axis=0)
        start += C.cols
    if earlier == 0:
        for turn in range(0, turns if C.by_turn else 1):
            of = Set(samples=samples, turns=turns, group=group, turn=turn)
            _one_set(batch, of, bounds, C)
    if C.collective:
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(batch.counter, 1, sem="acq_rel") == samples - 1:
            every = Set(samples=samples, turns=turns, group=0, turn=0)
            _whole_batch(batch, every, bounds, C)


def group_advantage(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    mask: Tensor,
    applies: Tensor | None,
    options: CreditOptions,
    advantage: Tensor,
    mask_out: Tensor,
) -> None:
    """All tensors contiguous; scores [N, T, K] fp32, group [N] int64, weights [K] fp32, both masks
    [N, T] bool, applies [N, T, K] bool."""
    samples, turns, rewards = scores.shape
    workspace = workspace_of(options, scores)
    size = workspace.numel()
    masks = mask.view(torch.uint8), mask_out.view(torch.uint8)
    applied = None if applies is None else applies.view(torch.uint8)
    counter = workspace if size else None
    scratch = workspace[4:].view(torch.float32) if size > 4 else None
    batch = Batch(scores, group, weights, masks[0], applied, advantage, masks[1], counter, scratch)
    bounds = Bounds(
        options.eps,
        0.0 if options.clip is None else options.clip,
        -1.0 if options.min_std is None else options.min_std,
        float("inf") if options.max_mean is None else options.max_mean,
    )
    credit = Credit(
        K=rewards,
        cols=COLS,
        columns=1 if options.fusion == "reward" else rewards,
        aggregate=options.aggregate,
        fusion=options.fusion,
        by_turn=options.baseline == "session_turn",
        std=options.std,
        unbiased=options.unbiased,
        floor=options.eps_mode == "floor",
        clip=options.clip is not None,
        filter=options.filter_reward,
        count_filter=None if options.filter_in_statistics else options.filter_reward,
        drops=options.min_std is not None or options.max_mean is not None,
        collective=size > 0,
    )
    with lib.on_device(scores):
        group_kernel[(samples,)](batch, bounds, samples, turns, C=credit, **lib.OPTIONS)
