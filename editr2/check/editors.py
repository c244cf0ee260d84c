"""Every editor without its weights: the policy's own code over fake tensors, measured step by step.

The modules are built at two blocks of each kind and measured again with one more, which gives the
cost of the full depth exactly (`at_depth`); autoencoders are measured whole. Text encoders are
counted by their parameters.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from editr2.check.meter import Cost, Meter, at_depth, simulated
from editr2.check.published import PUBLISHED, Parts
from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.adapters import LORA_FILE, TRANSFORMER, adapter_weights, check_file
from editr2.policies.load import load_rest, ready_autoencoder, unified_guidance
from editr2.policies.tensor_files import check_shapes, read_header, read_json, reading
from editr2.policies.unified.model import Branch, Context, UnifiedModel
from editr2.policies.unified.policy import EMBEDDED, GuidedContext, UnifiedPolicy, read_parts
from editr2.policies.weights import add_lora
from editr2.rl.sampler import Schedule
from editr2.sessions import Session

if TYPE_CHECKING:
    from editr2.policies.diffusion import DiffusionPolicy

SHALLOW = 1
"""Blocks of each kind that are measured. The first hands on no gradient; what one more adds is any
later one's."""
SMALL_BATCH = 2
"""Samples of the smaller of two measured batches; one sample is spared some copies."""
FOUR_BITS = 0.5 + 4 / 64
"""Bytes of a 4-bit weight: half a byte and its share of a float32 scale for every 64."""


@dataclass(frozen=True)
class Sizes:
    """parameters, trainable: numbers of them. weights: bytes of what is frozen; block, outside: of
    it in the largest of the repeated blocks, and in none of them. trained: bytes of what trains.
    dequantized: bytes of the largest layer's weights while it is used (4-bit). text, vae: bytes of
    the text encoders and the autoencoder. targets: adapted layers by their name in a block."""

    parameters: int
    trainable: int
    weights: int
    block: int
    outside: int
    trained: int
    dequantized: int
    text: int
    vae: int
    targets: Mapping[str, int]


class Editor(Protocol):
    """What the estimate asks. Turns count from 0.

    own: the noise schedule, None where the policy has none. cannot_pack: the policy's name, where
    it has no packed replay. writes_text: whether intents are written. prompt_per_output: whether
    siblings' instructions are read apart.
    """

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def own(self) -> Schedule | None: ...
    @property
    def cannot_pack(self) -> str | None: ...
    @property
    def writes_text(self) -> bool: ...
    @property
    def prompt_per_output(self) -> bool: ...

    def see(self, sessions: Sequence[Session]) -> None:
        """Instructions are as long as those of these sessions from here on."""

    def sizes(self) -> Sizes: ...

    def read_again(self, prompts: int) -> bool:
        """Whether training reads the `prompts` instructions of an iteration again."""

    def carried(self, step: str) -> int:
        """Bytes of weights that a call of the step brings to the device first."""

    def held(self, batch: int, turn: int) -> int:
        """Bytes of the context of a batch at a turn, behind its instruction."""

    def cost(self, step: str, batch: int, turn: int, checkpointing: bool | None = None) -> Cost:
        """Of encode, instruct, intend, velocity, train (forward and backward of velocity), answer
        (the same of an intent) or decode; checkpointing: in place of the configured one."""


def open_editor(config: PolicyConfig) -> Editor:
    """Raises `ConfigError` (or `CheckpointError`) for settings or a folder that the policy would
    refuse."""
    return UnifiedEditor(config) if config.model == "unified" else DiffusionEditor(config)


def _affine(measure: Callable[[int], Cost], at: int, first: int) -> Cost:
    """A cost at some batch (or context length), from two small ones: it is a constant and something
    for each more."""
    if at <= first + 1:
        return measure(at)
    return Cost(**at_depth([asdict(measure(first)), asdict(measure(first + 1))], [at - first]))


