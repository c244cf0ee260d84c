"""How much longer training takes beside busy processes than alone.

    python scripts/busy_machine.py [--iterations 3] [--busy 3] [--spin]

Trains the shipped model for a few small iterations, alone and beside processes that only compute,
on a machine that is otherwise idle. With two threads and three busy processes on two cores the fair
share is 2/5 of each core, 2.5 times the time. --spin: also with threads that always sleep between
operators, and that spin as by OpenMP's default. Everything started here shares one session, since
the scheduler may share cores by session first. Each run ends after ten minutes at the latest, and
with it the processes beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 600
BUSY = f"import time; end = time.monotonic() + {LIMIT}\nwhile time.monotonic() < end: pass"
WAYS = {
    "editr2's own": {},
    "always asleep": {"OMP_WAIT_POLICY": "passive"},
    "spinning (OpenMP's default)": {"GOMP_SPINCOUNT": "300000"},
}
"""By name, what the environment says; the last is what libgomp does where nothing is said."""
SETTINGS = ["--rollout.sessions=4", "--rollout.siblings=8", "--eval.sessions=1", "--eval.strips=1"]


def seconds(iterations: int, busy: int, way: dict[str, str]) -> float:
    """Of all iterations of a run, beside `busy` processes; what comes before and after them is left
    out."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    } | way
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    time.sleep(1)  # they are at work before anybody looks whether the machine is busy
    try:
        with tempfile.TemporaryDirectory(prefix="editr2-busy-") as folder:
            command = [sys.executable, "-m", "editr2", "train", f"--out={folder}/run", *SETTINGS]
            command.append(f"--train.iterations={iterations}")
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            rows = [
                json.loads(line)
                for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
            ]
            print(
                "\n".join(line for line in done.stderr.splitlines() if line.startswith("iter ")),
                flush=True,
            )
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return sum(sum(row["seconds"].values()) for row in rows if row["event"] == "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--busy", type=int, default=3, help="processes beside the run")
    parser.add_argument(
        "--spin", action="store_true", help="also with threads that always sleep, and that spin"
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped")
    )  # and what was started here with it
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    fair = max(1.0, (threads + options.busy) / cores)
    print(
        f"{cores} cores, {threads} threads, load {os.getloadavg()[0]:.1f}; the fair share is "
        f"{fair:.2f} times"
    )
    for name, way in list(WAYS.items())[: None if options.spin else 1]:
        alone, beside = (seconds(options.iterations, busy, way) for busy in (0, options.busy))
        print(
            f"{name}: {alone:.1f} s alone, {beside:.1f} s beside {options.busy} busy: "
            f"{beside / alone:.2f} times"
        )


if __name__ == "__main__":
    main()
