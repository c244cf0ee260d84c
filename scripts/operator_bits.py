"""Every bit of the transition tables and of the operators, as text: what `same_numbers.py` compares
of two trees.

    python scripts/operator_bits.py tables|operators [--backends ref,cpu] [--every N] > bits.json

Works on the `editr2_kernels` that the path leads to, by its public names alone, and writes {case:
{output: text}}. A tensor's text is its dtype, its shape, a digest of its bytes and its first
values; of a call that is refused, it is the message. Inputs are drawn here, so that they are the
same for both trees.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import editr2_kernels as ek

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
REFUSALS = (ValueError, TypeError, RuntimeError)
Texts = dict[str, str]
Case = tuple[str, Callable[[], Texts]]


# What a call gives, as text.


def text_of(value: Any) -> str:
    """Of a tensor, the bits; of anything else, its JSON or its repr."""
    if not isinstance(value, Tensor):
        return (
            json.dumps(value)
            if isinstance(value, (bool, int, float, str, list, type(None)))
            else repr(value)
        )
    value = value.detach().contiguous()
    digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    first = " ".join(f"{float(x):.9g}" for x in value.reshape(-1)[:4])
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {digest} ({first})"


def named(value: Any, name: str = "") -> dict[str, Any]:
    """The parts of a result by name: of the named tuples that operators return, and of
    dataclasses."""
    if hasattr(value, "_asdict"):
        parts = value._asdict()
    elif dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return {name or "result": value}
    return {
        key: x
        for part, v in parts.items()
        for key, x in named(v, f"{name}.{part}" if name else part).items()
    }


def texts(function: Callable[..., Any], *arguments: Any, **options: Any) -> Texts:
    """Of all results, and of the gradient of each that has one to each argument that wants one."""
    try:
        results = named(function(*arguments, **options))
        given = inspect.signature(function).bind(*arguments, **options).arguments
        given |= given.pop("guidance", {}) if isinstance(given.get("guidance"), dict) else {}
        wants = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
        wants |= {
            f"logits.{i}": x
            for i, x in enumerate(given.get("logits", ()))
            if isinstance(given["logits"], tuple)
        }
        found = {name: text_of(result) for name, result in results.items()}
        for name, result in results.items():
            if isinstance(result, Tensor) and result.requires_grad:
                incoming = drawn(f"to {name}", tuple(result.shape), result.dtype)
                grads = torch.autograd.grad(
                    result, wants.values(), incoming, retain_graph=True, allow_unused=True
                )
                found |= {
                    f"d {name} / d {of}": text_of(g) for of, g in zip(wants, grads, strict=True)
                }
    except REFUSALS as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return found


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    """Standard normal numbers that follow from the name and the shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    return torch.randn(shape, generator=generator).to(dtype)


# Tables.


def schedules() -> Iterator[tuple[str, list[float]]]:
    for shift in (0.5, 1.0, 3.0):
        yield from ((f"{n} steps, shift {shift}", ek.flow_sigmas(n, shift)) for n in range(1, 21))
    yield "not from 1 to 0", [0.98, 0.7, 0.31, 0.05]
    yield "uneven", [1.0, 0.999, 0.5, 0.4999, 0.02, 0.0]


def bad_tables() -> Iterator[Case]:
    good = [1.0, 0.5, 0.0]
    for options in (
        {"sigmas": [1.0]},
        {"sigmas": [1.2, 0.5, 0.0]},
        {"sigmas": [1.0, 0.5, 0.5]},
        {"sigmas": torch.tensor([0.0, 1.0])},
        {"dynamics": "sde"},
        {"solver": "heun"},
        {"log_prob": "mean"},
        {"noise_level": -0.1},
        {"noise_level": float("nan")},
        {"noise_level": 1e-30},
        {"sigma_max": 1.0},
        {"window": (0, 3)},
        {"window": (2, 1)},
        {"window": 1},
        {"window": (0, "1")},
    ):
        options = {"sigmas": good, "noise_level": 0.7, **options}
        sigmas = options.pop("sigmas")
        yield (
            f"refused {sigmas} {options}",
            lambda s=sigmas, o=options: texts(ek.transition_table, s, **o),
        )
    for steps, shift in ((0, 1.0), (4, 0.0), (4, float("inf"))):
        yield (
            f"refused flow_sigmas {steps} {shift}",
            lambda n=steps, s=shift: texts(ek.flow_sigmas, n, s),
        )


