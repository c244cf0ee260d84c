"""The gradient of a rollout's loss: replays chunk by chunk, part by part, and checks what comes out
of it.

Three questions, a function each: which velocities (`_parts`), which loss (`_lose`), what to log
(`_seen`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from editr2.config import PolicyConfig, RolloutConfig, TrainConfig
from editr2.errors import NonFiniteError, UserError
from editr2.policies.weights import exchanged
from editr2.rl.losses import LOSSES, Asked, Beside, Given, Samples, Term, text_term
from editr2.rl.replay import Answers, Part, Queries, ReplayOptions, can_pack, replay
from editr2.rl.rollout import Chunk, Seeds
from editr2.rl.sampler import Sampler
from editr2.rl.sentinel import RatioError, explain_difference
from editr2.rl.state import State
from editr2.run.processes import Processes

SUMS = (
    "loss",
    "kl",
    "samples",
    "text_loss",
    "text_clipped",
    "tokens",
)  # over parts, and `Loss.logs`
ERRORS = ("ratio_error", "text_error")  # maxima over parts


@dataclass
class Batch:
    """A rollout of this process, how it was made, and its credit.

    advantage, mask: [rollouts, T] on the host, as the loss prefers them, in the order of the
    chunks' `rows`. trained: turns that train, over all processes. old, old_text: log-probs of the
    policy that sampled, by chunk and by (chunk, turn, kind of what was written), once training's
    own code has computed them. stale: they were computed when the rollout was made
    (`remember_old`), since the weights have moved on meanwhile.
    """

    chunks: list[Chunk]
    advantage: Tensor
    mask: Tensor
    trained: int
    sampler: Sampler
    seeds: Seeds
    policy: PolicyConfig
    rollout: RolloutConfig
    old: dict[int, Tensor] = field(default_factory=dict)
    old_text: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    stale: bool = False

    def credit_of(self, number: int) -> tuple[Tensor, Tensor]:
        own = self.chunks[number].rows
        return self.advantage[own], self.mask[own]


def accumulate_gradient(
    t: TrainConfig, state: State, batch: Batch, update: int, minibatch: int, processes: Processes
) -> dict[str, float]:
    """Backward of the loss over one minibatch (every chunk whose number is `minibatch` modulo
    train.minibatches).

    Returns `SUMS` and the loss's `logs` (this process's share of them) and `ERRORS`. Raises
    `RatioError` where the first update of a run does not find a ratio of 1, and `NonFiniteError`
    for a loss that is not finite.
    """
    loss, device = LOSSES[t.loss], processes.device
    fresh = update == minibatch == 0
    sums = dict.fromkeys((*SUMS, *loss.logs, *ERRORS), 0.0)
    # Later minibatches meet weights that have moved.
    if fresh and t.minibatches > 1 and not batch.stale:
        sums |= remember_old(t, state, batch, processes)
    for number in range(minibatch, len(batch.chunks), t.minibatches):
        remember = fresh and t.minibatches == 1 and not batch.stale
        plan = _plan(t, state, batch, number, update, device, remember=remember)
        for part in _parts(state, plan):
            lost = _lose(plan, part)
            seen = _seen(plan, lost)
            # The one wait for the device of this part.
            numbers = torch.stack([x.detach().float() for x in seen.values()]).tolist()
            values = dict(zip(seen, numbers, strict=True))
            if fresh:
                _check_ratio(t, state, batch, number, values)
            if not math.isfinite(total := values["loss"] + values["text_loss"]):
                where = _describe(plan, lost)
                raise NonFiniteError(f"loss: {total} at iteration {state.iteration}, {where}")
            processes.backward(lost.total)
            for name, value in values.items():
                sums[name] = max(sums[name], value) if name in ERRORS else sums[name] + value
    return sums


def remember_old(
    t: TrainConfig, state: State, batch: Batch, processes: Processes
) -> dict[str, float]:
    """Fills in the log-probs of the policy that sampled, which has to be the one there is now,
    where the loss or the text want them of training's own code. Returns `ERRORS`; raises
    `RatioError` as `accumulate_gradient` does."""
    loss, errors = LOSSES[t.loss], dict.fromkeys(ERRORS, 0.0)
    if "old" in loss.weights(t):  # the old policy sampled, and is kept
        return errors
    with torch.no_grad():
        for number in range(len(batch.chunks)):
            plan = _plan(t, state, batch, number, 0, processes.device, remember=True)
            if not (loss.ratio or plan.options.text):
                continue
            for part in _parts(state, plan):
                seen = _seen(plan, _lose(plan, part))
                found = {name: float(seen[name]) for name in ERRORS}
                _check_ratio(t, state, batch, number, found)
                errors |= {name: max(errors[name], error) for name, error in found.items()}
    return errors


# --------------------------------------------------------------------------------- which velocities


@dataclass(frozen=True)
class _Plan:
    """What is computed of a chunk. needed: bool [rollouts, T], the turns that are replayed.
    replays_old: old log-probs are training's own. remember: they are those of this forward."""

    t: TrainConfig
    batch: Batch
    number: int
    sampler: Sampler
    advantage: Tensor
    mask: Tensor
    queries: Queries
    samples: Samples
    needed: Tensor
    options: ReplayOptions
    text_weight: float
    normalizer: float
    replays_old: bool
    remember: bool

    @property
    def chunk(self) -> Chunk:
        return self.batch.chunks[self.number]


