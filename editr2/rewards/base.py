"""What a reward says of a turn: a number, that it does not apply, or no number and why. A failed
judge is never replaced by an invented number.

Here are the states and the batch of them; `adapt` makes one form of whatever a user gives as a
reward, and `answers` makes `Score`s of whatever came back.
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from editr2.config import UNSET_WEIGHTS
from editr2.errors import ConfigError, UserError, plain
from editr2.sessions import Session

ROUNDING = 1e-6
"""So far outside of [0, 1] a number is taken for rounding (a cosine of 1 + 1e-7) and put on the
bound."""


def as_number(value: Any) -> float:
    """A number in [0, 1]: of Python or NumPy, or a tensor or an array without dimensions. True is
    1, False is 0.

    Raises TypeError or ValueError that says what was given and what is accepted.
    """
    scalar = isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0
    plain = (
        value.item() if scalar else value
    )  # not float(): it warns where a tensor carries a gradient
    if not issubclass(type(plain), numbers.Real):
        raise TypeError(f"{described(value)} (accepted: a number in [0, 1])")
    if (
        not -ROUNDING <= plain <= 1 + ROUNDING
    ):  # not so for NaN; compared first: an int may be too large for a float
        why = (
            "is not finite"
            if plain != plain or plain in (float("inf"), float("-inf"))
            else "is outside of [0, 1]"
        )
        raise ValueError(f"{described(value)} {why}; return Score(None, reason) instead")
    return min(max(float(plain), 0.0), 1.0)


def described(value: object) -> str:
    """What came back, in a few words: numbers and None as they are, else the type, with its size
    where it has one."""
    if value is None or isinstance(value, numbers.Number | np.generic | str):
        text = repr(value) if isinstance(value, str) else str(value)
        return text if len(text) <= 40 else text[:37] + "..."
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    article = "an" if type(value).__name__[0] in "aeiouAEIOU" else "a"
    return f"{article} {type(value).__name__}" + (
        f" of {len(value)}" if isinstance(value, list | tuple) else ""
    )


@dataclass(frozen=True)
class Score:
    """What a reward says of one turn. One of three:

    `Score(0.7)`: a number in [0, 1] (see `as_number`), with a reason if you like; `Score(None,
    "why")`: it could not be judged (masked, counted as failed, and too many stop the run);
    `Score.not_applicable()`: there is nothing to judge, such as consistency with nothing left to
    compare (the turn's other scores have its weight; counted apart, and never a failure).
    votes: what the value is the mean of, where a judge was asked several times; shown, not used.
    Raises TypeError or ValueError for anything else.
    """

    value: float | None
    reason: str | None = None
    applies: bool = True
    votes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.reason is not None and not isinstance(self.reason, str):
            raise TypeError(f"Score: reason: {described(self.reason)} (accepted: a string)")
        if self.value is not None and not self.applies:
            raise ValueError(
                f"Score: {described(self.value)} of a reward that does not apply (accepted: None)"
            )
        if self.value is None and self.applies and not (self.reason or "").strip():
            raise ValueError("Score: a missing value needs a reason")
        if not isinstance(self.votes, tuple | list):
            raise TypeError(f"Score: votes: {described(self.votes)} (accepted: a tuple)")
        if self.votes or self.value is not None:
            try:
                object.__setattr__(self, "votes", tuple(as_number(vote) for vote in self.votes))
                if self.value is not None:
                    object.__setattr__(self, "value", as_number(self.value))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Score: {error}") from None

    @staticmethod
    def not_applicable(reason: str | None = None) -> Score:
        """There is nothing to judge here."""
        return Score(None, reason, applies=False)

    @property
    def failed(self) -> bool:
        return self.value is None and self.applies


class Item(NamedTuple):
    """One rollout to judge.

    images: uint8 [n, H, W, 3], the outputs of its first n turns: of all, or up to the last turn
    that is asked about. turns: which turns those are, None for all of the session. rollout: its
    place among the rollouts that are judged together. seed: of this rollout alone, in [0, 2**63),
    the same in a run that is resumed and on any number of processes; a judge that samples draws
    from it.
    """

    session: Session
    images: np.ndarray
    turns: tuple[int, ...] | None = None
    rollout: int = 0
    seed: int = 0

    @property
    def asked(self) -> tuple[int, ...]:
        """The turns that are asked about, counted from 0."""
        return tuple(range(len(self.session.turns))) if self.turns is None else self.turns

    def before(self, turn: int) -> np.ndarray:
        """What a turn was to edit: the output of the turn before it, or the source."""
        return self.images[turn - 1] if turn else self.session.image


@dataclass(frozen=True)
class Calls:
    """How a reward is called.

    concurrency: calls at once. timeout: seconds a call. retries: further tries of a call that
    failed. None: the reward's own default.
    """

    concurrency: int | None = None
    timeout: float | None = None
    retries: int | None = None


class Held(NamedTuple):
    """A model of a reward in this process, and the bytes that it takes where it is.

    device: `cpu`, `cuda:1` or the like, or `trainer` (`rewards.models`). weights: of all that it
    loads. working: beside these at most, while it answers; None where nobody knows. run: in
    place of that, what runs it once on the meta device, for whoever counts what it allocates. turn:
    seconds of a turn, in batches that are full, on a device of a given speed (`check.meter.Speed`),
    where that can be told without the weights.
    """

    name: str
    device: str
    weights: int
    working: int | None = None
    run: Callable[[], Any] | None = None
    turn: Callable[[Any], float] | None = None


class Reward(Protocol):
    """Judges many sessions at once: `judge(items)` returns, for every item, a dict of a `Score` for
    each of `names` for every turn that is asked about.

    What a reward may declare besides, as attributes (docs/rewards.md):

    - `by_turn = True`: it may be asked about single turns as they are decoded;
    - `concurrency = n`: it may be called from so many threads at once, while the next images are
      made; without, it is called on the main thread when the rollout is done;
    - `batch = n`: a call asks about at most n items;
    - `exact = True`: equal images always score the same, and asking again costs nothing worth
      keeping, so its answers are not recorded;
    - `estimate(items)`: of rollouts so far, a bool each, whether what follows is not worth making;
      asked with `rollout.prune: estimate` alone, on the main thread;
    - `fills = n`: what is asked together is filled up to so many turns, so that one takes as long
      as n, for estimates;
    - `calls_a_turn = x`: requests to a server that a turn takes, for estimates;
    - `version`: changes with its numbers; `facts`: a dict of what a run's record says of it;
    - `wants = ("name", ...)`: what it looks for in the `meta` of turns; sessions that a run draws
      from the world carry of it what the world can tell (`principles`);
    - `lacks(session)`: what a session does not have, so that a score does not apply to it, or None;
      looks at no image. Said once before the run;
    - `take()` and `lend()`: called before a batch of rollouts is judged and after the last one is
      scored, for models on the trainer's GPU;
    - `quick_look()`: called once before an editor's weights are read or anything is written;
      raises `UserError` for what is not there, as far as that is seen in seconds;
    - `models_held(items)`: a `Held` for each model in this process that it would look at these
      with, which are like those of the run, for estimates; loads nothing;
    - `probe()`: called once before anything is judged; raises `UserError` for what cannot work and
      returns lines on what works less well.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def judge(self, items: Sequence[Item]) -> Sequence[Sequence[dict[str, Score]]]: ...


class SessionReward(Protocol):
    """Judges one session a call: `reward(session, images)` with images uint8 [T, H, W, 3], the
    output of every turn, returns a dict of a `Score` for each of `names` for every turn."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, session: Session, images: np.ndarray) -> Sequence[dict[str, Score]]: ...


GivenReward = Reward | SessionReward | Callable[..., Any]
"""What a user may give: docs/rewards.md lists the forms, `editr2.rewards.adapt` tells them
apart."""

ANSWERED, NOT_APPLICABLE, FAILED, PRUNED = 0, 1, 2, 3


@dataclass(frozen=True)
class Scores:
    """Scores of a batch. values: float32 [N, T, K], 0 where missing. present: bool [N, T], turns of
    which no score failed and to which at least one reward applies. expected: bool [N, T],
    the turns that the sessions have, whatever was returned. reasons: why turns failed, by (rollout,
    turn), naming rewards, session and turn. states: int8
    [N, T, K], ANSWERED (also where there is no turn), NOT_APPLICABLE, FAILED or, of turns that were
    left out of the rollout (`rollout.prune`), PRUNED; none: whatever is
    missing failed. whys: what rewards said of scores that did not fail, by (rollout, turn, k)."""

    names: tuple[str, ...]
    values: Tensor
    present: Tensor
    expected: Tensor
    reasons: dict[tuple[int, int], str]
    states: Tensor | None = None
    whys: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def of_state(self, state: int) -> Tensor:
        """bool [N, T, K]: the scores of turns that exist which are in `state`."""
        if self.states is None:
            missing = torch.full(self.values.shape, FAILED, dtype=torch.int8)
            states = torch.where(self.present[..., None], torch.zeros_like(missing), missing)
        else:
            states = self.states
        return (states == state) & self.expected[..., None]

    @property
    def scored(self) -> Tensor:
        """bool [N, T, K]: the scores that count, those that apply of turns of which none failed."""
        return self.of_state(ANSWERED) & self.present[..., None]

    @property
    def unfailed(self) -> Tensor:
        """bool [N, T]: the turns of the sessions that were rolled out and of which no score
        failed."""
        return self.expected & ~(self.of_state(FAILED) | self.of_state(PRUNED)).any(-1)

    @property
    def pruned(self) -> Tensor:
        """bool [N, T]: the turns that were left out of the rollout."""
        return self.of_state(PRUNED).any(-1)

    @property
    def failed(self) -> int:
        """Turns of which at least one score failed."""
        return int(self.of_state(FAILED).any(-1).sum())

    @property
    def not_applicable(self) -> int:
        """Turns without a failed score to which one of the rewards, or all, do not apply."""
        return int((self.of_state(NOT_APPLICABLE).any(-1) & ~self.of_state(FAILED).any(-1)).sum())

    @property
    def first_failure(self) -> str | None:
        return next(iter(self.reasons.values()), None)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of consecutive rollouts as one."""
    reasons, whys, offset = {}, {}, 0
    for part in parts:
        reasons.update({(i + offset, t): reason for (i, t), reason in part.reasons.items()})
        whys.update({(i + offset, t, k): why for (i, t, k), why in part.whys.items()})
        offset += len(part.values)
    states = [p.states for p in parts if p.states is not None]
    return Scores(
        parts[0].names,
        torch.cat([p.values for p in parts]),
        torch.cat([p.present for p in parts]),
        torch.cat([p.expected for p in parts]),
        reasons,
        torch.cat(states) if len(states) == len(parts) else None,
        whys,
    )


def lay_out(
    names: tuple[str, ...],
    sessions: Sequence[Session],
    said: Sequence[Sequence[dict[str, Score]]],
    turns: int,
) -> Scores:
    """Well-formed answers, a row a turn of every session, as a batch; `turns` is its width T. Turns
    of a session behind its rows were left out of its rollout."""
    shape = (len(sessions), turns, len(names))
    values, states = torch.zeros(shape), torch.zeros(shape, dtype=torch.int8)
    expected, reasons = torch.zeros(shape[:2], dtype=torch.bool), {}
    whys = {}
    for i, (session, rows) in enumerate(zip(sessions, said, strict=True)):
        for t, row in enumerate(rows):
            expected[i, t] = True
            for k, score in enumerate(row[name] for name in names):
                if score.value is not None:
                    values[i, t, k] = score.value
                else:
                    states[i, t, k] = FAILED if score.failed else NOT_APPLICABLE
                if score.reason and not score.failed:
                    whys[i, t, k] = shortened(score.reason)
            if (states[i, t] == FAILED).any():
                reasons[i, t] = _failure(row, session.id, t)
        left_out = slice(len(rows), len(session.turns))
        expected[i, left_out], states[i, left_out] = True, PRUNED
    present = expected & (states != FAILED).all(-1) & (states == ANSWERED).any(-1)
    return Scores(names, values * present[..., None], present, expected, reasons, states, whys)


LONGEST_WHY = 1000
"""Characters of a judge's own words that are kept of a score."""


def shortened(reason: str) -> str:
    """In one line of printable characters, at most `LONGEST_WHY` of them."""
    text = plain(reason)
    return text if len(text) <= LONGEST_WHY else text[: LONGEST_WHY - 3] + "..."


def _failure(row: dict[str, Score], session: str, turn: int) -> str:
    """`reward IF, session a1, turn 2: why` in one line; rewards that failed for one reason are
    named together."""
    parts = []
    failed = {name: plain(str(score.reason)) for name, score in row.items() if score.failed}
    for reason in Counter(failed.values()):
        named = [name for name, why in failed.items() if why == reason]
        shown = reason if len(reason) <= 300 else reason[:297] + "..."
        who = f"reward{'s' if len(named) > 1 else ''} {', '.join(named)}"
        parts.append(f"{who}, session {session}, turn {turn + 1}: {shown}")
    return "; ".join(parts)


class RewardFailure(UserError):
    """Too many scores failed in one iteration: the circuit breaker stopped the run."""


FEWEST = 8
"""A reward that applies to fewer turns of an iteration is held against so many: two failures of two
say little."""


def check_failures(scores: Scores, limit: float) -> None:
    """Stops the run when one of the rewards failed on more than `limit` (a fraction) of the turns
    it applies to."""
    failures, skipped = scores.of_state(FAILED), scores.of_state(NOT_APPLICABLE)
    turns = int((scores.expected & ~scores.pruned).sum())
    for k, name in enumerate(scores.names):
        failed = int(failures[..., k].sum())
        asked = max(turns - int(skipped[..., k].sum()), min(turns, FEWEST))
        if asked and failed / asked > limit:
            raise RewardFailure(
                f"reward {name}: {failed} of {asked} turns could not be scored "
                f"(train.max_failed_scores: {limit:g}); first: {_first_reason(scores, k)}"
            )


def unscored(scores: Scores) -> str | None:
    """Of the first reward that failed on every turn, how it did on the first; None where each has
    something to say."""
    failed = (scores.of_state(FAILED) | ~scores.expected[..., None]).flatten(0, 1).all(0)
    return next(
        (
            _first_reason(scores, k)
            for k in range(len(scores.names))
            if failed[k] and scores.reasons
        ),
        None,
    )


def _first_reason(scores: Scores, k: int) -> str:
    failures = scores.of_state(FAILED)[..., k]
    return next(reason for at, reason in scores.reasons.items() if failures[at])


def weights_of(names: Sequence[str], weights: dict[str, float]) -> dict[str, float]:
    """The weight of every reward, in the order of `names`. Weights that nobody set
    (`UNSET_WEIGHTS`) are 1 for a single reward, and one of 0 may name a reward that there is not;
    any other unknown or missing name is a `ConfigError`."""
    if len(names) == 1 and any(weights == unset for unset in UNSET_WEIGHTS):
        return {names[0]: 1.0}
    if {name for name, weight in weights.items() if weight or name in names} != set(names):
        example = ", ".join(f'"{name}": {1 / len(names):.2g}' for name in names)
        given = f"{sorted(weights)}{', the defaults' if weights in UNSET_WEIGHTS else ''}"
        raise ConfigError(
            f"credit.weights: {given} (accepted: a weight for exactly {sorted(names)}, such as "
            f"{{{example}}})"
        )
    if not any(weights[name] for name in names):
        raise ConfigError(
            "credit.weights: all are 0, so nothing trains (accepted: at least one that is not)"
        )
    return {name: weights[name] for name in names}


def weight_vector(names: Sequence[str], weights: dict[str, float]) -> Tensor:
    """`weights_of` as float32 [K]."""
    return torch.tensor(list(weights_of(names, weights).values()))
