"""Training's forward and backward of whole sessions on the embedded policy: three plans that
compute the same.

    rebuild       the context is read again for every trained step and every answer, one forward and
                  backward each: what trainers do that keep prompts and images, not contexts
    incremental   a walk: the context is read once, its keys and values kept; one forward for each
                  trained step
    packed        `replay_packed`: two forwards, or one where gradients go through the context

Sessions are the world's, intents its true ones. A row's mode carries the token ratios that counting
predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from editr2.policies.base import Questions, TokenScores, TurnTask
from editr2.policies.tokens import THINK_END
from editr2.policies.unified.packed import token_counts
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.worlds import shapes

ROLLOUTS, PLACES, TEMPERATURE = 8, 2, 0.7


def make_tasks(
    policy: UnifiedPolicy, turns: int, rollouts: int = ROLLOUTS
) -> tuple[np.ndarray, list[TurnTask]]:
    sessions = [shapes.make_session(0, i, turns=turns) for i in range(rollouts)]
    generator = torch.Generator().manual_seed(0)
    images, tasks = np.stack([s.image for s in sessions]), []
    scenes = [shapes.meanings(s.image, [t.instruction for t in s.turns]) for s in sessions]
    for t in range(turns):
        questions = answers = None
        if t:
            earlier = [[u.instruction for u in s.turns[:t]] for s in sessions]
            questions = Questions(
                earlier, [s.turns[t].instruction for s in sessions], [s.mode for s in sessions]
            )
            told = [
                f"{s.turns[t].meta['reasoning']} {THINK_END} {s.turns[t].intent}" for s in sessions
            ]
            answers = [
                (*policy.codec.encode(text, marks=True), policy.codec.im_end) for text in told
            ]
        outputs = np.stack([shapes.render(s[t + 1].scene) for s in scenes])
        x = torch.randn(rollouts, PLACES, *policy.latent_shape, generator=generator)
        sigma = torch.rand(rollouts, PLACES, generator=generator)
        tasks.append(
            TurnTask(
                [str(s.turns[t].intent) for s in sessions], outputs, x, sigma, questions, answers
            )
        )
    return images, tasks


def velocity_loss(v: Tensor) -> Tensor:
    return v.square().mean()


def token_loss(scores: TokenScores) -> Tensor:
    return -scores.log_prob.sum() / scores.valid.sum()


class Plans:
    """Each leaves the gradient of the same loss on the policy's weights and returns the loss."""

    def __init__(
        self, policy: UnifiedPolicy, images: np.ndarray, tasks: list[TurnTask], through: bool
    ) -> None:
        self.policy, self.images, self.tasks, self.through = policy, images, tasks, through

    def _read(self, context: Any, turn: int) -> tuple[Any, Any]:
        """The context before and behind the instruction of a turn, from that behind the turn
        before."""
        with torch.set_grad_enabled(self.through):
            if turn == 0:
                before = self.policy.encode(self.images)
            else:
                before = self.policy.append(context, self.tasks[turn - 1].images)
            return before, self.policy.instruct(before, self.tasks[turn].text)

    def _losses(
        self, turn: int, contexts: Callable[[], tuple[Any, Any]]
    ) -> list[Callable[[], Tensor]]:
        """What a turn trains, one by one; `contexts` gives those of the turn whenever one is asked
        for."""
        task, policy = self.tasks[turn], self.policy

        def answers() -> Tensor:
            assert task.questions is not None and task.answers is not None
            before = contexts()[0]
            return token_loss(
                policy.answer_log_prob(
                    before, task.questions, task.answers, temperature=TEMPERATURE
                )
            )

        def place(q: int) -> Callable[[], Tensor]:
            return lambda: (
                velocity_loss(policy.velocity(task.x[:, q], task.sigma[:, q], contexts()[1]).v)
                / PLACES
            )

        return [
            *([answers] if task.questions is not None else []),
            *(place(q) for q in range(PLACES)),
        ]

    def rebuild(self) -> float:
        self.policy.module.zero_grad()
        total = 0.0

        def again(turn: int) -> tuple[Any, Any]:
            context: Any = None
            for t in range(turn):
                context = self._read(context, t)[1]
            return self._read(context, turn)

        for turn in range(len(self.tasks)):
            for ask in self._losses(turn, lambda turn=turn: again(turn)):  # type: ignore[misc]
                loss = ask()
                loss.backward()
                total += loss.item()
        return total

    def incremental(self) -> float:
        self.policy.module.zero_grad()
        total, kept, context = 0.0, [], None
        for turn in range(len(self.tasks)):
            both = self._read(context, turn)
            context = both[1]
            for ask in self._losses(turn, lambda both=both: both):  # type: ignore[misc]
                loss = ask()
                total += loss.item()
                if self.through:
                    kept.append(loss)
                else:
                    loss.backward()
        if kept:
            torch.stack(kept).sum().backward()
        return total

    def packed(self) -> float:
        self.policy.module.zero_grad()
        done = self.policy.replay_packed(
            self.images, self.tasks, context_gradient=self.through, temperature=TEMPERATURE
        )
        losses = [velocity_loss(turn.velocity.v) for turn in done]
        losses += [token_loss(turn.tokens) for turn in done if turn.tokens is not None]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.item()

    def gradient(self, plan: Callable[[], float]) -> tuple[float, Tensor]:
        loss = plan()
        grads = [p.grad.flatten() for p in self.policy.module.parameters() if p.grad is not None]
        return loss, torch.cat(grads)


