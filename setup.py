"""The build step of the native kernels, and the repository's address; everything else about the
package stands in pyproject.toml.

A ninja file with plain compiler rules, so that each instruction set gets its own flags and the
result
needs no torch headers. Two modules: `_native` for the CPU and, where nvcc is found, `_cuda` (which
needs
no GPU to be built). Honours CXX, CXXFLAGS, LDFLAGS, CUDA_HOME and EDITR2_BUILD_CUDA=0|1|auto.

Without a compiler the package installs without its module and says so; a failing compile is an
error.
Either way `editr2_kernels/_build_info.json` records what was built, with what, and why the rest was
not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

REPOSITORY = ""
"""Where this is published, as https://host/owner/editr2: the one place, filled in by a release
(docs/releasing.md). The package's links and those of README.md on a registry's page come from it;
without it there are none."""

PACKAGE = "editr2_kernels"
MODULE = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
CUDA_MODULE = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
BUILD_INFO = "_build_info.json"

COMMON = [
    "cpu/dispatch.cpp",
    "cpu/pool.cpp",
    "cpu/ops.cpp",
    "cpu/group_advantage.cpp",
    "cpu/tokens.cpp",
    "bindings.cpp",
]
HEADERS = [
    "credit.h",
    "philox.h",
    "transition.h",
    "guidance.h",
    "objective.h",
    "softmax.h",
    "cpu/kernels.h",
    "cpu/lanes.h",
    "cpu/block.h",
    "cpu/velocity.h",
    "cpu/dispatch.h",
    "cpu/pool.h",
    "cpu/ops.h",
    "cpu/tokens.h",
]
PER_ISA = ["cpu/latent_tile.cpp", "cpu/nft_tile.cpp", "cpu/token_chunk.cpp"]
ISA_FLAGS = {  # baseline is whatever the compiler targets by default: SSE2 on x86-64
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
# No contraction: a product and a sum that merge on one instruction set only would break replay.
# These come after CXXFLAGS, whose -ffast-math would take the rules for NaN away.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-fast-math",
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
# Exact arithmetic, as on the CPU; -v makes ptxas say what each kernel takes of a multiprocessor.
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
]
CUDA_TARGETS = (
    "80",
    "90",
    "100",
)  # Ampere, Hopper, Blackwell; the PTX of the last serves what comes after


@dataclass(frozen=True)
class Compiler:
    command: list[str]
    version: str


def find_compiler() -> Compiler | str:
    """The C++ compiler, or the reason why there is none."""
    if os.name != "posix":
        return (
            f"the native kernels need a GCC-compatible compiler on a POSIX system, not "
            f"{sys.platform}"
        )
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        return f"no Python headers ({headers.name}): install python3-dev"
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["g++", "c++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            version = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=False
            )
            if version.returncode:
                raise CompileError(f"CXX: {candidate!r} --version failed: {version.stderr.strip()}")
            return Compiler(command, version.stdout.splitlines()[0])
    return (
        f"no C++ compiler: {f'CXX={asked!r} was' if asked else 'g++, c++ and clang++ were'} not "
        f"found"
    )


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    targets: tuple[str, ...]

    @property
    def architectures(self) -> list[str]:
        return [*(f"sm_{target}" for target in self.targets), f"compute_{self.targets[-1]}"]

    @property
    def flags(self) -> list[str]:
        code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in self.targets]
        return [
            *CUDA_FLAGS,
            *code,
            f"-gencode=arch=compute_{self.targets[-1]},code=compute_{self.targets[-1]}",
        ]


def find_nvcc(compiler: Compiler | str) -> Nvcc | str:
    """nvcc from PATH, then CUDA_HOME, or the reason why the CUDA kernels are not built."""
    asked = os.environ.get("EDITR2_BUILD_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise CompileError(f"EDITR2_BUILD_CUDA: got {asked!r}, accepted: 0, 1 or auto")
    if asked == "0":
        return "EDITR2_BUILD_CUDA=0 when it was built"
    found = compiler if isinstance(compiler, str) else _nvcc()
    if isinstance(found, str) and asked == "1":
        raise CompileError(f"EDITR2_BUILD_CUDA=1: {found}")
    return found


def _nvcc() -> Nvcc | str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (
        shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    )
    if path is None:
        return (
            f"nvcc was not found on "
            f"PATH{f' or in {home}/bin' if home else ', and CUDA_HOME is not set'}"
        )
    version, code = (
        subprocess.run([path, option], capture_output=True, text=True, check=False).stdout
        for option in ("--version", "--list-gpu-code")
    )
    targets = tuple(target for target in CUDA_TARGETS if f"sm_{target}" in code.split())
    if not targets:
        return f"{path} compiles for none of {', '.join(f'sm_{target}' for target in CUDA_TARGETS)}"
    release = re.search(r"release [^,]+, (V\S+)", version)
    return Nvcc(path, f"nvcc {release[1]}" if release else path, targets)


def cuda_resources(logs: list[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """What ptxas says of every kernel and target: registers, bytes of shared memory, of stack and
    of spills."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for log in logs:
        entry: dict[str, int] = {}
        for line in log.read_text().splitlines():
            if start := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
                entry = kernels.setdefault(_kernel_name(start[1]), {}).setdefault(start[2], {})
            elif bytes_ := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
            ):
                entry.update(
                    stack=int(bytes_[1]), spill_stores=int(bytes_[2]), spill_loads=int(bytes_[3])
                )
            elif used := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                entry.update(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    return kernels


def _kernel_name(mangled: str) -> str:
    """The last of the length-prefixed names of a mangled function: _ZN6editr23gpu11step_kernelE...
    -> step_kernel."""
    rest, name = mangled[3:] if mangled.startswith("_ZN") else mangled[2:], mangled
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def cuda_sources(csrc: Path) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def ninja_text(compiler: Compiler, nvcc: Nvcc | None, csrc: Path) -> str:
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
    link = [*shlex.split(os.environ.get("LDFLAGS", "")), *darwin, "-pthread", "-ldl"]
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

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def unit(source: str, obj: str, extra: str = "") -> None:
        lines.extend([f"build {obj}: compile {escaped(csrc / source)}", f"  extra = {extra}"])
        objects.append(obj)

    unit("bindings.cpp", "bindings.o", "$includes")  # first: it takes the longest
    for isa, isa_flags in ISA_FLAGS.items():
        if x86 or isa == "baseline":
            macros = [f"-DEDITR2_NS=editr2_{isa}", f"'-DEDITR2_NAME=\"{isa}\"'"]
            for source in PER_ISA:
                unit(source, f"{Path(source).stem}_{isa}.o", " ".join([*isa_flags, *macros]))
    for source in COMMON[:-1]:
        unit(source, Path(source).stem + ".o")
    lines.extend([f"build {MODULE}: link {' '.join(objects)}", f"default {MODULE}", ""])
    if nvcc is None:
        return "\n".join(lines)
    host = ["-ccbin", *compiler.command] if len(compiler.command) == 1 else []
    lines.extend(
        [
            "nvcc = " + shlex.join([nvcc.path, *host]),
            "nvcc_flags = " + shlex.join(nvcc.flags),
            # ptxas reports on stderr also where all is well.
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d $nvcc_flags -c $in -o $out > $out.log 2>&1 || { cat "
            "$out.log; exit 1; }",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = nvcc $out",
            # nvcc knows where its runtime lies. Hidden, it is not mistaken for another library's.
            "rule link_cuda",
            "  command = $nvcc -shared -cudart static -Xlinker=--exclude-libs=ALL -o $out $in",
            "  description = link $out",
        ]
    )
    macro = shlex.quote(f'-DEDITR2_CUDA_ARCHITECTURES="{" ".join(nvcc.architectures)}"')
    lines.extend(
        [
            f"build cuda_bindings.o: compile {escaped(csrc / 'bindings_cuda.cpp')}",
            f"  extra = $includes {macro}",
        ]
    )
    cuda_objects = ["cuda_bindings.o"]
    for source in cuda_sources(csrc):
        lines.append(f"build cuda_{source.stem}.o: nvcc {escaped(source)}")
        cuda_objects.append(f"cuda_{source.stem}.o")
    lines.extend(
        [f"build {CUDA_MODULE}: link_cuda {' '.join(cuda_objects)}", f"default {CUDA_MODULE}", ""]
    )
    return "\n".join(lines)


def build_native(
    build_dir: Path, csrc: Path = ROOT / "csrc"
) -> tuple[list[Path], dict[str, object]]:
    """Builds the modules in `build_dir`; returns their paths (none without a compiler) and the
    build info."""
    compiler = find_compiler()
    nvcc = find_nvcc(compiler)
    cuda: dict[str, object] = {"built": False, "reason": nvcc}
    if isinstance(compiler, str):
        print(f"editr2_kernels: installing without native kernels: {compiler}", file=sys.stderr)
        info = {
            "cpu": {"built": False, "reason": compiler},
            "cuda": cuda,
            "compiler": None,
            "flags": None,
        }
        return [], info
    csrc = csrc.resolve()
    build_dir.mkdir(parents=True, exist_ok=True)
    with_cuda = nvcc if isinstance(nvcc, Nvcc) else None
    (build_dir / "build.ninja").write_text(ninja_text(compiler, with_cuda, csrc))
    ninja = subprocess.run([sys.executable, "-m", "ninja"], cwd=build_dir, check=False)
    if ninja.returncode:
        also = (
            f" and {with_cuda.version} (EDITR2_BUILD_CUDA=0 leaves the CUDA kernels out)"
            if with_cuda
            else ""
        )
        raise CompileError(f"the native kernels failed to compile with {compiler.version}{also}")
    if with_cuda is None:
        print(f"editr2_kernels: without CUDA kernels: {nvcc}", file=sys.stderr)
    else:
        cuda = {
            "built": True,
            "reason": None,
            "compiler": with_cuda.version,
            "architectures": with_cuda.architectures,
            "flags": with_cuda.flags,
            "kernels": cuda_resources(
                [build_dir / f"cuda_{source.stem}.o.log" for source in cuda_sources(csrc)]
            ),
        }
    info = {
        "cpu": {"built": True, "reason": None},
        "cuda": cuda,
        "compiler": compiler.version,
        "flags": {"common": FLAGS, **ISA_FLAGS, "CXXFLAGS": os.environ.get("CXXFLAGS", "")},
    }
    return [build_dir / name for name in (MODULE, *([CUDA_MODULE] if with_cuda else []))], info


class BuildNative(build_ext):
    """Puts the modules and the build info into the wheel's tree and, in place, beside the
    sources."""

    def run(self) -> None:
        modules, info = build_native(Path(self.build_temp).resolve() / "native")
        for package in self._packages():
            package.mkdir(parents=True, exist_ok=True)
            for name in (MODULE, CUDA_MODULE):
                # Away with a stale module, and never new bytes in the old file: a process may have
                # it mapped.
                (package / name).unlink(missing_ok=True)
            for module in modules:
                shutil.copy2(module, package / module.name)
            (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def _packages(self) -> list[Path]:
        built = Path(self.build_lib) / PACKAGE
        if not self.inplace:
            return [built]
        return [Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE)).resolve()]

    def _files(self) -> list[str]:
        return [
            name
            for name in (MODULE, CUDA_MODULE, BUILD_INFO)
            if any((p / name).exists() for p in self._packages())
        ]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in self._files()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        (source,) = self._packages()
        return {
            str(Path(self.build_lib) / PACKAGE / name): str(source / name) for name in self._files()
        }


def project_urls(repository: str) -> dict[str, str]:
    """The links of a registry's page."""
    if not repository:
        return {}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def readme(repository: str) -> str:
    """README.md for a registry's page, where the tree is not: its links lead to the repository."""
    text = (ROOT / "README.md").read_text("utf-8")
    if not repository:
        return text

    def whole(kind: str) -> Callable[[re.Match[str]], str]:
        return lambda link: f"{link[1]}({repository}/{kind}/main/{link[2]})"

    target = r"\((?![a-z]+:|#)([^\s()]+)\)"
    text = re.sub(rf"(!\[[^\[\]]*\]){target}", whole("raw"), text)
    return re.sub(rf"(\]){target}", whole("blob"), text)


if __name__ == "__main__":
    setup(
        long_description=readme(REPOSITORY),
        long_description_content_type="text/markdown",
        project_urls=project_urls(REPOSITORY),
        ext_modules=[
            Extension(
                f"{PACKAGE}._native",
                sources=[f"csrc/{source}" for source in [*COMMON, *PER_ISA]],
                depends=[f"csrc/{header}" for header in HEADERS],
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )
