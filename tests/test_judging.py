"""Several rewards, asked beside the rollout, with every answer on record: the numbers are those of
asking one after the other, whoever answers first and wherever the run was killed."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from editr2.config import Config, RewardConfig, RewardUse, replace_nested
from editr2.config.fields import setting
from editr2.config.settings import TRIES
from editr2.errors import ConfigError, UserError
from editr2.rewards import record as records
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Calls, Item, Score
from editr2.rewards.load import load_reward
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rewards.record import Record, asked_anew, read_record, request_key
from editr2.sessions import Session, Turn
from editr2.training import train

TURNS = 3
HERE = "test_judging"


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


def session(name: str, turns: int = TURNS) -> Session:
    image = np.full((8, 8, 3), len(name), np.uint8)
    return Session(name, image, tuple(Turn(f"edit {t}") for t in range(turns)))


def items(count: int, turns: int = TURNS) -> list[Item]:
    made = np.random.default_rng(0)
    return [
        Item(
            session(f"s{i}", turns),
            made.integers(0, 256, (turns, 8, 8, 3), np.uint8),
            rollout=i,
            seed=i * 7 + 1,
        )
        for i in range(count)
    ]


class Hashed:
    """Scores that depend on all that is asked, after a while that depends on nothing."""

    by_turn, concurrency, batch = True, 4, 1

    def __init__(self, names: tuple[str, ...] = ("IF", "CC"), wait: float = 0.01) -> None:
        self.names, self.wait = names, wait
        self.asked: list[tuple[str, int]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    def judge(self, items: list[Item]) -> list[list[dict[str, Score]]]:
        with self.lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
            self.asked += [(i.session.id, t) for i in items for t in i.asked]
        time.sleep(random.random() * self.wait)
        said = [[self.score(item, t) for t in item.asked] for item in items]
        with self.lock:
            self.busy -= 1
        return said

    def score(self, item: Item, turn: int) -> dict[str, Score]:
        key = request_key(
            seed=item.seed,
            pixels=[int(image.sum()) for image in item.images[: turn + 1]],
            before=int(item.before(turn).sum()),
        )
        values = [int(key[k * 8 : k * 8 + 8], 16) / 2**32 for k in range(len(self.names))]
        return {
            n: Score(v, f"turn {turn}", votes=(v, 1))
            for n, v in zip(self.names, values, strict=True)
        }


def judged(panel: Panel, asked: list[Item]) -> Any:
    """As a rollout tells of it: turn by turn, then whole."""
    judging = Pool(panel).judging(purpose="train", iteration=3)
    for start in range(0, len(asked), 2):
        chunk = asked[start : start + 2]
        for turn in range(max(len(item.asked) for item in chunk)):
            live = [item for item in chunk if turn < len(item.asked)]
            judging.turn([i._replace(images=i.images[: turn + 1], turns=(turn,)) for i in live])
        judging.rollouts(chunk)
    return judging.scores(TURNS)


# ---------------------------------------------------------------------------- in threads


@pytest.mark.parametrize("by_turn", [True, False])
@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("concurrency", [None, 1, 5])
def test_threads_give_the_scores_of_asking_one_after_the_other(by_turn, batch, concurrency):
    asked = [*items(5), *[i._replace(rollout=5 + i.rollout) for i in items(2, turns=2)]]
    reward = Hashed()
    reward.by_turn, reward.batch, reward.concurrency = by_turn, batch, concurrency
    scores = judged(Panel([adapt(reward)]), asked)
    calm = Hashed(wait=0)
    calm.concurrency = None
    expected = [[calm.score(item, t) for t in item.asked] for item in asked]
    for i, rows in enumerate(expected):
        for t, row in enumerate(rows):
            assert (
                scores.values[i, t].tolist()
                == torch.tensor([row["IF"].value, row["CC"].value]).tolist()
            )
    assert scores.expected.sum() == 5 * 3 + 2 * 2
    assert sorted(reward.asked) == sorted((i.session.id, t) for i in asked for t in i.asked)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_calls_at_once_than_were_allowed(limit):
    reward = Hashed(wait=0.02)
    judged(Panel([adapt(reward, calls=Calls(concurrency=limit))]), items(8))
    assert reward.most == limit


def test_a_function_is_called_on_the_main_thread_once_the_rollout_is_done():
    threads = set()

    def judge(session: Session, images: np.ndarray) -> list[float]:
        threads.add(threading.current_thread())
        return [0.5] * len(images)

    judged(Panel([adapt(judge)]), items(4))
    assert threads == {threading.main_thread()}
    judged(Panel([adapt(judge, calls=Calls(concurrency=2))]), items(4))
    assert len(threads) > 1


def test_several_rewards_are_one():
    def bright(session: Session, images: np.ndarray) -> list[float]:
        return [float(image.mean() / 255) for image in images]

    slow = Hashed(("GA",))
    scores = judged(Panel([adapt(Hashed()), adapt(bright), adapt(slow)]), items(4))
    assert scores.names == ("IF", "CC", "bright", "GA")
    assert scores.present.all()
    assert scores.values[2, 1, 2] == pytest.approx(float(items(4)[2].images[1].mean() / 255))


def test_a_judge_that_writes_into_the_images_blinds_no_other():
    def blinding(session: Session, images: np.ndarray) -> list[float]:
        images[:] = 0
        return [0.5] * len(images)

    def bright(session: Session, images: np.ndarray) -> list[float]:
        return [float(image.mean() / 255) for image in images]

    scores = judged(Panel([adapt(blinding), adapt(bright)]), items(2))
    assert torch.equal(
        scores.values[..., 1], judged(Panel([adapt(bright)]), items(2)).values[..., 0]
    )


def test_a_call_in_a_thread_that_fails_is_a_failed_score_of_its_turns_alone():
    class Picky(Hashed):
        def score(self, item: Item, turn: int) -> dict[str, Score]:
            if (item.session.id, turn) == ("s1", 2):
                raise ConnectionError("refused")
            return super().score(item, turn)

    scores = judged(Panel([adapt(Picky())]), items(3))
    assert scores.failed == 1 and not scores.present[1, 2]
    assert "ConnectionError: refused" in scores.reasons[1, 2]
    assert scores.present.sum() == 8


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_judge_that_raises_keyboard_interrupt_in_a_thread_is_heard(timeout):
    """It would end the pool's thread, and the answer would be waited for without end."""

    class Interrupting(Hashed):
        def judge(self, items: list[Item]) -> Any:
            raise KeyboardInterrupt

    scores = judged(Panel([adapt(Interrupting(), calls=Calls(timeout=timeout))]), items(3))
    assert scores.failed == 9 and "KeyboardInterrupt" in (scores.first_failure or "")


