"""`policy.lora_weights`: a LoRA that others wrote, as the start of the adapters.

    layout     keys                                          strength of a layer
    diffusers  [transformer.]LAYER.lora_A.weight             the settings in the file's metadata;
                                                             else LAYER.alpha / rank; else 1
    peft       base_model.model.LAYER.lora_A.weight          adapter_config.json
    state      base_model.model.LAYER.lora_A.default.weight  not in the file: policy.lora_alpha

The first two are what diffusers' and peft's own loaders take, and count as these count them. The
last is the state of a module that peft wraps, such as Edit-R2's release leaves in
`checkpoint-N/model.safetensors`: base weights inside, which have to be those of `policy.weights`.

A file adds strength x B A to a layer, whatever alpha training takes: where that is another, B is
scaled, so that the start is the file's policy and `policy.lora_alpha` says how far a step moves it.
LAYER may count from a part of the model, as peft does that wrapped that part alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.errors import CheckpointError, ConfigError, one_line
from editr2.policies.adapters import LORA_FILE, SETTINGS, TRANSFORMER, Lora, above_zero, scaled
from editr2.policies.finite import ACCEPTED, unusable
from editr2.policies.recorded import PEFT
from editr2.policies.tensor_files import BLOCK, Shape, read_header, read_json, reading

PEFT_FILE = "adapter_model.safetensors"
STATE_FILE = "model.safetensors"
FILES = (LORA_FILE, PEFT_FILE, STATE_FILE)
"""What is looked for in a folder."""

_WRAPPED = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Where peft keeps what single layers have of a setting."""
_ALONE: Mapping[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
}
"""Of peft's settings that can make more of adapters than strength x B A over the base: with which
values they do not. Other `init_lora_weights` (pissa, olora, corda, loftq) change the base, too."""
_KEYS = "LAYER.lora_A.weight and LAYER.lora_B.weight, as diffusers and peft write them"


@dataclass(frozen=True)
class LoraFile:
    """What the header of a file says. Names of layers are the file's.

    keys: those of A and B, by layer. strengths: by layer; None where nothing says them. others:
    keys of base weights that it holds besides, by their names. shapes: of all, by key.
    """

    path: Path
    rank: int
    keys: Mapping[str, Mapping[str, str]]
    strengths: Mapping[str, float] | None
    others: Mapping[str, str]
    shapes: Mapping[str, Shape]

    def strengths_by(self, config: PolicyConfig) -> Mapping[str, float]:
        """By layer. Raises `ConfigError` where neither the file nor the settings say them."""
        if self.strengths is not None:
            return self.strengths
        if config.lora_alpha is None:
            raise ConfigError(
                f"policy.lora_alpha: none (accepted with {self.path}, which says none: the alpha "
                f"that it was trained with, of rank {self.rank})"
            )
        return dict.fromkeys(self.keys, config.lora_alpha / self.rank)

    def check(self, module: nn.Module) -> dict[str, str]:
        """The model's names of its layers. Raises `CheckpointError` naming the key of a layer or a
        weight that is not the model's, or of another shape. module: of full depth, before
        adapters; no data is read."""
        linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        first = next(iter(self.keys))
        roots = ("", *(f"{name}." for name, _ in module.named_children()))
        root = next((root for root in roots if root + first in linear), "")
        named = {}
        for layer, keys in self.keys.items():
            found = linear.get(root + layer)
            if found is None:
                raise CheckpointError(
                    f"{self.path}: {keys['A']}: no linear layer of this model is called "
                    f"{root + layer} (accepted: a LoRA of policy.model and policy.weights)"
                )
            needed = {"A": (self.rank, found.in_features), "B": (found.out_features, self.rank)}
            for side, shape in needed.items():
                self._same_shape(keys[side], shape)
            named[layer] = root + layer
        own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        for name, key in self.others.items():
            if root + name not in own:
                raise CheckpointError(
                    f"{self.path}: {key}: neither part of a LoRA nor a weight of this model "
                    f"(accepted: {_KEYS})"
                )
            self._same_shape(key, own[root + name])
        return named

    def _same_shape(self, key: str, needed: Shape) -> None:
        if self.shapes[key] != needed:
            raise CheckpointError(
                f"{self.path}: {key}: {list(self.shapes[key])} (accepted: {list(needed)}, of this "
                f"model at rank {self.rank})"
            )


