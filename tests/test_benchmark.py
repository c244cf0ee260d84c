"""`editr2 benchmark` from its command line to its folder: the world, sets of the published forms
with a tiny editor and a served judge, and starts that were stopped."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import editr2
from editr2.benchmarks import page
from editr2.cli.main import main
from editr2.run.lock import RunLock

SHIPPED = str(Path(editr2.__file__).parent / "assets" / "unified-small")
WORLD = ("benchmark", "world", "--sessions", "2", "--turns", "1,3")

TURNS = (
    ("subject_add", "Add [lamp] on the [left] of [cup]", True, ["cup"], ["cup", "lamp"]),
    ("color_alter", "Change the color of [cup] to [red]", True, [], ["cup", "lamp"]),
    ("background_change", "Change the background to [beach]", False, [], ["cup", "lamp"]),
)


def files(folder: Path) -> dict[str, bytes]:
    """All but the lock, which says who holds it."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    found.pop(".lock", None)
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "out"
    assert main([*WORLD, "--out", str(out)]) == 0
    return out


def test_the_world_by_length_and_against_exact_images(world, capsys):
    found = summary(world)
    assert found["lengths"] == {"1": 2, "3": 2} and found["passes"].keys() == {"multipass", "exact"}
    counts = found["passes"]["multipass"]["counts"]
    assert counts["GA"] == {"judged": 8, "not_applicable": 0, "failed": 0, "missing": 0}
    assert found["exposure"]["exact"]["GA@1"]["value"] == 0  # nothing is handed on yet
    assert {"GA@last/turns=1", "GA@last/turns=3"} <= found["passes"]["exact"]["measures"].keys()
    assert len(list((world / "generations" / "multipass").glob("*_turn_*.png"))) == 8


def test_a_second_start_changes_nothing(world):
    before = files(world)
    assert main([*WORLD, "--out", str(world)]) == 0
    assert files(world) == before


@pytest.mark.parametrize("gone", ["multipass/3-turns-0001-cu_input_raw_turn_2.png", "exact"])
def test_images_that_are_there_no_more_are_made_again(gone, world, tmp_path):
    out = Path(shutil.copytree(world, tmp_path / "out"))
    path = out / "generations" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([*WORLD, "--out", str(out), "--stages", "generate"]) == 0
    assert files(out / "generations") == files(world / "generations")


def test_a_report_that_was_stopped_is_made_as_it_would_have_been(world, tmp_path, monkeypatch):
    """Kills while images are made and judged have tests of their own."""
    out, whole = tmp_path / "out", files(world)
    shutil.copytree(world, out)  # with the times of files, by which images are known
    for name in ("summary.json", "strips.jsonl", "table.md", "table.tex", "report.html"):
        (out / name).unlink()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(page, "write_page", dies)
        assert main([*WORLD, "--out", str(out)]) == 130
    assert (out / "summary.json").exists() and not (out / "report.html").exists()
    assert main([*WORLD, "--out", str(out)]) == 0
    assert files(out) == whole


