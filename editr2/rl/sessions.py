"""The sessions of a run, for its policy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from editr2.config import Config
from editr2.errors import ConfigError
from editr2.policies.base import (
    Policy,
    ReadingPolicy,
    SizedPolicy,
    at_size,
    references_problem,
)
from editr2.sessions.buckets import Size
from editr2.sessions.source import SessionSource, open_sessions


def sessions_for(config: Config, policy: Policy, *, wants: Collection[str] = ()) -> SessionSource:
    """`open_sessions` with images of the policy's sizes, and with its word on which instructions it
    cannot read, where it has one. wants: of those who judge (`Panel.wants`). Raises `DataError`
    with file and line, and `ConfigError` where there are to be sizes that the policy does not
    have."""
    return open_sessions(
        config.data,
        config.rollout,
        config.eval,
        seed=config.seed,
        wants=wants,
        **demands(config, policy),
    )


def demands(config: Config, policy: Policy) -> dict[str, Any]:
    """What a policy wants of sessions, as `load_sessions` takes it: `size` and `unreadable`."""
    sizes = tuple(policy.sizes) if isinstance(policy, SizedPolicy) else (policy.image_size,)
    if config.policy.buckets and not isinstance(policy, SizedPolicy):
        raise ConfigError(
            f"policy.buckets: {config.policy.buckets} (accepted for a {type(policy).__name__}, "
            f"which edits one size: []; others have the methods of SizedPolicy)"
        )

    def unreadable(
        told: Sequence[str], size: Size | None = None, references: int = 0
    ) -> Iterable[tuple[int | None, str]]:
        if problem := references_problem(policy, config.policy.model, references):
            yield None, problem
        elif isinstance(policy, ReadingPolicy):
            beside = {"references": references} if references else {}
            yield from at_size(policy, size or sizes[0]).unreadable(told, **beside)

    return {"size": sizes if len(sizes) > 1 else sizes[0], "unreadable": unreadable}
