"""`imgedit`: ImgEdit-Bench, basic (arXiv 2505.20275): 737 single edits of nine kinds, marked from 1
to 5 by a rubric of the kind (`rewards.imgedit`). Overall is the mean of the kinds' means."""

from __future__ import annotations

from collections.abc import Iterator

from editr2.benchmarks.table import Benchmark, Source
from editr2.config import RewardUse
from editr2.sessions import Session
from editr2.sessions.importers import formats, unique


def read(source: Source) -> Iterator[Session]:
    """The edits, sessions of one turn, whose ids are their numbers."""
    path = source.given("basic_edit.json, or the folder that has it (Benchmark/Basic)")
    return unique(formats.imgedit_basic(formats.Source(path, source.images, None, "--sources")))


IMGEDIT = Benchmark(
    title="ImgEdit-Bench, basic",
    read=read,
    reward=RewardUse(name="imgedit"),
    headline=("score",),
    scale=5.0,
    measures="imgedit",
    layouts=("imgedit", "edival", "outputs"),
    about="github.com/PKU-YuanGroup/ImgEdit; no licence stated there",
)
