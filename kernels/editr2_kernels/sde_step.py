"""One sampler step of any flow-matching dynamics, with its log-probability, in one pass.

    u  = v, guided from v and its branches (`guidance`)        x0 = x - sigma u
    mu = A x + B u (+ C m_prev)        x' = round(mu + S eps)        log p = w mean((x' - mu)^2) + c

A, B, C, S, w, c, sigma are the table row of the sample's step; eps ~ N(0, I) is counter-based noise
of (seed, step, element) or given. x' is rounded to its storage dtype *before* its log-prob is
taken: a replay from the stored x' gives the same bits. Products and sums round separately in fp32,
no fused multiply-add.

Source: Flow-GRPO (arXiv 2505.05470), equations 9-10; the table's and the guidance's sources.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import operator
from .backends import pointer, select, strided
from .guidance import LATENTS_SCHEMA, Latents, Renorm, call_compiled, guided_ref, make_latents
from .numerics import compute_dtype, mean_ref
from .philox import philox_normal_ref
from .table import mean_of_rows_ref, rows_ref

SCORES = ("stored", "unrounded")


class SdeStep(NamedTuple):
    """x_next [B, ...] in the storage dtype; log_prob [B] fp32 (0 for ODE rows); x0 like x_next,
    None if not asked."""

    x_next: Tensor
    log_prob: Tensor
    x0: Tensor | None = None


class _Inputs(NamedTuple):
    """What the operators take after `Latents`: noise [B, N] or None, seed [B] int64 or None."""

    noise: Tensor | None
    table: Tensor
    step_index: Tensor
    seed: Tensor | None
    score_stored: bool


_INPUTS_SCHEMA = "Tensor? noise, Tensor table, Tensor step_index, Tensor? seed, bool score_stored"


def _stepped(latents: Latents, given: _Inputs, store_dtype: torch.dtype) -> SdeStep:
    dtype = compute_dtype(latents.x, latents.v, given.noise)
    row = rows_ref(given.table, given.step_index, dtype)
    x, u = latents.x.to(dtype), guided_ref(latents, row.sigma)
    if given.noise is not None:
        eps = given.noise.to(dtype)
    else:
        assert given.seed is not None
        eps = philox_normal_ref(given.seed, given.step_index, x.shape[1]).to(dtype)
    mu = mean_of_rows_ref(row, x, u, latents.m_prev)
    sample = torch.where(row.S == 0, mu, mu + row.S * eps)  # without noise none is looked at
    x_next = sample.to(store_dtype)
    z = (x_next.to(dtype) if given.score_stored else sample) - mu
    log_prob = row.w[:, 0] * mean_ref(z * z) + row.c[:, 0]
    return SdeStep(x_next, log_prob, (x - row.sigma * u).to(store_dtype))


def sde_step_ref(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    *,
    noise: Tensor | None = None,
    store_dtype: torch.dtype | None = None,
    score: Literal["stored", "unrounded"] = "stored",
    **guidance: Any,
) -> SdeStep:
    """The definition, in plain PyTorch on any device; arguments of `sde_step`, x0 always made. fp64
    stays fp64."""
    latents = make_latents(x, v, doubles=True, **guidance)
    if noise is None and seed is None:
        raise ValueError("seed is required where noise is not given")
    noise = None if noise is None else _checks.flat("noise", noise)
    out = _stepped(
        latents, _Inputs(noise, table, step_index, seed, score == "stored"), store_dtype or x.dtype
    )
    assert out.x0 is not None
    return SdeStep(out.x_next.view(x.shape), out.log_prob, out.x0.view(x.shape))


def _run(
    latents: Latents,
    given: _Inputs,
    backend: str,
    x_next: Tensor,
    x0: Tensor | None,
    log_prob: Tensor,
) -> None:
    """Fill the outputs: x_next [B, N], x0 like it or None, log_prob [B], all contiguous."""
    chosen = select(backend, latents.x.device)
    _checks.table_rows(chosen, given.table, given.step_index, latents.m_prev)
    if chosen == "ref":
        out = _stepped(latents, given, x_next.dtype)
        for target, value in ((x_next, out.x_next), (x0, out.x0), (log_prob, out.log_prob)):
            if target is not None and value is not None:
                target.copy_(value)
        return
    if latents.x.shape[0] == 0:
        return
    latents = latents.addressable()
    noise = None if given.noise is None else _checks.addressable(given.noise)
    seed = None if given.seed is None else given.seed.contiguous()
    table, step_index = given.table.contiguous(), given.step_index.contiguous()
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.sde_step(
            latents, noise, table, step_index, seed, x_next, x0, log_prob, given.score_stored
        )
    else:
        call_compiled(
            chosen,
            "sde_step",
            latents,
            noise=strided(noise),
            table=pointer(table),
            rows=table.shape[0],
            step_index=pointer(step_index),
            seed=pointer(seed),
            x_next=strided(x_next),
            x0=strided(x0),
            log_prob=pointer(log_prob),
            score_stored=given.score_stored,
        )


def _split(inputs: tuple) -> tuple[Latents, _Inputs, tuple]:
    first = len(Latents._fields)
    second = first + len(_Inputs._fields)
    return Latents(*inputs[:first]), _Inputs(*inputs[first:second]), inputs[second:]


def _outputs(
    latents: Latents, store_dtype: torch.dtype, return_x0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = latents.x
    return (
        x.new_empty(x.shape, dtype=store_dtype),
        x.new_empty(x.shape if return_x0 else 0, dtype=store_dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


def _fake_sde_step(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    latents, _, (store_dtype, return_x0, _) = _split(inputs)
    return _outputs(latents, store_dtype, return_x0)


@operator(
    "sde_step",
    f"({LATENTS_SCHEMA}, {_INPUTS_SCHEMA}, ScalarType store_dtype, bool return_x0, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_sde_step,
)
def _sde_step(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, x0 (empty, [0], if not asked: a schema cannot return an optional tensor),
    log_prob."""
    latents, given, (store_dtype, return_x0, backend) = _split(inputs)
    x_next, x0, log_prob = _outputs(latents, store_dtype, return_x0)
    _run(latents, given, backend, x_next, x0 if return_x0 else None, log_prob)
    return x_next, x0, log_prob


