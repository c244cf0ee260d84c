"""Thoughts before images (`policy.thinking`): sampled, replayed and trained as intents are."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from editr2.check.editors import open_editor
from editr2.check.estimate import plan
from editr2.cli.settings import run_config
from editr2.config import (
    Config,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
    preset_config,
    replace_nested,
)
from editr2.export.export import export
from editr2.policies.base import Questions
from editr2.policies.found import editor_of
from editr2.policies.load import load_policy
from editr2.policies.rules import policy_problems
from editr2.policies.unified.bagel import PAINTING, BagelPolicy
from editr2.report.build import build_report
from editr2.rl.loop import train
from editr2.rl.replay import Queries, ReplayOptions, replay
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler, rollout_sampler
from editr2.rl.sentinel import explain_difference
from editr2.run.tracking import read_metrics
from editr2.sessions.files import load_sessions
from editr2_kernels import sde_log_prob

SIZE = (32, 32)
GUIDED = {"guidance": 4.0, "guidance_image": 2.0, "renorm": "text_channel"}


@pytest.fixture(scope="module")
def tiny(beside):
    return beside("tiny_bagel")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("base") / "bagel")


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    return tiny.sessions(tmp_path_factory.mktemp("data"), (2, 1))


def thinking(folder, **policy) -> tuple[BagelPolicy, PolicyConfig]:
    settings = {"model": "bagel", "weights": str(folder), "resolution": SIZE, "thinking": True}
    config = PolicyConfig(**settings | {"thinking_tokens": 4, "intent_tokens": 3} | policy)
    return load_policy(config), config


def rolled(policy, config, data, greedy=False) -> tuple[Chunk, object]:
    """Two sessions, of two turns and of one; windows open behind the first step."""
    sampler = make_sampler(4, noise_level=0.9, window=2)
    sampler = dataclasses.replace(sampler, first_start=1, last_start=1)
    chunk = Chunk(load_sessions(data, size=SIZE), [0, 1], 1 if greedy else 2)
    return rollout_chunk(policy, chunk, sampler, Seeds(0, "test"), config, greedy=greedy), sampler


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
def test_an_image_is_painted_behind_its_own_thought(folder, data, guidance):
    """Contexts built here, call by call, give the rollout's numbers at every turn."""
    policy, config = thinking(folder, **guidance)
    chunk, sampler = rolled(policy, config, data)
    first, second = chunk.turns
    assert [len(first.rollout), len(second.rollout)] == [4, 2]
    assert set(first.written) == {"thought"} and set(second.written) == {"intent", "thought"}
    thoughts = [t.text for t in first.written["thought"].samples]
    assert thoughts[0] != thoughts[1] and thoughts[2] != thoughts[3]
    # Siblings share their noise, and have been apart since before the first step.
    assert not torch.equal(first.x[0, 0], first.x[1, 0])
    sources = np.stack([chunk.session_of(i).image for i in range(4)])
    context = policy.append(policy.begin(4, PAINTING), sources)
    for number, record in enumerate(chunk.turns):
        if number:
            context = policy.append(policy.select(context, record.rollout), first.images[:2])
        raw = [chunk.session_of(i).turns[number].instruction for i in record.rollout.tolist()]
        assert number or record.text == raw
        context = policy.instruct(context, record.text)
        written = record.written["thought"]
        asked = Questions([[]] * len(raw), [""] * len(raw), [None] * len(raw), "thought")
        scores = policy.answer_log_prob(
            context, asked, written.ids(range(len(raw))), temperature=config.temperature
        )
        sampled = [t.log_prob for t in written.samples]
        for found, valid, said in zip(scores.log_prob, scores.valid, sampled, strict=True):
            assert found[valid].tolist() == pytest.approx(said, abs=1e-4)
        context = policy.consider(context, [t.text for t in written.samples])
        v = policy.velocity(record.x[:, 0], record.sigma[:, 0], context)
        again = sde_log_prob(
            *(record.x[:, 0], record.x_next[:, 0], v.v, sampler.table, record.step_index[:, 0]),
            **v.guidance,
        )
        assert again.log_prob.tolist() == pytest.approx(record.log_prob[:, 0].tolist(), abs=1e-5)
    found = explain_difference(
        policy, chunk, sampler, Seeds(0, "test"), config, RolloutConfig(), TrainConfig()
    )
    assert found.startswith("none when")


