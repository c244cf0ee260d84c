"""Relative paths in a file of settings: of what is read, they are relative to that file, so it
means the same from every working folder. What is written (`out`) stands where the command runs, as
do paths that flags name.

A run's own `config.yaml` is read as it was written: its paths are of the folder that the run was
started in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from editr2.config.fields import Slot, is_schema, slots
from editr2.config.yaml import place_of
from editr2.errors import ConfigError

WRITTEN = "out"
"""The name of every setting that is a folder to write."""
MAY_BE_AN_ID = ("weights", "lora_weights")
"""Settings whose text is a hub id where no such folder is there."""
OF_A_RUN = ("config.yaml", "metrics.jsonl")

Options = Callable[[Any, Mapping[str, Any]], type[Any] | None]
"""Of a dataclass and its values in the file, the dataclass that its `options` are of, or None."""


def from_file(
    values: Mapping[str, Any],
    schema: type[Any],
    file: str | os.PathLike[str],
    lines: Mapping[str, int],
    options: Options = lambda schema, values: None,
) -> dict[str, Any]:
    """The values of a file, checked against its schema, with its relative paths as they are called
    from the working folder.

    Args:
        values, schema, lines: as `editr2.config.yaml` has them.
        file: their file.
        options: of mappings whose fields another dataclass has.

    Raises `ConfigError` where a path is not there beside the file and is there in the working
    folder, since one of them was meant.
    """
    folder = Path(file).parent
    config, metrics = OF_A_RUN
    of_a_run = Path(file).name == config and (folder / metrics).is_file()
    if of_a_run or folder == Path():
        return dict(values)

    def one(name: str, key: str, slot: Slot, value: Any) -> Any:
        if slot.accepts.path and isinstance(value, str) and name != WRITTEN:
            return beside(name, key, value)
        kind = slot.hint
        if is_schema(kind) and isinstance(value, Mapping):
            return every(value, kind, f"{key}.")
        listed = [kind for kind in get_args(slot.hint) if is_schema(kind)]
        if listed and isinstance(value, list):
            return [every(v, listed[0], f"{key}[{n}].") for n, v in enumerate(value)]
        return value

    def every(values: Mapping[str, Any], schema: type[Any], prefix: str = "") -> dict[str, Any]:
        known = slots(schema)
        made = {
            name: one(name, prefix + name, known[name], value) if name in known else value
            for name, value in values.items()
        }
        given = made.get("options")
        if isinstance(given, Mapping) and (kind := options(schema, values)) is not None:
            made["options"] = every(given, kind, f"{prefix}options.")
        return made

    def beside(name: str, key: str, value: str) -> str:
        if not value or value.startswith(("~", "hf:")) or os.path.isabs(value):
            return value
        there = os.path.join(folder, value)
        if os.path.exists(there):
            return there
        if os.path.exists(value):
            other = os.path.relpath(value, folder)
            raise ConfigError(
                f"{place_of(file, lines, key)}: {key}: {value!r} is {there}, which is not there "
                f"(accepted: a path from the file's own folder; that of the working folder is "
                f"{other})"
            )
        return value if name in MAY_BE_AN_ID else there

    return every(values, schema)
