"""The shapes world: sessions, their meaning, and verifiers that cannot be fooled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editr2.errors import DataError
from editr2.worlds import shapes


def instructions(session):
    return [turn.instruction for turn in session.turns]


def perfect(session):
    return np.stack(
        [shapes.render(s.scene) for s in shapes.meanings(session.image, instructions(session))[1:]]
    )


def test_templates_are_as_far_apart_as_the_tolerance_needs():
    known = shapes.templates()
    distance = np.sqrt(((known[:, None] - known[None]) ** 2).mean(-1))
    np.fill_diagonal(distance, np.inf)
    assert distance.min() >= shapes.MIN_TEMPLATE_DISTANCE > 2 * shapes.TOLERANCE


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.sampled_from(["cm", "cu", "plain"]))
def test_perfect_edits_have_full_marks_and_intents_mean_the_same(seed, index, mode):
    session = shapes.make_session(seed, index, mode=mode)
    assert (shapes.verify(session.image, instructions(session), perfect(session)) == 1).all()
    intended = [session.turns[0].instruction, *(str(t.intent) for t in session.turns[1:])]
    meant = [s.scene for s in shapes.meanings(session.image, intended)]
    assert meant == [s.scene for s in shapes.meanings(session.image, instructions(session))]
    for text in (*intended, *instructions(session)):
        assert len(text.split()) <= 8
        assert shapes.parse_instruction(text).text() == text


def test_modes_say_what_they_promise():
    for i in range(0, 200, 2):
        rules = instructions(shapes.make_session(3, i, mode="cm"))
        assert "always use" in rules[0] and not any("always" in r for r in rules[1:])
        pronouns = instructions(shapes.make_session(3, i, mode="cu"))
        assert " it" in pronouns[1] and " it" not in pronouns[0]


def test_same_seed_same_session_and_another_seed_another():
    a, b, c = (shapes.make_session(*key) for key in ((1, 5), (1, 5), (2, 5)))
    assert (a.image == b.image).all() and instructions(a) == instructions(b)
    assert not (a.image == c.image).all() or instructions(a) != instructions(c)


def test_splits_share_no_source_scene():
    seen = {
        split: {
            shapes.parse_scene(shapes.make_session(0, i, split=split).image) for i in range(300)
        }
        for split in ("train", "heldout")
    }
    assert len(seen["train"]) > 200 and not seen["train"] & seen["heldout"]
    assert all(s.heldout for s in seen["heldout"]) and not any(s.heldout for s in seen["train"])


def test_standing_rule_is_held_against_the_third_turn():
    source = shapes.Scene("black", (("square", "blue"), None, *[None] * 7))
    texts = [
        "add a ring top right always use red",
        "move the square top left to top center",
        "add a cross bottom left",
    ]
    images = [s.scene for s in shapes.meanings(shapes.render(source), texts)[1:]]
    assert images[2].cells[6] == ("cross", "red")
    wrong = [*images[:2], images[2].put(6, ("cross", "blue"))]
    scores = shapes.verify(
        shapes.render(source), texts, np.stack([shapes.render(s) for s in wrong])
    )
    assert scores[:, 2].tolist() == [1, 1, 0] and scores[2, 0] == 0 and scores[2, 1] == 1


def test_an_early_mistake_fails_every_later_turn_in_ga():
    session = next(
        s for s in (shapes.make_session(9, i) for i in range(50)) if s.turns[0].task == "paint"
    )
    images = perfect(session)
    images[0] = session.image
    scores = shapes.verify(session.image, instructions(session), images)
    assert scores[:, 2].tolist() == [0, 0, 0] and scores[0, 0] == 0


def test_cc_counts_damage_to_cells_that_no_instruction_named():
    source = shapes.Scene("white", (("square", "blue"), ("ring", "red"), *[None] * 7))
    text = ["remove the square top left"]
    after = source.put(0, None).put(1, None)
    scores = shapes.verify(shapes.render(source), text, shapes.render(after)[None])
    assert scores[0].tolist() == [1.0, pytest.approx(7 / 8), 0.0]


def test_cc_after_a_background_edit_compares_objects_alone():
    source = shapes.Scene("white", (("square", "blue"), ("ring", "red"), *[None] * 7))
    right = shapes.render(shapes.Scene("black", source.cells))
    unchanged, lost = (
        shapes.render(source),
        shapes.render(shapes.Scene("black", source.put(0, None).cells)),
    )
    text = ["set the background black"]
    assert shapes.verify(unchanged, text, right[None])[0].tolist() == [1, 1, 1]
    assert shapes.verify(unchanged, text, unchanged[None])[0].tolist() == [0, 1, 0]
    assert shapes.verify(unchanged, text, lost[None])[0].tolist() == [pytest.approx(8 / 9), 0.5, 0]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 56), st.integers(0, 56), st.floats(0.0, 1.0))
def test_no_blend_of_two_templates_passes_for_both_and_halfway_for_none(i, j, weight):
    known = shapes.templates()
    cell = lambda values: np.tile(values.reshape(shapes.CELL, shapes.CELL, 3), (3, 3, 1))  # noqa: E731
    blend = np.round(255 * cell((1 - weight) * known[i] + weight * known[j])).astype(np.uint8)
    found = set(shapes.parse_cells(blend[None])[0].tolist())
    assert len(found) == 1
    if i == j:
        assert found == {i}
    elif abs(weight - 0.5) < 0.01:
        assert not found & {i, j}


@pytest.mark.parametrize("sigma, passes", [(1, True), (20, True), (45, False)])
def test_noise_within_the_tolerance_passes_and_beyond_fails(sigma, passes):
    session = shapes.make_session(0, 1)
    noise = np.random.default_rng(0).normal(0, sigma, session.image.shape)
    gray = shapes.render(
        shapes.Scene("gray", (None,) * 9)
    )  # mid-gray, so that clipping hides no noise
    noisy = np.clip(gray + noise, 0, 255).astype(np.uint8)
    assert bool((shapes.parse_cells(noisy[None]) != shapes.UNKNOWN).all()) == passes


@pytest.mark.parametrize(
    "text, problem",
    [
        ("paint it", "expected a colour"),
        ("add red square top left", "expected 'a'"),
        ("add a red square top", "expected a column"),
        ("remove the ring top left now", "unexpected word 'now' at word 6"),
        ("dance", "expected add, remove"),
        ("", "got the end"),
    ],
)
def test_a_sentence_without_meaning_is_refused_with_its_place(text, problem):
    with pytest.raises(DataError, match=problem):
        shapes.parse_instruction(text)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("remove it", "refers to nothing"),
        ("remove the ring top left", "there is no ring top left"),
        ("add a ring top center", "no standing rule"),
        ("add a red ring top left", "not empty"),
        ("move the square top left to top left", "target cell is not empty"),
    ],
)
def test_an_instruction_that_cannot_be_done_is_refused(text, problem):
    state = shapes.Meaning(shapes.Scene("gray", (("square", "red"), *[None] * 8)))
    with pytest.raises(DataError, match=problem):
        shapes.execute(state, shapes.parse_instruction(text))


def test_an_image_that_is_not_of_the_world_gets_no_score_but_a_reason():
    from editr2.rewards.world import WorldReward
    from editr2.sessions import Session, Turn

    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    session = Session("x", noise, (Turn("set the background black"),))
    (scores,) = WorldReward()(session, noise[None])
    assert all(s.value is None and "cell top left" in str(s.reason) for s in scores.values())
    assert not any("reward.name" in str(s.reason) for s in scores.values())


def test_a_picture_of_another_size_is_told_to_name_another_reward():
    from editr2.rewards.world import WorldReward
    from editr2.sessions import Session, Turn

    photo = np.zeros((32, 32, 3), np.uint8)
    (scores,) = WorldReward()(Session("x", photo, (Turn("make it blue"),)), photo[None])
    assert all(s.value is None and "(reward.name)" in str(s.reason) for s in scores.values())
