"""The reward `pixels`: that it puts the right output first, what it says nothing about, and what
does not get past it."""

from __future__ import annotations

import dataclasses
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from editr2.config import Config, RewardConfig, replace_nested
from editr2.errors import ConfigError
from editr2.rewards import text
from editr2.rewards.base import Item
from editr2.rewards.changes import Change, Picture, grown, mean_around, most_around
from editr2.rewards.colours import COLOURS, colour_of, oklab
from editr2.rewards.geometry import TASKS, Box
from editr2.rewards.load import load_reward
from editr2.rewards.pixels import MATERIALS, RULES, Pixels, bracketed, edit_of
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn, load_sessions
from editr2.training import train

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "editr2" / "recipes" / "photos"


@pytest.fixture(scope="module")
def scripts():
    """scripts/reward_pairs.py, which brings tests/drawn_scenes.py."""
    spec = spec_from_file_location("reward_pairs", ROOT / "scripts" / "reward_pairs.py")
    module = module_from_spec(spec)
    sys.modules["reward_pairs"] = module
    spec.loader.exec_module(module)
    yield module
    for name in ("reward_pairs", "drawn_scenes"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(scripts):
    return scripts.drawn_scenes()


class Reads:
    """A reader that reads what it is told to."""

    def __init__(self, *texts):
        self.texts = texts

    def read(self, image, box=None):
        return [text.Line(one, Box(0, 0, 1, 1), 1.0) for one in self.texts]


def judged(session, *images, reward=None):
    """The row of the last of these turns."""
    items = [Item(session, np.stack(images), (len(images) - 1,))]
    return (reward or Pixels(Reads())).judge(items)[0][0]


# ------------------------------------------------------------------------------------------ ranking


def first(scripts, pairs, reward):
    said = scripts.judge_pairs(reward, pairs)
    ranked = [one for one in said if one.applies()]
    print(scripts.confusion(said))
    return ranked, sum(one.first() for one in ranked) / len(ranked)


@pytest.mark.slow
def test_right_is_first_of_every_task_that_can_be_seen(scripts, scenes):
    pairs = [p for p in map(scenes.pair, range(27)) if p.task != "text_change"]
    ranked, share = first(scripts, pairs, Pixels(Reads()))
    assert len(ranked) == 21 and {one.task for one in ranked} == {*TASKS} - {
        "count_change",
        "text_change",
    }
    assert share >= 0.95
    for one in ranked:
        assert one.rows["untouched"]["IF"].value == 0  # whatever noise an autoencoder leaves
        right, ruined = (one.rows[kind]["CC"].value for kind in ("right", "ruined background"))
        assert right > 0.9 > ruined or one.task == "background_change"
        assert right > ruined + 0.2


@pytest.mark.slow
def test_text_is_read_where_it_was_to_change(scripts, scenes):
    pytest.importorskip("rapidocr")
    pairs = [scenes.pair(index) for index in (5, 14, 23)]
    ranked, share = first(scripts, pairs, Pixels())
    assert len(ranked) == 3 and share == 1


@pytest.mark.exhaustive
def test_right_is_first_in_95_of_100_of_all_pairs(scripts, scenes):
    pytest.importorskip("rapidocr")
    ranked, share = first(scripts, scenes.pairs(200), Pixels())
    assert len(ranked) == 178 and share >= 0.97


@pytest.mark.slow
def test_it_agrees_with_the_exact_verifiers_of_the_world(scripts):
    found = scripts.world_agreement(Pixels(Reads()), 4)
    print(scripts.agreement(found))
    for name, least in (("IF", 0.85), ("CC", 0.95)):
        exact = [value > 0.5 for _, value, _ in found[name]]
        assert scripts.area_under_curve(exact, [score for *_, score in found[name]]) > least


def test_area_and_correlation(scripts):
    assert scripts.area_under_curve([True, False, False], [0.5, 0.1, 0.5]) == 0.75
    assert scripts.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert scripts.rank_correlation([1, 2, 2], [2, 1, 1]) == pytest.approx(-1)


# -------------------------------------------------------------------------------------------- hacks


def blurred(image, radius=5):
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def painted(image, box, colour):
    height, width = image.shape[:2]
    left, top, right, bottom = Box.of(box).pixels(height, width)
    image = image.copy()
    image[top:bottom, left:right] = colour
    return image


WHOLE = {  # of a pair's source, float32, the colour asked for, and the object's box
    "copy": lambda x, colour, box: x,
    "brighter": lambda x, colour, box: x * 1.25,
    "more contrast": lambda x, colour, box: (x - 128) * 1.5 + 128,
    "noise": lambda x, colour, box: x + np.random.default_rng(0).normal(0, 35, x.shape),
    "all of the colour": lambda x, colour, box: 0 * x + colour,
    "a patch elsewhere": lambda x, colour, box: painted(x, (0.01, 0.01, 0.12, 0.12), colour),
    "a patch on the object": lambda x, colour, box: painted(x, box, colour),
}


@pytest.fixture(scope="module")
def recoloured(scenes):
    """Six pairs of a new colour: (index, pair, colour, box of the object, IF of the right
    output)."""
    found = []
    for index in (3, 12, 21, 30, 39, 48):
        pair = scenes.pair(index)
        (turn,) = pair.session.turns
        words = turn.instruction.strip(".").split()
        right = judged(pair.session, pair.outputs["right"].image)["IF"].value
        box = turn.meta["boxes"][words[2]]
        found.append((index, pair, np.float32(scenes.COLOURS[words[-1]]), box, right))
    return found


@pytest.mark.parametrize("hack", WHOLE)
def test_a_score_is_not_to_be_had_without_the_edit(scenes, recoloured, hack):
    following = []
    for index, pair, colour, box, right in recoloured:
        image = WHOLE[hack](pair.session.image.astype(np.float32), colour, box)
        image = scenes.encoded_again(np.clip(image, 0, 255).round().astype(np.uint8), index)
        following.append(judged(pair.session, image)["IF"].value)
        assert following[-1] <= 0.3 < right
    assert np.mean(following) < 0.05


def test_a_tone_of_the_whole_costs_consistency_and_is_no_new_background(scenes):
    pair = scenes.pair(8)
    source = pair.session.image.astype(np.float32)
    for image in (source * 0.7, source * 0.7 + (60, 0, 0), blurred(source, 8)):
        image = np.clip(image, 0, 255).round().astype(np.uint8)
        row = judged(pair.session, image)
        assert row["IF"].value < 0.1 and row["CC"].value < 0.5
    pair = scenes.pair(3)
    for right in (False, True):  # beside the right edit, too
        image = pair.outputs["right"].image if right else pair.session.image
        tinted = np.clip(image.astype(int) + (40, 10, -20), 0, 255).astype(np.uint8)
        assert judged(pair.session, tinted)["CC"].value < 0.5


# ------------------------------------------------------------------------------- what it cannot see


def without(session, *names, **turn):
    turns = tuple(
        dataclasses.replace(one, meta={k: v for k, v in one.meta.items() if k not in names}, **turn)
        for one in session.turns
    )
    return dataclasses.replace(session, image=session.image, turns=turns)


def test_what_does_not_apply_says_why(scenes):
    count, moved, new = (scenes.pair(i) for i in (7, 6, 8))
    row = judged(count.session, count.outputs["right"].image)
    assert not row["IF"].applies and "how many" in row["IF"].reason and row["CC"].value > 0
    bare = without(moved.session, "boxes")
    assert "meta.boxes" in judged(bare, moved.outputs["right"].image)["IF"].reason
    bare = without(new.session, "boxes")
    row = judged(bare, new.outputs["right"].image)
    assert row["IF"].value > 0.5 and not row["CC"].applies and "meta.boxes" in row["CC"].reason
    glass = Turn("Make the ball of glass", task="material_alter")
    session = dataclasses.replace(count.session, image=count.session.image, turns=(glass,))
    row = judged(session, count.outputs["right"].image)
    assert not row["IF"].applies and "no colour of its own" in row["IF"].reason
    free = dataclasses.replace(
        count.session, image=count.session.image, turns=(Turn("make it look like 1920"),)
    )
    row = judged(free, count.outputs["untouched"].image)
    assert not row["IF"].applies and "of no form" in row["IF"].reason and row["CC"].value > 0.9


def test_a_plain_instruction_is_read_and_a_name_with_a_colour_helps(scenes):
    pair = scenes.pair(12)  # a tree, without brackets or boxes
    session = without(pair.session, "boxes", "formatted_instruction", task=None)
    assert judged(session, pair.outputs["right"].image)["IF"].value > 0.9
    assert judged(session, pair.outputs["wrong object"].image)["IF"].value > 0.9  # is not seen
    named = without(session, instruction="Make the black tree purple.")
    assert judged(named, pair.outputs["right"].image)["IF"].value > 0.9
    assert judged(named, pair.outputs["wrong object"].image)["IF"].value < 0.3


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ("Make the red car dark blue.", "change the color of [red car] to [dark blue]"),
        ("change the material of the cup to gold", "change the material of [cup] to [gold]"),
        ("make the ball out of wood", "change the material of [ball] to [wood]"),
        ("turn the cat into a red dog", "replace [cat] with [red dog]"),
        ("Add a red hat on the left of the dog", "add [red hat] left [dog]"),
        ("Move the ball to the right of the tree", "move [ball] right [tree]"),
        ("Remove the dog from the picture, please", "remove [dog]"),
        ("set the background to a beach; keep the rest", "change the background to [beach]"),
        ('Replace "A" on the sign with "B".', "replace the text '[A]' on [sign] with '[B]'"),
        ("Make the sky look dramatic", None),
        ("Move the ball to the left", None),
    ],
)
def test_plain_words(words, form):
    assert bracketed(words) == form
    edit, why = edit_of(Turn(words))
    assert (edit is None) == (form is None) and bool(why) == (edit is None)