def _plan(
    t: TrainConfig,
    state: State,
    batch: Batch,
    number: int,
    update: int,
    device: torch.device,
    *,
    remember: bool,
) -> _Plan:
    loss, chunk = LOSSES[t.loss], batch.chunks[number]
    sampler = batch.sampler.of(chunk.image_size).to(device)
    advantage, mask = batch.credit_of(number)
    queries, samples = loss.ask(t, Asked(chunk, advantage, mask, sampler, batch.seeds, update))
    places = loss.places(t, sampler)
    text_weight = t.text_weight if t.text_weight is not None else 1 / places
    asked = any(record.written for record in chunk.turns)
    # A sample without advantage moves nothing, unless something else than the advantage pulls.
    needed = mask if loss.pulls(t) else mask & (advantage != 0)
    options = ReplayOptions(
        packed=t.packed == "on",
        context_gradient=t.context_gradient,
        micro_batch=t.rows,
        temperature=batch.policy.temperature,
        text=asked and text_weight > 0,
    )
    # Whoever bounds a forward does not want a session in one.
    if t.packed == "auto" and t.rows is None:
        packed = can_pack(state.policy, chunk, queries, options, needed)
        options = replace(options, packed=packed)
    return _Plan(
        t=t,
        batch=batch,
        number=number,
        sampler=sampler,
        advantage=advantage,
        mask=mask,
        queries=queries,
        samples=samples,
        needed=needed,
        options=options,
        text_weight=text_weight,
        normalizer=max(1, batch.trained) * places / t.minibatches,
        replays_old=loss.replays_old(t, repeats_rollout(t, state, batch, options.packed)),
        remember=remember,
    )


def repeats_rollout(t: TrainConfig, state: State, batch: Batch, packed: bool) -> bool:
    """Whether training gives the rollout's log-probs back to the last bits: where it walks by the
    rollout's turns and steps in float32, and nothing was captured or compiled (with gradient a
    block has another compiled form than without), its batches are the rollout's, less what has no
    advantage. Elsewhere rounding can differ by more than a clip range."""
    if packed or t.rows is not None or batch.rollout.capture != "off":
        return False
    if batch.policy.compile == "on":
        return False
    trained = (p for p in state.policy.module.parameters() if p.requires_grad)
    return batch.policy.dtype == "float32" and all(p.dtype == torch.float32 for p in trained)


class _Predicted(NamedTuple):
    """A part of the chunk's samples under the live weights (`part`), and under others.

    old_text: log-probs of its answers under the old policy, by their keys; empty without one.
    """

    part: Part
    samples: Samples
    beside: Beside
    old_text: dict[tuple[int, int, str], Tensor]


def _parts(state: State, plan: _Plan) -> Iterator[_Predicted]:
    """The chunk's samples in parts, each under all the weights that the loss asked for."""
    # A ratio alone has no use for the start.
    start = state.reference if torch.is_grad_enabled() or not LOSSES[plan.t.loss].ratio else None
    reference = _Replayed(state, start, plan, replace(plan.options, text=False))
    old = _Replayed(state, state.old, plan, plan.options)
    live = replay(state.policy, plan.chunk, plan.queries, plan.options, plan.needed)
    for part in live:
        samples = plan.samples.pick(part.index)
        beside = Beside(reference.velocity(part, samples), old.velocity(part, samples))
        yield _Predicted(part, samples, beside, old.text)


