"""`editr2 completion`: what a shell needs to complete command lines, by shtab, from the same flags
that the commands read."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, Literal, get_args

from editr2.cli.flags import ALL, Arguments, Command, Commands, Flags, Option, described
from editr2.errors import UserError

Shell = Literal["bash", "zsh", "tcsh", "fish"]

SHORT = 60
"""Characters of what zsh and fish say beside a flag."""


def command_of(commands: Commands) -> Command:
    """The command that completes these, itself among them."""

    def command(arguments: Arguments) -> int:
        """write what bash, zsh, tcsh or fish completes by"""
        folder = "~/.local/share/bash-completion/completions"
        flags = Flags(
            "editr2 completion",
            f"{command.__doc__}: commands, flags, choices and files",
            [
                (f"bash > {folder}/editr2", "where bash-completion looks, from the next shell on"),
                ("zsh > ~/.zfunc/_editr2", "a folder of zsh's fpath"),
                ("fish > ~/.config/fish/completions/editr2.fish", "the same for fish"),
                ("tcsh > ~/.editr2.csh", "a file that ~/.tcshrc sources"),
            ],
        )
        flags.add("shell", type=Shell, help=", ".join(get_args(Shell)))
        shell = flags.parse(arguments)["shell"]
        print(script(commands, shell))
        return 0

    return command


def script(commands: Commands, shell: Shell) -> str:
    """Raises `UserError` where shtab is missing, or too old for the shell."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab, which is not installed: pip install shtab") from (
            error
        )
    parser = argparse.ArgumentParser("editr2", add_help=False)
    _help(parser, ["help"])
    parser.add_argument("--version", action="store_true")
    _commands(parser, commands, {"file": shtab.FILE, "folder": shtab.DIRECTORY})
    try:
        return str(shtab.complete(parser, shell))
    except NotImplementedError as error:
        raise UserError(f"shell: {shell}: {error} of this shtab: pip install -U shtab") from error


def _commands(parser: argparse.ArgumentParser, commands: Commands, files: dict[str, Any]) -> None:
    below = parser.add_subparsers()
    for name, command in commands.items():
        found = described(command)
        inner = below.add_parser(name, help=command.__doc__, add_help=False)
        if isinstance(found, dict):
            _help(inner, [])
            _commands(inner, found, files)
            continue
        sections = dict.fromkeys(o.section for o in found.options.values() if o.section)
        _help(inner, [*sections, ALL] if sections else [])
        for option in [*found.positional, *found.options.values()]:
            _add(inner, option.name, option, files)
        for short, name_of in found.short.items():
            _add(inner, short, found.options[name_of], files)


def _help(parser: argparse.ArgumentParser, topics: list[str]) -> None:
    more: dict[str, Any] = {"nargs": "?", "choices": topics} if topics else {"action": "store_true"}
    parser.add_argument("-h", "--help", help="tells more", **more)


def _add(parser: argparse.ArgumentParser, name: str, option: Option, files: dict[str, Any]) -> None:
    told: dict[str, Any] = {"help": textwrap.shorten(option.help, SHORT, placeholder=" …")}
    told["help"] = told["help"].replace("%", "%%")
    if option.switch:
        parser.add_argument(name, action="store_true", **told)
        return
    if choices := option.choices:
        told["choices"] = choices
    if option.alone:
        told["nargs"] = "?"
    argument: Any = parser.add_argument(name, **told)
    if option.slot.accepts.path:
        argument.complete = files["folder" if name in ("--out", "--docs") else "file"]
