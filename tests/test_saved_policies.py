"""What policies leave on the disk and what `check` knows of them: modes of files, adapters on all
linear layers, saving before training, models by their own class, tiles."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file

from editr2.check.editors import Editor, open_editor
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import CheckpointError, UserError
from editr2.export.export import export, probe
from editr2.policies.adapters import adapter_weights
from editr2.policies.configured import policy_class
from editr2.policies.klein import KleinPolicy
from editr2.policies.load import load_policy
from editr2.policies.models import MODELS
from editr2.policies.weights import trainable
from editr2.training import train


@pytest.fixture(scope="module")
def folders(beside) -> ModuleType:
    return beside("policy_folders")


@pytest.fixture(scope="module")
def good(tmp_path_factory, beside, folders) -> dict[str, tuple[str, Path]]:
    """Model and folder by kind of folder."""
    return folders.make(tmp_path_factory.mktemp("good"), beside)


def modes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): oct(p.stat().st_mode & 0o777)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_everyone_may_read_what_was_written(good, folders, tmp_path, usual_umask):
    """A run with its checkpoints, strips, report and policy; a rollout; exports; an import; saved
    policies."""
    _, weights = good["unified"]
    config = replace_nested(
        Config(),
        {
            "out": str(tmp_path / "run"),
            "policy": {"weights": str(weights), "lora_rank": 2, "intent": False},
            "rollout": {"sessions": 2, "siblings": 2, "turns": 1, "steps": 2, "window": 1},
            "train": {"iterations": 1},
            "eval": {"sessions": 1, "strips": 1},
        },
    )
    run = train(config)
    export(run, tmp_path / "adapter")
    export(run, tmp_path / "merged", merge=True)
    small = [
        "--eval.sessions",
        "1",
        "--rollout.turns",
        "1",
        "--rollout.steps",
        "2",
        "--rollout.window",
        "1",
    ]
    assert (
        main(
            [
                "rollout",
                "--out",
                str(tmp_path / "rollout"),
                "--policy.weights",
                str(weights),
                *small,
            ]
        )
        == 0
    )
    assert main(["world", "make", "--out", str(tmp_path / "made"), "--count", "1"]) == 0
    assert (
        main(
            [
                "data",
                "import",
                "sessions",
                str(tmp_path / "made"),
                "--out",
                str(tmp_path / "imported"),
            ]
        )
        == 0
    )
    for kind in ("klein-lora", "klein-full"):
        folders.loaded(*good[kind]).save(tmp_path / kind)
    found = modes(tmp_path)
    assert {
        "run",
        "adapter",
        "merged",
        "rollout",
        "made",
        "imported",
        "klein-lora",
        "klein-full",
    } == {name.split("/")[0] for name in found}
    assert len(found) > 30 and {name: mode for name, mode in found.items() if mode != "0o644"} == {}


def test_a_users_umask_counts(good, folders, tmp_path):
    before = os.umask(0o077)
    try:
        folders.loaded(*good["unified"]).save(tmp_path / "policy")
    finally:
        os.umask(before)
    assert set(modes(tmp_path).values()) == {"0o600"}


# ----------------------------------------------------------------------------------------- strength


def test_a_lora_is_applied_at_its_files_strength(good, folders, tmp_path):
    """B with alpha / rank in it, as written now, and B beside an alpha of its own, as it was
    written before and as others write it, are one policy: to go on training from, to evaluate, and
    merged."""
    model, base = good["klein"]
    policy = folders.loaded(model, base, lora_rank=folders.RANK, lora_alpha=8.0)
    for name, p in adapter_weights(policy.module).items():
        torch.nn.init.normal_(p.data, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.save(tmp_path / "now")
    shutil.copytree(tmp_path / "now", tmp_path / "before")
    file = tmp_path / "before" / "pytorch_lora_weights.safetensors"
    said = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": folders.RANK, "transformer.lora_alpha": 8.0}
        )
    }
    save_file(
        {n: t / 4 if "lora_B" in n else t for n, t in load_file(file).items()}, file, metadata=said
    )
    expected = probe(policy)
    for name in ("now", "before"):
        again = folders.loaded(model, tmp_path / name, lora_rank=folders.RANK, lora_alpha=8.0)
        evaluated = load_policy(folders.settings(model, tmp_path / name), trains=False)
        for other in (again, evaluated):
            assert all(torch.equal(a, b) for a, b in zip(probe(other), expected, strict=True))
        for a, b in zip(
            probe(folders.loaded(model, tmp_path / name)), expected, strict=True
        ):  # merged
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    untrained = probe(folders.loaded(model, base))
    assert max(float((a - b).abs().max()) for a, b in zip(untrained, expected, strict=True)) > 0.01


# ----------------------------------------------------------------------- saved before it is trained


@pytest.mark.parametrize("model", ["klein", "kontext"])
def test_adapters_on_all_linear_layers_are_saved_and_found_again(model, good, folders, tmp_path):
    policy = folders.loaded(*good[model], lora_rank=folders.RANK, lora_targets="all-linear")
    base = folders.loaded(*good[model]).module
    layers = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(adapter_weights(policy.module)) == 2 * len(layers)
    for name, p in adapter_weights(policy.module).items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.save(tmp_path / "policy")
    targets = json.loads((tmp_path / "policy" / "policy.json").read_text())["lora"]["targets"]
    assert targets == sorted(targets)
    again = folders.loaded(
        model, tmp_path / "policy", lora_rank=folders.RANK, lora_targets="all-linear"
    )
    found = adapter_weights(again.module)
    assert all(torch.equal(p, found[name]) for name, p in adapter_weights(policy.module).items())
    with pytest.raises(
        UserError, match=r"policy\.lora_targets: .*accepted: the \d+ names in policy.json, that of"
    ):
        folders.loaded(model, tmp_path / "policy", lora_rank=folders.RANK)
    pipe = policy_class(model).load_pipeline(str(good[model][1]))
    pipe.load_lora_weights(tmp_path / "policy")
    stock = adapter_weights(pipe.transformer)
    assert len(stock) == 2 * len(layers)


def test_what_cannot_be_saved_is_said_before_the_first_iteration(beside, tmp_path):
    policy = beside("flux_policy").FluxPolicy()

    def save(folder: Path) -> None:
        folder.mkdir()
        raise CheckpointError(f"{folder}: no place left")

    policy.save = save
    small = {
        "rollout": {"sessions": 1, "siblings": 2, "turns": 1},
        "train": {"iterations": 1},
        "eval": {"sessions": 1},
    }
    config = replace_nested(Config(), {"out": str(tmp_path / "run"), **small})
    with pytest.raises(CheckpointError, match="no place left"):
        train(config, policy=policy)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "config.yaml" in left and not left & {
        "metrics.jsonl",
        "checkpoints",
        "strips",
        "policy",
        ".tmp-policy",
    }


# ------------------------------------------------------------------------------ check and the class


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.q_proj"])
def test_check_takes_adapters_of_the_unified_model(targets, good, folders):
    config = folders.settings(*good["unified"], lora_rank=4, lora_targets=targets)
    editor = open_editor(config)
    trained = sum(p.numel() for p in trainable(load_policy(config).module).values())
    assert editor.sizes().trainable == trained > 0
    assert editor.cost("train", 1, 0).total_flops > editor.cost("velocity", 1, 0).total_flops


def test_targets_of_the_unified_model_that_match_nothing_are_one_line():
    for make in (load_policy, open_editor):
        for targets in ("nothing", "language_model"):
            with pytest.raises(UserError, match=r"policy\.lora_targets: '") as found:
                make(PolicyConfig(lora_rank=4, lora_targets=targets))
            assert "\n" not in str(found.value)


class DemandingPipeline(Flux2KleinPipeline):
    """Its constructor asks its parts, as many do."""

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, transformer, is_distilled: bool = False
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)
        self.words = tokenizer.get_vocab()
        self.width = text_encoder.config.hidden_size + transformer.config.joint_attention_dim


class OwnPolicy(KleinPolicy):
    model = "own"

    @classmethod
    def pipeline_class(cls):
        return DemandingPipeline

    def prompt_length(self, said, images):
        return said + 3


def test_a_models_own_class_is_asked(good, folders, monkeypatch):
    folder = good["klein"][1]
    config = folders.settings("own", folder, lora_rank=folders.RANK)
    editor = Editor(config, OwnPolicy.blueprint(config))
    assert editor.blueprint.text_length(0) == 16 + 3
    assert isinstance(editor.policy.pipe, DemandingPipeline)
    assert (
        editor.cost("velocity", 1, 0).total_flops
        < open_editor(folders.settings("klein", folder)).cost("velocity", 1, 0).total_flops
    )
    with own_class_in_the_table(monkeypatch):
        assert isinstance(open_editor(folders.settings("klein", folder)).policy, OwnPolicy)
        assert isinstance(folders.loaded("klein", folder).pipe, DemandingPipeline)


@contextmanager
def own_class_in_the_table(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "klein", "own_model:OwnPolicy")
        patch.setitem(sys.modules, "own_model", sys.modules[__name__])
        patch.setattr(OwnPolicy, "model", "klein")
        yield


@pytest.mark.exhaustive
def test_check_passes_a_models_own_class(good, monkeypatch, tmp_path, capsys):
    assert main(["world", "make", "--out", str(tmp_path / "data"), "--count", "1"]) == 0
    data = ["--data", str(tmp_path / "data"), "--data.resize", "stretch"]
    data += ["--reward.function", "editr2.rewards.brightness:Brightness"]
    data += ["--credit.preset", "flow-grpo", "--credit.weights", '{"brightness": 1.0}']
    own = [
        "--policy.model",
        "klein",
        "--policy.weights",
        str(good["klein"][1]),
        "--policy.resolution",
        "[32, 32]",
    ]
    with own_class_in_the_table(monkeypatch):
        assert main(["check", *data, *own, "--policy.lora_rank", "2"]) == 0
    assert main(["check", "--policy.lora_rank", "4"]) == 0  # of the unified model
    assert "trained" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("model", ["kontext", "klein"])
def test_the_autoencoder_is_the_stock_one_above_its_tiles(model, good, folders):
    """Stock pipelines do not tile; a picture is 1056 pixels wide, above the tiles' 1024."""
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 1056, 3), np.uint8)
    plain, tiled = (
        folders.loaded(*good[model], resolution=(32, 1056), vae_tiling=tiling)
        for tiling in (False, True)
    )
    pipe = policy_class(model).load_pipeline(str(good[model][1]))
    stock = policy_class(model)(pipe, plain.config)
    expected = stock.encode(image).conditions[0]
    assert torch.equal(plain.encode(image).conditions[0], expected)
    assert not torch.equal(tiled.encode(image).conditions[0], expected)
    latents = torch.randn(1, *stock.latent_shape)
    assert np.array_equal(plain.decode(latents), stock.decode(latents))


def test_tiles_that_a_model_cannot_use_are_refused(good, folders):
    for make in (load_policy, open_editor):
        with pytest.raises(
            UserError,
            match=r"policy\.vae_tiling: True \(accepted with policy\.model qwen-edit: false",
        ):
            make(folders.settings(*good["qwen-edit"], vae_tiling=True))
