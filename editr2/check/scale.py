"""What limits a run on many processes: where the seconds of an iteration go that no device computes
in, and what helps.

All of it is the estimate's arithmetic over again, with the processes told apart: some have more
groups than others, or longer sessions, and weights come from other machines (`links`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from editr2.check.devices import Device
from editr2.check.editors import Editor
from editr2.check.estimate import Call, Estimate, Traffic, merged, plan, sharers
from editr2.check.links import (
    BETWEEN,
    HOP_BETWEEN,
    HOP_HOST,
    HOP_INSIDE,
    MACHINE,
    agree_seconds,
    machines,
    sum_seconds,
)
from editr2.config import Config
from editr2.rl.losses import LOSSES
from editr2.rl.sampler import Sampler

WRITING = 0.5e9
"""Assumed bytes a second of a checkpoint: one process sums them by SHA-256 and writes, all wait."""
WORTH = 0.02
"""Share of an iteration from which a part of it is worth a remedy."""
DRAWS = 64
"""Iterations drawn to see how uneven the sessions of processes are."""


@dataclass(frozen=True)
class Part:
    """Seconds of an iteration. why: the sizes they follow from. remedy: what makes them fewer."""

    name: str
    seconds: float
    why: str
    remedy: str = ""


@dataclass(frozen=True)
class Limits:
    """computing: seconds in which every device works. parts: what an iteration takes besides, of
    the process that all others wait for."""

    computing: float
    parts: Sequence[Part]

    @property
    def seconds(self) -> float:
        return self.computing + sum(part.seconds for part in self.parts)

    @property
    def largest(self) -> Part:
        return max(self.parts, key=lambda part: part.seconds)


def gathers(
    config: Config, editor: Editor, device: Device, calls: Sequence[Call], processes: int
) -> tuple[float, float]:
    """Seconds of an iteration that its calls compute, and that they wait besides for weights that
    processes share."""
    traffic, group = (
        Traffic.of(config, editor, device, processes),
        sharers(config.policy, processes),
    )
    computed = waited = 0.0
    for call in calls:
        again = config.policy.gradient_checkpointing
        computing, moving = traffic.seconds(
            call, editor.cost(call.step, call.batch, call.turn, again)
        )
        agreed = traffic.passes(call) * agree_seconds(group) if group > 1 else 0.0
        computed += call.times * computing
        waited += call.times * (max(0.0, moving - computing) + agreed)
    return computed, waited


def uneven(turns: Sequence[int], groups: int, processes: int) -> float:
    """How many turns the process with most of them has over the mean, where each has `groups`
    sessions: 1 where all sessions are of one length. Drawn, by fixed seeds."""
    if len(set(turns)) == 1:
        return 1.0
    rng, lengths = np.random.default_rng(0), np.asarray(turns)
    sums = rng.choice(lengths, (DRAWS, processes, groups)).sum(2)
    return float((sums.max(1) / sums.mean(1)).mean())


def limits(
    config: Config,
    editor: Editor,
    device: Device,
    sampler: Sampler,
    turns: Sequence[int],
    processes: int,
    result: Estimate,
) -> Limits:
    """turns: of every session to train on. result: of the same run."""
    r, t, sizes = config.rollout, config.train, editor.sizes()
    most = -(-r.sessions // processes)
    calls = merged(plan(config, editor, sampler, turns, processes))
    group = sharers(config.policy, processes)
    computed, waited = gathers(config, editor, device, calls, processes)
    fewer = "more rollout.siblings or rollout.groups_per_batch: fewer, larger forwards"
    if group > MACHINE:
        inside = replace(config, policy=replace(config.policy, shard_group=MACHINE))
        _, then = gathers(inside, editor, device, calls, processes)
        fewer = f"policy.shard_group: {MACHINE}, a copy in each machine ({then:.3g} s)"
    even = r.sessions / processes / most  # of the work of the process with most groups
    longer = uneven(turns, most, processes) - 1
    steps, copies = t.updates * t.minibatches, len(LOSSES[t.loss].weights(t)) + (t.ema is not None)
    trained = 4 * sizes.trainable
    # Of weights that train and are shared out, gradients are summed with every backward.
    shares_all = group > 1 and not config.policy.lora_rank
    written = (3 + copies) * trained
    parts = [
        Part(
            "gathers of weights",
            waited,
            f"{sizes.weights / 1e9:.3g} GB from {group} processes, in each forward and backward",
            fewer,
        ),
        Part(
            "sum of gradients",
            steps * sum_seconds(trained, processes, device) if not shares_all else 0.0,
            f"{trained / 1e9:.3g} GB, {steps} an iteration",
            "fewer train.minibatches or a lower policy.lora_rank",
        ),
        Part(
            "groups do not go round",
            computed * (1 - even),
            f"{r.sessions} over {processes}: {_from_to(r.sessions // processes, most)} on each",
            f"rollout.sessions a multiple of {processes}: {most * processes}",
        ),
        Part(
            "sessions of other lengths",
            computed * even * longer,
            f"{_from_to(min(turns), max(turns))} turns; the longest {longer:.0%} over the mean",
            "more rollout.sessions, or sessions of one length",
        ),
        Part(
            "judges",
            result.seconds["reward"],
            _asked(result, config, turns, processes),
            "more reward.concurrency and servers; rollout.ahead"
            if any(not m.estimated for m, _ in result.judges)
            else "fewer and shorter traces; rollout.ahead",
        ),
        Part(
            "checkpoints",
            written / WRITING / config.checkpoint.every,
            f"{written / 1e9:.3g} GB each {config.checkpoint.every} iterations, by one process",
            "a larger checkpoint.every",
        ),
    ]
    return Limits(computed * even, parts)


def _from_to(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def _asked(result: Estimate, config: Config, turns: Sequence[int], processes: int) -> str:
    """What one server of all processes would have to do."""
    if not result.judges:
        return "left out"
    served = [(m, judging) for m, judging in result.judges if not m.estimated]
    if not served:
        return "in every process, on its own device"
    at_once = max(judging.at_once for _, judging in served)
    rollouts = config.rollout.sessions * config.rollout.siblings
    work = max(m.turn for m, _ in served) * rollouts * sum(turns) / len(turns)
    beside = result.seconds["rollout"] + result.seconds["encode"]
    return (
        f"{processes * at_once} calls at once; {work:.3g} s of answers beside {beside:.3g} s of "
        f"rollout, were one as fast as here whatever the load"
    )


def lines(found: Limits, config: Config, turns: Sequence[int], processes: int) -> list[str]:
    """The part of the page; nothing on one process. turns: of every session to train on."""
    if processes == 1:
        return []
    whole, largest = found.seconds, found.largest
    images = config.rollout.sessions * config.rollout.siblings * sum(turns) / len(turns) / whole
    said = [
        "",
        f"what limits {processes} processes, {MACHINE} a machine ({machines(processes)}): "
        f"{whole:.3g} s an iteration",
        f"  {'all compute':<28}{found.computing:>8.2f} s {found.computing / whole:>5.0%}",
    ]
    for part in found.parts:
        seconds = f"{part.seconds:>8.2f} s {part.seconds / whole:>5.0%}"
        said.append(f"  {part.name:<28}{seconds}  {part.why}")
    return [
        *said,
        f"  most of the waiting: {largest.name}; what helps: {largest.remedy}"
        if largest.seconds >= WORTH * whole
        else f"  none of the waiting is {WORTH:.0%} of the iteration",
        f"  {images:.3g} images a second trained, {images / processes:.3g} of each process",
        f"  assumed: {BETWEEN / 1e9:g} GB/s a device between machines, a hop "
        f"{HOP_INSIDE * 1e6:g} us inside and {HOP_BETWEEN * 1e6:g} between, {HOP_HOST * 1e6:g} us "
        f"a step for hosts to agree, {WRITING / 1e9:g} GB/s of checkpoints",
    ]