@pytest.mark.parametrize(
    "guidance, context_gradient",
    [
        pytest.param(GUIDED, False, id="guided"),
        pytest.param(GUIDED, True, id="guided, through contexts", marks=pytest.mark.exhaustive),
        pytest.param({}, False, id="plain", marks=pytest.mark.exhaustive),
    ],
)
def test_a_packed_session_with_thoughts_is_the_walk(folder, data, guidance, context_gradient):
    """Velocities of every branch, and log-probs of intents and thoughts."""
    policy, config = thinking(folder, **guidance)
    chunk, _ = rolled(policy, config, data)
    asked = Queries([r.x for r in chunk.turns], [r.sigma for r in chunk.turns])
    needed = torch.ones(4, 2, dtype=torch.bool)
    needed[2:, 1] = False  # the session of one turn
    found = []
    for packed in (False, True):
        options = ReplayOptions(packed, context_gradient, None, config.temperature, text=True)
        seen = {}
        for part in replay(policy, chunk, asked, options, needed):
            branches = [x for x in part.velocity.guidance.values() if isinstance(x, torch.Tensor)]
            for name, x in enumerate((part.velocity.v, *branches)):
                seen |= {(name, i): v for i, v in zip(part.index.tolist(), x, strict=True)}
            for a in part.answers:
                rows = (s[v] for s, v in zip(a.scores.log_prob, a.scores.valid, strict=True))
                seen |= {(a.kind, a.turn, i): s for i, s in zip(a.at.tolist(), rows, strict=True)}
        found.append(seen)
    walked, packed = found
    assert len(walked) == len(packed) == (3 if guidance else 1) * 2 * 6 + 2 + 6
    for key, value in walked.items():
        torch.testing.assert_close(packed[key], value, rtol=1e-4, atol=1e-5)


def test_evaluation_thinks_greedily_and_other_models_not_at_all(folder, data, tiny_unified):
    policy, config = thinking(folder)
    one, two = (rolled(policy, config, data, greedy=True)[0].turns[0] for _ in range(2))
    assert one.written["thought"] == two.written["thought"]
    context = policy.instruct(policy.encode(tiny_images(data)), one.text)
    best = policy.think(context, temperature=0.0, max_tokens=config.thinking_tokens)
    assert [t.text for t in one.written["thought"].samples] == best
    for model, accepted in (("unified", False), ("kontext", False), ("bagel", True)):
        problems = list(policy_problems(PolicyConfig(model=model, thinking=True)))
        assert any("policy.thinking: True" in line for line in problems) != accepted


def tiny_images(data) -> np.ndarray:
    return np.stack([session.image for session in load_sessions(data, size=SIZE)])


@pytest.mark.parametrize("said", ["flag", "file"])
def test_the_preset_of_unigrpo_thinks_where_the_model_can(tmp_path, said):
    def of(model: str) -> PolicyConfig:
        words = ["--preset", "unigrpo"]
        if said == "flag":
            words += ["--policy.model", model]
        else:
            (tmp_path / "c.yaml").write_text(f"policy: {{model: {model}}}\n")
            words += ["--config", str(tmp_path / "c.yaml")]
        return run_config("editr2 train", "x", words)[0].policy

    bagel, unified = of("bagel"), of("unified")
    assert (bagel.thinking, bagel.intent) == (True, False)
    assert unified == preset_config("unigrpo").policy and unified.intent and not unified.thinking
    assert bagel == dataclasses.replace(
        preset_config("unigrpo", "bagel").policy, model="bagel"
    ) and (bagel.guidance, bagel.guidance_image) == (1, 1)


