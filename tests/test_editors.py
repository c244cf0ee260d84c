"""FLUX.1-Kontext and FLUX.2-klein as policies: equal to the stock pipelines, trained end to end,
saved and found again.

All on tiny random pipelines (tiny_editors.py) of the stock classes.
"""

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from editr2.check.meter import Meter
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import ConfigError, DataError
from editr2.policies.base import ScheduledPolicy
from editr2.policies.blocks import (
    compile_blocks,
    compiles,
    may_run_plainly,
    recompute_blocks,
    repeated_blocks,
)
from editr2.policies.configured import policy_class, settled_branches
from editr2.policies.contexts import MixedContext
from editr2.policies.latents import from_tokens
from editr2.policies.load import load_policy
from editr2.policies.rules import check_config, policy_problems
from editr2.policies.trained import make_ready
from editr2.policies.weights import add_lora, trainable
from editr2.rewards.base import Score
from editr2.rl.sampler import make_sampler
from editr2.run.tracking import read_metrics
from editr2.training import train
from editr2_kernels import sde_step

SIZE = (32, 48)
PROMPTS = ["make it red", "more light, please", "remove the dog"]


def more(*cases):
    """Cases that `make test-all` runs beside those of `make test`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
        for case in cases
    ]


@pytest.fixture(autouse=True)
def one_thread():
    """Operators this small wait longer for a second thread than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    spec = spec_from_file_location("tiny_editors", Path(__file__).parent / "tiny_editors.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(tiny):
    """A policy of a model over its tiny pipeline."""

    def build(model, pipe=None, **settings):
        pipe = pipe or getattr(tiny, f"{model.replace('-', '_')}_pipeline")()
        return policy_class(model)(
            pipe, PolicyConfig(**{"model": model, "resolution": SIZE, "text_tokens": 48} | settings)
        )

    return build


@pytest.fixture
def folder(tiny, tmp_path):
    """Where a model's tiny pipeline and four sessions of three turns are saved: (weights,
    sessions)."""

    def save(model, size=(32, 32)):
        pipe = getattr(tiny, f"{model.replace('-', '_')}_pipeline")(
            seed={"kontext": 0, "flux2": 8}.get(model, 3)
        )
        pipe.save_pretrained(tmp_path / "weights")
        if model == "flux2":  # as published, and not to be had without torchvision
            index = tmp_path / "weights" / "model_index.json"
            said = json.loads(index.read_text()) | {
                "tokenizer": ["transformers", "PixtralProcessor"]
            }
            index.write_text(json.dumps(said))
        lines = []
        for i, image in enumerate(tiny.pictures(4, size)):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
            turns = [{"instruction": text} for text in PROMPTS]
            lines.append(json.dumps({"id": f"s{i}", "image": f"{i}.png", "turns": turns}))
        (tmp_path / "sessions.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / "weights", tmp_path / "sessions.jsonl"

    return save


def denoised(policy, x, context, steps=3):
    """The latents of an ODE rollout by our own sampler."""
    sampler = make_sampler(steps, own=policy.sigmas)
    rows = torch.zeros(len(x), dtype=torch.int64)
    with torch.no_grad():
        for k in range(steps):
            v = policy.velocity(x, sampler.sigmas[k].expand(len(x)), context)
            x = sde_step(x, v.v, sampler.table, rows + k, rows, **v.guidance).x_next
    return x


def velocities(policy, context, seed=0, sigma=0.6):
    x = torch.randn(
        len(context), *policy.latent_shape, generator=torch.Generator().manual_seed(seed)
    )
    return policy.velocity(x, torch.linspace(sigma, 0.2, len(context)), context)


# ------------------------------------------------------------------------------ the stock pipelines


@pytest.mark.parametrize(("guidance", "embeds"), [(1.0, True), (1.0, False), (2.5, True)])
def test_kontext_is_the_stock_pipeline(tiny, make, guidance, embeds):
    pipe = tiny.kontext_pipeline(guidance_embeds=embeds)
    embed = 2.5 if embeds and guidance == 1 else None
    given = {"guidance": guidance, "guidance_embed": embed, "negative_prompt": "dull"}
    sizes = {"resolution": (32, 32), "buckets": [(32, 32), SIZE]} if guidance != 1 else {}
    policy = make("kontext", pipe, **sizes, **given).at(SIZE)
    (image,) = tiny.pictures(1, SIZE)
    x = torch.randn(1, *policy.latent_shape)
    ours = denoised(policy, x, policy.instruct(policy.encode(image[None]), PROMPTS[:1]))
    options = {
        "height": SIZE[0],
        "width": SIZE[1],
        "max_area": SIZE[0] * SIZE[1],
        "_auto_resize": False,
    }
    options |= {"num_inference_steps": 3, "latents": x, "max_sequence_length": 48} | (
        {"guidance_scale": embed} if embed else {}
    )
    if guidance != 1:
        options |= {"true_cfg_scale": guidance, "negative_prompt": "dull"}
    stock = [
        pipe(Image.fromarray(image), PROMPTS[0], output_type=kind, **options).images
        for kind in ("latent", "np")
    ]
    assert (ours - stock[0]).abs().max() <= 2e-6 * stock[0].abs().max()
    # 8 bits are all that `decode` keeps.
    assert np.abs(policy.decode(ours)[0] / 255 - stock[1][0]).max() <= 0.5 / 255 + 1e-5
    assert policy.decode(ours).std() > 10


@pytest.mark.parametrize(
    ("model", "guidance"),
    [("klein", 1.0), ("klein", 4.0), ("klein-kv", 1.0), ("flux2", None), ("flux2", 2.5)],
)
def test_klein_is_the_stock_pipeline(tiny, make, model, guidance):
    size = (64, 80)  # the pipeline refuses smaller references
    sizes = {"resolution": (64, 64), "buckets": [(64, 64), size]}
    given = {"guidance_embed" if model == "flux2" else "guidance": guidance}
    policy = make(model, **sizes, **given, history=2, keep_source=True).at(size)
    first, second, third = tiny.pictures(3, size)
    x = torch.randn(1, *policy.latent_shape)

    def stock(*images):
        pipe = policy.pipe
        options = {
            "height": size[0],
            "width": size[1],
            "num_inference_steps": 3,
            "max_sequence_length": 48,
        }
        noise = from_tokens(x, policy.grid)
        references = [Image.fromarray(i) for i in images]
        if model != "klein-kv" and guidance is not None:  # else its own default
            options["guidance_scale"] = guidance
        return pipe(references, PROMPTS[0], latents=noise, output_type="np", **options).images

    context = policy.encode(first[None])
    ours = policy.decode(denoised(policy, x, policy.instruct(context, PROMPTS[:1])))
    assert np.abs(ours / 255 - stock(first)).max() <= 0.5 / 255 + 1e-5
    # The second turn: what is edited, then the source, as the pipeline takes a list of references.
    context = policy.append(policy.instruct(context, PROMPTS[1:2]), second[None])
    ours = policy.decode(denoised(policy, x, policy.instruct(context, PROMPTS[:1])))
    assert np.abs(ours / 255 - stock(second, first)).max() <= 0.5 / 255 + 1e-5
    assert np.abs(ours / 255 - stock(first, second)).max() > 0.005  # twice what rounding explains
    # The third, and before it a user's own further image, behind whatever is remembered.
    context = policy.append(policy.instruct(context, PROMPTS[1:2]), third[None])
    ours = policy.decode(denoised(policy, x, policy.instruct(context, PROMPTS[:1])))
    assert np.abs(ours / 255 - stock(third, second, first)).max() <= 0.5 / 255 + 1e-5
    context = policy.append(policy.encode(first[None], [third[None]]), second[None])
    ours = policy.decode(denoised(policy, x, policy.instruct(context, PROMPTS[:1])))
    assert np.abs(ours / 255 - stock(second, first, third)).max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize("model", ["kontext", "klein", "klein-kv", "flux2"])
def test_words_images_time_and_place_all_count(tiny, make, model):
    policy = make(model, keep_source=True)
    assert isinstance(policy, ScheduledPolicy)
    images = tiny.pictures(2, SIZE)
    source = policy.encode(images[:1])
    context = policy.instruct(source, ["red"])
    v = velocities(policy, context).v
    others = {
        "words": policy.instruct(source, ["blue"]),
        "image": policy.instruct(policy.encode(images[1:]), ["red"]),
        "source": policy.instruct(policy.append(source, images[:1]), ["red"]),
    }
    for name, other in others.items():
        assert (velocities(policy, other).v - v).abs().max() > 1e-3, name
    assert (velocities(policy, context, sigma=0.9).v - v).abs().max() > 1e-3
    turned = policy.instruct(policy.append(policy.encode(images[:1]), images[1:]), ["red"])
    straight = policy.instruct(policy.append(policy.encode(images[1:]), images[:1]), ["red"])
    assert torch.equal(turned.conditions[0], straight.conditions[1])
    assert (velocities(policy, turned).v - velocities(policy, straight).v).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------- contexts


@pytest.mark.parametrize(
    ("history", "keep_source", "seen"),
    [
        (1, False, ["0", "1", "2", "3"]),
        (1, True, ["0", "10", "20", "30"]),
        (2, False, ["0", "10", "21", "32"]),
        (3, True, ["0", "10", "210", "3210"]),
        (9, False, ["0", "10", "210", "3210"]),
    ],
)
def test_a_turn_sees_as_much_of_the_session_as_it_is_told(tiny, make, history, keep_source, seen):
    """The last two are a user's further images, which every turn sees last."""
    policy = make("kontext", history=history, keep_source=keep_source)
    images = tiny.pictures(6, SIZE)
    alone = [policy.encode(image[None]).conditions[0] for image in images]
    context = policy.encode(images[:1], [images[4:5], images[5:]])
    for turn, expected in enumerate(each + "45" for each in seen):
        if turn:
            context = policy.append(policy.instruct(context, PROMPTS[:1]), images[turn][None])
        assert len(context.conditions) == len(expected)
        assert all(
            torch.equal(c, alone[int(i)]) for c, i in zip(context.conditions, expected, strict=True)
        )


def test_keys_and_values_of_references_carry_gradient_when_asked(tiny, make):
    policy = make("klein-kv")
    gradients = []
    for through in (True, False):
        with torch.set_grad_enabled(through):
            context = policy.instruct(policy.encode(tiny.pictures(2, SIZE)), PROMPTS[:2])
        assert (
            all(t.requires_grad == through and len(t) == 2 for t in context.derived)
            and len(context.derived) == 8
        )
        velocities(policy, context).v.square().mean().backward()
        gradients.append(
            {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None}
        )
        policy.module.zero_grad(set_to_none=True)
    # What only the references go through at their own time, the image stream's keys, changes most.
    name = "transformer_blocks.0.attn.to_k.weight"
    assert not torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3)
    with pytest.raises(ConfigError, match="policy.gradient_checkpointing: all .*klein-kv: off"):
        make("klein-kv", gradient_checkpointing=True)


@pytest.mark.parametrize("model", ["kontext", "klein", "klein-kv", "flux2"])
def test_a_joined_batch_predicts_what_its_parts_do(tiny, make, model):
    policy = make(model, keep_source=True, guidance=2.0 if model in ("kontext", "klein") else 1.0)
    images = tiny.pictures(4, SIZE)
    one = policy.instruct(policy.encode(images[:3]), PROMPTS)
    two = policy.instruct(policy.append(policy.encode(images[2:]), images[:2]), PROMPTS[:2])
    x = torch.randn(6, *policy.latent_shape)
    sigma = torch.linspace(0.9, 0.1, 6)

    def by_row(contexts):
        singles = [policy.select(c, torch.tensor([i])) for c in contexts for i in range(len(c))]
        done = [policy.velocity(x[i : i + 1], sigma[i : i + 1], c) for i, c in enumerate(singles)]
        return [
            torch.cat([d.v for d in done]),
            torch.cat([d.guidance.get("v_uncond", d.v) for d in done]),
        ]

    same = policy.join([one, policy.select(one, torch.tensor([2, 0, 0]))])
    assert not isinstance(same, MixedContext) and len(same) == 6
    mixed = policy.join([two, one, policy.select(two, torch.tensor([1]))])
    assert isinstance(mixed, MixedContext) and len(mixed.parts) == 2
    again = policy.select(policy.join([mixed, one]), torch.tensor([5, 8, 1, 1, 0, 3]))
    for batch, rows in (
        (same, [one, policy.select(one, torch.tensor([2, 0, 0]))]),
        (mixed, [two, one, policy.select(two, torch.tensor([1]))]),
        (
            again,
            [
                policy.select(c, torch.tensor([i]))
                for c, i in ((two, 1), (one, 2), (two, 1), (two, 1), (two, 0), (one, 1))
            ],
        ),
    ):
        found = policy.velocity(x, sigma, batch)
        both = [found.v, found.guidance.get("v_uncond", found.v)]
        torch.testing.assert_close(both, by_row(rows), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="joined of several turns"):
        policy.append(mixed, images)


@pytest.mark.parametrize("model", ["kontext", "klein", "qwen-edit"])
def test_branches_together_are_one_forward_and_differ_by_rounding(tiny, make, beside, model):
    pipe = beside("tiny_qwen").qwen_pipeline() if model == "qwen-edit" else None
    apart = make(model, pipe, guidance=3.0, negative_prompt="not so dark", branches="apart")
    together = policy_class(model)(apart.pipe, replace(apart.config, branches="together"))
    context = apart.instruct(apart.encode(tiny.pictures(2, SIZE)), PROMPTS[:2])
    lengths = {p["words"].shape[1] for p in (context.prompt, context.negative)}
    assert len(lengths) == (2 if model == "qwen-edit" else 1)  # whose words are not padded
    forwards = []
    apart.module.register_forward_pre_hook(lambda *_: forwards.append(1))
    expected = velocities(apart, context)
    assert len(forwards) == 2
    found = velocities(together, context)
    assert len(forwards) == 3
    for a, b in (
        (found.v, expected.v),
        (found.guidance["v_uncond"], expected.guidance["v_uncond"]),
    ):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (found.v - found.guidance["v_uncond"]).abs().max() > 1e-3
    for shard, processes, stands_for in (
        (True, 2, "together"),
        (True, 1, "apart"),
        (False, 2, "apart"),
    ):
        settled = settled_branches(PolicyConfig(shard=shard), processes)
        assert settled.branches == stands_for
    assert settled_branches(PolicyConfig(shard=True, branches="apart"), 2).branches == "apart"


@pytest.mark.parametrize("model", ["kontext", "klein"])
def test_frozen_parts_run_once_and_never_while_denoising(tiny, make, model):
    policy = make(model, guidance=2.0)
    calls = {"text": [], "vae": 0}
    encoder, vae = policy.pipe.text_encoder, policy.pipe.vae
    encoder.register_forward_hook(
        lambda module, args, kwargs, out: calls["text"].append(
            len(kwargs.get("input_ids", args[0] if args else None))
        ),
        with_kwargs=True,
    )
    encode = vae.encode

    def counted(images):
        calls["vae"] += 1
        return encode(images)

    vae.encode = counted
    images = tiny.pictures(4, SIZE)
    context = policy.encode(images)
    assert calls == {"text": [], "vae": 1}
    context = policy.instruct(context, ["a", "b", "a", "b"])
    assert sum(calls["text"]) == 3  # a, b and the negative prompt
    context = policy.select(context, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    denoised(policy, torch.randn(8, *policy.latent_shape), context)
    context = policy.append(context, tiny.pictures(8, SIZE))
    policy.instruct(context, ["c", *"bbbbbbb"])
    assert sum(calls["text"]) == 4 and calls["vae"] == 2
    assert not any(p.requires_grad for part in (encoder, vae) for p in part.parameters())


def counted(policy):
    """What goes through its frozen encoders from now on, by name."""
    calls = {"vae": 0, "text": 0}
    encode = policy.pipe.vae.encode

    def encoded(images):
        calls["vae"] += len(images)
        return encode(images)

    policy.pipe.vae.encode = encoded
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    return calls


@pytest.mark.parametrize("model", ["kontext", "klein-kv"])
def test_training_starts_from_what_the_rollout_encoded(tiny, make, monkeypatch, model):
    policy = make(model)
    calls = counted(policy)
    sources, outputs = tiny.pictures(4, SIZE)[[0, 1, 0]], tiny.pictures(3, SIZE, seed=1)

    def walk():
        context = policy.append(policy.instruct(policy.encode(sources), PROMPTS), outputs)
        return policy.instruct(context, PROMPTS)

    first = walk()
    assert calls["vae"] == 2 + 3
    monkeypatch.setattr(policy, "_at_work", None)  # on a full hit nothing comes to the device
    again = walk()
    assert calls["vae"] == 5
    assert torch.equal(first.conditions[0], again.conditions[0])
    made = torch.cat([policy.to_latents(_pixels(image)) for image in outputs])
    # Other strides are another kernel on some CPUs, and the last bit another.
    assert (first.conditions[0] - made.detach()).abs().max() < 1e-6
    if model == "klein-kv":  # depends on what trains, and is not kept
        with torch.no_grad():
            policy.module.transformer_blocks[0].attn.to_k.weight.mul_(2)
        assert not torch.equal(first.derived[0], walk().derived[0])


def _pixels(image):
    return torch.from_numpy(image)[None].permute(0, 3, 1, 2).float() / 255 * 2 - 1


def test_what_is_kept_is_the_last_used_and_outputs_drive_no_source_out(tiny, make):
    policy = make("kontext")
    calls, images = counted(policy), tiny.pictures(3, SIZE)
    context = policy.encode(images)
    policy._sources.limit = policy._outputs.limit = 2 * context.conditions[0][0].numel() * 4
    for image, made in ((0, 3), (1, 4), (0, 4), (2, 5), (0, 5), (1, 6)):
        policy.encode(images[image][None])
        assert calls["vae"] == made, image
    for seed in range(3):
        policy.append(context, tiny.pictures(3, SIZE, seed=9 + seed))
    before = calls["vae"]
    policy.encode(images[:2])
    assert calls["vae"] == before
    assert [policy.encodes_again(turn, n) for turn, n in ((0, 2), (0, 3), (1, 2), (1, 3))] == [
        False,
        True,
        False,
        True,
    ]


def test_condition_resolution_and_wrong_images(tiny, make):
    policy = make("kontext", resolution=(32, 48), condition_resolution=(64, 96))
    assert policy.image_size == (32, 48) and policy.latent_shape[0] == 6
    context = policy.instruct(policy.encode(tiny.pictures(1, SIZE)), ["red"])
    assert context.conditions[0].shape[1] == 24 and velocities(policy, context).v.shape[1] == 6
    with pytest.raises(DataError, match=r"images: 64 x 64 px \(accepted: \(32, 48\)\)"):
        policy.encode(tiny.pictures(1, (64, 64)))


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("model", "settings", "line"),
    [
        ("kontext", {"resolution": (32, 40)}, r"policy.resolution: \[32, 40\] .*multiples of 16"),
        (
            "klein",
            {"condition_resolution": (0, 32)},
            "policy.condition_resolution: .*multiples of 16",
        ),
        ("kontext", {"guidance_image": 2.0}, "policy.guidance_image: 2.0 .*kontext: 1"),
        ("klein", {"guidance_embed": 2.0}, "policy.guidance_embed: 2.0 .*none"),
        ("flux2", {"guidance": 2.0}, "policy.guidance: 2.0 .*flux2: 1; .*policy.guidance_embed"),
    ],
)
def test_settings_a_model_cannot_follow(make, model, settings, line):
    with pytest.raises(ConfigError, match=line):
        make(model, **settings)


def test_settings_these_weights_cannot_follow(tiny, make):
    with pytest.raises(
        ConfigError, match="policy.guidance_embed: 3.0 .*these weights do not take it"
    ):
        make("kontext", tiny.kontext_pipeline(guidance_embeds=False), guidance_embed=3.0)
    with pytest.raises(ConfigError, match=r"policy.guidance: 2.0 .*distilled"):
        make("klein", tiny.klein_pipeline(is_distilled=True), guidance=2.0)
    with pytest.raises(ConfigError, match="policy.guidance_embed: 2.0 .*these weights do not"):
        make("flux2", tiny.flux2_pipeline(guidance_embeds=False), guidance_embed=2.0)


def test_settings_that_need_no_weights():
    for policy, line in (
        ({"resolution": (256, 256)}, "policy.resolution: .*unified"),
        ({"offload": True}, "policy.offload: True .*unified"),
        ({"model": "kontext"}, "data.path: none .*kontext"),
        ({"model": "kontext", "quantize": "4bit"}, "data.path|policy.quantize: 4bit .*lora_rank 0"),
    ):
        with pytest.raises(ConfigError, match=line):
            check_config(replace_nested(Config(), {"policy": policy}))
    with pytest.raises(ConfigError, match="policy.model: 'sdxl' .*kontext, klein"):
        policy_class("sdxl")


@pytest.mark.parametrize(
    ("model", "name", "line"),
    [
        ("kontext", "_native_math", None),
        ("kontext", "_native_flash", None),
        ("klein-kv", "_native_math", None),
        ("qwen-edit", "_native_math", None),
        ("kontext", "flashiest", "'flashiest' (accepted: flash, "),
        ("kontext", "flash", "flash (accepted here: "),  # not installed
        ("kontext", "_native_efficient", "_native_efficient (accepted on device cpu in"),
        ("qwen-edit", "_native_flash", "_native_flash (accepted on device cpu in"),  # no masks
        ("kontext", "flex", "flex (accepted on device cpu in"),  # no gradients
    ],
)
def test_attention_by_a_backend_of_diffusers(tiny, make, beside, model, name, line):
    def made(**settings):
        pipe = beside("tiny_qwen").qwen_pipeline() if model == "qwen-edit" else None
        policy = make(model, pipe, lora_rank=2, lora_targets=r".*\.to_q", **settings)
        make_ready(policy, None, True)
        policy.placed(True)
        return policy

    if line:
        with pytest.raises(ConfigError) as error:
            made(attention=name)
        assert str(error.value).startswith(f"policy.attention: {line}")
        assert "\n" not in str(error.value) and f" {name}," not in str(error.value)
        assert "_native_math" in str(error.value)
        found = [
            p for p in policy_problems(PolicyConfig(model, attention=name)) if "attention" in p
        ]
        assert found == ([str(error.value)] if name == "flashiest" else [])
        return
    plain, asked = made(), made(attention=name)
    context = plain.instruct(plain.encode(tiny.pictures(2, SIZE)), PROMPTS[:2])
    found, expected = velocities(asked, context).v, velocities(plain, context).v
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert name == "_native_flash" or not torch.equal(found, expected)  # which torch takes, too


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match="policy.weights: .*nowhere: no FluxKontextPipeline"
    ) as error:
        load_policy(PolicyConfig(model="kontext", weights=str(tmp_path / "nowhere")))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a CUDA device")
