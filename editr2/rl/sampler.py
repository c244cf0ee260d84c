"""Samplers as data: sigma schedules and SDE windows become one transition table.

The table holds the ODE rows of all steps, then the SDE rows of all steps. A sample's row at step k
is `k` outside its window and `k + steps` inside, so samples with different windows share every
launch, and moving a window moves an index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from editr2.config import EvalConfig, RolloutConfig, noise_problem
from editr2.config.settings import rollout_dynamics
from editr2.errors import ConfigError
from editr2.policies.base import Policy, ScheduledPolicy, SizedPolicy, at_size
from editr2.sessions.buckets import Size
from editr2_kernels import COLUMNS, flow_sigmas, transition_table


@dataclass(frozen=True)
class Sampler:
    """steps: denoising steps. sigmas: float32 [steps + 1], falling. table: float32 [2 * steps, 8].
    window: SDE steps a turn (0: pure ODE). A window may start at any step from first_start to
    last_start; `every` moves both on (see `at`). by_rank: starts are as Edit-R2's release has them
    (`Seeds.rank_start`). second_order: some rows read the clean prediction of the step before.
    sizes: the same of images of other sizes, whose sigmas are others."""

    steps: int
    sigmas: Tensor
    table: Tensor
    window: int
    last_start: int
    first_start: int = 0
    every: int | None = None
    by_rank: bool = False
    second_order: bool = False
    sizes: Mapping[Size, Sampler] = field(default_factory=dict)

    def of(self, size: Size) -> Sampler:
        """The sampler of images of this size (height, width)."""
        return self.sizes.get(size, self)

    def at(self, iteration: int) -> Sampler:
        """The sampler of an iteration: a progressive window (MixGRPO) starts at one step, the next
        one after `every` iterations, and at the first again after the last."""
        if self.every is None:
            return self
        start = iteration // self.every % (self.last_start + 1)
        return self.changed(first_start=start, last_start=start, every=None)

    def changed(self, **fields: Any) -> Sampler:
        """With other values of some fields, at every size."""
        sizes = {size: other.changed(**fields) for size, other in self.sizes.items()}
        return dataclasses.replace(self, **fields, sizes=sizes)

    def step_index(self, k: int, starts: Tensor) -> tuple[Tensor, Tensor]:
        """(table rows int64 [B], in-window bool [B]) of step k for window starts int64 [B]."""
        inside = (starts <= k) & (k < starts + self.window)
        return k + self.steps * inside, inside

    def to(self, device: torch.device) -> Sampler:
        sizes = {size: other.to(device) for size, other in self.sizes.items()}
        return dataclasses.replace(
            self, sigmas=self.sigmas.to(device), table=self.table.to(device), sizes=sizes
        )


Schedule = Callable[[int], Sequence[float]]
"""From a number of steps to sigmas, steps + 1 of them falling from 1 to 0."""


@dataclass(frozen=True)
class SizedSchedule:
    """A `Schedule`, and those of images of other sizes, where a policy's own follow from it."""

    main: Schedule
    sizes: Mapping[Size, Schedule]

    def __call__(self, steps: int) -> Sequence[float]:
        return self.main(steps)


def rollout_sampler(
    config: RolloutConfig, own: Schedule | None = None, named: str = "rollout.steps"
) -> Sampler:
    """The sampler of training. own: the policy's schedule, taken where `rollout.shift` is none (see
    `own_schedule`). named: the field that `steps` is from. Raises `ConfigError` naming the
    field."""
    sampler = make_sampler(
        config.steps,
        shift=config.shift,
        own=own,
        dynamics=config.dynamics,
        noise_level=config.noise_level,
        window=config.window,
        window_range=config.window_range,
        named=named,
    )
    if config.window_schedule == "fixed":
        return sampler.changed(last_start=0)
    if config.window_schedule == "progressive":
        return sampler.changed(every=config.window_every)
    return sampler.changed(by_rank=config.window_schedule == "released")


