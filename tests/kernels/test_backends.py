import importlib
import subprocess
import sys

import pytest
import torch

import editr2_kernels as ek

backends_module = importlib.import_module("editr2_kernels.backends")  # the attribute of that name is the function

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


@pytest.mark.parametrize(
    "module, why, version, devices, expected",
    [
        (None, "nvcc was not found", "13.0", 1, ek.BackendStatus(False, "nvcc was not found")),
        (BuiltCuda, None, None, 0, ek.BackendStatus(False, "this PyTorch is built without CUDA")),
        (BuiltCuda, None, "13.0", 0, ek.BackendStatus(False, "no GPU is visible")),
        (BuiltCuda, None, "13.0", 1, ek.BackendStatus(True, detail="built for sm_80, compute_80")),
        (
            BuiltForALaterDriver,
            None,
            "13.0",
            1,
            ek.BackendStatus(False, "the driver supports CUDA 12.9, the module needs 13.1"),
        ),
    ],
)
def test_status_of_the_cuda_module(module, why, version, devices, expected, monkeypatch):
    monkeypatch.setattr(backends_module, "_cuda", lambda: (module, why))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert ek.backends()["cuda"] == expected


def test_the_emulated_module_takes_cpu_tensors_and_the_built_one_does_not(emulated_cuda, monkeypatch):
    assert "emulated" in ek.backends()["cuda"].detail
    assert backends_module.select("cuda", torch.device("cpu")) == "cuda"
    assert backends_module.select("auto", torch.device("cpu")) != "cuda"
    monkeypatch.setattr(backends_module, "_cuda", lambda: (BuiltCuda, None))
    monkeypatch.setattr(backends_module, "_cuda_status", lambda: ek.BackendStatus(True))
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
