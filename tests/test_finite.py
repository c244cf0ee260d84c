"""Nothing that is not finite passes: weights when loaded, what a turn makes, weights after a step,
checkpoints.

Every row of the tables ends in one line that names what it is, from each command that meets it, and
leaves what was saved before.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import editr2.policies.load as load
import editr2.rl.compiled_step as capture
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, RolloutConfig, replace_nested
from editr2.errors import DataError, NonFiniteError
from editr2.policies.adapters import LORA_FILE
from editr2.policies.base import Velocity, to_bytes
from editr2.policies.finite import LARGEST, unusable
from editr2.policies.unified import pretrain
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.rewards.base import Score
from editr2.rl.compiled_step import Graphs
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.rl.state import new_state
from editr2.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from editr2.sessions.source import HELDOUT_SEED
from editr2.training import train
from editr2.worlds import shapes

NAN, INF = float("nan"), float("inf")
COMMANDS = ["train", "eval", "rollout"]
SMALL = {
    "rollout": {
        "sessions": 2,
        "siblings": 3,
        "turns": 2,
        "steps": 3,
        "window": 1,
        "groups_per_batch": 2,
    },
    "train": {"iterations": 2, "packed": "off", "lr": 1e-3, "ema": None},
    "eval": {"sessions": 2, "turns": 2, "strips": 1},
    "policy": {"intent_tokens": 3},
    "checkpoint": {"every": 1},
}


def tiny(seed: int = 0) -> UnifiedPolicy:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "frequency_size": 8,
    }
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=seed
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return policy


BRIGHT = {"credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}}}


class Brightness:
    names = ("bright",)

    def __call__(self, session, images):
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


def flags(values: dict, prefix: str = "") -> list[str]:
    words = []
    for key, value in values.items():
        if isinstance(value, dict):
            words += flags(value, f"{prefix}{key}.")
        else:
            words.append(f"--{prefix}{key}={'null' if value is None else value}")
    return words


def refused(capsys: pytest.CaptureFixture, command: str, *words: str) -> str:
    """The one line that a command ends with."""
    assert main([command, *flags(SMALL), *words]) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in said.err, said.err
    assert "turn    " not in said.out and "report:" not in said.out  # no scores, no report
    return lines[-1].removeprefix("error: ")


# ----------------------------------------------------------------------------------- loaded weights


def poison(file: Path, name: str, value: float) -> None:
    """One number of a tensor in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    file.unlink()  # it is a link to the whole one's
    save_file(tensors, file, metadata=metadata)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, beside):
    """By name a folder of weights that are whole: the unified model's, a pipeline's, a LoRA's and a
    transformer's."""
    root = tmp_path_factory.mktemp("whole")
    tiny().save(root / "unified")
    editors = beside("tiny_editors")
    editors.kontext_pipeline().save_pretrained(root / "kontext")
    editors.klein_pipeline().save_pretrained(root / "klein")
    for i, image in enumerate(editors.pictures(2, (32, 32))):
        Image.fromarray(image).save(root / f"{i}.png")
    lines = [
        {"id": f"s{i}", "image": f"{i}.png", "turns": [{"instruction": "a"}] * 2} for i in range(2)
    ]
    (root / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, rank in (("lora", 2), ("trained", 0)):
        config = PolicyConfig(
            model="kontext",
            weights=str(root / "kontext"),
            resolution=(32, 32),
            text_tokens=32,
            lora_rank=rank,
        )
        load.load_policy(config).save(root / name)
    return root


DIFFUSERS = "diffusion_pytorch_model.safetensors"
LOADED = {
    # What of which folder is not finite -> how it is named.
    "unified: of the images": ("unified", "model.safetensors", "llm2vae.weight", NAN),
    "unified: of the text": ("unified", "model.safetensors", "language_model.lm_head.weight", INF),
    "unified: beyond float32's squares": ("unified", "model.safetensors", "vae2llm.bias", -1e30),
    "transformer": ("kontext", f"transformer/{DIFFUSERS}", "x_embedder.weight", NAN),
    "autoencoder": ("kontext", f"vae/{DIFFUSERS}", "decoder.conv_out.weight", NAN),
    "text encoder": ("kontext", "text_encoder/model.safetensors", "final_layer_norm.weight", INF),
    "second text encoder": ("kontext", "text_encoder_2/model.safetensors", "shared.weight", NAN),
    "a buffer": ("klein", f"vae/{DIFFUSERS}", "bn.running_mean", NAN),
    "LoRA": (
        "lora",
        LORA_FILE,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        NAN,
    ),
    "trained transformer": ("trained", f"transformer/{DIFFUSERS}", "norm_out.linear.bias", -INF),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", LOADED)
def test_loaded_weights_are_finite(case, command, whole, tmp_path, capsys):
    folder, file, name, value = LOADED[case]
    weights = tmp_path / folder
    shutil.copytree(whole / folder, weights, copy_function=os.link)
    found = _stored_name(weights / file, name)
    poison(weights / file, found, value)
    words = [f"--policy.weights={weights}", f"--out={tmp_path / 'run'}"]
    if folder != "unified":
        model = "klein" if folder == "klein" else "kontext"
        words += [
            f"--policy.model={model}",
            "--policy.resolution=[32,32]",
            "--policy.text_tokens=32",
        ]
        words += [
            f"--data={whole / 'sessions.jsonl'}",
            "--reward.function=editr2.rewards.brightness:Brightness",
        ]
        words += ["--credit.weights={'brightness': 1.0}", "--credit.preset=flow-grpo"]
    said = refused(capsys, command, *words)
    last = found.split(".")[-3 if ".lora_" in found else -2]
    assert (
        said.startswith((f"policy.weights: {weights}: ", f"{weights / file}: "))
        and last in said
        and "finite" in said
    )
    assert (
        not (tmp_path / "run" / "outputs.jsonl").exists()
        and not (tmp_path / "run" / "metrics.jsonl").exists()
    )


def _stored_name(file: Path, name: str) -> str:
    (found,) = [key for key in load_file(file) if key == name or key.endswith(f".{name}")]
    return found


@pytest.mark.parametrize("lora", [0, 2])
def test_a_policy_handed_to_train_is_looked_at_too(lora, tmp_path):
    policy = tiny()
    with torch.no_grad():
        policy.module.vae2llm.weight[0, 0] = NAN
    with pytest.raises(NonFiniteError, match=r"^policy: UnifiedPolicy: vae2llm\.weight"):
        train(replace_nested(Config(), SMALL | {"out": str(tmp_path / "run")}), policy=policy)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [NAN, 1e5])
def test_weights_that_would_not_be_finite_on_the_disk_are_not_written(value, tmp_path):
    policy = tiny()
    with torch.no_grad():
        policy.module.vae2llm.bias[0] = value
    with pytest.raises(NonFiniteError, match=r"policy: vae2llm\.bias: .* in torch\.float16"):
        policy.save(tmp_path / "policy", torch.float16)
    assert not (tmp_path / "policy").exists()


def test_pretraining_stops_at_a_gradient_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain,
        "training_loss",
        lambda policy, *given: (policy.module.vae2llm.bias.sum() * NAN,) * 2,
    )
    with pytest.raises(NonFiniteError, match="step 1: gradient"):
        pretrain.pretrain(pretrain.PretrainConfig(steps=2, batch=2), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ([1.0, 2.0], False),
        ([NAN, 2.0], True),
        ([1.0, INF], True),
        ([-INF, 0.0], True),
        ([1.0, 2 * LARGEST], True),
        ([LARGEST / 2, -LARGEST / 2], False),
    ],
)
@pytest.mark.parametrize(
    "made",
    [
        torch.tensor,
        lambda v: torch.tensor(v, dtype=torch.bfloat16),
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: (
            torch.tensor(v).repeat(40_000)[1::2].view(4, -1).T
            if v[0] == v[1]
            else torch.tensor([v] * 9).T
        ),
    ],
    ids=["float32", "bfloat16", "float64", "strided"],
)
def test_what_counts_as_finite(made, values, bad):
    others = [
        ("whole", torch.arange(3)),
        ("none", torch.empty(0, 3)),
        ("elsewhere", torch.empty(2, device="meta")),
    ]
    assert unusable(
        [*others, ("good", torch.ones(3)), ("here", made(values)), ("after", torch.full((2,), NAN))]
    ) == ("here" if bad else "after")
    assert unusable([*others, ("here", torch.tensor([[NAN]])[:0])]) is None


