"""Other trainers' step in a loop, before and after `patch`: a rollout step, a training step with a
KL to a reference; and verl-omni's NFT loss.

The originals are the stand-ins of the tests (tests/peers.py), with the arithmetic and the look-ups
of those projects.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench.providers import worst
from bench.sizes import FP32, MIXED, Size
from editr2.integrations import patch, unpatch

LEVEL, STEPS, AT = 0.7, 10, 3
SHAPES = [(8, 1024, 64), (8, 4096, 64)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    v: Tensor
    v_ref: Tensor
    x_next: Tensor
    old: Tensor
    advantage: Tensor


@functools.cache
def peers() -> Any:
    path = Path(__file__).parents[1] / "tests" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    yield peers().install(monkeypatch)


def scheduled(cls: Any, device: str, **options: Any) -> Any:
    scheduler = cls(shift=3.0, **options)
    scheduler.set_timesteps(STEPS, device=device)
    return scheduler


def flow_grpo(modules: dict[str, Any], device: str) -> Call:
    function = modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"].sde_step_with_logprob
    scheduler = scheduled(peers().FlowMatchEulerDiscreteScheduler, device)

    def step(
        v: Tensor, x: Tensor, x_next: Tensor | None, generator: Any = None
    ) -> tuple[Tensor, ...]:
        at = scheduler.timesteps[AT].expand(len(x))
        return function(scheduler, v, at, x, LEVEL, x_next, generator)

    return step


def flow_factory(modules: dict[str, Any], device: str) -> Call:
    cls = modules[
        "flow_factory.scheduler.flow_match_euler_discrete"
    ].FlowMatchEulerDiscreteSDEScheduler
    function, scheduler = cls.step, scheduled(cls, device)

    def step(
        v: Tensor, x: Tensor, x_next: Tensor | None, generator: Any = None
    ) -> tuple[Tensor, ...]:
        at = scheduler.timesteps[AT].expand(len(x))
        out = function(
            scheduler, v, at, x, next_latents=x_next, noise_level=LEVEL, generator=generator
        )
        return out.next_latents, out.log_prob, out.next_latents_mean, out.std_dev_t

    return step


def verl_omni(modules: dict[str, Any], device: str) -> Call:
    cls = modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler
    function, scheduler = cls.sample_previous_step, scheduled(cls, device)

    def step(
        v: Tensor, x: Tensor, x_next: Tensor | None, generator: Any = None
    ) -> tuple[Tensor, ...]:
        at = scheduler.timesteps[AT].expand(len(x))
        return function(
            scheduler,
            sample=x,
            model_output=v,
            timestep=at,
            prev_sample=x_next,
            noise_level=LEVEL,
            generator=generator,
        )

    return step


def dance_grpo(modules: dict[str, Any], device: str) -> Call:
    function = modules["fastvideo.train_grpo_flux"].flux_step
    sigmas = torch.tensor(editr2_kernels.flow_sigmas(STEPS, 3.0), device=device)

    def step(
        v: Tensor, x: Tensor, x_next: Tensor | None, generator: Any = None
    ) -> tuple[Tensor, ...]:
        if generator is not None:
            torch.manual_seed(generator.initial_seed())  # it draws from the global one
        x_next, x0, log_prob = function(v, x, 0.3, sigmas, AT, x_next, True, True)
        return x_next, log_prob, x0, torch.ones((), device=device)

    return step


PROJECTS = {
    "flow_grpo": flow_grpo,
    "flow_factory": flow_factory,
    "verl_omni": verl_omni,
    "dance_grpo": dance_grpo,
}


def rollout(step: Call, i: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return step(i.v, i.x, None)[:2]


def training(step: Call, i: Inputs, kl: bool) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the velocity."""
    v = i.v.detach().requires_grad_()
    _, log_prob, mean, std = step(v, i.x, i.x_next)
    ratio = torch.exp(log_prob - i.old)
    loss = -torch.minimum(ratio * i.advantage, ratio.clamp(1 - 1e-4, 1 + 1e-4) * i.advantage).mean()
    if kl:
        with torch.no_grad():
            mean_ref = step(i.v_ref, i.x, i.x_next)[2]
        loss = (
            loss
            + 0.04 * (((mean - mean_ref) ** 2).mean(dim=(1, 2), keepdim=True) / (2 * std**2)).mean()
        )
    return loss.detach(), torch.autograd.grad(loss, v)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("mode", ["rollout step", "training step, forward + backward"])
