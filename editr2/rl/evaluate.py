"""Evaluation (fixed seeds, greedy intents) and the film-strips of the report."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from editr2.config import Config, CreditConfig
from editr2.policies.base import Intent, Policy
from editr2.rewards.adapt import score_batch
from editr2.rewards.base import (
    NOT_APPLICABLE,
    GivenReward,
    RewardFailure,
    Scores,
    check_failures,
    merge_scores,
    unscored,
)
from editr2.rewards.panel import Panel
from editr2.rewards.pool import Pool
from editr2.rewards.record import asked_anew, calls_of
from editr2.rl.credit import assign_credit, weighted_reward
from editr2.rl.drift import MEASURES, drift
from editr2.rl.judging import Judged, pool_of
from editr2.rl.rollout import Chunk, Seeds, chunks, in_evaluation, rollout_chunk
from editr2.rl.sampler import Sampler
from editr2.run.generators import generators_aside
from editr2.run.processes import Processes
from editr2.sessions import Session


@dataclass(frozen=True)
class Evaluation:
    """Scores of all sessions. reward: [N, T], NaN where missing. success: [N], 1 where every turn
    is right, NaN where one could not be scored. intents_right: share of intents equal to the known
    ones, None where none is known. drift: float64 [N, T, 3], the `MEASURES` of every output against
    its source, NaN where there is none. apart: of the judges that training never asks
    (`eval.reward`). drawn: the rollouts of the first sessions, as many as `evaluate` was asked to
    show. pictured: of sessions whose outputs are kept small (`rl.kept`), their place and the images
    [h, w, 3] of their turns."""

    scores: Scores
    reward: Tensor
    success: Tensor
    modes: list[str | None]
    intents_right: float | None
    drift: Tensor
    apart: Scores | None = None
    drawn: Sequence[_Drawn] = ()
    pictured: Sequence[tuple[int, list[np.ndarray]]] = ()

    def row(self, iteration: int, name: str) -> dict[str, Any]:
        """The metrics row: means and standard errors over sessions, by turn. `marginal_turn` is the
        share of turns whose own instruction is fully followed (IF = 1) whatever came before
        (EdiVal-Bench's marginal success)."""
        turns = self.reward.shape[1]
        row: dict[str, Any] = {
            "event": "eval",
            "iteration": iteration,
            "name": name,
            "sessions": len(self.modes),
        }
        row["reward_turn"] = [mean_se(self.reward[:, t]) for t in range(turns)]
        of = _by_name(self.scores)
        for label, values in of.items():
            row[f"{label.lower()}_turn"] = _each_turn(values)
        if "IF" in of:
            followed = (of["IF"] >= 1 - 1e-6).float()
            marginal = torch.where(of["IF"].isnan(), torch.nan, followed)
            row["marginal_turn"] = [mean_se(marginal[:, t]) for t in range(turns)]
        row["success"] = mean_se(self.success)
        row["failed_scores"] = self.scores.failed
        row["not_applicable"] = self.scores.not_applicable
        row["first_failure"] = self.scores.first_failure
        row["intents_right"] = self.intents_right
        row["per_session"] = {
            "reward": _optional(last_turn(self)),
            "success": _optional(self.success),
        }
        for label, values in of.items():
            row["per_session"][label.lower()] = [_optional(v) for v in values]
        row["by_mode"] = {}
        for mode in sorted({m for m in self.modes if m}):
            of_mode = torch.tensor([m == mode for m in self.modes])
            row["by_mode"][mode] = {
                "reward_turn": [mean_se(self.reward[of_mode, t])["mean"] for t in range(turns)],
                "success": mean_se(self.success[of_mode])["mean"],
                "sessions": int(of_mode.sum()),
            }
            if "GA" in of:
                row["by_mode"][mode]["ga_turn"] = [
                    mean_se(of["GA"][of_mode, t])["mean"] for t in range(turns)
                ]
        row["drift"] = {
            "structure_turn": _each_turn(self.drift[..., 0]),
            **{
                f"{name}_turn": [_ratio(column) for column in self.drift[..., k].T]
                for k, name in enumerate(MEASURES[1:], 1)
            },
        }
        if self.apart is not None:
            row["eval_reward"] = self._apart(self.apart)
        return row

    def _apart(self, scores: Scores) -> dict[str, Any]:
        """What the judges of `eval.reward` say, in names of their own. Their `reward` of a turn is
        the mean of their scores that apply: weights are of training. per_session: means over turns,
        `trained` of the reward that is trained on, which it is held against."""
        of = _by_name(scores)
        reward = torch.stack(list(of.values())).nanmean(0)
        return {
            "reward_turn": _each_turn(reward),
            **{f"{label.lower()}_turn": _each_turn(values) for label, values in of.items()},
            "failed_scores": scores.failed,
            "not_applicable": scores.not_applicable,
            "first_failure": scores.first_failure,
            "per_session": {
                "reward": _optional(reward.nanmean(1)),
                "trained": _optional(self.reward.nanmean(1)),
            },
        }


def _by_name(scores: Scores) -> dict[str, Tensor]:
    """[N, T] of every name, NaN where there is no score."""
    scored = torch.where(scores.scored, scores.values, torch.nan)
    return {name: scored[..., k] for k, name in enumerate(scores.names)}


def _each_turn(values: Tensor) -> list[dict[str, float | None]]:
    return [mean_se(column) for column in values.T]


def _ratio(values: Tensor) -> dict[str, float | None]:
    """Geometric mean of ratios, for which twice and half are equally far from 1, and its standard
    error."""
    log = mean_se(values.log())
    mean = None if log["mean"] is None else math.exp(log["mean"])
    return {"mean": mean, "se": None if mean is None or log["se"] is None else mean * log["se"]}


def last_turn(evaluation: Evaluation) -> Tensor:
    """The reward of every session's own last turn, [N]."""
    last = (evaluation.scores.expected.sum(1) - 1).clamp(min=0)
    return evaluation.reward[torch.arange(len(last)), last]


def _optional(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]


def mean_se(values: Tensor) -> dict[str, float | None]:
    """Mean and its standard error over the finite entries."""
    finite = values[~values.isnan()].double()
    if not len(finite):
        return {"mean": None, "se": None}
    se = float(finite.std() / math.sqrt(len(finite))) if len(finite) > 1 else None
    return {"mean": float(finite.mean()), "se": se}


def success(scores: Scores) -> Tensor:
    """[N], 1 where every turn of a session is right, NaN where one of those looked at could not be
    scored. GA speaks of all turns so far, so that of the last turn says it; without GA every turn
    needs full marks in every score. A score that does not apply is no objection; NaN where none
    applies. A rollout that was left out from some turn on failed there."""
    silent = scores.of_state(NOT_APPLICABLE)
    full = scores.values >= 1 - 1e-6
    if "GA" in scores.names:
        ga = scores.names.index("GA")
        turns = torch.arange(scores.expected.shape[1])
        last = (turns * (scores.expected & ~silent[..., ga])).amax(1)
        each = torch.arange(len(last))
        right, scored = full[each, last, ga], scores.scored[each, last, ga]
    else:
        right = (full | silent | ~scores.expected[..., None]).all(-1).all(1)
        scored = (scores.unfailed | ~scores.expected).all(1) & scores.present.any(1)
    over = scores.pruned.any(1)
    return torch.where(scored | over, (right & ~over).float(), torch.nan)


FIRST_CALLS = 4
"""Sessions that a reward is asked about before the first rollout; when all of them fail, the run
stops there."""


def first_answer(
    reward: Panel, sessions: Sequence[Session], limit: float, processes: Processes
) -> None:
    """Asks a reward that has not answered yet about the source images of a few sessions, as if they
    were the outputs: no image is made for a judge that is down. Raises `RewardFailure` when one of
    its names fails every time. limit: `train.max_failed_scores`; 1 never stops. All processes call
    this together. Generators are left as they were: a run that is resumed asks once more than one
    that was not."""
    failures: list[str] = []
    with generators_aside(0), asked_anew(), calls_of(purpose="first"):
        for session in sessions[: FIRST_CALLS if limit < 1 and not reward.answered else 0]:
            image, turns = session.image, len(session.turns)
            scores = score_batch(reward, [(session, np.stack([image] * turns))], turns)
            if (failure := unscored(scores)) is None:
                failures.clear()
                break
            failures.append(failure)
    if first := processes.gather(failures):
        raise RewardFailure(
            f"asked about source images, before any was edited: no score for any turn: {first[0]}"
        )


def evaluate(
    policy: Policy,
    reward: GivenReward | Panel | Pool,
    sessions: Sequence[Session],
    sampler: Sampler,
    config: Config,
    processes: Processes,
    apart: Panel | Pool | None = None,
    shown: int = 0,
    pictured: Callable[[Session, int], bool] | None = None,
    small: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    progress: Callable[[int], None] | None = None,
    **where: Any,
) -> Evaluation:
    """One deterministic rollout a session; split over processes and gathered. apart: the judges of
    `eval.reward`. shown: of the first so many sessions images are kept (`strips_of`). pictured: of
    a session and its place, whether its outputs are kept as `small` makes them. progress: hears,
    after every batch, how many sessions this process has edited. where: what the record of judging
    says of it besides. Raises `RewardFailure` where a reward is down, or fails on more turns than
    `train.max_failed_scores` lets pass."""
    pool, limit = pool_of(reward), config.train.max_failed_scores
    first_answer(pool.panel, sessions, limit, processes)
    mine = processes.share(len(sessions))
    turns = max(len(s.turns) for s in sessions)
    done, seeds = [], Seeds(0, "eval")
    judged = [Judged(pool.judging(purpose="eval", **where), seeds, mine.start)]
    if apart is not None:
        other = pool_of(apart)
        with _said_of("eval.reward"):
            first_answer(other.panel, sessions, limit, processes)
        judging = other.judging(purpose="eval.reward", **where)
        judged.append(Judged(judging, seeds, mine.start))

    def decoded(chunk: Chunk, turn: int) -> None:
        for one in judged:
            one.decoded(chunk, turn)

    options, rollout = in_evaluation(config)
    for chunk in chunks(
        sessions[mine], range(len(sessions))[mine], 1, 4 * config.rollout.groups_per_batch
    ):
        rollout_chunk(
            policy,
            chunk,
            sampler,
            seeds,
            options,
            rollout=rollout,
            greedy=True,
            decoded=decoded,
        )
        for one in judged:
            one.done(chunk)
        done.append(chunk)
        if progress is not None:
            progress(sum(len(each.sessions) for each in done))
    processes.lend()
    known = [
        record.text[j] == turn.intent
        for chunk in done
        for t, record in enumerate(chunk.turns)
        for j, i in enumerate(record.rollout.tolist())
        if "intent" in record.written and (turn := chunk.session_of(i).turns[t]).intent is not None
    ]
    drifts = _drifts(done, turns)
    drawn = [
        (ordinal, _first_of(chunk, place))
        for chunk in done
        for place, ordinal in enumerate(chunk.ordinals)
        if ordinal < shown
    ]
    kept = [
        (ordinal, [small(image) for image in chunk.images_of(place)])
        for chunk in done
        for place, ordinal in enumerate(chunk.ordinals)
        if pictured is not None and pictured(sessions[ordinal], ordinal)
    ]
    parts = processes.gather([([one.scores(turns) for one in judged], known, drifts, drawn, kept)])
    scores, *others = (merge_scores(each) for each in zip(*(p[0] for p in parts), strict=True))
    check_failures(scores, limit)
    with _said_of("eval.reward"):
        for other_scores in others:
            check_failures(other_scores, limit)
    rights = [right for part in parts for right in part[1]]
    return Evaluation(
        scores,
        weighted_reward(scores, config.credit.weights),
        success(scores),
        [s.mode for s in sessions],
        float(np.mean(rights)) if rights else None,
        torch.cat([part[2] for part in parts]),
        others[0] if others else None,
        [strip for _, strip in sorted((p for part in parts for p in part[3]), key=itemgetter(0))],
        [one for part in parts for one in part[4]],
    )


def _drifts(done: Sequence[Chunk], turns: int) -> Tensor:
    """float64 [rollouts, turns, 3] in the order of the chunks' rows, NaN where a session has no
    such turn."""
    found = np.full((sum(chunk.rollouts for chunk in done), turns, len(MEASURES)), np.nan)
    for chunk in done:
        for rollout, row in enumerate(chunk.rows.tolist()):
            seen = drift(chunk.session_of(rollout).image, chunk.images_of(rollout))
            found[row, : len(seen)] = seen
    return torch.from_numpy(found)


@contextmanager
def _said_of(setting: str) -> Iterator[None]:
    """A failure inside is that of the judges of a setting: their names may be those of others."""
    try:
        yield
    except RewardFailure as failure:
        raise RewardFailure(f"{setting}: {failure}") from None


def comparison_row(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The paired change of the last turn's reward and of session success, from two evaluation
    rows."""
    first, last = (torch.tensor(_numbers(row["per_session"]["reward"])) for row in (before, after))
    difference = mean_se(last - first)
    return {
        "event": "comparison",
        "iteration": after["iteration"],
        "turn": len(after["reward_turn"]),
        "reward_before": mean_se(first)["mean"],
        "reward_after": mean_se(last)["mean"],
        "difference": difference["mean"],
        "se": difference["se"],
        "sessions": after["sessions"],
        "success_before": before["success"]["mean"],
        "success_after": after["success"]["mean"],
    }


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


@dataclass(frozen=True)
class _Drawn:
    """The first rollout of a group: uint8 [T, H, W, 3] and, turn by turn, what was written, by
    kind."""

    session: Session
    images: np.ndarray
    written: list[dict[str, Intent]]


def strips_of(
    found: Evaluation, folder: Path, name: str, config: CreditConfig, reward: Panel
) -> None:
    """Film-strips of the rollouts that an evaluation kept, written as `draw_strips` does. They are
    of no group, so they have no advantages. reward: which may know what was asked for."""
    _write_strips(folder, name, found.drawn, found.scores, config, 1, reward)


def draw_strips(
    folder: Path,
    name: str,
    policy: Policy,
    reward: GivenReward | Panel | Pool,
    sessions: Sequence[Session],
    sampler: Sampler,
    config: Config,
    processes: Processes,
) -> None:
    """Rolls out whole groups as in training and writes each group's first rollout, with its
    advantages, as images and `<name>.json` for the report. Same seeds before and after, so the
    strips differ by the weights alone. Groups are split over processes; the main one writes. Of no
    sessions (`eval.strips` 0) there are no strips."""
    if not sessions:
        if processes.main:
            _clear(folder, name)
            _write(folder, name, [])
        return
    mine = processes.share(len(sessions))
    r, ordinals = config.rollout, range(len(sessions))[mine]
    done, seeds = [], Seeds(0, "strips")
    pool = pool_of(reward)
    judging = pool.judging(purpose="strips", stage=name)
    judged = Judged(judging, seeds, mine.start * r.siblings)
    for chunk in chunks(sessions[mine], ordinals, r.siblings, r.groups_per_batch):
        rollout_chunk(
            policy, chunk, sampler, seeds, config.policy, rollout=r, decoded=judged.decoded
        )
        judged.done(chunk)
        done.append(chunk)
    turns = max(len(s.turns) for s in sessions)
    processes.lend()
    first = {
        row: _first_of(chunk, place)
        for chunk in done
        for place, row in enumerate(chunk.rows[:: r.siblings].tolist())
    }
    drawn = [first[row] for row in sorted(first)]
    parts = processes.gather([(judged.scores(turns), drawn)])
    if processes.main:
        scores = merge_scores([s for s, _ in parts])
        strips = [strip for _, part in parts for strip in part]
        _write_strips(folder, name, strips, scores, config.credit, r.siblings, pool.panel)


def _first_of(chunk: Chunk, place: int) -> _Drawn:
    rollout, written = place * chunk.siblings, []
    for record in chunk.turns[: len(chunk.sessions[place].turns)]:
        at = int((record.rollout == rollout).nonzero()[0, 0])
        written.append({kind: each.samples[at] for kind, each in record.written.items()})
    return _Drawn(chunk.sessions[place], chunk.images_of(rollout), written)


def _write_strips(
    folder: Path,
    name: str,
    drawn: Sequence[_Drawn],
    scores: Scores,
    config: CreditConfig,
    siblings: int,
    reward: Panel,
) -> None:
    rewards, scored = weighted_reward(scores, config.weights), scores.scored
    apart = scores.of_state(NOT_APPLICABLE)
    group = torch.arange(len(drawn)).repeat_interleave(siblings)
    credit = assign_credit(scores, group, config) if siblings > 1 else None
    _clear(folder, name)
    strips: list[dict[str, Any]] = []
    for place, strip in enumerate(drawn):
        session, row = strip.session, place * siblings
        Image.fromarray(session.image).save(folder / name / f"{place:03d}.png")
        shown, asked = [], reward.expected(session)
        for t, (turn, written) in enumerate(zip(session.turns, strip.written, strict=True)):
            intent, thought = written.get("intent"), written.get("thought")
            file = f"{name}/{place:03d}_t{t + 1}.png"
            Image.fromarray(strip.images[t]).save(folder / file)
            expected = None
            if asked is not None:
                expected = f"{name}/{place:03d}_t{t + 1}_expected.png"
                Image.fromarray(asked[t]).save(folder / expected)
            values = zip(scored[row, t].tolist(), scores.values[row, t].tolist(), strict=True)
            value = float(rewards[row, t])
            silent = [n for n, here in zip(scores.names, apart[row, t], strict=True) if here]
            shown.append(
                {
                    "instruction": turn.instruction,
                    "intent": intent.text if intent else None,
                    "reasoning": intent.reasoning if intent else None,
                    **({"thought": thought.text} if thought else {}),
                    "expected": expected,
                    "image": file,
                    "scores": {
                        n: v if counts else None
                        for n, (counts, v) in zip(scores.names, values, strict=True)
                    },
                    **({"does_not_apply": silent} if silent else {}),
                    **({"why": why} if (why := whys_of(scores, row, t)) else {}),
                    "reward": None if math.isnan(value) else value,
                    "advantage": float(credit.advantage[row, t]) if credit else None,
                    "reason": scores.reasons.get((row, t))
                    or ("no reward with a weight applies" if math.isnan(value) else None),
                    "masked": credit is not None and not bool(credit.mask[row, t]),
                }
            )
        strips.append(
            {
                "id": session.id,
                "mode": session.mode,
                "image": f"{name}/{place:03d}.png",
                "turns": shown,
            }
        )
    _write(folder, name, strips)


def whys_of(scores: Scores, row: int, turn: int) -> dict[str, str]:
    """What the rewards said of a turn's scores, by name, of those that said anything."""
    found = {n: scores.whys.get((row, turn, k)) for k, n in enumerate(scores.names)}
    return {name: why for name, why in found.items() if why}


def _clear(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)


def _write(folder: Path, name: str, strips: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"sessions": strips}, indent=1) + "\n")