# -------------------------------------------------------------------------------- what a turn makes


class Plugin(UnifiedPolicy):
    """Somebody's policy. At `turn` (from 0) the last sample of the batch is spoilt as `how`
    says."""

    how, turn = "", 1
    last: "Plugin"

    def __init__(self, policy: UnifiedPolicy) -> None:
        super().__init__(policy.module, policy.codec)
        self.turns = -1
        Plugin.last = self

    def encode(self, images):
        self.turns = -1
        return super().encode(images)

    def instruct(self, context, instructions):
        self.turns += 1
        return super().instruct(context, instructions)

    def _bad(self, how: str, x: torch.Tensor, value: float) -> torch.Tensor:
        if how != self.how or self.turns != self.turn:
            return x
        spoilt = torch.zeros(len(x), *(1,) * (x.dim() - 1), device=x.device)
        spoilt[-1] = value
        return x + spoilt

    def velocity(self, x, sigma, context):
        v = super().velocity(x, sigma, context)
        if self.how in ("latents", "unguided"):  # the next velocity would tell of them
            v = dataclasses.replace(v, v=torch.zeros_like(v.v))
        for how, value in (("velocity NaN", NAN), ("velocity inf", -INF)):
            v = dataclasses.replace(v, v=self._bad(how, v.v, value))
        if self.how == "unguided":
            v = dataclasses.replace(
                v,
                guidance={
                    "v_uncond": self._bad("unguided", v.v, NAN),
                    "guidance": 2.0,
                    "renorm": "none",
                },
            )
        return v

    def pixels(self, latents):
        return self._bad("pixels", super().pixels(latents), NAN)

    def intend(self, context, questions, seeds, *, temperature, max_tokens):
        found = super().intend(
            context, questions, seeds, temperature=temperature, max_tokens=max_tokens
        )
        if self.how == "intent":
            found[-1] = dataclasses.replace(found[-1], log_prob=(-1.0, NAN))
        return found


