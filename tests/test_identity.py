"""A run goes on only as what it was: other sessions, images, weights, reward, seeds or settings are
refused by name, or insisted on by name and recorded; versions, commit, host and command are
told."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import CheckpointError, ConfigError
from editr2.policies.weights import add_lora
from editr2.rewards.base import Score
from editr2.rewards.world import WorldReward
from editr2.run import identity
from editr2.run.checkpoint import latest_checkpoint, load_checkpoint
from editr2.run.identity import (
    changes,
    check_insisted,
    differences,
    folder_fingerprint,
    hub_revision,
    loaded_weights,
    named,
    reward_fingerprint,
    sessions_fingerprint,
)
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, load_sessions, save_sessions
from editr2.training import train
from editr2.worlds import shapes


class Bright:
    names = ("bright",)

    def __init__(self, scale: Any = 1.0) -> None:
        self.scale, self.calls = scale, 0

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]:
        self.calls += 1
        return [{"bright": Score(float(image.mean() / 255) * self.scale)} for image in images]


class Dark(Bright):
    pass


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


@pytest.fixture(scope="module")
def begun(runs, tmp_path_factory) -> Path:
    """Sessions, weights, and a run of them that has one of two iterations behind it."""
    folder = tmp_path_factory.mktemp("begun")
    save_sessions([shapes.make_session(0, i, turns=1) for i in range(3)], folder / "data")
    save_sessions([shapes.make_session(1, i, turns=1) for i in range(2)], folder / "heldout")
    runs.tiny().save(folder / "base")
    go_on(folder, iterations=1)
    return folder


def go_on(
    folder: Path,
    iterations: int = 2,
    reward: Any = None,
    anyway: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    values: dict[str, Any] = {
        "out": str(folder / "run"),
        "data": {"path": str(folder / "data"), "heldout": str(folder / "heldout")},
        "policy": {"weights": str(folder / "base"), "intent": False, "lora_rank": 2},
        "rollout": {
            "sessions": 2,
            "siblings": 2,
            "turns": 1,
            "steps": 2,
            "window": 1,
            "groups_per_batch": 2,
        },
        "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
        "train": {"iterations": iterations, "ema": None, "packed": "off"},
        "eval": {"sessions": 2, "strips": 1},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    config = replace_nested(Config(), values)
    return train(config, reward=reward or Bright(), resume_anyway=anyway)


def edited(field: str, value: Any, name: str = "data") -> Any:
    """One session of three says something else."""

    def change(folder: Path) -> None:
        file = folder / name / "sessions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        (lines[1]["turns"][0] if field == "instruction" else lines[1])[field] = value
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return change


def repainted(folder: Path) -> None:
    """One pixel of one image, one step darker or brighter."""
    file = sorted((folder / "data" / "images").iterdir())[0]
    pixels = np.array(Image.open(file))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(file)


def scaled(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)


def nothing(folder: Path) -> None: ...


OTHER: list[tuple[str, Any, dict[str, Any], str]] = [
    ("another instruction", edited("instruction", "paint it red"), {}, "sessions"),
    ("another id", edited("id", "other"), {}, "sessions"),
    ("another mode", edited("mode", "cm"), {}, "sessions"),
    ("other meta", edited("meta", {"judge": "harshly"}), {}, "sessions"),
    ("another pixel", repainted, {}, "sessions"),
    ("other held-out sessions", edited("instruction", "paint it red", "heldout"), {}, "heldout"),
    ("no held-out sessions", nothing, {"data": {"heldout": None}}, "heldout"),
    ("the world's sessions", nothing, {"data": {"path": None}}, "sessions"),
    ("the base times 1.5", scaled, {}, "weights"),
    ("another reward", nothing, {"reward": Dark()}, "reward"),
    ("another setting of the reward", nothing, {"reward": Bright(0.9)}, "reward"),
    ("another seed", nothing, {"seed": 1}, "seed"),
    ("another learning rate", nothing, {"train": {"lr": 1e-3}}, "train.lr"),
    ("another weight", nothing, {"credit": {"weights": {"bright": 0.5}}}, "credit.weights"),
    (
        "another setting that is a mapping's default",
        nothing,
        {"credit": {"clip": 3.0}},
        "credit.clip",
    ),
]


@pytest.mark.parametrize(
    "change, given, name", [row[1:] for row in OTHER], ids=[row[0] for row in OTHER]
)
def test_a_run_of_something_else_is_refused_by_name(begun, tmp_path, change, given, name):
    folder = shutil.copytree(begun, tmp_path / "copy")
    change(folder)
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        go_on(folder, **given)
    said = str(caught.value)
    assert f"step_000001: differs from what is given: {name}: " in said and "\n" not in said
    assert (
        " saved, " in said
        and said.count(" given") == 2
        and f"--resume-anyway {name} to go on" in said
    )
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    assert latest_checkpoint(folder / "run" / "checkpoints").name == "step_000001"


PREFERS: dict[str, Any] = {"train": {"loss": "dpo"}}


@pytest.fixture(scope="module")
def preferring(begun, tmp_path_factory) -> Path:
    """As `begun`, of a loss with an option, which nobody gave."""
    folder = shutil.copytree(begun, tmp_path_factory.mktemp("preferring") / "copy")
    shutil.rmtree(folder / "run")
    go_on(folder, iterations=1, **PREFERS)
    return folder


BETA = "train.loss_options.beta"
WEIGHTS: dict[str, Any] = {"credit": {"weights": {"bright": 0.5}}}
BELOW: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str] | None]] = {
    "an option as by default": ({"beta": 1000}, (), []),
    "an option as flags have it": ({"beta": "1e3"}, (), []),
    "an option by its own name": ({"beta": 500}, (BETA,), [BETA]),
    "an option by the options": ({"beta": 500}, ("train.loss_options",), [BETA]),
    "another option's name": ({"beta": 500}, ("train.loss_options.draws",), None),
    "a weight by its own name": (WEIGHTS, ("credit.weights.bright",), ["credit.weights"]),
    "another weight's name": (WEIGHTS, ("credit.weights.IF",), None),
}
"""What is given of the loss's options or the weights, and insisted on: what is recorded, or None
where it is refused."""


def test_a_run_says_all_options_of_its_loss(begun, preferring):
    for folder, options in ((begun, " {}"), (preferring, "\n    beta: 1000.0")):
        run = folder / "run"
        assert f"  loss_options:{options}\n" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("case", BELOW)
def test_what_a_setting_of_several_holds_may_be_insisted_on(preferring, tmp_path, case):
    given, anyway, recorded = BELOW[case]
    folder = shutil.copytree(preferring, tmp_path / "copy")
    train = {**PREFERS["train"], "loss_options": {} if given is WEIGHTS else given}
    changes = {**(WEIGHTS if given is WEIGHTS else {}), "train": train}
    if recorded is None:
        with pytest.raises(CheckpointError, match="differs from what is given: ") as caught:
            go_on(folder, anyway=anyway, **changes)
        (offered,) = re.findall("--resume-anyway ([^ ]+) to go on", str(caught.value))
        check_insisted(offered.split(","))
        return
    run = go_on(folder, anyway=anyway, **changes)
    rows, _ = read_metrics(run / "metrics.jsonl")
    (entry,) = rows[0]["identity"]["resumed"]
    assert list(entry["insisted"]) == recorded


INSISTED = [
    "another pixel",
    "the base times 1.5",
    "another setting of the reward",
    "another learning rate",
]


@pytest.mark.parametrize("case", INSISTED)
def test_whoever_insists_goes_on_and_it_is_recorded(begun, tmp_path, case, capsys):
    _, change, given, name = next(row for row in OTHER if row[0] == case)
    folder = shutil.copytree(begun, tmp_path / "copy")
    change(folder)
    section = name.partition(".")[0]  # a section stands for its settings
    run = go_on(folder, anyway=(section,), **given)
    assert f"--resume-anyway, recorded: {name}: " in capsys.readouterr().err
    rows, _ = read_metrics(run / "metrics.jsonl")
    (entry,) = rows[0]["identity"]["resumed"]
    assert entry["iteration"] == 1 and list(entry["insisted"]) == [name] and entry["host"]
    saved = load_checkpoint(run / "checkpoints" / "step_000002")
    assert saved.state["identity"]["resumed"] == [entry]
    if name == "train.lr":
        assert saved.optimizer["param_groups"][0]["base_lr"] == 1e-3  # and it acts
    assert [row["iteration"] for row in rows if row["event"] == "train"] == [0, 1]
    before = (run / "metrics.jsonl").read_bytes()
    go_on(folder, **given)  # from here on that is what it depends on
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_moved_is_the_same_and_counters_are_no_settings(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "elsewhere")
    (folder / "base").rename(folder / "weights")
    (folder / "data").rename(folder / "sessions")
    shutil.copy(folder / "weights" / "config.json", folder / "weights" / "README.md")
    reward = Bright()
    reward.calls = 77
    moved = {
        "policy": {"weights": str(folder / "weights")},
        "data": {"path": str(folder / "sessions")},
    }
    run = go_on(folder, reward=reward, **moved)
    rows, _ = read_metrics(run / "metrics.jsonl")
    assert [row["event"] for row in rows] == [
        "start",
        "eval",
        "train",
        "eval",
        "comparison",
        "train",
        "eval",
        "comparison",
    ]
    assert [e["insisted"] for e in rows[0]["identity"]["resumed"]] == [{}]


def test_versions_host_commit_and_command_are_recorded_and_told(
    begun, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(begun, tmp_path / "copy")
    made = identity.provenance
    other = {
        "host": "elsewhere",
        "commit": "abc",
        "command": "x",
        "versions": {**made(1, "cpu")["versions"], "torch": "9"},
    }
    monkeypatch.setattr(
        "editr2.rl.loop.provenance", lambda *a: {**made(*a), **other, "processes": 4}
    )
    run = go_on(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if "recorded" in line]
    first, here = read_metrics(run / "metrics.jsonl")[0][0]["identity"], made(1, "cpu")
    assert len(said) == 1 and all(
        part in said[0]
        for part in (
            f"changed since {first['date']}, recorded: ",
            f"host {here['host']} then, elsewhere now",
            f"torch {torch.__version__} then, 9 now",
            "processes 1 then, 4 now",
            "command ",
            "commit ",
        )
    )
    assert set(first) == {"depends", *here, "resumed"} and set(first["depends"]) == {
        "sessions", "heldout", "weights", "reward"
    }  # fmt: skip
    assert first["resumed"][0]["host"] == "elsewhere"
    saved = load_checkpoint(run / "checkpoints" / "step_000002").state["identity"]
    assert saved["made"]["versions"]["torch"] == "9" and saved["depends"] == first["depends"]


def test_a_checkpoint_without_fingerprints_goes_on_and_that_is_said(begun, tmp_path, capsys):
    """As editr2 0.1 wrote them: no identity, no groups, one process's generators, no setting that
    came later."""
    folder = shutil.copytree(begun, tmp_path / "copy")
    path = folder / "run" / "checkpoints" / "step_000001"
    document = json.loads((path / "state.json").read_text())
    del (
        document["state"]["identity"],
        document["groups"],
        document["state"]["config"]["eval"]["every"],
    )
    config = document["state"]["config"]
    config["policy"]["weights"], config["data"] = str(folder / "base"), {
        **config["data"], "path": str(folder / "data"), "heldout": str(folder / "heldout")
    }  # fmt: skip
    document["rng"] = document["rng"][0]
    (path / "state.json").write_text(json.dumps(document))
    summed(path)
    go_on(folder)
    assert "written without fingerprints" in capsys.readouterr().err
    with pytest.raises(
        ConfigError,
        match=r"'lr' \(accepted: sessions, heldout, weights, reward, questions, or",
    ):
        go_on(folder, anyway=("lr",))


def summed(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (path / "manifest.json").write_text(json.dumps(manifest))


def put(*keys: str, to: Any) -> Any:
    def change(path: Path) -> None:
        document = json.loads((path / "state.json").read_text())
        place = document
        for key in keys[:-1]:
            place = dict(place[key]) if key == "dict" else place[int(key) if key.isdigit() else key]
        place[keys[-1]] = to
        (path / "state.json").write_text(json.dumps(document))

    return change


def tensors(group: str, change: Any) -> Any:
    def apply(path: Path) -> None:
        values = load_file(path / f"{group}.safetensors")
        change(values)
        save_file(values, path / f"{group}.safetensors")

    return apply


def cut(values: dict[str, torch.Tensor]) -> None:
    name = next(name for name, value in values.items() if value.dim() == 2)
    values[name] = values[name][:1].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (put("state", "elapsed", to="long"), "elapsed is a str in state.json"),
        (put("state", "elapsed", to=float("nan")), "elapsed in state.json is nan"),
        (put("state", "config", to=[]), "config is a list in state.json"),
        (put("state", "config", to={}), "seed|data"),
        (put("state", "identity", to=[1]), "identity is a list in state.json"),
        (put("state", "identity", "depends", to=5), "depends is a int in state.json"),
        (put("state", "identity", "resumed", to=5), "resumed is a int in state.json"),
        (put("state", "identity", "made", "versions", to="2.9"), "versions is a str in state.json"),
        (put("state", to={}), "elapsed is missing from state.json"),
        (put("optimizer", to={"dict": []}), "optimizer: KeyError"),
        (put("state", "moments", to=7), r"optimizer: moments of \d+ weights \(accepted: of 7\)"),
        (put("rng", to=[{"dict": []}]), "the saved generators cannot be restored: KeyError"),
        (
            tensors("policy", cut),
            r"policy.safetensors: .*: \[1, 2\] \(accepted|policy.safetensors: .*: \[1, ",
        ),
        (
            tensors("policy", lambda values: values.popitem()),
            "policy.safetensors: .*: missing from it",
        ),
        (
            tensors("policy", lambda values: values.update(x=torch.ones(1))),
            "policy.safetensors: x: unknown to the pol",
        ),
        (tensors("optimizer", cut), r"optimizer: exp_avg\w* \[1, .*for a weight"),
    ],
)
def test_a_forged_state_is_refused_in_one_line(begun, tmp_path, change, message):
    folder = shutil.copytree(begun, tmp_path / "copy")
    path = folder / "run" / "checkpoints" / "step_000001"
    change(path)
    summed(path)
    if message == "seed|data":  # every setting is what the default says: not what is given
        message = "differs from what is given: "
    with pytest.raises(CheckpointError, match=f"(?s)^.*{message}") as caught:
        go_on(folder)
    assert "\n" not in str(caught.value)


def test_a_policy_that_is_given_is_known_by_its_frozen_weights(runs, tmp_path):
    def given(scale: float = 1.0):
        policy = runs.tiny()
        with torch.no_grad():
            for p in policy.module.parameters():
                p.mul_(scale)
        torch.manual_seed(0)
        add_lora(policy.module, 2)
        return policy

    def go(policy: Any, iterations: int) -> Path:
        config = runs.configured(
            tmp_path / "run", "lora", train={"iterations": iterations}, eval={"every": 0}
        )
        return train(config, policy=policy, reward=Bright())

    policy = given()
    go(policy, 1)
    with pytest.raises(CheckpointError, match="differs from what is given: weights: UnifiedPolicy"):
        go(given(1.5), 2)
    go(policy, 2)  # its adapters are trained by now: they come from the checkpoint


def test_a_run_that_left_no_checkpoint_begins_anew_as_something_else(runs, tmp_path, capsys):
    def die() -> None:
        raise runs.Killed

    def go(number: int, scale: float) -> None:
        policy = runs.tiny()
        with torch.no_grad():
            policy.module.llm2vae.weight.mul_(scale)
        with runs.dying_at(number, die):
            config = runs.configured(
                tmp_path / "run", "ema", eval={"every": 0}, train={"iterations": 1}
            )
            train(config, policy=policy, reward=Bright())

    with pytest.raises(runs.Killed):
        go(9, 1.0)  # behind the evaluation before training
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert [row["event"] for row in first] == ["start", "eval"]
    go(0, 1.5)
    assert "has no checkpoint yet and was of other start: it starts anew" in capsys.readouterr().err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert [row["event"] for row in rows] == ["start", "eval", "train", "eval", "comparison"]
    assert rows[1]["reward_turn"] != first[1]["reward_turn"]


def test_the_flag_may_be_given_again_and_with_commas(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(
        "editr2.training.train", lambda config, **options: seen.append(options["resume_anyway"])
    )
    assert (
        main(
            ["train", "--resume-anyway", "sessions,train.lr", "--seed=1", "--resume-anyway=reward"]
        )
        == 0
    )
    assert main(["train"]) == 0
    assert seen == [["sessions", "train.lr", "reward"], []]


# ------------------------------------------------------------------------------------- fingerprints


def test_sessions_that_are_not_kept_in_memory_are_decoded_no_second_time(tmp_path, monkeypatch):
    data = save_sessions([shapes.make_session(0, i, turns=1) for i in range(4)], tmp_path / "data")
    kept, dropped = load_sessions(data), load_sessions(data, memory=24 * 24 * 3)
    monkeypatch.setattr(
        "editr2.sessions.images.read_image", lambda *_: pytest.fail("decoded again")
    )
    assert sessions_fingerprint(kept) == sessions_fingerprint(dropped)
    assert sessions_fingerprint(kept[:3]) != sessions_fingerprint(kept)


def test_the_world_has_the_version_it_says():
    """Whoever changes what a seed gives, or how it is judged, raises the version."""
    sessions = [
        shapes.make_session(7, i, split=split) for split in ("train", "heldout") for i in range(20)
    ]
    judged = [
        shapes.verify(s.image, [t.instruction for t in s.turns], np.stack([s.image] * 3))
        for s in sessions
    ]
    sums = (
        sessions_fingerprint(sessions),
        hashlib.sha256(np.round(np.stack(judged), 6).tobytes()).hexdigest()[:16],
    )
    assert (shapes.VERSION, *sums) == WORLD


WORLD = (1, "40 sessions 18f8af343c83955b", "f79a871cc0673b65")


def huge(file: Path, tensors: int = 400, each: int = 50_000_000) -> int:
    """20 GB of which the disk holds the header alone. Returns where the tensors begin."""
    header = json.dumps(
        {
            f"layer.{i}": {
                "dtype": "I8",
                "shape": [each],
                "data_offsets": [i * each, (i + 1) * each],
            }
            for i in range(tensors)
        }
    ).encode()
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + tensors * each)
    return 8 + len(header)


def test_forty_gigabytes_of_weights_are_known_in_no_time(tmp_path):
    (tmp_path / "transformer").mkdir()
    files = [tmp_path / "transformer" / f"part-{i}.safetensors" for i in range(2)]
    begins = [huge(file) for file in files]
    (tmp_path / "model_index.json").write_text("{}")
    began = time.process_time()
    first = folder_fingerprint(tmp_path)
    assert time.process_time() - began < 1.0
    assert first.split()[0] == str(sum(f.stat().st_size for f in files) + 2)
    with open(files[1], "r+b") as stream:  # one tensor of 800
        stream.seek(begins[1] + 123 * 50_000_000 + 24_999_000)
        stream.write(b"\x01" * 4096)
    assert folder_fingerprint(tmp_path) != first


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_large_file_without_a_header_is_sampled(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\xff" * (identity.WHOLE + 5))
    first = folder_fingerprint(tmp_path)
    file.write_bytes(b"\xfe" * (identity.WHOLE + 5))
    assert folder_fingerprint(tmp_path) != first


def test_weights_of_an_editor_and_of_what_was_trained_from_it(tmp_path):
    for name in ("base", "lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(name.encode())
    said = {
        "model": "kontext",
        "base": str(tmp_path / "base"),
        "lora": {"rank": 2, "alpha": 4.0, "targets": "x"},
    }
    (tmp_path / "lora" / "policy.json").write_text(json.dumps(said))
    config = replace_nested(
        Config(), {"policy": {"model": "kontext", "weights": str(tmp_path / "lora")}}
    )
    first = loaded_weights(config.policy)["weights"]
    assert " over " in first
    (tmp_path / "base" / "x.safetensors").write_bytes(b"esab")
    assert loaded_weights(config.policy)["weights"] != first


def test_a_hub_id_is_known_by_the_commit_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "model_index.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_revision("owner/name") == "owner/name@c0ffee"
    assert hub_revision("owner/other") == "owner/other@unknown revision"
    # By a file of the model's own, where it is on no pipeline.
    (repository / "snapshots" / "c0ffee" / "llm_config.json").write_text("{}")
    (repository / "snapshots" / "c0ffee" / "model_index.json").unlink()
    bagel = PolicyConfig(model="bagel", weights="owner/name")
    assert loaded_weights(bagel) == {"weights": "owner/name@c0ffee"}


def linear(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(2, 2)


def closed(threshold: float) -> Any:
    return lambda session, images: threshold


def judge(threshold: float, session: Any, images: Any) -> None: ...


@pytest.mark.parametrize(
    "one, other, same",
    [
        (Bright(), Bright(), True),
        (Bright(0.5), Bright(0.25), False),
        (Bright(), Dark(), False),
        (functools.partial(judge, 0.5), functools.partial(judge, 0.5), True),
        (functools.partial(judge, 0.5), functools.partial(judge, 0.6), False),
        (WorldReward(), WorldReward(), True),
        (closed(0.5), closed(0.5), True),
        (closed(0.5), closed(0.6), False),
        (closed, judge, False),
        (
            Bright({"a": [Path("x"), re.compile("y"), np.float32(1)]}),
            Bright({"a": [Path("x"), re.compile("y"), 1.0]}),
            True,
        ),
        (Bright(signal.SIGINT), Bright(signal.SIGTERM), False),
        (Bright(torch.ones(3)), Bright(torch.zeros(3)), False),
        (Bright(np.ones(3)), Bright(np.zeros(3)), False),
        (Bright(linear(0)), Bright(linear(0)), True),
        (Bright(linear(0)), Bright(linear(1)), False),
    ],
)
def test_rewards_are_known_by_source_and_settings(one, other, same):
    assert (reward_fingerprint(one) == reward_fingerprint(other)) is same


def test_a_reward_whose_version_raises_is_one_line():
    class Shy(Bright):
        @property
        def version(self) -> str:
            raise OSError("the judge's\nserver is down")

    with pytest.raises(
        ConfigError,
        match=r"^reward: \S+Shy: its settings cannot be read: the judge's server is down$",
    ):
        reward_fingerprint(Shy())


JUDGE = """
import os

