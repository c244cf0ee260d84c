"""What a page shows of a run that is followed, as plain JSON values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.errors import counted
from editr2.report.build import HEALTH
from editr2.report.data import MODES, mean, number
from editr2.report.kept import read_kept
from editr2.report.pictures import Picture, Pictures
from editr2.run.tracking import Row, duration, precise
from editr2.secrets import withheld_text
from editr2.watch.follow import Followed, Seen

POINTS = 1500
"""Of a curve; more iterations become means of neighbours."""
SESSIONS = 12
"""Whose images are shown."""
FAILURES = 20
SIDE = 320
"""Pixels of an image's long side."""

NAMES = {
    "if_turn": "IF",
    "cc_turn": "CC",
    "ga_turn": "GA",
    "ratio_error": "|ratio − 1| of the replay",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "accuracy": "accuracy",
    "success": "sessions all right",
    "text_ratio_error": "|ratio − 1| of the texts",
    "unread": "answers that cannot be read",
    "nll": "loss of held-out traces",
    **HEALTH,
}
FIRST = ("success", "accuracy", "loss", "ratio_error", "sampled_error", "kl", "grad_norm")
"""Numbers whose curves come first."""
HIDDEN = {"iteration", "elapsed_s", "reward", "not_applicable", "event"}
LOGS = {"ratio_error", "sampled_error", "text_ratio_error"}
COLOURS = {"reward": 0, "IF": 1, "CC": 2, "GA": 3, "success": 4}
"""As on a run's report: one colour, one meaning."""
OTHER = 5


def page_state(run: Followed) -> dict[str, Any]:
    """Everything but the images."""
    standing = status(run)
    return {
        "version": str(run.version),
        "title": run.folder.resolve().name,
        "status": standing,
        "done": run.done,
        "planned": run.planned,
        "left": _left(run) if standing["kind"] in ("running", "quiet") else None,
        "speed": _speed(run),
        "facts": _facts(run),
        "notes": _notes(run),
        "curves": curves(run),
        "evaluations": _evaluations(run),
        "failures": _failures(run),
    }


def status(run: Followed) -> dict[str, Any]:
    """kind: waiting, running, quiet (nobody can be seen at work, and nobody said that it ended),
    stopped or finished. text: in words. age: seconds since the newest row."""
    working, age = run.working(), run.age
    ended = run.of("stop")
    finished = bool(ended) or (run.planned is not None and run.done >= run.planned)
    ago = None if age is None else f"its newest row is {duration(age)} old"
    if age is None and not working:
        kind, text = "waiting", f"waits for {run.folder}: no run has begun there"
    elif working:
        kind, text = "running", "at work" + (f"; {ago}" if ago else ", before its first row")
    elif finished:
        kind = "finished"
        text = f"finished: {ended[-1].get('reason')}" if ended else "finished"
    elif working is None:
        kind, text = "quiet", f"on another machine, or it cannot be seen from here; {ago}"
    else:
        kind, text = "stopped", f"stopped before its end; {ago}; the same command goes on"
    return {"kind": kind, "text": text, "age": age}


def _left(run: Followed) -> str | None:
    if run.planned is None or not run.pace.seconds:
        return None
    return duration(run.pace.left(run.planned - run.done))


def _speed(run: Followed) -> str | None:
    if not run.pace.seconds:
        return None
    last, typical = precise(run.pace.seconds[-1]), precise(run.pace.typical)
    return f"{last} s an iteration (typical {typical})"


