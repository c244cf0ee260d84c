"""The stages of a verifier that ask somebody: principles, traces and gold, selection, and what an
evaluation says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from editr2.cli.main import main
from editr2.errors import DataError
from editr2.report.pages import scripts
from editr2.rewards.client import Answer
from editr2.rewards.traces import read_principles, write_trace
from editr2.verifier import measures, writers
from editr2.verifier.evaluate import read_data
from editr2.verifier.exact import world_gold
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    Edit,
    Picture,
    Preference,
    Told,
    read_edits,
    read_preferences,
    read_told,
)
from editr2.verifier.measures import Against, Judged, JudgedPair
from editr2.verifier.select import select
from editr2.verifier.tracing import exact_gold, majority
from editr2.worlds import shapes

ROOT = Path(__file__).parent.parent
ASKED = read_principles(
    [{"text": "Is it red?", "kind": "follow"}, {"text": "Is the rest kept?", "kind": "keep"}]
)
NOWHERE = Picture(Path("nowhere.png"), "nowhere")


@pytest.fixture(scope="module")
def tiny(beside: Any) -> Any:
    return beside("tiny_verifier")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """`data/`, `words/`, and `llava/`, a verifier with random weights."""
    root = tmp_path_factory.mktemp("stages")
    tiny.write_llava(root / "llava")
    tiny.write_data(root / "data")
    rows = lines(root / "data" / TRACES)
    gold = [row | {"gold": [int(row["id"] in ("e1", "e3"))]} for row in rows]
    (root / "data" / TRACES).write_text("".join(json.dumps(row) + "\n" for row in gold))
    return root


@pytest.fixture
def server(beside: Any) -> Iterator[Callable[..., Any]]:
    """Starts judges that say what a function of the words and the number of pictures makes."""
    module, running = beside("judge_server"), []

    def start(says: Callable[[str, int, int], str], **more: Any) -> Any:
        asked: list[str] = []

        def answer(body: dict[str, Any], k: int) -> str:
            parts = body["messages"][0]["content"]
            kinds = [part["type"] for part in parts]
            if "paint it" not in str(parts[-1].get("text")):
                return "yes"  # of what is only asked to see who is there
            assert kinds[-1] == "text" and set(kinds[:-1]) == {"image_url"}
            asked.append(parts[-1]["text"])
            return says(parts[-1]["text"], len(kinds) - 1, k)

        judge = module.JudgeServer(says=answer, honours={"n", "images"}, **more).__enter__()
        running.append(judge)
        judge.asked = asked
        return judge

    yield start
    for judge in running:
        judge.__exit__(None, None, None)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = main(["verifier", *map(str, arguments)])
    said = capsys.readouterr()
    assert code in (0, 2) and bool(said.err) == bool(code), said.err
    return code, said.out, said.err


# -------------------------------------------------------------------------------------- principles


def test_principles_are_asked_once_for_a_source_and_an_instruction(
    world: Path, tmp_path: Path, server: Any, capsys: Any
) -> None:
    def says(text: str, images: int, k: int) -> str:
        assert images == 1
        if "blue" in text:
            return "I see no question"
        return json.dumps({"principles": [one.written() for one in ASKED]})

    bare = tmp_path / "bare"
    bare.mkdir()
    for picture in (world / "data").glob("*.png"):
        (bare / picture.name).write_bytes(picture.read_bytes())
    for name, to in ((PRINCIPLES, "edits.jsonl"), (PAIRS, PAIRS)):
        rows = lines(world / "data" / name)
        for row in rows:
            del row["principles"]
        if name == PRINCIPLES:  # a sibling: the same source, another output
            rows.append(rows[0] | {"id": "again", "edited": rows[1]["edited"]})
        (bare / to).write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = server(says)
    asked = ("principles", "--data", bare, "--out", tmp_path, "--judge.options.url", judge.url)
    code, out, err = run(capsys, *asked)
    assert code == 0
    edits = read_edits(tmp_path / PRINCIPLES, principles=True)
    pairs = read_preferences(tmp_path / PAIRS)
    assert [edit.id for edit in edits] == ["e0", "e2", "e4", "again"]
    assert [pair.id for pair in pairs] == ["p0", "p2", "p4"]
    assert all(edit.principles == ASKED for pair in pairs for edit in pair.edits)
    assert len(judge.asked) == 5  # of eleven edits and pairs
    assert "4 x the judge's principles cannot be read" in out and "follow 7, keep 7" in out
    run(capsys, *asked)
    assert len(judge.asked) == 5 and read_edits(tmp_path / PRINCIPLES)[0].principles == ASKED


def of_colour(edit: Edit) -> list[dict[str, str]]:
    """A user's own exact rule."""
    return [{"text": f"Is it {edit.instruction.split()[-1]}?", "kind": "follow"}]


