"""The build step of the native kernels; everything else about the package stands in pyproject.toml.

A ninja file with plain compiler rules, so that each instruction set gets its own flags and the result
needs no torch headers. Honours CXX, CXXFLAGS, LDFLAGS and EDITR2_BUILD_CUDA=0|1|auto.

Without a compiler the package installs without the module and says so; a failing compile is an error.
Either way `editr2_kernels/_build_info.json` records what was built and why the rest was not.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGE = "editr2_kernels"
MODULE = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
BUILD_INFO = "_build_info.json"

COMMON = ["cpu/dispatch.cpp", "cpu/pool.cpp", "cpu/ops.cpp", "cpu/group_advantage.cpp", "bindings.cpp"]
HEADERS = [
    "philox.h",
    "transition.h",
    "cpu/kernels.h",
    "cpu/lanes.h",
    "cpu/dispatch.h",
    "cpu/pool.h",
    "cpu/ops.h",
]
PER_ISA = "cpu/chunk.cpp"
ISA_FLAGS = {  # baseline is whatever the compiler targets by default: SSE2 on x86-64
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
# No contraction: a product and a sum that merge on one instruction set only would break replay.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # false positives inside the AVX-512 headers of GCC 12
]
CUDA_ABSENT = "CUDA C++ kernels are not part of this release"


@dataclass(frozen=True)
class Compiler:
    command: list[str]
    version: str


def find_compiler() -> Compiler | str:
    """The C++ compiler, or the reason why there is none."""
    if os.name != "posix":
        return f"the native kernels need a GCC-compatible compiler on a POSIX system, not {sys.platform}"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        return f"no Python headers ({headers.name}): install python3-dev"
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["g++", "c++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            if version.returncode:
                raise CompileError(f"CXX: {candidate!r} --version failed: {version.stderr.strip()}")
            return Compiler(command, version.stdout.splitlines()[0])
    return f"no C++ compiler: {f'CXX={asked!r} was' if asked else 'g++, c++ and clang++ were'} not found"


def cuda_status() -> dict[str, object]:
    asked = os.environ.get("EDITR2_BUILD_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise CompileError(f"EDITR2_BUILD_CUDA: got {asked!r}, accepted: 0, 1 or auto")
    if asked == "1":
        raise CompileError(f"EDITR2_BUILD_CUDA=1: {CUDA_ABSENT}")
    return {"built": False, "reason": CUDA_ABSENT}


def ninja_text(compiler: Compiler, csrc: Path) -> str:
    """The build file; its products land in the directory that ninja runs in."""
    import pybind11

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *shlex.split(os.environ.get("CXXFLAGS", "")),
        *FLAGS,
        f"-ffile-prefix-map={csrc}=csrc",
        *(["-DEDITR2_X86"] if x86 else []),
    ]
    darwin = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = [*shlex.split(os.environ.get("LDFLAGS", "")), *darwin, "-pthread"]
    lines = [
        "ninja_required_version = 1.5",
        "cxx = " + shlex.join(compiler.command),
        "flags = " + shlex.join(flags),
        "includes = " + shlex.join(f"-I{path}" for path in includes),
        "link = " + shlex.join(link),
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = c++ $out",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags $link",
        "  description = link $out",
    ]
    objects: list[str] = []

    def unit(source: str, obj: str, extra: str = "") -> None:
        path = str(csrc / source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.extend([f"build {obj}: compile {path}", f"  extra = {extra}"])
        objects.append(obj)

    unit("bindings.cpp", "bindings.o", "$includes")  # first: it takes the longest
    for isa, isa_flags in ISA_FLAGS.items():
        if x86 or isa == "baseline":
            macros = [f"-DEDITR2_NS=editr2_{isa}", f"'-DEDITR2_NAME=\"{isa}\"'"]
            unit(PER_ISA, f"chunk_{isa}.o", " ".join([*isa_flags, *macros]))
    for source in COMMON[:-1]:
        unit(source, Path(source).stem + ".o")
    lines.extend([f"build {MODULE}: link {' '.join(objects)}", f"default {MODULE}", ""])
    return "\n".join(lines)


def build_native(build_dir: Path, csrc: Path = ROOT / "csrc") -> tuple[Path | None, dict[str, object]]:
    """Builds the module in `build_dir`; returns its path (None without a compiler) and the build info."""
    cuda = cuda_status()
    compiler = find_compiler()
    if isinstance(compiler, str):
        print(f"editr2_kernels: installing without native kernels: {compiler}", file=sys.stderr)
        info = {"cpu": {"built": False, "reason": compiler}, "cuda": cuda, "compiler": None, "flags": None}
        return None, info
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(ninja_text(compiler, csrc.resolve()))
    ninja = subprocess.run([sys.executable, "-m", "ninja"], cwd=build_dir, check=False)
    if ninja.returncode:
        raise CompileError(f"the native kernels failed to compile with {compiler.version}")
    info = {
        "cpu": {"built": True, "reason": None},
        "cuda": cuda,
        "compiler": compiler.version,
        "flags": {"common": FLAGS, **ISA_FLAGS, "CXXFLAGS": os.environ.get("CXXFLAGS", "")},
    }
    return build_dir / MODULE, info


class BuildNative(build_ext):
    """Puts the module and the build info into the wheel's tree and, in place, beside the sources."""

    def run(self) -> None:
        module, info = build_native(Path(self.build_temp).resolve() / "native")
        for package in self._packages():
            package.mkdir(parents=True, exist_ok=True)
            # Away with a stale module, and never new bytes in the old file: a process may have it mapped.
            (package / MODULE).unlink(missing_ok=True)
            if module is not None:
                shutil.copy2(module, package / MODULE)
            (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def _packages(self) -> list[Path]:
        built = Path(self.build_lib) / PACKAGE
        if not self.inplace:
            return [built]
        return [Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE)).resolve()]

    def _files(self) -> list[str]:
        return [name for name in (MODULE, BUILD_INFO) if any((p / name).exists() for p in self._packages())]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in self._files()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        (source,) = self._packages()
        return {str(Path(self.build_lib) / PACKAGE / name): str(source / name) for name in self._files()}


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                f"{PACKAGE}._native",
                sources=[f"csrc/{source}" for source in [*COMMON, PER_ISA]],
                depends=[f"csrc/{header}" for header in HEADERS],
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )
