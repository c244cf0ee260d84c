"""Exports: stock loaders get the trained policy to the last bit, a wrong one is caught, nothing
half-written stays."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editr2.cli.main import main
from editr2.config import Config, replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import CheckpointError, ConfigError, DataError, ExportError
from editr2.export.export import export, probe, read_run
from editr2.policies.configured import policy_class
from editr2.policies.forms import DiffusersLora, PeftAdapter
from editr2.policies.load import load_policy
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.weights import load_trainable, remove_lora, snapshot, trainable
from editr2.rl.state import new_state


@pytest.fixture(autouse=True)
def a_cuda_build(monkeypatch):
    """torch built for CUDA names it as the accelerator without a device as well, unless asked
    whether one is there."""
    if not torch.cuda.is_available():
        cuda = torch.device("cuda")
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available=False: None if check_available else cuda,
        )


EDITORS = ("kontext", "klein", "qwen-edit", "qwen-edit-plus")
SINCE = ("flux2", "longcat-edit", "qwen-image-2.1")
"""Editors whose turn comes with `make test-all`."""


def since(*values):
    """The cases of `SINCE`."""
    return [pytest.param(model, *values, marks=pytest.mark.exhaustive) for model in SINCE]


LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory, beside_module) -> dict[str, str | None]:
    """Every model's base weights on the disk."""
    folder, flux, qwen = (
        tmp_path_factory.mktemp("base"),
        beside_module("tiny_editors"),
        beside_module("tiny_qwen"),
    )
    flux.kontext_pipeline().save_pretrained(folder / "kontext")
    flux.klein_pipeline().save_pretrained(folder / "klein")
    flux.flux2_pipeline().save_pretrained(folder / "flux2")
    qwen.save_pipeline(qwen.longcat_pipeline(), folder / "longcat-edit")
    qwen.save_pipeline(qwen.qwen_image_pipeline(), folder / "qwen-image-2.1")
    for plus, name in enumerate(EDITORS[2:]):
        qwen.save_pipeline(qwen.qwen_pipeline(plus=bool(plus)), folder / name)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    unified = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(unified.module.llm2vae.weight, std=0.1)
    unified.save(folder / "unified")
    return {name: str(folder / name) for name in (*EDITORS, *SINCE, "unified")}


@pytest.fixture(scope="module")
def beside_module():
    from importlib.util import module_from_spec, spec_from_file_location

    def load(name: str):
        spec = spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def make_run(tmp_path, weights):
    """A run's folder as the trainer leaves it, its trained weights moved at random; and the trained
    policy."""

    def make(model: str, iteration: int = 3, **policy) -> tuple[Path, object]:
        own = (
            {"resolution": (32, 32), "text_tokens": 48 if model in ("klein", "flux2") else None}
            if model != "unified"
            else {}
        )
        policy = {"model": model, "weights": weights[model], **own, **policy}
        config = replace_nested(Config(), {"policy": policy, "train": {"iterations": 3}})
        trained = load_policy(config.policy)
        noise = torch.Generator().manual_seed(1)
        state = new_state(config.train, trained)
        for name, p in trainable(trained.module).items():
            state.ema[name] += torch.randn(p.shape, generator=noise) * 0.05
            p.data += torch.randn(p.shape, generator=noise) * 0.05
        state.iteration = iteration
        run = tmp_path / "run"
        state.save(run / "checkpoints", config)
        (run / "config.yaml").write_text(dump_yaml(config))
        _write_results(run, iteration)
        load_trainable(trained.module, state.ema)
        return run, trained

    return make


