"""Flags to values: what the command line accepts, what it says when it does not, and its help.

Every value is a text here and goes through `editr2.config.fields`'
converter, as those of YAML files do. A flag is its whole name, never the beginning of one: an
abbreviation that means something today means something else tomorrow.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from editr2.config.fields import (
    Accepts,
    Bounds,
    Slot,
    Wrong,
    accepted,
    convert,
    is_schema,
    leaves,
    out_of_bounds,
    slots,
)
from editr2.config.rules import folder_problem
from editr2.config.yaml import is_misread
from editr2.errors import ConfigError

Arguments = Sequence[str]

SOME = Bounds(at_least=1, at_most=1_000_000)
"""How many of something a flag asks for."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag or a positional argument.

    Args:
        name: as it is written, `--train.lr` or `run`.
        slot: what it accepts.
        help: its line.
        default: where it is not given.
        switch: it takes no value.
        many: it may be given again, and its value is a list.
        group: the heading that it stands under in the help.
    """

    name: str
    slot: Slot
    help: str
    default: Any = None
    switch: bool = False
    many: bool = False
    group: str = ""

    @property
    def key(self) -> str:
        """A setting's dotted key as it is written (a reward's name may hold a `-`); else an
        argument's name."""
        name = self.name.lstrip("-")
        return name if self.group else name.replace("-", "_")

    @property
    def alone(self) -> bool:
        """Whether it may stand without a value, as true."""
        return self.slot.hint is bool or self.slot.accepts.spelt(True) is not True

    def read(self, text: str, *, check: bool = True) -> Any:
        """The value of a text. Raises `Wrong` where it is not of the type or, if check, not
        accepted otherwise."""
        label = self.name.lstrip("-") if self.group else self.name
        hint, accepts = self.slot.hint, self.slot.accepts
        value = convert(from_text(text, hint), hint, label, accepts, build=True)
        if check and (problem := out_of_bounds(value, self.slot, label)):
            raise Wrong(label, problem)
        return value

    @property
    def accepted(self) -> str:
        return accepted(self.slot.hint, self.slot.accepts)


