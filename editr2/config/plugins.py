"""Code of a user's own by its name, `package.module:name`, and the open tables of such names.

An open table (MODELS, REWARDS) maps a short name to `package.module:name`, so an entry is a line
and imports nothing; a setting that takes a name of the table takes `package.module:name` as well.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from editr2.config.fields import is_reference
from editr2.errors import ConfigError, plain

_NOTHING: Mapping[str, str] = MappingProxyType({})


def resolve(
    key: str, given: str, table: Mapping[str, str] = _NOTHING, *, what: str = "name"
) -> Any:
    """What a setting names: an entry of an open table, or something of a module by
    `package.module:name`. A module is looked for in the working folder, too, after everything that
    is installed.

    Args:
        key: of the setting, for errors.
        given: its value.
        table: short names and what each stands for.
        what: the last part of a reference, for errors: `name`, `Class`.

    Raises `ConfigError`, one line that begins with `key: given`, for a value of another form, a
    module that cannot be imported (whatever it raises) and a name that it does not have.
    """
    title = f"{key}: {given!r}"
    reference = table.get(given, given)
    if not is_reference(reference):
        accepted = f"package.module:{what}"
        raise ConfigError(
            f"{title} (accepted: {', '.join([*table, accepted]) if table else accepted})"
        )
    module, _, name = reference.partition(":")
    try:
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())  # the console script's path lacks it
        with process_kept():
            found = importlib.import_module(module)
        thing = getattr(found, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"{title}: importing {module} raised {told(error)}") from error
    if thing is None:
        near = difflib.get_close_matches(name, vars(found), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{title}: module {module} has no {name!r}{hint}")
    return thing


@contextmanager
def process_kept() -> Iterator[None]:
    """Puts back what a user's code sets for the whole process or thread and training would follow:
    the working folder, torch's default dtype and device, the current GPU, and whether gradients are
    recorded."""
    import torch  # `--help` asks nobody's code

    folder, dtype, device = _working_folder(), torch.get_default_dtype(), torch.get_default_device()
    recorded, cuda = (
        torch.is_grad_enabled(),
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
    )
    try:
        yield
    finally:
        if folder is not None and _working_folder() != folder:
            os.chdir(folder)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(recorded)
        if cuda is not None:
            torch.cuda.set_device(cuda)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody removed it
        return None


def told(error: BaseException, ours: Collection[str] = ()) -> str:
    """An exception in one line: type, message, and where in the user's own file. ours: files whose
    frames are not the user's."""
    try:
        text = plain(str(error))
    except Exception:  # its __str__ is a user's code, too
        text = "(a message that cannot be read)"
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, *ours) and "importlib" not in frame.filename
    ]
    # The deepest frame of the file that we called, not of the library that it called.
    own = [frame for frame in theirs if frame.filename == theirs[0].filename]
    at = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{at}"
