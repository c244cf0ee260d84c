"""Who writes traces: a judge behind a server, a verifier's folder in this process, or a function.

All are asked the same (`rewards.verifier.judge_text` behind the two pictures) and answer alike:
`write(edits, n, seed)` gives n answers for each edit. What a server or a folder answered is on the
record of the stage's folder; a stage that was killed goes on from there, with the same texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from editr2.config.fields import Wrong, built
from editr2.config.plugins import resolve
from editr2.errors import ConfigError, DataError, UserError, one_line
from editr2.rewards.base import Calls
from editr2.rewards.client import Answer, Client, Failure, Part
from editr2.rewards.record import Record, calls_of, read_record
from editr2.rewards.verifier import FOLDER, VerifierOptions, judge_text, own_prompts
from editr2.rewards.wire import CONCURRENCY
from editr2.rewards.wording import prompts_of
from editr2.rl.seeds import derive_seed
from editr2.run.processes import Processes
from editr2.verifier.files import Edit, Told
from editr2.verifier.local import Local, Question
from editr2.verifier.saved import RESULT
from editr2.verifier.stage_settings import JudgeUse

AHEAD = 4
"""Edits in a block of a server, for each call at once: the last ones of a block wait for nobody."""

BATCHES = 8
"""In a block of weights: the last ones of a block are filled up."""

ALONE = ("scores", "principles", "weights", "dtype", "rows", "device")
"""Options of the reward that say nothing here."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Said:
    """One answer. text: None where nothing came back, and then `failed` says why. cut: whether it
    ended where no more tokens were lent. tokens: where they are known."""

    text: str | None
    failed: str | None = None
    cut: bool = False
    tokens: int | None = None


class Writer(Protocol):
    """name: as files call it. n: traces of an edit. block: edits that are asked together, the same
    whatever number of processes there is."""

    n: int
    block: int

    @property
    def name(self) -> str: ...

    def write(self, edits: Sequence[Edit], n: int, seed: int) -> list[list[Said]]:
        """n answers for each edit, which follow from its id, their number and the seed."""


def open_writer(at: str, use: JudgeUse, record: Record, device: Any = "cpu") -> Writer:
    """Nothing is asked or loaded yet. at: the setting, for errors. Raises `ConfigError`."""
    if use.function is not None:
        return Function(at, use)
    options = verifier_options(f"{at}.options", use.options)
    if use.weights is not None:
        return InProcess(at, use, options, record, device)
    return Served(use, options, record)


def verifier_options(key: str, given: dict[str, Any]) -> VerifierOptions:
    for name in ALONE:
        if name in given:
            raise ConfigError(f"{key}.{name}: of the reward alone (accepted: not given)")
    try:
        options = built(given, VerifierOptions, key)
    except Wrong as wrong:
        raise ConfigError(wrong.problem) from None
    if options.traces > 1 and options.temperature == 0:
        raise ConfigError(
            f"{key}.traces: {options.traces} at temperature 0 (accepted: 1, or a temperature)"
        )
    return options


def ask(
    writer: Writer,
    edits: Sequence[Edit],
    seed: int,
    processes: Processes,
    progress: Progress = lambda done, of: None,
) -> list[list[Said]]:
    """Of every edit, on every process. Raises `UserError` where nothing at all came back."""
    blocks = [edits[at : at + writer.block] for at in range(0, len(edits), writer.block)]
    found: list[list[Said]] = []
    mine = blocks[processes.share(len(blocks))]
    for block in mine:
        found += writer.write(block, writer.n, seed)
        progress(len(found), sum(map(len, mine)))
    said = processes.gather(found)
    failed = [one.failed for row in said for one in row]
    if failed and None not in failed:
        raise UserError(f"{writer.name}: no trace at all: {failed[0]}")
    return said


def told_of(edit: Edit, said: Sequence[Said], judge: str) -> list[Told]:
    """Of what came back. One that was cut off has no score, as where it is a reward."""
    found = []
    for one in said:
        if one.text is None:
            continue
        if one.cut:
            found.append(Told(edit.id, one.text, None, "cut off", judge=judge))
        else:
            found.append(Told.of(edit, one.text, judge=judge))
    return found


def seconds_of(folder: Path, purpose: str) -> tuple[float, int]:
    """Of the answers on record: what they took in all, and how many there are."""
    rows = [row for row in read_record(folder) if row.get("purpose") == purpose]
    answered = [row for row in rows if row.get("answer") is not None]
    return sum(float(row.get("seconds", 0.0)) for row in rows), len(answered)


# ------------------------------------------------------------------------------------------ served


class Served:
    """A judge behind chat completions, as the reward `verifier` asks it."""

    def __init__(
        self,
        use: JudgeUse,
        options: VerifierOptions,
        record: Record,
        *,
        client: Client | None = None,
    ) -> None:
        calls = Calls(use.concurrency, use.timeout, use.retries)
        self.client = client or Client(options, calls, record)
        self.options, self.n = options, options.traces
        self.prompts = prompts_of(FOLDER, options.prompts)
        self.concurrency = use.concurrency or CONCURRENCY
        self.block = AHEAD * self.concurrency
        self._name, self._ready = use.name, Lock()

    @property
    def name(self) -> str:
        return self._name or self.client.model

    def write(self, edits: Sequence[Edit], n: int, seed: int) -> list[list[Said]]:
        """Raises `UserError` where the server cannot be asked at all."""
        return each(lambda edit: self._of(edit, n, seed), edits, self.concurrency)

    def _of(self, edit: Edit, n: int, seed: int) -> list[Said]:
        text = judge_text(self.prompts, edit.instruction, edit.principles)
        parts: list[Part] = [edit.image.read(), edit.edited.read(), text]
        asked: dict[str, Any] = {
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
            "n": n,
            "seed": derive_seed(seed, "trace", edit.id),
            "name": "trace",
        }
        with calls_of(id=edit.id):
            answers = self.client.chat(parts, recorded=True, **asked)
            if None in answers:
                self._probed(n)
                answers = self.client.chat(parts, **asked)
        return [_said(answer) for answer in answers]

    def _probed(self, n: int) -> None:
        """Whether a server is there is found out once, and a stage without one ends here."""
        with self._ready:
            if self.client.known is None:
                self.client.probe(images=2, logprobs=False, votes=n > 1)


