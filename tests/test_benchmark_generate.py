"""The images of a benchmark: made pass by pass, and found in the layouts of others."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from editr2.benchmarks import generate as stage
from editr2.benchmarks.layouts import LAYOUTS, file_names, find_images, generations
from editr2.benchmarks.sets.world import WORLD
from editr2.benchmarks.table import Source
from editr2.config import Config, replace_nested
from editr2.errors import ConfigError, DataError
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.rl.seeds import derive_seed
from editr2.run.processes import Processes
from editr2.sessions import Session, Turn
from editr2.sessions.images import ImageFile

ROOT = Path(__file__).parent.parent
CONFIG = replace_nested(
    Config(),
    {
        "rollout": {"steps": 2, "groups_per_batch": 1},
        "eval": {"sampler": "ode"},
        "policy": {"intent_tokens": 2},
    },
)


def some_sessions(*lengths, count=1):
    """Of the world, with ids as EdiVal has them."""
    sessions = WORLD.read(Source(None, turns=lengths, sessions=count))
    return [dataclasses.replace(one, id=str(i * i)) for i, one in enumerate(sessions, 7)]


def make(folder, policy, sessions, way, config=CONFIG, **options):
    sampler = eval_sampler(config.rollout, config.eval, own_schedule(policy))
    processes = Processes(Accelerator(cpu=True))
    stage.generate(folder, policy, sessions, sampler, config, processes, way=way, **options)


def tree(folder):
    """Every file with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def collected(folder, turns, way):
    """As EdiVal's stock evaluator decides which images it judges (collect_images_index of eval.py,
    TianyuCodings/EdiVal): by the folder's listing, whole numbers whose every turn has a PNG."""
    there = set(os.listdir(folder / way))
    matches = [re.fullmatch(r"(.*)_input_raw\.(?:png|jpg)", name) for name in there]
    names = [match[1] for match in matches if match and re.fullmatch(r"\d+", match[1])]
    wanted = [f"_input_raw_turn_{t}.png" for t in range(1, turns + 1)]
    return sorted(int(name) for name in names if all(name + end in there for end in wanted))


def test_the_layout_of_edival_round_trips(tmp_path, tiny_unified):
    policy, sessions = tiny_unified, some_sessions(3, count=5)
    for way in ("multipass", "exact"):
        make(tmp_path, policy, sessions, way, exact=WORLD.exact)
    folder = generations(tmp_path)
    assert folder == tmp_path / "generations"
    assert {path.name for path in folder.iterdir()} == {"multipass", "exact"}
    for way in ("multipass", "exact"):
        assert collected(folder, 3, way) == [49, 64, 81, 100, 121]
        assert len(list((folder / way).iterdir())) == 5 * 4
        source = np.asarray(Image.open(folder / way / "64_input_raw.png"))
        assert np.array_equal(source, sessions[1].image)

    # What is read back is what the editor made, its seeds by the session's id.
    images = find_images(folder, sessions, "multipass", ["outputs", "edival"])
    assert images.layout == "edival" and not images.missing
    assert find_images(tmp_path, sessions, "multipass", ["edival"]).found == images.found
    seeds = Seeds(derive_seed(CONFIG.seed, "sample", 1), "benchmark")
    sampler = eval_sampler(CONFIG.rollout, CONFIG.eval, own_schedule(policy))
    for chunk in chunks(sessions, [derive_seed(one.id) for one in sessions], 1, 4):
        rollout_chunk(policy, chunk, sampler, seeds, CONFIG.policy, greedy=True)
        for i, session in enumerate(chunk.sessions):
            read = np.stack([images.read(session, t) for t in range(3)])
            assert np.array_equal(read, chunk.images_of(i))

    (folder / "multipass" / "64_input_raw_turn_2.png").unlink()
    images = find_images(folder, sessions, "multipass", ["edival"])
    assert images.missing == [("64", 1)]
    assert [path and path.name for path in images.of(sessions[1])] == [
        "64_input_raw_turn_1.png",
        None,
        "64_input_raw_turn_3.png",
    ]
    assert images.line().startswith("multipass: 14 of 15 images in ")
    assert images.line().endswith("; missing: '64, turn 2'")
    assert collected(folder, 3, "multipass") == [49, 81, 100, 121]


