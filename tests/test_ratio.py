"""What the on-policy sentinel finds out: the first tensor that differs, within the memory that
training has."""

from __future__ import annotations

import weakref

import pytest
import torch

from editr2.config import Config, replace_nested
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sentinel import explain_difference
from editr2.worlds.shapes import make_session

SEEDS = Seeds(0, "train")


class Watched(UnifiedPolicy):
    """Counts the rows of every forward with gradients, and the graphs of earlier ones that are
    still there."""

    def watch(self) -> Watched:
        self.rows: list[int] = []
        self.alive: list[int] = []
        self._seen: list[weakref.ref] = []
        return self

    def _count(self, rows, made):
        if torch.is_grad_enabled():
            self.rows.append(rows)
            self.alive.append(sum(ref() is not None for ref in self._seen))
            value = made()
            self._seen.append(weakref.ref(value[0]))
            return value[1]
        return made()[1]

    def velocity(self, x, sigma, context):
        def made():
            v = UnifiedPolicy.velocity(self, x, sigma, context)
            return v.v, v

        return self._count(len(x), made)

    def answer_log_prob(self, context, questions, answers, *, temperature):
        def made():
            scores = UnifiedPolicy.answer_log_prob(
                self, context, questions, answers, temperature=temperature
            )
            return scores.log_prob, scores

        return self._count(len(answers), made)


def rolled(policy, micro_batch):
    """Two groups of three siblings, of two and three turns, with intents."""
    config = replace_nested(
        Config(),
        {
            "policy": {"intent_tokens": 3},
            "rollout": {"steps": 6, "window": 2},
            "train": {"micro_batch": micro_batch},
        },
    )
    sampler = rollout_sampler(config.rollout)
    chunk = Chunk([make_session(0, i, turns=2 + i) for i in range(2)], [0, 1], 3)
    rollout_chunk(policy, chunk, sampler, SEEDS, config.policy, rollout=config.rollout)
    return chunk, sampler, config


@pytest.mark.parametrize("micro_batch, largest", [(None, 6), (4, 4), (1, 1)])
def test_the_replay_keeps_to_trainings_micro_batch_and_to_one_graph(
    tiny_unified, micro_batch, largest
):
    policy = Watched(tiny_unified.module, tiny_unified.codec).watch()
    chunk, sampler, config = rolled(policy, micro_batch)
    assert not policy.rows
    assert explain_difference(
        policy, chunk, sampler, SEEDS, config.policy, config.rollout, config.train
    ).startswith("none when")
    # Velocities at two steps of turns of 6, 6 and 3 rollouts, and the answers of the last two of
    # them.
    assert max(policy.rows) == largest and sum(policy.rows) == 2 * (6 + 6 + 3) + 6 + 3
    assert max(policy.alive) == 0


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_first_difference_is_named_whatever_the_rows(tiny_unified, micro_batch):
    """In the last rollout of the second turn only, which is in the last rows of any size."""
    policy = Watched(tiny_unified.module, tiny_unified.codec).watch()
    chunk, sampler, config = rolled(policy, micro_batch)

    def found(**change):
        for name, value in change.items():
            setattr(policy, name, value)
        try:
            return explain_difference(
                policy, chunk, sampler, SEEDS, config.policy, config.rollout, config.train
            )
        finally:
            for name in change:
                delattr(policy, name)

    marked = chunk.turns[1].x[-1, 1]

    def velocity(x, sigma, context):
        v = UnifiedPolicy.velocity(policy, x, sigma, context)
        if torch.is_grad_enabled():
            hit = (x == marked).flatten(1).all(1)
            v.v.data[hit] += 1e-2
        return v

    assert found(velocity=velocity).startswith(
        "turn 2, window step 2: velocity: rollout and training differ by up to"
    )

    def answer_log_prob(context, questions, answers, *, temperature):
        scores = UnifiedPolicy.answer_log_prob(
            policy, context, questions, answers, temperature=temperature
        )
        scores.log_prob.data[-1] += 1.0
        return scores

    at = 5 if micro_batch is None else 1
    message = f"turn 2: intent of rollout {at}: sampling and scoring its tokens differ by up to 1"
    assert found(answer_log_prob=answer_log_prob).startswith(message)
    chunk.turns[0].log_prob[5, 0] += 1e-2
    assert found().startswith(
        "turn 1: log_prob: the rollout itself is not repeatable (max difference 0.01)"
    )
