"""The Triton kernels without a GPU: the operator tests in the interpreter, and compilation for
three GPU targets."""

import importlib
import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPERATORS = [
    "philox",
    "sde",
    "guidance",
    "grpo_loss",
    "nft_loss",
    "group_advantage",
    "token_log_prob",
    "non_finite",
]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter already")
@pytest.mark.timeout(1200)  # minutes on idle cores; the margin is for busy ones
@pytest.mark.parametrize("name", OPERATORS)
def test_interpreter_passes_the_operator_tests(interpreted, name):
    code, output = interpreted[name].result()
    assert code == 0, output[-7000:]
    assert re.search(r"\d+ passed", output)


CHUNK = {"BLOCK": 1024, "LEVELS": 10}
PARTIALS = {"PARTIALS": 256, "LEVELS": 8}
UNITS = {"UNITS": 16, "UNIT_LEVELS": 4}
NARROW = {"WIDE": False, "BLOCK": 1024, "COLS": 64, "LEVELS": 6}
WIDE = {"WIDE": True, "BLOCK": 1024, "COLS": 1024, "LEVELS": 10}


def absent(*names):
    return {f"{name}_ptr": None for name in names}


UNGUIDED = {
    **absent("v_uncond", "v_uncond_image", "guidance", "scales"),
    "RENORM": 0,
    "WIDE": False,
}
BF16 = dict.fromkeys(
    (
        "x_ptr",
        "x_next_ptr",
        "v_ptr",
        "m_prev_ptr",
        "v_uncond_ptr",
        "v_uncond_image_ptr",
        "v_ref_ptr",
        "v_old_ptr",
    )
    + ("x0_ptr", "noise_ptr", "grad_v_ptr", "grad_v_uncond_ptr", "grad_v_uncond_image_ptr"),
    "*bf16",
)
NO_GRADS = absent("grad_log_prob", "grad_mean_diff")
STORED = {"SCORE_STORED": True, **CHUNK}
GROUP_TYPES = {
    **dict.fromkeys(("eps", "clip", "min_std", "max_mean"), "fp32"),
    "mask_out_ptr": "*u8",
    "counter_ptr": "*i32",
}
GROUP = {
    **{
        "K": 2,
        "COLUMNS": 1,
        "AGGREGATE": 1,
        "FUSION": 0,
        "BY_TURN": False,
        "STD": 0,
        "UNBIASED": True,
        "FLOOR": False,
    },
    **{
        "CLIP": True,
        "FILTER": 0,
        "COUNT_FILTER": 0,
        "DROPS": False,
        "COLLECTIVE": False,
        "COLS": 256,
    },
}
# module.kernel, types that differ from `type_of`, constants (a None pointer is one).
VARIANTS = {
    "philox": ("step.philox_kernel", {"out_ptr": "*bf16"}, {"BLOCK": 1024}),
    "finish": ("common.finish_kernel", {}, PARTIALS),
    "step": ("step.step_kernel", BF16, {**absent("noise", "m_prev", "x0"), **UNGUIDED, **STORED}),
    "step-noise": (
        "step.step_kernel",
        {"v_ptr": "*fp16", "x_next_ptr": "*fp16"},
        {**absent("seed"), **UNGUIDED, "SCORE_STORED": False, **CHUNK},
    ),
    "step-guided": (
        "step.step_kernel",
        BF16,
        {**absent("noise", "scales"), "RENORM": 0, "WIDE": False, **STORED},
    ),
    "step-token": (
        "step.step_kernel",
        BF16,
        {**absent("noise", "m_prev"), "RENORM": 1, "WIDE": False, **STORED},
    ),
    "step-global": (
        "step.step_kernel",
        BF16,
        {**absent("noise", "m_prev"), "RENORM": 4, "WIDE": True, **STORED},
    ),
    "moments": (
        "replay.moments_kernel",
        BF16,
        {**UNGUIDED, **absent("m_prev"), "PLAIN_REF": False, **CHUNK},
    ),
    "moments-text-channel": (
        "replay.moments_kernel",
        {},
        {**absent("v_old", "old_squares"), "RENORM": 2, "WIDE": False, "PLAIN_REF": True, **CHUNK},
    ),
    "scale": (
        "guidance.scale_kernel",
        BF16,
        {**absent("v_squares", "w_squares"), "RENORM": 1, **NARROW},
    ),
    "scale-wide": ("guidance.scale_kernel", {}, {"RENORM": 4, **WIDE}),
    "scale-finish": ("guidance.scale_finish_kernel", {}, {"RENORM": 4, **PARTIALS}),
    "dot": ("replay.dot_kernel", BF16, {**NO_GRADS, "RENORM": 1, **NARROW}),
    "dot-wide": (
        "replay.dot_kernel",
        {},
        {**absent("factors", "factor_scale"), "RENORM": 2, **WIDE},
    ),
    "dot-finish": ("replay.dot_finish_kernel", {}, PARTIALS),
    "backward": (
        "replay.backward_kernel",
        BF16,
        {
            **absent("dots", "grad_v_uncond", "grad_v_uncond_image"),
            **NO_GRADS,
            **UNGUIDED,
            "BLOCK": 1024,
        },
    ),
    "backward-guided": (
        "replay.backward_kernel",
        {},
        {
            **absent("dots", "scales", "factors", "factor_scale"),
            "RENORM": 0,
            "WIDE": False,
            "BLOCK": 1024,
        },
    ),
    "backward-text-channel": (
        "replay.backward_kernel",
        BF16,
        {**NO_GRADS, "RENORM": 2, "WIDE": False, "BLOCK": 1024},
    ),
    "backward-global": (
        "replay.backward_kernel",
        BF16,
        {**NO_GRADS, "RENORM": 4, "WIDE": True, "BLOCK": 1024},
    ),
    "means": ("common.means_kernel", {}, {"UNITS": 16, **PARTIALS}),
    "grpo": (
        "grpo.grpo_finish_kernel",
        {},
        {**absent("mask"), "KL_SCALE": 3, "GUARD": False, "HAS_REF": True, **UNITS},
    ),
    "grpo-guard": (
        "grpo.grpo_finish_kernel",
        {},
        {"KL_SCALE": 1, "GUARD": True, "HAS_REF": False, **UNITS},
    ),
    "nft": ("nft.nft_moments_kernel", BF16, CHUNK),
    "nft-finish": ("nft.nft_finish_kernel", {}, {"HAS_REF": True, **UNITS}),
    "nft-backward": ("nft.nft_backward_kernel", BF16, {"BLOCK": 1024}),
    "tokens": (
        "tokens.token_kernel",
        {"logits_ptr": "*bf16", "scale": "fp32"},
        {"BLOCK": 4096, "LEVELS": 12},
    ),
    "tokens-backward": (
        "tokens.token_backward_kernel",
        {"logits_ptr": "*bf16", "grad_ptr": "*bf16", "scale": "fp32"},
        {"BLOCK": 1024},
    ),
    "tokens-backward-entropy": (
        "tokens.token_backward_kernel",
        {"logits_ptr": "*fp16", "grad_ptr": "*fp16", "scale": "fp32"},
        {**absent("grad_log_prob"), "BLOCK": 1024},
    ),
    "group": ("group.group_kernel", GROUP_TYPES, {**absent("counter", "scratch"), **GROUP}),
    "group-batch": (
        "group.group_kernel",
        GROUP_TYPES,
        {
            **GROUP,
            "FUSION": 2,
            "COLUMNS": 2,
            "STD": 1,
            "FLOOR": True,
            "DROPS": True,
            "COLLECTIVE": True,
        },
    ),
}
INTEGERS = ("index_ptr", "seed_ptr", "step_ptr", "ids_ptr", "group_ptr")
NUMBERS = (
    "clip_low",
    "clip_high",
    "advantage_clip",
    "kl_weight",
    "normalizer",
    "beta",
    "advantage_max",
    "ref_weight",
)
ROUNDS_TO_BF16 = (
    "philox",
    "step",
    "step-token",
    "backward",
    "backward-global",
    "nft-backward",
    "tokens-backward",
)


