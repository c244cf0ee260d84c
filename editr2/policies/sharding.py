"""Frozen weights shared out over the processes: FSDP2, and the order of events that it needs.

Every process holds its part of every block and gathers the whole block from all of them while it
computes. So all of them have to run the same forwards and backwards in the same order, which walks
over unequal groups, session lengths and skipped turns do not. `Lockstep` sees to it: nobody's
numbers change, and adapters stay whole on every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from editr2.errors import ConfigError, UserError
from editr2.run.processes import PATIENCE, Processes

FORWARD, RECORDED, BACKWARD, FINISHED = 3, 2, 1, 0
"""What a process wants next: a forward without gradient, one with, the backward of all of the
latter since the last one, or nothing before all others want nothing. The largest is done first: a
backward waits for every forward."""


class Lockstep:
    """Makes all processes run the same sequence of forwards and backwards of a module.

    Before each of them the processes tell each other what they want next (one number each, on the
    host). The largest wish is carried out by all: by those whose wish it was with their own
    samples, by the others with the smallest input there is. What comes out of that takes part in
    the next backward with a gradient of zero."""

    def __init__(self, module: nn.Module, idle: Callable[[], Tensor], group: Any) -> None:
        """idle: a forward of the module with the smallest input. group: the processes, over a
        host's transport."""
        self._idle, self._group = idle, group
        self._unused: list[Tensor] = []
        self._idling = False
        module.register_forward_pre_hook(self._before_forward, prepend=True)

    def backward(self, loss: Tensor) -> None:
        self._until(BACKWARD)
        self._backward([loss])

    def finish(self) -> None:
        """Takes part until all processes are here."""
        self._until(FINISHED)

    def _before_forward(self, *_: Any) -> None:
        if not self._idling:
            self._until(RECORDED if torch.is_grad_enabled() else FORWARD)

    def _until(self, wish: int) -> None:
        while (agreed := self._agree(wish)) != wish:
            if agreed == BACKWARD:
                self._backward([])
                continue
            self._idling = True
            try:
                with torch.set_grad_enabled(agreed == RECORDED):
                    out = self._idle()
            finally:
                self._idling = False
            if agreed == RECORDED:
                self._unused.append(out)

    def _agree(self, wish: int) -> int:
        largest = torch.tensor(wish)
        try:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise UserError(
                "the other processes do not answer; the error of one that stopped stands above"
            ) from error
        return int(largest)

    def _backward(self, losses: list[Tensor]) -> None:
        unused, self._unused = self._unused, []
        torch.autograd.backward(
            [*losses, *unused], [*(None for _ in losses), *map(torch.zeros_like, unused)]
        )


def place(policy: Any, shard: bool, processes: Processes) -> None:
    """Brings a policy to the device, whole or (where there are several processes) this process's
    share of it.

    Process 0's weights count; the others' may be without data, on the meta device. Raises
    `ConfigError` for weights that are shared out already, and where those of another process have
    other shapes.
    """
    if not shard or processes.count == 1:
        policy.module.to(processes.device)
        return
    if isinstance(policy.module, FSDPModule):
        raise ConfigError(
            "policy.shard: true (accepted for weights that are not shared out yet; load them anew)"
        )
    _shard(policy.module, processes.device)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    processes.lockstep = Lockstep(policy.module, policy.idle, group)


def _shard(module: Any, device: torch.device) -> None:
    # Views that blocks return are read only here, by the next block.
    warnings.filterwarnings(
        "ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning
    )
    kinds = set(type(module)._repeated_blocks)
    blocks = [part for part in module.modules() if type(part).__name__ in kinds]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    seen: set[nn.Module] = set()
    for part in (*blocks, module):  # one after the other: the whole does not fit the device
        _spread(_own(part, seen), device)
        fully_shard(
            part,
            mesh=mesh,
            ignored_params={p for name, p in module.named_parameters() if ".lora_" in name},
        )


def _own(part: nn.Module, seen: set[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Every parameter and buffer of what was not seen before, as the dictionary that holds it and
    its name there."""
    fresh = [m for m in part.modules() if m not in seen]
    seen.update(fresh)
    return [
        (held, name)
        for m in fresh
        for held in (m._parameters, m._buffers)
        for name in held
        if held[name] is not None
    ]


def _spread(places: Sequence[tuple[dict[str, Any], str]], device: torch.device) -> None:
    """Process 0's tensors to all devices."""
    said = [[(tuple(held[name].shape), held[name].dtype) for held, name in places]]
    mine = said[0]
    dist.broadcast_object_list(said, device=device)
    if [shape for shape, _ in said[0]] != [shape for shape, _ in mine]:
        raise ConfigError(
            "policy.weights: of other shapes than process 0's (accepted: the same on all processes)"
        )
    for (held, name), (shape, dtype) in zip(places, said[0], strict=True):
        tensor = held[name]
        values = (
            tensor.data.to(device)
            if dist.get_rank() == 0
            else torch.empty(shape, dtype=dtype, device=device)
        )
        # As bytes where they are single ones: gloo knows no float8.
        dist.broadcast(values.view(torch.uint8) if values.itemsize == 1 else values, 0)
        held[name] = (
            nn.Parameter(values, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else values
        )
