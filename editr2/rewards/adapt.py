"""Whatever a user gives as a reward, in one form: `CheckedReward`, which answers for every turn and
raises nothing; and all rewards of a run as a `Panel`.

Told apart by what there is and by the names of the parameters, never by what comes back:

| given | called as | a missing value (None) |
|---|---|---|
| an object with `judge` | `judge(items)`, all sessions at once | failed |
| keywords among `sessions`, `images`, `instructions` (TRL's manner) | by keyword, all at once |
does not apply |
| two parameters, `(session, images)` | `f(session, images)`, a session a call | failed |
| a class, or a function without parameters | made first, then as above | |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from editr2.config.plugins import process_kept
from editr2.errors import ConfigError, UserError
from editr2.rewards.answers import NOT_A_SCORE
from editr2.rewards.base import Calls, Item, Score, Scores, described, lay_out
from editr2.rewards.calling import OURS, called, parameters_of, told
from editr2.rewards.panel import CheckedReward, Form, Panel
from editr2.rewards.record import Record
from editr2.sessions import Session

OURS.add(__file__)

_DEFAULT = Calls()

RESERVED = ("reward", "success", "marginal")
"""Names that metrics use for the weighted sum of the rewards and for what follows from it."""

KEYWORDS = ("sessions", "images", "instructions")
_ACCEPTED = (
    "a function of (session, images), one with keywords among sessions, images and instructions, "
    "an object with names that is called so or has judge(items), or a class or function without "
    "parameters that makes one"
)


def score_batch(reward: object, judged: Sequence[tuple[Session, np.ndarray]], turns: int) -> Scores:
    """Scores every (session, images) pair; `turns` is the width T of the result."""
    asked = panel(reward)
    items = [Item(session, images) for session, images in judged]
    return lay_out(asked.names, [item.session for item in items], asked.judge(items), turns)


def panel(given: object, *, calls: Calls = _DEFAULT, record: Record | None = None) -> Panel:
    """A reward of any form as a panel of one; a panel as it is. Raises as `adapt` does."""
    if isinstance(given, Panel):
        return given
    return Panel([adapt(given, calls=calls)], record)


def adapt(given: object, *, title: str = "reward", calls: Calls = _DEFAULT) -> CheckedReward:
    """A reward of any form. title: what to call it in errors. calls: how often and how long it is
    asked; see `Caller`.

    Raises `ConfigError` where it is none of the forms, a class's constructor raises, or its names
    cannot be used.
    """
    if isinstance(given, CheckedReward):
        return given
    try:
        with process_kept():
            made = _made(given, title)
            return CheckedReward(made, _names(made, title), _form(made, title), calls, title)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # of its attributes: `names` may be a property
        raise ConfigError(f"{title}: {called(given)} raised {told(error)}") from error


def _made(given: Any, title: str) -> Any:
    """A class constructed, a factory called."""
    factory = callable(given) and not hasattr(given, "names") and _is_factory(parameters_of(given))
    if inspect.isclass(getattr(given, "func", given)) or (factory and not hasattr(given, "judge")):
        try:
            made = given()
        except (KeyboardInterrupt, UserError):  # one of ours says it in a line of its own
            raise
        except BaseException as error:
            raise ConfigError(f"{title}: {called(given)}() raised {told(error)}") from error
        if inspect.isclass(made) or not (callable(made) or hasattr(made, "judge")):
            raise ConfigError(
                f"{title}: {called(given)}() gave {described(made)} (accepted: {_ACCEPTED})"
            )
        return made
    if not callable(given) and not hasattr(given, "judge"):
        raise ConfigError(f"{title}: {described(given)} (accepted: {_ACCEPTED})")
    return given


def _needed(parameters: Sequence[inspect.Parameter]) -> set[str]:
    return {
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _is_factory(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether it can be called with nothing and asks for nothing to judge."""
    open_ended = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return (
        not open_ended
        and not _needed(parameters)
        and not {"session", *KEYWORDS} & {p.name for p in parameters}
    )


def _is_at_once(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether it takes whole columns by keyword, in TRL's manner."""
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kinds = {p.kind for p in parameters}
    rest_alone = kinds == {inspect.Parameter.VAR_KEYWORD}
    ours = (
        bool(named & {"sessions", "instructions"})
        or _needed(parameters) == {"images"}
        or rest_alone
    )
    return ours and _needed(parameters) <= set(KEYWORDS)


def _form(given: Any, title: str) -> Form:
    judge = getattr(given, "judge", None)
    function = judge if callable(judge) else given
    if any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
        raise ConfigError(f"{title}: {called(given)} is async (accepted: a function that is not)")
    if callable(judge):
        return Form(judge, True, NOT_A_SCORE, told=True)
    parameters = parameters_of(given)
    if _is_at_once(parameters):
        rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = [name for name in KEYWORDS if rest or name in {p.name for p in parameters}]

        def at_once(items: Sequence[Item]) -> Any:
            columns = {
                "sessions": [item.session for item in items],
                "images": [item.images for item in items],
                "instructions": [
                    [turn.instruction for turn in item.session.turns] for item in items
                ],
            }
            return given(**{name: columns[name] for name in taken})

        return Form(at_once, True, Score.not_applicable(), told=False)
    try:
        if foreign := _needed(parameters) & {
            "prompts",
            "completions",
        }:  # TRL's own columns, which there are none of
            raise TypeError(f"there are no {foreign} here")
        inspect.Signature(parameters).bind(None, None)
    except TypeError as error:
        shown = ", ".join(map(str, parameters))
        raise ConfigError(
            f"{title}: {called(given)} takes ({shown}) (accepted: {_ACCEPTED})"
        ) from error
    return Form(
        lambda items: given(items[0].session, items[0].images), False, NOT_A_SCORE, told=False
    )


def _names(given: Any, title: str) -> tuple[str, ...]:
    """Its `names`, or what a function is called as the one name."""
    if not hasattr(given, "names"):
        name = called(given).lstrip("_")
        return (name,) if name.isidentifier() and name.lower() not in RESERVED else ("score",)
    names = (given.names,) if isinstance(given.names, str) else given.names
    if (
        not isinstance(names, list | tuple)
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(f"{title}: names: {names!r} (accepted: a tuple of at least one string)")
    lower = [name.lower() for name in names]
    for name in names:
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{title}: names: {name!r} (accepted: printable and not blank)")
        if name.lower() in RESERVED or lower.count(name.lower()) > 1:
            why = (
                "names that differ in more than their case"
                if lower.count(name.lower()) > 1
                else "another name"
            )
            taken = "" if lower.count(name.lower()) > 1 else "; metrics call their own so"
            raise ConfigError(
                f"{title}: names: {name!r} in {', '.join(names)} (accepted: {why}{taken})"
            )
    return tuple(names)
