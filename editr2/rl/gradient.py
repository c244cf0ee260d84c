"""The gradient of a rollout's loss: replays chunk by chunk, part by part, and checks what comes out
of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from editr2.config import Config
from editr2.errors import NonFiniteError
from editr2.policies.weights import exchanged
from editr2.rl.losses import (
    Rows,
    Term,
    grpo_term,
    nft_term,
    noised_places,
    noised_rows,
    replayed_log_prob,
    text_term,
    window_places,
    window_rows,
)
from editr2.rl.replay import Answers, Part, Places, ReplayOptions, can_pack, replay
from editr2.rl.rollout import Chunk, Seeds
from editr2.rl.sampler import Sampler
from editr2.rl.sentinel import RatioError, explain_difference
from editr2.rl.state import State
from editr2.run.processes import Processes

STATISTICS = (
    "loss",
    "kl",
    "clipped",
    "rows",
    "text_loss",
    "text_clipped",
    "tokens",
)  # sums over parts
ERRORS = ("ratio_error", "text_error")  # maxima over parts


@dataclass
class Batch:
    """A rollout of this process and its credit.

    advantage, mask: [rollouts, T] on the host. trained: turns that train, over all processes. old,
    old_text: log-probs of the policy that sampled, by chunk and by (chunk, turn, first rollout of
    the answers), once training's own code has computed them.
    """

    chunks: list[Chunk]
    advantage: Tensor
    mask: Tensor
    trained: int
    sampler: Sampler
    seeds: Seeds
    old: dict[int, Tensor] = field(default_factory=dict)
    old_text: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def credit_of(self, number: int) -> tuple[Tensor, Tensor]:
        start = sum(chunk.rollouts for chunk in self.chunks[:number])
        own = slice(start, start + self.chunks[number].rollouts)
        return self.advantage[own], self.mask[own]


def accumulate_gradient(
    config: Config, state: State, batch: Batch, update: int, minibatch: int, processes: Processes
) -> dict[str, float]:
    """Backward of the loss over one minibatch (every chunk whose number is `minibatch` modulo
    train.minibatches).

    Returns `STATISTICS` (this process's share of the sums) and `ERRORS`. Raises `RatioError` where
    the first update of a run does not find a ratio of 1, and `NonFiniteError` for a loss that is
    not finite.
    """
    t, device = config.train, processes.device
    fresh = update == minibatch == 0
    sums = dict.fromkeys((*STATISTICS, *ERRORS), 0.0)
    if fresh and t.minibatches > 1 and t.loss == "grpo":
        with torch.no_grad():  # later minibatches meet weights that have moved
            for number in range(len(batch.chunks)):
                for _, _, seen in _terms(
                    config, state, batch, number, update, device, remember=True
                ):
                    errors = {name: float(seen[name]) for name in ERRORS}
                    _check_ratio(config, state, batch, number, errors)
                    sums |= {name: max(sums[name], error) for name, error in errors.items()}
    for number in range(minibatch, len(batch.chunks), t.minibatches):
        remember = fresh and t.minibatches == 1
        for where, loss, seen in _terms(
            config, state, batch, number, update, device, remember=remember
        ):
            # The one wait for the device of this part.
            values = dict(
                zip(
                    seen,
                    torch.stack([x.detach().float() for x in seen.values()]).tolist(),
                    strict=True,
                )
            )
            if fresh:
                _check_ratio(config, state, batch, number, values)
            if not math.isfinite(values["loss"] + values["text_loss"]):
                raise NonFiniteError(
                    f"loss: {values['loss'] + values['text_loss']} at iteration "
                    f"{state.iteration}, {where()}"
                )
            processes.backward(loss)
            for name, value in values.items():
                sums[name] = max(sums[name], value) if name in ERRORS else sums[name] + value
    return sums


def replays_old_log_prob(config: Config, state: State, packed: bool) -> bool:
    """Whether old log-probs come from training's own forward instead of the rollout's.

    By `auto` the rollout's are taken where training walks by its turns and steps in float32 and the
    rollout's steps were not captured: in its batches, less what has no advantage, the two are equal
    to the last bits. Elsewhere rounding can differ by more than a clip range.
    """
    how = config.train.old_log_prob
    if how != "auto":
        return how == "replay"
    full = all(
        p.dtype == torch.float32 for p in state.policy.module.parameters() if p.requires_grad
    )
    full = full and config.policy.dtype == "float32"
    return (
        packed
        or not full
        or config.train.micro_batch is not None
        or config.rollout.capture != "off"
    )


def _terms(
    config: Config,
    state: State,
    batch: Batch,
    number: int,
    update: int,
    device: torch.device,
    *,
    remember: bool,
) -> Iterator[tuple]:
    """(what to say of the part in an error, its loss, its statistics by name), part by part."""
    t, chunk = config.train, batch.chunks[number]
    sampler = batch.sampler.to(device)
    advantage, mask = batch.credit_of(number)
    places, rows, draws = _rows(config, batch, number, update)
    text_weight = t.text_weight if t.text_weight is not None else 1 / draws
    asked = any(r.questions is not None for r in chunk.turns)
    options = ReplayOptions(
        False,
        t.context_gradient,
        t.micro_batch,
        config.policy.temperature,
        asked and text_weight > 0,
    )
    # A row without advantage moves nothing, unless something else than the advantage pulls at it.
    pulled = t.kl_weight > 0 or t.loss == "nft"
    needed = mask if pulled else mask & (advantage != 0)
    packed = t.packed == "on"
    if (
        t.packed == "auto" and t.micro_batch is None
    ):  # whoever bounds a forward does not want a session in one
        packed = can_pack(state.policy, chunk, places, options, needed)
    options = replace(options, packed=packed)
    own = t.loss == "grpo" and replays_old_log_prob(config, state, packed)
    start = state.reference if torch.is_grad_enabled() else None
    reference = _Beside(state, start, replace(options, text=False), chunk, places, needed)
    sampled = _Beside(state, state.old, options, chunk, places, needed)
    normalizer = max(1, batch.trained) * draws / t.minibatches
    for part in replay(state.policy, chunk, places, options, needed):
        picked = rows.pick(part.rows)
        drift = None
        if own:
            if remember:
                assert picked.old_log_prob is not None
                again = replayed_log_prob(picked, part.velocity, sampler)
                batch.old.setdefault(number, torch.empty_like(rows.sigma))[part.rows.to(device)] = (
                    again
                )
                gap = torch.where(picked.mask, again - picked.old_log_prob, 0.0)
                drift = gap.exp().sub(1).abs().max()
            picked = replace(picked, old_log_prob=batch.old[number][part.rows.to(device)])
        v_ref = reference.velocity(part, picked.sigma)
        if t.loss == "grpo":
            image = grpo_term(t, picked, part.velocity, v_ref, sampler, normalizer)
        else:
            v_old = sampled.velocity(part, picked.sigma)
            assert v_old is not None
            image = nft_term(t, picked, part.velocity, v_old, v_ref, normalizer)
        counted = picked.mask.sum().float()
        none = torch.zeros_like(counted)
        seen = {"loss": image.loss, "kl": image.means["kl"] * counted / normalizer, "rows": counted}
        seen["clipped"] = image.means.get("clipped", none) * counted
        error = drift if drift is not None else image.ratio_error
        seen["ratio_error"] = error if error is not None else none
        loss = image.loss
        seen |= dict.fromkeys(("text_loss", "text_clipped", "tokens", "text_error"), none)
        for answers in part.answers:
            a = advantage[chunk.turns[answers.turn].rollout[answers.rollout], answers.turn].to(
                device
            )
            m = mask[chunk.turns[answers.turn].rollout[answers.rollout], answers.turn].to(device)
            old, drift = _old_text(batch, number, answers, remember, sampled.answers(answers))
            term = text_term(t, answers, old, a, m, normalizer)
            loss = loss + text_weight * term.loss
            seen["text_loss"] = seen["text_loss"] + text_weight * term.loss
            seen["text_clipped"] = seen["text_clipped"] + term.means["clipped"]
            seen["tokens"] = seen["tokens"] + term.means["tokens"]
            seen["text_error"] = torch.maximum(seen["text_error"], drift)
        yield partial(_describe, places, picked, part, image), loss, seen


def _rows(config: Config, batch: Batch, number: int, update: int) -> tuple[Places, Rows, int]:
    """The chunk's places and rows, and the places a turn."""
    t, chunk = config.train, batch.chunks[number]
    advantage, mask = batch.credit_of(number)
    if t.loss == "grpo":
        places = window_places(chunk)
        return places, window_rows(chunk, places, advantage, mask), batch.sampler.window
    places, noise = noised_places(chunk, batch.sampler, batch.seeds, update, t.nft_draws)
    return places, noised_rows(chunk, places, noise, advantage, mask), t.nft_draws


class _Beside:
    """The same replay under other weights, part for part, without gradient."""

    def __init__(
        self,
        state: State,
        values: dict[str, Tensor] | None,
        options: ReplayOptions,
        chunk: Chunk,
        places: Places,
        needed: Tensor,
    ) -> None:
        self.state, self.values = state, values
        self.parts = (
            replay(state.policy, chunk, places, options, needed) if values is not None else None
        )
        self.scored: dict[tuple[int, int], Tensor] = {}

    def velocity(self, part: Part, sigma: Tensor) -> Tensor | None:
        """The combined velocity of the part's rows; None without such weights."""
        if self.parts is None:
            return None
        with torch.no_grad(), exchanged(self.state.policy.module, self.values):
            other = next(self.parts)
        assert torch.equal(other.rows, part.rows)
        self.scored = {_key(a): a.scores.log_prob for a in other.answers}
        return other.velocity.combined(sigma)

    def answers(self, answers: Answers) -> Tensor | None:
        return self.scored.get(_key(answers))


def _key(answers: Answers) -> tuple[int, int]:
    """Tells the answers of one part apart: packed, a turn comes once for every length of
    session."""
    return answers.turn, int(answers.rollout[0])


def _old_text(
    batch: Batch, number: int, answers: Answers, remember: bool, sampled: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(old log-probs [B, L], how far sampling token by token was from them as a ratio).

    They come from one teacher-forced forward by training's own code: under the sampling weights
    where those differ (NFT), else from the first forward that meets the answers.
    """
    key = (number, *_key(answers))
    log_prob, valid = answers.scores.log_prob, answers.scores.valid
    if sampled is not None:
        old = sampled
    else:
        if remember or key not in batch.old_text:
            batch.old_text[key] = log_prob.detach()
        old = batch.old_text[key]
    intents = batch.chunks[number].turns[answers.turn].intents
    assert intents is not None
    known = [intents[i].log_prob for i in answers.rollout.tolist()]
    decoded = torch.tensor([[*row, *[0.0] * (old.shape[1] - len(row))] for row in known]).to(
        old.device
    )
    gap = torch.where(valid, old - decoded, 0.0).exp().sub(1).abs()
    return old, gap.max() if gap.numel() else gap.new_zeros(())


def _check_ratio(
    config: Config, state: State, batch: Batch, number: int, values: dict[str, float]
) -> None:
    """The on-policy sentinel of a run's first update. NFT's loss has no ratio of images; its
    intents are checked."""
    if state.iteration:
        return
    for name, limit in (
        ("ratio_error", config.train.ratio_tolerance),
        ("text_error", config.train.text_ratio_tolerance),
    ):
        if not values[name] <= limit:
            cause = explain_difference(
                state.policy, batch.chunks[number], batch.sampler, batch.seeds, config
            )
            what = "ratio" if name == "ratio_error" else "ratio of intent tokens"
            raise RatioError(
                f"{what}: differs from 1 by {values[name]:.3g} before any update (accepted: "
                f"{limit:g}); first difference: {cause}"
            )


def _describe(places: Places, rows: Rows, part: Part, image: Term) -> str:
    """Where a loss that is not finite comes from."""
    tensors = {
        "x": rows.x,
        "velocity": part.velocity.v,
        "log_prob": image.log_prob,
        "advantage": rows.advantage,
    }
    texts = {
        f"log_prob of the intents of turn {a.turn + 1}": a.scores.log_prob for a in part.answers
    }
    bad = (~torch.isfinite(part.velocity.v.detach()).flatten(1).all(1)).nonzero()
    row = int(part.rows[int(bad[0, 0]) if len(bad) else 0])
    turn = max(t for t, first in enumerate(places.first) if first <= row)
    place = (row - places.first[turn]) % places.sigma[turn].shape[1]
    found = first_non_finite({name: x for name, x in (tensors | texts).items() if x is not None})
    return f"turn {turn + 1}, window step {place + 1}; {found}"


def first_non_finite(tensors: dict[str, Tensor]) -> str:
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x.detach()).all())]
    return f"first non-finite tensor: {bad[0]}" if bad else "its inputs are finite"
