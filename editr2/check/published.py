"""The published editors as facts: the settings of their parts, so that nothing has to be downloaded
to judge a run.

Only what differs from the defaults of diffusers' classes is written down. A local folder's own
files win over these.

Settings were checked against the makers' and diffusers' conversion code and copies of the published
files in other projects, numbers of parameters against the weights' own headers;
tests/test_published.py counts them again. Only the schedulers of Kontext and of klein's KV variant
were not found by themselves: they are taken to be their families'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Parts:
    """What an editor is made of.

    of: the pipeline's class, where the weights are published ones. transformer, vae, scheduler,
    pipeline: settings. text: parameters of each text encoder, by its name in the pipeline.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text: Mapping[str, int]
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""


_BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_KONTEXT = Parts(
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
        **_BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    scheduler=_FLUX_SHIFT,
    text={"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},  # CLIP-L, T5-XXL's encoder
    of="FluxKontextPipeline",
)
_KLEIN_4B = Parts(
    transformer={
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "in_channels": 128,
        "guidance_embeds": False,
    },
    vae=_BLOCKS,
    scheduler=_FLUX_SHIFT,
    text={"text_encoder": 4_022_468_096},  # Qwen3-4B, whose head is its embedding
    pipeline={"is_distilled": True},
    of="Flux2KleinPipeline",
)
_KLEIN_9B = replace(
    _KLEIN_4B,
    transformer={
        **_KLEIN_4B.transformer,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    text={"text_encoder": 8_190_735_360},  # Qwen3-8B with its head
)
_QWEN = Parts(
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
    of="QwenImageEditPipeline",
)
_QWEN_PLUS = replace(_QWEN, of="QwenImageEditPlusPipeline")

PUBLISHED = {
    "black-forest-labs/FLUX.1-Kontext-dev": _KONTEXT,
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": replace(_KLEIN_4B, pipeline={"is_distilled": False}),
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": replace(_KLEIN_9B, pipeline={"is_distilled": False}),
    "black-forest-labs/FLUX.2-klein-9b-kv": replace(
        _KLEIN_9B, pipeline={}, of="Flux2KleinKVPipeline"
    ),
    "Qwen/Qwen-Image-Edit": _QWEN,
    "Qwen/Qwen-Image-Edit-2509": _QWEN_PLUS,
    # Its conditions are modulated as at time 0, which takes memory of its own.
    "Qwen/Qwen-Image-Edit-2511": replace(
        _QWEN_PLUS, transformer={**_QWEN.transformer, "zero_cond_t": True}
    ),
}
"""By hub id."""
