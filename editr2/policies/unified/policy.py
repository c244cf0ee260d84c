"""The unified policy: reads the whole session, writes its intent before a turn, then paints (BAGEL
architecture).

Context: `image_0, text_1, image_1, text_2, ...`, every output image read back in. An intent is
written on a branch of the context behind a question that lists the raw instructions; the branch is
then dropped, so only the intent's text enters the session (Edit-R2, arXiv 2606.05950, section on
intent reconstruction).

Guidance keeps up to two more contexts beside the full one (BAGEL): without the current instruction,
and of the texts alone. Their velocities leave beside the full one and the kernels combine them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from editr2.policies.base import (
    Intent,
    Questions,
    TokenScores,
    TurnReplay,
    TurnTask,
    Velocity,
)
from editr2.policies.blocks import recompute_blocks
from editr2.policies.blueprint import adapters_without_data, simulated
from editr2.policies.configured import ConfiguredPolicy
from editr2.policies.encodes import Kept, Row, digest_of
from editr2.policies.finite import ACCEPTED, unusable
from editr2.policies.tensor_files import (
    check_shapes,
    read_header,
    read_json,
    read_tensors,
    write_tensors,
    writing,
)
from editr2.policies.tokens import THINK_END, TextCodec, word_tokenizer
from editr2.policies.unified import experts
from editr2.policies.unified.blueprint import UnifiedBlueprint
from editr2.policies.unified.codecs import ImageCodec, PixelCodec
from editr2.policies.unified.experts import adapt, check_start, freeze_rest, load_adapters
from editr2.policies.unified.guidance import (
    NONE,
    AnyContext,
    Guidance,
    GuidedContext,
    full_of,
    is_guided,
)
from editr2.policies.unified.model import Branch, Context, UnifiedConfig, UnifiedModel
from editr2.policies.unified.packed import (
    SESSION,
    TEXTS,
    Past,
    Segment,
    packed_is_cheaper,
    read_public,
    run_private,
    token_counts,
    worth_reading,
)
from editr2.policies.unified.questions import MODES, Wording, wording_of
from editr2.policies.unified.sight import Sight
from editr2.policies.weights import merged_weights
from editr2_kernels import philox_normal, token_log_prob

EMBEDDED = Path(__file__).parent.parent.parent / "assets" / "unified-small"
SIZES, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
"""The files of a folder."""

BUCKET = 64  # tokens; the embedded world's turns are about 50 long
KEPT_BYTES = 4 << 30
"""Of what frozen parts make of images, on the host: some 400 of 512 x 512 pixels as BAGEL sees them
in bfloat16, more than a process reads in an iteration of the recipes."""


def read_intent(answer: str) -> tuple[str | None, str]:
    """(intent or None, reasoning) of a decoded answer: the intent is what follows `</think>`."""
    thought, found, intent = answer.partition(THINK_END)
    intent = " ".join(intent.split())
    return (intent if found and intent else None), " ".join(thought.split())


def read_parts(folder: Path) -> tuple[UnifiedConfig, TextCodec]:
    """Sizes and words of a unified policy's folder, whose weights fit them; the weights themselves
    are not read.

    Raises a `UserError` that names the file and key of what is missing, broken or does not fit the
    rest.
    """
    for name in (SIZES, TOKENIZER, WEIGHTS):
        if not (folder / name).is_file():
            run = folder / "policy"  # that of the folder of a run
            found = f", such as {run}" if (run / name).is_file() else ""
            raise CheckpointError(
                f"{folder}: no {name} (accepted: what `editr2 world pretrain` wrote, or a run's "
                f"policy/{found})"
            )
    config, codec = UnifiedConfig.load(folder / SIZES), TextCodec.load(folder / TOKENIZER)
    if (words := 1 + max(codec.tokenizer.get_vocab().values())) > config.vocab_size:
        raise CheckpointError(
            f"{folder / SIZES}: vocab_size: {config.vocab_size} (accepted: at least {words}, the "
            f"words of {TOKENIZER})"
        )
    if config.latent_channels != 3:
        raise CheckpointError(
            f"{folder / SIZES}: latent_channels: {config.latent_channels} (accepted: 3; this "
            f"policy paints pixels)"
        )
    with torch.device("meta"):
        needed = {name: tuple(t.shape) for name, t in UnifiedModel(config).state_dict().items()}
    shapes, _ = read_header(folder / WEIGHTS)
    check_shapes(folder / WEIGHTS, shapes, needed, f"the model that {SIZES} describes")
    return config, codec


def computing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs the model: in the policy's computing precision."""

    @wraps(method)
    def run(self: Any, *args: Any, **how: Any) -> Any:
        with self.autocast():
            return method(self, *args, **how)

    return run


