"""LoRA adapters of models on diffusers: where they sit, how strong they are, and their file.

A layer's output gets alpha / rank times B A x. Whoever loads the file may or may not read alpha,
which stands in its metadata; so files are written at strength 1: B is scaled by alpha / rank, and
the alpha beside it is the rank. That is exact where alpha / rank is a power of two and else rounds
each number of B once. While training, alpha is its own number, because how far a step moves the
weights depends on it; `policy.json` keeps it.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editr2.errors import CheckpointError, ConfigError, one_line
from editr2.policies.base import autocast_dtype
from editr2.policies.finite import ACCEPTED, unusable
from editr2.policies.tensor_files import Shape, check_shapes, read_header, read_json, read_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name stock diffusers looks for."""
TRANSFORMER = "transformer"
DESCRIPTION = "policy.json"
"""In a saved policy's folder: model, base (the weights it was trained from) and, of a LoRA, rank,
alpha and targets."""
ALL_LINEAR = "all-linear"
SETTINGS = "lora_adapter_metadata"
"""The key of the file's metadata under which diffusers keeps the adapters' settings."""


@dataclass(frozen=True)
class Lora:
    """targets: an expression over the names of layers, or a list of names."""

    rank: int
    alpha: float
    targets: str | list[str]

    @property
    def strength(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Saved:
    """What a policy's folder says of itself. lora: None where all weights were saved."""

    model: str
    base: str
    lora: Lora | None


def read_description(folder: Path) -> Saved:
    """Raises `CheckpointError` naming the file and key of what is missing or of another kind."""
    path = folder / DESCRIPTION
    said = read_json(path)
    for name in ("model", "base"):
        if not isinstance(said.get(name), str) or not said[name]:
            raise CheckpointError(f"{path}: {name}: {said.get(name)!r} (accepted: {_MEANT[name]})")
    if (folder / TRANSFORMER).is_dir() and "lora" not in said:
        return Saved(said["model"], said["base"], None)
    lora = said.get("lora")
    if not isinstance(lora, dict):
        what = f"rank, alpha and targets; without them a {TRANSFORMER} folder stands beside it"
        raise CheckpointError(f"{path}: lora: {lora!r} (accepted: {what})")
    rank, alpha, targets = lora.get("rank"), above_zero(lora.get("alpha")), lora.get("targets")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: lora.rank: {rank!r} (accepted: a whole number, at least 1)")
    if alpha is None:
        raise CheckpointError(
            f"{path}: lora.alpha: {lora.get('alpha')!r} (accepted: a number above 0)"
        )
    listed = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not targets or not (listed or isinstance(targets, str)):
        raise CheckpointError(
            f"{path}: lora.targets: {targets!r} (accepted: an expression, or a list of names)"
        )
    return Saved(said["model"], said["base"], Lora(rank, alpha, targets))


def above_zero(value: object) -> float | None:
    """The number that JSON holds, None for another value."""
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9
        else None
    )


_MEANT = {
    "model": "a name of policy.model",
    "base": "the folder or hub id of the weights it was trained from",
}


@functools.cache
def _adapted_linear() -> Any:
    """The class; peft takes seconds to import, so only where there are adapters."""
    from peft.tuners.lora import Linear

    class AdaptedLinear(Linear):
        """peft's linear layer, equal to it to the last bit, with fewer copies.

        Its input stays as it is under autocast, which makes of A's the product's dtype anyway: peft
        brings a bfloat16 input to float32 first. And where the strength is a power of two, whose
        product is exact, it stands on the `rank` numbers a token between A and B, not on those
        behind B. Everything else (adapters off, merged or several, with a bias, a strength that
        rounds) is peft's own forward.
        """

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
            strength = self.scaling.get(name, 0.0)
            if (
                args
                or kwargs
                or self.disable_adapters
                or self.merged
                or name in self.lora_variant
                or self.lora_bias.get(name)
                or math.frexp(strength)[0] != 0.5
            ):
                return super().forward(x, *args, **kwargs)
            result = self.base_layer(x)
            x = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
            change = self.lora_B[name](self.lora_A[name](x) * strength)
            if torch.is_grad_enabled():  # autograd would copy the gradient of a sum in place
                return (result + change).to(result.dtype)
            return result.add_(change)

        def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
            if autocast_dtype(x.device) is not None:
                return x
            return super()._cast_input_dtype(x, dtype)

        def __reduce__(self) -> Any:  # pickle looks no class up that is made in a function
            return _unpickled, (), self.__getstate__()

    return Linear, AdaptedLinear


def _unpickled() -> Any:
    ours = _adapted_linear()[1]
    return ours.__new__(ours)


def with_fewer_copies(module: nn.Module) -> None:
    """Gives all adapters on linear layers a forward of ours, of equal bits. Whatever else is asked
    of them (saving, merging, taking off) is peft's."""
    theirs, ours = _adapted_linear()
    for layer in module.modules():
        if type(layer) is theirs:
            layer.__class__ = ours


def add_adapter(module: Any, lora: Lora, where: str, accepted: str) -> None:
    """Fresh adapters, B at zero; nothing else trains. where, accepted: of the `ConfigError` for
    targets that match no layer, or one that takes none."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0
    )
    try:
        module.add_adapter(config)
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(f"{where}: {lora.targets!r} ({accepted}; {one_line(error)})") from error
    with_fewer_copies(module)


def adapter_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every layer by their names in the file."""
    return {
        f"{TRANSFORMER}.{name.replace('.default.', '.')}": p
        for name, p in module.named_parameters()
        if ".lora_" in name
    }


