"""The native module itself: its build, its instruction sets against each other and the fp32 formula, its threads."""

from __future__ import annotations

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
from editr2_kernels.philox import philox_ref

ROOT = Path(__file__).resolve().parents[2]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
SIZES = [1, 15, 64, 4096, 4097, 3 * 4096 + 37]  # vectors, blocks of 64 and chunks of 4096, whole and cut


@pytest.fixture
def native() -> Iterator[Any]:
    module = pytest.importorskip("editr2_kernels._native")
    best = module.isa()
    yield module
    module.set_isa(best)


def triple(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), CODES[t.dtype], t.stride(0))


def table() -> Tensor:
    return editr2_kernels.transition_table(editr2_kernels.flow_sigmas(6, 3.0), noise_level=0.7, window=(0, 5))


def steps(batch: int) -> Tensor:
    return torch.arange(batch) % 6  # the last row is deterministic


def seeds(batch: int) -> Tensor:
    return torch.arange(batch) * 0x1234567890ABCD - 3


def sde_step(
    native: Any,
    x: Tensor,
    v: Tensor,
    noise: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    threads: int = 2,
) -> tuple[Tensor, Tensor]:
    batch, n = x.shape
    rows, index, seed = table(), steps(batch), seeds(batch)
    out, log_prob = torch.full((batch, n), torch.nan, dtype=out_dtype), torch.full((batch,), torch.nan)
    native.sde_step(
        *triple(x), *triple(v), *triple(noise), rows.data_ptr(), len(rows), index.data_ptr(), seed.data_ptr(),
        *triple(out)[:2], log_prob.data_ptr(), batch, n, threads,
    )  # fmt: skip
    return out, log_prob


def sde_log_prob(native: Any, x: Tensor, x_next: Tensor, v: Tensor, v_ref: Tensor, threads: int = 2) -> list[Tensor]:
    """log_prob, mean difference and the gradient of their weighted sum."""
    batch, n = x.shape
    rows, index = table(), steps(batch)
    g_lp, g_md = torch.linspace(-1, 1, batch), torch.linspace(2, 3, batch)
    log_prob, mean_diff, grad = torch.full((batch,), torch.nan), torch.full((batch,), torch.nan), torch.empty_like(v)
    inputs = (
        *triple(x), *triple(x_next), *triple(v), *triple(v_ref), rows.data_ptr(), len(rows), index.data_ptr(),
    )  # fmt: skip
    native.sde_log_prob(*inputs, log_prob.data_ptr(), mean_diff.data_ptr(), batch, n, threads)
    native.sde_log_prob_backward(
        *inputs, g_lp.data_ptr(), g_md.data_ptr(), *triple(grad)[:2], batch, n, threads
    )  # fmt: skip
    return [log_prob, mean_diff, grad]


def philox_normal(native: Any, seed: Tensor, step: Tensor, n: int, threads: int = 2) -> Tensor:
    out = torch.full((len(seed), n), torch.nan)
    native.philox_normal(seed.data_ptr(), step.data_ptr(), out.data_ptr(), 0, len(seed), n, threads)
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


