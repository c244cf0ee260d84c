"""The page's two plots as standalone SVG, coloured for light and dark readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import escape

from editr2.report.charts import value_range
from editr2.report.intervals import Interval

LIGHT = ("#0067ad", "#c2500f", "#007a5a", "#9b3d86", "#6f6a00", "#5b6470")
DARK = ("#6db6f2", "#f29a5b", "#4fc7a1", "#dd92cb", "#cfc44a", "#a9b3bf")
WIDTH = 860


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) inside [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def label(value: float) -> str:
    """A tick's number, short."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 6):g}"


def _style() -> str:
    def colours(page: str, ink: str, soft: str, rule: str, series: Sequence[str]) -> str:
        text = (
            f".page{{fill:{page}}}.ink{{fill:{ink}}}.soft{{fill:{soft}}}"
            f".grid{{stroke:{rule}}}.zero{{stroke:{soft}}}"
        )
        return text + "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(series))

    light = colours("#ffffff", "#1b1d20", "#575d65", "#dcdcd5", LIGHT)
    dark = colours("#1b1e22", "#e9e9e6", "#a5acb5", "#33383f", DARK)
    return (
        "<style>text{font:12px ui-sans-serif,system-ui,'Noto Sans','DejaVu "
        "Sans',Helvetica,Arial,sans-serif}"
        ".name{font-weight:600}.line,.bar,.grid,.zero{fill:none}.line{stroke-width:2;stroke-linejoin:round}"
        f".bar{{stroke-width:1.5}}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"
    )


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img" '
        f'aria-label="{escape(description)}">{_style()}<rect class="page" width="100%" '
        f'height="100%"/>' + "".join(parts) + "</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


@dataclass(frozen=True)
class Series:
    """One arm: an interval a turn. colour: its place in the palette, the same in all panels."""

    title: str
    turns: Sequence[Interval]
    colour: int
    dashed: bool = False


TOP, BOTTOM, LEFT, BELOW = 34, 300, 42, 40
"""Of the plot by turn: the ends of a panel's y axis, its space beside the x axis, and below it."""
BESIDE = 2
"""Panels in a row."""
LETTER, BOLD = 6.7, 7.2
"""Of most fonts, the width of a letter at most, on average."""


def _width(texts: Iterable[str], letter: float) -> float:
    """Room for the longest of some labels."""
    return letter * max(map(len, texts)) + 10


