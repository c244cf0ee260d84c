"""Flow-Factory's own trainer and ours, in turns and in one process, on the same weights and
sessions.

    python -m bench real_peer CHECKOUT [--dtype bfloat16] [--judge-seconds 0.5] [--ties] ...

CHECKOUT is a clone of github.com/X-GenGroup/Flow-Factory; it is imported from there as it is, and
nothing of it is kept here. What both get: a folder with a random FLUX.1-Kontext (13.9 M parameters
in its transformer), sessions of one turn, LoRA on the peer's default layers, GRPO, flow-SDE with
its window at the first steps, true samples and no EMA or KL, one optimiser step an iteration, the
same batch in rollout and training. A round is an iteration of each, and every other round begins
with the other one. Each runs its own loop: `GRPOTrainer.start` for one epoch, and
`editr2.rl.iteration`.

Gate, before a row is written: the transformers answer alike before the first update, every
iteration makes the calls it should (all are counted, timed ones too), all that is reported is
finite, and both learn from the same samples. With --ties the judge calls all siblings of every
second group equal: ours leaves those rollouts out of training, the peer multiplies them by zero,
and the gate knows both counts.

What differs from the peer's shipped recipe (examples/grpo/lora/flux1_kontext), and why:

- its batch is 1, here it is --batch, as ours; its loader's 16 workers are 0 and its progress bars
  off, which makes it faster here;
- in float32 its `autocast` is replaced on the trainer's object by one that is off: whatever
  `mixed_precision` says, it would compute in bfloat16. Adapters are then trained in float32; in
  bfloat16 they are bfloat16, its default, unless --peer-adapters says otherwise;
- latents are stored in the dtype of the comparison, not in fp16, which autocast on a CPU does not
  concatenate with bfloat16;
- its Kontext adapter is told that it has warned of several condition images: at a0b2bc5 the line
  that would warn takes the length of a PIL image and ends every run on images;
- a judge that waits (--judge-seconds) is called by its thread pool: `async_reward: true`,
  `num_workers: 4` as in examples/template/sd3_5/async_reward.yaml, a call an image (`batch_size:
  1`); ours has `reward.concurrency` of as many. Without waiting, both judge on the main thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from bench import frame
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

OURS, PEER = "editr2", "peer Flow-Factory"
PHASES = ("rollout", "reward", "train")
SIZES = {"num_layers": 4, "num_single_layers": 4, "num_attention_heads": 16}
RANK, LEARNING_RATE, NOISE = 16, 3e-4, 0.7
TIED = "tied: "
"""How the instruction of a group begins whose siblings the judge calls equal."""

DEFAULT_LAYERS = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2))"
)
"""The peer's default layers for this model, as our setting writes them; the gate compares the
numbers of trained weights."""

STAND_INS = ("imageio", "imageio.v3")
"""Modules that its package imports on the way and no line of this comparison uses (videos for its
logger and its data sets). An empty one stands in where the real one is not installed."""

CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far the two transformers' answers may lie apart, of the largest: the same calls of torch,
rounded once more or less where one casts and the other autocasts."""


@dataclass(frozen=True)
class Setup:
    """What both get. batch: rollouts that go through the model together. peer_adapters: dtype of
    the peer's trained weights in a comparison in bfloat16; ours are float32."""

    dtype: str = "float32"
    groups: int = 2
    siblings: int = 4
    batch: int = 8
    steps: int = 4
    window: int = 2
    resolution: int = 128
    text_tokens: int = 64
    judge_seconds: float = 0.0
    judge_workers: int = 4
    ties: bool = False
    peer_adapters: str = "bfloat16"

    @property
    def rollouts(self) -> int:
        return self.groups * self.siblings

    @property
    def tied(self) -> int:
        """Rollouts without an advantage."""
        return self.groups // 2 * self.siblings if self.ties else 0

    def problems(self) -> Iterator[str]:
        if self.rollouts % self.batch or self.batch % self.siblings:
            yield f"--batch: {self.batch} (accepted: whole groups, all batches of one size)"
        if self.ties and self.batch not in (self.siblings, self.rollouts):
            yield f"--batch: {self.batch} (accepted with --ties: one group, or all)"
        if not 1 <= self.window < self.steps:
            yield f"--window: {self.window} (accepted: 1 to --steps - 1)"
        if self.resolution % 16:
            yield f"--resolution: {self.resolution} (accepted: multiples of 16)"

    def counts(self, ours: bool) -> Counts:
        """Of one iteration, both without what is encoded once and kept."""
        batches = self.rollouts // self.batch
        learn = self.rollouts - (self.tied if ours else 0)
        # With a group a batch, ours has batches in which nobody has an advantage.
        empty = self.tied // self.batch if ours and self.batch == self.siblings else 0
        passes = (batches - empty) * self.window
        return Counts(
            forwards=batches * self.steps,
            forward_rows=self.rollouts * self.steps,
            trained=passes,
            trained_rows=learn * self.window,
            backwards=passes,
            steps=1,
            decoded=self.rollouts,
            judged=self.rollouts,
        )

    def is_tied(self, group: int) -> bool:
        return self.ties and group % 2 == 1


