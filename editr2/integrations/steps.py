"""A published sampler step by the operators: what the drop-ins for other projects share.

Those projects look sigmas up on the host, sample by sample, at every step. Here a schedule becomes
a transition table once, and a step is an index into it that stays on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from editr2_kernels import philox_normal, sde_log_prob, sde_step, transition_table

Dynamics = Literal["flow-sde", "dance-sde", "cps", "ode", "noisy-ode"]
"""As in the operators, but that "dance-sde" is noisy at the last step too (its trainers drop that
step themselves), and "noisy-ode": the mean of the ODE with the noise of "dance-sde"."""

Step = tuple[float, float, float]
"""sigma, sigma_next, noise level."""

Draw = Callable[[], tuple[Tensor | None, Tensor | None]]
"""(seed int64 [B], None) for counter-based noise, or (None, noise like the sample)."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NotCovered(Exception):
    """The transition table has no such step: a level below 0, of CPS above 1, a rising schedule.
    The original, which computes something all the same, runs instead."""


class StepTable(NamedTuple):
    """Steps as numbers on a device, one row each.

    table [K, 8]: the steps; mean [K, 8]: the same without noise; clean [K, 8]: x0 = x - sigma v as
    a step.
    g, std, dt [K]: the diffusion coefficient, its product with sqrt(-dt), and sigma_next - sigma.
    CPS has no g of its own: its std stands there.
    """

    table: Tensor
    mean: Tensor
    clean: Tensor
    g: Tensor
    std: Tensor
    dt: Tensor


def _row(step: Step, dynamics: Dynamics, log_prob: str, sigma_max: float) -> Tensor:
    sigma, after, level = step
    if dynamics == "cps":
        row = transition_table(
            [sigma, after], dynamics="cps", noise_level=level, log_prob="unscaled"
        )[0]
        row[4] = -1.0  # those projects score a step without noise too
        return row
    if dynamics == "ode":
        return transition_table([sigma, after], dynamics="ode")[0]
    if dynamics == "flow-sde":
        options: dict[str, Any] = {"noise_level": level, "sigma_max": sigma_max}
    else:  # the flow-SDE whose g is the noise level
        options = {
            "noise_level": level * math.sqrt((1.0 - sigma) / sigma) if sigma < 1.0 else level,
            "sigma_max": 0.0,
        }
    row = transition_table([sigma, after], dynamics="flow-sde", log_prob=log_prob, **options)[0]  # type: ignore[arg-type]
    if dynamics == "noisy-ode":
        row[0], row[1] = 1.0, after - sigma
    return row


@functools.lru_cache(maxsize=512)
def step_table(
    steps: tuple[Step, ...],
    dynamics: Dynamics,
    log_prob: str,
    sigma_max: float,
    device: torch.device,
) -> StepTable:
    """The rows of `steps` on `device`, made once. log_prob: "full" or "scaled", of
    `transition_table`; CPS is always "unscaled". sigma_max: stands in for a sigma of 1 where the
    flow-SDE would divide by 0. Raises NotCovered."""
    # A rollout under inference_mode would leave tables behind that training cannot save for its
    # backward.
    with torch.inference_mode(False):
        try:
            table = torch.stack([_row(step, dynamics, log_prob, sigma_max) for step in steps])
        except ValueError as error:
            raise NotCovered(str(error)) from error
        mean = table.clone()
        mean[:, 3:6] = 0.0
        clean = mean.clone()
        clean[:, 0], clean[:, 1] = 1.0, -table[:, 6]
        std = table[:, 3]
        dt = torch.tensor([after - sigma for sigma, after, _ in steps], dtype=torch.float64)
        g = std if dynamics == "cps" else (std.double() / (-dt).sqrt()).float()
        return StepTable(*(value.to(device) for value in (table, mean, clean, g, std, dt.float())))


_READ: Any = WeakTensorKeyDictionary()


def on_host(values: Tensor) -> tuple[float, ...]:
    """The numbers of a schedule. A tensor is read once, and again after it was changed in place."""
    version = None if values.is_inference() else values._version
    kept = _READ.get(values)
    if kept is None or kept[0] != version:
        kept = _READ[values] = (version, tuple(values.tolist()))
    return kept[1]


def schedule(sigmas: Tensor, level: float) -> tuple[Step, ...]:
    """All steps of a schedule [N + 1] at one noise level."""
    values = on_host(sigmas)
    return tuple((sigma, after, level) for sigma, after in pairwise(values))


