"""philox_normal and sde_step."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import namedtuple

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..guidance import Latents
from . import common as lib
from .guidance import guided_velocity, latent_arguments

# N, seeds, [B], or else noise, and what a step starts from, [B, N].
Start = namedtuple("Start", "n seed noise x m_prev")
# x_next, x0: [B, N]; squares: of z, one partial a chunk.
Outputs = namedtuple("Outputs", "x_next x0 squares")


@lib.kernel
def philox_kernel(seed, step, out, n, chunks):
    at = lib.place(chunks, n)
    seed = tl.load(seed + at.sample)
    lib.store(out, at, lib.philox_block(seed, tl.load(step + at.sample), at.chunk))


@lib.kernel
def step_kernel(
    start, velocity, steps, out, rows, row_count, chunks, RENORM: constexpr, STORED: constexpr
):
    """STORED: x_next is scored as it is stored."""
    at = lib.place(chunks, start.n)
    row = lib.row_at(steps, rows, at.sample)
    x = lib.load(start.x, at)
    u = guided_velocity(velocity, row_count, at, row, RENORM)
    mu = lib.transition_mean(x, u, start.m_prev, at, row)
    spread = lib.entry(row, 3)
    if start.noise is None:
        eps = lib.philox_block(tl.load(start.seed + at.sample), row.step, at.chunk)
    else:
        eps = lib.load(start.noise, lib.only_if(spread != 0.0, at))
    x_next = mu + spread * eps
    lib.store(out.x_next, at, x_next)
    if STORED:
        x_next = x_next.to(out.x_next.ptr.dtype.element_ty).to(tl.float32)
    z = tl.where(at.mask, x_next - mu, 0.0)
    tl.store(out.squares + at.sample * chunks + at.chunk, lib.tree_sum(z * z))
    if out.x0 is not None:
        lib.store(out.x0, at, x - u * lib.entry(row, 6))


def philox_normal(seed: Tensor, step: Tensor, out: Tensor) -> None:
    batch, n = out.shape
    chunks = lib.chunks_of(n)
    with lib.on_device(out):
        philox_kernel[(batch * chunks,)](seed, step, lib.samples_of(out), n, chunks, **lib.OPTIONS)


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
    chunks = lib.chunks_of(n)
    start = map(lib.samples_of, (noise, latents.x, latents.m_prev))
    squares = torch.empty(batch, chunks, dtype=torch.float32, device=latents.x.device)
    with lib.on_device(latents.x):
        step_kernel[(batch * chunks,)](
            Start(n, seed, *start),
            out=Outputs(lib.samples_of(x_next), lib.samples_of(x0), squares),
            chunks=chunks,
            STORED=score_stored,
            **latent_arguments(latents, table, step_index),
            **lib.OPTIONS,
        )
        lib.finish(squares, None, table, step_index, log_prob, None, n)
