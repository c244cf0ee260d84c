"""What the replays of a stored step share: their arguments, and the one backward all of them have.

Every loss on a step is a function of per-sample moments of z = x' - mu, B (u - v_ref) and B (u -
v_old), u being the guided velocity (`guidance`). Its gradient to u is therefore one linear
combination, with three numbers a sample:

    g = on_z z + on_ref (u - v_ref) + on_old (u - v_old)

and goes on through guidance to v and its branches.

Of `sde_log_prob`:  on_z = -2 w B / N grad_log_prob,  on_ref = 2 B^2 / N grad_mean_diff.
A sample whose three numbers are all 0 gets exactly 0, whatever its latents hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import operator
from .backends import pointer, select, strided
from .guidance import Latents, call_compiled, guidance_backward_ref, guided_ref, make_latents
from .numerics import compute_dtype, times_ref
from .table import Rows, mean_of_rows_ref, rows_ref

# The fields of `Replay` in the schema of an operator.
REPLAY_SCHEMA = (
    "Tensor x, Tensor x_next, Tensor v, Tensor? m_prev, Tensor? v_uncond, Tensor? v_uncond_image, "
    "Tensor? guidance, int renorm, SymInt width, Tensor? v_ref, Tensor? v_old, Tensor table, "
    "Tensor step_index"
)


class Replay(NamedTuple):
    """The arguments every replaying operator begins with, in this order. Tensors [B, N] unless
    said; absent: None.

    guidance [B, 4] fp32, renorm, width: as in `guidance.Latents`; table [rows, 8] fp32; step_index
    [B] int64.
    """

    x: Tensor
    x_next: Tensor
    v: Tensor
    m_prev: Tensor | None
    v_uncond: Tensor | None
    v_uncond_image: Tensor | None
    guidance: Tensor | None
    renorm: int
    width: int
    v_ref: Tensor | None
    v_old: Tensor | None
    table: Tensor
    step_index: Tensor

    @staticmethod
    def split(inputs: Sequence[Any]) -> tuple[Replay, tuple]:
        """The replay and what follows it in the arguments of an operator."""
        count = len(Replay._fields)
        return Replay(*inputs[:count]), tuple(inputs[count:])

    @property
    def latents(self) -> Latents:
        return Latents(
            self.x,
            self.v,
            self.m_prev,
            self.v_uncond,
            self.v_uncond_image,
            self.guidance,
            self.renorm,
            self.width,
        )

    def checked(self, chosen: str) -> Replay:
        """With contiguous samples, as kernels read them. On CPU tensors, ValueError for a row the
        table does not have."""
        _checks.table_rows(chosen, self.table, self.step_index, self.m_prev)
        if all(value.is_contiguous() for value in self if isinstance(value, Tensor)):
            return self

        def optional(value: Tensor | None) -> Tensor | None:
            return None if value is None else _checks.addressable(value)

        return Replay(
            _checks.addressable(self.x),
            _checks.addressable(self.x_next),
            _checks.addressable(self.v),
            optional(self.m_prev),
            optional(self.v_uncond),
            optional(self.v_uncond_image),
            None if self.guidance is None else self.guidance.contiguous(),
            self.renorm,
            self.width,
            optional(self.v_ref),
            optional(self.v_old),
            self.table.contiguous(),
            self.step_index.contiguous(),
        )

    def arguments(self, *, old: bool = True) -> dict[str, Any]:
        """What the functions of a compiled module take beyond `Latents`; `old=False` for one
        without v_old."""
        given = {
            "x_next": strided(self.x_next),
            "v_ref": strided(self.v_ref),
            "table": pointer(self.table),
            "rows": self.table.shape[0],
            "step_index": pointer(self.step_index),
        }
        return given | {"v_old": strided(self.v_old)} if old else given


def make_replay(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    table: Tensor,
    step_index: Tensor,
    *,
    v_ref: Tensor | None = None,
    v_old: Tensor | None = None,
    doubles: bool = False,
    **guidance: Any,
) -> Replay:
    """Check the public arguments of a replay and flatten them; `guidance`: the keywords of
    `make_latents`.

    Only v, v_uncond and v_uncond_image keep a gradient. doubles: accept float64 too, as the
    references do. Raises ValueError or TypeError naming the argument.
    """
    latents = make_latents(x, v, doubles=doubles, **guidance)
    _checks.like("x_next", x_next, "x", x, doubles=doubles)
    _checks.transition(table, step_index, x, doubles=doubles)
    for name, velocity in (("v_ref", v_ref), ("v_old", v_old)):
        if velocity is not None:
            _checks.like(name, velocity, "x", x, doubles=doubles)
    return Replay(
        latents.x,
        _checks.flat("x_next", _checks.detached(x_next)),
        latents.v,
        latents.m_prev,
        latents.v_uncond,
        latents.v_uncond_image,
        latents.guidance,
        latents.renorm,
        latents.width,
        None if v_ref is None else _checks.flat("v_ref", _checks.detached(v_ref)),
        None if v_old is None else _checks.flat("v_old", _checks.detached(v_old)),
        _checks.detached(table),
        step_index,
    )


class Moments(NamedTuple):
    """What a loss on a step is made of: row scalars [B, 1]; the guided velocity u and z = x' - mu,
    [B, N]."""

    row: Rows
    u: Tensor
    z: Tensor


def without_gradient(replay: Replay, samples: Tensor) -> Replay:
    """The same values; no gradient reaches these samples (bool [B]), whatever they hold: 0 times
    NaN would be one."""
    branches: dict[str, Any] = {
        name: torch.where(samples[:, None], value.detach(), value)
        for name in ("v", "v_uncond", "v_uncond_image")
        if (value := getattr(replay, name)) is not None
    }
    return replay._replace(**branches)


def moments_ref(replay: Replay) -> Moments:
    """In plain PyTorch, in fp32, or fp64 where the latents are; differentiable to v, v_uncond and
    v_uncond_image."""
    dtype = compute_dtype(replay.x, replay.x_next, replay.v, replay.v_ref, replay.v_old)
    row = rows_ref(replay.table, replay.step_index, dtype)
    u = guided_ref(replay.latents, row.sigma)
    return Moments(
        row,
        u,
        replay.x_next.to(dtype) - mean_of_rows_ref(row, replay.x.to(dtype), u, replay.m_prev),
    )


def replay_backward_ref(
    replay: Replay,
    *,
    factors: Tensor | None = None,
    scale: Tensor | None = None,
    grad_log_prob: Tensor | None = None,
    grad_mean_diff: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients to v, v_uncond and v_uncond_image in the dtype of v, by the formulas; None for an
    absent branch.

    factors [B, 3] fp32 (on_z, on_ref, on_old), times scale [1] if given; or, without factors, the
    incoming gradients of `sde_log_prob`, [B] fp32 each, None for zero.
    """
    row, u, z = moments_ref(replay)
    dtype, n = z.dtype, replay.x.shape[1]
    if factors is None:
        b_over_n = row.B.double() / n
        on_z = on_ref = on_old = torch.zeros_like(row.B)
        if grad_log_prob is not None:
            on_z = times_ref(-2.0 * row.w.double() * b_over_n, grad_log_prob[:, None]).to(dtype)
        if grad_mean_diff is not None:
            on_ref = times_ref(2.0 * row.B.double() * b_over_n, grad_mean_diff[:, None]).to(dtype)
    else:
        on_z, on_ref, on_old = (factors if scale is None else times_ref(factors, scale)).split(
            1, dim=1
        )
    g = times_ref(on_z, z)
    if replay.v_ref is not None:
        g = g + times_ref(on_ref, u - replay.v_ref.to(dtype))
    if replay.v_old is not None:
        g = g + times_ref(on_old, u - replay.v_old.to(dtype))
    idle = (on_z == 0) & (on_ref == 0) & (on_old == 0)
    grads = guidance_backward_ref(replay.latents, row.sigma, g)
    v, text, image = (
        None if grad is None else torch.where(idle, 0.0, grad).to(replay.v.dtype) for grad in grads
    )
    assert v is not None
    return v, text, image


