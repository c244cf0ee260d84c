"""What the sections of the report share: a page that takes text, tables and plots, and how numbers
are written.

A section is a function of a `Page` that adds to it, or nothing where no row is its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.frame import Row


@dataclass
class Page:
    """rows: of the last run of every case, in the order of their files. plots: folder for PNG
    files, made by `plot`."""

    rows: list[Row]
    path: Path
    text: list[str] = field(default_factory=list)

    def of(self, ops: Iterable[str]) -> list[Row]:
        wanted = set(ops)
        return [row for row in self.rows if row.op in wanted]

    def add(self, *lines: str) -> None:
        self.text += lines

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The first column is text, the others are numbers."""
        self.add("| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|")
        self.add(*("| " + " | ".join(row) + " |" for row in rows), "")

    def plot(
        self, name: str, alt: str, draw: Callable[[Any], None], size: tuple[float, float]
    ) -> None:
        """draw(figure) on an empty matplotlib figure of so many inches; saved beside the page and
        shown."""
        from matplotlib.figure import Figure

        folder = self.path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        self.add(f"![{alt}]({folder.name}/{name}.png)", "")


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never an exponent; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    whole = f"{value:.{digits}g}"
    return (
        f"{float(whole):,.0f}"
        if "e" in whole and abs(value) >= 1
        else f"{value:.1e}"
        if "e" in whole
        else whole
    )


def on_gpu(row: Row) -> bool:
    return row.driver is not None


def where(row: Row) -> str:
    threads = "" if row.threads is None else f", {row.threads} thread{'s' * (row.threads != 1)}"
    return f"{row.device}{threads}, commit {row.commit}, {row.date[:10]}"


def slug(text: str) -> str:
    """For file names."""
    return "-".join("".join(c.lower() if c.isalnum() else " " for c in text).split())


def elements(row: Row) -> int:
    return math.prod(row.shape)


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that were timed side by side."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def best(rows: Iterable[Row], kind: str | None = None) -> Row | None:
    """The fastest of ours, or of the baselines whose name starts with `kind`."""
    chosen = [row for row in rows if (row.ours if kind is None else row.provider.startswith(kind))]
    return min(chosen, key=lambda row: row.p50_ms, default=None)
