"""The tables of losses and of dynamics together: every legal pair trains, every other one says why
in one line; and losses by their definitions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from editr2.cli.main import main
from editr2.config import Config, TrainConfig, replace_nested
from editr2.config.fields import Bounds, setting
from editr2.errors import ConfigError, UserError
from editr2.policies.base import Velocity
from editr2.policies.rules import check_config
from editr2.policies.weights import trainable
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Score
from editr2.rl import gradient
from editr2.rl.gradient import Batch, accumulate_gradient
from editr2.rl.iteration import iteration
from editr2.rl.losses import LOSSES, Asked, Beside, Given, Loss, Samples, Term, noised, stored
from editr2.rl.replay import ReplayOptions, replay
from editr2.rl.rollout import Chunk, Seeds, _Window, rollout_chunk
from editr2.rl.sampler import make_sampler, rollout_sampler
from editr2.rl.sentinel import RatioError
from editr2.rl.sessions import sessions_for
from editr2.rl.state import State, new_state
from editr2.run.processes import Processes
from editr2.training import train
from editr2_kernels import (
    DYNAMICS,
    INITIAL_STEP,
    awm_loss,
    flow_sigmas,
    philox_normal,
    transition_table,
)

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
    source = sessions_for(config, policy)
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
    (
        "awm",
        {"policy": {"guidance": 2.0}},
        "policy.guidance: 2.0 (accepted with train.loss awm: 1",
    ),
    ("nft", {"policy": {"guidance": 2.0}, "rollout": {"window": 0}}, "policy.guidance: 2.0 (acc"),
    ("dpo", {"train": {"micro_batch": 3}}, "train.micro_batch: 3 (accepted with train.loss dpo"),
    ("dpo", {"train": {"kl_weight": 0.1}}, "train.kl_weight: 0.1 (accepted with train.loss dpo"),
    (
        "awm",
        {"train": {"guard": True}},
        "train.guard: True (accepted with train.loss awm: False",
    ),
    ("dpo", {"train": {"clip_low": 0.5}}, "train.clip_low: 0.5 (accepted with train.loss dpo: 0.0"),
    ("awm", {"train": {"old_log_prob": "rollout"}}, "train.old_log_prob: rollout (accepted with"),
    ("awm", {"policy": {"guidance_image": 3.0}}, "policy.guidance_image: 3.0 (accepted with"),
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
    return LOSSES[loss].term(t, Given(given, Velocity(v), Beside(reference, None), sampler, 4.0))


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


def test_awm_looks_where_the_first_update_did_and_nft_anew(tiny_unified):
    """There alone is the old policy's log-prob known."""
    chunk, config = rolled(tiny_unified, settings("awm"))
    shape = (chunk.rollouts, 2)
    sampler, seeds = rollout_sampler(config.rollout), Seeds(0, "train")
    given = Asked(chunk, torch.ones(shape), torch.ones(shape, dtype=bool), sampler, seeds, 0)
    for loss, same in (("awm", True), ("nft", False)):
        first, second = (
            LOSSES[loss].ask(config.train, given._replace(update=update))[1] for update in (0, 1)
        )
        for name in ("x", "noise", "sigma"):
            equal = torch.equal(getattr(first, name), getattr(second, name))
            assert equal == same or (name == "sigma" and not same)


def test_a_second_update_of_awm_is_clipped_behind_a_large_step(tiny_unified):
    config = settings("awm", rollout={"window": 0}, train={"updates": 2, "lr": 1e-2})
    _, row = one_iteration(config, tiny_unified)
    assert row["ratio_error"] == 0 and row["clip_fraction"] > 0.5


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


