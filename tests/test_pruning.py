"""Turns that the filter leaves untrained need not be rolled out: what is trained stays as it was,
and where it would not, it is refused."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from editr2 import training
from editr2.config import Config, CreditConfig, replace_nested
from editr2.errors import ConfigError
from editr2.rewards.adapt import panel
from editr2.rewards.base import Item, Score, check_failures, lay_out
from editr2.rewards.pool import Pool
from editr2.rl.credit import assign_credit
from editr2.rl.evaluate import success
from editr2.rl.iteration import learn, roll_out
from editr2.rl.rollout import Chunk
from editr2.rl.rules import check_pruning
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import open_processes
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


class Fails:
    """IF of a turn by a draw from the rollout's place, 0 of every third, whatever the image is, so
    that it is the same of a rollout that was rolled out in another batch; CC from pixels."""

    names = ("IF", "CC")
    by_turn = True
    share = 3

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        self.asked += [(item.rollout, item.asked) for item in items]
        return [[self.turn(item, t) for t in item.asked] for item in items]

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        digest = hashlib.sha256(f"{item.session.id} {item.rollout} {turn}".encode()).digest()
        right = 0.0 if digest[0] % self.share == 0 else 0.25 + digest[1] / 512
        return {"IF": Score(right), "CC": Score(float(item.images[turn].mean() / 255))}


class Threads(Fails):
    """The same, asked from threads."""

    concurrency = 2
    batch = 1


class Breaks(Fails):
    """CC fails where IF is 0: such a turn is masked, and filters nothing."""

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        row = super().turn(item, turn)
        return {**row, "CC": Score(None, "down")} if row["IF"].value == 0 else row


class Always(Fails):
    """IF is 0 from the first turn on."""

    share = 1


class Guesses(Fails):
    """Whose estimate gives up the odd rollouts behind the first turn."""

    share = 257  # IF is hardly ever 0

    def estimate(self, items: Sequence[Item]) -> list[bool]:
        return [item.rollout % 2 == 1 and item.asked == (0,) for item in items]


def config_of(runs: ModuleType, out: Path, prune: str, **changes: Any) -> Config:
    values = {
        "rollout": {"sessions": 4, "siblings": 4, "turns": 3, "prune": prune, "steps": 2},
        "credit": {"preset": "edit-r2", "weights": {"IF": 0.6, "CC": 0.4}},
        "train": {"iterations": 2, "max_failed_scores": 1.0},
        "eval": {"every": 0, "strips": 0},
    }
    config = replace_nested(runs.configured(out, "ema"), values)
    return replace_nested(config, changes)


# ------------------------------------------------------------------------------------------- credit


def scores_of(values: np.ndarray, *, prune: bool) -> Any:
    """values: [N, T, K], NaN of a failed score. prune: without the turns behind an IF of 0 of a
    turn without a failure."""
    sessions, said = [], []
    image = np.zeros((2, 2, 3), np.uint8)
    for n, of in enumerate(values):
        sessions.append(Session(str(n), image, tuple(Turn(str(t)) for t in range(len(of)))))
        rows = []
        for row in of:
            rows.append(
                {
                    name: Score(None, "down") if np.isnan(x) else Score(float(x))
                    for name, x in zip(("IF", "CC", "GA"), row, strict=True)
                }
            )
            if prune and row[0] == 0 and not np.isnan(row).any():
                break
        said.append(rows)
    return lay_out(("IF", "CC", "GA"), sessions, said, values.shape[1])


@pytest.mark.parametrize("failures", [0.0, 0.1])
def test_credit_is_that_of_turns_that_were_rolled_out(failures):
    """In every bit, under each preset that filters turn by turn and every option of it."""
    rng = np.random.default_rng(3)
    values = rng.random((48, 4, 3)).astype(np.float32)
    values[rng.random(values.shape) < 0.25] = 0.0
    values[rng.random(values.shape) < failures] = np.nan
    group = torch.arange(8).repeat_interleave(6)
    whole, pruned = (scores_of(values, prune=prune) for prune in (False, True))
    assert int(pruned.pruned.sum()) > 30 and not whole.pruned.any()
    seen = 0
    options = itertools.product(
        ("session", "session_turn"),
        ("reward", "advantage", "gdpo"),
        ("group", "global", "off"),
        ("edit-r2", "flow-grpo", "pku", "dance-grpo", "flow-factory"),
    )
    for baseline, fusion, std, preset in options:
        config = CreditConfig(preset, filter=True, baseline=baseline, fusion=fusion, std=std)
        one, two = (assign_credit(scores, group, config) for scores in (whole, pruned))
        assert torch.equal(one.mask, two.mask)
        assert torch.equal(one.advantage, two.advantage), config
        seen += int((one.advantage != 0).sum())
    assert seen > 1000
    other = CreditConfig("edit-r2-released")  # filtered turns count: what is refused
    one, two = (assign_credit(scores, group, other) for scores in (whole, pruned))
    assert not torch.equal(one.advantage, two.advantage)


def test_pruned_turns_in_what_is_counted():
    values = np.array([[[1, 1, 1], [0, 1, 0], [1, 1, 1]], [[1, 1, 1]] * 3], np.float32)
    pruned = scores_of(values, prune=True)
    assert pruned.pruned.tolist() == [[False, False, True], [False] * 3]
    assert pruned.failed == 0 and pruned.not_applicable == 0
    assert success(pruned).tolist() == [0.0, 1.0]
    group = torch.zeros(2, dtype=torch.int64)
    for preset in ("edit-r2", "flow-grpo"):  # without the filter, as an estimate may be
        config = CreditConfig(preset, filter=False)
        assert torch.equal(assign_credit(pruned, group, config).mask, ~pruned.pruned)
    alone = values[..., :2]
    sessions = [Session(str(n), np.zeros((2, 2, 3), np.uint8), (Turn("a"),) * 3) for n in range(2)]
    rows = [[{"IF": Score(float(a)), "CC": Score(float(b))} for a, b in of] for of in alone]
    without = lay_out(("IF", "CC"), sessions, [rows[0][:2], rows[1]], 3)
    assert success(without).tolist() == [0.0, 1.0]
    bad = {"IF": Score(None, "down"), "CC": Score(1.0)}
    many = lay_out(("IF", "CC"), sessions * 5, [[bad, *rows[0][:1]]] * 10, 3)
    check_failures(many, 0.5)  # half of the turns that were asked about
    with pytest.raises(Exception, match="reward IF: 10 of 20 turns could not be scored"):
        check_failures(many, 0.49)


REFUSED: dict[str, tuple[dict[str, Any], Any, str | None]] = {
    "exact": ({}, Fails(), None),
    "over all turns": ({"credit": {"aggregate": "mean"}}, Fails(), "credit per turn; what aggreg"),
    "no filter": ({"credit": {"filter": False}}, Fails(), "a filter \\(credit.filter and a reward"),
    "filtered turns count": (
        {"credit": {"preset": "edit-r2-released"}},
        Fails(),
        "filtered turns outside of the statistics; those of this preset",
    ),
    "asked about wholes": (
        {},
        type("Whole", (Fails,), {"by_turn": False})(),
        "rewards that can be asked about single turns \\(by_turn\\); reward cannot",
    ),
    "without an estimate": (
        {"rollout": {"prune": "estimate"}},
        Fails(),
        "a reward that has an estimate",
    ),
    "an estimate": (
        {"rollout": {"prune": "estimate"}, "credit": {"filter": False}},
        Guesses(),
        None,
    ),
    "an estimate over all turns": (
        {"rollout": {"prune": "estimate"}, "credit": {"aggregate": "last"}},
        Guesses(),
        "credit per turn",
    ),
}


@pytest.mark.parametrize("changes, reward, message", REFUSED.values(), ids=REFUSED)
def test_where_it_would_not_be_the_same_it_is_refused(runs, tmp_path, changes, reward, message):
    config = config_of(runs, tmp_path, "filter", **changes)
    if message is None:
        check_pruning(config, panel(reward))
        return
    with pytest.raises(ConfigError, match=rf"rollout\.prune: \w+ \(accepted with {message}.*: off"):
        check_pruning(config, panel(reward))


# ------------------------------------------------------------------------------------------ rollout


def one_iteration(
    runs: ModuleType, tmp_path: Path, prune: str, reward: Any, **changes: Any
) -> tuple[list[Chunk], dict[str, Any], torch.Tensor]:
    """The chunks, the row and the optimiser's first moments behind one iteration: a tenth of the
    clipped gradient."""
    config = config_of(runs, tmp_path, prune, **changes)
    processes, policy = open_processes(), runs.tiny()
    state = new_state(config.train, policy)
    source, pool = sessions_for(config, policy), Pool(panel(reward))
    sampler = rollout_sampler(config.rollout, None)
    rolled = roll_out(config, state, source, pool, sampler, processes)
    row = learn(config, state, source, rolled, processes)
    moments = state.optimizer.state.values()
    return rolled.batch.chunks, row, torch.cat([m["exp_avg"].flatten() for m in moments])


def denoised(chunks: Sequence[Chunk]) -> int:
    return sum(len(record.rollout) for chunk in chunks for record in chunk.turns)


METHODS: dict[str, dict[str, Any]] = {
    "walked": {"train": {"packed": "off"}},
    "packed": {"train": {"packed": "on"}},
    "nft": {
        "rollout": {"window": 0, "shared_noise": False},
        "train": {"loss": "nft", "old_decay": 0.1},
    },
    "text": {"policy": {"intent": True, "intent_tokens": 2}, "train": {"updates": 2}},
    "dpo": {"train": {"loss": "dpo", "kl_weight": 0.0}},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("reward", [Fails, Threads])
def test_the_gradient_is_that_of_rolling_out_everything(runs, tmp_path, changes, reward):
    """Fewer rollouts, and the gradient as without: bitwise where each row of a batch has the bits
    that it has in another, which is so here but for the packed replay; else to rounding."""
    whole, row, gradient = one_iteration(runs, tmp_path, "off", reward(), **changes)
    fewer, pruned, same = one_iteration(runs, tmp_path, "filter", reward(), **changes)
    left_out = denoised(whole) - denoised(fewer)
    assert pruned["pruned_turns"] == left_out > 5 and "pruned_turns" not in row
    assert pruned["filtered_turns"] == row["filtered_turns"] == left_out
    for one, two in zip(whole, fewer, strict=True):
        for a, b in zip(one.turns, two.turns, strict=True):
            kept = torch.isin(a.rollout, b.rollout)
            torch.testing.assert_close(a.x0[kept], b.x0, rtol=0, atol=2e-5)
    assert row["grad_norm"] > 0
    assert pruned["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    print(f"gradients differ by {float((same - gradient).norm() / gradient.norm()):.1e}")
    torch.testing.assert_close(same, gradient, rtol=0, atol=1e-5 * float(gradient.norm()))


def test_a_turn_that_is_masked_filters_nothing(runs, tmp_path):
    chunks, row, _ = one_iteration(runs, tmp_path, "filter", Breaks())
    assert row["pruned_turns"] == 0 and row["failed_scores"] > 5
    assert denoised(chunks) == 4 * 4 * 3


def test_nobody_goes_on(runs, tmp_path):
    """Turns that no rollout has are in no record, and None in the row."""
    chunks, row, _ = one_iteration(runs, tmp_path, "filter", Always())
    assert all(len(chunk.turns) == 1 for chunk in chunks)
    assert row["pruned_turns"] == row["filtered_turns"] == 2 * 4 * 4
    assert row["if_turn"] == [0.0, None, None] and row["success"] == 0.0


def test_each_turn_is_asked_about_once(runs, tmp_path):
    reward = Fails()
    chunks, _, _ = one_iteration(runs, tmp_path, "filter", reward)
    assert len(reward.asked) == len(set(reward.asked)) == denoised(chunks)
    assert {len(asked) for _, asked in reward.asked} == {1}


def test_an_estimate_ends_rollouts(runs, tmp_path):
    chunks, row, _ = one_iteration(runs, tmp_path, "estimate", Guesses())
    assert row["pruned_turns"] == 8 * 2
    assert all(set(record.rollout.tolist()) == {0, 2, 4, 6} for record in chunks[0].turns[1:])
    bad = Guesses()
    bad.estimate = lambda items: [0.5] * len(items)  # type: ignore[method-assign,assignment]
    with pytest.raises(
        ConfigError, match=r"estimate\(\) gave a list of 8 \(accepted: a list of 8,"
    ):
        one_iteration(runs, tmp_path, "estimate", bad)


@pytest.mark.parametrize("name, which", [("accumulate_gradient: before", 2), ("append: after", 3)])
def test_killed_and_resumed(runs, tmp_path, name, which):
    """Also where a rollout is made ahead."""
    config = {"rollout": {"ahead": True}, "checkpoint": {"every": 2}, "train": {"iterations": 3}}

    def run(folder: Path) -> Path:
        made = config_of(runs, folder, "filter", **config)
        return training.train(made, policy=runs.tiny(), reward=Threads())

    def die() -> None:
        raise runs.Killed

    with runs.dying_at(0, die) as passed:
        whole = run(tmp_path / "whole")
    number = [n for n, point in enumerate(passed, 1) if point == name][which - 1]
    with pytest.raises(runs.Killed), runs.dying_at(number, die):
        run(tmp_path / "other")
    assert runs.record(run(tmp_path / "other")) == runs.record(whole)
    rows = [row for row in read_metrics(whole / "metrics.jsonl")[0] if row["event"] == "train"]
    assert all(row["pruned_turns"] > 0 for row in rows)
