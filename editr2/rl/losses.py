"""The losses of images: a table of them, `LOSSES`, and the policy loss of the intents beside it.

    loss = 1/(samples * Q) * sum over trained (rollout, turn) of
           [ sum over its Q places of image + lambda * text ]

A loss says where it asks for velocities (stored transitions, or outputs that are noised again),
under which other weights it wants them too, and what it makes of them; walking, micro-batches,
checks and the sum over processes are the same for all. CONTRIBUTING.md has the recipe for one more.

Sources: Edit-R2 (arXiv 2606.05950), Flow-GRPO (2505.05470), GRPO-Guard (2510.22319), DiffusionNFT
(2509.16117), Advantage Weighted Matching (2509.25050), D3PO (2311.13231).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editr2.config import Config, TrainConfig
from editr2.config.fields import Bounds, Wrong, built, setting
from editr2.config.rules import rule
from editr2.policies.base import Velocity
from editr2.rl.replay import Answers, Queries
from editr2.rl.rollout import Chunk, Seeds
from editr2.rl.sampler import Sampler
from editr2_kernels import (
    awm_log_prob,
    awm_loss,
    grpo_loss,
    nft_loss,
    nft_optimality,
    philox_normal,
    sde_log_prob,
)


@dataclass(frozen=True)
class Samples:
    """What is known of a chunk's queries, in their order, R in all.

    sigma, advantage, mask: [R]. group: int64 [R], equal for siblings at one turn and place. Of
    stored transitions x, x_next [R, *latent], step_index and old_log_prob [R], m_prev and v_old as
    x where the sampler or the loss reads them. Of outputs that are noised again x is the noised
    latent, x_next the clean one, noise what was added.
    """

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    advantage: Tensor
    mask: Tensor
    group: Tensor
    step_index: Tensor | None = None
    old_log_prob: Tensor | None = None
    m_prev: Tensor | None = None
    v_old: Tensor | None = None
    noise: Tensor | None = None

    def pick(self, index: Tensor) -> Samples:
        """Some of them; all in order cost nothing."""
        if len(index) == len(self.sigma) and torch.equal(index, torch.arange(len(index))):
            return self
        on = index.to(self.x.device)
        picked: dict[str, Any] = {
            name: None if x is None else x[on] for name, x in vars(self).items()
        }
        return Samples(**picked)


class Asked(NamedTuple):
    """What a loss may look at to say where it wants velocities.

    advantage, mask: [rollouts, T] of the chunk. update: passes over the rollout done before.
    """

    chunk: Chunk
    advantage: Tensor
    mask: Tensor
    sampler: Sampler
    seeds: Seeds
    update: int


class Beside(NamedTuple):
    """The same samples' combined velocities under other weights, without gradient; None where the
    loss did not ask for them (`Loss.weights`)."""

    reference: Tensor | None
    old: Tensor | None


class Given(NamedTuple):
    """What a term is made of: samples, their velocity under the live weights and under others; the
    sampler; and what the sum over samples is divided by."""

    samples: Samples
    velocity: Velocity
    beside: Beside
    sampler: Sampler
    normalizer: float


@dataclass(frozen=True)
class Term:
    """A loss with gradient, and its metrics as 0-dim tensors.

    means: the loss's `logs`, and `kl` where it has one, means over the samples that count.
    ratio_error: the largest |ratio - 1|, None without a ratio. log_prob: [R] where there is one, to
    say what is not finite.
    """

    loss: Tensor
    means: dict[str, Tensor]
    ratio_error: Tensor | None = None
    log_prob: Tensor | None = None


@dataclass(frozen=True)
class NoOptions:
    """A loss without options of its own."""


class Loss:
    """One way to learn from a rollout, an entry of `LOSSES`. What is said here holds for most.

    options: a dataclass of settings of its own, read from `train.loss_options`. logs: names of the
    metrics that it adds to an iteration's row, from `Term.means`. ratio: its log-probs are compared
    with those of the policy that sampled, whose ratio must be 1 before any update. where: what its
    places are, in words, if not the steps of the window.
    """

    options: type[Any] = NoOptions
    logs: tuple[str, ...] = ()
    ratio = False
    where = ""

    def problems(self, config: Config) -> Iterator[str]:
        """One line for each setting that it cannot train with."""
        if type(self).places is Loss.places:
            yield from _no_step(config)

    def weights(self, t: TrainConfig) -> frozenset[str]:
        """Under which other weights it wants velocities: "reference" (the start), "old" (a running
        average, which then samples)."""
        return frozenset({"reference"} if t.kl_weight > 0 else ())

    def pulls(self, t: TrainConfig) -> bool:
        """Whether a sample whose advantage is 0 moves the weights nevertheless."""
        return t.kl_weight > 0

    def keeps_velocity(self, t: TrainConfig) -> bool:
        """Whether the rollout keeps its velocities inside the window (`Samples.v_old`)."""
        return False

    def replays_old(self, t: TrainConfig, exact: bool) -> bool:
        """Whether old log-probs come from training's own forward, not from the rollout. exact:
        this training gives the rollout's back to the last bits."""
        return False

    def prefer(self, advantage: Tensor, mask: Tensor, siblings: int) -> tuple[Tensor, Tensor]:
        """What it makes of the credit of whole groups, [rollouts, T] both: advantages, and which
        turns train."""
        return advantage, mask

    def places(self, t: TrainConfig, sampler: Sampler) -> int:
        """Queries a rollout and turn."""
        return sampler.window

    def ask(self, t: TrainConfig, asked: Asked) -> tuple[Queries, Samples]:
        """Where velocities are asked for, and what is known there."""
        return stored(asked)

    def log_prob(self, samples: Samples, velocity: Velocity, sampler: Sampler) -> Tensor:
        """Of the samples under a velocity, [R] float32, differentiable to it."""
        assert samples.step_index is not None
        out = sde_log_prob(
            samples.x,
            samples.x_next,
            velocity.v,
            sampler.table,
            samples.step_index,
            m_prev=samples.m_prev,
            **velocity.guidance,
        )
        return out.log_prob

    def term(self, t: TrainConfig, given: Given) -> Term:
        """The sum over the samples that count, divided by `given.normalizer`."""
        raise NotImplementedError

    def settings(self, t: TrainConfig) -> Any:
        """`train.loss_options` as `options` has it; raises `Wrong` for a key or value that is none
        of it."""
        return built(t.loss_options, self.options, "train.loss_options")