def test_a_single_pass_edits_the_source_by_all_instructions(tmp_path, tiny_unified):
    (session,) = some_sessions(3)
    read = tiny_unified.text_ids  # the world's words have no full stop
    tiny_unified.text_ids = lambda text: read(text.replace(". ", " "))
    make(tmp_path, tiny_unified, [session], "singlepass")
    images = find_images(generations(tmp_path), [session], "singlepass", ["edival"])
    told = [turn.instruction for turn in session.turns]
    assert "." not in "".join(told)
    joined = [
        dataclasses.replace(session, turns=(Turn(". ".join(told[: t + 1])),)) for t in range(3)
    ]
    sampler = eval_sampler(CONFIG.rollout, CONFIG.eval, own_schedule(tiny_unified))
    (chunk,) = chunks(joined, [derive_seed(session.id)] * 3, 1, 4)
    seeds = Seeds(derive_seed(CONFIG.seed, "sample", 1), "benchmark")
    rollout_chunk(tiny_unified, chunk, sampler, seeds, CONFIG.policy, greedy=True)
    made = [images.read(session, t) for t in range(3)]
    assert all(np.array_equal(made[t], chunk.images_of(t)[0]) for t in range(3))
    assert not np.array_equal(made[0], made[1]) and not np.array_equal(made[1], made[2])

    tiny_unified.unreadable = lambda told: [(0, "too long")] if told[0].count(". ") > 1 else []
    with pytest.raises(DataError, match=r"^singlepass: 49#3: turn 3: too long$"):
        make(tmp_path / "other", tiny_unified, [session], "singlepass")


def test_the_exact_pass_reads_exact_images(tmp_path, tiny_unified, monkeypatch):
    sessions = some_sessions(1, 3, 2)
    exact = {one.id: WORLD.exact(one) for one in sessions}
    read, append = [], tiny_unified.append

    def spy(context, images):
        read.append(images)
        return append(context, images)

    monkeypatch.setattr(tiny_unified, "append", spy)
    with pytest.raises(
        ConfigError, match=r"^passes: exact: .*\(accepted: multipass, singlepass\)$"
    ):
        make(tmp_path, tiny_unified, sessions, "exact")
    make(tmp_path, tiny_unified, sessions, "exact", exact=WORLD.exact)
    first, second = read[-2:]  # before them perhaps the sources
    assert np.array_equal(first, np.stack([exact[one.id][0] for one in sessions]))
    assert np.array_equal(second, np.stack([exact[one.id][1] for one in sessions[1:]]))

    # A turn that has read nothing yet has the noise, and so the image, of the other pass.
    read.clear()
    make(tmp_path, tiny_unified, sessions, "multipass")
    ways = [find_images(tmp_path, sessions, way, ["edival"]) for way in ("multipass", "exact")]
    for session in sessions:
        for t in range(len(session.turns)):
            one, other = (images.read(session, t) for images in ways)
            assert np.array_equal(one, other) == (t == 0)
    own, _ = ways
    assert np.array_equal(read[-2], np.stack([own.read(one, 0) for one in sessions]))

    wrong = r"^exact images of session '49': uint8 \[2, 24, 24, 3\] \(accepted: uint8 \[1, "
    with pytest.raises(DataError, match=wrong):
        make(tmp_path / "wrong", tiny_unified, sessions, "exact", exact=lambda _: exact["81"])


def test_only_whole_chunks_are_left_out(tmp_path, tiny_unified, monkeypatch, capsys):
    """An image that is missing is made again in the batch that it was made in; a further sample has
    other noise."""
    sessions, done = some_sessions(1, 2, count=3), []  # chunks of four and two

    def seen(policy, chunk, *rest, **options):
        done.append([session.id for session in chunk.sessions])
        return rollout_chunk(policy, chunk, *rest, **options)

    monkeypatch.setattr(stage, "rollout_chunk", seen)
    monkeypatch.setattr(stage, "SECONDS", 0.0)
    make(tmp_path, tiny_unified, sessions, "multipass")
    said = capsys.readouterr().err.splitlines()
    whole, folder = tree(tmp_path), generations(tmp_path) / "multipass"
    assert done == [["49", "64", "81", "100"], ["121", "144"]]
    assert said == [
        "multipass: 5 of 9 images",
        "multipass: 9 of 9 images",
        f"multipass: 9 images made, 0 were there: {folder}",
    ]
    for name in ("144_input_raw_turn_1.png", "144_input_raw.png"):
        (folder / name).unlink()
        make(tmp_path, tiny_unified, sessions, "multipass")
        assert done.pop() == ["121", "144"] and len(done) == 2
        assert tree(tmp_path) == whole
    assert capsys.readouterr().err.endswith(f"4 images made, 5 were there: {folder}\n")
    make(tmp_path, tiny_unified, sessions, "multipass", sample=2)
    others = tree(generations(tmp_path, 2))
    assert generations(tmp_path, 2).name == "generations-2"
    assert others.keys() == tree(generations(tmp_path)).keys()
    same = {name for name, data in others.items() if data == whole[f"generations/{name}"]}
    assert same == {name for name in others if "turn" not in name}