class _Replayed:
    """The same replay under other weights, part for part, without gradient. text: log-probs of the
    answers of the last part."""

    def __init__(
        self, state: State, values: dict[str, Tensor] | None, plan: _Plan, options: ReplayOptions
    ) -> None:
        self.state, self.values = state, values
        self.text: dict[tuple[int, int, str], Tensor] = {}
        if values is not None:
            self.parts = replay(state.policy, plan.chunk, plan.queries, options, plan.needed)

    def velocity(self, part: Part, samples: Samples) -> Tensor | None:
        """The combined velocity of the part's samples; None without such weights."""
        if self.values is None:
            return None
        with torch.no_grad(), exchanged(self.state.policy.module, self.values):
            other = next(self.parts)
        assert torch.equal(other.index, part.index)
        self.text = {_key(a): a.scores.log_prob for a in other.answers}
        return other.velocity.combined(samples.sigma)


def _key(answers: Answers) -> tuple[int, int, str]:
    """Tells the answers of one part apart: packed, a turn comes once for every length of
    session."""
    return answers.turn, int(answers.at[0]), answers.kind


# --------------------------------------------------------------------------------------- which loss


class _Lost(NamedTuple):
    """The loss of a part. drift: how far its old log-probs are from the rollout's as a ratio, None
    where they are the rollout's. texts: the term of each of its answers and how far sampling token
    by token was from scoring."""

    predicted: _Predicted
    samples: Samples
    total: Tensor
    image: Term
    drift: Tensor | None
    texts: list[tuple[Term, Tensor]]


def _lose(plan: _Plan, predicted: _Predicted) -> _Lost:
    t, loss, part = plan.t, LOSSES[plan.t.loss], predicted.part
    samples, drift = _with_old(plan, predicted)
    given = Given(samples, part.velocity, predicted.beside, plan.sampler, plan.normalizer)
    image = loss.term(t, given)
    _check_term(t.loss, image)
    total, texts = image.loss, []
    for answers in part.answers:
        rollout = plan.chunk.turns[answers.turn].rollout[answers.at]
        advantage = plan.advantage[rollout, answers.turn].to(samples.mask.device)
        mask = plan.mask[rollout, answers.turn].to(samples.mask.device)
        old, gap = _old_text(plan, answers, predicted.old_text.get(_key(answers)))
        term = text_term(t, answers, old, advantage, mask, plan.normalizer)
        total = total + plan.text_weight * term.loss
        texts.append((term, gap))
    return _Lost(predicted, samples, total, image, drift, texts)


def _check_term(name: str, term: Term) -> None:
    """Raises `UserError` for what an entry of `LOSSES` may not return; nothing waits for it."""
    wrong, logs = "", LOSSES[name].logs
    if not isinstance(term, Term):
        wrong = f"term returned a {type(term).__name__} (accepted: a Term)"
    elif term.loss.dim():
        wrong = f"term's loss has shape {list(term.loss.shape)} (accepted: one number)"
    elif torch.is_grad_enabled() and not term.loss.requires_grad:
        wrong = "term's loss has no gradient (accepted: one that depends on the velocity)"
    elif lacks := [key for key in logs if key not in term.means]:
        wrong = f"term's means lack {', '.join(lacks)} (accepted: all of its logs)"
    elif taken := sorted({*SUMS, *ERRORS} & set(logs)):
        wrong = f"logs: {', '.join(taken)} (accepted: names that no row has)"
    if wrong:
        raise UserError(f"train.loss: {name!r}: {wrong}")


def _with_old(plan: _Plan, predicted: _Predicted) -> tuple[Samples, Tensor | None]:
    """The part's samples with the old log-probs that the loss compares with; and, where these are
    training's own and of this forward, the largest |ratio - 1| to the rollout's."""
    samples, batch, drift = predicted.samples, plan.batch, None
    if not plan.replays_old:
        return samples, None
    at = predicted.part.index.to(samples.sigma.device)
    if plan.remember:
        with torch.no_grad():
            detached = predicted.part.velocity.detach()
            again = LOSSES[plan.t.loss].log_prob(samples, detached, plan.sampler)
        known = batch.old.setdefault(plan.number, torch.empty_like(plan.samples.sigma))
        known[at] = again
        if samples.old_log_prob is not None:
            gap = torch.where(samples.mask, again - samples.old_log_prob, 0.0)
            drift = gap.exp().sub(1).abs().max()
    return replace(samples, old_log_prob=batch.old[plan.number][at]), drift