@torch.library.custom_op(
    "editr2::sde_step_out",
    mutates_args=("x_next", "x0", "log_prob"),
    schema=f"({LATENTS_SCHEMA}, {_INPUTS_SCHEMA}, str backend, Tensor(a!) x_next, Tensor(b!)? "
    "x0, Tensor(c!) log_prob) -> ()",
)
def _sde_step_out(*inputs: Any) -> None:
    """The same into given tensors, which must not share memory with an input or with one
    another."""
    latents, given, (backend, x_next, x0, log_prob) = _split(inputs)
    outputs = {"out.x_next": x_next, "out.x0": x0, "out.log_prob": log_prob}
    read = {**latents._asdict(), **given._asdict()}
    for (name, out), (other, value) in (
        *product(outputs.items(), read.items()),
        *combinations(outputs.items(), 2),
    ):
        if isinstance(value, Tensor) and out is not None and _checks.overlap(out, value):
            raise ValueError(f"{name} must not share memory with {other}")
    _run(latents, given, backend, x_next, x0, log_prob)


@_sde_step_out.register_fake
def _(*inputs: Any) -> None:
    return None


def _check_out(out: SdeStep, x: Tensor, store_dtype: torch.dtype | None, return_x0: bool) -> None:
    if not isinstance(out, SdeStep):
        raise TypeError(f"out must be an SdeStep, got {type(out).__name__}")
    _checks.like("out.x_next", out.x_next, "x", x)
    if store_dtype is not None and out.x_next.dtype != store_dtype:
        raise TypeError(
            f"out.x_next must have the store_dtype, {store_dtype}; got {out.x_next.dtype}"
        )
    if out.x0 is not None:
        _checks.like("out.x0", out.x0, "x", x)
        if out.x0.dtype != out.x_next.dtype:
            raise TypeError(
                f"out.x0 must have the dtype of out.x_next, {out.x_next.dtype}; got {out.x0.dtype}"
            )
    elif return_x0:
        raise ValueError("out.x0 is required with return_x0")
    _checks.tensor("out.log_prob", out.log_prob)
    if out.log_prob.dtype != torch.float32:
        raise TypeError(f"out.log_prob must be float32, got {out.log_prob.dtype}")
    if out.log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"out.log_prob must have shape [{x.shape[0]}], got {list(out.log_prob.shape)}"
        )
    _checks.same_device("out.log_prob", out.log_prob, "x", x)
    for name, value in out._asdict().items():
        if value is not None and not value.is_contiguous():
            raise ValueError(f"out.{name} must be contiguous, got strides {list(value.stride())}")
        if value is not None and value.requires_grad:
            raise ValueError(f"out.{name} must not require grad: the rollout carries none")


