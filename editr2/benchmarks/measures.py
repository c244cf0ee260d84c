"""Which numbers a benchmark reports, from its rows: a table of kinds.

A measure has a key, `NAME@TURN/GROUP`: `IF@2`, `success@last`, `GA@5/turns=5`, `CC@3/mode=cu`,
`IF/task=subject_add` (of all turns). Groups are there only where there is more than one of a sort:
of tasks, of modes, of lengths of sessions.

- turns: the mean of every metric by turn, as MICE-Bench reports; in a single pass of the turn's own
  instruction, and beside it of all that was asked of its image (IF_of_all@t).
- edival: success@t, the share of sessions of which IF of every turn up to t is 1 (EdiVal's
  `image_rate`; in a single pass, of all that was asked of the image of t); marginal@t, mean IF of
  the instruction of t (its `task_rate`); in a single pass task_rate@t, mean IF of all that was
  asked; CC@t; and O = √(success · CC), of which the paper does not say whether it is of the two
  means (O_of_means) or a mean of the sessions' own (O_of_roots).
- gedit, imgedit: the mean over kinds of edit of their means, as GEdit-Bench reports; O is
  √(SC · PQ) of every image. Beside it the mean of all images (O_of_images): the scripts of
  ImgEdit-Bench stop at the means of kinds, and overall figures of it are of either.

Of several samples of a session the mean counts, of those that were judged. What was not judged is
left out of a value and counted beside it. Only a success can be known without all it rests on: it
is 0 from the first IF below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from editr2.benchmarks.rows import STATES, Row, State
from editr2.report.paired import Statistic, mean_of, ratio, root_of_product

FULL = 1 - 1e-6
"""An IF from here on is 1."""

JUDGED, NOT_APPLICABLE, FAILED, MISSING = range(len(STATES))
NONE = -1
"""Codes of states in arrays; `NONE`: there is no such item."""

_Value = tuple[Statistic, dict[State, int]]
_Over = Callable[[np.ndarray], _Value]
When = int | Literal["last"] | None


@dataclass(frozen=True)
class Measure:
    """name: of what is measured, without turn and group. turn: of the image, from 1; "last": each
    session's own; None: all. group: `task=…`, `mode=…` or `turns=…`. statistic: over the sessions
    that were asked for, in their order. counts: of the items it rests on (a turn of a session and
    sample), by state; one that rests on several rows is failed or missing where one of them is,
    also where its value is known."""

    name: str
    turn: When
    group: str | None
    statistic: Statistic
    counts: Mapping[State, int]

    @property
    def key(self) -> str:
        return key_of(self.name, self.turn, self.group)

    @property
    def label(self) -> str:
        return label_of(self.name, self.turn, self.group)

    @property
    def expected(self) -> int:
        return sum(self.counts.values())

    @property
    def unknown(self) -> int:
        """Of the expected items, those that failed or are missing."""
        return self.counts["failed"] + self.counts["missing"]


def key_of(name: str, turn: When = None, group: str | None = None) -> str:
    return name + (f"@{turn}" if turn is not None else "") + (f"/{group}" if group else "")


def label_of(name: str, turn: When = None, group: str | None = None) -> str:
    for ending, said in ENDINGS.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + said
    when = "" if turn is None else ", last turn" if turn == "last" else f", turn {turn}"
    return NAMES.get(name, name) + when + (f", {group_label(group)}" if group else "")


def group_label(group: str) -> str:
    """A group as tables write it."""
    sort, _, one = group.partition("=")
    return how_long(one) if sort == "turns" else one


def how_long(turns: str) -> str:
    """`3 turns`."""
    return f"{turns} turn{'s' * (turns != '1')}"


NAMES = {
    "success": "multi-turn success",
    "marginal": "marginal success",
    "task_rate": "success of all asked",
}
"""As tables write a measure's name, where it is another."""

ENDINGS = {
    "_of_means": " (root of means)",
    "_of_roots": " (mean of roots)",
    "_of_images": " (mean of images)",
    "_of_all": " of all asked",
}