@pytest.mark.parametrize("name", ["concurrency", "batch"])
@pytest.mark.parametrize("value", [-1, "4", 2.5, 10**9])
def test_what_a_reward_says_of_itself_is_checked(name, value):
    reward = Hashed()
    setattr(reward, name, value)
    with pytest.raises(
        ConfigError, match=rf"reward: Hashed\.{name}: .* \(accepted: a whole number"
    ):
        adapt(reward)


@pytest.mark.parametrize("facts", [None, [1]])
def test_facts_that_are_none_are_one_line(facts):
    reward = Hashed()
    reward.facts = facts
    with pytest.raises(ConfigError, match="reward: facts raised AttributeError"):
        _ = Panel([adapt(reward)]).facts


@pytest.mark.parametrize("concurrency", [None, 2])
def test_models_are_taken_for_a_batch_and_lent_after_the_last_one(concurrency):
    told = []

    class Looking(Hashed):
        by_turn = False

        def take(self) -> None:
            told.append("take")

        def lend(self) -> None:
            told.append("lend")

    looking = Looking(wait=0)
    looking.concurrency = concurrency
    pool = Pool(Panel([adapt(looking)]))
    first, ahead = pool.judging(), pool.judging()
    first.rollouts(items(2))
    first.scores(TURNS)
    assert told == ["take", "take"]  # the batch made ahead is still asked about
    ahead.answers()
    assert told == ["take", "take", "lend"]


