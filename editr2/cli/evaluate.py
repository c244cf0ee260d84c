"""`editr2 eval`"""

from __future__ import annotations

import sys
from typing import Any

from editr2.cli import settings
from editr2.cli.flags import Arguments
from editr2.policies.rules import check_config


def command(arguments: Arguments) -> int:
    """score a policy on held-out sessions"""
    config, given = settings.run_config(
        "editr2 eval",
        "Score a policy on held-out sessions (see --eval.*, --data.*).",
        arguments,
        named=True,
    )
    config = check_config(config, "eval")
    from editr2.policies.load import open_policy
    from editr2.rewards.base import weight_vector
    from editr2.rewards.load import load_eval_reward, load_reward
    from editr2.rewards.record import Record
    from editr2.rl.evaluate import evaluate
    from editr2.rl.rules import check_run
    from editr2.rl.sampler import eval_sampler, own_schedule
    from editr2.rl.sessions import sessions_for
    from editr2.rl.watch import alarms
    from editr2.run.processes import open_processes

    processes = open_processes()  # first: it says which device is this process's
    settings.tell(given["notes"], processes.main)
    cache = config.reward.cache
    record = None if cache is None else Record(None, index=processes.index, cache=cache)
    reward = load_reward(config.reward, record)
    apart = load_eval_reward(config.eval, record)
    weight_vector(reward.names, config.credit.weights)  # before weights are read, as in training
    policy = open_policy(config.policy, processes, trains=False)
    own = own_schedule(policy)
    check_run(config, reward.names, own, processes=processes.count, command="eval")
    source = sessions_for(config, policy, wants=reward.wants | (apart.wants if apart else set()))
    for panel in filter(None, (reward, apart)):
        for note in panel.probe():
            print(f"note: {note}", file=sys.stderr)
    sampler = eval_sampler(config.rollout, config.eval, own).to(processes.device)
    found = evaluate(policy, reward, source.heldout, sampler, config, processes, apart)
    row = found.row(0, "eval")
    if raised := alarms(row, config.eval.drift):
        row["alarms"] = raised
    if processes.main:
        print(evaluation_text(row))
    return 0


def evaluation_text(row: dict[str, Any]) -> str:
    """Mean and standard error by turn, as text."""
    from editr2.rl.metrics import scores_apart

    names = {key.removesuffix("_turn"): row[key] for key in row if key.endswith("_turn")}
    names |= {f"eval.{name}": values for name, values in scores_apart(row).items()}
    head = "turn    " + "".join(f"{name:>18}" for name in names)
    lines = [f"{row['sessions']} sessions", head]
    for t in range(len(names["reward"])):
        cells = [_mean_and_error(values[t]) for values in names.values()]
        lines.append(f"{t + 1:<8}" + "".join(f"{cell:>18}" for cell in cells))
    if "marginal" in names:
        lines.append("marginal: the share of turns with IF = 1, whatever came before")
    return "\n".join(lines + _below_the_table(row))


def _mean_and_error(stat: dict[str, float | None]) -> str:
    if stat["mean"] is None:
        return "-"
    return f"{stat['mean']:.3f}" + ("" if stat["se"] is None else f" +- {stat['se']:.3f}")


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
