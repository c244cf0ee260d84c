"""Traces and principles, and the reward that is read from them: what is a score, what is a failure,
and who is asked for the principles."""

from __future__ import annotations

import json

import numpy as np
import pytest

from editr2.rewards.ask import Asker
from editr2.rewards.base import Item
from editr2.rewards.client import Failure
from editr2.rewards.reading import Unread
from editr2.rewards.record import pixel_digest
from editr2.rewards.traces import Trace, read_principles, read_trace, write_trace
from editr2.rewards.verifier import Verifier, VerifierOptions
from editr2.sessions import Session, Turn

RNG = np.random.default_rng(7)
BEFORE, AFTER, LATER = (RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3))
ASKED = [
    {"text": "Is the cup red?", "kind": "follow"},
    {"text": "Is the plant there?", "kind": "keep"},
    {"text": "Is the lamp there?", "kind": "keep"},
]


def said(*verdicts, score="7.5", reason="It is red."):
    return f"{reason}\n{json.dumps(dict(zip('123456789', verdicts)))}\n<score>{score}</score>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (said(1, 0, 1), ((1, 0, 1), 0.75)),
        (said(True, 0.0, 1, score="10"), ((1, 0, 1), 1.0)),
        (f"<think>{said(0, 0, 0)}</think>\n" + said(1, 1, 1, score="0"), ((1, 1, 1), 0.0)),
        ('Of {"1": 0} I am unsure.\n' + said(1, 0, 1, score="3/10"), ((1, 0, 1), 0.3)),
        ("```json\n" + '{"3": 1, "1": 1, "2": 0}\n```<score> 5 </score>', ((1, 0, 1), 0.5)),
        (write_trace("Well.", (1, 0, 1), 0.125), ((1, 0, 1), 0.125)),
        (said(1, 0), "verdicts for '1, 2' (accepted: 1 to 3)"),
        (said(1, 0, 1, 1), "accepted: 1 to 3"),
        (said(1, 0.5, 1), "verdict 2: '0.5'"),
        (said(1, "1", 1), "verdict 2: '1'"),
        (said(1, None, 1), "verdict 2: 'null'"),
        (said(1, [1], 1), "verdict 2: '[1]'"),
        (said(1, 0, 1, score="11"), "out of range"),
        (said(1, 0, 1, score="-1"), "out of range"),
        (said(1, 0, 1, score="good"), "score: 'good'"),
        (said(1, 0, 1, score="nan"), "score: 'nan'"),
        (said(1, 0, 1).partition("<")[0], "score: no <score>"),
        ("<score>5</score>", "no JSON object"),
        (said(1, 0, 1) + "\nOr rather {}", "accepted: 1 to 3"),
        ("", "no JSON object"),
    ],
)
def test_a_trace_is_read_whole_or_not_at_all(text, wanted):
    if isinstance(wanted, str):
        with pytest.raises(Unread) as raised:
            read_trace(text, 3)
        assert wanted in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert read_trace(text, 3) == Trace(*wanted)


def test_the_share_of_a_kind():
    principles, trace = read_principles(ASKED), Trace((1, 0, 1), 0.2)
    shares = [trace.share(principles, kind) for kind in ("follow", "keep", "quality")]
    assert shares == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "principles: 'null' (accepted: a list"),
        ([], "principles: a list of 0 (accepted"),
        ([ASKED[0]] * 65, "principles: a list of 65 (accepted"),
        (["red?"], "principles[0]: 'red?' (accepted: an object"),
        ([ASKED[0], {"text": "x"}], "principles[1]: "),
        ([{"text": " ", "kind": "keep"}], "principles[0].text"),
        ([{"text": "x", "kind": "style"}], "principles[0].kind: 'style' (accepted: follow, keep"),
        ([{"text": "x", "kind": ["keep"]}], "principles[0].kind"),
    ],
)
def test_principles_that_are_none(given, says):
    with pytest.raises(ValueError) as raised:
        read_principles(given)
    assert says in str(raised.value)


