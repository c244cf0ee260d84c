"""Reads the public sets of the benchmarks whole, with stand-ins for their images:

    python scripts/check_benchmarks.py CHECKOUT [CHECKOUT ...]

of github.com/yuxiaooye/Edit-R2, TianyuCodings/EdiVal and PKU-YuanGroup/ImgEdit. Prints what is in
each file that a checkout has, and the hash of its prompts as `prompts: CHECKOUT` gives it; ends
with 1 where a set is not as large as its paper says, or a reference of the benchmark was made with
other prompts.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from editr2.benchmarks.table import Source, find
from editr2.rewards import edit_r2, edival, imgedit
from editr2.rewards.object_edits import FIELDS
from editr2.rewards.wording import Place, prompts_of
from editr2.sessions import Session
from editr2.sessions.importers import formats


@dataclass(frozen=True)
class File:
    """One of a checkout. images: their names. read: its sessions, of the file and the folder of
    images. expected: so many sessions and turns."""

    name: str
    images: Callable[[Path], Iterator[str]]
    read: Callable[[Path, Path], Iterator[Session]]
    expected: tuple[int, int]


def of_benchmark(name: str) -> Callable[[Path, Path], Iterator[Session]]:
    return lambda file, images: find(name).read(Source(file, images))


def of_mice(file: Path, images: Path) -> Iterator[Session]:
    return formats.mice(formats.Source(file, images, None))


def named_in_lines(file: Path) -> Iterator[str]:
    for line in filter(None, file.read_text("utf-8").split("\n")):
        yield json.loads(line)["image"]


def named_in_rows(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield f"{row['image_index']}_input_raw.jpg"


def named_in_members(file: Path) -> Iterator[str]:
    for edit in json.loads(file.read_text("utf-8")).values():
        yield edit["id"]


MICE, EDIVAL, IMGEDIT = map(of_benchmark, ("mice", "edival", "imgedit"))

FILES = (
    File("dataset/cm/train_metadata.jsonl", named_in_lines, of_mice, (1850, 5550)),
    File("dataset/cm/test_metadata.jsonl", named_in_lines, MICE, (360, 1080)),
    File("dataset/cu/test_metadata.jsonl", named_in_lines, MICE, (360, 1080)),
    File("oai_instruction_generation_output.csv", named_in_rows, EDIVAL, (572, 1716)),
    File("Benchmark/Basic/basic_edit.json", named_in_members, IMGEDIT, (737, 737)),
)

REWARDS: dict[str, tuple[str, dict[str, Place]]] = {
    "mice": ("edit-r2", edit_r2.PLACES),
    "edival": ("edival", edival.PLACES),
    "imgedit": ("imgedit", imgedit.PLACES),
}
"""Benchmark -> the folder of its reward's prompts, and where a checkout has them."""


def stand_ins(names: set[str], folder: Path) -> None:
    """A small picture under each of the names."""
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(folder / "one.png")


def check(checkout: Path, file: File) -> bool:
    path = checkout / file.name
    names = set(file.images(path))
    with tempfile.TemporaryDirectory() as folder:
        stand_ins(names, Path(folder))
        sessions, turns = 0, 0
        tasks: Counter[str] = Counter()
        for session in file.read(path, Path(folder)):
            assert session.image.shape == (8, 8, 3)
            sessions, turns = sessions + 1, turns + len(session.turns)
            tasks.update(turn.task or "none" for turn in session.turns)
    right = (sessions, turns) == file.expected
    print(f"{file.name}: {sessions:,} sessions, {turns:,} turns, {len(names):,} images")
    print(f"  {', '.join(f'{task} {count}' for task, count in sorted(tasks.items()))}")
    if not right:
        print(f"  expected {file.expected[0]:,} sessions, {file.expected[1]:,} turns")
    return right


def check_prompts(checkout: Path) -> bool:
    right = True
    for name, (folder, places) in REWARDS.items():
        if all((checkout / place.file).exists() for place in places.values()):
            digest = prompts_of(folder, str(checkout), places=places, fields=FIELDS).digest
            others = {p for ref in find(name).references for p in ref.prompts} - {digest}
            print(f"prompts of {folder}: {digest}")
            if others:
                print(f"  references of {name}: {', '.join(sorted(others))}")
            right = right and not others
    return right


def main() -> int:
    right = bool(sys.argv[1:])
    for checkout in map(Path, sys.argv[1:]):
        here = [file for file in FILES if (checkout / file.name).exists()]
        if not here:
            print(f"{checkout}: none of {', '.join(file.name for file in FILES)}")
        right = all([bool(here), *(check(checkout, one) for one in here), right])
        right = check_prompts(checkout) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
