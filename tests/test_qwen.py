"""Qwen-Image-Edit and -Plus: what diffusers' pipelines compute, turn by turn, and what training
makes of it."""

import dataclasses
import functools
import importlib
import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import ConfigError
from editr2.policies.base import references_problem
from editr2.policies.configured import policy_class
from editr2.policies.contexts import MixedContext
from editr2.policies.load import load_policy
from editr2.rewards.base import Score
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn, save_sessions
from editr2.training import train
from editr2_kernels import INITIAL_STEP, philox_normal

MODELS = ("qwen-edit", "qwen-edit-plus")
LATEST = {"zero_cond_t": True}
"""What the transformer of Qwen-Image-Edit-2511 has beside that of 2509: conditions are modulated as
at time 0."""
SINCE = (("qwen-edit-plus", LATEST), ("longcat-edit", {}), ("qwen-image-2.1", {}))
"""Pipelines, and changes to their transformers, that train with `make test-all`."""
SIZE, CONDITION, STEPS = (64, 96), (48, 80), 4
WORDS = (
    ("make the square brighter", "now remove it"),
    ("add a red circle on the left", "brighter", "undo"),
)


@pytest.fixture
def pipeline(beside):
    """A fresh tiny pipeline by model; the same weights every time."""

    def make(model, **settings):
        tiny = beside("tiny_qwen")
        if model == "longcat-edit":
            return tiny.longcat_pipeline(**settings)
        if model == "qwen-image-2.1":
            return tiny.qwen_image_pipeline(**settings)
        return tiny.qwen_pipeline(plus=model == "qwen-edit-plus", **settings)

    return make


@pytest.fixture
def policy(pipeline):
    def make(model, transformer=None, **settings):
        config = PolicyConfig(**({"model": model, "resolution": SIZE} | settings))
        return policy_class(model)(pipeline(model, **(transformer or {})), config)

    return make


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def sessions(count, turns=2):
    said = [tuple(Turn(text) for text in (WORDS[i % 2] * 2)[:turns]) for i in range(count)]
    return [Session(str(i), image, said[i]) for i, image in enumerate(pictures(count))]


# ----------------------------------------------------------------------- the pipelines' own numbers


def stock(pipe, condition, monkeypatch):
    """The pipeline as a function (images, prompt, settings) -> (latents, image), with conditions of
    size `condition` where it would take about a million pixels, and with token types for its text
    encoder (see qwen_edit.py)."""
    module = importlib.import_module(type(pipe).__module__)
    several = type(pipe).__name__ in ("QwenImageEditPlusPipeline", "QwenImage21Pipeline")
    own, area = module.calculate_dimensions, 1024 * 1024

    def dimensions(target, ratio):
        given = own(target, ratio)
        return (*condition[::-1], *given[2:]) if target == area else given

    monkeypatch.setattr(module, "calculate_dimensions", dimensions)
    encoder, forward = pipe.text_encoder, pipe.text_encoder.forward

    @functools.wraps(forward)
    def typed(*args, input_ids, **given):
        types = (input_ids == encoder.config.image_token_id).int()
        return forward(*args, input_ids=input_ids, **({"mm_token_type_ids": types} | given))

    monkeypatch.setattr(encoder, "forward", typed)

    def run(images, prompt, **settings):
        seen = [Image.fromarray(image) for image in images]
        size = {"height": SIZE[0], "width": SIZE[1]}
        if "height" not in inspect.signature(pipe.__call__).parameters:  # LongCat: the condition's
            size = {}
        call = functools.partial(
            pipe,
            image=seen if several else seen[0],
            prompt=prompt,
            num_inference_steps=STEPS,
            **size,
            **settings,
        )
        image = call(output_type="np").images
        if image.shape[-1] == 4:  # on white
            image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
        return call(output_type="latent").images, image

    return run


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "model, transformer",
    [
        (MODELS[0], {}),
        (MODELS[1], {}),
        (MODELS[1], LATEST),
        ("longcat-edit", {}),
        ("qwen-image-2.1", {}),
    ],
)
def test_an_ode_rollout_of_two_turns_is_the_stock_pipeline_twice(
    policy, model, transformer, guidance, monkeypatch
):
    """With guidance, with conditions of another size, and for Plus and 2.1 with the source beside
    the previous output and a reference of the session's. The latents differ by rounding alone (a
    sum of eight layers' products: 1e-5 of about 1)."""
    # LongCat has one size for all; the other's are multiples of 32.
    condition = {"longcat-edit": SIZE, "qwen-image-2.1": (32, 64)}.get(model, CONDITION)
    ours = policy(
        model,
        transformer,
        guidance=guidance,
        condition_resolution=condition,
        keep_source=model in ("qwen-edit-plus", "qwen-image-2.1"),
    )
    (session,) = sessions(1)
    several = ours.config.keep_source
    if several:  # and a user's own further image, behind what the session has
        session = dataclasses.replace(session, references=(pictures(1, seed=5)[0],))
    else:
        problem = "1 images beside the session's (accepted with policy.model {}: none)"
        assert references_problem(ours, model, 1) == problem.format(model)
    sampler, seeds = make_sampler(STEPS, own=ours.sigmas), Seeds(0, "test")
    chunk = rollout_chunk(ours, Chunk([session], [0], 1), sampler, seeds, ours.config)
    theirs, image = stock(ours.pipe, condition, monkeypatch), session.image
    for turn, record in enumerate(chunk.turns):
        noise = philox_normal(
            seeds.initial(chunk, record.rollout, turn), INITIAL_STEP, ours.latent_shape
        )
        images = [image, session.image] if turn and several else [image]
        images += session.references
        settings = {ours.guidance_argument: guidance}
        settings["negative_prompt"] = ours.negative if guidance > 1 else None
        latents, pixels = theirs(images, session.turns[turn].instruction, latents=noise, **settings)
        torch.testing.assert_close(record.x0, latents, rtol=0, atol=1e-5)
        assert (
            np.abs(record.images / 255 - pixels).max() <= 0.5 / 255 + 1e-4
        )  # ours are whole numbers
        assert (record.x0 - noise).abs().mean() > 0.3
        image = record.images[0]


