"""Files of others: what is wrong with an image or its name, colours, mutated lists, each through
every way into a set.

A way is a format that `editr2 data import` reads. It writes a set of two sessions, of which the
second has the image in question: bytes to put in its place, or a name that is no good.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from editr2.errors import DataError, UserError
from editr2.sessions import images, load_sessions, validate
from editr2.sessions.images import decode_image
from editr2.sessions.importers import import_sessions

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------ files by hand


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG with these rows, filter bytes included, whatever Pillow can write. colour: 0, 2, 4, 6
    as in the format."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png(colour: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    return png(3, 2, 16, colour, (b"\0" + b"\x12\xff" * channels * 3) * 2)


def deep_tiff() -> bytes:
    """2 × 2 pixels of RGB in 16 bits, little-endian."""
    pixels, start = b"\xff\x12" * 12, 8
    bits = start + len(pixels)
    entries = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 3, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, start),
    ]
    entries += [(277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )
    head = struct.pack("<2sHI", b"II", 42, bits + 6)
    return head + pixels + struct.pack("<3H", 16, 16, 16) + directory + struct.pack("<I", 0)


def deep_jp2() -> bytes:
    """An 8-bit JPEG 2000 file whose header says 16 bits a channel."""
    data = bytearray(encoded(picture(), "JPEG2000"))
    at = data.find(b"\xff\x4f\xff\x51") + 42
    assert bytes(data[at : at + 9]) == bytes([7, 1, 1] * 3)
    data[at : at + 9] = bytes([15, 1, 1] * 3)
    return bytes(data)


def animation(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def torn_profile(data: bytes) -> bytes:
    """The PNG with its colour profile's compressed bytes broken."""
    at = data.index(b"iCCP")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    body = b"x\0\0" + bytes(length - 3)
    return (
        data[: at + 4]
        + body
        + struct.pack(">I", zlib.crc32(b"iCCP" + body))
        + data[at + 8 + length :]
    )


# ---------------------------------------------------------------------------------- colours by hand

WHITE = np.array([0.3127, 0.3290])  # D65
PRIMARIES = {
    "srgb": [[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]],
    "display-p3": [[0.680, 0.320], [0.265, 0.690], [0.150, 0.060]],
    "adobe-rgb": [[0.64, 0.33], [0.21, 0.71], [0.15, 0.06]],
}


def to_xyz(space: str) -> np.ndarray:
    """Linear RGB to XYZ under D65, [3, 3], from the chromaticities of the standard (RP 177)."""

    def lifted(xy: np.ndarray) -> np.ndarray:
        return np.array([xy[0], xy[1], 1 - xy[0] - xy[1]]) / xy[1]

    columns = np.stack([lifted(np.array(xy)) for xy in PRIMARIES[space]], 1)
    return columns * np.linalg.solve(columns, lifted(WHITE))


def linear(space: str, v: np.ndarray) -> np.ndarray:
    if space == "adobe-rgb":
        return v ** (563 / 256)
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def in_srgb(space: str, pixels: np.ndarray) -> np.ndarray:
    """What an image of this space looks like in sRGB, float [..., 3] of 0 to 255, clipped channel
    by channel."""
    mixed = linear(space, pixels / 255) @ (np.linalg.inv(to_xyz("srgb")) @ to_xyz(space)).T
    v = mixed.clip(0, 1)
    return 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def profile(space: str) -> bytes:
    """An ICC profile (version 4) of the space, written by hand: a matrix under D50 (Bradford) and
    curves; of `grey`, a curve of gamma 1.8."""

    def fixed(values: Any) -> bytes:
        return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    def curve(kind: int, *values: float) -> bytes:
        return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + fixed(values)

    def text(words: str) -> bytes:
        return (
            b"mluc"
            + bytes(4)
            + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2 * len(words), 28)
            + words.encode("utf-16-be")
        )

    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    d50, d65 = np.array([0.9642, 1.0, 0.8249]), to_xyz("srgb").sum(1)
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ d65)) @ bradford
    tags = {b"desc": text(space), b"cprt": text("none"), b"wtpt": b"XYZ " + bytes(4) + fixed(d50)}
    if space == "grey":
        tags[b"kTRC"] = curve(0, 1.8)
    else:
        gamma = (
            curve(0, 563 / 256)
            if space == "adobe-rgb"
            else curve(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        )
        for name, column in zip(b"rgb", (adapt @ to_xyz(space)).T):
            tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(column)
            tags[bytes([name]) + b"TRC"] = gamma
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size, of = 128 + len(table) + len(body), b"GRAY" if space == "grey" else b"RGB "
    head = (
        struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04300000, b"mntr", of, b"XYZ ")
        + bytes(12)
        + b"acsp"
    )
    return head.ljust(68, b"\0") + fixed(d50) + bytes(128 - 80) + table + body


