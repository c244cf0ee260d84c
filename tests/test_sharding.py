"""Weights shared out over two processes (FSDP2, gloo): the same runs as with whole weights, to the
last bit where they are frozen, to the order of a sum where they train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import ConfigError
from editr2.policies.load import open_policy
from editr2.policies.rules import config_problems, policy_problems
from editr2.policies.sharding import place
from editr2.rl.loop import train
from editr2.run.processes import Processes
from editr2.run.tracking import read_metrics

ROOT = Path(__file__).parent.parent
PROMPTS = ["make it red", "more light, please", "remove the dog", "add a cat"]
TIMES = ("seconds", "elapsed_s")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, beside):
    """A folder with both runs of every case, on five sessions of one to four turns; but for nft the
    sharded one is resumed once."""
    folder = tmp_path_factory.mktemp("sharding")
    editors, qwen = beside("tiny_editors"), beside("tiny_qwen")
    editors.kontext_pipeline().save_pretrained(folder / "kontext")
    qwen.save_pipeline(qwen.qwen_pipeline(plus=True), folder / "qwen-edit-plus")
    # In both iterations' order one process has sessions of one and three turns, the other of two,
    # four and one: where one replays places of two turns in one part, the other does not, and the
    # other way round.
    lines = []
    for i, (image, turns) in enumerate(
        zip(editors.pictures(5, (32, 32)), (4, 1, 1, 2, 3), strict=True)
    ):
        Image.fromarray(image).save(folder / f"{i}.png")
        said = [{"instruction": text} for text in PROMPTS[:turns]]
        lines.append(json.dumps({"id": f"s{i}", "image": f"{i}.png", "turns": said}))
    (folder / "sessions.jsonl").write_text("\n".join(lines) + "\n")

    def case(model, policy, rollout, train):
        sizes = {"resolution": [32, 32], "lora_rank": 4, "text_tokens": 48}
        return {
            "data": {"path": str(folder / "sessions.jsonl")},
            "reward": {"function": "editr2.rewards.brightness:Brightness"},
            "policy": {"model": model, "weights": str(folder / model), **sizes, **policy},
            "rollout": {"sessions": 5, "siblings": 2, "steps": 3, "groups_per_batch": 1, **rollout},
            "credit": {"preset": "flow-grpo", "weights": {"brightness": 1.0}, "baseline": None},
            "train": {"iterations": 2, "lr": 1e-2, "lr_decay": 1.0, "ema": 0.9, **train},
            "eval": {"sessions": 2, "strips": 2},
        }

    # Both: forwards without gradient (the reference, the old policy) between those with; several a
    # backward (both branches, one and two conditions), a number that differs between the processes.
    cases = {
        "grpo": case(
            "kontext",
            {
                "keep_source": True,
                "guidance": 2.0,
                "branches": "apart",  # two forwards in a backward
                "gradient_checkpointing": True,
            },
            {"window": 2, "window_range": 0.34},
            {"kl_weight": 0.1, "micro_batch": 3, "ratio_tolerance": 1e-3},
        ),
        "nft": case(
            "qwen-edit-plus",
            {"keep_source": True, "dtype": "bfloat16", "quantize": "fp8"},
            {"window": 0, "shared_noise": False},
            {"loss": "nft", "kl_weight": 0.1, "micro_batch": 3},
        ),
        # All weights train: the start, the old policy and the average are shared out with them.
        "full": case(
            "kontext",
            {"lora_rank": 0, "keep_source": True},
            {"window": 0, "shared_noise": False, "steps": 2},
            {"loss": "nft", "kl_weight": 0.1, "micro_batch": 3, "lr": 1e-3, "iterations": 3},
        ),
    }
    cases["nft"]["eval"] = cases["full"]["eval"] = {"sessions": 1, "strips": 0}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [
            *command,
            str(ROOT / "tests" / "sharded_processes.py"),
            str(folder),
            str(folder / "cases.json"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            _, said = running.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(
                running.pid, signal.SIGKILL
            )  # torchrun alone would leave its processes waiting for each other
            raise
    assert running.returncode == 0, said[-4000:]
    return folder


@pytest.mark.slow
def test_runs_are_bitwise_those_of_whole_weights(runs):
    facts = [json.loads((runs / f"facts.{rank}.json").read_text()) for rank in (0, 1)]
    for case in ("grpo", "nft"):
        whole, shared = (runs / f"{case}-{kind}" for kind in ("whole", "shared"))
        a, b = (
            load_file(run / "policy" / "pytorch_lora_weights.safetensors")
            for run in (whole, shared)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert max(t.abs().max() for k, t in a.items() if "lora_B" in k) > 1e-3  # it did train
        rows = [
            # A sharded run that was stopped and resumed after one iteration was evaluated there as
            # well.
            [
                {k: v for k, v in row.items() if k not in TIMES}
                for row in read_metrics(run / "metrics.jsonl")[0]
                if row["event"] == "train" or (row["event"] == "eval" and row["iteration"] != 1)
            ]
            for run in (whole, shared)
        ]
        assert rows[0] == rows[1] and [row["event"] for row in rows[0]] == [
            "eval",
            "train",
            "train",
            "eval",
        ]
        if case == "grpo":
            strips = [(run / "strips" / "after.json").read_text() for run in (whole, shared)]
            assert strips[0] == strips[1] and len(json.loads(strips[0])["sessions"]) == 2

        whole, shared = ([fact[case][kind] for fact in facts] for kind in ("whole", "shared"))
        assert all(
            f["held"] == f["whole"] > 10_000 and not f["empty"] and f["idle"] == [0, 0]
            for f in whole
        )
        # The first dimensions are even, so halves are halves.
        assert all(f["held"] == f["whole"] // 2 == whole[0]["whole"] // 2 for f in shared)
        assert [f["empty"] for f in shared] == [False, True]  # one process reads the weights
        # Both lend their part to each other, with gradient too, and between forwards of their own.
        assert all(min(f["idle"]) > 0 for f in shared) and max(f["mixed"] for f in shared) > 0, (
            shared
        )


def close(a, b, limit=1e-6):
    """Equal to the rounding of another order of sums."""
    return (a - b).norm() <= limit * a.norm()


@pytest.mark.slow
def test_all_weights_train_as_whole_ones_and_go_on_alone(runs):
    """Two processes make two iterations of the sharded run, the second after a restart, and one
    process the third."""
    facts = [json.loads((runs / f"facts.{rank}.json").read_text())["full"] for rank in (0, 1)]
    # Weights, moments, and copies (start, old, average).
    size = facts[0]["whole"]["whole"]
    for fact in facts:
        assert fact["whole"]["held"] == size and fact["shared"]["held"] == size // 2 > 10_000
        assert fact["shared"]["state"] == 5 * fact["shared"]["held"]
    assert any(min(fact["shared"]["idle"]) > 0 for fact in facts)

    cases = json.loads((runs / "cases.json").read_text())
    config = replace_nested(Config(), {**cases["full"], "out": str(runs / "full-shared")})
    train(replace_nested(config, {"policy": {"shard": True}}))

    whole, shared = (runs / f"full-{kind}" for kind in ("whole", "shared"))
    rows = [
        [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == "train"]
        for run in (whole, shared)
    ]
    assert [row["iteration"] for row in rows[1]] == [0, 1, 2]
    # Nothing of the first rollout and its loss depends on where weights lie.
    order = (*TIMES, "grad_norm")
    assert all(rows[0][0][k] == rows[1][0][k] for k in rows[0][0] if k not in order)
    for name in ("loss", "kl", "reward", "grad_norm"):
        values = [torch.tensor([row[name] for row in part]) for part in rows]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)  # the same sessions and noise
    last = "checkpoints/step_000003"
    for group in ("policy", "reference", "old", "ema", "optimizer"):
        a, b = (load_file(run / last / f"{group}.safetensors") for run in (whole, shared))
        limit = 1e-5 if group == "optimizer" else 1e-6
        assert a.keys() == b.keys() and all(close(a[k], b[k], limit) for k in a), group
    moved, start = (load_file(whole / last / f"{n}.safetensors") for n in ("policy", "reference"))
    assert not any(close(start[k], moved[k]) for k in start)  # it did train
    # The folder of a sharded run was written by two processes, after two iterations.
    kept, folders = "diffusion_pytorch_model.safetensors", (runs / "full-kept", whole / "policy")
    a, b = (load_file(folder / "transformer" / kept) for folder in folders)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    after_two = load_file(shared / "checkpoints/step_000002/ema.safetensors")
    assert all(torch.equal(a[k], after_two[k]) for k in a)
    configs = [(folder / "transformer" / "config.json").read_text() for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy": {"shard": False, "shard_group": 2}}, "policy.shard_group: 2"),
        ({"policy": {"quantize": "4bit"}}, "policy.quantize: 4bit"),
        ({"policy": {"model": "klein-kv"}}, "policy.model: klein-kv"),
        ({"rollout": {"capture": "compile"}}, "rollout.capture: compile"),
        ({"policy": {"model": "unified", "lora_rank": 4}}, "policy.shard: True"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, named):
    start = {
        "policy": {"model": "kontext", "lora_rank": 4, "shard": True},
        "data": {"path": "sessions.jsonl"},
    }
    config = replace_nested(Config(), start)
    assert not any("shard" in problem for problem in config_problems(config))
    found = [
        problem
        for problem in config_problems(replace_nested(config, changes))
        if problem.startswith(named)
    ]
    assert len(found) == 1 and "accepted" in found[0]


def test_evaluation_refuses_the_same_but_may_do_without_adapters():
    processes = Processes(Accelerator(cpu=True))
    for settings, named in (
        ({"model": "unified"}, "policy.shard: True"),
        ({"model": "klein-kv"}, "policy.model"),
    ):
        with pytest.raises(ConfigError, match=named):
            open_policy(PolicyConfig(**settings, shard=True), processes, trains=False)
    for trains in (False, True):
        assert not list(policy_problems(PolicyConfig("kontext", shard=True), trains=trains))


def test_a_group_that_does_not_divide_the_processes_is_refused():
    four = SimpleNamespace(count=4, device=torch.device("cpu"))
    policy = SimpleNamespace(module=torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"policy.shard_group: 3 \(accepted with 4 .*: 2, 4\)"):
        place(policy, True, four, 3)
