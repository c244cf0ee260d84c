"""Flags to values: what the command line accepts, what it says when it does not, and its help.

Every value is a text here and goes through `editr2.config.fields`'
converter, as those of YAML files do. A flag is its whole name, never the beginning of one: an
abbreviation that means something today means something else tomorrow.

`--help` of a command is a page: examples, its own flags, the settings that most people change, and
the other sections of settings by name; `--help SECTION`, `--help train.lr` and `--help all` show
the rest. What it says of a setting is the line in its dataclass' docstring.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from editr2.config.fields import (
    Accepts,
    Bounds,
    Slot,
    Table,
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
Command = Callable[[Arguments], int]
Commands = dict[str, Command]

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
    def choices(self) -> list[str]:
        """The values there are, where it is a choice; a table's are looked up."""
        if self.slot.accepts.among is not None:
            return list(self.slot.accepts.among())
        kinds = _kinds(self.slot.hint)
        if kinds == [bool]:
            return ["true", "false"]
        return [str(value) for kind in kinds if _is_choice(kind) for value in get_args(kind)]

    @property
    def section(self) -> str:
        """Of a setting, `train` of train.lr; empty where it stands in none."""
        return self.key.partition(".")[0] if self.group and "." in self.key else ""

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


class Described(Exception):
    """Raised in place of doing anything by a command that was asked for its flags (`described`):
    they, or the commands that it is made of, by name."""

    def __init__(self, found: Flags | Commands) -> None:
        super().__init__()
        self.found = found


DESCRIBE = "--\0"
"""The word that asks; no shell can write it."""


def described(command: Command) -> Flags | Commands:
    """A command's flags, or the commands that it is made of, without running it."""
    try:
        command([DESCRIBE])
    except Described as answer:
        return answer.found
    raise AssertionError(f"{command} reads no flags")


ALL = "all"
SHORT = 16
"""Settings of a command up to which its help shows all of them."""


