"""The settings of a run: frozen dataclasses, with presets over the same fields.

Precedence: field defaults, then `--preset`, then `--config file.yaml`, then flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from editr2.errors import ConfigError
from editr2_kernels import KL_SCALES, RENORMS

MODELS = ("unified", "kontext", "klein", "klein-kv", "qwen-edit", "qwen-edit-plus")


@dataclass(frozen=True)
class DataConfig:
    """Where sessions come from.

    Args:
        path: a `sessions.jsonl` or the folder that holds one, or a Hugging Face dataset, hf:owner/name:split or a saved
            one's folder; none draws endless sessions from the shapes world.
        heldout: the same for the evaluation before and after training; none uses the world's held-out split when `path`
            is none too, and otherwise the training sessions themselves (said in the report).
        limit: read at most this many sessions of `path`.
        resize: what to do with images of another size than the policy's: no (an error), crop (scale to cover, cut the
            middle out) or stretch.
    """

    path: str | None = None
    heldout: str | None = None
    limit: int | None = None
    resize: str = "no"


@dataclass(frozen=True)
class RewardConfig:
    """What judges the outputs.

    Args:
        function: `package.module:name` of a `Reward`, or of something to call without arguments that returns one (the
            protocol: editr2/rewards/base.py); none is the shapes world's verifiers.
    """

    function: str | None = None


@dataclass(frozen=True)
class PolicyConfig:
    """The editor to train. From `resolution` on: only for models on diffusers (all but unified).

    Args:
        model: unified (BAGEL's architecture; the shipped small model), kontext (FLUX.1-Kontext), klein (FLUX.2-klein),
            klein-kv (its variant that reads the references once a turn), qwen-edit or qwen-edit-plus (Qwen-Image-Edit
            and its multi-image successor, 2509).
        weights: unified: a folder written by `editr2 world pretrain` or a run's `policy/`, none is the shipped small
            model. Others: a diffusers folder or a hub id, none is the model's published one.
        intent: write an intent before every turn from the second on (Edit-R2); policies without text ignore it.
        temperature: of sampled intents during training (evaluation is greedy).
        intent_tokens: at most this many tokens an intent.
        guidance: weight of text guidance, in rollout, training and evaluation; 1 is none.
        guidance_image: weight of image guidance, applied to the result; 1 is none.
        renorm: brings the guided velocity to the plain one's size: none, token, text_channel, channel or global; auto
            is the model's own (qwen-edit: token, the others: none).
        lora_rank: rank of LoRA adapters on all attention and MLP layers; 0 trains all weights.
        lora_alpha: strength of the adapters; none is twice the rank.
        lora_targets: regular expression over the names of the layers that get adapters; none is the model's attention
            and MLP layers.
        resolution: [height, width] in pixels of what is edited and written.
        condition_resolution: the same of the condition image as the transformer sees it; none is `resolution`.
        history: images of a session that a turn sees: the one to edit and those before it, the newest first.
        keep_source: the source image stands behind them when it is none of them any more.
        guidance_embed: the guidance value that guidance-distilled transformers (kontext) take as input; none is the
            pipeline's own default. `guidance` is true guidance by a second, negative branch.
        negative_prompt: of that branch; none is the model's own (qwen-edit: a space, the others: empty).
        text_tokens: longest prompt in tokens; none is the pipeline's own limit.
        dtype: float32 or bfloat16, of frozen weights and of all weights' computation; latents stay float32 and so do
            trained adapters.
        gradient_checkpointing: compute activations again in the backward pass.
        compile: torch.compile the transformer's repeated blocks.
        offload: keep text encoder and VAE on the host while they are not in use.
        vae_tiling: the VAE works in tiles above its own sample size (1024 pixels), which takes less memory and gives
            other latents than the stock pipeline's; not with qwen-edit.
        quantize: none, or 4bit (the frozen base through bitsandbytes; needs a CUDA device and LoRA).
        shard: each process holds its part of the transformer's frozen weights and gathers a block while it computes
            (FSDP2); needs LoRA. On one process there is nothing to share out.
    """

    model: str = "unified"
    weights: str | None = None
    intent: bool = True
    temperature: float = 0.7
    intent_tokens: int = 24
    guidance: float = 1.0
    guidance_image: float = 1.0
    renorm: str = "auto"
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str | None = None
    resolution: tuple[int, int] = (512, 512)
    condition_resolution: tuple[int, int] | None = None
    history: int = 1
    keep_source: bool = False
    guidance_embed: float | None = None
    negative_prompt: str | None = None
    text_tokens: int | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    offload: bool = False
    vae_tiling: bool = False
    quantize: str = "none"
    shard: bool = False


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling: `sessions` groups of `siblings` rollouts an iteration.

    Args:
        sessions: sessions (groups) an iteration, over all processes.
        siblings: rollouts a session.
        turns: turns of sessions drawn from the world (sessions from files have their own).
        steps: denoising steps.
        shift: timestep shift of the sigma schedule; none is the policy's own schedule (unified: no shift).
        dynamics: flow-sde, dance-sde, wan-sde, cps or ddim-sde.
        noise_level: of the dynamics.
        window: consecutive SDE steps a turn that are trained; all others are ODE steps and store nothing.
        window_range: the window starts within this first fraction of the steps.
        window_schedule: random (each group and turn draws its start), progressive (the start moves on by one step every
            window_every iterations, and back to the first after the last) or fixed (always the first step).
        window_every: iterations between two moves of a progressive window.
        shared_noise: siblings start a turn from the same initial noise and differ in the window's; off, each has its
            own (as an ODE rollout needs).
        store_dtype: float32 or bfloat16, of stored latents and velocities; the sampler rounds to it before it scores.
        groups_per_batch: groups that go through the model together, in rollout and in training.
        capture: how a denoising step runs: off (plain calls), compile (torch.compile of velocity and step in one; sizes
            that change become symbols) or graph (a CUDA graph for each shape).
    """

    sessions: int = 12
    siblings: int = 8
    turns: int = 3
    steps: int = 4
    shift: float | None = None
    dynamics: str = "cps"
    noise_level: float = 0.7
    window: int = 2
    window_range: float = 0.5
    window_schedule: str = "random"
    window_every: int = 25
    shared_noise: bool = True
    store_dtype: str = "float32"
    groups_per_batch: int = 6
    capture: str = "off"


@dataclass(frozen=True)
class CreditConfig:
    """Scores to advantages. Fields that are none keep what the preset says.

    Args:
        preset: edit-r2, edit-r2-released, mt-editflow, flow-grpo, dance-grpo, mixgrpo, flow-factory, gdpo, verl-omni,
            dr-grpo or pku.
        weights: weight of every reward.
        baseline: session (all turns of a group share one mean, as released) or session_turn (each turn its own, because
            later turns score lower). Credit that aggregates over turns has no use for it.
        aggregate: none keeps the preset's; per-turn, or mean, last, product or prefix over turns, then broadcast.
        fusion: of several rewards: reward, advantage or gdpo.
        std: what the advantage is divided by: group, global, or off for nothing.
        filter: whether turns after a failed instruction (IF = 0) are left out.
        clip: bound on the advantage.
    """

    preset: str = "edit-r2"
    weights: dict[str, float] = field(default_factory=lambda: {"IF": 0.3, "CC": 0.3, "GA": 0.4})
    baseline: str | None = "session_turn"
    aggregate: str | None = None
    fusion: str | None = None
    std: str | None = None
    filter: bool | None = None
    clip: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Args:
        iterations: rollouts in all.
        updates: passes over a rollout (ratios leave 1 after the first optimiser step).
        minibatches: optimiser steps a pass, each on its part of the groups.
        loss: grpo (clipped ratio over the window's steps) or nft (DiffusionNFT: rollouts by an old policy, no window).
        lr: AdamW learning rate, of the first iteration.
        warmup: iterations over which the learning rate rises to lr (Adam's first steps are as large as any).
        lr_decay: the learning rate falls linearly to this fraction of itself at the last iteration (1: constant).
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        clip_low: lower clip range of grpo's ratio (log-probs are means over the latent, so ranges are small).
        clip_high: upper clip range of grpo's ratio.
        guard: GRPO-Guard's normalised ratio (grpo); the rollout then keeps its velocities inside the window.
        kl_weight: weight of the distance to the start; above 0 keeps a copy of the trainable weights.
        kl_scale: of grpo's KL (nft has velocity's): step (by 2 S^2), diffusion (2 g^2), mean (as it is) or velocity.
        text_weight: weight of the intents' policy loss beside the sum of the image losses over a turn's window; none is
            1 / rollout.window (nft: 1 / nft_draws), 0 leaves the text untrained.
        text_clip: clip range of the tokens' ratios.
        text_lr: learning rate of the weights that write text (the understanding expert), in place of lr; it falls as lr
            does. None: the same.
        nft_beta: how far nft's implicit positive and negative policies lie from the old one.
        nft_draws: noise levels a turn and update at which nft compares velocities.
        old_decay: nft's old policy keeps min(old_decay * iteration, old_decay_max) of itself at every iteration.
        old_decay_max: see old_decay.
        context_gradient: let gradients through the context (earlier images and texts) too.
        packed: replay whole sessions in one forward where the policy can: auto (on a CPU, where it counts fewer
            operations), on or off.
        micro_batch: rows (rollout, turn and step, mixed) a training forward; none is one turn and step of a chunk, as
            the rollout went.
        old_log_prob: grpo's: rollout (as sampled), replay (from the first update's own forward), or auto: rollout where
            training walks as it did in float32.
        grad_norm: gradient norm clip.
        ema: decay of averaged weights that evaluation and export use; none trains without.
        ratio_tolerance: the first update of a run stops when a ratio differs from 1 by more than this.
        text_ratio_tolerance: the same for the tokens of intents, whose sampling runs token by token.
        max_failed_scores: the run stops when more than this fraction of turns cannot be scored.
    """

    iterations: int = 60
    updates: int = 1
    minibatches: int = 1
    loss: str = "grpo"
    lr: float = 2e-4
    warmup: int = 0
    lr_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    guard: bool = False
    kl_weight: float = 0.0
    kl_scale: str = "step"
    text_weight: float | None = None
    text_clip: float = 0.2
    text_lr: float | None = None
    nft_beta: float = 1.0
    nft_draws: int = 2
    old_decay: float = 0.001
    old_decay_max: float = 0.5
    context_gradient: bool = False
    packed: str = "auto"
    micro_batch: int | None = None
    old_log_prob: str = "auto"
    grad_norm: float = 1.0
    ema: float | None = 0.95
    ratio_tolerance: float = 1e-5
    text_ratio_tolerance: float = 1e-3
    max_failed_scores: float = 0.5


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: fixed seeds and greedy intents, so the same weights always score the same.

    Args:
        sessions: held-out sessions.
        turns: turns of held-out sessions drawn from the world; none is rollout.turns.
        sampler: rollout (as in training, window noise and all, with fixed seeds: the policy that is trained) or ode (no
            noise after the initial latent).
        steps: denoising steps; none uses rollout.steps.
        intent_tokens: at most this many tokens an intent; none uses policy.intent_tokens.
        every: also evaluate each so many iterations; 0 only before and after.
        strips: sessions shown as film-strips in the report.
    """

    sessions: int = 200
    turns: int | None = None
    sampler: str = "rollout"
    steps: int | None = None
    intent_tokens: int | None = None
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
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


_EDITFLOW_WEIGHTS = {"IF": 0.5, "CC": 0.5, "GA": 0.0}
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
_FLOW_GRPO_FAST = _preset(_FLOW_GRPO, {"rollout": {"window": 2, "window_range": 0.5}, "train": {"kl_weight": 0.0}})
_NFT: dict[str, dict[str, Any]] = {
    "rollout": {"window": 0, "shared_noise": False, "steps": 10},
    "train": {"loss": "nft", "kl_weight": 1e-4, "nft_beta": 1.0, "old_decay": 0.001, "old_decay_max": 0.5},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "edit-r2": {"policy": {"intent": True}, "credit": {"preset": "edit-r2", "baseline": "session_turn"}},
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
            "window_range": 1 / 3,
        },
        "credit": {"preset": "edit-r2-released", "baseline": None},
        "train": {
            "minibatches": 2,
            "lr": 1e-4,
            "lr_decay": 1.0,
            "clip_low": 1e-5,
            "clip_high": 1e-5,
            "kl_weight": 0.01,
            "text_weight": 1.0,
            "text_clip": 1e-5,
            "ema": None,
        },
        "eval": {"sampler": "ode", "steps": 50, "intent_tokens": 300},
    },
    "mt-editflow-grpo": _preset(
        _ONE_TEXT, {"credit": {"preset": "mt-editflow", "baseline": None, "weights": _EDITFLOW_WEIGHTS}}
    ),
    "mt-editflow-nft": _preset(
        _ONE_TEXT, _NFT, {"credit": {"preset": "mt-editflow", "baseline": None, "weights": _EDITFLOW_WEIGHTS}}
    ),
    "flow-grpo": _FLOW_GRPO,
    "flow-grpo-fast": _FLOW_GRPO_FAST,
    "dance-grpo": _preset(
        _ONE_TEXT,
        {
            "rollout": {"dynamics": "dance-sde", "noise_level": 0.3, "steps": 10, "window": 9, "window_range": 0.1},
            "credit": {"preset": "dance-grpo", "baseline": None},
        },
    ),
    # 2 g^2, flow-GRPO's scale of the KL, is none of CPS.
    "cps": _preset(_FLOW_GRPO_FAST, {"rollout": {"dynamics": "cps"}, "train": {"kl_scale": "step"}}),
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
        {"rollout": {"window": 4, "window_range": 1.0, "shared_noise": True}, "credit": {"preset": "mixgrpo"}},
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
}
"""Named starting points; each changes only the fields it stands for. docs/methods.md says where the values are from."""


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


