"""The command line: one module a command. Heavy imports happen inside the commands, so that
`--help` and `doctor` answer at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable

import editr2
from editr2.cli import (
    benchmark,
    check,
    completion,
    data,
    doctor,
    evaluate,
    export,
    init,
    judge,
    label,
    quickstart,
    recipes,
    report,
    reproduce,
    rollout,
    train,
    verifier,
    watch,
    world,
)
from editr2.cli.flags import Arguments, dispatch
from editr2.errors import UserError, one_line
from editr2.run.machine import open_streams

COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "init": init.command,
    "recipes": recipes.command,
    "train": train.command,
    "check": check.command,
    "eval": evaluate.command,
    "rollout": rollout.command,
    "judge": judge.command,
    "label": label.command,
    "benchmark": benchmark.command,
    "report": report.command,
    "watch": watch.command,
    "export": export.command,
    "reproduce": reproduce.command,
    "doctor": doctor.command,
    "data": data.command,
    "world": world.command,
    "verifier": verifier.command,
    "quickstart": quickstart.command,
}
COMMANDS["completion"] = completion.command_of(COMMANDS)


GROUPS = {
    "train an editor": (
        *("quickstart", "init", "recipes", "train", "check", "watch", "report", "export"),
    ),
    "edit, and say what it is worth": ("rollout", "eval", "benchmark"),
    "sessions and judges": ("data", "judge", "label", "verifier", "world"),
    "this program": ("doctor", "completion", "reproduce"),
}
"""Under what headings `editr2 help` lists the commands."""


VERSION = ("--version", "-V")
"""In a command's place."""


STOPPED = {
    "train": "nothing was trained by this start; the same command begins again, or goes on from "
    "the newest checkpoint",
    "check": "nothing was written; start it again",
    "eval": "no scores were written; the same command begins again, and a judge is not asked twice",
    "rollout": "what is in --out is not whole; the same command begins again",
    "judge": "what was answered is on the record in --out; the same command asks for the rest",
    "benchmark": "images and answers that are there stand; the same command makes the rest",
    "watch": "the run is not touched",
    "label": "every vote is in the folder's labels.sqlite; the same command goes on",
    "verifier": "nothing was changed by this start; the same command begins again, or goes on from "
    "what stands",
    "reproduce": "finished runs stand; the same command trains the rest",
    "quickstart": "what is written stands; the same command goes on from the newest checkpoint",
}
"""What is true of a command that Ctrl-C ended. The trainer itself says what it saved
(`editr2.run.stop`)."""


_REMEDIES = {
    errno.ENOSPC: "the disk is full; what was saved before stands",
    errno.EDQUOT: "the disk is full; what was saved before stands",
    errno.EACCES: "permission denied (accepted: a file or folder that is yours to read and write)",
    errno.EPERM: "permission denied (accepted: a file or folder that is yours to read and write)",
    errno.EROFS: "its file system cannot be written (accepted: another folder)",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "is below a file (accepted: a folder)",
    errno.EISDIR: "is a folder (accepted: a file)",
    errno.EEXIST: "is there already, and no folder (accepted: another name)",
    errno.ENAMETOOLONG: "the name is too long (accepted: names of at most 255 bytes)",
    errno.EMFILE: "too many open files (accepted: fewer at once, or a higher limit by ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "no memory is left",
    errno.EIO: "the device does not read or write; what was saved before stands",
}


def os_problem(error: OSError) -> str:
    """What the system refused, in one line: the file, and what to do."""
    what = _REMEDIES.get(error.errno or 0) or error.strerror or one_line(error)
    names = [
        os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
        for name in (error.filename, error.filename2)
        if name is not None
    ]
    where = " -> ".join(names) or ("output" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "")
    return f"{where}: {what}" if where else what


def main(arguments: Arguments | None = None) -> int:
    """Entry point: 0 when all went well, 2 with one line on standard error for anything the user
    can mend."""
    open_streams()
    warnings.filterwarnings("default", category=UserWarning, module="editr2")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in VERSION:
            print(f"editr2 {editr2.__version__}")
            return 0
        status = dispatch("editr2", COMMANDS, given, GROUPS, VERSION)
        sys.stdout.flush()  # while there is somebody to say that it cannot be written
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough of it. Python would complain once more when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE
    except OSError as error:
        print(f"error: {os_problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        name = given[0] if given else ""
        # `check` trains, too, in a folder that is gone now.
        said = str(stopped) if name in ("train", "quickstart") else ""
        what = STOPPED.get(
            name, "what it was writing may not be whole; the same command begins again"
        )
        print(said or f"stopped; {what}", file=sys.stderr)
        return 128 + int(getattr(stopped, "signum", signal.SIGINT))
