"""Fixtures of the operator tests.

The same tests run on every backend: "ref", "cpu" and "cuda" here, "triton" in the interpreter, in a
process of its own that `test_triton.py` starts, because Triton reads TRITON_INTERPRET when it is
imported. "cuda" is the CUDA C++ sources compiled for the CPU and run by cuda_emulator/; on a GPU,
`test_gpu.py` runs the real ones.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import editr2_kernels as ek

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Cases a test keeps on the backends that are slow: 50 ms a program in the interpreter, 2 ms a block
# in the emulator.
KEPT = {"triton": 2, "cuda": 16}
WAITING = "test_interpreter_passes_the_operator_tests"
# The attribute of that name is the function.
backends_module = importlib.import_module("editr2_kernels.backends")


def load_by_path(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated_module(request):
    """The CUDA C++ backend for CPU tensors; EDITR2_EMULATOR names a folder with another build of
    it."""
    emulator = load_by_path(Path(__file__).with_name("cuda_emulator") / "build.py")
    reason = emulator.absence()
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    folder = os.environ.get("EDITR2_EMULATOR")
    if folder is not None:
        return emulator.load(Path(folder) / emulator.MODULE)
    return emulator.load(emulator.build(Path(request.config.cache.mkdir("cuda_emulator"))))


@pytest.fixture
def emulated_cuda(emulated_module, monkeypatch):
    """Makes the backend "cuda" the emulated one."""
    monkeypatch.setattr(backends_module, "_cuda", lambda: (emulated_module, None))
    return emulated_module


@pytest.fixture(params=["ref", "cpu", "cuda", *(["triton"] if INTERPRETED else [])])
def backend(request):
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    status = ek.backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    return request.param


def slow_backend(item):
    """Which of the slow backends a collected test runs on."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params["backend"] if params.get("backend") in KEPT else None


def side_by_side(config):
    """Whether this is one of pytest-xdist's processes, each of which collects all tests."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config, items):
    """The slow backends run a sample of each test's cases, and none but Triton runs in the
    interpreter's process.

    One more than the quotient as the stride: a stride that divides the number of cases would keep
    to one shape.
    """
    cases = {}
    for item in items:
        slow = slow_backend(item)
        if INTERPRETED and slow == "cuda":
            continue
        kept = KEPT[slow] if slow else KEPT["triton"] if INTERPRETED else None
        cases.setdefault((item.nodeid.split("[")[0], slow, kept), []).append(item)
    order = {id(item): place for place, item in enumerate(items)}
    chosen = [
        item
        for (_, _, kept), group in cases.items()
        for item in group[:: 1 if kept is None else len(group) // kept + 1]
    ]
    # The tests that wait for the interpreter come last: it works beside the others. Where they run
    # it themselves, the longest of all come first, lest one process be alone with them at the end.
    last = not side_by_side(config)
    items[:] = sorted(
        chosen, key=lambda item: ((item.originalname == WAITING) == last, order[id(item)])
    )


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch():
    """Triton's interpreter patches its whole language again at every call of a device function:
    more than half of its time, to put there what the launch has put there already."""
    if not INTERPRETED:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    @functools.cache
    def sees(function):
        """The parts of the language that a function's module names: what is patched for it."""
        parts = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(part.__name__ for part in parts if part in (interpreter.tl, core))

    def patch_new(function):
        """Of a launch's own call, its first, the result: what undoes it."""
        if sees(function) in patched:
            return None
        patched.add(sees(function))
        return patch(function)

    def launch_anew(self, *given, **named):
        patched.clear()
        return launch(self, *given, **named)

    core = interpreter.tl.core
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_new)
        changes.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreted(request):
    """(exit status, output) of whole test files, by their names, in a process of Triton's
    interpreter.

    These run one after the other beside the tests of this process. Processes side by side all know
    of all tests, and each runs some: there files run when the test that waits for them does.
    """
    asked = [
        item.callspec.params["names"]
        for item in request.session.items
        if item.originalname == WAITING and not side_by_side(request.config)
    ]
    current = []

    def run(names):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "triton",
            "-W",
            "ignore",
        ]
        process = subprocess.Popen(
            [*command, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in names)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        current[:] = [process]
        output, _ = process.communicate()
        return process.returncode, output

    with ThreadPoolExecutor(1) as pool:
        ahead = {names: pool.submit(run, names) for names in asked}
        yield lambda names: (ahead.get(names) or pool.submit(run, names)).result()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in current:
            process.kill()


@pytest.fixture
def skip_interpreted_bf16(backend):
    """Triton's interpreter cuts fp32 to bf16 off; a GPU rounds to nearest (test_triton.py looks for
    cvt.rn)."""

    def skip(dtype):
        if backend == "triton" and dtype == torch.bfloat16:
            pytest.skip("the Triton interpreter truncates to bf16")

    return skip


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Deterministic mode fills every torch.empty with NaN, so an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def on_threads(count):
    """A function that runs another on so many intra-op threads."""

    def run(function):
        threads = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture
def one_thread():
    return on_threads(1)


@pytest.fixture
def two_threads():
    """Backend "cpu" takes the second one for latents of 40 000 elements or more."""
    return on_threads(2)
