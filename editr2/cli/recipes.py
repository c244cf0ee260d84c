"""`editr2 recipes`"""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from editr2.cli.flags import Arguments, Flags


def command(arguments: Arguments) -> int:
    """configurations that ship: list, print or copy them"""
    flags = Flags(
        "editr2 recipes",
        "List the recipes that ship with the package: `editr2 recipes NAME` prints one, and "
        "`--config NAME` of any command takes it as it is.",
        [
            ("", "what there is: model, method, GPUs, memory, time"),
            ("kontext-grpo-80gb", "one of them, to read"),
            ("kontext-grpo-80gb --to mine/kontext.yaml", "a copy to change, with its pictures"),
        ],
    )
    flags.add("--to", path=True, help="write the recipe NAME into this new file, and its pictures")
    name = None
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    to = flags.parse(arguments)["to"]
    from editr2.errors import ConfigError
    from editr2.recipes import copy_recipe, find_recipe

    if name is None:
        if to is not None:
            raise ConfigError("--to: needs a recipe's name before it (editr2 recipes lists them)")
        print(listed())
        return 0
    recipe = find_recipe(name)
    if to is None:
        print(recipe.text, end="")
        return 0
    file, photos = copy_recipe(recipe, Path(to))
    print(f"recipe: {file}\nphotos: {photos}")
    return 0


def listed() -> str:
    """A block each: what it is of and takes, and its header's first sentence."""
    from editr2.recipes import recipes

    width = min(shutil.get_terminal_size().columns, 100)
    rows = [
        (r.name, r.model, r.method, r.devices, f"{r.memory} each", r.time, r.title)
        for r in recipes().values()
    ]
    heads = ("recipe", "model", "method", "GPUs", "memory", "time")
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(w) for cell, w in zip(cells, widths)).rstrip()

    lines = [line(heads)]
    for row in rows:
        lines.append(line(row[:-1]))
        lines += textwrap.wrap(row[-1], width, initial_indent="  ", subsequent_indent="  ")
    lines.append("memory and time are estimates of `editr2 check NAME`; see `editr2 recipes NAME`")
    return "\n".join(lines)