def test_sessions_of_several_sizes_and_lengths(tmp_path, monkeypatch):
    """Chunks are of one size; every image gets the name of its own session and turn."""
    sizes, laid_out = [(6, 8), (8, 6), (6, 8), (8, 6), (6, 8), (6, 8), (6, 8)], []
    sessions = [
        Session(f"s{i}", pixels(i, *size), tuple(Turn(f"edit {t}") for t in range(1 + i % 3)))
        for i, size in enumerate(sizes)
    ]

    def painted(policy, chunk, *rest, **options):
        """A shade for each turn of each session."""
        laid_out.append([session.id for session in chunk.sessions])
        for t in range(max(len(session.turns) for session in chunk.sessions)):
            live = [i for i, session in enumerate(chunk.sessions) if len(session.turns) > t]
            shades = [10 * int(chunk.sessions[i].id[1:]) + t for i in live]
            images = np.stack([np.full((*chunk.image_size, 3), s, np.uint8) for s in shades])
            chunk.turns.append(SimpleNamespace(rollout=torch.tensor(live), images=images))

    monkeypatch.setattr(stage, "rollout_chunk", painted)
    processes, plan = (
        Processes(Accelerator(cpu=True)),
        [["s0", "s2", "s4", "s5"], ["s6"], ["s1", "s3"]],
    )
    for left in (plan, plan[2:]):
        stage.generate(tmp_path, None, sessions, None, CONFIG, processes, way="multipass")
        assert laid_out == left
        laid_out.clear()
        images = find_images(tmp_path, sessions, "multipass", ["edival"])
        assert not images.missing
        for i, session in enumerate(sessions):
            for t in range(len(session.turns)):
                assert (images.read(session, t) == 10 * i + t).all()
        images.of(sessions[1])[1].unlink()


@pytest.mark.slow
def test_a_kill_resumes_to_the_same_bytes(tmp_path, beside):
    """On one process and on two; the processes share what is left."""
    stages = beside("killed_benchmark")
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed_benchmark.py"), str(tmp_path)],
        check=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    ids = [session.id for session in stages.SESSIONS]
    assert stages.make(tmp_path / "whole") == [ids[:4], ids[4:8], ids[8:]]
    whole, killed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    parts = [name for name in killed if name.endswith(".part")]
    assert len(parts) == 1 and parts[0].removesuffix(".part") not in killed
    for name in parts:
        del killed[name]
    assert killed.items() < whole.items() and len(killed) == stages.AT - 1
    done = [json.loads((tmp_path / f"done.{rank}.json").read_text()) for rank in (0, 1)]
    assert done == [[ids[4:8]], [ids[8:]]]
    assert tree(tmp_path / "two") == whole
    assert stages.make(tmp_path / "killed") == [ids[4:8], ids[8:]]
    assert tree(tmp_path / "killed") == whole


def test_what_a_turn_reads_in_place_of_outputs(tiny_unified):
    """Of the rollouts that had the turn before, of which `goes_on` keeps some."""
    sessions = some_sessions(1, 3, 3)
    sampler = eval_sampler(CONFIG.rollout, CONFIG.eval, own_schedule(tiny_unified))

    def rolled(**options):
        (chunk,) = chunks(sessions, range(3), 2, 3)
        seeds = Seeds(5, "test")
        return rollout_chunk(
            tiny_unified, chunk, sampler, seeds, CONFIG.policy, greedy=True, **options
        )

    outputs = rolled()
    asked = []

    def same(chunk, turn):
        asked.append((turn, len(chunk.turns[turn].rollout)))
        return chunk.turns[turn].images

    again = rolled(reads=same)
    assert asked == [(0, 6), (1, 4)]
    for one, other in zip(outputs.turns, again.turns, strict=True):
        assert np.array_equal(one.images, other.images)
    keep = torch.tensor([True, True, False, True, True, True])  # one of the four with a turn 2
    kept = rolled(reads=same, goes_on=lambda chunk, turn: keep)
    for one, other in zip(outputs.turns[1:], kept.turns[1:], strict=True):
        here = keep[one.rollout]
        assert torch.equal(one.rollout[here], other.rollout)
        assert np.array_equal(one.images[here.numpy()], other.images)


