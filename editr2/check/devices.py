"""Devices by name, from their makers' data sheets, and this machine by measurement.

`compute` is the dense rate of matrix products with fp32 accumulation; fp32 products run outside the
tensor cores, as PyTorch does by default. Memory is what the driver reports as total.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch

from editr2.check.meter import Speed
from editr2.errors import ConfigError

MATRIX_EFFICIENCY = 0.6
"""Assumed share of the data sheet's matrix rate: large bf16 products and fused attention in eager
PyTorch."""
BANDWIDTH_EFFICIENCY = 0.75
"""Assumed share of the data sheet's bandwidth: elementwise kernels of many megabytes."""
LAUNCH_SECONDS = 6e-6
"""Assumed host time of one eager PyTorch operation; it hides behind the device's work."""
LINK = 10e9
"""Assumed bytes a second from the host's ordinary memory to the device."""
PEER_EFFICIENCY = 0.7
"""Assumed share of the data sheet's rate between devices: NCCL gathering blocks of hundreds of
megabytes."""
RESERVE = 1.2 * 2**30
"""Bytes assumed for the CUDA context, cuBLAS workspaces and kernels that no tensor shows."""
FRAGMENTATION = 1.06
"""Assumed size of what the caching allocator holds over what is alive in it."""


@dataclass(frozen=True)
class Device:
    """name: of `--gpu`. memory: bytes. speed: as the estimate uses it, efficiencies applied. gpu:
    False for a CPU. peers: bytes a second that it receives from the others of its machine. link:
    the same from the host. float8: whether it multiplies float8 numbers."""

    name: str
    memory: float
    speed: Speed
    gpu: bool = True
    peers: float = float("inf")
    float8: bool = False

    @property
    def link(self) -> float:
        return LINK if self.gpu else float("inf")

    def needed(self, alive: float) -> float:
        """Bytes of the device that `alive` bytes of tensors take."""
        return alive * FRAGMENTATION + RESERVE if self.gpu else alive


_TERA, _GIGA, _MIB = 1e12, 1e9, 2**20

# name: memory in MiB, bf16 TFLOP/s, fp32 TFLOP/s, TB/s, GB/s from other devices (one direction of
# NVLink, or else of PCIe x16; no bridges; GeForce cards reach each other through the host's memory
# alone, at half of that)
_SHEETS = {
    "b200": (183_359, 2250, 75, 7.7, 900),
    "h200": (143_771, 989, 67, 4.8, 450),
    "h100": (81_559, 989, 67, 3.35, 450),
    "a100-80": (81_920, 312, 19.5, 2.04, 300),
    "a100-40": (40_960, 312, 19.5, 1.555, 300),
    "l40s": (46_068, 362, 91.6, 0.864, 32),
    "a6000": (49_140, 155, 38.7, 0.768, 32),
    "rtx5090": (32_607, 209, 104.8, 1.79, 32),
    "rtx4090": (24_564, 165, 82.6, 1.008, 16),
    "rtx3090": (24_576, 71, 35.6, 0.936, 16),
}
_FLOAT8 = {"b200": 4500, "h200": 1979, "h100": 1979, "l40s": 733, "rtx5090": 419, "rtx4090": 330}
"""TFLOP/s of dense float8 products with fp32 accumulation; the others have none."""
DEVICES = (*_SHEETS, "cpu")

# As drivers name them; the A100s by their memory.
_DRIVERS_NAMES = {
    "b200": "b200",
    "h200": "h200",
    "h100": "h100",
    "a100-80": "a100",
    "a100-40": "a100",
    "l40s": "l40s",
    "a6000": "rtx a6000",
    "rtx5090": "rtx 5090",
    "rtx4090": "rtx 4090",
    "rtx3090": "rtx 3090",
}


def device_at_hand(name: str, memory: float) -> Device:
    """The device that a driver calls `name`, with its own bytes of memory; one that has no sheet
    here has the speed of the one whose memory is nearest."""
    known = [sheet for sheet, mark in _DRIVERS_NAMES.items() if mark in name.lower()]

    def far(sheet: str) -> float:
        return abs(_SHEETS[sheet][0] * _MIB - memory)

    return replace(find_device(min(known or _SHEETS, key=far)), name=name, memory=memory)


def find_device(name: str) -> Device:
    """The device called `name`; `cpu` is this machine, measured now (about a second). Raises
    `ConfigError`."""
    if name == "cpu":
        return this_machine()
    if name not in _SHEETS:
        raise ConfigError(f"--gpu: {name!r} (accepted: {', '.join(DEVICES)})")
    memory, half, single, bandwidth, peers = _SHEETS[name]
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
    rates[torch.float8_e4m3fn] = _FLOAT8.get(name, half)  # dequantized where there are none
    speed = Speed(
        {dtype: rate * _TERA * MATRIX_EFFICIENCY for dtype, rate in rates.items()},
        bandwidth * _TERA * BANDWIDTH_EFFICIENCY,
        LAUNCH_SECONDS,
        overlaps=True,
    )
    return Device(
        name,
        memory * _MIB,
        speed,
        peers=peers * _GIGA * PEER_EFFICIENCY,
        float8=name in _FLOAT8,
    )


def this_machine() -> Device:
    """This machine's CPU with torch's present threads: a matrix product, a copy and an empty
    operation are timed."""

    def best(run: object, repeats: int = 3) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (
            torch.ones(2048, 128, dtype=dtype),
            torch.ones(128, 512, dtype=dtype),
        )  # a small transformer's shapes
        rates[dtype] = 20 * 2 * 2048 * 128 * 512 / best(lambda a=a, b=b: [a @ b for _ in range(20)])
    x, y = torch.ones(2**22), torch.empty(2**22)
    bandwidth = 2 * x.nbytes / best(lambda: y.copy_(x))
    small = torch.ones(8)
    launch = best(lambda: [small + small for _ in range(500)]) / 500
    stand_ins = {
        torch.float16: rates[torch.float32],
        torch.float8_e4m3fn: rates[torch.bfloat16],  # dequantized
    }
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu",
        total,
        Speed({**rates, **stand_ins}, bandwidth, launch, False),
        False,
    )
