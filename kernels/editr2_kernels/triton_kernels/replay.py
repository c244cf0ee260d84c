"""Replays of a stored step: their moments, sde_log_prob, and the one backward of all of them."""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..guidance import Latents
from .common import (
    BLOCK,
    LOG2_BLOCK,
    LOG2_PARTIALS,
    OPTIONS,
    PARTIALS,
    chunks_of,
    entry,
    finish,
    load_row,
    mask_if,
    on_device,
    pair_sums,
    place,
    row_at,
    rows_of,
    scaled,
    store_row,
    totals,
    transition_mean,
    tree_sum,
)
from .guidance import (
    RowGrid,
    branches,
    guide_at,
    guided_velocity,
    latent_arguments,
    place_rows,
    row_of_element,
)


@triton.jit
def _store_squares(partial_ptr, at, value, mask, LEVELS: tl.constexpr):
    value = tl.where(mask, value, 0.0)
    tl.store(partial_ptr + at, tree_sum(value * value, LEVELS))


@triton.jit(do_not_specialize=["row_count", "rows", "chunks"])
def moments_kernel(
    x_ptr,
    x_next_ptr,
    v_ptr,
    m_prev_ptr,
    v_uncond_ptr,
    v_uncond_image_ptr,
    v_ref_ptr,
    v_old_ptr,
    guidance_ptr,
    scales_ptr,
    table_ptr,
    index_ptr,
    z_squares_ptr,
    ref_squares_ptr,
    old_squares_ptr,
    x_stride,
    x_next_stride,
    v_stride,
    m_prev_stride,
    v_uncond_stride,
    v_uncond_image_stride,
    v_ref_stride,
    v_old_stride,
    n,
    width,
    row_count,
    rows,
    chunks,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    PLAIN_REF: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Squares of z, B (u - v_ref) (PLAIN_REF: u - v_ref) and B (u - v_old), one partial a chunk."""
    sample, chunk, offsets, mask = place(chunks, n, BLOCK)
    _, inside, row = row_at(table_ptr, index_ptr, sample, rows)
    x = load_row(x_ptr, x_stride, sample, offsets, mask)
    u = guided_velocity(
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
        RENORM,
        WIDE,
        BLOCK,
    )
    x_next = load_row(x_next_ptr, x_next_stride, sample, offsets, mask)
    mu = transition_mean(x, u, m_prev_ptr, m_prev_stride, sample, offsets, mask, row, inside)
    at = sample * chunks + chunk
    _store_squares(z_squares_ptr, at, x_next - mu, mask, LEVELS)
    b = entry(row, 1, inside)
    if v_ref_ptr is not None:
        difference = u - load_row(v_ref_ptr, v_ref_stride, sample, offsets, mask)
        if not PLAIN_REF:
            difference = b * difference
        _store_squares(ref_squares_ptr, at, difference, mask, LEVELS)
    if v_old_ptr is not None:
        difference = b * (u - load_row(v_old_ptr, v_old_stride, sample, offsets, mask))
        _store_squares(old_squares_ptr, at, difference, mask, LEVELS)


@triton.jit
def factors_at(
    factors_ptr, factor_scale_ptr, grad_log_prob_ptr, grad_mean_diff_ptr, sample, row, inside, n
):
    """(on_z, on_ref, on_old) of a sample: as given, or those of sde_log_prob's incoming
    gradients."""
    if factors_ptr is not None:
        on_z = tl.load(factors_ptr + sample * 3)
        on_ref = tl.load(factors_ptr + sample * 3 + 1)
        on_old = tl.load(factors_ptr + sample * 3 + 2)
        if factor_scale_ptr is not None:
            scale = tl.load(factor_scale_ptr)
            on_z = scaled(on_z, scale)
            on_ref = scaled(on_ref, scale)
            on_old = scaled(on_old, scale)
        return on_z, on_ref, on_old
    else:
        size = tl.cast(n, tl.float32)
        b = entry(row, 1, inside)
        on_z = b * 0.0
        on_ref = b * 0.0
        if grad_log_prob_ptr is not None:
            on_z = scaled(
                tl.div_rn(-2.0 * entry(row, 4, inside) * b, size),
                tl.load(grad_log_prob_ptr + sample),
            )
        if grad_mean_diff_ptr is not None:
            on_ref = scaled(tl.div_rn(2.0 * b * b, size), tl.load(grad_mean_diff_ptr + sample))
        return on_z, on_ref, tl.zeros_like(on_z)


@triton.jit
def velocity_gradient(
    u,
    x_ptr,
    x_stride,
    x_next_ptr,
    x_next_stride,
    m_prev_ptr,
    m_prev_stride,
    v_ref_ptr,
    v_ref_stride,
    v_old_ptr,
    v_old_stride,
    on_z,
    on_ref,
    on_old,
    sample,
    offsets,
    mask,
    row,
    inside,
):
    """on_z z + on_ref (u - v_ref) + on_old (u - v_old); a term whose factor is 0 is neither read
    nor added."""
    read = mask_if(on_z != 0.0, mask)
    x = load_row(x_ptr, x_stride, sample, offsets, read)
    x_next = load_row(x_next_ptr, x_next_stride, sample, offsets, read)
    mu = transition_mean(x, u, m_prev_ptr, m_prev_stride, sample, offsets, read, row, inside)
    g = tl.where(on_z != 0.0, on_z * (x_next - mu), 0.0)
    if v_ref_ptr is not None:
        v_ref = load_row(v_ref_ptr, v_ref_stride, sample, offsets, mask_if(on_ref != 0.0, mask))
        g = tl.where(on_ref != 0.0, g + on_ref * (u - v_ref), g)
    if v_old_ptr is not None:
        v_old = load_row(v_old_ptr, v_old_stride, sample, offsets, mask_if(on_old != 0.0, mask))
        g = tl.where(on_old != 0.0, g + on_old * (u - v_old), g)
    return g


@triton.jit(do_not_specialize=["row_count", "rows"])
def dot_kernel(
    x_ptr,
    x_next_ptr,
    v_ptr,
    m_prev_ptr,
    v_uncond_ptr,
    v_uncond_image_ptr,
    v_ref_ptr,
    v_old_ptr,
    guidance_ptr,
    scales_ptr,
    table_ptr,
    index_ptr,
    factors_ptr,
    factor_scale_ptr,
    grad_log_prob_ptr,
    grad_mean_diff_ptr,
    dots_ptr,
    x_stride,
    x_next_stride,
    v_stride,
    m_prev_stride,
    v_uncond_stride,
    v_uncond_image_stride,
    v_ref_stride,
    v_old_stride,
    n,
    width,
    row_count,
    rows,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """sum(w g) of the rows of a renormalisation, g the gradient to s w; WIDE: one partial a
    chunk."""
    sample, first, chunk, line, offsets, mask = place_rows(width, row_count, BLOCK, COLS)
    _, inside, row = row_at(table_ptr, index_ptr, sample, rows)
    on_z, on_ref, on_old = factors_at(
        factors_ptr, factor_scale_ptr, grad_log_prob_ptr, grad_mean_diff_ptr, sample, row, inside, n
    )
    text, image, active = guide_at(guidance_ptr, sample, row, inside)
    live = active & ((on_z != 0.0) | (on_ref != 0.0) | (on_old != 0.0))
    mask = mask_if(live, mask)
    scale = tl.load(scales_ptr + (sample * row_count + line) * 3, mask=mask, other=1.0)
    _, w, u = branches(
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
    g = velocity_gradient(
        u,
        x_ptr,
        x_stride,
        x_next_ptr,
        x_next_stride,
        m_prev_ptr,
        m_prev_stride,
        v_ref_ptr,
        v_ref_stride,
        v_old_ptr,
        v_old_stride,
        on_z,
        on_ref,
        on_old,
        sample,
        offsets,
        mask,
        row,
        inside,
    )
    if RENORM == 2:
        g = image * g
    dots = pair_sums(tl.where(mask, w * g, 0.0), LEVELS)
    line = first + tl.arange(0, BLOCK // COLS)
    kept = line < row_count
    chunks = (width + COLS - 1) // COLS
    tl.store(dots_ptr + (sample * row_count + line) * chunks + chunk, dots, mask=kept)


@triton.jit(do_not_specialize=["count", "chunks"])
def dot_finish_kernel(
    partial_ptr, dots_ptr, count, chunks, PARTIALS: tl.constexpr, LEVELS: tl.constexpr
):
    """One program a row: partials in chunk order."""
    first = tl.program_id(0).to(tl.int64)
    tl.store(
        dots_ptr + first + tl.arange(0, 1),
        totals(partial_ptr, first, count, chunks, 1, PARTIALS, LEVELS),
    )


@triton.jit(do_not_specialize=["row_count", "rows", "chunks"])
def backward_kernel(
    x_ptr,
    x_next_ptr,
    v_ptr,
    m_prev_ptr,
    v_uncond_ptr,
    v_uncond_image_ptr,
    v_ref_ptr,
    v_old_ptr,
    guidance_ptr,
    scales_ptr,
    table_ptr,
    index_ptr,
    factors_ptr,
    factor_scale_ptr,
    grad_log_prob_ptr,
    grad_mean_diff_ptr,
    dots_ptr,
    grad_v_ptr,
    grad_v_uncond_ptr,
    grad_v_uncond_image_ptr,
    x_stride,
    x_next_stride,
    v_stride,
    m_prev_stride,
    v_uncond_stride,
    v_uncond_image_stride,
    v_ref_stride,
    v_old_stride,
    grad_v_stride,
    grad_v_uncond_stride,
    grad_v_uncond_image_stride,
    n,
    width,
    row_count,
    rows,
    chunks,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient to u, through the guidance to v and its branches. A sample without factors gets
    0 unread."""
    sample, chunk, offsets, mask = place(chunks, n, BLOCK)
    _, inside, row = row_at(table_ptr, index_ptr, sample, rows)
    on_z, on_ref, on_old = factors_at(
        factors_ptr, factor_scale_ptr, grad_log_prob_ptr, grad_mean_diff_ptr, sample, row, inside, n
    )
    live = (on_z != 0.0) | (on_ref != 0.0) | (on_old != 0.0)
    read = mask_if(live, mask)
    if guidance_ptr is None:
        u = load_row(v_ptr, v_stride, sample, offsets, read)
        to_v = velocity_gradient(
            u,
            x_ptr,
            x_stride,
            x_next_ptr,
            x_next_stride,
            m_prev_ptr,
            m_prev_stride,
            v_ref_ptr,
            v_ref_stride,
            v_old_ptr,
            v_old_stride,
            on_z,
            on_ref,
            on_old,
            sample,
            offsets,
            read,
            row,
            inside,
        )
    else:
        text, image, _ = guide_at(guidance_ptr, sample, row, inside)
        scale = 1.0
        if RENORM != 0:
            line = sample * row_count + row_of_element(chunk, width, BLOCK, WIDE)
            scale = tl.load(scales_ptr + line * 3, mask=read, other=1.0)
            on_w = tl.load(scales_ptr + line * 3 + 1, mask=read, other=0.0)
            on_v = tl.load(scales_ptr + line * 3 + 2, mask=read, other=0.0)
            dot = tl.load(dots_ptr + line, mask=read, other=0.0)
        v, w, u = branches(
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
            read,
            RENORM,
        )
        to_image = velocity_gradient(
            u,
            x_ptr,
            x_stride,
            x_next_ptr,
            x_next_stride,
            m_prev_ptr,
            m_prev_stride,
            v_ref_ptr,
            v_ref_stride,
            v_old_ptr,
            v_old_stride,
            on_z,
            on_ref,
            on_old,
            sample,
            offsets,
            read,
            row,
            inside,
        )
        if RENORM == 2:
            to_text = scale * (image * to_image) - (on_w * dot) * w
        else:
            if RENORM != 0:
                to_image = scale * to_image - (on_w * dot) * w
            to_text = image * to_image
        to_v = text * to_text
        if RENORM != 0:
            to_v += (on_v * dot) * v
        if grad_v_uncond_ptr is not None:
            value = tl.where(live, (1.0 - text) * to_text, 0.0)
            store_row(grad_v_uncond_ptr, grad_v_uncond_stride, sample, offsets, value, mask)
        if grad_v_uncond_image_ptr is not None:
            value = tl.where(live, (1.0 - image) * to_image, 0.0)
            store_row(
                grad_v_uncond_image_ptr, grad_v_uncond_image_stride, sample, offsets, value, mask
            )
    if grad_v_ptr is not None:
        store_row(grad_v_ptr, grad_v_stride, sample, offsets, tl.where(live, to_v, 0.0), mask)


def moments(
    latents: Latents,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    plain_ref: bool,
) -> Tensor:
    """Partial sums of squares, a row each for z, v_ref and v_old; none for a velocity that is
    absent. A row begins with [B, chunks] and ends on 16 bytes, or each alignment would be a kernel
    of its own. Call on the device."""
    batch, n = latents.x.shape
    chunks = chunks_of(n)
    count = 1 + (v_ref is not None) + (v_old is not None)
    squares = torch.empty(
        count, (batch * chunks + 3) // 4 * 4, dtype=torch.float32, device=latents.x.device
    )
    rest = iter(squares[1:])
    ref_squares = None if v_ref is None else next(rest)
    old_squares = None if v_old is None else next(rest)
    moments_kernel[(batch * chunks,)](
        **latent_arguments(latents, table, step_index),
        **rows_of(x_next=x_next, v_ref=v_ref, v_old=v_old),
        z_squares_ptr=squares[0],
        ref_squares_ptr=ref_squares,
        old_squares_ptr=old_squares,
        n=n,
        chunks=chunks,
        PLAIN_REF=plain_ref,
        BLOCK=BLOCK,
        LEVELS=LOG2_BLOCK,
        **OPTIONS,
    )
    return squares


def sde_log_prob(
    latents: Latents,
    x_next: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    log_prob: Tensor,
    mean_diff: Tensor | None,
) -> None:
    """mean_diff is written where v_ref is given."""
    with on_device(latents.x):
        squares = moments(latents, x_next, v_ref, None, table, step_index, False)
        ref_squares = None if v_ref is None else squares[1]
        finish(squares[0], ref_squares, table, step_index, log_prob, mean_diff, latents.x.shape[1])


def replay_backward(
    latents: Latents,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    factors: Tensor | None,
    scale: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_mean_diff: Tensor | None,
    grad_v: Tensor | None,
    grad_v_uncond: Tensor | None,
    grad_v_uncond_image: Tensor | None,
) -> None:
    """A gradient that is None is not wanted. Without guidance there are no branches to have one."""
    batch, n = latents.x.shape
    chunks = chunks_of(n)
    with on_device(latents.x):
        arguments = {
            **latent_arguments(latents, table, step_index),
            **rows_of(x_next=x_next, v_ref=v_ref, v_old=v_old),
            "factors_ptr": factors,
            "factor_scale_ptr": scale,
            "grad_log_prob_ptr": grad_log_prob,
            "grad_mean_diff_ptr": grad_mean_diff,
            "n": n,
        }
        dots = _dots(latents, arguments) if arguments["scales_ptr"] is not None else None
        backward_kernel[(batch * chunks,)](
            **arguments,
            **rows_of(
                grad_v=grad_v, grad_v_uncond=grad_v_uncond, grad_v_uncond_image=grad_v_uncond_image
            ),
            dots_ptr=dots,
            chunks=chunks,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def _dots(latents: Latents, arguments: dict[str, Any]) -> Tensor:
    """[B, R] fp32: what the gradient of a renormalisation needs of every row."""
    grid = RowGrid(latents)
    dots = torch.empty(grid.lines, grid.chunks, dtype=torch.float32, device=latents.x.device)
    dot_kernel[(grid.programs,)](**{**arguments, **grid.constants()}, dots_ptr=dots, **OPTIONS)
    if not grid.wide:
        return dots
    whole = torch.empty(grid.lines, dtype=torch.float32, device=latents.x.device)
    dot_finish_kernel[(grid.lines,)](
        dots, whole, grid.lines, grid.chunks, PARTIALS=PARTIALS, LEVELS=LOG2_PARTIALS, **OPTIONS
    )
    return whole
