"""Sessions that can be judged: what the judge says is checked before it is kept, nothing is asked
twice, and corrections are applied or refused by line. The judge is a server on this machine that
says what a test has written down, the detector finds what a test has drawn."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from editr2.annotate.annotate import annotate
from editr2.annotate.asking import Judge, Looker, Options
from editr2.annotate.corrections import corrected
from editr2.annotate.fields import FIELDS, LISTS, Tally, lacking
from editr2.annotate.forms import FORMS, formatted
from editr2.annotate.objects import Thing, Things, renamed
from editr2.annotate.page import write_page
from editr2.cli.main import main
from editr2.errors import DataError
from editr2.rewards.base import Calls
from editr2.rewards.detect import DetectorError
from editr2.rewards.eyes import Eyes, Looking
from editr2.rewards.geometry import TASKS, Box, Edit, Found, parse_edit
from editr2.rewards.record import Record
from editr2.sessions import Session, Turn, load_sessions, save_sessions

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)

OBJECTS = [
    {"name": "red cup", "foreground": True, "text": ""},
    {"name": "dog", "foreground": True, "text": ""},
    {"name": "sky", "foreground": False, "text": ""},
]


def says(task: str, form: str) -> str:
    return json.dumps({"task": task, "formatted_instruction": form, "why": "so"})


RECOLOUR = says("color_alter", "Change the color of [red cup] to [blue]")


def words_of(body: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in body["messages"][0]["content"])


@dataclass
class Script:
    """What the judge says. turns: by instruction, one answer or several in their order. agrees: at
    the second look, by form."""

    turns: dict[str, Any]
    objects: Any = None
    agrees: Any = None

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, body: dict[str, Any], k: int) -> str:
        text = words_of(body)
        if text.startswith("This picture is about to be edited"):
            self.asked.append("objects")
            said = self.objects
            return said if isinstance(said, str) else json.dumps({"objects": said or OBJECTS})
        if "Now this is asked:\n" not in text:
            return "hi"
        told = text.split("Now this is asked:\n")[1].split("\n")[0]
        if "Somebody wrote that last request down" in text:
            self.asked.append(f"check {told}")
            return (self.agrees or {}).get(told, "yes")
        self.asked.append(told)
        said = self.turns[told]
        if isinstance(said, list):
            again = "You have answered this before" in text
            return said[1 if again else 0]
        return said


@dataclass
class Finder:
    """A detector that finds what it is told. broken: names at which it fails."""

    names: frozenset[str] = frozenset({"red cup", "dog", "sky", "blue cup"})
    broken: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    def find(self, image, names, *, threshold=0.3):
        self.asked += names
        for name in names:
            if name in self.broken:
                raise DetectorError("detector: it fell over")
        box = Found(Box(0.1, 0.2, 0.4, 0.5), 0.9)
        return [[box] if name in self.names else [] for name in names]


@pytest.fixture
def served(beside):
    """Starts judges; an answer is read as text, so that a script says yes and no."""
    module, running = beside("judge_server"), []

    def start(script, **more):
        server = module.JudgeServer(says=script, honours={"n", "images"}, **more)
        server.module = module
        server.__enter__()
        running.append(server)
        return server

    yield start
    for server in running:
        server.__exit__(None, None, None)


def tools(server, finder: Finder | None = None, record: Record | None = None, **more):
    options = Options(url=server.url, model="judge", detector=None, calls=Calls(4, 5.0, 0), **more)
    eyes = None if finder is None else Eyes(Looking(detector=None, features=None), detector=finder)
    return Judge(options, record), Looker(options, record, eyes=eyes)


def session(*turns: str | Turn, name: str = "a", **more) -> Session:
    told = tuple(Turn(one) if isinstance(one, str) else one for one in turns)
    return Session(name, IMAGE, told, **more)


# ------------------------------------------------------------------------------ what is added


def test_every_field_and_where_it_is_from(served):
    told = ("please paint the cup blue", "put it away", "a beach behind, keep the dog unchanged")
    script = Script(
        {
            told[0]: RECOLOUR,
            told[1]: says("subject_remove", "Remove [blue cup]"),
            told[2]: says("background_change", "Change the background to [beach]"),
        }
    )
    report = annotate([session(*told, mode="cu")], *tools(served(script), Finder()))
    assert report.problems == [] and report.not_found == [] and report.whole == 1
    [one] = report.sessions
    assert [turn.instruction for turn in one.turns] == list(told)
    assert [turn.task for turn in one.turns] == [
        "color_alter",
        "subject_remove",
        "background_change",
    ]
    assert [turn.meta["formatted_instruction"] for turn in one.turns] == [
        "Change the color of [red cup] to [blue]",
        "Remove [blue cup]",
        "Change the background to [beach]",
    ]
    lists = [[turn.meta[name] for name in LISTS] for turn in one.turns]
    assert lists == [
        [["dog", "sky"], ["blue cup", "dog", "sky"], ["red cup", "dog", "sky", "blue cup"]],
        [["dog", "sky"], ["dog", "sky"], ["red cup", "dog", "sky", "blue cup"]],
        [["dog"], ["dog"], ["red cup", "dog", "sky", "blue cup"]],
    ]
    assert [turn.meta["bg_consistency"] for turn in one.turns] == [True, True, False]
    for turn in one.turns:
        assert turn.meta["annotated"] == {
            "task": "vlm judge",
            "formatted_instruction": "vlm judge",
            **dict.fromkeys(LISTS, "derived: vlm judge, detector Finder"),
            "bg_consistency": "derived: task",
        }
    from editr2.rewards.edit_r2 import EditR2, EditR2Options

    reward = EditR2(EditR2Options(url="http://127.0.0.1:1/v1"))
    assert reward.lacks(one) is None and "no task" in reward.lacks(session(*told))


BAD = {
    "unread": "I would say that it is about a cup.",
    "unread task": says("paint", "Change the color of [red cup] to [blue]"),
    "unread form": json.dumps({"task": "color_alter"}),
    "other": says("other", ""),
    "form": says("color_alter", "Do to [red cup] what was said: [blue]"),
    "mismatch": says("color_alter", "Remove [red cup]"),
    "pronoun": says("color_alter", "Change the color of [it] to [blue]"),
    "letters": says("text_change", "Replace the text '[STOP]' on [dog] with '[HALT]'"),
    "several": says("subject_remove", "Remove [cup]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_judge_says_wrongly_is_no_field(case, served):
    cups = [*OBJECTS, {"name": "white cup"}]
    script = Script({"do it": BAD[case]}, objects=cups)
    finder = Finder(Finder.names | {"white cup"})
    report = annotate([session("do it")], *tools(served(script), finder))
    [problem] = [named.problem for named in report.problems]
    assert (problem.kind, problem.turn) == (case.split()[0], 1)
    [turn] = report.sessions[0].turns
    assert turn.task is None and set(turn.meta) == {"annotated"}
    assert all(why == f"lacking: {problem}" for why in turn.meta["annotated"].values())
    assert script.asked.count("do it") == (1 if case == "other" else 2)
    assert "check do it" not in script.asked


@pytest.mark.parametrize("case", [case for case in BAD if case != "other"])
def test_it_is_told_what_is_wrong_and_asked_once_more(case, served):
    cups = [*OBJECTS, {"name": "white cup"}]
    script = Script({"do it": [BAD[case], RECOLOUR]}, objects=cups)
    server = served(script)
    report = annotate([session("do it")], *tools(server, Finder(Finder.names | {"white cup"})))
    assert report.whole == 1 and not report.problems
    again = [words_of(chat.body) for chat in server.chats]
    assert sum("What is wrong with it: " in text for text in again) == 1


def test_a_second_look_that_disagrees(served):
    script = Script({"do it": RECOLOUR}, agrees={"do it": "no"})
    report = annotate([session("do it")], *tools(served(script), Finder()))
    assert [one.problem.kind for one in report.problems] == ["refused"]
    assert report.sessions[0].turns[0].task is None


@pytest.mark.parametrize("yes, kinds", [(0.6, []), (0.4, ["refused"])])
def test_a_second_look_by_probabilities(yes, kinds, served):
    server = served(Script({"do it": RECOLOUR}), top=[{"yes": yes, "no": 1 - yes}])
    server.honours.add("logprobs")
    report = annotate([session("do it")], *tools(server, Finder()))
    assert [one.problem.kind for one in report.problems] == kinds
    assert any(chat.body.get("top_logprobs") for chat in server.chats)


def test_a_refused_form_leaves_no_thing_behind(served):
    """What only a form named that was not kept is no thing of the source."""
    script = Script({"do it": [says("subject_remove", "Remove [hat]"), RECOLOUR]})
    script.agrees = {}
    server = served(script)
    answers = iter(["no", "yes"])
    real = script.__call__

    def judge(body, k):
        text = words_of(body)
        return next(answers) if "Somebody wrote" in text else real(body, k)

    server.says = judge
    report = annotate([session("do it")], *tools(server, Finder(Finder.names | {"hat"})))
    assert report.whole == 1
    assert "hat" not in report.sessions[0].turns[0].meta["all_objects"]


def test_what_is_gone_cannot_be_edited(served):
    script = Script(
        {
            "away with the cup": says("subject_remove", "Remove [red cup]"),
            "paint it blue": RECOLOUR,
            "away with the dog": says("subject_remove", "Remove [dog]"),
        }
    )
    report = annotate([session(*script.turns)], *tools(served(script), Finder()))
    first, second, third = report.sessions[0].turns
    assert not lacking(first) and second.task is None
    assert [one.problem.kind for one in report.problems] == ["gone", "before"]
    # What the third asks is known, what is there by then is not.
    assert third.task == "subject_remove" and not set(LISTS) & set(third.meta)
    assert (
        "bg_consistency" not in third.meta and "earlier" in third.meta["annotated"]["all_objects"]
    )


def test_things_that_the_detector_does_not_find_are_said(served):
    script = Script(
        {"hat off": says("subject_remove", "Remove [hat]"), "a cup": RECOLOUR},
    )
    finder = Finder(frozenset({"red cup", "dog"}))
    report = annotate([session("hat off", "a cup")], *tools(served(script), finder))
    assert report.whole == 1 and report.not_found == [("a", 0, "sky"), ("a", 1, "hat")]
    one = report.sessions[0]
    assert one.meta["not_found"] == ["sky"] and one.turns[0].meta["not_found"] == ["hat"]
    meta = one.turns[0].meta
    assert meta["available_objects"] == ["red cup", "dog"] == meta["unchanged_objects"]
    assert meta["all_objects"] == ["red cup", "dog", "sky", "hat"]


def test_a_detector_that_fails_has_not_found_that_a_thing_is_missing(served):
    for broken in ("dog", "hat"):
        script = Script({"hat off": says("subject_remove", "Remove [hat]")})
        finder = Finder(broken=frozenset({broken}))
        report = annotate([session("hat off")], *tools(served(script), finder))
        assert [one.problem.kind for one in report.problems] == ["detector"]
        assert not set(LISTS) & set(report.sessions[0].turns[0].meta)
        assert broken not in [name for _, _, name in report.not_found]


def test_a_new_background_is_known_where_lists_are_not(served):
    script = Script(
        {
            "all in oil": says("other", ""),
            "a beach": says("background_change", "Change the background to [beach]"),
            "a cup": says("subject_add", "Add [white cup]"),
        }
    )
    report = annotate([session(*script.turns)], *tools(served(script), Finder()))
    flags = [turn.meta.get("bg_consistency") for turn in report.sessions[0].turns]
    assert flags == [None, False, False]
    assert [one.problem.kind for one in report.problems] == ["other", "before", "before"]
    assert not any(set(LISTS) & set(turn.meta) for turn in report.sessions[0].turns)


def test_what_was_found_is_on_the_record(served, tmp_path):
    server = served(Script({"do it": RECOLOUR}))
    first, second = Finder(), Finder()
    for finder in (first, second):
        record = Record(tmp_path)
        annotate([session("do it")], *tools(server, finder, record))
        record.close()
    assert first.asked == ["red cup", "dog", "sky"] and second.asked == []


def test_without_a_detector_nothing_is_looked_for(served):
    script = Script({"hat off": says("subject_remove", "Remove [hat]")})
    report = annotate([session("hat off")], *tools(served(script)))
    [turn] = report.sessions[0].turns
    assert turn.meta["annotated"]["all_objects"] == "derived: vlm judge, not looked for"
    assert turn.meta["all_objects"] == ["red cup", "dog", "sky", "hat"]


def test_failures_of_the_server_are_failures(served):
    script = Script({"do it": RECOLOUR})
    server = served(script)
    judge, looker = tools(server, Finder())
    judge.client.probe(images=1)
    server.script(*[server.module.Reply({"error": "no"}, 400)] * 2)
    report = annotate([session("do it")], judge, looker)
    assert [one.problem.kind for one in report.problems] == ["no answer", "no answer"]
    assert all("400" in one.problem.why for one in report.problems)
    server.finish = "length"
    report = annotate([session("do it")], *tools(server, Finder()))
    assert {one.problem.kind for one in report.problems} == {"unread"}


def test_what_the_user_gave_stays(served):
    """And is what the judge is held to."""
    kept = {"unchanged_objects": ["whatever"], "mine": 7}
    turns = [
        Turn("do it", task="color_alter", meta=kept),
        Turn("x", meta={"formatted_instruction": "Remove [dog]"}),
        Turn("y", task="recolour"),
    ]
    script = Script({"do it": RECOLOUR})
    report = annotate([session(*turns)], *tools(served(script), Finder()))
    first, second, third = report.sessions[0].turns
    assert first.meta["unchanged_objects"] == ["whatever"] and first.meta["mine"] == 7
    assert (
        first.meta["annotated"]["unchanged_objects"] == "given" == first.meta["annotated"]["task"]
    )
    assert not lacking(first)
    assert second.task == "subject_remove" and second.meta["available_objects"] == [
        "blue cup",
        "sky",
    ]
    assert second.meta["annotated"]["task"] == "derived: formatted_instruction"
    assert third.task == "recolour" and lacking(third)
    assert [one.problem.kind for one in report.problems] == ["given"] and "x" not in script.asked

    other = Script({"do it": says("subject_remove", "Remove [dog]")})
    report = annotate([session(turns[0])], *tools(served(other), Finder()))
    assert [one.problem.kind for one in report.problems] == ["mismatch"]


def test_whole_sessions_ask_nothing(served):
    script = Script({"do it": RECOLOUR})
    server, finder = served(script), Finder()
    report = annotate([session("do it")], *tools(server, finder))
    before = len(server.requests), len(finder.asked)
    again = annotate(report.sessions, *tools(server, finder))
    assert (len(server.requests), len(finder.asked)) == before
    assert again.sessions[0].turns == report.sessions[0].turns
    assert again.sessions[0].meta == report.sessions[0].meta


def test_wrong_source_objects_are_an_error_of_the_session():
    for wrong in ("cup", ["it"], [{"name": "cup"}], ["cup", "cups"], [3]):
        with pytest.raises(DataError, match=r"session 'a': meta\.source_objects: .*accepted"):
            annotate([session("x", meta={"source_objects": wrong})], None, None)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three sessions, and a detector by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scripted_finder.py").write_text(
        "from editr2.rewards.geometry import Box, Found\n\n\n"
        "class Finder:\n"
        "    def find(self, image, names, *, threshold=0.3):\n"
        "        return [[Found(Box(0.1, 0.2, 0.4, 0.5), 0.9)] for _ in names]\n"
    )
    sessions = [
        Session(f"s{k}", np.full((16, 16, 3), 40 * k, np.uint8), (Turn("do it"), Turn("away")))
        for k in range(3)
    ]
    save_sessions(sessions, tmp_path / "set")
    yield tmp_path
    sys.modules.pop("scripted_finder", None)


SCRIPT = {"do it": RECOLOUR, "away": says("subject_remove", "Remove [blue cup]")}


def arguments(server, *more: str, source: str = "set", out: str = "out") -> list[str]:
    words = ["data", "annotate", source, "--out", out, "--url", server.url, "--model", "judge"]
    return [*words, "--detector", "scripted_finder:Finder", "--retries", "0", *more]


def test_the_command_and_its_second_run(folder, served, capsys):
    server = served(Script(SCRIPT))
    assert main(arguments(server, "--page")) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "sessions: out/sessions.jsonl",
        "page: out/annotations.html",
        "3 of 3 sessions have every field",
    ]
    files = {
        name: (folder / "out" / name).read_bytes()
        for name in ("sessions.jsonl", "annotations.html")
    }
    asked = len(server.requests)
    assert main(arguments(server, "--concurrency", "1", "--page")) == 0
    assert len(server.requests) == asked
    assert files == {name: (folder / "out" / name).read_bytes() for name in files}
    capsys.readouterr()
    assert main(["data", "validate", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("3 of 3 sessions have what edit-r2")


def test_a_killed_run_goes_on(folder, served):
    script = Script(SCRIPT)
    server = served(script, after=0.1)
    assert main(arguments(server, out="whole")) == 0
    in_all = len(script.asked)
    script.asked.clear()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-m", "editr2", *arguments(server, "--concurrency", "1")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    record = folder / "out" / "judges.jsonl"

    def answers() -> int:
        lines = record.read_text().splitlines() if record.exists() else []
        return sum('"detector: ' not in line for line in lines)

    deadline = time.monotonic() + 60
    while answers() < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = answers()
    assert 4 <= known < in_all and not (folder / "out" / "sessions.jsonl").exists()
    script.asked.clear()
    time.sleep(0.2)  # what was under way when it was killed
    script.asked.clear()
    assert main(arguments(server)) == 0
    assert len(script.asked) == in_all - known
    files = [folder / name / "sessions.jsonl" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "words, said",
    [
        (["data", "annotate", "set", "--out", "out"], "--url: none (accepted: "),
        (
            ["data", "annotate", "set", "--out", "set", "--url", "http://127.0.0.1:9/v1"],
            "--out: set is the source",
        ),
        (
            ["data", "annotate", "nowhere", "--out", "out", "--url", "http://127.0.0.1:9/v1"],
            "nowhere: no such file",
        ),
        (
            [
                "data",
                "annotate",
                "set",
                "--out",
                "out",
                "--url",
                "http://127.0.0.1:9/v1",
                "--retries",
                "0",
            ],
            "judge: nothing answers",
        ),
        (["data", "annotate", "set", "--out", "out", "--url", "http://u:secret@h/v1"], "url: "),
        (
            [
                "data",
                "annotate",
                "set",
                "--out",
                "out",
                "--url",
                "http://h/v1",
                "--detector",
                "no such",
            ],
            "detector: ",
        ),
        (
            ["data", "annotate", "set", "--out", "out", "--url", "http://h/v1", "--prompts", "set"],
            "prompts: ",
        ),
        (
            ["data", "make", "set", "--out", "out", "--count", "1", "--url", "http://h/v1"],
            "set: no images",
        ),
        (
            ["data", "make", "none", "--out", "out", "--count", "1", "--url", "http://h/v1"],
            "none: No such file",
        ),
        (["data", "make", "set", "--out", "out", "--count", "1"], "--url: none"),
        (
            ["data", "make", "set", "--out", "out", "--count", "1", "--turns", "1"],
            "--turns: 1 (accepted",
        ),
        (
            [
                "data",
                "make",
                "set",
                "--out",
                "o",
                "--count",
                "1",
                "--url",
                "http://h/v1",
                "--detector",
                "none",
            ],
            "--detector: none",
        ),
    ],
)
def test_bad_input_is_one_line(words, said, folder, capsys):
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and "secret" not in told.err
    assert told.err.startswith(f"error: {said}"), told.err


def test_with_a_tiny_grounding_dino(folder, beside, served, capsys):
    """Whatever it finds by its random numbers, the parts fit."""
    beside("tiny_lookers").grounding_dino(folder / "dino")
    server = served(Script(SCRIPT))
    words = arguments(server, "--threshold", "0")
    words[words.index("--detector") + 1] = "dino"
    assert main(words) == 0
    assert "3 of 3 sessions" in capsys.readouterr().out
    [first, *_] = load_sessions("out")
    assert first.turns[0].meta["annotated"]["all_objects"] == "derived: vlm judge, detector dino"


# -------------------------------------------------------------------------------- corrections


@pytest.fixture
def annotated(served) -> list[Session]:
    script = Script(SCRIPT)
    sessions = [session("do it", "away", name=name) for name in ("a", "b")]
    return annotate(sessions, *tools(served(script), Finder())).sessions


def correct(sessions: list[Session], path: Path, *rows: dict[str, Any] | str) -> list[Session]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return corrected(sessions, path)


def test_a_corrected_form_moves_what_follows(annotated, tmp_path):
    row = {
        "session": "b",
        "turn": 1,
        "instruction": "do it",
        "formatted_instruction": "Change the color of [dog] to [green]",
    }
    more = {"session": "b", "turn": 2, "formatted_instruction": "Remove [green dog]"}
    report = annotate(correct(annotated, tmp_path / "c.jsonl", row, more), None, None)
    a, b = report.sessions
    assert a.turns == annotated[0].turns and report.whole == 2
    assert b.turns[0].meta["available_objects"] == ["red cup", "green dog", "sky"]
    assert b.turns[1].meta["available_objects"] == ["red cup", "sky"]
    origins = b.turns[0].meta["annotated"]
    assert origins["formatted_instruction"] == "corrected by hand"
    assert origins["task"] == "vlm judge" and origins["all_objects"].startswith("derived: ")
    assert [turn.instruction for turn in b.turns] == ["do it", "away"]
    # Without the second line, the next turn speaks of what there never was.
    report = annotate(correct(annotated, tmp_path / "c.jsonl", row), None, None)
    assert [str(one.problem) for one in report.problems] == [
        "names what is not among the things that are known: 'blue cup'"
    ]
    assert not set(LISTS) & set(report.sessions[1].turns[1].meta)


def test_corrected_objects_and_lists(annotated, tmp_path):
    rows: list[dict[str, Any]] = [
        {"session": "a", "source_objects": ["red cup", "hat"]},
        {"session": "a", "turn": 2, "all_objects": ["hat"], "bg_consistency": False},
    ]
    report = annotate(correct(annotated, tmp_path / "c.jsonl", *rows), None, None)
    first, second = report.sessions[0].turns
    assert first.meta["available_objects"] == ["blue cup", "hat"]
    assert first.meta["annotated"]["all_objects"] == "derived: corrected by hand"
    assert second.meta["all_objects"] == ["hat"] and second.meta["bg_consistency"] is False
    assert second.meta["annotated"]["all_objects"] == "corrected by hand"
    again = annotate(report.sessions, None, None).sessions[0]
    assert again.turns == report.sessions[0].turns


@pytest.mark.parametrize(
    "row, said",
    [
        ("{", "1: column"),
        (
            {"session": "c", "turn": 1, "task": "color_alter"},
            "1: session: the string 'c' (accepted: the id",
        ),
        ({"turn": 1}, "1: session: null"),
        (
            {"session": "a", "turn": 3, "task": "color_alter"},
            "1: turn: the number 3 (accepted: 1 to 2)",
        ),
        ({"session": "a", "turn": True, "task": "color_alter"}, "1: turn: true"),
        ({"session": "a", "turn": 1, "intent": "x"}, "1: intent: no field of a turn (accepted: "),
        ({"session": "a", "task": "color_alter"}, "1: task: no field of a session (accepted: "),
        ({"session": "a"}, "1: turn: missing"),
        (
            {"session": "a", "turn": 1, "instruction": "do that"},
            "1: instruction: the string 'do that' (accepted: that of turn 1",
        ),
        (
            {"session": "a", "turn": 1, "task": "paint"},
            "1: task: the string 'paint' (accepted: subject_add",
        ),
        ({"session": "a", "turn": 1, "task": "subject_remove"}, "1: task: turn 1 of session 'a': "),
        (
            {"session": "a", "turn": 1, "formatted_instruction": "Paint it"},
            "1: formatted_instruction: turn 1 of",
        ),
        (
            {"session": "a", "turn": 1, "all_objects": "cup"},
            "1: all_objects: the string 'cup' (accepted: a list",
        ),
        (
            {"session": "a", "turn": 1, "all_objects": [""]},
            "1: all_objects: a list of 1 (accepted: a list",
        ),
        (
            {"session": "a", "turn": 1, "bg_consistency": "yes"},
            "1: bg_consistency: the string 'yes' (accepted: true",
        ),
        ({"session": "a", "source_objects": ["it"]}, "1: source_objects: a list of 1 (accepted: "),
    ],
)
def test_corrections_that_are_refused(row, said, annotated, tmp_path):
    with pytest.raises(DataError) as caught:
        correct(annotated, tmp_path / "c.jsonl", row)
    assert str(caught.value).startswith(f"{tmp_path / 'c.jsonl'}:{said}"), caught.value


def test_a_form_without_a_task_parses_or_is_refused(tmp_path):
    """Its task follows; one that fits none is not taken for a turn that lacks its edit."""
    bare = Session("a", np.zeros((8, 8, 3), np.uint8), (Turn("make the cup red"),))
    file = tmp_path / "c.jsonl"

    def line(form):
        file.write_text(json.dumps({"session": "a", "turn": 1, "formatted_instruction": form}))
        return corrected([bare], file)

    with pytest.raises(DataError, match=r"c\.jsonl:1: formatted_instruction: turn 1 of .*template"):
        line("paint it white")
    [session] = line("Change the color of [cup] to [red]")
    assert session.turns[0].meta["formatted_instruction"] == "Change the color of [cup] to [red]"


def test_corrections_by_the_command(folder, served, capsys):
    assert main(arguments(served(Script(SCRIPT)))) == 0
    (folder / "c.jsonl").write_text(
        json.dumps({"session": "s1", "source_objects": ["red cup", "hat"]}) + "\n"
    )
    words = ["data", "annotate", "out", "--out", "final", "--corrections", "c.jsonl"]
    assert main(words) == 0
    assert "3 of 3 sessions" in capsys.readouterr().out
    assert load_sessions("final")[1].turns[0].meta["available_objects"] == ["blue cup", "hat"]
    assert not (folder / "final" / "judges.jsonl").exists()


def test_the_page_shows_strange_names_as_they_are(tmp_path):
    evil = '</textarea></script><img src=x onerror="alert(1)">&amp;\'"'
    turn = Turn(evil, task=evil, meta={"formatted_instruction": evil, "all_objects": [evil]})
    strange = session(turn, name=evil, meta={"source_objects": ["cup"]})
    text = write_page([strange], tmp_path).read_text()
    assert "<img src=x" not in text and text.count("</script>") == 1
    assert text.count("<textarea") == text.count("</textarea>") == 5
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: chromium")
def test_the_page_writes_corrections(annotated, tmp_path):
    """In a browser: what was typed is what comes out, and is taken."""
    page = write_page(annotated, tmp_path)
    typed = """<script>
    const set = (at, value) => {
      const control = document.querySelector(at);
      control.value = value;
      control.dispatchEvent(new Event("input", {bubbles: true}));
    };
    set("[data-ground=front]", "red cup\\n dog \\nhat");
    const field = (turn, name) => `article[data-turn="${turn}"] [data-field=${name}]`;
    set(field(1, "formatted_instruction"), "Change the color of [dog] to [green]");
    set(field(1, "bg_consistency"), "false");
    set(field(2, "formatted_instruction"), "Remove [green dog]");
    set(field(2, "all_objects"), "a <b>\\nc");
    document.body.innerHTML = "<pre>" + btoa(update()) + "</pre>";
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", typed))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(page)]
    said = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    text = base64.b64decode(said.split("<pre>")[1].split("</pre>")[0]).decode()
    (tmp_path / "corrections.jsonl").write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [set(row) - {"session", "instruction"} for row in rows] == [
        {"source_objects"},
        {"turn", "formatted_instruction", "bg_consistency"},
        {"turn", "formatted_instruction", "all_objects"},
    ]
    report = annotate(corrected(annotated, tmp_path / "corrections.jsonl"), None, None)
    first, second = report.sessions[0].turns
    assert first.meta["available_objects"] == ["red cup", "green dog", "hat", "sky"]
    assert first.meta["bg_consistency"] is False and second.meta["all_objects"] == ["a <b>", "c"]
    assert report.sessions[1].turns == annotated[1].turns


