"""The table of a run's evaluated sessions, and some of them through training: what the templates
and `page.js` print of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editr2.report.data import EQUAL, MODES, RecordedRun
from editr2.report.gallery import thin
from editr2.report.kept import Cut, KeptEvaluation, KeptSession, KeptTurn, of_strips, read_kept
from editr2.report.numbers import decimal, signed

TEXTS = 500_000
"""Characters of what judges said, in all, and of one score."""
LONGEST = 400
ROW = 1800
"""Bytes of a session of three turns without its images and what judges said."""
ROWS = 1000
"""Sessions of the table, at most; more are thinned evenly, those with problems kept."""
THROUGH, SHOWN = 6, 8
"""Sessions that are shown through training, and evaluations of each."""

CHANGES = {"better": "better", "equal": "unchanged", "worse": "worse", "": "not comparable"}


@dataclass(frozen=True)
class Value:
    """A number as a cell has it. by: what rows are sorted by, "" where there is none."""

    text: str
    by: str

    @staticmethod
    def of(number: float | None, text: str | None = None) -> Value:
        if number is None:
            return Value("–", "")
        return Value(decimal(number) if text is None else text, f"{number:.6g}")


@dataclass(frozen=True)
class TableRow:
    """change: a key of `CHANGES`. problem: whether anything failed or was left out. said: what a
    judge or an error says of its worst turn."""

    place: int
    id: str
    mode: str
    tasks: Sequence[str]
    before: Value
    after: Value
    difference: Value
    change: str
    worst: Value
    failed: int
    masked: int
    said: str

    @property
    def problem(self) -> bool:
        return bool(self.failed or self.masked)


@dataclass(frozen=True)
class Step:
    name: str
    src: str | None
    alt: str
    text: str


@dataclass(frozen=True)
class Through:
    """A session's last turn, evaluation by evaluation."""

    id: str
    instruction: str
    width: int
    small: bool
    steps: Sequence[Step]


@dataclass(frozen=True)
class SessionTable:
    """compared: whether there are two evaluations. kind: held-out or training. details: what a row
    opens to, by its place, for `page.js`. pictured: rows with images. unsaid: rows without what
    judges said, for which there was no room."""

    rows: Sequence[TableRow]
    total: int
    passes: Sequence[str]
    compared: bool
    modes: Sequence[tuple[str, str]]
    tasks: Sequence[str]
    changes: Sequence[tuple[str, str]]
    details: Sequence[Mapping[str, Any]]
    pictured: int
    unsaid: int
    through: Sequence[Through]

    @property
    def head(self) -> list[str]:
        """Of the columns that rows are sorted by."""
        rewards = [*self.passes, "change"] if self.compared else [*self.passes]
        return ["session", "mode", "task", *rewards, "worst", "failed", "masked"]


