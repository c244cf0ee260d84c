"""Argument checks shared by the operators: every message names the argument, what it was and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("ref", "cpu", "triton", "cuda")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def float_dtype(name: str, dtype: object) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def backend_name(backend: str | None) -> str:
    """The string the custom operators carry; "auto" stands for None. Availability is judged where they run."""
    if backend is None:
        return "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def samples(name: str, value: Tensor) -> None:
    """A batch-first latent tensor in a dtype the operators read."""
    tensor(name, value)
    float_dtype(f"{name}.dtype", value.dtype)
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension first, [B, ...]; got a 0-dim tensor")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    samples(name, value)
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}; got {list(value.shape)}")
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def per_sample(name: str, value: Tensor, batch: int, other_name: str, other: Tensor) -> None:
    """One int64 per sample, on the device of the latents."""
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != batch:
        raise ValueError(f"{name} must have shape [{batch}], one entry a sample; got {list(value.shape)}")
    same_device(name, value, other_name, other)


def transition(table: Tensor, step_index: Tensor, x: Tensor) -> None:
    tensor("table", table)
    if table.dtype != torch.float32:
        raise TypeError(f"table must be float32, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != 8 or table.shape[0] == 0:
        raise ValueError(f"table must have shape [rows, 8] with rows >= 1, got {list(table.shape)}")
    same_device("table", table, "x", x)
    per_sample("step_index", step_index, x.shape[0], "x", x)


def flat(name: str, value: Tensor) -> Tensor:
    """[B, ...] -> [B, N], a view where the strides allow one."""
    value = value.unsqueeze(1) if value.dim() == 1 else value.flatten(1)
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have at least one element a sample, got shape {list(value.shape)}")
    return value


def rows(value: Tensor) -> Tensor:
    """[B, N] with contiguous rows (any batch stride): what kernels address."""
    return value if value.shape[1] == 1 or value.stride(1) == 1 else value.contiguous()


def steps_in_range(step_index: Tensor, table: Tensor) -> None:
    """CPU only, where looking costs nothing; elsewhere an index out of range yields NaN instead of a sync."""
    if step_index.device.type == "cpu" and step_index.numel() > 0:
        low, high = (int(value) for value in step_index.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"step_index must lie in [0, {table.shape[0] - 1}], the rows of table; got values {low} to {high}"
            )
