"""Editors that `policy.model` can name: what such a class has to say of itself.

A new editor is one file with a class of this kind, and one line in `MODELS`; or the file alone, and
`policy.model: package.module:Class`. Everything that other parts of the program want to know of a
model they ask its class here; none is named outside of this package.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.config.plugins import resolve, told
from editr2.errors import ConfigError, UserError
from editr2.policies.base import Policy, to_bytes
from editr2.policies.blueprint import Blueprint, Walk, simulated
from editr2.policies.forms import Form, OwnFolder, PeftAdapter
from editr2.policies.models import MODELS
from editr2.policies.recorded import without_adapters
from editr2.run.hub import INDEX

FIELDS = tuple(f.name for f in dataclasses.fields(PolicyConfig))
"""Of `PolicyConfig`, in their order."""


@dataclass(frozen=True)
class Stock:
    """What a published pipeline does where its caller says nothing. steps: of denoising. settings:
    of `PolicyConfig`, that stand at other values than its defaults."""

    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)


class ConfiguredPolicy(ABC):
    """A `Policy` that is made from settings. A subclass has that protocol's methods (`decode` is
    here), `from_config` and `pixels`, and overrides what else is true of it."""

    writes_text: bool = False

    uses: ClassVar[frozenset[str]] = frozenset(
        ("model", "weights", "intent", "temperature", "intent_tokens")
    )
    """The settings of `PolicyConfig` that it has a use for; any other has to stay at its default.
    Those of intents are for all: who writes none ignores them."""
    edits_the_world: ClassVar[bool] = True
    """Whether it can edit the shapes world's small images."""
    default_weights: ClassVar[str] = "an untrained model"
    """What it starts from where `policy.weights` is none, in words."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: PolicyConfig, *, trains: bool = True, empty: bool = False) -> Any:
        """The policy with the configured weights, ready to train; see `load_policy`. trains: off,
        nothing will. empty: the weights may be without data, for another process's to be put there
        (only with `policy.shard`).

        Raises `ConfigError` for settings it cannot follow and for weights that are not its own.
        """

    @classmethod
    def problems(cls, config: PolicyConfig, trains: bool = True) -> Iterator[str]:
        """One line, `policy.name: value (accepted: ...)`, for each setting that it cannot follow
        whatever the weights are; no file is read."""
        default = PolicyConfig()
        for name in FIELDS:
            value, accepted = getattr(config, name), getattr(default, name)
            # What is off asks for nothing, even where the default is auto.
            if name not in cls.uses and value not in (accepted, "off"):
                yield (
                    f"policy.{name}: {value!r} (accepted with policy.model {config.model}: "
                    f"{accepted!r}, the default)"
                )

    @classmethod
    def sources(cls, config: PolicyConfig) -> Sequence[str]:
        """The folders and hub ids of the weights that `from_config` reads."""
        return [config.weights] if config.weights else []

    @classmethod
    def fingerprints(cls, config: PolicyConfig) -> dict[str, str]:
        """Of files besides the weights that its numbers depend on: the name of a setting that leads
        to some, and what they are by their content."""
        return {}

    @classmethod
    def blueprint(cls, config: PolicyConfig) -> Blueprint:
        """The policy without its weights, for `editr2 check`. Raises the `UserError` of settings or
        of a folder that `from_config` would refuse."""
        with simulated():
            policy = cls.without_weights(config)
        return Walk(policy, config.model)

    @classmethod
    def without_weights(cls, config: PolicyConfig) -> Any:
        """The policy as it is before any weights are read. Called where tensors hold no data."""
        return cls.from_config(dataclasses.replace(config, weights=None))

    @classmethod
    def form(cls, config: PolicyConfig, kind: str) -> Form:
        """How a trained policy is exported. kind: lora, merged or full."""
        if kind == "lora":
            return PeftAdapter(cls.loading(config.model, config.weights))
        return OwnFolder(cls.from_config, config, partial(cls.loading, config.model))

    @classmethod
    def loading(cls, model: str, weights: str | None) -> list[str]:
        """Lines of Python that make `policy` from these weights."""
        given = f'model="{model}"' + (f', weights="{weights}"' if weights else "")
        return [
            "from editr2.config import PolicyConfig",
            "from editr2.policies.load import load_policy",
            "",
            f"policy = load_policy(PolicyConfig({given}))",
        ]

    holds: ClassVar[str] = ""
    """What `owns` looks for in a folder, in words; empty where it looks for nothing."""

    @classmethod
    def owns(cls, folder: Path) -> bool:
        """Whether a folder says that it has weights of this model, for `--policy FOLDER`. Nothing
        is read but small files of settings; whether the weights are in order is seen when they are
        loaded. Raises the `UserError` of a file that cannot be read."""
        return False

    @classmethod
    def settings_for(cls, config: PolicyConfig, folder: Path) -> PolicyConfig:
        """The settings that load what `save`, in a run of these, or an export of it wrote to a
        folder: its weights, with adapters merged."""
        return without_adapters(config, str(folder))

    @classmethod
    def stock(cls, config: PolicyConfig) -> Stock | None:
        """Of the published pipeline that it drives; None where there is none. No weights are
        read."""
        return None

    @classmethod
    def is_stock(cls, folder: Path) -> bool:
        """Whether a folder that it owns, and no settings stand beside, is the published pipeline's,
        which edits as `stock` says."""
        return (folder / INDEX).is_file()

    def placed(self, trains: bool) -> None:  # noqa: B027, most have nothing to say
        """Called once the weights are on their device. Raises `ConfigError` where what is asked for
        does not work there."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """As `PixelPolicy.pixels`."""

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_bytes(self.pixels(latents))


def settled_branches(config: PolicyConfig, processes: int) -> PolicyConfig:
    """The settings with what `policy.branches` auto stands for on so many processes."""
    if config.branches != "auto":
        return config
    gathers = config.shard and processes > 1
    return dataclasses.replace(config, branches="together" if gathers else "apart")


METHODS = tuple(
    name for name, f in vars(Policy).items() if inspect.isfunction(f) and name[0] != "_"
)
"""What a `Policy` has beside its attributes, which instances may hold."""


def policy_class(model: str) -> type[ConfiguredPolicy]:
    """The class that `policy.model` names. Raises `ConfigError` for one that is not there, or
    cannot be an editor."""
    kind = resolve("policy.model", model, MODELS, what="Class")
    title = f"policy.model: {model!r}"
    if not (inspect.isclass(kind) and issubclass(kind, ConfiguredPolicy)):
        what = f"class {kind.__name__}" if inspect.isclass(kind) else f"a {type(kind).__name__}"
        raise ConfigError(
            f"{title}: {what} (accepted: a class derived from "
            f"{ConfiguredPolicy.__module__}:{ConfiguredPolicy.__name__})"
        )
    lacks = sorted({n for n in METHODS if not hasattr(kind, n)} | set(kind.__abstractmethods__))
    if lacks:
        raise ConfigError(
            f"{title}: class {kind.__name__} lacks {', '.join(lacks)} (accepted: a class with "
            f"them; see docs/editors.md)"
        )
    return kind


ATTRIBUTES = ("module", "latent_shape", "image_size")
"""What every `Policy` holds."""


@contextmanager
def called(kind: type[ConfiguredPolicy], model: str, what: str) -> Iterator[None]:
    """Around code of an editor's class: what a user's own raises is one line, `ConfigError`; ours
    keeps its traceback."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
            raise
        raise ConfigError(
            f"policy.model: {model!r}: {what} raised {told(error, (__file__,))} (accepted: what "
            f"ConfiguredPolicy.{what} says)"
        ) from error


def made(kind: type[ConfiguredPolicy], config: PolicyConfig, **how: bool) -> Any:
    """`kind.from_config`. Raises `ConfigError` for what is no policy, too."""
    with called(kind, config.model, "from_config"):
        policy = kind.from_config(config, **how)
    if lacks := [name for name in ATTRIBUTES if getattr(policy, name, None) is None]:
        raise ConfigError(
            f"policy.model: {config.model!r}: from_config gave a {type(policy).__name__} without "
            f"{', '.join(lacks)} (accepted: a policy with {', '.join(ATTRIBUTES)})"
        )
    return policy
