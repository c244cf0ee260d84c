"""The command line as a user meets it."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import editr2
from editr2.cli import main as cli
from editr2.cli.main import main
from editr2.cli.settings import run_config
from editr2.config import Config
from editr2.config.fields import leaves
from editr2.run.tracking import read_metrics
from editr2.sessions import load_sessions

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "shapes"


def configured(*arguments):
    return run_config("editr2 train", "x", list(arguments))[0]


def test_flags_beat_the_file_which_beats_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("policy: {intent: true}\ntrain:\n  lr: 3e-5\n  iterations: 7\n")
    config = configured("--preset", "flow-grpo", "--config", str(file), "--train.iterations", "9")
    assert config.credit.preset == "flow-grpo" and config.policy.intent is True
    assert config.train.lr == 3e-5 and config.train.iterations == 9
    assert configured() == Config()


def test_flags_are_read_as_yaml_is(tmp_path):
    config = configured(
        "--train.betas=0.5,0.75",
        "--policy.resolution",
        "512x640",
        "--credit.weights",
        "{IF: 1, CC: 2}",
        "--credit.weights.CC",
        "3",
        "--credit.weights.my-judge",
        "1",
        "--policy.intent",
        "--train.ema=none",
        "--train.lr",
        "3e-4",
        "--credit.clip",
        "null",
        "--policy.negative_prompt",
        "- no: [text]",
        "--data.limit",
        "5",
        "--data.limit=6",
        "--out=~/x",
        "--policy.keep_source",
        "yes",
        "--train.kl_weight",
        "1",
    )
    assert config.train.betas == (0.5, 0.75) and config.policy.resolution == (512, 640)
    assert config.credit.weights == {"IF": 1.0, "CC": 3.0, "my-judge": 1.0}
    assert config.policy.intent and config.policy.keep_source
    assert (config.train.ema, config.train.lr, config.credit.clip) == (None, 3e-4, None)
    assert config.policy.negative_prompt == "- no: [text]" and config.data.limit == 6
    assert config.out == str(Path.home() / "x") and isinstance(config.train.kl_weight, float)


def test_help_has_every_field_with_what_it_accepts(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help", "all"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "<class" not in said
    for key, _ in leaves(Config):
        assert f"--{key} " in said
    assert (
        "AdamW learning rate, of the first iteration (a number, above 0, at most 1; default: "
        "0.0002)" in said
    )


def test_data_is_short_for_its_path():
    assert configured("--data", "some/folder").data.path == "some/folder"
    assert configured("--data=some/folder").data.path == "some/folder"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["train", "--rollout.stesp", "3"],
            "--rollout.stesp: unknown flag (did you mean --rollout.steps?)",
        ),
        (
            ["train", "--iterations", "3"],
            "--iterations: unknown flag (did you mean --train.iterations?)",
        ),
        (
            ["train", "--train.iter", "3"],
            "--train.iter: unknown flag (did you mean --train.iterations?)",
        ),
        (
            ["train", "--sessions=3"],
            "--sessions: unknown flag (did you mean --rollout.sessions or --eval.sessions?)",
        ),
        (
            ["train", "--policy.lora-rank=3"],
            "--policy.lora-rank: unknown flag (did you mean --policy.lora_rank?)",
        ),
        (["train", "--modle", "kontext"], "--modle: unknown flag (did you mean --policy.model?)"),
        (
            ["train", "--zebra"],
            "--zebra: unknown flag (editr2 train --help all lists what there is)",
        ),
        (
            ["train", "--checkpoint", "3"],
            "a group of settings (accepted: --checkpoint.every, --checkpoint.keep and "
            "--checkpoint.best)",
        ),
        (["train", "train.lr=3"], "'train.lr=3': not understood (did you mean --train.lr=3?)"),
        (["train", "now"], "'now': not understood (usage: editr2 train [options])"),
        (
            ["train", "--rollout.steps", "many"],
            "rollout.steps: 'many' (accepted: a whole number, 1 to 1000)",
        ),
        (
            ["train", "--rollout.steps", "010"],
            "rollout.steps: '010' (accepted: a whole number, 1 to 1000)",
        ),
        (
            ["train", "--reward.timeout", "1:30"],
            "reward.timeout: '1:30' (accepted: seconds, above 0",
        ),
        (
            ["train", "--out", "~no-such-user/x"],
            "(accepted: a folder; there is no home folder ~no-such-user; ./~no",
        ),
        (["world", "make", "--out", "~no-such-user"], "there is no home folder ~no-such-user"),
        (
            ["train", "--credit.weights", "{IF: 0, CC: 0, GA: 0}"],
            "credit.weights: all are 0, so nothing trains",
        ),
        (
            ["train", "--train.lr", "abc"],
            "train.lr: 'abc' (accepted: a number, above 0, at most 1)",
        ),
        (
            ["train", "--train.lr", "-1e-4"],
            "train.lr: -0.0001 (accepted: a number, above 0, at most 1)",
        ),
        (
            ["train", "--train.lr"],
            "--train.lr: needs a value (accepted: a number, above 0, at most 1)",
        ),
        (["train", "--train.lr", "--profile"], "--train.lr: needs a value"),
        (
            ["train", "--policy.intent", "perhaps"],
            "policy.intent: 'perhaps' (accepted: true or false)",
        ),
        (
            ["train", "--train.betas", "0.9"],
            "train.betas: 0.9 (accepted: a list of 2, each a number, at least 0, bel",
        ),
        (
            ["train", "--train.betas", "0.9,1"],
            "train.betas[1]: 1.0 (accepted: a number, at least 0, below 1)",
        ),
        (["train", "--credit.weights.IF", "x"], "credit.weights.IF: 'x' (accepted: a number, "),
        (["train", "--profile=3"], "--profile: '3' (accepted: --profile alone, without a value)"),
        (["train", "--out", "no\0such"], "out: 'no\\x00such' (accepted: a folder; this has a NUL)"),
        (["train", "--out", ""], "out: '' (accepted: a folder; this is empty)"),
        (["train", "--out", __file__], "(accepted: a folder; "),
        (["train", "--policy.weights=~/no/such"], f"{Path.home()}/no/such: no config.json"),
        (["check", "--processes", "-1"], "--processes: -1 (accepted: a whole number, 1 to"),
        (["check", "--gpu"], "--gpu: needs a value"),
        (["check", "a.yaml", "b.yaml"], "'b.yaml': not understood"),
        (["eval", "--data", "~/no/such"], f"{Path.home()}/no/such"),
        (["rollout", "--out", f"{__file__}/x"], "(accepted: a folder; "),
        (["report"], "run: missing (usage: editr2 report RUN [options])"),
        (["report", "a", "b"], "editr2 report: a: no metrics.jsonl"),
        (["report", "a", "--out", "b"], "--out: given with one run"),
        (["export", "a"], "--out: missing (usage: editr2 export RUN --out PATH [options])"),
        (["export", "~/no/such", "--out", "x"], f"{Path.home()}/no/such: no config.yaml"),
        (["doctor", "--all"], "--all: unknown flag (editr2 doctor --help"),
        (["data", "import", "coco", "x", "--out", "y"], "format: 'coco' (accepted: mice, edival"),
        (
            ["data", "import", "mice", "x", "--out", "y", "--limit=-1"],
            "--limit: -1 (accepted: a whole number, 1 to",
        ),
        (
            ["data", "import", "mice", "x", "--out", "y", "--mode=c"],
            "--mode: 'c' (accepted: cm, cu",
        ),
        (
            ["data", "improt"],
            "command: 'improt' (accepted: import, validate, annotate, make; did you mean import?)",
        ),
        (["--verison"], "quickstart, completion; did you mean --version?)"),
        (["quick"], "quickstart, completion; did you mean quickstart?)"),
        (["data", "--verison"], "(accepted: import, validate, annotate, make)"),
        (["world", "make"], "--out: missing (usage: editr2 world make --out PATH [options])"),
        (
            ["world", "make", "--out", "x", "--count", "-3"],
            "--count: -3 (accepted: a whole number, 1 to 1000000)",
        ),
        (["world", "make", "--out", __file__], "--out: "),
        (
            ["world", "pretrain", "--out", "x", "--lr=.nan"],
            "lr: nan (accepted: a number, above 0, at most 1)",
        ),
        (
            ["world", "pretrain", "--out", "x", "--steps=0"],
            "steps: 0 (accepted: a whole number, 1 to",
        ),
        (["reproduce", "--jobs=0"], "--jobs: 0 (accepted: a whole number, 1 to"),
        (["reproduce", "--sampler=dde"], "sampler: 'dde' (accepted: rollout, ode)"),
        (["reproduce", "--sessions=0"], "sessions: 0 (accepted: a whole number, 1 to"),
        (
            ["train", "--preset", "best"],
            "accepted: edit-r2, edit-r2-released, mt-editflow-grpo, mt-edit",
        ),
        (["train", "--config"], "--config: needs a value"),
        (["train", "--data", "no/such/folder"], "no/such/folder"),
        (["train", "--policy.weights", "no/such"], "no/such"),
        (["fly"], "accepted: init, recipes, train, check, eval"),
        (["report", "no/such/run"], "no/such/run"),
        (
            ["world", "make", "--out", "x", "--split", "test"],
            "--split: 'test' (accepted: train, heldout)",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) == 1


def test_an_unknown_key_is_named_with_file_and_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\ntrain:\n  lrr: 1\n")
    assert main(["train", "--config", str(file)]) == 2
    assert (
        f"{file}:3: unknown key 'train.lrr' (did you mean 'train.lr'?)" in capsys.readouterr().err
    )


def test_a_broken_session_stops_before_anything_is_written(tmp_path, capsys):
    data = tmp_path / "sessions.jsonl"
    lines = (EXAMPLES / "sessions.jsonl").read_text().splitlines()
    good = json.loads(lines[0])
    good["image"] = str(EXAMPLES / good["image"])
    data.write_text(json.dumps(good) + "\n" + lines[1][:40] + "\n")
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    assert f"{data}:2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_example_sessions_are_valid_and_of_both_modes():
    sessions = load_sessions(EXAMPLES)
    assert {s.mode for s in sessions} == {"cm", "cu"} and all(len(s.turns) == 3 for s in sessions)


def test_world_make_writes_what_load_reads(tmp_path, capsys):
    assert (
        main(["world", "make", "--out", str(tmp_path / "w"), "--count", "4", "--split", "heldout"])
        == 0
    )
    assert len(load_sessions(tmp_path / "w")) == 4
    assert "4 sessions" in capsys.readouterr().out


REFUSED = [
    (
        OSError(errno.ENOSPC, "x", "runs/x/metrics.jsonl"),
        "runs/x/metrics.jsonl: the disk is full; what was saved before",
    ),
    (OSError(errno.EDQUOT, "x"), "output: the disk is full"),
    (
        PermissionError(errno.EACCES, "x", "runs"),
        "runs: permission denied (accepted: a file or folder that is yours",
    ),
    (
        OSError(errno.EROFS, "x", "/mnt/a"),
        "/mnt/a: its file system cannot be written (accepted: another folder)",
    ),
    (NotADirectoryError(errno.ENOTDIR, "x", b"a/b"), "a/b: is below a file (accepted: a folder)"),
    (FileExistsError(errno.EEXIST, "x", Path("a")), "a: is there already, and no folder"),
    (IsADirectoryError(errno.EISDIR, "x", "a"), "a: is a folder (accepted: a file)"),
    (OSError(errno.ENAMETOOLONG, "x", "a"), "a: the name is too long"),
    (
        OSError(errno.EMFILE, "x", "a"),
        "a: too many open files (accepted: fewer at once, or a higher limit by ulimit",
    ),
    (OSError(errno.EIO, "x", "a", None, "b"), "a -> b: the device does not read or write"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
    (OSError("no hub\n  in sight"), "no hub in sight"),
    (TimeoutError(), "TimeoutError"),
]


@pytest.mark.parametrize(
    "error, message", REFUSED, ids=lambda v: type(v).__name__ if isinstance(v, OSError) else None
)
def test_what_the_system_refuses_is_one_line(error, message, monkeypatch, capsys):
    def command(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    assert main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", lambda arguments: {}["x"])
    with pytest.raises(KeyError):
        main(["train"])


def test_a_reader_who_has_enough_is_no_error():
    code = "from editr2.cli.main import main; import sys; sys.exit(main(['check', '--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed",
    [
        # The first number that is free is 0, or 1.
        pytest.param("<&-", marks=pytest.mark.exhaustive),
        ">&-",
        pytest.param("2>&-", marks=pytest.mark.exhaustive),
        "<&- >&- 2>&-",
    ],
)
def test_closed_streams_are_no_error(closed):
    """As services start programs; no file of ours takes the number of a stream."""
    code = (
        "import os, sys; from editr2.cli.main import main; code = main(['world', '--help']); "
        "print('said')"
    )
    code += "; sys.exit(code or os.open('/', os.O_RDONLY) < 3)"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and ("said" in done.stdout) == (
        ">&-" not in closed.replace("2>&-", "")
    )


def test_libraries_say_nothing_that_nobody_needs():
    """Importing a Flux pipeline touches image processors that would rather have torchvision."""
    code = (
        "from editr2.policies.libraries import stock_pipeline; "
        "print(stock_pipeline('FluxKontextPipeline').__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert (done.stdout, done.stderr) == ("FluxKontextPipeline\n", "")


@pytest.mark.slow
def test_the_main_job_on_real_files(tmp_path, capfd):
    """`editr2 train --data` as the README shows it, then rollout, eval and report on what it
    left."""
    run = tmp_path / "run"
    small = [
        "--rollout.sessions=2",
        "--rollout.siblings=3",
        "--rollout.steps=4",
        "--data.limit=4",
        "--eval.strips=2",
    ]
    small = [*small, "--eval.sessions=4", f"--data={EXAMPLES}"]

    def editr2_command(*arguments, processes=1):
        """In this process, where one is enough: a start takes longer than the work."""
        if processes == 1:
            assert main([*arguments]) == 0
            return "".join(capfd.readouterr())
        several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        done = subprocess.run(
            [sys.executable, "-m", *several, "editr2.cli", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = editr2_command("train", f"--out={run}", "--train.iterations=2", "--profile", *small)
    for part in ("iter 2/2", "|ratio-1|", "rollout", "optimiser", "report:", "t3 "):
        assert part in said, part
    rows, dropped = read_metrics(run / "metrics.jsonl")
    assert dropped == 0 and [r["event"] for r in rows] == [
        "start",
        "eval",
        "train",
        "train",
        "eval",
        "comparison",
    ]
    assert (
        "no --data.heldout given" in said
        and "4 training sessions)" in said
        and "held-out sessions" not in said
    )
    page = (run / "report.html").read_text()
    assert (
        "the evaluations are on the training sessions" in page
        and "The same training sessions" in page
    )
    assert "always use" in page and not re.search(r'(?:src|href)="?(?:http|//)', page)
    assert said.index("results  ") < said.index("iter 1/2") < said.index("done: ")
    assert f"next: editr2 eval --policy {run}" in said
    scored = tmp_path / "scored"
    said = editr2_command(
        "eval", f"--policy.weights={run / 'policy'}", *small, f"--out={scored}", "--eval.turns=3"
    )
    assert "4 sessions" in said and "every turn right" in said and "marginal: " in said
    assert f"eval: 4 sessions of {EXAMPLES}; 4 steps of cps" in said and "edited 4 sessions" in said
    assert "held-out" not in said and "training sessions" not in said
    lines = [json.loads(line) for line in (scored / "scores.jsonl").read_text().splitlines()]
    sessions = load_sessions(EXAMPLES)[:4]
    assert [(line["id"], line["turn"], line["mode"]) for line in lines] == [
        (session.id, t, session.mode) for session in sessions for t in (1, 2, 3)
    ]
    of_turn = {t: [line["reward"] for line in lines if line["turn"] == t] for t in (1, 2, 3)}
    (_, row), _ = read_metrics(scored / "metrics.jsonl")
    for t, rewards in of_turn.items():
        assert np.mean(rewards) == pytest.approx(row["reward_turn"][t - 1]["mean"], abs=1e-6)
    assert sessions[0].id in (page := (scored / "report.html").read_text())
    assert "held-out" not in page.lower().split("<details", 1)[0]
    editr2_command("rollout", f"--out={tmp_path / 'edited'}", *small)
    lines = (tmp_path / "edited" / "outputs.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(
        (tmp_path / "edited" / json.loads(lines[0])["turns"][t]["image"]).exists() for t in (0, 2)
    )
    said = editr2_command("rollout", f"--out={tmp_path / 'shared'}", *small, processes=2)
    assert said.count("4 sessions") == 1
    again = (tmp_path / "shared" / "outputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in again] == [json.loads(line)["id"] for line in lines]
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {"images", "outputs.jsonl"}
    assert len(list((tmp_path / "shared" / "images").iterdir())) == len(
        list((tmp_path / "edited/images").iterdir())
    )
    editr2_command("report", str(run))


def test_the_library_loads_lazily_and_names_what_it_has():
    assert editr2.Config is Config
    for name in editr2.__all__:
        assert getattr(editr2, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = editr2.nothing_here
