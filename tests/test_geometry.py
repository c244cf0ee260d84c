"""Boxes and sides, names, and instructions read by their templates."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from editr2.rewards.geometry import (
    APART,
    SIDES,
    TASKS,
    Box,
    Edit,
    Found,
    deduplicate,
    inside,
    iou,
    is_beside,
    kept_objects,
    parse_edit,
    released_singular,
    sides,
    singular,
)

HERE = Path(__file__).parent
LINES = [
    json.loads(line)
    for line in (HERE / "edit_templates.jsonl").read_text("utf-8").split("\n")
    if line
]
UNIT = Box(0.2, 0.2, 0.6, 0.6)


@pytest.mark.parametrize(
    "box, expected",
    [
        (UNIT, 1.0),
        (Box(0.4, 0.2, 0.8, 0.6), 1 / 3),
        (Box(0.3, 0.3, 0.5, 0.5), 0.25),
        (Box(0.6, 0.2, 0.9, 0.6), 0.0),  # they touch
        (Box(0.7, 0.7, 0.9, 0.9), 0.0),
        (Box(0.3, 0.3, 0.3, 0.5), 0.0),  # without area
    ],
)
def test_overlap(box: Box, expected: float) -> None:
    assert iou(UNIT, box) == pytest.approx(expected) == iou(box, UNIT)


def test_of_two_points_nothing_overlaps() -> None:
    point = Box(0.5, 0.5, 0.5, 0.5)
    assert iou(point, point) == 0.0


@pytest.mark.parametrize(
    "values",
    [
        (0, 0, 1),
        (0, 0, 1, 1, 1),
        (0, math.nan, 1, 1),
        (0, 0, math.inf, 1),
        (0.5, 0, 0.4, 1),
        "abcd",
    ],
)
def test_what_is_no_box(values: object) -> None:
    with pytest.raises(ValueError, match="^box: .*accepted: "):
        Box.of(values)  # type: ignore[arg-type]


def test_a_box_over_the_edge_is_clamped() -> None:
    box = Box.of([-0.01, 0.5, 1.2, 1])
    assert box == Box(0, 0.5, 1, 1) and box.centre == (0.5, 0.75) and box.area == 0.5
    assert box.pixels(height=10, width=4) == (0, 5, 4, 10)


@pytest.mark.parametrize(
    "box, expected",
    [
        (Box(0, 0, 0.99, 0.99), True),
        (Box(0, 0, 0.98, 0.99), False),
        (Box(0, 0, 0.99, 0.98), False),
    ],
)
def test_a_box_as_large_as_the_image(box: Box, expected: bool) -> None:
    assert box.larger(0.98) is expected


@pytest.mark.parametrize(
    "box, expected",
    [(UNIT, True), (Box(0.3, 0.3, 0.5, 0.5), True), (Box(0.1, 0.3, 0.5, 0.5), False)],
)
def test_inside(box: Box, expected: bool) -> None:
    assert inside(box, UNIT) is expected


def _wide(width: float, score: float) -> Found:
    """A box from the left edge, so that the IoU of two is the ratio of their widths."""
    return Found(Box(0, 0, width, 1), score)


@pytest.mark.parametrize(
    "found, kept",
    [
        ([], []),
        ([_wide(0.8, 0.5), _wide(1.0, 0.4)], [0, 1]),  # 0.8 exactly is not more than 0.8
        ([_wide(0.81, 0.5), _wide(1.0, 0.4)], [0]),
        ([_wide(0.81, 0.4), _wide(1.0, 0.5)], [1]),  # the surer one stays, wherever it stands
        (
            [_wide(0.7, 0.9), _wide(0.85, 0.8), _wide(1.0, 0.7)],
            [0, 2],
        ),  # against what was kept only
        ([_wide(0.9, 0.5), _wide(0.95, 0.5)], [0]),  # equal scores: the first
    ],
)
def test_one_thing_found_twice(found: list[Found], kept: list[int]) -> None:
    assert deduplicate(found) == [found[i] for i in kept]


def _at(x: float, y: float) -> Box:
    return Box(x - 0.1, y - 0.1, x + 0.1, y + 0.1)


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (0.5, 0.5, ()),
        (0.5 - APART - 0.001, 0.5, ("left",)),
        (0.5 - APART + 0.001, 0.5, ()),
        (0.5 + APART + 0.001, 0.5, ("right",)),
        (0.5 + APART - 0.001, 0.5, ()),
        (0.5, 0.5 - APART - 0.001, ("above",)),  # y runs downwards
        (0.5, 0.5 - APART + 0.001, ()),
        (0.5, 0.5 + APART + 0.001, ("below",)),
        (0.5, 0.5 + APART - 0.001, ()),
        (0.2, 0.8, ("left", "below")),
    ],
)
def test_sides(x: float, y: float, expected: tuple[str, ...]) -> None:
    assert sides(_at(x, y), _at(0.5, 0.5)) == expected
    for side in SIDES:
        assert is_beside(_at(x, y), side, _at(0.5, 0.5)) is (side in expected)


@pytest.mark.parametrize(
    "name, one, released",
    [
        ("red apples", "red apple", "red appl"),
        ("shoes", "shoe", "sho"),
        ("glass", "glass", "glas"),
        ("paper boxes", "paper box", "paper box"),
        ("Cherries", "Cherry", "Cherri"),
        ("toys", "toy", "toy"),
        ("men", "man", "men"),
        ("metal glasses", "metal glasses", "metal glass"),
        ("city bus", "city bus", "city bu"),
        ("dress", "dress", "dress"[:-1]),
        ("oak leaves", "oak leaf", "oak leav"),
        ("shoes rack", "shoes rack", "shoes rack"),  # the last word alone
        ("", "", ""),
    ],
)
def test_names_without_plural_endings(name: str, one: str, released: str) -> None:
    assert (singular(name), released_singular(name)) == (one, released)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["formatted"][:40])
def test_templates(line: dict) -> None:
    fields = {name: tuple(v) if name == "kept" else v for name, v in line["edit"].items()}
    expected = Edit(line["task"], **fields)
    assert parse_edit(line["formatted"], line["task"], line.get("instruction", "")) == (
        expected,
        "",
    )
    # Without its task it is the same or nothing.
    assert parse_edit(line["formatted"], None, line.get("instruction", ""))[0] in (expected, None)


def test_the_templates_have_every_task() -> None:
    assert len(LINES) == 30 and {line["task"] for line in LINES} == set(TASKS)


@pytest.mark.parametrize(
    "formatted, task, why",
    [
        (None, "subject_add", "no formatted_instruction"),
        ("  ", "subject_add", "no formatted_instruction"),
        (["Add [cup]"], "subject_add", "no formatted_instruction"),
        ("Add [cup]", "style_change", "task 'style_change' (accepted: subject_add, "),
        ("Add cup", "subject_add", "no template of subject_add"),
        ("Add [cup] and [saucer]", "subject_add", "side 'and' (accepted: left, "),
        ("Remove [cup] and [saucer]", "subject_remove", "no template"),
        ("Add [cup] on the [left] of the plate", "subject_add", "no template"),
        ("Do not add [cup]", "subject_add", "no template"),
        ("Remove [cup]", "subject_add", "no template"),
        ("Add [cup] on the [behind] of [plate]", "subject_add", "side 'behind' (accepted: left, "),
        ("Move [cup] next to [plate]", "position_change", "side 'next to' (accepted: left, "),
        ("Add [] on the [left] of [plate]", "subject_add", "new '' is not a name"),
        ("Remove [toolkit\nthe user]", "subject_remove", "not a name but lines or sentences"),
        ("Remove [Sure. It is a cup.]", "subject_remove", "not a name but lines or sentences"),
        ("Add text '[]' on the image", "text_change", "text '' is blank"),
        ("Change the count of [cup] to [0]", "count_change", "count '0' (accepted: "),
        ("Change the count of [cup] to [many]", "count_change", "count 'many' (accepted: "),
        ("At [3, 4] and [5]: change the count of [cup] to [3]", "count_change", "no template"),
        ("Change [cup] to [teapot]", None, "and no task says which"),
        ("Sing [a song]", None, "no template of any task"),
    ],
)
def test_what_is_no_template(formatted: object, task: str | None, why: str) -> None:
    edit, reason = parse_edit(formatted, task)
    assert edit is None and why in reason and "\n" not in reason and len(reason) < 400


@pytest.mark.parametrize(
    "instruction, kept",
    [
        ("Change the background to a hill, remain the cup, tin box unchanged", ("cup", "tin box")),
        ("Change the background to a hill, remain the cup, leave them unchanged", ("cup",)),
        ("Change the background to a hill, remain them unchanged", ()),
        ("Leave the background of others untouched. Change the background to a hill", ()),
        (
            "Change the background to a hill, keep its red roof and the rest intact",
            ("red roof and the rest",),
        ),
        ("Change the background to a hill", ()),
        ("", ()),
    ],
)
def test_what_a_new_background_keeps(instruction: str, kept: tuple[str, ...]) -> None:
    assert kept_objects(instruction) == kept


def _checkout(folder: Path) -> Path:
    """One session of three turns as MICE-Bench has it, of which two can be read, and one of two
    turns as EdiVal-Bench has it, of which the second has no text."""
    mice = {
        "image": "source_image/a.jpg",
        "instruction": [
            "Remove it",
            "Add a hat",
            "Change the background to sea, remain pier unchanged",
        ],
        "task_type": ["subject_remove", "subject_add", "background_change"],
        "formatted_instruction": ["Remove [boat]", "Add a hat", "Change the background to [sea]"],
    }
    (folder / "dataset" / "cu").mkdir(parents=True)
    (folder / "dataset" / "cu" / "test_metadata.jsonl").write_text(json.dumps(mice))
    (folder / "oai_instruction_generation_output.csv").write_text(
        "image_index,turns,task_type,instructions,format_instructions\n"
        "7,1,['count_change'],['Change'],['Change the count of [duck] to [3]']\n"
        "7,2,['text_change'],['Add'],\"['Add text \\'[]\\' on the image']\"\n"
    )
    return folder


def _check_templates(folder: Path) -> subprocess.CompletedProcess[str]:
    script = HERE.parent / "scripts" / "check_templates.py"
    return subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=120
    )


def test_the_command_counts_what_can_be_read(tmp_path: Path) -> None:
    told = _check_templates(_checkout(tmp_path))
    assert told.returncode == 1, told.stderr  # one of five fits no template: below 99 %
    rows = [line.split() for line in told.stdout.splitlines()]
    assert ["subject_remove", "1", "1"] in rows and ["subject_add", "0", "1"] in rows
    assert ["all", "3", "5;"] in [row[:3] for row in rows] and "4 (80.00%) fit" in told.stdout
    assert "2 sessions" in told.stdout and "1 of 1 new backgrounds" in told.stdout
    assert "not read: 1 subject_add: no template of subject_add" in told.stdout
    assert "not read: 1 text_change: text '' is blank" in told.stdout


def test_the_command_without_the_files(tmp_path: Path) -> None:
    told = _check_templates(tmp_path)
    assert told.returncode == 2 and "accepted: " in told.stderr and "Traceback" not in told.stderr
