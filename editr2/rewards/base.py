"""What a reward returns: a number, or no number and why. A failed judge is never replaced by an invented number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from editr2.errors import DataError, UserError
from editr2.sessions import Session


@dataclass(frozen=True)
class Score:
    """value: in [0, 1], or None when it could not be judged; reason: then why."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("Score: a missing value needs a reason")
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"Score: {self.value} is not finite; return Score(None, reason) instead")


class Reward(Protocol):
    """Judges a whole session at once: `reward(session, images)` with images uint8 [T, H, W, 3], the output of every
    turn, returns one `Score` per turn and name in `names`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]: ...


@dataclass(frozen=True)
class Scores:
    """Scores of a batch. values: float32 [N, T, K], 0 where missing. present: bool [N, T], False where any of a turn's
    scores is missing or the session has no such turn. expected: bool [N, T], the turns that exist. reasons: why a
    present-but-for-failure turn is missing, by (rollout, turn)."""

    names: tuple[str, ...]
    values: Tensor
    present: Tensor
    expected: Tensor
    reasons: dict[tuple[int, int], str]

    @property
    def failed(self) -> int:
        return int((self.expected & ~self.present).sum())


def score_batch(reward: Reward, judged: Sequence[tuple[Session, np.ndarray]], turns: int) -> Scores:
    """Scores every (session, images) pair; `turns` is the width T of the result."""
    shape = (len(judged), turns, len(reward.names))
    values, present = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.bool)
    expected, reasons = torch.zeros(shape[:2], dtype=torch.bool), {}
    for i, (session, images) in enumerate(judged):
        for t, scores in enumerate(reward(session, images)):
            expected[i, t] = True
            missing = [f"{name}: {scores[name].reason}" for name in reward.names if scores[name].value is None]
            if missing:
                reasons[i, t] = "; ".join(missing)
                continue
            present[i, t] = True
            values[i, t] = torch.tensor([float(scores[name].value or 0.0) for name in reward.names])
    return Scores(reward.names, values, present, expected, reasons)


class RewardFailure(UserError):
    """Too many scores failed in one iteration: the circuit breaker stopped the run."""


def check_failures(scores: Scores, limit: float) -> None:
    """Stops the run when more than `limit` (a fraction) of the turns could not be scored."""
    total = int(scores.expected.sum())
    if total and scores.failed / total > limit:
        (rollout, turn), reason = next(iter(scores.reasons.items()))
        raise RewardFailure(
            f"reward: {scores.failed} of {total} turns could not be scored (limit {limit:.0%}); "
            f"first: rollout {rollout}, turn {turn + 1}: {reason}"
        )


def weight_vector(names: Sequence[str], weights: dict[str, float]) -> Tensor:
    """Weights in the order of `names`, float32 [K]; an unknown or missing name is an error."""
    if set(weights) != set(names):
        raise DataError(f"credit.weights: {sorted(weights)} (accepted: exactly {sorted(names)})")
    return torch.tensor([weights[n] for n in names])
