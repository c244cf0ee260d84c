"""What must hold between settings, reward, schedule and processes before anything runs.

The trainer raises the first of these problems, `editr2 check` prints them all: every rule stands
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from editr2.config import Config, RolloutConfig
from editr2.config.fields import mended
from editr2.config.rules import TRAINS, Command
from editr2.errors import ConfigError, UserError
from editr2.policies.rules import config_problems, group_problem
from editr2.rewards.base import weight_vector
from editr2.rewards.panel import Panel
from editr2.rl.credit import FILTER_REWARD, credit_options
from editr2.rl.sampler import Schedule, eval_sampler, rollout_sampler
from editr2.rl.watch import check_best


def batches(r: RolloutConfig, processes: int) -> int:
    """Chunks of at most `rollout.groups_per_batch` groups that the process with most to do has in
    an iteration."""
    most = -(-r.sessions // processes)
    return -(-most // r.groups_per_batch)


def run_problems(
    config: Config,
    names: Sequence[str] | None,
    own: Schedule | None,
    *,
    processes: int,
    cannot_pack: str | None = None,
    command: Command = "train",
    apart: Sequence[str] = (),
) -> Iterator[str]:
    """One line for each rule that is broken, of those that the command's settings are under.

    names: of the rewards; None skips what needs them. apart: of those of `eval.reward`. own: the
    policy's noise schedule. cannot_pack: what the policy is called if it has no packed replay.
    processes: of the run.
    """
    said = set()
    for problem in config_problems(config, command):
        said.add(problem)
        yield problem
    config, trains = mended(config), command in TRAINS
    checks: list[Callable[[], Any]] = [lambda: eval_sampler(config.rollout, config.eval, own)]
    if trains:
        checks.insert(0, lambda: rollout_sampler(config.rollout, own))
    if names is not None:
        checks += _of_scores(config, names, apart, command)
    for check in checks:
        try:
            check()
        except UserError as error:
            if str(error) not in said:  # the samplers read the same fields
                yield str(error)
            said.add(str(error))
    p = config.policy
    group = p.shard_group if p.shard and processes > 1 else None
    if (indivisible := group_problem(group, processes)) is not None:
        yield indivisible
    if not trains:
        return
    r, t = config.rollout, config.train
    if r.sessions < processes:
        yield f"rollout.sessions: {r.sessions} (accepted: at least {processes}, one a process)"
    elif t.minibatches > 1:
        # The processes with least and with most to do: an optimizer step is all processes' equally
        # numbered minibatch.
        least, most = (
            -(-(r.sessions // processes) // r.groups_per_batch),
            batches(r, processes),
        )
        if least != most:
            yield (
                f"train.minibatches: {t.minibatches} (accepted: 1, since some processes have "
                f"{least} batches of rollout.groups_per_batch = {r.groups_per_batch} groups and "
                f"some {most})"
            )
        elif most % t.minibatches:
            yield (
                f"train.minibatches: {t.minibatches} (accepted: a divisor of {most}, the batches "
                f"of rollout.groups_per_batch = {r.groups_per_batch} groups that a process has)"
            )
    if t.packed == "on" and cannot_pack:
        yield f"train.packed: on (accepted for a {cannot_pack}, which cannot: auto, off)"


def _of_scores(
    config: Config, names: Sequence[str], apart: Sequence[str], command: Command
) -> list[Callable[[], Any]]:
    """What raises where settings name scores that there are not, or leave some out."""
    checks: list[Callable[[], Any]] = [lambda: weight_vector(names, config.credit.weights)]
    if command in TRAINS:
        checks.append(lambda: credit_options(config.credit, tuple(names)))
        checks.append(lambda: check_best(config, names, apart))
    return checks


def check_rewards(
    config: Config, rewards: Panel, apart: Panel | None = None, command: Command = "train"
) -> None:
    """What can be wrong with the rewards of a run, before the minutes in which an editor's weights
    are read. apart: those of `eval.reward`. Raises `ConfigError`: the settings name other scores
    than there are, `rollout.prune` has nothing to go by, or a reward's own `quick_look` says so."""
    for check in _of_scores(config, rewards.names, apart.names if apart else (), command):
        check()
    if command in TRAINS:
        check_pruning(config, rewards)
    for panel in filter(None, (rewards, apart)):
        panel.quick_look()


def check_pruning(config: Config, rewards: Panel) -> None:
    """Raises `ConfigError` where `rollout.prune` would change what is trained, or has nothing to go
    by."""
    prune = config.rollout.prune
    if prune == "off":
        return
    options = credit_options(config.credit, rewards.names)
    whole = [member.title for member in rewards.members if not member.by_turn]
    wrong = ""
    if options.aggregate != "none":
        wrong = "credit per turn; what aggregates over turns needs all of them"
    elif prune == "filter" and options.filter_reward is None:
        wrong = f"a filter (credit.filter and a reward named {FILTER_REWARD})"
    elif prune == "filter" and options.filter_in_statistics:
        wrong = "filtered turns outside of the statistics; those of this preset count there"
    elif whole:
        wrong = f"rewards that can be asked about single turns (by_turn); {whole[0]} cannot"
    elif prune == "estimate" and not any(member.estimates for member in rewards.members):
        wrong = "a reward that has an estimate(items)"
    if wrong:
        raise ConfigError(f"rollout.prune: {prune} (accepted with {wrong}: off)")


def check_run(
    config: Config,
    names: Sequence[str] | None,
    own: Schedule | None,
    *,
    processes: int,
    cannot_pack: str | None = None,
    command: Command = "train",
    apart: Sequence[str] = (),
) -> None:
    """Raises `ConfigError` with the first of `run_problems`."""
    for problem in run_problems(
        config,
        names,
        own,
        processes=processes,
        cannot_pack=cannot_pack,
        command=command,
        apart=apart,
    ):
        raise ConfigError(problem)
