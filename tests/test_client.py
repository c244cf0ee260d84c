"""The client against a server that misbehaves: exact tries, exact concurrency, no invented number,
nothing secret anywhere."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from editr2.errors import ConfigError, UserError
from editr2.rewards import wire
from editr2.rewards.base import Calls, RewardFailure
from editr2.rewards.client import Answer, Client, Failure, Server, vote_seed
from editr2.rewards.record import Record, read_record

IMAGE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
OTHER = np.ascontiguousarray(IMAGE[::-1])
RETRIES = 2


@pytest.fixture(scope="module")
def judges(beside: Callable[[str], ModuleType]) -> ModuleType:
    return beside("judge_server")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries are noted, not made; the jitter is its upper bound."""
    waited: list[float] = []
    monkeypatch.setattr(wire, "_pause", waited.append)
    monkeypatch.setattr(wire.random, "uniform", lambda low, high: high)
    return waited


@pytest.fixture
def judge(judges: ModuleType, pauses: list[float]) -> Iterator[Any]:
    with judges.JudgeServer() as server:
        yield server


def client_of(judge: Any, record: Any = None, **given: Any) -> Client:
    calls = Calls(
        concurrency=given.pop("concurrency", 4),
        timeout=given.pop("timeout", 5.0),
        retries=given.pop("retries", RETRIES),
    )
    return Client(Server(**{"url": judge.url, "model": "judge", **given}), calls, record)


def asked(client: Client, **given: Any) -> Any:
    [answer] = client.chat(["Is it red?", IMAGE], **given)
    return answer


def test_a_request_has_texts_and_images_in_order(judge: Any) -> None:
    client = client_of(judge, extra={"chat_template_kwargs": {"enable_thinking": False}})
    answers = client.chat(
        ["Before:", IMAGE, "after:", OTHER], n=3, temperature=0.6, seed=5, name="IF", turn=1
    )
    assert [answer.text for answer in answers] == ["yes"] * 3
    [request] = judge.chats
    body = request.body
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url"]
    seeds = [vote_seed(5, "IF", 1, vote) for vote in range(3)]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    assert body["n"] == 3 and body["seed"] == seeds[0] and body["temperature"] == 0.6
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "logprobs" not in body and "response_format" not in body


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_images_arrive_as_they_are(judge: Any, form: str) -> None:
    client = client_of(judge, images=form, quality=95, max_side=None if form == "png" else 16)
    wide = np.full((8, 32, 3), (200, 40, 90), np.uint8)
    client.chat(["x", wide])
    url = judge.chats[0].body["messages"][0]["content"][1]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == f"data:image/{form};base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    if form == "png":
        assert np.array_equal(seen, wide)
    else:
        assert seen.shape == (4, 16, 3)
        assert np.abs(seen.astype(int) - wide[0, 0]).max() < 6


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), "u1")],
)
def test_what_is_no_image_is_a_mistake_of_the_reward(judge: Any, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="accepted: uint8"):
        client_of(judge).chat([image])


