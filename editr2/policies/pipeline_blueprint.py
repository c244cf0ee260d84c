"""An editor on diffusers without its weights: a real policy over a real pipeline whose components
hold no data.

Modules are built with one block of each kind, and once more with one more of each, which gives the
cost of the full depth exactly; autoencoders are whole. Text encoders are counted by their
parameters.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.adapters import LORA_FILE, TRANSFORMER, adapter_weights, check_file
from editr2.policies.blueprint import (
    SMALL_BATCH,
    Reading,
    Size,
    Work,
    adapters_without_data,
    backward,
    simulated,
    velocity_passes,
)
from editr2.policies.fp8 import quantize_linears
from editr2.policies.libraries import no_bars
from editr2.policies.lora_files import start_of
from editr2.policies.pipelines import Parts, PipelineModel, load_rest, part_class, weight_sources
from editr2.policies.tensor_files import check_shapes, read_header, read_json, reading
from editr2.policies.trained import put_adapter, ready_autoencoder, saved_lora
from editr2.sessions import Session

SHALLOW = 1
"""Blocks of each kind that are measured. The first hands on no gradient; what one more adds is any
later one's."""
TOKENS_A_WORD = 1.4
"""Of English; it matters where nothing is padded."""
TEMPLATE = 64
"""Tokens that a text encoder reads around an instruction."""


