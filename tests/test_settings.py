"""Every setting has a rule, in every command.

Each field of `Config` meets 0, -1, NaN, infinity, a huge number, a value of another type and a
choice that there is not: by the rules of train, check, eval and rollout, by all three ways in
(Python, YAML, flags), and what is accepted runs. What is accepted is written down here by hand
(`ZERO`, `MINUS_ONE`) or follows from the kind of the field, not from its bounds.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from PIL import Image

from editr2.cli import main as cli
from editr2.cli.settings import run_config
from editr2.config import (
    PRESETS,
    Config,
    PolicyConfig,
    RewardConfig,
    folder_problem,
    preset_config,
    replace_nested,
)
from editr2.config.fields import Slot, field_problems, leaves, mended
from editr2.config.patterns import pattern_problem
from editr2.config.settings import noise_levels, rollout_dynamics
from editr2.errors import ConfigError, UserError
from editr2.policies.configured import FIELDS as POLICY_FIELDS
from editr2.policies.pipelines import PipelineModel
from editr2.policies.rules import check_config, config_problems
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.unified.pretrain import PretrainConfig
from editr2.reproduce.arms import Settings
from editr2.rewards.adapt import panel
from editr2.rewards.base import Score
from editr2.rl.drift import MEASURES
from editr2.rl.rules import run_problems
from editr2.run.identity import named
from editr2.training import train
from editr2_kernels import KL_SCALES, RENORMS, flow_sigmas, transition_table
from editr2_kernels.group_advantage import FUSIONS

COMMANDS = ("train", "check", "eval", "rollout")
TRAINS = ("train", "check")
HUGE = 10**20
NAN, INF = float("nan"), float("inf")
NO_CHOICE = "no-such-choice"
# The loss says what `train.loss_options` takes (tests/test_losses.py), the reward what
# `reward.options` does (tests/test_rewards_used.py), a tracker what `tracking_options` does.
OPTIONS = ("train.loss_options", "reward.options", "tracking_options")
FIELDS: dict[str, Slot] = {k: v for k, v in leaves(Config) if k not in OPTIONS}

ZERO = {
    "reward.retries",
    "seed",
    "policy.guidance",
    "policy.guidance_image",
    "policy.guidance_interval",  # what it asks for together is the editor's to say
    "policy.guidance_embed",
    "policy.lora_rank",
    "rollout.window",
    "train.betas",
    "train.warmup",
    "train.lr_decay",
    "train.weight_decay",
    "train.kl_weight",
    "train.text_weight",
    "train.old_decay",
    "train.old_decay_max",
    "train.max_failed_scores",
    "eval.sessions",
    "eval.every",
    "eval.strips",
    "eval.drift.structure",
    "credit.weights",
}
"""Numbers that may be 0; every other is at least 1 or above 0."""
MINUS_ONE = {"credit.weights"}
"""A reward that is a penalty."""


def kinds(field: str | Slot) -> list[Any]:
    """The types of a field but for none, those within its lists and mappings in place of these."""
    hint = (FIELDS[field] if isinstance(field, str) else field).hint
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    found: list[Any] = []
    for option in options:
        inner = get_origin(option) in (list, tuple, dict)
        found += [get_args(option)[-1] if inner else option]
    return [kind for kind in found if kind is not type(None)]


def is_number(key: str) -> bool:
    return any(kind in (int, float) for kind in kinds(key))


def is_choice(key: str) -> bool:
    return FIELDS[key].accepts.among is not None or any(
        get_origin(kind) is Literal for kind in kinds(key)
    )


def is_text(key: str) -> bool:
    return str in kinds(key) and not is_choice(key)


def placed(key: str, value: Any) -> Any:
    """The value as the field holds one: in a pair, or under a reward's name."""
    hint = FIELDS[key].hint
    option = next(
        o
        for o in (get_args(hint) if type(None) in get_args(hint) else (hint,))
        if o is not type(None)
    )
    if get_origin(option) is tuple:
        return [value, value]
    return {"IF": value, "CC": 0.5, "GA": 0.5} if get_origin(option) is dict else value


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, name = key.split(".")
    values: dict[str, Any] = {name: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def values_of(key: str) -> dict[str, Any]:
    """What every field meets. The value of another type is one for each kind."""
    other_type = {"text": 3.5, "number": "many", "choice": 3.5, "switch": "perhaps"}
    kind = (
        "number"
        if is_number(key)
        else "choice"
        if is_choice(key)
        else "text"
        if is_text(key)
        else "switch"
    )
    given = {"0": 0, "-1": -1, "nan": NAN, "inf": INF, "huge": HUGE, "type": other_type[kind]}
    return {name: placed(key, value) for name, value in given.items()} | {"choice": NO_CHOICE}


CASES = [(key, name) for key in FIELDS for name in values_of("seed")]


def is_accepted(key: str, name: str) -> bool:
    """The oracle."""
    if name == "0":
        return key in ZERO
    if name == "-1":
        return key in MINUS_ONE
    return (name == "choice" and is_text(key) and key != "policy.lora_targets") or (name, key) == (
        "choice",
        LORA,
    )


LORA = "policy.lora_targets"  # any text without brackets is an expression


def problems_of(config: Config, command: str) -> list[str]:
    return list(run_problems(config, None, None, processes=1, command=command))


@pytest.mark.parametrize("schema", [Config, PretrainConfig, Settings])
def test_every_number_has_bounds_or_an_explicit_any(schema):
    fields = dict(leaves(schema))
    unbounded = [
        key
        for key, slot in fields.items()
        if {int, float} & set(kinds(slot)) and not slot.accepts.bounds
    ]
    assert not unbounded, f"give {unbounded} Bounds, or ANY where every finite number is of use"
    assert set(FIELDS) >= ZERO | MINUS_ONE


def test_closed_choices_are_those_of_the_operators():
    def choices(key):
        return set(get_args(kinds(key)[0]))

    assert choices("policy.renorm") == {"auto", *RENORMS}
    assert choices("train.kl_scale") == set(KL_SCALES)
    assert choices("credit.fusion") == set(FUSIONS)


def test_the_defaults_and_every_preset_break_no_rule():
    for name in (None, *PRESETS):
        for command in COMMANDS:
            assert not problems_of(preset_config(name), command), (name, command)


def test_every_field_meets_every_value():
    """What a field by itself does not accept is one line that names it and says what is accepted,
    in each command."""
    wrong = []
    for key, name in CASES:
        value = values_of(key)[name]
        config = with_raw(key, value)
        found = [problem for where, problem in field_problems(config) if where == key]
        if len(found) != (not is_accepted(key, name)):
            wrong.append((key, name, found))
        if found and any(
            next(config_problems(config, command)) != found[0] for command in COMMANDS
        ):
            wrong.append((key, name, "not in every command"))
        if found and ("(accepted: " not in found[0] or "\n" in found[0] or "<class" in found[0]):
            wrong.append((key, name, found))
    assert not wrong


def with_raw(key: str, value: Any) -> Config:
    """A configuration made in Python without the converter."""

    def changed(part: Any, names: Sequence[str]) -> Any:
        name, *rest = names
        inner = changed(getattr(part, name), rest) if rest else value
        return dataclasses.replace(part, **{name: inner})

    made: Config = changed(Config(), key.split("."))
    return made


def said_by_python(key: str, value: Any) -> str | None:
    try:
        check_config(replace_nested(Config(), nested(key, value)))
    except ConfigError as error:
        return str(error)
    return None


def said_by_yaml(key: str, value: Any, folder: Path) -> str | None:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(nested(key, value), sort_keys=False))
    line = len(key.split("."))
    try:
        check_config(run_config("editr2 train", "x", ["--config", str(file)])[0])
    except ConfigError as error:
        place, message = str(error).split(": ", 1)
        assert (
            place.startswith(f"{file}:") and line <= int(place.removeprefix(f"{file}:")) <= line + 2
        )
        return message
    return None