def _write_results(run: Path, iteration: int) -> None:
    stat = [{"mean": 0.25, "se": 0.02}, {"mean": 0.5, "se": 0.03}]
    rows = [
        {
            "event": "eval",
            "iteration": i,
            "name": name,
            "sessions": 7,
            "reward_turn": stat,
            "brightness_turn": stat,
        }
        for name, i in (("before", 0), ("after", iteration))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "strips" / "before").mkdir(parents=True)
    turns = []
    for name in ("000", "000_t1"):
        Image.new("RGB", (32, 48), "red").save(run / "strips" / "before" / f"{name}.png")
    turns.append(
        {
            "instruction": "make it " + "very " * 20 + "red",
            "image": "before/000_t1.png",
            "reward": 0.5,
        }
    )
    turns.append({"instruction": "and now", "image": "before/gone.png"})
    strip = {"id": "a", "image": "before/000.png", "turns": turns}
    (run / "strips" / "before.json").write_text(json.dumps({"sessions": [strip]}))


def _largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("model", "alpha"),
    [*((model, 12.0) for model in EDITORS), ("kontext", 10.0), *since(12.0)],
    ids=lambda value: str(value),
)
def test_every_loader_gets_the_lora_at_the_strength_it_was_trained_at(
    model, alpha, make_run, weights, tmp_path
):
    """alpha / rank 4 is taken into B to the last bit, 10 / 3 within one rounding of B; whether the
    loader reads the file's settings or not."""
    run, trained = make_run(model, lora_rank=3, lora_alpha=alpha)
    done = export(run, tmp_path / "out")
    exact = alpha == 12
    assert done.proof.error == 0 and done.proof.effect > 0.01 * done.proof.size
    assert (done.folding == 0) == (done.proof.rounding == 0) == exact and done.folding <= 2**-24
    kind, file = policy_class(model), tmp_path / "out" / LORA_FILE
    pipe = kind.load_pipeline(weights[model])
    pipe.vae.enable_slicing()  # as in the policy: another batch is another rounding
    loaded, expected = kind(pipe, dataclasses.replace(trained.config, lora_rank=0)), probe(trained)
    for settings_read in (True, False):
        if not settings_read:
            save_file(load_file(file), file, metadata={"format": "pt"})
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(tmp_path / "out")
        else:
            pipe.transformer.load_lora_adapter(tmp_path / "out", use_safetensors=True)
        assert _largest(probe(loaded), expected) <= (0 if exact else 1e-5)
        pipe.transformer.unload_lora()
        assert _largest(probe(loaded), expected) > 0.01


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [*EDITORS, *SINCE, "unified"])
def test_what_is_exported_is_a_start(model, make_run, tmp_path):
    """For every editor; to the last bit, since alpha / rank is a power of two."""
    run, trained = make_run(model, lora_rank=3, lora_alpha=12.0)
    config, expected = read_run(run).policy, probe(trained)
    (tmp_path / "out").mkdir()
    policy_class(model).form(config, "lora").write(trained, tmp_path / "out")
    started = dataclasses.replace(config, lora_weights=str(tmp_path / "out"))
    assert _largest(probe(load_policy(started)), expected) == 0
    assert _largest(probe(load_policy(config)), expected) > 0.01


@pytest.mark.parametrize("model", [*EDITORS, *since()])
def test_ranks_and_strengths_of_single_layers_are_kept(model, weights, tmp_path):
    from peft import LoraConfig

    settings = {
        "model": model,
        "weights": weights[model],
        "resolution": (32, 32),
        "lora_rank": 2,
        "dtype": "bfloat16",
    }
    policy, base = (load_policy(dataclasses.replace(Config().policy, **settings)) for _ in range(2))
    remove_lora(policy.module)
    remove_lora(base.module)
    patterns = {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_k": 7}}
    policy.module.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=policy.lora_targets, **patterns)
    )
    for p in trainable(policy.module).values():
        p.data = torch.randn(p.shape) * 0.1  # float32 over bfloat16, as trained
    before = probe(base)
    form = type(policy).form(policy.config, "lora")
    form.write(policy, tmp_path)
    assert _largest(probe(form.load(base, tmp_path)), probe(policy)) == 0
    assert _largest(probe(policy), before) > 0.01


