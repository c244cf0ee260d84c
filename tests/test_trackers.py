"""Trackers beside metrics.jsonl: what they are sent, once, without secrets; and the README of a
run's folder."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from editr2.cli.main import main
from editr2.config import Config, RewardConfig
from editr2.config.settings import TRACKERS_LISTED
from editr2.errors import ConfigError
from editr2.run.folder import (
    Refreshed,
    check_holds_no_runs,
    check_no_evaluation,
    check_settings_are_ours,
    write_readme,
)
from editr2.run.processes import open_processes
from editr2.run.trackers import TRACKERS, Observer, open_trackers, strip_images
from editr2.run.tracking import MetricsLog
from editr2.secrets import WITHHELD, withheld, withheld_command


class Fake(GeneralTracker):
    """Keeps what it is told in a list of all of its kind."""

    name = "fake"
    requires_logging_directory = False
    made: ClassVar[list[Fake]] = []

    def __init__(self, project, fails="", **options):
        super().__init__()
        self.project, self.options, self.fails = project, options, fails
        self.config, self.rows, self.images, self.closed = {}, [], {}, False
        Fake.made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        if self.fails == "start":
            raise RuntimeError("no network at all")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        if self.fails == "log":
            raise OSError("the server went away")
        self.rows.append((step, values))

    def log_images(self, values, step=None):
        self.images |= {(step, name): np.shape(images) for name, images in values.items()}

    def finish(self):
        self.closed = True


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(Fake, "made", [])
    return Fake


def train(iteration, **more):
    return {"event": "train", "iteration": iteration, "reward": iteration / 10, **more}


BEFORE = {
    "event": "eval",
    "name": "before",
    "iteration": 0,
    "success": {"mean": 0.75, "se": 0.1},
    "eval_reward": {"per_session": {"reward": [0.5, 0.25]}},
}


def run(folder, names, rows, at=0, options=None, config=None, after=None):
    """The rows of one process of a run that stands at an iteration, and its film-strips."""
    notes = []
    sinks = open_trackers(
        names, options or {}, folder, config or Config(), at=at, note=notes.append
    )
    with MetricsLog(folder / "metrics.jsonl", resume_iteration=at, sinks=sinks) as metrics:
        for row in rows:
            metrics.append(row)
        if after is not None:
            metrics.strips(after, 5)
    return notes


def killed_and_resumed(folder, names, after=None, **more):
    """Killed in the fourth iteration with a checkpoint at the second, then again in the third."""
    first = [{"event": "start", "iteration": 0}, BEFORE, *map(train, range(4))]
    run(folder, names, first, **more)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "tra')
    run(folder, names, [train(2)], at=2, **more)
    run(folder, names, [train(2), train(3), train(4)], at=2, after=after, **more)


def test_every_row_is_sent_once_to_one_run(tmp_path):
    options = {"fake": {"project": "mine", "entity": "me"}}
    killed_and_resumed(tmp_path, ["fake"], options=options)
    sent = [row for tracker in Fake.made for row in tracker.rows]
    assert [(step, values) for step, values in sent if "train/reward" in values] == [
        (i, {"train/reward": i / 10}) for i in range(5)
    ]
    # An evaluation's values a session are no curve.
    assert sent[0] == (0, {"eval/success/mean": 0.75, "eval/success/se": 0.1})
    first = Fake.made[0]
    assert first.project == "mine" and first.options == {"entity": "me"}
    assert first.config["train.lr"] == Config().train.lr and not Fake.made[1].config
    assert all(tracker.closed for tracker in Fake.made)
    held = json.loads((tmp_path / "tracking.json").read_text())
    (tmp_path / "metrics.jsonl").unlink()  # another run begins in the folder
    run(tmp_path, ["fake"], [train(0)])
    assert json.loads((tmp_path / "tracking.json").read_text())["id"] != held["id"]
    assert Fake.made[-1].rows == [(0, {"train/reward": 0.0})]


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path):
    run(tmp_path, [], [BEFORE, train(0), train(1)])
    run(tmp_path, ["fake"], [train(1), train(2)], at=1)
    assert [step for step, names in Fake.made[0].rows if "train/reward" in names] == [0, 1, 2]


def test_settings_go_along_and_secrets_do_not(tmp_path):
    secret = {"api_key": "abc", "url": "http://me:pw@judge/v1?api_key=abc&n=2", "votes": 3}
    given = {**secret, "headers": {"Authorization": "Bearer abc"}, "max_tokens": 9, "hf-token": "x"}
    config = replace(Config(), reward=RewardConfig(name="edit-r2", options=given))
    run(tmp_path, ["fake"], [], config=config)
    sent = Fake.made[0].config
    assert sent["reward.options.votes"] == 3 and sent["reward.options.max_tokens"] == 9
    assert sent["reward.options.url"] == (f"http://{WITHHELD}@judge/v1?api_key={WITHHELD}&n=2")
    for name in ("api_key", "headers.Authorization", "hf-token"):
        assert sent[f"reward.options.{name}"] == WITHHELD
    assert "abc" not in json.dumps(sent)
    assert withheld({"use": [{"options": {"key": "abc"}}]}) == {
        "use": [{"options": {"key": WITHHELD}}]
    }
    words = [
        "train",
        "--reward.options.api_key",
        "abc",
        "--x.secret=abc",
        "--data.path",
        "hf_" + 20 * "a",
    ]
    assert "abc" not in withheld_command(words) and "aaaa" not in withheld_command(words)
    assert withheld_command(["train", "--policy.text_tokens", "9"]) == (
        "train --policy.text_tokens 9"
    )


def strips(run):
    """A pass of one session, of which one image is missing."""
    folder = run / "strips"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(folder / "a.png")
    session = {"id": "s1", "image": "a.png", "turns": [{"image": "a.png"}, {"image": None}]}
    (folder / "after.json").write_text(json.dumps({"sessions": [session]}))
    return folder


def test_film_strips_become_images(tmp_path):
    folder, notes = strips(tmp_path), []
    sinks = open_trackers(["fake"], {}, tmp_path, Config(), at=0, note=notes.append)
    with MetricsLog(tmp_path / "metrics.jsonl", sinks=sinks) as metrics:
        metrics.strips(folder / "after.json", 7)
        metrics.strips(folder / "gone.json", 8)
        metrics.strips(folder / "gone.json", 9)
    assert Fake.made[0].images == {(7, "strips/s1"): (1, 256, 768, 3)}
    assert len(notes) == 1 and "FileNotFoundError" in notes[0]


def test_sessions_of_an_evaluation_become_images(tmp_path):
    sheet = np.zeros((32, 24, 3), np.uint8)
    sheet[16:, 8:16] = 200
    Image.fromarray(sheet).save(tmp_path / "000004.png")
    place = {"top": 16, "cell": [8, 16], "outputs": 1, "expected": 1}
    sessions = [{"id": "none kept"}, {"id": "s2", "sheet": place}]
    lines = "".join(json.dumps(session) + "\n" for session in sessions)
    (tmp_path / "000004.jsonl").write_text(lines)
    ((name, image),) = strip_images(tmp_path / "000004.jsonl")
    assert name == "s2" and image.shape == (256, 256, 3)
    assert not image[:, :128].any() and (image[:, 128:] == 200).all()


def test_a_tracker_that_fails_is_a_note_and_one_that_does_not_start_an_error(tmp_path):
    notes = run(tmp_path, ["fake"], [train(0), train(1)], options={"fake": {"fails": "log"}})
    said = "the server went away; said once, and the run goes on"
    assert len(notes) == 1 and said in notes[0] and "tracking: fake: OSError" in notes[0]
    with pytest.raises(ConfigError, match="tracking: fake: does not start: .*no network at all"):
        run(tmp_path, ["fake"], [], options={"fake": {"fails": "start"}})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tracking", "[wanbd]"], "'wanbd' is none of them"),
        (["--tracking", "[fake, fake]"], "each once"),
        (["--tracking", "[aim]"], "aim: needs aim, which is not installed (accepted: pip install"),
        (["--tracking", "[json:JSONDecoder]"], "(accepted: a class of accelerate.tracking."),
        (["--tracking_options.wandb", "{}"], "tracking_options.wandb: (accepted: what tracking"),
    ],
)
def test_a_tracker_that_cannot_be_is_one_line_before_anything_is_loaded(
    flags, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "aim", None)
    monkeypatch.setattr("editr2.rl.loop.open_processes", lambda: pytest.fail("it was begun"))
    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_listed_trackers_are_the_table():
    assert all(f" {name}," in TRACKERS_LISTED for name in TRACKERS)
    assert set(TRACKERS) == set(map(str, LOGGER_TYPE_TO_CLASS)) - {"fake"}


# --------------------------------------------------------------------------- what looks on besides


def test_an_observer_gets_every_row_and_cannot_end_a_run(tmp_path):
    seen, notes = [], []

    def look(row):
        seen.append(row["iteration"])
        if row["iteration"] == 2:
            raise ZeroDivisionError("a plot of mine")

    for rows in ([train(0), train(1)], [train(1), train(2), train(3)]):
        sinks = [Observer(look, notes.append)]
        at = rows[0]["iteration"]
        with MetricsLog(tmp_path / "metrics.jsonl", resume_iteration=at, sinks=sinks) as metrics:
            for row in rows:
                metrics.append(row)
    assert seen == [0, 1, 0, 1, 2]
    assert len(notes) == 1 and notes[0].startswith("observer: ZeroDivisionError: a plot of mine")
    assert "test_trackers.py:" in notes[0]


def test_the_page_is_refreshed_where_it_is_cheap(tmp_path):
    now, took, written, notes = [0.0], [1.0], [], []

    def write(folder):
        now[0] += took[0]
        written.append(now[0])

    page = Refreshed(tmp_path, write, notes.append, clock=lambda: now[0])
    for _ in range(400):
        page.refresh()
        now[0] += 1.0
    assert [round(at) for at in written] == list(range(1, 401, 51))

    def fails(folder):
        raise OSError("the disk is full")

    page = Refreshed(tmp_path, fails, notes.append)
    page.refresh()
    page.refresh()
    page.finish()
    why = "report: not written: OSError: the disk is full"
    assert notes == [f"{why}; the run goes on", f"{why}; editr2 report {tmp_path} tries again"]


@pytest.mark.parametrize(
    "files, said",
    [
        ({"config.yaml": "mine"}, "its config.yaml is of no run"),
        ({"config.yaml": "ours", ".lock": ""}, None),
        ({"config.yaml": "ours", "metrics.jsonl": '{"event": "start"}\n'}, None),
        ({"metrics.jsonl": '{"event": "start", "command": "eval"}\n'}, "folder of an evaluation"),
        ({"a/metrics.jsonl": "", ".lock": ""}, r"mine; did you mean \S*/a\?"),
        ({"a/metrics.jsonl": "", "mine/notes": ""}, "such as .*/mine-2; did you mean .*/a"),
        ({"a/metrics.jsonl": "", "config.yaml": "ours", ".lock": ""}, None),
        ({"a/metrics.jsonl": "", "metrics.jsonl": ""}, None),
        ({"a/config.yaml": "of another program"}, None),
        ({}, None),
    ],
)
def test_a_run_writes_over_nobodys_files(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        check_settings_are_ours(tmp_path)
        check_no_evaluation(tmp_path)
        check_holds_no_runs(tmp_path)


def test_a_folder_in_it_that_is_not_ours_to_read_is_no_run(tmp_path, monkeypatch):
    """As lost+found of a disk, or others' folders in a shared one."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "mine").mkdir()
    stat = Path.stat

    def denied(path, **how):
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", denied)
    check_holds_no_runs(tmp_path)
    monkeypatch.undo()
    (tmp_path / "mine" / "metrics.jsonl").touch()
    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(ConfigError, match="did you mean .*/mine?"):
        check_holds_no_runs(tmp_path)


