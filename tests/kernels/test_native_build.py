"""The native module itself: its build, its instruction sets and noise, its threads."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels
from editr2_kernels.backends import pointer, strided
from editr2_kernels.philox import philox_ref

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    1,
    15,
    64,
    4096,
    4097,
    3 * 4096 + 37,
]  # vectors, blocks of 64 and chunks of 4096, whole and cut


@pytest.fixture
def native() -> Iterator[Any]:
    module = pytest.importorskip("editr2_kernels._native")
    best = module.isa()
    yield module
    module.set_isa(best)


def philox_normal(native: Any, seed: Tensor, step: Tensor, n: int, threads: int = 2) -> Tensor:
    out = torch.full((len(seed), n), torch.nan)
    native.philox_normal(
        seed=pointer(seed), step=pointer(step), out=strided(out), B=len(seed), N=n, threads=threads
    )
    return out


def box_muller(seed: Tensor, step: Tensor, n: int) -> Tensor:
    """The noise by PyTorch's own fp32 log, sin and cos."""
    low = 0xFFFFFFFF
    j = torch.arange((n + 3) // 4)[None]
    counter = (j, torch.zeros_like(j), (step & low)[:, None], torch.zeros_like(j))
    words = philox_ref(counter, ((seed & low)[:, None], ((seed >> 32) & low)[:, None]))
    z = []
    for a, b in (words[:2], words[2:]):
        u = a.float() * 2.0**-32 + 2.0**-33
        theta = ((b.to(torch.int32) >> 8).float() + 0.5) * torch.tensor(math.pi * 2.0**-23)
        radius = torch.sqrt(-2 * torch.log(u))
        z += [radius * torch.cos(theta), radius * torch.sin(theta)]
    return torch.stack(z, dim=-1).flatten(1)[:, :n]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16)


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # the known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    native: Any, counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert native.philox_bits(*counter, *key) == expected


def test_best_instruction_set_is_used(native: Any) -> None:
    assert native.isa() == native.supported_isas()[0]
    assert native.supported_isas()[-1] == "baseline"
    with pytest.raises(ValueError, match=r"name: got 'sse9'.*baseline"):
        native.set_isa("sse9")


@pytest.mark.parametrize("n", [*SIZES, 300_001])
def test_normals_on_every_isa(native: Any, n: int) -> None:
    seed, step = torch.tensor([0, -1, 2**62 + 12345]), torch.tensor([0, -1, 7])
    expected = box_muller(seed, step, n)
    assert torch.equal(
        bits(editr2_kernels.philox_normal_ref(seed, step, n)),
        bits(philox_normal(native, seed, step, n)),
    )
    first = philox_normal(native, seed, step, n)
    for isa in native.supported_isas():
        native.set_isa(isa)
        out = philox_normal(native, seed, step, n)
        # log, sqrt and cos within 2 ulp each, at radii up to 6.8 where an ulp is 4.8e-7.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert torch.equal(bits(out), bits(first)), (
            f"{isa} differs from {native.supported_isas()[0]}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_match_torch_bit_for_bit(native: Any, dtype: torch.dtype) -> None:
    """Every 16-bit pattern in; fp32 patterns around every rounding boundary, subnormals, infinities
    and NaN out."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    edges = every.float().view(torch.int32).flatten()
    ties = edges + (0x8000 if dtype == torch.bfloat16 else 0x1000)
    singles = torch.cat([patterns, edges, ties - 1, ties, ties + 1]).view(torch.float32)[None]
    identity = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    index, absent = torch.zeros(1, dtype=torch.int64), strided(None)
    for isa in native.supported_isas():
        native.set_isa(isa)
        for x, out_dtype in ((every, torch.float32), (singles, dtype)):
            v, out = torch.zeros_like(x), torch.empty(x.shape, dtype=out_dtype)
            native.sde_step(
                x=strided(x),
                v=strided(v),
                m_prev=absent,
                v_uncond=absent,
                v_uncond_image=absent,
                guidance=0,
                renorm=0,
                width=1,
                noise=absent,
                table=pointer(identity),
                rows=1,
                step_index=pointer(index),
                seed=pointer(index),
                x_next=strided(out),
                x0=absent,
                log_prob=0,
                score_stored=True,
                workspace=0,
                B=1,
                N=x.shape[1],
                threads=2,
            )
            torch.testing.assert_close(out, x.to(out_dtype), rtol=0, atol=0, equal_nan=True)


def test_pool_survives_fork_and_concurrent_callers(native: Any) -> None:
    # Bytes are compared, not tensors: torch's own threads do not survive a fork.
    program = """
