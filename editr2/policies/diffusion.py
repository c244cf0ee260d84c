"""Image editors on diffusers' own transformer, autoencoder, text encoders and scheduler settings.

The policy drives the components of a stock pipeline, not the pipeline: what depends on images and
words alone is computed once, in `encode`, `instruct` and `append`, and the denoising loop runs the
transformer and nothing else. Only the transformer trains; autoencoder and text encoders are frozen
and run without gradient.

A model is a subclass of `DiffusionPolicy`, which says what it has to provide.

Legend of shapes: B samples, N latent tokens, D numbers a token, L text tokens, H x W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.errors import ConfigError, DataError, shown
from editr2.policies.attention import try_out
from editr2.policies.base import Velocity, device_of
from editr2.policies.contexts import (
    WORDS,
    AnyEditContext,
    EditContext,
    MixedContext,
    Prompt,
    doubled,
    masked,
    padded,
)
from editr2.policies.encodes import Folder, Kept, Row, digest_of, fingerprint
from editr2.policies.latents import resized
from editr2.policies.pipeline_blueprint import PipelineBlueprint
from editr2.policies.pipelines import PipelineModel, read_pipeline, weight_sources
from editr2.policies.placing import at_work
from editr2.policies.trained import make_ready, save_policy, saved_lora
from editr2.policies.views import Views
from editr2.run.hub import check_model
from editr2.sessions.buckets import nearest, spread

CACHED_PROMPTS = 256
KEPT_BYTES = 1 << 30
"""Of the sources' latent tokens that are kept on the host, and as many of the outputs'. An image of
1024 x 1024 pixels takes 1 or 2 MiB."""
TEXT_BATCH = 8
"""Prompts that go through the text encoders at once: these are as large as the transformer, and so
are activations."""


class DiffusionPolicy(Views, PipelineModel):
    """`Policy`, `ScheduledPolicy` and `SizedPolicy` over the components of a diffusers pipeline.

    A subclass names its pipeline and published weights, and provides

    - `embed`: words (and images, with `text_sees_images`) -> what the transformer reads as text, a
      row a prompt;
    - `to_latents`, `to_pixels`: images in [-1, 1] <-> latent tokens [B, N, D], normalised as the
      transformer sees them;
    - `mu`: the scheduler's shift for a number of steps, None where its settings have no use for
      one;
    - `predict`: the transformer's velocity for the noisy tokens, given conditions and prompt;
    - `text_length`, and `text_limit` or `text_room`, so that longer instructions are refused when
      sessions are opened;
    - `most_images`, when it reads only so many at once;
    - `check`, when it has settings of its own to refuse, and `derive`, when it computes something
      from the conditions;
    - `prompt_length`, when prompts are not padded, and `pipeline_class`, `transformer_class`, when
      they are not of diffusers. `editr2 check` asks the class for everything else, too.

    It finds here the sizes (`grid`, `condition_grid`: rows and columns of latent tokens;
    `text_image_size`: of images as the text encoder reads them, the condition's unless `check`
    changes it), `positions` (their ids), `text_tokens`, `device` and the pipeline's components
    (`pipe`). Rows of words of different lengths are padded with
    zeros at the end and then have a mask. With `policy.buckets` it is copied for every further
    size, where sizes, and what cached properties say, are others and `check` is asked again.
    """

    writes_text = False

    own_renorm: ClassVar[str] = "none"
    """What `policy.renorm` auto stands for."""
    tiles: ClassVar[bool] = True
    """Whether the autoencoder may work in tiles where `policy.vae_tiling` asks for it."""
    negative_prompt: ClassVar[str] = ""
    """Of the unguided branch where the settings name none."""
    position_axes: ClassVar[int] = 3
    text_width_setting: ClassVar[str] = "joint_attention_dim"
    """The transformer's setting that is the width of a text token."""
    pools_words: ClassVar[bool] = False
    """Whether the transformer reads one vector of the prompt, `pooled`, beside its words."""
    most_images: ClassVar[int | None] = None
    """That it reads at once; None: any number."""
    text_limit: ClassVar[int | None] = None
    """Tokens of a prompt that the model reads, as `text_length` counts them; None: any number."""

    def __init__(self, pipe: Any, config: PolicyConfig) -> None:
        """pipe: the diffusers pipeline, on any device. Raises `ConfigError` for settings this model
        cannot follow."""
        self.pipe = pipe
        self.config = config
        self.base = str(pipe.config.get("_name_or_path") or self.hub_id)
        self.module = pipe.transformer
        self.compute_dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.patch = 2 * int(pipe.vae_scale_factor)
        self.text_tokens = config.text_tokens
        self.negative = (
            self.negative_prompt if config.negative_prompt is None else config.negative_prompt
        )
        self.renorm = self.own_renorm if config.renorm == "auto" else config.renorm
        self.sizes = self._sizes(config)
        self._begin_views()
        self._take(nearest(self.sizes, *config.resolution))
        self._prompts = Kept(CACHED_PROMPTS, weigh=lambda row: 1)
        self._sources, self._outputs = Kept(KEPT_BYTES), Kept(KEPT_BYTES)
        self._source_looks: set[bytes] = set()
        self.check(config)
        for size in self.sizes:
            if size != self.image_size:
                self._view(size)  # what it refuses of a size, it refuses now
        if config.negative_prompt is not None:
            for _, problem in self.unreadable([self.negative]):
                raise ConfigError(f"policy.negative_prompt: {problem}")
        for name in ("vae", *self.text_encoders):
            getattr(pipe, name).requires_grad_(False).eval()
        self.module.eval()

    @classmethod
    def from_config(
        cls, config: PolicyConfig, *, trains: bool = True, empty: bool = False
    ) -> DiffusionPolicy:
        """A pipeline's folder, a hub id, or a folder that `save` wrote."""
        adapter, trained, base = weight_sources(config.weights or cls.hub_id, cls.model)
        if adapter is not None:
            saved_lora(config, cls, adapter)  # what is wrong is said before gigabytes are read
        if os.path.isabs(base) and not Path(base).is_dir():
            raise ConfigError(
                f"policy.weights: {base}: no {cls.pipeline} there (accepted: its folder, or a hub "
                f"id)"
            )
        check_model(base, "policy.weights")
        whole = trains and not config.lora_rank
        policy = cls(read_pipeline(cls, config, base, trained, whole=whole, empty=empty), config)
        policy.base = str(trained or base)
        make_ready(policy, adapter, trains)
        return policy

    @classmethod
    def blueprint(cls, config: PolicyConfig) -> PipelineBlueprint:
        return PipelineBlueprint(config, cls)

    def forgets(self, prompts: int) -> bool:
        """Whether so many prompts are more than it remembers."""
        return prompts > CACHED_PROMPTS

    def encodes_again(self, turn: int, images: int) -> bool:
        """Whether so many images that turns from this one on read are more than it remembers."""
        numbers = self.condition_grid[0] * self.condition_grid[1] * self.latent_shape[1]
        return images * numbers * 4 > (self._outputs if turn else self._sources).limit

    @classmethod
    def derives(cls) -> bool:
        """Whether it computes something of its own from condition images and words."""
        own = (cls.derive, cls.extend)
        return own != (DiffusionPolicy.derive, DiffusionPolicy.extend)

    def refuse(self, name: str, given: object, accepted: str) -> None:
        """Raises the `ConfigError` of a setting that this model cannot follow."""
        raise ConfigError(
            f"policy.{name}: {given} (accepted with policy.model {self.model}: {accepted})"
        )

    def _sizes(self, config: PolicyConfig) -> tuple[tuple[int, int], ...]:
        size = self._size("resolution", config.resolution)
        if config.buckets == "auto":
            return spread(size[0] * size[1], self.patch)
        return tuple(self._size("buckets", each) for each in config.buckets) or (size,)

    def _take(self, size: tuple[int, int]) -> None:
        """Sets everything that follows from the size in pixels, but for what `check` changes."""
        condition = self.config.condition_resolution
        self.image_size = size
        self.condition_size = (
            size if condition is None else self._size("condition_resolution", condition)
        )
        self.text_image_size = self.condition_size
        self.grid, self.condition_grid = (
            (height // self.patch, width // self.patch)
            for height, width in (self.image_size, self.condition_size)
        )
        self.latent_shape = (
            self.grid[0] * self.grid[1],
            int(self.pipe.transformer.config.in_channels),
        )

    def _view(self, size: tuple[int, int]) -> DiffusionPolicy:
        view = copy.copy(self)
        for name in [name for name in vars(view) if _is_cached(type(view), name)]:
            del vars(view)[name]  # it may follow from the other size
        view._whole = self
        view._take(size)
        view.check(self.config)
        return view

    def _size(self, name: str, size: Sequence[int]) -> tuple[int, int]:
        height, width = (int(n) for n in size)
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            self.refuse(name, [height, width], f"multiples of {self.patch}")
        return height, width

    def placed(self, trains: bool) -> None:
        if (name := self.config.attention) is not None:
            width = self.module.config.attention_head_dim
            how = {"masks": self.masks, "trains": trains}
            try_out(name, width, self.device, self.compute_dtype, **how)

    # ------------------------------------------------------------------------ what a model provides

    def check(self, config: PolicyConfig) -> None:
        """Refuses settings (`refuse`) that this model or these weights cannot follow."""
        if config.history < 1:
            self.refuse("history", config.history, "at least 1, the image to edit")
        if config.gradient_checkpointing not in ("off", "auto") and not self.recomputes:
            self.refuse(
                "gradient_checkpointing",
                config.gradient_checkpointing,
                "off; its blocks cannot be computed again",
            )
        if config.vae_tiling and not self.tiles:
            self.refuse("vae_tiling", True, "false; its tiles leave seams at every size in use")
        if config.guidance_image != 1:
            self.refuse("guidance_image", config.guidance_image, "1")

    @abstractmethod
    def embed(self, texts: list[str], images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The text encoders' output for each prompt, `words` [L, width] and more; without the batch
        dimension.

        images: uint8 [len(texts), H, W, 3] of each condition image, empty unless
        `text_sees_images`. Called without gradient, the text encoders on `device`.
        """

    def text_length(self, text: str) -> int | None:
        """Tokens of an instruction, as `policy.text_tokens` counts them; None: not known before it
        is read."""
        return None

    def text_room(self, images: int) -> int | None:
        """How many of them the model reads beside so many images."""
        return self.text_limit

    @abstractmethod
    def to_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], in the autoencoder's dtype -> tokens [B, N, D]: the mode
        of the distribution, as the pipelines take it."""

    @abstractmethod
    def to_pixels(self, latents: Tensor) -> Tensor:
        """Tokens [B, N, D] of the target's size -> images [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def mu(self, steps: int) -> float | None:
        """The scheduler's shift, None where its settings have no use for one."""

    @abstractmethod
    def predict(self, x: Tensor, sigma: Tensor, context: EditContext, prompt: Prompt) -> Tensor:
        """The velocity of the noisy tokens x [B, N, D] at sigma [B] (float32), behind
        `context.conditions` and
        `prompt` (which is the negative one for the unguided branch)."""

    def extend(self, prompt: Prompt, conditions: tuple[Tensor, ...]) -> Prompt:
        """The prompt with what a model computes once of it and its images by weights that may
        train; empty where it is."""
        return prompt

    def derive(self, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ()

    def prompt_length(self, said: int, images: int) -> int:
        """Tokens of a prompt as the transformer sees it, for `check`. said: tokens of the
        instruction; images: that the turn sees. By default what FLUX's pipelines pad to."""
        return self.text_tokens or 512

    def blank(self, batch: int, text: int, images: int = 1, *, padded: bool = False) -> EditContext:
        """A context that says nothing: zeros in place of what the encoders give. text: tokens of
        the prompt. padded: as prompts of different lengths are."""
        sizes, device = self.module.config, self.device
        prompt = {
            WORDS: torch.zeros(
                batch,
                text,
                sizes[self.text_width_setting],
                dtype=self.compute_dtype,
                device=device,
            )
        }
        if self.pools_words:
            prompt["pooled"] = prompt[WORDS].new_zeros(batch, sizes.pooled_projection_dim)
        rows, columns = self.condition_grid
        conditions = tuple(
            torch.zeros(batch, rows * columns, self.latent_shape[1], device=device)
            for _ in range(images)
        )
        prompt = dict(masked(prompt)) if padded else prompt
        negative = (
            {name: t.clone() for name, t in prompt.items()} if self.config.guidance != 1 else {}
        )
        said, other = self.extend(prompt, conditions), self.extend(negative, conditions)
        return EditContext(conditions, (), said, other, self.derive(conditions))

    def idle(self) -> Tensor:
        """The transformer's answer about one token of nothing: the smallest forward there is."""
        small = copy.copy(self)
        small.grid = small.condition_grid = (1, 1)
        context = small.blank(1, 1)
        x = context.conditions[0].to(self.compute_dtype)
        # Asked for inside of another forward's autocast, whose cache must not keep casts of weights
        # without a graph (torch 2.9 would hand them to that forward).
        with self.autocast(x.device, cache=False):
            return small.predict(x, x.new_ones(1, dtype=torch.float32), context, context.prompt)

    # --------------------------------------------------------------------------------- the protocol

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def tokenizer(self) -> Any:
        """Of the instructions, where there is one."""
        return getattr(self.pipe, "tokenizer", None)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """By the pipeline's names."""
        return {"transformer": self.module} | {
            name: getattr(self.pipe, name) for name in ("vae", *self.text_encoders)
        }

    @property
    def most_references(self) -> int | None:
        """As `ReferringPolicy`: of the images that it reads, what a session's own leave."""
        if self.most_images is None:
            return None
        return max(0, self.most_images - self.images_at(self.config.history))

    def encode(self, images: np.ndarray, references: Sequence[np.ndarray] = ()) -> EditContext:
        return self._with_conditions(images, None, references)

    def append(self, context: AnyEditContext, images: np.ndarray) -> EditContext:
        """The output is the image to edit next; of what stood there before, the settings say what
        is kept."""
        if isinstance(context, MixedContext):
            raise TypeError(
                "context: joined of several turns (accepted: of one turn; append before joining)"
            )
        return self._with_conditions(images, context)

    def _with_conditions(
        self,
        images: np.ndarray,
        earlier: EditContext | None,
        references: Sequence[np.ndarray] = (),
    ) -> EditContext:
        """references: of a session that begins."""
        conditions: tuple[Tensor, ...] = ()
        looks: tuple[Tensor, ...] = ()
        for each in (images, *references):
            if each.shape[1:3] != self.image_size:
                raise DataError(
                    f"images: {each.shape[1]} x {each.shape[2]} px (accepted: {self.image_size})"
                )
            conditions = (*conditions, self._latents_of(each, source=earlier is None))
            if self.text_sees_images:
                looks = (*looks, torch.from_numpy(resized(each, self.text_image_size)))
        count = len(references)
        if earlier is None:
            self._source_looks.update(digest_of(look.numpy()) for t in looks for look in t)
        else:
            count = earlier.references
            conditions = self._remembered((*conditions, *earlier.conditions), count)
            looks = self._remembered((*looks, *earlier.images), count)
        derived = self.derive(conditions)
        return EditContext(conditions, looks, derived=derived, references=count)

    def _latents_of(self, images: np.ndarray, *, source: bool) -> Tensor:
        """float32 [B, N, D]. Every distinct image goes through the autoencoder once, and not again
        while it is kept: training starts from what the rollout encoded, and sources come back every
        epoch. Outputs have a place of their own, where they do not drive sources out."""
        self._open_cache()
        seen = resized(images, self.condition_size)

        def encoded(at: list[int]) -> list[Row]:
            with self._at_work("vae"), torch.no_grad():
                pixels = torch.from_numpy(seen[at]).to(self.device).permute(0, 3, 1, 2)
                pixels = (pixels.float() / 255 * 2 - 1).to(self.pipe.vae.dtype)
                return [{"latents": row} for row in self.to_latents(pixels).float()]

        kept = self._sources if source else self._outputs
        rows = kept.rows([digest_of(image) for image in seen], encoded, lambda i: source)
        return torch.stack([row["latents"] for row in rows]).to(self.device)

    def _open_cache(self) -> None:
        """`policy.cache`, before the first encode: what encoders are made of is then looked up."""
        if self.config.cache is None or self._prompts.folder is not None:
            return
        path, pipe = Path(self.config.cache).expanduser(), self.pipe
        how = {"model": self.model, "dtype": self.config.dtype}
        made = fingerprint({"vae": pipe.vae}, tiles=self.config.vae_tiling, **how)
        self._sources.folder = Folder(path, "images", made)
        parts = {"tokenizer": self.tokenizer} | {  # a processor is what it does with images
            name: getattr(part, "image_processor", part)
            for name, part in pipe.components.items()
            if name in self.text_encoders or name.startswith("tokenizer") or "processor" in name
        }
        # Templates of instructions are the pipeline's attributes.
        plain = {n: v for n, v in vars(pipe).items() if isinstance(v, (str, int)) and n[0] != "_"}
        made = fingerprint(parts, text_tokens=self.text_tokens, pipe=plain, **how)
        self._prompts.folder = Folder(path, "texts", made)

    def images_at(self, turn: int) -> int:
        """How many images a turn (from 0) sees, as `_remembered` keeps them."""
        recent = min(turn + 1, self.config.history)
        return recent + (self.config.keep_source and turn + 1 > recent)

    def unreadable(
        self, instructions: Sequence[str], references: int = 0
    ) -> Iterator[tuple[int, str]]:
        """As `ReadingPolicy.unreadable`: instructions that are too long; without its tokenizer
        nobody knows."""
        if self.tokenizer is None:
            return
        for turn, text in enumerate(instructions):
            if problem := self._too_long(text, self.images_at(turn) + references):
                yield turn, problem

    def _too_long(self, text: str, images: int) -> str | None:
        limits = {
            "policy.text_tokens": self.text_tokens,
            f"all that {self.model} reads": self.text_room(images),
        }
        named = {name: limit for name, limit in limits.items() if limit is not None}
        length = self.text_length(text) if named else None
        if length is None or length <= (least := min(named.values())):
            return None
        (name, *_) = (name for name, limit in named.items() if limit == least)
        return f"{length} tokens (accepted: up to {least}, {name})"

    def readable(self, text: str, images: int = 1) -> str:
        """The text. Raises `DataError` where it is too long: none is cut short."""
        if problem := self._too_long(text, images):
            raise DataError(f"text {shown(repr(text))}: {problem}")
        return text

    def _remembered(self, images: tuple[Tensor, ...], references: int) -> tuple[Tensor, ...]:
        """What a turn sees of a session's images, the newest first, and then its references, the
        last of these images; of earlier ones, what the turn before saw."""
        own = images[: len(images) - references]
        recent = own[: self.config.history]
        source = own[-1:] if self.config.keep_source and len(own) > len(recent) else ()
        return (*recent, *source, *images[len(own) :])

    def instruct(self, context: AnyEditContext, instructions: Sequence[str]) -> EditContext:
        if isinstance(context, MixedContext):
            raise TypeError(
                "context: joined of several turns (accepted: of one turn; instruct before joining)"
            )
        negative = (
            self._prompts_of([self.negative] * len(instructions), context)
            if self.config.guidance != 1
            else {}
        )
        prompt = self._prompts_of(instructions, context)
        return dataclasses.replace(context, prompt=prompt, negative=negative)

    def _prompts_of(self, texts: Sequence[str], context: EditContext) -> Prompt:
        """Every distinct prompt (and what it is about) goes through the text encoders once, and not
        again while it is among the last `CACHED_PROMPTS`: training asks for the rollout's, and
        sessions come back every epoch."""
        self._open_cache()
        looks = [[digest_of(t[i].numpy()) for t in context.images] for i in range(len(texts))]
        keys = [digest_of(text, *seen) for text, seen in zip(texts, looks, strict=True)]

        def read(missing: list[int]) -> list[Row]:
            rows: list[Row] = []
            with self._at_work(*self.text_encoders), torch.no_grad():
                for at in (missing[i : i + TEXT_BATCH] for i in range(0, len(missing), TEXT_BATCH)):
                    rows += self.embed([texts[i] for i in at], [t[at] for t in context.images])
            return rows

        # Words about an output are as little for other runs as the output is.
        rows = self._prompts.rows(keys, read, lambda i: self._source_looks.issuperset(looks[i]))
        batch = padded([{n: t[None] for n, t in row.items()} for row in rows])
        prompt = {n: t.to(self.device) for n, t in batch.items()}
        return self.extend(prompt, context.conditions)

    def velocity(self, x: Tensor, sigma: Tensor, context: AnyEditContext) -> Velocity:
        """In the computing dtype. Under guidance both branches, for the kernels to combine."""
        if isinstance(context, MixedContext):
            return self._mixed_velocity(x, sigma, context)
        with self.autocast(x.device):
            x = x.to(self.compute_dtype)
            if context.negative and self.config.branches == "together":
                both, x, sigma = doubled(context), torch.cat([x, x]), torch.cat([sigma, sigma])
                v, dropped = self.predict(x, sigma, both, both.prompt).chunk(2)
            else:
                v = self.predict(x, sigma, context, context.prompt)
                if not context.negative:
                    return Velocity(v)
                dropped = self.predict(x, sigma, context, context.negative)
        return Velocity(
            v, {"v_uncond": dropped, "guidance": self.config.guidance, "renorm": self.renorm}
        )

    def _mixed_velocity(self, x: Tensor, sigma: Tensor, context: MixedContext) -> Velocity:
        order = context.order.to(x.device)
        at = order.argsort()
        done, first = [], 0
        for part in context.parts:
            mine = at[first : first + len(part)]
            done.append(self.velocity(x[mine], sigma[mine], part))
            first += len(part)
        v, guidance = torch.cat([d.v for d in done])[order], dict(done[0].guidance)
        if guidance:
            guidance["v_uncond"] = torch.cat([d.guidance["v_uncond"] for d in done])[order]
        return Velocity(v, guidance)

    def select(self, context: AnyEditContext, index: Tensor) -> AnyEditContext:
        return context.select(index)

    def join(self, contexts: Sequence[AnyEditContext]) -> AnyEditContext:
        """One batch where all samples are of one kind, else a batch of each kind beside the order
        of the samples."""
        given = [MixedContext.of(context) for context in contexts]
        pieces = [piece for context in given for piece in context.parts]
        alike: dict[Any, list[int]] = {}
        for i, piece in enumerate(pieces):
            alike.setdefault(piece.kind, []).append(i)
        batches = tuple(EditContext.join([pieces[i] for i in same]) for same in alike.values())
        if len(batches) == 1:  # of which every part has its samples in order
            return batches[0]
        starts, first = {}, 0  # of every piece, in the batches laid end to end
        for i in itertools.chain.from_iterable(alike.values()):
            starts[i] = first
            first += len(pieces[i])
        order, numbers = [], itertools.count()
        for context in given:
            # Its own order counts through its own parts; this is where they lie now.
            places = [starts[next(numbers)] + torch.arange(len(part)) for part in context.parts]
            order.append(torch.cat(places)[context.order])
        return MixedContext(batches, torch.cat(order))

    def pixels(self, latents: Tensor) -> Tensor:
        with self._at_work("vae"), torch.no_grad():
            return self.to_pixels(latents.to(self.device)).permute(0, 2, 3, 1)

    def sigmas(self, steps: int) -> list[float]:
        """The pipeline's own: evenly spaced, shifted by the scheduler's settings and the target's
        token count."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        mu = {} if (mu := self.mu(steps)) is None else {"mu": mu}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **mu)
        return [float(s) for s in scheduler.sigmas.double()]

    def save(self, folder: Path) -> None:
        """What `load_policy` reads as `policy.weights`: the LoRA as stock diffusers loads it, or
        the transformer."""
        save_policy(self, folder)

    # ------------------------------------------------------------------------------------ the tools

    def positions(self, place: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Ids of an image's tokens, float32 [N, position_axes]: its place among the images, row,
        column, zeros."""
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
        ids = torch.zeros(*grid, self.position_axes, device=device)
        ids[..., 0], ids[..., 1], ids[..., 2] = place, rows[:, None], columns
        return ids.flatten(0, 1)

    def autocast(self, device: torch.device, *, cache: bool = True) -> torch.autocast:
        """Around the transformer, whose trained weights are float32 whatever it computes in. cache:
        of their casts."""
        on = self.compute_dtype != torch.float32
        return torch.autocast(device.type, self.compute_dtype, enabled=on, cache_enabled=cache)

    def _at_work(self, *names: str) -> AbstractContextManager[None]:
        """The pipeline's components of these names on the transformer's device, with
        `policy.offload` for as long as they work."""
        parts = [getattr(self.pipe, name) for name in names]
        return at_work(parts, self.device, lent=self.config.offload)


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), cached_property)
