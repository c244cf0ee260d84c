"""The first stage of a benchmark: edits its sessions and writes the images, as `layouts` has them.

The set is laid out in chunks that do not depend on what is there already, and whole chunks are
shared out over processes. Numbers of a batch are those of its own, so an image has the same bytes
whether it was made in one go, after a kill or by several processes. Each is written under another
name and renamed: what has its name is whole. A chunk of which any image is missing is made again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from editr2.benchmarks.layouts import file_names, generations, source_file, turn_file
from editr2.benchmarks.passes import PASSES, Edited, Exact
from editr2.config import Config
from editr2.errors import ConfigError, DataError, counted, shown
from editr2.files import in_place_of
from editr2.policies.base import Policy, ReadingPolicy, at_size
from editr2.rl.rollout import Chunk, Seeds, chunks, in_evaluation, rollout_chunk
from editr2.rl.sampler import Sampler
from editr2.rl.seeds import derive_seed
from editr2.run.processes import Processes
from editr2.sessions import Session

SECONDS = 10.0
"""Between two lines about how far it is."""


def generate(
    folder: Path,
    policy: Policy,
    sessions: Sequence[Session],
    sampler: Sampler,
    config: Config,
    processes: Processes,
    *,
    way: str,
    sample: int = 1,
    exact: Exact | None = None,
) -> None:
    """Writes the images of a pass that are not there yet into `generations(folder, sample)`.

    policy, sampler: as for `rollout_chunk`; intents are greedy. sessions: all of the benchmark,
    with images of the policy's sizes; a session's noise follows from `config.seed`, its id and
    `sample`: it is the same in every pass, and in a part of the set. way: of `PASSES`. exact: for
    the pass that reads it. Returns when all processes are through.

    Raises ConfigError where the pass needs what is not given, and DataError for instructions that
    the policy cannot read.
    """
    rules = PASSES[way]
    if rules.reads_exact and exact is None:
        others = ", ".join(name for name, other in PASSES.items() if not other.reads_exact)
        raise ConfigError(
            f"passes: {way}: nobody knows what each turn should have made (accepted: {others})"
        )
    into, names = generations(folder, sample) / way, file_names(sessions)
    edited = [(o, each) for o, session in enumerate(sessions) for each in rules.edited(session)]
    files = [[into / file for file in _files(names[sessions[o].id], each)] for o, each in edited]
    plan = list(
        chunks(
            [each.session for _, each in edited],
            [derive_seed(sessions[o].id) for o, _ in edited],
            1,
            4 * config.rollout.groups_per_batch,
        )
    )

    def look() -> list[int]:
        _check_readable(policy, way, [e for o, e in edited if e.session is not sessions[o]])
        into.mkdir(parents=True, exist_ok=True)
        return [k for k, chunk in enumerate(plan) if not all(map(os.path.isfile, paths_of(chunk)))]

    def paths_of(chunk: Chunk) -> list[Path]:
        return [path for place in chunk.places or () for path in files[place]]

    def outputs_of(chunk: Chunk) -> int:
        return sum(len(session.turns) for session in chunk.sessions)

    # Decided once: a process that looked later would already see images of the others.
    left = [plan[k] for k in processes.on_main(look)]
    seeds = Seeds(derive_seed(config.seed, "sample", sample), "benchmark")
    mine = left[processes.index :: processes.count]
    options, how = in_evaluation(config)
    tell = _Progress(way, sum(map(outputs_of, mine)), processes)
    for chunk in mine:
        reads = _reads(exact, chunk) if rules.reads_exact and exact is not None else None
        rollout_chunk(policy, chunk, sampler, seeds, options, rollout=how, greedy=True, reads=reads)
        for i, place in enumerate(chunk.places or ()):
            images = list(chunk.images_of(i))
            if len(files[place]) > len(images):  # with the source
                images.insert(0, chunk.sessions[i].image)
            for path, pixels in zip(files[place], images, strict=True):
                with in_place_of(path) as part:
                    Image.fromarray(pixels).save(part, format="PNG")
        chunk.turns = []  # latents of a whole set would not fit
        tell(outputs_of(chunk))
    processes.wait()
    if processes.main:
        made = sum(map(outputs_of, left))
        there = sum(map(outputs_of, plan)) - made
        said = f"{counted(made, 'image')} made, {there} {'was' if there == 1 else 'were'} there"
        print(f"{way}: {said}: {into}", file=sys.stderr)


def _files(name: str, edited: Edited) -> list[str]:
    """Of the outputs; before that of the first turn, the source."""
    source = [source_file(name)] if 0 in edited.turns else []
    return [*source, *(turn_file(name, t) for t in edited.turns)]


def _check_readable(policy: Policy, way: str, edited: Sequence[Edited]) -> None:
    """Of instructions that the pass put together itself: the set's own were read with it."""
    for session, turns in edited if isinstance(policy, ReadingPolicy) else ():
        told = [turn.instruction for turn in session.turns]
        beside = {"references": len(session.references)} if session.references else {}
        for t, problem in at_size(policy, session.image_size).unreadable(told, **beside):
            raise DataError(f"{way}: {shown(session.id)}: turn {turns[t] + 1}: {problem}")


def _reads(exact: Exact, chunk: Chunk) -> Callable[[Chunk, int], np.ndarray]:
    """What `rollout_chunk` asks for, of a chunk with one rollout a session."""
    known = [exact(session) for session in chunk.sessions]
    for session, images in zip(chunk.sessions, known, strict=True):
        wanted = (len(session.turns), *session.image_size, 3)
        if images.shape != wanted or images.dtype != np.uint8:
            raise DataError(
                f"exact images of session {shown(repr(session.id))}: {images.dtype} "
                f"{list(images.shape)} (accepted: uint8 {list(wanted)})"
            )

    def reads(chunk: Chunk, turn: int) -> np.ndarray:
        return np.stack([known[i][turn] for i in chunk.turns[turn].rollout.tolist()])

    return reads


class _Progress:
    """Called with how many more images are written: now and then a line on stderr, of the first
    process."""

    def __init__(self, way: str, count: int, processes: Processes) -> None:
        self._way, self._count, self._done = way, count, 0
        self._of = f", the first of {processes.count} processes" if processes.count > 1 else ""
        self._main, self._last = processes.main, time.monotonic()

    def __call__(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if self._main and now - self._last >= SECONDS:
            self._last = now
            line = f"{self._way}: {self._done} of {counted(self._count, 'image')}{self._of}"
            print(line, file=sys.stderr, flush=True)
