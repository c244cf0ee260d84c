"""The settings of a verifier's training: two commands, whose objectives have settings of their own
beside those of any run; and of the small one that is written before it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from editr2.config.fields import Bounds, field_problems, setting
from editr2.config.rules import folder_problem
from editr2.config.settings import COUNT, POSITIVE, SEED, SHARE, TIMES, TOKENS, WEIGHT

TRACES = Bounds(at_least=2, at_most=256, why="an advantage compares traces")

LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
"""Attention and MLP of the language model; what looks at pictures stays as it is."""


@dataclass(frozen=True)
class ReaderConfig:
    """The verifier that trains.

    Args:
        weights: where it begins: a folder as transformers has it, or a hub id, of a model that
            takes pictures and writes text (AutoModelForImageTextToText), with its processor and a
            chat template.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        lora_alpha: strength of the adapters; none is twice the rank.
        lora_targets: regular expression over the names of the layers that get adapters; none is
            attention and MLP of the language model.
        dtype: float32 or bfloat16, of frozen weights and of all weights' computation.
        gradient_checkpointing: compute layers again in the backward instead of keeping what they
            made.
        shard: share the weights out over the processes (FSDP2).
        shard_group: how many processes share one copy of the weights; none is all of them.
        prompts: the words that it is asked with, in place of ours: a folder or a file with `judge`,
            as the reward's `options.prompts` has it.
    """

    weights: str | None = setting(None, path=True)
    lora_rank: int = setting(16, Bounds(at_least=0, at_most=4_096))
    lora_alpha: float | None = setting(None, POSITIVE)
    lora_targets: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    shard: bool = False
    shard_group: int | None = setting(None, COUNT)
    prompts: str | None = setting(None, path=True)


@dataclass(frozen=True)
class SftDataConfig:
    """What is learnt from.

    Args:
        path: a folder with principles.jsonl, and traces.jsonl of traces worth learning (`editr2
            verifier select` writes one).
        heldout: another, of which nothing is learnt: with traces.jsonl, of which the loss is said,
            or pairs.jsonl, which are judged, or both.
    """

    path: str | None = setting(None, path=True)
    heldout: str | None = setting(None, path=True)


@dataclass(frozen=True)
class PairsDataConfig:
    """What is learnt from.

    Args:
        path: a folder with pairs.jsonl, each pair with its principles.
        heldout: another, of which nothing is learnt: with traces.jsonl, of which the loss is said,
            or pairs.jsonl, which are judged, or both.
    """

    path: str | None = setting(None, path=True)
    heldout: str | None = setting(None, path=True)


@dataclass(frozen=True)
class StepsConfig:
    """Optimisation.

    Args:
        iterations: batches in all.
        batch: traces, or pairs, that an iteration learns from.
        rows: traces a training forward.
        lr: AdamW learning rate, of the first iteration.
        warmup: iterations over which the learning rate rises to lr.
        lr_decay: the learning rate falls linearly to this fraction of itself at the last iteration
            (1: constant).
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        grad_norm: gradient norm clip.
    """

    iterations: int = setting(500, TIMES)
    batch: int = setting(32, COUNT)
    rows: int = setting(8, COUNT)
    lr: float = setting(1e-4, Bounds(above=0, at_most=1))
    warmup: int = setting(0, Bounds(at_least=0, at_most=1_000_000_000))
    lr_decay: float = setting(0.1, SHARE)
    betas: tuple[float, float] = setting((0.9, 0.99), Bounds(at_least=0, below=1))
    weight_decay: float = setting(0.0, Bounds(at_least=0, at_most=100))
    grad_norm: float = setting(1.0, POSITIVE)


@dataclass(frozen=True)
class GcpoStepsConfig(StepsConfig):
    """Optimisation.

    Args:
        iterations: batches in all.
        batch: pairs that an iteration learns from.
        rows: traces a training forward; those of one pair at most.
        updates: passes over the traces of a batch (ratios leave 1 after the first step).
        minibatches: optimiser steps a pass, each on its part of the pairs.
        lr: AdamW learning rate, of the first iteration.
        warmup: iterations over which the learning rate rises to lr.
        lr_decay: the learning rate falls linearly to this fraction of itself at the last iteration
            (1: constant).
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        grad_norm: gradient norm clip.
        clip_low: lower clip range of a token's ratio.
        clip_high: upper clip range of a token's ratio.
        kl_weight: weight of the distance to the verifier of the start, per token.
        ratio_tolerance: the first update of a run stops when a token's ratio, as it is scored for
            training, differs from its sampling by more than this; none is 1e-3, and 0.5 in
            bfloat16.
    """

    iterations: int = setting(100, TIMES)
    batch: int = setting(16, COUNT)
    lr: float = setting(1e-6, Bounds(above=0, at_most=1))
    lr_decay: float = setting(1.0, SHARE)
    updates: int = setting(1, COUNT)
    minibatches: int = setting(1, COUNT)
    clip_low: float = setting(0.2, Bounds(above=0, at_most=1))
    clip_high: float = setting(0.2, Bounds(above=0, at_most=1_000))
    kl_weight: float = setting(1e-3, WEIGHT)
    ratio_tolerance: float | None = setting(None, POSITIVE)


@dataclass(frozen=True)
class WritingConfig:
    """How traces are sampled.

    Args:
        traces: of each output of a pair.
        temperature: of their tokens.
        max_tokens: of a trace; one that is cut off has no score.
        pairs: whose traces are sampled at once.
    """

    traces: int = setting(8, TRACES)
    temperature: float = setting(1.0, Bounds(above=0, at_most=2))
    max_tokens: int = setting(1024, TOKENS)
    pairs: int = setting(1, COUNT)


@dataclass(frozen=True)
class HeldoutConfig:
    """What is said of the held-out ones (data.heldout).

    Args:
        every: iterations between evaluations; 0 is before the first and after the last alone.
        limit: the first so many traces and pairs of them; none: all.
        traces: that both outputs of a pair are judged by.
        temperature: of their tokens; 0 is greedy.
        max_tokens: of a trace; one that is cut off has no score.
        rows: traces at once.
    """

    every: int = setting(0, Bounds(at_least=0, at_most=1_000_000_000))
    limit: int | None = setting(None, COUNT)
    traces: int = setting(1, Bounds(at_least=1, at_most=256))
    temperature: float = setting(1.0, Bounds(at_least=0, at_most=2))
    max_tokens: int = setting(1024, TOKENS)
    rows: int = setting(16, COUNT)


@dataclass(frozen=True)
class KeepConfig:
    """Checkpoints.

    Args:
        every: iterations between checkpoints (the last iteration always writes one).
        keep: newest checkpoints kept.
    """

    every: int = setting(50, TIMES)
    keep: int = setting(2, TIMES)


@dataclass(frozen=True)
class SftConfig:
    """Cold start.

    Args:
        seed: everything random in the run follows from it.
        out: the run's folder; an unfinished run there is resumed.
    """

    seed: int = setting(0, SEED)
    out: str = setting("runs/sft", path=True, what="a folder", check=folder_problem)
    data: SftDataConfig = field(default_factory=SftDataConfig)
    policy: ReaderConfig = field(default_factory=ReaderConfig)
    train: StepsConfig = field(default_factory=StepsConfig)
    eval: HeldoutConfig = field(default_factory=HeldoutConfig)
    checkpoint: KeepConfig = field(default_factory=KeepConfig)


@dataclass(frozen=True)
class GcpoConfig:
    """Group contrastive policy optimisation.

    Args:
        seed: everything random in the run follows from it.
        out: the run's folder; an unfinished run there is resumed.
    """

    seed: int = setting(0, SEED)
    out: str = setting("runs/gcpo", path=True, what="a folder", check=folder_problem)
    data: PairsDataConfig = field(default_factory=PairsDataConfig)
    policy: ReaderConfig = field(default_factory=ReaderConfig)
    rollout: WritingConfig = field(default_factory=WritingConfig)
    train: GcpoStepsConfig = field(default_factory=GcpoStepsConfig)
    eval: HeldoutConfig = field(default_factory=HeldoutConfig)
    checkpoint: KeepConfig = field(default_factory=KeepConfig)


@dataclass(frozen=True)
class SmallConfig:
    """Settings of `editr2 world verifier`.

    Args:
        hidden: width of the language model, a multiple of twice its heads.
        layers: of the language model.
        heads: of its attention.
        sight_hidden: width of what looks at pictures, a multiple of four.
        sight_layers: of what looks at pictures.
        seed: of the weights.
    """

    hidden: int = setting(160, COUNT)
    layers: int = setting(4, COUNT)
    heads: int = setting(5, Bounds(at_least=1, at_most=256))
    sight_hidden: int = setting(128, COUNT)
    sight_layers: int = setting(2, COUNT)
    seed: int = setting(0, SEED)


RunConfig = SftConfig | GcpoConfig


def run_problems(config: RunConfig) -> Iterator[str]:
    """One line for each rule that is broken."""
    for _, problem in field_problems(config):
        yield problem
    for name, given in (("policy.weights", config.policy.weights), ("data.path", config.data.path)):
        if given is None:
            yield f"{name}: none (accepted: a folder)"
    if config.policy.shard_group is not None and not config.policy.shard:
        yield f"policy.shard_group: {config.policy.shard_group} (accepted with policy.shard: true)"
    if isinstance(config, GcpoConfig):
        t = config.train
        if t.minibatches > t.batch:
            yield f"train.minibatches: {t.minibatches} (accepted: up to train.batch, {t.batch})"
