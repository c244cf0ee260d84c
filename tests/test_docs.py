"""Every code block of the README and of docs/ is run, or is named here with the reason why there is
nothing to run.

Python is executed; commands go through the real parser and the rules of the settings, up to where
work would begin, so a renamed flag, preset or file fails; what a page prints as output is what
comes out.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from editr2.cli.main import main
from editr2.config import Config, replace_nested
from editr2.policies.rules import check_config
from editr2.rewards.verifier import SHIPPED
from editr2.sessions import save_sessions, validate
from editr2.worlds.shapes import make_session

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """README, rewards, tutorials/verifier: a page's own, where stems are not."""
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


COMMAND = re.compile(r"^(\$ )?(editr2|torchrun|make) ")

# A judge of a few lines, where a page has `my_reward`, `my_judge:Judge` or
# `my_package.judge:reward`.
JUDGE = '''
class Judge:
    """The share of pixels that a turn left alone."""

    names = ("kept",)

    def __call__(self, session, images):
        before = [session.image, *images]
        return [float((old == new).all(-1).mean()) for old, new in zip(before, images)]


reward = Judge()
'''


@dataclass(frozen=True)
class Block:
    """language: what stands behind the fence, "" for none and for an indented block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones after an empty line (Markdown's two kinds)."""
    lines, at = page.read_text("utf-8").splitlines(), 0
    while at < len(lines):
        start = at + 1
        if lines[at].startswith("```"):
            end = lines.index("```", start)
            yield Block(page, start, lines[at][3:].strip(), "\n".join(lines[start:end]))
            at = end
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            end = next(
                (i for i in range(at, len(lines)) if not lines[i].startswith("    ")), len(lines)
            )
            yield Block(page, start, "", "\n".join(line[4:] for line in lines[at:end]))
            at = end
        at += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [b for b in BLOCKS if b.language in ("", "console", "sh", "bash") and COMMAND.match(b.text)]
PYTHON = {
    name_of(page): [b for b in BLOCKS if b.language == "python" and b.page == page]
    for page in PAGES
}
OTHER = [b for b in BLOCKS if b not in SHELL and b.language != "python"]

NOT_RUN = {
    ("design", "μ = A·x"): "a formula",
    ("design", "csrc/ "): "the tree of the repository",
    (
        "data",
        "my_set/sessions.jsonl:7: turns[1].instruction: of",
    ): "needs klein's tokenizer; tests/test_instructions.py",
    (
        "data",
        "my_set/sessions.jsonl:4: references: of session",
    ): "needs Qwen's weights; tests/test_edit.py",
    ("methods", "1/(turns that train"): "a formula",
    ("judges", "vllm serve"): "another program",
    ("judges", "python -m sglang"): "another program",
    ("judges", "transformers serve"): "tests/test_judge_served.py",
    ("rewards", '{"id": "kitchen", "turn": 1, "output"'): "labels; tests/test_judge.py",
    ("labelling", '{"id": "k1"'): "a question; tests/test_label.py",
    ("verifier", "The cup is red now"): "a trace; tests/test_traces.py",
    ("verifier", "# pool.yaml"): "the commands below it read it",
    ("recipes", "# their.yaml"): "the command below it reads it",
    ("verifier", "background wants black"): "a trace; tests/test_verifier_world.py",
    ("tutorials/verifier", "6800 edits"): "of thousands; the commands run, with fewer sessions",
    ("tutorials/verifier", "iteration 0, held out"): "what a run prints; its numbers are its own",
    ("tutorials/verifier", "judged: 100 of 100"): "of the shipped verifier; as above",
    ("tutorials/verifier", "before (iteration 0"): "of a run; as above",
    ("releasing", "python -m build"): "the workflow's; tests/test_shop.py, tests/test_packaging.py",
    ("benchmarks", "OUT/benchmark.json"): "the files of a folder; tests/test_benchmark.py",
    ("benchmarks", '{"image": "kitchen"'): "a row; tests/test_benchmark_summary.py",
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with what the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(ROOT / "examples" / "shapes", tmp_path / "annotated")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "runs" / "gcpo").mkdir(parents=True)
    (tmp_path / "runs" / "gcpo" / "verifier").symlink_to(SHIPPED)  # as of a training
    (tmp_path / "kontext-lora").mkdir()
    for name in ("README.md", "editr2.yaml"):  # as of an export
        (tmp_path / "kontext-lora" / name).touch()
    labelled(tmp_path / "my_pairs")
    assert main(["label", "export", "my_pairs", "--out", "pairs/pairs.jsonl"]) == 0
    their = [{"prompt": "red", "path_src": "0.png", "path1": "1.png", "path2": "2.png"}]
    shutil.copytree(tmp_path / "my_pairs", tmp_path / "their")
    (tmp_path / "their" / "preferences.json").write_text(json.dumps(their))
    (tmp_path / "my.yaml").write_text("train:\n  iterations: 9\n")
    pool = next(block.text for block in BLOCKS if block.text.startswith("# pool.yaml"))
    (tmp_path / "pool.yaml").write_text(pool)
    their = next(block.text for block in BLOCKS if block.text.startswith("# their.yaml"))
    (tmp_path / "their.yaml").write_text(their)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "judge.py").write_text(JUDGE)
    of_page = "\n\n".join(block.text for block in PYTHON["rewards"])
    (tmp_path / "my_judge.py").write_text(of_page + JUDGE)
    (tmp_path / "calm.py").write_text(PYTHON["tutorials/own-judge"][0].text)
    exec(PYTHON["tutorials/own-pictures"][0].text, {})  # writes my_photos
    yield tmp_path
    for name in ("calm", "my_judge", "my_package", "my_package.judge"):
        sys.modules.pop(name, None)


