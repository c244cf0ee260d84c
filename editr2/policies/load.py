"""From settings to a policy, and from a trained policy to a folder that settings can name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from editr2.config import PolicyConfig
from editr2.config.rules import policy_problems
from editr2.config.settings import MODELS
from editr2.errors import CheckpointError, ConfigError
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
from editr2.policies.base import Policy
from editr2.policies.finite import check_weights
from editr2.policies.sharding import place
from editr2.policies.tensor_files import ordinary_modes, read_json, reading, writing
from editr2.policies.unified.policy import EMBEDDED, Guidance, UnifiedPolicy
from editr2.policies.weights import add_lora
from editr2.run.hub import check_model
from editr2.run.processes import Processes

if TYPE_CHECKING:
    from editr2.policies.diffusion import DiffusionPolicy

CLASSES = {
    "kontext": "editr2.policies.kontext:KontextPolicy",
    "klein": "editr2.policies.klein:KleinPolicy",
    "klein-kv": "editr2.policies.klein:KleinKVPolicy",
    "qwen-edit": "editr2.policies.qwen_edit:QwenEditPolicy",
    "qwen-edit-plus": "editr2.policies.qwen_edit:QwenEditPlusPolicy",
}


def load_policy(config: PolicyConfig, *, trains: bool = True, empty: bool = False) -> Policy:
    """The configured weights, ready to train: adapters alone where `lora_rank` is above 0, else all
    of the model's. trains: off, nothing trains, and the weights of models on diffusers are in
    `policy.dtype`. empty: the transformer
    of a model on diffusers holds no data, for another process's to be put there
    (`editr2.policies.sharding`).

    Raises `ConfigError` for settings the model cannot follow, and for weights that are not there or
    another model's, and `NonFiniteError` for weights that are not finite.
    """
    policy = _load(config, trains, empty)
    check_weights(policy, f"policy.weights: {config.weights or 'default'}")
    return policy


def _load(config: PolicyConfig, trains: bool, empty: bool) -> Policy:
    if config.model != "unified":
        return load_diffusion(config, trains=trains, empty=empty)
    policy = UnifiedPolicy.load(
        Path(config.weights) if config.weights else EMBEDDED, unified_guidance(config)
    )
    if config.lora_rank:
        add_lora(policy.module, config.lora_rank, config.lora_alpha, config.lora_targets)
    return policy


def open_policy(config: PolicyConfig, processes: Processes, *, trains: bool = True) -> Policy:
    """`load_policy` for a run of several processes: on their devices, whole or shared out
    (`policy.shard`).

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
        raise ConfigError(
            f"policy.model: {model!r} (accepted: {', '.join(m for m in MODELS if m in CLASSES)})"
        )
    module, _, name = CLASSES[model].partition(":")
    return cast("type[DiffusionPolicy]", getattr(importlib.import_module(module), name))


def load_diffusion(
    config: PolicyConfig, *, trains: bool = True, empty: bool = False
) -> DiffusionPolicy:
    """A pipeline's folder, a hub id, or a folder that `save_policy` wrote; see `load_policy`."""
    kind = policy_class(config.model)
    adapter, trained, base = weight_sources(config.weights or kind.published, config.model)
    if adapter is not None:
        saved_lora(config, kind, adapter)  # what is wrong with it is said before gigabytes are read
    if os.path.isabs(base) and not Path(base).is_dir():
        raise ConfigError(
            f"policy.weights: {base}: no {kind.pipeline} there (accepted: its folder, or a hub id)"
        )
    check_model(base, "policy.weights")
    pipe = _pipeline(
        kind, config, base, trained, whole=trains and not config.lora_rank, empty=empty
    )
    policy = kind(pipe, config)
    policy.base = str(trained or base)
    make_ready(policy, adapter, trains)
    return policy


def make_ready(policy: DiffusionPolicy, adapter: Path | None, trains: bool) -> None:
    """What follows a policy's assembly from its parts: its settings for autoencoder, adapters and
    execution."""
    ready_autoencoder(policy)
    _adapt(policy, adapter, trains)
    if policy.config.gradient_checkpointing:
        policy.module.enable_gradient_checkpointing()
    if policy.config.compile:
        policy.module.compile_repeated_blocks()


