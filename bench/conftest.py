"""`compare`: the only way to a row. A gate before the timing and after it, providers in turns, one
row a provider.

Options: --results DIR (bench/results), --seconds S of timing a case, --full for the whole grid of
    sizes, dtypes, modes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import frame
from bench.frame import Clock, EventClock, Graph, HostClock, Provider, Row

ROWS = pytest.StashKey[list[Row]]()
LEFT_OUT = pytest.StashKey[list[str]]()
COPY = "copy"  # the name of the copy among the providers of a round


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("editr2 benchmarks")
    group.addoption(
        "--results", type=Path, default=frame.RESULTS, help="folder that rows are appended to"
    )
    group.addoption(
        "--seconds", type=float, default=None, help="of timing in each case, in place of its own"
    )
    group.addoption(
        "--full",
        action="store_true",
        help="the whole grid; without it the subset that takes minutes",
    )
    group.addoption("--serve", default=None, help="used by `python -m bench compare`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
    if not torch.cuda.is_available():
        why = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "no CUDA device is visible"
        )
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {why}"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Every case compiles for its own sizes; without this dynamo would stop after eight of one
    function."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def run_gate(
    gate: Callable[..., Mapping[str, float]], copies: list[Any], providers: Mapping[str, Any]
) -> dict:
    errors = dict(gate(*copies[:1]))
    if missing := [name for name in providers if frame.is_ours(name) and name not in errors]:
        raise AssertionError(f"gate: says nothing of {', '.join(missing)}; no row without a gate")
    if wrong := [f"{name} {error}" for name, error in errors.items() if not math.isfinite(error)]:
        raise AssertionError(f"gate: errors must be finite, got {', '.join(wrong)}")
    return errors


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Row]]:
    """compare(op=, mode=, shape=, dtype=, providers=, gate=, ...) -> rows by provider, appended to
    <op>.jsonl.

    providers: by name, callables; names that start with "eager", "compile" or "peer" are baselines.
        `frame.Graph(f)`
        is f replayed as a CUDA graph. None where `times` measures.
    gate: compares results, raises where one is wrong, and returns the error by provider, of all
        that are ours. It runs before the timing and after it, and what it raises leaves no row.
    inputs: makes one set of inputs; gate and providers then take one. On a GPU so many are made
        that what the leanest provider reads of them does not fit in its L2; where that would be too
        many no row says % of a copy.
    bytes_moved, flops: of one call, by our plan: one number, or by provider. With the first a copy
        of as many bytes
        (of the largest) is timed in the same rounds.
    device: "cpu" or "cuda". seconds, min_rounds: of the timing.
    times: in place of timing the providers here, gives milliseconds by provider (over several
        processes, say).
    extra: extra(provider) -> own columns, asked for after the timing.
    """
    config = request.config

    def run(
        *,
        op: str,
        mode: str,
        shape: tuple[int, ...],
        dtype: str,
        providers: Mapping[str, Provider | None],
        gate: Callable[..., Mapping[str, float]],
        inputs: Callable[[], Any] | None = None,
        bytes_moved: int | Mapping[str, int] | None = None,
        flops: int | Mapping[str, int] | None = None,
        device: str = "cpu",
        seconds: float = 6.0,
        min_rounds: int = 10,
        times: Callable[[], Mapping[str, list[float]]] | None = None,
        extra: Callable[[str], Mapping[str, Any]] | None = None,
    ) -> dict[str, Row]:
        asked = config.getoption("--seconds")
        if asked is not None:
            seconds, min_rounds = asked, min(min_rounds, 3)
        by_name = (
            list(bytes_moved.values()) if isinstance(bytes_moved, Mapping) else [bytes_moved or 0]
        )
        moved, leanest = max(by_name), min(by_name) // 2  # no operator writes more than it reads
        copies = [] if inputs is None else frame.make_copies(inputs, device, leanest or None)
        cold = frame.past_cache(len(copies) or 1, leanest, frame.l2_bytes(device))
        runs = {}
        for name, provider in providers.items():
            if provider is None:
                continue
            try:
                runs[name] = frame.rotation(provider, copies)
            except frame.NotCapturable as error:
                config.stash.setdefault(LEFT_OUT, []).append(
                    f"{op} {mode} {list(shape)}: {name}: {error}"
                )
        clock: Clock = EventClock() if device == "cuda" else HostClock()

        def green() -> dict[str, float]:
            return run_gate(gate, copies, providers)

        if served := config.getoption("--serve"):
            from bench.compare import serve

            serve(
                request.node.name,
                {n: call for n, call in runs.items() if frame.is_ours(n)},
                clock,
                green,
                served,
            )
            benchmark.pedantic(lambda: None)
            return {}
        errors = green()

        def of(numbers: int | Mapping[str, int] | None, name: str) -> int | None:
            return numbers.get(name) if isinstance(numbers, Mapping) else numbers

        if times is not None:
            found = dict(times())
        else:
            timed = {**runs, COPY: frame.copy_provider(moved, device)} if moved else runs
            found = frame.interleave(timed, clock, seconds, min_rounds)
        copy = found.pop(COPY, None)
        rate = moved / frame.quantiles(copy)[1] / 1e6 if copy else None  # GB/s
        quantiles = {name: frame.quantiles(values) for name, values in found.items()}

        def best(kind: str) -> float | None:
            return min(
                (q[1] for name, q in quantiles.items() if name.startswith(kind)), default=None
            )

        eager, compiled = best("eager"), best("compile")
        where = frame.environment(device)
        rows = {}
        for name, (p20, p50, p80) in quantiles.items():
            seen = (
                frame.profile(runs[name], device)
                if name in runs
                else frame.Profile(None, None, None)
            )
            if isinstance(providers[name], Graph):
                seen = seen._replace(
                    peak_mib=None
                )  # a replay allocates nothing: its memory was taken at the capture
            if device == "cpu" and name.startswith("compile"):
                seen = seen._replace(launches=None)
            size = of(bytes_moved, name) if frame.is_ours(name) else None
            follows = cold and rate is not None and size is not None
            rows[name] = Row(
                op=op,
                provider=name,
                mode=mode,
                shape=list(shape),
                dtype=dtype,
                p20_ms=round(p20, 4),
                p50_ms=round(p50, 4),
                p80_ms=round(p80, 4),
                speedup_vs_eager=None if eager is None else round(eager / p50, 2),
                speedup_vs_compile=None if compiled is None else round(compiled / p50, 2),
                peak_mib=None if seen.peak_mib is None else round(seen.peak_mib, 2),
                bytes=size,
                flops=of(flops, name) if frame.is_ours(name) else None,
                copy_gb_s=None if rate is None else round(rate, 2),
                copy_percent=round(size / p50 / 1e6 / rate * 100, 1) if follows else None,
                launches=seen.launches,
                host_syncs=seen.host_syncs,
                max_error=errors.get(name),
                rounds=len(found[name]),
                extra=dict(extra(name)) if extra else {},
                **where,
            )
        green()
        frame.append_rows(config.getoption("--results"), rows.values())
        config.stash.setdefault(ROWS, []).extend(rows.values())
        ours = next((name for name in rows if frame.is_ours(name)), next(iter(rows)))
        benchmark.extra_info.update(dataclasses.asdict(rows[ours]))
        # For pytest-benchmark's own tables and files, which know of neither turns nor events.
        once = max(1, min(20, int(1000 / rows[ours].p50_ms))) if asked is None else 1
        benchmark.pedantic(runs.get(ours, lambda: None), rounds=once)
        return rows

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("editr2 benchmarks")
    first = rows[0]
    terminalreporter.line(
        f"{first.device}, {first.threads} threads, torch {first.torch}, commit {first.commit}"
    )
    terminalreporter.line(
        "providers in turns; speed-ups against the best eager and the best compiled provider, "
        "graphs too\n"
    )
    head = (
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "x eager",
        "x compile",
        "peak MiB",
        "% copy",
        "launches",
        "syncs",
        "max error",
    )
    case = None
    for row in rows:
        if case != row.case:
            case = row.case
            title = f"{row.op} {row.mode} {row.shape} {row.dtype}"
            terminalreporter.line(f"{title:66}" + "".join(f"{name:>10}" for name in head))
        numbers = (
            row.p20_ms,
            row.p50_ms,
            row.p80_ms,
            row.speedup_vs_eager,
            row.speedup_vs_compile,
            row.peak_mib,
            row.copy_percent,
            row.launches,
            row.host_syncs,
        )
        columns = (
            " " * 10
            if n is None
            else f"{n:10d}"
            if isinstance(n, int)
            else f"{n:10.3f}"
            if n < 0.1
            else f"{n:10.2f}"
            for n in numbers
        )
        error = "" if row.max_error is None else f"{row.max_error:.1e}"
        terminalreporter.line(f"  {row.provider:64}" + "".join(columns) + f"{error:>10}")
    for line in config.stash.get(LEFT_OUT, []):
        terminalreporter.line(f"left out, no graph can hold it: {line}")
