"""This process among those of a run, and its part of the work."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: a judge may take minutes over what only the first process rolls out, while
the default of a GPU's process group is ten."""


def open_accelerator() -> Accelerator:
    return Accelerator(
        cpu=not torch.accelerator.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
    )


def share(count: int, accelerator: Accelerator) -> slice:
    """This process's contiguous part of `count` items."""
    n, i = accelerator.num_processes, accelerator.process_index
    return slice(count * i // n, count * (i + 1) // n)
