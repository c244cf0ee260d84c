"""Who can tell principles and right verdicts by rule: the tables behind `judge.exact` and
`gold.exact`, which take `package.module:name` of a user's own beside these names."""

from __future__ import annotations

from collections.abc import Sequence

from editr2.errors import DataError
from editr2.rewards.traces import Principle
from editr2.sessions import Session, Turn
from editr2.verifier import world
from editr2.verifier.files import Edit


def world_principles(edit: Edit) -> Sequence[Principle]:
    """Of an edit of the shapes world whose words say all that is wanted. Raises `DataError` for one
    that leaves something to the turns before, as `it` does, and for one that is not of the
    world."""
    return world.principles(_request(edit))


def world_gold(edit: Edit) -> tuple[int, ...] | None:
    """By the pixels; None where `world_principles` has none, or the edit's are others."""
    try:
        request = _request(edit)
    except DataError:
        return None
    if world.principles(request) != edit.principles:
        return None
    return world.look(request, edit.image.read(), edit.edited.read()).verdicts


def _request(edit: Edit) -> world.Request:
    session = Session(edit.id, edit.image.read(), (Turn(edit.instruction),))
    (request,) = world.requests(session)
    return request
