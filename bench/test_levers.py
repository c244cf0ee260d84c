"""What can be left out of an editor's step beside its products, lever by lever, on the CPU.

One double and one single block of a FLUX.1 with everything before and after them, LoRA on
attention and MLP: a denoising step rolled out, and one trained. Of the same module, in turns:

    eager, peft      adapters by peft's own forward, as they are put on
    casts off        the same, whose input stays as it is under autocast
    one LoRA linear  the strength on the rank, too: what runs
    compiled blocks  that, by torch.compile (its rounding differs)

and, beside a policy: the two branches of guidance after one another or as one batch, and an image
encoded again or found where it is kept. A row says what moves beside the matrix products (`bytes`)
and with them (`dense_bytes`), and how many operations run, by `editr2.check.meter`.

The tiny cases show that it runs; `--full` has a Kontext's own width (3072, 24 heads, 512 words and
two images of 512 x 512 pixels, bfloat16).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.peer_sides import tiny_editors
from bench.test_transformers import KONTEXT, TINY, built_on
from editr2.check.meter import Meter
from editr2.config import PolicyConfig
from editr2.policies.encodes import Kept
from editr2.policies.kontext import DEV, KontextPolicy
from editr2.policies.weights import add_lora

EAGER, CASTS, LINEAR, COMPILED = (
    "eager, peft",
    "casts off",
    "one LoRA linear",
    "compiled blocks",
)


@dataclass(frozen=True)
class Case:
    """make: as `Case.make` of test_transformers. side: latent tokens a side. apart: of the norm,
    what compiled blocks may differ by."""

    name: str
    make: Callable[..., Any]
    side: int
    channels: int
    rank: int
    dtype: torch.dtype
    apart: float

    @property
    def size(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]


CASES = [
    Case("tiny blocks (a smoke case)", TINY, 4, 64, 4, torch.bfloat16, 5e-2),
    pytest.param(
        Case(
            "a double and a single block of FLUX.1-Kontext, 512²",
            functools.partial(KONTEXT, num_layers=1, num_single_layers=1),
            32,
            64,
            64,
            torch.bfloat16,
            2e-2,
        ),
        marks=pytest.mark.full,
    ),
]


class Blocks:
    """The module with adapters of any kind over the same weights."""

    def __init__(self, case: Case, train: bool) -> None:
        from peft.tuners.lora import Linear

        self.case, self.train, self.theirs = case, train, Linear
        torch.manual_seed(0)
        with built_on("cpu", case.dtype):
            self.module, self.velocity = case.make("cpu", case.dtype, 1, case.side)
            add_lora(self.module, case.rank, targets=KontextPolicy.lora_targets)
        for name, p in self.module.named_parameters():
            if ".lora_" in name:
                p.data = p.data.float()
            if "lora_B" in name:
                nn.init.normal_(p, std=1e-3)
        self.adapters = [m for m in self.module.modules() if isinstance(m, Linear)]
        self.ours = type(self.adapters[0])
        self.module.compile_repeated_blocks()
        repeated = self.module._repeated_blocks
        self.compiled = {
            block: block._compiled_call_impl
            for block in self.module.modules()
            if type(block).__name__ in repeated
        }
        self.x = torch.randn(1, case.side**2, case.channels)
        self.sigma = torch.full((1,), 0.6)

    def as_asked(self, name: str) -> None:
        for layer in self.adapters:
            layer.__class__ = self.theirs if name in (EAGER, CASTS) else self.ours
            layer.cast_input_dtype_enabled = name != CASTS
        for block, compiled in self.compiled.items():
            block._compiled_call_impl = compiled if name == COMPILED else None

    def step(self) -> list[Tensor]:
        """The velocity, and the adapters' gradients where it trains."""
        self.module.zero_grad()
        with torch.autocast("cpu", self.case.dtype, enabled=self.case.dtype != torch.float32):
            with torch.set_grad_enabled(self.train):
                v = self.velocity(self.x, self.sigma)
        if not self.train:
            return [v]
        v.float().square().mean().backward()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return [v.detach(), *(g.clone() for g in grads)]

    def __call__(self, name: str) -> list[Tensor]:
        self.as_asked(name)
        return self.step()


