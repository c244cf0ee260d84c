"""The embedded verifier before it learns: a Llava of some 1.7 million random weights, its processor
and its words, as transformers has them.

A cell of the world's picture is a patch, a word of the world a token. It is asked by the request
and the principles alone: every word of the usual question would be read with every picture and says
the same each time. `judge.md` in the folder holds that question; training and the reward
find it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from editr2.rewards.traces import HIGH
from editr2.rewards.verifier import JUDGE
from editr2.run.checkpoint import replace_folder
from editr2.verifier.settings import SmallConfig
from editr2.verifier.world import EMPTY, MIXED, STEPS, UNCLEAR
from editr2.worlds.shapes import CELL, SIZE, WORDS

QUESTION = "{instruction}\n{principles}\n"

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}user: {% else %}assistant: "
    "{% endif %}{% for part in message.content %}{% if part.type == 'image' %}<image> "
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)

PAD, BEGIN, END, UNKNOWN, IMAGE = MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")

MOST_PRINCIPLES = 4
ASKED = ("there", "and", "empty", "rest", "every", "cell", "as", "was", "were", "clear", "?")
REASONED = (*EMPTY, UNCLEAR[0], MIXED, "wants", "shows", "same", "differs", "done", "failed")
_NUMBERS = tuple(f"{k / (STEPS / HIGH):g}" for k in range(STEPS + 1))
ANSWERED = ("<score>", "</score>", ",", "}", *_NUMBERS)
ROLES = ("user:", "assistant:")
NUMBERED = tuple(f"{k}." for k in range(1, MOST_PRINCIPLES + 1))
KEYS = tuple(f'{brace}"{k}":' for k, brace in enumerate(("{", "", "", ""), 1))

VOCABULARY = (
    *MARKS,
    *ROLES,
    *dict.fromkeys((*WORDS, *ASKED, *REASONED, *NUMBERED, *KEYS, *ANSWERED)),
)
"""Its order is that of the weights' embeddings."""

SPLIT = r'<[^<>\s]+>|\{?"\d":|[?,}]|[^\s?,<{}"]+'
"""What a token is: a mark or tag, a verdict's key, a sign, or what stands between blanks."""


def tokenizer() -> Any:
    """Of the world's words; anything else is unknown to it."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    words.pre_tokenizer = Split(Regex(SPLIT), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
    )


def write_small(folder: Path, config: SmallConfig) -> int:
    """Writes weights, processor and question in place of what is there; how many weights."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()

    words = tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        tokenizer=words,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sight = CLIPVisionConfig(
        hidden_size=config.sight_hidden,
        intermediate_size=4 * config.sight_hidden,
        num_hidden_layers=config.sight_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=config.sight_hidden,
    )
    language = LlamaConfig(
        vocab_size=len(words),
        hidden_size=config.hidden,
        intermediate_size=8 * config.hidden // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=sight,
                text_config=language,
                image_token_id=words.convert_tokens_to_ids(IMAGE),
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
                tie_word_embeddings=True,
            )
        )
    module.generation_config.update(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )

    def write(to: Path) -> None:
        module.save_pretrained(to)
        processor.save_pretrained(to)
        (to / JUDGE).write_text(QUESTION)

    replace_folder(folder, write)
    return sum(p.numel() for p in module.parameters())
