"""The Triton kernels without a GPU: the operator tests in the interpreter, and compilation for
three GPU targets."""

import importlib
import importlib.util
import os
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

import editr2_kernels as ek
from editr2_kernels.triton_kernels import (
    common,
    group,
    grpo,
    guidance,
    nft,
    replay,
    step,
    tokens,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
backends_module = importlib.import_module("editr2_kernels.backends")
# Files that share a process, of which starting takes four seconds; as long as each other.
OPERATORS = [
    ("group_advantage",),
    ("guidance", "non_finite"),
    ("sde", "philox", "token_log_prob"),
    ("grpo_loss", "nft_loss"),
]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter already")
@pytest.mark.timeout(1200)  # minutes on idle cores; the margin is for busy ones
@pytest.mark.parametrize("names", OPERATORS, ids="+".join)
def test_interpreter_passes_the_operator_tests(interpreted, names):
    code, output = interpreted(names)
    assert code == 0, output[-7000:]
    assert re.search(r"\d+ passed", output)


# Arguments by their types in bundles as the kernels take them; a number that is not a string stands
# for a constant.
def samples(dtype):
    return common.Samples(f"*{dtype}", "i32")


def replayed(dtype, **absent):
    given = replay.Replay("i32", *[samples(dtype)] * 5)
    return {"replay": given._replace(**absent), **STEPS}


def factors(**given):
    none = replay.Incoming(None, None, None, None)
    return none._replace(**dict.fromkeys(given or ("factors", "scale"), "*fp32"))


def guided(dtype, renorm=None, **absent):
    rows = {"scales": None, "width": None} if renorm is None else {"scales": "*fp32"}
    velocity = guidance.Velocity("*fp32", "*fp32", "i32", *[samples(dtype)] * 3)
    return {"velocity": velocity._replace(**rows | absent), "row_count": "i32", "RENORM": renorm}


def plain(dtype):
    return guided(dtype, v_uncond=None, v_uncond_image=None, guidance=None)


def credit(**values):
    names = {"aggregate": "mean", "fusion": "reward", "std": "group", "by_turn": False}
    flags = {"unbiased": True, "floor": False, "clip": True, "drops": False, "collective": False}
    counts = {"K": 2, "columns": 1, "cols": 256, "filter": 0, "count_filter": 0}
    return group.Credit(**{**names, **flags, **counts, **values})


STEPS = {"steps": common.Steps("*fp32", "*i64"), "rows": "i32"}
SQUARES = replay.Terms("*fp32", "*fp32", "*fp32")
TOKEN = guidance.Renorm(True, False, False)
TEXT_CHANNEL = guidance.Renorm(False, True, False)
GLOBAL = guidance.Renorm(False, False, True)
START = step.Start("i32", "*i64", None, samples("bf16"), None)
STEPPED = step.Outputs(samples("bf16"), samples("bf16"), "*fp32")
NOISE_GIVEN = START._replace(x=samples("fp32"), m_prev=samples("fp32"), noise=samples("fp32"))
GRADS = replay.Grads(*[samples("bf16")] * 3)
GRADS_FP32 = replay.Grads(*[samples("fp32")] * 3)
GIVEN = grpo.Given("*fp32", "*fp32", "*u8")
CLIPS = {"numbers": grpo.Numbers(*["fp32"] * 5), "out": grpo.Outputs(*["*fp32"] * 6)}
NFT = {"given": nft.Sample(*[samples("bf16")] * 5), "beta": "fp32"}
LABELS = nft.Labels("*fp32", "*fp32", "*u8")
NFT_NUMBERS = {"numbers": nft.Numbers(*["fp32"] * 5), "out": nft.Outputs(*["*fp32"] * 3)}
SCORES = group.Batch("*fp32", "*i64", "*fp32", "*u8", None, "*fp32", "*u8", None, None)
COLLECTED = {"counter": "*i32", "scratch": "*fp32"}
BOUNDS = {"bounds": group.Bounds(*["fp32"] * 4)}
# module.kernel, and its arguments where `type_of` does not tell.
VARIANTS = {
    "philox": (step.philox_kernel, {"out": samples("bf16")}),
    "finish": (common.finish_kernel, STEPS),
    "step": (
        step.step_kernel,
        {
            "start": START,
            "out": STEPPED._replace(x0=None),
            **STEPS,
            **plain("bf16"),
            "STORED": True,
        },
    ),
    "step-noise": (
        step.step_kernel,
        {
            "start": NOISE_GIVEN._replace(seed=None),
            "out": STEPPED._replace(x_next=samples("fp16")),
            **{**STEPS, **plain("fp16"), "STORED": False},
        },
    ),
    "step-guided": (
        step.step_kernel,
        {
            "start": START._replace(m_prev=samples("bf16")),
            **{"out": STEPPED, **STEPS, **guided("bf16"), "STORED": True},
        },
    ),
    "step-token": (
        step.step_kernel,
        {"start": START, "out": STEPPED, **STEPS, **guided("bf16", TOKEN), "STORED": True},
    ),
    "step-global": (
        step.step_kernel,
        {"start": START, "out": STEPPED, **STEPS, **guided("bf16", GLOBAL), "STORED": True},
    ),
    "moments": (
        replay.moments_kernel,
        {**replayed("bf16", m_prev=None), **plain("bf16"), "squares": SQUARES, "PLAIN": False},
    ),
    "moments-text-channel": (
        replay.moments_kernel,
        {
            **replayed("fp32", v_old=None),
            **guided("fp32", TEXT_CHANNEL),
            "squares": SQUARES._replace(old=None),
            "PLAIN": True,
        },
    ),
    "scale": (
        guidance.scale_kernel,
        {
            **{**STEPS, **guided("bf16", TOKEN, scales=None), "LEVELS": 6},
            "squares": guidance.Squares(None, None),
        },
    ),
    "scale-wide": (
        guidance.scale_kernel,
        {
            **{**STEPS, **guided("fp32", GLOBAL, scales=None), "LEVELS": 10},
            "squares": guidance.Squares("*fp32", "*fp32"),
        },
    ),
    "scale-finish": (
        guidance.scale_finish_kernel,
        {**STEPS, "squares": guidance.Squares("*fp32", "*fp32"), "RENORM": GLOBAL},
    ),
    "dot": (
        replay.dot_kernel,
        {**replayed("bf16"), **guided("bf16", TOKEN), "incoming": factors(), "LEVELS": 6},
    ),
    "dot-wide": (
        replay.dot_kernel,
        {
            **{
                **replayed("fp32"),
                **guided("fp32", TEXT_CHANNEL._replace(WIDE=True)),
                "LEVELS": 10,
            },
            "incoming": factors(log_prob=True, mean_diff=True),
        },
    ),
    "dot-finish": (replay.dot_finish_kernel, {}),
    "backward": (
        replay.backward_kernel,
        {
            **{**replayed("bf16"), **plain("bf16"), "incoming": factors(), "dots": None},
            "grads": GRADS._replace(v_uncond=None, v_uncond_image=None),
        },
    ),
    "backward-guided": (
        replay.backward_kernel,
        {
            **{**replayed("fp32"), **guided("fp32"), "dots": None, "grads": GRADS_FP32},
            "incoming": factors(log_prob=True, mean_diff=True),
        },
    ),
    "backward-text-channel": (
        replay.backward_kernel,
        {**replayed("bf16"), **guided("bf16", TEXT_CHANNEL), "incoming": factors(), "grads": GRADS},
    ),
    "backward-global": (
        replay.backward_kernel,
        {**replayed("bf16"), **guided("bf16", GLOBAL), "incoming": factors(), "grads": GRADS},
    ),
    "means": (common.means_kernel, {}),
    "grpo": (
        grpo.grpo_finish_kernel,
        {**STEPS, "given": GIVEN._replace(mask=None), **CLIPS, "V": grpo.Variant(3, False, True)},
    ),
    "grpo-guard": (
        grpo.grpo_finish_kernel,
        {**STEPS, "given": GIVEN, **CLIPS, "V": grpo.Variant(1, True, False)},
    ),
    "nft": (nft.nft_moments_kernel, NFT),
    "nft-finish": (nft.nft_finish_kernel, {"labels": LABELS, **NFT_NUMBERS, "HAS_REF": True}),
    "nft-backward": (nft.nft_backward_kernel, {**NFT, "grad_v": samples("bf16")}),
    "tokens": (
        tokens.token_kernel,
        {"logits": samples("bf16"), "scale": "fp32"},
    ),
    "tokens-backward": (
        tokens.token_backward_kernel,
        {
            **dict.fromkeys(("logits", "grads"), samples("bf16")),
            "scale": "fp32",
        },
    ),
    "tokens-backward-entropy": (
        tokens.token_backward_kernel,
        {
            **dict.fromkeys(("logits", "grads"), samples("fp16")),
            "grad_log_prob": None,
            "scale": "fp32",
        },
    ),
    "group": (group.group_kernel, {"batch": SCORES, **BOUNDS, "C": credit()}),
    "group-batch": (
        group.group_kernel,
        {
            "batch": SCORES._replace(**COLLECTED),
            "C": credit(
                fusion="gdpo", columns=2, std="global", floor=True, drops=True, collective=True
            ),
            **BOUNDS,
        },
    ),
    "group-applies": (
        group.group_kernel,
        {"batch": SCORES._replace(applies="*u8"), **BOUNDS, "C": credit(fusion="gdpo", columns=2)},
    ),
    "group-batch-applies": (
        group.group_kernel,
        {
            "batch": SCORES._replace(applies="*u8", **COLLECTED),
            "C": credit(
                aggregate="none",
                fusion="advantage",
                columns=2,
                std="global",
                drops=True,
                collective=True,
            ),
            **BOUNDS,
        },
    ),
}
INTEGERS = ("seed", "step", "ids")
NUMBERS = (*common.RUNNING, "n", "v")
ROUNDS_TO_BF16 = (
    "philox",
    "step",
    "step-token",
    "backward",
    "backward-global",
    "nft-backward",
    "tokens-backward",
)


def type_of(parameter):
    name = parameter.name
    if parameter.has_default:
        return parameter.default
    return "*i64" if name in INTEGERS else "i32" if name in NUMBERS else "*fp32"


def source_of(kernel, arguments):
    """What Triton compiles for these arguments: their types, and by their places the constants and,
    for whatever Triton looks at, that it divides by 16."""
    from triton.compiler import ASTSource

    constants, attributes = {}, {}

    def typed(value, place):
        if isinstance(value, tuple) and place[0] not in constant:
            return type(value)(*(typed(item, (*place, i)) for i, item in enumerate(value)))
        if place[0] in constant or value is None:
            constants[place] = value
            return "constexpr"
        running = kernel.arg_names[place[0]] in common.RUNNING
        if value.startswith("*") or (value == "i32" and not running):
            attributes[place] = [["tt.divisibility", 16]]
        return value

    assert set(arguments) <= set(kernel.arg_names)
    constant = {i for i, parameter in enumerate(kernel.params) if parameter.is_constexpr}
    signature = {
        parameter.name: typed(arguments.get(parameter.name, type_of(parameter)), (i,))
        for i, parameter in enumerate(kernel.params)
    }
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_exact_ptx(variant, capability):
    """No fp64, no contraction, no approximate functions: what bitwise equality between kernels
    rests on. The exponentials of tokens are fused by hand."""
    import triton
    from triton.backends.compiler import GPUTarget

    from editr2_kernels import triton_kernels

    kernel, arguments = VARIANTS[variant]
    target = GPUTarget("cuda", capability, 32)
    options = dict(triton_kernels.OPTIONS)
    ptx = triton.compile(source_of(kernel, arguments), target=target, options=options).asm["ptx"]
    assert ".f64" not in ptx
    assert ("fma.rn" in ptx) == variant.startswith("tokens")
    assert ".approx" not in ptx and "div.full" not in ptx
    if variant in ROUNDS_TO_BF16:
        assert "cvt.rn.bf16" in ptx
    # 16 bytes at a time, in kernels that read or write [B, N] or rows of logits.
    if {"velocity", "beta", "logits"} & set(arguments):
        assert "ld.global.v4.b32" in ptx
    if variant in ROUNDS_TO_BF16:
        assert "st.global.v4.b32" in ptx
    atomics = re.findall(r"\b(?:atom|red)\.[\w.]+", ptx)
    # One arrival of each program at a counter, an integer; no sum of floats.
    assert atomics == (["atom.global.gpu.acq_rel.add.u32"] if "group-batch" in variant else [])


class Device:
    """As a driver of Triton, with a GPU that no other test uses; nothing is launched there."""

    def get_current_device(self):
        return 99

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def calls(batch, lines, steps):
    """Every operator, forward and backward, at one size; rows of a renormalisation stay 64 wide."""
    generator = torch.Generator().manual_seed(0)

    def latents():
        return torch.randn(batch, lines, 64, generator=generator)

    table = ek.transition_table(ek.flow_sigmas(steps), dynamics="cps", noise_level=0.5)
    index, seed = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    given = {"x": latents(), "table": table, "step_index": index, "backend": "triton"}
    numbers = torch.rand(batch, generator=generator)
    for renorm in ("none", "token"):
        v = latents().requires_grad_()
        branches = {"v_uncond": latents(), "guidance": 2.0, "renorm": renorm}
        ek.sde_step(v=v.detach(), seed=seed, **given, **branches)
        ek.sde_log_prob(v=v, x_next=latents(), **given, **branches).log_prob.sum().backward()
        scored = {"old_log_prob": numbers, "advantage": numbers, "x_next": latents()}
        ek.grpo_loss(v=v, **scored, **given, **branches).loss.backward()
    v = latents().requires_grad_()
    labels = {"sigma": numbers, "r": numbers, "beta": 0.5, "backend": "triton"}
    ek.nft_loss(latents(), latents(), v=v, v_old=latents(), **labels).loss.backward()
    logits = torch.randn(batch, 512, generator=generator).requires_grad_()
    ek.token_log_prob(logits, index, backend="triton").log_prob.sum().backward()
    credit = ek.CreditOptions(fusion="gdpo")
    scores = torch.rand(batch, steps, 2, generator=generator)
    ek.group_advantage(scores, index, credit, backend="triton")
    ek.group_advantage(scores, index, credit, applies=scores > 0, backend="triton")
    ek.philox_normal(seed, 0, (lines, 64), backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
def test_no_size_is_compiled_anew(monkeypatch):
    """Sizes of the batch, the latents and the schedule are not constants of a kernel, whether one
    is 1 or divides by 16; nor does a bundle make them so."""
    import triton

    asked = {}

    def note(key, fn, **others):
        asked.setdefault(fn.name, set()).add(key)
        return True  # do not compile

    available = backends_module.BackendStatus(True)
    monkeypatch.setattr(backends_module, "_triton_status", lambda device=None: available)
    monkeypatch.setattr(backends_module, "triton_interpreted", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(triton.runtime.driver, "_active", Device())
    calls(2, 16, 5)
    first = {name: set(keys) for name, keys in asked.items()}
    for sizes in ((16, 16, 16), (3, 5, 1), (48, 33, 7), (1, 80, 10)):
        calls(*sizes)
        assert asked == first, sizes
    kernels = {kernel.__name__ for kernel, _ in VARIANTS.values()}
    assert {name.rpartition(".")[2] for name in first} >= kernels - {
        "scale_finish_kernel",
        "dot_finish_kernel",
    }
