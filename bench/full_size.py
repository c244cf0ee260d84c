"""Iterations of a real editor at its full size, on random weights, beside what `editr2 check` says
of them.

python -m bench full_size CONFIG [--gpu h100] [--iterations 3] [settings]

Transformer and autoencoder have their published settings (or those of `policy.weights`, a folder)
and random weights, made on the device; nothing is downloaded. Text encoders are left out, here and
in the estimate: embeddings are random, of the right size. BAGEL is whole, but counts its words.
`policy.offload` and `policy.shard` are off. The trainer runs everything else. Rows: `full_size`, of
the estimate and of what was measured (the first iteration, which warms up, is left out), by phase:
rollout with encoding and decoding, and training.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn

from bench import frame
from editr2.check.devices import DEVICES, find_device
from editr2.check.editors import Editor
from editr2.check.estimate import Estimate, estimate
from editr2.cli.settings import run_config
from editr2.config import Config, PolicyConfig
from editr2.errors import ConfigError, UserError
from editr2.policies.blocks import run_as_configured
from editr2.policies.configured import policy_class, settled_branches
from editr2.policies.diffusion import DiffusionPolicy
from editr2.policies.pipeline_blueprint import PipelineBlueprint
from editr2.policies.trained import make_ready
from editr2.policies.unified.bagel import BagelPolicy
from editr2.policies.unified.bagel_blueprint import BagelBlueprint
from editr2.rewards.load import load_reward
from editr2.rl import iteration as trainer
from editr2.rl.rules import check_run
from editr2.rl.sampler import eval_sampler, rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes

PHASES = ("rollout", "train")


def random_transformer(blueprint: PipelineBlueprint, device: torch.device) -> nn.Module:
    """Of full size."""
    with init_empty_weights(include_buffers=False):
        module = blueprint.transformer(**blueprint.parts.transformer)
    dtype = blueprint.dtype if blueprint.config.lora_rank else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is None:
                continue
            values = torch.empty(p.shape, dtype=dtype, device=device)
            part._parameters[name] = nn.Parameter(fill(values, name, generator))
    return module.to(device)


def fill(values: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Matrices keep the size of what goes through them; norms start as they do."""
    if values.dim() > 1:
        return values.normal_(0, values.shape[1:].numel() ** -0.5, generator=generator)
    return values.fill_(float(name == "weight"))


