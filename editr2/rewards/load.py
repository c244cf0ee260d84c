"""From settings to the rewards of a run."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, get_args

from editr2.config import EvalConfig, RewardConfig, RewardUse
from editr2.config.fields import Wrong, built, slots
from editr2.config.plugins import resolve
from editr2.config.rules import listed_problems, reward_problems
from editr2.errors import ConfigError
from editr2.rewards.adapt import KEYWORDS, adapt
from editr2.rewards.base import Calls
from editr2.rewards.calling import called, parameters_of
from editr2.rewards.panel import CheckedReward, Panel, naming_options
from editr2.rewards.record import Record
from editr2.rewards.table import REWARDS, WORLD


def named_reward(use: RewardUse, at: str = "reward") -> tuple[str, str]:
    """The setting that names the reward, and what it says: the world's verifiers where neither
    does."""
    if use.function is not None:
        return f"{at}.function", use.function
    return f"{at}.name", WORLD if use.name is None else use.name


def load_reward(config: RewardConfig, record: Record | None = None) -> Panel:
    """The configured rewards. A module is looked for in the working folder, too, after everything
    that is installed. record: where answers are kept and found.

    Raises `ConfigError` naming the setting, whatever goes wrong in the module or its constructor.
    """
    for problem in reward_problems(config):
        raise ConfigError(problem)
    return Panel([_loaded(at, use, record) for at, use in config.uses], record)


def load_eval_reward(config: EvalConfig, record: Record | None = None) -> Panel | None:
    """The judges of `eval.reward`, as `load_reward` loads those of training; None without any."""
    for problem in listed_problems(config.uses):
        raise ConfigError(problem)
    members = [_loaded(at, use, record) for at, use in config.uses]
    return Panel(members, record) if members else None


def _loaded(at: str, use: RewardUse, record: Record | None) -> CheckedReward:
    key, name = named_reward(use, at)
    table, what = (REWARDS, "Class") if key.endswith(".name") else ({}, "name")
    given = resolve(key, name, table, what=what)
    calls = Calls(use.concurrency, use.timeout, use.retries)
    ready = _with_options(given, use.options, f"{at}.options", calls, record)
    with naming_options(given, f"{at}.options"):
        member = adapt(ready, title=f"{key}: {name!r}", calls=calls)
    member.options_at = f"{at}.options"
    return member


def _listed(options: dict[str, Any], schema: Any) -> dict[str, Any]:
    """With `IF,CC` as the list that it is where one of names is wanted: a flag's text is split
    before anybody knows which reward's option it is."""
    lists = {n for n, slot in slots(schema).items() if get_args(slot.hint) == (str, ...)}
    return {
        name: value.split(",") if name in lists and isinstance(value, str) else value
        for name, value in options.items()
    }


def _with_options(
    given: Any, options: dict[str, Any], key: str, calls: Calls, record: Record | None
) -> Any:
    """The class or factory with its options, and with the services that its constructor has a
    parameter for: `calls` and `record`.

    A class with a dataclass `Options` takes one of these; any other, the options by keyword.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = parameters_of(given)
    known = [p.name for p in parameters if p.kind in kinds]
    services: dict[str, Any] = {"calls": calls, "record": record}
    made = inspect.isclass(given)
    extra = {name: value for name, value in services.items() if made and name in known}
    if made and hasattr(given, "Options"):
        try:
            return partial(
                given, built(_listed(options, given.Options), given.Options, key), **extra
            )
        except Wrong as wrong:
            raise ConfigError(wrong.problem) from None
    accepted = [name for name in known if name not in (*services, "session", *KEYWORDS)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if name not in accepted and not open_ended:
            said = ", ".join(accepted) or "none"
            raise ConfigError(
                f"{key}.{name}: {called(given)} has no such option (accepted: {said})"
            )
    return partial(given, **options, **extra) if options or extra else given
