"""From settings to a policy, and from a trained policy to a folder that settings can name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from editr2.config import MODELS, PolicyConfig, policy_problems
from editr2.errors import CheckpointError, ConfigError
from editr2.hub import check_model
from editr2.policies.base import Policy
from editr2.policies.sharding import place
from editr2.policies.unified import EMBEDDED, Guidance, UnifiedPolicy
from editr2.policies.weights import add_lora
from editr2.processes import Processes

if TYPE_CHECKING:
    from editr2.policies.diffusion import DiffusionPolicy

CLASSES = {
    "kontext": "editr2.policies.kontext:KontextPolicy",
    "klein": "editr2.policies.klein:KleinPolicy",
    "klein-kv": "editr2.policies.klein:KleinKVPolicy",
    "qwen-edit": "editr2.policies.qwen_edit:QwenEditPolicy",
    "qwen-edit-plus": "editr2.policies.qwen_edit:QwenEditPlusPolicy",
}
DESCRIPTION = "policy.json"
"""In a saved policy's folder: model, base (the weights it was trained from) and, of a LoRA, rank, alpha and targets."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name stock diffusers looks for."""
TRANSFORMER = "transformer"


def load_policy(config: PolicyConfig, *, trains: bool = True, empty: bool = False) -> Policy:
    """The configured weights, ready to train: adapters alone where `lora_rank` is above 0, else all of the model's.
    trains: off, nothing trains, and the weights of models on diffusers are in `policy.dtype`. empty: the transformer
    of a model on diffusers holds no data, for another process's to be put there (`editr2.policies.sharding`).

    Raises `ConfigError` for settings the model cannot follow, and for weights that are not there or another model's.
    """
    if config.model != "unified":
        return load_diffusion(config, trains=trains, empty=empty)
    policy = UnifiedPolicy.load(Path(config.weights) if config.weights else EMBEDDED, unified_guidance(config))
    if config.lora_rank:
        add_lora(policy.module, config.lora_rank, config.lora_alpha, config.lora_targets)
    return policy


def open_policy(config: PolicyConfig, processes: Processes, *, trains: bool = True) -> Policy:
    """`load_policy` for a run of several processes: on their devices, whole or shared out (`policy.shard`).

    Raises `ConfigError` as `load_policy`, and for settings that cannot be shared out.
    """
    for problem in policy_problems(config, trains):
        raise ConfigError(problem)
    policy = load_policy(config, trains=trains, empty=config.shard and not processes.main)
    place(policy, config.shard, processes)
    return policy


def unified_guidance(config: PolicyConfig) -> Guidance:
    renorm = "none" if config.renorm == "auto" else config.renorm
    return Guidance(config.guidance, config.guidance_image, cast(Any, renorm))


def policy_class(model: str) -> type[DiffusionPolicy]:
    """The class of a model on diffusers. Raises `ConfigError` for another name."""
    if model not in CLASSES:
        raise ConfigError(f"policy.model: {model!r} (accepted: {', '.join(m for m in MODELS if m in CLASSES)})")
    module, _, name = CLASSES[model].partition(":")
    return cast("type[DiffusionPolicy]", getattr(importlib.import_module(module), name))


def load_diffusion(config: PolicyConfig, *, trains: bool = True, empty: bool = False) -> DiffusionPolicy:
    """A pipeline's folder, a hub id, or a folder that `save_policy` wrote; see `load_policy`."""
    kind = policy_class(config.model)
    adapter, trained, base = weight_sources(config.weights or kind.published, config.model)
    check_model(base, "policy.weights")
    pipe = _pipeline(kind, config, base, trained, whole=trains and not config.lora_rank, empty=empty)
    policy = kind(pipe, config)
    policy.base = str(trained or base)
    make_ready(policy, adapter, trains)
    return policy


def make_ready(policy: DiffusionPolicy, adapter: Path | None, trains: bool) -> None:
    """What follows a policy's assembly from its parts: its settings for autoencoder, adapters and execution."""
    policy.pipe.vae.enable_slicing()
    if policy.tiles:
        policy.pipe.vae.enable_tiling()  # only above the autoencoder's own sample size
    _adapt(policy, adapter, trains)
    if policy.config.gradient_checkpointing:
        policy.module.enable_gradient_checkpointing()
    if policy.config.compile:
        policy.module.compile_repeated_blocks()


