"""Text in and out of a policy. A user's text is text: a tokenizer's marks (`<|im_end|>`, `</s>`,
`<pad>`) are letters in it like any other, while a model's own templates keep theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from editr2.errors import DataError, shown
from editr2.policies.tensor_files import reading

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
THINK_END = "</think>"


def without_marks(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without its marks: equal ids for every text that has none of them."""
    parts = json.loads(tokenizer.to_str())
    parts |= {
        "truncation": None,
        "padding": None,
    }  # as the last call through transformers left them
    marks = {token["content"] for token in parts["added_tokens"] if not token["content"].isspace()}
    parts["added_tokens"] = [
        token for token in parts["added_tokens"] if token["content"] not in marks
    ]
    model = parts["model"]
    if "merges" not in model:
        # A model of whole pieces knows its marks as pieces, too; their ids stay, under names that
        # no piece of text has.
        def name(piece: str, at: int) -> str:
            return f"\0 {at}" if piece in marks else piece

        if isinstance(model["vocab"], list):
            model["vocab"] = [
                [name(piece, at), score] for at, (piece, score) in enumerate(model["vocab"])
            ]
        else:
            if model.get("unk_token") in model["vocab"]:
                model["unk_token"] = name(model["unk_token"], model["vocab"][model["unk_token"]])
            model["vocab"] = {name(piece, at): at for piece, at in model["vocab"].items()}
    return Tokenizer.from_str(json.dumps(parts))


def marks_of(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches each of the tokenizer's marks."""
    names = sorted(
        (token.content for token in tokenizer.get_added_tokens_decoder().values()),
        key=len,
        reverse=True,
    )
    return re.compile("|".join(re.escape(name) for name in names if not name.isspace()) or r"(?!)")


class Words:
    """A user's words as ids, by a tokenizer of transformers: the stock pipeline's ids where the
    words hold no marks."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _plain(self) -> Tokenizer:
        return without_marks(self.tokenizer.backend_tokenizer)

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return marks_of(self.tokenizer.backend_tokenizer)

    def ids(self, text: str, *, ends: bool = False, most: int | None = None) -> list[int]:
        """ends: with the marks that the tokenizer puts around a text. most: shortened to so many,
        ends included."""
        if most is None:
            self._plain.no_truncation()
        else:
            self._plain.enable_truncation(most)
        return list(self._plain.encode(text, add_special_tokens=ends).ids)

    def within(self, before: str, text: str, after: str) -> list[int]:
        """The words inside of a template, of which they are tokenised with what stands beside them,
        up to its marks."""
        opened = max((mark.end() for mark in self._marks.finditer(before)), default=0)
        closing = self._marks.search(after)
        closed = closing.start() if closing else len(after)
        head, tail = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
            for part in (before[:opened], after[closed:])
        )
        return [*head, *self.ids(before[opened:] + text + after[:closed]), *tail]

    def filled(self, rows: Sequence[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [B, length] padded as the tokenizer pads, and valid int64 [B, length]."""
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        valid = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            at = (
                slice(0, len(row))
                if self.tokenizer.padding_side == "right"
                else slice(length - len(row), length)
            )
            ids[i, at], valid[i, at] = torch.tensor(row), 1
        return ids, valid


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer file (`tokenizer.json`, of Qwen2 or of the embedded world) with batch padding and
    named specials."""

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
        ids = [
            -1 if (found := tokenizer.token_to_id(mark)) is None else int(found) for mark in marks
        ]
        if -1 in ids:
            raise DataError(f"the tokenizer lacks {marks[ids.index(-1)]}")
        return TextCodec(tokenizer, *ids)

    @cached_property
    def _plain(self) -> Tokenizer:
        return without_marks(self.tokenizer)

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return marks_of(self.tokenizer)

    def encode(self, text: str, *, marks: bool = False) -> list[int]:
        """Ids of one text. marks: the tokenizer's marks in it are marks; otherwise they are text.
        Raises `DataError` naming a word that the vocabulary does not hold."""
        encoding = (self.tokenizer if marks else self._plain).encode(text, add_special_tokens=False)
        unknown = self.tokenizer.token_to_id("<unk>")
        if unknown is not None and unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise DataError(
                f"text {shown(repr(text))}: the policy's vocabulary has no word "
                f"{shown(repr(text[start:end]))}"
            )
        return list(encoding.ids)

    def can_say(self, text: str) -> bool:
        """Whether a text that was written can be read: it holds no mark and no unknown word."""
        try:
            self.encode(text)
        except DataError:
            return False
        return self._marks.search(text) is None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False).strip()

    def pad(
        self, rows: list[list[int]], length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [B, L] padded at the end, and valid bool [B, L]; L is the longest row unless
        given."""
        width = length if length is not None else max((len(r) for r in rows), default=0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            if len(row) > width:
                raise DataError(
                    f"text of {len(row)} tokens is longer than {width}: {self.decode(row)!r}"
                )
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            valid[i, : len(row)] = True
        return ids, valid


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A whitespace word-level tokenizer over `words` and the special tokens, in that fixed
    order."""
    from tokenizers import AddedToken
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = ["<pad>", "<unk>", IM_START, IM_END, VISION_START, VISION_END, THINK_END]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer
