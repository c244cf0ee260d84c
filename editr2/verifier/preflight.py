"""`editr2 verifier sft --check`: what is wrong with a verifier's training, and what it takes, as a
page of text."""

from __future__ import annotations

from pathlib import Path

from editr2.check.devices import (
    BANDWIDTH_EFFICIENCY,
    FRAGMENTATION,
    LAUNCH_SECONDS,
    MATRIX_EFFICIENCY,
    RESERVE,
    Device,
    find_device,
)
from editr2.check.text import duration, number, size
from editr2.errors import counted, shown
from editr2.verifier.estimate import LETTERS, Estimate, estimate
from editr2.verifier.objectives import OBJECTIVES
from editr2.verifier.settings import GcpoConfig, RunConfig, run_problems


def preflight(
    name: str, config: RunConfig, gpu: str, processes: int, tokens: int
) -> tuple[list[str], list[str], bool]:
    """(what is wrong, the page, whether it fits). Raises `UserError` for data that cannot be
    learnt from, weights that are none and a device that nobody knows."""
    device = find_device(gpu)
    if problems := list(run_problems(config)):
        return problems, [], False
    examples, left_out = OBJECTIVES[name].reads(str(config.data.path), "data.path")
    found = estimate(name, config, examples, device, processes, tokens)
    needed = device.needed(max(found.peaks.values()))
    fits = needed <= device.memory
    lines = _page(name, config, found, device, processes, len(examples), left_out)
    verdict = "fits" if fits else "does not fit"
    lines.append(f"verdict: {verdict} {device.name}: {size(needed)} of {size(device.memory)}")
    return [], lines, fits


def _page(
    name: str,
    config: RunConfig,
    found: Estimate,
    device: Device,
    processes: int,
    examples: int,
    left_out: int,
) -> list[str]:
    p, t, sizes, lengths = config.policy, config.train, found.sizes, found.lengths
    each = f" on each of {processes} processes" if processes > 1 else ""
    what = {"sft": "traces", "gcpo": "pairs"}[name]
    writes = ""
    if isinstance(config, GcpoConfig):
        writes = f", {counted(config.rollout.traces, 'trace')} of both outputs"
    lora = f"LoRA of rank {p.lora_rank} on {sizes.layers} layers" if p.lora_rank else "all weights"
    kept = sizes.parameters - (sizes.trainable if p.lora_rank else 0)
    exact = (Path(str(p.weights)) / "tokenizer.json").is_file()
    total = sum(found.seconds.values())
    lines = [
        f"iteration   {t.batch} {what}{writes}; {counted(t.iterations, 'iteration')} over "
        f"{examples} {what}" + (f" ({left_out} cannot be read)" if left_out else ""),
        f"model       {shown(str(p.weights))}, {p.dtype}",
        f"parameters  {number(kept)}; {number(sizes.trainable)} train: {lora}",
        f"lengths     prompt {lengths.prompt} tokens, {2 * lengths.picture} of them two pictures "
        f"of {lengths.side[0]} x {lengths.side[1]}; trace {lengths.trace}"
        + ("" if exact else f" (texts by {LETTERS} letters a token)")
        + (" (--tokens)" if isinstance(config, GcpoConfig) else ""),
        "",
        f"memory of {device.name}{each}",
        *(f"  {part:<36}{size(n):>12}" for part, n in found.memory.items() if n),
        *(f"  {f'alive at most in {part}':<36}{size(n):>12}" for part, n in found.peaks.items()),
        "",
        f"time on {device.name}{each}",
    ]
    for part, seconds in found.seconds.items():
        hours = duration(seconds * t.iterations / 3600)
        lines.append(f"  {part:<12}{seconds:>10.1f} s an iteration{hours:>14} in all")
    lines += [
        f"  {'run':<12}{total:>10.1f} s an iteration{duration(total * t.iterations / 3600):>14} "
        f"in all, without evaluations; {found.flops / 1e12:.4g} TFLOP an iteration",
        f"  assumed: {MATRIX_EFFICIENCY:.0%} of the sheet's matrix rate, "
        f"{BANDWIDTH_EFFICIENCY:.0%} of its bandwidth, {LAUNCH_SECONDS * 1e6:g} us an operation; "
        f"memory x {FRAGMENTATION:g} + {RESERVE / 2**30:.1f} GiB; pictures by formula; traces of "
        f"one length; all pairs train",
        "  an estimate: not compared with a GPU run of ours",
        "",
    ]
    return lines