def _said(answer: Answer | Failure | None) -> Said:
    if not isinstance(answer, Answer):
        return Said(None, answer.reason if answer else "no answer")
    # What a server keeps apart as reasoning is what is to be learnt.
    whole = "\n".join(filter(None, (answer.reasoning.strip(), answer.text)))
    return Said(whole, cut=answer.finish == "length")


def each(work: Callable[[Any], Any], items: Sequence[Any], concurrency: int) -> list[Any]:
    """What `work` makes of each, in their order, as many at once; the first error ends it."""
    if not items:
        return []
    with ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(items)))) as pool:
        futures = [pool.submit(_in_context(work), item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_context(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What the record says of where a call belongs is the caller's, on other threads, too."""
    from contextvars import copy_context

    context = copy_context()
    return lambda item: context.run(work, item)


# -------------------------------------------------------------------------------------- in process


class InProcess:
    """A folder of transformers, loaded where an answer is not on record."""

    def __init__(
        self, at: str, use: JudgeUse, options: VerifierOptions, record: Record, device: Any
    ) -> None:
        if options.url or options.url_env:
            raise ConfigError(f"{at}.options.url: beside weights (accepted: one of them)")
        assert use.weights is not None
        prompts = options.prompts or own_prompts(use.weights)
        options = replace(
            options, weights=use.weights, dtype=use.dtype, rows=use.rows, prompts=prompts
        )
        self.use, self.options, self.n = use, options, options.traces
        self.local = Local(options, record, device=device, at=f"{at}.weights")
        self.block = max(1, BATCHES * use.rows // self.n)
        self.prompts = prompts_of(FOLDER, prompts)

    @property
    def name(self) -> str:
        path = Path(str(self.use.weights))
        # Of a run's own folder the run's name says more.
        return self.use.name or (f"{path.parent.name}/" * (path.name == RESULT) + path.name)

    def write(self, edits: Sequence[Edit], n: int, seed: int) -> list[list[Said]]:
        """Raises `ConfigError` for weights that cannot be loaded, and `DataError` for an edit that
        cannot be asked about."""
        found = self.local.answers([self._question(edit, n, seed) for edit in edits])
        return [[_written(one) for one in row] for row in found]

    def _question(self, edit: Edit, n: int, seed: int) -> Question:
        if not edit.principles:
            raise DataError(f"{edit.id}: no principles (accepted: at least one)")
        return Question(
            (edit.image.read(), edit.edited.read()),
            judge_text(self.prompts, edit.instruction, edit.principles),
            tuple(derive_seed(seed, "trace", edit.id, j) for j in range(n)),
            self.options.temperature,
            self.options.max_tokens,
            {"id": edit.id, "name": "trace"},
            edit.id,
        )


def _written(one: Any) -> Said:
    if isinstance(one, Failure):
        raise DataError(one.reason)
    return Said(one.text, cut=not one.ended, tokens=one.tokens)


# ---------------------------------------------------------------------------------------- function


class Function:
    """A user's own: `function(edits, n, seed)` returns n texts for each edit. It is asked again at
    every start: nothing is known of what its answers depend on."""

    def __init__(self, at: str, use: JudgeUse) -> None:
        self.key = f"{at}.function: {use.function!r}"
        options = dict(use.options)
        self.n = _count(f"{at}.options", options)
        found = resolve(f"{at}.function", str(use.function))
        if inspect.isclass(found) or options:
            try:
                found = found(**options)
            except Exception as error:  # of a user's own
                raise ConfigError(
                    f"{self.key} raised {one_line(error, kind=True)} (accepted: a function of "
                    f"edits, n and seed, or a class of one)"
                ) from error
        if not callable(found):
            raise ConfigError(f"{self.key} (accepted: a function of edits, n and seed)")
        self.function, self.block = found, use.rows
        self.name = use.name or str(use.function).rpartition(":")[2]

    def write(self, edits: Sequence[Edit], n: int, seed: int) -> list[list[Said]]:
        try:
            texts = self.function(edits, n, seed)
        except UserError:
            raise
        except Exception as error:  # of a user's own
            raise UserError(f"{self.key} raised {one_line(error, kind=True)}") from error
        fits = isinstance(texts, Sequence) and len(texts) == len(edits)
        if not fits or any(
            len(row) != n or not all(isinstance(one, str) for one in row) for row in texts
        ):
            raise UserError(
                f"{self.key}: something else came back (accepted: for each of {len(edits)} edits "
                f"a list of {n} texts)"
            )
        return [[Said(text) for text in row] for row in texts]


def _count(key: str, options: dict[str, Any]) -> int:
    """`traces`, taken out of a function's options."""
    given = options.pop("traces", 1)
    return verifier_options(key, {"traces": given}).traces
