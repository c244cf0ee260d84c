"""All that changes while training, and how it is saved and found again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editr2.config import Config, TrainConfig
from editr2.errors import CheckpointError, one_line
from editr2.policies.base import Policy, TextPolicy
from editr2.policies.finite import check_state
from editr2.policies.parts import is_shared, part, rows, whole
from editr2.policies.weights import exchanged, load_trainable, mix, snapshot, trainable
from editr2.rl.losses import LOSSES
from editr2.rl.seeds import derive_seed
from editr2.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from editr2.run.generators import capture_rng, restore_rng, seed_generators
from editr2.run.identity import Identity, changes, named, settle
from editr2.run.processes import Processes


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a checkpoint was found to be. told: what may differ and does, as text. insisted: what
    else differs, as (saved, given), because the user said so. resumed: who went on with the run
    before. unknown: it was written without fingerprints. date: the process that saved it began
    then."""

    told: list[str]
    insisted: dict[str, tuple[str, str]]
    resumed: list[dict[str, Any]]
    unknown: bool
    date: str | None


@dataclasses.dataclass
class State:
    """All that changes while training, and all that a checkpoint must hold.

    reference, old, ema: the trainable parameters of the start (KL), of NFT's sampling policy, and
    their running average; None where the settings have no use for them. rng: this process's
    generators after the iterations done. parts: of weights that are shared out, what this process
    holds of each, by name and over the same memory: the optimiser steps those. Empty where they are
    whole.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    reference: dict[str, Tensor] | None = None
    old: dict[str, Tensor] | None = None
    ema: dict[str, Tensor] | None = None
    iteration: int = 0
    elapsed: float = 0.0
    rng: dict[str, Any] = dataclasses.field(default_factory=capture_rng)
    parts: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        live = trainable(self.policy.module)
        self._own = {name: p.data for name, p in live.items() if name not in self.parts}
        if self.parts:
            vars(self.policy.module)["lockstep"].copies = list(self._copies().values())

    def stepped(self) -> dict[str, nn.Parameter]:
        """What the optimiser steps, by name: the trainable parameters, or this process's parts."""
        return self.parts or trainable(self.policy.module)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for p in trainable(self.policy.module).values() if self.parts else ():
            p.grad = None

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        copies = {"reference": self.reference, "old": self.old, "ema": self.ema}
        return {name: values for name, values in copies.items() if values is not None}

    def put_back(self) -> None:
        """Gives the module its live weights, wherever an exchange of them was left, and no
        gradients. (Several processes are not interrupted within an exchange, and weights that are
        shared out are theirs.)"""
        live = trainable(self.policy.module)
        for name, data in self._own.items():
            live[name].data = data
        self.drop_gradients()

    def held(self, processes: Processes) -> Held | None:
        """What a checkpoint holds of weights that are shared out, None where they are whole: put
        together on the first process's host (which then holds all copies and moments whole), tensor
        by tensor; the others get nothing. All processes have to call it."""
        if not self.parts:
            return None
        processes.lend()

        def gather(own: Tensor, like: Tensor) -> Tensor:
            everywhere = whole(own, like)
            return everywhere.cpu() if processes.main else own

        live = trainable(self.policy.module)
        groups: dict[str, Mapping[str, Tensor]] = {"policy": live, **self._copies()}
        tensors = {
            group: {name: gather(part(value), live[name]) for name, value in values.items()}
            for group, values in groups.items()
        }
        optimizer, stepped = self.optimizer.state_dict(), self._stepped_of()
        optimizer["state"] = {
            at: {
                name: gather(value, stepped[at]) if value.dim() else value
                for name, value in moments.items()
            }
            for at, moments in optimizer["state"].items()
        }
        return (tensors, optimizer) if processes.main else ({}, {})

    def _stepped_of(self) -> list[Tensor]:
        """The trainable parameters in the optimiser's order."""
        of = {id(self.stepped()[name]): p for name, p in trainable(self.policy.module).items()}
        return [of[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def save(
        self,
        root: Path,
        config: Config,
        identity: Identity | None = None,
        rng: Sequence[Any] | None = None,
        held: Held | None = None,
    ) -> None:
        """identity: what the run depends on; without it a resumed run can compare settings alone.
        rng: the generators of every process, none are this one's. held: of `held`, needed where
        weights are shared out. Raises `NonFiniteError` before anything is written."""
        tensors, optimizer = held or (
            {"policy": snapshot(self.policy.module), **self._copies()},
            self.optimizer.state_dict(),
        )
        check_state(f"{root}: step {self.iteration} is not saved", tensors, optimizer)
        save_checkpoint(
            root,
            self.iteration,
            tensors=tensors,
            optimizer=optimizer,
            state={
                "elapsed": self.elapsed,
                "moments": len(self.optimizer.state),
                "config": dataclasses.asdict(config),
                **({} if identity is None else {"identity": dataclasses.asdict(identity)}),
            },
            rng=[self.rng] if rng is None else list(rng),
            keep=config.checkpoint.keep,
        )

    def load(
        self,
        path: Path,
        config: Config,
        identity: Identity | None = None,
        *,
        rank: int = 0,
        insist: Sequence[str] = (),
    ) -> Resumed:
        """Takes on a checkpoint's state. No weight is changed before all of them were looked at.

        identity: of this run; None compares settings alone. rank: whose generators. insist: names
        of settings, sections or fingerprints that may differ. Raises CheckpointError naming every
        other one that does, and for contents that are none of this run's.
        """
        identity = identity or Identity({}, {})
        saved = load_checkpoint(path)
        elapsed = _field(saved, saved.state, "elapsed", (int, float))
        if not math.isfinite(elapsed):
            raise CheckpointError(
                f"{path}: damaged: elapsed in state.json is {elapsed} (accepted: seconds)"
            )
        settings = _field(saved, saved.state, "config", dict)
        recorded = _field(saved, saved.state, "identity", dict, {})
        depends, made = (_field(saved, recorded, key, dict, {}) for key in ("depends", "made"))
        _field(saved, made, "versions", dict, {})
        resumed = _field(saved, recorded, "resumed", list, [])
        now = named(config, identity.depends)
        insisted = settle(named(settings, depends), now, insist, path, apart_from={"start"})
        check_state(path, saved.tensors, saved.optimizer)
        self._take_on(saved, anything=bool(insisted))
        self._restore_rng(saved.rng, config.seed, rank)
        self.iteration, self.elapsed = saved.iteration, float(elapsed)
        different = changes(made, identity.made) if made else []
        return Resumed(different, insisted, resumed, not depends, made.get("date"))

    def _take_on(self, saved: Checkpoint, *, anything: bool) -> None:
        """anything: copies of weights may be missing, since other settings need others."""
        like = trainable(self.policy.module)
        copies = self._copies()
        for name in ("policy", *copies):
            if name in saved.tensors:
                _check_shapes(saved, name, like)
            elif not (anything and name in copies):
                raise CheckpointError(
                    f"{saved.path}: damaged: no {name}.safetensors, which these settings need"
                )
        self._load_optimizer(saved)
        load_trainable(self.policy.module, saved.tensors["policy"])
        for name, values in copies.items():
            # A reference stays the start; an average or an old policy that there was not begins
            # here.
            given = saved.tensors.get(
                name, values if name == "reference" else saved.tensors["policy"]
            )
            for key, value in values.items():
                part(value).copy_(rows(given[key], value))

    def _load_optimizer(self, saved: Checkpoint) -> None:
        settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        empty = self.optimizer.state_dict()
        try:
            self.optimizer.load_state_dict(self._own_rows(saved.optimizer))
            wrong = [
                f"{name} {list(value.shape)} for a weight {list(p.shape)}"
                for p, moments in self.optimizer.state.items()
                for name, value in moments.items()
                if value.shape not in (p.shape, torch.Size())
            ]
            held = len(self.optimizer.state)
            if (expected := saved.state.get("moments", held)) != held:
                wrong.append(f"moments of {held} weights (accepted: of {expected})")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            wrong = [one_line(error, kind=True)]
        if wrong:
            self.optimizer.load_state_dict(empty)
            raise CheckpointError(f"{saved.path}: damaged: optimizer: {wrong[0]}")
        # Learning rates and the like are the settings', which were compared; what was insisted on
        # has to act.
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _own_rows(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """A whole optimiser's state as this process holds it."""
        if not self.parts:
            return optimizer
        stepped = self._stepped_of()

        def own(value: Tensor, like: Tensor) -> Tensor:
            if not value.dim():
                return value
            if value.shape != like.shape:
                raise ValueError(f"{list(value.shape)} for a weight {list(like.shape)}")
            return rows(value, like).clone()  # not the whole file's memory

        state = {
            at: {name: own(value, stepped[at]) for name, value in moments.items()}
            for at, moments in optimizer["state"].items()
        }
        return {**optimizer, "state": state}

    def _restore_rng(self, rng: Any, seed: int, rank: int) -> None:
        ranks = (
            rng if isinstance(rng, list) else [rng]
        )  # editr2 0.1 kept those of the first process
        if rank < len(ranks):
            restore_rng(ranks[rank])
        else:
            seed_generators(derive_seed(seed, "rank", rank))
        self.rng = capture_rng()

    @contextmanager
    def averaged(self) -> Iterator[Policy]:
        """The policy with its averaged weights, where there are any."""
        with exchanged(self.policy.module, self.ema):
            yield self.policy

    def step_copies(self, t: TrainConfig, *, iteration_done: bool) -> None:
        """After an optimiser step: the average; after an iteration: NFT's old policy,
        old <- d old + (1 - d) theta with d = min(old_decay * iteration, old_decay_max)."""
        if not iteration_done:
            if self.ema is not None and t.ema is not None:
                mix(self.ema, self.policy.module, t.ema)
        elif self.old is not None:
            mix(self.old, self.policy.module, min(t.old_decay * self.iteration, t.old_decay_max))


Held = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Groups of whole weights by name, and the optimiser's state."""

_NEEDED: Any = object()


def _field(
    saved: Checkpoint, values: Mapping[str, Any], key: str, kinds: Any, default: Any = _NEEDED
) -> Any:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, kinds):
        what = "missing from" if value is _NEEDED else f"a {type(value).__name__} in"
        raise CheckpointError(f"{saved.path}: damaged: {key} is {what} state.json")
    return value


def _check_shapes(saved: Checkpoint, name: str, like: Mapping[str, Tensor]) -> None:
    values, file = saved.tensors[name], f"{saved.path / name}.safetensors"
    if odd := sorted(set(like) ^ set(values)):
        where = "missing from it" if odd[0] in like else "unknown to the policy"
        raise CheckpointError(f"{file}: {odd[0]}: {where} (and {len(odd) - 1} more)")
    for key, value in values.items():
        if value.shape != like[key].shape:
            given, accepted = list(value.shape), list(like[key].shape)
            raise CheckpointError(f"{file}: {key}: {given} (accepted: {accepted}, the policy's)")


def new_state(t: TrainConfig, policy: Policy) -> State:
    """At the start of a run: AdamW, and the copies of weights that the settings have a use for."""
    other = LOSSES[t.loss].weights(t)
    live = trainable(policy.module)
    parts = {name: nn.Parameter(part(p)) for name, p in live.items() if is_shared(p)}
    stepped = {**live, **parts}
    writes = policy.writes_text_with if isinstance(policy, TextPolicy) else (lambda name: False)
    image = {"params": [p for n, p in stepped.items() if not writes(n)], "base_lr": t.lr}
    text = {
        "params": [p for n, p in stepped.items() if writes(n)],
        "base_lr": t.text_lr or t.lr,
    }
    groups = [group for group in (image, text) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    state = State(
        policy,
        optimizer,
        reference=snapshot(policy.module) if "reference" in other else None,
        old=snapshot(policy.module) if "old" in other else None,
        ema=snapshot(policy.module) if t.ema is not None else None,
        parts=parts,
    )
    state.drop_gradients()  # of a run that was stopped before, in the same process
    return state
