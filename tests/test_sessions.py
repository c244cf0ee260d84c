"""Sessions: an exact round trip, and one clear line for every way that a set can be wrong."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from editr2.config import Config, replace_nested
from editr2.errors import DataError, UserError
from editr2.rl.sessions import sessions_for
from editr2.sessions import ImageFile, Session, Turn, load_sessions, save_sessions, survey, validate

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
TURNS = [{"instruction": "add a cup"}]


def png(pixels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def write(folder: Path, *lines: Any) -> Path:
    """A set with the lines (objects as JSON, bytes and text as they are) and an image a.png of
    4×6."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(png(PIXELS))
    raw = [
        x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
        for x in lines
    ]
    (folder / "sessions.jsonl").write_bytes(b"\n".join(raw))
    return folder / "sessions.jsonl"


def problem(folder: Path, *lines: Any, **options: Any) -> str:
    """The error of a set without the file's name; loading and validating must agree on the first
    one."""
    file = write(folder, *lines)
    with pytest.raises(DataError) as caught:
        load_sessions(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and validate(folder, **options)[0] == message
    return message.removeprefix(str(file))


def test_what_a_line_can_say(tmp_path: Path) -> None:
    turn = {
        "instruction": " make it blue ",
        "intent": "make the cup blue",
        "task": "recolour",
        "meta": {"a": [1]},
    }
    file = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"image": "a.png", "turns": TURNS}).encode() + b"\r",
        "",
        "  \t",
        {
            "id": "é",
            "image": str(tmp_path / "a.png"),
            "turns": [turn, *TURNS],
            "mode": "cu",
            "meta": {"k": None},
        },
        {
            "id": None,
            "image": "../" + tmp_path.name + "/a.png",
            "turns": TURNS,
            "mode": None,
            "meta": None,
        },
        "",
    )
    for path in (tmp_path, file, str(tmp_path)):
        first, second, third = load_sessions(path)
        assert (first.id, first.mode, first.meta, first.turns) == (
            "line-000001",
            None,
            {},
            (Turn("add a cup"),),
        )
        assert second.id == "é" and second.mode == "cu" and second.meta == {"k": None}
        assert second.turns[0] == Turn(
            " make it blue ", "make the cup blue", "recolour", {"a": [1]}
        )
        assert third.id == "line-000005"
        for session in (first, second, third):
            assert session.image.dtype == np.uint8 and session.image.flags.c_contiguous
            assert np.array_equal(session.image, PIXELS)
    assert validate(tmp_path) == [] and validate(tmp_path, size=(4, 6)) == []