def _facts(run: Followed) -> list[tuple[str, str]]:
    config, start = run.settings, run.start
    made = start.get("identity") if isinstance(start.get("identity"), dict) else {}
    made = made.get("made", made) if isinstance(made, dict) else {}  # a verifier's has it below
    policy, rollout, reward = (_section(config, name) for name in ("policy", "rollout", "reward"))
    groups = " × ".join(
        f"{rollout[key]} {word}"
        for key, word in (("sessions", "sessions"), ("siblings", "siblings"), ("turns", "turns"))
        if key in rollout
    )
    processes = start.get("processes", made.get("processes"))
    facts = {
        "objective": start.get("objective"),
        "policy": policy.get("model") or policy.get("weights"),
        "judge": reward.get("name") or reward.get("function"),
        "an iteration": groups if start.get("objective") is None else None,
        "device": start.get("device") or made.get("device"),
        "processes": processes if processes not in (None, 1) else None,
        "started": made.get("date"),
    }
    return [(name, withheld_text(str(v))) for name, v in facts.items() if v is not None and v != ""]


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _notes(run: Followed) -> list[dict[str, str]]:
    """What one should know. kind: alarm, warn, or note."""
    notes: list[tuple[str, str]] = []
    rows = [run.train[i] for i in sorted(run.train)]
    for row in run.of("stop"):
        notes.append(("note", f"stopped early: {row.get('reason')}"))
    evaluations = run.of("eval")
    if evaluations and isinstance(alarms := evaluations[-1].get("alarms"), dict):
        at = evaluations[-1].get("iteration")
        notes += [("alarm", f"at iteration {at}: {text}") for text in alarms.values()]
    if rows:
        last = rows[-1]
        for name in last.get("non_finite") or ():
            notes.append(("alarm", f"{name} is not finite at iteration {last['iteration'] + 1}"))
        if last.get("advantage_abs") == 0:
            notes.append(
                (
                    "warn",
                    "the newest iteration trains nothing: siblings tie, or their turns "
                    "are left out",
                )
            )
    failed = [row for row in rows if row.get("failed_scores")]
    if failed:
        count = sum(int(number(row["failed_scores"]) or 0) for row in failed)
        within = f"in {len(failed)} of {counted(len(rows), 'iteration')}"
        notes.append(("warn", f"{counted(count, 'score')} failed, {within}"))
    errors = [e for row in rows if (e := number(row.get("ratio_error"))) is not None]
    if errors:
        exact = sum(error == 0 for error in errors)
        text = (
            f"sentinel: |ratio − 1| of the replay at most {max(errors):.1g}, exactly 0 in {exact} "
        )
        notes.append(("note", f"{text}of {counted(len(errors), 'iteration')}"))
    if run.start.get("heldout_is_training"):
        notes.append(("note", "no held-out sessions: evaluated on the training sessions"))
    identity = run.start.get("identity")
    for again in identity.get("resumed", ()) if isinstance(identity, dict) else ():
        if isinstance(again, dict):
            at, date = again.get("iteration"), again.get("date")
            notes.append(("note", f"went on from iteration {at}, {date}"))
    if run.torn:
        torn, are = counted(run.torn, "line"), "is" if run.torn == 1 else "are"
        notes.append(("note", f"{torn} of metrics.jsonl cannot be read and {are} left out"))
    return [{"kind": kind, "text": withheld_text(text)} for kind, text in notes]


def _failures(run: Followed) -> list[dict[str, Any]]:
    """The newest scores that failed, with their reasons: of the judges' record, equal ones once
    with their number, and the first of each iteration."""
    found: dict[tuple[str, str], int] = {}
    for row in reversed(run.failures):
        at = (_where(row), withheld_text(str(row["failed"])))
        found[at] = found.get(at, 0) + 1
    for iteration in sorted(run.train, reverse=True):
        if (why := run.train[iteration].get("first_failure")) is not None:
            found[f"iteration {iteration + 1}, the first", withheld_text(str(why))] = 1
    said = [{"at": at, "why": why, "times": times} for (at, why), times in found.items()]
    return said[:FAILURES]


def _where(row: Row) -> str:
    """Where a call of a judge belongs, as its line of the record has it."""
    parts, iteration = [], row.get("iteration")
    if row.get("purpose") is not None:
        parts.append(str(row["purpose"]))
    if isinstance(iteration, int):  # of training people count from 1; weights after k updates are k
        parts.append(f"iteration {iteration + (row.get('purpose') == 'train')}")
    for name, before in (("turn", "turn "), ("name", "")):
        if (value := row.get(name)) is not None:
            many = value if isinstance(value, list) else [value]
            plural = "s" if before and len(many) > 1 else ""
            parts.append(f"{before.strip()}{plural} ".lstrip() + ", ".join(map(str, many)))
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------- curves


def curves(run: Seen) -> list[dict[str, Any]]:
    """Of what has numbers, a chart each: reward, scores and evaluations first, then whatever else a
    row has (`small`)."""
    rows = [run.train[i] for i in sorted(run.train)]
    x = [row["iteration"] + 1 for row in rows]
    evaluated = [row for row in run.of("eval") if number(row.get("iteration")) is not None]
    found = [
        _chart("Reward by turn", x, _turns(rows, "reward_turn") or _line(rows, "reward", "", 0)),
        _chart("Scores, mean over turns", x, _scores(rows)),
        _evaluated(evaluated),
    ]
    numbers = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    keys = [key for key in FIRST if key in numbers]
    keys += [key for key in numbers if key not in FIRST and key not in HIDDEN]
    for key in keys:
        colour = COLOURS.get(key, OTHER)
        lines = _line(rows, key, "", colour)
        found.append(_chart(NAMES.get(key, key), x, lines, log=key in LOGS, small=True))
    for key in dict.fromkeys(k for row in evaluated for k, v in row.items() if _is_number(v)):
        if key not in HIDDEN | {"sessions", "failed_scores"}:
            at = [row["iteration"] for row in evaluated]
            lines = _line(evaluated, key, "", OTHER)
            found.append(_chart(f"{NAMES.get(key, key)}, evaluated", at, lines, small=True))
    phases = dict.fromkeys(name for row in rows for name in _section(row, "seconds"))
    seconds = [
        _series(name, [number(_section(row, "seconds").get(name)) for row in rows], colour)
        for colour, name in enumerate(phases)
    ]
    found.append(_chart("Seconds by phase", x, seconds, small=True))
    return [chart for chart in found if chart is not None]


