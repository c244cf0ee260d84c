"""A new editor is one file and one table entry, or the file and `package.module:Class`: it trains,
and everything else asks its class."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from editr2.check.editors import open_editor
from editr2.cli.main import main
from editr2.config import PolicyConfig
from editr2.errors import ConfigError, UserError
from editr2.policies.configured import ConfiguredPolicy, policy_class
from editr2.policies.load import load_policy
from editr2.policies.models import MODELS
from editr2.run.tracking import read_metrics

REFERENCE = "own_editor:ConvEditor"
SMALL = [
    *("--rollout.sessions=2", "--rollout.siblings=2", "--rollout.turns=2", "--rollout.steps=2"),
    *("--eval.sessions=2", "--eval.strips=1", "--train.iterations=1", "--rollout.window=1"),
    *("--reward.function=editr2.rewards.brightness:Brightness", "--credit.preset=flow-grpo"),
    *("--credit.baseline=none", '--credit.weights={"brightness": 1.0}'),
]


MODULES = ("own_editor", "mine", "broken")


@pytest.fixture(autouse=True)
def folder(beside, tmp_path, monkeypatch):
    """The working folder holds the file of CONTRIBUTING.md's recipe, and nothing else knows of
    it."""
    recipes = beside("recipes")
    text = recipes.added(recipes.RECIPES["An editor"], "editr2/policies/conv.py")
    (tmp_path / "own_editor.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(params=["table", "reference"])
def model(request, monkeypatch):
    if request.param == "reference":
        return REFERENCE
    monkeypatch.setitem(MODELS, "own", REFERENCE)
    return "own"


def test_it_trains_and_what_it_saved_is_evaluated_and_exported(model, tmp_path, capsys):
    run, settings = tmp_path / "run", [f"--policy.model={model}", *SMALL]
    assert main(["train", f"--out={run}", *settings]) == 0
    (row,) = [r for r in read_metrics(run / "metrics.jsonl")[0] if r.get("event") == "train"]
    assert row["grad_norm"] > 0
    assert main(["eval", *settings, f"--policy.weights={run / 'policy'}"]) == 0
    assert "2 sessions" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "equal to the last bit" in capsys.readouterr().out
    for made in (run, tmp_path / "out"):
        assert main(["eval", *SMALL, f"--policy={made}"]) == 0
        told = capsys.readouterr()
        assert "2 sessions" in told.out and f"{model}, with the settings of" in told.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "All weights of random weights" in card and "library_name: editr2" in card
    assert f'load_policy(PolicyConfig(model="{model}", weights="out"))' in card


def test_check_estimates_it(model, capsys):
    assert main(["check", f"--policy.model={model}", *SMALL, "--gpu=h100"]) == 0
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in policy_class(model)().module.parameters())
    assert f"parameters  {parameters / 1000:.4g} k" in said and "verdict: fits h100" in said
    assert f"policy      {model}, float32, 24 x 24 px, latents [3, 24, 24]" in said


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_check_counts_is_what_runs(batch):
    """A cost at a batch is the line through two smaller ones, so it has to be exact at each."""
    config = PolicyConfig(model=REFERENCE)
    editor, policy = open_editor(config), load_policy(config)
    images = np.zeros((batch, *policy.image_size, 3), np.uint8)
    context = policy.instruct(policy.encode(images), ["make it red"] * batch)
    x, sigma = torch.randn(batch, *policy.latent_shape), torch.rand(batch)
    assert editor.held(batch, 1) == context.image.nbytes + context.said.nbytes
    for step, run in (
        ("velocity", lambda: policy.velocity(x, sigma, context)),
        ("train", lambda: policy.velocity(x, sigma, context).v.sum().backward()),
    ):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(step == "train"):
            run()
        assert editor.cost(step, batch, 1).total_flops == counter.get_total_flops() > 0
    assert editor.sizes().trainable == sum(p.numel() for p in policy.module.parameters())


def test_settings_that_it_has_no_use_for_are_refused(model, capsys):
    for command in ("train", "check", "eval"):
        assert main([command, f"--policy.model={model}", "--policy.guidance=3"]) == 2
        said = capsys.readouterr().err.removeprefix("error: ")
        accepted = f"(accepted with policy.model {model}: 1.0, the default)"
        assert said == f"policy.guidance: 3.0 {accepted}\n"


MODULE = """
from own_editor import ConvEditor
from editr2.policies.configured import ConfiguredPolicy
class Unfinished(ConfiguredPolicy):
    def from_config(cls, config, **how): ...
    def encode(self, images): ...
class Writer(ConvEditor):
    writes_text = True
class Other: ...
def function(): ...
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.at_all:Editor", "importing nowhere.at_all raised ModuleNotFoundError"),
        ("mine:Unfinishd", "module mine has no 'Unfinishd'; did you mean Unfinished?"),
        ("mine:Other", "class Other (accepted: a class derived from editr2.policies.configured:"),
        ("mine:function", "a function (accepted: a class derived from editr2.policies.configured:"),
        (
            "mine:Unfinished",
            "lacks append, instruct, join, pixels, save, select, velocity (",
        ),
        (
            "broken:Editor",
            "importing broken raised ZeroDivisionError: division by zero (broken",
        ),
        ("kontex", f"(accepted: {', '.join(MODELS)}, "),
        (":Editor", f"(accepted: {', '.join(MODELS)}, "),
    ],
)
def test_a_class_that_is_no_editor_is_one_line(given, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for command in ("train", "check", "eval", "rollout"):
        assert main([command, f"--policy.model={given}", "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.removeprefix("error: ")
        assert said.startswith(f"policy.model: '{given}'") and message in said
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_writer_of_intents_needs_a_blueprint_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(UserError, match=r"policy.model: 'mine:Writer': writes intents.*`check`"):
        open_editor(PolicyConfig(model="mine:Writer"))


def test_every_entry_of_the_table_is_an_editor():
    assert all(issubclass(policy_class(name), ConfiguredPolicy) for name in MODELS)
    with pytest.raises(ConfigError, match="policy.model: 'sdxl' "):
        policy_class("sdxl")
    assert Path("own_editor.py").read_text().count("\n") < 90


BROKEN = {
    "raises": ("raise KeyError('x')", "from_config raised KeyError: 'x' (mine.py:7) (accepted: "),
    "none": ("return None", "from_config gave a NoneType without module, latent_shape, image_size"),
    "no module": (
        "p = ConvEditor(); del p.module; return p",
        "gave a ConvEditor without module (a",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_from_config_that_gives_no_policy_is_one_line(case, tmp_path, capsys):
    body, said = BROKEN[case]
    (tmp_path / "mine.py").write_text(
        "from own_editor import ConvEditor\n\n\nclass Mine(ConvEditor):\n    @classmethod\n"
        f"    def from_config(cls, config, **how):\n        {body}\n"
    )
    for command in ("train", "eval"):
        assert main([command, "--policy.model=mine:Mine", *SMALL]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: policy.model: 'mine:Mine': ") and said in line, line
        assert line.count("\n") == 1
