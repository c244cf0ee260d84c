"""Stand-ins for other trainers: the interfaces they document and the arithmetic they publish, in
eager fp32 PyTorch.

They are oracles, written from the formulas. `install` puts them where those projects have them.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def mean_over_elements(value):
    return value.flatten(1).mean(1)


def gaussian(x_next, mean, std, constants=True):
    value = -((x_next.detach() - mean) ** 2) / (2 * std**2)
    return value - torch.log(torch.as_tensor(std)) - LOG_SQRT_2PI if constants else value


def flow_mean(x, v, sigma, dt, g):
    drift = g**2 / (2 * sigma)
    return x + (v + drift * (x + (1 - sigma) * v)) * dt


def cps_mean(x, v, sigma, after, std):
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return (1 - after) * x0 + torch.sqrt(after**2 - std**2) * x1


def flow_g(sigma, sigma_max, level):
    return level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))


# flow_grpo


def sde_step_with_logprob(
    scheduler,
    model_output,
    timestep,
    sample,
    noise_level=0.7,
    prev_sample=None,
    generator=None,
    sde_type="sde",
    return_sqrt_dt=False,
):
    x, v = sample.float(), model_output.float()
    at = [scheduler.index_for_timestep(t) for t in timestep]
    shape = (-1, *[1] * (x.dim() - 1))
    sigma, after = (scheduler.sigmas[[i + k for i in at]].view(shape) for k in (0, 1))
    dt = after - sigma
    if sde_type == "sde":
        g = flow_g(sigma, scheduler.sigmas[1].item(), noise_level)
        mean, std = flow_mean(x, v, sigma, dt, g), g * torch.sqrt(-dt)
    else:
        g = std = after * math.sin(noise_level * math.pi / 2)
        mean = cps_mean(x, v, sigma, after, std)
    if prev_sample is None:
        prev_sample = mean + std * randn_tensor(
            v.shape, generator=generator, device=v.device, dtype=v.dtype
        )
    prev_sample = prev_sample.float()
    score = (
        gaussian(prev_sample, mean, std)
        if sde_type == "sde"
        else -((prev_sample.detach() - mean) ** 2)
    )
    out = (prev_sample, mean_over_elements(score), mean, g)
    return (*out, torch.sqrt(-dt)) if return_sqrt_dt else out


class PerPromptStatTracker:
    def __init__(self, global_std=False):
        self.global_std = global_std
        self.stats = {}
        self.history_prompts = set()

    def update(self, prompts, rewards, type="grpo"):
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.zeros_like(rewards)
        for prompt in np.unique(prompts):
            mine = prompts == prompt
            self.stats[prompt] = np.stack([*self.stats.get(prompt, []), *rewards[mine]])
            self.history_prompts.add(hash(prompt))
            seen = rewards if self.global_std else self.stats[prompt]
            centred = rewards[mine] - self.stats[prompt].mean(0, keepdims=True)
            advantages[mine] = (
                centred / (seen.std(0, keepdims=True) + 1e-4) if type == "grpo" else rewards[mine]
            )
        return advantages

    def clear(self):
        self.stats = {}


# Flow-Factory


@dataclass
class SDESchedulerOutput(BaseOutput):
    next_latents: Any = None
    next_latents_mean: Any = None
    std_dev_t: Any = None
    dt: Any = None
    log_prob: Any = None
    noise_pred: Any = None


class FlowMatchEulerDiscreteSDEScheduler(FlowMatchEulerDiscreteScheduler):
    # What its versions do differently.
    rounds = True
    dance_std = "diffusion"

    def __init__(self, noise_level=0.7, sde_steps=None, dynamics_type="Flow-SDE", **kwargs):
        super().__init__(**kwargs)
        self.noise_level, self.dynamics_type, self.is_eval, self._sde_steps = (
            noise_level,
            dynamics_type,
            False,
            sde_steps,
        )

    @property
    def current_sde_steps(self):
        return (
            torch.arange(len(self.timesteps) - 1)
            if self._sde_steps is None
            else torch.tensor(self._sde_steps)
        )

    def get_noise_level_for_sigma(self, sigma):
        noisy = {self.sigmas[i].item() for i in self.current_sde_steps}
        known = set(self.sigmas.tolist())
        if not set(sigma.tolist()) <= known:
            raise ValueError("sigma is not in the schedule")
        levels = [self.noise_level if s in noisy else 0.0 for s in sigma.tolist()]
        return torch.tensor(levels, device=sigma.device)

    def step(
        self,
        noise_pred,
        timestep,
        latents,
        next_latents=None,
        timestep_next=None,
        generator=None,
        noise_level=None,
        compute_log_prob=True,
        return_dict=True,
        return_kwargs=[  # noqa: B006
            "next_latents",
            "next_latents_mean",
            "std_dev_t",
            "dt",
            "log_prob",
            "noise_pred",
        ],
        dynamics_type=None,
        sigma_max=None,
    ):
        dtype = latents.dtype
        x, v = latents.float(), noise_pred.float()
        if timestep_next is None:
            at = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).view(-1)]
            sigma, after = self.sigmas[at], self.sigmas[[i + 1 for i in at]]
        else:
            sigma, after = torch.as_tensor(timestep / 1000), torch.as_tensor(timestep_next / 1000)
        dynamics = dynamics_type or self.dynamics_type
        if self.is_eval or dynamics == "ODE":
            noise_level = 0.0
        elif noise_level is None:
            noise_level = self.get_noise_level_for_sigma(sigma)

        def wide(value):
            value = torch.as_tensor(value, dtype=x.dtype, device=x.device).view(-1)
            return value.expand(x.shape[0]).view(-1, *[1] * (x.dim() - 1))

        level, sigma, after = wide(noise_level), wide(sigma), wide(after)
        dt = after - sigma
        if dynamics == "ODE":
            std = g = torch.zeros_like(sigma)
            mean = x + v * dt
        elif dynamics == "Flow-SDE":
            g = flow_g(sigma, wide(sigma_max or self.sigmas[1].item()), level)
            mean, std = flow_mean(x, v, sigma, dt, g), g * torch.sqrt(-dt)
        elif dynamics == "Dance-SDE":
            std = level * torch.sqrt(-dt)
            mean = flow_mean(x, v, sigma, dt, level)
            g = level if self.dance_std == "diffusion" else std
        else:
            g = std = after * torch.sin(level * math.pi / 2)
            mean = cps_mean(x, v, sigma, after, std)
        if next_latents is not None:
            x_next = next_latents.float()
        elif dynamics == "ODE":
            x_next = mean
        else:
            x_next = mean + std * randn_tensor(
                v.shape, generator=generator, device=v.device, dtype=v.dtype
            )
            x_next = x_next.to(dtype).float() if self.rounds else x_next
        log_prob = None
        if compute_log_prob and dynamics == "ODE":
            log_prob = torch.zeros(x.shape[0], device=x.device)
        elif compute_log_prob:
            score = (
                -((x_next.detach() - mean) ** 2)
                if dynamics == "CPS"
                else gaussian(x_next, mean, std)
            )
            log_prob = mean_over_elements(score)
        if not return_dict:
            return x_next, mean, v, log_prob, g, dt
        every = {
            "next_latents": x_next,
            "next_latents_mean": mean,
            "noise_pred": v,
            "log_prob": log_prob,
            "std_dev_t": g,
            "dt": dt,
        }
        return SDESchedulerOutput(**{name: every[name] for name in return_kwargs})


# verl-omni


@dataclass
class FlowMatchSDEDiscreteSchedulerOutput(BaseOutput):
    prev_sample: Any
    log_prob: Any
    prev_sample_mean: Any
    std_dev_t: Any


class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        per_token_timesteps=None,
        return_dict=True,
        noise_level=0.7,
        prev_sample=None,
        sde_type="sde",
        return_logprobs=True,
        include_logprob_normalizer=True,
    ):
        if self.step_index is None:
            self._init_step_index(timestep)
        out = self.sample_previous_step(
            sample=sample.float(),
            model_output=model_output,
            generator=generator,
            noise_level=noise_level,
            prev_sample=prev_sample,
            sde_type=sde_type,
            return_logprobs=return_logprobs,
            include_logprob_normalizer=include_logprob_normalizer,
        )
        self._step_index += 1
        return FlowMatchSDEDiscreteSchedulerOutput(*out) if return_dict else out

    def sample_previous_step(
        self,
        sample,
        model_output,
        timestep=None,
        generator=None,
        per_token_timesteps=None,
        noise_level=0.7,
        prev_sample=None,
        sde_type="sde",
        return_logprobs=True,
        return_sqrt_dt=False,
        include_logprob_normalizer=True,
    ):
        x, v = sample, model_output
        assert x.dtype == v.dtype == torch.float32
        if timestep is None:
            sigma, after = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        else:
            at = torch.tensor([self.index_for_timestep(t) for t in timestep])
            sigma, after = (self.sigmas[at + k].view(-1, *[1] * (x.dim() - 1)) for k in (0, 1))
        dt = after - sigma
        if sde_type == "sde":
            g = flow_g(sigma, self.sigmas[1], noise_level)
            mean, std = flow_mean(x, v, sigma, dt, g), g * torch.sqrt(-dt)
        elif sde_type == "dance_sde":
            g = std = noise_level * torch.sqrt(-dt)
            mean = flow_mean(x, v, sigma, dt, noise_level)
        else:
            g = std = after * math.sin(noise_level * math.pi / 2)
            mean = cps_mean(x, v, sigma, after, std)
        if prev_sample is None:
            prev_sample = mean + std * randn_tensor(
                v.shape, generator=generator, device=v.device, dtype=v.dtype
            )
        log_prob = None
        if return_logprobs and sde_type == "cps":
            log_prob = mean_over_elements(-((prev_sample.detach() - mean) ** 2))
        elif return_logprobs:
            log_prob = mean_over_elements(
                gaussian(prev_sample, mean, std, include_logprob_normalizer)
            )
        out = (prev_sample, log_prob, mean, g)
        if not return_sqrt_dt:
            return out
        sqrt_dt = torch.sqrt(-dt)  # one a timestep given, not a sample
        return (
            *out,
            sqrt_dt.expand(x.shape[0]).clone() if timestep is None else sqrt_dt.reshape(-1),
        )


class DiffusionNFTLoss:
    """Of the registered losses the one over latents; its settings are attributes of
    `config.diffusion_loss`."""

    # What another version might do: 2 in place of 1 weighs the negative branch twice.
    negative_share = 1.0

    @classmethod
    def compute_loss(
        cls,
        *,
        forward_prediction,
        old_prediction,
        ref_forward_prediction,
        x0,
        xt,
        t_expanded,
        reward_prob,
        config,
    ):
        settings, v = config.diffusion_loss, forward_prediction
        v_old, v_ref = old_prediction.detach(), ref_forward_prediction.detach()
        r = (reward_prob.flatten(1).mean(1) if reward_prob.dim() > 1 else reward_prob).to(x0)
        every = tuple(range(1, x0.dim()))

        def matching(beta):
            clean = xt - t_expanded * (beta * v + (1 - beta) * v_old)
            with torch.no_grad():
                distance = (clean.double() - x0.double()).abs().mean(every, keepdim=True)
                weight = distance.clamp(min=settings.adaptive_weight_min).to(clean.dtype)
            return ((clean - x0) ** 2 / weight).mean(every)

        positive, negative = matching(settings.mix_beta), matching(-settings.mix_beta)
        both = (
            r * positive / settings.mix_beta
            + cls.negative_share * (1 - r) * negative / settings.mix_beta
        )
        policy = (both * settings.adv_clip_max).mean()
        reference = ((v - v_ref) ** 2).mean(every).mean()
        loss = policy + settings.ref_kl_coef * reference
        seen = {
            "policy_loss": policy,
            "positive_loss": positive.mean(),
            "negative_loss": negative.mean(),
            "ref_kl_loss": reference,
            "old_deviate": ((v - v_old) ** 2).mean(),
            "reward_prob_mean": r.mean(),
            "total_loss": loss,
        }
        return loss, {f"actor/{name}": value.item() for name, value in seen.items()}


# DanceGRPO, and a fork that lost the constants and keeps deterministic steps deterministic


def flux_step_of(constants, always_noisy):
    def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        sigma, after = sigmas[index], sigmas[index + 1]
        dt = after - sigma
        x0 = latents - sigma * model_output
        mean = latents + dt * model_output
        if sde_solver:
            mean = mean + 0.5 * eta**2 * (latents - (1 - sigma) * x0) / sigma**2 * dt
        if not grpo:
            return mean, x0
        std = eta * math.sqrt(-dt)
        if prev_sample is None:
            noisy = sde_solver or always_noisy
            prev_sample = mean + torch.randn_like(mean) * std if noisy else mean
        score = gaussian(prev_sample.float(), mean.float(), torch.tensor(std), constants)
        return prev_sample, x0, mean_over_elements(score)

    return flux_step


MODULES = {
    "flow_grpo.diffusers_patch.sd3_sde_with_logprob": {
        "sde_step_with_logprob": sde_step_with_logprob
    },
    "flow_grpo.stat_tracking": {"PerPromptStatTracker": PerPromptStatTracker},
    "flow_factory.scheduler.flow_match_euler_discrete": {
        "FlowMatchEulerDiscreteSDEScheduler": FlowMatchEulerDiscreteSDEScheduler
    },
    "verl_omni.pipelines.schedulers.flow_match_sde": {
        "FlowMatchSDEDiscreteScheduler": FlowMatchSDEDiscreteScheduler
    },
    "verl_omni.trainer.diffusion.diffusion_algos": {"DiffusionNFTLoss": DiffusionNFTLoss},
    "fastvideo.train_grpo_flux": {"flux_step": flux_step_of(constants=True, always_noisy=True)},
}


def install(monkeypatch) -> dict[str, ModuleType]:
    made = defaultdict(dict)
    for name, contents in MODULES.items():
        module = made[name] = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return made
