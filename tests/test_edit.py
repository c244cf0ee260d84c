"""A session's further images from the file to the editor, and `editr2.edit`: any policy at work on
an image, as the rollout of its run edits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import editr2
from editr2.benchmarks.sized import sized
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import ConfigError, DataError, UserError
from editr2.export.export import export
from editr2.export.model_card import _intents
from editr2.policies.configured import policy_class
from editr2.policies.load import load_policy
from editr2.policies.weights import trainable
from editr2.rewards.panel import _apart
from editr2.rewards.record import pixel_digest
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.rl.sessions import demands
from editr2.rl.state import new_state
from editr2.run.identity import sessions_fingerprint
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn, load_sessions, save_sessions, validate
from editr2.worlds.shapes import make_session

SIZE = (32, 48)


@pytest.fixture
def kontext(beside, tmp_path):
    pipe = beside("tiny_editors").kontext_pipeline()
    pipe.save_pretrained(tmp_path / "kontext")
    return {"model": "kontext", "weights": str(tmp_path / "kontext"), "resolution": SIZE}


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def session(name, references=(), turns=2, seed=0):
    said = tuple(map(Turn, ("make it red", "darker", "and red")[:turns]))
    return Session(name, pictures(1, seed=seed)[0], said, references=tuple(references))


# ---------------------------------------------------------------------------- references in a file


def test_references_come_back_as_they_were_saved(tmp_path):
    a, b, wide = *pictures(2, seed=1), pictures(1, (64, 32), seed=2)[0]
    twice = session("twice", (a, a))
    file = save_sessions([twice, session("one", (wide,)), session("none")], tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines[0]["references"]) == 2 and "references" not in lines[2]
    for memory in (0, 3 * SIZE[0] * SIZE[1], 1 << 30):
        found = load_sessions(file, size=(SIZE, (64, 32)), resize="crop", memory=memory)
        assert [len(s.references) for s in found] == [2, 1, 0]
        assert all(np.array_equal(image, a) for image in found[0].reference_pixels())
        assert found[1].reference_pixels()[0].shape == (*SIZE, 3)  # its session's, not the nearest
        assert memory == 1 << 30 or callable(found[0].references[1])
        prints = {sessions_fingerprint(found[:1])}
    in_files = load_sessions(file, memory=0)
    for memory in (0, 1 << 30):  # as a benchmark brings them to its editor's
        _, one, _ = sized(in_files, (SIZE, (64, 32)), "crop", memory=memory)
        assert one.reference_pixels()[0].shape == one.image.shape == (*SIZE, 3)
    _apart(twice).reference_pixels()[0][:] = 0  # a judge may write into what it gets
    assert np.array_equal(twice.references[0], pictures(2, seed=1)[0])
    (own,) = load_sessions(file)[1].reference_pixels()
    assert np.array_equal(own, wide)
    prints |= {sessions_fingerprint([replace(twice, references=r)]) for r in ((a, b), (a,), ())}
    assert len(prints) == 4


def test_what_is_wrong_with_references_is_said_with_the_line(tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures(1, (9, 9))[0]).save(tmp_path / "small.png")
    given = ("a.png", [3], [" "], ["gone.png"], ["a.png", "small.png"], ["a.png"], None, [])
    turns = [{"instruction": "darker"}]
    lines = [{"image": "a.png", "turns": turns, "references": each} for each in given]
    file = tmp_path / "sessions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = [line.removeprefix(str(file)) for line in validate(file, size=SIZE)]
    path = "(accepted: the path of an image, relative to this file)"
    assert found[:4] == [
        ":1: references: the string 'a.png' (accepted: a list of images, or absent)",
        f":2: references[0]: the number 3 {path}",
        f":3: references[0]: blank string {path}",
        f":4: references[0]: {tmp_path / 'gone.png'}: no such file",
    ]
    assert found[4].startswith(f":5: references[1]: {tmp_path / 'small.png'}: 9×9 pixels")
    assert len(found) == 5
    for wrong in ([pictures(1)[0]], (pictures(1)[0].astype(float),), ("a.png",)):
        with pytest.raises(DataError, match=r"Session 's': references.*\(accepted: a"):
            session("s", ()) and Session("s", pictures(1)[0], (Turn("red"),), references=wrong)


def test_an_editor_that_reads_no_others_refuses_them_by_name(tmp_path, tiny_unified):
    scene = make_session(0, 0)
    save_sessions([scene, replace(scene, id="b", references=(scene.image,))], tmp_path)
    how = demands(Config(), tiny_unified)
    line = f"{tmp_path / 'sessions.jsonl'}:2: references: of session 'b': 1 images beside the "
    line += "session's (accepted with policy.model unified: none)"
    assert validate(tmp_path, **how) == [line]
    tiny_unified.most_references = None  # as of BAGEL
    assert validate(tmp_path, **demands(Config(), tiny_unified)) == []


# -------------------------------------------------------------------------- references in a rollout


def test_sessions_with_references_are_edited_as_if_each_were_alone(kontext):
    policy = load_policy(PolicyConfig(**kontext), trains=False)
    a, b = pictures(2, seed=1)
    mixed = [session("0", (a,)), session("1"), session("2", (b,)), session("3", (a, b))]
    sampler = make_sampler(2, own=policy.sigmas)

    def edited(sessions, ordinals):
        found = {}
        for chunk in chunks(sessions, ordinals, 1, 4):
            rollout_chunk(policy, chunk, sampler, Seeds(0, "t"), policy.config)
            found |= {s.id: chunk.images_of(i) for i, s in enumerate(chunk.sessions)}
        return found

    assert [len(c.sessions) for c in chunks(mixed, range(4), 1, 4)] == [2, 1, 1]
    together = edited(mixed, range(4))
    for ordinal in (1, 2, 3):
        alone = edited(mixed[ordinal : ordinal + 1], [ordinal])[str(ordinal)]
        assert np.abs(alone.astype(int) - together[str(ordinal)]).max() <= 1
    without = edited([replace(mixed[3], references=())], [3])["3"]
    assert (without != together["3"]).any((1, 2, 3)).all()


def test_check_counts_them(kontext):
    made = policy_class("kontext").blueprint(PolicyConfig(**kontext))
    assert made.work("encode", 4, 0, False)[0].times == 4
    made.see([session("0"), session("1", pictures(2))])
    assert made.work("encode", 4, 0, False)[0].times == 12
    assert made.work("encode", 4, 1, False)[0].times == 4  # of later turns, the output alone
    assert len(made.context(made.policy, 1, 1).conditions) == 3


def test_a_run_replays_them(kontext, tmp_path, beside):
    """The first update's ratio is 1, which it is not where training leaves one out."""
    a, b = pictures(2, seed=1)
    save_sessions([session("0", (a, b)), session("1"), session("2", (b,))], tmp_path / "data")
    config = replace_nested(
        Config(),
        {
            "out": str(tmp_path / "run"),
            "data": {"path": str(tmp_path / "data")},
            "reward": {"function": "editr2.rewards.brightness:Brightness"},
            "policy": {**kontext, "lora_rank": 2, "text_tokens": 48},
            "rollout": {"sessions": 3, "siblings": 2, "steps": 3, "window": 1},
            "train": {"iterations": 1, "lr": 1e-3},
            "eval": {"sessions": 0, "strips": 0},
            "credit": {"preset": "flow-grpo", "weights": {"brightness": 1.0}},
        },
    )
    run = editr2.train(config)
    (row,) = [row for row in read_metrics(run / "metrics.jsonl")[0] if row["event"] == "train"]
    assert row["ratio_error"] <= 1e-4 and row["grad_norm"] > 0


