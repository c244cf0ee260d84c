"""Other trainers' configurations: read without being run, and mapped key by key.

The samples here are ours, in the form of theirs. What they mean there was read off the projects at
flow_grpo 9745241 (2025-11-04) and ac4c86e (2025-07-18), DiffusionNFT 24af555 (2025-09-22), PKU's
Edit-R1 4217f25 (2026-01-24) and Flow-Factory a0b2bc5 (2026-05-02). All 59 configurations of the
four Python projects were read by `read_python_config` and by Python itself (with a ConfigDict of
ten lines): the same values.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from editr2.cli.settings import run_config
from editr2.config import Config
from editr2.config.fields import leaves
from editr2.errors import ConfigError
from editr2.policies.rules import check_config
from editr2.recipes.diffusion_nft import DIFFUSION_NFT
from editr2.recipes.flow_factory import FLOW_FACTORY
from editr2.recipes.flow_grpo import FLOW_GRPO
from editr2.recipes.mapped import Row, Theirs, mapped
from editr2.recipes.projects import read_source
from editr2.recipes.python_config import Unread, function_names, read_python_config

BASE = """
import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 7
    config.use_lora = True
    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = ""
    config.sample = sample = ml_collections.ConfigDict()
    sample.global_std = True
    sample.noise_level = 0.7
    config.train = train = ml_collections.ConfigDict()
    train.learning_rate, train.adam_beta1, train.adam_beta2 = 3e-4, 0.9, 0.999
    train.adv_clip_max = 5
    train.clip_range = train.clip_range_lt = train.clip_range_gt = 1e-4
    train.beta = 0.0
    train.ema = False
    return config
"""
GRPO = """
import imp
import os

base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))
open("run", "w").write("this file was run")


def _of(model, gpus=4, steps=10):
    gpu_number = gpus
    config = base.get_config()
    config.pretrained.model = model
    config.resolution = 512
    config.mixed_precision = "bf16"
    config.sample.num_steps = steps
    config.sample.guidance_scale = 3.5
    config.sample.num_image_per_prompt = 8
    size = 16
    while 24 % size or size * gpu_number % 8:
        size -= 1
    config.sample.train_batch_size = size
    config.sample.num_batches_per_epoch = int(24 / (gpu_number * size / 8))
    config.train.batch_size = size
    config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch // 2
    config.train.timestep_fraction = 0.99
    config.reward_fn = {"image_similarity": 0.5, "geneval": 0.5}
    return config


def kontext():
    return _of("black-forest-labs/FLUX.1-Kontext-dev")


def window():
    config = _of("Qwen/Qwen-Image-Edit", gpus=8)
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, config.sample.num_steps // 2)
    config.train.beta = 0.01
    config.train.ema = True
    return config


def bagel():
    config = _of("ByteDance-Seed/BAGEL-7B-MoT")
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (1, 8)
    config.train.clip_range_lt, config.train.clip_range_gt = 1e-5, 2e-5
    config.train.timestep_shift = 3.0
    config.use_lora = False
    return config


def drawn():
    config = _of("stabilityai/stable-diffusion-3.5-medium")
    config.train.mystery = 3
    config.sample.num_steps = random.randint(4, 9)
    return config


def nft():
    config = _of("black-forest-labs/FLUX.1-Kontext-dev", steps=6)
    config.beta, config.decay_type = 0.1, 2
    config.sample.solver, config.sample.deterministic = "dpm2", True
    config.sample.ban_prompt, config.sample.ban_std_thres = True, 0.1
    config.reward_fn = {"mllm_score_continue": 1.0}
    return config


def get_config(name):
    return globals()[name]()
"""
FACTORY = """
num_processes: 2
mixed_precision: bf16
config_file: config/fsdp2.yaml
data: {dataset_dir: dataset/mine, max_dataset_size: 64}
model:
  model_name_or_path: black-forest-labs/FLUX.1-Kontext-dev
  model_type: flux1-kontext
  finetune_type: lora
  lora_rank: 16
  target_modules: [to_q, to_out.0]
