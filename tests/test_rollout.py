"""What a rollout asks of the link to its device, on a device that is only pretended."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from editr2.config import PolicyConfig, RolloutConfig
from editr2.policies.base import Velocity
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.worlds.shapes import make_session

AWAY = torch.device("meta")


class Away(torch.Tensor):
    """A tensor that says it lies on `AWAY`, and computes where it is."""

    @staticmethod
    def __new__(cls, held):
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=AWAY, strides=held.stride()
        )
        out.held = held
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of Link")


class Link(TorchDispatchMode):
    """Runs what happens on `AWAY`, and counts what the host would wait for: tensors sent there or
    fetched, and tensors of the host among those there, which are sent without a word."""

    def __init__(self):
        super().__init__()
        self.crossings = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        away = [isinstance(t, Away) for t in tensors]
        to = kwargs.get("device") or (AWAY if any(away) else torch.device("cpu"))
        if to == AWAY and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        crosses = (to == AWAY) != all(away) if tensors else False
        waits = any(away) and func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        if waits or (
            crosses
            and any(t.dim() for t, a in zip(tensors, away, strict=True) if a != (to == AWAY))
        ):
            self.crossings.append(str(func))
        out = func(*tree_map(self._held, args), **tree_map(self._held, kwargs))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda t: Away(t) if isinstance(t, torch.Tensor) and to == AWAY else t, out)

    @staticmethod
    def _held(value):
        return value.held if isinstance(value, Away) else value


class Affine:
    """Velocities without a network, and contexts without tensors."""

    writes_text = False
    latent_shape = (4, 3)

    def __init__(self, device):
        self.module = torch.nn.Linear(1, 1, device=device)

    def encode(self, images):
        return len(images)

    def instruct(self, context, texts):
        return context

    def append(self, context, images):
        return context

    def select(self, context, index):
        assert index.device.type == "cpu"
        return len(index)

    def velocity(self, x, sigma, context):
        assert len(x) == context
        return Velocity(x * (0.5 + sigma[:, None, None]))

    def decode(self, latents):
        return np.zeros((len(latents), 24, 24, 3), np.uint8)


class Painting(Affine):
    """Hands its pixels over as they are."""

    def pixels(self, latents):
        return latents.sum((1, 2))[:, None, None, None].expand(-1, 24, 24, 3)


def rolled(device, steps, store_dtype="float32", kind=Affine):
    """Three groups of three siblings over up to three turns; windows open at different steps."""
    chunk = Chunk([make_session(0, i, turns=2 + i % 2) for i in range(3)], [0, 1, 2], 3)
    return rollout_chunk(
        kind(device),
        chunk,
        make_sampler(steps, dynamics="flow-sde", noise_level=0.7, window=2, window_range=0.75),
        Seeds(0, "test"),
        PolicyConfig(intent=False),
        rollout=RolloutConfig(store_dtype=store_dtype),
        keep_velocity=True,
    )


@pytest.mark.parametrize("kind", [Affine, Painting])
@pytest.mark.parametrize("steps", [4, 12])
def test_a_turn_crosses_to_the_device_once_and_back_once_whatever_its_steps(steps, kind):
    with Link() as link:
        rolled(AWAY, steps, kind=kind)
    # The sampler's two tables; then everything that a turn needs to know, and whether all that it
    # made is finite: with the images, where the policy hands its pixels over.
    assert link.crossings == ["aten._to_copy.default"] * (2 + 2 * 3)


@pytest.mark.parametrize("kind", [Affine, Painting])
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_what_is_computed_there_is_what_is_computed_here(store_dtype, kind):
    with Link():
        there = rolled(AWAY, 7, store_dtype, kind)
    here = rolled("cpu", 7, store_dtype, kind)
    assert len({tuple(r.step_index[0].tolist()) for r in here.turns}) > 1
    for a, b in zip(there.turns, here.turns, strict=True):
        for name in ("x", "x_next", "step_index", "sigma", "log_prob", "x0", "velocity"):
            assert torch.equal(getattr(a, name).held, getattr(b, name)), name
        assert (a.images == b.images).all() and (kind is Affine or len(np.unique(b.images)) > 1)
