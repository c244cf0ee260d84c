"""Checkpoints: exact, and whole at every moment, whatever kills or fills what."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from editr2.errors import CheckpointError
from editr2.run import checkpoint
from editr2.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from editr2.run.generators import capture_rng, restore_rng


def save(root: Path, iteration: int, *, keep: int = 2, numbers: int = 4) -> Path:
    tensors = {"policy": {"w": torch.full((numbers,), float(iteration))}}
    return save_checkpoint(
        root, iteration, tensors=tensors, optimizer={}, state={"at": iteration}, keep=keep
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.reshape(-1).contiguous().view(torch.uint8))
        == bytes(b.reshape(-1).contiguous().view(torch.uint8))
    )


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared, buffer = torch.randn(6, 4), torch.randn(10)
    group = {
        "fp32": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "nan payload": torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32),
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp16": torch.randn(2).half(),
        "fp64": torch.randn(2, dtype=torch.float64),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "0-d": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "tied a": shared,
        "tied b": shared,
        "transposed": shared.t(),
        "every other": shared[:, ::2],
        "view 1": buffer[:5],
        "view 2": buffer[5:],
        "parameter": nn.Parameter(torch.randn(2)),
    }
    path = save_checkpoint(
        tmp_path, 10, tensors={"policy": group, "ema": {}}, optimizer={}, state={}
    )
    assert path == tmp_path / "step_000010" and latest_checkpoint(tmp_path) == path
    loaded = load_checkpoint(path)
    assert (
        loaded.iteration == 10
        and set(loaded.tensors) == {"policy", "ema"}
        and loaded.tensors["ema"] == {}
    )
    assert set(loaded.tensors["policy"]) == set(group)
    for name, tensor in group.items():
        assert same_bits(loaded.tensors["policy"][name], tensor.detach()), name
    assert set(loaded.versions) == {"editr2", "torch", "python"}
    loaded.tensors["policy"]["fp16"].zero_()  # a loaded tensor is ours: the file must not change
    assert load_checkpoint(path).tensors["policy"]["fp16"].any()


def test_state_and_optimizer_structure(tmp_path: Path) -> None:
    state = {"seed": 2**80, "lr": 1e-05, "nested": {"a": [1, None, "é\n"], "nan": float("inf")}}
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "x": None}, 1: {}},
        "param_groups": [
            {"betas": (0.9, 0.999), "params": [0, 1], "lr": float("inf"), "np": np.float32(0.5)}
        ],
        "dict": {"dict": {"tensor": "0", "tuple": ()}},
    }
    loaded = load_checkpoint(
        save_checkpoint(tmp_path, 0, tensors={}, optimizer=optimizer, state=state)
    )
    assert loaded.state == state
    assert loaded.optimizer == optimizer
    assert type(loaded.optimizer["param_groups"][0]["betas"]) is tuple


def model_and_optimizer() -> tuple[nn.Module, torch.optim.AdamW]:
    model = nn.Sequential(
        nn.Linear(5, 7), nn.GELU(), nn.Dropout(0.3), nn.Linear(7, 3).bfloat16().float()
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-3},
            {"params": model[3].parameters(), "weight_decay": 0.3},
        ],
        lr=3e-4,
        amsgrad=True,
    )
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(4, 5)).square().mean() * random.random() * float(np.random.rand())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_is_bitwise_the_run_that_went_on(tmp_path: Path) -> None:
    before = capture_rng()
    try:
        torch.manual_seed(0)
        model, optimizer = model_and_optimizer()
        train(model, optimizer, 3)
        np.random.normal()  # leaves a second normal number in the generator's state
        path = save_checkpoint(
            tmp_path,
            3,
            tensors={"policy": model.state_dict()},
            optimizer=optimizer.state_dict(),
            state={},
        )
        train(model, optimizer, 3)
        normal, draw = np.random.normal(), torch.randn(3)

        resumed, resumed_optimizer = model_and_optimizer()
        loaded = load_checkpoint(path)
        resumed.load_state_dict(loaded.tensors["policy"])
        resumed_optimizer.load_state_dict(loaded.optimizer)
        restore_rng(loaded.rng)
        train(resumed, resumed_optimizer, 3)
        assert np.random.normal() == normal and torch.equal(torch.randn(3), draw)
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)
        for key, a in optimizer.state_dict()["state"].items():
            b = resumed_optimizer.state_dict()["state"][key]
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    finally:
        restore_rng(before)


def test_generators_of_several_ranks(tmp_path: Path) -> None:
    rng = [capture_rng(), capture_rng()]
    loaded = load_checkpoint(
        save_checkpoint(tmp_path, 1, tensors={}, optimizer={}, state={}, rng=rng)
    )
    assert len(loaded.rng) == 2 and torch.equal(loaded.rng[1]["torch"], rng[1]["torch"])
    assert loaded.rng[0]["python"] == rng[0]["python"]


def test_keeping_replacing_and_going_back(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    for iteration in (1, 2, 10, 3_000_000):
        save(tmp_path, iteration)
    assert names(tmp_path) == ["step_000010", "step_3000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3000000"
    save_checkpoint(tmp_path, 3_000_000, tensors={}, optimizer={}, state={"at": "again"})
    assert names(tmp_path) == ["step_000010", "step_3000000"]
    assert load_checkpoint(tmp_path / "step_3000000").state == {"at": "again"}
    with pytest.warns(
        UserWarning, match=r"step_3000000: removed: the run was taken back to iteration 11"
    ):
        save(tmp_path, 11, keep=3)
    assert names(tmp_path) == ["step_000010", "step_000011"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step_000012"]


def test_leftovers_of_torn_saves_are_ignored_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".tmp-step_000002-77")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001.replaced")
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["notes.txt", "step_000001", "step_000002"]
    shutil.copytree(tmp_path / "step_000002", tmp_path / "step_000002.replaced")
    save(tmp_path, 2)  # which wants that name for itself
    assert names(tmp_path) == ["notes.txt", "step_000001", "step_000002"]


def test_a_replaced_checkpoint_counts_until_the_new_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    os.rename(save(tmp_path / "x", 7), tmp_path / "x" / "step_000007.replaced")
    found = latest_checkpoint(tmp_path / "x")
    assert found is not None and load_checkpoint(found).state == {"at": 7}
    save(tmp_path / "x", 7)
    assert names(tmp_path / "x") == ["step_000007"]


def test_damage_is_found_and_the_previous_one_used(tmp_path: Path) -> None:
    save(tmp_path, 1)
    good = save(tmp_path, 2)
    pick = random.Random(0)
    for file in sorted(good.iterdir()):
        content = file.read_bytes()
        for position in {0, len(content) - 1, *(pick.randrange(len(content)) for _ in range(20))}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << pick.randrange(8)
            if file.name == "manifest.json":
                # A flip of layout only (a space to a tab's neighbour, say) is found by the parser
                # or harmless.
                try:
                    if json.loads(flipped) == json.loads(content):
                        continue
                except ValueError:
                    pass
            file.write_bytes(flipped)
            with pytest.warns(UserWarning, match=r"step_000002: .*falling back to step_000001"):
                assert latest_checkpoint(tmp_path) == tmp_path / "step_000001", (
                    file.name,
                    position,
                )
            with pytest.raises(CheckpointError, match="step_000002"):
                load_checkpoint(good)
        file.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match="step_000002: damaged"):
            load_checkpoint(good)
        file.unlink()
        with pytest.raises(
            CheckpointError, match=f"step_000002: not a whole checkpoint: {file.name} is missing"
        ):
            load_checkpoint(good)
        file.write_bytes(content)
    assert load_checkpoint(good).state == {"at": 2}
    for path in (good, tmp_path / "step_000001"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*step_000002.*step_000001"):
        latest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_does_not_push_a_good_one_out(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"format 2 \(accepted: 1\)"):
        load_checkpoint(manifest.parent)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "absent")


def forged(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The change, and then a manifest whose sums are right again."""

    def apply(path: Path) -> None:
        change(path)
        manifest = json.loads((path / "manifest.json").read_text())
        for name in manifest["files"]:
            content = (path / name).read_bytes()
            manifest["files"][name] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        (path / "manifest.json").write_text(json.dumps(manifest))

    return apply