class PipelineBlueprint:
    """`Blueprint` of a `DiffusionPolicy`."""

    sight = 0

    def __init__(self, config: PolicyConfig, kind: type[PipelineModel]) -> None:
        """kind: the class of the policy, which also has to be one that runs."""
        self.config, self.kind = config, kind
        adapter, trained, base = weight_sources(config.weights or kind.hub_id, kind.model)
        if adapter is not None:
            saved_lora(config, kind, adapter)
        self.parts = known_parts(config, kind, base)
        self.folder = Path(base) if Path(base).is_dir() else None
        self.transformer = kind.transformer_class()
        settings = inspect.signature(self.transformer.__init__).parameters
        with reading(f"policy.weights: {config.weights or base}: no {kind.pipeline}"):
            self._check_weights(adapter, trained)
            self.depth = {
                name: int(self.parts.transformer.get(name, p.default))
                for name, p in settings.items()
                if name.startswith("num_") and name.endswith("layers")
            }
            self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
            self.policy = self._policy({name: min(n, SHALLOW) for name, n in self.depth.items()})
        item = torch.empty((), dtype=self.dtype).element_size()
        self.text = sum(self.parts.text.values()) * item
        self.vae = sum(p.numel() for p in self.policy.pipe.vae.parameters()) * item
        self.prompt_per_output = kind.text_sees_images
        self.said, self.references = 16, 0

    # ------------------------------------------------------------------------ what a blueprint says

    @cached_property
    def deeper(self) -> Sequence[tuple[Any, int]]:
        shallow = {name: min(n, SHALLOW) for name, n in self.depth.items()}
        return [
            (self._policy({**shallow, name: SHALLOW + 1}), n - SHALLOW)
            for name, n in self.depth.items()
            if n > SHALLOW
        ]

    @property
    def blocks(self) -> int:
        return sum(self.depth.values())

    def at(self, size: tuple[int, int]) -> PipelineBlueprint:
        """The same of the policy at one of its sizes."""
        view = copy.copy(self)
        view.policy = self.policy.at(size)
        vars(view)["deeper"] = [(policy.at(size), more) for policy, more in self.deeper]
        return view

    def see(self, sessions: Sequence[Session]) -> None:
        words = [len(turn.instruction.split()) for s in sessions for turn in s.turns]
        self.said = round(TOKENS_A_WORD * sum(words) / len(words))
        self.references = max(len(s.references) for s in sessions)

    def read_again(self, prompts: int) -> bool:
        forgets: bool = self.policy.forgets(prompts)
        return forgets

    def encodes_again(self, turn: int, images: int) -> bool:
        again: bool = self.policy.encodes_again(turn, images)
        return again

    def work(self, step: str, batch: int, turn: int, checkpointing: bool) -> list[Work | Reading]:
        if step == "instruct":
            # The negative prompt is read once, unless it stands beside images of its own.
            twice = self.config.guidance != 1 and self.prompt_per_output
            tokens = (self.text_length(turn) + TEMPLATE) * (2 if twice else 1)
            return [Reading(self.dtype, sum(self.parts.text.values()), tokens, batch)]
        if step in ("encode", "decode"):
            run = self._to_latents if step == "encode" else self._to_pixels
            each = 1 + self.references * (step == "encode" and turn == 0)
            images = Work(step, run, times=batch * each, deep=False)  # the policy slices batches
            return [images, *self._derived(batch, turn)] if step == "encode" else [images]
        if step == "derive":
            return self._derived(batch, turn)
        trains = step == "train"
        again = trains and checkpointing and self.kind.recomputes
        key, sizes = (step, self._seen(turn)), (Size(batch, SMALL_BATCH),)
        prepare = self._forward(self._seen(turn), trains)
        return [Work(key, prepare, sizes, trains=trains, checkpointing=again)]

    def _derived(self, batch: int, turn: int) -> list[Work | Reading]:
        return [self._held(batch, turn)] if self.policy.derives() else []

    def held(self, batch: int, turn: int) -> Work:
        return self._held(batch, turn)

    def branches(self, batch: int, turn: int) -> Mapping[str, int]:
        return {}

    def passes(self, step: str, apart: bool) -> int:
        return velocity_passes(step, apart)

    def _held(self, batch: int, turn: int) -> Work:
        seen = self._seen(turn)

        def prepare(policy: Any, rows: int) -> Callable[[], Any]:
            return lambda: self.context(policy, rows, seen)

        return Work(("context", seen), prepare, (Size(batch, SMALL_BATCH),))

    def _seen(self, turn: int) -> int:
        """The first turn that sees as much as this one."""
        return min(turn, self.config.history - 1 + self.config.keep_source)

    def text_length(self, turn: int) -> int:
        """Tokens of an instruction as the transformer sees it."""
        length: int = self.policy.prompt_length(self.said, self._images(turn))
        return length

    def _images(self, turn: int) -> int:
        """That a turn sees, where sessions have as many references as any of them."""
        own: int = self.policy.images_at(turn)
        return own + self.references

    def context(self, policy: Any, batch: int, turn: int) -> Any:
        """A context of the sizes that a batch has at this turn."""
        images, text = self._images(turn), self.text_length(turn)
        return policy.blank(batch, text, images, padded=self.kind.masks and batch > 1)

    def _to_latents(self, policy: Any) -> Callable[[], Tensor]:
        image = torch.empty(1, 3, *policy.condition_size, dtype=self.dtype)
        return lambda: policy.to_latents(image)

    def _to_pixels(self, policy: Any) -> Callable[[], Tensor]:
        latents = torch.empty(1, *policy.latent_shape)
        return lambda: policy.to_pixels(latents)

    def _forward(self, turn: int, trains: bool) -> Callable[..., Callable[[], Any]]:
        def prepare(policy: Any, rows: int) -> Callable[[], Any]:
            context = self.context(policy, rows, turn)
            x, sigma = torch.empty(rows, *policy.latent_shape), torch.empty(rows)
            if trains:
                return lambda: backward(policy.velocity(x, sigma, context))
            return lambda: policy.velocity(x, sigma, context)

        return prepare

    # ------------------------------------------------------------------------------ how it is built

    def _policy(self, depth: Mapping[str, int]) -> Any:
        """The policy without data, so deep; raises the `ConfigError` of settings that it
        refuses."""
        with simulated(self.dtype):
            vae = self.autoencoder(**self.parts.vae).requires_grad_(False)
        # Trained weights are float32 whatever the base is, as `load_policy` has them.
        with simulated(self.dtype if self.config.lora_rank else torch.float32):
            module = self.transformer(**{**self.parts.transformer, **depth})
        policy = self.assembled(vae, module)
        if self.config.lora_rank:
            module.requires_grad_(False)
            with adapters_without_data(module, self.dtype):
                put_adapter(module, self.config, self.kind, None)
        if self.config.quantize == "fp8":
            with simulated(self.dtype):
                # As on a device that has such products; on others they count as bfloat16's.
                for layer in quantize_linears(module, self.kind.lora_targets):
                    layer.in_float8 = True
        return policy

    def _check_weights(self, adapter: Path | None, trained: Path | None) -> None:
        """Raises the `UserError` of a transformer's or a LoRA's files that are not all of what they
        should hold, or not for each other; only their headers are read."""
        folder = trained or self.folder
        given = self.config.lora_weights is not None
        if adapter is None and folder is None and not given:
            return
        with torch.device("meta"):
            module = self.transformer(**self.parts.transformer)
        if folder is not None and "quantization_config" not in self.parts.transformer:
            files = list((folder / TRANSFORMER).glob("diffusion_pytorch_model*.*"))
            shapes: dict[str, tuple[int, ...]] = {}
            for path in files:
                if re.fullmatch(r"\w+(-\d+-of-\d+)?\.safetensors", path.name):  # no variant's
                    shapes |= read_header(path)[0]
            if shapes or not any(
                path.suffix == ".bin" for path in files
            ):  # torch's own format has no header
                needed = {name: tuple(t.shape) for name, t in module.state_dict().items()}
                check_shapes(folder / TRANSFORMER, shapes, needed, "its config.json")
        if adapter is not None:
            lora = put_adapter(module, self.config, self.kind, adapter)
            assert lora is not None  # the folder has one
            needed = {name: tuple(p.shape) for name, p in adapter_weights(module).items()}
            check_file(adapter / LORA_FILE, lora.rank, needed)
        if start := start_of(self.config, module, self.kind.lora_targets):
            put_adapter(module, self.config, self.kind, None, start)
            start.fill(module)

    @cached_property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.kind.pipeline_class().__init__).parameters

    @property
    def autoencoder(self) -> Any:
        """The class of the pipeline's autoencoder."""
        if self.folder is None:
            return self._arguments["vae"].annotation
        path = self.folder / "model_index.json"
        return part_class(read_json(path), "vae", f"policy.weights: {path}")

    def assembled(self, vae: nn.Module, transformer: nn.Module) -> Any:
        """The real policy over a real pipeline of these, whose text encoders hold no data."""
        pipe = self._pipeline
        settings = {name: value for name, value in pipe.config.items() if name in self._arguments}
        given = {**settings, **pipe.components, "vae": vae, "transformer": transformer}
        make: Any = self.kind
        policy = make(type(pipe)(**given), self.config)  # whose constructor may change the parts
        ready_autoencoder(policy)
        return policy

    @cached_property
    def _pipeline(self) -> Any:
        """As the model's class loads it from its folder, where there is one: what is not weights is
        read. A pipeline known here by name alone is put together of what has data."""
        import diffusers

        with simulated(self.dtype):
            vae = self.autoencoder(**self.parts.vae)
        with torch.device("meta"):
            transformer = self.transformer(**self.parts.transformer)
        if self.folder is not None:
            texts = {
                name: text_encoder(self.folder / name / "config.json")
                for name in self.kind.text_encoders
            }
            parts = {"vae": vae, "transformer": transformer, **texts}
            where = f"policy.weights: {self.folder}: no {self.kind.pipeline}"
            with no_bars():
                return load_rest(self.kind, str(self.folder), parts, where)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**self.parts.scheduler)
        given: dict[str, Any] = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
        for name, argument in self._arguments.items():
            if name not in given and name != "self" and argument.default is inspect.Parameter.empty:
                text = name in self.kind.text_encoders
                given[name] = nn.Identity() if text else self.kind.stand_in(name)
        return self.kind.pipeline_class()(**given, **self.parts.pipeline)