@dataclass(frozen=True)
class _Items:
    """values: [N, S, T, A] of session, sample, turn of the image, turn that was asked about, NaN
    where there is none. states: int8, codes."""

    values: np.ndarray
    states: np.ndarray

    @property
    def joined(self) -> bool:
        """Several instructions were asked about of one image."""
        turns, asked = self.states.shape[2:]
        other = self.states != NONE
        other[:, :, range(min(turns, asked)), range(min(turns, asked))] = False
        return bool(other.any())

    def over(self, chosen: np.ndarray) -> _Value:
        """The mean of those chosen, bool [N, T, A], that there are."""
        known = ~np.isnan(self.values)
        times = known.sum(1)
        mean_NTA = np.where(known, self.values, 0.0).sum(1) / np.maximum(times, 1)
        held = chosen & (times > 0)
        sums = np.where(held, mean_NTA, 0.0).sum((1, 2))
        states = self.states[np.broadcast_to(chosen[:, None], self.states.shape)]
        counts = {name: int((states == code).sum()) for code, name in enumerate(STATES)}
        return ratio(sums, held.sum((1, 2)).astype(np.float64)), counts


class _Set:
    """The rows of one pass. ids: of the sessions, in order; rows of others are passed over. all,
    own: [1, T, A], of a turn's image all that was asked, and the turn's own instruction."""

    def __init__(self, rows: Sequence[Row], ids: Sequence[str]) -> None:
        place = {name: n for n, name in enumerate(ids)}
        rows = [row for row in rows if row.image in place]
        self.sessions = len(ids)
        self.turns = max((row.turns for row in rows), default=0)
        self.samples = max((row.sample for row in rows), default=0)
        self.metrics = list(dict.fromkeys(row.metric for row in rows))
        shape = (self.sessions, self.samples, self.turns, self.turns)
        self.of = {
            name: _Items(np.full(shape, np.nan), np.full(shape, NONE, np.int8))
            for name in self.metrics
        }
        self.all = np.ones((1, self.turns, self.turns), dtype=bool)
        self.own = np.eye(self.turns, dtype=bool)[None]
        self.length = np.zeros(self.sessions, dtype=np.int64)
        self.task = np.full((self.sessions, self.turns), None, dtype=object)
        self.mode = np.full(self.sessions, None, dtype=object)
        for row in rows:
            n, t, a = place[row.image], row.turn - 1, row.asked - 1
            items = self.of[row.metric]
            items.states[n, row.sample - 1, t, a] = STATES.index(row.state)
            if row.value is not None:
                items.values[n, row.sample - 1, t, a] = row.value
            self.length[n], self.mode[n], self.task[n, a] = row.turns, row.mode, row.task

    def at(self, turn: When) -> np.ndarray:
        """The sessions' turns of the images: bool [N, T, 1]."""
        turns = np.arange(1, self.turns + 1)
        here = turns <= self.length[:, None]
        if turn is not None:
            here &= turns == (self.length[:, None] if turn == "last" else turn)
        return here[:, :, None]

    @property
    def whens(self) -> list[When]:
        return [*range(1, self.turns + 1), "last"] if self.turns else []

    def groups(self, *sorts: str) -> Iterator[tuple[str, np.ndarray]]:
        """Of each sort, where there is more than one; bool, shapes that broadcast to [N, T, A]."""
        given = {
            "mode": self.mode[:, None, None],
            "turns": self.length[:, None, None],
            "task": self.task[:, None, :],
        }
        for sort in sorts:
            of = given[sort]
            # A length of 0 is a session without a row.
            found = sorted({one for one in of.flat if one}, key=lambda one: (str(type(one)), one))
            if len(found) > 1:
                yield from ((f"{sort}={one}", of == one) for one in found)


def _by_turn(
    rows: _Set, name: str, over: _Over, asked: np.ndarray | None = None
) -> Iterator[Measure]:
    """What `over` says of every turn, whole and by group. asked: about which instructions, bool
    that broadcasts to [N, T, A]; None for what is of no single instruction, and so of no task."""
    everything = np.ones((1, 1, 1), dtype=bool)
    by_task: list[tuple[str | None, np.ndarray]] = []
    if asked is not None:
        by_task += rows.groups("task")
    about = everything if asked is None else asked
    groups = [(None, everything), *rows.groups("mode", "turns"), *by_task]
    for turn, among in (*((turn, groups) for turn in rows.whens), (None, by_task)):
        for group, members in among:
            statistic, counts = over(rows.at(turn) & about & members)
            if any(counts.values()):
                yield Measure(name, turn, group, statistic, counts)


def _turns(rows: _Set) -> Iterator[Measure]:
    for name, items in rows.of.items():
        yield from _by_turn(rows, name, items.over, rows.own)
        if items.joined:
            yield from _by_turn(rows, f"{name}_of_all", items.over, rows.all)


