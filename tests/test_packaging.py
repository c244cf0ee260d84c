from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"editr2": ROOT / "editr2", "editr2_kernels": ROOT / "kernels" / "editr2_kernels"}
BUILT = ("_native.*", "_cuda.*", "_build_info.json", "__pycache__", "*.egg-info")
posix = pytest.mark.skipif(os.name != "posix", reason="the preflight is a POSIX shell script")


def python(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing of the checkout's own build leaks in or out, and without
    compiler warnings."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("csrc", "editr2", "kernels", "tests", "bench", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--verbose",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
    ]
    env = {
        **os.environ,
        "EDITR2_BUILD_CUDA": "0",
    }  # twice the time; test_cuda_build.py looks at that module
    done = subprocess.run(
        [*command, "."], cwd=tree, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"csrc/.*warning:", done.stdout + done.stderr)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(path.match(pattern) or path.parent.match(pattern) for pattern in BUILT)
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    built = {
        name
        for name in packaged
        if re.fullmatch(r"editr2_kernels/_(native|cuda)\..*|.*/_build_info\.json", name)
    }
    assert packaged - built == expected
    assert "editr2_kernels/_build_info.json" in built


@pytest.mark.slow
def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "editr2 = editr2.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import editr2_kernels as k; print(k.__file__); print(k.backends()['cpu'].available)"
    where, available = python(code, tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert Path(where).is_relative_to(tmp_path)
    info = json.loads((tmp_path / "editr2_kernels" / "_build_info.json").read_text())
    assert available == str(info["cpu"]["built"])
    if shutil.which("g++"):
        assert info["cpu"] == {"built": True, "reason": None} and info["compiler"]
    for module in (tmp_path / "editr2_kernels").glob("*.so"):
        assert str(module.read_bytes()).find("/tree0/csrc") < 0, (
            "it holds a path of the machine that built it"
        )


def test_hugging_face_kernels_is_not_shadowed() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    where = python(
        "import kernels; from kernels import get_kernel; print(kernels.__file__)", ROOT
    ).strip()
    assert not Path(where).is_relative_to(ROOT / "kernels")


def test_importing_the_operators_is_light(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import editr2_kernels
        print(time.perf_counter() - start)
        print(*{name.split(".")[0] for name in set(sys.modules) - before})
        print(torch.cuda.is_initialized())
    """
    seconds, names, initialized = python(code, tmp_path).splitlines()
    print(f"import editr2_kernels after torch: {float(seconds):.3f} s")
    imported = set(names.split())
    assert "editr2_kernels" in imported
    assert not imported & {
        "triton",
        "transformers",
        "diffusers",
        "accelerate",
        "peft",
        "editr2",
        "ninja",
        "pybind11",
    }
    assert initialized == "False"


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports absolutely, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_operators_never_import_the_trainer() -> None:
    files = list(PACKAGES["editr2_kernels"].rglob("*.py"))
    assert files
    assert [path.name for path in files if "editr2" in imports(path)] == []


def test_native_code_includes_no_torch_headers() -> None:
    files = [
        path
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".hpp"}
    ]
    assert files
    torch_header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)
    assert [path.name for path in files if torch_header.search(path.read_text())] == []


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.13"])
def test_constraints_pin_what_pyproject_asks_for(version: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "platform_system": "Linux",
    }
    pins: dict[str, str] = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins, f"{pin.name} is pinned twice"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins[pin.name] = specifier.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, asked):
        if requirement.name == "setuptools":  # pinned, it would reach into isolated builds
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(pins[name]), (
            f"{requirement} but {pins[name]} is pinned"
        )
    assert not {"pip", "setuptools", "wheel"} & pins.keys()


class Machine:
    """A PATH with nothing on it but what the preflight itself calls and a Python that lies as
    told."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.cwd = folder
        for tool in ("awk", "df", "ls"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.python()
        self.program("g++", "exit 0")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def python(self, patch: str = "") -> None:
        headers = "import sysconfig; sysconfig.get_path = lambda name: sys.path[-1]"
        (self.cwd / "Python.h").touch()
        setup = (
            f"import sys; sys.path.append('{self.cwd}'); {headers}; {patch or 'pass'}; "
            f"exec(sys.argv[1])"
        )
        self.program("python3", f'exec {sys.executable} -c "{setup}" "$2"')

    def preflight(self, **env: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            ["/bin/sh", str(ROOT / "scripts" / "preflight.sh")],
            cwd=self.cwd,
            env={"PATH": str(self.bin), "EDITR2_MIN_FREE_GB": "0", **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == ""
        return done.returncode, done.stderr.splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@posix
def test_preflight_is_silent_when_all_is_well(machine: Machine) -> None:
    assert machine.preflight() == (0, [])


@posix
def test_preflight_without_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    code, (line,) = machine.preflight()
    assert code == 1 and "python3 not found" in line and "apt-get install" in line


@posix
def test_preflight_with_python_that_does_not_run(machine: Machine) -> None:
    machine.program("python3", "exit 127")
    code, (line,) = machine.preflight()
    assert code == 1 and "does not run" in line


@posix
def test_preflight_with_old_python(machine: Machine) -> None:
    machine.python("sys.version_info = (3, 9, 2, 'final', 0)")
    code, (line,) = machine.preflight()
    assert code == 1 and "Python 3.9 and 3.10 is the oldest" in line and "make PYTHON=" in line


@posix
@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_preflight_without_venv(machine: Machine, module: str) -> None:
    machine.python(f"sys.modules['{module}'] = None")
    code, (line,) = machine.preflight()
    assert (
        code == 1
        and f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in line
    )


@posix
def test_preflight_without_compiler_warns_and_goes_on(machine: Machine) -> None:
    (machine.bin / "g++").unlink()
    code, (line,) = machine.preflight()
    assert (
        code == 0
        and "no C++ compiler" in line
        and "Triton or eager" in line
        and "apt-get install g++" in line
    )
    machine.program("clang++", "exit 0")
    assert machine.preflight() == (0, [])


@posix
def test_preflight_with_wrong_compiler_named(machine: Machine) -> None:
    code, (line,) = machine.preflight(CXX="nowhere++ -flag")
    assert code == 0 and "CXX=nowhere++ -flag not found" in line
    assert machine.preflight(CXX="g++ -flag") == (0, [])


@posix
def test_preflight_without_python_headers_warns_and_goes_on(machine: Machine) -> None:
    (machine.cwd / "Python.h").unlink()
    code, (line,) = machine.preflight()
    assert code == 0 and "no C headers" in line and "-dev" in line


@posix
def test_preflight_with_little_disk(machine: Machine) -> None:
    code, (line,) = machine.preflight(EDITR2_MIN_FREE_GB="1000000")
    assert code == 1 and "the install needs 1000000" in line and "free some disk" in line
    (machine.cwd / ".venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    assert machine.preflight(EDITR2_MIN_FREE_GB="1000000") == (
        0,
        [],
    )  # the large part is there already
