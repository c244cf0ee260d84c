"""scripts/check_peers.py on checkouts made of the stand-ins: that it finds, calls, compares and
tells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from editr2.integrations.projects import PROJECTS

TESTS = Path(__file__).parent
STANDINS = (TESTS / "peers.py").read_text()
STEP = """

def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    step = flux_step_of(constants=True, always_noisy=True)
    return step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
"""
ABSENT = """import no_such_library.part as part
from fastvideo.broken import Base

@part.registered('x')
class Own(Base): pass

"""


@pytest.fixture
def script(beside, monkeypatch):
    monkeypatch.syspath_prepend(TESTS.parent / "scripts")
    monkeypatch.delitem(sys.modules, "check_peers", raising=False)
    import check_peers

    return check_peers


def checkout(folder, name, change=lambda text: text, source=""):
    """A project's modules, each the stand-ins."""
    for seam in PROJECTS[name]:
        file = folder / source / f"{seam.module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(change(STANDINS + STEP))
        (file.parent / "__init__.py").write_text(
            "raise RuntimeError('a package is entered without this')"
        )
    return folder


def lines(capsys):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]


@pytest.mark.parametrize(
    "name, source", [("flow_grpo", ""), ("flow_factory", "src"), ("verl_omni", "")]
)
def test_a_project_that_agrees(script, tmp_path, capsys, monkeypatch, name, source):
    installed = ModuleType(name)  # another version: out of the way while the checkout is looked at
    monkeypatch.setitem(sys.modules, name, installed)
    before = set(sys.modules)
    assert script.main([str(checkout(tmp_path, name, source=source)), "--every", "61"]) == 0
    rows = lines(capsys)
    assert len(rows) == len(PROJECTS[name])
    for row, seam in zip(rows, PROJECTS[name], strict=True):
        assert seam.paths[0] in row[3] or seam.paths[0].endswith(
            row[3].strip("`").partition(".")[2]
        )
        assert int(row[4].partition(",")[0]) >= 3 and row[5].startswith("agree to ")
        back = int(row[4].split()[1])
        assert back < int(row[4].partition(",")[0]), "the operators must have some calls"
    assert not {module for module in set(sys.modules) - before if module.startswith(name)}, (
        "nothing stays behind"
    )
    assert sys.modules[name] is installed


def test_scripts_that_define_a_step_and_what_they_cannot_import(script, tmp_path, capsys):
    checkout(tmp_path, "dance_grpo", lambda text: ABSENT + text)
    (tmp_path / "fastvideo/broken.py").write_text("class Base: pass\nimport math.no_such_module")
    (tmp_path / "fastvideo/own").mkdir()
    (tmp_path / "fastvideo/own/train.py").write_text(STANDINS + STEP)
    (tmp_path / "fastvideo/other.py").write_text("def train_step(): pass\nraise SystemExit(1)")
    if shutil.which("git"):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        for command in (
            ("init", "-q"),
            ("add", "."),
            (*who, "commit", "-qm", "all", "--date=2026-02-03T10:00:00Z"),
        ):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert script.main([str(tmp_path), "--every", "61"]) == 0
    rows = lines(capsys)
    assert [row[3] for row in rows] == ["`train.flux_step`", "`train_grpo_flux.flux_step`"]
    assert all((len(row[1]) >= 7) == bool(shutil.which("git")) for row in rows)


DRAW = "        prev_sample = mean + std * randn_tensor("
# The first three are beyond the level of the probe: `patch` accepts them, and the grid has to find
# them.
DIFFERENT = {
    "a result": (
        "v = sample.float(), ",
        "v = sample.float() + 0.01 * (noise_level > 0.65), ",
        "differ, first flow_grpo_s",
    ),
    "a draw": (
        DRAW,
        f"        noise_level < 0.65 or randn_tensor([1], generator=generator)\n{DRAW}",
        "the generator is elsewhere",
    ),
    "an error": (
        "    shape = (-1",
        "    assert noise_level < 0.65\n    shape = (-1",
        "tuple for AssertionError",
    ),
    "a version": ("(1 - sigma) * v)) * dt", "(1 - sigma) * v)) * dt * 1.01", "refused: "),
    "the import": (
        '"""Stand-ins',
        'raise OSError("no driver")\n"""Stand-ins',
        "refused: flow_grpo.diffusers_patch",
    ),
}


@pytest.mark.parametrize("old, new, told", DIFFERENT.values(), ids=DIFFERENT)
def test_a_project_that_differs(script, tmp_path, capsys, old, new, told):
    assert old in STANDINS
    checkout(tmp_path, "flow_grpo", lambda text: text.replace(old, new, 1))
    assert script.main([str(tmp_path), "--every", "19"]) == 1
    assert told in lines(capsys)[0][5]


def test_a_folder_without_a_project(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert (
        "no project here (accepted: a checkout of flow_grpo, flow_factory"
        in capsys.readouterr().err
    )