def _backward(outputs: Sequence[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(v) for v in outputs])


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _module_sizes(module: nn.Module, four_bits: bool) -> dict[str, Any]:
    """The fields of `Sizes` that the module alone decides."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    trained = _trainable(module)
    linear = (
        {id(m.weight): m for m in module.modules() if isinstance(m, nn.Linear)} if four_bits else {}
    )

    def size(parameters: Iterable[nn.Parameter]) -> float:
        return sum(
            p.numel() * FOUR_BITS if id(p) in linear else p.numel() * p.element_size()
            for p in parameters
        )

    repeated = getattr(
        module, "_repeated_blocks", ()
    )  # diffusers' names, by which `policies.sharding` finds them
    blocks = [
        size(p for p in part.parameters() if not p.requires_grad)
        for part in module.modules()
        if type(part).__name__ in repeated
    ]
    # "transformer_blocks.7.attn.to_q" counts as "attn.to_q".
    adapted = Counter(
        re.sub(r"^.*?\.\d+\.", "", n) for n, m in module.named_modules() if hasattr(m, "lora_A")
    )
    return {
        "parameters": sum(p.numel() for p in (*frozen, *trained)),
        "trainable": sum(p.numel() for p in trained),
        "weights": size(frozen),
        "block": max(blocks, default=0),
        "outside": size(frozen) - sum(blocks),
        "trained": sum(p.numel() * p.element_size() for p in trained),
        "dequantized": max((2 * p.numel() for p in frozen if id(p) in linear), default=0),
        "targets": dict(adapted),
    }


# ---------------------------------------------------------------------------------------- diffusion


def _parts(config: PolicyConfig, kind: type[DiffusionPolicy], base: str) -> Parts:
    """Of a hub id that is known here, or of a pipeline's folder."""
    if base in PUBLISHED and PUBLISHED[base].of == kind.pipeline:
        return PUBLISHED[base]
    folder = Path(base)
    if not folder.is_dir():
        known = [name for name, parts in PUBLISHED.items() if parts.of == kind.pipeline]
        raise ConfigError(
            f"policy.weights: {base!r} is no folder, and `check` downloads nothing (accepted with "
            f"policy.model {kind.model}: {', '.join(['a folder of its pipeline', *known])})"
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
            path.parent.name: sum(p.numel() for p in _text_encoder(path).parameters())
            for path in sorted(folder.glob("text_encoder*/config.json"))
        },
        {k: v for k, v in read("model_index.json").items() if not isinstance(v, list)},
    )