def test_limit_reads_no_further(tmp_path: Path) -> None:
    good = {"image": "a.png", "turns": TURNS}
    write(tmp_path, good, good, "broken")
    assert len(load_sessions(tmp_path, limit=2)) == 2
    with pytest.raises(DataError):
        load_sessions(tmp_path, limit=3)
    with pytest.raises(UserError, match=r"limit: 0 \(accepted: 1 or more\)"):
        load_sessions(tmp_path, limit=0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id" "a"}', ":1: column 7: malformed JSON: Expecting ':' delimiter"),
        (
            "nonsense",
            ":1: column 1: malformed JSON: Expecting value (accepted: one JSON object a line)",
        ),
        (b'{"id": "\xff"}', ":1: byte 9 is not UTF-8"),
        ("[1]", ":1: a list of 1 (accepted: one JSON object a line)"),
        ("3", ":1: the number 3 (accepted: one JSON object a line)"),
        ('{"id": "a", "id": "b"}', ":1: id: key given twice in one object"),
        ('{"id": NaN}', ":1: NaN is not JSON (accepted: finite numbers)"),
        (
            '{"id": "\\ud800"}',
            ":1: a string holds half of a surrogate pair (accepted: Unicode text)",
        ),
        ('{"id": ' + "9" * 5000 + "}", ":1: malformed JSON: Exceeds the limit"),
        ("[" * 100_000, ":1: malformed JSON: "),
        (
            {"image": "a.png", "turn": TURNS},
            ":1: turn: unknown key (did you mean 'turns'? accepted: id, image,",
        ),
        (
            {"image": "a.png", "turns": TURNS, "x": 1},
            ":1: x: unknown key (accepted: id, image, turns, mode, size, references, meta)",
        ),
        (
            {"image": "a.png", "turns": [{"instrution": "a"}]},
            ":1: turns[0].instrution: unknown key (did you mean",
        ),
        (
            {"turns": TURNS},
            ":1: image: missing (accepted: the path of an image, relative to this file)",
        ),
        ({"image": 3, "turns": TURNS}, ":1: image: the number 3 (accepted: the path"),
        ({"image": " ", "turns": TURNS}, ":1: image: blank string (accepted: the path"),
        ({"image": "a.png"}, ":1: turns: missing (accepted: a list of one or more turns)"),
        ({"image": "a.png", "turns": []}, ":1: turns: an empty list (accepted"),
        ({"image": "a.png", "turns": {"a": 1}}, ":1: turns: an object (accepted"),
        (
            {"image": "a.png", "turns": ["add"]},
            ":1: turns[0]: the string 'add' (accepted: an object with an instr",
        ),
        (
            {"image": "a.png", "turns": [*TURNS, {}]},
            ":1: turns[1].instruction: missing (accepted: a non-empty string)",
        ),
        (
            {"image": "a.png", "turns": [{"instruction": ""}]},
            ":1: turns[0].instruction: blank string (accepted",
        ),
        (
            {"image": "a.png", "turns": [{"instruction": True}]},
            ":1: turns[0].instruction: true (accepted",
        ),
        (
            {"image": "a.png", "turns": [{"instruction": 1}]},
            ":1: turns[0].instruction: the number 1 (accepted",
        ),
        (
            {"image": "a.png", "turns": [{**TURNS[0], "intent": ""}]},
            ":1: turns[0].intent: blank string (accepted",
        ),
        (
            {"image": "a.png", "turns": [{**TURNS[0], "task": ["x"]}]},
            ":1: turns[0].task: a list of 1 (accepted",
        ),
        (
            {"image": "a.png", "turns": [{**TURNS[0], "meta": 1}]},
            ":1: turns[0].meta: the number 1 (accepted",
        ),
        (
            {"image": "a.png", "turns": TURNS, "id": ""},
            ":1: id: blank string (accepted: a non-empty string)",
        ),
        ({"image": "a.png", "turns": TURNS, "id": 7}, ":1: id: the number 7 (accepted"),
        (
            {"image": "a.png", "turns": TURNS, "mode": "c"},
            ":1: mode: the string 'c' (accepted: 'cm', 'cu' or absent)",
        ),
        ({"image": "a.png", "turns": TURNS, "mode": ["cm"]}, ":1: mode: a list of 1 (accepted"),
        (
            {"image": "a.png", "turns": TURNS, "meta": []},
            ":1: meta: an empty list (accepted: an object, or absent)",
        ),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, expected: str) -> None:
    assert problem(tmp_path, line).startswith(expected)


def test_repeated_ids_name_both_lines(tmp_path: Path) -> None:
    line = {"id": "k", "image": "a.png", "turns": TURNS}
    expected = ":3: id: 'k' was already used on line 1 (accepted: unique ids)"
    assert problem(tmp_path, line, "", line) == expected
    generated = {"id": "line-000002", "image": "a.png", "turns": TURNS}
    assert "'line-000002' was already used on line 1" in problem(
        tmp_path, generated, {"image": "a.png", "turns": TURNS}
    )


def test_places_without_sessions(tmp_path: Path) -> None:
    for path, expected in [
        (tmp_path, "no sessions.jsonl in the folder"),
        (tmp_path / "none", "no such file"),
    ]:
        with pytest.raises(DataError, match=expected):
            load_sessions(path)
        assert expected in validate(path)[0]
    assert (
        problem(tmp_path, "", " ")
        == ": no sessions in the file (accepted: one JSON object a line, at least one)"
    )


def test_validate_names_everything(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"image": "b.png", "turns": [{"instruction": ""}, {"task": 3}], "mod": "cm"},
        "{",
        {"image": "a.png", "turns": TURNS},
    )
    found = [text.removeprefix(f"{file}:").split(" (")[0] for text in validate(tmp_path)]
    assert found == [
        "1: mod: unknown key",
        "1: turns[0].instruction: blank string",
        "1: turns[1].instruction: missing",
        "1: turns[1].task: the number 3",
        f"1: image: {tmp_path / 'b.png'}: no such file",
        "2: column 2: malformed JSON: Expecting property name enclosed in double quotes",
    ]


