"""What is compared: the scores of a benchmark's folder, or of a run's evaluation, in one form."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from editr2.benchmarks import rows as scores
from editr2.benchmarks.rows import Row
from editr2.benchmarks.strips import Strip, read_strips
from editr2.benchmarks.summary import FILE_NAME as SUMMARY
from editr2.benchmarks.summary import IDENTITY
from editr2.benchmarks.table import find
from editr2.errors import ConfigError, DataError, shown
from editr2.files import read_object
from editr2.report.data import PASS_NAMES, RecordedRun, load_run, number
from editr2.report.data import Strip as RunStrip
from editr2.report.kept import KeptEvaluation, read_kept
from editr2.run.tracking import read_metrics

METRICS = "metrics.jsonl"
CODE = "judge's code and options"
ACCEPTED = "a folder of `editr2 benchmark` whose judging is done, or of a run with evaluations"


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    name: on the page, unlike the others'. same: what has to be alike in all of them, by what it is
    called. settings: by dotted name; where they differ, that is said. rows: of all passes.
    measures: the entry of `measures.KINDS`; headline: keys of it that come first. scale: of numbers
    shown. strips: by session id, of those that have any. judged: what strips show beside images,
    where it is not of `rows`: a run's strips may be of other rollouts than its evaluation. summary:
    of a benchmark whose report was written. by_place: the rows of a run by the places of its
    sessions, where `rows` have their ids; places: `rows` have places. made_of: by metric,
    what it is of where that may differ; it is compared only where it is the same. sampling: of a
    run, the settings that say how its evaluation was sampled, among others.
    """

    name: str
    about: Sequence[tuple[str, str]]
    same: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    measures: str
    headline: Sequence[str] = ()
    scale: float = 1.0
    strips: Mapping[str, Strip] = field(default_factory=dict)
    judged: Sequence[Row] | None = None
    summary: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    made_of: Mapping[str, Any] = field(default_factory=dict)
    by_place: Sequence[Row] | None = None
    places: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def by_the_place(self) -> Side:
        return self if self.by_place is None else replace(self, rows=self.by_place)

    @property
    def shown(self) -> Sequence[Row]:
        """The rows of its strips."""
        return self.rows if self.judged is None else self.judged


