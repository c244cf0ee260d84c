"""Put the operators in the place of another project's functions, and take them out again.

`patch` looks before it leaps: all seams of a project are checked, by signature and by result, before the first is
replaced. A function that other modules imported by name is replaced in them too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from numbers import Real
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editr2.errors import IntegrationError
from editr2.integrations.projects import PROJECTS, Function, Seam

NOISES = ("generator", "philox")
TOLERANCE = 1e-4
"""Of the probe. fp32 rounds log-probs of its size to 1e-5; two conventions differ by 1e-3 and more."""


class _Replaced(NamedTuple):
    owner: Any  # module or class
    name: str
    original: Function
    replacement: Function


class Patched:
    """What `patch` replaced; as a context manager it is undone at the end. replaced: the full names."""

    def __init__(self, name: str, entries: tuple[_Replaced, ...]) -> None:
        self.name = name
        self._entries = entries

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(f"{entry.original.__module__}.{entry.original.__qualname__}" for entry in self._entries)

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _ACTIVE.get(self.name) is self:
            unpatch(self.name)

    def __repr__(self) -> str:
        return f"Patched({self.name!r}: {', '.join(self.replaced)})"


_ACTIVE: dict[str, Patched] = {}


def patch(name: str, *, module: str | ModuleType | None = None, noise: str = "generator") -> Patched:
    """Replace a project's sampler step, log-prob and, where it has a place for them, advantage and NFT loss by the
    operators here.

    Args:
        name: "flow_grpo", "flow_factory", "verl_omni" or "dance_grpo" (MixGRPO too, with `module`).
        module: where the function is, if not in the project's usual module: for "dance_grpo", whose step is part of the
            train script, a module or its name ("__main__" for the script that runs).
        noise: "generator" draws what the original draws, from the caller's generator, so that seeds keep their meaning;
            "philox" draws one seed a sample from it and makes the noise inside the step, counter-based.

    Returns:
        what was replaced, which is also a context manager.

    Raises:
        IntegrationError where the project is not there, or is not one of the versions known: the signature or the
        results of a function are others. Nothing is replaced then.
    """
    if name not in PROJECTS:
        raise IntegrationError(f"patch: {name!r} (accepted: {', '.join(PROJECTS)})")
    if noise not in NOISES:
        raise IntegrationError(f"noise: {noise!r} (accepted: {', '.join(NOISES)})")
    if name in _ACTIVE:
        raise IntegrationError(f"patch: {name!r} is patched already (accepted: unpatch it first)")
    if module is not None and len(PROJECTS[name]) > 1:
        raise IntegrationError(f"module: {name!r} has seams in several modules (accepted: none)")
    entries = tuple(_prepared(seam, module or seam.module, noise) for seam in PROJECTS[name])
    for entry in entries:
        _exchange(entry.owner, entry.name, entry.original, entry.replacement)
    _ACTIVE[name] = patched = Patched(name, entries)
    return patched


def unpatch(name: str) -> None:
    """Put a project's own functions back, also into modules that imported ours by name meanwhile. Raises
    IntegrationError for a project that is not patched."""
    if name not in _ACTIVE:
        raise IntegrationError(f"unpatch: {name!r} is not patched (accepted: {', '.join(_ACTIVE) or 'nothing is'})")
    for entry in _ACTIVE.pop(name)._entries:
        _exchange(entry.owner, entry.name, entry.replacement, entry.original)


def _exchange(owner: Any, name: str, old: Function, new: Function) -> None:
    setattr(owner, name, new)
    if isinstance(owner, type):
        return
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


def _prepared(seam: Seam, where: str | ModuleType, noise: str) -> _Replaced:
    module = _module(where)
    owner, name = _found(seam, module)
    held = vars(owner)[name]
    original = held.__func__ if isinstance(held, classmethod) else held
    if not inspect.isfunction(original):
        raise IntegrationError(
            f"{module.__name__}.{name}: {type(original).__name__} (accepted: a plain function or a class method)"
        )
    signature = _signature(original)
    if signature not in seam.signatures:
        raise IntegrationError(
            f"{module.__name__}.{original.__qualname__}: takes ({signature}) after its first argument "
            f"(accepted: {' or '.join(f'({known})' for known in seam.signatures)})"
        )
    try:
        expected = list(_results(seam, original, module))
    except Exception as error:  # whatever an unknown version raises
        reasons = [f"the probe raises {type(error).__name__}: {error}".splitlines()[0]]
    else:
        reasons = []
        for convention in seam.conventions:
            reason = _difference(expected, _results(seam, _wrapped(seam, original, "generator", convention), module))
            if reason is None:
                ours: Any = _wrapped(seam, original, noise, convention)
                return _Replaced(owner, name, held, classmethod(ours) if held is not original else ours)
            reasons.append(reason)
    raise IntegrationError(
        f"{module.__name__}.{original.__qualname__}: its results are not those of a version known: {reasons[0]} "
        "(accepted: the versions in docs/integrations.md)"
    )


def _module(where: str | ModuleType) -> ModuleType:
    if isinstance(where, ModuleType):
        return where
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise IntegrationError(
            f"{where}: cannot be imported, {error} (accepted: a project that is installed)"
        ) from error


def _found(seam: Seam, module: ModuleType) -> tuple[Any, str]:
    for path in seam.paths:
        owner: Any = module
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part, None)
        if owner is not None and name in vars(owner):
            return owner, name
    raise IntegrationError(f"{module.__name__}: has no {' or '.join(seam.paths)} (accepted: a module that has)")


def _signature(function: Function) -> str:
    """Names, order, kinds and defaults after the first argument."""
    _, *parameters = inspect.signature(function).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))[1:-1]


def _wrapped(seam: Seam, original: Function, noise: str, convention: Any) -> Function:
    ours = seam.build(original, noise, convention)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        (_, first), *rest = call.arguments.items()
        result = ours(first, **dict(rest))
        return original(*args, **kwargs) if result is NotImplemented else result

    return replacement


_Result = tuple[type, list[tuple[str, Tensor | None]]]


def _results(seam: Seam, function: Function, module: ModuleType) -> Iterator[_Result]:
    """Of every call of the probe: the type of the result, its tensors and numbers by name, and the gradient of their
    squares to v."""
    for v, result in seam.probe(function, module):
        leaves = list(_leaves(result))
        tracked = [leaf for _, leaf in leaves if leaf is not None and leaf.requires_grad]
        if tracked:
            loss = torch.stack([leaf.float().square().sum() for leaf in tracked]).sum()
            leaves.append(("gradient", torch.autograd.grad(loss, v)[0]))
        yield type(result), leaves


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | None]]:
    if value is None or isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Real):
        yield name, torch.tensor(float(value), dtype=torch.float64)
    else:
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}" if name else str(key))


def _difference(expected: list[_Result], given: Iterator[_Result]) -> str | None:
    """Of the first call that differs; None where all agree."""
    for call, ((kind, theirs), (our_kind, ours)) in enumerate(zip(expected, given, strict=True)):
        names = [name for name, _ in theirs]
        if kind is not our_kind or names != [name for name, _ in ours]:
            return f"call {call} of the probe returns {kind.__name__} of {', '.join(names)}"
        for name, their, our in zip(names, (leaf for _, leaf in theirs), (leaf for _, leaf in ours), strict=True):
            what = f"output {name} of call {call} of the probe"
            if (their is None) != (our is None):
                return f"{what} is {'None' if their is None else 'not None'}"
            if their is None or our is None:
                continue
            if their.shape != our.shape or their.dtype != our.dtype:
                return f"{what} is {their.dtype} {list(their.shape)}"
            error = (their - our).abs().max().item()
            if not error <= TOLERANCE * max(1.0, their.abs().max().item()):
                return f"{what} differs by {error:.1e}"
    return None
