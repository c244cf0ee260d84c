"""`editr2 verifier eval`: what a verifier says of pairs and of edits with gold, and what that is
worth (`measures`), in eval.json and on a page.

The verifier is asked as the reward asks it, whether it is served or a folder. What it wrote stands
in the folder as a stage's files do, so that it can be selected from and learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from editr2.errors import ConfigError, DataError, counted
from editr2.files import in_place_of
from editr2.judge.text import WIDTH, Table, laid_out
from editr2.report.dots import ONE, with_interval
from editr2.report.paired import Estimate
from editr2.rewards.record import Record, calls_of
from editr2.run.lock import RunLock
from editr2.run.processes import open_processes
from editr2.verifier import measures
from editr2.verifier.figures import Cost, Evaluation, evaluation
from editr2.verifier.files import (
    PAIRS,
    PRINCIPLES,
    TRACES,
    Edit,
    Preference,
    Told,
    edits_of,
    read_edits,
    read_told,
    write_edits,
    write_told,
)
from editr2.verifier.measures import Bin, Judged, JudgedPair, Measure
from editr2.verifier.objectives import folder_of, read_pairs
from editr2.verifier.page import PAGE, write_page
from editr2.verifier.stage_settings import EvalConfig, stage_problems
from editr2.verifier.tracing import showing
from editr2.verifier.writers import ask, open_writer, seconds_of

SUMMARY = "eval.json"
PURPOSE = "eval"


def evaluate_verifier(config: EvalConfig) -> list[str]:
    """Asks and writes; returns what to print. Raises `UserError` for bad settings and data, and a
    verifier that cannot be asked at all."""
    for problem in stage_problems(config):
        raise ConfigError(problem)
    processes, out = open_processes(), Path(config.out)
    pairs, edits, gold = read_data(str(config.data.path), config.data.limit)
    asked = [*edits_of(pairs), *edits]
    others = None if config.against is None else read_other(config.against, pairs)
    with RunLock(out) as lock:
        processes.on_main(lambda: lock.take(make=True))
        record = Record(out, index=processes.index)
        try:
            ((at, use),) = config.judge.uses
            writer = open_writer(at, use, record, processes.device)
            with calls_of(purpose=PURPOSE):
                said = ask(writer, asked, config.seed, processes, showing("judged"))
            name = writer.name
        finally:
            record.close()
        if not processes.main:
            return []
        found = evaluation(name, pairs, edits, gold, said, seconds_of(out, PURPOSE))
        if others is not None:
            other = Path(str(config.against)).name
            found = replace(found, gain=measures.gain(other, found.pairs, others))
        told = [
            replace(one, gold=gold.get(one.id)) for each in found.everybody for one in each.told
        ]
        write_edits(out / PRINCIPLES, asked)
        write_told(out / TRACES, told)
        with in_place_of(out / SUMMARY) as part:
            part.write_text(json.dumps(found.written(), indent=1, ensure_ascii=False) + "\n")
        tables = tables_of(found)
        write_page(out / PAGE, found, tables)
    said_lines = [f"verifier: {name}", f"{found.count}", cost_line(found.cost)]
    said_lines.append(f"judged: {', '.join(found.judged)}")
    for table in tables:
        said_lines += ["", *laid_out(table, WIDTH)]
    return [*said_lines, "", f"summary: {out / SUMMARY}", f"page: {out / PAGE}"]


def read_data(
    folder: str, limit: int | None
) -> tuple[list[Preference], list[Edit], dict[str, tuple[int, ...]]]:
    """Pairs, edits with gold, and their gold by id: of whichever of pairs.jsonl and traces.jsonl
    with gold there is. Raises `DataError` where there is nothing to hold a verifier against."""
    root, gold = folder_of(folder, "data.path"), dict[str, tuple[int, ...]]()
    pairs = read_pairs(folder, "data.path")[0][:limit] if (root / PAIRS).is_file() else []
    edits: list[Edit] = []
    if (root / TRACES).is_file():
        known = read_edits(root / PRINCIPLES, principles=True)
        for told in read_told(root / TRACES, known):
            if told.gold is None:
                continue
            if gold.setdefault(told.id, told.gold) != told.gold:
                raise DataError(
                    f"{root / TRACES}: {told.id}: two golds (accepted: the same in every trace)"
                )
        edits = [edit for edit in known if edit.id in gold][:limit]
    if not pairs and not edits:
        raise DataError(
            f"data.path: {folder}: neither {PAIRS} nor {TRACES} with gold (accepted: one of them)"
        )
    return pairs, edits, gold


def read_other(folder: str, pairs: Sequence[Preference]) -> list[JudgedPair]:
    """What another verifier said of the same pairs, from the folder of its evaluation. Raises
    `DataError` where a pair is not there, or was asked about otherwise."""
    root = folder_of(folder, "against")
    edits = {edit.id: edit for edit in read_edits(root / PRINCIPLES, principles=True)}
    told: dict[str, list[Told]] = {}
    for one in read_told(root / TRACES, list(edits.values())):
        told.setdefault(one.id, []).append(one)

    def judged(edit: Edit) -> Judged:
        known = edits.get(edit.id)
        if known is None or (known.instruction, known.principles) != (
            edit.instruction,
            edit.principles,
        ):
            what = "not there" if known is None else "asked about otherwise"
            raise DataError(f"against: {root}: {edit.id}: {what} (accepted: the same pairs)")
        some = told.get(edit.id, [])
        return Judged(edit, len(some), tuple(some), str(edit.image.path))

    return [JudgedPair(pair, judged(pair.win), judged(pair.lose)) for pair in pairs]


# ------------------------------------------------------------------------------------------- shown


def cost_line(cost: Cost) -> str:
    said = [counted(cost.traces, "trace"), f"{cost.characters:.0f} characters"]
    if cost.tokens is not None:
        said.append(f"{cost.tokens:.0f} tokens")
    if cost.seconds is not None:
        said.append(f"{cost.seconds:.3g} s each")
    return "cost: " + ", ".join(said)


def tables_of(found: Evaluation) -> list[Table]:
    """For the terminal and the page."""
    tables = []
    if found.preferences:
        tables.append(
            Table(
                "Preferred outputs that score higher",
                ["accuracy", "pairs", "judged", "equal"],
                [(one.name, _preference(one)) for one in found.preferences],
                "95 % intervals by a bootstrap over sources; half is chance, equal scores are half "
                "right, and pairs that are not judged are left out.",
            )
        )
        if (gain := found.gain) is not None:
            tables.append(
                Table(
                    f"Beside {gain.other}",
                    ["accuracy", "pairs"],
                    [
                        (gain.other, [_shown(gain.of.a), str(gain.n)]),
                        ("this one", [_shown(gain.of.b), str(gain.n)]),
                        ("difference", [_signed(gain.of.difference), str(gain.n)]),
                    ],
                    "On the pairs that both judge, by the same draws of sources.",
                )
            )
        tables.append(
            Table(
                "Does it know when it knows",
                ["accuracy", "pairs"],
                [(_margin(one), _bin(one)) for one in found.by_margin],
                "Pairs by how far apart the two scores are.",
            )
        )
        tables.append(
            Table(
                "Outputs by score",
                ["preferred", "mean score", "outputs"],
                [(_range(one), _said(one)) for one in found.by_score],
                "How often an output of such a score was the preferred one of its pair.",
            )
        )
    if found.against is not None and len(found.against.said):
        tables.append(
            Table(
                "Verdicts against gold",
                ["right", "constant", "asked", "judged"],
                [(one.name, _verdicts(one)) for one in found.against.accuracy],
                "Of principles; a verifier below the constant answer has learnt nothing of that "
                "kind." + ("" if found.auc is None else f" {_auc_line(found.auc)}"),
            )
        )
        tables.append(
            Table(
                "Reliability of verdicts",
                ["hold", "said", "principles"],
                [(_range(one), _said(one)) for one in found.against.reliability],
                f"Of principles of which so many traces say yes, how many hold. Expected "
                f"calibration error {found.against.error:.3f}, Brier {found.against.brier:.3f}.",
            )
        )
    if (one := found.agreement) is not None:
        tables.append(
            Table(
                "Agreement between traces",
                ["same verdict", "kappa", "score spread", "settled pairs"],
                [
                    (
                        "two traces",
                        [
                            _shown(one.verdicts.of),
                            *(_plain(x) for x in (one.kappa, one.spread, one.settled)),
                        ],
                    )
                ],
                "Kappa leaves out what chance gives. Of a settled pair all traces prefer the same "
                "output.",
            )
        )
    return tables


def _preference(one: Measure) -> list[str]:
    ties = "-" if one.ties is None else str(one.ties)
    return [_shown(one.of), str(one.asked), str(one.n), ties]


def _verdicts(one: Measure) -> list[str]:
    constant = "-" if one.against is None else f"{one.against:.3f}"
    return [_shown(one.of), constant, str(one.asked), str(one.n)]


def _auc_line(one: Measure) -> str:
    return f"AUC of the score for edits of which everything holds: {_shown(one.of)} of {one.n}."


def _bin(one: Bin) -> list[str]:
    return [_shown(one.of), str(one.n)]


def _said(one: Bin) -> list[str]:
    return [_shown(one.of), f"{one.said:.3f}", str(one.n)]


def _range(one: Bin) -> str:
    return f"{one.low:g} to {one.high:g}"


def _margin(one: Bin) -> str:
    return _range(one) if one.high else "equal"


def _shown(of: Estimate) -> str:
    return with_interval(of, 3).replace(ONE, "one source")


def _signed(of: Estimate) -> str:
    return with_interval(of, 3, sign=True).replace(ONE, "one source")


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
