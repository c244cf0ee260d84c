"""One denoising step, the policy's velocity and the sampler's move: as it is, compiled, or as a
CUDA graph.

A step waits for the device nowhere and reads its row of the transition table by an index that lives
there, so it can be recorded whole. What differs from one call to the next (latents, sigma, context,
rows, seeds) is copied into the recording's own tensors; what decides its form (shapes, dtypes,
whatever of a context is no tensor, where the weights lie) is its key. A turn's context is copied
once, for all steps behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from editr2.errors import ConfigError
from editr2.policies.base import BucketedPolicy, Policy, SizedPolicy, witness
from editr2.policies.blocks import compile_errors
from editr2_kernels import sde_step

GRAPHS = 64  # kept a policy, the latest used; more shapes than that cost more recordings


class Stepped(NamedTuple):
    """x_next [B, *latent] in the dtype of x, log_prob [B]; velocity, combined, like x_next where it
    is kept; x0, the clean prediction, like x_next where the next step reads it. witness: float32
    [B], not finite where the velocity or a branch of its guidance is not."""

    x_next: Tensor
    log_prob: Tensor
    velocity: Tensor | None
    x0: Tensor | None
    witness: Tensor

    def clone(self) -> Stepped:
        copies: Any = (None if value is None else value.clone() for value in self)
        return Stepped(*copies)


Step = Callable[..., Stepped]
"""(x [B, *latent], sigma [B], context, transition table, step_index [B], seed [B], and m_prev like
x where the table has rows of second order) -> the caller's own tensors."""


def denoising_step(
    policy: Policy,
    keep_velocity: bool,
    x: Tensor,
    sigma: Tensor,
    context: Any,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor,
    m_prev: Tensor | None = None,
) -> Stepped:
    v = policy.velocity(x, sigma, context)
    second = m_prev is not None
    step = sde_step(x, v.v, table, step_index, seed, m_prev=m_prev, return_x0=second, **v.guidance)
    branches = (v.guidance[name] for name in ("v_uncond", "v_uncond_image") if name in v.guidance)
    seen = sum((witness(branch) for branch in branches), witness(v.v))
    velocity = v.combined(sigma) if keep_velocity else None
    return Stepped(step.x_next, step.log_prob, velocity, step.x0, seen)


def check_capture(how: str, device: torch.device) -> None:
    """Raises `ConfigError` where `rollout.capture` asks for what the device cannot do."""
    if how == "graph" and device.type != "cuda":
        raise ConfigError(
            f"rollout.capture: graph (accepted on device {device}: off, compile; graphs are CUDA's)"
        )


def capture_step(
    policy: Policy, how: str, device: torch.device, keep_velocity: bool = False
) -> Step:
    """The step of one turn, as `rollout.capture` says (off, compile or graph); the weights stay
    what they are while it is used. Raises `ConfigError` for a policy or a device that cannot be
    captured."""
    check_capture(how, device)
    if how == "compile":
        return functools.partial(_compiled_step, policy, keep_velocity)
    if how == "graph":
        return GraphStep(policy, keep_velocity, _graphs(policy), _record)
    return functools.partial(denoising_step, policy, keep_velocity)


# ------------------------------------------------------------------------------------------ compile


@functools.cache
def _compiled(device_type: str) -> Callable[..., Stepped]:
    # fullgraph: whatever cannot be compiled whole, or not any more, is an error and no silent
    #     return to plain calls.
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return torch.compile(denoising_step, fullgraph=True, mode=mode)


def _compiled_step(
    policy: Policy, keep_velocity: bool, x: Tensor, sigma: Tensor, context: Any, *rest: Tensor
) -> Stepped:
    _settle(context)
    step = _compiled(x.device.type)
    try:
        if x.device.type != "cuda":
            return step(policy, keep_velocity, x, sigma, context, *rest)
        torch.compiler.cudagraph_mark_step_begin()  # what the step before returned was copied
        return step(policy, keep_velocity, x, sigma, context, *rest).clone()
    except compile_errors() as error:
        raise _refusal(
            "compile", f"this {type(policy).__name__}", "torch.compile", error
        ) from error


def _refusal(how: str, what: str, by: str, error: BaseException) -> ConfigError:
    first = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return ConfigError(f"rollout.capture: {how} (accepted for {what}: off; {by}: {first})")


# -------------------------------------------------------------------------------------------- graph

Recorder = Callable[[Callable[[], Stepped], Any], tuple[Stepped, Callable[[], None]]]
"""(what to record, the memory pool) -> (the tensors a replay writes, the replay)."""


