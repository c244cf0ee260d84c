"""`editr2 train`"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from editr2.cli import settings
from editr2.cli.flags import Arguments

EXAMPLES = [
    ("", "the shipped small editor on endless sessions of a drawn world"),
    ("--data examples/shapes --out runs/mine", "sessions of your own: a folder, its images in it"),
    (
        "--config run.yaml --preset mt-editflow-nft --train.lr 1e-5",
        "a recipe, by another published method, with a setting changed",
    ),
    ("--config run.yaml --train.iterations 200", "longer than before: the run there goes on"),
]

COMMON = (
    "out",
    "data.path",
    "data.heldout",
    "policy.model",
    "policy.weights",
    "policy.lora_rank",
    "policy.resolution",
    "reward.name",
    "rollout.sessions",
    "rollout.siblings",
    "rollout.steps",
    "train.iterations",
    "train.lr",
    "eval.sessions",
    "eval.every",
    "checkpoint.every",
)
"""Settings that most people change, here and before a run (`editr2 check`)."""


def command(arguments: Arguments) -> int:
    """train an editor by RL, from start to report; again: resume"""
    profile = (
        "--profile",
        {"action": "store_true", "help": "print the seconds of an iteration by phase at the end"},
    )
    told = (
        "go on although this differs from the run that is resumed: sessions, heldout, weights, "
        "reward, or a setting"
    )
    anyway = (
        "--resume-anyway",
        {"type": str, "action": "append", "help": f"{told}; again, or with commas, for more"},
    )
    config, extra = settings.run_config(
        "editr2 train",
        "Train an editor on sessions of several instructions, from its start to its report. The "
        "same command again goes on where it stopped.",
        arguments,
        [profile, anyway],
        examples=EXAMPLES,
        common=COMMON,
    )
    insisted = [
        name.strip()
        for names in extra["resume_anyway"] or ()
        for name in names.split(",")
        if name.strip()
    ]
    from editr2.run.processes import open_processes
    from editr2.training import train

    train(config, profile=bool(extra["profile"]), resume_anyway=insisted)
    if open_processes().main:
        print("\n".join(what_next(Path(config.out))), file=sys.stderr)
    return 0


def what_next(run: Path) -> list[str]:
    """Where a finished run's results are, and what one does with them."""
    page = "report.html, " if (run / "report.html").is_file() else ""
    best = ", best/ (the best ones)" if (run / "best").is_dir() else ""
    named = shlex.quote(str(run))
    commands = {
        f"editr2 eval --policy {named}": "score it, session by session",
        f"editr2 export {named} --out exported": "for other programs",
    }
    width = max(map(len, commands)) + 3
    lines = [f"{command:<{width}}{why}" for command, why in commands.items()]
    return [
        f"done: {run}: {page}policy/ (the weights){best}, metrics.jsonl",
        f"next: {lines[0]}",
        *(f"      {line}" for line in lines[1:]),
    ]
