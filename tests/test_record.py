"""A run that was killed anywhere and started again leaves what one leaves that was never killed:
the same rows, in the same order, and the same weights, moments and generators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from editr2.run.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """A run of a method that nothing interrupts, and the points that it passes."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def get(method: str) -> tuple[Path, list[str]]:
        if method not in made:
            with runs.dying_at(0, lambda: None) as passed:
                made[method] = (
                    runs.train_once(tmp_path_factory.mktemp(method) / "run", method),
                    passed,
                )
        return made[method]

    return get


def assert_same(runs: ModuleType, one: Path, two: Path) -> None:
    first, second = runs.record(one), runs.record(two)
    assert [(r["event"], r.get("name"), r["iteration"]) for r in first] == [
        (r["event"], r.get("name"), r["iteration"]) for r in second
    ]
    assert first == second
    a, b = (load_checkpoint(run / "checkpoints" / "step_000003") for run in (one, two))
    assert a.tensors.keys() == b.tensors.keys()
    for group, values in a.tensors.items():
        assert values and all(
            torch.equal(value, b.tensors[group][name]) for name, value in values.items()
        ), group
    assert str(a.optimizer) == str(b.optimizer) and str(a.rng) == str(b.rng)
    for name in ("before", "after"):
        assert (one / "strips" / f"{name}.json").read_text() == (
            two / "strips" / f"{name}.json"
        ).read_text()


def killed_and_resumed(runs: ModuleType, folder: Path, method: str, number: int) -> Path:
    def die() -> None:
        raise runs.Killed

    with pytest.raises(runs.Killed), runs.dying_at(number, die):
        runs.train_once(folder, method)
    return runs.train_once(folder, method)


def numbers(passed: list[str], wanted: list[tuple[str, int]]) -> list[int]:
    """The numbers of points: name and which of its passings, from 1."""
    places = {name: [i for i, p in enumerate(passed, 1) if p == name] for name, _ in wanted}
    return [places[name][which - 1] for name, which in wanted]


# The row before and after it is written: start, before, train 0, during 1, train 1, during 2, train
# 2, during 3, after, comparison.
FIXED = [
    ("evaluate: before", 1),  # in the evaluation before training: its start row is there
    ("append: after", 2),  # before the first iteration
    ("accumulate_gradient: before", 1),  # in the first iteration: no checkpoint yet
    ("evaluate: before", 2),  # in an evaluation during, the checkpoint older than it
    ("_write_folder: after", 1),  # in a checkpoint
    (
        "save: after",
        1,
    ),  # between a checkpoint and the evaluation of its weights: that row was lost for ever
    ("step: after", 3),  # in an iteration, the weights changed
    ("evaluate: after", 5),  # in the evaluation after training
    ("append: before", 10),  # before the comparison
    ("build_report: before", 1),
]


@pytest.mark.parametrize("name, which", FIXED)
def test_killed_at_a_point(runs, whole, tmp_path, name, which):
    uninterrupted, passed = whole("ema")
    (number,) = numbers(passed, [(name, which)])
    assert_same(runs, uninterrupted, killed_and_resumed(runs, tmp_path / "run", "ema", number))


@pytest.mark.parametrize("method", ["lora", "nft", "text", "kl"])
def test_killed_with_every_method(runs, whole, tmp_path, method):
    uninterrupted, passed = whole(method)
    (number,) = numbers(passed, [("evaluate: before", 3)])  # behind the checkpoint at 2
    assert_same(runs, uninterrupted, killed_and_resumed(runs, tmp_path / "run", method, number))


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["ema", "lora", "nft", "text", "kl"])
def test_killed_at_every_point(runs, whole, tmp_path, method):
    uninterrupted, passed = whole(method)
    for number in range(1, len(passed) + 1):
        assert_same(
            runs, uninterrupted, killed_and_resumed(runs, tmp_path / str(number), method, number)
        )


def test_killed_again_and_again(runs, whole, tmp_path):
    """At the next point each time, as far as it got."""
    uninterrupted, passed = whole("ema")

    def die() -> None:
        raise runs.Killed

    for number in (3, 9, 14, 11):
        with pytest.raises(runs.Killed), runs.dying_at(number, die):
            runs.train_once(tmp_path / "run", "ema")
    assert_same(runs, uninterrupted, runs.train_once(tmp_path / "run", "ema"))


def launch(
    run: Path, number: int = 0, rank: int = 0, how: str = "exit"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        *command,
        str(ROOT / "tests" / "killed_runs.py"),
        str(run),
        str(number),
        str(rank),
        how,
    ]
    return subprocess.run(
        command, cwd=ROOT, timeout=200, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_two_processes_of_which_one_is_killed_or_told_to_stop(runs, whole, tmp_path):
    """Killed by os._exit, which cleans up as little as a SIGKILL; the launcher then ends the
    other."""
    assert launch(tmp_path / "whole").returncode == 0
    _, passed = whole("ema")
    points = numbers(
        passed,
        [("evaluate: before", 1), ("evaluate: before", 3), ("step: after", 3), ("save: after", 1)],
    )
    for number, rank in zip(points, (0, 0, 1, 0), strict=True):
        run = tmp_path / f"{number}"
        assert launch(run, number, rank).returncode != 0
        assert launch(run).returncode == 0
        assert_same(runs, tmp_path / "whole", run)
    assert len(load_checkpoint(tmp_path / "whole" / "checkpoints" / "step_000003").rng) == 2
    # Told to stop, one of them is enough: both finish the iteration and agree.
    (number,) = numbers(passed, [("step: after", 1)])
    said = launch(tmp_path / "told", number, 1, "term").stderr
    for rank in (0, 1):
        assert (
            f"{rank} stopped: stopped by SIGTERM; {tmp_path / 'told'} is saved at iteration 1 of 3"
            in said
        )
    assert launch(tmp_path / "told", how="term").returncode == 0
    assert_same(runs, tmp_path / "whole", tmp_path / "told")
