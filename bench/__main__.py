"""python -m bench report | compare BASE | full_size CONFIG | full_layer CONFIG |
real_peer CHECKOUT."""

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
    if command == "full_size":
        from bench import full_size

        return full_size.main(arguments)
    if command == "full_layer":
        from bench import full_layer

        return full_layer.main(arguments)
    if command == "real_peer":
        from bench import real_peer

        return real_peer.main(arguments)
    usage = (
        "report [...] | compare BASE [...] | full_size CONFIG [...] | full_layer CONFIG [...] | "
        "real_peer CHECKOUT [...]"
    )
    print(f"usage: python -m bench {usage}; got {command!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
