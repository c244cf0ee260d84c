"""Calls that do without the dispatcher: whoever watches them still sees them, and what it would
have done to a tensor is done."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import editr2_kernels

TABLE = editr2_kernels.transition_table([1.0, 0.6, 0.0], dynamics="flow-sde", noise_level=0.5)
INDEX = torch.tensor([0, 1])
SEED = torch.tensor([3, 4])


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(str(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def step(x: Tensor) -> editr2_kernels.SdeStep:
    return editr2_kernels.sde_step(x, x, TABLE, INDEX, SEED)


def loss(v: Tensor) -> Tensor:
    x = torch.ones(2, 6)
    return editr2_kernels.sde_log_prob(x, 2 * x, v, TABLE, INDEX).log_prob.sum()


def by_mode(call: Any) -> list[str]:
    with Seen() as seen:
        call()
    return seen.names


def by_profiler(call: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return [event.name for event in seen.events()]


def test_a_negated_tensor_is_read_negated() -> None:
    values = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    negated = torch._neg_view(values)
    assert negated.is_neg()
    assert torch.equal(step(negated).x_next, step(-values).x_next)


def test_a_gradient_is_that_of_the_dispatcher() -> None:
    v = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (plain,) = torch.autograd.grad(loss(v), v)
    with Seen():
        (dispatched,) = torch.autograd.grad(loss(v), v)
    assert plain.any() and torch.equal(plain, dispatched)
    with torch.no_grad():
        assert not loss(v).requires_grad


@pytest.mark.parametrize("watch", [by_mode, by_profiler])
def test_who_watches_sees_the_operators(watch: Any) -> None:
    v = torch.ones(2, 6, requires_grad=True)
    names = watch(lambda: (step(torch.ones(2, 6)), torch.autograd.grad(loss(v), v)))
    for name in ("editr2::sde_step", "editr2::sde_log_prob", "editr2::replay_backward"):
        assert any(seen.startswith(name) for seen in names), f"{name} was not seen"


def test_a_subclass_is_asked() -> None:
    Subclass.names.clear()
    step(torch.ones(2, 6).as_subclass(Subclass))
    assert any("sde_step" in name for name in Subclass.names)
