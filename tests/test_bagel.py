"""BAGEL's published folder at tiny size: read strictly, walked and packed alike, trained and
written back. (scripts/check_bagel.py compares with what its own inferencer gives.)"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import full_layer
from editr2.check.devices import find_device
from editr2.check.editors import open_editor
from editr2.check.estimate import plan
from editr2.config import Config, PolicyConfig, RolloutConfig, replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import UserError
from editr2.export.export import export
from editr2.policies.base import Questions, TurnTask
from editr2.policies.load import load_policy
from editr2.policies.rules import policy_problems
from editr2.policies.unified.bagel import PAINTING, BagelPolicy
from editr2.policies.unified.codecs import autoencoder_of
from editr2.policies.unified.published import new_sight, read_published
from editr2.policies.unified.sight import LATENT_RULE, SIGHT_RULE, SizeRule
from editr2.rl.loop import train
from editr2.rl.sampler import rollout_sampler
from editr2.run.tracking import read_metrics

SMALL = (32, 48)
GUIDED = {"guidance": 4.0, "guidance_image": 2.0, "renorm": "text_channel"}


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


@pytest.mark.parametrize("context_gradient", [False, True])
def test_a_packed_session_is_the_walk(folder, tiny, context_gradient):
    """Of all branches of guidance, with what the vision transformer sees in one of them."""
    policy = loaded(folder, **GUIDED)
    images = tiny.pictures(2, SMALL)
    tasks, expected, context = [], [], policy.encode(images)
    for turn in range(2):
        x, sigma = torch.randn(2, 2, *policy.latent_shape), torch.tensor([[0.9, 0.4], [0.7, 0.2]])
        asked = Questions([["red"] * turn] * 2, ["blue", "green"], ["cm", "cu"])
        answers = [(5, 6, 7), (8,)]
        tasks.append(TurnTask(["darker", "a cat"], images[::-1].copy(), x, sigma, asked, answers))
        scores = policy.answer_log_prob(context, asked, answers, temperature=0.7).log_prob
        context = policy.instruct(context, ["darker", "a cat"])
        v = [policy.velocity(x[:, q], sigma[:, q], context) for q in range(2)]
        names = ("v_uncond", "v_uncond_image")
        apart = [[p.v, *(p.guidance[name] for name in names)] for p in v]
        stacked = [torch.stack(place, 1).flatten(0, 1) for place in zip(*apart, strict=True)]
        expected.append((stacked, scores))
        context = policy.append(context, images[::-1].copy())
    found = policy.replay_packed(images, tasks, context_gradient=context_gradient, temperature=0.7)
    for done, (walked, scores) in zip(found, expected, strict=True):
        packed = [done.velocity.v, *(done.velocity.guidance[name] for name in names)]
        for one, other in zip(packed, walked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(done.tokens.log_prob, scores, rtol=1e-4, atol=1e-5)


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
    config = configured(folder, tmp_path, tiny)
    train(config)
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    row = next(row for row in rows if "ratio_error" in row)
    assert row["ratio_error"] < 1e-6 and row["text_ratio_error"] < 1e-4 and row["grad_norm"] > 0
    export(tmp_path / "run", tmp_path / "out", merge=True)  # proven to reload to the last bit
    ours, theirs = (load_file(f / "ema.safetensors") for f in (tmp_path / "out", folder))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    changed = {n for n in ours if not torch.equal(ours[n], theirs[n])}
    assert changed and all("_proj" in n and n.startswith("language_model.") for n in changed)
    for file in ("ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("apart", ["apart", pytest.param("together", marks=pytest.mark.exhaustive)])
def test_check_knows_what_is_held_and_what_trains(folder, tiny, apart):
    config = PolicyConfig(
        model="bagel", weights=str(folder), resolution=SMALL, lora_rank=2, branches=apart, **GUIDED
    )
    editor, policy = open_editor(config), load_policy(config)
    sizes, module = editor.sizes(), policy.module
    assert sizes.parameters == sum(p.numel() for p in module.parameters())
    assert sizes.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    beside = [
        sum(p.nbytes for p in part.parameters()) for part in (policy.images.vae, policy.sight)
    ]
    assert sizes.beside == (0, *beside)
    blueprint = editor.blueprint
    blueprint.said = len(policy.text_ids("make it red"))
    context, pictures = policy.encode(tiny.pictures(2, SMALL)), tiny.pictures(2, SMALL, seed=1)
    for turn in range(2):
        context = policy.instruct(context, ["make it red"] * 2)
        held = [*context.branches, *([context.joined] if apart == "together" else [])]
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
@pytest.mark.parametrize("packed", ["off", "on"])
def test_frozen_weights_that_are_shared_out_give_the_same_run(folder, tmp_path, tiny, packed):
    """Two processes, sessions of other lengths, guidance and intents."""
    made = {}
    for name, shard in (("whole", False), ("shared", True)):
        policy = {"shard": shard, "branches": "apart"}
        steps = {"iterations": 2, "packed": packed}
        config = configured(folder, tmp_path, tiny, name, policy=policy, train=steps)
        (tmp_path / f"{name}.yaml").write_text(dump_yaml(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "-m", "editr2", "train", "--config"]
        done = subprocess.run(
            [*command, str(tmp_path / f"{name}.yaml")], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-4000:]
        made[name] = load_file(tmp_path / name / "policy" / "ema.safetensors")
    base = load_file(folder / "ema.safetensors")
    assert all(torch.equal(made["whole"][n], made["shared"][n]) for n in base)
    assert any(not torch.equal(made["whole"][n].float(), base[n].float()) for n in base)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "policy",
    [{}, {"dtype": "bfloat16"}, {"lora_rank": 0}, {"branches": "together"}],
    ids=lambda p: " ".join(p) or "lora",
)
def test_a_run_that_is_resumed_is_the_run(folder, tmp_path, tiny, policy):
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
