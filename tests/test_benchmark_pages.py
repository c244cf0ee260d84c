"""The pages of benchmarks: of one, and of two or more held against each other."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from editr2.benchmarks import page, strips, summary
from editr2.benchmarks.against import verdict
from editr2.benchmarks.compare import compare
from editr2.benchmarks.layouts import Images, file_names, source_file, turn_file
from editr2.benchmarks.rows import Row, read_rows, write_rows
from editr2.benchmarks.sets.world import WORLD, exact
from editr2.benchmarks.sides import sides_of
from editr2.benchmarks.table import Source
from editr2.benchmarks.text import number
from editr2.cli.main import main
from editr2.errors import DataError, UserError
from editr2.report.dots import Series, dots, with_interval
from editr2.report.paired import Estimate
from editr2.sessions import Session, Turn

EVIL = '<script>alert("x")</script> & | $x_1$'
SESSIONS = 6


def sessions(count=SESSIONS):
    found = list(WORLD.read(Source(None, sessions=count)))
    first = found[0]  # what it was told must be escaped everywhere
    return [Session(first.id, first.image, (Turn(EVIL), *first.turns[1:]), first.mode), *found[1:]]


FOLLOWED = {
    "a": ["101", "111", "000", "110", "011", "111"],
    "b": ["111", "101", "011", "111", "000", "111"],
}
"""By session and turn, whether a stand-in editor did what it was told."""


def write_folder(folder, seed, count=SESSIONS, ways=("multipass", "exact"), objections=True):
    """As the stages leave it: of session 1 turns 2 and 3 have no image, a judge failed on CC of
    session 2 at turn 1, and CC of session 3 at turn 2 does not apply."""
    found, rows, images = sessions(count), [], {}
    names = file_names(found)
    for way in ways:
        root, files = folder / "generations" / way, {}
        root.mkdir(parents=True)
        for n, session in enumerate(found):
            pixels, paths = exact_or_source(session), []
            Image.fromarray(session.image).save(root / source_file(names[session.id]))
            for t, turn in enumerate(session.turns):
                gone = objections and way == "multipass" and n == 1 and t > 0
                done = float(FOLLOWED[seed][n][t])
                for metric, value in (("IF", done), ("CC", 0.25 + done / 2)):
                    state, why = "judged", f"it is {EVIL}" if n == 0 else None
                    if gone:
                        state, value, why = "missing", None, "no image"
                    elif objections and metric == "CC" and (n, t) == (2, 0):
                        state, value, why = "failed", None, "timed out"
                    elif objections and metric == "CC" and (n, t) == (3, 1):
                        state, value, why = "not_applicable", None, "nothing is kept"
                    fixed = (turn.task, session.mode, len(session.turns))
                    rows.append(
                        Row(session.id, way, t + 1, t + 1, metric, state, value, why, *fixed)
                    )
                path = root / turn_file(names[session.id], t)
                if not gone:
                    Image.fromarray(pixels[t] if done else session.image).save(path)
                paths.append(None if gone else path)
            files[session.id] = tuple(paths)
        images[way] = Images(way, "edival", root, files)
    write_rows(folder / "scores.jsonl", rows)
    settings = {"seed": 0, "eval.steps": 4 if seed == "a" else 8}
    made = {"versions": {"editr2": "9.9"}, "date": "2026-11-28T10:00:00", "device": "cpu"}
    about = {
        "benchmark": "world",
        "editor": f"editor {seed}",
        "generated": {"settings": settings, "made": made},
        "judged": {"title": "world", "facts": {"judge": "qwen", "prompts": "ours (0123456789ab)"}},
    }
    (folder / "benchmark.json").write_text(json.dumps(about))
    summary.write(folder / "summary.json", summary.summarise(rows, found, WORLD, about))
    strips.write_strips(folder, found, images)
    return folder


def exact_or_source(session):
    if session.turns[0].instruction == EVIL:
        return np.stack([session.image] * len(session.turns))
    return exact(session)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders; the second has one session less."""
    root = tmp_path_factory.mktemp("made")
    write_folder(root / "a", "a")
    write_folder(root / "b", "b", SESSIONS - 1, objections=False)
    return root