def test_exact_rules_tell_principles(world: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {k: v for k, v in row.items() if k != "principles"} for row in lines(world / "data" / PAIRS)
    ]
    for row in rows:
        row |= {k: str(world / "data" / row[k]) for k in ("image", "win", "lose")}
    rows[1]["principles"] = [ASKED[0].written()]  # which it keeps
    (data / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with mock.patch("editr2.verifier.principles.resolve", lambda *_: of_colour):
        code, _, _ = run(
            capsys, "principles", "--data", data, "--out", data, "--judge.exact", "a:b"
        )
    assert code == 0
    texts = [pair.win.principles[0].text for pair in read_preferences(data / PAIRS)]
    assert texts == ["Is it red?"] * 3 + ["Is it blue?", "Is it red?"]


def test_the_world_tells_principles_and_gold_by_its_rules(tmp_path: Path, capsys: Any) -> None:
    scene = shapes.Scene("black", (("ring", "blue"), *[None] * 8))
    done = scene.put(0, ("ring", "red"))
    smeared = shapes.render(done)
    smeared[16:, 16:] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    rows, pictures = [], {"image": scene, "red": done, "green": scene.put(0, ("ring", "green"))}
    for name, one in pictures.items():
        Image.fromarray(shapes.render(one)).save(tmp_path / f"{name}.png")
    Image.fromarray(smeared).save(tmp_path / "smeared.png")
    for name, edited in (("right", "red"), ("wrong", "green"), ("ruined", "smeared")):
        row = {"id": name, "image": "image.png", "edited": f"{edited}.png"}
        rows.append(row | {"instruction": "paint the ring top left red"})
    rows.append(rows[0] | {"id": "vague", "instruction": "paint it red"})
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(
        capsys, "principles", "--data", tmp_path, "--out", tmp_path, "--judge.exact", "world"
    )
    assert code == 0 and "1 x instruction 'paint it red': 'it' refers to nothing yet" in out, err
    edits = read_edits(tmp_path / PRINCIPLES, principles=True)
    assert [one.kind for one in edits[0].principles] == ["follow", "keep", "keep", "quality"]
    gold = exact_gold(edits, world_gold, "gold.exact")
    assert gold == {"right": (1, 1, 1, 1), "wrong": (0, 1, 1, 1), "ruined": (1, 0, 1, 0)}
    other = [replace(edits[0], principles=ASKED), replace(edits[0], instruction="paint it red")]
    assert exact_gold(other, world_gold, "gold.exact") == {}


# ---------------------------------------------------------------------------- traces and selection


def pooled(edits: Sequence[Edit], n: int, seed: int) -> list[list[str]]:
    """A user's own judge: sure of one verdict, and the other trace is none."""
    return [[write_trace("I think", (1,), 0.5), "no idea"][:n] for _ in edits]


def test_a_pool_writes_traces_and_a_stronger_judge_gold(
    world: Path, tmp_path: Path, server: Any, capsys: Any
) -> None:
    def says(text: str, images: int, k: int) -> str:
        assert images == 2
        return write_trace(f"Seen {k}", (int("red" in text and k != 1),), 0.3)

    judge = server(says)
    config = tmp_path / "pool.yaml"
    config.write_text(
        f"""
judge:
  use:
    - name: served
      options: {{url: "{judge.url}", traces: 2}}
    - name: own
      function: "somewhere:pooled"
      options: {{traces: 2}}
    - function: "somewhere:pooled"
    - function: "somewhere:pooled"
gold:
  options: {{url: "{judge.url}", traces: 3, temperature: 0.5}}
"""
    )
    traced, chosen = tmp_path / "traced", tmp_path / "chosen"
    asked = ("traces", "--config", config, "--data", world / "data", "--out", traced)
    with mock.patch("editr2.verifier.writers.resolve", lambda *_: pooled):
        code, out, err = run(capsys, *asked)
        made = len(judge.asked)
        run(capsys, *asked)
    assert code == 0, err
    assert len(judge.asked) == made == 5 * (2 + 3)
    assert "served: 10 of 10 traces read" in out
    assert "own: 5 of 10 traces read, 5 unread (mostly: no JSON object" in out
    told = read_told(traced / TRACES, read_edits(traced / PRINCIPLES, principles=True))
    assert len(told) == 30 and [one.judge for one in told[:4]] == ["served"] * 2 + ["own"] * 2
    assert [one.judge for one in told[4:6]] == ["pooled", "pooled (2)"]
    assert [one.gold for one in told[::6]] == [(1,), (0,), (1,), (0,), (1,)]

    code, out, err = run(capsys, "select", "--data", traced, "--out", chosen)
    kept = read_told(chosen / TRACES, read_edits(chosen / PRINCIPLES, principles=True))
    assert code == 0, err
    assert [one.text for one in kept] == [write_trace("Seen 0", (g,), 0.3) for g in (
        1, 0, 1, 0, 1
    )]  # fmt: skip
    assert "100.0 % of the chosen, 64.0 % of all" in out and "own: 60.0 %, 0 of 5 chosen" in out

    direct = tmp_path / "direct"
    assert run(capsys, "select", "--data", traced, "--out", direct, "--direct")[0] == 0
    bare = read_told(direct / TRACES, read_edits(direct / PRINCIPLES, principles=True))
    assert [one.text for one in bare] == [
        f'{{"1": {one.trace.verdicts[0]}}}\n<score>3</score>' for one in kept
    ]
    assert [(one.trace, one.gold, one.judge) for one in bare] == [
        (one.trace, one.gold, one.judge) for one in kept
    ]


def test_an_answer_that_was_cut_off_is_kept_without_a_score(
    world: Path, tmp_path: Path, server: Any, capsys: Any
) -> None:
    judge = server(lambda *_: write_trace("It is", (1,), 0.3), finish="length")
    code, out, err = run(
        capsys, "traces", "--data", world / "data", "--out", tmp_path, "--data.limit", 2,
        "--judge.options.url", judge.url,
    )  # fmt: skip
    rows = lines(tmp_path / TRACES)
    assert code == 0, err
    assert "0 of 2 traces read, 2 unread (mostly: cut off)" in out
    assert [(row["unread"], "score" in row, row["judge"]) for row in rows] == [
        ("cut off", False, "judge")
    ] * 2


def told(*verdicts: int, gold: Sequence[int] | None = (1, 1), id: str = "e", **more: Any) -> Told:
    edit = Edit(id, NOWHERE, NOWHERE, "red", ASKED)
    text = write_trace("So", verdicts, more.pop("score", 0.5)) if verdicts else "what?"
    return Told.of(edit, text, gold=None if gold is None else tuple(gold), **more)


@pytest.mark.parametrize(
    ("some", "least", "wanted"),
    [
        ([told(0, 0), told(1, 0), told(1, 1)], 0, 2),
        ([told(0, 1), told(1, 0)], 0, 0),  # equal: the first
        ([told(), told(0, 0)], 0, 1),
        ([told(0, 1), told(1, 0)], 0.5, 0),
        ([told(0, 1)], 0.51, "below"),
        ([told(), told()], 0, "untold"),
        ([told(1, 1, gold=None)], 0, "unknown"),
        ([], 0, "untold"),
    ],
)
def test_the_trace_that_is_right_most_often_is_chosen(
    some: list[Told], least: float, wanted: int | str
) -> None:
    found = select([Edit("e", NOWHERE, NOWHERE, "red", ASKED)], some, least)
    counts = {name: getattr(found, name) for name in ("untold", "unknown", "below")}
    if isinstance(wanted, int):
        assert found.chosen == [some[wanted]] and found.chosen[0] is some[wanted]
        assert not any(counts.values())
    else:
        assert not found.chosen and counts == dict.fromkeys(counts, 0) | {wanted: 1}


@pytest.mark.parametrize(
    ("some", "asked", "wanted"),
    [
        ([told(1, 0)], 1, (1, 0)),
        ([told(1, 0), told(1, 1), told(0, 0)], 3, (1, 0)),
        ([told(1, 0), told(1, 1)], 2, None),  # split on the second
        ([told(1, 0), told(), told()], 3, None),  # mostly unread
        ([told(1, 0), told()], 2, (1, 0)),
        ([], 2, None),
    ],
)
def test_gold_is_what_most_traces_say(
    some: list[Told], asked: int, wanted: tuple[int, ...] | None
) -> None:
    assert majority(some, asked) == wanted


# ---------------------------------------------------------------------------------------- measures


def judged(*traces: Told, source: str = "s", gold: Any = None, asked: int | None = None) -> Judged:
    edit = Edit("e", NOWHERE, NOWHERE, "red", ASKED)
    return Judged(edit, asked or len(traces), traces, source, gold)


def pair(win: Judged, lose: Judged) -> JudgedPair:
    return JudgedPair(Preference(win.edit, lose.edit), win, lose)


def by_score(*scores: float | None, source: str = "s") -> Judged:
    some = [told() if s is None else told(1, int(s > 0.5), score=s) for s in scores]
    return judged(*some, source=source)


PAIRED = [
    pair(by_score(0.9, 0.7, source="a"), by_score(0.2, 0.4, source="a")),  # right
    pair(by_score(0.9, 0.1, source="a"), by_score(0.5, 0.5, source="a")),  # equal
    pair(by_score(0.2, 0.2, source="b"), by_score(0.3, None, source="b")),  # wrong
    pair(by_score(0.2, None, None, source="c"), by_score(0.1, source="c")),  # not judged
]


def test_preference_by_hand() -> None:
    found = {one.name: one for one in measures.preferences(PAIRED)}
    score = found["score"]
    assert (score.of.value, score.n, score.asked, score.ties) == (0.5, 3, 4, 1)
    assert found["by one trace"].of.value == pytest.approx((1 + 0.5 + 0) / 3)
    # Of the second, 0.9 is kept and 0.1 is not, against twice neither.
    assert found["keep alone"].of.value == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["follow alone"].of.value == 0.5 and "quality alone" not in found
    # Sources are drawn: of a alone it is 0.75, of b alone 0.
    assert score.of.low == 0 and score.of.high == 0.75 and score.of.count == 2


def test_a_gain_is_over_the_pairs_that_both_judge() -> None:
    high, low, none = (by_score(s, source="x") for s in (0.9, 0.1, None))
    right, wrong, unheard = pair(high, low), pair(low, high), pair(high, none)
    ours = [right, right, right, wrong, unheard, right]
    theirs = [right, wrong, wrong, wrong, wrong, unheard]
    found = measures.gain("them", ours, theirs)
    assert [of.value for of in found.of] == [0.25, 0.75, 0.5] and (found.n, found.asked) == (4, 6)
    # By the same draws: what both have wrong is drawn in both, and blurs no difference.
    same = [right] * 5 + [wrong] * 3
    several = [
        [replace_source(one, f"s{k}") for k, one in enumerate([*same, *more])]
        for more in ([right] * 2, [wrong] * 2)
    ]
    found = measures.gain("them", *several)
    assert found.of.difference.value == pytest.approx(0.2) and found.of.difference.low >= 0
    assert found.of.a.high > found.of.b.low


def replace_source(of: JudgedPair, source: str) -> JudgedPair:
    win, lose = (replace(one, source=source) for one in (of.win, of.lose))
    return replace(of, win=win, lose=lose)


def test_bins_by_hand() -> None:
    margins = [(one.low, one.high, one.n, one.of.value) for one in measures.by_margin(PAIRED)]
    assert margins == [(0, 0, 1, 0.5), (0, 0.1, 1, 0), (0.4, 1, 1, 1)]
    scores = [(one.low, one.n, one.of.value) for one in measures.by_score(PAIRED)]
    assert scores == [(0, 1, 0), (0.2, 3, 1 / 3), (0.4, 2, 0.5), (0.8, 1, 1)]


def test_verdicts_against_gold_by_hand() -> None:
    some = [
        judged(told(1, 1), told(1, 0), gold=(1, 1)),
        judged(told(1, 0), told(1, 0), gold=(0, 0), source="t"),
        judged(told(), told(), told(1, 1), gold=(0, 0), source="u"),  # not judged
        judged(told(1, 1)),  # without gold
    ]
    against = Against.of(some)
    right = {one.name: (one.of.value, one.against, one.n, one.asked) for one in against.accuracy}
    assert right == {
        "all": (0.625, 0.5, 4, 6),
        "follow": (0.5, 0.5, 2, 2),
        "keep": (0.75, 0.5, 2, 2),
    }
    bins = [(one.low, one.n, one.said, one.of.value) for one in against.reliability]
    assert bins == [(0, 1, 0, 0), (0.4, 1, 0.5, 1), (0.8, 2, 1, 0.5)]
    assert against.error == pytest.approx((0 + 0.5 + 2 * 0.5) / 4)
    assert against.brier == pytest.approx((0 + 0.25 + 0 + 1) / 4)


def test_auc_is_that_of_all_comparisons() -> None:
    noise = np.random.default_rng(5)
    some = [
        judged(
            told(1, 1, score=float(noise.integers(0, 6) / 5)),
            gold=(1, int(noise.random() < 0.4)),
            source=f"s{k % 7}",
        )
        for k in range(30)
    ]
    found = measures.auc([*some, judged(told(), gold=(1, 1))])
    good, bad = ([one.score for one in some if one.gold == (1, g)] for g in (1, 0))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(good, bad)]
    assert found is not None and found.of.value == pytest.approx(np.mean(wins))
    assert found.of.low < found.of.value < found.of.high and (found.n, found.asked) == (30, 31)
    assert measures.auc([one for one in some if one.gold == (1, 1)]) is None


