"""`--policy PATH|ID`: whatever a user has of an editor is found to be what it is, with how it
edits, and is then the policy that was trained."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from editr2.cli.main import main
from editr2.cli.settings import run_config
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import ConfigError, UserError
from editr2.export.export import export, probe, read_run
from editr2.policies.configured import Stock, policy_class
from editr2.policies.found import stock_steps
from editr2.policies.load import load_policy
from editr2.policies.models import MODELS
from editr2.policies.pipelines import PipelineModel
from editr2.policies.recorded import write_settings
from editr2.policies.weights import load_trainable, snapshot, trainable
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.rl.state import new_state
from editr2.run.identity import loaded_weights

SAMPLED: dict[str, dict[str, Any]] = {
    "rollout": {
        **{"steps": 3, "shift": 1.5, "dynamics": "flow-sde", "noise_level": 0.5, "window": 1},
        **{"window_range": 0.9, "window_schedule": "progressive", "window_every": 7},
        **{"store_dtype": "bfloat16", "groups_per_batch": 2},
    },
    "eval": {"steps": 2, "sampler": "ode", "intent_tokens": 9},
}
"""Of the runs here; no default."""
POLICY: dict[str, dict[str, Any]] = {
    "kontext": {"resolution": (32, 32), "guidance_embed": 2.5, "text_tokens": 48},
    "unified": {"guidance": 2.0, "intent_tokens": 7},
}
STOCK = {
    "kontext": (28, {"guidance": 1.0}),
    "klein": (4, {}),
    "klein-kv": (4, {}),
    "qwen-edit": (50, {"guidance": 4.0}),
    "qwen-edit-plus": (50, {"guidance": 4.0}),
    "flux2": (50, {}),
    "longcat-edit": (50, {"guidance": 4.5}),
    "qwen-image-2.1": (40, {"guidance": 1.0}),
}
"""Steps and settings of the published weights, by the pipelines' documentation."""


class Trained(NamedTuple):
    """A run, what it trained, and its policy's answers, now and before."""

    folder: Path
    values: dict[str, torch.Tensor]
    answers: list[torch.Tensor]
    before: list[torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory, beside) -> Path:
    """Base weights of `POLICY`, and what names the others' pipelines."""
    root = tmp_path_factory.mktemp("base")
    beside("tiny_editors").kontext_pipeline().save_pretrained(root / "kontext")
    from editr2.policies.unified.model import UnifiedConfig
    from editr2.policies.unified.policy import new_embedded_policy

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    unified = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(unified.module.llm2vae.weight, std=0.1)
    unified.save(root / "unified")
    for name in ("klein", "qwen-edit"):
        (root / name).mkdir()
        index = {"_class_name": policy_class(name).pipeline}  # type: ignore[attr-defined]
        (root / name / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> dict[str, Trained]:
    """Runs with LoRA of both kinds of model, as the trainer leaves them."""
    made = {}
    for model, own in POLICY.items():
        run = tmp_path_factory.mktemp(model) / "run"
        policy = {"model": model, "weights": str(base / model), "lora_rank": 2, **own}
        policy["compile"] = "off"  # this and the seed are no editor's
        config = replace_nested(Config(), {"seed": 5, "policy": policy, **SAMPLED})
        last = load_policy(config.policy)
        learned = trainable(last.module)
        before = probe(last)  # after which nothing trains
        for p in learned.values():
            p.requires_grad_(True).data = (
                torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            )
        state = new_state(config.train, last)
        state.iteration = 60
        state.save(run / "checkpoints", config)
        (run / "config.yaml").write_text(dump_yaml(config))
        (run / "metrics.jsonl").write_text("")
        last.save(run / "policy")
        made[model] = Trained(run, snapshot(last.module), probe(last), before)
    return made


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory) -> Path:
    """Of the runs, plain and merged: by the command, or without its proof, which takes long."""
    root = tmp_path_factory.mktemp("exports")
    export(trained["unified"].folder, root / "unified-lora")
    for name in ("unified-merged", "kontext-lora", "kontext-merged"):
        model, _, kind = name.partition("-")
        config = read_run(trained[model].folder)
        policy = load_policy(config.policy)
        load_trainable(policy.module, trained[model].values)
        (root / name).mkdir()
        policy_class(model).form(config.policy, kind).write(policy, root / name)
        write_settings(root / name, config, config.policy.weights, whole=kind == "merged")
    return root