def test_the_gradient_of_dpo_is_that_of_the_pairs_by_hand(tiny_unified):
    """Of a whole iteration, packed and walking: before any step the sigmoid is 1/2, so each pair
    pulls with beta / 2 at log p of its best and worst rollout, at every step."""
    for packed in ("on", "off"):
        config = settings("dpo", train={"packed": packed, "loss_options": {"beta": 8.0}})
        chunk, _ = rolled(tiny_unified, config)
        advantage = torch.tensor([[3.0, 0.0], [1, 2], [2, 1], [0, 0], [5, 1], [1, 0]])
        sign, mask = LOSSES["dpo"].prefer(advantage, torch.ones(6, 2, dtype=torch.bool), 3)
        sampler, seeds = rollout_sampler(config.rollout), Seeds(0, "train")
        state = new_state(config.train, tiny_unified)
        batch = Batch(
            [chunk], sign, mask, int(mask.sum()), sampler, seeds, config.policy, config.rollout
        )
        accumulate_gradient(config.train, state, batch, 0, 0, HERE)
        found = gradients(tiny_unified)
        state.optimizer.zero_grad()
        asked = Asked(chunk, sign, mask, sampler, seeds, 0)
        queries, given = stored(asked)
        options = ReplayOptions(False, False, None, 1.0, False)
        total, pairs = 0.0, int(mask.sum()) // 2
        for part in replay(tiny_unified, chunk, queries, options, mask):
            of = given.pick(part.index)
            log_prob = LOSSES["dpo"].log_prob(of, part.velocity, sampler)
            total = total - 8.0 / 2 * (of.advantage * log_prob).sum() / (pairs * sampler.window)
        total.backward()
        wanted = gradients(tiny_unified)
        state.optimizer.zero_grad()
        assert pairs == 4
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6 * float(wanted.abs().max()))


def gradients(policy: Any) -> Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
            for p in trainable(policy.module).values()
        ]
    )


def rolled(policy: Any, config: Config) -> tuple[Chunk, Config]:
    source = sessions_for(config, policy)
    chunk = Chunk([source[0], source[1]], [0, 1], 3)
    sampler, seeds = rollout_sampler(config.rollout), Seeds(0, "train")
    rollout_chunk(policy, chunk, sampler, seeds, config.policy, rollout=config.rollout)
    return chunk, config


# ------------------------------------------------------------------------------------- second order


def test_a_rollout_of_second_order_hands_on_the_clean_prediction(tiny_unified):
    """m_prev of every stored step is what the step before took for the clean image: of the first
    one an ODE step, which on the first turn the group's leader alone has taken."""
    config = settings(
        "grpo",
        "dpm++sde",
        rollout={"window_range": 0.6, "steps": 6, "shared_noise": True},
    )
    assert not rollout_sampler(settings("grpo").rollout).second_order
    sampler = rollout_sampler(config.rollout)
    assert sampler.second_order
    chunk, _ = rolled(tiny_unified, config)
    record = chunk.turns[0]
    source = np.stack([session.image for session in chunk.sessions]).repeat(3, 0)
    context = tiny_unified.instruct(tiny_unified.encode(source), record.text)
    starts = record.step_index[:, 0] - sampler.steps
    assert (starts > 0).any() and (sampler.table[record.step_index][..., 2] != 0).any()
    seeds = Seeds(0, "train").initial(chunk, record.rollout, 0)
    for i, start in enumerate(starts.tolist()):
        own = tiny_unified.select(context, torch.tensor([i]))
        x, clean = philox_normal(seeds[i : i + 1], INITIAL_STEP, tiny_unified.latent_shape), None
        for k in range(start):  # Euler's steps up to the window
            sigma, after = sampler.sigmas[k], sampler.sigmas[k + 1]
            v = tiny_unified.velocity(x, sigma[None], own).v.detach()
            x, clean = x + (after - sigma) * v, x - sigma * v
        if clean is not None:
            torch.testing.assert_close(record.m_prev[i, 0], clean[0], rtol=1e-3, atol=1e-4)
        x, sigma = record.x[i : i + 1, 0], record.sigma[i : i + 1, 0]
        v = tiny_unified.velocity(x, sigma, own).v.detach()
        torch.testing.assert_close(record.m_prev[i, 1], (x - sigma * v)[0], rtol=1e-3, atol=1e-4)


def test_training_of_second_order_meets_its_rollout_and_a_lost_m_prev_is_named(
    tiny_unified, monkeypatch
):
    config = settings("grpo", "dpm++sde", rollout={"window_range": 0.6, "steps": 6})
    _, row = one_iteration(config, tiny_unified)
    assert row["ratio_error"] <= 1e-5
    store = _Window.store

    def lost(self, move, x, m_prev, step):
        store(self, move, x, m_prev * 0, step)

    monkeypatch.setattr(_Window, "store", lost)
    with pytest.raises(RatioError, match="ratio: differs from 1"):
        one_iteration(config, tiny_unified)