def image_problem(folder: Path, data: bytes, **options: Any) -> str:
    (folder / "b").write_bytes(data)
    message = problem(folder, {"image": "b", "turns": TURNS}, **options)
    assert message.startswith(f":1: image: {folder / 'b'}: ")
    return message.removeprefix(f":1: image: {folder / 'b'}: ")


def animation(form: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(buffer, format=form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return buffer.getvalue()


def test_bad_images(tmp_path: Path) -> None:
    big = png(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    flipped = bytearray(big)
    flipped[len(big) // 2] ^= 1
    assert image_problem(tmp_path, b"") == "empty file (accepted: an image)"
    assert image_problem(tmp_path, b"hello") == "not a readable image: cannot identify image file"
    assert image_problem(tmp_path, big[: len(big) // 2]).startswith("not a readable image: ")
    assert image_problem(tmp_path, bytes(flipped)).startswith("not a readable image: ")
    jpeg = encoded(Image.open(io.BytesIO(big)), "JPEG")
    assert image_problem(tmp_path, jpeg[: len(jpeg) // 2]).startswith("not a readable image: ")
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        assert (
            image_problem(tmp_path, animation(form))
            == "animated, 2 frames (accepted: a still image)"
        ), form
    deep = encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)))
    assert image_problem(tmp_path, deep).startswith("pixel format I;16 (accepted: 8-bit 1, L")
    assert image_problem(tmp_path, encoded(Image.new("CMYK", (4, 4)), "JPEG")).startswith(
        "pixel format CMYK"
    )
    expected = (
        "4×6 pixels, height × width (accepted: 6×4; --data.resize crop or stretch brings others "
        "to it)"
    )
    assert image_problem(tmp_path, png(PIXELS), size=(6, 4)) == expected


def test_an_image_that_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, expected in [
        ("folder", "not a "
                   "file"), ("pipe", "not a "
                                     "file"), ("none.png", "no such "
                                                           "file"), ("a\0b", "no such file"),
    ]:  # fmt: skip
        assert problem(tmp_path, {"image": name, "turns": TURNS}).endswith(expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own remarks on the broken files
def test_broken_images_give_a_data_error_and_nothing_else(tmp_path: Path) -> None:
    pick = random.Random(0)
    picture = Image.open(
        io.BytesIO(png(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    )
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO"):
        data = encoded(picture, form)
        for _ in range(25):
            broken = bytearray(data[: pick.randrange(len(data))] if pick.random() < 0.3 else data)
            for _ in range(pick.randrange(4)):
                if broken:
                    broken[pick.randrange(min(len(broken), 200))] = pick.randrange(256)
            write(tmp_path, {"image": "b", "turns": TURNS})
            (tmp_path / "b").write_bytes(broken)
            try:
                (session,) = load_sessions(tmp_path)
            except DataError as error:
                assert "\n" not in str(error) and "0x" not in str(error)
            else:
                assert session.image.dtype == np.uint8 and session.image.ndim == 3


def loaded_pixels(folder: Path, data: bytes) -> Any:
    write(folder, {"image": "b", "turns": TURNS})
    (folder / "b").write_bytes(data)
    return load_sessions(folder)[0].image


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 51, 255]  # black at 0, 20 and 100 %
    expected = np.repeat(np.array([[[255], [204], [0]]], np.uint8), 3, axis=2)
    assert np.array_equal(loaded_pixels(tmp_path, png(rgba)), expected)
    grey = Image.merge("LA", [Image.fromarray(np.ascontiguousarray(rgba[..., i])) for i in (0, 3)])
    assert np.array_equal(loaded_pixels(tmp_path, encoded(grey)), expected)
    colour_key = png(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), transparency=(1, 2, 3))
    assert loaded_pixels(tmp_path, colour_key).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([9, 9, 9, 7, 8, 9])
    assert loaded_pixels(tmp_path, encoded(palette)).tolist() == [[[9, 9, 9], [7, 8, 9]]]
    palette.info["transparency"] = 0
    assert loaded_pixels(tmp_path, encoded(palette)).tolist() == [[[255, 255, 255], [7, 8, 9]]]


def test_grey_and_orientation(tmp_path: Path) -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    assert np.array_equal(loaded_pixels(tmp_path, png(grey)), np.repeat(grey[..., None], 3, axis=2))
    assert loaded_pixels(tmp_path, encoded(Image.new("1", (2, 1), 1))).tolist() == [[[255] * 3] * 2]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert np.array_equal(loaded_pixels(tmp_path, png(PIXELS, exif=exif)), np.rot90(PIXELS, k=-1))


def test_images_beyond_the_memory_stay_in_their_files(tmp_path: Path) -> None:
    other = 255 - PIXELS
    save_sessions([Session("a", PIXELS, (Turn("x"),)), Session("b", other, (Turn("x"),))], tmp_path)
    for memory, stored in [
        (0, [True, True]),
        (PIXELS.nbytes, [False, True]),
        (2 * PIXELS.nbytes, [False, False]),
    ]:
        sessions = load_sessions(tmp_path, memory=memory)
        assert [isinstance(vars(s)["image"], ImageFile) for s in sessions] == stored
        assert np.array_equal(sessions[0].image, PIXELS) and np.array_equal(
            sessions[1].image, other
        )
        assert np.array_equal(np.stack([s.image for s in sessions]), [PIXELS, other])
    lazy = pickle.loads(pickle.dumps(load_sessions(tmp_path, memory=0)[1]))
    path = vars(lazy)["image"].path
    path.write_bytes(png(PIXELS[:2]))  # a run must not go on with something else than it checked
    with pytest.raises(DataError, match=f"^{path}: 2×6 pixels"):
        _ = lazy.image
    path.unlink()
    with pytest.raises(DataError, match=f"^{path}: no such file$"):
        _ = lazy.image


def test_a_broken_image_is_found_at_once_wherever_pixels_are_kept(tmp_path: Path) -> None:
    write(tmp_path, {"image": "b", "turns": TURNS})
    (tmp_path / "b").write_bytes(b"hello")
    with pytest.raises(DataError, match=":1: image: .*not a readable image"):
        load_sessions(tmp_path, memory=0)


def test_files_are_copied_as_they_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.open(io.BytesIO(png(PIXELS))), "JPEG")
    turned = png(PIXELS, exif=exif)
    (tmp_path / "a.JPG").write_bytes(data)
    (tmp_path / "b").write_bytes(turned)
    items = [Session(name, ImageFile(tmp_path / name), (Turn("x"),)) for name in ("a.JPG", "b")]
    small = Session("small", ImageFile(tmp_path / "a.JPG", (2, 3), "stretch"), (Turn("x"),))
    back = load_sessions(save_sessions([*items, small], tmp_path / "set"))
    assert_equal([*items, small], back)
    assert np.array_equal(back[1].image, np.rot90(PIXELS, k=-1)) and back[2].image.shape == (
        2,
        3,
        3,
    )
    files = {path.suffix: path.read_bytes() for path in (tmp_path / "set/images").iterdir()}
    assert files.keys() == {".jpg", "", ".png"} and files[".jpg"] == data and files[""] == turned
    (tmp_path / "c").write_bytes(b"no image")
    with pytest.raises(DataError, match="c: not a readable image"):
        save_sessions([Session("c", ImageFile(tmp_path / "c"), (Turn("x"),))], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_images_of_another_size(tmp_path: Path) -> None:
    half = np.zeros((4, 8, 3), np.uint8)
    half[:, 2:6] = 255  # white, with two black columns on either side
    write(tmp_path, {"image": "b", "turns": TURNS})
    (tmp_path / "b").write_bytes(png(half))
    (cropped,) = load_sessions(tmp_path, size=(4, 4), resize="crop")
    assert (
        cropped.image.shape == (4, 4, 3) and cropped.image.min() == 255
    )  # the middle, not squeezed
    (larger,) = load_sessions(tmp_path, size=(8, 8), resize="crop")
    assert larger.image.shape == (8, 8, 3) and larger.image[:, 2:6].min() > 240  # Lanczos rings
    (stretched,) = load_sessions(tmp_path, size=(4, 4), resize="stretch")
    assert (
        stretched.image.shape == (4, 4, 3)
        and stretched.image[:, 0].max() < 80 < 180 < stretched.image[:, 1].min()
    )
    (same,) = load_sessions(tmp_path, size=(4, 8), resize="crop")
    assert np.array_equal(same.image, half)
    (lazy,) = load_sessions(tmp_path, size=(4, 4), resize="crop", memory=0)
    assert np.array_equal(lazy.image, cropped.image)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "b").write_bytes(
        png(half, exif=exif)
    )  # upright it is 8 × 4: the size is that of what is seen
    assert np.array_equal(load_sessions(tmp_path, size=(8, 4))[0].image, np.rot90(half, k=-1))
    with pytest.raises(UserError, match=r"resize: 'fit' \(accepted: no, crop, stretch\)"):
        load_sessions(tmp_path, resize="fit")


@pytest.mark.parametrize("resize", ["no", "crop", "stretch"])
def test_a_run_reads_its_sets_at_the_policy_s_size(tmp_path: Path, resize: str) -> None:
    save_sessions([Session("a", PIXELS, (Turn("x"),))], tmp_path / "train")
    save_sessions([Session("b", PIXELS[1:], (Turn("x"),))], tmp_path / "heldout")
    data = {"path": str(tmp_path / "train"), "heldout": str(tmp_path / "heldout"), "resize": resize}
    config = replace_nested(Config(), {"data": data})
    policy: Any = SimpleNamespace(image_size=(4, 4))
    if resize == "no":
        with pytest.raises(
            DataError, match=r":1: image: .*4×6 pixels.*--data\.resize crop or stretch"
        ):
            sessions_for(config, policy)
        return
    source = sessions_for(config, policy)
    assert source[0].image.shape == source.heldout[0].image.shape == (4, 4, 3)


def test_a_survey_counts(tmp_path: Path) -> None:
    sizes = [(4, 4), (4, 5), (4, 6), (4, 7), (4, 8), (4, 4)]
    items = [
        Session(
            f"{i}",
            np.zeros((*size, 3), np.uint8),
            (Turn("x"),) * (1 + (i == 5)),
            [None, "cm"][i % 2],
        )
        for i, size in enumerate(sizes)
    ]
    file = save_sessions(items, tmp_path)
    found = survey(tmp_path)
    assert (
        found.problems == [] and found.turns == {1: 5, 2: 1} and found.modes == {None: 3, "cm": 3}
    )
    text = (
        "6 sessions; turns 1 (5), 2 (1); height×width 4×4 (2), 4×5 (1), 4×6 (1), 4×7 (1), 1 more; "
        "mode none (3), cm (3)"
    )
    assert str(found) == text
    file.write_text(file.read_text() + "3\n")
    assert survey(tmp_path).problems == [
        f"{file}:7: the number 3 (accepted: one JSON object a line)"
    ]
    assert survey(tmp_path, size=(4, 4), resize="crop").sizes == {(4, 4): 6}


def test_sessions_made_in_memory_are_checked() -> None:
    turns = (Turn("a"),)
    for change, expected in [
        (
            {"image": PIXELS.astype(np.float32)},
            r"Session 'a': image: float32 \[4, 6, 3\] \(accepted: a uint8 array",
        ),
        ({"image": PIXELS[..., 0]}, r"image: uint8 \[4, 6\]"),
        ({"image": PIXELS[:0]}, r"image: no pixels, shape \[0, 6, 3\]"),
        ({"image": PIXELS.tolist()}, "image: list"),
        ({"turns": ()}, r"turns: wrong value \(accepted: a tuple of one or more Turn\)"),
        ({"turns": ["a"]}, "turns: wrong value"),
        ({"mode": "x"}, "mode: the string 'x'"),
        ({"id": ""}, "id: blank string"),
        ({"id": None}, "cannot be None"),
        ({"meta": None}, "cannot be None"),
    ]:
        with pytest.raises(DataError, match=expected):
            Session(**{"id": "a", "image": PIXELS, "turns": turns, **change})
    with pytest.raises(DataError, match="Turn: instruction: blank string"):
        Turn("  ")
    with pytest.raises(DataError, match="Turn: meta: None"):
        Turn("a", meta=None)  # type: ignore[arg-type]


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)
metas = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), json_values, max_size=2)
turns = st.builds(
    Turn, instruction=text, intent=st.none() | text, task=st.none() | text, meta=metas
)
sessions = st.builds(
    Session,
    id=text,
    image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3))),
    turns=st.lists(turns, min_size=1, max_size=3).map(tuple),
    mode=st.sampled_from([None, "cm", "cu"]),
    meta=metas,
)