def test_agreement_is_that_of_all_pairs_of_traces() -> None:
    some = [judged(told(1, 1), told(1, 0), told(0, 0)), judged(told(1, 0)), judged(told(1, 1))]
    found = measures.agreement(some, PAIRED)
    verdicts = [t.verdicts for t in some[0].traces]
    same = [np.mean([a[p] == b[p] for a, b in combinations(verdicts, 2)]) for p in (0, 1)]
    assert found is not None and found.verdicts.of.value == pytest.approx(np.mean(same))
    assert found.kappa == pytest.approx((np.mean(same) - 0.5) / 0.5)  # half of them are yes
    assert found.settled == 0.75  # all but the second
    assert measures.agreement(some[1:], []) is None


# -------------------------------------------------------------------------------------- evaluation


def test_a_folder_is_evaluated_and_goes_on_after_a_kill(
    world: Path, tmp_path: Path, capsys: Any
) -> None:
    asked = (
        "eval", "--data", world / "data", "--out", tmp_path, "--judge.weights", world / "llava",
        "--judge.options.prompts", world / "words", "--judge.options.traces", 5,
        "--judge.options.max_tokens", 16, "--judge.rows", 12,
    )  # fmt: skip
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    assert "verifier: llava" in out
    summary = json.loads((tmp_path / "eval.json").read_text())
    rows = lines(tmp_path / TRACES)
    assert len(rows) == 5 * (2 * 5 + 5) and summary["traces"]["asked"] == len(rows)
    assert {"cut off"} < {row.get("unread") for row in rows} and summary["cost"]["tokens"] > 3
    assert summary["traces"]["read"] == sum("score" in row for row in rows) > 0

    assert len({row["trace"] for row in rows if row["id"] == "p0/win"}) > 1
    page = (tmp_path / "verifier.html").read_text()
    assert all(f"<h4>p{k}</h4>" in page for k in range(5)) and page.count('class="side"') == 10
    runs = re.findall("(?s)<script>(.*?)</script>", page)
    assert set(runs) <= set(scripts().values()) and page.count("unread") > 0

    files = {name: (tmp_path / name).read_bytes() for name in (TRACES, "eval.json", PRINCIPLES)}
    with mock.patch("editr2.verifier.local.load_reader", side_effect=AssertionError):
        assert run(capsys, *asked)[0] == 0  # all is on record
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    record = tmp_path / "judges.jsonl"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:31])[:-9])
    assert run(capsys, *asked)[0] == 0
    assert (tmp_path / TRACES).read_bytes() == files[TRACES]


