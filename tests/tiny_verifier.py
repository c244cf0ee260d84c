"""Tiny verifiers with random weights and real processors, built in code, and files to learn from.

One token of the vocabulary is a whole end of a trace, verdicts and score, so that what a verifier
with random weights samples can be read about as often as not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from editr2.files import json_line, write_lines

SIDE, PATCH = 16, 8
SCORES = range(11)
ENDS = [f'{{"1": {verdict}}}<score>{score}</score>' for verdict in (0, 1) for score in SCORES]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "paint", "keep", "it"]
WORDS += ["red", "blue", "1.", "seen", "wanted", *ENDS]
SPLIT = r'\{"1": \d\}<score>\d+</score>|[^\s{]+'
PROMPT = "{instruction}\n{principles}"

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %}ASSISTANT: "
    "{% endif %}{% for part in message.content %}{% if part.type == 'image' %}<image> "
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer(vocabulary: Sequence[str] = WORDS, pattern: str = SPLIT) -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(pattern), "removed", True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def write_llava(
    folder: Path, seed: int = 0, *, words: Any = None, side: int = SIDE, likely: Sequence[str] = ()
) -> Path:
    """Weights, tokenizer and processor, ready for `from_pretrained`; some 20,000 numbers. likely:
    words that come far more often than others, wherever a picture is not."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = words or tokenizer()
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    heads = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **heads, num_hidden_layers=1, image_size=side, patch_size=PATCH, projection_dim=16
        ),
        text_config=LlamaConfig(
            **heads,
            vocab_size=len(words),
            num_hidden_layers=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    if likely:  # the first number of every state is the same, and so a bias of the last layer
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 8
            model.get_output_embeddings().weight[:, 0] = -3
            model.get_output_embeddings().weight[words.convert_tokens_to_ids([*likely]), 0] = 0
    # Habits of decoding, as published folders have them; sampling for training has none.
    model.generation_config.update(
        eos_token_id=2, pad_token_id=0, bos_token_id=1, do_sample=True, repetition_penalty=1.05
    )
    model.save_pretrained(folder)
    prompts = folder.parent / "words"
    prompts.mkdir(exist_ok=True)
    (prompts / "judge.md").write_text(PROMPT)
    return folder


def write_world(folder: Path, seed: int = 0) -> Path:
    """Of the shapes world's words, with its question (`judge.md`): it judges by whim, four
    principles at a time."""
    from editr2.verifier import small

    ends = [
        f'{{"1": {verdict}, "2": 1, "3": 1, "4": 1}} <score>{score}</score>'
        for verdict in (0, 1)
        for score in SCORES
    ]
    words = tokenizer((*small.VOCABULARY, *ends), small.SPLIT)
    write_llava(folder, seed, words=words, side=24, likely=["</s>", *ends])
    (folder / "judge.md").write_text(small.QUESTION)
    return folder


def write_data(folder: Path, count: int = 5) -> Path:
    """principles.jsonl, traces.jsonl and pairs.jsonl of `count` edits each, and their pictures."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)

    def picture(name: str) -> str:
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / name)
        return name

    asked = [{"text": "keep it", "kind": "keep"}]
    edits, traces, pairs = [], [], []
    for k in range(count):
        colour = ("red", "blue")[k % 2]
        about = {"instruction": f"paint it {colour}", "principles": asked}
        image, win, lose = (picture(f"{name}{k}.png") for name in ("image", "win", "lose"))
        edits.append({"id": f"e{k}", "image": image, "edited": win, **about})
        said = f"wanted {colour}" + " seen red" * (k % 3) + f" {ENDS[11 + k]}"
        traces.append({"id": f"e{k}", "trace": said})
        pairs.append({"id": f"p{k}", "image": image, "win": win, "lose": lose, **about})
    traces.append({"id": "e0", "trace": "seen it"})
    for name, rows in (("principles", edits), ("traces", traces), ("pairs", pairs)):
        write_lines(folder / f"{name}.jsonl", map(json_line, rows))
    return folder


QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen(beside: Any, seed: int = 0) -> tuple[Any, Any]:
    """A tiny Qwen2.5-VL and its processor, whose part for videos only exists beside torchvision."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers import Qwen2_5_VLProcessor as Processor

    tiny = beside("tiny_qwen")
    words = tiny.tokenizer()
    words.eos_token = words.pad_token = "<|im_end|>"
    named = {"check_argument_for_proper_class": lambda self, *given: None}
    kind = type(Processor.__name__, (Processor,), {**named, "__module__": Processor.__module__})
    processor = kind(tiny.image_processor(), words, None, chat_template=QWEN_TEMPLATE)
    token = words.convert_tokens_to_ids
    heads = {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(seed)
    module = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **heads,
                "vocab_size": len(words),
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
                "eos_token_id": token("<|im_end|>"),
            },
            vision_config={
                **heads,
                "depth": 2,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            initializer_range=0.2,
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )
    module.generation_config.eos_token_id = token("<|im_end|>")
    return module.eval(), processor
