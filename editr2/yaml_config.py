"""YAML to frozen dataclasses and back, with errors that name the file, the line and the key.

Plain YAML only: one document, string keys, no tags beyond the standard scalars, no merge keys. The accepted types of a
field are bool, int, float, str, Path, Any, Literal, Optional and unions, list, tuple, dict[str, …] and nested
dataclasses. An int is accepted for a float, and so is `1e-4`, which YAML 1.1 reads as a string.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from editr2.errors import ConfigError

__all__ = ["check_keys", "dump_yaml", "load_yaml", "to_dataclass"]

T = TypeVar("T")
_MAX_NODES = 100_000  # aliases can expand a few lines to billions of nodes; a configuration has hundreds
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Wrong(Exception):
    """A value that does not fit its field: dotted key, problem."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem


def load_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Read one YAML mapping: its values, and the line of every dotted key (`train.lr`, `rewards[0].name`).

    An empty file is an empty mapping. Raises ConfigError, `file:line:column: problem`, for a syntax error, a repeated
    key, a key that is not a string, or more than plain YAML.
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
        raise ConfigError(f"{path}:{line}: character {error.character!r} is not allowed in YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    # An empty document, or one of comments, or a bare null.
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == "tag:yaml.org,2002:null"):
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{_at(path, root.start_mark)}: {_node_kind(root)} (accepted: keys and values)")
    lines: dict[str, int] = {}
    values: dict[str, Any] = _Builder(path, lines).build(root, "")
    return values, lines


def check_keys(
    values: Mapping[str, Any], lines: Mapping[str, int], schema: type[Any], path: str | os.PathLike[str]
) -> None:
    """Check values against a dataclass and the dataclasses nested in it.

    Raises ConfigError, `file:line: …`, for the first unknown key (with the nearest known one), missing key without a
    default, or value of the wrong type, naming the key, what was given and what is accepted.
    """
    try:
        _dataclass_arguments(values, schema, "")
    except _Wrong as wrong:
        raise ConfigError(f"{_place(path, lines, wrong.key)}: {wrong.problem}") from None


def to_dataclass(values: Mapping[str, Any], schema: type[T]) -> T:
    """Make the dataclass and those nested in it; absent keys take their defaults. ConfigError as `check_keys`."""
    try:
        return _convert(values, schema, "", build=True)
    except _Wrong as wrong:
        raise ConfigError(wrong.problem) from None


def dump_yaml(config: Any) -> str:
    """A dataclass as YAML, in the order of its fields; `load_yaml` and `to_dataclass` give back an equal one."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: a {type(config).__name__} (accepted: an instance of a dataclass)")
    text: str = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


class _Dumper(yaml.SafeDumper):
    """Escapes what PyYAML would write raw and read back as a plain line break, such as U+0085."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


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
        value = self.mapping(node, key) if isinstance(node, yaml.MappingNode) else self.sequence(node, key)
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
                given = key_node.value if isinstance(key_node, yaml.ScalarNode) else _node_kind(key_node)
                raise self.error(key_node, f"key {given} is not a string (accepted: a name, quoted if need be)")
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
            return self.scalars.construct_object(node)
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


def _place(path: str | os.PathLike[str], lines: Mapping[str, int], key: str) -> str:
    """`file:line` of a key, or of the nearest thing around it (a missing key has no line of its own)."""
    while key and key not in lines:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return f"{path}:{lines[key]}" if key else str(path)


def _fields(schema: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, required) of what the constructor takes."""
    hints = get_type_hints(schema)
    missing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(schema)
        if f.init
    }


def _dataclass_arguments(value: Any, schema: type[Any], key: str, *, build: bool = False) -> dict[str, Any]:
    """The constructor's arguments, converted. `build=False` only checks: nested dataclasses stay dicts, so that a
    complaint of their `__post_init__` cannot precede that of a later key."""
    if not isinstance(value, Mapping):
        raise _Wrong(key, f"{key}: given {_shown(value)} (accepted: keys and values)")
    fields = _fields(schema)
    result = {}
    for name, item in value.items():
        dotted = f"{key}.{name}" if key else name
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            prefix = f"{key}." if key else ""
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"accepted: {', '.join(fields)}"
            raise _Wrong(dotted, f"unknown key {dotted!r} ({hint})")
        result[name] = _convert(item, fields[name][0], dotted, build=build)
    for name, (_, required) in fields.items():
        if required and name not in value:
            dotted = f"{key}.{name}" if key else name
            raise _Wrong(dotted, f"missing key {dotted!r} (it has no default)")
    return result


def _convert(value: Any, hint: Any, key: str, *, build: bool) -> Any:
    """The value as the type wants it; _Wrong if it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        converted = _dataclass_arguments(value, hint, key, build=build)
        return hint(**converted) if build else converted
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, key, build=build)
    if origin is Literal:
        for option in arguments:
            if value == option and type(value) is type(option):
                return value
    elif origin in (list, tuple) or hint in (list, tuple):
        if isinstance(value, (list, tuple)):
            return _convert_sequence(value, hint, key, build=build)
    elif origin in (dict, Mapping) or hint in (dict, Mapping):
        if isinstance(value, Mapping):
            item = arguments[1] if arguments else Any
            return {name: _convert(v, item, f"{key}.{name}", build=build) for name, v in value.items()}
    elif hint is float:
        if isinstance(value, float):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1023:
            return float(value)
        if isinstance(value, str) and _FLOAT.fullmatch(value) and math.isfinite(float(value)):
            return float(value)
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif hint in (bool, int, str, type(None), None):
        if type(value) is (type(None) if hint is None else hint):
            return value
    else:
        raise TypeError(f"{key}: fields of type {hint} are not supported")
    raise _Wrong(key, f"{key}: given {_shown(value)} (accepted: {_type_name(hint)})")


def _convert_union(value: Any, hint: Any, key: str, *, build: bool) -> Any:
    options = get_args(hint)
    nested = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    if isinstance(value, Mapping) and len(nested) == 1:
        return _convert(value, nested[0], key, build=build)  # so that its own complaint is heard
    exact = [option for option in options if option is type(value)]
    for option in [*exact, *options]:
        try:
            return _convert(value, option, key, build=build)
        except _Wrong:
            continue
    raise _Wrong(key, f"{key}: given {_shown(value)} (accepted: {_type_name(hint)})")


def _convert_sequence(value: list[Any] | tuple[Any, ...], hint: Any, key: str, *, build: bool) -> Any:
    arguments = get_args(hint)
    make = tuple if (get_origin(hint) or hint) is tuple else list
    if make is list or not arguments or arguments[-1] is Ellipsis:
        expected = [arguments[0] if arguments else Any] * len(value)
    else:
        expected = list(arguments)
        if len(expected) != len(value):
            raise _Wrong(key, f"{key}: given a list of {len(value)} (accepted: a list of {len(expected)})")
    items = zip(value, expected, strict=True)
    return make(_convert(item, kind, f"{key}[{n}]", build=build) for n, (item, kind) in enumerate(items))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (a bool; quote it if a string is meant)"
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_union_names(arguments))
    if origin is Literal:
        return ", ".join(repr(option) for option in arguments)
    if origin in (list, tuple) or hint in (list, tuple):
        inner = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list of {', '.join(inner)}" if inner else "a list"
    if origin in (dict, Mapping) or hint in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "keys and values"
    if hint in (None, type(None)):
        return "null"
    return "a path" if hint is Path else str(getattr(hint, "__name__", hint))


def _union_names(options: tuple[Any, ...]) -> Iterator[str]:
    for option in sorted(options, key=lambda option: option is type(None)):
        yield _type_name(option)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
