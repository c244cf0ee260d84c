"""`sessions`: any set that `--data` takes, judged by the reward that the user names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from editr2.benchmarks.table import Benchmark, Source
from editr2.errors import DataError
from editr2.sessions import Session
from editr2.sessions.files import scan


def read(source: Source) -> Iterator[Session]:
    """The sessions, each checked when it is reached; its image is decoded then, and not kept."""
    path = source.given("a sessions.jsonl, a folder that has one, or hf:owner/name:split")
    source.without_images()
    return _checked(os.fspath(path))


def _checked(path: str) -> Iterator[Session]:
    for item in scan(path, memory=0):
        if isinstance(item, str):
            raise DataError(item)
        yield item


SESSIONS = Benchmark(
    title="sessions of your own",
    read=read,
    reward=None,
    headline=(),
    about="whatever --data takes",
)
