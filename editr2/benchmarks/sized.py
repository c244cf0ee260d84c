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
        one, memory = _sized(session, size, resize, memory)
        _check_told(one, unreadable, several=size is not None and len(listed(size)) > 1)
        found[one.id] = one
    return list(found.values())


def _sized(session: Session, size: Sizes | None, resize: str, memory: int) -> tuple[Session, int]:
    """The session, and the memory that is left."""
    source: Any = vars(session)["image"]
    images: list[Any] = []
    for name, stored in [("image", source), *(("references", r) for r in session.references)]:
        if images and size is not None:
            size = images[0].size if callable(images[0]) else images[0].shape[:2]
        if not callable(stored):
            here = stored.shape[:2]
            if size is not None and here not in listed(size):
                raise DataError(
                    f"session {shown(repr(session.id))}: {name}: {here[0]}×{here[1]} "
                    f"(height×width) (accepted by this editor: {written(size)})"
                )
            images.append(stored)
            memory -= stored.nbytes
            continue
        asked = size if images else session.size or size
        told = replace(stored, size=asked, resize=resize)
        pixels = told()
        if pixels.nbytes <= memory:
            images.append(pixels)
            memory -= pixels.nbytes
            continue
        # The size that was seen stands: a file that is replaced meanwhile is an error.
        images.append(replace(told, size=pixels.shape[:2], checksum=sum_of_pixels(pixels)))
    return replace(session, image=images[0], references=tuple(images[1:])), memory


def _check_told(session: Session, unreadable: Unreadable | None, several: bool) -> None:
    if unreadable is None:
        return
    told = [turn.instruction for turn in session.turns]
    at = (session.image_size,) if several else ()
    more = {"references": len(session.references)} if session.references else {}
    for turn, problem in unreadable(told, *at, **more):
        what = "references" if turn is None else f"turn {turn + 1}: instruction"
        raise DataError(f"session {shown(repr(session.id))}: {what}: {problem}")