def type_of(name):
    if name in INTEGERS:
        return "*i64"
    if name == "mask_ptr":
        return "*u8"
    return (
        "*fp32" if name.endswith("_ptr") else "fp32" if name in (*NUMBERS, "min_weight") else "i32"
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_exact_ptx(variant, capability):
    """No fp64, no contraction, no approximate functions: what bitwise equality between kernels
    rests on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from editr2_kernels import triton_kernels

    where, types, constants = VARIANTS[variant]
    module, name = where.split(".")
    kernel = getattr(importlib.import_module(f"{triton_kernels.__name__}.{module}"), name)
    names = kernel.arg_names
    assert set(constants) <= set(names)
    signature = {n: "constexpr" if n in constants else types.get(n, type_of(n)) for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options=dict(triton_kernels.OPTIONS)).asm["ptx"]
    assert ".f64" not in ptx
    assert "fma.rn" not in ptx
    assert ".approx" not in ptx and "div.full" not in ptx
    if variant in ROUNDS_TO_BF16:
        assert "cvt.rn.bf16" in ptx
    atomics = re.findall(r"\b(?:atom|red)\.[\w.]+", ptx)
    # One arrival of each program at a counter, an integer; no sum of floats.
    assert atomics == (["atom.global.gpu.acq_rel.add.u32"] if variant == "group-batch" else [])
