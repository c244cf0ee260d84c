"""Edit-R1's verifier: credit of traces, and the files that its stages read and leave."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from editr2.errors import DataError
from editr2.rewards.traces import read_principles, write_trace
from editr2.verifier.credit import gcpo_credit
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    Told,
    read_edits,
    read_preferences,
    read_told,
    write_edits,
    write_preferences,
    write_told,
)

NAN = float("nan")

# ------------------------------------------------------------------------------------------- credit


@pytest.mark.parametrize(
    ("scores", "rewards"),
    [
        ([[3, 1, 2], [2, 0, 1]], [[3, 1, 2], [1, 3, 2]]),
        ([[1, 1, 1], [0, 0, 0]], [[3, 3, 3], [3, 3, 3]]),
        ([[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]),
        ([[0, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]),
        ([[NAN, 2, 2], [1, NAN, 3]], [[0, 1, 1], [2, 0, 0]]),
        ([[NAN] * 3, [NAN] * 3], [[0] * 3, [0] * 3]),
        ([[5, 5, 0], [5, 1, 5]], [[1, 1, 0], [0, 2, 0]]),
    ],
)
def test_win_rates_by_hand(scores, rewards):
    credit = gcpo_credit(torch.tensor([scores], dtype=torch.float32))
    assert torch.equal(credit.rewards[0], torch.tensor(rewards, dtype=torch.float64) / 3)
    for got, group in zip(credit.advantages[0], rewards, strict=True):
        exact = [Fraction(r, 3) - Fraction(sum(group), 9) for r in group]
        assert sum(exact) == 0
        assert torch.equal(got, torch.tensor([float(a) for a in exact], dtype=torch.float32))
    constant = all(len(set(group)) == 1 for group in rewards)
    assert credit.trains.tolist() == [not constant]


def test_permuted_traces_have_permuted_advantages_to_the_last_bit():
    noise = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 5, (16, 2, 7), generator=noise) / 10
    scores[torch.rand(scores.shape, generator=noise) < 0.1] = NAN
    whole = gcpo_credit(scores)
    assert whole.trains.any() and float(whole.advantages.sum(2).abs().max()) < 1e-6
    for _ in range(5):
        order = torch.rand(scores.shape, generator=noise).argsort(2)
        credit = gcpo_credit(scores.gather(2, order))
        assert torch.equal(credit.advantages, whole.advantages.gather(2, order))
        assert torch.equal(credit.rewards, whole.rewards.gather(2, order))
    one = gcpo_credit(scores[5:6])  # of a pair alone
    assert torch.equal(one.advantages[0], whole.advantages[5])


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(2, 3),
        torch.zeros(1, 3, 2),
        torch.zeros(1, 2, 0),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.full((1, 2, 3), float("inf")),
    ],
)
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="accepted"):
        gcpo_credit(scores)


# -------------------------------------------------------------------------------------------- files

ASKED = [{"text": "Is it red?", "kind": "follow"}, {"text": "Is the rest kept?", "kind": "keep"}]


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        pixels = np.full((4, 4, 3), ord(name), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def written(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


EDIT = {"id": "k", "image": "a.png", "edited": "b.png", "instruction": "red", "principles": ASKED}
PAIR = {"id": "p", "image": "a.png", "win": "b.png", "lose": "c.png", "instruction": "red"}


def test_files_round_trip(folder):
    edits = read_edits(written(folder / PRINCIPLES, EDIT | {"task": "paint"}), principles=True)
    assert edits[0].principles == read_principles(ASKED) and edits[0].task == "paint"
    assert edits[0].edited.read()[0, 0, 0] == ord("b")
    write_edits(folder / "again.jsonl", edits)
    assert (folder / "again.jsonl").read_text() == (folder / PRINCIPLES).read_text()

    pairs = read_preferences(written(folder / PAIRS, PAIR | {"principles": ASKED, "margin": 2}))
    assert [edit.id for edit in pairs[0].edits] == ["p/win", "p/lose"] and pairs[0].id == "p"
    write_preferences(folder / "again.jsonl", pairs)
    assert (folder / "again.jsonl").read_text() == (folder / PAIRS).read_text()

    told = [
        Told.of(edits[0], write_trace("It is.", (1, 0), 0.35), gold=(1, 1), judge="x"),
        Told.of(edits[0], "I cannot say"),
        Told("k", write_trace("It", (1, 0), 0.5), None, "cut off"),  # and stays without a score
    ]
    assert told[0].accuracy == 0.5 and told[1].accuracy is None and told[1].trace is None
    write_told(folder / TRACES, told)
    assert read_told(folder / TRACES, edits) == told
    rows = [json.loads(line) for line in (folder / TRACES).read_text().splitlines()]
    assert rows[0]["score"] == 3.5 and rows[0]["verdicts"] == [1, 0] and "unread" in rows[1]


TOLD = {"id": "k", "trace": write_trace("", (1, 0), 0.5)}


@pytest.mark.parametrize(
    ("read", "rows", "says"),
    [
        ("edits", [EDIT | {"principles": None}], ":1: principles: 'null'"),
        ("edits", [{k: v for k, v in EDIT.items() if k != "principles"}], "principles: missing"),
        ("edits", [EDIT, EDIT], ":2: id: 'k' twice"),
        ("edits", [EDIT | {"edited": "z.png"}], "edited: "),
        ("edits", [EDIT | {"image": "../a.png"}], "leads out of"),
        ("edits", [EDIT | {"score": 1}], "score: unknown field"),
        ("edits", [EDIT | {"instruction": " "}], "instruction: "),
        ("edits", [], "empty"),
        ("pairs", [PAIR | {"margin": True}], "margin: true"),
        ("pairs", [PAIR | {"principles": [{"text": "x"}]}], "principles[0]: "),
        ("told", [TOLD | {"id": "z"}], "id: 'z' (accepted: one of principles.jsonl)"),
        ("told", [TOLD | {"gold": [1]}], "gold: "),
        ("told", [TOLD | {"gold": [1, 2]}], "gold: "),
        ("told", [TOLD | {"verdicts": [1, 1]}], "verdicts: [1, 1], and the trace says [1, 0]"),
        ("told", [TOLD | {"score": 7}], "score: 7, and the trace says 5.0"),
        ("told", [TOLD | {"score": 5, "unread": "cut off"}], "score: beside unread"),
        ("told", [TOLD | {"unread": 1}], "unread: "),
        ("told", [TOLD | {"trace": None}], "trace: null"),
    ],
)
def test_a_wrong_record_is_named(folder, read, rows, says):
    edits = read_edits(written(folder / PRINCIPLES, EDIT), principles=True)
    file = written(folder / f"{read}.jsonl", *rows)
    with pytest.raises(DataError) as raised:
        match read:
            case "edits":
                read_edits(file, principles=True)
            case "pairs":
                read_preferences(file)
            case _:
                read_told(file, edits)
    assert says in str(raised.value) and str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
