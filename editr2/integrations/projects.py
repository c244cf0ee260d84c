"""The seams of other projects: what each replaced function is called with, what it must return, and
how it is checked.

A seam is replaced only where its signature is one of those known and where the replacement gives
the original's
results on a small probe. Projects changed conventions without changing signatures, so the probe
also tells which one is meant. A replacement returns `NotImplemented` for a call that the operators
do not cover, which then runs the original.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from editr2.integrations.losses import probe_verl_omni_nft, verl_omni_nft
from editr2.integrations.steps import (
    Draw,
    StepTable,
    affine,
    covers,
    drawn_seeds,
    index_of,
    on_host,
    per_sample,
    schedule,
    step,
    step_table,
    vector,
)
from editr2_kernels import COMPAT, group_advantage

Function = Callable[..., Any]


@dataclass(frozen=True)
class Seam:
    """One function of a project.

    module: where it is defined. paths: its name there, or Class.name (a class method too); the
    first that exists. signatures: the known ones, without the first argument. build(original,
    noise, convention): what replaces it; its first argument is given by position, the others by
    name. conventions: those to try, in order.
    probe(function, module): calls on fixed inputs, each as (the velocity or None, the result).
    """

    module: str
    paths: tuple[str, ...]
    signatures: tuple[str, ...]
    build: Callable[[Function, str, Any], Function]
    probe: Callable[[Function, ModuleType], Iterator[Any]]
    conventions: tuple[Any, ...] = (None,)


def _drawer(noise: str, like: Tensor, generator: Any) -> Draw:
    """Noise like `like` in fp32, drawn from the caller's generator as the original does; "philox":
    a seed a sample."""

    def philox() -> tuple[Tensor, None]:
        return drawn_seeds(generator, like.shape[0], like.device, like.device), None

    def generated() -> tuple[None, Tensor]:
        from diffusers.utils.torch_utils import randn_tensor

        return None, randn_tensor(
            like.shape, generator=generator, device=like.device, dtype=torch.float32
        )

    return philox if noise == "philox" else generated


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_SDE_TYPES: dict[str, Any] = {"sde": "flow-sde", "cps": "cps", "dance_sde": "dance-sde"}


def _table_of(
    scheduler: Any, level: float, sde_type: str, device: torch.device, log_prob: str = "full"
) -> StepTable:
    steps = schedule(scheduler.sigmas, float(level))
    return step_table(steps, _SDE_TYPES[sde_type], log_prob, on_host(scheduler.sigmas)[1], device)


# flow_grpo: a function that is imported by name, and a class that normalises rewards.


def _has_sde_type(function: Function) -> bool:
    """The flow_grpo of July 2025 has not, and reshapes its coefficients for latents of four
    dimensions only."""
    return "sde_type" in inspect.signature(function).parameters


def _flow_grpo_step(original: Function, noise: str, convention: None) -> Function:
    any_shape = _has_sde_type(original)

    def ours(
        scheduler: Any,
        *,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        noise_level: float,
        prev_sample: Tensor | None,
        generator: Any,
        sde_type: str = "sde",
        return_sqrt_dt: bool = False,
    ) -> Any:
        if (
            not (isinstance(timestep, Tensor) and timestep.dim() == 1)
            or sde_type not in ("sde", "cps")
            or not (any_shape or sample.dim() == 4)
            or not _number(noise_level)
            or not covers(sample, model_output, prev_sample)
        ):
            return NotImplemented
        at = index_of(timestep.to(sample.device), scheduler.timesteps)
        index = at.expand(sample.shape[0])
        taken = _table_of(scheduler, noise_level, sde_type, sample.device)
        x_next, log_prob = step(
            sample, model_output, taken, index, prev_sample, _drawer(noise, model_output, generator)
        )
        mean = affine(sample, model_output, taken.mean, index)
        out = (x_next.float(), log_prob, mean, per_sample(taken.g[at], sample))
        return (*out, per_sample((-taken.dt[at]).sqrt(), sample)) if return_sqrt_dt else out

    return ours


def _advantages(original: Function, noise: str, convention: None) -> Function:
    import numpy as np

    credit = COMPAT["flow_grpo"].credit

    def ours(tracker: Any, *, prompts: Any, rewards: Any, type: str, **more: Any) -> Any:
        values = np.array(rewards, dtype=np.float64)
        names, group, counts = np.unique(np.array(prompts), return_inverse=True, return_counts=True)
        if (
            type != "grpo"
            or values.ndim not in (1, 2)
            or not 0 < values.size <= 2**20
            or group.shape != values.shape[:1]
            or any(name in tracker.stats for name in names)  # statistics of an earlier call join in
        ):
            return NotImplemented
        parts = np.split(values[np.argsort(group, kind="stable")], np.cumsum(counts)[:-1])
        # fp32 holds what scores differ by, not what they have in common: that goes in float64, of
        # each group, or of
        # all where they are compared with one another.
        pivots = np.stack(
            [values.min(0)] * len(parts) if tracker.global_std else [part.min(0) for part in parts]
        )
        with np.errstate(over="ignore", invalid="ignore"):
            single = (values - pivots[group]).astype(np.float32)
        if not np.isfinite(
            single
        ).all():  # a score that is not finite, or a range that fp32 does not hold
            return NotImplemented
        for name, part in zip(names, parts):
            tracker.stats[name] = part
            tracker.history_prompts.add(hash(name))
        scores, members = torch.from_numpy(single).view(len(values), -1, 1), torch.from_numpy(group)
        if tracker.global_std:  # of every column by itself
            options = dataclasses.replace(credit, std="global")
            columns = [
                group_advantage(column, members, options).advantage
                for column in scores.split(1, dim=1)
            ]
            advantage = torch.cat(columns, dim=1)
        else:
            advantage = group_advantage(scores, members, credit).advantage
        return advantage.view(values.shape).double().numpy()

    return ours


# Flow-Factory: a scheduler with its own window of noisy steps.

_FLOW_FACTORY: dict[str, Any] = {
    "Flow-SDE": "flow-sde",
    "Dance-SDE": "dance-sde",
    "CPS": "cps",
    "ODE": "ode",
}


@dataclass(frozen=True)
class _Factory:
    """What versions of Flow-Factory do differently: whether a drawn sample is rounded to the dtype
    of the latents before it is scored, and what `std_dev_t` is for Dance-SDE, g ("diffusion") or S
    ("std")."""

    rounds: bool
    dance_std: str


def _on_host(value: Any, count: int) -> list[float]:
    values = value.reshape(-1).tolist() if isinstance(value, Tensor) else [float(value)]
    return values * count if len(values) == 1 else values


def _flow_factory_table(
    scheduler: Any,
    timestep: Any,
    timestep_next: Any,
    level: Any,
    dynamics: Any,
    sigma_max: float | None,
    latents: Tensor,
) -> tuple[StepTable, Tensor]:
    """The steps and the index of each sample. A schedule's own steps are looked up on the device;
    steps given by both ends, and noise levels given as a tensor, are read."""
    batch, device = latents.shape[0], latents.device
    if scheduler.is_eval or dynamics == "ode":
        level = 0.0
    sigmas = on_host(scheduler.sigmas)
    largest = float(sigma_max or sigmas[1])
    if timestep_next is None and (level is None or _number(level)):
        if level is None:
            noisy = set(scheduler.current_sde_steps.tolist())
            levels = [
                float(scheduler.noise_level) if i in noisy else 0.0 for i in range(len(sigmas) - 1)
            ]
        else:
            levels = [float(level)] * (len(sigmas) - 1)
        index = index_of(vector(timestep, device), scheduler.timesteps).expand(batch)
        return step_table(
            tuple(zip(sigmas, sigmas[1:], levels)), dynamics, "full", largest, device
        ), index
    if timestep_next is None:
        times = on_host(scheduler.timesteps)
        places = [times.index(t) for t in _on_host(timestep, 1)]
        sigma: Any = scheduler.sigmas[places]
        sigma_next: Any = scheduler.sigmas[[place + 1 for place in places]]
    else:
        sigma, sigma_next = timestep / 1000, timestep_next / 1000
    if level is None:
        level = scheduler.get_noise_level_for_sigma(sigma)
    steps = zip(_on_host(sigma, batch), _on_host(sigma_next, batch), _on_host(level, batch))
    taken = step_table(tuple(steps), dynamics, "full", largest, device)
    return taken, torch.arange(batch, device=device)


def _flow_factory_step(original: Function, noise: str, convention: _Factory) -> Function:
    module = original.__globals__
    output = module.get("SDESchedulerOutput") or module["FlowMatchEulerDiscreteSDESchedulerOutput"]

    def ours(
        scheduler: Any,
        *,
        noise_pred: Tensor,
        timestep: Any,
        latents: Tensor,
        next_latents: Tensor | None,
        timestep_next: Any,
        generator: Any,
        noise_level: Any,
        compute_log_prob: bool,
        return_dict: bool,
        return_kwargs: list[str],
        dynamics_type: str | None,
        sigma_max: float | None,
    ) -> Any:
        name = dynamics_type or scheduler.dynamics_type
        plain = isinstance(timestep, float) or (
            isinstance(timestep, Tensor) and timestep.dim() < 2 and timestep.is_floating_point()
        )
        if not plain or name not in _FLOW_FACTORY or not covers(latents, noise_pred, next_latents):
            return NotImplemented
        dynamics = _FLOW_FACTORY[name]
        taken, index = _flow_factory_table(
            scheduler, timestep, timestep_next, noise_level, dynamics, sigma_max, latents
        )
        if dynamics == "ode" and next_latents is None:
            next_latents = affine(latents, noise_pred, taken.mean, index)
        scored = compute_log_prob and dynamics != "ode"
        x_next, log_prob = step(
            latents,
            noise_pred,
            taken,
            index,
            next_latents,
            _drawer(noise, noise_pred, generator),
            store_dtype=latents.dtype if convention.rounds else torch.float32,
            log_prob=scored,
        )
        if compute_log_prob and not scored:  # a 0 that has nothing to do with the velocity
            log_prob = torch.zeros(latents.shape[0], device=latents.device)
        wanted = set(return_kwargs) if return_dict else {"next_latents_mean", "noise_pred"}
        std = taken.std if dynamics == "dance-sde" and convention.dance_std == "std" else taken.g
        values = {
            "next_latents": x_next.float(),
            "next_latents_mean": affine(latents, noise_pred, taken.mean, index)
            if "next_latents_mean" in wanted
            else None,
            "noise_pred": noise_pred.float() if "noise_pred" in wanted else None,
            "log_prob": log_prob,
            "std_dev_t": per_sample(std[index], latents),
            "dt": per_sample(taken.dt[index], latents),
        }
        if not return_dict:
            return tuple(values.values())
        return output(**{key: value for key, value in values.items() if key in wanted})

    return ours


# verl-omni: a diffusers scheduler whose `step` keeps the books and calls this.


def _verl_omni_step(original: Function, noise: str, convention: None) -> Function:
    def ours(
        scheduler: Any,
        *,
        sample: Tensor,
        model_output: Tensor,
        timestep: Tensor | None,
        generator: Any,
        per_token_timesteps: Tensor | None,
        noise_level: float,
        prev_sample: Tensor | None,
        sde_type: str,
        return_logprobs: bool,
        return_sqrt_dt: bool = False,
        include_logprob_normalizer: bool = True,
    ) -> Any:
        latents = [sample, model_output, *([] if prev_sample is None else [prev_sample])]
        if (
            any(value.dtype != torch.float32 for value in latents)
            or per_token_timesteps is not None
            or not (timestep is None or (isinstance(timestep, Tensor) and timestep.dim() == 1))
            or sde_type not in _SDE_TYPES
            or not _number(noise_level)
            or not covers(sample, model_output, prev_sample)
        ):
            return NotImplemented
        batch, device = sample.shape[0], sample.device
        if timestep is None:
            index = at = torch.full(
                (batch,), scheduler.step_index, dtype=torch.int64, device=device
            )
            shape: tuple[int, ...] = ()
        else:
            at = index_of(timestep.to(device), scheduler.timesteps)
            index, shape = at.expand(batch), (len(at), *[1] * (sample.dim() - 1))
        normalised = "full" if include_logprob_normalizer else "scaled"
        taken = _table_of(scheduler, noise_level, sde_type, device, normalised)
        draw = _drawer(noise, model_output, generator)
        x_next, log_prob = step(
            sample, model_output, taken, index, prev_sample, draw, log_prob=return_logprobs
        )
        std = (taken.std if sde_type == "dance_sde" else taken.g)[index]
        mean = affine(sample, model_output, taken.mean, index)
        count = len(at) if shape else 1
        out = (x_next, log_prob, mean, std[:count].view(shape))
        return (
            (*out, (-taken.dt[at]).sqrt()) if return_sqrt_dt else out
        )  # one a timestep given, of none one a sample

    return ours


# DanceGRPO and what grew from it: one function of the train script.


@dataclass(frozen=True)
class _Dance:
    """What the forks do differently: log_prob "full", or "scaled" where the constants were lost;
    and whether a step without the solver's correction is drawn with noise all the same."""

    log_prob: str
    always_noisy: bool