def test_four_bits_without_a_device(folder):
    weights, _ = folder("kontext")
    with pytest.raises(
        ConfigError, match=r"policy.quantize: 4bit \(accepted without a CUDA device: none\)"
    ):
        load_policy(
            PolicyConfig(model="kontext", weights=str(weights), lora_rank=2, quantize="4bit")
        )


def test_the_shipped_policy_needs_no_diffusers():
    code = "import sys, editr2.rl.loop, editr2.cli.main; sys.exit('diffusers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode
        == 0
    )


# ----------------------------------------------------------------------------- weights and adapters


def loaded(weights, model="kontext", **settings):
    settings = {
        "model": model,
        "weights": str(weights),
        "resolution": (32, 32),
        "text_tokens": 48,
    } | settings
    return load_policy(PolicyConfig(**settings))


def stirred(policy):
    """Moves what trains, so that an adapter is no longer zero."""
    torch.manual_seed(1)
    for p in trainable(policy.module).values():
        p.data += 0.05 * torch.randn_like(p)
    return policy


def seen(tiny, policy):
    context = policy.instruct(policy.encode(tiny.pictures(2, (32, 32))), PROMPTS[:2])
    return velocities(policy, context).v.detach()


@pytest.mark.parametrize("model", ["kontext", "klein", *more("flux2")])
def test_adapters_sit_on_attention_and_mlp_and_start_at_nothing(folder, tiny, model):
    weights, _ = folder(model)
    base, adapted = loaded(weights, model), loaded(weights, model, lora_rank=3)
    assert torch.equal(seen(tiny, base), seen(tiny, adapted))
    blocks = [
        n
        for n, m in base.module.named_modules()
        if isinstance(m, torch.nn.Linear) and "blocks." in n
    ]
    expected = {
        n for n in blocks if ".norm" not in n
    }  # all linear layers of the blocks but the modulation's
    found = {n.split(".lora_")[0] for n in trainable(adapted.module)}
    assert found == expected and len(found) > 10
    assert trainable(base.module).keys() == dict(base.module.named_parameters()).keys()
    few = loaded(weights, model, lora_rank=3, lora_targets=r".*\.attn\.add_._proj")
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trainable(few.module)} == {
        f"add_{c}_proj" for c in "qkv"
    }
    for nothing in ("nothing", r".*\.attn"):
        with pytest.raises(
            ConfigError, match="policy.lora_targets: .*accepted with policy.model"
        ) as error:
            loaded(weights, model, lora_rank=3, lora_targets=nothing)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "alpha", "bytes_kept"),
    [
        (torch.bfloat16, 8.0, 0.6),
        (torch.bfloat16, 6.0, 0.8),  # a strength that rounds stays where peft has it
        (torch.float32, 8.0, 0.8),
        (torch.float32, 6.0, 1.0),
    ],
)
def test_adapters_compute_what_peft_does_with_fewer_copies(dtype, alpha, bytes_kept):
    from peft.tuners.lora import Linear, LoraLayer

    torch.manual_seed(0)
    ours = torch.nn.Sequential(
        *(torch.nn.Linear(96, 96, bias=i, dtype=dtype) for i in (True, False))
    )
    add_lora(ours, 4, alpha, targets="[01]")
    for name, p in ours.named_parameters():
        if ".lora_" in name:
            p.data = 0.1 * torch.randn(p.shape)
    theirs = copy.deepcopy(ours)
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.__class__ = Linear
    x = torch.randn(2, 30, 96).to(dtype)

    def computed(module):
        found = [x.clone().requires_grad_()]
        with Meter() as meter, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                plain = module(x)
            module(*found).square().mean().backward()
        return [plain, found[0].grad, *(p.grad for p in trainable(module).values())], meter.cost

    (found, less), (expected, cost) = computed(ours), computed(theirs)
    again, biased = pickle.loads(pickle.dumps((ours, theirs))), copy.deepcopy((ours, theirs))
    assert type(again[0][0]) is type(ours[0]) is type(biased[0][0])
    for layer in (layer for module in biased for layer in module):
        layer.lora_bias["default"] = True
        layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(96))
    for one, other in (again, biased):
        assert all(map(torch.equal, computed(one)[0], computed(other)[0]))
    assert len(found) == 6 and all(map(torch.equal, found, expected))
    assert less.bytes <= bytes_kept * cost.bytes and less.operations <= cost.operations
    for layer in ours.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        assert torch.equal(ours(x), ours[1].base_layer(ours[0].base_layer(x)))


