"""The sessions of a run, for its policy."""

from __future__ import annotations

from editr2.config import Config
from editr2.policies.base import Policy, ReadingPolicy
from editr2.sessions.source import SessionSource, open_sessions


def sessions_for(config: Config, policy: Policy) -> SessionSource:
    """`open_sessions` with images of the policy's size, and with its word on which instructions it
    cannot read, where it has one. Raises `DataError` with file and line."""
    return open_sessions(
        config.data,
        config.rollout,
        config.eval,
        seed=config.seed,
        size=policy.image_size,
        unreadable=policy.unreadable if isinstance(policy, ReadingPolicy) else None,
    )
