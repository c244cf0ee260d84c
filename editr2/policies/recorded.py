"""With which settings a policy that a run left edits, where it stands in a folder.

A run's folder has all of its settings in `config.yaml`; an export has those of them that say how
its policy edits in `editr2.yaml`, and what it lies over. What belongs to training, to data and
judges, or to the machine that a run was on is nobody else's, and is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editr2.config import Config, PolicyConfig
from editr2.config.fields import plain
from editr2.config.yaml import check_keys, dump_yaml, load_yaml
from editr2.errors import ConfigError

RUN, EXPORT = "config.yaml", "editr2.yaml"
"""The files."""
KEPT = ("best", "policy")
"""Folders of policies in a run's folder: of the best evaluation (`checkpoint.best`), and of its
end."""
QUESTIONS = "questions.json"
"""In a run and an export whose intents were asked for with other texts than ours: these."""
PEFT = "adapter_config.json"
"""In an export of adapters that peft puts on."""

OF_THE_MACHINE = frozenset(
    ("gradient_checkpointing", "compile", "attention", "branches", "shard_group", "cache")
)
"""Settings of a policy without which its numbers are the same, but for rounding."""
OF_ADAPTERS = frozenset(("lora_rank", "lora_alpha", "lora_targets", "lora_weights", "experts"))
RECORDED: Mapping[str, tuple[str, ...]] = {
    "policy": tuple(
        f.name for f in dataclasses.fields(PolicyConfig) if f.name not in OF_THE_MACHINE
    ),
    "rollout": (
        *("steps", "shift", "dynamics", "noise_level", "window", "window_range"),
        *("window_schedule", "window_every", "store_dtype", "groups_per_batch"),
    ),
    "eval": ("sampler", "steps", "intent_tokens"),
}
"""What is taken of a run's settings, by section: the policy's, and those of its sampler in
evaluations."""

Settings = dict[str, dict[str, Any]]

HEAD = "# How this policy edits, for `--policy` of `editr2`; policy.weights: what it lies over.\n"


def write_questions(folder: Path, policy: Any, config: PolicyConfig) -> bool:
    """Writes what `policy.questions` led to, of a policy that was loaded with it, and returns
    whether it led to anything: the file that it names may be another one later."""
    own = getattr(policy, "wording", None) if config.questions is not None else None
    if own is not None:
        said = json.dumps(dict(own.prompts.texts), indent=1) + "\n"
        (folder / QUESTIONS).write_text(said, encoding="utf-8")
    return own is not None


def write_settings(
    folder: Path,
    config: Config,
    base: str | None,
    *,
    whole: bool,
    policy: Any = None,
) -> None:
    """Writes an export's file, and its questions. config: of its run. base: the weights that it
    lies over (none: the model's own). whole: it holds all weights. policy: that was loaded."""
    values: Settings = plain(config)
    taken = {
        section: {name: values[section][name] for name in names if name not in OF_ADAPTERS}
        for section, names in RECORDED.items()
    }
    there = base is not None and Path(base).is_dir()
    taken["policy"]["weights"] = str(Path(base).resolve()) if base and there else base
    if whole:
        del taken["policy"]["weights"]
    if write_questions(folder, policy, config.policy):
        taken["policy"]["questions"] = QUESTIONS
    (folder / EXPORT).write_text(HEAD + dump_yaml(taken), encoding="utf-8")


def read_settings(file: Path) -> Settings:
    """What is taken of a file, by section and field. Raises `ConfigError` naming its line."""
    values, lines = load_yaml(file)
    taken = {
        section: {name: given[name] for name in names if name in given}
        for section, names in RECORDED.items()
        if isinstance(given := values.get(section), dict)
    }
    check_keys(taken, lines, Config, file)
    if taken.get("policy", {}).get("questions") and (file.parent / QUESTIONS).is_file():
        taken["policy"]["questions"] = str(file.parent / QUESTIONS)
    return taken


def settings_file(folder: Path) -> Path | None:
    """Where the settings of the policy in a folder are: in an export's, or in the run's whose
    `best/` or `policy/` it is."""
    here = folder.absolute()
    places = [here / EXPORT, *([here.parent / RUN] if here.name in KEPT else [])]
    return next((file for file in places if file.is_file()), None)


def without_adapters(config: PolicyConfig, weights: str | None) -> PolicyConfig:
    """The settings of weights beside which there are no adapters to train, and which are not
    quantized: only a base below adapters is."""
    return dataclasses.replace(
        config,
        weights=weights,
        lora_rank=0,
        lora_alpha=None,
        lora_targets=None,
        lora_weights=None,
        experts="all",
        quantize="none",
    )


def over_its_base(config: PolicyConfig) -> tuple[PolicyConfig, Path | None]:
    """Of `policy.weights` that are adapters for peft: the settings of what they lie over, and
    their folder; of any other, the settings and None. Raises `ConfigError` where nothing says what
    they lie over, or it is not there."""
    if config.weights is None or not (Path(config.weights) / PEFT).is_file():
        return config, None
    folder = Path(config.weights)
    if config.lora_weights is not None:
        raise ConfigError(
            f"policy.lora_weights: {config.lora_weights} (accepted with policy.weights {folder}, "
            f"which is a LoRA: none)"
        )
    file = folder / EXPORT
    if not file.is_file():
        raise ConfigError(
            f"policy.weights: {folder}: no {EXPORT} beside {PEFT} (accepted: a folder that `editr2 "
            f"export` wrote, which says what the adapters lie over)"
        )
    base = read_settings(file).get("policy", {}).get("weights")
    if base is not None and Path(base).is_absolute() and not Path(base).is_dir():
        raise ConfigError(
            f"{file}: policy.weights: {base} is not there (accepted: the new place of what the "
            f"adapters lie over)"
        )
    return without_adapters(config, base), folder