@pytest.mark.parametrize(
    ("model", "alpha"), [("kontext", 6.0), ("klein", 6.0), ("klein", 5.0), *more(("flux2", 6.0))]
)
def test_a_saved_adapter_is_found_again_and_stock_diffusers_loads_it(
    folder, tiny, tmp_path, model, alpha
):
    """Its strength, alpha / rank, stands in B: a power of two to the last bit, any other rounded
    once (and once more where training goes on with the alpha it had)."""
    weights, _ = folder(model)
    trained = stirred(loaded(weights, model, lora_rank=3, lora_alpha=alpha))
    trained.save(tmp_path / "policy")
    expected = seen(tiny, trained)
    rounding = 0.0 if alpha == 6 else 2e-6 * float(expected.abs().max())

    def same(policy):
        return float((seen(tiny, policy) - expected).abs().max()) <= rounding

    again = loaded(tmp_path / "policy", model, lora_rank=3, lora_alpha=alpha)
    assert same(again) and again.module.peft_config["default"].lora_alpha == alpha
    assert trainable(again.module).keys() == trainable(trained.module).keys()
    merged = loaded(tmp_path / "policy", model)
    torch.testing.assert_close(seen(tiny, merged), expected, rtol=1e-5, atol=1e-5)
    assert (
        trainable(merged.module).keys()
        == dict(loaded(weights, model).module.named_parameters()).keys()
    )
    stock = policy_class(model).load_pipeline(str(weights))
    stock.load_lora_weights(tmp_path / "policy")
    stock.vae.enable_slicing()  # as ours, since a batch of images rounds differently
    assert same(policy_class(model)(stock, again.config))
    with pytest.raises(
        ConfigError, match=rf"policy.lora_alpha: 7.0 \(accepted: {alpha}, that of the LoRA"
    ):
        loaded(tmp_path / "policy", model, lora_rank=3, lora_alpha=7.0)
    with pytest.raises(ConfigError, match="policy.weights: .* is of model"):
        loaded(tmp_path / "policy", {"kontext": "klein"}.get(model, "kontext"))