@pytest.mark.parametrize(
    "model",
    [
        *MODELS,
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("longcat-edit", "qwen-image-2.1")
        ),
    ],
)
def test_the_comparison_above_would_notice(policy, model):
    """What could be forgotten moves the latents by far more than rounding."""
    (session,) = sessions(1)

    def latents(words=None, **settings):
        condition = (32, 64) if model == "qwen-image-2.1" else CONDITION
        ours = policy(
            model,
            settings.pop("transformer", None),
            **({"guidance": 4.0, "condition_resolution": condition} | settings),
        )
        said = session if words is None else dataclasses.replace(session, turns=(Turn(words),))
        sampler = make_sampler(STEPS, own=ours.sigmas)
        return (
            rollout_chunk(ours, Chunk([said], [0], 1), sampler, Seeds(0, "test"), ours.config)
            .turns[0]
            .x0
        )

    right = latents()
    for wrong in (
        {"guidance": 1.0},
        {"renorm": "channel"},
        {"negative_prompt": "ugly"},
        {"condition_resolution": SIZE},
        {"words": "make the square darker"},
        *([{"transformer": LATEST}] if model in MODELS else []),
    ):
        assert (latents(**wrong) - right).abs().max() > 1e-3, wrong


def test_the_text_encoder_sees_the_image_and_the_mode_of_its_size(policy):
    for model, seen in (("qwen-edit", CONDITION), ("qwen-edit-plus", (320, 480))):
        ours = policy(model, condition_resolution=CONDITION)
        one, other = (
            ours.instruct(ours.encode(pictures(1, seed=seed)), ["brighter"]) for seed in (0, 1)
        )
        assert one.images[0].shape == (1, *seen, 3)
        assert (one.prompt["words"] - other.prompt["words"]).abs().mean() > 1e-2


