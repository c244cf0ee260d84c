"""Scores of a group of rollouts -> advantages, under the credit options of multi-turn editing RL.

    value      (aggregate over turns) -> (fuse rewards | keep apart) -> one fp32 value per unit
    advantage  (value - mean of its set) / (std + eps), (sum over rewards),
               (renormalise over the batch), clip

Means and deviations are taken about the least value of their set, which no order changes: of scores
that are far from 0 and hardly differ nothing is lost, as it would be in a mean rounded to fp32.

A *unit* is a (sample, turn) when `aggregate == "none"` and a sample otherwise. A *set* is what
shares one mean: all units of a group (baseline "session"), or those of one turn of a group
(baseline "session_turn").

Exact order of operations (every backend gives identical bits; all steps are fp32, one rounding
each, no fma, round to nearest even, unless stated). Integers are int64.

 1. valid = mask, applies (both all True if absent). A score at an invalid turn, or of a reward that
    does not apply to its turn, is never looked at.
    judged[i,t] = applies[i,t,k] for a k with w_k != 0, or for any k where all weights are 0.
 2. live = valid, minus every turn t' > t of sample i for which valid[i,t], applies[i,t,k] and
    scores[i,t,k] == 0, k = filter_reward.
 3. aggregate, each reward k on its own, s0, s1, ... its scores of the n turns of the sample that it
    applies to, left to right:
      none     s[t]
      mean     (((s0 + s1) + s2) + ...) / float(n)
      last     s[n-1]
      product  ((s0 * s1) * s2) * ...
      prefix   p0 = s0, p_j = p_{j-1} * s_j;  (((p0 + p1) + p2) + ...) / float(n)
    Reward k applies to a unit where n > 0 ("none": where it applies to the turn).
 4. fuse(r) of a unit, over the rewards that apply to it (the others add 0 to each sum):
      (((w0*r0 + w1*r1) + w2*r2) + ...) * share
      share = 1 where V == W, else W / V;   W = ((|w0| + |w1|) + |w2|) + ..., of all rewards, and
      V = the same of those that apply
    So the weights of those that apply keep the sum of all the weights' sizes, and their signs;
    where all apply, nothing is multiplied.
    Columns of values: the fused value, fuse of the aggregated rewards, for fusion "reward", which
    is a value of every unit; each of the K rewards for "advantage" and "gdpo".
 5. counted units (those inside the statistics):
      aggregate none:  judged and (filter_in_statistics ? valid : live)
      else:            samples whose turns are all valid and of which one is judged (the filter does
                       not change the statistics)
    trained turns (the returned mask):
      aggregate none:  judged and live;    else: and all turns of the sample valid
    In a reward's own column only the counted units count that it applies to.
    A set is dropped when, by the fused value whatever the fusion, std <= float32(min_std) or
    mean >= float32(max_mean) (steps 6 and 7, before any eps). Its units no longer count, in no
    statistic, and its turns no longer train.
 6. moment(x over a set, divisor), order-free:
      m = max |x|;   e = frexp exponent of m (m = f * 2^e, 0.5 <= f < 1), then e = max(e, -80)
      q = rint(x * 2^(40-e))  (fp32 multiply, exact; rint to even)  as int64
      Q = sum of q in int64
      M = sign(Q) * floor((2*|Q| + divisor) / (2*divisor))  (int64: nearest, halves away from 0)
      moment = float32(M) * 2^(e-40);   divisor <= 0 gives 0;   NaN if any x is not finite
    With p = min x over the set and m = moment(x - p, count):
    deviation(x) = (x - p) - m          mean(set) = p + m
    std(set) = sqrt(moment(deviation(x)*deviation(x), divisor))   (sqrt correctly rounded)
    divisor = count, or count - 1 when `unbiased`
 7. d = deviation(value) in the set of the unit, and by `std`:
      none     a = d
      group    a = normal(d, std(set))
      global   a = normal(d, std(all counted units of the column))
    normal(d, std) = d / denominator, or 0 where denominator == 0, and
    denominator = std + float32(eps)  (eps_mode "add")  or  max(std, float32(eps))  ("floor")
 8. (It follows that a set with a single counted unit has a = 0; a set with none has no unit that
    trains.)
 9. fusion "advantage" and "gdpo": a = fuse(a0, a1, ...)
10. fusion "gdpo": over all counted units of the batch, a = normal(deviation(a), std)
11. a = NaN (bits 0x7FC00000) where not finite;  a = min(max(a, -clip), clip) if clip is set;
    a = a + 0.0 (no -0)
12. advantage[i,t] = a of its unit where the turn trains, else 0.

At most 2^20 units, so the int64 sums cannot overflow. Scores must be finite where valid and where
the reward applies (CPU tensors are checked). Whatever is not finite, or leaves the range of fp32 on
the way, makes NaN of all that depends on it: of its set with std "group" or "none", of the whole
batch with "global" or fusion "gdpo"; a set with NaN statistics is not dropped.

Cost: linear in the units on CPUs; on GPUs one launch that compares at most N^2 pairs of group ids,
plus per group a few scans of all ids, plus linear work of one last program for std "global" and
fusion "gdpo".

Sources: Edit-R2 (arXiv 2606.05950), MT-EditFlow (arXiv 2606.01985), Flow-GRPO (arXiv 2505.05470),
GDPO (arXiv 2601.05242), Dr. GRPO (arXiv 2503.20783), UniWorld-V2 (arXiv 2510.16888), and the
released code of DanceGRPO, MixGRPO, Flow-Factory and verl-omni.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import operator
from .backends import compiled, pointer, select
from .credit import AGGREGATES, BASELINES, FUSIONS, STDS, CreditOptions, workspace_of
from .numerics import sqrt_ref

MAX_UNITS = 1 << 20  # each term is at most 2^40, so the int64 sum stays below 2^60


class GroupAdvantage(NamedTuple):
    """advantage [N, T] fp32, 0 where masked; mask [N, T] bool, the turns that train."""

    advantage: Tensor
    mask: Tensor


class _Units(NamedTuple):
    """What is normalised: K values and one fused value of each of U units, which rewards apply to
    it, who shares a set, who counts and trains."""

    value_KU: Tensor
    applies_KU: Tensor
    fused_U: Tensor
    group_U: Tensor
    turn_U: Tensor
    counted_U: Tensor
    trained_NT: Tensor


def _units(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    mask: Tensor,
    applies: Tensor,
    options: CreditOptions,
) -> _Units:
    """Steps 1-5 of the module docstring, before sets are dropped."""
    n, turns, _ = scores.shape
    s_NTK = torch.where(mask[:, :, None] & applies, scores, torch.zeros_like(scores))
    judged = (applies & ((weights != 0) | (weights == 0).all())).any(2)
    live = mask
    if (k := options.filter_reward) is not None:
        failed = mask & applies[:, :, k] & (s_NTK[:, :, k] == 0)
        live = mask & (failed.cumsum(1) - failed.to(torch.int64) == 0)
    if options.aggregate == "none":
        value_UK, applies_UK = s_NTK.flatten(0, 1), applies.flatten(0, 1)
        group_U = group[:, None].expand(n, turns).flatten()
        turn = torch.arange(turns, device=scores.device)
        turn_U = turn.expand(n, turns).flatten() * (options.baseline == "session_turn")
        counted = (judged & (mask if options.filter_in_statistics else live)).flatten()
        trained = judged & live
    else:
        value_UK, applies_UK = _aggregate(s_NTK, applies, options.aggregate), applies.any(1)
        group_U, turn_U = group, torch.zeros_like(group)
        counted = mask.all(1) & judged.any(1)
        trained = judged & live & counted[:, None]
    fused_U = _fuse(value_UK.T, weights, applies_UK.T)
    return _Units(value_UK.T, applies_UK.T, fused_U, group_U, turn_U, counted, trained)


def _aggregate(s_NTK: Tensor, applies: Tensor, how: str) -> Tensor:
    """Step 3; 0 where a reward applies to no turn. Scores are 0 where theirs does not apply."""
    last = total = s_NTK[:, 0]
    running = torch.where(applies[:, 0], total, 1.0)
    for t in range(1, s_NTK.shape[1]):
        here, s = applies[:, t], s_NTK[:, t]
        last = torch.where(here, s, last)
        running = running * torch.where(here, s, 1.0)
        total = total + (torch.where(here, running, 0.0) if how == "prefix" else s)
    if how == "last":
        return last
    return running if how == "product" else total / applies.sum(1).clamp(min=1).to(total.dtype)


def _fuse(columns: Tensor, weights: Tensor, applies: Tensor) -> Tensor:
    """Step 4, [K, U] -> [U]."""
    terms = torch.where(applies, weights[:, None] * columns, 0.0)
    sizes = torch.where(applies, weights.abs()[:, None], 0.0)
    total, heard, whole = terms[0], sizes[0], weights[0].abs()
    for k in range(1, len(columns)):
        total, heard, whole = total + terms[k], heard + sizes[k], whole + weights[k].abs()
    return total * torch.where(heard == whole, 1.0, whole / heard)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


class _Sets(NamedTuple):
    """Set of each unit, which units count, how many count in each set."""

    which_U: Tensor
    counted_U: Tensor
    count_S: Tensor


def _sets(which: Tensor, counted: Tensor, sets: int) -> _Sets:
    count = torch.zeros(sets, dtype=torch.int64, device=which.device)
    return _Sets(which, counted, count.index_add(0, which, counted.to(torch.int64)))


def _within(sets: _Sets, here: Tensor) -> _Sets:
    """The same sets, of which only units `here` count."""
    return _sets(sets.which_U, sets.counted_U & here, len(sets.count_S))


def _moment(value: Tensor, sets: _Sets, divisor: Tensor) -> Tensor:
    """Step 6: sum / divisor per set by a fixed-point sum, which no order can change."""
    zeros = torch.zeros(divisor.shape, dtype=torch.float32, device=value.device)
    finite = value.isfinite()
    broken = (
        torch.zeros_like(divisor).index_add(
            0, sets.which_U, (sets.counted_U & ~finite).to(torch.int64)
        )
        > 0
    )
    value = torch.where(sets.counted_U & finite, value, 0.0)
    largest = zeros.scatter_reduce(0, sets.which_U, value.abs(), "amax")
    exponent = torch.frexp(largest).exponent.to(torch.int64).clamp(min=-80)
    q = torch.round(value * _power_of_two(40 - exponent)[sets.which_U]).to(torch.int64)
    total = torch.zeros_like(divisor).index_add(0, sets.which_U, q)
    safe = divisor.clamp(min=1)
    mean = total.sign() * torch.div(2 * total.abs() + safe, 2 * safe, rounding_mode="floor")
    moment = torch.where(divisor > 0, mean.to(torch.float32) * _power_of_two(exponent - 40), 0.0)
    return torch.where(broken, torch.nan, moment)


class _Centre(NamedTuple):
    """Of each set, [S]: its least value, and its mean above that."""

    least: Tensor
    above: Tensor

    def deviation(self, value: Tensor, sets: _Sets) -> Tensor:
        return (value - self.least[sets.which_U]) - self.above[sets.which_U]


def _centre(value: Tensor, sets: _Sets) -> _Centre:
    start = torch.full(sets.count_S.shape, torch.inf, dtype=torch.float32, device=value.device)
    least = start.scatter_reduce(
        0, sets.which_U, torch.where(sets.counted_U, value, torch.inf), "amin"
    )
    return _Centre(least, _moment(value - least[sets.which_U], sets, sets.count_S))


def _std(deviation: Tensor, sets: _Sets, options: CreditOptions) -> Tensor:
    return sqrt_ref(_moment(deviation * deviation, sets, sets.count_S - int(options.unbiased)))


def _divide(d: Tensor, std: Tensor, options: CreditOptions) -> Tensor:
    """normal(d, std) of step 7."""
    denominator = (
        torch.maximum(std, torch.full_like(std, options.eps))
        if options.eps_mode == "floor"
        else std + options.eps
    )
    return torch.where(denominator == 0, 0.0, d / denominator)


def _normalise(value: Tensor, sets: _Sets, batch: _Sets, options: CreditOptions) -> Tensor:
    """Step 7 for one column, [U] -> [U]."""
    d = _centre(value, sets).deviation(value, sets)
    if options.std == "none":
        return d
    if options.std == "global":
        return _divide(
            d, _std(_centre(value, batch).deviation(value, batch), batch, options), options
        )
    return _divide(d, _std(d, sets, options)[sets.which_U], options)


def group_advantage_ref(
    scores: Tensor,
    group: Tensor,
    options: CreditOptions,
    *,
    weights: Tensor,
    mask: Tensor,
    applies: Tensor | None = None,
) -> GroupAdvantage:
    """The definition, in plain PyTorch on any device."""
    if applies is None:
        applies = torch.ones_like(scores, dtype=torch.bool)
    units = _units(scores, group, weights, mask, applies, options)
    trained = units.trained_NT
    turns = scores.shape[1] if options.baseline == "session_turn" else 1
    ids, index = torch.unique(units.group_U, return_inverse=True)
    sets = _sets(index * turns + units.turn_U, units.counted_U, ids.numel() * turns)
    if options.min_std is not None or options.max_mean is not None:
        centre = _centre(units.fused_U, sets)
        mean, std = (
            centre.least + centre.above,
            _std(centre.deviation(units.fused_U, sets), sets, options),
        )
        drop = torch.zeros_like(mean, dtype=torch.bool)
        if options.min_std is not None:
            drop |= std <= torch.full_like(std, options.min_std)
        if options.max_mean is not None:
            drop |= mean >= torch.full_like(mean, options.max_mean)
        kept = ~drop[sets.which_U]
        sets = _sets(sets.which_U, sets.counted_U & kept, ids.numel() * turns)
        trained = trained & kept.view(trained.shape[0], -1)
    batch = _sets(torch.zeros_like(sets.which_U), sets.counted_U, 1)
    if options.fusion == "reward":
        a_U = _normalise(units.fused_U, sets, batch, options)
    else:
        columns = [
            _normalise(value, _within(sets, here), _within(batch, here), options)
            for value, here in zip(units.value_KU, units.applies_KU, strict=True)
        ]
        a_U = _fuse(torch.stack(columns), weights, units.applies_KU)
    if options.fusion == "gdpo":
        d = _centre(a_U, batch).deviation(a_U, batch)
        a_U = _divide(d, _std(d, batch, options), options)
    a_U = torch.where(a_U.isfinite(), a_U, torch.nan)
    if options.clip is not None:
        a_U = a_U.clamp(-options.clip, options.clip)
    a_NT = (a_U + 0.0).view(trained.shape[0], -1).expand(trained.shape)
    return GroupAdvantage(torch.where(trained, a_NT, 0.0), trained)


@functools.lru_cache(maxsize=64)
def _parsed(*values: Any) -> tuple[CreditOptions, dict[str, Any]]:
    """The operator's arguments as options (`broadcast` follows from aggregate) and as compiled
    modules take them."""
    names = (field.name for field in fields(CreditOptions) if field.name != "broadcast")
    options = CreditOptions(broadcast=values[0] != "none", **dict(zip(names, values)))
    return options, {
        "aggregate": AGGREGATES.index(options.aggregate),
        "fusion": FUSIONS.index(options.fusion),
        "baseline": BASELINES.index(options.baseline),
        "std": STDS.index(options.std),
        "unbiased": options.unbiased,
        "eps": options.eps,
        "eps_floor": options.eps_mode == "floor",
        "clip": -1.0 if options.clip is None else options.clip,
        "filter_reward": -1 if options.filter_reward is None else options.filter_reward,
        "filter_in_statistics": options.filter_in_statistics,
        "min_std": -1.0 if options.min_std is None else options.min_std,
        "max_mean": math.inf if options.max_mean is None else options.max_mean,
    }


def _fake(scores: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:2]
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.bool)


@operator(
    "group_advantage",
    "(Tensor scores, Tensor group, Tensor weights, Tensor? mask, Tensor? applies, str aggregate, "
    "str fusion, str baseline, str std, bool unbiased, float eps, float? clip, int? filter_reward, "
    "bool filter_in_statistics, str eps_mode, float? min_std, float? max_mean, str backend) -> "
    "(Tensor, Tensor)",
    fake=_fake,
)
def _group_advantage(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    applies: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    *values, backend = arguments
    options, codes = _parsed(*values)
    n, turns, rewards = scores.shape
    chosen = select(backend, scores.device)
    if mask is None and chosen not in ("cpu", "cuda"):  # they take its absence for all True
        mask = torch.ones(n, turns, dtype=torch.bool, device=scores.device)
    if chosen != "cpu" and scores.device.type == "cpu":  # "cpu" looks for itself
        if not bool(weights.isfinite().all()):
            raise ValueError(f"weights must be finite, got {weights.tolist()}")
        sound = scores.isfinite()
        if mask is not None:
            sound |= ~mask[:, :, None]
        if applies is not None:
            sound |= ~applies
        if not bool(sound.all()):
            where = "mask is" if applies is None else "mask and applies are"
            raise ValueError(
                f"scores must be finite wherever {where} True; mark failed scores in mask instead"
            )
    advantage = torch.empty(n, turns, dtype=torch.float32, device=scores.device)
    trained = torch.empty(n, turns, dtype=torch.bool, device=scores.device)
    if n == 0:
        return advantage, trained
    if chosen == "ref" and mask is not None:
        out = group_advantage_ref(
            scores, group, options, weights=weights, mask=mask, applies=applies
        )
        return advantage.copy_(out.advantage), trained.copy_(out.mask)
    scores, group, weights = scores.contiguous(), group.contiguous(), weights.contiguous()
    mask = None if mask is None else mask.contiguous()
    applies = None if applies is None else applies.contiguous()
    if chosen == "triton" and mask is not None:
        from . import triton_kernels

        triton_kernels.group_advantage(
            scores, group, weights, mask, applies, options, advantage, trained
        )
        return advantage, trained
    module, place = compiled(chosen, scores)
    workspace = None if chosen == "cpu" else workspace_of(options, scores)
    module.group_advantage(
        scores=pointer(scores),
        group=pointer(group),
        weights=pointer(weights),
        mask=pointer(mask),
        applies=pointer(applies),
        **codes,
        advantage=pointer(advantage),
        mask_out=pointer(trained),
        workspace=pointer(workspace),
        N=n,
        T=turns,
        K=rewards,
        **place,
    )
    return advantage, trained


def _fp32(value: Tensor) -> Tensor:
    return (
        value
        if value.dtype == torch.float32 and not value.requires_grad
        else value.detach().to(torch.float32)
    )


def group_advantage(
    scores: Tensor,
    group: Tensor,
    options: CreditOptions,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    applies: Tensor | None = None,
    backend: str | None = None,
) -> GroupAdvantage:
    """Advantages of rollouts from their scores. No gradient. Identical bits on every backend and in
    every order.

    Args:
        scores: [N, T, K] floating point; sample, turn, reward. Read as fp32.
        group: [N] int64, any values; samples of one id are siblings.
        options: the credit options; see CREDIT_PRESETS.
        weights: [K], the weight of each reward (default 1/K each).
        mask: [N, T] bool, False where a turn has no score (a failed judge). Such a turn gets
            advantage 0 and stays outside the statistics; with `aggregate` it takes its whole sample
            with it. Default: all True.
        applies: [N, T, K] bool, False where a reward has nothing to say of a turn, which is no
            failure. It leaves the statistics of that reward; the weights of those that apply make
            up for it, in proportion. A turn to which none applies (of weight other than 0) gets
            advantage 0. Default: all True.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        advantage [N, T] fp32, and mask [N, T] bool: the turns that train (given, judged, not behind
        the filter, not dropped).

    Raises:
        ValueError or TypeError naming the argument. Scores and weights that are not finite raise on
        CPU tensors only.
    """
    _checks.tensor("scores", scores)
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.dim() != 3 or scores.shape[1] == 0 or scores.shape[2] == 0:
        raise ValueError(
            f"scores must have shape [N, T, K] with T, K >= 1, got {list(scores.shape)}"
        )
    n, turns, rewards = scores.shape
    if n * turns > MAX_UNITS:
        raise ValueError(f"scores may hold at most 2^20 turns in all, got {n} x {turns}")
    _checks.per_sample("group", group, n, "scores", scores)
    if not isinstance(options, CreditOptions):
        raise TypeError(f"options must be a CreditOptions, got {type(options).__name__}")
    if options.filter_reward is not None and options.filter_reward >= rewards:
        raise ValueError(
            f"options.filter_reward must be below K = {rewards}, got {options.filter_reward}"
        )
    if weights is None:
        weights = torch.full((rewards,), 1.0 / rewards, dtype=torch.float32, device=scores.device)
    _checks.tensor("weights", weights)
    if list(weights.shape) != [rewards]:
        raise ValueError(
            f"weights must have shape [{rewards}], one a reward; got {list(weights.shape)}"
        )
    _checks.same_device("weights", weights, "scores", scores)
    for name, given, shape in (
        ("mask", mask, [n, turns]),
        ("applies", applies, [n, turns, rewards]),
    ):
        if given is not None:
            _checks.tensor(name, given)
            if given.dtype != torch.bool or list(given.shape) != shape:
                raise ValueError(
                    f"{name} must be bool of shape {shape}, got {given.dtype} of "
                    f"{list(given.shape)}"
                )
            _checks.same_device(name, given, "scores", scores)
    advantage, trained = _group_advantage(
        _fp32(scores),
        group,
        _fp32(weights),
        mask,
        applies,
        options.aggregate,
        options.fusion,
        options.baseline,
        options.std,
        options.unbiased,
        options.eps,
        options.clip,
        options.filter_reward,
        options.filter_in_statistics,
        options.eps_mode,
        options.min_std,
        options.max_mean,
        _checks.backend_name(backend),
    )
    return GroupAdvantage(advantage, trained)
