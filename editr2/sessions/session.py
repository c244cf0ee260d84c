"""A session: an image and the instructions to apply to it, turn by turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

import numpy as np

from editr2.errors import DataError, shown
from editr2.sessions.buckets import Size, Sizes, is_one
from editr2.sessions.images import Pixels

MODES = ("cm", "cu")

SESSION_KEYS = ("id", "image", "turns", "mode", "size", "references", "meta")

LONGEST_SIDE = 8_192

TURN_KEYS = ("instruction", "intent", "task", "meta")


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    instruction: what the user asks, verbatim; not blank.
    intent: the self-contained form of the instruction, where the ground truth is known.
    task: the kind of edit (such as "add" or "recolour"), where known.
    meta: whatever a reward needs to judge the turn; JSON values only, if it is to be saved.
    """

    instruction: str
    intent: str | None = None
    task: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, problem in turn_problems(vars(self)):
            raise DataError(f"Turn: {name}: {problem}")
        if self.meta is None:
            raise DataError("Turn: meta: None (accepted: a mapping)")


class _PixelsField:
    """`Session.image`: the array that was given, or what the function that was given returns, at
    every access."""

    def __set__(self, session: Session, value: Pixels | Callable[[], Pixels]) -> None:
        vars(session)["image"] = value

    def __get__(self, session: Session | None, owner: type[Session]) -> Pixels:
        if session is None:
            raise AttributeError("image")  # which tells `dataclass` that the field has no default
        value = vars(session)["image"]
        return value() if callable(value) else value


@dataclass(
    frozen=True, eq=False
)  # eq=False: comparing arrays gives arrays; a session is compared by identity
class Session:
    """An image and the turns to apply to it.

    id: unique in its set.
    image: uint8 [H, W, 3], RGB; or a function without arguments that returns it, such as an
        `ImageFile`, which is called whenever the attribute is read.
    turns: at least one.
    mode: "cm" (a standing rule set early holds for later turns), "cu" (later turns refer back by
    pronouns) or None. meta: whatever a reward needs to judge the session; JSON values only, if it
    is to be saved. size: (height, width) that it asks to be edited at, of several that a run has
    (`policy.buckets`); None is the nearest. references: further images of the user's, which every
    turn sees behind its own (an editor that takes several; others refuse them); each as `image`,
    of its height and width where an editor is to read them.
    """

    id: str
    image: _PixelsField = _PixelsField()
    turns: tuple[Turn, ...]  # type: ignore[misc]  # mypy takes the descriptor for a default
    mode: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    size: Size | None = None
    references: tuple[Pixels | Callable[[], Pixels], ...] = ()

    def __post_init__(self) -> None:
        for name, problem in session_problems(vars(self)):
            raise DataError(f"Session {self.id!r}: {name}: {problem}")
        if self.id is None or self.meta is None:
            raise DataError(
                f"Session {self.id!r}: id and meta cannot be None (accepted: a string; a mapping)"
            )
        _check_pixels(vars(self)["image"], f"Session {self.id!r}: image")
        if not isinstance(self.references, tuple):
            raise DataError(
                f"Session {self.id!r}: references: {kind(self.references)} (accepted: a tuple of "
                f"images, each as `image`)"
            )
        for i, image in enumerate(self.references):
            _check_pixels(image, f"Session {self.id!r}: references[{i}]")
        if not (
            isinstance(self.turns, tuple)
            and self.turns
            and all(isinstance(turn, Turn) for turn in self.turns)
        ):
            raise DataError(
                f"Session {self.id!r}: turns: wrong value (accepted: a tuple of one or more Turn)"
            )

    def reference_pixels(self) -> list[Pixels]:
        """Its references, uint8 [H, W, 3] each, decoded where they are functions."""
        return [image() if callable(image) else image for image in self.references]

    @property
    def image_size(self) -> Size:
        """(height, width) of the image, which is not decoded where that is known."""
        image = vars(self)["image"]
        known = getattr(image, "size", None)
        if isinstance(known, tuple) and is_one(known):
            return known
        height, width = self.image.shape[:2]
        return height, width


def _check_pixels(image: object, title: str) -> None:
    """Raises `DataError` for what is neither pixels nor a function."""
    if not isinstance(image, np.ndarray):
        if not callable(image):
            raise DataError(f"{title}: {type(image).__name__} (accepted: a uint8 array [H, W, 3])")
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"{title}: {image.dtype} {list(image.shape)} (accepted: a uint8 array [H, W, 3])"
        )
    elif 0 in image.shape:
        raise DataError(f"{title}: no pixels, shape {list(image.shape)}")


class StoredImage(Protocol):
    """A dataclass of pixels that stay where they are stored: called, it decodes them as
    `decode_image` says."""

    @property
    def size(self) -> Sizes | None: ...

    @property
    def resize(self) -> str: ...

    @property
    def checksum(self) -> str | None: ...

    def __call__(self) -> Pixels: ...


def pixel_sum(session: Session) -> str:
    """A checksum of a session's pixels and their shape; what was decoded once to be checked is not
    decoded again."""
    return _sum_of(vars(session)["image"])


def reference_sums(session: Session) -> list[str]:
    """The same of its references."""
    return [_sum_of(image) for image in session.references]


def _sum_of(image: Any) -> str:
    known: str | None = getattr(image, "checksum", None)
    return known or sum_of_pixels(image() if callable(image) else image)


def sum_of_pixels(pixels: Pixels) -> str:
    content = np.ascontiguousarray(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + content.tobytes()).hexdigest()


def session_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("id") is not None and not is_text(values["id"]):
        yield "id", f"{kind(values['id'])} (accepted: a non-empty string)"
    mode = values.get("mode")
    if mode is not None and mode not in MODES:
        yield "mode", f"{kind(mode)} (accepted: {', '.join(map(repr, MODES))} or absent)"
    if values.get("references") is not None and not isinstance(values["references"], list | tuple):
        yield "references", f"{kind(values['references'])} (accepted: a list of images, or absent)"
    size = values.get("size")
    if size is not None and size_of(values) is None:
        yield "size", f"{_given(size)} (accepted: [height, width] in pixels, or absent)"
    yield from _meta_problems(values)


def turn_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("instruction") is None:
        yield "instruction", "missing (accepted: a non-empty string)"
    elif not is_text(values["instruction"]):
        yield "instruction", f"{kind(values['instruction'])} (accepted: a non-empty string)"
    for name in ("intent", "task"):
        if values.get(name) is not None and not is_text(values[name]):
            yield name, f"{kind(values[name])} (accepted: a non-empty string, or absent)"
    yield from _meta_problems(values)


def _meta_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    meta = values.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        yield "meta", f"{kind(meta)} (accepted: an object, or absent)"


def size_of(values: Mapping[str, Any]) -> Size | None:
    """The size that a session asks for, where it says one and it can be one."""
    size = values.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    height, width = size
    whole = type(height) is type(width) is int
    return (height, width) if whole and 1 <= min(size) <= max(size) <= LONGEST_SIDE else None


def _given(size: object) -> str:
    return shown(list(size)) if isinstance(size, list | tuple) else kind(size)


def is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def kind(value: object) -> str:
    """What was given, short enough for one line."""
    if isinstance(value, str):
        return (
            f"the string {value if len(value) <= 40 else value[:37] + '...'!r}"
            if value.strip()
            else "blank string"
        )
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {shown(value)}"
    return f"a {type(value).__name__}"
