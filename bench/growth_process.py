"""One of the processes of test_growth.py: some iterations on its share of the groups; the main one
prints their rows.

torchrun --nproc_per_node N -m bench.growth_process ITERATIONS
"""

from __future__ import annotations

import json
import sys

import torch

from bench.test_growth import iteration


def main(iterations: int) -> None:
    torch.set_num_threads(1)
    ours = iteration(groups=8)
    for _ in range(iterations):
        row = ours()
        if ours.processes.main:
            print(
                json.dumps(
                    {name: row[name] for name in ("seconds", "reward", "ratio_error", "grad_norm")}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
