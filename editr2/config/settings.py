"""The settings of a run: frozen dataclasses, with presets over the same fields.

Precedence: field defaults, then `--preset`, then `--config file.yaml`, then flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from editr2.config.fields import (
    ACCEPTS,
    Accepts,
    Bounds,
    respelt,
    setting,
    table,
)
from editr2.config.patterns import pattern_problem
from editr2.policies.models import DEFAULT, MODELS
from editr2.rewards.table import REWARDS

rollout_dynamics = table("editr2_kernels:DYNAMICS", keep=lambda entry: bool(entry.stochastic))
"""The dynamics that a rollout can sample by: those with noise."""

CREDIT_PRESETS = table("editr2_kernels:CREDIT_PRESETS")
"""Published combinations of the options of credit. The operators import torch."""


def noise_levels(dynamics: str) -> Bounds:
    """Of a dynamics that keeps the noise schedule the level is a share of the noise there is, of
    the others a factor of the diffusion, published at up to 1.3."""
    from editr2_kernels import DYNAMICS

    entry = DYNAMICS[dynamics]
    if not entry.has_level:
        return Bounds(at_least=1, at_most=1)
    return Bounds(above=0, at_most=min(entry.max_level, 10))


# Upper ends are where the program stops being of use, far above what anyone runs: a slip of three
# digits is caught here and not by the kernel's out-of-memory killer.
COUNT = Bounds(at_least=1, at_most=1_000_000)
"""How many of something are held, or done in one go."""

TIMES = Bounds(at_least=1, at_most=1_000_000_000)
"""How often something happens."""

SHARE = Bounds(at_least=0, at_most=1)

POSITIVE = Bounds(above=0, at_most=1_000_000)

WEIGHT = Bounds(at_least=0, at_most=1_000_000)

TOKENS = Bounds(at_least=1, at_most=32_768)

SIBLINGS = Bounds(at_least=2, at_most=4_096, why="an advantage compares siblings")

TURNS = Bounds(at_least=1, at_most=64)

STEPS = Bounds(at_least=1, at_most=1_000)

LOSSES = table("editr2.rl.losses:LOSSES")
"""By the name that `train.loss` has, what says which `train.loss_options` there are."""

PIXELS = Bounds(at_least=8, at_most=8_192)

MOST_BUCKETS = 64


def bucket_problem(buckets: Sequence[tuple[int, int]] | str) -> str | None:
    """What is wrong with `policy.buckets`, or None."""
    if isinstance(buckets, str):
        return None
    if wrong := [n for size in buckets for n in size if not PIXELS.hold(n)]:
        return f"sides of {PIXELS}, and this has {wrong[0]}"
    if len(buckets) > MOST_BUCKETS:
        return f"at most {MOST_BUCKETS} of them"
    twice = next((size for size in buckets if list(buckets).count(size) > 1), None)
    return None if twice is None else f"each once, and this has {list(twice)} twice"


DECAY = Bounds(above=0, below=1)

SEED = Bounds(at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class DataConfig:
    """Where sessions come from.

    Args:
        path: a `sessions.jsonl` or the folder that holds one, or a Hugging Face dataset,
            hf:owner/name:split or a saved one's folder; none draws endless sessions from the shapes
            world.
        heldout: the same for the evaluation before and after training; none uses the world's
            held-out split when `path` is none too, and otherwise the training sessions themselves
            (said in the report).
        limit: read at most this many sessions of `path`.
        resize: what to do with images of another size than the policy's: no (an error), crop (scale
            to cover, cut the middle out) or stretch.
    """

    path: str | None = setting(None, path=True)
    heldout: str | None = setting(None, path=True)
    limit: int | None = setting(None, COUNT)
    resize: Literal["no", "crop", "stretch"] = "no"


TIMEOUT = Bounds(above=0, at_most=86_400)
"""Seconds of a call, at most a day."""

CALLS_AT_ONCE = Bounds(at_least=1, at_most=4_096)

TRIES = Bounds(at_least=0, at_most=100)


@dataclass(frozen=True)
class RewardUse:
    """One of several rewards; the fields are those of `reward`."""

    name: str | None = setting(None, among=lambda: REWARDS, reference="package.module:Class")
    function: str | None = setting(None, what="package.module:name or none")
    options: dict[str, Any] = field(default_factory=dict)
    concurrency: int | None = setting(None, CALLS_AT_ONCE)
    timeout: float | None = setting(None, TIMEOUT, what="seconds or none")
    retries: int | None = setting(None, TRIES)


REWARDS_LISTED = "a list, each of a name or function with its options, or empty"


def listed_uses(key: str, uses: Sequence[RewardUse]) -> tuple[tuple[str, RewardUse], ...]:
    """Each reward of a list, behind the setting that it stands in."""
    return tuple((f"{key}[{n}]", use) for n, use in enumerate(uses))


@dataclass(frozen=True)
class RewardConfig:
    """What judges the outputs.

    Args:
        function: `package.module:name` of a function, an object or a class that judges
            (docs/rewards.md has the forms), in place of a name.
        timeout: seconds that a call may take, at most a day; one that takes longer is a failed
            score. None: the reward's own limit, if it has one.
        name: world (the shapes world's verifiers, also where neither is given), pixels (of
            pictures, without a server), brightness (a stand-in for a judge), or
            `package.module:Class` of your own.
        options: settings of the reward alone, by name (docs/rewards.md).
        concurrency: calls at once, made while the rollout goes on; none: the reward's own, which
            of a function is one, on the main thread when the rollout is done.
        retries: further tries of a call that failed; none: the reward's own number.
        use: several rewards, a list of name or function, options, concurrency, timeout and retries
            each; in place of those fields here.
        cache: a folder of answers that runs share: an equal call is not made again.
    """

    function: str | None = setting(None, what="package.module:name or none")
    timeout: float | None = setting(None, TIMEOUT, what="seconds or none")
    name: str | None = setting(None, among=lambda: REWARDS, reference="package.module:Class")
    options: dict[str, Any] = field(default_factory=dict)
    concurrency: int | None = setting(None, CALLS_AT_ONCE)
    retries: int | None = setting(None, TRIES)
    use: tuple[RewardUse, ...] = setting((), what=REWARDS_LISTED)
    cache: str | None = setting(None, path=True)

    @property
    def uses(self) -> tuple[tuple[str, RewardUse], ...]:
        """Each reward, behind the setting that it stands in."""
        if self.use:
            return listed_uses("reward.use", self.use)
        names = (f.name for f in fields(RewardUse))
        return (("reward", RewardUse(**{name: getattr(self, name) for name in names})),)


@dataclass(frozen=True)
class PolicyConfig:
    """The editor to train. From `resolution` on mostly for models on diffusers (docs/editors.md).

    Of those bagel takes resolution, buckets, dtype, gradient_checkpointing, compile, offload,
    quantize (fp8), shard and branches, unified gradient_checkpointing.

    Args:
        model: unified (BAGEL's architecture; the shipped small model), bagel (its published
            weights), kontext (FLUX.1-Kontext),
            klein (FLUX.2-klein), klein-kv (its variant that reads the references once a turn),
            qwen-edit or qwen-edit-plus (Qwen-Image-Edit and its multi-image successors, 2509 and
            2511), flux2 (FLUX.2-dev), longcat-edit (LongCat-Image-Edit), qwen-image-2.1, or
            `package.module:Class` of your own (docs/editors.md).
        weights: unified: a folder written by `editr2 world pretrain` or a run's `policy/`, none is
            the shipped small model. bagel: a folder in the published layout or a hub id, none is
            the published one. Others: a diffusers folder or a hub id, none is the model's
            published one.
        intent: write an intent before every turn from the second on (Edit-R2); policies without
            text ignore it.
        temperature: of sampled intents and thoughts during training (evaluation is greedy).
        intent_tokens: at most this many tokens an intent.
        thinking: write a thought before every image, behind its instruction (bagel, with its
            system prompt for it in front of the session).
        thinking_tokens: at most this many tokens a thought.
        questions: texts that intents are asked for with, in place of the model's own (unified and
            bagel): a folder or a YAML or JSON file with some of `cm`, `cu` and `rewrite`, or a
            checkout of Edit-R2's release (docs/editors.md).
        guidance: weight of text guidance, in rollout, training and evaluation; 1 is none.
        guidance_image: weight of image guidance, applied to the result; 1 is none.
        guidance_interval: [low, high]; guided while low < sigma <= high (unified and bagel).
        renorm: brings the guided velocity to the plain one's size: none, token, text_channel,
            channel or global; auto is the model's own (qwen-edit: token, the others: none).
        rounding: how numbers become pixels' bytes (bagel): nearest, or released (cut off, as
            BAGEL's own code has it).
        lora_rank: rank of LoRA adapters on all attention and MLP layers; 0 trains all weights.
        lora_alpha: strength of the adapters; none is twice the rank.
        lora_targets: regular expression over the names of the layers that get adapters; none is the
            model's attention and MLP layers.
        lora_weights: a LoRA that the adapters start from, a .safetensors file or a folder, as
            diffusers or peft writes it, or a checkpoint of Edit-R2's release; with lora_rank 0 it
            is merged into the weights that train (docs/editors.md).
        experts: what trains of unified and bagel, with adapters and without: all, or gen (what
            paints; the expert that reads and writes stays as it is, so it writes no intents).
        resolution: [height, width] in pixels of what is edited and written.
        condition_resolution: the same of the condition image as the transformer sees it; none is
            `resolution`.
        buckets: sizes that sessions are edited at, a list of [height, width], of which each gets
            the one of the nearest aspect ratio (or its own `size`, docs/data.md); auto is nine of
            about `resolution`'s area, up to 2:1. Empty: all at `resolution`.
        history: images of a session that a turn sees: the one to edit and those before it, the
            newest first.
        keep_source: the source image stands behind them when it is none of them any more.
        guidance_embed: the guidance value that guidance-distilled transformers (kontext) take as
            input; none is the pipeline's own default. `guidance` is true guidance by a second,
            negative branch.
        negative_prompt: of that branch; none is the model's own (qwen-edit: a space, the others:
            empty).
        text_tokens: longest prompt in tokens; none is the pipeline's own limit.
        dtype: float32 or bfloat16, of frozen weights and of all weights' computation; latents stay
            float32 and so do trained adapters.
        gradient_checkpointing: which blocks' activations are computed again in the backward pass:
            off (none), all, a number (so many, from the first on), or auto (as few as fit the
            device, by the estimate of `editr2 check`).
        compile: torch.compile the transformer's repeated blocks: on, off, or auto (on where the
            device is CUDA; where a block cannot be compiled it runs plainly, and that is said).
        offload: keep text encoder and VAE (bagel: vision transformer and VAE) on the host while
            they are not in use.
        vae_tiling: the VAE works in tiles above its own sample size (1024 pixels), which takes less
            memory and gives other latents than the stock pipeline's; not with qwen-edit.
        quantize: none; 4bit (the frozen base through bitsandbytes; needs a CUDA device and LoRA);
            or fp8 (the base's attention and MLP layers in float8, and their products where the
            device has them; needs LoRA).
        shard: each process holds its part of the transformer's weights and gathers a block while it
            computes (FSDP2): of the frozen ones under LoRA, else of all, with their gradients,
            optimizer states and copies. On one process there is nothing to share out.
        shard_group: processes that share one copy of the weights, a divisor of their number, such
            as the devices of one machine; none is all of them.
        attention: the backend of the transformer's attention, by its name in diffusers (native,
            flash, _native_cudnn, ...); none is torch's own choice.
        branches: under guidance, the guided and the unguided branch as one batch (together) or one
            after the other (apart). Together gathers sharded weights once for both, and takes both
            branches' activations at once in the rollout, too; numbers differ by rounding. auto is
            together with `shard` on several processes, else apart.
        cache: a folder that keeps the encodes of source images and of instructions over runs; runs
            and processes may share it. None keeps them in memory alone.
    """

    model: str = setting(DEFAULT, among=lambda: MODELS, reference="package.module:Class")
    weights: str | None = setting(None, path=True)
    intent: bool = True
    temperature: float = setting(0.7, Bounds(above=0, at_most=100))
    intent_tokens: int = setting(24, TOKENS)
    thinking: bool = False
    thinking_tokens: int = setting(256, TOKENS)
    questions: str | None = setting(None, path=True)
    guidance: float = setting(1.0, Bounds(at_least=0, at_most=100))
    guidance_image: float = setting(1.0, Bounds(at_least=0, at_most=100))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), Bounds(at_least=0, at_most=1))
    renorm: Literal["auto", "none", "token", "text_channel", "channel", "global"] = "auto"
    rounding: Literal["nearest", "released"] = "nearest"
    lora_rank: int = setting(0, Bounds(at_least=0, at_most=4_096))
    lora_alpha: float | None = setting(None, POSITIVE)
    lora_targets: str | None = setting(
        None, check=pattern_problem, what="a regular expression or none"
    )
    lora_weights: str | None = setting(None, path=True)
    resolution: tuple[int, int] = setting(
        (512, 512), PIXELS, what="height and width, such as 512x512"
    )
    condition_resolution: tuple[int, int] | None = setting(
        None, PIXELS, what="height and width, such as 512x512 or none"
    )
    buckets: tuple[tuple[int, int], ...] | Literal["auto"] = setting(
        (), check=bucket_problem, what="auto, or a list of sizes, [1024x1024, 832x1248]"
    )
    history: int = setting(1, TURNS)
    keep_source: bool = False
    guidance_embed: float | None = setting(None, Bounds(at_least=0, at_most=100))
    negative_prompt: str | None = setting(None, empty=True)
    text_tokens: int | None = setting(None, TOKENS)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: int | Literal["off", "all", "auto"] = setting(
        "off",
        COUNT,
        what="off, all, auto or a number of blocks",
        spellings=((False, "off"), (True, "all")),
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", spellings=((False, "off"), (True, "on"))
    )
    offload: bool = False
    vae_tiling: bool = False
    quantize: Literal["none", "4bit", "fp8"] = "none"
    shard: bool = False
    attention: str | None = None
    branches: Literal["auto", "together", "apart"] = "auto"
    cache: str | None = setting(None, path=True)
    shard_group: int | None = setting(None, Bounds(at_least=2, at_most=65_536))
    experts: Literal["all", "gen"] = "all"

    def __post_init__(self) -> None:
        respelt(self)


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling: `sessions` groups of `siblings` rollouts an iteration.

    Args:
        sessions: sessions (groups) an iteration, over all processes.
        siblings: rollouts a session.
        turns: turns of sessions drawn from the world (sessions from files have their own).
        steps: denoising steps.
        shift: timestep shift of the sigma schedule; none is the policy's own schedule (unified: no
            shift).
        dynamics: the sampler of the SDE steps: cps, flow-sde, dance-sde, wan-sde, ddim-sde
            or dpm++sde.
        noise_level: of the dynamics.
        window: consecutive SDE steps a turn that are trained; all others are ODE steps and store
            nothing.
        window_range: the window starts within this first fraction of the steps.
        window_schedule: random (each group and turn draws its start), progressive (the start moves
            on by one step every window_every iterations, and back to the first after the last),
            fixed (always the first step) or released (as a slip of Edit-R2's release has it: each
            rollout has one start in all of its turns, that of one of 24 processes).
        window_every: iterations between two moves of a progressive window.
        shared_noise: siblings start a turn from the same initial noise and differ in the window's;
            off, each has its own (as an ODE rollout needs).
        store_dtype: float32 or bfloat16, of stored latents and velocities; the sampler rounds to it
            before it scores.
        groups_per_batch: groups that go through the model together, in rollout and in training.
        ahead: make the next rollout while this one is judged: it comes from weights that are one
            update older than those that learn from it (not across a checkpoint).
        prune: later turns that are not rolled out (docs/rewards.md): off, filter (those behind an
            IF of 0, which the filter leaves untrained: the gradient is that of off) or estimate
            (where a reward's own estimate says so, which is biased).
        capture: how a denoising step runs: off (plain calls), compile (torch.compile of velocity
            and step in one; sizes that change become symbols) or graph (a CUDA graph for each
            shape).
    """

    sessions: int = setting(12, COUNT)
    siblings: int = setting(8, SIBLINGS)
    turns: int = setting(3, TURNS)
    steps: int = setting(4, STEPS)
    shift: float | None = setting(None, Bounds(above=0, at_most=100))
    dynamics: str = setting("cps", among=rollout_dynamics)
    noise_level: float = setting(0.7, Bounds(above=0, at_most=10))
    window: int = setting(2, Bounds(at_least=0, at_most=1_000))
    window_range: float = setting(0.5, Bounds(above=0, at_most=1))
    window_schedule: Literal["random", "progressive", "fixed", "released"] = "random"
    window_every: int = setting(25, TIMES)
    shared_noise: bool = True
    store_dtype: Literal["float32", "bfloat16"] = "float32"
    groups_per_batch: int = setting(6, COUNT)
    ahead: bool = False
    prune: Literal["off", "filter", "estimate"] = "off"
    capture: Literal["off", "compile", "graph"] = "off"


