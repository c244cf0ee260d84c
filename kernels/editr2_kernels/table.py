"""Every published sampler step as one row of numbers: the transition table.

    mu = A x + B v (+ C m_prev),    x' = mu + S eps,    log p(x'|x) = w mean((x' - mu)^2) + c

A, B, C and S are the sampler's (`dynamics`), sigma and sigma_next the schedule's. log p (a mean
over elements) is "full": w = -1/(2 S^2), c = -ln S - ln(2 pi)/2; "scaled": the same without c; or
"unscaled": w = -1, c = 0. A row with S = 0 is an ODE row: w = c = 0, so its log p is exactly 0,
meaning "none".

Columns: A, B, C, S, w, c, sigma, sigma_next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .dynamics import DYNAMICS, LOG_PROBS, SOLVERS, Coefficients, LogProb, ScheduleStep

COLUMNS = ("A", "B", "C", "S", "w", "c", "sigma", "sigma_next")


def flow_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The N+1 falling values 1 .. 0 of an N-step flow schedule, shifted by t' = s t / (1 + (s - 1)
    t)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    times = [1.0 - i / steps for i in range(steps)] + [0.0]
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in times]


def _score(log_prob: LogProb, s: float) -> tuple[float, float]:
    """w, c of a row."""
    if s == 0.0:
        return 0.0, 0.0
    if log_prob == "unscaled":
        return -1.0, 0.0
    c = -math.log(s) - 0.5 * math.log(2.0 * math.pi) if log_prob == "full" else 0.0
    return -0.5 / (s * s), c


def _one_of(name: str, value: str, accepted: Iterable[str]) -> None:
    accepted = tuple(accepted)
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def _noise_level(name: str, level: float | None) -> float:
    entry = DYNAMICS[name]
    if level is None:
        if entry.default_level is None:
            raise ValueError(f"noise_level is required for dynamics {name!r}")
        return entry.default_level
    if not (level >= 0 and math.isfinite(level)):
        raise ValueError(f"noise_level must be finite and >= 0, got {level}")
    if not entry.has_level and level not in (0, 1):
        raise ValueError(
            f"noise_level must be None, 1, or 0 for ODE rows, for dynamics {name!r}, got {level}"
        )
    if level > entry.max_level:
        raise ValueError(
            f"noise_level must lie in [0, {entry.max_level:g}] for dynamics {name!r}, got {level}"
        )
    return level


_NO_NOISE = Coefficients(0.0, 0.0, 0.0, 0.0)


def _stochastic(name: str, step: ScheduleStep, level: float) -> Coefficients:
    """What the entry says, held to its own declarations: callers go by those, not by the rows."""
    entry = DYNAMICS[name]
    if entry.coefficients is None or level == 0:
        return _NO_NOISE
    row = entry.coefficients(step, level)
    if not row.S >= 0:
        raise ValueError(f"dynamics {name!r} gives S = {row.S} at step {step.index}, not >= 0")
    if row.C != 0 and entry.order < 2:
        raise ValueError(
            f"dynamics {name!r} gives C = {row.C} at step {step.index}: a row that reads m_prev is "
            f"of order 2, its entry says {entry.order}"
        )
    return row


def transition_table(
    sigmas: Sequence[float] | Tensor,
    *,
    dynamics: str = "flow-sde",
    noise_level: float | None = None,
    window: tuple[int, int] | None = None,
    solver: str = "euler",
    log_prob: LogProb | None = None,
    sigma_max: float | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the table of a schedule, in float64 on the host, stored as float32 [N, 8] on `device`.

    Args:
        sigmas: N+1 strictly falling values within [1, 0]; row i is the step from sigmas[i] to
            sigmas[i+1].
        dynamics: of the stochastic steps, one of `DYNAMICS`, whose entries have the formulas.
        noise_level: the a (or eta) of the dynamics, >= 0; 0 gives ODE rows. Required, but for "ode"
            and those published without one ("wan-sde", where it multiplies g; "dpm++sde", which has
            none): 1.
        window: half-open range (start, stop) of the steps that are stochastic; the others become
            ODE rows. None: all.
        solver: of the deterministic steps: "euler", or "dpm++2m", whose rows need `m_prev`.
        log_prob: "full", "scaled", "unscaled"; None: as published for the dynamics.
        sigma_max: stands in for sigma where "flow-sde" divides by 0 (sigma == 1), and is the
            largest sigma of "wan-sde". None: the second entry of sigmas.
        device: where the table goes. Default: the CPU.

    Raises ValueError naming the argument.
    """
    values = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(values) < 2:
        raise ValueError(
            f"sigmas must hold at least 2 values (N steps need N+1), got {len(values)}"
        )
    if not all(0.0 <= s <= 1.0 for s in values):
        raise ValueError(f"sigmas must lie in [0, 1], got {values}")
    if not all(after < before for before, after in pairwise(values)):
        raise ValueError(f"sigmas must fall strictly, got {values}")
    _one_of("dynamics", dynamics, DYNAMICS)
    _one_of("solver", solver, SOLVERS)
    if log_prob is None:
        log_prob = DYNAMICS[dynamics].log_prob
    _one_of("log_prob", log_prob, LOG_PROBS)
    level = _noise_level(dynamics, noise_level)
    if sigma_max is None:
        sigma_max = values[1]
    if not 0.0 <= sigma_max < 1.0:
        raise ValueError(f"sigma_max must lie in [0, 1), got {sigma_max}")
    steps = len(values) - 1
    start, stop = _checks.pair("window", (0, steps) if window is None else window)
    if not 0 <= start <= stop <= steps:
        raise ValueError(
            f"window must satisfy 0 <= start <= stop <= {steps} (the steps), got {window}"
        )

    rows = []
    for i in range(steps):
        step = ScheduleStep(values, i, sigma_max)
        row = _stochastic(dynamics, step, level) if start <= i < stop else _NO_NOISE
        if row.S == 0.0:
            row = SOLVERS[solver](step)
        elif row.S < 1e-18 and log_prob != "unscaled":
            # w = -1/(2 S^2) would leave the range of fp32.
            raise ValueError(
                f"noise_level {level} gives S = {row.S} at step {i}: too small for a log-prob; "
                "use 0"
            )
        rows.append((*row, *_score(log_prob, row.S), step.sigma, step.sigma_next))
    return torch.tensor(rows, dtype=torch.float64).to(device=device, dtype=torch.float32)


class Rows(NamedTuple):
    """One row per sample, each scalar as [B, 1]."""

    A: Tensor
    B: Tensor
    C: Tensor
    S: Tensor
    w: Tensor
    c: Tensor
    sigma: Tensor
    sigma_next: Tensor


def rows_ref(table: Tensor, step_index: Tensor, dtype: torch.dtype) -> Rows:
    """The rows of the samples; NaN throughout where the index is out of range, so that it cannot
    pass unseen."""
    count = table.shape[0]
    row = table[step_index.clamp(0, count - 1)].to(dtype)
    inside = (step_index >= 0) & (step_index < count)
    return Rows(*torch.where(inside[:, None], row, torch.nan).split(1, dim=1))


def mean_of_rows_ref(row: Rows, x: Tensor, u: Tensor, m_prev: Tensor | None) -> Tensor:
    """mu = A x + B u + C m_prev, [B, N] in the dtype of u; NaN where a row needs the m_prev that is
    not there.

    Rows with C = 0 do not look at m_prev.
    """
    mu = row.A * x.to(u.dtype) + row.B * u
    return torch.where(
        row.C == 0, mu, torch.nan if m_prev is None else mu + row.C * m_prev.to(u.dtype)
    )
