"""The guided velocity and the scales of its renormalisation: csrc/guidance.h in Triton.

Without renormalisation guidance is elementwise and happens where the velocity is read. A scale
needs the norms of its whole row first, so a renormalisation adds a launch that writes (s, on_w,
on_v) of every row to scales[B, R, 3] (two where a row is longer than a block: partial sums, then
the scales), and the kernels look their row up.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..guidance import GLOBAL, NONE, TEXT_CHANNEL, TOKEN, Latents
from .common import (
    BLOCK,
    LOG2_BLOCK,
    OPTIONS,
    Place,
    Transition,
    chunks_of,
    entry,
    kernel,
    load,
    mask_if,
    only_if,
    pair_sums,
    row_at,
    samples_of,
    totals,
)


class Velocity(NamedTuple):
    """The branches, [B, N] (without guidance only v), the entries of the guidance, [B, 4], and the
    scales of a renormalisation with the width of its rows."""

    v: Any
    v_uncond: Any
    v_uncond_image: Any
    guidance: Any
    scales: Any
    width: Any


class Renorm(NamedTuple):
    """Constants: which renormalisation it is, if not that of a whole vector by BAGEL, and whether
    its rows are longer than a block."""

    TOKEN: bool
    TEXT_CHANNEL: bool
    WIDE: bool


class Guide(NamedTuple):
    """A sample's weights, 1 where guidance is inactive."""

    text: Any
    image: Any
    active: Any


@triton.jit
def guide_at(guidance, sample, row):
    entries = guidance + sample * 4
    sigma = entry(row, 6)
    applies = (sigma > tl.load(entries + 2)) & (sigma <= tl.load(entries + 3))
    text = tl.where(applies, tl.load(entries), 1.0)
    image = tl.where(applies, tl.load(entries + 1), 1.0)
    return Guide(text, image, (text != 1.0) | (image != 1.0))


@triton.jit
def _toward(samples, v, weight, at):
    """base + weight (v - base); base is not read where it does not count."""
    if samples is None:
        return v
    else:
        base = load(samples, only_if(weight != 1.0, at))
        return tl.where(weight != 1.0, base + (v - base) * weight, v)


@triton.jit
def branches(velocity, guide, scale, at, RENORM: tl.constexpr):
    """(v, w, u): the conditioned velocity, the vector that is scaled before it is, and the guided
    velocity."""
    v = load(velocity.v, at)
    w = _toward(velocity.v_uncond, v, guide.text, at)
    if RENORM is None:
        w = _toward(velocity.v_uncond_image, w, guide.image, at)
        return v, w, w
    elif RENORM.TEXT_CHANNEL:  # the scale stands between the branches
        return v, w, _toward(velocity.v_uncond_image, w * scale, guide.image, at)
    else:
        w = _toward(velocity.v_uncond_image, w, guide.image, at)
        return v, w, w * scale