def test_a_served_verifier_is_evaluated_the_same_way(
    world: Path, tmp_path: Path, server: Any, capsys: Any
) -> None:
    judge = server(lambda *_: write_trace("<b>So</b>", (1,), 0.4))
    code, out, err = run(
        capsys, "eval", "--data", world / "data", "--out", tmp_path,
        "--judge.options.url", judge.url, "--judge.options.prompts", world / "words",
    )  # fmt: skip
    assert code == 0, err
    assert set(judge.asked) == {f"paint it {c}\n1. keep it" for c in ("red", "blue")}
    summary = json.loads((tmp_path / "eval.json").read_text())
    assert summary["preference"]["score"]["ties"] == 5 and summary["verifier"] == "judge"
    # Yes to everything, of which two of five hold: the constant answer is no.
    assert summary["verdicts"]["all"]["value"] == 0.4
    assert summary["verdicts"]["all"]["against"] == 0.6
    assert "judged: 5 of 5 pairs, 5 of 5 edits with gold" in out
    assert "&lt;b&gt;So" in (tmp_path / "verifier.html").read_text()
    assert re.search(r"score +0\.500 \[0\.500, 0\.500\] +5 +5 +5", out)


def sided(edits: Sequence[Edit], n: int, seed: int) -> list[list[str]]:
    """Prefers the preferred output of all pairs but one."""
    scores = {"win": 0.8, "lose": 0.5}
    found = [scores.get(edit.id.partition("/")[2], 0.1) for edit in edits]
    found = [0.2 if edit.id == "p3/win" else s for edit, s in zip(edits, found, strict=True)]
    return [[write_trace("Well", (int(s > 0.5),), s)] * n for s in found]