def _text_encoder(path: Path) -> nn.Module:
    """What a transformers configuration describes, without data."""
    import transformers

    with reading(f"policy.weights: {path}"), torch.device("meta"):
        (name,) = read_json(path)["architectures"]
        kind = getattr(transformers, name)
        return kind(kind.config_class.from_json_file(str(path)))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without diffusers' progress bars, for what takes no time."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def adapters_without_data(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Adapters put on a simulated module inside: on meta, where peft does not move them, which fake
    tensors do not bear; afterwards they are simulated, too, in float32. dtype: of the module."""
    with simulated(dtype), torch.device("meta"):
        yield
    with simulated(torch.float32):
        for layer in [
            m for name, m in module.named_modules() if ".lora_" in name and hasattr(m, "weight")
        ]:
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape))


class DiffusionEditor:
    """`Editor` over a `DiffusionPolicy` whose components hold no data."""

    writes_text = False

    def __init__(self, config: PolicyConfig, kind: type[DiffusionPolicy] | None = None) -> None:
        """kind: the model's class, in place of the one that `policy.model` names."""
        from editr2.policies.load import policy_class, saved_lora, weight_sources

        self.config = config
        self.kind = kind or policy_class(config.model)
        adapter, trained, base = weight_sources(config.weights or self.kind.published, config.model)
        if adapter is not None:
            saved_lora(config, self.kind, adapter)
        self.parts = _parts(config, self.kind, base)
        self.folder = Path(base) if Path(base).is_dir() else None
        self.transformer = self.kind.transformer_class()
        settings = inspect.signature(self.transformer.__init__).parameters
        with reading(f"policy.weights: {config.weights or base}: no {self.kind.pipeline}"):
            self._check_weights(adapter, trained)
            self.depth = {
                name: int(self.parts.transformer.get(name, p.default))
                for name, p in settings.items()
                if name.startswith("num_") and name.endswith("layers")
            }
            self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
            self.policy = self._policy({name: min(n, SHALLOW) for name, n in self.depth.items()})
        self.image_size, self.latent_shape = self.policy.image_size, self.policy.latent_shape
        self.own, self.cannot_pack = self.policy.sigmas, self.kind.__name__
        self.prompt_per_output = self.kind.text_sees_images
        self._found: dict[tuple, Cost] = {}
        self.said = 16

    def see(self, sessions: Sequence[Session]) -> None:
        words = [len(turn.instruction.split()) for s in sessions for turn in s.turns]
        self.said = round(
            1.4 * sum(words) / len(words)
        )  # tokens of English; it matters where nothing is padded

    def unreadable(self, instructions: Sequence[str]) -> Iterable[tuple[int, str]]:
        """As the policy's, by the tokenizers in the weights' folder; of a published id they are not
        here."""
        return self.policy.unreadable(instructions)

    def _policy(self, depth: Mapping[str, int]) -> Any:
        """The policy without data, so deep; raises the `ConfigError` of settings that it
        refuses."""
        from editr2.policies.load import put_adapter

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
        return policy

    def _check_weights(self, adapter: Path | None, trained: Path | None) -> None:
        """Raises the `UserError` of a transformer's or a LoRA's files that are not all of what they
        should hold; only their headers are read."""
        from editr2.policies.load import put_adapter

        folder = trained or self.folder
        if adapter is None and folder is None:
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

    @cached_property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.kind.pipeline_class().__init__).parameters

    @property
    def autoencoder(self) -> Any:
        """The class of the pipeline's autoencoder."""
        from editr2.policies.load import part_class

        if self.folder is None:
            return self._arguments["vae"].annotation
        path = self.folder / "model_index.json"
        return part_class(read_json(path), "vae", f"policy.weights: {path}")

    def assembled(self, vae: nn.Module, transformer: nn.Module) -> DiffusionPolicy:
        """The real policy over a real pipeline of these, whose text encoders hold no data."""
        pipe = self._pipeline
        settings = {name: value for name, value in pipe.config.items() if name in self._arguments}
        given = {**settings, **pipe.components, "vae": vae, "transformer": transformer}
        policy = self.kind(
            type(pipe)(**given), self.config
        )  # whose constructor may change the transformer
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
                name: _text_encoder(self.folder / name / "config.json")
                for name in self.kind.text_encoders
            }
            parts = {"vae": vae, "transformer": transformer, **texts}
            where = f"policy.weights: {self.folder}: no {self.kind.pipeline}"
            with _no_bars():
                return load_rest(self.kind, str(self.folder), parts, where)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**self.parts.scheduler)
        given: dict[str, Any] = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
        for name, argument in self._arguments.items():
            if name not in given and name != "self" and argument.default is inspect.Parameter.empty:
                given[name] = nn.Identity() if name in self.kind.text_encoders else None
        return self.kind.pipeline_class()(**given, **self.parts.pipeline)

    @cached_property
    def _measured(self) -> list[tuple[Any, int]]:
        """Policies to measure, with how many blocks of the kind that the policy has one more of are
        missing."""
        shallow = {name: min(n, SHALLOW) for name, n in self.depth.items()}
        deeper = [name for name, n in self.depth.items() if n > SHALLOW]
        return [
            (self.policy, 0),
            *(
                (self._policy({**shallow, name: SHALLOW + 1}), self.depth[name] - SHALLOW)
                for name in deeper
            ),
        ]

    def _at_full_depth(self, measure: Callable[[Any], Any]) -> Any:
        return at_depth(
            [measure(policy) for policy, _ in self._measured], [n for _, n in self._measured[1:]]
        )

    def sizes(self) -> Sizes:
        four_bits = self.config.quantize == "4bit"
        found = self._at_full_depth(lambda policy: _module_sizes(policy.module, four_bits))
        largest = max(
            _module_sizes(policy.module, four_bits)["dequantized"] for policy, _ in self._measured
        )
        item = torch.empty((), dtype=self.dtype).element_size()
        vae = sum(p.numel() for p in self.policy.pipe.vae.parameters()) * item
        return Sizes(
            **{**found, "dequantized": largest}, text=sum(self.parts.text.values()) * item, vae=vae
        )

    def carried(self, step: str) -> int:
        if not self.config.offload:
            return 0
        sizes = self._sizes
        return {"instruct": sizes.text, "encode": sizes.vae, "decode": sizes.vae}.get(step, 0)

    @cached_property
    def _sizes(self) -> Sizes:
        return self.sizes()

    def read_again(self, prompts: int) -> bool:
        from editr2.policies.diffusion import CACHED_PROMPTS

        return prompts > CACHED_PROMPTS

    def conditions(self, turn: int) -> int:
        """Images that a turn sees."""
        recent = min(turn + 1, self.config.history)
        return recent + (self.config.keep_source and turn + 1 > recent)

    def text_length(self, turn: int) -> int:
        """Tokens of an instruction as the transformer sees it."""
        return self.policy.prompt_length(self.said, self.conditions(turn))

    def context(self, policy: Any, batch: int, turn: int) -> Any:
        """A context of the sizes that a batch has at this turn."""
        images, text = self.conditions(turn), self.text_length(turn)
        return policy.blank(batch, text, images, padded=self.prompt_per_output and batch > 1)

    def cost(self, step: str, batch: int, turn: int, checkpointing: bool | None = None) -> Cost:
        if step == "instruct":
            tokens = (self.text_length(turn) + 64) * (
                2 if self.config.guidance != 1 and self.prompt_per_output else 1
            )
            parameters = sum(self.parts.text.values())
            item = torch.empty((), dtype=self.dtype).element_size()
            return Cost(
                {self.dtype: 2 * parameters * tokens * batch}, 0, parameters * item * batch, 0, 0, 0
            )
        if step in ("encode", "decode"):
            one = self._autoencoder(step)
            images = Cost(
                **{
                    **at_depth([asdict(_nothing(one)), asdict(one)], [batch]),
                    "peak": one.peak,
                    "kept": 0,
                }
            )
            return (
                images
                if step == "decode" or not self.derives
                else _both(images, self._context_cost(batch, turn))
            )
        again = self.config.gradient_checkpointing if checkpointing is None else checkpointing
        return self._denoiser(step, batch, turn, again and self.kind.recomputes)

    @property
    def derives(self) -> bool:
        """Whether the model computes something of its own from the condition images."""
        from editr2.policies.diffusion import DiffusionPolicy

        return self.kind.derive is not DiffusionPolicy.derive

    def held(self, batch: int, turn: int) -> int:
        return self._context_cost(batch, turn).kept

    def _context_cost(self, batch: int, turn: int) -> Cost:
        return self._denoiser("context", batch, turn, False)

    def _denoiser(self, step: str, batch: int, turn: int, checkpointing: bool) -> Cost:
        kind = min(
            turn, self.config.history - 1 + self.config.keep_source
        )  # what later turns see is as much

        def measured(b: int) -> Cost:
            key = (step, b, kind, checkpointing and step == "train")
            if key not in self._found:
                measure = self._contextualised if step == "context" else self._forward
                self._found[key] = Cost(
                    **self._at_full_depth(lambda policy: asdict(measure(policy, *key)))
                )
            return self._found[key]

        return _affine(measured, batch, SMALL_BATCH)

    def _autoencoder(self, step: str) -> Cost:
        """Of one image: the policy slices batches."""
        with simulated(), torch.no_grad():
            if step == "encode":
                given = torch.empty(1, 3, *self.policy.condition_size, dtype=self.dtype)
            else:
                given = torch.empty(1, *self.latent_shape)
            with Meter() as meter:
                out = (self.policy.to_latents if step == "encode" else self.policy.to_pixels)(given)
            del out
        return meter.cost

    def _contextualised(
        self, policy: Any, step: str, batch: int, turn: int, checkpointing: bool
    ) -> Cost:
        """Of a context: of what is computed from the images' latents; `kept` is all that it
        holds."""
        with simulated(), torch.no_grad(), Meter() as meter:
            context = self.context(policy, batch, turn)
            cost = meter.cost
        del context
        return cost

    def _forward(self, policy: Any, step: str, batch: int, turn: int, checkpointing: bool) -> Cost:
        module, train = policy.module, step == "train"
        if train and checkpointing:
            module.enable_gradient_checkpointing()
        with simulated(), torch.enable_grad() if train else torch.no_grad():
            context = self.context(policy, batch, turn)
            x, sigma = torch.empty(batch, *self.latent_shape), torch.empty(batch)
            for p in _trainable(module) if train else ():
                p.grad = torch.zeros_like(p)
            with Meter() as meter:
                v = policy.velocity(x, sigma, context)
                if train:
                    _backward([v.v, *(b for b in v.guidance.values() if isinstance(b, Tensor))])
            del v
        for p in _trainable(module):
            p.grad = None
        module.disable_gradient_checkpointing()
        return meter.cost


