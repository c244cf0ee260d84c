"""Traces: what each of a pool of judges writes about each edit, and gold, the right verdicts.

A trace that cannot be read or was cut off is written with `unread`, counted, and never scored.
Where no answer came back at all nothing is written; a second start asks for it again.

Gold is what most traces of a stronger judge say of each principle, or what an exact function says.
An edit of which that judge is split on a principle, or mostly cannot be read, has none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from editr2.config.plugins import resolve
from editr2.errors import ConfigError, UserError, counted, one_line
from editr2.rewards.record import Record, calls_of
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes
from editr2.verifier.files import (
    PRINCIPLES,
    TRACES,
    Edit,
    Told,
    read_edits,
    write_edits,
    write_told,
)
from editr2.verifier.objectives import folder_of
from editr2.verifier.stage_settings import (
    GOLD_BY,
    GoldConfig,
    TracesConfig,
    stage_problems,
    uses_of,
)
from editr2.verifier.writers import Said, Writer, ask, open_writer, told_of

Gold = Mapping[str, tuple[int, ...]]
"""By the id of the edit; one without is not there."""


@dataclass
class Count:
    """Of one judge: traces asked for, and of them those that failed or were not read, with reasons
    counted. read: the others."""

    asked: int = 0
    read: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, said: Sequence[Said], told: Sequence[Told]) -> None:
        self.asked += len(said)
        self.failed.update(one.failed for one in said if one.failed is not None)
        self.unread.update(one.unread for one in told if one.unread is not None)
        self.read += sum(one.trace is not None for one in told)

    def __str__(self) -> str:
        def of(word: str, reasons: Counter[str]) -> str:
            if not reasons:
                return ""
            why, _ = reasons.most_common(1)[0]
            return f", {reasons.total()} {word} (mostly: {why})"

        return (
            f"{self.read} of {counted(self.asked, 'trace')} read"
            f"{of('unread', self.unread)}{of('without an answer', self.failed)}"
        )


def write_traces(config: TracesConfig) -> list[str]:
    """Writes principles.jsonl and traces.jsonl; returns what to print. Raises `UserError` for bad
    settings and data, and a judge that cannot be asked at all."""
    for problem in stage_problems(config):
        raise ConfigError(problem)
    processes, out = open_processes(), Path(config.out)
    file = folder_of(str(config.data.path), "data.path") / PRINCIPLES
    edits = read_edits(file, principles=True)[: config.data.limit]
    with RunLock(out) as lock:
        processes.on_main(lambda: lock.take(make=True))
        record = Record(out, index=processes.index)
        try:
            device = processes.device
            writers = [open_writer(at, use, record, device) for at, use in config.judge.uses]
            teller = gold_teller(config.gold, record, config.seed, processes)
            with calls_of(purpose="traces"):
                told, counts = traces(edits, writers, config.seed, processes)
            with calls_of(purpose="gold"):
                gold = teller(edits) if teller else None
        finally:
            record.close()

        def write() -> None:
            write_edits(out / PRINCIPLES, edits)
            known = gold or {}
            write_told(out / TRACES, [replace(one, gold=known.get(one.id)) for one in told])

        processes.on_main(write)
    said = [f"traces: {out / TRACES} ({len(told)} of {counted(len(edits), 'edit')})"]
    said += [f"  {name}: {count}" for name, count in counts.items()]
    if gold is not None:
        said.append(f"gold: of {len(gold)} of {counted(len(edits), 'edit')}")
    return said if processes.main else []


def traces(
    edits: Sequence[Edit], writers: Sequence[Writer], seed: int, processes: Processes
) -> tuple[list[Told], dict[str, Count]]:
    """Edit by edit, each judge's behind one another. Counts are by the judge's name; of several of
    one name the later ones have a number."""
    by_judge: list[tuple[str, list[list[Said]]]] = []
    for writer in writers:
        before = sum(name.partition(" (")[0] == writer.name for name, _ in by_judge)
        name = f"{writer.name} ({before + 1})" if before else writer.name
        by_judge.append((name, ask(writer, edits, seed, processes, showing(name))))
    found, counts = list[Told](), dict[str, Count]()
    for place, edit in enumerate(edits):
        for name, said in by_judge:
            told = told_of(edit, said[place], name)
            counts.setdefault(name, Count()).add(said[place], told)
            found += told
    return found, counts


def showing(name: str) -> Callable[[int, int], None]:
    """On a terminal, how far it is."""

    def show(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {done} of {of}", end="\n" if done == of else "", file=sys.stderr)

    return show


# -------------------------------------------------------------------------------------------- gold


def gold_teller(
    config: GoldConfig, record: Record, seed: int, processes: Processes
) -> Callable[[Sequence[Edit]], Gold] | None:
    """None where nobody was asked for. Raises `ConfigError`."""
    if config.exact is not None:
        function = resolve("gold.exact", config.exact, GOLD_BY)
        return lambda edits: exact_gold(edits, function, f"gold.exact: {config.exact!r}")
    uses = uses_of("gold", config)
    if not uses:
        return None
    writer = open_writer(*uses[0], record, processes.device)

    def tell(edits: Sequence[Edit]) -> Gold:
        said = ask(writer, edits, seed, processes, showing(f"gold by {writer.name}"))
        found = {
            edit.id: majority(told_of(edit, row, writer.name), len(row))
            for edit, row in zip(edits, said, strict=True)
        }
        return {name: gold for name, gold in found.items() if gold is not None}

    return tell


def majority(told: Sequence[Told], asked: int) -> tuple[int, ...] | None:
    """What most traces say of each principle; None where they are split on one, and where fewer
    than half of those asked for can be read."""
    verdicts = [one.trace.verdicts for one in told if one.trace is not None]
    if not verdicts or 2 * len(verdicts) < asked:
        return None
    yes = [2 * sum(of) for of in zip(*verdicts, strict=True)]
    if len(verdicts) in yes:
        return None
    return tuple(int(count > len(verdicts)) for count in yes)


def exact_gold(edits: Sequence[Edit], function: Callable[[Edit], Any], where: str) -> Gold:
    """where: the setting, for errors. Raises `UserError` for what is no verdict."""
    found = {}
    for edit in edits:
        try:
            given = function(edit)
        except UserError:
            raise
        except Exception as error:  # of a user's own
            raise UserError(f"{where} raised {one_line(error, kind=True)} for {edit.id}") from error
        if given is None:
            continue
        gold = list(given)
        if len(gold) != len(edit.principles) or any(one not in (0, 1) for one in gold):
            raise UserError(
                f"{where}: {gold!r} for {edit.id} (accepted: {len(edit.principles)} of 0 and 1, "
                f"or None)"
            )
        found[edit.id] = tuple(int(one) for one in gold)
    return found
