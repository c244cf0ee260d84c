"""What stands against a policy that pleases its judge and nobody else: judges that training never
asks, the alarm where they and the reward part, drift of the images, the best weights, and the end
of a run that does not get better."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from editr2 import training
from editr2.cli.evaluate import evaluation_text
from editr2.config import Config, DriftConfig, replace_nested
from editr2.errors import CheckpointError, ConfigError
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.report import build_report
from editr2.rewards.base import RewardFailure, Score, Scores
from editr2.rl.drift import LUMA, MEASURES, drift
from editr2.rl.evaluate import Evaluation
from editr2.rl.metrics import evaluation_line
from editr2.rl.watch import alarms, best_of, metric_of, new_alarms, parted, stop_row
from editr2.run.checkpoint import latest_checkpoint
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


# -------------------------------------------------------------------------------------------- drift


def scene(size: int = 32) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(60, 190, (size // 4, size // 4, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 4, 0), 4, 1)


def grey(image: np.ndarray) -> np.ndarray:
    return np.repeat((image @ np.array(LUMA))[..., None], 3, -1).astype(np.uint8)


def blurred(image: np.ndarray) -> np.ndarray:
    wide = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    near = [wide[a : a + len(image), b : b + len(image)] for a in range(3) for b in range(3)]
    return (sum(near) / 9).astype(np.uint8)


def louder(image: np.ndarray) -> np.ndarray:
    mean = image.mean(-1, keepdims=True)
    return np.clip(mean + 1.5 * (image - mean), 0, 255).astype(np.uint8)


FLAT = np.full((32, 32, 3), 90, np.uint8)

DRIFTED: dict[str, tuple[np.ndarray, np.ndarray, tuple[Any, Any, Any]]] = {
    "the same": (scene(), scene(), (1, 1, 1)),
    "grey": (scene(), grey(scene()), ((0.9, 1.0), (0.01, 0.03), (0.9, 1.1))),
    "blurred": (scene(), blurred(scene()), ((0.2, 0.8), (0.3, 0.8), (0.0, 0.2))),
    "louder": (scene(), louder(scene()), ((0.9, 1.0), (1.3, 1.5), (1.2, 1.4))),
    "inverted": (scene(), 255 - scene(), (-1, 1, 1)),
    "another": (scene(), scene()[::-1, ::-1], ((-0.2, 0.2), 1, 1)),
    "flat and flat": (FLAT, FLAT, (1, 1, 1)),
    "flat and not": (FLAT, scene(), (0, (20, 90), (500, 1e6))),
    "another size": (scene(), np.repeat(np.repeat(scene(), 2, 0), 2, 1), ((0.99, 1), 1, 1)),
}


@pytest.mark.parametrize("source, image, want", DRIFTED.values(), ids=DRIFTED)
def test_what_drift_sees(source, image, want):
    (seen,) = drift(source, image[None])
    for value, expected in zip(seen, want, strict=True):
        low, high = expected if isinstance(expected, tuple) else (expected - 0.02, expected + 0.02)
        assert low <= value <= high, (seen, want)


def test_drift_in_the_row_of_an_evaluation(judged):
    """By turn; ratios by their geometric mean."""
    for row in rows_of(judged):
        assert set(row["drift"]) == {f"{name}_turn" for name in MEASURES}
        assert all(len(turns) == 2 and turns[0]["se"] for turns in row["drift"].values())
    lines = evaluation_text(rows_of(judged)[0]).splitlines()
    at = [n for n, line in enumerate(lines) if " by turn, 1 as the source: " in line]
    assert [lines[n].partition(" ")[0] for n in at] == list(MEASURES)
    said = lines[at[-1] + 1]  # what they are, once, behind them
    assert said.startswith("(") and "docs/rewards.md" in said
    assert all(f"{name}: " in said for name in MEASURES)
    assert "sharpness, turn 2" in build_report(judged).read_text("utf-8")
    seen = torch.tensor([[[1.0, 2.0, 1.0]], [[0.5, 0.5, 1.0]]], dtype=torch.float64)
    zeros = torch.zeros(2, 1)
    scores = Scores(("s",), zeros[..., None], zeros == 0, zeros == 0, {})
    row = Evaluation(scores, zeros, zeros[:, 0], [None, None], None, seen).row(0, "x")
    assert row["drift"]["structure_turn"][0]["mean"] == 0.75
    assert row["drift"]["saturation_turn"][0]["mean"] == 1.0


# ------------------------------------------------------------------------------------------ alarms


def row_at(
    iteration: int, trained: Sequence[float | None], apart: Sequence[float | None], **more: Any
) -> dict[str, Any]:
    said = {"trained": list(trained), "reward": list(apart)}
    return {"event": "eval", "iteration": iteration, "eval_reward": {"per_session": said}} | more


def at(level: float, spread: float = 0.01, sessions: int = 8) -> list[float]:
    """Of sessions that differ by half from each other, and little from one evaluation to the
    next."""
    return [level + 0.5 * (i % 2) + spread * ((i // 2) % 2) for i in range(sessions)]


START = row_at(0, at(0.2, 0.0), at(0.3, 0.0))

PARTED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], int | None, bool]] = {
    # earlier evaluations, the row, since when, whether it alarms
    "the first": ([], row_at(0, at(0.2), at(0.3)), None, False),
    "both rise": ([START], row_at(5, at(0.3), at(0.4)), None, False),
    "as it was": ([START], row_at(5, at(0.3), at(0.3, 0.0)), None, False),
    "they part": ([START], row_at(5, at(0.3), at(0.2)), 0, True),
    "both fall": ([START], row_at(5, at(0.1), at(0.2)), 0, False),
    "within two errors": ([START], row_at(5, at(0.3), at(0.3, -0.01)[::-1]), 0, False),
    "one that hardly rises": ([START], row_at(5, at(0.19, 0.02), at(0.2)), 0, False),
    "since the best": (
        [START, row_at(5, at(0.3), at(0.4)), row_at(10, at(0.35), at(0.38))],
        row_at(15, at(0.4), at(0.36)),  # above the start
        5,
        True,
    ),
    "one session": ([row_at(0, [0.1], [0.5])], row_at(5, [0.2], [0.4]), 0, False),
    "not scored both times": (
        [START],
        row_at(5, [None, 0.8] + at(0.3)[2:], [None, 0.7] + at(0.2)[2:]),
        0,
        True,
    ),
    "none scored": ([START], row_at(5, at(0.3), [None] * 8), None, False),
    "of other sessions": ([START], row_at(5, at(0.3)[1:], at(0.2)[1:]), None, False),
    "no such judges": ([{"event": "eval", "iteration": 0}], {"event": "eval"}, None, False),
}
STILL = {f"{name}_turn": [{"mean": 1.0, "se": 0.0}] for name in MEASURES}


@pytest.mark.parametrize("earlier, row, since, alarm", PARTED.values(), ids=PARTED)
def test_when_the_reward_and_its_check_part(earlier, row, since, alarm):
    changes = parted(row, earlier)
    assert (changes and changes["since"]) == since
    found = alarms({**row, "parted": changes, "drift": STILL}, DriftConfig())
    assert list(found) == ["parted"] * alarm
    if alarm:
        assert f"since iteration {since}, where eval.reward was highest" in found["parted"]


def drifted(**turns: Sequence[float | None]) -> dict[str, Any]:
    said = {f"{k}_turn": [{"mean": v, "se": 0.0} for v in values] for k, values in turns.items()}
    return {"drift": STILL | said}


DRIFT_LIMITS: dict[str, tuple[dict[str, float], dict[str, Any], str | None]] = {
    "none": ({}, drifted(structure=[0.1], saturation=[9.0], sharpness=[9.0]), None),
    "structure kept": ({"structure": 0.5}, drifted(structure=[0.9, 0.5]), None),
    "structure lost": (
        {"structure": 0.5},
        drifted(structure=[0.9, 0.4, 0.45]),
        "structure of outputs against their sources is 0.4 at turn 2 (eval.drift.structure: "
        "at least 0.5)",
    ),
    "louder": (
        {"saturation": 1.5},
        drifted(saturation=[1.2, 1.6]),
        "saturation of outputs against their sources is 1.6 at turn 2 (eval.drift.saturation: "
        "0.667 to 1.5)",
    ),
    "greyer": (
        {"saturation": 1.5},
        drifted(saturation=[0.5, 1.6]),
        "saturation of outputs against their sources is 0.5 at turn 1 (eval.drift.saturation: "
        "0.667 to 1.5)",
    ),
    "in between": ({"saturation": 1.5}, drifted(saturation=[0.7, 1.5]), None),
    "blurred": (
        {"sharpness": 4},
        drifted(sharpness=[0.2]),
        "sharpness of outputs against their sources is 0.2 at turn 1 (eval.drift.sharpness: "
        "0.25 to 4)",
    ),
    "nothing seen": ({"sharpness": 4}, drifted(sharpness=[None]), None),
}


@pytest.mark.parametrize("limits, row, text", DRIFT_LIMITS.values(), ids=DRIFT_LIMITS)
def test_limits_of_drift(limits, row, text):
    assert list(alarms(row, DriftConfig(**limits)).values()) == ([text] if text else [])


def test_an_alarm_is_said_when_it_begins():
    rows = [{"alarms": {"parted": "a"}}, {}, {"alarms": {"parted": "b"}}, {"alarms": {}}]
    rows.append({"alarms": {"parted": "c", "structure": "d"}})
    rows.append({"alarms": {"parted": "e", "structure": "f", "sharpness": "g"}})
    said = [new_alarms(row, rows[:n]) for n, row in enumerate(rows)]
    assert said == [["a"], [], ["b"], [], ["c", "d"], ["g"]]


class Moving:
    """Says more with every call, or less: by session the same, so that the change is sure."""

    names = ("bright",)

    def __init__(self, step: float = 0.001) -> None:
        self.step, self.value = step, 0.5

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        self.value += self.step
        return [{"bright": Score(self.value)} for _ in images]


def test_alarms_of_a_run(runs, tmp_path, capsys):
    """Once on the terminal and in the report, and in the row as long as it stands."""
    changes = listed(
        {"function": f"{HERE}:Moving", "options": {"step": -0.001}}, drift={"structure": 1.0}
    )
    config = runs.configured(tmp_path / "run", "ema", **changes)
    training.train(config, policy=runs.tiny(), reward=Moving())
    rows = rows_of(tmp_path / "run")
    assert [list(row["alarms"]) for row in rows] == [["structure"]] + [["parted", "structure"]] * 4
    assert all(row["parted"]["since"] == 0 for row in rows[1:])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ALARM")]
    assert [line.split()[1] for line in said] == ["structure", "since"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("eval.reward fell by") == 1 and "Evaluation at iteration 1: since" in page
    assert "Trained reward and eval.reward" in page


# ---------------------------------------------------------------------------- the best, and the end


def evaluated(iteration: int, value: float | None, name: str = "during") -> dict[str, Any]:
    stat = {"mean": value, "se": None}
    return {
        "event": "eval",
        "name": name,
        "iteration": iteration,
        "reward_turn": [stat, {"mean": None if value is None else value / 2, "se": None}],
        "if_turn": [{"mean": 0.5, "se": None}, {"mean": None, "se": None}],
        "success": {"mean": 0.25, "se": None},
        "eval_reward": {"reward_turn": [{"mean": 0.75, "se": 0}], "if_turn": [stat]},
    }


METRICS = {
    "reward": 0.6,
    "IF": 0.5,
    "success": 0.25,
    "eval.reward": 0.75,
    "eval.IF": 0.8,
    "eval.CC": None,
}


@pytest.mark.parametrize("metric, value", METRICS.items())
def test_metrics_of_an_evaluation(metric, value):
    assert metric_of(evaluated(0, 0.8), metric) == (value and pytest.approx(value))


COURSES: dict[str, tuple[list[float | None], int, int | None]] = {
    # values of the evaluations before and during, at 0, 5, 10 ...; the best; where patience 2 ends
    "rising": ([0.1, 0.2, 0.3], 10, None),
    "falling": ([0.3, 0.2, 0.1], 0, 10),
    "one bad": ([0.1, 0.3, 0.2], 5, None),
    "two bad": ([0.1, 0.3, 0.2, 0.25], 5, 15),
    "equal is no rise": ([0.1, 0.3, 0.3, 0.3], 5, 15),
    "bad, good, bad": ([0.2, 0.1, 0.3, 0.2], 10, None),
    "none scored": ([None, None, None], None, None),
    "not scored is no rise": ([0.1, None, None], 0, 10),
}


@pytest.mark.parametrize("values, best, end", COURSES.values(), ids=COURSES)
def test_the_best_and_the_end_of_a_course(values, best, end):
    config = replace_nested(
        Config(), {"checkpoint": {"best": "reward"}, "train": {"stop_after": 2}}
    )
    rows, ends = [], []
    for n, value in enumerate(values):
        rows.append(evaluated(5 * n, value, "during" if n else "before"))
        if (row := stop_row(config, rows, 5 * n)) is not None:
            ends.append((row["iteration"], row["best"]["iteration"]))
        assert stop_row(config, rows, 5 * n + 1) is None  # there is no evaluation
    found = best_of(rows, "reward")
    assert (found and found.row["iteration"]) == best
    assert ends == ([(end, best)] if end is not None else [])
    assert stop_row(Config(), rows, 5 * n) is None
    rows.append(evaluated(5 * n, values[-1], "after"))  # of the same weights, no evaluation more
    assert best_of(rows, "reward") == found


class Course:
    """What a run's evaluations say, whatever it does: by the folder's rows, so that a resumed run
    goes on with them."""

    names = ("bright",)
    values = (0.2, 0.4, 0.3, 0.3, 0.9)

    def __init__(self, run: str) -> None:
        self.run = Path(run)

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        done = [row for row in rows_of(self.run) if row["name"] != "after"]
        asked = min(len(done), len(self.values) - 1)
        return [{"bright": Score(self.values[asked])} for _ in images]


def course(run: Path, **train: Any) -> dict[str, Any]:
    return {
        **listed({"function": f"{HERE}:Course", "options": {"run": str(run)}}),
        "checkpoint": {"best": "eval.bright", "every": 2},
        "train": {"iterations": 5, "ema": 0.5, **train},
    }


@pytest.fixture(scope="module")
def stopped(runs, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run that ends at iteration 3 of 5, best at 1, and the points that it passes."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with runs.dying_at(0, lambda: None) as passed:
        runs.train_once(folder, **course(folder, stop_after=2))
    return folder, passed


def test_a_run_that_stops_early_is_finished(runs, stopped, capsys):
    run, _ = stopped
    rows = runs.record(run)
    events = [(row["event"], row.get("name"), row["iteration"]) for row in rows]
    assert events[-4:] == [
        ("eval", "during", 3),
        ("stop", None, 3),
        ("eval", "after", 3),
        ("comparison", None, 3),
    ]
    reason = (
        "eval.bright has not risen for 2 evaluations (train.stop_after: 2); it was 0.4 at "
        "iteration 1"
    )
    assert rows[-3]["reason"] == reason
    best = {"metric": "eval.bright", "iteration": 1, "value": pytest.approx(0.4)}
    assert rows[-1]["event"] == "comparison" and rows[-2]["best"] == best
    assert json.loads((run / "best" / "best.json").read_text()) == best
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step_000003"
    assert (run / "policy").is_dir() and not list(run.glob("*.replaced"))
    page = (run / "report.html").read_text("utf-8")
    assert reason in page and "eval.bright 0.400 at iteration 1" in page
    assert "The run is at iteration" not in page
    text = (run / "metrics.jsonl").read_text()
    runs.train_once(run, **course(run, stop_after=2))
    assert f"stopped early, finished: {reason}" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == text


def test_the_best_weights_are_those_of_their_iteration(runs, stopped, tmp_path):
    """They load as a policy; the others are those of the last iteration."""
    run, _ = stopped
    folder = tmp_path / "run"
    config = runs.configured(folder, "ema", train={"iterations": 1, "ema": 0.5})
    # The course of learning rates is that of five iterations.
    config = replace_nested(config, {"train": {"lr_decay": 1.0}})
    again = replace_nested(config, {"out": str(tmp_path / "all"), "train": {"iterations": 2}})
    for each in (config, again):
        training.train(each, policy=runs.tiny(), reward=runs.Drawing())
    first, second = (UnifiedPolicy.load(each / "policy") for each in (folder, tmp_path / "all"))
    assert not same_weights(first, second)
    best = replace_nested(
        config,
        {
            "out": str(tmp_path / "best"),
            "train": {"iterations": 2},
            "checkpoint": {"best": "eval.reward"},
            "eval": {"reward": [{"function": f"{HERE}:Once"}]},
        },
    )
    Once.said = 0
    training.train(best, policy=runs.tiny(), reward=runs.Drawing())
    assert same_weights(UnifiedPolicy.load(tmp_path / "best" / "best"), first)
    assert same_weights(UnifiedPolicy.load(tmp_path / "best" / "policy"), second)
    assert (run / "best").is_dir()


class Once:
    """High in the second evaluation."""

    names = ("bright",)
    said = 0

    def __call__(self, session: Any, images: np.ndarray) -> list[dict[str, Score]]:
        Once.said += 1  # one call a session: the first answer, then two of each evaluation
        return [{"bright": Score(0.9 if Once.said in (4, 5) else 0.1)} for _ in images]


def same_weights(one: UnifiedPolicy, two: UnifiedPolicy) -> bool:
    pairs = zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


KILLED = [
    ("append: after", 4),  # behind the row of the best: no checkpoint of it, no best/
    ("save: before", 1),
    ("save: after", 1),
    ("replace_folder: before", 2),
    ("rename: after", 5),  # between the two renames of best/
    ("replace_folder: after", 2),
    ("append: before", 9),  # the row that says why it stops
    ("append: after", 9),
    ("evaluate: before", 5),  # the evaluation after
    ("build_report: before", 1),
]


@pytest.mark.parametrize("name, which", KILLED)
def test_killed_around_the_best_and_the_end(runs, stopped, tmp_path, name, which):
    whole, passed = stopped
    number = [n for n, point in enumerate(passed, 1) if point == name][which - 1]
    run = tmp_path / "run"
    killed_at(runs, run, number, **course(run, stop_after=2))
    runs.train_once(run, **course(run, stop_after=2))
    assert runs.record(run) == runs.record(whole)
    for folder in ("best", "policy"):
        assert files_of(run / folder) == files_of(whole / folder), folder
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        p.name for p in sorted((whole / "checkpoints").iterdir())
    ]


WRONG_METRICS = {
    "unknown": (
        {"checkpoint": {"best": "IF"}},
        r"checkpoint\.best: 'IF' \(accepted: reward, success, bright or none\)",
    ),
    "of no judge": (
        {"checkpoint": {"best": "eval.reward"}},
        r"checkpoint\.best: 'eval\.reward' \(accepted: reward, success, bright or none\)",
    ),
    "of a judge": (
        {"checkpoint": {"best": "eval.IF"}, **listed(bright())},
        r"success, bright, eval\.reward, eval\.bright, eval\.kept or none\)",
    ),
    "patience for nothing": (
        {"train": {"stop_after": 2}},
        r"train\.stop_after: 2 \(accepted with checkpoint\.best none: none; it counts",
    ),
    "patience without evaluations": (
        {"train": {"stop_after": 2}, "checkpoint": {"best": "reward"}, "eval": {"every": 0}},
        r"train\.stop_after: 2 \(accepted with eval\.every 0: none; it counts evaluations",
    ),
}


@pytest.mark.parametrize("changes, message", WRONG_METRICS.values(), ids=WRONG_METRICS)
def test_metrics_that_there_are_not(runs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        runs.train_once(tmp_path / "run", **changes)


def killed_at(runs: ModuleType, run: Path, number: int, **changes: Any) -> None:
    def die() -> None:
        raise runs.Killed

    with pytest.raises(runs.Killed), runs.dying_at(number, die):
        runs.train_once(run, **changes)


def test_the_best_weights_are_never_ahead_of_the_checkpoints(runs, stopped, tmp_path):
    """Whoever resumes, with other settings perhaps, goes on from there or later."""
    _, passed = stopped
    run = tmp_path / "run"
    number = [n for n, point in enumerate(passed, 1) if point == "replace_folder: before"][1]
    killed_at(runs, run, number, **course(run, stop_after=2))
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step_000001"
    assert json.loads((run / "best" / "best.json").read_text())["iteration"] == 0


def test_nothing_is_rolled_out_ahead_of_an_evaluation_that_may_keep_weights(runs, tmp_path):
    """The numbers of a run that goes on from the checkpoint of its best weights are those of one
    that was not killed."""
    run, other = tmp_path / "run", tmp_path / "other"
    changes = {"rollout": {"ahead": True}}
    with runs.dying_at(0, lambda: None) as passed:
        runs.train_once(run, **changes, **course(run))
    number = [n for n, point in enumerate(passed, 1) if point == "replace_folder: after"][1]
    killed_at(runs, other, number, **changes, **course(other))
    runs.train_once(other, **changes, **course(other))
    assert runs.record(run) == runs.record(other)