@dataclass(frozen=True)
class CreditConfig:
    """Scores to advantages. Fields that are none keep what the preset says.

    Args:
        preset: edit-r2, edit-r2-released, mt-editflow, flow-grpo, dance-grpo, mixgrpo,
            flow-factory, gdpo, verl-omni, dr-grpo or pku.
        weights: weight of every reward, by name. Of a single reward it is 1 unless you set another.
        baseline: session (all turns of a group share one mean, as released) or session_turn (each
            turn its own, because later turns score lower). Credit that aggregates over turns has no
            use for it.
        aggregate: none keeps the preset's; per-turn, or mean, last, product or prefix over turns,
            then broadcast.
        fusion: of several rewards: reward, advantage or gdpo.
        std: what the advantage is divided by: group, global, or off for nothing.
        filter: whether turns after a failed instruction (IF = 0) are left out; none is as the
            preset has it, and false where no reward is named IF.
        clip: bound on the advantage.
    """

    preset: str = setting("edit-r2", among=CREDIT_PRESETS)
    weights: dict[str, float] = field(
        default_factory=lambda: {"IF": 0.3, "CC": 0.3, "GA": 0.4},
        metadata={ACCEPTS: Accepts(Bounds(at_least=-1_000_000, at_most=1_000_000))},
    )
    baseline: Literal["session", "session_turn"] | None = "session_turn"
    aggregate: Literal["per-turn", "mean", "last", "product", "prefix"] | None = None
    fusion: Literal["reward", "advantage", "gdpo"] | None = None
    std: Literal["group", "global", "off"] | None = None
    filter: bool | None = None
    clip: float | None = setting(None, POSITIVE)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Args:
        iterations: rollouts in all.
        updates: passes over a rollout (ratios leave 1 after the first optimiser step).
        minibatches: optimiser steps a pass, each on its part of the groups.
        loss: grpo (clipped ratio over the window's steps), nft (DiffusionNFT: rollouts by an old
            policy, no window), awm (advantage-weighted matching: no trajectory, any sampler) or dpo
            (the best sibling against the worst, step by step).
        loss_options: settings of the loss alone, by name (docs/methods.md). awm: draws and clip;
            dpo: beta.
        lr: AdamW learning rate, of the first iteration.
        warmup: iterations over which the learning rate rises to lr (Adam's first steps are as large
            as any).
        lr_decay: the learning rate falls linearly to this fraction of itself at the last iteration
            (1: constant).
        betas: AdamW betas.
        weight_decay: AdamW weight decay.
        clip_low: lower clip range of grpo's ratio (log-probs are means over the latent, so ranges
            are small).
        clip_high: upper clip range of grpo's ratio.
        guard: GRPO-Guard's normalised ratio (grpo); the rollout then keeps its velocities inside
            the window.
        kl_weight: weight of the distance to the start; above 0 keeps a copy of the trainable
            weights.
        kl_scale: of grpo's KL (nft has velocity's): step (by 2 S^2), diffusion (2 g^2), mean (as it
            is) or velocity.
        text_weight: weight of the intents' and thoughts' policy losses beside the sum of the image
            losses over a turn's window; none is 1 / rollout.window (nft: 1 / nft_draws), 0 leaves
            the text untrained.
        text_clip: clip range of the tokens' ratios.
        text_lr: learning rate of the weights that write text (the understanding expert), in place
            of lr; it falls as lr does. None: the same.
        nft_beta: how far nft's implicit positive and negative policies lie from the old one.
        nft_draws: noise levels a turn and update at which nft compares velocities.
        old_decay: nft's old policy keeps min(old_decay * iteration, old_decay_max) of itself at
            every iteration.
        old_decay_max: see old_decay.
        context_gradient: let gradients through the context (earlier images and texts) too.
        packed: replay whole sessions in one forward where the policy can: auto (on a CPU, where it
            counts fewer operations), on or off.
        micro_batch: rows (rollout, turn and step, mixed) a training forward; none is one turn and
            step of a chunk, as the rollout went, or the whole chunk where it is packed; auto is
            what fits the device and is fastest, by the estimate of `editr2 check`. With packed: on
            as many whole sessions as have no more rows, one at least.
        old_log_prob: grpo's: rollout (as sampled), replay (from the first update's own forward), or
            auto: rollout where training walks as it did in float32.
        grad_norm: gradient norm clip.
        ema: decay of averaged weights that evaluation and export use; none trains without.
        ratio_tolerance: the first update of a run stops when a ratio differs from 1 by more than
            this.
        text_ratio_tolerance: the same for the tokens of text, whose sampling runs token by
            token.
        max_failed_scores: the run stops when more than this fraction of turns cannot be scored.
        stop_after: the run ends, finished, when so many evaluations (eval.every) in a row did not
            raise the metric of checkpoint.best; none trains all iterations.
    """

    iterations: int = setting(60, TIMES)
    updates: int = setting(1, COUNT)
    minibatches: int = setting(1, COUNT)
    loss: str = setting("grpo", among=LOSSES)
    loss_options: dict[str, Any] = field(default_factory=dict)
    lr: float = setting(2e-4, Bounds(above=0, at_most=1))
    warmup: int = setting(0, Bounds(at_least=0, at_most=1_000_000_000))
    lr_decay: float = setting(0.1, SHARE)
    betas: tuple[float, float] = setting((0.9, 0.99), Bounds(at_least=0, below=1))
    weight_decay: float = setting(0.0, Bounds(at_least=0, at_most=100))
    clip_low: float = setting(1e-4, Bounds(above=0, at_most=1))
    clip_high: float = setting(1e-4, Bounds(above=0, at_most=1_000))
    guard: bool = False
    kl_weight: float = setting(0.0, WEIGHT)
    kl_scale: Literal["step", "diffusion", "mean", "velocity"] = "step"
    text_weight: float | None = setting(None, WEIGHT)
    text_clip: float = setting(0.2, Bounds(above=0, at_most=1))
    text_lr: float | None = setting(None, Bounds(above=0, at_most=1))
    nft_beta: float = setting(1.0, Bounds(above=0, at_most=1_000))
    nft_draws: int = setting(2, Bounds(at_least=1, at_most=1_000))
    old_decay: float = setting(0.001, SHARE)
    old_decay_max: float = setting(0.5, SHARE)
    context_gradient: bool = False
    packed: Literal["auto", "on", "off"] = "auto"
    micro_batch: int | Literal["auto"] | None = setting(
        None, COUNT, what="auto or a number of rows or none"
    )
    old_log_prob: Literal["auto", "rollout", "replay"] = "auto"
    grad_norm: float = setting(1.0, POSITIVE)
    ema: float | None = setting(0.95, DECAY)
    ratio_tolerance: float = setting(1e-5, POSITIVE)
    text_ratio_tolerance: float = setting(1e-3, POSITIVE)
    max_failed_scores: float = setting(0.5, SHARE)
    stop_after: int | None = setting(None, TIMES)

    @property
    def rows(self) -> int | None:
        """`micro_batch` as a number or none, which auto is where nobody settled it."""
        return None if isinstance(self.micro_batch, str) else self.micro_batch


FACTOR = Bounds(at_least=1, at_most=1_000)


@dataclass(frozen=True)
class DriftConfig:
    """How far the outputs of an evaluation may be from their sources, by the mean of any turn,
    before an alarm is raised; none only reports. Look at what the first evaluation says before you
    choose: an edit that was asked for moves all three.

    Args:
        structure: least correlation of the gradients of luma; 1 is the source.
        saturation: largest factor by which colours get stronger or weaker.
        sharpness: the same of the variance of the Laplacian.
    """

    structure: float | None = setting(None, SHARE)
    saturation: float | None = setting(None, FACTOR)
    sharpness: float | None = setting(None, FACTOR)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: fixed seeds and greedy intents, so the same weights always score the same.

    Args:
        sessions: sessions of an evaluation; 0 trains without any (and what needs one is refused).
        turns: turns of its sessions where they are drawn from the world; none is rollout.turns.
        sampler: rollout (as in training, window noise and all, with fixed seeds: the policy that is
            trained) or ode (no noise after the initial latent).
        steps: denoising steps; none uses rollout.steps.
        intent_tokens: at most this many tokens an intent; none uses policy.intent_tokens.
        every: also evaluate each so many iterations; 0 only before and after.
        strips: sessions shown as film-strips in the report; 0 draws none.
        strips_from: of what a strip is: groups (the first rollout of a whole group, sampled as in
            training, with its advantages; rolled out for it) or evaluation (the rollout that was
            evaluated: greedy intents, eval.sampler and its seeds, no advantages; none besides).
        reward: judges that training never asks, a list of name or function, options, concurrency,
            timeout and retries each, as reward.use. Their scores stand apart, and an alarm is
            raised where they fall while the trained reward rises.
    """

    sessions: int = setting(200, Bounds(at_least=0, at_most=1_000_000))
    turns: int | None = setting(None, TURNS)
    sampler: Literal["rollout", "ode"] = "rollout"
    steps: int | None = setting(None, STEPS)
    intent_tokens: int | None = setting(None, TOKENS)
    every: int = setting(0, Bounds(at_least=0, at_most=1_000_000_000))
    strips: int = setting(12, Bounds(at_least=0, at_most=1_000))
    strips_from: Literal["groups", "evaluation"] = "groups"
    reward: tuple[RewardUse, ...] = setting((), what=REWARDS_LISTED)
    drift: DriftConfig = field(default_factory=DriftConfig)

    @property
    def uses(self) -> tuple[tuple[str, RewardUse], ...]:
        """Each judge of `reward`, behind the setting that it stands in."""
        return listed_uses("eval.reward", self.reward)

    @property
    def off(self) -> bool:
        return self.sessions == 0


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: iterations between checkpoints (the last iteration always writes one).
        keep: newest checkpoints kept.
        best: the metric by whose evaluations the best weights are kept, as the policy folder
            `best/` of the run: reward, success, the name of a score, or of eval.reward eval.reward
            (their mean) and eval.NAME; the mean over turns. None keeps none.
    """

    every: int = setting(5, TIMES)
    keep: int = setting(2, TIMES)
    best: str | None = setting(None, what="the name of a metric or none")


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        seed: everything random in the run follows from it.
        out: the run's folder; an unfinished run there is resumed.
    """

    seed: int = setting(0, SEED)
    out: str = setting("runs/train", path=True, what="a folder")
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
