"""The unified model without its weights. Texts are as long as the sessions' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from editr2.config import PolicyConfig
from editr2.policies.blueprint import SMALL_BATCH, Reading, Size, Work, backward
from editr2.policies.unified.model import Branch, Context
from editr2.sessions import Session


@dataclass(frozen=True)
class Text:
    """Something that is written in a turn. context: behind which, given policy, batch and turn.
    question, answer: tokens that are asked and written. most: that may be."""

    context: Callable[[Any, int, int], Context]
    question: int
    answer: int
    most: int


STEPS = {
    "intend": ("intent", "intend"),
    "answer": ("intent", "answer"),
    "score": ("intent", "score"),
    "think": ("thought", "intend"),
    "answer thought": ("thought", "answer"),
    "score thought": ("thought", "score"),
}
"""Of text: the kind of it, and what is done."""


class UnifiedBlueprint:
    """`Blueprint` of a `UnifiedPolicy`. A cost grows along a line with the turns before it, and
    that of an intent with its tokens; contexts are keys and values of that many tokens.

    Steps of its own beside the usual ones are score, an intent's forward pass alone, whose
    activations wait for the velocities' backward pass; and think, answer thought and score thought,
    which are of thoughts what intend, answer and score are of intents."""

    prompt_per_output = True
    deeper: Sequence[tuple[Any, int]] = ()
    text = vae = sight = 0

    def __init__(self, policy: Any, config: PolicyConfig) -> None:
        """policy: without data."""
        self.policy, self.config = policy, config
        self.image = policy.latent_shape[0] + 2
        self.said = self.question = 16
        self.system = len(policy.text_ids(policy.system)) if policy.system is not None else 0
        self.thought = config.thinking_tokens + 2 if policy.thinks else 0

    @property
    def spoken(self) -> int:
        """Tokens that a turn's texts add to the full context."""
        return self.said + self.thought

    def _text(self, kind: str) -> Text:
        if kind == "thought":
            most = self.config.thinking_tokens
            return Text(self._told, 1, most, most)
        return Text(self._seen, self.question, self.answer, self.config.intent_tokens)

    @property
    def blocks(self) -> int:
        return int(self.policy.module.config.num_hidden_layers)

    def see(self, sessions: Sequence[Session]) -> None:
        texts = [len(self.policy.text_ids(turn.instruction)) for s in sessions for turn in s.turns]
        self.said = round(sum(texts) / len(texts))
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

    def read_again(self, prompts: int) -> bool:
        return True

    def encodes_again(self, turn: int, images: int) -> bool:
        return True

    @property
    def answer(self) -> int:
        """Tokens of an intent: a self-contained instruction is about a third longer than the raw
        one, and some thought goes before it."""
        return min(self.config.intent_tokens, round(self.said * 4 / 3))

    def held(self, batch: int, turn: int) -> int:
        return sum(self.branches(batch, turn).values())

    def branches(self, batch: int, turn: int) -> Mapping[str, int]:
        c, said = self.policy.module.config, self.system + (turn + 1) * self.said
        full = self.system + (turn + 1) * (self.image + self.spoken)
        tokens = self._tokens(full, said)
        numbers = 2 * self.blocks * c.num_key_value_heads * c.head_dim
        size = self.policy.compute_dtype.itemsize * numbers * batch
        return {name: size * count for name, count in tokens.items()}

    def _tokens(self, full: int, said: int) -> dict[str, int]:
        """Of a sample's contexts, by name. said: those of its texts alone."""
        g = self.policy.guidance
        dropped = {"without the instruction": g.text != 1, "texts alone": g.image != 1}
        return {"full": full, **{name: full for name, there in dropped.items() if there}}

    def passes(self, step: str, apart: bool) -> int:
        texts = 1 + (self.policy.guidance.image != 1)
        texts += self.thought > 0
        once = {"intend": self.answer, "instruct": texts, "decode": 0}
        once["think"] = self.config.thinking_tokens
        return once.get(step, 1)

    def work(self, step: str, batch: int, turn: int, checkpointing: bool) -> list[Work | Reading]:
        if step == "decode":  # pixels are latents here
            return []
        sizes = [Size(batch, SMALL_BATCH), Size(turn, 0)]
        kind, done = STEPS.get(step, (None, step))
        text = self._text(kind or "intent")
        if done == "intend":  # the question, and word after word
            ask, word = (partial(run, text) for run in (self._ask, self._word))
            words = Work(("word", kind), word, sizes, times=text.answer - 1)
            return [Work(("ask", kind), ask, sizes), *([words] if text.answer > 1 else [])]
        if step == "derive":
            step = done = "encode"
        prepare, trains = getattr(self, f"_{done}"), done in ("train", "answer", "score")
        if kind is not None:
            prepare = partial(prepare, text)
        return [Work(step, prepare, sizes, trains=trains, checkpointing=checkpointing and trains)]

    def _context(self, policy: Any, batch: int, tokens: int) -> Context:
        c = policy.module.config
        one = torch.empty(
            batch, c.num_key_value_heads, tokens, c.head_dim, dtype=policy.compute_dtype
        )
        layers = (one,) * c.num_hidden_layers
        context = Context(
            layers, layers, torch.ones(batch, tokens, dtype=torch.bool), torch.zeros(batch)
        )
        # Texts of a batch differ in length; nobody can look into a fake tensor.
        context.__dict__["padded"] = True
        return context

    def _before(self, policy: Any, batch: int, turn: int) -> Context:
        """As the turn before has left it."""
        return self._context(policy, batch, self.system + turn * (self.image + self.spoken))

    def _seen(self, policy: Any, batch: int, turn: int) -> Context:
        """Behind the image to edit."""
        before = self.system + turn * (self.image + self.spoken)
        return self._context(policy, batch, before + self.image)

    def _told(self, policy: Any, batch: int, turn: int) -> Context:
        """Behind the instruction, before any thought."""
        before = self.system + turn * (self.image + self.spoken)
        return self._context(policy, batch, before + self.image + self.said)

    def _instructed(self, policy: Any, batch: int, turn: int) -> Any:
        """Behind the instruction and a thought, with the branches that guidance asks for."""
        tokens = self.system + (turn + 1) * (self.image + self.spoken)
        texts_alone = self.system + (turn + 1) * self.said
        full, before, texts = (
            self._context(policy, batch, length)
            for length in (tokens, tokens - self.spoken, texts_alone)
        )
        if not policy.guidance.active:
            return full
        guided = policy.guided(full, before, texts)
        guided.__dict__["joined"] = self._context(policy, batch * len(guided.branches), tokens)
        return guided

    @staticmethod
    def _words(batch: int, length: int) -> tuple[Tensor, Tensor]:
        shape = (batch, length)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)

    def _encode(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context = self._before(policy, batch, turn)
        return lambda: policy.module.append_image(
            context, torch.empty(batch, *policy.latent_shape), policy.grid, policy.marks
        )

    def _instruct(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        read = [(self._seen(policy, batch, turn), self.said)]
        if policy.guidance.image != 1:  # the texts alone are a context of their own
            alone = self._context(policy, batch, self.system + turn * self.said)
            read.append((alone, self.said))
        if self.thought:
            read.append((self._told(policy, batch, turn), self.thought))

        def run() -> Any:
            append = policy.module.append_text
            return [append(context, *self._words(batch, length)) for context, length in read]

        return run

    def _ask(self, text: Text, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context, model = text.context(policy, batch, turn), policy.module

        def run() -> Any:
            branch = Branch(context, text.question + text.most)
            hidden = model.extend_branch(branch, *self._words(batch, text.question))
            return branch, model.logits(hidden[:, -1])

        return run

    def _word(self, text: Text, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        """One more, in the middle of what is written."""
        context, model = text.context(policy, batch, turn), policy.module
        branch = Branch(context, text.question + text.most)
        behind = text.question + text.answer // 2
        branch.valid[:, branch.length : branch.length + behind] = True
        branch.length += behind

        def run() -> Any:
            hidden = model.extend_branch(branch, *self._words(batch, 1))
            return model.logits(hidden[:, -1]).softmax(-1).cumsum(-1)

        return run

    def _velocity(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context = self._instructed(policy, batch, turn)
        return lambda: policy.velocity(
            torch.empty(batch, *policy.latent_shape), torch.empty(batch), context
        )

    def _train(self, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        predict = self._velocity(policy, batch, turn)
        return lambda: backward(predict())

    def _score(self, text: Text, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        context, model = text.context(policy, batch, turn), policy.module
        first = torch.zeros(batch, dtype=torch.int64) + text.question - 1
        answers = [(0,) * text.answer] * batch

        def run() -> Any:
            words = self._words(batch, text.question + text.answer - 1)
            return policy._scores(model.text_hidden(context, *words), first, answers, 1.0)

        return run

    def _answer(self, text: Text, policy: Any, batch: int, turn: int) -> Callable[[], Any]:
        score = self._score(text, policy, batch, turn)

        def run() -> Any:
            found = score().log_prob
            torch.autograd.backward([found], [torch.ones_like(found)])
            return found

        return run