@pytest.fixture
def folders(made, tmp_path, monkeypatch):
    """The two, to be changed."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(made / name, name)


def rewritten(file, change):
    found = json.loads(Path(file).read_text())
    change(found)
    Path(file).write_text(json.dumps(found))


def checked(path, beside):
    """One offline file whose tags nest, whose images and charts have a text and its tables
    heads."""
    report = beside("test_report")
    found, text = report.Page(path.read_text("utf-8")), report.without_scripts(path)
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text
    assert not {"iframe", "b onload"} & {tag for tag, _ in found.tags}
    assert all(i["alt"] and i["src"].startswith("data:image/") for i in found.images)
    assert all(attrs.get("aria-label") for tag, attrs in found.tags if tag == "svg")
    assert all(attrs.get("scope") for tag, attrs in found.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not list(path.parent.glob("*.part"))
    return found


def test_the_page_of_one_has_numbers_charts_and_every_session(folders, beside):
    found = checked(page.write_page(Path("a")), beside)
    # 6 sources, and of 6 sessions 3 turns in 2 passes but for the two that are missing
    assert len(found.images) == 6 + 36 - 2
    for said in (
        "the shapes world",
        "editor a",
        f"{SESSIONS} of 3 turns",
        "judge qwen",
        "2026-11-28",
        "editr2 9.9",
        "Failed or missing 2",
        "From best to worst 4",
        "missing : no image",
        "failed : CC: timed out",
        "CC does not apply",
        "IF it is " + EVIL,
        "1 " + EVIL,
        "IF, last turn – not given: of 6 1 are missing",
        "multipass: 2 of 18 images are missing",
        "against exact.",
    ):
        assert said in found.text, said
    assert {one["label"]: one["y"][0] for one in found.charts["IF"]["series"]} == {
        "multipass": 0.66667,
        "exact": 0.66667,
    }
    panels = re.findall("<figcaption>(IF|CC|GA) <span", Path("a/report.html").read_text())
    assert panels == ["IF", "CC"]


def test_a_page_shows_as_many_sessions_as_fit_and_says_of_how_many(folders, monkeypatch):
    def shown(most, of_bytes):
        monkeypatch.setattr(page, "MOST_SESSIONS", most)
        monkeypatch.setattr(strips, "PAGE_BYTES", of_bytes)
        text = page.write_page(Path("a")).read_text()
        return text.count("<article"), re.findall(r"[0-9]+ of 6 sessions are shown", text)

    assert shown(6, 1 << 20) == (6, [])
    assert shown(4, 1 << 20) == (4, ["4 of 6 sessions are shown"])
    count, said = shown(6, 8_000)
    assert 0 < count < 6 and said == [f"{count} of 6 sessions are shown"]


def test_strips_are_read_as_written_wherever_images_lie(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "out"
    for path in (elsewhere, folder):
        path.mkdir()
    [session, other] = sessions(2)
    path = elsewhere / "x.png"
    Image.fromarray(session.image).save(path)
    paths = {session.id: (path, None, None), other.id: (None, None, None)}
    strips.write_strips(
        folder, [session, other], {"multipass": Images("multipass", "edival", elsewhere, paths)}
    )
    found = strips.read_strips(folder)
    assert found[session.id].images == {"multipass": (path, None, None)}
    assert found[session.id].turns[0] == EVIL
    # Its source lay in no file.
    assert found[other.id].source.parent == folder / "sources"
    assert np.array_equal(np.asarray(Image.open(found[other.id].source)), other.image)
    with (folder / strips.FILE_NAME).open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(UserError, match=r"strips\.jsonl:3: .*accepted: a line as"):
        strips.read_strips(folder)


def test_differences_are_those_of_the_sessions_that_both_have(folders, beside):
    said = compare(["a", "b"], "out")
    a, b = (
        {
            (r.image, r.metric): r.value
            for r in read_rows(Path(x) / "scores.jsonl")
            if r.turn == 3 and r.way == "multipass"
        }
        for x in "ab"
    )
    both = [k for k, v in a.items() if k[1] == "IF" and v is not None and b.get(k) is not None]
    # Session 1 of the first has no image of turn 3, and the second has no session 5.
    assert len(both) == 4
    means = [float(np.mean([side[k] for k in both])) for side in (a, b)]
    assert means[0] != means[1]
    line = f"IF, last turn: {means[0]:.3f} -> {means[1]:.3f}, {means[1] - means[0]:+.3f} ["
    assert any(line in one for one in said), (line, said)
    assert (
        said[0] == "b against a, multipass: 5 sessions that both have; 1 of one alone are left out"
    )
    assert "settings that differ: editor, eval.steps" in said
    found = checked(Path("out/compare.html"), beside)
    cells = f"IF, last turn {means[0]:.3f} {means[1]:.3f} {means[1] - means[0]:+.3f} ["
    assert cells in found.text.replace("−", "-") and "eval.steps 4 8" in found.text
    assert f"Only in a: {sessions()[5].id}" in found.text
    drawn = {one["label"]: one["y"][2] for one in found.charts["IF"]["series"]}
    assert drawn == pytest.approx(dict(zip("ab", means, strict=True)), abs=1e-4)
    assert (
        f"| IF, last turn | {means[0]:.3f} | {means[1]:.3f} |" in Path("out/compare.md").read_text()
    )
    latex = Path("out/compare.tex").read_text()
    assert f"IF, last turn & {means[0]:.3f} & {means[1]:.3f} &" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 2 and "−" not in latex


def test_the_largest_changes_are_shown_both_ways(folders, beside):
    compare(["b", "a"], "out")
    text = Path("out/compare.html").read_text()
    checked(Path("out/compare.html"), beside)
    changed = [
        (verdict, float(number.replace("−", "-")))
        for verdict, number in re.findall(r'<b class="(better|worse)">([+−0-9.]+)</b>', text)
    ]
    better = [number for verdict, number in changed if verdict == "better"]
    worse = [number for verdict, number in changed if verdict == "worse"]
    assert better == sorted(better, reverse=True) and all(n > 0 for n in better) and better
    assert worse == sorted(worse) and all(n < 0 for n in worse) and worse
    # An image of either side a turn, the first side's above.
    strip = re.search("<article.*?</article>", text, re.S)[0]
    assert re.findall(r'<p class="tag">(\w+)</p>', strip) == ["source"] + ["b", "a"] * 3


def test_more_than_two_are_each_held_against_the_first(folders):
    shutil.copytree("b", "c")
    said = compare(["a", "b", "c"], "out")
    assert [one.split(",")[0] for one in said if " against " in one] == [
        "b against a",
        "c against a",
    ]
    text = Path("out/compare.html").read_text()
    assert "c against a" in text and "c against b" not in text
    assert "| c (multipass) |" in Path("out/compare.md").read_text()
    assert '<th scope="row">c (multipass)</th>' in text


def put(file, *path):
    *keys, last, value = path

    def change(found):
        for key in keys:
            found = found[key]
        found[last] = value

    return lambda: rewritten(file, change)


def told_otherwise():
    file = Path("b/strips.jsonl")
    file.write_text(file.read_text().replace('"instruction": "', '"instruction": "please ', 1))


def renamed():
    rows = read_rows(Path("b/scores.jsonl"))
    write_rows(
        Path("b/scores.jsonl"), [Row(**{**vars(r), "image": f"other {r.image}"}) for r in rows]
    )
    Path("b/strips.jsonl").unlink()


def of_another_pass():
    rows = [r for r in read_rows(Path("b/scores.jsonl")) if r.way == "multipass"]
    write_rows(Path("b/scores.jsonl"), [Row(**{**vars(r), "way": "evaluation"}) for r in rows])


FACTS = {"judge": "qwen", "prompts": "ours (0123456789ab)"}


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (put("b/benchmark.json", "benchmark", "mice"), "a b", "benchmark: world of a, mice of b"),
        (
            put("b/benchmark.json", "judged", "facts", FACTS | {"judge": "gpt"}),
            "a b",
            "judge, judge: qwen of a, gpt of b",
        ),
        (
            put("b/benchmark.json", "judged", "facts", FACTS | {"prompts": "ours (ffffffffffff)"}),
            "a b",
            "judge, prompts: 0123456789ab of a, ffffffffffff of b",
        ),
        (put("b/benchmark.json", "judged", "released", True), "a b", "released rules: False of a"),
        (
            put("b/benchmark.json", "judged", "facts", {}),
            "a b",
            "judge, judge: qwen of a, none of b",
        ),
        (told_otherwise, "a b", "has other instructions in a than in b"),
        (renamed, "a b", "a was scored on other sessions than b: none is in both"),
        (
            of_another_pass,
            "a b",
            "a was edited in other passes than b: multipass, exact, and evaluation",
        ),
        (lambda: Path("b/scores.jsonl").unlink(), "a b", "b: no scores.jsonl yet"),
        (lambda: None, "a a", "given twice"),
        (lambda: Path("c").symlink_to("a"), "a c", "given twice"),
        (lambda: None, "a", "a alone"),
        (lambda: None, "a none", "none: neither benchmark.json nor metrics.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(folders, capsys, change, given, said):
    change()
    assert main(["benchmark", "--compare", *given.split(), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "accepted: " in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "change",
    [
        put("b/summary.json", "judge", "reward", "another"),
        put("b/summary.json", "passes", "multipass", "counts", "IF", "failed", 9),
        lambda: Path("b/summary.json").write_text("{}"),
    ],
)
def test_a_report_of_other_scores_says_nothing_of_these(folders, change):
    change()
    assert any(
        line.startswith("The report of b is of other") for line in compare(["a", "b"], "out")
    )
    assert "b (multipass)" not in Path("out/compare.md").read_text()


def test_prompts_of_another_place_are_the_same_prompts(folders):
    put("b/benchmark.json", "judged", "facts", FACTS | {"prompts": "theirs (0123456789ab)"})()
    assert compare(["a", "b"], "out")


def write_run(folder, gain, weights=None, heldout="2 sessions abc", beside=None):
    """A run whose evaluation after training has higher scores of its first session."""
    weights = weights or {"IF": 0.5, "Beauty": 0.5}

    def evaluation(name, iteration, more):
        return {
            "event": "eval",
            "name": name,
            "iteration": iteration,
            "sessions": 2,
            "failed_scores": 0,
            "per_session": {
                "reward": [0.25 + more, 0.5],
                "success": [0.0 + (more > 0), None],
                "if": [[1.0, 0.5 + more], [0.5, None]],
                "beauty": [[0.5, 0.5], [0.5, None]],
            },
        }

    start = {"event": "start", "rewards": weights, "identity": {"depends": {"heldout": heldout}}}
    rows = [start, evaluation("before", 0, 0.0), evaluation("after", 8, gain)]
    report = beside("test_report")
    report.write_metrics(folder, rows)
    (folder / "config.yaml").write_text(f"train:\n  iterations: {8 * gain}\n")
    for name, change in (("before", 0.0), ("after", gain)):
        report.write_strips(folder, name, [change, 0.0])


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_an_axis_does_not_leave_the_scale(scale):
    """Of EdiVal's per cent as of scores in [0, 1]."""
    best = {"1": Estimate(scale, scale, scale, 9)}
    (chart,) = dots([("success", [Series("multipass", best, 0)])], ["1"], "turn", scale=scale)
    assert chart.range[1] == scale