def unigrpo(folder, data, out, **changes) -> Config:
    values = {
        "out": str(out),
        "data": {"path": str(data)},
        "reward": {"function": "editr2.rewards.brightness:Brightness"},
        "policy": {
            **{"model": "bagel", "weights": str(folder), "resolution": [32, 32]},
            **{"thinking_tokens": 4, "lora_rank": 2},
        },
        "rollout": {"sessions": 2, "siblings": 2, "steps": 3, "window": 1},
        "credit": {"weights": {"brightness": 1.0}},
        "train": {"iterations": 1, "lr": 1e-2},
        "eval": {"sessions": 1, "strips": 1},
    }
    return replace_nested(replace_nested(preset_config("unigrpo", "bagel"), values), changes)


def test_thoughts_are_trained_with_ratio_one_and_an_export_still_thinks(folder, data, tmp_path):
    config = unigrpo(folder, data, tmp_path / "run")
    train(config)
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    row = next(row for row in rows if "ratio_error" in row)
    assert row["ratio_error"] < 1e-6 and row["text_ratio_error"] < 1e-4
    assert row["text_loss"] is not None and 1 <= row["thought_tokens"] <= 4
    assert row["intent_tokens"] is None and row["kl"] is not None
    ours, theirs = (
        load_file(at / "ema.safetensors") for at in (tmp_path / "run" / "policy", folder)
    )
    # Behind the last layer's attention the understanding expert makes nothing but words.
    words = "language_model.model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(ours[words].float(), theirs[words].float())
    strips = json.loads((tmp_path / "run" / "strips" / "before.json").read_text())["sessions"]
    assert all(isinstance(turn["thought"], str) for s in strips for turn in s["turns"])
    assert "<summary>thought</summary>" in build_report(tmp_path / "run").read_text()
    export(tmp_path / "run", tmp_path / "out", merge=True)
    assert editor_of(str(tmp_path / "out"), None).settings["policy"]["thinking"] is True


def test_check_counts_thoughts(folder, tiny):
    """Contexts as they are held, and texts that every turn writes and training scores."""
    policy, config = thinking(folder, lora_rank=2, branches="apart", **GUIDED)
    editor = open_editor(config)
    editor.blueprint.said = len(policy.text_ids("make it red"))
    context = policy.encode(tiny.pictures(2, SIZE))
    for turn in range(2):
        context = policy.instruct(context, ["make it red"] * 2)
        context = policy.consider(context, ["abcd"] * 2)  # letters are tokens
        kept = sum(t.nbytes for c in context.branches for t in (*c.keys, *c.values))
        assert editor.held(2, turn) == kept
        context = policy.append(context, tiny.pictures(2, SIZE, seed=1))
    full = replace_nested(preset_config("unigrpo", "bagel"), {"rollout": {"shared_noise": True}})
    full = dataclasses.replace(full, policy=config)
    calls = plan(full, editor, rollout_sampler(full.rollout), [2] * 4, 1)
    found = {(c.phase, c.step, c.turn) for c in calls}
    turns = {("rollout", "think", t) for t in (0, 1)} | {("train", "answer thought", 0)}
    assert turns <= found and ("rollout", "intend", 0) not in found
    rows = {c.batch for c in calls if (c.phase, c.step, c.turn) == ("rollout", "velocity", 0)}
    assert len(rows) == 1  # nobody takes a step for siblings that have thoughts of their own
    longer = open_editor(dataclasses.replace(config, thinking_tokens=8))
    for step in ("think", "answer thought", "score thought"):
        less, more = (e.cost(step, 2, 1).total_flops for e in (editor, longer))
        assert 1.5 * less < more < 2.5 * less
