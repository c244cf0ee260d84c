"""A flow-matching scheduler for stock diffusers pipelines that samples stochastically and knows its
log-probs.

    pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config, noise_level=0.7,
    window=(0, 2)) pipe.scheduler.set_seeds([11, 12])
    with pipe.scheduler.record() as taken:
        images = pipe(...).images
    new = pipe.scheduler.step(v, taken[0].timestep, taken[0].sample,
    prev_sample=taken[0].prev_sample)

The noise of a sample is a function of its seed, the step and the element, whatever the batch; a
sample is rounded to the dtype of the model before it is scored, so that replaying it under the same
velocity gives the same log-prob.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Not used here: a pipeline that was saved with this scheduler finds it again by the base class it
# sees in this module.
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401
from diffusers.utils import BaseOutput
from torch import Tensor

from editr2.integrations.steps import drawn_seeds, index_of, vector
from editr2_kernels import DYNAMICS, sde_log_prob, sde_step, transition_table

# The scheduler keeps no x0 of the step before, which the rows of second-order dynamics read.
ACCEPTED = tuple(name for name, entry in DYNAMICS.items() if entry.order == 1)


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """prev_sample: the next latents, in the dtype of the model's output, or those that were given.
    log_prob: fp32 [B], of the move, a mean over elements; exactly 0 for a deterministic step."""

    prev_sample: Tensor
    log_prob: Tensor


class Taken(NamedTuple):
    """A step that a pipeline took: step_index; its timestep, 0-dim; latents before and after;
    log_prob [B] fp32."""

    step_index: int
    timestep: Tensor
    sample: Tensor
    prev_sample: Tensor
    log_prob: Tensor


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with stochastic steps: same arguments, schedules and files,
    and

    dynamics: "flow-sde", "dance-sde", "wan-sde", "cps", "ddim-sde", or "ode", which is the base
    class's step. noise_level: of the dynamics; 0 makes every step deterministic.
    window: [start, stop), the steps that are stochastic; None: all. `set_window` moves it.
    log_prob: "full", "scaled" (without the constants) or "unscaled"; None: as published for the
        dynamics.

    Raises ValueError naming the argument; `invert_sigmas` and `stochastic_sampling` must be off.
    """

    timesteps: Tensor
    sigmas: Tensor

    def __init__(
        self,
        *,
        dynamics: str = "flow-sde",
        noise_level: float = 0.7,
        window: tuple[int, int] | None = None,
        log_prob: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if dynamics not in ACCEPTED:
            raise ValueError(f"dynamics must be one of {', '.join(ACCEPTED)}, got {dynamics!r}")
        for name in ("invert_sigmas", "stochastic_sampling"):
            if getattr(self.config, name):
                raise ValueError(f"{name} must be False for FlowMatchSDEScheduler, got True")
        self.register_to_config(
            dynamics=dynamics, noise_level=noise_level, window=window, log_prob=log_prob
        )
        self._values: list[float] = []
        self._tables: dict[float, Tensor] = {}
        self._window = window
        self._seeds: Tensor | None = None
        self._drawn: Tensor | None = None
        self._taken: list[Taken] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the base class, without waiting for the device: the schedule is made on the host. A
        new trajectory begins: seeds that nobody set are drawn again."""
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        self._values = self.sigmas.tolist()
        self.timesteps, self.sigmas = (
            value.to(device=device) for value in (self.timesteps, self.sigmas)
        )
        self._tables.clear()
        self._drawn = None
        self._table(
            self.config.noise_level
        )  # a schedule or a window that cannot be is an error here

    def set_window(self, window: tuple[int, int] | None) -> None:
        """The steps [start, stop) that are stochastic from now on; None: all. The noise of a step
        does not change."""
        self._window = window
        self._tables.clear()

    def set_seeds(self, seeds: Sequence[int] | Tensor | None) -> None:
        """One seed a sample, int64 [B], for every trajectory from now on. None: seeds are drawn
        from torch's CPU generator at the first stochastic step of each."""
        self._seeds = None if seeds is None else torch.as_tensor(seeds, dtype=torch.int64)

    @contextmanager
    def record(self) -> Iterator[list[Taken]]:
        """Within, the steps that a pipeline takes are collected in the list; they hold the
        pipeline's own tensors."""
        before, self._taken = self._taken, []
        try:
            yield self._taken
        finally:
            self._taken = before

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
        seed: Tensor | None = None,
        noise_level: float | None = None,
    ) -> FlowMatchSDESchedulerOutput | tuple[Tensor, Tensor]:
        """Take the next step, without gradient; or score a given one, with the gradient to
        `model_output`.

        Args:
            model_output: [B, ...] predicted velocity; fp32, bf16 or fp16.
            timestep: of the schedule. A step that is taken uses it for the first of a trajectory
                only; a replay may have one a sample, [B].
            sample: like model_output in shape; the latents before the step.
            s_churn, s_tmin, s_tmax, s_noise: ignored, as the base class does.
            generator: seeds are drawn from it where none are set; a list has one a sample, whose
                seed is then its own.
            per_token_timesteps: must be None.
            return_dict: whether to return the output class or the tuple (prev_sample, log_prob).
            prev_sample: like model_output in shape; the latents after the step, to score. The
                trajectory does not move.
            seed: int64 [B]; in place of the seeds that are set.
            noise_level: in place of the configuration's.

        Raises:
            ValueError or TypeError naming the argument.
        """
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps must be None for FlowMatchSDEScheduler")
        if not self._values:
            raise ValueError("set_timesteps must be called before step")
        table = self._table(
            self.config.noise_level if noise_level is None else noise_level, sample.device
        )
        if prev_sample is not None:
            index = self._index(timestep, sample)
            log_prob = sde_log_prob(sample, prev_sample, model_output, table, index).log_prob
        else:
            if self.step_index is None:
                self._init_step_index(timestep)
            index = torch.full(
                sample.shape[:1], self._step_index, dtype=torch.int64, device=sample.device
            )
            seeds = self._seeds_of(sample, generator) if seed is None else seed
            out = sde_step(
                sample, model_output, table, index, seeds, store_dtype=model_output.dtype
            )
            prev_sample, log_prob = out.x_next, out.log_prob
            if self._taken is not None:
                at = self._step_index
                self._taken.append(Taken(at, self.timesteps[at], sample, prev_sample, log_prob))
            self._step_index += 1
        if not return_dict:
            return prev_sample, log_prob
        return FlowMatchSDESchedulerOutput(prev_sample=prev_sample, log_prob=log_prob)

    def _index(self, timestep: float | Tensor, sample: Tensor) -> Tensor:
        at = vector(timestep, sample.device)
        if not at.is_floating_point() or at.numel() not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be one of the schedule's timesteps, or {sample.shape[0]}, one a "
                f"sample; got {timestep}"
            )
        return index_of(at, self.timesteps).expand(sample.shape[0])

    def _table(self, level: float, device: torch.device | None = None) -> Tensor:
        table = self._tables.get(level)
        if table is None:
            # A pipeline may run under inference_mode; a replay has to save the table for its
            # backward.
            with torch.inference_mode(False):
                table = transition_table(
                    self._values,
                    dynamics=self.config.dynamics,
                    noise_level=level,
                    window=self._window,
                    log_prob=self.config.log_prob,
                )
        if device is not None and table.device != device:
            table = table.to(device)
        self._tables[level] = table
        return table

    def _seeds_of(
        self, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        seeds = self._drawn if self._seeds is None else self._seeds
        if seeds is None:
            seeds = drawn_seeds(generator, sample.shape[0], sample.device, torch.device("cpu"))
        if len(seeds) != sample.shape[0]:
            raise ValueError(
                f"set_seeds must be given one seed a sample, {sample.shape[0]}; got {len(seeds)}"
            )
        seeds = seeds.to(sample.device)
        if self._seeds is None:
            self._drawn = seeds
        else:
            self._seeds = seeds  # on the device from the second step on
        return seeds


def _signature() -> inspect.Signature:
    """Ours and the base class's arguments by name: what diffusers reads to know which fields a
    configuration has."""
    base = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.values()
    own = inspect.signature(FlowMatchSDEScheduler.__init__).parameters.values()
    first, *ours = (
        parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    )
    theirs = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in list(base)[1:]
    ]
    return inspect.Signature([first, *ours, *theirs])


FlowMatchSDEScheduler.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
