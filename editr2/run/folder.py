"""What a run's folder holds for its reader: README.md, and the page, which is written again at
checkpoints."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path, PurePath
from typing import Any

from editr2.errors import ConfigError, one_line, shown
from editr2.files import RUN_FILES, runs_near
from editr2.run.lock import FILE as LOCK
from editr2.run.tracking import read_metrics, write_whole
from editr2.secrets import withheld_command

README = "README.md"
OURS = "A run of editr2."
SHARE = 0.02
"""Of a run's time, what writing its page again may take."""


SETTINGS, METRICS = "config.yaml", "metrics.jsonl"


def numbered(folder: Path) -> Iterator[Path]:
    """`folder`, `folder-2`, `folder-3`, ...: for a command that was told none, and must not write
    over what it left before."""
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def check_settings_are_ours(folder: Path) -> None:
    """Raises `ConfigError` for a `config.yaml` of somebody else, over which ours would be written.
    To be asked before the folder is locked: ours lies beside a lock, or rows."""
    if (folder / SETTINGS).exists() and not any(
        (folder / name).exists() for name in (LOCK, METRICS)
    ):
        raise ConfigError(
            f"--out: {shown(folder)}: its {SETTINGS} is of no run and would be written over "
            "(accepted: another folder, or that file under another name)"
        )


def check_holds_no_runs(folder: Path) -> None:
    """Raises `ConfigError` for a folder that is no run's and holds those of others, as `runs` does:
    what a run leaves would lie among them. Asked before anything is written."""
    if any((folder / name).exists() for name in RUN_FILES) or not folder.is_dir():
        return
    # os.path says no of what is not ours to read, as lost+found of a disk; pathlib raises.
    if any(os.path.isfile(path / METRICS) for path in _listed(folder)):
        free = next(path for path in numbered(folder / "mine") if not path.exists())
        raise ConfigError(
            f"--out: {shown(folder)}: other runs are in it (accepted: a folder of its own, such as "
            f"{shown(free)}{runs_near(folder)})"
        )


def _listed(folder: Path) -> list[Path]:
    """What is in it; nothing where that is not ours to read, as whoever writes there is told."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def check_no_evaluation(folder: Path) -> None:
    """Raises `ConfigError` for the folder of `editr2 eval`, whose rows a run would take away."""
    metrics = folder / METRICS
    rows = read_metrics(metrics)[0] if metrics.is_file() else []
    if rows and rows[0].get("command") == "eval":
        raise ConfigError(
            f"--out: {shown(folder)}: the folder of an evaluation (accepted: another)"
        )


class Refreshed:
    """The page of a run that is at work, written again at checkpoints: not where that would take
    more than `SHARE` of the time since it was. An error in it is a note, and it is tried no more
    until the end.

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
        self._not_before, self._failed = float("-inf"), False

    def refresh(self) -> None:
        started = self._clock()
        if self._write is None or self._failed or started < self._not_before:
            return
        try:
            self._write(self._folder)
        except Exception as error:  # a page is no reason to end a run
            self._failed = True
            self._note(f"report: not written: {one_line(error, kind=True)}; the run goes on")
            return
        ended = self._clock()
        self._not_before = ended + (ended - started) / SHARE

    def finish(self) -> None:
        """Of a run that is done, whose weights are written: the page's last form."""
        if self._write is None:
            return
        try:
            print(f"report: {self._write(self._folder)}")
        except Exception as error:
            again = f"editr2 report {shlex.quote(str(self._folder))}"
            self._note(f"report: not written: {one_line(error, kind=True)}; {again} tries again")


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