def check_file(path: Path, rank: int, needed: Mapping[str, Shape] | None = None) -> float:
    """The strength at which a LoRA file is to be applied: what its settings say, 1 without any.

    needed: shapes of the adapters it is for; None skips them. Raises `CheckpointError` naming the
        key."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not there (accepted: the LoRA that {path.parent / DESCRIPTION} describes)"
        )
    shapes, metadata = read_header(path)
    if needed is not None:
        check_shapes(path, shapes, needed, f"the adapters that {DESCRIPTION} describes")
    # Before adapters of a rank without bounds are made.
    for key, shape in shapes.items():
        if len(shape) == 2 and rank != (own := shape[0] if ".lora_A." in key else shape[1]):
            raise CheckpointError(
                f"{path}: {key}: {list(shape)}, rank {own} (accepted: {rank}, by {DESCRIPTION})"
            )
    if SETTINGS not in metadata:
        return 1.0
    try:
        said = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {SETTINGS}: no JSON: {one_line(error)}") from error
    values = said if isinstance(said, dict) else {}
    found = []
    for name in ("lora_alpha", "r"):
        value = above_zero(values.get(f"{TRANSFORMER}.{name}"))
        if value is None:
            what = f"{TRANSFORMER}.{name}: {values.get(f'{TRANSFORMER}.{name}')!r}"
            raise CheckpointError(f"{path}: {SETTINGS}: {what} (accepted: a number above 0)")
        found.append(value)
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if value := values.get(f"{TRANSFORMER}.{name}"):
            raise CheckpointError(
                f"{path}: {SETTINGS}: {TRANSFORMER}.{name}: {value!r} (accepted: none)"
            )
    return found[0] / found[1]


@torch.no_grad()
def load_adapter(module: nn.Module, path: Path, lora: Lora) -> None:
    """Fills adapters of these settings from a file, whatever its strength. Raises `CheckpointError`
    unless its tensors are exactly theirs: every key, every shape, every number finite."""
    needed = adapter_weights(module)
    strength = check_file(path, lora.rank, {name: tuple(p.shape) for name, p in needed.items()})
    found = read_tensors(path)
    if name := unusable(found.items()):
        raise CheckpointError(
            f"{path}: {name}: NaN, infinite or too large ({ACCEPTED}; take an earlier one)"
        )
    for name, p in needed.items():
        p.copy_(
            scaled(found[name].to(p.dtype), strength / lora.strength)
            if ".lora_B." in name
            else found[name]
        )


def save_adapter(pipeline: Any, module: Any, folder: Path) -> Lora:
    """Writes the LoRA at strength 1 in stock diffusers' file, by the pipeline's class, and leaves
    the module as it is. Returns the settings it trained with."""
    from peft import get_peft_model_state_dict

    config = module.peft_config["default"]
    weights = {
        name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(module).items()
    }
    for name in weights:
        layer, found, _ = name.partition(".lora_B.")
        if found:
            weights[name] = scaled(weights[name], module.get_submodule(layer).scaling["default"])
    # Such a file is alike for every transformer, by whichever class it is written.
    writer = pipeline if hasattr(pipeline, "save_lora_weights") else _lora_writer()
    writer.save_lora_weights(
        folder,
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=_at_strength_one(config).to_dict(),
    )
    return Lora(config.r, float(config.lora_alpha), _listed(config.target_modules))


def _lora_writer() -> Any:
    from diffusers.loaders import QwenImageLoraLoaderMixin

    return QwenImageLoraLoaderMixin


@torch.no_grad()
def fold_strength(module: Any) -> float:
    """Brings all adapters to strength 1 in place, as `save_adapter` writes them. Returns the
    largest relative change of a number of B by rounding: 0 where alpha / rank is a power of two."""
    from peft.tuners.lora import LoraLayer

    furthest = 0.0
    for layer in module.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            weight, strength = layer.lora_B[name].weight, layer.scaling[name]
            exact = weight.double() * strength
            weight.copy_(scaled(weight, strength))
            furthest = max(
                furthest,
                float(((weight.double() - exact) / exact.abs().clamp_min(1e-300)).abs().max()),
            )
            layer.scaling[name] = 1.0
    for name, config in module.peft_config.items():
        module.peft_config[name] = _at_strength_one(config)
    return furthest


def scaled(weight: Tensor, strength: float) -> Tensor:
    """weight * strength, rounded once."""
    return (weight.double() * strength).to(weight.dtype)


def _at_strength_one(config: Any) -> Any:
    """The adapters' settings with alpha = rank, in every layer."""
    config = copy.copy(config)
    config.lora_alpha, config.alpha_pattern, config.use_rslora = (
        config.r,
        dict(config.rank_pattern),
        False,
    )
    config.target_modules = _listed(config.target_modules)
    return config


def _listed(targets: Any) -> str | list[str]:
    """A set, which is what peft makes of `all-linear` and of lists, in an order; JSON has none."""
    return targets if isinstance(targets, str) else sorted(targets)