def made(command, processes=1):
    versions = {"editr2": "0.1.0", "torch": "2.9"}
    given = {"command": command, "processes": processes, "versions": versions, "commit": "c0ffee"}
    return {**given, "host": "secret-host", "date": "2026-01-01", "device": "cpu"}


@pytest.mark.parametrize(
    ("command", "processes", "said"),
    [
        ("/opt/bin/editr2 train --out r", 1, "    editr2 train --out r\n"),
        ("/x/editr2/__main__.py train", 2, "    torchrun --nproc_per_node 2 -m editr2 train\n"),
        ("editr2 train --reward.options.api_key abc", 1, f"api_key '{WITHHELD}'\n"),
        ("/home/me/mine.py", 1, "started from Python (mine.py)"),
        ("/home/me/mine.py", 1, "    again again\n"),
    ],
)
def test_a_runs_readme_says_how_to_go_on(command, processes, said, tmp_path):
    others = [("Its page", "editr2 report r")]
    write_readme(tmp_path, made(command, processes), "finished", "again again", others)
    text = (tmp_path / "README.md").read_text()
    assert said in text and "    editr2 report r\n" in text
    assert "editr2: 0.1.0, commit c0ffee" in text and "- Stands: finished" in text
    assert not any(secret in text for secret in ("abc", "secret-host", "/home/me"))
    write_readme(tmp_path, made(command), "again", "again again", others)
    assert "- Stands: again" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_readme(tmp_path, made(command), "finished", "again again", others)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture
def trackers_of_others(monkeypatch, tmp_path):
    """Nothing is sent anywhere, and nothing written outside of the test's folder."""
    open_processes()  # accelerate's own log wants it
    for name, value in {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)


def test_tensorboard_has_every_iteration_of_a_resumed_run_once(tmp_path, trackers_of_others):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, ["tensorboard"], after=strips(tmp_path) / "after.json")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    got = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert got["train/reward"] == pytest.approx({i: i / 10 for i in range(5)})
    assert got["eval/success/mean"] == {0: 0.75}
    assert [(one.step, one.width, one.height) for one in events.Images("strips/s1")] == [
        (5, 768, 256)
    ]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_trackio_goes_on_with_a_run(tmp_path, trackers_of_others):
    pytest.importorskip("trackio", reason="needs trackio")
    killed_and_resumed(tmp_path, ["trackio"], after=strips(tmp_path) / "after.json")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("editr2")
    assert name.startswith(tmp_path.name)
    rows = SQLiteStorage.get_logs("editr2", name)
    found = sorted((row["step"], row["train/reward"]) for row in rows if "train/reward" in row)
    assert found == [(i, i / 10) for i in range(5)]
    (image,) = [row["strips/s1"] for row in rows if "strips/s1" in row]
    assert image["_type"] == "trackio.image" and list(tmp_path.glob("trackio/**/*.png"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_wandb_goes_on_with_a_run(tmp_path, trackers_of_others):
    pytest.importorskip("wandb", reason="needs wandb")
    killed_and_resumed(tmp_path, ["wandb"], after=strips(tmp_path) / "after.json")
    id = json.loads((tmp_path / "tracking.json").read_text())["id"]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{id}*/run-{id}.wandb"))) == 3
    assert list(tmp_path.glob(f"wandb/offline-run-*-{id}*/files/media/images/strips/s1_*.png"))
