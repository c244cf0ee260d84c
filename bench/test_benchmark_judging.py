"""The judge stage of a benchmark against a server that takes 0.2 s an answer: 8 sessions of 3
turns, VIEScore's two questions a turn, 48 requests.

    eager one at a time  concurrency 1
    editr2               sixteen requests at once
    editr2 at once       the same of a server that answers at once: what the stage itself costs

Every call judges all of it anew, into a folder of its own. Gate: the rows are the same, each has a
value, and no question was asked twice.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from editr2.benchmarks.judging import judge
from editr2.benchmarks.rows import Row
from editr2.config import RewardConfig
from editr2.rewards.load import load_reward
from editr2.rewards.record import Record, read_record
from editr2.run.processes import Processes
from editr2.sessions import Session, Turn

SESSIONS, TURNS, SIZE = 8, 3, 64
CALL_S, REQUESTS = 0.2, SESSIONS * TURNS * 2
OURS, SERIAL, AT_ONCE = "editr2", "eager one at a time", "editr2 at once"


def server(after: float) -> Any:
    """The judge of the tests; its numbers follow from what it was asked."""
    path = Path(__file__).parents[1] / "tests" / "judge_server.py"
    spec = importlib.util.spec_from_file_location("judge_server", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["judge_server"] = module
    spec.loader.exec_module(module)

    def says(body: dict[str, Any], choice: int) -> str:
        seen = zlib.crc32(json.dumps(body["messages"], sort_keys=True).encode())
        return json.dumps({"reasoning": "as asked", "score": [1 + seen % 10, 1 + seen // 10 % 10]})

    return module.JudgeServer(says=says, after=after, honours={"n", "images"})


class Images:
    """Random ones, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        made = np.random.default_rng(0)
        for n in range(SESSIONS):
            for t in range(TURNS):
                pixels = made.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"s{n}_{t}.png")

    def of(self, session: Session) -> list[Path | None]:
        return [self._folder / f"{session.id}_{t}.png" for t in range(TURNS)]

    def read(self, session: Session, turn: int) -> np.ndarray:
        return np.asarray(Image.open(self._folder / f"{session.id}_{turn}.png"))


class Stage:
    """Of one judge. rows: of the last call. asked: the requests that it made, beside those by which
    it learns what the server does."""

    def __init__(self, judge: Any, concurrency: int, images: Images) -> None:
        self.judge, self.concurrency, self.images = judge, concurrency, images
        self.processes = Processes(Accelerator(cpu=True))
        source = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        turns = tuple(Turn(f"edit {t}") for t in range(TURNS))
        self.sessions = [Session(f"s{n}", source, turns) for n in range(SESSIONS)]
        self.rows: list[Row] = []
        self.asked = 0

    def __call__(self) -> None:
        options = {"url": self.judge.url, "scores": ["SC", "PQ", "O"]}
        config = RewardConfig(name="viescore", options=options, concurrency=self.concurrency)
        with tempfile.TemporaryDirectory() as folder:
            record = Record(folder)
            try:
                self.rows = judge(
                    Path(folder) / "scores.jsonl",
                    self.sessions,
                    {"multipass": [self.images]},
                    load_reward(config, record),
                    self.processes,
                    seed=0,
                    digest="",
                    progress=lambda line: None,
                )
            finally:
                record.close()
            self.asked = sum(1 for _ in read_record(folder))


@contextmanager
def stages(folder: Path) -> Iterator[dict[str, Stage]]:
    images = Images(folder)
    with ExitStack() as stack:
        slow, swift = (stack.enter_context(server(after)) for after in (CALL_S, 0.0))
        yield {
            SERIAL: Stage(slow, 1, images),
            OURS: Stage(slow, 16, images),
            AT_ONCE: Stage(swift, 16, images),
        }


@pytest.mark.timeout(1800)
def test_benchmark_judging(compare: Callable[..., Any], tmp_path: Path) -> None:
    with stages(tmp_path) as runs:

        def gate() -> dict[str, float]:
            runs[SERIAL]()
            expected = runs[SERIAL].rows
            assert len(expected) == SESSIONS * TURNS * 3
            assert len({row.value for row in expected if row.state == "judged"}) > SESSIONS
            for name in (OURS, AT_ONCE):
                runs[name]()
                assert runs[name].rows == expected, name
            assert all(run.asked == REQUESTS for run in runs.values())
            return {OURS: 0.0, AT_ONCE: 0.0}

        def extra(name: str) -> dict[str, Any]:
            stage = runs[name]
            return {
                "requests": REQUESTS,
                "request_s": stage.judge.after,
                "at_once": stage.concurrency,
            }

        compare(
            op="benchmark_judging",
            mode=f"{CALL_S:g} s an answer, two questions a turn",
            shape=(SESSIONS, TURNS),
            dtype="fp32",
            providers=dict(runs),
            gate=gate,
            extra=extra,
            seconds=60.0,
            min_rounds=5,
        )
