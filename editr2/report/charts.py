"""Inline SVG charts: plain functions from numbers to markup, coloured by the page's CSS (classes
c0..c5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 44, 10, 30
UNLABELLED = 12
"""Of `RIGHT`, where no line is labelled at its end."""
BINS = 72
"""More iterations than this share bars and tooltips: at 380 px they would be thinner than can be
seen or hit."""


@dataclass(frozen=True)
class Chart:
    """A chart with what stands around it."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int, str]] = ()
    """(label, colour, "dot", "hollow" or "bar")."""
    note: str = ""


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int


@dataclass(frozen=True)
class Dots:
    """Values with error bars over categories. ends: of the bars, where they are intervals rather
    than a standard error to each side."""

    label: str
    mean: Sequence[float | None]
    se: Sequence[float | None]
    colour: int
    hollow: bool = False
    ends: Sequence[tuple[float, float] | None] = ()

    def bar(self, place: int) -> tuple[tuple[float, float] | None, str]:
        """The ends of the bar at a category, and what is said of it."""
        if self.ends:
            interval = self.ends[place]
            said = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            return interval, said
        value, se = self.mean[place], self.se[place]
        if value is None or se is None:
            return None, ""
        return ((value - se, value + se) if se else None), f" ± {se:.3f}"


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


def value_range(values: Iterable[float], *, unit: bool = True) -> tuple[float, float]:
    """With padding; with `unit`, values within [0, 1] do not get an axis that leaves it."""
    values = list(values)
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * (abs(high) or 1.0)
    inside = unit and low >= 0 and high <= 1
    return (max(low - pad, 0.0), min(high + pad, 1.0)) if inside else (low - pad, high + pad)