# ------------------------------------------------------------------------------------- every way in


class Way(NamedTuple):
    """What to import, and what a message about its second session begins with."""

    form: str
    source: Path
    begins: str


Bad = bytes | str


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def placed(folder: Path, bad: Bad) -> str:
    """The name of the image in question in `folder`, where a good one is a.png."""
    put(folder / "a.png", encoded(picture()))
    if isinstance(bad, str):
        return bad
    put(folder / "b.png", bad)
    return "b.png"


def json_lines(path: Path, *records: Any) -> Path:
    put(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return path


def sessions(folder: Path, bad: Bad) -> Way:
    name, turns = placed(folder / "set", bad), [{"instruction": "x"}]
    records = ({"id": n, "image": n, "turns": turns} for n in ("a.png", name))
    file = json_lines(folder / "set/sessions.jsonl", *records)
    return Way("sessions", file.parent, f"{file}:2: image: ")


def mice(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "set/source_image", bad)
    lists: dict[str, list[Any]] = {
        "instruction": ["x"],
        "task_type": ["y"],
        "formatted_instruction": ["x"],
    }
    lists |= {
        "bg_consistency": [True],
        "unchanged_objects": [[]],
        "available_objects": [[]],
        "all_objects": [[]],
    }
    names = ("source_image/a.png", f"source_image/{name}" if isinstance(bad, bytes) else name)
    file = json_lines(folder / "set/cm/x.jsonl", *({"image": n, **lists} for n in names))
    return Way("mice", file, f"{file}:2: image: ")


def edival(folder: Path, bad: Bad) -> Way:
    put(folder / "set/a_input_raw.jpg", encoded(picture()))
    name = bad if isinstance(bad, str) else "b"
    if isinstance(bad, bytes):
        put(folder / "set/b_input_raw.jpg", bad)
    row = {
        "turns": 1,
        "task_type": ["y"],
        "instructions": ["x"],
        "format_instructions": ["x"],
        "bg_consistency": True,
        "unchanged_objects": [],
        "available_objects": [],
        "all_objects": [],
    }
    file = folder / "set/x.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image_index", *row])
        writer.writeheader()
        writer.writerows({"image_index": n, **row} for n in ("a", name))
    return Way("edival", file, f"{file}:3: image_index: ")


def imgedit(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "set", bad)
    file = json_lines(
        folder / "set/annotation.json", *({"id": n, "turn1": "x"} for n in ("a.png", name))
    )
    return Way("imgedit", file, f"{file}:2: id: ")


def imgedit_basic(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "set", bad)
    file = folder / "set/basic_edit.json"
    edits = {
        k: {"id": n, "prompt": "x", "edit_type": "y"} for k, n in (("6", "a.png"), ("7", name))
    }
    file.write_text(json.dumps(edits, indent=1))
    return Way("imgedit-basic", file, f"{file}:7: '7': id: ")


def training_rows(name: str) -> list[dict[str, Any]]:
    edits = (
        {"input_images": [n], "output_images": ["c"], "prompt": "x"} for n in ("part/a.png", name)
    )
    return [{"data": [edit]} for edit in edits]


def imgedit_training(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "set/part", bad)
    rows = training_rows(f"part/{name}" if isinstance(bad, bytes) else name)
    file = json_lines(folder / "set/x.jsonl", *rows)
    return Way("imgedit", file, f"{file}:2: data[0]: input_images: ")


def imgedit_parquet(folder: Path, bad: Bad) -> Way:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    name, file = placed(folder / "set/part", bad), folder / "set/x.parquet"
    rows = training_rows(f"part/{name}" if isinstance(bad, bytes) else name)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return Way("imgedit", file, f"{file}: row 1: data[0]: input_images: ")