def _edival(rows: _Set) -> Iterator[Measure]:
    follow, consistent = rows.of.get("IF"), rows.of.get("CC")
    if follow is not None:
        success = _success(rows, follow)
        yield from _by_turn(rows, "success", success.over)
        yield from _by_turn(rows, "marginal", follow.over, rows.own)
        if follow.joined:
            yield from _by_turn(rows, "task_rate", follow.over, rows.all)
    for name, items in rows.of.items():
        if name != "IF":
            yield from _by_turn(rows, name, items.over, rows.own)
    if follow is not None and consistent is not None:
        kept = _diagonal(consistent)
        roots = _roots(success, kept)

        def of_means(chosen: np.ndarray) -> _Value:
            parts = (success.over(chosen)[0], kept.over(chosen)[0])
            return root_of_product(*parts), roots.over(chosen)[1]

        yield from _by_turn(rows, "O_of_means", of_means)
        yield from _by_turn(rows, "O_of_roots", roots.over)


def _success(rows: _Set, follow: _Items) -> _Items:
    """[N, S, T, 1]: whether everything asked up to a turn was done."""
    shape = (*follow.values.shape[:3], 1)
    values, states = np.full(shape, np.nan), np.full(shape, NONE, np.int8)
    turns = range(rows.turns)
    for t in turns:
        pairs = [(t, a) if follow.joined else (a, a) for a in range(t + 1)]
        said = np.stack([follow.values[:, :, i, a] for i, a in pairs], -1)
        state = np.stack([follow.states[:, :, i, a] for i, a in pairs], -1)
        unknown = (state >= FAILED) | (state == NONE)
        undone = (said < FULL).any(-1)
        done = ~unknown.any(-1) & (state == JUDGED).any(-1)
        values[:, :, t, 0] = np.where(undone, 0.0, np.where(done, 1.0, np.nan))
        worst = np.where(unknown.any(-1), np.maximum(state.max(-1), FAILED), NOT_APPLICABLE)
        worst = np.where(done | (undone & ~unknown.any(-1)), JUDGED, worst)
        there = (follow.states[:, :, t] != NONE).any(-1)
        states[:, :, t, 0] = np.where(there, worst, NONE)
    return _Items(np.where(states == NONE, np.nan, values), states)


def _diagonal(items: _Items) -> _Items:
    """[N, S, T, 1]: of every turn what its own instruction has."""
    each = np.arange(items.values.shape[2])
    return _Items(items.values[:, :, each, each, None], items.states[:, :, each, each, None])


def _roots(a: _Items, b: _Items) -> _Items:
    """√(a · b) of every one; 0 where a is, also where b failed or is missing."""
    values = np.sqrt(a.values * b.values)
    values = np.where((a.values == 0) & (b.states >= FAILED), 0.0, values)
    there = (a.states != NONE) & (b.states != NONE)
    states = np.where(there, np.maximum(a.states, b.states), NONE)
    return _Items(np.where(there, values, np.nan), states)


def _kinds(rows: _Set) -> Iterator[Measure]:
    of = dict(rows.of)
    if "O" not in of and {"SC", "PQ"} <= set(of):
        of["O"] = _roots(of["SC"], of["PQ"])
    names = sorted({task for task in rows.task.flat if task is not None})
    for name, items in of.items():
        statistic, counts = items.over(rows.at(None) & rows.all)
        kinds = [(kind, *items.over(rows.task[:, None, :] == kind)) for kind in names]
        means = [mean for _, mean, _ in kinds if mean.present.any()]
        if means:
            yield Measure(name, None, None, mean_of(means), counts)
            for kind, mean, of_kind in kinds:
                yield Measure(name, None, f"task={kind}", mean, of_kind)
        yield Measure(f"{name}_of_images", None, None, statistic, counts)


KINDS: Mapping[str, Callable[[_Set], Iterator[Measure]]] = {
    "turns": _turns,
    "edival": _edival,
    "gedit": _kinds,
    "imgedit": _kinds,
}
"""By name; `measures` asks them."""


def measures(kind: str, rows: Sequence[Row], ids: Sequence[str]) -> dict[str, Measure]:
    """By key, in the order of tables. rows: of one pass. ids: of the sessions that count, in order;
    statistics of the same ids may be held against each other (`report.paired.difference`). Without
    rows there are no measures."""
    found = _Set(rows, ids)
    return {measure.key: measure for measure in KINDS[kind](found)} if found.turns else {}
