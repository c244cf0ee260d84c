"""What is said of edits in the shapes world, the edits themselves, and the small verifier."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editr2.cli.main import main
from editr2.rewards.traces import read_principles, read_trace
from editr2.sessions import Session, Turn, load_sessions
from editr2.verifier.candidates import KINDS, gather, synthetic
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    read_edits,
    read_preferences,
    read_told,
)
from editr2.verifier.world import Look, look, principles, requests, with_principles
from editr2.verifier.world_files import write_world
from editr2.worlds.shapes import Scene, make_session, render, verify

SCENE = Scene("black", (("ring", "red"), None, ("cross", "blue"), *[None] * 6))


def asked(*instructions: str) -> Session:
    return Session("s", render(SCENE), tuple(map(Turn, instructions)))


def seen_as(instruction: str, edited: Scene, before: Scene = SCENE) -> Look:
    [request] = requests(asked(instruction))
    return look(request, render(before), render(edited))


# One line a kind of op: its principle, the right edit, and a cell's words in the trace.
OPS: dict[str, tuple[str, Scene, str]] = {
    "add a green square middle left": (
        "is there a green square middle left?",
        SCENE.put(3, ("square", "green")),
        "green square green square done",
    ),
    "remove the ring top left": (
        "is top left empty?",
        SCENE.put(0, None),
        "no object no object done",
    ),
    "paint the ring top left cyan": (
        "is the ring top left cyan?",
        SCENE.put(0, ("ring", "cyan")),
        "cyan ring cyan ring done",
    ),
    "move the ring top left to bottom right": (
        "is there a red ring bottom right and is top left empty?",
        SCENE.put(0, None).put(8, ("ring", "red")),
        "red ring red ring done",
    ),
    "set the background white": (
        "is the background white?",
        Scene("white", SCENE.cells),
        "background wants white shows white done",
    ),
}


@pytest.mark.parametrize("instruction", OPS)
def test_every_kind_of_request(instruction: str) -> None:
    principle, edited, words = OPS[instruction]
    [request] = requests(asked(instruction))
    assert principles(request)[0].text == principle
    right, still = seen_as(instruction, edited), seen_as(instruction, SCENE)
    assert (right.score, still.score) == (1, 0.5)
    assert set(right.verdicts) == {1} and still.verdicts == (0, *[1] * (len(right.verdicts) - 1))
    assert words in right.trace and words not in still.trace
    assert "failed" in still.trace and "differs" not in still.trace


REMOVED = SCENE.put(0, None)
WRONG: dict[str, tuple[Scene, tuple[int, ...], float]] = {
    "another is gone": (REMOVED.put(2, None), (1, 0, 1, 1), 0.5 + 0.5 * 7 / 8),
    "one came": (REMOVED.put(4, ("ring", "red")), (1, 0, 1, 1), 0.5 + 0.5 * 7 / 8),
    "the background": (Scene("gray", REMOVED.cells), (1, 1, 0, 1), 0.5),
    "nothing right": (Scene("gray", SCENE.cells), (0, 1, 0, 1), 0.0),
}


@pytest.mark.parametrize("what", WRONG)
def test_verdicts_and_score_say_what_is_wrong(what: str) -> None:
    edited, verdicts, score = WRONG[what]
    found = seen_as("remove the ring top left", edited)
    assert (found.verdicts, found.score) == (verdicts, score)
    read = read_trace(found.trace, len(verdicts))
    assert read.verdicts == verdicts and abs(read.score - score) <= 0.025


def test_a_cell_near_no_template_is_unclear_and_wrong() -> None:
    [request] = requests(asked("remove the ring top left"))
    half = ((render(SCENE).astype(int) + render(REMOVED)) // 2).astype(np.uint8)
    found = look(request, render(SCENE), half)
    assert "top no object unclear object failed" in found.trace
    assert found.verdicts == (0, 1, 1, 0)


def test_principles_name_what_the_words_leave_to_the_session() -> None:
    session = asked("add a square middle left always use green", "paint the cross top right")
    session = Session("s", session.image, (*session.turns, Turn("move it to top center")))
    named = [principles(request)[0].text for request in requests(session)]
    assert named[1:] == [
        "is the cross top right green?",
        "is there a green cross top center and is top right empty?",
    ]
    told = with_principles(session)
    for turn, request in zip(told.turns, requests(session), strict=True):
        assert read_principles(turn.meta["principles"]) == principles(request)


def test_it_agrees_with_the_world_reward() -> None:
    """Followed is IF on the background that was there, and an edit that is right throughout is
    right to both."""
    for index in range(10):
        session = make_session(5, index)
        said = [turn.instruction for turn in session.turns]
        asks = requests(session)
        perfect = [session.image, *(render(one.scene) for one in asks)]
        rng = np.random.default_rng(index)
        for turn, (request, (before, right)) in enumerate(
            zip(asks, pairwise(perfect), strict=True)
        ):
            for kind in KINDS:
                edited = synthetic(kind, request, before, rng)
                images = np.stack([*perfect[1 : turn + 1], edited])
                exact = verify(session.image, said[: turn + 1], images)[-1]
                found = look(request, before, edited)
                if found.background and not request.background:
                    assert found.followed == exact[0]
                assert (found.score == 1) == bool(exact[2])
            assert look(request, before, right).score == 1


def test_synthetic_edits_are_wrong_as_named() -> None:
    """Of every kind, the shares of verdicts that hold: which way it is wrong."""
    sessions = [make_session(1, i) for i in range(20)]
    found: dict[str, list[tuple[bool, bool, bool]]] = {kind: [] for kind in KINDS}
    for group in gather(sessions, None, requests, len(KINDS), 0):
        for kind, image in group.edits:
            one = look(group.request, group.before, image)
            kept = one.background or group.request.background
            found[kind].append((one.followed == 1, one.kept == 1, kept))
    shares = {kind: np.mean(rows, 0) for kind, rows in found.items()}
    assert all(len(rows) == 60 for rows in found.values())
    assert (shares["exact"] == 1).all()
    for kind, place in {"unchanged": 0, "wrong": 0, "elsewhere": 0, "lost": 1, "turned": 1}.items():
        assert shares[kind][place] == 0, kind
    assert shares["extra"][1] < 0.05 and shares["ground"][2] < 0.2
    assert 0.1 < shares["half"][0] < 0.8 and 0.1 < shares["smeared"][1] < 0.8


def test_files_hold_what_was_seen_and_pairs_err_as_often_as_stated(tmp_path: Path) -> None:
    sessions = [make_session(2, i) for i in range(20)]
    groups = list(gather(sessions, None, requests, 4, 0))
    counts = write_world(tmp_path, groups, noise=0.25, most=3, seed=1)
    edits = read_edits(tmp_path / PRINCIPLES, principles=True)
    told = read_told(tmp_path / TRACES, edits)
    assert [one.accuracy for one in told] == [1] * counts.edits == [1] * 240
    score = {str(e.edited.path): t.trace.score for e, t in zip(edits, told, strict=True) if t.trace}
    pairs = read_preferences(tmp_path / PAIRS)
    assert len(pairs) == counts.pairs > 100
    wrong = [score[str(p.win.edited.path)] < score[str(p.lose.edited.path)] for p in pairs]
    assert sum(wrong) == counts.swapped == sum((p.margin or 0) < 0 for p in pairs)
    assert abs(counts.swapped / counts.pairs - 0.25) < 0.1
    before = (tmp_path / PAIRS).read_bytes()
    write_world(tmp_path, groups, noise=0.25, most=3, seed=1)
    assert (tmp_path / PAIRS).read_bytes() == before


def test_a_writer_that_misreads_errs_as_often_as_stated_and_gold_does_not(tmp_path: Path) -> None:
    groups = list(gather([make_session(2, i) for i in range(20)], None, requests, 4, 0))
    files = {}
    for name, share in (("exact", 0.0), ("errs", 0.3)):
        counts = write_world(tmp_path, groups, noise=0, most=3, seed=1, misread_share=share)
        told = read_told(tmp_path / TRACES, read_edits(tmp_path / PRINCIPLES, principles=True))
        files[name] = [(tmp_path / f).read_bytes() for f in (PRINCIPLES, PAIRS)], told
    (exact, right), (errs, wrong) = files["exact"], files["errs"]
    assert exact == errs and [one.gold for one in right] == [one.gold for one in wrong]
    differ = [a.text.split() != b.text.split() for a, b in zip(right, wrong, strict=True)]
    assert sum(differ) == counts.misread and 0.2 < counts.misread / counts.edits < 0.4
    for a, b in zip(right, wrong, strict=True):
        rows = zip(a.text.splitlines()[:4], b.text.splitlines()[:4], strict=True)
        assert sum(one != other for one, other in rows) <= 1, "one cell of one row"
    # What it writes follows from what it saw: some verdicts are wrong, and the score with them.
    assert 0 < sum(one.accuracy < 1 for one in wrong) <= counts.misread
    assert all(one.trace is not None for one in wrong)


def test_siblings_share_what_came_before_on_the_first_turn_alone() -> None:
    session = make_session(0, 0)
    right = np.stack([render(one.scene) for one in requests(session)])
    groups = list(gather([session], [[right, right[::-1]]], requests, 1, 0))
    assert [group.id.split("/")[1] for group in groups] == [
        *("1.0", "2.0", "2.1", "2.2", "3.0", "3.1", "3.2")
    ]
    own = [[kind for kind, _ in group.edits].count("policy") for group in groups]
    assert own == [2, 1, 1, 0, 1, 1, 0]
    assert np.array_equal(groups[2].before, right[2]) and np.array_equal(groups[3].before, right[0])


def test_the_small_verifier_reads_and_writes_every_word(tmp_path: Path) -> None:
    """Its folder is loaded as any verifier's, knows all words of the world's traces, and what it
    would write is read."""
    from editr2.verifier.model import load_reader
    from editr2.verifier.settings import ReaderConfig

    small = ["--hidden", "20", "--layers", "1", "--sight_hidden", "8", "--sight_layers", "1"]
    assert main(["world", "verifier", "--out", str(tmp_path / "start"), *small]) == 0
    start = str(tmp_path / "start")
    reader = load_reader(ReaderConfig(weights=start, lora_rank=0, prompts=start))
    write_world(
        tmp_path / "data",
        gather([make_session(3, i) for i in range(12)], None, requests, 2, 0),
        noise=0,
        most=0,
        seed=0,
    )
    edits = read_edits(tmp_path / "data" / PRINCIPLES, principles=True)
    for edit, one in zip(edits, read_told(tmp_path / "data" / TRACES, edits), strict=True):
        ids = reader.answer_ids(one.text, one.id)
        assert read_trace(reader.tokenizer.decode(ids[:-1]), len(edit.principles)) == one.trace
    prompt = reader.prompt(edits[0])
    assert prompt.ids.tolist().count(reader.module.config.image_token_id) == 18
    # A picture's pixels reach the words: other pixels, other log-probs.
    other = reader.prompt(edits[-1])
    ids = reader.answer_ids("same", "x")
    assert reader.log_probs([prompt, other], [ids, ids]).log_prob[:, 0].unique().numel() == 2


def test_commands(tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "edits")
    given = ["world", "edits", "--out", out, "--count", "1", "--siblings", "1", "--synthetic", "1"]
    assert main([*given, "--turns", "2"]) == 0
    assert "5 edits" in capsys.readouterr().out
    edits = read_edits(tmp_path / "edits" / PRINCIPLES)
    assert sum("policy" in edit.id for edit in edits) == 2
    assert main(["world", "edits", "--out", out, "--siblings", "0", "--synthetic", "0"]) == 2
    assert "accepted: at least 1 of one of them" in capsys.readouterr().err
    made = ["world", "make", "--out", str(tmp_path / "s"), "--count", "2", "--principles"]
    assert main(made) == 0
    rows = [json.loads(s) for s in (tmp_path / "s" / "sessions.jsonl").read_text().splitlines()]
    assert all(turn["meta"]["principles"] for row in rows for turn in row["turns"])
    assert len(load_sessions(tmp_path / "s")) == 2
