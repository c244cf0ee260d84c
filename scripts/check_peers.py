"""Check the drop-ins of `editr2.integrations` against checkouts of the projects they are for. It
runs their code.

    python scripts/check_peers.py ../flow_grpo ../Flow-Factory ...

A checkout is recognised by the modules it has. Its packages are entered without their `__init__`,
and what cannot be imported, installed or not, is stood in for by empty names, so that the few
functions concerned are there without the rest. Each seam is then patched as `patch` does it, and a
grid of calls is made before, during and after: results, gradients, errors and the state of the
generators must agree. Prints the table that docs/integrations.md has; exits with 1 if something
differs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import itertools
import math
import subprocess
import sys
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import editr2.integrations as integrations
from editr2.errors import IntegrationError
from editr2.integrations.patching import TOLERANCE, _leaves
from editr2.integrations.projects import PROJECTS, Function, Seam
from editr2.integrations.steps import NotCovered

# A checkout, importable


class _Meta(ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(name)

    def __call__(cls, *given: Any, **named: Any) -> Any:
        if (
            len(given) == 1 and callable(given[0]) and not named
        ):  # a decorator leaves what it decorates
            return given[0]
        return super().__call__()


def absent(name: str) -> type:
    """Stands in for a name of a library that is not installed: a base class, a decorator, an
    annotation."""

    def __call__(self: Any, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else absent(name)

    return _Meta(
        name, (), {"__call__": __call__, "__class_getitem__": classmethod(lambda cls, item: cls)}
    )


def _empty(module: ModuleType) -> None:
    """Makes every name that is asked for exist."""
    made: dict[str, type] = {}

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return made.setdefault(name, absent(name))

    vars(module)["__getattr__"] = __getattr__


class _Empty(Loader):
    """Of a package: with its folder, if it has one here, without its `__init__`."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = [str(self.folder)] if self.folder else []
        return module

    def exec_module(self, module: ModuleType) -> None:
        _empty(module)


class _Whole(SourceFileLoader):
    """Of a module that the one of a seam imports: what it got to, and empty names where it ended in
    an error."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except (Exception, SystemExit):
            _empty(module)


class Sandbox:
    """Within, some modules of a checkout can be imported; what they brought is gone again at the
    end."""

    def __init__(self, root: Path, modules: Collection[str]) -> None:
        self._own = _Own(root, modules)
        self._finders = (self._own, _Missing(root))

    def __enter__(self) -> Sandbox:
        names = [name for name in sys.modules if name.partition(".")[0] in self._own.packages]
        self._hidden = {name: sys.modules.pop(name) for name in names}
        sys.meta_path.insert(0, self._finders[0])
        sys.meta_path.append(self._finders[1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for finder in self._finders:
            sys.meta_path.remove(finder)
            for name in finder.found:
                sys.modules.pop(name, None)
        sys.modules.update(self._hidden)


class _Finder(MetaPathFinder):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: list[str] = []

    @abstractmethod
    def spec(self, name: str) -> ModuleSpec | None:
        """Where a module's code is, None where it is none of ours."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = self.spec(name)
        if spec is not None:
            self.found.append(name)
        return spec


class _Own(_Finder):
    """The modules of the checkout, before all others of that name; of `modules` an error is an
    error."""

    def __init__(self, root: Path, modules: Collection[str]) -> None:
        super().__init__(root)
        self.modules = modules
        self.packages = {name.partition(".")[0] for name in modules}

    def spec(self, name: str) -> ModuleSpec | None:
        for folder in (
            (self.root, self.root / "src") if name.partition(".")[0] in self.packages else ()
        ):
            place = folder.joinpath(*name.split("."))
            file = place.with_suffix(".py")
            if file.is_file():
                loader = (SourceFileLoader if name in self.modules else _Whole)(name, str(file))
                return importlib.util.spec_from_file_location(name, file, loader=loader)
            if place.is_dir():
                return ModuleSpec(name, _Empty(place), is_package=True)
        return None


class _Missing(_Finder):
    """After all others: what a file of the checkout imports in vain."""

    def spec(self, name: str) -> ModuleSpec | None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        importer = frame.f_code.co_filename if frame else ""
        # A library that tries an import to see whether it works must still see that it does not.
        return (
            ModuleSpec(name, _Empty(None), is_package=True)
            if importer.startswith(f"{self.root}/")
            else None
        )


class Found(NamedTuple):
    """A project in a checkout: its name for `patch`, and the module that has its function where
    that is a choice."""

    name: str
    module: str | None


def recognised(root: Path) -> list[Found]:
    """By the modules of the seams; a project whose step is part of its scripts by every script that
    defines it."""
    found = []
    for name, seams in PROJECTS.items():
        if len({seam.module for seam in seams}) == 1 and "." not in seams[0].paths[0]:
            package = seams[0].module.partition(".")[0]
            for file in sorted((root / package).rglob("*.py")):
                if set(seams[0].paths) & _defined(file):
                    found.append(
                        Found(name, ".".join(file.relative_to(root).with_suffix("").parts))
                    )
        elif any(
            (root / top / f"{seam.module.replace('.', '/')}.py").is_file()
            for seam in seams
            for top in ("", "src")
        ):
            found.append(Found(name, None))
    return found


def _defined(file: Path) -> set[str]:
    text = file.read_text(errors="replace")
    if "_step" not in text:
        return set()
    with contextlib.suppress(SyntaxError):  # a template, or Python 2
        return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return set()


def commit_of(root: Path) -> tuple[str, str]:
    """Its commit and date; dashes for a folder that is no checkout."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%h %cs"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # without git
        return "-", "-"
    commit, _, date = done.stdout.strip().partition(" ")
    return (commit, date) if done.returncode == 0 and date else ("-", "-")


# Grids of calls

Call = Callable[[], tuple[Tensor | None, Any, list[torch.Generator]]]
"""Returns the velocity, the result, and the generators it drew from. The same at every call."""


def generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, v with gradient, x_next."""
    x, v, change = torch.randn(3, *shape, generator=generator(1))
    return x, v.to(dtype).requires_grad_(), x + 0.1 * change


def scheduled(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device="cpu")
    return scheduler


def drawing(
    how: str, x_next: Tensor, name: str = "prev_sample"
) -> tuple[dict[str, Any], list[torch.Generator]]:
    """The arguments that a sample is "given" by, or drawn by: from "one" generator, or a "list" of
    one a sample."""
    if how == "given":
        return {name: x_next}, []
    sources = [generator(seed) for seed in range(len(x_next) if how == "list" else 1)]
    return {"generator": sources if how == "list" else sources[0]}, sources


