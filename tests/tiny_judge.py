"""A judge with random weights that `transformers serve` takes: a Llava of some 60,000 parameters
whose processor needs no torchvision.

Its words are one token each, among them what a judge's answer may be; it has learnt nothing.
"""

from __future__ import annotations

from pathlib import Path

IMAGE_SIZE, PATCH = 28, 14

WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":"),
    *("Yes", "No", "yes", "no", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123456789"),
    *("Is", "it", "red", "?", ".", ",", "Answer", "with", "one", "word", "or", "image"),
]


def write_tiny_judge(folder: Path) -> None:
    """Weights, tokenizer and processor, ready for `from_pretrained`."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %}ASSISTANT: "
        "{% endif %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT: {% endif %}"
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1, do_sample=True)
    model.save_pretrained(folder)