def test_a_policy_without_data_is_loaded_without_a_word(folder, tmp_path):
    """A process whose weights come from another one reads no adapter either; torch would warn of
    every matrix."""
    weights, _ = folder("kontext")
    stirred(loaded(weights, lora_rank=3)).save(tmp_path / "policy")
    config = PolicyConfig(
        "kontext", str(tmp_path / "policy"), resolution=(32, 32), text_tokens=32, lora_rank=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = load_policy(config, empty=True)
    assert all(p.is_meta for n, p in empty.module.named_parameters() if ".lora_" not in n)
    whole = load_policy(config)
    assert {n: p.shape for n, p in empty.module.named_parameters()} == {
        n: p.shape for n, p in whole.module.named_parameters()
    }


def test_saved_weights_are_found_again_with_and_without_an_adapter_over_them(
    folder, tiny, tmp_path
):
    weights, _ = folder("kontext")
    trained = stirred(loaded(weights))
    trained.save(tmp_path / "full")
    assert torch.equal(seen(tiny, loaded(tmp_path / "full")), seen(tiny, trained))
    over = stirred(loaded(tmp_path / "full", lora_rank=2))
    over.save(tmp_path / "over")
    assert torch.equal(seen(tiny, loaded(tmp_path / "over", lora_rank=2)), seen(tiny, over))
    assert json.loads((tmp_path / "over" / "policy.json").read_text())["base"] == str(
        tmp_path / "full"
    )


def test_encodes_kept_in_a_folder_are_found_by_the_next_run(folder, tiny, tmp_path, caplog):
    weights, _ = folder("kontext")
    images, cache = tiny.pictures(3, (32, 32)), tmp_path / "cache"

    def walked(**settings):
        policy = loaded(weights, **{"cache": str(cache)} | settings)
        calls = counted(policy)
        context = policy.instruct(policy.encode(images[:2]), PROMPTS[:2])
        after = policy.instruct(policy.append(context, images[1:]), PROMPTS[1:])
        return calls, [velocities(policy, c).v.detach() for c in (context, after)]

    plain = walked(cache=None)
    assert not cache.exists()
    for calls in ({"vae": 4, "text": 1 + 1}, {"vae": 2, "text": 0}):  # outputs are not for others
        made, found = walked()
        assert made == calls and all(map(torch.equal, found, plain[1]))
    files = sorted(cache.rglob("*"))
    assert [p.suffix for p in files] == ["", *[".safetensors"] * 2, "", *[".safetensors"] * 3]
    image, text = files[1], files[4]
    image.write_bytes(image.read_bytes()[:-1])  # cut short
    whole = text.read_bytes()
    text.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])  # one bit
    made, found = walked()
    assert made == {"vae": 3, "text": 1} and all(map(torch.equal, found, plain[1]))
    assert [str(p) in said for p, said in zip((image, text), caplog.messages, strict=True)]
    assert all("damaged" in said and "\n" not in said for said in caplog.messages)
    assert text.read_bytes() == whole and walked()[0] == {"vae": 2, "text": 0}
    for change in ({"dtype": "bfloat16"}, {"text_tokens": 47}):
        made, _ = walked(**change)  # of another make
        assert made["text"] == 2
    other = tiny.kontext_pipeline(seed=7)
    other.save_pretrained(weights)
    assert walked()[0] == {"vae": 4, "text": 2}
    (tmp_path / "file").write_text("")
    config = PolicyConfig("kontext", str(weights), cache=str(tmp_path / "file"))
    assert [p for p in policy_problems(config) if "policy.cache" in p and "is a file" in p]


