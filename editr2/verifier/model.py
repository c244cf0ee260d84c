"""A verifier in this process: a folder of transformers, asked, sampled and scored.

Any `AutoModelForImageTextToText` with its `AutoProcessor` and a chat template. It is asked what a
served copy is asked by the reward `verifier`: the two pictures, then the words, as one message.

Prompts of a batch are filled up on the left and answers on the right, so that all answers begin at
one place: sampling and scoring lay a trace out alike, and the last layer sees the places of answers
alone. There it gives log-probs of the tokens that are asked about, and logits are held for no more
than a chunk of rows (`editr2_kernels.token_log_prob`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from editr2.errors import ConfigError, DataError, one_line, shown
from editr2.policies.base import autocast_dtype
from editr2.policies.finite import ACCEPTED, unusable
from editr2.policies.tensor_files import reading
from editr2.policies.weights import add_lora
from editr2.rewards.folders import check_weights_beside
from editr2.rewards.verifier import FOLDER, judge_text, own_prompts
from editr2.rewards.wording import prompts_of
from editr2.rl.seeds import derive_seed, seed_tensor
from editr2.run.hub import check_model
from editr2.run.identity import folder_fingerprint, hub_revision
from editr2.verifier.files import Edit
from editr2.verifier.settings import LORA_TARGETS, ReaderConfig
from editr2_kernels import philox_normal, token_log_prob

IGNORED = -100
ROOM = 64
"""Tokens for which there is room in the cache when it is made anew."""

ADAPTER = "adapter_config.json"
"""In a folder of peft's."""

ACCEPTED_WEIGHTS = "accepted: a folder or hub id of a model that takes pictures and writes text"


