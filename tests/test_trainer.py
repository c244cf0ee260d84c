"""The loop: learns, replays exactly, stops on what is wrong, resumes bitwise."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from editr2.cli.main import main
from editr2.config import Config, replace_nested
from editr2.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rewards.base import RewardFailure, Score, lay_out
from editr2.rl.evaluate import comparison_row, success
from editr2.rl.metrics import comparison_line
from editr2.rl.sentinel import RatioError
from editr2.run.checkpoint import load_checkpoint
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn
from editr2.training import train

ROOT = Path(__file__).parent.parent


def small(tmp_path, **changes):
    values = {
        "out": str(tmp_path / "run"),
        "rollout": {"sessions": 2, "siblings": 4, "turns": 2, "steps": 4, "groups_per_batch": 2},
        "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
        "policy": {"intent_tokens": 3},
        "train": {"iterations": 2, "lr": 1e-3, "lr_decay": 1.0, "ema": None, "packed": "off"},
        "eval": {"sessions": 4, "strips": 2},
    }
    for key, value in changes.items():
        values[key] = (
            {**values[key], **value} if isinstance(value, dict) and key in values else value
        )
    return replace_nested(Config(), values)


class Brightness:
    """A toy reward that any policy can move: the mean pixel value."""

    names = ("bright",)

    def __call__(self, session, images):
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


def rows(run, event):
    return [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == event]


def final_weights(run, iteration):
    return load_file(run / "checkpoints" / f"step_{iteration:06d}" / "policy.safetensors")


def test_a_toy_reward_rises_and_the_run_leaves_everything_behind(tiny_unified, tmp_path):
    config = small(tmp_path, train={"iterations": 12, "lr": 3e-3}, rollout={"siblings": 8})
    run = train(config, policy=tiny_unified, reward=Brightness())
    (comparison,) = rows(run, "comparison")
    assert comparison["difference"] > 3 * comparison["se"] > 0
    assert [row["iteration"] for row in rows(run, "train")] == list(range(12))
    assert all(row["ratio_error"] <= 1e-6 for row in rows(run, "train"))
    assert "uPlot" in (run / "report.html").read_text()
    assert (run / "policy" / "model.safetensors").is_file() and (run / "config.yaml").is_file()
    strips = json.loads((run / "strips" / "after.json").read_text())["sessions"]
    assert len(strips) == 2 and all(
        (run / "strips" / t["image"]).is_file() for s in strips for t in s["turns"]
    )


class Told(GeneralTracker):
    """A tracker of a user's own: what it is told, of all of its kind."""

    name, requires_logging_directory = "told", False
    rows: ClassVar[list] = []
    images: ClassVar[list] = []

    def __init__(self, project):
        super().__init__()

    @property
    def tracker(self):
        return self

    def log(self, values, step=None):
        Told.rows.append((step, set(values)))

    def log_images(self, values, step=None):
        Told.images += [(step, name.partition("/")[0]) for name in values]


def test_a_run_is_looked_at_and_a_finished_one_is_left_as_it_is(
    tiny_unified, tmp_path, monkeypatch
):
    more = {"tracking": [f"{Told.__module__}:Told"], "checkpoint": {"every": 1}}
    config = small(tmp_path, train={"iterations": 3, "lr_decay": 0.1}, eval={"every": 2}, **more)
    pages, seen, again = [], [], []

    def page(folder):
        pages.append((folder / "README.md").read_text().count("Stands: at work"))
        if len(pages) == 1:
            raise OSError("no room for a page")
        return folder / "report.html"

    monkeypatch.setattr("editr2.training.build_report", page)
    monkeypatch.setattr(Told, "rows", [])
    monkeypatch.setattr(Told, "images", [])
    run = train(config, policy=tiny_unified, reward=Brightness(), observer=seen.append)
    saved = load_checkpoint(run / "checkpoints" / "step_000003")
    assert saved.optimizer["param_groups"][0]["lr"] == pytest.approx(1e-4)
    assert pages == [1, 1]  # at the first checkpoint, and at the end: it failed once
    before = (run / "metrics.jsonl").read_text()
    assert seen == read_metrics(run / "metrics.jsonl")[0]
    assert [step for step, names in Told.rows if "train/reward" in names] == [0, 1, 2]
    assert {step for step, _ in Told.images} == {0, 2, 3}  # before, during, after
    told = (run / "README.md").read_text()
    assert "- Stands: finished" in told and f"editr2 watch {run}" in told
    train(config, policy=tiny_unified, reward=Brightness(), observer=again.append)
    assert (run / "metrics.jsonl").read_text() == before and again == seen
    assert len([step for step, names in Told.rows if "train/reward" in names]) == 3