def said_by_flag(key: str, value: Any) -> str | None:
    text = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    )
    try:
        check_config(run_config("editr2 train", "x", [f"--{key}={text.strip()}"])[0])
    except ConfigError as error:
        return str(error)
    return None


def test_all_ways_in_say_the_same(tmp_path):
    """A flag is a text, so it cannot be of another type where a text is wanted; where a list is, it
    is one of one."""
    different = []
    for key, name in CASES:
        value = values_of(key)[name]
        said = {"python": said_by_python(key, value)}
        if is_accepted(key, name) or said["python"] is None:
            continue
        said["yaml"] = said_by_yaml(key, value, tmp_path)
        listed = isinstance(value, str) and "(accepted: a list of" in said["python"]
        if not (listed or is_text(key) or (is_choice(key) and name != "choice")):
            said["flag"] = said_by_flag(key, value)
        if len(set(said.values())) != 1:
            different.append((key, name, said))
    assert not different


@pytest.mark.parametrize(
    "settings, want",
    [
        ({"train": {"lr": "3e-4"}}, ("train.lr", 3e-4)),
        ({"train": {"lr": 1}}, ("train.lr", 1.0)),
        ({"train": {"ema": "none"}}, ("train.ema", None)),
        ({"train": {"betas": [0, 0.5]}}, ("train.betas", (0.0, 0.5))),
        ({"train": {"packed": True}}, ("train.packed", "on")),
        ({"credit": {"std": False}}, ("credit.std", "off")),
        ({"data": {"resize": False}}, ("data.resize", "no")),
        ({"credit": {"aggregate": "none"}}, ("credit.aggregate", None)),
        ({"out": Path("~") / "runs"}, ("out", str(Path.home() / "runs"))),
        ({"data": {"path": "~/a", "heldout": "hf:a/b"}}, ("data.path", str(Path.home() / "a"))),
        ({"policy": {"weights": "~/w"}}, ("policy.weights", str(Path.home() / "w"))),
        ({"policy": {"negative_prompt": ""}}, ("policy.negative_prompt", "")),
    ],
)
def test_values_of_python_and_yaml_are_converted(settings, want, tmp_path):
    key, value = want
    plain = json.loads(json.dumps(settings, default=str))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain))
    read = run_config("editr2 train", "x", ["--config", str(tmp_path / "c.yaml")])[0]
    section = replace_nested(Config(), settings)
    direct = Config(
        **{
            k: dataclasses.replace(getattr(Config(), k), **v) if isinstance(v, dict) else v
            for k, v in settings.items()
        }
    )
    for config in (section, read, mended(direct)):
        for part in key.split("."):
            config = getattr(config, part)
        assert config == value and type(config) is type(value)


