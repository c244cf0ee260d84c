"""scripts/gpu_session.sh on a machine without a GPU: the operators' table works, and what it asks
pytest for exists."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import frame
from scripts import headline

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_session.sh"
# The steps that pytest runs, and a word that one of the selected tests must have in its name, for
# each of these.
OPERATORS = (
    "philox_normal",
    "sde_step",
    "sde_log_prob",
    "grpo_loss",
    "nft_loss",
    "token_log_prob",
    "group_advantage",
)
LIMITS = ("last_block", "31_elements", "off_16", "repeats", "by_numbers", "comes_last")
SELECTED = {
    "strict": (
        *OPERATORS,
        "two_gpu",
        "never_waits",
        "captured",
        "out_of_range",
        "other_stream",
        "dtype2",
        *LIMITS,
    ),
    "bench_large": ("test_sde_step[512x4096", "test_grpo_loss[512x4096", "test_nft_loss[512x4096"),
    "editors": ("Kontext", "klein", "-train", "-rollout"),
    "capture": ("captured_rollout", "does_not_wait", "never_wait"),
    "memcheck": OPERATORS,
    "racecheck": OPERATORS,
    "bench_usual": ("test_sde_step[16x4096", "test_grpo_loss[16x4096", "test_nft_loss[16x4096"),
    "rest": (*OPERATORS, "TestOnAGpu", "flex_attention", "graphs_are_checked", "repeats"),
}
COLLECT = """
import json, sys
import pytest

class Names:
    def pytest_collection_finish(self, session):
        self.found = [item.nodeid for item in session.items]

found = {}
for name, arguments in json.load(sys.stdin).items():
    names = Names()
    names.found = []
    options = ["--collect-only", "--assert=plain", "-qq", "-p", "no:cacheprovider"]
    status = pytest.main([*arguments, *options], plugins=[names])
    found[name] = [int(status), names.found]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of its CPU form."""
    out = tmp_path_factory.mktemp("session")
    environment = {
        **os.environ,
        "CPU": "1",
        "PYTHON": sys.executable,
        "OUT": str(out),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_table_of_operators(session: Path) -> None:
    summary = (session / "summary.txt").read_text()
    assert summary.startswith("headline: status 0, ")
    table = (session / "headline.log").read_text()
    assert "FAILED" not in table and "wrong" not in table
    assert sum(path.is_file() for path in session.iterdir()) <= 8  # so many files come back
    with tarfile.open(session / "logs.tgz") as logs:
        kept = logs.extractfile("./rows/headline.jsonl")
        assert kept is not None
        (session / "headline.jsonl").write_bytes(kept.read())
    rows = frame.read_rows(session / "headline.jsonl")
    assert [row.mode for row in rows] == [
        "step, noise inside",
        "step, noise given",
        "step, guided",
        "step, guided by token",
        "grpo forward",
        "grpo forward+backward",
        "nft forward+backward",
        "normal",
        "token forward",
        "token forward+backward",
    ]
    for row in rows:
        assert (
            row.provider == "editr2 cpu, graph"
            and row.bytes is not None
            and row.copy_percent is not None
        )
        assert row.max_error is not None and row.max_error < 1e-2 and row.extra["host_us"] > 0
    # What guidance by a number does beside the operator's own: an operator of torch, and its views.
    plain, _, guided, *_ = (row.launches for row in rows)
    assert plain is not None and guided is not None and guided - plain <= 5
    # On a CPU nft_loss looks at its r, which is there; on a GPU it looks at nothing.
    assert all(row.host_syncs == 0 for row in rows if not row.mode.startswith("nft"))


def test_the_order_of_two_backends_is_said() -> None:
    def row(backend: str, mode: str, ms: float, shape: list[int]) -> frame.Row:
        return frame.Row("headline", f"editr2 {backend}, graph", mode, shape, "bf16", ms, ms, ms)

    rows = [row("cuda", "step", 1.0, [4, 8]), row("triton", "step", 2.0, [4, 8])]
    rows += [row("cuda", "step", 3.0, [9, 8]), row("triton", "step", 2.0, [9, 8])]
    rows += [row("cuda", "alone", 3.0, [9, 8])]
    heading, *lines = headline.order(rows)
    assert "cuda over triton" in heading
    assert [words.split() for words in lines] == [["step", "0.50", "1.50"]]
    assert list(headline.order(rows[-1:])) == []


def test_every_selection_selects(session: Path) -> None:
    lines = [shlex.split(line) for line in (session / "selections.txt").read_text().splitlines()]
    asked = {
        name: [a for a in arguments if a not in ("-n", "8", "--dist", "worksteal")]
        for name, *arguments in lines
    }
    assert set(asked) == set(SELECTED)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for name, (status, found) in json.loads(done.stdout.splitlines()[-1]).items():
        assert status == 0, name
        for word in SELECTED[name]:
            assert any(word in test for test in found), f"{name}: no test has {word!r} in its name"


def clean_environment() -> dict[str, str]:
    """Without what pytest-xdist tells its workers."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        "PYTHONPATH": path,
    }


def test_the_shell_reads_it() -> None:
    assert (
        subprocess.run(
            ["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False
        ).stderr
        == ""
    )