WAYS: dict[str, dict[str, Any]] = {
    "updates": {"train": {"updates": 2}},
    "minibatches": {"train": {"minibatches": 2}, "rollout": {"groups_per_batch": 1}},
    "bf16 store": {"rollout": {"store_dtype": "bfloat16"}},
    "packed": {"train": {"packed": "on"}},
    "context gradient": {"train": {"context_gradient": True}},
    "intents": {"policy": {"intent": True, "intent_tokens": 3}},
    "average": {"train": {"ema": 0.5}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss, dynamics", [("awm", "cps"), ("dpo", "cps"), ("dpo", "dpm++sde")])
def test_new_losses_in_every_way(loss, dynamics, way, tiny_unified):
    _, row = one_iteration(settings(loss, dynamics, **WAYS[way]), tiny_unified)
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["ratio_error"] <= 1e-5


def test_the_sentinel_sees_a_rollout_that_dpo_does_not_repeat(tiny_unified, monkeypatch):
    store = _Window.store

    def moved(self, move, x, m_prev, step):
        store(self, move, x + 0.3, m_prev, step)

    monkeypatch.setattr(_Window, "store", moved)
    with pytest.raises(RatioError, match="ratio: differs from 1 .*first difference: turn 1"):
        one_iteration(settings("dpo"), tiny_unified)


@pytest.mark.parametrize(
    "dtype, gap, told",
    [
        ("bfloat16", 3e-4, "train.ratio_tolerance 0.001"),
        ("bfloat16", 3e-2, None),
        ("float32", 3e-4, None),
    ],
)
def test_rounding_is_named_where_it_may_be_the_cause(dtype, gap, told, tiny_unified, monkeypatch):
    """In low precision, and only of a difference that the recipes allow."""
    check = gradient._check_ratio

    def apart(t, state, batch, number, values):
        policy = dataclasses.replace(batch.policy, dtype=dtype)
        batch = dataclasses.replace(batch, policy=policy)
        check(t, state, batch, number, {**values, "ratio_error": gap})

    monkeypatch.setattr(gradient, "explain_difference", lambda *_: "none")
    monkeypatch.setattr(gradient, "_check_ratio", apart)
    with pytest.raises(RatioError, match="first difference: none") as raised:
        one_iteration(settings("grpo"), tiny_unified)
    assert ("rounds otherwise" in str(raised.value)) == (told is not None)
    assert (told or "") in str(raised.value)


@pytest.mark.parametrize("loss", ["awm", "dpo"])
def test_a_run_that_is_resumed_is_the_run_that_went_on(loss, tiny_unified, tmp_path):
    def run(name, iterations):
        config = settings(
            loss,
            train={"iterations": iterations, "lr_decay": 1.0, "warmup": 0},
            eval={"sessions": 2, "strips": 0},
        )
        config = replace_nested(config, {"out": str(tmp_path / name)})
        train(config, policy=copy.deepcopy(tiny_unified), reward=Bright())

    run("whole", 2)
    run("parts", 1)
    given = tmp_path / "parts"
    config = settings(
        loss, train={"iterations": 2, "lr_decay": 1.0}, eval={"sessions": 2, "strips": 0}
    )
    train(
        replace_nested(config, {"out": str(given)}),
        policy=copy.deepcopy(tiny_unified),
        reward=Bright(),
        resume_anyway=["train.iterations"],
    )
    kept = [
        (tmp_path / name / "policy" / "model.safetensors").read_bytes()
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_check_says_what_a_loss_looks_at(loss, capsys):
    window = 0 if loss == "nft" else 2
    options = ["--train.loss_options={draws: 5}"] if loss == "awm" else []
    words = [f"--train.loss={loss}", f"--rollout.window={window}", *options]
    words += ["--rollout.shared_noise=false", "--gpu=h100"]
    # Of little besides: what is measured for the rest of the page takes seconds.
    words += ["--policy.intent=false", "--rollout.turns=1", "--eval.sessions=1"]
    words += ["--rollout.sessions=1", "--rollout.siblings=2", "--eval.strips=1"]
    assert main(["check", *words]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("trained")]
    wanted = {"awm": "5 noise levels a turn, the same", "nft": "2 noise levels a turn and update"}
    assert wanted.get(loss, "2 of 4 steps a turn") in line


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
        return noised(asked, 2)

    def problems(self, config: Config) -> Iterator[str]:
        return iter(())

    def term(self, t, given):
        samples, velocity, _, _, normalizer = given
        away = (velocity.v - (samples.noise - samples.x_next)).abs()
        distance = (away ** self.settings(t).power).flatten(1).mean(1)
        counted = torch.where(samples.mask, samples.advantage * distance, 0.0)
        mean = distance.detach().mean()
        return Term(counted.sum() / normalizer, {"kl": torch.zeros(()), "distance": mean})


class _Wrong(_Distance):
    """An entry that returns what `make` makes of the right term."""

    def __init__(self, make, logs=("distance",)):
        self.make, self.logs = make, logs

    def term(self, *arguments):
        return self.make(super().term(*arguments))


WRONG_TERMS = {
    "none": (lambda term: None, "term returned a NoneType (accepted: a Term)"),
    "vector": (
        lambda term: dataclasses.replace(term, loss=term.loss.expand(3)),
        "term's loss has shape [3] (accepted: one number)",
    ),
    "no gradient": (
        lambda term: dataclasses.replace(term, loss=term.loss.detach()),
        "term's loss has no gradient (accepted: one that depends on the velocity)",
    ),
    "no log": (
        lambda term: dataclasses.replace(term, means={}),
        "term's means lack distance (accepted: all of its logs)",
    ),
}


@pytest.mark.parametrize("case", WRONG_TERMS)
def test_what_an_entry_may_not_return_is_one_line(case, tiny_unified, monkeypatch):
    make, said = WRONG_TERMS[case]
    monkeypatch.setitem(LOSSES, "distance", _Wrong(make))
    with pytest.raises(UserError) as error:
        one_iteration(settings("distance"), tiny_unified)
    assert str(error.value) == f"train.loss: 'distance': {said}"


@pytest.mark.parametrize("name", ["loss", "reward", "grad_norm"])
def test_logs_do_not_take_a_name_that_a_row_has(name, tiny_unified, monkeypatch):
    def renamed(term):
        return dataclasses.replace(term, means={name: term.means["distance"]})

    monkeypatch.setitem(LOSSES, "distance", _Wrong(renamed, (name,)))
    with pytest.raises(UserError, match=f"train.loss: 'distance': logs: {name} "):
        one_iteration(settings("distance"), tiny_unified)


@dataclasses.dataclass(frozen=True)
class _Shape:
    width: float = 1.0
    made: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass(frozen=True)
class _ManyOptions:
    name: str
    file: Path = Path("judge.txt")
    levels: tuple[float, float] = (0.0, 1.0)
    shape: _Shape = dataclasses.field(default_factory=_Shape)


class _Many(_Distance):
    options = _ManyOptions


FULL = [
    ("grpo", {}, {}),
    ("nft", {}, {}),
    ("dpo", {}, {"beta": 1000.0}),
    ("dpo", {"beta": "1e3"}, {"beta": 1000.0}),
    ("awm", {"draws": 5}, {"draws": 5, "clip": 1e-4}),
    (
        "many",
        {"name": "x", "levels": [1, "1e3"]},
        {"name": "x", "file": "judge.txt", "levels": [1.0, 1000.0], "shape": {"width": 1.0}},
    ),
]


@pytest.mark.parametrize("loss, given, full", FULL)
def test_a_run_has_all_options_of_its_loss_as_the_loss_takes_them(loss, given, full, monkeypatch):
    """Plain values, which come back the same from a file and from another check."""
    monkeypatch.setitem(LOSSES, "many", _Many())
    window = {"window": 0 if loss == "nft" else 2}
    config = settings(loss, rollout=window, train={"loss_options": given})
    checked = check_config(config)
    assert repr(checked.train.loss_options) == repr(full)
    assert check_config(checked) == checked
    assert LOSSES[loss].settings(checked.train) == LOSSES[loss].settings(config.train)
    assert json.loads(json.dumps(dataclasses.asdict(checked)))["train"]["loss_options"] == full
    assert check_config(config, "eval").train.loss_options == given  # which is under no rule of it


def test_a_loss_more_is_an_entry(tiny_unified, monkeypatch):
    monkeypatch.setitem(LOSSES, "distance", _Distance())
    config = settings("distance", train={"loss_options": {"power": 1.0}})
    _, row = one_iteration(config, tiny_unified)
    assert row["distance"] > 0 and row["grad_norm"] > 0 and row["ratio_error"] == 0
    wrong = settings("distance", train={"loss_options": {"power": 9}})
    assert problem_of(wrong) == (
        "train.loss_options.power: 9.0 (accepted: a number, above 0, at most 4)"
    )
