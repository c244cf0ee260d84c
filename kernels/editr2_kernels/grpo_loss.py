"""The clipped policy loss of a stored sampler step, with the KL to a reference velocity and
everything one logs of it.

    log p  = w mean(z^2) + c     z = x' - mu     mu = A x + B u (+ C m_prev)     u as in `guidance`
    rho    = exp(log p - log p_old)
    policy = max(-A rho, -A clip(rho, 1 - low, 1 + high))     A clamped to +- advantage_clip first
    kl     = mean((B (u - v_ref))^2) / (2 S^2)                `kl_scale` has the published variants
    loss   = sum_b weight_b (policy_b + kl_weight kl_b)       weight_b = mask_b / normalizer

GRPO-Guard: with b = mean((B (u - v_old))^2) / (2 S^2), rho = exp((log p - log p_old + b) S) and
policy is divided by sigma - sigma'. Per sample the gradient is one linear combination, whose three
factors the forward leaves behind:

    d loss / d u = on_z z + on_ref (u - v_ref) + on_old (u - v_old)

so the forward reads every latent once, the backward (`stored_step`) reads once and writes the
gradient once, and nothing of the size of the latents is stored in between. ODE rows (S = 0) have no
policy gradient; their ratio is 1 when log p_old is what `sde_step` returned.

Sources: PPO (arXiv 1707.06347); Flow-GRPO (arXiv 2505.05470); GRPO-Guard (arXiv 2510.22319).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import differentiable, operator
from .backends import pointer, select
from .guidance import Renorm, call_compiled
from .numerics import mean_ref
from .stored_step import (
    REPLAY_SCHEMA,
    Replay,
    backward,
    make_replay,
    moments_ref,
    save,
    saved,
    without_gradient,
)

KlScale = Literal["step", "diffusion", "mean", "velocity"]
KL_SCALES = ("step", "diffusion", "mean", "velocity")  # the position is the code the kernels take
STEP, DIFFUSION, MEAN, VELOCITY = range(4)


class GrpoMetrics(NamedTuple):
    """0-dim fp32 tensors, means over the samples of the call that count (0 where none does)."""

    ratio_mean: Tensor
    ratio_max_deviation: Tensor  # max |rho - 1|
    clip_fraction_low: Tensor  # share with rho < 1 - low
    clip_fraction_high: Tensor  # share with rho > 1 + high
    approx_kl: Tensor  # of (log p - log p_old)^2 / 2
    kl: Tensor  # to the reference velocity, unweighted; 0 without v_ref
    policy_loss: Tensor
    non_finite: Tensor  # 1 if the loss of any sample that counts is not finite, else 0


class GrpoLoss(NamedTuple):
    """loss, 0-dim fp32, carries the gradient; nothing else does. log_prob, ratio, kl: [B] fp32,
    masked samples too."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    kl: Tensor
    metrics: GrpoMetrics


class _Options(NamedTuple):
    """As the operator takes them: advantage_clip < 0 and normalizer 0 stand for None."""

    clip_low: float
    clip_high: float
    advantage_clip: float
    kl_weight: float
    kl_scale: int
    guard: bool
    normalizer: float


OPTIONS_SCHEMA = (
    "float clip_low, float clip_high, float advantage_clip, float kl_weight, int kl_scale, bool "
    "guard, float normalizer"
)


def _options(
    clip: float | tuple[float, float],
    advantage_clip: float | None,
    v_ref: Tensor | None,
    kl_weight: float,
    kl_scale: str,
    guard: bool,
    v_old: Tensor | None,
    normalizer: float | None,
) -> _Options:
    low, high = _checks.pair("clip", clip) if isinstance(clip, (tuple, list)) else (clip, clip)
    _checks.not_negative("clip", low)
    _checks.not_negative("clip", high)
    if low > 1:
        raise ValueError(
            f"clip must leave the ratio a lower bound of at least 0, low <= 1; got {low}"
        )
    if advantage_clip is not None:
        _checks.positive("advantage_clip", advantage_clip)
    _checks.not_negative("kl_weight", kl_weight)
    if kl_weight > 0 and v_ref is None:
        raise ValueError(
            f"v_ref is required with kl_weight {kl_weight}: the velocity the KL is taken to"
        )
    if kl_scale not in KL_SCALES:
        raise ValueError(f"kl_scale must be one of {', '.join(KL_SCALES)}, got {kl_scale!r}")
    if guard != (v_old is not None):
        raise ValueError(
            "v_old is required with guard=True: the velocity of the rollout"
            if guard
            else "v_old is read with guard=True alone"
        )
    if normalizer is not None:
        _checks.positive("normalizer", normalizer)
    return _Options(
        low,
        high,
        -1.0 if advantage_clip is None else advantage_clip,
        kl_weight,
        KL_SCALES.index(kl_scale),
        guard,
        0.0 if normalizer is None else normalizer,
    )