def assert_equal(given: list[Session], back: list[Session]) -> None:
    assert len(given) == len(back)
    for a, b in zip(given, back, strict=True):
        assert (a.id, a.turns, a.mode, a.meta) == (b.id, b.turns, b.mode, b.meta)
        assert repr(a.meta) == repr(b.meta)  # 1 and 1.0 and True are equal, but not the same
        assert a.image.dtype == b.image.dtype and np.array_equal(a.image, b.image)


@settings(max_examples=100, deadline=None)  # a busy disk takes as long as it likes
@given(items=st.lists(sessions, min_size=1, max_size=3, unique_by=lambda session: session.id))
def test_round_trip(items: list[Session], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "round trip"
    with mock.patch("os.fsync"):  # which is most of the time, and not what is tested here
        file = save_sessions(items, folder)
    assert file == folder / "sessions.jsonl"
    assert_equal(items, load_sessions(file))
    assert not list(folder.rglob("*.tmp"))


def test_saving_again_replaces_the_set_and_no_pixels(tmp_path: Path) -> None:
    first = [Session("a", PIXELS, (Turn("x"),)), Session("b", PIXELS, (Turn("y"),))]
    save_sessions(first, tmp_path / "deep" / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "deep/set/images").iterdir()}
    assert len(before) == 1  # equal pixels are stored once
    second = [Session("a", PIXELS[::-1, :, ::-1], (Turn("x"),))]  # not contiguous
    save_sessions(second, tmp_path / "deep/set")
    assert_equal(second, load_sessions(tmp_path / "deep/set"))
    assert all(path.read_bytes() == data for path, data in before.items())


