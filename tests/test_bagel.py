"""BAGEL's published folder at tiny size: read strictly, walked and packed alike, trained and
written back. (scripts/check_bagel.py compares with what its own inferencer gives.)"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import full_layer
from editr2.check.devices import find_device
from editr2.check.editors import open_editor
from editr2.check.estimate import plan
from editr2.config import Config, PolicyConfig, RolloutConfig, preset_config, replace_nested
from editr2.config.fields import leaves
from editr2.config.yaml import check_keys, dump_yaml, load_yaml, to_dataclass
from editr2.errors import UserError
from editr2.export.export import export
from editr2.policies.base import Questions, TurnTask
from editr2.policies.blocks import may_run_plainly
from editr2.policies.fp8 import Float8Linear
from editr2.policies.load import load_policy
from editr2.policies.recorded import read_settings
from editr2.policies.rules import policy_problems
from editr2.policies.unified.bagel import PAINTING, BagelPolicy
from editr2.policies.unified.codecs import autoencoder_of
from editr2.policies.unified.model import Layer
from editr2.policies.unified.published import new_sight, read_published
from editr2.policies.unified.sight import LATENT_RULE, SIGHT_RULE, SizeRule
from editr2.rl.loop import train
from editr2.rl.sampler import rollout_sampler
from editr2.run.identity import loaded_weights
from editr2.run.tracking import read_metrics

SMALL = (32, 48)
THINKS = {"thinking": True, "thinking_tokens": 4}
GUIDED = {"guidance": 4.0, "guidance_image": 2.0, "renorm": "text_channel"}
BRANCHES = ("v_uncond", "v_uncond_image")
GEN = {"experts": "gen", "intent": False}


@pytest.fixture(scope="module")
def tiny(beside):
    return beside("tiny_bagel")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("base") / "bagel")


def loaded(folder, **policy) -> BagelPolicy:
    settings = {"model": "bagel", "weights": str(folder), "resolution": SMALL, **policy}
    return load_policy(PolicyConfig(**settings))


@pytest.fixture(scope="module")
def policy(folder):
    return loaded(folder)


def test_the_autoencoder_is_the_one_that_diffusers_makes_of_the_file(folder, tiny):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    theirs = tiny.autoencoder()
    file = {f"vae.{name}": t for name, t in load_file(folder / "ae.safetensors").items()}
    by_diffusers = convert_ldm_vae_checkpoint(file, dict(theirs.config))
    ours = autoencoder_of(folder / "ae.safetensors").state_dict()
    assert set(ours) == set(by_diffusers) == set(theirs.state_dict())
    assert all(torch.equal(t.reshape(ours[n].shape), ours[n]) for n, t in by_diffusers.items())


def test_latents_are_the_scaled_mean_in_patches_of_row_column_channel(policy, tiny):
    picture = tiny.pictures(1, SMALL)
    vae = tiny.autoencoder()
    pixels = torch.from_numpy(picture[0]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean[0]
    expected = (mean - 0.1159) * 0.3611
    found = policy.images.read(picture, torch.device("cpu"))[0]
    for row, column in ((0, 0), (1, 2)):
        token = [
            expected[c, 2 * row + p, 2 * column + q]
            for p in range(2)
            for q in range(2)
            for c in range(4)
        ]
        torch.testing.assert_close(found[3 * row + column], torch.stack(token), rtol=0, atol=1e-6)
    image = policy.images.paint(found[None], policy.grid)
    with torch.no_grad():
        again = vae.decode(mean[None]).sample[0].permute(1, 2, 0)
    # The scale was undone in float32, and the decoder enlarges its rounding.
    torch.testing.assert_close(image[0], again, rtol=0, atol=1e-4)


def test_what_is_seen_is_siglips_last_states_through_the_connector(tiny):
    """On a square that fills the position table transformers' own forward is the same."""
    rule = SizeRule(56, 28, 14)
    sight = new_sight({**tiny.VIT, "image_size": 56}, 32, rule).to_empty(device="cpu")
    for p in sight.parameters():
        p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    image = tiny.pictures(1, (56, 56))
    pixels = (torch.from_numpy(image).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        x = sight.vit_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + sight.vit_model.embeddings.position_embedding.weight
        states = sight.vit_model.post_layernorm(
            sight.vit_model.encoder(inputs_embeds=x).last_hidden_state
        )
        fc1, fc2 = sight.connector["fc1"], sight.connector["fc2"]
        expected = fc2(torch.nn.functional.gelu(fc1(states), approximate="tanh"))
        expected = expected + sight.vit_pos_embed["pos_embed"]
    found = sight(image, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    small = sight(tiny.pictures(1, (28, 42)), torch.device("cpu"))  # 2 rows, 3 columns of 4 x 4
    assert small.shape == (1, 6, 32)
    assert not torch.allclose(small, sight(tiny.pictures(1, (42, 28)), torch.device("cpu")))


@pytest.mark.parametrize(
    "size, latent, seen",
    [
        ((512, 512), (512, 512), (518, 518)),
        ((90, 131), (512, 752), (518, 756)),  # the smallest side wins
        ((570, 3478), (160, 1024), (154, 980)),  # beyond the cap, and then beyond the largest
        ((70, 2228), (32, 1024), (28, 980)),
        ((3000, 2000), (1024, 688), (980, 658)),
    ],
)
def test_images_are_brought_to_published_sizes(size, latent, seen):
    assert LATENT_RULE(*size) == latent
    assert SIGHT_RULE(*latent) == seen


def broken(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def without(file, key):
    def change(copy):
        tensors = load_file(copy / file)
        save_file({n: t for n, t in tensors.items() if n != key}, copy / file)

    return change


def renamed(file, key, new):
    def change(copy):
        tensors = load_file(copy / file)
        tensors[new] = tensors.pop(key)
        save_file(tensors, copy / file)

    return change


def said(file, **values):
    def change(copy):
        told = json.loads((copy / file).read_text()) | values
        (copy / file).write_text(json.dumps(told))

    return change


VIT = "vit_model.vision_model.encoder.layers.1.mlp.fc2.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (without("ema.safetensors", "llm2vae.bias"), "llm2vae.bias: missing"),
        (without("ema.safetensors", VIT), f"{VIT}: missing"),
        (renamed("ema.safetensors", "llm2vae.bias", "llm2vae.bios"), "llm2vae.bios: unknown"),
        (without("ae.safetensors", "decoder.norm_out.bias"), "decoder.norm_out.bias: missing"),
        (
            renamed("ae.safetensors", "encoder.mid.attn_1.q.bias", "encoder.mid.attn_1.x.bias"),
            "encoder.mid.attn_1.x.bias: unknown",
        ),
        (said("llm_config.json", num_hidden_layers=3), "layers.2"),
        (said("llm_config.json", rope_theta="1e6"), "rope_theta: '1e6'"),
        (said("llm_config.json", num_attention_heads=3), "num_attention_heads: 3"),
        (said("vit_config.json", hidden_size=20), "connector.fc1.weight: [32, 16]"),
        (said("vit_config.json", num_hidden_layers=1), "num_hidden_layers: 1"),
        (lambda copy: (copy / "vit_config.json").unlink(), "no vit_config.json"),
        (lambda copy: (copy / "tokenizer.json").write_text("{"), "tokenizer.json: no tokenizer"),
    ],
)
def test_a_folder_is_read_strictly(folder, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        read_published(broken(folder, tmp_path, change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_convolutions_kernel_is_the_same_patches(folder, tmp_path, policy):
    name = "vit_model.vision_model.embeddings.patch_embedding.weight"

    def change(copy):
        tensors = load_file(copy / "ema.safetensors")
        kernel = tensors[name].view(-1, 14, 14, 3).permute(0, 3, 1, 2)
        save_file({**tensors, name: kernel.contiguous()}, copy / "ema.safetensors")

    sight = read_published(broken(folder, tmp_path, change)).sight(torch.float32)
    kernel = "vit_model.embeddings.patch_embedding.weight"
    assert torch.equal(sight.state_dict()[kernel], policy.sight.state_dict()[kernel])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resolution": (40, 32)}, "policy.resolution: [40, 32]"),
        ({"resolution": (32, 1040)}, "each up to 1024"),
        ({"buckets": ((32, 32), (32, 1040))}, "policy.buckets: [32, 1040]"),
        ({"guidance_interval": (0.5, 0.5)}, "policy.guidance_interval: [0.5, 0.5]"),
        ({"history": 2}, "policy.history: 2"),
        ({"quantize": "4bit", "lora_rank": 2}, "policy.quantize: 4bit"),
        ({"quantize": "fp8"}, "policy.quantize: fp8 (accepted with policy.lora_rank 0: none"),
        ({"gradient_checkpointing": 3}, "policy.gradient_checkpointing: 3"),
        ({"experts": "gen"}, "policy.experts: gen (accepted with policy.intent true: all"),
        ({**GEN, "lora_targets": ".*q_proj", "lora_rank": 2}, "policy.lora_targets: '.*q_proj'"),
        ({"weights": "nowhere"}, "policy.weights: nowhere: no folder"),
        ({"weights": "ByteDance-Seed/BAGEL-7B-MoT"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_settings_that_it_cannot_follow_are_named(folder, settings, message):
    config = PolicyConfig(**{"model": "bagel", "weights": str(folder), **settings})
    with pytest.raises(UserError, match="^policy") as error:
        for problem in policy_problems(config):
            raise UserError(problem)
        load_policy(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given, active, image, renorm",
    [
        ({}, False, 1.0, "none"),
        ({"guidance_image": 2.0, "renorm": "channel"}, False, 1.0, "none"),
        ({"guidance": 4.0, "guidance_image": 0.5, "renorm": "global"}, True, 1.0, "global"),
        (GUIDED, True, 2.0, "text_channel"),
    ],
)
def test_images_are_guided_only_where_text_is(folder, given, active, image, renorm):
    guidance = loaded(folder, **given, guidance_interval=(0.4, 1.0)).guidance
    assert (guidance.active, guidance.image, guidance.renorm) == (active, image, renorm)
    assert guidance.interval == (0.4, 1.0)


def test_released_pixels_are_cut_off(folder, policy, tiny):
    latents = policy.images.read(tiny.pictures(2, SMALL), torch.device("cpu"))
    exact = (policy.images.paint(latents, policy.grid) * 0.5 + 0.5).clamp(0, 1) * 255
    cut = loaded(folder, rounding="released").decode(latents)
    assert (cut == exact.floor().numpy()).all()
    ours = policy.decode(latents)
    assert (ours == exact.round().numpy()).all() and (ours != cut).any()


def test_a_thought_is_in_the_full_context_alone(folder, tiny):
    policy = loaded(folder, **GUIDED)
    context = policy.append(policy.begin(1, PAINTING), tiny.pictures(1, SMALL))
    context = policy.instruct(context, ["make it red"])
    thoughts = policy.think(context, max_tokens=5)
    after = policy.consider(context, thoughts)
    lengths = [b.valid.shape[1] for b in context.branches]
    said = len(policy.codec.encode(thoughts[0], marks=True)) + 2
    assert [b.valid.shape[1] for b in after.branches] == [lengths[0] + said, *lengths[1:]]
    image = policy.latent_shape[0] + 2 + policy.seen_tokens + 2
    system, words = (len(policy.text_ids(text)) for text in (PAINTING, "make it red"))
    assert lengths == [system + image + words, system + image, system + words]


def test_every_size_is_a_view_with_numbers_of_its_own(folder, tiny):
    both = loaded(folder, buckets=((32, 48), (48, 32)))
    alone = loaded(folder, resolution=(48, 32))
    view = both.at((48, 32))
    assert view.latent_shape == (6, 16) and view.grid == (3, 2) and both.grid == (2, 3)
    pictures = tiny.pictures(1, (48, 32))
    x, sigma = torch.randn(1, 6, 16), torch.tensor([0.5])
    found, expected = (p.velocity(x, sigma, p.encode(pictures)).v for p in (view, alone))
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match="accepted: "):
        both.at((64, 64))


ASKED = Questions([[], ["red"]], ["blue", "green"], ["cm", "cu"])
ANSWERS = [(5, 6, 7), (8,)]


def answered(folder, tiny, **policy):
    """Velocities with both branches, text scores, and gradients by name, of equal adapters."""
    torch.manual_seed(0)
    made = loaded(folder, **GUIDED, **policy)
    for name, p in made.module.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(p.numel()))
    context = made.encode(tiny.pictures(2, SMALL))
    text = made.answer_log_prob(context, ASKED, ANSWERS, temperature=0.7).log_prob
    x = torch.randn(2, *made.latent_shape, generator=torch.Generator().manual_seed(1))
    context = made.instruct(context, ["make it red", "no"])
    v = made.velocity(x, torch.tensor([0.5, 0.9]), context)
    found = [v.v, v.guidance["v_uncond"], v.guidance["v_uncond_image"], text]
    sum(t.float().square().sum() for t in found).backward()
    gradients = {n: p.grad for n, p in made.module.named_parameters() if p.grad is not None}
    return made, [t.detach().float() for t in found], gradients


@pytest.fixture(scope="module")
def plain(folder, tiny):
    return answered(folder, tiny, lora_rank=2)


@pytest.mark.parametrize("again, runs", [("all", [2, 2]), (1, [2, 1])])
def test_layers_that_are_computed_again_give_the_same(
    folder, tiny, plain, again, runs, monkeypatch
):
    """runs: how often each layer's forward runs for one with gradient."""
    forwards: dict[int, int] = {}
    before = Layer.before

    def counted(layer, *given):
        forwards[id(layer)] = forwards.get(id(layer), 0) + torch.is_grad_enabled()
        return before(layer, *given)

    monkeypatch.setattr(Layer, "before", counted)
    made, found, gradients = answered(folder, tiny, lora_rank=2, gradient_checkpointing=again)
    assert all(map(torch.equal, found, plain[1])) and gradients.keys() == plain[2].keys()
    assert all(torch.equal(gradients[n], plain[2][n]) for n in gradients)
    count = [forwards[id(layer)] for layer in made.module.language_model.model.layers]
    # An image in two blocks, a question, words with and without images, three velocities.
    assert count == [8 * n for n in runs]


def test_frozen_layers_in_float8_are_those_of_the_blocks(folder, tiny):
    settings = {"lora_rank": 2, "dtype": "bfloat16"}
    base, whole, _ = answered(folder, tiny, **settings)
    made, found, gradients = answered(folder, tiny, **settings, quantize="fp8")
    adapted = {n.split(".lora_")[0] for n in gradients}
    float8 = {n for n, m in made.module.named_modules() if isinstance(m, Float8Linear)}
    assert float8 == {f"{name}.base_layer" for name in adapted} and len(float8) == 2 * 14
    assert all(
        p.grad.dtype == torch.float32 for p in made.module.parameters() if p.grad is not None
    )
    for ours, theirs in zip(found, whole, strict=True):
        assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.2
    saved, expected = dict(made._weights()), dict(base._weights())
    assert all(torch.equal(saved[name], expected[name]) for name in expected)  # of the base's file


def test_parts_are_lent_only_where_they_are_offloaded(folder, tiny, plain, monkeypatch):
    """On a CPU nothing moves, so what would is looked at."""
    lent = []

    def at_work(parts, device, *, lent: bool, seen=lent):
        seen += [(type(part).__name__, lent) for part in parts]
        return nullcontext()

    for module in ("codecs", "sight"):
        monkeypatch.setattr(f"editr2.policies.unified.{module}.at_work", at_work)
    for offload in (False, True):
        policy = loaded(folder, offload=offload)
        policy.decode(policy._looked_at(tiny.pictures(1, SMALL))[0])
        assert lent == [(part, offload) for part in ("AutoencoderKL", "Sight", "AutoencoderKL")]
        lent.clear()


def test_what_depends_on_the_block_alone_is_compiled(folder, tiny, plain, monkeypatch):
    """Without a compiler: in its place what it would be given, which is plain here."""
    given = []

    def compiled(function, **how):
        def run(*args):
            shapes = [t.shape[2] for t in args[1:] if isinstance(t, torch.Tensor)]
            given.append((function.__name__, how["dynamic"], *shapes[:1]))
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    made, found, gradients = answered(folder, tiny, lora_rank=2, compile="on")
    assert all(map(torch.equal, found, plain[1]))
    assert all(torch.equal(gradients[n], plain[2][n]) for n in plain[2])
    # Of blocks alone, with marks: an image's latents, what is seen of it, words, a question.
    words = max(len(made.text_ids(text)) for text in ("make it red", "no"))
    asked = made._asked(ASKED, ANSWERS)[0].shape[1]
    lengths = {made.latent_shape[0] + 2, made.seen_tokens + 2, words, asked}
    for name in ("before", "behind"):
        assert {n for part, dynamic, n in given if part == name and dynamic} == lengths

    def broken(function, **how):
        def run(*args):
            raise torch._dynamo.exc.Unsupported("no compiler\nhere")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    policy = loaded(folder, compile="on")
    with pytest.raises(UserError, match="^policy.compile: on .*no compiler here.*$"):
        policy.encode(tiny.pictures(1, SMALL))
    for layer in policy.module.language_model.model.layers:  # as those that are shared out
        layer.__class__ = type("FSDPLayer", (Layer,), {})
    may_run_plainly(policy.module)
    with pytest.warns(UserWarning, match="^policy.compile: auto: .* plainly"):
        policy.encode(tiny.pictures(1, SMALL))
    assert not any("before" in vars(m) for m in policy.module.modules())


@pytest.mark.parametrize(
    "settings, trained",
    [
        ({"lora_rank": 2}, {"self_attn": 8, "mlp": 3, "mlp_moe_gen": 3}),
        ({"lora_rank": 2, **GEN}, {"self_attn": 4, "mlp_moe_gen": 3}),
        ({**GEN, "dtype": "bfloat16"}, None),
    ],
    ids=["both", "gen", "gen whole"],
)
def test_experts_say_what_trains(folder, settings, trained):
    module = loaded(folder, **settings).module
    found = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    if trained is not None:
        layer = "language_model.model.layers.0."
        first = [n for n in found if n.startswith(layer) and ".lora_A." in n]
        assert Counter(n.removeprefix(layer).split(".")[0] for n in first) == trained
        assert len(first) * 4 == len(found)
        return
    paints = {"time_embedder", "vae2llm", "llm2vae"}
    for name, p in module.named_parameters():
        own = "_moe_gen" in name or name.split(".")[0] in paints
        assert (name in found) == own
        paints_with = own or name.startswith("latent_pos_embed")  # a table, which never trains
        assert p.dtype == (torch.float32 if paints_with else torch.bfloat16), name


@pytest.mark.parametrize("context_gradient", [False, True])
def test_a_packed_session_is_the_walk(folder, tiny, context_gradient):
    """Values and gradients, of all branches of guidance, with what the vision transformer sees."""
    policy = loaded(folder, **GUIDED)
    images = tiny.pictures(2, SMALL)
    sigma = torch.tensor([[0.9, 0.4], [0.7, 0.2]])
    tasks, walked, context = [], [], None
    for turn in range(2):
        x = torch.randn(2, 2, *policy.latent_shape)
        asked = Questions([["red"] * turn] * 2, ["blue", "green"], ["cm", "cu"])
        answers = [(5, 6, 7), (8,)]
        tasks.append(TurnTask(["darker", "a cat"], images[::-1].copy(), x, sigma, asked, answers))
        with torch.set_grad_enabled(context_gradient):
            before = policy.append(context, images) if context else policy.encode(images)
            context = policy.instruct(before, ["darker", "a cat"])
        walked.append(policy.answer_log_prob(before, asked, answers, temperature=0.7).log_prob)
        v = [policy.velocity(x[:, q], sigma[:, q], context) for q in range(2)]
        for branch in (lambda p: p.v, *(lambda p, n=n: p.guidance[n] for n in BRANCHES)):
            walked.append(torch.stack([branch(p) for p in v], 1).flatten(0, 1))
        images = images[::-1].copy()
    found = policy.replay_packed(
        tiny.pictures(2, SMALL), tasks, context_gradient=context_gradient, temperature=0.7
    )
    packed = []
    for done in found:
        v = done.velocity
        packed += [done.tokens.log_prob, v.v, *(v.guidance[name] for name in BRANCHES)]
    weights = [p for p in policy.module.parameters() if p.requires_grad]
    gradients = []
    for ours in (packed, walked):
        torch.testing.assert_close(ours, walked, rtol=1e-4, atol=1e-5)
        loss = sum(((1 + torch.arange(t.numel()) % 7).view(t.shape) * t).mean() for t in ours)
        gradients.append(torch.autograd.grad(loss, weights))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def configured(folder, tmp_path, tiny, name="run", **changes) -> Config:
    sessions = tiny.sessions(tmp_path / "data", (3, 2))
    values = {
        "out": str(tmp_path / name),
        "data": {"path": str(sessions)},
        "reward": {"function": "editr2.rewards.brightness:Brightness"},
        "policy": {
            **{"model": "bagel", "weights": str(folder), "resolution": [32, 32]},
            **{"intent_tokens": 3, "lora_rank": 2, **GUIDED},
        },
        "rollout": {"sessions": 2, "siblings": 2, "steps": 3, "window": 1},
        "credit": {"preset": "edit-r2", "baseline": "session_turn", "weights": {"brightness": 1.0}},
        "train": {"iterations": 1, "lr": 1e-2},
        "eval": {"sessions": 1, "strips": 0},
    }
    config = replace_nested(Config(), values)
    return replace_nested(config, changes)


def test_an_iteration_has_ratio_one_and_its_export_is_the_published_layout(folder, tmp_path, tiny):
    (tmp_path / "asked.json").write_text(json.dumps({"cm": "{history} / {current}"}))
    asked = {"policy": {"questions": str(tmp_path / "asked.json")}}
    train(configured(folder, tmp_path, tiny, **asked))
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    row = next(row for row in rows if "ratio_error" in row)
    assert row["ratio_error"] < 1e-6 and row["text_ratio_error"] < 1e-4 and row["grad_norm"] > 0
    assert "asked.json" not in (questions := rows[0]["identity"]["depends"]["questions"])
    export(tmp_path / "run", tmp_path / "out", merge=True)  # proven to reload to the last bit
    kept = read_settings(tmp_path / "out" / "editr2.yaml")["policy"]["questions"]
    assert kept == str(tmp_path / "out" / "questions.json")
    now = loaded_weights(PolicyConfig(model="bagel", weights=str(folder), questions=kept))
    assert now["questions"].split()[-1] == questions.split()[-1]  # the digest
    ours, theirs = (load_file(f / "ema.safetensors") for f in (tmp_path / "out", folder))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    changed = {n for n in ours if not torch.equal(ours[n], theirs[n])}
    assert changed and all("_proj" in n and n.startswith("language_model.") for n in changed)
    for file in ("ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


def recipe() -> Config:
    path = Path(__file__).parent.parent / "editr2" / "recipes" / "bagel-edit-r2-8gpu.yaml"
    values, lines = load_yaml(path)
    check_keys(values, lines, Config, path)
    return to_dataclass(values, Config)


def test_the_recipe_is_the_preset_and_what_is_bagels_or_the_machines():
    preset, ours = preset_config("edit-r2-released"), recipe()
    differs = {key for key, _ in leaves(Config) if attrgetter(key)(preset) != attrgetter(key)(ours)}
    assert differs == {
        *("out", "data.path", "data.resize", "reward.name", "credit.weights"),
        *("policy.model", "policy.dtype", "policy.rounding", "policy.gradient_checkpointing"),
        *("rollout.groups_per_batch", "train.iterations", "train.micro_batch"),
        *("train.ratio_tolerance", "train.text_ratio_tolerance"),
        *("eval.sessions", "eval.strips", "eval.every", "checkpoint.every"),
    }


def test_the_recipe_runs_on_other_weights_data_and_sizes(folder, tmp_path, tiny):
    """Stretched to the size, in bfloat16, with intents, guidance and KL, two optimiser steps."""
    changes = {
        "out": str(tmp_path / "run"),
        "data": {"path": str(tiny.sessions(tmp_path / "data", (2, 2), (48, 64)))},
        "policy": {"weights": str(folder), "resolution": SMALL, "intent_tokens": 8},
        "rollout": {"sessions": 2, "siblings": 2},
        "train": {"iterations": 1},
        "eval": {"sessions": 0, "strips": 0, "every": 0},
    }
    train(replace_nested(recipe(), changes))
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (row,) = [row for row in rows if "ratio_error" in row]
    assert row["ratio_error"] < 1e-3 and row["text_ratio_error"] < 5e-2 and row["grad_norm"] > 0
    assert row["intent_tokens"] > 0 and row["kl"] > 0  # behind the first step


@pytest.mark.parametrize(
    "policy",
    [
        {"lora_rank": 2, "branches": "apart"},
        pytest.param({"dtype": "bfloat16", **GEN}, marks=pytest.mark.exhaustive),
        pytest.param({"lora_rank": 2, "branches": "together"}, marks=pytest.mark.exhaustive),
        pytest.param({"lora_rank": 2, "quantize": "fp8", **GEN}, marks=pytest.mark.exhaustive),
    ],
    ids=lambda p: " ".join(map(str, p.values())),
)
def test_check_knows_what_is_held_and_what_trains(folder, tiny, policy):
    config = PolicyConfig(
        model="bagel", weights=str(folder), resolution=SMALL, **{**policy, **GUIDED}
    )
    editor, policy = open_editor(config), load_policy(config)
    sizes, module = editor.sizes(), policy.module
    assert sizes.parameters == sum(p.numel() for p in module.parameters())
    assert sizes.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    beside = [
        sum(p.nbytes for p in part.parameters()) for part in (policy.images.vae, policy.sight)
    ]
    assert sizes.beside == (0, *beside)
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert sizes.weights == sum(p.nbytes for p in frozen)
    blueprint = editor.blueprint
    blueprint.said = len(policy.text_ids("make it red"))
    context, pictures = policy.encode(tiny.pictures(2, SMALL)), tiny.pictures(2, SMALL, seed=1)
    for turn in range(2):
        context = policy.instruct(context, ["make it red"] * 2)
        held = [*context.branches, *([] if policy.apart else [context.joined])]
        kept = sum(t.nbytes for c in held for t in (*c.keys, *c.values))
        assert editor.held(2, turn) == kept
        context = policy.append(context, pictures)
    costs = [editor.cost(step, 2, 1) for step in ("encode", "train", "decode")]
    assert all(sum(cost.flops.values()) > 0 for cost in costs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"intent_tokens": 20}, marks=pytest.mark.exhaustive),
        pytest.param({"gradient_checkpointing": "all"}, marks=pytest.mark.exhaustive),
        pytest.param({"lora_rank": 0, "branches": "together"}, marks=pytest.mark.exhaustive),
        pytest.param({"experts": "gen", "intent": False}, marks=pytest.mark.exhaustive),
    ],
    ids=lambda settings: " ".join(settings) or "adapters",
)
def test_steps_take_what_check_says(folder, settings):
    """At the last turn of a walked session: floating-point operations to the last one, memory but
    for the workspaces of the kernels. By default the two steps that have the others in them."""
    policy = {"model": "bagel", "weights": str(folder), "resolution": SMALL, "lora_rank": 2}
    policy |= {"branches": "apart", "gradient_checkpointing": "off", "intent_tokens": 12}
    config = Config(policy=PolicyConfig(**(policy | GUIDED | settings)))
    only = () if settings else ("encode", "train behind answer")
    held, steps = full_layer.compared(
        config, 2, 2, 2, torch.device("cpu"), find_device("h100"), only
    )
    assert all(said == seen for said, seen in held.values()), held
    for step, (said, seen) in steps.items():
        assert said.flops == seen.flops > 0, step
        assert said.peak == pytest.approx(seen.peak, rel=0.12), step


def test_check_counts_gathers_and_what_is_kept(folder, tiny):
    config = PolicyConfig(
        model="bagel", weights=str(folder), resolution=SMALL, lora_rank=2, intent_tokens=3, **GUIDED
    )
    editor, policy = open_editor(replace(config, branches="apart")), load_policy(config)
    session, passes = full_layer.Session(policy, 2, 2), []
    policy.module.register_forward_hook(lambda *_: passes.append(1))
    asked = {"seeds": torch.tensor([1, 2]), "temperature": 1.0, "max_tokens": 3}
    steps = {"intend": lambda: policy.intend(session.asking, session.questions(), **asked)}
    with torch.no_grad():
        found = {"derive": 2}  # as encode, whose images are kept
        for step, run in (steps | dict(session.steps(3))).items():
            if step in ("train", "answer", "train behind answer"):
                continue
            passes.clear()
            run()
            found[step] = len(passes)
    assert found == {step: editor.passes(step, True) for step in found}
    assert editor.passes("train", True) == 3 and editor.passes("train", False) == 1
    row = policy._kept._weight / len(policy._kept._held)
    most = int(policy._kept.limit // row)
    assert [editor.encodes_again(1, n) for n in (most, most + 1)] == [False, True]
    sampler = rollout_sampler(RolloutConfig(steps=2, window=1, siblings=2), editor.own)
    run = Config(policy=config, rollout=RolloutConfig(sessions=1, siblings=2))
    calls = plan(run, editor, sampler, [2], 1)
    assert [(c.step, c.batch) for c in calls if c.phase == "train"][:2] == [
        ("derive", 1),
        ("instruct", 1),
    ]


def test_check_knows_the_published_weights_without_them():
    config = PolicyConfig(model="bagel", lora_rank=64, dtype="bfloat16")
    sizes = open_editor(config).sizes()
    # 2 experts x 28 layers x 233,058,048; words in and out; norms, time, latents and their places
    frozen = 13_051_250_688 + 1_089_994_752 + 28_919_360
    assert sizes.parameters - sizes.trainable == frozen
    assert sizes.trainable == 322_961_408  # 323 M, as Edit-R2 has it on both experts


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "policy, train, off",
    [
        ({}, {"iterations": 2}, 0),
        ({}, {"iterations": 2, "packed": "on"}, 0),
        (THINKS, {"iterations": 2}, 0),
        (THINKS, {"iterations": 2, "packed": "on"}, 0),
        # AdamW makes of the rounding of another order of sums as much as of anything.
        ({"lora_rank": 0}, {"iterations": 2, "lr": 1e-3}, 1e-4),
        ({"lora_rank": 0, "gradient_checkpointing": 1}, {"context_gradient": True}, 1e-6),
        ({"lora_rank": 0, "gradient_checkpointing": 1}, {"packed": "on", "micro_batch": 2}, 1e-6),
        ({"lora_rank": 0, "dtype": "bfloat16", **GEN}, {"ratio_tolerance": 0.02}, 1e-6),
    ],
    ids=[
        "lora",
        "packed",
        "thoughts",
        "thoughts packed",
        "all weights",
        "through the context",
        "all weights packed, session by session",
        "one expert",
    ],
)
def test_weights_that_are_shared_out_give_the_same_run(folder, tmp_path, tiny, policy, train, off):
    """Two processes, sessions of other lengths, guidance and texts of any length; off: relative, of
    a tensor."""
    made = {}
    for name, shard in (("whole", False), ("shared", True)):
        layout = {"shard": shard, "branches": "apart", **policy}
        how = {"packed": "off", **train}
        config = configured(folder, tmp_path, tiny, name, policy=layout, train=how)
        (tmp_path / f"{name}.yaml").write_text(dump_yaml(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "-m", "editr2", "train", "--config"]
        done = subprocess.run(
            [*command, str(tmp_path / f"{name}.yaml")], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-4000:]
        made[name] = load_file(tmp_path / name / "policy" / "ema.safetensors")
    base = load_file(folder / "ema.safetensors")
    for name, tensor in made["whole"].items():
        gap = (made["shared"][name].float() - tensor.float()).norm()
        assert gap <= off * tensor.float().norm(), name
    assert any(not torch.equal(made["whole"][n].float(), base[n].float()) for n in base)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "policy",
    [
        *({}, {"dtype": "bfloat16"}, {"lora_rank": 0}, {"branches": "together"}),
        {"lora_weights": "lora"},
        {"quantize": "fp8", "dtype": "bfloat16", "gradient_checkpointing": "all"},
        {"lora_rank": 0, **GEN},
        THINKS,
    ],
    ids=lambda p: " ".join(p) or "lora",
)
def test_a_run_that_is_resumed_is_the_run(folder, tmp_path, tiny, policy):
    if "lora_weights" in policy:
        start = loaded(folder, lora_rank=2)
        for p in start.module.parameters():
            p.data += 0.1 * p.requires_grad
        policy = {"lora_weights": str(tmp_path / "lora")}
        (tmp_path / "lora").mkdir()
        BagelPolicy.form(start.config, "lora").write(start, tmp_path / "lora")
    loose = {"ratio_tolerance": 0.01, "text_ratio_tolerance": 0.05}
    whole, half = (
        configured(folder, tmp_path, tiny, name, policy=policy, train=loose | {"iterations": n})
        for name, n in (("whole", 2), ("half", 1))
    )
    train(whole)
    train(half)
    train(replace_nested(half, {"train": {"iterations": 2}}))
    ours, theirs = (
        load_file(tmp_path / n / "policy" / "ema.safetensors") for n in ("whole", "half")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