def _is_number(value: Any) -> bool:
    return number(value) is not None


def _series(label: str, y: Sequence[float | None], colour: int, dash: int = 0) -> dict[str, Any]:
    return {"label": label, "y": y, "colour": colour, "dash": dash}


def _line(rows: Sequence[Row], key: str, label: str, colour: int) -> list[dict[str, Any]]:
    return [_series(label, [number(row.get(key)) for row in rows], colour)]


def _of_turn(row: Mapping[str, Any], key: str, turn: int) -> float | None:
    values = row.get(key)
    value = values[turn] if isinstance(values, list) and turn < len(values) else None
    return number(value.get("mean") if isinstance(value, dict) else value)


def _count(rows: Iterable[Mapping[str, Any]], key: str) -> int:
    return max((len(v) for row in rows if isinstance(v := row.get(key), list)), default=0)


def _turns(rows: Sequence[Mapping[str, Any]], key: str, name: str = "t") -> list[dict[str, Any]]:
    return [
        _series(f"{name}{t + 1}", [_of_turn(row, key, t) for row in rows], COLOURS["reward"], t)
        for t in range(_count(rows, key))
    ]


def _scores(rows: Sequence[Row]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(
        key
        for row in rows
        for key, v in row.items()
        if key.endswith("_turn") and isinstance(v, list)
    )
    found, own = [], OTHER
    for key in keys:
        if key != "reward_turn":
            name = NAMES.get(key, key.removesuffix("_turn"))
            own += name not in COLOURS
            values = [
                mean(_of_turn(row, key, t) for t in range(_count([row], key))) for row in rows
            ]
            found.append(_series(name, values, COLOURS.get(name, own)))
    return found


def _evaluated(rows: Sequence[Row]) -> dict[str, Any] | None:
    """By iteration, the last of each; of verifiers, which have no turns, nothing."""
    at = {row["iteration"]: row for row in rows if _count([row], "reward_turn")}
    found = [at[iteration] for iteration in sorted(at)]
    lines = _turns(found, "reward_turn")
    apart = [_section(row, "eval_reward") for row in found]
    lines += [{**line, "colour": 6} for line in _turns(apart, "reward_turn", "eval.reward t")]
    return _chart("Reward by turn, evaluated", sorted(at), lines) if len(found) > 1 else None


def _chart(
    title: str,
    x: Sequence[float],
    series: Sequence[Mapping[str, Any]],
    *,
    log: bool = False,
    small: bool = False,
) -> dict[str, Any] | None:
    """None where there is nothing to draw."""
    drawn = [one for one in series if any(value is not None for value in one["y"])]
    if not drawn:
        return None
    size = math.ceil(len(x) / POINTS)
    lines = [{**one, "y": _binned(one["y"], size)} for one in drawn]
    return {"title": title, "x": _binned(x, size), "series": lines, "log": log, "small": small}


def _binned(values: Sequence[float | None], size: int) -> list[float | None]:
    parts = (values[at : at + size] for at in range(0, len(values), size))
    means = (part[0] if size == 1 else mean(part) for part in parts)
    return [None if value is None else float(f"{value:.5g}") for value in means]


def _evaluations(run: Followed) -> dict[str, Any] | None:
    """The table of evaluations, the newest first."""
    rows = [row for row in reversed(run.of("eval")) if isinstance(row.get("iteration"), int)]
    if not rows:
        return None
    turns = _count(rows, "reward_turn")
    plain = [
        key
        for key in dict.fromkeys(k for row in rows for k, v in row.items() if _is_number(v))
        if key in ("nll", "accuracy", "unread")
    ]
    right = any(isinstance(row.get("success"), dict) for row in rows)
    head = ["iteration", *(f"reward t{t + 1}" for t in range(turns)), *plain]
    head += ["sessions all right"] if right else []
    body = []
    for row in rows:
        name = f"{row['iteration']}" + (f" ({row['name']})" if row.get("name") else "")
        cells = [name, *(_cell(_stat(row, t)) for t in range(turns))]
        cells += [_cell((number(row.get(key)), None)) for key in plain]
        if right:
            share = number(_section(row, "success").get("mean"))
            cells.append("–" if share is None else f"{share:.1%}")
        body.append(cells)
    return {"head": head, "rows": body}


def _stat(row: Row, turn: int) -> tuple[float | None, float | None]:
    values = row.get("reward_turn")
    value = values[turn] if isinstance(values, list) and turn < len(values) else None
    if not isinstance(value, dict):
        return number(value), None
    return number(value.get("mean")), number(value.get("se"))


def _cell(stat: tuple[float | None, float | None]) -> str:
    value, se = stat
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ± {se:.3f}" if se is not None else "")


# ------------------------------------------------------------------------------------------- images


def page_strips(run: Followed) -> dict[str, Any]:
    """The newest sessions that there are images of, those that failed or have the least reward
    first: of an evaluation where one was kept, else of film-strips."""
    found = _of_evaluation(run) or _of_strips(run.folder / "strips")
    if found is None:
        return {"title": None, "sessions": []}
    title, sessions = found
    sessions.sort(key=_worst)
    return {"title": title, "sessions": sessions[:SESSIONS], "of": len(sessions)}


def _worst(session: Mapping[str, Any]) -> tuple[bool, float]:
    failed = any(turn["reason"] for turn in session["turns"])
    rewards = [turn["reward"] for turn in session["turns"] if turn["reward"] is not None]
    return not failed, min(rewards, default=0.0)


def _of_evaluation(run: Followed) -> tuple[str, list[dict[str, Any]]] | None:
    at = [row["iteration"] for row in run.of("eval") if isinstance(row.get("iteration"), int)]
    kept = read_kept(run.folder, at[-1:], []) if at else []
    if not kept or kept[-1].picture is None:
        return None
    sessions = []
    for session in kept[-1].sessions.values():
        cut = kept[-1].images(session)
        if cut.source is None:
            continue
        turns = [
            _turn(turn.instruction, image, asked, turn.scores, turn.reward, turn.reason, turn.whys)
            for turn, image, asked in zip(
                session.turns,
                [*cut.outputs, *[None] * len(session.turns)],
                [*cut.expected, *[None] * len(session.turns)],
                strict=False,
            )
        ]
        sessions.append(_session(session.id, session.mode, cut.source, turns, session.small))
    return f"Evaluated at iteration {at[-1]}", sessions


def _of_strips(folder: Path) -> tuple[str, list[dict[str, Any]]] | None:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return None
    try:
        given = json.loads(files[-1].read_text("utf-8"), parse_constant=lambda _: None)["sessions"]
        pictures = Pictures(folder, SIDE)
        sessions = []
        for strip in given:
            source = pictures(strip.get("image"))
            turns = []
            for turn in strip.get("turns") or ():
                image, asked = pictures(turn.get("image")), pictures(turn.get("expected"))
                scores = {str(k): number(v) for k, v in (turn.get("scores") or {}).items()}
                reward, why = number(turn.get("reward")), turn.get("why") or {}
                turns.append(
                    _turn(
                        turn.get("instruction"),
                        _src(image),
                        _src(asked),
                        scores,
                        reward,
                        turn.get("reason"),
                        why,
                    )
                )
            small = source is not None and source.pixelated
            sessions.append(_session(strip["id"], strip.get("mode"), _src(source), turns, small))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it is being written, or somebody else's
    return f"Film-strips {files[-1].stem} training", sessions


def _src(picture: Picture | None) -> str | None:
    return None if picture is None else picture.src


def _session(
    id: object, mode: object, source: str | None, turns: list[dict[str, Any]], small: bool
) -> dict[str, Any]:
    said = MODES.get(str(mode), mode) if mode else None
    return {"id": str(id), "mode": said, "source": source, "turns": turns, "small": small}


def _turn(
    instruction: object,
    image: str | None,
    asked: str | None,
    scores: Mapping[str, float | None],
    reward: float | None,
    reason: object,
    whys: Mapping[str, object],
) -> dict[str, Any]:
    return {
        "instruction": str(instruction or ""),
        "image": image,
        "asked": asked,
        "scores": {name: value for name, value in scores.items() if value is not None},
        "reward": reward,
        "reason": None if reason is None else withheld_text(str(reason)),
        "whys": {str(name): withheld_text(str(why))[:400] for name, why in whys.items()},
    }
