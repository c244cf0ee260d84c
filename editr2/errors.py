"""Errors that a user can act on. The message is one line, `file:line: what (accepted: …)`; the
command line prints it as `error: …` and exits with status 2. Everything else that escapes is a
defect of ours and keeps its traceback."""

from __future__ import annotations


def plain(text: str) -> str:
    """A text of somebody else's in one line that a terminal only prints."""
    text = " ".join(text.split())
    return text if text.isprintable() else repr(text)[1:-1]


def one_line(error: BaseException, *, kind: bool = False, limit: int = 400) -> str:
    """Another library's words for a message of ours, with the error's kind where they are fewer
    than three, or if `kind`."""
    words, name = plain(str(error)), type(error).__name__
    said = words if len(words.split()) > 2 and not kind else f"{name}: {words}" if words else name
    return said if len(said) <= limit else f"{said[:limit]}..."


def shown(name: object) -> str:
    """A path or a name of a user's for a message: on one line, and no page of it."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:80]}... ({len(text)} characters)"


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 turn`, `2 turns`. many: where it is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


class UserError(Exception):
    """Something that the user gave is wrong, and the message says what and what is accepted."""


class DataError(UserError):
    """A sessions file or an image cannot be used."""


class ConfigError(UserError):
    """A configuration file or an option is wrong."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or resumed from."""


class NonFiniteError(UserError):
    """A loss, gradient or latent became NaN or infinite."""


class ExportError(UserError):
    """What was exported is not, when loaded again, the policy that was trained."""


class IntegrationError(UserError):
    """Another project's code is not there, or not one of the versions that a drop-in knows."""