train:
  trainer_type: grpo
  advantage_aggregation: sum
  global_std: false
  clip_range: [-2.0e-4, 1.0e-4]
  kl_type: x-based
  kl_beta: 0.01
  resolution: 384
  condition_image_size: [512, 512]
  num_inference_steps: 8
  guidance_scale: 2.5
  group_size: 6
  unique_sample_num_per_epoch: 4
  gradient_step_per_epoch: 2
  learning_rate: 2.0e-4
  ema_decay: 0
  enable_gradient_checkpointing: true
  time_shift: 3.0
  whatever: 1
scheduler: {dynamics_type: CPS, noise_level: 0.8, num_sde_steps: 2, sde_steps: [1, 2, 3, 4]}
eval: {eval_freq: 10, num_inference_steps: 28, resolution: 1024}
rewards: {name: pick, reward_model: PickScore}
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "grpo.py").write_text(GRPO)
    (tmp_path / "factory.yaml").write_text(FACTORY)
    return tmp_path


# ------------------------------------------------------------------------------ reading a .py file


def test_it_is_read_and_not_run(theirs):
    names = function_names(Path("grpo.py"))
    assert names == ["kontext", "window", "bagel", "drawn", "nft"]
    for name in names:
        made = read_python_config(Path("grpo.py"), name)
        assert made.values["seed"] == 7 and made.names["gpu_number"] in (4, 8)
        assert [str(place) for place in made.unread][:1] == [
            "grpo.py:6: open('run', 'w').write('this file was run')"
        ]
    assert not Path("run").exists()
    batches = read_python_config(Path("grpo.py"), "kontext").values
    assert batches["sample.train_batch_size"] == 12  # by a loop: 16, 15, ...
    assert batches["sample.num_batches_per_epoch"] == 4
    unknown = read_python_config(Path("grpo.py"), "drawn").values["sample.num_steps"]
    assert unknown == Unread("grpo.py", 56, "random.randint(4, 9)")


