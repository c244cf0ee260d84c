"""A verifier's folder in this process, asked as a judge behind a server is (`rewards.client`).

    local = Local(options, record)
    with local.ahead(questions): ...        # all of them at once; `chat` then finds the answers
    local.answers([Question(...), ...])     # or at once without a chat

An answer follows from its question and its seed alone. Questions that are answered together are
laid out so that nobody's numbers depend on who else there is: prompts are filled up to a multiple
of `STEP` tokens, each batch holds prompts of one such length, and the last one is filled up with
rows that nobody asked for. So every matrix product has the same shape in a run of one process and
of eight, and on a CPU its rows are the same bits whatever the others hold (seen for float32 and
bfloat16; between numbers of rows, float32 differs in the last bits).

What was answered is on the record under the question, the seed and a fingerprint of the weights. A
batch of which an answer is missing is sampled again whole, and those that are known stand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from editr2.errors import ConfigError, DataError, UserError, one_line, plain, shown
from editr2.rewards.base import Held
from editr2.rewards.client import Answer, Failure, Part, vote_seed
from editr2.rewards.models import DEVICES, TRAINER, bytes_of, device_of, known_device
from editr2.rewards.record import Record, calls_of, pixel_digest, request_key
from editr2.rewards.verifier import SHIPPED, VerifierOptions
from editr2.run.hub import HUB_ID
from editr2.verifier.estimate import answering
from editr2.verifier.model import (
    ACCEPTED_WEIGHTS,
    Prompt,
    load_reader,
    sketch_reader,
    weights_fingerprint,
)
from editr2.verifier.settings import ReaderConfig

if TYPE_CHECKING:
    from editr2.verifier.model import Reader

STEP = 64
"""Tokens."""

FORM = 1
"""Of how questions are laid out, which answers depend on to rounding."""


@dataclass(frozen=True)
class Question:
    """What is asked, and how often.

    Args:
        images: uint8 [H, W, 3], in front of the text.
        seeds: of each answer; None is greedy.
        where: what the record says of it.
        of: what errors begin with.
    """

    images: tuple[np.ndarray, ...]
    text: str
    seeds: tuple[int | None, ...]
    temperature: float
    max_tokens: int
    where: Mapping[str, Any] = field(default_factory=dict)
    of: str = "the question"


@dataclass(frozen=True)
class Said:
    """One answer. ended: whether it came to its end before `max_tokens`. tokens: of it."""

    text: str
    ended: bool
    tokens: int

    @staticmethod
    def read(row: Mapping[str, Any]) -> Said:
        return Said(str(row["text"]), bool(row["ended"]), int(row["tokens"]))

    def written(self) -> dict[str, Any]:
        """As the record has it."""
        return {"text": self.text, "ended": self.ended, "tokens": self.tokens}


@dataclass(frozen=True)
class _Row:
    """An answer that is wanted: which of a question's, under which key."""

    question: Question
    vote: int
    key: str
    prompt: Prompt

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of those that may stand in one batch: the length they are filled up to, and pictures of
        one size."""
        others = tuple(tuple(value.shape[1:]) for value in self.prompt.others.values())
        length = -(-len(self.prompt.ids) // STEP) * STEP
        return (length, self.question.max_tokens, self.question.temperature, others)


class Local:
    """See the module. May be asked from many threads; one at a time computes.

    options: `weights` and what stands beside it. record: where answers are kept and found. device:
    in place of that of the options. at: the setting that names the weights, for errors.
    """

    def __init__(
        self,
        options: VerifierOptions,
        record: Record | None = None,
        *,
        device: torch.device | None = None,
        at: str = "weights",
    ) -> None:
        assert options.weights is not None
        self.weights, self.options, self.record, self.at = options.weights, options, record, at
        here = self.weights.startswith((".", "/", "~")) or not HUB_ID.fullmatch(self.weights)
        if here and not Path(self.weights).is_dir():
            raise ConfigError(f"{at}: {shown(self.weights)}: no such folder ({ACCEPTED_WEIGHTS})")
        if not known_device(options.device):
            raise ConfigError(f"device: {shown(options.device)} (accepted: {DEVICES})")
        self._given = device
        self._lock, self._mine = threading.RLock(), threading.local()
        self._reader: Reader | None = None
        self._sketch: Reader | None = None
        self._fingerprint: str | None = None
        self._lent = False

    # ----------------------------------------------------------------------------- what it says

    @property
    def name(self) -> str:
        """What the weights are called."""
        return "shipped" if self.weights == str(SHIPPED) else self.weights

    @property
    def fingerprint(self) -> str:
        """Of the weights. Raises `ConfigError` where there are none."""
        with self._lock:
            if self._fingerprint is None:
                try:
                    self._fingerprint = weights_fingerprint(self.weights)
                except ConfigError as error:
                    raise ConfigError(f"{self.at}: {error}") from error
            return self._fingerprint

    @property
    def version(self) -> str:
        """Of all that its answers depend on beside the questions."""
        return f"{self.fingerprint} {self.options.dtype}"

    @property
    def facts(self) -> dict[str, str]:
        return {
            "judge": f"{self.name}, in process ({self.fingerprint})",
            "dtype": self.options.dtype,
        }

    # --------------------------------------------------------------------------------- weights

    @property
    def _config(self) -> ReaderConfig:
        return ReaderConfig(
            weights=self.weights,
            lora_rank=0,
            dtype=self.options.dtype,
            prompts=self.options.prompts,
        )

    def quick_look(self) -> Reader:
        """The verifier without its weights, to ask nothing but lengths and sizes. Raises
        `ConfigError` in one line for whatever is wrong with its files that can be seen so."""
        with self._lock:
            if self._sketch is None:
                self._sketch = sketch_reader(self._config, at=self.at)
            return self._sketch

    def takes(self, asked: Sequence[tuple[Sequence[Part], int]], votes: int = 1) -> Held:
        """What it takes at most, asked about the longest of some questions. asked: their parts, and
        how many tokens more they may have. votes: answers to each."""
        sketch, longest = self.quick_look(), 0
        question: Prompt | None = None
        for parts, more in asked:
            images, text = _split(parts)
            try:
                one = sketch.question(images, text, "an estimate")
            except DataError:
                continue  # what cannot be asked is a failure of its turn
            if len(one.ids) + more > longest:
                question, longest = one, len(one.ids) + more
        found, rows = None, self.options.rows
        if question is not None:
            length = -(-longest // STEP) * STEP
            # What runs without numbers is the model's own code, and not each is made for it.
            with suppress(Exception):
                found = answering(
                    sketch,
                    rows=rows,
                    prompt=question,
                    length=length,
                    answer=self.options.max_tokens,
                )
        held = Held("verifier", self.options.device, bytes_of(sketch.module))
        if found is None:
            return held
        return held._replace(
            working=found.bytes, turn=lambda speed: found.seconds(speed) * votes / rows
        )

    def load(self) -> Reader:
        """Loads the weights, if they are not there yet. Raises `ConfigError` in one line."""
        with self._lock:
            if self._reader is None:
                with torch.random.fork_rng(devices=[]):
                    reader = load_reader(self._config, trains=False, at=self.at)
                try:
                    reader.module.to(self._place())
                except (RuntimeError, AssertionError) as error:
                    raise ConfigError(
                        f"device: {self.options.device}: {one_line(error)} (accepted: one with "
                        f"room, such as cpu)"
                    ) from error
                self._reader = reader
            return self._reader

    def take(self) -> None:
        """The weights come to the trainer's GPU, where that is their device."""
        self._move(lent=False)

    def lend(self) -> None:
        """And leave it for the host's memory, until `take` or the next question."""
        self._move(lent=True)

    def _move(self, lent: bool) -> None:
        if self._given is None and self.options.device == TRAINER:
            with self._lock:
                self._lent = lent
                if self._reader is not None:
                    self._reader.module.to(self._place())

    def _place(self) -> torch.device:
        if self._given is not None:
            return self._given
        return torch.device("cpu") if self._lent else device_of(self.options.device)

    # --------------------------------------------------------------------------------- answers

    def chat(
        self,
        parts: Sequence[Part],
        *,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        n: int = 1,
        seed: int = 0,
        schema: Mapping[str, Any] | None = None,
        name: str = "",
        turn: int = 0,
        recorded: bool = False,
        rollout: int | None = None,
    ) -> list[Answer | Failure | None]:
        """As `Client.chat`, without log-probs and schemas. rollout: for the record."""
        assert schema is None
        asked = self._asked(parts, temperature, max_tokens, n, seed, name, turn, rollout)
        if recorded:
            return [self._found(key) for key in self.keys(asked)]
        ready: Mapping[str, Said | Failure] = getattr(self._mine, "ready", {})
        known = [ready.get(key) for key in self.keys(asked)] if ready else [None]
        said = known if None not in known else self.answers([asked])[0]
        return [_answer(one) for one in said]

    @contextmanager
    def ahead(
        self, asked: Sequence[tuple[Sequence[Part], Mapping[str, Any], int]]
    ) -> Iterator[None]:
        """Answers what `chat` is asked inside, on this thread, before it is: parts, what stands
        beside them, and the rollout, of each."""
        questions = [self._asked(parts, rollout=rollout, **how) for parts, how, rollout in asked]
        said = self.answers(questions)
        self._mine.ready = {
            key: one
            for question, row in zip(questions, said, strict=True)
            for key, one in zip(self.keys(question), row, strict=True)
        }
        try:
            yield
        finally:
            del self._mine.ready

    def _asked(
        self,
        parts: Sequence[Part],
        temperature: float,
        max_tokens: int,
        n: int,
        seed: int,
        name: str,
        turn: int,
        rollout: int | None,
    ) -> Question:
        images, text = _split(parts)
        seeds = tuple(vote_seed(seed, name, turn, v) if temperature else None for v in range(n))
        where = {"name": name, "turn": turn + 1}
        where |= {} if rollout is None else {"rollout": rollout}
        return Question(images, text, seeds, temperature, max_tokens, where)

    def keys(self, question: Question) -> list[str]:
        """Of each answer, all that it depends on."""
        asked = {
            "api": "weights",
            "weights": self.fingerprint,
            "form": [FORM, STEP, self.options.rows],
            "dtype": self.options.dtype,
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "text": question.text,
            "images": [pixel_digest(image) for image in question.images],
        }
        return [request_key(**asked, seed=seed) for seed in question.seeds]

    def answers(self, questions: Sequence[Question]) -> list[list[Said | Failure]]:
        """Of every question one for each of its seeds; a `Failure` where it cannot be asked."""
        keys = [self.keys(question) for question in questions]
        found: dict[str, Said | Failure] = {}
        for key in dict.fromkeys(key for row in keys for key in row):
            if (known := self._found(key)) is not None:
                found[key] = known
        if any(key not in found for row in keys for key in row):
            with self._lock:
                for block in self._blocks(questions, keys, found):
                    if any(row.key not in found for row in block):
                        found |= self._sampled(block)
        return [[found[key] for key in row] for row in keys]

    def _blocks(
        self,
        questions: Sequence[Question],
        keys: Sequence[Sequence[str]],
        found: dict[str, Said | Failure],
    ) -> Iterator[list[_Row]]:
        """What goes through the model together, of one shape, in order; an equal question is asked
        once. Adds to `found` what cannot be asked. No more pictures are held than batches need."""
        reader, seen = self.load(), set[str]()
        shapes: dict[tuple[Any, ...], list[_Row]] = {}
        for question, row in zip(questions, keys, strict=True):
            if seen.issuperset(row):
                continue
            try:
                prompt = reader.question(question.images, question.text, question.of)
            except DataError as error:
                for vote, key in enumerate(row):
                    found[key] = self._failed(question, vote, key, plain(str(error)))
                seen.update(row)
                continue
            for vote, key in enumerate(row):
                if key in seen:
                    continue
                seen.add(key)
                one = _Row(question, vote, key, prompt)
                block = shapes.setdefault(one.shape, [])
                block.append(one)
                if len(block) == self.options.rows:
                    yield shapes.pop(one.shape)
        yield from shapes.values()

    def _sampled(self, block: Sequence[_Row]) -> dict[str, Said | Failure]:
        reader, begun, first = self.load(), time.monotonic(), block[0]
        filled = [*block, *[first] * (self.options.rows - len(block))]
        seeds = [row.question.seeds[row.vote] or 0 for row in filled]
        try:
            written = reader.sample(
                [row.prompt for row in filled],
                seeds,
                temperature=first.question.temperature,
                max_tokens=first.question.max_tokens,
                length=first.shape[0],
            )
        except (RuntimeError, UserError) as error:  # no room on the device, for one
            why = f"sampling raised {one_line(error, kind=True, limit=200)}"
            return {row.key: self._failed(row.question, row.vote, row.key, why) for row in block}
        seconds = (time.monotonic() - begun) / len(block)
        return {
            row.key: self._kept(row, Said(one.text, one.ended, len(one.ids)), seconds)
            for row, one in zip(block, written, strict=False)
        }

    def _failed(self, question: Question, vote: int, key: str, why: str) -> Failure:
        if self.record is not None:
            with calls_of(**question.where):
                self.record.write(key, None, failed=why, seconds=0.0, tries=1, vote=vote + 1)
        return Failure(why)

    def _kept(self, row: _Row, said: Said, seconds: float) -> Said:
        """The answer that stands."""
        if self.record is None:
            return said
        with calls_of(**row.question.where):
            stands = self.record.write(
                row.key, said.written(), seconds=seconds, tries=1, vote=row.vote + 1
            )
        return Said.read(stands)

    def _found(self, key: str) -> Any:
        return None if self.record is None else self.record.find(key, Said.read)


def _split(parts: Sequence[Part]) -> tuple[tuple[np.ndarray, ...], str]:
    """Pictures, and the words behind them."""
    images = tuple(part for part in parts if not isinstance(part, str))
    return images, "\n\n".join(part for part in parts if isinstance(part, str))


def _answer(said: Any) -> Answer | Failure | None:
    if not isinstance(said, Said):
        return said
    return Answer(said.text, "stop" if said.ended else "length")
