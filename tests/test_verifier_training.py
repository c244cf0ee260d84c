"""Training a verifier: what it is asked, how it is sampled and scored, and the loop of both
objectives."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from editr2.cli.main import main
from editr2.config import replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import CheckpointError, ConfigError
from editr2.policies.weights import exchanged, trainable
from editr2.rewards.base import Item
from editr2.rewards.traces import read_trace
from editr2.rewards.verifier import Verifier, VerifierOptions
from editr2.rl.sentinel import RatioError
from editr2.run.tracking import read_metrics
from editr2.sessions import Session
from editr2.sessions.session import Turn
from editr2.verifier import loop
from editr2.verifier.files import PAIRS, PRINCIPLES, read_edits, read_preferences
from editr2.verifier.model import Reader, Scored, adapt, load_reader
from editr2.verifier.objectives import OBJECTIVES, Asks, Part, Row, preferred
from editr2.verifier.settings import GcpoConfig, ReaderConfig, SftConfig

ROOT = Path(__file__).parent.parent
SCHEMAS: dict[str, Any] = {"sft": SftConfig, "gcpo": GcpoConfig}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, beside: Any) -> Path:
    """`data/`, `words/`, a verifier with random weights `llava/`, and `run/` which taught it all of
    its weights to write traces that can be read."""
    root, tiny = tmp_path_factory.mktemp("verifier"), beside("tiny_verifier")
    tiny.write_llava(root / "llava")
    tiny.write_data(root / "data")
    loop.train_verifier(
        "sft",
        configured(
            root,
            "sft",
            "run",
            policy={"lora_rank": 0},
            eval={"every": 0},
            train={"iterations": 24, "lr": 2e-2, "warmup": 2, "rows": 4},
        ),
    )
    return root


def configured(root: Path, name: str, out: str, **changes: Any) -> Any:
    weights = root / "llava" if name == "sft" else root / "run" / "verifier"
    values: dict[str, Any] = {
        "out": str(root / out),
        "data": {"path": str(root / "data")},
        "policy": {"weights": str(weights), "prompts": str(root / "words"), "lora_rank": 2},
        "train": {"iterations": 3, "batch": 4, "rows": 2, "lr": 1e-2},
        "checkpoint": {"every": 2},
    }
    values["data"]["heldout"] = values["data"]["path"]
    values["eval"] = {"traces": 2, "max_tokens": 8, "every": 2, "limit": 2}
    if name == "gcpo":
        values["rollout"] = {"traces": 3, "max_tokens": 8, "pairs": 2}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return replace_nested(SCHEMAS[name](), values)


def reader_of(root: Path, **changes: Any) -> Reader:
    given = {"weights": str(root / "run" / "verifier"), "prompts": str(root / "words")}
    return load_reader(ReaderConfig(**{**given, "lora_rank": 0, **changes}))


def numbers(run: Path) -> list[dict[str, Any]]:
    """The rows without clocks, and without where they were made."""
    rows, dropped = read_metrics(run / "metrics.jsonl")
    assert not dropped
    gone = ("seconds", "elapsed_s", "identity")
    return [{k: v for k, v in row.items() if k not in gone} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "verifier" / "model.safetensors")


# ------------------------------------------------------------------------------ asked and sampled


def test_it_is_asked_as_a_served_copy_is(world: Path) -> None:
    """The two pictures, then the words, through the processor's own template."""
    reader = reader_of(world)
    edit = read_edits(world / "data" / PRINCIPLES, principles=True)[1]
    prompt = reader.prompt(edit)
    said = "USER: <image> <image> paint it blue\n1. keep it ASSISTANT:"
    pictures = [edit.image.read(), edit.edited.read()]
    asked = reader.processor(text=said, images=pictures, return_tensors="pt")
    assert torch.equal(prompt.ids, asked["input_ids"][0])
    assert torch.equal(prompt.others["pixel_values"], asked["pixel_values"])
    assert not np.array_equal(*pictures)


