"""What a run could be set to that gives the same training, up to rounding, in less time or memory:
each lever alone, the fastest combination that fits, and what `auto` becomes.

Every candidate is judged by the estimate. Its costs are lines in the batch and in the number of
blocks that are computed again, so that a candidate costs arithmetic and no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any

from editr2.check.devices import Device
from editr2.check.editors import Editor, open_editor
from editr2.check.estimate import Estimate, estimate
from editr2.check.judges import Measured
from editr2.config import Config, replace_nested
from editr2.config.fields import leaves
from editr2.errors import ConfigError
from editr2.policies.blocks import compiles
from editr2.policies.configured import policy_class, settled_branches
from editr2.policies.rules import check_config
from editr2.rl.sampler import Sampler
from editr2.sessions import Session

ROOM = 0.9
"""Share of a device's memory that is proposed to be filled: no GPU was compared yet, and on a CPU
training took 1.13 times the estimate."""
EQUAL = 0.01
"""Seconds that differ by less count as the same: then the setting that changes less is taken."""

AGAIN, COMPILE, ROWS = "policy.gradient_checkpointing", "policy.compile", "train.micro_batch"
GROUPS, OFFLOAD, SHARD = "rollout.groups_per_batch", "policy.offload", "policy.shard"
BRANCHES = "policy.branches"
PLAIN: Mapping[str, Any] = {AGAIN: "off", COMPILE: "off", ROWS: None, BRANCHES: "apart"}
"""The settings that may be auto, and what they are without a GPU."""

CANDIDATES: Mapping[str, Sequence[Any]] = {
    ROWS: (None, 1, 2, 4, 8, 16, 32),
    GROUPS: (1, 2, 4, 8),
    OFFLOAD: (False, True),
    SHARD: (False, True),
}
"""Levers that leave the numbers what they are but for rounding. Beside them `AGAIN` is searched,
and `COMPILE` is on wherever it can be: by the estimate that is never slower."""
OTHER_NUMBERS: Mapping[str, Sequence[Any]] = {"policy.quantize": ("fp8",)}
"""Levers that do not, and are shown only: another model computes."""
SAME_EDITOR = (AGAIN, COMPILE, *CANDIDATES)
"""Levers that the same measured editor is asked about."""


def value_of(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with these values by dotted name."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return replace_nested(config, nested)


@dataclass(frozen=True)
class Case:
    """A run without its settings: what an estimate asks beside them. sessions: that an editor is
    to see."""

    editor: Editor
    device: Device
    samplers: tuple[Sampler, Sampler]
    turns: tuple[Sequence[int], Sequence[int]]
    processes: int = 1
    judges: Sequence[Measured] = ()
    sessions: Sequence[Session] = ()
    apart: Sequence[Measured] = ()

    def of(self, config: Config, editor: Editor | None = None, *, compared: bool = False) -> Option:
        """With the editor of the case, or another. compared: as `estimate` takes it."""
        found = estimate(
            config,
            editor or self.editor,
            self.device,
            self.samplers,
            self.turns,
            self.processes,
            self.judges,
            self.apart,
            compared=compared,
        )
        return Option(config, found, self.device)

    def opened(self, config: Config) -> Editor:
        """An editor of other settings, for which what was measured does not hold."""
        editor = open_editor(config.policy)
        if self.sessions:
            editor.see(self.sessions)
        return editor


@dataclass(frozen=True)
class Option:
    """Settings with their estimate."""

    config: Config
    estimate: Estimate
    device: Device

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        phases = self.estimate.seconds
        return sum(phases[p] for p in ("rollout", "encode", "reward", "train"))

    @property
    def needed(self) -> float:
        return self.device.needed(self.estimate.peak)

    def fits(self, room: float = 1.0) -> bool:
        return self.needed <= room * self.device.memory


def accepted(config: Config, key: str, values: Iterable[Any], processes: int = 1) -> list[Any]:
    """Those that the run may be set to: no rule is broken, and the model has a use for it."""
    section, _, name = key.partition(".")
    if key not in dict(leaves(Config)):
        return []
    if section == "policy" and name not in policy_class(config.policy.model).uses:
        return []
    if key == GROUPS and config.train.minibatches > 1:
        return []  # optimiser steps are counted by these batches
    if key == SHARD and processes == 1:
        return []  # nothing to share out
    if key == BRANCHES and config.policy.guidance == 1:
        return []  # there is one
    found = []
    for value in values:
        try:
            check_config(with_values(config, {key: value}), "check")
        except ConfigError:
            continue
        found.append(value)
    return found


def fastest(
    case: Case,
    config: Config,
    values: Mapping[str, Sequence[Any]],
    *,
    again: bool,
    compiled: bool = False,
) -> Option | None:
    """The fastest combination of the values that leaves `ROOM`; None where none does. again: the
    number of blocks that are computed again is free, too, and as few as fit. compiled: whether they
    are is, too, and they are wherever they can be."""
    found: list[Option] = []
    for chosen in product(*values.values()):
        candidate = with_values(config, dict(zip(values, chosen, strict=True)))
        if compiled:
            on = compiles(replace(candidate.policy, compile="auto"), cuda=True)
            candidate = with_values(candidate, {COMPILE: "on" if on else "off"})
        option = _fewest_again(case, candidate) if again else case.of(candidate)
        if option.fits(ROOM):
            found.append(option)
    if not found:
        return None
    limit = min(option.seconds for option in found) * (1 + EQUAL)

    def changes(option: Option) -> tuple[int, float]:
        keys = [AGAIN, COMPILE, *values]
        other = sum(value_of(option.config, key) != value_of(config, key) for key in keys)
        return other, option.needed

    return min((option for option in found if option.seconds <= limit), key=changes)


def _fewest_again(case: Case, config: Config) -> Option:
    """With as few blocks computed again as leave `ROOM`, or with all."""
    none = case.of(with_values(config, {AGAIN: "off"}))
    if none.fits(ROOM) or not accepted(config, AGAIN, ["all"]):
        return none
    every = case.of(with_values(config, {AGAIN: "all"}))
    if not every.fits(ROOM):
        return every
    low, high, best = 0, case.editor.blueprint.blocks, every  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        option = case.of(with_values(config, {AGAIN: middle}))
        low, high = (low, middle) if option.fits(ROOM) else (middle, high)
        best = option if high == middle else best
    return best


def propose(case: Case, config: Config) -> Option | None:
    """The fastest of all combinations that give the same training up to rounding."""
    uses = "compile" in policy_class(config.policy.model).uses
    open_ = with_values(config, {COMPILE: "auto"}) if uses else config
    free = {}
    for key, given in CANDIDATES.items():
        if values := accepted(open_, key, given, case.processes):
            own = value_of(config, key)
            free[key] = values if own in values else [*values, own]
    blocks = case.editor.blueprint.blocks > 0
    return fastest(case, config, free, again=blocks, compiled=uses)


def alone(case: Case, config: Config) -> Iterator[tuple[str, Any, Option]]:
    """Each lever's other values, one changed at a time."""
    table = {
        COMPILE: ("on", "off"),
        AGAIN: ("off", "all"),
        **CANDIDATES,
        BRANCHES: ("together", "apart"),
        **OTHER_NUMBERS,
    }
    for key, values in table.items():
        others = [v for v in values if v != value_of(config, key)]
        options = []
        for value in accepted(config, key, others, case.processes):
            changed = with_values(config, {key: value})
            editor = case.editor if key in SAME_EDITOR else case.opened(changed)
            options.append((value, case.of(changed, editor)))
        if key in (ROWS, GROUPS) and options:  # of many sizes the fastest that fits
            fit = [o for o in options if o[1].fits(ROOM)]
            options = [min(fit, key=lambda o: o[1].seconds)] if fit else []
        yield from ((key, value, option) for value, option in options)