def field(name: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        document = json.loads((path / "state.json").read_text())
        document[name] = value
        (path / "state.json").write_text(json.dumps(document))

    return forged(change)


def entry(name: str, *, file: bool = False) -> Callable[[Path], None]:
    """The manifest without an entry (and the file with it)."""

    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"][name]
        (path / "manifest.json").write_text(json.dumps(manifest))
        if file:
            (path / name).unlink()

    return change


def listed(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 0, "sha256": ""}
        (path / "manifest.json").write_text(json.dumps(manifest))

    return change


def emptied(name: str) -> Callable[[Path], None]:
    return forged(lambda path: (path / name).write_bytes(b""))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("policy.safetensors"), "manifest.json does not list policy.safetensors"),
        (
            entry("policy.safetensors", file=True),
            r"groups in state.json are \['policy'\], those in manifest.json \[\]",
        ),
        (
            entry("optimizer.safetensors", file=True),
            "manifest.json does not list optimizer.safetensors",
        ),
        (entry("rng.safetensors"), "manifest.json does not list rng.safetensors"),
        (entry("state.json"), "manifest.json does not list state.json"),
        (
            listed("../step_000001/policy.safetensors"),
            r"manifest.json lists '../step_000001/policy.safetensors'",
        ),
        (
            field("iteration", 1),
            r"iteration in state.json is 1 \(accepted: 2, as the folder is called\)",
        ),
        (field("iteration", "2"), r"iteration in state.json is a str \(accepted: int\)"),
        (field("iteration", True), r"iteration in state.json is a bool \(accepted: int\)"),
        (field("versions", None), r"versions in state.json is a NoneType \(accepted: dict\)"),
        (field("state", [1]), r"state in state.json is a list \(accepted: dict\)"),
        (field("groups", []), r"groups in state.json are \[\]"),
        (field("groups", 5), r"groups in state.json are 5"),
        (field("optimizer", {"dict": 5}), "optimizer in state.json cannot be decoded: TypeError"),
        (
            field("optimizer", {"tensor": "9"}),
            "optimizer in state.json cannot be decoded: KeyError: '9'",
        ),
        (field("optimizer", {"tuple": []}), "optimizer in state.json is not a state dict"),
        (
            field("optimizer", {"float": "x"}),
            "optimizer in state.json cannot be decoded: ValueError",
        ),
        (field("rng", {"a": 1, "b": 2}), "rng in state.json cannot be decoded: ValueError"),
        (
            forged(lambda path: (path / "state.json").write_text("[]") and None),
            "iteration in state.json is a NoneType",
        ),
        (emptied("state.json"), "state.json cannot be read"),
        (emptied("policy.safetensors"), "cannot be read: SafetensorError"),
    ],
)
def test_what_no_save_wrote_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    """Entries taken out of the manifest, and fields that were forged and summed up again."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    change(path)
    with pytest.raises(CheckpointError, match=f"step_000002: .*{message}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_under_another_name_is_what_it_says(tmp_path: Path) -> None:
    os.rename(save(tmp_path, 2), tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").iteration == 2
    os.rename(tmp_path / "best", tmp_path / "step_000007")
    with pytest.raises(CheckpointError, match="iteration in state.json is 2"):
        load_checkpoint(tmp_path / "step_000007")


@pytest.mark.parametrize(
    "change", [{}, {"python": (3, (), None)}, {"torch": torch.zeros(3)}, {"numpy": {}}, 5]
)
def test_generators_that_are_none_are_refused(change: Any) -> None:
    before = capture_rng()
    try:
        with pytest.raises(CheckpointError, match="rng: the saved generators cannot be restored"):
            restore_rng({**before, **change} if change and change != 5 else change)
    finally:
        restore_rng(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"policy": {"x": 3}}}, r"tensors: policy.x is a int \(accepted: a tensor\)"),
        ({"tensors": {"rng": {}}}, "group name 'rng'"),
        ({"tensors": {"../up": {}}}, "group name '../up'"),
        ({"tensors": {"p": {"x": torch.eye(2).to_sparse()}}}, r"tensors: p.x: torch.sparse_coo"),
        ({"tensors": {"p": {"x": torch.empty(2, device="meta")}}}, r"p.x: torch.strided on meta"),
        (
            {"state": {"a": {"b": [object()]}}},
            r"state.a.b\[0\]: a object \(accepted: JSON values\)",
        ),
        ({"state": {"a": {1: 2}}}, r"state.a: key 1 \(accepted: strings\)"),
        ({"state": {"a": torch.ones(1)}}, r"state.a: a Tensor"),
        ({"optimizer": {"a": [{"b": object()}]}}, r"optimizer.a\[0\].b: a object"),
        ({"optimizer": {(1,): 2}}, r"optimizer: key \(1,\)"),
    ],
)
def test_what_cannot_be_stored_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(tmp_path, 1)
    given: dict[str, Any] = {"tensors": {}, "optimizer": {}, "state": {}, **change}
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 2, **given)
    assert names(tmp_path) == ["step_000001"]


# Each child is one process that imports torch once and forks for every case, so that a kill takes
# only the fork.
CHILD = """
import os, shutil, signal, sys
import torch
from pathlib import Path
from editr2.run.checkpoint import save_checkpoint
torch.set_num_threads(1)

