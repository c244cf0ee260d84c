"""What a piece of PyTorch costs, counted operation by operation while it runs on tensors without
data.

Inside `simulated()` (`editr2.policies.blueprint`) every tensor is fake: shapes, dtypes and
lifetimes are real, storage is not, so a forward and backward pass of a 20 B model takes a second of
one core. `Meter` sees each operation that reaches a kernel and counts its floating-point operations
(matrix products, attention, convolutions), the bytes it reads and writes, and the memory alive.
Nothing about an architecture is written down here: what is counted is the code that will run,
adapters and gradient checkpointing included.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

import editr2_kernels  # noqa: F401  # registers the operators

_aten, _ours = torch.ops.aten, torch.ops.editr2
# torch asks it of every argument of every operation: two calls in three.
_DEVICE = torch.ops.prim.device.default


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the CPU's fused attention, from shapes; torch's registry does not know it."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def scoring_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of ids' log-probs from hidden states [M, H], whose logits nobody holds: one product."""
    return 2 * hidden[0] * hidden[1] * weight[0]


def scoring_backward_flops(hidden: Any, weight: Any, *given: Any, **__: Any) -> int:
    """The logits again, and one product for each gradient that is wanted."""
    want_hidden, want_weight = given[7:9]
    return (1 + want_hidden + want_weight) * scoring_flops(hidden, weight)


SCORING = {
    _ours.hidden_token_log_prob: scoring_flops,
    _ours.hidden_token_log_prob_backward: scoring_backward_flops,
}

# Fake tensors live on the CPU. Its fused attention keeps for backward what a GPU's keeps (the
# output and one number a query), so memory is a GPU's, too.
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
_FLOPS = {
    **flop_registry,
    **{op: shape_wrapper(count) for op, count in (CPU_ATTENTION | SCORING).items()},
}


@dataclass(frozen=True)
class Speed:
    """A device as the model of time sees it.

    flops: multiply-adds count 2, a second, in matrix products of each dtype that occurs. bandwidth:
    bytes a second of everything else. launch: seconds that starting one operation takes. overlaps:
    operations start while earlier ones run (a GPU), so the slower of the two decides; else they add
    up.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float
    launch: float
    overlaps: bool


@dataclass(frozen=True)
class Cost:
    """Of one piece: flops by dtype; bytes moved by operations without flops; moved_dense: by those
    with; operations; peak: bytes alive at once of what the piece allocates; kept: bytes of it that
    are still alive at its end. fused_bytes, fused_operations: bytes and operations, were what lies
    between two operations with flops one kernel each, as Inductor makes them."""

    flops: dict[torch.dtype, int]
    bytes: int
    moved_dense: int
    operations: int
    peak: int
    kept: int
    fused_bytes: int = 0
    fused_operations: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def seconds(self, speed: Speed, fused: bool = False) -> float:
        """Matrix products at the device's rate (or as fast as their operands arrive), the rest at
        its bandwidth."""
        moved = self.fused_bytes if fused else self.bytes
        dense = sum(n / speed.flops[dtype] for dtype, n in self.flops.items())
        device = max(dense, self.moved_dense / speed.bandwidth) + moved / speed.bandwidth
        host = (self.fused_operations if fused else self.operations) * speed.launch
        return max(device, host) if speed.overlaps else device + host


def at_depth(measured: Sequence[Any], by: Sequence[int]) -> Any:
    """What a deep model costs, from shallow ones: every cost is linear in the number of equal
    blocks.

    measured: pytrees of numbers, of one shape: of the shallow model, then of that model with one
    more block of each kind. by: how many blocks of each kind the deep one has more than the shallow
    one.
    """

    def line(base: float, *more: float) -> int:
        return round(base + sum(n * (value - base) for n, value in zip(by, more, strict=True)))

    return tree_map(line, *measured)


class Meter(TorchDispatchMode):
    """Counts what runs inside; `cost` afterwards. Memory of tensors made before does not count.

    Fused, what a kernel reads counts once, and what it makes costs nothing until something outside
    of it asks for it (an operation with flops, a later kernel, the backward pass), which is when it
    is written. Memory is that of plain calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fused = _Fused()
        self._flops: dict[torch.dtype, int] = {}
        self._bytes = self._dense = self._operations = 0
        self._live: dict[int, Any] = {}
        self._now = self._peak = 0

    @property
    def cost(self) -> Cost:
        return Cost(
            dict(self._flops),
            self._bytes,
            self._dense,
            self._operations,
            self._peak,
            self._now,
            self._fused.bytes,
            self._fused.operations,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return func(*args)
        kwargs = kwargs or {}
        given = _storages(*args, *kwargs.values())
        out = func(*args, **kwargs)
        made = _storages(out)
        for key, storage in made.items():
            if key not in given and key not in self._live:
                self._adopt(key, storage)
        if (
            not made
            or _is_view(func)
            or (made.keys() <= given.keys() and not func._schema.is_mutable)
        ):
            return out  # a question, a view, or a copy that was none
        count = _FLOPS.get(func._overloadpacket)
        self._operations += 1
        self._fused.met(given, made, dense=count is not None)
        moved = sum(s.nbytes() for s in (given | made).values())
        if count is None:
            self._bytes += moved
        else:
            dtype = next(x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self._flops[dtype] = self._flops.get(dtype, 0) + int(
                count(*args, **kwargs, out_val=out)
            )
            self._dense += moved
        return out

    def _adopt(self, key: int, storage: Any) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self._now -= size
            self._live.pop(key, None)
            self._fused.forget(key)

        self._live[key] = weakref.ref(storage, freed)
        self._now += size
        self._peak = max(self._peak, self._now)


class _Fused:
    """Kernels between operations with flops, numbered. pending: what a kernel has made and nobody
    outside of it has asked for, by the kernel's number. read: what the present one has read. bytes:
    that all of them move; operations: they and those with flops."""

    def __init__(self) -> None:
        self.bytes = self.operations = self.kernel = 0
        self.started = False
        self.pending: dict[int, int] = {}
        self.read: set[int] = set()

    def met(self, given: Any, made: Any, *, dense: bool) -> None:
        """An operation; dense: with flops, whose own bytes are counted elsewhere."""
        if dense:
            self.bytes += sum(s.nbytes() for key, s in given.items() if self._asked(key))
            self.operations += 1
            self.kernel, self.started = self.kernel + 1, False
            self.read.clear()
            return
        for key, s in given.items():
            if self.pending.get(key) == self.kernel or key in self.read:
                continue
            self.bytes += s.nbytes() * (2 if self._asked(key) else 1)
            self.read.add(key)
        for key, s in made.items():
            if key not in given:
                self.pending[key] = self.kernel
            elif key not in self.pending:  # written in place
                self.bytes += s.nbytes()
        self.operations += not self.started
        self.started = True

    def _asked(self, key: int) -> bool:
        """Whether it has to be written now."""
        return self.pending.pop(key, None) is not None

    def forget(self, key: int) -> None:
        self.pending.pop(key, None)
        self.read.discard(key)


@functools.cache
def _is_view(func: Any) -> bool:
    return bool(func.is_view)


def _storages(*values: Any) -> dict[int, Any]:
    """By address, of tensors and of those in lists; arguments nest no deeper."""
    found = {}
    for x in values:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            found[storage._cdata] = storage
        elif isinstance(x, (tuple, list)):
            found |= _storages(*x)
    return found