def test_a_trace_follows_from_its_seed_and_is_scored_as_it_was_sampled(world: Path) -> None:
    reader = reader_of(world)
    edits = read_edits(world / "data" / PRINCIPLES, principles=True)
    together = reader.write(edits[:3], 4, 7, max_tokens=8, rows=5)
    assert len({text for texts in together for text in texts}) > 4
    assert reader.write(edits[2:3], 4, 7, max_tokens=8, rows=1) == together[2:]
    assert reader.write(edits[:3], 4, 8, max_tokens=8) != together

    prompts = [reader.prompt(edit) for edit in edits]
    written = reader.sample(prompts, range(5), temperature=0.7, max_tokens=8)
    scored = reader.log_probs(prompts, [one.ids for one in written], 0.7)
    for k, (prompt, one) in enumerate(zip(prompts, written, strict=True)):
        n = len(one.ids)
        assert scored.valid[k].tolist() == [True] * n + [False] * (scored.valid.shape[1] - n)
        sampled = torch.tensor(one.log_prob)
        torch.testing.assert_close(scored.log_prob[k, :n], sampled, atol=1e-5, rtol=0)
        own = (reader.logits(prompt, one.ids) / 0.7).log_softmax(-1)
        exact = own.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(scored.log_prob[k, :n], exact, atol=1e-5, rtol=0)
        entropy = -(own.exp() * own).sum(1)
        torch.testing.assert_close(scored.entropy[k, :n], entropy, atol=1e-5, rtol=0)
        assert not scored.log_prob[k, n:].any()


def test_tokens_are_drawn_as_often_as_they_are_likely(world: Path) -> None:
    reader = load_reader(
        ReaderConfig(weights=str(world / "llava"), prompts=str(world / "words"), lora_rank=0)
    )
    prompt = reader.prompt(read_edits(world / "data" / PRINCIPLES, principles=True)[0])
    written = reader.sample([prompt] * 500, range(500), temperature=1.4, max_tokens=1)
    drawn = torch.bincount(torch.tensor([one.ids[0] for one in written]), minlength=37) / 500
    meant = (reader.logits(prompt, (0,))[0] / 1.4).softmax(-1)
    spread = (meant * (1 - meant) / 500).sqrt()
    assert float(((drawn - meant).abs() / (spread + 1e-3)).max()) < 4.5
    assert float((drawn - meant).abs().sum()) < 0.3


def test_greedy_is_what_transformers_writes(world: Path) -> None:
    reader = reader_of(world)
    [edit] = read_edits(world / "data" / PRINCIPLES, principles=True)[:1]
    prompt = reader.prompt(edit)
    [one] = reader.sample([prompt], [3], temperature=0, max_tokens=6)
    stock = reader.module.generate(
        input_ids=prompt.ids[None],
        attention_mask=torch.ones_like(prompt.ids)[None],
        **prompt.others,
        max_new_tokens=6,
        do_sample=False,
        repetition_penalty=1.0,  # which the folder asks for and training has no use for
    )
    assert stock[0, len(prompt.ids) :].tolist() == list(one.ids)
    assert read_trace(one.text, 1).verdicts  # it was taught to