def save(root, iteration):
    tensors = {"policy": {"w": torch.full((1000,), float(iteration))}, "ema": {"w": torch.zeros(3)}}
    save_checkpoint(
        root, iteration, tensors=tensors, optimizer={"lr": 1.0}, state={"at": iteration}, keep=1
    )
"""


def child(body: str, *arguments: str | Path) -> str:
    code = CHILD + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill is the same there, and hundreds of fsyncs cost
    nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def is_whole(root: Path, expected: set[int]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kill must not leave anything that looks damaged
        path = latest_checkpoint(root)
    assert path is not None, names(root)
    for other in root.glob("step_*"):  # nor an old one that is half removed
        load_checkpoint(other)
    loaded = load_checkpoint(path)
    at = loaded.iteration
    assert at in expected and loaded.state == {"at": at}
    assert torch.equal(loaded.tensors["policy"]["w"], torch.full((1000,), float(at)))
    return at


@pytest.mark.parametrize("iteration", [2, 1], ids=["the next one", "the same one again"])
def test_kill_at_every_file_operation(memory_path: Path, iteration: int) -> None:
    """The child dies by SIGKILL just before its n-th open, mkdir, rename, unlink, … for n = 1, 2, …
    until none is left; Python's audit events see each of them, and the fsyncs fall between an open
    and the next event."""
    output = child(
        """
        root, iteration = Path(sys.argv[1]), int(sys.argv[2])
        events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir",
                  "os.scandir", "shutil.rmtree")
        save(root / "first", 1)
        for n in range(1, 1000):
            shutil.copytree(root / "first", root / str(n))
            if os.fork() == 0:
                left = [n]
                def hook(event, arguments):
                    if event in events:
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                save(root / str(n), iteration)
                os._exit(0)
            if os.WEXITSTATUS(status := os.wait()[1]) == 0 and not os.WIFSIGNALED(status):
                break
        print(n)
        """,
        memory_path,
        str(iteration),
    )
    cases = int(output)
    assert cases > 30
    found = [is_whole(memory_path / str(n), {1, iteration}) for n in range(1, cases + 1)]
    assert found[0] == 1 and found[-1] == iteration and found == sorted(found)
    for n in range(1, cases + 1):  # and the next save clears whatever the kill left
        save(memory_path / str(n), 3, keep=1, numbers=1000)
        assert names(memory_path / str(n)) == ["step_000003"]


def test_kill_at_random_times_in_a_big_save(tmp_path: Path) -> None:
    """Kills inside the writing of the tensors, which no audit event marks: 24 MB, killed after 0 to
    60 ms."""
    output = child(
        """
        import random, time
        root, pick, killed = Path(sys.argv[1]), random.Random(0), 0
        big = {"policy": {"w": torch.full((1000,), 2.0)}, "big": {"w": torch.ones(6_000_000)}}
        save(root / "first", 1)
        for n in range(16):
            shutil.copytree(root / "first", root / str(n))
            pid = os.fork()
            if pid == 0:
                new = root / str(n)
                save_checkpoint(new, 2, tensors=big, optimizer={}, state={"at": 2}, keep=1)
                os._exit(0)
            time.sleep(pick.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        print(killed)
        """,
        tmp_path,
    )
    assert int(output) >= 4  # otherwise the delays no longer fall into the save
    for n in range(16):
        is_whole(tmp_path / str(n), {1, 2})


def refused(root: Path, message: str) -> None:
    """A save of step 2 fails with the message, and leaves step 1 alone and nothing else."""
    with pytest.raises(CheckpointError, match=message) as caught:
        save(root, 2, keep=1, numbers=1_000_000)
    assert "\n" not in str(caught.value)
    assert names(root) == ["step_000001"] and load_checkpoint(root / "step_000001").state == {
        "at": 1
    }


def test_too_little_space_is_seen_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000)
    )
    monkeypatch.setattr(checkpoint, "_write_folder", lambda *_: pytest.fail("written all the same"))
    refused(
        tmp_path,
        r"step_000002: not saved: No space left on device; it needs 4\.\d MB and 1\.0 MB are free",
    )


# Where a save can fail before it is in place: (function, its n-th call).
CALLS = {
    "save_file": 3,
    "_sync": 6,
    "_checksum": 4,
    "os.rename": 1,
    "Path.mkdir": 2,
    "Path.write_text": 2,
}


@pytest.mark.parametrize(
    ("fails", "call"), [(name, n + 1) for name, count in CALLS.items() for n in range(count)]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_any_write_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, call: int, code: int
) -> None:
    save(tmp_path, 1)
    owner_name, _, name = fails.rpartition(".")
    owner: Any = getattr(checkpoint, owner_name) if owner_name else checkpoint
    real, left = getattr(owner, name), [call]

    def flaky(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if fails == "save_file":
                raise checkpoint.SafetensorError(
                    f"Error while serializing: I/O error: x (os error {code})"
                )
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, flaky)
    refused(tmp_path, f"{os.strerror(code)}" if code == errno.EIO else "it needs .* MB are free")
    assert left[0] <= 0


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    try:
        save(mount, 1)
        refused(mount, r"needs 4\.\d MB and [12]\.\d MB are free")  # by the estimate
        real = shutil.disk_usage
        with (
            monkeypatch.context() as patch
        ):  # the estimate saw space that another process then took
            answers = iter([shutil._ntuple_diskusage(10**9, 0, 10**9)])
            patch.setattr(
                checkpoint.shutil, "disk_usage", lambda path: next(answers, None) or real(path)
            )
            refused(mount, r"No space left on device; it needs 4\.\d MB and [12]\.\d MB are free")
        save(mount, 2, keep=1)
        assert names(mount) == ["step_000002"]
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    output = child(
        """
        import resource
        from editr2.errors import CheckpointError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            large = {"p": {"w": torch.ones(1_000_000)}}
            save_checkpoint(sys.argv[1], 2, tensors=large, optimizer={}, state={})
        except CheckpointError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "step_000002: not saved: File too large; it needs 4.0 MB" in output
    assert names(tmp_path) == ["step_000001"] and load_checkpoint(
        tmp_path / "step_000001"
    ).state == {"at": 1}


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        save(tmp_path / "f", 1)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_discard", refuse)
    with pytest.warns(UserWarning, match="an old checkpoint cannot be removed: Permission denied"):
        save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"