@pytest.mark.parametrize(
    "model, transformer",
    [("qwen-edit-plus", {}), ("qwen-edit-plus", LATEST), ("qwen-image-2.1", {})],
)
def test_a_batch_is_its_samples_one_by_one(policy, model, transformer):
    ours = policy(model, transformer, guidance=4.0, keep_source=True)
    texts = ["brighter", "remove the red square on the left, and then the circle", "a b c"]
    images = pictures(3)
    x, sigma = torch.randn(3, *ours.latent_shape), torch.tensor([0.9, 0.5, 0.2])
    batch = ours.instruct(ours.encode(images), texts)
    alone = [ours.instruct(ours.encode(images[i : i + 1]), texts[i : i + 1]) for i in range(3)]
    lengths = batch.prompt["mask"].sum(1)
    assert lengths.unique().numel() == 3 and lengths.tolist() == [
        a.prompt["words"].shape[1] for a in alone
    ]

    def velocity(context, at=slice(None), by=ours):
        with torch.no_grad():
            v = by.velocity(x[at], sigma[at], context)
        return torch.stack([v.v, v.guidance["v_uncond"]])

    expected = torch.cat([velocity(a, slice(i, i + 1)) for i, a in enumerate(alone)], 1)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    close(velocity(batch), expected)
    close(velocity(ours.join(alone)), expected)
    close(velocity(ours.select(batch, torch.tensor([2, 0])), [2, 0]), expected[:, [2, 0]])
    both = policy_class(model)(ours.pipe, dataclasses.replace(ours.config, branches="together"))
    close(velocity(batch, by=both), expected)
    if model in MODELS:
        longer = ours.bucket(batch)
        assert (
            longer.prompt["words"].shape[1] == 64
            and longer.prompt["mask"].sum(1).tolist() == lengths.tolist()
        )
        close(velocity(longer), expected)
    later = ours.instruct(ours.append(batch, images[::-1].copy()), texts)  # two images from here on
    mixed = ours.join([later, batch])
    assert isinstance(mixed, MixedContext) and len(later.conditions) == 2
    picked = velocity(ours.select(mixed, torch.tensor([0, 4, 2])), [0, 1, 2])
    close(picked, torch.stack([velocity(later)[:, 0], expected[:, 1], velocity(later)[:, 2]], 1))


