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

With --turns the sessions have several. Its trainer knows one: its adapter's `inference` is called
once a turn on the outputs before, and hands all samples of a batch's turns to the trainer; what
they learn from is level, and words and sources are kept on both sides.

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
import dataclasses
import functools
import importlib
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import frame
from bench.peer_sides import Ours, Peer, stand_in, write_folder
from bench.peer_work import PHASES, Counts, Setup

OURS, PEER = "editr2", "peer Flow-Factory"

CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far the two transformers' answers may lie apart, of the largest: the same calls of torch,
rounded once more or less where one casts and the other autocasts."""


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
    if first:
        expected = dataclasses.replace(expected, encoded=counts.encoded, texts=counts.texts)
    if counts != expected:
        raise Unequal(f"{name}: counted {counts} (accepted: {expected})")
    if not side.finite or not all(map(math.isfinite, side.finite)):
        raise Unequal(f"{name}: reports {side.finite} (accepted: finite numbers)")
    learning = (setup.rollouts - setup.tied) * setup.turns
    if side.learning != learning:
        raise Unequal(f"{name}: learns from {side.learning} samples (accepted: {learning})")


@dataclass
class Seen:
    """seconds: of each round, by phase, in all, and of processor time (`cpu`), which a busy machine
    disturbs less. counts: of a timed iteration."""

    seconds: dict[str, list[float]]
    counts: Counts


def measure(sides: dict[str, Any], setup: Setup, rounds: int) -> dict[str, Seen]:
    """Interleaved; the first of each is the warm-up and is checked like the others."""
    seen = {name: Seen(defaultdict(list), Counts()) for name in sides}
    order = list(sides)
    for done in range(-1, rounds):
        for name in reversed(order) if done % 2 else order:
            side = sides[name]
            start, worked = time.perf_counter(), time.process_time()
            phases = side()
            whole, worked = time.perf_counter() - start, time.process_time() - worked
            seen[name].counts = side.counter.take()
            check_iteration(name, side, seen[name].counts, setup, first=done < 0)
            if done < 0:
                continue
            for phase in PHASES:
                seen[name].seconds[phase].append(phases[phase])
            seen[name].seconds["all"].append(whole)
            seen[name].seconds["cpu"].append(worked)
        if done >= 0:
            print(
                f"round {done + 1}: "
                + ", ".join(f"{n} {s.seconds['all'][-1]:.2f} s" for n, s in seen.items()),
                flush=True,
            )
    return seen


def ratios(seen: dict[str, Seen], of: str = "all") -> list[float]:
    """Peer over ours, of each round."""
    pairs = zip(seen[PEER].seconds[of], seen[OURS].seconds[of], strict=True)
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
    compiled = ", our blocks compiled" if setup.compile else ""
    turns = f", {setup.turns} turns" if setup.turns > 1 else ""
    return f"kontext 13.9 M, batch {setup.batch}, {judge}{turns}{ties}{wide}{compiled}"


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
            "peer_over_ours_cpu": spread(ratios(seen, "cpu")),
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
    told = [
        f"{m:.2f} ({low:.2f} - {high:.2f})"
        for m, low, high in (rows[0].extra[f"peer_over_ours{of}"] for of in ("", "_cpu"))
    ]
    load = " and ".join(f"{n:g}" for n in rows[0].extra["load"])
    lines.append(
        f"peer / ours: {told[0]}, of processor time {told[1]}; load of the machine {load} "
        f"(1 and 15 min)"
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
        if field.type == "bool":
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
