"""Editors that are diffusers pipelines: what such a model says of itself, and how its parts are
read.

Nothing here runs the editor; that is `editr2.policies.diffusion`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from editr2.config import PolicyConfig
from editr2.config.rules import folder_problem
from editr2.errors import CheckpointError, ConfigError
from editr2.policies.adapters import DESCRIPTION, TRANSFORMER, read_description
from editr2.policies.attention import problem_of
from editr2.policies.configured import FIELDS, ConfiguredPolicy, Stock
from editr2.policies.forms import DiffusersFolder, DiffusersLora, Form
from editr2.policies.libraries import quiet_libraries, stock_pipeline
from editr2.policies.tensor_files import read_json, reading
from editr2.run.hub import INDEX, model_index


@dataclass(frozen=True)
class Parts:
    """What a published editor is made of, so that nothing has to be downloaded to judge a run. Only
    what differs from the defaults of diffusers' classes is written down; a folder's own files win.

    transformer, vae, scheduler, pipeline: settings. text: parameters of each text encoder, by its
    name in the pipeline.

    Settings were checked against the makers' and diffusers' conversion code and copies of the
    published files in other projects, numbers of parameters against the weights' own headers;
    tests/test_published.py counts them again. Only the schedulers of Kontext and of klein's KV
    variant were not found by themselves: they are taken to be their families'.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text: Mapping[str, int]
    pipeline: Mapping[str, Any] = field(default_factory=dict)