def found(text: Path | str, *flags: str) -> tuple[Config, list[str]]:
    config, given = run_config("editr2 eval", "", ["--policy", str(text), *flags], named=True)
    assert given["policy"] == str(text)
    return config, given["notes"]


def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# A merged weight is rounded once more.
ROUNDED = 1e-4


@pytest.mark.parametrize("model", POLICY)
@pytest.mark.parametrize(("what", "most"), [("run", None), ("lora", 0.0), ("merged", ROUNDED)])
def test_what_a_run_made_is_the_policy_with_the_runs_settings(model, what, most, trained, exports):
    run = trained[model].folder
    folder = run if what == "run" else exports / f"{model}-{what}"
    config, (note,) = found(folder)
    for section, values in {**SAMPLED, "policy": {"model": model, **POLICY[model]}}.items():
        taken = getattr(config, section)
        assert {name: getattr(taken, name) for name in values} == values
    assert (config.seed, config.policy.compile) == (0, "auto")
    weights = str(run / "policy" if what == "run" else folder)
    assert config.policy.weights == weights and ("policy/ of the run" in note) == (what == "run")
    if what == "run":
        assert found(run / "policy")[0] == config
    loaded = probe(load_policy(config.policy, trains=False))
    if most is None:  # unified saves adapters merged
        most = ROUNDED if model == "unified" else 0.0
    assert far(loaded, trained[model].answers) <= most
    assert far(loaded, trained[model].before) > 0.01


def test_the_best_weights_of_a_run_are_taken_before_its_last(trained, tmp_path):
    run = trained["unified"].folder
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    for name in ("policy", "best"):
        (tmp_path / "run" / name).symlink_to(run / "policy")
    facts = {"metric": "reward", "iteration": 40, "value": 0.81234}
    for name, said in (("run", "best/ (not its policy/) of the run"), ("run/policy", "")):
        config, (note,) = found(tmp_path / name)
        taken = tmp_path / "run" / ("best" if name == "run" else "policy")
        assert config.policy.weights == str(taken) and said in note and config.eval.steps == 2
    (tmp_path / "run" / "best").unlink()
    (tmp_path / "run" / "best").mkdir()
    (tmp_path / "run" / "best" / "best.json").write_text(json.dumps(facts))
    _, (note,) = found(tmp_path / "run")
    assert "best/ (reward 0.8123 at iteration 40; not its policy/) of the run, unified" in note


