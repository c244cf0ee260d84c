"""What `make docs` (mkdocs.yml) has beside the Markdown files of docs/: the pages of reference/,
which are written from the code, and links that leave docs/.

    settings        from the dataclasses, as every command takes them
    commands        from the help of every command
    api             the public names of `editr2` and of `editr2_kernels`, for mkdocstrings

Nothing of it stands in git, and nothing is said twice: a new command, setting or public name is
there by itself.
"""

from __future__ import annotations

import html
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from editr2.cli.flags import Flags, Option, described  # noqa: E402
from editr2.cli.main import COMMANDS, GROUPS  # noqa: E402

log = logging.getLogger("mkdocs.plugins.docs_pages")  # its warnings fail a strict build

COLUMNS = "92"
"""Of the help as pages show it."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


# ----------------------------------------------------------------------------------------- commands


def commands() -> Iterator[tuple[str, Flags]]:
    """Every command by its words, in the order of `editr2 help`, with its flags."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Flags]]:
        found = described(command)
        if isinstance(found, Flags):
            yield name, found
            return
        for word, inner in found.items():
            yield from below(f"{name} {word}", inner)

    for names in GROUPS.values():
        for name in names:
            yield from below(f"editr2 {name}", COMMANDS[name])


def commands_page() -> str:
    parts = [
        "# Commands",
        "`editr2 COMMAND --help` as it is. The settings that a command takes beside its own "
        "options are in [Settings](settings.md), `--help all` prints them; how to ask for less, "
        "exit codes and completion: [The command line](../command-line.md).",
    ]
    for name, flags in commands():
        parts += [f"## {name}", f"```text\n{flags.help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """The settings of every command under the headings of their dataclasses; those that a command
    above has with the same text, default and bounds are left out."""
    parts = [
        "# Settings",
        "A setting is a flag (`--train.lr 1e-4`), a line of a YAML file under its section, and a "
        "field of a dataclass (`editr2.Config().train.lr`); all three accept the same and refuse "
        "it in the same words. `none` is no value. What stands here is what `--help` says.",
    ]
    seen: dict[tuple[str, str, str, str], str] = {}
    for name, flags in commands():
        groups: dict[tuple[str, str], list[Option]] = {}
        same: set[str] = set()
        for option in flags.options.values():
            if not option.group:
                continue
            told = (option.key, option.help, option.accepted, repr(option.default))
            if seen.setdefault(told, name) == name:
                section = option.key.rpartition(".")[0]
                groups.setdefault((section, option.group), []).append(option)
            else:
                same.add(seen[told])
        if not groups:
            continue
        parts.append(f"## {name}")
        if same:
            also = ", ".join(f"`{other}`" for other in sorted(same))
            parts.append(f"Beside settings that are those of {also}:")
        for (section, about), options in groups.items():
            title = f"### `{section}`" if section else "### in no section"
            parts += [title, f"{_plain(about)}.", *map(_entry, options)]
    return "\n\n".join(parts) + "\n"


def _entry(option: Option) -> str:
    default = f"default: `{_default(option.default)}`"
    told = _plain(option.help).removesuffix(".")
    return f"`{option.key}`\n:   {told}.\n    *accepted: {_plain(option.accepted)}; {default}*"


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def _plain(text: str) -> str:
    """A docstring's text: its code stays code, the rest is no Markdown and no HTML."""
    code = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part if n % 2 else re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(part, quote=False))
        for n, part in enumerate(code)
    )


# ---------------------------------------------------------------------------------------------- API


OPTIONS = {"Config": "\n    options: {show_docstring_parameters: false}"}
"""Of a single name, for mkdocstrings: its fields are the page of settings."""


def api_page(title: str, module: str, about: str) -> str:
    import ast

    path = next(
        folder / module / "__init__.py"
        for folder in (ROOT, ROOT / "kernels")
        if (folder / module).is_dir()
    )
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    parts = [f"# {title}", about]
    parts += [f"::: {module}.{name}{OPTIONS.get(name, '')}" for name in names]
    return "\n\n".join(parts) + "\n"


PAGES = {
    "reference/settings.md": settings_page,
    "reference/commands.md": commands_page,
    "reference/api.md": lambda: api_page(
        "Python: editr2",
        "editr2",
        "`from editr2 import ...`: what is public, and stays. Every name is loaded when it is "
        "asked for. The fields of `Config` are the page [Settings](settings.md).",
    ),
    "reference/operators-api.md": lambda: api_page(
        "Python: editr2_kernels",
        "editr2_kernels",
        "The operators' public names; [Operators](../operators.md) says what they compute.",
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS  # the help fills a terminal's lines
    try:
        for path, page in PAGES.items():
            files.append(File.generated(config, path, content=page()))
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return files


# -------------------------------------------------------------------------------------------- links


def repository() -> str:
    """The address that setup.py has, or ""."""
    found = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text("utf-8"), re.M)
    assert found, "setup.py: REPOSITORY"
    return found[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if at := repository():
        config.repo_url = at
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside docs/ become links to the repository, or the file's name where it has
    no address. One to a file that is not there fails a strict build."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def linked(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # mkdocs' own
        if not path.is_relative_to(ROOT) or not path.exists():
            log.warning("%s: links to %s, which is not there", page.file.src_uri, target)
            return text
        name = path.relative_to(ROOT).as_posix()
        if at := config.repo_url:
            return f"[{text}]({at.rstrip('/')}/blob/main/{name}{anchor})"
        return text if path.stem in text else f"{text} (`{name}`)"

    return LINK.sub(linked, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The theme's search is a dialog that has no name for a screen reader."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')
