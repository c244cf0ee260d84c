"""Runs with `edit-r2` from end to end: tiny editors, a tiny Grounding DINO and DINOv3 named by
`reward.options`, and a judge behind HTTP."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from editr2 import train
from editr2.config import Config, replace_nested
from editr2.rewards.record import read_record
from editr2.run.tracking import read_metrics
from editr2.sessions import load_sessions

TURNS = (
    ("color_alter", "Change the color of [cup] to [red]", True),
    ("subject_add", "Add [lamp] on the [left] of [cup]", True),
    ("background_change", "Change the background to [beach]", False),
)


@pytest.fixture
def server(beside):
    return beside("judge_server").JudgeServer


@pytest.fixture
def lookers(beside, tmp_path):
    tiny = beside("tiny_lookers")
    return {
        "detector": str(tiny.grounding_dino(tmp_path / "dino")),
        "features": str(tiny.dinov3(tmp_path / "dinov3")),
    }


@pytest.fixture
def weights(beside, tmp_path):
    def save(model):
        if model == "kontext":
            beside("tiny_editors").kontext_pipeline(seed=0).save_pretrained(tmp_path / "weights")
        else:
            tiny = beside("tiny_qwen")
            tiny.save_pipeline(tiny.qwen_pipeline(), tmp_path / "weights")
        return str(tmp_path / "weights")

    return save


@pytest.fixture
def sessions(tmp_path):
    """Two sessions with the fields and one of mode cu without."""
    lines = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        turns = []
        for task, formatted, kept in TURNS:
            turns.append({"instruction": formatted.replace("[", "").replace("]", "")})
            meta = {"formatted_instruction": formatted, "bg_consistency": kept}
            meta |= {"unchanged_objects": ["tree"], "all_objects": ["cup", "tree"]}
            if i < 2:
                turns[-1] |= {"task": task, "meta": meta}
        mode = {"mode": "cu"} if i == 2 else {}
        row = {"id": f"s{i}", "image": f"{i}.png", "turns": turns, **mode}
        lines.append(json.dumps(row))
    path = tmp_path / "sessions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    load_sessions(path)
    return str(path)


def says(body, k):
    """By what is asked and which vote it is, so that siblings differ."""
    content = body["messages"][0]["content"]
    said = hashlib.sha256(f"{json.dumps(content)}{body.get('seed')}{k}".encode()).digest()
    word = ("yes", "no")[said[0] % 2]
    if "answer_final" in json.dumps(content):
        return f"<answer_turn_1>{word}</answer_turn_1> <answer_final>{word}</answer_final>"
    return word


def config(model, loss, weights, sessions, out, options):
    nft = loss == "nft"
    values = {
        "out": str(out),
        "data": {"path": sessions},
        "policy": {"model": model, "weights": weights, "resolution": (32, 32), "lora_rank": 2},
        "rollout": {
            "sessions": 3,
            "siblings": 2,
            "steps": 2,
            "window": 0 if nft else 1,
            "shared_noise": not nft,
        },
        "credit": {"weights": {"IF": 0.3, "CC": 0.3, "GA": 0.4}},
        "reward": {"name": "edit-r2", "options": options, "retries": 0, "timeout": 60.0},
        "train": {"iterations": 3, "lr": 1e-3, "lr_decay": 1.0, "ema": None, "loss": loss},
        "eval": {"sessions": 2, "strips": 1},
    }
    if model == "kontext":
        values["policy"]["text_tokens"] = 48
    return replace_nested(Config(), values)


@pytest.mark.parametrize("model, loss", [("kontext", "grpo"), ("qwen-edit", "nft")])
def test_a_run_of_three_turns(model, loss, server, lookers, weights, sessions, tmp_path, capsys):
    with server(says=says) as judge:
        # Thresholds that a detector of random weights finds some things by.
        options = {"url": judge.url, **lookers}
        options["thresholds"] = {"add": 0.0, "kept": 0.0, "consistency": 0.0}
        settings = config(model, loss, weights(model), sessions, tmp_path / "run", options)
        run = train(settings)
        chats = len(judge.chats)
    rows, _ = read_metrics(run / "metrics.jsonl")
    trained = [row for row in rows if row["event"] == "train"]
    assert len(trained) == 3 and all(np.isfinite(row["loss"]) for row in trained)
    assert all(row["failed_scores"] == 0 for row in trained), trained[0].get("first_failure")
    # The session without the fields has nothing to judge by, and the run says so.
    assert all(row["not_applicable"] == 2 * 3 for row in trained)
    told = "".join(capsys.readouterr())
    assert "1 of 3 sessions lack something; s2: IF does not apply, turn 1: no task" in told
    calls = list(read_record(run))
    assert {call["name"] for call in calls} == {"IF", "GA"} and len(calls) > 40
    assert not any("failed" in call for call in calls)
    assert {call["vote"] for call in calls} == {1, 2, 3, 4} and chats <= len(calls)
    about = (run / "report.html").read_text()
    assert "IF" in about and "CC" in about


def test_another_thread_or_order_gives_the_same_scores(
    server, lookers, weights, sessions, tmp_path
):
    """One call at a time, and 16."""
    seen = []
    for concurrency in (1, 16):
        with server(says=says) as judge:
            options = {"url": judge.url, **lookers, "thresholds": {"add": 0.0}}
            out = tmp_path / f"run{concurrency}"
            settings = config("kontext", "grpo", weights("kontext"), sessions, out, options)
            less = {"train": {"iterations": 1}, "eval": {"sessions": 0, "strips": 0}}
            settings = replace_nested(settings, {"reward": {"concurrency": concurrency}, **less})
            rows, _ = read_metrics(train(settings) / "metrics.jsonl")
        (row,) = [row for row in rows if row["event"] == "train"]
        seen.append({k: v for k, v in row.items() if k.startswith(("reward", "loss", "IF", "CC"))})
    assert seen[0] == seen[1] and seen[0]
