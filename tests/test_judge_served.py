"""The client and its questions against a real `transformers serve`, with a judge that has learnt
nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from editr2.errors import ConfigError
from editr2.rewards.ask import Asker, Asking
from editr2.rewards.base import Calls
from editr2.rewards.client import Client, Failure, Server
from editr2.rewards.record import Record, read_record

MISSING = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
SERVES = find_spec("transformers.cli") is not None and (
    find_spec("transformers.cli.serving") is not None
    and find_spec("transformers.cli.serving.systemone") is not None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] lacks {', '.join(MISSING)}"),
    pytest.mark.skipif(not SERVES, reason="this transformers does not serve /v1/systemone"),
]

IMAGES = [np.full((24, 32, 3), shade, np.uint8) for shade in (10, 200)]
START = 150.0
"""Seconds: torch is imported and 60,000 weights are read, beside other tests."""


@pytest.fixture(scope="module")
def served(
    beside: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("judge")
    beside("tiny_judge").write_tiny_judge(folder / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    model = str(folder / "tiny")
    command = [sys.executable, "-c", code, "serve", model, "--host", "127.0.0.1"]
    # A cache of its own, which is empty: /v1/models then fails, as it does without a network.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    try:
        deadline = time.monotonic() + START
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}", model, folder / "log")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


class Served:
    def __init__(self, url: str, model: str, log: Path) -> None:
        self.url, self.model, self.log = url, model, log

    def client(self, record: Any = None, **given: Any) -> Client:
        calls = Calls(concurrency=2, timeout=60.0, retries=0)
        return Client(Server(**{"url": self.url, "model": self.model, **given}), calls, record)


def test_what_it_does_and_does_not(served: Served) -> None:
    client = served.client()
    notes = client.probe(images=3, schema=True)
    known = client.known
    assert known is not None and known.images == 3
    assert (known.top_logprobs, known.votes, known.schema, known.systemone) == (
        0,
        False,
        False,
        True,
    )
    assert ["systemone" in notes[0], "ignores n" in notes[1], "response_format" in notes[2]] == [
        True
    ] * 3


def test_it_needs_the_name_of_its_model(served: Served) -> None:
    with pytest.raises(ConfigError, match="^model: none is named"):
        served.client(model=None).probe()


def test_probabilities_by_systemone(served: Served, tmp_path: Path) -> None:
    asker = Asker(served.client(Record(tmp_path)))
    asker.probe(images=2)
    verdicts = {
        "yes": asker.yes_no("Is it red?", IMAGES, name="IF"),
        "digits": asker.digits("How red is it?", IMAGES, name="IF"),
        "levels": asker.levels("How red is it?", IMAGES, ["no", "a little", "very"], name="IF"),
    }
    for verdict in verdicts.values():
        assert verdict.by == "systemone" and verdict.value is not None, verdict
        assert 0.0 < verdict.value < 1.0
    # the images are seen: others give another probability, the same ones the same
    other = asker.yes_no("Is it red?", [IMAGES[1], IMAGES[0]], name="IF")
    assert other.value != verdicts["yes"].value
    assert len(list(read_record(tmp_path))) == 4
    again = Asker(served.client()).yes_no("Is it red?", IMAGES, name="IF")
    assert again.value == verdicts["yes"].value


def test_votes_are_single_requests_with_seeds(served: Served, tmp_path: Path) -> None:
    """A model that has learnt nothing is cut off, or says what is no verdict: no number."""
    asker = Asker(served.client(Record(tmp_path)), Asking(ask="think", votes=3, max_tokens=16))
    asker.probe(images=2)
    verdict = asker.yes_no("Is it red?", IMAGES, seed=5, name="IF")
    assert verdict.failed and verdict.by == "votes" and "3 of 3 votes failed" in str(verdict.reason)
    lines = list(read_record(tmp_path))
    assert [line["tries"] for line in lines] == [1, 1, 1]
    texts = [line["answer"]["text"] for line in lines]
    assert len(set(texts)) > 1  # the seeds differ, and it samples
    once_more = Asker(served.client(), asker.asking)
    assert once_more.yes_no("Is it red?", IMAGES, seed=5, name="IF") == verdict


def test_what_it_refuses_is_quoted(served: Served) -> None:
    [answer] = served.client(model="another").chat(["Is it red?"])
    assert isinstance(answer, Failure) and answer.reason.startswith(
        "400 Bad Request: Server is pin"
    )
    [answer] = served.client(extra={"no_such_key": 1}).chat(["Is it red?"])
    assert isinstance(answer, Failure) and "no_such_key" in answer.reason
    answer = served.client().decide(["x"], {"type": "noul", "no_such_key": 1})
    assert isinstance(answer, Failure) and answer.reason.startswith("422 Unprocessable")