@triton.jit
def lines_of(velocity, row_count, at, RENORM: tl.constexpr, BLOCK: tl.constexpr = BLOCK):
    """Row of the batch that each element of a chunk lies in, int64. WIDE: rows are longer than a
    block, so at most one begins inside it."""
    start = at.chunk * BLOCK
    first = start // velocity.width
    behind = start - first * velocity.width
    lane = tl.arange(0, BLOCK)
    if RENORM.WIDE:
        line = first + (behind + lane >= velocity.width).to(tl.int64)
    else:
        line = first + ((behind.to(tl.int32) + lane) // velocity.width).to(tl.int64)
    return at.sample * row_count + line


@triton.jit
def guided_velocity(velocity, row_count, at, row, RENORM: tl.constexpr):
    """u of one chunk."""
    if velocity.guidance is None:
        return load(velocity.v, at)
    else:
        guide = guide_at(velocity.guidance, at.sample, row)
        scale = 1.0
        if RENORM is not None:
            line = lines_of(velocity, row_count, at, RENORM)
            scale = tl.load(velocity.scales + line * 3, mask=at.mask, other=1.0)
        _, _, u = branches(velocity, guide, scale, at, RENORM)
        return u


@triton.jit
def place_rows(width, row_count, COLS: tl.constexpr, BLOCK: tl.constexpr = BLOCK):
    """This program's block of BLOCK // COLS rows by COLS columns: the place, the row of the batch
    that each element lies in, the rows and which of them there are."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = (width + COLS - 1) // COLS
    blocks = (row_count + (BLOCK // COLS) - 1) // (BLOCK // COLS)
    chunk = pid % chunks
    first = (pid // chunks) % blocks * (BLOCK // COLS)
    sample = pid // chunks // blocks
    lane = tl.arange(0, BLOCK)
    line = first + lane // COLS
    column = chunk * COLS + lane % COLS
    at = Place(sample, chunk, line * width + column, (line < row_count) & (column < width))
    lines = first + tl.arange(0, BLOCK // COLS)
    before = sample * row_count
    return at, before + line, before + lines, lines < row_count


@triton.jit
def _store_scales(scales, line, mask, v_squares, w_squares, active, RENORM: tl.constexpr):
    # Below kNoSquares of csrc/guidance.h.
    v_norm = tl.sqrt_rn(tl.where(v_squares < 1e-30, 0.0, v_squares))
    w_norm = tl.sqrt_rn(tl.where(w_squares < 1e-30, 0.0, w_squares))
    base = w_norm if RENORM.TOKEN else w_norm + 1e-8
    free = mask_if(active, base != 0.0)
    base = tl.where(base != 0.0, base, 1.0)
    s = tl.div_rn(v_norm, base)
    if not RENORM.TOKEN:
        free = free & ~(s > 1.0)  # not s <= 1: NaN stays
    on_w = tl.div_rn(tl.div_rn(s, base), tl.where(w_norm > 0.0, w_norm, 1.0))
    one = tl.zeros_like(base) + 1.0
    on_v = tl.div_rn(tl.div_rn(one, tl.where(v_norm > 0.0, v_norm, 1.0)), base)
    tl.store(scales + line * 3, tl.where(free, s, 1.0), mask=mask)
    tl.store(scales + line * 3 + 1, tl.where(free & (w_norm > 0.0), on_w, 0.0), mask=mask)
    tl.store(scales + line * 3 + 2, tl.where(free & (v_norm > 0.0), on_v, 0.0), mask=mask)


@kernel
def scale_kernel(
    velocity,
    transition,
    rows,
    row_count,
    scales,
    v_squares,
    w_squares,
    RENORM: tl.constexpr,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Squares of v and of the vector that is scaled: the scales of whole rows, or (WIDE) one
    partial a chunk."""
    at, _, lines, kept = place_rows(velocity.width, row_count, COLS)
    guide = guide_at(velocity.guidance, at.sample, row_at(transition, rows, at.sample))
    v, w, _ = branches(velocity, guide, 1.0, only_if(guide.active, at), RENORM)
    v_sums = pair_sums(v * v, LEVELS)
    w_sums = pair_sums(w * w, LEVELS)
    if RENORM.WIDE:
        chunks = (velocity.width + COLS - 1) // COLS
        tl.store(v_squares + lines * chunks + at.chunk, v_sums, mask=kept)
        tl.store(w_squares + lines * chunks + at.chunk, w_sums, mask=kept)
    else:
        _store_scales(scales, lines, kept, v_sums, w_sums, guide.active, RENORM)


@kernel
def scale_finish_kernel(
    guidance,
    transition,
    rows,
    row_count,
    scales,
    v_squares,
    w_squares,
    count,
    chunks,
    RENORM: tl.constexpr,
):
    """One program a row: partials in chunk order, then its scales."""
    first = tl.program_id(0).to(tl.int64)
    sample = first // row_count
    guide = guide_at(guidance, sample, row_at(transition, rows, sample))
    v_sums = totals(v_squares, first, count, chunks)
    w_sums = totals(w_squares, first, count, chunks)
    line = first + tl.arange(0, 1)
    _store_scales(scales, line, line < count, v_sums, w_sums, guide.active, RENORM)


class RowGrid:
    """How the rows of a renormalisation are cut into programs of the row kernels."""

    def __init__(self, latents: Latents):
        self.batch, n = latents.x.shape
        self.width = n if latents.renorm == GLOBAL else latents.width
        self.row_count = n // self.width
        self.lines = self.batch * self.row_count
        self.wide = self.width > BLOCK
        self.levels = LOG2_BLOCK if self.wide else (self.width - 1).bit_length()
        self.chunks = chunks_of(self.width) if self.wide else 1
        blocks = triton.cdiv(self.row_count, BLOCK >> self.levels)
        self.programs = self.batch * blocks * self.chunks
        self.constants = {"COLS": 1 << self.levels, "LEVELS": self.levels}


def latent_arguments(latents: Latents, table: Tensor, step_index: Tensor) -> dict[str, Any]:
    """The arguments and constants of a kernel that reads a velocity; launches what makes the
    scales, if there are any."""
    guidance = latents.guidance
    found = (latents.v, latents.v_uncond, latents.v_uncond_image)
    found = found if guidance is not None else (latents.v, None, None)
    velocity = Velocity(*map(samples_of, found), guidance, None, None)
    arguments = {
        "velocity": velocity,
        "transition": Transition(table, step_index),
        "rows": table.shape[0],
        "row_count": 0,
        "RENORM": None,
    }
    if guidance is None or latents.renorm == NONE:
        return arguments
    grid = RowGrid(latents)
    renorm = Renorm(latents.renorm == TOKEN, latents.renorm == TEXT_CHANNEL, grid.wide)
    velocity = velocity._replace(width=grid.width)
    arguments |= {"velocity": velocity, "row_count": grid.row_count, "RENORM": renorm}
    return arguments | {"velocity": velocity._replace(scales=_scales(grid, **arguments))}


def _scales(grid: RowGrid, velocity: Velocity, **arguments: Any) -> Tensor:
    """[B, R, 3] fp32: s, on_w, on_v of every row."""
    guidance: Tensor = velocity.guidance
    scales = guidance.new_empty(grid.batch, grid.row_count, 3)
    squares = guidance.new_empty(2, grid.lines, grid.chunks) if grid.wide else (None, None)
    arguments |= {"scales": scales, "v_squares": squares[0], "w_squares": squares[1], **OPTIONS}
    scale_kernel[(grid.programs,)](velocity, **arguments, **grid.constants)
    if grid.wide:
        count, chunks = grid.lines, grid.chunks
        scale_finish_kernel[(count,)](guidance, count=count, chunks=chunks, **arguments)
    return scales
