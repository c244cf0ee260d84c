"""Calls of a user's own code: what it raises, how long it may take, and what it leaves behind."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any, TypeVar

import torch

from editr2.config import plugins
from editr2.config.plugins import process_kept
from editr2.rewards import answers

T = TypeVar("T")


def called(given: Any) -> str:
    """The name of a function or a class, or of what something is an instance of."""
    given = getattr(given, "func", given)  # of a functools.partial
    return str(getattr(given, "__name__", None) or type(given).__name__)


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Of a call; `(*args)` where they cannot be told, as of a built-in function."""
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def constructor(given: Any) -> set[str]:
    """The names of what its class is made with."""
    return {p.name for p in parameters_of(type(given))}


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
        self._mine = threading.local()  # `calls`, the queue of the thread that serves this one

    def call(self, function: Callable[[], T]) -> T:
        """`function()`; raises `NoAnswerError` whatever else happens in there but Ctrl-C."""
        try:
            with process_kept() if on_main_thread() else nullcontext():
                return function() if self.timeout is None else self._within(function, self.timeout)
        except NoAnswerError:
            raise
        except BaseException as error:  # SystemExit, too: a judge does not end the run
            if isinstance(error, KeyboardInterrupt) and on_main_thread():
                raise  # Ctrl-C comes there alone; elsewhere it would end a pool's thread, unheard
            raise NoAnswerError(told(error)) from error

    def _within(self, function: Callable[[], T], timeout: float) -> T:
        answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:  # raised again below, on the caller's thread
                answer.put((None, error))

        calls = getattr(self._mine, "calls", None)
        if calls is None:
            calls = self._mine.calls = queue.SimpleQueue()
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            arguments = (_serve, calls, device)
            threading.Thread(
                target=copy_context().run, args=arguments, daemon=True, name="editr2 reward"
            ).start()
        calls.put(work)
        try:
            said, error = answer.get(timeout=timeout)
        except queue.Empty:
            self._mine.calls = None  # that thread serves nobody any more
            raise NoAnswerError(f"no answer within {timeout:g} s (reward.timeout)") from None
        if error is not None:
            raise error
        return said  # type: ignore[return-value]  # None is one of T's values here


def on_main_thread() -> bool:
    """What a thread beside the run's own put back for the whole process would be the run's."""
    return threading.current_thread() is threading.main_thread()


def _serve(calls: queue.SimpleQueue[Callable[[], None]], device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
    while True:
        calls.get()()


def told(error: BaseException) -> str:
    """As `plugins.told`, of what a judge raised."""
    return plugins.told(error, OURS)


OURS = {__file__, answers.__file__}
"""Files whose frames are not the user's; those that call into his code add themselves."""
