"""The CUDA module as it was built: what ptxas and the machine code say of it. Needs nvcc at build
time, no GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import editr2_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(editr2_kernels.__file__).parent
# Kernels over latents or logits, by the tensors they read: those that only write have no loads to
# look for.
ELEMENTWISE = {
    "normal_kernel": 0,
    "step_kernel": 3,
    "replay_kernel": 4,
    "backward_kernel": 5,
    "row_norms_kernel": 3,
    "row_dots_kernel": 5,
    "nft_kernel": 5,
    "nft_backward_kernel": 5,
    "token_kernel": 1,
    "token_backward_kernel": 1,
}
# Kernels that write latents or logits, by the places where they store eight elements.
WRITERS = {
    "normal_kernel": 1,
    "step_kernel": 2,
    "backward_kernel": 6,
    "nft_backward_kernel": 1,
    "token_backward_kernel": 1,
}
ENTRY = r"\.entry \S*?\d([a-z_]+_kernel)E\S*\((.*?)\n\}"  # a kernel's name and body in PTX
WIDE = 3  # 16-byte stores of a place: two of fp32, one of the half-width dtypes
# No division, root or exponential, which are made of fused steps inside: any FFMA were a contracted
# product and sum.
EXACT = ("replay_kernel", "nft_kernel", "nft_backward_kernel")


@pytest.fixture(scope="module")
def info() -> dict[str, Any]:
    path = PACKAGE / "_build_info.json"
    cuda = (
        json.loads(path.read_text())["cuda"]
        if path.is_file()
        else {"built": False, "reason": "nothing was built"}
    )
    if not cuda["built"]:
        pytest.skip(f"the CUDA module is not built: {cuda['reason']}")
    return cuda


@pytest.fixture(scope="module")
def module_path(info: dict[str, Any]) -> Path:
    (path,) = PACKAGE.glob("_cuda.*")
    return path


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin:
        found = shutil.which(
            "cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
        )
    if found is None:
        pytest.skip("cuobjdump is neither on PATH nor in the package triton")
    return found


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def sass(
    request: pytest.FixtureRequest, info: dict[str, Any], module_path: Path, cuobjdump: str
) -> dict[str, list[str]]:
    """The opcodes of every kernel, in order."""
    if request.param not in info["architectures"]:
        pytest.skip(f"{info['compiler']} does not compile for {request.param}")
    command = [cuobjdump, "-sass", "-arch", request.param, str(module_path)]
    kernels: dict[str, list[str]] = {}
    opcodes: list[str] = []
    for line in subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if start := re.search(r"Function : \S*?\d([a-z_]+_kernel)E", line):
            opcodes = kernels.setdefault(start[1], [])
        elif opcode := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            opcodes.append(opcode[1])
    return kernels


def test_every_target_is_built(info: dict[str, Any]) -> None:
    targets = info["architectures"][:-1]
    assert targets and info["architectures"][-1] == targets[-1].replace("sm_", "compute_")
    assert set(targets) <= {"sm_80", "sm_90", "sm_100"}
    assert "-fmad=false" in info["flags"]
    assert set(ELEMENTWISE) < set(info["kernels"])
    assert all(set(entry) == set(targets) for entry in info["kernels"].values())


def test_registers_and_spills(info: dict[str, Any]) -> None:
    for name, targets in info["kernels"].items():
        for target, used in targets.items():
            where = f"{name} on {target}: {used}"
            assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, where
            assert used["registers"] <= 80, where  # three blocks of 256 threads a multiprocessor
            assert used["shared"] <= 1024, where


def test_machine_code(sass: dict[str, list[str]]) -> None:
    assert set(ELEMENTWISE) < set(sass)
    for name, inputs in ELEMENTWISE.items():
        assert sum(opcode.startswith("LDG.E.128") for opcode in sass[name]) >= inputs, name
    for name, opcodes in sass.items():
        assert len(opcodes) > 20, name
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], name
        float_atomic = re.compile(r"(RED|ATOM)\w*\..*(F16|F32|F64|BF16)")
        assert not [opcode for opcode in opcodes if float_atomic.match(opcode)], name
    for name in EXACT:
        assert "FFMA" not in {opcode.split(".")[0] for opcode in sass[name]}, name


def test_a_row_of_logits_is_under_way_before_it_is_used(sass: dict[str, list[str]]) -> None:
    """It is read once: a tile's two places, of fp32 two loads and of the others one, and then what
    is done with it, which a vote on the maximum begins."""
    opcodes = sass["token_kernel"]
    loads = [at for at, opcode in enumerate(opcodes) if opcode.startswith("LDG.E.128")]
    votes = [at for at, opcode in enumerate(opcodes) if opcode.startswith("VOTE")]
    assert len(loads) == 2 * WIDE and max(loads) < min(votes)


def test_every_wide_path_stores_sixteen_bytes(sass: dict[str, list[str]]) -> None:
    """None is taken apart: the narrow stores are those of the narrow paths, an element each."""
    for name, places in WRITERS.items():
        stores = Counter(opcode for opcode in sass[name] if opcode.startswith("STG"))
        words = stores.pop("STG.E") - (name == "step_kernel")  # its partial sum
        assert (
            stores == {"STG.E.128": WIDE * places, "STG.E.U16": 8 * places} and words == 8 * places
        ), (name, stores)


def test_ptx_is_embedded(info: dict[str, Any], module_path: Path, cuobjdump: str) -> None:
    listed = subprocess.run(
        [cuobjdump, "-lptx", str(module_path)], capture_output=True, text=True, check=True
    ).stdout
    units = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert listed.count(info["architectures"][-1].replace("compute_", "sm_") + ".ptx") == units


def test_every_wide_path_of_the_ptx_stores_sixteen_bytes(module_path: Path, cuobjdump: str) -> None:
    ptx = subprocess.run(
        [cuobjdump, "-ptx", str(module_path)], capture_output=True, text=True, check=True
    ).stdout
    found = {
        name: body.count("st.global.v4.b32") for name, body in re.findall(ENTRY, ptx, re.DOTALL)
    }
    assert {name: found[name] for name in WRITERS} == {
        name: WIDE * places for name, places in WRITERS.items()
    }


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_exported_symbols(module_path: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(module_path)]
    rows = [
        line.split()
        for line in subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    assert [name for *_, kind, name in rows if kind == "T"] == ["PyInit__cuda"]
    assert not [
        name for *_, name in rows if name.startswith(("cu", "_ZN6editr2"))
    ]  # nor the CUDA runtime's
    command = ["nm", "-D", "--undefined-only", str(module_path)]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "_ZN2at" not in needed and "_ZN3c10" not in needed


def test_importing_it_touches_no_gpu(info: dict[str, Any]) -> None:
    code = (
        "import sys; from editr2_kernels import _cuda; assert not _cuda.emulated; "
        "print(*_cuda.architectures())\n"
        "assert 'libcuda.so' not in open('/proc/self/maps').read() if sys.platform == 'linux' "
        "else True"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == info["architectures"]


@pytest.fixture(scope="module")
def builder() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("editr2_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["editr2_setup"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["editr2_setup"]


def nvcc(folder: Path, codes: str) -> None:
    path = folder / "nvcc"
    path.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'release 99.0, V99.0.1';; *) echo '{codes}';; "
        f"esac\n"
    )
    path.chmod(0o755)


def test_nvcc_is_looked_for(builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = builder.Compiler(["g++"], "g++ 12")
    monkeypatch.setenv("PATH", "/bin:/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("EDITR2_BUILD_CUDA", raising=False)
    assert "nvcc was not found on PATH, and CUDA_HOME is not set" in builder.find_nvcc(compiler)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert builder.find_nvcc(compiler) == f"nvcc was not found on PATH or in {tmp_path}/bin"
    nvcc(tmp_path / "bin", "sm_75 sm_80 sm_90")
    found = builder.find_nvcc(compiler)
    assert found.path == str(tmp_path / "bin" / "nvcc") and found.version == "nvcc V99.0.1"
    assert found.architectures == [
        "sm_80",
        "sm_90",
        "compute_90",
    ]  # what an older nvcc knows of the three
    assert builder.find_nvcc("no C++ compiler") == "no C++ compiler"
    nvcc(tmp_path / "bin", "sm_75")
    assert "compiles for none of sm_80, sm_90, sm_100" in builder.find_nvcc(compiler)


def test_build_cuda_variable(builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = builder.Compiler(["g++"], "g++ 12")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("EDITR2_BUILD_CUDA", "0")
    assert builder.find_nvcc(compiler).startswith("EDITR2_BUILD_CUDA=0")
    monkeypatch.setenv("EDITR2_BUILD_CUDA", "1")
    with pytest.raises(builder.CompileError, match="EDITR2_BUILD_CUDA=1: nvcc was not found"):
        builder.find_nvcc(compiler)
    monkeypatch.setenv("EDITR2_BUILD_CUDA", "yes")
    with pytest.raises(builder.CompileError, match=r"got 'yes', accepted: 0, 1 or auto"):
        builder.find_nvcc(compiler)


def test_resources_are_read_from_the_log(builder: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "ptxas info    : Compiling entry function "
        "'_ZN6editr23gpu12_GLOBAL__N_18a_kernelENS0_4ArgsE' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 96 bytes smem, 600 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_ZN6editr23gpu8b_kernelEv' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 7 registers, used 0 barriers\n"
    )
    assert builder.cuda_resources([log]) == {
        "a_kernel": {
            "sm_80": {
                "stack": 8,
                "spill_stores": 4,
                "spill_loads": 2,
                "registers": 40,
                "shared": 96,
            }
        },
        "b_kernel": {
            "sm_90": {"stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 7, "shared": 0}
        },
    }
