"""What is written in an image: RapidOCR on the CPU. Its weights come with its wheel, so that no
network is needed. 1 to 3 seconds an image of 512² on one thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from editr2.errors import ConfigError, UserError, one_line
from editr2.rewards.geometry import Box

INSTALL = "pip install 'editr2[judges]'"


class ReaderError(UserError):
    """An image could not be read. Never the same as an image without text."""


class Line(NamedTuple):
    """One line of text. confidence: in [0, 1]."""

    text: str
    box: Box
    confidence: float


class Reader:
    """Reads text in images. May be called from many threads.

    Args:
        engines: how many images are read at once, with an engine for each. All others wait.
        threads: of each engine.
        least: lines of less confidence are left out.
    """

    def __init__(self, *, engines: int = 1, threads: int = 1, least: float = 0.5) -> None:
        if min(engines, threads) < 1 or not 0 <= least <= 1:
            raise ConfigError(
                f"text reader: engines {engines}, threads {threads}, least {least:g} (accepted: at "
                f"least 1, at least 1, 0 to 1)"
            )
        self.engines, self.threads, self.least = engines, threads, least
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._made = 0

    def load(self) -> None:
        """Makes the first engine. Raises `ConfigError` where RapidOCR is not installed."""
        with self._engine():
            pass

    def read(self, image: np.ndarray, box: Box | None = None) -> list[Line]:
        """The lines of an image or of a part of it, in reading order; [] where there is no text.
        image: uint8 [H, W, 3] of RGB. The boxes of the lines are of the whole image.

        Raises `ReaderError` where reading fails.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ReaderError(f"reading text: {image.dtype} {list(image.shape)}, no RGB image")
        height, width = image.shape[:2]
        left, top, right, bottom = (box or Box(0, 0, 1, 1)).pixels(height, width)
        if right <= left or bottom <= top:
            return []
        # RapidOCR takes arrays for BGR, as OpenCV has them.
        part = np.ascontiguousarray(image[top:bottom, left:right, ::-1])
        with self._engine() as engine:
            try:
                said = engine(part)
                texts, scores, corners = said.txts, said.scores, said.boxes
            except Exception as error:
                raise ReaderError(f"reading text: {one_line(error, kind=True)}") from error
        if texts is None:  # of a blank image, all three
            return []
        if scores is None or corners is None or not len(texts) == len(scores) == len(corners):
            raise ReaderError("reading text: texts, confidences and boxes are not as many")
        lines = []
        for text, score, points in zip(texts, scores, np.asarray(corners, float), strict=True):
            (x0, y0), (x1, y1) = points.min(0), points.max(0)
            where = Box.of(
                [
                    (left + x0) / width,
                    (top + y0) / height,
                    (left + x1) / width,
                    (top + y1) / height,
                ]
            )
            if text.strip() and score >= self.least:
                lines.append(Line(text, where, float(score)))
        return reading_order(lines)

    @contextmanager
    def _engine(self) -> Iterator[Any]:
        with self._lock:
            if self._free.empty() and self._made < self.engines:
                self._free.put(self._new())
                self._made += 1
        engine = self._free.get()
        try:
            yield engine
        finally:
            self._free.put(engine)

    def _new(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ConfigError(
                f"reading text: {one_line(error, kind=True)} (accepted: RapidOCR; {INSTALL})"
            ) from error
        settings = {
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # `least` is held against it here
            "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        try:
            return RapidOCR(params=settings)
        except Exception as error:
            raise ConfigError(f"reading text: RapidOCR: {one_line(error, kind=True)}") from error


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Rows from top to bottom, each from left to right. A line is of a row if the middle of its
    height is within that of the row's first."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box.centre[1]):
        if rows and line.box.centre[1] < rows[-1][0].box.y1:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box.x0)]


def joined(lines: Sequence[Line]) -> str:
    """All that is written, as one text."""
    return " ".join(line.text for line in lines)


def contains(lines: Sequence[Line], wanted: str) -> bool:
    """Whether the text is to be read: within the lines joined in their order, whatever the case and
    the white space. Raises ValueError for a blank text, which is in everything."""
    if not wanted.strip():
        raise ValueError("a blank text (accepted: one with letters)")
    return _plain(wanted) in _plain(joined(lines))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
