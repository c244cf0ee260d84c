"""Settings to begin with, for an editor, data, a judge and a machine: those of the recipe that is
nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editr2.check.devices import find_device
from editr2.config import Config, PolicyConfig, RewardConfig, replace_nested
from editr2.config.fields import plain
from editr2.config.plugins import resolve
from editr2.errors import ConfigError
from editr2.policies.models import DEFAULT
from editr2.policies.rules import config_problems, policy_problems
from editr2.recipes import find_recipe
from editr2.recipes.mapped import Settings, flat, nested
from editr2.rewards.load import load_reward
from editr2.rewards.table import REWARDS, WORLD

WHOLE = ("credit.weights", "reward.options", "train.loss_options")
"""Settings that are mappings."""
LIKE: Mapping[str, tuple[str, Settings]] = {
    "bagel": ("bagel-edit-r2-8gpu", {}),
    "kontext": ("kontext-grpo-80gb", {}),
    "flux2": ("kontext-grpo-80gb", {"policy.guidance_embed": 4.0, "policy.offload": True}),
    "longcat-edit": ("qwen-edit-8gpu", {}),
    "klein": ("klein-nft-24gb", {}),
    "klein-kv": ("klein-nft-24gb", {}),
    "qwen-edit": ("qwen-edit-8gpu", {}),
    "qwen-edit-plus": ("qwen-edit-8gpu", {}),
    "qwen-image-2.1": ("qwen-edit-8gpu", {}),
}
"""The recipe that a model begins like, and what is its own."""
OF_ITS_OWN: tuple[str, Settings] = ("qwen-edit-8gpu", {})
"""The same of a class of a user's own."""
SMALL: Settings = {
    "rollout.sessions": 12,
    "rollout.siblings": 8,
    "rollout.turns": 3,
    "rollout.steps": 4,
    "rollout.dynamics": "cps",
    "rollout.window": 2,
    "train.loss": "grpo",
    "train.iterations": 60,
    "train.lr": 2e-4,
    "eval.sessions": 200,
    "checkpoint.every": 5,
}
"""Of the small model that ships with the package, which learns on a CPU in minutes."""
LARGE = ("flux2", "qwen-edit", "qwen-edit-plus", "qwen-image-2.1")
"""Of 20 billion weights and more: several devices share them out."""
ROOMY = 64 * 2**30
"""Bytes of a device from which on nothing has to wait on the host."""
PICTURES = "pixels"
"""The judge of pictures where none is named: it needs no server."""
PIXELS_WEIGHTS = {"IF": 0.7, "CC": 0.3}
"""An output that is left as it was has all of CC."""
SERVED = "http://127.0.0.1:8000/v1"
"""Where a judge is looked for when no address is given."""
OF_THE_MACHINE = (
    *("data.resize", "policy.dtype", "policy.gradient_checkpointing", "policy.offload"),
    *("policy.shard", "policy.rounding", "rollout.groups_per_batch", "train.micro_batch"),
    *("train.ratio_tolerance", "train.text_ratio_tolerance", "eval.sessions", "eval.strips"),
)
"""What a run that comes from another trainer takes from the recipe."""


@dataclass(frozen=True)
class Choices:
    """What a user says.

    Args:
        model: as `policy.model`.
        data: as `data.path`; None: drawn from the world.
        judge: as `reward.name`; None: the world's verifiers of the small model, of others `pixels`.
        url: of a served judge.
        gpus, gpu: how many of which, or cpu.
        options: further ones of the judge.
    """

    model: str = DEFAULT
    data: str | None = None
    judge: str | None = None
    url: str | None = None
    gpus: int = 1
    gpu: str = "h100"
    options: Mapping[str, Any] = field(default_factory=dict)


def starting(choices: Choices, out: str) -> Settings:
    """Ours for these choices, complete but for what is at its default. Raises `ConfigError` for a
    judge or device that is not known."""
    made = {"out": out, "policy.model": choices.model} | _of_model(choices)
    if choices.data is not None:
        made["data.path"] = choices.data
    return made | judged(choices)


def _of_model(choices: Choices) -> Settings:
    """Of its recipe, on this machine."""
    # A name alone of this machine, which is measured where somebody wants its speed.
    roomy = choices.gpu != "cpu" and find_device(choices.gpu).memory >= ROOMY
    if choices.model == DEFAULT:
        return dict(SMALL)
    name, own = LIKE.get(choices.model, OF_ITS_OWN)
    values = flat(find_recipe(name).values, whole=WHOLE)
    taken = {
        key: value
        for key, value in values.items()
        if not key.startswith(("data.path", "reward.")) and key not in ("out", "credit.weights")
    }
    several = choices.gpus > 1
    made = {**taken, "policy.model": choices.model, **own}
    shared = PolicyConfig(model=choices.model, lora_rank=made["policy.lora_rank"], shard=True)
    made["policy.shard"] = (
        several
        and (choices.model in LARGE or not roomy)
        and not any("policy.shard" in problem for problem in policy_problems(shared))
    )
    made["policy.offload"] = bool(own.get("policy.offload")) or not roomy
    groups = made["rollout.sessions"]
    made["rollout.sessions"] = -(-groups // choices.gpus) * choices.gpus
    default = flat(plain(Config()), whole=WHOLE)
    off = ("policy.shard", "policy.offload")
    return {k: v for k, v in made.items() if k not in off or v != default[k]}


def judged(choices: Choices) -> Settings:
    """The judge, and a weight for each of its scores. Raises `ConfigError` where it cannot be
    made."""
    # The small model knows no words but the world's.
    name = choices.judge or (WORLD if choices.model == DEFAULT else PICTURES)
    options = dict(choices.options)
    kind = getattr(resolve("--judge", name, REWARDS, what="Class"), "Options", None)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    if "url" in fields:
        options["url"] = choices.url or options.get("url") or SERVED
    elif choices.url is not None:
        raise ConfigError(f"--url: {choices.url} (accepted with --judge {name}: none)")
    if "folder" in fields:
        options.setdefault("folder", "votes")
    names = load_reward(RewardConfig(name=name, options=options)).names
    made: Settings = {"reward.name": name}
    if options:
        made["reward.options"] = options
    if name == WORLD:
        return made  # its weights are the preset's
    share = round(1 / len(names), 2)
    weights = PIXELS_WEIGHTS if name == PICTURES else dict.fromkeys(names, share)
    if set(names) == {"IF", "CC", "GA"}:
        weights = {"IF": 0.3, "CC": 0.3, "GA": 0.4}
    return {**made, "credit.weights": weights}


def checked(settings: Settings) -> Config:
    """The configuration. Raises `ConfigError` with the first thing that is wrong with it."""
    config: Config = replace_nested(Config(), nested(settings))
    for problem in config_problems(config):
        raise ConfigError(problem)
    return config


def mended(settings: Settings) -> tuple[Settings, list[str]]:
    """The settings without those that are not accepted here, and a line about each of them."""
    left, said = dict(settings), list[str]()
    while True:
        try:
            checked(left)
            return left, said
        except ConfigError as error:
            key = str(error).partition(": ")[0].partition("[")[0]
            if key not in left:
                raise
            said.append(str(error))
            del left[key]