@dataclass(frozen=True)
class _Kind:
    """What is written for the questions of a kind. asked: the ids behind which one is, given the
    policy, earlier and current instructions and the mode. read: text and reasoning of what was
    written, without its end mark."""

    asked: Callable[[UnifiedPolicy, Sequence[str], str, str | None], list[int]]
    read: Callable[[TextCodec, list[int]], tuple[str | None, str]]


def _intent(codec: TextCodec, ids: list[int]) -> tuple[str | None, str]:
    text, thought = read_intent(codec.decode(ids))
    if text is not None and not codec.can_say(text):
        text = None  # a fallback, nobody's fault: a mark or an unknown word was sampled
    return text, thought


def _thought(codec: TextCodec, ids: list[int]) -> tuple[str | None, str]:
    return codec.tokenizer.decode(ids, skip_special_tokens=False), ""


KINDS = {
    "intent": _Kind(lambda policy, *asked: policy.question_ids(*asked), _intent),
    "thought": _Kind(lambda policy, *_: [policy.codec.im_start], _thought),
}
"""By the kind of the questions. A thought answers what the context holds already."""


class UnifiedPolicy(ConfiguredPolicy):
    """`PackedPolicy` and `TextPolicy` over a `UnifiedModel`. Latents are pixels (the embedded
    world's) or an autoencoder's, as the image codec says; what understanding sees of an image
    besides them, if anything, comes from a frozen `Sight`.

    Images have one size, by default the largest: `max_latent_size` latent tokens a side. Contexts
    are `Context`, or `GuidedContext` where `guidance` has a weight other than 1.
    """

    writes_text = True
    uses = ConfiguredPolicy.uses | {
        *("guidance", "guidance_image", "guidance_interval", "renorm"),
        *("lora_rank", "lora_alpha", "lora_targets", "lora_weights", "experts"),
        *("gradient_checkpointing", "questions"),
    }
    default_weights = "the small model shipped with editr2"
    holds = f"{SIZES}, {TOKENIZER} and {WEIGHTS}"

    thinks = False
    system: str | None = None
    """What stands before every session, if anything."""
    most_references: int | None = 0
    """As `ReferringPolicy`."""
    compute_dtype = torch.float32
    wording: Wording
    """What intents are asked for with. The shipped weights were pretrained on `rewrite` alone and
    answer the others almost as well."""
    asked: ClassVar[str] = "embedded"
    """The folder of `prompts/` with its own questions."""
    apart = False
    """Whether guidance's branches run one after the other, none padded to the longest."""

    def __init__(
        self,
        model: UnifiedModel,
        codec: TextCodec,
        guidance: Guidance = NONE,
        images: ImageCodec | None = None,
        sight: Sight | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """images: reads and paints them, pixels by default. sight: None sees latents alone.
        image_size: (H, W) in pixels. Raises `DataError` for latents of another kind than the
        model's."""
        config = model.config
        if images is None and config.latent_channels != 3:
            raise DataError(
                f"latent_channels: {config.latent_channels}; this policy paints pixels (accepted: "
                f"3). A model on an "
                "autoencoder's latents needs a policy that holds the autoencoder"
            )
        self.module = model
        self.codec = codec
        self.wording = wording_of(self.asked, None)
        self.guidance = guidance
        self.patch = config.latent_patch_size
        self.images: ImageCodec = images or PixelCodec(self.patch)
        if self.images.channels != config.latent_channels:
            raise DataError(
                f"latent_channels: {config.latent_channels} (accepted: {self.images.channels}, "
                f"those of the autoencoder)"
            )
        self.sight = sight
        self._take(image_size or (config.max_latent_size * self.images.side,) * 2)
        self._marks = torch.tensor([codec.vision_start, codec.vision_end])
        self._kept = Kept(KEPT_BYTES)

    def _take(self, size: tuple[int, int]) -> None:
        """Sets what follows from the size in pixels."""
        self.image_size = size
        self.grid = (size[0] // self.images.side, size[1] // self.images.side)
        self.latent_shape = (self.grid[0] * self.grid[1], self.module.config.latent_dim)
        seen = self.sight.size(*size) if self.sight is not None else None
        self.seen_tokens = 0 if seen is None else seen[0] * seen[1]

    @staticmethod
    def load(folder: Path = EMBEDDED, guidance: Guidance = NONE) -> UnifiedPolicy:
        """Weights (`model.safetensors`), `config.json` and `tokenizer.json` from a folder; fp32
        whatever is stored.

        Raises a `UserError` that names the file and key of what is missing, broken or does not fit
        the rest.
        """
        config, codec = read_parts(folder)
        weights = read_tensors(folder / WEIGHTS)
        model = UnifiedModel(config)
        model.load_state_dict({k: v.float() for k, v in weights.items()})
        return UnifiedPolicy(model.eval(), codec, guidance)

    @classmethod
    def from_config(
        cls, config: PolicyConfig, *, trains: bool = True, empty: bool = False
    ) -> UnifiedPolicy:
        (folder,) = cls.sources(config)
        policy = cls.load(Path(folder), Guidance.of(config))
        policy.ask_with(config.questions)
        load_adapters(policy.module, config, trains)
        if not config.lora_rank:
            freeze_rest(policy.module, config)
        recompute_blocks(policy.module, config.gradient_checkpointing)
        return policy

    @classmethod
    def problems(cls, config: PolicyConfig, trains: bool = True) -> Iterator[str]:
        yield from super().problems(config, trains)
        low, high = config.guidance_interval
        if not low < high:
            yield (
                f"policy.guidance_interval: {list(config.guidance_interval)} (accepted: [low, "
                f"high] with low < high)"
            )
        yield from experts.problems(config, trains)

    @classmethod
    def sources(cls, config: PolicyConfig) -> list[str]:
        return [config.weights or str(EMBEDDED)]

    @classmethod
    def fingerprints(cls, config: PolicyConfig) -> dict[str, str]:
        if config.questions is None:
            return {}
        prompts = wording_of(cls.asked, config.questions).prompts
        return {"questions": f"{prompts.origin} {prompts.digest}"}

    @classmethod
    def owns(cls, folder: Path) -> bool:
        # The names alone are those of many a language model.
        named = all((folder / name).is_file() for name in (SIZES, TOKENIZER, WEIGHTS))
        return named and "latent_patch_size" in read_json(folder / SIZES)

    @classmethod
    def blueprint(cls, config: PolicyConfig) -> UnifiedBlueprint:
        (folder,) = cls.sources(config)
        sizes, codec = read_parts(Path(folder))
        check_start(sizes, config)
        with simulated():
            module = UnifiedModel(sizes)
        if config.lora_rank:
            with adapters_without_data(module, torch.float32):
                adapt(module, config)
        else:
            freeze_rest(module, config)
        with simulated():
            policy = cls(module, codec, Guidance.of(config))
        policy.ask_with(config.questions)
        return UnifiedBlueprint(policy, config)

    @classmethod
    def loading(cls, model: str, weights: str | None) -> list[str]:
        folder = f'Path("{weights}")' if weights else ""
        return [
            *(["from pathlib import Path", ""] if weights else []),
            "from editr2.policies.unified.policy import UnifiedPolicy",
            "",
            f"policy = UnifiedPolicy.load({folder})",
        ]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes what `load` reads, adapters merged, weights rounded to `dtype`. Raises
        `NonFiniteError` for a weight that is not finite in it."""
        weights = {
            k: v.detach().to("cpu", dtype).contiguous()
            for k, v in merged_weights(self.module).items()
        }
        if name := unusable(weights.items()):
            raise NonFiniteError(
                f"{folder}: {name}: NaN, infinite or too large in {dtype} ({ACCEPTED}); not written"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(weights, folder / WEIGHTS)
            (folder / SIZES).write_text(
                json.dumps(dataclasses.asdict(self.module.config), indent=1) + "\n"
            )
            self.codec.tokenizer.save(str(folder / TOKENIZER))

    # ------------------------------------------------------------------------------------- protocol

    @property
    def device(self) -> torch.device:
        return self.module.vae2llm.weight.device

    @property
    def marks(self) -> Tensor:
        if self._marks.device != self.device:  # moved once: a copy from the host cannot be captured
            self._marks = self._marks.to(self.device)
        return self._marks

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the model, whose trained weights are float32 whatever it computes in."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    @computing
    def begin(self, batch: int, system: str | None = None) -> AnyContext:
        """Contexts that nothing was read into, or a system prompt, which guidance drops with
        nothing."""
        empty = self.module.empty_context(batch, self.device)
        if system is not None:
            empty = self._read(empty, *self._words([self.text_ids(system)] * batch))
        return self.guided(empty, empty, empty) if self.guidance.active else empty

    @computing
    def encode(self, images: np.ndarray, references: Sequence[np.ndarray] = ()) -> AnyContext:
        context = self.begin(len(images), self.system)
        for each in (images, *references):
            context = self.append(context, each)
        return context

    def _words(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """ids and valid [B, L] on the device."""
        ids, valid = self.codec.pad(rows)
        return ids.to(self.device), valid.to(self.device)

    @computing
    def instruct(self, context: AnyContext, instructions: Sequence[str]) -> AnyContext:
        ids, valid = self._words([self.text_ids(c) for c in instructions])
        full = self._read(full_of(context), ids, valid)
        if not isinstance(context, GuidedContext):
            return full
        texts = context.image_dropped
        return self.guided(full, context.full, texts and self._read(texts, ids, valid))

    @computing
    def append(self, context: AnyContext, images: np.ndarray) -> AnyContext:
        full = self._append(full_of(context), images)
        if not isinstance(context, GuidedContext):
            return full
        return self.guided(full, full, context.image_dropped)

    def _append(self, context: Context, images: np.ndarray) -> Context:
        latents, seen = self._looked_at(images)
        given = (context, latents, self.grid, self.marks)
        read: Context = self.module(lambda model: model.append_image(*given))
        if seen is not None:  # a call of its own: each gathers every layer once
            read = self.module(lambda model: model.append_seen(read, seen, self.marks))
        return read

    def _read(self, context: Context, ids: Tensor, valid: Tensor) -> Context:
        read: Context = self.module(lambda model: model.append_text(context, ids, valid)[0])
        return read

    def _predicted(self, context: Context, x: Tensor, sigma: Tensor) -> Tensor:
        given = (context, x, sigma, self.grid, self.marks)
        v: Tensor = self.module(lambda model: model.velocity(*given))
        return v

    def _looked_at(self, images: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Latents [B, N, D] of images and what understanding sees of them [B, M, H]. Frozen parts
        are asked once an image while it is kept: training starts from what the rollout encoded."""
        if images.shape[1:3] != self.image_size:
            raise DataError(
                f"images: {images.shape[1]} x {images.shape[2]} px (accepted: {self.image_size})"
            )
        if self.sight is None:
            return self.images.read(images, self.device), None
        sight = self.sight

        def encoded(at: list[int]) -> list[Row]:
            both = (self.images.read(images[at], self.device), sight(images[at], self.device))
            return [{"latents": a, "seen": b} for a, b in zip(*both, strict=True)]

        rows = self._kept.rows([digest_of(image) for image in images], encoded, lambda i: False)
        latents, seen = (
            torch.stack([row[name] for row in rows]).to(self.device) for name in ("latents", "seen")
        )
        return latents, seen

    def guided(
        self, full: Context, text_dropped: Context, image_dropped: Context | None
    ) -> GuidedContext:
        g = self.guidance
        return GuidedContext(
            full, text_dropped if g.text != 1 else None, image_dropped if g.image != 1 else None
        )

    @computing
    def velocity(self, x: Tensor, sigma: Tensor, context: AnyContext) -> Velocity:
        if not isinstance(context, GuidedContext):
            return Velocity(self._predicted(context, x, sigma))
        n = len(context.branches)
        if self.apart:
            v, *dropped = (self._predicted(c, x, sigma) for c in context.branches)
        else:
            x, sigma = x.repeat(n, *(1,) * (x.dim() - 1)), sigma.repeat(n)
            v, *dropped = self._predicted(context.joined, x, sigma).chunk(n)
        return self._beside(v, dropped)

    def _beside(self, v: Tensor, dropped: Sequence[Tensor]) -> Velocity:
        """A velocity with those of its branches, as guidance asks for them: without the current
        instruction, without images."""
        g = self.guidance
        options: dict[str, object] = {"guidance_interval": g.interval, "renorm": g.renorm}
        if g.text != 1:
            options |= {"v_uncond": dropped[0], "guidance": g.text}
        if g.image != 1:
            options |= {"v_uncond_image": dropped[-1], "guidance_image": g.image}
        return Velocity(v, options)

    def select(self, context: AnyContext, index: Tensor) -> AnyContext:
        index = index.to(self.device)
        if isinstance(context, GuidedContext):
            return context.map(lambda c: c.select(index))
        return context.select(index)

    def join(self, contexts: Sequence[AnyContext]) -> AnyContext:
        guided = [c for c in contexts if isinstance(c, GuidedContext)]
        return (
            GuidedContext.join_all(guided)
            if guided
            else Context.join([full_of(c) for c in contexts])
        )

    def bucket(self, context: AnyContext) -> AnyContext:
        """Padded to the next multiple of `BUCKET` tokens, and always by one: one form, masked, for
        every length."""

        def padded(c: Context) -> Context:
            return c.pad((c.valid.shape[1] // BUCKET + 1) * BUCKET)

        return context.map(padded) if isinstance(context, GuidedContext) else padded(context)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.images.paint(latents, self.grid)

    # ----------------------------------------------------------------------------------------- text

    def writes_text_with(self, name: str) -> bool:
        return experts.writes(name)

    def unreadable(
        self, instructions: Sequence[str], references: int = 0
    ) -> Iterator[tuple[int, str]]:
        """As `ReadingPolicy.unreadable`: words that the vocabulary does not hold; a context has any
        length."""
        for turn, text in enumerate(instructions):
            try:
                self.text_ids(text)
            except DataError as error:
                yield (
                    turn,
                    f"{error} (accepted: words of the policy's own; an editor of another "
                    f"policy.model, such as klein, takes any)",
                )

    def text_ids(self, text: str) -> list[int]:
        return [self.codec.im_start, *self.codec.encode(text), self.codec.im_end]

    def ask_with(self, questions: str | None) -> None:
        """Takes the questions that `policy.questions` names. Raises `ConfigError` where they are
        not there, or not in the policy's words."""
        self.wording = wording_of(self.asked, questions)
        for mode in MODES if questions is not None else ():
            try:
                self.text_ids(self.wording([], "", mode))
            except DataError as error:
                raise ConfigError(
                    f"policy.questions: {questions}: {mode}: {error} (accepted: the policy's words)"
                ) from None

    def question_ids(
        self, earlier: Sequence[str], current: str, mode: str | None = None
    ) -> list[int]:
        """The question and the opening mark of the answer."""
        return [*self.text_ids(self.wording(earlier, current, mode)), self.codec.im_start]

    def _question_rows(self, questions: Questions) -> list[list[int]]:
        q, asked = questions, KINDS[questions.kind].asked
        return [asked(self, e, c, m) for e, c, m in zip(q.earlier, q.current, q.modes, strict=True)]

    @torch.no_grad()
    @computing
    def intend(
        self,
        context: AnyContext,
        questions: Questions,
        seeds: Tensor | None,
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Intent]:
        """As `TextPolicy.intend`, and of thoughts. Log-probs are those under softmax(logits /
        temperature), of greedy tokens too; temperature 0 is greedy and counts as 1 for them.
        Without an end mark, ids are all the `max_tokens` sampled."""
        read, intents = KINDS[questions.kind].read, []
        for ids, log_prob in self._written(
            context, self._question_rows(questions), seeds, temperature, max_tokens
        ):
            end = ids.index(self.codec.im_end) if self.codec.im_end in ids else len(ids)
            intents.append(Intent(*read(self.codec, ids[:end]), tuple(ids), tuple(log_prob)))
        return intents

    def _written(
        self,
        context: AnyContext,
        rows: list[list[int]],
        seeds: Tensor | None,
        temperature: float,
        max_tokens: int,
    ) -> list[tuple[list[int], list[float]]]:
        """What is written behind these ids on a branch of each sample's context, up to the end mark
        and with it: sampled ids and their log-probs, as `intend` has them."""
        ids, valid = self._words(rows)
        branch = Branch(full_of(context), ids.shape[1] + max_tokens)
        at = (torch.arange(len(rows)), valid.sum(1) - 1)
        logits: Tensor = self.module(
            lambda model: model.logits(model.extend_branch(branch, ids, valid)[at])
        )
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        sampled: list[Tensor] = []
        scored: list[Tensor] = []
        for k in range(max_tokens):
            token = torch.where(done, 0, self._sample(logits, seeds, k, temperature))
            sampled.append(token)
            scored.append(token_log_prob(logits, token, temperature=temperature or 1.0).log_prob)
            still = ~done
            done = done | (token == self.codec.im_end)
            if bool(done.all()) or k + 1 == max_tokens:
                break
            logits = self._next(branch, token, still)
        written = []
        for row, log_prob in zip(
            torch.stack(sampled, 1).tolist(), torch.stack(scored, 1).tolist(), strict=True
        ):
            end = row.index(self.codec.im_end) if self.codec.im_end in row else len(row)
            written.append((row[: end + 1], log_prob[: end + 1]))
        return written

    def _next(self, branch: Branch, token: Tensor, valid: Tensor) -> Tensor:
        """Logits behind one more token each."""
        given = (branch, token[:, None], valid[:, None])
        logits: Tensor = self.module(lambda model: model.logits(model.extend_branch(*given)[:, 0]))
        return logits

    def think(
        self,
        context: AnyContext,
        seeds: Tensor | None = None,
        *,
        temperature: float = 1.0,
        max_tokens: int,
    ) -> list[str]:
        """What each sample thinks before it paints (BAGEL's thinking, behind `begin` with a system
        prompt), at most so many tokens; `consider` takes it. seeds: as of `intend`."""
        batch = full_of(context).batch
        asked = Questions([[]] * batch, [""] * batch, [None] * batch, "thought")
        thoughts = self.intend(
            context, asked, seeds, temperature=temperature, max_tokens=max_tokens
        )
        return [thought.text or "" for thought in thoughts]

    @computing
    def consider(self, context: AnyContext, thoughts: Sequence[str]) -> AnyContext:
        """As `ThinkingPolicy.consider`; guidance's other branches do not know it. Marks in a
        thought are marks: the model wrote them."""
        full = self._read(full_of(context), *self._words(self._thought_rows(thoughts)))
        return dataclasses.replace(context, full=full) if is_guided(context) else full

    def _thought_rows(self, thoughts: Sequence[str]) -> list[list[int]]:
        codec = self.codec
        return [[codec.im_start, *codec.encode(t, marks=True), codec.im_end] for t in thoughts]

    @computing
    def answer_log_prob(
        self,
        context: AnyContext,
        questions: Questions,
        answers: Sequence[tuple[int, ...]],
        *,
        temperature: float,
    ) -> TokenScores:
        """As `TextPolicy.answer_log_prob`, under the distribution of `intend`; an empty answer
        scores nothing."""
        if not any(answers):
            return self._no_scores(len(answers))
        ids, valid, first = self._asked(questions, answers)
        seen = full_of(context)
        scores: TokenScores = self.module(
            lambda model: self._scores(
                model.text_hidden(seen, ids, valid), first, answers, temperature
            )
        )
        return scores

    def _asked(
        self, questions: Questions, answers: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Questions with their answers as ids and valid [B, L], and where the first answer token is
        predicted [B].

        An answer's last token is left out: nothing is predicted from it."""
        rows = self._question_rows(questions)
        both = [row + list(answer[:-1]) for row, answer in zip(rows, answers, strict=True)]
        ids, valid = (x.to(self.device) for x in self.codec.pad(both))
        return ids, valid, torch.tensor([len(row) - 1 for row in rows], device=self.device)

    def _scores(
        self, hidden: Tensor, first: Tensor, answers: Sequence[tuple[int, ...]], temperature: float
    ) -> TokenScores:
        """From final hidden states [B, L, H] of what `_asked` gives."""
        ids, valid = (
            x.to(self.device) for x in self.codec.pad([list(answer) for answer in answers])
        )
        # Past the end of an answer any state will do: ignored ids are not looked at.
        at = (first[:, None] + torch.arange(ids.shape[1], device=self.device)).clamp(
            max=hidden.shape[1] - 1
        )
        states = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))
        weight = self.module.language_model.lm_head.weight.to(states.dtype)
        scored = token_log_prob(
            (states, weight),
            ids.masked_fill(~valid, -100),
            temperature=temperature or 1.0,
            ignore_index=-100,
        )
        return TokenScores(scored.log_prob, valid)

    @staticmethod
    def _sample(logits: Tensor, seeds: Tensor | None, position: int, temperature: float) -> Tensor:
        """Greedy, or by inverse transform with one counter-based uniform per sample and token."""
        if seeds is None or temperature == 0:
            return logits.argmax(-1)
        normal = philox_normal(seeds, position, (1,))
        uniform = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
        return (cumulative < uniform * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)

    # --------------------------------------------------------------------------------------- packed

    def packs(self, turns: Sequence[TurnTask], *, context_gradient: bool) -> bool:
        """As `PackedPolicy.packs`; on a CPU only: on no GPU has it been measured, nor run."""
        scored = [[one for one in turn.asked.values() if any(one[1])] for turn in turns]
        if self.device.type != "cpu" or not any(
            turn.sigma.numel() or one for turn, one in zip(turns, scored, strict=True)
        ):
            return False
        # Thoughts and what stands before a session count as words of the instructions, of which
        # guidance's branches have fewer.
        text = [max(len(self.text_ids(c)) for c in turn.text) for turn in turns]
        for i, turn in enumerate(turns):
            text[i] += max(map(len, self._thought_rows(turn.thoughts or [])), default=0)
        text[0] += 0 if self.system is None else len(self.text_ids(self.system))
        asked = [sum(self._asked(*one)[0].shape[1] for one in each) for each in scored]
        noisy = [turn.sigma.shape[1] for turn in turns]
        seen = self.seen_tokens and self.seen_tokens + len(self.marks)
        painted = self.grid[0] * self.grid[1] + len(self.marks)
        dropped = (self.guidance.text != 1, self.guidance.image != 1)
        how: Any = {"seen": seen, "dropped": dropped, "together": not self.apart}
        counts = token_counts(painted, text, noisy, asked, **how)
        return packed_is_cheaper(
            self.module, counts, len(turns[0].text), 1 if context_gradient else 2
        )

    def replay_packed(
        self,
        images: np.ndarray,
        turns: Sequence[TurnTask],
        *,
        context_gradient: bool,
        temperature: float,
        references: Sequence[np.ndarray] = (),
    ) -> list[TurnReplay]:
        """As `PackedPolicy.replay_packed`. Two calls of the module, the context and what is asked
        behind it, or one with gradient through the context; each goes through the layers once."""
        segments, laid = self._laid_out(images, references, turns)
        kept = worth_reading(segments)
        if not kept:
            return [self._nothing(turn) for turn in turns]
        read, grid = [segments[number] for number in kept], self.grid
        past: Past | None = None
        if not context_gradient:
            # An autocast of its own: one keeps its casts of weights, and these have no graph.
            with torch.no_grad(), self.autocast():
                past = self.module(lambda model: read_public(model, read, grid))

        def answered(model: UnifiedModel) -> list[TurnReplay]:
            found = run_private(model, read, grid, past)
            hidden = {kept[number]: states for number, states in found.items()}
            done = []
            for turn, (questions, places) in zip(turns, laid, strict=True):
                none = self._nothing(turn)
                velocity, scores = none.velocity, none.scores
                if places[0]:
                    v, *dropped = (
                        model.llm2vae(torch.stack([hidden[number] for number in numbers], 1))
                        for numbers in places
                    )
                    velocity = self._replayed(v.flatten(0, 1), [d.flatten(0, 1) for d in dropped])
                for kind, (number, first) in questions.items():
                    answers = turn.asked[kind][1]
                    scores[kind] = self._scores(hidden[number], first, answers, temperature)
                done.append(TurnReplay(velocity, scores.get("intent"), scores.get("thought")))
            return done

        with self.autocast():
            replayed: list[TurnReplay] = self.module(answered)
        return replayed

    def _replayed(self, v: Tensor, dropped: Sequence[Tensor]) -> Velocity:
        return self._beside(v, dropped) if self.guidance.active else Velocity(v)

    def _nothing(self, turn: TurnTask) -> TurnReplay:
        """Of a turn where nothing is asked."""
        nothing = turn.x.flatten(0, 1)
        dropped = [nothing] * (len(self._branches) - 1)
        scores = {kind: self._no_scores(len(one[1])) for kind, one in turn.asked.items()}
        velocity = self._replayed(nothing, dropped)
        return TurnReplay(velocity, scores.get("intent"), scores.get("thought"))

    @property
    def _branches(self) -> list[str]:
        """What a velocity is predicted behind: everything, and what guidance drops."""
        g = self.guidance
        weights = {"full": 0.0, "text_dropped": g.text, "image_dropped": g.image}
        return [name for name, weight in weights.items() if weight != 1]

    def _laid_out(
        self, images: np.ndarray, references: Sequence[np.ndarray], turns: Sequence[TurnTask]
    ) -> tuple[list[Segment], list[tuple[dict[str, tuple[int, Tensor]], list[list[int]]]]]:
        """Sessions as segments; and of every turn the numbers of its questions with where the
        answers start [B], by kind, and those of its noisy images, by branch."""
        b, branches = len(images), self._branches
        marks = self.marks.expand(b, -1)
        both = torch.ones(b, 2, dtype=torch.bool, device=self.device)
        segments: list[Segment] = []
        laid: list[tuple[dict[str, tuple[int, Tensor]], list[list[int]]]] = []

        def put(*more: Segment) -> list[int]:
            segments.extend(more)
            return list(range(len(segments) - len(more), len(segments)))

        def said(rows: list[list[int]], *chains: int) -> None:
            words = self._words(rows)
            put(*(Segment(*words, chain=chain) for chain in chains))

        def asked(turn: TurnTask, kind: str) -> dict[str, tuple[int, Tensor]]:
            questions, answers = turn.asked.get(kind, (None, []))
            if questions is None or not any(answers):
                return {}
            ids, valid, first = self._asked(questions, answers)
            return {kind: (put(Segment(ids, valid, private=True))[0], first)}

        def noisy(turn: TurnTask, chain: int = SESSION) -> list[int]:
            pairs = zip(turn.x.unbind(1), turn.sigma.unbind(1), strict=True)
            return put(
                *(Segment(marks, both, x, sigma, private=True, chain=chain) for x, sigma in pairs)
            )

        texts = [TEXTS] if "image_dropped" in branches else []
        if self.system is not None:
            said([self.text_ids(self.system)] * b, SESSION, *texts)
        for turn in turns:
            for each in (images, *references):
                latents, seen = self._looked_at(each)
                put(Segment(marks, both, latents))
                if seen is not None:
                    put(Segment(marks, both, seen=seen))
            questions = asked(turn, "intent")
            places: dict[str, list[int]] = {}
            if "text_dropped" in branches:
                places["text_dropped"] = noisy(turn)
            said([self.text_ids(c) for c in turn.text], SESSION, *texts)
            if turn.thoughts is not None:
                questions |= asked(turn, "thought")
                said(self._thought_rows(turn.thoughts), SESSION)
            places["full"] = noisy(turn)
            if texts:
                places["image_dropped"] = noisy(turn, TEXTS)
            laid.append((questions, [places[name] for name in branches]))
            images, references = turn.images, ()
        return segments, laid

    def _no_scores(self, batch: int) -> TokenScores:
        nothing = torch.zeros(batch, 0, device=self.device)
        return TokenScores(nothing, nothing.bool())


def world_codec_words() -> list[str]:
    """The embedded vocabulary: the world's words and those of the question."""
    from editr2.worlds.shapes import WORDS

    return [*WORDS, "earlier", "now", "rewrite", ":", ";"]


def new_embedded_policy(config: UnifiedConfig, seed: int) -> UnifiedPolicy:
    """A randomly initialised policy over the world's vocabulary."""
    tokenizer = word_tokenizer(world_codec_words())
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise DataError(
            f"vocab_size: {config.vocab_size} < {tokenizer.get_vocab_size()} words of the world"
        )
    model = UnifiedModel(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return UnifiedPolicy(model, TextCodec.of(tokenizer))
