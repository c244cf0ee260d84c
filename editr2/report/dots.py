"""Charts of estimates: values with their intervals, by turn, by length or by k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editr2.report import charts as drawing
from editr2.report.charts import Chart, value_range
from editr2.report.numbers import decimal, signed
from editr2.report.paired import Estimate

ONE = "one session"
"""In place of an interval, which a bootstrap of one session makes a point."""


def with_interval(of: Estimate, places: int, *, sign: bool = False) -> str:
    """`0.410 [0.350, 0.470]`; "–" of what is not defined, and no interval of one session. sign: of
    a difference."""
    if not of.known:
        return "–"
    write = _signed if sign else decimal
    value, low, high = (write(number, places) for number in (of.value, of.low, of.high))
    return f"{value} [{low}, {high}]" if of.count != 1 else f"{value} [{ONE}]"


def _signed(value: float, places: int) -> str:
    return signed(value, places).removeprefix("±")  # an end of an interval is no more or less


@dataclass(frozen=True)
class Series:
    """values: by category. hollow: of what others are held against."""

    label: str
    values: Mapping[str, Estimate]
    colour: int
    hollow: bool = False


def dots(
    panels: Sequence[tuple[str, Sequence[Series]]],
    categories: Sequence[str],
    axis: str,
    notes: Mapping[str, str] | None = None,
    *,
    scale: float = 1.0,
) -> list[Chart]:
    """A panel for each title, all on one scale: they are read against each other. notes: by title.
    scale: values are in [0, scale], which the axis does not leave."""
    every = [of for _, series in panels for one in series for of in one.values.values()]
    reach = [end for of in every if of.known for end in (of.low, of.high)]
    if not reach:
        return []
    low, high = value_range(end / scale for end in reach)
    y_range = (low * scale, high * scale)
    found = [
        drawing.dot_chart(
            title,
            categories,
            [_drawn(one, categories) for one in series],
            y_range,
            axis,
            (notes or {}).get(title, ""),
        )
        for title, series in panels
    ]
    return [chart for chart in found if chart is not None]


def _drawn(series: Series, categories: Sequence[str]) -> drawing.Series:
    found = [series.values.get(name) for name in categories]
    known = [of if of is not None and of.known else None for of in found]
    return drawing.Series(
        series.label,
        [of.value if of else None for of in known],
        series.colour,
        "hollow" if series.hollow else "dot",
        [(of.low, of.high) if of else None for of in known],
    )
