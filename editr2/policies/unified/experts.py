"""Which of the two experts trains: both, or the one that paints alone.

The generation expert reads and paints image latents; everything that the layers have of it ends in
`_moe_gen`, and time embedder and latent projections are its alone. The understanding expert reads
words and what is seen, and writes. Frozen, it keeps what it writes as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from editr2.config import PolicyConfig
from editr2.policies import weights
from editr2.policies.unified.model import UnifiedConfig, UnifiedModel
from editr2.policies.weights import LORA_TARGETS, add_lora

TARGETS: Mapping[str, str] = {
    "all": LORA_TARGETS,
    "gen": r".*((q|k|v|o)_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)",
}
"""Layers that get adapters, by `policy.experts`."""


def writes(name: str) -> bool:
    """Whether a parameter of the module, or an adapter on it, is the understanding expert's."""
    return name.startswith("language_model.") and "_moe_gen" not in name


def trained(config: PolicyConfig) -> Callable[[str], bool]:
    """Which parameters train, by name; none under adapters."""
    if config.lora_rank:
        return lambda name: False
    return (lambda name: not writes(name)) if config.experts == "gen" else (lambda name: True)


def freeze_rest(module: nn.Module, config: PolicyConfig) -> None:
    """Of parameters that could train, those train on that are configured."""
    trains = trained(config)
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and trains(name))


def load_adapters(module: nn.Module, config: PolicyConfig, trains: bool = True) -> None:
    """Adapters as configured with their numbers, `editr2.policies.weights.adapt`."""
    weights.adapt(module, config, TARGETS[config.experts], trains=trains)


def check_start(sizes: UnifiedConfig, config: PolicyConfig) -> None:
    """Raises what `load_adapters` would of `policy.lora_weights` on a model of these sizes, but for
    its numbers: headers are read, and no weights."""
    if config.lora_weights is not None:
        with torch.device("meta"):
            load_adapters(UnifiedModel(sizes), config)


def adapt(module: nn.Module, config: PolicyConfig) -> None:
    """Adapters as configured, B at zero. Raises `ConfigError` as `add_lora`."""
    targets = config.lora_targets or TARGETS[config.experts]
    add_lora(module, config.lora_rank, config.lora_alpha, targets)


def problems(config: PolicyConfig, trains: bool) -> Iterator[str]:
    """What `policy.experts` does not go with."""
    if config.experts != "gen":
        return
    if config.lora_targets is not None:
        yield (
            f"policy.lora_targets: {config.lora_targets!r} (accepted with policy.experts gen: "
            f"none, the attention and MLP of that expert)"
        )
    for name, written in (("intent", "intents"), ("thinking", "thoughts")):
        if getattr(config, name) and trains:
            yield (
                f"policy.experts: gen (accepted with policy.{name} true: all; what writes "
                f"{written} would not train)"
            )
