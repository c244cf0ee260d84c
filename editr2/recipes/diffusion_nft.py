"""DiffusionNFT's settings as ours (NVlabs/DiffusionNFT, and PKU's Edit-R1, which trains editors by
it): flow_grpo's files with other keys for the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editr2.recipes.flow_grpo import SHARED, gpus_of, lora, model_of, rewards_of
from editr2.recipes.mapped import Project, Row, Settings, Theirs, nowhere, to

DECAYS: Mapping[int, tuple[int, float, float]] = {
    0: (0, 0.0, 0.0),
    1: (0, 0.001, 0.5),
    2: (75, 0.0075, 0.999),
}
"""Of `decay_type`: steps without a decay, its growth a step, and its end."""
RANK = {"policy.lora_rank": 32, "policy.lora_alpha": 64.0}
"""Of its train scripts."""
ADVANTAGE = 5
"""The bound on advantages that r = A / 10 + 1/2 is made for, there and here."""


def draws(value: Any, theirs: Theirs) -> Settings:
    """Noise levels that each output is trained at."""
    return {"train.nft_draws": max(1, int(theirs["sample.num_steps"] * value))}


def decay(value: Any, _: Theirs) -> Settings:
    if value not in DECAYS:
        raise ValueError(f"none of {', '.join(map(str, DECAYS))}")
    _flat, rate, end = DECAYS[value]
    return {"train.old_decay": rate, "train.old_decay_max": end}


def decay_differs(value: Any, _: Theirs) -> str:
    flat = DECAYS.get(value, (0, 0, 0))[0]
    told = "it grows by optimiser steps there and by iterations here"
    return f"{told}, from the first on (there {flat} steps keep nothing)" if flat else told


def banned(value: Any, _: Theirs) -> Settings:
    return {"credit.preset": "pku"} if value else {}


TABLE: dict[str, Row] = {
    **SHARED,
    "base_model": Row(),
    "transformer_path": nowhere("policy.weights names a whole pipeline", None),
    "use_lora": Row(lambda value, theirs: RANK if value else lora(value, theirs)),
    "beta": to("train.nft_beta"),
    "decay_type": Row(decay, differs=decay_differs),
    "sample.deterministic": nowhere("an ODE samples for NFT", True),
    "sample.solver": Row(
        differs=lambda value, _: f"rollouts are by Euler steps here, not by {value}"
    ),
    "sample.noise_level": nowhere(
        lambda _, theirs: "" if theirs.get("sample.deterministic") else "an ODE has no noise"
    ),
    "sample.ban_prompt": Row(banned, False),
    "sample.ban_std_thres": nowhere(
        lambda value, theirs: (
            "credit.preset pku leaves out groups of 0.05 and below"
            if theirs.get("sample.ban_prompt")
            else ""
        ),
        0.05,
    ),
    "sample.ban_mean_thres": nowhere(
        lambda value, theirs: (
            "credit.preset pku leaves out groups of 0.9 and above"
            if theirs.get("sample.ban_prompt")
            else ""
        ),
        0.9,
    ),
    "train.timestep_fraction": Row(
        draws,
        differs="the levels of its own sampler there, one of each equal part of the steps here",
    ),
    "train.beta": to("train.kl_weight"),
    "train.adv_clip_max": nowhere(f"advantages become r within {ADVANTAGE}", ADVANTAGE),
    "train.adv_mode": nowhere("advantages of both signs count", "all"),
    "train.ema": Row(lambda value, _: {"train.ema": 0.9 if value else None}, False),
}


def fixed(theirs: Theirs) -> Settings:
    """What no key says."""
    made: Settings = {
        "credit.preset": "flow-grpo",
        "credit.baseline": None,
        "rollout.window": 0,
        "rollout.shared_noise": False,
        "train.loss": "nft",
        "train.lr_decay": 1.0,
        "eval.sampler": "ode",
    }
    return made | ({"policy.intent": False} if theirs.model in ("bagel", "unified") else {})


DIFFUSION_NFT = Project(
    "DiffusionNFT",
    TABLE,
    fixed,
    model_of,
    rewards_of,
    gpus_of,
    ("pretrained.model", "base_model"),
    ("its data is one instruction an image: a session of one turn here (docs/data.md)",),
)