NAMES = {
    "12": "12",
    "3-turns-0001-cm": "3-turns-0001-cm",
    "a" * 100: "a" * 100,
    "a" * 101: r"a{40}-[0-9a-f]{12}",
    "Kitchen": r"Kitchen-[0-9a-f]{12}",  # one file with the next where case does not count
    "kitchen": r"kitchen-[0-9a-f]{12}",
    "a/b": r"a-b-[0-9a-f]{12}",
    "a b": r"a-b-[0-9a-f]{12}",
    "../up": r"\.\.-up-[0-9a-f]{12}",
    "厨房": r"session-[0-9a-f]{12}",
}


def test_names_of_files():
    sessions = [Session(name, np.zeros((1, 1, 3), np.uint8), (Turn("x"),)) for name in NAMES]
    names = file_names(sessions)
    assert list(names) == list(NAMES)
    assert all(re.fullmatch(NAMES[name], file) for name, file in names.items()), names
    assert len({file.lower() for file in names.values()}) == len(NAMES)
    # An id that is what another one's file is called.
    more = [replace(sessions[0], id="a/b")]
    more.append(replace(sessions[0], id=file_names(more)["a/b"]))
    assert len(set(file_names(more).values())) == 2


def pixels(seed, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def elsewhere(name, turns=1, **meta):
    told = tuple(Turn(f"edit {t}", task="subject-add") for t in range(turns))
    return Session(name, pixels(0), told, meta=meta)


ONE = [elsewhere("k1", instruction_language="cn"), elsewhere("k2"), elsewhere("k3")]
TWO = [elsewhere("k1", 2), elsewhere("k2", 2), elsewhere("k/3", 1)]
OUTPUTS = [
    {"id": "other", "turns": [{"image": "none.png"}]},
    {"id": "k2", "turns": [{"image": "b.png", "instruction": "edit 0"}, {"image": "c.png"}]},
    {"id": "k1", "turns": [{"image": None}]},
    {"id": "k/3", "turns": [{"image": "gone.png"}]},
]
FULLSET = [
    "fullset/subject-add/cn/k1.png",
    "fullset/subject-add/en/k1.png",
    "fullset/subject-add/en/k2.png",
]
FOUND = [
    # layout, sessions, files, those of them that each session's turns have
    ("edival", TWO, ["multipass/k1_input_raw_turn_2.png"], [[None, 0], [None, None], [None]]),
    ("outputs", TWO, ["b.png", "c.png"], [[None, None], [0, 1], [None]]),
    ("gedit", ONE, FULLSET, [[0], [2], [None]]),
    ("gedit", ONE, [f"ours/{file}" for file in FULLSET], [[0], [2], [None]]),
    ("imgedit", ONE, ["k3.png", "k1.jpg"], [[None], [None], [0]]),
    ("imgedit", [elsewhere("k1", key="../up"), elsewhere("s", key="k")], ["k.png"], [[None], [0]]),
]


def put(folder, layout, files):
    for seed, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(folder / name)
    if layout == "outputs":
        (folder / "outputs.jsonl").write_text("\n".join(map(json.dumps, OUTPUTS)))


@pytest.mark.parametrize(("layout", "sessions", "files", "which"), FOUND)
def test_layouts_of_others(tmp_path, layout, sessions, files, which):
    folder = tmp_path / "given"
    put(folder, layout, files)
    Image.fromarray(pixels(9)).save(tmp_path / "up.png")
    images = find_images(folder, sessions, "multipass", list(LAYOUTS))
    assert images.layout == layout
    assert [images.of(one) for one in sessions] == [
        [None if at is None else folder / files[at] for at in turns] for turns in which
    ]
    for session, turns in zip(sessions, which, strict=True):
        for t, at in enumerate(turns):
            if at is not None:
                assert np.array_equal(images.read(session, t), pixels(at))
    count = sum(at is None for turns in which for at in turns)
    assert len(images.missing) == count
    first = images.missing[0]
    assert f"; missing: '{first[0]}, turn {first[1] + 1}'" in images.line()


def rewrite(record):
    def change(folder):
        lines = [json.dumps(one) for one in (*OUTPUTS[:2], record)]
        (folder / "outputs.jsonl").write_text("\n".join(lines))

    return change


def another_size(folder):
    Image.fromarray(pixels(1, 12, 20)).save(folder / "c.png")


WRONG = [
    (lambda folder: shutil.rmtree(folder), "multipass", r"no such folder \(accepted: one of gen"),
    (
        lambda folder: (folder / "outputs.jsonl").unlink(),
        "multipass",
        r"given: multipass: no image of any of 3 sessions \(accepted: "
        r"multipass/ID_input_raw_turn_T\.png; outputs\.jsonl of `editr2 rollout`; an ID is 'k1', "
        r"'k2', 'k-3-[0-9a-f]{12}'\)",
    ),
    (
        lambda folder: None,
        "exact",
        r"exact: no image .* \(accepted: exact/ID_input_raw_turn_T\.png;",
    ),
    (lambda folder: (folder / "c.png").write_text("x"), "multipass", r"c\.png: not a readable im"),
    (another_size, "multipass", r"c\.png: 12x20 .* session 'k2' is 6x8 .*--data\.resize"),
    (rewrite(OUTPUTS[1]), "multipass", r"jsonl:3: id: 'k2' again \(accepted: one line each\)"),
    (
        rewrite({"id": "k1", "turns": [{}] * 3}),
        "multipass",
        r"jsonl:3: turns: a list of 3 \(accepted: a list of up to 2, ",
    ),
    (
        rewrite({"id": "k1", "turns": [{"image": "b.png", "instruction": "no"}]}),
        "multipass",
        r"jsonl:3: turns\[0\]\.instruction: .* outputs of other sessions",
    ),
    (
        rewrite({"id": "k1", "turns": [{"image": "../b.png"}]}),
        "multipass",
        r"jsonl:3: turns\[0\]\.image: \.\./b\.png leads out of ",
    ),
]


@pytest.mark.parametrize(("change", "way", "message"), WRONG)
def test_what_is_wrong_with_a_folder_is_said_by_name(tmp_path, change, way, message):
    folder = tmp_path / "given"
    put(folder, "outputs", ["b.png", "c.png"])
    assert find_images(folder, TWO, "multipass", WORLD.layouts).layout == "outputs"
    change(folder)
    with pytest.raises(DataError, match=message):
        find_images(folder, TWO, way, WORLD.layouts)


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    (tmp_path / "multipass").mkdir()
    os.mkfifo(tmp_path / "multipass" / "k1_input_raw_turn_1.png")
    with pytest.raises(DataError, match=r"turn_1\.png: .*not a file"):
        find_images(tmp_path, TWO, "multipass", ["edival"])


def test_several_models_are_none(tmp_path):
    for model in ("a", "b"):
        put(tmp_path / model, "gedit", FULLSET)
    with pytest.raises(DataError, match=r"2 models \(accepted: one of .*/a, .*/b\)$"):
        find_images(tmp_path, ONE, "multipass", ["gedit"])
    assert find_images(tmp_path / "b", ONE, "multipass", ["gedit"]).layout == "gedit"


def test_images_of_another_size_are_brought_to_the_source(tmp_path, monkeypatch):
    folder = tmp_path / "given"
    put(folder, "imgedit", ["k1.png"])
    Image.fromarray(pixels(2, 12, 24)).save(folder / "k1.png")
    Image.fromarray(pixels(0)).save(tmp_path / "source.png")
    (given,) = (elsewhere("k1"),)
    stored = dataclasses.replace(given, image=ImageFile(tmp_path / "source.png"))
    for session in (given, stored):
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile, "__call__", None)  # of thousands none is decoded for it
            with pytest.raises(DataError, match=r"k1\.png: 12x24"):
                find_images(folder, [session], "multipass", ["imgedit"])
        read = {}
        for resize in ("crop", "stretch"):
            images = find_images(folder, [session], "multipass", ["imgedit"], resize)
            read[resize] = images.read(session, 0)
            assert read[resize].shape == (6, 8, 3)
        assert not np.array_equal(read["crop"], read["stretch"])
