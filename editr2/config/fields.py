"""What a field of a settings dataclass accepts: its type, and what its metadata says.

YAML files, flags and values that Python code sets go through one converter, so all three meet the
same conversion and the same errors, `key: given (accepted: …)`. Constraints stand on the field:
`Literal` for a closed choice, `setting` for the rest (bounds of numbers, a table that can grow, a
path, a check of one's own).

The types: bool, int, float, str, Path, Any, Literal, Optional and unions, list, tuple, dict[str, …]
and nested dataclasses. An int is a float too, and so is `1e-4`, which YAML 1.1 reads as a text.
Where nothing is a value, the text `none` is it, as errors and help spell it; and `on`, `off`, `yes`
and `no`, which YAML 1.1 reads as true and false, are what they were written as where a choice has
one of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from editr2.errors import ConfigError

__all__ = [
    "ACCEPTS",
    "ANY",
    "Accepts",
    "Bounds",
    "Wrong",
    "arguments",
    "built",
    "convert",
    "defaults",
    "field_problems",
    "is_mapping",
    "is_reference",
    "leaves",
    "mended",
    "normalised",
    "plain",
    "respelt",
    "respelt_leaves",
    "setting",
    "table",
]

T = TypeVar("T")
_SIZE = re.compile(r"[0-9]{1,6}x[0-9]{1,6}")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_BOOL_WORDS = {True: ("on", "yes", "true"), False: ("off", "no", "false")}
_NONE_WORDS = ("none", "null")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that a field accepts, or each of several numbers in it. NaN and infinity are
    never among them.

    Args:
        at_least, above: the lower end, which is itself accepted or not.
        at_most, below: the same of the upper end.
        why: said behind the range.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    why: str = ""

    def hold(self, value: float) -> bool:
        """Whether the number is accepted. Asked so that NaN, which compares false with everything,
        is not."""
        return (
            (isinstance(value, int) or math.isfinite(value))  # an int may be too large to be asked
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_least == self.at_most:
            said = _number(self.at_least)
        elif self.at_least is not None and self.at_most is not None:
            said = f"{_number(self.at_least)} to {_number(self.at_most)}"
        else:
            ends = {
                "at least": self.at_least,
                "above": self.above,
                "at most": self.at_most,
                "below": self.below,
            }
            said = ", ".join(
                f"{word} {_number(end)}" for word, end in ends.items() if end is not None
            )
        return "; ".join(part for part in (said, self.why) if part)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


ANY = Bounds()
"""Any finite number."""


@dataclasses.dataclass(frozen=True)
class Accepts:
    """What a field accepts beyond its type. Stands in the field's metadata under `ACCEPTS`.

    Args:
        bounds: of its numbers.
        among: the names in an open table, asked when a value is checked.
        reference: what else a table's field takes, `package.module:Class` in words; whether it can
            be imported is seen when it is (`editr2.config.plugins`).
        path: a file or folder: `~` is the home folder.
        empty: whether the empty text is accepted.
        check: what is wrong with a value, or None; said behind what is accepted.
        what: names what is accepted, in place of the type's name.
        spellings: other spellings of a value, (spelling, value): what a field was called before it
            accepted more.
    """

    bounds: Bounds | None = None
    among: Callable[[], Iterable[str]] | None = None
    reference: str = ""
    path: bool = False
    empty: bool = False
    check: Callable[[Any], str | None] | None = None
    what: str = ""
    spellings: tuple[tuple[Any, Any], ...] = ()

    def spelt(self, value: Any) -> Any:
        """The value that another spelling stands for; any other as it is. Of true and false their
        words are spellings, too: a choice's flag hands them on as texts."""
        for other, meant in self.spellings:
            words = _BOOL_WORDS[other] if isinstance(other, bool) else ()
            if isinstance(value, str) and value.lower() in words:
                return meant
            if type(value) is type(other) and value == other:  # 1 is not true
                return meant
        return value


@dataclasses.dataclass(frozen=True)
class Table:
    """An open table that stands above the settings, `package.module:NAME`: known by its address, as
    a user's own class is, and looked up when a value is checked. `--help` does not load it for its
    names, so the line of such a field has them (tests/test_help.py)."""

    address: str
    keep: Callable[[Any], bool] | None = None

    def __call__(self) -> Mapping[str, Any]:
        module, _, name = self.address.partition(":")
        found: Mapping[str, Any] = getattr(importlib.import_module(module), name)
        keep = self.keep
        return found if keep is None else {k: entry for k, entry in found.items() if keep(entry)}

    @property
    def loaded(self) -> bool:
        return self.address.partition(":")[0] in sys.modules


def table(address: str, keep: Callable[[Any], bool] | None = None) -> Table:
    """keep: which entries a field takes; None: all."""
    return Table(address, keep)