# ----------------------------------------------------------------- what fields demand of each other


TOGETHER = [
    # the rule is the command's that uses the fields, and nobody else's
    (
        {"rollout": {"noise_level": 1.3}},
        "rollout.noise_level: 1.3 (accepted with rollout.dynamics cps: ab",
        COMMANDS,
    ),
    (
        {"rollout": {"noise_level": 1.3, "dynamics": "ddim-sde"}},
        "rollout.noise_level: 1.3 (accepted with",
        COMMANDS,
    ),
    ({"rollout": {"noise_level": 1.3, "dynamics": "flow-sde"}}, None, ()),
    (
        {"rollout": {"noise_level": 1.3}, "eval": {"sampler": "ode"}},
        "rollout.noise_level: 1.3",
        TRAINS,
    ),
    ({"rollout": {"window": 9}}, "rollout.window: 9 (accepted: 0 to rollout.steps = 4)", COMMANDS),
    ({"eval": {"steps": 1}}, "rollout.window: 2 (accepted: 0 to eval.steps = 1)", COMMANDS),
    ({"rollout": {"window": 0}}, "rollout.window: 0 (accepted: at least 1; without", TRAINS),
    ({"rollout": {"sessions": 100_000, "siblings": 64}}, "rollout.sessions: 100000 (acc", TRAINS),
    (
        {"policy": {"offload": True}},
        "policy.offload: True (accepted with policy.model unified",
        COMMANDS,
    ),
    (
        {"policy": {"model": "kontext"}},
        "data.path: none (accepted with policy.model kontext",
        COMMANDS,
    ),
    ({"policy": {"model": "kontext"}, "data": {"heldout": "x"}}, "data.path: none", TRAINS),
    (
        {"policy": {"model": "kontext", "shard_group": 2}, "data": {"path": "x"}},
        "policy.shard_group: 2 (accepted with policy.shard false: none)",
        COMMANDS,
    ),
    ({"train": {"stop_after": 3}}, "train.stop_after: 3 (accepted with checkpoint.best", TRAINS),
    (
        {"train": {"stop_after": 3}, "checkpoint": {"best": "IF"}},
        "train.stop_after: 3 (accepted with eval.every 0: none",
        TRAINS,
    ),
    ({"train": {"minibatches": 7}}, "train.minibatches: 7 (accepted: a divisor of 2", TRAINS),
    ({"train": {"micro_batch": 2, "context_gradient": True}}, "train.micro_batch: 2", TRAINS),
    (
        {"train": {"packed": "on", "micro_batch": "auto"}},
        "train.micro_batch: auto (accepted with train.packed on: none, or a number)",
        TRAINS,
    ),
    (
        {
            "train": {"packed": "on", "micro_batch": 2, "context_gradient": True},
            "policy": {"guidance": 2},
        },
        None,
        (),
    ),
    ({"out": __file__}, "out: ", ("train", "check")),
    ({"out": f"{__file__}/run"}, "out: ", ("train", "check")),
]


