"""`editr2 verifier`"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from editr2.cli import settings
from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.config.fields import Bounds

ANYWAY: tuple[str, dict[str, Any]] = (
    "--resume-anyway",
    {
        "type": str,
        "action": "append",
        "help": "go on although this differs from the run that is resumed: sessions (the "
        "examples), heldout, weights, prompts, or a setting; again, or with commas, for more",
    },
)

SERVER = "http://127.0.0.1:8000/v1"

EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "principles": [
        (f"--data edits --judge.options.url {SERVER}", "by a served model"),
        ("--data edits --judge.exact world", "of the world's edits, by its rules"),
    ],
    "traces": [
        (f"--data runs/principles --judge.options.url {SERVER}", "by a served model"),
        ("--data runs/principles --config pool.yaml", "by several; docs/verifier.md has the file"),
    ],
    "eval": [
        (
            "--data held --judge.weights runs/sft/verifier --judge.options.traces 4",
            "one that you trained, in this process",
        ),
    ],
    "sft": [
        (
            "--data runs/chosen --policy.weights Qwen/Qwen2.5-VL-7B-Instruct",
            "what `verifier select` wrote",
        ),
        ("--data edits --policy.weights start --policy.prompts start", "the small one, on a CPU"),
    ],
    "gcpo": [
        ("--data pairs --policy.weights runs/sft/verifier", "behind the cold start"),
    ],
}

COMMON = (
    "out",
    "data.path",
    "data.heldout",
    "judge.weights",
    "judge.options",
    "gold.exact",
    "policy.weights",
    "policy.lora_rank",
    "policy.dtype",
    "rollout.traces",
    "train.iterations",
    "train.batch",
    "train.lr",
    "eval.every",
)
"""Settings that most people change, of the commands that have them."""


CHECK: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--check",
        {
            "action": "store_true",
            "help": "only say what is wrong, and estimate memory and hours; loads no weights",
        },
    ),
    (
        "--gpu",
        {"type": str, "default": "h100", "help": "to estimate for: h100, a100-80, ... or cpu"},
    ),
    (
        "--processes",
        {"type": int, "default": 1, "bounds": SOME, "help": "that torchrun will start"},
    ),
    (
        "--tokens",
        {"type": int, "default": 400, "bounds": SOME, "help": "of a sampled trace, to estimate"},
    ),
)


def command(arguments: Arguments) -> int:
    """a reasoning verifier (Edit-R1): data, sft, gcpo, eval"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "principles": _principles,
        "traces": _traces,
        "select": _select,
        "sft": _sft,
        "gcpo": _gcpo,
        "eval": _eval,
    }
    return dispatch("editr2 verifier", actions, arguments)


def _principles(arguments: Arguments) -> int:
    """yes/no questions for edits and pairs, by a judge or exact rules"""
    from editr2.verifier.stage_settings import PrinciplesConfig

    config = _configured("principles", PrinciplesConfig, _principles.__doc__, arguments)
    from editr2.verifier.principles import write_principles

    print("\n".join(write_principles(config)))
    return 0


def _traces(arguments: Arguments) -> int:
    """what judges write about edits, and what is right"""
    from editr2.verifier.stage_settings import TracesConfig

    config = _configured("traces", TracesConfig, _traces.__doc__, arguments)
    from editr2.verifier.tracing import write_traces

    _told(write_traces(config))
    return 0


def _select(arguments: Arguments) -> int:
    """of the traces about an edit, the one that is right most often"""
    flags = Flags(
        "editr2 verifier select",
        _select.__doc__ or "",
        [
            ("--data runs/traces --out runs/chosen --least 0.8", "what `verifier traces` wrote"),
            ("--data runs/traces --out runs/direct --direct", "to judge without reasoning"),
        ],
    )
    flags.add("--data", path=True, required=True, help="a folder that `traces` wrote")
    flags.out("a folder for principles.jsonl and traces.jsonl of the chosen")
    flags.add(
        "--least",
        type=float,
        default=0.0,
        bounds=Bounds(at_least=0, at_most=1),
        help="a trace of which a smaller share of verdicts is right is nobody's choice",
    )
    flags.add(
        "--direct",
        action="store_true",
        help="keep verdicts and score alone, for a verifier that answers without reasoning",
    )
    options = flags.parse(arguments)
    from editr2.verifier.select import write_selection

    print("\n".join(write_selection(**options)))
    return 0


def _eval(arguments: Arguments) -> int:
    """accuracy, calibration, agreement and cost, with a page"""
    from editr2.verifier.stage_settings import EvalConfig

    config = _configured("eval", EvalConfig, _eval.__doc__, arguments)
    from editr2.verifier.evaluate import evaluate_verifier

    _told(evaluate_verifier(config))
    return 0


def _configured(name: str, schema: type[Any], described: str | None, arguments: Arguments) -> Any:
    return settings.file_config(
        schema,
        f"editr2 verifier {name}",
        f"{described}.",
        arguments,
        examples=EXAMPLES[name],
        common=COMMON,
    )[0]


def _told(lines: Sequence[str]) -> None:
    """By the first of several processes; the others have nothing to say."""
    if lines:
        print("\n".join(lines))


def _sft(arguments: Arguments) -> int:
    """cold start: learn selected traces; again: resume"""
    from editr2.verifier.settings import SftConfig

    return _train("sft", SftConfig, arguments)


def _gcpo(arguments: Arguments) -> int:
    """learn from pairs, by traces of its own; again: resume"""
    from editr2.verifier.settings import GcpoConfig

    return _train("gcpo", GcpoConfig, arguments)


def _check(name: str, config: Any, given: dict[str, Any]) -> int:
    from editr2.verifier.preflight import preflight

    problems, lines, fits = preflight(
        name, config, given["gpu"], given["processes"], given["tokens"]
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    if lines:
        print("\n".join(lines))
    return 0 if fits else 2


def _train(name: str, schema: type[Any], arguments: Arguments) -> int:
    described = {"sft": _sft.__doc__, "gcpo": _gcpo.__doc__}[name] or ""
    config, given = settings.file_config(
        schema,
        f"editr2 verifier {name}",
        f"{described}.",
        arguments,
        [ANYWAY, *CHECK],
        examples=EXAMPLES[name],
        common=COMMON,
    )
    if given["check"]:
        return _check(name, config, given)
    insisted = [
        text.strip()
        for texts in given["resume_anyway"] or ()
        for text in texts.split(",")
        if text.strip()
    ]
    from editr2.verifier.loop import train_verifier

    train_verifier(name, config, resume_anyway=insisted)
    return 0
