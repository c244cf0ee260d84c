"""Builds csrc/cuda against the emulator: the module `_cuda` with `emulated` true, for CPU tensors.

    python tests/kernels/cuda_emulator/build.py FOLDER [--sanitize]

prints the module's path. `--sanitize` adds AddressSanitizer and UBSan; run such a module under
LD_PRELOAD="$(g++ -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
MODULE = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # as nvcc -fmad=false
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DEDITR2_EMULATED",
    "'-DEDITR2_CUDA_ARCHITECTURES=\"emulated\"'",
]
# No recovery: the first finding ends the process, which no test can overlook.
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def absence() -> str | None:
    """Why the emulator cannot be built here."""
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"the emulator switches stacks on x86-64 and AArch64 only, not {platform.machine()}"
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "the CUDA emulator needs g++ on Linux"
    missing = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def build(folder: Path, sanitize: bool = False) -> Path:
    """The module's path; does nothing where it is up to date. Raises RuntimeError with the
    compiler's words."""
    import pybind11

    includes = [HERE, CSRC / "cuda", pybind11.get_include(), sysconfig.get_path("include")]
    lines = [
        "rule compile",
        f"  command = g++ {' '.join(FLAGS)} $extra {' '.join(f'-I{path}' for path in includes)} "
        f"-MMD -MF $out.d "
        "-x c++ -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ -shared -o $out $in {' '.join(SANITIZE if sanitize else [])}",
    ]
    objects = []
    # The bindings take the longest and gain nothing from optimisation or from the sanitizers.
    units = [
        (CSRC / "bindings_cuda.cpp", ["-O0"]),
        (HERE / "emulator.cpp", ["-O1"]),
        (HERE / "faults.cu", ["-O1"]),
    ]
    units += [(path, ["-O1"]) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    for source, extra in units:
        if sanitize and source.parent != CSRC:
            extra = [*extra, *SANITIZE]
        lines += [f"build {source.stem}.o: compile {source}", f"  extra = {' '.join(extra)}"]
        objects.append(f"{source.stem}.o")
    lines += [f"build {MODULE}: link {' '.join(objects)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    with open(folder / "lock", "w") as lock:  # tests side by side share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the CUDA emulator does not compile:\n{done.stdout}{done.stderr}")
    return folder / MODULE


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("editr2_emulated._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the CUDA kernels against the emulator.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    given = parser.parse_args()
    print(build(given.folder, given.sanitize))
