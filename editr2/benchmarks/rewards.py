"""A reward, judged: how often it is right about labelled comparisons.

    editr2 benchmark editscore-bench --data FOLDER --reward.name editscore …
    editr2 benchmark tiger-bench --data FOLDER --reward.name editscore …
    editr2 benchmark my/pairs.jsonl --reward.function my_judge:Judge

The folder of a run has `judges.jsonl`, the record of answers; `scores.jsonl`, what was said of
every output; `comparisons.jsonl`, what that makes of every pair; `summary.json` and `report.html`.
The same command again asks only what is not there or failed.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editr2.benchmarks.pairs.accuracy import SUM, Accuracy, Measure, Verdict, verdicts_of
from editr2.benchmarks.pairs.files import kind_of
from editr2.benchmarks.pairs.judging import Answers, judge_outputs
from editr2.benchmarks.pairs.labelled import Labelled
from editr2.benchmarks.pairs.page import write_page
from editr2.benchmarks.pairs.printed import lines
from editr2.benchmarks.pairs.table import PairSet
from editr2.benchmarks.settings import check_folder
from editr2.benchmarks.table import PAIR_SETS, Source
from editr2.config import UNSET_WEIGHTS, Config
from editr2.config.plugins import resolve
from editr2.errors import ConfigError
from editr2.files import json_line, write_lines
from editr2.judge.summary import REASONS
from editr2.judge.trial import CountingRecord, prepare
from editr2.rewards.base import shortened, weights_of
from editr2.rewards.load import load_reward
from editr2.rewards.panel import Panel
from editr2.rewards.table import REWARDS
from editr2.run.identity import provenance, reward_fingerprint
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes

SCORES, COMPARISONS, SUMMARY, PAGE = (
    "scores.jsonl",
    "comparisons.jsonl",
    "summary.json",
    "report.html",
)

MOST_FAILED = 0.02
"""Of the pairs that a headline rests on; above, there is none."""


def pair_set_of(name: str) -> str | None:
    """The name in the table that `editr2 benchmark NAME` means: itself, or what the file of that
    path holds; None where it is no set of pairs."""
    if name in PAIR_SETS:
        return name
    return kind_of(Path(name)) if os.path.isfile(name) else None


def run_rewards(
    config: Config,
    name: str,
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    sources: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    processes: Processes | None = None,
) -> list[str]:
    """Does all of it, on every process, and returns what the first is to print.

    config: its `reward`, `credit.weights`, `seed`, and `data.resize` stretch or no, of outputs of
    another size than their source (no: as the set's own evaluator has it). name: of the table, or a
    path that `pair_set_of` knows. data: the set's file or folder, or hf:owner/name; none is the
    path, or the set on the hub. sources: the folder of images where they are not beside the file.
    limit: only the first comparisons. Raises `UserError` for whatever is wrong with what was given,
    before anything is asked.
    """
    known = pair_set_of(name)
    if known is None:
        raise ConfigError(f"NAME: {name!r} (accepted: {', '.join(PAIR_SETS)}, or a file of pairs)")
    if not (config.reward.name or config.reward.function or config.reward.use):
        raise ConfigError(
            f"reward.name: none (accepted: what is to be judged: {', '.join(REWARDS)}, or "
            f"package.module:Class)"
        )
    entry = resolve("benchmark", known, PAIR_SETS, what="NAME")
    assert isinstance(entry, PairSet)
    if data is None and name != known:
        data = name
    processes = processes or open_processes()
    out = Path(out)
    check_folder(out, COMPARISONS)
    record = CountingRecord(out, index=processes.index, cache=config.reward.cache)
    panel = load_reward(config.reward, record)
    weights, overall = _overall(panel, config)
    panel.quick_look()
    source = Source(_path(data), _path(sources))
    labelled = entry.read(source).first(limit)
    labelled = labelled.resized(entry.stretched or config.data.resize == "stretch")
    lock = RunLock(out)
    processes.on_main(lambda: lock.take(make=True))
    try:
        for note in prepare(panel):
            if processes.main:
                print(f"note: {note}", file=sys.stderr)
        digest = labelled.digest(known, reward_fingerprint(panel), str(config.seed))
        answers = judge_outputs(
            out / SCORES,
            labelled,
            panel,
            processes,
            digest=digest,
            seed=config.seed,
            finished=_finished(out / SUMMARY),
        )
    finally:
        record.close()
        lock.release()
    verdicts = verdicts_of(
        labelled.comparisons,
        answers,
        lambda one: entry.score(overall, panel.names, one),
        weights,
    )
    measures = _measures(entry, verdicts)
    summary = {
        "benchmark": known,
        "title": entry.title,
        "about": entry.about,
        "of": digest,
        "seed": config.seed,
        "reward": _reward(panel, config, weights, overall),
        **_counts(labelled, answers, panel.names, verdicts),
        **_headline(entry, measures),
        "measures": [measure.written() for measure in measures],
        "by_score": _by_score(labelled, answers, panel.names, weights),
        "made": provenance(processes.count, "cpu"),
    }
    tables = list(entry.shown_as({measure.key: measure for measure in measures}))
    said = [line.replace("±", "+-") for line in lines(summary, tables)]
    if processes.main:
        write_lines(out / COMPARISONS, (json_line(_comparison(verdict)) for verdict in verdicts))
        write_page(out / PAGE, summary, tables, labelled, answers, verdicts)
        text = json.dumps(summary, ensure_ascii=False, indent=2)
        write_lines(out / SUMMARY, [text + "\n"])  # last: it says that the scores are whole
    processes.wait()
    if not processes.main:
        return []
    return [*said, f"scores: {out / SCORES}", f"page: {out / PAGE}"]


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)


def _overall(panel: Panel, config: Config) -> tuple[dict[str, float] | None, str]:
    """The weights, and the score that stands for all. Raises `ConfigError` where nobody said what
    that is."""
    names = panel.names
    try:
        weights = weights_of(names, config.credit.weights)
        return weights, names[0] if len(names) == 1 else SUM
    except ConfigError:
        own = next((name for name in ("overall", "O") if name in names), None)
        if own is None or config.credit.weights not in UNSET_WEIGHTS:
            raise
        return None, own


def _finished(summary: Path) -> str | None:
    """The digest that a finished run left."""
    try:
        said = json.loads(summary.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return said.get("of") if isinstance(said, dict) else None


def _measures(entry: PairSet, verdicts: Sequence[Verdict]) -> list[Measure]:
    return [m for m in entry.measured(Accuracy(verdicts)) if m is not None]


def _by_score(
    labelled: Labelled,
    answers: Answers,
    names: Sequence[str],
    weights: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Of every score by itself, and of their sum, accuracy over all pairs of the overall label."""
    of = [c for c in labelled.comparisons if c.groups.get("dimension", "overall") == "overall"]
    found = {}
    for name in [*names, *([SUM] if weights is not None and len(names) > 1 else [])]:
        accuracy = Accuracy(verdicts_of(of, answers, lambda one, name=name: name, weights))  # type: ignore[misc]
        measure = accuracy.accuracy(f"accuracy/score={name}", accuracy.some())
        if measure is not None:
            found[name] = measure.written()
    return found


def _headline(entry: PairSet, measures: Sequence[Measure]) -> dict[str, Any]:
    """The values of its keys; or why there is none."""
    found = {m.key: m for m in measures}
    shown = [found[key] for key in entry.headline if key in found]
    for measure in shown:
        if measure.failed > MOST_FAILED * measure.asked:
            why = f"{measure.failed} of {measure.asked} {measure.unit} failed ({measure.key})"
            return {"headline": None, "why": f"{why}, more than {MOST_FAILED:.0%}"}
    known = {measure.key: measure.written()["value"] for measure in shown}
    if not known or any(value is None for value in known.values()):
        return {"headline": None, "why": "no pair was judged"}
    return {"headline": known}


def _counts(
    labelled: Labelled, answers: Answers, names: Sequence[str], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    scores = {name: [row[name] for row in answers.values()] for name in names}
    reasons: dict[str, Counter[str]] = {"failed": Counter(), "not_applicable": Counter()}
    for row in answers.values():
        for name, score in row.items():
            if score.value is None:
                state = "failed" if score.failed else "not_applicable"
                reasons[state][f"{name}: {shortened(score.reason or 'no reason given')}"] += 1
    states = Counter(verdict.state for verdict in verdicts)
    return {
        "outputs": len(answers),
        "scores": {
            name: {
                "judged": sum(score.value is not None for score in of),
                "not_applicable": sum(not score.applies for score in of),
                "failed": sum(score.failed for score in of),
            }
            for name, of in scores.items()
        },
        "pairs": {
            "asked": len(verdicts),
            **{state: states[state] for state in ("judged", "not_applicable", "failed")},
            "ties": sum(verdict.right == 0.5 for verdict in verdicts),
            "tied_by_people": sum(verdict.tie for verdict in verdicts),
        },
        "left_out": dict(labelled.left_out.most_common()),
        "reasons": {state: dict(of.most_common(REASONS)) for state, of in reasons.items()},
    }


def _reward(
    panel: Panel, config: Config, weights: Mapping[str, float] | None, overall: str
) -> dict[str, Any]:
    return {
        "name": " and ".join(str(use.function or use.name) for _, use in config.reward.uses),
        "scores": list(panel.names),
        "overall": overall,
        "weights": None if weights is None else dict(weights),
        "fingerprint": reward_fingerprint(panel),
        "released": any(bool(use.options.get("released")) for _, use in config.reward.uses),
        "facts": panel.facts,
    }


def _comparison(verdict: Verdict) -> dict[str, Any]:
    """A line of comparisons.jsonl."""
    pair = verdict.comparison.pairs[verdict.place]
    said: dict[str, Any] = {
        "id": verdict.comparison.id,
        "better": pair.better,
        "worse": pair.worse,
        "by": verdict.by,
        "state": verdict.state,
        "scores": [verdict.better.value, verdict.worse.value],
    }
    if pair.tie:
        said["tie"] = True
    elif verdict.state == "judged":
        said["right"] = verdict.right
    if verdict.comparison.margin is not None:
        said["margin"] = verdict.comparison.margin
    return said | dict(verdict.comparison.groups)