# ---------------------------------------------------------------------------------------- counting


@dataclass
class Counts:
    """Calls of the transformer without gradient (forwards), with (trained) and back, and how many
    samples they had; optimiser steps; images through the autoencoder, texts through the text
    encoders, answers of the judge."""

    forwards: int = 0
    forward_rows: int = 0
    trained: int = 0
    trained_rows: int = 0
    backwards: int = 0
    steps: int = 0
    encoded: int = 0
    decoded: int = 0
    texts: int = 0
    judged: int = 0


class Counter:
    """Counts what goes through a pipeline's components and an optimiser from now on; `take` gives
    it and starts at 0."""

    def __init__(
        self,
        transformer: nn.Module,
        vae: Any,
        text_encoders: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.now = Counts()
        transformer.register_forward_hook(self._ran, with_kwargs=True)
        for encoder in text_encoders:
            encoder.register_forward_hook(self._read, with_kwargs=True)
        optimizer.register_step_post_hook(lambda *given: self.add("steps", 1))
        for method, name in (("encode", "encoded"), ("decode", "decoded")):
            setattr(vae, method, self._wrapped(getattr(vae, method), name))

    def take(self) -> Counts:
        now, self.now = self.now, Counts()
        return now

    def add(self, name: str, count: int) -> None:
        setattr(self.now, name, getattr(self.now, name) + count)

    def _ran(self, module: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
        rows, answer = len(named["hidden_states"]), next(frame.tensors(out))
        kind = "trained" if answer.requires_grad else "forwards"
        self.add(kind, 1)
        self.add("trained_rows" if answer.requires_grad else "forward_rows", rows)
        if answer.requires_grad:
            answer.register_hook(lambda gradient: self.add("backwards", 1))

    def _read(self, module: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
        self.add("texts", len(next(frame.tensors([given, named]))))

    def _wrapped(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(images: torch.Tensor, *given: Any, **named: Any) -> Any:
            self.add(name, len(images))
            return method(images, *given, **named)

        return counted


class Judge:
    """Mean brightness, after a wait; of the tied groups the same for everyone."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.counter: Counter | None = None

    def score(self, instruction: str, brightness: float) -> float:
        if self.seconds:
            time.sleep(self.seconds)
        assert self.counter is not None
        self.counter.add("judged", 1)
        return 0.5 if instruction.startswith(TIED) else brightness

    def brightness(self, session: Any, images: np.ndarray) -> list[float]:
        """Ours: a session and its outputs."""
        (turn,) = session.turns
        return [self.score(turn.instruction, float(images.mean() / 255))]


# -------------------------------------------------------------------------------------- the folder


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
        said = f"{TIED if setup.is_tied(i) else ''}make it brighter, {i}"
        ours.append({"image": f"images/{i}.png", "turns": [{"instruction": said}]})
        theirs.append({"image": f"{i}.png", "prompt": said})
    for name, lines in (("sessions", ours), ("train", theirs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / f"{name}.jsonl").write_text(text)


# -------------------------------------------------------------------------------------------- ours


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


# ---------------------------------------------------------------------------------------- the peer


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


def commit_of(checkout: Path) -> str:
    """Short, with -dirty where a file of its package is not as committed."""
    git = ("git", "-C", str(checkout))
    try:
        ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        commit = ask([*git, "rev-parse", "--short=7", "HEAD"]).stdout.strip()
        changed = ask([*git, "status", "--porcelain", "--", "src"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


# ------------------------------------------------------------------------------------------- gate


class Unequal(RuntimeError):
    """The two do not do the same work, so their times say nothing."""


def answers_apart(ours: Any, peer: Any, setup: Setup) -> float:
    """The largest difference of the transformers' answers on the same input, of the largest
    answer."""
    generator = torch.Generator().manual_seed(0)
    sizes, tokens = ours.transformer.config, (setup.resolution // 16) ** 2
    dtype = getattr(torch, setup.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    given = {
        "hidden_states": normal(2, tokens, sizes.in_channels),
        "encoder_hidden_states": normal(2, setup.text_tokens, sizes.joint_attention_dim),
        "pooled_projections": normal(2, sizes.pooled_projection_dim),
        "timestep": torch.tensor([0.9, 0.3]),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(setup.text_tokens, 3),
        "return_dict": False,
    }
    found = []
    for side in (ours, peer):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found.append(side.transformer(**given)[0].float())
        side.counter.take()
    return ((found[0] - found[1]).abs().max() / found[0].abs().max()).item()


def check_iteration(name: str, side: Any, counts: Counts, setup: Setup, first: bool) -> None:
    """Raises `Unequal`. first: what is encoded once and kept may be encoded now."""
    expected = setup.counts(ours=name == OURS)
    if first or name == OURS:
        # Ours may encode sources anew; how often is reported, not demanded.
        expected = dataclasses.replace(expected, encoded=counts.encoded)
    if first:
        expected = dataclasses.replace(expected, texts=counts.texts)
    if counts != expected:
        raise Unequal(f"{name}: counted {counts} (accepted: {expected})")
    if not side.finite or not all(map(math.isfinite, side.finite)):
        raise Unequal(f"{name}: reports {side.finite} (accepted: finite numbers)")
    if side.learning != setup.rollouts - setup.tied:
        raise Unequal(
            f"{name}: learns from {side.learning} samples (accepted: {setup.rollouts - setup.tied})"
        )


@dataclass
class Seen:
    """seconds: of each round, by phase and in all. counts: of a timed iteration."""

    seconds: dict[str, list[float]]
    counts: Counts


def measure(sides: dict[str, Any], setup: Setup, rounds: int) -> dict[str, Seen]:
    """Interleaved; the first of each is the warm-up and is checked like the others."""
    seen = {name: Seen(defaultdict(list), Counts()) for name in sides}
    order = list(sides)
    for done in range(-1, rounds):
        for name in reversed(order) if done % 2 else order:
            side = sides[name]
            start = time.perf_counter()
            phases = side()
            whole = time.perf_counter() - start
            seen[name].counts = side.counter.take()
            check_iteration(name, side, seen[name].counts, setup, first=done < 0)
            if done < 0:
                continue
            for phase in PHASES:
                seen[name].seconds[phase].append(phases[phase])
            seen[name].seconds["all"].append(whole)
        if done >= 0:
            print(
                f"round {done + 1}: "
                + ", ".join(f"{n} {s.seconds['all'][-1]:.2f} s" for n, s in seen.items()),
                flush=True,
            )
    return seen


# ------------------------------------------------------------------------------------------- rows


def ratios(seen: dict[str, Seen]) -> list[float]:
    """Peer over ours, of each round."""
    pairs = zip(seen[PEER].seconds["all"], seen[OURS].seconds["all"], strict=True)
    return [peer / ours for peer, ours in pairs]


def loads() -> list[float]:
    """Of the machine: over 1 minute and over 15."""
    one, _, fifteen = os.getloadavg()
    return [round(one, 1), round(fifteen, 1)]


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(f(values), 4) for f in (statistics.median, min, max)]


def mode_of(setup: Setup) -> str:
    judge = f"{setup.judge_seconds:g} s judge" if setup.judge_seconds else "no wait for the judge"
    ties = ", half of the groups tie" if setup.ties else ""
    wide = ", peer's adapters in fp32" if setup.peer_adapters == "float32" else ""
    return f"kontext 13.9 M, batch {setup.batch}, {judge}{ties}{wide}"


def rows_of(setup: Setup, seen: dict[str, Seen], facts: dict[str, Any]) -> list[frame.Row]:
    """facts: of the peer, the same in every row."""
    where, rows = frame.environment("cpu"), []
    shape = [setup.groups, setup.siblings, setup.steps, setup.window, setup.resolution]
    for name, one in seen.items():
        p20, p50, p80 = (1000 * s for s in frame.quantiles(one.seconds["all"]))
        extra = {
            "seconds": {phase: spread(values) for phase, values in one.seconds.items()},
            "counts": asdict(one.counts),
            "peer_over_ours": spread(ratios(seen)),
            "setup": asdict(setup),
            **facts,
        }
        rows.append(
            frame.Row(
                "real_peer",
                name,
                mode_of(setup),
                shape,
                {"float32": "fp32", "bfloat16": "bf16"}[setup.dtype],
                p20,
                p50,
                p80,
                max_error=facts["answers_apart"] if name == OURS else None,
                rounds=len(one.seconds["all"]),
                extra=extra,
                **where,
            )
        )
    return rows


def text_of(rows: Sequence[frame.Row]) -> str:
    lines = [f"{rows[0].mode}, {rows[0].dtype}; seconds an iteration: median (smallest - largest)"]
    for row in rows:
        parts = [
            f"{phase} {m:.2f} ({low:.2f} - {high:.2f})"
            for phase, (m, low, high) in row.extra["seconds"].items()
        ]
        lines.append(f"{row.provider:<18} " + ", ".join(parts))
        said = ", ".join(f"{name} {n}" for name, n in row.extra["counts"].items())
        lines.append(f"{'':<18} {said}")
    m, low, high = rows[0].extra["peer_over_ours"]
    load = " and ".join(f"{n:g}" for n in rows[0].extra["load"])
    lines.append(
        f"peer / ours: {m:.2f} ({low:.2f} - {high:.2f}); load of the machine {load} (1 and 15 min)"
    )
    return "\n".join(lines)


def parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, Setup]:
    parser = argparse.ArgumentParser(
        prog="python -m bench real_peer",
        description=(__doc__ or "").split("\n\n")[0].replace("\n", " "),
    )
    parser.add_argument("checkout", type=Path, help="a clone of X-GenGroup/Flow-Factory")
    parser.add_argument("--rounds", type=int, default=5, help="after one of warm-up")
    parser.add_argument(
        "--results", type=Path, default=frame.RESULTS, help="folder of rows (bench/results)"
    )
    for field in dataclasses.fields(Setup):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "ties":
            parser.add_argument(flag, action="store_true")
        elif field.name in ("dtype", "peer_adapters"):
            parser.add_argument(flag, choices=list(CLOSE), default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = parser.parse_args(arguments)
    setup = Setup(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setup)})
    for problem in setup.problems():
        parser.error(problem)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} (accepted: 1 or more)")
    if not (options.checkout / "src" / "flow_factory" / "trainers" / "grpo.py").is_file():
        parser.error(f"{options.checkout}: no src/flow_factory there (accepted: a clone of it)")
    if torch.cuda.is_available():
        parser.error("a GPU is visible; this compares on the CPU (set CUDA_VISIBLE_DEVICES=)")
    return options, setup


def main(arguments: Sequence[str]) -> int:
    options, setup = parsed(arguments)
    sys.path.insert(0, str(options.checkout / "src"))
    taken = stand_in()
    logging.disable(logging.WARNING)
    for library in ("datasets", "diffusers", "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_folder(folder, setup)
        peer = Peer(folder, setup)
        ours = Ours(folder, setup, peer.trainer.accelerator)
        apart = answers_apart(ours, peer, setup)
        try:
            if not apart <= CLOSE[setup.dtype]:
                raise Unequal(
                    f"the transformers' answers lie {apart} apart (accepted: {CLOSE[setup.dtype]})"
                )
            if peer.trained_weights != ours.trained_weights:
                raise Unequal(
                    f"{peer.trained_weights} weights train in the peer, {ours.trained_weights} "
                    f"in ours (accepted: as many)"
                )
            seen = measure({PEER: peer, OURS: ours}, setup, options.rounds)
        except Unequal as unequal:
            print(f"real_peer: {unequal}; no row was written", file=sys.stderr)
            return 1
    facts = {
        "peer_commit": commit_of(options.checkout),
        "answers_apart": apart,
        "trained_weights": ours.trained_weights,
        "stand_ins": taken,
        "load": loads(),
    }
    rows = rows_of(setup, seen, facts)
    frame.append_rows(options.results, rows)
    print(text_of(rows))
    print(f"peer at {facts['peer_commit']}; empty modules stood in for {taken or 'none'}")
    return 0
