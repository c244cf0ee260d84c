"""The estimate as a page of text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from editr2.check.devices import (
    BANDWIDTH_EFFICIENCY,
    FRAGMENTATION,
    LAUNCH_SECONDS,
    LINK,
    MATRIX_EFFICIENCY,
    PEER_EFFICIENCY,
    RESERVE,
    Device,
)
from editr2.check.editors import Editor
from editr2.check.estimate import WITH_ALL, WITHOUT, Estimate, sharers
from editr2.check.judges import LENT, Measured, copies_here
from editr2.check.judges import lines as judge_lines
from editr2.check.levers import OTHER_NUMBERS, ROOM, Case, Option, alone, flags, propose
from editr2.check.links import MACHINE
from editr2.check.scale import limits
from editr2.check.scale import lines as scale_lines
from editr2.config import Config, RolloutConfig, TrainConfig
from editr2.rewards.models import TRAINER
from editr2.rl.losses import LOSSES
from editr2.rl.rules import batches
from editr2.rl.sampler import Sampler

GIB = 2**30
SPLIT = (
    "trained weights",
    "gradients",
    "optimizer states",
    "copies (reference, old, average)",
)
"""Parts of the memory that `policy.shard` shares out where all weights train."""


BESIDE = ("text encoders", "autoencoder", "vision transformer")
"""Those that `policy.offload` keeps on the host."""


def size(count: float) -> str:
    """Bytes in a unit that leaves two or three digits."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit or name == "MiB":
            return f"{count / unit:.1f} {name}"
    raise AssertionError


def number(count: float) -> str:
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.4g}{name}"
    return f"{count:g}"


def duration(hours: float) -> str:
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{hours * 60:.1f} min"
        if hours >= 1 / 60
        else f"{hours * 3600:.1f} s"
    )