def _grpo_ref(
    replay: Replay, old_log_prob: Tensor, advantage: Tensor, mask: Tensor | None, o: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_prob, ratio, kl, metrics [8], factors [B, 3]), differentiable; the sample in order
    of objective.h."""
    batch, n = replay.x.shape
    counted = torch.ones(batch, dtype=torch.bool, device=replay.x.device) if mask is None else mask
    row, u_BN, z_BN = moments_ref(without_gradient(replay, ~counted))
    dtype = u_BN.dtype
    _, b, _, s, w, c, sigma, sigma_next = (scalar[:, 0] for scalar in row)
    noisy = s != 0
    delta = sigma - sigma_next
    twice_variance = torch.where(noisy, 2.0 * s * s, 1.0)
    kl_b = torch.ones_like(b) if o.kl_scale == VELOCITY else b

    def moment(velocity: Tensor | None, factor: Tensor) -> Tensor:
        if velocity is None:
            return torch.zeros_like(b)
        difference_BN = factor[:, None] * (u_BN - velocity.to(dtype))
        return mean_ref(difference_BN * difference_BN)

    log_prob = w * mean_ref(z_BN * z_BN) + c
    log_ratio = log_prob - old_log_prob.to(dtype)
    exponent = log_ratio
    if o.guard:
        exponent = torch.where(
            noisy, (log_ratio + moment(replay.v_old, b) / twice_variance) * s, 0.0
        )
    a = advantage.to(dtype)
    if o.advantage_clip >= 0:
        a = a.clamp(-o.advantage_clip, o.advantage_clip)
    ratio = torch.exp(exponent.detach())
    # 0 times a ratio of infinity is 0; where the ratio is NaN the loss stays so.
    rho = torch.exp(torch.where((a == 0) & (ratio == torch.inf), 0.0, exponent))
    low, high = torch.ones_like(rho) - o.clip_low, torch.ones_like(rho) + o.clip_high
    clipped = torch.where(rho < low, low, rho)
    clipped = torch.where(clipped > high, high, clipped)
    bound = -a * rho < -a * clipped  # false for NaN, which must stay visible
    policy = torch.where(bound, -a * clipped, -a * rho)
    on_exponent = torch.where(bound, 0.0, -a * rho).detach()
    if o.guard:
        policy = policy / delta
        on_exponent = on_exponent / delta * s

    kl_factor = torch.ones_like(b)
    if o.kl_scale in (STEP, DIFFUSION):
        kl_factor = torch.where(noisy, (1.0 if o.kl_scale == STEP else delta) / twice_variance, 0.0)
    kl = kl_factor * moment(replay.v_ref, kl_b)
    sample_loss = policy + o.kl_weight * kl

    total = counted.sum().clamp(min=1).to(dtype)
    weight = counted.to(dtype) / (o.normalizer if o.normalizer > 0 else total)
    loss = torch.where(counted, weight * sample_loss, 0.0).sum()
    means = (ratio, ratio < low, ratio > high, log_ratio * log_ratio * 0.5, kl, policy)
    sums = (
        torch.where(counted, torch.stack([value.detach().to(dtype) for value in means]), 0.0).sum(1)
        / total
    )
    deviation = torch.where(counted, (ratio - 1.0).abs(), 0.0)
    metrics = torch.stack(
        (
            sums[0],
            deviation.amax() if batch else torch.zeros_like(total),
            *sums[1:].unbind(),
            (counted & ~torch.isfinite(sample_loss)).any().to(dtype),
        )
    )

    b, weight = b.double(), weight.double()
    policy_weight = weight * on_exponent
    on_ref = on_old = torch.zeros_like(b)
    if o.guard and replay.v_old is not None:
        on_old = torch.where(noisy, b * b / n * policy_weight * 2.0 / twice_variance, 0.0)
    if replay.v_ref is not None:
        on_ref = 2.0 * kl_b.double() ** 2 / n * kl_factor * o.kl_weight * weight
    factors = torch.stack((-2.0 * w * b / n * policy_weight, on_ref, on_old), 1)
    factors = torch.where(counted[:, None], factors, 0.0).to(torch.float32).detach()
    return loss, log_prob, ratio, kl, metrics, factors


def grpo_loss_ref(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: float | tuple[float, float] = 1e-5,
    advantage_clip: float | None = 5.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_scale: KlScale = "step",
    guard: bool = False,
    v_old: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | None = None,
    **guidance: Any,
) -> GrpoLoss:
    """The definition, in plain PyTorch on any device; gradient to v and the branches of guidance
    only.

    guidance: m_prev and the guidance arguments of `sde_log_prob`. fp64 latents are computed in
        fp64.
    """
    replay = make_replay(
        x, x_next, v, table, step_index, v_ref=v_ref, v_old=v_old, doubles=True, **guidance
    )
    options = _options(clip, advantage_clip, v_ref, kl_weight, kl_scale, guard, v_old, normalizer)
    loss, log_prob, ratio, kl, metrics, _ = _grpo_ref(
        replay, old_log_prob.detach(), advantage.detach(), mask, options
    )
    return GrpoLoss(
        loss, log_prob.detach(), ratio.detach(), kl.detach(), GrpoMetrics(*metrics.unbind())
    )


def _outputs(replay: Replay) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, empty = replay.v.shape[0], replay.table.new_empty  # the table is fp32
    return empty(()), empty(batch), empty(batch), empty(batch), empty(8), empty((batch, 3))


def _fake_grpo_loss(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(Replay.split(inputs)[0])


@operator(
    "grpo_loss",
    f"({REPLAY_SCHEMA}, Tensor old_log_prob, Tensor advantage, Tensor? mask, {OPTIONS_SCHEMA}, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_grpo_loss,
)
def _grpo_loss(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], log_prob [B], ratio [B], kl [B], metrics [8], factors [B, 3] of a unit incoming
    gradient), all fp32."""
    replay, (old_log_prob, advantage, mask, *numbers, backend) = Replay.split(inputs)
    options = _Options(*numbers)
    chosen = select(backend, replay.x.device)
    replay = replay.checked(chosen)
    if chosen == "ref":
        loss, log_prob, ratio, kl, metrics, factors = _grpo_ref(
            replay, old_log_prob, advantage, mask, options
        )
        return loss, log_prob, ratio, kl, metrics, factors
    outputs = _outputs(replay)
    if replay.x.shape[0] == 0:
        for output in outputs:
            output.zero_()
        return outputs
    old_log_prob, advantage = old_log_prob.contiguous(), advantage.contiguous()
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.grpo_loss(
            replay.latents,
            replay.x_next,
            replay.v_ref,
            replay.v_old,
            replay.table,
            replay.step_index,
            old_log_prob,
            advantage,
            mask,
            *options,
            *outputs,
        )
    else:
        names = ("loss", "log_prob", "ratio", "kl", "metrics", "factors")
        call_compiled(
            chosen,
            "grpo_loss",
            replay.latents,
            **replay.arguments(),
            old_log_prob=pointer(old_log_prob),
            advantage=pointer(advantage),
            mask=pointer(mask),
            **options._asdict(),
            **{name: pointer(output) for name, output in zip(names, outputs, strict=True)},
        )
    return outputs


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    replay, (_, _, _, *numbers, backend) = Replay.split(inputs)
    if _Options(*numbers).kl_weight == 0:
        replay = replay._replace(v_ref=None)  # reported, not trained on: its factor is 0
    save(ctx, replay, output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient
    ctx.backend, ctx.count = backend, len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *others: Any) -> tuple:
    replay, (factors,) = saved(ctx)
    grads = backward(ctx, replay, ctx.backend, factors=factors, scale=grad_loss.float().reshape(1))
    return *grads, *[None] * (ctx.count - len(grads))