@dataclass(frozen=True)
class Start:
    """A LoRA file, the adapters that take it up, and the model's names of its layers by the
    file's. strengths: by layer, of the file. gen: whether one expert alone gets adapters."""

    file: LoraFile
    lora: Lora
    named: Mapping[str, str]
    strengths: Mapping[str, float]
    gen: bool

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Puts the file's numbers into the adapters of a module; those that it has none for stay as
        they are, B at zero, and tensors without data stay so.

        Raises `CheckpointError` for numbers that are not finite and for base weights that are
        others than the module's, and `ConfigError` where one of its layers has no adapters."""
        weights, path = dict(module.named_parameters()), self.file.path
        asked, other = (
            ("policy.experts: gen", "all")
            if self.gen
            else (
                f"policy.lora_targets: {self.lora.targets!r}",
                "an expression that matches it, too",
            )
        )
        for name in self.named.values():
            if f"{name}.lora_A.default.weight" not in weights:
                raise ConfigError(
                    f"{asked} (accepted with policy.lora_weights {path}, which adapts {name}: "
                    f"{other})"
                )
        with ExitStack() as stack:
            with reading(path):
                opened = stack.enter_context(safe_open(path, "pt"))
            self._compare_base(opened, weights)
            for layer, name in self.named.items():
                for side, key in self.file.keys[layer].items():
                    p = weights[f"{name}.lora_{side}.default.weight"]
                    if p.is_meta:
                        continue
                    tensor = opened.get_tensor(key)
                    if unusable([(key, tensor)]):
                        raise CheckpointError(
                            f"{path}: {key}: NaN, infinite or too large ({ACCEPTED})"
                        )
                    ratio = self.strengths[layer] / self.lora.strength if side == "B" else 1.0
                    p.copy_(scaled(tensor.to(p.dtype), ratio))

    def _compare_base(self, opened: Any, weights: Mapping[str, Tensor]) -> None:
        """A block of each base weight inside beside the module's: adapters over another base are
        another policy. In bfloat16, to which either may have been rounded."""
        for name, key in self.file.others.items():
            owner, _, last = (self.root + name).rpartition(".")
            own = weights.get(f"{owner}.base_layer.{last}", weights.get(f"{owner}.{last}"))
            if own is None or own.is_meta:
                continue
            first = own.shape[0] // 2
            middle = slice(first, first + 1 + BLOCK // own[0].numel())
            theirs = opened.get_slice(key)[middle]
            if not torch.equal(theirs.bfloat16(), own[middle].detach().cpu().bfloat16()):
                raise CheckpointError(
                    f"{self.file.path}: {key}: other numbers than policy.weights has there "
                    f"(accepted: a LoRA over these weights)"
                )

    @property
    def root(self) -> str:
        layer, name = next(iter(self.named.items()))
        return name.removesuffix(layer)


def start_of(config: PolicyConfig, module: nn.Module, targets: str) -> Start | None:
    """What `policy.lora_weights` starts the adapters of a module from; None without it. With
    `policy.lora_rank` these are the adapters of the settings, else just the file's, as strong as
    there. module: before adapters, with or without data. targets: of the model, where the settings
    name none.

    Raises `ConfigError` for settings beside which the file cannot stand, `CheckpointError` naming
    the file and key of what is no LoRA, or not of this model."""
    file = read_lora(config)
    if file is None:
        return None
    strengths, named = file.strengths_by(config), file.check(module)
    if config.lora_rank:
        alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        lora = Lora(file.rank, float(alpha), config.lora_targets or targets)
    else:
        common = next(iter(strengths.values())) if len(set(strengths.values())) == 1 else 1.0
        lora = Lora(file.rank, file.rank * common, "|".join(map(re.escape, named.values())))
    return Start(file, lora, named, strengths, config.experts == "gen")


def lora_file(weights: str) -> Path:
    """The file that `policy.lora_weights` names, itself or by its folder. Raises `ConfigError`."""
    given = Path(weights).expanduser()
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(
            f"policy.lora_weights: {weights}: not there (accepted: a .safetensors file, or a "
            f"folder with {' or '.join(FILES)})"
        )
    there = [name for name in FILES if (given / name).is_file()]
    if len(there) != 1:
        have = f"has {' and '.join(there)}" if there else "has none"
        raise ConfigError(
            f"policy.lora_weights: {weights}: {have} (accepted: a folder with one of "
            f"{', '.join(FILES)}, or a file)"
        )
    return given / there[0]


def lora_sources(config: PolicyConfig) -> list[Path]:
    """The files that a run with `policy.lora_weights` depends on."""
    if config.lora_weights is None:
        return []
    path = lora_file(config.lora_weights)
    beside = path.with_name(PEFT)
    return [path, *([beside] if path.name == PEFT_FILE and beside.is_file() else [])]


def read_lora(config: PolicyConfig) -> LoraFile | None:
    """The header of the LoRA that the settings start from, if they do. Raises a `UserError` naming
    the file and key of what is no LoRA, and `ConfigError` for another `policy.lora_rank`."""
    if config.lora_weights is None:
        return None
    path = lora_file(config.lora_weights)
    shapes, metadata = read_header(path)
    prefixes = (_WRAPPED, f"{TRANSFORMER}.")
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in shapes)), "")
    keys: dict[str, dict[str, str]] = {}
    alphas, others = {}, {}
    for key in sorted(shapes):
        name = key.removeprefix(prefix)
        if prefix and name == key:
            raise CheckpointError(f"{path}: {key}: outside of {prefix} (accepted: {_KEYS})")
        if match := _MATRIX.fullmatch(name):
            keys.setdefault(match[1], {})[match[2]] = key
        elif match := _ALPHA.fullmatch(name):
            alphas[match[1]] = key
        else:
            others[name.replace(".base_layer.", ".")] = key
    state = any(key.endswith(".default.weight") for pair in keys.values() for key in pair.values())
    if not keys or (others and not state):
        what = f"{next(iter(others.values()), 'no tensors')}"
        raise CheckpointError(f"{path}: {what}: no part of a LoRA (accepted: {_KEYS})")
    rank = _rank(path, keys, shapes)
    if config.lora_rank not in (0, rank):
        raise ConfigError(
            f"policy.lora_rank: {config.lora_rank} (accepted with policy.lora_weights {path}: "
            f"{rank}, its own)"
        )
    said = _said(path, metadata, prefix)
    if said is not None and alphas:
        raise CheckpointError(
            f"{path}: {next(iter(alphas.values()))}: beside settings that say alpha, too "
            f"(accepted: one of both)"
        )
    strengths: dict[str, float] | None = None
    if said is not None:
        where, settings = said
        strengths = {layer: _strength(where, settings, layer, rank) for layer in keys}
    elif alphas:
        strengths = _by_alpha(path, keys, alphas, rank)
    elif prefix != _WRAPPED and not state:
        strengths = dict.fromkeys(keys, 1.0)
    return LoraFile(path, rank, keys, strengths, others, shapes)


