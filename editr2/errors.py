"""Errors that a user can act on. The message is one line, `file:line: what (accepted: …)`; the command line prints it
as `error: …` and exits with status 2. Everything else that escapes is a defect of ours and keeps its traceback."""

from __future__ import annotations


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
