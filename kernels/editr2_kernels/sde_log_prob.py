"""The log-probability of a stored sampler step under a new velocity, differentiable to that velocity.

    mu = A x + B v        z = x' - mu        log p = w mean(z^2) + c
    mean_diff = mean((B (v - v_ref))^2)      (the KL of the step is mean_diff / (2 S^2))

    d log p / d v     = -2 w B z / N
    d mean_diff / d v =  2 B^2 (v - v_ref) / N

mu and the mean are computed with the operations of `sde_step` in the same order, so replaying a rollout with the same
velocity gives the same bits: the on-policy ratio is exactly 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .backends import native, pointer, rows_of, select
from .table import compute_dtype, mean_ref, rows_ref


class SdeLogProb(NamedTuple):
    """log_prob [B] fp32; mean_diff [B] fp32, or None without a reference velocity."""

    log_prob: Tensor
    mean_diff: Tensor | None


def sde_log_prob_ref(
    x: Tensor, x_next: Tensor, v: Tensor, table: Tensor, step_index: Tensor, *, v_ref: Tensor | None = None
) -> SdeLogProb:
    """The definition, in plain PyTorch on any device; gradient to v only. fp64 inputs are computed in fp64."""
    dtype = compute_dtype(x, x_next, v, v_ref)
    v_BN = _checks.flat("v", v).to(dtype)
    row = rows_ref(table, step_index, dtype)
    mu_BN = row.A * _checks.flat("x", x.detach()).to(dtype) + row.B * v_BN
    z_BN = _checks.flat("x_next", x_next.detach()).to(dtype) - mu_BN
    log_prob = row.w[:, 0] * mean_ref(z_BN * z_BN) + row.c[:, 0]
    if v_ref is None:
        return SdeLogProb(log_prob, None)
    diff_BN = row.B * (v_BN - _checks.flat("v_ref", v_ref.detach()).to(dtype))
    return SdeLogProb(log_prob, mean_ref(diff_BN * diff_BN))


def sde_log_prob_backward_ref(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    grad_log_prob: Tensor,
    grad_mean_diff: Tensor | None,
) -> Tensor:
    """Gradient to v, [B, N] in v.dtype: the two formulas of the docstring, the scalars of a sample combined first."""
    dtype, n = torch.float32, v.shape[1]
    v_BN = v.to(dtype)
    row = rows_ref(table, step_index, dtype)
    z_BN = x_next.to(dtype) - (row.A * x.to(dtype) + row.B * v_BN)
    grad = (-2.0 * row.w * row.B / n * grad_log_prob[:, None]) * z_BN
    if v_ref is not None and grad_mean_diff is not None:
        grad = grad + (2.0 * row.B * row.B / n * grad_mean_diff[:, None]) * (v_BN - v_ref.to(dtype))
    return grad.to(v.dtype)


@torch.library.custom_op(
    "editr2::sde_log_prob",
    mutates_args=(),
    schema="(Tensor x, Tensor x_next, Tensor v, Tensor? v_ref, Tensor table, Tensor step_index, str backend)"
    " -> (Tensor, Tensor)",
)
def _sde_log_prob(
    x: Tensor, x_next: Tensor, v: Tensor, v_ref: Tensor | None, table: Tensor, step_index: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The second output is empty, [0], without v_ref: a schema cannot return an optional tensor."""
    chosen = select(backend, x.device)
    _checks.steps_in_range(step_index, table)
    if chosen == "ref":
        out = sde_log_prob_ref(x, x_next, v, table, step_index, v_ref=v_ref)
        return out.log_prob, x.new_empty(0, dtype=torch.float32) if out.mean_diff is None else out.mean_diff
    x, x_next, v = _checks.rows(x), _checks.rows(x_next), _checks.rows(v)
    v_ref = None if v_ref is None else _checks.rows(v_ref)
    table, step_index = table.contiguous(), step_index.contiguous()
    log_prob = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    mean_diff = torch.empty(x.shape[0] if v_ref is not None else 0, dtype=torch.float32, device=x.device)
    if x.shape[0] == 0:
        return log_prob, mean_diff
    if chosen == "cpu":
        native().sde_log_prob(
            *rows_of(x),
            *rows_of(x_next),
            *rows_of(v),
            *rows_of(v_ref),
            pointer(table),
            table.shape[0],
            pointer(step_index),
            pointer(log_prob),
            0 if v_ref is None else pointer(mean_diff),
            *x.shape,
            torch.get_num_threads(),
        )
    else:
        from . import triton_kernels

        triton_kernels.sde_log_prob(x, x_next, v, v_ref, table, step_index, log_prob, mean_diff)
    return log_prob, mean_diff


