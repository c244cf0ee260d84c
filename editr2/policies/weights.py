"""Other weights of the same policy: the start (reference), the sampling policy of NFT, the running
average.

All three are copies of the *trainable* parameters alone, exchanged with the live ones while they
are used. Under LoRA that is a few adapter matrices, and the reference (whose B matrices are zero)
is the base model with its adapters off; without LoRA it is the frozen copy that is needed anyway.
One mechanism, no second model. Of weights that are shared out over processes every copy is shared
out likewise, and all functions here work on the part that this process holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.errors import CheckpointError, ConfigError, one_line
from editr2.policies.adapters import with_fewer_copies
from editr2.policies.lora_files import start_of
from editr2.policies.parts import is_shared, part, rows
from editr2.policies.tensor_files import check_shapes, read_header, read_tensors, reading

LORA_TARGETS = r".*\.(q|k|v|o|gate|up|down)_proj(_moe_gen)?"
"""Attention and MLP of both experts."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in trainable(module).items()}


@contextmanager
def exchanged(module: nn.Module, values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The module holds `values` inside (None: its own). Nothing is copied, and a graph built before
    stays valid, because afterwards every parameter holds its own storage again.

    Of weights that are shared out the contents change places instead, so `values`, which has to be
    one of their lockstep's copies, holds the module's own inside: FSDP2 gathers from storage of its
    own. A graph built before gathers anew in its backward."""
    if values is None:
        yield
        return
    parameters = trainable(module)
    if any(map(is_shared, parameters.values())):
        with vars(module)["lockstep"].exchanged(values):
            yield
        return
    own = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = values[name]
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]


@torch.no_grad()
def mix(values: dict[str, Tensor], module: nn.Module, keep: float) -> None:
    """values <- keep * values + (1 - keep) * live, in place."""
    for name, p in trainable(module).items():
        part(values[name]).lerp_(part(p), 1 - keep)


@torch.no_grad()
def load_trainable(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies `values`, which are whole, into the trainable parameters. Raises `CheckpointError`
    naming one that is missing or unknown."""
    parameters = trainable(module)
    if odd := sorted(set(parameters) ^ set(values)):
        where = "missing from" if odd[0] in parameters else "unknown to the policy but in"
        raise CheckpointError(f"{odd[0]}: {where} the checkpoint (and {len(odd) - 1} more)")
    for name, p in parameters.items():
        part(p).copy_(rows(values[name], p))


def add_lora(
    module: nn.Module, rank: int, alpha: float | None = None, targets: str | None = None
) -> None:
    """Adapters of rank `rank` and strength alpha (default 2 * rank) on every attention and MLP
    projection (or where
    the expression `targets` says); everything else is frozen. B starts at zero: the policy is
    unchanged.

    Raises `ConfigError` for targets that match no layer, or one that takes no adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    strength = 2 * rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=strength, target_modules=targets or LORA_TARGETS)
    try:
        inject_adapter_in_model(config, module)
    except (ValueError, TypeError, re.error) as error:
        why = f"an expression that matches linear layers of the model; {one_line(error)}"
        raise ConfigError(f"policy.lora_targets: {targets!r} (accepted: {why})") from error
    with_fewer_copies(module)
    for name, p in module.named_parameters():
        p.requires_grad_(".lora_" in name)


def adapt(module: nn.Module, config: PolicyConfig, targets: str, *, trains: bool = True) -> None:
    """Adapters as the settings have them, started from `policy.lora_weights` where they say so: in
    float32 whatever the module is, and the one thing that trains. Without `policy.lora_rank` that
    start is merged where weights train, and else stands beside them as it was written. targets: of
    the model, where the settings name none.

    Raises a `UserError` for targets and a start that do not fit the module."""
    start = start_of(config, module, targets)
    if start is None and not config.lora_rank:
        return
    learn = {name for name, p in module.named_parameters() if p.requires_grad}
    if start is not None:
        add_lora(module, start.lora.rank, start.lora.alpha, cast(str, start.lora.targets))
    else:
        add_lora(module, config.lora_rank, config.lora_alpha, config.lora_targets or targets)
    for name, p in module.named_parameters():
        if ".lora_" in name:  # an update is smaller than bfloat16's rounding
            p.data = p.data.float()
            p.requires_grad_(trains)
    if start is not None:
        start.fill(module)
    if trains and not config.lora_rank:
        merge_lora(module)
        for name, p in module.named_parameters():
            p.requires_grad_(name in learn)


@torch.no_grad()
def put_on(module: nn.Module, folder: Path) -> None:
    """The adapters of an export for peft, as `PeftModel.from_pretrained(module, folder)` puts them
    on; nothing trains. Raises a `UserError` unless they are exactly those that its
    adapter_config.json describes."""
    from peft import PeftConfig, inject_adapter_in_model

    with reading(folder / "adapter_config.json"):
        config = PeftConfig.from_pretrained(str(folder))
        inject_adapter_in_model(config, module)
    with_fewer_copies(module)
    module.requires_grad_(False)
    adapters = {
        f"base_model.model.{name.replace('.default.', '.')}": p
        for name, p in module.named_parameters()
        if ".lora_" in name
    }
    file = folder / "adapter_model.safetensors"
    needed = {name: tuple(p.shape) for name, p in adapters.items()}
    check_shapes(file, read_header(file)[0], needed, "the adapters that adapter_config.json says")
    for name, tensor in read_tensors(file).items():
        adapters[name].copy_(tensor)


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the module without adapters: LoRA's product added to the weights it
    adapts."""
    state = {
        k.replace(".base_layer.", "."): v.detach()
        for k, v in module.state_dict().items()
        if ".lora_" not in k
    }
    if len(state) == len(module.state_dict()):
        return state
    from peft.tuners.lora import LoraLayer  # seconds of imports, so only where there are adapters

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return state


def adapter_changes(module: nn.Module) -> dict[str, Tensor]:
    """What adapters add to the weights that they adapt, by the names that these have without them;
    empty where there are none."""
    return {
        f"{name}.weight": torch.stack([layer.get_delta_weight(a) for a in layer.active_adapters])
        .sum(0)
        .detach()
        for name, layer in _lora_layers(module).items()
    }


def _lora_layers(module: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer  # seconds of imports, so only where it is asked for

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def remove_lora(module: Any) -> None:
    """Takes adapters off: the base layers stand in their own places again."""
    if hasattr(module, "unload_lora"):  # diffusers' models keep their own books of adapters
        module.unload_lora()
        return
    for name, layer in _lora_layers(module).items():
        module.set_submodule(name, layer.get_base_layer())
    vars(module).pop("peft_config", None)


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Adds every adapter to the layer it sits on, rounded to that layer's precision, and takes them
    off."""
    for layer in _lora_layers(module).values():
        weight = layer.get_base_layer().weight
        for name in layer.active_adapters:
            weight.copy_(weight + layer.get_delta_weight(name))
    remove_lora(module)
