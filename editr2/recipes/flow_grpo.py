"""flow_grpo's settings as ours (yifan123/flow_grpo; its Python files, `config/grpo.py` and others).

Its train scripts hold constants of their own, which are in `SCRIPTS`: adapters, the running
average, and which steps are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editr2.recipes.mapped import (
    ABSENT,
    Project,
    Rewarded,
    Row,
    Settings,
    Theirs,
    chosen,
    elsewhere,
    nowhere,
    to,
    weight_of,
)
from editr2.recipes.python_config import Unread

ENDLESS = 100_000
"""Epochs from which on a run is meant to be stopped by hand."""
ITERATIONS = 1_000
"""What is written in their place."""
LOGS, MACHINE, DATA, LINE = "the run's folder", "the machine", "data", "the command line"

EDITORS = {
    "black-forest-labs/FLUX.1-Kontext-dev": "kontext",
    "Qwen/Qwen-Image-Edit": "qwen-edit",
    "Qwen/Qwen-Image-Edit-2509": "qwen-edit-plus",
    "Qwen/Qwen-Image-Edit-2511": "qwen-edit-plus",
    "ByteDance-Seed/BAGEL-7B-MoT": "bagel",
    "black-forest-labs/FLUX.2-dev": "flux2",
    "black-forest-labs/FLUX.2-klein-4B": "klein",
    "black-forest-labs/FLUX.2-klein-9B": "klein",
    "black-forest-labs/FLUX.2-klein-base-4B": "klein",
    "black-forest-labs/FLUX.2-klein-base-9B": "klein",
    "meituan-longcat/LongCat-Image-Edit": "longcat-edit",
}
"""Published weights, and our model of them."""
DISTILLED_GUIDANCE = ("kontext", "flux2")
"""Models that take guidance as an input."""


@dataclass(frozen=True)
class Script:
    """What a train script has by itself. windowed: it trains `sample.sde_window_size` steps, else
    the first `train.timestep_fraction` of all. sides: it reads clip_range_lt and _gt."""

    windowed: bool = False
    sides: bool = False
    rank: int = 64
    alpha: float = 128.0


SCRIPTS = {
    "kontext": Script(),
    "qwen-edit": Script(windowed=True),
    "qwen-edit-plus": Script(windowed=True),
    "bagel": Script(windowed=True, sides=True),
}
"""By our model; of the commit in tests/test_from_other_trainers.py."""


def script_of(theirs: Theirs) -> Script:
    """Of a model that none of them edits with, by the configuration's name: the `fast` ones are run
    by scripts with a window."""
    return SCRIPTS.get(theirs.model, Script(windowed="fast" in theirs.title))


def guidance(value: Any, theirs: Theirs) -> Settings:
    """Guidance goes into models that were distilled for it, and weighs a second branch of the
    others."""
    if theirs.model in DISTILLED_GUIDANCE:
        return {"policy.guidance_embed": float(value)}
    return {"policy.guidance": float(value)}


def precision(value: Any, theirs: Theirs) -> Settings:
    return {"policy.dtype": {"no": "float32", "fp32": "float32"}.get(str(value), "bfloat16")}


def half_differs(value: Any, _: Theirs) -> str:
    return "half precision is bfloat16 here" if str(value) == "fp16" else ""


def endless(value: Any, _: Theirs) -> Settings:
    """Epochs are iterations; a number that stands for "until it is stopped" is none."""
    return {"train.iterations": ITERATIONS if not value or not 0 < value < ENDLESS else value}


def endless_differs(value: Any, _: Theirs) -> str:
    if value and 0 < value < ENDLESS:
        return ""
    return f"until it is stopped by hand; {ITERATIONS} iterations are written, as many as you like"


def every(ours: str) -> Row:
    """How often: 0 is never, which of checkpoints is rarely."""
    least = 0 if ours.startswith("eval.") else 1
    return Row(lambda value, _: {ours: max(int(value or 0), least)})


def sessions(value: Any, theirs: Theirs) -> Settings:
    """Groups an epoch: their batches are of images, on each device."""
    size = theirs.get("sample.mini_num_image_per_prompt") or theirs["sample.train_batch_size"]
    images = int(value) * size * theirs.gpus
    groups = images / theirs["sample.num_image_per_prompt"]
    if groups != int(groups) or groups < 1:
        raise ValueError(
            f"{images} images on {theirs.gpus} GPU(s) are no whole number of groups (--gpus says "
            f"how many GPUs it was meant for)"
        )
    return {"rollout.sessions": int(groups)}


def minibatches(value: Any, theirs: Theirs) -> Settings:
    """Optimiser steps an epoch."""
    rows = theirs["sample.num_batches_per_epoch"] * theirs["sample.train_batch_size"]
    steps = rows / theirs.get("train.batch_size", theirs["sample.train_batch_size"]) / value
    return {"train.minibatches": max(1, int(steps))}


def window(theirs: Theirs) -> Settings:
    """Which steps are trained. Ours starts at step 0 to round(steps * range) - 1."""
    steps = theirs["sample.num_steps"]
    size = theirs.get("sample.sde_window_size", 0) if script_of(theirs).windowed else 0
    if size:
        _, end = theirs.get("sample.sde_window_range", (0, steps))
        return {
            "rollout.window": size,
            "rollout.window_range": max(1, min(end, steps) - size + 1) / steps,
        }
    trained = steps - 1
    if not script_of(theirs).windowed:
        trained = min(trained, int(steps * theirs.get("train.timestep_fraction", 1.0)))
    return {"rollout.window": max(1, trained), "rollout.window_range": 1 / steps}


def window_differs(_: Any, theirs: Theirs) -> str:
    if not script_of(theirs).windowed or not theirs.get("sample.sde_window_size", 0):
        return "the step behind the trained ones is noisy there and an ODE step here"
    start, _end = theirs.get("sample.sde_window_range", (0, 0))
    told = "each process keeps one start there, by its rank; here each group and turn draws its own"
    return f"{told}, also below {start}" if start else told


def lora(value: Any, theirs: Theirs) -> Settings:
    if not value:
        return {"policy.lora_rank": 0}
    script = script_of(theirs)
    return {"policy.lora_rank": script.rank, "policy.lora_alpha": script.alpha}


def clips(ours: tuple[str, ...], sides: bool) -> Row:
    """Of the script that reads this key; there are two forms."""
    return Row(
        lambda value, theirs: (
            dict.fromkeys(ours, abs(value)) if script_of(theirs).sides == sides else {}
        )
    )


def averaged(value: Any, _: Theirs) -> Settings:
    return {"train.ema": 0.9 if value else None}


def betas(_: Any, theirs: Theirs) -> Settings:
    return {"train.betas": [theirs["train.adam_beta1"], theirs["train.adam_beta2"]]}


def resolution(value: Any, _: Theirs) -> Settings:
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return {"policy.resolution": [int(height), int(width)]}


def weights(value: Any, theirs: Theirs) -> Settings:
    """The weights, where they are not what the model has anyway: a hub id of another variant, or a
    folder."""
    known = EDITORS.get(value)
    first = next((name for name, model in EDITORS.items() if model == known), None)
    if known is None and "/" in str(value) and not str(value).startswith((".", "/", "~")):
        raise ValueError(f"no editor that is trained here; --model says which is ({theirs.model})")
    return {} if value == first and known == theirs.model else {"policy.weights": value}


DYNAMICS = {"sde": "flow-sde", "cps": "cps"}


def algorithm(value: Any, _: Theirs) -> Settings:
    if value not in ("grpo", "dpo"):
        raise ValueError("none of the losses here (grpo, nft, awm, dpo)")
    return {"train.loss": value}


def algorithm_differs(value: Any, _: Theirs) -> str:
    return "step by step (D3PO) here, the forward process (Diffusion-DPO) there" * (value == "dpo")


def distance(value: Any, theirs: Theirs) -> Settings:
    """The weight of the KL, which of DPO is its own beta. flow_grpo divides by 2 g^2; CPS has no
    g."""
    if theirs.get("train.algorithm") == "dpo":
        return {"train.loss_options": {"beta": value}}
    if not value:
        return {"train.kl_weight": 0.0}
    scale = "mean" if theirs.get("sample.sde_type") == "cps" else "diffusion"
    return {"train.kl_weight": value, "train.kl_scale": scale}


def unless(default: Any, why: str) -> Row:
    """A key without a counterpart, which only matters when it is not this."""
    return nowhere(why, default)


SHARED: dict[str, Row] = {
    "run_name": elsewhere(LINE),
    "debug": elsewhere(LINE),
    "resume_from": elsewhere(LINE),
    "logdir": elsewhere(LOGS),
    "save_dir": elsewhere(LOGS),
    "allow_tf32": elsewhere(MACHINE),
    "run_project": elsewhere(LOGS),
    "sample.batch_size": elsewhere(MACHINE),
    "sample.test_batch_size": elsewhere(MACHINE),
    "activation_checkpointing": elsewhere(MACHINE),
    "fsdp_optimizer_offload": elsewhere(MACHINE),
    "dataset": elsewhere(DATA),
    "prompt_fn": elsewhere(DATA),
    "prompt_fn_kwargs": elsewhere(DATA),
    "reward_fn": elsewhere("the judge"),
    "seed": to("seed"),
    "num_epochs": Row(endless, ENDLESS, endless_differs),
    "save_freq": every("checkpoint.every"),
    "eval_freq": every("eval.every"),
    "num_checkpoint_limit": to("checkpoint.keep"),
    "mixed_precision": Row(precision, differs=half_differs),
    "use_lora": Row(lora),
    "resolution": Row(resolution),
    "pretrained.model": Row(weights),
    "pretrained.revision": nowhere(
        lambda value, _: "the newest revision is taken" if value not in ("", "main") else ""
    ),
    "sample.num_steps": to("rollout.steps"),
    "sample.eval_num_steps": to("eval.steps"),
    "sample.guidance_scale": Row(guidance),
    "sample.train_batch_size": elsewhere(MACHINE),
    "sample.num_image_per_prompt": to("rollout.siblings"),
    "sample.num_batches_per_epoch": Row(sessions),
    "sample.global_std": chosen(
        "credit.std",
        {True: "global", False: "group"},
        True,
        "a group is a session and its turn here, not a text that may stand under several images",
    ),
    "train.batch_size": elsewhere(MACHINE),
    "train.learning_rate": to("train.lr"),
    "train.adam_beta1": Row(betas),
    "train.adam_beta2": Row(betas),
    "train.adam_weight_decay": to("train.weight_decay"),
    "train.adam_epsilon": unless(1e-8, "it is 1e-8"),
    "train.gradient_accumulation_steps": Row(minibatches),
    "train.max_grad_norm": to("train.grad_norm"),
    "train.num_inner_epochs": to("train.updates"),
    "train.lora_path": Row(
        lambda value, _: {"policy.lora_weights": value} if value else {},
        differs=lambda value, _: "from the file's own folder" if value else "",
    ),
    "per_prompt_stat_tracking": unless(True, "siblings are always compared with their own group"),
}
"""Keys that flow_grpo and DiffusionNFT have in common."""

TABLE: dict[str, Row] = {
    **SHARED,
    "sample.eval_guidance_scale": nowhere(
        lambda value, theirs: (
            ""
            if value == theirs.get("sample.guidance_scale")
            else "evaluation is guided as training is"
        )
    ),
    "sample.noise_level": to("rollout.noise_level"),
    "sample.same_latent": to("rollout.shared_noise", default=False),
    "sample.sde_window_size": Row(
        lambda _, theirs: window(theirs) if script_of(theirs).windowed else {},
        0,
        lambda value, theirs: window_differs(value, theirs) if script_of(theirs).windowed else "",
    ),
    "sample.sde_window_range": Row(),
    "train.timestep_fraction": Row(
        lambda _, theirs: {} if script_of(theirs).windowed else window(theirs),
        1.0,
        lambda value, theirs: "" if script_of(theirs).windowed else window_differs(value, theirs),
    ),
    "sample.sde_type": chosen("rollout.dynamics", DYNAMICS, "sde"),
    "sample.mini_num_image_per_prompt": elsewhere(MACHINE),
    "train.algorithm": Row(algorithm, "grpo", algorithm_differs),
    "train.ref_update_step": nowhere("the reference stays what the run began with"),
    "train_attribute": elsewhere(DATA),
    "rationorm": to("train.guard"),
    "train.use_8bit_adam": unless(False, "AdamW keeps its states in float32"),
    "train.cfg": nowhere(
        lambda value, theirs: (
            "what samples with guidance is trained with it"
            if not value and theirs.get("sample.guidance_scale", 1) > 1
            else ""
        ),
        True,
    ),
    "train.adv_clip_max": to("credit.clip"),
    "train.clip_range": clips(("train.clip_low", "train.clip_high"), sides=False),
    "train.clip_range_lt": clips(("train.clip_low",), sides=True),
    "train.clip_range_gt": clips(("train.clip_high",), sides=True),
    "train.highclip_range": Row(lambda value, _: {"train.clip_high": abs(value)}),
    "train.beta": Row(distance, 0.0),
    "train.timestep_shift": Row(
        lambda value, theirs: {"rollout.shift": value} if theirs.model == "bagel" else {}
    ),
    "train.ema": Row(
        averaged,
        False,
        lambda value, _: (
            "the average takes the weights every 8 optimiser steps there, after each one here"
            if value
            else ""
        ),
    ),
}


def fixed(theirs: Theirs) -> Settings:
    """What no key says: the method, and the script's constants."""
    made: Settings = {
        "credit.preset": "flow-grpo",
        "credit.baseline": None,
        "train.lr_decay": 1.0,
        "eval.sampler": "ode",
    }
    if theirs.model in ("bagel", "unified"):
        made["policy.intent"] = False
    if theirs.model == "bagel":
        made |= {"policy.renorm": "global", "policy.guidance_image": 1.0, "policy.experts": "gen"}
    return made


def model_of(given: Mapping[str, Any]) -> str | None:
    return EDITORS.get(str(given.get("pretrained.model")))


def gpus_of(given: Mapping[str, Any], names: Mapping[str, Any]) -> int | None:
    """As the file's own variables have it."""
    for name in ("gpu_number", "n_gpus", "num_gpus"):
        count = names.get(name)
        if isinstance(count, int) and count > 0:
            return count
    return None


JUDGES = {"mllm_score_continue": "pku"}
"""Scorers of edits, and ours; the others score pictures against texts."""


def rewards_of(given: Mapping[str, Any]) -> list[Rewarded]:
    scorers = given.get("reward_fn", ABSENT)
    if not isinstance(scorers, Mapping) or isinstance(scorers, Unread):
        return []
    return [Rewarded(name, JUDGES.get(name), weight_of(w), {}) for name, w in scorers.items()]


FLOW_GRPO = Project(
    "flow_grpo",
    TABLE,
    fixed,
    model_of,
    rewards_of,
    gpus_of,
    ("pretrained.model",),
    ("its data is one instruction an image: a session of one turn here (docs/data.md)",),
)
