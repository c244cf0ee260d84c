"""`editr2 watch`: what it says of a folder that grows, that is torn, that is put in place of
another; and that it only looks."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import editr2
from editr2.cli.main import main
from editr2.errors import UserError
from editr2.serving import address, listen
from editr2.watch.follow import TAIL, Followed, Tail
from editr2.watch.serve import Watch, token_of
from editr2.watch.view import page_state, page_strips, status


def train(iteration, **more):
    seconds = {"rollout": 2.0, "loss": 1.0}
    return {"event": "train", "iteration": iteration, "seconds": seconds, **more}


def write(folder: Path, *rows, torn="", planned=10):
    """Rows behind those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"train: {{iterations: {planned}}}\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return folder


def followed(folder, **more):
    run = Followed(folder, **more)
    run.look()
    return run


# ------------------------------------------------------------------------------- what is followed


def test_a_tail_reads_what_is_new_and_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_text('{"a": 1}\n{"a"')
    assert tail.read() == (True, [{"a": 1}])
    with path.open("a") as file:
        file.write(': 2}\nnot json\n[3]\n{"a": NaN}\n')
    assert tail.read() == (False, [{"a": 2}, {"a": None}]) and tail.torn == 2
    assert tail.read() == (False, [])
    (tmp_path / "b").write_text('{"a": 5}\n')
    os.replace(tmp_path / "b", path)  # as a run that goes on trims it
    assert tail.read() == (True, [{"a": 5}]) and tail.torn == 0
    path.write_text("")  # the same file, shorter
    assert tail.read() == (True, [])
    path.unlink()
    assert tail.read() == (True, []) and tail.read() == (False, [])


def _lies_deep(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text("[" * 5000)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder.write_text("a file"),
        lambda folder: (folder / "metrics.jsonl").mkdir(parents=True),
        lambda folder: (folder / "judges.jsonl").mkdir(parents=True),
        _lies_deep,
    ],
    ids=["a file", "a folder of rows", "a folder of answers", "deep settings"],
)
def test_what_stands_where_a_run_will_be_ends_nothing(make, tmp_path):
    make(tmp_path / "run")
    page = client(tmp_path / "run")
    assert page.get("/secret/state").json()["done"] == 0
    assert page.get("/secret/strips").json()["sessions"] == []


