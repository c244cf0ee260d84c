"""`editr2 report`"""

from __future__ import annotations

from collections.abc import Iterator

from editr2.cli.flags import Arguments, Flags
from editr2.config.rules import folder_problem
from editr2.errors import ConfigError, shown

COMPARED = "runs/comparison"


def command(arguments: Arguments) -> int:
    """write report.html of a run again; of several, side by side"""
    flags = Flags(
        "editr2 report",
        "Write the run's report.html; of several runs, a page of them side by side: their curves, "
        "and each held against the first, paired by session.",
        [
            ("runs/demo", "the page of one run, again"),
            ("runs/a runs/b --out runs/compared", "two runs, the second held against the first"),
        ],
    )
    flags.add("run", path=True, help="a run's folder; further ones stand beside it")
    flags.add(
        "--beside",
        path=True,
        action="append",
        help="another run, as one more folder behind the first",
    )
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        help=f"of several runs: folder for compare.html and the tables; none: {COMPARED}",
    )
    options = flags.parse(list(_further(arguments)))
    folders = [options["run"], *(options["beside"] or ())]
    if len(folders) > 1:
        from editr2.benchmarks.runs import compare_runs

        print("\n".join(compare_runs(folders, options["out"] or COMPARED)))
        return 0
    if options["out"] is not None:
        raise ConfigError(
            f"--out: given with one run (accepted with several; its page is "
            f"{shown(folders[0])}/report.html)"
        )
    from editr2.report import build_report

    print(f"report: {build_report(folders[0])}")
    return 0


def _further(words: Arguments) -> Iterator[str]:
    """`A B` as `A --beside B`."""
    first, value = True, False
    for word in words:
        if not value and not word.startswith("--"):
            if not first:
                yield "--beside"
            first = False
        value = word.startswith("--") and "=" not in word
        yield word
