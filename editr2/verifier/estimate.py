"""What a verifier's training takes in memory and time, before a weight is loaded: `editr2 verifier
sft --check`.

The language model runs, one layer deep and two, on tensors without data (`check.meter`), in the
batches of the settings; what deeper ones cost follows exactly, LoRA, checkpointing and the layer
that scores included. What looks at pictures is counted by formula: twice its weights for each
patch, forward, and as often again as the backward pass goes through it. Memory and seconds are
those of a device's data sheet; `preflight` names what is assumed. None of it was compared with a
GPU run of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from editr2.check.devices import Device
from editr2.check.estimate import GATHERED, REDUCED
from editr2.check.links import gather_seconds
from editr2.check.meter import Cost, Meter, Speed, at_depth
from editr2.errors import ConfigError, shown
from editr2.policies.blueprint import adapters_without_data, simulated
from editr2.policies.tensor_files import reading
from editr2.rewards.verifier import FOLDER, judge_text, own_prompts
from editr2.rewards.wording import prompts_of
from editr2.verifier.files import Edit
from editr2.verifier.model import (
    ACCEPTED_WEIGHTS,
    ROOM,
    Prompt,
    Reader,
    adapt,
    checkpoint_layers,
    stored_dtype,
)
from editr2.verifier.objectives import OBJECTIVES, Lesson
from editr2.verifier.settings import GcpoConfig, ReaderConfig, RunConfig
from editr2_kernels import token_log_prob

LETTERS = 4
"""Of a token, where there is no tokenizer at hand."""
LOOKED_AT = 32
"""Examples whose lengths are taken."""
UPDATED = 28
"""Bytes that an AdamW step reads and writes for each float32 weight."""
KEPT = 34
"""Bytes that a layer of a vision transformer keeps for the backward pass, for each number of its
width and patch, in half precision (Korthikanti et al., arXiv 2205.05198, without dropout and with
fused attention); twice as many in float32."""

DRAWN = 6
"""Numbers that drawing a token has at once for each word: scores, shares and their sums."""
SEEING = 6
"""Numbers that a layer of a vision transformer has at once without a backward pass, for each number
of its width and patch: what goes past it, its norm, and four of its MLP."""


def _qwen(hidden: int, between: int, layers: int, heads: int, pairs: int, words: int) -> Any:
    """Of Qwen2.5-VL, as published. pairs: heads of keys and values."""
    tied = hidden < 3000
    return {
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": between,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": pairs,
            "vocab_size": words,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": hidden},
        "tie_word_embeddings": tied,
    }


PUBLISHED: Mapping[str, tuple[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": ("Qwen2_5_VLConfig", _qwen(2048, 11008, 36, 16, 2, 151_936)),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("Qwen2_5_VLConfig", _qwen(3584, 18944, 28, 28, 4, 152_064)),
}
"""By hub id, the class of their configuration and its values: nothing is asked of the hub."""


@dataclass(frozen=True)
class Lengths:
    """Tokens. text: of what is asked. picture: of each of the two pictures. trace: of an answer.
    side: of a picture, height and width in pixels."""

    text: int
    picture: int
    trace: int
    side: tuple[int, int]

    @property
    def prompt(self) -> int:
        return self.text + 2 * self.picture


@dataclass(frozen=True)
class Sizes:
    """Of the whole model. parameters, trainable: numbers, adapters among both. frozen, trained,
    block, outside: bytes of weights that stay, of what trains, of the largest repeated block, of
    weights in none. pictures: numbers of what looks at pictures. layers: with adapters.
    through_pictures: whether the backward pass goes on into what looks at them, for something there
    trains."""

    parameters: int
    trainable: int
    frozen: int
    trained: int
    block: int
    outside: int
    pictures: int
    layers: int
    through_pictures: bool


@dataclass(frozen=True)
class Estimate:
    """Of one process. memory: bytes by part. peaks: bytes alive in each phase. seconds: of an
    iteration, by phase."""

    sizes: Sizes
    lengths: Lengths
    memory: dict[str, int]
    peaks: dict[str, int]
    seconds: dict[str, float]
    flops: float


# --------------------------------------------------------------------------------------- the model


def described(config: ReaderConfig) -> Any:
    """The configuration of `policy.weights`, without the weights. Raises `ConfigError`."""
    import transformers

    given = str(config.weights)
    if not Path(given).is_dir() and given in PUBLISHED:
        kind, values = PUBLISHED[given]
        return getattr(transformers, kind)(**copy.deepcopy(values))
    if given.startswith((".", "/", "~")) and not Path(given).is_dir():
        raise ConfigError(f"policy.weights: {shown(given)}: no such folder ({ACCEPTED_WEIGHTS})")
    with reading(f"policy.weights: {shown(given)} ({ACCEPTED_WEIGHTS})"):
        return transformers.AutoConfig.from_pretrained(given)


def _built(form: Any, config: ReaderConfig, trains: bool = True) -> Any:
    """The model, on whatever device tensors are made. Only adapters train, or everything; or
    nothing does."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(form, dtype=stored_dtype(config, trains))


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def sizes_of(form: Any, config: ReaderConfig) -> Sizes:
    with torch.device("meta"):
        module = _built(form, config)
        language, pictures = module.get_decoder(), sum(p.numel() for p in _seeing(module))
        if config.lora_rank:
            adapt(module, config)
    every = list(module.parameters())
    train = [p for p in every if p.requires_grad]
    blocks = list(language.layers)
    return Sizes(
        sum(p.numel() for p in every),
        sum(p.numel() for p in train),
        _bytes(p for p in every if not p.requires_grad),
        _bytes(train),
        max(_bytes(block.parameters()) for block in blocks),
        _bytes(every) - sum(_bytes(block.parameters()) for block in blocks),
        pictures,
        sum("lora_A" in name for name, _ in module.named_parameters()),
        any(p.requires_grad for p in _seeing(module)),
    )