@pytest.mark.parametrize("settings, message, commands", TOGETHER)
def test_fields_meet_each_other_in_the_commands_that_use_them(settings, message, commands):
    config = replace_nested(Config(), settings)
    for command in COMMANDS:
        found = [p for p in problems_of(config, command) if message and p.startswith(message)]
        assert len(found) == (command in commands), (command, problems_of(config, command))
        assert message is not None or not problems_of(config, command)


@pytest.mark.parametrize(
    "field, old, new",
    [
        ("gradient_checkpointing", "true", "all"),
        ("gradient_checkpointing", "false", "off"),
        ("gradient_checkpointing", "1", 1),
        ("compile", "true", "on"),
        ("compile", "false", "off"),
        ("compile", "auto", "auto"),
    ],
)
def test_old_spellings_mean_what_they_meant(field, old, new, tmp_path):
    """In Python, YAML, flags and what an older run saved."""
    file, value = tmp_path / "run.yaml", json.loads(old) if old != "auto" else old
    file.write_text(f"policy:\n  {field}: {old}\n")
    said = [
        replace_nested(Config(), {"policy": {field: value}}),
        dataclasses.replace(Config(), policy=PolicyConfig(**{field: value})),
        run_config("x", "", ["--config", str(file)])[0],
        run_config("x", "", [f"--policy.{field}", old])[0],
    ]
    for config in said:
        assert getattr(config.policy, field) == new
        assert type(getattr(config.policy, field)) is type(new)
    before = dataclasses.asdict(Config()) | {"policy": {field: value}}
    assert named(before, None)[f"policy.{field}"] == new
    if old == "true":  # as a switch, too
        assert getattr(run_config("x", "", [f"--policy.{field}"])[0].policy, field) == new
    assert run_config("x", "", ["--train.micro_batch", "none"])[0].train.micro_batch is None