def predicted_tokens(policy: UnifiedPolicy, tasks: list[TurnTask]) -> dict[str, int]:
    """Of one rollout, by plan, before padding to a batch's longest text."""
    text = [len(policy.text_ids(t.text[0])) for t in tasks]
    asked = []
    for t in tasks:
        answered = t.questions is not None and t.answers is not None
        rows = (
            [*zip(t.questions.earlier, t.questions.current, t.questions.modes)]
            if answered and t.questions
            else []
        )
        asked.append(
            len(policy.question_ids(*rows[0])) + len(t.answers[0]) - 1 if rows and t.answers else 0
        )
    counts = token_counts(policy.latent_shape[0] + 2, text, [PLACES] * len(tasks), asked)
    return {name: c.tokens for name, c in counts.items()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "turns, through",
    [
        *((turns, False) for turns in (1, 3, 5, 8)),
        (3, True),
        *(pytest.param(turns, True, marks=pytest.mark.full) for turns in (1, 5, 8)),
    ],
    ids=lambda value: (
        value if not isinstance(value, bool) else ("detached", "through context")[value]
    ),
)
def test_session_forward(turns: int, through: bool, compare: Callable[..., Any]) -> None:
    policy = UnifiedPolicy.load()
    images, tasks = make_tasks(policy, turns)
    plans = Plans(policy, images, tasks, through)

    def gate() -> dict[str, float]:
        """One loss and one gradient. Six layers in fp32, summed in other orders: 1e-4 of the
        largest entry."""
        loss, expected = plans.gradient(plans.rebuild)
        errors = {}
        for name, plan in (("packed", plans.packed), ("incremental", plans.incremental)):
            found, gradient = plans.gradient(plan)
            assert abs(found - loss) <= 1e-5 * abs(loss), name
            errors[name] = (gradient - expected).abs().max().item() / expected.abs().max().item()
            assert errors[name] < 1e-4, (
                f"{name}: gradient differs from rebuild by {errors[name]} of the largest entry"
            )
        return errors

    tokens = predicted_tokens(policy, tasks)
    ratio = f"rebuild reads {tokens['rebuild'] / tokens['packed']:.2f} x the tokens"
    compare(
        op="session_forward",
        mode=f"forward + backward, {'through' if through else 'detached'}, {ratio}",
        shape=(ROLLOUTS, turns, PLACES),
        dtype="fp32",
        providers={
            "eager rebuild": plans.rebuild,
            "packed": plans.packed,
            "incremental": plans.incremental,
        },
        gate=gate,
        seconds=4.0,
        min_rounds=3,  # rebuild takes seconds where there are many turns
    )
