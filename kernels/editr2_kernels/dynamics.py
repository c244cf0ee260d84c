"""The samplers, one entry each: the four numbers of a step of a schedule.

    mu = A x + B v (+ C m_prev),    x' = mu + S eps

sigma falls from 1 (noise) to 0 (data), v = noise - data, D = sigma' - sigma < 0, m = x - sigma v is
the clean image (m_prev that of the step before), and a the noise level. `DYNAMICS` has the
stochastic steps, `SOLVERS` the deterministic ones, which take the place of every step without
noise. `transition_table` makes rows of them, and all that depends on a sampler is read from its
entry, so one that is not here is one entry more, with its formula, and one test:

    def halved(step, level):
        \"""A = 1,  B = D,  S = a sigma' / 2\"""
        return Coefficients(1.0, step.delta, 0.0, 0.5 * level * step.sigma_next)

    DYNAMICS["halved"] = Dynamics(halved, source="where it is published", max_level=1.0)

(in a program that uses the package; within it, in the literal of `DYNAMICS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

LogProb = Literal["full", "scaled", "unscaled"]
LOG_PROBS = ("full", "scaled", "unscaled")


class Coefficients(NamedTuple):
    """Of a step: of x, of v and of m_prev in its mean, and its standard deviation."""

    A: float
    B: float
    C: float
    S: float


@dataclass(frozen=True)
class ScheduleStep:
    """The step from sigmas[index] to sigmas[index + 1].

    sigmas: all of the schedule, strictly falling within [1, 0].
    sigma_max: below 1; stands in for a sigma of 1 where a formula divides by 1 - sigma.
    """

    sigmas: Sequence[float]
    index: int
    sigma_max: float

    @property
    def sigma(self) -> float:
        return self.sigmas[self.index]

    @property
    def sigma_next(self) -> float:
        return self.sigmas[self.index + 1]

    @property
    def delta(self) -> float:
        return self.sigma_next - self.sigma

    @property
    def is_last(self) -> bool:
        return self.index == len(self.sigmas) - 2

    @property
    def decay(self) -> float:
        """exp(lambda - lambda'), lambda = ln((1 - sigma) / sigma), which has its limits where a
        lambda is infinite: 0 at sigma = 1 and at sigma' = 0."""
        return (1.0 - self.sigma) * self.sigma_next / (self.sigma * (1.0 - self.sigma_next))

    @property
    def half_inverse_ratio(self) -> float:
        """q = (lambda' - lambda) / (2 (lambda - lambda_prev)); 0 (first order) at the ends of the
        schedule and behind a step of infinite length."""
        if self.index == 0 or self.is_last or self.sigmas[self.index - 1] == 1.0:
            return 0.0
        before, now, after = (
            math.log((1.0 - sigma) / sigma)
            for sigma in self.sigmas[self.index - 1 : self.index + 2]
        )
        return (after - now) / (2.0 * (now - before))


@dataclass(frozen=True)
class Dynamics:
    """A sampler.

    coefficients: of a step at a noise level above 0; S = 0 where the sampler has no noise there.
        None: it has none anywhere. Its docstring is the formula.
    source: where it is published.
    default_level: what a noise level of None stands for; None: it must be given.
    max_level: the largest noise level. Where it is 1 the level is a share of the noise that the
        schedule has at the step; without bound, a factor of the diffusion.
    has_level: False where the published sampler knows no noise level; then 1 is the sampler and 0
        its ODE.
    log_prob: the form of its log-prob as published, one of `LOG_PROBS`.
    order: 2 where C may be other than 0: such rows read m_prev, the clean image of the step before.
    """

    coefficients: Callable[[ScheduleStep, float], Coefficients] | None
    source: str
    default_level: float | None = None
    max_level: float = math.inf
    has_level: bool = True
    log_prob: LogProb = "full"
    order: Literal[1, 2] = 1

    @property
    def stochastic(self) -> bool:
        return self.coefficients is not None


def _diffused(step: ScheduleStep, g: float) -> Coefficients:
    """The SDE with the diffusion coefficient g, by Euler and Maruyama:

    A = 1 + g^2 D / (2 sigma),  B = (1 + g^2 (1 - sigma) / (2 sigma)) D,  S = g sqrt(-D)
    """
    sigma, delta = step.sigma, step.delta
    drift = g * g / (2.0 * sigma)
    return Coefficients(
        1.0 + drift * delta, (1.0 + drift * (1.0 - sigma)) * delta, 0.0, g * math.sqrt(-delta)
    )


def _preserving(step: ScheduleStep, s: float) -> Coefficients:
    """The step to sigma' whose noise is of the size the schedule has there, s of it new:

    r = sqrt(sigma'^2 - S^2),  A = 1 - sigma' + r,  B = -sigma (1 - sigma') + (1 - sigma) r
    """
    sigma, after = step.sigma, step.sigma_next
    r = math.sqrt(max(after * after - s * s, 0.0))
    return Coefficients(1.0 - after + r, -sigma * (1.0 - after) + (1.0 - sigma) * r, 0.0, s)


def _multistep(step: ScheduleStep, k: float, on_x: float, s: float, q: float) -> Coefficients:
    """on_x x + k m + k q (m - m_prev), in x and v:

    A = on_x + k (1 + q),  B = -sigma k (1 + q),  C = -k q
    """
    on_m = k * (1.0 + q)
    return Coefficients(on_x + on_m, -step.sigma * on_m, -k * q, s)


def _new_noise(step: ScheduleStep) -> float:
    """sigma' sqrt(1 - e^2), e = exp(lambda - lambda') the decay."""
    e = step.decay
    return step.sigma_next * math.sqrt(1.0 - e * e)


def flow_sde(step: ScheduleStep, level: float) -> Coefficients:
    """g = a sqrt(sigma / (1 - s)), s = sigma except s = sigma_max where sigma == 1"""
    sigma = step.sigma
    return _diffused(
        step, level * math.sqrt(sigma / (1.0 - (step.sigma_max if sigma == 1.0 else sigma)))
    )


def dance_sde(step: ScheduleStep, level: float) -> Coefficients:
    """g = a; the last step is deterministic"""
    return _diffused(step, 0.0 if step.is_last else level)


def wan_sde(step: ScheduleStep, level: float) -> Coefficients:
    """g = a (sigma_N + (sigma_max - sigma_N) sigma), sigma_N the last of the schedule"""
    last = step.sigmas[-1]
    return _diffused(step, level * (last + (step.sigma_max - last) * step.sigma))


def cps(step: ScheduleStep, level: float) -> Coefficients:
    """S = sigma' sin(a pi / 2)"""
    return _preserving(step, step.sigma_next * math.sin(level * math.pi / 2.0))


def ddim_sde(step: ScheduleStep, level: float) -> Coefficients:
    """S = a sigma' sqrt(1 - (sigma' (1 - sigma) / (sigma (1 - sigma')))^2)"""
    return _preserving(step, level * _new_noise(step))


def dpm_sde(step: ScheduleStep, level: float) -> Coefficients:
    """k = (1 - sigma') (1 - e^2), e = exp(lambda - lambda'),  S = sigma' sqrt(1 - e^2),

    A = e sigma'/sigma + k (1 + q),  B = -sigma k (1 + q),  C = -k q
    """
    e = step.decay
    k = (1.0 - step.sigma_next) * (1.0 - e * e)
    on_x = e * step.sigma_next / step.sigma
    return _multistep(step, k, on_x, _new_noise(step), step.half_inverse_ratio)


DYNAMICS: dict[str, Dynamics] = {
    "flow-sde": Dynamics(flow_sde, "Flow-GRPO (arXiv 2505.05470)"),
    "dance-sde": Dynamics(dance_sde, "DanceGRPO (arXiv 2505.07818)"),
    "wan-sde": Dynamics(wan_sde, "Flow-GRPO's release for Wan", default_level=1.0),
    "cps": Dynamics(
        cps,
        "Coefficients-Preserving Sampling (arXiv 2509.05952)",
        max_level=1.0,
        log_prob="unscaled",
    ),
    "ddim-sde": Dynamics(ddim_sde, "DDIM (arXiv 2010.02502)", max_level=1.0),
    "dpm++sde": Dynamics(
        dpm_sde,
        "DPM-Solver++ (arXiv 2211.01095), as MixGRPO (arXiv 2507.21802) uses it",
        default_level=1.0,
        max_level=1.0,
        has_level=False,
        order=2,
    ),
    "ode": Dynamics(None, "the flow itself: rows of the solver throughout", default_level=0.0),
}


def euler(step: ScheduleStep) -> Coefficients:
    """A = 1,  B = D"""
    return Coefficients(1.0, step.delta, 0.0, 0.0)


def dpm_2m(step: ScheduleStep) -> Coefficients:
    """DPM-Solver++ (arXiv 2211.01095), second order by the step before; the first is Euler's step:

    k = 1 - sigma'/sigma,  A = sigma'/sigma + k (1 + q),  B = -sigma k (1 + q),  C = -k q
    """
    q = step.half_inverse_ratio
    if q == 0.0:
        return euler(step)
    ratio = step.sigma_next / step.sigma
    return _multistep(step, 1.0 - ratio, ratio, 0.0, q)


SOLVERS: dict[str, Callable[[ScheduleStep], Coefficients]] = {"euler": euler, "dpm++2m": dpm_2m}