from helpers_of_a_test import SCALE, bright as how
import more_of_a_test.parts

THRESHOLD = 0.5  # of what
if os.name:
    LIMIT = 1

def helper(image):
    return how(image) * THRESHOLD * more_of_a_test.parts.half()

def apart():
    return 3

class Base:
    names = ("a",)
    limit = LIMIT

class Judge(Base):
    def __call__(self, session, images):
        return [min(helper(i), self.limit) for i in images]

def judge(session, images):
    return [helper(i) for i in images]

small = lambda session, images: helper(images)
"""
HELPERS = "SCALE = 1\n\ndef bright(image):\n    return image.mean() * SCALE\n\ndef apart(): pass\n"
SOURCES = {
    "nothing": ("judge.py", "", "", "none"),
    "a helper's code": ("judge.py", "* THRESHOLD", "/ THRESHOLD", "all"),
    "a constant": ("judge.py", "THRESHOLD = 0.5", "THRESHOLD = 0.25", "all"),
    "what nobody uses": ("judge.py", "return 3", "return 4", "none"),
    "a comment above": ("judge.py", "\nimport os", "\n# mine\nimport os", "none"),
    "a base class": ("judge.py", '("a",)', '("b",)', "Judge"),
    "what a class's constant comes from": ("judge.py", "LIMIT = 1", "LIMIT = 2", "Judge"),
    "a helper in another file": ("helpers_of_a_test.py", "image.mean()", "image.max()", "all"),
    "a constant in another file": ("helpers_of_a_test.py", "SCALE = 1", "SCALE = 2", "all"),
    "what nobody uses in another file": ("helpers_of_a_test.py", "apart", "aside", "none"),
    "a module that is used by its name": ("more_of_a_test/parts.py", "0.5", "0.25", "all"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_reward_is_known_by_all_that_it_calls(name, tmp_path, monkeypatch):
    """Modules of the user's, changed between two starts."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "more_of_a_test").mkdir()
    texts = {
        "judge.py": JUDGE,
        "helpers_of_a_test.py": HELPERS,
        "more_of_a_test/__init__.py": "",
        "more_of_a_test/parts.py": "def half():\n    return 0.5\n",
    }
    for file, text in texts.items():
        (tmp_path / file).write_text(text)

    def known() -> dict[str, str]:
        monkeypatch.syspath_prepend(str(tmp_path))  # forgets what the folder held
        spec = importlib.util.spec_from_file_location("judge_of_a_test", tmp_path / "judge.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules["judge_of_a_test"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            found = {
                name: reward_fingerprint(getattr(module, name))
                for name in ("judge", "Judge", "small")
            }
            return found | {"made": reward_fingerprint(module.Judge())}
        finally:
            for loaded in [
                n for n in sys.modules if n.endswith("_of_a_test") or n.startswith("more_of_a_test")
            ]:
                del sys.modules[loaded]

    before = known()
    file, old, new, whose = SOURCES[name]
    assert old in texts[file]
    (tmp_path / file).write_text(texts[file].replace(old, new, 1))
    after = known()
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {"none": set(), "all": set(before), "Judge": {"Judge", "made"}}[whose]


