"""The random generators that code of others may draw from: Python's, numpy's and torch's global
ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from editr2.errors import CheckpointError, one_line


def capture_rng() -> dict[str, Any]:
    """The states of this process's generators: torch CPU and CUDA (if in use), numpy's and Python's
    global ones."""
    legacy = dict(np.random.get_state(legacy=False))
    if legacy["bit_generator"] != "MT19937":
        name = legacy["bit_generator"]
        raise CheckpointError(
            f"rng: numpy's global generator is {name} (accepted: MT19937, its default)"
        )
    legacy["state"] = {
        **legacy["state"],
        "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
    }
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if in_use else []
    return {
        "python": random.getstate(),
        "numpy": legacy,
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Set the generators to what `capture_rng` saw. CUDA states are set for the devices that exist
    here.

    Raises CheckpointError for states that are none.
    """
    try:
        random.setstate(rng["python"])
        legacy = rng["numpy"]
        key = legacy["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
        torch.set_rng_state(rng["torch"])
        if torch.cuda.is_available():
            for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = one_line(error, kind=True)
        raise CheckpointError(f"rng: the saved generators cannot be restored: {what}") from error


def seed_generators(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators: rewards and policies of others may
    draw from any."""
    random.seed(seed & 0xFFFF_FFFF_FFFF_FFFF)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed)


@contextmanager
def generators_aside(seed: int) -> Iterator[None]:
    """Inside, the generators start from `seed`; afterwards they are where they were."""
    before = capture_rng()
    seed_generators(seed)
    try:
        yield
    finally:
        restore_rng(before)