class _Help(argparse.HelpFormatter):
    """A name such as ddim-sde stays whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Flags:
    """The flags of one command.

    >>> flags = Flags("editr2 world make", "Write sessions.")
    >>> flags.add("--count", type=int, default=24, bounds=Bounds(at_least=1), help="sessions")
    >>> flags.parse(["--count", "3"])
    {'count': 3}
    """

    def __init__(self, prog: str, description: str) -> None:
        self.prog, self.description = prog, description
        self.options: dict[str, Option] = {}
        self.positional: list[Option] = []

    def add(
        self,
        name: str,
        *,
        type: Any = str,
        default: Any = None,
        required: bool = False,
        action: Literal["store", "store_true", "append"] = "store",
        help: str = "",
        **accepts: Any,
    ) -> None:
        """One more argument, a flag if its name starts with `--`; the words are argparse's, and
        `accepts` are `editr2.config.fields.Accepts`' (bounds, path, …)."""
        switch, many = action == "store_true", action == "append"
        fallback = False if switch else [] if many else default
        positional = not name.startswith("-")
        slot = Slot(bool if switch else type, required or positional, Accepts(**accepts))
        option = Option(name, slot, help, fallback, switch, many)
        if positional:
            self.positional.append(option)
        else:
            self.options[name] = option

    def out(self, help: str = "folder to write") -> None:
        """`--out`, a folder that must be given."""
        self.add(
            "--out", path=True, check=folder_problem, what="a folder", required=True, help=help
        )

    def settings(self, schema: type[Any]) -> None:
        """A flag for every field of a dataclass and of those nested in it, with help from the
        docstrings."""
        told = documented(schema)  # type: ignore[arg-type]  # mypy holds classes to be unhashable
        for key, slot in leaves(schema):
            group, text, default = told[key]
            self.options[f"--{key}"] = Option(f"--{key}", slot, text, default, group=group)

    def given(self, words: Sequence[str]) -> list[tuple[Option, str]]:
        """Every argument given and its text, in their order; an entry of a mapping
        (`--credit.weights.IF`) is an option of its own. Raises `ConfigError` for a word that is no
        argument of this command, for a flag without its value, and where a required argument is
        missing."""
        found: list[tuple[Option, str]] = []
        places, queue = iter(self.positional), list(reversed(words))
        while queue:
            word = queue.pop()
            if word in ("-h", "--help"):
                print(self.help(), end="", flush=True)
                raise SystemExit(0)
            if not word.startswith("--"):
                place = next(places, None)
                if place is None:
                    raise ConfigError(self._surplus(word))
                found.append((place, word))
                continue
            name, equals, text = word.partition("=")
            option = self._find(name)
            if option.switch and equals:
                raise ConfigError(f"{name}: {text!r} (accepted: {name} alone, without a value)")
            if not equals and not option.switch and queue and not queue[-1].startswith("--"):
                text = queue.pop()
            elif not equals and option.alone:
                text = "true"
            elif not equals:
                raise ConfigError(f"{name}: needs a value (accepted: {option.accepted})")
            found.append((option, text))
        names = {option.name for option, _ in found}
        for option in self.own():
            if option.slot.required and option.name not in names:
                raise ConfigError(f"{option.name}: missing ({self.usage()})")
        return found

    def own(self) -> list[Option]:
        """All but the fields of settings."""
        return [option for option in [*self.positional, *self.options.values()] if not option.group]

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The value of every argument, by its key. Raises `ConfigError` as `given` does, and for
        the first value that is not accepted."""
        return values_of([*self.positional, *self.options.values()], self.given(words))

    # --------------------------------------------------------------------------------- what is said

    def _find(self, name: str) -> Option:
        if name in self.options:
            return self.options[name]
        for option in self.options.values():
            if get_origin(option.slot.hint) is dict and name.startswith(f"{option.name}."):
                item = Slot(get_args(option.slot.hint)[1], False, option.slot.accepts)
                return dataclasses.replace(option, name=name, slot=item)
        below = [other for other in self.options if other.startswith(f"{name}.")]
        if below:
            raise ConfigError(f"{name}: a group of settings (accepted: {_listed(below, 'and')})")
        near = suggestions(name, self.options)
        hint = (
            f"did you mean {_listed(near, 'or')}?"
            if near
            else f"{self.prog} --help lists what there is"
        )
        raise ConfigError(f"{name}: unknown flag ({hint})")

    def _surplus(self, word: str) -> str:
        name = f"--{word.lstrip('-').partition('=')[0]}"
        if name in self.options:
            return f"{word!r}: not understood (did you mean --{word.lstrip('-')}?)"
        return f"{word!r}: not understood ({self.usage()})"

    def usage(self) -> str:
        places = [option.name.upper() for option in self.positional]
        needed = [
            f"{o.name} {_metavar(o)}"
            for o in self.own()
            if o.slot.required and o.name.startswith("-")
        ]
        return f"usage: {' '.join([self.prog, *places, *needed])} [options]"

    def help(self) -> str:
        """As argparse prints it."""
        usage = self.usage().removeprefix("usage: ")
        parser = argparse.ArgumentParser(self.prog, usage, self.description, formatter_class=_Help)
        groups: dict[str, Any] = {"": parser}
        for option in [*self.positional, *self.options.values()]:
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            text = option.help
            if not option.switch and not option.slot.required and not option.many:
                text += f" ({option.accepted}; default: {_written(option.default)})"
            kind: dict[str, Any] = (
                {"action": "store_true"} if option.switch else {"metavar": _metavar(option)}
            )
            groups[option.group].add_argument(option.name, help=text.replace("%", "%%"), **kind)
        return parser.format_help()


def values_of(options: Iterable[Option], found: Sequence[tuple[Option, str]]) -> dict[str, Any]:
    """The value of each option, by its key: of the last text given for it, of all of them, or its
    default. Raises `ConfigError` for a value that is not accepted."""
    try:
        read: dict[str, list[Any]] = {}
        for option, text in found:
            read.setdefault(option.key, []).append(option.read(text))
    except Wrong as wrong:
        raise ConfigError(wrong.problem) from None
    return {
        option.key: read.get(option.key, [])
        if option.many
        else [option.default, *read.get(option.key, [])][-1]
        for option in options
    }


def suggestions(name: str, known: Iterable[str]) -> list[str]:
    """The flags that somebody who wrote `name` may have meant, the likeliest first; at most
    three."""
    plain = {flag: flag.lstrip("-").replace("-", "_") for flag in known}
    ends = {flag: text.rpartition(".")[2] for flag, text in plain.items()}
    said = name.lstrip("-").replace("-", "_").lower()
    end = said.rpartition(".")[2]
    close = difflib.get_close_matches(said, list(plain.values()), n=1, cutoff=0.8)
    close_ends = difflib.get_close_matches(end, list(ends.values()), n=1, cutoff=0.7)
    for found in (
        [flag for flag, text in plain.items() if text == said],
        [flag for flag in plain if ends[flag] == end],
        [flag for flag, text in plain.items() if text.startswith(said)],
        [flag for flag, text in plain.items() if text in close],
        [flag for flag in plain if ends[flag].startswith(end)],
        [flag for flag in plain if ends[flag] in close_ends],
    ):
        if found:
            return found[:3]
    return []


def from_text(text: str, hint: Any) -> Any:
    """A flag's text as YAML reads it, or as it is where a text is wanted. What YAML cannot read
    stays a text, for the converter to refuse. `0.9,0.99` and `512x512` are lists where one is
    wanted."""
    kinds = [
        kind
        for kind in (get_args(hint) if type(None) in get_args(hint) else (hint,))
        if kind is not type(None)
    ]
    if all(kind is str or get_origin(kind) is Literal for kind in kinds):
        return text
    value, lists = _scalar(text), [k for k in kinds if get_origin(k) in (list, tuple)]
    if isinstance(value, str) and lists:
        # A size is written with an x, which a name may hold.
        named = all(get_args(kind)[0] is str for kind in lists)
        parts = re.split(r"," if named else r"[,x]", value)
        value = [_scalar(part) for part in parts] if len(parts) > 1 else value
    if not isinstance(value, list) and len(kinds) == 1 and _is_of_any_length(kinds[0]):
        return [value]
    return value


def _is_of_any_length(kind: Any) -> bool:
    """A list of so many texts or numbers as are given: one alone is one, too."""
    item, *rest = get_args(kind) or (None,)
    return get_origin(kind) in (list, tuple) and item in (str, int, float) and rest in ([], [...])


def _scalar(text: str) -> Any:
    try:
        return text if is_misread(text) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text


def _listed(names: Sequence[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _metavar(option: Option) -> str:
    hint, names = option.slot.hint, {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    kinds = [
        kind
        for kind in (get_args(hint) if type(None) in get_args(hint) else (hint,))
        if kind is not type(None)
    ]
    kind = kinds[0]
    if option.slot.accepts.path:
        return "PATH"
    if not option.name.startswith("-"):
        return option.name
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (list, tuple):
        return ",".join(names.get(item, "TEXT") for item in get_args(kind))
    return "{NAME: X}" if get_origin(kind) is dict else names.get(kind, "TEXT")


@functools.cache
def documented(schema: type[Any]) -> dict[str, tuple[str, str, Any]]:
    """The heading, help and default of every field, by its dotted key."""
    return dict(_documented(schema))


def _documented(schema: type[Any], prefix: str = "") -> Iterable[tuple[str, tuple[str, str, Any]]]:
    """Every leaf's dotted key with the first line of its dataclass' docstring, its own line there
    and its default."""
    head, _, rest = inspect.cleandoc(schema.__doc__ or "").partition("Args:")
    group = head.strip().partition("\n")[0].rstrip(".")
    told = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", rest, re.M)
    }
    default, hints = schema(), get_type_hints(schema)
    for name in slots(schema):
        if is_schema(hints[name]):
            yield from _documented(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, (group, told.get(name, ""), getattr(default, name))


__all__ = ["Bounds", "Flags", "Option", "from_text", "suggestions", "values_of"]


def dispatch(
    prog: str, commands: dict[str, Callable[[Arguments], int]], arguments: Arguments
) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"usage: {prog} COMMAND [options]   ({prog} COMMAND --help tells its options)\n")
        for name, command in commands.items():
            print(f"  {name:<10} {command.__doc__}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"command: {arguments[0]!r} (accepted: {', '.join(commands)})")
    return commands[arguments[0]](arguments[1:])