@dataclass(frozen=True)
class Prompt:
    """What is asked of one edit. ids: int64 [L]. by_token: further int64 [L] of the processor, 0
    where there is none. others: what it makes of the pictures, batch first."""

    id: str
    ids: Tensor
    by_token: Mapping[str, Tensor]
    others: Mapping[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A sampled trace. ids: with the mark that ended it. log_prob: of each, as it was sampled.
    ended: whether that was an end mark; a trace also ends after so many tokens, or where a picture
    would begin."""

    text: str
    ids: tuple[int, ...]
    log_prob: tuple[float, ...]
    ended: bool


@dataclass(frozen=True)
class Scored:
    """Of B answers of at most A tokens: fp32 [B, A] log-probs and entropies in nats, 0 where
    `valid` [B, A] is not."""

    log_prob: Tensor
    entropy: Tensor
    valid: Tensor


class _Head(nn.Linear):
    """The last layer. asked: (ids [B, A], temperature), for which it gives log-prob and entropy
    [B, A, 2] in place of logits."""

    asked: tuple[Tensor, float] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.asked is None:
            return super().forward(hidden)
        ids, temperature = self.asked
        hidden = hidden.to(autocast_dtype(hidden.device) or hidden.dtype)
        found = token_log_prob(
            (hidden, self.weight.to(hidden.dtype)),
            ids,
            temperature=temperature,
            ignore_index=IGNORED,
        )
        return torch.stack(found, -1)


class Reader:
    """A verifier's model and processor.

    module: of transformers, in eval mode; what trains of it requires gradients.
    """

    def __init__(self, module: Any, processor: Any, config: ReaderConfig, where: str) -> None:
        """where: what errors begin with. Raises `ConfigError` for a model that cannot be trained
        here."""
        self.module, self.processor, self.config, self.where = module, processor, config, where
        self.prompts = prompts_of(FOLDER, config.prompts or own_prompts(str(config.weights)))
        self.tokenizer = processor.tokenizer
        self._head = _scoring_head(module, where)
        # Where positions follow from pictures, the model counts them itself, past what is filled.
        self._counts = hasattr(getattr(module, "model", None), "get_rope_index")
        self._marks = _marks(module, self.tokenizer, where)
        # As a token of an answer, a picture's place would be one; a trace ends where it comes.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "audio_token_id")
        places = (getattr(module.config, name, None) for name in names)
        self._pictures = frozenset(place for place in places if isinstance(place, int))
        self._blank: Prompt | None = None
        if getattr(processor, "chat_template", None) is None:
            raise ConfigError(f"{where}: no chat template (accepted: a processor with one)")

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    # ------------------------------------------------------------------------------------- asking

    def prompt(self, edit: Edit) -> Prompt:
        """Raises `DataError` for an edit without principles, and for words or pictures that the
        processor does not take."""
        if not edit.principles:
            raise DataError(f"{edit.id}: no principles (accepted: at least one)")
        text = judge_text(self.prompts, edit.instruction, edit.principles)
        return self.question((edit.image.read(), edit.edited.read()), text, edit.id)

    def question(self, images: Sequence[np.ndarray], text: str, of: str) -> Prompt:
        """images: uint8 [H, W, 3], in front of the text. of: what errors begin with. Raises
        `DataError` for words or pictures that the processor does not take."""
        self._known(text, of)
        pictures = [{"type": "image", "image": Image.fromarray(image)} for image in images]
        return self._asked(pictures, text, of)

    def _asked(self, pictures: Sequence[dict[str, Any]], text: str, of: str) -> Prompt:
        message = {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
        try:
            found = self.processor.apply_chat_template(
                [message],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
            raise DataError(f"{of}: cannot be asked about: {one_line(error)}") from error
        ids = found.pop("input_ids")
        found.pop("attention_mask", None)
        by_token = {k: v[0] for k, v in found.items() if v.shape == ids.shape}
        others = {k: v for k, v in found.items() if k not in by_token}
        return Prompt(of, ids[0], by_token, others)

    def answer_ids(self, text: str, of: str) -> tuple[int, ...]:
        """Of a trace, with the end mark. of: whose it is. Raises `DataError` for a word that the
        vocabulary does not hold."""
        self._known(text, of)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if found := self._pictures & set(ids):
            mark = self.tokenizer.convert_ids_to_tokens(min(found))
            raise DataError(f"{of}: {mark} in a trace (accepted: words)")
        return (*ids, self.tokenizer.eos_token_id)

    def _known(self, text: str, of: str) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if unknown in found["input_ids"]:
            start, end = found["offset_mapping"][found["input_ids"].index(unknown)]
            raise DataError(
                f"{of}: {shown(repr(text[start:end]))}: unknown to the verifier's vocabulary "
                f"(accepted: its words)"
            )

    # ------------------------------------------------------------------------------------ sampling

    def write(
        self,
        edits: Sequence[Edit],
        n: int,
        seed: int,
        *,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        rows: int = 16,
    ) -> list[list[str]]:
        """n traces of each edit, as text. rows: written at once. A trace follows from the edit's
        id, its own number and the seed; what stands beside it in the batch is rounding's matter."""
        wanted = [(self.prompt(edit), j) for edit in edits for j in range(n)]
        texts: list[str] = []
        for at in range(0, len(wanted), rows):
            some = wanted[at : at + rows]
            seeds = [derive_seed(seed, "trace", prompt.id, j) for prompt, j in some]
            found = self.sample(
                [prompt for prompt, _ in some],
                seeds,
                temperature=temperature,
                max_tokens=max_tokens,
            )
            texts += [one.text for one in found]
        return [texts[at : at + n] for at in range(0, len(texts), n)]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
        length: int | None = None,
    ) -> list[Written]:
        """A trace for each prompt, by its own seed; temperature 0 is greedy. length: that prompts
        are filled up to, at least; none: the longest one's."""
        inputs = self._inputs(prompts, length)
        start = inputs["input_ids"].shape[1]
        drawn = _Drawn(seed_tensor(seeds, self.device), temperature, start)
        stops = self._marks | self._pictures
        with self._computing(), _decoding(self.module, sorted(stops), self._fill):
            whole = self.module.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                logits_processor=[drawn],
                past_key_values=_grown_cache(self.module.config),
                synced_gpus=False,
            )
        log_prob = torch.stack(drawn.log_prob, 1).tolist()
        written = []
        for ids, scores in zip(whole[:, start:].tolist(), log_prob, strict=True):
            end = next((k for k, one in enumerate(ids) if one in stops), len(ids))
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            ids = ids[: end + 1]
            ended = ids[-1] in self._marks
            written.append(Written(text, tuple(ids), tuple(scores[: len(ids)]), ended))
        return written

    # ------------------------------------------------------------------------------------- scoring

    def log_probs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> Scored:
        """Of each prompt's answer, token by token, under softmax(logits / temperature);
        differentiable."""
        ids, before = self._answers(answers), self._head.asked
        self._head.asked = (ids, temperature)
        try:
            with self._computing(), self._recomputing():
                out = self.module(**self._followed(prompts, ids)).logits
        finally:
            self._head.asked = before  # of a forward that waits while this one is made (`idle`)
        valid = ids != IGNORED
        return Scored(out[..., 0], out[..., 1], valid)

    @torch.no_grad()
    def logits(self, prompt: Prompt, answer: Sequence[int]) -> Tensor:
        """Of one answer's tokens [A, V], by the model's own last layer."""
        with self._computing():
            out = self.module(**self._followed([prompt], self._answers([answer]))).logits
        found: Tensor = out[0]
        return found

    @property
    def repeated_blocks(self) -> list[str]:
        """Class names of the layers that `sharding.place` shares out one by one: those of the
        language model. What looks at pictures is not asked at every token, so it goes with the
        rest."""
        return sorted({type(layer).__name__ for layer in self.module.get_decoder().layers})

    def idle(self) -> Tensor:
        """A forward with the smallest input that goes through all of the model."""
        if self._blank is None:
            picture = {"type": "image", "image": Image.new("RGB", (28, 28))}
            self._blank = self._asked([picture, picture], "", "a blank picture")
        return self.log_probs([self._blank], [[self.tokenizer.eos_token_id]]).log_prob

    def _answers(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """int64 [B, A], filled up on the right."""
        ids = torch.full((len(answers), max(map(len, answers))), IGNORED)
        for row, answer in zip(ids, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        return ids.to(self.device)

    def _followed(self, prompts: Sequence[Prompt], ids: Tensor) -> dict[str, Any]:
        """Prompts and their answers, and the places at which these are told."""
        inputs = self._inputs(prompts)
        start = inputs["input_ids"].shape[1]
        # Nothing is told from an answer's last token, which may be a picture's place.
        given, valid = ids[:, :-1], ids[:, 1:] != IGNORED
        fill = self._fill
        inputs["input_ids"] = torch.cat([inputs["input_ids"], given.where(valid, fill)], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], valid.long()], 1)
        for name in prompts[0].by_token:
            inputs[name] = nn.functional.pad(inputs[name], (0, given.shape[1]))
        if not self._counts:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        places = torch.arange(start - 1, start - 1 + ids.shape[1], device=self.device)
        return {**inputs, "logits_to_keep": places, "use_cache": False}

    def _inputs(self, prompts: Sequence[Prompt], length: int | None = None) -> dict[str, Any]:
        """Prompts as one batch, filled up on the left."""
        length = max(length or 0, *(len(one.ids) for one in prompts))

        def together(rows: Sequence[Tensor], fill: int) -> Tensor:
            out = torch.full((len(rows), length), fill)
            for place, row in zip(out, rows, strict=True):
                place[length - len(row) :] = row
            return out.to(self.device)

        inputs = {
            "input_ids": together([one.ids for one in prompts], self._fill),
            "attention_mask": together([torch.ones_like(one.ids) for one in prompts], 0),
        }
        for name in prompts[0].by_token:
            inputs[name] = together([one.by_token[name] for one in prompts], 0)
        for name in prompts[0].others:
            values = [one.others[name] for one in prompts]
            if len({value.shape[1:] for value in values}) > 1:
                raise DataError(
                    f"{name}: of {list(values[0].shape[1:])} and other sizes in one batch "
                    f"(accepted by this processor: pictures of one size, or one row at a time)"
                )
            value = torch.cat(values)
            if value.is_floating_point():
                value = value.to(next(self.module.parameters()).dtype)
            inputs[name] = value.to(self.device)
        return inputs

    @property
    def _fill(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        low = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            yield

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers that are to be computed again in the backward do so where they believe to train;
        nothing below them does, so nothing is dropped out."""
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return
        layers = [m for m in self.module.modules() if getattr(m, "gradient_checkpointing", False)]
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer, trained in zip(layers, before, strict=True):
                layer.training = trained


class _Drawn:
    """Draws tokens by inverse transform, with one uniform number for each row and place, and hands
    them to `generate` as the only ones there are; keeps their log-probs."""

    def __init__(self, seeds: Tensor, temperature: float, start: int) -> None:
        self.seeds, self.temperature, self.start = seeds, temperature, start
        self.log_prob: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            token = scores.argmax(-1)
        else:
            normal = philox_normal(self.seeds, input_ids.shape[1] - self.start, (1,))
            uniform = 0.5 * (1 + torch.erf(normal / 2**0.5))
            cumulative = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
            token = (cumulative < uniform * cumulative[:, -1:]).sum(-1)
            token = token.clamp(max=scores.shape[1] - 1)
        found = token_log_prob(scores, token, temperature=self.temperature or 1.0)
        self.log_prob.append(found.log_prob)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def _grown_cache(config: Any) -> Any:
    """Keys and values of a text that goes on token by token. Layers of another kind than the plain
    one stay as they are."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = _grown_layer()
    return cache


@functools.cache
def _grown_layer() -> type[Any]:
    """With room for the next tokens: where everything is copied for each of them, that takes a
    third of a small model's time."""
    from transformers.cache_utils import DynamicLayer

    class Grown(DynamicLayer):
        keys: Any
        values: Any
        room: tuple[Tensor, ...] = ()

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            new = (key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(*new)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if not self.room or self.room[0].shape[-2] < end:
                before = (self.keys, self.values)
                self.room = tuple(x.new_empty(*x.shape[:-2], end + ROOM, x.shape[-1]) for x in new)
                if start:
                    self._put(before, 0, start)
            self._put(new, start, end)
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def _put(self, new: Sequence[Any], start: int, end: int) -> None:
            for room, one in zip(self.room, new, strict=True):
                room[..., start:end, :] = one

    return Grown


@contextmanager
def _decoding(module: Any, stops: Sequence[int], fill: int) -> Iterator[None]:
    """Without a model's own habits of decoding (penalties, top-k): its distribution is what
    trains."""
    from transformers import GenerationConfig

    own = module.generation_config
    module.generation_config = GenerationConfig(eos_token_id=list(stops), pad_token_id=fill)
    name = "_maybe_prepare_encoder_kwargs_for_generation"
    if "lockstep" in vars(module):
        # It looks at pictures outside of the model's forward, where weights that are shared out are
        # not whole; without it they are looked at by the first forward.
        vars(module)[name] = lambda inputs, kwargs, *_: kwargs
    try:
        yield
    finally:
        module.generation_config = own
        vars(module).pop(name, None)


def _scoring_head(module: Any, where: str) -> _Head:
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        what = type(head).__name__ + (" with a bias" if isinstance(head, nn.Linear) else "")
        raise ConfigError(f"{where}: its last layer is a {what} (accepted: Linear without a bias)")
    head.__class__ = _Head
    scoring: Any = head
    made: _Head = scoring
    return made


def _marks(module: Any, tokenizer: Any, where: str) -> frozenset[int]:
    """The ids at which sampling ends. Raises `ConfigError` where that of the tokenizer, which
    traces are taught with, is none of them."""
    given = module.generation_config.eos_token_id
    marks = frozenset(given if isinstance(given, list) else [given])
    if tokenizer.eos_token_id not in marks or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{where}: the tokenizer ends texts with {tokenizer.eos_token_id}, generation_config "
            f"with {sorted(x for x in marks if x is not None)} (accepted: the same)"
        )
    return marks


def load_reader(
    config: ReaderConfig,
    device: torch.device | str = "cpu",
    *,
    trains: bool = True,
    at: str = "policy.weights",
) -> Reader:
    """Loads a verifier for training: adapters (fresh, B at zero) or all weights require gradients;
    or, where it does not train, for asking alone.

    Of weights that do not train the dtype is `config.dtype`; what trains is float32. at: the
    setting that names them. Raises `ConfigError` for what cannot be loaded, and for weights that
    are not finite.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = _where(config, at)
    assert config.weights is not None
    stored = stored_dtype(config, trains)
    with reading(f"{where} ({ACCEPTED_WEIGHTS})"):
        processor = AutoProcessor.from_pretrained(config.weights)
        module, said = AutoModelForImageTextToText.from_pretrained(
            config.weights, dtype=stored, output_loading_info=True
        )
    if lacking := sorted(said["missing_keys"]):  # transformers draws what is not there
        raise ConfigError(
            f"{where}: lacks {len(lacking)} of the model's weights, {lacking[0]} the first "
            f"({ACCEPTED_WEIGHTS})"
        )
    if name := unusable(module.named_parameters()):
        raise ConfigError(f"{where}: {name}: NaN, infinite or too large ({ACCEPTED})")
    if not trains:
        module.requires_grad_(False)
    elif config.lora_rank:
        adapt(module, config)
    if config.gradient_checkpointing:
        checkpoint_layers(module)
    module.eval()
    reader = Reader(module, processor, config, where)
    module.to(device)
    return reader


def sketch_reader(config: ReaderConfig, *, at: str = "policy.weights") -> Reader:
    """A verifier that does not train, whole but for its weights, which lie on the meta device: it
    makes prompts, and its module has the shapes and dtypes of what `load_reader` loads.

    at: the setting that names it. Raises `ConfigError` for what `load_reader` would refuse, as far
    as that can be seen without reading weights: a folder or hub id that is not there, another kind
    of model, no processor or chat template, weights that are missing, cut short, or too few.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        GenerationConfig,
    )
    from transformers.utils import is_peft_available

    where = _where(config, at)
    assert config.weights is not None
    folder = Path(config.weights)
    check_model(config.weights, at, "config.json")
    alone = (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()
    with reading(f"{where} ({ACCEPTED_WEIGHTS})"), torch.random.fork_rng(devices=[]):
        model = _adapted(folder) if alone and is_peft_available() else config.weights
        form = AutoConfig.from_pretrained(model)
        processor = AutoProcessor.from_pretrained(config.weights)
        with torch.device("meta"):
            module = AutoModelForImageTextToText.from_config(
                form, dtype=stored_dtype(config, False)
            )
        with suppress(OSError):  # without one, or a sound one, it follows from config.json
            module.generation_config = GenerationConfig.from_pretrained(model)
    if folder.is_dir():
        check_weights_beside(folder, module, where, ACCEPTED_WEIGHTS)
    return Reader(module.requires_grad_(False).eval(), processor, config, where)


def _adapted(folder: Path) -> str:
    """The model that an adapter's folder is for, which transformers loads beneath it."""
    said = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return str(said["base_model_name_or_path"])


def _where(config: ReaderConfig, at: str) -> str:
    """What errors about the weights begin with. Raises `ConfigError` for a folder that is not
    there."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = f"{at}: {shown(config.weights)}"
    given = str(config.weights)
    if given.startswith((".", "/", "~")) and not Path(given).is_dir():
        raise ConfigError(f"{where}: no such folder ({ACCEPTED_WEIGHTS})")
    return where


def stored_dtype(config: ReaderConfig, trains: bool) -> torch.dtype:
    """Of weights in memory: what trains is float32."""
    frozen = config.lora_rank or not trains
    return torch.bfloat16 if config.dtype == "bfloat16" and frozen else torch.float32


def weights_fingerprint(weights: str) -> str:
    """Of a verifier's folder by its content, of a hub id by its commit."""
    folder = Path(weights)
    return folder_fingerprint(folder) if folder.is_dir() else hub_revision(weights, "config.json")


def checkpoint_layers(module: Any) -> None:
    """Has layers computed again in the backward."""
    newer = getattr(module, "activation_checkpointing_enable", None)  # its name since 5.23
    (newer or module.gradient_checkpointing_enable)({"use_reentrant": False})
    # Re-entrant checkpoints need inputs that require gradients, which transformers therefore sees
    # to; the backward would pass through what looks at pictures, where nothing trains.
    module.disable_input_require_grads()


def adapt(module: nn.Module, config: ReaderConfig) -> None:
    """Puts adapters on; nothing else trains."""
    add_lora(module, config.lora_rank, config.lora_alpha, config.lora_targets or LORA_TARGETS)
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()
