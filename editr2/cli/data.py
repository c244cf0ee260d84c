"""`editr2 data`"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.config.rules import folder_problem


def command(arguments: Arguments) -> int:
    """sets of sessions: `import` a public one, `validate` one on disk"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "import": _data_import,
        "validate": _data_validate,
    }
    return dispatch("editr2 data", actions, arguments)


def _data_import(arguments: Arguments) -> int:
    """write a public multi-turn set as sessions.jsonl and images (docs/data.md)"""
    from editr2.sessions.importers import FORMATS, import_sessions

    flags = Flags("editr2 data import", _data_import.__doc__ or "")
    flags.add("format", among=lambda: FORMATS, help="the set's")
    flags.add("source", path=True, help="the set's file or folder, or hf:owner/name:split")
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        required=True,
        help="folder to write",
    )
    flags.add(
        "--images",
        path=True,
        help="folder of the images, when they are not where the release has them",
    )
    flags.add(
        "--mode", type=Literal["cm", "cu"], help="of every session, in place of what the set says"
    )
    flags.add("--limit", type=int, bounds=SOME, help="only the first so many sessions")
    options = flags.parse(arguments)
    format, source, out = (options.pop(name) for name in ("format", "source", "out"))
    print(f"sessions: {import_sessions(format, source, out, **options)}")
    return 0


def _data_validate(arguments: Arguments) -> int:
    """everything that is wrong with a set of sessions, with its line"""
    flags = Flags("editr2 data validate", _data_validate.__doc__ or "")
    flags.add(
        "path", path=True, help="a sessions.jsonl, a folder that holds one, or hf:owner/name:split"
    )
    path = flags.parse(arguments)["path"]
    from editr2.sessions import survey

    found = survey(path)
    print("\n".join(found.problems) if found.problems else found)
    return 2 if found.problems else 0