def _pipeline(
    kind: type[DiffusionPolicy],
    config: PolicyConfig,
    base: str,
    trained: Path | None,
    *,
    whole: bool,
    empty: bool,
) -> Any:
    """The stock pipeline with all its components, the transformer from `trained` if there is one.
    whole: all of the transformer's weights will train. empty: they are on the meta device."""
    import diffusers
    from accelerate import init_empty_weights

    try:
        stock = kind.pipeline_class()
    except AttributeError as error:
        raise ConfigError(
            f"policy.model: {kind.model} (accepted with a diffusers that has {kind.pipeline}; "
            f"this is {diffusers.__version__})"
        ) from error
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    # Trained weights stay float32: an update of a bfloat16 weight is smaller than its rounding.
    options: dict[str, Any] = {"torch_dtype": torch.float32 if whole else dtype}
    if config.quantize == "4bit":
        options["quantization_config"] = _four_bits(dtype)
    given = config.weights or base
    where = f"policy.weights: {given}" if base == given else f"policy.weights: {given}: base {base}"
    where = f"{where}: no {kind.pipeline}"
    made = kind.transformer_class()
    source = {"pretrained_model_name_or_path": trained or base, "subfolder": TRANSFORMER}
    here = f"policy.weights: {trained}" if trained else where
    if empty:
        with (
            reading(f"{here}: {TRANSFORMER}"),
            quiet_libraries(),
            init_empty_weights(include_buffers=False),
        ):
            parts = {
                TRANSFORMER: made.from_config(made.load_config(**source)).to(options["torch_dtype"])
            }
    else:
        parts = {
            TRANSFORMER: load_part(made, source, f"{here}: {TRANSFORMER}", exact=True, **options)
        }
    with reading(f"{where}: model_index.json"):
        index = dict(stock.load_config(base))
    for name in ("vae", *kind.text_encoders):
        made = part_class(index, name, f"{where}: model_index.json")
        source = {"pretrained_model_name_or_path": base, "subfolder": name}
        parts[name] = load_part(made, source, f"{where}: {name}", torch_dtype=dtype)
    return load_rest(kind, base, parts, where, torch_dtype=dtype)


def load_rest(
    kind: type[DiffusionPolicy], base: str, parts: Mapping[str, Any], where: str, **options: Any
) -> Any:
    """The pipeline with these components and all others read. Raises `ConfigError` naming one that
    cannot be, is not there, or does not fit the rest."""
    with reading(f"{where}: model_index.json"):
        index = dict(kind.pipeline_class().load_config(base))
    others = {
        name: said
        for name, said in index.items()
        if name not in parts and isinstance(said, (list, tuple))
    }
    for name, said in others.items():
        # Without its folder transformers makes a tokenizer of its default words, which are none.
        if said[0] is not None and Path(base).is_dir() and not (Path(base) / name).is_dir():
            raise ConfigError(
                f"{where}: no {name} (accepted: the folder that model_index.json names)"
            )
    try:
        with quiet_libraries():
            pipe = kind.load_pipeline(base, **parts, **options)
    except Exception:
        # The first that fails by itself is named; the processor last, since Qwen's does without
        # parts of it.
        for name in sorted(others, key=lambda name: name == "processor"):
            with reading(f"{where}: {name}"), quiet_libraries(), suppress(ImportError):
                part_class(index, name, where).from_pretrained(base, subfolder=name)
        with reading(where):
            raise
    check_words(pipe, kind, where)
    return pipe


def part_class(index: Mapping[str, Any], name: str, where: str) -> Any:
    """The class of a pipeline's component, which its index names by library and name."""
    said = index.get(name)
    if not isinstance(said, (list, tuple)) or [type(word) for word in said] != [str, str]:
        raise ConfigError(
            f"{where}: {name}: {said!r} (accepted: a library and the class of its {name})"
        )
    with reading(f"{where}: {name}: {list(said)!r}"):
        return getattr(importlib.import_module(said[0]), said[1])