MISBEHAVIOUR: dict[str, tuple[dict[str, Any], int, str]] = {
    # a reply, how many tries it takes in all, and what the failure says
    "503": ({"status": 503, "body": {"error": {"message": "busy"}}}, 3, "503 .*: busy .in 3 tries"),
    "500 without a word": ({"status": 500}, 3, r"^500 Internal Server Error \(in 3 tries\)$"),
    "429": ({"status": 429, "body": b"slow down"}, 3, "429 Too Many Requests: slow down"),
    "408": ({"status": 408}, 3, "408 Request Timeout"),
    "a status that has no name": ({"status": 599}, 3, "^599"),
    "400": ({"status": 400, "body": {"detail": "bad\nimage"}}, 1, "^400 Bad Request: bad image$"),
    "401": ({"status": 401, "body": {"message": "who?"}}, 1, "^401 Unauthorized: who[?]$"),
    "404": ({"status": 404, "body": {"error": "no model"}}, 1, "^404 Not Found: no model$"),
    "a list of what is wrong": (
        {"status": 422, "body": {"detail": [{"msg": "n"}]}},
        1,
        '"msg": "n"',
    ),
    "a long refusal": ({"status": 400, "body": b"x" * 99_999}, 1, "x{100}[.]{3}$"),
    "a page": ({"status": 403, "body": b"<!DOCTYPE html><p>no"}, 1, "403 Forbidden: an HTML page"),
    "a redirect": (
        {"status": 307, "headers": {"location": "http://127.0.0.1:9/v1"}},
        1,
        "^307 .*redirects are not followed$",
    ),
    "cut off": ({"body": b'{"choices": []}', "cut": 5}, 3, "^the connection broke off"),
    "hangs": ({"after": 30.0}, 3, "^no answer within 0.2 s .in 3 tries"),
    "a page as an answer": ({"body": b"<html><body>hello"}, 1, "not JSON: an HTML page"),
    "no JSON": ({"body": b"yes"}, 1, "^the answer is not JSON: yes$"),
    "no UTF-8": ({"body": b"\xff\xfe\x00"}, 1, "^the answer is not JSON"),
    "deep": ({"body": b"[" * 200_000}, 1, "^the answer is not JSON"),
    "nothing": ({"body": b""}, 1, "^the answer is not JSON: nothing$"),
    "too large": ({"body": b" " * ((16 << 20) + 1)}, 1, "^the answer has more than 16 MiB$"),
    "a list": ({"body": []}, 1, "^no choices came back"),
    "no choices": ({"body": {"choices": []}}, 1, "^no choices came back"),
    "an error with 200": ({"body": {"error": "out of memory"}}, 1, "no choices .*out of memory"),
    "a choice that is none": ({"body": {"choices": [7]}}, 1, "int where an object belongs"),
    "no message": ({"body": {"choices": [{"text": "yes"}]}}, 1, "NoneType where an object"),
    "no text": (
        {"body": {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}},
        1,
        "^no text came back .finish_reason length.$",
    ),
    "a refusal": (
        {"body": {"choices": [{"message": {"content": None, "refusal": "I will not"}}]}},
        1,
        "no text came back .*: I will not$",
    ),
}


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_misbehaviour_is_a_failure_with_its_reason(
    judges: ModuleType, judge: Any, pauses: list[float], tmp_path: Any, case: str
) -> None:
    reply, tries, reason = MISBEHAVIOUR[case]
    judge.script(*[judges.Reply(**reply)] * 9)
    client = client_of(judge, Record(tmp_path), timeout=0.2 if "after" in reply else 5.0)
    answer = asked(client, name="IF", turn=2)
    assert isinstance(answer, Failure), answer
    assert re.search(reason, answer.reason), answer.reason
    assert len(judge.chats) == tries and len(pauses) == tries - 1
    assert "127.0.0.1" not in answer.reason and str(judge.port) not in answer.reason
    [line] = read_record(tmp_path)
    assert line["failed"] == answer.reason and "answer" not in line
    assert (line["tries"], line["name"], line["turn"], line["vote"]) == (tries, "IF", 3, 1)


@pytest.mark.parametrize(
    "case", [name for name, (_, tries, _) in MISBEHAVIOUR.items() if tries == 3]
)
def test_what_passes_is_answered_by_the_next_try(
    judges: ModuleType, judge: Any, pauses: list[float], tmp_path: Any, case: str
) -> None:
    reply, _, _ = MISBEHAVIOUR[case]
    judge.script(judges.Reply(**reply))
    client = client_of(judge, Record(tmp_path), timeout=0.2 if "after" in reply else 5.0)
    assert asked(client) == Answer("yes", "stop")
    assert len(judge.chats) == 2 and pauses == [wire.BACK_OFF]
    [line] = read_record(tmp_path)
    assert line["tries"] == 2 and line["answer"]["text"] == "yes"


@pytest.mark.parametrize("failing", [False, True])
def test_the_record_has_the_seconds_with_the_server(
    judges: ModuleType, pauses: list[float], tmp_path: Any, failing: bool
) -> None:
    """Of the try that was answered, too."""
    with judges.JudgeServer() as judge:
        judge.script(*[judges.Reply({}, 500, after=0.1)] * failing)
        judge.after = 0.1
        asked(client_of(judge, Record(tmp_path)))
    [line] = read_record(tmp_path)
    assert line["tries"] == 1 + failing
    assert 0.1 * (1 + failing) <= line["seconds"] < 5


def test_no_server_is_tried_again(pauses: list[float]) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        client = Client(Server(url=f"http://127.0.0.1:{port}", model="judge"), Calls(retries=3))
        answer = asked(client)
    assert answer == Failure("no connection (Connection refused) (in 4 tries)")
    assert pauses == [0.5, 1.0, 2.0]  # the bounds double


