"""The page's two plots as standalone SVG, coloured for light and dark readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from editr2.report.charts import label, ticks, value_range
from editr2.reproduce.intervals import Interval

LIGHT = ("#0067ad", "#c2500f", "#007a5a", "#9b3d86", "#6f6a00", "#5b6470")
DARK = ("#6db6f2", "#f29a5b", "#4fc7a1", "#dd92cb", "#cfc44a", "#a9b3bf")
WIDTH = 860


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


def lines_by_turn(panels: Sequence[tuple[str, Sequence[Series]]], name: str) -> str:
    """A panel for each group of arms, on one scale: means by turn with their intervals, side by
    side within a turn."""
    top, bottom, left, right, height = 34, 300, 42, 166, 340
    width = WIDTH / len(panels)
    low, high = value_range(
        [y for _, of in panels for s in of for i in s.turns for y in (i.low, i.high)]
    )
    count = max(len(s.turns) for _, of in panels for s in of)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts, said = [], []
    for p, (title, series) in enumerate(panels):
        x0, x1 = p * width + left, (p + 1) * width - right

        def x(turn: int, x0: float = x0, x1: float = x1) -> float:
            return x0 + (x1 - x0) * (turn + 0.5) / count

        parts.append(_text(x0, 18, title, "ink name"))
        for tick in ticks(low, high):
            parts.append(f'<path class="grid" d="M{x0:.1f} {y(tick):.1f}H{x1:.1f}"/>')
            parts.append(_text(x0 - 6, y(tick) + 4, label(tick), "soft", "end"))
        parts += [_text(x(t), bottom + 18, f"turn {t + 1}", "soft", "middle") for t in range(count)]
        ends = []
        for k, s in enumerate(series):
            shift = (k - (len(series) - 1) / 2) * 7
            points = [(x(t) + shift, y(i.mean)) for t, i in enumerate(s.turns)]
            dash = ' stroke-dasharray="5 4"' if s.dashed else ""
            parts.append(
                f'<path class="line s{s.colour}"{dash} d="M'
                + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
                + '"/>'
            )
            for (a, b), i in zip(points, s.turns, strict=True):
                parts.append(
                    f'<path class="bar s{s.colour}" d="M{a:.1f} {y(i.low):.1f}V{y(i.high):.1f}"/>'
                )
                parts.append(f'<circle class="f{s.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>')
            ends.append((points[-1][1], s))
            said.append(f"{s.title} {s.turns[-1].mean:.3f}")
        parts += _end_labels(sorted(ends, key=lambda end: end[0]), x1 + 4, top, bottom)
    parts.append(
        _text(WIDTH / 2, height - 6, f"{name}, mean with its 95 % interval", "soft", "middle")
    )
    return _svg(parts, height, f"{name} by turn. At the last turn: {'; '.join(said)}.")


def _end_labels(
    ends: Sequence[tuple[float, Series]], x: float, top: float, bottom: float
) -> list[str]:
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
    left, right, top, step = 310, 240, 14, 30
    bottom = top + step * len(rows)
    values = [
        v
        for row in rows
        for v in (row.interval.low, row.interval.high, *row.interval.by_seed, row.mark, 0.0)
    ]
    low, high = value_range(values, unit=False)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - right - left)

    parts = []
    for tick in ticks(low, high):
        kind = "grid" if tick else "zero"
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} {top}V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 16, label(tick), "soft", "middle"))
    for k, row in enumerate(rows):
        y, i = top + (k + 0.5) * step, row.interval
        held = i.low <= row.mark <= i.high
        colour = 5 if held else 0 if i.low > row.mark else 1
        if row.mark:
            parts.append(
                f'<path class="zero" stroke-dasharray="3 3" d="M{x(row.mark):.1f} '
                f'{y - 13:.1f}v26"/>'
            )
        parts.append(_text(left - 12, y + 4, row.text, "ink", "end"))
        parts.append(f'<path class="bar s{colour}" d="M{x(i.low):.1f} {y:.1f}H{x(i.high):.1f}"/>')
        if len(i.by_seed) > 1:
            parts += [
                f'<circle class="f{colour}" cx="{x(v):.1f}" cy="{y + 7:.1f}" r="1.6"/>'
                for v in i.by_seed
            ]
        parts.append(f'<circle class="f{colour}" cx="{x(i.mean):.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(
            _text(
                WIDTH - right + 12, y + 4, f"{i.mean:+.3f}  {row.verdict}".replace("-", "−"), "ink"
            )
        )
    parts.append(_text(x((low + high) / 2), bottom + 34, name, "soft", "middle"))
    said = "; ".join(f"{r.text} {r.interval.mean:+.3f} ({r.verdict})" for r in rows)
    return _svg(parts, bottom + 44, f"{name}. {said}.")
