import importlib
import subprocess
import sys

import pytest
import torch

import editr2_kernels as ek

# The attribute of that name is the function.
backends_module = importlib.import_module("editr2_kernels.backends")

CALLS = {
    "philox_normal": lambda backend: ek.philox_normal(torch.tensor([1]), 0, (4,), backend=backend),
    "sde_step": lambda backend: ek.sde_step(X, X, TABLE, INDEX, INDEX, backend=backend),
    "sde_log_prob": lambda backend: ek.sde_log_prob(X, X, X, TABLE, INDEX, backend=backend),
    "group_advantage": lambda backend: ek.group_advantage(
        X[:, :, None], INDEX, ek.CREDIT_PRESETS["flow-grpo"], backend=backend
    ),
}
X = torch.ones(1, 4)
INDEX = torch.zeros(1, dtype=torch.int64)
TABLE = ek.transition_table([1.0, 0.0], dynamics="ode")


def test_every_status_has_a_reason_or_is_available():
    status = ek.backends()
    assert list(status) == ["ref", "cpu", "triton", "cuda"]
    assert status["ref"].available
    assert all(s.available or s.reason for s in status.values())
    if not torch.cuda.is_available():
        assert not status["cuda"].available
    if status["cpu"].available:
        assert status["cpu"].detail


class BuiltCuda:
    emulated = False

    @staticmethod
    def architectures():
        return ["sm_80", "compute_80"]

    @staticmethod
    def driver_version():
        return 13000

    @staticmethod
    def runtime_version():
        return 13010


class BuiltForALaterDriver(BuiltCuda):
    @staticmethod
    def driver_version():
        return 12090


OLD = "a GPU of compute capability 8.0 (sm_80) or later is needed, this one has 7.5"
GOOD = ((9, 0),)


@pytest.mark.parametrize(
    "module, why, version, devices, capabilities, expected",
    [
        (
            None,
            "nvcc was not found",
            "13.0",
            1,
            GOOD,
            ek.BackendStatus(False, "nvcc was not found"),
        ),
        (
            BuiltCuda,
            None,
            None,
            0,
            (),
            ek.BackendStatus(False, "this PyTorch is built without CUDA"),
        ),
        (BuiltCuda, None, "13.0", 0, (), ek.BackendStatus(False, "no GPU is visible")),
        (
            BuiltCuda,
            None,
            "13.0",
            1,
            GOOD,
            ek.BackendStatus(True, detail="built for sm_80, compute_80"),
        ),
        (
            BuiltCuda,
            None,
            "13.0",
            1,
            ((8, 0),),
            ek.BackendStatus(True, detail="built for sm_80, compute_80"),
        ),
        (
            BuiltCuda,
            None,
            "13.0",
            1,
            (),
            ek.BackendStatus(True, detail="built for sm_80, compute_80"),
        ),
        (BuiltCuda, None, "13.0", 1, ((7, 5),), ek.BackendStatus(False, OLD)),
        (BuiltCuda, None, "13.0", 2, ((7, 0), (7, 5)), ek.BackendStatus(False, OLD)),
        (
            BuiltCuda,
            None,
            "13.0",
            2,
            ((7, 5), (8, 6)),
            ek.BackendStatus(True, detail="built for sm_80, compute_80"),
        ),
        (
            BuiltForALaterDriver,
            None,
            "13.0",
            1,
            GOOD,
            ek.BackendStatus(False, "the driver supports CUDA 12.9, the module needs 13.1"),
        ),
    ],
)
def test_status_of_the_cuda_module(
    module, why, version, devices, capabilities, expected, monkeypatch
):
    monkeypatch.setattr(backends_module, "_cuda", lambda: (module, why))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(backends_module, "_capabilities", lambda: capabilities)
    assert ek.backends()["cuda"] == expected


