"""What a verifier's training is said to take, against what a tiny one really does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from editr2.check.devices import find_device
from editr2.check.meter import Meter
from editr2.cli.main import main
from editr2.config import replace_nested
from editr2.verifier import estimate
from editr2.verifier.files import PRINCIPLES, read_edits
from editr2.verifier.model import load_reader
from editr2.verifier.settings import GcpoConfig, ReaderConfig

TOKENS = 12


@pytest.fixture(scope="module")
def root(beside: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = beside("tiny_verifier")
    folder = tmp_path_factory.mktemp("estimate")
    tiny.write_llava(folder / "llava")
    tiny.write_data(folder / "data")
    return folder


def chosen(root: Path, **policy: Any) -> GcpoConfig:
    asked = {"weights": str(root / "llava"), "prompts": str(root / "words"), **policy}
    return replace_nested(
        GcpoConfig(),
        {
            "policy": asked,
            "data": {"path": str(root / "data")},
            "rollout": {"traces": 2, "max_tokens": 16},
            "train": {"rows": 4},
        },
    )


@pytest.mark.parametrize(
    "policy",
    [
        {"lora_rank": 4},
        pytest.param({"lora_rank": 0}, marks=pytest.mark.exhaustive),
        pytest.param(
            {"lora_rank": 4, "lora_targets": r".*(q|v)_proj"}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"lora_rank": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_it_is_what_a_forward_and_a_backward_pass_take(root: Path, policy: dict[str, Any]) -> None:
    config = chosen(root, **policy).policy
    form = estimate.described(config)
    sizes = estimate.sizes_of(form, config)
    reader = load_reader(config)
    every = list(reader.module.parameters())
    train = [p for p in every if p.requires_grad]
    frozen = [p for p in every if not p.requires_grad]
    assert sizes.parameters == sum(p.numel() for p in every)
    assert sizes.trainable == sum(p.numel() for p in train)
    assert sizes.frozen == sum(p.numel() * p.element_size() for p in frozen)
    assert sizes.trained == sum(p.numel() * p.element_size() for p in train)

    edits = read_edits(root / "data" / PRINCIPLES, principles=True)[:4]
    prompts = [reader.prompt(edit) for edit in edits]
    picture = estimate.picture_tokens(form, 16, 16)
    assert int((prompts[0].ids == form.image_token_id).sum()) == 2 * picture
    (length,) = {len(prompt.ids) for prompt in prompts}
    with Meter() as meter:
        reader.log_probs(prompts, [[5] * TOKENS] * 4).log_prob.sum().backward()
    gradients = sum(p.numel() * p.element_size() for p in train)
    lengths = estimate.Lengths(length - 2 * picture, picture, TOKENS, (16, 16))
    cost = estimate.train_cost(form, config, 4, lengths)
    sight = estimate._sight_flops(form, sizes.pictures, lengths, 4) * estimate._sight_passes(
        config, sizes
    )
    real = meter.cost
    # Pictures are a fourteenth of it here, and by formula.
    assert cost.total_flops + sight == pytest.approx(real.total_flops, rel=0.05)
    assert cost.total_flops < real.total_flops
    kept = cost.peak + estimate._sight_bytes(form, config, sizes, lengths, 4)
    assert kept == pytest.approx(real.peak - gradients, rel=0.2)


def test_the_command_says_it_and_changes_nothing(root: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--policy.weights", str(root / "llava"), "--data", str(root / "data")]
    given += ["--policy.prompts", str(root / "words"), "--out", str(tmp_path / "run"), "--check"]
    assert main(["verifier", "sft", *given, "--processes", "2", "--policy.shard", "true"]) == 0
    said = capsys.readouterr().out
    assert (
        "32 traces; 500 iterations over 5 traces (1 cannot" in said
        and "LoRA of rank 16 on 14" in said
    )
    assert "prompt 14 tokens, 8 of them two pictures of 16 x 16; trace" in said
    assert "on each of 2 processes" in said and "gathered blocks" in said
    assert said.splitlines()[-1].startswith("verdict: fits h100: 1.2 GiB of 79.6")
    assert not (tmp_path / "run").exists()
    for more, why in (
        (["--gpu", "h1000"], "--gpu: 'h1000'"),
        (["--train.rows", "0"], "train.rows: 0"),
        (["--data", str(root)], "principles.jsonl: cannot be read"),
    ):
        assert main(["verifier", "sft", *given, *more]) == 2
        err = capsys.readouterr().err
        assert why in err and err.count("\n") == 1, err


@pytest.mark.exhaustive
def test_more_writing_takes_longer(root: Path) -> None:
    device, config = find_device("h100"), chosen(root, lora_rank=4)
    pairs, _ = estimate.OBJECTIVES["gcpo"].reads(str(root / "data"), "data.path")

    def of(tokens: int, **changes: Any) -> estimate.Estimate:
        asked = replace_nested(config, changes)
        return estimate.estimate("gcpo", asked, pairs, device, 1, tokens)

    few, many = of(2), of(8)
    assert many.seconds["writing"] > 2 * few.seconds["writing"]
    assert many.memory["keys and values, writing"] > few.memory["keys and values, writing"]
    assert set(few.peaks) == {"writing", "training"}
    without = of(2, train={"kl_weight": 0.0})
    assert without.seconds["scoring"] == pytest.approx(few.seconds["scoring"] / 2)
    assert few.memory["copy of the start"] and not without.memory["copy of the start"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ],
)
def test_published_models_have_their_published_size(name: str, count: int) -> None:
    config = ReaderConfig(weights=name, lora_rank=0)
    sizes = estimate.sizes_of(estimate.described(config), config)
    assert sizes.parameters == sizes.trainable == count and not sizes.frozen
