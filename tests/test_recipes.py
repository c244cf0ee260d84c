"""CONTRIBUTING.md's recipes, applied to a copy of the tree and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipes(beside) -> ModuleType:
    return beside("recipes")


def is_test(name: str) -> bool:
    return name.startswith("tests/")


def test_there_are_four_and_each_is_one_file_and_a_test(recipes):
    assert list(recipes.RECIPES) == ["A sampler", "A loss", "An editor", "A reward"]
    for diff in recipes.RECIPES.values():
        touched = recipes.files(diff)
        assert [is_test(name) for name in sorted(touched, key=is_test)] == [False, True]
        # A literal of one line that has to be opened is all that anybody rewrites.
        assert sum(removed for _, removed in touched.values()) <= 1


@pytest.mark.slow
def test_they_apply_and_run(recipes, tmp_path):
    """All four to one copy, and their tests, those of the tables, and the rules of the house."""
    for name in ("editr2", "kernels", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "cuda_emulator")
            shutil.copytree(source, tmp_path / name, ignore=skip)
        else:
            shutil.copy(source, tmp_path)
    for diff in recipes.RECIPES.values():
        done = subprocess.run(
            ["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    touched = [name for diff in recipes.RECIPES.values() for name in recipes.files(diff)]
    tests = [name for name in touched if is_test(name)]
    both = "tests/test_losses.py::test_every_pair_trains_or_says_why_not"
    new = [f"{both}[rwr-cps]", f"{both}[grpo-ancestral]", f"{both}[rwr-ancestral]"]
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *new],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = len(tests) + len(new)
    assert f"{passed} passed" in done.stdout, done.stdout