def test_a_gpu_below_sm_80_has_no_kernels_of_ours(monkeypatch):
    """Of two GPUs the older: neither compiled kernels nor Triton's, and the reference where nothing
    is named."""
    capabilities = {0: (8, 6), 1: (7, 5)}
    monkeypatch.setattr(backends_module, "_cuda", lambda: (BuiltCuda, None))
    monkeypatch.setattr(backends_module, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(backends_module, "_capabilities", lambda: tuple(capabilities.values()))
    monkeypatch.setattr(backends_module, "_capability", capabilities.get)
    names = ("cuda", "triton") if ek.backends()["triton"].available else ("cuda",)
    for device in ("cuda:1", "cuda"):
        assert backends_module.select("auto", torch.device(device)) == "ref"
        for name in names:
            with pytest.raises(RuntimeError) as raised:
                backends_module.select(name, torch.device(device))
            assert str(raised.value) == f"backend {name!r} is not available: {OLD}"
    for name in names:
        assert backends_module.select(name, torch.device("cuda:0")) == name
    assert backends_module.select("auto", torch.device("cuda:0")) in ("triton", "cuda")
    monkeypatch.setattr(torch.version, "hip", "6.2")  # whose devices have other numbers
    assert backends_module._too_old(torch.device("cuda:1")) is None


class Nvml:
    """The management library of a machine with a Turing and a Hopper GPU, and one that does not
    answer."""

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 15 if index.value == 2 else 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = ((7, 5), (9, 0))[handle.value - 1]
        return 0


class NvmlWithoutDriver(Nvml):
    def nvmlInit_v2(self):
        return 9


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    "library, expected",
    [
        (lambda name: Nvml(), ((7, 5), (9, 0))),
        (lambda name: NvmlWithoutDriver(), ()),
        (lambda name: object(), ()),
        (no_library, ()),
    ],
)
def test_capabilities_are_read_without_a_context(library, expected, monkeypatch):
    monkeypatch.setattr(backends_module.ctypes, "CDLL", library)
    assert backends_module._capabilities.__wrapped__() == expected
    assert not torch.cuda.is_initialized()


def test_the_emulated_module_takes_cpu_tensors_and_the_built_one_does_not(
    emulated_cuda, monkeypatch
):
    assert "emulated" in ek.backends()["cuda"].detail
    assert backends_module.select("cuda", torch.device("cpu")) == "cuda"
    assert backends_module.select("auto", torch.device("cpu")) != "cuda"
    monkeypatch.setattr(backends_module, "_cuda", lambda: (BuiltCuda, None))
    monkeypatch.setattr(backends_module, "_cuda_status", lambda device: ek.BackendStatus(True))
    with pytest.raises(RuntimeError, match="'cuda' works on CUDA tensors only, got tensors on cpu"):
        backends_module.select("cuda", torch.device("cpu"))


@pytest.mark.parametrize("op", CALLS)
def test_an_explicit_backend_never_falls_back(op, monkeypatch):
    monkeypatch.setattr(backends_module, "_cuda", lambda: (None, "nvcc was not found"))
    with pytest.raises(RuntimeError, match=r"'cuda' is not available: nvcc was not found"):
        CALLS[op]("cuda")
    monkeypatch.setattr(backends_module, "triton_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"'triton'.*TRITON_INTERPRET"):
        CALLS[op]("triton")
    monkeypatch.setattr(backends_module, "_native", lambda: (None, "no compiler was found"))
    with pytest.raises(RuntimeError, match="'cpu' is not available: no compiler was found"):
        CALLS[op]("cpu")
    CALLS[op](None)  # without a name, the reference serves


def test_default_on_cpu_is_native_where_it_exists(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(backends_module, "_native", lambda: (object(), None))
    assert backends_module.select("auto", cpu) == "cpu"
    monkeypatch.setattr(backends_module, "_native", lambda: (None, "absent"))
    assert backends_module.select("auto", cpu) == "ref"
    assert backends_module.select("auto", torch.device("meta")) == "ref"


def test_import_touches_no_gpu_and_no_triton():
    code = (
        "import sys, time, torch; start = time.process_time(); loaded = set(sys.modules)\n"
        "import editr2_kernels; took = time.process_time() - start\n"
        "new = set(sys.modules) - loaded\n"
        "editr2_kernels.backends()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [m for m in new if m.split('.')[0] in ('triton', 'editr2', 'numpy')], new\n"
        "assert 'editr2_kernels._native' not in new\n"
        "assert took < 0.3, took\n"  # CPU time beyond torch: about 0.1 s
    )
    subprocess.run([sys.executable, "-c", code], check=True)
