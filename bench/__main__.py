"""python -m bench report | compare BASE."""

from __future__ import annotations

import sys


def main() -> int:
    command, *arguments = sys.argv[1:] or [""]
    if command == "report":
        from bench import report

        return report.main(arguments)
    if command == "compare":
        from bench import compare

        return compare.main(arguments)
    print(f"usage: python -m bench report [...] | compare BASE [...]; got {command!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
