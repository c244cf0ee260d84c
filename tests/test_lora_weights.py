"""`policy.lora_weights`: what diffusers, peft and Edit-R2's release write is the start, at its own
strength, and what is mixed up is named."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from editr2.check.editors import open_editor
from editr2.config import PolicyConfig
from editr2.errors import UserError
from editr2.export.export import probe
from editr2.policies.adapters import LORA_FILE
from editr2.policies.configured import policy_class
from editr2.policies.load import load_policy
from editr2.policies.lora_files import lora_file
from editr2.policies.unified.experts import load_adapters
from editr2.policies.unified.published import read_published
from editr2.policies.weights import trainable
from editr2.run.identity import loaded_weights

RANK = 2
GEN = [f"self_attn.{n}_proj_moe_gen" for n in "qkvo"]
"""Of Edit-R2's release, the attention's."""


@pytest.fixture(scope="module")
def bases(beside, tmp_path_factory) -> dict[str, Any]:
    """Policies without adapters; tests take copies."""
    root = tmp_path_factory.mktemp("base")
    beside("tiny_editors").kontext_pipeline().save_pretrained(root / "kontext")
    beside("tiny_bagel").write(root / "bagel")
    own = {"kontext": {"text_tokens": 24, "compile": "off"}, "bagel": {}}
    made = {
        model: load_policy(PolicyConfig(model, str(root / model), resolution=(32, 32), **given))
        for model, given in own.items()
    }
    for policy in made.values():
        policy.learns = set(trainable(policy.module))  # until `probe` is there
    return made


def by_pipeline(policy: Any, folder: Path, **metadata: Any) -> None:
    layers = get_peft_model_state_dict(policy.module)
    policy.pipe.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)


def with_metadata(policy: Any, folder: Path) -> None:
    settings = policy.module.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    by_pipeline(policy, folder, transformer_lora_adapter_metadata=settings)


def with_alphas(policy: Any, folder: Path) -> None:
    by_pipeline(policy, folder)
    file = folder / LORA_FILE
    weights = load_file(file)
    for key in [key for key in weights if ".lora_A." in key]:
        weights[key.replace("lora_A.weight", "alpha")] = torch.tensor(6.0)
    save_file(weights, file)


def by_transformer(policy: Any, folder: Path) -> None:
    policy.module.save_lora_adapter(folder)


def by_peft(policy: Any, folder: Path) -> None:
    policy.wrapped.save_pretrained(folder)


def released(policy: Any, folder: Path) -> None:
    """As `save_fsdp_checkpoint` of the release leaves it: the whole state, in bfloat16."""
    folder.mkdir()
    state = {n: t.to(torch.bfloat16).contiguous() for n, t in policy.wrapped.state_dict().items()}
    save_file(state, folder / "model.safetensors")


Writer = Callable[[Any, Path], None]
WRITERS: dict[str, tuple[str, Writer, dict[str, Any], dict[str, Any]]] = {
    # what is trained, by whom it is written, its adapters' settings, and what of ours is needed
    "pipeline": ("kontext", with_metadata, {"lora_alpha": 6}, {}),
    "pipeline, no settings": ("kontext", by_pipeline, {"lora_alpha": RANK}, {}),
    "pipeline, alphas": ("kontext", with_alphas, {"lora_alpha": 6}, {}),
    "transformer": ("kontext", by_transformer, {"lora_alpha": 5}, {}),
    "peft": (
        "kontext",
        by_peft,
        {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"to_k": 3}},
        {},
    ),
    "peft on BAGEL": ("bagel", by_peft, {"lora_alpha": 6}, {}),
    "peft on its language model": ("bagel", by_peft, {"lora_alpha": 6, "part": 1}, {}),
    "Edit-R2's release": ("bagel", released, {"lora_alpha": 6, "part": 1}, {"lora_alpha": 6.0}),
}
BOTH = "peft on both experts"
"""What is mixed up only."""
TARGETS = {"kontext": ["to_q", "to_k", "to_v"], "bagel": GEN}


def stirred(base: Any, *, part: int = 0, **settings: Any) -> Any:
    """A policy under adapters of peft's own making, none of them at zero. part: peft wraps the
    language model alone."""
    policy = copy.copy(base)
    policy.module = module = copy.deepcopy(base.module).requires_grad_(False)
    settings = {"target_modules": TARGETS[base.config.model], **settings}
    lora = LoraConfig(r=RANK, **settings)
    policy.wrapped = get_peft_model(module.language_model if part else module, lora)
    noise = torch.Generator().manual_seed(3)
    for name, p in module.named_parameters():
        if ".lora_" in name:  # numbers that bfloat16 keeps
            p.data = (torch.randn(p.shape, generator=noise) * 0.2).bfloat16().float()
    return policy


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory) -> Callable[[str], tuple[Path, PolicyConfig, Any]]:
    """By a kind of `WRITERS`: its folder, the settings that start from it, and answers of what
    wrote it."""

    @functools.cache
    def made(kind: str) -> tuple[Path, PolicyConfig, Any]:
        other = ("bagel", by_peft, {"target_modules": ["q_proj", "q_proj_moe_gen"]}, {})
        model, write, settings, needs = WRITERS.get(kind, other)
        policy = stirred(bases[model], **settings)
        folder = tmp_path_factory.mktemp("lora") / "lora"
        write(policy, folder)
        return folder, replace(policy.config, lora_weights=str(folder), **needs), probe(policy)

    return made


def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


HOW = {
    # how it is loaded, and how far that may be: one rounding of B, or of a merged weight
    "trains": ({"lora_rank": RANK}, True, 1e-5),
    "beside": ({}, False, 2e-6),
    "merged": ({}, True, 1e-4),
}
QUICK = {
    *(("pipeline", "trains"), ("pipeline, no settings", "trains"), ("pipeline, alphas", "beside")),
    *(("transformer", "trains"), ("peft", "beside"), ("peft on BAGEL", "merged")),
    *(("peft on its language model", "beside"), ("Edit-R2's release", "trains")),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(*both, marks=[] if both in QUICK else pytest.mark.exhaustive)
        for both in itertools.product(WRITERS, HOW)
    ],
)
def test_what_others_write_is_the_start(kind, how, written, bases):
    _, config, expected = written(kind)
    settings, trains, most = HOW[how]
    policy = load_policy(replace(config, **settings), trains=trains)
    learns = trainable(policy.module)
    adapters = {n: p for n, p in policy.module.named_parameters() if ".lora_" in n}
    assert (
        set(learns)
        == {
            "trains": set(adapters),
            "beside": set(),
            "merged": bases[config.model].learns,
        }[how]
    )
    if how == "trains":  # what the file leaves alone trains, too
        zero = [name for name, p in adapters.items() if ".lora_B." in name and not p.any()]
        assert 0 < len(zero) < len(adapters) // 2
    assert far(probe(policy), expected) < most < far(expected, probe(bases[config.model]))


def test_check_and_a_runs_identity_know_it(written, tmp_path):
    folder, config, _ = written("pipeline")
    config = replace(config, lora_rank=RANK)
    open_editor(config)
    depends = loaded_weights(config)
    file = Path(shutil.copy(folder / LORA_FILE, tmp_path / "moved.safetensors"))
    moved = replace(config, lora_weights=str(file))
    assert loaded_weights(moved) == depends != loaded_weights(replace(config, lora_weights=None))
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, file)
    assert loaded_weights(moved) != depends
    with pytest.raises(UserError, match=r"policy.lora_targets: .* which adapts .*to_\w: an"):
        open_editor(replace(config, lora_targets=r".*proj_mlp"))
    with pytest.raises(UserError, match="no linear layer of this model is called"):
        open_editor(replace(config, lora_weights=str(written("peft on BAGEL")[0])))
    with pytest.raises(UserError, match="no linear layer of this model is called"):
        open_editor(replace(written("peft on BAGEL")[1], lora_weights=str(folder), lora_rank=RANK))


Change = Callable[[dict[str, torch.Tensor]], None]


def moved(weights: dict[str, torch.Tensor], part: str, to: str) -> None:
    for key in [key for key in weights if part in key]:
        weights[key.replace(part, to)] = weights.pop(key)


def first(weights: dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in sorted(weights) if part in key)


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(weights: dict[str, torch.Tensor]) -> None:
        key = first(weights, part)
        weights[key] = change(weights[key]).contiguous()

    return apply


RELEASE, PEFT = "Edit-R2's release", "peft on BAGEL"
MIXED: dict[str, tuple[str, Change, dict[str, Any], str]] = {
    "another layer": (
        PEFT,
        lambda w: moved(w, "layers.1.self_attn.q_proj_moe_gen", "layers.7.self_attn.q_proj"),
        {},
        r"layers\.7\..*lora_A.weight: no linear layer of this model",
    ),
    "another width": (
        PEFT,
        changed("lora_A", lambda t: t[:, 1:]),
        {},
        r"lora_A.weight: \[2, 31\] \(accepted: \[2, 32\]",
    ),
    "another rank": (
        PEFT,
        changed("q_proj_moe_gen.lora_B", lambda t: t[:, :1]),
        {},
        r"lora_B.weight: \[\d+, 1\] \(accepted: a matrix of rank 2",
    ),
    "half a layer": (
        PEFT,
        lambda w: w.pop(first(w, "lora_B")),
        {},
        r"lora_A.weight: without its lora_B",
    ),
    "NaN": (PEFT, changed("lora_A", lambda t: t * torch.nan), {}, "lora_A.weight: NaN"),
    "kohya's names": (
        PEFT,
        lambda w: (moved(w, "lora_A", "lora_down"), moved(w, "lora_B", "lora_up")),
        {},
        r"lora_down.weight: no part of a LoRA \(accepted: LAYER.lora_A.weight",
    ),
    "a bias": (
        PEFT,
        lambda w: w.update({first(w, "lora_B").replace("weight", "bias"): torch.zeros(3)}),
        {},
        r"lora_B.bias: no part of a LoRA",
    ),
    "two alphas": (
        PEFT,
        lambda w: w.update({first(w, "lora_A").replace("lora_A.weight", "alpha"): torch.ones(1)}),
        {},
        r"\.alpha: beside settings that say alpha, too \(accepted: one of both",
    ),
    "rank of the run": (PEFT, lambda w: None, {"lora_rank": 4}, r"policy.lora_rank: 4 .*: 2, its"),
    "targets": (
        PEFT,
        lambda w: None,
        {"lora_targets": r".*\.q_proj_moe_gen"},
        r"policy.lora_targets: .* which adapts .*k_proj_moe_gen: an expression that matches it",
    ),
    "one expert": (
        BOTH,
        lambda w: None,
        {"experts": "gen"},
        r"policy.experts: gen .* which adapts .*q_proj: all\)",
    ),
    "no alpha": (
        RELEASE,
        lambda w: None,
        {"lora_alpha": None},
        r"policy.lora_alpha: none .*of rank 2\)",
    ),
    "another base": (
        RELEASE,
        changed("mlp.up_proj.weight", lambda t: t + 1),
        {},
        r"mlp.up_proj.weight: other numbers than policy.weights has there",
    ),
    "a base of another size": (
        RELEASE,
        changed("embed_tokens", lambda t: t[1:]),
        {},
        r"embed_tokens.weight: \[\d+, 32\] \(accepted: \[\d+, 32\]",
    ),
    "another part": (
        RELEASE,
        lambda w: w.update({"base_model.model.vit_model.x": torch.zeros(2)}),
        {},
        r"vit_model.x: neither part of a LoRA nor a weight of this model",
    ),
    "outside": (
        RELEASE,
        lambda w: w.update({"connector.fc1.bias": torch.zeros(2)}),
        {},
        r"connector.fc1.bias: outside of base_model.model.",
    ),
    "no adapters": (
        RELEASE,
        lambda w: [w.pop(key) for key in list(w) if "lora_" in key],
        {},
        r"no part of a LoRA",
    ),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_what_is_mixed_up_is_named(mixed, written, bases, tmp_path):
    kind, change, settings, message = MIXED[mixed]
    folder, config, _ = written(kind)
    shutil.copytree(folder, tmp_path / "lora")
    file = lora_file(str(tmp_path / "lora"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    asked = {"lora_rank": RANK, "lora_weights": str(tmp_path / "lora"), **settings}
    with pytest.raises(UserError, match=message):
        load_adapters(copy.deepcopy(bases["bagel"].module), replace(config, **asked))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"r": 3}, r"adapter_config.json: r: 3 \(accepted: 2, that of the tensors"),
        ({"lora_alpha": "6"}, r"adapter_config.json: lora_alpha: '6' \(accepted: a number above 0"),
        ({"alpha_pattern": {"q_proj_moe_gen": 0}}, r"lora_alpha: 0 \(accepted"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights: 'pissa_niter_4' \(accepted"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: \[1\] \(accepted: None;"),
    ],
)
def test_settings_beside_it_are_read_strictly(said, message, written, bases, tmp_path):
    folder, config, _ = written(PEFT)
    shutil.copytree(folder, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(UserError, match=message):
        load_adapters(bases["bagel"].module, replace(config, lora_weights=str(file.parent)))


def test_it_is_one_file_over_weights_that_are_no_lora(written, bases, tmp_path):
    folder, config, _ = written("pipeline")
    for name in (LORA_FILE, "model.safetensors"):
        shutil.copy(folder / LORA_FILE, tmp_path / name)
    places = {str(tmp_path / "none"): "not there", str(tmp_path): f"has {LORA_FILE} and model.saf"}
    for place, message in places.items():
        with pytest.raises(UserError, match=f"policy.lora_weights: .*: {message}"):
            load_adapters(bases["kontext"].module, replace(config, lora_weights=place))
    policy = load_policy(replace(config, lora_rank=RANK))
    policy.save(tmp_path / "saved")
    again = replace(config, weights=str(tmp_path / "saved"))
    with pytest.raises(UserError, match="policy.lora_weights: .*, which is a LoRA: none"):
        load_policy(again)
    there = policy_class("kontext").settings_for(policy.config, tmp_path / "saved")
    assert far(probe(load_policy(there)), probe(policy)) < 1e-5


def test_bagels_lora_goes_on_its_own_module_and_is_a_start(written, bases, tmp_path):
    """Names in its own code are ours, beside which a vision transformer has layers of names that
    end alike; the file's numbers are found again to the last bit."""
    _, config, _ = written("peft on BAGEL")
    config = replace(config, lora_rank=RANK, lora_alpha=2.0 * RANK)
    policy, base = load_policy(config), copy.copy(bases["bagel"])
    form = policy_class("bagel").form(config, "lora")
    (tmp_path / "out").mkdir()
    form.write(policy, tmp_path / "out")
    own = read_published(Path(config.weights))
    whole = torch.nn.Module()
    for part in (copy.deepcopy(base.module), own.sight(torch.float32)):
        for name, child in part.named_children():
            whole.add_module(name, child)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put = dict(PeftModel.from_pretrained(whole, tmp_path / "out").base_model.named_parameters())
    adapters = {n: p for n, p in policy.module.named_parameters() if ".lora_" in n}
    assert {n.removeprefix("model.") for n in put if ".lora_" in n} == set(adapters)
    assert all(torch.equal(put[f"model.{name}"], p) for name, p in adapters.items())
    base.module = copy.deepcopy(base.module)
    start = replace(config, lora_weights=str(tmp_path / "out"))
    answers = [probe(each) for each in (policy, form.load(base, tmp_path / "out"))]
    answers.append(probe(load_policy(start)))  # of strength 2, where the file has 1
    assert far(answers[0], answers[1]) == far(answers[0], answers[2]) == 0
    assert far(answers[0], probe(bases["bagel"])) > 1e-2
