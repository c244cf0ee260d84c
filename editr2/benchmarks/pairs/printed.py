"""A set's numbers for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from editr2.benchmarks.pairs.accuracy import Measure
from editr2.errors import counted
from editr2.judge.text import WIDTH, Table, laid_out

INTERVALS = "95 % intervals by a bootstrap over sources."


def cell(measure: Measure | None) -> str:
    """`0.62 [0.55, 0.69] of 212`, or `-` of nothing."""
    if measure is None or math.isnan(measure.value):
        return "-"
    return f"{measure.value:.3f} [{measure.low:.3f}, {measure.high:.3f}] of {measure.n}"


def lines(summary: Mapping[str, Any], tables: Sequence[Table]) -> Iterator[str]:
    """All of it. summary: as `summary.json` has it."""
    pairs = summary["pairs"]
    outputs, asked = counted(summary["outputs"], "output"), counted(pairs["asked"], "pair")
    yield f"{summary['title']}: {outputs}, {asked}"
    yield from (f"{name}: {text}" for name, text in summary["reward"]["facts"].items())
    if summary["left_out"]:
        left = "; ".join(f"{why} ({n})" for why, n in summary["left_out"].items())
        yield f"left out of the set: {left}"
    for table in tables:
        yield ""
        yield from laid_out(table, WIDTH)
    yield ""
    tied = f", {pairs['tied_by_people']} of them tied by people" if pairs["tied_by_people"] else ""
    yield (
        f"pairs: {pairs['judged']} judged{tied}, {pairs['ties']} with equal scores (half right); "
        f"{pairs['failed']} failed, to {pairs['not_applicable']} the score does not apply"
    )
    for state in ("failed", "not_applicable"):
        for why, n in summary["reasons"][state].items():
            yield f"{state.replace('_', ' ')}: {why} ({n} outputs)"
    if summary["headline"] is None:
        yield f"no headline: {summary['why']}"
