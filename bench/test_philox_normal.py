"""philox_normal against torch's own generator, which gives other noise for another batch size,
order or device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from bench import sizes
from bench.providers import SameBits, baselines, our_backends, ours, without_waiting
from bench.sizes import NORMAL, Size

STEP = 3


@pytest.mark.parametrize("size", sizes.latents(variant=True))
def test_philox_normal(size: Size, compare: Callable[..., Any]) -> None:
    batch, *sample = size.shape
    seed = torch.arange(batch, device=size.device)
    step = torch.full_like(seed, STEP)
    same = SameBits()

    def operator(backend: str, _: Any = None) -> Tensor:
        return editr2_kernels.philox_normal(
            seed, step, sample, dtype=size.dtypes.x, backend=backend
        )

    def gate() -> dict[str, float]:
        errors = {}
        few = 8  # samples: the reference goes through int64 and takes a hundred times the memory
        expected = editr2_kernels.philox_normal_ref(
            seed[:few], step[:few], size.elements // batch
        ).view(-1, *sample)
        for backend in our_backends(size.device):
            found = without_waiting(size.device, partial(operator, backend))
            same.check(backend, (found,))
            assert torch.equal(found[:few], expected.to(size.dtypes.x)), (
                f"{backend}: not the reference's bits"
            )
            errors |= dict.fromkeys((f"editr2 {backend}", f"editr2 {backend}, graph"), 0.0)
        return errors

    draw = partial(torch.randn, size.shape, dtype=size.dtypes.x, device=size.device)
    compare(
        op="philox_normal",
        mode="forward",
        shape=size.shape,
        dtype=size.dtypes.name,
        device=size.device,
        providers={
            **baselines(draw, lambda f, _=None: f(), size.device, random=True),
            **ours(operator, size.device),
        },
        gate=gate,
        bytes_moved=size.bytes(x=1),
        flops=NORMAL * size.elements,
    )
