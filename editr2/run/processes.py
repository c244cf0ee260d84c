"""The processes of a run: which one this is, its part of the work, and what they do together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, reduce
from torch import Tensor

from editr2.errors import UserError, one_line

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: a judge may take minutes over another's sessions, while
the default of a GPU's process group is ten."""


def open_processes() -> Processes:
    handlers = [InitProcessGroupKwargs(timeout=PATIENCE)]
    return Processes(
        Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=handlers)
    )


class Lost(UserError):
    """Another process does not answer."""


def _portable(error: UserError | OSError) -> UserError | OSError:
    """One that arrives at the others; some libraries' do not survive the way."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(one_line(error, kind=True))
    return error


def is_lost(error: Exception) -> bool:
    """Whether it says that another process could not be reached. (Gloo has no error of its own.)"""
    return isinstance(error, Lost | dist.DistError) or "gloo" in str(error)


class SharedWeights(Protocol):
    """Weights that are shared out over the processes (`editr2.policies.sharding`): nobody computes
    with them alone."""

    def backward(self, loss: Tensor) -> None:
        """Of this process's loss, while the others take theirs."""

    def finish(self) -> None:
        """Lends this process's part until every process is here."""


@dataclass
class Processes:
    """Everything that needs all processes goes through here.

    lockstep: of a policy whose weights are shared out, put here by what shared them out. A process
    that waits for the others lends them its part of the weights meanwhile.
    """

    accelerator: Accelerator
    lockstep: SharedWeights | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def main(self) -> bool:
        return self.index == 0

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        return int(self.accelerator.process_index)

    def share(self, items: int) -> slice:
        """This process's contiguous part of `items`."""
        n, i = self.count, self.index
        return slice(items * i // n, items * (i + 1) // n)

    def wait(self) -> None:
        self.lend()
        self.accelerator.wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order, on each of them."""
        self.lend()
        return list(gather_object(items))

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, on each of them; a UserError or OSError there
        is raised on all."""
        done: tuple[Any, UserError | OSError | None] = (None, None)
        if self.main:
            try:
                done = (work(), None)
            except (UserError, OSError) as error:
                done = (None, _portable(error))
        value, problem = self.gather([done])[0]
        if problem is not None:
            raise problem
        return value

    def sum(self, values: Tensor) -> Tensor:
        """Over processes."""
        self.lend()
        return reduce(values, "sum") if self.count > 1 else values

    def first(self, found: str | None) -> str | None:
        """What the first process that found anything found, on each of them."""
        return next((text for text in self.gather([found]) if text is not None), None)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's loss to its parameters'."""
        if self.lockstep is None:
            loss.backward()
        else:
            self.lockstep.backward(loss)

    def lend(self) -> None:
        """Before work without the policy that takes a while: lends this process's part of the
        weights until all processes are here. Returns at once where weights are whole."""
        if self.lockstep is not None:
            self.lockstep.finish()
