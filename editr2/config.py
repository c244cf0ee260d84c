"""The settings of a run: frozen dataclasses, with presets over the same fields.

Precedence: field defaults, then `--preset`, then `--config file.yaml`, then flags.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from editr2.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where sessions come from.

    Args:
        path: a `sessions.jsonl` or the folder that holds one; none draws endless sessions from the shapes world.
        heldout: the same for the evaluation before and after training; none uses the world's held-out split when `path`
            is none too, and otherwise the training sessions themselves (said in the report).
        limit: read at most this many sessions of `path`.
    """

    path: str | None = None
    heldout: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class PolicyConfig:
    """The editor to train.

    Args:
        weights: a folder written by `editr2 world pretrain` or a run's `policy/`; none is the shipped small model.
        intent: write an intent before every turn from the second on (Edit-R2); policies without text ignore it.
        temperature: of sampled intents during training (evaluation is greedy).
        intent_tokens: at most this many tokens an intent.
    """

    weights: str | None = None
    intent: bool = True
    temperature: float = 0.7
    intent_tokens: int = 24


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling: `sessions` groups of `siblings` rollouts an iteration.

    Args:
        sessions: sessions (groups) an iteration, over all processes.
        siblings: rollouts a session.
        turns: turns of sessions drawn from the world (sessions from files have their own).
        steps: denoising steps.
        shift: timestep shift of the sigma schedule.
        dynamics: flow-sde, dance-sde, wan-sde, cps or ddim-sde.
        noise_level: of the dynamics.
        window: consecutive SDE steps a turn that are trained; all others are ODE steps and store nothing.
        window_range: the window starts within this first fraction of the steps.
        groups_per_batch: groups that go through the model together, in rollout and in training.
    """

    sessions: int = 12
    siblings: int = 8
    turns: int = 3
    steps: int = 4
    shift: float = 1.0
    dynamics: str = "cps"
    noise_level: float = 0.7
    window: int = 2
    window_range: float = 0.5
    groups_per_batch: int = 6


@dataclass(frozen=True)
class CreditConfig:
    """Scores to advantages.

    Args:
        preset: edit-r2, edit-r2-released, mt-editflow, flow-grpo, dance-grpo, mixgrpo, flow-factory, gdpo, verl-omni,
            dr-grpo or pku.
        weights: weight of every reward.
        baseline: session (all turns of a group share one mean, as released) or session_turn (each turn its own, because
            later turns score lower); none is the preset's own. Credit that aggregates over turns has no use for it.
        clip: bound on the advantage in place of the preset's.
    """

    preset: str = "edit-r2"
    weights: dict[str, float] = field(default_factory=lambda: {"IF": 0.3, "CC": 0.3, "GA": 0.4})
    baseline: str | None = "session_turn"
    clip: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Args:
        iterations: rollouts in all.
        updates: optimiser steps a rollout, each over all of it (ratios leave 1 from the second on).
        lr: AdamW learning rate, of the first iteration.
        lr_decay: the learning rate falls linearly to this fraction of itself at the last iteration (1: constant).
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        clip_low: lower clip range of the ratio (log-probs are means over the latent, so ranges are small).
        clip_high: upper clip range of the ratio.
        kl_weight: weight of the KL to the start; above 0 keeps a frozen copy of the policy.
        grad_norm: gradient norm clip.
        ema: decay of averaged weights that evaluation and export use; none trains without.
        ratio_tolerance: the first update of a run stops when a ratio differs from 1 by more than this.
        max_failed_scores: the run stops when more than this fraction of turns cannot be scored.
    """

    iterations: int = 90
    updates: int = 1
    lr: float = 2e-4
    lr_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    kl_weight: float = 0.0
    grad_norm: float = 1.0
    ema: float | None = 0.95
    ratio_tolerance: float = 1e-5
    max_failed_scores: float = 0.5


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: fixed seeds and greedy intents, so the same weights always score the same.

    Args:
        sessions: held-out sessions.
        sampler: rollout (as in training, window noise and all, with fixed seeds: the policy that is trained) or ode (no
            noise after the initial latent).
        steps: denoising steps; none uses rollout.steps.
        every: also evaluate each so many iterations; 0 only before and after.
        strips: sessions shown as film-strips in the report.
    """

    sessions: int = 200
    sampler: str = "rollout"
    steps: int | None = None
    every: int = 0
    strips: int = 12


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: iterations between checkpoints (the last iteration always writes one).
        keep: newest checkpoints kept.
    """

    every: int = 5
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        seed: everything random in the run follows from it.
        out: the run's folder; an unfinished run there is resumed.
    """

    seed: int = 0
    out: str = "runs/train"
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


PRESETS: dict[str, dict[str, Any]] = {
    "edit-r2": {"policy": {"intent": True}, "credit": {"preset": "edit-r2", "baseline": None}},
    "mt-editflow-grpo": {"policy": {"intent": False}, "credit": {"preset": "mt-editflow", "baseline": None}},
    "flow-grpo": {"policy": {"intent": False}, "credit": {"preset": "flow-grpo", "baseline": None}},
}
"""Named starting points; each changes only the fields it stands for."""


def replace_nested(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a dataclass with nested `values` put in. Raises `ConfigError` for an unknown field."""
    changes = {}
    names = {f.name for f in dataclasses.fields(config)}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"unknown key {key!r} in {type(config).__name__} (accepted: {', '.join(sorted(names))})")
        current = getattr(config, key)
        nested = dataclasses.is_dataclass(current) and isinstance(value, dict)
        changes[key] = replace_nested(current, value) if nested else value
    return dataclasses.replace(config, **changes)


