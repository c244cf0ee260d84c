"""The operators of a training step on this device, each beside a copy of as many bytes: python -m
scripts.headline

On a GPU the calls on all sets of inputs are one CUDA graph, replayed in turns with the backends and
the copy: what is timed is the device alone, on inputs that together are past its L2. The host's
part of a call is timed apart. Nothing is compiled but Triton's kernels, so that all of it takes
half a minute; against eager and compiled code `bench/` compares. Every result is first compared
with the reference's. On a CPU the sizes are tiny: it shows that every call works.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import editr2_kernels as ek
from bench import frame
from bench.providers import our_backends
from bench.sizes import BF16, FP32, MIXED, PAST_L2, Size

STEPS = 10
MAX_SETS = 32  # of inputs; where they stay in the L2 no share of a copy is told
HOST_CALLS = {"cuda": 50, "cpu": 1}
COPY = "copy"
UNCOUNTED = frame.Profile(None, None, None)
COLUMNS = "{:22} {:18} {:15} {:7} {:>8} {:>8} {:>7} {:>6} {:>8} {:>8} {:>8}"
HEAD = COLUMNS.format(
    "operator", "shape", "dtype", "backend", "us", "copy us", "% copy", "GB/s", "host us",
    "launches", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """One set of inputs. x, x_next, noise: [B, N, C]; v, v_ref, v_old: likewise, as a model gives
    them."""

    x: Tensor
    x_next: Tensor
    noise: Tensor
    v: Tensor  # requires grad
    v_ref: Tensor
    v_old: Tensor
    old_log_prob: (
        Tensor  # that of v: no ratio is clipped, so that the backward pass reads everything
    )
    advantage: Tensor
    sigma: Tensor
    r: Tensor
    one: Tensor  # the gradient to a loss
    table: Tensor
    step_index: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Tokens:
    logits: Tensor  # [M, V], requires grad
    ids: Tensor
    ones: Tensor  # the gradients to a row's log-prob and entropy


@dataclass(frozen=True)
class Operator:
    """call(inputs, backend) moves at least `moved` bytes by our plan."""

    name: str
    moved: int
    call: Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """Operators on the same inputs, of which the leanest of them reads `read` bytes a set."""

    size: Size
    read: int
    make: Callable[[Size], Any]
    operators: Sequence[Operator]


def make_latents(size: Size) -> Latents:
    batch, *sample = size.shape

    def drawn(dtype: torch.dtype) -> Tensor:
        return torch.randn(size.shape, device=size.device).to(dtype)

    x, v = drawn(size.dtypes.x), drawn(size.dtypes.v)
    table = ek.transition_table(
        ek.flow_sigmas(STEPS, 3.0), noise_level=0.7, device=torch.device(size.device)
    )
    step_index = torch.arange(batch, device=size.device) % (STEPS - 2) + 1
    seed = torch.arange(batch, device=size.device)
    step = ek.sde_step(x, v, table, step_index, seed, backend=our_backends(size.device)[0])
    advantage = torch.linspace(-1.0, 1.0, batch, device=size.device) + 0.1
    return Latents(
        x=x,
        x_next=step.x_next,
        noise=torch.randn(size.shape, device=size.device),
        v=v.requires_grad_(),
        v_ref=drawn(size.dtypes.v),
        v_old=drawn(size.dtypes.v),
        old_log_prob=step.log_prob,
        advantage=advantage,
        sigma=table[step_index, 6],
        r=advantage.sigmoid(),
        one=torch.ones((), device=size.device),
        table=table,
        step_index=step_index,
        seed=seed,
    )


def make_tokens(size: Size) -> Tokens:
    rows, vocabulary = size.shape
    logits = torch.randn(size.shape, device=size.device).to(size.dtypes.v).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device=size.device)
    return Tokens(logits, ids, torch.ones(rows, device=size.device))


def sde_step(i: Latents, backend: str, **options: Any) -> Any:
    return ek.sde_step(i.x, i.v.detach(), i.table, i.step_index, i.seed, backend=backend, **options)


def step_noise_given(i: Latents, backend: str) -> Any:
    return sde_step(i, backend, noise=i.noise)


def guided_step(i: Latents, backend: str) -> Any:
    """By a number: beside the step without guidance, what it costs in launches and on the host."""
    return sde_step(i, backend, v_uncond=i.v_ref, guidance=4.0)


def renormalised_step(i: Latents, backend: str) -> Any:
    return sde_step(i, backend, v_uncond=i.v_ref, guidance=4.0, renorm="token")


def normal(i: Latents, backend: str) -> Tensor:
    return ek.philox_normal(i.seed, i.step_index, i.x.shape[1:], backend=backend)


def grpo(i: Latents, v: Tensor, backend: str) -> ek.GrpoLoss:
    return ek.grpo_loss(
        i.x,
        i.x_next,
        v,
        i.table,
        i.step_index,
        i.old_log_prob,
        i.advantage,
        clip=0.2,
        v_ref=i.v_ref,
        kl_weight=0.1,
        backend=backend,
    )


def grpo_forward(i: Latents, backend: str) -> tuple[Tensor, ...]:
    return grpo(i, i.v.detach(), backend)[:2]  # the metrics are differences of nearly equal numbers


def grpo_gradient(i: Latents, backend: str) -> tuple[Tensor, ...]:
    return torch.autograd.grad(grpo(i, i.v, backend).loss, i.v, i.one)


def nft_gradient(i: Latents, backend: str) -> tuple[Tensor, ...]:
    loss = ek.nft_loss(
        i.x,
        i.x_next,
        i.sigma,
        i.v,
        i.v_old,
        i.r,
        beta=0.5,
        v_ref=i.v_ref,
        ref_weight=0.1,
        backend=backend,
    ).loss
    return torch.autograd.grad(loss, i.v, i.one)


def token_forward(i: Tokens, backend: str) -> tuple[Tensor, ...]:
    return ek.token_log_prob(i.logits.detach(), i.ids, backend=backend)


def token_gradient(i: Tokens, backend: str) -> tuple[Tensor, ...]:
    out = ek.token_log_prob(i.logits, i.ids, backend=backend)
    return torch.autograd.grad((out.log_prob, out.entropy), i.logits, (i.ones, i.ones))


def latents(size: Size) -> Case:
    noise = 4 * size.elements
    operators = [
        Operator("step, noise inside", size.bytes(x=2, v=1), sde_step),
        Operator("step, noise given", size.bytes(x=2, v=1) + noise, step_noise_given),
        Operator("step, guided", size.bytes(x=2, v=2), guided_step),
        Operator("step, guided by token", size.bytes(x=2, v=4), renormalised_step),
        Operator("grpo forward", size.bytes(x=2, v=2), grpo_forward),
        Operator("grpo forward+backward", size.bytes(x=4, v=5), grpo_gradient),
        Operator("nft forward+backward", size.bytes(x=4, v=7), nft_gradient),
        Operator("normal", noise, normal),
    ]
    return Case(size, size.bytes(x=1, v=1), make_latents, operators)


def tokens(size: Size) -> Case:
    operators = [
        Operator("token forward", size.bytes(v=1), token_forward),
        Operator("token forward+backward", size.bytes(v=3), token_gradient),
    ]
    return Case(size, size.bytes(v=1), make_tokens, operators)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [latents(Size(device, (2, 64, 64), MIXED)), tokens(Size(device, (4, 100), BF16))]
    large, usual, small = PAST_L2, (16, 4096, 64), (1, 1024, 64)
    return [  # what is wanted first, first: the time may be up
        latents(Size(device, large, MIXED)),
        latents(Size(device, usual, MIXED)),
        tokens(Size(device, (8192, 32000), BF16)),
        tokens(Size(device, (1024, 152064), BF16)),
        latents(Size(device, large, BF16)),
        latents(Size(device, usual, BF16)),
        latents(Size(device, small, MIXED)),
        latents(Size(device, large, FP32)),
    ]


def largest_error(found: Any, expected: Any) -> tuple[float, bool]:
    """The largest difference between two results, in the largest value of its tensor; and whether a
    sum in another order, or one rounding to the tensor's dtype, explains it."""
    worst, green = 0.0, True
    for a, b in zip(frame.tensors(found), frame.tensors(expected), strict=True):
        error = (a.float() - b.float()).abs().max().item() / max(
            b.float().abs().max().item(), 1e-30
        )
        green = green and error <= max(2e-5, torch.finfo(a.dtype).eps)
        worst = error if error != error else max(worst, error)
    return worst, green


