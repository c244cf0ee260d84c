"""`editr2 train`"""

from __future__ import annotations

from editr2.cli import settings
from editr2.cli.flags import Arguments


def command(arguments: Arguments) -> int:
    """multi-turn RL from start to report; run again to resume"""
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
        "editr2 train", "Train an editor on multi-turn sessions.", arguments, [profile, anyway]
    )
    insisted = [
        name.strip()
        for names in extra["resume_anyway"] or ()
        for name in names.split(",")
        if name.strip()
    ]
    from editr2.training import train

    train(config, profile=bool(extra["profile"]), resume_anyway=insisted)
    return 0
