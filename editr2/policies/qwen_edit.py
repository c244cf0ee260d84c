"""Qwen-Image-Edit and Qwen-Image-Edit-Plus: the text encoder, Qwen2.5-VL, reads the instruction
with the image.

So an instruction's embedding belongs to one image and is computed anew for every turn's; the
transformer gets the image a second time, as latent tokens behind the noisy ones, told apart by the
frame axis of its rotary positions. Guidance
is true guidance by a negative prompt, renormalised token by token.

The encoder gets the multimodal positions that it was trained with. Transformers 5 computes them
from token types, which the stock pipelines do not pass on yet (diffusers issue 14194): there they
fall back to positions of plain text.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.contexts import WORDS, EditContext, Prompt, longer
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.kontext import linear_mu
from editr2.policies.latents import from_tokens, patchified, tokens, unpatchified
from editr2.policies.pipelines import Parts
from editr2.policies.qwen_vision import QwenVision, latent_statistics

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Where an image stands in a prompt."""
PLUS_AREA = 384 * 384
"""Pixels of an image as Plus shows it to its text encoder, whatever the size of the condition."""
BUCKET = 64  # text tokens; an image alone is hundreds

EDIT = Parts(
    transformer={"num_layers": 60},
    vae={},
    scheduler={
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    },
    text={"text_encoder": 8_292_166_656},  # Qwen2.5-VL-7B with its head and its image tower
)


class QwenEditPolicy(QwenVision, DiffusionPolicy):
    """The image to edit is the one condition, and the text encoder sees it as the transformer
    does."""

    model = "qwen-edit"
    pipeline = "QwenImageEditPipeline"
    transformer = "QwenImageTransformer2DModel"
    hub_id = "Qwen/Qwen-Image-Edit"
    published = MappingProxyType({hub_id: EDIT})
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))"
    )
    masks = True
    negative_prompt = " "
    most_images: ClassVar[int | None] = 1
    own_renorm = "token"
    tiles = False  # they are 256 pixels wide: seams at every size in use

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        if config.guidance < 1:
            self.refuse("guidance", config.guidance, "1, which is none, or above")
        if config.guidance_embed is not None:
            self.refuse(
                "guidance_embed", config.guidance_embed, "none; the transformer does not take it"
            )
        if self.model == QwenEditPolicy.model:
            for name, one in (("history", 1), ("keep_source", False)):
                if (given := getattr(config, name)) != one:
                    self.refuse(name, given, f"{one}; it reads one image, qwen-edit-plus several")

    # ------------------------------------------------------------------------------------- the text

    def read(self, text: str, images: list[Tensor]) -> dict[str, Tensor]:
        """words [L, width], what follows the system part of the template."""
        before, after = self._around(len(images))
        said = self._words.within(before, self.readable(text, len(images)), after)
        states = self.pipe.text_encoder.model(**self._given(said, images)).last_hidden_state
        return {"words": states[0, self.pipe.prompt_template_encode_start_idx :]}

    def _around(self, images: int) -> tuple[str, str]:
        """The template before and after the instruction."""
        before, _, after = self.pipe.prompt_template_encode.partition("{}")
        return before, after

    def text_length(self, text: str) -> int:
        return len(self._words.ids(text))

    @cached_property
    def _tokens_an_image(self) -> int:
        return int(self._image_tokens(self._seen([np.zeros((*self.text_image_size, 3), np.uint8)])))

    def text_room(self, images: int) -> int:
        """The transformer's table of positions has places for so many, behind those of the image's
        rows or columns."""
        first = max(*self.grid, *self.condition_grid) // 2
        places = (
            (len(self.module.pos_embed.pos_freqs) - first) // BUCKET * BUCKET
        )  # `bucket` fills the last one up
        before, after = self._around(images)
        template = len(self._words.within(before, "", after)) + images * (self._tokens_an_image - 1)
        return places - (template - self.pipe.prompt_template_encode_start_idx)

    def prompt_length(self, said: int, images: int) -> int:
        # A token of Qwen2.5-VL stands for 28 x 28 pixels; its template leaves 10 tokens.
        height, width = self.text_image_size
        return (
            10
            + min(self.text_tokens or said, said)
            + round(height / 28) * round(width / 28) * images
        )

    # ----------------------------------------------------------------------------------- the images

    def to_latents(self, images: Tensor) -> Tensor:
        latents = self.pipe.vae.encode(images[:, :, None]).latent_dist.mode()[
            :, :, 0
        ]  # a video of one frame
        mean, std = latent_statistics(self.pipe.vae, latents)
        return tokens(patchified((latents - mean) / std))

    def to_pixels(self, latents: Tensor) -> Tensor:
        latents = unpatchified(from_tokens(latents, self.grid)).to(self.pipe.vae.dtype)
        mean, std = latent_statistics(self.pipe.vae, latents)
        return self.pipe.vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][
            :, :, 0
        ]

    # ------------------------------------------------------------------------------ the transformer

    def mu(self, steps: int) -> float | None:
        return linear_mu(self.pipe.scheduler.config, self.latent_shape[0])

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        shapes = [(1, *self.grid), *((1, *self.condition_grid) for _ in context.conditions)]
        out = self.module(
            hidden_states=torch.cat([x, *(c.to(x.dtype) for c in context.conditions)], 1),
            timestep=sigma,
            encoder_hidden_states=prompt["words"].to(x.dtype),
            encoder_hidden_states_mask=prompt.get("mask"),
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def bucket(self, context: EditContext) -> EditContext:
        """Prompts padded, and masked, to the next multiple of `BUCKET` tokens."""

        def padded(prompt: Prompt) -> Prompt:
            return longer(prompt, -(-prompt[WORDS].shape[1] // BUCKET) * BUCKET) if prompt else {}

        return dataclasses.replace(
            context, prompt=padded(context.prompt), negative=padded(context.negative)
        )


class QwenEditPlusPolicy(QwenEditPolicy):
    """Its successor reads several images: the text encoder numbers them, in the order of the
    conditions, and sees them at a size of its own."""

    model = "qwen-edit-plus"
    pipeline = "QwenImageEditPlusPipeline"
    hub_id = "Qwen/Qwen-Image-Edit-2509"
    published = MappingProxyType(
        {
            hub_id: EDIT,
            # Its conditions are modulated as at time 0, which takes memory of its own.
            "Qwen/Qwen-Image-Edit-2511": dataclasses.replace(
                EDIT, transformer={**EDIT.transformer, "zero_cond_t": True}
            ),
        }
    )

    most_images = None

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        height, width = self.image_size
        wide = math.sqrt(PLUS_AREA * width / height)
        self.text_image_size = (round(wide * height / width / 32) * 32, round(wide / 32) * 32)

    def _around(self, images: int) -> tuple[str, str]:
        before, after = super()._around(images)
        return before + "".join(f"Picture {i + 1}: {PICTURE}" for i in range(images)), after
