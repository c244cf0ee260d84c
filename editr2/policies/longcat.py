"""LongCat-Image-Edit: FLUX.1's kind of transformer and its autoencoder, words read with the image
by Qwen2.5-VL.

A prompt is what stands between the system message and the answer: the image's tokens, then the
instruction, padded to the pipeline's limit and not masked. Words in quotation marks are read letter
by letter, as the model was taught to write them. Positions of images begin behind those of the
prompt. Guidance is a second branch whose instruction is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.contexts import EditContext, Prompt
from editr2.policies.kontext import DEV, Flux1Latents, KontextPolicy
from editr2.policies.pipelines import Parts
from editr2.policies.qwen_vision import QwenVision, of_images
from editr2.policies.tokens import VISION_START

EDIT = Parts(
    transformer={"num_layers": 10, "num_single_layers": 20},
    vae=DEV.vae,
    scheduler=DEV.scheduler,
    text={"text_encoder": 8_292_166_656},  # Qwen2.5-VL-7B with its head and its image tower
)
APOSTROPHE = re.compile("(?<=[a-zA-Z])'(?=[a-zA-Z])")
QUOTED = re.compile(
    """('[^']*'|"[^"]*"|\u2018[^\u2018\u2019]*\u2019|\u201c[^\u201c\u201d]*\u201d)"""
)


class LongCatEditPolicy(QwenVision, Flux1Latents):
    """See the module docstring. It reads one image, which is the previous output; the text encoder
    sees it at half its size."""

    model = "longcat-edit"
    pipeline = "LongCatImageEditPipeline"
    transformer = "LongCatImageTransformer2DModel"
    hub_id = "meituan-longcat/LongCat-Image-Edit"
    published = MappingProxyType({hub_id: EDIT})
    lora_targets = KontextPolicy.lora_targets
    text_limit = 512
    most_images = 1
    processor = "text_processor"
    guidance_argument = "guidance_scale"

    @classmethod
    def with_images(cls, base: str, images: Any, **components: Any) -> Any:
        return cls.pipeline_class().from_pretrained(
            base, text_processor=cls.of(images), **components
        )

    @classmethod
    def stand_in(cls, name: str) -> Any:
        return cls.of(None) if name == cls.processor else None

    @staticmethod
    def of(images: Any) -> Any:
        """A processor with this image processor, which is all that the pipeline takes out of it."""
        from transformers import Qwen2VLProcessor

        return of_images(Qwen2VLProcessor, images)

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        if config.guidance_embed is not None:
            what = "none; the transformer does not take it"
            self.refuse("guidance_embed", config.guidance_embed, what)
        for name, one in (("history", 1), ("keep_source", False)):
            if (given := getattr(config, name)) != one:
                self.refuse(name, given, f"{one}; it reads one image")
        height, width = self.condition_size
        self.text_image_size = (height // 2, width // 2)

    # ------------------------------------------------------------------------------------- the text

    def read(self, text: str, images: list[Tensor]) -> dict[str, Tensor]:
        """words [L, width], from the image on to the end of what is padded."""
        before, after = self._around
        rows, valid = self._words.filled(
            [self._ids(self.readable(text))], self.text_tokens or self.text_limit
        )
        given = self._given([*before, *rows[0].tolist(), *after], images)
        given["attention_mask"][0, -len(after) - rows.shape[1] : -len(after)] = valid[0]
        first = before.index(self.pipe.tokenizer.convert_tokens_to_ids(VISION_START))
        states = self.pipe.text_encoder.model(**given).last_hidden_state
        return {"words": states[0, first : -len(after)]}

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids of the template before and after the instruction."""
        pipe = self.pipe
        parts = pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix
        before, after = (pipe.tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts)
        return before, after

    def _ids(self, text: str) -> list[int]:
        return [i for piece in pieces(text) for i in self._words.ids(piece)]

    def text_length(self, text: str) -> int:
        return len(self._ids(text))

    def prompt_length(self, said: int, images: int) -> int:
        # The image's tokens of 28 x 28 pixels stand between two marks.
        height, width = self.text_image_size
        return (self.text_tokens or self.text_limit) + 2 + round(height / 28) * round(width / 28)

    # ------------------------------------------------------------------------------ the transformer

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        words = prompt["words"]
        length = words.shape[1]
        said = torch.arange(length, device=x.device, dtype=torch.float32)
        behind = torch.tensor([0.0, length, length], device=x.device)
        images = torch.cat(
            [
                self.positions(1, self.grid, x.device),
                *(self.positions(2, self.condition_grid, x.device) for _ in context.conditions),
            ]
        )
        out = self.module(
            hidden_states=torch.cat([x, *(c.to(x.dtype) for c in context.conditions)], 1),
            timestep=sigma,
            encoder_hidden_states=words.to(x.dtype),
            txt_ids=torch.stack([torch.zeros_like(said), said, said], 1),
            img_ids=images + behind,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]


def pieces(text: str) -> Iterator[str]:
    """What is tokenised by itself: a letter of what stands in quotation marks, these included, or
    what stands between. An apostrophe within a word is none."""
    hidden = "\0"
    for part in QUOTED.split(APOSTROPHE.sub(hidden, text)):
        said = part.replace(hidden, "'")
        yield from said if QUOTED.fullmatch(part) else filter(None, [said])