def test_bfloat16_keeps_trained_weights_and_latents_in_float32(folder, tiny):
    weights, _ = folder("kontext")

    def seen(policy):
        # Times and guidance that bfloat16 holds even times 1000, as the transformer embeds them.
        context = policy.instruct(policy.encode(tiny.pictures(2, (32, 32))), PROMPTS[:2])
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        return policy.velocity(x, torch.tensor([0.5, 0.25]), context).v

    exact = seen(loaded(weights, guidance_embed=2.0)).detach()
    for rank in (0, 3):
        policy = loaded(weights, dtype="bfloat16", lora_rank=rank, guidance_embed=2.0)
        assert all(p.dtype == torch.float32 for p in trainable(policy.module).values())
        assert policy.pipe.vae.dtype == policy.pipe.text_encoder_2.dtype == torch.bfloat16
        frozen = {p.dtype for p in policy.module.parameters() if not p.requires_grad}
        assert frozen == ({torch.bfloat16} if rank else set())
        v = seen(policy)
        assert v.dtype == torch.bfloat16
        assert (v.float() - exact).norm() < 0.05 * exact.norm()
        v.float().square().mean().backward()
        assert any(
            p.grad is not None and p.grad.abs().max() > 0 for p in trainable(policy.module).values()
        )


@pytest.mark.parametrize("model, how, again", [("kontext", True, "all"), ("klein", 1, [0])])
def test_checkpointed_gradients_are_the_plain_ones(folder, tiny, model, how, again):
    weights, _ = folder(model)
    policy = stirred(loaded(weights, model, lora_rank=3, gradient_checkpointing=how))
    policy.module = copy.deepcopy(policy.module)  # which knows as well
    assert policy.module.is_gradient_checkpointing
    context = policy.instruct(policy.encode(tiny.pictures(2, (32, 32))), PROMPTS[:2])
    gradients, forwards = [], []
    blocks = repeated_blocks(policy.module)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, n=number: forwards.append(n))
    for _ in range(2):
        velocities(policy, context).v.square().mean().backward()
        gradients.append({n: p.grad for n, p in trainable(policy.module).items()})
        policy.module.zero_grad(set_to_none=True)
        policy.module.disable_gradient_checkpointing()
    every = list(range(len(blocks)))
    # The chosen ones once more on the way back, and all of them once without checkpoints.
    assert sorted(forwards) == sorted([*every, *(every if again == "all" else again), *every])
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: 99 \(accepted .*: at most"):
        recompute_blocks(policy.module, 99)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert any(g.abs().max() > 1e-3 for g in gradients[0].values())


def test_a_block_that_cannot_be_compiled_runs_plainly_where_compile_is_auto(make, monkeypatch):
    """With `on` it is an error, and one line."""

    def broken(block, **_):
        def run(*args, **kwargs):
            raise torch._dynamo.exc.Unsupported("no compiler\nhere")

        block._compiled_call_impl = run

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    policy = make("kontext")
    context, x = policy.blank(1, 4), torch.randn(1, *policy.latent_shape)
    sigma = torch.ones(1)
    with torch.no_grad():
        plain = policy.velocity(x, sigma, context).v
        compile_blocks(policy.module, strict=True, cuda=True)
        assert torch.equal(policy.velocity(x, sigma, context).v, plain)  # it lies on no such device
        compile_blocks(policy.module, strict=True)
        with pytest.raises(ConfigError, match="^policy.compile: on .*no compiler here.*$"):
            policy.velocity(x, sigma, context)
        may_run_plainly(policy.module)
        with pytest.warns(UserWarning, match="^policy.compile: auto: .* plainly; .*no compiler"):
            assert torch.equal(policy.velocity(x, sigma, context).v, plain)
        assert torch.equal(policy.velocity(x, sigma, context).v, plain)  # and says it once
    how = (
        (True, {}, True),
        (True, {"shard": True}, True),
        (True, {"quantize": "4bit"}, False),
        (True, {"compile": "off"}, False),
    )
    for cuda, settings, on in (*how, (False, {}, False), (False, {"compile": "on"}, True)):
        assert compiles(PolicyConfig(**settings), cuda) is on


def test_offloaded_parts_leave_the_device_and_keep_the_hosts_weights(make):
    """The meta device stands in for a GPU: what lies there has no numbers, so they can only be the
    host's own."""
    for offload in (True, False):
        policy = make("kontext", offload=offload)
        policy.module.to("meta")
        before = [p.data_ptr() for p in policy.pipe.vae.parameters()]
        with policy._at_work("vae"):
            assert all(
                t.is_meta for t in (*policy.pipe.vae.parameters(), *policy.pipe.vae.buffers())
            )
        after = list(policy.pipe.vae.parameters())
        assert all(p.is_meta != offload for p in after)
        if offload:
            assert [p.data_ptr() for p in after] == before


# ----------------------------------------------------------------------------------------- training


class Brightness:
    """A toy reward: the mean pixel value."""

    names = ("bright",)

    def __call__(self, session, images):
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


def run_config(weights, sessions, model, out, loss="grpo", **changes):
    nft = loss == "nft"
    values = {
        "out": str(out),
        "data": {"path": str(sessions)},
        "policy": {
            "model": model,
            "weights": str(weights),
            "resolution": (32, 32),
            "lora_rank": 4,
            "text_tokens": 48,
        },
        "rollout": {
            "sessions": 2,
            "siblings": 6,
            "steps": 3,
            "window": 0 if nft else 2,
            "shared_noise": not nft,
        }
        | {"window_range": 0.34},
        "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
        "train": {"iterations": 8, "lr": 2e-2, "lr_decay": 1.0, "ema": None, "loss": loss},
        "eval": {"sessions": 4, "strips": 1},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value}
    return replace_nested(Config(), values)


def events(run, event):
    return [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == event]


OTHERS = [("kontext", "nft"), ("klein", "grpo"), ("flux2", "grpo"), ("flux2", "nft")]


@pytest.mark.parametrize("model, loss", [("kontext", "grpo"), ("klein", "nft"), *more(*OTHERS)])
def test_a_toy_reward_rises(folder, tmp_path, model, loss):
    weights, sessions = folder(model)
    run = train(run_config(weights, sessions, model, tmp_path / "run", loss), reward=Brightness())
    (comparison,) = events(run, "comparison")
    assert comparison["turn"] == 3 and comparison["difference"] > 3 * comparison["se"] > 0, (
        comparison
    )
    rows = events(run, "train")
    if loss == "grpo":
        assert all(row["ratio_error"] <= 1e-6 for row in rows)
    assert {p.name for p in (run / "policy").iterdir()} == {
        "policy.json",
        "pytorch_lora_weights.safetensors",
    }
    report = (run / "report.html").read_text()
    assert "bright, turn 3" in report and "GA" not in re.sub(
        '<(style|script).*?</(style|script)>|data:[^"]*', "", report, flags=re.S
    )


@pytest.mark.parametrize("model", ["kontext", *more("flux2")])
def test_killed_and_resumed_runs_are_bitwise_one(folder, tmp_path, model):
    weights, sessions = folder(model)

    def config(out, iterations):
        few = {"rollout": {"siblings": 2}, "eval": {"sessions": 1}}
        few["train"] = {"iterations": iterations}
        return run_config(weights, sessions, model, tmp_path / out, **few)

    train(config("whole", 3), reward=Brightness())
    train(config("parts", 1), reward=Brightness())
    train(config("parts", 3), reward=Brightness())
    a, b = (
        load_file(tmp_path / out / "policy" / "pytorch_lora_weights.safetensors")
        for out in ("whole", "parts")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        # Turns with one condition and with two in one batch, both branches, all weights.
        (
            "kontext",
            {
                "policy": {
                    "keep_source": True,
                    "guidance": 2.0,
                    "branches": "together",
                    "lora_rank": 0,
                    "gradient_checkpointing": True,
                },
                "train": {"micro_batch": 3, "ema": 0.9, "kl_weight": 0.01},
            },
        ),
        (
            "kontext",
            {
                "policy": {"dtype": "bfloat16", "offload": True},
                "rollout": {"store_dtype": "bfloat16"},
            },
        ),
        ("klein-kv", {"policy": {"keep_source": True}, "train": {"context_gradient": True}}),
        ("klein-kv", {"train": {"loss": "nft"}, "rollout": {"window": 0, "shared_noise": False}}),
        ("flux2", {"policy": {"keep_source": True, "guidance_embed": 2.0}}),
    ],
)
def test_a_replay_meets_the_rollout_however_it_trains(folder, tmp_path, model, changes):
    weights, sessions = folder(model)
    few = {"rollout": {"siblings": 2}, "train": {"iterations": 1}, "eval": {"sessions": 1}}
    changes = {key: {**few.get(key, {}), **changes.get(key, {})} for key in few | changes}
    run = train(
        run_config(weights, sessions, model, tmp_path / "run", **changes), reward=Brightness()
    )
    (row,) = events(run, "train")
    assert row["grad_norm"] > 0 and row.get("ratio_error", 0.0) <= 1e-6
    config = run_config(run / "policy", sessions, model, tmp_path / "again", **changes)
    load_policy(config.policy)