def _old_text(plan: _Plan, answers: Answers, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
    """(old log-probs [B, L], how far sampling token by token was from them as a ratio).

    They come from one teacher-forced forward by training's own code: under the old policy's weights
    where it sampled (`sampled`), else of the forward that was to remember them.
    """
    batch, key = plan.batch, (plan.number, answers.turn, answers.kind)
    log_prob, valid = answers.scores.log_prob, answers.scores.valid
    samples = plan.chunk.turns[answers.turn].written[answers.kind].samples
    if sampled is not None:
        old = sampled
    else:
        at, length = answers.at.to(log_prob.device), log_prob.shape[1]
        if plan.remember:
            longest = max(length, *(len(sample.ids) for sample in samples))
            if key not in batch.old_text:
                batch.old_text[key] = log_prob.new_zeros(len(samples), longest)
            batch.old_text[key][at, :length] = log_prob.detach()
        old = batch.old_text[key][at, :length]
    rows = [samples[i].log_prob for i in answers.at.tolist()]
    decoded = torch.tensor([[*row, *[0.0] * (old.shape[1] - len(row))] for row in rows])
    gap = torch.where(valid, old - decoded.to(old.device), 0.0).exp().sub(1).abs()
    return old, gap.max() if gap.numel() else gap.new_zeros(())


# -------------------------------------------------------------------------------------- what to log


def _seen(plan: _Plan, lost: _Lost) -> dict[str, Tensor]:
    """`SUMS`, the loss's `logs` and `ERRORS` of a part, as 0-dim tensors."""
    image = lost.image
    counted = lost.samples.mask.sum().float()
    none = torch.zeros_like(counted)
    error = lost.drift if lost.drift is not None else image.ratio_error
    seen = {
        "loss": image.loss,
        "kl": image.means.get("kl", none) * counted / plan.normalizer,
        "samples": counted,
        "ratio_error": error if error is not None else none,
    }
    seen |= {name: image.means[name] * counted for name in LOSSES[plan.t.loss].logs}
    seen |= dict.fromkeys(("text_loss", "text_clipped", "tokens", "text_error"), none)
    for term, gap in lost.texts:
        seen["text_loss"] = seen["text_loss"] + plan.text_weight * term.loss
        seen["text_clipped"] = seen["text_clipped"] + term.means["clipped"]
        seen["tokens"] = seen["tokens"] + term.means["tokens"]
        seen["text_error"] = torch.maximum(seen["text_error"], gap)
    return seen


LOW_PRECISION = {"ratio_tolerance": 1e-3, "text_ratio_tolerance": 5e-2}
"""The recipes' tolerances of ratios under a `policy.dtype` that rounds (editr2/recipes)."""


def _check_ratio(
    t: TrainConfig, state: State, batch: Batch, number: int, values: dict[str, float]
) -> None:
    """The on-policy sentinel of a run's first update. A loss without a ratio of images has 0 there;
    its text is checked."""
    if state.iteration:
        return
    kinds = dict.fromkeys(kind for turn in batch.chunks[number].turns for kind in turn.written)
    dtype = batch.policy.dtype
    for setting, name, what in (
        ("ratio_tolerance", "ratio_error", "ratio"),
        ("text_ratio_tolerance", "text_error", f"ratio of {' and '.join(kinds)} tokens"),
    ):
        limit = getattr(t, setting)
        if not values[name] <= limit:
            cause = explain_difference(
                state.policy,
                batch.chunks[number],
                batch.sampler,
                batch.seeds,
                batch.policy,
                batch.rollout,
                t,
            )
            rounding = ""
            if dtype != "float32" and values[name] <= LOW_PRECISION[setting]:
                rounding = (
                    f"; {dtype} rounds otherwise in batches of other sizes: the recipes have "
                    f"train.{setting} {LOW_PRECISION[setting]:g}"
                )
            raise RatioError(
                f"{what}: differs from 1 by {values[name]:.3g} before any update (accepted: "
                f"{limit:g}); first difference: {cause}{rounding}"
            )


def _describe(plan: _Plan, lost: _Lost) -> str:
    """Where a loss that is not finite comes from."""
    part, velocity = lost.predicted.part, lost.predicted.part.velocity.v
    tensors = {
        "x": lost.samples.x,
        "velocity": velocity,
        "log_prob": lost.image.log_prob,
        "advantage": lost.samples.advantage,
    }
    texts = {
        f"log_prob of the {a.kind}s of turn {a.turn + 1}": a.scores.log_prob for a in part.answers
    }
    bad = (~torch.isfinite(velocity.detach()).flatten(1).all(1)).nonzero()
    turn, place = plan.queries.where(int(part.index[int(bad[0, 0]) if len(bad) else 0]))
    found = first_non_finite({name: x for name, x in (tensors | texts).items() if x is not None})
    what = "noise level" if LOSSES[plan.t.loss].where else "window step"
    return f"turn {turn + 1}, {what} {place + 1}; {found}"


def first_non_finite(tensors: dict[str, Tensor]) -> str:
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x.detach()).all())]
    return f"first non-finite tensor: {bad[0]}" if bad else "its inputs are finite"
