"""FLUX.2-klein: reference images stand behind the noisy tokens, each at its own time in a four-axis
position.

Its text encoder is Qwen3, of which three layers' hidden states side by side are the text tokens;
they are padded to the pipeline's limit and not masked. The published weights are distilled and know
no guidance; the base ones take a second branch whose prompt is empty.

The KV variant (`klein-kv`) is trained so that references see only themselves, at time 0. Their keys
and values then depend on nothing else and are computed once a turn, for all steps and siblings.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.errors import DataError, shown
from editr2.policies.configured import Stock
from editr2.policies.contexts import EditContext, Prompt
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.latents import from_tokens, patchified, tokens, unpatchified
from editr2.policies.pipelines import FLUX_BLOCKS, FLUX_SHIFT, Parts
from editr2.policies.tokens import Words

SMALL = Parts(
    transformer={
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "in_channels": 128,
        "guidance_embeds": False,
    },
    vae=FLUX_BLOCKS,
    scheduler=FLUX_SHIFT,
    text={"text_encoder": 4_022_468_096},  # Qwen3-4B, whose head is its embedding
    pipeline={"is_distilled": True},
)
LARGE = replace(
    SMALL,
    transformer={
        **SMALL.transformer,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    text={"text_encoder": 8_190_735_360},  # Qwen3-8B with its head
)
BASE = {"is_distilled": False}
DISTILLED_STEPS = 4
"""That the published weights are distilled to."""


class KleinPolicy(DiffusionPolicy):
    """See the module docstring. References have times 10, 20, ...: the image to edit, then whatever
    else of the session a turn sees.

    The model could be shown every earlier output (`policy.history`). By default a turn sees the
    last one: each further reference adds a target's worth of tokens to every step, and what earlier
    turns did shows in the last output.
    """

    model = "klein"
    pipeline = "Flux2KleinPipeline"
    transformer = "Flux2Transformer2DModel"
    hub_id = "black-forest-labs/FLUX.2-klein-4B"
    published = MappingProxyType(
        {
            hub_id: SMALL,
            "black-forest-labs/FLUX.2-klein-base-4B": replace(SMALL, pipeline=BASE),
            "black-forest-labs/FLUX.2-klein-9B": LARGE,
            "black-forest-labs/FLUX.2-klein-base-9B": replace(LARGE, pipeline=BASE),
        }
    )
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    position_axes = 4
    text_limit = 512
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Of the text encoder's hidden states, the ones whose numbers side by side are a token."""
    guidance_argument = "guidance_scale"

    @classmethod
    def stock(cls, config: PolicyConfig) -> Stock | None:
        stock = super().stock(config)
        if stock is None or not cls.pipeline_settings(config).get("is_distilled"):
            return stock
        # The pipeline ignores its guidance then, and its default of steps is the base weights'.
        return Stock(DISTILLED_STEPS)

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        # The KV pipeline, whose weights are all distilled, does not say so in its settings.
        if config.guidance != 1 and getattr(self.pipe.config, "is_distilled", True):
            self.refuse("guidance", config.guidance, "1; these weights are distilled")
        if config.guidance_embed is not None:
            self.refuse("guidance_embed", config.guidance_embed, "none; klein does not take it")

    def embed(self, texts: list[str], images: list[Tensor]) -> list[dict[str, Tensor]]:
        said = [self._ids(self.readable(text)) for text in texts]
        ids, valid = (
            x.to(self.device) for x in self._words.filled(said, self.text_tokens or self.text_limit)
        )
        states = self.pipe.text_encoder(
            input_ids=ids, attention_mask=valid, output_hidden_states=True, use_cache=False
        ).hidden_states
        taken = torch.cat([states[layer] for layer in self.text_layers], -1)
        return [{"words": row} for row in taken]

    @cached_property
    def _words(self) -> Words:
        return Words(self.pipe.tokenizer)

    def _ids(self, text: str) -> list[int]:
        """Of a conversation's one message, in the tokenizer's own template."""
        before, _, after = self.rendered("\0").partition("\0")
        whole = self.rendered(text)  # a template may trim what is said
        if len(whole) < len(before + after) or not (
            whole.startswith(before) and whole.endswith(after)
        ):
            raise DataError(
                f"text {shown(repr(text))}: changes the tokenizer's chat template (accepted: "
                f"other words)"
            )
        return self._words.within(before, whole[len(before) : len(whole) - len(after)], after)

    def rendered(self, text: str) -> str:
        """The conversation that the text encoder reads."""
        message = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self.pipe.tokenizer.apply_chat_template(message, **options))

    def text_length(self, text: str) -> int:
        return len(self._ids(text))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, [1, D, 1, 1]."""
        vae = self.pipe.vae
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), std.to(like)

    def to_latents(self, images: Tensor) -> Tensor:
        latents = patchified(self.pipe.vae.encode(images).latent_dist.mode())
        mean, std = self._statistics(latents)
        return tokens((latents - mean) / std)

    def to_pixels(self, latents: Tensor) -> Tensor:
        latents = from_tokens(latents, self.grid)
        mean, std = self._statistics(latents)
        latents = unpatchified(latents * std + mean).to(self.pipe.vae.dtype)
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def mu(self, steps: int) -> float | None:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(self.latent_shape[0], steps)

    def reference_positions(self, count: int, device: torch.device) -> list[Tensor]:
        return [self.positions(10 * (1 + i), self.condition_grid, device) for i in range(count)]

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        references = self.reference_positions(len(context.conditions), x.device)
        noisy = torch.cat([x, *(c.to(x.dtype) for c in context.conditions)], 1)
        ids = torch.cat([self.positions(0, self.grid, x.device), *references])
        return self.run(noisy, ids, sigma, prompt["words"])[0][:, : x.shape[1]]

    def distilled_guidance(self, sigma: Tensor) -> Tensor | None:
        """The strength of guidance [B] that the transformer takes as input, float32; None where it
        takes none."""
        return None

    def run(
        self, images: Tensor, ids: Tensor, sigma: Tensor, words: Tensor, **options: Any
    ) -> tuple[Any, ...]:
        """The transformer over image tokens with these positions, and words."""
        text_ids = torch.zeros(words.shape[1], self.position_axes, device=images.device)
        text_ids[:, 3] = torch.arange(words.shape[1], device=images.device)
        return self.module(
            hidden_states=images,
            timestep=sigma,
            guidance=self.distilled_guidance(sigma),
            encoder_hidden_states=words,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
            **options,
        )


class KleinKVPolicy(KleinPolicy):
    """The KV variant: see the module docstring.

    The references' keys and values are part of the context: they carry gradient only with
    `train.context_gradient`,
    and take memory, 2 x blocks x reference tokens x width numbers a sample.
    """

    model = "klein-kv"
    pipeline = "Flux2KleinKVPipeline"
    hub_id = "black-forest-labs/FLUX.2-klein-9b-kv"
    published = MappingProxyType({hub_id: replace(LARGE, pipeline={})})
    instead_of_shard = "klein; its cache is made inside of the blocks"

    # diffusers hands every block's cache over in one dict: a block computed again would read the
    # last one's.
    recomputes = False

    def derive(self, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keys and values [B, N, heads, width] of all references, block by block."""
        references = torch.cat(conditions, 1).to(self.compute_dtype)
        b, n, _ = references.shape
        # One word that says nothing: attention kernels do not all take empty queries, and
        # references do not see it.
        words = references.new_zeros(b, 1, self.module.config.joint_attention_dim)
        ids = torch.cat(self.reference_positions(len(conditions), references.device))
        sigma = torch.zeros(b, device=references.device)
        with self.autocast(references.device):
            _, cache = self.run(
                references, ids, sigma, words, kv_cache_mode="extract", num_ref_tokens=n
            )
        layers = (*cache.double_block_caches, *cache.single_block_caches)
        return tuple(t for layer in layers for t in (layer.k_ref, layer.v_ref))

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

        cache = Flux2KVCache(
            len(self.module.transformer_blocks), len(self.module.single_transformer_blocks)
        )
        cache.num_ref_tokens = context.derived[0].shape[1]
        layers = (*cache.double_block_caches, *cache.single_block_caches)
        for i, layer in enumerate(layers):
            layer.store(context.derived[2 * i], context.derived[2 * i + 1])
        ids = self.positions(0, self.grid, x.device)
        return self.run(x, ids, sigma, prompt["words"], kv_cache=cache, kv_cache_mode="cached")[0]
