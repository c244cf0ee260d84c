"""Weights shared out over the processes: FSDP2, and the order of events that it needs.

Every process holds its part of every block and gathers the whole block from all of them while it
computes; where all weights train, it adds up the gradients of its part as they are made. So all of
them have to run the same forwards and backwards in the same order, which walks over unequal groups,
session lengths and skipped turns do not. `Lockstep` sees to it: nobody's numbers change, and
adapters stay whole on every process.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from editr2.errors import ConfigError
from editr2.policies.parts import copies_of, is_shared, part, whole
from editr2.policies.placing import held
from editr2.policies.rules import group_problem
from editr2.policies.weights import trainable
from editr2.run.processes import PATIENCE, Lost, Processes

FORWARD, RECORDED, BACKWARD, FINISHED = 3, 2, 1, 0
"""What a process wants next: a forward without gradient, one with, the backward of all of the
latter since the last one, or nothing before all others want nothing. The largest is done first: a
backward waits for every forward. A forward of the n-th copy of the weights is FORWARD + n."""


class Lockstep:
    """Makes all processes run the same sequence of forwards and backwards of a module.

    Before each of them the processes tell each other what they want next (one number each, on the
    host). The largest wish is carried out by all: by those whose wish it was with their own
    samples, by the others with the smallest input there is. What comes out of that takes part in
    the next backward with a gradient of zero.

    copies: other weights of the module, shared out as its own are and in the same order on all
    processes. A process exchanges them when it comes to it, so a forward of them is a wish of its
    own, for which the others hold their parts of them."""

    def __init__(self, module: nn.Module, idle: Callable[[], Tensor], group: Any) -> None:
        """idle: a forward of the module with the smallest input. group: the processes, over a
        host's transport."""
        self._module, self._idle, self._group = module, idle, group
        self._unused: list[Tensor] = []
        self._idling = False
        self.copies: list[Mapping[str, Tensor]] = []
        self._held = 0  # 0: the module's own weights, n: those of copy n
        module.register_forward_pre_hook(self._before_forward, prepend=True)

    def backward(self, loss: Tensor) -> None:
        self._until(BACKWARD)
        self._backward([loss])

    def finish(self) -> None:
        """Takes part until all processes are here."""
        self._until(FINISHED)

    @contextmanager
    def exchanged(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The module holds one of `copies` inside, and that one the module's own."""
        with self._holding(1 + [v is values for v in self.copies].index(True)):
            yield

    @contextmanager
    def _holding(self, number: int) -> Iterator[None]:
        before = self._held
        if number == before:
            yield
            return
        self._swap(before)
        self._swap(number)
        try:
            yield
        finally:
            self._swap(number)
            self._swap(before)

    @torch.no_grad()
    def _swap(self, number: int) -> None:
        """Copy `number` and what the module holds change places, tensor by tensor."""
        if number == 0:
            return
        values = self.copies[number - 1]
        for name, p in trainable(self._module).items():
            live, other = part(p), part(values[name])
            kept = live.clone()
            live.copy_(other)
            other.copy_(kept)
        self._held = 0 if self._held else number

    def _before_forward(self, *_: Any) -> None:
        if self._idling:
            return
        if not torch.is_grad_enabled():
            self._until(FORWARD + self._held)
            return
        assert not self._held, "a graph over other weights, which its backward would not find"
        self._until(RECORDED)

    def _until(self, wish: int) -> None:
        while (agreed := self._agree(wish)) != wish:
            if agreed == BACKWARD:
                self._backward([])
                continue
            self._idling = True
            try:
                with (
                    self._holding(max(0, agreed - FORWARD)),
                    torch.set_grad_enabled(agreed == RECORDED),
                ):
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
            raise Lost(
                "the other processes do not answer; the error of one that stopped stands above"
            ) from error
        return int(largest)

    def _backward(self, losses: list[Tensor]) -> None:
        unused, self._unused = self._unused, []
        with self._holding(0):
            torch.autograd.backward(
                [*losses, *unused], [*(None for _ in losses), *map(torch.zeros_like, unused)]
            )


def place(policy: Any, shard: bool, processes: Processes, group: int | None = None) -> None:
    """Brings a policy to the device, whole or (where there are several processes) this process's
    share of it.

    Process 0's weights count; the others' may be without data, on the meta device. group: how many
    processes share one copy of the weights; none is all of them. Raises `ConfigError` for weights
    that are shared out already, where those of another process have other shapes, and for a group
    that does not divide the processes.
    """
    if not shard or processes.count == 1:
        policy.module.to(processes.device)
        return
    if isinstance(policy.module, FSDPModule):
        raise ConfigError(
            "policy.shard: true (accepted for weights that are not shared out yet; load them anew)"
        )
    mesh = _mesh(processes, group)
    kinds = getattr(policy, "repeated_blocks", None) or type(policy.module)._repeated_blocks
    _shard(policy.module, processes.device, mesh, set(kinds))
    # Gradients of weights that train are added up over all processes, so all of them go in step;
    # frozen weights are gathered within a group, and adapters' gradients wait for nobody.
    trains = any(map(is_shared, trainable(policy.module).values()))
    lockstep = Lockstep(policy.module, policy.idle, _host_group(mesh, together=trains))
    processes.lockstep = vars(policy.module)["lockstep"] = lockstep
    if trains:
        # The first forward of torch 2.9 lays parts out anew where rows do not divide evenly; what
        # is stepped and exchanged has to be those.
        with torch.no_grad():
            policy.idle()


def _mesh(processes: Processes, group: int | None) -> DeviceMesh:
    """Processes that hold the same rows x processes that share one copy of the weights."""
    count, kind = processes.count, processes.device.type
    if group is None or group == count:
        return init_device_mesh(kind, (count,))
    if problem := group_problem(group, count):
        raise ConfigError(problem)
    return init_device_mesh(kind, (count // group, group), mesh_dim_names=("copy", "part"))


def _host_group(mesh: DeviceMesh, *, together: bool) -> Any:
    """This process's group over a host's transport: all processes, or those of its copy."""
    size = dist.get_world_size() if together else mesh.size(mesh.ndim - 1)
    groups = [
        dist.new_group(range(first, first + size), backend="gloo", timeout=PATIENCE)
        for first in range(0, dist.get_world_size(), size)
    ]
    return groups[dist.get_rank() // size]


def _shard(module: Any, device: torch.device, mesh: DeviceMesh, kinds: set[str]) -> None:
    """kinds: class names of the blocks that are shared out one by one; the rest is one more."""
    # Views that blocks return are read only here, by the next block.
    warnings.filterwarnings(
        "ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning
    )
    blocks = [piece for piece in module.modules() if type(piece).__name__ in kinds]
    trains = any(p.requires_grad and ".lora_" not in n for n, p in module.named_parameters())
    if trains and hasattr(module, "share_out"):
        module.share_out()
    seen: set[nn.Module] = set()
    for piece in (*blocks, module):  # one after the other: the whole does not fit the device
        _spread(_own(piece, seen), device)
        fully_shard(
            piece,
            mesh=mesh,
            # What is in no block stays whole after a forward, but not where it trains: then others'
            # values may be exchanged for it before the next.
            reshard_after_forward=True if trains else None,
            ignored_params={p for name, p in module.named_parameters() if ".lora_" in name},
        )
        if trains:  # losses are normalised over all processes, so their gradients are summed
            piece.set_gradient_divide_factor(1.0)
            piece.set_force_sum_reduction_for_comms(True)


def _own(piece: nn.Module, seen: set[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Every parameter and buffer of what was not seen before, as the dictionary that holds it and
    its name there."""
    fresh = [m for m in piece.modules() if m not in seen]
    seen.update(fresh)
    return [(owner, name) for owner, name, _ in held(fresh)]


def _spread(places: Sequence[tuple[dict[str, Any], str]], device: torch.device) -> None:
    """Process 0's tensors to all devices."""
    said = [[(tuple(owner[name].shape), owner[name].dtype) for owner, name in places]]
    mine = said[0]
    dist.broadcast_object_list(said, device=device)
    if [shape for shape, _ in said[0]] != [shape for shape, _ in mine]:
        raise ConfigError(
            "policy.weights: of other shapes than process 0's (accepted: the same on all processes)"
        )
    there, kept = dict[int, Tensor](), list[Tensor]()
    for (owner, name), (shape, dtype) in zip(places, said[0], strict=True):
        tensor = owner[name]
        if id(tensor) in there:  # tied weights stay tied
            owner[name] = there[id(tensor)]
            continue
        values = (
            tensor.data.to(device)
            if dist.get_rank() == 0
            else torch.empty(shape, dtype=dtype, device=device)
        )
        # As bytes where they are single ones: gloo knows no float8.
        dist.broadcast(values.view(torch.uint8) if values.itemsize == 1 else values, 0)
        owner[name] = there[id(tensor)] = (
            nn.Parameter(values, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else values
        )
        kept.append(tensor)  # or another may get its id


@contextmanager
def saveable(policy: Any, processes: Processes) -> Iterator[Any]:
    """The policy as it can be saved: where all of its weights train and are shared out, the first
    process has all of them on the host, tensor by tensor, so that no device ever holds the whole.
    All processes have to be here; only the first may save."""
    module = policy.module
    if not any(map(is_shared, trainable(module).values())):
        yield policy
        return
    from accelerate import init_empty_weights

    processes.lend()
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        everywhere = whole(part(tensor), tensor)
        if processes.main:
            state[name] = everywhere.cpu()
    if not processes.main:
        yield policy
        return
    kind: Any = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    with init_empty_weights(include_buffers=False):
        complete = kind.from_config(module.config)
    complete.load_state_dict(state, assign=True)
    onhost = copy.copy(policy)
    onhost.module = complete
    yield onhost


def clip(
    weights: Sequence[nn.Parameter], like: Tensor, most: float, processes: Processes
) -> Tensor:
    """Clips the gradients of the parts of weights to the norm `most` over all processes; returns
    the norm that they had. like: one of the weights, of which these are the parts."""
    own = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    squares = processes.sum(own.double().square()) / copies_of(like)
    norm = squares.sqrt().to(own.dtype)
    torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm
