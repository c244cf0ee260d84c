"""Transformers of the real editors' shapes, random weights made on the device: one step rolled out,
one trained.

The transformer is driven directly, without text encoder and autoencoder: that is the denoising
loop. Around it stands the peers' arithmetic (`eager`) or our operators, on the same inputs.
Training has LoRA on attention and MLP, and checkpointed activations where diffusers can. A tiny
case runs on a CPU; what it shows is that the code runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import frame
from bench.eager_operators import EagerSampler
from bench.providers import our_backends, worst
from editr2.check import devices
from editr2.config import RolloutConfig
from editr2.policies.configured import policy_class
from editr2.policies.klein import KleinPolicy
from editr2.policies.kontext import KontextPolicy
from editr2.policies.unified.model import UnifiedConfig, UnifiedModel
from editr2.policies.weights import add_lora
from editr2.rl.sampler import make_sampler
from editr2_kernels import grpo_loss, sde_step

STEPS, WINDOW, RANK, TEXT_TOKENS = 10, 2, 32, 512
DYNAMICS = RolloutConfig(steps=STEPS, dynamics="flow-sde", noise_level=0.7)

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """name: as in the row. make: (device, dtype, batch, side) -> the module and its velocity.
    model: as in `policy.model`; its layers get the adapters. side: latent tokens a side. channels:
    numbers a token. batch: of a rollout step, `trained` of a training step."""

    name: str
    make: Callable[..., tuple[nn.Module, Velocity]]
    model: str
    side: int
    channels: int
    batch: int
    trained: int
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


def _ids(side: int, first: int, columns: int, device: str) -> Tensor:
    rows = torch.arange(side * side, device=device)
    ids = torch.zeros(side * side, columns, device=device)
    ids[:, 0], ids[:, 1], ids[:, 2] = first, rows // side, rows % side
    return ids


def flux(
    device: str,
    dtype: torch.dtype,
    batch: int,
    side: int,
    *,
    text: int = TEXT_TOKENS,
    **settings: Any,
) -> tuple[nn.Module, Velocity]:
    """FLUX.1 used the Kontext way: a condition of the target's size stands behind the noisy
    tokens."""
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(**settings).eval()
    c = module.config
    condition = torch.randn(batch, side * side, c.in_channels, device=device, dtype=dtype)
    prompt = torch.randn(batch, text, c.joint_attention_dim, device=device, dtype=dtype)
    pooled = torch.randn(batch, c.pooled_projection_dim, device=device, dtype=dtype)
    guidance = torch.full((batch,), 2.5, device=device) if c.guidance_embeds else None
    ids = torch.cat([_ids(side, 0, 3, device), _ids(side, 1, 3, device)])
    text_ids = torch.zeros(text, 3, device=device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        out = module(
            hidden_states=torch.cat([x.to(dtype), condition], 1),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    return module, velocity


def flux2(
    device: str,
    dtype: torch.dtype,
    batch: int,
    side: int,
    *,
    text: int = TEXT_TOKENS,
    **settings: Any,
) -> tuple[nn.Module, Velocity]:
    """FLUX.2 with one reference image of the target's size."""
    from diffusers import Flux2Transformer2DModel

    module = Flux2Transformer2DModel(**settings).eval()
    c = module.config
    condition = torch.randn(batch, side * side, c.in_channels, device=device, dtype=dtype)
    prompt = torch.randn(batch, text, c.joint_attention_dim, device=device, dtype=dtype)
    ids = torch.cat([_ids(side, 0, 4, device), _ids(side, 10, 4, device)])
    text_ids = torch.zeros(text, 4, device=device)
    text_ids[:, 3] = torch.arange(text, device=device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        out = module(
            hidden_states=torch.cat([x.to(dtype), condition], 1),
            timestep=sigma,
            guidance=torch.ones_like(sigma) if c.guidance_embeds else None,
            encoder_hidden_states=prompt,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    return module, velocity


def unified(
    device: str, dtype: torch.dtype, batch: int, side: int, *, text: int = 64, **settings: Any
) -> tuple[nn.Module, Velocity]:
    """BAGEL's architecture behind a context of one image and one instruction, whose keys and values
    are kept."""
    module = UnifiedModel(UnifiedConfig(**settings)).eval()
    c = module.config
    grid, marks = (side, side), torch.zeros(2, dtype=torch.int64, device=device)
    image = torch.randn(batch, side * side, c.latent_dim, device=device, dtype=dtype)
    ids = torch.zeros(batch, text, dtype=torch.int64, device=device)

    def whole(context: Any) -> Any:
        vars(context)["padded"] = False  # known here, and tensors without data cannot be asked
        return context

    @functools.cache
    def context() -> Any:
        with torch.no_grad():
            empty = whole(module.empty_context(batch, device))
            before = module.append_image(empty, image, grid, marks)
            return whole(module.append_text(before, ids, torch.ones_like(ids, dtype=torch.bool))[0])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return module.velocity(context(), x, sigma, grid, marks)

    return module, velocity


KONTEXT = functools.partial(flux, **KontextPolicy.published[KontextPolicy.hub_id].transformer)
KLEIN = functools.partial(flux2, **KleinPolicy.published[KleinPolicy.hub_id].transformer)
BAGEL = functools.partial(
    unified,
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rope_theta=1e6,
    latent_channels=16,
    latent_patch_size=2,
    max_latent_size=64,
)
SMALL = functools.partial(
    flux,
    num_layers=4,
    num_single_layers=8,
    num_attention_heads=8,
    joint_attention_dim=1024,
    text=128,
)
TINY = functools.partial(
    flux,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 6, 6),
    text=8,
)

CASES = [
    Case("tiny FLUX.1 (a smoke case)", TINY, "kontext", 4, 64, 2, 2, "cpu", torch.float32),
    Case("FLUX.1-Kontext 12 B, 512²", KONTEXT, "kontext", 32, 64, 4, 1),
    Case("FLUX.1-Kontext 12 B, 1024²", KONTEXT, "kontext", 64, 64, 1, 1),
    Case("FLUX.2-klein 4 B, 512²", KLEIN, "klein", 32, 128, 8, 2),
    Case("BAGEL-shaped 7 B of 14 B, 512²", BAGEL, "unified", 32, 64, 4, 1),
    Case("a FLUX.1 of 0.3 B, 512²", SMALL, "kontext", 32, 64, 16, 8),
]


@contextmanager
def built_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their weights there from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(case: Case, device: str, batch: int, train: bool) -> tuple[nn.Module, Velocity]:
    """With adapters, half of whose product is not zero, where it trains; no weight else has a
    gradient."""
    torch.manual_seed(0)
    with built_on(device, case.dtype):
        module, velocity = case.make(device, case.dtype, batch, case.side)
        module.requires_grad_(False)
        if train:
            add_lora(
                module,
                RANK,
                targets=None if case.model == "unified" else policy_class(case.model).lora_targets,
            )
            for name, p in module.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=1e-3)
    return module, velocity