def test_settings_that_no_image_depends_on_are_nobodys_matter(world, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(world, out)
    told = ("--eval.strips", "3", "--eval.drift.structure", "0.5", "--rollout.siblings", "4")
    assert main([*WORLD, *told, "--out", str(out)]) == 0
    assert files(out) == files(world)
    assert main([*WORLD, "--rollout.dynamics", "flow-sde", "--out", str(out)]) == 2
    assert "rollout.dynamics 'cps' then, 'flow-sde' now" in capsys.readouterr().err
    assert main([*WORLD, "--samples", "2", "--stages", "report", "--out", str(out)]) == 2
    assert "out has not all images of multipass, sample 2 yet" in capsys.readouterr().err
    assert main(["benchmark", "world", "--sessions", "1", "--out", str(out)]) == 2
    assert "another benchmark: sessions 4 sessions " in capsys.readouterr().err


def test_other_weights_are_called_by_the_name_of_their_editor(world, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(world, out)
    about = json.loads((out / "benchmark.json").read_text()) | {"editor": "runs/other"}
    about["generated"]["settings"]["weights"] = "9 bytes 0123456789abcdef"
    (out / "benchmark.json").write_text(json.dumps(about))
    assert main([*WORLD, "--out", str(out)]) == 2
    assert "another benchmark: editor runs/other then, unified now" in capsys.readouterr().err


def test_another_judge_says_whose_scores_it_takes_the_place_of(world, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(world, out)
    assert main([*WORLD, "--out", str(out)]) == 0
    assert "judged anew" not in capsys.readouterr().err
    assert main([*WORLD, "--reward.name", "brightness", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "judged anew by brightness; the scores there were by world" in said


def test_images_made_elsewhere_give_the_same_scores(world, tmp_path, capsys):
    out, images = tmp_path / "out", tmp_path / "images"
    for name, data in files(world / "generations").items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(data)
    gone = next((images / "multipass").glob("3-turns-0001*_turn_2.png"))
    gone.unlink()
    assert main([*WORLD, "--images", str(images), "--out", str(out)]) == 0
    ours, theirs = ((path / "scores.jsonl").read_text().splitlines() for path in (world, out))
    changed = [json.loads(b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert {(row["state"], row["turn"], row["image"]) for row in changed} == {
        ("missing", turn, gone.name.partition("_input")[0]) for turn in (2, 3)
    }
    headline = summary(out)["headline"]["of"]
    assert all(one["value"] is None and "are missing" in one["withheld"] for one in headline)
    capsys.readouterr()


def test_a_second_judge_counts_of_the_same_images_alone(world, tmp_path, capsys):
    given = shutil.copytree(world / "generations", tmp_path / "given")
    words = [*WORLD, "--images", str(given), "--out", str(tmp_path / "out")]
    second = ["--against.name", "brightness"]
    file = given / "multipass" / "1-turns-0000-cm_input_raw_turn_1.png"
    for more, there in ((second, True), ([], True), (None, False), (second, True)):
        if more is None:
            Image.new("RGB", Image.open(file).size).save(file)
        assert main([*words, *(more or [])]) == 0
        assert ("against" in summary(tmp_path / "out")) == there
        assert ("is of other images" in capsys.readouterr().err) != there


def test_two_are_compared(world, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "compared"
    steps = ("--rollout.steps", "2", "--passes", "multipass")
    assert main([*WORLD, *steps, "--out", str(other)]) == 0
    assert main(["benchmark", "--compare", str(world), str(other), "--out", str(out)]) == 0
    assert {"compare.html", "compare.md", "compare.tex"} <= files(out).keys()
    assert "rollout.steps" in (out / "compare.html").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name: missing"),
        (["nothing"], "benchmark: 'nothing' (accepted: world, mice"),
        (["wrld"], "did you mean world?"),
        (
            ["{tmp}/none"],
            "of rewards editscore-bench, tiger-bench, pairs, preferences; a path that",
        ),
        (["world", "--data", "{tmp}"], "data: {tmp} (accepted with a benchmark that makes its own"),
        (["world", "--sources", "{tmp}"], "sources: {tmp} (accepted with a benchmark that makes"),
        (["world", "--turns", "1,1"], "turns: a list of 2 (accepted: a list of a whole number"),
        (["world", "--passes", "twice"], "'twice' is none of them"),
        (
            ["world", "--images", "{tmp}", "--policy", "{shipped}"],
            "{shipped} beside --images {tmp}",
        ),
        (["pairs", "--samples", "2"], "samples: 2 (accepted with pairs, which judges a reward"),
        (["pairs", "--policy", "{shipped}"], "policy: {shipped} (accepted with pairs"),
        (["edival"], "--data: none"),
        (["world", "--passes", "exact,exact"], "passes: "),
        (["world", "--turns", "0"], "turns[0]: 0"),
        (["world", "--stages", "judge"], "has no images yet"),
        (["world", "--passes", "singlepass"], "vocabulary"),
        (["world", "--images", "{tmp}", "--samples", "2"], "samples: 2"),
        (["world", "--images", "{tmp}/none"], "no such folder"),
        (["world", "--seed", "1", "--sessions", "2", "--turns", "1,3"], "seed 0 then, 1 now"),
        (["{tmp}/sessions.jsonl"], "reward.name: none"),
        (["mice", "--data", "{tmp}", "--turns", "3"], "turns: [3]"),
        (["edival", "--data", "{tmp}", "--passes", "exact"], "passes: exact"),
        (["--compare"], "--compare: no folder (accepted: two or more folders"),
        (["world", "--compare", "{tmp}", "{tmp}"], "editr2 benchmark --compare FOLDER FOLDER"),
        (["pairs", "--reward.name", "brightness", "--passes", "exact"], "passes: "),
        (["--compare", "{tmp}"], "--compare: "),
        (["--compare", "{tmp}", "{tmp}/none"], "--compare: "),
    ],
)
def test_what_is_wrong_is_one_line(words, said, world, tmp_path, capsys):
    (tmp_path / "sessions.jsonl").touch()
    out = str(world) if "--seed" in words else str(tmp_path / "out")
    places = {"tmp": tmp_path, "shipped": SHIPPED}
    words = [word.format(**places) for word in words]
    said = said.format(**places)
    judge = ["--reward.options.url", "http://127.0.0.1:9/v1"]
    served = any(name in words for name in ("edival", "mice"))
    assert main(["benchmark", *words, *(judge if served else []), "--out", out]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("benchmark.json", '{"generated": 7}', "generated: not as it was written"),
        ("benchmark.json", '{"generated": {"done": 7}}', "generated: not as it was written"),
        ("benchmark.json", '{"generated": {"images": "x"}}', "has no images yet"),
        ("metrics.jsonl", "", "the folder of a run"),
        ("comparisons.jsonl", "", "the folder of a benchmark of a reward"),
        (None, "", "another run is at work in it"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(file, text, said, tmp_path, capsys):
    with RunLock(tmp_path) as lock:
        if file is None:
            lock.take(make=False)
        else:
            (tmp_path / file).write_text(text)
        assert main([*WORLD, "--stages", "judge", "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def edival_checkout(folder: Path) -> None:
    """Two sessions in the form of the public file, of which one is taken."""
    with (folder / "oai_instruction_generation_output.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        lists = ("task_type", "instructions", "format_instructions")
        judged = ("bg_consistency", "unchanged_objects", "available_objects", "all_objects")
        rows.writerow(("image_index", "turns", *lists, *judged))
        for index in (3, 11):
            for t, (_, _, kept, unchanged, every) in enumerate(TURNS):
                tasks, formatted, *_ = zip(*TURNS[: t + 1])
                told = [text.replace("[", "").replace("]", "") for text in formatted]
                said = (list(tasks), told, list(formatted), kept, unchanged, every, every)
                rows.writerow((index, t + 1, *map(repr, said)))


def mice_checkout(folder: Path) -> None:
    tasks, formatted, kept, unchanged, every = map(list, zip(*TURNS))
    line = {"image": "source_image/cm.jpg", "task_type": tasks, "turns": 3}
    line["instruction"] = [text.replace("[", "").replace("]", "") for text in formatted]
    line |= {"formatted_instruction": formatted, "bg_consistency": kept}
    line |= {"unchanged_objects": unchanged, "available_objects": every, "all_objects": every}
    file = folder / "dataset" / "cm" / "test_metadata.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(line))


def test_a_set_without_a_session_is_said(tmp_path, capsys):
    (tmp_path / "basic_edit.json").write_text("{}")
    words = ["imgedit", "--data", str(tmp_path), "--reward.name", "brightness"]
    assert main(["benchmark", *words, "--out", str(tmp_path / "out")]) == 2
    assert "no session (accepted: one or more)" in capsys.readouterr().err


@pytest.mark.slow
def test_public_sets_from_their_files_to_a_report(tmp_path, monkeypatch, capsys):
    """With scripts/benchmark_trial.py: a tiny FLUX.1-Kontext, a tiny detector and encoder, a judge
    behind HTTP."""
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    import benchmark_trial

    for name, fill in (("edival", edival_checkout), ("mice", mice_checkout)):
        (tmp_path / name).mkdir()
        fill(tmp_path / name)
    words = [str(tmp_path / name) for name in ("edival", "mice")]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["trial", *words, "--sessions", "1", "--out", str(out)])
    assert benchmark_trial.main() == 0
    edival = out / "oai_instruction_generation_output.csv"
    image = Image.open(edival / "generations" / "multipass" / "3_input_raw_turn_3.png")
    assert np.asarray(image).shape == (64, 64, 3)
    found = summary(edival)
    assert found["headline"]["of"][0]["key"] == "O_of_means@3"
    assert found["passes"]["multipass"]["counts"]["CC"]["not_applicable"] == 1  # the new background
    assert not found["references"] and "theirs qwen2-vl-7b" in found["without_references"]
    mice = summary(out / "dataset-cm-test_metadata.jsonl")
    assert mice["passes"]["multipass"]["counts"]["GA"]["judged"] == 3
    capsys.readouterr()
