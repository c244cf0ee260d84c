"""What one agreement of sharded processes costs (`editr2.policies.sharding.Lockstep`), without
anything to agree on.

torchrun --nproc_per_node N -m bench.agreement        (prints microseconds: p20, median, p80)
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from bench import frame
from editr2.policies.sharding import FINISHED, Lockstep

WARM_UP, ROUNDS = 100, 2000


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    lockstep = Lockstep(torch.nn.Identity(), lambda: torch.zeros(()), dist.group.WORLD)
    times = []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        assert lockstep._agree(FINISHED) == FINISHED
        times.append(1e6 * (time.perf_counter() - start))
    if dist.get_rank() == 0:
        print("{:.0f} {:.0f} {:.0f}".format(*frame.quantiles(times[WARM_UP:])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
