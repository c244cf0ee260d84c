"""The settings of pretraining the embedded policy; without torch, as `--help` wants them."""

from __future__ import annotations

from dataclasses import dataclass

from editr2.config.fields import Bounds, setting
from editr2.config.settings import COUNT, DECAY, POSITIVE, SEED, SHARE, TIMES, TURNS, WEIGHT


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `editr2 world pretrain`.

    Args:
        steps: optimiser steps.
        decay_steps: the learning rate falls as a cosine to 0 here. The shipped start stops before
            that, on purpose: most single edits are right, third turns often are not.
        batch: sessions a step.
        turns: turns a session.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        text_weight: weight of the intent cross-entropy.
        raw_fraction: share of sessions whose context holds the raw instructions instead of the
            intents.
        ema: decay of the averaged weights that are saved.
        grad_norm: gradient norm clip.
        bf16: matrix products in bfloat16.
        compile: `torch.compile` of the layers (needs a C++ compiler; about 1.6 times as fast).
        seed: of weights, sessions and noise.
    """

    steps: int = setting(1250, TIMES)
    decay_steps: int = setting(2000, TIMES)
    batch: int = setting(24, COUNT)
    turns: int = setting(3, TURNS)
    lr: float = setting(2e-3, Bounds(above=0, at_most=1))
    warmup: int = setting(200, TIMES)
    betas: tuple[float, float] = setting((0.9, 0.99), Bounds(at_least=0, below=1))
    weight_decay: float = setting(0.01, Bounds(at_least=0, at_most=100))
    text_weight: float = setting(0.2, WEIGHT)
    raw_fraction: float = setting(0.25, SHARE)
    ema: float = setting(0.995, DECAY)
    grad_norm: float = setting(1.0, POSITIVE)
    bf16: bool = True
    compile: bool = True
    seed: int = setting(0, SEED)