def _dance_grpo_step(original: Function, noise: str, convention: _Dance) -> Function:
    def ours(
        model_output: Tensor,
        *,
        latents: Tensor,
        eta: float,
        sigmas: Tensor,
        index: Any,
        prev_sample: Tensor | None,
        grpo: bool,
        sde_solver: bool,
    ) -> Any:
        if (
            not (isinstance(sigmas, Tensor) and _number(eta) and eta > 0)
            or not (isinstance(index, int) or (isinstance(index, Tensor) and index.numel() == 1))
            or not covers(latents, model_output, prev_sample)
        ):
            return NotImplemented
        dtype = torch.promote_types(latents.dtype, model_output.dtype)
        device = latents.device
        taken = step_table(
            schedule(sigmas, float(eta)),
            "dance-sde" if sde_solver else "noisy-ode",
            convention.log_prob,
            0.0,
            device,
        )
        at = vector(index, device).expand(latents.shape[0])
        clean = affine(latents, model_output, taken.clean, at, dtype)
        if not grpo:
            return affine(latents, model_output, taken.mean, at, dtype), clean
        if prev_sample is None and not (sde_solver or convention.always_noisy):
            prev_sample = affine(latents, model_output, taken.mean, at, dtype)

        def draw() -> tuple[Tensor | None, Tensor | None]:
            if noise == "philox":
                return _drawer(noise, latents, None)()
            return None, torch.randn_like(latents, dtype=dtype)

        x_next, log_prob = step(
            latents, model_output, taken, at, prev_sample, draw, store_dtype=dtype
        )
        return x_next, clean, log_prob

    return ours