class Flags:
    """The flags of one command.

    examples: command lines behind `prog`, and what they are for; shown first. common: dotted names
    of the settings that most people change.

    >>> flags = Flags("editr2 world make", "Write sessions.")
    >>> flags.add("--count", type=int, default=24, bounds=Bounds(at_least=1), help="sessions")
    >>> flags.parse(["--count", "3"])
    {'count': 3}
    """

    def __init__(
        self,
        prog: str,
        description: str,
        examples: Sequence[tuple[str, str]] = (),
        common: Sequence[str] = (),
    ) -> None:
        self.prog = prog
        self.description = f"{description[:1].upper()}{description[1:].removesuffix('.')}."
        self.examples, self.common = examples, common
        self.options: dict[str, Option] = {}
        self.positional: list[Option] = []
        self.short: dict[str, str] = {}
        """Flags that are short for others."""

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
        docstrings; a flag of the command's own stands in place of a field of its name."""
        told = documented(schema)  # type: ignore[arg-type]  # mypy holds classes to be unhashable
        for key, slot in leaves(schema):
            group, text, default = told[key]
            if f"--{key}" not in self.options:
                self.options[f"--{key}"] = Option(f"--{key}", slot, text, default, group=group)

    def given(self, words: Sequence[str]) -> list[tuple[Option, str]]:
        """Every argument given and its text, in their order; an entry of a mapping
        (`--credit.weights.IF`) is an option of its own. Raises `ConfigError` for a word that is no
        argument of this command, for a flag without its value, and where a required argument is
        missing."""
        if list(words) == [DESCRIBE]:
            raise Described(self)
        found: list[tuple[Option, str]] = []
        places, queue = iter(self.positional), list(reversed(words))
        while queue:
            word = queue.pop()
            if word in ("-h", "--help") or word.startswith("--help="):
                topic = word.partition("=")[2]
                if word in ("-h", "--help") and queue and not queue[-1].startswith("-"):
                    topic = queue.pop()
                print(self.help(topic), end="", flush=True)
                raise SystemExit(0)
            if not word.startswith("--"):
                place = next(places, None)
                if place is None:
                    raise ConfigError(self._surplus(word))
                found.append((place, word))
                continue
            name, equals, text = word.partition("=")
            name = self.short.get(name, name)
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
        settings = any(option.group for option in self.options.values())
        hint = (
            f"did you mean {_listed(near, 'or')}?"
            if near
            else f"{self.prog} --help{f' {ALL}' if settings else ''} lists what there is"
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

    def help(self, topic: str = "") -> str:
        """The page of `--help`, or what there is to a topic: all, a section of settings or one of
        them. Raises `ConfigError` for one that is none."""
        settings = [option for option in self.options.values() if option.group]
        first = self._shown_first(settings)
        if not settings or not topic:
            usage, examples = (
                self.usage(),
                [f"{self.prog} {line}".strip() for line, _ in self.examples],
            )
            parts = [usage, _wrapped(self.description)]
            if examples:
                lines = [
                    f"{_command_line(line)}\n{_wrapped(why, 6)}"
                    for line, (_, why) in zip(examples, self.examples, strict=True)
                ]
                parts.append("\n".join(["examples:", *lines]))
            parts.append(
                _rows("options:", [*map(_row, self.own()), self._help_row(settings, first)])
            )
            if first:
                title = "settings:" if len(first) == len(settings) else "settings, the most used:"
                brief = len(first) < len(settings)
                parts.append(_rows(title, [self._row(option, brief) for option in first]))
            if len(first) < len(settings):
                parts.append(self._sections(settings))
            return "\n\n".join(parts) + "\n"
        if topic == ALL:
            parts = [self.usage(), _rows("options:", map(_row, self.own()))]
            return "\n\n".join([*parts, *self._groups(settings)]) + "\n"
        key = topic.lstrip("-")
        about = [o for o in settings if o.key == key or o.key.startswith(f"{key}.")]
        if not about:
            sections = dict.fromkeys(option.section for option in settings if option.section)
            near = [] if "." in key else difflib.get_close_matches(key, [ALL, *sections], 1, 0.7)
            near = near or [found.lstrip("-") for found in suggestions(key, self.options)]
            hint = f"; did you mean {_listed(near, 'or')}?" if near else ""
            raise ConfigError(
                f"--help: {topic!r} (accepted: {ALL}, {', '.join(sections)}, or a setting{hint})"
            )
        return "\n\n".join(self._groups(about)) + "\n"

    def _shown_first(self, settings: Sequence[Option]) -> list[Option]:
        if len(settings) <= SHORT:
            return list(settings)
        known = {option.key: option for option in settings}
        alone = [option for option in settings if not option.section]
        first = [known[key] for key in self.common if key in known]
        return [*first, *(option for option in alone if option not in first)]

    def _groups(self, options: Iterable[Option]) -> list[str]:
        """Settings under the headings of their dataclasses."""
        groups: dict[str, list[Option]] = {}
        for option in options:
            groups.setdefault(option.group, []).append(option)
        return [
            _rows(f"{group}:", [self._row(option) for option in found])
            for group, found in groups.items()
        ]

    def _row(self, option: Option, brief: bool = False) -> tuple[str, str]:
        """A setting's, with the flag that is short for it."""
        short = next((flag for flag, name in self.short.items() if name == option.name), None)
        if short is None:
            return _row(option, brief)
        if brief:
            return _row(dataclasses.replace(option, name=short), brief)
        return _row(dataclasses.replace(option, help=f"{option.help} ({short} for short)"))

    def _help_row(self, settings: Sequence[Option], first: Sequence[Option]) -> tuple[str, str]:
        if len(first) == len(settings):
            return "-h, --help", "this page"
        return "-h, --help [NAME]", f"this page; NAME: a section, a setting or {ALL}"

    def _sections(self, settings: Sequence[Option]) -> str:
        heads: dict[str, list[Option]] = {}
        for option in settings:
            if option.section:
                heads.setdefault(option.section, []).append(option)
        rows = [
            (name, f"{re.split('[.:] ', options[0].group)[0]} ({len(options)})")
            for name, options in heads.items()
        ]
        shown = f"{self.prog} --help {next(iter(heads))} shows a section"
        title = f"all {len(settings)} settings ({shown}, --help {ALL} everything):"
        return _rows(title, rows)


def _command_line(line: str) -> str:
    """As it may be pasted into a shell."""
    words = [f"--{part}" if i else part for i, part in enumerate(line.split(" --"))]
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= _columns():
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {word}")
    return "\n".join(lines)


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        _columns(),
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


def _columns() -> int:
    return max(40, min(100, shutil.get_terminal_size().columns - 2))


LEFT = 24
"""Columns of what is explained; a longer name has a line of its own."""


def _rows(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A heading and two columns. A name such as ddim-sde stays whole."""
    rows = list(rows)
    lines, left = [_wrapped(title)], LEFT if rows and rows[0][0].startswith("-") else _left(rows)
    width = _columns() - left
    for name, text in rows:
        told = textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
        beside = told.pop(0) if told and len(name) + 4 <= left else ""
        lines.append(f"  {name:<{left - 2}}{beside}".rstrip())
        lines += [" " * left + line for line in told]
    return "\n".join(lines)


def _left(rows: Sequence[tuple[str, str]]) -> int:
    return min(LEFT, max((len(name) for name, _ in rows), default=0) + 4)


def _row(option: Option, brief: bool = False) -> tuple[str, str]:
    """What it is called, and its line with what it accepts, where its value's name does not say
    that, and its default. brief: no more than two lines of it."""
    name = option.name if option.name.startswith("-") else option.name.upper()
    if option.switch:
        return name, option.help
    if name.startswith("-"):
        name += f" {_metavar(option)}"
    if option.slot.required or option.many:
        limits = "" if option.slot.accepts.among is None else _limits(option)
        return name, f"{option.help} ({limits})" if limits else option.help
    said, default = option.help.removesuffix("."), _written(option.default)
    if option.default is None and (brief or not option.group):
        default = ""
    if not brief:
        notes = "; ".join(filter(None, [_limits(option), default and f"default: {default}"]))
        return name, f"{said} ({notes})" if notes else said
    note = f" (default: {default})" if default and option.default not in ((), {}) else ""
    among = option.slot.accepts.among
    if among is not None and not (isinstance(among, Table) and not among.loaded):
        return name, option.accepted + note
    width, room = _columns() - LEFT, len(said)
    short = said
    while len(textwrap.wrap(short + note, width, break_on_hyphens=False)) > 2:
        room -= 8
        short = textwrap.shorten(said, room, placeholder=" …")
    return name, short + note


VAST = 1_000_000
"""From here on an upper end is where the program stops being of use, and no news to a reader."""


def _limits(option: Option) -> str:
    """What a setting accepts that neither its line nor the name of its value says."""
    hint, accepts = option.slot.hint, option.slot.accepts
    if accepts.among is not None:
        late = isinstance(accepts.among, Table) and not accepts.among.loaded
        told = late or all(name in option.help for name in accepts.among())
        return "" if told else option.accepted
    kinds = _kinds(hint)
    if accepts.bounds is None:
        known = kinds in ([str], [bool], [float]) or all(map(_is_choice, kinds))
        return "" if known or accepts.path else option.accepted
    if (accepts.bounds.at_most or 0) >= VAST and not accepts.bounds.why:
        accepts = dataclasses.replace(
            accepts, bounds=dataclasses.replace(accepts.bounds, at_most=None)
        )
    return accepted(hint, accepts)


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _kinds(hint: Any) -> list[Any]:
    """The types of a hint but for None."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


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
    kinds = _kinds(hint)
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
    kind = _kinds(hint)[0]
    if option.slot.accepts.path:
        return "PATH"
    if not option.name.startswith("-"):
        return option.name
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (list, tuple):
        item, *rest = get_args(kind)
        items = [item, item] if rest in ([], [...]) else [item, *rest]
        return ",".join(names.get(item, "TEXT") for item in items)
    if get_origin(kind) is dict:
        return "{NAME: X}" if get_args(kind)[1] is float else "{NAME: VALUE}"
    return names.get(kind, "TEXT")


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


__all__ = ["Bounds", "Flags", "Option", "described", "from_text", "suggestions", "values_of"]


def dispatch(
    prog: str,
    commands: Commands,
    arguments: Arguments,
    groups: Mapping[str, Sequence[str]] | None = None,
    others: Sequence[str] = (),
) -> int:
    """Runs the command that the first word names. groups: heading -> commands, of the list that is
    shown for `help`; others stand below. others: words in a command's place that the caller
    answers itself, for who misspells them."""
    if list(arguments) == [DESCRIBE]:
        raise Described(commands)
    first, *rest = arguments or [""]
    if first == "help" and rest:  # `editr2 help train policy`, as `editr2 train --help policy`
        name, *more = rest
        first, rest = name, ["help" if _is_group(commands.get(name)) else "--help", *more]
    if first in ("", "-h", "--help", "help"):
        print(_overview(prog, commands, groups or {}))
        return 0 if arguments else 2
    if first not in commands:
        near = suggestions(first, [*commands, *others, "--help"])
        hint = f"; did you mean {_listed(near, 'or')}?" if near else ""
        raise ConfigError(f"command: {first!r} (accepted: {', '.join(commands)}{hint})")
    return commands[first](rest)


def _is_group(command: Command | None) -> bool:
    return command is not None and isinstance(described(command), dict)


def _overview(prog: str, commands: Commands, groups: Mapping[str, Sequence[str]]) -> str:
    listed = {title: [n for n in names if n in commands] for title, names in groups.items()}
    grouped = {name for names in listed.values() for name in names}
    listed["commands" if not grouped else "others"] = [n for n in commands if n not in grouped]
    left = max(map(len, commands)) + 4
    parts = [
        _rows(f"{title}:", [(n.ljust(left - 4), commands[n].__doc__ or "") for n in names])
        for title, names in listed.items()
        if names
    ]
    return "\n\n".join(
        [f"usage: {prog} COMMAND [options]", *parts, f"{prog} COMMAND --help tells more."]
    )