# -------------------------------------------------------------------------------------- rules


FULL = Edit("", "cup", "hat", "dog", "left", 3, "blue", "wood", "a beach", "HELLO", "STOP")


@pytest.mark.parametrize("task", TASKS)
def test_every_form_reads_back(task):
    for form in FORMS[task]:
        used = {n: v for n, v in vars(FULL).items() if f"{{{n}}}" in form}
        edit = Edit(task, **used)
        assert formatted(edit) == form.format(**used)
        assert parse_edit(formatted(edit), task) == (edit, "")


@pytest.mark.parametrize(
    "name, value, after",
    [
        ("red cup", "blue", "blue cup"),
        ("cup", "blue", "blue cup"),
        ("big dark red cup", "blue", "big blue cup"),
        ("orange", "blue", "blue orange"),  # the fruit
        ("paper red sign", "blue", "paper blue sign"),
        ("brick reddish-brown chimney", "white", "brick white chimney"),
    ],
)
def test_names_after_a_change_of_colour(name, value, after):
    from editr2.annotate.objects import COLOURS

    assert renamed(name, value, COLOURS) == after


NAMES = ("red cup", "dog", "tree", "house", "hat")
EDITS = st.lists(
    st.builds(
        lambda task, a, b, new: Edit(
            task,
            object=None if task in ("subject_add", "background_change") else NAMES[a],
            new=f"new {new}" if task in ("subject_add", "subject_replace") else None,
            reference=NAMES[b] if task == "position_change" else None,
            colour="blue" if task == "color_alter" else None,
            material="wood" if task == "material_alter" else None,
            text="T" if task == "text_change" else None,
        ),
        st.sampled_from(TASKS),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from(["kite", "drum", "owl"]),
    ),
    max_size=6,
)


