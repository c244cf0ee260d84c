"""The unified policy: reads the whole session, writes its intent before a turn, then paints (BAGEL architecture).

Context: `image_0, text_1, image_1, text_2, ...`, every output image read back in. An intent is written on a branch of
the context behind a question that lists the raw instructions; the branch is then dropped, so only the intent's text
enters the session (Edit-R2, arXiv 2606.05950, section on intent reconstruction).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from editr2.errors import CheckpointError, DataError
from editr2.policies.base import Intent
from editr2.policies.tokens import THINK_END, TextCodec, word_tokenizer
from editr2.policies.unified_model import Branch, Context, UnifiedConfig, UnifiedModel
from editr2_kernels import philox_normal

EMBEDDED = Path(__file__).parent.parent / "assets" / "unified-small"


def patchify(images: np.ndarray, patch: int) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 tokens [B, (H/p)(W/p), p*p*3] in [-1, 1], each ordered (row, column, channel)."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1
    b, h, w, c = x.shape
    x = x.view(b, h // patch, patch, w // patch, patch, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The inverse of `patchify`, clamped and rounded to uint8."""
    b = tokens.shape[0]
    x = tokens.detach().float().cpu().view(b, *grid, patch, patch, -1).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, grid[0] * patch, grid[1] * patch, -1)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def question(earlier: Sequence[str], current: str) -> str:
    """The request for an intent: raw earlier instructions, the current one, and what to do."""
    said = "".join(f"{c} ; " for c in earlier)
    return f"earlier : {said}now : {current} ; rewrite"


def read_intent(answer: str) -> tuple[str | None, str]:
    """(intent or None, reasoning) of a decoded answer: the intent is what follows `</think>`."""
    thought, found, intent = answer.partition(THINK_END)
    intent = " ".join(intent.split())
    return (intent if found and intent else None), " ".join(thought.split())


class UnifiedPolicy:
    """`Policy` over a `UnifiedModel` whose latents are pixels (the embedded world's configuration).

    Image size is fixed by the configuration: `max_latent_size * latent_patch_size` pixels a side.
    """

    writes_text = True

    def __init__(self, model: UnifiedModel, codec: TextCodec) -> None:
        config = model.config
        if config.latent_channels != 3:
            raise DataError(
                f"latent_channels: {config.latent_channels}; this policy paints pixels (accepted: 3). A model on an "
                "autoencoder's latents needs a policy that holds the autoencoder"
            )
        self.module = model
        self.codec = codec
        self.grid = (config.max_latent_size, config.max_latent_size)
        self.patch = config.latent_patch_size
        self.latent_shape = (self.grid[0] * self.grid[1], config.latent_dim)
        self.image_size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        self._marks = torch.tensor([codec.vision_start, codec.vision_end])

    @staticmethod
    def load(folder: Path = EMBEDDED) -> UnifiedPolicy:
        """Weights (`model.safetensors`), `config.json` and `tokenizer.json` from a folder; fp32 whatever is stored."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: no {name}; expected a folder written by `editr2 world pretrain`")
        model = UnifiedModel(UnifiedConfig.load(folder / "config.json"))
        try:
            weights = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise CheckpointError(f"{folder / 'model.safetensors'}: {error}") from error
        model.load_state_dict({k: v.float() for k, v in weights.items()})
        return UnifiedPolicy(model.eval(), TextCodec.load(folder / "tokenizer.json"))

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes what `load` reads, weights rounded to `dtype`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.module.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.module.config), indent=1) + "\n")
        self.codec.tokenizer.save(str(folder / "tokenizer.json"))

    # ------------------------------------------------------------------------------------------------------- protocol

    @property
    def device(self) -> torch.device:
        return self.module.vae2llm.weight.device

    @property
    def marks(self) -> Tensor:
        return self._marks.to(self.device)

    def encode(self, images: np.ndarray) -> Context:
        return self.append(self.module.empty_context(len(images), self.device), images)

    def instruct(self, context: Context, instructions: Sequence[str]) -> Context:
        ids, valid = self.codec.pad([self.text_ids(c) for c in instructions])
        return self.module.append_text(context, ids.to(self.device), valid.to(self.device))[0]

    def append(self, context: Context, images: np.ndarray) -> Context:
        if images.shape[1:3] != self.image_size:
            raise DataError(f"images: {images.shape[1]} x {images.shape[2]} px (accepted: {self.image_size})")
        return self.module.append_image(context, patchify(images, self.patch).to(self.device), self.grid, self.marks)

    def velocity(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        return self.module.velocity(context, x, sigma, self.grid, self.marks)

    def select(self, context: Context, index: Tensor) -> Context:
        return context.select(index.to(self.device))

    def decode(self, latents: Tensor) -> np.ndarray:
        return unpatchify(latents, self.grid, self.patch)

    # ----------------------------------------------------------------------------------------------------------- text

    def text_ids(self, text: str) -> list[int]:
        return [self.codec.im_start, *self.codec.encode(text), self.codec.im_end]

    def question_ids(self, earlier: Sequence[str], current: str) -> list[int]:
        """The question and the opening mark of the answer."""
        return [*self.text_ids(question(earlier, current)), self.codec.im_start]

    @torch.no_grad()
    def intend(
        self,
        context: Context,
        earlier: Sequence[Sequence[str]],
        current: Sequence[str],
        seeds: Tensor | None,
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Intent]:
        rows = [self.question_ids(e, c) for e, c in zip(earlier, current, strict=True)]
        ids, valid = (x.to(self.device) for x in self.codec.pad(rows))
        branch = Branch(context, ids.shape[1] + max_tokens)
        hidden = self.module.extend_branch(branch, ids, valid)
        last = hidden[torch.arange(len(rows)), valid.sum(1) - 1]
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        sampled: list[Tensor] = []
        for k in range(max_tokens):
            token = self._sample(self.module.logits(last), seeds, k, temperature)
            token = torch.where(done, 0, token)
            sampled.append(token)
            still = ~done
            done = done | (token == self.codec.im_end)
            if bool(done.all()) or k + 1 == max_tokens:
                break
            last = self.module.extend_branch(branch, token[:, None], still[:, None])[:, 0]
        columns = torch.stack(sampled, 1).tolist()
        intents = []
        for row in columns:
            end = row.index(self.codec.im_end) if self.codec.im_end in row else len(row)
            text, thought = read_intent(self.codec.decode(row[:end]))
            intents.append(Intent(text, thought, tuple(row[: end + 1])))
        return intents

    @staticmethod
    def _sample(logits: Tensor, seeds: Tensor | None, position: int, temperature: float) -> Tensor:
        """Greedy, or by inverse transform with one counter-based uniform per sample and token."""
        if seeds is None or temperature == 0:
            return logits.argmax(-1)
        normal = philox_normal(seeds, position, (1,))
        uniform = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
        return (cumulative < uniform * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def world_codec_words() -> list[str]:
    """The embedded vocabulary: the world's words and those of the question."""
    from editr2.worlds.shapes import WORDS

    return [*WORDS, "earlier", "now", "rewrite", ":", ";"]


def new_embedded_policy(config: UnifiedConfig, seed: int) -> UnifiedPolicy:
    """A randomly initialised policy over the world's vocabulary."""
    tokenizer = word_tokenizer(world_codec_words())
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise DataError(f"vocab_size: {config.vocab_size} < {tokenizer.get_vocab_size()} words of the world")
    model = UnifiedModel(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return UnifiedPolicy(model, TextCodec.of(tokenizer))
