"""Tensors whose rows are shared out over processes: the part that this one holds, and the whole.

A tensor that is not shared out is its own part and its own whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether it is one of FSDP2's (a DTensor): only a part of its rows is here."""
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """What this process holds of it, without gradient and over the same memory."""
    tensor = tensor.detach()
    local: Any = tensor
    return local.to_local() if is_shared(tensor) else tensor


def rows(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this process holds where `like`, of the same shape, is shared out: a
    view. FSDP2 cuts rows as `torch.chunk` does, so the last processes may hold fewer, or none."""
    if not is_shared(like):
        return whole
    mesh = _mesh(like)
    place, chunks = mesh.get_local_rank(mesh.ndim - 1), whole.chunk(mesh.size(mesh.ndim - 1))
    return chunks[place] if place < len(chunks) else whole[:0]


def whole(own: Tensor, like: Tensor) -> Tensor:
    """The tensor whose part on this process is `own`, where `like` is shared out: on the device of
    every process. All of them have to call it."""
    if not is_shared(like):
        return own
    from torch.distributed.tensor import DTensor  # seconds of imports, and only for who shares

    there: Any = like
    return DTensor.from_local(
        own,
        there.device_mesh,
        there.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def copies_of(tensor: Tensor) -> int:
    """How many groups of processes hold a copy of it each."""
    mesh = _mesh(tensor)
    return int(mesh.size(0)) if mesh.ndim > 1 else 1


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh
