"""Tiny random FLUX.1-Kontext, FLUX.2-klein and FLUX.2-dev pipelines, built in code: the stock
classes with a few thousand weights.

Autoencoders shrink by 8 as the real ones do, so that sizes in tokens are the real ones for an
image's sizes in pixels.
"""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = string.ascii_letters + string.digits + string.punctuation


def kontext_pipeline(
    seed: int = 0, guidance_embeds: bool = True, **transformer: Any
) -> FluxKontextPipeline:
    """A pipeline with random weights; transformer: changes to the transformer's settings."""
    torch.manual_seed(seed)
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
    }
    pipe = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=AutoencoderKL(
            **_autoencoder(4),
            scaling_factor=0.36,
            shift_factor=0.12,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=2 * len(LETTERS) + 2,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=CLIPTokenizer(
            vocab={
                name: i
                for i, name in enumerate(
                    [
                        "<|startoftext|>",
                        "<|endoftext|>",
                        *LETTERS,
                        *(f"{letter}</w>" for letter in LETTERS),
                    ]
                )
            },
            merges=[],
            model_max_length=77,
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=256,
                d_model=32,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        tokenizer_2=T5TokenizerFast(
            vocab=[
                ("<pad>", 0.0),
                ("</s>", 0.0),
                ("<unk>", 0.0),
                ("▁", -1.0),
                *((c, -2.0) for c in LETTERS),
            ],
            extra_ids=0,
            model_max_length=512,
        ),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            **(sizes | transformer),
        ),
    )
    return _ready(pipe)


def klein_pipeline(
    seed: int = 0, is_distilled: bool = False, **transformer: Any
) -> Flux2KleinPipeline:
    """A pipeline with random weights; transformer: changes to the transformer's settings. The text
    encoder has the 27 layers whose states the pipeline reads."""
    torch.manual_seed(seed)
    letters = [*LETTERS, "Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(vocab={c: i for i, c in enumerate(letters + special)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    vae = AutoencoderKLFlux2(**_autoencoder(4))
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=28,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=16,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            mlp_ratio=2.0,
            axes_dims_rope=(4, 4, 4, 4),
            **({"guidance_embeds": False} | sizes | transformer),
        ),
        is_distilled=is_distilled,
    )
    return _ready(pipe)


def klein_kv_pipeline(seed: int = 0) -> Flux2KleinKVPipeline:
    """The same weights behind the pipeline whose references see only themselves."""
    parts = klein_pipeline(seed, num_layers=2, num_single_layers=2).components
    return _quiet(Flux2KleinKVPipeline(**parts))


MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set text = m['content'][0]['text'] %}"
    "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def flux2_pipeline(seed: int = 0, **transformer: Any) -> Flux2Pipeline:
    """Klein's parts behind the pipeline whose guidance is distilled, and Mistral's words: its
    system message is one token, and the text encoder has the 31 layers that the pipeline reads."""
    words = _mistral_words()
    parts = klein_pipeline(seed, **({"guidance_embeds": True} | transformer)).components
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 16, "num_attention_heads": 1}
    text = {**sizes, "model_type": "mistral", "num_key_value_heads": 1, "num_hidden_layers": 31}
    image = {**sizes, "model_type": "pixtral", "num_hidden_layers": 1}
    text |= {"vocab_size": len(words), "initializer_range": 0.2}
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=image, text_config=text)
    )
    parts |= {"text_encoder": encoder.eval(), "tokenizer": words}
    return _quiet(Flux2Pipeline(**parts))


def _mistral_words() -> Any:
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    learner.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=2000, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    learner.train_from_iterator([SYSTEM_MESSAGE], trainer)
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    words = PreTrainedTokenizerFast(
        tokenizer_object=learner,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        additional_special_tokens=marks,
        padding_side="left",
    )
    words.chat_template = MISTRAL_CHAT
    return words


def _autoencoder(channels: int) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "latent_channels": channels,
        "sample_size": 1024,
        "mid_block_add_attention": False,
    }


def _ready(pipe: Any) -> Any:
    """Weights large enough that words, images and time all move the output; quiet and on the
    host."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    for p in pipe.transformer.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
    for p in pipe.vae.decoder.conv_out.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3))
    return np.kron(coarse, np.ones((1, size[0] // 4, size[1] // 4, 1))).astype(np.uint8)