def _pipeline(
    kind: type[DiffusionPolicy], config: PolicyConfig, base: str, trained: Path | None, *, whole: bool, empty: bool
) -> Any:
    """The stock pipeline with all its components, the transformer from `trained` if there is one. whole: all of the
    transformer's weights will train. empty: they are on the meta device."""
    import diffusers
    from accelerate import init_empty_weights

    from editr2.policies.diffusion import stock_pipeline

    try:
        stock_pipeline(kind.pipeline)
    except AttributeError as error:
        raise ConfigError(
            f"policy.model: {kind.model} (accepted with a diffusers that has {kind.pipeline}; this is "
            f"{diffusers.__version__})"
        ) from error
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    # Trained weights stay float32: an update of a bfloat16 weight is smaller than its rounding.
    options: dict[str, Any] = {"torch_dtype": torch.float32 if whole else dtype}
    if config.quantize == "4bit":
        options["quantization_config"] = _four_bits(dtype)
    where = {"pretrained_model_name_or_path": trained or base, "subfolder": TRANSFORMER}
    try:
        with warnings.catch_warnings():
            # torch_dtype's new name, dtype, is unknown to the oldest diffusers that we accept.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            made = getattr(diffusers, kind.transformer)
            if empty:
                with init_empty_weights(include_buffers=False):
                    transformer = made.from_config(made.load_config(**where)).to(options["torch_dtype"])
            else:
                transformer = made.from_pretrained(**where, **options)
            return kind.load_pipeline(base, torch_dtype=dtype, transformer=transformer)
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"policy.weights: {config.weights or base}: no {kind.pipeline}: {what}") from error


def weight_sources(weights: str, model: str) -> tuple[Path | None, Path | None, str]:
    """Where the adapter, the transformer (None: with the rest) and the rest are: a saved policy names what it was
    trained from, which may be a saved policy too."""
    adapter = trained = None
    while (path := Path(weights) / DESCRIPTION).is_file():
        said = json.loads(path.read_text())
        if said["model"] != model:
            raise ConfigError(f"policy.weights: {weights} is of model {said['model']} (accepted: of {model})")
        if (Path(weights) / TRANSFORMER).is_dir():
            trained = trained or Path(weights)
        elif adapter is None and trained is None:
            adapter = Path(weights)
        else:
            raise ConfigError(f"policy.weights: {weights} is a LoRA below another one (accepted: one in all)")
        weights = said["base"]
    return adapter, trained, weights


def _four_bits(dtype: torch.dtype) -> Any:
    """Raises `ConfigError` where 4-bit weights cannot be made."""
    if not torch.cuda.is_available():
        raise ConfigError("policy.quantize: 4bit (accepted without a CUDA device: none)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("policy.quantize: 4bit (accepted without bitsandbytes, pip install 'editr2[quantize]': none)")
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _asked_lora(config: PolicyConfig, kind: type[DiffusionPolicy]) -> dict[str, Any]:
    return {
        "rank": config.lora_rank,
        "alpha": float(2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha),
        "targets": config.lora_targets or kind.lora_targets,
    }


def check_adapter(config: PolicyConfig, kind: type[DiffusionPolicy], folder: Path) -> dict[str, Any]:
    """The settings (rank, alpha, targets) of a saved LoRA. Raises `ConfigError` where others are asked for."""
    saved: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())["lora"]
    for name, value in _asked_lora(config, kind).items():
        if config.lora_rank and saved[name] != value:
            raise ConfigError(f"policy.lora_{name}: {value} (accepted: {saved[name]}, that of the LoRA in {folder})")
    return saved


def _adapt(policy: DiffusionPolicy, adapter: Path | None, trains: bool) -> None:
    """The module with what trains: an adapter over frozen weights, or all of it with a saved adapter merged in. Where
    nothing trains a saved adapter stays beside the weights, as it was trained.

    Trained adapters are float32 whatever the base is.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    module, config = policy.module, policy.config
    asked = _asked_lora(config, type(policy))
    saved = check_adapter(config, type(policy), adapter) if adapter is not None else None
    lora = asked if config.lora_rank else saved
    if lora is None:
        module.requires_grad_(trains)
        return
    module.requires_grad_(False)
    try:
        module.add_adapter(
            LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"], lora_dropout=0.0)
        )
    except ValueError as error:
        why = " ".join(str(error).split())
        policy.refuse("lora_targets", repr(lora["targets"]), f"an expression that matches linear layers of it; {why}")
    for name, p in module.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(trains)
    empty = any(p.is_meta for p in module.parameters())  # then its adapters come from another process, too
    if adapter is not None and not empty:
        weights = {k.removeprefix(f"{TRANSFORMER}."): v for k, v in load_file(adapter / LORA_FILE).items()}
        found = set_peft_model_state_dict(module, weights)
        if found.unexpected_keys:
            raise CheckpointError(f"{adapter / LORA_FILE}: {found.unexpected_keys[0]}: unknown to the model")
    if trains and not config.lora_rank:
        module.fuse_lora()
        module.unload_lora()
        module.requires_grad_(True)


def save_policy(policy: DiffusionPolicy, folder: Path) -> None:
    """Writes what `load_policy` reads: a LoRA in stock diffusers' file with its metadata, or the transformer's folder,
    and `DESCRIPTION`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    base = Path(policy.base)
    said: dict[str, Any] = {"model": policy.model, "base": str(base.resolve()) if base.is_dir() else policy.base}
    module = policy.module
    if getattr(module, "peft_config", None):
        lora = module.peft_config["default"]
        said["lora"] = {"rank": lora.r, "alpha": float(lora.lora_alpha), "targets": lora.target_modules}
        weights = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(module).items()}
        type(policy.pipe).save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=lora.to_dict()
        )
    else:
        module.save_pretrained(folder / TRANSFORMER)
    (folder / DESCRIPTION).write_text(json.dumps(said, indent=1) + "\n")