def count_flops(case: Case, batch: int, train: bool) -> int:
    """Of one step, on tensors without data: forward, and where it trains the backward pass (no
    recomputation)."""
    _, velocity = build(case, "meta", batch, train)
    return flops_of(velocity, torch.empty(batch, case.side**2, case.channels, device="meta"), train)


def flops_of(velocity: Velocity, x: Tensor, train: bool) -> int:
    """Of a call like those timed: what only the first one makes, a context, is made before."""
    sigma = torch.ones(len(x), device=x.device)
    with torch.no_grad():
        velocity(x, sigma)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        v = velocity(x, sigma)
        if train:
            v.float().square().mean().backward()
    return counter.get_total_flops()


def peak_rate(device: str) -> float | None:
    """Dense bf16 operations a second by the data sheet; None for a device that is not in the table,
    and for a CPU."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    found = [sheet for key, sheet in devices._SHEETS.items() if key.split("-")[0] in name]
    return found[0][1] * 1e12 if found else None


class Step:
    """One step of a batch: rolled out (no gradient) or trained (forward and backward to the
    adapters)."""

    def __init__(self, case: Case, train: bool) -> None:
        self.case, self.train = case, train
        self.batch = case.trained if train else case.batch
        device = case.device
        self.module, self.transformer = build(case, device, self.batch, train)
        if train and isinstance(
            getattr(self.module, "_supports_gradient_checkpointing", None), bool
        ):
            self.module.enable_gradient_checkpointing()
            self.module.train()  # diffusers checkpoints in training mode alone; there is no dropout
        self.table = make_sampler(
            STEPS, dynamics="flow-sde", noise_level=0.7, window=WINDOW, shift=3.0
        ).table.to(device)
        shape = (self.batch, case.side**2, case.channels)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        self.step_index = torch.full((self.batch,), STEPS + 2, device=device)
        self.seed = torch.arange(self.batch, device=device)
        self.sigma = self.table[self.step_index, 6]
        with torch.no_grad():
            v = self.transformer(self.x, self.sigma)
            done = sde_step(self.x, v, self.table, self.step_index, self.seed)
        self.x_next, self.old, self.v = done.x_next, done.log_prob, v
        self.advantage = torch.linspace(-1, 1, self.batch, device=device) + 0.1
        self.mask = torch.ones(self.batch, dtype=torch.bool, device=device)

    def operators(self, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(step, loss)."""
        if name == "eager":
            eager = EagerSampler(DYNAMICS)
            return eager.sde_step, eager.grpo_loss
        backend = name.removeprefix("editr2 ")
        return functools.partial(sde_step, backend=backend), functools.partial(
            grpo_loss, backend=backend
        )

    def loss(self, function: Callable[..., Any], v: Tensor) -> Tensor:
        where = (self.table, self.step_index, self.old, self.advantage)
        options = {"clip": (1e-4, 1e-4), "mask": self.mask, "normalizer": float(self.batch)}
        return function(self.x, self.x_next, v, *where, **options).loss

    def __call__(self, name: str) -> Any:
        step, loss = self.operators(name)
        if not self.train:
            with torch.no_grad():
                v = self.transformer(self.x, self.sigma)
                return step(self.x, v, self.table, self.step_index, self.seed)
        self.module.zero_grad()
        value = self.loss(loss, self.transformer(self.x, self.sigma))
        value.backward()
        return value

    def alone(self, name: str) -> Callable[[], Any]:
        """The operators without the transformer."""
        step, loss = self.operators(name)
        if not self.train:
            return lambda: step(self.x, self.v, self.table, self.step_index, self.seed)
        leaf = self.v.detach().requires_grad_()
        return lambda: torch.autograd.grad(self.loss(loss, leaf), leaf)

    def error(self, name: str) -> float:
        """Against eager, on the same velocity: the next latents, or the gradient to the
        velocity."""
        if not self.train:
            return worst(name, self.alone(name)().x_next, self.alone("eager")().x_next, 2e-6)
        # A bf16 gradient: one rounding, 2^-8 of the value, may fall to the other side.
        (found,), (expected,) = self.alone(name)(), self.alone("eager")()
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5 * scale)
        return (found.float() - expected.float()).abs().max().item() / scale