def render(config: Config, case: Case, option: Option, settled: Sequence[str]) -> list[str]:
    """What will run, memory by part, time by phase, and whether it fits. settled: what is to be
    said of what was auto."""
    editor, device, sampler = case.editor, case.device, case.samplers[0]
    turns, processes = case.turns, case.processes
    result, fits = option.estimate, option.fits()
    r, t, p = config.rollout, config.train, config.policy
    sizes, shares = editor.sizes(), sharers(config.policy, processes)
    split = {"frozen weights", *(() if p.lora_rank else SPLIT)}
    each = f" on each of {processes} processes" if processes > 1 else ""
    groups = -(-r.sessions // processes)
    lengths = ", ".join(f"{n} ({count})" for n, count in sorted(Counter(turns[0]).items()))
    sigmas = [round(s, 3) for s in sampler.sigmas.tolist()]
    lines = [
        f"iteration   {r.sessions} sessions x {r.siblings} siblings; {groups} groups{each}, "
        f"{batches(r, processes)} batch(es) of up to {min(groups, r.groups_per_batch)}",
        f"sessions    turns (sessions): {lengths}; " + _evaluated(config, len(turns[1])),
        f"run         {t.iterations} iterations, {t.updates * t.minibatches} optimizer step(s) "
        f"each, {result.optimizer_steps} in all; {result.evaluations} evaluations",
        f"forwards    {result.rollout_forwards} in rollout, {result.train_forwards} in training "
        f"an iteration{each}, {result.flops / 1e12:.4g} TFLOP",
        f"policy      {p.model}, {p.dtype}{base_note(p.quantize, device)}, "
        f"{editor.image_size[0]} x {editor.image_size[1]} px, latents {list(editor.latent_shape)}",
        *_buckets(editor),
        f"parameters  {number(sizes.parameters - (sizes.trainable if p.lora_rank else 0))}; "
        f"{number(sizes.trainable)} train"
        + (
            f": LoRA of rank {p.lora_rank} on {sum(sizes.targets.values())} layers"
            if p.lora_rank
            else " (all weights)"
        ),
    ]
    if sizes.targets:
        found = ", ".join(
            f"{name} ({count})".replace(" ", "\xa0") for name, count in sizes.targets.items()
        )
        wrapped = textwrap.wrap(
            found, 116, initial_indent="targets     ", subsequent_indent=" " * 12
        )
        lines += [line.replace("\xa0", " ") for line in wrapped]
    lines += [
        f"sampler     {r.dynamics if sampler.window else 'ode'}, {sampler.steps} steps, sigma "
        f"{sigmas}",
        f"trained     {_places(config.train, config.rollout, sampler)}",
        *(f"{'auto':<12}{line.removeprefix('auto: ')}" for line in settled),
        *judge_lines(result.judges),
        *_evaluators(case.apart),
        *_held([*case.judges, *case.apart], device, processes),
        "",
        f"memory of {device.name}{each}",
    ]
    other = {"with": result.memory[WITH_ALL], "without": result.memory[WITHOUT]}
    if p.gradient_checkpointing in ("off", "all"):
        del other["without" if p.gradient_checkpointing == "off" else "with"]
    for name, count in result.memory.items():
        if count and name not in (WITH_ALL, WITHOUT):
            note = ""
            if name == "activations, train":
                if isinstance(p.gradient_checkpointing, int):
                    name = f"{name}, {p.gradient_checkpointing} blocks again"
                elif p.gradient_checkpointing != "off":
                    name = f"{name}, checkpointing"
                others = [
                    f"{how} checkpointing {size(n)}" for how, n in other.items() if n != count
                ]
                note = f"  ({', '.join(others)})" if others else ""
            elif p.offload and name in BESIDE:
                note = "  (on the host while idle)"
            elif name.endswith(LENT):
                name, note = name.removesuffix(", lent"), "  (on the host while it trains)"
            elif shares > 1 and name in split:
                note = f"  (sharded over {shares} processes)"
            lines.append(f"  {name:<36}{size(count):>12}{note}")
    lines += [
        f"  alive at most in {phase:<19}{size(count):>12}" for phase, count in result.peaks.items()
    ]
    if device.gpu:
        together = (
            f", {min(processes, MACHINE)} processes together (less where the files have "
            f"policy.dtype: then pages are shared)"
        )
        lines += ["", f"memory of the host{together if processes > 1 else ''}"]
        lines += [
            f"  at most while {when:<22}{size(count):>12}"
            for when, count in result.host.items()
            if count
        ]
    reward = f"reward: {_waited(result, case.apart)}"
    lines += ["", f"time on {device.name}{each} ({reward})"]
    hours = result.hours(t.iterations)
    for phase, seconds in result.seconds.items():
        per = {"evaluate": "an evaluation", "strips": "a drawing"}.get(phase, "an iteration")
        lines.append(
            f"  {phase:<12}{seconds:>10.1f} s {per:<14}{duration(hours[phase]):>10} in all"
        )
    lines.append(f"  {'run':<38}{duration(sum(hours.values())):>10} in all")
    images = r.sessions * r.siblings * sum(turns[0]) / len(turns[0]) / processes
    lines.append(f"  {'images':<12}{images / option.seconds:>10.3f} a second, trained{each}")
    if device.gpu:
        rate = f"{PEER_EFFICIENCY:.0%} of the sheet's rate between devices"
        gathers = (
            f"{rate} ({result.gathering:.2g} s to gather the weights, beside computing); "
            if shares > 1
            else ""
        )
        lines.append(
            f"  assumed: {MATRIX_EFFICIENCY:.0%} of the sheet's matrix rate, "
            f"{BANDWIDTH_EFFICIENCY:.0%} of its bandwidth, {LAUNCH_SECONDS * 1e6:g} us an "
            f"operation, {LINK / 1e9:g} GB/s from the host; {gathers}memory x {FRAGMENTATION:g} + "
            f"{size(RESERVE)}; all turns trained"
        )
        lines.append(
            "  not yet compared with a GPU run of ours (the error seen elsewhere: "
            "editr2/check/__init__.py)"
        )
    limiting = limits(config, editor, device, sampler, turns[0], processes, result)
    lines += scale_lines(limiting, config, turns[0], processes)
    verdict = "fits" if fits else "DOES NOT FIT"
    lines += [
        "",
        f"verdict: {verdict} {device.name}: {size(device.needed(result.peak))} of "
        f"{size(device.memory)}",
    ]
    return lines


def _evaluators(apart: Sequence[Measured]) -> list[str]:
    """What is to be said of the judges of `eval.reward`."""
    lines = [f"{', '.join(m.reward.names)}: {note}" for m in apart for note in m.notes]
    return [f"{'evaluators' if n == 0 else '':<12}{line}" for n, line in enumerate(lines)]


def _waited(result: Estimate, apart: Sequence[Measured]) -> str:
    """How the seconds of rewards came about."""
    how = {True: "estimated", False: "as long as it took here"}
    found = {m.estimated for m in (*(m for m, _ in result.judges), *apart)}
    said = [how[estimated] for estimated in sorted(found)]
    return f"waiting, {' or '.join(said)}" if said else "left out"


def _held(judges: Sequence[Measured], device: Device, processes: int) -> list[str]:
    """What rewards hold in this process, where, and what of it is not counted."""
    lines, here = [], min(processes, MACHINE)
    for m in judges:
        who = ", ".join(m.reward.names)
        if m.held is None and m.reward.lends:
            lines.append(
                f"{who}: what it holds on the GPU that trains is not counted: it does not say "
                f"(models_held)"
            )
        for held in m.held or ():
            answering = (
                "what it takes while it answers is not counted"
                if held.working is None
                else f"up to {size(held.working)} more while it answers"
            )
            place = {TRAINER: "this device, on the host while it trains"} if device.gpu else {}
            there = place.get(held.device, held.device if device.gpu else "this device")
            apart = "" if copies_here(held, device.gpu, here) else "; not counted below"
            lines.append(
                f"{held.name} of {who}, on {there}: {size(held.weights)}, {answering}{apart}"
            )
    return [f"{'models' if n == 0 else '':<12}{line}" for n, line in enumerate(lines)]


def _evaluated(config: Config, count: int) -> str:
    if config.eval.off:
        return "no evaluation"
    if config.data.path and not config.data.heldout:
        return f"evaluated on {count} of them"
    return f"held out {count}"


def base_note(quantize: str, device: Device) -> str:
    """How the frozen weights are held, and what that does not bring."""
    if quantize == "fp8" and not device.float8:
        return f", fp8 base (less memory, no more speed: {device.name} has no float8 products)"
    return {"none": "", "4bit": ", 4-bit base", "fp8": ", fp8 base"}[quantize]


def levers(case: Case, given: Option) -> list[str]:
    """What each lever alone gives, and the fastest combination that fits."""

    def row(name: str, option: Option, note: str = "") -> str:
        lacks = "" if option.fits() else "  (does not fit)"
        return f"  {name:<40}{option.seconds:>8.1f} s {size(option.needed):>12}{lacks}{note}"

    config = given.config
    lines = ["levers, each alone: an iteration, memory needed", row("as given", given)]
    for key, value, option in alone(case, config):
        shown = "none" if value is None else str(value).lower()
        note = "  (other numbers)" if key in OTHER_NUMBERS else ""
        lines.append(row(f"{key} {shown}", option, note))
    best = propose(case, config)
    filled = f"in {ROOM:.0%} of the memory"
    if best is None:
        return [*lines, f"no combination of them that keeps the numbers fits {filled}", ""]
    change = flags(best.config, config)
    if not change or (best.seconds >= given.seconds and given.fits(ROOM)):
        return [*lines, f"no combination that keeps the numbers is faster {filled}", ""]
    hours = duration(sum(best.estimate.hours(config.train.iterations).values()))
    lines += [
        f"fastest that keeps the numbers (up to rounding) {filled}; the run takes {hours}:",
        row("together", best),
    ]
    return [*lines, f"  {change}", ""]


def _buckets(editor: Editor) -> list[str]:
    """Which sizes the sessions have; memory is that of the largest, time that of the mix."""
    if not editor.shares:
        return []
    each = [f"{h} x {w} ({share:.0%})" for (h, w), share in editor.shares.items()]
    unused = len(editor.policy.sizes) - len(each)
    said = f"{', '.join(each)} of the sessions{f'; {unused} more unused' if unused else ''}"
    return textwrap.wrap(said, 116, initial_indent="buckets     ", subsequent_indent=" " * 12)


def _places(t: TrainConfig, r: RolloutConfig, sampler: Sampler) -> str:
    loss = LOSSES[t.loss]
    if loss.where:
        return f"{loss.places(t, sampler)} {loss.where} ({t.loss})"
    starts = f"step {sampler.first_start + 1}"
    if sampler.last_start > sampler.first_start:
        starts = f"steps {sampler.first_start + 1} to {sampler.last_start + 1}"
    schedule = r.window_schedule
    return (
        f"{sampler.window} of {sampler.steps} steps a turn; the window starts at {starts}, "
        f"{schedule}"
    )
