"""What a run keeps of every evaluated session, the table that its page makes of it, and runs beside
one another."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from editr2.benchmarks.compare import compare
from editr2.cli.main import main
from editr2.report import build_report
from editr2.report.data import load_run
from editr2.report.kept import read_kept
from editr2.report.sessions import session_table
from editr2.rewards.adapt import panel, score_batch
from editr2.rewards.base import Score
from editr2.rewards.world import WorldReward
from editr2.rl import kept
from editr2.rl.credit import weighted_reward
from editr2.rl.evaluate import Evaluation, success
from editr2.sessions import Session, Turn
from editr2.worlds import shapes


class Told(WorldReward):
    """The world's, which says why and fails of one turn."""

    def judge(self, items):
        rows = super().judge(items)
        for item, of_item in zip(items, rows, strict=True):
            for t, row in enumerate(of_item):
                row["IF"] = Score(row["IF"].value, f"because of {item.session.id}")
                if item.session.id.endswith("2-cm") and t == 1:
                    row["GA"] = Score(None, "timed out")
        return rows


def evaluated(sessions, images, reward):
    """images: of every session, uint8 [T, H, W, 3]."""
    turns = max(len(session.turns) for session in sessions)
    scores = score_batch(reward, list(zip(sessions, images, strict=True)), turns)
    rewards = weighted_reward(scores, dict.fromkeys(scores.names, 1 / len(scores.names)))
    pictured = [
        (n, [kept.cell(image) for image in of])
        for n, of in enumerate(images)
        if kept.is_pictured(sessions[n], n, 1)
    ]
    modes = [session.mode for session in sessions]
    drift = torch.zeros(len(sessions), turns, 3)
    return Evaluation(scores, rewards, success(scores), modes, None, drift, pictured=pictured)


def write_run(folder, outputs, sessions, reward=None, heldout="4 sessions abc"):
    """outputs: an array of images of every session, by iteration."""
    asked, rows = panel(reward or Told()), []
    start = {"event": "start", "rewards": dict.fromkeys(asked.names, 1.0)}
    rows.append(start | {"identity": {"depends": {"heldout": heldout}}})
    for iteration, images in outputs.items():
        found = evaluated(sessions, images, asked)
        kept.keep(folder / "evaluations", iteration, found, sessions, asked)
        name = {0: "before", max(outputs): "after"}.get(iteration, "during")
        rows.append(found.row(iteration, name))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return load_run(folder)


@pytest.fixture(scope="module")
def world():
    sessions = [shapes.make_session(5, n, split="heldout", turns=3) for n in range(4)]
    exact = [WorldReward().expected(session) for session in sessions]
    same = [np.stack([session.image] * 3) for session in sessions]
    return sessions, exact, same


def pixels(uri):
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_what_was_said_of_a_session_and_its_images_come_back(world, tmp_path):
    sessions, exact, same = world
    run = write_run(tmp_path, {0: same, 4: [same[0], *exact[1:]]}, sessions)
    first, last = read_kept(tmp_path, [0, 4, 9], run.missing)
    assert (first.iteration, last.iteration) == (0, 4) and list(last.sessions) == [
        session.id for session in sessions
    ]
    for n, session in enumerate(sessions):
        found, cut = last.sessions[session.id], last.images(last.sessions[session.id])
        assert (found.mode, [t.task for t in found.turns]) == (
            session.mode,
            [t.task for t in session.turns],
        )
        images = [session.image, *(same if n == 0 else exact)[n], *exact[n]]
        for seen, image in zip([cut.source, *cut.outputs, *cut.expected], images, strict=True):
            assert (pixels(seen) == image).all()
    told = last.sessions[sessions[2].id].turns
    assert told[1].reward is None and "timed out" in told[1].reason and told[1].scores["IF"] is None
    assert told[0].whys == {"IF": f"because of {sessions[2].id}"} and told[0].reason is None
    assert last.sessions[sessions[1].id].success == 1.0
    # A picture that is gone leaves the words, and a torn line the others.
    (tmp_path / "evaluations/000004.png").unlink()
    file = tmp_path / "evaluations/000000.jsonl"
    file.write_text(file.read_text().replace("{", "", 1))
    missing = []
    first, last = read_kept(tmp_path, [0, 4], missing)
    assert missing == ["1 unreadable line of evaluations/ left out."] and len(first.sessions) == 3
    assert last.images(last.sessions[sessions[0].id]).source is None


