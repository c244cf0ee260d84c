"""Replays of a stored step: their moments, sde_log_prob, and the one backward of all of them."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..guidance import Latents
from . import common as lib
from . import guidance

# N, and what a replay reads beside the velocity, [B, N].
Replay = namedtuple("Replay", "n x x_next m_prev v_ref v_old")
# One of each term: of z, of u - v_ref and of u - v_old.
Terms = namedtuple("Terms", "z ref old")
# Where the factors of the terms come from: factors[B, 3], if they are there, times a scale; else
# the gradients to sde_log_prob's outputs, [B].
Incoming = namedtuple("Incoming", "factors scale log_prob mean_diff")
# Where the gradients to the branches go, [B, N]; None: not wanted.
Grads = namedtuple("Grads", "v v_uncond v_uncond_image")


@triton.jit
def _store_squares(partial, value, mask):
    value = tl.where(mask, value, 0.0)
    tl.store(partial, lib.tree_sum(value * value))


@lib.kernel
def moments_kernel(
    replay, velocity, steps, squares, rows, row_count, chunks, RENORM: constexpr, PLAIN: constexpr
):
    """Squares of z, B (u - v_ref) (PLAIN: u - v_ref) and B (u - v_old), one partial a chunk."""
    at = lib.place(chunks, replay.n)
    row = lib.row_at(steps, rows, at.sample)
    x = lib.load(replay.x, at)
    u = guidance.guided_velocity(velocity, row_count, at, row, RENORM)
    x_next = lib.load(replay.x_next, at)
    mu = lib.transition_mean(x, u, replay.m_prev, at, row)
    partial = at.sample * chunks + at.chunk
    _store_squares(squares.z + partial, x_next - mu, at.mask)
    b = lib.entry(row, 1)
    if replay.v_ref is not None:
        difference = u - lib.load(replay.v_ref, at)
        if not PLAIN:
            difference = b * difference
        _store_squares(squares.ref + partial, difference, at.mask)
    if replay.v_old is not None:
        difference = b * (u - lib.load(replay.v_old, at))
        _store_squares(squares.old + partial, difference, at.mask)


@triton.jit
def factors_at(incoming, sample, row, n):
    """The factors of a sample's terms, and whether any of them counts."""
    if incoming.factors is not None:
        z = tl.load(incoming.factors + sample * 3)
        ref = tl.load(incoming.factors + sample * 3 + 1)
        old = tl.load(incoming.factors + sample * 3 + 2)
        if incoming.scale is not None:
            scale = tl.load(incoming.scale)
            z = lib.scaled(z, scale)
            ref = lib.scaled(ref, scale)
            old = lib.scaled(old, scale)
    else:
        size = tl.cast(n, tl.float32)
        b = lib.entry(row, 1)
        z = b * 0.0
        ref = b * 0.0
        if incoming.log_prob is not None:
            factor = tl.div_rn(-2.0 * lib.entry(row, 4) * b, size)
            z = lib.scaled(factor, tl.load(incoming.log_prob + sample))
        if incoming.mean_diff is not None:
            ref = lib.scaled(tl.div_rn(2.0 * b * b, size), tl.load(incoming.mean_diff + sample))
        old = tl.zeros_like(z)
    return Terms(z=z, ref=ref, old=old), (z != 0.0) | (ref != 0.0) | (old != 0.0)


@triton.jit
def _with_term(g, factor, u, samples, at):
    """g + factor (u - samples); where the factor is 0 that is neither read nor added."""
    if samples is None:
        return g
    else:
        value = lib.load(samples, lib.only_if(factor != 0.0, at))
        return tl.where(factor != 0.0, g + factor * (u - value), g)


@triton.jit
def velocity_gradient(u, replay, on, at, row):
    """on.z z + on.ref (u - v_ref) + on.old (u - v_old)."""
    read = lib.only_if(on.z != 0.0, at)
    x = lib.load(replay.x, read)
    x_next = lib.load(replay.x_next, read)
    mu = lib.transition_mean(x, u, replay.m_prev, read, row)
    g = tl.where(on.z != 0.0, on.z * (x_next - mu), 0.0)
    g = _with_term(g, on.ref, u, replay.v_ref, at)
    return _with_term(g, on.old, u, replay.v_old, at)


@lib.kernel
def dot_kernel(
    replay, velocity, steps, incoming, dots, rows, row_count, RENORM: constexpr, LEVELS: constexpr
):
    """sum(w g) of the rows of a renormalisation, g the gradient to s w; WIDE: one partial a
    chunk."""
    at, line, lines, kept = guidance.place_rows(velocity.width, row_count, 1 << LEVELS)
    row = lib.row_at(steps, rows, at.sample)
    on, live = factors_at(incoming, at.sample, row, replay.n)
    guide = guidance.guide_at(velocity.guidance, at.sample, row)
    at = lib.only_if(guide.active & live, at)
    scale = tl.load(velocity.scales + line * 3, mask=at.mask, other=1.0)
    _, w, u = guidance.branches(velocity, guide, scale, at, RENORM)
    g = velocity_gradient(u, replay, on, at, row)
    if RENORM.TEXT_CHANNEL:
        g = guide.image * g
    sums = lib.pair_sums(tl.where(at.mask, w * g, 0.0), LEVELS)
    chunks = tl.cdiv(velocity.width, 1 << LEVELS)
    tl.store(dots + lines * chunks + at.chunk, sums, mask=kept)