# --------------------------------------------------------------------------------------- the editor


@pytest.fixture
def run(tiny_unified, tmp_path):
    """A run of the unified policy with adapters, as the trainer leaves it, and a session."""
    tiny_unified.save(tmp_path / "base")
    policy = {"weights": str(tmp_path / "base"), "lora_rank": 2, "intent_tokens": 2}
    sampler = {"steps": 4, "window": 1, "store_dtype": "bfloat16"}
    values = {"policy": policy, "rollout": sampler, "train": {"iterations": 1}}
    config = replace_nested(Config(), {**values, "eval": {"intent_tokens": 9}})
    trained = load_policy(config.policy)
    state = new_state(config.train, trained)
    for values in (state.ema, trainable(trained.module)):
        for value in values.values():
            value.data += 0.05 * torch.randn(value.shape)
    state.iteration = 1
    folder = tmp_path / "run"
    state.save(folder / "checkpoints", config)
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "metrics.jsonl").touch()
    scene = make_session(20_001, 0, split="heldout", turns=3)
    return folder, scene


def told(scene):
    return [turn.instruction for turn in scene.turns]


def test_three_lines_edit_as_the_runs_rollout_does(run, tmp_path, monkeypatch):
    """Those of an export's README, which also says what its weights alone lose."""
    folder, scene = run
    monkeypatch.chdir(tmp_path)
    export(folder, Path("out"))
    page = Path("out/README.md").read_text()
    assert "## What the weights alone do not do" in page and "at most 9 tokens" in page
    (lines,) = [block for block in page.split("```") if "import editr2\n" in block]
    Image.fromarray(scene.image).save("image.png")
    said = lines.removeprefix("python\n").replace('["one edit", "the next"]', repr(told(scene)))
    assert len([line for line in said.splitlines() if line]) == 3
    names = {}
    exec(said, names)
    save_sessions([replace(scene, mode=None)], "data")
    flags = ["--policy", "out", "--data.path", "data", "--out", "edited"]
    assert main(["rollout", *flags]) == 0
    (written,) = map(json.loads, Path("edited/outputs.jsonl").read_text().splitlines())
    for step, turn in zip(names["steps"], written["turns"], strict=True):
        pixels = np.asarray(Image.open(Path("edited") / turn["image"]))
        assert np.array_equal(step.pixels, pixels)
        assert (step.instruction, step.intent) == (turn["instruction"], turn["intent"])
    assert np.array_equal(np.asarray(Image.open("edited.png")), names["steps"][-1].pixels)
    for quiet in ({"intent": False}, {"model": "kontext"}):
        assert not _intents(replace_nested(Config(), {"policy": quiet}))


