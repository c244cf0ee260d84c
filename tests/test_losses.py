"""The tables of losses and of dynamics together: every legal pair trains, every other one says why
in one line; and losses by their definitions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from editr2.config import Config, TrainConfig, replace_nested
from editr2.config.fields import Bounds, setting
from editr2.errors import ConfigError
from editr2.policies.base import Velocity
from editr2.policies.rules import check_config
from editr2.policies.weights import trainable
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Score
from editr2.rl.iteration import iteration
from editr2.rl.losses import LOSSES, Beside, Loss, Samples, Term
from editr2.rl.sampler import make_sampler, rollout_sampler
from editr2.rl.state import State, new_state
from editr2.run.processes import Processes
from editr2.sessions.source import open_sessions
from editr2_kernels import DYNAMICS, awm_loss, flow_sigmas, transition_table

HERE = Processes(Accelerator(cpu=True))


class Bright:
    """Siblings' images differ, so every group has somebody better."""

    names = ("bright",)

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


def settings(loss: str, dynamics: str = "cps", **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "policy": {"intent": False},
        "rollout": {
            "sessions": 2,
            "siblings": 3,
            "turns": 2,
            "steps": 5,
            "window": 2,
            "shared_noise": False,
            "groups_per_batch": 2,
            "dynamics": dynamics,
            "noise_level": 1.0,
        },
        "credit": {"weights": {"bright": 1.0}},
        "train": {"loss": loss, "iterations": 2, "ema": None, "lr": 1e-3},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return replace_nested(Config(), values)


def one_iteration(config: Config, policy: Any) -> tuple[State, dict[str, Any]]:
    state = new_state(check_config(config).train, policy)
    source = open_sessions(config, policy)
    sampler = rollout_sampler(config.rollout)
    return state, iteration(config, state, source, adapt(Bright()), sampler, HERE)


def problem_of(config: Config) -> str | None:
    try:
        check_config(config)
    except ConfigError as error:
        return str(error)
    return None


ILLEGAL = {
    "ode": "rollout.dynamics: 'ode' (accepted: flow-sde, ",
    "nft": "rollout.window: 2 (accepted with train.loss nft: 0; it samples by ODE)",
}
"""Of a dynamics with any loss, or of a loss with any dynamics, when a window is asked for."""

PAIRS = [(loss, dynamics) for loss in LOSSES for dynamics in DYNAMICS]


@pytest.mark.parametrize("loss, dynamics", PAIRS, ids=lambda name: name)
def test_every_pair_trains_or_says_why_not(loss, dynamics, tiny_unified):
    config = settings(loss, dynamics)
    problem = problem_of(config)
    expected = ILLEGAL.get(dynamics, ILLEGAL.get(loss))
    if expected is not None:
        assert problem is not None and problem.startswith(expected) and "\n" not in problem
        return
    assert problem is None
    before = {n: p.detach().clone() for n, p in trainable(tiny_unified.module).items()}
    _, row = one_iteration(config, tiny_unified)
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert row["ratio_error"] <= 1e-5
    assert set(LOSSES[loss].logs) - {"clipped"} <= set(row)
    after = trainable(tiny_unified.module)
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_without_a_window_losses_of_noised_outputs_train_and_the_others_say_why_not(tiny_unified):
    for loss in LOSSES:
        config = settings(loss, rollout={"window": 0})
        if loss in ("grpo", "dpo"):
            assert problem_of(config) == (
                f"rollout.window: 0 (accepted: at least 1; without an SDE step {loss} trains "
                f"nothing)"
            )
        else:
            _, row = one_iteration(config, tiny_unified)
            assert row["grad_norm"] > 0


WRONG = [
    ("awm", {"policy": {"guidance": 2.0}}, "policy.guidance: not 1 (accepted with train.loss awm"),
    ("nft", {"policy": {"guidance": 2.0}, "rollout": {"window": 0}}, "policy.guidance: not 1"),
    ("dpo", {"train": {"micro_batch": 3}}, "train.micro_batch: 3 (accepted with train.loss dpo"),
    ("dpo", {"train": {"kl_weight": 0.1}}, "train.kl_weight: 0.1 (accepted with train.loss dpo"),
    (
        "dpo",
        {"train": {"loss_options": {"beta": 0}}},
        "train.loss_options.beta: 0.0 (accepted: a number, above 0, at most 1000000)",
    ),
    (
        "awm",
        {"train": {"loss_options": {"draws": 0}}},
        "train.loss_options.draws: 0 (accepted: a whole number, 1 to 1000)",
    ),
    ("awm", {"train": {"loss_options": {"beta": 1}}}, "unknown key 'train.loss_options.beta'"),
    ("grpo", {"train": {"loss_options": {"beta": 1}}}, "unknown key 'train.loss_options.beta'"),
    ("ppo", {}, "train.loss: 'ppo' (accepted: grpo, nft, awm, dpo"),
]


@pytest.mark.parametrize("loss, sections, message", WRONG)
def test_what_a_loss_cannot_train_with_is_one_line(loss, sections, message):
    problem = problem_of(settings(loss, **sections))
    assert problem is not None and problem.startswith(message) and "\n" not in problem


# -------------------------------------------------------------------------------- by their formulas


def samples(count: int, **more: Tensor) -> Samples:
    draw = torch.Generator().manual_seed(0)
    x, x_next, noise = (torch.randn(count, 3, 4, generator=draw) for _ in range(3))
    values = {
        "sigma": torch.full((count,), 0.5),
        "advantage": torch.randn(count, generator=draw),
        "mask": torch.ones(count, dtype=torch.bool),
        "group": torch.arange(count) // 2,
        "noise": noise,
    }
    return Samples(x, x_next, **{**values, **more})


def term(loss: str, given: Samples, v: Tensor, reference: Tensor | None, **options: Any) -> Term:
    sampler = make_sampler(4, dynamics="cps", noise_level=0.7, window=2)
    t = settings(loss, train={"loss_options": options}).train
    return LOSSES[loss].term(t, given, Velocity(v), Beside(reference, None), sampler, 4.0)


def test_awm_is_the_operator_with_its_old_log_probs(tiny_unified):
    given = samples(4, old_log_prob=torch.full((4,), -1.0))
    v = torch.randn(4, 3, 4, requires_grad=True)
    found = term("awm", given, v, None, clip=0.3)
    wanted = awm_loss(
        given.x_next,
        given.noise,
        v,
        given.old_log_prob,
        given.advantage,
        clip=0.3,
        advantage_clip=None,
        mask=given.mask,
        normalizer=4.0,
    )
    assert torch.equal(found.loss, wanted.loss) and found.loss.requires_grad


def test_awm_keeps_to_the_noise_of_the_first_update_and_compares_with_it(tiny_unified):
    config = settings("awm", rollout={"window": 0}, train={"updates": 2, "lr": 1e-2})
    _, row = one_iteration(config, tiny_unified)
    assert row["ratio_error"] == 0  # of the first update
    assert row["clip_fraction"] > 0.5  # of the second, behind a large step


def test_dpo_is_minus_log_sigmoid_of_the_margin_between_a_pair():
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0])
    given = samples(4, advantage=sign, step_index=torch.full((4,), 5))
    v, reference = torch.randn(4, 3, 4, requires_grad=True), torch.randn(4, 3, 4)
    found = term("dpo", given, v, reference, beta=2.0)
    table = transition_table(flow_sigmas(4), dynamics="cps", noise_level=0.7)
    a, b, _, _, w, c, *_ = table[1].tolist()

    def log_prob(u: Tensor) -> Tensor:
        mean = a * given.x + b * u
        return w * ((given.x_next - mean) ** 2).mean((1, 2)) + c

    pull = 2.0 * (log_prob(v) - log_prob(reference))
    margins = torch.stack([pull[0] - pull[1], pull[3] - pull[2]])
    torch.testing.assert_close(found.loss, -torch.nn.functional.logsigmoid(margins).sum() / 2)
    torch.testing.assert_close(found.means["margin"], margins.mean())
    assert found.means["pairs_right"] == (margins > 0).float().mean()
    (gradient,) = torch.autograd.grad(found.loss, v)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_dpo_pairs_the_best_with_the_worst_of_each_group_and_turn():
    advantage = torch.tensor([[0.5, 1.0], [2.0, 1.0], [-1.0, 1.0], [3.0, 0.0], [0.0, 2.0], [0, 9]])
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[5, 1] = False
    preferred, trained = LOSSES["dpo"].prefer(advantage, mask, 3)
    assert preferred.tolist() == [[0, 0], [1, 0], [-1, 0], [1, -1], [-1, 1], [0, 0]]
    assert torch.equal(trained, preferred != 0)  # nobody is better in the first group's second turn