def session_table(run: RecordedRun, budget: int) -> SessionTable | None:
    """None where nothing is known of any session. budget: bytes that it may
    take."""
    iterations = [e.iteration for e in run.evaluations if e.iteration is not None]
    kept = read_kept(run.folder, iterations, run.missing)
    kept = [one for one in kept if one.sessions] or of_strips(run.pairs)
    if not kept:
        return None
    names = _names_of(kept, run)
    passes = [kept[0], kept[-1]] if len(kept) > 1 else [kept[0]]
    said = [names[0], names[-1]] if len(kept) > 1 else [names[0]]
    ids = list(dict.fromkeys(id for one in passes for id in one.sessions))
    chosen = ids if len(ids) <= ROWS else thin(ids, ROWS)
    left = budget - ROW * len(chosen)
    room = min(TEXTS, left // 3)
    through, spent = _through(kept, names, (left - room) // 3)
    left -= room + spent
    rows, details, pictured, unsaid = list[TableRow](), list[dict[str, Any]](), 0, 0
    for place, id in enumerate(chosen):
        found = [one.sessions.get(id) for one in passes]
        cuts = [one.images(s) if s else Cut() for one, s in zip(passes, found, strict=True)]
        if (cost := sum(cut.bytes for cut in cuts)) <= left:
            left -= cost
            pictured += any(cut.source for cut in cuts)
        else:
            cuts = [Cut()] * len(cuts)
        rows.append(_row(place, id, found))
        length = sum(len(w[:LONGEST]) for s in found if s for t in s.turns for w in t.whys.values())
        unsaid += room < length
        details.append(_details(id, found, said, cuts, whys=room >= length))
        room -= length if room >= length else 0
    modes = dict.fromkeys(row.mode for row in rows if row.mode)
    tasks = sorted({task for row in rows for task in row.tasks})
    changes = {row.change for row in rows}
    return SessionTable(
        rows,
        len(ids),
        said,
        len(passes) == 2,
        [(mode, MODES.get(mode, mode)) for mode in modes],
        tasks,
        [(key, text) for key, text in CHANGES.items() if key in changes] if passes[1:] else [],
        details,
        pictured,
        unsaid,
        through,
    )


def _names_of(kept: Sequence[KeptEvaluation], run: RecordedRun) -> list[str]:
    """What evaluations are called: by their names at the ends of a run, else by iteration."""
    if run.alone:
        return ["reward"]
    after = run.evaluation("after") is not None or not run.evaluations
    last = "after" if after else f"iteration {kept[-1].iteration}"
    middle = [f"iteration {one.iteration}" for one in kept[1:-1]]
    return ["before", *middle, last] if len(kept) > 1 else ["before" if not after else "after"]


def _row(place: int, id: str, found: Sequence[KeptSession | None]) -> TableRow:
    present = [session for session in found if session is not None]
    newest = present[-1]
    rewards = [session.reward if session else None for session in found]
    before, after = (rewards[0], rewards[-1]) if len(found) > 1 else (None, rewards[0])
    difference = None if before is None or after is None else after - before
    worst = _worst(newest)
    failed = sum(_failed(turn) for turn in newest.turns)
    masked = sum(turn.left_out for turn in newest.turns)
    verdict = ""
    if difference is not None:
        equal = abs(difference) < EQUAL
        verdict = "equal" if equal else "better" if difference > 0 else "worse"
    return TableRow(
        place,
        id,
        newest.mode or "",
        list(dict.fromkeys(turn.task for turn in newest.turns if turn.task)),
        Value.of(before),
        Value.of(after),
        Value.of(difference, None if difference is None else signed(difference)),
        verdict,
        worst,
        failed,
        masked,
        _said(newest),
    )


def _failed(turn: KeptTurn) -> bool:
    return turn.reason is not None and not turn.left_out


def _worst(session: KeptSession) -> Value:
    """The least score of any turn, with whose it is."""
    scores = [
        (score, name, t + 1)
        for t, turn in enumerate(session.turns)
        for name, score in turn.scores.items()
        if score is not None
    ]
    if not scores:
        return Value.of(None)
    score, name, turn = min(scores)
    if score == max(scores)[0]:
        return Value.of(score)  # no turn is worse than another
    return Value.of(score, f"{decimal(score)} {name}, turn {turn}")


def _said(session: KeptSession) -> str:
    """A reason of what failed; else what was said of the least score of which something was."""
    for turn in session.turns:
        if turn.reason:
            return turn.reason
    said = [
        (score, f"{name}, turn {t + 1}: {turn.whys[name]}")
        for t, turn in enumerate(session.turns)
        for name, score in turn.scores.items()
        if score is not None and name in turn.whys
    ]
    return min(said)[1] if said else ""


def _details(
    id: str,
    found: Sequence[KeptSession | None],
    names: Sequence[str],
    cuts: Sequence[Cut],
    *,
    whys: bool,
) -> dict[str, Any]:
    first = next(session for session in found if session is not None)
    pictures = next((cut for cut in reversed(cuts) if cut.source), Cut())
    return {
        "id": id,
        "small": first.small,
        "source": pictures.source,
        "expected": list(pictures.expected),
        "turns": [{"instruction": t.instruction, "task": t.task} for t in first.turns],
        "passes": [
            {
                "name": name,
                "turns": [
                    {
                        "image": cut.outputs[t] if t < len(cut.outputs) else None,
                        "said": _scores(turn),
                        "whys": [(k, _cut_off(w)) for k, w in turn.whys.items()] if whys else [],
                        "problem": _problem(turn),
                    }
                    for t, turn in enumerate(session.turns)
                ],
            }
            for name, session, cut in zip(names, found, cuts, strict=True)
            if session is not None
        ],
    }


def _cut_off(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _scores(turn: KeptTurn) -> str:
    parts = [
        f"{name} {'does not apply' if name in turn.does_not_apply else decimal(score)}"
        for name, score in turn.scores.items()
    ]
    return " · ".join([*parts, f"reward {decimal(turn.reward)}"])


def _problem(turn: KeptTurn) -> str | None:
    if turn.left_out:
        return "left out of the rollout" + (f": {turn.reason}" if turn.reason else "")
    return f"failed: {turn.reason}" if turn.reason else None


def _through(
    kept: Sequence[KeptEvaluation], names: Sequence[str], budget: int
) -> tuple[list[Through], int]:
    """Of three evaluations or more: some sessions, those that rose and fell most first, and the
    bytes of their images."""
    first, last = kept[0], kept[-1]
    pictured = [id for id, session in last.sessions.items() if session.sheet is not None]
    if len(kept) < 3 or not pictured:
        return [], 0

    def change(id: str) -> float:
        rewards = [one.sessions[id].reward if id in one.sessions else None for one in (first, last)]
        return 0.0 if None in rewards else rewards[1] - rewards[0]  # type: ignore[operator]

    ordered = sorted(pictured, key=change, reverse=True)
    half = THROUGH // 2
    ids = list(dict.fromkeys([*ordered[:half], *ordered[-half:]]))
    places = thin(range(len(kept)), SHOWN)
    found, spent = [], 0
    for id in ids:
        one = _one_through(id, kept, names, places)
        cost = sum(len(step.src or "") for step in one.steps)
        if spent + cost > budget:
            break
        found.append(one)
        spent += cost
    return found, spent


def _one_through(
    id: str, kept: Sequence[KeptEvaluation], names: Sequence[str], places: Sequence[int]
) -> Through:
    newest = kept[-1].sessions[id]
    cut = kept[-1].images(newest)
    steps = [Step("source", cut.source, f"source image of session {id}", "")]
    if cut.expected:
        said = f"asked for after the last turn of session {id}"
        steps.append(Step("asked for", cut.expected[-1], said, ""))
    for place in places:
        session = kept[place].sessions.get(id)
        if session is None:
            continue
        outputs = kept[place].images(session).outputs
        alt = f"{names[place]}, after the last turn of session {id}"
        src = outputs[-1] if outputs else None
        steps.append(Step(names[place], src, alt, decimal(session.reward)))
    instruction = newest.turns[-1].instruction if newest.turns else ""
    return Through(id, instruction, 96 if newest.small else 128, newest.small, steps)
