"""What the settings demand of themselves and of each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from editr2.config.fields import defaults, field_problems, mended, plain
from editr2.config.settings import LOSSES, Config, RewardConfig, RewardUse, noise_levels

Command = Literal["train", "check", "eval", "rollout", "judge"]

TRAINS = ("train", "check")

_SAMPLES = ("train", "check", "eval", "rollout")

Rule = Callable[[Config, str], Iterator[str]]

RULES: list[tuple[tuple[str, ...], Rule]] = []
"""What fields demand of each other: the commands that use these fields, and a function of the
configuration and the command that yields a line for each rule that is broken."""


def rule(*commands: str) -> Callable[[Rule], Rule]:
    """Adds a function to `RULES`. Rules about a table that stands above the settings stand beside
    that table, and are here once it was looked into, which checking the field does."""

    def add(rule: Rule) -> Rule:
        RULES.append((commands, rule))
        return rule

    return add


def settings_problems(config: Config, command: Command = "train") -> Iterator[str]:
    """One line, naming the field, for each rule that is broken and needs nothing but the
    configuration and its paths. What the editor demands stands above it
    (`editr2.policies.rules`).

    First every field by itself, for every command: a value that is out of its range is a slip
    whoever reads it. Then what the fields that this command uses demand of each other, with broken
    ones at their defaults.
    """
    yield from (problem for _, problem in field_problems(config))
    whole = mended(config)
    for commands, rule in RULES:
        if command in commands:
            yield from rule(whole, command)


def completed(config: Config) -> Config:
    """The configuration, which has no problem, with every option of its loss as the loss takes it:
    what a run saves, and is compared by when it goes on."""
    t = config.train
    return replace(config, train=replace(t, loss_options=plain(LOSSES()[t.loss].settings(t))))


def option_defaults(loss: str) -> dict[str, Any]:
    """Of `train.loss_options` with a loss, of the options that have a default; none are known of a
    loss that is not in the table."""
    entry = LOSSES().get(loss)
    return {} if entry is None else defaults(entry.options)


@rule(*TRAINS)
def _without_a_window(config: Config, command: str) -> Iterator[str]:
    r = config.rollout
    if r.window == 0 and r.shared_noise:
        yield (
            "rollout.shared_noise: true (accepted without a window: false, or all siblings are "
            "equal)"
        )


@rule(*_SAMPLES)
def _noise_level(config: Config, command: str) -> Iterator[str]:
    r = config.rollout
    drawn = r.window > 0 and (command in TRAINS or config.eval.sampler == "rollout")
    if drawn and (problem := noise_problem(r.dynamics, r.noise_level)):
        yield problem


def noise_problem(dynamics: str, level: float) -> str | None:
    """What is wrong with the noise level of a window's steps, or None."""
    if (bounds := noise_levels(dynamics)).hold(level):
        return None
    return f"rollout.noise_level: {level} (accepted with rollout.dynamics {dynamics}: {bounds})"


@rule(*TRAINS)
def _units(config: Config, command: str) -> Iterator[str]:
    from editr2_kernels.group_advantage import MAX_UNITS

    r = config.rollout
    if (units := r.sessions * r.siblings * r.turns) > MAX_UNITS:
        yield (
            f"rollout.sessions: {r.sessions} (accepted: sessions * siblings * turns of at most "
            f"{MAX_UNITS}, which credit sums exactly; this is {units})"
        )


@rule(*TRAINS)
def _replay(config: Config, command: str) -> Iterator[str]:
    t = config.train
    if t.packed == "on" and t.micro_batch == "auto":
        yield "train.micro_batch: auto (accepted with train.packed on: none, or a number)"
    if t.packed != "on" and t.micro_batch is not None and t.context_gradient:
        yield (
            f"train.micro_batch: {t.micro_batch} (accepted with train.context_gradient: none; all "
            f"goes in one forward, unless train.packed is on)"
        )


@rule(*TRAINS)
def _minibatches(config: Config, command: str) -> Iterator[str]:
    # A batch is of one size, so how many there are follows from the sessions of the iteration.
    if config.train.minibatches > 1 and config.policy.buckets:
        yield (
            f"train.minibatches: {config.train.minibatches} (accepted with policy.buckets: 1; the "
            f"number of batches follows from the sessions' sizes)"
        )


@rule(*TRAINS)
def _prune(config: Config, command: str) -> Iterator[str]:
    prune = config.rollout.prune
    if prune != "off" and config.policy.shard:
        yield (
            f"rollout.prune: {prune} (accepted with policy.shard: off; processes that gather "
            f"weights have to make equally many steps)"
        )


@rule(*TRAINS)
def _stop_after(config: Config, command: str) -> Iterator[str]:
    stop, needs = config.train.stop_after, {}
    if stop is not None:
        needs = {"checkpoint.best": config.checkpoint.best, "eval.every": config.eval.every}
    for name, value in needs.items():
        if not value:
            shown = "none" if value is None else value
            yield (
                f"train.stop_after: {stop} (accepted with {name} {shown}: none; it counts "
                f"evaluations that did not raise that metric)"
            )


@rule(*TRAINS)
def _without_evaluation(config: Config, command: str) -> Iterator[str]:
    if not config.eval.off:
        return
    limits = config.eval.drift
    needs: dict[str, tuple[Any, Any]] = {
        "eval.every": (config.eval.every, 0),
        "eval.strips_from": (config.eval.strips_from, "groups"),
        "eval.reward": (", ".join(at for at, _ in config.eval.uses) or (), ()),
        **{f"eval.drift.{f.name}": (getattr(limits, f.name), None) for f in fields(limits)},
        "checkpoint.best": (config.checkpoint.best, None),
        "train.stop_after": (config.train.stop_after, None),
    }
    for name, (value, off) in needs.items():
        if value != off:
            accepted = {None: "none", (): "empty"}.get(off, off)
            yield f"{name}: {value} (accepted with eval.sessions 0, no evaluation: {accepted})"


@rule("eval", "rollout")
def _something_to_evaluate(config: Config, command: str) -> Iterator[str]:
    if config.eval.off:
        yield f"eval.sessions: 0 (accepted by editr2 {command}: at least 1)"


@rule("train", "check", "judge")
def _out(config: Config, command: str) -> Iterator[str]:
    if problem := folder_problem(config.out):
        yield f"out: {config.out!r} (accepted: a folder; {problem})"


@rule("train", "check", "eval", "judge")
def _reward(config: Config, command: str) -> Iterator[str]:
    yield from reward_problems(config.reward)
    yield from listed_problems(config.eval.uses)


def reward_problems(reward: RewardConfig) -> Iterator[str]:
    """One line for each reward that is named twice or, of several, not at all."""
    alone = [f.name for f in fields(RewardUse) if getattr(reward, f.name) not in (None, {})]
    if reward.use and alone:
        yield (
            f"reward.{alone[0]}: {getattr(reward, alone[0])!r} (accepted with reward.use: none; "
            f"each entry there has its own)"
        )
    if reward.use:
        yield from listed_problems(reward.uses)
    else:
        for at, use in reward.uses:
            yield from _named_twice(at, use)
    if reward.cache is not None and (problem := folder_problem(reward.cache)):
        yield f"reward.cache: {reward.cache!r} (accepted: a folder; {problem})"


def listed_problems(uses: Iterable[tuple[str, RewardUse]]) -> Iterator[str]:
    """The same of a list of rewards."""
    for at, use in uses:
        yield from _named_twice(at, use)
        if use.name is None and use.function is None:
            yield f"{at}: names no reward (accepted: a name or a function)"


def _named_twice(at: str, use: RewardUse) -> Iterator[str]:
    if use.name is not None and use.function is not None:
        yield (
            f"{at}.name: {use.name!r} (accepted with {at}.function {use.function!r}: none; "
            f"each of them names the judge)"
        )


def folder_problem(folder: str | os.PathLike[str]) -> str | None:
    """Why a folder, new or not, cannot be written into; None if it can. Nothing is made."""
    at = Path(os.path.expanduser(folder))
    if str(at).startswith("~"):
        return f"there is no home folder {at.parts[0]}; ./{at} is one of that name"
    while not os.path.lexists(at) and at != at.parent:
        at = at.parent
    if not at.is_dir():
        return f"{at} is a file"
    if not os.access(at, os.W_OK | os.X_OK):
        return f"{at} is not yours to write into"
    return None
