"""Argument checks shared by the operators: every message names the argument, what it was and what
is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

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
    """The string the custom operators carry; "auto" stands for None. Availability is judged where
    they run."""
    if backend is None:
        return "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def samples(name: str, value: Tensor, *, doubles: bool = False) -> None:
    """A batch-first latent tensor in a dtype the operators read; `doubles`: or in float64, as
    references do."""
    tensor(name, value)
    if value.dtype not in FLOATS and not (doubles and value.dtype == torch.float64):
        float_dtype(f"{name}.dtype", value.dtype)
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension first, [B, ...]; got a 0-dim tensor")


def like(
    name: str, value: Tensor, other_name: str, other: Tensor, *, doubles: bool = False
) -> None:
    samples(name, value, doubles=doubles)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}; got "
            f"{list(value.shape)}"
        )
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {value.device}"
        )


def per_sample(name: str, value: Tensor, batch: int, other_name: str, other: Tensor) -> None:
    """One int64 per sample, on the device of the latents."""
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != batch:
        raise ValueError(
            f"{name} must have shape [{batch}], one entry a sample; got {list(value.shape)}"
        )
    same_device(name, value, other_name, other)


def scalars(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """One fp32 per sample, on the device of the latents."""
    tensor(name, value)
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have shape [{other.shape[0]}], one entry a sample; got "
            f"{list(value.shape)}"
        )
    same_device(name, value, other_name, other)


def mask(value: Tensor | None, other_name: str, other: Tensor) -> None:
    """None, or one bool per sample, on the device of the latents."""
    if value is None:
        return
    tensor("mask", value)
    if value.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != other.shape[0]:
        raise ValueError(
            f"mask must have shape [{other.shape[0]}], one entry a sample; got {list(value.shape)}"
        )
    same_device("mask", value, other_name, other)


def number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor: reading it would make the host wait for a GPU"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}")
    for part in value:
        number(name, part)
    first, second = value
    return first, second


def positive(name: str, value: float) -> None:
    number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def not_negative(name: str, value: float) -> None:
    number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def unit_range(name: str, value: Tensor, counted: Tensor | None) -> None:
    """CPU tensors only: [B] fp32 within [0, 1], NaN is not, wherever the mask counts."""
    if value.device.type == "cpu" and value.numel() > 0:
        low, high = value.aminmax()  # NaN where one is
        if low.item() >= 0 and high.item() <= 1:
            return
        inside = (value >= 0) & (value <= 1)
        outside = ~inside if counted is None else counted & ~inside
        if bool(outside.any()):
            raise ValueError(f"{name} must lie in [0, 1], got {value[outside][0].item()}")


def transition(table: Tensor, step_index: Tensor, x: Tensor, *, doubles: bool = False) -> None:
    tensor("table", table)
    if table.dtype != torch.float32 and not (doubles and table.dtype == torch.float64):
        raise TypeError(f"table must be float32, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != 8 or table.shape[0] == 0:
        raise ValueError(f"table must have shape [rows, 8] with rows >= 1, got {list(table.shape)}")
    same_device("table", table, "x", x)
    per_sample("step_index", step_index, x.shape[0], "x", x)


def detached(value: Tensor) -> Tensor:
    """Without gradient; itself where there can be none, which is half a microsecond less."""
    if (
        value.requires_grad
        or torch.compiler.is_compiling()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return value.detach()
    return value


def flat(name: str, value: Tensor) -> Tensor:
    """[B, ...] -> [B, N], a view where the strides allow one."""
    dims = value.dim()
    if dims == 1:
        value = value.unsqueeze(1)
    elif dims != 2:
        plain = not torch.compiler.is_compiling() and value.is_contiguous() and value.numel() > 0
        # Of the two, view is the quicker one.
        value = value.view(value.shape[0], -1) if plain else value.flatten(1)
    if value.shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one element a sample, got shape {list(value.shape)}"
        )
    return value


def addressable(value: Tensor) -> Tensor:
    """[B, N], each sample contiguous, any batch stride: what kernels address."""
    if value.is_contiguous() or value.shape[1] == 1 or value.stride(1) == 1:
        return value
    return value.contiguous()


def table_rows(chosen: str, table: Tensor, step_index: Tensor, m_prev: Tensor | None) -> None:
    """CPU tensors only, where looking costs little; elsewhere an index out of range, or a row with
    C != 0 without m_prev, yields NaN instead of a sync. Backend "cpu" looks for itself."""
    if chosen != "cpu" and step_index.device.type == "cpu" and step_index.numel() > 0:
        low, high = (int(value) for value in step_index.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"step_index must lie in [0, {table.shape[0] - 1}], the rows of table; got values "
                f"{low} to {high}"
            )
        if m_prev is None and bool((table[step_index, 2] != 0).any()):
            raise ValueError(
                "m_prev is required: a sample's table row has C != 0 (the x0 of the step before)"
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory spans of two tensors meet."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False

    def span(value: Tensor) -> tuple[int, int]:
        last = sum(
            (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a_start < b_end and b_start < a_end
