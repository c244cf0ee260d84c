"""What a judge's answer is worth: read from both sides, as words, tags, JSON and probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from editr2.config.fields import Wrong, built
from editr2.errors import ConfigError
from editr2.rewards import wire
from editr2.rewards.answers import session_scores
from editr2.rewards.ask import Asker, Asking, Verdict
from editr2.rewards.base import Calls, Score
from editr2.rewards.client import Client, Place, Server, vote_seed
from editr2.rewards.reading import (
    YES_NO,
    Unread,
    first_word,
    graded,
    json_in,
    last_tag,
    numbers,
)
from editr2.rewards.record import Record, read_record

IMAGE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
IMAGES = [IMAGE, np.ascontiguousarray(IMAGE[::-1])]


@pytest.fixture(scope="module")
def judges(beside: Callable[[str], ModuleType]) -> ModuleType:
    return beside("judge_server")


@pytest.fixture
def judge(judges: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(wire, "_pause", lambda seconds: None)
    with judges.JudgeServer() as server:
        yield server


def asker_of(judge: Any, record: Any = None, **asking: Any) -> Asker:
    client = Client(Server(url=judge.url, model="judge"), Calls(8, 5.0, 0), record)
    return Asker(client, Asking(**asking))


# -------------------------------------------------------------------------------------- scales


SAID: list[tuple[Any, object, float | str]] = [
    # a scale, what came back, what it is worth (or the words of why it is nothing)
    (YES_NO, "yes", 1.0),
    (YES_NO, " No.", 0.0),
    (YES_NO, "**YES**", 1.0),
    (YES_NO, "Yes, the car is red and no dog is there.", 1.0),
    (YES_NO, "no\n", 0.0),
    (YES_NO, True, 1.0),
    (YES_NO, False, 0.0),
    (YES_NO, 1, 1.0),
    (YES_NO, "", "'' came back (accepted: yes or no)"),
    (YES_NO, "maybe", "'maybe' came back"),
    (YES_NO, "none", "came back"),
    (YES_NO, "not yes", "came back"),
    (YES_NO, "yesterday", "came back"),
    (YES_NO, "yes or no", "'yes or no' came back"),
    (YES_NO, "Yes/No", "came back"),
    (YES_NO, "Yes and no.", "came back"),
    (YES_NO, "No? Yes!", "came back"),
    (YES_NO, "Yes or no, I cannot tell", "came back"),
    (YES_NO, "Yes, and no dog is there", 1.0),
    (YES_NO, "no, no", 0.0),
    (YES_NO, "The answer is yes", "came back"),
    (YES_NO, 2, "2' came back"),
    (YES_NO, 0.5, "0.5' came back"),
    (YES_NO, None, "null' came back"),
    (YES_NO, ["yes"], "came back"),
    (numbers(0, 5), "4", 0.8),
    (numbers(0, 5), "4.5", 0.9),
    (numbers(0, 5), "4/5", 0.8),
    (numbers(0, 5), "Score: 4 out of 5.", 0.8),
    (numbers(0, 5), 5, 1.0),
    (numbers(0, 5), 2.5, 0.5),
    (numbers(1, 5), 1, 0.0),
    (numbers(0, 10), "10", 1.0),
    (numbers(0, 25), "25/25", 1.0),
    (numbers(0, 5, whole=True), 3.0, 0.6),
    (numbers(0, 5), "6", "'6' is out of range (accepted: a number from 0 to 5)"),
    (numbers(0, 5), "-1", "'-1' is out of range"),
    (numbers(0, 5), 1e9, "out of range"),
    (numbers(0, 5), float("nan"), "'NaN' is out of range"),
    (numbers(1, 5), "0", "out of range"),
    (numbers(0, 5), "8/10", "came back"),
    (numbers(0, 5), "4/50", "came back"),
    (numbers(0, 5), "3 or 4", "'3 or 4' came back"),
    (numbers(0, 5), "four", "came back"),
    (numbers(0, 5), "4th", "came back"),
    (numbers(0, 5), "I cannot compare the 2 images", "came back"),
    (numbers(0, 5), "1e-1", "'1e-1' came back"),
    (numbers(0, 5), "The score is **4**, since it is good", 0.8),
    (numbers(0, 5), "Rating: 4 (good)", 0.8),
    (numbers(0, 5), "4: as asked", 0.8),
    (numbers(0, 5), "1.2.3", "came back"),
    (numbers(0, 5), True, "'true' came back"),
    (numbers(0, 5), None, "came back"),
    (numbers(0, 5, whole=True), 3.5, "no whole number"),
    (graded(["bad", "fair", "good"]), "B", 0.5),
    (graded(["bad", "fair", "good"]), "(c)", 1.0),
    (graded(["bad", "fair", "good"]), "A. bad, since it is", 0.0),
    (graded(["bad", "fair", "good"]), "A dog is there", "came back (accepted: a letter, A to C)"),
    (graded(["bad", "fair", "good"]), "D", "came back"),
]


@pytest.mark.parametrize(("scale", "said", "worth"), SAID)
def test_what_an_answer_is_worth(scale: Any, said: object, worth: float | str) -> None:
    if isinstance(worth, float):
        assert scale.worth(said) == pytest.approx(worth)
        return
    with pytest.raises(Unread) as raised:
        scale.worth(said)
    assert worth in str(raised.value)


@pytest.mark.parametrize("given", [(5, 5), (5, 0), (-1, 5), (0, 101)])
def test_a_range_that_is_none(given: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        numbers(*given)


TAGGED: list[tuple[str, str | None]] = [
    ("<answer>yes</answer>", "yes"),
    ("I think <answer>no</answer>, but then: <answer> yes </answer>.", "yes"),
    ("<ANSWER>yes</ANSWER>", "yes"),
    ("<answer>yes<answer>no</answer>", "no"),
    ("<answer>\n4\n</answer>", "4"),
    ("yes", None),
    ("<answer>yes", None),
    ("<answers>yes</answers>", None),
    ("<think><answer>yes</answer></think> It cannot be told.", None),
    ("<think><answer>yes</answer></think> <answer>no</answer>", "no"),
    ("", None),
]


@pytest.mark.parametrize(("text", "inside"), TAGGED)
def test_the_last_tag_counts(text: str, inside: str | None) -> None:
    if inside is not None:
        assert last_tag(text, "answer") == inside
        return
    with pytest.raises(Unread, match="no <answer> came back"):
        last_tag(text, "answer")


JSON: list[tuple[str, Any]] = [
    ('{"score": 4}', {"score": 4}),
    ('Here it is:\n```json\n{"score": [1, 2]}\n```\nAnything else?', {"score": [1, 2]}),
    ('first {"score": 1}, no: {"score": 2}', {"score": 2}),
    ('a {brace} and {"score": {"a": 1}}', {"score": {"a": 1}}),
    ('<think>{"score": 9}</think>{"score": 3}', {"score": 3}),
    ('{"text": "a } in it", "score": 1}', {"text": "a } in it", "score": 1}),
    ('{"score": NaN}', None),
    ('{"score": 4', None),
    ("[1, 2]", None),
    ('<think>{"score": 9}</think> It cannot be told.', None),
    ("{" * 5000, None),
    ('{"a":' * 5000, None),
    ("none", None),
]


@pytest.mark.parametrize(("text", "found"), JSON)
def test_json_wherever_it_stands(text: str, found: Any) -> None:
    if found is not None:
        assert json_in(text) == found
        return
    with pytest.raises(Unread, match="no JSON object came back"):
        json_in(text)


# -------------------------------------------------------------------------------------- first words


def places(*tops: dict[str, float]) -> list[Place]:
    """Of each, the first is the chosen one."""
    return [
        Place(next(iter(top)), tuple((text, math.log(p)) for text, p in top.items()))
        for top in tops
    ]


WORDS: list[tuple[Any, list[Place], dict[str, float] | str]] = [
    (YES_NO, places({"yes": 0.7, "no": 0.3}), {"yes": 0.7, "no": 0.3}),
    (
        YES_NO,
        places(
            {"Yes": 0.4, " yes": 0.2, "YES": 0.1, "no": 0.1, "Ġno": 0.1, "▁No": 0.05, "not": 0.05}
        ),
        {"yes": 0.7, "no": 0.25},
    ),
    (YES_NO, places({"\n": 0.9}, {'"': 0.9}, {"no": 0.6, "yes": 0.2}), {"yes": 0.2, "no": 0.6}),
    (YES_NO, places({"Yes": 0.5, "Yes.": 0.3, "No": 0.1}), {"yes": 0.8, "no": 0.1}),
    (YES_NO, places({"The": 0.9, "yes": 0.1}), {"yes": 0.1, "no": 0.0}),
    (YES_NO, places({"\n": 0.9}), "no word came back"),
    (YES_NO, [], "no word came back"),
    (numbers(0, 5), places({"4": 0.5, " 5": 0.3, "3": 0.1}), {"4": 0.5, "5": 0.3, "3": 0.1}),
    (numbers(0, 5), places({"4": 0.5, "7": 0.3}), {"4": 0.5}),
    (numbers(0, 5), places({"7": 0.5, "4": 0.3}), "'7' is out of range"),
    (numbers(0, 5), places({"3": 0.9}, {"0": 0.9}), "'30' is out of range"),
    (numbers(1, 5), places({"0": 0.9}), "'0' is out of range"),
    # ten in one token
    (numbers(0, 10), places({"10": 0.5, "9": 0.3, "1": 0.2}), {"10": 0.5, "9": 0.3, "1": 0.2}),
    # ten in two: the chosen 1 is shared out by what follows
    (
        numbers(0, 10),
        places({"1": 0.6, "9": 0.4}, {"0": 0.75, "<end>": 0.25}),
        {"10": 0.45, "1": 0.15, "9": 0.4},
    ),
    (numbers(0, 10), places({"1": 0.6, "9": 0.4}, {"<end>": 1.0}), {"1": 0.6, "9": 0.4}),
    (numbers(0, 10), places({"1": 0.6, "9": 0.4}), {"1": 0.6, "9": 0.4}),  # it ended there
    (numbers(0, 10), places({"1": 0.5}, {" 0": 0.9, "0": 0.1}), {"1": 0.45, "10": 0.05}),
    (numbers(0, 10), places({"9": 0.9, "1": 0.05}), {"9": 0.9}),  # 1 or 10: little, left out
    (numbers(0, 10), places({"9": 0.6, "1": 0.4}), "0.40 of the probability is on digits that may"),
    (
        numbers(0, 25),
        places({"2": 0.8, "1": 0.05}, {"5": 0.5, "0": 0.25, "9": 0.2, "<end>": 0.05}),
        {"25": 0.4, "20": 0.2, "2": 0.04},
    ),
    (graded(["bad", "good"]), places({"B": 0.8, " A": 0.1}), {"b": 0.8, "a": 0.1}),
]


@pytest.mark.parametrize(("scale", "tops", "expected"), WORDS)
def test_the_probability_of_the_first_word(
    scale: Any, tops: list[Place], expected: dict[str, float] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(Unread) as raised:
            first_word(tops, scale)
        assert expected in str(raised.value)
        return
    masses, seen = first_word(tops, scale)
    for label, p in masses.items():
        assert p == pytest.approx(expected.get(label, 0.0)), label
    assert seen == pytest.approx(sum(expected.values()))


# -------------------------------------------------------------------------------------- log-probs


def test_yes_no_by_probability(judge: Any) -> None:
    judge.top = [{"Yes": 0.6, " no": 0.2, "maybe": 0.2}]
    asker = asker_of(judge)
    verdict = asker.yes_no("Is it red?", IMAGES, seed=3, name="IF", turn=1)
    assert isinstance(verdict, Score) and verdict.value == pytest.approx(0.75)
    assert (verdict.by, verdict.votes, verdict.spread) == ("logprobs", (), None)
    assert verdict.reason == "yes 0.75, no 0.25 (0.80 of the probability)"
    body = judge.chats[-1].body
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[-1]["text"] == "Is it red?\n\nAnswer with one word, yes or no."
    assert (body["temperature"], body["top_logprobs"], body["max_tokens"]) == (0.0, 20, 8)


@pytest.mark.parametrize(
    ("low", "high", "top", "value"),
    [
        (0, 5, {"4": 0.5, "5": 0.5}, 0.9),
        (1, 5, {"1": 1.0}, 0.0),
        (0, 9, {"9": 0.75, "0": 0.25}, 0.75),
    ],
)
def test_digits_are_an_expectation(
    judge: Any, low: int, high: int, top: dict[str, float], value: float
) -> None:
    judge.top = [top]
    verdict = asker_of(judge).digits("How well?", IMAGES, low=low, high=high, tail="")
    assert verdict.value == pytest.approx(value) and verdict.by == "logprobs"
    assert judge.chats[-1].body["messages"][0]["content"][-1]["text"] == "How well?"


def test_levels_are_letters(judge: Any) -> None:
    judge.top = [{"B": 0.5, "C": 0.5}]
    verdict = asker_of(judge).levels("How clean?", IMAGES, ["ruined", "flawed", "clean"])
    assert verdict.value == pytest.approx(0.75)
    text = judge.chats[-1].body["messages"][0]["content"][-1]["text"]
    assert "A. ruined\nB. flawed\nC. clean" in text


NOTHING: dict[str, tuple[list[dict[str, float]], str]] = {
    "another word": ([{"The": 0.9, "yes": 0.1}], "yes or no had 0.10 of the probability"),
    "a model that reasons": ([{"<think>": 1.0}], "yes or no had 0.00 of the probability"),
    "blanks": ([{"\n": 1.0}] * 8, "no word came back"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_no_mass_is_no_number(judge: Any, case: str) -> None:
    judge.top, reason = NOTHING[case]
    verdict = asker_of(judge).yes_no("Is it red?", IMAGES)
    assert verdict.failed and reason in str(verdict.reason) and verdict.by == "logprobs"


def test_the_least_mass_is_an_option(judge: Any) -> None:
    judge.top = [{"The": 0.7, "yes": 0.2, "no": 0.1}]
    assert asker_of(judge).yes_no("x").failed
    assert asker_of(judge, mass=0.3).yes_no("y").value == pytest.approx(2 / 3)


def test_a_digit_out_of_range_is_named(judge: Any) -> None:
    judge.top = [{"9": 0.9, "5": 0.1}]
    verdict = asker_of(judge).digits("How well?", IMAGES)
    assert verdict.failed and "'9' is out of range (accepted: a number from 0 to 5)" in str(
        verdict.reason
    )


def test_log_probs_that_stop_coming_are_a_failure_not_another_method(
    judges: ModuleType, judge: Any
) -> None:
    asker = asker_of(judge)
    asker.probe()
    judge.honours.discard("logprobs")
    verdict = asker.yes_no("Is it red?", IMAGES)
    assert verdict.failed and "none came back" in str(verdict.reason)


# -------------------------------------------------------------------------------------- systemone


def _systemone(body: Any) -> Any:
    question = body["questions"]["q"]
    if question["type"] == "noul":
        return {"answers": {"q": {"type": "noul", "noul": 0.7}}}
    count = len(question["criteria"])
    return {"answers": {"q": {"probabilities": {str(k): 1 / count for k in range(count)}}}}


def test_without_log_probs_it_is_systemone(judges: ModuleType) -> None:
    with judges.JudgeServer(honours={"images"}, systemone=_systemone) as judge:
        asker = asker_of(judge)
        [note] = asker.probe()
        assert "systemone" in note and asker.facts["answered by"] == "systemone"
        before = len(judge.requests)
        verdict = asker.yes_no("Is it red?", IMAGES, name="IF")
        assert (verdict.value, verdict.by) == (0.7, "systemone")
        assert asker.digits("How well?", IMAGES, low=1, high=5).value == pytest.approx(0.5)
        assert asker.levels("How clean?", IMAGES, ["bad", "good"]).value == pytest.approx(0.5)
        asked = judge.requests[before:]
        assert [request.path for request in asked] == [judges.SYSTEMONE] * 3
        assert asked[0].body["state"].endswith("Is it red?")  # the server says how to answer
        criteria = [request.body["questions"]["q"].get("criteria") for request in asked]
        assert criteria == [None, ["1", "2", "3", "4", "5"], ["bad", "good"]]
        # five images are more than it takes
        judge.says = "yes"
        assert asker.yes_no("Is it red?", [IMAGE] * 5).by == "votes"


# -------------------------------------------------------------------------------------- votes


def _texts(*texts: str) -> Callable[[Any, int], str]:
    return lambda body, k: texts[k]


VOTES: dict[str, tuple[tuple[str, ...], float | None, str]] = {
    "all": (("yes", "no", "yes", "yes"), 0.75, "4 of 4 votes, spread 0.43: "),
    "one is unread": (("yes", "maybe", "no", "no"), 1 / 3, "3 of 4 votes"),
    "half is unread": (("yes", "?", "?", "no"), 0.5, "2 of 4 votes"),
    "most are unread": (
        ("?", "maybe", "no", "well"),
        None,
        "'?' came back .* (3 of 4 votes failed",
    ),
    "none": (("", "", "", ""), None, "'' came back"),
}


@pytest.mark.parametrize("case", VOTES)
def test_votes_are_the_mean_of_those_that_answered(judges: ModuleType, case: str) -> None:
    texts, value, reason = VOTES[case]
    with judges.JudgeServer(honours={"n", "images"}, says=_texts(*texts)) as judge:
        verdict = asker_of(judge).yes_no("Is it red?", IMAGES, name="IF")
    assert verdict.by == "votes" and verdict.asked == 4
    for part in reason.split(" .* "):
        assert part in str(verdict.reason), verdict.reason
    if value is None:
        assert verdict.failed and verdict.votes == ()
    else:
        assert verdict.value == pytest.approx(value)
        assert verdict.spread == pytest.approx(float(np.std(verdict.votes)))


def test_a_failed_request_is_no_vote(judges: ModuleType) -> None:
    with judges.JudgeServer(honours={"images"}, says="yes") as judge:
        asker = asker_of(judge)
        asker.probe()
        good = judges.Reply({"choices": [judges.choice("no")]})
        judge.script(judges.Reply(status=400), good, judges.Reply(status=500))
        verdict = asker.yes_no("Is it red?", IMAGES)
        assert verdict.votes == (0.0, 1.0) and verdict.asked == 4
        judge.script(*[judges.Reply(status=500, body=b"dead")] * 3)
        verdict = asker.yes_no("Is it blue?", IMAGES)
        assert verdict.failed and verdict.reason == (
            "500 Internal Server Error: dead (3 of 4 votes failed)"
        )


def test_a_verdict_that_was_cut_off_is_no_vote(judges: ModuleType) -> None:
    says = "I think <answer>yes</answer> but wait"
    with judges.JudgeServer(says=says, finish="length") as judge:
        verdict = asker_of(judge, ask="think").yes_no("Is it red?", IMAGES)
        assert verdict.failed and "cut off by max_tokens, behind" in str(verdict.reason)
        assert "but wait" in str(verdict.reason)


def test_think_reads_the_last_tag_of_every_vote(judges: ModuleType) -> None:
    texts = [
        f"Well, <answer>no</answer>? The car is red. <answer>{x}</answer>" for x in ["yes", "no"]
    ]
    with judges.JudgeServer(says=_texts(*texts)) as judge:
        asker = asker_of(judge, ask="think", votes=2, temperature=0.9, max_tokens=300)
        asker.probe()
        verdict = asker.yes_no("Is it red?", IMAGES, seed=11, name="IF", turn=2)
        body = judge.chats[-1].body
    assert verdict.value == 0.5 and verdict.votes == (1.0, 0.0)
    assert "The car is red." in str(verdict.reason) and "<" not in str(verdict.reason)
    assert (body["n"], body["temperature"], body["max_tokens"]) == (2, 0.9, 300)
    assert body["seed"] == vote_seed(11, "IF", 2, 0) and "logprobs" not in body
    assert (
        "<answer>yes</answer> or <answer>no</answer>" in body["messages"][0]["content"][-1]["text"]
    )


def test_think_of_digits_and_levels(judges: ModuleType) -> None:
    with judges.JudgeServer(says="So: <answer>4</answer>") as judge:
        asker = asker_of(judge, ask="think", votes=2)
        assert asker.digits("How well?", IMAGES).value == pytest.approx(0.8)
        failed = asker.digits("How well?", IMAGES, high=3)
        assert failed.failed and "'4' is out of range (accepted: a number from 0 to 3)" in str(
            failed.reason
        )
    with judges.JudgeServer(says="So: <answer>B</answer>") as judge:
        assert asker_of(judge, ask="think").levels("?", IMAGES, ["bad", "good"]).value == 1.0


def test_temperature_0_is_one_vote(judges: ModuleType) -> None:
    with judges.JudgeServer(says="<answer>yes</answer>") as judge:
        verdict = asker_of(judge, ask="think", temperature=0.0).yes_no("Is it red?", IMAGES)
        assert verdict.votes == (1.0,) and verdict.asked == 1 and verdict.spread is None
        assert "n" not in judge.chats[-1].body and "seed" not in judge.chats[-1].body


def test_tags_of_turns(judges: ModuleType) -> None:
    text = "<turn1>yes</turn1> <turn2>yes</turn2> on reflection <turn2>no</turn2>"
    tags = {"turn1": YES_NO, "turn2": YES_NO}
    with judges.JudgeServer(says=text) as judge:
        verdicts = asker_of(judge).tagged("Turn by turn.", IMAGES, tags, name="GA")
        assert {tag: verdict.value for tag, verdict in verdicts.items()} == {"turn1": 1, "turn2": 0}
        tags["turn3"] = YES_NO
        verdicts = asker_of(judge).tagged("Turn by turn.", IMAGES, tags, name="GA")
        assert all(verdict.failed for verdict in verdicts.values()) and len(verdicts) == 3
        assert "no <turn3> came back" in str(verdicts["turn1"].reason)


FIELDS = {"score": [numbers(0, 25), numbers(0, 25)], "kept": YES_NO}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": [20, 5], "kept": true}', (0.8, 0.2, 1.0)),
        ('ok:\n```json\n{"kept": "no", "score": ["25", 0.0]}\n```', (1.0, 0.0, 0.0)),
        ('{"score": [26, 5], "kept": true}', "score[0]: '26' is out of range"),
        ('{"score": [20], "kept": true}', "score is '[20]' (accepted: a list of 2"),
        ('{"score": 20, "kept": true}', "score is '20' (accepted: a list of 2"),
        ('{"score": [20, true], "kept": true}', "score[1]: 'true' came back"),
        ('{"score": [20, 5], "kept": "well"}', "kept: 'well' came back"),
        ('{"score": [20, 5]}', "no 'kept' in the JSON (there were: 'score')"),
        ("twenty", "no JSON object came back, but 'twenty'"),
    ],
)
def test_verdicts_in_json(judges: ModuleType, text: str, expected: Any) -> None:
    with judges.JudgeServer(honours={"n", "images"}, says=text) as judge:
        verdicts = asker_of(judge, votes=2).json("Judge it.", IMAGES, FIELDS)
        assert "response_format" not in judge.chats[-1].body
    assert list(verdicts) == ["score[0]", "score[1]", "kept"]
    if isinstance(expected, str):
        assert all(v.failed and expected in str(v.reason) for v in verdicts.values())
    else:
        assert tuple(v.value for v in verdicts.values()) == pytest.approx(expected)


def test_a_server_that_can_is_held_to_the_schema(judges: ModuleType) -> None:
    with judges.JudgeServer() as judge:
        asker = asker_of(judge)
        asker.probe(schema=True)
        verdicts = asker.json("Judge it.", IMAGES, FIELDS, reason="why")
        sent = judge.chats[-1].body["response_format"]["json_schema"]["schema"]
        assert list(sent["properties"]) == sent["required"] == ["why", "score", "kept"]
        assert sent["properties"]["score"]["items"] == {
            "type": "number",
            "minimum": 0,
            "maximum": 25,
        }
        assert verdicts["kept"].value == 1.0 and "because it is" in str(verdicts["kept"].reason)
        asker.json("Judge it.", IMAGES, FIELDS, constrain=False)
        assert "response_format" not in judge.chats[-1].body


def test_a_format_of_ones_own(judges: ModuleType) -> None:
    """Points, or N/A where a question does not apply."""

    def read(text: str) -> dict[str, float | None]:
        first, second = text.split("|")
        return {"a": numbers(1, 4).worth(first), "b": None if second == "N/A" else float(second)}

    texts = ["4|N/A", "1|N/A", "4|0.5", "4|N/A"]
    with judges.JudgeServer(says=_texts(*texts)) as judge:
        verdicts = asker_of(judge).read("Judge it.", IMAGES, read, ("a", "b"))
        assert verdicts["a"].value == pytest.approx(0.75)
        assert verdicts["b"].value is None and not verdicts["b"].applies
        judge.says = _texts("4|7", "1|2", "4|0.5", "4|N/A")
        verdicts = asker_of(judge).read("And this.", IMAGES, read, ("a", "b"))
        assert verdicts["a"].votes == (1.0, 1.0)
        judge.says = "4|7"
        verdicts = asker_of(judge).read("Last.", IMAGES, read, ("a", "b"))
        assert "7.0 was read for b (accepted: 0 to 1)" in str(verdicts["a"].reason)


# -------------------------------------------------------------------------------------- which way


def test_a_way_that_was_asked_for_has_to_be_there(judges: ModuleType) -> None:
    with judges.JudgeServer(honours={"images"}) as judge:
        with pytest.raises(ConfigError, match="^answers: logprobs, and judge at .* gives none"):
            asker_of(judge, answers="logprobs").probe()
        with pytest.raises(ConfigError, match="^answers: systemone, and .* has no /v1/systemone"):
            asker_of(judge, answers="systemone").probe()
    with judges.JudgeServer(systemone=_systemone) as judge:
        asker = asker_of(judge, answers="systemone")
        assert asker.probe() == [] and asker.yes_no("x").by == "systemone"
        assert asker_of(judge, answers="votes").yes_no("x", IMAGES).by == "votes"
        assert asker_of(judge).yes_no("x", IMAGES).by == "logprobs"


@pytest.mark.parametrize(
    ("server", "asking", "requests"),
    [
        ({}, {}, 1),
        ({"honours": {"images"}, "systemone": _systemone}, {}, 1),
        ({"honours": {"images"}}, {}, 4),
        ({"says": "<answer>yes</answer>"}, {"ask": "think"}, 1),
    ],
)
def test_what_is_recorded_needs_no_server(
    judges: ModuleType, tmp_path: Any, server: Any, asking: Any, requests: int
) -> None:
    with judges.JudgeServer(**server) as judge:
        first = asker_of(judge, Record(tmp_path), **asking)
        first.probe()
        before = len(judge.requests)
        verdict = first.yes_no("Is it red?", IMAGES, seed=3, name="IF")
        assert not verdict.failed and len(judge.requests) - before == requests
    lines = list(read_record(tmp_path))
    assert len(lines) == (1 if verdict.by != "votes" else 4)
    assert sum(line["tries"] for line in lines) == requests
    later = asker_of(judge, Record(tmp_path), **asking)  # nobody is there any more
    assert later.yes_no("Is it red?", IMAGES, seed=3, name="IF") == verdict
    gone = later.yes_no("Is it blue?", IMAGES, seed=3, name="IF")
    assert gone.failed


def test_recorded_json_needs_no_server(judges: ModuleType, tmp_path: Any) -> None:
    with judges.JudgeServer() as judge:
        first = asker_of(judge, Record(tmp_path))
        first.probe(schema=True)
        verdicts = first.json("Judge it.", IMAGES, FIELDS)
    later = asker_of(judge, Record(tmp_path))
    assert later.json("Judge it.", IMAGES, FIELDS) == verdicts


def test_the_order_and_number_of_threads_do_not_matter(judges: ModuleType, tmp_path: Any) -> None:
    """A judge that samples by the seed: serial, with 8 threads, and resumed are equal."""

    def says(body: Any, k: int) -> str:
        return "yes" if (body.get("seed", 0) + k) % 3 else "no"

    def verdicts(judge: Any, threads: int, record: Any = None) -> list[Verdict]:
        asker = asker_of(judge, record)
        asker.probe()
        jobs = [(item, turn) for item in range(6) for turn in range(2)]
        if threads > 1:
            jobs = jobs[::-1]
        with ThreadPoolExecutor(threads) as pool:
            said = pool.map(
                lambda job: asker.yes_no("x", IMAGES, seed=job[0], name="IF", turn=job[1]), jobs
            )
            found = dict(zip(jobs, said))
        return [found[job] for job in sorted(jobs)]

    with judges.JudgeServer(honours={"n", "images"}, says=says) as judge:
        serial = verdicts(judge, 1)
        assert len({verdict.value for verdict in serial}) > 1
        assert verdicts(judge, 8, Record(tmp_path)) == serial
        before = len(judge.chats)
        asker = asker_of(judge, Record(tmp_path))
        again = [
            asker.yes_no("x", IMAGES, seed=item, name="IF", turn=turn)
            for item in range(6)
            for turn in range(2)
        ]
        assert again == serial and len(judge.chats) == before


def test_a_verdict_is_a_score_as_a_reward_returns_it(judge: Any) -> None:
    verdict = asker_of(judge).yes_no("Is it red?", IMAGES)
    rows = session_scores(
        [{"IF": verdict}, {"IF": Verdict(None, "why")}], 2, ("IF",), Score(None, "x")
    )
    assert rows == [{"IF": Score(0.8, verdict.reason)}, {"IF": Score(None, "why")}]


def test_options_in_one_dataclass() -> None:
    @dataclass(frozen=True)
    class Options(Server, Asking):
        threshold: float = 0.5

    given = {"url": "http://judge:8000", "votes": 2, "ask": "think", "threshold": 0.3}
    options = built(given, Options, "reward.options")
    asker = Asker(Client(options), options)
    assert asker.facts["votes"] == "2 at temperature 0.6" and asker.facts["ask"] == "think"
    with pytest.raises(Wrong, match=r"reward.options.url: 7 .accepted: an address"):
        built({**given, "url": 7}, Options, "reward.options")


def test_options_hide_what_may_be_secret() -> None:
    @dataclass(frozen=True)
    class Options(Server, Asking):
        pass

    secret = "s3cret"
    options = Options(
        url=f"http://u:{secret}@h", url_env=secret, key_env=secret, extra={"k": secret}
    )
    assert secret not in repr(options) and "votes=4" in repr(options)