def test_text_is_held_against_what_is_read_and_not_guessed_without_a_reader(scenes, monkeypatch):
    pair = scenes.pair(5)
    session, image = pair.session, pair.outputs["right"].image
    new, old = "EXIT", "PARK"
    rows = [judged(session, image, reward=Pixels(Reads(*said))) for said in ([new], [old], [])]
    assert rows[0]["IF"].value > 0.9 and rows[1]["IF"].value == rows[2]["IF"].value == 0
    both = judged(session, image, reward=Pixels(Reads(new, old)))
    assert both["IF"].value == 0  # the old one is still there
    untouched = judged(session, pair.outputs["untouched"].image, reward=Pixels(Reads(new)))
    assert untouched["IF"].value == 0

    def missing(self):
        raise ConfigError("reading text: no RapidOCR here")

    class Broken(Reads):
        def read(self, image, box=None):
            raise text.ReaderError("reading text: it broke")

    assert judged(session, image, reward=Pixels(Broken()))["IF"].failed
    monkeypatch.setattr(text.Reader, "load", missing)
    without_ocr = Pixels()
    assert any("text_change" in line and "RapidOCR" in line for line in without_ocr.probe())
    row = judged(session, image, reward=without_ocr)
    assert not row["IF"].applies and "RapidOCR" in row["IF"].reason and row["CC"].value > 0.9


