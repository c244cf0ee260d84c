"""What an iteration and an evaluation look like in `metrics.jsonl` and on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editr2.config import EvalConfig, TrainConfig
from editr2.errors import UserError
from editr2.policies.base import Policy, parameter_count
from editr2.rewards.base import NOT_APPLICABLE, PRUNED, Scores, weights_of
from editr2.rewards.panel import Panel
from editr2.rl.credit import weighted_reward
from editr2.rl.evaluate import mean_se, success
from editr2.rl.gradient import SUMS
from editr2.rl.losses import LOSSES
from editr2.rl.rollout import Chunk
from editr2.run.identity import Identity
from editr2.run.processes import Processes
from editr2.sessions.source import SessionSource
from editr2_kernels import GroupAdvantage


class Clock:
    """Seconds by phase of the current iteration."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "reward", "credit", "loss", "optimiser"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def rows_due(iteration: int, t: TrainConfig, evaluation: EvalConfig) -> list[str]:
    """Which rows the record has to hold, besides the train rows of the iterations done, before the
    next one begins; in their order. Rows of an evaluation are called by its name.

    The loop asks this at every iteration and after the last, and makes what is missing: so it does
    not matter where a run was killed.
    """
    if evaluation.off:
        return ["start"] if iteration == 0 else []
    due = ["start", "before"] if iteration == 0 else []
    if iteration and evaluation.every and iteration % evaluation.every == 0:
        due.append("during")
    if iteration >= t.iterations:
        due += ["after", "comparison"]
    return due


def strips_due(iteration: int, t: TrainConfig, evaluation: EvalConfig) -> list[str]:
    """The passes of film-strips that have to be there before the next iteration begins and that no
    evaluation draws beside its row: where there are no evaluations."""
    ends = {"before": iteration == 0, "after": iteration >= t.iterations}
    return [name for name, due in ends.items() if due and evaluation.off and evaluation.strips]


def find_row(record: Sequence[dict[str, Any]], name: str, iteration: int) -> dict[str, Any] | None:
    """The row of an iteration that `rows_due` calls so, or its train row."""
    for row in record:
        if row.get("iteration") == iteration and name in (row.get("event"), row.get("name")):
            return row
    return None


def rows_lost(
    record: Sequence[dict[str, Any]], iteration: int, t: TrainConfig, evaluation: EvalConfig
) -> list[str]:
    """Rows of before a checkpoint that are not in the record and cannot be made any more, as `train
    3`."""
    due = [("train", i) for i in range(iteration)]
    due += [(name, i) for i in range(iteration) for name in rows_due(i, t, evaluation)]
    there = {
        (name, row.get("iteration"))
        for row in record
        for name in (row.get("event"), row.get("name"))
    }
    return [
        f"{name} {i}"
        for name, i in sorted(due, key=lambda place: place[1])
        if (name, i) not in there
    ]


def start_row(
    weights: dict[str, float],
    source: SessionSource,
    processes: Processes,
    policy: Policy,
    reward: Panel,
    apart: Panel | None,
    identity: Identity,
) -> dict[str, Any]:
    """weights: `credit.weights`. apart: the judges of `eval.reward`, of which the row has the names
    (`eval_reward`). judges: what the rewards say of themselves (`Panel.facts`).
    identity: what the run depends on and where it was made; `resumed` gets an entry from each
    process that goes on with it."""
    return {
        "event": "start",
        "iteration": 0,
        "processes": processes.count,
        "device": str(processes.device),
        "threads": torch.get_num_threads(),
        "trainable_parameters": parameter_count(policy.module, trainable_only=True),
        "heldout_is_training": source.heldout_is_training,
        "rewards": weights_of(reward.names, weights),
        "judges": reward.facts,
        **({} if apart is None else {"eval_reward": {"names": apart.names, "judges": apart.facts}}),
        "identity": {"depends": identity.depends, **identity.made, "resumed": []},
    }


