"""FLUX.1-Kontext: the condition's tokens stand behind the noisy ones and differ from them by the
first position.

T5 gives the text tokens, CLIP one pooled vector; neither is masked (the pipeline pads to its limit
and attends to it all). Of a longer prompt CLIP reads the first 77 tokens, T5 all. Guidance is
distilled: the transformer takes its value as input, and true guidance is a second branch on top.
"""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.contexts import EditContext, Prompt
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.latents import from_tokens, patchified, tokens, unpatchified
from editr2.policies.pipelines import FLUX_BLOCKS, FLUX_SHIFT, Parts
from editr2.policies.tokens import Words

DEV = Parts(
    transformer={
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "in_channels": 64,
        "guidance_embeds": True,
    },
    vae={
        **FLUX_BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    scheduler=FLUX_SHIFT,
    text={"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},  # CLIP-L, T5-XXL's encoder
)


class Flux1Latents(DiffusionPolicy):
    """Editors with FLUX.1's autoencoder and schedule."""

    def to_latents(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(images).latent_dist.mode()
        return tokens(patchified((latents - vae.config.shift_factor) * vae.config.scaling_factor))

    def to_pixels(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = unpatchified(from_tokens(latents, self.grid)).to(vae.dtype)
        return vae.decode(
            latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]

    def mu(self, steps: int) -> float | None:
        return linear_mu(self.pipe.scheduler.config, self.latent_shape[0])


class KontextPolicy(Flux1Latents):
    """See the module docstring. Conditions have places 1, 2, ... in the first position axis, the
    target 0; the stock pipeline knows only the first."""

    model = "kontext"
    pipeline = "FluxKontextPipeline"
    transformer = "FluxTransformer2DModel"
    hub_id = "black-forest-labs/FLUX.1-Kontext-dev"
    published = MappingProxyType({hub_id: DEV})
    lora_targets = (
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )
    text_encoders = ("text_encoder", "text_encoder_2")
    pools_words = True
    text_limit = 512
    default_guidance_embed = 3.5
    """The stock pipeline's default."""

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        if config.guidance_embed is not None and not self.module.config.guidance_embeds:
            self.refuse(
                "guidance_embed", config.guidance_embed, "none; these weights do not take it"
            )

    def embed(self, texts: list[str], images: list[Tensor]) -> list[dict[str, Tensor]]:
        said = [self._t5.ids(self.readable(text), ends=True) for text in texts]
        ids, _ = self._t5.filled(said, self.text_tokens or self.text_limit)
        words = self.pipe.text_encoder_2(ids.to(self.device), output_hidden_states=False)[0]
        most = self.pipe.tokenizer_max_length
        ids, _ = self._clip.filled(
            [self._clip.ids(text, ends=True, most=most) for text in texts], most
        )
        pooled = self.pipe.text_encoder(
            ids.to(self.device), output_hidden_states=False
        ).pooler_output
        return [{"words": w, "pooled": p} for w, p in zip(words, pooled, strict=True)]

    @cached_property
    def _t5(self) -> Words:
        return Words(self.pipe.tokenizer_2)

    @cached_property
    def _clip(self) -> Words:
        return Words(self.pipe.tokenizer)

    def text_length(self, text: str) -> int:
        return len(self._t5.ids(text, ends=True))

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        ids = [self.positions(0, self.grid, x.device)]
        ids += [
            self.positions(1 + i, self.condition_grid, x.device)
            for i in range(len(context.conditions))
        ]
        guidance = None
        if self.module.config.guidance_embeds:
            value = self.config.guidance_embed
            guidance = torch.full_like(
                sigma, self.default_guidance_embed if value is None else value
            )
        out = self.module(
            hidden_states=torch.cat([x, *(c.to(x.dtype) for c in context.conditions)], 1),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=prompt["pooled"],
            encoder_hidden_states=prompt["words"],
            txt_ids=torch.zeros(prompt["words"].shape[1], self.position_axes, device=x.device),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]


def linear_mu(config: dict, count: int) -> float:
    """A shift that grows linearly with the number of target tokens, from the scheduler's
    settings."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (most - base) * (count - low) / (high - low)
