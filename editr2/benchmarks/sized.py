"""A benchmark's sessions as an editor gets them: images of its sizes, every one decoded once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from editr2.errors import DataError, shown
from editr2.sessions import Session
from editr2.sessions.buckets import Sizes, listed, written
from editr2.sessions.files import Unreadable
from editr2.sessions.session import sum_of_pixels

MEMORY = 1 << 30
"""Bytes of pixels that are kept; images beyond them are decoded again when they are looked at."""


def sized(
    sessions: Iterable[Session],
    size: Sizes | None,
    resize: str,
    unreadable: Unreadable | None = None,
    memory: int = MEMORY,
) -> list[Session]:
    """size, resize, unreadable, memory: as in `load_sessions`. Raises `DataError` for the first
    image or instruction that the editor cannot take, and where two sessions have one id."""
    found: dict[str, Session] = {}
    for session in sessions:
        if session.id in found:
            raise DataError(f"session {shown(repr(session.id))} is there twice (accepted: unique)")
        one = _sized(session, size, resize, memory)
        _check_told(one, unreadable, several=size is not None and len(listed(size)) > 1)
        if not callable(vars(one)["image"]):
            memory -= one.image.nbytes
        found[one.id] = one
    return list(found.values())


def _sized(session: Session, size: Sizes | None, resize: str, memory: int) -> Session:
    stored: Any = vars(session)["image"]
    if not callable(stored):
        here = stored.shape[:2]
        if size is not None and here not in listed(size):
            raise DataError(
                f"session {shown(repr(session.id))}: image: {here[0]}×{here[1]} (height×width) "
                f"(accepted by this editor: {written(size)})"
            )
        return session
    told = replace(stored, size=session.size or size, resize=resize)
    pixels = told()
    if pixels.nbytes <= memory:
        return replace(session, image=pixels)
    # The size that was seen stands: a file that is replaced meanwhile is an error.
    later = replace(told, size=pixels.shape[:2], checksum=sum_of_pixels(pixels))
    return replace(session, image=later)


def _check_told(session: Session, unreadable: Unreadable | None, several: bool) -> None:
    if unreadable is None:
        return
    told = [turn.instruction for turn in session.turns]
    at = (session.image_size,) if several else ()
    for turn, problem in unreadable(told, *at):
        raise DataError(
            f"session {shown(repr(session.id))}: turn {turn + 1}: instruction: {problem}"
        )