def test_boxes_that_are_none_are_said(scenes):
    pair = scenes.pair(3)
    session = without(pair.session, "boxes")
    session = dataclasses.replace(session, image=session.image, meta={"boxes": {"lamp": [0, 1]}})
    with pytest.raises(ConfigError, match=r"meta\.boxes: .*accepted"):
        judged(session, pair.session.image)


# ----------------------------------------------------------------------------------------- the rest


def test_tables_are_whole():
    assert tuple(sorted(RULES)) == tuple(sorted(TASKS))
    assert set(MATERIALS.values()) <= set(COLOURS)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 30, 30), "red"),
        ((90, 20, 20), "red"),
        ((250, 140, 30), "orange"),
        ((245, 220, 60), "yellow"),
        ((40, 140, 60), "green"),
        ((30, 80, 200), "blue"),
        ((120, 50, 160), "purple"),
        ((245, 150, 180), "pink"),
        ((110, 70, 40), "brown"),
        ((240, 240, 240), "white"),
        ((128, 128, 128), "grey"),
        ((20, 20, 20), "black"),
    ],
)
def test_colours_are_called_what_they_are(rgb, name):
    lab = oklab(np.array([[rgb]], np.uint8))
    basic = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
    basic += ("white", "grey", "black")
    found = {one for one in basic if COLOURS[one].distance(lab)[0, 0] < 0.01}
    assert found == {name}


def test_shades():
    light, dark = colour_of("a light blue cup"), colour_of("dark blue")
    assert light.lightness[0] > 0.6 and dark.lightness[1] < 0.56
    assert colour_of("dramatic") is None and colour_of("red car", alone=True) is None


def test_neighbourhoods():
    rng = np.random.default_rng(0)
    mask, values = rng.random((40, 31)) > 0.99, rng.random((20, 31)).astype(np.float32)
    for radius in (1, 4, 6, 13):
        expected = np.zeros_like(mask)
        for y, x in np.argwhere(mask):
            expected[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = 1
        assert np.array_equal(grown(mask, radius), expected)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(values, 2, mode="edge"), (5, 5))
    assert np.allclose(mean_around(values, 2), around.mean((2, 3)), atol=1e-5)
    assert np.array_equal(most_around(values, 2), around.max((2, 3)))


def test_any_size_and_twice_the_same(scenes):
    rng = np.random.default_rng(0)
    turn = Turn("make the car red")
    for size in ((24, 24), (9, 200), (512, 640)):
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        other = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)  # and of another than the source
        session = Session("any", image, (turn, turn))
        items = [Item(session, np.stack([other, other]))]
        rows = Pixels(Reads()).judge(items)[0]
        assert rows == Pixels(Reads()).judge(items)[0]
        assert rows[1] == judged(session, other, other)  # a turn alone is what it is among others
        assert rows[1]["IF"].value == 0
    change = Change.between(Picture.of(image), Picture.of(image))
    assert change.mass == 0 and not change.parts and change.damage.max() == 0


