"""A folder in BAGEL's published layout at tiny size, built in code: random weights, a byte-level
vocabulary, an autoencoder that shrinks by 8 and a vision transformer on 14 x 14 patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from editr2.policies.unified.codecs import SCALE, SHIFT, published_name
from editr2.policies.unified.model import UnifiedConfig, UnifiedModel
from editr2.policies.unified.published import new_sight, sight_names

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
)
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 980,
    "patch_size": 14,
}
LLM = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
PROMPTS = ("make it red", "now a bit darker", "keep the hat, remove it")


def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "Ġm", "ak"])}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "m"), ("a", "k")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return made


def write(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it."""
    folder.mkdir(parents=True)
    noise = torch.Generator().manual_seed(seed)
    words = tokenizer()
    words.save(str(folder / "tokenizer.json"))
    config = UnifiedConfig(
        vocab_size=words.get_vocab_size() + 3,
        hidden_size=32,
        latent_channels=4,
        latent_patch_size=2,
        max_latent_size=64,
        frequency_size=32,
        **LLM,
    )
    model = UnifiedModel(config)
    model.reset_parameters(noise)
    sight = new_sight({**VIT, "num_hidden_layers": 2}, 32).to_empty(device="cpu")
    weights = dict(model.state_dict())
    own = sight.state_dict()
    weights |= {theirs: own[ours] for theirs, ours in sight_names(sight).items()}
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            norms = "norm" in name and name.endswith("weight")
            tensor.copy_(torch.ones_like(tensor) if norms else torch.zeros_like(tensor))
        elif "latent_pos_embed" not in name:
            fan = tensor[0].numel()
            tensor.normal_(0, 0.5 if "embed" in name else fan**-0.5, generator=noise)
    weights["llm2vae.weight"].mul_(0.3)
    patches = "vit_model.vision_model.embeddings.patch_embedding.weight"
    flat = weights[patches].permute(0, 2, 3, 1).reshape(VIT["hidden_size"], -1)
    weights[patches] = flat / flat.norm(dim=1, keepdim=True)
    stored = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in weights.items()}
    save_file(stored, folder / "ema.safetensors")
    vae = autoencoder(seed)
    tensors = {published_name(name, 4): t.contiguous() for name, t in vae.state_dict().items()}
    for name, tensor in tensors.items():
        if ".attn_1." in name and tensor.dim() == 2:
            tensors[name] = tensor[:, :, None, None].contiguous()
    save_file(tensors, folder / "ae.safetensors")
    said: dict[str, dict[str, Any]] = {
        "config.json": {"latent_patch_size": 2, "max_latent_size": 64},
        "llm_config.json": {**LLM, "hidden_size": 32, "vocab_size": config.vocab_size},
        "vit_config.json": VIT,
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
    }
    for name, values in said.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def autoencoder(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)  # so that latents can be seen
    return vae


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3))
    return np.kron(coarse, np.ones((1, size[0] // 2, size[1] // 2, 1))).astype(np.uint8)


def sessions(folder: Path, turns: tuple[int, ...], size: tuple[int, int] = (32, 32)) -> Path:
    """A sessions.jsonl with one session for each number of turns."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, count) in enumerate(zip(pictures(len(turns), size), turns, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        said = [{"instruction": text} for text in PROMPTS[:count]]
        lines.append(json.dumps({"id": f"s{i}", "image": f"{i}.png", "turns": said, "mode": "cm"}))
    (folder / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "sessions.jsonl"