def _choices(name: str, value: object, accepted: tuple[str | None, ...]) -> Iterator[str]:
    if value not in accepted:
        yield f"{name}: {value!r} (accepted: {', '.join(a if a else 'none' for a in accepted)})"


def check_config(config: Config) -> None:
    """Raises `ConfigError` with the first of `config_problems`."""
    for problem in config_problems(config):
        raise ConfigError(problem)


def config_problems(config: Config) -> Iterator[str]:
    """Range checks that need nothing but the configuration; each line names the field."""
    r, t, p = config.rollout, config.train, config.policy
    positive = {
        "rollout.sessions": r.sessions,
        "rollout.siblings": r.siblings,
        "rollout.turns": r.turns,
        "rollout.groups_per_batch": r.groups_per_batch,
        "rollout.window_every": r.window_every,
        "train.iterations": t.iterations,
        "train.updates": t.updates,
        "train.minibatches": t.minibatches,
        "train.nft_draws": t.nft_draws,
        "train.micro_batch": 1 if t.micro_batch is None else t.micro_batch,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.sessions": config.eval.sessions,
        "eval.intent_tokens": 1 if config.eval.intent_tokens is None else config.eval.intent_tokens,
        "policy.intent_tokens": p.intent_tokens,
    }
    for name, value in positive.items():
        if value < 1:
            yield f"{name}: {value} (accepted: at least 1)"
    if r.siblings == 1:
        yield "rollout.siblings: 1 (accepted: at least 2; an advantage compares siblings)"
    yield from _choices("train.loss", t.loss, ("grpo", "nft"))
    if t.loss == "grpo" and r.window < 1:
        yield "rollout.window: 0 (accepted: at least 1; without an SDE step grpo trains nothing)"
    if t.loss == "nft" and r.window:
        yield f"rollout.window: {r.window} (accepted with train.loss nft: 0; it samples by ODE)"
    if r.window == 0 and r.shared_noise:
        yield "rollout.shared_noise: true (accepted without a window: false, or all siblings are equal)"
    for name, number in {
        "train.lr": t.lr,
        "train.clip_low": t.clip_low,
        "train.clip_high": t.clip_high,
        "train.text_clip": t.text_clip,
        "train.text_lr": t.lr if t.text_lr is None else t.text_lr,
        "train.nft_beta": t.nft_beta,
        "train.grad_norm": t.grad_norm,
        "train.ratio_tolerance": t.ratio_tolerance,
        "train.text_ratio_tolerance": t.text_ratio_tolerance,
        "rollout.noise_level": r.noise_level,
        "rollout.shift": 1.0 if r.shift is None else r.shift,
        "policy.temperature": p.temperature,
    }.items():
        if not number > 0:
            yield f"{name}: {number} (accepted: above 0)"
    for name, number in {
        "train.lr_decay": t.lr_decay,
        "train.old_decay": t.old_decay,
        "train.old_decay_max": t.old_decay_max,
    }.items():
        if not 0 <= number <= 1:
            yield f"{name}: {number} (accepted: 0 to 1)"
    for name, number in {
        "train.warmup": t.warmup,
        "train.kl_weight": t.kl_weight,
        "train.text_weight": t.text_weight or 0.0,
        "policy.lora_rank": p.lora_rank,
    }.items():
        if number < 0:
            yield f"{name}: {number} (accepted: at least 0)"
    yield from _choices("eval.sampler", config.eval.sampler, ("ode", "rollout"))
    yield from _choices("rollout.window_schedule", r.window_schedule, ("random", "progressive", "fixed"))
    yield from _choices("rollout.store_dtype", r.store_dtype, ("float32", "bfloat16"))
    yield from _choices("rollout.capture", r.capture, ("off", "compile", "graph"))
    yield from _choices("data.resize", config.data.resize, ("no", "crop", "stretch"))
    yield from _choices("policy.model", p.model, MODELS)
    yield from _choices("policy.dtype", p.dtype, ("float32", "bfloat16"))
    yield from _choices("policy.quantize", p.quantize, ("none", "4bit"))
    yield from _choices("policy.renorm", p.renorm, ("auto", *RENORMS))
    yield from _model_problems(config)
    yield from _choices("train.kl_scale", t.kl_scale, KL_SCALES)
    yield from _choices("train.packed", t.packed, ("auto", "on", "off"))
    yield from _choices("train.old_log_prob", t.old_log_prob, ("auto", "rollout", "replay"))
    if t.packed == "on" and (p.guidance != 1 or p.guidance_image != 1):
        yield "train.packed: on (accepted with policy.guidance other than 1: auto, off)"
    if t.micro_batch is not None and (t.packed == "on" or t.context_gradient):
        what = "train.packed on" if t.packed == "on" else "train.context_gradient"
        yield f"train.micro_batch: {t.micro_batch} (accepted with {what}: none; all goes in one forward)"
    if t.loss == "nft" and (p.guidance != 1 or p.guidance_image != 1):
        yield "policy.guidance: not 1 (accepted with train.loss nft: 1; it compares plain velocities)"
    if t.ema is not None and not 0 < t.ema < 1:
        yield f"train.ema: {t.ema} (accepted: above 0, below 1)"


