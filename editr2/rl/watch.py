"""What evaluations say of a run beside their numbers: whether the reward that is trained on and a
judge that training never asks have parted, whether images drift from their sources, which weights
were the best, and whether it is time to stop.

All of it follows from the rows of `metrics.jsonl`, in their order, so a run that is resumed says
what one says that never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from editr2.config import Config, DriftConfig
from editr2.errors import ConfigError, counted
from editr2.rl.evaluate import mean_se

Row = dict[str, Any]

SURE = 2.0
"""Standard errors from which a paired change counts as one."""


def evaluations(record: Sequence[Row]) -> list[Row]:
    return [row for row in record if row.get("event") == "eval"]


# ------------------------------------------------------------------------------------------- alarms


def parted(row: Row, earlier: Sequence[Row]) -> dict[str, Any] | None:
    """The paired changes, session by session, of the trained reward (means over turns) and of the
    judges of `eval.reward`, since the evaluation at which these said the most; `since` is its
    iteration. None without such judges, before a second evaluation, and while they say more than
    ever.
    """
    seen = [(value, other) for other in earlier if (value := _apart(other)) is not None]
    now = _apart(row)
    if now is None or not seen:
        return None
    most, best = max(seen, key=lambda pair: pair[0])  # of equal ones the first
    changes = {name: _change(best, row, name) for name in ("trained", "reward")}
    if now >= most or any(change is None for change in changes.values()):
        return None
    return {"since": best["iteration"], **changes}


def _apart(row: Row) -> float | None:
    values = row.get("eval_reward", {}).get("per_session", {}).get("reward", [])
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _change(before: Row, after: Row, name: str) -> dict[str, float | None] | None:
    one, two = (row["eval_reward"]["per_session"][name] for row in (before, after))
    if len(one) != len(two):  # of other sessions, which the user insisted on
        return None
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    return mean_se(torch.tensor([b - a for a, b in pairs], dtype=torch.float64))


def alarms(row: Row, limits: DriftConfig) -> dict[str, str]:
    """What an evaluation's row gives reason to look at, a line by name: `parted`, where the trained
    reward rose and the judges of `eval.reward` fell by more than `SURE` standard errors each, and
    the measures of drift that crossed their limit at a turn, of which the worst is named."""
    found = {}
    if (changes := row.get("parted")) is not None:
        trained, apart = changes["trained"], changes["reward"]
        if _sure(trained, 1) and _sure(apart, -1):
            found["parted"] = (
                f"since iteration {changes['since']}, where eval.reward was highest, the trained "
                f"reward rose by {trained['mean']:.3f} +- {trained['se']:.3f} and eval.reward fell "
                f"by {-apart['mean']:.3f} +- {apart['se']:.3f} (paired over sessions)"
            )
    return found | dict(_drifted(row["drift"], limits))


def _sure(change: Mapping[str, float | None], sign: int) -> bool:
    mean, se = change["mean"], change["se"]
    return mean is not None and se is not None and sign * mean > SURE * se


def _drifted(drift: Mapping[str, Any], limits: DriftConfig) -> Iterator[tuple[str, str]]:
    for name in (field.name for field in fields(limits)):
        limit = getattr(limits, name)
        means = [(x["mean"], t) for t, x in enumerate(drift[f"{name}_turn"], 1) if x["mean"]]
        if limit is None or not means:
            continue
        if name == "structure":
            worst, turn = min(means)
            crossed, accepted = worst < limit, f"at least {limit:g}"
        else:  # twice and half are equally far
            worst, turn = max(means, key=lambda pair: max(pair[0], 1 / pair[0]))
            crossed = max(worst, 1 / worst) > limit
            accepted = f"{1 / limit:.3g} to {limit:g}"
        if crossed:
            yield (
                name,
                f"{name} of outputs against their sources is {worst:.3g} at turn {turn} "
                f"(eval.drift.{name}: {accepted})",
            )


def new_alarms(row: Row, earlier: Sequence[Row]) -> list[str]:
    """The alarms that did not stand at the evaluation before."""
    before = earlier[-1].get("alarms", {}) if earlier else {}
    return [text for name, text in row.get("alarms", {}).items() if name not in before]


# ---------------------------------------------------------------------------- the best, and the end


class Best(NamedTuple):
    """The evaluation at which a metric was highest, of equal ones the first. since: the evaluations
    during training that came behind it."""

    row: Row
    value: float
    since: int

    def facts(self, metric: str) -> dict[str, Any]:
        return {"metric": metric, "iteration": self.row["iteration"], "value": self.value}


def metrics_of(names: Sequence[str], apart: Sequence[str] = ()) -> list[str]:
    """What `checkpoint.best` can be. names: of the rewards that are trained on. apart: of those of
    `eval.reward`."""
    others = [f"eval.{name}" for name in ("reward", *apart)] if apart else []
    return ["reward", "success", *names, *others]


def check_best(config: Config, names: Sequence[str], apart: Sequence[str]) -> None:
    """Raises `ConfigError` for a metric that there is not."""
    metric, known = config.checkpoint.best, metrics_of(names, apart)
    if metric is not None and metric not in known:
        raise ConfigError(f"checkpoint.best: {metric!r} (accepted: {', '.join(known)} or none)")


def metric_of(row: Row, metric: str) -> float | None:
    """Of an evaluation: a share of sessions for success, else the mean over turns of their
    means."""
    if metric == "success":
        return row["success"]["mean"]
    part, _, name = metric.rpartition(".")
    source = row.get("eval_reward", {}) if part == "eval" else row
    name = name if part == "eval" else metric
    means = [x["mean"] for x in source.get(f"{name.lower()}_turn", []) if x["mean"] is not None]
    return sum(means) / len(means) if means else None


def best_of(rows: Sequence[Row], metric: str) -> Best | None:
    """Of the evaluations of a run so far; None where none has the metric."""
    best = None
    for row in rows:
        value = metric_of(row, metric)
        if value is not None and (best is None or value > best.value):
            best = Best(row, value, 0)
        elif best is not None and row["name"] == "during":
            best = best._replace(since=best.since + 1)
    return best


def stop_row(config: Config, record: Sequence[Row], iteration: int) -> Row | None:
    """Why a run ends at this iteration, `train.stop_after` evaluations behind the best one; None
    where it goes on."""
    metric, patience = config.checkpoint.best, config.train.stop_after
    rows = [row for row in evaluations(record) if row["iteration"] <= iteration]
    if metric is None or patience is None or (best := best_of(rows, metric)) is None:
        return None
    if best.since < patience or rows[-1]["iteration"] != iteration:
        return None
    reason = (
        f"{metric} has not risen for {counted(best.since, 'evaluation')} (train.stop_after: "
        f"{patience}); it was {best.value:.4g} at iteration {best.row['iteration']}"
    )
    return {"event": "stop", "iteration": iteration, "best": best.facts(metric), "reason": reason}