def test_the_noise_levels_accepted_are_those_that_the_table_takes():
    for dynamics in rollout_dynamics():
        bounds = noise_levels(dynamics)
        for level in (0.3, 0.999, 1.0, 1.3, 10.0, 11.0, NAN, INF, 0.0, -0.1):
            if not bounds.hold(level):
                continue
            table = transition_table(flow_sigmas(8), dynamics=dynamics, noise_level=level)
            assert table.isfinite().all(), (dynamics, level)
        with pytest.raises(ValueError):
            transition_table(flow_sigmas(8), dynamics=dynamics, noise_level=-0.1)
    assert not noise_levels("cps").hold(1.3) and noise_levels("flow-sde").hold(1.3)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert folder_problem(tmp_path / "a" / "b") is None and not (tmp_path / "a").exists()
    assert folder_problem("") is None
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert folder_problem(tmp_path / "a") == f"{tmp_path} is not yours to write into"


@pytest.mark.parametrize(
    "expression, problem",
    [
        (r".*\.(q|k|v|o|gate|up|down)_proj(_moe_gen)?", None),
        (
            r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)|ff(_context)?\.net\.2)",
            None,
        ),
        (r".*blocks\.\d+\..*attn.*to_(q|k|v)", None),
        (r"(?!.*context).*\.attn\.to_[qkv]", None),
        ("all-linear", None),
        ("to_(q", "unterminated subpattern"),
        ("*", "nothing to repeat"),
        ("a{99999999999}", "too large"),
        ("(" * 5000, "nested too deeply|missing"),
        ("(a+)+b", "too many ways"),
        ("(a|aa)+b", "too many ways"),
        ("([a-z]+)*", "too many ways"),
        ("(.*)*x", "too many ways"),
        ("(a?){40}a{40}", "too many ways"),
        (".*.*.*.*.*.*.*x", "too many ways"),
        (r"(?=(a+)+b).*", "too many ways"),
        (r"((a+)\2)+b", "too many ways"),
        ("(?i:(x+x+)+y)", "too many ways"),
    ],
)
def test_expressions_that_cannot_be_matched_in_time(expression, problem):
    start = time.process_time()
    found = pattern_problem(expression)
    assert time.process_time() - start < 2
    if problem is None:
        assert found is None
        start = time.process_time()
        for name in (
            "transformer_blocks.11.attn.to_q",
            "a" * 60,
            ".".join("abc" * 12),
            "x" * 30 + ".attn." * 5,
        ):
            re.fullmatch(expression, name)
        assert time.process_time() - start < 1
    else:
        assert found is not None and re.search(problem, found)


# ---------------------------------------------------------------------------- what is accepted runs


class Bright:
    """Scores that differ between siblings, so that there is something to train on."""

    names = ("IF", "CC", "GA")

    def __call__(self, session, images):
        return [
            {n: Score(float(image[..., k].mean() / 255)) for k, n in enumerate(self.names)}
            for image in images
        ]


NOT_A_USE = {
    "dataclasses",
    "copy",
    "editr2.config.fields",
    "editr2.config.yaml",
    "editr2.config.presets",
    "editr2.config.rules",
    "editr2.policies.configured",
    "editr2.policies.rules",
    "editr2.rl.rules",
}
"""Modules that read every field: to copy, to write down, to check."""