def test_pairs_that_it_got_wrong_are_shown_first(world: Path, tmp_path: Path, capsys: Any) -> None:
    with mock.patch("editr2.verifier.writers.resolve", lambda *_: sided):
        code, out, err = run(
            capsys, "eval", "--data", world / "data", "--out", tmp_path,
            "--judge.function", "somewhere:sided", "--judge.options.traces", 2,
        )  # fmt: skip
    summary = json.loads((tmp_path / "eval.json").read_text())
    assert code == 0 and summary["verifier"] == "sided", err
    assert summary["preference"]["score"]["value"] == 0.8 and summary["pairs_judged"] == 5
    assert [(one["from"], one["value"]) for one in summary["by_margin"]] == [(0.2, 0.8)]
    assert summary["verdicts"]["all"]["value"] == 0.6 and "auc" in summary
    page = (tmp_path / "verifier.html").read_text()
    assert re.findall("<h4>(.*)</h4>", page) == ["p3", "p0", "p1", "p2", "p4"]
    assert re.findall(r"([\d.]+ and [\d.]+) <b", page) == ["2.0 and 5.0"] + ["8.0 and 5.0"] * 4
    assert "Of 1 of 5 pairs" in page

    again = ("eval", "--data", world / "data", "--out", tmp_path / "again", "--against", tmp_path)
    with mock.patch("editr2.verifier.writers.resolve", lambda *_: pooled):
        code, out, err = run(capsys, *again, "--judge.function", "somewhere:pooled")
    gain = json.loads((tmp_path / "again" / "eval.json").read_text())["gain"]
    assert code == 0 and gain["gain"][0] == pytest.approx(0.5 - 0.8), err
    assert gain["theirs"][0] == 0.8 and gain["n"] == 5 and f"Beside {tmp_path.name}" in out
    code, _, err = run(capsys, *again[:-1], world, "--judge.function", "somewhere:pooled")
    assert code == 2 and "principles.jsonl" in err


