"""Detectors and image encoders of a few thousand random numbers each, in folders as
`save_pretrained` writes them. Their answers mean nothing; their parts are the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def _preprocessor(folder: Path, **values: object) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _bert_tokenizer(folder: Path) -> None:
    """Its marks have the ids that Grounding DINO's code names: 101, 102, 1012 and 1029."""
    from transformers import BertTokenizerFast

    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words |= {110 + i: letter for i, letter in enumerate(letters)}
    words |= {140 + i: f"##{letter}" for i, letter in enumerate(letters)}
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words.get(i, f"[unused{i}]") for i in range(1100)))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)


def grounding_dino(folder: Path, seed: int = 0, side: int = 160) -> Path:
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        SwinConfig,
    )

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=side,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=5,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=20,
        max_text_len=32,
        disable_custom_kernels=True,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    _bert_tokenizer(folder)
    _preprocessor(folder, size={"shortest_edge": side, "longest_edge": side * 5 // 3})
    return folder


def owlv2(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPTokenizerFast, Owlv2Config, Owlv2ForObjectDetection

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = Owlv2Config(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 24},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder)
    _preprocessor(
        folder, size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    return folder


def dinov3(folder: Path, seed: int = 0, registers: int = 4) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=registers,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    _preprocessor(folder, size={"height": 64, "width": 64})
    return folder


def dinov2(folder: Path, seed: int = 0, registers: int = 0) -> Path:
    """With register tokens, the class that has them."""
    import transformers

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        image_size=56,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        **({"num_register_tokens": registers} if registers else {}),
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    _preprocessor(
        folder, size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3
    )
    return folder
