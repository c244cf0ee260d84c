"""`editr2 init`: what it writes passes every check of `train`, for each editor and judge."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from editr2.cli.flags import documented
from editr2.cli.init import asked, written
from editr2.cli.main import main
from editr2.cli.settings import run_config
from editr2.config import Config
from editr2.config.fields import leaves
from editr2.errors import ConfigError
from editr2.policies.models import MODELS
from editr2.policies.rules import check_config
from editr2.recipes import FOLDER
from editr2.rewards.load import load_reward
from editr2.rewards.table import REWARDS
from editr2.rl.rules import check_run
from editr2.sessions import validate

GIVEN = dict.fromkeys(("model", "data", "judge", "url", "gpus", "gpu", "from"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(folder: str, **given: object) -> tuple[Config, list[str]]:
    """The configuration as `train` takes it, and what was said."""
    lines = written(Path(folder), {**GIVEN, "example": False, **given})
    config, _ = run_config("editr2 train", "", ["--config", f"{folder}/train.yaml"])
    config = check_config(config)
    names = load_reward(config.reward).names
    processes = given.get("gpus") or 1
    check_run(config, names, None, cannot_pack=None, processes=processes, apart=())
    return config, lines


MACHINES = [
    pytest.param(model, gpu, gpus, marks=pytest.mark.exhaustive if rest else ())
    for model in MODELS
    for gpu, gpus, rest in (("h100", 1, model not in ("klein", "flux2")), ("rtx4090", 3, False))
]
JUDGES = [
    pytest.param(model, judge, marks=() if model == "unified" else pytest.mark.exhaustive)
    for model in ("unified", "klein")
    for judge in REWARDS
]


@pytest.mark.parametrize("model,gpu,gpus", MACHINES)
def test_every_editor_has_settings_to_begin_with(model, gpu, gpus):
    config, lines = made("mine", model=model, gpu=gpu, gpus=gpus)
    assert config.policy.model == model and config.out == "runs/mine"
    assert config.rollout.sessions % gpus == 0
    check = f"  editr2 check mine/train.yaml --gpu {gpu}" + " --processes 3" * (gpus > 1)
    start = "torchrun --standalone --nproc_per_node 3 -m editr2" if gpus > 1 else "editr2"
    steps = [check, f"  {start} train --config mine/train.yaml"]
    assert lines[-3:] == ["next:", *steps]
    assert all(f"# {step}" in Path("mine/train.yaml").read_text() for step in steps)
    if model == "unified":
        assert config.data.path is None and config.reward.name == "world"
        return
    assert config.data.path == "mine/data" and config.reward.name == "pixels"
    assert Path("mine/data/sessions.jsonl").is_file()
    # On the host while idle where there is little room; shared out where there are several.
    assert config.policy.offload == (gpu == "rtx4090" or model == "flux2")
    alone = model in ("klein-kv", "qwen-image-2.1")  # they cannot be
    assert config.policy.shard == (gpus > 1 and not alone)


@pytest.mark.parametrize("model,judge", JUDGES)
def test_every_judge_has_its_options_and_weights(model, judge):
    config, _ = made("mine", model=model, judge=judge)
    names = load_reward(config.reward).names
    assert config.reward.name == judge
    if judge != "world":
        assert set(config.credit.weights) == set(names)
        assert sum(config.credit.weights.values()) == pytest.approx(1)


def test_a_served_judge_has_its_address():
    config, _ = made("mine", judge="pku", url="http://judge:9/v1")
    assert config.reward.options == {"url": "http://judge:9/v1"}
    with pytest.raises(ConfigError, match=r"--url: .* \(accepted with --judge pixels: none\)"):
        made("other", judge="pixels", url="http://judge:9/v1")


def test_comments_are_the_settings_own_and_only_what_matters_is_there():
    made("mine", model="kontext")
    lines = Path("mine/train.yaml").read_text().splitlines()
    values = yaml.safe_load("\n".join(lines))
    keys = [key for key, _ in leaves(Config) if _at(values, key)]
    assert 20 < len(keys) < 40
    told, text = documented(Config), " ".join(line.strip(" #") for line in lines)
    for key in keys:
        first = told[key][1].split(". ")[0].rstrip(".")
        assert first and first in text, key
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("folder", ["mine", "deep/mine", "of two words", "."])
def test_what_comes_next_puts_the_run_where_the_file_says_from_here(folder):
    """`out` is of the working folder: after a `cd` it would be in mine/runs, which no page says."""
    _, lines = made(folder)
    *_, check, train = (shlex.split(line) for line in lines)
    (file,) = train[train.index("--config") + 1 :]
    assert Path(file) == Path(check[2]) == Path(folder, "train.yaml")
    name = Path(folder).resolve().name
    assert run_config("editr2 train", "", train[2:])[0].out == f"runs/{name}"


def _at(values: dict, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def test_the_comment_of_the_judge_names_every_one_of_the_table():
    made("mine")
    lines = Path("mine/train.yaml").read_text().splitlines()
    at = lines.index("  name: world")
    above = itertools.takewhile(lambda line: line.startswith("  #"), reversed(lines[:at]))
    text = " ".join(line.strip(" #") for line in reversed(list(above)))
    assert {*REWARDS} <= set(re.findall(r"[\w-]+", text)) and text.count("pixels") == 1
    assert "docs/judges.md" in text and text.endswith(".")


ANNOTATED = {
    "formatted_instruction": "change the color of [cup] to [red]",
    **{key: ["cup"] for key in ("unchanged_objects", "available_objects", "all_objects")},
    "bg_consistency": True,
}


@pytest.mark.parametrize(
    ("judge", "turn", "says"),
    [
        (
            "edit-r2",
            {},
            r"2 of 2 sessions lack .*IF does not .*`editr2 data annotate`",
        ),
        ("edival", {}, "2 of 2 sessions lack .*`editr2 data annotate`"),
        (
            "imgedit",
            {},
            "2 of 2 sessions lack something; a1: score fails, turn 1",
        ),
        ("edit-r2", {"task": "color_alter", "meta": ANNOTATED}, None),
        ("viescore", {}, None),
        ("pixels", {}, None),
    ],
)
def test_sessions_that_lack_what_a_judge_needs_are_a_note(judge, turn, says):
    turns = [{"instruction": "paint the cup red", **turn}]
    Image.new("RGB", (64, 64)).save("a.png")
    lines = [json.dumps({"id": i, "image": "a.png", "turns": turns}) + "\n" for i in ("a1", "a2")]
    Path("sessions.jsonl").write_text("".join(lines))
    _, said = made("mine", model="klein", data=".", judge=judge)
    notes = [line for line in said if line.startswith("note: ")]
    assert len(notes) == (says is not None) and said.index("next:") == 1 + len(notes)
    assert says is None or re.match(f"note: reward.name: '{judge}': {says}", notes[0])


def test_a_note_that_cannot_be_made_is_no_error():
    """The files are written by then, and a second call would be refused for them."""
    turns = [{"instruction": "paint the cup red"}]
    Image.new("RGB", (64, 64)).save("a.png")
    line = json.dumps({"id": "a1", "image": "a.png", "turns": turns}) + "\n"
    Path("sessions.jsonl").write_text(line)
    with mock.patch("editr2.rewards.panel.CheckedReward.lacking", side_effect=KeyError("task")):
        _, said = made("mine", model="klein", data=".")
    assert "next:" in said and not [line for line in said if line.startswith("note: ")]


DATA = {
    "world": None,
    "hf:owner/name:train": "hf:owner/name:train",
    "set": "mine/../set",
    "set/sessions.jsonl": "mine/../set/sessions.jsonl",
}


@pytest.mark.parametrize("data", DATA)
def test_data_is_named_as_the_file_sees_it(data):
    Path("set").mkdir()
    Path("set/sessions.jsonl").touch()
    config, lines = made("mine", data=data)
    assert config.data.path == DATA[data] and "sessions: mine/data" not in lines
    assert config.reward.name == "world"  # the small model knows no other words
    absolute, _ = made("more", data=str(Path("set").absolute()))
    assert absolute.data.path == str(Path("set").absolute())


@pytest.mark.parametrize("model", ["unified", "bagel"])
def test_an_example_is_written_where_it_is_asked_for(model):
    config, lines = made("mine", model=model, example=True)
    assert "sessions: mine/data" in lines and config.data.path == "mine/data"
    assert validate("mine/data") == []


@pytest.mark.parametrize("there", ["train.yaml", "data"])
def test_nothing_is_overwritten(there):
    Path("mine").mkdir()
    Path("mine", there).write_text("mine")
    with pytest.raises(ConfigError, match=rf"mine/{there} is there already"):
        made("mine", model="klein")
    assert [path.name for path in Path("mine").iterdir()] == [there]
    assert Path("mine", there).read_text() == "mine"


@pytest.mark.parametrize(
    "given,says",
    [
        ({"model": "kontext", "data": "world"}, "data.path: none .accepted with policy.model kon"),
        ({"data": "nowhere"}, "--data: nowhere: not there"),
        ({"data": "."}, r"no sessions.jsonl in the folder .*editr2 data make"),
        ({"data": "world", "example": True}, "--example: given beside --data world"),
        ({"gpu": "h1000", "model": "klein"}, "h1000"),
        ({"judge": "nobody:Judge"}, "--judge: 'nobody:Judge'"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(given, says):
    with pytest.raises(ConfigError, match=says) as raised:
        made("mine", **given)
    assert "\n" not in str(raised.value) and not Path("mine").exists()


def test_it_asks_on_a_terminal_alone(monkeypatch, capsys):
    answers = iter(["klein", "example", "", "2", "rtx4090"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["init", "quiet"]) == 0  # no terminal: no question
    assert yaml.safe_load(Path("quiet/train.yaml").read_text())["policy"]["model"] == "unified"
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert main(["init", "flagged", "--model", "unified"]) == 0  # nor where anything is said
    assert main(["init", "asked"]) == 0
    values = yaml.safe_load(Path("asked/train.yaml").read_text())
    assert values["policy"]["model"] == "klein" and values["data"]["path"] == "data"
    assert "--gpu rtx4090 --processes 2" in capsys.readouterr().out
    answers = iter(["", "", "", "none", ""])
    with pytest.raises(ConfigError, match="--gpus: 'none'"):
        asked()

    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert asked()["model"] == "unified" and asked()["gpus"] == 1


def test_the_package_has_what_it_copies():
    """In a wheel, too (pyproject's package data)."""
    text = (FOLDER.parent.parent / "pyproject.toml").read_text()
    assert '"editr2.recipes" = ["*.yaml", "photos/**/*"]' in text
