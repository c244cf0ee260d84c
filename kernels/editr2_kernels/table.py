"""Every published sampler step as one row of numbers: the transition table.

    mu = A x + B v (+ C m_prev),    x' = mu + S eps,    log p(x'|x) = w mean((x' - mu)^2) + c

With sigma falling from 1 (noise) to 0 (data), v = noise - data, D = sigma' - sigma < 0, m = x -
sigma v the clean image (m_prev that of the step before), and noise level a:

    flow-SDE   g = a sqrt(sigma / (1 - s)), s = sigma except s = sigma_max where sigma == 1
               A = 1 + g^2 D / (2 sigma),  B = (1 + g^2 (1 - sigma) / (2 sigma)) D,  S = g sqrt(-D)
    Dance-SDE  the same with g = a; the last step is deterministic
    Wan-SDE    the same with g = a (sigma_N + (sigma_max - sigma_N) sigma), sigma_N the last of the schedule
    CPS        S = sigma' sin(a pi / 2)
    DDIM-SDE   S = a sigma' sqrt(1 - (sigma' (1 - sigma) / (sigma (1 - sigma')))^2)
               both: r = sqrt(sigma'^2 - S^2),  A = 1 - sigma' + r,  B = -sigma (1 - sigma') + (1 - sigma) r
    ODE        A = 1,  B = D,  S = 0

and the multistep solvers, with lambda = ln((1 - sigma) / sigma), e = exp(lambda - lambda'), q the
half inverse ratio of steps (lambda' - lambda) / (2 (lambda - lambda_prev)), 0 at the first and at
the last step of the schedule:

    DPM++2M    k = 1 - sigma'/sigma,             A = sigma'/sigma + k (1 + q),  S = 0             solver "dpm++2m"
    DPM++ SDE  k = (1 - sigma') (1 - e^2),       A = e sigma'/sigma + k (1 + q),  S = sigma' sqrt(1 - e^2)
               both: B = -sigma k (1 + q),  C = -k q

log p (a mean over elements) is "full": w = -1/(2 S^2), c = -ln S - ln(2 pi)/2; "scaled": the same
without c; or "unscaled": w = -1, c = 0. As published: unscaled for CPS, full for the others. A row
with S = 0 is an ODE row:
w = c = 0, so its log p is exactly 0, meaning "none".

Columns: A, B, C, S, w, c, sigma, sigma_next.

Sources: Flow-GRPO (arXiv 2505.05470) and its release for Wan; DanceGRPO (2505.07818);
Coefficients-Preserving Sampling (2509.05952); DDIM (2010.02502); DPM-Solver++ (2211.01095), as
MixGRPO (2507.21802) uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .compat import compat_preset

Dynamics = Literal["flow-sde", "dance-sde", "wan-sde", "cps", "ddim-sde", "dpm++sde", "ode"]
DYNAMICS = ("flow-sde", "dance-sde", "wan-sde", "cps", "ddim-sde", "dpm++sde", "ode")
Solver = Literal["euler", "dpm++2m"]
SOLVERS = ("euler", "dpm++2m")
LogProb = Literal["full", "scaled", "unscaled"]
LOG_PROBS = ("full", "scaled", "unscaled")
COLUMNS = ("A", "B", "C", "S", "w", "c", "sigma", "sigma_next")
_DEFAULT_LEVEL = {
    "ode": 0.0,
    "wan-sde": 1.0,
    "dpm++sde": 1.0,
}  # those published without a noise level


def flow_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The N+1 falling values 1 .. 0 of an N-step flow schedule, shifted by t' = s t / (1 + (s - 1)
    t)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    times = [1.0 - i / steps for i in range(steps)] + [0.0]
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in times]


def _sde(g: float, sigma: float, after: float) -> tuple[float, float, float, float]:
    delta = after - sigma
    drift = g * g / (2.0 * sigma)
    return 1.0 + drift * delta, (1.0 + drift * (1.0 - sigma)) * delta, 0.0, g * math.sqrt(-delta)


def _preserving(s: float, sigma: float, after: float) -> tuple[float, float, float, float]:
    r = math.sqrt(max(after * after - s * s, 0.0))
    return 1.0 - after + r, -sigma * (1.0 - after) + (1.0 - sigma) * r, 0.0, s


def _decay(sigma: float, after: float) -> float:
    """exp(lambda - lambda'), which has its limits where a lambda is infinite: 0 at sigma = 1 and at
    sigma' = 0."""
    return (1.0 - sigma) * after / (sigma * (1.0 - after))


def _multistep(
    k: float, on_x: float, s: float, q: float, sigma: float
) -> tuple[float, float, float, float]:
    on_m = k * (1.0 + q)
    return on_x + on_m, -sigma * on_m, -k * q, s


def _half_inverse_ratio(values: list[float], i: int) -> float:
    """1 / (2 r0) of the step from values[i]; 0 (first order) at the ends and behind a step of
    infinite length."""
    if i == 0 or i == len(values) - 2 or values[i - 1] == 1.0:
        return 0.0
    before, now, after = (math.log((1.0 - sigma) / sigma) for sigma in values[i - 1 : i + 2])
    return (after - now) / (2.0 * (now - before))


def _stochastic(
    dynamics: Dynamics, level: float, sigma_max: float, values: list[float], i: int
) -> tuple[float, float, float, float]:
    """A, B, C, S of a step; S = 0 where the dynamics has no noise there."""
    sigma, after = values[i], values[i + 1]
    if dynamics == "flow-sde":
        return _sde(
            level * math.sqrt(sigma / (1.0 - (sigma_max if sigma == 1.0 else sigma))), sigma, after
        )
    if dynamics == "dance-sde":
        return _sde(level if i < len(values) - 2 else 0.0, sigma, after)
    if dynamics == "wan-sde":
        return _sde(level * (values[-1] + (sigma_max - values[-1]) * sigma), sigma, after)
    if dynamics == "cps":
        return _preserving(after * math.sin(level * math.pi / 2.0), sigma, after)
    e = _decay(sigma, after)
    noise = after * math.sqrt(1.0 - e * e)
    if dynamics == "ddim-sde":
        return _preserving(level * noise, sigma, after)
    k = (1.0 - after) * (1.0 - e * e)
    return _multistep(k, e * after / sigma, noise, _half_inverse_ratio(values, i), sigma)


def _deterministic(
    solver: Solver, values: list[float], i: int
) -> tuple[float, float, float, float]:
    sigma, after = values[i], values[i + 1]
    q = _half_inverse_ratio(values, i) if solver == "dpm++2m" else 0.0
    if q == 0.0:  # the first order of DPM++ is Euler's step
        return 1.0, after - sigma, 0.0, 0.0
    return _multistep(1.0 - after / sigma, after / sigma, 0.0, q, sigma)


def _score(log_prob: LogProb, s: float) -> tuple[float, float]:
    """w, c of a row."""
    if s == 0.0:
        return 0.0, 0.0
    if log_prob == "unscaled":
        return -1.0, 0.0
    return -0.5 / (s * s), -math.log(s) - 0.5 * math.log(
        2.0 * math.pi
    ) if log_prob == "full" else 0.0


def _one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def _noise_level(dynamics: Dynamics, level: float | None) -> float:
    if level is None:
        if dynamics not in _DEFAULT_LEVEL:
            raise ValueError(f"noise_level is required for dynamics {dynamics!r}")
        return _DEFAULT_LEVEL[dynamics]
    if not (level >= 0 and math.isfinite(level)):
        raise ValueError(f"noise_level must be finite and >= 0, got {level}")
    if dynamics in ("cps", "ddim-sde") and level > 1:
        raise ValueError(f"noise_level must lie in [0, 1] for dynamics {dynamics!r}, got {level}")
    if dynamics == "dpm++sde" and level not in (0, 1):
        raise ValueError(
            f"noise_level must be None, 1, or 0 for ODE rows, for dynamics 'dpm++sde', got {level}"
        )
    return level


def transition_table(
    sigmas: Sequence[float] | Tensor,
    *,
    dynamics: Dynamics = "flow-sde",
    noise_level: float | None = None,
    window: tuple[int, int] | None = None,
    solver: Solver = "euler",
    log_prob: LogProb | None = None,
    sigma_max: float | None = None,
    compat: str | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the table of a schedule, in float64 on the host, stored as float32 [N, 8] on `device`.

    Args:
        sigmas: N+1 strictly falling values within [1, 0]; row i is the step from sigmas[i] to
            sigmas[i+1].
        dynamics: of the stochastic steps, one of `DYNAMICS`.
        noise_level: the a (or eta) of the dynamics, >= 0; 0 gives ODE rows. Required, but for "ode"
            and those published without one ("wan-sde", where it multiplies g; "dpm++sde", which has
            none): 1.
        window: half-open range (start, stop) of the steps that are stochastic; the others become
        ODE rows. None: all. solver: of the deterministic steps: "euler", or "dpm++2m", whose rows
        need `m_prev`.
        log_prob: "full", "scaled", "unscaled"; None: as published for the dynamics.
        sigma_max: stands in for sigma where "flow-sde" divides by 0 (sigma == 1), and is the
            largest sigma of "wan-sde". None: the second entry of sigmas.
        compat: a name in `COMPAT`, of a project that has these dynamics: `log_prob` as it has it,
        where not given. device: where the table goes. Default: the CPU.
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
    if compat is not None:
        published = compat_preset(compat).log_prob_of(dynamics)
        log_prob = published if log_prob is None else log_prob
    if log_prob is None:
        log_prob = "unscaled" if dynamics == "cps" else "full"
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
    for i, (sigma, after) in enumerate(pairwise(values)):
        noisy = start <= i < stop and level > 0 and dynamics != "ode"
        a, b, c, s = (
            _stochastic(dynamics, level, sigma_max, values, i) if noisy else (0.0, 0.0, 0.0, 0.0)
        )
        if s == 0.0:
            a, b, c, s = _deterministic(solver, values, i)
        elif s < 1e-18 and log_prob != "unscaled":  # w = -1/(2 S^2) would leave the range of fp32
            raise ValueError(
                f"noise_level {level} gives S = {s} at step {i}: too small for a log-prob; use 0"
            )
        rows.append((a, b, c, s, *_score(log_prob, s), sigma, after))
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


def sum_ref(value: Tensor) -> Tensor:
    """[B, N] -> [B], summed by halving: additions of pairs only, so neither batch nor threads can
    change a bit."""
    n = value.shape[1]
    width = 1 << (n - 1).bit_length()
    total = torch.nn.functional.pad(value, (0, width - n))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def mean_ref(value: Tensor) -> Tensor:
    """[B, N] -> [B], the sum of `sum_ref` over N."""
    return sum_ref(value) / value.shape[1]


def times_ref(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, exactly 0 where the factor is, whatever the value holds."""
    return torch.where(factor == 0, 0.0, factor * value)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where a reference is given fp64 (gradient checks)."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )
