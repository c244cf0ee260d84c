"""From settings to a policy, whatever model they name."""

from __future__ import annotations

import shutil
from pathlib import Path

from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.base import Policy
from editr2.policies.configured import ConfiguredPolicy, made, policy_class, settled_branches
from editr2.policies.finite import check_weights
from editr2.policies.lora_files import read_lora
from editr2.policies.recorded import over_its_base
from editr2.policies.rules import policy_problems
from editr2.policies.sharding import place
from editr2.policies.weights import put_on
from editr2.run.processes import Processes


def load_policy(config: PolicyConfig, *, trains: bool = True, empty: bool = False) -> Policy:
    """The configured weights, ready to train: adapters alone where `lora_rank` is above 0, else all
    of the model's. trains: off, nothing trains, and the weights of models on diffusers are in
    `policy.dtype`. empty: the transformer of a model on diffusers holds no data, for another
    process's to be put there (`editr2.policies.sharding`).

    Raises `ConfigError` for settings the model cannot follow, and for weights that are not there or
    another model's, and `NonFiniteError` for weights that are not finite.
    """
    base, adapters = over_its_base(config)
    if adapters is not None and trains:
        raise ConfigError(
            f"policy.weights: {adapters}: adapters of an export (accepted where policies train: "
            f"the policy/ of their run, or the export with --merge)"
        )
    if given := read_lora(base):  # what is wrong with it is said before gigabytes are read
        given.strengths_by(base)
    policy: Policy = made(policy_class(config.model), base, trains=trains, empty=empty)
    if adapters is not None:
        put_on(policy.module, adapters)
    check_weights(policy, f"policy.weights: {config.weights or 'default'}")
    return policy


def open_policy(config: PolicyConfig, processes: Processes, *, trains: bool = True) -> Policy:
    """`load_policy` for a run of several processes: on their devices, whole or shared out
    (`policy.shard`).

    Raises `ConfigError` as `load_policy`, and for settings that cannot be shared out.
    """
    for problem in policy_problems(config, trains):
        raise ConfigError(problem)
    config = settled_branches(config, processes.count)
    policy = load_policy(config, trains=trains, empty=config.shard and not processes.main)
    place(policy, config.shard, processes, config.shard_group)
    if isinstance(policy, ConfiguredPolicy):
        policy.placed(trains)
    return policy


def rehearse_save(policy: Policy, run: Path) -> None:
    """Saves the policy into a run's folder and removes it again: what cannot be saved fails before
    it is trained."""
    folder = run / ".tmp-policy"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    try:
        policy.save(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
