"""The first stage of a benchmark, killed: shared by test_benchmark_generate.py and, under torchrun,
by itself.

torchrun --nproc_per_node 2 tests/killed_benchmark.py FOLDER

leaves FOLDER/killed as one process that got a SIGKILL between an image and its name left it;
FOLDER/two, where both processes went on with that; and in FOLDER/done.RANK.json the sessions that
each of them edited.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator

from editr2.benchmarks import generate as stage
from editr2.config import Config, replace_nested
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import new_embedded_policy
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.run.processes import Processes
from editr2.worlds.shapes import make_session

CONFIG = replace_nested(
    Config(),
    {
        "rollout": {"steps": 2, "groups_per_batch": 1},
        "eval": {"sampler": "ode"},
        "policy": {"intent": False},
    },
)
SESSIONS = [make_session(3, i, turns=1 + i % 3) for i in range(10)]
"""In chunks of 4, 4 and 2."""
AT = 14
"""Of the renames, in the second chunk: the first has 4 sources and 7 outputs."""


def make(folder: Path) -> list[list[str]]:
    """Generates what is left; the ids of the chunks that this process edited."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    sampler = eval_sampler(CONFIG.rollout, CONFIG.eval, own_schedule(policy))
    done: list[list[str]] = []

    def seen(policy, chunk, *rest, **options):
        done.append([session.id for session in chunk.sessions])
        return rollout(policy, chunk, *rest, **options)

    rollout, processes = stage.rollout_chunk, Processes(Accelerator(cpu=True))
    with mock.patch.object(stage, "rollout_chunk", seen):
        stage.generate(folder, policy, SESSIONS, sampler, CONFIG, processes, way="multipass")
    return done


def _die(number: int) -> None:
    """Kills this process just before its rename `number`."""
    left = [number]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename":
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    if rank == "0":
        pid = os.fork()
        if not pid:  # alone
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
                os.environ.pop(name)
            _die(AT)
            make(out / "killed")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        shutil.copytree(out / "killed", out / "two")
    (out / f"done.{rank}.json").write_text(json.dumps(make(out / "two")))