@pytest.mark.parametrize("retries, fails, tries", [(0, 1, 1), (2, 2, 3), (2, 9, 3), (None, 1, 1)])
def test_a_call_that_raises_is_tried_again_so_often(retries, fails, tries, tmp_path, monkeypatch):
    monkeypatch.setattr("editr2.rewards.panel.time.sleep", lambda seconds: None)
    count = []

    def judge(session: Session, images: np.ndarray) -> list[float]:
        count.append(1)
        if len(count) <= fails:
            raise TimeoutError("slow")
        return [0.5] * len(images)

    member = adapt(judge, calls=Calls(retries=retries))
    said = member.judge(items(1), Record(tmp_path))
    assert len(count) == tries
    (line,) = read_record(tmp_path)
    assert line["tries"] == tries
    assert all(row["judge"].failed == (fails >= tries) for row in said[0])


# ------------------------------------------------------------------------------- record


def test_an_answer_is_asked_for_once(tmp_path):
    first, again = Hashed(), Hashed()
    before = judged(Panel([adapt(first)], Record(tmp_path)), items(4))
    after = judged(Panel([adapt(again)], Record(tmp_path)), items(4))
    assert torch.equal(before.values, after.values) and again.asked == []
    lines = list(read_record(tmp_path))
    assert len(lines) == 12
    line = lines[0]
    assert {k: line[k] for k in ("purpose", "iteration", "name", "tries")} == {
        "purpose": "train",
        "iteration": 3,
        "name": ["IF", "CC"],
        "tries": 1,
    }
    assert line["rollout"] in range(4) and line["turn"][0] in (1, 2, 3)
    assert line["answer"][0][0][0][1] == f"turn {line['turn'][0] - 1}"  # the reason, too
    panel = Panel([adapt(again)], Record(tmp_path))
    with asked_anew():
        panel.judge(items(1))
    assert len(again.asked) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i._replace(seed=i.seed + 1),
        lambda i: i._replace(images=i.images ^ 1),
        lambda i: i._replace(images=i.images.transpose(0, 2, 1, 3).copy()),
        lambda i: i._replace(session=session("another")),
        lambda i: i._replace(turns=(0, 1)),
    ],
    ids=["seed", "a pixel", "transposed", "session", "turns"],
)
def test_an_answer_to_something_else_is_none(change, tmp_path):
    reward = Hashed()
    reward.by_turn = False
    panel = Panel([adapt(reward)], Record(tmp_path))
    panel.judge(items(1))
    asked = len(reward.asked)
    panel.judge([change(items(1)[0])])
    assert len(reward.asked) > asked


def test_another_reward_has_its_own_answers(tmp_path):
    for version in ("a", "b"):
        reward = Hashed()
        reward.version = version
        Panel([adapt(reward)], Record(tmp_path)).judge(items(1))
        assert reward.asked


def test_what_failed_is_on_record_and_asked_again(tmp_path):
    down = True

    def judge(session: Session, images: np.ndarray) -> Any:
        return Score(None, "the server is down") if down else [0.5] * len(images)

    panel = Panel([adapt(judge)], Record(tmp_path))
    assert panel.judge(items(1))[0][0]["judge"].failed
    down = False
    assert panel.judge(items(1))[0][0]["judge"].value == 0.5
    failed, answered = read_record(tmp_path)
    assert failed["failed"] == "the server is down" and "answer" not in failed
    assert "answer" in answered


