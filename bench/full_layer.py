"""A few layers of BAGEL at their full width, step by step on this device, beside what `editr2
check` says of them.

python -m bench full_layer CONFIG [--layers 1] [--rows 1] [--turns 2] [settings]

All 28 layers are 28 GB and a GPU's; one is at home on a CPU. Words, autoencoder and vision
transformer are whole. Weights are random, made on the device; nothing is downloaded. A session of
so many turns is read into a context by the policy's own methods, and at its last turn every step
runs: torch's counter counts its floating-point operations, the allocator (on a CPU the profiler)
says how much was alive, the clock how long it took. Rows: `full_layer`, of the estimate and of
what was measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import frame
from bench.full_size import this_device, with_random_weights
from bench.page import number
from editr2.check.devices import Device, find_device
from editr2.check.editors import Editor
from editr2.check.meter import CPU_ATTENTION, SCORING
from editr2.cli.settings import run_config
from editr2.config import Config
from editr2.errors import ConfigError, UserError
from editr2.policies.base import Questions
from editr2.policies.blueprint import backward
from editr2.policies.configured import policy_class

SAID = "make the hat red and keep the rest as it is"


@dataclass(frozen=True)
class Found:
    """Of a step: flops; peak: bytes alive at most beyond what was there; seconds."""

    flops: int
    peak: int
    seconds: float


class Session:
    """What the steps of the last turn read, by the policy's own methods."""

    @torch.no_grad()
    def __init__(self, policy: Any, rows: int, turns: int) -> None:
        self.policy, self.rows, self.turns = policy, rows, turns
        self.texts, self._pictures = [SAID] * rows, iter(self._different())
        self.asking = policy.encode(next(self._pictures))
        for turn in range(turns):
            self.context = policy.instruct(self.asking, self.texts)
            if turn + 1 < turns:
                self.before = self.context
                self.asking = policy.append(self.context, next(self._pictures))

    def _different(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        while True:  # other ones each time: what was seen before is kept
            yield rng.integers(0, 256, (self.rows, *self.policy.image_size, 3), np.uint8)

    def questions(self) -> Questions:
        earlier = [[SAID] * (self.turns - 1)] * self.rows
        return Questions(earlier, self.texts, [None] * self.rows)

    def steps(self, answer: int) -> Mapping[str, Callable[[], Any]]:
        """By the names that the estimate has, and a turn's first velocity behind its intents, as
        training has them. answer: tokens of an intent."""
        policy = self.policy
        x = torch.randn(self.rows, *policy.latent_shape, device=policy.device)
        sigma = torch.full((self.rows,), 0.5, device=policy.device)

        def score() -> Any:
            answers = [(0,) * answer] * self.rows
            asked = self.questions()
            return policy.answer_log_prob(self.asking, asked, answers, temperature=1.0).log_prob

        def both() -> None:
            scored, v = score(), policy.velocity(x, sigma, self.context)
            guided = [t for t in v.guidance.values() if isinstance(t, Tensor)]
            torch.autograd.backward([t.sum() for t in (scored, v.v, *guided)])

        return {
            "encode": lambda: policy.append(self.before, next(self._pictures)),
            "instruct": lambda: policy.instruct(self.asking, self.texts),
            "velocity": lambda: policy.velocity(x, sigma, self.context),
            "decode": lambda: policy.pixels(x),
            "train": lambda: backward(policy.velocity(x, sigma, self.context)),
            "answer": lambda: score().sum().backward(),
            "train behind answer": both,
        }


TRAINS = ("train", "answer", "train behind answer")


def measured(policy: Any, step: str, run: Callable[[], Any]) -> Found:
    """By running it twice: counted (the counter keeps tensors alive), then watched and timed."""
    device = policy.device
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    for p in trained if step in TRAINS else ():
        p.grad = torch.zeros_like(p)
    with torch.set_grad_enabled(step in TRAINS):
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION | SCORING)
        with counter:
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            peak = int(torch.cuda.max_memory_allocated()) - before
        else:
            with torch.profiler.profile(profile_memory=True) as profile:
                begin = time.perf_counter()
                run()
                seconds = time.perf_counter() - begin
            peak = _most(profile)
    for p in trained:
        p.grad = None
    return Found(counter.get_total_flops(), peak, seconds)


def _most(profile: Any) -> int:
    """Bytes at most, of what the allocator of a CPU handed out."""
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def size_of(context: Any, apart: bool) -> int:
    """Bytes of all keys and values of a context. apart: its branches are not joined, too."""
    branches = list(getattr(context, "branches", [context]))
    if len(branches) > 1 and not apart:
        branches.append(context.joined)
    return sum(t.nbytes for c in branches for t in (*c.keys, *c.values))