def _outputs(replay: Replay, wanted: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients; empty, [0], where one is not wanted: a schema cannot return an
    optional tensor."""
    branches = (replay.v, replay.v_uncond, replay.v_uncond_image)
    # new_empty is half of torch.empty with a dtype and a device; and not empty_like, whose strides
    # would be those of v.
    like = replay.v
    return [
        like.new_empty(like.shape if want and branch is not None else 0)
        for branch, want in zip(branches, wanted, strict=True)
    ]


def _fake_replay_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    replay, rest = Replay.split(inputs)
    v, text, image = _outputs(replay, rest[-2])
    return v, text, image


@operator(
    "replay_backward",
    f"({REPLAY_SCHEMA}, Tensor? factors, Tensor? scale, Tensor? grad_log_prob, Tensor? "
    "grad_mean_diff, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_replay_backward,
)
def _replay_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    replay, (factors, scale, grad_log_prob, grad_mean_diff, wanted, backend) = Replay.split(inputs)
    chosen = select(backend, replay.x.device)
    replay = replay.checked(chosen)
    grads = _outputs(replay, wanted)
    outputs = [
        grad if want and grad.dim() == 2 else None for grad, want in zip(grads, wanted, strict=True)
    ]
    given = {
        name: None if value is None else value.contiguous()
        for name, value in (
            ("factors", factors),
            ("scale", scale),
            ("grad_log_prob", grad_log_prob),
            ("grad_mean_diff", None if replay.v_ref is None else grad_mean_diff),
        )
    }
    if chosen == "ref":
        for out, grad in zip(outputs, replay_backward_ref(replay, **given), strict=True):
            if out is not None and grad is not None:
                out.copy_(grad)
    elif replay.x.shape[0] == 0 or all(out is None for out in outputs):
        pass
    elif chosen == "triton":
        from . import triton_kernels

        triton_kernels.replay_backward(
            replay.latents,
            replay.x_next,
            replay.v_ref,
            replay.v_old,
            replay.table,
            replay.step_index,
            *given.values(),
            *outputs,
        )
    else:
        call_compiled(
            chosen,
            "replay_backward",
            replay.latents,
            **replay.arguments(),
            **{name: pointer(value) for name, value in given.items()},
            grad_v=strided(outputs[0]),
            grad_v_uncond=strided(outputs[1]),
            grad_v_uncond_image=strided(outputs[2]),
        )
    return grads[0], grads[1], grads[2]


# Places among the arguments: of what has a gradient, and of renorm and width, which are no tensors.
_BRANCHES = tuple(map(Replay._fields.index, ("v", "v_uncond", "v_uncond_image")))
_NUMBERS = Replay._fields.index("renorm")


def save(ctx: Any, replay: Replay, *more: Tensor | None) -> None:
    """In the `setup_context` of an operator whose arguments begin with `Replay`: keep it and `more`
    for backward."""
    ctx.save_for_backward(*replay[:_NUMBERS], *replay[_NUMBERS + 2 :], *more)
    ctx.renorm, ctx.width = replay.renorm, replay.width


def saved(ctx: Any) -> tuple[Replay, tuple[Tensor | None, ...]]:
    """What `save` kept."""
    tensors = ctx.saved_tensors
    return Replay.split((*tensors[:_NUMBERS], ctx.renorm, ctx.width, *tensors[_NUMBERS:]))


def backward(
    ctx: Any,
    replay: Replay,
    backend: str,
    *,
    factors: Tensor | None = None,
    scale: Tensor | None = None,
    grad_log_prob: Tensor | None = None,
    grad_mean_diff: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments in `Replay`, None for those without one; one launch."""
    wanted = [place in ctx.wanted for place in _BRANCHES]
    grads = _replay_backward(
        *replay, factors, scale, grad_log_prob, grad_mean_diff, wanted, backend
    )
    found: list[Tensor | None] = [None] * len(Replay._fields)
    for place, grad, want in zip(_BRANCHES, grads, wanted, strict=True):
        if want:
            found[place] = grad
    return tuple(found)
