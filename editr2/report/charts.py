"""What the charts of pages show: plain numbers, which `templates/charts.js` draws with uPlot (MIT,
`vendor/`) and puts into a table for whoever reads instead of looking.

uPlot: 51 kB without dependencies, where Chart.js has 200 and ECharts 1,000; canvas, so that a run
of 1,000 points stays quick; cursors that move together. It has no stacked areas and no dots
with bars over categories: `charts.js` draws those on its canvas.

A colour is one of the page's `--c0` to `--c8` and has one meaning on a page; what is of one meaning
(the turns of a score) differs in shade and dash, before and after in hollow and full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from markupsafe import Markup, escape

COLOURS = 9
"""`--c0` to `--c8` of report.css."""
POINTS = 1000
"""More iterations than this are drawn as means of neighbours: a screen has no more pixels, and the
page is to stay small."""

Kind = Literal["line", "points", "dot", "hollow", "area"]


@dataclass(frozen=True)
class Series:
    """y: by place of the chart's x, None where there is nothing. ends: of the bar at each. shade: 0
    to 1, how strong the colour is. dash: 0 is a whole line. smooth: what is drawn in front of `y`,
    which is then faint."""

    label: str
    y: Sequence[float | None]
    colour: int
    kind: Kind = "line"
    ends: Sequence[tuple[float, float] | None] = ()
    shade: float = 1.0
    dash: int = 0
    smooth: Sequence[float | None] = ()

    @property
    def empty(self) -> bool:
        return all(value is None for value in self.y)


@dataclass(frozen=True)
class Chart:
    """x: iterations, or names of categories. axis: what they are. range: of y. log: y is drawn
    by its logarithm, an exact 0 on a floor of its own. small: one of many. spans: lines go on over
    what is missing. note: below it."""

    title: str
    x: Sequence[float] | Sequence[str]
    series: Sequence[Series]
    range: tuple[float, float]
    axis: str = "iteration"
    note: str = ""
    log: bool = False
    small: bool = False
    spans: bool = False

    @property
    def data(self) -> dict[str, Any]:
        """For `charts.js`."""
        return {
            "title": self.title,
            "x": list(self.x),
            "axis": self.axis,
            "range": _short(self.range),
            "log": self.log,
            "small": self.small,
            "spans": self.spans,
            "series": [
                {
                    "label": series.label,
                    "colour": series.colour % COLOURS,
                    "kind": series.kind,
                    "shade": series.shade,
                    "dash": series.dash,
                    "y": _short(series.y),
                    "ends": [end and _short(end) for end in series.ends],
                    "smooth": _short(series.smooth),
                }
                for series in self.series
            ],
        }

    @property
    def summary(self) -> str:
        """In words."""
        parts = []
        for series in self.series:
            present = [value for value in series.y if value is not None]
            if isinstance(self.x[0], str):
                said = ", ".join(_said(self.x[i], series, i) for i in range(len(series.y)))
            elif present:
                said = f"{present[0]:.3g} at first, {present[-1]:.3g} at last"
            else:
                said = "nothing"
            parts.append(f"{series.label}: {said}" if series.label else said)
        return f"{self.title}. {'; '.join(parts)}."


def _said(category: object, series: Series, place: int) -> str:
    value = series.y[place]
    if value is None:
        return f"{category} –"
    end = series.ends[place] if place < len(series.ends) else None
    return f"{category} {value:.3f}" + (f" [{end[0]:.3f}, {end[1]:.3f}]" if end else "")


def _short(values: Iterable[float | None]) -> list[float | None]:
    """Five digits: a page has many numbers."""
    return [None if value is None else float(f"{value:.5g}") for value in values]


def line_chart(
    title: str,
    x: Sequence[float],
    series: Iterable[Series],
    *,
    window: int = 1,
    note: str = "",
    small: bool = False,
    spans: bool = False,
) -> Chart | None:
    """Over iterations, each smoothed over `window`. None where there is nothing to draw."""
    drawn = [one for one in series if not one.empty]
    if not drawn:
        return None
    size = math.ceil(len(x) / POINTS)
    at = _binned(x, size)
    found = []
    for one in drawn:
        y = _binned(one.y, size)
        front = smooth(y, window) if window > 1 else ()
        found.append(replace(one, y=y, smooth=front, ends=one.ends if size == 1 else ()))
    reach = [v for one in found for v in one.y if v is not None]
    reach += [end for one in found for pair in one.ends if pair for end in pair]
    if size > 1:
        note = f"{note} A point is the mean of {size} iterations.".strip()
    return Chart(title, at, found, value_range(reach), note=note, small=small, spans=spans)


def log_chart(title: str, x: Sequence[float], series: Series, note: str = "") -> Chart | None:
    """One series, as points: between an exact 0 and a rounding error there is no path that a line
    could stand for."""
    y = [value if value is not None and value >= 0 else None for value in series.y]
    chart = line_chart(title, x, [replace(series, y=y, kind="points")], note=note)
    if chart is None:
        return None
    y = list(chart.series[0].y)
    positive = [value for value in y if value]
    low = math.floor(math.log10(min(positive))) if positive else -8
    high = max(math.ceil(math.log10(max(positive))) if positive else -7, low + 1)
    floor = low - 1 if 0 in y else low
    return replace(chart, log=True, range=(floor, high))


def stacked(
    title: str, x: Sequence[float], phases: Sequence[tuple[str, Sequence[float]]], note: str = ""
) -> Chart | None:
    """What adds up to a whole, in shades of grey: phases are no scores."""
    if not x or not phases or not any(value for _, values in phases for value in values):
        return None
    size, count = math.ceil(len(x) / POINTS), len(phases)
    series = [
        Series(name, _binned(values, size), 5, "area", shade=1 - 0.85 * k / max(count, 2))
        for k, (name, values) in enumerate(phases)
    ]
    sums = [sum(value or 0.0 for value in at) for at in zip(*(s.y for s in series), strict=True)]
    return Chart(title, _binned(x, size), series, (0.0, 1.05 * max(sums)), note=note)


def dot_chart(
    title: str,
    categories: Sequence[str],
    series: Sequence[Series],
    y_range: tuple[float, float],
    axis: str,
    note: str = "",
) -> Chart | None:
    """Values with their bars, side by side within each category."""
    if not categories or all(one.empty for one in series):
        return None
    return Chart(title, list(categories), list(series), y_range, axis, note)


def of_turns(
    label: str, colour: int, by_turn: Sequence[Sequence[float | None]], **more: Any
) -> list[Series]:
    """A series a turn of one score: the last turn is whole and strong, the others paler and
    dashed. label: before the turn's number."""
    count = len(by_turn)
    return [
        Series(
            f"{label}{t + 1}",
            y,
            colour,
            shade=1.0 if count == 1 else round(0.45 + 0.55 * t / (count - 1), 2),
            dash=0 if t == count - 1 else 1 + (count - 2 - t) % 3,
            **{name: values[t] for name, values in more.items()},
        )
        for t, y in enumerate(by_turn)
    ]