class Grpo(Loss):
    """Clipped policy loss of the stored transitions, with the KL to the reference where there is
    one (Flow-GRPO, GRPO-Guard)."""

    logs = ("clipped",)
    ratio = True

    def keeps_velocity(self, t: TrainConfig) -> bool:
        return t.guard

    def replays_old(self, t: TrainConfig, exact: bool) -> bool:
        return not exact if t.old_log_prob == "auto" else t.old_log_prob == "replay"

    def term(self, t: TrainConfig, given: Given) -> Term:
        samples, velocity, beside, sampler, normalizer = given
        assert samples.step_index is not None and samples.old_log_prob is not None
        out = grpo_loss(
            samples.x,
            samples.x_next,
            velocity.v,
            sampler.table,
            samples.step_index,
            samples.old_log_prob,
            samples.advantage,
            clip=(t.clip_low, t.clip_high),
            advantage_clip=None,
            v_ref=beside.reference,
            kl_weight=t.kl_weight if beside.reference is not None else 0.0,
            kl_scale=t.kl_scale,
            guard=t.guard,
            v_old=samples.v_old if t.guard else None,
            m_prev=samples.m_prev,
            mask=samples.mask,
            normalizer=normalizer,
            **velocity.guidance,
        )
        seen = out.metrics
        means = {"kl": seen.kl, "clipped": seen.clip_fraction_low + seen.clip_fraction_high}
        return Term(out.loss, means, seen.ratio_max_deviation, out.log_prob.detach())


