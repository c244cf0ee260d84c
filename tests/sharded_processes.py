"""Run under torchrun: the same small run with whole weights and with weights shared out, case by
case.

torchrun --nproc_per_node N tests/sharded_processes.py FOLDER CASES.json

CASES.json: case -> changes to the configuration (`replace_nested`). Writes the runs,
FOLDER/CASE-whole and FOLDER/CASE-shared, and FOLDER/facts.RANK.json: what the process held of the
transformer, how
often it was idle without and with gradient, and in how many of its own backwards idle forwards took
part.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from editr2.config import Config, replace_nested
from editr2.policies import sharding
from editr2.rl import loop as trainer


def main(folder: Path, cases: dict) -> None:
    torch.set_num_threads(1)
    facts: dict = {}
    for case, changes in cases.items():
        for kind in ("whole", "shared"):
            values = {**changes, "out": str(folder / f"{case}-{kind}")}
            values["policy"] = {**changes["policy"], "shard": kind == "shared"}
            config = replace_nested(Config(), values)
            seen: dict = facts.setdefault(case, {}).setdefault(
                kind, {"idle": [0, 0], "mixed": 0, "held": 0, "whole": 0}
            )
            train(config, seen, restarts=kind == "shared")
    rank = torch.distributed.get_rank()
    (folder / f"facts.{rank}.json").write_text(json.dumps(facts))


def train(config: Config, seen: dict, restarts: bool) -> None:
    """The configured iterations; restarts: those after the first in a second call."""

    def place(policy, shard, processes):
        seen["empty"] = any(p.is_meta for p in policy.module.parameters())
        sharding.place(policy, shard, processes)
        frozen = [p for p in policy.module.parameters() if not p.requires_grad]
        seen["held"] = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
        seen["whole"] = sum(p.numel() for p in frozen)
        if processes.lockstep is not None:
            step, idle = processes.lockstep, processes.lockstep._idle

            def counted():
                seen["idle"][torch.is_grad_enabled()] += 1
                return idle()

            def backward(losses):
                seen["mixed"] += bool(losses and step._unused)
                return backwards(losses)

            step._idle, backwards, step._backward = counted, step._backward, backward

    with mock.patch("editr2.policies.load.place", place):
        for iterations in (1, config.train.iterations) if restarts else (config.train.iterations,):
            few = replace_nested(config, {"train": {"iterations": iterations}})
            trainer.train(few)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