def test_of_few_sessions_nothing_is_said():
    """Not of one, whose interval is a point, nor of five, which chance lets go the same way."""
    verdicts = [verdict(Estimate(0.5, 0.25, 0.75, count)) for count in (1, 5, 6)]
    assert verdicts == ["too few sessions to tell", "too few sessions to tell", "higher"]
    assert verdict(Estimate(0.5, -0.25, 0.75, 1)) == "no difference shown"
    assert with_interval(Estimate(0.5, 0.5, 0.5, 1), 2) == "0.50 [one session]"
    assert with_interval(Estimate(0.5, 0.5, 0.5, 2), 2) == "0.50 [0.50, 0.50]"
    of = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert number(of, 1.0) == "0.500 [one session]"


@pytest.mark.parametrize(
    "given",
    [
        {"per_session": []},
        {"per_session": {"if": [[1.0]]}},
        {"per_session": {"success": [1, 1], "reward": [1, 1], "if": [[1.0]]}},
        {"per_session": {"success": [1], "reward": [1], "if": [5]}},
    ],
)
def test_an_evaluation_that_is_none_is_said(given, tmp_path, monkeypatch, beside):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), 0.25, beside=beside)
    file = Path("one/metrics.jsonl")
    *lines, last, torn = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, json.dumps(json.loads(last) | given) + "\n", torn]))
    with pytest.raises(DataError, match="metrics.jsonl: per_session of evaluation “after”: "):
        compare(["one"], "out")


