"""`editr2 eval`: what it writes, tells and refuses; and the lines that a run begins with."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from editr2 import scoring
from editr2.cli import rollout
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.policies.load import load_policy
from editr2.policies.unified.policy import EMBEDDED
from editr2.rewards.base import Score
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.told import opening
from editr2.run.identity import loaded_weights
from editr2.run.lock import RunLock
from editr2.run.tracking import read_metrics

FEW = ["--eval.sessions=3", "--eval.turns=2", "--rollout.steps=2", "--rollout.window=1"]
FEW += ["--policy.intent=false", "--eval.strips=1"]


class Judge:
    """Says why, has nothing to say of one turn, and fails at another."""

    names = ("kept",)
    calls = 0

    def __call__(self, session, images):
        Judge.calls += 1
        said = [{"kept": Score(0.5, "half of it")} for _ in images]
        if session.id.endswith("-1-cu"):
            said[0] = {"kept": Score.not_applicable()}
        if session.id.endswith("-2-cm"):
            said[1] = {"kept": Score(None, "no answer")}
        return said


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "out"
    how = [f"--reward.function={__name__}:Judge", "--credit.weights={'kept': 1.0}"]
    how += ["--credit.preset=flow-grpo", "--train.max_failed_scores=1", f"--out={folder}"]
    how += ["--eval.reward=[{name: brightness}]"]
    return folder, [*FEW, *how]


def test_every_turn_has_a_line_and_a_second_start_asks_no_judge_again(scored, capsys, monkeypatch):
    folder, words = scored
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["eval", *words]) == 0
    told = capsys.readouterr()
    assert told.err.startswith(
        "eval: 3 sessions, the shapes world's held-out ones; 2 steps of cps (1 with noise); "
        f"judged by {__name__}:Judge (kept 1); into {folder}\n"
    )
    assert told.err.endswith("waiting for their scores\n")
    assert told.out.endswith(f"scores: {folder}/scores.jsonl\nreport: {folder}/report.html\n")
    assert max(map(len, told.out.splitlines()[:4])) <= 80
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    by_turn = {(line["id"][-4:], line["turn"]): line for line in lines}
    assert len(by_turn) == len(lines) == 6
    assert all(set(line["eval.scores"]) == {"brightness"} for line in lines)
    whole = by_turn["0-cm", 1]
    assert whole["scores"] == {"kept": 0.5} and whole["why"] == {"kept": "half of it"}
    assert (
        (whole["mode"], whole["reward"]) == ("cm", 0.5) and whole["task"] and whole["instruction"]
    )
    assert by_turn["1-cu", 1]["does_not_apply"] == ["kept"]
    failed = by_turn["2-cm", 2]
    assert failed["scores"] == {"kept": None} and "no answer" in failed["reason"]
    assert "reward" not in failed
    start, row = read_metrics(folder / "metrics.jsonl")[0]
    assert start["command"] == "eval" and row["failed_scores"] == 1
    page = (folder / "report.html").read_text()
    assert "half of it" in page and "no answer" in page
    asked = Judge.calls
    assert main(["eval", *words]) == 0  # replaces what is there
    assert Judge.calls <= asked + 2, "but for whether it is there, and what failed"
    before = (folder / "scores.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["eval", *words, "--rollout.steps=3"]) == 2
    assert capsys.readouterr().err == (
        f"error: --out: {folder}: scores of other settings, rollout.steps 2 there and 3 now "
        f"(accepted: another folder, or without that one)\n"
    )
    assert (folder / "scores.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "file, owner",
    [
        ("checkpoints/x", "a run"),
        ("metrics.jsonl", "a run"),
        ("benchmark.json", "a benchmark of an editor"),
        ("comparisons.jsonl", "a benchmark of a reward"),
    ],
)
def test_the_folder_of_something_else_is_left_alone(file, owner, tmp_path, capsys):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"event": "start"}\n')
    assert main(["eval", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --out: {tmp_path}: the folder of {owner} (accepted: another)\n"
    )


def test_a_file_of_settings_names_a_trainings_folder_not_ours(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("out: runs/training\n")
    seen = {}

    def score(config, out, notes):
        seen.update(out=out)
        return Path("runs/eval"), None

    monkeypatch.setattr(scoring, "score", score)
    assert main(["eval", "--config", str(tmp_path / "run.yaml")]) == 0
    assert seen == {"out": None}


@pytest.mark.parametrize("command, file", [("eval", "scores.jsonl"), ("rollout", "outputs.jsonl")])
def test_nobody_who_names_no_folder_loses_what_is_there(
    command, file, tmp_path, monkeypatch, capsys
):
    """One editor after another is what people do; the first one's outcome stays."""
    monkeypatch.chdir(tmp_path)
    Path("runs", command).mkdir(parents=True)
    Path("runs", command, "metrics.jsonl").write_text('{"event": "start"}\n')  # a run's
    small = ["--rollout.turns=2", "--rollout.steps=2", "--rollout.window=1", "--eval.sessions=2"]
    written = []
    for extra in ((), ("--seed=1",), ()):
        assert main([command, *small, *extra]) == 0
        written.append(re.search(rf"runs/{command}[-\d]*/{file}", capsys.readouterr().out)[0])
    first, second = (f"runs/{command}-{n}/{file}" for n in (2, 3))
    again = first if command == "eval" else f"runs/{command}-4/{file}"  # the same settings
    assert written == [first, second, again]
    assert Path(first).is_file() and Path(second).is_file()


def test_weights_that_changed_since_are_another_editor(tmp_path, monkeypatch, capsys):
    """A run that went on has the path that it had; what was scored before stays."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, "editor")
    small = ["eval", "--policy.weights=editor", *FEW, "--eval.sessions=1"]
    assert main(small) == main(small) == 0
    assert capsys.readouterr().out.count("runs/eval/scores.jsonl") == 2
    file = Path("editor/model.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] * 1.01}, file)
    before = Path("runs/eval/scores.jsonl").read_bytes()
    assert main(small) == 0
    assert "runs/eval-2/scores.jsonl" in capsys.readouterr().out
    assert main([*small, "--out=runs/eval"]) == 2
    assert "runs/eval: scores of editor as it was then, with other" in capsys.readouterr().err
    assert Path("runs/eval/scores.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("there", "differs"),
    [
        ({"weights": "b"}, True),
        ({"weights": "a"}, False),
        ({"weights": "a over o/m@1"}, True),
        ({}, False),
        ({"weights": None}, True),
        (None, False),
        ("text", False),
        ([], False),
    ],
)
@pytest.mark.parametrize("depends", [True, False])
def test_what_a_damaged_record_says_of_weights(tmp_path, monkeypatch, there, differs, depends):
    """Never a traceback: every evaluation without --out looks at what is there."""
    monkeypatch.setattr(scoring, "loaded_weights", lambda policy: {"weights": "a"})
    identity = {"depends": there} if depends else there
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "start", "identity": identity}))
    assert scoring._other_weights(tmp_path, Config()) is (differs and depends)


@pytest.mark.parametrize(
    ("there", "here", "differ"),
    [
        ("A over o/m@abc", "A over o/m@abc", False),
        ("A over o/m@abc", "B over o/m@unknown revision", True),
        ("A over o/m@abc", "A over o/m@unknown revision", False),
        ("o/m@unknown revision", "o/m@abc", False),
        ("A", "A over o/m@abc", True),
    ],
)
def test_weights_differ_as_far_as_is_known(there, here, differ):
    assert scoring._differ(there, here) is differ


def test_weights_that_are_gone_are_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, "editor")
    small = ["eval", f"--policy.weights={tmp_path / 'editor'}", *FEW, "--eval.sessions=1"]
    assert main(small) == 0
    Path("editor").rename("gone")
    assert main(small) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'editor'}: no config.json" in err and "Traceback" not in err


def test_weights_are_said_as_they_were_loaded(tmp_path, monkeypatch):
    """A run may go on while its policy is evaluated."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, "editor")

    def evaluate(*words, **how):
        with Path("editor/model.safetensors").open("ab") as file:
            file.write(b"more")
        return evaluated(*words, **how)

    evaluated = scoring.evaluate
    then = loaded_weights(PolicyConfig(weights="editor"))
    monkeypatch.setattr(scoring, "evaluate", evaluate)
    assert main(["eval", "--policy.weights=editor", *FEW, "--eval.sessions=1"]) == 0
    start = read_metrics("runs/eval/metrics.jsonl")[0][0]
    assert start["identity"]["depends"]["weights"] == then["weights"]
    assert loaded_weights(PolicyConfig(weights="editor")) != then