@_sde_log_prob.register_fake
def _(
    x: Tensor, x_next: Tensor, v: Tensor, v_ref: Tensor | None, table: Tensor, step_index: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    size = x.shape[0] if v_ref is not None else 0
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(size, dtype=torch.float32)


@torch.library.custom_op(
    "editr2::sde_log_prob_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor x_next, Tensor v, Tensor? v_ref, Tensor table, Tensor step_index, "
    "Tensor grad_log_prob, Tensor? grad_mean_diff, str backend) -> Tensor",
)
def _sde_log_prob_backward(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    grad_log_prob: Tensor,
    grad_mean_diff: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = select(backend, x.device)
    _checks.steps_in_range(step_index, table)
    if chosen == "ref":
        return sde_log_prob_backward_ref(x, x_next, v, v_ref, table, step_index, grad_log_prob, grad_mean_diff)
    x, x_next, v = _checks.rows(x), _checks.rows(x_next), _checks.rows(v)
    v_ref = None if v_ref is None else _checks.rows(v_ref)
    table, step_index = table.contiguous(), step_index.contiguous()
    grad_log_prob = grad_log_prob.contiguous()
    grad_mean_diff = None if grad_mean_diff is None else grad_mean_diff.contiguous()
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if x.shape[0] == 0:
        return grad_v
    if chosen == "cpu":
        native().sde_log_prob_backward(
            *rows_of(x),
            *rows_of(x_next),
            *rows_of(v),
            *rows_of(v_ref),
            pointer(table),
            table.shape[0],
            pointer(step_index),
            pointer(grad_log_prob),
            pointer(grad_mean_diff),
            *rows_of(grad_v)[:2],
            *x.shape,
            torch.get_num_threads(),
        )
    else:
        from . import triton_kernels

        triton_kernels.sde_log_prob_backward(
            x, x_next, v, v_ref, table, step_index, grad_log_prob, grad_mean_diff, grad_v
        )
    return grad_v


@_sde_log_prob_backward.register_fake
def _(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    v_ref: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    grad_log_prob: Tensor,
    grad_mean_diff: Tensor | None,
    backend: str,
) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, x_next, v, v_ref, table, step_index, backend = inputs
    ctx.save_for_backward(x, x_next, v, v_ref, table, step_index)
    ctx.backend = backend


def _backward(ctx: Any, grad_log_prob: Tensor | None, grad_mean_diff: Tensor | None) -> tuple:
    x, x_next, v, v_ref, table, step_index = ctx.saved_tensors
    grad_v = None
    if ctx.needs_input_grad[2]:
        if grad_log_prob is None:
            grad_log_prob = torch.zeros(v.shape[0], dtype=torch.float32, device=v.device)
        grad_v = torch.ops.editr2.sde_log_prob_backward(
            x,
            x_next,
            v,
            v_ref,
            table,
            step_index,
            grad_log_prob,
            None if v_ref is None else grad_mean_diff,
            ctx.backend,
        )
    return None, None, grad_v, None, None, None, None


_sde_log_prob.register_autograd(_backward, setup_context=_setup_context)


def sde_log_prob(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    *,
    v_ref: Tensor | None = None,
    backend: str | None = None,
) -> SdeLogProb:
    """Log-probability of the move x -> x_next under the velocity v; differentiable to v, and to nothing else.

    Args:
        x, x_next: [B, ...] latents before and after the step, as `sde_step` took and returned them.
        v: like x in shape; predicted velocity, its dtype may differ. The gradient has its dtype.
        table: [rows, 8] float32 from `transition_table`, on the device of x.
        step_index: [B] int64 on the device of x.
        v_ref: like x in shape; a reference policy's velocity, for the KL.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        log_prob [B] fp32, a mean over elements (exactly 0 for ODE rows); mean_diff [B] fp32 = mean((B (v - v_ref))^2),
        or None without v_ref.

    Raises:
        ValueError or TypeError naming the argument. A step_index out of range raises on CPU tensors; on a GPU the
        sample's outputs are NaN.
    """
    _checks.samples("x", x)
    _checks.like("x_next", x_next, "x", x)
    _checks.like("v", v, "x", x)
    _checks.transition(table, step_index, x)
    if v_ref is not None:
        _checks.like("v_ref", v_ref, "x", x)
    log_prob, mean_diff = torch.ops.editr2.sde_log_prob(
        _checks.flat("x", x.detach()),
        _checks.flat("x_next", x_next.detach()),
        _checks.flat("v", v),
        None if v_ref is None else _checks.flat("v_ref", v_ref.detach()),
        table,
        step_index,
        _checks.backend_name(backend),
    )
    return SdeLogProb(log_prob, None if v_ref is None else mean_diff)
