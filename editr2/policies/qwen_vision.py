"""Text encoders that are vision-language models of Qwen: an instruction is read with the images it
is about."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from editr2.policies.libraries import without_processor_notes
from editr2.policies.pipelines import PipelineModel
from editr2.policies.tokens import Words


class QwenVision(PipelineModel):
    """What such an editor has in common; a subclass provides `read`."""

    text_sees_images = True
    processor: ClassVar[str] = "processor"
    """The pipeline's component that makes patches of images."""

    pipe: Any
    device: Any
    tokenizer: Any

    @classmethod
    def load_pipeline(cls, base: str, **components: Any) -> Any:
        if importlib.util.find_spec("torchvision"):
            return super().load_pipeline(base, **components)
        # The pipeline's processor wants a video processor, and that one torchvision; images need
        # neither.
        with without_processor_notes():
            from transformers import Qwen2VLImageProcessor

        images = Qwen2VLImageProcessor.from_pretrained(base, subfolder=cls.processor)
        return cls.with_images(base, images, **components)

    @classmethod
    def with_images(cls, base: str, images: Any, **components: Any) -> Any:
        """The stock pipeline with no more of its processor than what it does with images."""
        pipe = super().load_pipeline(base, **{cls.processor: None}, **components)
        pipe.register_modules(**{cls.processor: images})
        return pipe

    def read(self, text: str, images: list[Tensor]) -> dict[str, Tensor]:
        """What the transformer reads of one instruction about these images, uint8 [H, W, 3]."""
        raise NotImplementedError

    def embed(self, texts: list[str], images: list[Tensor]) -> list[dict[str, Tensor]]:
        """One prompt at a time: with its image each is long enough to fill a device, and none
        depends on another."""
        return [self.read(text, [seen[i] for seen in images]) for i, text in enumerate(texts)]

    @cached_property
    def _words(self) -> Words:
        return Words(self.tokenizer)

    @property
    def _processor(self) -> Any:
        part = getattr(self.pipe, self.processor)
        return getattr(part, "image_processor", part)

    def _seen(self, images: list[np.ndarray]) -> Any:
        return self._processor(images=images, return_tensors="pt")

    def _image_tokens(self, seen: Any) -> Tensor:
        """Of each image [images]."""
        return seen["image_grid_thw"].prod(1) // self._processor.merge_size**2

    def _given(self, said: list[int], images: list[Tensor]) -> dict[str, Tensor]:
        """What the encoder is given: ids [1, L], every image mark as often as its image has tokens,
        and the images' patches; with token types, of which positions are made."""
        mark = self.pipe.text_encoder.config.image_token_id
        seen = self._seen([image.numpy() for image in images]).to(self.device)
        ids = torch.tensor(said, device=self.device)
        repeats = torch.ones_like(ids)
        repeats[ids == mark] = self._image_tokens(seen)
        ids = ids.repeat_interleave(repeats)[None]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": seen["pixel_values"],
            "image_grid_thw": seen["image_grid_thw"],
            "mm_token_type_ids": (ids == mark).int(),
        }


def of_images(kind: Any, images: Any, words: Any = None) -> Any:
    """A processor of transformers without its part for videos, which wants torchvision."""

    def unchecked(self: Any, *given: Any) -> None: ...

    # Under the name by which a pipeline's index knows it.
    own = {"check_argument_for_proper_class": unchecked, "__module__": kind.__module__}
    processor: Any = type(kind.__name__, (kind,), own)
    if words is None:  # only its image processor is taken out of it
        whole = processor.__new__(processor)
        whole.image_processor = images
        return whole
    return processor(images, words, None, chat_template=words.chat_template)


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of Qwen's autoencoders, [1, C, 1, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