def labelled(folder: Path) -> None:
    """A folder that `editr2 label` was given, with a vote."""
    from PIL import Image

    from editr2.label.questions import read_questions
    from editr2.label.store import Store, Vote

    folder.mkdir()
    for n in range(3):
        Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(folder / f"{n}.png")
    row = {"id": "a", "image": "0.png", "outputs": ["1.png", "2.png"], "instruction": "red"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    store = Store(folder)
    store.ask(read_questions(folder))
    store.vote("a vote", 1, Vote("a", "anna", (0, 1), (0, 1)))
    store.close()


class Enough(Exception):
    """The command was understood; here its work would begin."""


@pytest.fixture
def understood(monkeypatch):
    """Runs a command up to where work would begin, and gives what it was understood as."""
    import editr2.benchmarks.run
    import editr2.editing
    import editr2.rl.loop
    import editr2.scoring  # noqa: F401  # all before what they import is replaced
    from editr2.benchmarks.settings import benchmark_problems, with_defaults
    from editr2.benchmarks.table import find
    from editr2.check.devices import find_device
    from editr2.cli import settings, world
    from editr2.policies.found import Editor
    from editr2.rewards.load import load_eval_reward, load_reward
    from editr2.rl.rules import check_run
    from editr2.sessions.importers import FORMATS

    seen, processes = [], [1]
    real = settings.run_config

    def run_config(*arguments, **options):
        config, extra = real(*arguments, **options)
        check_config(config)
        seen.append(config)
        return config, extra

    def planned(config, gpu="h100", processes_=1, **_):
        find_device(gpu)
        apart = load_eval_reward(config.eval)
        check_run(
            config,
            load_reward(config.reward).names,
            None,
            cannot_pack=None,
            processes=max(processes),
            apart=apart.names if apart else (),
        )
        raise Enough

    def enough(*_, **__):
        seen.append(None)
        raise Enough

    def imported(format, source, out, **_):
        assert format in FORMATS
        enough()

    monkeypatch.setattr("editr2.cli.settings.run_config", run_config)
    monkeypatch.setattr("editr2.training.train", planned)
    monkeypatch.setattr("editr2.check.preflight", planned)
    monkeypatch.setattr("editr2.sessions.importers.import_sessions", imported)
    for work in (
        "policies.load.open_policy",
        "scoring.open_policy",
        "report.build_report",
        "annotate.annotate.annotate",
        "annotate.corrections.corrected",
        "annotate.make.images_of",
        "export.export.export",
        "export.push.open_hub",
        "reproduce.runs.reproduce",
        "judge.whole.judge",
        "judge.asking.write_asked",
        "label.serve.serve",
        "watch.serve.serve",
        "verifier.principles.write_principles",
        "verifier.tracing.write_traces",
        "verifier.select.write_selection",
        "verifier.loop.train_verifier",
        "verifier.preflight.preflight",
        "verifier.evaluate.evaluate_verifier",
        "benchmarks.rewards.run_rewards",
        "benchmarks.compare.compare",
        "benchmarks.runs.compare_runs",
    ):
        monkeypatch.setattr(f"editr2.{work}", enough)

    def benchmarked(config, name, *_):
        kind = find(name)
        assert list(benchmark_problems(with_defaults(config, kind), kind)) == []
        enough()

    monkeypatch.setattr("editr2.benchmarks.run.run_benchmark", benchmarked)
    sessions = world._sessions

    def fewer(options):  # a page's set of thousands shows no more than two do
        return sessions(options | {"count": min(options["count"], 2)})

    monkeypatch.setattr("editr2.cli.world._sessions", fewer)
    # Runs that the pages speak of are not there; tests/test_found_policies.py names real ones.
    monkeypatch.setattr("editr2.policies.found.editor_of", lambda text, _: Editor({}, text))
    monkeypatch.setattr("editr2.cli.settings.tell", lambda *_: None)
    monkeypatch.setattr("editr2.scoring._tell", lambda *_: None)

    def run(words: list[str]):
        seen.clear()
        processes[0] = 1
        if words[0] == "torchrun":
            processes[0] = int(words[words.index("--nproc_per_node") + 1])
            words = ["editr2", *words[words.index("-m") + 2 :]]
        try:
            code = main(words[1:])
        except Enough:
            code = 0
        return code, (seen or [None])[0]

    return run


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(a command, the lines of output that the page shows for it)."""
    command, output = None, []
    for line in block.text.splitlines():
        if COMMAND.match(line):
            if command:
                yield command, output
            command, output = line.removeprefix("$ "), []
        elif line.strip():
            output.append(line)
    yield command, output


def written_out(command: str) -> list[str]:
    """Words of a command; in a synopsis every option is given, its first choice, and names stand
    for what they name."""
    words = shlex.split(command, comments=True)
    if ">" in words:  # where its output goes is the shell's
        words = words[: words.index(">")]
    if "FORMAT" in words:
        words = [w.strip("[]").split("|")[0] for w in words]
        words = [{"FORMAT": "mice", "N": "3"}.get(w, w) for w in words]
    return [w for w in words if w != "..."]


WRITES_SETTINGS = {"init", "recipes"}
"""Commands whose files later blocks of a page name."""


@pytest.mark.parametrize("block", SHELL, ids=lambda b: b.name)
def test_commands_are_understood(block, workspace, understood, capsys):
    seven = [replace(make_session(0, i), id=f"s{i}") for i in range(7)]
    lines = save_sessions(seven, workspace / "my_set").read_text().splitlines()
    third = json.loads(lines[2])
    third["turns"][1]["instruction"] = " "
    seventh = json.loads(lines[6]) | {"image": "images/7.png"}
    lines[2], lines[6] = json.dumps(third), json.dumps(seventh)
    (workspace / "my_set" / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    for earlier in SHELL[: SHELL.index(block)]:
        for command, _ in commands(earlier) if earlier.page == block.page else ():
            if (words := written_out(command))[1] in WRITES_SETTINGS:
                understood(words)
    capsys.readouterr()
    for command, output in commands(block):
        words = written_out(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                command
            )
            continue
        code, _ = understood(words)
        told = capsys.readouterr()
        if output:
            assert (told.out + told.err).splitlines() == output, command
        else:
            assert code == 0 and not told.err, (command, told.err)


@dataclass
class Pipe:
    """A pipeline as diffusers' are towards their scheduler."""

    scheduler: object

    def transformer(self, *_):
        return (torch.ones(4, 16, 8, requires_grad=True) / 2,)

    def __call__(self, prompt, num_images_per_prompt):
        self.scheduler.set_timesteps(4)
        x = torch.randn(num_images_per_prompt, 16, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(torch.ones_like(x) / 2, t, x).prev_sample
        return SimpleNamespace(images=x)


def names_for(page: str) -> dict:
    """What a page's blocks take as given."""
    if page == "README":
        judge: dict = {}
        exec(JUDGE, judge)
        return {"my_reward": judge["reward"]}
    if page == "integrations":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return {"pipe": Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0)), "prompt": "a cup"}
    if page == "operators":
        import editr2_kernels

        x, x_next, v, v_text, v_image, v_ref = (torch.randn(2, 16, 8) for _ in range(6))
        given = {
            "x": x,
            "x_next": x_next,
            "v": v.requires_grad_(),
            "v_text": v_text,
            "v_image": v_image,
            "v_ref": v_ref,
        }
        given |= {"step_index": torch.tensor([0, 1]), "seed": torch.tensor([11, 12]), "total": 2}
        given |= {
            "old_log_prob": torch.zeros(2),
            "advantage": torch.ones(2),
            "trains": torch.ones(2, dtype=torch.bool),
        }
        return {name: getattr(editr2_kernels, name) for name in editr2_kernels.__all__} | given
    return {}