def test_what_a_server_keeps_apart_as_reasoning_is_of_the_trace() -> None:
    said = writers._said(Answer("the end", "stop", reasoning=" It is red.\n"))
    assert said.text == "It is red.\nthe end" and not said.cut


def test_two_golds_of_an_edit_are_refused(world: Path, tmp_path: Path) -> None:
    for file in (world / "data").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = lines(tmp_path / TRACES)
    rows[-1]["gold"] = [1 - rows[0]["gold"][0]]  # of e0, as the first
    (tmp_path / TRACES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="e0: two golds"):
        read_data(str(tmp_path), None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "data.path: none"),
        (["eval", "--data", "{data}"], "judge: nobody (accepted"),
        (["eval", "--data", "{root}"], "judge: nobody"),
        (["eval", "--data", "{root}", "--judge.weights", "{root}/llava"], "neither pairs.jsonl"),
        (["eval", "--data", "{data}", "--judge.weights", "{root}/x"], "judge.weights: "),
        (["eval", "--data", "{data}", "--judge.options.temperature", "0"], "judge: nobody"),
        (
            ["traces", "--data", "{data}", "--judge.weights", "w", "--judge.options.url", "http://x"],
            "judge.options.url: beside weights",
        ),
        (
            ["traces", "--data", "{data}", "--judge.weights", "w", "--judge.options.scores", "a"],
            "judge.options.scores: of the reward alone",
        ),
        (
            ["traces", "--data", "{data}", "--judge.weights", "w", "--judge.function", "a:b"],
            "judge.function: a:b (accepted without weights)",
        ),
        (
            ["traces", "--data", "{data}", "--judge.weights", "w", "--judge.options.traces", "2",
             "--judge.options.temperature", "0"],
            "judge.options.traces: 2 at temperature 0",
        ),
        (
            ["traces", "--data", "{data}", "--judge.weights", "{root}/llava",
             "--gold.exact", "a:b", "--gold.weights", "w"],
            "gold.exact: a:b (accepted without a judge",
        ),
        (["traces", "--data", "{data}", "--judge.function", "os:getcwd"], "judge.function: "),
        (["principles", "--data", "{data}"], "judge: neither or both"),
        (["principles", "--data", "{root}", "--judge.exact", "os:x"], "neither edits.jsonl"),
        (["select", "--data", "{data}", "--out", "{data}"], "is the data"),
        (["select", "--data", "{data}", "--out", "{root}/s", "--least", "2"], "least"),
        (["select", "--data", "{root}/none", "--out", "{root}/s"], "no such folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], says: str, world: Path, tmp_path: Path, capsys: Any
) -> None:
    out = [] if "--out" in arguments or arguments[0] == "select" else ["--out", str(tmp_path)]
    given = [one.format(data=world / "data", root=world) for one in arguments]
    code, _, err = run(capsys, *given, *out)
    assert code == 2 and says in err and err.count("\n") == 1


@pytest.mark.exhaustive
def test_two_processes_say_what_one_says(world: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        subprocess.run(
            [sys.executable, "-m", *(torchrun if processes > 1 else []), "editr2", "verifier"]
            + ["eval", "--data", str(world / "data"), "--out", str(tmp_path / str(processes))]
            + ["--judge.weights", str(world / "llava"), "--judge.rows", "7"]
            + ["--judge.options.prompts", str(world / "words"), "--judge.options.traces", "3"]
            + ["--judge.options.max_tokens", "16"],
            check=True,
            cwd=ROOT,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    one, two = ((tmp_path / name / TRACES).read_bytes() for name in ("1", "2"))
    assert one == two and (tmp_path / "2" / "judges.1.jsonl").stat().st_size