def test_a_policy_of_another_architecture_trains_through_the_same_loop(tmp_path, beside):
    policy = beside("flux_policy").FluxPolicy()
    with pytest.raises(ConfigError, match=r"train\.packed: on \(accepted for a FluxPolicy"):
        train(small(tmp_path, train={"packed": "on"}), policy=policy, reward=Brightness())
    start = {k: v.clone() for k, v in policy.module.state_dict().items()}
    run = train(small(tmp_path), policy=policy, reward=Brightness())
    trained = rows(run, "train")
    assert len(trained) == 2 and all(
        row["ratio_error"] <= 1e-6 and row["intent_fallback"] is None for row in trained
    )
    changed = [k for k, v in policy.module.state_dict().items() if not torch.equal(v, start[k])]
    assert len(changed) > len(start) / 2


def test_ratio_is_one_for_every_window_step_turn_and_sibling_also_in_other_batches(tiny_unified):
    """The rollout's chunking against training's, and against one that batches differently."""
    from editr2.config import PolicyConfig
    from editr2.rl.rollout import Chunk, Seeds, Walk, rollout_chunk
    from editr2.rl.sampler import make_sampler
    from editr2.worlds.shapes import make_session
    from editr2_kernels import sde_log_prob

    policy, sampler = tiny_unified, make_sampler(6, noise_level=0.9, window=3)
    sessions = [make_session(0, i) for i in range(3)]
    chunk = rollout_chunk(
        policy,
        Chunk(sessions, [0, 1, 2], 4),
        sampler,
        Seeds(0, "train"),
        PolicyConfig(intent_tokens=3),
    )
    for parts in ([chunk], [_part(chunk, i) for i in range(3)]):
        for part in parts:
            walk = Walk(policy, part)
            for turn, record in enumerate(part.turns):
                if turn:
                    walk.advance(turn, part.turns[turn - 1].images)
                context = walk.instruct(record.text)
                for k in range(3):
                    v = policy.velocity(record.x[:, k], record.sigma[:, k], context).v
                    new = sde_log_prob(
                        record.x[:, k],
                        record.x_next[:, k],
                        v,
                        sampler.table,
                        record.step_index[:, k],
                    )
                    assert (torch.exp(new.log_prob - record.log_prob[:, k]) - 1).abs().max() <= 1e-6