def magicbrush(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "set/images/7", bad)
    put(folder / "set/images/6/a.png", encoded(picture()))
    edits = {
        k: [{"input": n, "output": "c.png", "instruction": "x"}]
        for k, n in (("6", "a.png"), ("7", name))
    }
    file = json_lines(folder / "set/edit_sessions.json", edits)
    return Way("magicbrush", file, f"{file}: '7': [0]: input: ")


def dataset_of_bytes(folder: Path, bad: Bad) -> Way:
    assert isinstance(bad, bytes)
    return saved(folder, "image", [{"bytes": b, "path": None} for b in (encoded(picture()), bad)])


def dataset_of_paths(folder: Path, bad: Bad) -> Way:
    name = placed(folder / "files", bad)
    names = (
        str(folder / "files/a.png"),
        str(folder / "files" / name) if isinstance(bad, bytes) else name,
    )
    return saved(folder, "image", list(names))


def magicbrush_dataset(folder: Path, bad: Bad) -> Way:
    assert isinstance(bad, bytes)
    return saved(
        folder, "source_img", [{"bytes": b, "path": None} for b in (encoded(picture()), bad)]
    )


def saved(folder: Path, column: str, cells: list[Any]) -> Way:
    datasets = pytest.importorskip("datasets")
    of = datasets.Value("string") if isinstance(cells[0], str) else datasets.Image()
    values: dict[str, list[Any]] = {"instructions": [["x"], ["x"]]}
    if column == "source_img":
        values = {"img_id": ["6", "7"], "turn_index": [1, 1], "instruction": ["x", "x"]}
    data = datasets.Dataset.from_dict(values).add_column(column, cells, feature=of)
    data.save_to_disk(str(folder / "set"))
    return Way("sessions", folder / "set", f"{folder / 'set'}: row 1: image: ")


WAYS: dict[str, Callable[[Path, Bad], Way]] = {
    way.__name__: way
    for way in (sessions, mice, edival, imgedit, imgedit_basic, imgedit_training, imgedit_parquet,
                magicbrush, dataset_of_bytes, dataset_of_paths, magicbrush_dataset)
}  # fmt: skip
UNNAMED = ("dataset_of_bytes", "magicbrush_dataset")
"""Ways whose images have no names that could be wrong."""
FREE = ("sessions", "dataset_of_paths")
"""Ways whose sets may name files by absolute paths."""


def imported(way: Way, out: Path) -> np.ndarray:
    (_, second) = load_sessions(import_sessions(way.form, way.source, out))
    return second.image


def refusal(way: Way, out: Path) -> str:
    """Of the import, and of loading where the set can be loaded; without what it begins with."""
    with pytest.raises(DataError) as caught:
        import_sessions(way.form, way.source, out)
    message = str(caught.value)
    assert message.startswith(way.begins) and message.isprintable() and len(message) < 1500, (
        message[:1500]
    )
    assert not (out / "sessions.jsonl").exists()
    if way.form == "sessions" and "leads out" not in message:
        assert validate(way.source) == [message]
    return message.removeprefix(way.begins)


# ------------------------------------------------------------------------------------ what is wrong