def test_a_torn_line_is_left_out_and_written_behind(tmp_path):
    record = Record(tmp_path)
    record.write(request_key(n=1), {"value": 1}, seconds=0.1, tries=1)
    path = tmp_path / records.NAME
    path.write_bytes(path.read_bytes() + path.read_bytes()[:30])
    again = Record(tmp_path)
    again.write(request_key(n=2), {"value": 2}, seconds=0.1, tries=1)
    for opened in (again, Record(tmp_path)):
        assert opened.find(request_key(n=1)) == {"value": 1}
        assert opened.find(request_key(n=2)) == {"value": 2}
        assert opened.find(request_key(n=3)) is None
    assert len(list(read_record(tmp_path))) == 2


def test_runs_share_a_folder_of_answers(tmp_path):
    cache = str(tmp_path / "cache")
    first, second = Hashed(), Hashed()
    Panel([adapt(first)], Record(tmp_path / "a", cache=cache)).judge(items(2))
    Panel([adapt(second)], Record(tmp_path / "b", cache=cache)).judge(items(2))
    assert first.asked and not second.asked
    Panel([adapt(second)], Record(tmp_path / "c")).judge(items(2))
    assert second.asked


def test_an_answer_that_came_first_stands(tmp_path):
    record = Record(tmp_path)
    assert record.write(request_key(n=1), 0.25, seconds=0, tries=1) == 0.25
    assert record.write(request_key(n=1), 0.75, seconds=0, tries=1) == 0.25
    assert record.find(request_key(n=1)) == 0.25


@pytest.mark.parametrize(
    "answer",
    [None, 3, {}, [[]], [[[[0.5, None, True]]]], [[[[7, "w", True], [0.5, "w", True]]]]],
    ids=["none", "a number", "a dict", "no rows", "of other names", "out of range"],
)
@pytest.mark.parametrize("extra", [[], ["of a later version"]])
def test_an_answer_of_another_form_is_asked_for_again(answer, extra, tmp_path):
    panel = Panel([adapt(Hashed(wait=0))], Record(tmp_path))
    expected = panel.judge(items(1))
    path = tmp_path / records.NAME
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if extra:
        answer = [[[[0.5, "w", True, [], *extra], [0.5, "w", True]]]]
    path.write_text("".join(json.dumps(row | {"answer": answer}) + "\n" for row in rows))
    reward = Hashed(wait=0)
    assert Panel([adapt(reward)], Record(tmp_path)).judge(items(1)) == expected
    assert len(reward.asked) == TURNS


NO_LINES = [
    b"[]",
    b'["answer"]',
    b"3",
    b"null",
    b'{"answer": 1, "key": "z"}',
    b"\xff",
    b"[" * 10**5,
]


def test_lines_that_are_no_calls_are_left_out(tmp_path):
    key = request_key(n=1)
    Record(tmp_path).write(key, 0.5, seconds=0, tries=1)
    path = tmp_path / records.NAME
    path.write_bytes(b"\n".join(NO_LINES) + b"\n" + path.read_bytes())
    assert Record(tmp_path).find(key) == 0.5
    assert [row["key"] for row in read_record(tmp_path) if "tries" in row] == [key]


def test_a_line_for_which_there_was_no_room_takes_no_other_with_it(tmp_path, monkeypatch):
    record, keys, real = Record(tmp_path), [request_key(n=n) for n in range(3)], os.write
    record.write(keys[0], 0, seconds=0, tries=1)
    with monkeypatch.context() as full:
        full.setattr(records.os, "write", lambda file, line: real(file, line[:10]))
        with pytest.raises(UserError, match="no space left"):
            record.write(keys[1], 1, seconds=0, tries=1)
    record.write(keys[2], 2, seconds=0, tries=1)
    assert [Record(tmp_path).find(key) for key in keys] == [0, None, 2]