@pytest.mark.parametrize(
    ("name", "steps", "policy"),
    [
        ("kontext", 28, {"guidance": 1.0, "guidance_embed": None}),
        ("klein", 50, {"guidance": 4.0}),  # not distilled, by its index
        ("qwen-edit", 50, {"guidance": 4.0, "negative_prompt": None}),
    ],
)
def test_a_stock_pipeline_is_sampled_as_it_is(name, steps, policy, base, monkeypatch):
    """By its folder, and by a hub id that was downloaded before."""

    def cached(hub_id, file):
        return str(base / hub_id.partition("/")[2] / file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    for given in (str(base / name), f"some.one/{name}"):
        config, (note,) = found(given)
        assert (config.policy.model, config.policy.weights) == (name, given)
        assert (config.eval.sampler, config.eval.steps) == ("ode", steps) and str(steps) in note
        assert {key: getattr(config.policy, key) for key in policy} == policy


def test_a_saved_policy_alone_is_known_without_its_settings(trained, base, tmp_path):
    run = trained["kontext"].folder
    (tmp_path / "elsewhere").symlink_to(run / "policy")
    for folder, model in ((tmp_path / "elsewhere", "kontext"), (base / "unified", "unified")):
        config, (note,) = found(folder)
        default = PolicyConfig(model, str(folder))
        assert config.policy == default and "they are the defaults" in note


def test_flags_and_files_win_but_for_the_weights(exports, tmp_path):
    folder, file = exports / "kontext-lora", tmp_path / "mine.yaml"
    file.write_text(
        "policy: {model: klein, weights: x, lora_rank: 9, guidance_embed: 3}\neval: {steps: 5}\n"
    )
    config, notes = found(
        folder, "--config", str(file), "--eval.steps=6", "--policy.dtype=bfloat16"
    )
    assert (config.policy.model, config.policy.weights) == ("kontext", str(folder))
    assert config.policy.lora_rank == 0 and config.policy.guidance_embed == 3.0
    assert (config.eval.steps, config.policy.dtype) == (6, "bfloat16")
    assert notes[1:] == ["--policy is taken, not policy.model and policy.weights of --config"]
    assert found(folder, "--preset", "flow-grpo")[0].rollout.steps == 3
    with pytest.raises(ConfigError, match=r"--policy.weights: x \(accepted with --policy: none"):
        found(folder, "--policy.weights=x")
    with pytest.raises(ConfigError, match="--policy: a group of settings"):
        run_config("editr2 train", "", ["--policy", str(folder)])


@pytest.mark.parametrize("model", MODELS)
def test_stock_defaults(model):
    kind = policy_class(model)
    if model == "bagel":
        edits = {"guidance": 4.0, "guidance_image": 2.0, "renorm": "text_channel"}
        expected = Stock(49, {**edits, "guidance_interval": (0.4, 1.0)})
        assert kind.stock(PolicyConfig(model)) == expected
        return
    if not issubclass(kind, PipelineModel):
        assert kind.stock(PolicyConfig(model)) is None and stock_steps(PolicyConfig(model)) is None
        return
    stock = kind.stock(PolicyConfig(model))
    assert stock is not None and (stock.steps, stock.settings) == STOCK[model]
    given = inspect.signature(kind.pipeline_class().__call__).parameters
    if hasattr(kind, "default_guidance_embed"):
        assert given["guidance_scale"].default == kind.default_guidance_embed
    if "max_sequence_length" in given:
        assert given["max_sequence_length"].default == (getattr(kind, "text_limit", None) or 512)
    if model == "klein":
        whole = replace(PolicyConfig(model), weights="black-forest-labs/FLUX.2-klein-base-9B")
        assert stock_steps(whole) == 50 and kind.stock(whole).settings == {"guidance": 4.0}


def test_it_edits_as_the_bare_call_of_the_stock_pipeline(base, beside):
    """Nothing is said to the pipeline but what to edit, and of which size."""
    config, _ = found(base / "kontext", "--policy.resolution=32x32")
    policy = load_policy(config.policy, trains=False)
    (image,) = beside("tiny_editors").pictures(1, (32, 32))
    x = noise = torch.randn(1, *policy.latent_shape)
    context = policy.instruct(policy.encode(image[None]), ["make it red"])
    sampler = eval_sampler(config.rollout, config.eval, own_schedule(policy))
    for k in range(sampler.steps):
        sigma = sampler.sigmas[k : k + 1]
        with torch.no_grad():
            v = policy.velocity(x, sigma, context)
        x = x + (sampler.sigmas[k + 1] - sampler.sigmas[k]) * v.combined(sigma)
    size = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False}
    stock = policy.pipe(
        Image.fromarray(image), "make it red", latents=noise, output_type="np", **size
    ).images
    assert np.abs(policy.decode(x) / 255 - stock).max() <= 0.5 / 255 + 1e-5