def test_back_off_has_a_longest(judges: ModuleType, judge: Any, pauses: list[float]) -> None:
    judge.script(*[judges.Reply(status=503)] * 9)
    asked(client_of(judge, retries=8))
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_jitter_is_full(judges: ModuleType, judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []
    monkeypatch.setattr(wire.random, "uniform", lambda low, high: bounds.append((low, high)) or 0.0)
    judge.script(*[judges.Reply(status=503)] * 2)
    asked(client_of(judge))
    assert bounds == [(0, 0.5), (0, 1.0)]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0.25", 0.25, 0.25),
        ("86400", wire.LONGEST_RETRY_AFTER, wire.LONGEST_RETRY_AFTER),
        (lambda: formatdate(time.time() + 20, usegmt=True), 18, 21),
        (lambda: formatdate(time.time() - 20, usegmt=True), 0, 0),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("9" * 400, 0, wire.LONGEST_RETRY_AFTER),
        ("Thu, 99 Jan 2026 99:99:99 GMT", 0, 0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(
    judges: ModuleType,
    judge: Any,
    pauses: list[float],
    header: Any,
    least: float,
    most: float,
    status: int,
) -> None:
    value = header() if callable(header) else header
    judge.script(judges.Reply(status=status, headers={"retry-after": value}))
    assert asked(client_of(judge)) == Answer("yes", "stop")
    [waited] = pauses
    assert least <= waited - wire.BACK_OFF <= most


@pytest.mark.parametrize("bound", [1, 3])
def test_at_most_so_many_requests_are_under_way(judges: ModuleType, bound: int) -> None:
    with judges.JudgeServer(after=0.05) as judge:
        client = client_of(judge, concurrency=bound)
        client.chat(["warm"])
        with ThreadPoolExecutor(12) as threads:
            texts = [f"question {k}" for k in range(12)]
            answers = list(threads.map(lambda text: client.chat([text, IMAGE])[0], texts))
    assert [answer.text for answer in answers] == ["yes"] * 12
    assert judge.peak == bound
    assert len(judge.chats) == 13


def test_who_waits_for_its_next_try_keeps_nobody_out(
    judges: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def pause(seconds: float) -> None:
        waiting.set()
        assert go_on.wait(10)

    monkeypatch.setattr(wire, "_pause", pause)
    with judges.JudgeServer() as judge, ThreadPoolExecutor(1) as thread:
        judge.script(judges.Reply(status=503))
        client = client_of(judge, concurrency=1)
        later = thread.submit(client.chat, ["first"])
        assert waiting.wait(10)
        assert client.chat(["second"])[0] == Answer("yes", "stop")
        go_on.set()
        assert later.result(10)[0] == Answer("yes", "stop")


# -------------------------------------------------------------------------------------- votes


def test_a_server_that_ignores_n_is_asked_for_the_rest(judges: ModuleType) -> None:
    with judges.JudgeServer(honours=set(), says=lambda body, k: str(body["seed"])) as judge:
        client = client_of(judge)
        answers = client.chat(["x"], n=3, temperature=0.6, seed=9, name="GA")
        again = client.chat(["x"], n=3, temperature=0.6, seed=9, name="GA")
    seeds = [vote_seed(9, "GA", 0, vote) for vote in range(3)]
    assert [answer.text for answer in answers] == [str(seed) for seed in seeds]
    assert again == answers  # and no request more than votes
    assert [(r.body.get("n"), r.body["seed"]) for r in judge.chats] == [
        (3, seeds[0]),
        (None, seeds[1]),
        (None, seeds[2]),
    ] * 2


def test_more_choices_than_asked_for_are_left_out(judges: ModuleType, judge: Any) -> None:
    texts = ["a", "b", "c"]
    judge.script(judges.Reply({"choices": [judges.choice(text) for text in texts]}))
    answers = client_of(judge).chat(["x"], n=2, temperature=1.0)
    assert [answer.text for answer in answers] == ["a", "b"]


def test_one_bad_choice_fails_alone(judges: ModuleType, judge: Any) -> None:
    judge.script(judges.Reply({"choices": [judges.choice("a"), {"message": {}}]}))
    first, second = client_of(judge).chat(["x"], n=2, temperature=1.0)
    assert first == Answer("a", "stop") and isinstance(second, Failure)
    assert len(judge.chats) == 1


def test_n_votes_of_a_request_that_fails_all_fail(
    judges: ModuleType, judge: Any, tmp_path: Any
) -> None:
    judge.script(*[judges.Reply(status=500)] * 9)
    answers = client_of(judge, Record(tmp_path)).chat(["x"], n=3, temperature=1.0)
    assert len(judge.chats) == 3 and len(set(answers)) == 1  # three tries of one request
    assert [line["tries"] for line in read_record(tmp_path)] == [3, 0, 0]


def test_greedy_votes_are_one(judge: Any) -> None:
    with pytest.raises(ValueError, match="n=2 at temperature 0"):
        client_of(judge).chat(["x"], n=2)
    client_of(judge).chat(["x"], seed=3)
    assert "seed" not in judge.chats[0].body


# -------------------------------------------------------------------------------------- the record


def test_what_is_recorded_is_not_asked_again(judges: ModuleType, tmp_path: Any) -> None:
    with judges.JudgeServer() as judge:
        client = client_of(judge, Record(tmp_path))
        first = client.chat(["x", IMAGE], top_logprobs=20, name="IF", turn=1)
    url = judge.url  # nobody is there any more
    later = Client(Server(url=url, model="judge"), Calls(retries=0), Record(tmp_path))
    assert later.chat(["x", IMAGE.copy()], top_logprobs=20, name="IF", turn=1) == first
    [(yes, p), (no, q)] = first[0].top[0].top
    assert (yes, no) == ("yes", "no") and (p, q) == pytest.approx((math.log(0.8), math.log(0.2)))
    assert len(judge.chats) == 1


DIFFERENT: dict[str, dict[str, Any]] = {
    "another text": {"parts": ["y", IMAGE]},
    "another image": {"parts": ["x", OTHER]},
    "another order": {"parts": [IMAGE, "x"]},
    "another shape": {"parts": ["x", IMAGE.reshape(8, 32, 3)]},
    "another bound": {"max_tokens": 5},
    "log-probs": {"top_logprobs": 5},
    "a schema": {"schema": {"type": "object", "properties": {}}},
    "another temperature": {"temperature": 0.5},
    "another seed": {"seed": 2},
    "another turn": {"turn": 1},
    "another name": {"name": "GA"},
    "another judge": {"server": {"model": "other"}},
    "another encoding": {"server": {"images": "jpeg"}},
    "another size": {"server": {"max_side": 16}},
    "another template": {"server": {"extra": {"top_p": 0.5}}},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_whatever_the_answer_depends_on_is_in_the_key(
    judges: ModuleType, tmp_path: Any, case: str
) -> None:
    change = dict(DIFFERENT[case])
    record = Record(tmp_path)
    with judges.JudgeServer(models=None) as judge:
        base: dict[str, Any] = {"parts": ["x", IMAGE], "temperature": 0.6, "seed": 1}
        client_of(judge, record).chat(**base)
        client_of(judge, record).chat(**base)
        assert len(judge.chats) == 1
        client_of(judge, record, **change.pop("server", {})).chat(**{**base, **change})
        assert len(judge.chats) == 2


def test_the_key_is_of_pixels_not_of_the_place_or_the_secret(
    judges: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1234567890")
    with judges.JudgeServer() as one:
        client_of(one, Record(tmp_path)).chat(["x", IMAGE])
    with judges.JudgeServer() as other:
        client_of(other, Record(tmp_path), key_env="JUDGE_KEY").chat(["x", IMAGE[:, :].copy()])
    assert (len(one.chats), len(other.chats)) == (1, 0)


def test_of_a_partly_recorded_set_the_rest_is_asked(judges: ModuleType, tmp_path: Any) -> None:
    say = lambda body, k: f"{body['seed']} {k}"  # noqa: E731
    seeds = [vote_seed(4, "GA", 0, vote) for vote in range(4)]
    with judges.JudgeServer(says=say) as judge:
        first = client_of(judge, Record(tmp_path)).chat(
            ["x"], n=2, temperature=0.6, seed=4, name="GA"
        )
        client = client_of(judge, Record(tmp_path))
        answers = client.chat(["x"], n=4, temperature=0.6, seed=4, name="GA")
        assert answers[:2] == first
        assert [answer.text for answer in answers[2:]] == [f"{seeds[2]} 0", f"{seeds[2]} 1"]
        assert [(r.body["n"], r.body["seed"]) for r in judge.chats] == [
            (2, seeds[0]),
            (2, seeds[2]),
        ]
    lines = list(read_record(tmp_path))
    assert [line["vote"] for line in lines] == [1, 2, 3, 4]
    assert [line["tries"] for line in lines] == [1, 0, 1, 0]
    assert len({line["key"] for line in lines}) == 4


def test_failures_are_asked_again(judges: ModuleType, judge: Any, tmp_path: Any) -> None:
    judge.script(judges.Reply(status=400))
    client = client_of(judge, Record(tmp_path))
    assert isinstance(asked(client), Failure)
    assert asked(client) == Answer("yes", "stop")


def test_recorded_asks_nothing(judge: Any, tmp_path: Any) -> None:
    client = client_of(judge, Record(tmp_path))
    assert client.chat(["x"], recorded=True) == [None]
    assert client.decide(["x"], {"type": "noul"}, recorded=True) is None
    assert judge.requests == []


def test_of_two_equal_calls_the_first_answer_stands(judges: ModuleType, tmp_path: Any) -> None:
    """Threads that ask the same at once: all get the recorded answer, not their own."""
    count = iter(range(99))
    with judges.JudgeServer(after=0.1, says=lambda body, k: str(next(count))) as judge:
        client = client_of(judge, Record(tmp_path))
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: asked(client), range(4)))
        assert len(judge.chats) == 4
        assert answers == [asked(client)] * 4


# -------------------------------------------------------------------------------------- log-probs


BAD_LOGPROBS: dict[str, tuple[Any, str]] = {
    "none": (None, "none came back"),
    "an empty list": ({"content": []}, "none came back"),
    "another form": ({"tokens": ["yes"], "token_logprobs": [-0.1]}, "none came back"),
    "a text": ({"content": [{"token": "yes", "logprob": "-0.1"}]}, "a log-prob is -0.1"),
    "true": ({"content": [{"token": "yes", "logprob": True}]}, "a log-prob is true"),
    "above 0": ({"content": [{"token": "yes", "logprob": 0.7}]}, "a log-prob is 0.7"),
    "no number": ({"content": [{"token": "yes", "logprob": float("nan")}]}, "a log-prob is NaN"),
    "no token": ({"content": [{"logprob": -0.1}]}, "a log-prob is"),
    "no object": ({"content": ["yes"]}, "str where an object belongs"),
    "more than 1 in all": (
        {
            "content": [
                {
                    "token": "yes",
                    "logprob": -0.1,
                    "top_logprobs": [
                        {"token": "yes", "logprob": -0.1},
                        {"token": "no", "logprob": -0.1},
                    ],
                }
            ]
        },
        "sum to more than 1",
    ),
}


@pytest.mark.parametrize("case", BAD_LOGPROBS)
def test_log_probs_that_are_none_are_a_failure(judges: ModuleType, judge: Any, case: str) -> None:
    logprobs, reason = BAD_LOGPROBS[case]
    reply = {**judges.choice("yes"), "logprobs": logprobs}
    judge.script(judges.Reply({"choices": [reply]}))
    answer = asked(client_of(judge), top_logprobs=20)
    assert isinstance(answer, Failure) and reason in answer.reason


def test_the_chosen_token_counts_once(judges: ModuleType, judge: Any) -> None:
    entry = {"token": "yes", "logprob": -0.5}
    top = [{"token": "no", "logprob": -1.5}]
    for listed, pairs in (
        ([entry, *top], [("yes", -0.5), ("no", -1.5)]),
        ([{"token": "yes", "logprob": -0.5001}, *top], [("yes", -0.5001), ("no", -1.5)]),  # rounded
        (top, [("yes", -0.5), ("no", -1.5)]),  # not among the top ones: added
        (None, [("yes", -0.5)]),
    ):
        content = [{**entry, **({} if listed is None else {"top_logprobs": listed})}]
        reply = {**judges.choice("yes"), "logprobs": {"content": content}}
        judge.script(judges.Reply({"choices": [reply]}))
        assert list(asked(client_of(judge), top_logprobs=20).top[0].top) == pairs


# -------------------------------------------------------------------------------------- systemone


NOUL = {"type": "noul", "instructions": "Is it red?"}
LEVELS = {"type": "score", "criteria": ["bad", "good"]}


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (NOUL, {"type": "noul", "noul": 0.25}, (0.75, 0.25)),
        (LEVELS, {"probabilities": {"0": 0.1, "1": 0.9}}, (0.1, 0.9)),
        (NOUL, {"noul": 1.5}, "a probability is -0.5"),
        (NOUL, {"noul": None}, "a probability is None"),
        (NOUL, {"noul": "0.3"}, "a probability is '0.3'"),
        (NOUL, {"noul": float("nan")}, "a probability is nan"),
        (NOUL, {}, "a probability is None"),
        (LEVELS, {"probabilities": {"0": 0.1}}, "a probability is None"),
        (LEVELS, {"probabilities": {"0": 0.1, "1": 0.2}}, "sum to 0.3"),
        (LEVELS, {"probabilities": [0.1, 0.9]}, "list where an object belongs"),
    ],
)
def test_probabilities_of_a_question(
    judges: ModuleType, tmp_path: Any, question: Any, answer: Any, expected: Any
) -> None:
    with judges.JudgeServer(systemone=lambda body: {"answers": {"q": answer}}) as judge:
        client = client_of(judge, Record(tmp_path))
        got = client.decide(["Look:", IMAGE, "and", OTHER], question, name="IF", turn=0)
        again = client.decide(["Look:", IMAGE, "and", OTHER], question, name="IF", turn=0)
    if isinstance(expected, str):
        assert isinstance(got, Failure) and expected in got.reason
        assert len(judge.requests) == 2
        return
    assert got == pytest.approx(expected) and again == got
    [request] = judge.requests
    assets = request.body["assets"]
    words = list(assets)
    assert request.body["state"] == f"Look:\n{words[0]}\nand\n{words[1]}"
    assert request.body["questions"] == {"q": question} and len(assets) == 2


# -------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("server", "expected", "notes"),
    [
        ({}, (20, True, True, False), []),
        ({"refuses": {"n"}}, (20, False, True, False), ["ignores n"]),
        ({"honours": {"n", "schema", "images"}}, (0, True, True, False), ["counted votes"]),
        (
            {
                "honours": {"images"},
                "systemone": lambda body: {"answers": {"q": {"type": "noul", "noul": 0.5}}},
            },
            (0, False, False, True),
            ["systemone", "ignores n", "ignores response_format"],
        ),
        ({"refuses": {"logprobs"}}, (0, True, True, False), ["counted votes"]),
        ({"refuses": {"logprobs", "n"}}, (0, False, True, False), ["counted votes", "ignores n"]),
        ({"refuses": {"response_format"}}, (20, True, False, False), ["ignores response_format"]),
    ],
)
def test_the_probe_says_what_is_missing(
    judges: ModuleType, server: Any, expected: tuple[Any, ...], notes: list[str]
) -> None:
    with judges.JudgeServer(**server) as judge:
        client = client_of(judge, model=None)
        said = client.probe(images=2, schema=True)
        known = client.known
        before = len(judge.requests)
        assert client.abilities() is known and len(judge.requests) == before
    assert known is not None and known.model == "judge" and known.images == 2
    assert (known.top_logprobs, known.votes, known.schema, known.systemone) == expected
    assert len(said) == len(notes)
    for line, words in zip(said, notes):
        assert words in line and "\n" not in line and "vLLM" in line


