"""The program: how its threads wait, then the command line."""

from __future__ import annotations

import gc

from editr2.run.machine import choose_waiting, starting


def main() -> int:
    """What `editr2` runs. Threads first: how they wait has to be set before torch is loaded, and
    the commands import it."""
    with starting():
        choose_waiting()
        gc.disable()  # libraries stay: looking for garbage among them is a sixth of starting
        from editr2.cli.main import main as run

        gc.freeze()
        gc.enable()
    return run()
