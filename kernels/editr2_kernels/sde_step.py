"""One sampler step of any flow-matching dynamics, with its log-probability, in one pass.

    mu = A x + B v        x' = round(mu + S eps)        log p = w mean((x' - mu)^2) + c

A, B, S, w, c are the table row of the sample's step; eps ~ N(0, I) is counter-based noise of (seed, step, element) or
given. x' is rounded to its storage dtype *before* its log-prob is taken: a replay from the stored x' gives the same
bits. Products and sums round separately in fp32, no fused multiply-add.

Source: Flow-GRPO (arXiv 2505.05470), equations 9-10; the table's sources.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .backends import native, pointer, rows_of, select
from .philox import philox_normal_ref
from .table import compute_dtype, mean_ref, rows_ref


class SdeStep(NamedTuple):
    """x_next [B, ...] in the storage dtype; log_prob [B] fp32 (0 for ODE rows)."""

    x_next: Tensor
    log_prob: Tensor


def sde_step_ref(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    *,
    noise: Tensor | None = None,
    store_dtype: torch.dtype | None = None,
) -> SdeStep:
    """The definition, in plain PyTorch on any device. x, v, noise: [B, ...]; fp64 inputs are computed in fp64."""
    dtype = compute_dtype(x, v)
    x_BN, v_BN = _checks.flat("x", x).to(dtype), _checks.flat("v", v).to(dtype)
    row = rows_ref(table, step_index, dtype)
    if noise is None:
        if seed is None:
            raise ValueError("seed is required where noise is not given")
        eps_BN = philox_normal_ref(seed, step_index, x_BN.shape[1]).to(dtype)
    else:
        eps_BN = _checks.flat("noise", noise).to(dtype)
    mu_BN = row.A * x_BN + row.B * v_BN
    x_next_BN = (mu_BN + row.S * eps_BN).to(store_dtype or x.dtype)
    z_BN = x_next_BN.to(dtype) - mu_BN
    log_prob = row.w[:, 0] * mean_ref(z_BN * z_BN) + row.c[:, 0]
    return SdeStep(x_next_BN.view(x.shape), log_prob)


@torch.library.custom_op(
    "editr2::sde_step",
    mutates_args=(),
    schema="(Tensor x, Tensor v, Tensor table, Tensor step_index, Tensor? seed, Tensor? noise, "
    "ScalarType store_dtype, str backend) -> (Tensor, Tensor)",
)
def _sde_step(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    store_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select(backend, x.device)
    _checks.steps_in_range(step_index, table)
    if chosen == "ref":
        out = sde_step_ref(x, v, table, step_index, seed, noise=noise, store_dtype=store_dtype)
        return out.x_next, out.log_prob
    x, v, noise = _checks.rows(x), _checks.rows(v), None if noise is None else _checks.rows(noise)
    table, step_index = table.contiguous(), step_index.contiguous()
    seed = None if seed is None else seed.contiguous()
    x_next = torch.empty(x.shape, dtype=store_dtype, device=x.device)
    log_prob = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0] == 0:
        return x_next, log_prob
    if chosen == "cpu":
        native().sde_step(
            *rows_of(x),
            *rows_of(v),
            *rows_of(noise),
            pointer(table),
            table.shape[0],
            pointer(step_index),
            pointer(seed),
            *rows_of(x_next)[:2],
            pointer(log_prob),
            *x.shape,
            torch.get_num_threads(),
        )
    else:
        from . import triton_kernels

        triton_kernels.sde_step(x, v, noise, table, step_index, seed, x_next, log_prob)
    return x_next, log_prob


@_sde_step.register_fake
def _(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    store_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=store_dtype, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )


def sde_step(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    *,
    noise: Tensor | None = None,
    store_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SdeStep:
    """Advance every sample by the step its index names, and score the move. No gradient: this is the rollout.

    Args:
        x: [B, ...] current latents, float32, bfloat16 or float16.
        v: like x in shape; predicted velocity (noise - data); its dtype may differ.
        table: [rows, 8] float32 from `transition_table`, on the device of x.
        step_index: [B] int64 on the device of x; samples may be at different steps.
        seed: [B] int64, the noise key of each sample; may be None only where `noise` is given.
        noise: like x in shape; used in place of the counter-based noise.
        store_dtype: dtype of x_next (default x.dtype).
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        x_next, contiguous, in the shape of x; log_prob [B] fp32, a mean over elements (exactly 0 for ODE rows).

    Raises:
        ValueError or TypeError naming the argument. A step_index out of range raises on CPU tensors; on a GPU, where
        looking would stall the queue, the sample's x_next and log_prob are NaN.
    """
    _checks.samples("x", x)
    _checks.like("v", v, "x", x)
    _checks.transition(table, step_index, x)
    if seed is not None:
        _checks.per_sample("seed", seed, x.shape[0], "x", x)
    elif noise is None:
        raise ValueError("seed is required where noise is not given")
    if noise is not None:
        _checks.like("noise", noise, "x", x)
        noise = _checks.flat("noise", noise.detach())
    if store_dtype is not None:
        _checks.float_dtype("store_dtype", store_dtype)
    x_next, log_prob = torch.ops.editr2.sde_step(
        _checks.flat("x", x.detach()),
        _checks.flat("v", v.detach()),
        table,
        step_index,
        seed,
        noise,
        store_dtype or x.dtype,
        _checks.backend_name(backend),
    )
    return SdeStep(x_next.view(x.shape), log_prob)
