"""How a benchmark is timed and what a row says: interleaved rounds, a clock a device, copies of the
inputs past the L2.

Nothing here knows of pytest or of an operator; `conftest.py` has the gate without which no row is
written.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SAMPLE_S = 0.02  # calls shorter than this are timed several at a time, like timeit's
MAX_ROUNDS = 200
MAX_COPIES = 256  # of the inputs, on a GPU: as many graphs of a provider are captured
BASELINES = ("eager", "compile", "peer")  # what a provider's name starts with when it is not ours


@dataclass(frozen=True)
class Row:
    """One provider in one case. None: not measured, or the row is older than the column."""

    op: str
    provider: str
    mode: str
    shape: list[int]
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup_vs_eager: float | None = (
        None  # of the best eager provider (as a graph too) over this one's median
    )
    speedup_vs_compile: float | None = None  # likewise; None where there is no compiled baseline
    peak_mib: float | None = (
        None  # the most torch had allocated at one time beyond what was there before the call
    )
    bytes: int | None = None  # what our plan must read and write
    flops: int | None = None
    copy_gb_s: float | None = None  # of a copy that moves as many bytes, timed in the same rounds
    copy_percent: float | None = (
        None  # bytes / p50, in percent of that; None where inputs stay in the L2
    )
    launches: int | None = (
        None  # CUDA: launches; CPU: operators called, not those in them; compiled code None
    )
    host_syncs: int | None = (
        None  # CUDA: waits for the device; CPU: what would be one (item, nonzero)
    )
    max_error: float | None = None  # what the gate found
    rounds: int | None = None
    threads: int | None = None
    device: str = "unknown"
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    editr2: str | None = None
    commit: str = "unknown"
    date: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # a benchmark's own columns

    @property
    def case(self) -> tuple[Any, ...]:
        return self.op, self.mode, tuple(self.shape), self.dtype, self.device

    @property
    def ours(self) -> bool:
        return is_ours(self.provider)


def is_ours(provider: str) -> bool:
    return not provider.startswith(BASELINES)


def read_rows(path: Path) -> list[Row]:
    """Of a results file, or of every one in a folder, in order. Columns that this version does not
    know are kept."""
    names = {f.name for f in dataclasses.fields(Row)}
    rows = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                values = json.loads(line)
                unknown = {name: values.pop(name) for name in values.keys() - names}
                row = Row(**values)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}:{number}: not a row of a benchmark ({error})") from error
            rows.append(dataclasses.replace(row, extra={**unknown, **row.extra}))
    return rows


def append_rows(folder: Path, rows: Iterable[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with (folder / f"{row.op}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """The columns that say where and of what a row was made."""
    git = ("git", "-C", str(RESULTS.parent))
    commit = _output(*git, "rev-parse", "--short", "HEAD")
    # Rows that this run appends do not make the code another one.
    dirty = bool(_output(*git, "status", "--porcelain", "--", ":/", f":(exclude){RESULTS}"))
    on_gpu = device == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else cpu_model(),
        "driver": _output(*query) if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "editr2": _version("editr2"),
        "commit": "unknown" if commit is None else commit + ("-dirty" if dirty else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Clock(Protocol):
    def measure(self, run: Callable[[], Any], calls: int) -> float:
        """Milliseconds per call of so many in a row."""


class HostClock:
    def measure(self, run: Callable[[], Any], calls: int) -> float:
        before = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - before) / calls * 1e3


class EventClock:
    """Between two events of the device. It is idle before, so what the host needs to launch the
    calls counts.

    `event` and `wait` are torch.cuda's; a test gives its own.
    """

    def __init__(
        self, event: Callable[[], Any] | None = None, wait: Callable[[], Any] | None = None
    ) -> None:
        self.event = event or functools.partial(torch.cuda.Event, enable_timing=True)
        self.wait = wait or torch.cuda.synchronize

    def measure(self, run: Callable[[], Any], calls: int) -> float:
        begin, end = self.event(), self.event()
        self.wait()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        self.wait()
        return begin.elapsed_time(end) / calls


@dataclass(frozen=True)
class Graph:
    """A provider that replays a CUDA graph of `run`, one for each copy of the inputs.

    same_bits: a replay must give the bits of a plain call; False where torch's generator makes the
        noise.
    """

    run: Callable[..., Any]
    same_bits: bool = True


Provider = Callable[..., Any] | Graph


class NotCapturable(RuntimeError):
    """A provider that waits for the device, or does what else a graph cannot hold."""


def tensors(value: Any) -> Iterator[Tensor]:
    """Of nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(tensors, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors, value))
    elif dataclasses.is_dataclass(value):
        yield from itertools.chain.from_iterable(
            tensors(getattr(value, f.name)) for f in dataclasses.fields(value)
        )


def copies_past_cache(read: int, l2_bytes: int) -> int:
    """How many copies of the inputs a rotation needs so that none is still in the L2 when its turn
    comes, where a call reads `read` bytes of one. At most MAX_COPIES, with which small inputs stay
    there (`past_cache`)."""
    return min(MAX_COPIES, max(1, math.ceil(2 * l2_bytes / max(read, 1))))


def past_cache(copies: int, read: int, l2_bytes: int) -> bool:
    """Whether a rotation of so many copies reads twice the L2 before it comes round. What a call
    writes is not asked after: torch's allocator gives it the memory of the call before, and a small
    result may never leave the L2."""
    return copies * read >= 2 * l2_bytes