def test_runs_are_compared_by_the_sessions_of_their_evaluations(tmp_path, monkeypatch, beside):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), 0.25, beside=beside)
    write_run(Path("two"), 0.5, beside=beside)
    said = compare(["one", "two"], "out")
    # The second session has one turn only.
    for line in (
        "two against one, evaluation: 2 sessions that both have",
        "  reward, last turn: 0.500 -> 0.625, +0.125 [0.000, +0.250] (no difference shown)",
        "  IF, last turn: 0.625 -> 0.750, +0.125 [0.000, +0.250] (no difference shown)",
        "settings that differ: train.iterations",
    ):
        assert line in said, said
    found = checked(Path("out/compare.html"), beside)
    assert "Film-strips of one are of rollouts sampled as in training" in found.text
    assert "Beauty, turn 1" in found.text
    # One alone: before and after its training.
    said = compare(["one"], "alone")
    assert (
        "  reward, last turn: 0.375 -> 0.500, +0.125 [0.000, +0.250] (no difference shown)" in said
    )
    # A sum of other weights is another number.
    write_run(Path("three"), 0.5, {"IF": 0.9, "Beauty": 0.1}, beside=beside)
    said = compare(["one", "three"], "out")
    assert "reward is not compared, it is of other weights." in said
    assert not any(line.startswith("  reward") for line in said)
    write_run(Path("four"), 0.5, heldout="2 sessions def", beside=beside)
    with pytest.raises(UserError, match="evaluated sessions: 2 sessions abc of one, 2 session"):
        compare(["one", "four"], "out")