def one_after_another(
    call: Callable[[Any], Any], sets: Sequence[Any], device: str
) -> Callable[[], Any]:
    """The call on every set; on a GPU as one graph, in which the results of all sets have memory of
    their own."""

    def run() -> list[Any]:
        return [call(one) for one in sets]

    if device == "cpu":
        return run
    side = torch.cuda.Stream()  # autograd wants one run on the capturing side first
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_us(call: Callable[[], Any], device: str) -> float:
    """Of a plain call, without waiting for the device."""
    calls = HOST_CALLS[device]
    call()
    _wait(device)
    before = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - before
    _wait(device)
    return elapsed / calls * 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    case: Case,
    operator: Operator,
    sets: Sequence[Any],
    backends: Sequence[str],
    seconds: float,
    where: dict[str, Any],
    count: bool,
) -> Iterator[frame.Row | str]:
    """A row a backend; or words, of a backend that fails, and of one whose result is wrong with its
    times. count: the launches too."""
    size, device = case.size, case.size.device
    l2 = frame.l2_bytes(device)
    # Plain calls: the copies of an H200's graph took 1.6 times as long at some sizes, as if by
    # another engine.
    runs = {COPY: (frame.copy_provider(operator.moved, device), 1)}
    errors: dict[str, tuple[float, bool]] = {}
    host: dict[str, float] = {}
    seen: dict[str, frame.Profile] = {}
    expected = operator.call(sets[0], "ref")
    for backend in backends:
        try:
            errors[backend] = largest_error(operator.call(sets[0], backend), expected)
            call = partial(operator.call, sets[0], backend)
            host[backend] = host_us(call, device)
            seen[backend] = frame.profile(call, device) if count else UNCOUNTED
            runs[backend] = (
                one_after_another(partial(operator.call, backend=backend), sets, device),
                len(sets),
            )
        # On a machine that is lent for minutes a fault of one backend must not hide the rest; it is
        # the exit status.
        except Exception as fault:
            yield (
                f"{operator.name} {list(size.shape)} {size.dtypes.name} {backend}: "
                f"{type(fault).__name__}: {fault}"
            )
    del expected
    clock: frame.Clock = frame.EventClock() if device == "cuda" else frame.HostClock()
    times = frame.interleave(
        {name: run for name, (run, _) in runs.items()}, clock, seconds, min_rounds=3
    )
    cold = frame.past_cache(len(sets), case.read, l2)
    quantiles = {
        name: [ms / runs[name][1] for ms in frame.quantiles(found)] for name, found in times.items()
    }
    copy_ms = quantiles.pop(COPY)[1]
    for backend, (p20, p50, p80) in quantiles.items():
        error, green = errors[backend]
        row = frame.Row(
            op="headline",
            provider=f"editr2 {backend}, graph",
            mode=operator.name,
            shape=list(size.shape),
            dtype=size.dtypes.name,
            p20_ms=round(p20, 5),
            p50_ms=round(p50, 5),
            p80_ms=round(p80, 5),
            bytes=operator.moved,
            copy_gb_s=round(operator.moved / copy_ms / 1e6, 1),
            copy_percent=round(100 * copy_ms / p50, 1) if cold else None,
            launches=seen[backend].launches,
            host_syncs=seen[backend].host_syncs,
            max_error=error,
            rounds=len(times[backend]),
            extra={
                "host_us": round(host[backend], 1),
                "sets": len(sets),
                "copy_ms": round(copy_ms, 5),
            },
            **where,
        )
        yield row if green else f"the result is wrong, no row: {line(row)}"