@pytest.mark.parametrize("name", ["judges.jsonl", "judges.1.jsonl"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.symlink_to("nowhere")])
def test_a_record_that_cannot_be_read_is_one_line(name, make, tmp_path):
    make(tmp_path / name)
    record = Record(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name}: .*accepted: a folder"):
            record.find(request_key(n=1))


LOOP: dict[str, Any] = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    "meta",
    [{1: 2, "a": 3}, {(1, 2): 3}, {None: 1, "b": 2}, LOOP, {"a": float("nan")}, {"a": "\ud800"}],
    ids=["keys of two kinds", "tuples", "none", "a loop", "nan", "half a pair"],
)
def test_meta_that_is_no_json_is_a_part_of_the_request(meta, tmp_path):
    plain_, reward = session("a", 1), Hashed(wait=0)
    given = Session("a", plain_.image, (Turn("edit \ud800", meta=meta),), meta=meta)
    panel, images = Panel([adapt(reward)], Record(tmp_path)), items(1)[0].images[:1]
    said = [panel.judge([Item(one, images)]) for one in (plain_, given, given)]
    if meta is LOOP:  # cannot be given to a judge
        assert said[2][0][0]["IF"].failed
    else:
        assert len(reward.asked) == 2 and said[1] == said[2]


def test_arrays_in_meta_that_print_alike_are_two_requests(tmp_path):
    reward = Hashed(wait=0)
    panel, images = Panel([adapt(reward)], Record(tmp_path)), items(1)[0].images[:1]
    for at in (5000, 6000):
        mask = np.zeros(10_000)
        mask[at] = 1
        turn = Turn("edit", meta={"mask": mask})
        panel.judge([Item(Session("a", images[0], (turn,)), images)])
    assert len(reward.asked) == 2


def test_of_a_key_twice_in_a_file_the_last_counts(tmp_path):
    """A line is only written behind another one where that one could not be read."""
    lines = [{"key": request_key(n=1), "answer": answer} for answer in ("of another hand", 0.5)]
    (tmp_path / records.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Record(tmp_path).find(request_key(n=1)) == 0.5


def test_an_equal_call_that_was_answered_first_is_this_ones_answer_too(tmp_path):
    record, asked = Record(tmp_path), []

    def judge(session: Session, images: np.ndarray) -> list[float]:
        asked.append(1)
        if len(asked) == 1:  # meanwhile, in another thread
            said = member.call(items(1), record)
            assert said[0][0]["judge"].value == 0.5
        return [1 / len(asked)] * len(images)

    member = adapt(judge)
    assert member.call(items(1), record)[0][0]["judge"].value == 0.5
    assert len(asked) == 2 and len(list(read_record(tmp_path))) == 1


def test_a_record_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"judges\.jsonl: .*accepted: a folder"):
        Record(tmp_path / "file" / "run").write(request_key(n=1), 1, seconds=0, tries=1)


def test_an_exact_reward_leaves_no_record(tmp_path):
    reward = Hashed()
    reward.exact = True
    Panel([adapt(reward)], Record(tmp_path)).judge(items(2))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- what is set


@dataclass(frozen=True)
class Strictness:
    """Args:
    level: of the judge.
    """

    level: int = setting(1, TRIES)


class WithOptions(Hashed):
    Options = Strictness

    def __init__(self, options: Strictness, calls: Calls, record: Record | None) -> None:
        super().__init__()
        self.options, self.calls, self.record = options, calls, record


class WithKeywords(Hashed):
    def __init__(self, wait: float = 0.0, names: tuple[str, ...] = ("IF",)) -> None:
        super().__init__(tuple(names), wait)