def eval_sampler(
    rollout: RolloutConfig, evaluation: EvalConfig, own: Schedule | None = None
) -> Sampler:
    """The sampler of evaluation, as `eval.sampler` and `eval.steps` say; own as for
    `rollout_sampler`."""
    named = "rollout.steps"
    if evaluation.steps is not None:
        rollout, named = dataclasses.replace(rollout, steps=evaluation.steps), "eval.steps"
    if evaluation.sampler == "rollout":
        return rollout_sampler(rollout, own, named)
    return make_sampler(rollout.steps, shift=rollout.shift, own=own, named=named)


def own_schedule(policy: Policy) -> Schedule | None:
    """The policy's noise schedule, if it has one of its own; of every size that it edits."""
    if not isinstance(policy, ScheduledPolicy):
        return None
    sizes = policy.sizes if isinstance(policy, SizedPolicy) else ()
    others = [size for size in sizes if size != policy.image_size]
    if not others:
        return policy.sigmas
    return SizedSchedule(policy.sigmas, {size: at_size(policy, size).sigmas for size in others})


def make_sampler(
    steps: int,
    *,
    shift: float | None = None,
    own: Schedule | None = None,
    dynamics: str = "flow-sde",
    noise_level: float = 0.0,
    window: int = 0,
    window_range: float = 0.5,
    named: str = "rollout.steps",
) -> Sampler:
    """A sampler of `steps` steps with a window of `window` SDE steps that starts within the first
    `window_range` of them. Sigmas are shifted by `shift`; where it is none they are `own`'s, for
    every size that it knows, or unshifted. named: the field that `steps` is from. Raises
    `ConfigError` naming the field."""
    if steps < 1:
        raise ConfigError(f"{named}: {steps} (accepted: at least 1)")
    if not 0 <= window <= steps:
        raise ConfigError(f"rollout.window: {window} (accepted: 0 to {named} = {steps})")
    if dynamics not in rollout_dynamics():
        raise ConfigError(
            f"rollout.dynamics: {dynamics!r} (accepted: {', '.join(rollout_dynamics())})"
        )
    if window and (problem := noise_problem(dynamics, noise_level)):
        raise ConfigError(problem)
    if not 0 < window_range <= 1:
        raise ConfigError(f"rollout.window_range: {window_range} (accepted: above 0, at most 1)")
    try:
        sigmas = (
            [float(s) for s in own(steps)]
            if shift is None and own
            else flow_sigmas(steps, shift or 1.0)
        )
        ode = transition_table(sigmas, dynamics="ode", noise_level=0.0)
        sde = (
            transition_table(sigmas, dynamics=dynamics, noise_level=noise_level) if window else ode
        )
    except ValueError as error:  # what no bound of a single field can say
        said = f"{named} {steps}, shift {shift}, dynamics {dynamics} and noise_level {noise_level}"
        raise ConfigError(f"rollout: no sampler of {said}: {error}") from error
    last = max(0, min(steps - window, round(steps * window_range) - 1))
    deterministic = [k for k in range(last + window) if window and sde[k, 3] == 0]
    if deterministic:
        raise ConfigError(
            f"rollout.window: steps {deterministic} of dynamics {dynamics!r} at noise level "
            f"{noise_level} have no "
            "noise and so no log-prob; lower rollout.window_range or rollout.window"
        )
    table = torch.cat([ode, sde]).contiguous()
    others = own.sizes if shift is None and isinstance(own, SizedSchedule) else {}
    return Sampler(
        steps,
        torch.as_tensor(sigmas, dtype=torch.float32),
        table,
        window,
        last,
        second_order=bool((table[:, COLUMNS.index("C")] != 0).any()),
        sizes={
            size: make_sampler(
                steps,
                own=schedule,
                dynamics=dynamics,
                noise_level=noise_level,
                window=window,
                window_range=window_range,
                named=named,
            )
            for size, schedule in others.items()
        },
    )
