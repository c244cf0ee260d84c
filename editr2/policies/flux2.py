"""FLUX.2-dev: klein's larger sibling, whose guidance is distilled and whose words Mistral reads.

Autoencoder, positions, schedule and transformer class are klein's. The text encoder is Mistral
Small 3.2, told by a system message how to read; states of other layers of it are the text tokens.
The strength of guidance is an input of the transformer (`policy.guidance_embed`), so there is one
branch.
"""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.klein import KleinPolicy
from editr2.policies.pipelines import FLUX_BLOCKS, FLUX_SHIFT, Parts
from editr2.policies.tokens import Words

DEV = Parts(
    transformer={
        "num_layers": 8,
        "num_single_layers": 48,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "in_channels": 128,
        "guidance_embeds": True,
    },
    vae=FLUX_BLOCKS,
    scheduler=FLUX_SHIFT,
    text={"text_encoder": 24_011_361_280},  # Mistral-Small-3.2-24B with its head and image tower
)


class Flux2Policy(KleinPolicy):
    """See the module docstring. References have times 10, 20, ...: the image to edit, then whatever
    else of the session a turn sees."""

    model = "flux2"
    pipeline = "Flux2Pipeline"
    hub_id = "black-forest-labs/FLUX.2-dev"
    published = MappingProxyType({hub_id: DEV})
    text_layers = (10, 20, 30)
    guidance_argument = "true_cfg_scale"  # which its call has not: it knows one branch
    default_guidance_embed = 4.0
    """The stock pipeline's default."""

    @classmethod
    def load_pipeline(cls, base: str, **components: Any) -> Any:
        """With the tokenizer of the processor that the published folder names: only its words are
        read, and the rest of that processor wants torchvision."""
        from transformers import AutoTokenizer

        pipe = super().load_pipeline(base, tokenizer=None, **components)
        words = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
        pipe.register_modules(tokenizer=words)
        return pipe

    def check(self, config: PolicyConfig) -> None:
        DiffusionPolicy.check(self, config)
        if config.guidance != 1:
            what = "1; its guidance is distilled, policy.guidance_embed"
            self.refuse("guidance", config.guidance, what)
        if config.guidance_embed is not None and not self.module.config.guidance_embeds:
            what = "none; these weights do not take it"
            self.refuse("guidance_embed", config.guidance_embed, what)

    @cached_property
    def _words(self) -> Words:
        # The stock pipeline calls a processor its tokenizer.
        return Words(getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer))

    def rendered(self, text: str) -> str:
        says = {"system": self.pipe.system_message, "user": text}
        messages = [
            {"role": role, "content": [{"type": "text", "text": said}]}
            for role, said in says.items()
        ]
        options = {"tokenize": False, "add_generation_prompt": False}
        return str(self.pipe.tokenizer.apply_chat_template(messages, **options))

    def distilled_guidance(self, sigma: Tensor) -> Tensor | None:
        value = self.config.guidance_embed
        return torch.full_like(sigma, self.default_guidance_embed if value is None else value)