def l2_bytes(device: str) -> int:
    """0 for a CPU, where a call finds its inputs as warm as the last one left them."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def make_copies(make: Callable[[], Any], device: str, read: int | None = None) -> list[Any]:
    """One on a CPU; on a GPU past its L2. read: bytes that the leanest provider reads of one; None:
    all."""
    first = make()
    if read is None:
        read = sum(t.numel() * t.element_size() for t in tensors(first))
    return [first, *(make() for _ in range(copies_past_cache(read, l2_bytes(device)) - 1))]


def _capture(graph: Graph, run: Callable[[], Any]) -> Callable[[], Any]:
    try:
        side = torch.cuda.Stream()  # libraries and autograd want a run on the capturing side first
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = run()
    except RuntimeError as error:
        raise NotCapturable(str(error).splitlines()[0]) from error
    captured.replay()
    captured.replay()  # what a launch leaves behind must not reach the next
    if graph.same_bits:
        for place, (a, b) in enumerate(zip(tensors(out), tensors(expected), strict=True)):
            if not torch.equal(a, b):
                raise AssertionError(
                    f"output {place} of the captured graph differs from the plain call's"
                )
    return captured.replay


def rotation(provider: Provider, copies: Sequence[Any]) -> Callable[[], Any]:
    """The provider on one copy of the inputs after the other; no copies: it takes none."""
    run = provider.run if isinstance(provider, Graph) else provider
    calls = [functools.partial(run, one) for one in copies] or [run]
    if isinstance(provider, Graph):
        calls = [_capture(provider, call) for call in calls]
    if len(calls) == 1:
        return calls[0]
    for call in calls:  # what a provider makes once a copy is made before anything is timed
        call()
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def warm_up(run: Callable[[], Any], clock: Clock) -> int:
    """Three calls, or as many as a second holds but two; how many then make a sample."""
    first = clock.measure(run, 1)
    ms = clock.measure(run, 1)
    if first + ms < 1000:
        ms = clock.measure(run, 1)
    return max(1, round(SAMPLE_S * 1e3 / max(ms, 1e-3)))


def interleave(
    providers: Mapping[str, Callable[[], Any]], clock: Clock, seconds: float, min_rounds: int = 10
) -> dict[str, list[float]]:
    """Milliseconds per call by provider, one sample a round; rounds until `seconds` are used, never
    fewer than asked.

    Providers run in turns, so that a disturbance of the machine falls on all of them alike, and
    every other round in reverse, so that none always runs behind the same one.
    """
    calls = {name: warm_up(run, clock) for name, run in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name in reversed(calls) if done % 2 else calls:
            times[name].append(clock.measure(providers[name], calls[name]))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(values) == 1:
        return (values[0],) * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


class Profile(NamedTuple):
    peak_mib: float | None
    launches: int | None
    host_syncs: int | None


LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
OPERATORS = ("aten::", "editr2::")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero")


def profile(run: Callable[[], Any], device: str) -> Profile:
    """Of one call. Memory that C++ code takes for itself, and not from torch, is in none of it."""
    activities = torch.profiler.ProfilerActivity
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            waits.clear()  # the mode warns of itself, the first time
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        launches = sum(
            bool(LAUNCH.match(event.name())) for event in seen.profiler.kineto_results.events()
        )
        syncs = sum("called a synchronizing" in str(w.message) for w in waits)
        return Profile(
            peak / 2**20, launches or None, syncs
        )  # no launch at all: the profiler saw none of the device
    with torch.profiler.profile(activities=[activities.CPU], profile_memory=True) as seen:
        run()
    held = peak = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return Profile(peak / 2**20, _outermost(events), sum(event.name() in WAITS for event in events))


def _outermost(events: Iterable[Any]) -> int:
    """How many operators are not inside of another one on their thread."""
    count, end = 0, dict[int, int]()
    operators = [event for event in events if event.name().startswith(OPERATORS)]
    for event in sorted(operators, key=lambda event: (event.start_ns(), -event.duration_ns())):
        thread = event.start_thread_id()
        if event.start_ns() >= end.get(thread, 0):
            count += 1
            end[thread] = event.start_ns() + event.duration_ns()
    return count


def copy_provider(moved: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes `moved` bytes together; on a GPU what it reads is rotated past
    the L2."""

    def make() -> tuple[Tensor, Tensor]:
        return tuple(torch.ones(max(1, moved // 8), device=device) for _ in range(2))  # type: ignore[return-value]

    return rotation(lambda pair: pair[1].copy_(pair[0]), make_copies(make, device, moved // 2))


class Phases:
    """Of providers whose `seconds` says, after a call, how long each phase of it took: the calls of
    a comparison, and the medians over them."""

    def __init__(self, runs: Mapping[str, Any]) -> None:
        self._runs = runs
        self._seen: dict[str, list[dict[str, float]]] = {name: [] for name in runs}

    def providers(self) -> dict[str, Callable[[], None]]:
        def timed(name: str) -> Callable[[], None]:
            def run() -> None:
                self._runs[name]()
                self._seen[name].append(dict(self._runs[name].seconds))

            return run

        return {name: timed(name) for name in self._runs}

    def medians(self, name: str) -> dict[str, float]:
        """A phase that a call did not have took no time."""
        seen = self._seen[name]
        return {
            phase: round(statistics.median(s.get(phase, 0.0) for s in seen), 5)
            for phase in seen[-1]
        }