def sides_of(folders: Sequence[str | os.PathLike[str]]) -> list[Side]:
    """A side for each folder; of one run alone, its evaluations before and after training. Raises
    `UserError` for none, for what is no such folder, and for the same one twice."""
    paths = [Path(folder) for folder in folders]
    for whole, count in Counter(map(os.path.realpath, paths)).items():
        if count > 1:
            raise ConfigError(f"--compare: {whole} given twice (accepted: each folder once)")
    if len(paths) < 2:
        path = paths[0] if paths else None
        if path is None or (path / IDENTITY).is_file() or not (path / METRICS).is_file():
            given = f"{path} alone" if path else "no folder"
            raise ConfigError(
                f"--compare: {given} (accepted: two or more folders, or one of a run, whose "
                f"evaluations before and after training are compared)"
            )
        return [_of_run(path, f"{_last(path)} {name}", name) for name in PASS_NAMES]
    return [_side(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def called_alike(a: Side, b: Side) -> tuple[Side, Side]:
    """The two with sessions of the same names: by their place where one of them has no ids."""
    if a.places or b.places:
        return a.by_the_place(), b.by_the_place()
    return a, b


def _last(path: Path) -> str:
    return Path(os.path.abspath(path)).name


def _names(paths: Sequence[Path]) -> list[str]:
    """Of each the end of its path, as long as it must be to be no other's."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]

    def name(of: tuple[str, ...]) -> str:
        lengths = range(1, len(of) + 1)
        alone = (n for n in lengths if sum(other[-n:] == of[-n:] for other in parts) == 1)
        return str(Path(*of[-next(alone, len(of)) :]))

    return [name(of) for of in parts]


def _side(path: Path, name: str) -> Side:
    if (path / IDENTITY).is_file():
        return _of_benchmark(path, name)
    if (path / METRICS).is_file():
        return _of_run(path, name, None)
    raise ConfigError(f"--compare: {path}: neither {IDENTITY} nor {METRICS} (accepted: {ACCEPTED})")


# --------------------------------------------------------------------------------------- benchmarks


def _of_benchmark(folder: Path, name: str) -> Side:
    about = read_object(folder / IDENTITY, ACCEPTED)
    if not (folder / scores.FILE_NAME).is_file():
        raise ConfigError(f"--compare: {folder}: no {scores.FILE_NAME} yet (accepted: {ACCEPTED})")
    kind = find(str(about.get("benchmark")))
    judged, generated = (_mapping(about.get(key)) for key in ("judged", "generated"))
    facts = _mapping(judged.get("facts"))
    settings = {
        "sessions" if key == "heldout" else key: value
        for key, value in _mapping(generated.get("settings")).items()
    } or {key: generated[key] for key in ("images", "sessions") if key in generated}
    told = {
        "benchmark": kind.title,
        "editor": about.get("editor"),
        "judge": judged.get("title"),
        **facts,
    }
    rows = scores.read_rows(folder / scores.FILE_NAME)
    summary = read_object(file, ACCEPTED) if (file := folder / SUMMARY).is_file() else None
    notes = []
    if summary is not None and not _is_of(summary, rows, judged):
        summary = None
        notes.append(
            f"The report of {name} is of other scores, so there is no table of each side's own "
            f"numbers (--stages report makes it anew)."
        )
    return Side(
        name=name,
        about=[(str(key), str(value)) for key, value in told.items() if value is not None],
        same={
            "benchmark": about.get("benchmark"),
            "released rules": bool(judged.get("released")),
            "judge": judged.get("title"),
            **{f"judge, {key}": _content(value) for key, value in facts.items()},
            # Where a judge says nothing of itself, its code and options are all there is.
            **({} if facts else {CODE: judged.get("reward")}),
        },
        settings={"editor": about.get("editor"), **settings},
        rows=rows,
        measures=kind.measures,
        headline=kind.headline,
        scale=kind.scale,
        strips=read_strips(folder),
        summary=summary,
        notes=notes,
    )


def _is_of(summary: Mapping[str, Any], rows: Sequence[Row], judged: Mapping[str, Any]) -> bool:
    """Whether a report was made of these scores: by this reward, with as many in every state."""
    try:
        reward = summary["judge"].get("reward")
        said = {
            (way, metric, state): count
            for way, of in summary["passes"].items()
            for metric, states in of["counts"].items()
            for state, count in states.items()
            if count
        }
        ways = set(summary["passes"])
    except (KeyError, TypeError, AttributeError):
        return False
    found = Counter((row.way, row.metric, row.state) for row in rows if row.way in ways)
    return bool(reward == judged.get("reward") and said == found)


def _content(fact: Any) -> str:
    """What a fact says of content: prompts are named with where they are from, and a digest."""
    said = str(fact)
    digest = re.search(r"\(([0-9a-f]{8,})\)$", said)
    return digest[1] if digest else said


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --------------------------------------------------------------------------------------------- runs

HELD_OUT = "evaluated sessions"
WHOLE = ("success", "reward")
"""Of an evaluation's `per_session`, what has one value a session: at its last turn."""


def _of_run(folder: Path, name: str, evaluation: str | None) -> Side:
    """evaluation: the last of that name; None: the last of all, of which "after" comes first."""
    rows, _ = read_metrics(folder / METRICS)
    found = {row.get("name"): row for row in rows if row.get("event") == "eval"}
    wanted = evaluation or ("after" if "after" in found else next(reversed(found), None))
    if wanted not in found or "per_session" not in found[wanted]:
        what = f"evaluation “{evaluation}”" if evaluation else "evaluation"
        raise ConfigError(
            f"--compare: {folder}: no {what} with scores of sessions (accepted: {ACCEPTED})"
        )
    chosen, run = found[wanted], load_run(folder)
    depends = _mapping(_mapping(run.start.get("identity")).get("depends"))
    judges = _mapping(run.start.get("judges"))
    weights = _mapping(run.start.get("rewards"))
    sessions = depends.get("heldout") or f"{chosen.get('sessions')} sessions, not on record"
    told = {"evaluation": f"{wanted}, iteration {chosen.get('iteration')}", **judges}
    try:
        by_place = list(_rows(chosen, list(weights)))
        iteration = int(chosen.get("iteration") or 0)
        kept = read_kept(folder, [iteration], [])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{folder / METRICS}: per_session of evaluation “{wanted}”: {error!r} (accepted: as a "
            f"run writes it)"
        ) from error
    return Side(
        name=name,
        about=[(str(key), str(value)) for key, value in told.items()],
        same={
            HELD_OUT: sessions,
            "rewards": sorted(weights),
            "judge": depends.get("reward") if not judges else None,
            **{f"judge, {key}": _content(value) for key, value in judges.items()},
        },
        settings={**run.config, **({"evaluation": evaluation} if evaluation else {})},
        rows=list(_kept_rows(kept[0])) if kept else by_place,
        by_place=by_place if kept else None,
        places=not kept,
        measures="turns",
        headline=("success@last", "reward@last", "GA@last", "IF@last", "CC@last"),
        made_of={"reward": {key: weights[key] for key in sorted(weights)}},
        sampling=run.config,
        **_run_strips(folder, name, run, "before" if wanted == "before" else "after"),
    )


def _rows(evaluation: Mapping[str, Any], names: Sequence[str]) -> Iterator[Row]:
    """An evaluation's `per_session` as rows. It has no ids: sessions are called by their place. A
    score that is not there did not apply or failed, which only the evaluation's counts say."""
    per_session = evaluation["per_session"]
    known = {name.lower(): name for name in names}
    by_turn = {
        known.get(key, key): values for key, values in per_session.items() if key not in WHOLE
    }
    lengths = _lengths(list(by_turn.values()), len(per_session["success"]))
    failed = bool(evaluation.get("failed_scores"))
    state: scores.State = "failed" if failed else "not_applicable"
    reason = "failed, or did not apply: the run's record has no more" if failed else "did not apply"

    def row(n: int, turn: int, metric: str, value: float | None) -> Row:
        judged = value is not None
        return Row(
            image=place_name(n),
            way=EVALUATION,
            turn=turn,
            asked=turn,
            metric=metric,
            state="judged" if judged else state,
            value=value if judged else None,
            reason=None if judged else reason,
            task=None,
            mode=None,
            turns=lengths[n],
        )

    for n, turns in enumerate(lengths):
        for metric, values in by_turn.items():
            for t in range(turns):
                yield row(n, t + 1, metric, number(values[n][t]))
        for metric in WHOLE:
            yield row(n, turns, metric, number(per_session[metric][n]))


def _kept_rows(kept: KeptEvaluation) -> Iterator[Row]:
    """What a run keeps of an evaluation's sessions: by their ids, with modes, tasks and reasons."""
    for session in kept.sessions.values():
        last = len(session.turns)
        for t, turn in enumerate(session.turns):
            values = [*turn.scores.items(), ("reward", turn.reward)]
            for metric, value in [*values, *[("success", session.success)] * (t + 1 == last)]:
                silent = metric in turn.does_not_apply or turn.reason is None
                missing: scores.State = "not_applicable" if silent else "failed"
                yield Row(
                    image=session.id,
                    way=EVALUATION,
                    turn=t + 1,
                    asked=t + 1,
                    metric=metric,
                    state=missing if value is None else "judged",
                    value=value,
                    reason=turn.whys.get(metric) or (turn.reason if value is None else None),
                    task=turn.task,
                    mode=session.mode,
                    turns=last,
                )


EVALUATION = "evaluation"
"""The pass that an evaluation's rows are of: as `multipass`, with greedy intents."""


def place_name(n: int) -> str:
    return f"evaluated session {n + 1:04d}"


def _lengths(by_turn: Sequence[Sequence[Sequence[float | None]]], sessions: int) -> list[int]:
    """Up to the last turn of which there is any score."""
    found = []
    for n in range(sessions):
        seen = [t + 1 for of in by_turn for t, value in enumerate(of[n]) if value is not None]
        found.append(max(seen, default=max((len(of[n]) for of in by_turn), default=1)))
    return found


def _run_strips(folder: Path, name: str, run: RecordedRun, evaluation: str) -> dict[str, Any]:
    """`strips`, `judged` and `notes` of a side."""
    given = [strip for pair in run.pairs if (strip := getattr(pair, evaluation)) is not None]
    notes = []
    if given and run.setting("eval.strips_from") != "evaluation":
        what = "rollouts sampled as in training, not of the evaluation"
        notes.append(f"Film-strips of {name} are of {what}.")
    return {
        "strips": {
            strip.id: Strip(
                strip.id,
                strip.mode,
                _inside(folder, strip.image),
                tuple(turn.instruction for turn in strip.turns),
                {EVALUATION: tuple(_inside(folder, turn.image) for turn in strip.turns)},
            )
            for strip in given
        },
        "judged": [row for strip in given for row in _strip_rows(strip)],
        "notes": notes,
    }


def _strip_rows(strip: RunStrip) -> Iterator[Row]:
    for t, turn in enumerate(strip.turns):
        for metric, value in turn.scores.items():
            judged = value is not None
            silent = metric in turn.does_not_apply
            state: scores.State = "judged" if judged else "not_applicable" if silent else "failed"
            yield Row(
                image=strip.id,
                way=EVALUATION,
                turn=t + 1,
                asked=t + 1,
                metric=metric,
                state=state,
                value=value if judged else None,
                reason=turn.whys.get(metric) or (turn.reason if state == "failed" else None),
                task=None,
                mode=strip.mode,
                turns=len(strip.turns),
            )


def _inside(folder: Path, name: str | None) -> Path | None:
    """The file of a strip; none outside of the strips."""
    root = (folder / "strips").resolve()
    path = None if name is None else (root / name).resolve()
    return path if path is not None and path.is_relative_to(root) else None


# -------------------------------------------------------------------------------------- differences


def check_alike(first: Side, other: Side) -> None:
    """Raises `UserError` with the first thing that must be alike and is not."""
    for what, a, b in unlike(first, other):
        raise ConfigError(
            f"--compare: {what}: {a} of {first.name}, {b} of {other.name} (accepted: folders "
            f"of one benchmark, judged alike)"
        )
    check_instructions(first, other)


def unlike(first: Side, other: Side) -> Iterator[tuple[str, Any, Any]]:
    """What must be alike and is not, with that of each."""
    for what in sorted({**first.same, **other.same}, key=lambda what: what == CODE):
        a, b = (side.same.get(what, "none") for side in (first, other))
        if a != b:
            yield what, a, b


def check_instructions(first: Side, other: Side) -> None:
    """Raises `UserError` for a session that has other instructions in each."""
    for name, strip in first.strips.items():
        told = other.strips.get(name)
        if told is not None and told.turns != strip.turns:
            raise ConfigError(
                f"--compare: session {shown(repr(name))} has other instructions in {first.name} "
                f"than in {other.name} (accepted: folders of the same sessions)"
            )


def made_otherwise(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Metrics that are not the same in all, with what each is made of."""
    names = dict.fromkeys(name for side in sides for name in side.made_of)
    found = {name: [side.made_of.get(name) for side in sides] for name in names}
    return {name: of for name, of in found.items() if any(one != of[0] for one in of)}


def differing(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Settings that differ: the name, and each side's value."""
    names = dict.fromkeys(name for side in sides for name in side.settings)
    found = []
    for name in names:
        values = [side.settings.get(name, "–") for side in sides]
        if any(value != values[0] for value in values) and name not in NO_SETTING:
            found.append((name, [str(value) for value in values]))
    return found


NO_SETTING = {"out"}
"""Of what is recorded, what numbers do not depend on."""