FORMS = (
    "add [red cup] left [ball]",
    "remove [ball]",
    "replace [ball] with [red cup]",
    "change the color of [ball] to [red]",
    "change the material of [ball] to [gold]",
    "replace the text '[A]' on [ball] with '[B]'",
    "move [ball] left [cup]",
    "change the count of [ball] to [2]",
    "change the background to [beach]",
    "change the background to [blue]",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error")
def test_nothing_gives_no_number(form):
    """Images without a change, without anything in them or of nothing else, and boxes of no use."""
    rng = np.random.default_rng(0)
    flat = np.full((64, 64, 3), 90, np.uint8)
    noise = rng.integers(0, 256, flat.shape).astype(np.uint8)
    red = np.full((64, 64, 3), (220, 20, 20), np.uint8)
    boxes = ({}, {"ball": [0, 0, 1, 1]}, {"ball": [0.5, 0.5, 0.5, 0.5], "cup": [0, 0, 0, 0]})
    boxes += ({"ball": [0.1, 0.1, 0.4, 0.4], "cup": [0.6, 0.6, 0.9, 0.9]},)
    for source in (flat, noise):
        for output in (flat, noise, red):
            for known in boxes:
                turn = Turn("edit", meta={"formatted_instruction": form, "boxes": known})
                row = judged(Session("s", source, (turn,)), output)
                for score in row.values():
                    assert not score.failed
                if output is source and row["IF"].applies:
                    assert row["IF"].value == 0


def test_the_examples_are_what_their_code_draws(scenes):
    sessions = list(load_sessions(EXAMPLES))
    drawn = scenes.example_sessions()
    assert len(sessions) == len(drawn) == 8
    assert sum(f.stat().st_size for f in EXAMPLES.rglob("*") if f.is_file()) < 1_000_000
    reward = Pixels(Reads("EXIT"))
    for session, (source, outputs) in zip(sessions, drawn, strict=True):
        assert session.id == source.id and len(session.turns) == 3
        assert session.image.shape == source.image.shape
        assert np.abs(session.image.astype(int) - source.image).mean() < 6  # as JPEG left it
        for turn, other in zip(session.turns, source.turns, strict=True):
            assert (turn.instruction, turn.task, dict(turn.meta)) == (
                other.instruction,
                other.task,
                dict(other.meta),
            )
        images = [scenes.encoded_again(o.image, i) for i, o in enumerate(outputs)]
        rows = reward.judge([Item(session, np.stack(images))])[0]
        assert np.mean([row["IF"].value for row in rows]) > 0.7
        still = reward.judge([Item(session, np.stack([session.image] * 3))])[0]
        assert all(row["IF"].value == 0 for row in still)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("model, loss", [("kontext", "grpo"), ("qwen-edit", "nft")])
def test_a_run_of_three_turns_without_a_server(beside, tmp_path, model, loss):
    weights = tmp_path / "weights"
    if model == "kontext":
        beside("tiny_editors").kontext_pipeline(seed=0).save_pretrained(weights)
    else:
        beside("tiny_qwen").save_pipeline(beside("tiny_qwen").qwen_pipeline(), weights)
    nft = loss == "nft"
    values = {
        "out": str(tmp_path / "run"),
        "data": {"path": str(EXAMPLES), "resize": "crop"},
        "policy": {
            "model": model,
            "weights": str(weights),
            "resolution": (32, 32),
            "lora_rank": 4,
        },
        "reward": {"name": "pixels"},
        "rollout": {
            "sessions": 2,
            "siblings": 3,
            "steps": 3,
            "window": 0 if nft else 1,
            "shared_noise": not nft,
        },
        "credit": {"preset": "flow-grpo", "weights": {"IF": 0.5, "CC": 0.5}},
        "train": {"iterations": 1, "lr": 1e-2, "lr_decay": 1.0, "ema": None, "loss": loss},
        "eval": {"sessions": 0, "strips": 0},
    }
    run = train(replace_nested(Config(), values))
    rows = read_metrics(run / "metrics.jsonl")[0]
    (row,) = [row for row in rows if row["event"] == "train"]
    assert row["failed_scores"] == 0 and row["grad_norm"] > 0
    assert (run / "report.html").is_file()


def test_it_has_a_name():
    panel = load_reward(RewardConfig(name="pixels"))
    assert panel.names == ("IF", "CC") and panel.members[0].by_turn
    assert any("count_change" in line for line in panel.probe())