import os, threading
import torch
from editr2_kernels import _native
seed = torch.arange(8); out = torch.full((8, 1 << 16), 0.0)
def run(out):
    _native.philox_normal(
        seed=seed.data_ptr(), step=seed.data_ptr(), out=(out.data_ptr(), 0, out.stride(0)),
        B=8, N=1 << 16, threads=2,
    )
    return out
expected = run(out).numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if run(out).numpy().tobytes() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
results = [torch.empty_like(out) for _ in range(4)]
threads = [threading.Thread(target=lambda r=r: [run(r) for _ in range(20)]) for r in results]
[t.start() for t in threads]; [t.join() for t in threads]
assert all(r.numpy().tobytes() == expected for r in results)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_a_child_that_loads_the_module_itself_does_not_wait_for_the_threads_of_its_parent() -> None:
    """The parent has an OpenMP team of torch's and no module yet, which therefore could not see the
    fork."""
    program = """
import os, signal, sys
import torch
import editr2_kernels as ek
torch.set_num_threads(2)
torch.ones(1 << 22).sqrt()
assert "editr2_kernels._native" not in sys.modules
child = os.fork()
if child == 0:
    signal.alarm(20)
    assert torch.get_num_threads() == 2
    ek.philox_normal(torch.arange(8), 0, (1 << 16,), backend="cpu")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    pytest.importorskip("editr2_kernels._native")
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_fast_math_asked_for_by_the_user_does_not_come_in() -> None:
    spec = importlib.util.spec_from_file_location("editr2_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builder  # dataclasses look their module up
    spec.loader.exec_module(builder)
    macros = [
        subprocess.run(
            ["g++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flags in (["-ffast-math"], ["-ffast-math", *builder.FLAGS])
    ]
    assert ["__FAST_MATH__" in text for text in macros] == [True, False]
    assert "__FINITE_MATH_ONLY__ 0" in macros[1]


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """What a build reads, apart from the repository so that nothing of it is touched."""
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "kernels/editr2_kernels").mkdir(parents=True)
    (tmp_path / "kernels/editr2_kernels/__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "editr2"\nversion = "0"\ndynamic = ["readme", "urls"]\n'
        "[tool.setuptools.packages.find]\nwhere = "
        '["kernels"]\n'
    )
    return tmp_path


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        key: value for key, value in os.environ.items() if key not in ("CXX", "EDITR2_BUILD_CUDA")
    }
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))],
        cwd=tree,
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def modules(tree: Path) -> list[str]:
    return [path.name for path in (tree / "kernels/editr2_kernels").glob("_native*")]


def test_no_compiler_installs_without_the_module_and_says_why(source_tree: Path) -> None:
    stale = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
    (
        source_tree / "kernels/editr2_kernels" / stale
    ).touch()  # of an earlier build: must not survive
    done = build(source_tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("editr2_kernels:")]
    assert said == [
        "editr2_kernels: installing without native kernels: no C++ compiler: "
        "CXX='no-such-compiler' was not found"
    ]
    info = json.loads((source_tree / "kernels/editr2_kernels/_build_info.json").read_text())
    assert info["cpu"] == {
        "built": False,
        "reason": "no C++ compiler: CXX='no-such-compiler' was not found",
    }
    assert not info["cuda"]["built"] and info["cuda"]["reason"]
    assert modules(source_tree) == []


def test_a_wheel_built_without_a_compiler_holds_the_reason(source_tree: Path) -> None:
    done = build(source_tree, "build", "--build-lib", "out", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    built = {path.name for path in (source_tree / "out/editr2_kernels").iterdir()}
    assert built == {"__init__.py", "_build_info.json"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compile_failure_is_an_error(source_tree: Path) -> None:
    header = source_tree / "csrc/cpu/kernels.h"
    header.write_text("#error deliberate\n" + header.read_text())
    (source_tree / "csrc/bindings.cpp").write_text("")  # the slowest unit: not waited for
    done = build(source_tree)
    assert done.returncode != 0
    assert "failed to compile" in done.stderr and "deliberate" in done.stdout + done.stderr
    assert modules(source_tree) == []


@pytest.mark.parametrize(
    "value, message", [("1", "no C++ compiler"), ("yes", "got 'yes', accepted: 0, 1 or auto")]
)
def test_cuda_asked_for_and_impossible_is_an_error(
    source_tree: Path, value: str, message: str
) -> None:
    done = build(source_tree, CXX="no-such-compiler", EDITR2_BUILD_CUDA=value)
    assert done.returncode != 0 and "EDITR2_BUILD_CUDA" in done.stderr and message in done.stderr