def tables() -> Iterator[Case]:
    """Every dynamics, solver and score at every schedule, level and window."""
    yield "names", lambda: dict.fromkeys(ek.__all__, "exported")
    for name in (
        "COLUMNS",
        "DYNAMICS",
        "SOLVERS",
        "LOG_PROBS",
        "KL_SCALES",
        "RENORMS",
        "INITIAL_STEP",
    ):
        yield name, lambda n=name: texts(lambda: getattr(ek, n))
    for kind in ("COMPAT", "CREDIT_PRESETS"):
        for name, preset in getattr(ek, kind).items():
            yield f"{kind} {name}", lambda p=preset: texts(lambda: p)
    for name, sigmas in schedules():
        yield f"sigmas {name}", lambda s=sigmas: {"sigmas": text_of(torch.tensor(s, dtype=F64))}
        n = len(sigmas) - 1
        windows = dict.fromkeys([None, (0, 1), (n // 3, n // 3 + 2), (n, n)])
        for dynamics, solver, log_prob in itertools.product(
            ek.DYNAMICS, ek.SOLVERS, (None, *ek.LOG_PROBS)
        ):
            made = {}
            for level, window in itertools.product((None, 0.0, 0.3, 1.0, 1.3), windows):
                options = {
                    "noise_level": level,
                    "window": window,
                    "solver": solver,
                    "log_prob": log_prob,
                }
                made[f"level {level}, window {window}"] = row_bits(
                    sigmas, dynamics=dynamics, **options
                )
            for top in (0.0, 0.9):
                options = {
                    "noise_level": 0.7,
                    "sigma_max": top,
                    "solver": solver,
                    "log_prob": log_prob,
                }
                made[f"sigma_max {top}"] = row_bits(sigmas, dynamics=dynamics, **options)
            yield f"{dynamics}, {solver}, log_prob {log_prob}, {name}", lambda m=made: m
    yield from bad_tables()


def row_bits(sigmas: list[float], **options: Any) -> str:
    """A checksum a row, so that of a table that differs one sees where."""
    try:
        table = ek.transition_table(sigmas, **options)
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    return " ".join(f"{zlib.crc32(row.numpy().tobytes()):08x}" for row in table)


# Operators.

DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16))
SHAPES = ((4, 5, 12), (3, 33, 129), (2, 1), (0, 7))  # the second is three chunks and a rest
INTERPRETED_SHAPES = ((3, 5, 12), (2, 9, 250))
LEVELS = (0, 1, 2, 4, 9)  # steps of ten, with an ODE row at the end


def guidances(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    def branch(name: str) -> Tensor:
        return drawn(name, shape, dtype).requires_grad_()

    weights = drawn("weights", shape[:1]).abs() + 1
    yield "plain", {}
    for renorm in ek.RENORMS:
        yield f"text {renorm}", {"v_uncond": branch("u"), "guidance": 4.0, "renorm": renorm}
        both = {
            "v_uncond": branch("u"),
            "guidance": weights,
            "v_uncond_image": branch("i"),
            "guidance_image": 1.5,
        }
        yield f"both {renorm}", {**both, "renorm": renorm}
        yield f"interval {renorm}", {**both, "guidance_interval": (0.35, 0.8), "renorm": renorm}


def latent_operators(
    shape: tuple[int, ...], of_x: torch.dtype, of_v: torch.dtype, backend: str
) -> Iterator[Case]:
    batch, one = shape[0], {"backend": backend}
    x, x_next, noise = (drawn(name, shape, of_x) for name in ("x", "x_next", "noise"))
    v = drawn("v", shape, of_v).requires_grad_()
    v_ref, v_old, m_prev = (drawn(name, shape, of_v) for name in ("ref", "old", "m_prev"))
    seed = torch.arange(batch) * 7 + 2**40
    index = torch.tensor([LEVELS[i % len(LEVELS)] for i in range(batch)], dtype=torch.int64)
    sigmas = ek.flow_sigmas(10, 3.0)
    table = ek.transition_table(sigmas, dynamics="flow-sde", noise_level=0.7, window=(0, 9))
    second = ek.transition_table(sigmas, dynamics="dpm++sde", solver="dpm++2m", window=(2, 5))
    counted = torch.arange(batch) % 3 != 1
    r, sigma, advantage = (
        drawn("r", (batch,)).sigmoid(),
        table[index, 6],
        3 * drawn("advantage", (batch,)),
    )
    old = ek.sde_log_prob(x, x_next, v_old, table, index, backend="ref").log_prob + 0.01 * drawn(
        "moved", (batch,)
    )
    move = (x, x_next, v, table, index)
    score = (*move, old, advantage)

    def case(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Case:
        return name, lambda: texts(function, *arguments, **options)

    for name, guidance in guidances(shape, of_v):
        step = (x, v, table, index, seed)
        yield case(f"sde_step {name}", ek.sde_step, *step, return_x0=True, **guidance, **one)
        yield case(f"sde_log_prob {name}", ek.sde_log_prob, *move, v_ref=v_ref, **guidance, **one)
        grpo = {"clip": (0.001, 0.002), "v_ref": v_ref, "kl_weight": 0.1, **guidance, **one}
        yield case(f"grpo_loss {name}", ek.grpo_loss, *score, **grpo)
        if backend == "ref":
            yield case(f"guided_velocity {name}", ek.guided_velocity, v, sigma, **guidance)
    for dtype in (F32, BF16, F16):
        options = {"store_dtype": dtype, **one}
        yield case(f"sde_step stored {dtype}", ek.sde_step, x, v, table, index, seed, **options)
        options = {"store_dtype": dtype, "score": "unrounded", "noise": noise, **one}
        yield case(f"sde_step unrounded {dtype}", ek.sde_step, x, v, table, index, None, **options)
    second_order = {"m_prev": m_prev, **one}
    yield case(
        "sde_step m_prev", ek.sde_step, x, v, second, index, seed, return_x0=True, **second_order
    )
    yield case("sde_log_prob m_prev", ek.sde_log_prob, x, x_next, v, second, index, **second_order)
    for scale, guard in itertools.product(ek.KL_SCALES, (False, True)):
        options = {
            "kl_scale": scale,
            "kl_weight": 0.3,
            "v_ref": v_ref,
            "clip": 0.05,
            "guard": guard,
            **one,
        }
        options |= {"v_old": v_old} if guard else {}
        yield case(f"grpo_loss {scale} guard {guard}", ek.grpo_loss, *score, **options)
    for clip, bound, mask, normalizer in (
        (1e-5, None, counted, None),
        ((0.2, 0.3), 0.5, None, 7.0),
        (1, 5.0, ~counted, 3),
    ):
        options = {
            "clip": clip,
            "advantage_clip": bound,
            "mask": mask,
            "normalizer": normalizer,
            **one,
        }
        yield case(f"grpo_loss clip {clip} bound {bound}", ek.grpo_loss, *score, **options)
        options |= {"v_ref": v_ref, "kl_weight": 0.01}
        yield case(
            f"awm_loss clip {clip} bound {bound}",
            ek.awm_loss,
            x,
            noise,
            v,
            old,
            advantage,
            **options,
        )
    yield case("awm_log_prob", ek.awm_log_prob, x, noise, v, **one)
    for beta, ref, mask, least in (
        (1.0, None, None, 1e-5),
        (0.1, v_ref, counted, 1e-5),
        (0.7, v_ref, None, 0.5),
    ):
        options = {
            "beta": beta,
            "v_ref": ref,
            "mask": mask,
            "min_weight": least,
            "ref_weight": 0.02,
            **one,
        }
        yield case(f"nft_loss {beta} {least}", ek.nft_loss, x, noise, sigma, v, v_old, r, **options)
    yield case(
        "nft_loss whole", ek.nft_loss, x, noise, sigma, v, v_old, r, beta=1.0, normalizer=9.0, **one
    )
    for dtype in (F32, BF16, F16):
        for step in (ek.INITIAL_STEP, 3, index):
            options = {"dtype": dtype, **one}
            yield case(
                f"philox {dtype} {text_of(step)}",
                ek.philox_normal,
                seed,
                step,
                shape[1:],
                **options,
            )


def references() -> Iterator[Case]:
    """The definitions in float64."""
    shape = (4, 5, 12)
    x, x_next, noise = (drawn(name, shape, F64) for name in ("x", "x_next", "noise"))
    v, v_ref, v_old = (drawn(name, shape, F64) for name in ("v", "ref", "old"))
    v.requires_grad_()
    table = ek.transition_table(
        ek.flow_sigmas(10, 3.0), dynamics="flow-sde", noise_level=0.7
    ).double()
    index, r = torch.tensor([0, 2, 5, 9]), torch.tensor([0.1, 0.4, 0.9, 1.0], dtype=F64)
    old, advantage = -torch.ones(4, dtype=F64), drawn("advantage", (4,), F64)
    move = (x, x_next, v, table, index)
    for name, guidance in guidances(shape, F64):
        yield (
            f"sde_log_prob_ref {name}",
            lambda g=guidance: texts(ek.sde_log_prob_ref, *move, v_ref=v_ref, **g),
        )
        options = {"v_ref": v_ref, "kl_weight": 0.1, "guard": True, "v_old": v_old, **guidance}
        yield (
            f"grpo_loss_ref {name}",
            lambda o=options: texts(ek.grpo_loss_ref, *move, old, advantage, **o),
        )
    nft = (x, noise, table[index, 6], v, v_old, r)
    yield "nft_loss_ref", lambda: texts(ek.nft_loss_ref, *nft, beta=0.5, v_ref=v_ref)
    yield "nft_optimality", lambda: texts(ek.nft_optimality, advantage, 0.7)
    logits, ids = drawn("logits", (5, 31), F64).requires_grad_(), torch.tensor([0, 3, 30, -100, 7])
    yield "token_log_prob_ref", lambda: texts(ek.token_log_prob_ref, logits, ids, temperature=0.7)


def token_operators(rows: int, vocabulary: int, dtype: torch.dtype, backend: str) -> Iterator[Case]:
    logits = (4 * drawn("logits", (rows, vocabulary), dtype)).requires_grad_()
    pair = tuple(drawn(f"hidden {n}", (n, 24), dtype).requires_grad_() for n in (rows, vocabulary))
    ids = (torch.arange(rows) * 131) % vocabulary
    ignored = torch.where(torch.arange(rows) % 4 == 1, -100, ids)
    for temperature, of in itertools.product((1.0, 0.7), (ids, ignored)):
        options = {"temperature": temperature, "backend": backend}
        name = f"token_log_prob {temperature} {'all' if of is ids else 'some'}"
        yield name, lambda i=of, o=options: texts(ek.token_log_prob, logits, i, **o)
        chunks = {**options, "chunk_rows": 3}
        yield f"{name} from hidden", lambda i=of, o=options: texts(ek.token_log_prob, pair, i, **o)
        yield (
            f"{name} from hidden by 3",
            lambda i=of, o=chunks: texts(ek.token_log_prob, pair, i, **o),
        )


def credit(backend: str) -> Iterator[Case]:
    """Every preset, and every choice of the options that are choices."""
    scores = (drawn("scores", (24, 3, 2)) * 2).round() / 2
    group, mask = torch.arange(24) // 6 * 11, drawn("mask", (24, 3)) > -1.2
    weights = torch.tensor([0.3, 0.9])
    for name, options in ek.CREDIT_PRESETS.items():
        for given in ({}, {"mask": mask}, {"weights": weights}, {"mask": mask, "weights": weights}):
            call = {"options": options, **given, "backend": backend}
            yield (
                f"credit {name} {list(given)}",
                lambda c=call: texts(ek.group_advantage, scores, group, **c),
            )
    choices = {
        "aggregate": ("none", "mean", "last", "product", "prefix"),
        "fusion": ("reward", "advantage", "gdpo"),
        "std": ("group", "global", "none"),
        "unbiased": (False, True),
        "filter_reward": (None, 1),
        "max_mean": (None, 0.4),
    }
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True)) | {
            "broadcast": values[0] != "none",
            "eps_mode": "floor",
        }
        call = {
            "options": ek.CreditOptions(**chosen),
            "mask": mask,
            "weights": weights,
            "backend": backend,
        }
        yield f"credit {values}", lambda c=call: texts(ek.group_advantage, scores, group, **c)


def refusals() -> Iterator[Case]:
    """One wrong argument a call, or one too few."""
    x, two, index = drawn("x", (2, 3, 4)), torch.ones(2), torch.tensor([0, 1])
    table = ek.transition_table([1.0, 0.5, 0.0], noise_level=0.7)
    step = {"x": x, "v": x, "table": table, "step_index": index}
    score = {**step, "x_next": x, "old_log_prob": two, "advantage": two}
    awm = {"x0": x, "noise": x, "v": x, "old_log_prob": two, "advantage": two}
    nft = {"x0": x, "noise": x, "sigma": two, "v": x, "v_old": x, "r": two, "beta": 1.0}
    rewards = {
        "scores": torch.zeros(4, 2, 1),
        "group": torch.zeros(4, dtype=torch.int64),
        "options": ek.CreditOptions(),
    }
    tokens = {"logits": x, "ids": torch.zeros(2, 3, dtype=torch.int64)}
    branch = {"v_uncond": x, "guidance": 2.0}
    joined: dict[str, Any] = {"aggregate": "mean", "broadcast": True}
    wrong: dict[Callable[..., Any], tuple[dict[str, Any], list[dict[str, Any]]]] = {
        ek.sde_step: (
            {**step, "seed": index},
            [
                *({"x": x.int()}, {"v": x[:1]}, {"table": table[:, :7]}, {"table": table.double()}),
                *(
                    {"step_index": index + 1},
                    {"step_index": two},
                    {"seed": None},
                    {"seed": index[:1]},
                ),
                *(
                    {"noise": x[:1]},
                    {"store_dtype": F64},
                    {"score": "exact"},
                    {"backend": "gpu"},
                    {"out": x},
                ),
                *(
                    {"v_uncond": x},
                    {"guidance": 2.0},
                    {"renorm": "token"},
                    {"guidance_interval": (0, 1)},
                ),
                *({**branch, "renorm": "rows"}, {**branch, "guidance_interval": (0.5, 0.5)}),
                *({**branch, "guidance": float("nan")}, {**branch, "v_uncond": x.half()}),
                {"table": ek.transition_table(ek.flow_sigmas(4), dynamics="dpm++sde")[1:]},
            ],
        ),
        ek.sde_log_prob: (
            {**step, "x_next": x},
            [{"x_next": x[:1]}, {"v_ref": x[:1]}, {"m_prev": x[:1]}],
        ),
        ek.grpo_loss: (
            score,
            [
                *(
                    {"clip": -1.0},
                    {"clip": (1.5, 2.0)},
                    {"clip": (1, 2, 3)},
                    {"clip": two},
                    {"advantage_clip": 0.0},
                ),
                *(
                    {"kl_weight": 0.1},
                    {"kl_weight": -1.0},
                    {"kl_scale": "x"},
                    {"guard": True},
                    {"v_old": x},
                ),
                *({"normalizer": 0.0}, {"mask": two}, {"mask": two[:1] > 0}),
                *({"old_log_prob": index}, {"advantage": two[:1]}),
            ],
        ),
        ek.awm_loss: (awm, [{"noise": x[:1]}, {"x0": x.int()}, {"kl_weight": 0.1}]),
        ek.nft_loss: (
            nft,
            [
                *(
                    {"sigma": 2 * two},
                    {"r": -two},
                    {"beta": 0.0},
                    {"v_old": x[:1]},
                    {"min_weight": 0.0},
                ),
                *({"ref_weight": -1.0}, {"advantage_max": float("inf")}, {"normalizer": True}),
            ],
        ),
        ek.group_advantage: (
            rewards,
            [
                *(
                    {"scores": index},
                    {"scores": torch.zeros(4, 2)},
                    {"scores": torch.full((4, 2, 1), torch.nan)},
                ),
                *({"group": index}, {"weights": two}, {"mask": two}, {"options": {}}),
                {"options": ek.CreditOptions(filter_reward=3)},
            ],
        ),
        ek.CreditOptions: (
            {},
            [
                *(
                    {"aggregate": "sum"},
                    {"eps": -1.0},
                    {"clip": 0.0},
                    {"broadcast": True},
                    {"max_mean": "a"},
                ),
                *({**joined, "baseline": "session_turn"}, {**joined, "filter_in_statistics": True}),
                *({"filter_reward": -1}, {"min_std": -1.0}),
            ],
        ),
        ek.token_log_prob: (
            tokens,
            [
                *(
                    {"ids": index},
                    {"ids": tokens["ids"] + 4},
                    {"temperature": 0.0},
                    {"chunk_rows": 1},
                ),
                *({"logits": (x, x)}, {"logits": (x, x[0, :, :2])}, {"logits": (x,)}),
            ],
        ),
        ek.philox_normal: (
            {"seed": index, "step": 0, "shape": (3,)},
            [{"seed": two}, {"step": index[:1]}, {"shape": 3}, {"shape": (-1,)}, {"dtype": F64}],
        ),
    }
    for function, (accepted, changes) in wrong.items():
        for i, change in enumerate(changes):
            name = f"refused {function.__name__} {i} {' '.join(change)}"
            yield name, lambda f=function, o={**accepted, **change}: texts(f, **o)


def operators(backends: list[str]) -> Iterator[Case]:
    for backend in backends:
        slow = backend == "triton"  # the interpreter: 50 ms a program
        for shape, (of_x, of_v) in itertools.product(
            INTERPRETED_SHAPES if slow else SHAPES, DTYPES
        ):
            kind = f"{backend} {list(shape)} {of_x} {of_v}".replace("torch.", "")
            yield from (
                (f"{kind}: {name}", run)
                for name, run in latent_operators(shape, of_x, of_v, backend)
            )
        for (rows, vocabulary), dtype in itertools.product(
            ((5, 31), (2, 5000), (0, 9)), (F32, BF16, F16)
        ):
            kind = f"{backend} {[rows, vocabulary]} {dtype}".replace("torch.", "")
            cases = token_operators(rows, vocabulary, dtype, backend)
            yield from ((f"{kind}: {name}", run) for name, run in cases)
        yield from ((f"{backend}: {name}", run) for name, run in credit(backend))
    if "ref" in backends:
        yield from references()
        yield from refusals()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("tables", "operators"))
    parser.add_argument("--backends", default="ref,cpu")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(
        True
    )  # fills torch.empty with NaN: what is not written shows
    names = options.backends.split(",")
    for name in names if options.what == "operators" else ():
        if not (status := ek.backends()[name]).available:
            raise SystemExit(f"backend {name}: {status.reason}")
    cases = tables() if options.what == "tables" else operators(names)
    found = {name: run() for name, run in itertools.islice(cases, 0, None, options.every)}
    json.dump({"package": str(Path(ek.__file__).parent), "cases": found}, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
