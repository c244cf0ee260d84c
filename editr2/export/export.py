"""A run's policy as something that other programs load, with proof that they load the same policy.

What is written the policy's class says (`editr2.policies.forms`): the LoRA that diffusers' own
pipeline loads, a diffusers folder where all weights trained or adapters are merged; the folder that
`policy.weights` takes, or adapters in peft's format.

The proof: the policy as exported predicts velocities (and log-probs of text) for fixed images,
noise and noise levels over two turns. Then the base weights are loaded anew, the export is put on
them by the loader that a user will call, and the same questions must get the same answers to the
last bit; otherwise nothing is left on the disk. So it is in bfloat16: the stock loader rounds
float32 adapters to the base's precision, and autocast did so in training. What merging rounds away
is no matter of loading; it is reported beside what training changed.

Adapters that trained on a base in float8 are proven on the base as it is published, on which they
will be loaded, and how far that is from where they trained is reported.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from editr2.config import Config, PolicyConfig
from editr2.errors import CheckpointError, ConfigError, ExportError
from editr2.export.model_card import Base, write_card
from editr2.export.result import Carried, Exported, Proof
from editr2.files import runs_near
from editr2.policies.base import Policy, Questions, TextPolicy
from editr2.policies.configured import policy_class
from editr2.policies.finite import check_state
from editr2.policies.load import load_policy
from editr2.policies.recorded import QUESTIONS, write_settings
from editr2.policies.tensor_files import ordinary_modes, writing
from editr2.policies.weights import load_trainable, remove_lora
from editr2.report.data import load_run
from editr2.run.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from editr2_kernels import philox_normal

WEIGHTS = ("ema", "live")


def export(run: Path, out: Path, *, weights: str | None = None, merge: bool = False) -> Exported:
    """Writes the newest checkpoint of a run's folder to `out`, new or empty, with a model card,
    once it is proven.

    weights: ema (the running average, which the run's evaluation scores) or live; None is ema where
    there is one. merge: add the adapters to the weights they adapt, and write all weights.

    Raises ConfigError for a folder or choice that cannot be exported, CheckpointError for a run
    without checkpoint, and ExportError when the reloaded export differs.
    """
    config, seen = read_run(run), load_run(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already (accepted: a new or empty folder)")
    if merge and not config.policy.lora_rank:
        raise ConfigError(
            "--merge: the run trained all weights (accepted with policy.lora_rank above 0)"
        )
    if merge and config.policy.quantize != "none":
        raise ConfigError(
            f"--merge: the base is quantized to {config.policy.quantize} (accepted with: none)"
        )
    saved, weights, values = _chosen(run, weights)
    kind = "merged" if merge else "lora" if config.policy.lora_rank else "full"
    # Neither changes a number's meaning, and both would be in the way of comparing bits.
    settings = replace(config.policy, compile="off", gradient_checkpointing="off")
    # What stock code loads the export runs by torch's attention.
    settings = replace(settings, attention=None, branches="apart")
    if settings.questions is not None and (run / QUESTIONS).is_file():
        settings = replace(settings, questions=str(run / QUESTIONS))
    form = policy_class(settings.model).form(settings, kind)
    policy = _load(settings)
    load_trainable(policy.module, values)
    with _appearing(out) as folder:
        trained = probe(policy)
        rounded = None
        if settings.quantize == "fp8":  # which no loader of the export will know of
            remove_lora(policy.module)
            rounded = Rounded(trained, probe(policy))
            del policy
            gc.collect()
            settings = replace(settings, quantize="none")
            policy = _load(settings)
            load_trainable(policy.module, values)
            trained = probe(policy)
        folding = form.write(policy, folder)
        ordinary_modes([folder])
        exported = probe(policy)
        del policy
        gc.collect()
        base = _load(settings)
        remove_lora(base.module)
        start = probe(base)
        proof = _proof(trained, exported, start, probe(form.load(base, folder)), rounded)
        done = Exported(
            out, kind, weights, saved.iteration, config.train.iterations, proof, folding
        )
        write_card(folder, seen, config, Base.of(base, config.policy.weights), done, form)
        origin = getattr(base, "base", config.policy.weights)
        told = replace(config, policy=replace(config.policy, quantize="none"))
        write_settings(folder, told, origin, whole=kind != "lora", policy=base)
    return done


def read_run(run: Path) -> Config:
    """The settings of a run's folder. Raises ConfigError where it is none."""
    from editr2.config.yaml import check_keys, load_yaml, to_dataclass

    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: no config.yaml in it (accepted: the folder of a run, `--out` of `editr2 "
            f"train`{runs_near(run)})"
        )
    values, lines = load_yaml(run / "config.yaml")
    check_keys(values, lines, Config, run / "config.yaml")
    return to_dataclass(values, Config)