def test_of_photographs_the_first_strips_are_kept_small(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (90, 300, 3)).astype(np.uint8)
    sessions = [Session(str(n), photo, (Turn("brighter"),)) for n in range(3)]

    def bright(session, images):
        return [{"IF": float(image.mean() / 255)} for image in images]

    run = write_run(tmp_path, {0: [photo[None]] * 3}, sessions, bright)
    (found,) = read_kept(tmp_path, [0], run.missing)
    assert found.picture.suffix == ".jpg"
    cuts = [found.images(session) for session in found.sessions.values()]
    assert [bool(cut.source) for cut in cuts] == [True, False, False]
    assert pixels(cuts[0].source).shape == (77, 256, 3) and not cuts[0].expected
    assert not kept.is_pictured(sessions[0], 0, 0)  # eval.strips 0


def test_the_table_says_of_every_session_how_it_changed_and_what_is_worst(world, tmp_path):
    sessions, exact, same = world
    run = write_run(tmp_path, {0: same, 2: same, 4: [same[0], *exact[1:]]}, sessions)
    table = session_table(run, 10**6)
    rows = {row.id: row for row in table.rows}
    assert table.passes == ["before", "after"] and table.total == 4 and table.pictured == 4
    assert rows[sessions[0].id].change == "equal" and rows[sessions[1].id].change == "better"
    failed = rows[sessions[2].id]
    assert failed.failed == 1 and failed.problem and "timed out" in failed.said
    # Of the last turn in full, whose least score is of an earlier one.
    assert rows[sessions[1].id].worst.text.startswith("1.00")
    assert rows[sessions[0].id].said.endswith(f"because of {sessions[0].id}")
    opened = table.details[1]
    assert [one["name"] for one in opened["passes"]] == ["before", "after"]
    assert len(opened["expected"]) == 3 and opened["turns"][0]["task"] == sessions[1].turns[0].task
    assert [step.name for step in table.through[0].steps] == [
        "source",
        "asked for",
        "before",
        "iteration 2",
        "after",
    ]
    # Images stand as long as there is room for them, words always.
    assert session_table(run, 16_000).pictured in (1, 2, 3) and not session_table(run, 0).through
    page = build_report(tmp_path).read_text()
    assert page.count('class="open"') == 4 and len(page) < 3e6


def test_of_an_older_run_the_strips_are_the_table(tmp_path, beside):
    beside("test_report").write_strips(tmp_path, "after", [0.1, None])
    table = session_table(load_run(tmp_path), 0)
    assert [row.id for row in table.rows] == ["session-0", "session-1"]
    assert table.rows[1].problem and not table.compared and table.passes == ["after"]


@pytest.mark.parametrize(
    ("heldout", "some", "reward", "said"),
    [
        ("4 sessions abc", 4, None, None),
        (
            "3 sessions def",
            3,
            None,
            "Evaluated sessions differ: 4 of one and 3 of two; the 3 that both have are compared.",
        ),
        (
            "4 sessions abc",
            4,
            lambda session, images: [{"score": 0.5} for _ in images],
            "two is not held against one session by session: rewards: CC, GA, IF of one, score "
            "of two.",
        ),
    ],
)
def test_runs_stand_side_by_side(
    heldout, some, reward, said, world, tmp_path, monkeypatch, capsys, beside
):
    monkeypatch.chdir(tmp_path)
    sessions, exact, same = world
    write_run(Path("one"), {0: same, 4: same}, sessions)
    write_run(Path("two"), {0: same[:some], 4: exact[:some]}, sessions[:some], reward, heldout)
    assert main(["report", "one", "two", "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0] == said) == (said is not None)
    page = beside("test_report").Page(Path("out/compare.html").read_text())
    assert (said in page.text) if said else ("differ" not in lines[0])
    evaluated = page.charts["Reward of the last turn, evaluated"]
    assert [(one["label"], one["colour"]) for one in evaluated["series"]] == [
        ("one", 0),
        ("two", 1),
    ]
    paired = [line for line in lines if line.startswith("two against one")]
    if reward is not None:
        assert not paired
        return
    assert paired[0].startswith(f"two against one, evaluation: {some} sessions that both have")
    assert f"IF, {sessions[0].turns[0].task}" in page.text or "By task" in page.text
    # A colour stays a run's.
    assert [one["colour"] for one in page.charts["IF"]["series"]] == [0, 1]


def test_a_run_without_ids_is_compared_by_the_places_of_its_sessions(world, tmp_path):
    sessions, exact, same = world
    for name, images in (("one", same), ("two", exact)):
        write_run(tmp_path / name, {0: same, 4: images}, sessions)
    (tmp_path / "one/evaluations/000004.jsonl").unlink()
    said = compare([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert said[0] == "two against one, evaluation: 4 sessions that both have"


def test_what_is_no_run_is_refused_beside_one(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), {0: world[2]}, world[0])
    Path("none").mkdir()
    assert main(["report", "one", "none"]) == 2
    assert "none: no metrics.jsonl (accepted: folders of runs;" in capsys.readouterr().err
    assert main(["report", "one", "."]) == 2  # the folder around it
    assert "did you mean one?" in capsys.readouterr().err