def test_adapters_are_stored_in_their_own_precision_and_at_strength_one(make_run, tmp_path):
    run, trained = make_run("kontext", lora_rank=3, lora_alpha=12.0, dtype="bfloat16")
    done = export(run, tmp_path / "out")
    assert done.proof.error == done.proof.rounding == 0
    stored = load_file(tmp_path / "out" / LORA_FILE)
    trained = {n.replace(".default", ""): t for n, t in snapshot(trained.module).items()}
    assert {t.dtype for t in stored.values()} == {torch.float32}
    trained = {n: 4 * t if "lora_B" in n else t for n, t in trained.items()}
    assert all(torch.equal(stored[f"transformer.{n}"], t) for n, t in trained.items()) and len(
        stored
    ) == len(trained)
    with safe_open(tmp_path / "out" / LORA_FILE, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["transformer.lora_alpha"] == said["transformer.r"] == 3
    # What goes on training from it keeps the alpha that it was trained with.
    assert json.loads((tmp_path / "out" / "policy.json").read_text())["lora"]["alpha"] == 12.0


@pytest.mark.parametrize("kind", ["lora", "merged", "full"])
def test_unified(kind, make_run, weights, tmp_path):
    run, trained = make_run("unified", lora_rank=0 if kind == "full" else 3, lora_alpha=10.0)
    done = export(run, tmp_path / "out", merge=kind == "merged")
    assert (
        done.kind == kind and done.proof.error == 0 and done.proof.effect > 0.01 * done.proof.size
    )
    if kind == "lora":
        from peft import PeftModel

        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 3
        loaded = UnifiedPolicy.load(Path(weights["unified"]))
        PeftModel.from_pretrained(loaded.module, tmp_path / "out")
    else:
        loaded = UnifiedPolicy.load(tmp_path / "out")
    # A merged weight is rounded once more, and so is B with alpha / rank in it.
    assert (
        _largest(probe(loaded), probe(trained)) <= {"merged": 1e-4, "lora": 1e-5, "full": 0}[kind]
    )


@pytest.mark.parametrize(("kind", "dtype"), [("full", "float32"), ("merged", "bfloat16")])
def test_diffusers_folder_is_a_whole_pipeline(kind, dtype, make_run, tmp_path):
    from diffusers import DiffusionPipeline

    run, trained = make_run(
        "klein", lora_rank=3 if kind == "merged" else 0, lora_alpha=10.0, dtype=dtype
    )
    done = export(run, tmp_path / "out", merge=kind == "merged")
    assert (
        done.kind == kind
        and done.proof.error == 0
        and (done.proof.rounding > 0) == (kind == "merged")
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.vae.enable_slicing()
    loaded = policy_class("klein")(pipe, dataclasses.replace(trained.config, lora_rank=0))
    far = _largest(probe(trained), probe(load_policy(trained.config)))
    assert _largest(probe(loaded), probe(trained)) <= (0.2 * far if kind == "merged" else 0)
    again = load_policy(
        dataclasses.replace(trained.config, weights=str(tmp_path / "out"), lora_rank=0)
    )
    assert _largest(probe(again), probe(trained)) <= (0.2 * far if kind == "merged" else 0)


def test_wrong_strength_is_caught_and_leaves_nothing(make_run, tmp_path, monkeypatch):
    run, _ = make_run("kontext", lora_rank=3, lora_alpha=10.0)
    write = DiffusersLora.write

    def at_half(self, policy, folder):
        folding = write(self, policy, folder)
        halved = {
            name: t / 2 if "lora_B" in name else t
            for name, t in load_file(folder / LORA_FILE).items()
        }
        save_file(halved, folder / LORA_FILE, metadata={"format": "pt"})
        return folding

    monkeypatch.setattr(DiffusersLora, "write", at_half)
    with pytest.raises(
        ExportError, match=r"differ by up to .*% of what training changed \(accepted: 0\)"
    ):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_wrong_weight_is_caught(make_run, tmp_path, monkeypatch):
    run, _ = make_run("unified", lora_rank=3)
    write = PeftAdapter.write

    def changed(self, policy, folder):
        folding = write(self, policy, folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0] += 1e-2
        save_file(tensors, file, metadata={"format": "pt"})
        return folding

    monkeypatch.setattr(PeftAdapter, "write", changed)
    with pytest.raises(ExportError, match="another policy"):
        export(run, tmp_path / "out")


def test_live_weights_and_newest_checkpoint(make_run, tmp_path, capsys):
    run, _ = make_run("unified", iteration=2, lora_rank=3)
    assert main(["export", str(run), "--out", str(tmp_path / "ema")]) == 0
    assert "iteration 2 of 3 (unfinished: its newest checkpoint)" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "live"), "--weights", "live"]) == 0
    ema, live = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ema", "live")
    )
    assert ema.keys() == live.keys() and not any(torch.equal(ema[k], live[k]) for k in ema)
    text = (tmp_path / "live" / "README.md").read_text()
    assert "the last weights of iteration 2 of 3. The training was not finished." in text
    assert "They are those of the averaged weights; these are the last ones." in text


