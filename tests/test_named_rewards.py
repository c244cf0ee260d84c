"""The rewards by name: each rule from both sides, what fails, what does not apply, whose words are
asked, and runs from end to end."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from editr2.config import RewardConfig
from editr2.config.settings import RewardUse
from editr2.errors import ConfigError
from editr2.rewards import (
    edit_r2,
    editscore,
    edival,
    imgedit,
    pku,
    rational,
    unifiedreward,
    viescore,
)
from editr2.rewards.ask import Asker
from editr2.rewards.base import Item
from editr2.rewards.client import Failure
from editr2.rewards.edit_r2 import EditR2, EditR2Options
from editr2.rewards.edival import Edival, EdivalOptions
from editr2.rewards.eyes import Eyes, Once
from editr2.rewards.load import load_reward
from editr2.rewards.object_edits import FIELDS, ObjectReward
from editr2.rewards.record import pixel_digest
from editr2.rewards.table import REWARDS
from editr2.rewards.wording import prompts_of
from editr2.sessions import Session, Turn

RNG = np.random.default_rng(5)
BEFORE, AFTER, LATER = (RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(3))

REWARD_OF = {"edit-r2": (EditR2, EditR2Options), "edival": (Edival, EdivalOptions)}


@pytest.fixture(scope="module")
def judges(beside):
    return beside("drawn_judge")


@pytest.fixture(scope="module")
def dinov3(beside, tmp_path_factory):
    return str(beside("tiny_lookers").dinov3(tmp_path_factory.mktemp("look") / "dinov3"))


@pytest.fixture
def made(judges, dinov3):
    """A reward with a scripted detector and judge: (name, found of each image, says, options) ->
    reward. `reward.detector` and `reward.client` know what they were asked."""

    def make(name="edit-r2", found=None, says="yes", **options) -> ObjectReward:
        kind, kind_of_options = REWARD_OF[name]
        given = {"detector": None, "features": dinov3, "url": "http://nowhere"} | options
        chosen = kind_of_options(**given)
        detector, client = judges.Scripted(found or {}), judges.FakeClient(says)
        eyes = Eyes(chosen, detector=detector, released=chosen.released)
        reward = kind(chosen, eyes=eyes, asker=Asker(client, chosen))
        reward.detector, reward.client = detector, client
        return reward

    return make


def turn(task="color_alter", formatted="Change the color of [cup] to [red]", **more):
    instruction = more.pop("instruction", formatted.replace("[", "").replace("]", ""))
    meta = {"formatted_instruction": formatted, "bg_consistency": task != "background_change"}
    meta |= {"unchanged_objects": ["lamp"], "all_objects": ["cup", "lamp"]}
    return Turn(instruction, task=task, meta=meta | more)


def session(*turns, image=BEFORE, mode=None):
    return Session("s1", image, tuple(turns), mode=mode)


def one(reward, session, *images, asked=None, seed=7):
    """What a reward says of the last turn, or of those that are asked about."""
    at = (len(images) - 1,) if asked is None else asked
    ((*rows,),) = reward.judge([Item(session, np.stack(images), at, seed=seed)])
    return rows[-1]


# --------------------------------------------------------------------------------- the rules of IF

LEFT, RIGHT = (0.1, 0.1, 0.3, 0.3), (0.6, 0.1, 0.8, 0.3)
LOW = (0.1, 0.6, 0.3, 0.8)
ADD, SIDE = "Add [cup]", "Add [cup] on the [left] of [lamp]"
MOVE = "Change the position of [cup] to [left] of [lamp]"
REMOVE, COUNT = "Remove [cup]", "Change the count of [cup] to [2]"
SWAP = "Replace [apples] with [oranges]"
TEXT, RETEXT = "Add text '[OPEN]' on the image", "Replace the text '[SALE]' on [sign] with '[OPEN]'"
BEACH = "Change the background to [beach]"
KEEP = "Change the background to beach, remain the cup, lamp unchanged"


def at(x, y=0.2, size=0.1):
    """A box about a centre."""
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


# name of the case, reward, task, instruction, found before, found after, the judge, value, whether
# the judge was asked, options
BOTH = ("edit-r2", "edival")
RULES = [
    ("added", BOTH, "subject_add", ADD, {}, {"cup": [LEFT]}, "yes", 1, True, {}),
    ("the judge says no", BOTH, "subject_add", ADD, {}, {"cup": [LEFT]}, "No.", 0, True, {}),
    ("not found", BOTH, "subject_add", ADD, {"cup": [LEFT]}, {}, "yes", 0, False, {}),
    ("just sure", BOTH, "subject_add", ADD, {}, {"cup": [(*LEFT, 0.31)]}, "yes", 1, True, {}),
    ("not sure", BOTH, "subject_add", ADD, {}, {"cup": [(*LEFT, 0.3)]}, "yes", 0, False, {}),
    (
        "a side, far",
        BOTH,
        "subject_add",
        SIDE,
        {"lamp": [at(0.5)]},
        {"cup": [at(0.46)]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "a side, near",
        BOTH,
        "subject_add",
        SIDE,
        {"lamp": [at(0.5)]},
        {"cup": [at(0.48)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "the other side",
        BOTH,
        "subject_add",
        SIDE,
        {"lamp": [at(0.5)]},
        {"cup": [at(0.6)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "any pair",
        BOTH,
        "subject_add",
        SIDE,
        {"lamp": [at(0.3), at(0.7)]},
        {"cup": [at(0.9), at(0.5)]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "the reference is the source's",
        BOTH,
        "subject_add",
        SIDE,
        {},
        {"cup": [at(0.2)], "lamp": [at(0.5)]},
        "yes",
        0,
        False,
        {},
    ),
    ("gone", BOTH, "subject_remove", REMOVE, {"cup": [LEFT]}, {}, "no", 1, False, {}),
    (
        "still there",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [LEFT]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "elsewhere",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [RIGHT]},
        "yes",
        1,
        False,
        {},
    ),
    ("never there", BOTH, "subject_remove", REMOVE, {}, {}, "yes", 0, False, {}),
    (
        "0.35 counts",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [(*LEFT, 0.35)]},
        "yes",
        1,
        False,
        {},
    ),
    (
        "above 0.35",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [(*LEFT, 0.36)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "the whole source is no cup",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [(0, 0, 0.99, 0.99)]},
        {},
        "yes",
        0,
        False,
        {},
    ),
    (
        "the whole output is no cup",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [(0, 0, 1, 1, 0.99)]},
        "yes",
        1,
        False,
        {},
    ),
    (
        "wide but not high is one",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [(0, 0, 1, 0.9)]},
        {"cup": [(0, 0, 1, 0.9)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "the best box only",
        BOTH,
        "subject_remove",
        REMOVE,
        {"cup": [LEFT]},
        {"cup": [(*RIGHT, 0.9), (*LEFT, 0.8)]},
        "yes",
        1,
        False,
        {},
    ),
    (
        "replaced",
        BOTH,
        "subject_replace",
        SWAP,
        {"apple": [LEFT]},
        {"orange": [at(0.3)]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "replaced, says no",
        BOTH,
        "subject_replace",
        SWAP,
        {"apple": [LEFT]},
        {"orange": [LEFT]},
        "no",
        0,
        True,
        {},
    ),
    (
        "another place",
        BOTH,
        "subject_replace",
        SWAP,
        {"apple": [LEFT]},
        {"orange": [RIGHT]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "what was there is not found",
        BOTH,
        "subject_replace",
        SWAP,
        {},
        {"orange": [LEFT]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "what came is not found",
        BOTH,
        "subject_replace",
        SWAP,
        {"apple": [LEFT]},
        {},
        "yes",
        0,
        False,
        {},
    ),
    (
        "glasses stay",
        BOTH,
        "subject_replace",
        "Replace [glasses] with [mug]",
        {"glasses": [LEFT]},
        {"mug": [LEFT]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "released: glass",
        BOTH,
        "subject_replace",
        "Replace [glasses] with [mug]",
        {"glasses": [LEFT]},
        {"mug": [LEFT]},
        "yes",
        0,
        False,
        {"released": True},
    ),
    (
        "coloured",
        BOTH,
        "color_alter",
        "Change the color of [cup] to [red]",
        None,
        None,
        "Yes",
        1,
        True,
        {},
    ),
    (
        "not coloured",
        BOTH,
        "color_alter",
        "Change the color of [cup] to [red]",
        None,
        None,
        "no",
        0,
        True,
        {},
    ),
    (
        "made of",
        BOTH,
        "material_alter",
        "Change the material of [cup] to [gold]",
        None,
        None,
        "yes",
        1,
        True,
        {},
    ),
    (
        "not made of",
        BOTH,
        "material_alter",
        "Change the material of [cup] to [gold]",
        None,
        None,
        "no",
        0,
        True,
        {},
    ),
    ("a new text", BOTH, "text_change", TEXT, None, None, "we are\n open now", 1, True, {}),
    ("another text", BOTH, "text_change", TEXT, None, None, "OPE", 0, True, {}),
    ("no text", BOTH, "text_change", TEXT, None, None, "NOTHING", 0, True, {}),
    (
        "a text changed",
        BOTH,
        "text_change",
        RETEXT,
        {"sign": [LEFT]},
        {"sign": [LEFT]},
        "Open",
        1,
        True,
        {},
    ),
    ("no sign before", BOTH, "text_change", RETEXT, {}, {"sign": [LEFT]}, "Open", 0, False, {}),
    ("no sign now", ("edit-r2",), "text_change", RETEXT, {"sign": [LEFT]}, {}, "Open", 1, True, {}),
    ("no sign now", ("edival",), "text_change", RETEXT, {"sign": [LEFT]}, {}, "Open", 0, False, {}),
    (
        "moved",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.2)], "lamp": [at(0.5)]},
        "no",
        1,
        False,
        {},
    ),
    (
        "moved by a hair",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.49)], "lamp": [at(0.5)]},
        "no",
        1,
        False,
        {},
    ),
    (
        "not moved",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "another cup",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.2), at(0.9)], "lamp": [at(0.5)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "another lamp",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.2)], "lamp": [at(0.5), at(0.8)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "one cup found twice",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.2), at(0.2, size=0.105)], "lamp": [at(0.5)]},
        "yes",
        1,
        False,
        {},
    ),
    (
        "another cup, not sure",
        BOTH,
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5)]},
        {"cup": [at(0.2), (*at(0.9), 0.4)], "lamp": [at(0.5)]},
        "yes",
        1,
        False,
        {},
    ),
    ("nothing there, before and now", BOTH, "position_change", MOVE, {}, {}, "yes", 0, False, {}),
    (
        "one inside the other",
        ("edit-r2",),
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5, size=0.4)]},
        {"cup": [at(0.4)], "lamp": [at(0.5, size=0.4)]},
        "yes",
        1,
        False,
        {},
    ),
    (
        "one inside the other",
        ("edival",),
        "position_change",
        MOVE,
        {"cup": [at(0.9)], "lamp": [at(0.5, size=0.4)]},
        {"cup": [at(0.4)], "lamp": [at(0.5, size=0.4)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "counted",
        BOTH,
        "count_change",
        COUNT,
        {"cup": [LEFT]},
        {"cup": [LEFT, RIGHT]},
        "no",
        1,
        False,
        {},
    ),
    (
        "too many",
        BOTH,
        "count_change",
        COUNT,
        {"cup": [LEFT]},
        {"cup": [LEFT, RIGHT, LOW]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "one twice is one",
        BOTH,
        "count_change",
        COUNT,
        {"cup": [LEFT]},
        {"cup": [at(0.2), at(0.2, size=0.105)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "none to begin with",
        BOTH,
        "count_change",
        COUNT,
        {},
        {"cup": [LEFT, RIGHT]},
        "yes",
        0,
        False,
        {},
    ),
    ("a background", BOTH, "background_change", BEACH, None, None, "yes", 1, True, {}),
    ("no background", BOTH, "background_change", BEACH, None, None, "no", 0, True, {}),
    (
        "what it keeps",
        BOTH,
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT], "lamp": [RIGHT]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "what it does not keep",
        BOTH,
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "kept, just sure",
        BOTH,
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT], "lamp": [(*RIGHT, 0.26)]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "kept, too large",
        BOTH,
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT], "lamp": [(0, 0, 0.95, 0.95)]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "kept, too large and right",
        BOTH,
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT], "lamp": [(0, 0, 0.95, 0.95), (*RIGHT, 0.5)]},
        "yes",
        1,
        True,
        {},
    ),
    (
        "released: the best box alone",
        ("edival",),
        "background_change",
        KEEP,
        None,
        {"cup": [LEFT], "lamp": [(0, 0, 0.95, 0.95), (*RIGHT, 0.5)]},
        "yes",
        0,
        False,
        {"released": True},
    ),
    (
        "released: nothing is looked for",
        ("edit-r2",),
        "background_change",
        KEEP,
        None,
        None,
        "yes",
        1,
        True,
        {"released": True},
    ),
    (
        "a hat",
        BOTH,
        "subject_remove",
        "Remove [red hat]",
        {"red hat": [LEFT]},
        {"red hat": [LEFT]},
        "yes",
        0,
        False,
        {},
    ),
    (
        "released: no hat",
        ("edival",),
        "subject_remove",
        "Remove [red hat]",
        {"red hat": [LEFT]},
        {"red hat": [LEFT]},
        "yes",
        1,
        False,
        {"released": True},
    ),
    (
        "released: a hat",
        ("edival",),
        "subject_remove",
        "Remove [red hat]",
        {"red hat": [LEFT]},
        {"red hat": [LEFT], "hat": [LEFT]},
        "yes",
        0,
        False,
        {"released": True},
    ),
    (
        "released: it was no hat",
        ("edival",),
        "subject_remove",
        "Remove [red hat]",
        {},
        {},
        "yes",
        0,
        False,
        {"released": True},
    ),
]
CASES = [(name, *rest) for what, names, *rest in RULES for name in names]
IDS = [f"{name}: {rest[0]}: {what}" for what, names, *rest in RULES for name in names]


def rule(made, name, task, formatted, before, after, says, options, **more):
    """A reward for one of the cases, and what it is asked about."""
    instruction = formatted if "[" not in formatted else None
    if instruction is not None:
        formatted = "Change the background to [beach]"
    given = turn(task, formatted, **({} if instruction is None else {"instruction": instruction}))
    side = 512 if name == "edival" else None
    from editr2.rewards.object_edits import resized_to

    seen = [i if side is None else resized_to(i, side, side) for i in (BEFORE, AFTER)]
    found = {
        pixel_digest(image): boxes
        for image, boxes in zip(seen, (before, after))
        if boxes is not None
    }
    return made(name, found, says, scores=("IF",), **options, **more), session(given)


@pytest.mark.parametrize(
    ("name", "task", "formatted", "before", "after", "says", "value", "asked", "options"),
    CASES,
    ids=IDS,
)
def test_a_rule(made, name, task, formatted, before, after, says, value, asked, options):
    reward, judged = rule(made, name, task, formatted, before, after, says, options)
    score = one(reward, judged, AFTER)["IF"]
    assert (score.value, score.failed) == (value, False), score
    assert bool(reward.client.asked) == asked
    if asked:
        (call,) = reward.client.asked
        assert call["n"] == (4 if name == "edit-r2" else 1)


SEEN = sorted({task for _, task, *_ in CASES} - {"color_alter", "material_alter"})


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("task", SEEN)
def test_a_detector_that_does_not_answer_has_found_nothing_out(made, name, task, released):
    """Of every rule that has one look: a failure in the first image that it looks at, never a 0 or
    a 1."""
    formatted = {
        "subject_add": ADD,
        "subject_remove": REMOVE,
        "subject_replace": SWAP,
        "text_change": RETEXT,
        "position_change": MOVE,
        "count_change": COUNT,
        "background_change": KEEP,
    }[task]
    options = {"released": released}
    reward, judged = rule(made, name, task, formatted, None, None, "yes", options)
    score = one(reward, judged, AFTER)["IF"]
    if task == "background_change" and released and name == "edit-r2":
        assert score.value == 1  # looks for nothing
        return
    assert score.failed and "it is not there" in score.reason


@pytest.mark.parametrize(
    ("says", "value", "reason"),
    [
        (["yes", "no", "yes", "yes"], 0.75, "4 of 4 votes"),
        (["no"] * 4, 0.0, "4 of 4"),
        (["yes", Failure("503"), "no", Failure("503")], 0.5, "2 of 4"),
        (["yes", Failure("503"), Failure("503"), Failure("503")], None, "503"),
        (["perhaps"] * 4, None, "perhaps"),
        ([""] * 4, None, "accepted: yes or no"),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_votes_of_the_judge(made, says, value, reason, released):
    reward = made(says=lambda text, images: says, scores=("IF",), released=released)
    score = one(reward, session(turn()), AFTER)["IF"]
    assert score.value == value and reason in score.reason
    assert score.failed == (value is None)


@pytest.mark.parametrize("released", [False, True])
def test_a_reading_that_cannot_be_read_is_not_another_text(made, released):
    reward = made(says=" ", scores=("IF",), released=released)
    score = one(reward, session(turn("text_change", TEXT)), AFTER)["IF"]
    assert score.failed and "nothing came back" in score.reason


def test_the_judge_sees_the_images_of_the_turn_and_draws_from_the_rollouts_seed(made):
    reward = made(scores=("IF",))
    one(reward, session(turn(), turn()), AFTER, LATER, seed=11)
    (call,) = reward.client.asked
    assert [pixel_digest(i) for i in call["images"]] == [pixel_digest(i) for i in (AFTER, LATER)]
    assert (call["seed"], call["name"], call["turn"], call["temperature"]) == (11, "IF", 1, 0.6)
    assert "Change the color of cup to red" in call["text"]


def test_edival_sees_512_and_asks_once_at_temperature_0(made):
    reward = made("edival", scores=("IF",))
    one(reward, session(turn()), AFTER)
    (call,) = reward.client.asked
    assert [i.shape for i in call["images"]] == [(512, 512, 3)] * 2
    assert (call["n"], call["temperature"]) == (1, 0.0)


def test_edival_reads_at_the_place_of_what_bears_the_text(made):
    found = {"sign": [(0.25, 0.5, 0.5, 1.0)]}
    reward, judged = rule(made, "edival", "text_change", RETEXT, found, found, "open", {})
    one(reward, judged, AFTER)
    (call,) = reward.client.asked
    assert [i.shape for i in call["images"]] == [(256, 128, 3)]


def test_siblings_share_what_was_found_in_their_source(made):
    found = {pixel_digest(image): {"cup": [LEFT]} for image in (BEFORE, AFTER, LATER)}
    reward = made(found=found, scores=("IF",))
    for image in (AFTER, LATER):
        one(reward, session(turn("subject_remove", REMOVE)), image)
    assert len(reward.detector.asked) == len(set(reward.detector.asked)) == 3


def test_of_those_who_ask_at_once_one_does_the_work():
    once, made_, gate = Once(), [], threading.Event()

    def make():
        made_.append(1)
        gate.wait(5)
        return 3

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(once, "key", make) for _ in range(4)]
        time.sleep(0.05)
        gate.set()
        assert [f.result() for f in futures] == [3] * 4 and len(made_) == 1

    def fails():
        made_.append(1)
        raise ValueError("no")

    for _ in range(2):  # what failed is asked again
        with pytest.raises(ValueError, match="no"):
            once("other", fails)
    assert len(made_) == 3
    small = Once(2)
    for key in (1, 2, 3, 1):
        small(key, lambda: made_.append(1))
    assert len(made_) == 7  # 1 was forgotten


# ------------------------------------------------------------------------------------ consistency

FULL = (0.0, 0.0, 1.0, 1.0)
CHANGED = turn("background_change", BEACH)


def consistency(made, name="edit-r2", found=None, image=AFTER, turns=None, **options):
    kept = {"cup": [LEFT], "lamp": [RIGHT]} if found is None else found
    from editr2.rewards.object_edits import resized_to

    images = [BEFORE, AFTER, LATER, image]
    if name == "edival":
        images = [resized_to(i, 512, 512) for i in images]
    reward = made(name, {pixel_digest(i): kept for i in images}, scores=("CC",), **options)
    turns = turns or [turn()]
    score = one(reward, session(*turns), *[image] * len(turns))["CC"]
    assert not reward.client.asked
    return reward, score


@pytest.mark.parametrize("name", BOTH)
def test_what_is_the_same_is_consistent(made, name):
    _, same = consistency(made, name, image=BEFORE)
    assert same.value == pytest.approx(1.0, abs=1e-6) and "objects 1.000" in same.reason
    _, other = consistency(made, name)
    assert 0 <= other.value < 0.999 and "background" in other.reason


def test_consistency_is_the_mean_of_its_parts_against_the_source(made):
    from editr2.rewards.features import background_consistency, object_consistency
    from editr2.rewards.geometry import Box

    reward, score = consistency(made, turns=[turn(), turn()])
    encoder = reward.eyes.encoder
    objects = object_consistency(encoder, BEFORE, AFTER, [Box(*RIGHT)])
    background = background_consistency(encoder, BEFORE, AFTER, [Box(*LEFT), Box(*RIGHT)])
    assert score.value == pytest.approx((objects + background) / 2, abs=1e-9)
    asked = {(names, threshold) for _, names, threshold in reward.detector.asked}
    assert asked == {(("lamp",), 0.35), (("cup", "lamp"), 0.35)}


@pytest.mark.parametrize(
    ("name", "turns", "found", "options", "parts", "value"),
    [
        ("edit-r2", [turn()], None, {}, {"objects", "background"}, ...),
        # After a change of the background.
        ("edit-r2", [CHANGED], None, {}, {"objects"}, ...),
        ("edit-r2", [CHANGED, turn()], None, {}, {"objects"}, ...),
        (
            "edit-r2",
            [turn("background_change", BEACH, bg_consistency=None)],
            None,
            {},
            {"objects"},
            ...,
        ),
        ("edit-r2", [turn(bg_consistency=False), turn()], None, {}, {"objects"}, ...),
        ("edit-r2", [CHANGED, turn()], None, {"released": True}, {"objects", "background"}, ...),
        ("edival", [CHANGED], None, {}, set(), None),
        ("edival", [CHANGED, turn()], None, {}, set(), None),
        ("edival", [turn()], None, {}, {"objects", "background"}, ...),
        # Nothing left: everything is masked, and nothing that is kept is found.
        ("edit-r2", [turn()], {"cup": [FULL]}, {}, set(), None),
        ("edit-r2", [turn()], {"cup": [FULL]}, {"released": True}, set(), 0.5),
        ("edit-r2", [CHANGED], {}, {}, set(), None),
        ("edit-r2", [CHANGED], {}, {"released": True}, set(), 0.5),
        ("edival", [turn()], {"cup": [FULL]}, {}, set(), None),
        ("edival", [turn()], {"cup": [FULL]}, {"released": True}, {"objects"}, 0.0),
        # A list that is empty: as released, of both parts.
        ("edit-r2", [turn(unchanged_objects=[])], None, {}, {"background"}, ...),
        ("edit-r2", [turn(unchanged_objects=[])], None, {"released": True}, set(), 0.5),
        ("edit-r2", [turn(all_objects=[])], None, {}, {"objects"}, ...),
        ("edit-r2", [turn(all_objects=[])], None, {"released": True}, set(), 0.5),
    ],
)
def test_which_part_applies(made, name, turns, found, options, parts, value):
    _, score = consistency(made, name, found, turns=turns, **options)
    assert not score.failed
    assert {part for part in ("objects", "background") if f"{part} 0." in (score.reason or "")} == (
        parts
    ), score
    if value is ...:
        assert score.value is not None
    else:
        assert (score.value, score.applies) == (value, value is not None)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_consistency_without_an_answer_of_the_detector_fails(made, name, released):
    reward = made(name, {}, scores=("CC",), released=released)
    score = one(reward, session(turn()), AFTER)["CC"]
    assert score.failed and "it is not there" in score.reason


def test_an_output_of_another_size_is_compared_at_the_sources(made):
    large = np.repeat(np.repeat(BEFORE, 2, 0), 2, 1)
    from editr2.rewards.object_edits import resized_to

    small = resized_to(large, *BEFORE.shape[:2])
    found = {pixel_digest(i): {"lamp": [RIGHT]} for i in (BEFORE, small)}
    score = one(made(found=found, scores=("CC",)), session(turn()), large)["CC"]
    assert score.value > 0.9


def test_released_counts_registers_as_patches(made):
    assert consistency(made)[0].eyes.encoder.released is False
    assert consistency(made, released=True)[0].eyes.encoder.released is True


# ---------------------------------------------------------------------------------------------- GA


def final(verdict, more=""):
    return f"<answer_turn_1>yes</answer_turn_1>{more}<answer_final>{verdict}</answer_final>"


@pytest.mark.parametrize("mode", [None, "cm", "cu"])
def test_awareness_asks_once_about_all_images_so_far(made, mode):
    turns = [turn(instruction="Keep it blue from now on."), turn(instruction="Paint it."), turn()]
    reward = made(says=final("yes"), scores=("GA",))
    score = one(reward, session(*turns, mode=mode), AFTER, LATER)["GA"]
    (call,) = reward.client.asked
    assert score.value == 1 and call["n"] == 4 and call["name"] == "GA" and call["turn"] == 1
    assert [pixel_digest(i) for i in call["images"]] == [
        pixel_digest(i) for i in (BEFORE, AFTER, LATER)
    ]
    assert "Turn 1: Keep it blue from now on.\n" in call["text"]
    assert "Turn 2: Paint it." in call["text"] and "Turn 3" not in call["text"]
    assert ("Change the color of [cup] to [red]" in call["text"]) == (mode == "cu")


@pytest.mark.parametrize(
    ("says", "value"),
    [
        (final("yes"), 1.0),
        (final("no"), 0.0),
        ("<answer_turn_1>no</answer_turn_1> <answer_final> YES </answer_final>", 1.0),
        (final("no", "<answer_final>yes</answer_final>"), 0.0),  # the last one
        ([final("yes"), final("no"), final("yes"), final("no")], 0.5),
        ("<answer_turn_1>yes</answer_turn_1>", None),
        (final("maybe"), None),
        (Failure("503"), None),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_only_the_final_tag_counts(made, says, value, released):
    reward = made(says=lambda text, images: says, scores=("GA",), released=released)
    score = one(reward, session(turn()), AFTER)["GA"]
    assert score.value == value and score.failed == (value is None)


# ------------------------------------------------------------------------------- what sessions lack


@pytest.mark.parametrize(
    ("name", "turns", "mode", "options", "scores", "says"),
    [
        ("edit-r2", [turn()], None, {}, "", None),
        ("edit-r2", [Turn("Paint it red.")], None, {}, "IF CC", "no task"),
        (
            "edit-r2",
            [turn(), Turn("x", task="color_alter")],
            None,
            {},
            "IF CC",
            "turn 2: no meta.formatted_instruction",
        ),
        ("edit-r2", [replace(turn(), task="stylise")], None, {}, "IF", "'stylise'"),
        ("edit-r2", [turn(formatted="Paint it.")], None, {}, "IF", "no template of color_alter"),
        ("edit-r2", [turn(unchanged_objects="lamp")], None, {}, "CC", "a list of names"),
        ("edit-r2", [turn(all_objects=None)], None, {}, "CC", "meta.all_objects"),
        ("edit-r2", [Turn("x")], "cu", {}, "IF CC GA", "of mode cu"),
        ("edit-r2", [turn()], None, {"features": None}, "CC", "options.features is none"),
        ("edival", [Turn("x")], None, {}, "IF CC", "no meta.unchanged_objects"),
    ],
)
def test_a_session_without_the_fields_does_not_apply(
    made, name, turns, mode, options, scores, says
):
    found = {pixel_digest(i): {"lamp": [RIGHT]} for i in (BEFORE, AFTER)}
    reward = made(name, found, says=lambda t, i: final("yes") if "final" in t else "yes", **options)
    judged = session(*turns, mode=mode)
    lacks = reward.lacks(judged)
    if says is None:
        assert lacks is None
        return
    assert says in lacks, lacks
    row = one(reward, judged, *[AFTER] * len(turns))
    missing = {key for key, score in row.items() if not score.applies}
    if name == "edit-r2":
        assert missing == set(scores.split())
    assert all(f"{key} does not apply" in lacks for key in scores.split())
    assert not any(score.failed for key, score in row.items() if key in missing)


def test_what_needs_no_detector_is_judged_without_one(judges, dinov3):
    options = EditR2Options(detector=None, features=None, url="http://nowhere", scores=("IF",))
    reward = EditR2(options, asker=Asker(judges.FakeClient("yes"), options))
    assert one(reward, session(turn()), AFTER)["IF"].value == 1
    lacking = one(reward, session(turn("subject_add", ADD)), AFTER)["IF"]
    assert not lacking.applies and "options.detector is none" in lacking.reason


# ----------------------------------------------------------------------------------- others' scores


@pytest.fixture
def asked(judges):
    """A reward that asks alone, with a scripted judge."""

    def make(kind, says, **options):
        chosen = kind.Options(url="http://nowhere", **options)
        client = judges.FakeClient(says)
        reward = kind(chosen, asker=Asker(client, chosen))
        reward.client = client
        return reward

    return make


def points(*values):
    return json.dumps({"reasoning": "because", "score": list(values)})


@pytest.mark.parametrize(
    ("kind", "high"),
    [(viescore.VieScore, 10), (editscore.EditScore, 25), (unifiedreward.UnifiedReward, 25)],
)
def test_the_smaller_of_two_numbers_and_the_root(asked, kind, high):
    def says(text, images):
        return points(0.8 * high, 0.4 * high) if len(images) == 2 else points(0.9 * high, high)

    reward = asked(kind, says, scores=("SC", "PQ", "O"))
    row = one(reward, session(turn()), AFTER)
    assert [row[k].value for k in ("SC", "PQ", "O")] == pytest.approx(
        [0.4, 0.9, math.sqrt(0.4 * 0.9)]
    )
    shown = [[pixel_digest(i) for i in call["images"]] for call in reward.client.asked]
    assert shown == [[pixel_digest(BEFORE), pixel_digest(AFTER)], [pixel_digest(AFTER)]]
    assert f"from 0 to {high}" in reward.client.asked[0]["text"]
    assert "Change the color of cup to red" in reward.client.asked[0]["text"]
    single = asked(kind, says)
    assert single.names == ("O",)
    assert one(single, session(turn()), AFTER)["O"].value == row["O"].value
    assert len(single.client.asked) == 2  # of what O shares with SC and PQ, one call each
    halves = asked(kind, says, scores=("consistency", "prompt_following"))
    row = one(halves, session(turn()), AFTER)
    assert (row["prompt_following"].value, row["consistency"].value) == pytest.approx((0.8, 0.4))
    assert len(halves.client.asked) == 1


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (points(5), "a list of 2"),
        (points(5, 26), "out of range"),
        (points(-1, 5), "out of range"),
        ("I'm sorry", "no JSON"),
        (Failure("503"), "503"),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_points_that_cannot_be_read_are_none(asked, says, why, released):
    def answer(text, images):
        return says if len(images) == 1 else points(20, 20)

    reward = asked(editscore.EditScore, answer, scores=("SC", "PQ", "O"), released=released)
    row = one(reward, session(turn()), AFTER)
    assert row["SC"].value == 0.8
    assert row["PQ"].failed and row["O"].failed and why in row["O"].reason


@pytest.mark.parametrize("given", ["SC,PQ", ["SC", "PQ"]])
def test_scores_are_named_as_a_flag_or_a_file_has_them(given):
    """`--reward.options.scores SC,PQ` comes as one text: whose option it is was not known then."""
    options = {"url": "http://127.0.0.1:9/v1", "scores": given}
    assert load_reward(RewardConfig(name="viescore", options=options)).names == ("SC", "PQ")
    with pytest.raises(ConfigError, match="reward.options.scores: a list of 2 .accepted: a list"):
        load_reward(RewardConfig(name="viescore", options=options | {"scores": "SC,QP"}))


def test_several_passes(asked):
    """O is the mean over all pairs of a pass of each; as released, over the k-th with the k-th."""

    def says(text, images):
        return (
            [points(25, 25), points(0, 25)] if len(images) == 2 else [points(25, 4), points(25, 25)]
        )

    row = one(
        asked(editscore.EditScore, says, votes=2, scores=("SC", "PQ", "O")), session(turn()), AFTER
    )
    assert [row[k].value for k in ("SC", "PQ")] == pytest.approx([0.5, 0.58])
    assert row["O"].value == pytest.approx(
        np.mean([np.sqrt(s * p) for s in (1, 0) for p in (0.16, 1)])
    )
    row = one(asked(editscore.EditScore, says, votes=2, released=True), session(turn()), AFTER)
    assert row["O"].value == pytest.approx((np.sqrt(1 * 0.16) + np.sqrt(0 * 1)) / 2)

    def torn(text, images):
        return [points(25, 25), "?"] if len(images) == 2 else points(25, 4)

    row = one(asked(editscore.EditScore, torn, votes=2), session(turn()), AFTER)
    assert row["O"].value == pytest.approx(0.4)
    row = one(asked(editscore.EditScore, torn, votes=2, released=True), session(turn()), AFTER)
    assert row["O"].failed and "1 and 2 of 2" in row["O"].reason


def tagged(*values):
    names = rational.ASPECTS
    return "Well.\n" + "\n".join(f"<{n}>{v}</{n}>" for n, v in zip(names, values, strict=True))


def headed(*values):
    lines = ["# Thoughts", "1. Nothing here, Score: 9", "# Verdicts"]
    for number, (heading, value) in enumerate(zip(rational.ASPECTS.values(), values), 1):
        lines += [
            f"{number}. {heading}:",
            "## Justification: 4 of 5 are right.",
            f"## Score: {value}",
        ]
    return "\n".join([*lines, "# Summary: a score: 2"])


@pytest.mark.parametrize("form", [tagged, headed])
@pytest.mark.parametrize(
    ("values", "released", "overall"),
    [
        ((4, 4, 4, 4), False, 1.0),
        ((1, 4, 2.5, "N/A"), False, (0 + 1 + 0.5) / 3),
        ((1, 4, 2.5, "N/A"), True, 0.25),
        ((4, 1, 1, 4), True, 2 / 3),
        ((4, 5, 4, 4), False, None),
        ((4, 0, 4, 4), False, None),
        (("N/A", 4, 4, 4), False, None),
        ((4, 4, "good", 4), False, None),
    ],
)
def test_four_aspects(asked, form, values, released, overall):
    names = ("overall", *rational.ASPECTS)
    reward = asked(rational.Rational, form(*values), scores=names, released=released)
    row = one(reward, session(turn()), AFTER)
    if overall is None:
        assert all(score.failed for score in row.values())
        return
    assert row["overall"].value == pytest.approx(overall)
    assert row["text_faithfulness"].value == pytest.approx((values[0] - 1) / 3)
    assert row["text_rendering"].applies == (values[3] != "N/A")


def marks(*values, names=("Request", "Look", "Physical & Detail"), reason="all 3 cups are red"):
    said = "\n".join(f"{name}: {value}" for name, value in zip(names, values))
    return f"Brief reasoning: {reason}\n{said}"


@pytest.mark.parametrize(
    ("says", "value", "why"),
    [
        (marks(5, 4, 3), 0.8, "all 3 cups are red"),
        (marks(1, 1, 1), 0.2, ""),
        (marks(5, 4, 4, reason="colour: 3"), 13 / 15, ""),
        ("**Request**: **4**\n\n- Look: 3/5\n3. Detail: 5.\nAverage: 4.0", 0.8, ""),
        ("<think>A: 1\nB: 1\nC: 1</think>A: 5\nB: 5\nC: 5", 1, ""),
        (marks(5, 4), None, "2 lines of `name: number`"),
        (marks(5, 4, "good"), None, "2 lines of `name: number`"),
        (marks(5, 4, 3, 2, names="abcd"), None, "4 lines of `name: number`"),
        (marks(5, 6, 3), None, "Look: '6.0' is out of range"),
        (marks(5, 0, 3), None, "out of range"),
        (marks(5, 4.5, 3), None, "no whole number"),
        ("I'm sorry", None, "0 lines of `name: number`"),
        (Failure("503"), None, "503"),
    ],
)
def test_three_marks(asked, says, value, why):
    """Their mean over 5, which a benchmark shows times 5."""
    reward = asked(imgedit.ImgEdit, lambda text, images: says)
    score = one(reward, session(turn("adjust")), AFTER)["score"]
    assert score.value == (None if value is None else pytest.approx(value, abs=1e-12))
    assert score.failed == (value is None) and why in (score.reason or "")


@pytest.mark.parametrize("kind", imgedit.TYPES)
def test_a_kind_of_edit_has_its_own_rubric(asked, kind):
    reward = asked(imgedit.ImgEdit, marks(5, 5, 5))
    asking = session(turn(kind), turn(kind, "Do [it]"))
    assert one(reward, asking, AFTER, LATER)["score"].value == 1 and reward.lacks(asking) is None
    (call,) = reward.client.asked
    words = {name: text.strip() for name, text in reward.prompts.texts.items()}
    assert call["text"] == words.pop(kind).replace("{instruction}", "Do it")
    assert len({*words.values()}) == len(words) == len(imgedit.TYPES) - 1
    assert [pixel_digest(i) for i in call["images"]] == [pixel_digest(AFTER), pixel_digest(LATER)]


@pytest.mark.parametrize(("kind", "why"), [("recolour", "'recolour'"), (None, "no kind of edit")])
def test_an_edit_of_another_kind_fails(asked, kind, why):
    reward = asked(imgedit.ImgEdit, marks(5, 5, 5))
    asking = session(turn("add"), turn(kind))
    score = one(reward, asking, AFTER, LATER)["score"]
    assert score.failed and why in score.reason and "add, adjust, extract" in score.reason
    assert reward.lacks(asking).startswith(f"score fails, turn 2: no {'kind' * (kind is None)}")
    assert not reward.client.asked


def test_images_stand_where_a_prompt_has_a_place_for_each():
    assert rational.placed("a <image> b <image>\n", [1, 2]) == ["a ", 1, " b ", 2]
    assert rational.placed("a <image> b", [1, 2]) == [1, 2, "a <image> b"]
    assert rational.placed("a", [1, 2]) == [1, 2, "a"]


@pytest.fixture
def server(beside):
    return beside("judge_server").JudgeServer


@pytest.mark.parametrize(
    ("top", "options", "value"),
    [
        ({"5": 1.0}, {}, 1.0),
        ({"4": 0.5, " 3": 0.25, "0": 0.25}, {}, (4 * 0.5 + 3 * 0.25) / 5),
        ({"Sure": 0.6, "5": 0.4}, {}, None),
        ({"7": 1.0}, {}, None),
    ],
)
def test_the_expectation_over_the_digits(server, top, options, value):
    with server(says=next(iter(top)), top=[top]) as judge:
        reward = load_reward(
            RewardConfig(name="pku", options={"url": judge.url, **options}, retries=0)
        )
        reward.probe()
        ((row,),) = reward.judge([Item(session(turn(requirement="blue")), AFTER[None])])
        score = row["score"]
        assert score.value == (None if value is None else pytest.approx(value))
        assert score.failed == (value is None)
        assert "blue" in json.dumps(judge.chats[-1].body)


def test_the_modes_of_asking(server):
    """MT-EditFlow's: a short answer by its probabilities, or reasons first and the mean of
    votes."""
    for ask, says, value in (("direct", "4", 0.8), ("think", "Hm. <answer>3</answer>", 0.6)):
        with server(says=says, top=[{"4": 1.0}]) as judge:
            reward = load_reward(
                RewardConfig(name="pku", options={"url": judge.url, "ask": ask}, retries=0)
            )
            reward.probe()
            ((row,),) = reward.judge([Item(session(turn()), AFTER[None])])
            assert row["score"].value == pytest.approx(value)
            assert reward.facts["ask"] == ask


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("edit-r2", {}, "url"),
        ("edit-r2", {"url": "http://x", "scores": ["IF", "QA"]}, "of IF, CC, GA"),
        ("edit-r2", {"url": "http://x", "scores": []}, "of IF, CC, GA"),
        ("edival", {"url": "http://x", "scores": ["GA"]}, "of IF, CC"),
        ("edit-r2", {"url": "http://x", "thresholds": {"add": 2}}, "options.thresholds.add"),
        ("edit-r2", {"url": "http://x", "detector": "/nowhere/at/all"}, "no such folder"),
        ("edit-r2", {"url": "http://x", "detector": "editr2.errors:plain"}, "find"),
        ("viescore", {"url": "http://x", "ask": "direct"}, "options.ask"),
        ("editscore", {"url": "http://x", "answers": "logprobs"}, "options.answers"),
        ("rational", {"url": "http://x", "scores": ["SC"]}, "overall"),
        ("pku", {"url": "http://x", "prompts": "/nowhere"}, "score.md"),
        ("imgedit", {"url": "http://x", "ask": "direct"}, "options.ask"),
        ("verifier", {"url": "http://x", "traces": 0}, "options.traces"),
    ],
)
def test_a_wrong_option_is_one_line(name, options, says):
    with pytest.raises(ConfigError) as raised:
        load_reward(RewardConfig(name=name, options=options))
    assert says in str(raised.value) and "\n" not in str(raised.value)


NAMED = [name for name in REWARDS if name not in ("world", "brightness", "pixels", "human")]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_reward_says_what_it_is(name):
    options = {"url": "http://x", "model": "judge-7b"}
    if name in REWARD_OF:
        options |= {"features": None, "detector": None}
    reward = load_reward(RewardConfig(name=name, options=options))
    (member,) = reward.members
    assert member.by_turn and member.concurrency == 16 and member.batch == 1 and not member.recorded
    facts = reward.facts
    assert facts["judge"] == "judge-7b" and "ours (" in facts["prompts"]
    assert "not with published scores" in facts["comparable"]
    other = load_reward(RewardConfig(name=name, options={**options, "model": "judge-32b"}))
    assert other.members[0].given.version != member.given.version


# ------------------------------------------------------------------------------------------ prompts

WAYS = {
    "edit-r2": ("edit-r2", edit_r2.PLACES),
    "edival": ("edival", edival.PLACES),
    "viescore": ("vie", viescore.VieScore.PLACES),
    "editscore": ("vie", editscore.EditScore.PLACES),
    "unifiedreward": ("vie", unifiedreward.UnifiedReward.PLACES),
    "pku": ("pku", pku.PLACES),
    "rational": ("rational", rational.PLACES),
    "imgedit": ("imgedit", imgedit.PLACES),
}


def checkout(places, folder):
    """A checkout whose files have our own words where the project has its prompts."""
    files: dict[str, list[str]] = {}
    texts: dict[str, dict[str, str]] = {}
    for key, place in places.items():
        if place.file.endswith(".json"):
            words = {name: f'words of {name}, {{"a": 1}}: {" ".join(place.fields)}'
                     for name in place.names}  # fmt: skip
            files[place.file] = [json.dumps(texts.setdefault(place.file, {}) | words)]
            texts[place.file] |= words
            continue
        lines = files.setdefault(place.file, ['raise RuntimeError("this was run")'])
        fields = " ".join(place.fields) or "none"
        for name in place.names:
            braces = '{{"a": 1}}' if place.doubled else '{"a": 1}'
            lines.append(f'{name} = """words of {name}, 10 and {braces}: {fields}"""')
        if place.function:
            parts = " ".join("{" + part + "}" for part in place.parts)
            lines.append(f"def {place.function}():")
            lines.append(f'    return f"no {parts}"')
            lines.append(f'    {place.call}(image, f"words of {key}: {parts}")')
    for file, lines in files.items():
        # Of functions of one name, as many as there are prompts in it.
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_the_prompts_of_a_checkout(name, tmp_path):
    """Read where the project has them, without running its code; with our fields."""
    folder, places = WAYS[name]
    given = str(checkout(places, tmp_path / "theirs"))
    theirs = prompts_of(folder, given, places=places, fields=FIELDS)
    ours = prompts_of(folder, None)
    assert theirs.origin == "of the checkout theirs" and "comparable" not in theirs.facts
    assert theirs.digest != ours.digest and set(theirs.texts) == set(ours.texts)
    for key, place in places.items():
        text, tail = theirs(key, **{f: f"<{f}>" for f in (*FIELDS, "requirement")})
        words = " ".join(place.names) or key
        assert all(f"words of {word}" in text for word in words.split()) and tail == ""
        assert all(f"<{ours_}>" in text for ours_ in place.fields.values())
        assert text.count('{"a": 1}') == len(place.names) == text.count("{")
    if name == "imgedit":
        file = prompts_of(folder, f"{given}/Benchmark/Basic/prompts.json", places=places)
        assert (file.texts, file.origin) == (theirs.texts, theirs.origin)
    if name == "editscore":
        assert " 25 and" in theirs.texts["pq"] and " 10 and" not in theirs.texts["pq"]


def test_a_checkout_that_has_its_prompts_elsewhere_is_one_line(tmp_path):
    given = checkout(edival.PLACES, tmp_path / "theirs")
    file = given / edival.PLACES["add"].file
    for text, says in (
        (file.read_text().replace("VLM_TEXT_PROMPT", "OTHER"), "no prompt in VLM_TEXT_PROMPT"),
        ("def (", "invalid syntax"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            prompts_of("edival", str(given), places=edival.PLACES)
    given = checkout(imgedit.PLACES, tmp_path / "others")
    file = given / imgedit.PLACES["add"].file
    for text, says in (
        ('{"add": "x"}', "no prompt in adjust"),
        ('{"add": 3}', "no prompt in add"),
        ("[]", "no prompt in add"),
        ("{", "Expecting property name"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            prompts_of("imgedit", str(given), places=imgedit.PLACES)


def test_prompts_of_ones_own(tmp_path):
    ours = prompts_of("edival", None)
    (tmp_path / "add.md").write_text("Is there a {new}? {answer}\n")
    mine = prompts_of("edival", str(tmp_path))
    assert mine("add", new="{cup}") == ("Is there a {cup}?", None)  # filled in once
    assert mine.origin == "ours, with add replaced" and mine.digest != ours.digest
    assert mine.texts["text"] == ours.texts["text"]
    (tmp_path / "add.md").write_text("Is there a {new}? Say yes or no.\n")
    assert prompts_of("edival", str(tmp_path))("add", new="cup")[1] == ""
    for file, text in (("all.yaml", "add: 'A {new}?'"), ("all.json", '{"add": "A {new}?"}')):
        (tmp_path / file).write_text(text)
        assert prompts_of("edival", str(tmp_path / file)).texts["add"] == "A {new}?"
    (tmp_path / "one.txt").write_text("{instruction}? {answer}")
    assert prompts_of("pku", str(tmp_path / "one.txt")).texts == {
        "score": "{instruction}? {answer}"
    }


@pytest.mark.parametrize(
    ("name", "file", "text", "says"),
    [
        ("edival", "add.md", "Is {nwe} there?", r"\{nwe\} is no field"),
        ("edival", "add.md", "Is it there?", "asks the same of every edit"),
        ("edival", "add.md", "{answer} Is {new} there?", "at the end, once"),
        ("edival", "all.yaml", "ad: x {new}", "'ad'"),
        ("edival", "all.yaml", "add: [1]", "name -> text"),
        ("edival", "all.yaml", "a: b: c", "mapping"),
        ("edival", "one.md", "Is {new} there?", "one text for"),
        ("pku", "nothing.png", "", "name -> text"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_one_line(name, file, text, says, tmp_path):
    (tmp_path / file).write_text(text)
    given = tmp_path if file == "add.md" else tmp_path / file
    with pytest.raises(ConfigError, match=says):
        prompts_of(name, str(given))


def test_other_words_are_another_reward(made, tmp_path):
    (tmp_path / "colour.md").write_text("Is the {object} {colour} now?")
    ours, mine = made(), made(prompts=str(tmp_path))
    assert ours.version != mine.version and ours.facts["prompts"] != mine.facts["prompts"]
    one(mine, session(turn()), AFTER)
    assert mine.client.asked[0]["text"] == "Is the cup red now?"


# ------------------------------------------------------------------------------- from end to end


def test_it_puts_the_right_output_first(judges):
    """Of drawn pairs, two of each kind of edit; scripts/reward_pairs.py has all 200."""
    reward, scenes = judges.on_pairs(18), judges.neighbour("drawn_scenes")
    first = {"IF CC": 0, "all": 0}
    for pair in scenes.pairs(18):
        totals = {}
        for kind, output in pair.outputs.items():
            row = one(reward, pair.session, output.image)
            assert not any(score.failed for score in row.values()), row
            totals[kind] = [row[name].value or 0.0 for name in ("IF", "CC", "GA")]
            if kind == "right":
                assert totals[kind][0] == 1, (pair.task, row)
        right = totals.pop("right")
        first["all"] += all(sum(right) > sum(other) for other in totals.values())
        first["IF CC"] += all(sum(right[:2]) > sum(other[:2]) for other in totals.values())
    assert first["all"] == 18 and first["IF CC"] >= 17, first


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (RewardConfig(name="viescore"), r"reward\.options\.url, url_env: neither"),
        (
            RewardConfig(
                use=(
                    RewardUse(name="pixels"),
                    RewardUse(name="pku", options={"url_env": "NO_SUCH_URL"}),
                )
            ),
            r"reward\.use\[1\]\.options\.url_env: .*NO_SUCH_URL is not set",
        ),
    ],
)
def test_what_a_reward_lacks_is_said_with_its_place(use, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        load_reward(use)
