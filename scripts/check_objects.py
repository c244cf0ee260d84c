"""The lists of objects that follow from the edits, against those of the released sessions:

    python scripts/check_objects.py CHECKOUT

of github.com/yuxiaooye/Edit-R2: for each list the turns in which it is the same set of names, of
all that could be compared. The things of the source, which the release does not write down, are
what `all_objects` of the first turn has beyond what that turn brings; what a change of the
background leaves is taken from the release. Names after an edit are a language model's there (`dark
black hoodie`) and ours here (`black hoodie`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from editr2.annotate.fields import LISTS
from editr2.annotate.objects import Thing, Things, Unclear
from editr2.rewards.geometry import Edit, parse_edit

FILES = ("cm/test", "cm/train", "cu/test")


def source_of(row: dict[str, Any], edits: list[Edit]) -> list[Thing]:
    first, names = edits[0], row["all_objects"][0]
    brought = {first.new}
    if first.task in ("color_alter", "material_alter"):
        brought |= set(row["available_objects"][0]) - set(row["unchanged_objects"][0])
    if first.task == "text_change" and first.object is None:
        brought.add(first.text)
    source = [name for name in names if name not in brought]
    front = set(source)
    for t, edit in enumerate(edits):
        if edit.task == "background_change":
            before = row["available_objects"][t - 1] if t else source
            front -= set(before) - set(row["available_objects"][t])
            break
    return [Thing(name, foreground=name in front) for name in source]


def compare(row: dict[str, Any], counts: Counter[tuple[str, str]]) -> None:
    told = zip(row["formatted_instruction"], row["task_type"], row["instruction"], strict=True)
    edits = [parse_edit(*one)[0] for one in told]
    known = [edit for edit in edits if edit is not None]
    if len(known) < len(edits):
        counts["sessions", "not parsed"] += 1
        return
    now = Things(source_of(row, known))
    for t, edit in enumerate(known):
        try:
            now.apply(edit)
        except Unclear:
            counts["sessions", "unclear"] += 1
            return
        fields = now.fields()
        for name in LISTS:
            counts[name, "turns"] += 1
            counts[name, "same"] += set(fields[name]) == set(row[name][t])
        counts["bg_consistency", "turns"] += 1
        counts["bg_consistency", "same"] += fields["bg_consistency"] == row["bg_consistency"][t]


def main() -> int:
    counts: Counter[tuple[str, str]] = Counter()
    for name in FILES:
        text = (Path(sys.argv[1]) / "dataset" / f"{name}_metadata.jsonl").read_text("utf-8")
        for line in filter(None, text.splitlines()):
            counts["sessions", "all"] += 1
            compare(json.loads(line), counts)
    for what in ("all", "not parsed", "unclear"):
        print(f"sessions, {what}: {counts['sessions', what]:,}")
    for name in (*LISTS, "bg_consistency"):
        same, turns = counts[name, "same"], counts[name, "turns"]
        print(f"{name}: {same:,} of {turns:,} turns ({same / turns:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