def test_a_step_is_a_place_to_go_on_from(tiny_unified):
    scene = make_session(20_001, 1, split="heldout", turns=3)
    first, second, third = told(scene)
    with pytest.raises(ConfigError, match="policy.guidance: given beside a policy that is loaded"):
        editr2.Editor(tiny_unified, {"policy": {"guidance": 4.0}})
    editor = editr2.Editor(tiny_unified, {"rollout": {"steps": 4}, "policy": {"intent_tokens": 9}})
    expected = editor.edit(scene.image, told(scene), mode=scene.mode)
    start = editor.start(scene.image, mode=scene.mode)
    assert start.turn == 0 and np.array_equal(start.pixels, scene.image)
    one = start.edit(first)
    with pytest.raises(DataError, match=r"instructions\[1\]: .*zebra.* \(accepted: words of the"):
        one.edit("add a zebra")
    other = one.edit(third)  # and back
    two = one.edit(second)
    three = two.edit(third)
    for step, turn in zip((one, two, three), expected, strict=True):
        assert np.array_equal(step.pixels, turn.pixels) and step.intent == turn.intent
        assert step.reasoning == turn.reasoning and step.turn == turn.turn
    assert two.reasoning is not None and one.reasoning is None and other.turn == 2
    assert not np.array_equal(other.pixels, two.pixels)
    again, elsewhere = (editor.edit(scene.image, first, seed=s)[0].pixels for s in (0, 1))
    assert np.array_equal(again, one.pixels) and not np.array_equal(elsewhere, one.pixels)


def test_images_of_every_form_are_brought_to_the_policys_size(kontext, tmp_path):
    photo = pictures(1, (60, 80), seed=3)[0]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    settings = {"policy": {**kontext, "text_tokens": 48}, "eval": {"sampler": "ode", "steps": 1}}
    editor = editr2.Editor(settings=settings)
    files = (tmp_path / "photo.png", str(tmp_path / "photo.png"), photo, Image.fromarray(photo))
    seen = [editor.start(each).pixels for each in files]
    assert all(np.array_equal(each, seen[0]) for each in seen) and seen[0].shape == (*SIZE, 3)
    clear = Image.fromarray(photo).convert("RGBA")
    clear.putalpha(0)
    assert editor.start(clear).pixels.min() == 255  # on white
    assert not np.array_equal(editor.start(photo, resize="stretch").pixels, seen[0])
    lying = Image.fromarray(np.rot90(photo))  # as a camera says by EXIF that it was turned
    lying.getexif()[0x0112] = 6
    assert np.array_equal(editor.start(lying).pixels, seen[0])
    plain, beside = (
        editor.edit(photo, "darker", references=r)[0] for r in ([], [clear, tmp_path / "photo.png"])
    )
    assert pixel_digest(plain.pixels) != pixel_digest(beside.pixels)
    wrong = {
        "image: .*60×80 pixels": lambda: editor.start(photo, resize="no"),
        "resize: 'fit' .*crop, stretch": lambda: editor.start(photo, resize="fit"),
        r"image: float64 \[60, 80, 3\]": lambda: editor.start(photo / 1.0),
        "image: .*NoneType": lambda: editor.start(None),
        r"references\[0\]: .*gone.png: no such file": lambda: editor.start(
            photo, references=["gone.png"]
        ),
        "mode: the string 'xy'": lambda: editor.start(photo, mode="xy"),
        "instructions: none": lambda: editor.edit(photo, []),
        "image: not an image .*cannot write mode": lambda: editor.start(
            Image.new("CMYK", (48, 32))
        ),
    }
    for line, call in wrong.items():
        with pytest.raises(UserError, match=line):
            call()
    with pytest.raises(ConfigError, match="policy.weights: given beside a policy"):
        editr2.Editor(kontext["weights"], {"policy": {"weights": "x"}})
    with pytest.raises(ConfigError, match="eval.steps: 0"):
        editr2.Editor(settings={"eval": {"steps": 0}})


def test_bagel_reads_them_behind_the_image(beside, tmp_path):
    tiny = beside("tiny_bagel")
    weights = tiny.write(tmp_path / "weights")
    policy = load_policy(PolicyConfig("bagel", str(weights), resolution=(32, 32)), trains=False)
    image, one, two = tiny.pictures(3, (32, 32))[:, None]
    context = policy.encode(image, [one, two])
    walked = policy.append(policy.append(policy.encode(image), one), two)
    x, sigma = torch.randn(1, *policy.latent_shape), torch.tensor([0.5])
    found, expected, without = (
        policy.velocity(x, sigma, policy.instruct(c, ["red"])).v
        for c in (context, walked, policy.encode(image))
    )
    assert torch.equal(found, expected) and not torch.equal(found, without)