@pytest.fixture
def verifier(beside):
    judges = beside("drawn_judge")

    def make(says, **options):
        chosen = VerifierOptions(url="http://nowhere", **options)
        reward = Verifier(chosen, asker=Asker(judges.FakeClient(says), chosen.asking))
        reward.client = reward.asker.client
        return reward

    return make


def judged(reward, turns, *images, turn=-1, seed=7):
    at = range(len(images))[turn]
    item = Item(Session("s", BEFORE, turns), np.stack(images), (at,), seed=seed)
    ((row,),) = reward.judge([item])
    return row


OWN = Turn("make the cup red", meta={"principles": ASKED})


def test_a_score_is_the_mean_of_traces_and_shares_are_of_kinds(verifier):
    votes = [said(1, 0, 1, score="4"), said(1, 1, 1, score="9"), "I cannot"]
    names = ("score", "follow", "keep", "quality")
    reward = verifier(lambda text, images: votes, traces=3, scores=names)
    row = judged(reward, (OWN, OWN), AFTER, LATER)
    assert row["score"].value == pytest.approx(0.65) and row["score"].votes == (0.4, 0.9)
    assert row["keep"].value == 0.75 and row["follow"].value == 1 and not row["quality"].applies
    (call,) = reward.client.asked
    assert [pixel_digest(i) for i in call["images"]] == [pixel_digest(AFTER), pixel_digest(LATER)]
    assert "2. Is the plant there?\n3. Is the lamp" in call["text"] and call["n"] == 3
    assert '{"1": 1, "2": 0}' in call["text"] and OWN.instruction in call["text"]


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (said(1, 0), "verdicts for"),
        (["x", "y", said(1, 0, 1)], "2 of 3 votes failed"),
        (Failure("503"), "503"),
    ],
)
def test_what_cannot_be_read_is_no_score(verifier, says, why):
    reward = verifier(lambda text, images: says, traces=3)
    score = judged(reward, (OWN,), AFTER)["score"]
    assert score.failed and why in score.reason


def test_principles_are_asked_once_for_all_siblings(verifier):
    def says(text, images):
        if len(images) == 1:
            return "Here: " + json.dumps({"principles": ASKED[:2]})
        return said(1, 0)

    turns = (Turn("add a cup"), Turn("make it red"))
    reward = verifier(says)
    for seed, image in ((1, AFTER), (2, LATER)):
        assert judged(reward, turns, image, image, seed=seed)["score"].value == 0.75
    asked = [call for call in reward.client.asked if len(call["images"]) == 1]
    assert len(asked) == 1 and len(reward.client.asked) == 3
    assert "1. add a cup" in asked[0]["text"] and asked[0].get("seed", 0) == 0
    assert pixel_digest(asked[0]["images"][0]) == pixel_digest(BEFORE)
    judged(reward, turns, AFTER, turn=0)  # another turn has its own
    assert len([call for call in reward.client.asked if len(call["images"]) == 1]) == 2


@pytest.mark.parametrize(
    ("how", "meta", "says", "why"),
    [
        ("given", {}, said(1), "no meta.principles"),
        ("auto", {"principles": []}, said(1), "principles: a list of 0"),
        ("auto", {}, "no idea", "principles cannot be read: no JSON"),
        ("ask", {"principles": ASKED}, '{"principles": [1]}', "principles[0]: '1'"),
        ("auto", {}, Failure("503"), "principles: 503"),
    ],
)
def test_without_principles_there_is_no_score(verifier, how, meta, says, why):
    reward = verifier(lambda text, images: says, principles=how)
    turns = (Turn("add a cup", meta=meta),)
    for _ in range(2):  # a failure is not kept
        score = judged(reward, turns, AFTER)["score"]
        assert score.failed and why in score.reason
    assert len(reward.client.asked) == (0 if why.startswith(("no meta", "principles: a")) else 2)
    lacking = reward.lacks(Session("s", BEFORE, (OWN, *turns)))
    assert lacking == ("fails, turn 2: no meta.principles" if how == "given" else None)
