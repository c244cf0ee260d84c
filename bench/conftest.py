"""The frame of the benchmarks: a gate, interleaved timing, one row per provider, a table at the end.

A benchmark hands `compare` its providers after its correctness gate has passed in the same process. Providers run in
turns, so that a disturbance of the machine falls on all of them alike; ratios are between medians. Rows are appended to
bench/results/<op>.jsonl and our first provider is also run under pytest-benchmark, for its tables and files.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list["Row"]]()


@dataclass(frozen=True)
class Row:
    op: str
    provider: str
    mode: str
    shape: list[int]
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup_vs_eager: float
    speedup_vs_compile: float | None  # where there is no compiled baseline
    peak_mib: float  # the most torch had allocated at one time beyond what was there before the call
    max_error: float | None
    threads: int
    device: str
    torch: str
    commit: str
    date: str


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


SAMPLE_S = 0.02  # calls shorter than this are timed several at a time, like timeit's


def _interleave(providers: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call; rounds until `seconds` are used, at least 10 and at most 200."""
    calls = {}
    for name, run in providers.items():
        for _ in range(3):
            before = time.perf_counter()
            run()
        calls[name] = max(1, round(SAMPLE_S / (time.perf_counter() - before)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    start = time.perf_counter()
    for done in range(200):
        if done >= 10 and time.perf_counter() - start > seconds:
            break
        for name, run in providers.items():
            before = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - before) / calls[name] * 1e3)
    return times


def _peak_mib(run: Callable[[], Any]) -> float:
    """From the profiler's record of every allocation; memory that C++ code takes for itself is not in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Row]]:
    """compare(op, mode, shape, dtype, providers, max_error) -> rows by provider.

    Provider names that start with "eager" or "compile" are the baselines. max_error: by provider, the error its
    correctness gate found; baselines have none.
    """

    def run(
        op: str,
        mode: str,
        shape: tuple[int, ...],
        dtype: str,
        providers: dict[str, Callable[[], Any]],
        max_error: dict[str, float],
        seconds: float = 8.0,
    ) -> dict[str, Row]:
        times = _interleave(providers, seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        eager = min(ms for name, ms in median.items() if name.startswith("eager"))
        compiled = min((ms for name, ms in median.items() if name.startswith("compile")), default=None)
        commit, date = _commit(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = {}
        for name, values in times.items():
            p20, p50, p80 = (round(q, 4) for q in (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7)))
            rows[name] = Row(
                op,
                name,
                mode,
                list(shape),
                dtype,
                p20,
                p50,
                p80,
                round(eager / median[name], 2),
                None if compiled is None else round(compiled / median[name], 2),
                round(_peak_mib(providers[name]), 2),
                max_error.get(name),
                torch.get_num_threads(),
                _cpu_model(),
                torch.__version__,
                commit,
                date,
            )
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{op}.jsonl").open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows.values())
        request.config.stash.setdefault(ROWS, []).extend(rows.values())
        ours = next(name for name in providers if not name.startswith(("eager", "compile")))
        benchmark.extra_info.update(asdict(rows[ours]))
        benchmark.pedantic(providers[ours], rounds=20, warmup_rounds=3)
        return rows

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("editr2 benchmarks")
    first = rows[0]
    terminalreporter.line(f"{first.device}, {first.threads} threads, torch {first.torch}, commit {first.commit}")
    terminalreporter.line("providers in turns; speed-ups against the best eager and the best compiled provider\n")
    head = ("p20 ms", "p50 ms", "p80 ms", "x eager", "x compile", "peak MiB", "max error")
    case = None
    for row in rows:
        if case != (row.op, row.mode, row.shape):
            case = (row.op, row.mode, row.shape)
            title = f"{row.op} {row.mode} {row.shape} {row.dtype}"
            terminalreporter.line(f"{title:66}" + "".join(f"{name:>10}" for name in head))
        error = "" if row.max_error is None else f"{row.max_error:.1e}"
        numbers = (row.p20_ms, row.p50_ms, row.p80_ms, row.speedup_vs_eager, row.speedup_vs_compile, row.peak_mib)
        columns = (" " * 10 if n is None else f"{n:10.3f}" if n < 0.1 else f"{n:10.2f}" for n in numbers)
        terminalreporter.line(f"  {row.provider:64}" + "".join(columns) + f"{error:>10}")
