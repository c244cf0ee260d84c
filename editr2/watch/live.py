"""A run's curves in a notebook, drawn anew as rows come."""

from __future__ import annotations

import html
import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from editr2.errors import ConfigError
from editr2.run.tracking import Row, duration
from editr2.watch.follow import Seen
from editr2.watch.view import curves

COLOURS = (
    *("#2b7fc3", "#cf6a2c", "#2f9e7a", "#ad5a9a", "#8f8a1f"),
    *("#7b8490", "#c9487f", "#97704e", "#2f8ea3"),
)
"""As on a run's report, between its colours on white and on black: a notebook is either."""
DASHES = ("", "6 4", "2 3", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BELOW = 300, 150, 42, 18
CHARTS = 6
NONE = -9.0
"""Where a logarithm has an exact zero."""


class Live:
    """What `editr2.train(config, observer=editr2.Live(config))` draws below a notebook's cell:
    progress, the time left, curves and the newest evaluation.

    config: of the run, for the number of its iterations. charts: at most so many. every: seconds
    between two drawings, at least. display: in place of IPython's: called with this object and
    `display_id=True`, returns what has `update`.

    Raises `ConfigError` without IPython.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        charts: int = CHARTS,
        every: float = 1.0,
        display: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if display is None:
            try:
                display = importlib.import_module("IPython.display").display
            except ImportError as error:
                raise ConfigError(
                    "Live: needs IPython (accepted: in a notebook, or with display=; in a terminal "
                    "the run says its progress itself)"
                ) from error
        self.seen = Seen()
        self._planned = None if config is None else int(config.train.iterations)
        self._charts, self._every = charts, every
        self._display, self._clock = display, clock
        self._handle: Any = None
        self._drawn = self._came = -math.inf

    def __call__(self, row: Row) -> None:
        """Takes a row of `metrics.jsonl`."""
        now, trained = self._clock(), row.get("event") == "train"
        gap = now - self._came if trained and math.isfinite(self._came) else None
        self._came = now if trained else self._came
        self.seen.take(row, gap)
        if trained and self.seen.done != self._planned and now - self._drawn < self._every:
            return
        self._drawn = now
        if self._handle is None:
            self._handle = self._display(self, display_id=True)
        else:
            self._handle.update(self)

    def __repr__(self) -> str:
        done, planned = self.seen.done, self._planned
        parts = [f"iteration {done}" + (f" of {planned}" if planned else "")]
        if planned and self.seen.pace.seconds and done < planned:
            parts.append(f"{duration(self.seen.pace.left(planned - done))} left")
        if self.seen.train:
            newest = self.seen.train[max(self.seen.train)]
            for name in ("reward", "loss"):
                if isinstance(value := newest.get(name), int | float):
                    parts.append(f"{name} {value:.3g}")
        return ", ".join(parts)

    def _repr_html_(self) -> str:
        drawn = "".join(map(_svg, curves(self.seen)[: self._charts]))
        alarms = [
            text
            for row in self.seen.of("eval")[-1:]
            for text in dict(row.get("alarms") or {}).values()
        ]
        said = "".join(f"<p><b>{html.escape(str(text))}</b></p>" for text in alarms)
        style = "display:flex;flex-wrap:wrap;gap:12px"
        return (
            f'<div><p>{html.escape(repr(self))}</p>{said}<div style="{style}">{drawn}</div></div>'
        )


def _svg(chart: Mapping[str, Any]) -> str:
    """A chart without scripts, which notebooks keep out."""
    lines = [(one, [_lifted(y, chart["log"]) for y in one["y"]]) for one in chart["series"]]
    reach = [y for _, ys in lines for y in ys if y is not None]
    low, high = min(reach, default=0.0), max(reach, default=1.0)
    x = chart["x"]
    said = html.escape(chart["title"])
    parts = [f'<text x="0" y="12" font-weight="600">{said}</text>']
    left = float(LEFT)
    for one, ys in lines:
        colour, dash = COLOURS[one["colour"] % len(COLOURS)], DASHES[one["dash"] % len(DASHES)]
        last = next((y for y in reversed(one["y"]) if y is not None), None)
        label = html.escape(f"{one['label']} {_said(last)}".strip())
        parts.append(f'<text x="{left:.0f}" y="27" fill="{colour}">{label}</text>')
        left += 12 + 6.2 * len(label)
        for points in _pieces(x, ys, low, high):
            at = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            stroke = f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="1.8"'
            parts.append(f'<polyline points="{at}" fill="none" {stroke}/>')
            if len(points) == 1:
                a, b = points[0]
                parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>')
    bottom = HEIGHT - BELOW
    for value, y in ((high, 38), (low, bottom)):
        text = f"{value:.2g}"
        if chart["log"]:
            text = "0" if value == NONE else f"1e{value:.0f}"
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{text}</text>')
    parts.append(f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH}" y2="{bottom}" stroke="#8885"/>')
    for value, x_at, anchor in ((x[0], LEFT, "start"), (x[-1], WIDTH, "end")):
        at = f'x="{x_at}" y="{HEIGHT - 4}" text-anchor="{anchor}"'
        parts.append(f"<text {at}>{value:g}</text>")
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = 'font-family="sans-serif" font-size="11" fill="currentColor"'
    return f'<svg {size} {font} role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _lifted(value: float | None, log: bool) -> float | None:
    if value is None or not log:
        return value
    return math.log10(value) if value > 0 else NONE


def _pieces(
    x: Sequence[float], ys: Iterable[float | None], low: float, high: float
) -> list[list[tuple[float, float]]]:
    """Of a line, what lies between its gaps, in pixels."""
    width, height = WIDTH - LEFT - 4, HEIGHT - BELOW - 38
    found: list[list[tuple[float, float]]] = [[]]
    for at, y in zip(x, ys, strict=True):
        if y is None:
            found.append([])
            continue
        across = (at - x[0]) / ((x[-1] - x[0]) or 1)
        up = (y - low) / ((high - low) or 1)
        found[-1].append((LEFT + across * width, 38 + (1 - up) * height))
    return [points for points in found if points]


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
