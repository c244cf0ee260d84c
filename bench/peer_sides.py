"""The two sides of `bench.real_peer`: a folder that both read, our iteration, and the trainer of a
Flow-Factory checkout, each behind one call that makes an iteration and gives its seconds by phase.

What is set on the peer's objects, and why, is in `bench.real_peer`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from bench.peer_work import PHASES, Counter, Judge, Setup
from editr2.config import Config, replace_nested
from editr2.policies.load import load_policy
from editr2.policies.weights import trainable
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Calls
from editr2.rl import iteration as trainer
from editr2.rl.judging import pool_of
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes

SIZES = {"num_layers": 4, "num_single_layers": 4, "num_attention_heads": 16}

RANK, LEARNING_RATE, NOISE = 16, 3e-4, 0.7

DEFAULT_LAYERS = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2))"
)
"""The peer's default layers for this model, as our setting writes them; the gate compares the
numbers of trained weights."""

STAND_INS = ("imageio", "imageio.v3")
"""Modules that its package imports on the way and no line of this comparison uses (videos for its
logger and its data sets). An empty one stands in where the real one is not installed."""


def tiny_editors() -> Any:
    """Tiny random pipelines are the tests'."""
    path = Path(__file__).parents[1] / "tests" / "tiny_editors.py"
    spec = importlib.util.spec_from_file_location("tiny_editors", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_folder(folder: Path, setup: Setup, **sizes: int) -> None:
    """`model`, a pipeline's folder, and `data`, where each finds sessions of its own format on the
    same images. sizes: of the transformer, in place of SIZES."""
    from PIL import Image

    tiny = tiny_editors()
    tiny.kontext_pipeline(**(SIZES | sizes)).save_pretrained(folder / "model")
    (folder / "data" / "images").mkdir(parents=True)
    ours, theirs = [], []
    size = (setup.resolution, setup.resolution)
    for i, pixels in enumerate(tiny.pictures(setup.groups, size)):
        Image.fromarray(pixels).save(folder / "data" / "images" / f"{i}.png")
        said = [{"instruction": setup.said(i, turn)} for turn in range(setup.turns)]
        ours.append({"image": f"images/{i}.png", "turns": said})
        theirs.append({"image": f"{i}.png", "prompt": setup.said(i, 0)})
    for name, lines in (("sessions", ours), ("train", theirs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / f"{name}.jsonl").write_text(text)


def our_config(folder: Path, setup: Setup) -> Config:
    side = setup.resolution
    return replace_nested(
        Config(),
        {
            "data": {"path": str(folder / "data" / "sessions.jsonl")},
            "policy": {
                "model": "kontext",
                "weights": str(folder / "model"),
                "intent": False,
                "resolution": [side, side],
                "text_tokens": setup.text_tokens,
                "lora_rank": RANK,
                "lora_alpha": 2 * RANK,
                "lora_targets": DEFAULT_LAYERS,
                "dtype": setup.dtype,
                "compile": setup.compile,
            },
            "rollout": {
                "sessions": setup.groups,
                "siblings": setup.siblings,
                "groups_per_batch": setup.batch // setup.siblings,
                "steps": setup.steps,
                "dynamics": "flow-sde",
                "noise_level": NOISE,
                "window": setup.window,
                "window_schedule": "fixed",
                "shared_noise": False,  # the peer's siblings have a noise of their own each
            },
            "credit": {
                "preset": "flow-factory",
                "std": "group",  # as its Kontext recipe has it (`global_std: false`)
                "weights": {"brightness": 1.0},
                "filter": False,
                "clip": 5.0,
            },
            "train": {
                "lr": LEARNING_RATE,
                "lr_decay": 1.0,
                "betas": [0.9, 0.999],
                "weight_decay": 1e-4,
                "ema": None,
                "ratio_tolerance": 1e-5 if setup.dtype == "float32" else 1e-2,
            },
        },
    )


class Ours:
    """accelerator: the peer's. What one made later would set (how many backward passes make a step,
    for one) holds for the whole process, and so for the peer, too."""

    def __init__(self, folder: Path, setup: Setup, accelerator: Accelerator) -> None:
        self.config = our_config(folder, setup)
        self.policy: Any = load_policy(self.config.policy)
        self.source = sessions_for(self.config, self.policy)
        self.sampler = rollout_sampler(self.config.rollout, self.policy.sigmas)
        self.processes = Processes(accelerator)
        self.state = new_state(self.config.train, self.policy)
        judge = Judge(setup.judge_seconds)
        workers = setup.judge_workers if setup.judge_seconds else None
        self.reward = pool_of(adapt(judge.brightness, calls=Calls(concurrency=workers)))
        parts = self.policy.parts
        self.counter = judge.counter = Counter(
            parts["transformer"],
            parts["vae"],
            [parts[name] for name in self.policy.text_encoders],
            self.state.optimizer,
        )
        self.transformer = self.policy.module
        self.learning = 0

    def __call__(self) -> dict[str, float]:
        """Seconds by phase."""
        row = trainer.iteration(
            self.config, self.state, self.source, self.reward, self.sampler, self.processes
        )
        self.state.iteration += 1
        self.finite = [row[name] for name in ("loss", "grad_norm", "reward", "ratio_error")]
        # It leaves out who has no advantage, so this is what was trained on.
        self.learning = self.counter.now.trained_rows // self.config.rollout.window
        seconds = row["seconds"]
        return {
            "rollout": seconds["rollout"],
            "reward": seconds["reward"] + seconds["credit"],
            "train": seconds["loss"] + seconds["optimiser"],
        }

    @property
    def trained_weights(self) -> int:
        return sum(p.numel() for p in trainable(self.transformer).values())


def stand_in(names: Sequence[str] = STAND_INS) -> list[str]:
    """Puts empty modules where those of these names cannot be found; returns whose place was
    taken."""
    taken = []
    for name in names:
        package, _, child = name.rpartition(".")
        missing = package in taken or (
            name not in sys.modules and importlib.util.find_spec(name) is None
        )
        if missing:
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
            sys.modules[name] = module
            if package:
                setattr(sys.modules[package], child, module)
            taken.append(name)
    return taken


def peer_config(folder: Path, setup: Setup) -> dict[str, Any]:
    """What stands in its YAML files."""
    waits, half = bool(setup.judge_seconds), setup.dtype == "bfloat16"
    pool = {"async_reward": True, "num_workers": setup.judge_workers, "batch_size": 1}
    return {
        "mixed_precision": "bf16" if half else "no",
        "data": {
            "dataset_dir": str(folder / "data"),
            "cache_dir": str(folder / "cache"),
            "dataloader_num_workers": 0,
        },
        "model": {
            "finetune_type": "lora",
            "lora_rank": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": "default",
            "master_weight_dtype": setup.peer_adapters if half else "float32",
            "model_name_or_path": str(folder / "model"),
            "model_type": "flux1-kontext",
        },
        "log": {
            "run_name": "peer",
            "logging_backend": "none",
            "save_dir": str(folder / "peer"),
            "save_freq": 0,
            "verbose": False,
        },
        "train": {
            "trainer_type": "grpo",
            "resolution": setup.resolution,
            "condition_image_size": setup.resolution,
            "num_inference_steps": setup.steps,
            "guidance_scale": 3.5,
            "max_sequence_length": setup.text_tokens,
            "per_device_batch_size": setup.batch,
            "group_size": setup.siblings,
            "unique_sample_num_per_epoch": setup.groups,
            "gradient_step_per_epoch": 1,
            # One step for all turns; its own count would be of one of them.
            "gradient_accumulation_steps": setup.samples // setup.batch * setup.window,
            "advantage_aggregation": "sum",
            "global_std": False,
            "clip_range": 1e-4,
            "adv_clip_range": 5.0,
            "kl_beta": 0,
            "learning_rate": LEARNING_RATE,
            "adam_weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "ema_decay": 0,
            "latent_storage_dtype": "bf16" if half else "fp32",
        },
        "scheduler": {
            "dynamics_type": "Flow-SDE",
            "noise_level": NOISE,
            "num_sde_steps": setup.window,
            "sde_steps": list(range(setup.window)),
        },
        "eval": {"eval_freq": 0, "resolution": setup.resolution},
        "rewards": [
            {
                "name": "brightness",
                "reward_model": "editr2_peer_judge.Brightness",
                "device": "cpu",
                "dtype": "float32",
                **(pool if waits else {}),
            }
        ],
    }


def peer_judge(judge: Judge) -> ModuleType:
    """A module with the judge as a reward model of its kind, for its settings to name."""
    from flow_factory.rewards import PointwiseRewardModel, RewardModelOutput

    class Brightness(PointwiseRewardModel):
        use_tensor_inputs = True

        def __call__(self, prompt: list[str], image: Any, **more: Any) -> Any:
            pairs = zip(prompt, image, strict=True)
            return RewardModelOutput(
                rewards=torch.tensor([judge.score(p, float(i.float().mean())) for p, i in pairs])
            )

    module = ModuleType("editr2_peer_judge")
    vars(module)["Brightness"] = Brightness
    return module


def walked(adapter: Any, setup: Setup) -> Callable[..., list[Any]]:
    """In place of `adapter.inference`, which its trainer calls for a batch: the same once a turn,
    each on the outputs of the one before. A turn of a group is a group of its own to its
    advantages, which tell groups by prompt and condition: its siblings have the source there. Words
    are read once, as its data set does with those of the first turn."""
    infer = adapter.inference
    groups = {setup.said(group, 0): group for group in range(setup.groups)}

    @functools.cache
    def read(said: str) -> dict[str, Any]:
        words: dict[str, Any] = adapter.encode_prompt(
            prompt=[said], max_sequence_length=setup.text_tokens
        )
        return words

    @functools.wraps(infer)  # its trainer asks what it takes
    def walk(**given: Any) -> list[Any]:
        first = before = infer(**given)
        samples = list(first)
        made = ("images", "condition_images", "image_latents", "image_ids")
        same = {name: value for name, value in given.items() if name not in made}
        for turn in range(1, setup.turns):
            said = [setup.said(groups[prompt], turn) for prompt in given["prompt"]]
            words = [read(text) for text in said]
            read_once = {name: torch.cat([w[name] for w in words]) for name in words[0]}
            turned = {**same, **read_once, "prompt": said}
            before = infer(**turned, images=[sample.image for sample in before])
            for sample, source in zip(before, first, strict=True):
                sample.condition_images = source.condition_images
            samples += before
        return samples

    return walk


class Peer:
    """Needs `flow_factory` to be importable."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from flow_factory.hparams import Arguments
        from flow_factory.trainers import loader

        judge = Judge(setup.judge_seconds)
        sys.modules["editr2_peer_judge"] = peer_judge(judge)
        load_model = loader.load_model

        def loaded(**given: Any) -> Any:
            adapter = load_model(**given)
            adapter._has_warned_multi_image = True
            return adapter

        with mock.patch.object(loader, "load_model", loaded):
            self.trainer: Any = loader.load_trainer(Arguments.from_dict(peer_config(folder, setup)))
        if setup.turns > 1:
            adapter = self.trainer.adapter
            adapter.inference = walked(adapter, setup)
        if setup.dtype == "float32":
            self.trainer.autocast = functools.partial(torch.autocast, "cpu", enabled=False)
        pipe = self.trainer.adapter.pipeline
        (self.transformer,) = [
            module
            for module in self.trainer.adapter.transformer.modules()
            if type(module).__name__ == "FluxTransformer2DModel"
        ]
        self.counter = judge.counter = Counter(
            self.transformer,
            pipe.vae,
            [pipe.text_encoder, pipe.text_encoder_2],
            self.trainer.optimizer.optimizer,
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.learning, self.finite = 0, list[float]()
        for name, phase in zip(("sample", "prepare_feedback", "optimize"), PHASES, strict=True):
            setattr(self.trainer, name, self._timed(getattr(self.trainer, name), phase))
        self.trainer.log_data = self._logged

    def __call__(self) -> dict[str, float]:
        self.seconds.clear()
        self.finite.clear()
        self.trainer.training_args.max_epochs = self.trainer.epoch + 1
        self.trainer.start()
        return dict(self.seconds)

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            if phase == "train":
                pulls = [float(sample.extra_kwargs["advantage"]) for sample in given[0]]
                self.learning = sum(pull != 0 for pull in pulls)
            start = time.perf_counter()
            try:
                return method(*given)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        return timed

    def _logged(self, data: dict[str, Any], step: int) -> None:
        """In place of its line on the terminal."""
        for value in data.values():
            with contextlib.suppress(TypeError, ValueError):  # it logs images and lists, too
                self.finite.append(float(value))

    @property
    def trained_weights(self) -> int:
        return sum(p.numel() for p in self.transformer.parameters() if p.requires_grad)
