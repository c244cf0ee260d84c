"""`editr2 check`"""

from __future__ import annotations

import sys
from dataclasses import replace

from editr2.cli import settings
from editr2.cli.flags import SOME, Arguments
from editr2.cli.train import COMMON
from editr2.config import Config

EXAMPLES = [
    ("run.yaml --gpu h100", "does it fit an H100, how long does it take, what would be faster"),
    ("run.yaml --gpu rtx4090 --policy.quantize fp8", "the same of another card and setting"),
    ("--gpu cpu --dry-run", "the demo on this machine, with two iterations really trained"),
]


def command(arguments: Arguments) -> int:
    """what is wrong with a run, its memory and time, before it starts"""
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
    config, given = settings.run_config(
        "editr2 check",
        description,
        arguments,
        extra,
        strict=False,
        examples=EXAMPLES,
        common=COMMON,
    )
    from editr2.check import preflight

    report = preflight(config, given["gpu"], given["processes"])
    print("\n".join(report.problems), file=sys.stderr, end="\n" if report.problems else "")
    if report.problems:
        return 2
    print("\n".join(report.lines))
    if given["dry_run"]:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="editr2-check-") as folder:
            print("\n".join(["", *dry_run(config, folder)]))
    return 0 if report.fits else 2


def dry_run(config: Config, folder: str) -> list[str]:
    """Trains for two iterations into `folder` by the code of `train` and says what the second one
    took.

    Evaluation is cut to one session; everything else is as configured, so time and memory are an
    iteration's.
    """
    import torch

    from editr2.run.tracking import read_metrics
    from editr2.training import train

    short = replace(
        config,
        out=folder,
        train=replace(config.train, iterations=2, stop_after=None),
        eval=replace(
            config.eval,
            sessions=min(1, config.eval.sessions),
            strips=min(1, config.eval.strips),
            every=0,
        ),
        checkpoint=replace(config.checkpoint, every=2, keep=1),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = train(short)
    last = [row for row in read_metrics(run / "metrics.jsonl")[0] if row.get("event") == "train"][
        -1
    ]
    seconds = ", ".join(f"{phase} {s:.1f} s" for phase, s in last["seconds"].items())
    lines = [f"dry run     the second iteration took {seconds}"]
    if cuda:
        lines.append(
            f"            alive at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of "
            f"the device"
        )
    lines.append("            its folder is removed again, with the report")
    return lines
