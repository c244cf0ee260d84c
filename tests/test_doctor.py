from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from editr2.cli import doctor
from editr2.cli.doctor import Check


def by_name(rows: list[Check]) -> dict[str, Check]:
    return {row.name: row for row in rows}


def declare(
    monkeypatch: pytest.MonkeyPatch, requires: list[str], installed: dict[str, str]
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(importlib.metadata, "version", version)


def backend(
    available: bool, reason: str | None = None, detail: str | None = None
) -> SimpleNamespace:
    return SimpleNamespace(available=available, reason=reason, detail=detail)


def fake_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **backends: SimpleNamespace
) -> None:
    module = SimpleNamespace(
        backends=lambda: backends, __file__=str(tmp_path / "__init__.py"), __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "editr2_kernels", module)


def test_report_covers_this_machine() -> None:
    rows = by_name(doctor.report())
    assert {
        "python",
        "platform",
        "cores",
        "torch",
        "operators: ref",
        "native build",
        "disk",
    } <= rows.keys()
    assert torch.__version__ in rows["torch"].detail
    assert rows["operators: ref"].ok is True
    assert all(row.remedy for row in rows.values() if row.ok is False)
    assert ("cuda:0" in rows) == torch.cuda.is_available()


def test_absent_gpu_is_no_failure_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    row = by_name(doctor._torch())["cuda"]
    assert row.ok is None and "CPU build" in row.detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    row = by_name(doctor._torch())["cuda"]
    assert row.ok is None and "no device" in row.detail and "nvidia-smi" in str(row.remedy)


def test_unusable_driver_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", raises)
    row = by_name(doctor._torch())["cuda"]
    assert row.ok is None and "driver too old" in row.detail


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    rows = by_name(doctor._torch())
    assert rows["cuda:0"].detail == rows["cuda:1"].detail == "Some GPU, sm_90, 80 GiB"


def test_backends_report_their_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_kernels(
        monkeypatch,
        tmp_path,
        ref=backend(True, detail="eager"),
        cpu=backend(False, "no compiler"),
        cuda=backend(True),
    )
    rows = by_name(doctor._operators())
    assert rows["operators: ref"] == Check("operators: ref", True, "eager")
    assert rows["operators: cpu"].ok is None and rows["operators: cpu"].detail == "no compiler"
    assert "g++" in str(rows["operators: cpu"].remedy)
    assert rows["operators: cuda"].ok is True


def test_broken_reference_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_kernels(monkeypatch, tmp_path, ref=backend(False, "no torch"))
    assert by_name(doctor._operators())["operators: ref"].ok is False


def test_missing_operators_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = doctor._operators()
    assert row.ok is False and row.remedy == doctor.INSTALL


def test_build_info(tmp_path: Path) -> None:
    path = tmp_path / "_build_info.json"
    assert doctor._build_info(path).ok is None
    built = {
        "cpu": {"built": True, "reason": None},
        "cuda": {"built": False, "reason": "no nvcc"},
        "compiler": "g++ 12",
    }
    path.write_text(json.dumps(built))
    assert doctor._build_info(path) == Check(
        "native build", True, "cpu: built, cuda: not built (no nvcc); g++ 12"
    )
    path.write_text(
        json.dumps({"cpu": {"built": False, "reason": "no C++ compiler"}, "compiler": None})
    )
    row = doctor._build_info(path)
    assert row.ok is None and "no C++ compiler" in row.detail and row.remedy
    for damaged in ("{", "[]", '{"cpu": 3}'):
        path.write_text(damaged)
        assert "cannot be read" in doctor._build_info(path).detail


def test_unmet_minimum_and_absent_dependency_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["torch>=2.9", "diffusers>=0.37", "peft>=0.18", "nowhere>=1; python_version < '3'"]
    declare(monkeypatch, requires, {"torch": "2.8.0+cpu", "diffusers": "0.37.0.dev0"})
    rows = by_name(doctor._dependencies())
    assert (
        rows["package: torch"].ok is False
        and rows["package: torch"].remedy == 'pip install -U "torch>=2.9"'
    )
    assert rows["package: diffusers"].ok is False  # a development release before the one needed
    assert rows["package: peft"].ok is False and "not installed" in rows["package: peft"].detail
    assert "package: nowhere" not in rows