def _shallow(form: Any, layers: int) -> Any:
    form = copy.deepcopy(form)
    text, sight = form.get_text_config(), form.vision_config
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    sight.num_hidden_layers = 1
    return form


@dataclass(frozen=True)
class _Language:
    """The language model without data, of few layers. through: whether its inputs have a
    gradient."""

    module: Any
    config: ReaderConfig
    width: int
    through: bool

    def states(self, rows: int, tokens: int, cache: Any = None) -> torch.Tensor:
        """What its last layer reads [rows, tokens, width]."""
        given = torch.empty(rows, tokens, self.width)
        # With checkpoints the first layer would keep less than the others, which are counted by it.
        alike = self.through or self.config.gradient_checkpointing
        given.requires_grad_(torch.is_grad_enabled() and alike)
        found: torch.Tensor = self.module.get_decoder()(
            inputs_embeds=given, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        return found

    def score(self, rows: int, prompt: int, answer: int) -> torch.Tensor:
        """Log-probs of answers, as `Reader.log_probs` has them."""
        hidden = self.states(rows, prompt + answer - 1)[:, -answer:]
        if self.config.dtype == "bfloat16":
            hidden = hidden.to(torch.bfloat16)
        weight = self.module.get_output_embeddings().weight.to(hidden.dtype)
        ids = torch.zeros(rows, answer, dtype=torch.long)
        found: torch.Tensor = token_log_prob((hidden, weight), ids).log_prob
        return found


def _measured(
    form: Any, config: ReaderConfig, run: Callable[[_Language], int], trains: bool = True
) -> Cost:
    """Of the whole language model. run: runs, and returns bytes of gradients that are none of the
    activations."""
    found, dtype = [], stored_dtype(config, trains)
    for layers in (1, 2):
        with simulated(dtype):
            module = _built(_shallow(form, layers), config, trains)
        if config.lora_rank:
            with adapters_without_data(module, dtype):
                adapt(module, config)
        if config.gradient_checkpointing:
            checkpoint_layers(module)
        module.train(config.gradient_checkpointing)
        through = any(p.requires_grad for p in _seeing(module))
        language = _Language(module, config, form.get_text_config().hidden_size, through)
        low = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")
        with simulated(dtype), Meter() as meter, low:
            apart = run(language)
        cost = asdict(meter.cost)
        found.append(cost | {"peak": cost["peak"] - apart})
    every = {dtype for cost in found for dtype in cost["flops"]}
    for cost in found:
        cost["flops"] = {dtype: cost["flops"].get(dtype, 0) for dtype in every}
    return Cost(**at_depth(found, [form.get_text_config().num_hidden_layers - 1]))


def train_cost(form: Any, config: ReaderConfig, rows: int, lengths: Lengths) -> Cost:
    """Of a training forward and its backward pass; peak: without gradients."""

    def run(language: _Language) -> int:
        language.score(rows, lengths.prompt, lengths.trace).sum().backward()
        return _bytes(p for p in language.module.parameters() if p.grad is not None)

    return _measured(form, config, run)


def score_cost(form: Any, config: ReaderConfig, rows: int, lengths: Lengths) -> Cost:
    """Of scoring without gradient."""

    def run(language: _Language) -> int:
        with torch.no_grad():
            language.score(rows, lengths.prompt, lengths.trace)
        return 0

    return _measured(form, config, run)


def write_cost(
    form: Any, config: ReaderConfig, rows: int, lengths: Lengths, trains: bool = True
) -> tuple[Cost, Cost]:
    """Of reading prompts, and of writing one token when half of a trace is there."""
    from transformers.cache_utils import DynamicCache

    def told(tokens: int, seen: int) -> Callable[[_Language], int]:
        def run(language: _Language) -> int:
            with torch.no_grad():
                cache, text = DynamicCache(config=language.module.config), form.get_text_config()
                if seen:
                    width = getattr(text, "head_dim", None)
                    width = width or text.hidden_size // text.num_attention_heads
                    held = torch.empty(rows, text.num_key_value_heads, seen, width)
                    for layer in range(len(language.module.get_decoder().layers)):
                        cache.update(held, held, layer)
                last = language.states(rows, tokens, cache)[:, -1]
                language.module.get_output_embeddings()(last)
            return 0

        return run

    quiet = replace(config, gradient_checkpointing=False)
    middle = lengths.prompt + lengths.trace // 2
    return (
        _measured(form, quiet, told(lengths.prompt, 0), trains),
        _measured(form, quiet, told(1, middle), trains),
    )


# ----------------------------------------------------------------------------------------- lengths


def picture_tokens(form: Any, height: int, width: int) -> int:
    """Of a picture, in the language model. Of models that merge patches, sides are rounded to
    whole groups of them; others see one size."""
    sight = form.vision_config
    patch = sight.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    if merge := getattr(sight, "spatial_merge_size", None):
        unit = patch * merge
        return max(1, round(height / unit)) * max(1, round(width / unit))
    return int(sight.image_size // patch) ** 2


def lengths_of(form: Any, config: RunConfig, examples: Sequence[Any], tokens: int) -> Lengths:
    """Means over the first examples. tokens: of a sampled trace."""
    from PIL import Image

    weights, looked = str(config.policy.weights), examples[:LOOKED_AT]
    prompts = prompts_of(FOLDER, config.policy.prompts or own_prompts(weights))
    count = _counter(weights)
    edits: list[Edit] = [example.edits[0] for example in looked]
    asked = [count(judge_text(prompts, one.instruction, one.principles)) for one in edits]
    with Image.open(edits[0].image.path) as image:
        side = (image.height, image.width)
    taught = [count(one.told.text) for one in looked if isinstance(one, Lesson)]
    if isinstance(config, GcpoConfig):
        taught = [min(tokens, config.rollout.max_tokens)]
    picture = picture_tokens(form, *side)
    return Lengths(_mean(asked), picture, max(1, _mean(taught)), side)


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


def _counter(weights: str) -> Callable[[str], int]:
    """Tokens of a text, by the folder's tokenizer where it is there."""
    file = Path(weights) / "tokenizer.json"
    if not file.is_file():
        return lambda text: -(-len(text) // LETTERS)
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(file))
    return lambda text: len(words.encode(text).ids)


# ---------------------------------------------------------------------------------------- estimate


def estimate(
    name: str,
    config: RunConfig,
    examples: Sequence[Any],
    device: Device,
    processes: int,
    tokens: int,
) -> Estimate:
    p, t = config.policy, config.train
    form = described(p)
    sizes, lengths = sizes_of(form, p), lengths_of(form, config, examples, tokens)
    shares = (p.shard_group or processes) if p.shard and processes > 1 else 1
    units = -(-t.batch // OBJECTIVES[name].block(config))  # blocks of an iteration
    mine = -(-units // processes)
    each = config.rollout.traces if isinstance(config, GcpoConfig) else 1
    block = OBJECTIVES[name].block(config) * (2 * each if each > 1 else 1)  # traces
    rows = min(t.rows, 2 * each if each > 1 else t.rows, block)
    forwards, updates = mine * -(-block // rows), getattr(t, "updates", 1)
    moved = sizes.frozen + (0 if p.lora_rank else sizes.trained)
    layers = form.get_text_config().num_hidden_layers
    gather = gather_seconds(moved, layers + 1, shares, device) if shares > 1 else 0.0
    train = train_cost(form, p, rows, lengths)
    seconds: dict[str, float] = {}
    flops = 0.0

    def phase(title: str, cost: Cost, times: float, shown: int, passes: int, trains: bool) -> None:
        """shown: rows whose pictures are looked at. passes: through the weights."""
        nonlocal flops
        sight = _sight_flops(form, sizes.pictures, lengths, shown) * (
            _sight_passes(p, sizes) if trains else 1
        )
        low = p.dtype == "bfloat16"
        rate = device.speed.flops[torch.bfloat16 if low else torch.float32]
        one = max(cost.seconds(device.speed) + sight / rate, passes * gather)
        seconds[title] = seconds.get(title, 0.0) + times * one
        flops += times * (cost.total_flops + sight)

    written = 0
    if isinstance(config, GcpoConfig):
        reads, word = write_cost(form, p, block, lengths)
        phase("writing", reads, mine, block, 1, False)
        phase("writing", word, mine * lengths.trace, 0, 1, False)
        scored = score_cost(form, p, rows, lengths)
        phase("scoring", scored, forwards * (1 + (config.train.kl_weight > 0)), rows, 1, False)
        written = block * (lengths.prompt + lengths.trace) * _a_token(form, p)
        peak_written = written + reads.peak
    phase("training", train, forwards * updates, rows, 2, True)
    steps = updates * getattr(t, "minibatches", 1)
    trained = -(-sizes.trained // shares) if not p.lora_rank else sizes.trained
    seconds["training"] += steps * trained / 4 * UPDATED / device.speed.bandwidth

    blocks = outside = 0
    gradients = trained
    if shares > 1:
        blocks, outside = GATHERED * sizes.block, sizes.outside
        if not p.lora_rank:
            gradients += REDUCED * sizes.block + outside
    reference = OBJECTIVES[name].reference(config)
    activations = train.peak + _sight_bytes(form, p, sizes, lengths, rows)
    memory = {
        "frozen weights": round(sizes.frozen / shares),
        "gathered blocks": blocks + outside,
        "adapters" if p.lora_rank else "trained weights": trained,
        "gradients": gradients,
        "optimizer states": 2 * trained,
        "copy of the start": trained * reference,
        "keys and values, writing": written,
        "activations, training": activations,
    }
    always = memory["frozen weights"] + blocks + outside + trained * (3 + reference)
    peaks = {"training": always + gradients + activations}
    if written:
        peaks = {"writing": always + peak_written, **peaks}
    return Estimate(sizes, lengths, memory, peaks, seconds, flops)


@dataclass(frozen=True)
class Answering:
    """What a batch of questions takes. bytes: at most, beside the weights. reads, word: of reading
    the questions, and of a token of every answer. sight: flops of looking at the pictures. tokens:
    of an answer."""

    bytes: int
    reads: Cost
    word: Cost
    sight: float
    tokens: int
    dtype: torch.dtype

    def seconds(self, speed: Speed) -> float:
        """On a device."""
        looking = self.sight / speed.flops[self.dtype]
        return self.reads.seconds(speed) + looking + self.tokens * self.word.seconds(speed)


def answering(reader: Reader, *, rows: int, prompt: Prompt, length: int, answer: int) -> Answering:
    """Of a verifier that does not train, asked `rows` questions like one together.

    reader: may be without weights (`sketch_reader`). prompt: the question; length: tokens that it
    is filled up to; answer: most tokens of an answer, which all are taken to have.
    """
    form, config = reader.module.config, reader.config
    place = getattr(form, "image_token_id", None)
    picture = int((prompt.ids == place).sum()) // 2 if place is not None else 0
    lengths = Lengths(length - 2 * picture, picture, answer, (0, 0))
    reads, word = write_cost(form, config, rows, lengths, trains=False)
    token, middle = rows * _a_token(form, config), length + answer // 2
    sight = _patches(form, lengths, rows) * form.vision_config.hidden_size * SEEING
    read = reads.peak + sight * (2 if config.dtype == "bfloat16" else 4)
    seen = sum(4 * x.numel() for x in prompt.others.values() if x.is_floating_point())
    drawn = 4 * form.get_text_config().vocab_size * DRAWN
    # Their cache has room for the next tokens.
    beside = rows * (seen + drawn) + token * ROOM
    low = config.dtype == "bfloat16"
    return Answering(
        max(read, word.peak + token * (length + answer - middle)) + beside,
        reads,
        word,
        _sight_flops(form, sum(p.numel() for p in _seeing(reader.module)), lengths, rows),
        answer,
        torch.bfloat16 if low else torch.float32,
    )


def _a_token(form: Any, config: ReaderConfig) -> int:
    """Bytes of its keys and values."""
    text = form.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    held = 2 if config.dtype == "bfloat16" else 4
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * width * held)


def _patches(form: Any, lengths: Lengths, rows: int) -> int:
    merge = getattr(form.vision_config, "spatial_merge_size", None) or 1
    return 2 * rows * lengths.picture * merge**2


def _seeing(module: Any) -> list[Any]:
    """The parameters of what looks at pictures."""
    words = {id(p) for p in module.get_decoder().parameters()}
    words |= {id(p) for p in module.get_output_embeddings().parameters()}
    return [p for p in module.parameters() if id(p) not in words]


def _sight_flops(form: Any, seeing: int, lengths: Lengths, rows: int) -> float:
    """Of a forward pass."""
    return 2.0 * seeing * _patches(form, lengths, rows)


def _sight_passes(config: ReaderConfig, sizes: Sizes) -> int:
    """Of a training step, in forward passes: the products of the backward pass, for states and
    weights, and the forward pass again."""
    return 1 + sizes.through_pictures * (1 + (not config.lora_rank) + config.gradient_checkpointing)


def _sight_bytes(form: Any, config: ReaderConfig, sizes: Sizes, lengths: Lengths, rows: int) -> int:
    """What looks at pictures keeps, where the backward pass goes through it."""
    if not sizes.through_pictures:
        return 0
    sight = form.vision_config
    kept = 2 if config.gradient_checkpointing else KEPT
    wide = 1 if config.dtype == "bfloat16" else 2
    numbers = _patches(form, lengths, rows) * sight.hidden_size * sight.num_hidden_layers
    return int(numbers * kept * wide)
