"""A configuration that is a Python file (in the style of ml_collections), read without running it.

The file's syntax tree is walked and what a configuration is made of is evaluated: assignments,
arithmetic, texts, lists and mappings, conditions and loops, functions of the file itself, and a
base file loaded beside it. Nothing is imported and nothing is called but the few functions in
`_FUNCTIONS`. Whatever else stands there is not guessed at: its value is unknown, what follows from
it is, too, and every such place is told.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editr2.errors import ConfigError

_MOST_STEPS = 200_000
"""Of evaluation; a configuration takes some hundreds."""
_DEEPEST = 40
_LONGEST = 100_000
"""Of a text or list, and the bits of a number."""


@dataclass(frozen=True)
class Unread:
    """Something that could not be evaluated. text: as it stands there."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass
class PythonConfig:
    """values: by dotted key; of type `Unread` where they could not be evaluated. names: the plain
    variables of the functions that made them, such as `gpu_number`. unread: the places that changed
    something nobody knows."""

    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)


class _Node(dict[str, Any]):
    """A ConfigDict."""


@dataclass(frozen=True)
class _Function:
    tree: ast.FunctionDef
    module: _Module
    defaults: Mapping[str, Any]


@dataclass
class _Module:
    path: Path
    names: dict[str, Any] = field(default_factory=dict)


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def function_names(path: Path) -> list[str]:
    """The configurations that a file has: its public functions that need no argument, in their
    order; `get_config` alone where it is one of these."""
    public = [
        node
        for node in _parsed(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    ready = [node.name for node in public if len(node.args.args) == len(node.args.defaults)]
    return ["get_config"] if "get_config" in ready else ready


def read_python_config(path: Path, name: str, whole: Sequence[str] = ()) -> PythonConfig:
    """What the function `name` of a file returns. whole: keys whose mappings are values.

    Raises `ConfigError` where there is no such function, it returns no configuration, or it does
    not end.
    """
    made = PythonConfig()
    reader = _Reader(made)
    module = reader.module(path)
    function = module.names.get(name)
    if not isinstance(function, _Function):
        known = ", ".join(function_names(path)) or "none in this file"
        raise ConfigError(f"{path}: {name!r} (accepted: a function of it: {known})")
    found = reader.call(function, [], {})
    if not isinstance(found, _Node):
        raise ConfigError(f"{path}: {name} returns no configuration (accepted: a ConfigDict)")
    made.values = dict(_flat(found, whole))
    return made


def _flat(
    node: Mapping[str, Any], whole: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, _Node) and value and key not in whole:
            yield from _flat(value, whole, f"{key}.")
        else:
            yield key, dict(value) if isinstance(value, _Node) else value


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not Python: {error.msg}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not Python: {error}") from error


def _bounded(value: Any) -> Any:
    """Raises `OverflowError` for what would fill the memory."""
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        raise OverflowError
    if isinstance(value, str | list | tuple) and len(value) > _LONGEST:
        raise OverflowError
    return value


def _times(a: Any, b: Any) -> Any:
    for one, other in ((a, b), (b, a)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            if len(one) * other > _LONGEST:
                raise OverflowError
    return a * b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and abs(b) * max(a.bit_length(), 1) > _LONGEST:
        raise OverflowError
    return a**b


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "sum": sum,
    "list": list,
    "tuple": tuple,
    "dict": lambda *given, **named: _Node(*given, **named),
    "sorted": sorted,
    "range": lambda *given: list(range(*given)) if len(range(*given)) <= _LONGEST else 1 / 0,
    "ConfigDict": lambda *given, **named: _Node(*given, **named),
    "ml_collections.ConfigDict": lambda *given, **named: _Node(*given, **named),
    "config_dict.ConfigDict": lambda *given, **named: _Node(*given, **named),
    "ml_collections.config_dict.ConfigDict": lambda *given, **named: _Node(*given, **named),
    "os.path.join": os.path.join,
    "os.path.dirname": os.path.dirname,
    "os.path.abspath": lambda path: path,
    "os.getcwd": lambda: "",
    "math.ceil": lambda x: -int(-x // 1),
    "math.floor": lambda x: int(x // 1),
}
"""What may be called, by the name it is called by. Paths stay relative: where a file was to be run
from is not known."""

_LOADERS = ("imp.load_source", "load_source")
_UNSEEN = ("print", "logging.info", "warnings.warn")
"""Calls that change no configuration."""
_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class _Reader:
    """The walk. A value that cannot be had is an `Unread`, and an expression with one in it is
    that same one."""

    def __init__(self, made: PythonConfig) -> None:
        self.made = made
        self.modules: dict[Path, _Module] = {}
        self.steps = self.depth = 0

    # ------------------------------------------------------------------------------------- modules

    def module(self, path: Path) -> _Module:
        """A file's names, with its top level walked."""
        path = Path(os.path.normpath(path))
        if path not in self.modules:
            self.modules[path] = module = _Module(path, {"__file__": str(path)})
            self.block(_parsed(path).body, module.names, module)
        return self.modules[path]

    def call(self, function: _Function, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What a function of the files returns."""
        known = [argument.arg for argument in function.tree.args.args]
        names: dict[str, Any] = {**function.defaults, **dict(zip(known, given)), **named}
        self.depth += 1
        try:
            if self.depth > _DEEPEST:
                raise ConfigError(f"{function.module.path}: functions call each other too deeply")
            self.block(function.tree.body, names, function.module)
        except _Return as returned:
            return returned.value
        finally:
            self.depth -= 1
            plain = {n: v for n, v in names.items() if isinstance(v, int | float | str)}
            self.made.names.update(plain)
        return None

    # ---------------------------------------------------------------------------------- statements

    def block(self, body: Sequence[ast.stmt], names: dict[str, Any], module: _Module) -> None:
        for statement in body:
            self.count(statement, module)
            visit = getattr(self, f"_{type(statement).__name__.lower()}", None)
            if visit is None:
                self.unread(statement, module)
            else:
                visit(statement, names, module)

    def count(self, node: ast.AST, module: _Module) -> None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            line = getattr(node, "lineno", 0)
            raise ConfigError(f"{module.path}:{line}: a loop that does not end here")

    def unread(self, node: ast.AST, module: _Module) -> Unread:
        """Notes a place that cannot be evaluated."""
        found = self.place(node, module)
        if found not in self.made.unread:
            self.made.unread.append(found)
        return found

    def place(self, node: ast.AST, module: _Module) -> Unread:
        text = " ".join(ast.unparse(node).split())
        text = text if len(text) <= 80 else f"{text[:77]}..."
        return Unread(str(module.path), getattr(node, "lineno", 0), text)

    def _functiondef(self, node: ast.FunctionDef, names: dict, module: _Module) -> None:
        arguments = node.args.args
        values = [self.value(d, names, module) for d in node.args.defaults]
        last = arguments[len(arguments) - len(values) :]
        defaults = {argument.arg: value for argument, value in zip(last, values)}
        names[node.name] = _Function(node, module, defaults)

    def _import(self, node: ast.Import, names: dict, module: _Module) -> None:
        for alias in node.names:
            beside = module.path.parent / f"{alias.name.split('.')[-1]}.py"
            if beside.is_file() and beside != module.path:
                names[alias.asname or alias.name.split(".")[0]] = self.module(beside)

    def _importfrom(self, node: ast.ImportFrom, names: dict, module: _Module) -> None:
        source = module.path.parent / f"{(node.module or '').split('.')[-1]}.py"
        for alias in node.names:
            beside = module.path.parent / f"{alias.name}.py"
            if beside.is_file() and beside != module.path:
                names[alias.asname or alias.name] = self.module(beside)
            elif source.is_file() and alias.name in self.module(source).names:
                names[alias.asname or alias.name] = self.module(source).names[alias.name]

    def _assign(self, node: ast.Assign, names: dict, module: _Module) -> None:
        value = self.value(node.value, names, module)
        for target in node.targets:
            self.store(target, value, names, module)

    def _annassign(self, node: ast.AnnAssign, names: dict, module: _Module) -> None:
        if node.value is not None:
            self.store(node.target, self.value(node.value, names, module), names, module)

    def _augassign(self, node: ast.AugAssign, names: dict, module: _Module) -> None:
        old = self.value(_loaded(node.target), names, module)
        value = self.apply(
            node, type(node.op), [old, self.value(node.value, names, module)], module
        )
        self.store(node.target, value, names, module)

    def store(self, target: ast.expr, value: Any, names: dict, module: _Module) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
            return
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, list | tuple) and len(value) == len(target.elts):
                for one, item in zip(target.elts, value):
                    self.store(one, item, names, module)
                return
        elif isinstance(target, ast.Attribute | ast.Subscript):
            owner = self.value(target.value, names, module)
            key: Any = target.attr if isinstance(target, ast.Attribute) else None
            if isinstance(target, ast.Subscript):
                key = self.value(target.slice, names, module)
            if isinstance(owner, dict) and isinstance(key, str):
                owner[key] = value
                return
        self.unread(target, module)

    def _expr(self, node: ast.Expr, names: dict, module: _Module) -> None:
        called = isinstance(node.value, ast.Call) and _dotted(node.value.func) in _UNSEEN
        if called or isinstance(node.value, ast.Constant):
            return
        if isinstance(self.value(node.value, names, module), Unread):
            self.unread(node, module)

    def _return(self, node: ast.Return, names: dict, module: _Module) -> None:
        raise _Return(None if node.value is None else self.value(node.value, names, module))

    def _if(self, node: ast.If, names: dict, module: _Module) -> None:
        asked = self.value(node.test, names, module)
        if isinstance(asked, Unread):
            self.unread(node.test, module)  # and neither branch is taken
        else:
            self.block(node.body if asked else node.orelse, names, module)

    def _while(self, node: ast.While, names: dict, module: _Module) -> None:
        while True:
            self.count(node, module)
            asked = self.value(node.test, names, module)
            if isinstance(asked, Unread):
                self.unread(node.test, module)
                return
            if not asked:
                return
            try:
                self.block(node.body, names, module)
            except _Break:
                return
            except _Continue:
                continue

    def _for(self, node: ast.For, names: dict, module: _Module) -> None:
        over = self.value(node.iter, names, module)
        if isinstance(over, Unread) or not isinstance(over, list | tuple | dict | str):
            self.unread(node.iter, module)
            return
        for item in list(over):
            self.store(node.target, item, names, module)
            try:
                self.block(node.body, names, module)
            except _Break:
                return
            except _Continue:
                continue

    def _with(self, node: ast.With, names: dict, module: _Module) -> None:
        self.block(node.body, names, module)  # `with config.unlocked():`

    def _break(self, node: ast.Break, names: dict, module: _Module) -> None:
        raise _Break

    def _continue(self, node: ast.Continue, names: dict, module: _Module) -> None:
        raise _Continue

    def _assert(self, node: ast.Assert, names: dict, module: _Module) -> None:
        asked = self.value(node.test, names, module)
        if not isinstance(asked, Unread) and not asked:
            self.unread(node, module)

    def _pass(self, node: ast.stmt, names: dict, module: _Module) -> None:
        """Nothing."""

    _global = _nonlocal = _pass

    # --------------------------------------------------------------------------------- expressions

    def value(self, node: ast.expr, names: dict, module: _Module) -> Any:
        """Of an expression; where it cannot be had, an `Unread`."""
        self.count(node, module)
        visit = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if visit is None:
            return self.place(node, module)
        try:
            return visit(node, names, module)
        except _ERRORS:
            return self.place(node, module)

    def apply(
        self, node: ast.AST, kind: type[ast.AST], values: Sequence[Any], module: _Module
    ) -> Any:
        for value in values:
            if isinstance(value, Unread):
                return value
        if kind not in _OPERATORS:
            return self.place(node, module)
        return _bounded(_OPERATORS[kind](*values))

    def _of_constant(self, node: ast.Constant, names: dict, module: _Module) -> Any:
        return node.value

    def _of_name(self, node: ast.Name, names: dict, module: _Module) -> Any:
        for known in (names, module.names):
            if node.id in known:
                return known[node.id]
        return self.place(node, module)

    def _of_attribute(self, node: ast.Attribute, names: dict, module: _Module) -> Any:
        owner = self.value(node.value, names, module)
        if isinstance(owner, _Module):
            return owner.names[node.attr]
        return owner[node.attr] if isinstance(owner, _Node) else self.place(node, module)

    def _of_subscript(self, node: ast.Subscript, names: dict, module: _Module) -> Any:
        owner, key = self.value(node.value, names, module), self.value(node.slice, names, module)
        unknown = next((v for v in (owner, key) if isinstance(v, Unread)), None)
        return unknown if unknown is not None else owner[key]

    def _of_list(self, node: ast.List, names: dict, module: _Module) -> Any:
        return self.whole([self.value(item, names, module) for item in node.elts])

    def _of_tuple(self, node: ast.Tuple, names: dict, module: _Module) -> Any:
        found = self.whole([self.value(item, names, module) for item in node.elts])
        return tuple(found) if isinstance(found, list) else found

    def _of_dict(self, node: ast.Dict, names: dict, module: _Module) -> Any:
        if None in node.keys:
            return self.place(node, module)
        keys = self.whole([self.value(key, names, module) for key in node.keys if key])
        values = [self.value(value, names, module) for value in node.values]
        return _Node(zip(keys, values)) if isinstance(keys, list) else keys

    @staticmethod
    def whole(items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, Unread)), items)

    def _of_binop(self, node: ast.BinOp, names: dict, module: _Module) -> Any:
        values = [self.value(side, names, module) for side in (node.left, node.right)]
        return self.apply(node, type(node.op), values, module)

    def _of_unaryop(self, node: ast.UnaryOp, names: dict, module: _Module) -> Any:
        return self.apply(node, type(node.op), [self.value(node.operand, names, module)], module)

    def _of_boolop(self, node: ast.BoolOp, names: dict, module: _Module) -> Any:
        value: Any = None
        for side in node.values:
            value = self.value(side, names, module)
            if isinstance(value, Unread) or bool(value) == isinstance(node.op, ast.Or):
                return value
        return value

    def _of_compare(self, node: ast.Compare, names: dict, module: _Module) -> Any:
        left = self.value(node.left, names, module)
        for op, side in zip(node.ops, node.comparators):
            right = self.value(side, names, module)
            found = self.apply(node, type(op), [left, right], module)
            if isinstance(found, Unread) or not found:
                return found
            left = right
        return True

    def _of_ifexp(self, node: ast.IfExp, names: dict, module: _Module) -> Any:
        asked = self.value(node.test, names, module)
        if isinstance(asked, Unread):
            return asked
        return self.value(node.body if asked else node.orelse, names, module)

    def _of_joinedstr(self, node: ast.JoinedStr, names: dict, module: _Module) -> Any:
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                if part.format_spec is not None or part.conversion != -1:
                    return self.place(node, module)
                value = self.value(part.value, names, module)
                if isinstance(value, Unread):
                    return value
                parts.append(str(value))
            else:
                parts.append(str(self.value(part, names, module)))
        return _bounded("".join(parts))

    def _of_call(self, node: ast.Call, names: dict, module: _Module) -> Any:
        if any(isinstance(a, ast.Starred) for a in node.args) or any(
            keyword.arg is None for keyword in node.keywords
        ):
            return self.place(node, module)
        given = [self.value(argument, names, module) for argument in node.args]
        named = {str(k.arg): self.value(k.value, names, module) for k in node.keywords}
        dotted = _dotted(node.func)
        if dotted in _LOADERS and len(given) == 2 and isinstance(given[1], str):
            return self.loaded(Path(given[1]), node, module)
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value, names, module)
            if isinstance(owner, _Node):
                return self.method(owner, node.func.attr, given, named, node, module)
        function = self.value(node.func, names, module)
        if isinstance(function, _Function):
            return self.call(function, given, named)
        unknown = next((v for v in (*given, *named.values()) if isinstance(v, Unread)), None)
        if dotted in _FUNCTIONS and dotted.split(".")[0] not in (*names, *module.names):
            return unknown or _bounded(_FUNCTIONS[dotted](*given, **named))
        return self.place(node, module)

    def loaded(self, path: Path, node: ast.Call, module: _Module) -> Any:
        """The file that a loader names."""
        for one in (path, module.path.parent / path.name):
            if one.is_file():
                return self.module(one)
        return self.unread(node, module)

    def method(
        self,
        owner: _Node,
        name: str,
        given: Sequence[Any],
        named: Mapping[str, Any],
        node: ast.Call,
        module: _Module,
    ) -> Any:
        """Of a ConfigDict or a mapping."""
        if name in ("lock", "unlock", "unlocked", "ignore_type"):
            return None
        if name == "get" and given:
            return owner.get(*given)
        if name in ("keys", "values", "items") and not given:
            return [tuple(pair) if name == "items" else pair for pair in getattr(owner, name)()]
        if name == "update":
            for more in (*given, named):
                if not isinstance(more, dict):
                    return self.place(node, module)
                owner.update(more)
            return None
        return self.place(node, module)


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression; empty of any other."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def _loaded(target: ast.expr) -> ast.expr:
    """A target as an expression that is read."""
    read = ast.parse(ast.unparse(target), mode="eval").body
    return ast.copy_location(read, target)