def test_images_of_equal_bytes_and_different_shape_are_two(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    items = [
        Session("a", pixels, (Turn("x"),)),
        Session("b", pixels.reshape(3, 2, 3), (Turn("x"),)),
    ]
    save_sessions(items, tmp_path)
    assert_equal(items, load_sessions(tmp_path))


def test_a_phone_s_picture_with_a_second_image_behind_it_is_still(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("white", "black")]
    frames[0].save(buffer, format="MPO", save_all=True, append_images=frames[1:])
    assert loaded_pixels(tmp_path, buffer.getvalue()).min() == 255


def test_a_save_that_fails_leaves_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [Session("a", PIXELS, (Turn("x"),))]
    new = [Session("b", 255 - PIXELS, (Turn("y"),))]
    save_sessions(old, tmp_path)
    real = os.fsync
    for call in (1, 2):
        left = [call]

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with (
            monkeypatch.context() as patch,
            pytest.raises(DataError, match="cannot be written: No space left"),
        ):
            patch.setattr(os, "fsync", full)
            save_sessions(new, tmp_path)
        assert_equal(old, load_sessions(tmp_path))
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "meta", [{"a": object()}, {"a": math.nan}, {"a": "\ud800"}, {"a": np.float32(1)}]
)
def test_a_meta_that_is_not_json_is_named(tmp_path: Path, meta: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"session 'k': .*\(accepted: Unicode text, and JSON values in meta\)"
    ):
        save_sessions([Session("k", PIXELS, (Turn("x"),), meta=meta)], tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_saving_refuses_no_sessions_twins_and_a_file_for_a_folder(tmp_path: Path) -> None:
    session = Session("k", PIXELS, (Turn("x"),))
    with pytest.raises(DataError, match="no sessions to save"):
        save_sessions([], tmp_path)
    with pytest.raises(DataError, match="'k' given twice"):
        save_sessions([session, session], tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_sessions([session], tmp_path / "f")