def threshold(session: Session, images: np.ndarray, level: float = 0.5) -> list[float]:
    return [level] * len(images)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """This module by a name, as a user's own."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    return tmp_path


def use(name: str, **settings: Any) -> RewardConfig:
    return RewardConfig(function=f"{HERE}:{name}", **settings)


def test_a_class_takes_its_options_and_the_services_that_it_has_a_place_for(here):
    record = Record(here)
    config = use("WithOptions", options={"level": "3"}, concurrency=7, retries=2, timeout=4)
    with pytest.raises(ConfigError, match=r"reward\.options\.level: '3' \(accepted: a whole num"):
        load_reward(config, record)
    config = use("WithOptions", options={"level": 3}, concurrency=7, retries=2, timeout=4)
    (member,) = load_reward(config, record).members
    assert member.given.options == Strictness(3) and member.given.record is record
    assert member.given.calls == Calls(7, 4.0, 2) and member.concurrency == 7
    assert not member.recorded
    (member,) = load_reward(use("WithKeywords", options={"wait": 0.5})).members
    assert member.given.wait == 0.5
    panel = load_reward(use("threshold", options={"level": 0.25}))
    assert panel.judge(items(1))[0][0]["threshold"].value == 0.25


WRONG = {
    "an option that there is not": (
        use("WithOptions", options={"levle": 3}),
        r"unknown key 'reward\.options\.levle' \(did you mean 'reward\.options\.level'\?\)",
    ),
    "out of bounds": (
        use("WithOptions", options={"level": -1}),
        r"reward\.options\.level: -1 \(accepted: a whole number, 0 to 100\)",
    ),
    "of a class without options": (
        use("WithKeywords", options={"level": 3}),
        r"reward\.options\.level: WithKeywords has no such option \(accepted: wait, names\)",
    ),
    "of a function": (
        use("threshold", options={"session": 3}),
        r"reward\.options\.session: threshold has no such option \(accepted: level\)",
    ),
    "named twice": (
        RewardConfig(use=(RewardUse(name="world", function="a:b"),)),
        r"reward\.use\[0\]\.name: 'world' \(accepted with reward\.use\[0\]\.function 'a:b': none",
    ),
    "not named": (RewardConfig(use=(RewardUse(),)), r"reward\.use\[0\]: names no reward"),
    "beside a list": (
        RewardConfig(name="world", use=(RewardUse("world"),)),
        r"reward\.name: 'world' \(accepted with reward\.use: none",
    ),
    "scores of one name": (
        RewardConfig(use=(RewardUse("world"), RewardUse(function=f"{HERE}:Hashed"))),
        r"reward\.use\[0\]\.name: 'world', reward\.use\[1\]\.function: 'test_judging:Hashed': "
        r"names: 'IF' more than once",
    ),
    "a module that there is not": (
        RewardConfig(use=(RewardUse("world"), RewardUse(function="nowhere_at_all:judge"))),
        r"reward\.use\[1\]\.function: 'nowhere_at_all:judge': importing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reward_is_one_line_that_names_the_setting(name, here):
    config, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(config)
    assert "\n" not in str(caught.value)


SERVED = {
    "a secret": ({"url": "http://a:b@h/v1"}, r"^reward\.use\[1\]\.options\.url: it holds a pass"),
    "no address": ({}, r"^reward\.use\[1\]\.options\.url, url_env: neither"),
    "a key": ({"url": "http://h/v1", "key_env": "sk-1"}, r"^reward\.use\[1\]\.options\.key_env: "),
}


@pytest.mark.parametrize("name", SERVED)
def test_an_option_of_one_of_several_rewards_is_named_where_it_is_set(name):
    options, message = SERVED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(RewardConfig(use=(RewardUse("world"), RewardUse("pku", options=options))))
    assert "sk-1" not in str(caught.value) and "a:b" not in str(caught.value)


def test_a_probe_names_the_option_where_it_is_set(here, monkeypatch):
    def probe(self: Any) -> list[str]:
        raise ConfigError("level: 3 (accepted: what the server has)")

    monkeypatch.setattr(WithOptions, "probe", probe, raising=False)
    panel = load_reward(use("WithOptions", options={"level": 3}), Record(here))
    with pytest.raises(ConfigError, match=r"^reward\.options\.level: 3 \(accepted"):
        panel.probe()


def test_the_list_is_read_from_a_file_and_from_a_flag(tmp_path):
    from editr2.cli.settings import run_config

    file = tmp_path / "run.yaml"
    file.write_text(
        "reward:\n  use:\n    - {name: world, timeout: 5}\n    - function: my_judge:warmth\n"
        "      options: {level: 1}\n"
    )
    config, _ = run_config("editr2 train", "", ["--config", str(file)])
    assert config.reward.use == (
        RewardUse("world", timeout=5.0),
        RewardUse(function="my_judge:warmth", options={"level": 1}),
    )
    flag, _ = run_config("editr2 train", "", ["--reward.use", "[{name: world, retries: 3}]"])
    assert flag.reward.use == (RewardUse("world", retries=3),)
    file.write_text("reward:\n  use:\n    - name: world\n      timeout: -5\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: reward\.use\[0\]\.timeout: -5"):
        run_config("editr2 train", "", ["--config", str(file)])
    file.write_text("reward:\n  use:\n    - {name: wrold}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: reward\.use\[0\]\.name: 'wrold'"):
        run_config("editr2 train", "", ["--config", str(file)])


# --------------------------------------------------------------------------------- a run

KILLED = """
import importlib.util, os, random, signal, sys, threading, time
import numpy as np, torch
from editr2.rewards.base import Score
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("killed_runs", {runs!r})
runs = importlib.util.module_from_spec(spec); sys.modules["killed_runs"] = runs
spec.loader.exec_module(runs)
calls, lock = [0], threading.Lock()