def inputs(batch: int, n: int, *dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, n, generator=generator).to(dtype) for dtype in dtypes]


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
        bits(editr2_kernels.philox_normal_ref(seed, step, n)), bits(philox_normal(native, seed, step, n))
    )
    first = philox_normal(native, seed, step, n)
    for isa in native.supported_isas():
        native.set_isa(isa)
        out = philox_normal(native, seed, step, n)
        # log, sqrt and cos within 2 ulp each, at radii up to 6.8 where an ulp is 4.8e-7.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert torch.equal(bits(out), bits(first)), f"{isa} differs from {native.supported_isas()[0]}"


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_step_and_replay_on_every_isa(
    native: Any, x_dtype: torch.dtype, v_dtype: torch.dtype, out_dtype: torch.dtype, n: int
) -> None:
    x, v, v_ref, noise = inputs(7, n, x_dtype, v_dtype, x_dtype, v_dtype)
    ref = editr2_kernels.sde_step_ref(x, v, table(), steps(7), None, noise=noise, store_dtype=out_dtype)
    row = table()[steps(7)].double()[:, :, None]
    mu = (row[:, 0].float() * x.float() + row[:, 1].float() * v.float()).double()
    first: list[Tensor] = []
    for isa in native.supported_isas():
        native.set_isa(isa)
        x_next, log_prob = sde_step(native, x, v, noise, out_dtype)
        assert torch.equal(x_next, ref.x_next)
        expected = row[:, 4, 0] * ((x_next.double() - mu) ** 2).mean(1) + row[:, 5, 0]
        # fp32 sums of at most 128 squares a lane, then fp64: relative to the larger term, as the two may cancel.
        scale = torch.maximum((expected - row[:, 5, 0]).abs(), row[:, 5, 0].abs()).clamp(min=1e-30)
        assert ((log_prob.double() - expected).abs() / scale).max() <= 1e-6
        replayed, mean_diff, grad = sde_log_prob(native, x, x_next, v, v_ref)
        assert torch.equal(bits(replayed), bits(log_prob)), "replay differs from the step"
        diff = (row[:, 1] * (v.double() - v_ref.double())).square().mean(1)
        torch.testing.assert_close(mean_diff.double(), diff, rtol=1e-6, atol=0)
        sampled, sampled_log_prob = sde_step(native, x, v, None, out_dtype)
        replayed = sde_log_prob(native, x, sampled, v, v_ref)[0]
        assert torch.equal(bits(replayed), bits(sampled_log_prob)), "replay differs from the sampled step"
        results = [x_next, log_prob, mean_diff, grad, sampled, sampled_log_prob]
        first = first or results
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, first)), f"{isa} differs"
    g_lp, g_md = torch.linspace(-1, 1, 7).double()[:, None], torch.linspace(2, 3, 7).double()[:, None]
    expected_grad = g_lp * -2 * row[:, 4] * row[:, 1] / n * (first[0].double() - mu)
    expected_grad = expected_grad + g_md * 2 * row[:, 1] ** 2 / n * (v.double() - v_ref.double())
    half_ulp = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}[v_dtype]
    floor = expected_grad.abs().max().item() * 1e-6 + (2**-24 if v_dtype == torch.float16 else 0)  # cancellation
    torch.testing.assert_close(first[3].double(), expected_grad, rtol=1.01 * half_ulp, atol=floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_match_torch_bit_for_bit(native: Any, dtype: torch.dtype) -> None:
    """Every 16-bit pattern in; fp32 patterns around every rounding boundary, subnormals, infinities and NaN out."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    edges = every.float().view(torch.int32).flatten()
    ties = edges + (0x8000 if dtype == torch.bfloat16 else 0x1000)
    singles = torch.cat([patterns, edges, ties - 1, ties, ties + 1]).view(torch.float32)[None]
    identity = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    index, seed, log_prob = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.empty(1)
    for isa in native.supported_isas():
        native.set_isa(isa)
        for x, out_dtype in ((every, torch.float32), (singles, dtype)):
            v, out = torch.zeros_like(x), torch.empty(x.shape, dtype=out_dtype)
            native.sde_step(
                *triple(x), *triple(v), 0, 0, 0, identity.data_ptr(), 1, index.data_ptr(), seed.data_ptr(),
                *triple(out)[:2], log_prob.data_ptr(), *x.shape, 2,
            )  # fmt: skip
            torch.testing.assert_close(out, x.to(out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [37, 5 * 4096 + 11])
def test_threads_batch_and_position_change_no_bit(native: Any, n: int) -> None:
    x, v, v_ref = inputs(9, n, torch.float32, torch.bfloat16, torch.float32)
    for isa in native.supported_isas():
        native.set_isa(isa)
        alone = [*sde_step(native, x, v, threads=1)]
        alone += sde_log_prob(native, x, alone[0], v, v_ref, threads=1)
        for threads in (2, 3, 8):
            again = [*sde_step(native, x, v, threads=threads)]
            again += sde_log_prob(native, x, again[0], v, v_ref, threads=threads)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(alone, again))
        # Sample b meets the same step and seed as the first b + 1 samples: a shorter batch must not differ.
        shorter = sde_step(native, x[:4], v[:4], threads=2)
        assert all(torch.equal(bits(a), bits(b[:4])) for a, b in zip(shorter, alone))


def test_batch_strides(native: Any) -> None:
    (wide,) = inputs(5, 3000, torch.float32)
    x, v = wide[:, 100:1101], wide[:1, 7:1008].expand(5, 1001)
    assert all(
        torch.equal(a, b) for a, b in zip(sde_step(native, x, v), sde_step(native, x.contiguous(), v.contiguous()))
    )


def test_pool_survives_fork_and_concurrent_callers(native: Any) -> None:
    # Bytes are compared, not tensors: torch's own threads do not survive a fork.
    program = """
import os, threading
import torch
from editr2_kernels import _native
seed = torch.arange(8); out = torch.full((8, 1 << 16), 0.0)
def run(out):
    _native.philox_normal(seed.data_ptr(), seed.data_ptr(), out.data_ptr(), 0, *out.shape, 2)
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step_index": 6}, "step_index: got 6 for sample 1, accepted: 0 <= step_index < 6"),
        ({"step_index": -1}, "step_index: got -1 for sample 1"),
        ({"x_dtype": 3}, "x_dtype: got 3, accepted: 0"),
        ({"v_dtype": -1}, "v_dtype: got -1"),
        ({"noise_dtype": 9}, "noise_dtype: got 9"),
        ({"out_dtype": 3}, "out_dtype: got 3"),
        ({"B": -1}, "B: got -1"),
        ({"N": -2}, "N: got -2"),
        ({"rows": -3}, "rows: got -3"),
        ({"threads": 0}, "threads: got 0"),
        ({"x_ptr": 0}, "x_ptr: got 0"),
        ({"out_ptr": 0}, "out_ptr: got 0"),
        ({"seed_ptr": 0}, "seed_ptr: got 0"),
        ({"table_ptr": 0}, "table_ptr: got 0"),
        ({"v_stride": -4}, "v_stride: got -4"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(native: Any, change: dict[str, int], message: str) -> None:
    x, v = inputs(2, 100, torch.float32, torch.float32)
    rows, index, seed = table(), torch.tensor([0, change.get("step_index", 1)]), seeds(2)
    out, log_prob = torch.full((2, 100), 7.0), torch.full((2,), 7.0)
    arguments = dict(
        x_ptr=x.data_ptr(), x_dtype=0, x_stride=100, v_ptr=v.data_ptr(), v_dtype=0, v_stride=100,
        noise_ptr=0, noise_dtype=0, noise_stride=0, table_ptr=rows.data_ptr(), rows=len(rows),
        step_index_ptr=index.data_ptr(), seed_ptr=seed.data_ptr(), out_ptr=out.data_ptr(), out_dtype=0,
        log_prob_ptr=log_prob.data_ptr(), B=2, N=100, threads=2,
    )  # fmt: skip
    arguments.update({name: value for name, value in change.items() if name != "step_index"})
    with pytest.raises(ValueError) as error:
        native.sde_step(**arguments)
    assert str(error.value).startswith(message)
    assert (out == 7).all() and (log_prob == 7).all()


def test_empty_batch(native: Any) -> None:
    out, log_prob = sde_step(native, torch.empty(0, 5), torch.empty(0, 5))
    assert out.shape == (0, 5) and log_prob.shape == (0,)


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """What a build reads, apart from the repository so that nothing of it is touched."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "kernels/editr2_kernels").mkdir(parents=True)
    (tmp_path / "kernels/editr2_kernels/__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "editr2"\nversion = "0"\n[tool.setuptools.packages.find]\nwhere = ["kernels"]\n'
    )
    return tmp_path


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", "EDITR2_BUILD_CUDA")}
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
    (source_tree / "kernels/editr2_kernels" / stale).touch()  # of an earlier build: must not survive
    done = build(source_tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("editr2_kernels:")]
    assert said == [
        "editr2_kernels: installing without native kernels: no C++ compiler: CXX='no-such-compiler' was not found"
    ]
    info = json.loads((source_tree / "kernels/editr2_kernels/_build_info.json").read_text())
    assert info["cpu"] == {"built": False, "reason": "no C++ compiler: CXX='no-such-compiler' was not found"}
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
    "value, message", [("1", "not part of this release"), ("yes", "got 'yes', accepted: 0, 1 or auto")]
)
def test_cuda_asked_for_is_an_error(source_tree: Path, value: str, message: str) -> None:
    done = build(source_tree, EDITR2_BUILD_CUDA=value)
    assert done.returncode != 0 and "EDITR2_BUILD_CUDA" in done.stderr and message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_build_in_place(source_tree: Path) -> None:
    done = build(source_tree)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr
    info = json.loads((source_tree / "kernels/editr2_kernels/_build_info.json").read_text())
    assert info["cpu"] == {"built": True, "reason": None} and info["compiler"]
    (module,) = modules(source_tree)
    text = (source_tree / "kernels/editr2_kernels" / module).read_bytes()
    assert str(source_tree).encode() not in text, "the module holds a path of the machine that built it"