MADE = {
    "velocity NaN": "velocity",
    "velocity inf": "velocity",
    "unguided": "velocity",
    "latents": "latents",
    "pixels": "pixels",
    "intent": "intent",
}


@pytest.fixture
def plugin(monkeypatch):
    """Makes every command's policy a `Plugin`."""
    monkeypatch.setattr(load, "load_policy", lambda config, **how: Plugin(tiny()))

    real = capture.sde_step

    def step(x, *given, **named):
        done = real(x, *given, **named)
        return done._replace(x_next=Plugin.last._bad("latents", done.x_next, INF))

    monkeypatch.setattr(capture, "sde_step", step)
    return lambda how: monkeypatch.setattr(Plugin, "how", how)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", MADE)
def test_a_turn_names_its_session_and_what_is_not_finite(how, command, plugin, tmp_path, capsys):
    plugin(how)
    said = refused(
        capsys,
        command,
        "--policy.intent=true",
        f"--out={tmp_path / 'run'}",
        "--rollout.dynamics=flow-sde",
    )
    last = shapes.make_session(
        HELDOUT_SEED, 1, split="heldout", turns=2
    ).id  # of two that go together
    assert said.startswith(f"session {last!r}, turn 2: {MADE[how]}")


@pytest.mark.parametrize("how", MADE)
def test_in_training_too_and_the_last_checkpoint_stands(how, plugin, tmp_path, capsys, monkeypatch):
    """Spoilt from the second iteration on."""
    iterations = []
    real = Seeds.window

    def window(self, chunk, rollouts, turn):
        if self.purpose == "train" and chunk.ordinals[0] >= 2:
            iterations.append(1)
            monkeypatch.setattr(Plugin, "how", how)
        return real(self, chunk, rollouts, turn)

    plugin("")
    monkeypatch.setattr(Seeds, "window", window)
    said = refused(
        capsys,
        "train",
        "--policy.intent=true",
        f"--out={tmp_path / 'run'}",
        "--rollout.dynamics=flow-sde",
    )
    assert (
        said.startswith(f"session {shapes.make_session(0, 3, turns=2).id!r}, turn 2: {MADE[how]}")
        and iterations
    )
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).iteration == 1


