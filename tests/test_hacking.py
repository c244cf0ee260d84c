"""What stands against a policy that pleases its judge and nobody else: judges that training never
asks, the alarm where they and the reward part, drift of the images, the best weights, and the end
of a run that does not get better."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from editr2.cli.evaluate import evaluation_text
from editr2.errors import CheckpointError, ConfigError
from editr2.report import build_report
from editr2.rewards.base import RewardFailure, Score
from editr2.rl.metrics import evaluation_line
from editr2.run.tracking import read_metrics

HERE = __name__


class Bright:
    """In the small run of `killed_runs`, a judge of the name that is trained on, of other
    numbers."""

    names = ("bright", "kept")

    def __init__(self, level: float = 0.5) -> None:
        self.level, self.facts = level, {"who": "a test"}

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        return [{"bright": Score(self.level), "kept": Score(1.0)} for _ in images]


class Failing:
    names = ("bright",)

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        asked = images.mean() != session.image.mean()  # source images are asked about first
        return [{"bright": Score(None, "no") if asked else Score(1.0)} for _ in images]


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


def listed(*uses: dict[str, Any], **evaluation: Any) -> dict[str, Any]:
    return {"eval": {"reward": list(uses), **evaluation}}


def bright(**changes: Any) -> dict[str, Any]:
    return {"function": f"{HERE}:Bright", **changes}


def rows_of(run: Path, event: str = "eval") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == event]


# -------------------------------------------------------------------------------------- eval.reward


@pytest.fixture(scope="module")
def judged(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judged") / "run"
    return runs.train_once(folder, **listed(bright(options={"level": 0.25})))


def test_scores_of_eval_reward_stand_apart(runs, judged, tmp_path):
    """In names of their own, though they are called as the trained ones; the trained numbers are
    those of a run without them."""
    for row in rows_of(judged):
        apart = row["eval_reward"]
        assert [x["mean"] for x in apart["bright_turn"]] == [0.25] * 2
        assert [x["mean"] for x in apart["kept_turn"]] == [1.0] * 2
        assert [x["mean"] for x in apart["reward_turn"]] == [0.625] * 2
        assert apart["per_session"]["reward"] == [0.625] * 2
        trained = np.array(row["per_session"]["bright"]).mean(1)
        np.testing.assert_allclose(apart["per_session"]["trained"], trained, atol=1e-6)
        assert row["reward_turn"][0]["mean"] != 0.25
    (start,) = rows_of(judged, "start")
    assert start["eval_reward"] == {"names": ["bright", "kept"], "judges": {"who": "a test"}}
    without = runs.train_once(tmp_path / "run")
    alone = ("eval_reward", "parted", "alarms")
    both = zip(runs.record(judged), runs.record(without), strict=True)
    for one, two in both:
        assert {k: v for k, v in one.items() if k not in alone} == two
    purposes = {json.loads(line)["purpose"] for line in (judged / "judges.jsonl").open()}
    assert {"eval", "eval.reward"} <= purposes


def test_lines_of_eval_reward(judged):
    row = rows_of(judged)[0]
    line = evaluation_line(row)
    assert line.endswith(
        "; eval.reward t1 0.625  t2 0.625; eval.bright t1 0.250  t2 0.250"
        "; eval.kept t1 1.000  t2 1.000"
    )
    text = evaluation_text(row)
    assert re.search(r"turn +reward +bright +eval\.reward +eval\.bright +eval\.kept", text)
    assert text.splitlines()[2].count("0.625") == 1
    broken = {**row, "eval_reward": {**row["eval_reward"], "failed_scores": 3}}
    assert "eval.reward: turns without a score: 3" in evaluation_text(broken)
    page = build_report(judged).read_text("utf-8")
    assert "eval.bright, turn 2" in page and "eval.reward, turn 1" in page


def test_failures_of_eval_reward_are_its_own(runs, tmp_path):
    with pytest.raises(RewardFailure, match=r"^eval\.reward: reward bright: 4 of 4 turns"):
        runs.train_once(tmp_path / "run", **listed({"function": f"{HERE}:Failing"}))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "named twice": (bright(name="world"), r"eval\.reward\[0\]\.name: 'world' \(accepted with"),
    "not named": ({}, r"eval\.reward\[0\]: names no reward"),
    "unknown": ({"name": "nobody"}, r"eval\.reward\[0\]\.name: 'nobody' \(accepted: "),
    "option": (
        bright(options={"lvl": 1}),
        r"eval\.reward\[0\]\.options\.lvl: .* no such option \(accepted: level\)",
    ),
    "key": ({"nme": "world"}, r"unknown key 'eval\.reward\[0\]\.nme'"),
}


@pytest.mark.parametrize("use, message", WRONG.values(), ids=WRONG)
def test_a_wrong_eval_reward(runs, tmp_path, use, message):
    with pytest.raises(ConfigError, match=message):
        runs.train_once(tmp_path / "run", **listed(use))


def test_a_run_goes_on_with_the_same_eval_reward(runs, judged):
    """How often it is called may change; what it is may not."""
    same = bright(options={"level": 0.25}, retries=2, concurrency=1)
    runs.train_once(judged, **listed(same))
    other = bright(options={"level": 0.75})
    with pytest.raises(CheckpointError, match=r"eval_reward: .*:Bright .* given"):
        runs.train_once(judged, **listed(other))
    with pytest.raises(CheckpointError, match=r"eval\.reward: \[.*\] saved, \[\] given"):
        runs.train_once(judged)
