"""Sessions: an image and the instructions to apply to it, turn by turn."""

from editr2.sessions.files import (
    Survey,
    load_sessions,
    save_sessions,
    survey,
    validate,
)
from editr2.sessions.images import ImageFile
from editr2.sessions.session import Session, Turn

__all__ = [
    "ImageFile",
    "Session",
    "Survey",
    "Turn",
    "load_sessions",
    "save_sessions",
    "survey",
    "validate",
]