def _chosen(run: Path, weights: str | None) -> tuple[Checkpoint, str, dict[str, Tensor]]:
    """The newest checkpoint, which of its weights are meant, and those."""
    path = latest_checkpoint(run / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{run / 'checkpoints'}: no checkpoint yet; train on, or set checkpoint.every lower"
        )
    saved = load_checkpoint(path)
    check_state(path, saved.tensors, {})
    have = [name for name in WEIGHTS if name == "live" or name in saved.tensors]
    weights = weights or have[0]
    if weights not in have:
        raise ConfigError(f"--weights: {weights!r} (accepted for this run: {', '.join(have)})")
    return saved, weights, saved.tensors["policy" if weights == "live" else weights]


def _load(config: PolicyConfig) -> Policy:
    policy = load_policy(config)
    policy.module.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return policy


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well, and is gone otherwise."""
    folder = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(out):
            folder.mkdir(parents=True)
        yield folder
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------- proof


@torch.no_grad()
def probe(policy: Policy) -> list[Tensor]:
    """Guided velocities of two fixed random images at two noise levels, turn by turn over two
    turns, and for a policy that writes text its log-probs of fixed tokens: float32 on the CPU. The
    instruction is empty, which every tokenizer can read."""
    # torch folds a product of weights that want gradients in another way
    policy.module.requires_grad_(False)
    height, width = policy.image_size
    images = np.random.default_rng(0).integers(0, 256, (3, 2, height, width, 3), np.uint8)
    answers = []
    device = next(policy.module.parameters()).device
    seeds, sigma = torch.tensor([1, 2], device=device), torch.tensor([0.9, 0.3], device=device)
    context = policy.encode(images[0])
    for turn in range(2):
        if isinstance(policy, TextPolicy) and policy.writes_text:
            asked = Questions([[""] * turn] * 2, ["", ""], [None, None])
            scores = policy.answer_log_prob(context, asked, [(3, 2, 1), (2, 3)], temperature=1.0)
            answers.append(scores.log_prob[scores.valid])
        context = policy.instruct(context, ["", ""])
        x = philox_normal(seeds, turn, policy.latent_shape)
        answers.append(policy.velocity(x, sigma, context).combined(sigma))
        context = policy.append(context, images[1 + turn])
    return [answer.float().cpu() for answer in answers]


@dataclass(frozen=True)
class Rounded:
    """The answers on a base of rounded weights: of the policy as it trained, and without what
    trained."""

    trained: list[Tensor]
    start: list[Tensor]


def _proof(
    trained: list[Tensor],
    exported: list[Tensor],
    start: list[Tensor],
    loaded: list[Tensor],
    rounded: Rounded | None = None,
) -> Proof:
    def change(after: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        return [a - b for a, b in zip(after, before, strict=True)]

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        difference = torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])
        return float(difference.double().square().mean().sqrt())

    error = max(float((a - b).abs().max()) for a, b in zip(exported, loaded, strict=True))
    effect = distance(exported, start)
    if error != 0:  # NaN is an error too
        share = distance(exported, loaded) / max(effect, 1e-30)
        raise ExportError(
            f"the reloaded export is another policy: predictions differ by up to {error:.3g}, "
            f"{share:.1%} of what training changed (accepted: 0); nothing was written"
        )
    size = distance(exported, [torch.zeros_like(a) for a in exported])
    carried = None
    if rounded is not None:
        learned = change(rounded.trained, rounded.start)
        carried = Carried(
            distance(exported, rounded.trained), distance(change(exported, start), learned)
        )
    return Proof(size, effect, distance(exported, trained), error, carried)