def counted(run: Callable[[], Any]) -> dict[str, int]:
    with Meter() as meter:
        run()
    cost = meter.cost
    return {"operations": cost.operations, "bytes": cost.bytes, "dense_bytes": cost.moved_dense}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("train", [False, True], ids=["rollout", "train"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapters(case: Case, train: bool, compare: Callable[..., Any]) -> None:
    blocks = Blocks(case, train)

    def gate() -> dict[str, float]:
        expected, errors = blocks(EAGER), {}
        for name in (CASTS, LINEAR, COMPILED):
            found = blocks(name)
            apart = [(a - b).float().norm() / b.float().norm() for a, b in zip(found, expected)]
            errors[name] = float(max(apart))
            limit = case.apart if name == COMPILED else 0.0  # bits
            assert errors[name] <= limit, (name, errors[name])
        return errors

    def extra(name: str) -> dict[str, int]:
        return {} if name == COMPILED else counted(functools.partial(blocks, name))

    compare(
        op="levers",
        mode=f"{case.name}, {'train' if train else 'rollout'} step",
        shape=(1, case.side**2),
        dtype=case.size,
        providers={n: functools.partial(blocks, n) for n in (EAGER, CASTS, LINEAR, COMPILED)},
        gate=gate,
        extra=extra,
        seconds=10.0,
        min_rounds=5,
    )


SIDES = [(4, 64), pytest.param((24, 512), marks=pytest.mark.full)]
"""Attention heads of the transformer (of 128 numbers, or 16 where it is tiny), pixels a side."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", SIDES, ids=str)
def test_branches(size: tuple[int, int], compare: Callable[..., Any]) -> None:
    heads, side = size
    wide = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)} if side > 64 else {}
    tiny = tiny_editors()
    pipe = tiny.kontext_pipeline(num_attention_heads=heads, **wide)
    settings = {"model": "kontext", "resolution": (side, side), "guidance": 3.0, "text_tokens": 512}
    apart, together = (
        KontextPolicy(pipe, PolicyConfig(**settings, branches=how)) for how in ("apart", "together")
    )
    context = apart.blank(1, 512)
    x, sigma = torch.randn(1, *apart.latent_shape), torch.full((1,), 0.6)

    def run(policy: Any) -> list[Tensor]:
        with torch.no_grad():
            v = policy.velocity(x, sigma, context)
        return [v.v, v.guidance["v_uncond"]]

    def gate() -> dict[str, float]:
        pairs = zip(run(together), run(apart), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        assert error <= 1e-5
        return {"branches together": error}

    providers = {
        "eager, branches apart": functools.partial(run, apart),
        "branches together": functools.partial(run, together),
    }
    compare(
        op="levers",
        mode="both branches of a Kontext-shaped step, one block of each kind",
        shape=(1, apart.latent_shape[0]),
        dtype="fp32",
        providers=providers,
        gate=gate,
        extra=lambda name: counted(providers[name]),
        seconds=10.0,
        min_rounds=5,
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", SIDES, ids=str)
def test_encodes(size: tuple[int, int], compare: Callable[..., Any]) -> None:
    """Two images by Kontext's own autoencoder (84 M numbers), random weights."""
    side = size[1]
    tiny = tiny_editors()
    pipe = tiny.kontext_pipeline()
    if side > 64:
        from diffusers import AutoencoderKL

        pipe.register_modules(vae=AutoencoderKL(**DEV.vae).eval())
    pipe.vae.enable_slicing()
    again = KontextPolicy(pipe, PolicyConfig(model="kontext", resolution=(side, side)))
    kept = copy.copy(again)
    again._sources = Kept(0)
    images = tiny.pictures(2, (side, side))

    def run(policy: Any) -> Tensor:
        return policy.encode(images).conditions[0]

    def gate() -> dict[str, float]:
        for policy, made in ((again, True), (kept, False)):
            run(policy)
            count = counted(functools.partial(run, policy))["operations"]
            assert (count > 20) == made, (policy, count)
        assert torch.equal(run(again), run(kept))
        return {"kept": 0.0}

    providers = {
        "eager, encoded again": functools.partial(run, again),
        "kept": functools.partial(run, kept),
    }
    compare(
        op="levers",
        mode="two images as a turn sees them",
        shape=(2, side, side),
        dtype="fp32",
        providers=providers,
        gate=gate,
        extra=lambda name: counted(providers[name]),
        seconds=5.0,
        min_rounds=5,
    )
    assert np.isfinite(run(kept).numpy()).all()