ACCEPTS = "accepts"
_NOTHING = Accepts()


def setting(
    default: Any = dataclasses.MISSING, bounds: Bounds | None = None, **accepts: Any
) -> Any:
    """A dataclass field with its default and what it accepts."""
    return dataclasses.field(default=default, metadata={ACCEPTS: Accepts(bounds, **accepts)})


def respelt(config: Any) -> None:
    """Brings the fields of a frozen dataclass from other spellings to the values that they stand
    for; for its `__post_init__`, so that Python code which still says `True` means what it said."""
    for name, slot in slots(type(config)).items():
        value = getattr(config, name)
        if (meant := slot.accepts.spelt(value)) is not value:
            object.__setattr__(config, name, meant)


def respelt_leaves(schema: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the dotted keys of a dataclass (a run's saved settings), respelt; other keys stay
    as they are."""
    known = dict(leaves(schema))
    return {
        key: known[key].accepts.spelt(value) if key in known else value
        for key, value in values.items()
    }


class Wrong(Exception):
    """A value that does not fit its field: dotted key, problem."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem


# ------------------------------------------------------------------------------------------ schemas


@dataclasses.dataclass(frozen=True)
class Slot:
    """A field as the constructor takes it."""

    hint: Any
    required: bool
    accepts: Accepts


def slots(schema: type[Any]) -> dict[str, Slot]:
    """What the constructor of a dataclass takes, by name."""
    return _slots(schema)  # type: ignore[arg-type]  # mypy holds classes to be unhashable


@functools.cache
def _slots(schema: type[Any]) -> dict[str, Slot]:
    hints = get_type_hints(schema)
    missing = dataclasses.MISSING
    return {
        f.name: Slot(
            hints[f.name],
            f.default is missing and f.default_factory is missing,
            f.metadata.get(ACCEPTS, _NOTHING),
        )
        for f in dataclasses.fields(schema)
        if f.init
    }


def leaves(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Slot]]:
    """The dotted key of every field that is no dataclass itself, of a dataclass and those nested in
    it."""
    for name, slot in slots(schema).items():
        if is_schema(slot.hint):
            yield from leaves(slot.hint, f"{prefix}{name}.")
        else:
            yield prefix + name, slot


def is_reference(text: str) -> bool:
    """Whether a text has the form of `package.module:name`."""
    module, _, name = text.partition(":")
    return bool(module and name) and not module.startswith(".")


def is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def is_mapping(hint: Any) -> bool:
    """Whether a field takes values by names that are not the schema's."""
    return get_origin(hint) in (dict, Mapping) or hint in (dict, Mapping)


def defaults(schema: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass, `plain`, of the fields that have one."""
    missing, found = dataclasses.MISSING, {}
    for f in dataclasses.fields(schema):
        if f.init and f.default is not missing:
            found[f.name] = plain(f.default)
        elif f.init and f.default_factory is not missing:
            found[f.name] = plain(f.default_factory())
    return found


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: dataclasses (what their constructors take) are mappings,
    tuples lists, paths texts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def accepted(hint: Any, accepts: Accepts = _NOTHING) -> str:
    """What a field accepts, in words."""
    if accepts.among is not None:
        said = ", ".join([*accepts.among(), *filter(None, [accepts.reference])])
        return f"{said} or none" if type(None) in get_args(hint) else said
    said = accepts.what or _type_name(hint)
    if accepts.bounds is not None and (limits := str(accepts.bounds)):
        optional = " or none"
        if said.endswith(optional):
            return f"{said.removesuffix(optional)}, {limits}{optional}"
        return f"{said}, {limits}"
    return said


def unknown_key(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`unknown key …` with the nearest known one."""
    dotted = f"{prefix}.{name}" if prefix else name
    near = difflib.get_close_matches(str(name), known, n=1)
    start = f"{prefix}." if prefix else ""
    accepted = ", ".join(known) or "none"
    hint = f"did you mean {start + near[0]!r}?" if near else f"accepted: {accepted}"
    return f"unknown key {dotted!r} ({hint})"


# --------------------------------------------------------------------------------------- conversion


def arguments(
    value: Any, schema: type[Any], key: str, *, build: bool = False, partial: bool = False
) -> dict[str, Any]:
    """The constructor's arguments, converted. `build=False` only checks: nested dataclasses stay
    dicts, so that a complaint of their `__post_init__` cannot precede that of a later key. partial:
    no key has to be there. Raises `Wrong`."""
    if not isinstance(value, Mapping):
        raise Wrong(key, f"{key}: {_shown(value)} (accepted: keys and values)")
    known = slots(schema)
    result = {}
    for name, item in value.items():
        dotted = f"{key}.{name}" if key else name
        if name not in known:
            raise Wrong(dotted, unknown_key(name, list(known), key))
        slot = known[name]
        if partial and is_schema(slot.hint) and not isinstance(item, slot.hint):
            result[name] = arguments(item, slot.hint, dotted, partial=True)
        else:
            result[name] = convert(item, slot.hint, dotted, slot.accepts, build=build or partial)
    for name, slot in known.items():
        if not partial and slot.required and name not in value:
            dotted = f"{key}.{name}" if key else name
            raise Wrong(dotted, f"missing key {dotted!r} (it has no default)")
    return result


def built(values: Any, schema: type[T], key: str) -> T:
    """The dataclass of the given values, the others at their defaults. Raises `Wrong` for the first
    key or value that is none of it, and for one that is missing and has no default."""
    made = schema(**arguments(values, schema, key, build=True))
    for dotted, problem in field_problems(made, f"{key}."):
        raise Wrong(dotted, problem)
    return made


def convert(
    value: Any, hint: Any, key: str, accepts: Accepts = _NOTHING, *, build: bool = False
) -> Any:
    """The value as the type wants it, with `~` of a path expanded. Raises `Wrong` if it does not
    fit the type; what else a field accepts is `out_of_bounds`'s."""
    converted = _convert(accepts.spelt(value), hint, key, accepts, build=build)
    if accepts.path and isinstance(converted, str):
        return os.path.expanduser(converted)
    return converted


def _convert(value: Any, hint: Any, key: str, accepts: Accepts, *, build: bool) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_schema(hint):
        if isinstance(value, hint):
            return value
        converted = arguments(value, hint, key, build=build)
        return hint(**converted) if build else converted
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, key, accepts, build=build)
    if origin is Literal:
        for option in options:
            if value == option and type(value) is type(option):
                return value
        meant = (
            [word for word in _BOOL_WORDS.get(value, ()) if word in options]
            if isinstance(value, bool)
            else []
        )
        if len(meant) == 1:
            return meant[0]
    elif origin in (list, tuple) or hint in (list, tuple):
        if isinstance(value, str) and set(options) == {int} and _SIZE.fullmatch(value):
            value = [int(part) for part in value.split("x")]  # 512x512, as a flag has it
        if isinstance(value, list | tuple):
            return _convert_sequence(value, hint, key, accepts, build=build)
    elif is_mapping(hint):
        if isinstance(value, Mapping):
            kind = options[1] if options else Any
            for name in value:
                if not isinstance(name, str):
                    raise Wrong(key, f"{key}: key {_shown(name)} (accepted: a name)")
            return {
                name: _convert(v, kind, f"{key}.{name}", accepts, build=build)
                for name, v in value.items()
            }
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            if not isinstance(value, numbers.Integral) or abs(int(value)) < 1 << 1023:
                return float(value)
        if isinstance(value, str) and _FLOAT.fullmatch(value) and math.isfinite(float(value)):
            return float(value)
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is str:
        if isinstance(value, str):
            return value
        if accepts.path and isinstance(value, os.PathLike):
            return os.fspath(value)
    elif hint in (bool, type(None), None):
        if type(value) is (type(None) if hint is None else hint):
            return value
    else:
        raise TypeError(f"{key}: fields of type {hint} are not supported")
    raise Wrong(key, f"{key}: {_shown(value)} (accepted: {accepted(hint, accepts)})")


def _convert_union(value: Any, hint: Any, key: str, accepts: Accepts, *, build: bool) -> Any:
    options = get_args(hint)
    nested = [option for option in options if is_schema(option)]
    if isinstance(value, Mapping) and len(nested) == 1:
        return _convert(
            value, nested[0], key, accepts, build=build
        )  # so that its own complaint is heard
    # A text in a union that has other uses for it (dict values, say) stays one.
    only = [option for option in options if option is not type(None)]
    if (
        type(None) in options
        and (len(only) == 1 or not {str, Path, Any} & set(only))
        and isinstance(value, str)
        and value.lower() in _NONE_WORDS
    ):
        return None
    exact = [option for option in options if option is type(value)]
    for option in [*exact, *options]:
        try:
            return _convert(value, option, key, accepts, build=build)
        except Wrong:
            continue
    raise Wrong(key, f"{key}: {_shown(value)} (accepted: {accepted(hint, accepts)})")


def _convert_sequence(
    value: list[Any] | tuple[Any, ...], hint: Any, key: str, accepts: Accepts, *, build: bool
) -> Any:
    kinds = get_args(hint)
    make = tuple if (get_origin(hint) or hint) is tuple else list
    if make is list or not kinds or kinds[-1] is Ellipsis:
        expected = [kinds[0] if kinds else Any] * len(value)
    else:
        expected = list(kinds)
        if len(expected) != len(value):
            raise Wrong(key, f"{key}: a list of {len(value)} (accepted: {accepted(hint, accepts)})")
    items = zip(value, expected, strict=True)
    return make(
        _convert(item, kind, f"{key}[{n}]", accepts, build=build)
        for n, (item, kind) in enumerate(items)
    )


def out_of_bounds(value: Any, slot: Slot, key: str) -> str | None:
    """What is wrong with a converted value beyond its type, or None."""
    accepts = slot.accepts

    def problem(at: str, given: Any, why: str = "") -> str:
        return f"{at}: {_shown(given)} (accepted: {accepted(slot.hint, accepts)}{why})"

    if value is None or isinstance(value, bool):
        return None
    for at, item in _items(value, key):
        if isinstance(item, int | float) and not (accepts.bounds or ANY).hold(item):
            return (
                f"{at}: {_shown(item)} (accepted: "
                f"{accepted(slot.hint if at == key else type(item), accepts)})"
            )
        if isinstance(item, str) and get_origin(slot.hint) is not Literal:
            if not item and not accepts.empty:
                return problem(at, item, "; this is empty")
            if accepts.path and "\0" in item:
                return problem(at, item, "; this has a NUL")
    if accepts.among is not None and value not in tuple(accepts.among()):
        if not (accepts.reference and is_reference(value)):
            return problem(key, value)
    if accepts.check is not None and (wrong := accepts.check(value)):
        return problem(key, value, f"; {wrong}")
    return None


def _items(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{key}.{name}", item
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield f"{key}[{n}]", item
    else:
        yield key, value


def field_problems(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key and one line for every field of a dataclass, and of those nested in it, that
    holds what it does not accept."""
    for name, slot in slots(type(config)).items():
        key, value = prefix + name, getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from field_problems(value, f"{key}.")
            continue
        try:
            value = convert(value, slot.hint, key, slot.accepts, build=True)
        except Wrong as wrong:
            yield key, wrong.problem
            continue
        if problem := out_of_bounds(value, slot, key):
            yield key, problem
        for at, item in _items(value, key):  # of a list of dataclasses
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield from field_problems(item, f"{at}.")


def mended(config: T) -> T:
    """The dataclass, normalised, with every field that holds what it does not accept at its
    default: what further rules can be asked about without meeting the same mistake again."""
    for key, _ in list(field_problems(config)):
        config = _reset(config, key.partition("[")[0].split("."))
    return normalised(config)


def _reset(config: Any, path: list[str]) -> Any:
    name, *rest = path
    value = _reset(getattr(config, name), rest) if rest else getattr(type(config)(), name)
    return dataclasses.replace(config, **{name: value})


def normalised(config: T) -> T:
    """The dataclass with every value as the converter gives it (`"3e-4"` a number, `~` the home
    folder). Raises `ConfigError` for the first that does not fit its field's type."""
    try:
        return _normalised(config, "")
    except Wrong as wrong:
        raise ConfigError(wrong.problem) from None


def _normalised(config: Any, prefix: str) -> Any:
    changes = {}
    for name, slot in slots(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            better = _normalised(value, f"{prefix}{name}.")
            changed = better is not value
        else:
            better = convert(value, slot.hint, prefix + name, slot.accepts, build=True)
            changed = repr(better) != repr(value)  # 1 and 1.0 are equal
        if changed:
            changes[name] = better
    return dataclasses.replace(config, **changes) if changes else config


# -------------------------------------------------------------------------------------------- words


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "keys and values"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = (
        repr(value)
        if isinstance(value, str | int | float)
        else f"{value!r}, a {type(value).__name__}"
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_name(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_union_names(options))
    if origin is Literal:
        return ", ".join(str(option) for option in options)
    if origin in (list, tuple) or hint in (list, tuple):
        inner = [_type_name(option) for option in options if option is not Ellipsis]
        if len(inner) > 1 and len(set(inner)) == 1:
            return f"a list of {len(inner)}, each {inner[0]}"
        return f"a list of {', '.join(inner)}" if inner else "a list"
    if is_mapping(hint) or dataclasses.is_dataclass(hint):
        return "keys and values"
    names = {
        Any: "a value",
        None: "none",
        type(None): "none",
        Path: "a path",
        int: "a whole number",
        float: "a number",
        str: "a text",
    }
    return names.get(hint) or (
        "true or false" if hint is bool else str(getattr(hint, "__name__", hint))
    )


def _union_names(options: tuple[Any, ...]) -> Iterator[str]:
    for option in sorted(options, key=lambda option: option is type(None)):
        yield _type_name(option)
