"""Classifier-free guidance with renormalisation: from the velocities of two or three branches to
the one that steps.

    t = v_text  + g_text  (v - v_text)          t = v where g_text is 1
    u = v_image + g_image (t - v_image)         u = t where g_image is 1
    token, channel, global: u <- s u            text_channel: t <- s t, before u

over lines of the last dimension (`global`: the whole sample), norms in fp32:

    token                       s = |v| / |u|                         Qwen-Image
    channel, global             s = min(1, |v| / (|u| + 1e-8))        BAGEL
    text_channel                s = min(1, |v| / (|t| + 1e-8))        BAGEL

Guidance applies to a sample while low < sigma <= high; outside, and where both weights are 1, u = v
exactly, without renormalisation. With g the gradient to u, w the vector that is scaled and dot =
sum(w g) over the line, a scale passes

    to w:  s g - on_w dot w          on_w = s / base / |w|
    to v:  on_v dot v                on_v = 1 / (|v| base)

where base is the denominator of s, and on_w = on_v = 0 where the scale is clamped (or base is 0). A
norm below 1e-15 counts as 0.

Sources: classifier-free guidance (arXiv 2207.12598); the released pipelines of Qwen-Image and
BAGEL.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .backends import compiled, pointer, strided, workspace
from .numerics import sum_ref

Renorm = Literal["none", "token", "text_channel", "channel", "global"]
# The position is the code the kernels take.
RENORMS = ("none", "token", "text_channel", "channel", "global")
NONE, TOKEN, TEXT_CHANNEL, CHANNEL, GLOBAL = range(5)
# A squared norm below it counts as 0: its reciprocal must stay in the range of fp32.
LEAST_SQUARES = 1e-30


class Latents(NamedTuple):
    """What a step reads, as the operators carry it; absent tensors are None.

    x, v, m_prev, v_uncond, v_uncond_image: [B, N].
    guidance: [B, 4] fp32, text and image weight, low and high sigma.
    renorm: a position in `RENORMS`.
    width: size of the last dimension, the line of a renormalisation.
    """

    x: Tensor
    v: Tensor
    m_prev: Tensor | None
    v_uncond: Tensor | None
    v_uncond_image: Tensor | None
    guidance: Tensor | None
    renorm: int
    width: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Latents:
        values: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value
            for name, value in self._asdict().items()
        }
        return Latents(**values)

    def detached(self) -> Latents:
        """Without gradient; itself where there can be none."""
        kept = all(value is None or _checks.detached(value) is value for value in self[:6])
        return self if kept else self.map(torch.Tensor.detach)

    def addressable(self) -> Latents:
        """Every sample contiguous: what kernels address."""
        if all(value is None or value.is_contiguous() for value in self[:6]):
            return self  # tensors come first
        guidance = None if self.guidance is None else self.guidance.contiguous()
        return self.map(_checks.addressable)._replace(guidance=guidance)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments every function of a compiled module takes for these."""
        return {
            "x": strided(self.x),
            "v": strided(self.v),
            "m_prev": strided(self.m_prev),
            "v_uncond": strided(self.v_uncond),
            "v_uncond_image": strided(self.v_uncond_image),
            "guidance": pointer(self.guidance),
            "renorm": self.renorm,
            "width": self.width,
        }


# The fields of `Latents` in the schema of an operator.
LATENTS_SCHEMA = (
    "Tensor x, Tensor v, Tensor? m_prev, Tensor? v_uncond, Tensor? v_uncond_image, Tensor? "
    "guidance, int renorm, SymInt width"
)


def call_compiled(chosen: str, function: str, latents: Latents, **arguments: Any) -> None:
    """Run a latent operator of backend "cpu" or "cuda"; `latents` are addressable."""
    module, where = compiled(chosen, latents.x)
    batch, n = latents.x.shape
    scratch = None  # backend "cpu" needs none
    if chosen != "cpu":
        scratch = workspace(module, latents.x, batch, n, latents.width, latents.renorm)
    getattr(module, function)(
        **latents.arguments(), **arguments, workspace=pointer(scratch), B=batch, N=n, **where
    )