class Nft(Loss):
    """DiffusionNFT's loss of outputs that are noised again: rollouts are the old policy's, and
    `train.kl_weight` weighs mean((v - v_ref)^2)."""

    where = "noise levels a turn and update, drawn anew"

    def problems(self, config: Config) -> Iterator[str]:
        if window := config.rollout.window:
            yield (f"rollout.window: {window} (accepted with train.loss nft: 0; it samples by ODE)")
        yield from _plain_velocities(config)

    def weights(self, t: TrainConfig) -> frozenset[str]:
        return super().weights(t) | {"old"}

    def pulls(self, t: TrainConfig) -> bool:
        return True

    def places(self, t: TrainConfig, sampler: Sampler) -> int:
        return t.nft_draws

    def ask(self, t: TrainConfig, asked: Asked) -> tuple[Queries, Samples]:
        return noised(asked, t.nft_draws)

    def term(self, t: TrainConfig, given: Given) -> Term:
        samples, velocity, beside, _, normalizer = given
        assert samples.noise is not None and beside.old is not None
        out = nft_loss(
            samples.x_next,
            samples.noise,
            samples.sigma,
            velocity.v,
            beside.old,
            nft_optimality(samples.advantage),
            beta=t.nft_beta,
            v_ref=beside.reference,
            ref_weight=t.kl_weight,
            mask=samples.mask,
            normalizer=normalizer,
        )
        return Term(out.loss, {"kl": out.metrics.reference})


@dataclass(frozen=True)
class AwmOptions:
    """draws: noise levels a turn at which velocities are compared. clip: of the ratio, both ways;
    log-probs are means over the latent, so it is small."""

    draws: int = setting(2, Bounds(at_least=1, at_most=1_000))
    clip: float = setting(1e-4, Bounds(above=0, at_most=1))


class Awm(Loss):
    """Advantage-weighted matching of outputs that are noised again: the ratio is one of
    flow-matching losses, so any sampler will do. `train.kl_weight` weighs mean((v - v_ref)^2).
    The rollout has no log-prob of this kind, so the sentinel has nothing of the images to compare
    with: old log-probs are those of the first update's own forward."""

    options = AwmOptions
    logs = ("clipped",)
    ratio = True
    where = "noise levels a turn, the same in every update"

    def problems(self, config: Config) -> Iterator[str]:
        yield from _plain_velocities(config)
        yield from _of_others(config)

    def replays_old(self, t: TrainConfig, exact: bool) -> bool:
        return True  # the rollout has no log-prob of this kind

    def places(self, t: TrainConfig, sampler: Sampler) -> int:
        return self.settings(t).draws

    def ask(self, t: TrainConfig, asked: Asked) -> tuple[Queries, Samples]:
        # Every update looks where the first did: there alone is the old policy's log-prob known.
        return noised(asked._replace(update=0), self.settings(t).draws)

    def log_prob(self, samples: Samples, velocity: Velocity, sampler: Sampler) -> Tensor:
        assert samples.noise is not None
        return awm_log_prob(samples.x_next, samples.noise, velocity.v)

    def term(self, t: TrainConfig, given: Given) -> Term:
        samples, velocity, beside, _, normalizer = given
        assert samples.noise is not None and samples.old_log_prob is not None
        out = awm_loss(
            samples.x_next,
            samples.noise,
            velocity.v,
            samples.old_log_prob,
            samples.advantage,
            clip=self.settings(t).clip,
            advantage_clip=None,
            v_ref=beside.reference,
            kl_weight=t.kl_weight if beside.reference is not None else 0.0,
            mask=samples.mask,
            normalizer=normalizer,
        )
        seen = out.metrics
        means = {"kl": seen.kl, "clipped": seen.clip_fraction_low + seen.clip_fraction_high}
        return Term(out.loss, means, seen.ratio_max_deviation, out.log_prob.detach())


@dataclass(frozen=True)
class DpoOptions:
    """beta: how much a preference may move the weights away from the reference; it multiplies
    log-probs, which are means over the latent."""

    beta: float = setting(1_000.0, Bounds(above=0, at_most=1_000_000))


class Dpo(Loss):
    """Preferences among siblings, step by step (D3PO): of every group and turn the best rollout
    against the worst,

        -log sigmoid(beta [log p(w) - log p_ref(w) - log p(l) + log p_ref(l)])

    at each stored transition, with the start as reference. Intents are trained on the same
    preference. (Looking for the pairs waits for the device once a part.)"""

    options = DpoOptions
    logs = ("pairs_right", "margin")

    def problems(self, config: Config) -> Iterator[str]:
        t = config.train
        yield from super().problems(config)
        yield from _of_others(config)
        if t.micro_batch is not None:
            yield (
                f"train.micro_batch: {t.micro_batch} (accepted with train.loss dpo: none; both of "
                f"a pair go in one forward)"
            )
        if t.kl_weight:
            yield (
                f"train.kl_weight: {t.kl_weight} (accepted with train.loss dpo: 0; the loss is "
                f"measured from its reference)"
            )

    def weights(self, t: TrainConfig) -> frozenset[str]:
        return frozenset({"reference"})

    def prefer(self, advantage: Tensor, mask: Tensor, siblings: int) -> tuple[Tensor, Tensor]:
        """1 for the best and -1 for the worst of each group and turn, the first of equals; who is
        neither, or has no better or worse sibling, does not train."""
        groups = (len(advantage) // siblings, siblings, advantage.shape[1])
        value, counts = advantage.view(groups), mask.view(groups)
        best = value.masked_fill(~counts, -torch.inf).argmax(1, keepdim=True)
        worst = value.masked_fill(~counts, torch.inf).argmin(1, keepdim=True)
        differ = counts.any(1, keepdim=True) & (value.gather(1, best) > value.gather(1, worst))
        sign = torch.zeros_like(value).scatter(1, best, 1.0).scatter(1, worst, -1.0) * differ
        sign = sign.view_as(advantage)
        return sign, sign != 0

    def term(self, t: TrainConfig, given: Given) -> Term:
        samples, velocity, beside, sampler, normalizer = given
        assert beside.reference is not None
        log_prob = self.log_prob(samples, velocity, sampler)
        with torch.no_grad():
            reference = self.log_prob(samples, Velocity(beside.reference), sampler)
        pull = self.settings(t).beta * (log_prob - reference)
        # Both of a pair are in one group, so in the order of groups they meet.
        order = samples.group.argsort(stable=True)
        better = order[(samples.advantage > 0)[order]]
        worse = order[(samples.advantage < 0)[order]]
        assert torch.equal(samples.group[better], samples.group[worse])
        margin = pull[better] - pull[worse]
        loss = -torch.nn.functional.logsigmoid(margin).sum() / (normalizer / 2)
        counted = margin.detach()
        means = {
            "pairs_right": (counted > 0).float().sum() / max(1, len(counted)),
            "margin": counted.sum() / max(1, len(counted)),
        }
        seen, error = log_prob.detach(), None
        if samples.old_log_prob is not None:
            gap = torch.where(samples.mask, seen - samples.old_log_prob, 0.0)
            error = gap.exp().sub(1).abs().max()
        return Term(loss, means, error, seen)


LOSSES: dict[str, Loss] = {"grpo": Grpo(), "nft": Nft(), "awm": Awm(), "dpo": Dpo()}
"""By the name that `train.loss` has."""


@rule("train", "check")
def loss_problems(config: Config, command: str) -> Iterator[str]:
    """One line for each setting that `train.loss` cannot train with."""
    loss = LOSSES[config.train.loss]
    try:
        loss.settings(config.train)
    except Wrong as wrong:
        yield wrong.problem
        return
    yield from loss.problems(config)


def _no_step(config: Config) -> Iterator[str]:
    if config.rollout.window < 1:
        yield (
            f"rollout.window: 0 (accepted: at least 1; without an SDE step {config.train.loss} "
            f"trains nothing)"
        )


def _plain_velocities(config: Config) -> Iterator[str]:
    for name in ("guidance", "guidance_image"):
        if (value := getattr(config.policy, name)) != 1:
            yield (
                f"policy.{name}: {value} (accepted with train.loss {config.train.loss}: 1; it "
                f"compares plain velocities)"
            )


OWN = (
    *("clip_low", "clip_high", "guard", "kl_scale", "old_log_prob"),
    *("nft_beta", "nft_draws", "old_decay", "old_decay_max"),
)
"""Settings of `train` that are GRPO's or NFT's alone. (Each of the two has always let the other's
stand; a loss with options of its own need not.)"""


def _of_others(config: Config) -> Iterator[str]:
    t, default = config.train, TrainConfig()
    for name in OWN:
        if (value := getattr(t, name)) != (accepted := getattr(default, name)):
            yield (
                f"train.{name}: {value} (accepted with train.loss {t.loss}: {accepted}, the "
                f"default; it has no use for it)"
            )


# -------------------------------------------------------------------------------- where losses look


def stored(asked: Asked) -> tuple[Queries, Samples]:
    """The transitions of the window, as the rollout stored them, with its log-probs."""
    records = asked.chunk.turns
    queries = Queries([r.x for r in records], [r.sigma for r in records])
    samples = _samples(asked, queries, [r.x_next.flatten(0, 1) for r in records])
    return queries, replace(
        samples,
        step_index=torch.cat([r.step_index.flatten() for r in records]),
        old_log_prob=torch.cat([r.log_prob.flatten() for r in records]),
        m_prev=_of_all([r.m_prev for r in records]),
        v_old=_of_all([r.velocity for r in records]),
    )


def noised(asked: Asked, draws: int) -> tuple[Queries, Samples]:
    """The outputs, noised again: x_t = (1 - sigma) x0 + sigma noise at `draws` noise levels a turn
    among the sampler's own, one from each of as many equal parts of its steps."""
    chunk, sampler = asked.chunk, asked.sampler
    xs, sigmas, noises, clean = [], [], [], []
    for turn, record in enumerate(chunk.turns):
        seed = asked.seeds.noised(chunk, record.rollout, turn, asked.update)
        uniform = (seed & 0xFFFFFF).double() / (1 << 24)
        index = (torch.arange(draws) + uniform[:, None]) * (sampler.steps / draws)
        index = index.long().clamp(max=sampler.steps - 1)
        x0, on = record.x0.float(), record.x0.device
        noise = torch.stack(
            [philox_normal(seed.to(on), place, x0.shape[1:]) for place in range(draws)], 1
        )
        sigma = sampler.sigmas[index.to(on)]
        wide = sigma.view(*sigma.shape, *[1] * (x0.dim() - 1))
        xs.append(torch.lerp(x0[:, None].expand_as(noise), noise, wide))
        sigmas.append(sigma)
        noises.append(noise.flatten(0, 1))
        clean.append(x0.repeat_interleave(draws, 0))
    queries = Queries(xs, sigmas)
    return queries, replace(_samples(asked, queries, clean), noise=torch.cat(noises))


def _of_all(parts: list[Tensor | None]) -> Tensor | None:
    there = [part.flatten(0, 1) for part in parts if part is not None]
    return torch.cat(there) if there else None


def _samples(asked: Asked, queries: Queries, following: list[Tensor]) -> Samples:
    device, siblings = queries.x[0].device, asked.chunk.siblings
    advantage, mask, group = [], [], []
    groups = len(asked.chunk.sessions)
    for turn, (record, sigma) in enumerate(zip(asked.chunk.turns, queries.sigma, strict=True)):
        places = sigma.shape[1]
        advantage.append(asked.advantage[record.rollout, turn].repeat_interleave(places))
        mask.append(asked.mask[record.rollout, turn].repeat_interleave(places))
        own = (turn * groups + record.rollout // siblings) * places
        group.append((own[:, None] + torch.arange(places)).flatten())
    return Samples(
        torch.cat([x.flatten(0, 1) for x in queries.x]),
        torch.cat(following),
        torch.cat([s.flatten() for s in queries.sigma]),
        torch.cat(advantage).to(device),
        torch.cat(mask).to(device),
        torch.cat(group).to(device),
    )


# ------------------------------------------------------------------------------------------ intents


def text_term(
    t: TrainConfig,
    answers: Answers,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    normalizer: float,
) -> Term:
    """The intents' policy loss: per sample the mean over its tokens of
    max(-A rho, -A clip(rho, 1 -+ text_clip)).

    old: [B, L] log-probs of the sampling policy; advantage, mask: [B], those of the turn. Its means
    are numbers of tokens.
    """
    log_prob, valid = answers.scores.log_prob, answers.scores.valid
    counted = valid & mask[:, None] & (valid.sum(1) > 0)[:, None]
    # A masked sample must not reach the gradient even as 0 * inf.
    ratio = torch.where(counted, log_prob - old, 0.0).exp()
    clipped = ratio.clamp(1 - t.text_clip, 1 + t.text_clip)
    token = torch.maximum(-advantage[:, None] * ratio, -advantage[:, None] * clipped)
    sample = torch.where(counted, token, 0.0).sum(1) / valid.sum(1).clamp(min=1)
    outside = counted & ((ratio - 1).abs() > t.text_clip)
    with torch.no_grad():
        deviation = torch.where(valid, log_prob - old, 0.0).exp().sub(1).abs()
        error = deviation.max() if deviation.numel() else deviation.new_zeros(())
    means = {"clipped": outside.sum().float(), "tokens": counted.sum().float()}
    return Term(sample.sum() / normalizer, means, error)
