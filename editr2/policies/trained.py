"""What trains of an editor on diffusers: adapters put on or merged in, and the folder of a trained
policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.adapters import (
    ALL_LINEAR,
    DESCRIPTION,
    LORA_FILE,
    TRANSFORMER,
    Lora,
    add_adapter,
    check_file,
    load_adapter,
    read_description,
    save_adapter,
)
from editr2.policies.attention import attend_by
from editr2.policies.blocks import run_as_configured
from editr2.policies.fp8 import quantize_linears
from editr2.policies.lora_files import Start, start_of
from editr2.policies.pipelines import PipelineModel
from editr2.policies.tensor_files import ordinary_modes, writing


def make_ready(policy: Any, adapter: Path | None, trains: bool) -> None:
    """What follows a policy's assembly from its parts: its settings for autoencoder, adapters and
    execution."""
    ready_autoencoder(policy)
    _adapt(policy, adapter, trains)
    if policy.config.attention is not None:
        attend_by(policy.module, policy.config.attention)
    if policy.config.quantize == "fp8":
        quantize_linears(policy.module, policy.lora_targets)
    run_as_configured(policy.module, policy.config)


def asked_lora(config: PolicyConfig, kind: type[PipelineModel]) -> Lora:
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return Lora(config.lora_rank, float(alpha), config.lora_targets or kind.lora_targets)


def saved_lora(config: PolicyConfig, kind: type[PipelineModel], folder: Path) -> Lora:
    """The settings of a saved LoRA. Raises `ConfigError` where others are asked for, and
    `CheckpointError` for settings or a file that are none."""
    if config.lora_weights is not None:
        raise ConfigError(
            f"policy.lora_weights: {config.lora_weights} (accepted with policy.weights {folder}, "
            f"which is a LoRA: none)"
        )
    saved, asked = read_description(folder).lora, asked_lora(config, kind)
    assert saved is not None  # by `weight_sources`
    for name in ("rank", "alpha", "targets") if config.lora_rank else ():
        have, value = getattr(saved, name), getattr(asked, name)
        spelt_out = (
            isinstance(have, list) and isinstance(value, str) and value.lower() == ALL_LINEAR
        )
        if have != value and not spelt_out:  # the file's names are compared anyway
            accepted = f"the {len(have)} names in {DESCRIPTION}" if isinstance(have, list) else have
            raise ConfigError(
                f"policy.lora_{name}: {value} (accepted: {accepted}, that of the LoRA in {folder})"
            )
    strength = check_file(folder / LORA_FILE, saved.rank)
    # What goes on training keeps its alpha; else the file counts as any loader takes it, without
    # rounding it again.
    return saved if config.lora_rank else replace(saved, alpha=saved.rank * strength)


def put_adapter(
    module: Any,
    config: PolicyConfig,
    kind: type[PipelineModel],
    adapter: Path | None,
    start: Start | None = None,
) -> Lora | None:
    """Adapters as configured, or as those saved in the folder `adapter`, or as `start` wants them;
    None where there are none."""
    saved = None if adapter is None else saved_lora(config, kind, adapter)
    saved = start.lora if start else saved
    lora = saved or (asked_lora(config, kind) if config.lora_rank else None)
    if lora is None:
        return None
    where = (
        f"{adapter / DESCRIPTION}: lora.targets"
        if adapter and not config.lora_targets
        else "policy.lora_targets"
    )
    accepted = (
        f"accepted with policy.model {kind.model}: an expression that matches linear layers of it"
    )
    add_adapter(module, lora, where, accepted)
    return lora


def _adapt(policy: Any, adapter: Path | None, trains: bool) -> None:
    """The module with what trains: an adapter over frozen weights, or all of it with a saved
    adapter merged in. Where nothing trains a saved adapter stays beside the weights, as it was
    trained.

    Trained adapters are float32 whatever the base is.
    """
    module, config = policy.module, policy.config
    start = start_of(config, module, policy.lora_targets)
    lora = put_adapter(module, config, type(policy), adapter, start)
    if lora is None:
        module.requires_grad_(trains)
        return
    module.requires_grad_(False)
    for name, p in module.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(trains)
    empty = any(
        p.is_meta for p in module.parameters()
    )  # then its adapters come from another process, too
    if adapter is not None and not empty:
        load_adapter(module, adapter / LORA_FILE, lora)
    if start is not None:
        start.fill(module)
    if trains and not config.lora_rank:
        module.fuse_lora()
        module.unload_lora()
        module.requires_grad_(True)


def ready_autoencoder(policy: Any) -> None:
    """One image at a time; in tiles (above the autoencoder's own sample size) only where it was
    asked for, since tiles are not the stock pipeline's numbers."""
    policy.pipe.vae.enable_slicing()
    if policy.config.vae_tiling:
        policy.pipe.vae.enable_tiling()


def save_policy(policy: Any, folder: Path) -> None:
    """Writes what `load_policy` reads: a LoRA in stock diffusers' file with its metadata, or the
    transformer's folder, and `DESCRIPTION`. Raises `CheckpointError` where it cannot."""
    base = Path(policy.base)
    said: dict[str, Any] = {
        "model": policy.model,
        "base": str(base.resolve()) if base.is_dir() else policy.base,
    }
    module = policy.module
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if getattr(module, "peft_config", None):
            said["lora"] = vars(save_adapter(type(policy.pipe), module, folder))
        else:
            module.save_pretrained(folder / TRANSFORMER)
        (folder / DESCRIPTION).write_text(json.dumps(said, indent=1) + "\n")
        ordinary_modes([folder])
