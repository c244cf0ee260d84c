"""Names on the hub where there is none: one line, at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from editr2.cli.main import main
from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.load import load_policy
from editr2.recipes import FOLDER
from editr2.run import hub


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    hub.offline.cache_clear()
    yield
    hub.offline.cache_clear()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_answer_is_one(status):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert hub.unreachable(f"http://127.0.0.1:{server.server_port}") is None
        thread.join()


@pytest.mark.parametrize("endpoint", ["hub.example", "http://[bad", "http://a\nb.example", ""])
def test_what_is_no_address_is_said(endpoint, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert "no address" in (hub.offline() or "") and not capsys.readouterr().err


def test_nobody_there_and_nobody_who_answers(monkeypatch):
    assert "refused" in (hub.unreachable(f"http://127.0.0.1:{closed_port()}") or "")
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        assert hub.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 5


def test_without_a_hub_its_libraries_are_told_and_the_reason_stays(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    why = hub.offline()
    assert why and "cannot be reached" in why and constants.HF_HUB_OFFLINE
    assert hub.offline() == why  # not "HF_HUB_OFFLINE is set", which nobody did


def test_a_model_that_cannot_be_fetched_is_one_line_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_policy(PolicyConfig(model="kontext", weights="some.one/else-1"))
    assert str(caught.value).startswith(
        "policy.weights: some.one/else-1: no folder, not downloaded before, and 127.0"
    )
    assert "\n" not in str(caught.value) and time.process_time() - start < 10
    hub.check_model(str(tmp_path), "policy.weights")
    hub.check_model("no hub id", "policy.weights")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name: "model_index.json")
    hub.check_model("some.one/else-1", "policy.weights")


@pytest.mark.parametrize(
    "command",
    [
        "train --config klein-nft-24gb --data nowhere",
        "train --config klein-nft-24gb --data.heldout nowhere",
        "eval --config klein-nft-24gb --data nowhere",
        "rollout --config klein-nft-24gb --data nowhere",
    ],
)
def test_data_that_is_not_there_is_said_before_a_model_that_cannot_be_fetched(
    command, monkeypatch, tmp_path, capsys
):
    """Of the two it is what one can mend at once, and a user's own slip."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: nowhere: no such file (accepted: a sessions.jsonl"), said
    assert not list(tmp_path.iterdir())
    assert main(command.replace("nowhere", str(FOLDER / "photos")).split()) == 2
    assert "policy.weights: black-forest-labs/FLUX.2-klein" in capsys.readouterr().err
