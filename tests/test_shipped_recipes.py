"""Recipes in the package, and what relative paths in a file of settings are relative to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from editr2.benchmarks.settings import BenchmarkConfig
from editr2.cli.main import main
from editr2.cli.settings import _options_of, run_config
from editr2.config import Config
from editr2.config.fields import is_schema, leaves, slots
from editr2.config.paths import WRITTEN, from_file
from editr2.errors import ConfigError
from editr2.judge.settings import JudgeConfig
from editr2.recipes import FOLDER, copy_recipe, find_recipe, recipes
from editr2.rewards.table import REWARDS
from editr2.verifier.settings import GcpoConfig, SftConfig
from editr2.verifier.stage_settings import EvalConfig, PrinciplesConfig, TracesConfig

SCHEMAS = (
    *(Config, JudgeConfig, BenchmarkConfig, SftConfig, GcpoConfig),
    *(PrinciplesConfig, TracesConfig, EvalConfig),
)
REWARD_WITH_PROMPTS = ("edit-r2", "edival", "pku", "editscore", "viescore", "imgedit", "rational")
OPTIONS = {
    f"reward[{name}].options.prompts": {"name": name, "options": {"prompts": "mine"}}
    for name in (*REWARD_WITH_PROMPTS, "unifiedreward", "verifier")
} | {
    "reward[human].options.folder": {"name": "human", "options": {"folder": "mine"}},
    "reward[verifier].options.weights": {"name": "verifier", "options": {"weights": "mine"}},
}
PATHS = [(schema, key) for schema in SCHEMAS for key, slot in leaves(schema) if slot.accepts.path]


def nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[return-value]


def at(values: dict, key: str) -> object:
    for name in key.split("."):
        values = values[name]
    return values


def test_the_table_has_every_path_setting():
    """By name, so that whoever adds one sees what it is relative to."""
    found = {key for schema, key in PATHS if schema is Config}
    assert found == {
        *("data.path", "data.heldout", "reward.cache", "policy.weights", "policy.questions"),
        *("policy.lora_weights", "policy.cache", "out"),
    }
    assert {schema for schema, _ in PATHS} == set(SCHEMAS)
    assert {key for _, key in PATHS if key.split(".")[-1] == WRITTEN} == {"out"}


@pytest.mark.parametrize("schema,key", PATHS, ids=lambda v: getattr(v, "__name__", v))
def test_a_path_in_a_file_is_relative_to_the_file(schema, key, tmp_path, monkeypatch):
    """What is read; what is written is of the working folder, as are paths of flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "mine").mkdir(parents=True)
    for given, there in [("mine", "sub/mine"), ("/mine", "/mine"), ("~/mine", "~/mine")]:
        made = at(from_file(nested(key, given), schema, "sub/my.yaml", {}), key)
        assert made == (given if key == "out" else there), given
    assert at(from_file(nested(key, "mine"), schema, "my.yaml", {}), key) == "mine"


@pytest.mark.parametrize("at_key", OPTIONS)
@pytest.mark.parametrize("place", ["reward", "reward.use", "eval.reward"])
def test_so_is_one_in_the_options_of_a_reward(at_key, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "mine").mkdir(parents=True)
    use = OPTIONS[at_key]
    values = nested(place, use if place == "reward" else [use])
    made = at(from_file(values, Config, "sub/my.yaml", {}, _options_of), place)
    one = made if place == "reward" else made[0]
    assert set(one["options"].values()) == {"sub/mine"} and one["name"] == use["name"]
    assert use["options"] != one["options"]


