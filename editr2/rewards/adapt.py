"""Whatever a user gives as a reward, in one form: `CheckedReward`, which answers for every turn and
raises nothing.

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

import copy
import inspect
import queue
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np
import torch

from editr2.config import plugins
from editr2.config.plugins import process_kept
from editr2.errors import ConfigError
from editr2.rewards import answers
from editr2.rewards.answers import (
    NOT_A_SCORE,
    TurnScores,
    batch_scores,
    failed_turns,
    session_scores,
)
from editr2.rewards.base import Item, Score, Scores, described, lay_out
from editr2.sessions import Session

T = TypeVar("T")

RESERVED = ("reward", "success", "marginal")
"""Names that metrics use for the weighted sum of the rewards and for what follows from it."""

_KEYWORDS = ("sessions", "images", "instructions")
_ACCEPTED = (
    "a function of (session, images), one with keywords among sessions, images and instructions, "
    "an object with names that is called so or has judge(items), or a class or function without "
    "parameters that makes one"
)


class CheckedReward:
    """A reward as the trainer asks it: `judge` answers for every turn of every session and lets
    nothing through but Ctrl-C. names: of the rewards. given: what the user's own function or object
    is. answered: whether it ever gave a score (or said that it does not apply)."""

    def __init__(
        self,
        given: object,
        names: tuple[str, ...],
        rows: Callable[[Sequence[Item]], list[list[TurnScores]]],
        together: bool,
        caller: Caller,
    ) -> None:
        self.given, self.names, self.answered = given, names, False
        self._rows, self._together, self._caller = rows, together, caller

    def judge(self, items: Sequence[Item]) -> list[list[TurnScores]]:
        """A row a turn for every item, of a `Score` for each name."""
        items = [Item(_apart(item.session), item.images) for item in items]
        calls = [items] if self._together else [[item] for item in items]
        said = [rows for call in calls if call for rows in self._call(call)]
        self.answered |= any(
            not all(score.failed for score in row.values()) for rows in said for row in rows
        )
        return said

    def _call(self, items: Sequence[Item]) -> list[list[TurnScores]]:
        turns = [
            len(item.session.turns) for item in items
        ]  # before the reward had them in its hands
        try:
            return self._caller.call(lambda: self._rows(items))
        except NoAnswerError as error:
            return [failed_turns(str(error), n, self.names) for n in turns]


def score_batch(reward: object, judged: Sequence[tuple[Session, np.ndarray]], turns: int) -> Scores:
    """Scores every (session, images) pair; `turns` is the width T of the result."""
    asked = adapt(reward)
    items = [Item(session, images) for session, images in judged]
    return lay_out(asked.names, [item.session for item in items], asked.judge(items), turns)


def _apart(session: Session) -> Session:
    """The same session, whose pixels and `meta` may be written into: what is edited next does not
    depend on a judge."""
    turns = []
    for turn in session.turns:
        turns.append(copy.copy(turn))
        vars(turns[-1])["meta"] = _containers(turn.meta)
    mine = copy.copy(session)
    vars(mine).update(
        image=lambda: session.image.copy(), turns=tuple(turns), meta=_containers(session.meta)
    )
    return mine


def _containers(value: Any) -> Any:
    """Dicts and lists of JSON anew; what is in them is shared."""
    if type(value) is dict:
        return {key: _containers(item) for key, item in value.items()}
    return [_containers(item) for item in value] if type(value) is list else value


def adapt(given: object, *, title: str = "reward", timeout: float | None = None) -> CheckedReward:
    """A reward of any form. title: what to call it in errors. timeout: seconds a call; see
    `Caller`.

    Raises `ConfigError` where it is none of the forms, a class's constructor raises, or its names
    cannot be used.
    """
    if isinstance(given, CheckedReward):
        return given
    try:
        with process_kept():
            made = _made(given, title)
            function, together, none = _form(made, title)
            names = _names(made, title)
    except (KeyboardInterrupt, ConfigError):
        raise
    except BaseException as error:  # of its attributes: `names` may be a property
        raise ConfigError(f"{title}: {called(given)} raised {told(error)}") from error

    def rows(items: Sequence[Item]) -> list[list[TurnScores]]:
        said, turns = function(items), [len(item.session.turns) for item in items]
        if together:
            return batch_scores(said, turns, names, none)
        return [session_scores(said, turns[0], names, none)]

    return CheckedReward(made, names, rows, together, Caller(timeout))


def _made(given: Any, title: str) -> Any:
    """A class constructed, a factory called."""
    factory = callable(given) and not hasattr(given, "names") and _is_factory(_parameters(given))
    if inspect.isclass(given) or (factory and not hasattr(given, "judge")):
        try:
            made = given()
        except KeyboardInterrupt:
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


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Of a call; `(*args)` where they cannot be told, as of a built-in function."""
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


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
        and not {"session", *_KEYWORDS} & {p.name for p in parameters}
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
    return ours and _needed(parameters) <= set(_KEYWORDS)