class _Frame:
    """The plot area: scales, grid and axis."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        right: int = RIGHT,
        left: int = LEFT,
    ) -> None:
        self.x0, self.x1 = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y0, self.y1 = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        self.left, self.right = left, WIDTH - right
        self.top, self.bottom = TOP, HEIGHT - BOTTOM

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def py(self, y: float) -> float:
        return self.bottom - (y - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def points(
        self, x: Sequence[float], y: Sequence[float | None]
    ) -> list[tuple[float, float] | None]:
        """Where values lie; None where one is missing."""
        return [
            None if yi is None else (self.px(xi), self.py(yi)) for xi, yi in zip(x, y, strict=True)
        ]

    def y_axis(self, at: Sequence[tuple[float, str]]) -> list[str]:
        parts = []
        for value, text in at:
            y = self.py(value)
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" '
                f'text-anchor="end">{escape(text)}</text>'
            )
        return parts

    def x_axis(self, at: Sequence[tuple[float, str]], title: str) -> list[str]:
        parts = [f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>']
        for value, text in at:
            parts.append(
                f'<text class="tick" x="{self.px(value):.1f}" y="{self.bottom + 14}" '
                f'text-anchor="middle">'
                f"{escape(text)}</text>"
            )
        middle = (self.left + self.right) / 2
        parts.append(
            f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" '
            f'text-anchor="middle">{escape(title)}</text>'
        )
        return parts

    def iteration_axis(self) -> list[str]:
        whole = [t for t in ticks(self.x0, self.x1) if t == round(t)]
        return self.x_axis([(t, f"{t:.0f}") for t in whole], "iteration")

    def end_labels(self, labels: Sequence[tuple[float, str, int]]) -> list[str]:
        """Direct labels at the right edge, pushed apart where lines end close together."""
        gap = 13.0
        labels = sorted(labels)
        ys = [y for y, _, _ in labels]
        for i in range(1, len(ys)):
            ys[i] = max(ys[i], ys[i - 1] + gap)
        limit = float(self.bottom)
        for i in reversed(range(len(ys))):
            ys[i] = min(ys[i], limit)
            limit = ys[i] - gap
        return [
            f'<text class="name c{colour}" x="{self.right + 5}" '
            f'y="{y + 4:.1f}">{escape(text)}</text>'
            for y, (_, text, colour) in zip(ys, labels, strict=True)
        ]


def _svg(parts: Iterable[str], description: str, *, height: int = HEIGHT) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}" '
        f'class="chart">{body}</svg>'
    )


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    """Straight pieces; a None breaks the line. A point alone between breaks still shows (round
    caps)."""
    out, pen_up = [], True
    for point in points:
        if point is None:
            pen_up = True
            continue
        x, y = point
        out.append(f"M{x:.1f} {y:.1f}h0" if pen_up else f"L{x:.1f} {y:.1f}")
        pen_up = False
    return "".join(out)


def _hover(frame: _Frame, x: Sequence[float], text: Sequence[str]) -> list[str]:
    """An invisible column at every x with a tooltip of its values (the browser's own, so no
    script)."""
    if not x or len(x) > 4 * BINS:
        return []
    width = (frame.right - frame.left) / max(len(x), 1)
    return [
        f'<rect class="hit" x="{frame.px(xi) - width / 2:.1f}" y="{frame.top}" width="{width:.1f}" '
        f'height="{frame.bottom - frame.top}"><title>{escape(t)}</title></rect>'
        for xi, t in zip(x, text, strict=True)
    ]


def line_chart(name: str, lines: Sequence[Line], *, window: int = 1) -> Markup | None:
    """Each line smoothed over `window`, its raw values behind it in faint. None where there is
    nothing to draw."""
    lines = [line for line in lines if any(y is not None for y in line.y)]
    if not lines:
        return None
    frame = _frame_of(lines)
    parts = frame.y_axis([(t, label(t)) for t in ticks(frame.y0, frame.y1)])
    parts += frame.iteration_axis()
    ends = []
    for line in lines:
        points = frame.points(line.x, line.y)
        if window > 1:
            parts.append(_stroke("raw", line, points))
            points = frame.points(line.x, smooth(line.y, window))
        # A single point has no length to be seen as a line.
        parts.append(_stroke("dots" if len(points) == 1 else "line", line, points))
        _, height = next(point for point in reversed(points) if point is not None)
        ends.append((height, line.label, line.colour))
    parts += frame.end_labels(ends)
    longest = max(lines, key=lambda line: len(line.x)).x
    parts += _hover(frame, longest, _tips(longest, lines))
    return _svg(parts, f"{name}. {_summary(lines)}")


def _frame_of(lines: Sequence[Line]) -> _Frame:
    """A frame that holds all of the lines, with room for their labels where they have any."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if y is not None]
    right = RIGHT if any(line.label for line in lines) else UNLABELLED
    return _Frame((min(xs), max(xs)), value_range(ys), right=right)


def _stroke(kind: str, line: Line, points: Iterable[tuple[float, float] | None]) -> str:
    return f'<path class="{kind} c{line.colour}" d="{_path(points)}"/>'


def _tips(at: Sequence[float], lines: Sequence[Line]) -> list[str]:
    """At every x, what each line has there."""
    columns = [(line.label, dict(zip(line.x, line.y, strict=True))) for line in lines]

    def said(name: str, value: float | None) -> str:
        return f"{name} –" if value is None else f"{name} {value:.3g}"

    return [
        f"iteration {x:g}: " + ", ".join(said(name, values.get(x)) for name, values in columns)
        for x in at
    ]


def _summary(lines: Sequence[Line]) -> str:
    texts = []
    for line in lines:
        present = [y for y in line.y if y is not None]
        texts.append(f"{line.label}: {present[0]:.3g} at first, {present[-1]:.3g} at last")
    return "; ".join(texts) + "."


