"""A configuration of another trainer, found out by what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.config.yaml import load_yaml
from editr2.errors import ConfigError
from editr2.recipes.diffusion_nft import DIFFUSION_NFT
from editr2.recipes.flow_factory import FLOW_FACTORY, WHOLE
from editr2.recipes.flow_grpo import FLOW_GRPO
from editr2.recipes.mapped import Mapped, Project, Rewarded, Theirs, flat, mapped
from editr2.recipes.python_config import function_names, read_python_config

MAPPINGS = ("reward_fn", "prompt_fn_kwargs")
"""Keys whose values are mappings of names that a user chooses."""
STOCK = "kontext"
"""Where theirs is no editor and none is named."""


@dataclass(frozen=True)
class Source:
    """A configuration of a project. title: the file and its name in it. model: our editor of it, or
    None. gpus: that it was meant for, or None where it does not say."""

    project: Project
    title: str
    given: Mapping[str, Any]
    model: str | None
    gpus: int | None
    rewards: list[Rewarded]
    notes: list[str]

    def mapped(self, model: str, gpus: int) -> Mapped:
        """Its settings as ours, for an editor and so many GPUs."""
        theirs = Theirs(self.given, self.project.table, model, gpus, self.title)
        made = mapped(self.project, theirs)
        made.unread += self.notes
        return made


def read_source(text: str) -> Source:
    """What `--from FILE` or `--from FILE.py:NAME` names. Raises `ConfigError`, one line, where it
    is not there, is no configuration of a project that is known, or holds several and none is
    named."""
    file, _, name = text.partition(":") if not Path(text).is_file() else (text, "", "")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--from: {text}: no such file")
    if path.suffix in (".yaml", ".yml"):
        if name:
            raise ConfigError(f"--from: {text} (accepted: a YAML file has no {name!r} in it)")
        return _yaml_source(path)
    if path.suffix != ".py":
        raise ConfigError(
            f"--from: {text} (accepted: a YAML file of Flow-Factory, a Python file of flow_grpo or "
            f"DiffusionNFT)"
        )
    return _python_source(path, name)


def _yaml_source(path: Path) -> Source:
    values, _ = load_yaml(path)
    if not {"model", "train"} <= set(values) or "policy" in values:
        raise ConfigError(
            f"--from: {path}: no configuration of Flow-Factory (accepted: one, with the sections "
            f"model and train)"
        )
    given = flat(values, whole=WHOLE)
    project = FLOW_FACTORY
    gpus = project.gpus(given, {})
    rewards = project.rewards(given)
    return Source(project, path.name, given, project.model(given), gpus, rewards, [])


def _python_source(path: Path, name: str) -> Source:
    if not name:
        known = function_names(path)
        if len(known) != 1:
            listed = ", ".join(known) or "none in this file"
            raise ConfigError(
                f"--from: {path}: which of its configurations? (accepted: {path}:NAME; {listed})"
            )
        (name,) = known
    read = read_python_config(path, name, whole=MAPPINGS)
    if not {"sample.num_steps", "train.learning_rate"} & set(read.values):
        raise ConfigError(
            f"--from: {path}:{name}: no configuration of flow_grpo or DiffusionNFT (accepted: one, "
            f"with sample and train)"
        )
    nft = {"beta", "decay_type"} & set(read.values)
    project = DIFFUSION_NFT if nft else FLOW_GRPO
    rewards = project.rewards(read.values)
    gpus = project.gpus(read.values, read.names)
    title = f"{path.name}:{name}"
    notes = [str(place) for place in read.unread]
    return Source(project, title, read.values, project.model(read.values), gpus, rewards, notes)