@pytest.mark.parametrize("project", PROJECTS)
def test_patched(
    project: str,
    mode: str,
    shape: tuple[int, ...],
    device: str,
    modules: dict[str, Any],
    compare: Callable[..., Any],
) -> None:
    size = Size(device, shape, MIXED if project in ("flow_grpo", "flow_factory") else FP32)
    eager = PROJECTS[project](modules, device)
    steps = {}
    for noise in ("generator", "philox"):
        patch(project, noise=noise)
        steps[noise] = PROJECTS[project](modules, device)
        unpatch(project)
    kl = project != "dance_grpo"  # which has none

    def make() -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        x, v, change = torch.randn(3, *shape, generator=generator, device=device)
        with torch.no_grad():
            x_next, old, *_ = eager(v, x, None, generator)
        v, v_ref = (value.to(size.dtypes.v) for value in (v, v + 0.1 * change))
        return Inputs(x, v, v_ref, x_next, old, torch.linspace(-1, 1, shape[0], device=device))

    def rollout_gate(i: Inputs) -> dict[str, float]:
        def drawn(step: Call) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return step(i.v, i.x, None, torch.Generator(device).manual_seed(1))

        theirs, ours, philox = drawn(eager), drawn(steps["generator"]), drawn(steps["philox"])
        error = worst("x_next", ours[0], theirs[0], 1e-6)
        worst("log_prob", ours[1], theirs[1], 1e-5)
        # Another noise; the score of its sample by the original is its log-prob.
        scored = eager(i.v, i.x, philox[0])[1]
        return {
            "editr2, the caller's generator": error,
            "editr2, philox": worst("log_prob of philox", philox[1], scored, 1e-5),
        }

    def training_gate(i: Inputs) -> dict[str, float]:
        (their_loss, theirs), (loss, ours) = (
            training(eager, i, kl),
            training(steps["generator"], i, kl),
        )
        worst("loss", loss, their_loss, 1e-4)
        # The gradient leaves in the velocity's dtype: one rounding of bf16 may fall to the other
        # side.
        tolerance = 1e-4 if size.dtypes.v == torch.float32 else 2**-7
        return {
            "editr2": worst(
                "gradient", ours / theirs.abs().max(), theirs / theirs.abs().max(), tolerance
            )
        }

    providers: dict[str, Any]
    if mode == "rollout step":
        gate: Callable[[Inputs], dict[str, float]] = rollout_gate
        providers = {
            "eager": lambda i: rollout(eager, i),
            "editr2, the caller's generator": lambda i: rollout(steps["generator"], i),
            "editr2, philox": lambda i: rollout(steps["philox"], i),
        }
    else:
        gate = training_gate
        providers = {
            "eager": lambda i: training(eager, i, kl),
            "editr2": lambda i: training(steps["generator"], i, kl),
        }
    compare(
        op="integrations",
        mode=f"{project}, {mode}",
        shape=shape,
        dtype=size.dtypes.name,
        device=device,
        inputs=make,
        providers=providers,
        gate=gate,
        seconds=4.0,
    )


NFT = SimpleNamespace(mix_beta=0.5, adv_clip_max=5.0, adaptive_weight_min=1e-5, ref_kl_coef=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_patched_nft_loss(
    shape: tuple[int, ...], device: str, modules: dict[str, Any], compare: Callable[..., Any]
) -> None:
    """With its metrics, which the host reads: numbers are what the original returns."""
    owner = modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    eager = owner.compute_loss
    patch("verl_omni")
    ours = owner.compute_loss
    unpatch("verl_omni")

    def make() -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        x0, noise, *changes = torch.randn(5, *shape, generator=generator, device=device)
        t = torch.linspace(0.1, 0.95, shape[0], device=device).view(-1, 1, 1)
        v, v_old, v_ref = (
            noise - x0 + 0.2 * change for change in changes
        )  # near the target, as a trained model's
        return {
            "forward_prediction": v.requires_grad_(),
            "old_prediction": v_old,
            "ref_forward_prediction": v_ref,
            "x0": x0,
            "xt": torch.lerp(x0, noise, t),
            "t_expanded": t,
            "reward_prob": torch.linspace(0, 1, shape[0], device=device),
        }

    def full(compute: Call, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loss, _ = compute(**inputs, config=SimpleNamespace(diffusion_loss=NFT))
        return loss.detach(), torch.autograd.grad(loss, inputs["forward_prediction"])[0]

    def gate(inputs: dict[str, Any]) -> dict[str, float]:
        (their_loss, theirs), (loss, grad) = full(eager, inputs), full(ours, inputs)
        worst("loss", loss, their_loss, 1e-5)
        return {
            "editr2": worst(
                "gradient", grad / theirs.abs().max(), theirs / theirs.abs().max(), 1e-5
            )
        }

    compare(
        op="integrations",
        mode="verl_omni, NFT loss, forward + backward",
        shape=shape,
        dtype=FP32.name,
        device=device,
        inputs=make,
        providers={
            "eager": lambda inputs: full(eager, inputs),
            "editr2": lambda inputs: full(ours, inputs),
        },
        gate=gate,
        seconds=4.0,
    )
