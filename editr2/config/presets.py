"""Presets: named starting points over the fields of `Config`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from editr2.config.fields import (
    Wrong,
    arguments,
)
from editr2.config.settings import Config, CreditConfig
from editr2.errors import ConfigError

C = TypeVar("C")

_EDITFLOW_WEIGHTS = {"IF": 0.5, "CC": 0.5, "GA": 0.0}

UNSET_WEIGHTS = (CreditConfig().weights, _EDITFLOW_WEIGHTS)
"""What `credit.weights` is where nobody set it: of the world's reward, by default and in a
preset."""

_ONE_TEXT: dict[str, dict[str, Any]] = {"policy": {"intent": False}}


def _preset(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Later parts win, field by field."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


_FLOW_GRPO = _preset(
    _ONE_TEXT,
    {
        "rollout": {
            "dynamics": "flow-sde",
            "noise_level": 0.7,
            "steps": 10,
            "window": 9,
            "window_range": 0.1,
            "shared_noise": False,
        },
        "credit": {"preset": "flow-grpo", "baseline": None},
        "train": {"clip_low": 1e-4, "clip_high": 1e-4, "kl_weight": 0.04, "kl_scale": "diffusion"},
    },
)

_FLOW_GRPO_FAST = _preset(
    _FLOW_GRPO, {"rollout": {"window": 2, "window_range": 0.5}, "train": {"kl_weight": 0.0}}
)

_NFT: dict[str, dict[str, Any]] = {
    "rollout": {"window": 0, "shared_noise": False, "steps": 10},
    "train": {
        "loss": "nft",
        "kl_weight": 1e-4,
        "nft_beta": 1.0,
        "old_decay": 0.001,
        "old_decay_max": 0.5,
    },
}

_EDIT_R2: dict[str, dict[str, Any]] = {
    "policy": {"intent": True},
    "credit": {"preset": "edit-r2", "baseline": "session_turn"},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "edit-r2": _EDIT_R2,
    "edit-r2-released": {
        "policy": {
            "intent": True,
            "intent_tokens": 150,
            "guidance": 4.0,
            "guidance_image": 2.0,
            "renorm": "text_channel",
            "lora_rank": 64,
            "lora_alpha": 128.0,
        },
        "rollout": {
            "sessions": 16,
            "siblings": 6,
            "groups_per_batch": 4,
            "steps": 14,
            "shift": 3.0,
            "dynamics": "flow-sde",
            "noise_level": 1.3,
            "window": 2,
            "window_range": 3 / 7,  # starts at steps 0 to 5
        },
        "credit": {"preset": "edit-r2-released", "baseline": None},
        "train": {
            "minibatches": 2,
            "lr": 1e-4,
            "lr_decay": 1.0,
            "betas": (0.9, 0.999),
            "weight_decay": 1e-4,
            "grad_norm": 1e6,  # it clips none
            "clip_low": 1e-5,
            "clip_high": 1e-5,
            "kl_weight": 0.01,
            "kl_scale": "diffusion",
            "text_weight": 1.0,
            "text_clip": 1e-5,
            "ema": None,
        },
        "eval": {"sampler": "ode", "steps": 49, "intent_tokens": 300},  # 50 levels of noise
    },
    "mt-editflow-grpo": _preset(
        _ONE_TEXT,
        {"credit": {"preset": "mt-editflow", "baseline": None, "weights": _EDITFLOW_WEIGHTS}},
    ),
    "mt-editflow-nft": _preset(
        _ONE_TEXT,
        _NFT,
        {"credit": {"preset": "mt-editflow", "baseline": None, "weights": _EDITFLOW_WEIGHTS}},
    ),
    "flow-grpo": _FLOW_GRPO,
    "flow-grpo-fast": _FLOW_GRPO_FAST,
    "dance-grpo": _preset(
        _ONE_TEXT,
        {
            "rollout": {
                "dynamics": "dance-sde",
                "noise_level": 0.3,
                "steps": 10,
                "window": 9,
                "window_range": 0.1,
            },
            "credit": {"preset": "dance-grpo", "baseline": None},
        },
    ),
    # 2 g^2, flow-GRPO's scale of the KL, is none of CPS.
    "cps": _preset(
        _FLOW_GRPO_FAST, {"rollout": {"dynamics": "cps"}, "train": {"kl_scale": "step"}}
    ),
    "mixgrpo": _preset(
        _FLOW_GRPO_FAST,
        {
            "rollout": {
                "window": 4,
                "window_range": 1.0,
                "window_schedule": "progressive",
                "window_every": 25,
                "shared_noise": True,
            },
            "credit": {"preset": "mixgrpo"},
        },
    ),
    "mixgrpo-random": _preset(
        _FLOW_GRPO_FAST,
        {
            "rollout": {"window": 4, "window_range": 1.0, "shared_noise": True},
            "credit": {"preset": "mixgrpo"},
        },
    ),
    "grpo-guard": _preset(_FLOW_GRPO_FAST, {"train": {"guard": True, "updates": 2}}),
    "unigrpo": _preset(
        _FLOW_GRPO_FAST,
        {
            "policy": {"intent": True, "guidance": 1.0, "guidance_image": 1.0},
            "credit": {"preset": "flow-grpo"},
            "train": {"kl_weight": 0.01, "kl_scale": "velocity"},
        },
    ),
    "pku": _preset(_ONE_TEXT, _NFT, {"credit": {"preset": "pku", "baseline": None}}),
    "dr-grpo": _preset(_FLOW_GRPO_FAST, {"credit": {"preset": "dr-grpo"}}),
    # What gained most on the shipped model in minutes of two cores (docs/measured.md): siblings
    # with noise of their own differ, and its intents are right, so that only images are trained.
    "edit-r2-nft": _preset(
        _EDIT_R2,
        _NFT,
        {
            "rollout": {"steps": Config().rollout.steps},
            "train": {"old_decay": 0.01, "text_weight": 0.0},
        },
    ),
    "edit-r1": _preset(
        _FLOW_GRPO, {"rollout": {"siblings": 24, "turns": 1}, "reward": {"name": "verifier"}}
    ),
}
"""Named starting points; each changes only the fields it stands for. docs/methods.md says where the
values are from."""

ON_MODEL: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    # Where the policy can think, thoughts are the text of the method, and on others intents are.
    "unigrpo": {"bagel": {"policy": {"intent": False, "thinking": True}}}
}
"""What a preset sets besides, by the `policy.model` that is to be trained."""


def replace_nested(config: C, values: dict[str, Any]) -> C:
    """A copy of a dataclass with nested `values` put in, converted as those of a YAML file are.
    Raises `ConfigError` for an unknown field and for a value that does not fit its field's type."""
    try:
        converted = arguments(values, type(config), "", partial=True)
    except Wrong as wrong:
        raise ConfigError(wrong.problem) from None
    replaced: C = _replaced(config, converted)
    return replaced


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    changes = {}
    for name, value in values.items():
        current = getattr(config, name)
        nested = dataclasses.is_dataclass(current) and isinstance(value, dict)
        changes[name] = _replaced(current, value) if nested else value
    return dataclasses.replace(config, **changes)


def preset_config(name: str | None, model: str | None = None) -> Config:
    """The configuration a preset starts from. model: the `policy.model` that will be set, for which
    some presets have values of their own (`ON_MODEL`)."""
    if name is None:
        return Config()
    if name not in PRESETS:
        raise ConfigError(f"preset: {name!r} (accepted: {', '.join(PRESETS)})")
    own = ON_MODEL.get(name, {}).get(model or "", {})
    return replace_nested(Config(), _preset(PRESETS[name], own))
