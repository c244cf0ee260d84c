"""Text in images: RapidOCR itself on drawn words, and what is made of its answers."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from editr2.errors import ConfigError
from editr2.rewards import text
from editr2.rewards.geometry import Box
from editr2.rewards.text import Line, Reader, ReaderError, contains, reading_order


def _drawn(words: dict[tuple[int, int], str], size: int = 256) -> np.ndarray:
    image = Image.new("RGB", (size, size), (230, 235, 220))
    draw = ImageDraw.Draw(image)
    for place, word in words.items():
        draw.text(place, word, font=ImageFont.load_default(size=34), fill=(20, 20, 90))
    return np.asarray(image)


@pytest.fixture(scope="module")
def reader() -> Reader:
    pytest.importorskip("rapidocr", reason="no RapidOCR: pip install 'editr2[judges]'")
    return Reader()


def test_drawn_words_are_read(reader: Reader) -> None:
    image = _drawn({(20, 30): "OPEN", (60, 170): "Summer 78"})
    lines = reader.read(image)
    assert [line.text for line in lines] == ["OPEN", "Summer 78"]
    assert contains(lines, "open summer 78") and not contains(lines, "closed")
    first, second = (line.box for line in lines)
    assert first.y1 < 0.4 < 0.6 < second.y0 and 0.04 < first.x0 < 0.15
    # Of the lower half, with boxes of the whole.
    lower = reader.read(image, Box(0, 0.5, 1, 1))
    assert [line.text for line in lower] == ["Summer 78"]
    assert np.abs(np.subtract(lower[0].box, second)).max() < 0.03


def test_an_image_without_text(reader: Reader) -> None:
    assert reader.read(np.full((64, 64, 3), 128, np.uint8)) == []
    assert reader.read(_drawn({(20, 30): "OPEN"}), Box(0.5, 0.5, 0.5, 0.9)) == []  # an empty part


def test_two_threads_read_the_same(reader: Reader) -> None:
    image = _drawn({(20, 30): "OPEN"})
    alone = reader.read(image)
    together: list[object] = [None, None]

    def read(i: int) -> None:
        together[i] = reader.read(image)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone, alone]


class _Engine:
    """RapidOCR's manner, with an answer of ours. busy: how many calls at once there were."""

    answer: object = None
    given: list[np.ndarray]
    busy = most = 0

    def __init__(self, params: dict) -> None:
        self.params = params
        type(self).made = [*getattr(type(self), "made", []), self]

    def __call__(self, image: np.ndarray) -> object:
        cls = type(self)
        cls.given = [image]
        cls.busy += 1
        cls.most = max(cls.most, cls.busy)
        time.sleep(0.02)
        cls.busy -= 1
        if isinstance(cls.answer, Exception):
            raise cls.answer
        return cls.answer


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[_Engine]:
    mine = type("Engine", (_Engine,), {})
    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=mine))
    return mine


def _answer(*lines: tuple[str, float], boxes: object = None) -> SimpleNamespace:
    box = [[4.0, 2.0], [12.0, 2.0], [12.0, 6.0], [4.0, 6.0]]
    return SimpleNamespace(
        txts=tuple(text for text, _ in lines),
        scores=tuple(score for _, score in lines),
        boxes=np.array([box] * len(lines)) if boxes is None else boxes,
    )


IMAGE = np.zeros((20, 40, 3), np.uint8)


def test_boxes_and_channels(engine: type[_Engine]) -> None:
    engine.answer = _answer(("a", 0.9), ("unsure", 0.49), (" ", 0.9))
    image = IMAGE.copy()
    image[..., 0] = 200
    assert Reader().read(image) == [Line("a", Box(0.1, 0.1, 0.3, 0.3), 0.9)]
    assert engine.given[0][0, 0].tolist() == [0, 0, 200]  # BGR
    assert Reader().read(image, Box(0.5, 0.5, 1, 1)) == [Line("a", Box(0.6, 0.6, 0.8, 0.8), 0.9)]
    assert engine.given[0].shape == (10, 20, 3)


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("out of\nmemory"),
        SimpleNamespace(),
        SimpleNamespace(txts=("a",), scores=None, boxes=None),
        _answer(("a", 0.9), boxes=np.zeros((2, 4, 2))),
    ],
)
def test_a_failure_is_no_blank_image(engine: type[_Engine], answer: object) -> None:
    engine.answer = answer
    with pytest.raises(ReaderError, match="^reading text: [^\n]+$"):
        Reader().read(IMAGE)


@pytest.mark.parametrize("image", [np.zeros((20, 40), np.uint8), np.zeros((20, 40, 3), np.float32)])
def test_what_is_no_image(engine: type[_Engine], image: np.ndarray) -> None:
    with pytest.raises(ReaderError, match="no RGB image"):
        Reader().read(image)


@pytest.mark.parametrize("engines", [1, 2])
def test_as_many_at_once_as_there_are_engines(engine: type[_Engine], engines: int) -> None:
    engine.answer = _answer(("a", 0.9))
    reader = Reader(engines=engines, threads=3)
    threads = [threading.Thread(target=reader.read, args=(IMAGE,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.most == engines == len(engine.made)
    assert engine.made[0].params["EngineConfig.onnxruntime.intra_op_num_threads"] == 3


def test_without_rapidocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"pip install 'editr2\[judges\]'"):
        Reader().load()


@pytest.mark.parametrize("given", [{"engines": 0}, {"threads": 0}, {"least": 1.5}])
def test_what_a_reader_accepts(given: dict) -> None:
    with pytest.raises(ConfigError, match="accepted: "):
        Reader(**given)


def _line(text: str, x: float, y: float) -> Line:
    return Line(text, Box(x, y, x + 0.2, y + 0.1), 1.0)


def test_the_order_of_reading() -> None:
    lines = [_line("d", 0.5, 0.5), _line("c", 0.1, 0.52), _line("b", 0.6, 0.1), _line("a", 0, 0.14)]
    assert text.joined(reading_order(lines)) == "a b c d"


@pytest.mark.parametrize(
    "wanted, there",
    [
        ("good  MORNING", True),
        ("morning\nsun", True),
        ("GRÜSSE", True),  # of Grüße
        ("goodmorning", False),
        ("sun good", False),
    ],
)
def test_containment(wanted: str, there: bool) -> None:
    lines = [_line("Good morning", 0, 0), _line(" sun Grüße", 0, 0.5)]
    assert contains(lines, wanted) is there


def test_a_blank_text_is_not_looked_for() -> None:
    with pytest.raises(ValueError, match="blank"):
        contains([_line("a", 0, 0)], " \n")
