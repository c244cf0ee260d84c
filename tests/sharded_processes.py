"""Run under torchrun: the same small run with whole weights and with weights shared out, case by
case.

torchrun --nproc_per_node N tests/sharded_processes.py FOLDER CASES.json

CASES.json: case -> changes to the configuration (`replace_nested`). Writes the runs,
FOLDER/CASE-whole and FOLDER/CASE-shared (two iterations, but for nft the second after a restart;
its policy is kept as FOLDER/CASE-kept), and FOLDER/facts.RANK.json: how many numbers the process
held of the transformer without adapters, and of moments and copies, how often it was idle without
and with gradient, and in how many of its own backwards idle forwards took part.
"""

import json
import shutil
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
            train(config, seen, restarts=kind == "shared" and case != "nft")
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / f"{case}-shared" / "policy", folder / f"{case}-kept")
    rank = torch.distributed.get_rank()
    (folder / f"facts.{rank}.json").write_text(json.dumps(facts))


def train(config: Config, seen: dict, restarts: bool) -> None:
    """The configured iterations; restarts: those after the first in a second call."""

    def place(policy, shard, processes, group):
        seen["empty"] = any(p.is_meta for p in policy.module.parameters())
        sharding.place(policy, shard, processes, group)
        weights = [p for name, p in policy.module.named_parameters() if ".lora_" not in name]
        seen["held"] = numbers(weights)
        seen["whole"] = sum(p.numel() for p in weights)
        if processes.lockstep is not None:
            step, idle = processes.lockstep, processes.lockstep._idle

            def counted():
                seen["idle"][torch.is_grad_enabled()] += 1
                return idle()

            def backward(losses):
                seen["mixed"] += bool(losses and step._unused)
                return backwards(losses)

            step._idle, backwards, step._backward = counted, step._backward, backward

    states = []

    def new_state(*given):
        states.append(new(*given))
        return states[-1]

    new = trainer.new_state
    with (
        mock.patch("editr2.policies.load.place", place),
        mock.patch("editr2.rl.loop.new_state", new_state),
    ):
        for iterations in (1, 2) if restarts else (config.train.iterations,):
            few = replace_nested(config, {"train": {"iterations": iterations}})
            trainer.train(few)
    moments = [v for held in states[-1].optimizer.state.values() for v in held.values() if v.dim()]
    copies = [v for held in states[-1]._copies().values() for v in held.values()]
    seen["state"] = numbers([*moments, *copies])


def numbers(tensors) -> int:
    """How many of them are here."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