def rolled(policy: UnifiedPolicy, how: str) -> Chunk:
    sessions = [shapes.make_session(0, i, turns=2) for i in range(2)]
    sampler = make_sampler(4, dynamics="flow-sde", noise_level=0.7, window=2, window_range=0.75)
    rollout = RolloutConfig(capture=how)
    chunk = Chunk(sessions, [0, 1], 3)
    return rollout_chunk(
        policy, chunk, sampler, Seeds(0, "t"), PolicyConfig(intent=False), rollout=rollout
    )


def rerun(run: Callable, pool: object) -> tuple:
    """Stands in for a CUDA graph: the same code on the same tensors, written to the same
    outputs."""
    outputs = run()

    def replay() -> None:
        for own, new in zip(outputs, run(), strict=True):
            if own is not None:
                own.copy_(new)

    return outputs, replay


@pytest.mark.parametrize("how", ["off", "graph"])
def test_recorded_steps_tell_as_plain_ones(how, monkeypatch):
    """Compiled ones: `test_capture.py`."""
    kept = Graphs(None)
    monkeypatch.setattr(capture, "check_capture", lambda how, device: None)
    monkeypatch.setattr(capture, "_graphs", lambda policy: kept)
    monkeypatch.setattr(capture, "_record", rerun)
    policy = tiny()
    rolled(policy, how)
    with torch.no_grad():  # every weight and recording is where it was
        policy.module.llm2vae.bias[0] = NAN
    with pytest.raises(NonFiniteError, match=r"turn 1: velocity"):
        rolled(policy, how)


def test_a_step_of_the_groups_first_rollouts_alone_is_told_of():
    """Before the windows open; what is spoilt there comes to the siblings by the latents, not by a
    velocity."""

    class Early(UnifiedPolicy):
        def velocity(self, x, sigma, context):
            none = torch.zeros_like(x)
            spoilt = none + NAN if len(x) < 6 else none
            return Velocity(none, {"v_uncond": spoilt, "guidance": 2.0, "renorm": "none"})

    policy = tiny()
    with pytest.raises(NonFiniteError, match=r"turn 1: velocity"):
        rolled(Early(policy.module, policy.codec), "off")


def test_pixels_are_checked_before_they_become_bytes_wherever_they_are_asked_for():
    policy = Plugin(tiny())
    latents = torch.zeros(2, *policy.latent_shape)
    assert policy.decode(latents).shape == (2, 24, 24, 3)
    latents[1, 0, 0] = NAN
    with pytest.raises(NonFiniteError, match="pixels"):
        policy.decode(latents)
    with pytest.raises(NonFiniteError, match="pixels"):
        to_bytes(torch.tensor([[[[INF, 0.0, 0.0]]]]))


@pytest.mark.parametrize("value", [0.5, NAN])
def test_a_decode_that_gives_numbers_is_told_of_pixels(value):
    class Floats(UnifiedPolicy):
        pixels = None

        def decode(self, latents):
            return torch.full((len(latents), 24, 24, 3), value).numpy()

    policy = tiny()
    with pytest.raises(DataError, match=r"Floats\.decode: float32 .*accepted: uint8.*`pixels`"):
        rolled(Floats(policy.module, policy.codec), "off")


# --------------------------------------------------------------------- optimiser steps, checkpoints


def break_step(monkeypatch: pytest.MonkeyPatch, call: int, change: Callable) -> None:
    real, calls = torch.optim.AdamW.step, []

    def step(self, *given):
        calls.append(1)
        done = real(self, *given)
        if len(calls) == call:
            with torch.no_grad():
                change(self)
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def last_weight(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][-1]