def sde_step(
    x: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor | None,
    *,
    noise: Tensor | None = None,
    m_prev: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    v_uncond_image: Tensor | None = None,
    guidance_image: float | Tensor | None = None,
    guidance_interval: tuple[float, float] | Tensor | None = None,
    renorm: Renorm = "none",
    store_dtype: torch.dtype | None = None,
    score: Literal["stored", "unrounded"] = "stored",
    return_x0: bool = False,
    out: SdeStep | None = None,
    backend: str | None = None,
) -> SdeStep:
    """Advance every sample by the step its index names, and score the move. No gradient: this is
    the rollout.

    Args:
        x: [B, ...] current latents, float32, bfloat16 or float16.
        v: like x in shape; predicted velocity (noise - data); its dtype may differ.
        table: [rows, 8] float32 from `transition_table`, on the device of x.
        step_index: [B] int64 on the device of x; samples may be at different steps.
        seed: [B] int64, the noise key of each sample; may be None only where `noise` is given. The
            noise is a function of (seed, step_index, element): a slice of a table whose index
            starts again repeats it.
        noise: like x in shape; used in place of the counter-based noise. Rows with S = 0 do not
            look at it.
        m_prev: like x in shape; the x0 of the step before, read by rows with C != 0 (second-order
            solvers).
        v_uncond: like v in shape, of its dtype (as every branch); the velocity without the text,
            for guidance.
        guidance: its weight, a number or [B] float32: u = v_uncond + guidance (v - v_uncond).
        v_uncond_image, guidance_image: the same for a second branch, without the image; applied to
            the result.
        guidance_interval: (low, high) or [B, 2] float32: guide only while low < sigma <= high.
            None: always.
        renorm: bring the guided velocity back to the size of v, by "token" (Qwen-Image),
            "text_channel" or "channel" (BAGEL) over the last dimension of x, or by "global" (BAGEL)
            over the sample. Needs guidance.
        store_dtype: dtype of x_next and x0 (default x.dtype).
        score: log-prob of the sample as "stored", which replays bitwise, or "unrounded", as other
            trainers take it.
        return_x0: also return x0 = x - sigma u, the clean image the velocity points to (the next
            step's m_prev).
        out: tensors to write instead of new ones: contiguous, apart in memory from every input; its
            x0 may be None.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        x_next, contiguous, in the shape of x; log_prob [B] fp32, a mean over elements (exactly 0
        for ODE rows); x0 or None. They are the tensors of `out` where it is given.

    Raises:
        ValueError or TypeError naming the argument. A step_index out of range, and a row that needs
        the m_prev that is absent, raise on CPU tensors; on a GPU, where looking would stall the
        queue, the sample's outputs are NaN.
    """
    latents = make_latents(
        x,
        v,
        m_prev=m_prev,
        v_uncond=v_uncond,
        guidance=guidance,
        v_uncond_image=v_uncond_image,
        guidance_image=guidance_image,
        guidance_interval=guidance_interval,
        renorm=renorm,
    ).detached()
    _checks.transition(table, step_index, x)
    if seed is not None:
        _checks.per_sample("seed", seed, x.shape[0], "x", x)
    elif noise is None:
        raise ValueError("seed is required where noise is not given")
    if noise is not None:
        _checks.like("noise", noise, "x", x)
        noise = _checks.flat("noise", _checks.detached(noise))
    if store_dtype is not None:
        _checks.float_dtype("store_dtype", store_dtype)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    inputs = (*latents, noise, _checks.detached(table), step_index, seed, score == "stored")
    name = _checks.backend_name(backend)
    if out is None:
        x_next, x0, log_prob = _sde_step(*inputs, store_dtype or x.dtype, return_x0, name)
        return SdeStep(x_next.view(x.shape), log_prob, x0.view(x.shape) if return_x0 else None)
    _check_out(out, x, store_dtype, return_x0)
    flat = latents.x.shape
    torch.ops.editr2.sde_step_out(
        *inputs,
        name,
        out.x_next.view(flat),
        None if out.x0 is None else out.x0.view(flat),
        out.log_prob,
    )
    return out