def vector(value: float | Tensor, device: torch.device) -> Tensor:
    """A number or a tensor as [1] or [B] on `device`. A number is filled in there: a copy from the
    host would wait."""
    if isinstance(value, Tensor) and (value.device == device or value.numel() != 1):
        return value.to(device).reshape(-1)
    return torch.full((1,), value.item() if isinstance(value, Tensor) else value, device=device)


def drawn_seeds(generator: Any, count: int, device: torch.device, default: torch.device) -> Tensor:
    """int64 [count] on `device`, from a generator, from one a sample, or (None) from that of the
    device `default`.

    As diffusers takes them: a list of one generator serves all samples. ValueError for a list of
    another length.
    """
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, (list, tuple)):
        source = default if generator is None else generator.device
        return torch.randint(2**63 - 1, (count,), generator=generator, device=source).to(device)
    if len(generator) != count:
        raise ValueError(
            f"generator must be one, or a list of {count}, one a sample; got a list of "
            f"{len(generator)}"
        )
    return torch.cat([drawn_seeds(source, 1, device, default) for source in generator])


def index_of(timestep: Tensor, timesteps: Tensor) -> Tensor:
    """Where each of timestep [B] stands in timesteps [N]: int64 [B], without waiting for the
    device.

    A value that is not there raises ValueError on the CPU; on a GPU its index is -1, of which the
    operators make NaN.
    """
    hit = timesteps.to(timestep.device) == timestep[:, None]
    found = hit.any(1)
    if timestep.device.type == "cpu" and not bool(found.all()):
        raise ValueError(
            f"timestep must be one of the scheduler's timesteps, got {timestep[~found].tolist()}"
        )
    return torch.where(found, hit.to(torch.int8).argmax(1), -1)


class _Affine(torch.autograd.Function):
    """a x + b v by steps without noise, with the bits of the operators' mean; the gradient to v is
    b times its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, table: Tensor, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(table[index, 1])
        ctx.dtype = v.dtype
        return _affine(x, v, table, index, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (b,) = ctx.saved_tensors
        return None, (grad * per_sample(b, grad)).to(ctx.dtype), None, None, None


def _affine(x: Tensor, v: Tensor, table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return sde_step(x, v, table, index, torch.zeros_like(index), store_dtype=dtype).x_next


def affine(
    x: Tensor, v: Tensor, table: Tensor, index: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The mean of steps without noise, `StepTable.mean` or `StepTable.clean`, in one pass;
    differentiable to v."""
    return (_Affine.apply if wants_grad(v) else _affine)(x, v, table, index, dtype)


def wants_grad(value: Tensor) -> bool:
    return torch.is_grad_enabled() and value.requires_grad


def covers(x: Tensor, v: Tensor, x_next: Tensor | None) -> bool:
    """Whether the operators can stand in: latents of one shape on one device, and a gradient to the
    velocity alone."""
    latents = (x, v) if x_next is None else (x, v, x_next)
    return (
        all(
            value.dtype in _FLOATS and value.shape == x.shape and value.device == x.device
            for value in latents
        )
        and x.dim() > 0
        and not wants_grad(x)
    )


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]."""
    return value.view(-1, *[1] * (like.dim() - 1))


def step(
    x: Tensor,
    v: Tensor,
    steps: StepTable,
    index: Tensor,
    x_next: Tensor | None,
    draw: Draw,
    *,
    store_dtype: torch.dtype = torch.float32,
    log_prob: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Take a step, or score a given one, with the gradients to v that eager code would have.

    index: int64 [B]. x_next: the sample to score; None draws one, in store_dtype. Returns x_next,
        and its log-prob
    [B] fp32, None where it is not asked for.
    """
    if x_next is None:
        seed, noise = draw()
        if not wants_grad(v):
            out = sde_step(x, v, steps.table, index, seed, noise=noise, store_dtype=store_dtype)
            return out.x_next, out.log_prob if log_prob else None
        if noise is None:
            assert seed is not None
            noise = philox_normal(seed, index, x.shape[1:])
        mean = affine(x, v, steps.mean, index)
        x_next = (mean + per_sample(steps.std[index], x) * noise).to(store_dtype)
    return x_next, sde_log_prob(x, x_next, v, steps.table, index).log_prob if log_prob else None