def with_random_weights(blueprint: BagelBlueprint, layers: int, device: torch.device) -> Any:
    """BAGEL with so many layers and random weights, made on the device."""
    policy = blueprint.built(layers)
    generator = torch.Generator(device).manual_seed(0)

    def values(like: Tensor, name: str) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=device)
        return fill(made, name, generator)

    for part in policy.parts.values():
        for module in part.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(values(p, name), p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    codec = policy.codec
    policy._marks = torch.tensor([codec.vision_start, codec.vision_end], device=device)
    run_as_configured(policy.module, blueprint.config)
    return policy


def random_policy(blueprint: PipelineBlueprint, device: torch.device) -> DiffusionPolicy:
    """As `load_policy` makes it, but for weights and words."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(blueprint.dtype)
    try:
        vae = blueprint.autoencoder(**blueprint.parts.vae).to(device)
    finally:
        torch.set_default_dtype(before)
    policy = blueprint.assembled(vae, random_transformer(blueprint, device))
    policy.text_encoders = ()
    make_ready(policy, None, trains=True)
    blank = blueprint.context(policy, 1, 0).prompt

    def embed(texts: list[str], images: list[Tensor]) -> list[dict[str, Tensor]]:
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
            generator = torch.Generator(device).manual_seed(seed)
            rows.append(
                {
                    name: torch.empty_like(t[0], device=device).normal_(generator=generator)
                    for name, t in blank.items()
                }
            )
        return rows

    policy.embed = embed
    return policy


class Memory:
    """The most that was alive since `start`, beyond what there was when this was made: of torch's
    allocator on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0 if device.type == "cuda" else self._status("VmRSS")

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        (line,) = [
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        ]
        return 1024 * int(line.split()[1])


@contextmanager
def memory_by_phase(memory: Memory, peaks: dict[str, int]) -> Iterator[None]:
    """peaks: by phase, the most of all iterations."""
    accumulate = trainer.accumulate_gradient

    def accumulated(*arguments: Any) -> Any:
        peaks["rollout"] = max(peaks["rollout"], memory.peak())
        memory.start()
        return accumulate(*arguments)

    with mock.patch.object(trainer, "accumulate_gradient", accumulated):
        memory.start()
        yield
    peaks["train"] = max(peaks["train"], memory.peak())


def measure(
    config: Config, blueprint: PipelineBlueprint | BagelBlueprint, iterations: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every iteration after the first, and the most memory, by phase."""
    processes = Processes(Accelerator(cpu=not torch.cuda.is_available()))
    memory = Memory(processes.device)
    policy: Any
    if isinstance(blueprint, BagelBlueprint):
        policy = with_random_weights(blueprint, blueprint.blocks, processes.device)
    else:
        policy = random_policy(blueprint, processes.device)
    reward = load_reward(config.reward)
    check_run(config, reward.names, policy.sigmas, cannot_pack=type(policy).__name__, processes=1)
    source, state = sessions_for(config, policy), new_state(config.train, policy)
    sampler = rollout_sampler(config.rollout, policy.sigmas).to(processes.device)
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    peaks = dict.fromkeys(PHASES, 0)
    for _ in range(iterations):
        with memory_by_phase(memory, peaks):
            row = trainer.iteration(config, state, source, reward, sampler, processes)
        print(
            f"iteration {state.iteration}: "
            + ", ".join(f"{k} {s:.2f} s" for k, s in row["seconds"].items())
        )
        if state.iteration:
            seconds["rollout"].append(row["seconds"]["rollout"])
            seconds["train"].append(row["seconds"]["loss"] + row["seconds"]["optimiser"])
        state.iteration += 1
    return seconds, peaks


def without_words(settings: PolicyConfig, kind: Any) -> PipelineBlueprint | BagelBlueprint:
    """The blueprint; of an editor on diffusers, without text encoders."""
    if issubclass(kind, BagelPolicy):
        return kind.blueprint(settings)
    blueprint = PipelineBlueprint(settings, kind)
    blueprint.text = 0
    blueprint.parts = dataclasses.replace(blueprint.parts, text={})
    return blueprint


def estimated(config: Config, blueprint: PipelineBlueprint | BagelBlueprint, gpu: str) -> Estimate:
    editor = Editor(config.policy, blueprint)
    source = sessions_for(config, editor.policy)
    assert source.sessions is not None
    editor.see(source.sessions)
    samplers = (
        rollout_sampler(config.rollout, editor.own),
        eval_sampler(config.rollout, config.eval, editor.own),
    )
    turns = [len(s.turns) for s in source.sessions], [len(s.turns) for s in source.heldout]
    return estimate(config, editor, find_device(gpu), samplers, turns)


def this_device() -> str:
    """As `editr2 check --gpu` calls it. Raises `ConfigError` where it has no sheet for it."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    plain = name.lower().replace(" ", "")
    for device in DEVICES:
        if all(part in plain for part in device.split("-")):
            return device
    raise ConfigError(f"--gpu: none given, and {name} is none of {', '.join(DEVICES)}")


def rows_of(
    config: Config,
    result: Estimate,
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    device: str,
) -> list[frame.Row]:
    r, p = config.rollout, config.policy
    most = {
        "rollout": max(result.peaks["rollout"], result.peaks["encode"]),
        "train": result.peaks["train"],
    }
    spent = {
        "rollout": result.seconds["rollout"] + result.seconds["encode"],
        "train": result.seconds["train"],
    }
    rows, where = [], frame.environment(device)
    for phase in PHASES:
        shape, mode = [r.sessions, r.siblings, *p.resolution], f"{p.model} {phase}"
        for provider, times, peak in (
            ("editr2 check", [spent[phase]], most[phase]),
            ("editr2", seconds[phase], peaks[phase]),
        ):
            p20, p50, p80 = (1000 * t for t in frame.quantiles(times))
            row = frame.Row(
                "full_size",
                provider,
                mode,
                shape,
                p.dtype,
                p20,
                p50,
                p80,
                peak_mib=peak / 2**20,
                **where,
            )
            rows.append(row)
    return rows


def text_of(rows: Sequence[frame.Row]) -> str:
    lines = [f"{'':<24}{'estimated':>14}{'measured':>14}{'ratio':>8}"]
    for said, seen in zip(rows[::2], rows[1::2], strict=True):
        pairs = (
            (said.mode, "s", said.p50_ms / 1000, seen.p50_ms / 1000),
            ("", "GiB", (said.peak_mib or 0) / 1024, (seen.peak_mib or 0) / 1024),
        )
        for name, unit, expected, found in pairs:
            lines.append(
                f"{name:<24}{expected:>10.2f} {unit:<3}{found:>10.2f} "
                f"{unit:<3}{found / expected:>8.2f}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    extra: list[tuple[str, dict]] = [
        (
            "--gpu",
            {
                "type": str,
                "help": f"what this device is, if it does not say so: {', '.join(DEVICES)}",
            },
        ),
        ("--iterations", {"type": int, "default": 3, "help": "in all; the first is not counted"}),
        (
            "--results",
            {"type": Path, "default": frame.RESULTS, "help": "folder of rows (bench/results)"},
        ),
    ]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    try:
        config, given = run_config(
            "python -m bench full_size", (__doc__ or "").splitlines()[0], arguments, extra
        )
        kind = policy_class(config.policy.model)
        if (
            not issubclass(kind, DiffusionPolicy | BagelPolicy)
            or config.policy.quantize != "none"
            or given["iterations"] < 2
        ):
            raise ConfigError(
                "full_size: an editor on diffusers or bagel, not quantized, and at least two "
                "iterations"
            )
        gpu = given["gpu"] or this_device()
        if (gpu == "cpu") == torch.cuda.is_available():
            raise ConfigError(
                f"--gpu: {gpu} (accepted: the name of this device, cpu without a GPU)"
            )
        settings = settled_branches(config.policy, processes=1)
        settings = dataclasses.replace(settings, offload=False, shard=False)
        blueprint = without_words(settings, kind)
        config = dataclasses.replace(config, policy=settings)
        result = estimated(config, blueprint, gpu)
        seconds, peaks = measure(config, blueprint, given["iterations"])
    except UserError as error:
        raise SystemExit(f"full_size: {error}") from error
    rows = rows_of(config, result, seconds, peaks, "cuda" if torch.cuda.is_available() else "cpu")
    frame.append_rows(given["results"], rows)
    print(text_of(rows))
    return 0