def line(row: frame.Row) -> str:
    assert row.bytes is not None and row.max_error is not None
    return COLUMNS.format(
        row.mode,
        str(row.shape),
        row.dtype,
        row.provider.split()[1].rstrip(","),
        f"{row.p50_ms * 1e3:.1f}",
        f"{row.extra['copy_ms'] * 1e3:.1f}",
        "in L2" if row.copy_percent is None else f"{row.copy_percent:.1f}",
        f"{row.bytes / row.p50_ms / 1e6:.0f}",
        f"{row.extra['host_us']:.1f}",
        "-" if row.launches is None else str(row.launches),
        f"{row.max_error:.1e}",
    )


def order(rows: Sequence[frame.Row]) -> Iterator[str]:
    """By operator, the time of backend "cuda" over that of "triton" at each size: which of them
    `backend=None` should take."""
    ratios: dict[str, list[str]] = {}
    medians = {
        (row.mode, str(row.shape), row.dtype, row.provider.split()[1].rstrip(",")): row.p50_ms
        for row in rows
    }
    for (mode, shape, dtype, backend), cuda in medians.items():
        triton = medians.get((mode, shape, dtype, "triton"))
        if backend == "cuda" and triton is not None:
            ratios.setdefault(mode, []).append(f"{cuda / triton:.2f}")
    if ratios:
        yield "cuda over triton, in the order of the sizes above"
    for mode, found in ratios.items():
        yield f"{mode:22} {' '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, help="folder that rows are appended to (headline.jsonl)"
    )
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing an operator")
    parser.add_argument("--first", type=int, help="so many cases only")
    parser.add_argument(
        "--backends", nargs="+", choices=("cpu", "cuda", "triton"), help="all that the device has"
    )
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = given.backends or our_backends(device)
    torch.manual_seed(0)
    where = frame.environment(device)
    print(
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit "
        f"{where['commit']}"
    )
    for name, status in ek.backends().items():
        print(
            f"backend {name}: {status.detail if status.available else f'absent: {status.reason}'}"
        )
    print(HEAD, flush=True)
    failed, rows, counted = 0, list[frame.Row](), set[str]()
    for case in cases(device)[: given.first]:
        copies = frame.copies_past_cache(case.read, frame.l2_bytes(device))
        sets = [case.make(case.size) for _ in range(min(MAX_SETS, copies))]
        for operator in case.operators:
            if device == "cuda":
                torch.cuda.empty_cache()  # what the graphs before held
            # Launches depend on no size. Not where another profiler looks, and nothing is timed.
            count = operator.name not in counted and given.seconds > 0
            counted.add(operator.name)
            for found in measure(case, operator, sets, ours, given.seconds, where, count):
                if isinstance(found, str):
                    failed += 1
                    print(f"FAILED {found}", flush=True)
                    continue
                print(line(found), flush=True)
                rows.append(found)
                if given.results is not None:
                    frame.append_rows(given.results, [found])
    for words in order(rows):
        print(words)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