def log_chart(name: str, line: Line) -> Markup | None:
    """One series, as dots, on a logarithmic axis. Exact zeros, which have no logarithm, lie on a
    floor marked 0."""
    present = [y for y in line.y if y is not None and y >= 0]
    if not present:
        return None
    positive = [y for y in present if y > 0]
    low = math.floor(math.log10(min(positive))) if positive else -8
    high = math.ceil(math.log10(max(positive))) if positive else -7
    high = max(high, low + 1)
    floor = low - 1 if len(positive) < len(present) else low

    def height(y: float) -> float:
        return math.log10(y) if y > 0 else floor

    frame = _Frame(
        (min(line.x), max(line.x)), (floor - 0.05 * (high - floor), high), right=UNLABELLED
    )
    step = max(1, math.ceil((high - low) / 4))
    at = [(float(e), f"1e{e}") for e in range(low, high + 1, step)]
    if floor < low:
        at.append((float(floor), "0"))
    parts = frame.y_axis(at) + frame.iteration_axis()
    pairs = list(zip(line.x, line.y, strict=True))
    points = [(frame.px(x), frame.py(height(y))) for x, y in pairs if y is not None and y >= 0]
    # Dots: between an exact 0 and a rounding error there is no path that a line could stand for.
    parts.append(
        f'<path class="dots c{line.colour}" '
        f'd="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)}"/>'
    )
    tips = [f"iteration {x:g}: {'–' if y is None else f'{y:.2g}'}" for x, y in pairs]
    parts += _hover(frame, line.x, tips)
    zeros = len(present) - len(positive)
    exact = f" Exactly 0 in {zeros} of {len(present)} iterations." if zeros else ""
    return _svg(parts, f"{name}, logarithmic. Largest {max(present):.2g}.{exact}")


def stacked_bars(
    name: str, x: Sequence[float], phases: Sequence[tuple[str, Sequence[float]]]
) -> Markup | None:
    """Seconds by phase, a bar for each iteration (or the mean of as many neighbours as it takes for
    BINS bars)."""
    if not x or not phases:
        return None
    size = math.ceil(len(x) / BINS)
    groups = [range(i, min(i + size, len(x))) for i in range(0, len(x), size)]
    bars = [
        [sum(values[i] for i in group) / len(group) for _, values in phases] for group in groups
    ]
    top = max(map(sum, bars))
    if top <= 0:
        return None
    frame = _Frame((-0.5, len(bars) - 0.5), (0.0, top * 1.05), right=UNLABELLED)
    parts = frame.y_axis([(t, label(t)) for t in ticks(0, frame.y1)])
    width = (frame.right - frame.left) / len(bars)
    for i, (group, bar) in enumerate(zip(groups, bars, strict=True)):
        first, last = x[group[0]], x[group[-1]]
        named = f"{first:g}" if size == 1 else f"{first:g}–{last:g}"
        tip = ", ".join(f"{phase} {s:.3g} s" for (phase, _), s in zip(phases, bar, strict=True))
        parts.append(f"<g><title>{escape(f'iteration {named}: {tip}')}</title>")
        parts += _bar(frame, frame.px(i), width, bar)
        parts.append("</g>")
    parts += frame.x_axis(_round_marks(x, size), "iteration")
    total = sum(map(sum, bars))
    shares = [
        f"{phase} {100 * sum(bar[k] for bar in bars) / total:.0f} per cent"
        for k, (phase, _) in enumerate(phases)
    ]
    return _svg(parts, f"{name}. {', '.join(shares)} of the time.")


def _bar(frame: _Frame, middle: float, width: float, seconds: Sequence[float]) -> list[str]:
    """One bar, its phases on top of each other."""
    gap = 1.5 if width > 8 else 0.0  # gaps between thin bars would only shimmer
    parts, base = [], 0.0
    for colour, value in enumerate(seconds):
        top = frame.py(base + value)
        parts.append(
            f'<rect class="bar c{colour % 6}" x="{middle - width / 2 + gap / 2:.2f}" '
            f'y="{top:.2f}" width="{width - gap:.2f}" height="{frame.py(base) - top:.2f}"/>'
        )
        base += value
    return parts