@given(EDITS, st.lists(st.booleans(), min_size=5, max_size=5))
def test_lists_follow_from_edits(edits, foreground):
    """unchanged is part of available, available of all; nothing that was named is unchanged; the
    flag falls once."""
    now = Things(Thing(n, foreground=f) for n, f in zip(NAMES, foreground))
    named: set[str] = set()
    kept, before = True, set(NAMES)
    for edit in edits:
        now.apply(edit)
        named |= {name for name in (edit.object, edit.reference) if name}
        kept = kept and edit.task != "background_change"
        fields = now.fields()
        unchanged, there, ever = (set(fields[name]) for name in LISTS)
        assert unchanged <= there <= ever and before <= ever
        assert not unchanged & named and unchanged <= set(NAMES)
        assert fields["bg_consistency"] is kept
        if edit.task == "subject_remove":
            assert edit.object not in there
        if edit.task == "background_change":
            assert not there & {n for n, f in zip(NAMES, foreground) if not f}
        before = ever


def test_how_many_can_be_judged():
    tally = Tally()
    tally.add(session("x"))
    meta = {
        "formatted_instruction": "Remove [dog]",
        **{name: [] for name in LISTS},
        "bg_consistency": True,
    }
    tally.add(session(Turn("x", task="subject_remove", meta=meta)))
    tally.add(session(Turn("x", task="color_alter", meta=meta)))
    tally.add(session(Turn("x", task="subject_remove", meta={**meta, "all_objects": "dog"})))
    assert (tally.sessions, tally.whole) == (4, 1)
    lacks = dict.fromkeys(FIELDS, 1) | {
        "all_objects": 2,
        "formatted_instruction that can be read": 1,
    }
    assert tally.lacks == lacks and "1 of 4 sessions" in str(tally)


