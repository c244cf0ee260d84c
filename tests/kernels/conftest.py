"""Fixtures of the operator tests.

The same tests run on every backend: "ref" and "cpu" here, "triton" in the interpreter, in a process of its own that
`test_triton.py` starts, because Triton reads TRITON_INTERPRET when it is imported.
"""

import os

import pytest
import torch

import editr2_kernels as ek

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["ref", "cpu", *(["triton"] if INTERPRETED else [])])
def backend(request):
    status = ek.backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    return request.param


def pytest_collection_modifyitems(items):
    """The interpreter takes about 50 ms a program: of each test it runs about four cases.

    One more than a quarter as the stride: a stride that divides the number of cases would keep to one shape.
    """
    if not INTERPRETED:
        return
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0] + ("[triton" if "[triton" in item.nodeid else ""), []).append(item)
    items[:] = [item for group in cases.values() for item in group[:: len(group) // 4 + 1]]


@pytest.fixture
def skip_interpreted_bf16(backend):
    """Triton's interpreter cuts fp32 to bf16 off; a GPU rounds to nearest (test_triton.py looks for cvt.rn)."""

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


@pytest.fixture
def one_thread():
    """A function that runs another on one intra-op thread."""

    def run(function):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run
