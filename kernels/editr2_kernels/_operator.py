"""Registration of the operators: schema, fake and autograd, as torch.library.custom_op makes them,
at less cost a call.

custom_op's wrapper takes 25 us and its autograd walks the schema quadratically: with the 30
arguments of `grpo_loss`, half of a small call. What replaces them here are the calls they are made
of.
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
        return implementation

    return register


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
    name: str, *, setup_context: Callable[[Any, tuple, Any], None], backward: Callable[..., tuple]
) -> None:
    """Gives an operator its gradient, once, in reverse mode: a second derivative and forward mode
    raise RuntimeError. The two functions are as torch.library.register_autograd takes them."""
    overload = getattr(torch.ops.editr2, name).default

    def below(keyset: Any, arguments: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            # The last argument is the key set, so that the others keep their places.
            results = below(arguments[-1], arguments[:-1])
            setup_context(ctx, arguments[:-1], results)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            _no_tangent(name, gradients)
            with torch.no_grad():
                grads = *backward(ctx, *gradients), None
            return _once(name, grads) if torch.is_grad_enabled() else grads

    def run(keyset: Any, *arguments: Any) -> Any:
        _no_tangent(name, arguments)
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        ):
            return Function.apply(*arguments, keyset)
        return below(keyset, arguments)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)