def test_card(make_run, tmp_path):
    run, _ = make_run("kontext", lora_rank=3, lora_alpha=10.0)
    export(run, tmp_path / "out")
    _, header, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    assert (
        header["library_name"] == "diffusers"
        and "lora" in header["tags"]
        and "base_model" not in header
    )
    assert "LoRA adapters (rank 3, alpha 10) for kontext (a local folder)" in text
    assert re.search(
        r"strength 1: alpha / rank, 3\.33333 in training, .*by [3-6]\.\de-08 of itself at most",
        text,
    )
    assert (
        'pipe.load_lora_weights("out")' in text
        and "| brightness, turn 2 | 0.50 ± 0.03 | 0.50 ± 0.03 |" in text
    )
    assert "- Reward: IF x 0.3, CC x 0.3, GA x 0.4\n" in text
    assert "lora_alpha: 10.0" in text and "equal to the last bit" in text
    with Image.open(tmp_path / "out" / "strips.png") as strip:
        colours = strip.convert("RGB").getcolors(1 << 20)
        assert {(255, 0, 0), (211, 211, 211)} <= {c for _, c in colours} and strip.width > 3 * 192


def test_bases_are_named(weights, tmp_path):
    from editr2.export.model_card import Base

    assert (
        Base.of(UnifiedPolicy.load(Path(weights["unified"])), None).name
        == "the small model shipped with editr2"
    )
    policy = load_policy(
        dataclasses.replace(
            Config().policy, model="kontext", weights=weights["kontext"], resolution=(32, 32)
        )
    )
    policy.base = "black-forest-labs/FLUX.1-Kontext-dev"
    base = Base.of(policy, None)
    assert base.hub_id == base.name == policy.base
    lines = type(policy).form(policy.config, "lora").code("mine", base.hub_id, "bfloat16")
    assert "from diffusers import FluxKontextPipeline" in lines


def test_bad_input_is_one_error(make_run, tmp_path, capsys):
    run, _ = make_run("unified")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for arguments, message in {
        ("nothing", "--out", "out"): "nothing: no config.yaml in it",
        (
            str(run),
            "--out",
            str(tmp_path / "full"),
        ): "is there already (accepted: a new or empty folder)",
        (str(run), "--out", str(tmp_path / "full" / "a")): "is there already",
        (
            str(run),
            "--out",
            "out",
            "--weights",
            "best",
        ): "--weights: 'best' (accepted for this run: ema, live)",
        (str(run), "--out", "out", "--merge"): "--merge: the run trained all weights",
    }.items():
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (run / "metrics.jsonl").unlink()
    (run / "strips" / "before.json").unlink()
    with pytest.raises(DataError, match="neither metrics"):
        export(run, tmp_path / "out")
    (run / "metrics.jsonl").write_text("")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export(run, tmp_path / "out")
    (run / "config.yaml").write_text("rollout:\n  sibling: 1\n")
    with pytest.raises(ConfigError, match="sibling"):
        export(run, tmp_path / "out")


def test_an_empty_folder_is_taken(make_run, tmp_path):
    run, _ = make_run("unified", lora_rank=2)
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