def train_row(
    iteration: int,
    t: TrainConfig,
    groups: int,
    weights: dict[str, float],
    scores: Scores,
    credit: GroupAdvantage,
    done: list[Chunk],
    totals: list[dict[str, float]],
    clock: Clock,
    processes: Processes,
) -> dict[str, Any]:
    """Metrics of all processes; means leave out turns without a score. groups: of the iteration.
    weights: `credit.weights`. totals: one entry an optimiser step. Losses and shares are those of
    the last pass over the rollout; ratio errors those of its first step."""
    intents, thoughts = _Intents.of(done), _thought(done)
    last = totals[-t.minibatches :]
    # Each step's loss is a mean over its own minibatch.
    shares, logs = {"loss", "kl", "text_loss"}, LOSSES[t.loss].logs
    sums = {
        name: sum(part[name] for part in last) / (len(last) if name in shares else 1)
        for name in (*SUMS, *logs)
    }
    parts = processes.gather([(sums, totals[0], clock.seconds, intents, thoughts)])
    sampled, right, known, failed, tokens = (
        sum(column) for column in zip(*(p[3] for p in parts), strict=True)
    )
    thoughts = [n for p in parts for n in p[4]]
    wrote = bool(sampled or thoughts)
    reward = weighted_reward(scores, weights)
    flat = reward.view(groups, -1)
    spread = flat.nan_to_num(nan=-torch.inf).amax(1) - flat.nan_to_num(nan=torch.inf).amin(1)
    values = torch.where(scores.scored, scores.values, torch.nan)
    silent = scores.of_state(NOT_APPLICABLE) | scores.of_state(PRUNED)
    trained = credit.advantage[credit.mask]
    totals_of = {name: sum(p[0][name] for p in parts) for name in sums}
    counted = max(1.0, totals_of["samples"])
    row = {
        "event": "train",
        "iteration": iteration,
        "reward": float(reward.nanmean()),
        "reward_turn": _by_turn(reward, silent.any(-1)),
        **{
            f"{n.lower()}_turn": _by_turn(values[..., k], silent[..., k])
            for k, n in enumerate(scores.names)
        },
        "success": mean_se(success(scores))["mean"],
        "ratio_error": max(p[1]["ratio_error"] for p in parts),
        "loss": totals_of["loss"],
        "kl": totals_of["kl"] if t.kl_weight > 0 else None,
        "clip_fraction": totals_of.get("clipped", 0.0) / counted,
        "grad_norm": totals[-1]["grad_norm"],
        "advantage_abs": float(trained.abs().mean()) if len(trained) else 0.0,
        "zero_variance_groups": float((spread <= 0).float().mean()),
        "failed_scores": scores.failed,
        "not_applicable": scores.not_applicable,
        "first_failure": scores.first_failure,
        "filtered_turns": int(((~reward.isnan() & ~credit.mask) | scores.pruned).sum()),
        "intent_fallback": failed / sampled if sampled else None,
        "intents_right": right / known if known else None,
        "intent_tokens": tokens / sampled if sampled else None,
        "text_loss": totals_of["text_loss"] if wrote else None,
        "text_clip_fraction": totals_of["text_clipped"] / max(1.0, totals_of["tokens"])
        if wrote
        else None,
        "text_ratio_error": max(p[1]["text_error"] for p in parts) if wrote else None,
        **({"thought_tokens": sum(thoughts) / len(thoughts)} if thoughts else {}),
        "seconds": {name: max(p[2][name] for p in parts) for name in clock.seconds},
    }
    more = {name: totals_of[name] / counted for name in logs if name != "clipped"}
    if taken := sorted(more.keys() & row.keys()):
        raise UserError(f"train.loss: {t.loss!r}: logs: {', '.join(taken)} (accepted: new names)")
    return row | more


def _by_turn(values: Tensor, silent: Tensor) -> list[float | None]:
    """Means of [N, T] over the first, NaN where nothing is; None where that is because a reward
    does not apply or the turn was left out, which is nothing to warn of."""
    means = values.nanmean(0)
    none = (means.isnan() & silent.any(0)).tolist()
    return [None if gone else mean for mean, gone in zip(means.tolist(), none, strict=True)]


class _Intents(NamedTuple):
    """Counts: sampled, equal to the known intent, of which one is known, unreadable (fallbacks),
    tokens."""

    sampled: int
    right: int
    known: int
    failed: int
    tokens: int

    @staticmethod
    def of(done: list[Chunk]) -> _Intents:
        pairs = [
            (intent, chunk.session_of(i).turns[t].intent)
            for chunk in done
            for t, record in enumerate(chunk.turns)
            if (written := record.written.get("intent")) is not None
            for i, intent in zip(record.rollout.tolist(), written.samples, strict=True)
        ]
        return _Intents(
            len(pairs),
            sum(known is not None and intent.text == known for intent, known in pairs),
            sum(known is not None for _, known in pairs),
            sum(intent.text is None for intent, _ in pairs),
            sum(len(intent.ids) for intent, _ in pairs),
        )


def _thought(done: list[Chunk]) -> list[int]:
    """Tokens of every thought."""
    written = [r.written["thought"] for c in done for r in c.turns if "thought" in r.written]
    return [len(sample.ids) for each in written for sample in each.samples]


def evaluation_line(row: dict[str, Any], kind: str = "held-out") -> str:
    """One line for the terminal:

        before (iteration 0, 200 held-out sessions): reward t1 0.829  t2 0.719 (last +-0.02), ...

    kind: of the sessions, "training" where none are held out.
    """
    se, right = row["reward_turn"][-1]["se"], row["success"]["mean"]
    spread = f" (last +-{se:.3f})" if se is not None else ""
    whole = f", sessions all right {right:.1%}" if right is not None else ""
    where = f"{row['name']} (iteration {row['iteration']}, {row['sessions']} {kind} sessions)"
    apart = "".join(
        f"; eval.{name} {_turns_line(values)}" for name, values in scores_apart(row).items()
    )
    return f"{where}: reward {_turns_line(row['reward_turn'])}{spread}{whole}{apart}"


def _turns_line(turns: Sequence[dict[str, float | None]]) -> str:
    """`t1 0.829  t2 0.719`."""
    said = "  ".join(
        f"t{t} {x['mean']:.3f}" for t, x in enumerate(turns, 1) if x["mean"] is not None
    )
    return said or "–"


def scores_apart(row: dict[str, Any]) -> dict[str, list[dict[str, float | None]]]:
    """Of an evaluation's row, what the judges of `eval.reward` say a turn, by name: `reward`, their
    mean, and theirs as they are called in small letters."""
    apart = row.get("eval_reward", {})
    return {k.removesuffix("_turn"): v for k, v in apart.items() if k.endswith("_turn")}


def comparison_line(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return "before -> after: no session could be scored both times"
    times = f" = {row['difference'] / row['se']:.1f} standard errors" if row["se"] else ""
    right = ""
    if row["success_before"] is not None and row["success_after"] is not None:
        right = f"; sessions all right {row['success_before']:.1%} -> {row['success_after']:.1%}"
    return (
        f"last turn's reward {row['reward_before']:.3f} -> {row['reward_after']:.3f}, paired "
        f"difference {row['difference']:+.3f} +- {row['se'] or 0:.3f}{times}{right}"
    )
