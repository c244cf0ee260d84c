"""Tiny random Qwen-Image-Edit and -Plus pipelines, built in code: the stock classes with a few
weights.

The tokenizer's merges are learned from the pipelines' own template, so that its system part is the
64 tokens that it is with the published vocabulary.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WIDTH, CHANNELS = 32, 4


def components(seed: int = 0, **transformer: Any) -> dict[str, Any]:
    """The six components by the pipelines' names, float32 and in eval mode. transformer: changes to
    its settings."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    words = tokenizer()
    token = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end")
    }
    pads = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}_pad|>")
        for name in ("image", "video")
    }
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words),
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            initializer_range=0.2,
            **token,
            **pads,
        )
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 0.7, 0.9, 1.1],
    )
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.3)
    settings = {
        "patch_size": 2,
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    trained = QwenImageTransformer2DModel(**(settings | transformer))
    for name, p in trained.named_parameters():
        if "_mod.1.bias" in name:  # gates of about 1: what the text says must matter
            torch.nn.init.normal_(p)
    return {
        "transformer": trained.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": words,
        "processor": image_processor(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
            time_shift_type="exponential",
            use_dynamic_shifting=True,
        ),
    }


def tokenizer() -> Any:
    """A `Qwen2Tokenizer` of a few hundred tokens."""
    from diffusers import QwenImageEditPipeline
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=sorted(alphabet), show_progress=False
    )
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    template = QwenImageEditPipeline(**dict.fromkeys(parts)).prompt_template_encode
    learner.train_from_iterator([re.sub(r"<\|\w+\|>", "", template)], trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(
        vocab=learned["vocab"], merges=merges, extra_special_tokens=list(SPECIAL[1:])
    )


def image_processor() -> Any:
    """Pictures become a few tokens of the language model, 28 x 28 pixels each: 2 x 3 of them for 64
    x 96."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=6000)


def qwen_pipeline(seed: int = 0, *, plus: bool = False, **transformer: Any) -> Any:
    """The stock pipeline with random weights; transformer: changes to the transformer's
    settings."""
    import diffusers
    from transformers import Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    parts = components(seed, **transformer)
    check = ProcessorMixin.check_argument_for_proper_class
    try:
        # The processor insists on a video processor, which only exists beside torchvision and is
        # not used for pictures.
        ProcessorMixin.check_argument_for_proper_class = lambda *args: None
        parts["processor"] = Qwen2VLProcessor(parts["processor"], parts["tokenizer"])
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
    kind = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def longcat_pipeline(seed: int = 0, **transformer: Any) -> Any:
    """The stock pipeline of LongCat-Image-Edit with random weights: Qwen's text encoder, FLUX.1's
    autoencoder. transformer: changes to its settings."""
    from diffusers import AutoencoderKL, LongCatImageEditPipeline, LongCatImageTransformer2DModel
    from transformers import Qwen2VLProcessor

    parts = components(seed)
    whole = Qwen2VLProcessor.__new__(Qwen2VLProcessor)  # whose constructor wants its video part
    whole.image_processor = parts.pop("processor")
    settings = {
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    trained = LongCatImageTransformer2DModel(**(settings | transformer))
    for p in trained.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=16,  # the pipeline knows no other number
        sample_size=1024,
        mid_block_add_attention=False,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.3)
    parts |= {"transformer": trained.eval(), "vae": vae.eval(), "text_processor": whole}
    pipe = LongCatImageEditPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}"
)


def qwen_image_pipeline(seed: int = 0, **transformer: Any) -> Any:
    """The stock pipeline of Qwen-Image-2.1 with random weights. transformer: changes to its
    settings."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )

    # Its part for videos only exists beside torchvision.
    unchecked = {"check_argument_for_proper_class": lambda self, *given: None}
    named = {**unchecked, "__module__": Qwen3VLProcessor.__module__}
    processor = type(Qwen3VLProcessor.__name__, (Qwen3VLProcessor,), named)
    torch.manual_seed(seed)
    words = tokenizer()
    words.chat_template = QWEN_CHAT
    token = words.convert_tokens_to_ids
    text_encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(words),
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "initializer_range": 0.2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
                "initializer_range": 0.2,
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[0.5 + 0.1 * i for i in range(8)],
    )
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.3)
    settings = {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    trained = QwenImage21Transformer2DModel(**(settings | transformer))
    for p in trained.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    pipe = QwenImage21Pipeline(
        scheduler=components(seed)["scheduler"],
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        processor=processor(
            Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64 * 4),
            words,
            None,
            chat_template=QWEN_CHAT,
        ),
        transformer=trained.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: Any, folder: Path) -> Path:
    """`save_pretrained`, which a processor without its video part does not survive."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        (part.image_processor if "processor" in name else part).save_pretrained(folder / name)
    if "tokenizer" not in pipe.components:  # it stands with the processor
        pipe.processor.tokenizer.save_pretrained(folder / "processor")
    return folder
