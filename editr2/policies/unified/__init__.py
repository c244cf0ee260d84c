"""BAGEL's architecture: one transformer that reads and writes text and edits images."""

from typing import TYPE_CHECKING, Any

if not TYPE_CHECKING:  # to a type checker an old name is an error

    def __getattr__(name: str) -> Any:
        from editr2.moved import moved

        return moved(__name__, name)