FLUX_BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
"""Of the autoencoders of FLUX.1 and FLUX.2."""
FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""Of their schedulers."""


OF_UNIFIED = {
    *("thinking", "thinking_tokens", "questions", "experts"),
    *("guidance_interval", "rounding"),
}
"""Settings that the unified policies alone follow."""


class PipelineModel(ConfiguredPolicy):
    """What a model on a diffusers pipeline says of itself without being loaded."""

    uses = frozenset(FIELDS) - OF_UNIFIED
    edits_the_world = False
    holds = f"{DESCRIPTION} (as a run saves it) or {INDEX}"

    model: ClassVar[str]
    """Its name in `policy.model`, and in the folders of saved policies."""
    pipeline: ClassVar[str]
    """Its class in diffusers."""
    transformer: ClassVar[str]
    """The class of what trains."""
    hub_id: ClassVar[str]
    """Of the weights that `policy.weights` none stands for."""
    published: ClassVar[Mapping[str, Parts]] = MappingProxyType({})
    """Published weights by hub id, which `editr2 check` knows without a download."""
    lora_targets: ClassVar[str]
    """Regular expression over the names of the transformer's attention and MLP layers."""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """The pipeline's components that `embed` runs."""
    text_sees_images: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    """Whether its transformer is given masks, of prompts of different lengths."""
    recomputes: ClassVar[bool] = True
    """Whether the blocks can be computed again in the backward pass."""
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    """Of the stock pipeline's call, that `policy.guidance` is."""
    instead_of_shard: ClassVar[str] = ""
    """Which model takes `policy.shard` where this one does not, and why; empty where it does."""

    @classmethod
    def pipeline_class(cls) -> Any:
        """`pipeline`, of diffusers. Raises `AttributeError` where the installed one has it not."""
        return stock_pipeline(cls.pipeline)

    @classmethod
    def transformer_class(cls) -> Any:
        """`transformer`, of diffusers."""
        import diffusers

        return getattr(diffusers, cls.transformer)

    @classmethod
    def load_pipeline(cls, base: str, **components: Any) -> Any:
        """The stock pipeline of a folder or hub id. components: keywords of its
        `from_pretrained`."""
        return cls.pipeline_class().from_pretrained(base, **components)

    @classmethod
    def stand_in(cls, name: str) -> Any:
        """What its constructor takes for a component that is not there, neither weights nor
        autoencoder nor scheduler."""
        return None

    @classmethod
    def problems(cls, config: PolicyConfig, trains: bool = True) -> Iterator[str]:
        yield from super().problems(config, trains)
        p = config
        if p.cache is not None and (problem := folder_problem(p.cache)):
            yield f"policy.cache: {p.cache!r} (accepted: a folder; {problem})"
        if p.attention is not None and (problem := problem_of(p.attention)):
            yield problem
        if p.quantize != "none" and not p.lora_rank:
            yield (
                f"policy.quantize: {p.quantize} (accepted with policy.lora_rank 0: none; what "
                f"trains is not quantized)"
            )
        if p.buckets and p.condition_resolution is not None:
            yield (
                f"policy.condition_resolution: {list(p.condition_resolution)} (accepted with "
                f"policy.buckets: none; conditions have their session's size)"
            )
        if not p.shard:
            if p.shard_group is not None:
                yield (
                    f"policy.shard_group: {p.shard_group} (accepted with policy.shard false: none)"
                )
            return
        for name, accepted, why in (
            ("quantize", p.quantize != "4bit", "none, fp8; 4-bit weights are not sharded"),
            ("model", not cls.instead_of_shard, cls.instead_of_shard),
        ):
            if not accepted:
                yield f"policy.{name}: {getattr(p, name)} (accepted with policy.shard: {why})"

    @classmethod
    def sources(cls, config: PolicyConfig) -> Sequence[str]:
        parts = weight_sources(config.weights or cls.hub_id, cls.model)
        return [str(part) for part in parts if part]

    @classmethod
    def form(cls, config: PolicyConfig, kind: str) -> Form:
        return DiffusersLora(cls.pipeline) if kind == "lora" else DiffusersFolder(cls.pipeline)

    @classmethod
    def owns(cls, folder: Path) -> bool:
        if (folder / DESCRIPTION).is_file():
            return read_description(folder).model == cls.model
        return (folder / INDEX).is_file() and (
            read_json(folder / INDEX).get("_class_name") == cls.pipeline
        )

    @classmethod
    def settings_for(cls, config: PolicyConfig, folder: Path) -> PolicyConfig:
        if (folder / DESCRIPTION).is_file() and read_description(folder).lora is not None:
            return dataclasses.replace(config, weights=str(folder), lora_weights=None)
        return super().settings_for(config, folder)

    @classmethod
    def stock(cls, config: PolicyConfig) -> Stock | None:
        given = inspect.signature(stock_class(cls).__call__).parameters
        guidance = given.get(cls.guidance_argument)
        settings = {} if guidance is None else {"guidance": float(guidance.default)}
        return Stock(int(given["num_inference_steps"].default), settings)

    @classmethod
    def pipeline_settings(cls, config: PolicyConfig) -> Mapping[str, Any]:
        """What `model_index.json` of the weights says; nothing of those that are neither known, nor
        here or downloaded before."""
        base = weight_sources(config.weights or cls.hub_id, cls.model)[2]
        if base in cls.published:
            return cls.published[base].pipeline
        file = model_index(base)
        return {} if file is None else read_json(file)


def stock_class(kind: type[PipelineModel]) -> Any:
    """The pipeline's class. Raises `ConfigError` where the installed diffusers has it not."""
    import diffusers

    try:
        return kind.pipeline_class()
    except AttributeError as error:
        raise ConfigError(
            f"policy.model: {kind.model} (accepted with a diffusers that has {kind.pipeline}; "
            f"this is {diffusers.__version__})"
        ) from error


def read_pipeline(
    kind: type[PipelineModel],
    config: PolicyConfig,
    base: str,
    trained: Path | None,
    *,
    whole: bool,
    empty: bool,
) -> Any:
    """The stock pipeline with all its components, the transformer from `trained` if there is one.
    whole: all of the transformer's weights will train. empty: they are on the meta device."""
    from accelerate import init_empty_weights

    stock = stock_class(kind)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    # Trained weights stay float32: an update of a bfloat16 weight is smaller than its rounding.
    options: dict[str, Any] = {"torch_dtype": torch.float32 if whole else dtype}
    if config.quantize == "4bit":
        options["quantization_config"] = four_bits(dtype)
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
    kind: type[PipelineModel], base: str, parts: Mapping[str, Any], where: str, **options: Any
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


def check_words(pipe: Any, kind: type[PipelineModel], where: str) -> None:
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


def four_bits(dtype: torch.dtype) -> Any:
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