differentiable("grpo_loss", setup_context=_setup_context, backward=_backward, results=1)


def grpo_loss(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: float | tuple[float, float] = 1e-5,
    advantage_clip: float | None = 5.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_scale: KlScale = "step",
    guard: bool = False,
    v_old: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | None = None,
    m_prev: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    v_uncond_image: Tensor | None = None,
    guidance_image: float | Tensor | None = None,
    guidance_interval: tuple[float, float] | Tensor | None = None,
    renorm: Renorm = "none",
    backend: str | None = None,
) -> GrpoLoss:
    """Policy loss of the moves x -> x_next; differentiable to v and, through guidance, to v_uncond
    and v_uncond_image.

    Args:
        x, x_next, v, table, step_index, m_prev and from v_uncond to renorm: as in `sde_log_prob`.
            Samples may be at different steps and rows. Arithmetic is fp32 whatever their dtypes,
            also under autocast.
        old_log_prob: [B] float32, what `sde_step` returned.
        advantage: [B] float32.
        clip: the ratio is clipped to 1 -+ clip, or to (1 - low, 1 + high), low <= 1. Log-probs are
            means over elements: small.
        advantage_clip: bound of |advantage|; None for none.
        v_ref: like x in shape; a reference policy's (guided) velocity, for the KL.
        kl_weight: weight of the KL, >= 0; above 0 it needs v_ref. With v_ref and 0 the KL is
            reported only.
        kl_scale: "step" divides the mean's squared difference by 2 S^2; "diffusion" by 2 S^2 /
            (sigma - sigma'), which is 2 g^2 of the dynamics that have a diffusion coefficient g,
            S = g sqrt(sigma - sigma'), and of no other; "mean" takes it as it is; "velocity" is
            mean((u - v_ref)^2). The first two are 0 for ODE rows.
        guard: GRPO-Guard's ratio normalisation, which also divides the policy loss by sigma -
            sigma'; needs v_old, the (guided) velocity of the rollout, like x in shape.
        mask: [B] bool; False takes a sample out of loss, gradient and metrics, whatever it holds
            (NaN included). ODE rows (S = 0) count, in the normaliser too, though they train
            nothing: mask them.
        normalizer: what the sum over samples is divided by, > 0; give the common one when a batch
            comes in parts. None: the number of samples that count, at least 1. Under torch.compile
            this and the other numbers are constants: a new value compiles again.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        GrpoLoss. With the rollout's velocity log_prob has the bits of old_log_prob, and ratio is
        exactly 1.

    Raises:
        ValueError or TypeError naming the argument. A step_index out of range, or a missing m_prev
        where a row needs it, raises on CPU tensors; on a GPU, where looking would stall the queue,
        the sample's values are NaN.
    """
    replay = make_replay(
        x,
        x_next,
        v,
        table,
        step_index,
        v_ref=v_ref,
        v_old=v_old,
        m_prev=m_prev,
        v_uncond=v_uncond,
        guidance=guidance,
        v_uncond_image=v_uncond_image,
        guidance_image=guidance_image,
        guidance_interval=guidance_interval,
        renorm=renorm,
    )
    _checks.scalars("old_log_prob", old_log_prob, "x", x)
    _checks.scalars("advantage", advantage, "x", x)
    _checks.mask(mask, "x", x)
    options = _options(clip, advantage_clip, v_ref, kl_weight, kl_scale, guard, v_old, normalizer)
    loss, log_prob, ratio, kl, metrics, _ = _grpo_loss(
        *replay,
        _checks.detached(old_log_prob),
        _checks.detached(advantage),
        mask,
        *options,
        _checks.backend_name(backend),
    )
    return GrpoLoss(loss, log_prob, ratio, kl, GrpoMetrics(*metrics.unbind()))
