"""Every published sampler step as one row of numbers: the transition table.

    mu = A x + B v,    x' = mu + S eps,    log p(x'|x) = w mean((x' - mu)^2) + c

With sigma falling from 1 (noise) to 0 (data), v = noise - data, D = sigma' - sigma < 0 and noise level a:

    flow-SDE   g = a sqrt(sigma / (1 - s)), s = sigma except s = sigmas[1] where sigma == 1
               A = 1 + g^2 D / (2 sigma),  B = (1 + g^2 (1 - sigma) / (2 sigma)) D,  S = g sqrt(-D)
    Dance-SDE  the same with g = a; the last step is deterministic
    CPS        S = sigma' sin(a pi / 2),  r = sqrt(sigma'^2 - S^2),
               A = 1 - sigma' + r,  B = -sigma (1 - sigma') + (1 - sigma) r
    ODE        A = 1,  B = D,  S = 0

log p: w = -1/(2 S^2), c = -ln S - ln(2 pi)/2 (a mean over elements, as published), except CPS: w = -1, c = 0.
A row with S = 0 is an ODE row: w = c = 0, so its log p is exactly 0, meaning "none".

Columns: A, B, C, S, w, c, sigma, sigma_next. C (the previous prediction's weight in second-order solvers) is 0 in every
row built here.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), Coefficients-Preserving Sampling (2509.05952).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Dynamics = Literal["flow-sde", "dance-sde", "cps", "ode"]
DYNAMICS = ("flow-sde", "dance-sde", "cps", "ode")
COLUMNS = ("A", "B", "C", "S", "w", "c", "sigma", "sigma_next")


def flow_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The N+1 falling values 1 .. 0 of an N-step flow schedule, shifted by t' = s t / (1 + (s - 1) t)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    times = [1.0 - i / steps for i in range(steps)] + [0.0]
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in times]


def _sde(g: float, sigma: float, delta: float) -> tuple[float, float, float]:
    drift = g * g / (2.0 * sigma)
    return 1.0 + drift * delta, (1.0 + drift * (1.0 - sigma)) * delta, g * math.sqrt(-delta)


def transition_table(
    sigmas: Sequence[float] | Tensor,
    *,
    dynamics: Dynamics = "flow-sde",
    noise_level: float | None = None,
    window: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the table of a schedule, in float64 on the host, stored as float32 [N, 8] on `device`.

    Args:
        sigmas: N+1 strictly falling values within [1, 0]; row i is the step from sigmas[i] to sigmas[i+1].
        dynamics: "flow-sde", "dance-sde", "cps" or "ode".
        noise_level: the a (or eta) of the dynamics, >= 0; required unless dynamics is "ode". 0 gives ODE rows.
        window: half-open range (start, stop) of the steps that are stochastic; the others become ODE rows. None: all.
        device: where the table goes. Default: the CPU.
    """
    values = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(values) < 2:
        raise ValueError(f"sigmas must hold at least 2 values (N steps need N+1), got {len(values)}")
    if not all(0.0 <= s <= 1.0 for s in values):
        raise ValueError(f"sigmas must lie in [0, 1], got {values}")
    if not all(after < before for before, after in pairwise(values)):
        raise ValueError(f"sigmas must fall strictly, got {values}")
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics must be one of {', '.join(DYNAMICS)}, got {dynamics!r}")
    if noise_level is None:
        if dynamics != "ode":
            raise ValueError(f"noise_level is required for dynamics {dynamics!r}")
        noise_level = 0.0
    if not (noise_level >= 0 and math.isfinite(noise_level)):
        raise ValueError(f"noise_level must be finite and >= 0, got {noise_level}")
    if dynamics == "cps" and noise_level > 1:
        raise ValueError(f"noise_level must lie in [0, 1] for dynamics 'cps', got {noise_level}")
    steps = len(values) - 1
    start, stop = (0, steps) if window is None else window
    if not 0 <= start <= stop <= steps:
        raise ValueError(f"window must satisfy 0 <= start <= stop <= {steps} (the steps), got {window}")

    rows = []
    for i, (sigma, after) in enumerate(pairwise(values)):
        delta = after - sigma
        a, b, s = 1.0, delta, 0.0
        if start <= i < stop and noise_level > 0:
            if dynamics == "flow-sde":
                bounded = values[1] if sigma == 1.0 else sigma
                a, b, s = _sde(noise_level * math.sqrt(sigma / (1.0 - bounded)), sigma, delta)
            elif dynamics == "dance-sde" and i < steps - 1:
                a, b, s = _sde(noise_level, sigma, delta)
            elif dynamics == "cps" and after > 0.0:
                s = after * math.sin(noise_level * math.pi / 2.0)
                r = math.sqrt(max(after * after - s * s, 0.0))
                a, b = 1.0 - after + r, -sigma * (1.0 - after) + (1.0 - sigma) * r
        if s == 0.0:
            w = c = 0.0
        elif dynamics == "cps":
            w, c = -1.0, 0.0
        else:
            if s < 1e-18:  # w = -1/(2 S^2) would leave the range of fp32
                raise ValueError(
                    f"noise_level {noise_level} gives S = {s} at step {i}: too small for a log-prob; use 0"
                )
            w, c = -0.5 / (s * s), -math.log(s) - 0.5 * math.log(2.0 * math.pi)
        rows.append((a, b, 0.0, s, w, c, sigma, after))
    return torch.tensor(rows, dtype=torch.float64).to(device=device, dtype=torch.float32)


class Rows(NamedTuple):
    """One row per sample, each scalar as [B, 1]."""

    A: Tensor
    B: Tensor
    S: Tensor
    w: Tensor
    c: Tensor


def rows_ref(table: Tensor, step_index: Tensor, dtype: torch.dtype) -> Rows:
    """The rows of the samples; NaN throughout where the index is out of range, so that it cannot pass unseen."""
    count = table.shape[0]
    row = table[step_index.clamp(0, count - 1)].to(dtype)
    inside = (step_index >= 0) & (step_index < count)
    row = torch.where(inside[:, None], row, torch.full_like(row, torch.nan))
    return Rows(row[:, 0:1], row[:, 1:2], row[:, 3:4], row[:, 4:5], row[:, 5:6])


def mean_ref(value: Tensor) -> Tensor:
    """[B, N] -> [B], summed by halving: additions of pairs only, so neither batch nor threads can change a bit."""
    n = value.shape[1]
    width = 1 << (n - 1).bit_length()
    total = torch.nn.functional.pad(value, (0, width - n))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0] / n


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where a reference is given fp64 (gradient checks)."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
