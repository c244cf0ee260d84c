"""Plausible mistakes as a user makes them: each ends with one line that names what is wrong, and
exit 2.

A new mistake is a row. `python tests/test_mistakes.py` writes docs/mistakes.md, which shows what
each one prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.cli.main import main

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "shapes"
PAGE = ROOT / "docs" / "mistakes.md"

TINY = [
    "--train.iterations=2",
    "--eval.sessions=1",
    "--eval.strips=1",
    "--checkpoint.every=1",
    "--policy.intent=false",
]
TINY += [
    f"--rollout.{name}" for name in ("sessions=1", "siblings=2", "turns=1", "steps=2", "window=1")
]
"""Before the flags of a row, so that a mistake that is accepted costs seconds."""
SETTINGS = ("train", "eval", "rollout", "check")


@dataclass(frozen=True)
class Mistake:
    """what: in a user's words. command: after `editr2`; `{...}` is left to the shell. says: must
    stand in the line.

    given: files to write before, by path; a text, or a function of the path.
    """

    what: str
    command: str
    says: str
    given: dict[str, str | bytes | Callable[[Path], object]] = field(default_factory=dict)


def session(**changes: object) -> str:
    turns = [{"instruction": "add a cross top left"}]
    return json.dumps({"id": "a1", "image": "a.png", "turns": turns} | changes) + "\n"


def picture(size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Callable[[Path], object]:
    return lambda path: Image.new(mode, size).save(path)


def wide(path: Path) -> None:
    """80 megapixels in a file of kilobytes."""
    Image.new("1", (10_000, 8_000)).save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.full((24, 24), 0x12FF, np.uint16)).save(path)


def trained(path: Path) -> None:
    """A finished run of one iteration."""
    run = [*TINY, "--train.iterations=1", f"--out={path}"]
    assert quiet(["train", *run]) == 0


def policy_folder(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        import shutil

        from editr2.policies.unified.policy import EMBEDDED

        shutil.copytree(EMBEDDED, path)
        change(path)

    return make


def quiet(arguments: list[str]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(arguments)


DATA = {"data/a.png": picture(), "data/sessions.jsonl": session()}
JUDGE = "judge.py"
M = Mistake
MISTAKES = [
    # Flags and words.
    M("a command's name misspelt", "trian", "train"),
    M("no section before the field", "train --iterations 5", "--train.iterations"),
    M("a field misspelt", "train --train.iteration 5", "--train.iterations"),
    M("a flag shortened", "train --pre edit-r2", "--pre"),
    M("a word for a number", "train --train.lr fast", "a number"),
    M("a number for a pair", "train --policy.resolution 512", "policy.resolution"),
    M("a fraction of a session", "train --rollout.sessions 1.5", "rollout.sessions"),
    M("a flag without its value", "train --config", "--config: needs a value"),
    M("an unknown preset", "train --preset grpo", "flow-grpo"),
    M("yes for a switch that wants true", "train --policy.intent maybe", "policy.intent"),
    M("help about nothing there is", "train --help polcy", "did you mean policy?"),
    M("completion for a shell it has not", "completion ksh", "bash, zsh, tcsh, fish"),
    M("a tracker misspelt", "train --tracking wanbd", "'wanbd' is none of them"),
    # Values.
    M("a negative learning rate", "train --train.lr=-1e-4", "train.lr"),
    M("an infinite learning rate", "train --train.lr .inf", "train.lr"),
    M("one sibling", "train --rollout.siblings 1", "compares siblings"),
    M("noise above the sampler's bound", "train --rollout.noise_level 1.3", "rollout.noise_level"),
    M("a sampler of another project", "train --rollout.dynamics sde", "flow-sde"),
    M("a loss that is not there", "train --train.loss ppo", "grpo"),
    M("betas of 1 and above", "train --train.betas [1.0,2.0]", "train.betas"),
    M("a breaker of NaN", "train --train.max_failed_scores .nan", "train.max_failed_scores"),
    M("credit clipped to nothing", "train --credit.clip 0", "credit.clip"),
    M("a negative seed", "train --seed=-1", "seed"),
    M("a seed of 67 bits", "train --seed 100000000000000000000", "seed"),
    M("half precision in eval", "eval --policy.dtype float16", "policy.dtype"),
    M("an unknown sampler in rollout", "rollout --eval.sampler foo", "eval.sampler"),
    M("a window longer than the steps", "train --rollout.window 9", "rollout.window"),
    M("an unknown model", "train --policy.model flux", "kontext"),
    M(
        "an open bracket in a pattern",
        "train --policy.lora_rank 4 --policy.lora_targets to_(q",
        "policy.lora_targets",
    ),
    M("NFT with a window", "train --train.loss nft", "rollout.window"),
    # Configuration files.
    M("a configuration that is not there", "train --config my.yaml", "my.yaml"),
    M(
        "a misspelt key",
        "train --config my.yaml",
        "my.yaml:3",
        {"my.yaml": "seed: 1\ntrain:\n  lrr: 1\n"},
    ),
    M(
        "a list where a section belongs",
        "train --config my.yaml",
        "my.yaml:1",
        {"my.yaml": "train: [1, 2]\n"},
    ),
    M("a tab for spaces", "train --config my.yaml", "my.yaml:2", {"my.yaml": "train:\n\tlr: 1\n"}),
    M("a picture as configuration", "train --config a.png", "a.png", {"a.png": picture()}),
    M("a recipe's name misspelt", "check --config kontext-grpo", "kontext-grpo-80gb"),
    M(
        "a recipe where recipes once stood",
        "train --config configs/klein-nft-24gb.yaml",
        "the recipe klein-nft-24gb",
    ),
    M(
        "a path of the working folder in a file elsewhere",
        "train --config sub/my.yaml",
        "../data",
        {"sub/my.yaml": "data:\n  path: data\n", **DATA},
    ),
    # Paths.
    M("an output that is a file", "train --out notes", "notes", {"notes": "mine"}),
    M("an output below a file", "train --out notes/run", "notes", {"notes": "mine"}),
    *(
        M(
            f"the folder of all runs to {command.partition(' -')[0]}",
            f"{command} --out all",
            "such as all/mine; did you mean all/run?",
            {"all/run/metrics.jsonl": ""},
        )
        for command in ("train", "eval", "verifier sft --policy.weights judge --data traces")
    ),
    M("a data folder that is not there", "train --data nowhere", "nowhere"),
    M("a home folder that is not there", "train --data ~/no-such-sessions", "no-such-sessions"),
    M(
        "a data folder without sessions",
        "train --data data",
        "sessions.jsonl",
        {"data/a.png": picture()},
    ),
    M("weights that are not there", "eval --policy.weights nowhere", "nowhere"),
    M("a run in place of its policy", "eval --policy.weights run", "run", {"run": trained}),
    M("a folder that is no run", "report data", "data", DATA),
    M(
        "the folder around a run",
        "report all",
        "did you mean all/run?",
        {"all/run/metrics.jsonl": ""},
    ),
    M(
        "a run's name misspelt",
        "export mnie --out out",
        "did you mean mine?",
        {"mine/config.yaml": ""},
    ),
    M("an export of nothing", "export data --out out", "data", DATA),
    M("an export over something", "export run --out data", "data", {"run": trained, **DATA}),
    # Sessions and images.
    M(
        "a line cut off",
        "train --data data",
        "sessions.jsonl:1",
        {**DATA, "data/sessions.jsonl": session()[:40]},
    ),
    M(
        "no turns",
        "train --data data",
        "sessions.jsonl:1",
        {**DATA, "data/sessions.jsonl": session(turns=[])},
    ),
    M(
        "an empty instruction",
        "train --data data",
        "sessions.jsonl:1",
        {**DATA, "data/sessions.jsonl": session(turns=[{"instruction": " "}])},
    ),
    M(
        "an instruction in words that the shipped model has not",
        "train --data data",
        "sessions.jsonl:1",
        {**DATA, "data/sessions.jsonl": session(turns=[{"instruction": "make the sky purple"}])},
    ),
    M(
        "an image that is not there",
        "train --data data",
        "a.png",
        {"data/sessions.jsonl": session()},
    ),
    M(
        "an image of another size",
        "train --data data",
        "data.resize",
        {**DATA, "data/a.png": picture((32, 20))},
    ),
    M("a text called .png", "train --data data", "a.png", {**DATA, "data/a.png": "not an image"}),
    M("an image of 16 bits", "train --data data", "a.png", {**DATA, "data/a.png": deep}),
    M("an image of 80 megapixels", "train --data data", "a.png", {**DATA, "data/a.png": wide}),
    M(
        "the same id twice",
        "train --data data",
        "sessions.jsonl:2",
        {**DATA, "data/sessions.jsonl": session() * 2},
    ),
    M("an unknown format", "data import mgicbrush data --out out", "magicbrush", DATA),
    M("a release that is not there", "data import magicbrush nowhere --out out", "nowhere"),
    # Rewards.
    M("a reward's module misspelt", "train --reward.function jduge:Judge", "jduge"),
    M(
        "a reward without its name",
        "train --reward.function judge",
        "reward.function",
        {JUDGE: "x = 1\n"},
    ),
    M(
        "a reward's name misspelt",
        "train --reward.function judge:Jduge",
        "Jduge",
        {JUDGE: "x = 1\n"},
    ),
    M("a reward's table name misspelt", "train --reward.name brightnes", "brightnes"),
    M(
        "a reward named twice",
        "train --reward.name brightness --reward.function judge:Judge",
        "reward.function",
    ),
    M(
        "a judge that cannot start",
        "train --reward.function judge:Judge",
        "no key",
        {JUDGE: "class Judge:\n    def __init__(self):\n        raise KeyError('no key')\n"},
    ),
    M(
        "a judge that is down",
        "train --reward.function judge:judge",
        "ConnectionError",
        {JUDGE: "def judge(session, images):\n    raise ConnectionError('refused')\n"},
    ),
    M(
        "scores out of 10",
        "train --reward.function judge:judge",
        "7.5",
        {JUDGE: "def judge(session, images):\n    return [7.5] * len(images)\n"},
    ),
    M(
        "one score for many turns",
        "train --reward.function judge:judge --rollout.turns 3",
        "3",
        {JUDGE: "def judge(session, images):\n    return [0.5]\n"},
    ),
    M(
        "a judge that exits",
        "train --reward.function judge:judge",
        "SystemExit",
        {JUDGE: "def judge(session, images):\n    raise SystemExit(0)\n"},
    ),
    M(
        "a verifier's folder that is not there",
        "train --reward.name verifier --reward.options.weights ./judge",
        "no such folder",
    ),
    M(
        "a verifier in process and behind a server",
        "train --reward.name verifier --reward.options.weights ./judge "
        "--reward.options.url http://127.0.0.1:8000/v1",
        "beside a url",
    ),
    M(
        "a verifier in process with a server's option",
        "train --reward.name verifier --reward.options.weights ./judge --reward.options.model ours",
        "of a server alone",
    ),
    M("weights of other rewards", "train --credit.weights.Beauty 1.0", "credit.weights"),
    # Folders of earlier work.
    M(
        "a torn policy",
        "eval --policy.weights mine",
        "model.safetensors",
        {"mine": policy_folder(lambda p: (p / "model.safetensors").write_bytes(b"\x10"))},
    ),
    M(
        "a policy without its tokenizer",
        "eval --policy.weights mine",
        "tokenizer.json",
        {"mine": policy_folder(lambda p: (p / "tokenizer.json").unlink())},
    ),
    M("another seed for an old run", "train --out run --seed 1", "seed", {"run": trained}),
    M(
        "other settings for an old run",
        "train --out run --train.lr 1e-3",
        "train.lr",
        {"run": trained},
    ),
    M(
        "a checkpoint with a hole",
        "train --out run",
        "step_000001",
        {"run": lambda p: (trained(p), next(p.glob("checkpoints/*/policy.safetensors")).unlink())},
    ),
    # A configuration to begin with.
    M(
        "a copy of a recipe over a file",
        "recipes klein-nft-24gb --to a.yaml",
        "a.yaml",
        {"a.yaml": ""},
    ),
    M(
        "init over a configuration",
        "init mine",
        "mine/train.yaml",
        {"mine/train.yaml": "seed: 1\n"},
    ),
    M("init on pictures alone", "init mine --data data", "data make", {"data/a.png": picture()}),
    M("init of an editor on the world", "init mine --model kontext --data world", "data.path"),
    M(
        "init from one of several configurations",
        "init mine --from their.py",
        "their.py:NAME; first, second",
        {"their.py": "def first():\n    return 1\n\n\ndef second():\n    return 2\n"},
    ),
    M(
        "init from a configuration of nobody known",
        "init mine --from my.yaml",
        "Flow-Factory",
        {"my.yaml": "train:\n  lr: 1\n"},
    ),
    M(
        "scores into a run's folder",
        "eval --out run",
        "the folder of a run",
        {"run": trained},
    ),
    # Other commands.
    M("a negative number of sessions", "world make --out w --count=-1", "count"),
    M("a split that is none", "world make --out w --split test", "heldout"),
    M("an arm that is none", "reproduce --arms best", "best"),
    M("an unknown device", "check --gpu h1000", "h100"),
    M("no processes", "check --processes 0", "--processes"),
]


def run(mistake: Mistake, folder: Path) -> tuple[int, str]:
    """Exit status and what stands on standard error."""
    for name, content in mistake.given.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = io.StringIO()
    sys.path.insert(0, str(folder))
    before, here = set(sys.modules), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            command, *flags = mistake.command.split()
            status = main([command, *(TINY if command in SETTINGS else []), *flags])
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name == JUDGE.removesuffix(".py"):
                del sys.modules[name]
    return status, said.getvalue().replace(f"{folder.resolve()}/", "").replace(
        str(Path.home()), "~"
    )


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.what.replace(" ", "-") for m in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy(mistake: Mistake, tmp_path: Path) -> None:
    status, said = run(mistake, tmp_path)
    line = [line for line in said.splitlines() if line.strip()][-1]
    assert status == 2 and line.startswith("error: ") and mistake.says in line
    assert "Traceback" not in said and "<class" not in said


def test_the_page_has_every_mistake() -> None:
    """And no other; the answers are as of its writing."""
    written = [
        line.rpartition(" | ")[0]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert written[1:] == [f"| {m.what} | `editr2 {m.command}`" for m in MISTAKES]


def page() -> str:
    """docs/mistakes.md."""
    rows = []
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            said = run(mistake, Path(folder))[1].strip().splitlines()[-1]
        mark = "``" if "`" in said else "`"
        cells = [
            mistake.what,
            f"`editr2 {mistake.command}`",
            f"{mark}{said}{mark}".replace("|", "\\|"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "# What a mistake prints",
        "",
        f"{len(rows)} plausible mistakes and what the command line says of each, before it exits "
        f"with 2.",
        "`tests/test_mistakes.py` makes every one of them in `make test` and wrote this page. "
        "`data/`, `my.yaml`,",
        "`judge.py` and the like are files with that mistake in them.",
        "",
        "| mistake | command | answer |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
