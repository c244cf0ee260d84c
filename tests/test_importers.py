"""Importers: what a released set says is what the sessions say, and one clear line for what is
wrong with it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from editr2.benchmarks.table import Source, find
from editr2.cli.main import main
from editr2.errors import DataError, UserError
from editr2.sessions import Session, load_sessions, save_sessions, survey, validate
from editr2.sessions.importers import import_sessions

JUDGED = (
    "formatted_instruction",
    "bg_consistency",
    "unchanged_objects",
    "available_objects",
    "all_objects",
)


def picture(seed: int, size: tuple[int, int] = (6, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def put(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def taken(form: str, source: Path | str, out: Path, **options: Any) -> list[Session]:
    return load_sessions(import_sessions(form, source, out, **options))


def wrong(form: str, source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        import_sessions(form, source, out, **options)
    assert "\n" not in str(caught.value) and not (out / "sessions.jsonl").exists()
    return str(caught.value)


def mice_record(**changes: Any) -> dict[str, Any]:
    record = {
        "image": "source_image/a1.jpg",
        "instruction": ["Paint the mug teal", "Take it away"],
        "task_type": ["color_alter", "subject_remove"],
        "formatted_instruction": ["Paint the [mug] [teal]", "Take [teal mug] away"],
        "bg_consistency": [True, False],
        "unchanged_objects": [["spoon"], ["spoon"]],
        "available_objects": [["spoon", "teal mug"], ["spoon"]],
        "all_objects": [["mug", "spoon", "teal mug"], ["mug", "spoon", "teal mug"]],
        "turns": 2,
        **changes,
    }
    return {key: value for key, value in record.items() if value is not ...}


# --------------------------------------------------------------------------------------------- MICE


def test_mice(tmp_path: Path) -> None:
    image = put(tmp_path / "set/source_image/a1.jpg", 1)
    three = mice_record(
        **{k: [*v, v[0]] for k, v in mice_record().items() if isinstance(v, list)}, turns=3
    )
    file = lines(
        tmp_path / "set/cu/train_metadata.jsonl", mice_record(), three, mice_record(turns=...)
    )
    first, second, third = taken("mice", file, tmp_path / "out")
    assert [s.id for s in (first, second, third)] == [
        "a1",
        "a1-2",
        "a1-3",
    ] and first.mode == third.mode == "cu"
    assert [len(s.turns) for s in (first, second, third)] == [2, 3, 2]
    record = mice_record()
    for t, turn in enumerate(first.turns):
        assert (turn.instruction, turn.task) == (record["instruction"][t], record["task_type"][t])
        assert turn.meta == {name: record[name][t] for name in JUDGED} and turn.intent is None
    assert np.array_equal(first.image, pixels(image))
    copies = list((tmp_path / "out/images").iterdir())
    assert [c.read_bytes() for c in copies] == [
        image.read_bytes()
    ]  # one file, as it was: no second encoding


def test_mice_mode_limit_and_images_elsewhere(tmp_path: Path) -> None:
    image = put(tmp_path / "elsewhere/a1.jpg", 1)
    record = mice_record(image="/somebody/s/machine/a1.jpg")
    file = lines(tmp_path / "cm/test_metadata.jsonl", record, record, "{")
    (only,) = taken("mice", file, tmp_path / "out", images=image.parent, limit=1)
    assert only.mode == "cm" and np.array_equal(only.image, pixels(image))
    assert "leads out of the folder (accepted: a path inside of" in wrong(
        "mice", file, tmp_path / "b"
    )
    assert ":3: column 2: malformed JSON" in wrong(
        "mice", file, tmp_path / "c", images=image.parent
    )
    file = lines(tmp_path / "other/file.jsonl", record)
    assert "(accepted: --mode cm or cu)" in wrong("mice", file, tmp_path / "d", images=image.parent)
    (only,) = taken("mice", file, tmp_path / "e", images=image.parent, mode="cu")
    assert only.mode == "cu"
    assert "(accepted: one file in it: file.jsonl)" in wrong("mice", file.parent, tmp_path / "f")


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"all_objects": ...},
            "all_objects: missing (accepted: image, instruction, task_type, "
            "formatted_instruction, b",
        ),
        ({"all_object": []}, "all_object: unknown field (accepted: image, instruction"),
        (
            {"instruction": "Paint it"},
            "instruction: the string 'Paint it' (accepted: a list, one item a turn)",
        ),
        ({"instruction": []}, "instruction: an empty list (accepted: a list"),
        (
            {"instruction": ["Paint it", " "]},
            "instruction[1]: blank string (accepted: a non-empty string)",
        ),
        ({"task_type": ["a"]}, "task_type: a list of 1 (accepted: a list of 2, one item a turn)"),
        (
            {"bg_consistency": [True, 1]},
            "bg_consistency[1]: the number 1 (accepted: true or false)",
        ),
        (
            {"unchanged_objects": [["a"], "b"]},
            "unchanged_objects[1]: the string 'b' (accepted: a list of strings)",
        ),
        ({"turns": 3}, "turns: 3 (accepted: 2, as many as instructions)"),
        ({"image": 1}, "image: the number 1 (accepted: a non-empty string)"),
    ],
)
def test_mice_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    put(tmp_path / "source_image/a1.jpg", 1)
    file = lines(tmp_path / "cm/x.jsonl", mice_record(), "", mice_record(**changes))
    assert wrong("mice", file, tmp_path / "out").startswith(f"{file}:3: {expected}")


# ------------------------------------------------------------------------------------------- EdiVal

EDIVAL = ("image_index", "turns", "task_type", "instructions", "format_instructions", *JUDGED[1:])


def edival_rows(index: int) -> list[dict[str, Any]]:
    told = [
        "Put a kite left of the oak",
        '"Make it 3 kites"',
    ]  # the release has quotes within some instructions
    common = {"bg_consistency": True, "unchanged_objects": ["oak"], "all_objects": ["oak", "kite"]}
    tasks, formatted = (
        ["subject_add", "count_change"],
        ["Put a [kite] left of [oak]", "Make it [3] [kite]s"],
    )
    return [
        {"image_index": index, "turns": t, "task_type": tasks[:t], "instructions": told[:t],
         "format_instructions": formatted[:t], "available_objects": ["oak", "kite"][:t], **common}
        for t in (1, 2)
    ]  # fmt: skip


def edival_file(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = EDIVAL) -> Path:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(buffer.getvalue())
    return path


def test_edival(tmp_path: Path) -> None:
    images = [put(tmp_path / f"input_images_resize_512/{i}_input_raw.jpg", i) for i in (0, 7)]
    rows = [*edival_rows(0), *edival_rows(7)[:1]]
    rows[1]["bg_consistency"] = False
    first, second = taken("edival", edival_file(tmp_path / "e.csv", rows), tmp_path / "out")
    assert (first.id, second.id, first.mode) == ("0", "7", None) and len(second.turns) == 1
    assert [t.instruction for t in first.turns] == rows[1]["instructions"]
    assert [t.task for t in first.turns] == ["subject_add", "count_change"]
    assert first.turns[0].meta == {
        "formatted_instruction": "Put a [kite] left of [oak]",
        "bg_consistency": True,
        "unchanged_objects": ["oak"],
        "available_objects": ["oak"],
        "all_objects": ["oak", "kite"],
    }
    assert (
        first.turns[1].meta["available_objects"] == ["oak", "kite"]
        and not first.turns[1].meta["bg_consistency"]
    )
    assert first.turns[1].meta["formatted_instruction"] == "Make it [3] [kite]s"
    for session, image in zip((first, second), images):
        assert np.array_equal(session.image, pixels(image))
    (only,) = taken(
        "edival", tmp_path / "e.csv", tmp_path / "b", limit=1, mode="cm", images=images[0].parent
    )
    assert only.mode == "cm"


@pytest.mark.parametrize(
    "row, changes, expected",
    [
        (1, {"turns": 3}, ":3: turns: 3 (accepted: 2, as rows of one image_index count its turns)"),
        (2, {"turns": 2}, ":4: turns: 2 (accepted: 1, as rows"),
        (1, {"instructions": ["Other", "b"]}, ":3: instructions: does not begin as the row before"),
        (
            1,
            {"task_type": ["subject_add"]},
            ":3: task_type: a list of 1 (accepted: a list of 2, one item a turn)",
        ),
        (
            0,
            {"instructions": "__import__('os').getcwd()"},
            ":2: instructions: the string \"__import__('os').getcwd()\"",
        ),
        (
            0,
            {"bg_consistency": "maybe"},
            ":2: bg_consistency: the string 'maybe' (accepted: a Python literal)",
        ),
        (0, {"bg_consistency": 0}, ":2: bg_consistency: the number 0 (accepted: true or false)"),
        (
            1,
            {"all_objects": "['a', 3]"},
            ":3: all_objects: a list of 2 (accepted: a list of strings)",
        ),
        (0, {"image_index": 5}, ":2: image_index: "),
    ],
)
def test_edival_names_what_is_wrong(
    tmp_path: Path, row: int, changes: dict[str, Any], expected: str
) -> None:
    put(tmp_path / "0_input_raw.jpg", 0)
    put(tmp_path / "1_input_raw.jpg", 0)
    rows = [*edival_rows(0), *edival_rows(1)]
    rows[row] |= changes
    file = edival_file(tmp_path / "e.csv", rows)
    assert wrong("edival", file, tmp_path / "out").startswith(f"{file}{expected}")


def test_edival_columns_and_cells(tmp_path: Path) -> None:
    put(tmp_path / "0_input_raw.jpg", 0)
    rows = [{k: v for k, v in r.items() if k != "all_objects"} for r in edival_rows(0)]
    file = edival_file(tmp_path / "e.csv", rows, EDIVAL[:-1])
    assert ":2: all_objects: missing (accepted: image_index, turns, " in wrong(
        "edival", file, tmp_path / "out"
    )
    edival_file(file, edival_rows(0)).write_text(file.read_text() + "3,4\n")
    assert f"{file}:4: 2 cells (accepted: 9, as in the header)" == wrong(
        "edival", file, tmp_path / "out"
    )
    file.write_text("")
    assert "no sessions to save" in wrong("edival", file, tmp_path / "out")
    file.write_bytes(b"\xff\xfe")
    assert f"{file}: cannot be read: " in wrong("edival", file, tmp_path / "out")


# ------------------------------------------------------------------------------------------ ImgEdit


def test_imgedit_benchmark(tmp_path: Path) -> None:
    records = [
        {
            "id": "3.png",
            "turn1": "Only green from here on",
            "turn2": "Add a hat",
            "turn3": "Add a scarf",
        },
        {"id": "4.png", "turn1": "Add a dog", "turn2": "Give it a ball"},
    ]
    for folder, mode in [
        ("content_memory", "cm"),
        ("content_understand", "cu"),
        ("version_backtrace", None),
    ]:
        images = [put(tmp_path / folder / record["id"], i) for i, record in enumerate(records)]
        lines(tmp_path / folder / "annotation.json", *records)
        sessions = taken("imgedit", tmp_path / folder, tmp_path / "out")
        assert [(s.id, s.mode, [t.instruction for t in s.turns]) for s in sessions] == [
            (r["id"][0], mode, [v for k, v in r.items() if k != "id"]) for r in records
        ]
        assert all(np.array_equal(s.image, pixels(i)) for s, i in zip(sessions, images))
    numbered = tmp_path / "content_memory/page.json"  # as the project's page shows it
    for indent in (None, 2):
        numbered.write_text(json.dumps({"1": records[0], "2": records[1]}, indent=indent))
        assert [s.id for s in taken("imgedit", numbered, tmp_path / "n")] == ["3", "4"]


def test_imgedit_training_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    image = put(tmp_path / "results_content_memory_part2/0007/origin_0.png", 3)

    def edit(t: int) -> dict[str, Any]:
        stem = "results_content_memory_part2/0007"
        names = {
            "input_images": [f"{stem}/origin_{t}.png"],
            "output_images": [f"{stem}/result_{t}.png"],
        }
        return {**names, "prompt": f"edit {t}"}

    rows = [{"data": [edit(0), edit(1)]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "content_memory_part2.parquet")
    for file in (
        tmp_path / "content_memory_part2.parquet",
        lines(tmp_path / "content_memory_part2.jsonl", *rows),
    ):
        (session,) = taken("imgedit", file, tmp_path / file.suffix)
        assert (session.id, session.mode) == ("0007", "cm") and np.array_equal(
            session.image, pixels(image)
        )
        assert [t.instruction for t in session.turns] == ["edit 0", "edit 1"]
        assert session.turns[1].meta == {k: v for k, v in edit(1).items() if k != "prompt"}
    (tmp_path / "content_memory_part2.parquet").write_bytes(b"PAR1 no more")
    problem = wrong("imgedit", tmp_path / "content_memory_part2.parquet", tmp_path / "bad")
    assert "content_memory_part2.parquet: cannot be read: " in problem
    file = lines(tmp_path / "a.jsonl", {"data": [{**edit(0), "prompt": None}]})
    assert wrong("imgedit", file, tmp_path / "bad").startswith(
        f"{file}:1: data[0]: prompt: null (accepted: a non-emp"
    )


@pytest.mark.parametrize(
    "record, expected",
    [
        (
            {"id": "3.png", "turn1": "a", "turn3": "b"},
            ":2: turn2: missing (accepted: id, turn1, turn2)",
        ),
        ({"id": "3.png"}, ":2: turn1: missing (accepted: id, turn1)"),
        (
            {"id": "3.png", "turn1": "a", "turns": 1},
            ":2: turns: unknown field (accepted: id, turn1)",
        ),
        ({"id": "3.png", "turn1": 5}, ":2: turn1: the number 5 (accepted: a non-empty string)"),
        ({"id": "9.png", "turn1": "a"}, ":2: id: "),
        ({"data": []}, ":2: data: an empty list (accepted: a list of one or more objects)"),
    ],
)
def test_imgedit_names_what_is_wrong(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    put(tmp_path / "3.png", 3)
    file = lines(tmp_path / "annotation.json", {"id": "3.png", "turn1": "a"}, record)
    assert wrong("imgedit", file, tmp_path / "out").startswith(f"{file}{expected}")


def test_imgedit_documents_that_are_not_json(tmp_path: Path) -> None:
    file = tmp_path / "annotation.json"
    file.write_text('{\n "1": {"id": "a",,}\n}')
    assert wrong("imgedit", file, tmp_path / "out").startswith(f"{file}:2: column ")
    file.write_text("[\n 1\n]")
    assert "a list of 1 (accepted: one JSON object in the file)" in wrong(
        "imgedit", file, tmp_path / "out"
    )


EDIT = {"id": "animal/3.jpg", "prompt": "Make it blue", "edit_type": "adjust"}


@pytest.mark.parametrize("name", ["basic_edit.json", "singleturn.json"])
@pytest.mark.parametrize("place", [".", "original_images", "singleturn"])
def test_imgedit_basic(tmp_path: Path, name: str, place: str) -> None:
    image = put(tmp_path / place / "animal/3.jpg", 1)
    two = {"1082": EDIT, "7": {**EDIT, "prompt": "Add a hat", "edit_type": "add"}}
    lines(tmp_path / name, two)
    first, second = taken("imgedit-basic", tmp_path, tmp_path / "out")
    assert [(s.id, len(s.turns), s.mode) for s in (first, second)] == [
        ("1082", 1, None),
        ("7", 1, None),
    ]
    assert [(s.turns[0].instruction, s.turns[0].task) for s in (first, second)] == [
        ("Make it blue", "adjust"),
        ("Add a hat", "add"),
    ]
    assert np.array_equal(first.image, pixels(image))


@pytest.mark.parametrize(
    "second, expected",
    [
        ({**EDIT, "id": "animal/4.jpg"}, "7: '1068': id: "),
        ({**EDIT, "prompt": 5}, "7: '1068': prompt: the number 5 (accepted: a non-empty string)"),
        ({"id": "animal/3.jpg", "edit_type": "add"}, "7: '1068': prompt: missing (accepted: id, "),
        ({**EDIT, "score": 1}, "7: '1068': score: unknown field (accepted: id, prompt, edit_ty"),
        ([EDIT], "7: '1068': a list of 1 (accepted: a name and its object)"),
    ],
)
def test_imgedit_basic_names_what_is_wrong(tmp_path: Path, second: Any, expected: str) -> None:
    put(tmp_path / "animal/3.jpg", 1)
    tricky = {**EDIT, "prompt": 'Say "}, {" on it'}
    file = tmp_path / "basic_edit.json"
    file.write_text(json.dumps({"1": tricky, "1068": second}, indent=1))
    message = wrong("imgedit-basic", file, tmp_path / "out")
    assert message.startswith(f"{file}:{expected}"), message


# ------------------------------------------------------------------------------------------- GEdit


def gedit_rows(**changes: Any) -> list[dict[str, Any]]:
    row = {"task_type": "subject-add", "Intersection_exist": True, "input_image": picture(9)}
    return [
        {**row, "key": f"k{i}", "instruction": f"edit {i}", "instruction_language": language,
         "input_image_raw": picture(i), **changes}
        for i, language in enumerate(("en", "cn", "en"))
    ]  # fmt: skip


def test_gedit(tmp_path: Path) -> None:
    rows = gedit_rows()
    folder = saved(rows, tmp_path / "set")
    for form, numbers in (("gedit", (0, 2)), ("gedit-cn", (1,))):
        sessions = taken(form, folder, tmp_path / form)
        assert [s.id for s in sessions] == [f"k{i}" for i in numbers]
        for session, i in zip(sessions, numbers):
            (turn,) = session.turns
            assert (turn.instruction, turn.task) == (f"edit {i}", "subject-add")
            assert np.array_equal(session.image, np.array(rows[i]["input_image_raw"]))
            language = rows[i]["instruction_language"]
            assert session.meta == {
                "key": f"k{i}",
                "instruction_language": language,
                "Intersection_exist": True,
            }


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"instruction": " "}, "row 0: instruction: blank string"),
        ({"instruction_language": "fr"}, "row 0: instruction_language: 'fr' (accepted: en, cn)"),
        ({"instruction_language": "cn"}, "instruction_language: no row in 'en'"),
        ({"input_image_raw": None}, "row 0: input_image_raw: missing (accepted: an image)"),
        ({"task_type": ...}, "row 0: task_type: missing (accepted: key, task_type, instruction, "),
        ({"input_image_raw": ...}, "columns task_type, Intersection_exist, input_image, key, "),
        ({"input_image_raw": 3}, "input_image_raw: a column of "),
    ],
)
def test_gedit_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = gedit_rows(**{k: v for k, v in changes.items() if v is not ...})
    rows = [{k: v for k, v in row.items() if changes.get(k) is not ...} for row in rows]
    data = datasets.Dataset.from_list(rows)
    if changes == {"input_image_raw": None}:
        data = data.cast_column("input_image_raw", datasets.Image())
    data.save_to_disk(str(tmp_path / "set"))
    message = wrong("gedit", tmp_path / "set", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'set'}: {expected}"), message


# ------------------------------------------------------------------------------------ benchmarks


def test_the_sets_of_benchmarks(tmp_path: Path) -> None:
    """What an entry reads: one image under one id, whatever file names it; nothing decoded yet."""
    put(tmp_path / "dataset/source_image/a1.jpg", 1)
    for mode in ("cm", "cu"):
        lines(tmp_path / f"dataset/{mode}/test_metadata.jsonl", *[mice_record()] * 2)
    whole = list(find("mice").read(Source(tmp_path)))
    assert [s.id for s in whole] == ["cm-a1", "cm-a1-2", "cu-a1", "cu-a1-2"]
    (cu, _) = find("mice").read(Source(tmp_path / "dataset/cu/test_metadata.jsonl"))
    assert (cu.id, cu.mode, len(cu.turns)) == ("cu-a1", "cu", 2)
    elsewhere = put(tmp_path / "elsewhere/a1.jpg", 2)
    (first, *_) = find("mice").read(Source(tmp_path / "dataset", elsewhere.parent))
    assert np.array_equal(first.image, pixels(elsewhere))
    put(tmp_path / "animal/3.jpg", 1).write_bytes(b"no image")
    lines(tmp_path / "basic_edit.json", {"1": EDIT, "2": EDIT})
    assert [s.id for s in find("imgedit").read(Source(tmp_path))] == ["1", "2"]
    folder = saved(gedit_rows(), tmp_path / "set")
    for name, ids in (("gedit", ["k0", "k2"]), ("gedit-cn", ["k1"])):
        assert [s.id for s in find(name).read(Source(folder))] == ids
    own = save_sessions(whole, tmp_path / "own")
    read = list(find("sessions").read(Source(own.parent)))
    assert [s.id for s in read] == [s.id for s in whole]
    assert all(callable(vars(s)["image"]) for s in (*whole, *read))


@pytest.mark.parametrize(
    "name, source, expected",
    [
        *(
            (name, Source(None), "--data: none (accepted: ")
            for name in ("mice", "edival", "gedit", "imgedit", "sessions")
        ),
        ("mice", Source(Path("here")), "here/cm/test_metadata.jsonl: no such file (accepted: cm/"),
        ("mice", Source(Path("here/x.jsonl")), "here/x.jsonl: in a folder 'here' (accepted: cm or"),
        ("edival", Source(Path("here")), "here: a folder (accepted: one file in it: "),
        ("gedit", Source(Path("here")), "here: no dataset (accepted: hf:stepfun-ai/GEdit-Bench"),
        ("gedit", Source(Path("here"), Path("there")), "--sources: there (accepted: nothing"),
        ("imgedit", Source(Path("here")), "here: a folder (accepted: one file in it: "),
        ("sessions", Source(Path("here")), "here: no sessions.jsonl in the folder"),
    ],
)
def test_a_benchmark_without_its_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: Source, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(Path("here/x.jsonl"), mice_record())
    with pytest.raises(UserError) as caught:
        list(find(name).read(source))
    assert str(caught.value).startswith(expected), str(caught.value)


# --------------------------------------------------------------------------------------- MagicBrush


def test_magicbrush_folders(tmp_path: Path) -> None:
    edit = {
        "input": "7-input.png",
        "mask": "7-mask1.png",
        "output": "7-output1.png",
        "instruction": "add a bee",
    }
    more = {"input": "7-output1.png", "output": "7-output2.png", "instruction": "and a wasp"}
    image = put(tmp_path / "dev/images/7/7-input.png", 1)
    file = lines(tmp_path / "dev/edit_sessions.json", {"7": [edit, more]})
    (session,) = taken("magicbrush", tmp_path / "dev", tmp_path / "out")
    assert (session.id, session.mode) == ("7", None) and np.array_equal(
        session.image, pixels(image)
    )
    assert [t.instruction for t in session.turns] == ["add a bee", "and a wasp"]
    assert session.turns[0].meta == {
        "input": "7-input.png",
        "mask": "7-mask1.png",
        "output": "7-output1.png",
    }
    lines(file, {"7": [edit, {**more, "outputs": "x"}]})
    assert wrong("magicbrush", file, tmp_path / "b").startswith(
        f"{file}: '7': [1]: outputs: unknown field (accepted: "
    )
    lines(file, {"7": []})
    assert "'7': edits: an empty list (accepted: a list of one or more objects)" in wrong(
        "magicbrush", file, tmp_path / "b"
    )
    assert "(accepted: one file in it: edit_sessions.json)" in wrong(
        "magicbrush", tmp_path / "out", tmp_path / "b"
    )


def brush_rows(*turns: tuple[str, int]) -> list[dict[str, Any]]:
    return [
        {"img_id": name, "turn_index": t, "source_img": picture(10 * i + t), "mask_img": picture(0),
         "instruction": f"{name} turn {t}", "target_img": picture(1)}
        for i, (name, t) in enumerate(turns)
    ]  # fmt: skip


def saved(rows: list[dict[str, Any]], folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(folder))
    return folder


def test_magicbrush_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = brush_rows(("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", 2), ("a", 3))
    folder = saved(rows, tmp_path / "set")
    sessions = load_sessions(folder)
    assert [(s.id, len(s.turns)) for s in sessions] == [("a", 2), ("b", 1), ("a-2", 3)]
    assert [t.meta["row"] for t in sessions[2].turns] == [3, 4, 5]
    assert sessions[2].turns[2].instruction == "a turn 3"
    for session, row in zip(sessions, (0, 2, 3)):
        assert np.array_equal(session.image, np.array(rows[row]["source_img"]))
    written = taken("magicbrush", folder, tmp_path / "out", mode="cu", limit=2)
    assert [(s.id, s.mode) for s in written] == [("a", "cu"), ("b", "cu")]
    assert np.array_equal(written[1].image, sessions[1].image)
    folder = saved(brush_rows(("a", 1), ("a", 3), ("b", 2), ("c", 1)), tmp_path / "wrong")
    assert validate(folder) == [
        f"{folder}: row 1: turn_index: the number 3 of img_id 'a' (accepted: 1, or 2 of img_id "
        f"'a')",
        f"{folder}: row 2: turn_index: the number 2 of img_id 'b' (accepted: 1, or 2 of img_id "
        f"'a')",
    ]


# ------------------------------------------------------------------------------------- Hugging Face


def test_a_dataset_of_sessions(tmp_path: Path) -> None:
    turns = [
        {"instruction": "add a cup", "task": "add", "intent": None},
        {"instruction": "blue", "task": None, "intent": "make the cup blue"},
    ]
    rows = [
        {
            "id": "k",
            "image": picture(i),
            "turns": turns,
            "mode": "cu",
            "place": 3,
            "mask": picture(5),
            "references": [picture(3), picture(4)],
        }
        for i in (1,)
    ]
    rows.append({**rows[0], "id": None, "image": picture(2), "mode": None, "turns": turns[:1]})
    rows[1]["references"] = []
    for memory in (0, 1 << 20):
        first, second = load_sessions(
            saved(rows, tmp_path / f"{memory}"), memory=memory, size=(6, 8)
        )
        assert (first.id, first.mode, first.meta) == (
            "k",
            "cu",
            {"place": 3},
        ) and second.id == "row-000001"
        assert first.turns[1].intent == "make the cup blue" and first.turns[0].task == "add"
        assert np.array_equal(first.image, np.array(rows[0]["image"]))
        assert callable(vars(first)["image"]) == (memory == 0)
        assert np.array_equal(first.reference_pixels(), list(map(np.array, rows[0]["references"])))
        assert not second.references and len(first.references) == 2
    (small, _) = load_sessions(tmp_path / "0", size=(3, 4), resize="crop")
    assert small.image.shape == (3, 4, 3)
    back = taken("sessions", tmp_path / "0", tmp_path / "out")
    assert [s.turns for s in back] == [first.turns, second.turns] and np.array_equal(
        back[1].image, second.image
    )


def test_a_dataset_of_instructions_and_of_paths(tmp_path: Path) -> None:
    image = put(tmp_path / "a.png", 1)
    rows = [{"image": str(image), "instructions": ["one", "two"], "meta": {"x": 1}, "more": "y"}]
    (session,) = load_sessions(saved(rows, tmp_path / "set"))
    assert [t.instruction for t in session.turns] == ["one", "two"] and session.meta == {
        "x": 1,
        "more": "y",
    }
    assert np.array_equal(session.image, pixels(image))


def test_a_sequence_of_objects_comes_as_an_object_of_lists(tmp_path: Path) -> None:
    rows = [{"image": picture(1), "turns": {"instruction": ["one", "two"], "task": ["a", None]}}]
    (session,) = load_sessions(saved(rows, tmp_path / "set"))
    assert [(t.instruction, t.task) for t in session.turns] == [("one", "a"), ("two", None)]
    (problem,) = validate(saved([{**rows[0], "turns": {"instruction": "one"}}], tmp_path / "other"))
    assert problem.endswith("row 0: turns: an object (accepted: a list of one or more turns)")


def test_what_is_wrong_with_a_dataset(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": picture(1), "instructions": ["x"], "mode": "cu"},
        {"id": "a", "image": None, "instructions": [" "], "mode": "c"},
        {"id": "b", "image": picture(1, (4, 4)), "instructions": None, "mode": None},
    ]
    folder = saved(rows, tmp_path / "set")
    found = survey(folder, size=(6, 8))
    assert [p.removeprefix(f"{folder}: ").split(" (")[0] for p in found.problems] == [
        "row 1: mode: the string 'c'",
        "row 1: turns[0].instruction: blank string",
        "row 1: id: 'a' was already used on row 0",
        "row 1: image: missing",
        "row 2: turns: missing",
        "row 2: image: 4×4 pixels, height × width",
    ]
    assert found.turns == {1: 1}
    folder = saved([{"image": picture(1), "prompt": "x"}], tmp_path / "other")
    (problem,) = validate(folder)
    assert problem.startswith(
        f"{folder}: columns image, prompt (accepted: image and turns, image and instructions, or"
    )
    (problem,) = validate(saved([{"image": 3, "instructions": ["x"]}], tmp_path / "number"))
    assert "image: a column of " in problem and problem.endswith(
        "(accepted: of images, or of paths)"
    )


def test_a_folder_of_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"image": picture(1), "instructions": ["x"]}])
    datasets.DatasetDict({"train": data, "dev": data}).save_to_disk(str(tmp_path / "set"))
    (problem,) = validate(tmp_path / "set")
    assert problem.endswith(
        f"several splits (accepted: one of them: {tmp_path}/set/train, {tmp_path}/set/dev)"
    )
    assert len(load_sessions(tmp_path / "set/dev")) == 1


def test_a_named_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder of the name for the repository
    data = datasets.Dataset.from_list([{"image": picture(3), "instructions": ["x", "y"]}])
    for split in ("train", "test"):
        (tmp_path / "owner/name/data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(str(tmp_path / f"owner/name/data/{split}-00000-of-00001.parquet"))
    (session,) = load_sessions("hf:owner/name:test")
    assert len(session.turns) == 2 and np.array_equal(session.image, np.array(picture(3)))
    (problem,) = validate("hf:owner/name")
    assert problem == "hf:owner/name: no split (accepted: hf:owner/name:train, hf:owner/name:test)"
    for name in ("hf:owner/nothing:train", "hf:owner/name:dev"):
        with pytest.raises(DataError, match=f"^{name}: cannot be opened: [^\n]+$"):
            load_sessions(name)
    with pytest.raises(DataError, match="accepted: hf:owner/name or hf:owner/name:split"):
        load_sessions("hf:")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DataError,
        match=r"^hf:a/b: needs the package datasets \(accepted: pip install 'editr2\[data\]'",
    ):
        load_sessions("hf:a/b")
    (tmp_path / "a.parquet").touch()
    assert "Parquet needs pyarrow (accepted: pip install 'editr2[data]')" in wrong(
        "imgedit", tmp_path / "a.parquet", tmp_path / "out"
    )


# ------------------------------------------------------------------------------------ the whole way


def test_an_import_that_fails_leaves_the_old_set(tmp_path: Path) -> None:
    put(tmp_path / "source_image/a1.jpg", 1)
    file = lines(tmp_path / "cm/a.jsonl", mice_record())
    taken("mice", file, tmp_path / "out")
    before = (tmp_path / "out/sessions.jsonl").read_bytes()
    (tmp_path / "source_image/a2.jpg").write_bytes(b"no image")
    lines(file, mice_record(), mice_record(image="source_image/a2.jpg"))
    with pytest.raises(DataError, match=r"a2\.jpg: not a readable image"):
        import_sessions("mice", file, tmp_path / "out")
    assert (tmp_path / "out/sessions.jsonl").read_bytes() == before


def test_wrong_arguments(tmp_path: Path) -> None:
    for arguments, options, expected in [
        (
            ("coco", "x"),
            {},
            r"format: 'coco' \(accepted: mice, edival, imgedit, imgedit-basic, magicbrush, gedit, "
            r"gedit-cn, sessions\)",
        ),
        (("mice", tmp_path), {"mode": "c"}, r"--mode: 'c' \(accepted: cm, cu\)"),
        (("mice", tmp_path), {"limit": 0}, r"--limit: 0 \(accepted: 1 or more\)"),
        (
            ("mice", "hf:a/b"),
            {},
            r"'mice' \(accepted for a Hugging Face dataset: gedit, gedit-cn, magicbrush, sess",
        ),
        (
            ("sessions", tmp_path),
            {"images": tmp_path},
            "--images: .* as the source names its images",
        ),
        (("mice", tmp_path / "none"), {}, "none: no such file or folder"),
        (("mice", tmp_path), {}, r"a folder \(accepted: one file in it: a file, \.jsonl\)"),
        (("sessions", tmp_path), {}, "no sessions.jsonl in the folder"),
    ]:
        with pytest.raises(UserError, match=expected):
            import_sessions(*arguments, tmp_path / "out", **options)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "source_image/a1.jpg", 1)
    file = lines(tmp_path / "cu/a.jsonl", *[mice_record()] * 3)
    out = tmp_path / "out"
    assert main(["data", "import", "mice", str(file), "--out", str(out), "--limit", "2"]) == 0
    assert capsys.readouterr().out == f"sessions: {out / 'sessions.jsonl'}\n"
    assert main(["data", "validate", str(out)]) == 0
    said = "2 sessions; turns 2 (2); height×width 6×8 (2); mode cu (2)"
    judged = "2 of 2 sessions have what edit-r2, edival judge by"
    assert capsys.readouterr().out.splitlines() == [said, judged]
    text = (out / "sessions.jsonl").read_text()
    (out / "sessions.jsonl").write_text(text.replace('"cu"', '"c"').replace("Take it away", " "))
    assert main(["data", "validate", str(out)]) == 2
    said = capsys.readouterr()
    assert (
        len(said.out.splitlines()) == 4
        and f"{out / 'sessions.jsonl'}:2: mode: the string 'c'" in said.out
    )
    assert said.err == ""
    assert main(["data", "import", "mice", str(file), "--out", str(out), "--mode", "x"]) == 2
    assert capsys.readouterr().err == "error: --mode: 'x' (accepted: cm, cu)\n"


def test_importing_holds_one_image_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Pixels(np.ndarray):
        def __del__(self) -> None:
            alive.remove(id(self))

    def decode() -> np.ndarray:
        array = np.zeros((4, 4, 3), np.uint8).view(Pixels)
        alive.append(id(array))
        return array

    from editr2.sessions import Turn

    def stream() -> Iterator[Session]:
        for i in range(20):
            assert len(alive) <= 1
            yield Session(f"{i}", decode, (Turn("x"),))

    save_sessions(stream(), tmp_path)
    assert len(load_sessions(tmp_path)) == 20