@lib.kernel
def dot_finish_kernel(partial, dots, count, chunks):
    """One program a row: partials in chunk order."""
    first = tl.program_id(0).to(tl.int64)
    tl.store(dots + first + tl.arange(0, 1), lib.totals(partial, first, count, chunks))


@lib.kernel
def backward_kernel(
    replay, velocity, steps, incoming, dots, grads, rows, row_count, chunks, RENORM: constexpr
):
    """The gradient to u, through the guidance to v and its branches. A sample without factors gets
    0 unread."""
    at = lib.place(chunks, replay.n)
    row = lib.row_at(steps, rows, at.sample)
    on, live = factors_at(incoming, at.sample, row, replay.n)
    read = lib.only_if(live, at)
    if velocity.guidance is None:
        to_v = velocity_gradient(lib.load(velocity.v, read), replay, on, read, row)
    else:
        guide = guidance.guide_at(velocity.guidance, at.sample, row)
        scale = 1.0
        if RENORM is not None:
            line = guidance.lines_of(velocity, row_count, at, RENORM)
            scale = tl.load(velocity.scales + line * 3, mask=read.mask, other=1.0)
            on_w = tl.load(velocity.scales + line * 3 + 1, mask=read.mask, other=0.0)
            on_v = tl.load(velocity.scales + line * 3 + 2, mask=read.mask, other=0.0)
            dot = tl.load(dots + line, mask=read.mask, other=0.0)
        v, w, u = guidance.branches(velocity, guide, scale, read, RENORM)
        to_image = velocity_gradient(u, replay, on, read, row)
        if RENORM is None:
            to_text = guide.image * to_image
        elif RENORM.TEXT_CHANNEL:
            to_text = scale * (guide.image * to_image) - (on_w * dot) * w
        else:
            to_image = scale * to_image - (on_w * dot) * w
            to_text = guide.image * to_image
        to_v = guide.text * to_text
        if RENORM is not None:
            to_v += (on_v * dot) * v
        if grads.v_uncond is not None:
            lib.store(grads.v_uncond, at, tl.where(live, (1.0 - guide.text) * to_text, 0.0))
        if grads.v_uncond_image is not None:
            lib.store(grads.v_uncond_image, at, tl.where(live, (1.0 - guide.image) * to_image, 0.0))
    if grads.v is not None:
        lib.store(grads.v, at, tl.where(live, to_v, 0.0))


def _replay(latents: Latents, *others: Tensor | None) -> Replay:
    """others: x_next, v_ref, v_old."""
    x_next, v_ref, v_old = others
    rows = map(lib.samples_of, (latents.x, x_next, latents.m_prev, v_ref, v_old))
    return Replay(latents.x.shape[1], *rows)


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
    chunks = lib.chunks_of(n)
    count = 1 + (v_ref is not None) + (v_old is not None)
    plane = (batch * chunks + 3) // 4 * 4
    squares = torch.empty(count, plane, dtype=torch.float32, device=latents.x.device)
    rest = iter(squares[1:])
    terms = Terms(squares[0], *(None if v is None else next(rest) for v in (v_ref, v_old)))
    moments_kernel[(batch * chunks,)](
        _replay(latents, x_next, v_ref, v_old),
        squares=terms,
        chunks=chunks,
        PLAIN=plain_ref,
        **guidance.latent_arguments(latents, table, step_index),
        **lib.OPTIONS,
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
    with lib.on_device(latents.x):
        squares = moments(latents, x_next, v_ref, None, table, step_index, False)
        ref_squares = None if v_ref is None else squares[1]
        lib.finish(
            squares[0], ref_squares, table, step_index, log_prob, mean_diff, latents.x.shape[1]
        )


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
    chunks = lib.chunks_of(n)
    with lib.on_device(latents.x):
        arguments = {
            **guidance.latent_arguments(latents, table, step_index),
            "replay": _replay(latents, x_next, v_ref, v_old),
            "incoming": Incoming(factors, scale, grad_log_prob, grad_mean_diff),
            **lib.OPTIONS,
        }
        dots = None if arguments["RENORM"] is None else _dots(guidance.RowGrid(latents), arguments)
        grads = Grads(*map(lib.samples_of, (grad_v, grad_v_uncond, grad_v_uncond_image)))
        backward_kernel[(batch * chunks,)](dots=dots, grads=grads, chunks=chunks, **arguments)


def _dots(grid: guidance.RowGrid, arguments: dict[str, Any]) -> Tensor:
    """[B, R] fp32: what the gradient of a renormalisation needs of every row."""
    scales: Tensor = arguments["velocity"].scales
    dots = scales.new_empty(grid.lines, grid.chunks)
    dot_kernel[(grid.programs,)](dots=dots, LEVELS=grid.levels, **arguments)
    if not grid.wide:
        return dots
    whole = scales.new_empty(grid.lines)
    dot_finish_kernel[(grid.lines,)](dots, whole, grid.lines, grid.chunks, **lib.OPTIONS)
    return whole
