"""The ways to do one thing, made of it as PyTorch code and as an operator; and the gate and modes
that losses share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor

import editr2_kernels
from bench.frame import Graph, Provider
from bench.sizes import Size

FULL = "forward + backward"
MODES = [
    FULL,
    pytest.param("forward", marks=pytest.mark.full),
    pytest.param("backward", marks=pytest.mark.full),
]


def baselines(
    function: Callable[..., Any],
    call: Callable[[Callable[..., Any], Any], Any],
    device: str,
    label: str = "",
    random: bool = False,
    graphs: bool = True,
) -> dict[str, Provider]:
    """`function` eager and compiled; on CUDA also autotuned, and both replayed as graphs.

    call(f, inputs) runs it on one set of inputs. label: behind "eager" and "compile" in the names.
    random: torch's generator takes part, so no two calls agree.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    found: dict[str, Provider] = {
        f"eager{label}": partial(call, function),
        f"compile{label}": partial(call, compiled),
    }
    if device == "cuda":
        # Inductor's own graphs would copy every input into place first; the explicit ones below do
        # not.
        tuned = torch.compile(
            function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
        )
        found[f"compile{label}, max-autotune"] = partial(call, tuned)
        if graphs:
            found[f"eager{label}, graph"] = Graph(partial(call, function), same_bits=not random)
            found[f"compile{label}, graph"] = Graph(partial(call, compiled), same_bits=not random)
    return found


def our_backends(device: str) -> list[str]:
    """Of the operators, best first; an error where there is none."""
    status = editr2_kernels.backends()
    names = ["cpu"] if device == "cpu" else ["cuda", "triton"]
    found = [name for name in names if status[name].available]
    if not found:
        raise RuntimeError(
            "; ".join(f"backend {name!r} is not available: {status[name].reason}" for name in names)
        )
    return found


def ours(
    call: Callable[[str, Any], Any],
    device: str,
    label: str = "",
    random: bool = False,
    graphs: bool = True,
) -> dict[str, Provider]:
    """call(backend, inputs) for every backend of the device; on CUDA also replayed as a graph."""
    found: dict[str, Provider] = {}
    for backend in our_backends(device):
        found[f"editr2 {backend}{label}"] = partial(call, backend)
        if device == "cuda" and graphs:
            found[f"editr2 {backend}{label}, graph"] = Graph(
                partial(call, backend), same_bits=not random
            )
    return found


def worst(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Largest difference; fails above tolerance * the largest value, which counts as 1 where it is
    smaller."""
    error = (found.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{name} differs from eager by {error}, allowed {allowed}"
    return error


def without_waiting(device: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; on CUDA a wait of the host for the device inside of it is an error."""
    if device != "cuda":
        return call()
    call()  # kernels are compiled and loaded here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SameBits:
    """Remembers what a provider gave the first time and fails when it ever gives something else."""

    def __init__(self) -> None:
        self.first: dict[str, list[Tensor]] = {}

    def check(self, name: str, values: Iterable[Tensor]) -> None:
        values = [value.detach().clone() for value in values]
        for place, (a, b) in enumerate(
            zip(self.first.setdefault(name, values), values, strict=True)
        ):
            assert torch.equal(a, b), f"{name}: output {place} is not what it was before the timing"


def compare_loss(
    compare: Callable[..., Any],
    *,
    op: str,
    size: Size,
    mode: str,
    variant: str = "",
    inputs: Callable[[], Any],
    leaf: Callable[[Any], Tensor],
    arguments: Callable[[Any], tuple[Any, ...]],
    eager: Mapping[str, Callable[..., Tensor]],
    operator: Callable[[Tensor, Any, str], Tensor],
    read: int,
    written: int,
    flops: int,
    atol: float = 1e-6,
    label: str | None = None,
    seconds: float = 6.0,
) -> None:
    """A loss and its gradient: as operator(leaf, inputs, backend), and as PyTorch code
    eager[label](leaf, *arguments).

    The first eager one is what the gate compares with. read: bytes that a pass reads; written: of
    the gradient; flops: of one pass. The backward pass reads again what the forward pass read.
    atol: of the gradient, in its largest value.
    """

    operators = {
        backend: partial(_with_backend, operator, backend) for backend in our_backends(size.device)
    }

    def forward(function: Callable[..., Tensor], i: Any) -> Tensor:
        return (
            function(leaf(i), i)
            if function in operators.values()
            else function(leaf(i), *arguments(i))
        )

    def full(function: Callable[..., Tensor], i: Any) -> Tensor:
        return torch.autograd.grad(forward(function, i), leaf(i))[0]

    kept: dict[tuple[int, int], Tensor] = {}

    def backward(function: Callable[..., Tensor], i: Any) -> Tensor:
        key = id(function), id(i)
        if key not in kept:
            kept[key] = forward(function, i)
        return torch.autograd.grad(kept[key], leaf(i), retain_graph=True)[0]

    run, passes, moved = {
        "forward": (forward, 1, read),
        "backward": (backward, 1, read + written),
        FULL: (full, 2, 2 * read + written),
    }[mode]
    graphs = mode == FULL  # what autograd kept outside a capture cannot be used inside of it
    providers: dict[str, Provider] = {}
    for name, function in eager.items():
        providers |= baselines(function, run, size.device, name, graphs=graphs)
    providers |= ours(lambda backend, i: run(operators[backend], i), size.device, graphs=graphs)

    reference, same = next(iter(eager.values())), SameBits()

    def gate(i: Any) -> dict[str, float]:
        errors = {}
        loss, gradient = forward(reference, i).detach(), full(reference, i)
        assert gradient.any(), "no sample has a gradient: nothing would be compared"
        for backend, function in operators.items():
            name = f"editr2 {backend}"
            found = without_waiting(size.device, partial(full, function, i))
            same.check(name, (found,))
            # Sums in another order; and a gradient in bf16 is rounded once, 2^-8 of it, maybe to
            # the other side.
            worst("loss", forward(function, i).detach(), loss, 1e-5)
            near = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 1e-5
            largest = gradient.float().abs().max().item()
            torch.testing.assert_close(found, gradient, rtol=near, atol=atol * largest)
            errors |= dict.fromkeys(
                (name, f"{name}, graph"), (found.float() - gradient.float()).abs().max().item()
            )
        return errors

    with torch._functorch.config.patch(
        donated_buffer=False
    ):  # or compiled code could not be differentiated twice
        compare(
            op=op,
            mode=mode + variant,
            shape=size.shape,
            dtype=size.dtypes.name if label is None else label,
            device=size.device,
            inputs=inputs,
            providers=providers,
            gate=gate,
            bytes_moved=moved,
            flops=passes * flops,
            seconds=seconds,
        )


def _with_backend(
    operator: Callable[[Tensor, Any, str], Tensor], backend: str, leaf: Tensor, i: Any
) -> Tensor:
    return operator(leaf, i, backend)
