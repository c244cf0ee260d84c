"""python -m bench compare BASE [-k EXPRESSION] [--rounds N]: this tree's library against a
commit's, round by round.

Both are measured by this tree's benchmarks, so that inputs, gate and clock are the same: BASE is
unpacked beside it, its native modules are built (copied from here where the sources are the same),
and its `bench` is replaced. Two processes hold the same case at the same time and take turns; only
one works at any moment, and who begins changes every round. A red gate on either side, before the
timing or after it, ends everything: nothing is reported.

The working tree counts as it is, uncommitted changes included; its native modules must be built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import frame

REPOSITORY = Path(__file__).resolve().parent.parent
COMPILED = "kernels/editr2_kernels"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


class Refused(Exception):
    """No ratio may be reported; the message says why, in one line."""


# The side that measures: inside pytest, in the place of the timing.


def serve(
    case: str,
    providers: Mapping[str, Callable[[], Any]],
    clock: frame.Clock,
    gate: Callable[[], Any],
    pipes: str,
) -> None:
    """Run one case at the orders of the other end. pipes: "READ,WRITE", the file descriptors of
    it."""
    reader, writer = map(int, pipes.split(","))

    def say(**message: Any) -> None:
        os.write(writer, (json.dumps(message) + "\n").encode())

    import editr2_kernels

    try:
        gate()
        calls = {name: frame.warm_up(run, clock) for name, run in providers.items()}
        say(case=case, providers=list(providers), package=editr2_kernels.__file__)
        while (name := _line(reader)) != "":
            say(ms=clock.measure(providers[name], calls[name]))
        gate()
        say(gate="green")
    except Exception as error:
        say(case=case, error=f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def _line(descriptor: int) -> str:
    """One line, a byte at a time: nothing that belongs to the next case may be read ahead."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


# The side that asks.


class Side:
    """A pytest process over one tree that runs the cases one after the other as it is told."""

    def __init__(self, name: str, root: Path, command: Sequence[str], log: Path) -> None:
        self.name, self.root, self.log = name, root, log
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
            "OMP_WAIT_POLICY": "passive",  # threads that spin would take the other side's cores
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--serve", f"{to_read},{to_write}"],
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(to_read, to_write),
            )
        os.close(to_read)
        os.close(to_write)

    def tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says so
            os.write(self._write, f"{line}\n".encode())

    def answer(self) -> dict[str, Any] | None:
        """The next message, None at the end."""
        line = _line(self._read)
        if not line:
            return None
        message = json.loads(line)
        if "error" in message:
            raise Refused(
                f"the gate of {message['case']} is red on {self.name}: {message['error']}"
            )
        return message

    def milliseconds(self, provider: str) -> float:
        self.tell(provider)
        return self._expect("ms")

    def finish_case(self) -> None:
        self.tell("")
        self._expect("gate")

    def _expect(self, key: str) -> Any:
        message = self.answer()
        if message is None or key not in message:
            raise Refused(f"{self.name} broke off; its output: {self.log}")
        return message[key]

    def exit_code(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        for descriptor in (self._write, self._read):
            os.close(descriptor)
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


@dataclass(frozen=True)
class Comparison:
    case: str
    provider: str
    base_ms: list[float]  # by round
    here_ms: list[float]

    @property
    def ratio(self) -> tuple[float, float, float]:
        """p20, p50, p80 of base / here by round: above 1, this tree is faster."""
        return frame.quantiles([base / here for base, here in zip(self.base_ms, self.here_ms)])


def interleaved(base: Side, here: Side, rounds: int) -> list[Comparison]:
    """Every case both sides have. Raises Refused where a gate is red, or the sides do not agree on
    the cases."""
    found = []
    while True:
        cases = {side: side.answer() for side in (base, here)}
        if all(case is None for case in cases.values()):
            break
        names = [case and case.get("case") for case in cases.values()]
        if names[0] != names[1]:
            raise Refused(
                f"{base.name} is at {names[0] or 'the end'}, {here.name} at {names[1] or 'the end'}"
            )
        for side, case in cases.items():
            if case and not Path(case["package"]).resolve().is_relative_to(side.root.resolve()):
                raise Refused(
                    f"{side.name} measures {case['package']}, which is not below {side.root}"
                )
        offered = [case["providers"] for case in cases.values() if case]
        common = [provider for provider in offered[0] if provider in offered[1]]
        times: dict[str, dict[Side, list[float]]] = {
            provider: {base: [], here: []} for provider in common
        }
        for done in range(rounds):
            for provider in common:
                for side in (base, here) if done % 2 == 0 else (here, base):
                    times[provider][side].append(side.milliseconds(provider))
        for side in (base, here):
            side.finish_case()
        found += [
            Comparison(str(names[0]), provider, of[base], of[here])
            for provider, of in times.items()
        ]
    for side in (base, here):
        if (code := side.exit_code()) != 0:
            why = "no case matches" if code == 5 else f"pytest ended with {code}"
            raise Refused(f"{side.name}: {why}; its output: {side.log}")
    if not found:
        raise Refused("no case has a provider on both sides")
    return found


def table(found: Sequence[Comparison]) -> str:
    width = max(len(f"{c.case}  {c.provider}") for c in found)
    lines = [f"{'':{width}}{'base ms':>10}{'here ms':>10}{'ratio':>8}   p20 to p80"]
    for c in found:
        p20, p50, p80 = c.ratio
        base, here = (frame.quantiles(values)[1] for values in (c.base_ms, c.here_ms))
        lines.append(
            f"{f'{c.case}  {c.provider}':{width}}{base:10.3f}{here:10.3f}{p50:8.3f}   {p20:.3f} "
            f"to {p80:.3f}"
        )
    return "\n".join(lines)


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True)