def product(*choices: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    return itertools.product(*choices)


SHAPES = ((3, 4, 6, 6), (3, 10, 8), (1, 5, 7), (2, 4, 2, 3, 5))
HOWS = ("given", "one", "list")


def places(steps: int, batch: int) -> list[list[int]]:
    """Steps as indices: one for all samples, at the ends and in the middle, and one a sample."""
    return [[0], [steps // 2], [steps - 1], [i % steps for i in range(batch)]]


def flow_grpo_step(
    module: ModuleType,
    shape: tuple[int, ...],
    steps: int,
    at: list[int],
    level: float,
    how: str,
    dtype: torch.dtype,
    more: dict[str, Any],
) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = scheduled(FlowMatchEulerDiscreteScheduler(shift=3.0), steps)
    x, v, x_next = tensors(shape, dtype)
    draw, sources = drawing(how, x_next)
    times = scheduler.timesteps[at]
    return (
        v,
        module.sde_step_with_logprob(scheduler, v, times, x, noise_level=level, **draw, **more),
        sources,
    )


def flow_grpo_steps(module: ModuleType) -> Iterator[Call]:
    newer = "sde_type" in inspect.signature(module.sde_step_with_logprob).parameters
    options: tuple[dict[str, Any], ...] = ({},)
    if newer:
        options = tuple(
            {"sde_type": kind, "return_sqrt_dt": dt}
            for kind in ("sde", "cps")
            for dt in (True, False)
        )
    for shape, steps, *rest in product(
        SHAPES, (4, 10), (0.1, 0.7, 1.3), HOWS, (torch.float32, torch.bfloat16), options
    ):
        for at in places(steps, shape[0]) if newer or len(shape) == 4 else ():
            yield partial(flow_grpo_step, module, shape, steps, at, *rest)


SCORES: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "uniform": lambda draw, shape: draw.random(shape),
    "fp32": lambda draw, shape: draw.random(shape).astype(np.float32),
    "binary": lambda draw, shape: draw.integers(0, 2, shape).astype(float),
    "about 25": lambda draw, shape: 25 + 1e-3 * draw.integers(0, 4, shape),
    "about 1e4": lambda draw, shape: 1e4 + 1e-2 * draw.integers(0, 4, shape),
    "about -1e7": lambda draw, shape: -1e7 + 1e-1 * draw.random(shape),
    "tiny": lambda draw, shape: 1e-6 * draw.random(shape),
    "equal": lambda draw, shape: np.full(shape, 0.3),
}


def flow_grpo_advantage(
    module: ModuleType,
    scores: str,
    count: int,
    groups: int,
    columns: int | None,
    wide: bool,
    kind: str,
    times: int,
) -> Any:
    tracker = module.PerPromptStatTracker(wide)
    shape = (count,) if columns is None else (count, columns)
    values = SCORES[scores](np.random.default_rng(0), shape)
    prompts = [f"prompt {i % groups}" for i in range(count)]
    results = [tracker.update(prompts, values, type=kind) for _ in range(times)]
    results += [part for _, part in sorted(tracker.stats.items())]
    return None, [torch.from_numpy(np.asarray(value, dtype=np.float64)) for value in results], []


def flow_grpo_advantages(module: ModuleType) -> Iterator[Call]:
    wide, kinds = (False, True), (("grpo", 1), ("grpo", 2), ("rwr", 1))
    for *case, (kind, times) in product(SCORES, (4, 48), (1, 3), (None, 1, 5), wide, kinds):
        yield partial(flow_grpo_advantage, module, *(*case, kind, times))


LEVELS: dict[str, Any] = {
    "0.6": 0.6,
    "1.2": 1.2,
    "a sample": torch.tensor([0.6, 0.2, 0.9]),
    "own": None,
}


def flow_factory_step(
    module: ModuleType,
    shape: tuple[int, ...],
    dynamics: str,
    level: str,
    how: str,
    way: str,
    dtype: torch.dtype,
    scored: bool,
) -> Any:
    options = {"noise_level": 0.5, "dynamics_type": dynamics, "shift": 2.0}
    scheduler = scheduled(module.FlowMatchEulerDiscreteSDEScheduler(**options), 6)
    x, v, x_next = tensors(shape, dtype)
    times = scheduler.timesteps
    timestep = {"0-dim": times[2], "float": times[2].item(), "[1]": times[2:3]}.get(
        way, times[[0, 1, 4]]
    )
    ends = {"timestep_next": timestep - 50.0} if way == "both ends" else {}
    draw, sources = drawing(how, x_next.to(dtype), "next_latents")
    result = scheduler.step(
        v,
        timestep,
        x.to(dtype),
        noise_level=LEVELS[level],
        compute_log_prob=scored,
        return_dict=scored,
        **draw,
        **ends,
    )
    return v, result, sources


def flow_factory_steps(module: ModuleType) -> Iterator[Call]:
    kinds, ways = (
        ("Flow-SDE", "Dance-SDE", "CPS", "ODE"),
        ("0-dim", "float", "[1]", "[B]", "both ends"),
    )
    for shape, kind, level, how, way, dtype, scored in product(
        SHAPES[:2], kinds, LEVELS, HOWS, ways, (torch.float32, torch.bfloat16), (True, False)
    ):
        if level != "own" or way != "both ends":  # the schedule has no level there
            yield partial(flow_factory_step, module, shape, kind, level, how, way, dtype, scored)


def verl_omni_step(
    module: ModuleType,
    shape: tuple[int, ...],
    sde_type: str,
    level: float,
    how: str,
    constants: bool,
    at: list[int] | None,
) -> Any:
    scheduler = scheduled(module.FlowMatchSDEDiscreteScheduler(shift=3.0), 8)
    scheduler._init_step_index(scheduler.timesteps[3])
    x, v, x_next = tensors(shape)
    draw, sources = drawing(how, x_next)
    result = scheduler.sample_previous_step(
        sample=x,
        model_output=v,
        timestep=None if at is None else scheduler.timesteps[at],
        noise_level=level,
        sde_type=sde_type,
        return_logprobs=level > 0.5,
        return_sqrt_dt=constants,
        include_logprob_normalizer=constants,
        **draw,
    )
    return v, result, sources


def verl_omni_rollout(
    module: ModuleType, shape: tuple[int, ...], sde_type: str, level: float, as_dict: bool
) -> Any:
    scheduler, source = scheduled(module.FlowMatchSDEDiscreteScheduler(shift=3.0), 4), generator()
    x, v, _ = tensors(shape)
    taken: list[Any] = []
    for t in scheduler.timesteps:
        out = scheduler.step(
            v, t, x, generator=source, noise_level=level, sde_type=sde_type, return_dict=as_dict
        )
        taken += list(out.values()) if as_dict else list(out)
        x = (out.prev_sample if as_dict else out[0]).detach()
    return v, taken, [source]


def verl_omni_steps(module: ModuleType) -> Iterator[Call]:
    kinds, levels, constants = ("sde", "cps", "dance_sde"), (0.1, 0.7, 1.3), (True, False)
    for shape, *case in product(SHAPES, kinds, levels, HOWS, constants):
        for at in (None, *places(8, shape[0])):
            yield partial(verl_omni_step, module, *(shape, *case, at))
    for whole in product(SHAPES, kinds, levels, (True, False)):
        yield partial(verl_omni_rollout, module, *whole)


def verl_omni_nft(
    module: ModuleType,
    shape: tuple[int, ...],
    beta: float,
    least: float,
    kl: float,
    steps: int,
    upper: float,
    dtype: torch.dtype,
) -> Any:
    x0, noise, v, v_old, v_ref = torch.randn(5, *shape, generator=generator(3)).to(dtype)
    t = torch.linspace(0.1, 1.0, shape[0]).view(-1, *[1] * (len(shape) - 1)).to(dtype)
    settings = SimpleNamespace(
        mix_beta=beta, adv_clip_max=upper, adaptive_weight_min=least, ref_kl_coef=kl
    )
    result = module.DiffusionNFTLoss.compute_loss(
        forward_prediction=v.requires_grad_(),
        old_prediction=v_old,
        ref_forward_prediction=v_ref,
        x0=x0,
        xt=((1 - t) * x0 + t * noise).detach(),
        t_expanded=t,
        reward_prob=torch.rand(shape[0], *[steps] * (steps > 1), generator=generator(4)),
        config=SimpleNamespace(diffusion_loss=settings),
    )
    return v, result, []


def verl_omni_losses(module: ModuleType) -> Iterator[Call]:
    dtypes = (torch.float32, torch.float64)
    for case in product(SHAPES, (0.1, 1.0), (1e-5, 0.6), (0.0, 0.2), (1, 3), (1.0, 5.0), dtypes):
        yield partial(verl_omni_nft, module, *case)


def dance_grpo_step(
    module: ModuleType,
    shape: tuple[int, ...],
    steps: int,
    eta: float,
    given: bool,
    grpo: bool,
    solver: bool,
    index: Callable[[int], Any],
    place: int,
) -> Any:
    function = module.flux_step if hasattr(module, "flux_step") else module.dance_grpo_step
    times = torch.linspace(1.0, 0.0, steps + 1)
    x, v, x_next = tensors(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sigmas = 3.0 * times / (1 + 2.0 * times)
        result = function(v, x, eta, sigmas, index(place), x_next if given else None, grpo, solver)
        after = torch.Generator()
        after.set_state(torch.get_rng_state())
    return v, result, [after]


def dance_grpo_steps(module: ModuleType) -> Iterator[Call]:
    either = (True, False)
    for shape, steps, *case in product(
        SHAPES, (4, 10), (0.1, 0.3, 1.0), either, either, either, (int, torch.tensor)
    ):
        for place in (0, steps // 2, steps - 1):
            yield partial(dance_grpo_step, module, *(shape, steps, *case, place))


GRIDS: dict[str, tuple[Callable[[ModuleType], Iterator[Call]], ...]] = {
    "flow_grpo": (flow_grpo_steps, flow_grpo_advantages),
    "flow_factory": (flow_factory_steps,),
    "verl_omni": (verl_omni_steps, verl_omni_losses),
    "dance_grpo": (dance_grpo_steps,),
}
"""In the order of the project's seams."""


def described(call: Call) -> str:
    assert isinstance(call, partial)
    values = (str(list(v) if isinstance(v, tuple) else v) for v in call.args[1:])
    return f"{call.func.__name__}({', '.join(values)})"


# Comparing


class Answer(NamedTuple):
    """Of a call: the type of its result or of what it raised; its tensors; gradients by name;
    generators' states."""

    kind: type
    leaves: list[tuple[str, Tensor | None]]
    gradients: dict[str, Tensor]
    states: list[Tensor]


def answer(call: Call) -> Answer:
    try:
        v, result, sources = call()
    except Exception as error:  # whatever the original does; ours has to do it too
        return Answer(type(error), [], {}, [])
    leaves = list(_leaves(result))
    gradients = {}
    for name, leaf in leaves:
        if v is not None and leaf is not None and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator(5)).to(leaf.dtype)
            gradients[name] = torch.autograd.grad((leaf * weights).sum(), v, retain_graph=True)[0]
    plain = [(name, None if leaf is None else leaf.detach().clone()) for name, leaf in leaves]
    return Answer(type(result), plain, gradients, [source.get_state() for source in sources])


def difference(theirs: Answer, ours: Answer) -> tuple[str | None, float]:
    """What differs first, or None; and the largest error in fp32, in units of max(1, the largest
    value)."""
    if theirs.kind is not ours.kind:
        return f"{ours.kind.__name__} for {theirs.kind.__name__}", math.inf
    if [name for name, _ in theirs.leaves] != [name for name, _ in ours.leaves]:
        return "other outputs", math.inf
    if theirs.gradients.keys() != ours.gradients.keys():
        return (
            f"gradients of {sorted(ours.gradients)} for those of {sorted(theirs.gradients)}",
            math.inf,
        )
    if not all(map(torch.equal, theirs.states, ours.states)):
        return "the generator is elsewhere", math.inf
    worst = 0.0
    pairs = [(name, a, b) for (name, a), (_, b) in zip(theirs.leaves, ours.leaves, strict=True)]
    pairs += [
        (f"gradient of {name}", grad, ours.gradients[name])
        for name, grad in theirs.gradients.items()
    ]
    for name, their, our in pairs:
        if (their is None) != (our is None):
            return f"{name} is {our}", math.inf
        if their is None or our is None:
            continue
        if their.shape != our.shape or their.dtype != our.dtype:
            return (
                f"{name} is {our.dtype} {list(our.shape)} for {their.dtype} {list(their.shape)}",
                math.inf,
            )
        unlike = their.isfinite() != our.isfinite()
        if bool((their.isnan() != our.isnan()).any() | unlike.any()):
            return f"{name} is finite where the original is not, or the other way", math.inf
        size = their.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if their.numel() else 0.0
        gap = (their - our).nan_to_num(0.0, 0.0, 0.0).abs().max().item() if their.numel() else 0.0
        error = gap / max(1.0, size)
        short = their.dtype == torch.bfloat16
        worst = worst if short else max(worst, error)
        if error > (2**-8 if short else TOLERANCE):  # bf16's unit in the last place
            return f"{name} differs by {error:.1e}", error
    return None, worst


class Row(NamedTuple):
    project: str
    commit: str
    date: str
    seam: str
    calls: str
    result: str
    agrees: bool


def counted(seam: Seam, handed: list[bool]) -> Seam:
    """The same, noting of every call whether it is handed back to the original."""

    def build(original: Function, noise: str, convention: Any) -> Function:
        ours = seam.build(original, noise, convention)

        def noting(*args: Any, **kwargs: Any) -> Any:
            handed.append(True)
            with contextlib.suppress(NotCovered):
                result = ours(*args, **kwargs)
                handed[-1] = result is NotImplemented
                return result
            return NotImplemented

        return noting

    return dataclasses.replace(seam, build=build)


class Checking(NamedTuple):
    """A seam: where it is, its calls, what the original answers; and what the patched one does with
    each call."""

    place: str
    calls: list[Call]
    before: list[Answer]
    handed: list[bool]
    during: list[tuple[Answer, list[bool]]]


def prepared(
    seam: Seam, module_name: str, grid: Callable[[ModuleType], Iterator[Call]], every: int
) -> Checking:
    calls: list[Call] = []
    path = seam.paths[0]
    with contextlib.suppress(Exception, SystemExit):  # `patch` says why
        module = importlib.import_module(module_name)
        path = next(path for path in seam.paths if hasattr(module, path.partition(".")[0]))
        calls = list(grid(module))[::every]
    return Checking(f"{module_name}.{path}", calls, [answer(call) for call in calls], [], [])


def checked(root: Path, found: Found, every: int) -> Iterator[Row]:
    """A row a seam."""
    seams = PROJECTS[found.name]
    checks = [
        prepared(seam, found.module or seam.module, grid, every)
        for seam, grid in zip(seams, GRIDS[found.name], strict=True)
    ]
    PROJECTS[found.name] = tuple(
        counted(seam, check.handed) for seam, check in zip(seams, checks, strict=True)
    )
    try:
        with integrations.patch(found.name, module=found.module) as patched:
            refused = patched.refused
            for check in checks:
                for call in check.calls:
                    check.handed.clear()
                    check.during.append((answer(call), list(check.handed)))
    except IntegrationError as error:
        refused = {check.place: str(error) for check in checks}
    finally:
        PROJECTS[found.name] = seams
    for check in checks:
        calls, result, agrees = "", f"refused: {refused.get(check.place)}", False
        if check.place not in refused:
            calls, result, agrees = judged(check)
        yield Row(
            root.name,
            *commit_of(root),
            ".".join(check.place.split(".")[-2:]),
            calls,
            result,
            agrees,
        )


def judged(check: Checking) -> tuple[str, str, bool]:
    """The numbers of calls, the result in words, and whether all is well."""
    back = sum(any(handed) for _, handed in check.during)
    count = f"{len(check.calls)}, {back} by the original"
    results = [
        difference(theirs, ours)
        for theirs, (ours, _) in zip(check.before, check.during, strict=True)
    ]
    differing = [
        (call, what)
        for call, (what, _) in zip(check.calls, results, strict=True)
        if what is not None
    ]
    if differing:
        call, what = differing[0]
        return count, f"{len(differing)} differ, first {described(call)}: {what}", False
    if not all(handed for _, handed in check.during):
        return count, "not patched: some calls never came to the operators", False
    some = slice(None, None, max(1, len(check.calls) // 20))
    if any(
        difference(a, answer(call)) != (None, 0.0)
        for call, a in zip(check.calls[some], check.before[some], strict=True)
    ):
        return count, "not restored by unpatch", False
    return count, f"agree to {max(worst for _, worst in results):.0e}", True


def table(rows: Iterable[Row]) -> str:
    lines = ["| project | commit | date | seam | calls | result |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join((f'`{row.project}`', *row[1:3], f'`{row.seam}`', *row[4:6]))} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a checkout of a project"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="of the calls, one in so many (default: all)"
    )
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    roots = [path.expanduser().resolve() for path in options.paths]
    projects = [recognised(root) for root in roots]
    for root, found in zip(roots, projects, strict=True):
        if not found:
            print(
                f"error: {root}: no project here (accepted: a checkout of {', '.join(PROJECTS)})",
                file=sys.stderr,
            )
            return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, and of seams that are refused: a row each
        for root, found in zip(roots, projects, strict=True):
            for project in found:
                with Sandbox(
                    root, [project.module or seam.module for seam in PROJECTS[project.name]]
                ):
                    rows += checked(root, project, options.every)
    print(table(rows))
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