UNKNOWN = "unknown"
EXPRESSIONS = {
    "2 ** 10 // 3 % 7 - -1.5": 2**10 // 3 % 7 + 1.5,
    "int(48 / (3 * 4 / 8)) + round(2.6) + len([1, 2]) + min(3, max(1, 2))": 32 + 3 + 2 + 2,
    "'a' + f'{1 + 1}-{\"b\"}' * 2": "a2-b2-b",
    "[1, (2, 3)][1][0] if 3 in [1, 2] else {'k': 5}['k']": 5,
    "1 < 2 <= 2 and not (None is None and 0) or 'no'": True,
    "os.path.join(os.getcwd(), 'data', 'ocr')": "data/ocr",
    "sum(range(4)) + twice(n=4)": 6 + 8,
    "(lambda: 1)()": UNKNOWN,
    "__import__('os').getcwd()": UNKNOWN,
    "open('x').read()": UNKNOWN,
    "os.environ['HOME']": UNKNOWN,
    "[x for x in (1, 2)]": UNKNOWN,
    "nothing + 1": UNKNOWN,
    "1 / 0": UNKNOWN,
    "9 ** 9 ** 9": UNKNOWN,
    "'a' * 10 ** 13": UNKNOWN,
    "f'{3:>5}'": UNKNOWN,
    "().__class__.__bases__": UNKNOWN,
    "twice(*[1])": UNKNOWN,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_is_evaluated_or_unknown(text, tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "def twice(n=1):\n    return n * 2\n\n\ndef one():\n    c = ConfigDict()\n"
        f"    c.x = {text}\n    return c\n"
    )
    found = read_python_config(file, "one").values["x"]
    assert isinstance(found, Unread) if EXPRESSIONS[text] == UNKNOWN else found == EXPRESSIONS[text]


STATEMENTS = {
    "for i in range(9):\n        if i == 2:\n            continue\n        if i > 3:\n"
    "            break\n        c.x += i": 1 + 0 + 1 + 3,
    "c.update({'x': 4})\n    with c.unlocked():\n        c['x'] = c.x * 2": 8,
    "if unknown():\n        c.x = 2\n    else:\n        c.x = 3": 1,
    "while unknown():\n        c.x = 2": 1,
    "try:\n        c.x = 2\n    except Exception:\n        pass": 1,
    "assert c.x == 1": 1,
    "assert c.x == 2": 1,
    "raise ValueError": 1,
    "del c.x": 1,
}


@pytest.mark.parametrize("text", STATEMENTS)
def test_a_statement_is_followed_or_told(text, tmp_path):
    file = tmp_path / "c.py"
    file.write_text(f"def one():\n    c = ConfigDict()\n    c.x = 1\n    {text}\n    return c\n")
    made = read_python_config(file, "one")
    assert made.values["x"] == STATEMENTS[text]
    told = any(word in text for word in ("unknown()", "try", "del ", "raise", "x == 2"))
    assert bool(made.unread) == told


@pytest.mark.parametrize(
    "body,says",
    [
        ("    while True:\n        pass", "does not end"),
        ("    return one()", "too deeply"),
        ("    return 3", "returns no configuration"),
    ],
)
def test_what_ends_in_no_configuration_is_refused(body, says, tmp_path):
    file = tmp_path / "c.py"
    file.write_text(f"def one():\n{body}\n")
    with pytest.raises(ConfigError, match=says):
        read_python_config(file, "one")


# ------------------------------------------------------------------------------------------ mapping

SETTINGS = {
    "grpo.py:kontext": {
        "seed": 7,
        "rollout.sessions": 24,
        "rollout.siblings": 8,
        "rollout.steps": 10,
        "rollout.window": 9,
        "rollout.window_range": 0.1,
        "rollout.dynamics": "flow-sde",
        "rollout.noise_level": 0.7,
        "rollout.shared_noise": False,
        "policy.guidance_embed": 3.5,
        "policy.resolution": [512, 512],
        "policy.lora_rank": 64,
        "policy.lora_alpha": 128.0,
        "credit.preset": "flow-grpo",
        "credit.std": "global",
        "credit.clip": 5,
        "train.lr": 3e-4,
        "train.betas": [0.9, 0.999],
        "train.lr_decay": 1.0,
        "train.minibatches": 2,
        "train.clip_low": 1e-4,
        "train.clip_high": 1e-4,
        "train.kl_weight": 0.0,
        "train.ema": None,
    },
    "grpo.py:window": {
        "policy.guidance": 3.5,
        "rollout.window": 2,
        "rollout.window_range": 0.4,  # starts at steps 0 to 3
        "train.kl_weight": 0.01,
        "train.kl_scale": "diffusion",
        "train.ema": 0.9,
    },
    "grpo.py:bagel": {
        "policy.intent": False,
        "policy.renorm": "global",
        "policy.lora_rank": 0,
        "rollout.shift": 3.0,
        "rollout.window": 3,
        "rollout.window_range": 0.6,
        "train.clip_low": 1e-5,
        "train.clip_high": 2e-5,
    },
    "grpo.py:nft": {
        "train.loss": "nft",
        "train.nft_beta": 0.1,
        "train.nft_draws": 5,
        "train.old_decay": 0.0075,
        "train.old_decay_max": 0.999,
        "rollout.window": 0,
        "policy.lora_rank": 32,
        "credit.preset": "pku",
    },
    "factory.yaml": {
        "data.limit": 64,
        "policy.dtype": "bfloat16",
        "policy.shard": True,
        "policy.lora_rank": 16,
        "policy.lora_alpha": 32,
        "policy.lora_targets": r"(^|\.)(to_q|to_out\.0)$",
        "policy.resolution": [384, 384],
        "policy.condition_resolution": [512, 512],
        "policy.guidance_embed": 2.5,
        "rollout.sessions": 4,
        "rollout.siblings": 6,
        "rollout.steps": 8,
        "rollout.dynamics": "cps",
        "rollout.noise_level": 0.8,
        "rollout.window": 2,
        "rollout.window_range": 0.5,  # starts at steps 0 to 3
        "credit.preset": "flow-factory",
        "credit.std": "group",
        "credit.clip": 5.0,
        "train.clip_low": 2e-4,
        "train.clip_high": 1e-4,
        "train.kl_weight": 0.01,
        "train.kl_scale": "mean",
        "train.minibatches": 2,
        "train.lr": 2e-4,
        "train.weight_decay": 1e-4,
        "train.ema": None,
        "eval.every": 10,
        "eval.steps": 28,
        "seed": 42,
    },
}
SAID = {
    "grpo.py:window": {"differs": ["each process keeps one start"], "elsewhere": ["reward_fn"]},
    "grpo.py:bagel": {"differs": ["also below 1"], "elsewhere": ["train.clip_range"]},
    "grpo.py:nft": {
        "differs": ["there 75 steps keep nothing", "by Euler steps here, not by dpm2"],
        "nowhere": ["sample.ban_std_thres: 0.1: credit.preset pku leaves out groups of 0.05"],
    },
    "grpo.py:drawn": {
        "unknown": ["train.mystery: 3"],
        "unread": ["sample.num_steps: grpo.py:56: random.randint(4, 9)", "grpo.py:6: open("],
        "nowhere": [
            "pretrained.model: stabilityai/stable-diffusion-3.5-medium: no editor",
            "train.timestep_fraction: 0.99: sample.num_steps is not known",
        ],
    },
    "factory.yaml": {
        "differs": ["scheduler.sde_steps: [1, 2, 3, 4]: it may start at step 0 here, at 1 there"],
        "nowhere": ["eval.resolution: 1024", "one instruction an image"],
        "unknown": ["train.whatever: 1"],
        "elsewhere": ["rewards", "data.dataset_dir", "train.time_shift"],
    },
}


def found(text: str):
    source = read_source(text)
    return source, source.mapped(source.model or "kontext", source.gpus or 1)


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_become_ours(text, theirs):
    source, made = found(text)
    assert {key: made.settings.get(key, "missing") for key in SETTINGS[text]} == SETTINGS[text]
    assert set(made.settings) <= {key for key, _ in leaves(Config)}
    assert source.gpus == (8 if "window" in text else 2 if "yaml" in text else 4)
    assert source.project is (
        FLOW_FACTORY if "yaml" in text else DIFFUSION_NFT if "nft" in text else FLOW_GRPO
    )


@pytest.mark.parametrize("text", SAID)
def test_what_differs_or_is_not_there_is_said(text, theirs):
    _, made = found(text)
    for kind, starts in SAID[text].items():
        lines = getattr(made, kind)
        lines = list(itertools.chain(*lines.values())) if kind == "elsewhere" else lines
        for start in starts:
            assert any(start in line for line in lines), (kind, start, lines)
    headings = [line for line in made.lines() if not line.startswith("  ")]
    assert len(headings) == sum(
        bool(kind)
        for kind in (made.differs, made.nowhere, made.unknown, made.unread, made.elsewhere)
    )


@pytest.mark.parametrize("text", [*SETTINGS, "grpo.py:drawn"])
def test_nothing_that_is_given_is_dropped(text, theirs):
    """Each key is taken, told, or looked at for another one."""
    source, made = found(text)
    told = "\n".join(made.lines()) + "\n".join(made.origin.values())
    theirs_ = Theirs(source.given, source.project.table, source.model or "kontext", 4, text)
    mapped(source.project, theirs_)
    for key, value in source.given.items():
        quiet = value in (None, "", False, "auto", "default") or key in source.project.asks
        default = key in source.project.table and source.project.table[key].default == value
        nowhere = key in source.project.table and source.project.table[key].nowhere
        assert key in told or key in theirs_.used or quiet or default or nowhere, key


@pytest.mark.parametrize("project", [FLOW_GRPO, DIFFUSION_NFT, FLOW_FACTORY], ids=lambda p: p.name)
def test_every_row_says_one_thing(project):
    for key, row in project.table.items():
        assert isinstance(row, Row)
        assert sum(map(bool, (row.make, row.nowhere, row.elsewhere))) <= 1, key


@pytest.mark.parametrize("text", [*SETTINGS, "grpo.py:drawn"])
def test_init_writes_one_that_trains(text, theirs, capsys):
    """Through every check of `train`, with their lists in the file and on the terminal."""
    from editr2.cli.main import main

    assert main(["init", "mine", "--from", text]) == 0
    told = capsys.readouterr().out
    file = Path("mine/train.yaml").read_text()
    for line in found(text)[1].lines():
        assert line in told and f"# {line}" in file
    config, _ = run_config("editr2 train", "", ["--config", "mine/train.yaml"])
    config = check_config(config)
    assert config.policy.model == (found(text)[0].model or "kontext")
    assert config.reward.name == ("pku" if "nft" in text else "pixels")
    values = yaml.safe_load(file)
    for key, value in SETTINGS.get(text, {}).items():
        section, _, name = key.rpartition(".")
        given = (values[section] if section else values)[name]
        assert given == value, key
    assert "Was " in file


def test_what_is_not_accepted_here_is_left_out_and_said(theirs, capsys):
    from editr2.cli.main import main

    Path("factory.yaml").write_text(FACTORY.replace("noise_level: 0.8", "noise_level: 1.2"))
    assert main(["init", "mine", "--from", "factory.yaml", "--judge", "pku"]) == 0
    told = capsys.readouterr().out
    assert "  rollout.noise_level: 1.2 (accepted with rollout.dynamics cps: above 0" in told
    assert "noise_level" not in yaml.safe_load(Path("mine/train.yaml").read_text())["rollout"]


@pytest.mark.parametrize("end", ["\\n", "\\r", "\\x85", "\\u2028", "\\0", "\\x1b[2J"])
def test_no_text_of_theirs_ends_a_comment(end, theirs, capsys):
    """A key or a value of theirs that holds a line would be a setting of the written file."""
    from editr2.cli.main import main

    odd = f'"a{end}seed: 12345"'
    added = f"\n{odd}: {odd}\nunknown: {{{odd}: 1}}\n"
    text = FACTORY.replace("black-forest-labs/FLUX.1-Kontext-dev", odd)
    Path("factory.yaml").write_text(text + added)
    main(["init", "mine", "--from", "factory.yaml"])
    told = capsys.readouterr().out
    assert "12345" in told and all(line.isprintable() for line in told.splitlines())
    assert yaml.safe_load(Path("mine/train.yaml").read_text()).get("seed") != 12345


ODD = (None, "x", -1, [], {}, [1, 2, 3], 10**30, float("nan"))


@pytest.mark.parametrize("value", ODD, ids=str)
def test_an_odd_value_is_said_and_ends_nothing(value, theirs):
    """Under every key of every project."""
    for text in ("grpo.py:bagel", "grpo.py:nft", "factory.yaml"):
        source = read_source(text)
        for key in source.project.table:
            given = {**source.given, key: value}
            made = mapped(source.project, Theirs(given, source.project.table, "kontext", 4, text))
            assert all(isinstance(line, str) for line in made.lines())
            source.project.model(given), source.project.rewards(given)
            assert (source.project.gpus(given, given) or 1) > 0


@pytest.mark.parametrize(
    "text,says",
    [
        ("grpo.py", r"grpo.py:NAME; kontext, window, bagel, drawn, nft"),
        ("grpo.py:none", "a function of it: kontext"),
        ("nowhere.yaml", "no such file"),
        ("base.txt", "accepted: a YAML file of Flow-Factory"),
        ("ours.yaml", "no configuration of Flow-Factory"),
        ("broken.py:x", "broken.py:1: not Python"),
        ("other.py", "no configuration of flow_grpo"),
    ],
)
def test_what_is_no_configuration_of_theirs_is_refused(text, says, theirs):
    Path("base.txt").touch()
    Path("ours.yaml").write_text("policy: {model: klein}\ntrain: {lr: 1}\nmodel: 1\n")
    Path("broken.py").write_text("def (")
    Path("other.py").write_text("def one():\n    c = ConfigDict()\n    c.x = 1\n    return c\n")
    with pytest.raises(ConfigError, match=says):
        read_source(text)