def _part(chunk, i):
    """One group of a chunk as a chunk of its own."""
    from editr2.rl.rollout import Chunk, TurnRecord

    turns = []
    for r in chunk.turns:
        keep = (r.rollout // chunk.siblings) == i
        at = keep.nonzero()[:, 0].tolist()
        turns.append(
            TurnRecord(
                r.rollout[keep] - i * chunk.siblings,
                [r.text[j] for j in at],
                {kind: written.select(at) for kind, written in r.written.items()},
                r.x[keep],
                r.x_next[keep],
                r.step_index[keep],
                r.sigma[keep],
                r.log_prob[keep],
                r.x0[keep],
                r.images[at],
            )
        )
    return Chunk([chunk.sessions[i]], [chunk.ordinals[i]], chunk.siblings, turns)


def test_siblings_share_the_first_latent_and_differ_in_the_window(tiny_unified):
    from editr2.config import PolicyConfig
    from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
    from editr2.rl.sampler import make_sampler
    from editr2.worlds.shapes import make_session

    sampler = make_sampler(4, noise_level=0.9, window=1, window_range=0.25)
    chunk = Chunk([make_session(0, i) for i in range(2)], [7, 8], 3)
    rollout_chunk(tiny_unified, chunk, sampler, Seeds(0, "train"), PolicyConfig(intent=False))
    x, following = (
        chunk.turns[0].x[:, 0].view(2, 3, 36, 48),
        chunk.turns[0].x_next[:, 0].view(2, 3, 36, 48),
    )
    assert torch.equal(x[:, 0], x[:, 1]) and not torch.equal(x[0], x[1])
    assert (following[:, 0] - following[:, 1]).abs().mean() > 0.1


def test_sessions_of_different_lengths_train_together(tiny_unified, tmp_path):
    from editr2.sessions import save_sessions
    from editr2.worlds.shapes import make_session

    data = save_sessions([make_session(0, i, turns=1 + i % 3) for i in range(4)], tmp_path / "data")
    config = small(
        tmp_path, data={"path": str(data)}, rollout={"sessions": 3}, credit={"preset": "edit-r2"}
    )
    config = replace_nested(config, {"credit": {"weights": {"IF": 0.3, "CC": 0.3, "GA": 0.4}}})
    run = train(config, policy=tiny_unified)
    assert len(rows(run, "train")[0]["reward_turn"]) == 3 and len(rows(run, "comparison")) == 1


def test_kl_and_ema_and_two_updates(tiny_unified, tmp_path):
    config = small(tmp_path, train={"iterations": 2, "kl_weight": 0.1, "ema": 0.5, "updates": 2})
    run = train(config, policy=tiny_unified, reward=Brightness())
    first, second = rows(run, "train")
    assert (
        first["kl"] > 0 and second["kl"] > first["kl"] / 100
    )  # the second update already has left the start
    saved = load_checkpoint(run / "checkpoints" / "step_000002")
    assert set(saved.tensors) == {"policy", "ema", "reference"}
    name = "llm2vae.weight"
    values = [saved.tensors[k][name] for k in ("reference", "ema", "policy")]
    assert not torch.equal(values[0], values[2]) and not torch.equal(values[1], values[2])


def test_a_replay_that_differs_is_stopped_and_the_tensor_named(tmp_path, monkeypatch):
    """The classic: the timestep goes through bf16 in training only."""
    policy = UnifiedPolicy.load()
    original = UnifiedPolicy.velocity

    def velocity(self, x, sigma, context):
        return original(
            self, x, sigma.bfloat16().float() if torch.is_grad_enabled() else sigma, context
        )

    monkeypatch.setattr(UnifiedPolicy, "velocity", velocity)
    config = small(tmp_path, rollout={"steps": 7, "siblings": 2}, eval={"sessions": 1, "strips": 1})
    with pytest.raises(
        RatioError, match=r"turn 1, window step \d: velocity: rollout and training differ"
    ):
        train(config, policy=policy, reward=Brightness())
    assert rows(Path(config.out), "train") == []


def test_a_nan_is_stopped_before_it_reaches_the_weights(tiny_unified, tmp_path, monkeypatch):
    config = small(tmp_path, train={"iterations": 3}, checkpoint={"every": 1})
    original, calls = type(tiny_unified).velocity, []

    def velocity(self, x, sigma, context):
        if torch.is_grad_enabled():
            calls.append(1)
        bad = torch.is_grad_enabled() and len(calls) == 6
        v = original(self, x, sigma, context)
        return dataclasses.replace(v, v=v.v * torch.nan) if bad else v

    monkeypatch.setattr(type(tiny_unified), "velocity", velocity)
    with pytest.raises(
        NonFiniteError,
        match="iteration 1, turn 1, window step 2; first non-finite tensor: velocity",
    ):
        train(config, policy=tiny_unified, reward=Brightness())
    assert all(torch.isfinite(p).all() for p in tiny_unified.module.parameters())
    assert load_checkpoint(Path(config.out) / "checkpoints" / "step_000001").iteration == 1


class Failing(Brightness):
    def __init__(self, share):
        self.share, self.count = share, 0

    def __call__(self, session, images):
        scores = super().__call__(session, images)
        self.count += 1
        return (
            [{"bright": Score(None, "judge timed out")} for _ in scores]
            if self.count % 10 < self.share
            else scores
        )


def test_failed_scores_are_counted_and_masked_and_too_many_stop_the_run(tiny_unified, tmp_path):
    run = train(small(tmp_path, eval={"sessions": 4}), policy=tiny_unified, reward=Failing(3))
    assert all(0 < row["failed_scores"] < 8 for row in rows(run, "train"))
    with pytest.raises(RewardFailure, match="judge timed out"):
        train(small(tmp_path, out=str(tmp_path / "other")), policy=tiny_unified, reward=Failing(9))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"rollout": {"siblings": 1}}, r"rollout\.siblings"),
        ({"rollout": {"window": 9}}, r"rollout\.window"),
        ({"rollout": {"dynamics": "sde"}}, "dynamics"),
        ({"rollout": {"dynamics": "dance-sde", "window_range": 1.0}}, "window_range"),
        ({"train": {"lr": 0.0}}, r"train\.lr"),
        ({"eval": {"sampler": "euler"}}, r"eval\.sampler"),
        ({"credit": {"preset": "x"}}, r"credit\.preset"),
        ({"credit": {"weights": {"IF": 1.0}}}, r"credit\.weights"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(tiny_unified, tmp_path, changes, name):
    with pytest.raises((ConfigError, DataError, ValueError), match=name):
        train(small(tmp_path, **changes), policy=tiny_unified, reward=Brightness())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_configuration_does_not_resume_a_run(tiny_unified, tmp_path):
    config = small(tmp_path)
    train(config, policy=tiny_unified, reward=Brightness())
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        train(
            replace_nested(config, {"train": {"lr": 2e-3}}),
            policy=tiny_unified,
            reward=Brightness(),
        )


def flags(run):
    """What `editr2` is called with."""
    values = {
        "out": run,
        "rollout.sessions": 2,
        "rollout.siblings": 3,
        "rollout.steps": 4,
        "rollout.turns": 2,
        "train.iterations": 4,
        "checkpoint.every": 1,
        "eval.sessions": 2,
        "eval.every": 1,
        "eval.strips": 1,
    }
    return ["train", *(f"--{k}={v}" for k, v in values.items())]


def command(run):
    return [sys.executable, "-m", "editr2.cli", *flags(run)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """In this process: what other tests left behind in it must not count either."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(flags(run)) == 0
    return run


def wait_and_kill(process, when, timeout=120):
    end = time.monotonic() + timeout
    while not when() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "while saving",
        # tests/test_record.py kills in process at these points and many more, in a tenth of the
        # time.
        pytest.param("in the first iteration", marks=pytest.mark.exhaustive),
        pytest.param("between iterations", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_any_moment_it_resumes_bitwise(uninterrupted, tmp_path, point):
    run = tmp_path / "run"
    conditions = {
        "in the first iteration": lambda: (run / "strips" / "before.json").exists(),
        "while saving": lambda: (
            any((run / "checkpoints").glob(".*")) and (run / "checkpoints/step_000001").exists()
        ),
        "between iterations": lambda: (run / "checkpoints" / "step_000002").exists(),
    }
    process = subprocess.Popen(command(run), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert wait_and_kill(process, conditions[point]), "finished before it could be killed"
    subprocess.run(
        command(run), check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200
    )
    for name, value in final_weights(uninterrupted, 4).items():
        assert torch.equal(value, final_weights(run, 4)[name]), name
    a, b = (
        load_checkpoint(r / "checkpoints" / "step_000004").optimizer for r in (uninterrupted, run)
    )
    for key, moments in a["state"].items():
        assert all(torch.equal(moments[m], b["state"][key][m]) for m in ("exp_avg", "exp_avg_sq"))
    first, second = (read_metrics(r / "metrics.jsonl")[0] for r in (uninterrupted, run))
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for key in set(one) - {"elapsed_s", "seconds", "identity"}:
            assert one[key] == two[key], (one["event"], key)
    assert second[0]["identity"]["depends"] == first[0]["identity"]["depends"]
    moved = np.mean([float((v.float()).abs().mean()) for v in final_weights(run, 4).values()])
    assert moved > 0


@pytest.mark.parametrize(
    "names,turns,right",
    [
        (["GA"], [[1.0], [1.0]], 1),
        (["GA"], [[1.0], [0.0]], 0),
        (["GA"], [[None], [1.0]], 1),  # the last one's speaks of both
        (["GA"], [[1.0], [None]], None),
        (["GA", "style"], [[1.0, 0.0], [1.0, 0.5]], 1),
        (["IF", "CC"], [[1.0, 1.0], [1.0, 1.0]], 1),
        (
            ["IF", "CC"],
            [[0.0, 1.0], [1.0, 1.0]],
            0,
        ),  # without GA a wrong first turn is a wrong session, too
        (["IF", "CC"], [[1.0, 1.0], [1.0, 0.9]], 0),
        (["IF", "CC"], [[1.0, None], [1.0, 1.0]], None),
        (["mine"], [[1.0]], 1),  # a session shorter than the batch
        (["GA"], [[1.0], ["-"]], 1),  # does not apply: the last that does speaks of all before
        (["GA"], [[0.0], ["-"]], 0),
        (["GA", "CC"], [[0.5, 1.0], [1.0, "-"]], 1),
        (["GA", "CC"], [[0.5, 1.0], [1.0, None]], None),
        (["GA"], [["-"], ["-"]], None),
        (["IF", "CC"], [[1.0, "-"], [1.0, 1.0]], 1),
        (["IF", "CC"], [[0.5, "-"], [1.0, 1.0]], 0),
        (["IF", "CC"], [["-", "-"], [1.0, 1.0]], 1),
        (["IF", "CC"], [["-", None], [1.0, 1.0]], None),
        (["IF", "CC"], [["-", "-"], ["-", "-"]], None),
    ],
)
def test_a_session_is_right_when_every_turn_is(names, turns, right):
    words = {None: Score(None, "down"), "-": Score.not_applicable()}
    said = [[{n: words.get(v) or Score(v) for n, v in zip(names, t)} for t in turns]]
    session = Session("a1", np.zeros((24, 24, 3), np.uint8), tuple(Turn("paint") for _ in turns))
    found = success(lay_out(tuple(names), [session], said, 2)).tolist()
    assert found == [right] if right is not None else np.isnan(found).all()


def test_a_comparison_is_of_what_it_says_whoever_could_not_be_scored():
    """Each session's own last turn, paired; the longest sessions' last turn may have no score at
    all."""

    def row(iteration, reward, right):
        turns = [{"mean": 0.5, "se": None}, {"mean": None, "se": None}]
        return {
            "iteration": iteration,
            "reward_turn": turns,
            "success": {"mean": right, "se": None},
            "sessions": 3,
            "per_session": {"reward": reward},
        }

    compared = comparison_row(row(0, [0.25, 0.5, None], None), row(4, [0.5, 0.5, None], 0.5))
    assert (compared["reward_before"], compared["reward_after"], compared["difference"]) == (
        0.375,
        0.5,
        0.125,
    )
    said = comparison_line(compared)
    assert "reward 0.375 -> 0.500, paired difference +0.125" in said and "all right" not in said
    nothing = comparison_row(row(0, [None], None), row(4, [None], None))
    assert "no session could be scored both times" in comparison_line(nothing)
