"""BAGEL's published weights: a `UnifiedPolicy` on an autoencoder's latents, which also sees every
image through a frozen vision transformer.

Only the transformer trains. Autoencoder and vision transformer stay as published, outside of
`module`, and are asked once an image.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.errors import ConfigError, NonFiniteError
from editr2.policies.base import Policy, device_of
from editr2.policies.blocks import run_as_configured
from editr2.policies.configured import Stock
from editr2.policies.finite import ACCEPTED, unusable
from editr2.policies.forms import Form, OwnFolder, PeftAdapter
from editr2.policies.fp8 import quantize_linears
from editr2.policies.recorded import without_adapters
from editr2.policies.tensor_files import ordinary_modes, write_tensors, writing
from editr2.policies.tokens import TextCodec
from editr2.policies.unified.bagel_blueprint import BagelBlueprint
from editr2.policies.unified.codecs import LatentCodec
from editr2.policies.unified.experts import load_adapters, trained
from editr2.policies.unified.guidance import Guidance
from editr2.policies.unified.model import UnifiedModel
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.policies.unified.published import (
    AUTOENCODER,
    FILES,
    KEPT_SUFFIXES,
    SEES,
    WEIGHTS,
    WORDS,
    Published,
    read_published,
)
from editr2.policies.unified.sight import SIGHT_RULE, Sight, SizeRule
from editr2.policies.views import Views
from editr2.policies.weights import LORA_TARGETS, adapter_changes, merge_lora
from editr2.run.hub import HUB_ID, cached, check_model, fetch_files
from editr2.sessions.buckets import nearest, spread

SHIFT = 3.0
"""Of the noise levels, as BAGEL samples."""

PAINTING = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process "
    "here </think> image here"
)
ANSWERING = (
    "You should first think about the reasoning process in the mind and then provide the user with "
    "the answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. <think> "
    "reasoning process here </think> answer here"
)
"""The two system prompts that BAGEL was trained with, letter by letter: it thinks behind no
others."""


class BagelPolicy(Views, UnifiedPolicy):
    """See the module docstring. Contexts hold every image twice: its latents, then what the vision
    transformer makes of it. With `policy.thinking` they begin with `PAINTING`, and every image
    follows a thought; intents are asked behind `ANSWERING`.

    It is a `SizedPolicy`, too: a view a size (`at`).
    """

    model = "bagel"
    hub_id: ClassVar[str] = "ByteDance-Seed/BAGEL-7B-MoT"
    uses = UnifiedPolicy.uses | {
        *("thinking", "thinking_tokens"),
        *("resolution", "buckets", "dtype", "rounding", "branches", "shard", "shard_group"),
        *("compile", "offload", "quantize"),
    }
    asked = "bagel"
    edits_the_world = False
    most_references = None
    default_weights = hub_id
    published = frozenset((hub_id,))
    index = WORDS
    holds = f"{WEIGHTS}, {AUTOENCODER} and {WORDS}"

    def __init__(
        self,
        config: PolicyConfig,
        model: UnifiedModel,
        codec: TextCodec,
        images: LatentCodec,
        sight: Sight,
        files: Published | None,
    ) -> None:
        """files: from which they are, none where they are simulated. Raises `ConfigError` for a
        size that these weights cannot paint."""
        super().__init__(model, codec, guidance_of(config), images, sight, config.resolution)
        self.compute_dtype = self.computes_in(config)
        self.config, self.files = config, files
        self.ask_with(config.questions)
        self.vae: nn.Module = images.vae
        self.sees: nn.Module = sight
        self.base = str(config.weights or self.hub_id)
        self.apart = config.branches != "together"
        self.thinks = config.thinking
        self.system = PAINTING if config.thinking else None
        self.sizes = self._sizes(config)
        self._take(nearest(self.sizes, *config.resolution))
        self._begin_views()

    sight_rule: ClassVar[SizeRule] = SIGHT_RULE
    """To which size an image is brought before the vision transformer sees it."""

    @classmethod
    def from_config(
        cls, config: PolicyConfig, *, trains: bool = True, empty: bool = False
    ) -> BagelPolicy:
        """A published folder, a hub id, or a folder that `save` wrote."""
        files, dtype = (
            read_published(folder_of(config.weights or cls.hub_id)),
            cls.computes_in(config),
        )
        own = {"trains": trained(config)} if trains else {}
        sight = files.sight(dtype, cls.sight_rule)
        sight.lent = config.offload
        policy = cls(
            config,
            files.model(dtype, **own, empty=empty),
            files.codec,
            LatentCodec(files.autoencoder(), files.sizes.latent_patch_size, lent=config.offload),
            sight,
            files,
        )
        load_adapters(policy.module, config, trains)
        if config.quantize == "fp8":
            quantize_linears(policy.module, LORA_TARGETS)
        run_as_configured(policy.module, config)
        return policy

    @classmethod
    def problems(cls, config: PolicyConfig, trains: bool = True) -> Iterator[str]:
        yield from super().problems(config, trains)
        if config.quantize == "4bit":
            yield f"policy.quantize: 4bit (accepted with policy.model {cls.model}: none, fp8)"
        if config.quantize == "fp8" and not config.lora_rank:
            yield (
                "policy.quantize: fp8 (accepted with policy.lora_rank 0: none; what trains is not "
                "quantized)"
            )
        if config.shard_group is not None and not config.shard:
            yield (
                f"policy.shard_group: {config.shard_group} (accepted with policy.shard false: none)"
            )

    @staticmethod
    def computes_in(config: PolicyConfig) -> torch.dtype:
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32

    @classmethod
    def sources(cls, config: PolicyConfig) -> list[str]:
        return [config.weights or cls.hub_id]

    @classmethod
    def blueprint(cls, config: PolicyConfig) -> BagelBlueprint:
        return BagelBlueprint(cls, config, folder_at_hand(config.weights or cls.hub_id))

    @classmethod
    def owns(cls, folder: Path) -> bool:
        return all((folder / name).is_file() for name in (WEIGHTS, AUTOENCODER, WORDS, SEES))

    @classmethod
    def is_stock(cls, folder: Path) -> bool:
        return cls.owns(folder)

    @classmethod
    def stock(cls, config: PolicyConfig) -> Stock | None:
        settings = {"guidance": 4.0, "guidance_image": 2.0, "renorm": "text_channel"}
        return Stock(49, {**settings, "guidance_interval": (0.4, 1.0)})

    @classmethod
    def form(cls, config: PolicyConfig, kind: str) -> Form:
        if kind == "lora":
            return PeftAdapter(
                cls.loading(config.model, config.weights), "`model` of BAGEL's own code"
            )
        return PublishedFolder(cls.from_config, config, lambda at: cls.loading(cls.model, at))

    @classmethod
    def loading(cls, model: str, weights: str | None) -> list[str]:
        return super(UnifiedPolicy, cls).loading(model, weights)

    # ---------------------------------------------------------------------------------------- sizes

    def refuse(self, name: str, given: object, accepted: str) -> None:
        raise ConfigError(
            f"policy.{name}: {given} (accepted with policy.model {self.model}: {accepted})"
        )

    def _sizes(self, config: PolicyConfig) -> tuple[tuple[int, int], ...]:
        side, most = self.images.side, self.module.config.max_latent_size

        def fitting(name: str, size: Sequence[int]) -> tuple[int, int]:
            height, width = (int(n) for n in size)
            if height % side or width % side or not 1 <= max(height, width) // side <= most:
                self.refuse(name, [height, width], f"multiples of {side}, each up to {most * side}")
            return height, width

        size = fitting("resolution", config.resolution)
        if config.buckets == "auto":
            found = spread(size[0] * size[1], side)
        else:
            found = tuple((height, width) for height, width in config.buckets) or (size,)
        return tuple(fitting("buckets", each) for each in found)

    def _view(self, size: tuple[int, int]) -> BagelPolicy:
        view = copy.copy(self)
        view._whole = self
        view._take(size)
        return view

    # ------------------------------------------------------------------------------------- protocol

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"transformer": self.module, "autoencoder": self.vae, "sight": self.sees}

    def idle(self) -> Tensor:
        """The model's answer about one latent token of nothing: the smallest forward there is."""
        small = copy.copy(self)
        small.grid = (1, 1)
        x = torch.zeros(1, 1, self.latent_shape[1], device=self.device)
        context = self.module.empty_context(1, self.device)
        # Asked for inside of another forward's autocast, whose cache must not keep casts of weights
        # without a graph.
        with torch.autocast(
            self.device.type,
            self.compute_dtype,
            enabled=self.compute_dtype != torch.float32,
            cache_enabled=False,
        ):
            return small._predicted(context, x, x.new_ones(1))

    def sigmas(self, steps: int) -> list[float]:
        """As `ScheduledPolicy.sigmas`: evenly spaced, shifted by 3."""
        return [float(SHIFT * t / (1 + (SHIFT - 1) * t)) for t in np.linspace(1, 0, steps + 1)]

    def pixels(self, latents: Tensor) -> Tensor:
        painted = super().pixels(latents.to(self.device))
        if self.config.rounding == "nearest":
            return painted
        # As released: clamped, times 255, the rest cut off. Bytes as numbers come out of the
        # rounding behind this as they are.
        return ((painted * 0.5 + 0.5).clamp(0, 1) * 255).floor() / 127.5 - 1

    def question_ids(
        self, earlier: Sequence[str], current: str, mode: str | None = None
    ) -> list[int]:
        """The system prompt, the question, and the opening mark of the answer."""
        asked = self.text_ids(self.wording(earlier, current, mode))
        return [*self.text_ids(ANSWERING), *asked, self.codec.im_start]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that the file holds. Under adapters the rest stands as it was loaded, here or, where
        it is shared out, nowhere as a whole, so it is read again."""
        assert self.files is not None
        changes = adapter_changes(self.module)
        own = {} if changes else self.module.state_dict()
        for name, tensor in self.files.tensors():
            if name in changes:
                tensor = tensor + changes[name].to(tensor.device)
            yield name, own.get(name, tensor)

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes a published folder: adapters merged, what did not train as it stands in the one
        that this was loaded from. Weights are rounded to `dtype` where the policy computes in
        bfloat16, and otherwise kept exactly. Raises `NonFiniteError`, `CheckpointError`."""
        assert self.files is not None
        exact = self.compute_dtype == torch.float32

        def stored(tensor: Tensor) -> Tensor:
            rounded = tensor.detach().to("cpu", dtype)
            if exact and not torch.equal(rounded.to(tensor.dtype), tensor.detach().cpu()):
                return tensor.detach().cpu().contiguous()
            return rounded.contiguous()

        weights = {name: stored(t) for name, t in self._weights()}
        if name := unusable(weights.items()):
            raise NonFiniteError(
                f"{folder}: {name}: NaN, infinite or too large in {dtype} ({ACCEPTED}); not written"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(weights, folder / WEIGHTS)
            for file in sorted(self.files.folder.iterdir()):
                taken = file.suffix in KEPT_SUFFIXES and file.name not in _OURS
                if file.is_file() and (taken or file.name == AUTOENCODER):
                    shutil.copyfile(file, folder / file.name)
            ordinary_modes([folder])


_OURS = ("README.md", "config.yaml", "editr2.yaml", "best.json", "questions.json")
"""What stands beside weights in folders of ours and is not theirs."""


def guidance_of(config: PolicyConfig) -> Guidance:
    """As published: without text guidance (a weight above 1) there is none of images and no
    renorm, and weights of images below 1 are none."""
    if config.guidance <= 1:
        return Guidance(interval=config.guidance_interval)
    guidance = Guidance.of(config)
    return dataclasses.replace(guidance, image=max(1.0, guidance.image))


def folder_of(weights: str) -> Path:
    """A folder, or that of a hub id, downloaded where it was not before. Raises `ConfigError`."""
    if Path(weights).is_dir():
        return Path(weights)
    if not HUB_ID.fullmatch(weights):
        raise ConfigError(f"policy.weights: {weights}: no folder (accepted: one, or a hub id)")
    check_model(weights, "policy.weights", WORDS)
    return fetch_files(weights, "policy.weights", FILES)


def folder_at_hand(weights: str) -> Path | None:
    """The same without a download: None for a hub id that was not downloaded before. Raises
    `ConfigError` for what is neither."""
    if Path(weights).is_dir():
        return Path(weights)
    if not HUB_ID.fullmatch(weights):
        raise ConfigError(f"policy.weights: {weights}: no folder (accepted: one, or a hub id)")
    found = cached(weights, WEIGHTS)
    return None if found is None else found.parent


@dataclass(frozen=True)
class PublishedFolder(OwnFolder):
    """BAGEL's own folder, whose weights are bfloat16."""

    make: Callable[..., Any]

    def write(self, policy: Any, folder: Path) -> float:
        merge_lora(policy.module)
        policy.module.to(torch.bfloat16).to(policy.compute_dtype)  # as it will be loaded
        policy.save(folder)
        return 0.0

    def load(self, base: Any, folder: Path) -> Policy:
        loaded: Policy = self.make(without_adapters(self.config, str(folder)), trains=False)
        loaded.module.to(device_of(base.module))
        return loaded
