"""The published editors as facts: the settings of their parts, so that nothing has to be downloaded to judge a run.

Only what differs from the defaults of diffusers' classes is written down. A local folder's own files win over these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Parts:
    """What an editor is made of.

    of: the pipeline's class, where the weights are published ones. transformer, vae, scheduler, pipeline: settings.
    text: parameters of each text encoder, by its name in the pipeline.
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
    text={"text_encoder": 8_292_166_656},
)

PUBLISHED = {
    "black-forest-labs/FLUX.1-Kontext-dev": Parts(
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
        text={"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
        of="FluxKontextPipeline",
    ),
    "black-forest-labs/FLUX.2-klein-4B": Parts(
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
        text={"text_encoder": 4_022_468_096},
        pipeline={"is_distilled": True},
        of="Flux2KleinPipeline",
    ),
    "Qwen/Qwen-Image-Edit": replace(_QWEN, of="QwenImageEditPipeline"),
    "Qwen/Qwen-Image-Edit-2509": replace(_QWEN, of="QwenImageEditPlusPipeline"),
}
"""By hub id."""
