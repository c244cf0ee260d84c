"""The Triton kernels without a GPU: the operator tests in the interpreter, and compilation for three GPU targets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter already")
@pytest.mark.timeout(900)  # seconds on idle cores; the margin is for busy ones
@pytest.mark.parametrize("name", ["philox", "sde", "group_advantage"])
def test_interpreter_passes_the_operator_tests(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", "-W", "ignore"]
    run = subprocess.run(
        [*command, str(HERE / f"test_{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


BLOCK = {"BLOCK": 1024, "LEVELS": 10}
GROUP = {"ROWS": 16, "COLS": 128}
# kernel, pointer types, constants; every other argument is an int32. A None pointer is a constant.
VARIANTS = {
    "philox": ("philox_kernel", {"out_ptr": "*bf16", "seed_ptr": "*i64", "step_ptr": "*i64"}, {"BLOCK": 1024}),
    "step-bf16": (
        "step_kernel",
        {"x_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16", "seed_ptr": "*i64"},
        {"noise_ptr": None, "HAS_NOISE": False, **BLOCK},
    ),
    "step-noise": (
        "step_kernel",
        {"x_ptr": "*fp32", "v_ptr": "*fp16", "out_ptr": "*fp32", "noise_ptr": "*fp32"},
        {"seed_ptr": None, "HAS_NOISE": True, **BLOCK},
    ),
    "log-prob": (
        "log_prob_kernel",
        {"x_ptr": "*bf16", "x_next_ptr": "*bf16", "v_ptr": "*bf16", "v_ref_ptr": "*bf16"},
        {"HAS_REF": True, **BLOCK},
    ),
    "finish": ("finish_kernel", {"log_prob_ptr": "*fp32", "mean_diff_ptr": "*fp32"}, {"HAS_REF": True, **BLOCK}),
    "backward": (
        "log_prob_backward_kernel",
        {"x_ptr": "*bf16", "x_next_ptr": "*bf16", "v_ptr": "*bf16", "v_ref_ptr": "*bf16", "grad_v_ptr": "*bf16"},
        {"HAS_DIFF": True, "BLOCK": 1024},
    ),
    "group": (
        "group_kernel",
        {"value_ptr": "*fp32", "group_ptr": "*i64", "turn_ptr": "*i64", "counted_ptr": "*u8", "out_ptr": "*fp32"},
        {"STD": 1, "UNBIASED": True, **GROUP},
    ),
}
COMMON = {
    "table_ptr": "*fp32",
    "index_ptr": "*i64",
    "partial_ptr": "*fp32",
    "diff_partial_ptr": "*fp32",
    "grad_log_prob_ptr": "*fp32",
    "grad_mean_diff_ptr": "*fp32",
    "eps": "fp32",
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_exact_ptx(variant, capability):
    """No fp64, no contraction, no approximate functions: what bitwise equality between kernels rests on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from editr2_kernels import triton_kernels

    name, types, constants = VARIANTS[variant]
    kernel = getattr(triton_kernels, name)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**COMMON, **types}.get(n, "i32") for n in names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): value for n, value in constants.items()}
    )
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options=dict(triton_kernels.OPTIONS)).asm["ptx"]
    assert ".f64" not in ptx
    assert "fma.rn" not in ptx
    assert ".approx" not in ptx and "div.full" not in ptx
    if variant in ("philox", "step-bf16", "backward"):
        assert "cvt.rn.bf16" in ptx
    assert not re.search(r"\batom\.|\bred\.", ptx)