def test_the_lists_against_released_ones(tmp_path):
    """The script that compares them: here with a session of its form, right and wrong."""
    rows = []
    for there in (["green hat", "pony"], ["hat", "pony"]):
        rows.append(
            {
                "instruction": ["Change the color of hat to green", "Remove it"],
                "task_type": ["color_alter", "subject_remove"],
                "formatted_instruction": [
                    "Change the color of [hat] to [green]",
                    "Remove [green hat]",
                ],
                "unchanged_objects": [["pony"], ["pony"]],
                "available_objects": [there, ["pony"]],
                "all_objects": [["hat", "pony", "green hat"]] * 2,
                "bg_consistency": [True, True],
            }
        )
    for name in ("cm/test", "cm/train", "cu/test"):
        file = tmp_path / "dataset" / f"{name}_metadata.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    script = Path(__file__).parent.parent / "scripts" / "check_objects.py"
    command = [sys.executable, str(script), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert told.splitlines() == [
        "sessions, all: 6",
        "sessions, not parsed: 0",
        "sessions, unclear: 0",
        "unchanged_objects: 12 of 12 turns (100.0%)",
        "available_objects: 9 of 12 turns (75.0%)",
        "all_objects: 6 of 12 turns (50.0%)",
        "bg_consistency: 12 of 12 turns (100.0%)",
    ]
