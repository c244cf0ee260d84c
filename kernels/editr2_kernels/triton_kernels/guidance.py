"""The guided velocity and the scales of its renormalisation: csrc/guidance.h in Triton.

Without renormalisation guidance is elementwise and happens where the velocity is read. A scale
needs the norms of its whole row first, so a renormalisation adds a launch that writes (s, on_w,
on_v) of every row to scales[B, R, 3] (two where a row is longer than a block: partial sums, then
the scales), and the kernels look their row up.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..guidance import GLOBAL, NONE, Latents
from .common import (
    BLOCK,
    LOG2_BLOCK,
    LOG2_PARTIALS,
    OPTIONS,
    PARTIALS,
    chunks_of,
    entry,
    load_row,
    mask_if,
    pair_sums,
    row_at,
    rows_of,
    totals,
)


@triton.jit
def guide_at(guidance_ptr, sample, row, inside):
    """(text weight, image weight, active) of a sample; the weights are 1 where guidance is
    inactive."""
    entries = guidance_ptr + sample * 4
    sigma = entry(row, 6, inside)
    applies = (sigma > tl.load(entries + 2)) & (sigma <= tl.load(entries + 3))
    text = tl.where(applies, tl.load(entries), 1.0)
    image = tl.where(applies, tl.load(entries + 1), 1.0)
    return text, image, (text != 1.0) | (image != 1.0)


@triton.jit
def _toward(base_ptr, base_stride, v, weight, sample, offsets, mask):
    """base + weight (v - base); base is not read where it does not count."""
    base = load_row(base_ptr, base_stride, sample, offsets, mask_if(weight != 1.0, mask))
    return tl.where(weight != 1.0, base + (v - base) * weight, v)


@triton.jit
def branches(
    v_ptr,
    v_stride,
    v_uncond_ptr,
    v_uncond_stride,
    v_uncond_image_ptr,
    v_uncond_image_stride,
    text,
    image,
    scale,
    sample,
    offsets,
    mask,
    RENORM: tl.constexpr,
):
    """(v, w, u): the conditioned velocity, the vector that is scaled before it is, and the guided
    velocity."""
    v = load_row(v_ptr, v_stride, sample, offsets, mask)
    w = v
    if v_uncond_ptr is not None:
        w = _toward(v_uncond_ptr, v_uncond_stride, w, text, sample, offsets, mask)
    if RENORM == 2:  # text_channel: the scale stands between the branches
        u = w * scale
        if v_uncond_image_ptr is not None:
            u = _toward(v_uncond_image_ptr, v_uncond_image_stride, u, image, sample, offsets, mask)
    else:
        if v_uncond_image_ptr is not None:
            w = _toward(v_uncond_image_ptr, v_uncond_image_stride, w, image, sample, offsets, mask)
        u = w
        if RENORM != 0:
            u = w * scale
    return v, w, u


@triton.jit
def row_of_element(chunk, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Row of each element of a chunk, int64. WIDE: rows are longer than a block, so at most one
    begins inside it."""
    start = chunk * BLOCK
    first = start // width
    behind = start - first * width
    lane = tl.arange(0, BLOCK)
    if WIDE:
        return first + (behind + lane >= width).to(tl.int64)
    else:
        return first + ((behind.to(tl.int32) + lane) // width).to(tl.int64)


@triton.jit
def guided_velocity(
    v_ptr,
    v_stride,
    v_uncond_ptr,
    v_uncond_stride,
    v_uncond_image_ptr,
    v_uncond_image_stride,
    guidance_ptr,
    scales_ptr,
    width,
    row_count,
    sample,
    chunk,
    offsets,
    mask,
    row,
    inside,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u of one chunk."""
    if guidance_ptr is None:
        return load_row(v_ptr, v_stride, sample, offsets, mask)
    else:
        text, image, _ = guide_at(guidance_ptr, sample, row, inside)
        scale = 1.0
        if RENORM != 0:
            line = sample * row_count + row_of_element(chunk, width, BLOCK, WIDE)
            scale = tl.load(scales_ptr + line * 3, mask=mask, other=1.0)
        _, _, u = branches(
            v_ptr,
            v_stride,
            v_uncond_ptr,
            v_uncond_stride,
            v_uncond_image_ptr,
            v_uncond_image_stride,
            text,
            image,
            scale,
            sample,
            offsets,
            mask,
            RENORM,
        )
        return u


@triton.jit
def place_rows(width, row_count, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """This program's block of BLOCK // COLS rows by COLS columns.

    (sample, first row, chunk along the row, row of each element, element offsets, mask); rows count
    within the sample.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunks = (width + COLS - 1) // COLS
    blocks = (row_count + (BLOCK // COLS) - 1) // (BLOCK // COLS)
    chunk = pid % chunks
    first = (pid // chunks) % blocks * (BLOCK // COLS)
    sample = pid // chunks // blocks
    lane = tl.arange(0, BLOCK)
    line = first + lane // COLS
    column = chunk * COLS + lane % COLS
    return sample, first, chunk, line, line * width + column, (line < row_count) & (column < width)


@triton.jit
def _store_scales(scales_ptr, line, mask, v_squares, w_squares, active, TOKEN: tl.constexpr):
    v_norm = tl.sqrt_rn(
        tl.where(v_squares < 1e-30, 0.0, v_squares)
    )  # kNoSquares of csrc/guidance.h
    w_norm = tl.sqrt_rn(tl.where(w_squares < 1e-30, 0.0, w_squares))
    base = w_norm if TOKEN else w_norm + 1e-8
    free = mask_if(active, base != 0.0)
    base = tl.where(base != 0.0, base, 1.0)
    s = tl.div_rn(v_norm, base)
    if not TOKEN:
        free = free & ~(s > 1.0)  # not s <= 1: NaN stays
    on_w = tl.div_rn(tl.div_rn(s, base), tl.where(w_norm > 0.0, w_norm, 1.0))
    on_v = tl.div_rn(
        tl.div_rn(tl.zeros_like(base) + 1.0, tl.where(v_norm > 0.0, v_norm, 1.0)), base
    )
    tl.store(scales_ptr + line * 3, tl.where(free, s, 1.0), mask=mask)
    tl.store(scales_ptr + line * 3 + 1, tl.where(free & (w_norm > 0.0), on_w, 0.0), mask=mask)
    tl.store(scales_ptr + line * 3 + 2, tl.where(free & (v_norm > 0.0), on_v, 0.0), mask=mask)


@triton.jit(do_not_specialize=["row_count", "rows"])
def scale_kernel(
    v_ptr,
    v_uncond_ptr,
    v_uncond_image_ptr,
    guidance_ptr,
    table_ptr,
    index_ptr,
    scales_ptr,
    v_squares_ptr,
    w_squares_ptr,
    v_stride,
    v_uncond_stride,
    v_uncond_image_stride,
    width,
    row_count,
    rows,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Squares of v and of the vector that is scaled: the scales of whole rows, or (WIDE) one
    partial a chunk."""
    sample, first, chunk, line, offsets, mask = place_rows(width, row_count, BLOCK, COLS)
    _, inside, row = row_at(table_ptr, index_ptr, sample, rows)
    text, image, active = guide_at(guidance_ptr, sample, row, inside)
    v, w, _ = branches(
        v_ptr,
        v_stride,
        v_uncond_ptr,
        v_uncond_stride,
        v_uncond_image_ptr,
        v_uncond_image_stride,
        text,
        image,
        1.0,
        sample,
        offsets,
        mask_if(active, mask),
        RENORM,
    )
    line = first + tl.arange(0, BLOCK // COLS)
    kept = line < row_count
    line = sample * row_count + line
    v_squares = pair_sums(v * v, LEVELS)
    w_squares = pair_sums(w * w, LEVELS)
    if WIDE:
        chunks = (width + COLS - 1) // COLS
        tl.store(v_squares_ptr + line * chunks + chunk, v_squares, mask=kept)
        tl.store(w_squares_ptr + line * chunks + chunk, w_squares, mask=kept)
    else:
        _store_scales(scales_ptr, line, kept, v_squares, w_squares, active, RENORM == 1)


@triton.jit(do_not_specialize=["row_count", "count", "rows", "chunks"])
def scale_finish_kernel(
    v_squares_ptr,
    w_squares_ptr,
    guidance_ptr,
    table_ptr,
    index_ptr,
    scales_ptr,
    row_count,
    count,
    rows,
    chunks,
    RENORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program a row: partials in chunk order, then its scales."""
    first = tl.program_id(0).to(tl.int64)
    sample = first // row_count
    _, inside, row = row_at(table_ptr, index_ptr, sample, rows)
    _, _, active = guide_at(guidance_ptr, sample, row, inside)
    v_squares = totals(v_squares_ptr, first, count, chunks, 1, PARTIALS, LEVELS)
    w_squares = totals(w_squares_ptr, first, count, chunks, 1, PARTIALS, LEVELS)
    line = first + tl.arange(0, 1)
    _store_scales(scales_ptr, line, line < count, v_squares, w_squares, active, RENORM == 1)


class RowGrid:
    """How the rows of a renormalisation are cut into programs of the row kernels."""

    def __init__(self, latents: Latents):
        self.batch, n = latents.x.shape
        self.width = n if latents.renorm == GLOBAL else latents.width
        self.row_count = n // self.width
        self.wide = self.width > BLOCK
        self.levels = LOG2_BLOCK if self.wide else (self.width - 1).bit_length()
        self.chunks = chunks_of(self.width) if self.wide else 1
        blocks = triton.cdiv(self.row_count, BLOCK >> self.levels)
        self.programs = self.batch * blocks * self.chunks

    @property
    def lines(self) -> int:
        return self.batch * self.row_count

    def constants(self) -> dict[str, Any]:
        return {"WIDE": self.wide, "BLOCK": BLOCK, "COLS": 1 << self.levels, "LEVELS": self.levels}


def velocity_arguments(latents: Latents) -> dict[str, Any]:
    """The arguments that name the branches of a velocity; without guidance they are not there."""
    guided = latents.guidance is not None
    return {
        **rows_of(
            v=latents.v,
            v_uncond=latents.v_uncond if guided else None,
            v_uncond_image=latents.v_uncond_image if guided else None,
        ),
        "guidance_ptr": latents.guidance,
    }


def latent_arguments(latents: Latents, table: Tensor, step_index: Tensor) -> dict[str, Any]:
    """The arguments and constants of a kernel that reads latents; launches what makes the scales,
    if there are any."""
    arguments = {
        **velocity_arguments(latents),
        **rows_of(x=latents.x, m_prev=latents.m_prev),
        "table_ptr": table,
        "index_ptr": step_index,
        "rows": table.shape[0],
    }
    if latents.guidance is None or latents.renorm == NONE:
        return {
            **arguments,
            "scales_ptr": None,
            "width": 1,
            "row_count": 1,
            "RENORM": NONE,
            "WIDE": False,
        }
    grid = RowGrid(latents)
    scales = _scales(latents, table, step_index, grid)
    return {
        **arguments,
        "scales_ptr": scales,
        "width": grid.width,
        "row_count": grid.row_count,
        "RENORM": latents.renorm,
        "WIDE": grid.wide,
    }


def _scales(latents: Latents, table: Tensor, step_index: Tensor, grid: RowGrid) -> Tensor:
    """[B, R, 3] fp32: s, on_w, on_v of every row."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": latents.x.device}
    scales = torch.empty(grid.batch, grid.row_count, 3, **options)
    v_squares, w_squares = (
        torch.empty(2, grid.lines, grid.chunks, **options) if grid.wide else (None, None)
    )
    scale_kernel[(grid.programs,)](
        **velocity_arguments(latents),
        table_ptr=table,
        index_ptr=step_index,
        scales_ptr=scales,
        v_squares_ptr=v_squares,
        w_squares_ptr=w_squares,
        width=grid.width,
        row_count=grid.row_count,
        rows=table.shape[0],
        RENORM=latents.renorm,
        **grid.constants(),
        **OPTIONS,
    )
    if grid.wide:
        scale_finish_kernel[(grid.lines,)](
            v_squares,
            w_squares,
            latents.guidance,
            table,
            step_index,
            scales,
            grid.row_count,
            grid.lines,
            table.shape[0],
            grid.chunks,
            RENORM=latents.renorm,
            PARTIALS=PARTIALS,
            LEVELS=LOG2_PARTIALS,
            **OPTIONS,
        )
    return scales
