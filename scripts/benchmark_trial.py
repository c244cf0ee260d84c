"""Runs benchmarks from end to end on a few of their own sessions, without any weights:

    python scripts/benchmark_trial.py CHECKOUT [CHECKOUT ...] [--sessions 10] [--out FOLDER]

of github.com/yuxiaooye/Edit-R2, TianyuCodings/EdiVal and PKU-YuanGroup/ImgEdit. Images are drawn
in place of the sets' own, the editor is a FLUX.1-Kontext of a few thousand random weights, detector
and image encoder are as small, and the judge is a server on this machine that says yes or no by a
hash of what it is asked. So the numbers mean nothing, and everything between a set's file and its
report is real. Ends with 1 where a stage fails or anything was not judged.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from check_benchmarks import FILES, File
from PIL import Image

from editr2.cli.main import main as editr2

ROOT = Path(__file__).parent.parent
NAMES = {
    "dataset": "mice",
    "oai_instruction_generation_output.csv": "edival",
    "Benchmark": "imgedit",
}
"""First part of a file's name in `FILES` -> the benchmark."""


def beside(name: str) -> ModuleType:
    """Of tests/, which is on nobody's import path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def says(body: dict[str, Any], k: int) -> str:
    """By what is asked, and which vote it is."""
    content = json.dumps(body["messages"][0]["content"])
    digest = hashlib.sha256(f"{content}{body.get('seed')}{k}".encode()).digest()
    word = ("yes", "no")[digest[0] % 2]
    if "answer_final" in content:
        return f"<answer_turn_1>{word}</answer_turn_1> <answer_final>{word}</answer_final>"
    if marks := re.findall(r"(\w+): your mark", content):
        return "\n".join(f"{name}: {1 + digest[n] % 5}" for n, name in enumerate(marks))
    return word


def draw(names: set[str], folder: Path) -> None:
    """A blurred picture of its own under each of the names."""
    for n, name in enumerate(sorted(names)):
        coarse = np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(path)


def parts(folder: Path) -> dict[str, str]:
    """The tiny editor, detector and encoder."""
    editors, lookers = beside("tiny_editors"), beside("tiny_lookers")
    editors.kontext_pipeline(seed=0).save_pretrained(folder / "kontext")
    return {
        "kontext": str(folder / "kontext"),
        "detector": str(lookers.grounding_dino(folder / "dino")),
        "features": str(lookers.dinov3(folder / "dinov3")),
    }


def flags(
    file: File, checkout: Path, images: Path, tiny: dict[str, str], url: str
) -> Iterator[str]:
    name = NAMES.get(file.name.partition("/")[0], "edival")
    yield from (name, "--data", str(checkout / file.name), "--sources", str(images))
    yield from ("--policy.model", "kontext", "--policy.weights", tiny["kontext"])
    yield from ("--policy.resolution", "64x64", "--policy.text_tokens", "512")
    yield from ("--data.resize", "stretch", "--rollout.steps", "3")
    yield from (f"--reward.options.url={url}", "--reward.concurrency", "4")
    if name != "imgedit":
        yield from (f"--reward.options.{one}={tiny[one]}" for one in ("detector", "features"))
        # So low that a detector of random weights finds some things.
        yield "--reward.options.thresholds={add: 0.0, kept: 0.0, consistency: 0.0}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--out", type=Path, help="keeps the folders of the benchmarks")
    given, right = parser.parse_args(), True
    with tempfile.TemporaryDirectory() as temporary:
        out, tiny = given.out or Path(temporary), parts(Path(temporary) / "parts")
        for checkout in given.checkouts:
            for file in (f for f in FILES if "train" not in f.name):
                if not (checkout / file.name).exists():
                    continue
                images = Path(temporary) / "images" / file.name.replace("/", "-")
                draw(set(file.images(checkout / file.name)), images)
                into = out / file.name.replace("/", "-")
                with beside("judge_server").JudgeServer(says=says) as judge:
                    begin = time.monotonic()
                    words = [*flags(file, checkout, images, tiny, judge.url)]
                    words += ["--sessions", str(given.sessions), "--out", str(into)]
                    status = editr2(["benchmark", *words])
                    asked, seconds = len(judge.chats), time.monotonic() - begin
                counts = of_states(into / "scores.jsonl") if not status else {}
                print(f"{file.name}: {asked} answers, {seconds:.0f} s; {counts}", flush=True)
                right = right and bool(counts) and not {"failed", "missing"} & set(counts)
    return 0 if right else 1


def of_states(file: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in file.read_text().splitlines():
        state = json.loads(line)["state"]
        found[state] = found.get(state, 0) + 1
    return found


if __name__ == "__main__":
    sys.exit(main())
