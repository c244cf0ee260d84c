"""The log-probability of a stored sampler step under a new velocity, differentiable to that
velocity.

    mu = A x + B u (+ C m_prev)        z = x' - mu        log p = w mean(z^2) + c
    mean_diff = mean((B (u - v_ref))^2)      (the KL of the step is mean_diff / (2 S^2))

    d log p / d u     = -2 w B z / N
    d mean_diff / d u =  2 B^2 (u - v_ref) / N

u is v, or the velocity guided from v and its branches (`guidance`), through which the gradient then
flows. mu and the mean are computed with the operations of `sde_step` in the same order, so
replaying a rollout with the same velocity gives the same bits: the on-policy ratio is exactly 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import differentiable, operator
from .backends import pointer, select
from .guidance import Renorm, call_compiled
from .numerics import mean_ref
from .stored_step import (
    REPLAY_SCHEMA,
    Replay,
    backward,
    make_replay,
    moments_ref,
    save,
    saved,
    without_gradient,
)
from .table import rows_ref


class SdeLogProb(NamedTuple):
    """log_prob [B] fp32; mean_diff [B] fp32, or None without a reference velocity."""

    log_prob: Tensor
    mean_diff: Tensor | None


def _replayed(replay: Replay) -> SdeLogProb:
    row, u, z = moments_ref(replay)
    z = torch.where(row.w == 0, z.detach(), z)
    log_prob = row.w[:, 0] * mean_ref(z * z) + row.c[:, 0]
    if replay.v_ref is None:
        return SdeLogProb(log_prob, None)
    diff = row.B * (u - replay.v_ref.to(u.dtype))
    return SdeLogProb(log_prob, mean_ref(diff * diff))


def sde_log_prob_ref(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    *,
    v_ref: Tensor | None = None,
    **guidance: Any,
) -> SdeLogProb:
    """The definition, in plain PyTorch on any device; arguments of `sde_log_prob`. fp64 is computed
    in fp64."""
    replay = make_replay(x, x_next, v, table, step_index, v_ref=v_ref, doubles=True, **guidance)
    if v_ref is None:  # an ODE row has no gradient then, whatever it holds
        replay = without_gradient(replay, rows_ref(table, step_index, table.dtype).w[:, 0] == 0)
    return _replayed(replay)


def _fake_sde_log_prob(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _outputs(Replay.split(inputs)[0])


@operator(
    "sde_log_prob",
    f"({REPLAY_SCHEMA}, str backend) -> (Tensor, Tensor)",
    fake=_fake_sde_log_prob,
)
def _sde_log_prob(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The second output is empty, [0], without v_ref: a schema cannot return an optional tensor."""
    replay, (backend,) = Replay.split(inputs)
    chosen = select(backend, replay.x.device)
    replay = replay.checked(chosen)
    if chosen == "ref":
        out = _replayed(replay)
        absent = torch.empty(0, dtype=torch.float32, device=replay.x.device)
        return out.log_prob, absent if out.mean_diff is None else out.mean_diff
    log_prob, mean_diff = _outputs(replay)
    if replay.x.shape[0] == 0:
        return log_prob, mean_diff
    wanted = None if replay.v_ref is None else mean_diff
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.sde_log_prob(
            replay.latents,
            replay.x_next,
            replay.v_ref,
            replay.table,
            replay.step_index,
            log_prob,
            wanted,
        )
    else:
        call_compiled(
            chosen,
            "sde_log_prob",
            replay.latents,
            **replay.arguments(old=False),
            log_prob=pointer(log_prob),
            mean_diff=pointer(wanted),
        )
    return log_prob, mean_diff


def _outputs(replay: Replay) -> tuple[Tensor, Tensor]:
    batch, table = replay.x.shape[0], replay.table  # which is fp32
    return table.new_empty(batch), table.new_empty(0 if replay.v_ref is None else batch)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    replay, (ctx.backend,) = Replay.split(inputs)
    save(ctx, replay)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_log_prob: Tensor | None, grad_mean_diff: Tensor | None) -> tuple:
    replay, _ = saved(ctx)
    grads = backward(
        ctx, replay, ctx.backend, grad_log_prob=grad_log_prob, grad_mean_diff=grad_mean_diff
    )
    return *grads, None


differentiable("sde_log_prob", setup_context=_setup_context, backward=_backward, results=2)


def sde_log_prob(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    *,
    m_prev: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    v_uncond_image: Tensor | None = None,
    guidance_image: float | Tensor | None = None,
    guidance_interval: tuple[float, float] | Tensor | None = None,
    renorm: Renorm = "none",
    v_ref: Tensor | None = None,
    backend: str | None = None,
) -> SdeLogProb:
    """Log-probability of the move x -> x_next under the velocity v; differentiable to v and its
    unguided branches.

    Args:
        x, x_next: [B, ...] latents before and after the step, as `sde_step` took and returned them.
        v: like x in shape; predicted velocity, its dtype may differ. The gradient has its dtype.
        table: [rows, 8] float32 from `transition_table`, on the device of x.
        step_index: [B] int64 on the device of x.
        m_prev, v_uncond, guidance, v_uncond_image, guidance_image, guidance_interval, renorm: as in
            `sde_step`.
        v_ref: like x in shape; a reference policy's (guided) velocity, for the KL.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        log_prob [B] fp32, a mean over elements (exactly 0 for ODE rows); mean_diff [B] fp32 =
        mean((B (u - v_ref))^2), or None without v_ref.

    Raises:
        ValueError or TypeError naming the argument. A step_index out of range, and a row that needs
        the m_prev that is absent, raise on CPU tensors; on a GPU the sample's outputs are NaN.
    """
    replay = make_replay(
        x,
        x_next,
        v,
        table,
        step_index,
        v_ref=v_ref,
        m_prev=m_prev,
        v_uncond=v_uncond,
        guidance=guidance,
        v_uncond_image=v_uncond_image,
        guidance_image=guidance_image,
        guidance_interval=guidance_interval,
        renorm=renorm,
    )
    log_prob, mean_diff = _sde_log_prob(*replay, _checks.backend_name(backend))
    return SdeLogProb(log_prob, None if v_ref is None else mean_diff)
