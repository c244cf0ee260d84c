"""Qwen-Image-2.1: one causal sequence of words and images, read by Qwen3-VL, with the target last.

Words and images before the target are modulated as at time 0 and do not see it, so their keys and
values depend on no step: they are computed once a turn and branch, and every step of every sibling
runs the target alone. An image stands where the text encoder has it, four latent tokens in each of
its places.

The autoencoder knows transparency; images come in opaque, and what comes out lies on white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from editr2.config import PolicyConfig
from editr2.policies.contexts import MASK, WORDS, EditContext, Prompt
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.kontext import linear_mu
from editr2.policies.latents import from_tokens, tokens
from editr2.policies.pipelines import Parts
from editr2.policies.qwen_edit import EDIT
from editr2.policies.qwen_vision import QwenVision, latent_statistics, of_images

ONE = "<image1><|vision_start|><|image_pad|><|vision_end|>"
"""Where the first image stands in the pipeline's template."""

UNIFIED = Parts(
    transformer={},  # its class's defaults
    vae={},
    scheduler=EDIT.scheduler,
    text={"text_encoder": 8_767_123_696},  # Qwen3-VL-8B with its head and its image tower
)


class QwenImagePolicy(QwenVision, DiffusionPolicy):
    """See the module docstring. Keys and values carry gradient only with `train.context_gradient`,
    and take memory, 2 x blocks x tokens x width numbers a sample and branch."""

    model = "qwen-image-2.1"
    pipeline = "QwenImage21Pipeline"
    transformer = "QwenImage21Transformer2DModel"
    hub_id = "Qwen/Qwen-Image-2.1"
    published = MappingProxyType({hub_id: UNIFIED})
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.(proj|out|gate_layer))"
    )
    negative_prompt = " "
    text_width_setting = "context_in_dim"
    most_images: ClassVar[int] = 10
    instead_of_shard = "qwen-edit-plus; its cache is made inside of the blocks"

    @classmethod
    def with_images(cls, base: str, images: Any, **components: Any) -> Any:
        from transformers import AutoTokenizer, Qwen3VLProcessor

        words = AutoTokenizer.from_pretrained(base, subfolder=cls.processor)
        whole = of_images(Qwen3VLProcessor, images, words)
        return cls.pipeline_class().from_pretrained(base, processor=whole, **components)

    @classmethod
    def stand_in(cls, name: str) -> Any:
        return Unread() if name == cls.processor else None

    def check(self, config: PolicyConfig) -> None:
        super().check(config)
        if config.guidance_embed is not None:
            what = "none; the transformer does not take it"
            self.refuse("guidance_embed", config.guidance_embed, what)
        if not self.module.config.causal_condition:
            self.refuse("weights", self.base, "those whose causal_condition is true")

    def _take(self, size: tuple[int, int]) -> None:
        super()._take(size)
        # A token is 16 pixels wide; sizes are multiples of two, for the text encoder's places.
        (rows, columns), (high, wide) = self.grid, self.condition_grid
        self.grid, self.condition_grid = (2 * rows, 2 * columns), (2 * high, 2 * wide)
        self.latent_shape = (4 * rows * columns, self.latent_shape[1])

    # ------------------------------------------------------------------------------------- the text

    @property
    def tokenizer(self) -> Any:
        words = getattr(getattr(self.pipe, "processor", None), "tokenizer", None)
        return None if isinstance(words, Unread) else words

    def read(self, text: str, images: list[Tensor]) -> dict[str, Tensor]:
        """words [L, width], what follows the system message: the last layer's states before its
        norm, with places for the images."""
        before, after = self._around(len(images))
        text = self.readable(text, len(images)) or " "  # as the pipeline has it
        given = self._given(self._words.within(before, text, after), images)
        model = self.pipe.text_encoder.model
        norm = model.language_model.norm.register_forward_hook(lambda module, args, out: args[0])
        try:
            states = model(**given).last_hidden_state
        finally:
            norm.remove()
        return {"words": states[0, self.pipe._drop_idx :]}

    def _around(self, images: int) -> tuple[str, str]:
        before, _, after = self.pipe.prompt_template_ti2i.partition("{}")
        more = "".join(" " + ONE.replace("1", str(i)) for i in range(2, images + 1))
        return before.replace(ONE, ONE + more), after

    @cached_property
    def _places(self) -> list[int]:
        """Tokens between what has been read and each of its images."""
        if self.tokenizer is None:
            # By the published vocabulary, where nothing is read.
            return [7] + [6] * (self.most_images - 1)
        before, after = self._around(self.most_images)
        ids = self._words.within(before, "", after)[self.pipe._drop_idx :]
        mark = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        at = [-1, *(i for i, token in enumerate(ids) if token == mark)]
        return [second - first - 1 for first, second in pairwise(at)]

    def text_length(self, text: str) -> int:
        return len(self._words.ids(text))

    def text_room(self, images: int) -> int:
        """The transformer's table has so many positions, of which an image takes its longer
        side's."""
        before, after = self._around(images)
        template = len(self._words.within(before, "", after)) - self.pipe._drop_idx
        return POSITIONS - template - images * max(self.condition_grid)

    def prompt_length(self, said: int, images: int) -> int:
        rows, columns = self.condition_grid
        own = min(self.text_tokens or said, said) + 6  # what ends the instruction
        return own + images * rows * columns // 4 + sum(self._places[:images])

    # ----------------------------------------------------------------------------------- the images

    def to_latents(self, images: Tensor) -> Tensor:
        opaque = torch.cat([images, torch.ones_like(images[:, :1])], 1)
        latents = self.pipe.vae.encode(opaque[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = latent_statistics(self.pipe.vae, latents)
        return tokens((latents - mean) / std)

    def to_pixels(self, latents: Tensor) -> Tensor:
        latents = from_tokens(latents, self.grid).to(self.pipe.vae.dtype)
        mean, std = latent_statistics(self.pipe.vae, latents)
        seen = self.pipe.vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0]
        colours, alpha = seen[:, :3, 0].clamp(-1, 1), (seen[:, 3:, 0] / 2 + 0.5).clamp(0, 1)
        return (colours - 1) * alpha + 1

    # ------------------------------------------------------------------------------ the transformer

    def mu(self, steps: int) -> float | None:
        return linear_mu(self.pipe.scheduler.config, self.latent_shape[0])

    def extend(self, prompt: Prompt, conditions: tuple[Tensor, ...]) -> Prompt:
        """With keys and values [B, N, heads, width] of words and images, block by block, padded as
        the words are."""
        if not prompt:
            return prompt
        rows: list[dict[str, Tensor]] = [{}] * len(prompt[WORDS])
        for at, part in by_length(prompt):
            with self.autocast(at.device):
                images = tuple(c[at].to(self.compute_dtype) for c in conditions)
                cache = self._read(images, part[WORDS].to(self.compute_dtype))
            made: dict[str, Tensor] = {}
            for k, layer in enumerate(cache.layer_caches):
                made |= {f"keys{k}": layer.k, f"values{k}": layer.v}
            for place, row in enumerate(at.tolist() if len(at) < len(rows) else range(len(rows))):
                rows[row] = {name: t[place] for name, t in made.items()}
        kept = {name: [row[name] for row in rows] for name in rows[0]}
        return {**prompt, **{n: pad_sequence(t, batch_first=True) for n, t in kept.items()}}

    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        done, order = [], []
        for at, part in by_length(prompt):
            cache = self._cache()
            for k, layer in enumerate(cache.layer_caches):
                layer.store(part[f"keys{k}"], part[f"values{k}"])
            places = layout(part[WORDS].shape[1], self._gaps(context), self.condition_grid)
            places.image(self.grid)
            mine = self.module.img_in(x[at])
            found = self._blocks(mine, sigma[at], places, len(mine[0]), cache, mode="cached")
            done.append(found)
            order.append(at)
        return torch.cat(done)[torch.cat(order).argsort()] if len(done) > 1 else done[0]

    def _gaps(self, context: EditContext) -> list[int]:
        return self._places[: len(context.conditions)]

    def _read(self, images: tuple[Tensor, ...], words: Tensor) -> Any:
        """The cache of words and images, in their order, before the smallest target there is: what
        stands before it does not see it."""
        module, each = self.module, images[0].shape[1] // SLOT
        gaps = self._places[: len(images)]
        said, pieces, at = module.txt_in(words), [], 0
        for gap, image in zip(gaps, images, strict=True):
            pieces += [said[:, at : at + gap], module.img_in(image)]
            at += gap + each
        target = words.new_zeros(len(words), SLOT, self.latent_shape[1])
        pieces += [said[:, at:], module.img_in(target)]
        places = layout(words.shape[1], gaps, self.condition_grid)
        places.image((2, 2))
        cache = self._cache()
        sigma = torch.zeros(len(words), device=words.device)
        self._blocks(torch.cat(pieces, 1), sigma, places, SLOT, cache, mode="extract")
        return cache

    def _cache(self) -> Any:
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        return QwenImage21KVCache(len(self.module.transformer_blocks))

    def _blocks(
        self, x: Tensor, sigma: Tensor, places: Places, target: int, cache: Any, *, mode: str
    ) -> Tensor:
        """The velocity of the last `target` of these embedded tokens. The stock forward takes the
        layout of the sequence from a mask, whose numbers it fetches from the device; here it is
        known."""
        module = self.module
        count, prefix = x.shape[1], x.shape[1] - target
        rotary = torch.cat(
            [
                table.to(x.device)[torch.tensor(at[-count:], device=x.device)]
                for table, at in zip(module.pos_embed.freqs, places.axes, strict=True)
            ],
            -1,
        )
        times = torch.cat([sigma.to(x.dtype), sigma.new_zeros(1, dtype=x.dtype)])
        time = module.time_text_embed(times, x)
        given = (
            module.modulation(time),
            rotary,
            None,
            torch.arange(count, device=x.device) >= prefix,
        )
        how = (slice(0, prefix), places.segments) if mode == "extract" else (None, None)
        again = torch.is_grad_enabled() and module.gradient_checkpointing
        for k, block in enumerate(module.transformer_blocks):
            rest = (x, *given, cache.get_layer(k), mode, *how, None)
            x = module._gradient_checkpointing_func(block, *rest) if again else block(*rest)
        out: Tensor = module.proj_out(module.norm_out(x, time, given[-1]))
        return out[:, prefix:]


POSITIONS = 8192
"""In the transformer's table, before those that are below 0."""
SLOT = 4
"""Latent tokens in one of the text encoder's places."""


@dataclass
class Places:
    """Of the tokens of a sequence: axes: their positions (frame, row, column). segments: of what
    stands before the target, from and to, and whether it is words."""

    axes: tuple[list[int], list[int], list[int]] = field(default_factory=lambda: ([], [], []))
    segments: list[tuple[int, int, bool]] = field(default_factory=list)
    now: int = 0

    def words(self, count: int) -> None:
        if count:
            first = len(self.axes[0])
            self.segments.append((first, first + count, True))
        for axis in self.axes:
            axis += range(self.now, self.now + count)
        self.now += count

    def image(self, grid: tuple[int, int]) -> None:
        """Rows and columns are counted from its middle."""
        (rows, columns), (frame, row, column) = grid, self.axes
        frame += [self.now] * (rows * columns)
        row += [r - (rows - rows // 2) for r in range(rows) for _ in range(columns)]
        column += [c - (columns - columns // 2) for _ in range(rows) for c in range(columns)]
        self.now += max(grid)


def layout(words: int, gaps: Sequence[int], grid: tuple[int, int]) -> Places:
    """Of so many words, places for images included, and an image of this grid behind each gap."""
    places, left = Places(), words
    for gap in gaps:
        places.words(gap)
        first = len(places.axes[0])
        places.image(grid)
        places.segments.append((first, len(places.axes[0]), False))
        left -= gap + grid[0] * grid[1] // SLOT
    places.words(left)
    return places


def by_length(prompt: Prompt) -> Iterator[tuple[Tensor, Prompt]]:
    """The rows of a batch, int64 [n], that have equally many words, and these without what pads
    them. A target's position follows from the number of words before it, so that a longer
    neighbour would move it."""
    mask = prompt.get(MASK)
    count, most = prompt[WORDS].shape[:2]
    lengths = [most] * count if mask is None else mask.sum(1).tolist()
    for length in sorted(set(lengths)):
        at = torch.tensor([i for i, n in enumerate(lengths) if n == length])
        at = at.to(prompt[WORDS].device)
        mine = {n: t[:, : t.shape[1] - most + length] for n, t in prompt.items() if n != MASK}
        # Keys and values are large: where all go on together, none is copied.
        yield at, mine if len(at) == count else {n: t[at] for n, t in mine.items()}


class Unread:
    """In a processor's place where there is none: the pipeline's constructor asks it about its
    template."""

    @property
    def tokenizer(self) -> Unread:
        return self

    def encode(self, text: str) -> list[int]:
        return [0]

    def apply_chat_template(self, messages: Any, **how: Any) -> list[list[int]]:
        return [[0]]