def known_parts(config: PolicyConfig, kind: type[PipelineModel], base: str) -> Parts:
    """Of a hub id that the class knows, or of a pipeline's folder."""
    if base in kind.published:
        return kind.published[base]
    folder = Path(base)
    if not folder.is_dir():
        known = ", ".join(["a folder of its pipeline", *kind.published])
        raise ConfigError(
            f"policy.weights: {base!r} is no folder, and `check` downloads nothing (accepted with "
            f"policy.model {kind.model}: {known})"
        )

    def read(name: str) -> dict[str, Any]:
        if not (folder / name).is_file():
            raise ConfigError(
                f"policy.weights: {folder}: no {name} (accepted: a pipeline's folder)"
            )
        return {k: v for k, v in read_json(folder / name).items() if not k.startswith("_")}

    return Parts(
        read("transformer/config.json"),
        read("vae/config.json"),
        read("scheduler/scheduler_config.json"),
        {
            path.parent.name: sum(p.numel() for p in text_encoder(path).parameters())
            for path in sorted(folder.glob("text_encoder*/config.json"))
        },
        {k: v for k, v in read("model_index.json").items() if not isinstance(v, list)},
    )


def text_encoder(path: Path) -> nn.Module:
    """What a transformers configuration describes, without data."""
    import transformers

    with reading(f"policy.weights: {path}"), torch.device("meta"):
        (name,) = read_json(path)["architectures"]
        kind = getattr(transformers, name)
        return kind(kind.config_class.from_json_file(str(path)))
