"""Which implementations exist here, why the others do not, and which one a call gets.

`backend=None` picks: CPU tensors -> "cpu" if the native module is there, else "ref"; GPU tensors -> "triton" if it is
there, else "ref". An explicit backend never falls back: it runs or raises RuntimeError with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._checks import BACKENDS

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run, the reason if it cannot, and what is worth knowing if it can."""

    available: bool
    reason: str | None = None
    detail: str | None = None


@functools.cache
def _native() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"{__package__}._native")
    except ImportError as error:
        built = _build_info().get("cpu", {}).get("reason")
        return None, built or f"the compiled module editr2_kernels._native cannot be imported ({error})"
    return module, None


def _build_info() -> dict[str, Any]:
    """What the build recorded about itself; empty in a source tree that was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def native() -> Any:
    module, reason = _native()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


def triton_interpreted() -> bool:
    """TRITON_INTERPRET is read by Triton when the kernels are defined; later changes have no effect."""
    kernels = sys.modules.get("editr2_kernels.triton_kernels")
    return kernels.INTERPRETED if kernels is not None else os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed")
    if triton_interpreted():
        return BackendStatus(True, detail="interpreter on CPU tensors (TRITON_INTERPRET=1): for tests, slow")
    if torch.version.cuda is None and torch.version.hip is None:
        return BackendStatus(
            False, "this PyTorch is built without GPU support (CPU tensors need TRITON_INTERPRET=1 before import)"
        )
    if torch.cuda.device_count() == 0:  # counted through NVML where possible: no CUDA context is created
        return BackendStatus(False, "no GPU is visible (CPU tensors need TRITON_INTERPRET=1 before import)")
    return BackendStatus(True, detail="GPU tensors only (CPU tensors need TRITON_INTERPRET=1 before import)")


def backends() -> dict[str, BackendStatus]:
    """Status of every backend by name ("ref", "cpu", "triton", "cuda"). Creates no GPU context."""
    module, reason = _native()
    return {
        "ref": BackendStatus(True, detail="eager PyTorch, any device"),
        "cpu": BackendStatus(module is not None, reason, None if module is None else module.isa()),
        "triton": _triton_status(),
        "cuda": BackendStatus(False, "CUDA C++ kernels are not part of this build"),
    }


def select(backend: str, device: torch.device) -> str:
    """The backend a call runs on; `backend` is a name or "auto"."""
    if backend == "auto":
        if device.type == "cpu":
            return "cpu" if _native()[0] is not None else "ref"
        return "triton" if device.type == "cuda" and _triton_status().available else "ref"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    status = backends()[backend]
    if not status.available:
        raise RuntimeError(f"backend {backend!r} is not available: {status.reason}")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' works on CPU tensors only, got tensors on {device}")
    if backend == "triton" and device.type == "cpu" and not triton_interpreted():
        raise RuntimeError("backend 'triton' works on CPU tensors only under TRITON_INTERPRET=1, set before import")
    return backend


def rows_of(value: Tensor | None) -> tuple[int, int, int]:
    """(pointer, dtype code, batch stride) of a [B, N] tensor with contiguous rows; zeros for an absent one."""
    if value is None:
        return 0, 0, 0
    return value.data_ptr(), DTYPE_CODES[value.dtype], value.stride(0)


def pointer(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