STEPS = {
    "a weight": lambda o: last_weight(o).view(-1)[:1].fill_(NAN),
    "infinite": lambda o: last_weight(o).view(-1)[:1].fill_(-INF),
    "beyond float32's squares": lambda o: last_weight(o).view(-1)[:1].fill_(1e30),
    "the optimiser's state": lambda o: (
        o.state[last_weight(o)]["exp_avg_sq"].view(-1)[:1].fill_(INF)
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_nothing_is_saved_after_a_bad_step(case, tmp_path, monkeypatch):
    break_step(monkeypatch, 2, STEPS[case])
    config = replace_nested(
        Config(), SMALL | BRIGHT | {"out": str(tmp_path / "run"), "policy": {"intent": False}}
    )
    with pytest.raises(
        NonFiniteError, match=r"iteration 1.*train\.lr|step 2 is not saved: optimizer"
    ) as found:
        train(config, policy=tiny(), reward=Brightness())
    assert "\n" not in str(found.value)
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert saved.iteration == 1 and unusable(saved.tensors["policy"].items()) is None
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize("lr", [INF, 1e30, 1e38])
def test_a_learning_rate_without_bound_is_stopped_at_its_first_step(lr, tmp_path, monkeypatch):
    """As a configuration of one's own may hold, which the rules of the settings did not see."""
    monkeypatch.setattr("editr2.rl.loop.check_config", lambda config: config)
    monkeypatch.setattr("editr2.rl.loop.check_run", lambda *given, **named: None)
    config = replace_nested(
        Config(), SMALL | BRIGHT | {"out": str(tmp_path / "run"), "policy": {"intent": False}}
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=lr))
    with pytest.raises(NonFiniteError, match=r"iteration 0.*: .*train\.lr"):
        train(config, policy=tiny(), reward=Brightness())
    assert not (tmp_path / "run" / "checkpoints").exists()


GROUPS = ["policy", "ema", "reference", "optimizer"]


def spoil_checkpoint(path: Path, group: str) -> None:
    saved = load_checkpoint(path)
    optimizer = saved.optimizer
    if group == "optimizer":
        next(iter(optimizer["state"].values()))["exp_avg"].view(-1)[0] = NAN
    else:
        saved.tensors[group]["llm2vae.weight"].view(-1)[0] = NAN
    save_checkpoint(
        path.parent,
        saved.iteration,
        tensors=saved.tensors,
        optimizer=optimizer,
        state=saved.state,
        rng=saved.rng,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, whole):
    """A run with every copy of the weights there is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = [
        *flags(SMALL),
        f"--policy.weights={whole / 'unified'}",
        "--train.ema=0.5",
        "--train.kl_weight=0.1",
    ]
    assert main(["train", *words, f"--out={run}"]) == 0
    return run, words


@pytest.mark.parametrize("group", GROUPS)
def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(group, finished, tmp_path, capsys):
    run, words = finished
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_000002"
    spoil_checkpoint(path, group)
    capsys.readouterr()
    assert main(["train", *words, f"--out={tmp_path / 'run'}", "--train.iterations=3"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {path}: {group}.") and "finite" in line
    assert load_checkpoint(path).iteration == 2  # as it was


@pytest.mark.parametrize("group", ["policy", "ema"])
def test_nor_is_it_exported(group, finished, tmp_path, capsys):
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_000002"
    spoil_checkpoint(path, group)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert (
        f"{path}: {group}.llm2vae.weight" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    policy = tiny()
    state = new_state(replace_nested(Config(), SMALL).train, policy)
    state.save(tmp_path, Config())
    with torch.no_grad():
        policy.module.llm2vae.bias[0] = INF
    with pytest.raises(NonFiniteError, match=r"policy\.llm2vae\.bias"):
        state.save(tmp_path, Config())
    assert unusable(load_checkpoint(latest_checkpoint(tmp_path)).tensors["policy"].items()) is None
