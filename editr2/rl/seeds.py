"""One rule for every random number of a run: a 64-bit seed is a hash of what it is for.

Nothing depends on the order of calls, the batch, the process or the device, so the same run seed
gives the same sessions, groups and noise on any number of processes, and a resumed run needs no
generator state.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1


def derive_seed(*parts: int | str) -> int:
    """A signed 64-bit seed from integers and names (splitmix64 chained over the parts)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        value = zlib.crc32(part.encode()) if isinstance(part, str) else part
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def judge_seed(*parts: int | str) -> int:
    """`derive_seed` for an `Item`: from 0 on, as servers take it."""
    return derive_seed(*parts) & (_MASK >> 1)


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [B]."""
    return torch.tensor(list(seeds), dtype=torch.int64, device=device)