def test_of_a_large_record_the_end_is_read(tmp_path):
    path = tmp_path / "judges.jsonl"
    line = json.dumps({"key": "x" * 1000}) + "\n"
    path.write_text(line * (2 * TAIL // len(line)) + '{"failed": "down"}\n')
    run = followed(tmp_path)
    assert [row["failed"] for row in run.failures] == ["down"]
    (judges,) = run._judges.values()
    assert judges.torn == 0


def test_iterations_that_are_made_again_stand_once(tmp_path):
    run = followed(write(tmp_path, {"event": "start"}, *map(train, range(5)), torn='{"eve'))
    assert run.done == 5
    rows = "".join(json.dumps(row) + "\n" for row in [{"event": "start"}, train(0), train(1)])
    (tmp_path / "new").write_text(rows)
    os.replace(tmp_path / "new", tmp_path / "metrics.jsonl")
    before = run.version
    run.look()
    assert run.done == 2 and run.version > before
    run.look()
    assert run.version == before + 1


def test_the_time_left_counts_what_lies_between_iterations_where_it_was_seen(tmp_path):
    now, folder = [0.0], write(tmp_path / "run", train(0), train(1))
    run = followed(folder, clock=lambda: now[0], locks=str(locks(folder, True)))
    assert page_state(run)["left"] == "24s"  # 8 of 3 seconds: nobody has seen more
    for i in (2, 3):
        now[0] += 4.0
        write(folder, train(i))
        run.look()
    assert page_state(run)["left"] == "24s"  # 6 of 3 + 1
    now[0] += 3600.0  # nobody looked
    write(folder, train(4))
    run.look()
    assert page_state(run)["left"] == "20s"
    assert page_state(run)["speed"] == "3 s an iteration (typical 3)"


def locks(folder: Path, held: bool, host: str | None = None) -> Path:
    """A lock file as a run writes it, and the system's table with it or without."""
    lock = folder / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": host or platform.node()}))
    table = folder.parent / "locks"
    row = f"1: FLOCK  ADVISORY  WRITE 77 08:02:{lock.stat().st_ino} 0 EOF\n"
    table.write_text("2: POSIX ADVISORY READ 5 08:02:1 0 EOF\n" + (row if held else ""))
    return table


@pytest.mark.parametrize(
    ("rows", "held", "host", "kind", "text"),
    [
        (None, None, None, "waiting", "no run has begun there"),
        ([], True, None, "running", "at work"),
        ([train(0)], True, None, "running", "at work; its newest row is "),
        ([train(0)], False, None, "stopped", "stopped before its end"),
        ([train(0)], False, "elsewhere", "quiet", "on another machine, or"),
        ([train(9)], False, None, "finished", "finished"),
        ([{"event": "stop", "reason": "no rise"}], False, None, "finished", "finished: no rise"),
    ],
)
def test_it_says_how_a_run_stands(rows, held, host, kind, text, tmp_path):
    folder, table = tmp_path / "run", "/dev/null"
    if rows is not None:
        write(folder, *rows)
        table = str(locks(folder, held, host))
    said = status(followed(folder, locks=table))
    assert said["kind"] == kind and text in said["text"]


def test_the_lock_of_a_run_at_work_is_seen_and_not_taken(tmp_path):
    from editr2.run.lock import RunLock

    with RunLock(write(tmp_path, train(0))) as lock:
        lock.take(make=True)
        working = followed(tmp_path).working()
    if working is None:
        pytest.skip("this system has no /proc/locks")
    assert working is True and followed(tmp_path).working() is False


# ----------------------------------------------------------------------------------- what is shown


def test_a_run_is_shown_with_its_failures_alarms_and_curves(tmp_path):
    evaluation = {
        "event": "eval",
        "iteration": 0,
        "name": "before",
        "reward_turn": [{"mean": 0.5, "se": 0.1}, {"mean": None}],
        "success": {"mean": 0.25},
    }
    rows = [
        {"event": "start", "identity": {"resumed": [{"iteration": 3, "date": "2027"}]}},
        evaluation,
        train(0, reward_turn=[0.5, None], if_turn=[1, 0.5], ratio_error=0.0, kl=None, own_turn=[1]),
        train(1, reward_turn=[0.75, 0.5], if_turn=[1, 0.0], ratio_error=1e-6, failed_scores=3,
              first_failure="http://me:pw@host is down", advantage_abs=0, non_finite=["kl"]),
        evaluation | {"iteration": 2, "name": "during", "alarms": {"drift": "colours run away"}},
    ]  # fmt: skip
    write(tmp_path, *rows, torn="{")
    where = {"purpose": "train", "iteration": 1, "turn": 1, "name": "IF"}
    several = {"purpose": "eval", "iteration": 1, "turn": [1, 2], "name": ["IF", "CC"]}
    calls = [several | {"failed": "down"}, where | {"answer": 1}]
    calls += [where | {"failed": "HTTP 500"}, where | {"failed": "HTTP 500"}]
    (tmp_path / "judges-1.jsonl").write_text("".join(json.dumps(c) + "\n" for c in calls))
    state = page_state(followed(tmp_path))
    assert (state["done"], state["planned"]) == (2, 10)
    curves = {curve["title"]: curve for curve in state["curves"]}
    assert curves["Reward by turn"]["x"] == [1, 2]
    assert [line["y"] for line in curves["Reward by turn"]["series"]] == [[0.5, 0.75], [None, 0.5]]
    scores = {line["label"]: line["y"] for line in curves["Scores, mean over turns"]["series"]}
    assert scores == {"IF": [0.75, 0.5], "own": [1.0, None]}
    assert curves["Reward by turn, evaluated"]["x"] == [0, 2]
    assert curves["|ratio − 1| of the replay"]["log"] and "KL to the reference" not in curves
    notes = {note["text"]: note["kind"] for note in state["notes"]}
    assert notes["at iteration 2: colours run away"] == "alarm"
    assert notes["kl is not finite at iteration 2"] == "alarm"
    assert notes["3 scores failed, in 1 of 2 iterations"] == "warn"
    assert notes["went on from iteration 3, 2027"] == "note"
    assert any(text.startswith("the newest iteration trains nothing") for text in notes)
    assert any("at most 1e-06, exactly 0 in 1 of 2" in text for text in notes)
    assert [(one["at"], one["why"], one["times"]) for one in state["failures"]] == [
        ("train, iteration 2, turn 1, IF", "HTTP 500", 2),
        ("eval, iteration 1, turns 1, 2, IF, CC", "down", 1),
        ("iteration 2, the first", "http://(withheld)@host is down", 1),
    ]
    assert state["evaluations"]["rows"][0] == ["2 (during)", "0.500 ± 0.100", "–", "25.0%"]


def test_a_verifiers_training_is_followed_too(tmp_path):
    rows = [
        {"event": "start", "objective": "gcpo", "identity": {"made": {"processes": 2}}},
        {"event": "eval", "iteration": 0, "accuracy": 0.5, "nll": 2.0},
        train(0, loss=1.0, accuracy=0.5, ratio_error=0.0),
        {"event": "eval", "iteration": 1, "accuracy": 0.75, "nll": 1.0},
    ]  # fmt: skip
    state = page_state(followed(write(tmp_path, *rows)))
    assert dict(state["facts"]) == {"objective": "gcpo", "processes": "2"}
    assert state["evaluations"] == {
        "head": ["iteration", "accuracy", "nll"],
        "rows": [["1", "0.750", "1.000"], ["0", "0.500", "2.000"]],
    }
    titles = [curve["title"] for curve in state["curves"]]
    assert titles[:2] == ["accuracy", "loss"] and "accuracy, evaluated" in titles


def test_a_long_run_is_drawn_as_means_of_neighbours(tmp_path):
    state = page_state(followed(write(tmp_path, *(train(i, loss=float(i)) for i in range(3001)))))
    (loss,) = [curve for curve in state["curves"] if curve["title"] == "loss"]
    assert len(loss["x"]) == 1001 and loss["series"][0]["y"][:2] == [1.0, 4.0]


def sessions(folder: Path):
    (folder / "strips").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "strips" / "a.png")
    turn = {"instruction": "<b>paint it", "image": "a.png", "reward": 0.5, "scores": {"IF": 1.0}}
    found = [
        {"id": name, "image": "a.png", "turns": [turn | {"reward": reward, "reason": reason}]}
        for name, reward, reason in (
            ("fine", 1.0, None),
            ("bad", 0.1, None),
            ("failed", None, "down"),
        )
    ]
    (folder / "strips" / "after.json").write_text(json.dumps({"sessions": found}))


def test_the_newest_sessions_are_shown_those_that_failed_first(tmp_path):
    run = followed(write(tmp_path, train(0)))
    assert page_strips(run) == {"title": None, "sessions": []}
    sessions(tmp_path)
    found = page_strips(run)
    assert [one["id"] for one in found["sessions"]] == ["failed", "bad", "fine"]
    assert found["sessions"][0]["turns"][0]["reason"] == "down" and found["sessions"][0]["small"]
    (tmp_path / "evaluations").mkdir()
    Image.fromarray(np.zeros((8, 24, 3), np.uint8)).save(tmp_path / "evaluations" / "000001.png")
    place = {"top": 0, "cell": [8, 8], "outputs": 1, "expected": 1}
    line = {"id": "s", "sheet": place, "turns": [{"instruction": "x", "reward": 0.2}]}
    (tmp_path / "evaluations" / "000001.jsonl").write_text(json.dumps(line) + "\n")
    write(tmp_path, {"event": "eval", "iteration": 1})
    run.look()
    found = page_strips(run)
    assert found["title"] == "Evaluated at iteration 1"
    assert found["sessions"][0]["turns"][0]["asked"].startswith("data:image/")
    (tmp_path / "strips" / "after.json").write_text('{"sess')
    (tmp_path / "evaluations" / "000001.jsonl").unlink()
    assert page_strips(run)["sessions"] == []


# ---------------------------------------------------------------------------------------- server


def client(folder, **more):
    testing = pytest.importorskip("starlette.testclient", reason="needs starlette: editr2[label]")
    watch = Watch(folder, "secret")
    return testing.TestClient(watch.app(), base_url="http://127.0.0.1", **more)


def test_the_server_answers_and_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    page = client(folder)
    assert page.get("/secret/state").json()["status"]["kind"] == "waiting"
    assert not folder.exists()
    write(folder, train(0, loss=1.0))
    sessions(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    state = page.get("/secret/state").json()
    assert state["done"] == 1
    again = page.get("/secret/state", params={"have": state["version"]}).json()
    assert set(again) == {"version", "status"}
    strips = page.get("/secret/strips").json()
    assert len(strips["sessions"]) == 3
    have = {"have": strips["version"]}
    assert page.get("/secret/strips", params=have).json() == {"version": strips["version"]}
    for name in ("", "page.js", "page.css", "uplot.min.js", "uplot.css"):
        answer = page.get(f"/secret/{name}")
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert page.get("/other/state").status_code == 404 == page.get("/state").status_code
    assert page.post("/secret/state").status_code == 405
    assert page.get("/secret/state", headers={"host": "evil.example"}).status_code == 400
    assert page.get("/secret/../config.yaml").status_code == 404
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_folders_address_stays_and_is_nobody_elses(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    first = token_of(tmp_path / "a", keys)
    assert first == token_of(tmp_path / "a", keys) != token_of(tmp_path / "b", keys)
    assert (keys / "watch.key").stat().st_mode & 0o077 == 0
    assert token_of(tmp_path / "a", tmp_path / "others") != first
    (keys / "watch.key").write_bytes(b"")  # nothing follows from nothing
    assert token_of(tmp_path / "a", keys) != token_of(tmp_path / "a", keys)


@pytest.mark.parametrize("gone", ["starlette", "starlette.concurrency", "uvicorn"])
@pytest.mark.parametrize("command", ["watch", "label"])
def test_without_the_extra_a_page_names_the_package_and_how_to_get_it(
    command, gone, tmp_path, monkeypatch, capsys
):
    if gone == "uvicorn":
        pytest.importorskip("starlette", reason="needs starlette: editr2[label]")
    for name in [name for name in sys.modules if name.partition(".")[0] == gone.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, gone, None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for n in range(3):
        Image.new("RGB", (8, 8), (n, n, n)).save(tmp_path / f"{n}.png")
    question = {"image": "0.png", "outputs": ["1.png", "2.png"], "instruction": "red", "id": "q"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    assert main([command, str(tmp_path), "--port", "0"]) == 2
    package = gone.partition(".")[0]
    said = capsys.readouterr()
    assert said.err == (
        f"error: {command}: the page needs {package} (accepted: pip install 'editr2[label]')\n"
    )
    assert not said.out or gone == "uvicorn"  # no address that nobody answers at


def test_the_command_says_where_it_is(tmp_path, monkeypatch, capsys):
    pytest.importorskip("starlette", reason="needs starlette: editr2[label]")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    seen = []
    monkeypatch.setattr("editr2.watch.serve.serve", lambda watch, at: seen.append((watch, at)))
    assert main(["watch", str(tmp_path / "run"), "--port", "0"]) == 0
    ((watch, listening),) = seen
    said = capsys.readouterr().out
    assert address(watch.token, listening) in said
    assert "no run is there yet, and the page waits for one\n" in said
    assert listening.getsockname()[0] == "127.0.0.1"
    taken = listen(0)
    port = str(taken.getsockname()[1])
    assert main(["watch", str(tmp_path), "--port", port]) == 2
    assert f"--port: {port}: Address already in use" in capsys.readouterr().err
    monkeypatch.setattr("editr2.watch.serve.PORT", int(port))
    assert main(["watch", str(tmp_path)]) == 0
    assert seen[-1][1].getsockname()[1] not in (0, int(port))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    capsys.readouterr()
    assert main(["watch", str(tmp_path / "run"), "--port", "0"]) == 0
    assert "no run" not in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "rum"), "--port", "0"]) == 0
    assert f"waits for one; did you mean {tmp_path / 'run'}?" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert main(["watch", str(tmp_path / "file")]) == 2
    assert "a file (accepted: a run's folder" in capsys.readouterr().err
    for at in (taken, *(at for _, at in seen)):
        at.close()


# -------------------------------------------------------------------------------------- notebooks


class Display:
    """IPython's, as far as it is used."""

    def __init__(self):
        self.shown = []

    def __call__(self, thing, *, display_id):
        assert display_id is True
        self.update(thing)
        return self

    def update(self, thing):
        self.shown.append((repr(thing), thing._repr_html_()))


def test_a_notebook_shows_the_curves_as_rows_come():
    import xml.etree.ElementTree as xml

    now, display = [0.0], Display()
    config = SimpleNamespace(train=SimpleNamespace(iterations=4))
    live = editr2.Live(config, display=display, clock=lambda: now[0])
    live({"event": "start"})
    for i in range(4):
        row = train(i, reward=i / 4, reward_turn=[i / 4, None], ratio_error=0.0, grad_norm=1e-3)
        live(row | {"failed_scores": "<script>"})
        now[0] += 4.0 if i % 2 else 0.4
    live({"event": "eval", "iteration": 4, "alarms": {"drift": "<b>red"}})
    # Not the first two, within a second of the last drawing; the last of all, always.
    texts = [text for text, _ in display.shown]
    assert [text.split(",")[0] for text in texts] == [
        "iteration 0 of 4",
        "iteration 3 of 4",
        "iteration 4 of 4",
        "iteration 4 of 4",
    ]
    assert "4s left" in texts[1] and "left" not in texts[-1] and "reward 0.75" in texts[-1]
    page = xml.fromstring(display.shown[-1][1])
    assert len(page.findall(".//svg")) == 4 and page.find(".//b").text == "<b>red"
    (line,) = page.findall(".//svg[@aria-label='Reward by turn']/polyline")
    assert len(line.get("points").split()) == 4


def test_without_ipython_it_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="Live: needs IPython"):
        editr2.Live()
