"""One run a folder: a lock that the kernel drops with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from editr2.errors import UserError

FILE = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LockedError(UserError):
    """Another run is at work in the folder."""


class RunLock:
    """Held from `take` to the end of the `with` block, or of the process.

    An exclusive flock(2) of `<folder>/.lock`: nothing to clean up after a SIGKILL, and children
    that are executed do not inherit it. The file stays, since removing it would let two runs lock
    two files of one name; it says who holds the lock, or held it last.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.problem: str | None = None
        self._descriptor: int | None = None

    def take(self, *, make: bool) -> None:
        """Locks the folder; without `make`, only one that is there. Calling it again does nothing.

        Raises LockedError, naming the holder. On a file system that has no locks, `problem` says so
        and the run goes on without."""
        if self._descriptor is not None or self.problem is not None:
            return
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.parent.is_dir():
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise LockedError(
                    f"{self.path.parent}: another run is at work in it: {self._holder()} "
                    f"(accepted: one run a folder; "
                    "wait for it or stop it, or give another --out)"
                ) from None
            if error.errno not in _UNSUPPORTED:
                raise
            self.problem = (
                f"{self.path}: {error.strerror}: nothing keeps a second run out of this folder"
            )
            return
        self._descriptor = descriptor
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor,
            json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}).encode(),
            0,
        )

    def _holder(self) -> str:
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
            return f"pid {said['pid']} on {said['host']} since {said['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has locked and not written yet
            return "a process that did not say which"

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()
