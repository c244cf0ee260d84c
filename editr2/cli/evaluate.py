"""`editr2 eval`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from editr2.cli import settings
from editr2.cli.flags import Arguments
from editr2.errors import counted

EXAMPLES = [
    ("", "the shipped small editor, on held-out sessions of its world"),
    ("--policy runs/demo --out runs/demo-eval", "one that you trained, sampled as it trained"),
    (
        "--policy runs/mine --data my_sessions --eval.sampler ode --eval.steps 28",
        "on sessions of your own, by an ODE",
    ),
]

COMMON = (
    "data.path",
    "data.resize",
    "policy.model",
    "policy.intent",
    "policy.guidance",
    "reward.name",
    "reward.options",
    "eval.sessions",
    "eval.turns",
    "eval.sampler",
    "eval.steps",
    "eval.reward",
    "eval.strips",
)


def command(arguments: Arguments) -> int:
    """score an editor: a table, scores.jsonl and a page"""
    config, given = settings.run_config(
        "editr2 eval",
        "Score an editor on sessions: a table by turn here, every score and its reason in --out. "
        "They are those of --data.heldout, else of --data, else held-out ones of the world.",
        arguments,
        [settings.out_flag("runs/eval", "folder of scores.jsonl, report.html and judges.jsonl")],
        named=True,
        examples=EXAMPLES,
        common=COMMON,
    )
    from editr2.scoring import SCORES, score

    asked = given["out"]
    out, row = score(config, None if asked is None else Path(asked), given["notes"])
    if row is not None:
        print(evaluation_text(row))
        print(f"scores: {out / SCORES}\nreport: {out / 'report.html'}")
    return 0


def evaluation_text(row: dict[str, Any]) -> str:
    """Mean and standard error by turn, as text."""
    from editr2.rl.metrics import scores_apart

    names = {key.removesuffix("_turn"): row[key] for key in row if key.endswith("_turn")}
    names |= {f"eval.{name}": values for name, values in scores_apart(row).items()}
    head = "turn " + "".join(f"{name:>15}" for name in names)
    lines = [counted(row["sessions"], "session"), head]
    for t in range(len(names["reward"])):
        cells = [_mean_and_error(values[t]) for values in names.values()]
        lines.append(f"{t + 1:<5}" + "".join(f"{cell:>15}" for cell in cells))
    if "marginal" in names:
        lines.append("marginal: the share of turns with IF = 1, whatever came before")
    return "\n".join(lines + _below_the_table(row))


def _mean_and_error(stat: dict[str, float | None]) -> str:
    if stat["mean"] is None:
        return "-"
    return f"{stat['mean']:.3f}" + ("" if stat["se"] is None else f" +- {stat['se']:.3f}")


DRIFT = (
    "(each output beside its source; structure: edges where they were, saturation: strength of "
    "colours, sharpness: of detail; far from 1 is drift, though edits that were asked for move "
    "them, too: docs/rewards.md)"
)


def _below_the_table(row: dict[str, Any]) -> list[str]:
    """What is said of whole sessions, and of turns that have no score."""
    lines = []
    if row["success"]["mean"] is not None:
        lines.append(f"sessions with every turn right: {row['success']['mean']:.1%}")
    for mode, part in row["by_mode"].items():
        if part["success"] is not None:
            lines.append(f"  {mode}: {part['success']:.1%}")
    for name, turns in row["drift"].items():
        said = "  ".join(_mean_and_error(stat) for stat in turns)
        lines.append(f"{name.removesuffix('_turn')} by turn, 1 as the source: {said}")
    if row["drift"]:
        lines.append(DRIFT)
    lines += [f"ALARM {text}" for text in row.get("alarms", {}).values()]
    if row["intents_right"] is not None:
        lines.append(f"intents equal to the known ones: {row['intents_right']:.1%}")
    for who, part in (("", row), ("eval.reward: ", row.get("eval_reward", {}))):
        if part.get("failed_scores"):
            first = part["first_failure"]
            lines.append(f"{who}turns without a score: {part['failed_scores']}; first: {first}")
        if part.get("not_applicable"):
            silent = part["not_applicable"]
            lines.append(f"{who}turns to which a reward does not apply: {silent}")
    return lines