def test_two_that_name_no_folder_at_once(tmp_path, monkeypatch, capsys):
    """The second one takes the next folder; where both began before there was one, its scores are
    not written over those of the first."""
    monkeypatch.chdir(tmp_path)
    small = ["eval", "--rollout.turns=2", "--rollout.steps=2", "--rollout.window=1"]
    small += ["--eval.sessions=1"]
    with RunLock(Path("runs/eval")) as lock:
        lock.take(make=True)
        assert main([*small, "--seed=1"]) == 0
        assert "runs/eval-2/scores.jsonl" in capsys.readouterr().out
    first = Path("runs/eval/config.yaml")

    def slowly(*words, **how):  # and the other one has ended by then
        first.write_text(Path("runs/eval-2/config.yaml").read_text())
        Path("runs/eval/scores.jsonl").write_text("theirs")
        return load_policy(words[0])

    monkeypatch.setattr(scoring, "open_policy", slowly)
    assert main([*small, "--seed=2"]) == 2
    assert "runs/eval: scores of other settings, seed 1 there and 2 now" in capsys.readouterr().err
    assert Path("runs/eval/scores.jsonl").read_text() == "theirs"


def test_two_rollouts_at_once_share_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [rollout._folder(None) for _ in range(2)]  # before either has written
    assert [str(folder) for folder in folders] == ["runs/rollout", "runs/rollout-2"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, said",
    [
        (
            io.StringIO(),
            "edited 2/6 sessions  2 s each  left 8s\nedited 4/6 sessions  2 s each  left 4s\n"
            "edited 6 sessions in 12s; waiting for their scores\n",
        ),
        (
            Terminal(),
            "\r\x1b[Kedited 2/6 sessions  2 s each  left 8s"
            "\r\x1b[Kedited 4/6 sessions  2 s each  left 4s"
            "\r\x1b[Kedited 6 sessions in 12s; waiting for their scores\n",
        ),
    ],
)
def test_the_time_left_is_told(stream, said, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(scoring.time, "monotonic", lambda: now[0])
    with scoring.Counter(6, True, stream) as counter:
        for done in (2, 4, 6):
            now[0] += 4.0
            counter.update(done)
    assert stream.getvalue() == said


def test_a_line_that_is_open_is_closed_by_an_error():
    stream = Terminal()
    with pytest.raises(KeyError), scoring.Counter(6, True, stream) as counter:
        counter.update(2)
        raise KeyError
    assert stream.getvalue().endswith("\n")


class Panel:
    names = ("IF", "CC", "GA")


OPENINGS = [
    (
        {},
        {},
        [
            "endless sessions of the shapes world, 3 turns",
            "2 held-out sessions before and after",
            "60 iterations, of",
        ],
    ),
    (
        {"data": {"path": "examples/shapes"}},
        {},
        ["16 sessions of examples/shapes", "2 training sessions before"],
    ),
    (
        {"data": {"path": "examples/shapes", "heldout": "examples/shapes"}},
        {},
        ["2 held-out sessions before"],
    ),
    ({"eval": {"every": 5}}, {}, ["before, every 5 and after"]),
    ({"eval": {"sessions": 0}}, {}, ["no evaluation"]),
    ({"policy": {"lora_rank": 4}}, {}, ["LoRA of rank 4 trains, 2.64 M weights"]),
    (
        {"train": {"loss": "nft"}, "rollout": {"window": 0}},
        {},
        ["nft, credit edit-r2, 4 steps of an ODE"],
    ),
    ({}, {"given": True}, ["UnifiedPolicy, given ready made; "]),
    (
        {},
        {"done": 20, "seconds": 100.0},
        ["40 of 60 iterations are left (about 3m20s at 5 s each)"],
    ),
    ({}, {"done": 60, "seconds": 100.0}, ["all 60 iterations are done"]),
    # One of a kind.
    (
        {"train": {"iterations": 1}, "rollout": {"sessions": 1, "turns": 1}},
        {},
        ["1 iteration, of 1 session x", "shapes world, 1 turn each"],
    ),
    ({"train": {"iterations": 1}}, {"done": 1}, ["its 1 iteration is done"]),
    ({}, {"done": 59, "seconds": 59.0}, ["1 of 60 iterations is left (about 1s at"]),
    ({"rollout": {"steps": 1, "window": 0}}, {}, ["1 step of an ODE"]),
]


@pytest.fixture(scope="module")
def policy():
    return load_policy(PolicyConfig())


@pytest.mark.parametrize("values, how, said", OPENINGS)
def test_a_run_says_first_where_its_results_go_and_what_it_does(
    values, how, said, policy, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parent.parent)
    few = {"out": "runs/mine", "eval": {"sessions": 2, **values.get("eval", {})}}
    config = replace_nested(Config(), {**values, **few})
    lines = opening(
        config,
        sessions_for(config, policy),
        policy,
        Panel(),
        rollout_sampler(config.rollout),
        **how,
    )
    assert len(lines) == 6 and lines[0].startswith("results  runs/mine: ")
    assert all(part in "\n".join(lines) for part in said), lines
    assert max(map(len, lines)) <= 100