def load_part(
    made: Any, source: Mapping[str, Any], where: str, *, exact: bool = False, **options: Any
) -> Any:
    """A component with weights by its own class's `from_pretrained`, which makes up what a file
    lacks. Here it is a `ConfigError`, as is a tensor of another shape or (exact) of another
    name."""
    if not made.__module__.startswith("diffusers."):
        options["dtype"] = options.pop("torch_dtype")
    if "quantization_config" not in options:
        options["ignore_mismatched_sizes"] = True  # so that they come back by name
    folder = Path(source["pretrained_model_name_or_path"])
    if (
        folder.is_dir()
    ):  # without it transformers builds a model of its default size, billions of numbers
        read_json(folder / source["subfolder"] / "config.json")
    with reading(where), quiet_libraries():
        module, found = made.from_pretrained(**source, output_loading_info=True, **options)
        misfits = sorted(
            (key, list(given), list(own)) for key, given, own in found["mismatched_keys"]
        )
        gone, odd = sorted(found["missing_keys"]), sorted(found["unexpected_keys"]) if exact else []
    for key, given, own in misfits:
        raise ConfigError(f"{where}: {key}: {given} (accepted: {own}, by its config.json)")
    for what, keys in (("missing from the weights", gone), ("no weight of its config.json's", odd)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if keys[1:] else ""
            raise ConfigError(
                f"{where}: {keys[0]}: {what}{more} (accepted: exactly what its config.json "
                f"describes)"
            )
    return module


def check_words(pipe: Any, kind: type[DiffusionPolicy], where: str) -> None:
    """Raises `ConfigError` where a tokenizer has tokens that its text encoder does not know."""
    for name in kind.text_encoders:
        encoder = getattr(pipe, name)
        tokenizer = getattr(pipe, beside := name.replace("text_encoder", "tokenizer"), None)
        if tokenizer is None or not hasattr(encoder, "get_input_embeddings"):
            continue
        with reading(f"{where}: {beside}"):
            vocabulary, known = (
                tokenizer.get_vocab(),
                encoder.get_input_embeddings().weight.shape[0],
            )
            words = 1 + max(vocabulary.values(), default=-1)
            special_only = not vocabulary.keys() - tokenizer.get_added_vocab().keys()
        if special_only:
            raise ConfigError(
                f"{where}: {beside}: no words (accepted: a vocabulary; was its file removed?)"
            )
        if words > known:
            raise ConfigError(
                f"{where}: {beside}: {words} tokens (accepted: at most {known}, those of its "
                f"{name})"
            )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' notes about weights that are missing, which `load_part` turns into
    errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # torch_dtype's new name, dtype, is unknown to the oldest diffusers that we accept.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])


def weight_sources(weights: str, model: str) -> tuple[Path | None, Path | None, str]:
    """Where the adapter, the transformer (None: with the rest) and the rest are: a saved policy
    names what it was trained from, which may be a saved policy too. Raises `CheckpointError` for a
    policy.json that is none."""
    adapter = trained = None
    given, seen = weights, set()
    while (path := Path(weights) / DESCRIPTION).is_file():
        if path.resolve() in seen:
            raise CheckpointError(
                f"{Path(given) / DESCRIPTION}: base: leads back to {weights} (accepted: what it "
                f"was trained from)"
            )
        seen.add(path.resolve())
        said = read_description(Path(weights))
        if said.model != model:
            raise ConfigError(
                f"policy.weights: {weights} is of model {said.model} (accepted: of {model})"
            )
        if said.lora is None:
            trained = trained or Path(weights)
        elif adapter is None and trained is None:
            adapter = Path(weights)
        else:
            raise ConfigError(
                f"policy.weights: {weights} is a LoRA below another one (accepted: one in all)"
            )
        if os.path.isabs(said.base) and not Path(said.base).is_dir():
            raise CheckpointError(
                f"{path}: base: {said.base} is not there (accepted: its new place, or a hub id)"
            )
        weights = said.base
    return adapter, trained, weights


def _four_bits(dtype: torch.dtype) -> Any:
    """Raises `ConfigError` where 4-bit weights cannot be made."""
    if not torch.cuda.is_available():
        raise ConfigError("policy.quantize: 4bit (accepted without a CUDA device: none)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "policy.quantize: 4bit (accepted without bitsandbytes, pip install "
            "'editr2[quantize]': none)"
        )
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def asked_lora(config: PolicyConfig, kind: type[DiffusionPolicy]) -> Lora:
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return Lora(config.lora_rank, float(alpha), config.lora_targets or kind.lora_targets)


def saved_lora(config: PolicyConfig, kind: type[DiffusionPolicy], folder: Path) -> Lora:
    """The settings of a saved LoRA. Raises `ConfigError` where others are asked for, and
    `CheckpointError` for settings or a file that are none."""
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
    module: Any, config: PolicyConfig, kind: type[DiffusionPolicy], adapter: Path | None
) -> Lora | None:
    """Adapters as configured, or as those saved in the folder `adapter`; None where there are
    none."""
    saved = None if adapter is None else saved_lora(config, kind, adapter)
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


def _adapt(policy: DiffusionPolicy, adapter: Path | None, trains: bool) -> None:
    """The module with what trains: an adapter over frozen weights, or all of it with a saved
    adapter merged in. Where nothing trains a saved adapter stays beside the weights, as it was
    trained.

    Trained adapters are float32 whatever the base is.
    """
    module, config = policy.module, policy.config
    lora = put_adapter(module, config, type(policy), adapter)
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
    if trains and not config.lora_rank:
        module.fuse_lora()
        module.unload_lora()
        module.requires_grad_(True)


def ready_autoencoder(policy: DiffusionPolicy) -> None:
    """One image at a time; in tiles (above the autoencoder's own sample size) only where it was
    asked for, since tiles are not the stock pipeline's numbers."""
    policy.pipe.vae.enable_slicing()
    if policy.config.vae_tiling:
        policy.pipe.vae.enable_tiling()


def save_policy(policy: DiffusionPolicy, folder: Path) -> None:
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


def rehearse_save(policy: Policy, run: Path) -> None:
    """Saves the policy into a run's folder and removes it again: what cannot be saved fails before
    it is trained."""
    folder = run / ".tmp-policy"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    try:
        policy.save(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
