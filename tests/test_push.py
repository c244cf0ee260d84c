"""`editr2 export --push`, by the hub's own client, against a small hub in this process."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from editr2.cli.main import main
from editr2.config import Config
from editr2.export import export as exporting
from editr2.export.model_card import _about_scores
from editr2.export.push import with_download
from editr2.export.result import Exported, Proof
from editr2.report.data import Comparison, RecordedRun
from editr2.run import hub

TOKEN = "hf_good"
CARD = "---\ntags: [editr2]\n---\n\n# out\n\n## How to load it\n\n`--policy out`\n"


class Hub(ThreadingHTTPServer):
    """What the client asks of a hub: who one is, whether a repository is there, a new one, and
    commits of small files."""

    daemon_threads = True
    repos: dict[str, dict]
    broken = False

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def known(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials"}, 401)
        return False

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        if not self.known():
            return
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "anna", "type": "user"})
        name, _, rest = self.path.partition("?")[0].removeprefix("/api/models/").partition("/tree/")
        repo = self.server.repos.get(name.removesuffix("/revision/main"))
        if repo is None:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        if rest:
            return self.answer(
                [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in repo["files"]]
            )
        siblings = [{"rfilename": path} for path in repo["files"]]
        about = {"id": name, "private": repo["private"], "sha": "0" * 40, "siblings": siblings}
        self.answer(about | {"tags": [], "downloads": 0, "likes": 0})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self.known():
            return
        if self.path == "/api/validate-yaml":  # of a card's head
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'anna'}/{asked['name']}"
            if not name.startswith("anna/"):
                return self.answer({"error": "not yours"}, 403)
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.server.repos[name] = {"private": private, "files": {}, "commits": []}
            return self.answer({"url": f"{self.server.url()}/{name}", "name": name})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main\S*", self.path).groups()
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.server.broken:
            return self.answer({"error": "the disk of the hub is full"}, 400)
        repo = self.server.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
        self.answer(
            {"commitUrl": f"{self.server.url()}/{name}/commit/1", "commitOid": "1", "success": True}
        )


@pytest.fixture
def server(monkeypatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Answers) as server:
        server.repos = {
            "anna/there": {
                "private": False,
                "files": {"old.bin": b"", ".gitattributes": b""},
                "commits": [],
            }
        }
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name in (
            "http_proxy",
            "https_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url())
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.offline.cache_clear()
        yield server
        hub.offline.cache_clear()
        server.shutdown()


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """An export's folder; and `export` writes such a one."""

    def write(run, folder, **how):
        folder.mkdir()
        (folder / "README.md").write_text(CARD)
        (folder / "editr2.yaml").write_text("policy: {}\n")
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        return f"exported {how}"

    monkeypatch.setattr(exporting, "export", write)
    write(None, tmp_path / "out")
    return tmp_path / "out"


def test_a_run_is_exported_and_uploaded_when_that_is_asked(server, out, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(["export", "run", "--out", str(new)]) == 0 and not server.repos.keys() - {
        "anna/there"
    }
    new = tmp_path / "newer"
    words = ["export", "run", "--out", str(new), "--merge", "--push", "anna/mine", "--private"]
    assert main(words) == 0
    assert f"pushed: {server.url()}/anna/mine\n" in capsys.readouterr().out
    mine = server.repos["anna/mine"]
    assert mine["private"] and len(mine["commits"]) == 1
    assert mine["files"] == {path.name: path.read_bytes() for path in new.iterdir()}
    assert b"`hf download anna/mine --local-dir newer`" in mine["files"]["README.md"]


def test_an_export_is_uploaded_as_it_is_and_in_place_of_another(server, out, capsys):
    assert main(["export", str(out), "--push", "anna/mine"]) == 0
    card = (out / "README.md").read_text()
    assert not server.repos["anna/mine"]["private"]
    assert main(["export", str(out), "--push", "anna/there", "--update"]) == 0
    assert server.repos["anna/there"]["files"].keys() == {
        ".gitattributes",
        "README.md",
        "editr2.yaml",
        "model.safetensors",
    }
    assert (out / "README.md").read_text() == card.replace("anna/mine", "anna/there")


def test_a_card_says_how_it_is_fetched_once(out):
    once = with_download(CARD, "a/b", "out")
    assert once == with_download(once, "a/b", "out") and once.count("hf download a/b") == 1
    assert once.index("hf download") < once.index("`--policy out`")
    assert with_download("# mine\n", "a/b", "out") == "# mine\n"


def test_a_card_has_the_interval_of_what_training_changed():
    last = Comparison(3, 0.5, 0.6, 0.1, 0.05, 200, None, None)
    run = RecordedRun(Path("run"), comparisons=[replace(last, turn=1, se=None), last])
    done = Exported(Path("out"), "lora", "ema", 3, 3, Proof(1.0, 0.1, 0.0, 0.0))
    said = " ".join(_about_scores(run, Config().train, done))
    changed = "Training changed the reward of turn 3 by +0.100 [+0.002, +0.198] (95 %, paired over "
    assert f"{changed}the same 200 sessions)." in said and said.count("Training changed") == 1


@pytest.mark.parametrize(
    ("words", "state", "said"),
    [
        ("{out} --push mine", {}, "--push: 'mine' (accepted: OWNER/NAME; each of letters"),
        ("{out} --push anna/there", {}, "--push: anna/there: is there already (accepted: a new"),
        (
            "{out} --push anna/there --update --private",
            {},
            "--private: anna/there is there already, and public",
        ),
        (
            "{out} --push bert/mine",
            {},
            "--push: bert/mine: the token may not write there (accepted: a token",
        ),
        (
            "{out} --push anna/mine",
            {"token": "hf_bad"},
            "the hub does not know the token (accepted: one that",
        ),
        (
            "{out} --push anna/mine",
            {"token": ""},
            "no token of the hub here (accepted: one that may write",
        ),
        (
            "{out} --push anna/mine",
            {"offline": True},
            "HF_HUB_OFFLINE is set (accepted: a machine with network)",
        ),
        ("{out} --push anna/mine", {"gone": True}, "cannot be reached: "),
        ("{out} --push anna/mine", {"broken": True}, "the disk of the hub is full"),
        (
            "{out} --private --out x",
            {},
            "--private: says how to upload (accepted with --push OWNER/NAME)",
        ),
        (
            "run --push anna/mine",
            {},
            "--out: missing (accepted without it: the folder of an export, which run",
        ),
        (
            "{out} --push anna/mine --merge",
            {},
            "--merge: {out} is exported already (accepted with the folder of",
        ),
        ("run", {}, "--out: missing (usage: editr2 export RUN --out PATH [options])"),
    ],
)
def test_what_is_refused_is_one_line(words, state, said, server, out, monkeypatch, capsys):
    if "token" in state:
        monkeypatch.setenv("HF_TOKEN", state["token"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out / "no token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(out / "no tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state.get("offline", False))
    server.broken = "broken" in state
    if "gone" in state:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert main(["export", *words.replace("{out}", str(out)).split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said.replace("{out}", str(out)) in error
    if "broken" in state:  # what was made so far is there, and how to go on
        assert f"the export stands: editr2 export {out} --push anna/mine --update\n" in error
        server.broken = False
        assert main(["export", str(out), "--push", "anna/mine", "--update"]) == 0
        assert "model.safetensors" in server.repos["anna/mine"]["files"]
    elif "anna/there" in server.repos:
        assert server.repos.keys() == {"anna/there"} and not server.repos["anna/there"]["commits"]