def _rank(path: Path, keys: Mapping[str, Mapping[str, str]], shapes: Mapping[str, Shape]) -> int:
    """Of all layers. Raises `CheckpointError` naming a key that has no other half, or is of another
    rank than the first."""
    rank = 0
    for pair in keys.values():
        for side, other, place in (("A", "B", 0), ("B", "A", 1)):
            if side not in pair:
                raise CheckpointError(
                    f"{path}: {pair[other]}: without its lora_{side} (accepted: {_KEYS})"
                )
            shape = shapes[pair[side]]
            own = shape[place] if len(shape) == 2 else 0
            rank = rank or own
            if own != rank or not own:
                raise CheckpointError(
                    f"{path}: {pair[side]}: {list(shape)} (accepted: a matrix of rank {rank}; all "
                    f"layers have one)"
                )
    return rank


def _said(
    path: Path, metadata: Mapping[str, str], prefix: str
) -> tuple[str, Mapping[str, Any]] | None:
    """The adapters' settings, as peft calls them, and where they stand; None where nowhere."""
    beside = path.with_name(PEFT)
    if path.name == PEFT_FILE and beside.is_file():
        return str(beside), read_json(beside)
    if SETTINGS not in metadata:
        return None
    try:
        said = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {SETTINGS}: no JSON: {one_line(error)}") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: {SETTINGS}: a {type(said).__name__} (accepted: an object)")
    inner = prefix if prefix != _WRAPPED else ""
    return f"{path}: {SETTINGS}", {key.removeprefix(inner): v for key, v in said.items()}


def _strength(where: str, said: Mapping[str, Any], layer: str, rank: int) -> float:
    """Of a layer, by the settings of its file: alpha / rank, or alpha over its root."""

    def number(name: str) -> float:
        value, patterns = said.get(name), said.get(_PATTERNS[name])
        for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
            with reading(f"{where}: {name}: {pattern!r}"):
                if re.match(rf"(.*\.)?({pattern})$", layer):  # as peft looks it up
                    value = own
                    break
        found = above_zero(value)
        if found is None:
            raise CheckpointError(f"{where}: {name}: {value!r} (accepted: a number above 0)")
        return found

    for name, accepted in _ALONE.items():
        if said.get(name) not in accepted:
            raise CheckpointError(
                f"{where}: {name}: {said[name]!r} (accepted: {', '.join(map(repr, accepted))}; "
                f"else it is not a LoRA over policy.weights alone)"
            )
    if number("r") != rank:
        raise CheckpointError(
            f"{where}: r: {number('r'):g} (accepted: {rank}, that of the tensors of {layer})"
        )
    return number("lora_alpha") / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _by_alpha(
    path: Path, keys: Mapping[str, Any], alphas: Mapping[str, str], rank: int
) -> dict[str, float]:
    """Of layers that have their alpha beside them, which all of them have, or none."""
    found = {}
    if odd := sorted(set(alphas) ^ set(keys)):
        key = alphas.get(odd[0], f"{odd[0]}.alpha")
        what = "of a layer without matrices" if odd[0] in alphas else "missing beside others"
        raise CheckpointError(f"{path}: {key}: {what} (accepted: one for each layer, or none)")
    with safe_open(path, "pt") as file:
        for layer, key in alphas.items():
            tensor = file.get_tensor(key)
            value = above_zero(tensor.item()) if tensor.numel() == 1 else None
            if value is None:
                raise CheckpointError(f"{path}: {key}: (accepted: one number above 0)")
            found[layer] = value / rank
    return found
