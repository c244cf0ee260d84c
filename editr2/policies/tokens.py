"""Text in and out of a policy: a `tokenizers` file plus the special ids that the unified model needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from editr2.errors import DataError
from editr2.tensor_files import reading

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
THINK_END = "</think>"


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer file (`tokenizer.json`, of Qwen2 or of the embedded world) with batch padding and named specials."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int

    @staticmethod
    def load(path: Path) -> TextCodec:
        with reading(f"{path}: no tokenizer (was it cut short?)"):
            tokenizer = Tokenizer.from_file(str(path))
        try:
            return TextCodec.of(tokenizer)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @staticmethod
    def of(tokenizer: Tokenizer) -> TextCodec:
        """Looks the special ids up."""
        marks = (IM_START, IM_END, VISION_START, VISION_END)
        ids = [-1 if (found := tokenizer.token_to_id(mark)) is None else int(found) for mark in marks]
        if -1 in ids:
            raise DataError(f"the tokenizer lacks {marks[ids.index(-1)]}")
        return TextCodec(tokenizer, *ids)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without marks. Raises `DataError` naming a word that the vocabulary does not hold."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.token_to_id("<unk>")
        if unknown is not None and unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise DataError(f"text {text!r}: the policy's vocabulary has no word {text[start:end]!r}")
        return list(encoding.ids)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False).strip()

    def pad(self, rows: list[list[int]], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [B, L] padded at the end, and valid bool [B, L]; L is the longest row unless given."""
        width = length if length is not None else max((len(r) for r in rows), default=0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            if len(row) > width:
                raise DataError(f"text of {len(row)} tokens is longer than {width}: {self.decode(row)!r}")
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            valid[i, : len(row)] = True
        return ids, valid


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A whitespace word-level tokenizer over `words` and the special tokens, in that fixed order."""
    from tokenizers import AddedToken
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = ["<pad>", "<unk>", IM_START, IM_END, VISION_START, VISION_END, THINK_END]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer
