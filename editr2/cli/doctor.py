"""What this machine can run, and how to mend what it cannot: `editr2 doctor`.

`report()` looks and changes nothing; `render()` makes text of it; `command()` prints it. A row's
`ok` is True (in order), None (absent or weak, and editr2 runs without it) or False (required and
broken). Only the last makes the command return 1.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from editr2.cli.flags import Arguments, Flags

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.table import Table

DISTRIBUTION = "editr2"
OLDEST_PYTHON = (3, 10)
WEIGHTS = "unified-small"
LOW_DISK_GB = (
    2.0  # a run of the shipped model writes tens of MB; a checkpoint of a 7B LoRA a few hundred
)

INSTALL = "pip install -e ."
REBUILD = (
    "install a C++ compiler and the Python headers (apt-get install g++ python3-dev), then pip "
    "install -e ."
)


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is True, None (optional and absent) or False (required and broken)."""

    name: str
    ok: bool | None
    detail: str
    remedy: str | None = None


def _python() -> list[Check]:
    version, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    new_enough = sys.version_info >= OLDEST_PYTHON
    remedy = None if new_enough else f"install Python {oldest} or newer"
    return [
        Check("python", new_enough, f"{version} at {sys.executable}", remedy),
        Check("platform", True, f"{platform.platform()}, {platform.machine()}"),
        Check("cores", True, f"{_usable_cores()} usable of {os.cpu_count()}"),
    ]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why. Anything can go wrong in a broken install, so any Exception is a
    finding."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"import fails: {type(error).__name__}: {error}"


def _torch() -> list[Check]:
    torch, problem = _import("torch")
    if torch is None:
        return [Check("torch", False, problem, f"{INSTALL} (or reinstall torch)")]
    built_for = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "ROCm"
        if torch.version.hip
        else "CPU"
    )
    threads = torch.get_num_threads()
    built = (
        f"{torch.__version__}, built for {built_for}, {threads} thread{'' if threads == 1 else 's'}"
    )
    rows = [Check("torch", True, built)]
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    except (
        Exception
    ) as error:  # a driver older than torch's CUDA raises here; it is a finding, not a crash
        remedy = "update the GPU driver, or install a torch built for its CUDA version"
        return [*rows, Check("cuda", None, f"{type(error).__name__}: {error}", remedy)]
    if devices:
        for index, device in enumerate(devices):
            detail = (
                f"{device.name}, sm_{device.major}{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
            rows.append(Check(f"cuda:{index}", True, detail))
    elif built_for == "CPU":
        remedy = "on a machine with a GPU, install a CUDA build of torch"
        rows.append(Check("cuda", None, "this torch is a CPU build", remedy))
    else:
        rows.append(
            Check("cuda", None, "no device is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
        )
    return rows


def _operators() -> list[Check]:
    if importlib.util.find_spec("editr2_kernels") is None:
        return [Check("operators", False, "editr2_kernels is not installed", INSTALL)]
    kernels, problem = _import("editr2_kernels")
    if kernels is None:
        return [Check("operators", False, problem, INSTALL)]
    rows = []
    for name, status in kernels.backends().items():
        if status.available:
            rows.append(Check(f"operators: {name}", True, status.detail or "available"))
        else:
            # The reference is what every other backend is measured against: without it nothing is
            # trustworthy.
            ok = False if name == "ref" else None
            rows.append(
                Check(
                    f"operators: {name}", ok, str(status.reason), REBUILD if name == "cpu" else None
                )
            )
    return [*rows, _build_info(Path(str(kernels.__file__)).parent / "_build_info.json")]


def _build_info(path: Path) -> Check:
    if not path.is_file():
        return Check("native build", None, "no record of a build beside the package", INSTALL)
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        parts = []
        for module in ("cpu", "cuda"):
            entry = info.get(module) or {}
            parts.append(
                f"{module}: "
                + ("built" if entry.get("built") else f"not built ({entry.get('reason')})")
            )
    except (OSError, ValueError, AttributeError) as error:
        return Check("native build", None, f"{path.name} cannot be read: {error}", INSTALL)
    built = bool((info.get("cpu") or {}).get("built"))
    compiler = f"; {info['compiler']}" if info.get("compiler") else ""
    return Check(
        "native build",
        True if built else None,
        ", ".join(parts) + compiler,
        None if built else REBUILD,
    )


def _requirements() -> list[Requirement] | None:
    """What the installed distribution declares, extras included; None where it is not installed."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    from packaging.requirements import Requirement

    return [Requirement(text) for text in declared]


def _dependencies() -> list[Check]:
    from packaging.requirements import InvalidRequirement

    try:
        requirements = _requirements()
    except InvalidRequirement as error:
        return [
            Check("dependencies", False, f"the installed metadata is damaged: {error}", INSTALL)
        ]
    if requirements is None:
        return [
            Check(
                "dependencies",
                None,
                "editr2 runs from its source tree, uninstalled: not checked",
                INSTALL,
            )
        ]
    rows = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            rows.append(_dependency(requirement, required=True))
        elif requirement.marker.evaluate({"extra": "tensorboard"}):
            rows.append(_dependency(requirement, required=False))
    return rows


def _dependency(requirement: Requirement, *, required: bool) -> Check:
    absent = False if required else None
    name = f"package: {requirement.name}"
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        purpose = "" if required else " (optional)"
        return Check(name, absent, f"not installed{purpose}", f'pip install "{wanted}"')
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(
            name, absent, f"{version}, and {wanted} is needed", f'pip install -U "{wanted}"'
        )
    return Check(name, True, version)


EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "pages: label and watch": (("starlette", "uvicorn"), "pip install 'editr2[label]'"),
    "judges: a server (OpenAI-compatible)": (("httpx2",), "pip install httpx2"),
    "judges: text in images": (("rapidocr", "onnxruntime"), "pip install rapidocr onnxruntime"),
    "judges: detectors and features": (
        (
            "transformers.models.grounding_dino",
            "transformers.models.owlv2",
            "transformers.models.dinov3_vit",
        ),
        "pip install -U transformers",
    ),
}
"""What rewards look with and pages are served by -> the modules that it takes, and how they
come."""


def _extras() -> list[Check]:
    """Nothing is imported: a runtime of models takes seconds."""
    rows = []
    for what, (modules, remedy) in EXTRAS.items():
        missing = [module for module in modules if not _is_there(module)]
        said = f"not installed: {', '.join(missing)} (optional)" if missing else _versions(modules)
        mend = remedy if missing else None
        rows.append(Check(what, None if missing else True, said, mend))
    return rows


def _is_there(module: str) -> bool:
    """Whether a module can be found; its package is not imported."""
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not below:
        return spec is not None
    places = [Path(place).joinpath(*below) for place in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def _versions(modules: Sequence[str]) -> str:
    found = []
    for name in dict.fromkeys(module.partition(".")[0] for module in modules):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return ", ".join(found)


def _weights() -> Check:
    folder = Path(__file__).parent.parent / "assets" / WEIGHTS
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    name = f"weights: {WEIGHTS}"
    if not any(path.suffix == ".safetensors" for path in files):
        return Check(
            name,
            None,
            "not in this install",
            "editr2 world pretrain makes them; a release ships them",
        )
    return Check(
        name,
        True,
        f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB",
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = free < LOW_DISK_GB
    return Check(
        "disk",
        None if low else True,
        f"{free:.1f} GiB free here",
        "free some disk" if low else None,
    )


def report() -> list[Check]:
    """Every finding about this machine and install, in the order of a first install. Creates no
    files."""
    checks: Sequence[Callable[[], list[Check]]] = (
        _python,
        _torch,
        _operators,
        _dependencies,
        _extras,
        lambda: [_weights(), _disk()],
    )
    return [row for check in checks for row in check()]


def _table(rows: Sequence[Check]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    marks = {True: "[green]ok[/]", None: "[yellow]--[/]", False: "[red]BAD[/]"}
    table = Table(box=None, pad_edge=False)
    for title in ("", "what", "finding"):
        table.add_column(title, overflow="fold")
    for row in rows:
        remedy = f"\n[dim]-> {escape(row.remedy)}[/]" if row.remedy else ""
        table.add_row(marks[row.ok], escape(row.name), escape(row.detail) + remedy)
    return table


def render(rows: Sequence[Check], width: int = 120) -> str:
    """The rows as plain text without colour, `width` columns wide."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(_table(rows))
    return out.getvalue()


def command(arguments: Arguments) -> int:
    """what works on this machine, and why the rest does not"""
    Flags("editr2 doctor", command.__doc__ or "", [("", "look, and change nothing")]).parse(
        arguments
    )
    from rich.console import Console
    from rich.markup import escape

    rows = report()
    console = Console()
    console.print(_table(rows))
    broken = [row.name for row in rows if row.ok is False]
    optional = sum(row.ok is None for row in rows)
    if broken:
        console.print(f"[red]broken:[/] {escape(', '.join(broken))}")
    else:
        console.print(f"Everything required works; {optional} optional findings above.")
    return 1 if broken else 0
