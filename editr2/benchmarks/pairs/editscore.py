"""EditScore's EditReward-Bench (arXiv 2509.23909, Apache-2.0;
huggingface.co/datasets/EditScore/EditReward-Bench): 13 subtasks and three dimensions, a pair a row,
of which the first output is the better one. Read as its own evaluator does
(github.com/VectorSpaceLab/EditScore at 6e0f1b9a).

An output that stands in several rows has one key; it is asked about once. Published is, by
dimension, the mean over subtasks of the share of pairs whose first output scores higher; there a
tie is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from editr2.benchmarks.pairs.accuracy import Accuracy, Measure
from editr2.benchmarks.pairs.cells import Rows
from editr2.benchmarks.pairs.labelled import Comparison, Labelled, Pair
from editr2.benchmarks.pairs.printed import INTERVALS, cell
from editr2.benchmarks.pairs.table import PairSet
from editr2.benchmarks.table import Source
from editr2.errors import DataError, shown
from editr2.judge.text import Table
from editr2.sessions import Turn
from editr2.sessions.session import kind

HUB = "hf:EditScore/EditReward-Bench"

DIMENSIONS: Mapping[str, Sequence[str]] = {
    "overall": ("overall", "O"),
    "prompt_following": ("prompt_following", "IF"),
    "consistency": ("consistency", "CC"),
}
"""What is judged -> the names of a score of its own, if the reward has one."""

GROUPS: Mapping[str, Sequence[str]] = {
    "object": ("subject-add", "subject-remove", "subject-replace"),
    "appearance": ("color_alter", "material_alter", "style_change", "tone_transfer"),
    "scene": ("background_change", "extract"),
    "advanced": ("ps_human", "text_change", "motion_change", "compose"),
}
"""Subtasks that the paper's table puts together: the mean of theirs."""

_COLUMNS = ("key", "instruction", "input_image", "output_images", "task_type", "dimension")


def read(source: Source) -> Labelled:
    """See the module. Raises DataError with the row and the column."""
    found = Labelled()
    rows = Rows(source.path or HUB, _COLUMNS, ("input_image", "output_images"))
    for row, record in rows.records():
        keys = record.get("key", "texts")
        if len(keys) != 2 or keys[0] == keys[1] or not all(key.strip() for key in keys):
            raise record.error("key", f"{kind(keys)} (accepted: two keys that differ)")
        dimension, task = record.get("dimension", "text"), record.get("task_type", "text")
        if dimension not in DIMENSIONS:
            raise record.error(
                "dimension", f"{kind(dimension)} (accepted: {', '.join(DIMENSIONS)})"
            )
        instruction = record.get("instruction", "text")
        before = rows.picture(row, "input_image")
        if rows.length(row, "output_images") != 2:
            raise record.error("output_images", "not two (accepted: an image for each key)")
        for place, key in enumerate(keys):
            after = rows.picture(row, "output_images", place)
            found.add(f"{record.where}: key", key, Turn(instruction, task=task), before, after)
        found.comparisons.append(
            Comparison(
                f"row-{row:06d}",
                (Pair(*keys),),
                before.stamp,
                {"dimension": dimension, "task": task},
            )
        )
    if not found.comparisons:
        raise DataError(f"{shown(rows.path)}: no rows (accepted: at least one)")
    return found


def measured(accuracy: Accuracy) -> Iterator[Measure | None]:
    """By dimension: the mean over subtasks, as published, and of groups of them; and each."""
    tasks = accuracy.groups("task")
    for dimension in DIMENSIONS:
        own = {task: accuracy.some(dimension=dimension, task=task) for task in tasks}
        yield accuracy.average(f"average/dimension={dimension}", list(own.values()))
        for group, members in GROUPS.items():
            parts = [own[task] for task in members if task in own]
            yield accuracy.average(f"average/dimension={dimension}/group={group}", parts)
        for task, of in own.items():
            yield accuracy.accuracy(f"accuracy/dimension={dimension}/task={task}", of)
        of = accuracy.some(dimension=dimension)
        yield accuracy.accuracy(f"accuracy/dimension={dimension}", of)


def shown_as(measures: Mapping[str, Measure]) -> Iterator[Table]:
    """A column a dimension."""
    tasks = dict.fromkeys(key.partition("/task=")[2] for key in measures if "/task=" in key)
    lines = {task: f"accuracy/dimension={{}}/task={task}" for task in tasks}
    lines |= {group: f"average/dimension={{}}/group={group}" for group in GROUPS}
    lines |= {"average": "average/dimension={}", "all pairs": "accuracy/dimension={}"}
    rows = []
    for name, key in lines.items():
        cells = [cell(measures.get(key.format(dimension))) for dimension in DIMENSIONS]
        if any(each != "-" for each in cells):
            rows.append((name, cells))
    found = [measures.get(f"average/dimension={dimension}") for dimension in DIMENSIONS]
    by = [f"{name.replace('_', ' ')} by {each.by}" for name, each in zip(DIMENSIONS, found) if each]
    yield Table(
        "Right of pairs",
        [name.replace("_", " ") for name in DIMENSIONS],
        rows,
        f"Half is chance. Average: the mean over subtasks, as published. Judged: {', '.join(by)}. "
        f"{INTERVALS}",
    )


EDITSCORE = PairSet(
    title="EditScore's EditReward-Bench",
    read=read,
    measured=measured,
    shown_as=shown_as,
    headline=tuple(f"average/dimension={dimension}" for dimension in DIMENSIONS),
    stretched=True,
    scores=DIMENSIONS,
    about="arXiv 2509.23909; Apache-2.0; huggingface.co/datasets/EditScore/EditReward-Bench",
)
