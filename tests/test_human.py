"""The reward `human`: people rank siblings on the labelling page, and the run waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from editr2.config import RewardConfig
from editr2.errors import ConfigError
from editr2.label.questions import BAD, SKIPPED
from editr2.label.store import Store, Vote
from editr2.rewards import human
from editr2.rewards.base import Calls, Item
from editr2.rewards.human import Human, HumanOptions, beaten
from editr2.rewards.load import load_reward
from editr2.sessions import Session, Turn
from editr2.sessions.images import read_image


def session(name="a", turns=1):
    image = np.zeros((8, 8, 3), np.uint8)
    return Session(name, lambda: image, tuple(Turn(f"no. {n}") for n in range(1, turns + 1)))


def items(levels, name="a", turns=1):
    """Siblings, each of one grey level a turn."""
    one = session(name, turns)
    return [
        Item(one, np.stack([np.full((8, 8, 3), level, np.uint8) for level in of_one]))
        for of_one in levels
    ]


def made(folder, people=1, timeout=None):
    options = HumanOptions(folder=str(folder), people=people, serve=False)
    return Human(options, Calls(timeout=timeout))


class Person(threading.Thread):
    """Answers whatever is asked, by the grey levels that are shown; at most so much of it."""

    def __init__(self, folder, answer: Callable, name="anna", most=99):
        super().__init__(daemon=True)
        self.store, self.answer, self.who, self.most = Store(folder), answer, name, most
        self.seen, self.over = [], threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set() and len(self.seen) < self.most:
            for number in self.store.left(self.who)[0][: self.most - len(self.seen)]:
                question = self.store.question(number).question
                levels = [int(read_image(path)[0, 0, 0]) for path in question.outputs]
                self.seen.append((question, levels))
                shown = self.store.order(question, self.who)
                vote = Vote(question.id, self.who, self.answer(levels), shown)
                self.store.vote(f"{self.who} no. {number}", number, vote)
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.over.set()
        self.join()
        self.store.close()


def brighter(levels):
    order = sorted(set(levels), reverse=True)
    return tuple(order.index(level) for level in levels)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(human, "POLL", 0.01)


@pytest.mark.parametrize(
    ("answer", "shown", "scores"),
    [
        ((0, 1), (0, 1), [1, 0]),
        ((0, 0), (0, 1), [0.5, 0.5]),
        ((0, 1, 2, 3), (0, 1, 2, 3), [1, 2 / 3, 1 / 3, 0]),
        ((1, 0, 1), (0, 1, 2), [0.25, 1, 0.25]),
        ((0, 1), (0, 1, 1, 1), [1, 1 / 3, 1 / 3, 1 / 3]),  # three are the same image
        (BAD, (0, 1, 1), [0, 0, 0]),
    ],
)
def test_a_score_is_the_share_of_siblings_beaten(answer, shown, scores):
    assert beaten(answer, shown) == pytest.approx(scores)
    if answer != BAD:
        assert sum(beaten(answer, shown)) == pytest.approx(len(shown) / 2)


def test_siblings_of_each_turn_are_ranked_by_what_is_shown(tmp_path, capsys):
    asked = items([(10, 50), (30, 20), (30, 90)], "a", 2) + items([(7,), (9,)], "b")
    with Person(tmp_path, brighter) as person:
        said = made(tmp_path).judge(asked)
    values = [[row["human"].value for row in rows] for rows in said]
    assert values == [[0, 0.5], [0.75, 0], [0.75, 1], [0], [1]]
    by_turn = {(one.id.split("/")[0], one.id.split("/")[1]): one for one, _ in person.seen}
    assert sorted(by_turn) == [("a", "1"), ("a", "2"), ("b", "1")]
    second = by_turn["a", "2"]
    assert second.earlier == ("no. 1",) and second.instruction == "no. 2"
    befores = [int(read_image(path)[0, 0, 0]) for path in second.befores]
    levels = [int(read_image(path)[0, 0, 0]) for path in second.outputs]
    assert sorted(zip(befores, levels)) == [(10, 50), (30, 20), (30, 90)]
    assert len(by_turn["a", "1"].outputs) == 2  # two of the three are the same
    assert "human: 0 of 3 questions are answered; the run waits: editr2 label" in (
        capsys.readouterr().err
    )


def test_what_an_output_was_made_of_is_shown_where_no_earlier_turn_was_asked_about(tmp_path):
    with Person(tmp_path, brighter) as person:
        made(tmp_path).judge(items([(10, 50), (10, 20)], "a", 2))
    ((question, _),) = person.seen
    assert [int(read_image(path)[0, 0, 0]) for path in question.befores] == [10, 10]
    assert int(read_image(question.image)[0, 0, 0]) == 0


def test_what_nobody_need_be_asked(tmp_path):
    lone, same = items([(4,)], "a"), items([(4,), (4,)], "b")
    said = made(tmp_path).judge(lone + same)
    assert not said[0][0]["human"].applies and not said[0][0]["human"].failed
    assert [rows[0]["human"].value for rows in said[1:]] == [0.5, 0.5]
    assert not (tmp_path / "labels.sqlite").exists()


@pytest.mark.parametrize(
    ("answers", "value", "applies"),
    [
        ([lambda _: BAD], [0, 0], True),
        ([lambda _: SKIPPED], [None, None], False),
        ([brighter, lambda _: SKIPPED], [0, 1], True),
        ([brighter, lambda _: (0, 0)], [0.25, 0.75], True),
        ([brighter, brighter, lambda _: BAD], [0, 2 / 3], True),
    ],
)
def test_people_count_alike_and_who_skips_says_nothing(tmp_path, answers, value, applies):
    people = [Person(tmp_path, one, f"person {n}") for n, one in enumerate(answers)]
    said = made(tmp_path, len(people)).judge(items([(1,), (2,)]))
    for person in people:
        person.__exit__()
    scores = [rows[0]["human"] for rows in said]
    assert [one.applies for one in scores] == [applies] * 2
    assert [one.value for one in scores] == [v if v is None else pytest.approx(v) for v in value]


def test_a_run_that_was_killed_goes_on_with_what_was_answered(tmp_path):
    asked = [one for n in range(6) for one in items([(n,), (n + 9,)], f"s{n}")]
    with Person(tmp_path, brighter, most=4) as person:
        first = made(tmp_path, timeout=0.5).judge(asked)  # four of six, then time is up
    failed = [rows[0]["human"].reason for rows in first if rows[0]["human"].failed]
    assert failed == ["no answer within 0.5 s (reward.timeout)"] * 4
    # Siblings come in another order, and the images of one session are new.
    again = list(reversed(asked))
    with Person(tmp_path, brighter) as person:
        said = made(tmp_path).judge(again)
    assert len(person.seen) == 2
    assert [rows[0]["human"].value for rows in reversed(said)] == [0, 1] * 6


def test_a_run_that_waits_no_more_asks_nothing(tmp_path, monkeypatch):
    made(tmp_path, timeout=0.05).judge(items([(1,), (2,)]))
    store = Store(tmp_path)
    assert len(store.left("anna")[0]) == 1
    monkeypatch.setattr("editr2.label.store.FRESH", 0.0)
    assert store.left("anna")[0] == []


def test_the_page_is_shown_from_the_run_and_a_taken_port_says_where_it_is(tmp_path, capsys):
    httpx = pytest.importorskip("httpx2")
    pytest.importorskip("uvicorn")
    asked = items([(1,), (2,)])
    options = HumanOptions(folder=str(tmp_path), port=0)
    reward = Human(options, Calls(timeout=20.0))
    assert reward.probe() == []
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(reward.judge(asked)), daemon=True)
    thread.start()
    store = Store(tmp_path)
    while (url := store.fact("url")) is None:
        time.sleep(0.01)
    said = httpx.post(f"{url}next", json={"who": "anna"}, trust_env=False).json()
    number = said["questions"][0]["number"]
    body = {"who": "anna", "number": number, "name": "a vote's name", "answer": "bad"}
    taken = int(url.split(":")[2].split("/")[0])
    other = Human(HumanOptions(folder=str(tmp_path), port=taken), Calls(timeout=0.01))
    other.judge(items([(3,), (4,)], "b"))
    assert f"the run waits: {url}" in capsys.readouterr().err
    assert httpx.post(f"{url}vote", json=body, trust_env=False).status_code == 200
    thread.join()
    assert [rows[0]["human"].value for rows in answers] == [0, 0]


def test_its_options(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.options\.folder"):
        load_reward(RewardConfig(name="human"))
    panel = load_reward(RewardConfig(name="human", options={"folder": str(tmp_path), "people": 2}))
    (member,) = panel.members
    assert member.concurrency is None and member.batch is None and member.recorded
    assert panel.facts == {"judge": "people", "people": "2"}
