"""BAGEL without its weights, for `editr2 check`.

The transformer is measured with one layer and with two, which gives the cost of all; autoencoder
and vision transformer are whole, and counted together. Of a hub id that was not downloaded the
published sizes are known, and instructions are counted by their words.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from editr2.config import PolicyConfig
from editr2.policies.blueprint import Reading, Work, adapters_without_data, simulated
from editr2.policies.fp8 import quantize_linears
from editr2.policies.placing import held
from editr2.policies.tensor_files import read_header
from editr2.policies.tokens import TextCodec, word_tokenizer
from editr2.policies.unified.blueprint import UnifiedBlueprint
from editr2.policies.unified.codecs import LatentCodec, autoencoder_settings, autoencoder_sizes
from editr2.policies.unified.experts import adapt, check_start, freeze_rest, trained
from editr2.policies.unified.model import UnifiedConfig, UnifiedModel
from editr2.policies.unified.policy import KEPT_BYTES
from editr2.policies.unified.published import (
    AUTOENCODER,
    as_trained,
    new_sight,
    read_published,
)
from editr2.policies.weights import LORA_TARGETS

SHALLOW = 1
TOKENS_A_WORD = 1.4
"""Of English."""

SIZES = UnifiedConfig(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rope_theta=1e6,
    latent_channels=16,
    latent_patch_size=2,
    max_latent_size=64,
)
SEES: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
"""Of the published weights, as their files have them but for the layer that is dropped."""


@dataclass(frozen=True)
class Counted(TextCodec):
    """Texts as so many tokens of nothing."""

    def encode(self, text: str, *, marks: bool = False) -> list[int]:
        return [0] * round(TOKENS_A_WORD * len(text.split()))

    @staticmethod
    def new() -> Counted:
        words: Tokenizer = word_tokenizer([])
        return Counted(**vars(TextCodec.of(words)))


class BagelBlueprint(UnifiedBlueprint):
    """`Blueprint` of a `BagelPolicy`."""

    def __init__(self, kind: Any, config: PolicyConfig, folder: Path | None) -> None:
        """kind: the class of the policy. folder: of the weights, none where they are the published
        ones and not here. Raises the `UserError` of a folder or a size that it would refuse."""
        self.kind = kind
        codec: TextCodec = Counted.new()
        self.sizes, self.vit, self.latents = SIZES, SEES, autoencoder_settings()
        if folder is not None:
            files = read_published(folder)
            self.sizes, self.vit, codec = files.sizes, files.vit, files.codec
            file = folder / AUTOENCODER
            self.latents = autoencoder_sizes(file, read_header(file)[0])
        check_start(self.sizes, config)
        self.codec = codec
        self.config = config
        super().__init__(self.built(min(SHALLOW, self.blocks)), config)
        seen = self.policy.seen_tokens
        self.image = self.policy.latent_shape[0] + 2 + seen + 2
        self.vae, self.sight = (
            sum(p.numel() * p.element_size() for p in part.parameters())
            for part in (self.policy.images.vae, self.policy.sight)
        )

    @property
    def blocks(self) -> int:
        return self.sizes.num_hidden_layers

    @property
    def answer(self) -> int:
        """All that an intent may have: a thought goes before it, and a batch is written until its
        longest has ended."""
        return self.config.intent_tokens

    def built(self, layers: int) -> Any:
        """The policy without data, so deep."""
        from diffusers import AutoencoderKL

        config, dtype = self.config, self.kind.computes_in(self.config)
        with simulated(dtype):
            module = UnifiedModel(dataclasses.replace(self.sizes, num_hidden_layers=layers))
        freeze_rest(module, config)
        with simulated():
            as_trained(module, dtype, trained(config))
        if config.lora_rank:
            with adapters_without_data(module, dtype):
                adapt(module, config)
        if config.quantize == "fp8":
            with simulated():
                for layer in quantize_linears(module, LORA_TARGETS):
                    layer.in_float8 = True
        sight = new_sight(self.vit, self.sizes.hidden_size, self.kind.sight_rule)
        with simulated(dtype):
            for owner, name, tensor in list(held(sight.modules())):
                if tensor.is_meta:
                    owner[name] = nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
        with simulated():
            images = LatentCodec(AutoencoderKL(**self.latents), self.sizes.latent_patch_size)
            return self.kind(config, module, self.codec, images, sight, None)

    @cached_property
    def deeper(self) -> Sequence[tuple[Any, int]]:  # type: ignore[override]
        if self.blocks <= SHALLOW:
            return []
        deeper = self.built(SHALLOW + 1)
        return [(deeper.at(self.policy.image_size), self.blocks - SHALLOW)]

    def at(self, size: tuple[int, int]) -> BagelBlueprint:
        """The same of the policy at one of its sizes."""
        view = copy.copy(self)
        view.policy = self.policy.at(size)
        vars(view)["deeper"] = [(policy.at(size), more) for policy, more in self.deeper]
        view.image = view.policy.latent_shape[0] + 2 + view.policy.seen_tokens + 2
        return view

    def _tokens(self, full: int, said: int) -> dict[str, int]:
        g = self.policy.guidance
        found = {"full": full}
        if g.text != 1:
            found["without the instruction"] = full - self.spoken
        if g.image != 1:
            found["texts alone"] = said
        if not self.policy.apart:
            found["together"] = len(found) * full  # all of them, padded to the longest
        return found

    def encodes_again(self, turn: int, images: int) -> bool:
        """As many as are kept are not: what came of them in the rollout is read into the context
        again (derive), by layers that train."""
        tokens, latents = self.policy.latent_shape
        seen = self.policy.seen_tokens * self.sizes.hidden_size * self.policy.compute_dtype.itemsize
        again: bool = images * (4 * tokens * latents + seen) > KEPT_BYTES
        return again

    def passes(self, step: str, apart: bool) -> int:
        branches = 1 + (self.policy.guidance.text != 1) + (self.policy.guidance.image != 1)
        velocity = branches if apart else 1
        reading = 1 + bool(self.policy.seen_tokens)
        own = {"velocity": velocity, "train": velocity, "encode": reading, "derive": reading}
        return own.get(step) or super().passes(step, apart)

    def work(self, step: str, batch: int, turn: int, checkpointing: bool) -> list[Work | Reading]:
        if step == "decode":
            return [Work("decode", self._paint, times=batch, deep=False)]
        found = [
            dataclasses.replace(work, prepare=_in_precision(work.prepare))
            if isinstance(work, Work)
            else work
            for work in super().work(step, batch, turn, checkpointing)
        ]
        if step == "encode":
            found.insert(0, Work("look", self._look, times=batch, deep=False))
        return found

    @staticmethod
    def _look(policy: Any) -> Callable[[], Any]:
        picture = np.zeros((1, *policy.image_size, 3), np.uint8)
        return lambda: [see(picture, policy.device) for see in (policy.images.read, policy.sight)]

    @staticmethod
    def _paint(policy: Any) -> Callable[[], Any]:
        return lambda: policy.pixels(torch.empty(1, *policy.latent_shape))

    def _encode(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context, width = self._before(policy, batch, turn), policy.module.config.hidden_size
        seen = torch.empty(batch, policy.seen_tokens, width, dtype=policy.compute_dtype)
        latents = torch.empty(batch, *policy.latent_shape)
        where = (policy.grid, policy.marks)

        def run() -> Any:
            model = policy.module
            read = model.append_image(context, latents, *where)
            return model.append_seen(read, seen, policy.marks)

        return run


def _in_precision(prepare: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """What runs, in the policy's computing precision."""

    def prepared(policy: Any, *sizes: int) -> Callable[[], Any]:
        run = prepare(policy, *sizes)

        def running() -> Any:
            with policy.autocast():
                return run()

        return running

    return prepared
