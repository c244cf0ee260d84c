"""A published BAGEL checkpoint's folder: sizes, words and weights, read strictly.

    config.json llm_config.json vit_config.json ema.safetensors ae.safetensors tokenizer files

`ema.safetensors` holds the transformer (`UnifiedModel` has its names), the vision transformer with
its connector (`Sight`), and nothing else; `ae.safetensors` FLUX.1's autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from editr2.errors import CheckpointError, ConfigError
from editr2.policies.tensor_files import (
    Shape,
    check_shapes,
    read_header,
    read_json,
    reading,
)
from editr2.policies.tokens import TextCodec
from editr2.policies.unified.codecs import autoencoder_of, autoencoder_without_weights
from editr2.policies.unified.model import LARGEST, LARGEST_SIZE, UnifiedConfig, UnifiedModel
from editr2.policies.unified.sight import SIGHT_RULE, Sight, SizeRule

CONFIG, WORDS, SEES = "config.json", "llm_config.json", "vit_config.json"
WEIGHTS, AUTOENCODER, TOKENIZER = "ema.safetensors", "ae.safetensors", "tokenizer.json"
FILES = (CONFIG, WORDS, SEES, WEIGHTS, AUTOENCODER, TOKENIZER)
KEPT_SUFFIXES = (".json", ".txt", ".md")
"""Of the files that a saved policy takes over, besides the autoencoder's."""

_VIT = "vit_model."
_VISION = "vision_model."
_PATCHES = "embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class Published:
    """A folder whose files fit together; no weight was read.

    sizes: of the transformer. vit: settings of transformers' `SiglipVisionConfig`. shapes: of all
    tensors in `WEIGHTS`.
    """

    folder: Path
    sizes: UnifiedConfig
    vit: Mapping[str, Any]
    codec: TextCodec
    shapes: Mapping[str, Shape]

    def model(
        self,
        dtype: torch.dtype,
        *,
        trains: Callable[[str], bool] = lambda name: False,
        empty: bool = False,
    ) -> UnifiedModel:
        """The transformer with its weights. trains: which of them will, by name; they are float32
        whatever the others' dtype is. empty: without data, on the meta device."""
        with init_empty_weights(include_buffers=False):
            model = UnifiedModel(self.sizes)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and trains(name))
        if empty:
            as_trained(model, dtype, trains)
        else:
            names = {name: name for name in model.state_dict()}
            dtypes = {name: torch.float32 if trains(name) else dtype for name in names}
            _fill(model, self.folder / WEIGHTS, names, dtypes)
        return model.eval()

    def sight(self, dtype: torch.dtype, rule: SizeRule = SIGHT_RULE) -> Sight:
        sight = new_sight(self.vit, self.sizes.hidden_size, rule)
        names = sight_names(sight)
        _fill(sight, self.folder / WEIGHTS, names, dict.fromkeys(names.values(), dtype))
        return sight

    def autoencoder(self) -> Any:
        """In float32."""
        return autoencoder_of(self.folder / AUTOENCODER)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What `WEIGHTS` holds."""
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                yield name, file.get_tensor(name)


def new_sight(vit: Mapping[str, Any], width: int, rule: SizeRule = SIGHT_RULE) -> Sight:
    """Without data: on the meta device, or simulated."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**vit, vision_use_head=False)
    with init_empty_weights(include_buffers=False):
        return Sight(SiglipVisionModel(config), width, rule)


def sight_names(sight: Sight) -> dict[str, str]:
    """Its tensors' names by those of the file."""
    names = {}
    for name in sight.state_dict():
        inner = name.removeprefix(_VIT)
        published = _VIT + _VISION + inner.removeprefix(_VISION)
        names[published if inner != name else name] = name
    return names


def read_published(folder: Path) -> Published:
    """Sizes and words of a folder, whose weights fit them; the weights themselves are not read.
    Raises a `UserError` that names the file and the key of what is missing, unknown or does not
    fit."""
    for name in FILES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name} (accepted: BAGEL's published folder, {', '.join(FILES)})"
            )
    shapes, _ = read_header(folder / WEIGHTS)
    sizes = _sizes(folder, shapes)
    vit = _vit_settings(folder / SEES)
    codec = TextCodec.load(folder / TOKENIZER)
    words = 1 + max(codec.tokenizer.get_vocab().values())
    if words > sizes.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: {words} tokens (accepted: at most {sizes.vocab_size}, those of "
            f"{WEIGHTS})"
        )
    with init_empty_weights(include_buffers=False):
        model = UnifiedModel(sizes)
    sight = new_sight(vit, sizes.hidden_size)
    needed = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    own = sight.state_dict()
    needed |= {theirs: tuple(own[ours].shape) for theirs, ours in sight_names(sight).items()}
    patches = _VIT + _VISION + _PATCHES
    flat = (needed[patches][0], math.prod(needed[patches][1:]))
    if shapes.get(patches) != needed[patches]:
        needed[patches] = flat  # the form that is published; a convolution's is met, too
    check_shapes(folder / WEIGHTS, shapes, needed, f"the model that {WORDS} and {SEES} describe")
    autoencoder_without_weights(folder / AUTOENCODER)
    return Published(folder, sizes, vit, codec, shapes)