def _round_marks(x: Sequence[float], size: int) -> list[tuple[float, str]]:
    """(bar, iteration) of the round iterations, with `size` of them a bar."""
    if len(x) == 1:
        return [(0, f"{x[0]:g}")]
    round_numbers = {int(t) for t in ticks(x[0], x[-1]) if t == round(t)}
    return [(i // size, f"{value:g}") for i, value in enumerate(x) if value in round_numbers]


def dot_chart(
    name: str,
    categories: Sequence[str],
    series: Sequence[Dots],
    y_range: tuple[float, float],
    axis: str,
) -> Markup | None:
    """Means with their bars, of one standard error to each side or an interval, series side by side
    within each category."""
    if not categories or not any(m is not None for dots in series for m in dots.mean):
        return None
    frame = _Frame((-0.5, len(categories) - 0.5), y_range, right=UNLABELLED)
    parts = frame.y_axis([(t, label(t)) for t in ticks(*y_range)])
    parts += frame.x_axis([(float(i), c) for i, c in enumerate(categories)], axis)
    texts = []
    step = min(18.0, 0.8 * (frame.right - frame.left) / len(categories) / len(series))
    for k, dots in enumerate(series):
        shift = (k - (len(series) - 1) / 2) * step
        for i, value in enumerate(dots.mean):
            if value is None or i >= len(categories):
                continue
            x, y = frame.px(i) + shift, frame.py(value)
            ends, around = dots.bar(i)
            said = f"{dots.label} {categories[i]}: {value:.3f}{around}"
            texts.append(said)
            parts.append(f"<g><title>{escape(said)}</title>")
            if ends:
                up, down = frame.py(min(ends[1], frame.y1)), frame.py(max(ends[0], frame.y0))
                parts.append(
                    f'<path class="whisker c{dots.colour}" d="M{x:.1f} {up:.1f}V{down:.1f}'
                    f'M{x - 4:.1f} {up:.1f}h8M{x - 4:.1f} {down:.1f}h8"/>'
                )
            kind = "hollow" if dots.hollow else "dot"
            parts.append(
                f'<circle class="{kind} c{dots.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
            )
    return _svg(parts, f"{name}. {'; '.join(texts)}.")


def interval_bar(
    said: str, ends: tuple[float, float], value: float, scale: tuple[float, float]
) -> Markup:
    """A row of a forest plot: an interval and its value on a scale that rows share, with a mark at
    0. Coloured by the side of 0 that the whole interval lies on, grey where it holds 0."""
    low, high = scale
    span = high - low or 1.0

    def px(number: float) -> float:
        return 4 + 192 * (min(max(number, low), high) - low) / span

    colour = 5 if ends[0] <= 0 <= ends[1] else 0 if ends[0] > 0 else 1
    return Markup(
        f'<svg viewBox="0 0 200 24" class="forest" role="img" aria-label="{escape(said)}">'
        f'<path class="axis" d="M{px(0):.1f} 0V24"/>'
        f'<path class="whisker c{colour}" d="M{px(ends[0]):.1f} 12H{px(ends[1]):.1f}"/>'
        f'<circle class="dot c{colour}" cx="{px(value):.1f}" cy="12" r="4"/></svg>'
    )


def sparkline(name: str, y: Sequence[float | None]) -> Markup:
    """A word-sized line without axes."""
    present = [value for value in y if value is not None]
    if not present:
        return Markup("")
    low, high = min(present), max(present)
    span = high - low or 1.0
    step = 116 / max(len(y) - 1, 1)

    def height(value: float) -> float:
        return 12.0 if high == low else 21 - 18 * (value - low) / span

    points = [None if v is None else (2 + i * step, height(v)) for i, v in enumerate(y)]
    said = escape(f"{name}: between {low:.3g} and {high:.3g}")
    return Markup(
        f'<svg viewBox="0 0 120 24" class="spark" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}">'
        f'<path class="line c0" d="{_path(points)}"/></svg>'
    )
