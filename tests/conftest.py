"""One environment for every test: offline, one thread, seeded; tests marked gpu are skipped without
a CUDA device."""

from __future__ import annotations

import gc
import os
import shutil

# Before anything imports huggingface_hub or initialises CUDA: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it cuBLAS may choose among kernels freely

from collections.abc import Callable, Generator, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy

THREADS = 1  # tests run side by side (`make test`): one worker a core

# The same examples in every run: a failure here must fail again on the next machine.
settings.register_profile("editr2", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("editr2")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also the tests marked exhaustive (`make test-all`)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or torch.cuda.is_available():
        return
    why = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why}"))


def keep_what_is_there() -> None:
    """What is alive now (libraries, the tests) mostly lives to the end: full collections of
    garbage, which the product asks for too, need not look at it. Half a second each without."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    gc.disable()  # a third of the time of collecting, for no garbage
    try:
        return (yield)
    finally:
        gc.enable()
        keep_what_is_there()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    result = yield
    if nextitem is not None and nextitem.path != item.path:  # what a file imported in its tests
        keep_what_is_there()
    return result


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw from torch's global generator draw the same, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def beside() -> Callable[[str], ModuleType]:
    """A module of helpers in this folder, by name; the folder is on nobody's import path."""

    def load(name: str) -> ModuleType:
        spec = spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def peers(
    beside: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Stand-ins of other trainers (peers.py), importable by their names; nothing stays patched."""
    from editr2.integrations import patching, unpatch

    module = beside("peers")
    module.modules = module.install(monkeypatch)
    yield module
    for name in list(patching._ACTIVE):
        unpatch(name)


@pytest.fixture
def tiny_unified() -> UnifiedPolicy:
    """A random unified policy of two small layers whose velocity head is not zero."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    policy = new_embedded_policy(config, seed=0)
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return policy


@pytest.fixture(scope="module")
def browser():
    """An installed Chromium, driven by playwright: nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: editr2[dev]")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None
    )
    if chromium is None:
        pytest.skip("needs Chromium: none is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
