"""What a run's folder holds for its reader: README.md, and the page, which is written again at
checkpoints."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from editr2.errors import one_line
from editr2.run.tracking import write_whole
from editr2.secrets import withheld_command

README = "README.md"
OURS = "A run of editr2."
SHARE = 0.02
"""Of a run's time, what writing its page again may take."""


class Refreshed:
    """The page of a run that is at work, written again at checkpoints: not where that would take
    more than `SHARE` of the time since it was. An error in it is a note, and it is tried no more.

    write: given the folder, writes the page; None where there is none. note: takes a line. clock:
    seconds, rising.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path], object] | None,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._write, self._note, self._clock = folder, write, note, clock
        self._not_before = float("-inf")

    def refresh(self) -> None:
        started = self._clock()
        if self._write is None or started < self._not_before:
            return
        try:
            self._write(self._folder)
        except Exception as error:  # a page is no reason to end a run
            self._write = None
            self._note(f"report: not written: {one_line(error, kind=True)}; the run goes on")
            return
        ended = self._clock()
        self._not_before = ended + (ended - started) / SHARE


def write_readme(
    folder: Path,
    made: Mapping[str, Any],
    standing: str,
    again: str,
    others: Sequence[tuple[str, str]],
) -> None:
    """The folder's README.md: how it was made, and what can be done with it; one that somebody
    else wrote stays.

    made: of the run's identity (`provenance`), of which the host stays away, as do the command's
    secrets. standing: of the run, in a few words. again: the command that goes on with it, where it
    was not started from the command line. others: what else can be done, and its command.
    """
    path = folder / README
    if path.exists() and OURS not in path.read_text("utf-8", errors="replace"):
        return
    words, many = shlex.split(str(made["command"])), made["processes"]
    program = PurePath(words[0]).name if words else ""
    if program in ("editr2", "__main__.py"):
        first = "editr2" if many == 1 else f"torchrun --nproc_per_node {many} -m editr2"
        again = f"{first} {withheld_command(words[1:])}"
        how = "Go on with it, by the same command in the folder that it was started in"
    else:
        how = f"It was started from Python ({program or 'a prompt'}); the same call goes on with it"
        how += ", or, unless that brought a policy or a reward of its own"
    versions = dict(made["versions"])
    facts = {
        "Stands": standing,
        "Started": made["date"],
        "editr2": f"{versions.pop('editr2', None)}, commit {made['commit'] or 'unknown'}",
        "With": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Device": f"{made['device']}, {many} process{'' if many == 1 else 'es'}",
    }
    lines = [f"# {folder.resolve().name}", "", OURS, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "`config.yaml` has its settings, `metrics.jsonl` its numbers.", ""]
    lines += [f"{how}:", "", f"    {again}", ""]
    for what, command in others:
        lines += [f"{what}:", "", f"    {command}", ""]
    write_whole(path, "\n".join(lines).rstrip("\n") + "\n")