def test_a_pair_meets_in_one_forward_packed_or_not(tiny_unified):
    rows = []
    for packed in ("on", "off"):
        policy = _copy(tiny_unified)
        rows.append(one_iteration(settings("dpo", train={"packed": packed}), policy)[1])
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)  # before any step


def _copy(policy: Any) -> Any:
    import copy

    return copy.deepcopy(policy)


# ------------------------------------------------------------------------------------- second order


def test_a_rollout_of_second_order_hands_on_the_clean_prediction(tiny_unified):
    """The stored m_prev are what the step before took for the clean image, and training with them
    meets the rollout's log-probs; without them it does not."""
    config = settings("grpo", "dpm++sde", rollout={"window_range": 0.6, "steps": 6})
    assert rollout_sampler(config.rollout).second_order
    assert not rollout_sampler(settings("grpo").rollout).second_order
    from editr2.rl.rollout import Chunk, Seeds, rollout_chunk

    source = open_sessions(config, tiny_unified)
    chunk = Chunk([source[0], source[1]], [0, 1], 3)
    sampler = rollout_sampler(config.rollout)
    shared = dataclasses.replace(config.rollout, shared_noise=True)
    rollout_chunk(tiny_unified, chunk, sampler, Seeds(0, "train"), config.policy, rollout=shared)
    record = chunk.turns[0]
    rows = sampler.table[record.step_index]
    assert (rows[..., 2] != 0).any()
    context = tiny_unified.instruct(
        tiny_unified.encode(np.stack([source[0].image])), record.text[:1]
    )
    # Of the second stored step: from the first one's latent and velocity.
    x, sigma = record.x[:1, 0], record.sigma[:1, 0]
    clean = x - sigma[:, None, None] * tiny_unified.velocity(x, sigma, context).v
    torch.testing.assert_close(record.m_prev[:1, 1], clean.detach(), rtol=1e-4, atol=1e-5)
    state, row = one_iteration(config, tiny_unified)
    assert row["ratio_error"] <= 1e-5


