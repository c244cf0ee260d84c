"""The program: how its threads wait, then the command line."""

from __future__ import annotations

from editr2.cli.loading import loading
from editr2.run.machine import choose_waiting


def main() -> int:
    """What `editr2` runs. Threads first: how they wait has to be set before torch is loaded, which
    commands do once they know what they are asked."""
    with loading():
        choose_waiting()
        from editr2.cli.main import main as run
    return run()
