"""What `import editr2` gives: every public name with its type, loaded when asked for, under every
name that was documented."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.version import Version

import editr2
from editr2 import moved

ROOT = Path(__file__).parent.parent
DOCUMENTED = (
    "editr2.config.PRESETS",
    "editr2.integrations.original",
    "editr2.integrations.patch",
    "editr2.integrations.unpatch",
    "editr2.integrations.diffusers.FlowMatchSDEScheduler",
    "editr2.rewards.brightness.Brightness",
    "editr2.sessions.load_sessions",
    "editr2.sessions.save_sessions",
    "editr2.sessions.survey",
    "editr2.sessions.validate",
)
"""Import paths on the pages and in the recipes of 0.1, beside the public names themselves."""


PROJECT = ROOT / "tests" / "user_project"


def expected_errors(*files: Path) -> set[tuple[str, int]]:
    """Lines that say so."""
    return {
        (file.name, at)
        for file in files
        for at, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if line.endswith("# error")
    }


def test_a_type_checker_knows_every_public_name(tmp_path):
    """As a user's own mypy sees it, in its strict mode: nothing is Any, a name that there is not is
    an error, and a project that uses the names has those errors that it should have."""
    pytest.importorskip("mypy", reason="comes with the extra `dev`")
    shutil.copytree(PROJECT, tmp_path, dirs_exist_ok=True)
    lines = ["import editr2", *(f"reveal_type(editr2.{name})" for name in editr2.__all__)]
    lines += ["reveal_type(editr2.Config().train.lr)", "editr2.Confg  # error"]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    # Types of others are skipped: following them takes minutes.
    others = "torch.*,numpy.*,PIL.*,transformers.*,diffusers.*,accelerate.*,peft.*,rich.*"
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\nfollow_imports = silent\nstrict = true\n"
        f"mypy_path = {ROOT}:{ROOT / 'kernels'}\n[mypy-{others}]\nfollow_imports = skip\n"
    )
    files = sorted(tmp_path.glob("*.py"))
    assert len(files) == 5
    command = [sys.executable, "-m", "mypy", "--cache-dir=cache", *(file.name for file in files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("user.py:")]
    types = [m[1] for line in said if (m := re.search(r'Revealed type is "(.*)"$', line))]
    assert len(types) == len(editr2.__all__) + 1, done.stdout
    untyped = [n for n, found in zip(editr2.__all__, types, strict=False) if found == "Any"]
    assert not untyped and types[-1] == "float"
    assert 'Module has no attribute "Confg"' in done.stdout
    errors = re.findall(r"^(\w+\.py):(\d+): error:", done.stdout, re.M)
    assert {(name, int(line)) for name, line in errors} == expected_errors(*files), done.stdout


@pytest.mark.exhaustive
def test_pyright_knows_them_as_well(tmp_path):
    """In strict mode where no types of torch come in."""
    pytest.importorskip("basedpyright", reason="comes with the extra `dev`")
    settings = {
        "include": [str(PROJECT)],
        "extraPaths": [str(folder) for folder in (PROJECT, ROOT, ROOT / "kernels")],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.10",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(tmp_path)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)["generalDiagnostics"]
    found = {
        (Path(said["file"]).name, said["range"]["start"]["line"] + 1)
        for said in told
        if said["severity"] == "error"
    }
    assert found == expected_errors(*PROJECT.glob("*.py")), done.stdout


def test_the_version_is_that_of_the_metadata(monkeypatch):
    assert editr2.__version__ == version("editr2")

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert str(Version(editr2.__version__)) == "0+unknown"  # a source tree, and still a version


def test_importing_it_loads_nothing_and_it_says_what_it_has():
    code = "import sys, editr2\nprint(*dir(editr2))\n"
    code += "print(*sorted(m for m in sys.modules if m.split('.')[0] in ('editr2', 'torch')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, modules = done.stdout.splitlines()
    assert names.split() == editr2.__all__ == sorted(editr2.__all__)
    assert modules == "editr2"


@pytest.mark.parametrize("path", DOCUMENTED)
def test_what_was_documented_is_there(path):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("old", moved.MOVED)
def test_an_old_name_works_and_says_what_it_is_called_now(old):
    new, until = moved.MOVED[old]
    module, _, name = old.rpartition(".")
    home, _, last = new.rpartition(".")
    with pytest.warns(DeprecationWarning) as told:
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(home), last)
    (warning,) = told
    assert str(warning.message) == f"{old} is {new} now (the old name goes in editr2 {until})"
    assert warning.filename == __file__  # whoever used it, or nobody would be shown it
    assert Version(version("editr2")) < Version(until), "its time has come: take the row out"


def test_a_name_that_never_was_is_an_attribute_error():
    module = importlib.import_module("editr2.policies.unified")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match=r"'editr2\.policies\.unified' has no .*'Nothing'"):
            _ = module.Nothing
        importlib.import_module("editr2.policies.unified.model")
