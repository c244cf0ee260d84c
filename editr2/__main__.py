"""`editr2`, and `python -m editr2`: sets how threads wait, which has to be before torch is loaded,
then runs the command line."""

from __future__ import annotations

import sys

from editr2.run.machine import choose_waiting, starting


def main() -> int:
    with starting():
        choose_waiting()
        from editr2.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
