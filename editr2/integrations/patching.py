"""Put the operators in the place of another project's functions, and take them out again.

`patch` looks before it leaps: the seams of a project are checked one by one, by signature and by
result, and those that pass are replaced; what is refused is told with its reason. A function that
other modules imported by name is replaced in them too, so a name of one's own that was bound to it
becomes ours: `original` gives the functions as they were.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editr2.errors import IntegrationError
from editr2.integrations.projects import PROJECTS, Function, Seam
from editr2.integrations.steps import NotCovered

NOISES = ("generator", "philox")
TOLERANCE = 1e-4
"""Of the probe. fp32 rounds log-probs of its size to 1e-5; two conventions differ by 1e-3 and
more."""


class _Replaced(NamedTuple):
    full_name: str  # module.name or module.Class.name
    owner: Any  # module or class
    name: str
    original: Any  # as the owner held it: a function or a class method
    replacement: Any

    @property
    def callable(self) -> Callable[..., Any]:
        """The original as an attribute of its owner gives it."""
        return (
            self.original.__get__(None, self.owner)
            if isinstance(self.owner, type)
            else self.original
        )


class Patched:
    """What `patch` replaced; as a context manager it is undone at the end.

    replaced: the full names. originals: by full name, the functions as they were; calling one runs
    the project's own code, patched or not. refused: by full name, the reason why a seam was left as
    it is.
    """

    def __init__(
        self, name: str, entries: tuple[_Replaced, ...], refused: Mapping[str, str]
    ) -> None:
        self.name = name
        self.refused = dict(refused)
        self._entries = entries

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(entry.full_name for entry in self._entries)

    @property
    def originals(self) -> dict[str, Callable[..., Any]]:
        return {entry.full_name: entry.callable for entry in self._entries}

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _ACTIVE.get(self.name) is self:
            unpatch(self.name)

    def __repr__(self) -> str:
        refused = "".join(f"; refused {reason}" for reason in self.refused.values())
        return f"Patched({self.name!r}: {', '.join(self.replaced)}{refused})"


_ACTIVE: dict[str, Patched] = {}


def patch(
    name: str, *, module: str | ModuleType | None = None, noise: str = "generator"
) -> Patched:
    """Replace a project's sampler step, log-prob and, where it has a place for them, advantage and
    NFT loss by the operators here.

    Args:
        name: "flow_grpo", "flow_factory", "verl_omni" or "dance_grpo" (MixGRPO too, with `module`).
        module: where the function is, if not in the project's usual module: for "dance_grpo", whose
            step is part of the train script, a module or its name ("__main__" for the script that
            runs).
        noise: "generator" draws what the original draws, from the caller's generator, so that seeds
            keep their meaning; "philox" draws one seed a sample from it and makes the noise inside
            the step, counter-based.

    Returns:
        what was replaced and what was not, which is also a context manager. A seam that is not one
            of the versions
        known, by its signature or by its results, is left as it is, with one warning that says why.

    Raises:
        IntegrationError where the project is not there or cannot be imported, or where nothing of
            it could be replaced.
    """
    if name not in PROJECTS:
        raise IntegrationError(f"patch: {name!r} (accepted: {', '.join(PROJECTS)})")
    if noise not in NOISES:
        raise IntegrationError(f"noise: {noise!r} (accepted: {', '.join(NOISES)})")
    if name in _ACTIVE:
        raise IntegrationError(f"patch: {name!r} is patched already (accepted: unpatch it first)")
    if module is not None and len(PROJECTS[name]) > 1:
        raise IntegrationError(f"module: {name!r} has seams in several modules (accepted: none)")
    entries: list[_Replaced] = []
    refused: dict[str, str] = {}
    for seam in PROJECTS[name]:
        try:
            entries.append(_prepared(seam, module or seam.module, noise))
        except IntegrationError as error:
            refused[f"{getattr(module, '__name__', module) or seam.module}.{seam.paths[0]}"] = str(
                error
            )
    if not entries:
        raise IntegrationError("; ".join(dict.fromkeys(refused.values())))
    for reason in refused.values():
        warnings.warn(f"patch: {name!r} in part, {reason}", stacklevel=2)
    for entry in entries:
        _exchange(entry.owner, entry.name, entry.original, entry.replacement)
    _ACTIVE[name] = patched = Patched(name, tuple(entries), refused)
    return patched


def unpatch(name: str) -> None:
    """Put a project's own functions back, also into modules that imported ours by name meanwhile.
    Raises IntegrationError for a project that is not patched."""
    for entry in _active("unpatch", name)._entries:
        _exchange(entry.owner, entry.name, entry.replacement, entry.original)
    del _ACTIVE[name]


def original(name: str) -> dict[str, Callable[..., Any]]:
    """`originals` of a project that is patched: its own functions by full name. Raises
    IntegrationError for another."""
    return _active("original", name).originals


def _active(what: str, name: str) -> Patched:
    if name not in _ACTIVE:
        raise IntegrationError(
            f"{what}: {name!r} is not patched (accepted: {', '.join(_ACTIVE) or 'nothing is'})"
        )
    return _ACTIVE[name]


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
    owner, path = _found(seam, module)
    name, place = path.rpartition(".")[2], f"{module.__name__}.{path}"
    held = vars(owner)[name]
    original = held.__func__ if isinstance(held, classmethod) else held
    if not inspect.isfunction(original):
        raise IntegrationError(
            f"{place}: {type(original).__name__} (accepted: a plain function or a class method)"
        )
    signature = _signature(original)
    if signature not in seam.signatures:
        raise IntegrationError(
            f"{place}: takes ({signature}) after its first argument (accepted: "
            f"{' or '.join(f'({known})' for known in seam.signatures)})"
        )
    try:
        expected = list(_results(seam, original, module))
    except Exception as error:  # whatever an unknown version raises
        reasons = [f"the probe raises {type(error).__name__}: {error}".splitlines()[0]]
    else:
        reasons = []
        for convention in seam.conventions:
            reason = _difference(
                expected, _results(seam, _wrapped(seam, original, "generator", convention), module)
            )
            if reason is None:
                ours: Any = _wrapped(seam, original, noise, convention)
                return _Replaced(
                    place, owner, name, held, classmethod(ours) if held is not original else ours
                )
            reasons.append(reason)
    raise IntegrationError(
        f"{place}: its results are not those of a version known: {reasons[0]} "
        "(accepted: the versions in docs/integrations.md)"
    )


def _module(where: str | ModuleType) -> ModuleType:
    """By name, from wherever Python finds it; told apart: not installed, another version, installed
    but broken."""
    if isinstance(where, ModuleType):
        return where
    try:
        return importlib.import_module(where)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever a project does when it is imported, a script's exit too
        package, _, inner = where.partition(".")
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == package:
            why, accepted = "it is not installed", f"{package} on the import path"
        elif inner and missing is not None and f"{where}.".startswith(f"{missing}."):
            why = f"{package} is installed, but has no module {missing}"
            accepted = "the versions in docs/integrations.md"
        else:
            first = next(iter(str(error).splitlines()), "")
            why = f"it is installed, but raises {type(error).__name__}{first and f': {first}'}"
            accepted = "a project that Python can import"
        raise IntegrationError(
            f"{where}: cannot be imported, {why} (accepted: {accepted})"
        ) from error


def _found(seam: Seam, module: ModuleType) -> tuple[Any, str]:
    """The module or class that holds the function, and its path from the module."""
    for path in seam.paths:
        owner: Any = module
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part, None)
        if owner is not None and name in vars(owner):
            return owner, path
    raise IntegrationError(
        f"{module.__name__}: has no {' or '.join(seam.paths)} (accepted: a module that has)"
    )


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
        try:
            result = ours(first, **dict(rest))
        except NotCovered:
            result = NotImplemented
        return original(*args, **kwargs) if result is NotImplemented else result

    return replacement


_Result = tuple[type, list[tuple[str, Tensor | None]]]


def _results(seam: Seam, function: Function, module: ModuleType) -> Iterator[_Result]:
    """Of every call of the probe: the type of the result, its tensors and numbers by name, and the
    gradient of their squares to v."""
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
        for name, their, our in zip(
            names, (leaf for _, leaf in theirs), (leaf for _, leaf in ours), strict=True
        ):
            what = f"output {name} of call {call} of the probe"
            if (their is None) != (our is None):
                return f"{what} is {'None' if their is None else 'not None'}"
            if their is None or our is None:
                continue
            if their.shape != our.shape or their.dtype != our.dtype:
                return f"{what} is {their.dtype} {list(their.shape)}"
            if their.requires_grad != our.requires_grad:
                return f"{what} has {'a' if their.requires_grad else 'no'} gradient"
            error = (their - our).abs().max().item()
            if not error <= TOLERANCE * max(1.0, their.abs().max().item()):
                return f"{what} differs by {error:.1e}"
    return None
