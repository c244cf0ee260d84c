"""The tables of a trial, for the terminal and for the page."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from editr2.errors import counted
from editr2.judge.summary import REASONS, Agreement, Mean, Of
from editr2.judge.trial import Trial
from editr2.report.paired import Estimate

WIDTH = 100
"""Of a terminal."""


@dataclass(frozen=True)
class Table:
    """rows: a name and a cell a column each. note: below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    note: str = ""


def headline(trial: Trial) -> str:
    sessions = len({output.session.id for output in trial.outputs})
    again = f", asked {trial.repeats} times" if trial.repeats > 1 else ""
    return (
        f"{counted(sessions, 'session')}, {counted(len(trial.outputs), 'output')}, "
        f"{counted(trial.turns, 'turn')}{again}"
    )


def tables(
    trial: Trial,
    scores: Sequence[Of],
    agreements: Sequence[tuple[str, Sequence[Agreement]]],
) -> list[Table]:
    """agreements: with what, and of every score."""
    turns = range(max(len(of.by_turn) for of in scores))
    found = [
        Table(
            "Scores by turn",
            [f"turn {t + 1}" for t in turns],
            [(of.name, [_mean(of.by_turn[t]) for t in turns]) for of in scores],
            "Mean and standard error over sessions.",
        ),
        Table(
            "Spread",
            ["votes", "asked again", "siblings", "less the noise", "all tie"],
            [(of.name, _spreads(of)) for of in scores],
            "Standard deviations: of the votes of one answer, of one output asked again, of "
            "siblings, and of these without what asking again explains (--repeats). Where all "
            "siblings of a turn tie, nothing trains.",
        ),
    ]
    for what, rows in agreements:
        cells = [
            (f"{a.name}, {a.other}" if a.other not in (a.name, "labels") else a.name, _agreed(a))
            for a in rows
        ]
        note = "95 % intervals by a bootstrap over sessions; of pairs of siblings, half is chance."
        found.append(
            Table(f"Agreement with {what}", ["right of pairs", "Spearman", "Kendall"], cells, note)
        )
    return found


def lines(
    trial: Trial,
    scores: Sequence[Of],
    agreements: Sequence[tuple[str, Sequence[Agreement]]],
    price: float | None = None,
    more: Sequence[Table] = (),
) -> list[str]:
    """All of it for a terminal. more: tables behind the others."""
    said = [headline(trial), *(f"{name}: {text}" for name, text in trial.facts.items())]
    for table in [*tables(trial, scores, agreements), *more]:
        said += ["", *laid_out(table)]
    said = [line.replace("±", "+-") for line in said]
    return [*said, "", *call_lines(trial, price), *state_lines(scores)]


def laid_out(table: Table, limit: int | None = None) -> list[str]:
    """A table for a terminal. limit: of its width; columns that have no room stand below."""
    width = max(len(name) for name, _ in table.rows) + 2
    columns = [
        max(len(table.head[c]), *(len(cells[c]) for _, cells in table.rows)) + 2
        for c in range(len(table.head))
    ]
    blocks: list[list[int]] = [[]]
    for c, n in enumerate(columns):
        if blocks[-1] and limit and width + sum(columns[b] for b in blocks[-1]) + n > limit:
            blocks.append([])
        blocks[-1].append(c)
    said = [table.title]
    for block in blocks:
        said.append(" " * width + "".join(table.head[c].rjust(columns[c]) for c in block))
        for name, cells in table.rows:
            said.append(name.ljust(width) + "".join(cells[c].rjust(columns[c]) for c in block))
    return said + textwrap.wrap(table.note, WIDTH)


def call_lines(trial: Trial, price: float | None = None) -> list[str]:
    """What asking took, and what it costs."""
    c, asked = trial.calls, trial.turns * trial.repeats
    if not c.made:
        return [f"calls: none; all {counted(c.found, 'answer')} were on the record"]
    kept = f", {counted(c.found, 'answer')} from the record" if c.found else ""
    again = f", {counted(c.again, 'further try', 'further tries')}" if c.again else ""
    said = [
        f"calls: {c.made} made{kept}{again}; {c.seconds / c.made:.3g} s a call, "
        f"{trial.seconds:.3g} s in all, {trial.at_once} at once"
    ]
    if not c.found:
        said[0] += f"; a turn takes {c.made / asked:.3g} calls and {trial.seconds / asked:.3g} s"
    if price is not None:
        said.append(
            f"cost: {c.made * price:.4g} at {price:g} a call"
            + ("" if c.found else f", {c.made * price / asked:.3g} a turn")
        )
    return said


def state_lines(scores: Sequence[Of]) -> list[str]:
    """What failed and what did not apply, with the commonest reasons."""
    said = []
    for of in scores:
        for what, reasons in (("failed", of.failed), ("does not apply", of.not_applicable)):
            if count := reasons.total():
                share = f"{count} of {of.asked} ({count / of.asked:.1%})"
                said.append(f"{of.name} {what}: {share}: {_listed(reasons)}")
    return said or ["every turn has every score"]


def _listed(reasons: Counter[str]) -> str:
    shown = [f"{cut(why)} ({n})" for why, n in reasons.most_common(REASONS)]
    more = len(reasons) - len(shown)
    return "; ".join(shown) + (f"; {more} other reasons" if more > 0 else "")


def cut(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _mean(stat: Mean) -> str:
    if math.isnan(stat.mean):
        return "-"
    return f"{stat.mean:.3f}" + ("" if math.isnan(stat.se) else f" ± {stat.se:.3f}")


def _spreads(of: Of) -> list[str]:
    kinds = (of.votes, of.repeats, of.siblings, of.beyond_noise)
    spreads = ["-" if math.isnan(s) else f"{s:.3f}" for s in kinds]
    tied = f"{of.tied / of.groups:.1%} of {of.groups}" if of.groups else "-"
    return [*spreads, tied]


def _agreed(agreement: Agreement) -> list[str]:
    return [_estimate(found) for found in (agreement.pairs, agreement.spearman, agreement.kendall)]


def _estimate(found: Estimate | None) -> str:
    if found is None or math.isnan(found.value):
        return "-"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of {found.count}"
