"""SIGTERM, SIGHUP and Ctrl-C: what is done is saved, and the user is told how to go on.

A process that is alone gives an iteration or an evaluation up at once while nothing of it has
changed the weights, and finishes it afterwards. Several processes finish the iteration and then
agree, since a signal reaches them at different moments. A second Ctrl-C stops at once, a third
without cleaning up.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from editr2.run.processes import Lost, Processes, is_lost

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
"""SIGHUP: the terminal was closed; under nohup it is ignored, and stays so."""


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal; the message says where, what is saved and how to go on.

    A KeyboardInterrupt, so that nothing that means to catch errors catches it. signum: the signal;
    a process ends with 128 + signum. at_once: nothing was saved any more.
    """

    def __init__(self, signum: int, message: str = "", *, at_once: bool = False) -> None:
        super().__init__(message)
        self.signum = signum
        self.at_once = at_once


class Stop:
    """Inside of its `with` block a signal is a wish to stop.

    Signals that the program handles itself (any handler but Python's own), or ignores, stay with
    it; so do all of them outside of the main thread.

    processes: those of the run. saved: says what stands on the disk, for who stops at once.
    """

    def __init__(self, processes: Processes, saved: Callable[[], str]) -> None:
        self.signum: int | None = None
        self._processes = processes
        self._saved = saved
        self._may_raise = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for signum in NAMES:
                usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
                if signal.getsignal(signum) is usual:
                    self._earlier[signum] = signal.signal(signum, self._heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._may_raise = False
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def give_up(self) -> None:
        """From here on a signal raises Stopped at once, if this process is alone: nothing done
        since has to be kept."""
        if self._processes.count == 1:
            self._may_raise = True
            self._raise()

    def finish(self) -> None:
        """From here on what was begun is finished."""
        if self._may_raise:
            self._raise()
        self._may_raise = False

    def agree(self) -> None:
        """Raises Stopped on all processes if one of them was told to stop."""
        wishes = [wish for wish in self._processes.gather([self.signum]) if wish is not None]
        if wishes:
            raise Stopped(wishes[0])

    def _raise(self) -> None:
        if (
            self.signum is not None
        ):  # also one that arrived where an exception cannot pass, as in a destructor
            self._may_raise = False
            raise Stopped(self.signum)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise Stopped(self.signum, f"stopped at once; {self._saved()}", at_once=True)
        first, self.signum = self.signum is None, self.signum or signum
        if first and not self._may_raise and self._processes.main:
            self._say(
                f"{NAMES[signal.Signals(signum)]}: stopping when this step is done (Ctrl-C: at "
                f"once)"
            )
        if first and self._may_raise:
            self._raise()

    @staticmethod
    def _say(text: str) -> None:
        # A handler runs between any two instructions, perhaps inside of a print.
        with suppress(OSError):  # a terminal that went away
            os.write(2, f"\n{text}\n".encode())


@contextmanager
def ending_told(save: Callable[[], None], standing: Callable[[], str]) -> Iterator[None]:
    """Around a run: one that a signal stops saves what is done, unless it is to stop at once, and
    says where it stands; so does one that has lost another process, as `Lost`.

    standing: what is on the disk, and how to go on.
    """
    try:
        yield
    except Stopped as stopped:
        if stopped.at_once:
            raise
        save()
        name = NAMES[signal.Signals(stopped.signum)]
        raise Stopped(stopped.signum, f"stopped by {name}; {standing()}") from None
    except (RuntimeError, Lost) as error:
        if not is_lost(error):
            raise
        raise Lost(
            f"another process does not answer (an error of its own stands above, unless it "
            f"was killed); {standing()}"
        ) from error
