"""The source of a user's function or class, and of all that it leads to by name: helpers,
constants, base classes, in its own module and in other modules of the user's.

By the text of top-level statements and not by values, so that caches and counters are none, and
what a file holds beside them is nobody's. Not followed: imports inside of functions, names made by
`exec`, files that are read.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOTS = (sysconfig.get_path("stdlib"), str(Path(__file__).parent.parent))


def sources(thing: Any) -> list[str]:
    """Texts in the order of their modules and lines. Nothing of the standard library, of installed
    packages and of ours, which have versions, nor of what has no source (typed at a prompt)."""
    found: dict[tuple[str, int], str] = {}
    read: dict[str, _Module | None] = {}
    for part in inspect.getmro(thing) if inspect.isclass(thing) else (thing,):
        if installed(part):
            continue
        module = _module(part.__module__, read)
        wanted = [(part.__module__, part.__qualname__.split(".")[0])]
        if module is None or wanted[0][1] not in module.bound:  # a lambda, or made at a prompt
            with suppress(OSError, TypeError):
                found[part.__module__, 0] = _plain(inspect.getsource(part))
            wanted = [
                (part.__module__, name)
                for name in getattr(getattr(part, "__code__", None), "co_names", ())
            ]
        _follow(wanted, read, found)
    return [found[place] for place in sorted(found)]


def installed(thing: Any) -> bool:
    try:
        file = inspect.getsourcefile(thing) or ""
    except TypeError:  # built in
        return True
    except OSError:  # a class that was typed at a prompt
        return False
    return file.startswith(_ROOTS) or "site-packages" in file or "dist-packages" in file


class _Module:
    """A module's text, its top-level statements by the names that they bind, and what its imports
    stand for: by name (module, name there), where None is the whole module."""

    def __init__(self, text: str, package: str) -> None:
        self.lines = text.splitlines()
        self.bound: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}
        for statement in ast.parse(text).body:
            for name in _binds(statement):
                self.bound.setdefault(name, []).append(statement)
            for node in ast.walk(statement):
                self.imported |= dict(_imports(node, package))

    def text(self, statement: ast.stmt) -> str:
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]
        )
        return _plain("\n".join(self.lines[first - 1 : statement.end_lineno]))


def _follow(
    wanted: list[tuple[str, str | None]],
    read: dict[str, _Module | None],
    found: dict[tuple[str, int], str],
) -> None:
    """Adds to `found` the statements that bind the `wanted` names of modules, and on from there."""
    seen = set()
    while wanted:
        where, name = wanted.pop()
        module = _module(where, read)
        if module is None or (where, name) in seen:
            continue
        seen.add((where, name))
        if name is None:
            wanted += [(where, each) for each in module.bound]
            continue
        if name in module.imported:
            other, what = module.imported[name]
            whole = what is not None and f"{other}.{what}" in sys.modules
            wanted.append((f"{other}.{what}", None) if whole else (other, what))
        for statement in module.bound.get(name, ()):
            found[where, statement.lineno] = module.text(statement)
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            wanted += [(where, each) for each in names]


def _module(name: str, read: dict[str, _Module | None]) -> _Module | None:
    """A loaded module of the user's; None of others, and where its file cannot be read."""
    if name not in read:
        module, read[name] = sys.modules.get(name), None
        if module is not None and not installed(module):
            with suppress(OSError, TypeError, SyntaxError):
                read[name] = _parsed(inspect.getsource(module), module.__package__ or "")
    return read[name]


@functools.lru_cache(maxsize=64)  # a run asks several times, and parsing takes 50 ms
def _parsed(text: str, package: str) -> _Module:
    return _Module(text, package)


def _binds(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):  # also inside of `if`, `try`, `with` and loops
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def _imports(node: ast.AST, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0], (alias.name, None)
    elif isinstance(node, ast.ImportFrom):
        where = node.module or ""
        if node.level:
            try:
                where = importlib.util.resolve_name("." * node.level + where, package)
            except ImportError:  # it would not have loaded
                return
        for alias in node.names:
            yield alias.asname or alias.name, (where, alias.name)


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