WHOLE = [pytest.mark.exhaustive, pytest.mark.slow]  # its parts are tested in tests/test_watch.py


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=WHOLE if page == "watching" else [])
        for page, blocks in PYTHON.items()
        if blocks
    ],
)
def test_python_runs(page, workspace, monkeypatch, peers):
    import editr2.rl.loop

    real, runs = editr2.rl.loop.train, []

    def small(config, **given):
        sizes = {
            "sessions": 1,
            "siblings": 2,
            "turns": 2,
            "steps": 2,
            "window": 1,
            "groups_per_batch": 1,
        }
        less = {"rollout": sizes, "train": {"iterations": 1}, "eval": {"sessions": 1, "strips": 1}}
        less["policy"] = {"intent": False}
        runs.append(real(replace_nested(config, less), **given))
        return runs[-1]

    monkeypatch.setattr("editr2.training.train", small)
    shown: list = []
    if page == "watching":
        notebook = SimpleNamespace(update=shown.append)
        notebook.display = lambda thing, display_id: shown.append(thing) or notebook
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=notebook))
        monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    names = names_for(page)
    for block in PYTHON[page]:
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)
    if page == "watching":
        assert "iteration 1" in repr(shown[-1]) and "<svg" in shown[-1]._repr_html_()
    if page == "README":
        row = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
        assert [r["failed_scores"] for r in row if r["event"] == "train"] == [0]