def _binned(values: Sequence[Any], size: int) -> list[Any]:
    """Means of `size` neighbours; a mean of nothing is None."""
    if size <= 1:
        return list(values)
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    present = [[value for value in part if value is not None] for part in parts]
    return [sum(part) / len(part) if part else None for part in present]


def smooth(y: Sequence[float | None], window: int) -> list[float | None]:
    """Centred triangular mean over `window` (odd) neighbours; missing values carry no weight and
    stay missing."""
    half = window // 2
    out: list[float | None] = []
    for i, value in enumerate(y):
        if value is None:
            out.append(None)
            continue
        total = weight = 0.0
        for j in range(max(0, i - half), min(len(y), i + half + 1)):
            neighbour = y[j]
            if neighbour is not None:
                w = half + 1 - abs(i - j)
                total, weight = total + w * neighbour, weight + w
        out.append(total / weight)
    return out


def smoothing_window(iterations: int) -> int:
    """About a twelfth of the run, odd and at most 15; 1 (none) for short runs."""
    return 1 if iterations < 12 else min(max(3, iterations // 12 | 1), 15)


def value_range(values: Iterable[float], *, unit: bool = True) -> tuple[float, float]:
    """With padding; with `unit`, values within [0, 1] do not get an axis that leaves it."""
    values = list(values)
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * (abs(high) or 1.0)
    inside = unit and low >= 0 and high <= 1
    return (max(low - pad, 0.0), min(high + pad, 1.0)) if inside else (low - pad, high + pad)


def interval_bar(
    said: str, ends: tuple[float, float], value: float, scale: tuple[float, float]
) -> Markup:
    """A row of a forest plot: an interval and its value on a scale that rows share, with a mark at
    0. `up` or `down` where the whole interval lies on one side of 0."""
    low, high = scale
    span = high - low or 1.0

    def px(number: float) -> float:
        return 4 + 192 * (min(max(number, low), high) - low) / span

    side = "" if ends[0] <= 0 <= ends[1] else " up" if ends[0] > 0 else " down"
    return Markup(
        f'<svg viewBox="0 0 200 24" class="forest{side}" role="img" aria-label="{escape(said)}">'
        f'<path class="axis" d="M{px(0):.1f} 0V24"/>'
        f'<path class="whisker" d="M{px(ends[0]):.1f} 12H{px(ends[1]):.1f}"/>'
        f'<circle class="dot" cx="{px(value):.1f}" cy="12" r="4"/></svg>'
    )