_POLICY_FIELDS = [f.name for f in dataclasses.fields(PolicyConfig)]
DIFFUSION_ONLY = tuple(_POLICY_FIELDS[_POLICY_FIELDS.index("resolution") :])
"""Settings that the unified model has no use for."""


def policy_problems(p: PolicyConfig, trains: bool = True) -> Iterator[str]:
    """One line for each rule that the policy's settings break among themselves. trains: whether it will."""
    default = PolicyConfig()
    if p.model == "unified":
        for name in DIFFUSION_ONLY:
            if (value := getattr(p, name)) != (accepted := getattr(default, name)):
                yield f"policy.{name}: {value!r} (accepted with policy.model unified: {accepted!r}, the default)"
        return
    if p.quantize != "none" and not p.lora_rank:
        yield f"policy.quantize: {p.quantize} (accepted with policy.lora_rank 0: none; what trains is not quantized)"
    if p.shard:
        for name, value, accepted, why in (
            ("lora_rank", p.lora_rank, p.lora_rank > 0 or not trains, "at least 1; only frozen weights are sharded"),
            ("quantize", p.quantize, p.quantize == "none", "none; 4-bit weights are not sharded"),
            ("model", p.model, p.model != "klein-kv", "klein; its cache is made inside of the blocks"),
            ("compile", p.compile, not p.compile, "false; compiled blocks are not computed again as they were"),
        ):
            if not accepted:
                yield f"policy.{name}: {value} (accepted with policy.shard: {why})"


def _model_problems(config: Config) -> Iterator[str]:
    p = config.policy
    yield from policy_problems(p)
    if p.model != "unified" and config.data.path is None:
        yield (
            f"data.path: none (accepted with policy.model {p.model}: a sessions.jsonl; the shapes world's images are "
            "too small for it)"
        )
    if p.shard and config.rollout.capture != "off":
        yield f"rollout.capture: {config.rollout.capture} (accepted with policy.shard: off; gathering waits)"