def estimated(editor: Editor, step: str, rows: int, turn: int, sheet: Device) -> Found:
    first, _, behind = step.partition(" behind ")
    costs = [editor.cost(name, rows, turn) for name in (first, behind) if name]
    waiting = editor.cost("score", rows, turn).kept if behind else 0
    return Found(
        sum(cost.total_flops for cost in costs),
        max(costs[0].peak + waiting, costs[-1].peak),
        sum(cost.seconds(sheet.speed) for cost in costs),
    )


def compared(
    config: Config,
    layers: int,
    rows: int,
    turns: int,
    device: torch.device,
    sheet: Device,
    only: Sequence[str] = (),
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[Found, Found]]]:
    """Bytes of weights and contexts, and the steps, each as estimated and as found. only: these
    steps; all by default, but for those of intents where none are written."""
    kind: Any = policy_class(config.policy.model)
    blueprint = kind.blueprint(config.policy)
    blueprint.sizes = dataclasses.replace(blueprint.sizes, num_hidden_layers=layers)
    policy = with_random_weights(blueprint, layers, device)
    session = Session(policy, rows, turns)
    blueprint.said = len(policy.text_ids(SAID))
    asked = session.questions()
    blueprint.question = len(policy.question_ids(asked.earlier[0], SAID, None))
    editor, last = Editor(config.policy, blueprint), turns - 1
    sizes = editor.sizes()
    parts = [p for part in policy.parts.values() for p in part.parameters()]
    held = {
        "weights": (
            sizes.weights + sizes.trained + sum(sizes.beside),
            sum(p.nbytes for p in parts),
        ),
        "contexts": (editor.held(rows, last), size_of(session.context, policy.apart)),
    }
    steps = {}
    for step, run in session.steps(blueprint.answer).items():
        if (only and step not in only) or ("answer" in step and not config.policy.intent):
            continue
        said = estimated(editor, step, rows, last, sheet)
        steps[step] = (said, measured(policy, step, run))
        print(f"{step}: {steps[step][1].seconds:.2f} s", flush=True)
    return held, steps


def rows_of(
    config: Config,
    shape: Sequence[int],
    steps: Mapping[str, tuple[Found, Found]],
    device: str,
) -> list[frame.Row]:
    p, where = config.policy, frame.environment(device)
    return [
        frame.Row(
            "full_layer",
            provider,
            f"{p.model} {step}",
            [*shape, *p.resolution],
            p.dtype,
            *(1000 * found.seconds,) * 3,
            peak_mib=found.peak / 2**20,
            flops=found.flops,
            **where,
        )
        for step, both in steps.items()
        for provider, found in zip(("editr2 check", "editr2"), both, strict=True)
    ]


def text_of(held: Mapping[str, tuple[int, int]], steps: Mapping[str, tuple[Found, Found]]) -> str:
    lines = [f"{'':<21}{'':<8}{'estimated':>12}{'measured':>12}{'ratio':>8}"]

    def line(name: str, unit: str, said: float, seen: float, scale: float) -> None:
        ratio = number(seen / said, 4) if said else ""
        lines.append(f"{name:<21}{unit:<8}{said / scale:>12.4g}{seen / scale:>12.4g}{ratio:>8}")

    for name, (said, seen) in held.items():
        line(name, "GiB", said, seen, 2**30)
    for step, (expected, found) in steps.items():
        line(step, "TFLOP", expected.flops, found.flops, 1e12)
        line("", "GiB", expected.peak, found.peak, 2**30)
        line("", "s", expected.seconds, found.seconds, 1)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    extra: list[tuple[str, dict]] = [
        ("--layers", {"type": int, "default": 1, "help": "of the transformer (1)"}),
        ("--rows", {"type": int, "default": 1, "help": "samples of every step (1)"}),
        ("--turns", {"type": int, "default": 2, "help": "of the session, at least two (2)"}),
        ("--gpu", {"type": str, "help": "as of full_size: what this device is"}),
        (
            "--results",
            {"type": Path, "default": frame.RESULTS, "help": "folder of rows (bench/results)"},
        ),
    ]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    try:
        config, given = run_config(
            "python -m bench full_layer", (__doc__ or "").splitlines()[0], arguments, extra
        )
        layers, rows, turns = (given[name] for name in ("layers", "rows", "turns"))
        if config.policy.model != "bagel" or config.policy.quantize != "none":
            raise ConfigError("full_layer: policy.model bagel, not quantized")
        if layers < 1 or rows < 1 or turns < 2:
            raise ConfigError("full_layer: --layers and --rows of at least 1, --turns of 2")
        settings = dataclasses.replace(config.policy, offload=False, shard=False)
        config = dataclasses.replace(config, policy=settings)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sheet = find_device(given["gpu"] or this_device())
        held, steps = compared(config, layers, rows, turns, device, sheet)
    except UserError as error:
        raise SystemExit(f"full_layer: {error}") from error
    shape = [layers, rows, turns]
    frame.append_rows(given["results"], rows_of(config, shape, steps, device.type))
    print(text_of(held, steps))
    return 0
