"""Flow-Factory's settings as ours (X-GenGroup/Flow-Factory; its YAML files)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editr2.recipes.flow_grpo import (
    DATA,
    EDITORS,
    LINE,
    LOGS,
    MACHINE,
    endless,
    endless_differs,
    every,
    guidance,
    half_differs,
    precision,
    resolution,
    weights,
)
from editr2.recipes.mapped import (
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

WHOLE = ("rewards", "eval_rewards")
MODELS = {
    "flux1-kontext": "kontext",
    "flux2": "flux2",
    "flux2-klein": "klein",
    "qwen-image-edit": "qwen-edit",
    "qwen-image-edit-plus": "qwen-edit-plus",
}
DYNAMICS = {"Flow-SDE": "flow-sde", "Dance-SDE": "dance-sde", "CPS": "cps"}
TRAINERS: Mapping[str, Settings] = {
    "grpo": {"train.loss": "grpo"},
    "grpo-guard": {"train.loss": "grpo", "train.guard": True},
    "nft": {"train.loss": "nft"},
    "awm": {"train.loss": "awm"},
    "dpo": {"train.loss": "dpo"},
}
SAMPLED = ("grpo", "grpo-guard", "dpo")
"""Whose places are the window's steps."""
LORA_ONLY = "the trained weights' own, float32"


def trainer(theirs: Theirs) -> str:
    return str(theirs["train.trainer_type"])


def method(value: Any, _: Theirs) -> Settings:
    if value not in TRAINERS:
        raise ValueError(f"none of the losses here ({', '.join(TRAINERS)})")
    return dict(TRAINERS[value])


def method_differs(value: Any, _: Theirs) -> str:
    if value == "dpo":
        return "the denoising step by step (D3PO) here, the forward process (Diffusion-DPO) there"
    return ""


def of(*trainers: str) -> Any:
    """Makes a row that counts for these trainers alone."""

    def only(row: Row) -> Row:
        return Row(
            lambda value, theirs: (
                row.make(value, theirs) if row.make and trainer(theirs) in trainers else {}
            ),
            row.default,
            lambda value, theirs: (
                ""
                if trainer(theirs) not in trainers
                else row.differs
                if isinstance(row.differs, str)
                else row.differs(value, theirs)
            ),
        )

    return only


def clip(value: Any, theirs: Theirs) -> Settings:
    low, high = value if isinstance(value, list | tuple) else (-value, value)
    if trainer(theirs) == "awm":
        return {"train.loss_options": {**awm_draws(theirs), "clip": abs(high)}}
    return {"train.clip_low": abs(low), "train.clip_high": abs(high)}


def advantage_clip(value: Any, theirs: Theirs) -> Settings:
    high = value[1] if isinstance(value, list | tuple) else value
    return {} if trainer(theirs) == "nft" else {"credit.clip": abs(high)}


def advantage_differs(value: Any, theirs: Theirs) -> str:
    high = value[1] if isinstance(value, list | tuple) else value
    if trainer(theirs) == "nft" and abs(high) != 5:
        return "advantages become r within 5 here"
    if isinstance(value, list | tuple) and abs(value[0]) != abs(value[1]):
        return "the bound is the same on both sides here"
    return ""


def window(_: Any, theirs: Theirs) -> Settings:
    """Ours is consecutive, and starts at step 0 to round(steps * range) - 1."""
    if theirs["scheduler.dynamics_type"] == "ODE":
        return {"rollout.window": 0, "rollout.shared_noise": False}
    steps = theirs["train.num_inference_steps"]
    places = theirs["scheduler.sde_steps"] or list(range(max(1, steps - 1)))
    size = theirs["scheduler.num_sde_steps"] or len(places)
    last = max(places) - size + 1
    return {"rollout.window": size, "rollout.window_range": max(1, last + 1) / steps}


def window_differs(_: Any, theirs: Theirs) -> str:
    if theirs["scheduler.dynamics_type"] == "ODE":
        return ""
    steps = theirs["train.num_inference_steps"]
    places = sorted(theirs["scheduler.sde_steps"] or range(max(1, steps - 1)))
    size = theirs["scheduler.num_sde_steps"] or len(places)
    told = []
    if places[0]:
        told.append(f"it may start at step 0 here, at {places[0]} there")
    if 1 < size < len(places):
        told.append("its steps are consecutive here, drawn one by one there")
    return "; ".join(told)


def dynamics(value: Any, _: Theirs) -> Settings:
    if value == "ODE":
        return {}
    return {"rollout.dynamics": DYNAMICS[value]}


def noise(value: Any, theirs: Theirs) -> Settings:
    ode = theirs["scheduler.dynamics_type"] == "ODE"
    return {} if ode else {"rollout.noise_level": value}


def levels(theirs: Theirs) -> int:
    """Noise levels that each output is trained at."""
    given = theirs.get("train.num_train_timesteps")
    span = theirs.get("train.timestep_range", 0.9)
    low, high = span if isinstance(span, list | tuple) else (0.0, span)
    return int(given) if given else max(1, int(theirs["train.num_inference_steps"] * (high - low)))


def awm_draws(theirs: Theirs) -> dict[str, Any]:
    return {"draws": levels(theirs)}


def draws(_: Any, theirs: Theirs) -> Settings:
    if trainer(theirs) == "nft":
        return {"train.nft_draws": levels(theirs)}
    return {}


def kl(value: Any, theirs: Theirs) -> Settings:
    made: Settings = {"train.kl_weight": value}
    if value and trainer(theirs) in SAMPLED:
        kind = theirs.get("train.kl_type", "x-based")
        made["train.kl_scale"] = {"v-based": "velocity", "x-based": "mean"}[kind]
    return made


def average(value: Any, theirs: Theirs) -> Settings:
    """Of NFT and AWM the average is the policy that samples, where it samples off policy."""
    if trainer(theirs) == "nft":
        rate = theirs.get("train.ramp_rate", 1.0)
        linear = theirs.get("train.ema_decay_schedule") == "piecewise_linear"
        off_policy = theirs["train.off_policy"]
        return {
            "train.old_decay": (rate if linear else 1.0) if off_policy else 0.0,
            "train.old_decay_max": value if off_policy else 0.0,
            "train.ema": None,
        }
    return {"train.ema": value or None}


def average_differs(value: Any, theirs: Theirs) -> str:
    if not value:
        return ""
    every_ = theirs.get("train.ema_update_interval", 10)
    if trainer(theirs) == "nft":
        schedule = theirs.get("train.ema_decay_schedule")
        said = "the old policy that samples; every iteration here"
        return (
            said if schedule == "piecewise_linear" else f"{said}, without the schedule {schedule}"
        )
    return f"it takes the weights every {every_} epochs there, after each optimiser step here"


def minibatches(value: Any, theirs: Theirs) -> Settings:
    if theirs.get("train.gradient_accumulation_steps") not in (None, "auto"):
        return {}
    return {"train.minibatches": int(value)}


def accumulated(value: Any, theirs: Theirs) -> Settings:
    """Optimiser steps an epoch, from the backward passes before each."""
    if value == "auto":
        return {}
    rows = theirs["train.unique_sample_num_per_epoch"] * theirs["train.group_size"]
    batches = rows // (theirs.gpus * theirs["train.per_device_batch_size"])
    places = levels(theirs)
    if trainer(theirs) in SAMPLED:
        places = window(None, theirs)["rollout.window"]
    return {"train.minibatches": max(1, batches * places // int(value))}


def rank(value: Any, theirs: Theirs) -> Settings:
    return {"policy.lora_rank": 0 if theirs["model.finetune_type"] == "full" else value}


def alpha(value: Any, theirs: Theirs) -> Settings:
    if theirs["model.finetune_type"] == "full":
        return {}
    return {"policy.lora_alpha": value or 2 * theirs["model.lora_rank"]}


def targets(value: Any, _: Theirs) -> Settings:
    if value in ("default", None):
        return {}
    if value == "all":
        raise ValueError(
            "adapters go on attention and MLP layers (policy.lora_targets names others)"
        )
    names = [value] if isinstance(value, str) else value
    return {
        "policy.lora_targets": rf"(^|\.)({'|'.join(n.replace('.', chr(92) + '.') for n in names)})$"
    }


def condition(value: Any, theirs: Theirs) -> Settings:
    size = resolution(value, theirs)["policy.resolution"]
    same = resolution(theirs["train.resolution"], theirs)["policy.resolution"] == size
    return {} if same else {"policy.condition_resolution": size}


def resumed(value: Any, theirs: Theirs) -> Settings:
    kind = theirs.get("model.resume_type") or theirs["model.finetune_type"]
    if value and kind == "state":
        raise ValueError("a run goes on from its own checkpoints alone")
    ours = {"lora": "policy.lora_weights", "full": "policy.weights"}
    return {ours[kind]: value} if value else {}


def sharded(value: Any, theirs: Theirs) -> Settings:
    """FSDP and ZeRO's third stage share the weights out."""
    shares = any(word in str(value).lower() for word in ("fsdp", "zero3"))
    return {"policy.shard": True} if shares and theirs.gpus > 1 else {}


def sides(value: Any, theirs: Theirs) -> Settings:
    """Height or width, in place of resolution's."""
    if value is None:
        return {}
    height, width = resolution(theirs["train.resolution"], theirs)["policy.resolution"]
    height, width = theirs.get("train.height") or height, theirs.get("train.width") or width
    return {"policy.resolution": [height, width]}


def other_than_training(what: str) -> Row:
    return nowhere(
        lambda value, theirs: (
            ""
            if value == theirs.get(f"train.{what}")
            else "evaluation has training's, so that what is compared is what is trained"
        )
    )


def without(*keys: str, who: str) -> dict[str, Row]:
    return {key: elsewhere(who) for key in keys}


TABLE: dict[str, Row] = {
    **without("launcher", "num_processes", "main_process_port", "log.run_name", who=LINE),
    "config_file": Row(sharded),
    "mixed_precision": Row(precision, "bf16", half_differs),
    **without("data.dataset_dir", "data.image_dir", "data.cache_dir", who=DATA),
    **without(
        *("data.preprocessing_batch_size", "data.dataloader_num_workers", "data.enable_preprocess"),
        *("data.force_reprocess", "data.sampler_type", "data.preprocess_parallelism"),
        who="the trainer: groups are shared out over processes, and encoded once",
    ),
    "data.max_dataset_size": to("data.limit"),
    "data.video_dir": nowhere("images are edited here", None),
    "data.audio_dir": nowhere("images are edited here", None),
    "model.model_type": Row(
        differs=lambda value, theirs: (
            ""
            if MODELS.get(value) == theirs.model
            else f"no editor that is trained here; --model says which is ({theirs.model})"
        )
    ),
    "model.model_name_or_path": Row(weights),
    "model.finetune_type": Row(default="full"),
    "model.lora_rank": Row(rank, 8),
    "model.lora_alpha": Row(alpha, None),
    "model.target_modules": Row(targets, "all"),
    "model.target_components": nowhere(
        lambda value, _: (
            "" if value in ("transformer", ["transformer"]) else "the transformer alone trains"
        )
    ),
    "model.master_weight_dtype": nowhere(
        lambda value, _: "" if value in ("fp32", "float32") else LORA_ONLY
    ),
    "model.resume_path": Row(resumed),
    "model.resume_type": Row(),
    "model.attn_backend": to("policy.attention"),
    **without("log.project", "log.logging_backend", "log.save_dir", "log.verbose", who=LOGS),
    "log.save_model_only": elsewhere(LOGS),
    "log.save_freq": every("checkpoint.every"),
    "train.trainer_type": Row(method, "grpo", method_differs),
    "train.advantage_aggregation": Row(
        lambda value, _: {
            "credit.preset": {"gdpo": "gdpo", "sum": "flow-factory"}[value],
            "credit.baseline": None,
        },
        "gdpo",
    ),
    "train.global_std": chosen("credit.std", {True: "global", False: "group"}, True),
    "train.clip_range": of("grpo", "grpo-guard", "awm")(Row(clip, 1e-4)),
    "train.adv_clip_range": Row(advantage_clip, 5.0, advantage_differs),
    "train.kl_beta": of("grpo", "grpo-guard", "nft", "awm")(Row(kl, 0)),
    "train.kl_type": Row(),
    "train.ref_param_device": elsewhere(MACHINE),
    "train.resolution": Row(resolution, 512),
    "train.height": Row(sides),
    "train.width": Row(sides),
    "train.auto_resize": nowhere(
        lambda value, _: (
            "all are edited at policy.resolution; policy.buckets: auto keeps their shapes"
            if value
            else ""
        )
    ),
    "train.condition_image_size": Row(condition),
    "train.num_inference_steps": to("rollout.steps", default=10),
    "train.guidance_scale": Row(guidance, 3.5),
    "train.max_epochs": Row(endless, None, endless_differs),
    "train.per_device_batch_size": Row(default=1, elsewhere=MACHINE),
    "train.group_size": to("rollout.siblings", default=1),
    "train.unique_sample_num_per_epoch": to("rollout.sessions", default=8),
    "train.gradient_step_per_epoch": Row(minibatches, 2),
    "train.gradient_accumulation_steps": Row(accumulated, "auto"),
    "train.num_inner_epochs": to("train.updates", default=1),
    "train.learning_rate": to("train.lr", default=1e-5),
    "train.adam_weight_decay": to("train.weight_decay", default=1e-4),
    "train.adam_betas": to("train.betas", default=[0.9, 0.999]),
    "train.adam_epsilon": nowhere("it is 1e-8", 1e-8),
    "train.max_grad_norm": to("train.grad_norm", default=1.0),
    "train.ema_decay": Row(average, 0.995, average_differs),
    "train.ema_update_interval": Row(default=10),
    "train.ema_decay_schedule": Row(default="power"),
    "train.ema_device": elsewhere(MACHINE),
    "train.flat_steps": nowhere("the old policy begins to keep of itself at once", 0),
    "train.ramp_rate": Row(),
    "train.warmup_steps": Row(),
    "train.off_policy": Row(
        default=False,
        differs=lambda value, theirs: (
            "nothing samples by an average here" if value and trainer(theirs) == "awm" else ""
        ),
    ),
    "train.nft_beta": of("nft")(to("train.nft_beta", default=1.0)),
    "train.num_train_timesteps": Row(draws, 0),
    "train.timestep_range": of("nft", "awm")(
        Row(default=0.9, differs="how many levels; here one of each equal part of all steps")
    ),
    "train.time_sampling_strategy": nowhere("levels are those of the sampler", "discrete"),
    "train.time_shift": Row(),
    "train.awm_weighting": of("awm")(
        Row(differs=lambda value, _: "" if value == "Uniform" else "levels weigh the same here")
    ),
    "train.ghuber_power": Row(),
    "train.kl_weight": Row(),
    "train.ema_kl_beta": nowhere("no distance to the average", 0),
    "train.beta": Row(
        lambda value, theirs: (
            {"train.loss_options": {"beta": value}} if trainer(theirs) == "dpo" else {}
        ),
    ),
    "train.enable_gradient_checkpointing": elsewhere(MACHINE),
    "train.offload_samples_to_cpu": elsewhere(MACHINE),
    "train.latent_storage_dtype": Row(
        lambda value, _: {"rollout.store_dtype": "bfloat16" if value == "bf16" else "float32"},
        "fp16",
        lambda value, _: "fp16 is kept as float32" if value == "fp16" else "",
    ),
    "train.seed": to("seed", default=42),
    "scheduler.dynamics_type": Row(dynamics, "Flow-SDE"),
    "scheduler.noise_level": Row(noise, 0.7),
    "scheduler.num_sde_steps": Row(window, 1),
    "scheduler.sde_steps": Row(default=None, differs=window_differs),
    "scheduler.seed": elsewhere("seed"),
    "eval.eval_freq": every("eval.every"),
    "eval.num_inference_steps": to("eval.steps"),
    "eval.resolution": other_than_training("resolution"),
    "eval.height": other_than_training("height"),
    "eval.width": other_than_training("width"),
    "eval.condition_image_size": other_than_training("condition_image_size"),
    "eval.guidance_scale": other_than_training("guidance_scale"),
    "eval.auto_resize": other_than_training("auto_resize"),
    "eval.per_device_batch_size": elsewhere(MACHINE),
    "eval.seed": elsewhere("seed"),
    "rewards": elsewhere("the judge"),
    "eval_rewards": nowhere("eval.reward names judges that training never asks", None),
}


def fixed(theirs: Theirs) -> Settings:
    """What no key says."""
    made: Settings = {
        "rollout.shared_noise": False,
        "train.lr_decay": 1.0,
        "eval.sampler": "ode",
    }
    if trainer(theirs) == "awm":
        made["train.loss_options"] = awm_draws(theirs)
    return made


def model_of(given: Mapping[str, Any]) -> str | None:
    kind = str(given.get("model.model_type"))
    return MODELS.get(kind) or EDITORS.get(str(given.get("model.model_name_or_path")))


RATIONAL = {"api_base_url": "url", "vlm_model": "model"}
JUDGES = {"rational_rewards_edit": ("rational", RATIONAL)}
"""Rewards of edits: ours, and theirs among its options; the others score pictures against texts."""


def rewards_of(given: Mapping[str, Any]) -> list[Rewarded]:
    listed = given.get("rewards") or []
    made = []
    for use in listed if isinstance(listed, list) else [listed]:
        if not isinstance(use, Mapping):
            continue
        kind = str(use.get("reward_model", "")).lower()
        ours, names = JUDGES.get(kind, (None, {}))
        options = {name: use[key] for key, name in names.items() if key in use}
        made.append(Rewarded(kind or "default", ours, weight_of(use.get("weight")), options))
    return made


def gpus_of(given: Mapping[str, Any], names: Mapping[str, Any]) -> int | None:
    count = given.get("num_processes")
    return count if isinstance(count, int) and count > 0 else None


FLOW_FACTORY = Project(
    "Flow-Factory",
    TABLE,
    fixed,
    model_of,
    rewards_of,
    gpus_of,
    ("model.model_type", "model.model_name_or_path", "num_processes", "config_file"),
    ("its train.jsonl has one instruction an image: a session of one turn here (docs/data.md)",),
)