class Graphs:
    """A policy's recordings, the latest used last, in one memory pool: only one of them runs at a
    time."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.by_key: OrderedDict[Hashable, _Recording] = OrderedDict()

    def find(self, key: Hashable, make: Callable[[], _Recording]) -> _Recording:
        if key not in self.by_key:
            while len(self.by_key) >= GRAPHS:
                self.by_key.popitem(last=False)
            self.by_key[key] = make()
        self.by_key.move_to_end(key)
        return self.by_key[key]


_OF_POLICY: WeakKeyDictionary[Any, Graphs] = WeakKeyDictionary()


def _graphs(policy: Policy) -> Graphs:
    policy = policy.whole if isinstance(policy, SizedPolicy) else policy
    return _OF_POLICY.setdefault(policy, Graphs(torch.cuda.graph_pool_handle()))


class _Recording:
    """Tensors of its own, for what goes in and what comes out, and the replay between them."""

    def __init__(
        self,
        run: Callable[..., Stepped],
        inputs: list[Tensor],
        read: list[Tensor],
        form: Hashable,
        record: Callable,
    ) -> None:
        self.inputs, self.read = [t.clone() for t in inputs], [t.clone() for t in read]
        context = _close(form, iter(self.read))
        x, sigma, *rest = self.inputs
        self.outputs, self.replay = record(lambda: run(x, sigma, context, *rest))


class GraphStep:
    """A `Step` that replays recordings, one for each shape it meets."""

    def __init__(
        self, policy: Policy, keep_velocity: bool, graphs: Graphs, record: Recorder
    ) -> None:
        self.policy, self.graphs = policy, graphs
        self.run = functools.partial(denoising_step, policy, keep_velocity)
        self.record = record
        tensors = (*policy.module.parameters(), *policy.module.buffers())
        # Images of 32 x 48 and of 48 x 32 have equally many tokens, in other places.
        size = policy.image_size if isinstance(policy, SizedPolicy) else None
        self.weights = (keep_velocity, size, *(t.data_ptr() for t in tensors))
        self.context: Any = None
        self.read: list[Tensor] = []
        self.form: Hashable = None
        self.filled: set[int] = set()  # the recordings that hold the tensors of this context

    def __call__(self, x: Tensor, sigma: Tensor, context: Any, *rest: Tensor) -> Stepped:
        if context is not self.context:
            self._look_at(context)
        inputs = [x, sigma, *rest]
        key = (self.weights, self.form, tuple((t.dtype, t.shape) for t in inputs))
        recording = self.graphs.find(key, functools.partial(self._make, inputs))
        if id(recording) not in self.filled:
            _copy(recording.read, self.read)
            self.filled.add(id(recording))
        _copy(recording.inputs, inputs)
        recording.replay()
        return recording.outputs.clone()

    def _look_at(self, context: Any) -> None:
        self.context = context
        if isinstance(self.policy, BucketedPolicy):
            context = self.policy.bucket(context)
        _settle(context)
        self.read = []
        self.form = _open(context, self.read)
        self.filled = set()

    def _make(self, inputs: list[Tensor]) -> _Recording:
        return _Recording(
            self.run, inputs, self.read, self.form, lambda run: self.record(run, self.graphs.pool)
        )


def _record(run: Callable[[], Stepped], pool: Any) -> tuple[Stepped, Callable[[], None]]:
    """Raises `ConfigError` for what runs but cannot be captured: it copies from or to the host, or
    waits."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up at their first call must not be recorded
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            outputs = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Ending a capture that broke fails in turn, and says nothing of the reason.
        raise _refusal("graph", "this policy", "CUDA", error.__context__ or error) from error
    return outputs, graph.replay


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for own, value in zip(into, values, strict=True):
        own.copy_(value)


# ------------------------------------------------------------------- contexts as tensors and a form


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _settle(value: Any) -> None:
    """Looks every cached property of a context up: what it finds out may wait for the device, which
    a recording cannot."""
    if _is_record(value):
        members = [item for cls in type(value).__mro__ for item in vars(cls).items()]
        for name in (
            name for name, member in members if isinstance(member, functools.cached_property)
        ):
            _settle(getattr(value, name))
        for f in dataclasses.fields(value):
            _settle(getattr(value, f.name))
    elif isinstance(value, dict):
        for part in value.values():
            _settle(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _settle(part)


def _open(value: Any, tensors: list[Tensor]) -> Hashable:
    """The form of a nested value, hashable; its tensors are added to `tensors` in the form's
    order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", value.dtype, value.shape)
    if _is_record(value):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | getattr(
            value, "__dict__", {}
        )
        return (
            "record",
            type(value),
            tuple((name, _open(part, tensors)) for name, part in held.items()),
        )
    if isinstance(value, dict):
        return ("dict", tuple((key, _open(part, tensors)) for key, part in value.items()))
    if isinstance(value, list | tuple):
        return ("sequence", type(value), tuple(_open(part, tensors) for part in value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return ("value", type(value), value)
    raise ConfigError(
        f"rollout.capture: graph (accepted for contexts of tensors, numbers and texts in "
        f"dataclasses, dicts, lists and tuples: off, compile; this one holds a "
        f"{type(value).__name__})"
    )


def _close(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value of a form with other tensors."""
    kind, *what = form
    if kind == "tensor":
        return next(tensors)
    if kind == "record":
        made, parts = object.__new__(what[0]), what[1]
        for name, part in parts:
            object.__setattr__(made, name, _close(part, tensors))
        return made
    if kind == "dict":
        return {key: _close(part, tensors) for key, part in what[0]}
    if kind == "sequence":
        of, parts = what[0], [_close(part, tensors) for part in what[1]]
        return of(*parts) if hasattr(of, "_fields") else of(parts)
    return what[1]
