"""`editr2 report`"""

from __future__ import annotations

from editr2.cli.flags import Arguments, Flags


def command(arguments: Arguments) -> int:
    """write report.html of a run again"""
    flags = Flags("editr2 report", command.__doc__ or "", [("runs/demo", "a run's folder")])
    flags.add("run", path=True, help="a run's folder")
    run = flags.parse(arguments)["run"]
    from editr2.report import build_report

    print(f"report: {build_report(run)}")
    return 0