def test_local_and_development_versions_meet_a_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(
        monkeypatch,
        ["torch>=2.9", "diffusers>=0.37"],
        {"torch": "2.9.0+cu130", "diffusers": "0.43.0.dev0"},
    )
    assert all(row.ok for row in doctor._dependencies())


def test_absent_extra_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["tensorboard>=2.19; extra == 'tensorboard'", "mypy>=1; extra == 'dev'"]
    declare(monkeypatch, requires, {})
    (row,) = doctor._dependencies()
    assert row.name == "package: tensorboard" and row.ok is None


def test_uninstalled_source_tree_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (row,) = doctor._dependencies()
    assert row.ok is None and "uninstalled" in row.detail


@pytest.mark.parametrize(
    ("there", "absent", "said", "remedy"),
    [
        (
            {"httpx2"},
            "judges: text in images",
            "rapidocr, onnxruntime",
            "pip install rapidocr onnxruntime",
        ),
        (
            {"rapidocr"},
            "judges: text in images",
            "onnxruntime",
            "pip install rapidocr onnxruntime",
        ),
        (
            {"uvicorn"},
            "pages: label and watch",
            "starlette",
            "pip install 'editr2[label]'",
        ),
        (
            {"rapidocr", "onnxruntime"},
            "judges: a server (OpenAI-compatible)",
            "httpx2",
            "pip install httpx2",
        ),
        (
            {"transformers"},
            "judges: detectors and features",
            "transformers.models.grounding_dino, transformers.models.owlv2, "
            "transformers.models.dinov3_vit",
            "pip install -U transformers",
        ),
    ],
)
def test_what_is_not_needed_by_all(there, absent, said, remedy, monkeypatch, tmp_path) -> None:
    """Packages that are there have an empty folder each."""

    def find_spec(name: str) -> SimpleNamespace | None:
        places = [str(tmp_path / name)]
        return SimpleNamespace(submodule_search_locations=places) if name in there else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    declare(monkeypatch, [], {name: "1.2" for name in there})
    rows = by_name(doctor._extras())
    row = rows[absent]
    assert (row.ok, row.detail, row.remedy) == (None, f"not installed: {said} (optional)", remedy)
    for row in rows.values():
        assert row.ok is None or (
            row.remedy is None
            and row.detail
            == ", ".join(f"{name} 1.2" for name in row.detail.replace(" 1.2", "").split(", "))
        )
    (tmp_path / "transformers" / "models" / "owlv2").mkdir(parents=True)
    (tmp_path / "transformers" / "models" / "grounding_dino.py").touch()
    (tmp_path / "transformers" / "models" / "dinov3_vit").mkdir()
    found = by_name(doctor._extras())["judges: detectors and features"]
    assert found.ok is (True if "transformers" in there else None)


def test_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "cli" / "doctor.py"))
    assert doctor._weights().ok is None
    folder = tmp_path / "assets" / doctor.WEIGHTS
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert doctor._weights().ok is None  # a configuration without its weights
    (folder / "model.safetensors").write_bytes(b"\0" * 2**20)
    row = doctor._weights()
    assert row.ok is True and row.detail == "2 files, 1.0 MiB"


def test_low_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    row = doctor._disk()
    assert row.ok is None and row.detail == "1.0 GiB free here" and row.remedy


def test_render_shows_every_row_and_no_markup() -> None:
    rows = [
        Check("one", True, "fine [v1]"),
        Check("two", None, "absent", "get [x]"),
        Check("three", False, "broken", "mend"),
    ]
    text = doctor.render(rows)
    assert "fine [v1]" in text and "-> get [x]" in text and "\x1b" not in text
    assert [line.split()[0] for line in text.splitlines()] == [
        "what",
        "ok",
        "--",
        "->",
        "BAD",
        "->",
    ]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool | None, code: int
) -> None:
    monkeypatch.setattr(
        doctor,
        "report",
        lambda: [Check("fine", True, "yes"), Check("thing", ok, "finding", "mend")],
    )
    assert doctor.command([]) == code
    assert ("broken: thing" in capsys.readouterr().out) == bool(code)
