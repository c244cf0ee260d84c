"""The first stage of a benchmark, killed: shared by test_benchmark_generate.py and run by it.

python tests/killed_benchmark.py FOLDER

leaves FOLDER/killed as one process that got a SIGKILL between an image and its name left it;
FOLDER/two, where two processes went on with that; and in FOLDER/done.RANK.json the sessions that
each of them edited. All three are forks of this one: what takes long is importing torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
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


def _forked(work: Callable[[], object]) -> int:
    """The process that does it, with the exit status 0 if it does."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def _killed(out: Path) -> None:
    _die(AT)
    make(out / "killed")


def _one_of_two(out: Path, rank: int, port: int) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(number) for name, number in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (out / f"done.{rank}.json").write_text(json.dumps(make(out / "two")))


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    assert _status(_forked(lambda: _killed(out))) == -signal.SIGKILL
    shutil.copytree(out / "killed", out / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [_forked(partial(_one_of_two, out, rank, port)) for rank in (0, 1)]
    assert [*map(_status, both)] == [0, 0]
