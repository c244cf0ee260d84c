"""philox_normal and sde_step."""

# mypy: disable-error-code="no-untyped-def"
# Triton kernels are untyped by nature: their arguments are pointers and constants of another
# language.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..guidance import Latents
from .common import (
    BLOCK,
    LOG2_BLOCK,
    OPTIONS,
    chunks_of,
    entry,
    finish,
    load_row,
    mask_if,
    on_device,
    philox_block,
    place,
    row_at,
    rows_of,
    store_row,
    transition_mean,
    tree_sum,
)
from .guidance import guided_velocity, latent_arguments


@triton.jit(do_not_specialize=["chunks"])
def philox_kernel(seed_ptr, step_ptr, out_ptr, out_stride, n, chunks, BLOCK: tl.constexpr):
    sample, chunk, offsets, mask = place(chunks, n, BLOCK)
    z = philox_block(tl.load(seed_ptr + sample), tl.load(step_ptr + sample), chunk, BLOCK)
    store_row(out_ptr, out_stride, sample, offsets, z, mask)


@triton.jit(do_not_specialize=["row_count", "rows", "chunks"])
def step_kernel(
    x_ptr,
    v_ptr,
    m_prev_ptr,
    v_uncond_ptr,
    v_uncond_image_ptr,
    guidance_ptr,
    scales_ptr,
    noise_ptr,
    table_ptr,
    index_ptr,
    seed_ptr,
    x_next_ptr,
    x0_ptr,
    partial_ptr,
    x_stride,
    v_stride,
    m_prev_stride,
    v_uncond_stride,
    v_uncond_image_stride,
    noise_stride,
    x_next_stride,
    x0_stride,
    n,
    width,
    row_count,
    rows,
    chunks,
    RENORM: tl.constexpr,
    WIDE: tl.constexpr,
    SCORE_STORED: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    sample, chunk, offsets, mask = place(chunks, n, BLOCK)
    step, inside, row = row_at(table_ptr, index_ptr, sample, rows)
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
    mu = transition_mean(x, u, m_prev_ptr, m_prev_stride, sample, offsets, mask, row, inside)
    spread = entry(row, 3, inside)
    if noise_ptr is None:
        eps = philox_block(tl.load(seed_ptr + sample), step, chunk, BLOCK)
    else:
        eps = load_row(noise_ptr, noise_stride, sample, offsets, mask_if(spread != 0.0, mask))
    x_next = mu + spread * eps
    store_row(x_next_ptr, x_next_stride, sample, offsets, x_next, mask)
    if SCORE_STORED:
        x_next = x_next.to(x_next_ptr.dtype.element_ty).to(tl.float32)
    z = tl.where(mask, x_next - mu, 0.0)
    tl.store(partial_ptr + sample * chunks + chunk, tree_sum(z * z, LEVELS))
    if x0_ptr is not None:
        store_row(x0_ptr, x0_stride, sample, offsets, x - u * entry(row, 6, inside), mask)


def philox_normal(seed: Tensor, step: Tensor, out: Tensor) -> None:
    batch, n = out.shape
    chunks = chunks_of(n)
    with on_device(out):
        philox_kernel[(batch * chunks,)](
            seed, step, out, out.stride(0), n, chunks, BLOCK=BLOCK, **OPTIONS
        )


def sde_step(
    latents: Latents,
    noise: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    x_next: Tensor,
    x0: Tensor | None,
    log_prob: Tensor,
    score_stored: bool,
) -> None:
    batch, n = latents.x.shape
    chunks = chunks_of(n)
    partial = torch.empty(batch, chunks, dtype=torch.float32, device=latents.x.device)
    with on_device(latents.x):
        step_kernel[(batch * chunks,)](
            **latent_arguments(latents, table, step_index),
            **rows_of(noise=noise, x_next=x_next, x0=x0),
            seed_ptr=seed,
            partial_ptr=partial,
            n=n,
            chunks=chunks,
            SCORE_STORED=score_stored,
            BLOCK=BLOCK,
            LEVELS=LOG2_BLOCK,
            **OPTIONS,
        )
        finish(partial, None, table, step_index, log_prob, None, n)
