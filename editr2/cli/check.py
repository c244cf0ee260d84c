"""`editr2 check`"""

from __future__ import annotations

import sys

from editr2.cli import settings
from editr2.cli.flags import SOME, Arguments


def command(arguments: Arguments) -> int:
    """find what is wrong with a run before it starts; what it takes in memory and time"""
    extra: list[tuple[str, dict]] = [
        (
            "--gpu",
            {
                "type": str,
                "default": "h100",
                "help": "to estimate for: h100, a100-80, rtx4090, ... (an unknown one names all) "
                "or cpu (this one)",
            },
        ),
        (
            "--processes",
            {
                "type": int,
                "default": 1,
                "bounds": SOME,
                "help": "that torchrun will start, one a GPU",
            },
        ),
        (
            "--dry-run",
            {"action": "store_true", "help": "then train two iterations into a temporary folder"},
        ),
    ]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    description = (
        "Check the settings, data and reward of a run and estimate its memory and time; loads no "
        "weights. `editr2 check FILE` is short for `editr2 check --config FILE`."
    )
    config, given = settings.run_config("editr2 check", description, arguments, extra, strict=False)
    from editr2.check import preflight

    report = preflight(config, given["gpu"], given["processes"])
    print("\n".join(report.problems), file=sys.stderr, end="\n" if report.problems else "")
    if report.problems:
        return 2
    print("\n".join(report.lines))
    if given["dry_run"]:
        import tempfile

        from editr2.check import dry_run

        with tempfile.TemporaryDirectory(prefix="editr2-check-") as folder:
            print("\n".join(["", *dry_run(config, folder)]))
    return 0 if report.fits else 2
