"""Which implementations exist here, why the others do not, and which one a call gets.

`backend=None` picks: CPU tensors -> "cpu" if the native module is there, else "ref"; GPU tensors ->
"triton", else "cuda", else "ref", whichever is there first. An explicit backend never falls back:
it runs or raises RuntimeError with the reason.
"""

from __future__ import annotations

import ctypes
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

# OpenMP's threads do not survive a fork, but its runtime believes that they do and would wait for
# them for ever. The compiled module knows of the forks since it was loaded; it may be loaded by the
# child.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

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
        return (
            None,
            built or f"the compiled module editr2_kernels._native cannot be imported ({error})",
        )
    return module, None


@functools.cache
def _cuda() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"{__package__}._cuda"), None
    except ImportError as error:
        built = _build_info().get("cuda", {}).get("reason")
        return (
            None,
            built or f"the compiled module editr2_kernels._cuda cannot be imported ({error})",
        )


def _build_info() -> dict[str, Any]:
    """What the build recorded about itself; empty in a source tree that was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def native() -> Any:
    module, reason = _native()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


def cuda() -> Any:
    module, reason = _cuda()
    if module is None:
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    return module


def compiled(chosen: str, tensor: Tensor) -> tuple[Any, dict[str, int]]:
    """The module of backend "cpu" or "cuda" and where its functions are to run: both have the same
    functions."""
    if chosen == "cpu":
        return native(), {"threads": 1 if _forked else torch.get_num_threads()}
    module = cuda()
    if module.emulated:
        return module, {"device": 0, "stream": 0}
    return module, {
        "device": tensor.get_device(),
        "stream": torch.cuda.current_stream(tensor.device).cuda_stream,
    }


def workspace(module: Any, tensor: Tensor, *sizes: int) -> Tensor | None:
    """Scratch memory of one call, from torch's allocator so that streams and graphs may own it;
    None if none is asked.

    sizes: as `module.workspace` takes them.
    """
    size = module.workspace(*sizes)
    return torch.empty(size, dtype=torch.uint8, device=tensor.device) if size else None


@functools.cache
def _cuda_versions(module: Any) -> tuple[int, int]:
    return module.driver_version(), module.runtime_version()


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


SM_80 = (8, 0)
"""What the CUDA kernels are built for at least, and what Triton asks of NVIDIA devices: bf16
arithmetic."""


@functools.cache
def _capabilities() -> tuple[tuple[int, int], ...]:
    """Of the NVIDIA devices of this machine, by its management library: no GPU context is made, and
    a fork stays possible. Empty where it cannot be asked."""
    count, major, minor, handle = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    found = []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        for i in range(count.value):
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(i), ctypes.byref(handle)) == 0:
                if (
                    nvml.nvmlDeviceGetCudaComputeCapability(
                        handle, ctypes.byref(major), ctypes.byref(minor)
                    )
                    == 0
                ):
                    found.append((major.value, minor.value))
    except (OSError, AttributeError):  # no library, or one without these functions
        return ()
    return tuple(found)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _too_old(device: torch.device | None) -> str | None:
    """Why no kernel of ours runs on this GPU, or on none of those of this machine; None where one
    does."""
    if torch.version.hip is not None:
        return None
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found: tuple[tuple[int, int], ...] = (_capability(index),)
    else:
        found = _capabilities()
    if not found or max(found) >= SM_80:
        return None
    major, minor = max(found)
    return (
        f"a GPU of compute capability 8.0 (sm_80) or later is needed, this one has {major}.{minor}"
    )


def _cuda_status(device: torch.device | None = None) -> BackendStatus:
    module, reason = _cuda()
    if module is None:
        return BackendStatus(False, reason)
    if module.emulated:
        return BackendStatus(True, detail="emulated on the CPU: for tests, slow")
    if torch.version.cuda is None:
        return BackendStatus(False, "this PyTorch is built without CUDA")
    if torch.cuda.device_count() == 0:
        return BackendStatus(False, "no GPU is visible")
    old = _too_old(device)
    if old is not None:
        return BackendStatus(False, old)
    driver, runtime = _cuda_versions(module)
    # Within a major version an older driver runs what a newer toolkit built.
    if driver // 1000 < runtime // 1000:
        return BackendStatus(
            False,
            f"the driver supports CUDA {_release(driver)}, the module needs {_release(runtime)}",
        )
    return BackendStatus(True, detail=f"built for {', '.join(module.architectures())}")


def triton_interpreted() -> bool:
    """TRITON_INTERPRET is read by Triton when the kernels are defined; later changes have no
    effect."""
    kernels = sys.modules.get("editr2_kernels.triton_kernels")
    return kernels.INTERPRETED if kernels is not None else os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status(device: torch.device | None = None) -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed")
    if triton_interpreted():
        return BackendStatus(
            True, detail="interpreter on CPU tensors (TRITON_INTERPRET=1): for tests, slow"
        )
    if torch.version.cuda is None and torch.version.hip is None:
        return BackendStatus(
            False,
            "this PyTorch is built without GPU support (CPU tensors need TRITON_INTERPRET=1 "
            "before import)",
        )
    # Counted through NVML where possible: no CUDA context is created.
    if torch.cuda.device_count() == 0:
        return BackendStatus(
            False, "no GPU is visible (CPU tensors need TRITON_INTERPRET=1 before import)"
        )
    old = _too_old(device)
    if old is not None:
        return BackendStatus(False, old)
    return BackendStatus(
        True, detail="GPU tensors only (CPU tensors need TRITON_INTERPRET=1 before import)"
    )


def _cpu_status(device: torch.device | None = None) -> BackendStatus:
    module, reason = _native()
    return BackendStatus(module is not None, reason, None if module is None else module.isa())


def _status(name: str, device: torch.device | None = None) -> BackendStatus:
    """Of one backend, for the tensors of a device, or (None) on this machine at all: looking for
    the others costs an operator call more than some operators do."""
    if name == "ref":
        return BackendStatus(True, detail="eager PyTorch, any device")
    return {"cpu": _cpu_status, "triton": _triton_status, "cuda": _cuda_status}[name](device)


def backends() -> dict[str, BackendStatus]:
    """Status of every backend by name ("ref", "cpu", "triton", "cuda"). Creates no GPU context."""
    return {name: _status(name) for name in BACKENDS}


def select(backend: str, device: torch.device) -> str:
    """The backend a call runs on; `backend` is a name or "auto"."""
    if backend == "auto":
        if device.type == "cpu":
            return "cpu" if _native()[0] is not None else "ref"
        on_gpu = (
            (("triton", _triton_status), ("cuda", _cuda_status)) if device.type == "cuda" else ()
        )
        return next((name for name, status in on_gpu if status(device).available), "ref")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    status = _status(backend, device)
    if not status.available:
        raise RuntimeError(f"backend {backend!r} is not available: {status.reason}")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' works on CPU tensors only, got tensors on {device}")
    if backend == "cuda" and device.type != "cuda" and not cuda().emulated:
        raise RuntimeError(f"backend 'cuda' works on CUDA tensors only, got tensors on {device}")
    if backend == "triton" and device.type == "cpu" and not triton_interpreted():
        raise RuntimeError(
            "backend 'triton' works on CPU tensors only under TRITON_INTERPRET=1, set before import"
        )
    return backend


def strided(value: Tensor | None) -> tuple[int, int, int]:
    """(pointer, dtype code, batch stride) of an addressable [B, N] tensor; zeros for an absent
    one."""
    if value is None:
        return 0, 0, 0
    return value.data_ptr(), DTYPE_CODES[value.dtype], value.stride(0)


def pointer(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