def test_weights_of_another_name_are_not_drawn(world: Path, tmp_path: Path) -> None:
    """As many numbers as the model has, under another name: transformers fills the gap by chance,
    and a verifier like that would judge by it."""
    folder = tmp_path / "renamed"
    shutil.copytree(world / "llava", folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith("q_proj.weight"))
    tensors[name.replace("q_proj", "query")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 of the model's weights, .*q_proj.weight"):
        load_reader(ReaderConfig(weights=str(folder), prompts=str(world / "words")))


def test_a_trace_ends_where_a_picture_would_begin(world: Path) -> None:
    """Its place in a text would be taken for a picture."""
    reader = load_reader(
        ReaderConfig(weights=str(world / "llava"), prompts=str(world / "words"), lora_rank=0)
    )
    mark = reader.module.config.image_token_id
    edits = read_edits(world / "data" / PRINCIPLES, principles=True)
    prompts = [reader.prompt(edits[k % 5]) for k in range(40)]
    written = reader.sample(prompts, range(40), temperature=1.5, max_tokens=8)
    cut = [one for one in written if mark in one.ids]
    assert cut and all(one.ids.index(mark) == len(one.ids) - 1 for one in cut)
    assert not any(one.ended or "<image>" in one.text for one in cut)
    scored = reader.log_probs(prompts, [one.ids for one in written], 1.5)
    for k, one in enumerate(written):
        seen = torch.tensor(one.log_prob)
        torch.testing.assert_close(scored.log_prob[k, : len(seen)], seen, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------ objectives


def test_sft_is_the_mean_over_the_tokens_of_a_batch(world: Path) -> None:
    rows = [row for row in numbers(world / "run") if row["event"] == "train"]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    before, *_, after = (row for row in numbers(world / "run") if row["event"] == "eval")
    assert after["nll"] < 0.5 * before["nll"] and after["unread"] < before["unread"]
    assert (before["iteration"], after["iteration"]) == (0, 24)
    config = configured(world, "sft", "x", policy={"lora_rank": 0})
    reader = load_reader(config.policy)
    lessons, left_out = OBJECTIVES["sft"].reads(config.data.path, "data.path")
    assert (len(lessons), left_out) == (5, 1)
    block = OBJECTIVES["sft"].roll(config, Asks(reader), list(enumerate(lessons)), "train")
    exact = [
        -reader.logits(row.prompt, row.ids).log_softmax(-1)[range(len(row.ids)), row.ids].sum()
        for row in block.rows
    ]
    scored = reader.log_probs([r.prompt for r in block.rows], [r.ids for r in block.rows])
    term = OBJECTIVES["sft"].term(config, Part(block.rows, scored, None, None))
    torch.testing.assert_close(term.loss, torch.stack(exact).sum())
    assert block.units == sum(len(row.ids) for row in block.rows)
    assert {row.ids[-1] for row in block.rows} == {reader.tokenizer.eos_token_id}


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_gcpo_by_its_formula(kl_weight: float) -> None:
    """Mean over the tokens of a trace, traces, groups; clipped where that is worse; k3."""
    config = replace_nested(
        GcpoConfig(), {"train": {"kl_weight": kl_weight, "clip_low": 0.1, "clip_high": 0.3}}
    )
    noise = torch.Generator().manual_seed(0)
    lengths, advantages = [3, 1, 4, 2], [0.5, -0.5, 0.25, -0.25]
    live, old, start = (-torch.rand(4, 4, generator=noise) for _ in range(3))
    live.requires_grad_()
    valid = torch.arange(4) < torch.tensor(lengths)[:, None]
    rows: list[Row] = [
        Row(None, (0,) * n, 1 / (2 * 2 * n), "", a)  # type: ignore[arg-type]
        for n, a in zip(lengths, advantages, strict=True)
    ]
    part = Part(rows, Scored(live, torch.zeros(4, 4), valid), old, start if kl_weight else None)
    term = OBJECTIVES["gcpo"].term(config, part)
    groups, clipped = [], 0
    for group in ((0, 1), (2, 3)):
        traces = []
        for k in group:
            tokens = []
            for j in range(lengths[k]):
                rho, a = (live[k, j] - old[k, j]).exp(), advantages[k]
                seen = float(rho.detach())
                bound = a * min(max(seen, 0.9), 1.3)
                is_clipped = bound < a * seen - 1e-7
                clipped += is_clipped
                d = start[k, j] - live[k, j]
                gain = rho * 0 + bound if is_clipped else a * rho
                tokens.append(gain - kl_weight * (d.exp() - d - 1))
            traces.append(torch.stack(tokens).mean())
        groups.append(torch.stack(traces).mean())
    exact = -torch.stack(groups).mean()
    torch.testing.assert_close(term.loss, exact)
    torch.testing.assert_close(
        torch.autograd.grad(term.loss, live)[0], torch.autograd.grad(exact, live)[0]
    )
    assert 0 < clipped == int(term.sums["clipped"])


def test_only_pairs_that_differ_train(world: Path) -> None:
    config = configured(world, "gcpo", "x")
    reader = load_reader(config.policy)
    pairs = read_preferences(world / "data" / PAIRS)
    roll, asks = OBJECTIVES["gcpo"].roll, Asks(reader)
    block = roll(config, asks, list(enumerate(pairs)), "train")
    trained = {row.prompt.id.split("/")[0] for row in block.rows}
    assert len(block.rows) == 6 * len(trained) and block.units == len(trained)
    assert 0 < len(trained) == len(pairs) - block.counts["constant"]
    for name in trained:
        own = [row for row in block.rows if row.prompt.id.startswith(f"{name}/")]
        assert sum(row.share * len(row.ids) for row in own) == pytest.approx(1)
        for side in ("win", "lose"):
            group = [row for row in block.rows if row.prompt.id == f"{name}/{side}"]
            assert abs(sum(row.advantage for row in group)) < 1e-6
    alone = roll(config, asks, [(2, pairs[2])], "train")
    same = [row for row in block.rows if row.prompt.id.startswith("p2/")]
    assert [(r.ids, r.advantage) for r in same] == [(r.ids, r.advantage) for r in alone.rows]


def test_edits_of_two_files_may_have_one_id(world: Path, beside: Any, tmp_path: Path) -> None:
    one = read_edits(world / "data" / PRINCIPLES, principles=True)[0]
    other = beside("tiny_verifier").write_data(tmp_path / "data", 1)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(other / "win0.png")
    two = read_edits(other / PRINCIPLES, principles=True)[0]
    asks = Asks(reader_of(world))
    pictures = [asks.prompt(edit).others["pixel_values"] for edit in (one, two, one)]
    assert one.id == two.id and not torch.equal(pictures[0], pictures[1])
    assert pictures[2] is pictures[0]  # made once


def test_preferred_counts_ties_and_silence_half() -> None:
    nan = float("nan")
    scores = [[[1, nan], [0.5, 0.5]], [[0.2, 0.4], [0.3, 0.3]], [[nan, nan], [1, 1]]]
    found = preferred(torch.tensor(scores, dtype=torch.float64))
    assert found["right"] == 2.0 and found["judged"] == 2
    assert found["score_win"] == pytest.approx(1.3) and found["score_lose"] == pytest.approx(0.8)


# ---------------------------------------------------------------------------------------- the loop


class Killed(BaseException):
    """In place of a SIGKILL: nothing may catch it."""


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", {}),
        ("gcpo", {}),
        pytest.param(
            "gcpo", {"updates": 2, "minibatches": 2, "kl_weight": 0.1}, marks=pytest.mark.exhaustive
        ),
        pytest.param("gcpo", {"kl_weight": 0.0, "lr_decay": 0.1}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    world: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    base = world / f"whole {name} {len(changes)}"
    config = configured(world, name, base.name, train=changes)
    loop.train_verifier(name, config)
    broken = configured(world, name, str(tmp_path / "broken"), train=changes)
    real, passed = loop.step, []

    def step(*given: Any) -> float:
        passed.append(1)
        if len(passed) == 3 * changes.get("updates", 1) * changes.get("minibatches", 1):
            raise Killed
        return real(*given)

    with mock.patch.object(loop, "step", step), pytest.raises(Killed):
        loop.train_verifier(name, broken)
    assert not (tmp_path / "broken" / "verifier").exists()
    torch.manual_seed(99)
    loop.train_verifier(name, broken)
    assert numbers(tmp_path / "broken") == numbers(base)
    ours, theirs = weights(base), weights(tmp_path / "broken")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = load_file(Path(config.policy.weights) / "model.safetensors")
    moved = [key for key in ours if not torch.equal(ours[key], start[key])]
    assert moved and all("language_model" in key and "_proj" in key for key in moved)
    if name == "gcpo":
        rows = [row for row in numbers(base) if row["event"] == "train"]
        assert rows[0]["ratio_error"] == 0 < rows[0]["sampled_error"] < 1e-4
        assert any(row["grad_norm"] > 0 for row in rows)


def test_a_run_of_something_else_is_not_resumed(world: Path, tmp_path: Path) -> None:
    config = configured(world, "sft", str(tmp_path / "run"), train={"iterations": 2})
    loop.train_verifier("sft", config)
    made = (tmp_path / "run" / "verifier" / "model.safetensors").stat().st_mtime_ns
    loop.train_verifier("sft", config)  # nothing is left to do
    assert (tmp_path / "run" / "verifier" / "model.safetensors").stat().st_mtime_ns == made
    assert f"editr2 watch {config.out}" in (tmp_path / "run" / "README.md").read_text()
    other = replace_nested(config, {"train": {"lr": 0.5}})
    with pytest.raises(CheckpointError, match="train.lr: 0.01 saved, 0.5 given"):
        loop.train_verifier("sft", other)
    longer = replace_nested(other, {"train": {"iterations": 3}})
    loop.train_verifier("sft", longer, resume_anyway=["train.lr"])
    assert json.loads((tmp_path / "run/verifier/trained.json").read_text())["iteration"] == 3


def test_adapters_are_merged_as_they_worked(world: Path) -> None:
    """The folder, read by transformers alone, says what the adapters said."""
    run = world / "whole sft 0"
    if not run.exists():
        loop.train_verifier("sft", configured(world, "sft", run.name))
    config = configured(world, "sft", run.name)
    reader = load_reader(config.policy)
    held = load_file(run / "checkpoints" / "step_000003" / "policy.safetensors")
    assert held.keys() == trainable(reader.module).keys()
    assert all(".lora_" in name for name in held)
    edit = read_edits(world / "data" / PRINCIPLES, principles=True)[0]
    prompt, ids = reader.prompt(edit), reader.answer_ids("wanted red", "x")
    before = reader.logits(prompt, ids)
    with exchanged(reader.module, held):
        adapted = reader.logits(prompt, ids)
    assert float((adapted - before).abs().max()) > 1e-2
    merged = load_reader(ReaderConfig(weights=str(run / "verifier"), lora_rank=0))
    # The folder says what it is asked with, and whoever loads it asks with that.
    assert (run / "verifier" / "judge.md").read_text() == (world / "words/judge.md").read_text()
    assert torch.equal(merged.prompt(edit).ids, prompt.ids)
    torch.testing.assert_close(merged.logits(prompt, ids), adapted, atol=1e-4, rtol=1e-4)
    assert json.loads((run / "verifier" / "generation_config.json").read_text())[
        "repetition_penalty"
    ] == pytest.approx(1.05)


@pytest.mark.parametrize("what", ["logits", "sampling", "scoring"])
def test_the_sentinel_says_what_differs(world: Path, tmp_path: Path, what: str) -> None:
    """Before the first update a ratio that is not 1 ends the run; nothing was changed."""
    config = configured(world, "gcpo", str(tmp_path / "run"), data={"heldout": None})
    said = {
        "logits": "from the model's logits",
        "sampling": "sampled again by itself, it reads otherwise",
        "scoring": "sampling token by token gave",
    }[what]
    real, calls = Reader.sample, []

    def sample(self: Reader, prompts: Any, seeds: Any, **options: Any) -> Any:
        calls.append(1)
        if what == "sampling":
            seeds = [seed + len(calls) for seed in seeds]
            options["temperature"] *= 1.0 + 0.2 * (len(calls) == 1)
        if what == "scoring":
            options["temperature"] *= 1.2
        return real(self, prompts, seeds, **options)

    def loaded(*given: Any) -> Reader:
        reader = load_reader(*given)
        if what == "logits":

            def capped(module: Any, asked: Any, out: Any) -> Any:
                if out.logits.shape[-1] > 2:
                    out.logits = 2 * torch.tanh(out.logits / 2)
                return out

            reader.module.register_forward_hook(capped)
        return reader

    with (
        mock.patch.object(loop, "load_reader", loaded),
        mock.patch.object(Reader, "sample", sample),
        pytest.raises(RatioError, match=said),
    ):
        loop.train_verifier("gcpo", config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_forward_that_is_made_while_another_waits_leaves_it_alone(world: Path) -> None:
    """As where weights are shared out: an idle one, in the other's pre-hook."""
    reader = reader_of(world, gradient_checkpointing=True)
    edits = read_edits(world / "data" / PRINCIPLES, principles=True)
    prompts, ids = [reader.prompt(edit) for edit in edits[:2]], [(7, 8, 2), (9, 2)]
    exact, idle = reader.log_probs(prompts, ids), [False]

    def waits(*_: Any) -> None:
        if not idle[0]:
            idle[0] = True
            assert reader.idle().shape == (1, 1)
            layer = reader.module.model.language_model.layers[0]
            assert layer.training  # of the one that waits
            idle[0] = False

    reader.module.register_forward_pre_hook(waits)
    assert torch.equal(reader.log_probs(prompts, ids).log_prob, exact.log_prob)


def test_recomputed_layers_and_low_precision(world: Path) -> None:
    prompts_of: dict[str, torch.Tensor] = {}
    edits = read_edits(world / "data" / PRINCIPLES, principles=True)
    for name, changes in {
        "plain": {},
        "recomputed": {"gradient_checkpointing": True},
        "bfloat16": {"dtype": "bfloat16"},
    }.items():
        reader = reader_of(world, lora_rank=2, **changes)
        live = trainable(reader.module)
        assert {p.dtype for p in live.values()} == {torch.float32}
        for n, p in live.items():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(n)))
        prompts = [reader.prompt(edit) for edit in edits[:3]]
        ids = reader.answer_ids("wanted red", "x")
        ran: list[int] = []
        seen: list[bool] = []
        reader.module.model.multi_modal_projector.register_forward_hook(
            lambda *given, seen=seen: seen.append(given[-1].requires_grad)
        )
        first = reader.module.model.language_model.layers[0].mlp
        first.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        loss = reader.log_probs(prompts, [ids] * 3).log_prob.sum()
        loss.backward()
        assert len(ran) == (2 if name == "recomputed" else 1)
        assert seen == [False]  # no gradient of the pictures, in which nothing trains
        prompts_of[name] = torch.cat([p.grad.flatten() for p in live.values()])
        assert not any(module.training for module in reader.module.modules())
        if name == "bfloat16":
            frozen = {p.dtype for p in reader.module.parameters() if not p.requires_grad}
            assert frozen == {torch.bfloat16}
    assert torch.equal(prompts_of["plain"], prompts_of["recomputed"])
    near = torch.cosine_similarity(prompts_of["plain"], prompts_of["bfloat16"], dim=0)
    assert 0.9 < float(near) < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("sft", {}),
        ("gcpo", {}),
        ("gcpo", {"shard": True}),
        ("gcpo", {"shard": True, "lora_rank": 0}),
    ],
)
def test_two_processes_train_as_one(
    world: Path, tmp_path: Path, name: str, policy: dict[str, Any]
) -> None:
    """Whole on each, or shared out over them (FSDP2), adapters or all weights."""
    train = {"iterations": 2, "batch": 5, "lr": 1e-3}
    if name == "gcpo":
        train |= {"updates": 2, "minibatches": 2, "kl_weight": 0.1}
    runs = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        shards = policy if processes > 1 else {k: v for k, v in policy.items() if k != "shard"}
        config = configured(world, name, str(out), policy=shards, train=train)
        (tmp_path / f"{processes}.yaml").write_text(dump_yaml(config))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        subprocess.run(
            [sys.executable, "-m", *(torchrun if processes > 1 else []), "editr2", "verifier"]
            + [name, "--config", str(tmp_path / f"{processes}.yaml")],
            check=True,
            cwd=ROOT,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        runs[processes] = numbers(out)
    assert len(runs[1]) == len(runs[2])
    assert any(row.get("grad_norm") for row in runs[1])
    assert all(row.get("sampled_error", 0) < 1e-4 for row in runs[2])
    for one, two in zip(runs[1], runs[2], strict=True):
        for key, value in one.items():
            if isinstance(value, float) and not key.endswith("_error"):
                assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
            elif not key.endswith("_error"):
                assert two[key] == value, key
    ours, theirs = weights(tmp_path / "1"), weights(tmp_path / "2")
    start = load_file(Path(configured(world, name, "x").policy.weights) / "model.safetensors")
    moved = max(float((ours[key] - start[key]).abs().max()) for key in ours)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 0.05 * moved


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="transformers[serving] is not there")
def test_a_served_copy_says_the_same(world: Path, tmp_path: Path) -> None:
    """The folder behind `transformers serve`, asked by the reward `verifier`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, code = str(world / "run" / "verifier"), "from transformers.cli.transformers import main"
    asked = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", f"{code}; main()", *asked],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        )
    try:
        deadline = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                alive = server.poll() is None and time.monotonic() < deadline
                assert alive, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
        options = VerifierOptions(
            url=f"http://127.0.0.1:{port}/v1",
            model=model,
            prompts=str(world / "words"),
            temperature=0,
            max_tokens=16,
        )
        reward, reader = Verifier(options), reader_of(world)
        for edit in read_edits(world / "data" / PRINCIPLES, principles=True)[:3]:
            meta = {"principles": [one.written() for one in edit.principles]}
            session = Session(edit.id, edit.image.read(), (Turn(edit.instruction, meta=meta),))
            found = reward.turn(Item(session, [edit.edited.read()], seed=0), 0)["score"]
            [[text]] = reader.write([edit], 1, 0, temperature=0, max_tokens=16)
            assert found.value == read_trace(text, 1).score, (found, text)
    finally:
        server.terminate()
        server.wait(20)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("sft", ["--policy.weights", "none"], "policy.weights: none (accepted: a folder"),
        ("sft", ["--data", "nowhere"], "data.path: nowhere: no such folder"),
        ("sft", ["--policy.weights", "./no"], "policy.weights: ./no: no such folder (accepted"),
        ("sft", ["--policy.weights", "data"], "policy.weights: data (accepted: a folder or hub"),
        ("sft", ["--policy.lora_targets", "nothing"], "policy.lora_targets: 'nothing' (accepted"),
        ("sft", ["--train.lr", "-1"], "train.lr: -1.0 (accepted: "),
        ("sft", ["--rollout.traces", "3"], "--rollout.traces: unknown flag"),
        ("sft", ["--tracking", "[wanbd]"], "'wanbd' is none of them"),
        ("sft", ["--resume-anyway", "reward"], "--resume-anyway: 'reward' (accepted: sessions"),
        ("gcpo", ["--rollout.traces", "1"], "rollout.traces: 1 (accepted: "),
        ("gcpo", ["--train.minibatches", "9"], "train.minibatches: 9 (accepted: up to"),
        ("gcpo", ["--data", "bare"], "bare/pairs.jsonl: p0: no principles (accepted: what"),
        ("sft", ["--data", "odd"], "'green': unknown to the verifier's"),
        ("sft", ["--data", "marked"], "<image> in a trace (accepted: words)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(world)
    for folder, change in {
        "bare": ("pairs", lambda row: row.pop("principles")),
        "odd": ("traces", lambda row: row.update(trace="green " + row["trace"])),
        "marked": ("traces", lambda row: row.update(trace="<image> " + row["trace"])),
    }.items():
        if folder in flags and not (world / folder).exists():
            file, act = change
            rows = [json.loads(line) for line in (world / f"data/{file}.jsonl").open()]
            (world / folder).mkdir()
            for picture in (world / "data").iterdir():
                (world / folder / picture.name).symlink_to(picture)
            (world / folder / f"{file}.jsonl").unlink()
            for row in rows:
                act(row)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (world / folder / f"{file}.jsonl").write_text(text)
    given = ["--policy.weights", "llava", "--data", "data", "--policy.prompts", "words"]
    out = ["--out", str(tmp_path / "run"), "--train.batch", "4", "--policy.lora_rank", "2"]
    assert main(["verifier", name, *given, *out, *flags]) == 2
    lines = [n for n in capsys.readouterr().err.splitlines() if "left out" not in n]
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------------------------- other models


def test_a_qwen_counts_its_own_places(beside: Any, tmp_path: Path) -> None:
    """Pictures of two sizes, prompts of two lengths: what is filled up changes nothing, and scoring
    is what was sampled."""
    folder = beside("tiny_verifier").write_data(tmp_path / "data", 2)
    Image.fromarray(np.full((64, 40, 3), 90, np.uint8)).save(folder / "image1.png")
    edits = read_edits(folder / PRINCIPLES, principles=True)
    module, processor = beside("tiny_verifier").qwen(beside)
    config = ReaderConfig(weights="tiny", lora_rank=2)
    adapt(module, config)
    reader = Reader(module.eval(), processor, config, "tiny")
    for name, p in trainable(module).items():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    prompts = [reader.prompt(edit) for edit in edits]
    assert len(prompts[0].ids) != len(prompts[1].ids)
    written = reader.sample([*prompts, *prompts], range(4), temperature=1.0, max_tokens=6)
    scored = reader.log_probs([*prompts, *prompts], [one.ids for one in written])
    for k, one in enumerate(written):
        alone = reader.log_probs([prompts[k % 2]], [one.ids])
        for seen in (torch.tensor(one.log_prob), alone.log_prob[0]):
            found = scored.log_prob[k, : len(seen)]
            torch.testing.assert_close(found, seen, atol=2e-5, rtol=0)
    (-scored.log_prob.sum()).backward()
    gradients = {name: p.grad for name, p in trainable(module).items()}
    assert len(gradients) == 2 * 7 * 2 and all("language_model" in name for name in gradients)
    assert all(g is not None and bool(g.abs().max() > 0) for g in gradients.values())
    assert reader.repeated_blocks == ["Qwen2_5_VLDecoderLayer"]
