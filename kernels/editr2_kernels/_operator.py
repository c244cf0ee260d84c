"""Registration of the operators: schema, fake and autograd, as torch.library.custom_op makes them,
at less cost a call.

custom_op's wrapper takes 25 us and its autograd walks the schema quadratically: with the 30
arguments of `grpo_loss`, half of a small call. What replaces them here are the calls they are made
of; and where the dispatcher would have nothing to do but to come back here, it is not asked
(`_direct`), for boxing 30 arguments is most of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("editr2", "FRAGMENT")


def operator(
    name: str, schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as `torch.ops.editr2.<name>`, for every device.

    schema: the arguments, without defaults, and the results; it mutates nothing. The results may
        not be, or share memory with, an argument.
    fake: the results' shapes, from the same arguments.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"editr2::{name}", fake, lib=LIBRARY)
        overload = getattr(torch.ops.editr2, name).default

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return overload(*arguments)
            wanted = _direct(arguments)
            if wanted is None or (wanted and name not in _ATTACH):
                return overload(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                results = implementation(*arguments)
            return _ATTACH[name](arguments, results, wanted) if wanted else results

        return call

    return register


_ATTACH: dict[str, Callable[..., Any]] = {}  # by operator that has one, its gradient
_PLAIN = (Tensor, torch.nn.Parameter)
_OTHERS = (type(None), int, float, str, bool, list, torch.dtype)
_NOBODY = torch._C._dispatch_tls_local_include_set().raw_repr()  # no mode of this thread


def _direct(arguments: Sequence[Any]) -> list[int] | None:
    """Which arguments a gradient is wanted of, in a call that needs no dispatcher; None where one
    does: with modes and transforms (fake tensors, tracing, functorch), forward mode, a profiler,
    tensors that are subclasses, or that hold their values negated."""
    if (
        forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._dispatch_tls_local_include_set().raw_repr() != _NOBODY
    ):
        return None
    wanted = []
    for place, value in enumerate(arguments):
        kind = type(value)
        if kind in _OTHERS:
            continue
        if kind in _PLAIN:
            if value.is_neg():
                return None
            if value.requires_grad:
                wanted.append(place)
        elif isinstance(value, Tensor):
            return None
    return wanted if torch.is_grad_enabled() else []


def _once(name: str, gradients: tuple) -> tuple:
    """The gradients of a backward that is being recorded, so made that differentiating them raises
    RuntimeError.

    As torch.autograd.function.once_differentiable, which looks at the incoming gradient alone: it
    would let the second derivative to what the operator saved pass for 0.
    """
    message = f"editr2::{name} can be differentiated once only"
    refuse: Callable[..., tuple] = torch._C._functions.DelayedError(
        message.encode(), len(gradients)
    )
    return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))


def _no_tangent(name: str, values: Sequence[Any]) -> None:
    """RuntimeError in forward mode, where what the kernels compute would pass for a constant, its
    derivative for 0."""
    if forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    ):
        raise RuntimeError(
            f"editr2::{name} has no forward-mode derivative (jvp, jacfwd); use reverse mode "
            "(backward, autograd.grad), or the operator's *_ref, which has both"
        )


def differentiable(
    name: str,
    *,
    setup_context: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple],
    results: int,
) -> None:
    """Gives an operator its gradient, once, in reverse mode: a second derivative and forward mode
    raise RuntimeError.

    setup_context, backward: as torch.library.register_autograd takes them, but that `ctx.wanted`,
        the places of the arguments that need a gradient, stands for needs_input_grad.
    results: so many, from the first, have a gradient.
    """
    overload = getattr(torch.ops.editr2, name).default

    def below(keyset: Any, arguments: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def gradients_of(ctx: Any, gradients: tuple) -> tuple:
        _no_tangent(name, gradients)
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            grads = backward(ctx, *gradients)
        return _once(name, grads)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            # The last argument is the key set, so that the others keep their places.
            outputs = below(arguments[-1], arguments[:-1])
            setup_context(ctx, arguments[:-1], outputs)
            ctx.wanted = [place for place, needed in enumerate(ctx.needs_input_grad) if needed]
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            return *gradients_of(ctx, gradients), None

    def run(keyset: Any, *arguments: Any) -> Any:
        _no_tangent(name, arguments)
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        ):
            return Function.apply(*arguments, keyset)
        return below(keyset, arguments)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)

    class Attach(torch.autograd.Function):
        """The same for results that are there: only what has a gradient goes through autograd,
        which looks at every argument and result it is given."""

        @staticmethod
        def forward(ctx: Any, call: tuple, *leaves: Tensor) -> Any:
            arguments, outputs, ctx.wanted = call
            setup_context(ctx, arguments, outputs)
            ctx.rest = (None,) * (len(outputs) - results)
            return outputs[:results]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            given = gradients_of(ctx, gradients + ctx.rest)
            return None, *(given[place] for place in ctx.wanted)

    # Function.apply would look for transforms, which `_direct` has ruled out, at every argument.
    apply = super(torch.autograd.Function, Attach).apply

    def attach(arguments: tuple, outputs: tuple, wanted: Sequence[int]) -> tuple:
        call = arguments, outputs, wanted
        kept = apply(call, *(arguments[place] for place in wanted))
        return *kept, *outputs[results:]

    _ATTACH[name] = attach