# The probes: a few samples, every convention, with gradients to the velocity.

_SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)
_SHAPE = (2, 3, 8)


def _latents(shape: tuple[int, ...] = _SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """x, v, x_next; the same at every call."""
    x, v, change = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    return x, v.requires_grad_(), x + 0.1 * change


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _probe_flow_grpo_step(function: Function, module: ModuleType) -> Iterator[Any]:
    timesteps = torch.tensor(_SIGMAS[:-1]) * 1000

    def index_for_timestep(t: Any) -> int:
        return int((timesteps == t).nonzero()[0])

    scheduler = SimpleNamespace(
        sigmas=torch.tensor(_SIGMAS), timesteps=timesteps, index_for_timestep=index_for_timestep
    )
    newer = _has_sde_type(function)
    more: tuple[dict[str, Any], ...] = (
        ({"return_sqrt_dt": True}, {"sde_type": "cps"}) if newer else ({},)
    )
    for at in ([0, 2], [1, 3], [1]):  # a timestep a sample, and one for all
        for given, options in itertools.product((False, True), more):
            x, v, x_next = _latents(_SHAPE if newer else (2, 3, 4, 2))
            draw = {"prev_sample": x_next} if given else {"generator": _generator()}
            yield v, function(scheduler, v, timesteps[at], x, noise_level=0.6, **options, **draw)


def _probe_advantages(function: Function, module: ModuleType) -> Iterator[Any]:
    rewards = torch.randn(12, 2, generator=_generator())
    for global_std in (False, True):
        for values in (rewards, rewards[:, 0]):
            tracker = module.PerPromptStatTracker(global_std)
            yield (
                None,
                torch.from_numpy(
                    function(tracker, list("abcabacbbcab"), values.numpy(), type="grpo")
                ),
            )
            yield None, [torch.as_tensor(part) for _, part in sorted(tracker.stats.items())]


def _probe_flow_factory(function: Function, module: ModuleType) -> Iterator[Any]:
    levels = (0.6, torch.tensor([0.6, 0.3]), None)
    for dynamics, level in itertools.product(("Flow-SDE", "Dance-SDE", "CPS"), levels):
        for given, dtype in (
            (True, torch.float32),
            (False, torch.float32),
            (False, torch.bfloat16),
        ):
            scheduler = module.FlowMatchEulerDiscreteSDEScheduler(
                noise_level=0.5, dynamics_type=dynamics
            )
            scheduler.set_timesteps(4)
            x, v, x_next = _latents()
            x, at = x.to(dtype), scheduler.timesteps[[0, 2]]
            draw = {"next_latents": x_next} if given else {"generator": _generator()}
            yield v, function(scheduler, v, at, x, noise_level=level, return_dict=False, **draw)
            yield v, function(scheduler, v, at[1:], x, noise_level=level, return_dict=False, **draw)
            if level is not None:
                yield (
                    v,
                    function(
                        scheduler, v, at, x, timestep_next=at - 50.0, noise_level=level, **draw
                    ),
                )
    scheduler = module.FlowMatchEulerDiscreteSDEScheduler(noise_level=0.5, dynamics_type="ODE")
    scheduler.set_timesteps(4)
    for given in (True, False):
        x, v, x_next = _latents()
        yield (
            v,
            function(
                scheduler,
                v,
                scheduler.timesteps[[0, 2]],
                x,
                x_next if given else None,
                return_dict=False,
            ),
        )


def _probe_verl_omni(function: Function, module: ModuleType) -> Iterator[Any]:
    scheduler = module.FlowMatchSDEDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler._init_step_index(scheduler.timesteps[1])  # where a call without a timestep stands
    for kind, given, at in itertools.product(_SDE_TYPES, (False, True), ([0, 2], [1], None)):
        x, v, x_next = _latents()
        draw = {"prev_sample": x_next} if given else {"generator": _generator()}
        yield (
            v,
            function(
                scheduler,
                sample=x,
                model_output=v,
                timestep=None if at is None else scheduler.timesteps[at],
                noise_level=0.6,
                sde_type=kind,
                return_sqrt_dt=True,
                **draw,
            ),
        )


def _probe_dance_grpo(function: Function, module: ModuleType) -> Iterator[Any]:
    for stochastic, given, index in itertools.product((True, False), (False, True), (0, 3)):
        x, v, x_next = _latents()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            sample = x_next if given else None
            yield v, function(v, x, 0.4, torch.tensor(_SIGMAS), index, sample, True, stochastic)
            yield v, function(v, x, 0.4, torch.tensor(_SIGMAS), index, sample, False, stochastic)


_FLOW_GRPO = "model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None"
_VERL_OMNI = (
    "sample, model_output, timestep=None, generator=None, per_token_timesteps=None, "
    "noise_level=0.7, prev_sample=None, sde_type='sde', return_logprobs=True, return_sqrt_dt=False"
)

PROJECTS: dict[str, tuple[Seam, ...]] = {
    "flow_grpo": (
        Seam(
            "flow_grpo.diffusers_patch.sd3_sde_with_logprob",
            ("sde_step_with_logprob",),
            (f"{_FLOW_GRPO}, sde_type='sde', return_sqrt_dt=False", _FLOW_GRPO),
            _flow_grpo_step,
            _probe_flow_grpo_step,
        ),
        Seam(
            "flow_grpo.stat_tracking",
            ("PerPromptStatTracker.update",),
            ("prompts, rewards, type='grpo'", "prompts, rewards, dists=None, type='grpo'"),
            _advantages,
            _probe_advantages,
        ),
    ),
    "flow_factory": (
        Seam(
            "flow_factory.scheduler.flow_match_euler_discrete",
            ("FlowMatchEulerDiscreteSDEScheduler.step",),
            (
                "noise_pred, timestep, latents, next_latents=None, timestep_next=None, "
                "generator=None, noise_level=None, compute_log_prob=True, return_dict=True, "
                "return_kwargs=['next_latents', 'next_latents_mean', 'std_dev_t', 'dt', "
                "'log_prob', 'noise_pred'], dynamics_type=None, sigma_max=None",
            ),
            _flow_factory_step,
            _probe_flow_factory,
            tuple(
                _Factory(rounds, std) for rounds in (True, False) for std in ("diffusion", "std")
            ),
        ),
    ),
    "verl_omni": (
        Seam(
            "verl_omni.pipelines.schedulers.flow_match_sde",
            ("FlowMatchSDEDiscreteScheduler.sample_previous_step",),
            (f"{_VERL_OMNI}, include_logprob_normalizer=True",),
            _verl_omni_step,
            _probe_verl_omni,
        ),
        Seam(
            "verl_omni.trainer.diffusion.diffusion_algos",
            ("DiffusionNFTLoss.compute_loss",),
            (
                "*, forward_prediction, old_prediction, ref_forward_prediction, x0, xt, "
                "t_expanded, reward_prob, config",
            ),
            verl_omni_nft,
            probe_verl_omni_nft,
        ),
    ),
    "dance_grpo": (
        Seam(
            "fastvideo.train_grpo_flux",
            ("flux_step", "dance_grpo_step"),
            ("latents, eta, sigmas, index, prev_sample, grpo, sde_solver",),
            _dance_grpo_step,
            _probe_dance_grpo,
            tuple(
                _Dance(log_prob, noisy)
                for log_prob in ("full", "scaled")
                for noisy in (True, False)
            ),
        ),
    ),
}