def _marked(case: Case) -> Any:
    return case if case.device == "cpu" else pytest.param(case, marks=pytest.mark.gpu)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("train", [False, True], ids=["rollout", "train"])
@pytest.mark.parametrize("case", [_marked(case) for case in CASES], ids=lambda case: case.name)
def test_transformer(case: Case, train: bool, compare: Callable[..., Any]) -> None:
    step = Step(case, train)
    names = ["eager", *(f"editr2 {backend}" for backend in our_backends(case.device))]
    flops, rate = count_flops(case, step.batch, train), peak_rate(case.device)
    clock: frame.Clock = frame.EventClock() if case.device == "cuda" else frame.HostClock()
    steps = WINDOW if train else STEPS  # that an image takes

    def extra(name: str) -> dict[str, Any]:
        whole = min(clock.measure(functools.partial(step, name), 3) for _ in range(3))
        alone = step.alone(name)
        alone()
        part = min(clock.measure(alone, 10) for _ in range(3))
        return {
            "flops": flops,
            "mfu": None if rate is None else round(flops / (whole / 1e3) / rate, 4),
            "images_per_s": round(step.batch / (steps * whole / 1e3), 3),
            "steps_an_image": steps,
            "operator_share": round(part / whole, 6),
            "parameters": sum(p.numel() for p in step.module.parameters()),
        }

    compare(
        op="transformer",
        mode=f"{case.name}, {'train' if train else 'rollout'} step",
        shape=(step.batch, case.side**2),
        dtype="fp32" if case.dtype == torch.float32 else "bf16",
        providers={name: functools.partial(step, name) for name in names},
        gate=lambda: {name: step.error(name) for name in names if frame.is_ours(name)},
        device=case.device,
        extra=extra,
        seconds=10.0,
        min_rounds=5,
    )