def _form(given: Any, title: str) -> tuple[Callable[[Sequence[Item]], Any], bool, Score]:
    """How it is asked: by a function of items, whether about all of them at once, and what None
    means in its answer."""
    judge = getattr(given, "judge", None)
    function = judge if callable(judge) else given
    if any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
        raise ConfigError(f"{title}: {called(given)} is async (accepted: a function that is not)")
    if callable(judge):
        return judge, True, NOT_A_SCORE
    parameters = _parameters(given)
    if _is_at_once(parameters):
        rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = [name for name in _KEYWORDS if rest or name in {p.name for p in parameters}]

        def at_once(items: Sequence[Item]) -> Any:
            columns = {
                "sessions": [item.session for item in items],
                "images": [item.images for item in items],
                "instructions": [
                    [turn.instruction for turn in item.session.turns] for item in items
                ],
            }
            return given(**{name: columns[name] for name in taken})

        return at_once, True, Score.not_applicable()
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
    return lambda items: given(*items[0]), False, NOT_A_SCORE


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


def called(given: Any) -> str:
    """The name of a function or a class, or of what something is an instance of."""
    given = getattr(given, "func", given)  # of a functools.partial
    return str(getattr(given, "__name__", None) or type(given).__name__)


class NoAnswerError(Exception):
    """A call that raised, or took too long; the message says so in one line."""


class Caller:
    """Calls a user's function. timeout: seconds a call, None for no limit.

    With a limit, calls run on a thread of their own (with this thread's CUDA device), which the
    next call uses again. A call that takes longer is left behind on its thread, which nothing can
    stop: it ends when the call does or with the process, keeps what it holds until then, and may
    overlap with later calls.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._calls: queue.SimpleQueue[Callable[[], None]] | None = None

    def call(self, function: Callable[[], T]) -> T:
        """`function()`; raises `NoAnswerError` whatever else happens in there but Ctrl-C."""
        try:
            with process_kept():
                return function() if self.timeout is None else self._within(function, self.timeout)
        except (KeyboardInterrupt, NoAnswerError):
            raise
        except BaseException as error:  # SystemExit, too: a judge does not end the run
            raise NoAnswerError(told(error)) from error

    def _within(self, function: Callable[[], T], timeout: float) -> T:
        answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:  # raised again below, on the caller's thread
                answer.put((None, error))

        if self._calls is None:
            self._calls = queue.SimpleQueue()
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            arguments = (_serve, self._calls, device)
            threading.Thread(
                target=copy_context().run, args=arguments, daemon=True, name="editr2 reward"
            ).start()
        self._calls.put(work)
        try:
            said, error = answer.get(timeout=timeout)
        except queue.Empty:
            self._calls = None  # the thread serves nobody any more
            raise NoAnswerError(f"no answer within {timeout:g} s (reward.timeout)") from None
        if error is not None:
            raise error
        return said  # type: ignore[return-value]  # None is one of T's values here


def _serve(calls: queue.SimpleQueue[Callable[[], None]], device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
    while True:
        calls.get()()


def told(error: BaseException) -> str:
    """As `plugins.told`, of what a judge raised."""
    return plugins.told(error, _OURS)


_OURS = {__file__, answers.__file__}