def _junk(root: Path, trained: Any, exports: Path) -> dict[str, tuple[Any, str]]:
    """What is named, and what must be said of it."""
    run = trained["unified"].folder
    for name, files in {
        "empty": {},
        "other": {"model_index.json": '{"_class_name": "FluxFillPipeline"}'},
        "cut": {"model_index.json": '{"_class'},
        "strange": {"policy.json": '{"model": "mine", "base": "x"}', "transformer/a": ""},
        "language": dict.fromkeys(("config.json", "tokenizer.json", "model.safetensors"), "{}"),
        "bare": {"pytorch_lora_weights.safetensors": ""},
        "peft": {"adapter_config.json": "{}"},
        "early": {"config.yaml": "", "checkpoints/a": ""},
        "moved": {
            "adapter_config.json": "{}",
            "editr2.yaml": "policy: {model: unified, weights: /gone}",
        },
        "typo/policy": {"a": ""},
        "typo": {"config.yaml": "policy:\n  guidance: much"},
    }.items():
        for file, text in files.items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text(text)
        (root / name).mkdir(exist_ok=True)
    return {
        "nowhere/at/all": ("nowhere/at/all", "not there (accepted: the folder of a run, an export"),
        "a file": (root / "typo" / "config.yaml", "a file (accepted: a folder, or a hub id)"),
        "a hub id": (
            "some.one/else",
            "no folder, not downloaded before, and ",
        ),
        "a published one": ("Qwen/Qwen-Image-Edit", "no folder, not downloaded before, and "),
        "empty": (root / "empty", "no editor in it (accepted: a folder with config.yaml beside"),
        "other": (root / "other", "'FluxFillPipeline', none of FluxKontextPipeline, Flux2Klein"),
        "cut": (root / "cut", "model_index.json: no JSON"),
        "strange": (root / "strange", "policy.json: model: 'mine' (accepted: a folder with"),
        "language": (root / "language", "no editor in it"),
        "bare": (root / "bare", "without policy.json, which says what it lies over"),
        "peft": (root / "peft", "adapter_config.json without editr2.yaml"),
        "early": (root / "early", "a run without best/ or policy/ yet"),
        "moved": (root / "moved", "editr2.yaml: policy.weights: /gone is not there"),
        "typo": (root / "typo", "config.yaml:2: policy.guidance: 'much'"),
        "checkpoints": (run / "checkpoints", "a checkpoint, which has only what trains"),
        "checkpoint": (next((run / "checkpoints").iterdir()), "a checkpoint, which has only"),
    }


def test_what_is_none_is_one_line(trained, exports, tmp_path, capsys):
    for name, (given, said) in _junk(tmp_path, trained, exports).items():
        assert main(["eval", "--policy", str(given)]) == 2, name
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (name, error)


@pytest.mark.parametrize("given", ["runs", "runs/mnie"])
def test_the_run_that_was_meant_is_named(given, tmp_path, monkeypatch, capsys):
    """Two names with a slash between might be of the hub, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("editr2.run.hub.offline", lambda: "there is no network")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert main(["eval", "--policy", given]) == 2
    assert "; did you mean runs/mine?)" in capsys.readouterr().err


def test_adapters_of_an_export_are_strict_and_not_for_training(exports, base, tmp_path):
    folder = exports / "unified-lora"
    config = PolicyConfig(weights=str(folder))
    said = loaded_weights(config)["weights"]
    assert " over " in said and said.endswith(
        loaded_weights(PolicyConfig(weights=str(base / "unified")))["weights"]
    )
    with pytest.raises(
        ConfigError, match="accepted where policies train: the policy/ of their run"
    ):
        load_policy(config)
    for file in folder.iterdir():
        if file.suffix != ".png":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{gone}: missing"):
        load_policy(PolicyConfig(weights=str(tmp_path)), trains=False)


def test_eval_and_rollout_take_it(trained, tmp_path, capsys):
    few = ["--eval.sessions=1", "--eval.turns=2", "--policy.intent=false"]
    run = trained["unified"].folder
    assert main(["eval", "--policy", str(run), *few, "--out", str(tmp_path / "scored")]) == 0
    told = capsys.readouterr()
    assert (
        told.err.startswith(f"note: --policy: {run}: policy/ of the run") and "reward" in told.out
    )
    out = tmp_path / "out"
    assert main(["rollout", f"--policy={run / 'policy'}", *few, "--out", str(out)]) == 0
    assert len(list((out / "images").iterdir())) == 2 and "note: " in capsys.readouterr().err