@contextlib.contextmanager
def unpacked(base: str) -> Iterator[Path]:
    """The tree of a commit, able to run this tree's benchmarks; removed afterwards."""
    archive = _git("archive", "--format=tar", base)
    if archive.returncode != 0:
        raise Refused(
            f"BASE must name a commit, got {base!r}: "
            f"{archive.stderr.decode().strip().splitlines()[-1]}"
        )
    with tempfile.TemporaryDirectory(prefix="editr2-bench-") as folder:
        root = Path(folder)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(root, filter="data")
        shutil.rmtree(root / "bench", ignore_errors=True)
        shutil.copytree(
            REPOSITORY / "bench",
            root / "bench",
            ignore=shutil.ignore_patterns("results", "__pycache__"),
        )
        shutil.copy(
            REPOSITORY / "pyproject.toml", root
        )  # pytest's settings belong to the benchmarks
        if _git("diff", "--quiet", base, "--", "csrc", "setup.py").returncode == 0:
            compiled = [
                *(REPOSITORY / COMPILED).glob("*.so"),
                REPOSITORY / COMPILED / "_build_info.json",
            ]
            for file in compiled:
                shutil.copy(file, root / COMPILED)
        else:
            print(f"building the native modules of {base}", flush=True)
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = subprocess.run(build, cwd=root, capture_output=True, text=True)
            if done.returncode != 0:
                raise Refused(
                    f"{base} does not build: "
                    f"{(done.stderr or done.stdout).strip().splitlines()[-1]}"
                )
        yield root


def files_of(chosen: Sequence[str]) -> list[str]:
    """The benchmarks' files in this tree that have a case for these options of pytest."""
    done = subprocess.run(
        [*PYTEST, "bench", "--collect-only", *chosen],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    files = dict.fromkeys(line.split("::")[0] for line in done.stdout.splitlines() if "::" in line)
    if done.returncode == 5:
        raise Refused("no case matches")
    if done.returncode != 0:
        raise Refused(
            f"pytest cannot collect the cases: "
            f"{(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )
    return list(files)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="pytest's: which cases")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each side and case (30)")
    parser.add_argument("--gpu", action="store_true", help="the cases for a GPU")
    parser.add_argument("--full", action="store_true", help="the whole grid of sizes")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    chosen = [
        "-m",
        "gpu" if options.gpu else "not gpu",
        "-k",
        options.k,
        *(["--full"] if options.full else []),
    ]
    sides: list[Side] = []
    try:
        with unpacked(options.base) as root:
            # Only the files that are asked for: others may need of the library what BASE does not
            # have.
            command = [*PYTEST, "--timeout=0", *files_of(chosen), *chosen]
            logs = Path(tempfile.mkdtemp(prefix="editr2-bench-log-"))
            try:
                sides.append(Side("BASE", root, command, logs / "base"))
                sides.append(Side("this tree", REPOSITORY, command, logs / "here"))
                found = interleaved(*sides, options.rounds)
            finally:
                for side in sides:
                    side.stop()
    except Refused as refused:
        print(f"no ratio is reported: {refused}", file=sys.stderr)
        return 1
    shutil.rmtree(logs)
    print(
        f"base: {options.base}; {options.rounds} rounds in turns; ratio = base / here, above 1 "
        f"this tree is faster"
    )
    print(table(found))
    return 0