def flags(config: Config, given: Config) -> str:
    """The flags that turn one into the other, of the levers."""
    words = []
    for key in SAME_EDITOR:
        value = value_of(config, key)
        if value != value_of(given, key):
            shown = "none" if value is None else str(value).lower()
            words.append(f"--{key} {shown}")
    return " ".join(words)


def autos(config: Config) -> list[str]:
    """The settings that are auto and that the model has a use for."""
    used = policy_class(config.policy.model).uses
    return [
        key
        for key in PLAIN
        if value_of(config, key) == "auto"
        and (key != BRANCHES or config.policy.guidance != 1)
        and (not key.startswith("policy.") or key.partition(".")[2] in used)
    ]


def settle(
    config: Config,
    gpu: bool,
    case: Callable[[Config], Case],
    recorded: Mapping[str, Any] | None = None,
    where: str = "",
    processes: int = 1,
) -> tuple[Config, list[str]]:
    """The configuration without `auto`, and what is to be said of it, a line at most.

    gpu: whether it runs on one. case: given a configuration whose autos are at their plain values;
    asked only where an estimate is needed. recorded: settings of the run that goes on, by dotted
    name, whose values an auto takes that is among them; where: that run's device and this one's,
    in words. processes: of this run.
    """
    names = autos(config)

    def said(why: str, done: Config) -> tuple[Config, list[str]]:
        shown = (f"{n} {'none' if (v := value_of(done, n)) is None else v}" for n in names)
        return done, [f"auto: {', '.join(shown)}: {why}"]

    if recorded and names:
        values = {name: recorded[name] for name in names if name in recorded}
        names = list(values)
        config, lines = said(
            f"as recorded by the run that goes on{where}", with_values(config, values)
        )
        again = settle(config, gpu, case, processes=processes)
        return again[0], [*lines, *again[1]]
    if not names:
        return config, []
    plain = with_values(config, {name: PLAIN[name] for name in names})
    if BRANCHES in names:  # by the processes alone
        branches = settled_branches(config.policy, processes).branches
        plain = with_values(plain, {BRANCHES: branches})
    if not gpu:
        return said("the device is no GPU", plain)
    if COMPILE in names:
        on = "on" if compiles(config.policy, cuda=True) else "off"
        plain = with_values(plain, {COMPILE: on})
    if not {AGAIN, ROWS} & set(names):
        return said("the default of a GPU", plain)
    found = case(plain)
    free = {ROWS: accepted(plain, ROWS, CANDIDATES[ROWS]) or [None]} if ROWS in names else {}
    best = fastest(found, plain, free, again=AGAIN in names)
    if best is None:
        least = {AGAIN: "all", ROWS: 1}
        plain = with_values(plain, {name: least[name] for name in names if name in least})
        return said(f"what takes least; it may not fit {found.device.name}", plain)
    gib = 2**30
    return said(
        f"the fastest that fits {found.device.name} ({best.needed / gib:.1f} of "
        f"{found.device.memory / gib:.1f} GiB, {best.seconds:.0f} s an iteration, estimated)",
        best.config,
    )