def test_what_is_not_used_is_not_looked_for(judges: ModuleType) -> None:
    with judges.JudgeServer(honours={"images"}) as judge:
        assert client_of(judge).probe(images=1, logprobs=False, votes=False) == []
        assert len(judge.requests) == 3  # models, an answer, an image


def test_a_server_that_does_not_list_its_models(judges: ModuleType) -> None:
    """`transformers serve` without a network: /v1/models is a 500, /health is there."""
    with judges.JudgeServer(models=None) as judge:
        client = client_of(judge, model="tiny")
        client.probe()
        assert client.known is not None and client.known.model == "tiny"
        paths = [request.path for request in judge.requests[:3]]
        assert paths == [judges.MODELS, judges.HEALTH, judges.CHAT]
        with pytest.raises(ConfigError, match=r"^model: none is named .* does not list any"):
            client_of(judge, model=None).probe()


CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], type[UserError], str]] = {
    "another model": (
        {"models": ["a", "b"]},
        {"model": "c"},
        ConfigError,
        r"^model: 'c' is not at http://127.0.0.1:\d+/v1 \(accepted: a, b\)$",
    ),
    "two models": (
        {"models": ["a", "b"]},
        {"model": None},
        ConfigError,
        r"^model: none is named and the server at .* has 2 \(accepted: a, b\)$",
    ),
    "one image": (
        {"most_images": 1},
        {},
        ConfigError,
        r"takes 1 image a prompt, not 3 .*--limit-mm-per-prompt '{\"image\": 3}'",
    ),
    "two images": ({"most_images": 2}, {}, ConfigError, "takes 2 images a prompt, not 3"),
    "no image": ({"most_images": 0}, {}, ConfigError, "takes no images: 400 .* a model that sees"),
    "a model that does not look": (
        {"honours": {"n", "logprobs", "schema"}},
        {},
        ConfigError,
        "judge leaves the images out of the prompt",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_work_is_said_at_the_start(
    judges: ModuleType, pauses: list[float], case: str
) -> None:
    server, options, kind, message = CANNOT[case]
    with judges.JudgeServer(**server) as judge:
        with pytest.raises(kind, match=message) as raised:
            client_of(judge, **options).probe(images=3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(
    judges: ModuleType, judge: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(
        judge, "reply", lambda asked: judges.Reply({"error": "no such key"}, status)
    )
    with pytest.raises(
        ConfigError, match=rf"^key_env: .* {status} .*no such key; no key_env is set"
    ):
        client_of(judge).probe()
    monkeypatch.setenv("JUDGE_KEY", "sk-1234567890")
    with pytest.raises(ConfigError, match="the key is that of JUDGE_KEY"):
        client_of(judge, key_env="JUDGE_KEY").probe()


def test_nobody_there_is_said_with_the_address(pauses: list[float]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RewardFailure, match=rf"nothing answers at {url}: no connection"):
            Client(Server(url=url), Calls(retries=1)).probe()


def test_a_server_that_answers_nothing_is_no_judge(
    judges: ModuleType, judge: Any, pauses: list[float]
) -> None:
    judge.script(*[judges.Reply(status=500)] * 9)
    with pytest.raises(RewardFailure, match="does not answer a chat request: 500"):
        client_of(judge).probe()
    assert len(judge.chats) == 1 + RETRIES


# -------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "at"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/api/openai", "https://host/api/openai"),
        (" http://[::1]:8000/v1 ", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(url: str, at: str) -> None:
    assert Client(Server(url=url)).at == at


BAD_SERVERS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "^url, url_env: neither"),
    "both": ({"url": "http://a", "url_env": "A"}, "^url, url_env: both"),
    "no scheme": ({"url": "localhost:8000"}, "^url: localhost:8000 .accepted: an address"),
    "another scheme": ({"url": "ftp://host"}, "^url: ftp://host .accepted"),
    "no host": ({"url": "http:///v1"}, "^url: .*accepted"),
    "a port that is none": ({"url": "http://host:99999999"}, "^url: .*accepted"),
    "a password": ({"url": "http://me:s3cret-word@host"}, "^url: it holds a password or a query"),
    "a query": ({"url": "http://host/v1?key=s3cret-word"}, "^url: it holds a password or a query"),
    "not an address, with a password": ({"url": "me:s3cret-word@host"}, "^url: "),
    "the key itself": (
        {"url": "http://a", "key_env": "sk-s3cret-word"},
        "^key_env: this is no var",
    ),
    "a key without dashes": ({"url": "http://a", "key_env": "s3cretword"}, "^key_env: this is no"),
    "not set": (
        {"url": "http://a", "key_env": "NO_SUCH_KEY"},
        "^key_env: .*NO_SUCH_KEY is not set",
    ),
    "address not set": ({"url_env": "NO_SUCH_URL"}, "^url_env: .*NO_SUCH_URL is not set"),
    "a key of two lines": (
        {"url": "http://a", "key_env": "TWO_LINES"},
        "TWO_LINES holds is no key",
    ),
    "what the reward sets": ({"url": "http://a", "extra": {"n": 3}}, "^extra: 'n' is set by the"),
}


@pytest.mark.parametrize("case", BAD_SERVERS)
def test_servers_that_cannot_be_meant(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWO_LINES", "s3cret-word\ns3cret-word")
    options, message = BAD_SERVERS[case]
    with pytest.raises(ConfigError, match=message) as raised:
        Client(Server(**options))
    assert "s3cret" not in str(raised.value) and "accepted" in str(raised.value)
    assert "s3cret" not in repr(Server(**{**options, "key_env": None}))


# -------------------------------------------------------------------------------------- secrets


SECRETS = {
    "a key": ({"JUDGE_KEY": "sk-s3cret/word+1"}, {"key_env": "JUDGE_KEY"}, ""),
    "a password": ({}, {}, "http://me:s3cret%2Fword@127.0.0.1:{port}/v1"),
    "a query": ({}, {}, "http://127.0.0.1:{port}/v1?key=s3cret%2Fword&version=2"),
    "both": (
        {"JUDGE_KEY": "sk-s3cret"},
        {"key_env": "JUDGE_KEY"},
        "http://u:pass-s3cret@127.0.0.1:{port}",
    ),
}


@pytest.mark.parametrize("case", SECRETS)
def test_nothing_secret_is_anywhere(
    judges: ModuleType,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Any,
    case: str,
) -> None:
    """The server echoes all that it is sent: in answers, tokens, refusals and headers."""
    environment, options, address = SECRETS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with judges.JudgeServer() as judge:
        if address:
            monkeypatch.setenv("JUDGE_URL", address.format(port=judge.port))
            options = {**options, "url": None, "url_env": "JUDGE_URL"}

        def echo(asked: Any) -> Any:
            header = asked.headers.get("authorization", "")
            read = base64.b64decode(header[6:]) if header.startswith("Basic ") else b""
            sent = f"{header} {asked.query} {unquote(asked.query)} {read.decode()}"
            headers = {"x-echo": sent.strip()}
            if asked.path == judges.MODELS:
                return judges.Reply({"data": [{"id": "judge"}]}, headers=headers)
            told = json.dumps(asked.body)
            if "fail" in told:
                return judges.Reply({"error": {"message": f"bad key {sent}"}}, 400, headers)
            if "late" in told:
                return judges.Reply(sent.encode(), 503, {**headers, "retry-after": "1"})
            choice = judges.choice(f"you sent {sent}", [{f"tok {sent}": 0.9}], finish=sent.strip())
            return judges.Reply({"choices": [choice]}, headers=headers)

        monkeypatch.setattr(judge, "reply", echo)
        client = client_of(judge, Record(tmp_path), **options)
        said += [
            repr(client),
            repr(client.server),
            client.at,
            repr(vars(client.server).get("model")),
        ]
        for text in ("hello", "fail", "late"):
            answers = client.chat([text], top_logprobs=5, name="IF")
            said += [
                repr(answers),
                str(client.probe(images=0, logprobs=False)) if text == "hello" else "",
            ]
        sent = [request for request in judge.chats]
        for request in sent:  # what is to arrive does
            if "JUDGE_KEY" in environment:
                assert request.headers["authorization"] == f"Bearer {environment['JUDGE_KEY']}"
            elif "me:" in address:
                assert request.headers["authorization"].startswith("Basic ")
            else:
                assert "key=s3cret" in request.query and "version=2" in request.query
    said += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    said += [record.getMessage() for record in caplog.records]
    said.append(caplog.text)
    assert any("HTTP Request" in text for text in said)  # the library does write its lines
    everything = "\n".join(said)
    assert "you sent" in everything and "***" in everything
    basic = base64.b64encode(b"me:s3cret/word").decode()
    for secret in ("s3cret", basic):
        at = everything.find(secret)
        assert at < 0, everything[max(0, at - 200) : at + 40]


def test_a_key_is_not_sent_where_a_redirect_leads(
    judges: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1234567890")
    with judges.JudgeServer() as elsewhere, judges.JudgeServer() as judge:
        to = {"location": f"{elsewhere.url}/chat/completions"}
        judge.script(judges.Reply(status=307, headers=to))
        answer = asked(client_of(judge, key_env="JUDGE_KEY"))
        assert isinstance(answer, Failure) and elsewhere.requests == []


# -------------------------------------------------------------------------------------- the rest


def test_an_answer_that_trickles_in_is_given_up(
    judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every piece arrives in time, the whole does not."""
    handler = judge._server.RequestHandlerClass

    def trickle(self: Any) -> None:
        judge.requests.append(None)
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(b" ")
                self.wfile.flush()
                if judge._closing.wait(0.05):
                    return
        except OSError:
            self.close_connection = True

    monkeypatch.setattr(handler, "do_POST", trickle)
    start = time.monotonic()
    answer = asked(client_of(judge, timeout=0.3, retries=1))
    assert answer == Failure("no whole answer within 0.3 s (in 2 tries)")
    assert time.monotonic() - start < 3 and len(judge.requests) == 2


def test_importing_it_is_light() -> None:
    code = (
        "import sys; import editr2.rewards.ask; "
        "print(sorted({'httpx2', 'PIL', 'transformers', 'ssl'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(said.stdout.replace("'", '"')))
    assert not loaded & {"httpx2", "transformers"}


def test_many_threads_find_out_once_what_the_server_does(judges: ModuleType) -> None:
    with judges.JudgeServer(after=0.01) as judge:
        client = client_of(judge, concurrency=2, model=None)
        with ThreadPoolExecutor(8) as threads:
            known = list(threads.map(lambda _: client.abilities(), range(8)))
        assert len({id(one) for one in known}) == 1
        assert len([r for r in judge.requests if r.path == judges.MODELS]) == 1
