"""Where weights lie: frozen parts of a policy that come to its device for as long as they work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def held(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer of these modules themselves (not of those in them), with the
    dictionary that holds it and its name there."""
    for module in modules:
        for owner in (module._parameters, module._buffers):
            yield from (
                (owner, name, tensor) for name, tensor in owner.items() if tensor is not None
            )


@contextmanager
def at_work(parts: Sequence[nn.Module], device: torch.device, *, lent: bool) -> Iterator[None]:
    """The parts on the device. lent: inside only; their weights are copied there and dropped
    afterwards, since the host's copy is still right. Else they stay."""
    if not lent or device.type == "cpu":
        for part in parts:
            if any(p.device != device for p in part.parameters()):  # weights without data stay
                part.to(device)
        yield
        return
    kept = list(held(module for part in parts for module in part.modules()))
    there = {id(tensor): tensor.to(device, non_blocking=True) for _, _, tensor in kept}
    try:
        for owner, name, tensor in kept:
            moved = there[id(tensor)]  # weights that two layers share stay shared
            owner[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
        yield
    finally:
        for owner, name, tensor in kept:
            owner[name] = tensor
