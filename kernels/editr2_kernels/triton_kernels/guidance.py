"""The guided velocity and the scales of its renormalisation: csrc/guidance.h in Triton.

Without renormalisation guidance is elementwise and happens where the velocity is read. A scale
needs the norms of its whole row first, so a renormalisation adds a launch that writes (s, on_w,
on_v) of every row to scales[B, R, 3] (two where a row is longer than a block: partial sums, then
the scales), and the kernels look their row up.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import namedtuple
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..guidance import GLOBAL, NONE, TEXT_CHANNEL, TOKEN, Latents
from . import common as lib

# The entries of the guidance, [B, 4], the scales of a renormalisation and the width of its rows,
# and the branches, [B, N]; without guidance only v.
Velocity = namedtuple("Velocity", "guidance scales width v v_uncond v_uncond_image")
# Constants: which renormalisation it is (neither: BAGEL's, of the guided velocity), and whether its
# rows are longer than a block.
Renorm = namedtuple("Renorm", "TOKEN TEXT_CHANNEL WIDE")
# A sample's weights, 1 where guidance is inactive.
Guide = namedtuple("Guide", "text image active")
# Of each row, of v and of the vector that is scaled.
Squares = namedtuple("Squares", "v w")


@triton.jit
def guide_at(guidance, sample, row):
    entries = guidance + sample * 4
    sigma = lib.entry(row, 6)
    applies = (sigma > tl.load(entries + 2)) & (sigma <= tl.load(entries + 3))
    text = tl.where(applies, tl.load(entries), 1.0)
    image = tl.where(applies, tl.load(entries + 1), 1.0)
    return Guide(text=text, image=image, active=(text != 1.0) | (image != 1.0))


@triton.jit
def _toward(samples, v, weight, at):
    """base + weight (v - base); base is not read where it does not count."""
    if samples is None:
        return v
    else:
        base = lib.load(samples, lib.only_if(weight != 1.0, at))
        return tl.where(weight != 1.0, base + (v - base) * weight, v)


@triton.jit
def branches(velocity, guide, scale, at, RENORM: constexpr):
    """(v, w, u): the conditioned velocity, the vector that is scaled before it is, and the guided
    velocity."""
    v = lib.load(velocity.v, at)
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
def lines_of(velocity, row_count, at, RENORM: constexpr, BLOCK: constexpr = lib.BLOCK):
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
def guided_velocity(velocity, row_count, at, row, RENORM: constexpr):
    """u of one chunk."""
    if velocity.guidance is None:
        return lib.load(velocity.v, at)
    else:
        guide = guide_at(velocity.guidance, at.sample, row)
        scale = 1.0
        if RENORM is not None:
            line = lines_of(velocity, row_count, at, RENORM)
            scale = tl.load(velocity.scales + line * 3, mask=at.mask, other=1.0)
        _, _, u = branches(velocity, guide, scale, at, RENORM)
        return u


@triton.jit
def place_rows(width, row_count, COLS: constexpr, BLOCK: constexpr = lib.BLOCK):
    """This program's block of BLOCK // COLS rows by COLS columns: the place, the row of the batch
    that each element lies in, the rows and which of them there are."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(width, COLS)
    blocks = tl.cdiv(row_count, BLOCK // COLS)
    chunk = pid % chunks
    first = (pid // chunks) % blocks * (BLOCK // COLS)
    sample = pid // chunks // blocks
    lane = tl.arange(0, BLOCK)
    line = first + lane // COLS
    column = chunk * COLS + lane % COLS
    mask = (line < row_count) & (column < width)
    at = lib.Place(sample=sample, chunk=chunk, offsets=line * width + column, mask=mask)
    lines = first + tl.arange(0, BLOCK // COLS)
    before = sample * row_count
    return at, before + line, before + lines, lines < row_count


@triton.jit
def _norm(squares):
    return tl.sqrt_rn(tl.where(squares < 1e-30, 0.0, squares))  # kNoSquares of csrc/guidance.h


@triton.jit
def _store_scales(scales, line, mask, v_squares, w_squares, active, RENORM: constexpr):
    v_norm = _norm(v_squares)
    w_norm = _norm(w_squares)
    base = w_norm if RENORM.TOKEN else w_norm + 1e-8
    free = lib.mask_if(active, base != 0.0)
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


@lib.kernel
def scale_kernel(
    velocity, steps, rows, row_count, scales, squares, RENORM: constexpr, LEVELS: constexpr
):
    """Squares of v and of the vector that is scaled: the scales of whole rows, or (WIDE) one
    partial a chunk."""
    at, _, lines, kept = place_rows(velocity.width, row_count, 1 << LEVELS)
    guide = guide_at(velocity.guidance, at.sample, lib.row_at(steps, rows, at.sample))
    v, w, _ = branches(velocity, guide, 1.0, lib.only_if(guide.active, at), RENORM)
    v_sums = lib.pair_sums(v * v, LEVELS)
    w_sums = lib.pair_sums(w * w, LEVELS)
    if RENORM.WIDE:
        partial = lines * tl.cdiv(velocity.width, 1 << LEVELS) + at.chunk
        tl.store(squares.v + partial, v_sums, mask=kept)
        tl.store(squares.w + partial, w_sums, mask=kept)
    else:
        _store_scales(scales, lines, kept, v_sums, w_sums, guide.active, RENORM)


@lib.kernel
def scale_finish_kernel(
    guidance, steps, rows, row_count, scales, squares, count, chunks, RENORM: constexpr
):
    """One program a row: partials in chunk order, then its scales."""
    first = tl.program_id(0).to(tl.int64)
    sample = first // row_count
    guide = guide_at(guidance, sample, lib.row_at(steps, rows, sample))
    v_sums = lib.totals(squares.v, first, count, chunks)
    w_sums = lib.totals(squares.w, first, count, chunks)
    line = first + tl.arange(0, 1)
    _store_scales(scales, line, line < count, v_sums, w_sums, guide.active, RENORM)


class RowGrid:
    """How the rows of a renormalisation are cut into programs of the row kernels."""

    def __init__(self, latents: Latents):
        self.batch, n = latents.x.shape
        self.width = n if latents.renorm == GLOBAL else latents.width
        self.row_count = n // self.width
        self.lines = self.batch * self.row_count
        self.wide = self.width > lib.BLOCK
        self.levels = lib.LOG2_BLOCK if self.wide else (self.width - 1).bit_length()
        self.chunks = lib.chunks_of(self.width) if self.wide else 1
        blocks = triton.cdiv(self.row_count, lib.BLOCK >> self.levels)
        self.programs = self.batch * blocks * self.chunks


def latent_arguments(latents: Latents, table: Tensor, step_index: Tensor) -> dict[str, Any]:
    """The arguments and constants of a kernel that reads a velocity; launches what makes the
    scales, if there are any."""
    v, guidance = lib.samples_of(latents.v), latents.guidance
    steps, rows = lib.Steps(table, step_index), table.shape[0]
    arguments = {"steps": steps, "rows": rows, "row_count": 0, "RENORM": None}
    if guidance is None:
        return {"velocity": Velocity(None, None, None, v, None, None), **arguments}
    bases = map(lib.samples_of, (latents.v_uncond, latents.v_uncond_image))
    velocity = Velocity(guidance, None, None, v, *bases)
    if latents.renorm != NONE:
        grid = RowGrid(latents)
        renorm = Renorm(latents.renorm == TOKEN, latents.renorm == TEXT_CHANNEL, grid.wide)
        arguments |= {"row_count": grid.row_count, "RENORM": renorm}
        velocity = velocity._replace(width=grid.width)
        velocity = velocity._replace(scales=_scales(grid, velocity, **arguments))
    return {"velocity": velocity, **arguments}


def _scales(grid: RowGrid, velocity: Velocity, **arguments: Any) -> Tensor:
    """[B, R, 3] fp32: s, on_w, on_v of every row."""
    guidance: Tensor = velocity.guidance
    scales = guidance.new_empty(grid.batch, grid.row_count, 3)
    squares = guidance.new_empty(2, grid.lines, grid.chunks) if grid.wide else (None, None)
    arguments |= {"scales": scales, "squares": Squares(*squares), **lib.OPTIONS}
    scale_kernel[(grid.programs,)](velocity, LEVELS=grid.levels, **arguments)
    if grid.wide:
        count, chunks = grid.lines, grid.chunks
        scale_finish_kernel[(count,)](guidance, count=count, chunks=chunks, **arguments)
    return scales
