"""YAML to frozen dataclasses and back, with errors that name the file, the line and the key.

Plain YAML only: one document, string keys, no tags beyond the standard scalars, no merge keys. What
a field accepts is `editr2.config.fields`' matter.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from editr2.config.fields import Wrong, arguments, convert, plain
from editr2.errors import ConfigError

__all__ = ["check_keys", "dump_yaml", "load_yaml", "place_of", "to_dataclass"]

T = TypeVar("T")
_MAX_NODES = (
    100_000  # aliases can expand a few lines to billions of nodes; a configuration has hundreds
)


def load_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Read one YAML mapping: its values, and the line of every dotted key (`train.lr`,
    `rewards[0].name`).

    An empty file is an empty mapping. Raises ConfigError, `file:line:column: problem`, for a syntax
    error, a repeated key, a key that is not a string, or more than plain YAML.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_at(path, mark)}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: character {error.character!r} is not allowed in YAML"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    # An empty document, or one of comments, or a bare null.
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == "tag:yaml.org,2002:null"):
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{_at(path, root.start_mark)}: {_node_kind(root)} (accepted: keys and values)"
        )
    lines: dict[str, int] = {}
    values: dict[str, Any] = _Builder(path, lines).build(root, "")
    return values, lines


def check_keys(
    values: Mapping[str, Any],
    lines: Mapping[str, int],
    schema: type[Any],
    path: str | os.PathLike[str],
) -> None:
    """Check values against a dataclass and the dataclasses nested in it.

    Raises ConfigError, `file:line: …`, for the first unknown key (with the nearest known one),
    missing key without a default, or value of the wrong type, naming the key, what was given and
    what is accepted.
    """
    try:
        arguments(values, schema, "")
    except Wrong as wrong:
        raise ConfigError(f"{place_of(path, lines, wrong.key)}: {wrong.problem}") from None


def to_dataclass(values: Mapping[str, Any], schema: type[T]) -> T:
    """Make the dataclass and those nested in it; absent keys take their defaults. ConfigError as
    `check_keys`."""
    try:
        made: T = convert(values, schema, "", build=True)
    except Wrong as wrong:
        raise ConfigError(wrong.problem) from None
    return made


def is_misread(text: str) -> bool:
    """Whether YAML 1.1 makes a number of it that nobody means: `010` is 8 and `1:30` is 90."""
    return _MISREAD.fullmatch(text) is not None


_MISREAD = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def dump_yaml(config: Any) -> str:
    """A dataclass as YAML, in the order of its fields; `load_yaml` and `to_dataclass` give back an
    equal one. Or a mapping of plain values."""
    made = dataclasses.is_dataclass(config) and not isinstance(config, type)
    if not made and not isinstance(config, Mapping):
        raise TypeError(f"config: a {type(config).__name__} (accepted: an instance of a dataclass)")
    text: str = yaml.dump(
        plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Escapes what PyYAML would write raw and read back as a plain line break, such as U+0085."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"'
        )


_Dumper.add_representer(str, _Dumper.text)


class _Builder:
    """Nodes to values, with the line of every key."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.path, self.lines = path, lines
        self.scalars = yaml.constructor.SafeConstructor()
        self.open: set[int] = set()
        self.count = 0

    def build(self, node: yaml.Node, key: str) -> Any:
        self.count += 1
        if id(node) in self.open:
            raise self.error(node, "an alias to what contains it")
        if self.count > _MAX_NODES:
            raise self.error(node, f"more than {_MAX_NODES} values after aliases are expanded")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        standard = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{standard}":
            raise self.error(node, f"tag {_short(node.tag)} (accepted: no tag)")
        value = (
            self.mapping(node, key)
            if isinstance(node, yaml.MappingNode)
            else self.sequence(node, key)
        )
        self.open.discard(id(node))
        return value

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise self.error(key_node, "merge keys (<<) are not accepted; write the keys out")
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                given = (
                    key_node.value
                    if isinstance(key_node, yaml.ScalarNode)
                    else _node_kind(key_node)
                )
                raise self.error(
                    key_node, f"key {given} is not a string (accepted: a name, quoted if need be)"
                )
            line = key_node.start_mark.line + 1
            dotted = f"{prefix}.{key}" if prefix else key
            if key in result:
                raise self.error(key_node, f"key {dotted!r} was already given on line {first[key]}")
            first[key] = line
            self.lines[dotted] = line
            result[key] = self.build(value_node, dotted)
        return result

    def sequence(self, node: yaml.SequenceNode, prefix: str) -> list[Any]:
        result = []
        for index, item in enumerate(node.value):
            key = f"{prefix}[{index}]"
            self.lines[key] = item.start_mark.line + 1
            result.append(self.build(item, key))
        return result

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.scalars.construct_object(node)
            if isinstance(value, int | float) and is_misread(node.value):
                meant = f"accepted: {value}, or quoted if it is a text"
                raise self.error(node, f"{node.value} is {value} in YAML ({meant})")
            return value
        except (yaml.MarkedYAMLError, ValueError, KeyError, IndexError, OverflowError) as error:
            # such as `!!int x`, a date like 2020-13-45, or a tag that is not standard
            raise self.error(node, f"{node.value!r} is not a valid {_short(node.tag)}") from error

    def error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{_at(self.path, node.start_mark)}: {problem}")


def _at(path: Path, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "")


def _node_kind(node: yaml.Node) -> str:
    return {"scalar": "a single value", "sequence": "a list", "mapping": "a mapping"}[node.id]


def place_of(path: str | os.PathLike[str], lines: Mapping[str, int], key: str) -> str:
    """`file:line` of a key, or of the nearest thing around it (a missing key has no line of its
    own)."""
    while key and key not in lines:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return f"{path}:{lines[key]}" if key else str(path)
