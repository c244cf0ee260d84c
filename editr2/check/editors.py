"""An editor without its weights, measured: the policy's own code over fake tensors, step by step.

What an editor is made of and how its steps are run is its own knowledge
(`editr2.policies.blueprint`). Modules are measured with few of their equal blocks and again with
one more of each kind, which gives the cost of the full depth exactly (`at_depth`).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from editr2.check.meter import Cost, Meter, at_depth
from editr2.config import PolicyConfig
from editr2.policies.base import PackedPolicy, SizedPolicy, ThinkingPolicy
from editr2.policies.blocks import recomputed
from editr2.policies.blueprint import (
    Blueprint,
    Reading,
    Size,
    SizedBlueprint,
    Work,
    simulated,
)
from editr2.policies.configured import called, policy_class
from editr2.policies.fp8 import FLOAT8
from editr2.rl.sampler import own_schedule
from editr2.sessions import Session

FOUR_BITS = 0.5 + 4 / 64
"""Bytes of a 4-bit weight: half a byte and its share of a float32 scale for every 64."""


@dataclass(frozen=True)
class Sizes:
    """parameters, trainable: numbers of them. weights: bytes of what is frozen; block, outside: of
    what `policy.shard` shares out (all but adapters), in the largest of the repeated blocks and in
    none of them. float8: numbers of what is frozen that are float8. trained: bytes of what trains.
    dequantized: bytes of the largest layer's weights while it is used (4-bit). text, vae:
    bytes of the text encoders and the autoencoder. targets: adapted layers by their name in a
    block. sight: bytes of the vision transformer."""

    parameters: int
    trainable: int
    weights: int
    block: int
    outside: int
    float8: int
    trained: int
    dequantized: int
    text: int
    vae: int
    targets: Mapping[str, int]
    sight: int = 0

    @property
    def beside(self) -> tuple[int, int, int]:
        """Bytes of each frozen part beside the transformer."""
        return self.text, self.vae, self.sight


def open_editor(config: PolicyConfig) -> Editor:
    """Raises `ConfigError` (or `CheckpointError`) for settings or a folder that the policy would
    refuse."""
    kind = policy_class(config.model)
    with called(kind, config.model, "blueprint"):
        return Editor(config, kind.blueprint(config))


class Editor:
    """What the estimate asks. Turns count from 0.

    own: the noise schedule, None where the policy has none. cannot_pack: the policy's name, where
    it has no packed replay. writes_text, thinks: whether intents, and thoughts, are written.
    prompt_per_output: whether siblings' instructions are read apart. shares, mix: see `see`; empty
    where there is one size.
    """

    def __init__(self, config: PolicyConfig, blueprint: Blueprint) -> None:
        self.config, self.blueprint, self.policy = config, blueprint, blueprint.policy
        self.image_size: tuple[int, int] = self.policy.image_size
        self.latent_shape: tuple[int, ...] = self.policy.latent_shape
        self.own = own_schedule(self.policy)
        packs = isinstance(self.policy, PackedPolicy)
        self.cannot_pack = None if packs else type(self.policy).__name__
        self.writes_text = bool(self.policy.writes_text and config.intent)
        self.thinks = isinstance(self.policy, ThinkingPolicy) and self.policy.thinks
        self.prompt_per_output = blueprint.prompt_per_output
        self._found: dict[Hashable, list[dict[str, Any]]] = {}
        self._costs: dict[Hashable, Cost] = {}
        self.shares: dict[tuple[int, int], float] = {}
        self.mix: list[tuple[float, Editor]] = []

    def see(self, sessions: Sequence[Session]) -> None:
        """Instructions are as long as those of these sessions from here on. Where the policy edits
        several sizes, `shares` has those that they have, with the share of each, and `mix` an
        editor of every shape, which costs the same upright and lying, with its share."""
        self.blueprint.see(sessions)
        self._found.clear()
        self._costs.clear()
        several = isinstance(self.policy, SizedPolicy) and len(self.policy.sizes) > 1
        if several and isinstance(self.blueprint, SizedBlueprint):
            found = Counter(session.image_size for session in sessions)
            self.shares = {size: n / len(sessions) for size, n in found.most_common()}
            shapes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
            for size in self.shares:
                shapes.setdefault(tuple(sorted(size)), []).append(size)
            self.mix = [
                (
                    sum(self.shares[size] for size in alike),
                    Editor(self.config, self.blueprint.at(alike[0])),
                )
                for alike in shapes.values()
            ]

    @cached_property
    def _measured(self) -> list[tuple[Any, int]]:
        """Policies to measure, with how many blocks of the kind that the policy has one more of are
        missing."""
        return [(self.policy, 0), *self.blueprint.deeper]

    def _at_full_depth(self, measure: Callable[[Any], Any]) -> Any:
        return at_depth(
            [measure(policy) for policy, _ in self._measured], [n for _, n in self._measured[1:]]
        )

    @cached_property
    def _sizes(self) -> Sizes:
        four_bits = self.config.quantize == "4bit"
        found = self._at_full_depth(lambda policy: _module_sizes(policy.module, four_bits))
        largest = max(
            _module_sizes(policy.module, four_bits)["dequantized"] for policy, _ in self._measured
        )
        b = self.blueprint
        found |= {"dequantized": largest, "text": b.text, "vae": b.vae, "sight": b.sight}
        return Sizes(**found)

    def sizes(self) -> Sizes:
        return self._sizes

    def read_again(self, prompts: int) -> bool:
        """Whether training reads the `prompts` instructions of an iteration again."""
        return self.blueprint.read_again(prompts)

    def encodes_again(self, turn: int, images: int) -> bool:
        """Whether training encodes an iteration's sources (turn 0), or the outputs that later turns
        read, again."""
        return self.blueprint.encodes_again(turn, images)

    def carried(self, step: str) -> int:
        """Bytes of weights that a call of the step brings to the device first, with
        `policy.offload`."""
        text, vae, sight = self._sizes.beside
        return {"instruct": text, "encode": vae + sight, "decode": vae}.get(step, 0)

    def passes(self, step: str, apart: bool) -> int:
        """As the blueprint says."""
        return self.blueprint.passes(step, apart)

    def held(self, batch: int, turn: int) -> int:
        """Bytes of the context of a batch at a turn, behind its instruction."""
        held = self.blueprint.held(batch, turn)
        return held if isinstance(held, int) else self._cost(held).kept

    def branches(self, batch: int, turn: int) -> Mapping[str, int]:
        """The same by part; empty where a context is one."""
        return self.blueprint.branches(batch, turn)

    def cost(
        self,
        step: str,
        batch: int,
        turn: int,
        checkpointing: int | str | None = None,
    ) -> Cost:
        """Of encode, instruct, intend, think, velocity, train (forward and backward of velocity),
        answer (the same of an intent), score (its forward alone, which keeps what the backward pass
        will read), answer thought, score thought or decode; checkpointing: as
        `policy.gradient_checkpointing`, None: the configured one."""
        how = self.config.gradient_checkpointing if checkpointing is None else checkpointing
        again = recomputed(how, self.blueprint.blocks) if step in TRAINS else 0
        key = (step, batch, turn, again)
        if key not in self._costs:
            self._costs[key] = self._partly(step, batch, turn, again)
        return self._costs[key]

    def _partly(self, step: str, batch: int, turn: int, again: int) -> Cost:
        """With the first `again` blocks computed again: a line between none and all of them. At
        the largest the backward pass is where everything that is kept is alive, or at work on a
        block as if all were computed again."""
        every = self.blueprint.blocks

        def whole(on: bool, instead: int = 0) -> Cost:
            costs = [
                _reading(work) if isinstance(work, Reading) else self._cost(work, instead)
                for work in self.blueprint.work(step, batch, turn, on)
            ]
            return functools.reduce(_both, costs or [NOTHING])

        if again in (0, every):
            return whole(again > 0)
        some, most = whole(True, again), whole(True)
        return replace(some, peak=max(some.peak, most.peak))

    def _cost(self, work: Work, again: int = 0) -> Cost:
        """At its sizes, from small ones, one size after the other. again: of work that computes
        all blocks again, so many of them; 0 is all."""

        def along(rest: Sequence[Size], *found: int) -> Cost:
            if not rest:
                return self._once(work, found, again)
            return _affine(lambda n: along(rest[1:], *found, n), rest[0].at, rest[0].first)

        cost = along(work.sizes)
        if work.times is None:
            return cost
        together = at_depth([asdict(_none_of(cost)), asdict(cost)], [work.times])
        return Cost(**{**together, "peak": cost.peak, "kept": 0})

    def _once(self, work: Work, sizes: tuple[int, ...], again: int) -> Cost:
        missing = [n for _, n in self._measured[1:]] if work.deep else []
        found = self._each(work, sizes)
        if not again:
            return Cost(**at_depth(found, missing))
        plain = self._each(replace(work, checkpointing=False), sizes)
        taken, left = [], again
        for n in missing:  # of `n` further blocks there is one before
            taken.append(min(left, n + 1))
            left -= taken[-1]
        kept = at_depth(plain, [n - m for n, m in zip(missing, taken, strict=True)])
        computed = at_depth(found, taken)
        return Cost(**tree_map(lambda a, b, c: a + b - c, kept, computed, found[0]))

    def _each(self, work: Work, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        """The cost in the shallow policy and, where the work is deep, in each that is deeper."""
        key = (work.key, work.checkpointing, sizes)
        if key not in self._found:
            policies = self._measured if work.deep else self._measured[:1]
            self._found[key] = [asdict(_measured(work, p, sizes)) for p, _ in policies]
        return self._found[key]


def _measured(work: Work, policy: Any, sizes: tuple[int, ...]) -> Cost:
    """Of work at these sizes, by running it; `kept` is of its result."""
    module = policy.module
    if work.checkpointing:
        module.enable_gradient_checkpointing()
    try:
        with simulated(), torch.enable_grad() if work.trains else torch.no_grad():
            run = work.prepare(policy, *sizes)
            for p in _trainable(module) if work.trains else ():
                p.grad = torch.zeros_like(p)
            with Meter() as meter:
                result = run()
                cost = meter.cost
            del result
    finally:
        for p in _trainable(module):
            p.grad = None
        if work.checkpointing:
            module.disable_gradient_checkpointing()
    return cost


def _affine(measure: Callable[[int], Cost], at: int, first: int) -> Cost:
    """A cost at some batch (or context length), from two small ones: it is a constant and something
    for each more."""
    if at <= first + 1:
        return measure(at)
    return Cost(**at_depth([asdict(measure(first)), asdict(measure(first + 1))], [at - first]))


TRAINS = ("train", "answer", "answer thought", "score", "score thought")
"""Steps with gradient."""
NOTHING = Cost({}, 0, 0, 0, 0, 0)


def _none_of(like: Cost) -> Cost:
    return replace(NOTHING, flops=dict.fromkeys(like.flops, 0))


def _both(first: Cost, second: Cost) -> Cost:
    """One after the other, of which nothing is kept."""
    flops = {
        dtype: first.flops.get(dtype, 0) + second.flops.get(dtype, 0)
        for dtype in {**first.flops, **second.flops}
    }
    moved, dense = first.bytes + second.bytes, first.moved_dense + second.moved_dense
    return Cost(
        flops,
        moved,
        dense,
        first.operations + second.operations,
        max(first.peak, second.peak),
        0,
        first.fused_bytes + second.fused_bytes,
        first.fused_operations + second.fused_operations,
    )


def _reading(work: Reading) -> Cost:
    flops = {work.dtype: 2 * work.parameters * work.tokens * work.batch}
    return replace(
        NOTHING, flops=flops, moved_dense=work.parameters * work.dtype.itemsize * work.batch
    )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _module_sizes(module: nn.Module, four_bits: bool) -> dict[str, Any]:
    """The fields of `Sizes` that the module alone decides."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    trained = _trainable(module)
    linear = (
        {id(m.weight): m for m in module.modules() if isinstance(m, nn.Linear)} if four_bits else {}
    )

    def size(parameters: Iterable[nn.Parameter]) -> float:
        return sum(
            p.numel() * FOUR_BITS if id(p) in linear else p.numel() * p.element_size()
            for p in parameters
        )

    repeated = getattr(
        module, "_repeated_blocks", ()
    )  # diffusers' names, by which `policies.sharding` finds them

    def shared(part: nn.Module) -> float:
        return size(p for name, p in part.named_parameters() if "lora_" not in name)

    blocks = [shared(part) for part in module.modules() if type(part).__name__ in repeated]
    # "transformer_blocks.7.attn.to_q" counts as "attn.to_q".
    adapted = Counter(
        re.sub(r"^.*?\.\d+\.", "", n) for n, m in module.named_modules() if hasattr(m, "lora_A")
    )
    return {
        "parameters": sum(p.numel() for p in (*frozen, *trained)),
        "trainable": sum(p.numel() for p in trained),
        "weights": size(frozen),
        "block": max(blocks, default=0),
        "outside": shared(module) - sum(blocks),
        "float8": sum(p.numel() for p in frozen if p.dtype == FLOAT8),
        "trained": sum(p.numel() * p.element_size() for p in trained),
        "dequantized": max((2 * p.numel() for p in frozen if id(p) in linear), default=0),
        "targets": dict(adapted),
    }