def test_bars_of_intervals_need_not_be_even():
    best = {"1": Estimate(0.5, 0.25, 0.875, 9)}
    (chart,) = dots([("IF", [Series("a", best, 0)])], ["1", "2"], "turn")
    (series,) = chart.data["series"]
    assert series["y"] == [0.5, None] and series["ends"] == [[0.25, 0.875], None]
    assert "a: 1 0.500 [0.250, 0.875], 2 –" in chart.summary


TWO_OF_FOUR = {
    "eval": {"sampler": "rollout", "steps": None},
    "rollout": {"steps": 4, "window": 2, "dynamics": "cps", "noise_level": 0.7, "shift": None},
    "policy": {"guidance": 1.0},
}


def changed(**sections):
    return {key: of | sections.get(key, {}) for key, of in TWO_OF_FOUR.items()}


APART = [
    # Training's window is nothing to an ODE, nor what its noise was.
    (
        TWO_OF_FOUR,
        changed(eval={"sampler": "ode"}, rollout={"dynamics": "flow-sde"}),
        "2 and 0 steps with noise (eval.sampler, rollout.window)",
    ),
    (
        TWO_OF_FOUR,
        changed(rollout={"window": 0}),
        "2 and 0 steps with noise (eval.sampler, rollout.window)",
    ),
    (
        TWO_OF_FOUR,
        changed(eval={"steps": 8}, policy={"guidance": 4.0}),
        "4 and 8 denoising steps (eval.steps, else rollout.steps); policy.guidance 1.0 and 4.0",
    ),
    (
        TWO_OF_FOUR,
        changed(rollout={"dynamics": "flow-sde", "shift": 3.0}),
        "rollout.shift none and 3.0; rollout.dynamics cps and flow-sde",
    ),
    # Said otherwise, and the same.
    (TWO_OF_FOUR, changed(eval={"steps": 4}), None),
    (changed(eval={"sampler": "ode"}), changed(rollout={"window": 0, "noise_level": 0.5}), None),
]


@pytest.mark.parametrize(("one", "two", "said"), APART)
@pytest.mark.parametrize("command", ["report one two", "benchmark --compare one two"])
def test_runs_that_were_sampled_differently_are_said_to_be_before_their_numbers(
    command, one, two, said, tmp_path, monkeypatch, beside, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, settings in (("one", one), ("two", two)):
        write_run(Path(name), 0.25, beside=beside)
        Path(name, "config.yaml").write_text(yaml.safe_dump(settings))
    assert main([*command.split(), "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [n for n, line in enumerate(lines) if "sampled differently" in line]
    if said is None:
        assert not told
        return
    (at,) = told
    assert lines[at].endswith(f"not of the weights alone: {said}.")
    assert lines[at].startswith("one and two were sampled differently, ")
    assert at < next(n for n, line in enumerate(lines) if "->" in line)
    assert lines[at] in checked(Path("out/compare.html"), beside).text


def test_of_a_run_without_settings_nothing_is_said(tmp_path, monkeypatch, beside, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(Path(name), 0.25, beside=beside)
    Path("one", "config.yaml").write_text(yaml.safe_dump(changed(rollout={"steps": 4})))
    Path("two", "config.yaml").unlink(missing_ok=True)
    assert main(["report", "one", "two", "--out", "out"]) == 0
    assert "sampled differently" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/quickstart/run", "runs/first/run"], ["quickstart/run", "first/run"]),
        (["x/a/run", "y/a/run", "x/b"], ["x/a/run", "y/a/run", "b"]),
        (["run", "deep/run"], ["{here}/run", "deep/run"]),
        (["../{here}/a", "b/../a/a"], ["{here}/a", "a/a"]),
    ],
)
def test_sides_are_called_by_the_shortest_ends_of_their_paths(
    folders, names, tmp_path, monkeypatch, beside
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir(exist_ok=True)
    folders = [Path(folder.format(here=tmp_path.name)) for folder in folders]
    for folder in folders:
        write_run(Path(os.path.abspath(folder)), 0.25, beside=beside)
    found = [side.name for side in sides_of(folders)]
    assert found == [name.format(here=tmp_path.name) for name in names]