def recording(value: Any, seen: set[str], prefix: str = "") -> Any:
    """The same configuration. The dotted key of every field that is read, but by `NOT_A_USE`, is
    added to `seen`."""
    kind = type(value)
    names = {f.name for f in dataclasses.fields(kind)}

    def look(self: Any, name: str) -> Any:
        if name in names and sys._getframe(1).f_globals["__name__"] not in NOT_A_USE:
            seen.add(prefix + name)
        return object.__getattribute__(self, name)

    made = object.__new__(type(kind.__name__, (kind,), {"__getattribute__": look}))
    for name in names:
        part = getattr(value, name)
        nested = dataclasses.is_dataclass(part)
        object.__setattr__(
            made, name, recording(part, seen, f"{prefix}{name}.") if nested else part
        )
    return made


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> dict[str, Any]:
    """The smallest run there is: a policy of two narrow layers, two sessions of two turns."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    weights = tmp_path_factory.mktemp("policy")
    policy.save(weights)
    return {
        "policy": {"weights": str(weights), "intent_tokens": 4},
        "rollout": {
            "sessions": 2,
            "siblings": 2,
            "turns": 2,
            "steps": 4,
            "window": 1,
            "groups_per_batch": 2,
        },
        "train": {"iterations": 1},
        "eval": {"sessions": 1, "strips": 1},
    }


@pytest.fixture(scope="session")
def editor(beside, tmp_path_factory) -> dict[str, Any]:
    """The same with a tiny kontext, for the settings of models on diffusers."""
    tiny, folder = beside("tiny_editors"), tmp_path_factory.mktemp("kontext")
    tiny.kontext_pipeline().save_pretrained(folder / "weights")
    lines = []
    for i, image in enumerate(tiny.pictures(2, (32, 32))):
        Image.fromarray(image).save(folder / f"{i}.png")
        turns = [{"instruction": "Paint it red."}, {"instruction": "Now blue."}]
        lines.append(json.dumps({"image": f"{i}.png", "turns": turns}))
    (folder / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    policy = {
        "model": "kontext",
        "weights": str(folder / "weights"),
        "resolution": (32, 32),
        "lora_rank": 2,
    }
    return {
        "policy": policy | {"text_tokens": 24},
        "data": {"path": str(folder / "sessions.jsonl")},
    }


@pytest.fixture(scope="session")
def bagel(beside, tmp_path_factory) -> dict[str, Any]:
    """The same with a tiny BAGEL, for the settings that are its own."""
    tiny, folder = beside("tiny_bagel"), tmp_path_factory.mktemp("bagel")
    policy = {"model": "bagel", "weights": str(tiny.write(folder / "weights"))}
    return {
        "policy": {**policy, "resolution": (32, 32), "lora_rank": 2, "intent_tokens": 4},
        "data": {"path": str(tiny.sessions(folder, (2, 2)))},
    }


NFT = {"rollout": {"window": 0, "shared_noise": False}, "train": {"loss": "nft"}}
NEEDS: dict[str, dict[str, Any]] = {
    "policy.lora_alpha": {"policy": {"lora_rank": 2}},
    "policy.lora_targets": {"policy": {"lora_rank": 2}},
    "policy.thinking_tokens": {"policy": {"thinking": True}},
    "policy.renorm": {"policy": {"guidance": 2.0}},
    "rollout.window_every": {"rollout": {"window_schedule": "progressive"}},
    "data.limit": {"data": {"path": str(Path(__file__).parent.parent / "examples" / "shapes")}},
    "data.resize": {"data": {"path": str(Path(__file__).parent.parent / "examples" / "shapes")}},
    "train.kl_scale": {"train": {"kl_weight": 0.1}},
    "train.stop_after": {"checkpoint": {"best": "reward"}, "eval": {"every": 1}},
    **dict.fromkeys(
        ("train.nft_beta", "train.nft_draws", "train.old_decay", "train.old_decay_max"), NFT
    ),
}
"""What else is set where a field is of use only then."""


def accepted_values(key: str) -> Iterator[Any]:
    """What the oracle accepts, every choice, the least number, the largest that is no count, and
    none if it is one."""
    slot = FIELDS[key]
    values = [value for name, value in values_of(key).items() if is_accepted(key, name)]
    bounds = slot.accepts.bounds
    if bounds is not None and bounds.at_least is not None:
        values.append(placed(key, int(bounds.at_least)))
    values += [True, False] if bool in kinds(key) else []
    values += [
        choice for kind in kinds(key) if get_origin(kind) is Literal for choice in get_args(kind)
    ]
    values += list(slot.accepts.among()) if slot.accepts.among else []
    if float in kinds(key) and bounds is not None and bounds.at_most is not None:
        values.append(placed(key, bounds.at_most))
    values += [FIELDS[key].accepts.bounds.at_most] if key == "seed" else []
    values += [None] if type(None) in get_args(slot.hint) else []
    yield from {repr(value): value for value in values}.values()


RUNS = [(key, value) for key in FIELDS for value in accepted_values(key)]


def assembled(key: str, value: Any, start: dict[str, Any], out: Path) -> Config:
    config: Config = Config(out=str(out))
    for part in (start, NEEDS.get(key, {}), nested(key, value)):
        config = replace_nested(config, part)
    return config


BUDGET = 120
"""Seconds of the CPU for the smallest run with one setting changed. It takes 0.4, and 30 where it
is compiled."""


def runs(command: str, monkeypatch: pytest.MonkeyPatch, reward: Any) -> Any:
    """What a command does with a configuration."""
    if command == "train":
        return lambda config: train(config, reward=reward)

    def run(config: Config) -> None:
        monkeypatch.setattr(
            "editr2.cli.settings.run_config",
            lambda *a, **k: (config, {"notes": [], "out": "scored"}),
        )
        monkeypatch.setattr("editr2.scoring._write", lambda *written: None)  # all of the settings
        if reward is not None:
            for home in ("editr2.rewards.load", "editr2.scoring"):
                monkeypatch.setattr(f"{home}.load_reward", lambda *given: panel(reward))
        cli.COMMANDS[command]([])

    return run


EDITORS = {f"policy.{name}" for name in POLICY_FIELDS if name not in UnifiedPolicy.uses}
BAGEL = {key for key in EDITORS if key.removeprefix("policy.") not in PipelineModel.uses}
FIXED = {
    "seed=9223372036854775807",
    "out='no-such-choice'",
    "data.path=None",
    "data.path='no-such-choice'",
    "data.limit=1",
    "data.resize='crop'",
    "policy.weights='no-such-choice'",
    "policy.intent=False",
    "policy.intent_tokens=1",
    "policy.guidance=0",
    "policy.renorm='channel'",
    "policy.lora_alpha=None",
    "policy.lora_targets='no-such-choice'",
    "reward.function='no-such-choice'",
    "rollout.sessions=1",
    "rollout.siblings=2",
    "rollout.turns=1",
    "rollout.steps=1",
    "rollout.shift=100",
    "rollout.dynamics='dance-sde'",
    "rollout.window=0",
    "rollout.window_schedule='progressive'",
    "rollout.shared_noise=False",
    "rollout.store_dtype='bfloat16'",
    "rollout.capture='graph'",
    "credit.preset='gdpo'",
    "credit.weights={'IF': 0, 'CC': 0.5, 'GA': 0.5}",
    "credit.aggregate='prefix'",
    "credit.std='off'",
    "train.lr=1",
    "train.betas=[0, 0]",
    "train.kl_weight=0",
    "train.nft_draws=1",
    "train.packed='off'",
    "train.micro_batch=1",
    "train.ema=None",
    "train.max_failed_scores=0",
    "eval.sampler='ode'",
    "eval.steps=1",
    "eval.strips=0",
}
"""The forty that `make test` runs."""
SAMPLED = {
    "data.path",
    "data.heldout",
    "data.resize",
    "policy.model",
    "policy.weights",
    "policy.intent",
    "policy.temperature",
    "policy.intent_tokens",
    "policy.questions",
    "policy.guidance",
    "policy.guidance_image",
    "policy.guidance_interval",  # what it asks for together is the editor's to say
    "policy.renorm",
    "policy.lora_rank",
    "policy.lora_weights",
    "policy.experts",
    "policy.gradient_checkpointing",
    "policy.buckets",
    "policy.shard",
    "policy.shard_group",
    "rollout.turns",
    "rollout.steps",
    "rollout.shift",
    "rollout.dynamics",
    "rollout.noise_level",
    "rollout.window",
    "rollout.window_range",
    "rollout.window_schedule",
    "rollout.groups_per_batch",
    "eval.sessions",
    "eval.turns",
    "eval.sampler",
    "eval.steps",
}
READS = {
    "eval": SAMPLED
    | {"rollout.store_dtype", "eval.intent_tokens", "credit.weights", "data.limit", "seed"}
    | {"train.max_failed_scores", "eval.reward", "eval.strips"}
    | {f"eval.drift.{name}" for name in MEASURES}
    | {
        f"reward.{field.name}"
        for field in dataclasses.fields(RewardConfig)
        if field.name != "options"
    },
    "rollout": SAMPLED | {"rollout.store_dtype", "eval.intent_tokens", "seed"},
}
"""What the commands that do not train look at in a run of the unified policy."""


def cases(commands: Sequence[str]) -> list[Any]:
    """Every accepted value, for the commands that read it; all but `FIXED` of train are for `make
    test-all`."""
    found = []
    for command in commands:
        for key, value in RUNS:
            if command != "train" and key not in READS[command]:
                continue
            name = f"{key}={value!r}"
            marks = () if command == "train" and name in FIXED else pytest.mark.exhaustive
            found.append(pytest.param(command, key, value, id=f"{command}: {name}", marks=marks))
    return found


def test_the_fixed_ones_are_among_all():
    assert len(FIXED) == 40 and {f"{key}={value!r}" for key, value in RUNS} >= FIXED


@pytest.mark.parametrize("command, key, value", cases(("train", "eval", "rollout")))
def test_what_is_accepted_runs_and_is_used_or_refused_in_one_line(
    command, key, value, start, request, tmp_path, monkeypatch
):
    if key in EDITORS:
        editor = request.getfixturevalue("bagel" if key in BAGEL else "editor")
        config = assembled(key, value, {**start, **editor}, tmp_path)
    else:
        config = assembled(key, value, start, tmp_path)
    monkeypatch.chdir(tmp_path)
    if key != "eval.strips":
        monkeypatch.setattr("editr2.training.build_report", lambda run: run)
    seen: set[str] = set()
    began = time.process_time()
    try:
        named = key in ("reward.function", "reward.name")
        runs(command, monkeypatch, None if named else Bright())(recording(config, seen))
    except UserError as error:
        message = str(error)
        named = re.match(r"[a-z_]+(\.[a-z_]+)+: ", message) or str(value) in message
        assert named and "\n" not in message, message
    else:
        assert key in seen, f"{key} was not read"
    assert time.process_time() - began < BUDGET


@pytest.mark.parametrize("command", READS)
def test_a_command_reads_what_its_rules_are_for(command, start, tmp_path, monkeypatch):
    seen: set[str] = set()
    config = assembled("out", str(tmp_path), start, tmp_path)
    monkeypatch.chdir(tmp_path)
    runs(command, monkeypatch, Bright())(recording(config, seen))
    assert {key for key in seen if key in FIELDS} == READS[command] - {"data.limit"}  # of files


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--policy.dtype=float16", "policy.dtype: 'float16' (accepted: float32, bfloat16)"),
        ("--eval.sampler=foo", "eval.sampler: 'foo' (accepted: rollout, ode)"),
        (
            "--train.max_failed_scores=.nan",
            "train.max_failed_scores: nan (accepted: a number, 0 to 1)",
        ),
        (
            "--rollout.noise_level=1.3",
            "rollout.noise_level: 1.3 (accepted with rollout.dynamics cps: above 0, at mo",
        ),
        (
            "--seed=100000000000000000000",
            "seed: 100000000000000000000 (accepted: a whole number, 0 to 92233720368",
        ),
        (
            "--policy.lora_targets=(a+)+",
            "policy.lora_targets: '(a+)+' (accepted: a regular expression or none; this",
        ),
    ],
)
def test_every_command_has_the_rules(command, flag, message, capsys, monkeypatch):
    """Before a policy is loaded or a file is made."""

    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    for module in ("editr2.policies.load", "editr2.rl.loop"):
        monkeypatch.setattr(f"{module}.open_policy", loaded)
    assert cli.main([command, flag]) == 2
    said = capsys.readouterr().err.removeprefix("error: ")
    assert said.startswith(message) and said.count("\n") == 1
