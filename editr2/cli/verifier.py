"""`editr2 verifier`"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from editr2.cli import settings
from editr2.cli.flags import Arguments, dispatch

ANYWAY: tuple[str, dict[str, Any]] = (
    "--resume-anyway",
    {
        "type": str,
        "action": "append",
        "help": "go on although this differs from the run that is resumed: sessions (the "
        "examples), heldout, weights, prompts, or a setting; again, or with commas, for more",
    },
)


def command(arguments: Arguments) -> int:
    """a reasoning verifier (Edit-R1): `sft`, `gcpo`"""
    actions: dict[str, Callable[[Arguments], int]] = {"sft": _sft, "gcpo": _gcpo}
    return dispatch("editr2 verifier", actions, arguments)


def _sft(arguments: Arguments) -> int:
    """cold start: learn to write selected traces; run again to resume"""
    from editr2.verifier.settings import SftConfig

    return _train("sft", SftConfig, arguments)


def _gcpo(arguments: Arguments) -> int:
    """learn from preferred outputs of pairs, by traces of its own; run again to resume"""
    from editr2.verifier.settings import GcpoConfig

    return _train("gcpo", GcpoConfig, arguments)


def _train(name: str, schema: type[Any], arguments: Arguments) -> int:
    described = {"sft": _sft.__doc__, "gcpo": _gcpo.__doc__}[name] or ""
    config, given = settings.file_config(
        schema, f"editr2 verifier {name}", described, arguments, [ANYWAY]
    )
    insisted = [
        text.strip()
        for texts in given["resume_anyway"] or ()
        for text in texts.split(",")
        if text.strip()
    ]
    from editr2.verifier.loop import train_verifier

    train_verifier(name, config, resume_anyway=insisted)
    return 0