def _nothing(like: Cost) -> Cost:
    return Cost(dict.fromkeys(like.flops, 0), 0, 0, 0, 0, 0)


def _both(first: Cost, second: Cost) -> Cost:
    """One after the other, of which nothing is kept."""
    flops = {
        dtype: first.flops.get(dtype, 0) + second.flops.get(dtype, 0)
        for dtype in {**first.flops, **second.flops}
    }
    moved, dense = first.bytes + second.bytes, first.moved_dense + second.moved_dense
    return Cost(
        flops, moved, dense, first.operations + second.operations, max(first.peak, second.peak), 0
    )


# ------------------------------------------------------------------------------------------ unified


class UnifiedEditor:
    """`Editor` over the unified model. Texts are as long as the sessions' own."""

    prompt_per_output = True
    cannot_pack = None
    own = None

    def __init__(self, config: PolicyConfig) -> None:
        sizes, codec = read_parts(Path(config.weights) if config.weights else EMBEDDED)
        with simulated():
            module = UnifiedModel(sizes)
        if config.lora_rank:
            with adapters_without_data(module, torch.float32):
                add_lora(module, config.lora_rank, config.lora_alpha, config.lora_targets)
        with simulated():
            self.policy = UnifiedPolicy(module, codec, unified_guidance(config))
        self.config = config
        self.writes_text = config.intent
        self.image_size, self.latent_shape = self.policy.image_size, self.policy.latent_shape
        self.image = self.latent_shape[0] + 2
        self.text = self.question = 16
        self.unreadable = self.policy.unreadable
        self._found: dict[tuple, Cost] = {}

    def see(self, sessions: Sequence[Session]) -> None:
        texts = [len(self.policy.text_ids(turn.instruction)) for s in sessions for turn in s.turns]
        self.text = round(sum(texts) / len(texts))
        asked = [
            len(
                self.policy.question_ids(
                    [t.instruction for t in s.turns[:i]], turn.instruction, s.mode
                )
            )
            for s in sessions
            for i, turn in enumerate(s.turns)
            if i
        ]
        self.question = round(sum(asked) / len(asked)) if asked else 0
        self._found.clear()

    def sizes(self) -> Sizes:
        return Sizes(**_module_sizes(self.policy.module, False), text=0, vae=0)

    def carried(self, step: str) -> int:
        return 0

    def read_again(self, prompts: int) -> bool:
        return True

    @property
    def answer(self) -> int:
        """Tokens of an intent: a self-contained instruction is about a third longer than the raw
        one, and some thought goes before it."""
        return min(self.config.intent_tokens, round(self.text * 4 / 3))

    def held(self, batch: int, turn: int) -> int:
        c, g = self.policy.module.config, self.policy.guidance
        tokens = (turn + 1) * (self.image + self.text)
        branches = 1 + (g.text != 1) + (g.image != 1)
        return (
            4
            * 2
            * c.num_hidden_layers
            * c.num_key_value_heads
            * c.head_dim
            * tokens
            * batch
            * branches
        )

    def _context(self, batch: int, tokens: int) -> Context:
        c = self.policy.module.config
        one = torch.empty(batch, c.num_key_value_heads, tokens, c.head_dim)
        layers = (one,) * c.num_hidden_layers
        context = Context(
            layers, layers, torch.ones(batch, tokens, dtype=torch.bool), torch.zeros(batch)
        )
        context.__dict__["padded"] = (
            True  # texts of a batch differ in length; nobody can look into a fake tensor
        )
        return context

    def _guided(self, batch: int, tokens: int) -> Context | GuidedContext:
        full = self._context(batch, tokens)
        g = self.policy.guidance
        if not g.active:
            return full
        text, image = (full if weight != 1 else None for weight in (g.text, g.image))
        guided = GuidedContext(full, text, image)
        guided.__dict__["joined"] = self._context(batch * len(guided.branches), tokens)
        return guided

    def cost(self, step: str, batch: int, turn: int, checkpointing: bool | None = None) -> Cost:
        """Checkpointing is no option of this model."""
        if step == "decode":  # pixels are latents here
            return Cost({}, 0, 0, 0, 0, 0)

        def length(tokens: int) -> Callable[[int], Cost]:
            return lambda b: _affine(lambda t: self._step(step, b, t, tokens), turn, 0)

        if step != "intend":
            return _affine(length(0), batch, SMALL_BATCH)
        return _affine(lambda tokens: _affine(length(tokens), batch, SMALL_BATCH), self.answer, 2)

    def _step(self, step: str, batch: int, turn: int, tokens: int) -> Cost:
        key = (step, batch, turn, tokens)
        if key not in self._found:
            self._found[key] = self._measure(*key)
        return self._found[key]

    def _measure(self, step: str, batch: int, turn: int, tokens: int) -> Cost:
        train, module = step in ("train", "answer"), self.policy.module
        with simulated(), torch.enable_grad() if train else torch.no_grad():
            for p in _trainable(module) if train else ():
                p.grad = torch.zeros_like(p)
            before = turn * (self.image + self.text)
            if step == "encode":
                context: Any = self._context(batch, before)
            elif step in ("velocity", "train"):
                context = self._guided(batch, before + self.image + self.text)
            else:
                context = self._context(batch, before + self.image)
            more = (tokens,) if step == "intend" else ()
            with Meter() as meter:
                kept = getattr(self, f"_{step}")(batch, context, *more)
            del kept
        for p in _trainable(module):
            p.grad = None
        return meter.cost

    def _encode(self, batch: int, context: Context) -> Any:
        model = self.policy.module
        return model.append_image(
            context, torch.empty(batch, *self.latent_shape), self.policy.grid, self.policy.marks
        )

    def _instruct(self, batch: int, context: Context) -> Any:
        twice = self.config.guidance_image != 1  # the texts alone are a context of their own
        said = self._said(batch, self.text)
        return [self.policy.module.append_text(context, *said) for _ in range(1 + twice)]

    @staticmethod
    def _said(batch: int, length: int) -> tuple[Tensor, Tensor]:
        shape = (batch, length)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)

    def _intend(self, batch: int, context: Context, tokens: int) -> Any:
        model = self.policy.module
        branch = Branch(context, self.question + self.config.intent_tokens)
        hidden = model.extend_branch(branch, *self._said(batch, self.question))
        for _ in range(tokens - 1):
            model.logits(hidden[:, -1]).softmax(-1).cumsum(-1)
            hidden = model.extend_branch(branch, *self._said(batch, 1))
        return model.logits(hidden[:, -1])

    def _velocity(self, batch: int, context: Any) -> Any:
        return self.policy.velocity(
            torch.empty(batch, *self.latent_shape), torch.empty(batch), context
        )

    def _train(self, batch: int, context: Any) -> Any:
        v = self._velocity(batch, context)
        _backward([v.v, *(b for b in v.guidance.values() if isinstance(b, Tensor))])
        return v

    def _answer(self, batch: int, context: Context) -> Any:
        hidden = self.policy.module.text_hidden(
            context, *self._said(batch, self.question + self.answer - 1)
        )
        _backward([self.policy.module.logits(hidden[:, -self.answer :]).log_softmax(-1)])
        return hidden
