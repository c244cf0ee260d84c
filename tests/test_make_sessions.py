"""Sessions made from images: what is drawn can be done, whatever the things and the seed are, and
is the same in every run; the judge at the end is asked once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from editr2.annotate.fields import LISTS, lacking
from editr2.annotate.make import (
    BOUND,
    MARKS,
    Asked,
    Drawn,
    Seen,
    bookkeeping,
    contradiction,
    draw,
)
from editr2.annotate.wordings import NAMED, POINTING, in_words, plural
from editr2.cli.main import main
from editr2.rewards.geometry import TASKS, Box, Edit, is_beside
from editr2.sessions import load_sessions

THINGS = (
    Seen("red cup", (Box(0.1, 0.5, 0.2, 0.6),)),
    Seen("wooden table", (Box(0.3, 0.4, 0.6, 0.8),)),
    Seen("dog", (Box(0.6, 0.4, 0.8, 0.8),)),
    Seen("apple", (Box(0.3, 0.5, 0.35, 0.55), Box(0.4, 0.5, 0.45, 0.55))),
    Seen("street sign", (Box(0.7, 0.1, 0.8, 0.3),), text="STOP"),
    Seen("sky", (Box(0, 0, 1, 0.4),), foreground=False),
    Seen("lamp", ()),  # named by the judge, not found by the detector
)
ANY_NAMES = (
    *("red cup", "cup", "blue glass cup", "dog", "old dog", "street sign", "glasses", "apples"),
    *("background poster", "kite", "berry", "brush", "wooden table", "gold ring", "person"),
)
BOXES = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
ANY_THINGS = st.lists(
    st.builds(
        lambda name, boxes, front, text: Seen(
            name,
            tuple(Box.of((x, y, min(x + w, 1), min(y + h, 1))) for x, y, w, h in boxes),
            front,
            text,
        ),
        st.sampled_from(ANY_NAMES),
        st.lists(BOXES, max_size=3),
        st.booleans(),
        st.sampled_from(["", "STOP", "it's", "a [b]", "HELLO"]),
    ),
    max_size=7,
    unique_by=lambda one: one.name,
)


@settings(max_examples=150)
@given(ANY_THINGS, st.sampled_from(["cm", "cu", "mixed"]), st.integers(2, 4), st.integers(0, 2**40))
def test_what_is_drawn_can_be_done(things, mode, turns, seed):
    """The rules, looked at once more from what is written alone."""
    drawn = draw(things, mode, turns, np.random.default_rng([seed, 1]))
    assert drawn == draw(things, mode, turns, np.random.default_rng([seed, 1]))
    if drawn is None:
        return
    assert len(drawn.turns) == turns and contradiction(things, drawn) is None
    found = {one.name: one for one in things if one.boxes}
    there, named, ever = set(found), set(), {one.name for one in things}
    for turn, fields in zip(drawn.turns, bookkeeping(things, drawn), strict=True):
        edit = turn.edit
        assert {name for name in (edit.object, edit.reference) if name} <= there
        assert set(edit.kept) <= there and edit.new not in ever
        assert (edit.colour or edit.material or "-") not in (edit.object or "")
        assert "[" not in turn.instruction and "{" not in turn.instruction
        if edit.side is not None and edit.task == "position_change" and edit.object in found:
            box, of = found[edit.object].box, found[edit.reference].box
            assert not is_beside(box, edit.side, of)
        if edit.task == "count_change":
            assert edit.count != len(found[edit.object].boxes)
        named |= {name for name in (edit.object, edit.reference) if name}
        if edit.task == "subject_add":
            named.discard(edit.reference)  # nothing was done to it
        unchanged, now, ever = (set(fields[name]) for name in LISTS)
        assert unchanged <= now <= ever and unchanged <= set(found)
        # A pronoun's own thing goes by other names; by its own it was named once.
        assert not (
            unchanged & {one.edit.object for one in drawn.turns[: drawn.turns.index(turn) + 1]}
        )
        if edit.task in ("subject_remove", "subject_replace"):
            assert edit.object not in now
        there = now
    if drawn.mode == "cm":
        assert drawn.rule[1] in drawn.turns[0].instruction
        assert any(turn.edit.task in BOUND for turn in drawn.turns[1:])
    else:
        for before, turn in zip(drawn.turns, drawn.turns[1:]):
            words = set(turn.instruction.casefold().split())
            assert words & {"it", "its", "them", "their"}
            assert before.subject in (turn.edit.object, turn.edit.reference)


def test_every_kind_of_edit_is_drawn():
    seen, lost, counted, moved = set(), 0, set(), set()
    found = {one.name: one for one in THINGS}
    for mode, many in (("cm", 150), ("cu", 400)):
        for k in range(many):
            drawn = draw(THINGS, mode, 3, np.random.default_rng([0, k]))
            lost += drawn is None
            seen |= {(mode, turn.edit.task) for turn in drawn.turns} if drawn else set()
            for turn in drawn.turns if drawn else ():
                edit = turn.edit
                if edit.task == "count_change":
                    assert edit.count != len(found[edit.object].boxes)
                    counted.add(edit.object)
                if edit.task == "position_change" and edit.object in found:
                    box, of = found[edit.object].box, found[edit.reference].box
                    assert not is_beside(box, edit.side, of)
                    moved.add(edit.object)
    assert {task for _, task in seen} == set(TASKS) and lost == 0
    assert "apple" in counted and "street sign" in moved
    assert ("cm", "background_change") in seen and ("cu", "position_change") in seen


CUP = Edit("color_alter", object="red cup", colour="blue")
BLUE = "Change the color of the red cup to blue"
RULE = ("colour", "green")
ADD = Asked(Edit("subject_add", new="kite"), "Add a kite", "kite")
WRONG = {
    "is not there": [
        Asked(Edit("subject_remove", object="dog"), "x"),
        Asked(Edit("subject_remove", object="dog"), "Remove it"),
    ],
    "red already": [Asked(Edit("color_alter", object="red cup", colour="red"), "x")],
    "or was kite already": [ADD, ADD],
    "contradicts the rule": [
        ADD,
        Asked(CUP, BLUE),
        replace(ADD, edit=Edit("subject_add", new="owl")),
    ],
    "no later turn has to": [ADD, Asked(Edit("subject_remove", object="dog"), "x")],
    "no rule is set": [replace(ADD, instruction="Add a kite"), ADD],
    "leaves nothing for it": [
        Asked(Edit("subject_remove", object="dog"), "x"),
        Asked(CUP, "Make it blue"),
    ],
    "a pronoun for red cup": [ADD, Asked(CUP, "Make it blue")],
    "no pronoun": [
        Asked(CUP, BLUE, "blue cup"),
        Asked(Edit("subject_remove", object="blue cup"), "Remove the cup"),
    ],
    "lamp is not there": [Asked(Edit("subject_remove", object="lamp"), "x")],
    "reads as another edit": [
        Asked(
            Edit("background_change", background="a beach", kept=("dog",)),
            "A beach in the background",
        )
    ],
    "beside itself": [
        Asked(Edit("position_change", object="dog", side="left", reference="dog"), "x")
    ],
}
UNDER_A_RULE = ("contradicts the rule", "no later turn has to", "no rule is set")


@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_done_is_no_session(why):
    turns = tuple(WRONG[why])
    if why in UNDER_A_RULE:
        if why != "no rule is set":
            turns = (
                replace(turns[0], instruction="Green for all. Add a kite in green"),
                *turns[1:],
            )
        drawn = Drawn("cm", turns, RULE)
    else:
        drawn = Drawn("cu", turns)
    assert why in str(contradiction(THINGS, drawn))


def test_words():
    assert plural("brush") == "brushes" and plural("berry") == "berries" and plural("dog") == "dogs"
    assert plural("glasses") is None and plural("person") == "persons"
    for wordings in (NAMED, POINTING):
        for task, texts in wordings.items():
            edit = Edit(
                task,
                "cup",
                "owl",
                "dog",
                "left",
                3,
                "blue",
                "wood",
                "a beach",
                "A",
                "B",
                ("dog", "hat", "cup"),
            )
            for text in texts:
                said = in_words(edit, text)
                assert "{" not in said and "  " not in said, said
    edit = Edit("background_change", background="a beach", kept=("dog", "hat", "cup"))
    assert in_words(edit, "keep {kept} unchanged") == "keep the dog, the hat, and the cup unchanged"


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "photos").mkdir()
    for k in range(3):
        image = np.random.default_rng(k).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / f"p{k}.png")
    boxes = {one.name: [list(box) for box in one.boxes] for one in THINGS}
    (tmp_path / "drawn_finder.py").write_text(
        f"from editr2.rewards.geometry import Box, Found\n\nBOXES = {boxes!r}\n\n\n"
        "class Finder:\n"
        "    def find(self, image, names, *, threshold=0.3):\n"
        "        return [[Found(Box(*b), 0.9) for b in BOXES.get(name, [])] for name in names]\n"
    )
    yield tmp_path
    import sys

    sys.modules.pop("drawn_finder", None)


@pytest.fixture
def judge(beside):
    """Says what is in a picture, and of every third session that it is not possible."""
    module = beside("judge_server")
    objects = [{"name": t.name, "foreground": t.foreground, "text": t.text} for t in THINGS]

    def says(body, k):
        text = "".join(part.get("text", "") for part in body["messages"][0]["content"])
        if text.startswith("This picture is about to be edited"):
            return json.dumps({"objects": objects})
        if "Read them as the person would" not in text:
            return "hi"
        marks = dict.fromkeys(MARKS, "yes")
        if len(text) % 3 == 0:
            marks["possible"] = "no"
        return json.dumps({"reason": "it is what it is", **marks})

    with module.JudgeServer(says=says, honours={"n", "images"}) as server:
        yield server


def words(server, out: str, *more: str) -> list[str]:
    told = ["data", "make", "photos", "--out", out, "--url", server.url, "--model", "judge"]
    return [*told, "--detector", "drawn_finder:Finder", "--count", "9", "--retries", "0", *more]


def test_sessions_are_made_and_are_the_same_again(images, judge, capsys):
    assert main(words(judge, "one")) == 0
    told = capsys.readouterr().out
    assert "9 of 9 sessions" in told and "x not possible (first: p" in told
    sessions = load_sessions("one")
    assert not any(lacking(turn) for session in sessions for turn in session.turns)
    assert {session.mode for session in sessions} == {"cm", "cu"}
    assert {session.id[:2] for session in sessions} == {"p0", "p1", "p2"}
    assert len({tuple(t.instruction for t in s.turns) for s in sessions}) == 9
    asked = len(judge.requests)
    assert main(words(judge, "one")) == 0 and len(judge.requests) == asked
    assert main(words(judge, "two", "--concurrency", "1")) == 0
    first, second = ((images / name / "sessions.jsonl").read_bytes() for name in ("one", "two"))
    assert first == second
    assert main(words(judge, "three", "--seed", "1")) == 0
    assert (images / "three" / "sessions.jsonl").read_bytes() != first
    assert main(["data", "validate", "one"]) == 0
    assert "9 of 9 sessions have what edit-r2" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["cm", "cu"])
def test_one_mode(images, judge, mode):
    assert main(words(judge, mode, "--mode", mode, "--turns", "4")) == 0
    sessions = load_sessions(mode)
    assert {session.mode for session in sessions} == {mode}
    assert {len(session.turns) for session in sessions} == {4}


def test_no_session_twice(images, judge, capsys, monkeypatch):
    def same(things, mode, turns, rng):
        return draw(things, "cm", turns, np.random.default_rng(0))

    monkeypatch.setattr("editr2.annotate.make.draw", same)
    judge.says = lambda body, k, real=judge.says: real(body, k).replace('"no"', '"yes"')
    assert main(words(judge, "twice")) == 0
    told = capsys.readouterr().out
    assert "3 of 9 sessions, of 54 candidates" in told and "51 x the same session twice" in told


def test_none_that_passes_is_an_error(images, judge, capsys):
    judge.says = lambda body, k: "never a word of JSON"
    assert main(words(judge, "none")) == 2
    told = capsys.readouterr()
    assert "none of 54 candidates became a session: 54 x the picture's things" in told.err
    assert not (images / "none" / "sessions.jsonl").exists()
