"""`editr2 reproduce`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from editr2.cli.flags import SOME, Arguments, Flags
from editr2.cli.loading import load_libraries
from editr2.config.rules import folder_problem
from editr2.errors import ConfigError


def command(arguments: Arguments) -> int:
    """the papers' methods side by side on the world"""
    from editr2.reproduce.arms import JUDGED, Settings, find_arms

    flags = Flags(
        "editr2 reproduce",
        "The papers' comparisons on the world: trains every arm and writes a page of tables with "
        "intervals. The same command again trains what is missing.",
        [
            ("--arms base,edit-r2 --seeds 1 --iterations 5", "a small one, to see what it does"),
            ("--seeds 3", "all of it: hours on two cores"),
            (
                "--study judges --arms exact,shipped --iterations 20",
                "rewarded by the verifier that the package has, held against exact scores",
            ),
            (
                "--study judges --verifiers runs/verifiers --arms exact,sft --iterations 20",
                "rewarded by a verifier of your own, held against exact scores",
            ),
            ("--report-only", "the page again, from the rows there are"),
        ],
    )
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        help="folder of the runs; else runs/reproduce, of judges runs/reproduce-judges",
    )
    flags.add(
        "--docs",
        type=str | None,
        path=True,
        check=folder_problem,
        what="a folder or none",
        help="folder of reproduction.md, its plots and its rows; none: --out",
    )
    flags.add(
        "--study",
        type=Literal["methods", "judges"],
        default="methods",
        help="methods: the papers', under exact scores; judges: rewarded by verifiers, which err",
    )
    flags.add(
        "--verifiers",
        path=True,
        help="of the study of judges: folder with sft/seed0, gcpo/seed0 and so on, a verifier each "
        "(docs/verifier.md); arms under the world or the shipped verifier need none",
    )
    flags.add("--arms", help="comma-separated names; all of them if not given")
    flags.add("--seeds", type=int, default=3, bounds=SOME, help="training seeds of every arm")
    flags.add(
        "--jobs", type=int, default=2, bounds=SOME, help="runs side by side; they share the cores"
    )
    flags.add("--report-only", action="store_true", help="write the page from the rows there are")
    flags.settings(Settings)
    options = flags.parse(arguments)
    load_libraries()
    out, docs, report_only = (options.pop(name) for name in ("out", "docs", "report_only"))
    study = options.pop("study")
    out = Path(out or ("runs/reproduce" if study == "methods" else f"runs/reproduce-{study}"))
    docs = out if docs is None else Path(docs)
    arms = find_arms(options.pop("arms"), study)
    seeds, jobs, verifiers = (options.pop(name) for name in ("seeds", "jobs", "verifiers"))
    if verifiers is not None and not any(arm.needs_verifiers for arm in arms):
        raise ConfigError(
            f"--verifiers: {verifiers}: rewards none of the arms (accepted with --study judges, "
            f"and there with {', '.join(arm.name for arm in JUDGED if arm.needs_verifiers)})"
        )
    from editr2.reproduce.page import write_page
    from editr2.reproduce.runs import reproduce

    failures = (
        []
        if report_only
        else reproduce(
            out,
            docs,
            Settings(**options),
            arms=arms,
            seeds=seeds,
            jobs=jobs,
            verifiers=None if verifiers is None else Path(verifiers),
        )
    )
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    if not failures or (docs / "reproduction.jsonl").exists():
        print(f"page: {write_page(docs)}")
    return 1 if failures else 0