# A number beyond it is infinite in fp32.
LARGEST = 3.4028235677973366e38


def _weight(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """A finite number, or [B] fp32."""
    batch = like.shape[0]
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            raise TypeError(f"{name} must be a number or a float32 tensor, got {value.dtype}")
        if value.shape != (batch,):
            raise ValueError(
                f"{name} must have shape [{batch}], one weight a sample; got {list(value.shape)}"
            )
        _checks.same_device(name, value, "x", like)
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a float32 tensor, got {type(value).__name__}")
    # math.isfinite would break the graph of a number that changes.
    if not -LARGEST < value < LARGEST:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _interval(
    value: tuple[float, float] | Tensor | None, like: Tensor
) -> tuple[float | Tensor, float | Tensor]:
    if value is None:
        return -math.inf, math.inf
    if isinstance(value, Tensor):
        batch = like.shape[0]
        if value.dtype != torch.float32:
            raise TypeError(
                f"guidance_interval must be two numbers or a float32 tensor, got {value.dtype}"
            )
        if value.shape != (batch, 2):
            raise ValueError(
                f"guidance_interval must have shape [{batch}, 2], (low, high) a sample; got "
                f"{list(value.shape)}"
            )
        _checks.same_device("guidance_interval", value, "x", like)
        return value.detach().unbind(1)  # type: ignore[return-value]
    low, high = _checks.pair("guidance_interval", value)
    if not low < high:
        raise ValueError(
            f"guidance_interval must be (low, high) with low < high, got {(low, high)}"
        )
    for bound in (low, high):
        if not -LARGEST < bound < LARGEST and abs(bound) != math.inf:
            raise ValueError(f"guidance_interval must be in the range of float32, got {bound}")
    return low, high


def _entries(columns: tuple[float | Tensor, ...], like: Tensor) -> Tensor:
    """[B, 4] fp32 of four columns, numbers or [B] tensors, made on the device: nothing waits, and a
    graph can capture it.

    Numbers alone are one launch, which counts in a loop of steps: all sixteen bytes of a row are
    one complex number to `full`. (Read as doubles, two finite or infinite fp32 numbers are never
    NaN, so no bit of them can be lost.)
    """
    if torch.compiler.is_compiling():  # a number may be a symbol, and all of this is fused
        size = like.shape[:1]
        filled = [
            column
            if isinstance(column, Tensor)
            else torch.full(size, column, dtype=torch.float32, device=like.device)
            for column in columns
        ]
        return torch.stack(filled, dim=1)
    tensors = [column for column in columns if isinstance(column, Tensor)]
    if len(tensors) == len(columns):
        return torch.stack(tensors, dim=1)
    rows = _rows_of([0.0 if isinstance(column, Tensor) else column for column in columns], like)
    if not tensors:
        return rows
    return torch.stack(
        [
            column if isinstance(column, Tensor) else number
            for column, number in zip(columns, rows.unbind(1), strict=True)
        ],
        dim=1,
    )


def _rows_of(numbers: list[float], like: Tensor) -> Tensor:
    """[B, 4] fp32 whose rows are these four numbers, in one launch."""
    pair = complex(*struct.unpack("=2d", struct.pack("=4f", *numbers)))
    rows = torch.full((like.shape[0], 1), pair, dtype=torch.complex128, device=like.device)
    return rows.view(torch.float32)


def _weights(
    like: Tensor,
    v_uncond: Tensor | None,
    guidance: float | Tensor | None,
    v_uncond_image: Tensor | None,
    guidance_image: float | Tensor | None,
    interval: tuple[float, float] | Tensor | None,
    renorm: str,
) -> Tensor | None:
    if (
        renorm == "none"
        and v_uncond is v_uncond_image is guidance is guidance_image is interval is None
    ):
        return None  # as most calls are
    for branch_name, branch, weight_name, weight in (
        ("v_uncond", v_uncond, "guidance", guidance),
        ("v_uncond_image", v_uncond_image, "guidance_image", guidance_image),
    ):
        if branch is not None and weight is None:
            raise ValueError(
                f"{weight_name} is required with {branch_name}: the weight of that branch"
            )
        if branch is None and weight is not None:
            raise ValueError(
                f"{branch_name} is required with {weight_name}: the velocity without that condition"
            )
    if renorm not in RENORMS:
        raise ValueError(f"renorm must be one of {', '.join(RENORMS)}, got {renorm!r}")
    if guidance is None and guidance_image is None:
        if renorm != "none":
            raise ValueError(
                f"renorm {renorm!r} needs guidance: v_uncond or v_uncond_image is absent"
            )
        if interval is not None:
            raise ValueError(
                "guidance_interval needs guidance: v_uncond or v_uncond_image is absent"
            )
        return None
    text = _weight("guidance", 1.0 if guidance is None else guidance, like)
    image = _weight("guidance_image", 1.0 if guidance_image is None else guidance_image, like)
    return _entries((text, image, *_interval(interval, like)), like)


def make_latents(
    x: Tensor,
    v: Tensor,
    *,
    m_prev: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    v_uncond_image: Tensor | None = None,
    guidance_image: float | Tensor | None = None,
    guidance_interval: tuple[float, float] | Tensor | None = None,
    renorm: str = "none",
    doubles: bool = False,
) -> Latents:
    """Check the public arguments of a step and flatten them; only v, v_uncond and v_uncond_image
    keep a gradient.

    Makes tensors on the device only, without a host sync. doubles: accept float64 too, as the
    references do. Raises ValueError or TypeError naming the argument.
    """
    _checks.samples("x", x, doubles=doubles)
    _checks.like("v", v, "x", x, doubles=doubles)
    flat: dict[str, Tensor | None] = {"v_uncond": v_uncond, "v_uncond_image": v_uncond_image}
    for name, branch in flat.items():
        if branch is not None:
            _checks.like(name, branch, "v", v, doubles=doubles)
            if branch.dtype != v.dtype:
                raise TypeError(f"{name} must have the dtype of v, {v.dtype}; got {branch.dtype}")
            flat[name] = _checks.flat(name, branch)
    if m_prev is not None:
        _checks.like("m_prev", m_prev, "x", x, doubles=doubles)
        m_prev = _checks.flat("m_prev", _checks.detached(m_prev))
    return Latents(
        _checks.flat("x", _checks.detached(x)),
        _checks.flat("v", v),
        m_prev,
        flat["v_uncond"],
        flat["v_uncond_image"],
        _weights(x, v_uncond, guidance, v_uncond_image, guidance_image, guidance_interval, renorm),
        RENORMS.index(renorm),
        x.shape[-1] if x.dim() > 1 else 1,
    )


class _Guide(NamedTuple):
    """Weights of the samples, [B, 1], both 1 where guidance is inactive."""

    text: Tensor
    image: Tensor
    active: Tensor


def _guide(guidance: Tensor, sigma: Tensor) -> _Guide:
    text, image, low, high = guidance.to(sigma.dtype).split(1, dim=1)
    inside = (sigma > low) & (sigma <= high)
    text, image = torch.where(inside, text, 1.0), torch.where(inside, image, 1.0)
    return _Guide(text, image, (text != 1) | (image != 1))


def _guided(base: Tensor | None, v: Tensor, weight: Tensor) -> Tensor:
    if base is None:
        return v
    # A branch that does not count is not read: it may hold NaN.
    base = torch.where(weight == 1, v.detach(), base)
    return torch.where(weight == 1, v, base + (v - base) * weight)


def _norm(squares: Tensor) -> Tensor:
    """Correctly rounded square root; 0, with gradient 0, of what is below `LEAST_SQUARES`."""
    zero = squares < LEAST_SQUARES
    root = torch.where(zero, 1.0, squares).to(torch.float64).sqrt().to(squares.dtype)
    return torch.where(zero, 0.0, root)


class _Lines:
    """What a renormalisation scales as one: [B, N] as [B, lines, width]."""

    def __init__(self, latents: Latents):
        self.renorm = latents.renorm
        self.width = latents.x.shape[1] if latents.renorm == GLOBAL else latents.width

    def sums(self, value_BN: Tensor) -> Tensor:
        batch, n = value_BN.shape
        lines = n // self.width
        return sum_ref(value_BN.reshape(batch * lines, self.width)).view(batch, lines, 1)

    def times(self, factor: Tensor, value_BN: Tensor) -> Tensor:
        batch, n = value_BN.shape
        return (factor * value_BN.reshape(batch, n // self.width, self.width)).reshape(batch, n)

    def scale(self, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, on_w, on_v of the module docstring, each [B, lines, 1]; s is differentiable."""
        v_norm, w_norm = _norm(self.sums(v * v)), _norm(self.sums(w * w))
        base = w_norm if self.renorm == TOKEN else w_norm + 1e-8
        free = base != 0
        base = torch.where(free, base, 1.0)
        s = v_norm / base
        if self.renorm != TOKEN:
            free = free & ~(s > 1)
        s = torch.where(free, s, 1.0)
        on_w = torch.where(free & (w_norm > 0), s / base / w_norm, 0.0)
        on_v = torch.where(free & (v_norm > 0), 1.0 / v_norm / base, 0.0)
        return s, on_w, on_v


def _in(latents: Latents, dtype: torch.dtype) -> Latents:
    return latents.map(lambda value: value.to(dtype))


def guided_ref(latents: Latents, sigma: Tensor) -> Tensor:
    """The guided velocity u, [B, N] in the dtype of sigma ([B, 1], fp32 or fp64); differentiable to
    the branches."""
    latents = _in(latents, sigma.dtype)
    v = latents.v
    if latents.guidance is None:
        return v
    guide = _guide(latents.guidance, sigma)
    lines = _Lines(latents)
    t = _guided(latents.v_uncond, v, guide.text)
    if latents.renorm == TEXT_CHANNEL:
        t = torch.where(guide.active, lines.times(lines.scale(v, t)[0], t), t)
    u = _guided(latents.v_uncond_image, t, guide.image)
    if latents.renorm not in (NONE, TEXT_CHANNEL):
        u = torch.where(guide.active, lines.times(lines.scale(v, u)[0], u), u)
    return torch.where(guide.active, u, v)


def guided_velocity(v: Tensor, sigma: Tensor, **guidance: Any) -> Tensor:
    """The combined velocity itself, fp32 in the shape of v; differentiable to the branches. Plain
    torch: the steps and losses combine in their kernels, and this is for where the velocity alone
    is wanted.

    v: [B, ...].
    sigma: [B] float32.
    guidance: from v_uncond to renorm, as in `sde_step`; without them v itself in fp32.

    Raises ValueError or TypeError naming the argument.
    """
    latents = make_latents(v.detach(), v, **guidance)
    _checks.scalars("sigma", sigma, "v", v)
    return guided_ref(latents, sigma[:, None]).view(v.shape)


def guidance_backward_ref(
    latents: Latents, sigma: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient to u, [B, N], to those to v, v_uncond and v_uncond_image (None where
    absent), by formula."""
    latents = _in(latents, sigma.dtype)
    v = latents.v
    if latents.guidance is None:
        return grad, None, None
    guide = _guide(latents.guidance, sigma)
    lines = _Lines(latents)
    t = _guided(latents.v_uncond, v, guide.text)

    def through_scale(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        s, on_w, on_v = (
            torch.where(guide.active[:, :, None], a, b)
            for a, b in zip(lines.scale(v, w), (1.0, 0.0, 0.0))
        )
        dot = lines.sums(w * h)
        return lines.times(s, h) - lines.times(on_w * dot, w), lines.times(on_v * dot, v)

    to_v = torch.zeros_like(grad)
    if latents.renorm == TEXT_CHANNEL:
        to_image = (1 - guide.image) * grad
        on_t, to_v = through_scale(t, guide.image * grad)
    else:
        on_u = grad
        if latents.renorm != NONE:
            on_u, to_v = through_scale(_guided(latents.v_uncond_image, t, guide.image), grad)
        to_image = (1 - guide.image) * on_u
        on_t = guide.image * on_u
    return (
        guide.text * on_t + to_v,
        None if latents.v_uncond is None else (1 - guide.text) * on_t,
        None if latents.v_uncond_image is None else to_image,
    )