class Sampling:
    # Draws from the machine's entropy: nothing but the record gives an answer twice.
    names, by_turn, batch, concurrency = ("bright",), True, 1, {concurrency}

    def judge(self, items):
        with lock:
            calls[0] += 1
            if calls[0] == int(os.environ.get("DIE", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(random.random() / 100)
        return [[{{"bright": Score(*drawn(item, t))}} for t in item.asked] for item in items]

def drawn(item, turn):
    if {sampling}:
        return int.from_bytes(os.urandom(4), "big") / 2**32, "drawn"
    return (item.seed + int(item.images[turn].sum()) * 7919) % 100003 / 100003, f"saw {{turn}}"

config = runs.configured({out!r}, "ema", eval={{"every": 0}}, train={{"iterations": 3}})
runs.training.train(config, policy=runs.tiny(), reward=Sampling())
"""


def run(out: Path, *, die: int = 0, concurrency: int | None = 3, sampling: bool = False) -> int:
    code = KILLED.format(
        runs=str(Path(__file__).with_name("killed_runs.py")),
        out=str(out),
        concurrency=concurrency,
        sampling=sampling,
    )
    file = out.with_name(f"{out.name}.py")  # a run goes on with a judge of the same source
    file.write_text(code)
    if not die:  # nobody is killed: it need not be a process of its own
        runpy.run_path(str(file), run_name="__main__")
        return 0
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        timeout=240,
        env={**os.environ, "DIE": str(die)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    return done.returncode


def numbers(out: Path) -> list[dict[str, Any]]:
    """All but what no two runs share."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    apart = ("seconds", "elapsed_s", "identity", "busy", "peak_memory")
    return [{k: v for k, v in row.items() if k not in apart} for row in rows]


def test_serial_and_concurrent_and_resumed_after_a_kill_are_the_same_run(tmp_path):
    assert run(tmp_path / "serial", concurrency=None) == 0
    assert run(tmp_path / "threads") == 0
    assert run(tmp_path / "killed", die=21) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    expected = numbers(tmp_path / "serial")
    assert [row["event"] for row in expected].count("train") == 3
    assert numbers(tmp_path / "threads") == expected
    assert numbers(tmp_path / "killed") == expected
    strips = [(tmp_path / name / "strips/after.json").read_text() for name in ("serial", "killed")]
    assert strips[0] == strips[1]


def test_a_judge_that_samples_is_the_same_judge_after_a_kill(tmp_path):
    """The machine's entropy gives no number twice: what was asked before the kill is the record's
    afterwards."""
    assert run(tmp_path / "run", die=33, sampling=True) == -signal.SIGKILL
    before = numbers(tmp_path / "run")
    told = {row["key"]: row["answer"] for row in read_record(tmp_path / "run") if "answer" in row}
    assert run(tmp_path / "run", sampling=True) == 0
    after = numbers(tmp_path / "run")
    assert after[: len(before)] == before and len(after) > len(before)
    lines = [row for row in read_record(tmp_path / "run") if row.get("purpose") != "first"]
    assert len({row["key"] for row in lines}) == len(lines)  # nothing was asked twice
    now = {row["key"]: row["answer"] for row in lines}
    assert {key: now[key] for key in told if key in now} == {k: told[k] for k in told if k in now}


# ------------------------------------------------------------------ a rollout made ahead


def ahead(runs: Any, out: Path, **changes: Any) -> Config:
    values = {
        "rollout": {"ahead": True},
        "train": {"iterations": 4, **changes.pop("train", {})},
        "eval": {"every": 0},
        "checkpoint": {"every": 4},
    }
    return runs.configured(out, changes.pop("method", "ema"), **values, **changes)


@pytest.mark.parametrize("method", ["ema", "text", "nft"])
def test_a_rollout_made_ahead_is_learnt_from_with_the_ratios_of_who_made_it(
    method, runs, tmp_path, monkeypatch
):
    """Old log-probs by training's own code under the weights that sampled are the rollout's."""
    from editr2.rl import gradient, loop

    stale, asked = [], []
    real = gradient.accumulate_gradient

    def watched(t: Any, state: Any, batch: Any, *rest: Any) -> Any:
        stale.append(batch.stale)
        for number, known in batch.old.items():
            seen = torch.cat([r.log_prob.flatten() for r in batch.chunks[number].turns])
            asked.append(float((known - seen).abs().max()))
        return real(t, state, batch, *rest)

    monkeypatch.setattr("editr2.rl.iteration.accumulate_gradient", watched)
    monkeypatch.setattr(loop, "build_report", None, raising=False)
    config = ahead(runs, tmp_path / "run", method=method, train={"old_log_prob": "replay"})
    updates = config.train.updates
    train(config, policy=runs.tiny(), reward=runs.Drawing())
    assert stale == [False] * updates + [True] * 3 * updates
    if method != "nft":
        assert asked and max(asked) < 1e-5
    rows = [r for r in numbers(tmp_path / "run") if r["event"] == "train"]
    assert len(rows) == 4
    if method != "nft":  # the weights moved in between, and the ratio says so
        assert rows[0]["ratio_error"] < 1e-5


def test_made_ahead_is_another_run_and_is_resumed_as_itself(runs, tmp_path):
    def go(out: str, iterations: int, on: bool) -> list[dict[str, Any]]:
        config = ahead(runs, tmp_path / out, train={"iterations": iterations})
        config = replace_nested(config, {"checkpoint": {"every": 2}, "rollout": {"ahead": on}})
        train(config, policy=runs.tiny(), reward=runs.Drawing())
        return [row for row in numbers(tmp_path / out) if row["event"] == "train"]

    whole, plain = go("whole", 4, True), go("plain", 4, False)
    assert whole[0] == plain[0] and whole[1] != plain[1]
    go("parts", 2, True)
    again = go("parts", 4, True)
    keys = [k for k in whole[3] if k not in ("lr",)]
    assert [row["iteration"] for row in again] == [0, 1, 2, 3]
    assert {k: again[0][k] for k in keys} == {k: whole[0][k] for k in keys}
