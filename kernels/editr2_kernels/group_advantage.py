"""Scores of a group of rollouts -> advantages, under the credit options of multi-turn editing RL.

    value      (aggregate over turns) -> (fuse rewards | keep apart) -> one fp32 value per unit
    advantage  (value - mean of its group) / (std + eps), (sum over rewards), clip

A *unit* is a (sample, turn) when `aggregate == "none"` and a sample otherwise. A *set* is what shares one mean:
all units of a group (baseline "session"), or those of one turn of a group (baseline "session_turn").

Exact order of operations (every backend gives identical bits; all steps are fp32, one rounding each, no fma,
round to nearest even, unless stated). Integers are int64.

 1. valid = mask (all True if absent). A score at an invalid turn is never looked at.
 2. live = valid, minus every turn t' > t of sample i for which valid[i,t] and scores[i,t,filter_reward] == 0.
 3. aggregate, each reward k on its own, turns left to right t = 0..T-1:
      none     s[t]
      mean     (((s0 + s1) + s2) + ...) / float(T)
      last     s[T-1]
      product  ((s0 * s1) * s2) * ...
      prefix   p0 = s0, p_t = p_{t-1} * s_t;  (((p0 + p1) + p2) + ...) / float(T)
 4. fusion "reward":    value = ((w0*r0 + w1*r1) + w2*r2) + ...   one column of values
    fusion "advantage": K columns of values, steps 6-8 for each column, then step 9.
 5. counted units (those inside the statistics):
      aggregate none:  filter_in_statistics ? valid : live
      else:            samples whose turns are all valid (the filter does not change the statistics)
    trained turns (the returned mask):
      aggregate none:  live;    else: live and all turns of the sample valid
 6. moment(x over a set, divisor), order-free:
      m = max |x|;   e = frexp exponent of m (m = f * 2^e, 0.5 <= f < 1; e = 0 for m = 0), then e = max(e, -80)
      q = rint(x * 2^(40-e))  (fp32 multiply, exact; rint to even)  as int64;     Q = sum of q in int64
      M = sign(Q) * floor((2*|Q| + divisor) / (2*divisor))         (int64: nearest, halves away from zero)
      moment = float32(M) * 2^(e-40)
    mean(set) = max(x) if max(x) == min(x), else moment(x, count)
 7. d = value - mean(set of the unit).  std:
      none     a = d
      group    var = moment(d*d over the counted units of the set, divisor)
      global   g = mean(all counted units of the column); var = moment((value-g)*(value-g) over all counted, divisor)
    with divisor = count, or count - 1 when `unbiased`; divisor 0 gives var = 0.
    denominator = sqrt(var) + float32(eps) (sqrt correctly rounded);   a = denominator > 0 ? d / denominator : 0
 8. (It follows that a set with a single counted unit has a = 0; a set with none has no unit that trains.)
 9. fusion "advantage": a = ((w0*a0 + w1*a1) + w2*a2) + ...
10. a = min(max(a, -clip), clip) if clip is set;   a = a + 0.0 (no negative zeros)
11. advantage[i,t] = a of its unit where the turn trains, else 0.

At most 2^20 units, so the int64 sums cannot overflow. Scores must be finite where valid, and so must their squares.

Sources: Edit-R2 (arXiv 2606.05950), MT-EditFlow (arXiv 2606.01985), Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .backends import native, pointer, select
from .philox import sqrt_ref

MAX_UNITS = 1 << 20  # each term is at most 2^40, so the int64 sum stays below 2^60

AGGREGATES = ("none", "mean", "last", "product", "prefix")
FUSIONS = ("reward", "advantage")
BASELINES = ("session", "session_turn")
STDS = ("group", "global", "none")


@dataclass(frozen=True)
class CreditOptions:
    """How scores become advantages; the module docstring has the arithmetic.

    aggregate: over turns. "none" keeps one value a turn; "prefix" is the mean over turns of the running products.
    fusion: weigh rewards before normalising ("reward") or normalise each, then weigh ("advantage").
    baseline: whether all turns of a group share one mean; "session_turn" needs aggregate "none".
    std: divide by the std of the set ("group"), of all counted values ("global"), or not at all ("none").
    unbiased: divide the squared sum by count - 1 instead of count; a single value has std 0.
    eps: added to the std.
    clip: bound on |advantage|, last; None for none.
    broadcast: put the aggregated advantage on every turn; true exactly when aggregate is not "none".
    filter_reward: index k of a reward; once scores[i, t, k] == 0, the later turns of sample i do not train.
    filter_in_statistics: whether those turns still count in mean and std (aggregate "none" only).
    """

    aggregate: Literal["none", "mean", "last", "product", "prefix"] = "none"
    fusion: Literal["reward", "advantage"] = "reward"
    baseline: Literal["session", "session_turn"] = "session"
    std: Literal["group", "global", "none"] = "group"
    unbiased: bool = False
    eps: float = 1e-4
    clip: float | None = 5.0
    broadcast: bool = False
    filter_reward: int | None = None
    filter_in_statistics: bool = False

    def __post_init__(self) -> None:
        for name, accepted in (
            ("aggregate", AGGREGATES),
            ("fusion", FUSIONS),
            ("baseline", BASELINES),
            ("std", STDS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if not (self.eps >= 0 and math.isfinite(self.eps)):
            raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"clip must be None or positive and finite, got {self.clip}")
        if self.broadcast != (self.aggregate != "none"):
            raise ValueError(
                f"broadcast must be {self.aggregate != 'none'} with aggregate {self.aggregate!r} (an aggregated "
                f"advantage goes to every turn, a per-turn one to its own), got {self.broadcast}"
            )
        if self.aggregate != "none" and self.baseline == "session_turn":
            raise ValueError(f"baseline 'session_turn' needs aggregate 'none', got aggregate {self.aggregate!r}")
        if self.filter_reward is not None and self.filter_reward < 0:
            raise ValueError(f"filter_reward must be None or an index >= 0, got {self.filter_reward}")


CREDIT_PRESETS: dict[str, CreditOptions] = {
    "edit-r2": CreditOptions(std="global", filter_reward=0),
    "edit-r2-released": CreditOptions(std="global", filter_reward=0, filter_in_statistics=True),
    "mt-editflow": CreditOptions(aggregate="mean", fusion="advantage", broadcast=True),
    "flow-grpo": CreditOptions(baseline="session_turn"),
}


class GroupAdvantage(NamedTuple):
    """advantage [N, T] fp32, 0 where masked; mask [N, T] bool, the turns that train."""

    advantage: Tensor
    mask: Tensor


class _Units(NamedTuple):
    """What is normalised: C columns of U values, who shares a set, who is inside the statistics, which turns train."""

    value_CU: Tensor
    group_U: Tensor
    turn_U: Tensor
    counted_U: Tensor
    trained_NT: Tensor


def _units(scores: Tensor, group: Tensor, weights: Tensor, mask: Tensor, options: CreditOptions) -> _Units:
    """Steps 1-5 of the module docstring."""
    n, turns, _ = scores.shape
    s_NTK = torch.where(mask[:, :, None], scores, torch.zeros_like(scores))
    live = mask
    if options.filter_reward is not None:
        failed = mask & (s_NTK[:, :, options.filter_reward] == 0)
        live = mask & (failed.cumsum(1) - failed.to(torch.int64) == 0)
    if options.aggregate == "none":
        value_UK = s_NTK.flatten(0, 1)
        group_U = group[:, None].expand(n, turns).flatten()
        turn = torch.arange(turns, device=scores.device)
        turn_U = turn.expand(n, turns).flatten() * (options.baseline == "session_turn")
        counted = (mask if options.filter_in_statistics else live).flatten()
        trained = live
    else:
        value_UK = _aggregate(s_NTK, options.aggregate)
        group_U, turn_U = group, torch.zeros_like(group)
        counted = mask.all(1)
        trained = live & counted[:, None]
    columns = _fuse(value_UK.T, weights)[None] if options.fusion == "reward" else value_UK.T
    return _Units(columns.contiguous(), group_U.contiguous(), turn_U.contiguous(), counted, trained)


def _aggregate(s_NTK: Tensor, how: str) -> Tensor:
    turns = s_NTK.shape[1]
    if how == "last":
        return s_NTK[:, turns - 1]
    total = running = s_NTK[:, 0]
    for t in range(1, turns):
        running = running * s_NTK[:, t]
        total = total + (running if how == "prefix" else s_NTK[:, t])
    # A tensor divisor: dividing by a Python number may become a multiplication by its reciprocal.
    return running if how == "product" else total / torch.full_like(total, turns)


def _fuse(columns: Tensor, weights: Tensor) -> Tensor:
    total = weights[0] * columns[0]
    for k in range(1, columns.shape[0]):
        total = total + weights[k] * columns[k]
    return total


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _moment(value: Tensor, counted: Tensor, which: Tensor, divisor: Tensor) -> Tensor:
    """Step 6: sum / divisor per set by a fixed-point sum, which no order can change. `which` is the set of a unit."""
    zeros = torch.zeros(divisor.shape, dtype=torch.float32, device=value.device)
    largest = zeros.scatter_reduce(0, which, torch.where(counted, value.abs(), 0.0), "amax")
    exponent = torch.frexp(largest).exponent.to(torch.int64).clamp(min=-80)
    q = torch.round(value * _power_of_two(40 - exponent)[which])
    q = torch.where(counted, q, 0.0).to(torch.int64)
    total = torch.zeros_like(divisor).index_add(0, which, q)
    safe = divisor.clamp(min=1)
    mean = total.sign() * torch.div(2 * total.abs() + safe, 2 * safe, rounding_mode="floor")
    return torch.where(divisor > 0, mean.to(torch.float32) * _power_of_two(exponent - 40), 0.0)


def _mean(value: Tensor, counted: Tensor, which: Tensor, count: Tensor) -> Tensor:
    start = torch.zeros(count.shape, dtype=torch.float32, device=value.device)
    high = start.sub(torch.inf).scatter_reduce(0, which, torch.where(counted, value, -torch.inf), "amax")
    low = start.add(torch.inf).scatter_reduce(0, which, torch.where(counted, value, torch.inf), "amin")
    return torch.where(high == low, high, _moment(value, counted, which, count))


def _normalise(value: Tensor, counted: Tensor, which: Tensor, sets: int, options: CreditOptions) -> Tensor:
    """Steps 6-7 for one column, [U] -> [U]."""

    def statistics(which: Tensor, sets: int) -> tuple[Tensor, Tensor]:
        count = torch.zeros(sets, dtype=torch.int64, device=value.device).index_add(0, which, counted.to(torch.int64))
        d = value - _mean(value, counted, which, count)[which]
        return d, sqrt_ref(_moment(d * d, counted, which, count - int(options.unbiased)))[which]

    d, std = statistics(which, sets)
    if options.std == "none":
        return d
    if options.std == "global":
        _, std = statistics(torch.zeros_like(which), 1)
    denominator = std + options.eps
    return torch.where(denominator > 0, d / denominator, 0.0)


def _finish(a_CU: Tensor, weights: Tensor, trained: Tensor, options: CreditOptions) -> Tensor:
    """Steps 9-11."""
    a_U = _fuse(a_CU, weights) if options.fusion == "advantage" else a_CU[0]
    if options.clip is not None:
        a_U = a_U.clamp(-options.clip, options.clip)
    a_NT = (a_U + 0.0).view(trained.shape[0], -1).expand(trained.shape)
    return torch.where(trained, a_NT, 0.0)


def group_advantage_ref(
    scores: Tensor, group: Tensor, options: CreditOptions, *, weights: Tensor, mask: Tensor
) -> GroupAdvantage:
    """The definition, in plain PyTorch on any device."""
    units = _units(scores, group, weights, mask, options)
    turns = int(units.turn_U.max()) + 1 if units.turn_U.numel() else 1
    which = torch.unique(units.group_U, return_inverse=True)[1] * turns + units.turn_U
    sets = int(which.max()) + 1 if which.numel() else 0
    columns = [_normalise(value, units.counted_U, which, sets, options) for value in units.value_CU]
    return GroupAdvantage(_finish(torch.stack(columns), weights, units.trained_NT, options), units.trained_NT)


@torch.library.custom_op(
    "editr2::group_advantage",
    mutates_args=(),
    schema="(Tensor scores, Tensor group, Tensor weights, Tensor mask, str aggregate, str fusion, str baseline, "
    "str std, bool unbiased, float eps, float? clip, int? filter_reward, bool filter_in_statistics, str backend)"
    " -> (Tensor, Tensor)",
)
def _group_advantage(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    mask: Tensor,
    aggregate: str,
    fusion: str,
    baseline: str,
    std: str,
    unbiased: bool,
    eps: float,
    clip: float | None,
    filter_reward: int | None,
    filter_in_statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = CreditOptions(
        aggregate,  # type: ignore[arg-type]
        fusion,  # type: ignore[arg-type]
        baseline,  # type: ignore[arg-type]
        std,  # type: ignore[arg-type]
        unbiased,
        eps,
        clip,
        aggregate != "none",
        filter_reward,
        filter_in_statistics,
    )
    chosen = select(backend, scores.device)
    if scores.device.type == "cpu" and not bool((scores.isfinite() | ~mask[:, :, None]).all()):
        raise ValueError("scores must be finite wherever mask is True; mark failed scores in mask instead")
    if scores.shape[0] == 0:
        return scores.new_zeros(mask.shape), mask.clone()
    if chosen == "ref":
        out = group_advantage_ref(scores, group, options, weights=weights, mask=mask)
        # An operator's output may not be one of its inputs, which the mask is when nothing is filtered.
        return out.advantage, out.mask.clone()
    if chosen == "cpu":
        scores, group, weights = scores.contiguous(), group.contiguous(), weights.contiguous()
        mask = mask.contiguous().view(torch.uint8)
        advantage = torch.empty(mask.shape, dtype=torch.float32, device=scores.device)
        trained = torch.empty_like(mask)
        native().group_advantage(
            pointer(scores),
            pointer(group),
            pointer(weights),
            pointer(mask),
            AGGREGATES.index(aggregate),
            FUSIONS.index(fusion),
            BASELINES.index(baseline),
            STDS.index(std),
            int(unbiased),
            eps,
            -1.0 if clip is None else clip,
            int(options.broadcast),
            -1 if filter_reward is None else filter_reward,
            int(filter_in_statistics),
            pointer(advantage),
            pointer(trained),
            *scores.shape,
        )
        return advantage, trained.view(torch.bool)
    from . import triton_kernels

    units = _units(scores, group, weights, mask, options)
    a_CU = torch.empty_like(units.value_CU)
    triton_kernels.group_normalise(
        units.value_CU, units.group_U, units.turn_U, units.counted_U, a_CU, STDS.index(std), unbiased, eps
    )
    return _finish(a_CU, weights, units.trained_NT, options), units.trained_NT.clone()


@_group_advantage.register_fake
def _(scores: Tensor, group: Tensor, weights: Tensor, mask: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return scores.new_empty(mask.shape), torch.empty(mask.shape, dtype=torch.bool, device=mask.device)


def group_advantage(
    scores: Tensor,
    group: Tensor,
    options: CreditOptions,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> GroupAdvantage:
    """Advantages of rollouts from their scores. No gradient. Identical bits on every backend and in every order.

    Args:
        scores: [N, T, K] floating point; sample, turn, reward. Read as fp32.
        group: [N] int64, any values; samples of one id are siblings.
        options: the credit options; see CREDIT_PRESETS.
        weights: [K], the weight of each reward (default 1/K each).
        mask: [N, T] bool, False where a turn has no score (a failed judge). Such a turn gets advantage 0 and stays
            outside the statistics; with `aggregate` it takes its whole sample with it. Default: all True.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        advantage [N, T] fp32, and mask [N, T] bool: the turns that train (given, and not behind the filter).

    Raises:
        ValueError or TypeError naming the argument. Scores that are not finite raise on CPU tensors only.
    """
    _checks.tensor("scores", scores)
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.dim() != 3 or scores.shape[1] == 0 or scores.shape[2] == 0:
        raise ValueError(f"scores must have shape [N, T, K] with T, K >= 1, got {list(scores.shape)}")
    n, turns, rewards = scores.shape
    if n * turns > MAX_UNITS:
        raise ValueError(f"scores may hold at most 2^20 turns in all, got {n} x {turns}")
    _checks.per_sample("group", group, n, "scores", scores)
    if not isinstance(options, CreditOptions):
        raise TypeError(f"options must be a CreditOptions, got {type(options).__name__}")
    if options.filter_reward is not None and options.filter_reward >= rewards:
        raise ValueError(f"options.filter_reward must be below K = {rewards}, got {options.filter_reward}")
    if weights is None:
        weights = torch.full((rewards,), 1.0 / rewards, dtype=torch.float32, device=scores.device)
    _checks.tensor("weights", weights)
    if list(weights.shape) != [rewards]:
        raise ValueError(f"weights must have shape [{rewards}], one a reward; got {list(weights.shape)}")
    _checks.same_device("weights", weights, "scores", scores)
    if mask is None:
        mask = torch.ones(n, turns, dtype=torch.bool, device=scores.device)
    _checks.tensor("mask", mask)
    if mask.dtype != torch.bool or list(mask.shape) != [n, turns]:
        raise ValueError(f"mask must be bool of shape [{n}, {turns}], got {mask.dtype} of {list(mask.shape)}")
    _checks.same_device("mask", mask, "scores", scores)
    advantage, trained = torch.ops.editr2.group_advantage(
        scores.detach().to(torch.float32),
        group,
        weights.detach().to(torch.float32),
        mask,
        options.aggregate,
        options.fusion,
        options.baseline,
        options.std,
        options.unbiased,
        options.eps,
        options.clip,
        options.filter_reward,
        options.filter_in_statistics,
        _checks.backend_name(backend),
    )
    return GroupAdvantage(advantage, trained)