# ------------------------------------------------------------------------------------ one loss more


@dataclasses.dataclass(frozen=True)
class _Options:
    power: float = setting(2.0, Bounds(above=0, at_most=4))


class _Distance(Loss):
    """Towards good outputs: A mean(|v - (noise - x0)|^power)."""

    options = _Options
    logs = ("distance",)

    def places(self, t: TrainConfig, sampler: Any) -> int:
        return 2

    def ask(self, t: TrainConfig, asked: Any) -> Any:
        from editr2.rl.losses import noised

        return noised(asked, 2)

    def problems(self, config: Config) -> Iterator[str]:
        return iter(())

    def term(self, t, given, velocity, beside, sampler, normalizer):
        away = (velocity.v - (given.noise - given.x_next)).abs()
        distance = (away ** self.settings(t).power).flatten(1).mean(1)
        counted = torch.where(given.mask, given.advantage * distance, 0.0)
        mean = distance.detach().mean()
        return Term(counted.sum() / normalizer, {"kl": torch.zeros(()), "distance": mean})


def test_a_loss_more_is_an_entry(tiny_unified, monkeypatch):
    monkeypatch.setitem(LOSSES, "distance", _Distance())
    config = settings("distance", train={"loss_options": {"power": 1.0}})
    _, row = one_iteration(config, tiny_unified)
    assert row["distance"] > 0 and row["grad_norm"] > 0 and row["ratio_error"] == 0
    wrong = settings("distance", train={"loss_options": {"power": 9}})
    assert problem_of(wrong) == (
        "train.loss_options.power: 9.0 (accepted: a number, above 0, at most 4)"
    )