P3 = encoded(picture(), icc_profile=profile("display-p3"))
EIGHT = "(accepted: 8-bit 1, L, LA, P, PA, RGB, RGBA)"
CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "16-bit RGB": (lambda: deep_png(2), f"16 bits a channel {EIGHT}"),
    "16-bit RGBA": (lambda: deep_png(6), f"16 bits a channel {EIGHT}"),
    "16-bit grey with alpha": (lambda: deep_png(4), f"16 bits a channel {EIGHT}"),
    "16-bit grey": (lambda: deep_png(0), f"pixel format I;16 {EIGHT}"),
    "16-bit TIFF": (deep_tiff, f"16 bits a channel {EIGHT}"),
    "16-bit PPM": (lambda: b"P6 2 2 65535\n" + b"\x12\xff" * 12, f"16 bits a channel {EIGHT}"),
    "16-bit JPEG 2000": (deep_jp2, f"16 bits a channel {EIGHT}"),
    "CMYK": (lambda: encoded(picture("CMYK"), "JPEG"), f"pixel format CMYK {EIGHT}"),
    "a profile that is none": (
        lambda: encoded(picture(), icc_profile=b"nonsense" * 30),
        "colour profile cannot be read: cannot open profile from string (accepted: an ICC profile "
        "of RGB or grey, or ",
    ),
    "a torn profile": (lambda: torn_profile(P3), "colour profile cannot be read: "),
    "a profile of Lab": (
        lambda: encoded(
            picture(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        ),
        "colour profile of Lab (accepted: an ICC profile of RGB or grey, or none)",
    ),
    "a grey profile on colours": (
        lambda: encoded(picture(), icc_profile=profile("grey")),
        "a grey image's colour profile on colours (accepted: an RGB profile, or none)",
    ),
    "half a PNG": (lambda: encoded(picture())[:-60], "not a readable image: "),
    "half a JPEG": (lambda: encoded(picture(), "JPEG")[:-60], "not a readable image: "),
    "an animated GIF": (lambda: animation("GIF"), "animated, 2 frames (accepted: a still image)"),
    "an animated PNG": (lambda: animation("PNG"), "animated, 2 frames (accepted: a still image)"),
    "an animated WebP": (lambda: animation("WEBP"), "animated, 2 frames (accepted: a still image)"),
    "80 million pixels": (
        lambda: png(10_000, 8_000, 8, 2, b""),
        "8000×10000, 80,000,000 pixels (accepted: up to 67,108,864; scale the image down first)",
    ),
    "a bomb": (
        lambda: png(60_000, 50_000, 8, 2, b""),
        "several times more pixels than any image may have (accepted: up to 67,108,864; scale the "
        "image down first)",
    ),
    "PostScript": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n",
        "format EPS (accepted: PNG, JPEG, MPO, WEBP, AVIF, JPEG2000, GIF, BMP, TIFF, PPM)",
    ),
    "nothing": (lambda: b"", "empty file (accepted: an image)"),
    "a page about an error": (
        lambda: b"<html>404</html>",
        "not a readable image: cannot identify image file",
    ),
}
LONG = "a" * 5000
NAMES: dict[str, tuple[str, str]] = {
    "a data URL": (
        "data:image/png;base64," + LONG,
        "a URL, data:image/png... (accepted: the path of a file; n",
    ),
    "a URL": ("https://example.org/a.png", "a URL, https://example.org/a.png"),
    "a URL in capitals": ("FILE:///a.png", "a URL, FILE:///a.png"),
    "a long name": (LONG, "characters)"),
    "two lines": ("a\nb.png", "no such file"),
    "up": ("../../outside", "leads out of "),
    "down and up": ("part/../../../outside", "leads out of "),
    "the root's": ("/{outside}", "leads out of "),
    "nothing there": ("none.png", "no such file"),
    "a folder": ("folder", "not a file"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", CONTENTS)
def test_what_is_wrong_with_an_image(
    way: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    make, expected = CONTENTS[wrong]
    data = make()
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", True
    )  # as many a reward's module has it
    message = refusal(WAYS[way](tmp_path, data), tmp_path / "out")
    assert expected in message
    assert not recwarn.list and ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("way", [way for way in WAYS if way not in UNNAMED])
@pytest.mark.parametrize("wrong", NAMES)
def test_what_is_wrong_with_a_name(
    way: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, expected = NAMES[wrong]
    monkeypatch.chdir(tmp_path)  # a dataset's paths start there
    inner = tmp_path / "here"
    inner.mkdir()
    if way == "dataset_of_paths":
        monkeypatch.chdir(inner)
    for folder in (tmp_path.parent, tmp_path, inner, inner / "set", tmp_path / "o"):
        for end in ("", "_input_raw.jpg"):
            put(
                folder / f"outside{end}", encoded(picture())
            )  # a good image, which must not be taken all the same
    name = name.replace("/{outside}", str(tmp_path / "o/outside"))
    if wrong == "a folder":
        for folder in ("set", "set/part", "set/images/7", "set/source_image", "."):
            for end in ("", "_input_raw.jpg"):
                (inner / folder / f"folder{end}").mkdir(parents=True, exist_ok=True)
    made = WAYS[way](inner, name)
    if wrong == "the root's" and way in FREE:
        assert np.array_equal(imported(made, tmp_path / "out"), PICTURE)
        return
    if wrong == "the root's" and way == "magicbrush":
        expected = "no such file"  # its names stand behind the session's id
    assert expected in refusal(made, tmp_path / "out")


def test_links_are_followed_and_another_folder_can_be_named(tmp_path: Path) -> None:
    """A set's large folders often lie elsewhere; who made the link is not who wrote the set's
    names."""
    put(tmp_path / "disk/b.png", encoded(picture()))
    way = imgedit(tmp_path, "linked/b.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "disk")
    assert np.array_equal(imported(way, tmp_path / "out"), PICTURE)
    put(tmp_path / "secret.png", encoded(picture()))
    way = imgedit(tmp_path, "linked/../secret.png")  # the operating system would go up from disk/
    assert "set/secret.png: no such file" in refusal(way, tmp_path / "other")
    names = {"up": "../disk/b.png", "root": str(tmp_path / "disk/b.png")}
    for out, name in names.items():
        put(tmp_path / "images/a.png", encoded(picture()))
        put(tmp_path / "images/b.png", P3)
        way = imgedit(tmp_path, name)  # its own b.png is found by the file's name alone
        (_, second) = load_sessions(
            import_sessions(way.form, way.source, tmp_path / out, images=tmp_path / "images")
        )
        assert not np.array_equal(second.image, PICTURE)


@pytest.mark.parametrize(
    "wrong", ["16-bit RGB", "16-bit TIFF", "CMYK", "an animated PNG", "80 million pixels", "size"]
)
def test_what_the_header_tells_is_refused_without_decoding(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JPEG", exif=exif) if wrong == "size" else CONTENTS[wrong][0]()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(DataError) as caught:
        decode_image(data, (4, 4))
    if wrong == "size":  # as it is seen
        assert str(caught.value).startswith(
            "8×6 pixels, height × width (accepted: 4×4; --data.resize crop or stretch"
        )


def test_the_depth_of_an_avif_is_in_its_configuration() -> None:
    """Pillow writes none of more than 8 bits, and reads them as if they had 8."""
    files = [b"\0\0\0\x0cav1C\x81\x04" + flags + b"\0" for flags in (b"\x0c", b"\x4c", b"\x6c")]
    assert [images._bits(SimpleNamespace(format="AVIF"), data) for data in files] == [8, 10, 12]  # type: ignore[arg-type]


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    put(tmp_path / "a.png", encoded(picture()))
    with pytest.raises(DataError, match=r"a\.png: \d+ bytes \(accepted: up to 100\)$"):
        images.read_image(tmp_path / "a.png")


def test_a_file_that_must_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "os", SimpleNamespace(stat=denied))
    with pytest.raises(DataError, match="a.png: cannot be read: Permission denied$"):
        images.read_image(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------ colours

COLOURS = np.stack(
    np.meshgrid(*[np.array([0, 13, 64, 128, 191, 240, 255], np.uint8)] * 3), -1
).reshape(7, 49, 3)
GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def alpha(pixels: np.ndarray) -> np.ndarray:
    return np.where(np.arange(pixels[..., 0].size).reshape(pixels.shape[:2]) % 2, 255, 51)[
        ..., None
    ].astype(np.uint8)


def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return colours * (opacity / 255) + 255 - opacity


def with_alpha(space: str) -> bytes:
    return encoded(
        Image.fromarray(np.concatenate([COLOURS, alpha(COLOURS)], 2)), icc_profile=profile(space)
    )


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(COLOURS), icc_profile=profile("display-p3"), exif=exif)


@functools.cache
def palette() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(COLOURS).quantize(64)
    return encoded(image, icc_profile=profile("adobe-rgb")), np.asarray(image.convert("RGB"))


def srgb_of_grey(gamma: float) -> np.ndarray:
    v = (GREYS / 255) ** gamma
    coded = 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)
    return np.repeat(coded[..., None], 3, 2)


def plain(pixels: np.ndarray, space: str | None, form: str = "PNG", **options: Any) -> bytes:
    given = {} if space is None else {"icc_profile": profile(space)}
    return encoded(Image.fromarray(pixels), form, **given, **options)


# Within a level: LittleCMS computes 8-bit pixels in fixed point. An image that is in sRGB stays as
# it is.
RIGHT: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray], float]] = {
    "no profile": (lambda: plain(COLOURS, None), lambda: COLOURS, 0),
    "sRGB": (lambda: plain(COLOURS, "srgb"), lambda: COLOURS, 0),
    "LittleCMS's sRGB": (
        lambda: encoded(
            Image.fromarray(COLOURS),
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
        lambda: COLOURS,
        0,
    ),
    "Display P3": (lambda: plain(COLOURS, "display-p3"), lambda: in_srgb("display-p3", COLOURS), 1),
    "Adobe RGB": (lambda: plain(COLOURS, "adobe-rgb"), lambda: in_srgb("adobe-rgb", COLOURS), 1),
    "Display P3 in WebP": (
        lambda: plain(COLOURS, "display-p3", "WEBP", lossless=True),
        lambda: in_srgb("display-p3", COLOURS),
        1,
    ),
    "Adobe RGB in TIFF": (
        lambda: plain(COLOURS, "adobe-rgb", "TIFF"),
        lambda: in_srgb("adobe-rgb", COLOURS),
        1,
    ),
    "transparent Display P3": (
        lambda: with_alpha("display-p3"),
        lambda: over_white(in_srgb("display-p3", COLOURS), alpha(COLOURS)),
        1.5,
    ),
    "turned Display P3": (turned, lambda: np.rot90(in_srgb("display-p3", COLOURS), -1), 1),
    "a palette of Adobe RGB": (lambda: palette()[0], lambda: in_srgb("adobe-rgb", palette()[1]), 1),
    "grey of gamma 1.8": (lambda: plain(GREYS, "grey"), lambda: srgb_of_grey(1.8), 1),
    "transparent grey of gamma 1.8": (
        lambda: encoded(
            Image.merge("LA", [Image.fromarray(GREYS), Image.new("L", (16, 16), 51)]),
            icc_profile=profile("grey"),
        ),
        lambda: over_white(srgb_of_grey(1.8), np.array(51)),
        1.5,
    ),
    "grey with a profile of colours": (
        lambda: plain(GREYS, "adobe-rgb"),
        lambda: in_srgb("adobe-rgb", np.repeat(GREYS[..., None], 3, 2)),
        1,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("right", RIGHT)
def test_colours_arrive_in_srgb(way: str, right: str, tmp_path: Path) -> None:
    """Against the standards' chromaticities and transfer curves, worked out above without any ICC
    code."""
    data, expected, tolerance = (part() if callable(part) else part for part in RIGHT[right])
    given = imported(WAYS[way](tmp_path, data), tmp_path / "out")
    assert given.shape == expected.shape and np.abs(given - expected).max() <= tolerance + (
        0.5 if tolerance else 0
    )


def test_the_oracle_of_colours_has_published_numbers() -> None:
    """Linear sRGB of Display P3's primaries: (1.2249, -0.0420, -0.0197) is red (CSS Color 4's
    sample code, 4 places); XYZ of Adobe RGB's, as its specification of 2005 prints them."""
    red = np.linalg.inv(to_xyz("srgb")) @ to_xyz("display-p3")[:, 0]
    assert np.abs(red - [1.2249, -0.0420, -0.0197]).max() < 1e-4
    printed = [
        [0.57667, 0.18556, 0.18823],
        [0.29734, 0.62736, 0.07529],
        [0.02703, 0.07069, 0.99134],
    ]
    assert np.abs(to_xyz("adobe-rgb") - printed).max() < 1e-4
    assert (
        np.abs(in_srgb("display-p3", COLOURS) - COLOURS).max() > 50
    )  # which no conversion would leave


# ------------------------------------------------------------------------------------------ mutants

WEIRD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**60,
    "",
    " ",
    "\0",
    "a\nb",
    "\u202e",
    "\x1b[31m",
    "é" * 400,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": 1},
    "<|im_end|>",
    "data:,",
    "../a.png",
    "/",
    ".",
    "a" * 5000,
    [1] * 50,
    {"instruction": "x"},
    "cm",
)


def mutated(raw: bytes, pick: random.Random) -> bytes:
    """One to three changes: of bytes, of lines, or of a value somewhere inside of a line's JSON."""
    for _ in range(pick.randint(1, 3)):
        lines = raw.split(b"\n")
        at, line = pick.randrange(len(raw) or 1), pick.randrange(len(lines))
        kind = pick.randrange(8)
        if kind == 0:
            raw = raw[:at] + bytes([pick.randrange(256)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at] + raw[at + pick.randint(1, 40) :]
        elif kind == 2:
            raw = (
                raw[:at]
                + pick.choice(
                    [b"\xff", b"\0", b"\r", b'"', b"{", b"]", b"\\ud800", b"\xe2\x80\xa8", b"NaN"]
                )
                + raw[at:]
            )
        elif kind == 3:
            raw = b"\n".join([*lines[:line], lines[line], *lines[line:]])
        elif kind == 4:
            raw = b"\n".join(
                [*lines[:line], lines[line][: pick.randint(0, 30)], *lines[line + 1 :]]
            )
        else:
            try:
                value = json.loads(lines[line])
            except ValueError:
                continue
            lines[line] = json.dumps(changed(value, pick)).encode()
            raw = b"\n".join(lines)
    return raw


def changed(value: Any, pick: random.Random) -> Any:
    """The JSON value with something in it replaced, left out or added."""
    if not isinstance(value, (dict, list)) or not value or pick.random() < 0.2:
        return pick.choice(WEIRD)
    value = value.copy()
    key = pick.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = pick.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[pick.choice(["", "x\ny", "turn", "meta", "intent", "a" * 400])] = pick.choice(WEIRD)
    elif kind == 1:
        value.append(pick.choice(WEIRD))
    else:
        value[key] = changed(value[key], pick)
    return value


@pytest.mark.parametrize("part", ["some", pytest.param("all", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "way", [sessions, mice, edival, imgedit, imgedit_basic, imgedit_training, magicbrush]
)
def test_a_mutated_list_loads_or_is_one_line(
    way: Callable[[Path, Bad], Way], part: str, tmp_path: Path
) -> None:
    """Of sessions.jsonl 200 and of each set's list 40; of all, 2,000 and 400."""
    made = way(tmp_path, encoded(picture()))
    file = (
        made.source
        if made.source.is_file()
        else next(p for p in made.source.iterdir() if ".json" in p.suffix)
    )
    original, pick, refused = file.read_bytes(), random.Random(part + way.__name__), 0
    count = (40 if part == "some" else 400) * (5 if way is sessions else 1)
    with mock.patch("os.fsync"):
        for number in range(count):
            file.write_bytes(mutated(original, pick))
            out = tmp_path / f"out{number % 2}"
            try:
                import_sessions(made.form, made.source, out)
            except UserError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 2500, file.read_bytes()
                if way is sessions:
                    assert "leads out" in str(error) or validate(made.source)[0] == str(error)
            else:
                assert validate(out) == []
    assert count / 4 < refused < count  # both happen


@pytest.mark.parametrize("column", [b"input_images", b"prompt"])
def test_a_broken_parquet_file_is_one_line(column: bytes, tmp_path: Path) -> None:
    """pyarrow gives it as anything; here as a UnicodeDecodeError, and as a name with an escape
    sequence."""
    for byte in (b"\xff", b"\x1b"):
        made = imgedit_parquet(tmp_path, encoded(picture()))
        made.source.write_bytes(made.source.read_bytes().replace(column, byte + column[1:]))
        with pytest.raises(DataError) as error:
            import_sessions(made.form, made.source, tmp_path / "out")
        assert str(error.value).isprintable() and str(error.value).startswith(f"{made.source}: ")


@pytest.mark.parametrize("part", ["__iter__", "__getitem__"])
def test_a_broken_dataset_is_one_line(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that can be opened: its rows, or a row's image, cannot be read."""
    made = dataset_of_paths(tmp_path, encoded(picture()))
    where = made.source if part == "__iter__" else f"{made.source}: row 0: image"

    def broken(*given: Any) -> Any:
        raise ValueError("Buffer #0 too small\nand more")

    monkeypatch.setattr(pytest.importorskip("datasets").Dataset, part, broken)
    with pytest.raises(DataError) as error:
        import_sessions(made.form, made.source, tmp_path / "out")
    assert str(error.value) == f"{where}: cannot be read: Buffer #0 too small and more"
