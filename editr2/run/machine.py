"""The cores of this machine: how threads wait for work on them, and how long they wait for one.
Needs no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user may have set to say how OpenMP's threads wait."""

BUSY_SHARE = 0.25
"""Of the time in which threads wanted to compute, the part that they waited for a core, above which
a machine is busy: a program alone waits 0 to 3 %, beside one busy process for each core half."""

BUSY_WALL = 0.1
"""And at least so many seconds of waiting a second of wall time: a run that computes little (it
waits for a GPU or a judge) is not held up by waiting for a core."""

BUSY_LOAD = 1.5
"""Runnable processes a core, where the kernel does not tell who waited: our own threads are one a
core."""


def open_streams() -> None:
    """Puts the null device where standard input, output or error is closed (`>&-`, as some services
    start programs): else Python has None there, and the first files of a run take their numbers,
    and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  # the process's


@contextmanager
def starting(program: bool = True) -> Iterator[None]:
    """Around the imports of a `program`: Ctrl-C ends the process there and then.

    As an exception it is lost inside of extension modules: torch, interrupted while it loads numpy,
    goes on without.
    """
    usual = program and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, b"stopped while starting: nothing was done\n")
        os._exit(128 + signum)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


SPINS = 10_000
"""How often a thread of libgomp looks for work before it sleeps, where the machine is ours. Its own
default is thirty times as much, and sleeping at once made an iteration twice as long on an idle
machine (docs/measured.md)."""


def competing(running: Path = Path("/proc/loadavg"), samples: int = 5) -> int:
    """How many other threads of the machine compute just now, the median of a few looks; 0 where
    nobody can tell."""
    counts = []
    for _ in range(samples):
        try:
            counts.append(int(running.read_text(encoding="utf-8").split()[3].split("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(0.01)
    return max(0, sorted(counts)[len(counts) // 2])


def choose_waiting(
    environment: MutableMapping[str, str] = os.environ,
    busy: Callable[[], int] = competing,
    cores: int | None = None,
) -> None:
    """How OpenMP's threads wait between operators: a little while spinning on a machine that is
    ours, asleep beside others, from whom threads that spin would take the cores.

    For a program's first lines: OpenMP reads it when torch is loaded, and it is the whole
    process's, so a library must not. Does nothing where torch is loaded already or the user has
    said how to wait.
    """
    if "torch" in sys.modules or any(name in environment for name in WAITING):
        return
    if busy() >= max(1, (cores or os.cpu_count() or 1) // 4):
        environment["OMP_WAIT_POLICY"] = "passive"
    else:
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def _load() -> float:
    return os.getloadavg()[0]


class CoreWatch:
    """Says in words when this process's threads had to wait for a core.

    tasks: a folder with one folder a thread and the kernel's `schedstat` in it. load, cores: of the
        whole machine.
    """

    def __init__(
        self,
        *,
        tasks: Path = Path("/proc/self/task"),
        load: Callable[[], float] | None = None,
        cores: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks, self._load, self._clock = tasks, load or _load, clock
        self._cores = cores or os.cpu_count() or 1
        self._before, self._since = self._read(), clock()

    def lap(self) -> str:
        """Words for a busy machine since the last call (since this was made), "" for any other."""
        (before, since), now = (self._before, self._since), self._clock()
        self._before, self._since = self._read(), now
        if not self._before:
            return self._by_load()
        spent = [
            tuple(b - a for a, b in zip(before.get(thread, (0.0, 0.0)), after, strict=True))
            for thread, after in self._before.items()
        ]
        computed, waited = (sum(part) for part in zip(*spent, strict=True))
        if waited < BUSY_WALL * (now - since) or waited <= BUSY_SHARE * (computed + waited):
            return ""
        return (
            f"busy machine: threads waited for a core {waited / (computed + waited):.0%} of the "
            f"time"
        )

    def _by_load(self) -> str:
        try:
            load = self._load()
        except OSError:  # not to be had: nothing can be said
            return ""
        busy = load > BUSY_LOAD * self._cores
        return f"busy machine: {load:.1f} processes for {self._cores} cores" if busy else ""

    def _read(self) -> dict[str, tuple[float, float]]:
        """By thread, the seconds that it computed and that it waited for a core; empty where the
        kernel does not tell. Threads that end meanwhile leave no trace."""
        told = {}
        for stat in self._tasks.glob("*/schedstat"):
            try:
                computed, waited = (int(word) / 1e9 for word in stat.read_text().split()[:2])
            except (OSError, ValueError):
                continue
            told[stat.parent.name] = (computed, waited)
        return told
