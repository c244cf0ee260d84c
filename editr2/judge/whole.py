"""A trial from start to end."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from editr2.config import UNSET_WEIGHTS
from editr2.errors import ConfigError
from editr2.judge import best_of
from editr2.judge.labels import read_labels
from editr2.judge.outputs import Output, count_outputs, output_sizes, read_outputs
from editr2.judge.page import write_page
from editr2.judge.settings import JudgeConfig
from editr2.judge.summary import (
    Agreement,
    agrees_with_labels,
    agrees_with_reward,
    summarise,
    with_reward,
)
from editr2.judge.text import lines
from editr2.judge.trial import CountingRecord, Trial, ask
from editr2.judge.written import FILE_NAME, write_scores
from editr2.rewards.base import weights_of
from editr2.rewards.load import load_reward
from editr2.rewards.panel import Panel
from editr2.sessions import Session
from editr2.sessions.source import open_sessions

PAGE = "judge.html"


def judge(
    config: JudgeConfig,
    *,
    outputs: Sequence[str],
    repeats: int = 1,
    labels: str | None = None,
    price_per_call: float | None = None,
) -> list[str]:
    """Writes scores.jsonl, judge.html and the record of every answer into `config.out`; returns
    what to print. Raises `UserError` for whatever is wrong with what was given, before anything is
    asked."""
    out = Path(config.out)
    record = CountingRecord(out, cache=config.reward.cache)
    panel = load_reward(config.reward, record)
    other = load_reward(config.against, record) if config.against.given else None
    weights = reward_weights(panel, config)
    for one in filter(None, (panel, other)):
        one.quick_look()
    wants = panel.wants | (other.wants if other else set())
    found = read_outputs(outputs, _sessions(config, outputs, wants))
    said_of = read_labels(labels, found, panel.names) if labels else None
    out.mkdir(parents=True, exist_ok=True)
    try:
        trial = _asked(panel, found, record, repeats, config)
        against = _asked(other, found, record, repeats, config) if other else None
    finally:
        record.close()
    agreements: list[tuple[str, list[Agreement]]] = []
    if said_of:
        agreements.append((str(labels), agrees_with_labels(trial, said_of, weights)))
    if against:
        name = " and ".join(str(use.function or use.name) for _, use in config.against.uses)
        agreements.append((name, agrees_with_reward(trial, against)))
    scores = summarise(trial)
    rewards: np.ndarray | None = with_reward(trial, weights).get("reward")
    write_scores(out / FILE_NAME, trial, rewards, against)
    curves = best_of.best_of(trial, against, weights) if against else []
    best = best_of.table(curves)
    more = [] if best is None else [best]
    page = {
        "price": price_per_call,
        "rewards": rewards,
        "more": more,
        "charts": best_of.charts(curves),
    }
    write_page(out / PAGE, trial, scores, agreements, **page)  # type: ignore[arg-type]
    said = lines(trial, scores, agreements, price_per_call, more)
    if weights is None:
        said.append("reward: no sum of the scores without credit.weights of their names")
    return [*said, f"scores: {out / FILE_NAME}", f"page: {out / PAGE}"]


def _asked(
    panel: Panel, outputs: Sequence[Output], record: CountingRecord, repeats: int, c: JudgeConfig
) -> Trial:
    trial = ask(panel, outputs, record, repeats=repeats, seed=c.seed)
    for note in trial.notes:
        print(f"note: {note}", file=sys.stderr)
    return trial


def _sessions(
    config: JudgeConfig, folders: Sequence[str], wants: Collection[str]
) -> dict[str, Session]:
    """Every session that the outputs may be of, by id."""
    size = None if config.data.resize == "no" else output_sizes(folders)
    count = max(config.eval.sessions, count_outputs(folders))
    source = open_sessions(
        config.data,
        config.rollout,
        replace(config.eval, sessions=count),
        seed=config.seed,
        size=size,
        others=True,  # of sessions without an output
        wants=wants,
    )
    return {s.id: s for s in [*(source.sessions or ()), *source.heldout]}


def reward_weights(panel: Panel, config: JudgeConfig) -> dict[str, float] | None:
    """`credit.weights` of these scores; None where nobody gave any that fit. Raises `ConfigError`
    for given ones that do not."""
    try:
        return weights_of(panel.names, config.credit.weights)
    except ConfigError:
        if config.credit.weights not in UNSET_WEIGHTS:
            raise
        return None
