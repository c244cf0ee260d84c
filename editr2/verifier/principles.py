"""Principles: yes/no questions about an edit, asked of a judge or told by exact rules.

Several outputs of one source and instruction are held against the same ones: the judge is asked
once for all of them, and both outputs of a pair share theirs. An edit that has principles keeps
them. One that none came for stays out of what is written, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from editr2.config.plugins import resolve
from editr2.errors import ConfigError, DataError, UserError, one_line
from editr2.rewards.base import Calls
from editr2.rewards.client import Client
from editr2.rewards.reading import Unread
from editr2.rewards.record import Record, calls_of, pixel_digest
from editr2.rewards.traces import Principle, read_principles
from editr2.rewards.verifier import FOLDER, ask_principles
from editr2.rewards.wire import CONCURRENCY
from editr2.rewards.wording import prompts_of
from editr2.run.lock import RunLock
from editr2.verifier.files import (
    EDITS,
    PAIRS,
    PRINCIPLES,
    Edit,
    Preference,
    read_edits,
    read_preferences,
    write_edits,
    write_preferences,
)
from editr2.verifier.objectives import folder_of
from editr2.verifier.stage_settings import (
    PRINCIPLES_BY,
    ChatConfig,
    PrinciplesConfig,
    stage_problems,
)
from editr2.verifier.writers import each, verifier_options

Tell = Callable[[Edit], Sequence[Principle]]
"""Principles of an edit. Raises `Unread` where there are none to be had."""


@dataclass(frozen=True)
class Found:
    """What came of a set. questions: how often somebody was asked. kinds: of the principles,
    counted. lacking: why edits and pairs have none, counted."""

    edits: list[Edit]
    pairs: list[Preference]
    questions: int
    kinds: Counter[str]
    lacking: Counter[str]


def write_principles(config: PrinciplesConfig) -> list[str]:
    """Writes principles.jsonl and pairs.jsonl, whichever of edits.jsonl and pairs.jsonl there is;
    returns what to print. Raises `UserError` for bad settings and data, a judge that cannot be
    asked at all, and where no edit has principles in the end."""
    for problem in stage_problems(config):
        raise ConfigError(problem)
    root, out = folder_of(str(config.data.path), "data.path"), Path(config.out)
    limit = config.data.limit
    files = [file for file in (EDITS, PRINCIPLES) if (root / file).is_file()][:1]
    edits = read_edits(root / files[0])[:limit] if files else []
    pairs = read_preferences(root / PAIRS)[:limit] if (root / PAIRS).is_file() else []
    if not edits and not pairs:
        raise DataError(f"data.path: {root}: neither {EDITS} nor {PAIRS} (accepted: one of them)")
    with RunLock(out) as lock:
        lock.take(make=True)
        record = Record(out)
        try:
            tell, concurrency = teller(config.judge, record)
            with calls_of(purpose="principles"):
                found = principles(edits, pairs, tell, concurrency)
        finally:
            record.close()
        if not found.edits and not found.pairs:
            raise UserError(f"no principles for any edit: {found.lacking.most_common(1)[0][0]}")
        said = []
        if edits:
            write_edits(out / PRINCIPLES, found.edits)
            said.append(f"principles: {out / PRINCIPLES} ({len(found.edits)} of {len(edits)})")
        if pairs:
            write_preferences(out / PAIRS, found.pairs)
            said.append(f"pairs: {out / PAIRS} ({len(found.pairs)} of {len(pairs)})")
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.kinds.items())
    said.append(f"{found.kinds.total()} principles ({kinds}) of {found.questions} questions asked")
    return said + [f"  {count} x {why}" for why, count in found.lacking.most_common()]


def teller(config: ChatConfig, record: Record) -> tuple[Tell, int]:
    """Who tells principles, and how many may be asked at once. Raises `ConfigError`."""
    if config.exact is not None:
        return _exact(config.exact), 1
    options = verifier_options("judge.options", config.options)
    calls = Calls(config.concurrency, config.timeout, config.retries)
    client, prompts = Client(options, calls, record), prompts_of(FOLDER, options.prompts)

    ready = Lock()

    def tell(edit: Edit) -> Sequence[Principle]:
        try:
            return ask_principles(client, prompts, edit.image.read(), [edit.instruction])
        except Unread:
            with ready:  # a stage whose server is not there ends at its first question
                if client.known is None:
                    client.probe(images=1, logprobs=False, votes=False)
            raise

    return tell, config.concurrency or CONCURRENCY


def _exact(name: str) -> Tell:
    function = resolve("judge.exact", name, PRINCIPLES_BY)

    def tell(edit: Edit) -> Sequence[Principle]:
        try:
            given = function(edit)
            return read_principles(
                [one.written() if isinstance(one, Principle) else one for one in given]
            )
        except UserError as error:
            raise Unread(one_line(error)) from error
        except Exception as error:  # of a user's own
            raise UserError(
                f"judge.exact: {name!r} raised {one_line(error, kind=True)} for {edit.id} "
                f"(accepted: a list of principles)"
            ) from error

    return tell


def principles(
    edits: Sequence[Edit], pairs: Sequence[Preference], tell: Tell, concurrency: int = 1
) -> Found:
    """Adds what is lacking, asking once for one source and instruction."""
    everybody = [*edits, *(pair.win for pair in pairs)]
    keys = [_key(edit) for edit in everybody]
    first: dict[Any, Edit] = {}
    for key, edit in zip(keys, everybody, strict=True):
        if not edit.principles:
            first.setdefault(key, edit)

    def of(edit: Edit) -> tuple[Principle, ...] | str:
        with calls_of(id=edit.id):
            try:
                return tuple(tell(edit))
            except Unread as unread:
                return str(unread)

    told = dict(zip(first, each(of, list(first.values()), concurrency), strict=True))
    kinds, lacking, whole = Counter[str](), Counter[str](), list[Edit | None]()
    for key, edit in zip(keys, everybody, strict=True):
        given = edit.principles or told[key]
        if isinstance(given, str):
            lacking[given] += 1
            whole.append(None)
        else:
            kinds.update(one.kind for one in given)
            whole.append(replace(edit, principles=given))
    of_pairs = [
        Preference(win, replace(pair.lose, principles=win.principles), pair.margin)
        for pair, win in zip(pairs, whole[len(edits) :], strict=True)
        if win is not None
    ]
    of_edits = [edit for edit in whole[: len(edits)] if edit is not None]
    return Found(of_edits, of_pairs, len(first), kinds, lacking)


def _key(edit: Edit) -> tuple[str, str] | None:
    """Of a source and an instruction; the pixels of one that needs no principles stay unread."""
    return None if edit.principles else (pixel_digest(edit.image.read()), edit.instruction)