def test_a_reward_that_was_typed_at_a_prompt_is_one():
    code = "class Judge:\n    names = ('a',)\n    def __call__(self, s, i): return 1\n"
    code += "from editr2.run.identity import reward_fingerprint\nprint(reward_fingerprint(Judge()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("__main__:Judge ")


def test_a_reward_of_another_version_is_another(monkeypatch):
    first = reward_fingerprint(WorldReward())
    monkeypatch.setattr(WorldReward, "version", 99)
    assert reward_fingerprint(WorldReward()) != first


def test_a_setting_that_only_one_of_them_knows_has_its_default():
    now = named(Config(), None)
    saved = {name: value for name, value in now.items() if name != "train.guard"}
    assert differences(saved, now) == {}
    assert differences(saved, {**now, "train.guard": True}) == {"train.guard": ("False", "True")}
    # auto is off and apart where nothing settled it, as it was before there was such a setting.
    older = {n: v for n, v in now.items() if n != "policy.branches"}
    older |= named({"policy": {"compile": False}}, None)
    settled = {**now, "policy.branches": "apart"}
    assert differences(older, now) == differences(older, settled) == {}
    settled["policy.branches"] = "together"
    assert differences(older, settled) == {"policy.branches": ("'apart'", "'together'")}
    weights = {**now, "credit.weights": {"IF": 1.0}}
    assert list(differences(weights, now)) == ["credit.weights"]
    dpo = {**now, "train.loss": "dpo", BETA: 1000.0}
    before = {**now, "train.loss": "dpo"}  # written when the loss had no such option
    assert differences(before, dpo) == {}
    assert list(differences(before, {**dpo, BETA: 5.0})) == [BETA]
    assert (
        changes(
            {"host": "a", "versions": {"torch": "1"}}, {"host": "a", "versions": {"torch": "1"}}
        )
        == []
    )


KNOWN = {
    "train.loss_options.beta": True,
    "credit.weights.IF": True,
    "credit.weights.a reward.of mine": True,
    "credit.weights.": False,
    "train.lr.beta": False,
    "train.loss.beta": False,
    "policy.beta": False,
    "weights.IF": False,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_below_a_setting_of_several_is_known(name):
    if KNOWN[name]:
        check_insisted([name])
    else:
        with pytest.raises(ConfigError, match=f"^--resume-anyway: '{re.escape(name)}' "):
            check_insisted([name])