def preset_config(name: str | None) -> Config:
    """The configuration a preset starts from."""
    if name is None:
        return Config()
    if name not in PRESETS:
        raise ConfigError(f"preset: {name!r} (accepted: {', '.join(PRESETS)})")
    return replace_nested(Config(), PRESETS[name])


def check_config(config: Config) -> None:
    """Range checks that need nothing but the configuration; each error names the field."""
    positive = {
        "rollout.sessions": config.rollout.sessions,
        "rollout.siblings": config.rollout.siblings,
        "rollout.turns": config.rollout.turns,
        "rollout.groups_per_batch": config.rollout.groups_per_batch,
        "train.iterations": config.train.iterations,
        "train.updates": config.train.updates,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.sessions": config.eval.sessions,
        "policy.intent_tokens": config.policy.intent_tokens,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} (accepted: at least 1)")
    if config.rollout.siblings < 2:
        raise ConfigError("rollout.siblings: 1 (accepted: at least 2; an advantage compares siblings)")
    if config.rollout.window < 1:
        raise ConfigError("rollout.window: 0 (accepted: at least 1; without an SDE step nothing trains)")
    for name, number in {
        "train.lr": config.train.lr,
        "train.clip_low": config.train.clip_low,
        "train.clip_high": config.train.clip_high,
        "train.grad_norm": config.train.grad_norm,
        "train.ratio_tolerance": config.train.ratio_tolerance,
        "rollout.noise_level": config.rollout.noise_level,
        "rollout.shift": config.rollout.shift,
    }.items():
        if not number > 0:
            raise ConfigError(f"{name}: {number} (accepted: above 0)")
    if not 0 <= config.train.lr_decay <= 1:
        raise ConfigError(f"train.lr_decay: {config.train.lr_decay} (accepted: 0 to 1)")
    if config.eval.sampler not in ("ode", "rollout"):
        raise ConfigError(f"eval.sampler: {config.eval.sampler!r} (accepted: ode, rollout)")
    if config.train.ema is not None and not 0 < config.train.ema < 1:
        raise ConfigError(f"train.ema: {config.train.ema} (accepted: above 0, below 1)")