def test_words_and_images_are_read_once_and_never_between_denoising_steps(
    policy, monkeypatch, tmp_path
):
    ours = policy("qwen-edit", guidance=4.0, cache=str(tmp_path))
    calls = {"text": 0, "image": 0}

    def counted(owner, name, what):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            calls[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(ours.pipe.text_encoder.model, "forward", "text")
    counted(ours.pipe.vae, "encode", "image")
    chunk = Chunk(sessions(2), [0, 1], 4)
    sampler = make_sampler(STEPS, own=ours.sigmas, dynamics="cps", noise_level=0.7, window=2)
    rollout_chunk(ours, chunk, sampler, Seeds(0, "test"), ours.config)
    # A prompt and the negative one for every image: two sources, then eight outputs.
    assert calls == {"text": 2 * (2 + 8), "image": 1 + 1}
    rollout_chunk(ours, chunk, sampler, Seeds(0, "test"), ours.config)
    assert calls == {"text": 2 * (2 + 8), "image": 1 + 1}
    kept = [path.parent.name.split("-")[0] for path in tmp_path.rglob("*.safetensors")]
    assert Counter(kept) == {"texts": 2 * 2, "images": 2}  # sources, and what is said of them


@pytest.mark.parametrize(
    "model, settings, message",
    [
        (
            "qwen-edit",
            {"keep_source": True},
            "policy.keep_source: True (accepted with policy.model qwen-edit: False",
        ),
        (
            "qwen-edit",
            {"history": 2},
            "policy.history: 2 (accepted with policy.model qwen-edit: 1; it reads one image",
        ),
        (
            "qwen-edit-plus",
            {"history": 0},
            "policy.history: 0 (accepted with policy.model qwen-edit-plus: at least 1",
        ),
        (
            "qwen-edit",
            {"guidance": 0.5},
            "policy.guidance: 0.5 (accepted with policy.model qwen-edit: 1",
        ),
        (
            "qwen-edit-plus",
            {"guidance_embed": 3.5},
            "policy.guidance_embed: 3.5 (accepted with policy.model",
        ),
        (
            "qwen-image-2.1",
            {"resolution": (64, 80)},
            "policy.resolution: [64, 80] (accepted with policy.model qwen-image-2.1: multiples of",
        ),
        (
            "longcat-edit",
            {"keep_source": True},
            "policy.keep_source: True (accepted with policy.model longcat-edit: False; it reads",
        ),
        (
            "qwen-edit-plus",
            {"resolution": (64, 72)},
            "policy.resolution: [64, 72] (accepted with policy.model",
        ),
    ],
)
def test_settings_that_the_model_cannot_follow_are_refused(policy, model, settings, message):
    with pytest.raises(ConfigError) as error:
        policy(model, **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- training


class Brightness:
    names = ("bright",)

    def __call__(self, session, images):
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


@pytest.fixture
def settings(beside, pipeline, tmp_path):
    """A run on files alone: a pipeline's folder and a set of sessions of three turns."""

    def make(model, transformer=None, **changes):
        weights = tmp_path / model
        if not weights.exists():
            beside("tiny_qwen").save_pipeline(pipeline(model, **(transformer or {})), weights)
        size = (32, 64) if model == "qwen-image-2.1" else (32, 48)
        said = [
            dataclasses.replace(s, image=pictures(1, size, i)[0])
            for i, s in enumerate(sessions(2, turns=3))
        ]
        values = {
            "out": str(tmp_path / "run"),
            "data": {"path": str(save_sessions(said, tmp_path / "data"))},
            "policy": {"model": model, "weights": str(weights), "resolution": size, "lora_rank": 4},
            "rollout": {
                "sessions": 2,
                "siblings": 4,
                "steps": 3,
                "window": 1,
                "groups_per_batch": 2,
            },
            "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
            "train": {"iterations": 2, "lr": 1e-3, "lr_decay": 1.0, "ema": None},
            "eval": {"sessions": 2, "strips": 1},
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        return replace_nested(Config(), values)

    return make


def rows(run, event):
    return [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == event]


def rises(run):
    """The mean over sessions at every turn; untrained weights give the same numbers before and
    after."""
    before, after = ([turn["mean"] for turn in row["reward_turn"]] for row in rows(run, "eval"))
    return len(before) == 3 and all(b > a + 0.01 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "transformer, iterations", [({}, 6), pytest.param(LATEST, 12, marks=pytest.mark.exhaustive)]
)
def test_brightness_rises_by_grpo_with_guidance_and_the_source_beside_the_output(
    settings, transformer, iterations
):
    policy = {"keep_source": True, "guidance": 2.0}
    run = train(
        settings(
            "qwen-edit-plus",
            transformer,
            policy=policy,
            train={"iterations": iterations, "lr": 3e-2},
        ),
        reward=Brightness(),
    )
    assert rises(run) and rows(run, "train")[0]["ratio_error"] <= 1e-6
    assert (run / "policy" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "model, transformer",
    [("qwen-edit", {}), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in SINCE)],
)
def test_brightness_rises_by_nft(settings, model, transformer):
    config = settings(
        model,
        transformer,
        policy={"lora_rank": 0},  # and so all weights
        rollout={"window": 0, "shared_noise": False},
        train={"iterations": 6, "lr": 2e-2, "loss": "nft", "old_decay": 0.0},
    )
    assert rises(train(config, reward=Brightness()))


@pytest.mark.parametrize(
    "made",
    [("qwen-edit",), *(pytest.param(more, marks=pytest.mark.exhaustive) for more in SINCE)],
)
def test_a_run_that_goes_on_is_bitwise_the_run_that_did_not_stop(settings, tmp_path, made):
    whole = train(settings(*made, out=str(tmp_path / "whole")), reward=Brightness())
    train(settings(*made, train={"iterations": 1}), reward=Brightness())
    run = train(settings(*made), reward=Brightness())
    one, two = (
        load_file(r / "checkpoints" / "step_000002" / "policy.safetensors") for r in (whole, run)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(value.any()) for name, value in one.items() if ".lora_B." in name)
    first, second = (
        {k: v for k, v in rows(r, "train")[-1].items() if k == "reward_turn"} for r in (whole, run)
    )
    assert first == second


@pytest.mark.parametrize("model", ("qwen-edit", "longcat-edit", "qwen-image-2.1"))
def test_a_trained_lora_is_loaded_again_from_its_folder(settings, model):
    few = {}
    if model not in MODELS:
        few["policy"] = {"guidance": 2.0, "text_tokens": 48}
        few["train"] = {"context_gradient": model == "qwen-image-2.1", "iterations": 1}
        few["rollout"], few["eval"] = {"siblings": 2}, {"sessions": 1}
    config = settings(model, **few)
    run = train(config, reward=Brightness())
    assert all(row["ratio_error"] <= 1e-6 for row in rows(run, "train"))
    again = load_policy(dataclasses.replace(config.policy, weights=str(run / "policy")))
    (last,) = (run / "checkpoints").glob(f"step_*{config.train.iterations}")
    saved = load_file(last / "policy.safetensors")
    own = dict(again.module.named_parameters())
    assert saved and all(torch.equal(own[name], value) for name, value in saved.items())
