"""What a stranger sees first: metadata, citation, templates, the sdist, the notebook."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import editr2.training
from editr2.config import replace_nested

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "demo.ipynb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py, which builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("editr2_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    sys.modules["editr2_setup"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------- one place


def test_the_version_stands_once():
    """Whoever says it asks the metadata."""
    version = PROJECT["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    places = [ROOT / "setup.py", ROOT / "CITATION.cff", ROOT / "Dockerfile"]
    places += [*ROOT.glob("editr2/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert [file.name for file in places if f'"{version}"' in file.read_text("utf-8")] == []


def test_the_address_stands_once_and_links_follow(setup):
    """Without one there are no links; nothing is invented."""
    assert setup.REPOSITORY == "" or setup.REPOSITORY.startswith("https://")
    assert setup.project_urls("") == {} and setup.readme("") == (ROOT / "README.md").read_text()
    home = "https://example.org/us/editr2"
    urls = setup.project_urls(home)
    assert urls["Homepage"] == home and all(url.startswith(home) for url in urls.values())
    for url in urls.values():
        _, _, path = url.partition("/main/")
        assert not path or (ROOT / path).exists(), url
    before, after = (
        re.findall(r"\]\(([^)\s]+)\)", text) for text in (setup.readme(""), setup.readme(home))
    )
    assert len(before) == len(after) > 10
    for old, new in zip(before, after):
        kept = old.startswith(("http", "#"))
        assert new == old if kept else new in (f"{home}/blob/main/{old}", f"{home}/raw/main/{old}")


def test_pictures_on_a_registrys_page_are_files_and_links_pages(setup, tmp_path, monkeypatch):
    text = "[![a](b.png)](docs/c.md#d) [e](#f) [g](https://h) ![i](https://j)\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    at = "https://k/l/m"
    expected = text.replace("(b.png)", f"({at}/raw/main/b.png)")
    assert setup.readme(at) == expected.replace("(docs/", f"({at}/blob/main/docs/")


def test_a_citation_says_what_the_metadata_says():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert said["cff-version"] == "1.2.0" and said["type"] == "software" and said["message"]
    assert said["authors"] == PROJECT["authors"] and said["license"] == PROJECT["license"]
    assert said["title"].startswith(PROJECT["name"])


# ----------------------------------------------------------------------------------------- workflow


def test_the_workflow_runs_what_a_change_must_pass():
    """And only commands and files that are there."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert {"run": ".ci/run"} in jobs["test"]["steps"] and (ROOT / ".ci" / "run").is_file()
    tested = [
        f"Programming Language :: Python :: {v}"
        for v in jobs["test"]["strategy"]["matrix"]["python"]
    ]
    claimed = [c for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert claimed == tested
    assert all(job["timeout-minutes"] for job in jobs.values())
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    assert {"cpu", "cuda"} < set(targets)
    assert set(re.findall(r"--target (\S+)", text)) <= set(targets)


def test_templates_are_forms():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text("utf-8"))
        if file.name == "config.yml":
            continue
        assert form["name"] and form["description"] and form["body"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert ids and len(ids) == len(set(ids))
        for path in re.findall(r"[\w/]+\.md", file.read_text("utf-8")):
            assert (ROOT / path).is_file(), path


# -------------------------------------------------------------------------------------------- sdist


@pytest.mark.exhaustive
def test_an_sdist_holds_the_tree(tmp_path):
    """What is tracked, and nothing that was built. That a wheel comes of it is the workflow's to
    show, and of the tree tests/test_packaging.py's."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what is tracked is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    names = {name for name in names if not name.startswith("editr2.egg-info/")}
    made = {"PKG-INFO", "setup.cfg"}
    assert names - made == tracked - {".gitignore"}
    assert {"editr2/py.typed", "kernels/editr2_kernels/py.typed", "csrc/bindings.cpp"} <= names


# ----------------------------------------------------------------------------------------- notebook


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_the_notebook_is_clean():
    """As it is written by hand: no outputs, nothing of whoever ran it, an id a cell."""
    text = NOTEBOOK.read_text("utf-8")
    book = json.loads(text)
    assert text == json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code and all(not c["outputs"] and c["execution_count"] is None for c in code)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell in its order, its numbers made small."""
    whole, trained = editr2.training.train, []

    def small(config):
        trained.append(config)
        few = {"sessions": 2, "siblings": 2, "steps": 2}
        return whole(replace_nested(config, {"rollout": few, "eval": {"steps": 2}}))

    monkeypatch.setattr(editr2.training, "train", small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells():
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if cell["id"] == "settings":
            source += "\nITERATIONS, HELDOUT = 1, 2"
        tree = ast.parse(source)
        if isinstance(last := tree.body[-1], ast.Expr):  # what the notebook shows
            tree.body[-1] = ast.copy_location(
                ast.Assign([ast.Name("shown", ast.Store())], last.value), last
            )
        exec(compile(ast.fix_missing_locations(tree), cell["id"], "exec"), names)
    (config,) = trained
    assert config.train.iterations == 1 and config.eval.sessions == 2
    compared, page = names["shown"]
    assert compared["turn"] == 3 and compared["sessions"] == 2
    assert (tmp_path / page).is_file() and names["strip"](names["after"]).size == (576, 144)