@dataclass(frozen=True)
class _Panel:
    """Where the values of a panel lie. x: the ends of its axis; y: the values at its ends; count:
    the turns; down: of its row."""

    x: tuple[float, float]
    y: tuple[float, float]
    count: int
    down: float = 0.0

    def px(self, turn: int) -> float:
        left, right = self.x
        return left + (right - left) * (turn + 0.5) / self.count

    def py(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / (high - low) * (BOTTOM - TOP)

    @property
    def bottom(self) -> float:
        return self.down + BOTTOM

    def axes(self, title: str) -> list[str]:
        left, right = self.x
        parts = [_text(left, self.down + 18, title, "ink name")]
        for tick in ticks(*self.y):
            y = self.py(tick)
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            parts.append(_text(left - 6, y + 4, label(tick), "soft", "end"))
        for turn in range(self.count):
            parts.append(
                _text(self.px(turn), self.bottom + 18, f"turn {turn + 1}", "soft", "middle")
            )
        return parts

    def line(self, series: Series, shift: float) -> list[str]:
        """Means by turn, each with its interval."""
        points = [(self.px(t) + shift, self.py(i.mean)) for t, i in enumerate(series.turns)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts = [f'<path class="line s{series.colour}"{dash} d="M{path}"/>']
        for (x, y), i in zip(points, series.turns, strict=True):
            bar = f"M{x:.1f} {self.py(i.low):.1f}V{self.py(i.high):.1f}"
            parts.append(f'<path class="bar s{series.colour}" d="{bar}"/>')
            parts.append(f'<circle class="f{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
        return parts


def lines_by_turn(panels: Sequence[tuple[str, Sequence[Series]]], name: str) -> str:
    """A panel for each group of arms, on one scale: means by turn with their intervals, side by
    side within a turn."""
    every = [s for _, of in panels for s in of]
    scale = value_range([y for s in every for i in s.turns for y in (i.low, i.high)])
    count = max(len(s.turns) for s in every)
    beside = min(BESIDE, len(panels))
    width, right = WIDTH / beside, _width((s.title for s in every), BOLD)
    height = -(-len(panels) // beside) * (BOTTOM + BELOW)
    parts = []
    for p, (title, series) in enumerate(panels):
        row, column = divmod(p, beside)
        ends_at = (column * width + LEFT, (column + 1) * width - right)
        panel = _Panel(ends_at, scale, count, row * (BOTTOM + BELOW))
        parts += panel.axes(title)
        for k, s in enumerate(series):
            parts += panel.line(s, shift=(k - (len(series) - 1) / 2) * 7)
        ends = sorted(((panel.py(s.turns[-1].mean), s) for s in series), key=lambda end: end[0])
        parts += _end_labels(ends, panel.x[1] + 4, panel.bottom)
    title = f"{name}, mean with its 95 % interval"
    parts.append(_text(WIDTH / 2, height - 6, title, "soft", "middle"))
    said = "; ".join(f"{s.title} {s.turns[-1].mean:.3f}" for s in every)
    return _svg(parts, height, f"{name} by turn. At the last turn: {said}.")


def _end_labels(ends: Sequence[tuple[float, Series]], x: float, bottom: float) -> list[str]:
    """Names at the right edge, pushed apart where lines end close together."""
    gap = 15.0
    ys = [y for y, _ in ends]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + gap)
    limit = bottom
    for i in reversed(range(len(ys))):
        ys[i] = min(ys[i], limit)
        limit = ys[i] - gap
    return [
        _text(x, y + 4, s.title, f"f{s.colour} name") for y, (_, s) in zip(ys, ends, strict=True)
    ]


@dataclass(frozen=True)
class Difference:
    """A row of the forest. mark: the difference that was asked for, if not 0."""

    text: str
    interval: Interval
    verdict: str
    mark: float = 0.0


def forest(rows: Sequence[Difference], name: str) -> str:
    """Differences with their intervals, one a row; small dots are the single seeds."""
    left, right, top, step = _width((row.text for row in rows), LETTER) + 12, 240, 14, 30
    bottom = top + step * len(rows)
    values = [0.0]
    for row in rows:
        values += [row.interval.low, row.interval.high, *row.interval.by_seed, row.mark]
    low, high = value_range(values, unit=False)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - right - left)

    parts = []
    for tick in ticks(low, high):
        kind = "grid" if tick else "zero"
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} {top}V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 16, label(tick), "soft", "middle"))
    for k, row in enumerate(rows):
        y = top + (k + 0.5) * step
        if row.mark:
            mark = f"M{x(row.mark):.1f} {y - 13:.1f}v26"
            parts.append(f'<path class="zero" stroke-dasharray="3 3" d="{mark}"/>')
        parts.append(_text(left - 12, y + 4, row.text, "ink", "end"))
        parts += _whisker(row, x, y)
        verdict = f"{row.interval.mean:+.3f}  {row.verdict}".replace("-", "−")
        parts.append(_text(WIDTH - right + 12, y + 4, verdict, "ink"))
    parts.append(_text(x((low + high) / 2), bottom + 34, name, "soft", "middle"))
    said = "; ".join(f"{r.text} {r.interval.mean:+.3f} ({r.verdict})" for r in rows)
    return _svg(parts, bottom + 44, f"{name}. {said}.")


def _whisker(row: Difference, x: Callable[[float], float], y: float) -> list[str]:
    """One difference: its interval, its seeds, its mean."""
    i, colour = row.interval, _verdict_colour(row)
    parts = [f'<path class="bar s{colour}" d="M{x(i.low):.1f} {y:.1f}H{x(i.high):.1f}"/>']
    if len(i.by_seed) > 1:
        parts += [_dot(x(value), y + 7, 1.6, colour) for value in i.by_seed]
    return [*parts, _dot(x(i.mean), y, 4, colour)]


def _verdict_colour(row: Difference) -> int:
    """Its place in the palette: grey where the interval holds the mark, else by the side it is
    on."""
    if row.interval.low <= row.mark <= row.interval.high:
        return 5
    return 0 if row.interval.low > row.mark else 1


def _dot(x: float, y: float, radius: float, colour: int) -> str:
    return f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'
