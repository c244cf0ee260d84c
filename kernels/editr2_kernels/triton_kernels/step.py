"""philox_normal and sde_step."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..guidance import Latents
from .common import (
    OPTIONS,
    chunks_of,
    entry,
    finish,
    kernel,
    load,
    on_device,
    only_if,
    philox_block,
    place,
    row_at,
    samples_of,
    store,
    transition_mean,
    tree_sum,
)
from .guidance import guided_velocity, latent_arguments


@kernel
def philox_kernel(seed, step, out, n, chunks):
    at = place(chunks, n)
    store(out, at, philox_block(tl.load(seed + at.sample), tl.load(step + at.sample), at.chunk))


@kernel
def step_kernel(
    x,
    m_prev,
    velocity,
    transition,
    noise,
    seed,
    x_next,
    x0,
    partial,
    n,
    rows,
    row_count,
    chunks,
    RENORM: tl.constexpr,
    SCORE_STORED: tl.constexpr,
):
    at = place(chunks, n)
    row = row_at(transition, rows, at.sample)
    start = load(x, at)
    u = guided_velocity(velocity, row_count, at, row, RENORM)
    mu = transition_mean(start, u, m_prev, at, row)
    spread = entry(row, 3)
    if noise is None:
        eps = philox_block(tl.load(seed + at.sample), row.step, at.chunk)
    else:
        eps = load(noise, only_if(spread != 0.0, at))
    end = mu + spread * eps
    store(x_next, at, end)
    if SCORE_STORED:
        end = end.to(x_next.ptr.dtype.element_ty).to(tl.float32)
    z = tl.where(at.mask, end - mu, 0.0)
    tl.store(partial + at.sample * chunks + at.chunk, tree_sum(z * z))
    if x0 is not None:
        store(x0, at, start - u * entry(row, 6))


def philox_normal(seed: Tensor, step: Tensor, out: Tensor) -> None:
    batch, n = out.shape
    chunks = chunks_of(n)
    with on_device(out):
        philox_kernel[(batch * chunks,)](seed, step, samples_of(out), n, chunks, **OPTIONS)


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
            samples_of(latents.x),
            samples_of(latents.m_prev),
            noise=samples_of(noise),
            seed=seed,
            x_next=samples_of(x_next),
            x0=samples_of(x0),
            partial=partial,
            n=n,
            chunks=chunks,
            SCORE_STORED=score_stored,
            **latent_arguments(latents, table, step_index),
            **OPTIONS,
        )
        finish(partial, None, table, step_index, log_prob, None, n)