def _sizes(folder: Path, shapes: Mapping[str, Shape]) -> UnifiedConfig:
    said, file = read_json(folder / WORDS), folder / WORDS

    def shape(name: str, dims: int) -> Shape:
        found = shapes.get(name)
        if found is None or len(found) != dims:
            what = "missing" if found is None else str(list(found))
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name}: {what} (accepted: all tensors of BAGEL)"
            )
        return found

    def whole(path: Path, values: Mapping[str, Any], name: str) -> int:
        value, most = values.get(name), LARGEST.get(name, LARGEST_SIZE)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(f"{path}: {name}: {value!r} (accepted: 1 to {most})")
        return value

    def number(name: str) -> float:
        value: Any = said.get(name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 < value < math.inf:
            raise CheckpointError(f"{file}: {name}: {value!r} (accepted: a number above 0)")
        return float(value)

    patch = whole(folder / CONFIG, read_json(folder / CONFIG), "latent_patch_size")
    latent = shape("vae2llm.weight", 2)[1]
    places = shape("latent_pos_embed.pos_embed", 2)[0]
    if latent % patch**2 or math.isqrt(places) ** 2 != places:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {latent} numbers a latent token on {places} places (accepted: "
            f"patches of {patch} x {patch}, a square of places)"
        )
    vocabulary, hidden = shape("language_model.model.embed_tokens.weight", 2)
    try:
        return UnifiedConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=whole(file, said, "intermediate_size"),
            num_hidden_layers=whole(file, said, "num_hidden_layers"),
            num_attention_heads=whole(file, said, "num_attention_heads"),
            num_key_value_heads=whole(file, said, "num_key_value_heads"),
            rope_theta=number("rope_theta"),
            rms_norm_eps=number("rms_norm_eps"),
            latent_channels=latent // patch**2,
            latent_patch_size=patch,
            max_latent_size=math.isqrt(places),
            frequency_size=shape("time_embedder.mlp.0.weight", 2)[1],
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


_VIT_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)
_VIT_MORE = ("hidden_act", "layer_norm_eps", "num_channels")


def _vit_settings(path: Path) -> dict[str, Any]:
    """The file counts one layer more than there is: the last is dropped."""
    said = read_json(path)
    for name in _VIT_SIZES:
        value = said.get(name)
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise CheckpointError(f"{path}: {name}: {value!r} (accepted: 1 to {1 << 16})")
    if not 2 <= said["num_hidden_layers"] <= LARGEST["num_hidden_layers"]:
        raise CheckpointError(
            f"{path}: num_hidden_layers: {said['num_hidden_layers']} (accepted: 2 to "
            f"{LARGEST['num_hidden_layers']})"
        )
    taken = {name: said[name] for name in (*_VIT_SIZES, *_VIT_MORE) if name in said}
    taken["num_hidden_layers"] -= 1
    with reading(path):
        from transformers import SiglipVisionConfig

        SiglipVisionConfig(**taken)
    return taken


def as_trained(module: nn.Module, dtype: torch.dtype, trains: Callable[[str], bool]) -> None:
    """Brings a module without data to the precision that its weights will have: what trains, by
    name, is float32, since an update is smaller than bfloat16's rounding."""
    for name, p in list(module.named_parameters()):
        to = torch.float32 if trains(name) else dtype
        owner, _, own = name.rpartition(".")
        made = nn.Parameter(torch.empty_like(p, dtype=to), p.requires_grad)
        setattr(module.get_submodule(owner), own, made)


def _fill(
    module: nn.Module, path: Path, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Puts the file's tensors into a module without data. names: of its tensors, by the file's;
    dtypes: by its own."""
    own, state = module.state_dict(), {}
    with ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(safe_open(path, "pt"))
        for theirs, ours in names.items():
            tensor = file.get_tensor(theirs).to(dtypes[ours])
            if tensor.shape != own[ours].shape:  # patches as a matrix: row, column, channel
                out, channels, high, wide = own[ours].shape
                tensor = tensor.view(out, high, wide, channels).permute(0, 3, 1, 2).contiguous()
            state[ours] = tensor
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    module.load_state_dict(state, assign=True)
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)


__all__ = ["FILES", "Published", "as_trained", "new_sight", "read_published", "sight_names"]
