"""How the program imports what takes long."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from editr2.run.machine import starting


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: Ctrl-C ends the program there and then, and nobody looks for garbage among
    libraries, which stay: that is a sixth of starting."""
    with starting():
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


def load_libraries() -> None:
    """torch, once a command line is read and something will be done: `--help` and a slip in a flag
    do not wait for it."""
    if "torch" not in sys.modules:
        with loading():
            import torch  # noqa: F401