@pytest.mark.parametrize("schema", [TracesConfig, EvalConfig], ids=lambda s: s.__name__)
def test_so_is_one_of_the_verifiers_judge(schema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = {"options": {"prompts": "mine"}, "weights": "judge"}
    own = {"options": {"prompts": "mine"}, "function": "somewhere:own"}
    (tmp_path / "sub" / "judge").mkdir(parents=True)
    values = {"judge": {"use": [one, own]} | one}
    made = from_file(values, schema, "sub/my.yaml", {}, _options_of)["judge"]
    for judge in (made, made["use"][0]):
        assert judge == {**judge, "options": {"prompts": "sub/mine"}, "weights": "sub/judge"}
    assert made["use"][1] == own
    alone = {"judge": {"options": {"prompts": "mine"}}}
    made = from_file(alone, PrinciplesConfig, "sub/my.yaml", {}, _options_of)["judge"]
    assert made["options"] == {"prompts": "sub/mine"}


def test_every_reward_with_a_path_among_its_options_is_in_that_table():
    from editr2.config.plugins import resolve

    found = set()
    for name in REWARDS:
        options = getattr(resolve("reward.name", name, REWARDS), "Options", None)
        if is_schema(options):
            for field, slot in slots(options).items():
                if slot.accepts.path or field in ("prompts", "folder", "path", "file"):
                    found.add(f"reward[{name}].options.{field}")
    assert found == set(OPTIONS)


def test_flags_and_a_runs_own_settings_are_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sub"
    (folder / "mine").mkdir(parents=True)
    (folder / "my.yaml").write_text("data:\n  path: mine\n  heldout: other\nout: runs/a\n")
    words = ["--config", "sub/my.yaml", "--data.heldout", "mine", "--policy.cache", "mine"]
    config, _ = run_config("editr2 train", "", words)
    assert (config.data.path, config.data.heldout) == ("sub/mine", "mine")
    assert (config.policy.cache, config.out) == ("mine", "runs/a")
    (folder / "my.yaml").rename(folder / "config.yaml")
    config, _ = run_config("editr2 train", "", ["--config", "sub/config.yaml"])
    assert config.data.path == "sub/mine"  # no run's
    (folder / "metrics.jsonl").touch()
    config, _ = run_config("editr2 train", "", ["--config", "sub/config.yaml"])
    assert config.data.path == "mine"


def test_one_that_only_the_working_folder_has_is_refused_and_an_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    lines = {"data.path": 3}
    with pytest.raises(ConfigError, match=r"my.yaml:3: data.path: 'mine' is .*is \.\./mine\)"):
        from_file({"data": {"path": "mine"}}, Config, "sub/my.yaml", lines)
    values = {"data": {"path": "hf:a/b:train"}, "policy": {"weights": "a/b"}}
    assert from_file(values, Config, "sub/my.yaml", {}) == values


# ------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", list(recipes()))
def test_a_recipe_is_found_by_name_from_anywhere_and_says_what_it_takes(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config, _ = run_config("editr2 train", "", ["--config", name])
    recipe = find_recipe(name)
    assert Path(config.data.path) == FOLDER / "photos" and config.out.startswith("runs/")
    assert (recipe.model, recipe.method.split(",")[0]) == (config.policy.model, config.train.loss)
    assert recipe.devices in ("8 x h100", "1 x h100", "1 x rtx4090")
    needed, there = (float(word) for word in recipe.memory.removesuffix(" GiB").split(" of "))
    assert 10 < needed < there and recipe.time[0].isdigit() and "\n" not in recipe.title
    assert f"editr2 check {name} --gpu" in recipe.text  # and its own commands name it


def test_they_are_listed_printed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    assert set(recipes()) <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert main(["recipes", "klein-nft-24gb"]) == 0
    assert capsys.readouterr().out == (FOLDER / "klein-nft-24gb.yaml").read_text()
    assert main(["recipes", "klein-nft-24gb", "--to", "new/k.yaml"]) == 0
    told = capsys.readouterr().out
    assert told == "recipe: new/k.yaml\nphotos: new/photos\n"
    text = Path("new/k.yaml").read_text()
    assert "editr2 check new/k.yaml --gpu rtx4090" in text and "--config new/k.yaml\n" in text
    assert yaml.safe_load(text) == find_recipe("klein-nft-24gb").values
    config, _ = run_config("editr2 train", "", ["--config", "new/k.yaml"])
    assert config.data.path == "new/photos"
    from editr2.sessions import validate

    assert validate("new/photos") == []


@pytest.mark.parametrize("there", ["k.yaml", "photos"])
def test_a_copy_overwrites_nothing(there, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{there} is there already"):
        copy_recipe(find_recipe("klein-nft-24gb"), tmp_path / "k.yaml")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"