@pytest.mark.parametrize("name", ["warmth", "DoneAndKept", "brightness"])
def test_the_judges_of_the_page_judge(name, workspace):
    from editr2.config import RewardConfig
    from editr2.rewards.adapt import score_batch
    from editr2.rewards.load import load_reward

    session = make_session(0, 0)
    images = np.stack([session.image, 255 - session.image, session.image])
    reward = load_reward(RewardConfig(f"my_judge:{name}"))
    scores = score_batch(reward, [(session, images)] * 2, len(session.turns))
    assert scores.failed == 0 and reward.names == (
        ("IF", "CC") if name == "DoneAndKept" else (name,)
    )
    assert scores.not_applicable == (
        4 if name == "DoneAndKept" else 0
    )  # inverted, and back: nothing is kept


def test_other_blocks(workspace, understood, capsys):
    """Sessions are valid sessions, output is what comes out, and the rest is named."""
    from editr2.cli.settings import run_config
    from editr2.rewards.base import weights_of
    from editr2.rewards.load import load_reward

    for block in OTHER:
        if any(p == name_of(block.page) and block.text.startswith(start) for p, start in NOT_RUN):
            continue
        if block.text.startswith('{"id"'):
            text = " ".join(line.strip() for line in block.text.splitlines())
            from PIL import Image

            for name in (json.loads(text)["image"], *json.loads(text).get("references", ())):
                image = workspace / "set" / name
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(make_session(0, 0).image).save(image)
            (workspace / "set" / "sessions.jsonl").write_text(text + "\n")
            assert not list(validate(workspace / "set")), block.name
        elif re.match(r"[a-z]+:\n", block.text):  # a configuration
            (workspace / "shown.yaml").write_text(block.text)
            config, _ = run_config("editr2 train", "", ["--config", "shown.yaml"])
            weights_of(load_reward(config.reward).names, config.credit.weights)
        elif block.text.startswith("16 sessions;"):
            assert main(["data", "validate", "examples/shapes"]) == 0
            assert capsys.readouterr().out.strip() == block.text
        else:
            pytest.fail(f"{block.name}: a block that nothing runs: {block.text[:60]!r}")


def settings(config: object, prefix: str = "") -> Iterator[str]:
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        yield prefix + field.name
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_a_page_names_are_there(page):
    from editr2.verifier.settings import GcpoConfig, SftConfig

    own = [SftConfig(), GcpoConfig()] if page.stem == "verifier" else []
    known = {name for config in (Config(), *own) for name in settings(config)}
    sections = "|".join(
        name for name in known if any(other.startswith(f"{name}.") for other in known)
    )
    named = re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)\b(?!\.|/|\()", page.read_text("utf-8"))
    files = {
        name for name in named if name.rpartition(".")[2] in ("py", "md", "jsonl", "yaml", "json")
    }
    assert set(named) - files <= known
