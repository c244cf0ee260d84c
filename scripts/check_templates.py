"""Check the instruction templates of `editr2.rewards.geometry` against the released benchmarks.

    python scripts/check_templates.py CHECKOUT ...

A checkout of github.com/yuxiaooye/Edit-R2 (MICE-Bench: dataset/{cm,cu}/*_metadata.jsonl) or of
github.com/TianyuCodings/EdiVal (its CSV). Prints how many turns of each kind of edit can be read,
at which commit, and what cannot, by its reason: some fields of the release are empty, or hold what
a language model thought aloud. Exits with 1 where more than 1 % fit no template, and with 2 where
there is nothing to read.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from editr2.rewards.geometry import TASKS, parse_edit

CSV = "oai_instruction_generation_output.csv"
ENOUGH = 0.99


class Turn(NamedTuple):
    session: str
    task: str
    instruction: str
    formatted: str


def mice(file: Path) -> Iterator[Turn]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")):
        if line.strip():
            row = json.loads(line)
            columns = (row["task_type"], row["instruction"], row["formatted_instruction"])
            for values in zip(*columns, strict=True):
                yield Turn(f"{file}:{number}", *values)


def edival(file: Path) -> Iterator[Turn]:
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            columns = ("task_type", "instructions", "format_instructions")
            yield Turn(row["image_index"], *(ast.literal_eval(row[name])[-1] for name in columns))


def turns(checkout: Path) -> Iterator[Turn]:
    for file in sorted(checkout.rglob("*_metadata.jsonl")):
        yield from mice(file)
    for file in sorted(checkout.rglob(CSV)):
        yield from edival(file)


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(command, capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else "no commit"


def check(checkout: Path) -> float | None:
    """Prints the table of one checkout; the share that fits a template, None where there is
    nothing."""
    total: Counter[str] = Counter()
    read: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kept, fit, sessions = 0, 0, set()
    for turn in turns(checkout):
        edit, why = parse_edit(turn.formatted, turn.task, turn.instruction)
        sessions.add(turn.session)
        total[turn.task] += 1
        fit += edit is not None or "no template of" not in why
        if edit is None:
            # What was given stands first, in quotes; its kind is what is left without the values.
            kind = why.rpartition("': ")[2].rpartition('": ')[2]
            reasons[f"{turn.task}: {kind}"] += 1
            continue
        read[turn.task] += 1
        kept += bool(edit.kept)
    if not total:
        return None
    print(f"{checkout.name} at {commit(checkout)}: {len(sessions)} sessions")
    for task in (*TASKS, *sorted(set(total) - set(TASKS))):
        print(f"  {task:<18} {read[task]:>6} {total[task]:>6}")
    every = sum(total.values())
    share = fit / every
    print(f"  {'all':<18} {sum(read.values()):>6} {every:>6}; {fit} ({share:.2%}) fit a template")
    print(f"  {kept} of {read['background_change']} new backgrounds name what they keep")
    for reason, count in reasons.most_common():
        print(f"  not read: {count} {reason}")
    return share


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    shares = {folder: check(folder) for folder in parser.parse_args().checkouts}
    for folder, share in shares.items():
        if share is None:
            print(
                f"error: {folder}: nothing to read (accepted: a folder with "
                f"*_metadata.jsonl of MICE-Bench or {CSV} of EdiVal-Bench)",
                file=sys.stderr,
            )
    if None in shares.values():
        return 2
    return int(any(share is not None and share < ENOUGH for share in shares.values()))


if __name__ == "__main__":
    raise SystemExit(main())
